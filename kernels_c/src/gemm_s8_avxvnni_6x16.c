/* Matrix product with 256-bit vpdpbusd (AVX-VNNI): tile 6 rows x 16 columns at a time, 12 accumulators, 2 vectors of weights, one
 * broadcast, four passes over the panel. The law and the loops stand in gemm_x86_body.h. */
#include <immintrin.h>

/* In place: from the intrinsic gcc 12 makes copies of accumulators and spills some of them. */
static inline __attribute__((always_inline)) __m256i dp(__m256i acc, __m256i u, __m256i s) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(s));
  return acc;
}

#define MR 6
#define VI __m256i
#define VF __m256
#define LANES 8
#define NV 2
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define SET1(x) _mm256_set1_epi32(x)
#define DP(acc, u, s) dp(acc, u, s)
#define DP_AT(acc, u, four) dp(acc, u, broadcast4(four))
#define LOW(x) _mm256_and_si256(x, _mm256_set1_epi8(15))
#define HIGH(x) _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15))
#define CVT(x) _mm256_cvtepi32_ps(x)
#define FMADD(a, b, c) _mm256_fmadd_ps(a, b, c)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define LOADF(p) _mm256_loadu_ps(p)
#define LOADH(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p)))
#define SET1F(x) _mm256_set1_ps(x)
#define STOREF(p, x) _mm256_storeu_ps(p, x)
#define STOREI(p, x) _mm256_storeu_si256((__m256i *)(void *)(p), x)
#define ZEROF() _mm256_setzero_ps()
#include "gemm_x86_body.h"

extern const etk_gemm_kernel etk_gemm_s8_avxvnni_6x16;
const etk_gemm_kernel etk_gemm_s8_avxvnni_6x16 = {
    .name = "gemm_s8_avxvnni_6x16", .isa = ETK_ISA_AVXVNNI, .layout = 1, .mr = MR, .nr = QUADS_NR, .bias8 = 0,
    .lay = quads_lay, .code_at = quads_code_at, .widen = quads_widen,
    .range = body_range, .quantize = body_quantize, .sum = body_sum, .lay_a = quads_lay_a,
    .tile_f32 = tile_f32, .tile_s32 = tile_s32, .finish = body_finish,
};
