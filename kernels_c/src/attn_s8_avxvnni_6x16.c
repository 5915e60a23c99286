/* Attention for AVX-VNNI: 256-bit vpdpbusd. Formula, layout and passes are in attn_s8_avx2_body.h; here the products.
 *
 * Tile 6 x 16: 12 accumulators, two vectors of K (V), one broadcast. Bound by vpdpbusd: 2 x 768 for d = dv = 64. */
#define NAME "attn_s8_avxvnni_6x16"
#define KERNEL etk_attn_s8_avxvnni_6x16
#define ISA ETK_ISA_AVXVNNI
#define LAYOUT 1
#define U8_K 1
#define P_MAX 255
#define QK_NV 2
#define P_ROUND 256
#include <immintrin.h>
#include <stdint.h>

/* Low bytes, then high bytes, of the 16-bit factors of LUT[16 h + l] = (high[h] low[l] / 2^16 + 64) / 128. */
static const uint8_t k_high[32] __attribute__((aligned(16))) = {
    128, 206, 190, 219, 38, 153, 215, 248, 93, 156, 110, 162, 26, 189, 128, 86,
    127, 85, 57, 38, 26, 17, 11, 7, 5, 3, 2, 1, 1, 0, 0, 0,
};
static const uint8_t k_low[32] __attribute__((aligned(16))) = {
    255, 189, 161, 172, 221, 49, 169, 68, 1, 222, 220, 249, 52, 142, 4, 151,
    255, 249, 243, 237, 231, 226, 220, 215, 210, 204, 199, 194, 190, 185, 181, 176,
};

typedef __m256i qk_vec;
#define QK_VEC(x) (x)
/* By name: given arrays of intrinsics, gcc 12 copies accumulators between registers. */
#define PV_DOT(acc, u8, s8) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u8), "x"(s8))
#define QK_DOT(acc, kv, q) PV_DOT(acc, kv, q)

#include "attn_s8_avx2_body.h"
