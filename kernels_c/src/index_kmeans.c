/* k-means on INT8 codes: x goes to the centroid with the largest 2 x.c - |c|^2, an exact integer. 2 N C d operations an
 * iteration through the same product as attention's scores; everything else is N d. */
#include <math.h>
#include <string.h>

#include "index_internal.h"

void etk_kmeans_carve(etk_index_ws *ws, uint64_t clusters, uint64_t dp, etk_kmeans *out) {
  out->sum = etk_index_take(ws, clusters * dp, 4);
  out->nearest = etk_index_take(ws, clusters * dp, 1);
  out->norm = etk_index_take(ws, clusters, 4);
  out->packed = etk_index_take(ws, etk_index_packed(clusters, dp), 1);
  out->dot = etk_index_take(ws, 64 * ((clusters + 15) / 16 * 16), 4);
}

/* Sums and counts of the labels, and the rounded centroids; empty clusters keep theirs. */
static void update(const etk_index_kernel *kernel, etk_kmeans *x) {
  memset(x->sum, 0, sizeof *x->sum * (size_t)(x->clusters * x->dp));
  memset(x->count, 0, sizeof *x->count * (size_t)x->clusters);
  for (int64_t i = 0; i < x->n; i++) x->count[x->label[i]]++;
  kernel->add_codes(x->codes, x->label, x->n, x->dp, x->sum);
  for (int64_t c = 0; c < x->clusters; c++) {
    const double count = x->count[c];
    if (x->count[c] == 0) continue;
    for (int64_t i = c * x->dp; i < (c + 1) * x->dp; i++) x->nearest[i] = (int8_t)rint(x->sum[i] / count);
  }
}

/* New labels; returns whether any changed. */
static int assign(const etk_index_kernel *kernel, etk_kmeans *x) {
  const int64_t stride = (x->clusters + 15) / 16 * 16;
  int changed = 0;
  for (int64_t c = 0; c < x->clusters; c++) {
    x->norm[c] = 0;
    for (int64_t i = c * x->dp; i < (c + 1) * x->dp; i++) x->norm[c] += (int32_t)x->nearest[i] * x->nearest[i];
  }
  kernel->pack_s8(x->nearest, x->clusters, x->dp, x->packed);
  for (int64_t i = 0; i < x->n; i += ETK_BLOCK) {
    const int64_t rows = x->n - i < ETK_BLOCK ? x->n - i : ETK_BLOCK;
    kernel->dot_s8(x->codes + i * x->dp, rows, x->packed, x->clusters, x->dp, x->dot, stride);
    for (int64_t r = 0; r < rows; r++) {
      const int32_t label = (int32_t)kernel->nearest(x->dot + r * stride, x->norm, x->clusters);
      changed |= label != x->label[i + r];
      x->label[i + r] = label;
    }
  }
  return changed;
}

void etk_kmeans_run(const etk_index_kernel *kernel, etk_kmeans *x, int32_t iterations, int warm) {
  memset(x->nearest, 0, (size_t)(x->clusters * x->dp));
  for (int64_t c = 0; c < x->clusters && x->n > 0; c++) {
    const int64_t token = (2 * c + 1) * x->n / (2 * x->clusters);
    memcpy(x->nearest + c * x->dp, x->codes + token * x->dp, (size_t)x->dp);
  }
  if (warm) update(kernel, x);
  for (int64_t i = 0; i < x->n && !warm; i++) x->label[i] = -1;
  for (int32_t i = 0; i < iterations && assign(kernel, x); i++) update(kernel, x);
  if (x->n == 0) update(kernel, x); /* else counts and sums belong to the last labels already */
  for (int64_t c = 0; c < x->clusters; c++)
    for (int64_t i = c * x->dp; i < (c + 1) * x->dp; i++)
      x->centroid[i] = (int16_t)(x->count[c] == 0 ? 0.0 : rint(8.0 * x->sum[i] / (double)x->count[c]));
}
