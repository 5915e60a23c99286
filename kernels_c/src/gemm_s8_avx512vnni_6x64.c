/* Matrix product with 512-bit vpdpbusd: tile 6 rows x 64 columns, 24 accumulators, 4 vectors of weights, one broadcast.
 * The law and the loops stand in gemm_x86_body.h. */
#include <immintrin.h>
#include <stdint.h>

/* In place: from the intrinsic gcc 12 makes copies of accumulators and spills a third of them. */
static inline __attribute__((always_inline)) __m512i dp(__m512i acc, __m512i u, __m512i s) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
  return acc;
}
static inline __attribute__((always_inline)) __m512i dp_at(__m512i acc, __m512i u, const int8_t *four) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(u), "m"(*(const int8_t(*)[4])four));
  return acc;
}

#define MR 6
#define VI __m512i
#define VF __m512
#define LANES 16
#define NV 4
#define LOAD(p) _mm512_loadu_si512(p)
#define SET1(x) _mm512_set1_epi32(x)
#define DP(acc, u, s) dp(acc, u, s)
#define DP_AT(acc, u, four) dp_at(acc, u, four)
#define LOW(x) _mm512_and_si512(x, _mm512_set1_epi8(15))
#define HIGH(x) _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15))
#define CVT(x) _mm512_cvtepi32_ps(x)
#define FMADD(a, b, c) _mm512_fmadd_ps(a, b, c)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define LOADF(p) _mm512_loadu_ps(p)
#define LOADH(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)(p)))
#define SET1F(x) _mm512_set1_ps(x)
#define STOREF(p, x) _mm512_storeu_ps(p, x)
#define STOREI(p, x) _mm512_storeu_si512(p, x)
#define ZEROF() _mm512_setzero_ps()
#include "gemm_x86_body.h"

extern const etk_gemm_kernel etk_gemm_s8_avx512vnni_6x64;
const etk_gemm_kernel etk_gemm_s8_avx512vnni_6x64 = {
    .name = "gemm_s8_avx512vnni_6x64", .isa = ETK_ISA_AVX512VNNI, .layout = 1, .mr = MR, .nr = QUADS_NR, .bias8 = 0,
    .lay = quads_lay, .code_at = quads_code_at, .widen = quads_widen,
    .range = body_range, .quantize = body_quantize, .sum = body_sum, .lay_a = quads_lay_a,
    .tile_f32 = tile_f32, .tile_s32 = tile_s32, .finish = body_finish,
};
