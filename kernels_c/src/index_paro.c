/* Axis order and static mask (PAROAttention's rule): the law is in index.h and index_kernel.h.
 *
 * A head's attention map is made 64 rows at a time from INT8 codes, as integers that sum to about 2^24 a row, and each
 * row is added to the blocks of all six orders while it is in cache: 6 N^2 additions a head, offline. One task per head. */
#include <math.h>
#include <string.h>

#include "index_internal.h"
#include "parallel.h"

enum { ORDERS = 6 };
/* Axes (0 frame, 1 height, 2 width), outermost first. */
static const int k_axes[ORDERS][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};

typedef struct head_ws { /* per worker */
  int8_t *codes;        /* [nkb 64][dp] of K, then 64 rows of Q */
  int8_t *codes_q;
  void *packed;
  float *mu, *block, *scale; /* [dp], [dp], [nkb 64] */
  double *total;
  int32_t *dot;         /* [64][m rounded up to 16] */
  uint32_t *weight;     /* [max(m, nkb)] */
  uint64_t *sum;        /* [6][nb][nb] */
  uint32_t *top;        /* [6][nb][nb] */
} head_ws;

typedef struct job {
  etk_index_qk x;
  etk_paro_desc desc;
  float tau;
  uint8_t *map;     /* [H][nb][nb] */
  int32_t *perm;    /* [6][N] */
  int32_t *place;   /* [6][N]: inverse */
  int32_t *order;   /* [H] */
  double *quant, *sparse; /* [H][6] */
  head_ws *ws;
  int32_t *note;
} job;

etk_status etk_paro_permutation(int32_t order, int64_t frames, int64_t height, int64_t width, int64_t text, int32_t *perm,
                                int32_t *inverse) {
  const int64_t size[3] = {frames, height, width}, limit = 1 << 24;
  if (order < 0 || order >= ORDERS) return ETK_E_RANGE;
  for (int i = 0; i < 3; i++)
    if (size[i] < 0 || size[i] > limit) return ETK_E_SHAPE;
  if (text < 0 || text > limit || frames * height > limit || frames * height * width + text > limit) return ETK_E_SHAPE;
  if (!perm && frames * height * width + text > 0) return ETK_E_NULL;
  const int64_t step[3] = {height * width, width, 1};
  const int *axis = k_axes[order];
  int64_t r = 0;
  for (; r < text; r++) perm[r] = (int32_t)r;
  for (int64_t a = 0; a < size[axis[0]]; a++)
    for (int64_t b = 0; b < size[axis[1]]; b++)
      for (int64_t c = 0; c < size[axis[2]]; c++)
        perm[r++] = (int32_t)(text + a * step[axis[0]] + b * step[axis[1]] + c * step[axis[2]]);
  for (int64_t i = 0; inverse && i < r; i++) inverse[perm[i]] = (int32_t)i;
  return ETK_OK;
}

static void carve_head(etk_index_ws *ws, const etk_index_qk *x, head_ws *out) {
  const uint64_t dp = (uint64_t)x->dp, nkb = (uint64_t)x->nkb, m = (uint64_t)x->m;
  out->codes = etk_index_take(ws, nkb * 64, dp);
  out->codes_q = etk_index_take(ws, 64, dp);
  out->packed = etk_index_take(ws, etk_index_packed(m, dp), 1);
  out->mu = etk_index_take(ws, dp, 4);
  out->block = etk_index_take(ws, dp, 4);
  out->scale = etk_index_take(ws, nkb * 64, 4);
  out->total = etk_index_take(ws, dp, 8);
  out->dot = etk_index_take(ws, 64 * ((m + 15) / 16 * 16), 4);
  out->weight = etk_index_take(ws, m, 4);
  out->sum = etk_index_take(ws, ORDERS * nkb * nkb, 8);
  out->top = etk_index_take(ws, ORDERS * nkb * nkb, 4);
}

