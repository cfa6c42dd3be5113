// Every kernel, written once over the vocabulary of vector_*.h and compiled once per instruction set.
//
// The including file includes a vector header before and names the table that is defined at the end. Nothing from the C++ standard library is instantiated here, see vector_avx512.h. Multiplications and additions are
// never contracted by the compiler (-ffp-contract=off): where one rounding is meant, `fma` is written.

#include "kernels.h"

namespace weft {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504f;
constexpr int kVectorsPerPanel = kPanelColumns / kLanes;

WEFT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
WEFT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
WEFT_INLINE int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// ---- Elementary functions -------------------------------------------------------------------------------------

// 2^x, exactly 1 at 0, 0 at -inf, NaN at NaN. The fraction's power is a polynomial fitted to least relative error with
// p(0) = 1: 3·10⁻⁶ with four terms, for weights that are then rounded to bfloat16; 1.4·10⁻⁷ with five.
template <int kTerms>
WEFT_INLINE Floats exp2(Floats x) {
  static_assert(kTerms == 4 || kTerms == 5, "coefficients are given for these");
  const Floats f = fraction(x);
  Floats y;
  if (kTerms == 4) {
    y = set(0.013426685705780983f);
    y = fma(y, f, set(0.052242472767829895f));
    y = fma(y, f, set(0.2412802129983902f));
    y = fma(y, f, set(0.6930448412895203f));
  } else {
    y = set(0.0018671301659196615f);
    y = fma(y, f, set(0.009017029777169228f));
    y = fma(y, f, set(0.05579991266131401f));
    y = fma(y, f, set(0.24016444385051727f));
    y = fma(y, f, set(0.6931512951850891f));
  }
  return scale_by_floor(fma(y, f, set(1.0f)), x);
}

// e^x with the argument reduced in two steps, so that large |x| loses nothing.
WEFT_INLINE Floats exp(Floats x) {
  const Floats bounded = max(set(-140.0f), min(set(140.0f), x));
  const Floats whole = round_to_integer(multiply(bounded, set(1.44269504f)));
  Floats r = fma(whole, set(-0.693359375f), bounded);
  r = fma(whole, set(2.12194440e-4f), r);
  Floats y = set(1.3888889e-3f);
  y = fma(y, r, set(8.3333333e-3f));
  y = fma(y, r, set(4.1666667e-2f));
  y = fma(y, r, set(1.6666667e-1f));
  y = fma(y, r, set(0.5f));
  y = fma(y, r, set(1.0f));
  y = fma(y, r, set(1.0f));
  return scale_by_power(y, whole);
}

WEFT_INLINE Floats sigmoid(Floats x) { return divide(set(1.0f), add(set(1.0f), exp(subtract(zero(), x)))); }

// 1 - 2 / (e^2x + 1): absolute error about 10⁻⁷, all that a capped score needs.
WEFT_INLINE Floats tanh(Floats x) {
  const Floats doubled = exp(add(x, x));
  return subtract(set(1.0f), divide(set(2.0f), add(doubled, set(1.0f))));
}

// ln x for normal x > 0, absolute error below 10⁻⁵: enough to find the few candidates that are then computed exactly.
WEFT_INLINE Floats coarse_log(Floats x) {
  const Floats exponent = exponent_of(x);
  const Floats m = mantissa_of(x);
  // atanh series: ln m = 2 (z + z³/3 + z⁵/5 + …), z = (m - √2) / (m + √2), shifted by ln √2.
  const Floats z = divide(subtract(m, set(1.41421356f)), add(m, set(1.41421356f)));
  const Floats zz = multiply(z, z);
  Floats series = fma(zz, set(0.2857143f), set(0.4f));
  series = fma(series, zz, set(0.6666667f));
  series = fma(series, zz, set(2.0f));
  return fma(exponent, set(0.69314718f), fma(series, z, set(0.34657359f)));
}

// ---- Typed rows -----------------------------------------------------------------------------------------------

template <typename Element>
WEFT_INLINE Floats load_up_to(const Element* p, int64_t count) {
  return count >= kLanes ? load(p) : load_first(p, count);
}
template <typename Element>
WEFT_INLINE void store_up_to(Element* p, Floats x, int64_t count) {
  if (count >= kLanes) {
    store(p, x);
  } else {
    store_first(p, x, count);
  }
}

template <typename From, typename To>
void convert_elements(const From* x, To* out, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) store_up_to(out + i, load_up_to(x + i, width - i), width - i);
}

// The largest absolute value of some elements, and whether all of them are numbers.
struct Widest {
  float value;
  bool is_finite;
};
template <typename Element>
WEFT_INLINE Widest widest_of(const Element* x, int64_t count) {
  Floats largest = zero();
  uint32_t nan = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats part = absolute(load_up_to(x + i, count - i));
    nan |= lanes_nan(part);
    largest = max(part, largest);
  }
  const float value = max_of_lanes(largest);
  return {value, nan == 0 && value < __builtin_inff()};
}

// out[i] = x[i] · factor, rounded to the nearest integer.
template <typename Element>
WEFT_INLINE void round_elements(const Element* x, float factor, int16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats scaled = multiply(load_up_to(x + i, count - i), set(factor));
    if (count - i >= kLanes) {
      store_rounded(out + i, scaled);
      continue;
    }
    int16_t rest[kLanes];
    store_rounded(rest, scaled);
    for (int64_t j = i; j < count; ++j) out[j] = rest[j - i];
  }
}

void convert_row(const void* x, DataType from, void* out, DataType to, int64_t width) {
  if (from == kFloat32) {
    const float* source = static_cast<const float*>(x);
    if (to == kFloat32) convert_elements(source, static_cast<float*>(out), width);
    if (to == kBfloat16) convert_elements(source, static_cast<uint16_t*>(out), width);
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(x);
    if (to == kFloat32) convert_elements(source, static_cast<float*>(out), width);
    if (to == kBfloat16) __builtin_memcpy(out, x, width * 2);
  }
}

// ---- Matrix products ------------------------------------------------------------------------------------------

// How one step of a sum is done. A step reads one vector of words from the panel and one element (or pair of
// elements) of x.
struct FloatDot {
  static constexpr int kBytesOfX = 4;
  WEFT_INLINE Floats step(Floats sum, const uint8_t* x, Words w) {
    return fma(broadcast(reinterpret_cast<const float*>(x)), (Floats)w, sum);
  }
};

// bfloat16 weights and float32 x: two roundings per step, first the even input, then the odd one.
struct WidenedDot {
  static constexpr int kBytesOfX = 8;
  WEFT_INLINE Floats step(Floats sum, const uint8_t* x, Words w) {
    const float* pair = reinterpret_cast<const float*>(x);
    return fma(broadcast(pair + 1), high_halves(w), fma(broadcast(pair), low_halves(w), sum));
  }
};

#ifdef __AVX512BF16__
constexpr bool kHasBf16Dot = true;

struct Bf16Dot {
  static constexpr int kBytesOfX = 4;
  WEFT_INLINE Floats step(Floats sum, const uint8_t* x, Words w) { return dot_bf16(sum, x, w); }
};

using WeightDot = Bf16Dot;
#else
constexpr bool kHasBf16Dot = false;

using WeightDot = WidenedDot;
#endif

// sums[row][vector] += Σ over steps of x[row][step] · w[step][vector]: one fixed chain of additions per element.
// The vectors are kPanels groups of kVectors, `panel_bytes` apart; steps are `step_bytes` apart.
template <typename Dot, int kRows, int kPanels, int kVectors, int kPrefetchBytes>
WEFT_INLINE void accumulate(Floats (&sums)[kRows][kPanels * kVectors], const uint8_t* x, int64_t x_row_bytes,
                            const uint8_t* w, int64_t panel_bytes, int64_t step_bytes, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    Words weights[kPanels * kVectors];
#pragma GCC unroll 4
    for (int panel = 0; panel < kPanels; ++panel) {
      const uint8_t* from = w + panel * panel_bytes;
#pragma GCC unroll 8
      for (int vector = 0; vector < kVectors; ++vector) {
        weights[panel * kVectors + vector] = load_words(from + vector * sizeof(Words));
        if (kPrefetchBytes > 0 && vector * sizeof(Words) % 64 == 0) {
          __builtin_prefetch(from + kPrefetchBytes + vector * sizeof(Words));
        }
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
      for (int vector = 0; vector < kPanels * kVectors; ++vector) {
        sums[row][vector] = Dot::step(sums[row][vector], x + row * x_row_bytes, weights[vector]);
      }
    }
    x += Dot::kBytesOfX;
    w += step_bytes;
  }
}

// ---- Linear ---------------------------------------------------------------------------------------------------

