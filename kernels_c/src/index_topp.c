/* Top-p or top-k over pooled scores (SpargeAttention's rule): the law is in index.h and index_kernel.h.
 *
 * Per key head: mean key, codes of each block, pooled codes and self-similarity; similar blocks are kept side by side, so
 * that a row's candidates are a prefix. Per query block: one product with that prefix, weights, one selection. The cost
 * is reading Q and K once (K twice) and N M d / 4096 products. One task per key head. */
#include <math.h>
#include <string.h>

#include "index_internal.h"
#include "parallel.h"

typedef struct head_ws { /* per worker */
  int8_t *codes;        /* [64][dp] */
  float *mu, *block;    /* [dp] */
  double *total;        /* [dp] */
  int16_t *pooled;      /* [nkb][dp] of similar blocks, then [dp] for the query block */
  int16_t *pooled_q;
  float *scale;         /* [nkb] */
  int32_t *column;      /* [nkb] which block a candidate is */
  int32_t *dot;         /* [nkb + 16] */
  uint32_t *weight;     /* [nkb] */
  uint8_t *similar;     /* [nkb] */
} head_ws;

typedef struct job {
  etk_index_qk x;
  etk_topp_desc desc;
  float tau;     /* scale x log2 e */
  uint8_t *map;  /* [B][Hq][nqb][nkb] */
  head_ws *ws;   /* [workers] */
  int32_t *note; /* [workers] */
} job;

static void carve_head(etk_index_ws *ws, const etk_index_qk *x, head_ws *out) {
  const uint64_t dp = (uint64_t)x->dp, nkb = (uint64_t)x->nkb;
  out->codes = etk_index_take(ws, 64 * dp, 1);
  out->mu = etk_index_take(ws, dp, 4);
  out->block = etk_index_take(ws, dp, 4);
  out->total = etk_index_take(ws, dp, 8);
  out->pooled = etk_index_take(ws, nkb * dp, 2);
  out->pooled_q = etk_index_take(ws, dp, 2);
  out->scale = etk_index_take(ws, nkb, 4);
  out->column = etk_index_take(ws, nkb, 4);
  out->dot = etk_index_take(ws, nkb, 4);
  out->weight = etk_index_take(ws, nkb, 4);
  out->similar = etk_index_take(ws, nkb, 1);
}

static etk_status carve(etk_index_ws *ws, const etk_index_qk *x, int32_t workers, job *out) {
  out->map = etk_index_take(ws, (uint64_t)(x->batch * x->hq), (uint64_t)(x->nqb * x->nkb) + 1);
  out->ws = etk_index_take(ws, (uint64_t)workers, sizeof *out->ws);
  out->note = etk_index_take(ws, (uint64_t)workers, sizeof *out->note);
  for (int32_t w = 0; w < workers; w++) {
    head_ws head;
    carve_head(ws, x, &head);
    if (out->ws) out->ws[w] = head;
  }
  return ws->overflow ? ETK_E_OVERFLOW : ETK_OK;
}

/* Pooled codes and scale of one block; returns whether its rows are alike. */
static int pool_block(const job *j, const float *x, int64_t stride, int64_t rows, const float *mu, int8_t *codes, int16_t *pooled,
                      float *scale, int32_t *note) {
  const etk_index_kernel *kernel = j->x.kernel;
  const int32_t n = (int32_t)(rows < ETK_BLOCK ? rows : ETK_BLOCK);
  float inverse;
  const float s = etk_index_scale(kernel, x, stride, n, j->x.d, mu, &inverse);
  kernel->quantize(x, stride, n, j->x.d, j->x.dp, mu, inverse, 0, codes, note);
  const int64_t self = kernel->pool(codes, n, j->x.dp, pooled);
  *scale = s * 8.0f / (float)n;
  return (double)self >= (double)j->desc.theta * ((double)n * (double)n * 16777216.0);
}

static void select_row(const job *j, head_ws *ws, int64_t r, int64_t candidates, float scale_q, uint8_t *row) {
  const etk_topp_desc *d = &j->desc;
  const int64_t visible = etk_index_visible(r, j->x.n, j->x.m, d->causal);
  int64_t count = 0;
  while (count < candidates && ws->column[count] < visible) count++;
  for (int64_t c = 0; c < visible; c++) row[c] = (uint8_t)!ws->similar[c];
  if (count > 0) {
    int64_t all;
    j->x.kernel->dot_s16(ws->pooled_q, ws->pooled, count, j->x.dp, ws->dot);
    j->x.kernel->weights(ws->dot, scale_q * j->tau, ws->scale, count, ws->weight);
    const uint64_t mass = j->x.kernel->mass_from(ws->weight, count, 0, &all);
    int64_t least = d->min_keep > 1 ? d->min_keep : 1;
    if (d->p == 0.0f) {
      const int64_t share = (int64_t)ceil((double)d->topk * (double)visible);
      least = share > least ? share : least;
    }
    least = least < count ? least : count;
    etk_index_select(j->x.kernel, ws->weight, count, d->p == 0.0f ? 0 : etk_index_target(d->p, mass), least, ws->column, row);
  }
  for (int64_t c = 0; c < d->sink_blocks && c < visible; c++) row[c] = 1;
  if (d->local_blocks > 0) {
    const int64_t last_row = r * 64 + 63 < j->x.n - 1 ? r * 64 + 63 : j->x.n - 1, shift = j->x.m - j->x.n;
    const int64_t first = r * 64 + shift < 0 ? 0 : (r * 64 + shift) / 64, last = last_row + shift < 0 ? -1 : (last_row + shift) / 64;
    const int64_t reach = d->local_blocks - 1, from = first > reach ? first - reach : 0;
    for (int64_t c = from; c <= last + reach && c < visible; c++) row[c] = 1;
  }
}

