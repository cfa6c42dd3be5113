// Weights of few bits: the format, the arguments, and what one instruction set must be able to do with them.
//
// Like kernels.h: plain functions that work on one piece in the calling thread. quantized.cpp cuts operations into
// pieces and runs them on the pool; a program that runs a whole step gets there through layouts.h.
//
// A weight is a code of 4, 6 or 8 bits. The inputs stand in groups. Each group of each output has a scale, or all groups
// of an output share one:
//
//     w = scale · (code - zero_point)        or, with minima,        w = scale · code + minimum
//
// Activations are quantized while the operation runs, per row and group: round(x · 127 / max|x|), ties to even, with
// the scale max|x| / 127. Products are summed in int32, which is exact and knows no order. The float part is one
// fixed sequence of operations per output, groups ascending, so a row has the same bits whatever the batch, the piece,
// the thread and the instruction set. A group with an infinity or NaN has a NaN for its scale, and so has the result.
//
// Memory of a packed weight: one 64-byte header (PackedFormat), then panels of 32 outputs, one after another. A panel
// holds its groups in order: float16 scales [32], float16 minima [32] where there are any, codes; or, where there is one
// scale per output, float32 scales [32] and the codes of all groups. Codes come in steps of the same inputs for all 32 outputs:
//
//     8 bits   4 inputs    [32][4]: one byte each
//     4 bits   8 inputs    [32][4]: inputs 0-3 in the low halves of the bytes, 4-7 in the high ones
//     6 bits   16 inputs   two steps as for 4 bits with the low four bits, then [32][4] with the upper two: byte j has
//                          those of inputs j, j + 4, j + 8, j + 12, from the lowest bits up
//
// Missing outputs and inputs have code 0; their activations count as 0, so any code would do.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace weft {

struct QuantizedFormat {
  int32_t bits;         // 4, 6 or 8
  int32_t group_size;     // inputs that share a scale, a multiple of 16
  int32_t zero_point;     // unused with minima
  int32_t has_minimum;    // 0 or 1
  int32_t is_per_output;  // 1: the groups of an output share their scale, only activations have scales per group
};

// What a packed weight begins with.
struct alignas(64) PackedFormat {
  QuantizedFormat format;
};
static_assert(sizeof(PackedFormat) == 64, "panels are aligned to the cache lines");

static inline int64_t divide_rounding_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t inputs_per_step(const QuantizedFormat& f) { return f.bits == 4 ? 8 : (f.bits == 6 ? 16 : 4); }
static inline int64_t bytes_per_step(const QuantizedFormat& f) { return f.bits == 6 ? 384 : 128; }
static inline int64_t quantized_groups(const QuantizedFormat& f, int64_t in_features) {
  return divide_rounding_up(in_features, f.group_size);
}
// Of a panel's scales and minima for one group.
static inline int64_t group_scale_bytes(const QuantizedFormat& f) { return f.is_per_output ? 0 : 64 * (1 + f.has_minimum); }
static inline int64_t output_scale_bytes(const QuantizedFormat& f) { return f.is_per_output ? 128 : 0; }
static inline int64_t group_bytes(const QuantizedFormat& f) {
  return group_scale_bytes(f) + f.group_size / inputs_per_step(f) * bytes_per_step(f);
}
static inline int64_t quantized_panel_bytes(const QuantizedFormat& f, int64_t in_features) {
  const int64_t last_steps = divide_rounding_up(in_features % f.group_size, inputs_per_step(f));
  const int64_t last = last_steps == 0 ? 0 : group_scale_bytes(f) + last_steps * bytes_per_step(f);
  return output_scale_bytes(f) + in_features / f.group_size * group_bytes(f) + last;
}
static inline int64_t quantized_bytes(const QuantizedFormat& f, int64_t out_features, int64_t in_features) {
  return sizeof(PackedFormat) + panel_count(out_features) * quantized_panel_bytes(f, in_features);
}

