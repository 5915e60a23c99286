/* Index kernel, AVX-512 VNNI: loops of index_kernel_body.h, and a product of its own.
 *
 *   out[i][j] = sum_k a[i][k] b[j][k]      s8 x s8 -> s32, exact
 *
 * Tile: 4 rows x 64 columns, 16 accumulators. b is packed as u8 (b + 128) [cols / 16][depth / 4][16][4] and accumulators
 * start at -128 sum(a). Bound by vpdpbusd: one per 16 columns and 4 values of depth. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INDEX_OWN_DOT

static void pack_s8(const int8_t *restrict b, int64_t cols, int64_t depth, void *packed) {
  uint8_t *restrict to = packed;
  for (int64_t g = 0; g < cols; g += 16) {
    for (int64_t j = 0; j < 16; j++) {
      for (int64_t k = 0; k < depth; k += 4) {
        uint32_t quad = 0;
        if (g + j < cols) memcpy(&quad, b + (g + j) * depth + k, 4);
        quad ^= 0x80808080u;
        memcpy(to + k * 16 + j * 4, &quad, 4);
      }
    }
    to += depth * 16;
  }
}

static inline __m512i quad_of(const int8_t *a) {
  int32_t quad;
  memcpy(&quad, a, sizeof quad);
  return _mm512_set1_epi32(quad);
}

static void tile_64(const int8_t *restrict a, const int32_t *restrict start, int64_t rows, const uint8_t *restrict b,
                    int64_t depth, int32_t *restrict out, int64_t out_stride) {
  const int8_t *r0 = a, *r1 = a + (rows > 1 ? depth : 0), *r2 = a + (rows > 2 ? 2 * depth : 0), *r3 = a + (rows > 3 ? 3 * depth : 0);
  __m512i s[4][4];
  for (int i = 0; i < 4; i++)
    for (int v = 0; v < 4; v++) s[i][v] = _mm512_set1_epi32(start[i]);
  for (int64_t k = 0; k < depth; k += 4) {
    const __m512i a0 = quad_of(r0 + k), a1 = quad_of(r1 + k), a2 = quad_of(r2 + k), a3 = quad_of(r3 + k);
    for (int v = 0; v < 4; v++) {
      const __m512i bv = _mm512_loadu_si512(b + v * depth * 16 + k * 16);
      s[0][v] = _mm512_dpbusd_epi32(s[0][v], bv, a0);
      s[1][v] = _mm512_dpbusd_epi32(s[1][v], bv, a1);
      s[2][v] = _mm512_dpbusd_epi32(s[2][v], bv, a2);
      s[3][v] = _mm512_dpbusd_epi32(s[3][v], bv, a3);
    }
  }
  for (int i = 0; i < rows; i++)
    for (int v = 0; v < 4; v++) _mm512_storeu_si512(out + i * out_stride + v * 16, s[i][v]);
}

static void tile_16(const int8_t *restrict a, int32_t start, const uint8_t *restrict b, int64_t depth, int32_t *restrict out) {
  __m512i s = _mm512_set1_epi32(start);
  for (int64_t k = 0; k < depth; k += 4) s = _mm512_dpbusd_epi32(s, _mm512_loadu_si512(b + k * 16), quad_of(a + k));
  _mm512_storeu_si512(out, s);
}

static void dot_s8(const int8_t *restrict a, int64_t rows, const void *packed, int64_t cols, int64_t depth, int32_t *restrict out,
                   int64_t out_stride) {
  const uint8_t *b = packed;
  for (int64_t i = 0; i < rows; i += 4) {
    const int64_t here = rows - i < 4 ? rows - i : 4;
    int32_t start[4] = {0};
    for (int64_t r = 0; r < here; r++) {
      int32_t sum = 0;
      for (int64_t k = 0; k < depth; k++) sum += a[(i + r) * depth + k];
      start[r] = -128 * sum;
    }
    int64_t g = 0;
    for (; g + 48 < cols; g += 64) /* rows of out hold whole groups of 16 columns */
      tile_64(a + i * depth, start, here, b + g * depth, depth, out + i * out_stride + g, out_stride);
    for (; g < cols; g += 16)
      for (int64_t r = 0; r < here; r++) tile_16(a + (i + r) * depth, start[r], b + g * depth, depth, out + (i + r) * out_stride + g);
  }
}

#define INDEX_NAME etk_index_f32_avx512vnni_64
#define INDEX_TEXT "index_f32_avx512vnni_64"
#define INDEX_ISA ETK_ISA_AVX512VNNI
#include "index_kernel_body.h"
