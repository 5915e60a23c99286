/* Keys chosen by score alone, for policies that read a part of the cache.
 *
 *   q = mean of the N queries;  s[h, j] = scale q[h] . k[j];  p[h] = softmax(s[h]) (or s[h] itself);  score[j] = sum_h p[h, j] over the
 *   heads of a KV head (or all);  score[j] = max over |i - j| <= pool_width / 2;  the k largest, lower index first among equals
 * Two passes: a task per (batch, KV head) forms its scores, a task per list selects by radix on ordered bits. Bound by the
 * read of K. */
#include <math.h>
#include <string.h>

#include "attn_paged.h"
#include "attn_paged_core.h"
#include "attn_plan.h"
#include "checked.h"
#include "half.h"
#include "parallel.h"
#include "tensor.h"

typedef struct select_run {
  const etk_attn_plan *plan;
  const etk_attn_io *io;
  etk_select_desc want;
  paged_run paged;        /* PAGED only */
  etk_attn_desc desc;     /* the plan's, without masks and outputs */
  etk_attn_io mean_io;
  int64_t n, m, lists;    /* queries, most keys, lists of a batch row */
  float *mean;            /* [B][Hq][d] */
  float *score;           /* [B][Hkv][m] */
  float *logits;          /* [workers][group][m] */
  etk_tensor *out;
} select_run;

typedef struct select_layout {
  uint64_t lanes, mean, score, logits, bytes;
} select_layout;

static etk_status lay_out(const etk_attn_plan *p, select_layout *at) {
  const etk_attn_desc *d = &p->desc;
  etk_carve c = {0};
  uint64_t heads = (uint64_t)d->batch * (uint64_t)d->hq, lists = (uint64_t)d->batch * (uint64_t)d->hkv, lane = 0, rows;
  if (d->kv_layout == ETK_KV_PAGED) {
    etk_attn_desc one = *d;
    one.max_n = 1;
    etk_status st = etk_paged_workspace(&one, p->kernel, p->nthreads, &lane);
    if (st < 0) return st;
  }
  at->lanes = etk_take(&c, lane, 1);
  at->mean = etk_take(&c, heads, (uint64_t)d->d * 4);
  if (etk_mul((uint64_t)d->max_m, 4, &rows)) return ETK_E_OVERFLOW;
  at->score = etk_take(&c, lists, rows);
  if (etk_mul((uint64_t)p->nthreads, (uint64_t)p->group, &lists)) return ETK_E_OVERFLOW;
  at->logits = etk_take(&c, lists, rows);
  at->bytes = c.used;
  return c.bad ? ETK_E_OVERFLOW : ETK_OK;
}

etk_status etk_attn_select_workspace(const etk_attn_plan *plan, uint64_t *bytes, uint64_t *align) {
  select_layout at;
  if (!plan || !bytes || !align) return ETK_E_NULL;
  etk_status st = lay_out(plan, &at);
  if (st < 0) return st;
  *bytes = at.bytes;
  *align = 64;
  return ETK_OK;
}

static float element(const etk_tensor *t, int64_t b, int64_t h, int64_t i, int64_t c) {
  const uint8_t *p = (const uint8_t *)t->data + b * t->stride[0] + h * t->stride[1] + i * t->stride[2];
  const float x = t->dtype == ETK_F32 ? ((const float *)(const void *)p)[c] : etk_f16_to_f32(((const uint16_t *)(const void *)p)[c]);
  return fabsf(x) <= 3.0e38f ? x : 0.0f; /* NaN and infinities count for nothing */
}

static void mean_queries(const select_run *r) {
  const etk_attn_desc *d = &r->plan->desc;
  for (int64_t b = 0; b < d->batch; b++)
    for (int64_t h = 0; h < d->hq; h++)
      for (int64_t c = 0; c < d->d; c++) {
        double sum = 0.0;
        for (int64_t i = 0; i < r->n; i++) sum += (double)element(&r->io->q, b, h, i, c);
        r->mean[(b * d->hq + h) * d->d + c] = (float)(sum / (double)r->n);
      }
}

/* Keys of (b, hk): of the tensor or of the cache. */
static int64_t keys_of(const select_run *r, int64_t b, int64_t hk) {
  if (r->plan->desc.kv_layout == ETK_KV_PAGED) return r->io->kv->seq_k[paged_row(&r->paged, (int32_t)b, (int32_t)hk)];
  if (!r->io->seq_k.data) return r->io->k.dim[2];
  return *(const int32_t *)(const void *)((const uint8_t *)r->io->seq_k.data + b * r->io->seq_k.stride[0]);
}