static etk_status carve(etk_index_ws *ws, int32_t workers, job *j) {
  const uint64_t heads = (uint64_t)j->x.hq, n = (uint64_t)j->x.n;
  j->map = etk_index_take(ws, heads, (uint64_t)(j->x.nqb * j->x.nkb) + 1);
  j->perm = etk_index_take(ws, ORDERS * n, 4);
  j->place = etk_index_take(ws, ORDERS * n, 4);
  j->order = etk_index_take(ws, heads, 4);
  j->quant = etk_index_take(ws, heads * ORDERS, 8);
  j->sparse = etk_index_take(ws, heads * ORDERS, 8);
  j->ws = etk_index_take(ws, (uint64_t)workers, sizeof *j->ws);
  j->note = etk_index_take(ws, (uint64_t)workers, sizeof *j->note);
  for (int32_t w = 0; w < workers; w++) {
    head_ws head;
    carve_head(ws, &j->x, &head);
    if (j->ws) j->ws[w] = head;
  }
  return ws->overflow ? ETK_E_OVERFLOW : ETK_OK;
}

/* Add one row of the map, weight[0..n) in the tensor's order, to the blocks of each order. */
static void add_row(const job *j, head_ws *ws, int64_t i) {
  const int64_t n = j->x.n, blocks = j->x.nkb;
  for (int o = 0; o < ORDERS; o++) {
    const int64_t at = (o * blocks + j->place[o * n + i] / ETK_BLOCK) * blocks;
    const int32_t *perm = j->perm + o * n;
    for (int64_t c = 0; c < blocks; c++) {
      const int64_t stop = c * 64 + 64 < n ? c * 64 + 64 : n;
      uint32_t sum = 0, top = ws->top[at + c]; /* a row sums to at most 2^24 */
      for (int64_t r = c * 64; r < stop; r++) {
        const uint32_t a = ws->weight[perm[r]];
        sum += a;
        top = a > top ? a : top;
      }
      ws->sum[at + c] += sum;
      ws->top[at + c] = top;
    }
  }
}

static float quantize_block(const job *j, const float *x, int64_t stride, int64_t rows, const float *mu, int8_t *codes, int32_t *note) {
  const int32_t n = (int32_t)(rows < ETK_BLOCK ? rows : ETK_BLOCK);
  float inverse;
  const float scale = etk_index_scale(j->x.kernel, x, stride, n, j->x.d, mu, &inverse);
  j->x.kernel->quantize(x, stride, n, j->x.d, j->x.dp, mu, inverse, 0, codes, note);
  return scale;
}

/* All rows of one sample's map. */
static void add_map(const job *j, head_ws *ws, const float *q, const float *k, int32_t *note) {
  const etk_index_qk *x = &j->x;
  const int64_t dot_cols = (x->m + 15) / 16 * 16;
  etk_index_mean(x->kernel, k, x->stride_k[2], x->m, x->d, ws->mu, ws->block, ws->total, note);
  for (int64_t c = 0; c < x->nkb; c++) {
    const float scale = quantize_block(j, k + c * 64 * x->stride_k[2], x->stride_k[2], x->m - c * 64, ws->mu, ws->codes + c * 64 * x->dp, note);
    for (int64_t i = 0; i < 64; i++) ws->scale[c * 64 + i] = scale;
  }
  x->kernel->pack_s8(ws->codes, x->m, x->dp, ws->packed);
  for (int64_t r = 0; r < x->nqb; r++) {
    const int64_t rows = x->n - r * 64 < 64 ? x->n - r * 64 : 64;
    const float scale = quantize_block(j, q + r * 64 * x->stride_q[2], x->stride_q[2], rows, NULL, ws->codes_q, note);
    x->kernel->dot_s8(ws->codes_q, rows, ws->packed, x->m, x->dp, ws->dot, dot_cols);
    for (int64_t i = 0; i < rows; i++) {
      int64_t all;
      x->kernel->weights(ws->dot + i * dot_cols, scale * j->tau, ws->scale, x->m, ws->weight);
      const float share = 16777216.0f / (float)x->kernel->mass_from(ws->weight, x->m, 0, &all);
      for (int64_t t = 0; t < x->m; t++) ws->weight[t] = (uint32_t)(int32_t)((float)(int32_t)ws->weight[t] * share);
      add_row(j, ws, r * 64 + i);
    }
  }
}

static int64_t extent(int64_t block, int64_t n) { return n - block * 64 < 64 ? n - block * 64 : 64; }

