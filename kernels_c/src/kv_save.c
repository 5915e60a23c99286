/* One sequence of a KV cache as portable bytes, and back.
 *
 * Little-endian, no padding: a header, then for each layer its next_pos, mu_set and mu_k, each table (slots, tail_valid, block
 * flags, live masks, positions) and each head's pages and tail. Codes are row-major over the true widths: INT8 one byte,
 * INT4 two to a byte (K u4, V code + 8), the even element low. One walk writes, sizes and checks, so the three cannot differ:
 * a cursor with a NULL buffer only counts. An import walks the bytes twice, first without touching the cache. */
#include "kv_cache.h"

#include <string.h>

enum { BLOB_MAGIC = 0x31564b45 /* "EKV1" */, BLOB_HEADER = 16 };

typedef struct cursor {
  uint8_t *out;       /* writing */
  const uint8_t *in;  /* reading */
  uint64_t at, size;
  int bad;
} cursor;

static void put(cursor *w, const void *data, uint64_t bytes) {
  if (w->out) {
    if (bytes > w->size - w->at) w->bad = 1;
    else memcpy(w->out + w->at, data, bytes);
  }
  if (!w->bad) w->at += bytes;
}

/* The next bytes, or NULL (and bad) past the end. */
static const uint8_t *get(cursor *r, uint64_t bytes) {
  if (r->bad || bytes > r->size - r->at) {
    r->bad = 1;
    return NULL;
  }
  const uint8_t *p = r->in + r->at;
  r->at += bytes;
  return p;
}

static int32_t get_i32(cursor *r) {
  int32_t x = 0;
  const uint8_t *p = get(r, 4);
  if (p) memcpy(&x, p, 4);
  return x;
}

static void header_of(const etk_kv_cache *c, int32_t h[BLOB_HEADER]) {
  const etk_kv_desc *d = &c->desc;
  int32_t fields[BLOB_HEADER] = {BLOB_MAGIC, 0, d->layers, d->hkv, d->d, d->dv, d->bits, d->k_scale, c->tables,
                                 d->tail_pages, (int32_t)d->flags};
  memcpy(h, fields, sizeof fields);
}

static uint64_t k_scale_bytes(const etk_kv_cache *c) {
  if (c->desc.bits == 4) return (uint64_t)c->desc.d * 4;
  return c->desc.k_scale == ETK_KV_K_PER_TOKEN ? KV_SLOTS * 2 : 4;
}
static uint64_t code_bytes(const etk_kv_cache *c, int32_t width) { return ((uint64_t)width * KV_SLOTS * (uint64_t)c->desc.bits) / 8; }
static uint64_t page_blob_bytes(const etk_kv_cache *c) {
  uint64_t codes = code_bytes(c, c->desc.d) + code_bytes(c, c->desc.dv);
  return c->desc.bits == 16 ? codes : codes + k_scale_bytes(c) + (uint64_t)c->desc.dv * 2;
}

/* Drop the padding of rows [64][pad] to [64][width], in place; 4-bit codes become nibbles. Returns the bytes. */
static uint64_t squeeze(int8_t *codes, int32_t width, int32_t pad, int32_t bits, int32_t bias) {
  uint8_t *out = (uint8_t *)codes;
  for (int32_t j = 1; j < KV_SLOTS; j++) memmove(codes + (int64_t)j * width, codes + (int64_t)j * pad, (size_t)width);
  int64_t n = (int64_t)width * KV_SLOTS;
  if (bits == 8) return (uint64_t)n;
  for (int64_t i = 0; i < n; i += 2) out[i / 2] = (uint8_t)(((codes[i] + bias) & 15) | ((codes[i + 1] + bias) & 15) << 4);
  return (uint64_t)n / 2;
}

static void spread(const uint8_t *in, int32_t width, int32_t pad, int32_t bits, int32_t bias, int8_t *codes) {
  for (int32_t j = 0; j < KV_SLOTS; j++) {
    for (int32_t ch = 0; ch < width; ch++) {
      int64_t i = (int64_t)j * width + ch;
      codes[(int64_t)j * pad + ch] = (int8_t)(bits == 8 ? (int8_t)in[i] : ((in[i / 2] >> (i % 2 * 4)) & 15) - bias);
    }
    memset(codes + (int64_t)j * pad + width, 0, (size_t)(pad - width));
  }
}

/* f16 rows of a tail or f16 page: K [d][64] without the padding channels, V row by row. */
static void put_f16(cursor *w, const etk_kv_cache *c, const uint8_t *tail, int64_t n) {
  const uint16_t *k = (const uint16_t *)(const void *)tail, *v = kv_tail_v(c, tail);
  for (int32_t ch = 0; ch < c->desc.d; ch++) put(w, k + (int64_t)ch * KV_SLOTS, (uint64_t)n * 2);
  for (int64_t j = 0; j < n; j++) put(w, v + j * c->dv_pad, (uint64_t)c->desc.dv * 2);
}

