/* Index kernel, NEON with dot products: loops of index_kernel_body.h, and a product of its own.
 *
 *   out[i][j] = sum_k a[i][k] b[j][k]      s8 x s8 -> s32, exact
 *
 * Tile: 4 rows x 16 columns, 16 accumulators; 16 values of depth are 4 loads of rows, 16 of columns and 64 `sdot` by lane,
 * which bound it. b is packed as quads [cols / 16][depth / 4][16][4]. */
#include <stdint.h>
#include <string.h>

#include "neon_macros.h"

#define INDEX_OWN_DOT

static void pack_s8(const int8_t *restrict b, int64_t cols, int64_t depth, void *packed) {
  int8_t *restrict to = packed;
  for (int64_t g = 0; g < cols; g += 16)
    for (int64_t k = 0; k < depth; k += 4, to += 64)
      for (int64_t j = 0; j < 16; j++) {
        if (g + j < cols) memcpy(to + 4 * j, b + (g + j) * depth + k, 4);
        else memset(to + 4 * j, 0, 4);
      }
}

INLINE void tile(const int8_t *a, int64_t depth, const int8_t *restrict b, const int rows, int32_t *out, int64_t out_stride) {
  int32x4_t acc[4][4];
  UNROLL for (int i = 0; i < rows; i++)
    UNROLL for (int v = 0; v < 4; v++) acc[i][v] = vdupq_n_s32(0);
  ROLLED for (int64_t k = 0; k < depth; k += 16, b += 256) {
    int8x16_t q[4];
    UNROLL for (int i = 0; i < rows; i++) q[i] = vld1q_s8(a + i * depth + k);
#define QUAD(lane)                                                                                  \
  UNROLL for (int v = 0; v < 4; v++) {                                                              \
    const int8x16_t x = vld1q_s8(b + 64 * (lane) + 16 * v);                                         \
    UNROLL for (int i = 0; i < rows; i++) acc[i][v] = vdotq_laneq_s32(acc[i][v], x, q[i], lane);    \
  }
    QUAD(0) QUAD(1) QUAD(2) QUAD(3)
#undef QUAD
  }
  UNROLL for (int i = 0; i < rows; i++)
    UNROLL for (int v = 0; v < 4; v++) vst1q_s32(out + i * out_stride + 4 * v, acc[i][v]);
}

static void dot_s8(const int8_t *restrict a, int64_t rows, const void *packed, int64_t cols, int64_t depth, int32_t *restrict out,
                   int64_t out_stride) {
  for (int64_t i = 0; i < rows; i += 4)
    for (int64_t g = 0; g < cols; g += 16) {
      const int8_t *b = (const int8_t *)packed + g * depth;
      int32_t *to = out + i * out_stride + g;
      if (rows - i >= 4) tile(a + i * depth, depth, b, 4, to, out_stride);
      else
        for (int64_t r = i; r < rows; r++) tile(a + r * depth, depth, b, 1, to + (r - i) * out_stride, out_stride);
    }
}

#define INDEX_NAME etk_index_f32_neondot_64
#define INDEX_TEXT "index_f32_neondot_64"
#define INDEX_ISA ETK_ISA_NEONDOT
#include "index_kernel_body.h"
