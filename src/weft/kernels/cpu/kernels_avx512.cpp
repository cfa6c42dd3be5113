// The kernels for CPUs with AVX-512 (F, BW, DQ, VL).
#include "vector_avx512.h"

#define WEFT_TABLE kAvx512Kernels
#define WEFT_TABLE_NAME "avx512"
#include "kernels.inl"
