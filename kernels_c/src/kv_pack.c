/* Append to a KV cache, and read it back as floats.
 *
 * Every value is rounded to f16 first and a page is quantized from those, whether its tokens came in one call or in 64: the
 * bytes do not depend on the cut. Pages are taken before the heads are written, so that heads may run in parallel. */
#include "kv_cache.h"

#include <string.h>

#include "kv_tensor.h"
#include "ops_kernel.h"
#include "parallel.h"
#include "tensor.h"

/* Rotation of the keys on their way in. */
typedef struct key_rope {
  const etk_ops_kernel *ops;
  const etk_tensor *cos_table, *sin_table;
  int64_t table_first; /* position of row 0 of the tables */
  int32_t interleaved;
} key_rope;

typedef struct pack_job {
  etk_kv_cache *c;
  int32_t layer, seq;
  const etk_tensor *k, *v, *pos;
  const key_rope *rope; /* or NULL */
  int64_t n, next;      /* tokens, and the position of the first one when pos is absent */
  int set_mu;      /* this call fills the first page */
  int32_t *note;   /* [hkv] non-finite values met */
} pack_job;

static int64_t read_pos(const etk_tensor *pos, int64_t i) {
  const uint8_t *at = (const uint8_t *)pos->data + i * pos->stride[0];
  return pos->dtype == ETK_I32 ? *(const int32_t *)(const void *)at : *(const int64_t *)(const void *)at;
}

/* Rows as above, rotated but not yet rounded; x steps by step bytes and may be out itself. */
static void rotate_rows(const pack_job *job, const uint8_t *x, int64_t step, int64_t token, int64_t n, int64_t stride, float *out) {
  const key_rope *r = job->rope;
  int64_t row[KV_SLOTS];
  for (int64_t j = 0; j < n; j++)
    row[j] = (kv_absent(job->pos) ? job->next + token + j : read_pos(job->pos, token + j)) - r->table_first;
  const etk_rope_arg arg = {.tokens = n, .heads = 1, .x = (const char *)x, .y = (char *)(void *)out, .x_token = step,
                            .y_token = stride * (int64_t)sizeof *out, .cos_at = r->cos_table->data, .sin_at = r->sin_table->data,
                            .table_step = r->cos_table->stride[0], .row = row, .d = job->c->desc.d,
                            .rot = (int32_t)(2 * r->cos_table->dim[1]), .interleaved = r->interleaved};
  r->ops->rope(&arg);
}

/* n <= 64 rows of head h from token on as floats rounded to f16: kx [n][d_pad], vx [n][dv_pad]. Keys are rotated first when the
 * job says so: from the caller's rows into scratch, which is then in L1 for the rounding. */
static int32_t load_rows(const pack_job *job, const etk_tensor *t, int32_t h, int64_t token, int64_t n, int32_t width, int64_t stride,
                         float *out) {
  const etk_kv_kernel *kern = kv_kern(job->c);
  const uint8_t *base = (const uint8_t *)t->data + h * t->stride[0] + token * t->stride[1];
  const int rotate = job->rope && t == job->k, f32 = t->dtype == ETK_F32;
  float *at = out;
  int32_t note = 0;
  if (rotate && f32) rotate_rows(job, base, t->stride[1], token, n, stride, out);
  for (int64_t j = 0; j < n && !(rotate && f32); j++, base += t->stride[1], at += stride) {
    if (!f32) kern->widen_f16((const uint16_t *)(const void *)base, width, at);
    if (!rotate) note |= kern->round_f16(f32 ? (const float *)(const void *)base : at, width, NULL, at); /* f16: infinities, NaN */
  }
  if (!rotate) return note;
  if (!f32) rotate_rows(job, (const uint8_t *)out, stride * (int64_t)sizeof *out, token, n, stride, out);
  for (int64_t j = 0; j < n; j++) note |= kern->round_f16(out + j * stride, width, NULL, out + j * stride);
  return note;
}