static int finite_f16(const uint8_t *p, uint64_t n) {
  for (uint64_t i = 0; i < n; i++)
    if ((p[2 * i + 1] & 0x7c) == 0x7c) return 0;
  return 1;
}

static void get_f16(cursor *r, const etk_kv_cache *c, uint8_t *tail, int64_t n) {
  uint16_t *k = (uint16_t *)(void *)tail;
  const uint8_t *p = get(r, (uint64_t)n * 2 * (uint64_t)(c->desc.d + c->desc.dv));
  if (!p || !finite_f16(p, (uint64_t)n * (uint64_t)(c->desc.d + c->desc.dv))) {
    r->bad = 1;
    return;
  }
  if (!tail) return;
  memset(tail, 0, c->tail_bytes);
  for (int32_t ch = 0; ch < c->desc.d; ch++, p += n * 2) memcpy(k + (int64_t)ch * KV_SLOTS, p, (size_t)n * 2);
  for (int64_t j = 0; j < n; j++, p += c->desc.dv * 2)
    memcpy(k + (int64_t)c->d_pad * KV_SLOTS + j * c->dv_pad, p, (size_t)c->desc.dv * 2);
}

static void put_page(cursor *w, const etk_kv_cache *c, const uint8_t *page) {
  if (c->desc.bits == 16) {
    put_f16(w, c, page, KV_SLOTS);
    return;
  }
  if (!w->out) {
    w->at += page_blob_bytes(c);
    return;
  }
  kv_scratch s = kv_scratch_at(c, 0);
  int8_t *k = s.codes, *v = s.codes + (int64_t)c->d_pad * KV_SLOTS;
  kv_page_codes(c, page, k, v, s.laid);
  if (c->desc.bits == 4) {
    put(w, page, (uint64_t)c->desc.d * 2);
    put(w, page + (uint64_t)c->d_pad * 2, (uint64_t)c->desc.d * 2);
  } else {
    put(w, page, k_scale_bytes(c));
  }
  put(w, k, squeeze(k, c->desc.d, c->d_pad, c->desc.bits, 0));
  put(w, v, squeeze(v, c->desc.dv, c->dv_pad, c->desc.bits, 8));
  put(w, page + kv_page_geometry(c).v_scale, (uint64_t)c->desc.dv * 2);
}

/* Codes that the quantizer never writes are refused: -128 breaks the sign tricks of some layouts. */
static int legal_codes(const uint8_t *p, uint64_t n, int32_t bits, int value) {
  for (uint64_t i = 0; i < n; i++) {
    if (bits == 8 && p[i] == 0x80) return 0;
    if (bits == 4 && value && ((p[i] & 15) == 0 || p[i] >> 4 == 0)) return 0;
  }
  return 1;
}

static int legal_scale(const etk_kv_cache *c, const uint8_t *p) {
  float s;
  if (c->desc.bits == 4 || c->desc.k_scale == ETK_KV_K_PER_TOKEN) return finite_f16(p, k_scale_bytes(c) / 2);
  memcpy(&s, p, sizeof s);
  return s >= 0.0f && s <= 1e6f;
}

static void get_page(cursor *r, const etk_kv_cache *c, uint8_t *page) {
  if (c->desc.bits == 16) {
    get_f16(r, c, page, KV_SLOTS);
    return;
  }
  uint64_t kb = code_bytes(c, c->desc.d), vb = code_bytes(c, c->desc.dv), dv = (uint64_t)c->desc.dv;
  const uint8_t *p = get(r, page_blob_bytes(c));
  if (!p) return;
  const uint8_t *k = p + k_scale_bytes(c), *v = k + kb, *v_scale = v + vb;
  if (!legal_scale(c, p) || !finite_f16(v_scale, dv) || !legal_codes(k, kb, c->desc.bits, 0) || !legal_codes(v, vb, c->desc.bits, 1)) {
    r->bad = 1;
    return;
  }
  if (!page) return;
  kv_scratch s = kv_scratch_at(c, 0);
  int8_t *kc = s.codes, *vc = s.codes + (int64_t)c->d_pad * KV_SLOTS;
  spread(k, c->desc.d, c->d_pad, c->desc.bits, 0, kc);
  spread(v, c->desc.dv, c->dv_pad, c->desc.bits, 8, vc);
  kv_page_from_codes(c, page, kc, vc, s.laid);
  if (c->desc.bits == 4) {
    memset(page, 0, (size_t)c->d_pad * 4);
    memcpy(page, p, (size_t)c->desc.d * 2);
    memcpy(page + (uint64_t)c->d_pad * 2, p + (uint64_t)c->desc.d * 2, (size_t)c->desc.d * 2);
  } else {
    memcpy(page, p, k_scale_bytes(c));
  }
  uint16_t *scales = (uint16_t *)(void *)(page + kv_page_geometry(c).v_scale);
  memcpy(scales, v_scale, dv * 2);
  for (int32_t ch = c->desc.dv; ch < c->dv_pad; ch++) scales[ch] = 0x3c00; /* 1, as the quantizer leaves padding */
}