template <typename Element>
void pack_panels_of(const PackArguments& a, int64_t first_panel, int64_t end_panel) {
  constexpr int64_t kElementsPerWord = 4 / sizeof(Element);
  const Element* weight = static_cast<const Element*>(a.weight);
  const int64_t whole_words = a.in_features / kElementsPerWord;
  alignas(64) static const uint32_t zeros[kTransposeSize] = {};
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    uint32_t* out = static_cast<uint32_t*>(a.panels) + panel * panel_steps(a.in_features, a.dtype) * kPanelColumns;
    for (int64_t column = 0; column < kPanelColumns; column += kTransposeSize) {
      const int64_t first_row = panel * kPanelColumns + column;
      for (int64_t word = 0; word < whole_words; word += kTransposeSize) {
        const uint32_t* rows[kTransposeSize];
        for (int i = 0; i < kTransposeSize; ++i) {
          const bool exists = first_row + i < a.out_features;
          rows[i] = exists ? reinterpret_cast<const uint32_t*>(weight + (first_row + i) * a.row_stride) + word : zeros;
        }
        transpose_words(rows, smaller(whole_words - word, kTransposeSize), out + word * kPanelColumns + column,
                        kPanelColumns);
      }
      if (whole_words * kElementsPerWord == a.in_features) continue;
      for (int i = 0; i < kTransposeSize; ++i) {  // The odd last input, paired with zero.
        const bool exists = first_row + i < a.out_features;
        uint32_t word = 0;
        if (exists) __builtin_memcpy(&word, weight + (first_row + i) * a.row_stride + a.in_features - 1, sizeof(Element));
        out[whole_words * kPanelColumns + column + i] = word;
      }
    }
  }
}

void pack_panels(const PackArguments& a, int64_t first_panel, int64_t end_panel) {
  if (a.dtype == kFloat32) {
    pack_panels_of<float>(a, first_panel, end_panel);
  } else {
    pack_panels_of<uint16_t>(a, first_panel, end_panel);
  }
}

// Adds bias and residual, rounds once, stores. `count` columns of the vector exist.
template <typename Weight, typename Out>
WEFT_INLINE void finish_vector(const LinearArguments& a, Floats sum, int64_t row, int64_t column, int64_t count) {
  if (a.bias != nullptr) sum = add(sum, load_up_to(a.bias + column, count));
  if (a.residual != nullptr) {
    sum = add(sum, load_up_to(static_cast<const Weight*>(a.residual) + row * a.residual_stride + column, count));
  }
  store_up_to(static_cast<Out*>(a.out) + row * a.out_stride + column, sum, count);
}

// Where a tile asks for weights that are needed later: two lines per step of its own panel, from `first` on.
struct WeightsAhead {
  const uint8_t* first;
  int64_t step_bytes;
};

// One panel as one stream from memory, asked for this far ahead, arrives at the full rate of a core (measured: two
// panels side by side and half the distance give 90 % of it).
constexpr int64_t kStreamAhead = 8192;

template <typename Dot, typename Weight, typename Out, int kRows>
__attribute__((noinline)) void linear_tile(const LinearArguments& a, int64_t row, int64_t panel,
                                           const WeightsAhead& ahead) {
  Floats sums[kRows][kVectorsPerPanel];
  for (auto& of_row : sums) {
    for (Floats& sum : of_row) sum = zero();
  }
  const uint8_t* x = static_cast<const uint8_t*>(a.x) + row * a.x_row_bytes;
  const uint8_t* w = a.panels + panel * panel_bytes(a.in_features, a.dtype);
  const uint8_t* later = ahead.first;
  for (int64_t step = panel_steps(a.in_features, a.dtype); step > 0; --step) {
    __builtin_prefetch(later);
    __builtin_prefetch(later + 64);
    later += ahead.step_bytes;
    accumulate<Dot, kRows, 1, kVectorsPerPanel, 0>(sums, x, a.x_row_bytes, w, 0, 0, 1);
    x += Dot::kBytesOfX;
    w += 128;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int vector = 0; vector < kVectorsPerPanel; ++vector) {
      const int64_t column = panel * kPanelColumns + vector * kLanes;
      if (column < a.out_features) {
        finish_vector<Weight, Out>(a, sums[r][vector], row + r, column, a.out_features - column);
      }
    }
  }
}

template <typename Dot, typename Weight, typename Out, int kRows = kMaxLinearRows>
WEFT_INLINE void linear_some_rows(const LinearArguments& a, int64_t rows, int64_t row, int64_t panel,
                                  const WeightsAhead& ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return linear_some_rows<Dot, Weight, Out, kRows - 1>(a, rows, row, panel, ahead);
  }
  linear_tile<Dot, Weight, Out, kRows>(a, row, panel, ahead);
}

// Panels outside, rows inside: a panel is read from memory once and stays in the cache for all rows. A lone tile of
// rows runs along the stream of weights; of several, each asks for its share of the next panel, so that memory is
// busy all the time and not only while the first tile meets a panel.
template <typename Dot, typename Weight, typename Out>
void linear_piece(const LinearArguments& a, int64_t first_row, int64_t end_row, int64_t first_panel,
                  int64_t end_panel) {
  const int64_t bytes = panel_bytes(a.in_features, a.dtype);
  const int64_t tiles = (end_row - first_row + kMaxLinearRows - 1) / kMaxLinearRows;
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    WeightsAhead ahead{a.panels + panel * bytes + (tiles == 1 ? kStreamAhead : bytes), (128 + tiles - 1) / tiles};
    int64_t row = first_row;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t rows = (end_row - row + (tiles - tile) - 1) / (tiles - tile);
      linear_some_rows<Dot, Weight, Out>(a, rows, row, panel, ahead);
      row += rows;
      ahead.first += bytes / tiles;
    }
  }
}

bool linear_wants_float_rows(DataType weights) { return weights == kBfloat16 && !kHasBf16Dot; }

void linear(const LinearArguments& a, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel) {
  if (a.dtype == kFloat32) {
    return linear_piece<FloatDot, float, float>(a, first_row, end_row, first_panel, end_panel);
  }
  if (a.out_dtype == kFloat32) {
    linear_piece<WeightDot, uint16_t, float>(a, first_row, end_row, first_panel, end_panel);
  } else {
    linear_piece<WeightDot, uint16_t, uint16_t>(a, first_row, end_row, first_panel, end_panel);
  }
}

// ---- Attention ------------------------------------------------------------------------------------------------

// Softmax state of the rows of a piece over the keys seen so far, in base 2: weights are 2^(score - m).
struct State {
  float* m;  // [rows] largest score
  float* l;  // [rows, kLanes] sums of weights, one per lane
  float* o;  // [rows, Do] weighted sums of values
};

constexpr float kNothingSeen = -1e30f;

WEFT_INLINE int64_t output_width(const AttentionArguments& a) { return round_up(a.head_size, kLanes); }

// From a score to the base of its weight, 2.
WEFT_INLINE float factor_of(const AttentionArguments& a) {
  return (a.softcap > 0.0f ? a.softcap : a.scale) * kLog2E;
}

// Room for a whole vector from any row on.
WEFT_INLINE int64_t padded_rows(int64_t rows) { return round_up(rows + kLanes, 16); }

int64_t attention_state_floats(const AttentionArguments& a, int64_t rows) {
  return padded_rows(rows) + rows * kLanes + rows * output_width(a);
}

WEFT_INLINE State state_at(float* memory, int64_t rows) {
  float* const l = memory + padded_rows(rows);
  return {memory, l, l + rows * kLanes};
}

// Memory of one piece in progress; every array starts at a multiple of 64 bytes.
struct Workspace {
  uint8_t* q;             // [rows, D] elements of the arithmetic
  uint8_t* weights;       // [rows, 32] elements of the arithmetic
  uint8_t* values;        // a tile's units [32/n][Do], where the pool's cannot be read as they are
  float* decay;           // [rows] factor on what a row had gathered before the tile
  float* q_scales;        // [rows], these four for int8 alone
  float* weight_scales;   // [rows]
  float* key_scales;      // [32]
  float* value_scales;    // [32]
  State part;
  State total;
};

// Cuts the workspace out of `memory`; returns the bytes it takes.
WEFT_INLINE int64_t cut_workspace(const AttentionArguments& a, uint8_t* memory, int64_t rows, Workspace* w) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    uint8_t* const taken = memory + used;
    used += round_up(bytes, 64);
    return taken;
  };
  const auto take_floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * 4)); };
  w->q = take(rows * a.head_size * 4);
  w->weights = take(rows * kTilePositions * 4);
  w->values = take(kTilePositions * output_width(a) * 4);
  w->decay = take_floats(padded_rows(rows));
  w->q_scales = take_floats(padded_rows(rows));
  w->weight_scales = take_floats(padded_rows(rows));
  w->key_scales = take_floats(kTilePositions);
  w->value_scales = take_floats(kTilePositions);
  w->part = state_at(take_floats(attention_state_floats(a, rows)), rows);
  w->total = state_at(take_floats(attention_state_floats(a, rows)), rows);
  return used;
}

WEFT_INLINE Workspace workspace_at(const AttentionArguments& a, void* memory, int64_t rows) {
  Workspace w;
  cut_workspace(a, static_cast<uint8_t*>(memory), rows, &w);
  return w;
}

int64_t attention_scratch_bytes(const AttentionArguments& a, int64_t rows) {
  Workspace w;
  return cut_workspace(a, nullptr, rows, &w);
}

