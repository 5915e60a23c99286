/* The helpers of kv_kernel.h in AVX-512 F/BW/DQ/VL: the formulas of kv_scalar_1x1.c, 16 floats or 64 nibbles at a time. Included by
 * each AVX-512 variant and compiled with its flags. Bound by loads and stores; f16 conversions are single instructions. */
#include <immintrin.h>

#include "kv_kernel.h"

#define INLINE static inline __attribute__((always_inline))

enum { GROUP = 8 /* rows that pass over a page together */, AHEAD = 64 /* lines: what the reads keep in flight */ };

/* Where to ask for lines: `at` now, and `then` once `left` of them are through. */
typedef struct ahead {
  const uint8_t *at, *then;
  int32_t left;
} ahead;

INLINE void ask(ahead *p, int lines) {
  if (p->left <= 0) {
    p->at = p->then;
    p->left = INT32_MAX;
  }
#pragma GCC unroll 8
  for (int i = 0; i < lines; i++) _mm_prefetch((const char *)(p->at + 64 * i), _MM_HINT_T0);
  p->at += 64 * lines;
  p->left -= lines;
}

/* Lines to ask for while `here` (n lines) is read and `then` follows: AHEAD lines further along. */
INLINE ahead follow(const uint8_t *here, int32_t n, const uint8_t *then) {
  if (!then) then = here;
  if (n <= AHEAD) return (ahead){then + 64 * (AHEAD - n), then, INT32_MAX};
  return (ahead){here + 64 * AHEAD, then, n - AHEAD};
}

static inline __mmask16 first_lanes(int64_t n) { return (__mmask16)(n >= 16 ? 0xffffu : (1u << n) - 1u); }

static int32_t round_f16(const float *x, int64_t n, uint16_t *h, float *y) {
  const __m512 top = _mm512_set1_ps(65504.0f), bottom = _mm512_set1_ps(-65504.0f);
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; i += 16) {
    __mmask16 lanes = first_lanes(n - i);
    __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
    __mmask16 fine = _mm512_cmp_ps_mask(_mm512_abs_ps(v), top, _CMP_LE_OQ);
    bad |= (uint32_t)(uint16_t)~fine;
    v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_EQ_OQ), v);
    v = _mm512_max_ps(_mm512_min_ps(v, top), bottom);
    __m256i code = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    if (h) _mm256_mask_storeu_epi16(h + i, lanes, code);
    if (y) _mm512_mask_storeu_ps(y + i, lanes, _mm512_cvtph_ps(code));
  }
  return bad != 0;
}

static void widen_f16(const uint16_t *h, int64_t n, float *y) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(y + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(h + i))));
  if (i < n) {
    __mmask16 lanes = first_lanes(n - i);
    _mm512_mask_storeu_ps(y + i, lanes, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, h + i)));
  }
}

static void expand4(const uint8_t *src, int64_t bytes, int32_t bias, uint8_t *dst) {
  const __m512i low = _mm512_set1_epi8(15), add = _mm512_set1_epi8((char)bias);
  for (int64_t i = 0; i < bytes; i += 64, dst += 128) {
    __m512i x = _mm512_loadu_si512(src + i);
    _mm512_storeu_si512(dst, _mm512_add_epi8(_mm512_and_si512(x, low), add));
    _mm512_storeu_si512(dst + 64, _mm512_add_epi8(_mm512_and_si512(_mm512_srli_epi16(x, 4), low), add));
  }
}

static inline float fold_tree(__m512 s) {
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static float fold_q4(const float *q, const uint16_t *s, const uint16_t *z, int32_t d_pad, int32_t u8_layout, int8_t *codes,
                     int32_t *start, float *dot) {
  const __m512 eight = _mm512_set1_ps(8.0f);
  __m512 sums = _mm512_setzero_ps(), top = _mm512_setzero_ps();
  for (int32_t c = 0; c < d_pad; c += 16) {
    __m512 x = _mm512_loadu_ps(q + c), sc = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(s + c)));
    __m512 zc = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(z + c)));
    top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_mul_ps(x, sc)));
    sums = _mm512_add_ps(sums, _mm512_mul_ps(x, _mm512_add_ps(zc, _mm512_mul_ps(eight, sc))));
  }
  *dot = fold_tree(sums);
  float most = _mm512_reduce_max_ps(top);
  int zero = !(most > 1e-30f);
  float scale = zero ? 1.0f : most / 127.0f;
  __m512 inverse = _mm512_set1_ps(zero ? 0.0f : 1.0f / scale);
  __m512i total = _mm512_setzero_si512();
  for (int32_t c = 0; c < d_pad; c += 16) {
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(q + c), _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(s + c))));
    __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
    total = _mm512_add_epi32(total, code);
    _mm_storeu_si128((__m128i *)(void *)(codes + c), _mm512_cvtepi32_epi8(code));
  }
  *start = u8_layout ? -128 * _mm512_reduce_add_epi32(total) : 0;
  return scale;
}
