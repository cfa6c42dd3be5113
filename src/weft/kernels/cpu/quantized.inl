// Kernels for weights of few bits, written once and compiled once per instruction set. See quantized.h.
//
// The including file includes a vector header before, then names the table that is defined at the end.

#include "quantized.h"

namespace weft {
namespace {

constexpr int kPanelVectors = kPanelColumns / kLanes;
constexpr float kLargestCode = 127.0f;
// A group whose largest activation is below counts as zero: its inverse would leave the range of a float.
constexpr float kLeastActivation = 1e-30f;

WEFT_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Words of four bytes --------------------------------------------------------------------------------------

#if defined(__AVX512F__)

WEFT_INLINE Words spread(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
WEFT_INLINE Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
WEFT_INLINE Words either(Words a, Words b) { return _mm512_or_si512(a, b); }
template <int kBits>
WEFT_INLINE Words shift_right(Words x) { return _mm512_srli_epi32(x, kBits); }
template <int kBits>
WEFT_INLINE Words shift_left(Words x) { return _mm512_slli_epi32(x, kBits); }
WEFT_INLINE Words larger_of(Words a, Words b) { return _mm512_max_epi32(a, b); }
WEFT_INLINE int32_t largest_lane(Words x) { return _mm512_reduce_max_epi32(x); }
WEFT_INLINE int32_t total_of_lanes(Words x) { return _mm512_reduce_add_epi32(x); }
WEFT_INLINE Words bits_of(Floats x) { return _mm512_castps_si512(x); }
WEFT_INLINE Floats to_floats(Words x) { return _mm512_cvtepi32_ps(x); }
WEFT_INLINE Words to_words(Floats x) { return _mm512_cvtps_epi32(x); }
WEFT_INLINE void store_low_bytes(uint8_t* p, Words x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
WEFT_INLINE Words widen_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
WEFT_INLINE Floats load_halves(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

#else

WEFT_INLINE Words spread(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
WEFT_INLINE Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
WEFT_INLINE Words either(Words a, Words b) { return _mm256_or_si256(a, b); }
template <int kBits>
WEFT_INLINE Words shift_right(Words x) { return _mm256_srli_epi32(x, kBits); }
template <int kBits>
WEFT_INLINE Words shift_left(Words x) { return _mm256_slli_epi32(x, kBits); }
WEFT_INLINE Words larger_of(Words a, Words b) { return _mm256_max_epi32(a, b); }
WEFT_INLINE int32_t largest_lane(Words x) {
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}
WEFT_INLINE int32_t total_of_lanes(Words x) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1)));
}
WEFT_INLINE Words bits_of(Floats x) { return _mm256_castps_si256(x); }
WEFT_INLINE Floats to_floats(Words x) { return _mm256_cvtepi32_ps(x); }
WEFT_INLINE Words to_words(Floats x) { return _mm256_cvtps_epi32(x); }
WEFT_INLINE void store_low_bytes(uint8_t* p, Words x) {
  const Words gather = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                        0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const Words bytes = _mm256_shuffle_epi8(x, gather);
  const int32_t low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
  __builtin_memcpy(p, &low, 4);
  __builtin_memcpy(p + 4, &high, 4);
}
WEFT_INLINE Words widen_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
WEFT_INLINE Floats load_halves(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

#endif

// sum + Σ of four products per lane, codes unsigned, x signed; exact. `kBits` bounds the codes.
template <int kBits>
WEFT_INLINE Words add_products(Words sum, Words codes, Words x) {
#if defined(__AVX512VNNI__)
  // As an intrinsic GCC 12 copies the sums to other registers and back in every step.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
#elif defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(x));
  return sum;
#elif defined(__AVX512F__)
  // Two products of eight bits would not fit the sixteen that maddubs has for their sum.
  if (kBits < 8) return add(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1)));
  const Words even = _mm512_madd_epi16(both(codes, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  const Words odd = _mm512_madd_epi16(_mm512_srli_epi16(codes, 8), _mm512_srai_epi16(x, 8));
  return add(sum, add(even, odd));
#else
  if (kBits < 8) return add(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
  const Words even = _mm256_madd_epi16(both(codes, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const Words odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
  return add(sum, add(even, odd));
#endif
}

WEFT_INLINE Floats zero_beyond(const float* p, int64_t count) { return count >= kLanes ? load(p) : load_first(p, count); }
WEFT_INLINE Floats zero_beyond(const uint16_t* p, int64_t count) {
  return count >= kLanes ? load(p) : load_first(p, count);
}

// ---- Activations ----------------------------------------------------------------------------------------------

template <typename Element>
WEFT_INLINE float largest_magnitude(const Element* x, int64_t count) {
  // As integers, so that a NaN is larger than everything.
  Words largest = set_words(0);
  const Words magnitude = set_words(0x7FFFFFFF);
  for (int64_t i = 0; i < count; i += kLanes) {
    largest = larger_of(largest, both(bits_of(zero_beyond(x + i, count - i)), magnitude));
  }
  const int32_t bits = largest_lane(largest);
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Codes of one group of a row. `codes` is written in whole vectors, at most a vector beyond `count`.
template <typename Element>
WEFT_INLINE void quantize_group(const Element* x, int64_t count, const QuantizedFormat& format, uint8_t* codes,
                                float* scale, int32_t* correction) {
  const float largest = largest_magnitude(x, count);
  const bool is_finite = largest < __builtin_inff();
  const bool is_zero = !is_finite || largest < kLeastActivation;
  const Floats inverse = set(is_zero ? 0.0f : kLargestCode / largest);
  Words total = set_words(0);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Words code = is_zero ? set_words(0) : to_words(multiply(zero_beyond(x + i, count - i), inverse));
    store_low_bytes(codes + i, code);
    total = add(total, code);
  }
  *scale = is_finite ? (is_zero ? 0.0f : largest / kLargestCode) : __builtin_nanf("");
  const int32_t sum = total_of_lanes(total);
  if (format.has_minimum) {
    const float scaled = *scale * static_cast<float>(sum);
    __builtin_memcpy(correction, &scaled, 4);
  } else {
    *correction = -format.zero_point * sum;
  }
}

template <typename Element>
void quantize_rows_of(const QuantizeRowsArguments& a, int64_t first_row, int64_t end_row) {
  const QuantizedRow layout = quantized_row(a.format, a.in_features);
  const int64_t size = a.format.group_size;
  for (int64_t r = first_row; r < end_row; ++r) {
    const Element* x = static_cast<const Element*>(a.x) + r * a.x_stride;
    uint8_t* row = a.rows + r * layout.bytes();
    float* scales = layout.scales(row);
    int32_t* corrections = layout.corrections(row);
    // Groups are multiples of a vector, so only the last one writes beyond itself, into the zeros of the padding.
    __builtin_memset(row + layout.code_bytes - 64, 0, 64);
    for (int64_t group = 0; group < layout.groups; ++group) {
      const int64_t first = group * size;
      quantize_group(x + first, least(size, a.in_features - first), a.format, row + first, scales + group,
                     corrections + group);
    }
  }
}

void quantize_rows(const QuantizeRowsArguments& a, int64_t first_row, int64_t end_row) {
  if (a.x_dtype == kFloat32) {
    quantize_rows_of<float>(a, first_row, end_row);
  } else {
    quantize_rows_of<uint16_t>(a, first_row, end_row);
  }
}

// ---- Products -------------------------------------------------------------------------------------------------

template <int kBitsOfCode, bool kHasMinimum, bool kIsPerOutput>
struct Kind {
  static constexpr int kBits = kBitsOfCode;
  static constexpr bool kPerOutput = kIsPerOutput;
  static constexpr bool kMinimum = kHasMinimum;
  // More would fit the registers, but then the float part of a group is too long to run beside the next products.
  static constexpr int kMaxRows = kLanes == 8 ? 3 : 8;
  static constexpr int64_t kInputsPerStep = kBits == 4 ? 8 : (kBits == 6 ? 16 : 4);
  static constexpr int64_t kBytesPerStep = kBits == 6 ? 384 : 128;
};

// One panel as one stream from memory, asked for this far ahead, arrives at the full rate of a core. See kernels.inl.
constexpr int64_t kStreamAhead = 8192;

template <int kRows>
using Sums = Words[kRows][kPanelVectors];

// Four inputs of every row and output: sums += codes · x.
template <int kBits, int kRows>
WEFT_INLINE void add_four(Sums<kRows>& sums, const Words (&codes)[kPanelVectors], const uint8_t* x, int64_t row_bytes) {
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    const Words inputs = spread(x + row * row_bytes);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) sums[row][v] = add_products<kBits>(sums[row][v], codes[v], inputs);
  }
}

WEFT_INLINE void load_codes(Words (&codes)[kPanelVectors], const uint8_t* w) {
#pragma GCC unroll 4
  for (int v = 0; v < kPanelVectors; ++v) {
    const uint8_t* from = w + v * sizeof(Words);
    codes[v] = load_words(from);
  }
}

// One step of a panel's codes for all rows.
template <int kBits, int kRows>
WEFT_INLINE void add_step(Sums<kRows>& sums, const uint8_t* x, int64_t row_bytes, const uint8_t* w) {
  const Words low_half = set_words(0x0F0F0F0F);
  Words packed[kPanelVectors], codes[kPanelVectors];
  if constexpr (kBits == 8) {
    load_codes(codes, w);
    add_four<8, kRows>(sums, codes, x, row_bytes);
  } else if constexpr (kBits == 4) {
    load_codes(packed, w);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) codes[v] = both(packed[v], low_half);
    add_four<4, kRows>(sums, codes, x, row_bytes);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) codes[v] = both(shift_right<4>(packed[v]), low_half);
    add_four<4, kRows>(sums, codes, x + 4, row_bytes);
  } else {
    const Words upper = set_words(0x30303030);
    Words high[kPanelVectors];
    load_codes(high, w + 256);
    load_codes(packed, w);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      codes[v] = either(both(packed[v], low_half), both(shift_left<4>(high[v]), upper));
    }
    add_four<6, kRows>(sums, codes, x, row_bytes);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      codes[v] = either(both(shift_right<4>(packed[v]), low_half), both(shift_left<2>(high[v]), upper));
    }
    add_four<6, kRows>(sums, codes, x + 4, row_bytes);
    load_codes(packed, w + 128);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) codes[v] = either(both(packed[v], low_half), both(high[v], upper));
    add_four<6, kRows>(sums, codes, x + 8, row_bytes);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      codes[v] = either(both(shift_right<4>(packed[v]), low_half), both(shift_right<2>(high[v]), upper));
    }
    add_four<6, kRows>(sums, codes, x + 12, row_bytes);
  }
}

