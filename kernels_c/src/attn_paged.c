/* Attention over a paged KV cache: units of rows, chunks of pages, the split over workers and the final reduction.
 *
 * Row i of a call stands at q_pos[i], by default next_pos - N + i: the last N tokens appended. It reads the page of its own slot
 * from the f16 tail and every earlier page quantized; a row whose own page has left the tail is refused (append and attend in
 * pieces of at most 64 * (tail_pages - 1) + 1 tokens), so that prefill in any pieces gives the bits of decode.
 *
 * Two ways to share the work, the same bits: with few units each chunk is an item of one line that is cut into equal contiguous
 * runs (stream-K), partials meet in a second pass; with many units a task does all chunks of one unit. */
#include <math.h>
#include <string.h>

#include "attn_paged.h"
#include "attn_paged_core.h"
#include "parallel.h"

#define LOG2E 1.44269504f
#define LN2 0.693147182f

enum { RUNS_PER_WORKER = 4 };

static uint64_t up64(uint64_t x) { return (x + 63) & ~(uint64_t)63; }

static int32_t pad_head(int32_t d) { return (d + ETK_HEAD_UNIT - 1) / ETK_HEAD_UNIT * ETK_HEAD_UNIT; }

/* Carve a lane; with base NULL only the size matters. */
static uint64_t carve_lane(const paged_run *r, uint8_t *base, paged_lane *a) {
  uint64_t rows = (uint64_t)r->rows_max, d = (uint64_t)r->d_pad, dv = (uint64_t)r->dv_pad, mr = (uint64_t)r->kernel->mr, at = 0;
#define TAKE(field, type, count)                  \
  do {                                            \
    if (base) a->field = (type *)(void *)(base + at); \
    at += up64((count) * sizeof(type));           \
  } while (0)
  TAKE(q, float, rows * d);
  TAKE(qf, float, rows * d);
  TAKE(codes, int8_t, rows * d);
  TAKE(start, int32_t, rows);
  TAKE(gq, float, rows);
  TAKE(off, float, rows);
  TAKE(pos, int64_t, rows);
  TAKE(fold, int8_t, rows * d);
  TAKE(fold_start, int32_t, rows);
  TAKE(g, float, rows);
  TAKE(y0, float, rows);
  TAKE(mask, uint64_t, rows);
  TAKE(masks, uint64_t, rows * PAGED_SPLIT);
  TAKE(m, float, rows);
  TAKE(l, float, rows);
  TAKE(o, float, rows * dv);
  TAKE(am, float, rows);
  TAKE(al, float, rows);
  TAKE(ao, float, rows * dv);
  TAKE(sv, float, dv);
  TAKE(colsum, int32_t, dv);
  TAKE(page, uint8_t, (d + dv) * 64);
  TAKE(kf, float, d * 64);
  TAKE(vf, float, dv * 64);
  TAKE(y, float, mr * 64);
  TAKE(w, float, mr);
  TAKE(s, int32_t, mr * 64);
  TAKE(p, uint8_t, mr * 64 * 4);
  TAKE(scratch.kx, float, d * 64);
  TAKE(scratch.vx, float, dv * 64);
  TAKE(scratch.scales, float, 2 * d + dv + KV_SLOTS);
  TAKE(scratch.codes, int8_t, (d + dv) * 64);
  TAKE(scratch.laid, int8_t, (d > dv ? d : dv) * 64);
#undef TAKE
  return at;
}

uint64_t paged_lane_bytes(const paged_run *r) {
  paged_lane none;
  return carve_lane(r, NULL, &none);
}

paged_lane paged_lane_at(const paged_run *r, int worker) {
  paged_lane a = {0};
  (void)carve_lane(r, r->lanes + (uint64_t)worker * r->lane_bytes, &a);
  return a;
}

/* Query rows i of one unit, at most. */
static int32_t unit_rows(int32_t group) { return group >= PAGED_ROWS ? 1 : PAGED_ROWS / group; }

typedef struct sizes {
  uint64_t units, chunks, lse, partial_floats, bytes;
} sizes;

