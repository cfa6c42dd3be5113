// Eight floats in AVX2 and FMA: the vocabulary in which kernels.inl is written. See vector_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace weft {
namespace {

#define WEFT_INLINE static inline __attribute__((always_inline))

using Floats = __m256;
using Words = __m256i;
using Integers = int32_t __attribute__((vector_size(32)));
constexpr int kLanes = 8;
constexpr int kMaxLinearRows = 3;
constexpr int kScoreRows = 3;
constexpr int kOutputRows = 3;
constexpr int kOutputVectors = 4;

WEFT_INLINE Words lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
WEFT_INLINE Words first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane_numbers());
}

WEFT_INLINE Floats zero() { return _mm256_setzero_ps(); }
WEFT_INLINE Floats set(float x) { return _mm256_set1_ps(x); }
WEFT_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
WEFT_INLINE Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
WEFT_INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
WEFT_INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
WEFT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
WEFT_INLINE Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
WEFT_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
WEFT_INLINE Floats round_to_integer(Floats x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
WEFT_INLINE Floats power_of_two(Words exponent) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
}
// In two steps, so that results below 2⁻¹²⁶ and above 2¹²⁷ come out as they should.
WEFT_INLINE Floats scale_by_power(Floats x, Floats n) {
  const Floats bounded = _mm256_max_ps(_mm256_set1_ps(-250.0f), _mm256_min_ps(_mm256_set1_ps(250.0f), n));
  const Words whole = _mm256_cvtps_epi32(bounded);
  const Words half = _mm256_srai_epi32(whole, 1);
  return multiply(multiply(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}

WEFT_INLINE Floats fraction(Floats x) {
  const Floats bounded = _mm256_max_ps(_mm256_set1_ps(-150.0f), _mm256_min_ps(_mm256_set1_ps(127.0f), x));
  return _mm256_sub_ps(bounded, _mm256_floor_ps(bounded));
}
// Results below 2⁻¹²⁶ are zero.
WEFT_INLINE Floats scale_by_floor(Floats y, Floats x) {
  const Floats bounded = _mm256_max_ps(_mm256_set1_ps(-126.0f), _mm256_min_ps(_mm256_set1_ps(127.0f), x));
  const Floats scaled = multiply(y, power_of_two(_mm256_cvtps_epi32(_mm256_floor_ps(bounded))));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_LT_OQ), scaled);
}

WEFT_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
WEFT_INLINE Floats load_first(const float* p, int64_t count) { return _mm256_maskload_ps(p, first_lanes(count)); }
WEFT_INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
WEFT_INLINE void store_first(float* p, Floats x, int64_t count) { _mm256_maskstore_ps(p, first_lanes(count), x); }

WEFT_INLINE Floats widen(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

WEFT_INLINE __m128i narrow(Floats x) {
  const Words bits = _mm256_castps_si256(x);
  const Words odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const Words rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const Words is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const Words quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const Words high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const Words packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x88);
  return _mm256_castsi256_si128(packed);
}