// Of kRows rows and one panel. They stay in the first-level cache: once per group they cost less than the registers
// they would take from the sums.
template <int kRows>
using Totals = float[kRows][kPanelColumns];

// The number at `of_first` in another row of quantized activations.
WEFT_INLINE const float* in_row(const float* of_first, int row, int64_t row_bytes) {
  return reinterpret_cast<const float*>(reinterpret_cast<const uint8_t*>(of_first) + row * row_bytes);
}

// totals += scale of the rows' group · scales of the outputs' group · sums, and minima · corrections.
template <typename K, int kRows>
WEFT_INLINE void add_group(Totals<kRows>& totals, const Sums<kRows>& sums, const float* scales,
                           const float* corrections, int64_t row_bytes, const uint8_t* w) {
  Floats scale[kPanelVectors], minimum[kPanelVectors];
  if constexpr (!K::kPerOutput) {
    const uint16_t* const halves = reinterpret_cast<const uint16_t*>(w);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      scale[v] = load_halves(halves + v * kLanes);
      if constexpr (K::kMinimum) minimum[v] = load_halves(halves + kPanelColumns + v * kLanes);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) {
    const Floats of_row = broadcast(in_row(scales, row, row_bytes));
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      float* const at = totals[row] + v * kLanes;
      const Floats factor = K::kPerOutput ? of_row : multiply(scale[v], of_row);
      Floats total = fma(to_floats(sums[row][v]), factor, load(at));
      if constexpr (K::kMinimum) total = fma(minimum[v], broadcast(in_row(corrections, row, row_bytes)), total);
      store(at, total);
    }
  }
}

