/* Matrix product for AVX2 without vpdpbusd: 4 rows x 8 columns at a time, eight passes over the panel.
 *
 *   S[r, n] = start[r] + sum_k u[n, k] a[r, k]
 *
 * vpmaddubsw adds two products in s16 with saturation: 2 x 255 x 128 does not fit. So 8-bit codes are widened to s16 and multiplied
 * by vpmaddwd, exactly; codes of 4 bits (2 x 15 x 128 = 3840) do go through vpmaddubsw, up to eight steps in s16 before they are widened.
 * Bound by vpmaddwd and the addition after it, which vpdpbusd would save. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define MR 4
#define VI __m256i
#define VF __m256
#define LANES 8
#define NV 1
#define OWN_DOTS
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define SET1(x) _mm256_set1_epi32(x)
#define CVT(x) _mm256_cvtepi32_ps(x)
#define FMADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define LOADF(p) _mm256_loadu_ps(p)
#define LOADH(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p)))
#define SET1F(x) _mm256_set1_ps(x)
#define STOREF(p, x) _mm256_storeu_ps(p, x)
#define STOREI(p, x) _mm256_storeu_si256((__m256i *)(void *)(p), x)
#define ZEROF() _mm256_setzero_ps()


enum { STEPS = 8 /* of 4 k in s16: 8 x 3840 < 32768 */, STRIDE = 256 /* bytes of a panel for 4 k */ };
#define ALWAYS_DOT static inline __attribute__((always_inline))
#define EACH_ROW _Pragma("GCC unroll 4") for (int32_t r = 0; r < rows; r++)

ALWAYS_DOT __m256i four_at(const int8_t *a) {
  int32_t four;
  memcpy(&four, a, 4);
  return _mm256_set1_epi32(four);
}

ALWAYS_DOT __m256i widened_sum(__m256i s16) { return _mm256_madd_epi16(s16, _mm256_set1_epi16(1)); }

/* Codes 0..15, one to a byte. */
ALWAYS_DOT void dot_narrow(VI (*acc)[NV], const uint8_t *w, const int8_t *a, int32_t len, const int32_t rows) {
  for (int32_t left = len / 4; left > 0; left -= STEPS) {
    __m256i s16[MR];
    EACH_ROW s16[r] = _mm256_setzero_si256();
    for (int32_t q = 0; q < (left < STEPS ? left : STEPS); q++, w += STRIDE, a += 4 * rows) {
      const __m256i u = LOAD(w);
      EACH_ROW s16[r] = _mm256_add_epi16(s16[r], _mm256_maddubs_epi16(u, four_at(a + r * 4)));
    }
    EACH_ROW acc[r][0] = _mm256_add_epi32(acc[r][0], widened_sum(s16[r]));
  }
}

/* Nibbles: two steps for each load. */
ALWAYS_DOT void dot4(VI (*acc)[NV], const uint8_t *w, const int8_t *a, int32_t len, const int32_t rows) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int32_t left = len / 8; left > 0; left -= STEPS / 2) {
    __m256i s16[MR];
    EACH_ROW s16[r] = _mm256_setzero_si256();
    for (int32_t q = 0; q < (left < STEPS / 2 ? left : STEPS / 2); q++, w += STRIDE, a += 8 * rows) {
      const __m256i two = LOAD(w), low = _mm256_and_si256(two, mask), high = _mm256_and_si256(_mm256_srli_epi16(two, 4), mask);
      EACH_ROW s16[r] = _mm256_add_epi16(s16[r], _mm256_maddubs_epi16(low, four_at(a + r * 4)));
      EACH_ROW s16[r] = _mm256_add_epi16(s16[r], _mm256_maddubs_epi16(high, four_at(a + (rows + r) * 4)));
    }
    EACH_ROW acc[r][0] = _mm256_add_epi32(acc[r][0], widened_sum(s16[r]));
  }
}

ALWAYS_DOT void dot8(VI (*acc)[NV], const uint8_t *w, const int8_t *a, int32_t len, const int32_t rows, int32_t narrow) {
  if (narrow) {
    dot_narrow(acc, w, a, len, rows);
    return;
  }
  __m256i first[MR], second[MR]; /* columns 0..3 and 4..7, two sums each */
  EACH_ROW first[r] = second[r] = _mm256_setzero_si256();
  for (int32_t q = 0; q < len / 4; q++, w += STRIDE, a += 4 * rows) {
    const __m256i u0 = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)w));
    const __m256i u1 = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)(w + 16)));
    EACH_ROW {
      int32_t four;
      memcpy(&four, a + r * 4, 4);
      const __m256i x = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
      first[r] = _mm256_add_epi32(first[r], _mm256_madd_epi16(u0, x));
      second[r] = _mm256_add_epi32(second[r], _mm256_madd_epi16(u1, x));
    }
  }
  EACH_ROW acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_permute4x64_epi64(_mm256_hadd_epi32(first[r], second[r]), 0xd8));
}

#include "gemm_x86_body.h"

extern const etk_gemm_kernel etk_gemm_s8_avx2_4x8;
const etk_gemm_kernel etk_gemm_s8_avx2_4x8 = {
    .name = "gemm_s8_avx2_4x8", .isa = ETK_ISA_AVX2, .layout = 1, .mr = MR, .nr = QUADS_NR, .bias8 = 0,
    .lay = quads_lay, .code_at = quads_code_at, .widen = quads_widen,
    .range = body_range, .quantize = body_quantize, .sum = body_sum, .lay_a = quads_lay_a,
    .tile_f32 = tile_f32, .tile_s32 = tile_s32, .finish = body_finish,
};
