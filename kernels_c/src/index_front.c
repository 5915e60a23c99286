/* What builders that look at Q and K share: reading tensors, the mean key, scales, workspace pieces, selection. */
#include <float.h>
#include <math.h>

#include "index_internal.h"

/* Largest tensor that index arithmetic here must hold: fewer than 2^40 rows of at most 1024 floats. */
static etk_status read_tensor(const etk_tensor *t, int64_t stride[3]) {
  if (t->rank != 4) return ETK_E_SHAPE;
  if (t->dtype != ETK_F32) return ETK_E_DTYPE;
  uint64_t last = 0;
  int64_t total = 1;
  for (int i = 0; i < 4; i++) {
    if (t->dim[i] < 0 || t->dim[i] > INT32_MAX) return ETK_E_SHAPE;
    if (t->stride[i] < 0 || t->stride[i] % 4 != 0) return ETK_E_STRIDE;
    if (t->dim[i] > 1 && t->stride[i] > INT64_MAX / 8 / t->dim[i]) return ETK_E_OVERFLOW;
    if (t->dim[i] > 1) last += (uint64_t)(t->dim[i] - 1) * (uint64_t)t->stride[i];
    if (i < 3) stride[i] = t->stride[i] / 4;
  }
  if (t->dim[0] > 1 << 20 || t->dim[1] > 1 << 20 || t->dim[0] * t->dim[1] > 1 << 20) return ETK_E_SHAPE;
  for (int i = 0; i < 4; i++) total = total > ((int64_t)1 << 52) ? total : total * (t->dim[i] > 0 ? t->dim[i] : 0);
  if (total > 0 && t->dim[3] > 1 && t->stride[3] != 4) return ETK_E_STRIDE;
  if (total > 0 && !t->data) return ETK_E_NULL;
  if ((uintptr_t)t->data % 4 != 0) return ETK_E_ALIGN;
  if (total > 0 && last + 4 > t->capacity) return ETK_E_OVERFLOW;
  return ETK_OK;
}

/* An empty tensor may have no data; steps within it are then steps of nothing, never arithmetic on a null pointer. */
static const float *rows_of(const etk_tensor *t, int64_t stride[3]) {
  static const float k_none[1];
  for (int i = 0; i < 4; i++) {
    if (t->dim[i] > 0) continue;
    stride[0] = stride[1] = stride[2] = 0;
    return k_none;
  }
  return t->data;
}

etk_status etk_index_qk_read(const etk_tensor *q, const etk_tensor *k, etk_index_qk *out) {
  if (!q || !k) return ETK_E_NULL;
  etk_status st = read_tensor(q, out->stride_q);
  if (st == ETK_OK) st = read_tensor(k, out->stride_k);
  if (st != ETK_OK) return st;
  if (q->dim[0] != k->dim[0] || q->dim[3] != k->dim[3] || q->dim[3] < 1 || q->dim[3] > ETK_INDEX_MAX_D) return ETK_E_SHAPE;
  if (k->dim[1] < 1 || q->dim[1] % k->dim[1] != 0) return ETK_E_SHAPE;
  out->q = rows_of(q, out->stride_q);
  out->k = rows_of(k, out->stride_k);
  out->batch = q->dim[0];
  out->hq = q->dim[1];
  out->hkv = k->dim[1];
  out->n = q->dim[2];
  out->m = k->dim[2];
  out->nqb = etk_ceil_div(out->n, ETK_BLOCK);
  out->nkb = etk_ceil_div(out->m, ETK_BLOCK);
  out->d = (int32_t)q->dim[3];
  out->dp = (out->d + 15) / 16 * 16;
  out->kernel = etk_index_kernel_pick();
  return out->kernel ? ETK_OK : ETK_E_ISA;
}

void etk_index_mean(const etk_index_kernel *kernel, const float *x, int64_t stride, int64_t n, int32_t d, float *mu, float *block,
                    double *total, int32_t *nonfinite) {
  for (int32_t c = 0; c < d; c++) total[c] = 0.0;
  for (int64_t i = 0; i < n; i += ETK_BLOCK) {
    kernel->sum_rows(x + i * stride, stride, (int32_t)(n - i < ETK_BLOCK ? n - i : ETK_BLOCK), d, block, nonfinite);
    for (int32_t c = 0; c < d; c++) total[c] += (double)block[c];
  }
  for (int32_t c = 0; c < d; c++) {
    mu[c] = n > 0 ? (float)(total[c] / (double)n) : 0.0f;
    if (!(fabsf(mu[c]) <= FLT_MAX)) mu[c] = 0.0f; /* sums of huge values may have overflowed */
  }
}

float etk_index_scale(const etk_index_kernel *kernel, const float *x, int64_t stride, int32_t n, int32_t d, const float *mu,
                      float *inverse) {
  const float top = kernel->max_abs(x, stride, n, d, mu);
  *inverse = top < 1e-30f ? 0.0f : 127.0f / top;
  return top < 1e-30f ? 0.0f : top / 127.0f;
}

void *etk_index_take(etk_index_ws *ws, uint64_t count, uint64_t size) {
  const uint64_t limit = (uint64_t)INT64_MAX / 4;
  if (count > limit / size || ws->at > limit) {
    ws->overflow = 1;
    return NULL;
  }
  void *out = ws->base ? ws->base + ws->at : NULL;
  ws->at += (count * size + 63) / 64 * 64;
  return out;
}

uint64_t etk_index_target(float p, uint64_t mass) { return (uint64_t)ceil((double)p * (double)mass); }

/* The largest threshold that still reaches both goals, by bisection over its bits: no sorting, no bad case. */
static uint32_t threshold(const etk_index_kernel *kernel, const uint32_t *weight, int64_t n, uint64_t target, int64_t count) {
  uint32_t t = 0;
  for (int bit = 24; bit >= 0; bit--) {
    int64_t found;
    const uint64_t mass = kernel->mass_from(weight, n, t | (1u << bit), &found);
    if (mass >= target && found >= count) t |= 1u << bit;
  }
  return t > 0 ? t : 1; /* zero weights take no part */
}

void etk_index_select(const etk_index_kernel *kernel, const uint32_t *weight, int64_t n, uint64_t target, int64_t count,
                      const int32_t *order, uint8_t *keep) {
  if (target == 0 && count <= 0) return;
  const uint32_t t = threshold(kernel, weight, n, target, count);
  int64_t found;
  uint64_t mass = kernel->mass_from(weight, n, t + 1, &found);
  for (int64_t j = 0; j < n; j++)
    if (weight[j] > t) keep[order ? order[j] : j] = 1;
  for (int64_t j = 0; j < n && (mass < target || found < count); j++) {
    if (weight[j] != t) continue;
    keep[order ? order[j] : j] = 1;
    mass += t;
    found++;
  }
}
