/* Paged KV caches: pages of 64 slots in INT8, INT4 or f16, with f16 copies of the last pages (the tail).
 *
 * A token takes one slot in every (layer, sequence, KV head). Slots fill pages in order. A page that is not full lives in
 * the tail, row for row in f16; when its 64th slot is written it is quantized once, from those f16 values, and becomes
 * immutable. The tail keeps the f16 copies of the last tail_pages pages, the full ones included, until they are overwritten.
 * So the bytes of a cache do not depend on how the tokens were cut into calls.
 *
 *   INT8  K = mu_k + s[t or page] * code, V = s[channel] * code, code in -127..127
 *   INT4  K = mu_k + s[channel] * code + z[channel], code in 0..15 (u4);  V = s[channel] * code, code in -7..7 (s4)
 *   f16   K, V as given
 * s and z are f16 (the per-page K scale of INT8 is f32) and belong to a page. mu_k is the mean of the first 64 keys of a
 * sequence, per (layer, KV head), frozen; with ETK_KV_ROT_K the code part of K is rotated (Hadamard) after mu_k is taken off.
 *
 * Positions are the caller's and strictly ascending within a sequence; eviction clears bits of a 64-bit live mask per page
 * and frees a full page without a live slot, closing the gap in the block table. Quantized pages are immutable, so a fork
 * shares them by reference count (copy on write without a copy); only tails, tables and positions are copied.
 *
 * Tables, when ETK_KV_PER_HEAD is set, are per KV head (T = Hkv), else one for all heads of a layer (T = 1), where entry p
 * stands for the pages p .. p + Hkv - 1. Nothing here locks: the functions of this header that take a cache must be serialised
 * by the caller (unpack and export use the cache's scratch); attention only reads and may share it with other readers. */
#ifndef EDGETOK_KV_H
#define EDGETOK_KV_H

#include "edgetok/base.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { ETK_KV_PAGE_SLOTS = 64, ETK_KV_MAX_TAIL = 64 };
enum { ETK_KV_K_PER_PAGE = 0, ETK_KV_K_PER_TOKEN = 1 }; /* k_scale; PER_TOKEN (f16 each) for INT8 caches that may evict */
enum { /* flags; an unknown bit is ETK_E_RANGE */
  ETK_KV_PER_HEAD = 1u << 0,    /* a block table per KV head, for policies that evict per head */
  ETK_KV_ROT_K = 1u << 1,       /* rotate K by a Hadamard matrix of the largest power of two that divides d */
  ETK_KV_NO_SMOOTH_K = 1u << 2, /* mu_k = 0 */
};

typedef struct etk_kv_desc {
  uint32_t struct_size, version;      /* version 0 */
  int32_t layers, batch, hkv, d, dv;  /* batch: sequences; 1 <= d, dv <= 1024 */
  int32_t bits;                       /* 8, 4 or 16 */
  int32_t k_scale;                    /* ETK_KV_K_*; INT4 is always per (page, channel) and takes 0 */
  int32_t tail_pages;                 /* f16 pages kept per (layer, sequence, head), 1..64; 0 = 2. A call of attention may
                                         span that many pages of new rows, and truncation within them is exact */
  int64_t pages;                      /* capacity: pages of one (layer, KV head), all sequences together */
  int64_t max_tokens;                 /* slots a sequence may hold at once */
  int32_t isa_cap;                    /* ETK_ISA_*; 0 = best. Attention over this cache needs the same page layout */
  uint32_t flags;
  int32_t threads;                    /* most workers etk_kv_pack may use, 1..256; 0 = 1 */
  int32_t reserved;
} etk_kv_desc;

/* A cache: this struct is the caller's, filled by etk_kv_init; everything it points to lies in the caller's arena. The
 * arrays may be read at any time between calls; write none of them. L layers, B sequences, T tables (1 or Hkv). */
