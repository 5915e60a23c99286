/* INT8 and float attention for ARMv8.2 with dot products (Cortex-A76 and A78AE, Neoverse N1: Raspberry Pi 5, Jetson Orin).
 *
 *   S[i,j] = sum_c q[i,c] k[j,c]        O[i,c] += w[i] sv[c] (sum_j P[i,j] v[j,c])        attn_kernel.h has the whole law
 *
 * Tile: 8 rows x 8 columns in 16 accumulators; a quad of a row is broadcast by lane, so that a step of 16 along the sum is 8
 * loads of rows, 8 of columns and 64 `sdot` (16 multiply-accumulates each). `sdot` bounds it: two a cycle where there are two
 * vector pipes. P is unsigned and sdot is not: sum P v = sum (P - 128) v + 128 sum v, so that the accumulators of P V start
 * at 128 times the page's column sums. Layout 3: K [d/4][64][4], V [16][dv][4], s8. */
#include "attn_neon_base.h"

enum { TILE_ROWS = 8, P_SIGNED = 1 };
#define Q_WORK 0
#define PV_TILE tile
#define LD_K(d_pad) ((void)(d_pad), (size_t)ETK_PAGE)
#define LD_V(dv_pad) (dv_pad)
/* With few rows more columns keep enough accumulators in flight. */
#define TILE_VECTORS(rows) ((rows) == 8 ? 2 : 4)

INLINE uint32x4_t row_sum(uint32x4_t acc, uint8x16_t p) { return vdotq_u32(acc, p, vdupq_n_u8(1)); }

/* Columns are [k/4][ldb][4]. */
INLINE void tile(const int8_t *restrict a, size_t lda, const int8_t *restrict b, size_t ldb, size_t col, int32_t k, const int rows,
                 int32x4_t c[8][4]) {
  const int8_t *at = b + 4 * col;
  const int vectors = TILE_VECTORS(rows);
  ROLLED for (int32_t i = 0; i < k; i += 16, a += 16) {
    int8x16_t q[8];
    UNROLL for (int r = 0; r < rows; r++) q[r] = vld1q_s8(a + (size_t)r * lda);
#define QUAD(lane)                                                                              \
  UNROLL for (int v = 0; v < vectors; v++) {                                                    \
    const int8x16_t x = vld1q_s8(at + 16 * v);                                                  \
    UNROLL for (int r = 0; r < rows; r++) c[r][v] = vdotq_laneq_s32(c[r][v], x, q[r], lane);    \
  }                                                                                             \
  at += 4 * ldb;
    QUAD(0) QUAD(1) QUAD(2) QUAD(3)
#undef QUAD
  }
}

INLINE size_t k_at(size_t d_pad, size_t j, size_t c) { return (void)d_pad, c / 4 * ETK_PAGE * 4 + j * 4 + c % 4; }
INLINE size_t v_at(size_t dv_pad, size_t j, size_t c) { return (j / 4 * dv_pad + c) * 4 + j % 4; }

INLINE void lay_key(const int8_t *codes, int32_t d_pad, int32_t j, int8_t *page) {
  for (int32_t c = 0; c < d_pad; c += 4) memcpy(page + c * ETK_PAGE + j * 4, codes + c, 4);
}

INLINE void lay_octet(const int8_t *rows, size_t stride, int32_t dv_pad, int32_t octet, int8_t *page) {
  for (int32_t half = 0; half < 2; half++, rows += 4 * stride)
    for (int32_t c = 0; c < dv_pad; c += 16) {
      int8x16x4_t x;
      UNROLL for (int i = 0; i < 4; i++) x.val[i] = vld1q_s8(rows + (size_t)i * stride + c);
      vst4q_s8(page + ((2 * octet + half) * dv_pad + c) * 4, x);
    }
}

#include "attn_neon_f32_body.h"
#include "attn_neon_int8_body.h"
#include "attn_neon_quant_body.h"

extern const etk_attn_kernel etk_attn_s8_neondot_8x64;
const etk_attn_kernel etk_attn_s8_neondot_8x64 = ETK_NEON_ATTN("attn_s8_neondot_8x64", ETK_ISA_NEONDOT, 3);
