/* Index kernel, AVX2: loops of index_kernel_body.h, and a product of its own.
 *
 *   out[i][j] = sum_k a[i][k] b[j][k]      s8 x s8 -> s32, exact
 *
 * Tile: 4 rows x 16 columns, 8 accumulators. b is packed as s16 pairs [cols / 16][depth / 2][16][2], a is widened to s16
 * in chunks. Bound by vpmaddwd: one per 8 columns and 2 values of depth. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INDEX_OWN_DOT
enum { CHUNK = 512 };

static void pack_s8(const int8_t *restrict b, int64_t cols, int64_t depth, void *packed) {
  int16_t *restrict to = packed;
  for (int64_t g = 0; g < cols; g += 16) {
    for (int64_t j = 0; j < 16; j++)
      for (int64_t k = 0; k < depth; k++) to[k / 2 * 32 + j * 2 + k % 2] = g + j < cols ? (int16_t)b[(g + j) * depth + k] : 0;
    to += depth * 16;
  }
}

static void tile(int16_t (*restrict a)[CHUNK], int64_t rows, const int16_t *restrict b, int64_t depth, int32_t *restrict out,
                 int64_t out_stride, int first) {
  __m256i acc[4][2];
  for (int i = 0; i < 4; i++)
    for (int v = 0; v < 2; v++)
      acc[i][v] = first || i >= rows ? _mm256_setzero_si256() : _mm256_loadu_si256((const __m256i *)(out + i * out_stride + v * 8));
  for (int64_t k = 0; k < depth; k += 2) {
    const __m256i b0 = _mm256_loadu_si256((const __m256i *)(b + k * 16)), b1 = _mm256_loadu_si256((const __m256i *)(b + k * 16 + 16));
    for (int i = 0; i < 4; i++) {
      int32_t pair;
      memcpy(&pair, &a[i][k], sizeof pair);
      const __m256i av = _mm256_set1_epi32(pair);
      acc[i][0] = _mm256_add_epi32(acc[i][0], _mm256_madd_epi16(av, b0));
      acc[i][1] = _mm256_add_epi32(acc[i][1], _mm256_madd_epi16(av, b1));
    }
  }
  for (int i = 0; i < rows; i++)
    for (int v = 0; v < 2; v++) _mm256_storeu_si256((__m256i *)(out + i * out_stride + v * 8), acc[i][v]);
}

static void dot_s8(const int8_t *restrict a, int64_t rows, const void *packed, int64_t cols, int64_t depth, int32_t *restrict out,
                   int64_t out_stride) {
  int16_t wide[4][CHUNK];
  for (int64_t i = 0; i < rows; i += 4) {
    const int64_t here = rows - i < 4 ? rows - i : 4;
    for (int64_t k0 = 0; k0 < depth; k0 += CHUNK) {
      const int64_t length = depth - k0 < CHUNK ? depth - k0 : CHUNK;
      for (int64_t r = 0; r < 4; r++)
        for (int64_t k = 0; k < length; k++) wide[r][k] = r < here ? (int16_t)a[(i + r) * depth + k0 + k] : 0;
      for (int64_t g = 0; g < cols; g += 16)
        tile(wide, here, (const int16_t *)packed + g * depth + k0 * 16, length, out + i * out_stride + g, out_stride, k0 == 0);
    }
  }
}

#define INDEX_NAME etk_index_f32_avx2_64
#define INDEX_TEXT "index_f32_avx2_64"
#define INDEX_ISA ETK_ISA_AVX2
#include "index_kernel_body.h"
