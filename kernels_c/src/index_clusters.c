/* Clusters (Sparse VideoGen2's rule): the law is in index.h and index_kernel.h, k-means in index_kmeans.c.
 *
 * Per key head: codes of all keys with one scale, k-means; then the same for each query head that reads it, and a choice
 * of key clusters for each query cluster. Results stay in the workspace until the caller's capacities are known to
 * suffice. One task per key head. */
#include <math.h>
#include <string.h>

#include "index_internal.h"
#include "parallel.h"

typedef struct head_ws { /* per worker */
  int8_t *codes;      /* [max(n, m)][dp] */
  float *mu, *block;  /* [dp] */
  double *total;      /* [dp] */
  etk_kmeans means;   /* scratch for the larger cluster count */
  int16_t *centroid_q, *centroid_k, *rivals; /* [clusters][dp]; rivals: of key clusters that are not empty */
  int32_t *count_q, *count_k, *column;
  int32_t *dot;       /* [k clusters] */
  uint32_t *weight;   /* [k clusters] */
  float *scale;       /* [k clusters], all equal */
} head_ws;

typedef struct job {
  etk_index_qk x;
  etk_clusters_desc desc;
  float tau; /* scale x log2 e / 64: pooled codes are 8 x codes on both sides */
  uint8_t *map;
  int32_t *q_labels, *k_labels; /* [B][Hq][N], [B][Hkv][M] */
  int32_t *q_sizes, *k_sizes;   /* [B][Hq][q clusters], [B][Hkv][k clusters] */
  head_ws *ws;
  int32_t *note;
} job;

static void carve_head(etk_index_ws *ws, const job *j, head_ws *out) {
  const uint64_t dp = (uint64_t)j->x.dp, qc = (uint64_t)j->desc.q_clusters, kc = (uint64_t)j->desc.k_clusters;
  out->codes = etk_index_take(ws, (uint64_t)(j->x.n > j->x.m ? j->x.n : j->x.m), dp);
  out->mu = etk_index_take(ws, dp, 4);
  out->block = etk_index_take(ws, dp, 4);
  out->total = etk_index_take(ws, dp, 8);
  etk_kmeans_carve(ws, qc > kc ? qc : kc, dp, &out->means);
  out->centroid_q = etk_index_take(ws, qc * dp, 2);
  out->centroid_k = etk_index_take(ws, kc * dp, 2);
  out->rivals = etk_index_take(ws, kc * dp, 2);
  out->count_q = etk_index_take(ws, qc, 4);
  out->count_k = etk_index_take(ws, kc, 4);
  out->column = etk_index_take(ws, kc, 4);
  out->dot = etk_index_take(ws, kc, 4);
  out->weight = etk_index_take(ws, kc, 4);
  out->scale = etk_index_take(ws, kc, 4);
}

static etk_status carve(etk_index_ws *ws, int32_t workers, job *j) {
  const uint64_t q_heads = (uint64_t)(j->x.batch * j->x.hq), k_heads = (uint64_t)(j->x.batch * j->x.hkv);
  const uint64_t qc = (uint64_t)j->desc.q_clusters, kc = (uint64_t)j->desc.k_clusters;
  j->map = etk_index_take(ws, q_heads, qc * kc);
  j->q_labels = etk_index_take(ws, q_heads, 4 * (uint64_t)j->x.n + 1);
  j->k_labels = etk_index_take(ws, k_heads, 4 * (uint64_t)j->x.m + 1);
  j->q_sizes = etk_index_take(ws, q_heads, 4 * qc);
  j->k_sizes = etk_index_take(ws, k_heads, 4 * kc);
  j->ws = etk_index_take(ws, (uint64_t)workers, sizeof *j->ws);
  j->note = etk_index_take(ws, (uint64_t)workers, sizeof *j->note);
  for (int32_t w = 0; w < workers; w++) {
    head_ws head = {0};
    carve_head(ws, j, &head);
    if (j->ws) j->ws[w] = head;
  }
  return ws->overflow ? ETK_E_OVERFLOW : ETK_OK;
}