static void measure(const job *j, const head_ws *ws, double *quant, double *sparse) {
  const int64_t blocks = j->x.nkb;
  const double eps = j->desc.eps == 0.0f ? 0.1 / (double)j->x.n : (double)j->desc.eps;
  for (int o = 0; o < ORDERS; o++) {
    double ratios = 0.0, small = 0.0;
    for (int64_t i = 0; i < blocks * blocks; i++) {
      const double area = (double)(extent(i / blocks, j->x.n) * extent(i % blocks, j->x.n) * j->x.batch);
      const double sum = (double)ws->sum[o * blocks * blocks + i];
      ratios += sum > 0.0 ? (double)ws->top[o * blocks * blocks + i] * area / sum : 1.0;
      small += sum < eps * area * 16777216.0 ? 1.0 : 0.0;
    }
    quant[o] = ratios / (double)(blocks * blocks);
    sparse[o] = small / (double)(blocks * blocks);
  }
}

static int32_t choose(const double *quant, const double *sparse, float alpha) {
  double sum_quant = 0.0, sum_sparse = 0.0, least = 0.0;
  int32_t best = 0;
  for (int o = 0; o < ORDERS; o++) {
    sum_quant += quant[o];
    sum_sparse += sparse[o];
  }
  for (int o = 0; o < ORDERS; o++) {
    const double q = quant[o] / sum_quant, s = sum_sparse > 0.0 ? sparse[o] / sum_sparse : 1.0 / ORDERS;
    const double cost = (double)alpha * q + (1.0 - (double)alpha) * (1.0 - s);
    if (o > 0 && !(cost < least)) continue;
    least = cost;
    best = o;
  }
  return best;
}

static void select_row(const job *j, head_ws *ws, const uint64_t *sum, int64_t r, uint8_t *row) {
  const int64_t blocks = j->x.nkb, text_blocks = etk_ceil_div(j->desc.text, 64);
  const int partial = j->x.n % 64 != 0;
  uint64_t largest = 0, mass = 0, forced = 0;
  int64_t number = 0;
  int shift = 0;
  if (r < text_blocks || (partial && r == blocks - 1)) {
    memset(row, 1, (size_t)blocks);
    return;
  }
  for (int64_t c = 0; c < blocks; c++) largest = sum[c] > largest ? sum[c] : largest;
  while (largest >> shift >= 1u << 24) shift++;
  for (int64_t c = 0; c < blocks; c++) {
    const uint32_t weight = (uint32_t)(sum[c] >> shift) + 1;
    mass += weight;
    ws->weight[c] = weight;
    row[c] = (uint8_t)(c < text_blocks || (partial && c == blocks - 1));
    if (!row[c]) continue;
    forced += weight;
    number++;
    ws->weight[c] = 0;
  }
  const uint64_t target = j->desc.mass > 0.0f ? etk_index_target(j->desc.mass, mass) : 0;
  const int64_t share = (int64_t)ceil((double)j->desc.density * (double)blocks), least = share > 1 ? share : 1;
  etk_index_select(j->x.kernel, ws->weight, blocks, target > forced ? target - forced : 0, least - number, NULL, row);
}

static void run_head(void *arg, int64_t h, int worker) {
  const job *j = arg;
  const int64_t blocks = j->x.nkb;
  head_ws *ws = &j->ws[worker];
  memset(ws->sum, 0, sizeof *ws->sum * (size_t)(ORDERS * blocks * blocks));
  memset(ws->top, 0, sizeof *ws->top * (size_t)(ORDERS * blocks * blocks));
  for (int64_t b = 0; b < j->x.batch; b++) add_map(j, ws, etk_index_q(&j->x, b, h), etk_index_k(&j->x, b, h), &j->note[worker]);
  measure(j, ws, j->quant + h * ORDERS, j->sparse + h * ORDERS);
  j->order[h] = choose(j->quant + h * ORDERS, j->sparse + h * ORDERS, j->desc.alpha);
  for (int64_t r = 0; r < blocks; r++)
    select_row(j, ws, ws->sum + (j->order[h] * blocks + r) * blocks, r, j->map + (h * blocks + r) * blocks);
}

