// Sixteen floats in AVX-512 (F, BW, DQ, VL): the vocabulary in which kernels.inl is written.
//
// Everything stands in an unnamed namespace: were these functions shared between translation units, the linker might
// keep a copy built for a newer instruction set and run it on an older machine.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace weft {
namespace {

#define WEFT_INLINE static inline __attribute__((always_inline))

using Floats = __m512;
using Words = __m512i;
// Sums of integers have a type of their own: as Words the compiler copies them from register to register.
using Integers = int32_t __attribute__((vector_size(64)));
constexpr int kLanes = 16;
constexpr int kMaxLinearRows = 12;
constexpr int kScoreRows = 8;
constexpr int kOutputRows = 6;
constexpr int kOutputVectors = 4;

WEFT_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

WEFT_INLINE Floats zero() { return _mm512_setzero_ps(); }
WEFT_INLINE Floats set(float x) { return _mm512_set1_ps(x); }
WEFT_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
WEFT_INLINE Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
WEFT_INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
WEFT_INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
// a · b + c, rounded once.
WEFT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand when either is NaN.
WEFT_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
WEFT_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
WEFT_INLINE Floats round_to_integer(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
// x · 2ⁿ for a whole-numbered n.
WEFT_INLINE Floats scale_by_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

// x - ⌊x⌋, in [0, 1); 0 at both infinities.
WEFT_INLINE Floats fraction(Floats x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// y · 2^⌊x⌋; 0 at x = -inf.
WEFT_INLINE Floats scale_by_floor(Floats y, Floats x) { return _mm512_scalef_ps(y, x); }

WEFT_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
WEFT_INLINE Floats load_first(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
WEFT_INLINE void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
WEFT_INLINE void store_first(float* p, Floats x, int64_t count) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }

WEFT_INLINE Floats widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

WEFT_INLINE __m256i narrow(Floats x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const Words bits = _mm512_castps_si512(x);
  const Words odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const Words rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const Words quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, rounded, quiet), 16));
#endif
}

WEFT_INLINE Floats load(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
WEFT_INLINE Floats load_first(const uint16_t* p, int64_t count) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
WEFT_INLINE void store(uint16_t* p, Floats x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
WEFT_INLINE void store_first(uint16_t* p, Floats x, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), narrow(x));
}

// Rounded to the nearest integer, ties to even.
WEFT_INLINE void store_rounded(int16_t* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}

WEFT_INLINE Floats absolute(Floats x) { return _mm512_abs_ps(x); }

// Sums and maxima of the lanes, always in the same order.
WEFT_INLINE float sum_of_lanes(Floats x) { return _mm512_reduce_add_ps(x); }
WEFT_INLINE float max_of_lanes(Floats x) { return _mm512_reduce_max_ps(x); }

// Lane `index` of x in every lane.
WEFT_INLINE Floats lane(Floats x, int index) { return _mm512_permutexvar_ps(_mm512_set1_epi32(index), x); }

// Lane r holds the largest lane of x[r], for up to 8 vectors. Each step halves the lanes that are left of a vector
// and joins two vectors in one, which takes a third of the work of one reduction per vector.
template <int kCount>
WEFT_INLINE Floats max_of_each(const Floats (&x)[kCount]) {
  static_assert(kCount <= 8, "eight vectors are joined");
  const auto at = [&](int i) { return x[i < kCount ? i : 0]; };
  const auto join_halves = [](Floats a, Floats b) {
    return max(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  };
  const auto join_quarters = [](Floats a, Floats b) {
    return max(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  const Floats low = join_quarters(join_halves(at(0), at(1)), join_halves(at(2), at(3)));
  const Floats high =
      kCount > 4 ? join_quarters(join_halves(at(4), at(5)), join_halves(at(6), at(7))) : low;
  // Quarter i of `low` belongs to vector i, of `high` to vector i + 4.
  const Floats pairs = max(_mm512_unpacklo_ps(low, high), _mm512_unpackhi_ps(low, high));
  const Floats largest = max(pairs, _mm512_shuffle_ps(pairs, pairs, 0x4E));
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0), largest);
}

// Lane i of x where low < first + i <= high, elsewhere -inf.
WEFT_INLINE Floats keep_between(Floats x, int32_t first, int32_t low, int32_t high) {
  const Words index = _mm512_add_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(first));
  const __mmask16 kept = _mm512_cmpgt_epi32_mask(index, _mm512_set1_epi32(low)) &
                         _mm512_cmple_epi32_mask(index, _mm512_set1_epi32(high));
  return _mm512_mask_blend_ps(kept, _mm512_set1_ps(-__builtin_inff()), x);
}

