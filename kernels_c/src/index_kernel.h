/* What one instruction set provides to the index builders. Internal.
 *
 * The law of every function is made of integer arithmetic, of maxima, and of single float32 operations per element, so
 * all variants agree bit for bit and an index does not depend on the machine. Sums run over integers, or over rows in
 * ascending order.
 *
 *   finite(x)   = x, or 0 when x is NaN or infinite
 *   y           = finite(finite(x) - mu[c])
 *   codes       = rint(y * (127 / max|y|)) of a block of 64 rows, scale = max|y| / 127; all 0 when max|y| < 1e-30
 *   pooled[c]   = (sum of codes over the rows + 4) >> 3          the mean is pooled * 8 / rows
 *   unit        = rint(code * (4096 / sqrt(sum of code^2 of the row)));  self = sum_c (sum_rows unit)^2
 *                 self-similarity, the mean cosine of all pairs of rows, is self / (4096 rows)^2
 *   s[j]        = (f32)dot[j] * min(a * b[j], 1e25)
 *   weight[j]   = (int)(2^(24 + n) poly(x - n)) + 1,  x = max(s[j] - max s, -64),  n = (int)x: about 2^24 * 2^x */
#ifndef ETK_INDEX_KERNEL_H
#define ETK_INDEX_KERNEL_H

#include "edgetok/base.h"

enum { ETK_INDEX_MAX_D = 1024 };

typedef struct etk_index_kernel {
  const char *name;
  int32_t isa;
  /* sum[c] = ((x[0][c] + x[1][c]) + ...) of n <= 64 rows in f32, finite() applied; *nonfinite is or-ed. */
  void (*sum_rows)(const float *x, int64_t stride, int32_t n, int32_t d, float *sum, int32_t *nonfinite);
  /* Largest |y| of n rows (mu NULL = 0). */
  float (*max_abs)(const float *x, int64_t stride, int32_t n, int32_t d, const float *mu);
  /* codes [n][dp], padding 0, with inverse = 127 / max|y| or 0. reverse: rows change order within groups of that many
   * (row g * reverse + i goes to g * reverse + reverse - 1 - i); 0 = keep. */
  void (*quantize)(const float *x, int64_t stride, int32_t n, int32_t d, int32_t dp, const float *mu, float inverse,
                   int32_t reverse, int8_t *codes, int32_t *nonfinite);
  /* pooled [dp]; returns self. */
  int64_t (*pool)(const int8_t *codes, int32_t n, int32_t dp, int16_t *pooled);
  /* out[j] = a . b[j], dp <= 1024, |a|, |b| <= 1016. */
  void (*dot_s16)(const int16_t *a, const int16_t *b, int64_t cols, int32_t dp, int32_t *out);
  /* packed: etk_index_packed(cols, depth) bytes; out[i][j] = a[i] . b[j], rows of out hold cols rounded up to 16. Depth is a
   * multiple of 16, at most 65536. */
  void (*pack_s8)(const int8_t *b, int64_t cols, int64_t depth, void *packed);
  void (*dot_s8)(const int8_t *a, int64_t rows, const void *packed, int64_t cols, int64_t depth, int32_t *out, int64_t out_stride);
  /* weight[0..n) of dot[0..n). */
  void (*weights)(const int32_t *dot, float a, const float *b, int64_t n, uint32_t *weight);
  /* Sum and number of the weights at or over t; weights are at most 2^24 + 1. */
  uint64_t (*mass_from)(const uint32_t *weight, int64_t n, uint32_t t, int64_t *count);
  /* First j with the largest 2 dot[j] - norm[j]: the nearest of n > 0 centroids, norm = |centroid|^2. */
  int64_t (*nearest)(const int32_t *dot, const int32_t *norm, int64_t n);
  /* sum[label[i]][c] += codes[i][c] of n rows. */
  void (*add_codes)(const int8_t *codes, const int32_t *label, int64_t n, int32_t dp, int32_t *sum);
} etk_index_kernel;

static inline uint64_t etk_index_packed(uint64_t cols, uint64_t depth) { return (cols + 15) / 16 * 16 * depth * 2; }

/* The best kernel under EDGETOK_MAX_ISA; NULL when that names no known ISA. */
const etk_index_kernel *etk_index_kernel_pick(void);
/* Row i of the table among those that the CPU can run, NULL past the end. For tests. */
const etk_index_kernel *etk_index_kernel_at(int32_t i);

#endif
