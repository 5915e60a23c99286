/* Set-up of a KV cache: geometry of its arena, tables, page allocation, fork, truncation, figures. */
#include "kv_cache.h"

#include <string.h>

#include "kv_tensor.h"

enum { KV_ALIGN = 64, KV_FLAGS = ETK_KV_PER_HEAD | ETK_KV_ROT_K | ETK_KV_NO_SMOOTH_K };

static uint64_t up64(uint64_t x) { return (x + 63) & ~(uint64_t)63; }

kv_geometry kv_page_geometry(const etk_kv_cache *c) {
  uint64_t d = (uint64_t)c->d_pad, dv = (uint64_t)c->dv_pad;
  kv_geometry g = {0};
  if (c->desc.bits == 16) {
    g.v = d * 128;
    g.bytes = g.v_scale = g.colsum = (d + dv) * 128;
    return g;
  }
  uint64_t part = c->desc.bits == 8 ? 64 : 32;
  g.v_scale = c->desc.bits == 4 ? up64(d * 4) : c->desc.k_scale == ETK_KV_K_PER_TOKEN ? 128 : 64;
  g.colsum = g.v_scale + up64(dv * 2);
  g.k = g.colsum + (kv_attn(c)->needs_colsum ? up64(dv * 4) : 0);
  g.v = g.k + d * part;
  g.bytes = g.v + dv * part;
  return g;
}

etk_status kv_check(const etk_kv_cache *c) {
  if (!c) return ETK_E_NULL;
  return c->struct_size == sizeof *c && c->magic == KV_MAGIC ? ETK_OK : ETK_E_STRUCT;
}

uint64_t kv_scratch_bytes(const etk_kv_cache *c) {
  uint64_t both = (uint64_t)(c->d_pad + c->dv_pad), widest = (uint64_t)(c->d_pad > c->dv_pad ? c->d_pad : c->dv_pad);
  return both * 64 * 4 * 2 + up64((both + (uint64_t)c->d_pad + KV_SLOTS) * 4) + both * 64 + widest * 64;
}

kv_scratch kv_scratch_at(const etk_kv_cache *c, int worker) {
  float *base = (float *)(void *)(c->scratch + (uint64_t)worker * c->scratch_bytes);
  int64_t k = (int64_t)c->d_pad * 64, v = (int64_t)c->dv_pad * 64;
  kv_scratch s = {base, base + k, base + k + v, base + 2 * k + v, base + 2 * (k + v), NULL, NULL};
  s.codes = (int8_t *)(void *)s.scales + up64((uint64_t)(2 * c->d_pad + c->dv_pad + KV_SLOTS) * 4); /* K codes, V codes */
  s.laid = s.codes + k + v;
  return s;
}

static etk_status check_desc(const etk_kv_desc *in, etk_kv_cache *c) {
  if (!in) return ETK_E_NULL;
  etk_status status = kv_take_struct(&c->desc, sizeof c->desc, in);
  if (status < 0) return status;
  etk_kv_desc *d = &c->desc;
  d->struct_size = sizeof *d;
  if (d->version != 0) return ETK_E_STRUCT;
  if (d->layers < 1 || d->batch < 1 || d->hkv < 1 || d->d < 1 || d->dv < 1 || d->d > 1024 || d->dv > 1024) return ETK_E_SHAPE;
  if (d->layers > 4096 || d->batch > 65536 || d->hkv > 4096 || d->pages < 0 || d->max_tokens < 1) return ETK_E_SHAPE;
  if (d->pages > INT32_MAX || d->max_tokens > INT32_MAX - 64) return ETK_E_OVERFLOW;
  if (d->tail_pages < 0 || d->tail_pages > ETK_KV_MAX_TAIL || d->threads < 0 || d->threads > 256) return ETK_E_RANGE;
  if ((d->flags & ~(uint32_t)KV_FLAGS) || d->reserved || (d->k_scale != ETK_KV_K_PER_PAGE && d->k_scale != ETK_KV_K_PER_TOKEN))
    return ETK_E_RANGE;
  if (d->bits != 4 && d->bits != 8 && d->bits != 16) return ETK_E_UNSUPPORTED;
  if (d->bits != 8 && d->k_scale != ETK_KV_K_PER_PAGE) return ETK_E_UNSUPPORTED;
  if (d->bits == 16 && (d->flags & ETK_KV_ROT_K)) return ETK_E_UNSUPPORTED;
  if (!d->tail_pages) d->tail_pages = 2;
  if (!d->threads) d->threads = 1;
  const etk_attn_kernel *kernel = etk_attn_kernel_pick(d->isa_cap, &status);
  if (!kernel) return status < 0 ? status : ETK_E_ISA;
  c->attn_kernel = kernel;
  c->kv_kernel = etk_kv_kernel_pick(d->isa_cap);
  c->isa = kernel->isa;
  c->layout = kernel->layout;
  int8_t zeros[ETK_HEAD_UNIT * ETK_PAGE] = {0}, laid[ETK_HEAD_UNIT * ETK_PAGE];
  kernel->lay_k(zeros, ETK_HEAD_UNIT, laid);
  c->k_bias = (uint8_t)laid[0];
  return ETK_OK;
}