/* Most units and most chunks that are items of their own. Units of one KV head: full ones, and one broken by each page end. */
static etk_status measure(const etk_attn_desc *d, const etk_attn_kernel *kernel, int32_t nthreads, sizes *out) {
  paged_run r = {.desc = d, .kernel = kernel, .group = d->hq / d->hkv, .d_pad = pad_head(d->d), .dv_pad = pad_head(d->dv)};
  int32_t per_unit = unit_rows(r.group);
  r.rows_max = per_unit * r.group;
  uint64_t per_head = ((uint64_t)d->max_n + (uint64_t)per_unit - 1) / (uint64_t)per_unit + ETK_KV_MAX_TAIL + 1;
  uint64_t heads = (uint64_t)d->batch * (uint64_t)d->hkv, pages = ((uint64_t)d->max_m + 63) / 64;
  uint64_t per_chunks = (pages + PAGED_SPLIT - 1) / PAGED_SPLIT + 1, total;
  if ((uint64_t)d->max_n > (uint64_t)ETK_KV_MAX_TAIL * 64) per_head = (uint64_t)ETK_KV_MAX_TAIL * 65;
  out->partial_floats = (uint64_t)r.rows_max * ((uint64_t)r.dv_pad + 2);
  if (__builtin_mul_overflow(per_head, heads, &out->units)) return ETK_E_OVERFLOW;
  /* Chunks are items only while the units are few. */
  uint64_t few = (uint64_t)nthreads * RUNS_PER_WORKER;
  if (d->max_n <= per_unit && heads * 2 > few) few = heads * 2; /* decode always splits: two units when a page ends inside */
  if (few > out->units) few = out->units;
  if (__builtin_mul_overflow(few, per_chunks, &out->chunks)) return ETK_E_OVERFLOW;
  out->lse = d->flags & (ETK_F_RETURN_SCORES | ETK_F_RETURN_COLMASS) ? (uint64_t)d->batch * (uint64_t)d->hq * (uint64_t)d->max_n : 0;
  uint64_t partial_bytes, unit_bytes, lane = paged_lane_bytes(&r);
  if (__builtin_mul_overflow(out->chunks, out->partial_floats * 4, &partial_bytes) ||
      __builtin_mul_overflow(out->units, sizeof(paged_unit), &unit_bytes) || out->lse > UINT64_MAX / 8 ||
      __builtin_add_overflow(partial_bytes, unit_bytes, &total) || __builtin_add_overflow(total, out->lse * 4, &total) ||
      __builtin_add_overflow(total, lane * (uint64_t)nthreads + 1024, &total) || total > INT64_MAX)
    return ETK_E_OVERFLOW;
  out->bytes = total;
  return ETK_OK;
}

etk_status etk_paged_workspace(const etk_attn_desc *desc, const etk_attn_kernel *kernel, int32_t nthreads, uint64_t *bytes) {
  sizes s;
  etk_status status = measure(desc, kernel, nthreads, &s);
  if (status >= 0) *bytes = s.bytes;
  return status;
}

/* Queries. */
static void load_query(const etk_tensor *t, int64_t b, int64_t h, int64_t i, const etk_kv_kernel *kern, int32_t d, int32_t d_pad, float *x) {
  const uint8_t *at = (const uint8_t *)t->data + b * t->stride[0] + h * t->stride[1] + i * t->stride[2];
  if (t->dtype == ETK_F32) memcpy(x, at, (size_t)d * 4);
  else kern->widen_f16((const uint16_t *)(const void *)at, d, x);
  memset(x + d, 0, (size_t)(d_pad - d) * 4);
}

/* 16 interleaved sums and a fixed tree: the same bits for a row wherever it stands. d_pad is a multiple of 16. */
static float dot(const float *x, const float *y, int32_t n) {
  float s[16] = {0};
  for (int32_t c = 0; c < n; c += 16)
    for (int i = 0; i < 16; i++) s[i] += x[c + i] * y[c + i];
  for (int width = 8; width; width >>= 1)
    for (int i = 0; i < width; i++) s[i] += s[i + width];
  return s[0];
}

static int finite_row(const float *x, int32_t n) {
  int bad = 0;
  for (int32_t i = 0; i < n; i++) bad |= !(fabsf(x[i]) <= 3.0e38f);
  return !bad;
}

