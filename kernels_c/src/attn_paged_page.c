/* One unit of query rows over the pages of one chunk.
 *
 *   INT8 pages: the strip law of attn_kernel.h, g = ((scale LOG2E) sq) sk
 *   INT4 pages: q' = q s requantized per page, g = (scale LOG2E) sq', and every logit of the page is y0 = (scale LOG2E) q.(z + 8 s)
 *               higher; the strip runs with its maxima lowered by y0 and they are put back after
 *   f16 pages and the tail: widened to a float page, float strip
 * Bound by the read of the pages for few rows, by the strips for many. */
#include <math.h>
#include <string.h>

#include "attn_paged.h"

#define LOG2E 1.44269504f
#define LN2 0.693147182f

int64_t paged_page(const paged_run *r, const paged_unit *u, int64_t i) {
  const etk_tensor *g = &r->io->gather;
  if (!g->data) return i;
  int64_t h = g->dim[1] == 1 ? 0 : u->h;
  const uint8_t *at = (const uint8_t *)g->data + u->b * g->stride[0] + h * g->stride[1] + i * g->stride[2];
  return *(const int32_t *)(const void *)at;
}

/* Slots of the page that a query at pos may see by position, as bits; positions ascend. */
static uint64_t visible(const paged_run *r, const int32_t *pos, int64_t n, int64_t at) {
  const etk_attn_desc *d = r->desc;
  int64_t lo = INT64_MIN, hi = INT64_MAX;
  if (d->mask_kind & ETK_MASK_WINDOW) {
    lo = at - d->win_left;
    hi = at + d->win_right;
  }
  if ((d->mask_kind & ETK_MASK_CAUSAL) && hi > at) hi = at;
  if (pos[0] >= lo && pos[n - 1] <= hi) return ~(uint64_t)0;
  uint64_t bits = 0;
  int sinks = (d->mask_kind & ETK_MASK_WINDOW) != 0;
  for (int64_t j = 0; j < n; j++)
    if (pos[j] <= hi && (pos[j] >= lo || (sinks && pos[j] < d->sink))) bits |= (uint64_t)1 << j;
  return bits;
}

int paged_mask(const paged_run *r, const paged_lane *a, const paged_unit *u, int64_t page) {
  int64_t row = paged_row(r, u->b, u->h), n = r->cache->seq_k[row] - page * KV_SLOTS;
  uint64_t live = kv_live(r->cache, row)[page], any = 0, all = ~(uint64_t)0;
  const int32_t *pos = kv_pos(r->cache, row) + page * KV_SLOTS;
  if (n > KV_SLOTS) n = KV_SLOTS;
  if (!live) return -1;
  /* Without a window every row sees all of the pages before its own: positions ascend. */
  int by_pos = (r->desc->mask_kind & ETK_MASK_WINDOW) != 0 || ((r->desc->mask_kind & ETK_MASK_CAUSAL) && page == u->own);
  for (int32_t i = 0; i < u->n; i++) {
    uint64_t bits = by_pos ? live & visible(r, pos, n, a->pos[i * r->group]) : live;
    for (int32_t g = 0; g < r->group; g++) a->mask[i * r->group + g] = bits;
    any |= bits;
    all &= bits;
  }
  return !any ? -1 : all == ~(uint64_t)0;
}

static float read_f32(const etk_tensor *t, int64_t i0, int64_t i1, int64_t i2) {
  float x;
  int64_t at = (t->dim[0] == 1 ? 0 : i0 * t->stride[0]) + (t->rank > 1 && t->dim[1] != 1 ? i1 * t->stride[1] : 0);
  if (t->rank > 2) at += i2 * t->stride[2];
  memcpy(&x, (const uint8_t *)t->data + at, sizeof x);
  return x;
}

/* What a page is to the strips: codes and scales for INT8 arithmetic. */
typedef struct page_view {
  const void *k, *v;
  const int32_t *colsum;
  const int8_t *codes;  /* query codes that fit the page */
  const int32_t *start;
  const uint16_t *k_token; /* f16 scale of each key, or NULL */
  int32_t has_y0;
} page_view;

