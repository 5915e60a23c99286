/* INT8 and float attention for ARMv8.2 with 8-bit matrix instructions (Neoverse V1 and N2, Cortex-X2 and A510 on, Apple M2 on).
 *
 *   S[i,j] = sum_c q[i,c] k[j,c]        O[i,c] += w[i] sv[c] (sum_j P[i,j] v[j,c])        attn_kernel.h has the whole law
 *
 * Tile: 8 rows x 8 columns as 4 x 4 accumulators of 2 x 2; a step of 8 along the sum is 4 loads of row pairs, 4 of column
 * pairs and 16 `smmla` (Q K) or `usmmla` (P V, P unsigned as it is), 32 multiply-accumulates each, which bound it. Rows are
 * first paired, [row pair][k/8][2][8]; an odd last row meets a row of zeros. Layout 4: K [d/8][32][2][8],
 * V [8][dv/2][2][8], s8. */
#include "attn_neon_base.h"

enum { TILE_ROWS = 8, P_SIGNED = 0 };
#define Q_WORK 1
#define LD_K(d_pad) ((void)(d_pad), (size_t)ETK_PAGE)
#define LD_V(dv_pad) (dv_pad)
#define TILE_VECTORS(rows) ((rows) == 8 ? 2 : 4)

INLINE uint32x4_t row_sum(uint32x4_t acc, uint8x16_t p) { return vdotq_u32(acc, p, vdupq_n_u8(1)); }

/* Rows a [rows][k] to out [pairs][k/8][2][8]. */
INLINE void prepare_rows(const int8_t *restrict a, int32_t rows, int32_t k, int8_t *restrict out) {
  for (int32_t r = 0; r < rows; r += 2, a += 2 * k)
    for (int32_t c = 0; c < k; c += 16, out += 32) {
      const int64x2_t x = vreinterpretq_s64_s8(vld1q_s8(a + c));
      const int64x2_t y = r + 1 < rows ? vreinterpretq_s64_s8(vld1q_s8(a + k + c)) : vdupq_n_s64(0);
      vst1q_s8(out, vreinterpretq_s8_s64(vzip1q_s64(x, y)));
      vst1q_s8(out + 16, vreinterpretq_s8_s64(vzip2q_s64(x, y)));
    }
}

/* Columns are [k/8][ldb][8]. `mixed`: rows are u8. c comes in as zeros. */
INLINE void tile_pairs(const int8_t *restrict a, size_t lda, const int8_t *restrict b, size_t ldb, size_t col, int32_t k,
                       const int rows, const int mixed, int32x4_t c[8][4]) {
  const int pairs = (rows + 1) / 2, vectors = TILE_VECTORS(rows);
  int32x4_t acc[4][8];
  UNROLL for (int r = 0; r < pairs; r++)
    UNROLL for (int v = 0; v < 2 * vectors; v++) acc[r][v] = vdupq_n_s32(0);
  b += 8 * col;
  ROLLED for (int32_t i = 0; i < k; i += 8, a += 16, b += 8 * ldb) {
    int8x16_t q[4];
    UNROLL for (int r = 0; r < pairs; r++) q[r] = vld1q_s8(a + 2 * (size_t)r * lda);
    UNROLL for (int v = 0; v < 2 * vectors; v++) {
      const int8x16_t x = vld1q_s8(b + 16 * v);
      UNROLL for (int r = 0; r < pairs; r++)
        acc[r][v] = mixed ? vusmmlaq_s32(acc[r][v], vreinterpretq_u8_s8(q[r]), x) : vmmlaq_s32(acc[r][v], q[r], x);
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vectors; v++) {
      const int64x2_t x = vreinterpretq_s64_s32(acc[r / 2][2 * v]), y = vreinterpretq_s64_s32(acc[r / 2][2 * v + 1]);
      c[r][v] = vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(x, y) : vzip1q_s64(x, y));
    }
}

INLINE void tile(const int8_t *restrict a, size_t lda, const int8_t *restrict b, size_t ldb, size_t col, int32_t k, const int rows,
                 int32x4_t c[8][4]) {
  tile_pairs(a, lda, b, ldb, col, k, rows, 0, c);
}
#define PV_TILE(a, lda, b, ldb, col, k, rows, c) tile_pairs(a, lda, b, ldb, col, k, rows, 1, c)

INLINE size_t k_at(size_t d_pad, size_t j, size_t c) { return (void)d_pad, c / 8 * ETK_PAGE * 8 + j * 8 + c % 8; }
INLINE size_t v_at(size_t dv_pad, size_t j, size_t c) { return (j / 8 * dv_pad + c) * 8 + j % 8; }

INLINE void lay_key(const int8_t *codes, int32_t d_pad, int32_t j, int8_t *page) {
  for (int32_t c = 0; c < d_pad; c += 8) memcpy(page + c * ETK_PAGE + j * 8, codes + c, 8);
}

INLINE void lay_octet(const int8_t *rows, size_t stride, int32_t dv_pad, int32_t octet, int8_t *page) {
  for (int32_t c = 0; c < dv_pad; c += 8) {
    int8x8_t x[8];
    turn8(rows + c, stride, x);
    UNROLL for (int i = 0; i < 8; i++) vst1_s8(page + (octet * dv_pad + c + i) * 8, x[i]);
  }
}

#include "attn_neon_f32_body.h"
#include "attn_neon_int8_body.h"
#include "attn_neon_quant_body.h"

extern const etk_attn_kernel etk_attn_s8_neoni8mm_8x64;
const etk_attn_kernel etk_attn_s8_neoni8mm_8x64 = ETK_NEON_ATTN("attn_s8_neoni8mm_8x64", ETK_ISA_NEONI8MM, 4);