void paged_load(const paged_run *r, paged_lane *a, const paged_unit *u) {
  if (a->loaded == u) return;
  a->loaded = u;
  const etk_kv_cache *c = r->cache;
  const etk_kv_kernel *kern = kv_kern(c);
  int32_t seq = paged_seq(r, u->b), layer = r->io->kv_layer;
  const float *mu = kv_mu(c, layer, seq, u->h);
  int64_t next = c->next_pos[(int64_t)layer * c->desc.batch + seq];
  int32_t ignored = 0;
  for (int32_t row = 0; row < u->n * r->group; row++) {
    int32_t i = row / r->group, g = row % r->group;
    float *q = a->q + (int64_t)row * r->d_pad, *qf = a->qf + (int64_t)row * r->d_pad;
    load_query(&r->io->q, u->b, (int64_t)u->h * r->group + g, u->i0 + i, kern, r->desc->d, r->d_pad, q);
    if (!finite_row(q, r->d_pad))
      for (int32_t ch = 0; ch < r->d_pad; ch++) q[ch] = q[ch] != q[ch] ? 0.0f : q[ch] > 3.0e38f ? 3.0e38f : q[ch] < -3.0e38f ? -3.0e38f : q[ch];
    for (int32_t ch = 0; ch < r->d_pad; ch++) qf[ch] = q[ch] * r->tau2;
    a->off[row] = dot(qf, mu, r->d_pad);
    a->pos[row] = paged_row_pos(r->io, u->b, u->i0 + i, next, r->n);
    if (c->desc.bits == 16) continue;
    if (c->desc.flags & ETK_KV_ROT_K) kv_rotate(q, r->desc->d);
    a->gq[row] = r->tau2 * r->kernel->quant_q(q, r->desc->d, r->d_pad, a->codes + (int64_t)row * r->d_pad, &a->start[row], &ignored);
  }
}

void paged_merge(const paged_run *r, int32_t rows, const float *m, const float *l, const float *o, float *am, float *al, float *ao) {
  for (int32_t i = 0; i < rows; i++) {
    const float *from = o + (int64_t)i * r->dv_pad;
    float *to = ao + (int64_t)i * r->dv_pad;
    if (m[i] == -INFINITY) continue;
    if (am[i] == -INFINITY) {
      am[i] = m[i];
      al[i] = l[i];
      memcpy(to, from, (size_t)r->dv_pad * 4);
      continue;
    }
    float top = am[i] > m[i] ? am[i] : m[i], x = exp2f(am[i] - top), y = exp2f(m[i] - top);
    am[i] = top;
    al[i] = x * al[i] + y * l[i];
    for (int32_t ch = 0; ch < r->dv_pad; ch++) to[ch] = x * to[ch] + y * from[ch];
  }
}

static void clear_rows(const paged_run *r, int32_t rows, float *m, float *l, float *o) {
  for (int32_t i = 0; i < rows; i++) {
    m[i] = -INFINITY;
    l[i] = 0.0f;
  }
  memset(o, 0, (size_t)rows * (size_t)r->dv_pad * 4);
}

static float opt_f32(const etk_tensor *t, int64_t i0, int64_t i1, int64_t i2, int64_t i3) {
  const int64_t at[4] = {i0, i1, i2, i3};
  const uint8_t *p = (const uint8_t *)t->data;
  float x;
  for (int32_t k = 0; k < t->rank; k++) p += t->dim[k] == 1 ? 0 : at[k] * t->stride[k];
  memcpy(&x, p, sizeof x);
  return x;
}

/* Divide, gate, write; what a row without a key gets is set by the flag. */
static void write_rows(paged_run *r, const paged_unit *u, float *am, float *al, const float *ao) {
  const etk_attn_io *io = r->io;
  for (int32_t row = 0; row < u->n * r->group; row++) {
    int64_t hq = (int64_t)u->h * r->group + row % r->group, i = u->i0 + row / r->group;
    float m = am[row], l = al[row], scale;
    if (io->sink_logit.data) {
      float sink = opt_f32(&io->sink_logit, hq, 0, 0, 0) * LOG2E, top = m > sink ? m : sink;
      scale = m == -INFINITY ? 0.0f : exp2f(m - top);
      l = l * scale + exp2f(sink - top);
      scale /= l;
      m = top;
    } else {
      scale = 1.0f / l;
    }
    int empty = m == -INFINITY;
    if (empty) __atomic_store_n(&r->note, ETK_NOTE_EMPTY_ROWS, __ATOMIC_RELAXED);
    float *o = (float *)(void *)((uint8_t *)io->o.data + u->b * io->o.stride[0] + hq * io->o.stride[1] + i * io->o.stride[2]);
    float blank = r->desc->flags & ETK_F_EMPTY_ROWS_NAN ? NAN : 0.0f;
    for (int32_t ch = 0; ch < r->desc->dv; ch++) {
      float x = empty ? blank : ao[(int64_t)row * r->dv_pad + ch] * scale;
      o[ch] = io->gate.data ? x * opt_f32(&io->gate, u->b, hq, i, ch) : x;
    }
    float lse2 = empty ? -INFINITY : m + log2f(l);
    if (io->lse.data) {
      uint8_t *at = (uint8_t *)io->lse.data + u->b * io->lse.stride[0] + hq * io->lse.stride[1] + i * io->lse.stride[2];
      *(float *)(void *)at = lse2 * LN2;
    }
    if (r->lse2) r->lse2[((int64_t)u->b * r->desc->hq + hq) * r->n + i] = lse2;
  }
}