static void dense_logits(const select_run *r, int64_t b, int64_t hk, int64_t m, float *y) {
  const etk_attn_desc *d = &r->plan->desc;
  const int64_t group = r->plan->group;
  for (int64_t j = 0; j < m; j++) {
    float key[ATTN_MAX_D];
    for (int64_t c = 0; c < d->d; c++) key[c] = element(&r->io->k, b, hk, j, c);
    for (int64_t g = 0; g < group; g++) {
      const float *q = r->mean + (b * d->hq + hk * group + g) * d->d;
      float sums[16] = {0}, tail = 0.0f;
      int64_t c = 0;
      for (; c + 16 <= d->d; c += 16)
        for (int i = 0; i < 16; i++) sums[i] += q[c + i] * key[c + i];
      for (; c < d->d; c++) tail += q[c] * key[c];
      for (int i = 0; i < 16; i++) tail += sums[i];
      y[g * r->m + j] = tail * r->plan->scale;
    }
  }
}

static void paged_scores(const select_run *r, int64_t b, int64_t hk, int64_t m, int worker, float *y) {
  paged_lane a = paged_lane_at(&r->paged, worker);
  const int64_t pages = kv_pages_of(m), row = paged_row(&r->paged, (int32_t)b, (int32_t)hk);
  const paged_unit u = {(int32_t)b, (int32_t)hk, 0, 1, (int32_t)(pages - 1), pages > 0 && kv_in_tail(r->io->kv, row, pages - 1), 0, 0};
  const int32_t group = r->plan->group, mr = r->plan->kernel->mr;
  paged_load(&r->paged, &a, &u);
  for (int64_t page = 0; page < pages; page++) {
    const int64_t n = m - page * KV_SLOTS < KV_SLOTS ? m - page * KV_SLOTS : KV_SLOTS;
    const int visible = paged_mask(&r->paged, &a, &u, page) >= 0;
    for (int32_t r0 = 0; r0 < group; r0 += mr) {
      const int32_t rows = group - r0 < mr ? group - r0 : mr;
      if (visible) paged_logits(&r->paged, &a, &u, page, r0, rows);
      for (int32_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < n; j++)
          y[(r0 + i) * r->m + page * KV_SLOTS + j] = visible ? a.y[i * KV_SLOTS + j] * ATTN_LN2 : -INFINITY;
    }
  }
}

static void score_task(void *arg, int64_t task, int worker) {
  const select_run *r = arg;
  const int64_t b = task / r->plan->desc.hkv, hk = task % r->plan->desc.hkv, m = keys_of(r, b, hk), group = r->plan->group;
  float *y = r->logits + (int64_t)worker * group * r->m, *score = r->score + task * r->m;
  if (r->plan->desc.kv_layout == ETK_KV_PAGED) paged_scores(r, b, hk, m, worker, y);
  else dense_logits(r, b, hk, m, y);
  for (int64_t j = 0; j < m; j++) score[j] = y[j] == -INFINITY ? -INFINITY : 0.0f;
  for (int64_t g = 0; g < group; g++) {
    float *s = y + g * r->m, top = -INFINITY;
    double sum = 0.0;
    for (int64_t j = 0; j < m; j++) top = s[j] > top ? s[j] : top;
    if (top == -INFINITY) continue;
    for (int64_t j = 0; j < m && r->want.softmax; j++) sum += (double)(s[j] = expf(s[j] - top));
    const float norm = r->want.softmax ? (float)(1.0 / sum) : 1.0f;
    for (int64_t j = 0; j < m; j++)
      if (score[j] != -INFINITY) score[j] += s[j] * norm;
  }
}

