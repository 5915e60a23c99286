/* Float strips for NEON: y = Q K, p = 2^(y - m), O = a O + p V. Tile 8 x 8 in 16 accumulators (1 or 2 rows: 16 columns); a
 * step of 4 along the sum is 8 loads of rows, 8 of columns and 64 `fmla` by lane, which bounds it. Static only. */
#include "attn_neon_base.h"

#define F32_VECTORS(rows) ((rows) >= 4 ? 2 : 4)

/* c[r][v] += sum over k of a[r][k] b[k][col + 4 v ..]; k is a multiple of 4. */
INLINE void tile_f32(const float *restrict a, size_t lda, const float *restrict b, size_t ldb, size_t col, int32_t k,
                     const int rows, float32x4_t c[8][4]) {
  const float *at = b + col;
  const int vectors = F32_VECTORS(rows);
  ROLLED for (int32_t i = 0; i < k; i += 4, a += 4) {
    float32x4_t q[8];
    UNROLL for (int r = 0; r < rows; r++) q[r] = vld1q_f32(a + (size_t)r * lda);
#define ONE(lane)                                                                               \
  UNROLL for (int v = 0; v < vectors; v++) {                                                    \
    const float32x4_t x = vld1q_f32(at + 4 * v);                                                \
    UNROLL for (int r = 0; r < rows; r++) c[r][v] = vfmaq_laneq_f32(c[r][v], x, q[r], lane);    \
  }                                                                                             \
  at += ldb;
    ONE(0) ONE(1) ONE(2) ONE(3)
#undef ONE
  }
}

/* out[r][n] = scale[r] out[r][n] + a b over n < width; scale NULL: 1; fresh: out is not read. */
INLINE void block_f32(const float *a, size_t lda, const float *b, size_t width, int32_t k, const float *scale, const int fresh,
                      float *out, const int rows) {
  const int vectors = F32_VECTORS(rows);
  for (size_t n = 0; n < width; n += 4 * (size_t)vectors) {
    float32x4_t c[8][4];
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int v = 0; v < vectors; v++) {
        c[r][v] = fresh ? vdupq_n_f32(0.0f) : vld1q_f32(out + (size_t)r * width + n + 4 * (size_t)v);
        if (scale) c[r][v] = vmulq_n_f32(c[r][v], scale[r]);
      }
    tile_f32(a, lda, b, width, n, k, rows, c);
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int v = 0; v < vectors; v++) vst1q_f32(out + (size_t)r * width + n + 4 * (size_t)v, c[r][v]);
  }
}

/* All the rows of a strip: blocks of 8, 4, 2, 1. */
INLINE void rows_f32(int32_t rows, const float *a, size_t lda, const float *b, size_t width, int32_t k, const float *scale,
                     const int fresh, float *out) {
  int32_t r = 0;
#define BLOCK(count)                                                                                                    \
  do {                                                                                                                  \
    block_f32(a + (size_t)r * lda, lda, b, width, k, scale ? scale + r : NULL, fresh, out + (size_t)r * width, count);  \
    r += count;                                                                                                         \
  } while (0)
  if (rows == 8) BLOCK(8);
  if (r + 4 <= rows) BLOCK(4);
  if (r + 2 <= rows) BLOCK(2);
  if (r < rows) BLOCK(1);
#undef BLOCK
}

static void qk_f32(const etk_strip *a, float *y) {
  rows_f32(a->rows, a->qf, (size_t)a->d_pad, a->k, ETK_PAGE, a->d_pad, NULL, 1, y);
}

static void pv_scaled_f32(const etk_strip *a, const float *p, const float *old) {
  rows_f32(a->rows, p, ETK_PAGE, a->v, (size_t)a->dv_pad, ETK_PAGE, old, 0, a->o);
}

static void pv_f32(const etk_strip *a, const float *p) { pv_scaled_f32(a, p, NULL); }

/* Row maxima of y; -inf past the strip. */
static void tops_f32(const etk_strip *a, const float *y, float mt[STRIP]) {
  for (int32_t r = 0; r < STRIP; r++) {
    mt[r] = -INFINITY;
    if (r >= a->rows) continue;
    float32x4_t top = vld1q_f32(y + r * ETK_PAGE), more = vld1q_f32(y + r * ETK_PAGE + 4);
    UNROLL for (int j = 8; j < ETK_PAGE; j += 8) {
      top = vmaxnmq_f32(top, vld1q_f32(y + r * ETK_PAGE + j));
      more = vmaxnmq_f32(more, vld1q_f32(y + r * ETK_PAGE + j + 4));
    }
    mt[r] = vmaxnmvq_f32(vmaxnmq_f32(top, more));
  }
}

/* p = 2^(y - m) (p may be y), m and l brought up to date; O is left to the caller. Returns whether any old is not 1. */
static int weights_f32(const etk_strip *a, const float *y, const float mt[STRIP], float *p, float old[STRIP]) {
  float w[STRIP];
  const int grown = meet(a, mt, old, w);
  for (int32_t r = 0; r < a->rows; r++, y += ETK_PAGE, p += ETK_PAGE) {
    if (mt[r] == -INFINITY) {
      memset(p, 0, ETK_PAGE * sizeof *p);
      continue;
    }
    const float32x4_t m = vdupq_n_f32(a->m[r]);
    float32x4_t sum = vdupq_n_f32(0.0f);
    for (int j = 0; j < ETK_PAGE; j += 4) {
      const float32x4_t e = exp2_4(vsubq_f32(vld1q_f32(y + j), m));
      sum = vaddq_f32(sum, e);
      vst1q_f32(p + j, e);
    }
    a->l[r] = old[r] * a->l[r] + vaddvq_f32(sum);
  }
  return grown;
}

static void softmax_f32(const etk_strip *a, const float *y, float *p) {
  float mt[STRIP], old[STRIP];
  tops_f32(a, y, mt);
  if (weights_f32(a, y, mt, p, old)) scale_rows(a, old);
}

static void hide_f32(float *y, uint64_t mask) {
  for (int j = 0; j < ETK_PAGE; j += 16) {
    uint32x4_t seen[4];
    mask_words(mask_bytes((uint32_t)(mask >> j)), seen);
    UNROLL for (int i = 0; i < 4; i++)
      vst1q_f32(y + j + 4 * i, vbslq_f32(seen[i], vld1q_f32(y + j + 4 * i), vdupq_n_f32(-INFINITY)));
  }
}

static void strip_f32(const etk_strip *a) {
  float y[STRIP * ETK_PAGE], mt[STRIP], old[STRIP];
  int needed = a->skip_log2 == 0.0f;
  qk_f32(a, y);
  for (int32_t r = 0; a->mask && r < a->rows; r++)
    if (a->mask[r] != ~UINT64_C(0)) hide_f32(y + r * ETK_PAGE, a->mask[r]);
  tops_f32(a, y, mt);
  for (int32_t r = 0; r < a->rows; r++)
    if (mt[r] != -INFINITY && !(mt[r] < a->m[r] - a->skip_log2)) needed = 1;
  if (!needed) return;
  const int grown = weights_f32(a, y, mt, y, old);
  pv_scaled_f32(a, y, grown ? old : NULL);
}
