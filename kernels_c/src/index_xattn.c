/* Strided antidiagonal scores (XAttention's rule): the law is in index.h and index_kernel.h.
 *
 * With stride S, S queries side by side in reverse order against S keys side by side is the sum of one antidiagonal of
 * their S x S square, so the estimate is one INT8 product of depth S d on N / S rows and M / S columns: 1 / S of Q K^T.
 * Keys are laid out for the product once per key head; then each query block is quantized, multiplied, weighted and
 * decided on while it is in cache. One task per key head. */
#include <math.h>
#include <string.h>

#include "index_internal.h"
#include "parallel.h"

typedef struct head_ws { /* per worker */
  int8_t *codes_q;      /* [64][dp], reversed within strides */
  int8_t *codes_k;      /* [nkb 64][dp] */
  void *packed;         /* the same for the product */
  float *mu, *block;    /* [dp] */
  double *total;        /* [dp] */
  float *scale;         /* [strided keys] */
  int32_t *dot;         /* [64 / S][strided keys rounded up to 16] */
  uint32_t *weight;     /* [strided keys], then [nkb] */
  double *mass;         /* [nkb] */
} head_ws;

typedef struct job {
  etk_index_qk x;
  etk_xattn_desc desc;
  float tau;              /* scale x log2 e / S */
  int64_t keys, dot_cols; /* strided keys; those rounded up to 16 */
  uint8_t *map;
  head_ws *ws;
  int32_t *note;
} job;

static void carve_head(etk_index_ws *ws, const job *j, head_ws *out) {
  const uint64_t dp = (uint64_t)j->x.dp, stride = (uint64_t)j->desc.stride, keys = (uint64_t)j->keys, nkb = (uint64_t)j->x.nkb;
  out->codes_q = etk_index_take(ws, 64 * dp, 1);
  out->codes_k = etk_index_take(ws, nkb * 64, dp);
  out->packed = etk_index_take(ws, etk_index_packed(keys, stride), dp);
  out->mu = etk_index_take(ws, dp, 4);
  out->block = etk_index_take(ws, dp, 4);
  out->total = etk_index_take(ws, dp, 8);
  out->scale = etk_index_take(ws, nkb * 64 / stride, 4);
  out->dot = etk_index_take(ws, 64 / stride * (uint64_t)j->dot_cols, 4);
  out->weight = etk_index_take(ws, keys > nkb ? keys : nkb, 4);
  out->mass = etk_index_take(ws, nkb, 8);
}

static etk_status carve(etk_index_ws *ws, int32_t workers, job *j) {
  j->map = etk_index_take(ws, (uint64_t)(j->x.batch * j->x.hq), (uint64_t)(j->x.nqb * j->x.nkb) + 1);
  j->ws = etk_index_take(ws, (uint64_t)workers, sizeof *j->ws);
  j->note = etk_index_take(ws, (uint64_t)workers, sizeof *j->note);
  for (int32_t w = 0; w < workers; w++) {
    head_ws head;
    carve_head(ws, j, &head);
    if (j->ws) j->ws[w] = head;
  }
  return ws->overflow ? ETK_E_OVERFLOW : ETK_OK;
}

static void quantize_block(const job *j, const float *x, int64_t stride, int64_t rows, const float *mu, int32_t reverse,
                           int8_t *codes, float *scale, int32_t *note) {
  const int32_t n = (int32_t)(rows < ETK_BLOCK ? rows : ETK_BLOCK);
  float inverse;
  *scale = etk_index_scale(j->x.kernel, x, stride, n, j->x.d, mu, &inverse);
  if (n < ETK_BLOCK) memset(codes, 0, (size_t)j->x.dp * ETK_BLOCK);
  j->x.kernel->quantize(x, stride, n, j->x.d, j->x.dp, mu, inverse, reverse, codes, note);
}