/* Reserve count * bytes at the end of the arena; the offset goes to *at. Sticky overflow in *failed. */
static void reserve(uint64_t *total, uint64_t count, uint64_t bytes, uint64_t *at, int *failed) {
  uint64_t size, end;
  *at = up64(*total);
  if (__builtin_mul_overflow(count, bytes, &size) || __builtin_add_overflow(*at, size, &end) || end > (uint64_t)INT64_MAX - 64)
    *failed = 1;
  else
    *total = end;
}

typedef struct layout_of_arena {
  uint64_t table, seq, pos, live, removed, tail_valid, next, mu, mu_set, refs, free_list, scratch, tails, pages, total;
} layout_of_arena;

static etk_status lay_out(const etk_kv_desc *in, etk_kv_cache *c, layout_of_arena *a) {
  etk_status status = check_desc(in, c);
  if (status < 0) return status;
  const etk_kv_desc *d = &c->desc;
  c->d_pad = (d->d + ETK_HEAD_UNIT - 1) / ETK_HEAD_UNIT * ETK_HEAD_UNIT;
  c->dv_pad = (d->dv + ETK_HEAD_UNIT - 1) / ETK_HEAD_UNIT * ETK_HEAD_UNIT;
  c->tables = d->flags & ETK_KV_PER_HEAD ? d->hkv : 1;
  c->page_unit = d->flags & ETK_KV_PER_HEAD ? 1 : d->hkv;
  c->max_pages = kv_pages_of(d->max_tokens);
  c->page_bytes = kv_page_geometry(c).bytes;
  c->tail_bytes = (uint64_t)(c->d_pad + c->dv_pad) * 128;
  c->scratch_bytes = kv_scratch_bytes(c);
  uint64_t lb = (uint64_t)d->layers * (uint64_t)d->batch, rows = lb * (uint64_t)c->tables, total = 0; /* < 2^40 */
  uint64_t heads = lb * (uint64_t)d->hkv, pages = (uint64_t)c->max_pages, units = (uint64_t)(d->pages / c->page_unit);
  int failed = 0;
  reserve(&total, rows, pages * 4, &a->table, &failed);
  reserve(&total, rows, 4, &a->seq, &failed);
  reserve(&total, rows, pages * KV_SLOTS * 4, &a->pos, &failed);
  reserve(&total, rows, pages * 8, &a->live, &failed);
  reserve(&total, rows, 4, &a->removed, &failed);
  reserve(&total, rows, 4, &a->tail_valid, &failed);
  reserve(&total, lb, 8, &a->next, &failed);
  reserve(&total, heads, (uint64_t)c->d_pad * 4, &a->mu, &failed);
  reserve(&total, lb, 4, &a->mu_set, &failed);
  reserve(&total, units, 4, &a->refs, &failed);
  reserve(&total, units, 4, &a->free_list, &failed);
  reserve(&total, (uint64_t)d->threads, c->scratch_bytes, &a->scratch, &failed);
  reserve(&total, heads, (uint64_t)d->tail_pages * c->tail_bytes, &a->tails, &failed);
  reserve(&total, (uint64_t)d->pages, c->page_bytes, &a->pages, &failed);
  a->total = up64(total);
  return failed ? ETK_E_OVERFLOW : ETK_OK;
}