static page_view open_page(const paged_run *r, paged_lane *a, const paged_unit *u, int64_t page) {
  const etk_kv_cache *c = r->cache;
  const kv_geometry *g = &r->geometry;
  const uint8_t *at = kv_page_at(c, kv_blocks(c, paged_row(r, u->b, u->h))[page], u->h);
  int32_t rows = u->n * r->group;
  page_view v = {at + g->k, at + g->v, (const int32_t *)(const void *)(at + g->colsum), a->codes, a->start, NULL, 0};
  if (!r->kernel->needs_colsum) v.colsum = NULL;
  const etk_kv_kernel *kern = kv_kern(c);
  kern->widen_f16((const uint16_t *)(const void *)(at + g->v_scale), r->dv_pad, a->sv);
  if (c->desc.bits == 4) {
    const uint16_t *scale = (const uint16_t *)(const void *)at;
    kern->expand4(at + g->k, (int64_t)r->d_pad * 32, c->k_bias - 8, a->page);
    kern->expand4(at + g->v, (int64_t)r->dv_pad * 32, -8, a->page + (int64_t)r->d_pad * 64);
    for (int32_t i = 0; i < rows; i++) {
      float sq = kern->fold_q4(a->q + (int64_t)i * r->d_pad, scale, scale + r->d_pad, r->d_pad, c->k_bias != 0,
                               a->fold + (int64_t)i * r->d_pad, &a->fold_start[i], &a->y0[i]);
      a->g[i] = r->tau2 * sq;
      a->y0[i] *= r->tau2;
    }
    v.k = a->page;
    v.v = a->page + (int64_t)r->d_pad * 64;
    v.codes = a->fold;
    v.start = a->fold_start;
    v.has_y0 = 1;
  } else if (c->desc.k_scale == ETK_KV_K_PER_TOKEN) {
    v.k_token = (const uint16_t *)(const void *)at;
  } else {
    float sk;
    memcpy(&sk, at, sizeof sk);
    for (int32_t i = 0; i < rows; i++) a->g[i] = a->gq[i] * sk;
  }
  return v;
}

/* A float page from f16 storage; n slots in use. Padding channels are zero. */
static void widen_page(const paged_run *r, paged_lane *a, const uint8_t *from) {
  const etk_kv_kernel *kern = kv_kern(r->cache);
  int64_t d = r->desc->d, dv = r->desc->dv;
  kern->widen_f16((const uint16_t *)(const void *)from, d * KV_SLOTS, a->kf);
  memset(a->kf + d * KV_SLOTS, 0, (size_t)(r->d_pad - d) * KV_SLOTS * 4);
  const uint16_t *v = kv_tail_v(r->cache, from);
  if (dv == r->dv_pad) {
    kern->widen_f16(v, dv * KV_SLOTS, a->vf);
    return;
  }
  memset(a->vf, 0, (size_t)r->dv_pad * KV_SLOTS * 4);
  for (int64_t j = 0; j < KV_SLOTS; j++) kern->widen_f16(v + j * r->dv_pad, dv, a->vf + j * r->dv_pad);
}

/* A quantized page as a float page, for float arithmetic over INT8 and INT4 caches. */
static void dequantize_page(const paged_run *r, paged_lane *a, const paged_unit *u, int64_t page) {
  const etk_kv_cache *c = r->cache;
  const uint8_t *at = kv_page_at(c, kv_blocks(c, paged_row(r, u->b, u->h))[page], u->h);
  kv_page_read(c, at, kv_mu(c, r->io->kv_layer, paged_seq(r, u->b), u->h), a->scratch.kx, a->scratch.vx, &a->scratch);
  memset(a->kf, 0, (size_t)r->d_pad * KV_SLOTS * 4);
  memset(a->vf, 0, (size_t)r->dv_pad * KV_SLOTS * 4);
  for (int64_t j = 0; j < KV_SLOTS; j++) {
    for (int64_t ch = 0; ch < r->desc->d; ch++) a->kf[ch * KV_SLOTS + j] = a->scratch.kx[j * r->d_pad + ch];
    memcpy(a->vf + j * r->dv_pad, a->scratch.vx + j * r->dv_pad, (size_t)r->desc->dv * 4);
  }
}