template <typename Element>
WEFT_INLINE void put(Element* p, Floats x, int64_t count) {
  if (count >= kLanes) {
    store(p, x);
  } else {
    store_first(p, x, count);
  }
}

// Adds bias and residual, rounds once, stores. `count` columns of the vector exist.
template <typename Out>
WEFT_INLINE void finish_vector(const QuantizedLinearArguments& a, Floats y, int64_t row, int64_t column,
                               int64_t count) {
  if (a.bias != nullptr) y = add(y, zero_beyond(a.bias + column, count));
  if (a.residual != nullptr) {
    const int64_t place = row * a.residual_stride + column;
    y = add(y, a.residual_dtype == kFloat32 ? zero_beyond(static_cast<const float*>(a.residual) + place, count)
                                            : zero_beyond(static_cast<const uint16_t*>(a.residual) + place, count));
  }
  put(static_cast<Out*>(a.out) + row * a.out_stride + column, y, count);
}

// Where the rows and the panel of a tile lie. Sizes are worked out once for all tiles: it takes divisions.
struct Tile {
  QuantizedRow layout;
  int64_t row_bytes;
  int64_t panel_bytes;
  int64_t row;
  int64_t panel;
  // Weights that are needed later: each step asks for its share, from here on. See kernels.inl.
  const uint8_t* later;
  int64_t later_step_bytes;
};