// What the pool is made of when it holds elements of a type: see kernels.h.
template <typename Stored>
struct Held;
template <>
struct Held<float> {
  using Unit = uint32_t;
  static constexpr int64_t kPerUnit = 1;
};
template <>
struct Held<uint16_t> {
  using Unit = uint32_t;
  static constexpr int64_t kPerUnit = 2;
};
template <>
struct Held<int8_t> {
  using Unit = uint16_t;
  static constexpr int64_t kPerUnit = 2;
};

// Positions of a piece whose keys some row sees: [begin, end). Values elsewhere count as zero: memory that nobody has
// written may hold NaN, and a weight of zero does not silence it. Scores elsewhere are replaced, whatever they are.
struct Seen {
  int64_t begin;
  int64_t end;
};

constexpr int kRunsPerTile = kTilePositions / kRunPositions;

// Where the keys and values of a tile stand, run by run; nullptr where nobody sees a key of the run.
template <typename Stored>
struct TileRuns {
  using Unit = typename Held<Stored>::Unit;
  const Unit* keys[kRunsPerTile];
  const Unit* values[kRunsPerTile];
  const float* key_scales[kRunsPerTile];
  const float* value_scales[kRunsPerTile];
};

template <typename Stored>
WEFT_INLINE TileRuns<Stored> find_runs(const AttentionArguments& a, const AttentionPiece& piece, const Seen& seen,
                                       int64_t tile) {
  using Unit = typename Held<Stored>::Unit;
  const int32_t* const table = a.block_tables + piece.sequence * a.table_stride;
  const int64_t element_bytes = a.block_size * a.head_size * static_cast<int64_t>(sizeof(Stored));
  const int64_t block_bytes = element_bytes + (sizeof(Stored) == 1 ? a.block_size * 4 : 0);
  TileRuns<Stored> runs;
#pragma GCC unroll 2
  for (int run = 0; run < kRunsPerTile; ++run) {
    const int64_t first = tile + run * kRunPositions;
    if (first >= seen.end || first + kRunPositions <= seen.begin) {
      runs.keys[run] = runs.values[run] = nullptr;
      continue;
    }
    const int64_t block = table[static_cast<uint32_t>(first) / static_cast<uint32_t>(a.block_size)];
    const int64_t offset = static_cast<uint32_t>(first) % static_cast<uint32_t>(a.block_size);
    const int64_t start = (block * a.kv_heads + piece.kv_head) * block_bytes;
    const int64_t elements = start + offset * a.head_size * static_cast<int64_t>(sizeof(Stored));
    const int64_t scales = start + element_bytes + offset * 4;
    runs.keys[run] = reinterpret_cast<const Unit*>(static_cast<const uint8_t*>(a.keys) + elements);
    runs.values[run] = reinterpret_cast<const Unit*>(static_cast<const uint8_t*>(a.values) + elements);
    runs.key_scales[run] = reinterpret_cast<const float*>(static_cast<const uint8_t*>(a.keys) + scales);
    runs.value_scales[run] = reinterpret_cast<const float*>(static_cast<const uint8_t*>(a.values) + scales);
  }
  return runs;
}

// What a thread visits: one piece, and the piece after it, whose first tiles are asked for in time.
struct Visit {
  const AttentionPiece* piece;
  Seen seen;
  const AttentionPiece* next;  // nullptr: none
  Seen next_seen;
};

WEFT_INLINE int64_t first_position_of(const AttentionArguments& a, const AttentionPiece& piece) {
  const int64_t length = a.query_starts[piece.sequence + 1] - a.query_starts[piece.sequence];
  return a.context_lens[piece.sequence] - length + piece.first_query;
}

WEFT_INLINE Seen seen_by(const AttentionArguments& a, const AttentionPiece& piece) {
  const int64_t first_position = first_position_of(a, piece);
  return {a.window > 0 ? larger(first_position - a.window + 1, 0) : 0, first_position + piece.num_queries};
}

WEFT_INLINE int64_t first_tile_of(const Seen& seen) { return seen.begin / kTilePositions * kTilePositions; }

// Runs of the tile at `tile`, or of the next piece when this one ends before.
template <typename Stored>
WEFT_INLINE TileRuns<Stored> find_later_runs(const AttentionArguments& a, const Visit& visit, int64_t tile) {
  const int64_t past = tile - round_up(visit.seen.end, kTilePositions);
  if (past < 0 || visit.next == nullptr) return find_runs<Stored>(a, *visit.piece, visit.seen, tile);
  return find_runs<Stored>(a, *visit.next, visit.next_seen, first_tile_of(visit.next_seen) + past);
}

WEFT_INLINE bool is_whole(const Seen& seen, int64_t tile) {
  return tile >= seen.begin && tile + kTilePositions <= seen.end;
}

// What all rows of a piece share while a tile is visited. Units are read from the pool where they stand; meanwhile
// those of a later tile are asked for, one by one: spread like this requests reach twice the rate of a burst.
template <typename Stored>
struct Tile {
  using Unit = typename Held<Stored>::Unit;
  int64_t first;           // absolute position of its first key
  int64_t first_position;  // absolute position of the piece's first query
  int64_t group;           // query heads per key head
  bool is_open;            // whether all rows that take part see all of its keys
  const Unit* keys[kRunsPerTile];
  const Unit* keys_ahead[kRunsPerTile];
  const Unit* values[kRunsPerTile];
  const Unit* values_ahead[kRunsPerTile];
  int64_t value_stride;  // units from one step over positions to the next

  void look_at(const TileRuns<Stored>& at, const TileRuns<Stored>& later) {
    // One of the runs is there, or the tile would not be visited.
    const Unit* const some_keys = at.keys[0] != nullptr ? at.keys[0] : at.keys[1];
    for (int run = 0; run < kRunsPerTile; ++run) {
      keys[run] = at.keys[run] != nullptr ? at.keys[run] : some_keys;
      values[run] = at.values[run];
      keys_ahead[run] = later.keys[run] != nullptr ? later.keys[run] : keys[run];
      values_ahead[run] = later.values[run] != nullptr ? later.values[run] : some_keys;
    }
  }
};

// Copies the values of a tile with zeros where nobody sees a position and where the head ends within a vector.
template <typename Stored>
void copy_values(const AttentionArguments& a, const TileRuns<Stored>& at, const Seen& seen, int64_t tile,
                 typename Held<Stored>::Unit* out) {
  using Unit = typename Held<Stored>::Unit;
  constexpr int64_t kPerUnit = Held<Stored>::kPerUnit;
  constexpr Unit kElement = static_cast<Unit>(~Unit{0}) >> (sizeof(Unit) - sizeof(Stored)) * 8;
  const int64_t width = output_width(a);
  for (int64_t index = 0; index < kTilePositions; index += kPerUnit, out += width) {
    Unit kept = 0;
    for (int64_t element = 0; element < kPerUnit; ++element) {
      const int64_t position = tile + index + element;
      if (position >= seen.begin && position < seen.end) kept |= kElement << element * sizeof(Stored) * 8;
    }
    int64_t copied = 0;
    if (kept != 0) {
      const Unit* const from = at.values[index / kRunPositions] + index % kRunPositions / kPerUnit * a.head_size;
      for (; copied < a.head_size; ++copied) out[copied] = from[copied] & kept;
    }
    for (int64_t d = copied; d < width; ++d) out[d] = 0;
  }
}

// sums[row][vector] += Σ over steps of x[row][step] · units of the step: one fixed chain of additions per element.
// Vectors are kRuns groups of kVectors, each group read from its own run of units; steps are `stride` units apart.
template <typename Dot, int kRows, int kRuns, int kVectors, typename Unit>
WEFT_INLINE void accumulate_units(typename Dot::Sum (&sums)[kRows][kRuns * kVectors], const uint8_t* x,
                                  int64_t x_row_bytes, const Unit* const* runs, const Unit* const* ahead,
                                  int64_t stride, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    Integers units[kRuns * kVectors];
#pragma GCC unroll 4
    for (int run = 0; run < kRuns; ++run) {
#pragma GCC unroll 8
      for (int vector = 0; vector < kVectors; ++vector) {
        const int64_t place = step * stride + vector * kLanes;
        units[run * kVectors + vector] = (Integers)load_units(runs[run] + place);
        if (vector * kLanes * sizeof(Unit) % 64 == 0) __builtin_prefetch(ahead[run] + place);
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 16
      for (int vector = 0; vector < kRuns * kVectors; ++vector) {
        sums[row][vector] = Dot::step(sums[row][vector], x + row * x_row_bytes, (Words)units[vector]);
      }
    }
    x += Dot::kBytesOfX;
  }
}

// Sums that are floats from the start.
template <typename StepOfDot>
struct FloatSums : StepOfDot {
  using Sum = Floats;
  WEFT_INLINE Sum nothing() { return zero(); }
};

// An arithmetic says what queries and weights are made of, how they meet units of the pool, and what the sums mean.
template <typename Element_, typename Stored_, typename StepOfDot, int kTerms>
struct PlainArithmetic {
  using Element = Element_;
  using Stored = Stored_;
  using Dot = FloatSums<StepOfDot>;
  static constexpr int kTermsOfExp2 = kTerms;

  WEFT_INLINE void look_at(const Workspace&, const TileRuns<Stored>&, const TileRuns<Stored>&, const Seen&, int64_t) {}
  WEFT_INLINE Floats score(const Workspace&, Floats sum, int64_t, int) { return sum; }
  WEFT_INLINE Floats output(const Workspace&, Floats sum, int64_t) { return sum; }