/* The order of floats as unsigned integers; NaN does not occur. */
static uint32_t rank_of(float x) {
  uint32_t u;
  x += 0.0f; /* -0 is 0 */
  memcpy(&u, &x, sizeof u);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* Mark the k largest of the n finite scores that are not marked yet; lower index first among equals. */
static void mark_best(const float *score, int64_t n, int64_t k, uint8_t *mark) {
  uint32_t prefix = 0;
  int64_t left = k, candidates = 0;
  for (int64_t j = 0; j < n; j++) candidates += !mark[j] && score[j] > -INFINITY;
  if (left > candidates) left = candidates;
  if (left <= 0) return;
  for (int shift = 24; shift >= 0; shift -= 8) { /* digit by digit: the rank of the left-th largest */
    int64_t count[256] = {0};
    int digit = 255;
    for (int64_t j = 0; j < n; j++) {
      const uint32_t rank = rank_of(score[j]);
      if (!mark[j] && score[j] > -INFINITY && (shift == 24 || rank >> (shift + 8) == prefix)) count[rank >> shift & 255]++;
    }
    for (; count[digit] < left; digit--) left -= count[digit];
    prefix = prefix << 8 | (uint32_t)digit;
  }
  for (int64_t j = 0; j < n; j++) {
    const uint32_t rank = rank_of(score[j]);
    if (mark[j] || !(score[j] > -INFINITY) || rank < prefix) continue;
    if (rank > prefix) mark[j] = 1;
    else if (left > 0) left--, mark[j] = 1;
  }
}

/* score becomes its maximum over a window; keys that are not there stay so. tmp [n]. */
static void pool_scores(float *score, int64_t n, int64_t width, float *tmp) {
  if (width <= 1) return;
  for (int64_t j = 0; j < n; j++) {
    const int64_t lo = j - width / 2 < 0 ? 0 : j - width / 2, hi = j + width / 2 >= n ? n - 1 : j + width / 2;
    float top = score[j];
    for (int64_t i = lo; i <= hi && score[j] > -INFINITY; i++) top = score[i] > top ? score[i] : top;
    tmp[j] = top;
  }
  memcpy(score, tmp, (size_t)n * sizeof *score);
}

/* Scores of keys to scores of pages: the best key; marks to pages likewise. */
static int64_t to_pages(float *score, uint8_t *mark, int64_t n) {
  const int64_t pages = kv_pages_of(n);
  for (int64_t p = 0; p < pages; p++) {
    float top = -INFINITY;
    uint8_t any = 0;
    for (int64_t j = p * KV_SLOTS; j < n && j < (p + 1) * KV_SLOTS; j++) {
      top = score[j] > top ? score[j] : top;
      any |= mark[j];
    }
    score[p] = top;
    mark[p] = any;
  }
  return pages;
}

static void choose_task(void *arg, int64_t task, int worker) {
  const select_run *r = arg;
  const etk_select_desc *w = &r->want;
  const int64_t hkv = r->plan->desc.hkv, b = task / r->lists, list = task % r->lists;
  float *score = r->score + (b * hkv + list) * r->m, *tmp = r->logits + (int64_t)worker * r->plan->group * r->m;
  int64_t n = keys_of(r, b, list), local;
  if (w->sum_heads)
    for (int64_t h = 1; h < hkv; h++)
      for (int64_t j = 0; j < n; j++) score[j] += r->score[(b * hkv + h) * r->m + j];
  pool_scores(score, n, w->pool_width, tmp);
  uint8_t *mark = (uint8_t *)tmp;
  local = n - w->n_local < 0 ? 0 : n - w->n_local;
  for (int64_t j = 0; j < n; j++) mark[j] = (j < w->n_init || j >= local) && score[j] > -INFINITY;
  if (w->round_pages) n = to_pages(score, mark, n);
  mark_best(score, n, w->round_pages ? ((int64_t)w->k + KV_SLOTS - 1) / KV_SLOTS : w->k, mark);
  uint8_t *out = (uint8_t *)r->out->data + b * r->out->stride[0] + list * r->out->stride[1];
  int64_t at = 0;
  for (int64_t j = 0; j < n; j++)
    if (mark[j]) *(int32_t *)(void *)(out + 4 * at++) = (int32_t)j;
  for (; at < r->out->dim[2]; at++) *(int32_t *)(void *)(out + 4 * at) = -1;
}

static etk_status check_dense(const etk_attn_desc *d, const etk_attn_io *io, int64_t *m) {
  etk_status st = etk_tensor_in(&io->k, 4, ETK_DT(ETK_F32) | ETK_DT(ETK_F16));
  if (st < 0) return st;
  *m = io->k.dim[2];
  if (io->k.dim[0] != d->batch || io->k.dim[1] != d->hkv || io->k.dim[3] != d->d || *m > d->max_m) return ETK_E_SHAPE;
  if (etk_absent(&io->seq_k)) return ETK_OK;
  if ((st = etk_tensor_in(&io->seq_k, 1, ETK_DT(ETK_I32))) < 0) return st;
  if (io->seq_k.dim[0] != d->batch) return ETK_E_SHAPE;
  for (int64_t b = 0; b < d->batch; b++) {
    const int32_t n = *(const int32_t *)(const void *)((const uint8_t *)io->seq_k.data + b * io->seq_k.stride[0]);
    if (n < 0 || n > *m) return ETK_E_RANGE;
  }
  return ETK_OK;
}

/* The most entries a list can have. */
static int64_t most_selected(const etk_select_desc *w, int64_t m) {
  const int64_t k = w->k, a = w->n_init, z = w->n_local, pages = kv_pages_of(m);
  const int64_t n = w->round_pages ? kv_pages_of(k) + kv_pages_of(a) + kv_pages_of(z) + (z > 0) : k + a + z, all = w->round_pages ? pages : m;
  return n < all ? n : all;
}

static etk_status check(select_run *r, const etk_select_desc *select, const etk_tensor *idx_out) {
  const etk_attn_desc *d = &r->plan->desc;
  etk_status st = etk_struct_in(&r->want, sizeof r->want, select);
  if (st < 0) return st;
  const etk_select_desc *w = &r->want;
  if (w->k < 0 || w->pool_width < 0 || w->pool_width > 1023 || (w->pool_width && w->pool_width % 2 == 0) || w->n_init < 0 || w->n_local < 0 ||
      (w->sum_heads | w->softmax | w->round_pages) >> 1)
    return ETK_E_RANGE;
  if ((st = etk_tensor_in(&r->io->q, 4, ETK_DT(ETK_F32) | ETK_DT(ETK_F16))) < 0) return st;
  r->n = r->io->q.dim[2];
  if (r->io->q.dim[0] != d->batch || r->io->q.dim[1] != d->hq || r->io->q.dim[3] != d->d || r->n < 1 || r->n > d->max_n) return ETK_E_SHAPE;
  if ((st = etk_tensor_out(idx_out, 3, ETK_DT(ETK_I32))) < 0) return st;
  r->lists = w->sum_heads ? 1 : d->hkv;
  if (idx_out->dim[0] != d->batch || idx_out->dim[1] != r->lists) return ETK_E_SHAPE;
  if (d->kv_layout != ETK_KV_PAGED && (st = check_dense(d, r->io, &r->m)) < 0) return st;
  return ETK_OK;
}

/* One query per head, every live slot: the shape of the paged driver's own units. */
static etk_status begin_paged(select_run *r, void *ws) {
  r->desc = r->plan->desc;
  r->desc.mask_kind = ETK_MASK_NONE;
  r->desc.flags = 0;
  r->desc.max_n = 1;
  r->desc.softcap = r->desc.clip_gamma = r->desc.clip_zeta = 0.0f;
  const int64_t d = r->desc.d, hq = r->desc.hq, bytes = r->desc.batch * hq * d * 4;
  const etk_tensor q = {.data = r->mean, .dtype = ETK_F32, .rank = 4, .dim = {r->desc.batch, hq, 1, d},
                        .stride = {hq * d * 4, d * 4, d * 4, 4}, .capacity = (uint64_t)bytes};
  r->mean_io = (etk_attn_io){.struct_size = sizeof r->mean_io, .q = q, .kv = r->io->kv, .kv_layer = r->io->kv_layer, .kv_seq = r->io->kv_seq};
  etk_status st = etk_paged_check_cache(&r->desc, r->plan->kernel, &r->mean_io, &r->m);
  if (st >= 0) r->paged = paged_begin(&r->desc, r->plan->kernel, r->plan->nthreads, &r->mean_io, ws);
  return st;
}

etk_status etk_attn_select(const etk_attn_plan *plan, const etk_attn_io *io, const etk_select_desc *select, etk_tensor *idx_out, void *ws,
                           uint64_t ws_bytes, const etk_pool *pool) {
  if (!plan || !io || !select || !idx_out || !ws) return ETK_E_NULL;
  select_run r = {.plan = plan, .io = io, .out = idx_out};
  select_layout at;
  etk_attn_io full;
  etk_status st = etk_struct_in(&full, sizeof full, io);
  if (st < 0) return st;
  r.io = &full;
  if ((st = check(&r, select, idx_out)) < 0 || (st = lay_out(plan, &at)) < 0) return st;
  if (ws_bytes < at.bytes || (uintptr_t)ws % 64) return ETK_E_WORKSPACE;
  uint8_t *base = ws;
  r.mean = (float *)(void *)(base + at.mean);
  r.score = (float *)(void *)(base + at.score);
  r.logits = (float *)(void *)(base + at.logits);
  if (plan->desc.kv_layout == ETK_KV_PAGED) {
    if ((st = begin_paged(&r, base + at.lanes)) < 0) return st;
    if (r.want.sum_heads)
      for (int32_t b = 0; b < plan->desc.batch; b++) /* one list for all heads needs equal slots in all of them */
        for (int32_t h = 1; h < plan->desc.hkv; h++)
          if (keys_of(&r, b, h) != keys_of(&r, b, 0)) return ETK_E_SHAPE;
  }
  if (idx_out->dim[2] < most_selected(&r.want, r.m)) return ETK_E_SHAPE;
  mean_queries(&r);
  st = etk_parallel(pool, plan->nthreads, score_task, &r, (int64_t)plan->desc.batch * plan->desc.hkv);
  return st < 0 ? st : etk_parallel(pool, plan->nthreads, choose_task, &r, plan->desc.batch * r.lists);
}