/* The mean of 64 keys, added in order. */
static void set_mean(const etk_kv_cache *c, const float *kx, float *mu) {
  for (int32_t ch = 0; ch < c->d_pad; ch++) mu[ch] = 0.0f;
  if (c->desc.flags & ETK_KV_NO_SMOOTH_K) return;
  for (int32_t j = 0; j < KV_SLOTS; j++)
    for (int32_t ch = 0; ch < c->desc.d; ch++) mu[ch] += kx[(int64_t)j * c->d_pad + ch];
  for (int32_t ch = 0; ch < c->desc.d; ch++) mu[ch] *= 1.0f / KV_SLOTS;
}

static void pack_head(void *arg, int64_t task, int worker) {
  const pack_job *job = (const pack_job *)arg;
  etk_kv_cache *c = job->c;
  int32_t h = (int32_t)task;
  int64_t row = kv_row(c, job->layer, job->seq, kv_table_of(c, h)), start = c->seq_k[row], end = start + job->n;
  int64_t last_page = kv_pages_of(end) - 1, first_kept = last_page - c->desc.tail_pages + 1, token = 0;
  kv_scratch s = kv_scratch_at(c, worker);
  float *mu = kv_mu(c, job->layer, job->seq, h);
  int32_t note = 0;
  for (int64_t slot = start; slot < end;) {
    int64_t page = slot / KV_SLOTS, in_page = slot % KV_SLOTS, n = KV_SLOTS - in_page;
    if (n > end - slot) n = end - slot;
    float *kx = s.kx + in_page * c->d_pad, *vx = s.vx + in_page * c->dv_pad;
    uint8_t *tail = kv_tail_at(c, job->layer, job->seq, h, page);
    note |= load_rows(job, job->k, h, token, n, c->desc.d, c->d_pad, kx);
    note |= load_rows(job, job->v, h, token, n, c->desc.dv, c->dv_pad, vx);
    if (in_page + n == KV_SLOTS && in_page > 0) kv_tail_read(c, tail, 0, in_page, s.kx, s.vx);
    if (page >= first_kept) {
      if (in_page == 0 && n < KV_SLOTS) memset(tail, 0, c->tail_bytes); /* slots to come are read as keys of weight zero */
      kv_tail_write(c, tail, in_page, n, kx, vx);
    }
    if (in_page + n == KV_SLOTS) {
      if (page == 0 && job->set_mu) set_mean(c, s.kx, mu);
      kv_page_write(c, kv_page_at(c, kv_blocks(c, row)[page], h), mu, &s);
    }
    slot += n;
    token += n;
  }
  job->note[h] = note;
}

static etk_status check_pos(const etk_tensor *pos, int64_t n, int64_t next) {
  if (kv_absent(pos)) return next + n > INT32_MAX ? ETK_E_RANGE : ETK_OK;
  int64_t dim[1] = {n}, last = next - 1;
  etk_status status = kv_tensor_check(pos, 1, dim, ETK_I32, ETK_I64);
  if (status < 0) return status;
  for (int64_t i = 0; i < n; i++) {
    int64_t p = read_pos(pos, i);
    if (p <= last || p >= INT32_MAX) return ETK_E_RANGE;
    last = p;
  }
  return ETK_OK;
}

/* Pages that n more tokens fill, over the tables of the layer; or ETK_E_FULL as -1. */
static int64_t pages_needed(const etk_kv_cache *c, int32_t layer, int32_t seq, int64_t n) {
  int64_t need = 0;
  for (int32_t t = 0; t < c->tables; t++) {
    int64_t used = c->seq_k[kv_row(c, layer, seq, t)];
    if (n > c->desc.max_tokens - used) return -1;
    need += (used + n) / KV_SLOTS - used / KV_SLOTS;
  }
  return need;
}