// A row of quantized activations: codes (int8, zeros up to a multiple of 64), then for each group a scale and a
// correction: what all outputs have to add to their sums of products. It is the int32 -zero_point · Σ codes, or with
// minima the float scale · Σ codes, which the minimum multiplies.
// Its functions are inlined always: a copy that the linker keeps could be the one of a newer instruction set.
struct QuantizedRow {
  int64_t code_bytes;
  int64_t groups;

  __attribute__((always_inline)) int64_t bytes() const { return divide_rounding_up(code_bytes + groups * 8, 64) * 64; }
  __attribute__((always_inline)) float* scales(void* row) const { return reinterpret_cast<float*>(static_cast<uint8_t*>(row) + code_bytes); }
  __attribute__((always_inline)) int32_t* corrections(void* row) const { return reinterpret_cast<int32_t*>(scales(row) + groups); }
};
static inline QuantizedRow quantized_row(const QuantizedFormat& f, int64_t in_features) {
  return {divide_rounding_up(in_features, 64) * 64, quantized_groups(f, in_features)};
}

struct QuantizeRowsArguments {
  const void* x;
  int64_t x_stride;  // elements
  DataType x_dtype;
  uint8_t* rows;  // QuantizedRow after QuantizedRow
  int64_t in_features;
  QuantizedFormat format;
};

struct QuantizedLinearArguments {
  const uint8_t* rows;    // as QuantizeRowsArguments left them
  const uint8_t* panels;  // behind the header
  const float* bias;      // nullptr or [out_features]
  const void* residual;   // nullptr or rows of out_features in `residual_dtype`
  int64_t residual_stride;  // elements
  void* out;
  int64_t out_stride;  // elements
  int64_t in_features;
  int64_t out_features;
  DataType residual_dtype;
  DataType out_dtype;
  QuantizedFormat format;
};

// Codes and scales from a weight. With one scale per output that is max|w| / 127, with the zero point 128; with minima
// the range of a group is divided evenly.
struct QuantizeWeightArguments {
  const void* weight;  // [out_features, row_features], row_stride elements apart
  int64_t row_stride;
  DataType dtype;
  int64_t row_features;  // a scale per output is that of the whole row
  int64_t first_column;  // where the in_features that are packed begin
  int64_t in_features;
  int64_t out_features;
  uint8_t* panels;
  QuantizedFormat format;
};

// Codes and scales that somebody else made.
struct PackCodesArguments {
  const uint8_t* codes;    // [out_features, in_features]
  const uint16_t* scales;  // [out_features, groups] float16
  const uint16_t* minima;  // the same, or nullptr
  int64_t in_features;
  int64_t out_features;
  uint8_t* panels;
  QuantizedFormat format;
};

struct QuantizedKernels {
  const char* name;
  void (*quantize_rows)(const QuantizeRowsArguments&, int64_t first_row, int64_t end_row);
  void (*linear)(const QuantizedLinearArguments&, int64_t first_row, int64_t end_row, int64_t first_panel,
                 int64_t end_panel);
  void (*quantize_panels)(const QuantizeWeightArguments&, int64_t first_panel, int64_t end_panel, void* scratch);
  void (*pack_codes)(const PackCodesArguments&, int64_t first_panel, int64_t end_panel, void* scratch);
  // The weight of one output, [in_features] in `dtype`.
  void (*dequantize_row)(const QuantizedFormat&, const uint8_t* panels, int64_t in_features, int64_t output,
                         void* out, DataType dtype);
};

// What quantize_panels and pack_codes need.
static inline int64_t pack_scratch_bytes(int64_t row_features) { return (row_features + 64) * 5; }

extern const QuantizedKernels kAvx2Quantized;
extern const QuantizedKernels kAvxVnniQuantized;
extern const QuantizedKernels kAvx512Quantized;
extern const QuantizedKernels kAvx512VnniQuantized;

}  // namespace weft
