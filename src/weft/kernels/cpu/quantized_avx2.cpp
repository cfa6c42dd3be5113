// The kernels of quantized.h for CPUs with AVX2.
#include "vector_avx2.h"

#define WEFT_QUANTIZED_TABLE kAvx2Quantized
#define WEFT_QUANTIZED_NAME "avx2"
#include "quantized.inl"