/* Tables after the heads are written: positions, masks, counts. */
static void commit(const pack_job *job) {
  etk_kv_cache *c = job->c;
  const etk_tensor *pos = job->pos;
  const int64_t next = job->next;
  for (int32_t t = 0; t < c->tables; t++) {
    int64_t row = kv_row(c, job->layer, job->seq, t), start = c->seq_k[row], end = start + job->n;
    int32_t *at = kv_pos(c, row) + start;
    for (int64_t i = 0; i < job->n; i++) at[i] = (int32_t)(kv_absent(pos) ? next + i : read_pos(pos, i));
    for (int64_t page = start / KV_SLOTS; page < kv_pages_of(end); page++) {
      int64_t lo = page * KV_SLOTS < start ? start % KV_SLOTS : 0, hi = end - page * KV_SLOTS;
      uint64_t upto = hi >= KV_SLOTS ? ~(uint64_t)0 : ((uint64_t)1 << hi) - 1;
      uint64_t *live = &kv_live(c, row)[page];
      *live = (lo ? *live : 0) | (upto & ~(((uint64_t)1 << lo) - 1));
    }
    int64_t valid = c->tail_valid[row] + kv_pages_of(end) - kv_pages_of(start);
    c->tail_valid[row] = (int32_t)(valid > c->desc.tail_pages ? c->desc.tail_pages : valid);
    c->seq_k[row] = (int32_t)end;
  }
  int64_t lb = (int64_t)job->layer * c->desc.batch + job->seq;
  c->next_pos[lb] = kv_absent(pos) ? next + job->n : read_pos(pos, job->n - 1) + 1;
  if (job->set_mu) c->mu_set[lb] = 1;
}

/* 4096 heads at most; the notes of one call live on the stack. */
enum { MAX_HEADS = 4096 };

static etk_status check_rope(const key_rope *r, int32_t d, const etk_tensor *pos, int64_t n, int64_t next) {
  etk_status status = etk_tensor_in(r->cos_table, 2, ETK_DT(ETK_F32));
  if (!status) status = etk_tensor_in(r->sin_table, 2, ETK_DT(ETK_F32));
  if (status) return status;
  const int64_t rows = r->cos_table->dim[0], half = r->cos_table->dim[1];
  if (r->sin_table->dim[0] != rows || r->sin_table->dim[1] != half || 2 * half > d) return ETK_E_SHAPE;
  if (rows > 1 && r->cos_table->stride[0] != r->sin_table->stride[0]) return ETK_E_STRIDE;
  if (n == 0) return ETK_OK;
  const int64_t lo = kv_absent(pos) ? next : read_pos(pos, 0), hi = kv_absent(pos) ? next + n - 1 : read_pos(pos, n - 1);
  return r->table_first < 0 || lo < r->table_first || hi - r->table_first >= rows ? ETK_E_RANGE : ETK_OK;
}

static etk_status pack(etk_kv_cache *cache, int32_t layer, int32_t seq, const etk_tensor *k, const etk_tensor *v, const etk_tensor *pos,
                       const key_rope *rope, const etk_pool *pool) {
  etk_status status = kv_check(cache);
  if (status < 0) return status;
  if (!k || !v) return ETK_E_NULL;
  const etk_kv_desc *d = &cache->desc;
  if (layer < 0 || layer >= d->layers || seq < 0 || seq >= d->batch) return ETK_E_RANGE;
  if (k->rank != 3 || k->dim[1] < 0) return ETK_E_SHAPE;
  int64_t n = k->dim[1], k_dim[3] = {d->hkv, n, d->d}, v_dim[3] = {d->hkv, n, d->dv};
  if ((status = kv_tensor_check(k, 3, k_dim, ETK_F32, ETK_F16)) < 0) return status;
  if ((status = kv_tensor_check(v, 3, v_dim, ETK_F32, ETK_F16)) < 0) return status;
  int64_t lb = (int64_t)layer * d->batch + seq, next = cache->next_pos[lb];
  if ((status = check_pos(pos, n, next)) < 0) return status;
  if (rope && (status = check_rope(rope, d->d, pos, n, next)) < 0) return status;
  if (n == 0) return ETK_OK;
  int64_t need = pages_needed(cache, layer, seq, n);
  if (need < 0 || need > cache->n_free) return ETK_E_FULL;
  for (int32_t t = 0; t < cache->tables; t++) {
    int64_t row = kv_row(cache, layer, seq, t), used = cache->seq_k[row];
    for (int64_t page = used / KV_SLOTS; page < (used + n) / KV_SLOTS; page++) kv_blocks(cache, row)[page] = kv_take(cache);
  }
  int32_t note[MAX_HEADS];
  int64_t first = cache->seq_k[kv_row(cache, layer, seq, 0)] + n;
  pack_job job = {cache, layer, seq, k, v, pos, rope, n, next, !cache->mu_set[lb] && first >= KV_SLOTS, note};
  if (etk_parallel(n > 1 ? pool : NULL, d->threads, pack_head, &job, d->hkv) < 0)
    for (int32_t h = 0; h < d->hkv; h++) pack_head(&job, h, 0); /* also after a pool that gave up: the writes repeat exactly */
  commit(&job);
  int32_t any = 0;
  for (int32_t h = 0; h < d->hkv; h++) any |= note[h];
  return any ? ETK_NOTE_NONFINITE : ETK_OK;
}

