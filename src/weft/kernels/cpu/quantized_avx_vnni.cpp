// The kernels of quantized.h for CPUs with AVX2 and its products of bytes.
#include "vector_avx2.h"

#define WEFT_QUANTIZED_TABLE kAvxVnniQuantized
#define WEFT_QUANTIZED_NAME "avx-vnni"
#include "quantized.inl"