static int is_tail(const paged_unit *u, int64_t page) { return u->own_in_tail && page == u->own; }

/* Bring the page into a->kf, a->vf. */
static void float_page(const paged_run *r, paged_lane *a, const paged_unit *u, int64_t page) {
  const etk_kv_cache *c = r->cache;
  if (is_tail(u, page)) widen_page(r, a, kv_tail_at(c, r->io->kv_layer, paged_seq(r, u->b), u->h, page));
  else if (c->desc.bits == 16) widen_page(r, a, kv_page_at(c, kv_blocks(c, paged_row(r, u->b, u->h))[page], u->h));
  else dequantize_page(r, a, u, page);
}

static etk_strip strip_at(const paged_run *r, paged_lane *a, int32_t r0, int32_t rows) {
  etk_strip s = {.rows = rows, .d_pad = r->d_pad, .dv_pad = r->dv_pad, .qf = a->qf + (int64_t)r0 * r->d_pad,
                 .k = a->kf, .v = a->vf, .sv = a->sv, .mask = a->mask + r0, .g = a->g + r0,
                 .o = a->o + (int64_t)r0 * r->dv_pad, .m = a->m + r0, .l = a->l + r0};
  return s;
}

static void use_codes(etk_strip *s, const paged_run *r, const page_view *v, int32_t r0) {
  s->q = v->codes + (int64_t)r0 * r->d_pad;
  s->q_start = v->start + r0;
  s->k = v->k;
  s->v = v->v;
  s->v_colsum = v->colsum;
}

/* Bias, soft-cap and ALiBi on logits in log2 units that are already true; then the mask. */
static void adjust(const paged_run *r, const paged_lane *a, const paged_unit *u, int64_t page, int32_t row, float *y) {
  const etk_attn_desc *d = r->desc;
  const etk_attn_io *io = r->io;
  int32_t hq = u->h * r->group + row % r->group;
  const int32_t *pos = kv_pos(r->cache, paged_row(r, u->b, u->h)) + page * KV_SLOTS;
  float slope = io->alibi_slope.data ? read_f32(&io->alibi_slope, hq, 0, 0) * LOG2E : 0.0f, cap = d->softcap * LOG2E;
  for (int j = 0; j < KV_SLOTS; j++) {
    if (!(a->mask[row] >> j & 1)) {
      y[j] = -INFINITY;
      continue;
    }
    if (cap > 0.0f) y[j] = cap * tanhf(y[j] / cap);
    if (io->key_bias.data) y[j] += read_f32(&io->key_bias, u->b, hq, page * KV_SLOTS + j) * LOG2E;
    if (slope != 0.0f) y[j] += slope * (float)(pos[j] - a->pos[row]);
  }
}

/* Logits of INT8 arithmetic in log2 units, smoothing put back. */
static void logits_s8(const paged_run *r, paged_lane *a, const page_view *v, int32_t r0, int32_t rows) {
  etk_strip s = strip_at(r, a, r0, rows);
  float token[KV_SLOTS];
  use_codes(&s, r, v, r0);
  r->kernel->qk_s8(&s, a->s);
  if (v->k_token) kv_kern(r->cache)->widen_f16(v->k_token, KV_SLOTS, token);
  for (int32_t i = 0; i < rows; i++) {
    float off = a->off[r0 + i] + (v->has_y0 ? a->y0[r0 + i] : 0.0f), gq = a->gq[r0 + i], g = a->g[r0 + i];
    for (int j = 0; j < KV_SLOTS; j++)
      a->y[i * KV_SLOTS + j] = (float)a->s[i * KV_SLOTS + j] * (v->k_token ? gq * token[j] : g) + off;
  }
}

static int float_kernel(const paged_run *r, const paged_unit *u, int64_t page) {
  return is_tail(u, page) || r->cache->desc.bits == 16 || r->desc->compute == ETK_C_F32;
}