typedef struct etk_kv_cache {
  uint32_t struct_size, magic;
  etk_kv_desc desc;                   /* with its defaults filled in */
  int32_t d_pad, dv_pad, tables, isa; /* isa of the page layout */
  int32_t layout, k_bias;             /* k_bias: 128 where K codes are kept as u8 = code + 128, else 0 */
  int32_t page_unit, reserved;        /* page_unit: pages per block-table entry */
  int64_t max_pages;                  /* entries of a block table: ceil(max_tokens / 64) */
  uint64_t page_bytes, tail_bytes;    /* of one page; of one tail page (K, then V) */
  uint8_t *pages;                     /* [pages] page_bytes each */
  uint8_t *tails;                     /* [L][B][Hkv][tail_pages] tail_bytes each */
  int32_t *block_table;               /* [L][B][T][max_pages] page number; -1 for the page still in the tail and beyond */
  int32_t *seq_k;                     /* [L][B][T] slots used */
  int32_t *pos;                       /* [L][B][T][max_pages * 64] position of each slot, ascending */
  uint64_t *live;                     /* [L][B][T][max_pages] bit j = slot j of the page is live */
  int32_t *removed;                   /* [L][B][T] pages freed so far; page i's tail is (i + removed) % tail_pages */
  int32_t *tail_valid;                /* [L][B][T] how many of the last pages have their f16 copy */
  int64_t *next_pos;                  /* [L][B] position after the last one appended; survives eviction */
  float *mu_k;                        /* [L][B][Hkv][d_pad] */
  int32_t *mu_set;                    /* [L][B] 1 once mu_k is frozen */
  int32_t *refs;                      /* [pages / page_unit] sequences that hold the page */
  int32_t *free_list;                 /* [pages / page_unit], a stack */
  int64_t n_free;                     /* entries of free_list */
  uint8_t *scratch;                   /* [threads] scratch_bytes each */
  uint64_t scratch_bytes;
  const void *attn_kernel, *kv_kernel;
} etk_kv_cache;

/* Bytes and alignment of the arena. Returns ETK_E_NULL, ETK_E_STRUCT, ETK_E_SHAPE, ETK_E_RANGE, ETK_E_OVERFLOW, ETK_E_ISA,
 * ETK_E_UNSUPPORTED (bits and k_scale that do not go together). */
ETK_API ETK_MUST_USE etk_status etk_kv_size(const etk_kv_desc *desc, uint64_t *bytes, uint64_t *align);

/* Set up an empty cache in arena, which must outlive it. Only tables are written: page memory is touched when used, so an
 * arena from mmap is committed page by page. As etk_kv_size; also ETK_E_ALIGN, ETK_E_WORKSPACE (arena too small). */
ETK_API ETK_MUST_USE etk_status etk_kv_init(const etk_kv_desc *desc, void *arena, uint64_t arena_bytes, etk_kv_cache *cache);

/* Append N tokens to a sequence in one layer. k [Hkv, N, d], v [Hkv, N, dv], f32 or f16, any strides with a dense last axis.
 * pos i32 or i64 [N], strictly ascending and above every position already there, below 2^31; rank 0: next_pos, next_pos + 1, ...
 * NaN becomes 0 and values beyond f16 its largest finite value (ETK_NOTE_NONFINITE). On any error nothing is changed:
 * ETK_E_NULL, ETK_E_STRUCT, ETK_E_RANGE (layer, seq, pos), ETK_E_SHAPE, ETK_E_DTYPE, ETK_E_STRIDE, ETK_E_OVERFLOW,
 * ETK_E_FULL (no page left, or more than max_tokens). */
ETK_API ETK_MUST_USE etk_status etk_kv_pack(etk_kv_cache *cache, int32_t layer, int32_t seq, const etk_tensor *k,
                                            const etk_tensor *v, const etk_tensor *pos, const etk_pool *pool);

/* The same with rotary embedding of the keys on their way in, page by page in cache: k is what etk_rope would give for it at
 * these positions, then packed. cos_table, sin_table f32 [P, rot / 2], row 0 for position table_first; interleaved as etk_rope.
 * Also ETK_E_RANGE: a position without a row. */
ETK_API ETK_MUST_USE etk_status etk_kv_pack_rope(etk_kv_cache *cache, int32_t layer, int32_t seq, const etk_tensor *k,
                                                 const etk_tensor *v, const etk_tensor *pos, const etk_tensor *cos_table,
                                                 const etk_tensor *sin_table, int64_t table_first, int32_t interleaved,
                                                 const etk_pool *pool);

