/* Layout 4 of packed weights, for NEON with and without matrix instructions: panels of 16 columns, 8 codes of a column together.
 *   8 bits [len/8][16 columns][8 k], stored as u - 128
 *   4 bits [len/8][4][2][8 k]: a byte of the q-th 16 holds columns 4 q + (0, 1) in its low and 4 q + (2, 3) in its high nibble
 * Activations of a tile: [k/8][rows][8]. Internal. */
#ifndef ETK_GEMM_NEON_OCTETS_H
#define ETK_GEMM_NEON_OCTETS_H

static void lay(const uint8_t *u, int32_t k0, int32_t len, int32_t column, int32_t bits, uint8_t *codes) {
  for (int32_t i = 0; i < len; i++) {
    const int32_t k = k0 + i;
    if (bits == 8) {
      codes[((int64_t)(k / 8) * PANEL + column) * 8 + k % 8] = u[i] ^ 0x80;
    } else {
      uint8_t *at = codes + ((int64_t)(k / 8) * (PANEL / 2) + column / 4 * 2 + column % 2) * 8 + k % 8;
      *at = (uint8_t)(*at | (column % 4 < 2 ? u[i] : u[i] << 4));
    }
  }
}

static int32_t code_at(const uint8_t *codes, int32_t k, int32_t column, int32_t bits) {
  if (bits == 8) return codes[((int64_t)(k / 8) * PANEL + column) * 8 + k % 8] ^ 0x80;
  const uint8_t x = codes[((int64_t)(k / 8) * (PANEL / 2) + column / 4 * 2 + column % 2) * 8 + k % 8];
  return column % 4 < 2 ? x & 15 : x >> 4;
}

static void widen(const uint8_t *restrict codes, int32_t len, uint8_t *restrict out) {
  for (int32_t k = 0; k < len; k += 8, codes += 64, out += 128)
    UNROLL for (int q = 0; q < 4; q++) {
      const uint8x16_t x = vld1q_u8(codes + 16 * q);
      vst1q_u8(out + 32 * q, vandq_u8(x, vdupq_n_u8(15)));
      vst1q_u8(out + 32 * q + 16, vshrq_n_u8(x, 4));
    }
}

static void lay_a(const int8_t *codes, int64_t stride, int32_t rows, int64_t k, int8_t *out) {
  for (int64_t o = 0; o < k; o += 8, out += 8 * rows)
    for (int32_t r = 0; r < rows; r++) memcpy(out + 8 * r, codes + r * stride + o, 8);
}

/* Columns 2 pair and 2 pair + 1 of eight codes of 16 columns at w. */
INLINE int8x16_t load_pair(const uint8_t *w, int pair, const int bits) {
  if (bits == 8) return vreinterpretq_s8_u8(vld1q_u8(w + 16 * pair));
  const uint8x16_t x = vld1q_u8(w + 16 * (pair / 2));
  return vreinterpretq_s8_u8(pair % 2 ? vshrq_n_u8(x, 4) : vandq_u8(x, vdupq_n_u8(15)));
}

#endif