void paged_logits(const paged_run *r, paged_lane *a, const paged_unit *u, int64_t page, int32_t r0, int32_t rows) {
  if (float_kernel(r, u, page)) {
    float_page(r, a, u, page);
    etk_strip s = strip_at(r, a, r0, rows);
    r->kernel->qk_f32(&s, a->y);
  } else {
    page_view v = open_page(r, a, u, page);
    logits_s8(r, a, &v, r0, rows);
  }
  for (int32_t i = 0; i < rows; i++) adjust(r, a, u, page, r0 + i, a->y + i * KV_SLOTS);
}

static void float_strips(const paged_run *r, paged_lane *a, const paged_unit *u, int64_t page, int full) {
  int32_t rows = u->n * r->group, mr = r->kernel->mr;
  float_page(r, a, u, page);
  for (int32_t r0 = 0; r0 < rows; r0 += mr) {
    int32_t n = rows - r0 < mr ? rows - r0 : mr;
    etk_strip s = strip_at(r, a, r0, n);
    if (full) s.mask = NULL;
    if (!(r->general & 1)) {
      r->kernel->strip_f32(&s);
      continue;
    }
    r->kernel->qk_f32(&s, a->y);
    for (int32_t i = 0; i < n; i++) adjust(r, a, u, page, r0 + i, a->y + i * KV_SLOTS);
    r->kernel->softmax_f32(&s, a->y, (float *)(void *)a->p);
    r->kernel->pv_f32(&s, (const float *)(const void *)a->p);
  }
}

/* The general path, and INT8 QK with float PV. Its maxima are true ones: nothing is added after the chunk. */
static void general_strips(const paged_run *r, paged_lane *a, const paged_unit *u, int64_t page) {
  int32_t rows = u->n * r->group, mr = r->kernel->mr, float_pv = r->desc->compute == ETK_C_S8F;
  page_view v = open_page(r, a, u, page);
  if (float_pv) dequantize_page(r, a, u, page);
  for (int32_t r0 = 0; r0 < rows; r0 += mr) {
    int32_t n = rows - r0 < mr ? rows - r0 : mr;
    logits_s8(r, a, &v, r0, n);
    for (int32_t i = 0; i < n; i++) adjust(r, a, u, page, r0 + i, a->y + i * KV_SLOTS);
    etk_strip s = strip_at(r, a, r0, n);
    if (float_pv) {
      r->kernel->softmax_f32(&s, a->y, (float *)(void *)a->p);
      r->kernel->pv_f32(&s, (const float *)(const void *)a->p);
      continue;
    }
    use_codes(&s, r, &v, r0);
    r->kernel->softmax_u8(&s, a->y, a->p, a->w);
    r->kernel->pv_s8(&s, a->p, a->w);
  }
}

/* The strip of INT8 arithmetic. For INT4 its maxima are relative to y0; a maximum that did not move is restored exactly. */
static void fast_strips(const paged_run *r, paged_lane *a, const paged_unit *u, int64_t page, int full) {
  int32_t rows = u->n * r->group, mr = r->kernel->mr;
  page_view v = open_page(r, a, u, page);
  for (int32_t r0 = 0; r0 < rows; r0 += mr) {
    int32_t n = rows - r0 < mr ? rows - r0 : mr;
    float before[ETK_MAX_MR], lowered[ETK_MAX_MR];
    etk_strip s = strip_at(r, a, r0, n);
    if (full) s.mask = NULL;
    use_codes(&s, r, &v, r0);
    s.skip_log2 = r->desc->tile_skip_log2;
    for (int32_t i = 0; v.has_y0 && i < n; i++) {
      before[i] = s.m[i];
      lowered[i] = s.m[i] = s.m[i] - a->y0[r0 + i];
    }
    r->kernel->strip_s8(&s);
    for (int32_t i = 0; v.has_y0 && i < n; i++) s.m[i] = s.m[i] == lowered[i] ? before[i] : s.m[i] + a->y0[r0 + i];
  }
}