/* Slots slot .. slot + n - 1 of one KV head as floats: k [n, d], v [n, dv] f32, either may be NULL. Slots whose page is still
 * in the tail are given from there when from_tail is 1 (the values attention reads for a query of that page), else
 * quantized ones wherever there are any. ETK_E_NULL, ETK_E_RANGE, ETK_E_SHAPE, ETK_E_DTYPE, ETK_E_STRIDE, ETK_E_OVERFLOW. */
ETK_API ETK_MUST_USE etk_status etk_kv_unpack(const etk_kv_cache *cache, int32_t layer, int32_t seq, int32_t head, int64_t slot,
                                              int64_t n, int32_t from_tail, etk_tensor *k, etk_tensor *v);

/* Forget every slot of the sequence, in every layer, whose position is next_pos or more. Exact (as if those tokens had never
 * been appended) while the cut lies within the f16 tail; further back the new last page is the f16 rounding of its
 * quantized values. mu_k stays frozen unless fewer than 64 tokens remain and the tail holds them. */
ETK_API ETK_MUST_USE etk_status etk_kv_truncate(etk_kv_cache *cache, int32_t seq, int64_t next_pos);

/* Empty a sequence and give its pages back. */
ETK_API ETK_MUST_USE etk_status etk_kv_clear(etk_kv_cache *cache, int32_t seq);

/* Make dst (cleared first) continue as src: quantized pages shared by reference count, the rest copied. */
ETK_API ETK_MUST_USE etk_status etk_kv_fork(etk_kv_cache *cache, int32_t src, int32_t dst);

/* Evict: live &= keep, word by word; head -1 stands for every table of the layer, and must be -1 without ETK_KV_PER_HEAD.
 * keep [n_words], n_words = ceil(seq_k / 64) of the table (with head -1: of every table). A full page without a live slot
 * is given back and its table entry closed, so that later slots move down by 64. Survivors are not touched. */
ETK_API ETK_MUST_USE etk_status etk_kv_evict(etk_kv_cache *cache, int32_t layer, int32_t seq, int32_t head, const uint64_t *keep,
                                             int64_t n_words);

/* Move survivors together, ascending by position, if live slots are under 7/8 of the slots of the table; pages before the
 * first hole stay untouched, the others are requantized once. *moved: survivors rewritten (0 = nothing to do); may be NULL.
 * ETK_E_FULL when pages shared with another sequence leave no room: nothing is changed then. */
ETK_API ETK_MUST_USE etk_status etk_kv_repack(etk_kv_cache *cache, int32_t layer, int32_t seq, int32_t head, int64_t *moved);

/* One sequence, all layers, as portable bytes (row-major codes, scales, tail, live masks, positions, mu_k; little-endian).
 * buf NULL: only the size. ETK_E_WORKSPACE when capacity is too small. Import clears dst first and checks every field; a
 * blob that does not fit this cache is ETK_E_SHAPE, a damaged one ETK_E_RANGE, and neither changes the cache. Continuing
 * an imported sequence gives the same bytes as continuing the exported one, on any ISA. */
ETK_API ETK_MUST_USE etk_status etk_kv_export(const etk_kv_cache *cache, int32_t seq, void *buf, uint64_t capacity, uint64_t *bytes);
ETK_API ETK_MUST_USE etk_status etk_kv_import(etk_kv_cache *cache, int32_t seq, const void *buf, uint64_t bytes);

typedef struct etk_kv_stats {
  uint32_t struct_size, reserved;
  uint64_t arena_bytes;      /* what etk_kv_size asks for */
  uint64_t page_bytes_used;  /* allocated pages, live or not, shared ones once */
  uint64_t tail_bytes;       /* all tails */
  uint64_t table_bytes;      /* tables, positions, masks, mu_k, free list, scratch */
  int64_t pages_used, pages_free;
  int64_t live_slots, slots; /* over all layers, sequences and KV heads */
} etk_kv_stats;
ETK_API ETK_MUST_USE etk_status etk_kv_get_stats(const etk_kv_cache *cache, etk_kv_stats *stats);

#ifdef __cplusplus
}
#endif
#endif
