/* INT8 and INT4 matrix products for ARMv8.2 with 8-bit matrix instructions.
 *
 *   S = start + sum_k w[k] a[k];  c = fma(ws as, (f32)S, c);  offsets: c = fma(wb as, rsum, c)
 *
 * Tile: 8 rows x 8 columns twice, as 4 x 4 accumulators of 2 x 2; 8 codes are 4 loads of row pairs, 4 of column pairs and 16
 * `smmla` (32 multiply-accumulates each), which bound it. Up to 4 rows: all 16 columns at once; an odd row meets a row of zeros.
 * Layout 4, see gemm_neon_octets.h. */
#include "gemm_body.h"
#include "neon_macros.h"

enum { TILE_ROWS = 8, PANEL = 16 };
#define COLUMNS(rows) ((rows) == 8 ? 2 : 4)

#include "gemm_neon_octets.h"

INLINE void sums(const etk_gemm_tile *t, const int8_t *restrict a, const uint8_t *restrict w, int32_t row, const int rows, int32_t col,
                 int32_t len, const int bits, int32x4_t s[8][4]) {
  const int vectors = COLUMNS(rows), pairs = (rows + 1) / 2;
  int32x4_t acc[4][8];
  UNROLL for (int p = 0; p < pairs; p++)
    UNROLL for (int j = 0; j < 2 * vectors; j++) acc[p][j] = vdupq_n_s32(0);
  a += 8 * row;
  w += col * bits;
  ROLLED for (int32_t k = 0; k < len; k += 8, a += 8 * (size_t)t->rows, w += 16 * bits) {
    int8x16_t q[4];
    UNROLL for (int p = 0; p < pairs; p++) q[p] = rows > 1 ? vld1q_s8(a + 16 * p) : vcombine_s8(vld1_s8(a), vdup_n_s8(0));
    UNROLL for (int j = 0; j < 2 * vectors; j++) {
      const int8x16_t x = load_pair(w, j, bits);
      UNROLL for (int p = 0; p < pairs; p++) acc[p][j] = vmmlaq_s32(acc[p][j], q[p], x);
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vectors; v++) {
      const int64x2_t x = vreinterpretq_s64_s32(acc[r / 2][2 * v]), y = vreinterpretq_s64_s32(acc[r / 2][2 * v + 1]);
      s[r][v] = vaddq_s32(s[r][v], vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(x, y) : vzip1q_s64(x, y)));
    }
}

#include "gemm_neon_body.h"

extern const etk_gemm_kernel etk_gemm_s8_neoni8mm_8x16;
const etk_gemm_kernel etk_gemm_s8_neoni8mm_8x16 = ETK_NEON_GEMM("gemm_s8_neoni8mm_8x16", ETK_ISA_NEONI8MM, 4);
