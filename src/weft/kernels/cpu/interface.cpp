// The C interface that library.py loads. Pointers and sizes only: nothing here knows of Python or torch.
//
// Functions that follow indices given by the caller check them first and return the place of the first bad one,
// counted from 1, or 0 when all are in range: a wrong index must become an error, never a write into foreign memory.
#include <cstdint>

#include "layouts.h"
#include "operations.h"
#include "prefixes.h"
#include "program.h"
#include "thread_pool.h"

#ifndef WEFT_SOURCE_HASH
#define WEFT_SOURCE_HASH "unknown"
#endif

using namespace weft;

namespace {

template <typename Index>
int64_t first_outside(const Index* values, int64_t count, int64_t low, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < low || values[i] >= end) return i + 1;
  }
  return 0;
}

DataType type(int32_t code) { return static_cast<DataType>(code); }

}  // namespace

#define WEFT_EXPORT extern "C" __attribute__((visibility("default")))

WEFT_EXPORT const char* weft_source_hash() { return WEFT_SOURCE_HASH; }
WEFT_EXPORT const char* weft_compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

// Selects kernels by name (nullptr: the best). Returns 0 when the CPU lacks what they need.
WEFT_EXPORT int32_t weft_select(const char* name) {
  const Session session;
  return select_kernels(name) ? 1 : 0;
}
WEFT_EXPORT const char* weft_selected() { return kernels().name; }
WEFT_EXPORT void weft_set_threads(int32_t count) { set_thread_count(count); }
WEFT_EXPORT int32_t weft_threads() { return thread_count(); }
WEFT_EXPORT void weft_stop() { stop_threads(); }

WEFT_EXPORT int64_t weft_packed_bytes(int64_t out_features, int64_t in_features, int32_t dtype) {
  return panel_count(out_features) * panel_bytes(in_features, type(dtype));
}

WEFT_EXPORT void weft_pack_panels(const void* weight, int64_t row_stride, void* panels, int64_t out_features,
                                  int64_t in_features, int32_t dtype) {
  const Session session;
  pack_panels({weight, row_stride, panels, out_features, in_features, type(dtype)});
}

WEFT_EXPORT void weft_linear(const void* x, int64_t x_stride, const void* panels, const float* bias,
                             const void* residual, int64_t residual_stride, void* out, int64_t out_stride, int64_t rows,
                             int64_t in_features, int64_t out_features, int32_t dtype, int32_t out_dtype) {
  const Session session;
  linear({nullptr, 0, static_cast<const uint8_t*>(panels), bias, residual, residual_stride, out, out_stride, rows,
          in_features, out_features, type(dtype), type(out_dtype)},
         x, x_stride);
}

WEFT_EXPORT int64_t weft_embedding(const void* ids, int64_t id_bytes, int64_t count, const void* panels, int64_t width,
                                   int64_t vocabulary, int32_t dtype, void* out) {
  const int64_t bad = id_bytes == 8 ? first_outside(static_cast<const int64_t*>(ids), count, 0, vocabulary)
                                    : first_outside(static_cast<const int32_t*>(ids), count, 0, vocabulary);
  if (bad != 0) return bad;
  const Session session;
  embedding(ids, id_bytes, count, static_cast<const uint8_t*>(panels), width, type(dtype), out);
  return 0;
}

WEFT_EXPORT void weft_scale_rows(void* x, int32_t dtype, float factor, int64_t rows, int64_t width) {
  const Session session;
  scale_rows(x, type(dtype), factor, rows, width);
}

WEFT_EXPORT void weft_softcap(float* x, int64_t stride, int64_t rows, int64_t width, float cap) {
  const Session session;
  softcap(x, stride, rows, width, cap);
}

WEFT_EXPORT int64_t weft_take_rows(const void* x, int64_t stride, int64_t rows_of_x, const int32_t* rows, int64_t count,
                                   int64_t width, int32_t dtype, void* out) {
  if (const int64_t bad = first_outside(rows, count, 0, rows_of_x)) return bad;
  const Session session;
  take_rows(x, stride, rows, count, width, type(dtype), out);
  return 0;
}

// Place of a layout of packed weights in this library, or -1 when it has none of that name that can be multiplied by,
// or that rows can be looked up in.
WEFT_EXPORT int32_t weft_find_layout(const char* name, int32_t as_table) { return find_layout(name, as_table != 0); }

// Sizes of Instruction and Step, for a comparison with their mirrors.
WEFT_EXPORT int64_t weft_instruction_bytes() { return sizeof(Instruction); }
WEFT_EXPORT int64_t weft_step_bytes() { return sizeof(Step); }

// Runs a program on one batch. Returns 0 or what the batch must not contain, with the place in `index`.
WEFT_EXPORT int32_t weft_run_step(const Instruction* program, int64_t count, const Step* step, int64_t* index) {
  const Finding finding = check_step(program, count, *step);
  *index = finding.index;
  if (finding.fault != Fault::kNone) return static_cast<int32_t>(finding.fault);
  const Session session;
  run_step(program, count, *step);
  return 0;
}

