/* Eviction: clear live bits, free pages without a live slot, move survivors together.
 *
 * Survivors of an eviction keep their page, codes and scales. A repack rewrites the pages from the first hole on: survivors
 * in order, as floats, quantized once into new pages; what does not fill a page goes to the f16 tail. */
#include "kv_cache.h"

#include <string.h>

/* Close the gap that page leaves in the tables of a row. */
static void remove_page(etk_kv_cache *c, int64_t row, int64_t page) {
  int32_t *blocks = kv_blocks(c, row), *pos = kv_pos(c, row);
  uint64_t *live = kv_live(c, row);
  int64_t pages = kv_pages_of(c->seq_k[row]), rest = pages - page - 1;
  int64_t slots = c->seq_k[row] - (page + 1) * KV_SLOTS;
  kv_release(c, blocks[page]);
  memmove(blocks + page, blocks + page + 1, (size_t)rest * sizeof *blocks);
  memmove(live + page, live + page + 1, (size_t)rest * sizeof *live);
  memmove(pos + page * KV_SLOTS, pos + (page + 1) * KV_SLOTS, (size_t)slots * sizeof *pos);
  blocks[pages - 1] = -1;
  live[pages - 1] = 0;
  c->seq_k[row] -= KV_SLOTS;
  /* Later pages keep their tail: index and count of removed pages move together. Earlier ones lose theirs. */
  c->removed[row] = (c->removed[row] + 1) % c->desc.tail_pages;
  if (c->tail_valid[row] > rest) c->tail_valid[row] = (int32_t)rest;
}

static void evict_row(etk_kv_cache *c, int64_t row, const uint64_t *keep) {
  uint64_t *live = kv_live(c, row);
  int64_t pages = kv_pages_of(c->seq_k[row]), full = c->seq_k[row] / KV_SLOTS;
  for (int64_t p = 0; p < pages; p++) live[p] &= keep[p];
  for (int64_t p = full - 1; p >= 0; p--)
    if (!live[p]) remove_page(c, row, p);
}

/* Tables [*first, *last) that head names; ETK_E_RANGE when it names none. */
static etk_status tables_of(const etk_kv_cache *c, int32_t layer, int32_t seq, int32_t head, int32_t *first, int32_t *last) {
  if (layer < 0 || layer >= c->desc.layers || seq < 0 || seq >= c->desc.batch) return ETK_E_RANGE;
  if (head < -1 || head >= c->desc.hkv || (c->tables == 1 && head != -1 && c->desc.hkv != 1)) return ETK_E_RANGE;
  *first = head < 0 || c->tables == 1 ? 0 : head;
  *last = head < 0 ? c->tables : *first + 1;
  return ETK_OK;
}

etk_status etk_kv_evict(etk_kv_cache *cache, int32_t layer, int32_t seq, int32_t head, const uint64_t *keep, int64_t n_words) {
  etk_status status = kv_check(cache);
  int32_t first, last;
  if (status < 0) return status;
  if ((status = tables_of(cache, layer, seq, head, &first, &last)) < 0) return status;
  for (int32_t t = first; t < last; t++)
    if (kv_pages_of(cache->seq_k[kv_row(cache, layer, seq, t)]) != n_words) return ETK_E_SHAPE;
  if (!keep && n_words) return ETK_E_NULL;
  for (int32_t t = first; t < last; t++) evict_row(cache, kv_row(cache, layer, seq, t), keep);
  return ETK_OK;
}

typedef struct repack_row {
  etk_kv_cache *c;
  int32_t layer, seq, table;
  int64_t row, pages; /* of the table now */
  int64_t from;       /* first page with a hole: the first that changes */
  int64_t made;       /* full pages that come out */
} repack_row;

static uint64_t all_slots(const repack_row *r, int64_t page) {
  int64_t n = r->c->seq_k[r->row] - page * KV_SLOTS;
  return n >= KV_SLOTS ? ~(uint64_t)0 : ((uint64_t)1 << n) - 1;
}

/* Survivors from page r->from on. */
static int64_t survivors(const repack_row *r) {
  int64_t n = 0;
  for (int64_t p = r->from; p < r->pages; p++) n += __builtin_popcountll(kv_live(r->c, r->row)[p]);
  return n;
}

/* New page i may overwrite old page i: its 64th survivor lies in old page i or later, which has been read by then. A page
 * that another sequence holds too is exchanged for a free one first. */
static int64_t pages_to_exchange(const repack_row *r) {
  int64_t n = 0;
  for (int64_t i = 0; i < r->made; i++) n += r->c->refs[kv_blocks(r->c, r->row)[r->from + i] / r->c->page_unit] > 1;
  return n;
}

