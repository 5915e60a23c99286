/* KV caches: descriptors, sequences of operations in any order with hostile arguments, and damaged blobs. After each step
 * the books must balance. */
#include "fuzz.h"

enum { k_most_seqs = 3, k_most_heads = 2 };

static etk_kv_desc choose_desc(fuzz *f) {
  static const int32_t bits[] = {8, 4, 16};
  etk_kv_desc d = {.struct_size = sizeof d, .layers = 1 + fuzz_upto(f, 1), .batch = 1 + fuzz_upto(f, k_most_seqs - 1),
                   .hkv = 1 + fuzz_upto(f, k_most_heads - 1), .d = 1 + fuzz_upto(f, 40), .dv = 1 + fuzz_upto(f, 40),
                   .bits = bits[fuzz_upto(f, 2)], .tail_pages = fuzz_upto(f, 3), .pages = fuzz_upto(f, 24),
                   .max_tokens = 1 + fuzz_upto(f, 255), .flags = fuzz_u8(f) & 7u, .threads = fuzz_upto(f, 2)};
  if (d.bits == 8) d.k_scale = fuzz_u8(f) & 1;
  if (d.flags & ETK_KV_PER_HEAD) d.k_scale = d.bits == 8 ? d.k_scale : 0;
  if (!fuzz_rarely(f)) return d;
  switch (fuzz_upto(f, 12)) {
    case 0: d.layers = (int32_t)fuzz_number(f); break;
    case 1: d.batch = (int32_t)fuzz_number(f); break;
    case 2: d.hkv = (int32_t)fuzz_number(f); break;
    case 3: d.d = (int32_t)fuzz_number(f); break;
    case 4: d.dv = (int32_t)fuzz_number(f); break;
    case 5: d.bits = (int32_t)fuzz_number(f); break;
    case 6: d.k_scale = (int32_t)fuzz_number(f); break;
    case 7: d.tail_pages = (int32_t)fuzz_number(f); break;
    case 8: d.pages = fuzz_number(f); break;
    case 9: d.max_tokens = fuzz_number(f); break;
    case 10: d.isa_cap = (int32_t)fuzz_number(f); break;
    case 11: d.flags = (uint32_t)fuzz_number(f); break;
    default: d.threads = (int32_t)fuzz_number(f); break;
  }
  return d;
}

static void balance(const etk_kv_cache *c) {
  etk_kv_stats s = {.struct_size = sizeof s};
  FUZZ_CHECK(etk_kv_get_stats(c, &s) == ETK_OK);
  FUZZ_CHECK(s.pages_used >= 0 && s.pages_free >= 0 && s.pages_used + s.pages_free <= c->desc.pages);
  FUZZ_CHECK(s.live_slots >= 0 && s.live_slots <= s.slots);
  FUZZ_CHECK(c->n_free >= 0 && c->n_free * c->page_unit <= c->desc.pages);
  for (int32_t i = 0; i < c->desc.layers * c->desc.batch * c->tables; i++)
    FUZZ_CHECK(c->seq_k[i] >= 0 && c->seq_k[i] <= c->desc.max_tokens);
}

static int32_t pick(fuzz *f, int32_t count) { return (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, count - 1)); }

static void pack(fuzz *f, etk_kv_cache *c) {
  const int64_t n = fuzz_upto(f, 150);
  const int64_t kd[] = {c->desc.hkv, n, c->desc.d}, vd[] = {c->desc.hkv, n, c->desc.dv};
  const int32_t dtype = fuzz_u8(f) & 1 ? ETK_F16 : ETK_F32;
  etk_tensor k = fuzz_tensor(f, dtype, 3, kd), v = fuzz_tensor(f, dtype, 3, vd), pos = {0};
  const int32_t layer = pick(f, c->desc.layers), seq = pick(f, c->desc.batch);
  if (fuzz_u8(f) & 1) {
    pos = fuzz_tensor(f, ETK_I64, 1, &n);
    const int known = layer >= 0 && layer < c->desc.layers && seq >= 0 && seq < c->desc.batch;
    int64_t at = known ? c->next_pos[layer * c->desc.batch + seq] : 0;
    for (int64_t i = 0; i < n; i++) {
      const int64_t value = at + i * 2;
      memcpy((char *)pos.data + i * pos.stride[0], &value, 8);
    }
    if (n && fuzz_rarely(f)) {
      at = fuzz_number(f);
      memcpy((char *)pos.data + (fuzz_u8(f) % n) * pos.stride[0], &at, 8);
    }
  }
  if (fuzz_rarely(f)) fuzz_break(f, &k);
  if (fuzz_rarely(f)) fuzz_break(f, &v);
  if (fuzz_rarely(f)) fuzz_break(f, &pos);
  fuzz_pool state;
  (void)!etk_kv_pack(c, layer, seq, &k, &v, &pos, fuzz_make_pool(f, &state));
}