static void run_head(void *arg, int64_t task, int worker) {
  const job *j = arg;
  const etk_index_qk *x = &j->x;
  head_ws *ws = &j->ws[worker];
  int32_t *note = &j->note[worker];
  const int64_t b = task / x->hkv, group = x->hq / x->hkv;
  const float *k = etk_index_k(x, b, task % x->hkv);
  etk_index_mean(x->kernel, k, x->stride_k[2], x->m, x->d, ws->mu, ws->block, ws->total, note);
  int64_t candidates = 0;
  for (int64_t c = 0; c < x->nkb; c++) {
    const int alike = pool_block(j, k + c * 64 * x->stride_k[2], x->stride_k[2], x->m - c * 64, ws->mu, ws->codes,
                                 ws->pooled + candidates * x->dp, &ws->scale[candidates], note);
    ws->similar[c] = (uint8_t)alike;
    ws->column[candidates] = (int32_t)c;
    candidates += alike;
  }
  for (int64_t h = task % x->hkv * group; h < (task % x->hkv + 1) * group; h++) {
    const float *q = etk_index_q(x, b, h);
    for (int64_t r = 0; r < x->nqb; r++) {
      uint8_t *row = j->map + ((b * x->hq + h) * x->nqb + r) * x->nkb;
      float scale_q;
      memset(row, 0, (size_t)x->nkb);
      if (pool_block(j, q + r * 64 * x->stride_q[2], x->stride_q[2], x->n - r * 64, NULL, ws->codes, ws->pooled_q, &scale_q, note))
        select_row(j, ws, r, candidates, scale_q, row);
      else
        memset(row, 1, (size_t)etk_index_visible(r, x->n, x->m, j->desc.causal));
    }
  }
}

/* Read and check everything but the workspace. */
static etk_status begin(const etk_topp_desc *desc, const etk_tensor *q, const etk_tensor *k, job *j) {
  etk_status st = etk_index_desc(desc, &j->desc, sizeof j->desc);
  if (st == ETK_OK) st = etk_index_qk_read(q, k, &j->x);
  if (st != ETK_OK) return st;
  const etk_topp_desc *d = &j->desc;
  if (!(d->p >= 0.0f && d->p <= 1.0f) || !(d->topk >= 0.0f && d->topk <= 1.0f) || (d->p == 0.0f && d->topk == 0.0f))
    return ETK_E_RANGE;
  if (!(d->theta >= -1.0f && d->theta <= 1.0f) || !(d->scale >= 0.0f && d->scale <= 1e6f)) return ETK_E_RANGE;
  if (d->causal < 0 || d->causal > 1 || d->min_keep < 0 || d->sink_blocks < 0 || d->local_blocks < 0) return ETK_E_RANGE;
  j->tau = (d->scale == 0.0f ? 1.0f / sqrtf((float)j->x.d) : d->scale) * 1.44269504f;
  return ETK_OK;
}

etk_status etk_bsr_from_topp_workspace(const etk_topp_desc *desc, const etk_tensor *q, const etk_tensor *k, const etk_pool *pool,
                                       uint64_t *bytes) {
  job j;
  if (!bytes) return ETK_E_NULL;
  etk_status st = begin(desc, q, k, &j);
  if (st != ETK_OK) return st;
  etk_index_ws size = {0};
  st = carve(&size, &j.x, etk_parallel_width(pool, ETK_INDEX_MAX_WORKERS), &j);
  if (st == ETK_OK) *bytes = size.at;
  return st;
}

etk_status etk_bsr_from_topp(const etk_topp_desc *desc, const etk_tensor *q, const etk_tensor *k, etk_index_arrays *arrays,
                             etk_bsr *out, void *ws, uint64_t ws_bytes, const etk_pool *pool) {
  job j;
  if (!arrays) return ETK_E_NULL;
  etk_status st = begin(desc, q, k, &j);
  if (st != ETK_OK) return st;
  const int32_t workers = etk_parallel_width(pool, ETK_INDEX_MAX_WORKERS);
  etk_index_ws size = {0}, pieces = {.base = ws};
  st = carve(&size, &j.x, workers, &j);
  if (st != ETK_OK) return st;
  if (!ws) return ETK_E_NULL;
  if (ws_bytes < size.at || (uintptr_t)ws % 64 != 0) return ETK_E_WORKSPACE;
  st = carve(&pieces, &j.x, workers, &j);
  if (st != ETK_OK) return st;
  memset(j.note, 0, sizeof *j.note * (size_t)workers);
  st = etk_parallel(pool, workers, run_head, &j, j.x.batch * j.x.hkv);
  if (st == ETK_OK)
    st = etk_index_from_map(j.map, j.x.batch * j.x.hq, j.x.nqb, j.x.nkb, j.x.n, j.x.m, j.desc.causal, arrays, out);
  if (st != ETK_OK || !arrays->row_ptr) return st;
  etk_index_heads(out, j.x.batch, j.x.hq);
  for (int32_t w = 0; w < workers; w++)
    if (j.note[w]) st = ETK_NOTE_NONFINITE;
  return st;
}