// Asks for weights step by step. Codes of 8 bits make whole lines, two to a step. Others share lines with their scales,
// and 6 bits fill seven lines in a step: each line is asked for once, when its turn comes.
template <int kBits>
struct Ahead {
  const uint8_t* next;
  const uint8_t* due;
  int64_t step_bytes;

  __attribute__((always_inline)) void advance() {
    due += step_bytes;
    if constexpr (kBits == 8) {
      __builtin_prefetch(next);
      __builtin_prefetch(next + 64);
      next = due;
    } else {
      for (; next < due; next += 64) __builtin_prefetch(next);
    }
  }
};

template <typename K, int kRows, typename Out>
WEFT_INLINE void finish_tile(const QuantizedLinearArguments& a, const Totals<kRows>& totals, const uint8_t* panel,
                             const Tile& tile) {
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t at = tile.panel * kPanelColumns + v * kLanes;
      if (at >= a.out_features) break;
      Floats y = load(totals[r] + v * kLanes);
      if constexpr (K::kPerOutput) y = multiply(y, load(reinterpret_cast<const float*>(panel) + v * kLanes));
      finish_vector<Out>(a, y, tile.row + r, at, a.out_features - at);
    }
  }
}

template <typename K, int kRows>
__attribute__((noinline)) void multiply_tile(const QuantizedLinearArguments& a, const Tile& tile) {
  const int64_t row_bytes = tile.row_bytes;
  const uint8_t* const rows = a.rows + tile.row * row_bytes;
  const uint8_t* const panel = a.panels + tile.panel * tile.panel_bytes;
  const float* scales = reinterpret_cast<const float*>(rows + tile.layout.code_bytes);
  const float* corrections = scales + tile.layout.groups;
  const uint8_t* w = panel + (K::kPerOutput ? 128 : 0);
  Ahead<K::kBits> ahead{tile.later, tile.later, tile.later_step_bytes};
  alignas(64) Totals<kRows> totals;
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) store(totals[row] + v * kLanes, zero());
  }
  for (int64_t first = 0; first < a.in_features; first += a.format.group_size) {
    const uint8_t* const scales_of_group = w;
    w += K::kPerOutput ? 0 : (K::kMinimum ? 128 : 64);
    Sums<kRows> sums;
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Words start = K::kMinimum ? set_words(0) : spread(in_row(corrections, row, row_bytes));
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) sums[row][v] = start;
    }
    const int64_t end = least(first + a.format.group_size, a.in_features);
    for (int64_t input = first; input < end; input += K::kInputsPerStep) {
      ahead.advance();
      add_step<K::kBits, kRows>(sums, rows + input, row_bytes, w);
      w += K::kBytesPerStep;
    }
    add_group<K, kRows>(totals, sums, scales, corrections, row_bytes, scales_of_group);
    ++scales;
    ++corrections;
  }
  if (a.out_dtype == kFloat32) {
    finish_tile<K, kRows, float>(a, totals, panel, tile);
  } else {
    finish_tile<K, kRows, uint16_t>(a, totals, panel, tile);
  }
}

