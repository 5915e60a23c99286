/* K and V into pages, once per (sequence, KV head), a page a task: means first (K smoothing), then codes or floats.
 *
 * The sums of a page lie in the page's own memory until they are reduced, in page order, so that the mean does not depend
 * on who summed what. */
#include <math.h>

#include "attn_plan.h"
#include "half.h"
#include "parallel.h"

/* Finite means an exponent that is not all ones; an integer loop, which any baseline vectorizes. */
static int all_finite(const float *x, int32_t n) {
  uint32_t bad = 0;
  for (int32_t i = 0; i < n; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return !bad;
}

/* NaN to 0, infinities to the largest finite magnitude of the row. */
static void sanitize(float *x, int32_t n) {
  float top = 0.0f;
  for (int32_t i = 0; i < n; i++)
    if (isfinite(x[i]) && fabsf(x[i]) > top) top = fabsf(x[i]);
  for (int32_t i = 0; i < n; i++)
    if (!isfinite(x[i])) x[i] = x[i] != x[i] ? 0.0f : x[i] > 0 ? top : -top;
}

const float *attn_row_f32(const attn_view *v, const void *row, int32_t d, float *tmp) {
  if (v->dtype == ETK_F32) return row;
  const uint16_t *h = row;
  for (int32_t c = 0; c < d; c++) tmp[c] = etk_f16_to_f32(h[c]);
  return tmp;
}

static const attn_seq *find_page(const attn_job *j, int64_t gp, int64_t *b, int64_t *hk, int64_t *page) {
  int64_t lo = 0, hi = j->desc->batch - 1;
  while (lo < hi) {
    const int64_t mid = (lo + hi + 1) / 2;
    if (j->seqs[mid].first_page <= gp) lo = mid;
    else hi = mid - 1;
  }
  const attn_seq *s = &j->seqs[lo];
  *b = lo, *hk = (gp - s->first_page) / s->pages, *page = (gp - s->first_page) % s->pages;
  return s;
}

/* Ask for the rows of the page after this one: packing reads each page in stripes, which no hardware foresees. */
static void fetch_next(const attn_job *j, const attn_view *v, const attn_seq *s, int64_t b, int64_t hk, int64_t page, int32_t d) {
  const int64_t s0 = (page + 1) * ETK_PAGE, left = s->slots - s0;
  const int64_t bytes = d * (v->dtype == ETK_F32 ? 4 : 2);
  if (attn_slots(j, b, hk)) return;
  for (int64_t i = 0; i < left && i < ETK_PAGE; i++) {
    const char *x = attn_at(v, b, hk, s->k0 + s0 + i);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(x + at, 0, 2);
  }
}

/* The rows of a page as f32 with a stride in floats: the tensor itself where it can be read in place, else a copy in tmp
 * [64][d] with rows that do not exist left out of *valid. */
static const float *page_rows(const attn_job *j, const attn_view *v, const attn_seq *s, int64_t b, int64_t hk, int64_t page,
                              int32_t d, float *tmp, int64_t *stride, int32_t *n, uint64_t *valid) {
  const int64_t s0 = page * ETK_PAGE, left = s->slots - s0, b_row = j->packed ? 0 : b;
  const int32_t *slots = attn_slots(j, b, hk);
  *n = (int32_t)(left < ETK_PAGE ? left : ETK_PAGE);
  *valid = *n == 64 ? ~UINT64_C(0) : (UINT64_C(1) << *n) - 1;
  if (!slots && v->dtype == ETK_F32) {
    *stride = *n > 1 ? v->r / 4 : d;
    return attn_at(v, b_row, hk, s->k0 + s0);
  }
  for (int32_t i = 0; i < *n; i++) {
    const int64_t row = slots ? slots[s0 + i] : s0 + i;
    float *x = tmp + (int64_t)i * d;
    if (row < 0 || row >= s->m) {
      *valid &= ~(UINT64_C(1) << i);
      memset(x, 0, (size_t)d * 4);
      continue;
    }
    const float *src = attn_row_f32(v, attn_at(v, b_row, hk, s->k0 + row), d, x);
    if (src != x) memcpy(x, src, (size_t)d * 4);
  }
  *stride = d;
  return tmp;
}

/* Column sums of the valid rows; where something is not finite, of what is. */
static void add_rows(const float *restrict x, int64_t stride, int32_t n, uint64_t valid, int32_t d, float *restrict sum) {
  int32_t i = 0;
  memset(sum, 0, (size_t)d * 4);
  for (; i + 4 <= n && (valid >> i & 15) == 15; i += 4) {
    const float *a = x + i * stride, *b = a + stride, *c = b + stride, *e = c + stride;
    for (int32_t k = 0; k < d; k++) sum[k] += (a[k] + b[k]) + (c[k] + e[k]);
  }
  for (; i < n; i++)
    for (int32_t k = 0; (valid >> i & 1) && k < d; k++) sum[k] += x[i * stride + k];
  if (all_finite(sum, d)) return;
  memset(sum, 0, (size_t)d * 4);
  for (i = 0; i < n; i++)
    for (int32_t k = 0; (valid >> i & 1) && k < d; k++) sum[k] += isfinite(x[i * stride + k]) ? x[i * stride + k] : 0.0f;
}

static void sum_task(void *arg, int64_t gp, int worker) {
  attn_job *j = arg;
  attn_lane lane = attn_lane_at(j, worker);
  int64_t b, hk, page, stride;
  int32_t n;
  uint64_t valid;
  const attn_seq *s = find_page(j, gp, &b, &hk, &page);
  if (j->smooth_k && !j->k_mean.data) {
    const float *x = page_rows(j, &j->k, s, b, hk, page, j->desc->d, lane.kx, &stride, &n, &valid);
    add_rows(x, stride, n, valid, j->desc->d, (float *)(void *)(j->kpages + (uint64_t)gp * j->plan->kbytes));
    j->valid[gp] = valid;
  }
  if (j->smooth_v) {
    const float *x = page_rows(j, &j->v, s, b, hk, page, j->desc->dv, lane.vx, &stride, &n, &valid);
    add_rows(x, stride, n, valid, j->desc->dv, (float *)(void *)(j->vpages + (uint64_t)gp * j->plan->vbytes));
    j->valid[gp] = valid;
  }
}

static void reduce_pages(const attn_job *j, const attn_seq *s, int64_t gp0, const uint8_t *pages, uint64_t bytes, int32_t d, float *mu) {
  int64_t count = 0;
  memset(mu, 0, (size_t)d * 4);
  for (int64_t p = 0; p < s->pages; p++) {
    const float *restrict sum = (const float *)(const void *)(pages + (uint64_t)(gp0 + p) * bytes);
    count += __builtin_popcountll(j->valid[gp0 + p]);
    for (int32_t c = 0; c < d; c++) mu[c] += sum[c];
  }
  for (int32_t c = 0; c < d; c++) {
    mu[c] = count ? mu[c] / (float)count : 0.0f;
    if (!isfinite(mu[c])) mu[c] = 0.0f; /* any vector is exact; this one cannot overflow */
  }
}

static void mean_task(void *arg, int64_t task, int worker) {
  (void)worker;
  attn_job *j = arg;
  const int64_t b = task / j->desc->hkv, hk = task % j->desc->hkv;
  const attn_seq *s = &j->seqs[b];
  const int64_t gp0 = s->first_page + hk * s->pages;
  float *mu_k = j->mu_k + task * j->plan->d_pad, *mu_v = j->mu_v + task * j->plan->dv_pad;
  if (j->smooth_v) reduce_pages(j, s, gp0, j->vpages, j->plan->vbytes, j->desc->dv, mu_v);
  if (!j->k_mean.data) {
    if (j->smooth_k) reduce_pages(j, s, gp0, j->kpages, j->plan->kbytes, j->desc->d, mu_k);
    return;
  }
  memcpy(mu_k, attn_at(&j->k_mean, b, hk, 0), (size_t)j->desc->d * 4);
  for (int32_t c = 0; c < j->desc->d; c++)
    if (!isfinite(mu_k[c])) mu_k[c] = 0.0f, atomic_store_explicit(&j->nonfinite, 1, memory_order_relaxed);
}

/* Float pages: K [d_pad][64], V [64][dv_pad], padding zero. */
static void float_k(const float *x, int64_t stride, int32_t n, int32_t d, int32_t d_pad, float *restrict out) {
  memset(out, 0, (size_t)d_pad * ETK_PAGE * 4);
  for (int32_t i0 = 0; i0 < n; i0 += 16) /* 16 keys: one line of each output row */
    for (int32_t c = 0; c < d; c++)
      for (int32_t i = i0; i < n && i < i0 + 16; i++) out[c * ETK_PAGE + i] = x[i * stride + c];
}

static void float_v(const float *x, int64_t stride, int32_t n, int32_t dv, int32_t dv_pad, float *restrict out) {
  memset(out, 0, (size_t)dv_pad * ETK_PAGE * 4);
  for (int32_t i = 0; i < n; i++) memcpy(out + (int64_t)i * dv_pad, x + i * stride, (size_t)dv * 4);
}

/* For float pages: rows with NaN or infinity are replaced by clean copies; x moves to tmp then. */
static const float *clean(const float *x, int64_t *stride, int32_t n, int32_t d, float *tmp, int32_t *bad) {
  int32_t i = 0;
  while (i < n && all_finite(x + i * *stride, d)) i++;
  if (i == n) return x;
  *bad = 1;
  for (i = 0; i < n; i++) {
    if (x != tmp) memcpy(tmp + (int64_t)i * d, x + i * *stride, (size_t)d * 4);
    sanitize(tmp + (int64_t)i * d, d);
  }
  *stride = d;
  return tmp;
}

static void place_page(attn_job *j, const attn_seq *s, int64_t b, int64_t hk, int64_t page, int64_t gp, uint64_t valid) {
  j->valid[gp] = valid;
  if (!j->explicit_k) return;
  const int32_t *slots = attn_slots(j, b, hk);
  int64_t lo = ATTN_POS_LIMIT, hi = -ATTN_POS_LIMIT, *pos = j->kpos + gp * ETK_PAGE;
  for (int32_t i = 0; i < ETK_PAGE; i++) {
    pos[i] = 0;
    if (!(valid >> i & 1)) continue;
    const int64_t slot = page * ETK_PAGE + i, row = slots ? slots[slot] : slot;
    pos[i] = j->k_pos.data ? attn_clamp_pos(attn_int(&j->k_pos, j->packed ? 0 : b, hk, s->k0 + row)) : row;
    if (pos[i] < lo) lo = pos[i];
    if (pos[i] > hi) hi = pos[i];
  }
  j->page_pos[2 * gp] = lo, j->page_pos[2 * gp + 1] = hi;
}

static void pack_values(attn_job *j, const attn_seq *s, int64_t b, int64_t hk, int64_t page, int64_t gp, attn_lane *lane, int32_t *bad) {
  const etk_attn_plan *p = j->plan;
  const int32_t dv = j->desc->dv;
  int64_t stride;
  int32_t n;
  uint64_t valid;
  const float *x = page_rows(j, &j->v, s, b, hk, page, dv, lane->vx, &stride, &n, &valid);
  void *out = j->vpages + (uint64_t)gp * p->vbytes;
  if (p->int8_pv) {
    int32_t *colsum = j->colsum ? j->colsum + gp * p->dv_pad : NULL;
    const float *mu = j->smooth_v ? j->mu_v + (b * j->desc->hkv + hk) * p->dv_pad : NULL;
    j->kernel->pack_v(x, stride, n, dv, p->dv_pad, mu, out, j->sv + gp * p->dv_pad, colsum, 0, bad);
  } else {
    x = clean(x, &stride, n, dv, lane->vx, bad);
    float_v(x, stride, n, dv, p->dv_pad, out);
  }
}

static void pack_task(void *arg, int64_t gp, int worker) {
  attn_job *j = arg;
  const etk_attn_plan *p = j->plan;
  const int32_t d = j->desc->d;
  attn_lane lane = attn_lane_at(j, worker);
  int64_t b, hk, page, stride;
  int32_t n, bad = 0;
  uint64_t valid;
  if (j->sparse_pack && !j->needed[gp]) return;
  const attn_seq *s = find_page(j, gp, &b, &hk, &page);
  fetch_next(j, &j->k, s, b, hk, page, d);
  if (!j->weights) fetch_next(j, &j->v, s, b, hk, page, j->desc->dv);
  const float *x = page_rows(j, &j->k, s, b, hk, page, d, lane.kx, &stride, &n, &valid);
  void *out = j->kpages + (uint64_t)gp * p->kbytes;
  if (p->int8_qk) {
    const float *mu = j->smooth_k ? j->mu_k + (b * j->desc->hkv + hk) * p->d_pad : NULL;
    j->kscale[gp] = j->kernel->pack_k(x, stride, n, d, p->d_pad, mu, out, &bad);
  } else {
    x = clean(x, &stride, n, d, lane.kx, &bad);
    float_k(x, stride, n, d, p->d_pad, out);
  }
  place_page(j, s, b, hk, page, gp, valid);
  if (!j->weights) pack_values(j, s, b, hk, page, gp, &lane, &bad);
  if (bad) atomic_store_explicit(&j->nonfinite, 1, memory_order_relaxed);
}

static void mark_listed(attn_job *j) {
  const etk_bsr *x = &j->io.bsr;
  if (x->nqb == 0) return; /* no queries: strides and patterns are not checked then */
  for (int64_t b = 0; b < j->desc->batch; b++)
    for (int64_t h = 0; h < j->desc->hq; h++) {
      const attn_seq *s = &j->seqs[b];
      uint8_t *at = j->needed + s->first_page + h / j->plan->group * s->pages;
      const int64_t row = x->head_pattern ? (int64_t)x->head_pattern[h] * x->nqb : b * x->stride_b + h * x->stride_h;
      if (row < 0) memset(at, 1, (size_t)s->pages);
      else
        for (int64_t i = x->row_ptr[row]; i < x->row_ptr[row + x->nqb]; i++)
          if (x->col[i] < s->pages) at[x->col[i]] = 1;
    }
}

/* Few queries and a window: the pages between the first query's left end and the last one's right end, and the sink's. */
static void mark_window(attn_job *j) {
  for (int64_t b = 0; b < j->desc->batch; b++) {
    const attn_seq *s = &j->seqs[b];
    const int64_t first = s->m - s->n - j->win_left, last = s->m - 1 + j->win_right;
    for (int64_t p = 0; p < s->pages; p++) {
      const int64_t k0 = p * ETK_PAGE;
      const int seen = (k0 + ETK_PAGE > first && k0 <= last) || k0 < j->sink;
      for (int64_t hk = 0; hk < j->desc->hkv; hk++) j->needed[s->first_page + hk * s->pages + p] = (uint8_t)seen;
    }
  }
}

/* Which pages any tile can name, where that is cheap to know. */
static void mark_needed(attn_job *j) {
  const int bsr = (j->desc->mask_kind & ETK_MASK_BSR) != 0, listed = bsr && j->io.bsr.bq == 64;
  const int window = !bsr && (j->desc->mask_kind & ETK_MASK_WINDOW) && !j->q_pos.data;
  j->sparse_pack = (listed || window) && !j->explicit_k;
  if (!j->sparse_pack) return;
  memset(j->needed, 0, (size_t)j->npages);
  if (listed) mark_listed(j);
  else mark_window(j);
}

etk_status attn_pack(attn_job *j, const etk_pool *pool) {
  const int32_t w = j->plan->nthreads;
  etk_status st = ETK_OK;
  mark_needed(j);
  if ((j->smooth_k && !j->k_mean.data) || j->smooth_v) st = etk_parallel(pool, w, sum_task, j, j->npages);
  if (st == ETK_OK && (j->smooth_k || j->smooth_v)) st = etk_parallel(pool, w, mean_task, j, (int64_t)j->desc->batch * j->desc->hkv);
  return st == ETK_OK ? etk_parallel(pool, w, pack_task, j, j->npages) : st;
}

/* CHECK_FINITE: rows of q, k and v; a task is a (sequence, head) of one of them. */
static void finite_task(void *arg, int64_t task, int worker) {
  attn_job *j = arg;
  attn_lane lane = attn_lane_at(j, worker);
  const etk_attn_desc *d = j->desc;
  const int64_t heads = (int64_t)d->hq + 2 * d->hkv, b = task / heads, h = task % heads;
  const attn_seq *s = &j->seqs[b];
  const int which = h < d->hq ? 0 : h < d->hq + d->hkv ? 1 : 2;
  const attn_view *v = which == 0 ? &j->q : which == 1 ? &j->k : &j->v;
  const int64_t head = which == 0 ? h : (h - d->hq) % d->hkv, rows = which == 0 ? s->n : s->m, r0 = which == 0 ? s->q0 : s->k0;
  if (!v->data) return;
  for (int64_t r = 0; r < rows; r++) {
    const float *x = attn_row_f32(v, attn_at(v, j->packed ? 0 : b, head, r0 + r), which == 2 ? d->dv : d->d, lane.x);
    if (!all_finite(x, which == 2 ? d->dv : d->d)) atomic_store_explicit(&j->nonfinite, 1, memory_order_relaxed);
  }
}

etk_status attn_check_finite(attn_job *j, const etk_pool *pool) {
  const int64_t heads = (int64_t)j->desc->hq + 2 * j->desc->hkv;
  const etk_status st = etk_parallel(pool, j->plan->nthreads, finite_task, j, j->desc->batch * heads);
  if (st != ETK_OK) return st;
  return atomic_load_explicit(&j->nonfinite, memory_order_relaxed) ? ETK_E_NONFINITE : ETK_OK;
}
