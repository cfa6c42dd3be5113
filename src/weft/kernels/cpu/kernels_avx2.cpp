// The kernels for CPUs with AVX2 and FMA.
#include "vector_avx2.h"

#define WEFT_TABLE kAvx2Kernels
#define WEFT_TABLE_NAME "avx2"
#include "kernels.inl"
