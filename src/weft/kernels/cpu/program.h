// A model as a flat list of operations, run with one call per step.
//
// The list is recorded once, from the calls that the model made of the operations one by one (recording.py), and
// holds what does not change between steps: operations, weights, sizes, and which buffer each operand lives in. A
// step brings the batch and the memory. The same functions compute as in calls one by one, so the bits are the same.
//
// The structures below are mirrored field by field in program.py.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace weft {

enum class Operation : int32_t {
  kEmbedding = 0,
  kLinear = 1,
  kRmsNorm = 2,
  kRotaryAndStore = 3,
  kPagedAttention = 4,
  kGatedActivation = 5,
  kTakeRows = 6,
  kSoftcap = 7,
  kGreedy = 8,
};

// How many rows an operand has in a step.
enum class Rows : int32_t { kTokens = 0, kLogits = 1 };

constexpr int32_t kNoBuffer = -1;

// Rows inside a buffer: `offset` elements into each row of the buffer, `stride` elements from row to row. Token ids
// are int64 and have no DataType; nothing reads it there.
struct Operand {
  int32_t buffer;
  DataType dtype;
  int64_t offset;
  int64_t stride;
};

// A weight matrix in the layout of whoever multiplies by it; `layout` is a place in the table of layouts.h.
struct PackedWeight {
  const void* data;
  const float* bias;    // nullptr or [out_features]
  const void* scales;   // nullptr, or what the layout keeps beside `data`
  int64_t out_features;
  int64_t in_features;
  DataType dtype;  // of the activations
  int32_t layout;
};

struct Instruction {
  Operation operation;
  Rows rows;
  // Which inputs there are depends on the operation: x; q, k, v; x, residual.
  Operand inputs[3];
  // Result; for a norm after an addition also the sum. Greedy: token ids, log-probabilities.
  Operand outputs[2];
  PackedWeight linear;     // embedding, linear
  const void* weight;      // norm weight, or table of cosines and sines
  int64_t width;           // elements of a row that is normalized, gated, taken, capped or chosen from
  int64_t inner;           // norm: rows per token
  int64_t query_heads;
  int64_t kv_heads;
  int64_t head_size;
  int64_t rotary_size;
  int64_t table_rows;      // rotary: positions in the table
  int64_t window;
  int32_t layer;           // of the pool
  ActivationKind activation;
  float scale;             // attention: of scores; embedding: of rows
  float softcap;
  float eps;
  float weight_offset;
};

struct Step {
  const int32_t* token_ids;     // [T]
  const int32_t* positions;     // [T]
  const int32_t* kv_slots;      // [T]
  const int32_t* query_starts;  // [S + 1]
  const int32_t* context_lens;  // [S]
  const int32_t* block_tables;  // [S, table_stride]
  const int32_t* logit_rows;    // [S']
  int64_t tokens;
  int64_t sequences;
  int64_t logits;
  int64_t table_stride;
  int64_t table_width;
  int64_t num_blocks;
  int64_t block_size;
  DataType kv_dtype;
  void* const* keys;    // [L] pools of [N, Hkv] blocks
  void* const* values;  // [L]
  void* const* buffers;
  int64_t* nanoseconds;  // nullptr, or one per instruction: how long it took is added
};

// What a step must not contain. The number of the first bad entry comes with it.
enum class Fault : int32_t {
  kNone = 0,
  kTokenId = 1,
  kPosition = 2,
  kKvSlot = 3,
  kSequence = 4,
  kLogitRow = 5,
};

struct Finding {
  Fault fault;
  int64_t index;
};

// Looks for indices outside of what the program may touch.
Finding check_step(const Instruction* program, int64_t count, const Step& step);

// Runs a checked step. The caller holds a Session.
void run_step(const Instruction* program, int64_t count, const Step& step);

}  // namespace weft