template <typename K, int kRows = K::kMaxRows>
WEFT_INLINE void multiply_some_rows(const QuantizedLinearArguments& a, int64_t rows, const Tile& tile) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_some_rows<K, kRows - 1>(a, rows, tile);
  }
  multiply_tile<K, kRows>(a, tile);
}

// Panels outside, rows inside: a panel is read from memory once and stays in the cache for all rows. A lone tile of
// rows runs along the stream of weights; of several, each asks for its share of the next panel.
template <typename K>
void multiply_piece(const QuantizedLinearArguments& a, int64_t first_row, int64_t end_row, int64_t first_panel,
                    int64_t end_panel) {
  const int64_t bytes = quantized_panel_bytes(a.format, a.in_features);
  const int64_t tiles = divide_rounding_up(end_row - first_row, K::kMaxRows);
  const int64_t steps = divide_rounding_up(a.in_features, K::kInputsPerStep);
  Tile tile{quantized_row(a.format, a.in_features), 0, bytes, 0, 0, nullptr, divide_rounding_up(bytes, steps * tiles)};
  tile.row_bytes = tile.layout.bytes();
  for (tile.panel = first_panel; tile.panel < end_panel; ++tile.panel) {
    tile.row = first_row;
    tile.later = a.panels + tile.panel * bytes + (tiles == 1 ? kStreamAhead : bytes);
    for (int64_t left = tiles; left > 0; --left) {
      const int64_t rows = divide_rounding_up(end_row - tile.row, left);
      multiply_some_rows<K>(a, rows, tile);
      tile.row += rows;
      tile.later += bytes / tiles;
    }
  }
}

void quantized_linear(const QuantizedLinearArguments& a, int64_t first_row, int64_t end_row, int64_t first_panel,
                      int64_t end_panel) {
  const QuantizedFormat& f = a.format;
  if (f.is_per_output) return multiply_piece<Kind<8, false, true>>(a, first_row, end_row, first_panel, end_panel);
  if (f.bits == 8) return multiply_piece<Kind<8, false, false>>(a, first_row, end_row, first_panel, end_panel);
  if (f.bits == 6) {
    if (f.has_minimum) return multiply_piece<Kind<6, true, false>>(a, first_row, end_row, first_panel, end_panel);
    return multiply_piece<Kind<6, false, false>>(a, first_row, end_row, first_panel, end_panel);
  }
  if (f.has_minimum) return multiply_piece<Kind<4, true, false>>(a, first_row, end_row, first_panel, end_panel);
  multiply_piece<Kind<4, false, false>>(a, first_row, end_row, first_panel, end_panel);
}

// ---- Packing --------------------------------------------------------------------------------------------------

WEFT_INLINE uint32_t word_at(const uint8_t* codes) {
  uint32_t word;
  __builtin_memcpy(&word, codes, 4);
  return word;
}