/* Codes of every row with one scale, which is returned. */
static float quantize_all(const job *j, const float *x, int64_t stride, int64_t n, const float *mu, int8_t *codes, int32_t *note) {
  const etk_index_kernel *kernel = j->x.kernel;
  float top = 0.0f;
  for (int64_t i = 0; i < n; i += ETK_BLOCK) {
    const float here = kernel->max_abs(x + i * stride, stride, (int32_t)(n - i < ETK_BLOCK ? n - i : ETK_BLOCK), j->x.d, mu);
    top = here > top ? here : top;
  }
  const float inverse = top < 1e-30f ? 0.0f : 127.0f / top;
  for (int64_t i = 0; i < n; i += ETK_BLOCK)
    kernel->quantize(x + i * stride, stride, (int32_t)(n - i < ETK_BLOCK ? n - i : ETK_BLOCK), j->x.d, j->x.dp, mu, inverse, 0,
                     codes + i * j->x.dp, note);
  return top < 1e-30f ? 0.0f : top / 127.0f;
}

static void group(const job *j, head_ws *ws, int64_t n, int32_t clusters, int32_t *label, int32_t *count, int16_t *centroid) {
  etk_kmeans x = ws->means;
  x.n = n;
  x.clusters = clusters;
  x.dp = j->x.dp;
  x.codes = ws->codes;
  x.label = label;
  x.count = count;
  x.centroid = centroid;
  etk_kmeans_run(j->x.kernel, &x, j->desc.iterations, j->desc.warm);
}

/* Key clusters of one query cluster; rivals are the key clusters that hold a key. */
static void choose(const job *j, head_ws *ws, int64_t i, int64_t rivals, float scale_q, uint8_t *row) {
  const etk_index_kernel *kernel = j->x.kernel;
  uint64_t top = 0;
  int64_t all;
  int shift = 0;
  kernel->dot_s16(ws->centroid_q + i * j->x.dp, ws->rivals, rivals, j->x.dp, ws->dot);
  kernel->weights(ws->dot, scale_q * j->tau, ws->scale, rivals, ws->weight);
  for (int64_t c = 0; c < rivals; c++) {
    const uint64_t product = (uint64_t)ws->weight[c] * (uint64_t)ws->count_k[ws->column[c]];
    top = product > top ? product : top;
  }
  while (top >> shift >= 1u << 24) shift++;
  for (int64_t c = 0; c < rivals; c++)
    ws->weight[c] = (uint32_t)(((uint64_t)ws->weight[c] * (uint64_t)ws->count_k[ws->column[c]]) >> shift) + 1;
  const uint64_t mass = kernel->mass_from(ws->weight, rivals, 0, &all);
  const int64_t share = (int64_t)ceil((double)j->desc.min_ratio * (double)rivals);
  etk_index_select(kernel, ws->weight, rivals, etk_index_target(j->desc.p, mass), share > 1 ? share : 1, ws->column, row);
}

static void run_head(void *arg, int64_t task, int worker) {
  const job *j = arg;
  const etk_index_qk *x = &j->x;
  const int32_t qc = j->desc.q_clusters, kc = j->desc.k_clusters;
  head_ws *ws = &j->ws[worker];
  int32_t *note = &j->note[worker];
  const int64_t b = task / x->hkv, per = x->hq / x->hkv;
  const float *k = etk_index_k(x, b, task % x->hkv);
  etk_index_mean(x->kernel, k, x->stride_k[2], x->m, x->d, ws->mu, ws->block, ws->total, note);
  const float scale_k = quantize_all(j, k, x->stride_k[2], x->m, ws->mu, ws->codes, note);
  group(j, ws, x->m, kc, j->k_labels + task * x->m, ws->count_k, ws->centroid_k);
  memcpy(j->k_sizes + task * kc, ws->count_k, sizeof *ws->count_k * (size_t)kc);
  int64_t rivals = 0;
  for (int32_t c = 0; c < kc; c++) {
    if (ws->count_k[c] == 0) continue;
    memcpy(ws->rivals + rivals * x->dp, ws->centroid_k + (int64_t)c * x->dp, sizeof *ws->rivals * (size_t)x->dp);
    ws->scale[rivals] = scale_k;
    ws->column[rivals++] = c;
  }
  for (int64_t h = task % x->hkv * per; h < (task % x->hkv + 1) * per; h++) {
    const int64_t head = b * x->hq + h;
    const float scale_q = quantize_all(j, etk_index_q(x, b, h), x->stride_q[2], x->n, NULL, ws->codes, note);
    group(j, ws, x->n, qc, j->q_labels + head * x->n, ws->count_q, ws->centroid_q);
    memcpy(j->q_sizes + head * qc, ws->count_q, sizeof *ws->count_q * (size_t)qc);
    memset(j->map + head * qc * kc, 0, (size_t)qc * (size_t)kc);
    for (int32_t i = 0; i < qc; i++)
      if (ws->count_q[i] > 0 && rivals > 0) choose(j, ws, i, rivals, scale_q, j->map + (head * qc + i) * kc);
  }
}