/* One head: each old page is read once, whole, into kx2 and vx2; survivors pile up in kx and vx. old: entries before. */
static void repack_head(const repack_row *r, int32_t h, const int32_t *old) {
  etk_kv_cache *c = r->c;
  kv_scratch s = kv_scratch_at(c, 0);
  const float *mu = kv_mu(c, r->layer, r->seq, h);
  int64_t filled = 0, made = 0;
  for (int64_t p = r->from; p < r->pages; p++) {
    uint64_t live = kv_live(c, r->row)[p];
    if (old[p] >= 0) kv_page_read(c, kv_page_at(c, old[p], h), mu, s.kx2, s.vx2, &s);
    else kv_tail_read(c, kv_tail_at(c, r->layer, r->seq, h, p), 0, c->seq_k[r->row] - p * KV_SLOTS, s.kx2, s.vx2);
    for (int j = 0; j < KV_SLOTS; j++) {
      if (!(live >> j & 1)) continue;
      memcpy(s.kx + filled * c->d_pad, s.kx2 + (int64_t)j * c->d_pad, (size_t)c->desc.d * 4);
      memcpy(s.vx + filled * c->dv_pad, s.vx2 + (int64_t)j * c->dv_pad, (size_t)c->desc.dv * 4);
      if (++filled < KV_SLOTS) continue;
      kv_page_write(c, kv_page_at(c, kv_blocks(c, r->row)[r->from + made++], h), mu, &s);
      filled = 0;
    }
  }
  if (!filled) return;
  uint8_t *tail = kv_tail_at(c, r->layer, r->seq, h, r->from + made);
  memset(tail, 0, c->tail_bytes);
  kv_tail_write(c, tail, 0, filled, s.kx, s.vx);
}

static void repack_tables(const repack_row *r, int64_t n) {
  etk_kv_cache *c = r->c;
  int32_t *blocks = kv_blocks(c, r->row), *pos = kv_pos(c, r->row);
  uint64_t *live = kv_live(c, r->row);
  int64_t to = r->from * KV_SLOTS, slots = to + n;
  for (int64_t slot = to; slot < c->seq_k[r->row]; slot++)
    if (live[slot / KV_SLOTS] >> (slot % KV_SLOTS) & 1) pos[to++] = pos[slot];
  c->seq_k[r->row] = (int32_t)slots;
  for (int64_t p = r->from; p < r->pages; p++) {
    live[p] = p < kv_pages_of(slots) ? all_slots(r, p) : 0;
    if (p < r->from + r->made || blocks[p] < 0) continue;
    kv_release(c, blocks[p]);
    blocks[p] = -1;
  }
  c->tail_valid[r->row] = slots % KV_SLOTS != 0;
}

/* Which survivors a repack would move: 0 when the 7/8 rule says to leave the table alone. */
static int64_t plan_row(repack_row *r, int32_t *wanted) {
  etk_kv_cache *c = r->c;
  *wanted = 0;
  r->row = kv_row(c, r->layer, r->seq, r->table);
  r->pages = kv_pages_of(c->seq_k[r->row]);
  r->from = 0;
  int64_t all = survivors(r);
  if (all * 8 >= (int64_t)c->seq_k[r->row] * 7) return 0;
  *wanted = 1;
  while (kv_live(c, r->row)[r->from] == all_slots(r, r->from)) r->from++;
  int64_t n = survivors(r);
  r->made = n / KV_SLOTS;
  return n;
}

static void repack_one(repack_row *r, int64_t n) {
  etk_kv_cache *c = r->c;
  int32_t *blocks = kv_blocks(c, r->row);
  int32_t first = c->tables == 1 ? 0 : r->table, last = c->tables == 1 ? c->desc.hkv : r->table + 1;
  for (int64_t i = 0; i < r->made; i++) {
    int32_t old = blocks[r->from + i];
    if (c->refs[old / c->page_unit] == 1) continue;
    int32_t fresh = kv_take(c); /* heads that survive in the shared page are read through a copy */
    for (int32_t h = first; h < last; h++) memcpy(kv_page_at(c, fresh, h), kv_page_at(c, old, h), c->page_bytes);
    kv_release(c, old);
    blocks[r->from + i] = fresh;
  }
  for (int32_t h = first; h < last; h++) repack_head(r, h, blocks);
  repack_tables(r, n);
}

etk_status etk_kv_repack(etk_kv_cache *cache, int32_t layer, int32_t seq, int32_t head, int64_t *moved) {
  etk_status status = kv_check(cache);
  int32_t first, last, wanted;
  if (status < 0) return status;
  if ((status = tables_of(cache, layer, seq, head, &first, &last)) < 0) return status;
  int64_t total = 0, exchange = 0;
  for (int32_t t = first; t < last; t++) {
    repack_row r = {.c = cache, .layer = layer, .seq = seq, .table = t};
    if (plan_row(&r, &wanted)) exchange += pages_to_exchange(&r);
  }
  if (exchange > cache->n_free) return ETK_E_FULL;
  for (int32_t t = first; t < last; t++) {
    repack_row r = {.c = cache, .layer = layer, .seq = seq, .table = t};
    int64_t n = plan_row(&r, &wanted); /* 0 also when every slot from the first hole on is dead: tables change, bytes do not */
    if (wanted) repack_one(&r, n);
    total += n;
  }
  if (moved) *moved = total;
  return ETK_OK;
}