// Writes the codes of one group of one output; `codes` has zeros up to a whole step.
WEFT_INLINE void put_codes(const QuantizedFormat& f, const uint8_t* codes, int64_t inputs, uint8_t* group,
                           int64_t column) {
  uint32_t* out = reinterpret_cast<uint32_t*>(group) + column;
  for (int64_t input = 0; input < inputs; input += inputs_per_step(f)) {
    const uint8_t* c = codes + input;
    if (f.bits == 8) {
      out[0] = word_at(c);
      out += kPanelColumns;
    } else if (f.bits == 4) {
      out[0] = word_at(c) | word_at(c + 4) << 4;
      out += kPanelColumns;
    } else {
      uint32_t upper = 0;
      for (int quarter = 0; quarter < 4; ++quarter) {
        upper |= (word_at(c + quarter * 4) >> 4 & 0x03030303u) << (quarter * 2);
      }
      const uint32_t low = 0x0F0F0F0Fu;
      out[0] = (word_at(c) & low) | (word_at(c + 4) & low) << 4;
      out[kPanelColumns] = (word_at(c + 8) & low) | (word_at(c + 12) & low) << 4;
      out[2 * kPanelColumns] = upper;
      out += 3 * kPanelColumns;
    }
  }
}

WEFT_INLINE uint16_t to_half(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
WEFT_INLINE float from_half(uint16_t x) { return _cvtsh_ss(x); }

// Codes of `count` floats as round((x - minimum) · inverse) + offset, held between 0 and `highest`.
WEFT_INLINE void encode(const float* x, int64_t count, float minimum, float inverse, float offset, float highest,
                        uint8_t* codes) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats scaled = multiply(subtract(load(x + i), set(minimum)), set(inverse));
    const Floats bounded = max(set(0.0f), min(set(highest), add(round_to_integer(scaled), set(offset))));
    store_low_bytes(codes + i, to_words(bounded));
  }
  __builtin_memset(codes + count, 0, 32);
}

// Codes and scales of one output. `x` is the row in float32, `codes` has room for it; both have room for 64 more.
WEFT_INLINE void quantize_output(const QuantizeWeightArguments& a, const float* x, uint8_t* codes, uint8_t* panel,
                                 int64_t column) {
  const QuantizedFormat& f = a.format;
  if (f.is_per_output) {
    const float largest = largest_magnitude(x, a.row_features);
    const float inverse = largest > 0.0f ? kLargestCode / largest : 0.0f;
    reinterpret_cast<float*>(panel)[column] = largest / kLargestCode;
    encode(x + a.first_column, a.in_features, 0.0f, inverse, 128.0f, 255.0f, codes);
    put_codes(f, codes, a.in_features, panel + output_scale_bytes(f), column);
    return;
  }
  const float highest = static_cast<float>((1 << f.bits) - 1);
  for (int64_t first = 0; first < a.in_features; first += f.group_size) {
    const float* const of_group = x + a.first_column + first;
    const int64_t count = least(f.group_size, a.in_features - first);
    float low = of_group[0], high = of_group[0];
    for (int64_t i = 1; i < count; ++i) {
      low = of_group[i] < low ? of_group[i] : low;
      high = of_group[i] > high ? of_group[i] : high;
    }
    const uint16_t scale = to_half((high - low) / highest), minimum = to_half(low);
    const float inverse = from_half(scale) > 0.0f ? 1.0f / from_half(scale) : 0.0f;
    encode(of_group, count, from_half(minimum), inverse, 0.0f, highest, codes);
    reinterpret_cast<uint16_t*>(panel)[column] = scale;
    reinterpret_cast<uint16_t*>(panel)[kPanelColumns + column] = minimum;
    put_codes(f, codes, count, panel + group_scale_bytes(f), column);
    panel += group_bytes(f);
  }
}

void quantize_panels(const QuantizeWeightArguments& a, int64_t first_panel, int64_t end_panel, void* scratch) {
  const int64_t bytes = quantized_panel_bytes(a.format, a.in_features);
  float* const x = static_cast<float*>(scratch);
  uint8_t* const codes = reinterpret_cast<uint8_t*>(x + a.row_features + 64);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    uint8_t* const out = a.panels + panel * bytes;
    if ((panel + 1) * kPanelColumns > a.out_features) __builtin_memset(out, 0, bytes);
    for (int64_t column = 0; column < least(kPanelColumns, a.out_features - panel * kPanelColumns); ++column) {
      const int64_t first = (panel * kPanelColumns + column) * a.row_stride;
      for (int64_t i = 0; i < a.row_features; i += kLanes) {
        const int64_t left = a.row_features - i;
        store(x + i, a.dtype == kFloat32 ? zero_beyond(static_cast<const float*>(a.weight) + first + i, left)
                                         : zero_beyond(static_cast<const uint16_t*>(a.weight) + first + i, left));
      }
      quantize_output(a, x, codes, out, column);
    }
  }
}