static void boundaries(const int32_t *sizes, int32_t clusters, int32_t *ptr) {
  ptr[0] = 0;
  for (int32_t c = 0; c < clusters; c++) ptr[c + 1] = ptr[c] + sizes[c];
}

/* Tokens by cluster, in their own order inside each; next: [clusters] scratch (the sizes, no longer needed). */
static void sort_tokens(const int32_t *label, int64_t n, int32_t clusters, int32_t *next, int32_t *perm, int32_t *inverse) {
  int32_t at = 0;
  for (int32_t c = 0; c < clusters; c++) {
    const int32_t size = next[c];
    next[c] = at;
    at += size;
  }
  for (int64_t i = 0; i < n; i++) {
    const int32_t to = next[label[i]]++;
    perm[to] = (int32_t)i;
    inverse[i] = to;
  }
}

static void write_clusters(job *j, const etk_cluster_arrays *to) {
  const etk_index_qk *x = &j->x;
  const int32_t qc = j->desc.q_clusters, kc = j->desc.k_clusters;
  memcpy(to->q_labels, j->q_labels, sizeof *j->q_labels * (size_t)(x->batch * x->hq * x->n));
  memcpy(to->k_labels, j->k_labels, sizeof *j->k_labels * (size_t)(x->batch * x->hkv * x->m));
  for (int64_t head = 0; head < x->batch * x->hq; head++) {
    const int64_t keys = head / x->hq * x->hkv + head % x->hq / (x->hq / x->hkv);
    boundaries(j->q_sizes + head * qc, qc, to->q_block_ptr + head * (qc + 1));
    boundaries(j->k_sizes + keys * kc, kc, to->k_block_ptr + head * (kc + 1));
    sort_tokens(j->q_labels + head * x->n, x->n, qc, j->q_sizes + head * qc, to->q_perm + head * x->n, to->q_inverse + head * x->n);
  }
  for (int64_t head = 0; head < x->batch * x->hkv; head++)
    sort_tokens(j->k_labels + head * x->m, x->m, kc, j->k_sizes + head * kc, to->k_perm + head * x->m, to->k_inverse + head * x->m);
}

/* Read and check everything but the workspace. */
static etk_status begin(const etk_clusters_desc *desc, const etk_tensor *q, const etk_tensor *k, job *j) {
  etk_status st = etk_index_desc(desc, &j->desc, sizeof j->desc);
  if (st == ETK_OK) st = etk_index_qk_read(q, k, &j->x);
  if (st != ETK_OK) return st;
  etk_clusters_desc *d = &j->desc;
  if (j->x.n > 1 << 24 || j->x.m > 1 << 24) return ETK_E_SHAPE; /* sums of codes stay inside 32 bits */
  if (d->q_clusters < 1 || d->q_clusters > 65536 || d->k_clusters < 1 || d->k_clusters > 65536) return ETK_E_RANGE;
  if (d->iterations < 0 || d->iterations > 1000 || d->warm < 0 || d->warm > 1) return ETK_E_RANGE;
  if (!(d->p >= 0.0f && d->p <= 1.0f) || !(d->min_ratio >= 0.0f && d->min_ratio <= 1.0f)) return ETK_E_RANGE;
  if (!(d->scale >= 0.0f && d->scale <= 1e6f)) return ETK_E_RANGE;
  if (d->iterations == 0) d->iterations = 4;
  j->tau = (d->scale == 0.0f ? 1.0f / sqrtf((float)j->x.d) : d->scale) * 1.44269504f / 64.0f;
  return ETK_OK;
}