  template <int kRows>
  WEFT_INLINE void store_weights(const Workspace& w, int64_t row, Floats (&p)[kRows][kVectorsPerPanel]) {
    Element* const out = reinterpret_cast<Element*>(w.weights) + row * kTilePositions;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      for (int vector = 0; vector < kVectorsPerPanel; ++vector) {
        store(out + r * kTilePositions + vector * kLanes, p[r][vector]);
      }
    }
  }
};

template <typename Stored>
struct FloatArithmetic;
template <>
struct FloatArithmetic<float> : PlainArithmetic<float, float, FloatDot, 5> {};
template <>
struct FloatArithmetic<uint16_t> : PlainArithmetic<float, uint16_t, WidenedDot, 5> {};
#ifdef __AVX512BF16__
// bfloat16 throughout, with one rounding of the softmax weights to bfloat16.
struct PairArithmetic : PlainArithmetic<uint16_t, uint16_t, Bf16Dot, 4> {};
#endif

// Codes of 8 bits meet queries and weights of 16, in exact integers. A query is rounded once to 15 bits of its largest
// element; so are a row's weights in a tile, each times the scale of its value.
struct CodeArithmetic {
  using Element = int16_t;
  using Stored = int8_t;
  static constexpr int kTermsOfExp2 = 4;
  // |sum| stays below 2³¹ with 1,024 dimensions, and with 32 positions.
  static constexpr float kLargestQuery = 16383.0f;
  static constexpr float kLargestWeight = 32767.0f;

  struct Dot {
    using Sum = Integers;
    static constexpr int kBytesOfX = 4;
    WEFT_INLINE Sum nothing() { return no_integers(); }
    WEFT_INLINE Sum step(Sum sum, const uint8_t* x, Words w) { return dot_integers(sum, broadcast_word(x), w); }
  };

  WEFT_INLINE void look_at(const Workspace& w, const TileRuns<Stored>& at, const TileRuns<Stored>& later,
                           const Seen& seen, int64_t tile) {
    for (int run = 0; run < kRunsPerTile; ++run) {
      float* const key_scales = w.key_scales + run * kRunPositions;
      float* const value_scales = w.value_scales + run * kRunPositions;
      if (later.keys[run] != nullptr) {
        __builtin_prefetch(later.key_scales[run]);
        __builtin_prefetch(later.value_scales[run]);
      }
      if (at.keys[run] == nullptr) {
        for (int i = 0; i < kRunPositions; ++i) key_scales[i] = value_scales[i] = 0.0f;
        continue;
      }
      for (int i = 0; i < kRunPositions; i += kLanes) {
        store(key_scales + i, load(at.key_scales[run] + i));
        store(value_scales + i, load(at.value_scales[run] + i));
      }
    }
    if (is_whole(seen, tile)) return;
    for (int i = 0; i < kTilePositions; ++i) {
      if (tile + i < seen.begin || tile + i >= seen.end) w.value_scales[i] = 0.0f;
    }
  }

  WEFT_INLINE Floats score(const Workspace& w, Integers sum, int64_t row, int vector) {
    const Floats scale = multiply(set(w.q_scales[row]), load(w.key_scales + vector * kLanes));
    return multiply(to_floats(sum), scale);
  }
  WEFT_INLINE Floats output(const Workspace& w, Integers sum, int64_t row) {
    return multiply(to_floats(sum), set(w.weight_scales[row]));
  }

  template <int kRows>
  WEFT_INLINE void store_weights(const Workspace& w, int64_t row, Floats (&p)[kRows][kVectorsPerPanel]) {
    Floats heaviest[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectorsPerPanel; ++vector) {
        p[r][vector] = multiply(p[r][vector], load(w.value_scales + vector * kLanes));
      }
      heaviest[r] = p[r][0];
#pragma GCC unroll 4
      for (int vector = 1; vector < kVectorsPerPanel; ++vector) heaviest[r] = max(p[r][vector], heaviest[r]);
    }
    const Floats largest = max(max_of_each(heaviest), set(1e-30f));
    const Floats inverse = divide(set(kLargestWeight), largest);
    store_first(w.weight_scales + row, multiply(largest, set(1.0f / kLargestWeight)), kRows);
    Element* const out = reinterpret_cast<Element*>(w.weights) + row * kTilePositions;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Floats factor = lane(inverse, r);
#pragma GCC unroll 4
      for (int vector = 0; vector < kVectorsPerPanel; ++vector) {
        store_rounded(out + r * kTilePositions + vector * kLanes, multiply(p[r][vector], factor));
      }
    }
  }
};

// What raising m leaves for the exponentials: one lane per row.
struct Raised {
  Floats m;
  Floats decay;
};

// Hides what rows do not see, and brings their m up to date: the first half of the online softmax.
template <typename Arithmetic, int kRows>
WEFT_INLINE Raised raise_m(const AttentionArguments& a, const Workspace& w,
                           const Tile<typename Arithmetic::Stored>& tile, int64_t row,
                           Floats (&scores)[kRows][kVectorsPerPanel]) {
  if (a.softcap > 0.0f) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      for (Floats& score : scores[r]) score = tanh(multiply(score, set(a.scale / a.softcap)));
    }
  }
  if (!tile.is_open) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const int64_t position = tile.first_position + (row + r) / tile.group;
      const int32_t high = static_cast<int32_t>(smaller(position - tile.first, kTilePositions));
      const int32_t low = a.window > 0 ? static_cast<int32_t>(larger(position - a.window - tile.first, -1)) : -1;
      for (int vector = 0; vector < kVectorsPerPanel; ++vector) {
        scores[r][vector] = keep_between(scores[r][vector], vector * kLanes, low, high);
      }
    }
  }
  Floats largest[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    largest[r] = scores[r][0];
    for (int vector = 1; vector < kVectorsPerPanel; ++vector) largest[r] = max(scores[r][vector], largest[r]);
  }
  const Floats before = load(w.part.m + row);  // more lanes than rows
  const Floats m = max(multiply(max_of_each(largest), set(factor_of(a))), before);
  const Floats decay = exp2<Arithmetic::kTermsOfExp2>(subtract(before, m));
  store_first(w.part.m + row, m, kRows);
  store_first(w.decay + row, decay, kRows);
  return {m, decay};
}

// Scores become weights, and the rows' l is brought up to date: the second half. `of_row(r)` gives m and decay of a row
// in every lane.
template <typename Arithmetic, int kRows, typename OfRow>
WEFT_INLINE void weigh(const AttentionArguments& a, const Workspace& w, int64_t row,
                       Floats (&scores)[kRows][kVectorsPerPanel], const OfRow& of_row) {
  const Floats factor = set(factor_of(a));
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Raised raised = of_row(r);
    const Floats shift = subtract(zero(), raised.m);
    float* const l = w.part.l + (row + r) * kLanes;
    Floats sum = multiply(load(l), raised.decay);
#pragma GCC unroll 4
    for (Floats& score : scores[r]) {
      score = exp2<Arithmetic::kTermsOfExp2>(fma(score, factor, shift));
      sum = add(sum, score);
    }
    store(l, sum);
  }
  Arithmetic::template store_weights<kRows>(w, row, scores);
}

// Rows that wait for their exponentials.
struct alignas(64) Waiting {
  float scores[kScoreRows][kTilePositions];
  float m[kLanes];
  float decay[kLanes];
};

// Scores of kRows rows against a tile, left in `waiting` for weigh_rows, or made weights at once where it is nullptr.
// Not inlined, so that each number of rows has the registers for itself.
template <typename Arithmetic, int kRows>
__attribute__((noinline)) void score_rows(const AttentionArguments& a, const Workspace& w,
                                          const Tile<typename Arithmetic::Stored>& tile, int64_t row,
                                          Waiting* waiting) {
  using Dot = typename Arithmetic::Dot;
  typename Dot::Sum sums[kRows][kVectorsPerPanel];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (auto& sum : sums[r]) sum = Dot::nothing();
  }
  const int64_t row_bytes = a.head_size * static_cast<int64_t>(sizeof(typename Arithmetic::Element));
  accumulate_units<Dot, kRows, kRunsPerTile, kRunPositions / kLanes>(
      sums, w.q + row * row_bytes, row_bytes, tile.keys, tile.keys_ahead, kRunPositions,
      a.head_size / Held<typename Arithmetic::Stored>::kPerUnit);
  Floats scores[kRows][kVectorsPerPanel];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectorsPerPanel; ++vector) {
      scores[r][vector] = Arithmetic::score(w, sums[r][vector], row + r, vector);
    }
  }
  const Raised raised = raise_m<Arithmetic, kRows>(a, w, tile, row, scores);
  if (waiting == nullptr) {
    return weigh<Arithmetic, kRows>(a, w, row, scores,
                                    [&](int r) { return Raised{lane(raised.m, r), lane(raised.decay, r)}; });
  }
  store(waiting->m, raised.m);
  store(waiting->decay, raised.decay);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectorsPerPanel; ++vector) {
      store(waiting->scores[r] + vector * kLanes, scores[r][vector]);
    }
  }
}

