/* KV cache helpers for AVX2 with F16C: the formulas of kv_scalar_1x1.c, 8 floats or 32 bytes of nibbles at a time.
 *
 * Ends of rows that do not fill a vector go through a small buffer. Bound by loads and stores. */
#include <immintrin.h>
#include <string.h>

#include "kv_kernel.h"

static inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

static int32_t round_f16(const float *x, int64_t n, uint16_t *h, float *y) {
  const __m256 top = _mm256_set1_ps(65504.0f), bottom = _mm256_set1_ps(-65504.0f);
  int bad = 0;
  for (int64_t i = 0; i < n; i += 8) {
    float part[8] = {0};
    uint16_t half[8];
    int64_t m = n - i < 8 ? n - i : 8;
    __m256 v;
    if (m == 8) {
      v = _mm256_loadu_ps(x + i);
    } else {
      memcpy(part, x + i, (size_t)m * 4);
      v = _mm256_loadu_ps(part);
    }
    bad |= _mm256_movemask_ps(_mm256_cmp_ps(magnitude(v), top, _CMP_LE_OQ)) != 255;
    v = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_EQ_OQ));
    v = _mm256_max_ps(_mm256_min_ps(v, top), bottom);
    __m128i code = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)(void *)half, code);
    _mm256_storeu_ps(part, _mm256_cvtph_ps(code));
    if (h) memcpy(h + i, half, (size_t)m * 2);
    if (y) memcpy(y + i, part, (size_t)m * 4);
  }
  return bad;
}

static void widen_f16(const uint16_t *h, int64_t n, float *y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(h + i))));
  if (i < n) {
    uint16_t half[8] = {0};
    float part[8];
    memcpy(half, h + i, (size_t)(n - i) * 2);
    _mm256_storeu_ps(part, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)half)));
    memcpy(y + i, part, (size_t)(n - i) * 4);
  }
}

static void expand4(const uint8_t *src, int64_t bytes, int32_t bias, uint8_t *dst) {
  const __m256i low = _mm256_set1_epi8(15), add = _mm256_set1_epi8((char)bias);
  for (int64_t i = 0; i < bytes; i += 64, dst += 128)
    for (int j = 0; j < 64; j += 32) {
      __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)(src + i + j));
      __m256i lo = _mm256_add_epi8(_mm256_and_si256(x, low), add);
      __m256i hi = _mm256_add_epi8(_mm256_and_si256(_mm256_srli_epi16(x, 4), low), add);
      _mm256_storeu_si256((__m256i *)(void *)(dst + j), lo);
      _mm256_storeu_si256((__m256i *)(void *)(dst + 64 + j), hi);
    }
}

static inline __m256 load_f16(const uint16_t *h) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)h)); }

static inline float max_of(__m256 x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

static float fold_q4(const float *q, const uint16_t *s, const uint16_t *z, int32_t d_pad, int32_t u8_layout, int8_t *codes,
                     int32_t *start, float *dot) {
  const __m256 eight = _mm256_set1_ps(8.0f);
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, top = _mm256_setzero_ps();
  for (int32_t c = 0; c < d_pad; c += 8) {
    __m256 x = _mm256_loadu_ps(q + c), sc = load_f16(s + c), *sum = &sums[(c >> 3) & 1];
    top = _mm256_max_ps(top, magnitude(_mm256_mul_ps(x, sc)));
    *sum = _mm256_add_ps(*sum, _mm256_mul_ps(x, _mm256_add_ps(load_f16(z + c), _mm256_mul_ps(eight, sc))));
  }
  __m256 both = _mm256_add_ps(sums[0], sums[1]);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  *dot = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  float most = max_of(top);
  int zero = !(most > 1e-30f);
  float scale = zero ? 1.0f : most / 127.0f;
  __m256 inverse = _mm256_set1_ps(zero ? 0.0f : 1.0f / scale);
  int32_t total = 0, lanes[8];
  for (int32_t c = 0; c < d_pad; c += 8) {
    __m256 x = _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(q + c), load_f16(s + c)), inverse);
    _mm256_storeu_si256((__m256i *)(void *)lanes, _mm256_cvtps_epi32(x));
    for (int i = 0; i < 8; i++) {
      codes[c + i] = (int8_t)lanes[i];
      total += lanes[i];
    }
  }
  *start = u8_layout ? -128 * total : 0;
  return scale;
}

const etk_kv_kernel etk_kv_avx2_1x32 = {
    .name = "kv_avx2_1x32",
    .isa = ETK_ISA_AVX2,
    .round_f16 = round_f16,
    .widen_f16 = widen_f16,
    .expand4 = expand4,
    .fold_q4 = fold_q4,
};