void pack_codes(const PackCodesArguments& a, int64_t first_panel, int64_t end_panel, void* scratch) {
  const QuantizedFormat& f = a.format;
  const int64_t bytes = quantized_panel_bytes(f, a.in_features), groups = quantized_groups(f, a.in_features);
  uint8_t* const codes = static_cast<uint8_t*>(scratch);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    uint8_t* const out = a.panels + panel * bytes;
    if ((panel + 1) * kPanelColumns > a.out_features) __builtin_memset(out, 0, bytes);
    for (int64_t column = 0; column < least(kPanelColumns, a.out_features - panel * kPanelColumns); ++column) {
      const int64_t output = panel * kPanelColumns + column;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t count = least(f.group_size, a.in_features - group * f.group_size);
        uint8_t* const of_group = out + group * group_bytes(f);
        __builtin_memcpy(codes, a.codes + output * a.in_features + group * f.group_size, count);
        __builtin_memset(codes + count, 0, 16);
        uint16_t* const halves = reinterpret_cast<uint16_t*>(of_group) + column;
        halves[0] = a.scales[output * groups + group];
        if (f.has_minimum) halves[kPanelColumns] = a.minima[output * groups + group];
        put_codes(f, codes, count, of_group + group_scale_bytes(f), column);
      }
    }
  }
}

// Code of one input, the reverse of put_codes.
WEFT_INLINE int32_t code_at(const QuantizedFormat& f, const uint8_t* codes, int64_t input, int64_t column) {
  const int64_t per_step = inputs_per_step(f), inside = input % per_step;
  const uint8_t* const step = codes + input / per_step * bytes_per_step(f) + column * 4;
  if (f.bits == 8) return step[inside];
  const int32_t low = step[inside / 8 * 128 + inside % 4] >> (inside / 4 % 2 * 4) & 15;
  if (f.bits == 4) return low;
  return low | (step[256 + inside % 4] >> (inside / 4 * 2) & 3) << 4;
}

void dequantize_row(const QuantizedFormat& f, const uint8_t* panels, int64_t in_features, int64_t output, void* out,
                    DataType dtype) {
  const uint8_t* const panel = panels + output / kPanelColumns * quantized_panel_bytes(f, in_features);
  const uint8_t* group = panel + output_scale_bytes(f);
  const int64_t column = output % kPanelColumns;
  const float zero_point = f.has_minimum ? 0.0f : static_cast<float>(f.zero_point);
  alignas(64) float values[kLanes];
  for (int64_t first = 0; first < in_features; first += f.group_size, group += group_bytes(f)) {
    const uint16_t* const halves = reinterpret_cast<const uint16_t*>(group) + column;
    const float scale = f.is_per_output ? reinterpret_cast<const float*>(panel)[column] : from_half(halves[0]);
    const float minimum = f.has_minimum ? from_half(halves[kPanelColumns]) : 0.0f;
    const int64_t end = least(in_features, first + f.group_size);
    for (int64_t input = first; input < end; input += kLanes) {
      const int64_t count = least(kLanes, end - input);
      for (int64_t i = 0; i < count; ++i) {
        const int32_t code = code_at(f, group + group_scale_bytes(f), input - first + i, column);
        values[i] = static_cast<float>(code) - zero_point;
      }
      const Floats w = fma(set(scale), load(values), set(minimum));
      if (dtype == kFloat32) {
        put(static_cast<float*>(out) + input, w, count);
      } else {
        put(static_cast<uint16_t*>(out) + input, w, count);
      }
    }
  }
}

}  // namespace

const QuantizedKernels WEFT_QUANTIZED_TABLE = {
    WEFT_QUANTIZED_NAME, quantize_rows, quantized_linear, quantize_panels, pack_codes, dequantize_row,
};

}  // namespace weft