static float *partial_at(const paged_run *r, int64_t chunk) { return r->partials + (uint64_t)chunk * r->partial_floats; }

/* A contiguous run of chunks of the line. */
static void chunk_task(void *arg, int64_t task, int worker) {
  const paged_run *r = (const paged_run *)arg;
  paged_lane a = paged_lane_at(r, worker);
  int64_t first = r->n_chunks * task / r->n_tasks, last = r->n_chunks * (task + 1) / r->n_tasks, at = 0;
  while (at + 1 < r->n_units && r->units[at + 1].first_chunk <= first) at++;
  for (int64_t i = first; i < last; i++) {
    while (at + 1 < r->n_units && r->units[at + 1].first_chunk <= i) at++;
    const paged_unit *u = &r->units[at];
    int32_t rows = u->n * r->group;
    float *out = partial_at(r, i);
    paged_load(r, &a, u);
    int seen = paged_chunk(r, &a, u, (int32_t)(i - u->first_chunk));
    memcpy(out, a.m, (size_t)rows * 4);
    memcpy(out + rows, a.l, (size_t)rows * 4);
    if (seen) memcpy(out + 2 * rows, a.o, (size_t)rows * (size_t)r->dv_pad * 4);
  }
}

static void reduce_task(void *arg, int64_t task, int worker) {
  paged_run *r = (paged_run *)arg;
  paged_lane a = paged_lane_at(r, worker);
  const paged_unit *u = &r->units[task];
  int32_t rows = u->n * r->group, count = u->chunks + (u->own_in_tail != 0);
  clear_rows(r, rows, a.am, a.al, a.ao);
  for (int32_t i = 0; i < count; i++) {
    const float *p = partial_at(r, u->first_chunk + i);
    paged_merge(r, rows, p, p + rows, p + 2 * rows, a.am, a.al, a.ao);
  }
  write_rows(r, u, a.am, a.al, a.ao);
}

static void unit_task(void *arg, int64_t task, int worker) {
  paged_run *r = (paged_run *)arg;
  paged_lane a = paged_lane_at(r, worker);
  const paged_unit *u = &r->units[task];
  int32_t rows = u->n * r->group, count = u->chunks + (u->own_in_tail != 0);
  paged_load(r, &a, u);
  clear_rows(r, rows, a.am, a.al, a.ao);
  for (int32_t i = 0; i < count; i++)
    if (paged_chunk(r, &a, u, i)) paged_merge(r, rows, a.m, a.l, a.o, a.am, a.al, a.ao);
  write_rows(r, u, a.am, a.al, a.ao);
}

/* List the units. Rows of one page are neighbours because positions ascend; otherwise units are merely shorter. */
static void list_units(paged_run *r) {
  const etk_kv_cache *c = r->cache;
  int32_t most = unit_rows(r->group);
  r->n_units = r->n_chunks = 0;
  for (int32_t b = 0; b < r->desc->batch; b++)
    for (int32_t h = 0; h < r->desc->hkv; h++) {
      int64_t row = paged_row(r, b, h);
      for (int64_t i = 0; i < r->n;) {
        int64_t own = paged_own_page(r->desc, r->io, b, row, i, r->n), n = 1;
        while (n < most && i + n < r->n && paged_own_page(r->desc, r->io, b, row, i + n, r->n) == own) n++;
        int in_tail = own >= 0 && kv_in_tail(c, row, own);
        int64_t listed = own < 0 ? 0 : r->io->gather.data ? r->n_sel : own + !in_tail;
        int32_t chunks = (int32_t)((listed + PAGED_SPLIT - 1) / PAGED_SPLIT);
        r->units[r->n_units++] = (paged_unit){b, h, (int32_t)i, (int32_t)n, (int32_t)own, in_tail, chunks, (int32_t)r->n_chunks};
        r->n_chunks += chunks + in_tail;
        i += n;
      }
    }
}

