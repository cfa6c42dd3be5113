// What one instruction set must be able to do, and the arguments it gets.
//
// A KernelTable holds plain functions that work on one piece of an operation in the calling thread. operations.cpp
// cuts operations into pieces and runs them on the pool; a program that runs a whole step calls the same functions.
//
// Functions defined here are static: were they shared, the linker might keep the copy of a unit built for a newer
// instruction set, and an older CPU would die of it.
//
// Numbers: an output element is always the same sequence of float operations, whatever the batch, the piece and the
// thread. Anything that would break this (splitting a sum by the number of rows or threads) has no place here.
#pragma once

#include <cstdint>

namespace weft {

// kInt8 is for keys and values alone.
enum DataType : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

static inline int64_t bytes_per_element(DataType type) { return type == kFloat32 ? 4 : type == kBfloat16 ? 2 : 1; }

// Packed weights are panels of 32 outputs. Inside a panel come the inputs one after another (float32) or two by two
// (bfloat16): [I][32] floats or [I/2][32][2] bfloat16. Missing outputs and an odd last input are zero.
constexpr int64_t kPanelColumns = 32;

static inline int64_t panel_count(int64_t out_features) { return (out_features + kPanelColumns - 1) / kPanelColumns; }
static inline int64_t panel_steps(int64_t in_features, DataType type) {
  return type == kFloat32 ? in_features : (in_features + 1) / 2;
}
// 128 bytes per step in either dtype.
static inline int64_t panel_bytes(int64_t in_features, DataType type) { return panel_steps(in_features, type) * 128; }

struct PackArguments {
  const void* weight;  // [out_features, in_features], row_stride elements apart
  int64_t row_stride;
  void* panels;
  int64_t out_features;
  int64_t in_features;
  DataType dtype;
};

struct LinearArguments {
  const void* x;  // rows of in_features (padded to an even number in bfloat16), in x_dtype
  int64_t x_row_bytes;
  const uint8_t* panels;
  const float* bias;      // nullptr or [out_features]
  const void* residual;   // nullptr or rows of out_features in `dtype`
  int64_t residual_stride;  // elements
  void* out;
  int64_t out_stride;  // elements
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
  DataType dtype;  // of weights
  DataType out_dtype;
};

// Attention visits keys in tiles of 32 absolute positions: two runs of 16, which never cross a block. Tiles are collected in parts of 512 positions: inside a part the softmax runs online, parts are
// then merged in ascending order. Parts may be computed by different threads without changing a bit.
constexpr int64_t kTilePositions = 32;
constexpr int64_t kPartPositions = 512;

// The pool lies as dot products read it, whatever the instruction set; kv_layout.py writes the same. A block of one
// head, B positions of D dimensions, is made of units: one float32, or two elements of bfloat16 or int8.
//   keys    [B/16][D/n][16] units of n dimensions of a position: scores of 16 positions are one chain over D/n units
//   values  [B/n][D] units of n positions of a dimension: weighted sums are chains over positions
// A block of int8 ends with B float32 scales: an element is code · scale of its position.
constexpr int64_t kRunPositions = 16;

static inline int64_t elements_per_unit(DataType type) { return type == kFloat32 ? 1 : 2; }
static inline int64_t bytes_per_position(int64_t head_size, DataType type) {
  return head_size * bytes_per_element(type) + (type == kInt8 ? 4 : 0);
}

// Positions begin … end - 1 that some sequences of a common part visit together, or the last of them one alone.
struct PrefixSegment {
  int32_t first;  // within the part's sequences
  int32_t count;
  int32_t begin;  // multiple of kTilePositions
  int32_t end;
};

// A part of the context that decoding sequences begin together: whoever leaves the others goes on in segments of its
// own, each after the one that it continues.
struct CommonPart {
  int32_t first;  // within the order's sequences
  int32_t count;
  int32_t first_segment;
  int32_t num_segments;
  int32_t part;
};

// Which sequences begin with the same blocks: see prefixes.h.
struct PrefixOrder {
  const int32_t* sequences;  // that decode, those that share side by side
  const PrefixSegment* segments;
  const CommonPart* parts;  // [count]
  int64_t count;
  const int32_t* shared_parts;  // [S] leading parts of a sequence that are among these
};

struct AttentionArguments {
  const void* q;  // [T, Hq, D], heads contiguous
  int64_t q_stride;  // elements between tokens
  void* out;         // [T, Hq, D] contiguous, dtype of q
  const void* keys;  // [N, Hkv] blocks
  const void* values;
  const int32_t* block_tables;
  int64_t table_stride;
  const int32_t* query_starts;
  const int32_t* context_lens;
  float scale;
  float softcap;  // 0 = none
  int64_t window;  // 0 = none
  int64_t query_heads;
  int64_t kv_heads;
  int64_t head_size;   // even
  int64_t block_size;  // multiple of 16
  DataType dtype;
  DataType kv_dtype;
  const PrefixOrder* prefixes = nullptr;  // nullptr: read every sequence by itself
};

// Rows of one sequence and one key/value head: queries first_query … first_query + num_queries - 1, each with all
// query heads of the group.
struct AttentionPiece {
  int64_t sequence;
  int64_t kv_head;
  int64_t first_query;
  int64_t num_queries;
};

struct RotaryArguments {
  void* q;  // [T, Hq, D]
  int64_t q_stride;
  const void* k;  // [T, Hkv, D]
  int64_t k_stride;
  const void* v;
  int64_t v_stride;
  const float* cos_sin;  // [P, rotary_size]
  int64_t rotary_size;
  const int32_t* positions;
  const int32_t* kv_slots;
  void* keys;  // [N, Hkv] blocks
  void* values;
  int64_t query_heads;
  int64_t kv_heads;
  int64_t head_size;
  int64_t block_size;
  DataType dtype;
  DataType kv_dtype;
};

// Rows [outer, inner, width] with contiguous inner rows; outer rows may be apart. The output is contiguous.
struct NormArguments {
  const void* x;
  int64_t outer_stride;  // elements
  int64_t inner;
  const void* residual;  // nullptr or contiguous like the output
  const void* weight;
  void* sum;  // x + residual when residual is given
  void* out;
  int64_t width;
  float eps;
  float weight_offset;
  DataType dtype;
};

enum ActivationKind : int32_t { kSilu = 0, kGeluTanh = 1 };

struct GateArguments {
  const void* x;  // [T, 2F]
  int64_t x_stride;
  void* out;  // [T, F]
  int64_t width;
  ActivationKind kind;
  DataType dtype;
};

// What a run of a row of logits says about it. Runs are merged in ascending order.
struct LogitRun {
  float best;         // largest logit
  float sum;          // Σ exp(logit - best)
  int64_t best_index;  // smallest index holding `best`
  bool has_nan;
};

struct RaceRun {
  double best;  // largest logit - log(q); -inf when nothing may win
  int64_t best_index;
  bool has_nan;
};

struct KernelTable {
  const char* name;

