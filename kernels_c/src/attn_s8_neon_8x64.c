/* INT8 and float attention for baseline ARMv8.0 (Cortex-A53, A72: Raspberry Pi 3 and 4).
 *
 *   S[i,j] = sum_c q[i,c] k[j,c]        O[i,c] += w[i] sv[c] (sum_j P[i,j] v[j,c])        attn_kernel.h has the whole law
 *
 * Tile: 4 rows x 4 columns in 16 accumulators of four partial sums; a step of 16 along the sum is 4 loads of rows, 4 of
 * columns and, for each of the 16, `smull`, `smlal2` and `sadalp` (16 multiply-accumulates in three instructions), which bound
 * it; three `addp` a vector end it. Two products of codes fit 16 bits: 2 x 127 x 127 = 32258, and 2 x 128 x 127 = 32512 for
 * P - 128 (see the column sums in the file for dot products). Layout 5: K row-major [64][d], V [dv][64], s8. */
#include "attn_neon_f32_body.h"

#if defined(__GNUC__) && !defined(__clang__)
/* Before it has chosen registers, GCC would start all 16 products of a step at once and spill accumulators. */
#pragma GCC optimize("no-schedule-insns")
#endif

enum { TILE_ROWS = 4, P_SIGNED = 1 };
#define Q_WORK 0
#define PV_TILE tile
#define LD_K(d_pad) (d_pad)
#define LD_V(dv_pad) ((void)(dv_pad), (size_t)ETK_PAGE)
#define TILE_VECTORS(rows) 1

INLINE uint32x4_t row_sum(uint32x4_t acc, uint8x16_t p) { return vpadalq_u16(acc, vpaddlq_u8(p)); }

/* Columns are [n][ldb], the sum along the second axis. */
INLINE void tile(const int8_t *restrict a, size_t lda, const int8_t *restrict b, size_t ldb, size_t col, int32_t k, const int rows,
                 int32x4_t c[8][4]) {
  int32x4_t acc[4][4];
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int n = 0; n < 4; n++) acc[r][n] = vdupq_n_s32(0);
  b += col * ldb;
  ROLLED for (int32_t i = 0; i < k; i += 16) {
    int8x16_t q[4];
    UNROLL for (int r = 0; r < rows; r++) q[r] = vld1q_s8(a + (size_t)r * lda + i);
    UNROLL for (int n = 0; n < 4; n++) {
      const int8x16_t x = vld1q_s8(b + (size_t)n * ldb + i);
      int16x8_t two[4]; /* in this order the rows hide each other's latency, also from an in-order core */
      UNROLL for (int r = 0; r < rows; r++) two[r] = vmull_s8(vget_low_s8(x), vget_low_s8(q[r]));
      UNROLL for (int r = 0; r < rows; r++) two[r] = vmlal_high_s8(two[r], x, q[r]);
      UNROLL for (int r = 0; r < rows; r++) acc[r][n] = vpadalq_s16(acc[r][n], two[r]);
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
    c[r][0] = vaddq_s32(c[r][0], vpaddq_s32(vpaddq_s32(acc[r][0], acc[r][1]), vpaddq_s32(acc[r][2], acc[r][3])));
}

INLINE size_t k_at(size_t d_pad, size_t j, size_t c) { return j * d_pad + c; }
INLINE size_t v_at(size_t dv_pad, size_t j, size_t c) { return (void)dv_pad, c * ETK_PAGE + j; }

INLINE void lay_key(const int8_t *codes, int32_t d_pad, int32_t j, int8_t *page) { memcpy(page + j * d_pad, codes, (size_t)d_pad); }

INLINE void lay_octet(const int8_t *rows, size_t stride, int32_t dv_pad, int32_t octet, int8_t *page) {
  for (int32_t c = 0; c < dv_pad; c += 8) {
    int8x8_t x[8];
    turn8(rows + c, stride, x);
    UNROLL for (int i = 0; i < 8; i++) vst1_s8(page + (c + i) * ETK_PAGE + octet * 8, x[i]);
  }
}

#include "attn_neon_int8_body.h"
#include "attn_neon_quant_body.h"

extern const etk_attn_kernel etk_attn_s8_neon_8x64;
const etk_attn_kernel etk_attn_s8_neon_8x64 = ETK_NEON_ATTN("attn_s8_neon_8x64", ETK_ISA_NEON, 5);