etk_status etk_kv_size(const etk_kv_desc *desc, uint64_t *bytes, uint64_t *align) {
  etk_kv_cache c = {0};
  layout_of_arena a;
  if (!bytes || !align) return ETK_E_NULL;
  etk_status status = lay_out(desc, &c, &a);
  if (status < 0) return status;
  *bytes = a.total;
  *align = KV_ALIGN;
  return ETK_OK;
}

etk_status etk_kv_init(const etk_kv_desc *desc, void *arena, uint64_t arena_bytes, etk_kv_cache *cache) {
  etk_kv_cache c = {0};
  layout_of_arena a;
  if (!arena || !cache) return ETK_E_NULL;
  etk_status status = lay_out(desc, &c, &a);
  if (status < 0) return status;
  if ((uintptr_t)arena % KV_ALIGN) return ETK_E_ALIGN;
  if (arena_bytes < a.total) return ETK_E_WORKSPACE;
  uint8_t *base = (uint8_t *)arena;
  c.struct_size = sizeof c;
  c.magic = KV_MAGIC;
  c.block_table = (int32_t *)(void *)(base + a.table);
  c.seq_k = (int32_t *)(void *)(base + a.seq);
  c.pos = (int32_t *)(void *)(base + a.pos);
  c.live = (uint64_t *)(void *)(base + a.live);
  c.removed = (int32_t *)(void *)(base + a.removed);
  c.tail_valid = (int32_t *)(void *)(base + a.tail_valid);
  c.next_pos = (int64_t *)(void *)(base + a.next);
  c.mu_k = (float *)(void *)(base + a.mu);
  c.mu_set = (int32_t *)(void *)(base + a.mu_set);
  c.refs = (int32_t *)(void *)(base + a.refs);
  c.free_list = (int32_t *)(void *)(base + a.free_list);
  c.scratch = base + a.scratch;
  c.tails = base + a.tails;
  c.pages = base + a.pages;
  int64_t rows = (int64_t)c.desc.layers * c.desc.batch * c.tables, lb = (int64_t)c.desc.layers * c.desc.batch;
  memset(c.seq_k, 0, (size_t)rows * 4);
  memset(c.removed, 0, (size_t)rows * 4);
  memset(c.tail_valid, 0, (size_t)rows * 4);
  memset(c.block_table, 0xff, (size_t)rows * (size_t)c.max_pages * 4);
  memset(c.live, 0, (size_t)rows * (size_t)c.max_pages * 8);
  memset(c.next_pos, 0, (size_t)lb * 8);
  memset(c.mu_set, 0, (size_t)lb * 4);
  memset(c.mu_k, 0, (size_t)lb * (size_t)c.desc.hkv * (size_t)c.d_pad * 4);
  c.n_free = c.desc.pages / c.page_unit;
  for (int64_t i = 0; i < c.n_free; i++) { /* the top of the stack is page 0: pages are handed out ascending */
    c.refs[i] = 0;
    c.free_list[i] = (int32_t)((c.n_free - 1 - i) * c.page_unit);
  }
  *cache = c;
  return ETK_OK;
}

int32_t kv_take(etk_kv_cache *c) {
  int32_t entry = c->free_list[--c->n_free];
  c->refs[entry / c->page_unit] = 1;
  return entry;
}

void kv_release(etk_kv_cache *c, int32_t entry) {
  if (--c->refs[entry / c->page_unit] == 0) c->free_list[c->n_free++] = entry;
}