static void unpack(fuzz *f, etk_kv_cache *c) {
  const int64_t n = fuzz_upto(f, 100), kd[] = {n, c->desc.d}, vd[] = {n, c->desc.dv};
  etk_tensor k = fuzz_output(f, ETK_F32, 2, kd), v = fuzz_output(f, ETK_F32, 2, vd);
  void *kdata = k.data, *vdata = v.data;
  const uint64_t kbytes = k.capacity, vbytes = v.capacity;
  if (fuzz_rarely(f)) fuzz_break(f, &k);
  if (fuzz_rarely(f)) fuzz_break(f, &v);
  const etk_status st = etk_kv_unpack(c, pick(f, c->desc.layers), pick(f, c->desc.batch), pick(f, c->desc.hkv),
                                      fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 200), n, fuzz_u8(f) & 1,
                                      fuzz_rarely(f) ? NULL : &k, fuzz_rarely(f) ? NULL : &v);
  if (st < 0) {
    fuzz_untouched(kdata, kbytes);
    fuzz_untouched(vdata, vbytes);
  }
}

static void evict(fuzz *f, etk_kv_cache *c) {
  const int64_t words = fuzz_upto(f, 5);
  uint64_t *keep = fuzz_block(f, (uint64_t)words * 8, 16);
  for (int64_t i = 0; i < words; i++) keep[i] = fuzz_u8(f) & 1 ? 0 : (uint64_t)fuzz_u32(f) << 32 | fuzz_u32(f);
  const int32_t head = c->tables > 1 ? pick(f, c->desc.hkv) : fuzz_rarely(f) ? (int32_t)fuzz_number(f) : -1;
  (void)!etk_kv_evict(c, pick(f, c->desc.layers), pick(f, c->desc.batch), head, fuzz_rarely(f) ? NULL : keep, words);
}

static void save(fuzz *f, etk_kv_cache *c) {
  uint64_t bytes = 0;
  const int32_t from = pick(f, c->desc.batch), to = pick(f, c->desc.batch);
  if (etk_kv_export(c, from, NULL, 0, &bytes) != ETK_OK) return;
  unsigned char *blob = fuzz_block(f, bytes, 16);
  FUZZ_CHECK(bytes == 0 || etk_kv_export(c, from, blob, bytes - 1, &bytes) == ETK_E_WORKSPACE);
  FUZZ_CHECK(etk_kv_export(c, from, blob, bytes, &bytes) == ETK_OK);
  const int damage = fuzz_upto(f, 3);
  for (int i = 0; i < damage && bytes; i++) {
    const int64_t value = fuzz_number(f);
    uint64_t at = (fuzz_u8(f) & 1 ? fuzz_u8(f) & ~3u : fuzz_u32(f)) % bytes;
    const uint64_t width = at + 8 <= bytes ? 8 : 1;
    memcpy(blob + at, &value, fuzz_u8(f) & 1 && width == 8 ? 8 : fuzz_u8(f) & 1 && width == 8 ? 4 : 1);
  }
  unsigned char *given = blob;
  if (bytes && fuzz_rarely(f)) { /* cut short, in memory of its own */
    bytes = fuzz_u32(f) % bytes;
    given = fuzz_block(f, bytes, 16);
    memcpy(given, blob, bytes);
  }
  (void)!etk_kv_import(c, to, given, bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  fuzz f = {.data = data, .size = size};
  const etk_kv_desc plain = choose_desc(&f);
  const etk_kv_desc *desc = fuzz_struct(&f, &plain, sizeof plain);
  uint64_t bytes = 0, align = 0;
  etk_kv_cache cache = {.struct_size = sizeof cache};
  if (etk_kv_size(desc, &bytes, &align) == ETK_OK && bytes <= FUZZ_MAX_BYTES) {
    unsigned char *arena = fuzz_block(&f, bytes, align);
    memset(arena, FUZZ_POISON, bytes);
    FUZZ_CHECK(bytes == 0 || etk_kv_init(desc, arena, bytes - 1, &cache) == ETK_E_WORKSPACE);
    if (align > 1) FUZZ_CHECK(etk_kv_init(desc, arena + 1, bytes, &cache) < 0);
    FUZZ_CHECK(etk_kv_init(desc, arena, bytes, &cache) == ETK_OK);
    balance(&cache);
    for (int step = 0; step < 12 && f.size && f.nblocks < FUZZ_MAX_BLOCKS - 8; step++) {
      const int32_t batch = cache.desc.batch;
      switch (fuzz_upto(&f, 9)) {
        default: pack(&f, &cache); break;
        case 3: unpack(&f, &cache); break;
        case 4: (void)!etk_kv_truncate(&cache, pick(&f, batch), fuzz_rarely(&f) ? fuzz_number(&f) : fuzz_upto(&f, 255)); break;
        case 5: (void)!etk_kv_clear(&cache, pick(&f, batch)); break;
        case 6: (void)!etk_kv_fork(&cache, pick(&f, batch), pick(&f, batch)); break;
        case 7: evict(&f, &cache); break;
        case 8: {
          int64_t moved = 0;
          const int32_t head = cache.tables > 1 ? pick(&f, cache.desc.hkv) : -1;
          (void)!etk_kv_repack(&cache, pick(&f, cache.desc.layers), pick(&f, batch), head, fuzz_u8(&f) & 1 ? &moved : NULL);
          break;
        }
        case 9: save(&f, &cache); break;
      }
      balance(&cache);
    }
  }
  fuzz_free(&f);
  return 0;
}