static void prepare_keys(const job *j, head_ws *ws, const float *k, int32_t *note) {
  const etk_index_qk *x = &j->x;
  const int64_t per = ETK_BLOCK / j->desc.stride;
  etk_index_mean(x->kernel, k, x->stride_k[2], x->m, x->d, ws->mu, ws->block, ws->total, note);
  for (int64_t c = 0; c < x->nkb; c++) {
    float scale;
    quantize_block(j, k + c * 64 * x->stride_k[2], x->stride_k[2], x->m - c * 64, ws->mu, 0, ws->codes_k + c * 64 * x->dp, &scale, note);
    for (int64_t i = 0; i < per; i++) ws->scale[c * per + i] = scale;
  }
  x->kernel->pack_s8(ws->codes_k, j->keys, (int64_t)j->desc.stride * x->dp, ws->packed);
}

/* Share of each key block in the softmax of each strided row, added over the rows of query block r. */
static void block_mass(const job *j, head_ws *ws, int64_t r, float scale_q) {
  const etk_index_qk *x = &j->x;
  const int64_t stride = j->desc.stride, per = ETK_BLOCK / stride, depth = stride * x->dp;
  int64_t counts[ETK_BLOCK] = {0}, most = 0;
  for (int64_t i = 0; i < per && r * 64 + i * stride < x->n; i++) {
    const int64_t last_row = r * 64 + i * stride + stride - 1 < x->n - 1 ? r * 64 + i * stride + stride - 1 : x->n - 1;
    const int64_t last = last_row + (x->m - x->n);
    counts[i] = !j->desc.causal ? j->keys : last < 0 ? 0 : last / stride + 1;
    most = counts[i] > most ? counts[i] : most;
  }
  memset(ws->mass, 0, sizeof *ws->mass * (size_t)x->nkb);
  if (most > 0) x->kernel->dot_s8(ws->codes_q, per, ws->packed, most, depth, ws->dot, j->dot_cols);
  for (int64_t i = 0; i < per && counts[i] > 0; i++) {
    int64_t all;
    x->kernel->weights(ws->dot + i * j->dot_cols, scale_q * j->tau, ws->scale, counts[i], ws->weight);
    const double inverse = 1.0 / (double)x->kernel->mass_from(ws->weight, counts[i], 0, &all);
    for (int64_t c = 0; c * per < counts[i]; c++) {
      const int64_t stop = (c + 1) * per < counts[i] ? (c + 1) * per : counts[i];
      uint32_t sum = 0; /* at most 16 weights */
      for (int64_t t = c * per; t < stop; t++) sum += ws->weight[t];
      ws->mass[c] += (double)sum * inverse;
    }
  }
}

static void select_row(const job *j, head_ws *ws, int64_t r, uint8_t *row) {
  const etk_index_qk *x = &j->x;
  const int64_t visible = etk_index_visible(r, x->n, x->m, j->desc.causal), shift = x->m - x->n;
  const int64_t last_row = r * 64 + 63 < x->n - 1 ? r * 64 + 63 : x->n - 1;
  const int64_t first = r * 64 + shift < 0 ? 0 : (r * 64 + shift) / 64, last = last_row + shift < 0 ? -1 : (last_row + shift) / 64;
  uint64_t total = 0, forced = 0;
  int64_t number = 0;
  for (int64_t c = 0; c < visible; c++) {
    const uint32_t weight = (uint32_t)(ws->mass[c] * 1048576.0) + 1;
    total += weight;
    ws->weight[c] = weight;
    if (c != 0 && (c < first || c > last)) continue;
    row[c] = 1;
    ws->weight[c] = 0;
    forced += weight;
    number++;
  }
  const uint64_t target = etk_index_target(j->desc.threshold, total);
  int64_t least = j->desc.min_keep < visible ? j->desc.min_keep : visible;
  least = least > number ? least - number : 0;
  etk_index_select(x->kernel, ws->weight, visible, target > forced ? target - forced : 0, least, NULL, row);
}

