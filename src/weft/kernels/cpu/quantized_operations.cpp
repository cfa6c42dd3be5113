#include "quantized_operations.h"

#include <cpuid.h>

#include <algorithm>
#include <cstring>

#include "operations.h"
#include "thread_pool.h"

namespace weft {
namespace {

// See operations.cpp.
constexpr double kChunkNanoseconds = 4000.0;
constexpr double kBytesPerNanosecond = 20.0;
constexpr double kOperationsPerNanosecond = 400.0;
constexpr int64_t kChunksPerThread = 4;
constexpr int64_t kRowBlock = 192;

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

template <typename Work>
void split(int64_t count, double nanoseconds, const Work& work) {
  const int64_t least = static_cast<int64_t>(kChunkNanoseconds / nanoseconds) + 1;
  const int64_t size = std::max(least, divide_rounding_up(count, thread_count() * kChunksPerThread));
  parallel_chunks(divide_rounding_up(count, size), [&](int64_t chunk, int thread) {
    work(chunk * size, std::min(count, (chunk + 1) * size), thread);
  });
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

void quantized_linear(const PackedWeight& weight, const LinearRows& r) {
  const QuantizedFormat& format = format_of(weight);
  const int64_t row_bytes = quantized_row(format, weight.in_features).bytes();
  uint8_t* const rows = static_cast<uint8_t*>(session_scratch(r.rows * row_bytes));
  const QuantizeRowsArguments quantize{r.x, r.x_stride, weight.dtype, rows, weight.in_features, format};
  split(r.rows, static_cast<double>(weight.in_features) * 0.2, [&](int64_t first, int64_t end, int) {
    quantized_kernels().quantize_rows(quantize, first, end);
  });

  const QuantizedLinearArguments a{rows, panels_of(weight), weight.bias, r.residual, r.residual_stride, r.out,
                                   r.out_stride, weight.in_features, weight.out_features, weight.dtype, r.out_dtype,
                                   format};
  const int64_t panels = panel_count(weight.out_features);
  const int64_t row_blocks = divide_rounding_up(r.rows, kRowBlock);
  const double bytes = static_cast<double>(quantized_panel_bytes(format, weight.in_features));
  const double operations = 2.0 * kPanelColumns * static_cast<double>(std::min(r.rows, kRowBlock) * weight.in_features);
  const double nanoseconds = bytes / kBytesPerNanosecond + operations / kOperationsPerNanosecond;
  const int64_t least = static_cast<int64_t>(kChunkNanoseconds / nanoseconds) + 1;
  const int64_t even = panels * row_blocks / (thread_count() * kChunksPerThread);
  const int64_t group = std::min(panels, std::max(least, even));
  const int64_t groups = divide_rounding_up(panels, group);
  parallel_chunks(row_blocks * groups, [&](int64_t chunk, int) {
    const int64_t row = chunk / groups * kRowBlock;
    const int64_t panel = chunk % groups * group;
    quantized_kernels().linear(a, row, std::min(r.rows, row + kRowBlock), panel, std::min(panels, panel + group));
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
