// The kernels for CPUs with AVX-512 and its bfloat16 dot product.
#include "vector_avx512.h"

#define WEFT_TABLE kAvx512Bf16Kernels
#define WEFT_TABLE_NAME "avx512-bf16"
#include "kernels.inl"