static void run_head(void *arg, int64_t task, int worker) {
  const job *j = arg;
  const etk_index_qk *x = &j->x;
  head_ws *ws = &j->ws[worker];
  const int64_t b = task / x->hkv, group = x->hq / x->hkv;
  prepare_keys(j, ws, etk_index_k(x, b, task % x->hkv), &j->note[worker]);
  for (int64_t h = task % x->hkv * group; h < (task % x->hkv + 1) * group; h++) {
    const float *q = etk_index_q(x, b, h);
    for (int64_t r = 0; r < x->nqb; r++) {
      uint8_t *row = j->map + ((b * x->hq + h) * x->nqb + r) * x->nkb;
      float scale_q;
      memset(row, 0, (size_t)x->nkb);
      quantize_block(j, q + r * 64 * x->stride_q[2], x->stride_q[2], x->n - r * 64, NULL, j->desc.stride, ws->codes_q, &scale_q,
                     &j->note[worker]);
      block_mass(j, ws, r, scale_q);
      select_row(j, ws, r, row);
    }
  }
}

/* Read and check everything but the workspace. */
static etk_status begin(const etk_xattn_desc *desc, const etk_tensor *q, const etk_tensor *k, job *j) {
  etk_status st = etk_index_desc(desc, &j->desc, sizeof j->desc);
  if (st == ETK_OK) st = etk_index_qk_read(q, k, &j->x);
  if (st != ETK_OK) return st;
  etk_xattn_desc *d = &j->desc;
  if (d->stride == 0) d->stride = 16;
  if (d->stride < 4 || d->stride > 64 || (d->stride & (d->stride - 1))) return ETK_E_RANGE;
  if (!(d->threshold > 0.0f && d->threshold <= 1.0f) || !(d->scale >= 0.0f && d->scale <= 1e6f)) return ETK_E_RANGE;
  if (d->causal < 0 || d->causal > 1 || d->min_keep < 0) return ETK_E_RANGE;
  j->keys = etk_ceil_div(j->x.m, d->stride);
  j->dot_cols = (j->keys + 15) / 16 * 16;
  j->tau = (d->scale == 0.0f ? 1.0f / sqrtf((float)j->x.d) : d->scale) * 1.44269504f / (float)d->stride;
  return ETK_OK;
}

etk_status etk_bsr_from_xattn_workspace(const etk_xattn_desc *desc, const etk_tensor *q, const etk_tensor *k, const etk_pool *pool,
                                        uint64_t *bytes) {
  job j;
  if (!bytes) return ETK_E_NULL;
  etk_status st = begin(desc, q, k, &j);
  if (st != ETK_OK) return st;
  etk_index_ws size = {0};
  st = carve(&size, etk_parallel_width(pool, ETK_INDEX_MAX_WORKERS), &j);
  if (st == ETK_OK) *bytes = size.at;
  return st;
}

etk_status etk_bsr_from_xattn(const etk_xattn_desc *desc, const etk_tensor *q, const etk_tensor *k, etk_index_arrays *arrays,
                              etk_bsr *out, void *ws, uint64_t ws_bytes, const etk_pool *pool) {
  job j;
  if (!arrays) return ETK_E_NULL;
  etk_status st = begin(desc, q, k, &j);
  if (st != ETK_OK) return st;
  const int32_t workers = etk_parallel_width(pool, ETK_INDEX_MAX_WORKERS);
  etk_index_ws size = {0}, pieces = {.base = ws};
  st = carve(&size, workers, &j);
  if (st != ETK_OK) return st;
  if (!ws) return ETK_E_NULL;
  if (ws_bytes < size.at || (uintptr_t)ws % 64 != 0) return ETK_E_WORKSPACE;
  st = carve(&pieces, workers, &j);
  if (st != ETK_OK) return st;
  memset(j.note, 0, sizeof *j.note * (size_t)workers);
  st = etk_parallel(pool, workers, run_head, &j, j.x.batch * j.x.hkv);
  if (st == ETK_OK) st = etk_index_from_map(j.map, j.x.batch * j.x.hq, j.x.nqb, j.x.nkb, j.x.n, j.x.m, j.desc.causal, arrays, out);
  if (st != ETK_OK || !arrays->row_ptr) return st;
  etk_index_heads(out, j.x.batch, j.x.hq);
  for (int32_t w = 0; w < workers; w++)
    if (j.note[w]) st = ETK_NOTE_NONFINITE;
  return st;
}