etk_status etk_kv_pack(etk_kv_cache *cache, int32_t layer, int32_t seq, const etk_tensor *k, const etk_tensor *v, const etk_tensor *pos,
                       const etk_pool *pool) {
  return pack(cache, layer, seq, k, v, pos, NULL, pool);
}

etk_status etk_kv_pack_rope(etk_kv_cache *cache, int32_t layer, int32_t seq, const etk_tensor *k, const etk_tensor *v,
                            const etk_tensor *pos, const etk_tensor *cos_table, const etk_tensor *sin_table, int64_t table_first,
                            int32_t interleaved, const etk_pool *pool) {
  if (!cos_table || !sin_table) return ETK_E_NULL;
  if (interleaved != 0 && interleaved != 1) return ETK_E_RANGE;
  const key_rope rope = {etk_ops_kernel_pick(), cos_table, sin_table, table_first, interleaved};
  return rope.ops ? pack(cache, layer, seq, k, v, pos, &rope, pool) : ETK_E_ISA;
}

static void copy_out(etk_tensor *t, int64_t at, int64_t n, const float *rows, int64_t stride) {
  if (kv_absent(t)) return;
  for (int64_t j = 0; j < n; j++)
    memcpy((uint8_t *)t->data + (at + j) * t->stride[0], rows + j * stride, (size_t)t->dim[1] * sizeof(float));
}

etk_status etk_kv_unpack(const etk_kv_cache *cache, int32_t layer, int32_t seq, int32_t head, int64_t slot, int64_t n, int32_t from_tail,
                         etk_tensor *k, etk_tensor *v) {
  etk_status status = kv_check(cache);
  if (status < 0) return status;
  const etk_kv_desc *d = &cache->desc;
  if (layer < 0 || layer >= d->layers || seq < 0 || seq >= d->batch || head < 0 || head >= d->hkv) return ETK_E_RANGE;
  int64_t row = kv_row(cache, layer, seq, kv_table_of(cache, head));
  if (slot < 0 || n < 0 || slot > cache->seq_k[row] || n > cache->seq_k[row] - slot) return ETK_E_RANGE;
  int64_t k_dim[2] = {n, d->d}, v_dim[2] = {n, d->dv};
  if (!kv_absent(k) && (status = kv_tensor_check(k, 2, k_dim, ETK_F32, ETK_F32)) < 0) return status;
  if (!kv_absent(v) && (status = kv_tensor_check(v, 2, v_dim, ETK_F32, ETK_F32)) < 0) return status;
  kv_scratch s = kv_scratch_at(cache, 0);
  for (int64_t at = 0; at < n;) {
    int64_t page = (slot + at) / KV_SLOTS, in_page = (slot + at) % KV_SLOTS, rows = KV_SLOTS - in_page;
    if (rows > n - at) rows = n - at;
    int32_t entry = kv_blocks(cache, row)[page];
    if (entry < 0 || (from_tail && kv_in_tail(cache, row, page)))
      kv_tail_read(cache, kv_tail_at(cache, layer, seq, head, page), 0, in_page + rows, s.kx, s.vx);
    else
      kv_page_read(cache, kv_page_at(cache, entry, head), kv_mu(cache, layer, seq, head), s.kx, s.vx, &s);
    copy_out(k, at, rows, s.kx + in_page * cache->d_pad, cache->d_pad);
    copy_out(v, at, rows, s.vx + in_page * cache->dv_pad, cache->dv_pad);
    at += rows;
  }
  return ETK_OK;
}
