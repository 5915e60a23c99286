/* INT8 and INT4 matrix products for baseline ARMv8.0.
 *
 *   S = start + sum_k w[k] a[k];  c = fma(ws as, (f32)S, c);  offsets: c = fma(wb as, rsum, c)
 *
 * Tile: 4 rows x 4 columns in 16 accumulators of four partial sums (2 x 8, 1 x 16 for fewer rows). 8-bit codes: `smull` and
 * `sadalp` for each 8 products, as two products of -128 do not fit 16 bits; 4-bit codes: `smull`, `smlal`, `sadalp` for each 16.
 * They bound it. Layout 4, see gemm_neon_octets.h. */
#include "gemm_body.h"
#include "neon_macros.h"

#if defined(__GNUC__) && !defined(__clang__)
/* Before it has chosen registers, GCC would start all products of a step at once and spill accumulators. */
#pragma GCC optimize("no-schedule-insns")
#endif

enum { TILE_ROWS = 4, PANEL = 16 };
#define COLUMNS(rows) (4 / (rows))

#include "gemm_neon_octets.h"

INLINE int8x16_t load_row(const int8_t *a) {
  int64_t eight;
  memcpy(&eight, a, 8);
  return vreinterpretq_s8_s64(vdupq_n_s64(eight));
}

/* One octet, or two where two products fit 16 bits. */
INLINE void octets(const int8_t *a, size_t step, const uint8_t *w, const int rows, const int bits, const int two, int32x4_t acc[4][16]) {
  int8x16_t q[2][4];
  UNROLL for (int r = 0; r < rows; r++) q[0][r] = load_row(a + 8 * r), q[1][r] = two ? load_row(a + step + 8 * r) : q[0][r];
  UNROLL for (int j = 0; j < 2 * COLUMNS(rows); j++) {
    const int8x16_t x = load_pair(w, j, bits), y = two ? load_pair(w + 16 * bits, j, bits) : x;
    UNROLL for (int high = 0; high < 2; high++) { /* the rows hide each other's latency, also from an in-order core */
      int16x8_t p[4];
      UNROLL for (int r = 0; r < rows; r++) p[r] = high ? vmull_high_s8(x, q[0][r]) : vmull_s8(vget_low_s8(x), vget_low_s8(q[0][r]));
      UNROLL for (int r = 0; two && r < rows; r++)
        p[r] = high ? vmlal_high_s8(p[r], y, q[1][r]) : vmlal_s8(p[r], vget_low_s8(y), vget_low_s8(q[1][r]));
      UNROLL for (int r = 0; r < rows; r++) acc[r][2 * j + high] = vpadalq_s16(acc[r][2 * j + high], p[r]);
    }
  }
}

INLINE void sums(const etk_gemm_tile *t, const int8_t *restrict a, const uint8_t *restrict w, int32_t row, const int rows, int32_t col,
                 int32_t len, const int bits, int32x4_t s[8][4]) {
  const int vectors = COLUMNS(rows);
  const size_t step = 8 * (size_t)t->rows;
  int32x4_t acc[4][16];
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int n = 0; n < 4 * vectors; n++) acc[r][n] = vdupq_n_s32(0);
  a += 8 * row;
  w += col * bits;
  int32_t k = 0;
  if (bits == 4 || t->narrow)
    ROLLED for (; k + 16 <= len; k += 16, a += 2 * step, w += 32 * bits) octets(a, step, w, rows, bits, 1, acc);
  ROLLED for (; k < len; k += 8, a += step, w += 16 * bits) octets(a, step, w, rows, bits, 0, acc);
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vectors; v++)
      s[r][v] = vaddq_s32(s[r][v], vpaddq_s32(vpaddq_s32(acc[r][4 * v], acc[r][4 * v + 1]), vpaddq_s32(acc[r][4 * v + 2], acc[r][4 * v + 3])));
}

#include "gemm_neon_body.h"

extern const etk_gemm_kernel etk_gemm_s8_neon_8x16;
const etk_gemm_kernel etk_gemm_s8_neon_8x16 = ETK_NEON_GEMM("gemm_s8_neon_8x16", ETK_ISA_NEON, 4);