static void place(paged_run *r, const sizes *s, uint8_t *ws) {
  uint64_t at = r->lane_bytes * (uint64_t)r->workers;
  r->units = (paged_unit *)(void *)(ws + at);
  at += up64(s->units * sizeof(paged_unit));
  r->partials = (float *)(void *)(ws + at);
  at += up64(s->chunks * s->partial_floats * 4);
  r->partial_floats = s->partial_floats;
  r->lse2 = s->lse ? (float *)(void *)(ws + at) : NULL;
}


/* The kernel that takes the pages of a chunk at once, where there is one for this layout and the plan's cap allows it. */
static void (*whole_chunk(const etk_kv_cache *c, const etk_attn_kernel *kernel, int32_t compute))(const etk_kv_chunk *) {
  const etk_kv_kernel *k = kv_kern(c);
  if (k->isa > kernel->isa) return NULL;
  if (c->desc.bits == 16) return k->chunk_f16;
  if (c->layout != 1 || kernel->p_max != 255 || compute != ETK_C_S8S8) return NULL;
  if (c->desc.bits == 8) return k->chunk_s8;
  return c->desc.bits == 4 && c->dv_pad % 32 == 0 ? k->chunk_s4 : NULL;
}

paged_run paged_begin(const etk_attn_desc *desc, const etk_attn_kernel *kernel, int32_t nthreads, const etk_attn_io *io, void *ws) {
  const etk_kv_cache *c = io->kv;
  int adjusts = desc->softcap != 0.0f || io->key_bias.data || io->alibi_slope.data;
  int by_hand = c->desc.k_scale == ETK_KV_K_PER_TOKEN || desc->compute == ETK_C_S8F;
  paged_run r = {.desc = desc, .io = io, .kernel = kernel, .cache = c, .group = desc->hq / desc->hkv, .d_pad = c->d_pad,
                 .dv_pad = c->dv_pad, .general = adjusts | by_hand << 1, .n = io->q.dim[2],
                 .n_sel = io->gather.data ? io->gather.dim[2] : 0, .workers = nthreads};
  r.geometry = kv_page_geometry(c);
  r.whole = r.general ? NULL : whole_chunk(c, kernel, desc->compute);
  r.rows_max = unit_rows(r.group) * r.group;
  r.tau2 = (desc->scale != 0.0f ? desc->scale : 1.0f / sqrtf((float)desc->d)) * LOG2E;
  r.inv_p = 1.0f / (float)kernel->p_max;
  r.lanes = (uint8_t *)ws;
  r.lane_bytes = paged_lane_bytes(&r);
  return r;
}

etk_status etk_paged_run(const etk_attn_desc *desc, const etk_attn_kernel *kernel, int32_t nthreads, const etk_attn_io *io, void *ws,
                         uint64_t ws_bytes, const etk_pool *pool) {
  sizes s;
  etk_status status = etk_paged_check(desc, kernel, io);
  if (status < 0 || (status = measure(desc, kernel, nthreads, &s)) < 0) return status;
  if (!ws) return ETK_E_NULL;
  if (ws_bytes < s.bytes || (uintptr_t)ws % 64) return ETK_E_WORKSPACE;
  paged_run r = paged_begin(desc, kernel, nthreads, io, ws);
  if (r.n == 0) return ETK_OK;
  place(&r, &s, (uint8_t *)ws);
  list_units(&r);
  if ((uint64_t)r.n_chunks <= s.chunks) {
    int64_t most = (int64_t)etk_parallel_width(pool, nthreads);
    most = most == 1 ? 1 : most * RUNS_PER_WORKER;
    r.n_tasks = r.n_chunks < most ? r.n_chunks : most;
    status = etk_parallel(pool, nthreads, chunk_task, &r, r.n_tasks);
    if (status >= 0) status = etk_parallel(pool, nthreads, reduce_task, &r, r.n_units);
  } else {
    status = etk_parallel(pool, nthreads, unit_task, &r, r.n_units);
  }
  if (status >= 0 && r.lse2) status = paged_outputs(&r, pool);
  return status < 0 ? status : r.note;
}