template <typename Arithmetic, int kRows>
__attribute__((noinline)) void weigh_rows(const AttentionArguments& a, const Workspace& w, int64_t row,
                                          const Waiting& waiting) {
  Floats scores[kRows][kVectorsPerPanel];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectorsPerPanel; ++vector) {
      scores[r][vector] = load(waiting.scores[r] + vector * kLanes);
    }
  }
  weigh<Arithmetic, kRows>(a, w, row, scores,
                           [&](int r) { return Raised{set(waiting.m[r]), set(waiting.decay[r])}; });
}

template <typename Arithmetic, int kRows = kScoreRows>
WEFT_INLINE void score_some_rows(const AttentionArguments& a, const Workspace& w,
                                 const Tile<typename Arithmetic::Stored>& tile, int64_t row, int64_t rows,
                                 Waiting* waiting) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return score_some_rows<Arithmetic, kRows - 1>(a, w, tile, row, rows, waiting);
  }
  score_rows<Arithmetic, kRows>(a, w, tile, row, waiting);
}

template <typename Arithmetic, int kRows = kScoreRows>
WEFT_INLINE void weigh_some_rows(const AttentionArguments& a, const Workspace& w, int64_t row, int64_t rows,
                                 const Waiting& waiting) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return weigh_some_rows<Arithmetic, kRows - 1>(a, w, row, rows, waiting);
  }
  weigh_rows<Arithmetic, kRows>(a, w, row, waiting);
}

// Rows first_row … end_row - 1 against a tile: their weights, m and l. Exponentials come one group of rows behind the
// products that they need: what these wait for is ready by then, and products of the next rows run beside them.
template <typename Arithmetic>
WEFT_INLINE void score_all_rows(const AttentionArguments& a, const Workspace& w,
                                const Tile<typename Arithmetic::Stored>& tile, int64_t first_row, int64_t end_row) {
  const int64_t rows = end_row - first_row;
  if (rows <= kScoreRows) return score_some_rows<Arithmetic>(a, w, tile, first_row, rows, nullptr);
  Waiting waiting[2];
  const int64_t groups = (rows + kScoreRows - 1) / kScoreRows;
  int64_t row = first_row, before = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t count = (end_row - row + (groups - group) - 1) / (groups - group);
    score_some_rows<Arithmetic>(a, w, tile, row, count, &waiting[group % 2]);
    if (group > 0) weigh_some_rows<Arithmetic>(a, w, row - before, before, waiting[(group - 1) % 2]);
    row += count;
    before = count;
  }
  weigh_some_rows<Arithmetic>(a, w, row - before, before, waiting[(groups - 1) % 2]);
}

// o = o · decay + weights · values for kRows rows and kVectors vectors of the head.
template <typename Arithmetic, int kRows, int kVectors>
WEFT_INLINE void gather_rows(const AttentionArguments& a, const Workspace& w,
                             const Tile<typename Arithmetic::Stored>& tile, int64_t row, int64_t column) {
  using Dot = typename Arithmetic::Dot;
  constexpr int64_t kElementBytes = sizeof(typename Arithmetic::Element);
  constexpr int64_t kSteps = kRunPositions / Held<typename Arithmetic::Stored>::kPerUnit;
  const int64_t width = output_width(a);
  typename Dot::Sum sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (auto& sum : sums[r]) sum = Dot::nothing();
  }
#pragma GCC unroll 2
  for (int run = 0; run < kRunsPerTile; ++run) {
    const auto* const units = tile.values[run] + column;
    const auto* const ahead = tile.values_ahead[run] + column;
    accumulate_units<Dot, kRows, 1, kVectors>(
        sums, w.weights + (row * kTilePositions + run * kRunPositions) * kElementBytes, kTilePositions * kElementBytes,
        &units, &ahead, tile.value_stride, kSteps);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Floats decay = set(w.decay[row + r]);
    float* const o = w.part.o + (row + r) * width + column;
#pragma GCC unroll 4
    for (int vector = 0; vector < kVectors; ++vector) {
      const Floats gathered = Arithmetic::output(w, sums[r][vector], row + r);
      store(o + vector * kLanes, fma(load(o + vector * kLanes), decay, gathered));
    }
  }
}

template <typename Arithmetic, int kRows = kOutputRows>
WEFT_INLINE void gather_some_rows(const AttentionArguments& a, const Workspace& w,
                                  const Tile<typename Arithmetic::Stored>& tile, int64_t row, int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return gather_some_rows<Arithmetic, kRows - 1>(a, w, tile, row, rows);
  }
  static_assert(kOutputVectors == 4, "one branch per rest");
  int64_t column = 0;
  int64_t left = output_width(a) / kLanes;
  for (; left >= 4; left -= 4, column += 4 * kLanes) gather_rows<Arithmetic, kRows, 4>(a, w, tile, row, column);
  if (left == 3) gather_rows<Arithmetic, kRows, 3>(a, w, tile, row, column);
  if (left == 2) gather_rows<Arithmetic, kRows, 2>(a, w, tile, row, column);
  if (left == 1) gather_rows<Arithmetic, kRows, 1>(a, w, tile, row, column);
}

WEFT_INLINE void clear(const AttentionArguments& a, const State& state, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    state.m[row] = kNothingSeen;
    store(state.l + row * kLanes, zero());
  }
  const int64_t width = output_width(a);
  for (int64_t i = 0; i < rows * width; i += kLanes) store(state.o + i, zero());
}

// Visits the tiles from `begin` to `end`, of one part. A row takes part in a tile only when it sees a key there, so that
// what it computes does not depend on which rows stand beside it.
template <typename Arithmetic>
__attribute__((noinline)) void visit_tiles(const AttentionArguments& a, const Visit& visit, int64_t begin, int64_t end,
                                           const Workspace& w) {
  using Stored = typename Arithmetic::Stored;
  using Unit = typename Held<Stored>::Unit;
  const AttentionPiece& piece = *visit.piece;
  const int64_t group = a.query_heads / a.kv_heads;
  const int64_t first_position = first_position_of(a, piece);
  Tile<Stored> tile;
  tile.first_position = first_position;
  tile.group = group;
  for (tile.first = begin; tile.first < end; tile.first += kTilePositions) {
    const int64_t first_row = larger(tile.first - first_position, 0) * group;
    // The window has passed the tile for queries from its last key's position + window on.
    const int64_t end_query = a.window > 0 ? tile.first + kTilePositions - 1 + a.window - first_position
                                           : piece.num_queries;
    const int64_t end_row = smaller(end_query, piece.num_queries) * group;
    if (first_row >= end_row) continue;
    const TileRuns<Stored> at = find_runs<Stored>(a, piece, visit.seen, tile.first);
    const TileRuns<Stored> later = find_later_runs<Stored>(a, visit, tile.first + kTilePositions);
    tile.look_at(at, later);
    tile.value_stride = a.head_size;
    if (!is_whole(visit.seen, tile.first) || a.head_size % kLanes != 0) {
      Unit* const copy = reinterpret_cast<Unit*>(w.values);
      copy_values<Stored>(a, at, visit.seen, tile.first, copy);
      tile.value_stride = output_width(a);
      tile.values[0] = copy;
      tile.values[1] = copy + kRunPositions / Held<Stored>::kPerUnit * tile.value_stride;
    }
    Arithmetic::look_at(w, at, later, visit.seen, tile.first);
    tile.is_open = tile.first + kTilePositions - 1 <= first_position + first_row / group &&
                   (a.window == 0 || first_position + (end_row - 1) / group - a.window < tile.first);
    score_all_rows<Arithmetic>(a, w, tile, first_row, end_row);
    for (int64_t row = first_row; row < end_row; row += kOutputRows) {
      gather_some_rows<Arithmetic>(a, w, tile, row, end_row - row);
    }
  }
}

// total = total merged with part, row by row; a row without a total takes the part as it is.
WEFT_INLINE void merge(const AttentionArguments& a, const State& total, const State& part, int64_t rows) {
  const int64_t width = output_width(a);
  for (int64_t row = 0; row < rows; ++row) {
    if (part.m[row] == kNothingSeen) continue;
    float* const l = total.l + row * kLanes;
    float* const o = total.o + row * width;
    const float* const part_l = part.l + row * kLanes;
    const float* const part_o = part.o + row * width;
    if (total.m[row] == kNothingSeen) {
      total.m[row] = part.m[row];
      store(l, load(part_l));
      for (int64_t d = 0; d < width; d += kLanes) store(o + d, load(part_o + d));
      continue;
    }
    const float m = part.m[row] > total.m[row] ? part.m[row] : total.m[row];
    const Floats keep = exp2<5>(set(total.m[row] - m));
    const Floats join = exp2<5>(set(part.m[row] - m));
    total.m[row] = m;
    store(l, fma(load(part_l), join, multiply(load(l), keep)));
    for (int64_t d = 0; d < width; d += kLanes) store(o + d, fma(load(part_o + d), join, multiply(load(o + d), keep)));
  }
}