etk_status etk_bsr_from_clusters_workspace(const etk_clusters_desc *desc, const etk_tensor *q, const etk_tensor *k,
                                           const etk_pool *pool, uint64_t *bytes) {
  job j;
  if (!bytes) return ETK_E_NULL;
  etk_status st = begin(desc, q, k, &j);
  if (st != ETK_OK) return st;
  etk_index_ws size = {0};
  st = carve(&size, etk_parallel_width(pool, ETK_INDEX_MAX_WORKERS), &j);
  if (st == ETK_OK) *bytes = size.at;
  return st;
}

static etk_status warm_labels(const job *j, const etk_cluster_arrays *from) {
  const int64_t q = j->x.batch * j->x.hq * j->x.n, k = j->x.batch * j->x.hkv * j->x.m;
  for (int64_t i = 0; i < q; i++)
    if (from->q_labels[i] < 0 || from->q_labels[i] >= j->desc.q_clusters) return ETK_E_RANGE;
  for (int64_t i = 0; i < k; i++)
    if (from->k_labels[i] < 0 || from->k_labels[i] >= j->desc.k_clusters) return ETK_E_RANGE;
  memcpy(j->q_labels, from->q_labels, sizeof *j->q_labels * (size_t)q);
  memcpy(j->k_labels, from->k_labels, sizeof *j->k_labels * (size_t)k);
  return ETK_OK;
}

etk_status etk_bsr_from_clusters(const etk_clusters_desc *desc, const etk_tensor *q, const etk_tensor *k,
                                 const etk_cluster_arrays *clusters, etk_index_arrays *arrays, etk_bsr *out, void *ws,
                                 uint64_t ws_bytes, const etk_pool *pool) {
  job j;
  if (!arrays) return ETK_E_NULL;
  etk_status st = begin(desc, q, k, &j);
  if (st != ETK_OK) return st;
  const etk_cluster_arrays *to = clusters;
  if (arrays->row_ptr || j.desc.warm)
    if (!to || !to->q_labels || !to->k_labels) return ETK_E_NULL;
  if (arrays->row_ptr && (!to->q_perm || !to->q_inverse || !to->k_perm || !to->k_inverse || !to->q_block_ptr || !to->k_block_ptr))
    return ETK_E_NULL;
  const int32_t workers = etk_parallel_width(pool, ETK_INDEX_MAX_WORKERS);
  etk_index_ws size = {0}, pieces = {.base = ws};
  st = carve(&size, workers, &j);
  if (st != ETK_OK) return st;
  if (!ws) return ETK_E_NULL;
  if (ws_bytes < size.at || (uintptr_t)ws % 64 != 0) return ETK_E_WORKSPACE;
  st = carve(&pieces, workers, &j);
  if (st == ETK_OK && j.desc.warm) st = warm_labels(&j, to);
  if (st != ETK_OK) return st;
  memset(j.note, 0, sizeof *j.note * (size_t)workers);
  st = etk_parallel(pool, workers, run_head, &j, j.x.batch * j.x.hkv);
  const int64_t nqb = j.desc.q_clusters, nkb = j.desc.k_clusters;
  if (st == ETK_OK) st = etk_index_from_map(j.map, j.x.batch * j.x.hq, nqb, nkb, 0, 0, 0, arrays, out);
  if (st != ETK_OK || !arrays->row_ptr) return st;
  write_clusters(&j, to);
  etk_index_heads(out, j.x.batch, j.x.hq);
  out->bq = out->bk = 0;
  out->q_block_ptr = to->q_block_ptr;
  out->k_block_ptr = to->k_block_ptr;
  out->var_stride_q = nqb + 1;
  out->var_stride_k = nkb + 1;
  for (int32_t w = 0; w < workers; w++)
    if (j.note[w]) st = ETK_NOTE_NONFINITE;
  return st;
}