  // Panels first_panel … end_panel-1 of a weight.
  void (*pack_panels)(const PackArguments&, int64_t first_panel, int64_t end_panel);

  // Whether x must be handed over in float32 for weights of this dtype.
  bool (*linear_wants_float_rows)(DataType weights);
  void (*linear)(const LinearArguments&, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel);

  int64_t (*attention_scratch_bytes)(const AttentionArguments&, int64_t max_rows);
  int64_t (*attention_state_floats)(const AttentionArguments&, int64_t rows);
  // All parts of a piece, written to `out`. `next` is the piece the thread does afterwards, or nullptr.
  void (*attend)(const AttentionArguments&, const AttentionPiece&, const AttentionPiece* next, void* scratch);
  // One part of a piece, left in `state`; then the parts first_part … first_part + parts - 1, written to `out`.
  void (*attend_part)(const AttentionArguments&, const AttentionPiece&, int64_t part, float* state, void* scratch);
  // The same part for the only query of each of several sequences: states[i] is left as attend_part would leave it for
  // the i-th of them alone.
  void (*attend_common_part)(const AttentionArguments&, const CommonPart&, int64_t kv_head, float* const* states,
                             void* scratch);
  void (*merge_parts)(const AttentionArguments&, const AttentionPiece&, float* states, int64_t parts);

  void (*rotary_and_store)(const RotaryArguments&, int64_t first_token, int64_t end_token);
  void (*rms_norm)(const NormArguments&, int64_t first_row, int64_t end_row);
  void (*gate)(const GateArguments&, int64_t first_row, int64_t end_row);
  void (*convert_row)(const void* x, DataType from, void* out, DataType to, int64_t width);
  // x · factor and cap · tanh(x / cap), in place.
  void (*scale_row)(void* x, DataType dtype, float factor, int64_t width);
  void (*softcap_row)(float* x, float cap, int64_t width);
  LogitRun (*scan_logits)(const float* logits, int64_t first_index, int64_t count);
  // (logit - best) / temperature.
  void (*temper)(const float* logits, int64_t count, float best, float temperature, float* out);
  RaceRun (*race)(const float* logits, int64_t first_index, int64_t count, uint64_t seed, uint64_t position,
                  float* scratch);
};

// Parts of the context that the rows of a piece can see: [first, end).
struct PartRange {
  int64_t first;
  int64_t end;
};

static inline PartRange visible_parts(const AttentionArguments& a, const AttentionPiece& piece) {
  const int64_t length = a.query_starts[piece.sequence + 1] - a.query_starts[piece.sequence];
  const int64_t first_position = a.context_lens[piece.sequence] - length + piece.first_query;
  const int64_t end_position = first_position + piece.num_queries;
  const int64_t oldest = a.window > 0 && first_position >= a.window ? first_position - a.window + 1 : 0;
  return {oldest / kPartPositions, (end_position + kPartPositions - 1) / kPartPositions};
}

extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;

}  // namespace weft