template <typename Out>
void write_rows(const AttentionArguments& a, const AttentionPiece& piece, const State& state) {
  const int64_t group = a.query_heads / a.kv_heads;
  const int64_t width = output_width(a);
  const int64_t first_token = a.query_starts[piece.sequence] + piece.first_query;
  for (int64_t row = 0; row < piece.num_queries * group; ++row) {
    const int64_t head = (first_token + row / group) * a.query_heads + piece.kv_head * group + row % group;
    Out* const out = static_cast<Out*>(a.out) + head * a.head_size;
    const Floats inverse = set(1.0f / sum_of_lanes(load(state.l + row * kLanes)));
    for (int64_t d = 0; d < a.head_size; d += kLanes) {
      store_up_to(out + d, multiply(load(state.o + row * width + d), inverse), a.head_size - d);
    }
  }
}

WEFT_INLINE void write(const AttentionArguments& a, const AttentionPiece& piece, const State& state) {
  if (a.dtype == kFloat32) {
    write_rows<float>(a, piece, state);
  } else {
    write_rows<uint16_t>(a, piece, state);
  }
}

WEFT_INLINE bool uses_pairs(const AttentionArguments& a) {
  return kHasBf16Dot && a.dtype == kBfloat16 && a.kv_dtype == kBfloat16;
}

// As the arithmetic reads them.
WEFT_INLINE int64_t bytes_per_query_element(const AttentionArguments& a) {
  return a.kv_dtype == kInt8 || uses_pairs(a) ? 2 : 4;
}

// One query in 15 bits and its scale. What is no number makes the scale infinite and the scores NaN.
template <typename Element>
void round_query(const Element* q, int64_t width, int16_t* out, float* scale) {
  const Widest widest = widest_of(q, width);
  const float inverse = widest.is_finite && widest.value > 0.0f ? CodeArithmetic::kLargestQuery / widest.value : 0.0f;
  *scale = widest.is_finite ? widest.value / CodeArithmetic::kLargestQuery : __builtin_inff();
  round_elements(q, inverse, out, width);
}

// All query heads of a group of one token, as rows number query · group … of the workspace.
void gather_query(const AttentionArguments& a, int64_t token, int64_t kv_head, int64_t query, const Workspace& w) {
  const int64_t group = a.query_heads / a.kv_heads;
  const int64_t width = group * a.head_size;
  const int64_t from = token * a.q_stride + kv_head * width;
  if (a.kv_dtype == kInt8) {
    for (int64_t head = 0; head < group; ++head) {
      const int64_t row = query * group + head, element = from + head * a.head_size;
      int16_t* const out = reinterpret_cast<int16_t*>(w.q) + row * a.head_size;
      if (a.dtype == kFloat32) {
        round_query(static_cast<const float*>(a.q) + element, a.head_size, out, w.q_scales + row);
      } else {
        round_query(static_cast<const uint16_t*>(a.q) + element, a.head_size, out, w.q_scales + row);
      }
    }
    return;
  }
  convert_row(static_cast<const uint8_t*>(a.q) + from * bytes_per_element(a.dtype), a.dtype,
              w.q + query * width * bytes_per_query_element(a), uses_pairs(a) ? kBfloat16 : kFloat32, width);
}

void gather_queries(const AttentionArguments& a, const AttentionPiece& piece, const Workspace& w) {
  const int64_t first_token = a.query_starts[piece.sequence] + piece.first_query;
  for (int64_t query = 0; query < piece.num_queries; ++query) {
    gather_query(a, first_token + query, piece.kv_head, query, w);
  }
}

void visit_any(const AttentionArguments& a, const Visit& visit, int64_t begin, int64_t end, const Workspace& w) {
#ifdef __AVX512BF16__
  if (uses_pairs(a)) return visit_tiles<PairArithmetic>(a, visit, begin, end, w);
#endif
  if (a.kv_dtype == kInt8) return visit_tiles<CodeArithmetic>(a, visit, begin, end, w);
  if (a.kv_dtype == kFloat32) return visit_tiles<FloatArithmetic<float>>(a, visit, begin, end, w);
  visit_tiles<FloatArithmetic<uint16_t>>(a, visit, begin, end, w);
}

void visit_part(const AttentionArguments& a, const Visit& visit, int64_t part, const Workspace& w) {
  clear(a, w.part, visit.piece->num_queries * (a.query_heads / a.kv_heads));
  visit_any(a, visit, larger(part * kPartPositions, first_tile_of(visit.seen)),
            smaller((part + 1) * kPartPositions, visit.seen.end), w);
}

WEFT_INLINE Visit visit_of(const AttentionArguments& a, const AttentionPiece& piece, const AttentionPiece* next) {
  return {&piece, seen_by(a, piece), next, next == nullptr ? Seen{0, 0} : seen_by(a, *next)};
}

void attend(const AttentionArguments& a, const AttentionPiece& piece, const AttentionPiece* next, void* scratch) {
  const int64_t rows = piece.num_queries * (a.query_heads / a.kv_heads);
  const Workspace w = workspace_at(a, scratch, rows);
  const Visit visit = visit_of(a, piece, next);
  const PartRange parts = visible_parts(a, piece);
  gather_queries(a, piece, w);
  visit_part(a, visit, parts.first, w);
  if (parts.end - parts.first == 1) return write(a, piece, w.part);
  for (int64_t row = 0; row < rows; ++row) w.total.m[row] = kNothingSeen;
  merge(a, w.total, w.part, rows);
  for (int64_t part = parts.first + 1; part < parts.end; ++part) {
    visit_part(a, visit, part, w);
    merge(a, w.total, w.part, rows);
  }
  write(a, piece, w.total);
}

void attend_part(const AttentionArguments& a, const AttentionPiece& piece, int64_t part, float* state, void* scratch) {
  const int64_t rows = piece.num_queries * (a.query_heads / a.kv_heads);
  Workspace w = workspace_at(a, scratch, rows);
  w.part = state_at(state, rows);
  gather_queries(a, piece, w);
  visit_part(a, visit_of(a, piece, nullptr), part, w);
}

// The workspace of rows from `row` on. What lives for one tile only may stand where it is.
WEFT_INLINE Workspace rows_from(const AttentionArguments& a, const Workspace& w, int64_t row) {
  Workspace rest = w;
  rest.q += row * a.head_size * bytes_per_query_element(a);
  rest.q_scales += row;
  rest.part = {w.part.m + row, w.part.l + row * kLanes, w.part.o + row * output_width(a)};
  return rest;
}

// Queries of several sequences count as if they stood one after another behind the first one's: all of them see the
// whole segment, which is all that a query's position decides.
void attend_common_part(const AttentionArguments& a, const CommonPart& common, int64_t kv_head, float* const* states,
                        void* scratch) {
  const int64_t group = a.query_heads / a.kv_heads;
  const int64_t width = output_width(a);
  const int32_t* const sequences = a.prefixes->sequences + common.first;
  const PrefixSegment* const segments = a.prefixes->segments + common.first_segment;
  const Workspace w = workspace_at(a, scratch, common.count * group);
  for (int64_t i = 0; i < common.count; ++i) gather_query(a, a.query_starts[sequences[i]], kv_head, i, w);
  clear(a, w.part, common.count * group);
  for (int64_t i = 0; i < common.num_segments; ++i) {
    const bool is_last = i + 1 == common.num_segments;
    const PrefixSegment &segment = segments[i], &next = segments[is_last ? i : i + 1];
    const AttentionPiece piece{sequences[segment.first], kv_head, 0, segment.count};
    const AttentionPiece next_piece{sequences[next.first], kv_head, 0, next.count};
    const Visit visit{&piece, Seen{segment.begin, segment.end}, is_last ? nullptr : &next_piece,
                      Seen{next.begin, next.end}};
    visit_any(a, visit, segment.begin, segment.end, rows_from(a, w, segment.first * group));
  }
  for (int64_t i = 0; i < common.count; ++i) {
    const State own = state_at(states[i], group);
    const int64_t row = i * group;
    __builtin_memcpy(own.m, w.part.m + row, group * sizeof(float));
    __builtin_memcpy(own.l, w.part.l + row * kLanes, group * kLanes * sizeof(float));
    __builtin_memcpy(own.o, w.part.o + row * width, group * width * sizeof(float));
  }
}

void merge_parts(const AttentionArguments& a, const AttentionPiece& piece, float* states, int64_t parts) {
  const int64_t rows = piece.num_queries * (a.query_heads / a.kv_heads);
  const int64_t floats = attention_state_floats(a, rows);
  const State total = state_at(states, rows);
  for (int64_t part = 1; part < parts; ++part) merge(a, total, state_at(states + part * floats, rows), rows);
  write(a, piece, total);
}

// ---- Rotary embedding -----------------------------------------------------------------------------------------

// One head; in and out may be the same.
template <typename Element, typename Out>
WEFT_INLINE void rotate_head(const Element* x, Out* out, const float* cos_sin, int64_t half, int64_t width) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = half - i;
    const Floats cosine = load_up_to(cos_sin + i, count), sine = load_up_to(cos_sin + half + i, count);
    const Floats first = load_up_to(x + i, count), second = load_up_to(x + half + i, count);
    store_up_to(out + i, subtract(multiply(first, cosine), multiply(second, sine)), count);
    store_up_to(out + half + i, add(multiply(second, cosine), multiply(first, sine)), count);
  }
  if (static_cast<const void*>(x) == static_cast<const void*>(out)) return;
  for (int64_t i = 2 * half; i < width; i += kLanes) store_up_to(out + i, load_up_to(x + i, width - i), width - i);
}