static void put_table(cursor *w, const etk_kv_cache *c, int64_t row) {
  int64_t slots = c->seq_k[row], pages = kv_pages_of(slots);
  put(w, &c->seq_k[row], 4);
  put(w, &c->tail_valid[row], 4);
  put(w, kv_live(c, row), (uint64_t)pages * 8);
  put(w, kv_pos(c, row), (uint64_t)slots * 4);
}

static void put_head(cursor *w, const etk_kv_cache *c, int32_t layer, int32_t seq, int32_t h) {
  int64_t row = kv_row(c, layer, seq, kv_table_of(c, h)), slots = c->seq_k[row], pages = kv_pages_of(slots);
  for (int64_t p = 0; p < slots / KV_SLOTS; p++) put_page(w, c, kv_page_at(c, kv_blocks(c, row)[p], h));
  for (int64_t p = pages - c->tail_valid[row]; p < pages; p++)
    put_f16(w, c, kv_tail_at(c, layer, seq, h, p), slots - p * KV_SLOTS < KV_SLOTS ? slots - p * KV_SLOTS : KV_SLOTS);
}

etk_status etk_kv_export(const etk_kv_cache *cache, int32_t seq, void *buf, uint64_t capacity, uint64_t *bytes) {
  etk_status status = kv_check(cache);
  if (status < 0) return status;
  if (!bytes) return ETK_E_NULL;
  if (seq < 0 || seq >= cache->desc.batch) return ETK_E_RANGE;
  if (buf) {
    uint64_t need;
    status = etk_kv_export(cache, seq, NULL, 0, &need);
    if (status < 0) return status;
    if (need > capacity) return ETK_E_WORKSPACE;
  }
  cursor w = {.out = (uint8_t *)buf, .size = capacity};
  int32_t header[BLOB_HEADER];
  header_of(cache, header);
  put(&w, header, sizeof header);
  for (int32_t layer = 0; layer < cache->desc.layers; layer++) {
    int64_t lb = (int64_t)layer * cache->desc.batch + seq;
    put(&w, &cache->next_pos[lb], 8);
    put(&w, &cache->mu_set[lb], 4);
    for (int32_t h = 0; h < cache->desc.hkv; h++) put(&w, kv_mu(cache, layer, seq, h), (uint64_t)cache->desc.d * 4);
    for (int32_t t = 0; t < cache->tables; t++) put_table(&w, cache, kv_row(cache, layer, seq, t));
    for (int32_t h = 0; h < cache->desc.hkv; h++) put_head(&w, cache, layer, seq, h);
  }
  *bytes = w.at;
  return w.bad ? ETK_E_WORKSPACE : ETK_OK;
}

/* One table; dry: only checks. The pages it needs are added to *pages. */
static void get_table(cursor *r, etk_kv_cache *c, int64_t row, int64_t next_pos, int dry, int64_t *need, int64_t *slots, int64_t *valid) {
  *slots = get_i32(r);
  *valid = get_i32(r);
  int64_t pages = *slots < 0 ? 0 : kv_pages_of(*slots), last = -1;
  if (*slots < 0 || *slots > c->desc.max_tokens || *valid < (*slots % KV_SLOTS != 0) || *valid > pages || *valid > c->desc.tail_pages)
    r->bad = 1;
  const uint8_t *live = r->bad ? NULL : get(r, (uint64_t)pages * 8), *pos = r->bad ? NULL : get(r, (uint64_t)*slots * 4);
  if (!live || !pos) {
    *slots = *valid = 0;
    return;
  }
  *need += *slots / KV_SLOTS;
  for (int64_t i = 0; i < *slots; i++) {
    int32_t p;
    memcpy(&p, pos + i * 4, 4);
    if (p <= last || p >= next_pos) r->bad = 1;
    last = p;
  }
  for (int64_t p = 0; p < pages; p++) {
    uint64_t bits, beyond = *slots - p * KV_SLOTS >= KV_SLOTS ? 0 : ~(((uint64_t)1 << (*slots - p * KV_SLOTS)) - 1);
    memcpy(&bits, live + p * 8, 8);
    if (bits & beyond) r->bad = 1;
  }
  if (dry) return;
  memcpy(kv_live(c, row), live, (size_t)pages * 8);
  memcpy(kv_pos(c, row), pos, (size_t)*slots * 4);
  for (int64_t p = 0; p < *slots / KV_SLOTS; p++) kv_blocks(c, row)[p] = kv_take(c);
  c->seq_k[row] = (int32_t)*slots;
  c->tail_valid[row] = (int32_t)*valid;
}