// Returns 0, or 1 + the index of the first sequence whose lengths or blocks are out of range.
WEFT_EXPORT int64_t weft_paged_attention(const void* q, int64_t q_stride, void* out, const void* keys,
                                         const void* values, int64_t blocks, const int32_t* block_tables,
                                         int64_t table_stride, int64_t table_width, const int32_t* query_starts,
                                         const int32_t* context_lens, int64_t sequences, int64_t tokens, float scale,
                                         float softcap, int64_t window, int64_t query_heads, int64_t kv_heads,
                                         int64_t head_size, int64_t block_size, int32_t dtype, int32_t kv_dtype) {
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t length = static_cast<int64_t>(query_starts[s + 1]) - query_starts[s];
    const int64_t context = context_lens[s];
    if (query_starts[s] < 0 || length < 0 || query_starts[s + 1] > tokens) return s + 1;
    if (length == 0) continue;
    if (context < length || context > table_width * block_size) return s + 1;
    // Blocks that a window has left behind are never read and may hold anything.
    const int64_t oldest = window > 0 ? (context - length - window + 1 > 0 ? context - length - window + 1 : 0) : 0;
    const int64_t first = oldest / block_size;
    const int64_t end = (context + block_size - 1) / block_size;
    if (first_outside(block_tables + s * table_stride + first, end - first, 0, blocks) != 0) return s + 1;
  }
  const Session session;
  const PrefixFinder prefixes(query_starts, context_lens, block_tables, table_stride, window > 0 ? 0 : sequences,
                              block_size, common_limits(query_heads, kv_heads, head_size));
  paged_attention({q, q_stride, out, keys, values, block_tables, table_stride, query_starts, context_lens, scale,
                   softcap, window, query_heads, kv_heads, head_size, block_size, type(dtype), type(kv_dtype),
                   prefixes.order()},
                  sequences);
  return 0;
}

// Returns 0, or 1 + the index of the first token whose position or slot is out of range.
WEFT_EXPORT int64_t weft_rotary_and_store(void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v,
                                          int64_t v_stride, const float* cos_sin, int64_t max_positions,
                                          int64_t rotary_size, const int32_t* positions, const int32_t* kv_slots,
                                          void* keys, void* values, int64_t blocks, int64_t tokens,
                                          int64_t query_heads, int64_t kv_heads, int64_t head_size, int64_t block_size,
                                          int32_t dtype, int32_t kv_dtype) {
  if (const int64_t bad = first_outside(positions, tokens, 0, max_positions)) return bad;
  if (const int64_t bad = first_outside(kv_slots, tokens, INT32_MIN, blocks * block_size)) return bad;
  const Session session;
  rotary_and_store({q, q_stride, k, k_stride, v, v_stride, cos_sin, rotary_size, positions, kv_slots, keys, values,
                    query_heads, kv_heads, head_size, block_size, type(dtype), type(kv_dtype)},
                   tokens);
  return 0;
}

WEFT_EXPORT void weft_rms_norm(const void* x, int64_t outer_stride, int64_t outer, int64_t inner, const void* residual,
                               const void* weight, void* sum, void* out, int64_t width, float eps, float weight_offset,
                               int32_t dtype) {
  const Session session;
  rms_norm({x, outer_stride, inner, residual, weight, sum, out, width, eps, weight_offset, type(dtype)}, outer * inner);
}

WEFT_EXPORT void weft_gated_activation(const void* x, int64_t x_stride, void* out, int64_t rows, int64_t width,
                                       int32_t kind, int32_t dtype) {
  const Session session;
  gated_activation({x, x_stride, out, width, static_cast<ActivationKind>(kind), type(dtype)}, rows);
}

WEFT_EXPORT void weft_greedy(const float* logits, int64_t stride, int64_t rows, int64_t width, int64_t* ids,
                             float* logprobs) {
  const Session session;
  greedy(logits, stride, rows, width, ids, logprobs);
}

WEFT_EXPORT int64_t weft_token_logprobs(const float* logits, int64_t stride, int64_t rows, int64_t width,
                                        const int64_t* ids, float* logprobs) {
  if (const int64_t bad = first_outside(ids, rows, 0, width)) return bad;
  const Session session;
  token_logprobs(logits, stride, rows, width, ids, logprobs);
  return 0;
}

WEFT_EXPORT void weft_draw(const float* logits, int64_t stride, int64_t rows, int64_t width, const float* temperatures,
                           const int64_t* seeds, const int64_t* positions, const uint8_t* is_raw, int64_t* ids,
                           float* logprobs) {
  const Session session;
  draw({logits, stride, width, temperatures, seeds, positions, is_raw, ids, logprobs}, rows);
}

WEFT_EXPORT void weft_race(const float* logits, int64_t stride, int64_t rows, int64_t width, const int64_t* seeds,
                           const int64_t* positions, int64_t* ids) {
  const Session session;
  race(logits, stride, rows, width, seeds, positions, ids);
}