// Where a position stands in the pool: its block's units, and its place in the block.
struct Place {
  void* block;
  int64_t offset;
  int64_t block_size;
};

// One position's key and value into the units of the pool.
template <typename Stored>
WEFT_INLINE void store_key(const Stored* x, int64_t width, const Place& at) {
  using Unit = typename Held<Stored>::Unit;
  constexpr int64_t kPerUnit = Held<Stored>::kPerUnit;
  Unit* const out = static_cast<Unit*>(at.block) + at.offset / kRunPositions * (width / kPerUnit * kRunPositions) +
                    at.offset % kRunPositions;
  for (int64_t unit = 0; unit < width / kPerUnit; ++unit) {
    __builtin_memcpy(out + unit * kRunPositions, x + unit * kPerUnit, sizeof(Unit));
  }
}

template <typename Stored>
WEFT_INLINE void store_value(const Stored* x, int64_t width, const Place& at) {
  constexpr int64_t kPerUnit = Held<Stored>::kPerUnit;
  Stored* const out = static_cast<Stored*>(at.block) + at.offset / kPerUnit * width * kPerUnit + at.offset % kPerUnit;
  for (int64_t d = 0; d < width; ++d) out[d * kPerUnit] = x[d];
}

constexpr int64_t kMaxHeadSize = 1024;

// Codes of one position and, behind the block's codes, their scale. What is no number makes the scale infinite and
// the codes zero, so that whatever reads them becomes NaN.
template <typename Element>
WEFT_INLINE void round_to_codes(const Element* x, int64_t width, const Place& at, int8_t* codes) {
  const Widest widest = widest_of(x, width);
  const float inverse = widest.is_finite && widest.value > 0.0f ? 127.0f / widest.value : 0.0f;
  alignas(64) int16_t rounded[kMaxHeadSize];
  round_elements(x, inverse, rounded, width);
  for (int64_t d = 0; d < width; ++d) codes[d] = widest.is_finite ? static_cast<int8_t>(rounded[d]) : 0;
  const float scale = widest.is_finite ? widest.value / 127.0f : __builtin_inff();
  __builtin_memcpy(static_cast<uint8_t*>(at.block) + at.block_size * width + at.offset * 4, &scale, 4);
}

template <typename Element, typename Stored>
WEFT_INLINE void store_rotated(const Element* k, const Element* v, const float* cos_sin, int64_t half, int64_t width,
                               const Place& key_place, const Place& value_place) {
  alignas(64) Stored row[kMaxHeadSize];
  if constexpr (sizeof(Stored) == 1) {
    alignas(64) Element rotated[kMaxHeadSize];
    rotate_head(k, rotated, cos_sin, half, width);
    round_to_codes(rotated, width, key_place, row);
    store_key(row, width, key_place);
    round_to_codes(v, width, value_place, row);
  } else {
    rotate_head(k, row, cos_sin, half, width);
    store_key(row, width, key_place);
    convert_elements(v, row, width);
  }
  store_value(row, width, value_place);
}

// Asks for the lines that a token's key and value will be written to: some hundred, far apart, and out of every cache
// while decoding.
template <typename Stored>
WEFT_INLINE void ask_for_slot(const RotaryArguments& a, int64_t slot) {
  constexpr int64_t kPerUnit = Held<Stored>::kPerUnit;
  const int64_t block_bytes = a.block_size * bytes_per_position(a.head_size, a.kv_dtype);
  const int64_t offset = slot % a.block_size, position_bytes = a.head_size * static_cast<int64_t>(sizeof(Stored));
  const int64_t key_bytes = position_bytes * kRunPositions, value_bytes = position_bytes * kPerUnit;
  for (int64_t head = 0; head < a.kv_heads; ++head) {
    const int64_t start = (slot / a.block_size * a.kv_heads + head) * block_bytes;
    const uint8_t* const keys = static_cast<const uint8_t*>(a.keys) + start + offset / kRunPositions * key_bytes;
    const uint8_t* const values = static_cast<const uint8_t*>(a.values) + start + offset / kPerUnit * value_bytes;
    for (int64_t byte = 0; byte < key_bytes; byte += 64) __builtin_prefetch(keys + byte, 1);
    for (int64_t byte = 0; byte < value_bytes; byte += 64) __builtin_prefetch(values + byte, 1);
  }
}

template <typename Element, typename Stored>
void rotary_and_store_of(const RotaryArguments& a, int64_t first_token, int64_t end_token) {
  const int64_t half = a.rotary_size / 2;
  const int64_t block_bytes = a.block_size * bytes_per_position(a.head_size, a.kv_dtype);
  for (int64_t token = first_token; token < end_token; ++token) {
    if (a.kv_slots[token] >= 0) ask_for_slot<Stored>(a, a.kv_slots[token]);
    const float* cos_sin = a.cos_sin + a.positions[token] * a.rotary_size;
    Element* q = static_cast<Element*>(a.q) + token * a.q_stride;
    for (int64_t head = 0; head < a.query_heads; ++head) {
      rotate_head(q + head * a.head_size, q + head * a.head_size, cos_sin, half, a.head_size);
    }
    const int64_t slot = a.kv_slots[token];
    if (slot < 0) continue;
    const Element* k = static_cast<const Element*>(a.k) + token * a.k_stride;
    const Element* v = static_cast<const Element*>(a.v) + token * a.v_stride;
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const int64_t start = (slot / a.block_size * a.kv_heads + head) * block_bytes;
      const int64_t offset = slot % a.block_size;
      store_rotated<Element, Stored>(k + head * a.head_size, v + head * a.head_size, cos_sin, half, a.head_size,
                                     {static_cast<uint8_t*>(a.keys) + start, offset, a.block_size},
                                     {static_cast<uint8_t*>(a.values) + start, offset, a.block_size});
    }
  }
}

template <typename Element>
void rotary_and_store_any(const RotaryArguments& a, int64_t first_token, int64_t end_token) {
  if (a.kv_dtype == kFloat32) rotary_and_store_of<Element, float>(a, first_token, end_token);
  if (a.kv_dtype == kBfloat16) rotary_and_store_of<Element, uint16_t>(a, first_token, end_token);
  if (a.kv_dtype == kInt8) rotary_and_store_of<Element, int8_t>(a, first_token, end_token);
}

void rotary_and_store(const RotaryArguments& a, int64_t first_token, int64_t end_token) {
  if (a.dtype == kFloat32) {
    rotary_and_store_any<float>(a, first_token, end_token);
  } else {
    rotary_and_store_any<uint16_t>(a, first_token, end_token);
  }
}

// ---- Whole rows -----------------------------------------------------------------------------------------------

template <typename Element>
void scale_elements(Element* x, float factor, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    store_up_to(x + i, multiply(load_up_to(x + i, width - i), set(factor)), width - i);
  }
}

void scale_row(void* x, DataType dtype, float factor, int64_t width) {
  if (dtype == kFloat32) {
    scale_elements(static_cast<float*>(x), factor, width);
  } else {
    scale_elements(static_cast<uint16_t*>(x), factor, width);
  }
}

void softcap_row(float* x, float cap, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats part = divide(load_up_to(x + i, width - i), set(cap));
    store_up_to(x + i, multiply(set(cap), tanh(part)), width - i);
  }
}

// ---- Normalization and activation -----------------------------------------------------------------------------

template <typename Element>
void rms_norm_of(const NormArguments& a, int64_t first_row, int64_t end_row) {
  const Element* weight = static_cast<const Element*>(a.weight);
  const Floats offset = set(a.weight_offset);
  for (int64_t row = first_row; row < end_row; ++row) {
    const Element* x = static_cast<const Element*>(a.x) + row / a.inner * a.outer_stride + row % a.inner * a.width;
    Element* out = static_cast<Element*>(a.out) + row * a.width;
    if (a.residual != nullptr) {
      const Element* residual = static_cast<const Element*>(a.residual) + row * a.width;
      Element* sum = static_cast<Element*>(a.sum) + row * a.width;
      for (int64_t i = 0; i < a.width; i += kLanes) {
        const int64_t count = a.width - i;
        store_up_to(sum + i, add(load_up_to(x + i, count), load_up_to(residual + i, count)), count);
      }
      x = sum;
    }
    // Four chains of additions hide their latency; the order depends on the width alone.
    Floats squares[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= a.width; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int chain = 0; chain < 4; ++chain) {
        const Floats part = load(x + i + chain * kLanes);
        squares[chain] = fma(part, part, squares[chain]);
      }
    }
    for (; i < a.width; i += kLanes) {
      const Floats part = load_up_to(x + i, a.width - i);
      squares[0] = fma(part, part, squares[0]);
    }
    const float sum = sum_of_lanes(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    const Floats inverse = set(1.0f / __builtin_sqrtf(sum / static_cast<float>(a.width) + a.eps));
    for (int64_t j = 0; j < a.width; j += kLanes) {
      const int64_t count = a.width - j;
      const Floats scaled = multiply(load_up_to(x + j, count), inverse);
      store_up_to(out + j, multiply(scaled, add(load_up_to(weight + j, count), offset)), count);
    }
  }
}