static void get_head(cursor *r, etk_kv_cache *c, int32_t layer, int32_t seq, int32_t h, int dry, int64_t slots, int64_t valid) {
  int64_t row = kv_row(c, layer, seq, kv_table_of(c, h)), pages = kv_pages_of(slots);
  for (int64_t p = 0; p < slots / KV_SLOTS && !r->bad; p++)
    get_page(r, c, dry ? NULL : kv_page_at(c, kv_blocks(c, row)[p], h));
  for (int64_t p = pages - valid; p < pages && !r->bad; p++)
    get_f16(r, c, dry ? NULL : kv_tail_at(c, layer, seq, h, p), slots - p * KV_SLOTS < KV_SLOTS ? slots - p * KV_SLOTS : KV_SLOTS);
}

static void get_layer(cursor *r, etk_kv_cache *c, int32_t layer, int32_t seq, int dry, int64_t *need) {
  int64_t lb = (int64_t)layer * c->desc.batch + seq, next = -1, slots = 0, valid = 0, any = 0;
  const uint8_t *p = get(r, 8);
  if (p) memcpy(&next, p, 8);
  int32_t mu_set = get_i32(r);
  const uint8_t *mu = get(r, (uint64_t)c->desc.hkv * (uint64_t)c->desc.d * 4);
  if (next < 0 || next > INT32_MAX || (mu_set != 0 && mu_set != 1) || !mu) {
    r->bad = 1;
    return;
  }
  for (int64_t i = 0; i < (int64_t)c->desc.hkv * c->desc.d; i++) {
    float x;
    memcpy(&x, mu + i * 4, 4);
    if (!(x >= -65504.0f && x <= 65504.0f)) r->bad = 1;
    if (!dry) c->mu_k[(lb * c->desc.hkv + i / c->desc.d) * c->d_pad + i % c->desc.d] = x;
  }
  /* Counts per table are needed again by the heads; a second cursor re-reads them instead of an array of them. */
  cursor tables = *r;
  for (int32_t t = 0; t < c->tables && !r->bad; t++) {
    get_table(r, c, kv_row(c, layer, seq, t), next, dry, need, &slots, &valid);
    any |= slots >= KV_SLOTS;
  }
  if (any && !mu_set) r->bad = 1;
  for (int32_t h = 0, t = -1; h < c->desc.hkv && !r->bad; h++) {
    int64_t ignored = 0;
    if (kv_table_of(c, h) != t) get_table(&tables, c, 0, next, 1, &ignored, &slots, &valid);
    t = kv_table_of(c, h);
    get_head(r, c, layer, seq, h, dry, slots, valid);
  }
  if (dry || r->bad) return;
  c->next_pos[lb] = next;
  c->mu_set[lb] = mu_set;
}

static int64_t pages_held_alone(const etk_kv_cache *c, int32_t seq) {
  int64_t n = 0;
  for (int32_t layer = 0; layer < c->desc.layers; layer++)
    for (int32_t t = 0; t < c->tables; t++) {
      int64_t row = kv_row(c, layer, seq, t);
      for (int64_t p = 0; p < c->seq_k[row] / KV_SLOTS; p++) n += c->refs[kv_blocks(c, row)[p] / c->page_unit] == 1;
    }
  return n;
}

etk_status etk_kv_import(etk_kv_cache *cache, int32_t seq, const void *buf, uint64_t bytes) {
  etk_status status = kv_check(cache);
  if (status < 0) return status;
  if (!buf) return ETK_E_NULL;
  if (seq < 0 || seq >= cache->desc.batch) return ETK_E_RANGE;
  int32_t want[BLOB_HEADER], have[BLOB_HEADER];
  header_of(cache, want);
  if (bytes < sizeof have) return ETK_E_RANGE;
  memcpy(have, buf, sizeof have);
  if (have[0] != want[0] || have[1] != want[1]) return ETK_E_RANGE;
  if (memcmp(have, want, sizeof have) != 0) return ETK_E_SHAPE;
  for (int dry = 1; dry >= 0; dry--) {
    cursor r = {.in = (const uint8_t *)buf, .at = sizeof have, .size = bytes};
    int64_t need = 0;
    if (!dry && (status = etk_kv_clear(cache, seq)) < 0) return status;
    for (int32_t layer = 0; layer < cache->desc.layers && !r.bad; layer++) get_layer(&r, cache, layer, seq, dry, &need);
    if (r.bad || r.at != bytes) return ETK_E_RANGE;
    if (dry && need > cache->n_free + pages_held_alone(cache, seq)) return ETK_E_FULL;
  }
  return ETK_OK;
}
