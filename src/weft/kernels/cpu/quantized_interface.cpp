// The part of the C interface that deals with weights of few bits, see interface.cpp.
#include <cstdint>

#include "quantized_operations.h"
#include "thread_pool.h"

using namespace weft;

#define WEFT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

uint8_t* begin(void* packed, const QuantizedFormat& format) {
  static_cast<PackedFormat*>(packed)->format = format;
  return static_cast<uint8_t*>(packed) + sizeof(PackedFormat);
}

}  // namespace

// Selects kernels by name (nullptr: the best). Returns 0 when the CPU lacks what they need.
WEFT_EXPORT int32_t weft_select_quantized(const char* name) {
  const Session session;
  return select_quantized_kernels(name) ? 1 : 0;
}
WEFT_EXPORT const char* weft_selected_quantized() { return quantized_kernels().name; }

WEFT_EXPORT int64_t weft_quantized_bytes(int64_t out_features, int64_t in_features, const QuantizedFormat* format) {
  return quantized_bytes(*format, out_features, in_features);
}

WEFT_EXPORT void weft_quantize_weight(const void* weight, int64_t row_stride, int32_t dtype, int64_t row_features,
                                      int64_t first_column, int64_t in_features, int64_t out_features, void* packed,
                                      const QuantizedFormat* format) {
  const Session session;
  quantize_weight({weight, row_stride, static_cast<DataType>(dtype), row_features, first_column, in_features,
                   out_features, begin(packed, *format), *format});
}

WEFT_EXPORT void weft_pack_codes(const uint8_t* codes, const uint16_t* scales, const uint16_t* minima,
                                 int64_t in_features, int64_t out_features, void* packed,
                                 const QuantizedFormat* format) {
  const Session session;
  pack_codes({codes, scales, minima, in_features, out_features, begin(packed, *format), *format});
}

WEFT_EXPORT void weft_quantized_linear(const void* x, int64_t x_stride, const void* packed, const float* bias,
                                       const void* residual, int64_t residual_stride, void* out, int64_t out_stride,
                                       int64_t rows, int64_t in_features, int64_t out_features, int32_t dtype,
                                       int32_t out_dtype) {
  const Session session;
  quantized_linear({packed, bias, nullptr, out_features, in_features, static_cast<DataType>(dtype), 0},
                   {x, x_stride, residual, residual_stride, out, out_stride, rows, static_cast<DataType>(out_dtype),
                    nullptr});
}

// Returns 0, or 1 + the place of the first id outside of the vocabulary.
WEFT_EXPORT int64_t weft_quantized_embedding(const int32_t* ids, int64_t count, const void* packed, int64_t width,
                                             int64_t vocabulary, int32_t dtype, void* out) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= vocabulary) return i + 1;
  }
  const Session session;
  quantized_embedding({packed, nullptr, nullptr, vocabulary, width, static_cast<DataType>(dtype), 0}, ids, count, out);
  return 0;
}