void rms_norm(const NormArguments& a, int64_t first_row, int64_t end_row) {
  if (a.dtype == kFloat32) {
    rms_norm_of<float>(a, first_row, end_row);
  } else {
    rms_norm_of<uint16_t>(a, first_row, end_row);
  }
}

// 0.5 x (1 + tanh z) = x · sigmoid(2z), z = √(2/π) (x + 0.044715 x³).
WEFT_INLINE Floats gelu_tanh(Floats x) {
  const Floats cube = multiply(multiply(x, x), x);
  const Floats z = multiply(set(0.79788456f), fma(set(0.044715f), cube, x));
  return multiply(x, sigmoid(add(z, z)));
}

template <typename Element, ActivationKind kKind>
void gate_of(const GateArguments& a, int64_t first_row, int64_t end_row) {
  for (int64_t row = first_row; row < end_row; ++row) {
    const Element* gate = static_cast<const Element*>(a.x) + row * a.x_stride;
    const Element* up = gate + a.width;
    Element* out = static_cast<Element*>(a.out) + row * a.width;
    for (int64_t i = 0; i < a.width; i += kLanes) {
      const int64_t count = a.width - i;
      const Floats x = load_up_to(gate + i, count);
      const Floats activated = kKind == kSilu ? divide(x, add(set(1.0f), exp(subtract(zero(), x)))) : gelu_tanh(x);
      store_up_to(out + i, multiply(activated, load_up_to(up + i, count)), count);
    }
  }
}

void gate(const GateArguments& a, int64_t first_row, int64_t end_row) {
  if (a.dtype == kFloat32) {
    if (a.kind == kSilu) gate_of<float, kSilu>(a, first_row, end_row);
    if (a.kind == kGeluTanh) gate_of<float, kGeluTanh>(a, first_row, end_row);
  } else {
    if (a.kind == kSilu) gate_of<uint16_t, kSilu>(a, first_row, end_row);
    if (a.kind == kGeluTanh) gate_of<uint16_t, kGeluTanh>(a, first_row, end_row);
  }
}

// ---- Logits ---------------------------------------------------------------------------------------------------

WEFT_INLINE Floats load_logits(const float* p, int64_t count) {
  return count >= kLanes ? load(p) : keep_between(load_first(p, count), 0, -1, static_cast<int32_t>(count) - 1);
}

LogitRun scan_logits(const float* logits, int64_t first_index, int64_t count) {
  Floats largest = set(kMinusInfinity);
  uint32_t nan = 0;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats x = load_logits(logits + i, count - i);
    nan |= lanes_nan(x);
    largest = max(x, largest);
  }
  LogitRun run{max_of_lanes(largest), 0.0f, first_index, nan != 0};
  if (run.has_nan || !(run.best > kMinusInfinity) || run.best == __builtin_inff()) return run;
  const Floats best = set(run.best);
  Floats sums[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    sums[0] = add(sums[0], exp(subtract(load(logits + i), best)));
    sums[1] = add(sums[1], exp(subtract(load(logits + i + kLanes), best)));
  }
  for (; i < count; i += kLanes) sums[0] = add(sums[0], exp(subtract(load_logits(logits + i, count - i), best)));
  run.sum = sum_of_lanes(add(sums[0], sums[1]));
  for (i = 0; i < count; i += kLanes) {
    const uint32_t found = lanes_equal(load_logits(logits + i, count - i), best);
    if (found != 0) {
      run.best_index = first_index + i + __builtin_ctz(found);
      break;
    }
  }
  return run;
}

void temper(const float* logits, int64_t count, float best, float temperature, float* out) {
  const Floats largest = set(best), divisor = set(temperature);
  for (int64_t i = 0; i < count; i += kLanes) {
    store_up_to(out + i, divide(subtract(load_logits(logits + i, count - i), largest), divisor), count - i);
  }
}

// Random words of 4 · kLanes vocabulary ids from `first_index` (a multiple of 4) on. See philox.py for the layout.
WEFT_INLINE void random_words(int64_t first_index, uint64_t seed, uint64_t position, uint32_t* out) {
  const Words multiplier_0 = set_words(0xD2511F53u), multiplier_1 = set_words(0xCD9E8D57u);
  Words c0 = add(set_words(static_cast<uint32_t>(first_index / 4)), lane_numbers());
  Words c1 = set_words(static_cast<uint32_t>(position));
  Words c2 = set_words(static_cast<uint32_t>(position >> 32));
  Words c3 = set_words(0);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Words high_0 = product_high(c0, multiplier_0), low_0 = product_low(c0, multiplier_0);
    const Words high_1 = product_high(c2, multiplier_1), low_1 = product_low(c2, multiplier_1);
    c0 = exclusive_or(exclusive_or(high_1, c1), set_words(k0));
    c1 = low_1;
    c2 = exclusive_or(exclusive_or(high_0, c3), set_words(k1));
    c3 = low_0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  store_interleaved(out, c0, c1, c2, c3);
}

constexpr float kUnit = 2.3283064e-10f;  // 2⁻³²

// logit - log(q), q = -log1p(-(w + ½)/2³²), to about 10⁻⁴.
WEFT_INLINE Floats coarse_key(Floats logit, Words word) {
  const Floats unit = set(kUnit);
  const Floats v = multiply(add(unsigned_to_floats(word), set(0.5f)), unit);
  const Floats rest = multiply(add(unsigned_to_floats(exclusive_or(word, set_words(~0u))), set(0.5f)), unit);  // 1 - v
  // For small v the series of -log1p(-v) keeps the relative accuracy that 1 - v has lost.
  Floats series = fma(v, set(0.2f), set(0.25f));
  series = fma(series, v, set(0.33333333f));
  series = fma(series, v, set(0.5f));
  series = fma(series, v, set(1.0f));
  const Floats q = where_less(v, set(0.0625f), multiply(series, v), subtract(zero(), coarse_log(rest)));
  return subtract(logit, coarse_log(q));
}

RaceRun race(const float* logits, int64_t first_index, int64_t count, uint64_t seed, uint64_t position,
             float* scratch) {
  constexpr int64_t kGroup = 4 * kLanes;
  alignas(64) uint32_t words[kGroup];
  // Coarse keys of the vectors that hold a possible winner, one after another, and where they stood.
  int32_t* const places = reinterpret_cast<int32_t*>(scratch + round_up(count, kLanes));
  int64_t kept = 0;
  float best = kMinusInfinity;
  float margin = 0.0f;
  uint32_t nan = 0;
  for (int64_t i = 0; i < count; i += kGroup) {
    random_words(first_index + i, seed, position, words);
    for (int64_t j = 0; j < kGroup && i + j < count; j += kLanes) {
      const Floats logit = load_logits(logits + i + j, count - i - j);
      nan |= lanes_nan(logit);
      // q > v, so a key reaches `best - margin` only where v < e^(logit - best + margin): nearly nowhere, and that is
      // known without a logarithm.
      const Floats v = multiply(unsigned_to_floats(load_words(words + j)), set(kUnit));
      const Floats limit = exp2<4>(multiply(add(subtract(logit, set(best)), set(margin)), set(kLog2E)));
      if (lanes_at_least(limit, v) == 0) continue;
      const Floats key = coarse_key(logit, load_words(words + j));
      store(scratch + kept * kLanes, key);
      places[kept++] = static_cast<int32_t>(i + j);
      const float largest = max_of_lanes(key);
      if (largest > best) {
        best = largest;
        margin = 1e-3f + 1e-6f * __builtin_fabsf(best);
      }
    }
  }
  RaceRun run{static_cast<double>(kMinusInfinity), first_index, nan != 0};
  if (run.has_nan || !(best > kMinusInfinity)) return run;
  // Whatever comes within the error of the coarse keys of the best is computed exactly.
  const Floats threshold = set(best == __builtin_inff() ? best : best - margin);
  for (int64_t n = 0; n < kept; ++n) {
    uint32_t found = lanes_at_least(load(scratch + n * kLanes), threshold);
    if (found == 0) continue;
    const int64_t group = places[n] / kGroup * kGroup;
    random_words(first_index + group, seed, position, words);
    for (; found != 0; found &= found - 1) {
      const int64_t index = places[n] + __builtin_ctz(found);
      if (index >= count) continue;
      const double uniform = (words[index - group] + 0.5) * 0x1p-32;
      const double key = static_cast<double>(logits[index]) - __builtin_log(-__builtin_log1p(-uniform));
      if (key > run.best) {
        run.best = key;
        run.best_index = first_index + index;
      }
    }
  }
  return run;
}

}  // namespace

const KernelTable WEFT_TABLE = {
    WEFT_TABLE_NAME,
    pack_panels,
    linear_wants_float_rows,
    linear,
    attention_scratch_bytes,
    attention_state_floats,
    attend,
    attend_part,
    attend_common_part,
    merge_parts,
    rotary_and_store,
    rms_norm,
    gate,
    convert_row,
    scale_row,
    softcap_row,
    scan_logits,
    temper,
    race,
};

}  // namespace weft
