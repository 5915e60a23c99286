/* Attention for AVX2 without VNNI. Formula, layout and passes are in attn_s8_avx2_body.h; here the products.
 *
 * vpmaddubsw saturates at 32767, so neither factor may pass 127: QK takes |k| and q with the sign of k (2 * 127 * 127 =
 * 32258), PV takes P up to 127. A quad of products is vpsignb (QK only), vpmaddubsw, vpmaddwd by ones, vpaddd.
 * Tiles 6 x 8 (QK) and 6 x 16 (PV); bound by the four vector ports: 4 instructions for 32 multiply-adds in QK, 3 in PV. */
#define NAME "attn_s8_avx2_6x8"
#define KERNEL etk_attn_s8_avx2_6x8
#define ISA ETK_ISA_AVX2
#define LAYOUT 2
#define U8_K 0
#define P_MAX 127
#define QK_NV 1
#define P_ROUND 128
#include <immintrin.h>
#include <stdint.h>

/* Low bytes, then high bytes, of the 16-bit factors of LUT[16 h + l] = (high[h] low[l] / 2^16 + 128) / 256. */
static const uint8_t k_high[32] __attribute__((aligned(16))) = {
    0, 120, 132, 180, 12, 135, 204, 240, 87, 152, 107, 161, 24, 189, 127, 85,
    127, 85, 57, 38, 26, 17, 11, 7, 5, 3, 2, 1, 1, 0, 0, 0,
};
static const uint8_t k_low[32] __attribute__((aligned(16))) = {
    255, 189, 161, 172, 221, 49, 169, 68, 1, 222, 220, 249, 52, 142, 4, 151,
    255, 249, 243, 237, 231, 226, 220, 215, 210, 204, 199, 194, 190, 185, 181, 176,
};

typedef struct qk_vec {
  __m256i k, size;
} qk_vec;
#define QK_VEC(x) load_k(x)
static inline __attribute__((always_inline)) qk_vec load_k(__m256i k) { return (qk_vec){k, _mm256_abs_epi8(k)}; }
#define PV_DOT(acc, p, v) \
  (acc) = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(p, v), _mm256_set1_epi16(1)))
#define QK_DOT(acc, kv, q) PV_DOT(acc, (kv).size, _mm256_sign_epi8(q, (kv).k))

#include "attn_s8_avx2_body.h"