/* Read and check everything but the workspace. */
static etk_status begin(const etk_paro_desc *desc, const etk_tensor *q, const etk_tensor *k, job *j) {
  etk_status st = etk_index_desc(desc, &j->desc, sizeof j->desc);
  if (st == ETK_OK) st = etk_index_qk_read(q, k, &j->x);
  if (st != ETK_OK) return st;
  const etk_paro_desc *d = &j->desc;
  if (j->x.hq != j->x.hkv) return ETK_E_UNSUPPORTED;
  const int64_t size[4] = {d->frames, d->height, d->width, d->text}, limit = 1 << 24;
  for (int i = 0; i < 4; i++)
    if (size[i] < 0 || size[i] > limit) return ETK_E_SHAPE;
  if (d->frames * d->height > limit || d->frames * d->height * d->width > limit) return ETK_E_SHAPE;
  if (j->x.n != j->x.m || j->x.n != d->text + d->frames * d->height * d->width || j->x.n < 1 || j->x.batch < 1) return ETK_E_SHAPE;
  if (!(d->scale >= 0.0f && d->scale <= 1e6f) || !(d->alpha >= 0.0f && d->alpha <= 1.0f)) return ETK_E_RANGE;
  if (!(d->eps >= 0.0f && d->eps <= 1.0f) || !(d->density >= 0.0f && d->density <= 1.0f)) return ETK_E_RANGE;
  if (!(d->mass >= 0.0f && d->mass <= 1.0f) || (d->density == 0.0f && d->mass == 0.0f)) return ETK_E_RANGE;
  j->tau = (d->scale == 0.0f ? 1.0f / sqrtf((float)j->x.d) : d->scale) * 1.44269504f;
  return ETK_OK;
}

etk_status etk_bsr_from_paro_workspace(const etk_paro_desc *desc, const etk_tensor *q, const etk_tensor *k, const etk_pool *pool,
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

etk_status etk_bsr_from_paro(const etk_paro_desc *desc, const etk_tensor *q, const etk_tensor *k, const etk_paro_arrays *paro,
                             etk_index_arrays *arrays, etk_bsr *out, void *ws, uint64_t ws_bytes, const etk_pool *pool) {
  job j;
  if (!arrays) return ETK_E_NULL;
  etk_status st = begin(desc, q, k, &j);
  if (st != ETK_OK) return st;
  if (arrays->row_ptr && (!paro || !paro->order || !paro->perm || !paro->inverse)) return ETK_E_NULL;
  const int32_t workers = etk_parallel_width(pool, ETK_INDEX_MAX_WORKERS);
  etk_index_ws size = {0}, pieces = {.base = ws};
  st = carve(&size, workers, &j);
  if (st != ETK_OK) return st;
  if (!ws) return ETK_E_NULL;
  if (ws_bytes < size.at || (uintptr_t)ws % 64 != 0) return ETK_E_WORKSPACE;
  st = carve(&pieces, workers, &j);
  const int64_t n = j.x.n, heads = j.x.hq;
  for (int32_t o = 0; st == ETK_OK && o < ORDERS; o++)
    st = etk_paro_permutation(o, j.desc.frames, j.desc.height, j.desc.width, j.desc.text, j.perm + o * n, j.place + o * n);
  if (st != ETK_OK) return st;
  memset(j.note, 0, sizeof *j.note * (size_t)workers);
  st = etk_parallel(pool, workers, run_head, &j, heads);
  if (st == ETK_OK) st = etk_index_from_map(j.map, heads, j.x.nqb, j.x.nkb, n, n, 0, arrays, out);
  if (st != ETK_OK || !arrays->row_ptr) return st;
  etk_index_heads(out, 1, heads);
  for (int64_t h = 0; h < heads; h++) {
    paro->order[h] = j.order[h];
    memcpy(paro->perm + h * n, j.perm + j.order[h] * n, sizeof *j.perm * (size_t)n);
    memcpy(paro->inverse + h * n, j.place + j.order[h] * n, sizeof *j.place * (size_t)n);
  }
  if (paro->quant) memcpy(paro->quant, j.quant, sizeof *j.quant * (size_t)(heads * ORDERS));
  if (paro->sparse) memcpy(paro->sparse, j.sparse, sizeof *j.sparse * (size_t)(heads * ORDERS));
  for (int32_t w = 0; w < workers; w++)
    if (j.note[w]) st = ETK_NOTE_NONFINITE;
  return st;
}