// Bit i is set when lane i holds.
WEFT_INLINE uint32_t lanes_equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
WEFT_INLINE uint32_t lanes_at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
WEFT_INLINE uint32_t lanes_nan(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
WEFT_INLINE Floats where_less(Floats a, Floats b, Floats then, Floats otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
}

WEFT_INLINE Words load_words(const void* p) { return _mm512_loadu_si512(p); }
WEFT_INLINE Words set_words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
WEFT_INLINE Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
WEFT_INLINE Words exclusive_or(Words a, Words b) { return _mm512_xor_si512(a, b); }
WEFT_INLINE Words lane_numbers() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
WEFT_INLINE Words product_low(Words a, Words b) { return _mm512_mullo_epi32(a, b); }
WEFT_INLINE Words product_high(Words a, Words b) {
  const Words even = _mm512_srli_epi64(_mm512_mul_epu32(a, b), 32);
  const Words odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  return _mm512_mask_blend_epi32(0xAAAA, even, odd);
}
WEFT_INLINE Floats unsigned_to_floats(Words x) { return _mm512_cvtepu32_ps(x); }
// Exponent and mantissa: x = 2^exponent · mantissa, mantissa in [1, 2).
WEFT_INLINE Floats exponent_of(Floats x) { return _mm512_getexp_ps(x); }
WEFT_INLINE Floats mantissa_of(Floats x) { return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src); }

WEFT_INLINE Floats broadcast(const float* p) { return _mm512_set1_ps(*p); }
WEFT_INLINE Words broadcast_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
// Units of the KV pool as words: 32 bits as they are, two codes of 8 bits widened to 16 each.
WEFT_INLINE Words load_units(const uint32_t* p) { return _mm512_loadu_si512(p); }
WEFT_INLINE Words load_units(const uint16_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
WEFT_INLINE Integers no_integers() { return Integers{}; }
WEFT_INLINE Floats to_floats(Integers x) { return _mm512_cvtepi32_ps((Words)x); }
// sum + x0 · w0 + x1 · w1 per lane, for pairs of 16-bit integers: exact.
WEFT_INLINE Integers dot_integers(Integers sum, Words x, Words w) {
#ifdef __AVX512VNNI__
  return (Integers)_mm512_dpwssd_epi32((Words)sum, x, w);
#else
  return sum + (Integers)_mm512_madd_epi16(x, w);
#endif
}

// The two bfloat16 of each 32-bit lane as floats.
WEFT_INLINE Floats low_halves(Words pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
WEFT_INLINE Floats high_halves(Words pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}

// Four vectors a, b, c, d of words become the words a0 b0 c0 d0 a1 b1 …, stored one after another.
WEFT_INLINE void store_interleaved(uint32_t* p, Words a, Words b, Words c, Words d) {
  const Words ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
  const Words cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
  const Words q0 = _mm512_unpacklo_epi64(ab_low, cd_low), q1 = _mm512_unpackhi_epi64(ab_low, cd_low);
  const Words q2 = _mm512_unpacklo_epi64(ab_high, cd_high), q3 = _mm512_unpackhi_epi64(ab_high, cd_high);
  alignas(64) uint32_t group[4][16];
  _mm512_store_si512(group[0], q0);
  _mm512_store_si512(group[1], q1);
  _mm512_store_si512(group[2], q2);
  _mm512_store_si512(group[3], q3);
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int of = 0; of < 4; ++of) {
      __builtin_memcpy(p + quarter * 16 + of * 4, &group[of][quarter * 4], 16);
    }
  }
}

#ifdef __AVX512BF16__
// sum + x0 · w0 + x1 · w1 per lane, for the pair of bfloat16 at x and the pairs of w.
WEFT_INLINE Floats dot_bf16(Floats sum, const void* x, Words w) {
  return _mm512_dpbf16_ps(sum, (__m512bh)broadcast_word(x), (__m512bh)w);
}
#endif

constexpr int kTransposeSize = 16;

// out[column · out_stride + row] = rows[row][column] for 16 rows and up to 16 columns of 32-bit words.
WEFT_INLINE void transpose_words(const uint32_t* const* rows, int64_t columns, uint32_t* out, int64_t out_stride) {
  Words a[16], b[16];
  if (columns >= 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i]);
  } else {
    const __mmask16 mask = first_lanes(columns);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi32(mask, rows[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD);
    a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xDD);
  }
  if (columns >= 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * out_stride, a[i]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i < columns) _mm512_storeu_si512(out + i * out_stride, a[i]);
    }
  }
}

}  // namespace
}  // namespace weft
