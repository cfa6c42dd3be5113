// The kernels of quantized.h for CPUs with AVX-512 and its products of bytes.
#include "vector_avx512.h"

#define WEFT_QUANTIZED_TABLE kAvx512VnniQuantized
#define WEFT_QUANTIZED_NAME "avx512-vnni"
#include "quantized.inl"
