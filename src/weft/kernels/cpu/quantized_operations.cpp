#include "quantized_operations.h"

#include <cpuid.h>

#include <algorithm>
#include <cstring>

#include "operations.h"
#include "pieces.h"

namespace weft {
namespace {

// The compilers' own list of features misses this one.
bool has_avx_vnni() {
  unsigned int a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & 1u << 4) != 0;
}

bool is_supported(const QuantizedKernels& table) {
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (&table == &kAvx512VnniQuantized) return has_avx512 && __builtin_cpu_supports("avx512vnni");
  if (&table == &kAvx512Quantized) return has_avx512;
  if (&table == &kAvxVnniQuantized) return __builtin_cpu_supports("avx2") && has_avx_vnni();
  return __builtin_cpu_supports("avx2");
}

const QuantizedKernels* const kDescending[] = {&kAvx512VnniQuantized, &kAvx512Quantized, &kAvxVnniQuantized,
                                               &kAvx2Quantized};

// The best tables with and without AVX-512.
struct Best {
  const QuantizedKernels* wide;
  const QuantizedKernels* narrow;
};

Best find_best() {
  Best best{is_supported(kAvx512VnniQuantized) ? &kAvx512VnniQuantized : &kAvx512Quantized,
            is_supported(kAvxVnniQuantized) ? &kAvxVnniQuantized : &kAvx2Quantized};
  return best;
}

const QuantizedKernels*& forced_kernels() {
  static const QuantizedKernels* forced = nullptr;
  return forced;
}

const QuantizedFormat& format_of(const PackedWeight& weight) {
  return static_cast<const PackedFormat*>(weight.data)->format;
}

const uint8_t* panels_of(const PackedWeight& weight) {
  return static_cast<const uint8_t*>(weight.data) + sizeof(PackedFormat);
}

}  // namespace

const QuantizedKernels& quantized_kernels() {
  static const Best best = find_best();
  if (forced_kernels() != nullptr) return *forced_kernels();
  return &kernels() == &kAvx2Kernels ? *best.narrow : *best.wide;
}

bool select_quantized_kernels(const char* name) {
  forced_kernels() = nullptr;
  if (name == nullptr) return true;
  for (const QuantizedKernels* table : kDescending) {
    if (std::strcmp(table->name, name) == 0 && is_supported(*table)) forced_kernels() = table;
  }
  return forced_kernels() != nullptr;
}

void quantize_weight(const QuantizeWeightArguments& a) {
  const double nanoseconds = static_cast<double>(a.row_features * kPanelColumns);
  split(panel_count(a.out_features), nanoseconds, [&](int64_t first, int64_t end, int thread) {
    quantized_kernels().quantize_panels(a, first, end, thread_scratch(thread, pack_scratch_bytes(a.row_features)));
  });
}

void pack_codes(const PackCodesArguments& a) {
  const double nanoseconds = static_cast<double>(a.in_features * kPanelColumns) * 0.5;
  split(panel_count(a.out_features), nanoseconds, [&](int64_t first, int64_t end, int thread) {
    quantized_kernels().pack_codes(a, first, end, thread_scratch(thread, pack_scratch_bytes(a.in_features)));
  });
}

int64_t quantized_weight_bytes(const PackedWeight& weight) {
  return quantized_bytes(format_of(weight), weight.out_features, weight.in_features);
}

int64_t quantized_row_bytes(const PackedWeight& weight) {
  return quantized_row(format_of(weight), weight.in_features).bytes();
}

void quantize_rows(const PrepareRows& a, int64_t first_row, int64_t end_row) {
  const PackedWeight& weight = *a.weight;
  quantized_kernels().quantize_rows({a.x, a.x_stride, weight.dtype, static_cast<uint8_t*>(a.prepared),
                                     weight.in_features, format_of(weight)},
                                    first_row, end_row);
}

void quantized_linear(const PackedWeight& weight, const LinearRows& r) {
  const QuantizedFormat& format = format_of(weight);
  const void* rows = r.prepared;
  if (rows == nullptr) {
    const PrepareRows prepare{&weight, r.x, r.x_stride, session_scratch(r.rows * quantized_row_bytes(weight))};
    split(r.rows, static_cast<double>(weight.in_features) * 0.2,
          [&](int64_t first, int64_t end, int) { quantize_rows(prepare, first, end); });
    rows = prepare.prepared;
  }
  const QuantizedLinearArguments a{static_cast<const uint8_t*>(rows), panels_of(weight), weight.bias, r.residual, r.residual_stride, r.out,
                                   r.out_stride, weight.in_features, weight.out_features, weight.dtype, r.out_dtype,
                                   format};
  split_product(r.rows, panel_count(weight.out_features), quantized_panel_bytes(format, weight.in_features),
                weight.in_features, kInt8OperationsPerNanosecond,
                [&](int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel) {
                  quantized_kernels().linear(a, first_row, end_row, first_panel, end_panel);
                });
}

void quantized_embedding(const PackedWeight& weight, const int32_t* ids, int64_t count, void* out) {
  const int64_t row_bytes = weight.in_features * bytes_per_element(weight.dtype);
  split(count, static_cast<double>(weight.in_features), [&](int64_t first, int64_t end, int) {
    for (int64_t i = first; i < end; ++i) {
      quantized_kernels().dequantize_row(format_of(weight), panels_of(weight), weight.in_features, ids[i],
                                         static_cast<uint8_t*>(out) + i * row_bytes, weight.dtype);
    }
  });
}

}  // namespace weft