static void clear_row(etk_kv_cache *c, int64_t row) {
  int32_t *table = kv_blocks(c, row);
  for (int64_t p = kv_pages_of(c->seq_k[row]) - 1; p >= 0; p--) {
    if (table[p] >= 0) kv_release(c, table[p]);
    table[p] = -1;
    kv_live(c, row)[p] = 0;
  }
  c->seq_k[row] = c->removed[row] = c->tail_valid[row] = 0;
}

etk_status etk_kv_clear(etk_kv_cache *cache, int32_t seq) {
  etk_status status = kv_check(cache);
  if (status < 0) return status;
  if (seq < 0 || seq >= cache->desc.batch) return ETK_E_RANGE;
  for (int32_t layer = 0; layer < cache->desc.layers; layer++) {
    int64_t lb = (int64_t)layer * cache->desc.batch + seq;
    for (int32_t t = 0; t < cache->tables; t++) clear_row(cache, kv_row(cache, layer, seq, t));
    cache->next_pos[lb] = 0;
    cache->mu_set[lb] = 0;
    memset(cache->mu_k + lb * cache->desc.hkv * cache->d_pad, 0, (size_t)cache->desc.hkv * (size_t)cache->d_pad * 4);
  }
  return ETK_OK;
}

etk_status etk_kv_fork(etk_kv_cache *cache, int32_t src, int32_t dst) {
  etk_status status = kv_check(cache);
  if (status < 0) return status;
  int32_t batch = cache->desc.batch;
  if (src < 0 || dst < 0 || src >= batch || dst >= batch || src == dst) return ETK_E_RANGE;
  status = etk_kv_clear(cache, dst);
  if (status < 0) return status;
  for (int32_t layer = 0; layer < cache->desc.layers; layer++) {
    int64_t from = (int64_t)layer * batch + src, to = (int64_t)layer * batch + dst;
    for (int32_t t = 0; t < cache->tables; t++) {
      int64_t a = kv_row(cache, layer, src, t), b = kv_row(cache, layer, dst, t), pages = kv_pages_of(cache->seq_k[a]);
      for (int64_t p = 0; p < pages; p++) {
        int32_t entry = kv_blocks(cache, a)[p];
        kv_blocks(cache, b)[p] = entry;
        kv_live(cache, b)[p] = kv_live(cache, a)[p];
        if (entry >= 0) cache->refs[entry / cache->page_unit]++;
      }
      memcpy(kv_pos(cache, b), kv_pos(cache, a), (size_t)cache->seq_k[a] * 4);
      cache->seq_k[b] = cache->seq_k[a];
      cache->removed[b] = cache->removed[a];
      cache->tail_valid[b] = cache->tail_valid[a];
    }
    uint64_t tails = (uint64_t)cache->desc.hkv * (uint64_t)cache->desc.tail_pages * cache->tail_bytes;
    memcpy(cache->tails + (uint64_t)to * tails, cache->tails + (uint64_t)from * tails, tails);
    int64_t mu = (int64_t)cache->desc.hkv * cache->d_pad;
    memcpy(cache->mu_k + to * mu, cache->mu_k + from * mu, (size_t)mu * 4);
    cache->next_pos[to] = cache->next_pos[from];
    cache->mu_set[to] = cache->mu_set[from];
  }
  return ETK_OK;
}

/* The slots of the new last page, [0, n), come back into the tail from their quantized page. */
static void restore_tail(etk_kv_cache *c, int32_t layer, int32_t seq, int32_t table, int64_t page, int64_t n) {
  kv_scratch s = kv_scratch_at(c, 0);
  int32_t entry = kv_blocks(c, kv_row(c, layer, seq, table))[page];
  int32_t first = c->tables == 1 ? 0 : table, last = c->tables == 1 ? c->desc.hkv : table + 1;
  for (int32_t h = first; h < last; h++) {
    kv_page_read(c, kv_page_at(c, entry, h), kv_mu(c, layer, seq, h), s.kx, s.vx, &s);
    memset(kv_tail_at(c, layer, seq, h, page), 0, c->tail_bytes);
    kv_tail_write(c, kv_tail_at(c, layer, seq, h, page), 0, n, s.kx, s.vx);
  }
}

