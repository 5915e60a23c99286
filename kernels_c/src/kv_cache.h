/* Inside of the KV cache: where things lie, and what its files share. Internal. */
#ifndef ETK_KV_CACHE_H
#define ETK_KV_CACHE_H

#include "attn_kernel.h"
#include "edgetok/kv.h"
#include "kv_kernel.h"

enum { KV_MAGIC = 0x564b5445 /* "ETKV" */, KV_SLOTS = ETK_KV_PAGE_SLOTS };

/* Offsets inside a page: [K scales | V scales | V column sums | K codes | V codes], one stream for a reader.
 *   INT8  K scales f32 [1] or f16 [64];  K d_pad*64, V dv_pad*64 bytes in the ISA's layout;  V scales f16 [dv_pad]
 *   INT4  K scales f16 [d_pad], then zeros f16 [d_pad];  K d_pad*32, V dv_pad*32 bytes: the ISA's layout of the codes (K as
 *         they are, V plus 8), of which byte i of chunk 2c (64 bytes) is the low nibble of byte i of packed chunk c and
 *         chunk 2c + 1 the high nibble
 *   f16   K [d_pad][64], V [64][dv_pad], as a tail page
 * V column sums s32 [dv_pad] only for layouts that need them. Every part starts at a multiple of 64. */
typedef struct kv_geometry {
  uint64_t k_scale, k, v, v_scale, colsum, bytes;
} kv_geometry;

kv_geometry kv_page_geometry(const etk_kv_cache *c);

/* NULL, struct size and magic. */
etk_status kv_check(const etk_kv_cache *c);

static inline const etk_attn_kernel *kv_attn(const etk_kv_cache *c) { return (const etk_attn_kernel *)c->attn_kernel; }
static inline const etk_kv_kernel *kv_kern(const etk_kv_cache *c) { return (const etk_kv_kernel *)c->kv_kernel; }

static inline int64_t kv_row(const etk_kv_cache *c, int32_t layer, int32_t seq, int32_t table) {
  return ((int64_t)layer * c->desc.batch + seq) * c->tables + table;
}
static inline int32_t kv_table_of(const etk_kv_cache *c, int32_t head) { return c->tables == 1 ? 0 : head; }
static inline int64_t kv_pages_of(int64_t slots) { return (slots + KV_SLOTS - 1) / KV_SLOTS; }
static inline int32_t *kv_blocks(const etk_kv_cache *c, int64_t row) { return c->block_table + row * c->max_pages; }
static inline uint64_t *kv_live(const etk_kv_cache *c, int64_t row) { return c->live + row * c->max_pages; }
static inline int32_t *kv_pos(const etk_kv_cache *c, int64_t row) { return c->pos + row * c->max_pages * KV_SLOTS; }

/* The page of a head: entry is what the block table holds. */
static inline uint8_t *kv_page_at(const etk_kv_cache *c, int32_t entry, int32_t head) {
  return c->pages + ((uint64_t)entry + (c->tables == 1 ? (uint64_t)head : 0)) * c->page_bytes;
}
static inline uint8_t *kv_tail_at(const etk_kv_cache *c, int32_t layer, int32_t seq, int32_t head, int64_t page) {
  int64_t row = kv_row(c, layer, seq, kv_table_of(c, head));
  int64_t ring = (page + c->removed[row]) % c->desc.tail_pages;
  int64_t lbh = ((int64_t)layer * c->desc.batch + seq) * c->desc.hkv + head;
  return c->tails + (uint64_t)(lbh * c->desc.tail_pages + ring) * c->tail_bytes;
}
/* Whether page (of np) has its f16 copy. */
static inline int kv_in_tail(const etk_kv_cache *c, int64_t row, int64_t page) {
  return page >= kv_pages_of(c->seq_k[row]) - c->tail_valid[row];
}
static inline float *kv_mu(const etk_kv_cache *c, int32_t layer, int32_t seq, int32_t head) {
  return c->mu_k + (((int64_t)layer * c->desc.batch + seq) * c->desc.hkv + head) * c->d_pad;
}
static inline const uint16_t *kv_tail_v(const etk_kv_cache *c, const uint8_t *tail) {
  return (const uint16_t *)(const void *)tail + (int64_t)c->d_pad * KV_SLOTS;
}

/* Scratch of one worker: kx [64][d_pad], vx [64][dv_pad] floats, the same again (repack), a page's scales, codes, one page laid
 * out. */
typedef struct kv_scratch {
  float *kx, *vx, *kx2, *vx2, *scales;
  int8_t *codes, *laid;
} kv_scratch;
uint64_t kv_scratch_bytes(const etk_kv_cache *c);
kv_scratch kv_scratch_at(const etk_kv_cache *c, int worker);

/* Page allocation, in units of page_unit. kv_take needs n_free > 0. */
int32_t kv_take(etk_kv_cache *c);
void kv_release(etk_kv_cache *c, int32_t entry);

/* Rotate rows in place: the orthonormal Hadamard matrix of the largest power of two that divides d, block by block. */
void kv_rotate(float *x, int32_t d);

/* Quantize 64 keys kx [64][d_pad] (raw; smoothed and rotated in place) and values vx [64][dv_pad] into a page. */
void kv_page_write(const etk_kv_cache *c, uint8_t *page, const float *mu, const kv_scratch *s);
/* The page as floats, mu added and rotation undone: kx [64][d_pad], vx [64][dv_pad] (padding is not written). */
void kv_page_read(const etk_kv_cache *c, const uint8_t *page, const float *mu, float *kx, float *vx, const kv_scratch *s);
/* Row-major codes [64][d_pad] and [64][dv_pad] of an INT8 or INT4 page, and back (codes as in kv.h). */
void kv_page_codes(const etk_kv_cache *c, const uint8_t *page, int8_t *k, int8_t *v, int8_t *laid);
void kv_page_from_codes(const etk_kv_cache *c, uint8_t *page, const int8_t *k, const int8_t *v, int8_t *laid);

/* n rows of a tail page from slot on, as floats, and back. */
void kv_tail_read(const etk_kv_cache *c, const uint8_t *tail, int64_t slot, int64_t n, float *kx, float *vx);
void kv_tail_write(const etk_kv_cache *c, uint8_t *tail, int64_t slot, int64_t n, const float *kx, const float *vx);

#endif