static void ask_for(const paged_run *r, const paged_unit *u, int64_t page) {
  const etk_kv_cache *c = r->cache;
  int64_t row = paged_row(r, u->b, u->h);
  int32_t entry = page >= 0 && page <= u->own ? kv_blocks(c, row)[page] : -1;
  if (entry < 0) return;
  const uint8_t *at = kv_page_at(c, entry, u->h);
  for (uint64_t i = 0; i < c->page_bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

/* Pages of chunk list entries [first, last) at once. */
static int whole_chunk(const paged_run *r, paged_lane *a, const paged_unit *u, int64_t first, int64_t last, int64_t end) {
  const uint8_t *pages[PAGED_SPLIT + 1];
  const etk_kv_cache *c = r->cache;
  const int32_t *blocks = kv_blocks(c, paged_row(r, u->b, u->h));
  int32_t n = 0, rows = u->n * r->group, masked = 0;
  for (int64_t i = first; i < last; i++) {
    int64_t page = paged_page(r, u, i);
    if (page < 0 || page > u->own || is_tail(u, page)) continue;
    int full = paged_mask(r, a, u, page);
    if (full < 0) continue;
    memcpy(a->masks + (int64_t)n * rows, a->mask, (size_t)rows * sizeof *a->mask);
    masked |= !full;
    pages[n++] = kv_page_at(c, blocks[page], u->h);
  }
  int64_t after = last < end ? paged_page(r, u, last) : -1;
  pages[n] = after >= 0 && after <= u->own && !is_tail(u, after) ? kv_page_at(c, blocks[after], u->h) : NULL;
  if (!n) return 0;
  const etk_kv_chunk chunk = {.rows = rows, .d = r->desc->d, .d_pad = r->d_pad, .dv_pad = r->dv_pad, .n_pages = n, .pages = pages,
                              .masks = masked ? a->masks : NULL, .v_scale = r->geometry.v_scale, .k = r->geometry.k, .v = r->geometry.v,
                              
                              .q = c->desc.bits == 16 ? a->qf : a->q, .codes = a->codes, .start = a->start, .gq = a->gq, .tau2 = r->tau2,
                              .skip_log2 = r->desc->tile_skip_log2, .p_order = r->kernel->p_order, .m = a->m, .l = a->l, .o = a->o};
  r->whole(&chunk);
  return 1;
}

int paged_chunk(const paged_run *r, paged_lane *a, const paged_unit *u, int32_t chunk) {
  int32_t rows = u->n * r->group, seen = 0, tail = chunk == u->chunks, whole = !tail && r->whole, ints = whole && r->cache->desc.bits != 16;
  int64_t end = r->io->gather.data ? r->n_sel : (int64_t)u->own + 1, first = tail ? 0 : (int64_t)chunk * PAGED_SPLIT;
  int64_t last = tail || first + PAGED_SPLIT > end ? end : first + PAGED_SPLIT;
  for (int32_t i = 0; i < rows; i++) {
    a->m[i] = -INFINITY;
    a->l[i] = 0.0f;
  }
  memset(a->o, 0, (size_t)rows * (size_t)r->dv_pad * 4);
  if (tail) first = r->io->gather.data ? 0 : u->own;
  if (whole) {
    seen = whole_chunk(r, a, u, first, last, end);
    first = last;
  }
  for (int64_t i = first; i < last; i++) {
    int64_t page = paged_page(r, u, i);
    if (page < 0 || page > u->own || is_tail(u, page) != tail) continue;
    int full = paged_mask(r, a, u, page);
    if (full < 0) continue;
    seen = 1;
    if (!tail && i + 1 < last) ask_for(r, u, paged_page(r, u, i + 1));
    if (float_kernel(r, u, page)) {
      float_strips(r, a, u, page, full);
    } else if (r->general) {
      general_strips(r, a, u, page);
    } else {
      fast_strips(r, a, u, page, full);
      ints = 1;
    }
  }
  int codes = !tail && r->cache->desc.bits != 16 && r->desc->compute == ETK_C_S8S8;
  for (int32_t i = 0; i < rows && seen; i++) {
    if (ints) a->m[i] += a->off[i];
    if (codes) a->l[i] *= r->inv_p;
  }
  if (codes && seen)
    for (int64_t i = 0; i < (int64_t)rows * r->dv_pad; i++) a->o[i] *= r->inv_p;
  return seen;
}
