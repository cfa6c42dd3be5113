// The kernels of quantized.h for CPUs with AVX-512 without products of bytes.
#include "vector_avx512.h"

#define WEFT_QUANTIZED_TABLE kAvx512Quantized
#define WEFT_QUANTIZED_NAME "avx512"
#include "quantized.inl"