WEFT_INLINE Floats load(const uint16_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
WEFT_INLINE Floats load_first(const uint16_t* p, int64_t count) {
  uint16_t lanes[8] = {};
  for (int64_t i = 0; i < count && i < 8; ++i) lanes[i] = p[i];
  return load(lanes);
}
WEFT_INLINE void store(uint16_t* p, Floats x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
WEFT_INLINE void store_first(uint16_t* p, Floats x, int64_t count) {
  uint16_t lanes[8];
  store(lanes, x);
  for (int64_t i = 0; i < count && i < 8; ++i) p[i] = lanes[i];
}

WEFT_INLINE void store_rounded(int16_t* p, Floats x) {
  const Words whole = _mm256_cvtps_epi32(x);
  const __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
}

WEFT_INLINE Floats absolute(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

WEFT_INLINE float sum_of_lanes(Floats x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
WEFT_INLINE float max_of_lanes(Floats x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

WEFT_INLINE Floats lane(Floats x, int index) { return _mm256_permutevar8x32_ps(x, _mm256_set1_epi32(index)); }

template <int kCount>
WEFT_INLINE Floats max_of_each(const Floats (&x)[kCount]) {
  static_assert(kCount <= 8, "one lane per vector");
  alignas(32) float largest[8] = {};
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) largest[i] = max_of_lanes(x[i]);
  return _mm256_load_ps(largest);
}

WEFT_INLINE Floats keep_between(Floats x, int32_t first, int32_t low, int32_t high) {
  const Words index = _mm256_add_epi32(lane_numbers(), _mm256_set1_epi32(first));
  const Words below = _mm256_cmpgt_epi32(index, _mm256_set1_epi32(low));
  const Words above = _mm256_cmpgt_epi32(index, _mm256_set1_epi32(high));
  const Words kept = _mm256_andnot_si256(above, below);
  return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), x, _mm256_castsi256_ps(kept));
}

WEFT_INLINE uint32_t lanes_equal(Floats a, Floats b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
}
WEFT_INLINE uint32_t lanes_at_least(Floats a, Floats b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
WEFT_INLINE uint32_t lanes_nan(Floats x) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
WEFT_INLINE Floats where_less(Floats a, Floats b, Floats then, Floats otherwise) {
  return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

WEFT_INLINE Words load_words(const void* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
WEFT_INLINE Words set_words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
WEFT_INLINE Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
WEFT_INLINE Words exclusive_or(Words a, Words b) { return _mm256_xor_si256(a, b); }
WEFT_INLINE Words product_low(Words a, Words b) { return _mm256_mullo_epi32(a, b); }
WEFT_INLINE Words product_high(Words a, Words b) {
  const Words even = _mm256_srli_epi64(_mm256_mul_epu32(a, b), 32);
  const Words odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  return _mm256_blend_epi32(even, odd, 0xAA);
}
WEFT_INLINE Floats unsigned_to_floats(Words x) {
  // Rounds once: the upper part is exact, the lower part below 2¹⁶ is exact, their sum is rounded to nearest.
  const Floats high = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16));
  const Floats low = _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xFFFF)));
  return fma(high, set(65536.0f), low);
}
WEFT_INLINE Floats exponent_of(Floats x) {
  const Words bits = _mm256_srli_epi32(_mm256_castps_si256(x), 23);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(bits, _mm256_set1_epi32(127)));
}
WEFT_INLINE Floats mantissa_of(Floats x) {
  const Words fraction = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFF));
  return _mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3F800000)));
}

WEFT_INLINE Floats broadcast(const float* p) { return _mm256_broadcast_ss(p); }
WEFT_INLINE Words broadcast_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
WEFT_INLINE Words load_units(const uint32_t* p) { return load_words(p); }
WEFT_INLINE Words load_units(const uint16_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
WEFT_INLINE Integers no_integers() { return Integers{}; }
WEFT_INLINE Floats to_floats(Integers x) { return _mm256_cvtepi32_ps((Words)x); }
WEFT_INLINE Integers dot_integers(Integers sum, Words x, Words w) { return sum + (Integers)_mm256_madd_epi16(x, w); }
WEFT_INLINE Floats low_halves(Words pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
WEFT_INLINE Floats high_halves(Words pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}

WEFT_INLINE void store_interleaved(uint32_t* p, Words a, Words b, Words c, Words d) {
  const Words ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const Words cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  const Words q0 = _mm256_unpacklo_epi64(ab_low, cd_low), q1 = _mm256_unpackhi_epi64(ab_low, cd_low);
  const Words q2 = _mm256_unpacklo_epi64(ab_high, cd_high), q3 = _mm256_unpackhi_epi64(ab_high, cd_high);
  __m256i* const out = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(out + 0, _mm256_permute2x128_si256(q0, q1, 0x20));
  _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(q2, q3, 0x20));
  _mm256_storeu_si256(out + 2, _mm256_permute2x128_si256(q0, q1, 0x31));
  _mm256_storeu_si256(out + 3, _mm256_permute2x128_si256(q2, q3, 0x31));
}

constexpr int kTransposeSize = 8;

WEFT_INLINE void transpose_words(const uint32_t* const* rows, int64_t columns, uint32_t* out, int64_t out_stride) {
  Words a[8], b[8];
  const Words mask = first_lanes(columns);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_maskload_epi32(reinterpret_cast<const int*>(rows[i]), mask);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    a[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    b[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    if (i < columns) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * out_stride), b[i]);
  }
}

}  // namespace
}  // namespace weft
