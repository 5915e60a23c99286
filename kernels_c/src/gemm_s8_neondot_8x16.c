/* INT8 and INT4 matrix products for ARMv8.2 with dot products.
 *
 *   S = start + sum_k w[k] a[k];  c = fma(ws as, (f32)S, c);  offsets: c = fma(wb as, rsum, c)
 *
 * Tile: 8 rows x 8 columns twice, 16 accumulators; a quad of codes of four rows is one register, each row one lane of `sdot`, so
 * that 4 codes are 2 loads of rows, 2 of columns and 16 `sdot`, which bound it. Up to 4 rows: all 16 columns at once. Operands
 * are s8: 8-bit codes are stored as u - 128. Layout 2: 8 bits [len/4][16 columns][4 k]; 4 bits [len/8][16 columns][4 bytes], the
 * byte's low nibble for k = 0..3 and its high nibble for k = 4..7 of the eight. */
#include "gemm_body.h"
#include "neon_macros.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("ira-region=all") /* else GCC moves accumulators about in the hot loop */
#endif

enum { TILE_ROWS = 8, PANEL = 16 };
#define COLUMNS(rows) ((rows) == 8 ? 2 : 4)

/* A quad of the codes of `rows` rows; a register holds four. */
INLINE void load_quads(const int8_t *a, const int rows, int8x16_t q[2]) {
  if (rows == 8) {
    q[0] = vld1q_s8(a);
    q[1] = vld1q_s8(a + 16);
  } else if (rows == 4) {
    q[0] = vld1q_s8(a);
  } else if (rows == 2) {
    q[0] = vcombine_s8(vld1_s8(a), vdup_n_s8(0));
  } else {
    int32_t one;
    memcpy(&one, a, 4);
    q[0] = vreinterpretq_s8_s32(vdupq_n_s32(one));
  }
}

INLINE void dot_quad(const int8x16_t q[2], const int8x16_t x, const int rows, const int v, int32x4_t s[8][4]) {
  UNROLL for (int r = 0; r < rows; r += 4) {
    s[r][v] = vdotq_laneq_s32(s[r][v], x, q[r / 4], 0);
    if (rows > 1) s[r + 1][v] = vdotq_laneq_s32(s[r + 1][v], x, q[r / 4], 1);
    if (rows > 2) s[r + 2][v] = vdotq_laneq_s32(s[r + 2][v], x, q[r / 4], 2);
    if (rows > 2) s[r + 3][v] = vdotq_laneq_s32(s[r + 3][v], x, q[r / 4], 3);
  }
}

INLINE void sums(const etk_gemm_tile *t, const int8_t *restrict a, const uint8_t *restrict w, int32_t row, const int rows, int32_t col,
                 int32_t len, const int bits, int32x4_t s[8][4]) {
  const int vectors = COLUMNS(rows);
  const size_t step = 4 * (size_t)t->rows;
  a += 4 * row;
  w += 4 * col;
  ROLLED for (int32_t k = 0; k < len; k += 8, a += 2 * step, w += 16 * bits) {
    int8x16_t low[2], high[2];
    load_quads(a, rows, low);
    load_quads(a + step, rows, high);
    UNROLL for (int v = 0; v < vectors; v++) {
      const uint8x16_t x = vld1q_u8(w + 16 * v);
      const uint8x16_t first = bits == 8 ? x : vandq_u8(x, vdupq_n_u8(15)), second = bits == 8 ? vld1q_u8(w + 64 + 16 * v) : vshrq_n_u8(x, 4);
      dot_quad(low, vreinterpretq_s8_u8(first), rows, v, s);
      dot_quad(high, vreinterpretq_s8_u8(second), rows, v, s);
    }
  }
}

#include "gemm_neon_body.h"

static void lay(const uint8_t *u, int32_t k0, int32_t len, int32_t column, int32_t bits, uint8_t *codes) {
  for (int32_t i = 0; i < len; i++) {
    const int32_t k = k0 + i;
    uint8_t *at = codes + ((int64_t)(bits == 8 ? k / 4 : k / 8) * PANEL + column) * 4 + k % 4;
    *at = (uint8_t)(bits == 8 ? u[i] ^ 0x80 : *at | (k % 8 < 4 ? u[i] : u[i] << 4));
  }
}

static int32_t code_at(const uint8_t *codes, int32_t k, int32_t column, int32_t bits) {
  const uint8_t x = codes[((int64_t)(bits == 8 ? k / 4 : k / 8) * PANEL + column) * 4 + k % 4];
  return bits == 8 ? x ^ 0x80 : k % 8 < 4 ? x & 15 : x >> 4;
}

static void widen(const uint8_t *restrict codes, int32_t len, uint8_t *restrict out) {
  for (int32_t k = 0; k < len; k += 8, codes += 64, out += 128)
    UNROLL for (int i = 0; i < 64; i += 16) {
      const uint8x16_t x = vld1q_u8(codes + i);
      vst1q_u8(out + i, vandq_u8(x, vdupq_n_u8(15)));
      vst1q_u8(out + 64 + i, vshrq_n_u8(x, 4));
    }
}

static void lay_a(const int8_t *codes, int64_t stride, int32_t rows, int64_t k, int8_t *out) {
  for (int64_t q = 0; q < k; q += 4, out += 4 * rows)
    for (int32_t r = 0; r < rows; r++) memcpy(out + 4 * r, codes + r * stride + q, 4);
}

extern const etk_gemm_kernel etk_gemm_s8_neondot_8x16;
const etk_gemm_kernel etk_gemm_s8_neondot_8x16 = ETK_NEON_GEMM("gemm_s8_neondot_8x16", ETK_ISA_NEONDOT, 2);