static void truncate_row(etk_kv_cache *c, int32_t layer, int32_t seq, int32_t table, int64_t next_pos) {
  int64_t row = kv_row(c, layer, seq, table), old = c->seq_k[row], n = old;
  const int32_t *pos = kv_pos(c, row);
  while (n > 0 && pos[n - 1] >= next_pos) n--;
  if (n == old) return;
  int64_t old_pages = kv_pages_of(old), pages = kv_pages_of(n), valid = c->tail_valid[row] - (old_pages - pages);
  int32_t *blocks = kv_blocks(c, row);
  uint64_t *live = kv_live(c, row);
  if (n % KV_SLOTS && valid < 1) {
    restore_tail(c, layer, seq, table, pages - 1, n % KV_SLOTS);
    valid = 1;
  }
  for (int64_t p = old_pages - 1; p >= n / KV_SLOTS; p--) {
    if (blocks[p] >= 0) kv_release(c, blocks[p]);
    blocks[p] = -1;
    if (p >= pages) live[p] = 0;
  }
  if (n % KV_SLOTS) live[pages - 1] &= ((uint64_t)1 << (n % KV_SLOTS)) - 1;
  c->seq_k[row] = (int32_t)n;
  c->tail_valid[row] = (int32_t)(valid < 0 ? 0 : valid);
}

etk_status etk_kv_truncate(etk_kv_cache *cache, int32_t seq, int64_t next_pos) {
  etk_status status = kv_check(cache);
  if (status < 0) return status;
  if (seq < 0 || seq >= cache->desc.batch || next_pos < 0) return ETK_E_RANGE;
  for (int32_t layer = 0; layer < cache->desc.layers; layer++) {
    int64_t lb = (int64_t)layer * cache->desc.batch + seq;
    int fresh = cache->mu_set[lb];
    for (int32_t t = 0; t < cache->tables; t++) {
      int64_t row = kv_row(cache, layer, seq, t), valid;
      truncate_row(cache, layer, seq, t, next_pos);
      /* mu_k may be taken anew only where the first page is again entirely the tail's own, exact values. */
      valid = cache->seq_k[row] < KV_SLOTS && cache->removed[row] == 0;
      fresh = fresh && valid;
    }
    if (fresh) cache->mu_set[lb] = 0;
    if (cache->next_pos[lb] > next_pos) cache->next_pos[lb] = next_pos;
  }
  return ETK_OK;
}

etk_status etk_kv_get_stats(const etk_kv_cache *cache, etk_kv_stats *stats) {
  etk_status status = kv_check(cache);
  if (status < 0) return status;
  if (!stats) return ETK_E_NULL;
  if (stats->struct_size != sizeof *stats) return ETK_E_STRUCT;
  etk_kv_stats s = {.struct_size = sizeof s};
  uint64_t align;
  status = etk_kv_size(&cache->desc, &s.arena_bytes, &align);
  if (status < 0) return status;
  const etk_kv_desc *d = &cache->desc;
  int64_t units = d->pages / cache->page_unit, rows = (int64_t)d->layers * d->batch * cache->tables;
  s.pages_used = (units - cache->n_free) * cache->page_unit;
  s.pages_free = cache->n_free * cache->page_unit;
  s.page_bytes_used = (uint64_t)s.pages_used * cache->page_bytes;
  s.tail_bytes = (uint64_t)((int64_t)d->layers * d->batch * d->hkv * d->tail_pages) * cache->tail_bytes;
  s.table_bytes = s.arena_bytes - s.tail_bytes - (uint64_t)d->pages * cache->page_bytes;
  for (int64_t row = 0; row < rows; row++) {
    int64_t pages = kv_pages_of(cache->seq_k[row]), each = d->hkv / cache->tables;
    s.slots += cache->seq_k[row] * each;
    for (int64_t p = 0; p < pages; p++) s.live_slots += __builtin_popcountll(kv_live(cache, row)[p]) * each;
  }
  *stats = s;
  return ETK_OK;
}
