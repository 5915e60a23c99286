/* Partial results over disjoint keys, merged:  m = max lse_i, w_i = e^(lse_i - m), O = sum w_i O_i / sum w_i,
 * lse = m + ln sum w_i. Sums run in the order of the parts. An empty part (lse -inf) weighs nothing. */
#include <math.h>

#include "edgetok/attn.h"
#include "tensor.h"

enum { MOST = 256 };

static uint8_t *row_at(const etk_tensor *t, const int64_t *at) {
  uint8_t *p = t->data;
  for (int i = 0; i < 3; i++) p += t->dim[i] > 1 ? at[i] * t->stride[i] : 0;
  return p;
}

static etk_status check_pair(const etk_tensor *o, const etk_tensor *lse, const etk_tensor *like, int output) {
  const uint32_t f32 = ETK_DT(ETK_F32);
  etk_status st = output ? etk_tensor_out(o, 4, f32) : etk_tensor_in(o, 4, f32);
  if (st == ETK_OK) st = output ? etk_tensor_out(lse, 3, f32) : etk_tensor_in(lse, 3, f32);
  if (st != ETK_OK) return st;
  for (int i = 0; i < 4; i++)
    if (o->dim[i] != like->dim[i] || (i < 3 && lse->dim[i] != like->dim[i])) return ETK_E_SHAPE;
  return ETK_OK;
}

/* An output may be an input, element for element, and nothing else of it. */
static int clashes(const etk_tensor *out, const etk_tensor *in) {
  if (!etk_tensor_overlap(out, in)) return 0;
  if (out->data != in->data || out->rank != in->rank) return 1;
  for (int i = 0; i < out->rank; i++)
    if (out->dim[i] > 1 && out->stride[i] != in->stride[i]) return 1;
  return 0;
}

static void merge_row(int32_t n, const etk_tensor *o, const etk_tensor *lse, const int64_t *at, float *out, float *lse_out, int64_t dv) {
  float w[MOST], m = -INFINITY, sum = 0.0f;
  const float *x[MOST];
  for (int32_t i = 0; i < n; i++) {
    w[i] = *(const float *)(const void *)row_at(&lse[i], at);
    x[i] = (const float *)(const void *)row_at(&o[i], at);
    m = w[i] > m ? w[i] : m;
  }
  for (int32_t i = 0; i < n; i++) sum += w[i] = w[i] > -INFINITY ? expf(w[i] - m) : 0.0f;
  const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
  for (int64_t c = 0; c < dv; c++) {
    float y = 0.0f;
    for (int32_t i = 0; i < n; i++) y += w[i] > 0.0f ? w[i] * x[i][c] : 0.0f;
    out[c] = y * inverse;
  }
  *lse_out = sum > 0.0f ? m + logf(sum) : -INFINITY;
}

etk_status etk_attn_merge(int32_t n, const etk_tensor *o, const etk_tensor *lse, etk_tensor *o_out, etk_tensor *lse_out) {
  if (!o || !lse || !o_out || !lse_out) return ETK_E_NULL;
  if (n < 1 || n > MOST) return ETK_E_RANGE;
  etk_status st = check_pair(o_out, lse_out, o_out, 1);
  for (int32_t i = 0; i < n && st == ETK_OK; i++) st = check_pair(&o[i], &lse[i], o_out, 0);
  if (st != ETK_OK) return st;
  for (int32_t i = 0; i < n; i++)
    if (clashes(o_out, &o[i]) || clashes(lse_out, &lse[i]) || etk_tensor_overlap(o_out, &lse[i]) || etk_tensor_overlap(lse_out, &o[i])) return ETK_E_ALIAS;
  if (etk_tensor_overlap(o_out, lse_out)) return ETK_E_ALIAS;
  for (int64_t b = 0; b < o_out->dim[0]; b++)
    for (int64_t h = 0; h < o_out->dim[1]; h++)
      for (int64_t i = 0; i < o_out->dim[2]; i++) {
        const int64_t at[3] = {b, h, i};
        merge_row(n, o, lse, at, (float *)(void *)row_at(o_out, at), (float *)(void *)row_at(lse_out, at), o_out->dim[3]);
      }
  return ETK_OK;
}
