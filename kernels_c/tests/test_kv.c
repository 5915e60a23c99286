/* The KV cache: helpers of every ISA against the scalar ones, round trips, bytes that do not depend on how tokens were cut,
 * export and import, truncation, fork, eviction, and everything that must be refused. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgetok/kv.h"
#include "kv_cache.h"
#include "kv_kernel.h"

static int failures;
#define CHECK(cond, ...)                                  \
  do {                                                    \
    if (!(cond)) {                                        \
      printf("%s:%d: %s: ", __FILE__, __LINE__, #cond);   \
      printf(__VA_ARGS__);                                \
      printf("\n");                                       \
      failures++;                                         \
    }                                                     \
  } while (0)

static uint64_t seed = 20240607;
static uint32_t next_u32(void) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(seed >> 32);
}
static float uniform(void) { return (float)next_u32() / 4294967296.0f * 2.0f - 1.0f; }
static float gauss(void) { return (uniform() + uniform() + uniform() + uniform()) * 0.866f; }

typedef struct cache_of {
  etk_kv_cache c;
  void *arena;
  uint64_t bytes;
} cache_of;

static etk_kv_desc describe(int32_t bits, int32_t d, int32_t dv) {
  etk_kv_desc desc = {.struct_size = sizeof desc, .layers = 2, .batch = 3, .hkv = 2, .d = d, .dv = dv, .bits = bits, .pages = 64,
                      .max_tokens = 640};
  return desc;
}

static cache_of open_cache(const etk_kv_desc *desc) {
  cache_of out = {0};
  uint64_t align;
  etk_status s = etk_kv_size(desc, &out.bytes, &align);
  CHECK(s == ETK_OK, "size %d", s);
  out.arena = aligned_alloc(64, out.bytes);
  memset(out.arena, 0xff, out.bytes); /* NaN everywhere: nothing may depend on what the arena held */
  s = etk_kv_init(desc, out.arena, out.bytes, &out.c);
  CHECK(s == ETK_OK, "init %d", s);
  return out;
}

static etk_tensor rows_of(float *x, int64_t h, int64_t all, int64_t from, int64_t n, int64_t d) {
  etk_tensor t = {.data = x + from * d, .dtype = ETK_F32, .rank = 3, .dim = {h, n, d}, .stride = {all * d * 4, d * 4, 4}};
  t.capacity = (uint64_t)(((h - 1) * all + n) * d * 4);
  return t;
}

typedef struct source {
  float *k, *v;
  int64_t n;
  int32_t h, d, dv;
} source;

static source draw(const etk_kv_desc *desc, int64_t n) {
  source s = {malloc((size_t)(desc->hkv * n * desc->d) * 4), malloc((size_t)(desc->hkv * n * desc->dv) * 4), n, desc->hkv, desc->d, desc->dv};
  for (int64_t i = 0; i < desc->hkv * n * desc->d; i++) s.k[i] = gauss() * (i % desc->d == 3 ? 6.0f : 1.0f) + (i % desc->d == 5 ? 4.0f : 0.0f);
  for (int64_t i = 0; i < desc->hkv * n * desc->dv; i++) s.v[i] = gauss() + 0.3f;
  return s;
}
static void drop(source *s) {
  free(s->k);
  free(s->v);
}

static etk_status append(etk_kv_cache *c, int32_t seq, const source *s, int64_t from, int64_t n, const etk_pool *pool) {
  etk_status worst = ETK_OK;
  etk_tensor none = {0};
  for (int32_t layer = 0; layer < c->desc.layers; layer++) {
    etk_tensor k = rows_of(s->k, s->h, s->n, from, n, s->d), v = rows_of(s->v, s->h, s->n, from, n, s->dv);
    etk_status got = etk_kv_pack(c, layer, seq, &k, &v, &none, pool);
    if (got != ETK_OK) worst = got;
  }
  return worst;
}

static uint8_t *blob_of(const etk_kv_cache *c, int32_t seq, uint64_t *bytes) {
  etk_status s = etk_kv_export(c, seq, NULL, 0, bytes);
  CHECK(s == ETK_OK, "export size %d", s);
  uint8_t *b = malloc(*bytes ? *bytes : 1);
  uint64_t wrote = 0;
  s = etk_kv_export(c, seq, b, *bytes, &wrote);
  CHECK(s == ETK_OK && wrote == *bytes, "export %d", s);
  return b;
}

static int same_sequence(const etk_kv_cache *a, int32_t sa, const etk_kv_cache *b, int32_t sb) {
  uint64_t na, nb;
  uint8_t *x = blob_of(a, sa, &na), *y = blob_of(b, sb, &nb);
  int same = na == nb && memcmp(x, y, na) == 0;
  free(x);
  free(y);
  return same;
}

static void test_helpers(void) {
  enum { N = 4096 };
  static float x[N], y[2][N];
  static uint16_t h[2][N];
  const etk_kv_kernel *scalar = etk_kv_kernel_pick(ETK_ISA_SCALAR), *kern;
  CHECK(scalar->isa == ETK_ISA_SCALAR, "cap");
  for (int32_t row = 0; (kern = etk_kv_kernel_at(row)) != NULL; row++) {
    for (uint32_t from = 0; from < 65536; from += N) { /* every f16 */
      for (uint32_t i = 0; i < N; i++) h[0][i] = (uint16_t)((from + i) & 0x7c00u) == 0x7c00u ? 0 : (uint16_t)(from + i);
      scalar->widen_f16(h[0], N, y[0]);
      kern->widen_f16(h[0], N, y[1]);
      CHECK(memcmp(y[0], y[1], sizeof y[0]) == 0, "%s widen from %u", kern->name, from);
      CHECK(scalar->round_f16(y[0], N, h[1], NULL) == 0 && memcmp(h[0], h[1], sizeof h[0]) == 0, "round trip from %u", from);
      for (uint32_t i = 0; i < N; i++) { /* halfway cases and their neighbours */
        uint32_t u;
        memcpy(&u, &y[0][i], 4);
        u += (i % 3 == 0 ? 0x1000u : i % 3 == 1 ? 0x0fffu : 0x1001u);
        memcpy(&x[i], &u, 4);
      }
      x[7] = NAN, x[8] = INFINITY, x[9] = -INFINITY, x[10] = 65519.0f, x[11] = 1e-9f, x[12] = -0.0f;
      int32_t n = (int32_t)(N - from % 7 - (uint32_t)row), a = scalar->round_f16(x, n, h[0], y[0]), b = kern->round_f16(x, n, h[1], y[1]);
      CHECK(a == b && a == 1, "%s note", kern->name);
      CHECK(memcmp(h[0], h[1], (size_t)n * 2) == 0 && memcmp(y[0], y[1], (size_t)n * 4) == 0, "%s round from %u", kern->name, from);
    }
    static uint8_t nibbles[512], wide[2][1024];
    for (int i = 0; i < 512; i++) nibbles[i] = (uint8_t)next_u32();
    for (int32_t bias = -8; bias <= 128; bias += 68) {
      scalar->expand4(nibbles, 512, bias, wide[0]);
      kern->expand4(nibbles, 512, bias, wide[1]);
      CHECK(memcmp(wide[0], wide[1], sizeof wide[0]) == 0, "%s expand4", kern->name);
    }
    for (int32_t d = 16; d <= 256; d += 48) {
      static uint16_t s[256], z[256];
      int8_t codes[2][256];
      int32_t start[2];
      float dot[2], got[2];
      for (int32_t i = 0; i < d; i++) x[i] = gauss();
      scalar->round_f16(x, d, z, NULL);
      for (int32_t i = 0; i < d; i++) x[i] = d == 64 ? 0.0f : fabsf(gauss());
      scalar->round_f16(x, d, s, NULL);
      for (int32_t i = 0; i < d; i++) x[i] = gauss();
      got[0] = scalar->fold_q4(x, s, z, d, 1, codes[0], &start[0], &dot[0]);
      got[1] = kern->fold_q4(x, s, z, d, 1, codes[1], &start[1], &dot[1]);
      CHECK(memcmp(&got[0], &got[1], 4) == 0 && memcmp(&dot[0], &dot[1], 4) == 0 && start[0] == start[1] &&
                memcmp(codes[0], codes[1], (size_t)d) == 0, "%s fold_q4 d=%d", kern->name, d);
    }
  }
}

static float worst_step(const float *x, int64_t n, int64_t d, int64_t ch, int symmetric, float levels) {
  float lo = x[ch], hi = x[ch], top = fabsf(x[ch]);
  for (int64_t i = 1; i < n; i++) {
    float v = x[i * d + ch];
    lo = v < lo ? v : lo;
    hi = v > hi ? v : hi;
    top = fabsf(v) > top ? fabsf(v) : top;
  }
  return symmetric ? top / levels : (hi - lo) / levels;
}

/* Each value of a full page within half a step of its scale, plus what f16 does to values and scales. */
static void test_round_trip(int32_t bits, int32_t k_scale, uint32_t flags, int32_t d, int32_t dv) {
  etk_kv_desc desc = describe(bits, d, dv);
  desc.k_scale = k_scale;
  desc.flags = flags;
  cache_of m = open_cache(&desc);
  source s = draw(&desc, 150);
  etk_status got = append(&m.c, 1, &s, 0, 150, NULL);
  CHECK(got == ETK_OK, "append %d", got);
  float *k = malloc((size_t)(150 * d) * 4), *v = malloc((size_t)(150 * dv) * 4);
  etk_tensor tk = {.data = k, .dtype = ETK_F32, .rank = 2, .dim = {150, d}, .stride = {d * 4, 4}, .capacity = (uint64_t)(600 * d)};
  etk_tensor tv = {.data = v, .dtype = ETK_F32, .rank = 2, .dim = {150, dv}, .stride = {dv * 4, 4}, .capacity = (uint64_t)(600 * dv)};
  for (int32_t h = 0; h < 2; h++) {
    const float *sk = s.k + (int64_t)h * 150 * d, *sv = s.v + (int64_t)h * 150 * dv;
    got = etk_kv_unpack(&m.c, 1, 1, h, 0, 150, 0, &tk, &tv);
    CHECK(got == ETK_OK, "unpack %d", got);
    float spread = 0.0f;
    for (int64_t ch = 0; ch < d; ch++) spread = fmaxf(spread, worst_step(sk, 150, d, ch, 0, 1.0f));
    for (int64_t i = 0; i < 150; i++) {
      int full = i < 128;
      for (int64_t ch = 0; ch < d; ch++) {
        /* INT8: the largest of the (smoothed, maybe rotated) page is under the widest spread (times sqrt d when rotated). */
        float step = !full || bits == 16 ? 0.0f : bits == 4 ? worst_step(sk + i / 64 * 64 * d, 64, d, ch, 0, 15.0f) : spread / 127.0f;
        float slack = 0.52f * step * (flags & ETK_KV_ROT_K ? sqrtf((float)d) : 1.0f) + 0.002f * fabsf(sk[i * d + ch]) + 0.004f;
        CHECK(fabsf(k[i * d + ch] - sk[i * d + ch]) <= slack, "K bits %d flags %u scale %d row %d ch %d: %g for %g, slack %g", bits, flags, k_scale, (int)i, (int)ch,
              (double)k[i * d + ch], (double)sk[i * d + ch], (double)slack);
      }
      for (int64_t ch = 0; ch < dv; ch++) {
        float step = !full || bits == 16 ? 0.0f : worst_step(sv + i / 64 * 64 * dv, 64, dv, ch, 1, bits == 4 ? 7.0f : 127.0f);
        float slack = 0.51f * step + 0.001f * fabsf(sv[i * dv + ch]) + 1e-6f;
        CHECK(fabsf(v[i * dv + ch] - sv[i * dv + ch]) <= slack, "V bits %d row %d ch %d: %g for %g", bits, (int)i, (int)ch,
              (double)v[i * dv + ch], (double)sv[i * dv + ch]);
      }
      if (failures > 20) break;
    }
  }
  free(k);
  free(v);
  drop(&s);
  free(m.arena);
}

/* One call, random cuts, single tokens, other ISAs, a pool: the same bytes. */
static void test_cuts(const etk_kv_desc *desc) {
  cache_of one = open_cache(desc), many = open_cache(desc);
  source s = draw(desc, 333);
  CHECK(append(&one.c, 0, &s, 0, 333, NULL) == ETK_OK, "append");
  for (int64_t at = 0; at < 333;) {
    int64_t n = 1 + next_u32() % 90;
    if (n > 333 - at) n = 333 - at;
    CHECK(append(&many.c, 2, &s, at, n, NULL) == ETK_OK, "append");
    at += n;
  }
  CHECK(same_sequence(&one.c, 0, &many.c, 2), "bits %d: random cuts", desc->bits);
  const etk_pool *pool;
  etk_kv_desc threaded = *desc;
  threaded.threads = 3;
  cache_of par = open_cache(&threaded);
  if (etk_pool_create(3, 0, &pool) == ETK_OK) {
    CHECK(append(&par.c, 0, &s, 0, 200, pool) == ETK_OK && append(&par.c, 0, &s, 200, 133, pool) == ETK_OK, "append");
    CHECK(same_sequence(&one.c, 0, &par.c, 0), "bits %d: pool", desc->bits);
    etk_pool_free(pool);
  }
  const etk_attn_kernel *kernel;
  for (int32_t row = 0; (kernel = etk_attn_kernel_at(row)) != NULL; row++) {
    etk_kv_desc capped = *desc;
    capped.isa_cap = kernel->isa;
    cache_of other = open_cache(&capped);
    CHECK(append(&other.c, 1, &s, 0, 150, NULL) == ETK_OK, "append");
    /* carry 150 tokens over from another ISA and go on there */
    uint64_t bytes;
    uint8_t *blob = blob_of(&other.c, 1, &bytes);
    etk_status got = etk_kv_import(&many.c, 1, blob, bytes);
    CHECK(got == ETK_OK, "import from %s: %d", kernel->name, got);
    CHECK(same_sequence(&other.c, 1, &many.c, 1), "import of %s", kernel->name);
    CHECK(append(&many.c, 1, &s, 150, 183, NULL) == ETK_OK && append(&other.c, 1, &s, 150, 183, NULL) == ETK_OK, "append");
    CHECK(same_sequence(&one.c, 0, &many.c, 1), "bits %d: continued from %s", desc->bits, kernel->name);
    CHECK(same_sequence(&one.c, 0, &other.c, 1), "bits %d: on %s", desc->bits, kernel->name);
    free(blob);
    free(other.arena);
  }
  drop(&s);
  free(one.arena);
  free(many.arena);
  free(par.arena);
}

static void test_truncate(const etk_kv_desc *desc) {
  cache_of a = open_cache(desc), b = open_cache(desc);
  source s = draw(desc, 300), other = draw(desc, 300);
  const int64_t cuts[][2] = {{200, 210}, {180, 200}, {127, 190}, {128, 130}, {64, 66}, {63, 65}, {10, 40}, {129, 192}};
  for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
    CHECK(etk_kv_clear(&a.c, 0) == ETK_OK && etk_kv_clear(&b.c, 0) == ETK_OK, "clear");
    CHECK(append(&a.c, 0, &s, 0, cuts[i][0], NULL) == ETK_OK, "append");
    CHECK(append(&a.c, 0, &other, 0, cuts[i][1] - cuts[i][0], NULL) == ETK_OK, "append");
    CHECK(etk_kv_truncate(&a.c, 0, cuts[i][0]) == ETK_OK, "truncate");
    CHECK(append(&b.c, 0, &s, 0, cuts[i][0], NULL) == ETK_OK, "append");
    CHECK(append(&a.c, 0, &s, cuts[i][0], 300 - cuts[i][0], NULL) == ETK_OK, "append");
    CHECK(append(&b.c, 0, &s, cuts[i][0], 300 - cuts[i][0], NULL) == ETK_OK, "append");
    CHECK(same_sequence(&a.c, 0, &b.c, 0), "bits %d: cut at %d of %d leaves a trace", desc->bits, (int)cuts[i][0], (int)cuts[i][1]);
  }
  /* far back: within the tail's reach no more, but valid, and pages come back */
  int64_t before = a.c.n_free;
  CHECK(etk_kv_truncate(&a.c, 0, 70) == ETK_OK && a.c.n_free > before, "truncate far");
  CHECK(a.c.seq_k[kv_row(&a.c, 1, 0, 0)] == 70 && a.c.next_pos[0] == 70, "slots");
  CHECK(etk_kv_clear(&a.c, 0) == ETK_OK && a.c.n_free == desc->pages / a.c.page_unit, "every page back");
  drop(&s);
  drop(&other);
  free(a.arena);
  free(b.arena);
}

static void test_fork(const etk_kv_desc *desc) {
  cache_of m = open_cache(desc), ref = open_cache(desc);
  source s = draw(desc, 300), other = draw(desc, 300);
  CHECK(append(&m.c, 0, &s, 0, 200, NULL) == ETK_OK, "append");
  int64_t before = m.c.n_free;
  CHECK(etk_kv_fork(&m.c, 0, 2) == ETK_OK && m.c.n_free == before, "a fork takes no page");
  CHECK(same_sequence(&m.c, 0, &m.c, 2), "fork");
  CHECK(append(&m.c, 2, &other, 200, 100, NULL) == ETK_OK && append(&m.c, 0, &s, 200, 100, NULL) == ETK_OK, "append");
  CHECK(append(&ref.c, 0, &s, 0, 300, NULL) == ETK_OK, "append");
  CHECK(same_sequence(&m.c, 0, &ref.c, 0), "the fork changed its source");
  CHECK(etk_kv_clear(&m.c, 0) == ETK_OK, "clear");
  CHECK(append(&ref.c, 1, &s, 0, 200, NULL) == ETK_OK && append(&ref.c, 1, &other, 200, 100, NULL) == ETK_OK, "append");
  CHECK(same_sequence(&m.c, 2, &ref.c, 1), "clearing the source changed the fork");
  CHECK(etk_kv_clear(&m.c, 2) == ETK_OK && m.c.n_free == desc->pages / m.c.page_unit, "pages of a fork come back once");
  drop(&s);
  drop(&other);
  free(m.arena);
  free(ref.arena);
}

static void read_head(const etk_kv_cache *c, int32_t h, int64_t slot, int64_t n, float *k, float *v) {
  etk_tensor tk = {.data = k, .dtype = ETK_F32, .rank = 2, .dim = {n, c->desc.d}, .stride = {c->desc.d * 4, 4}, .capacity = (uint64_t)(n * c->desc.d * 4)};
  etk_tensor tv = {.data = v, .dtype = ETK_F32, .rank = 2, .dim = {n, c->desc.dv}, .stride = {c->desc.dv * 4, 4}, .capacity = (uint64_t)(n * c->desc.dv * 4)};
  etk_status s = etk_kv_unpack(c, 0, 0, h, slot, n, 0, &tk, &tv);
  CHECK(s == ETK_OK, "unpack %d", s);
}

static void test_evict(const etk_kv_desc *desc, int shared) {
  cache_of m = open_cache(desc);
  source s = draw(desc, 400);
  CHECK(append(&m.c, 0, &s, 0, 400, NULL) == ETK_OK, "append");
  if (shared) CHECK(etk_kv_fork(&m.c, 0, 1) == ETK_OK, "fork");
  cache_of copy = open_cache(desc);
  CHECK(append(&copy.c, 0, &s, 0, 400, NULL) == ETK_OK, "append");
  size_t nk = (size_t)(400 * desc->d), nv = (size_t)(400 * desc->dv);
  float *k = malloc(nk * 4), *v = malloc(nv * 4), *k2 = malloc(nk * 4), *v2 = malloc(nv * 4);
  read_head(&m.c, 1, 0, 400, k, v);
  uint64_t keep[7];
  for (int i = 0; i < 7; i++) keep[i] = ((uint64_t)next_u32() << 32 | next_u32()) | 1u;
  keep[0] = ~(uint64_t)0;
  keep[2] = 0;
  keep[6] = ~(uint64_t)0;
  int64_t before = m.c.n_free, row = kv_row(&m.c, 0, 0, kv_table_of(&m.c, 1)), moved, live = 0;
  CHECK(etk_kv_evict(&m.c, 0, 0, -1, keep, 7) == ETK_OK, "evict");
  CHECK(m.c.seq_k[row] == 336 && kv_pos(&m.c, row)[128] == 192, "page 2 is gone: %d slots", m.c.seq_k[row]);
  CHECK(m.c.n_free == before + (shared ? 0 : m.c.tables), "a page came back");
  read_head(&m.c, 1, 0, 336, k2, v2);
  CHECK(memcmp(k, k2, 128 * (size_t)desc->d * 4) == 0 && memcmp(v + 192 * desc->dv, v2 + 128 * desc->dv, 208 * (size_t)desc->dv * 4) == 0,
        "survivors of an eviction are untouched");
  int32_t where[400];
  for (int i = 0; i < 400; i++)
    if (keep[i / 64] >> (i % 64) & 1) where[live++] = i;
  CHECK(etk_kv_repack(&m.c, 0, 0, -1, &moved) == ETK_OK && moved > 0, "repack");
  CHECK(m.c.seq_k[row] == live, "%d slots, %d survivors", m.c.seq_k[row], (int)live);
  read_head(&m.c, 1, 0, live, k2, v2);
  float step = 0.0f; /* survivors move by at most half a step of the new scales: bounded by the widest channel */
  for (int64_t ch = 0; ch < desc->d; ch++) step = fmaxf(step, worst_step(k, 400, desc->d, ch, 0, desc->bits == 4 ? 15.0f : 127.0f));
  if (desc->bits == 16) step = 0.0f;
  for (int64_t i = 0; i < live; i++) {
    CHECK(kv_pos(&m.c, row)[i] == where[i], "position of survivor %d", (int)i);
    for (int64_t ch = 0; ch < desc->d; ch++) {
      float gap = fabsf(k2[i * desc->d + ch] - k[where[i] * desc->d + ch]);
      CHECK(i < 64 ? gap == 0.0f : gap <= 0.52f * step + 0.01f, "survivor %d ch %d moved by %g", (int)i, (int)ch, (double)gap);
    }
    if (failures > 20) break;
  }
  CHECK(append(&m.c, 0, &s, 0, 100, NULL) == ETK_OK, "append after a repack");
  CHECK(kv_pos(&m.c, row)[live] == 400, "positions go on after eviction");
  if (shared) CHECK(same_sequence(&m.c, 1, &copy.c, 0), "eviction changed the fork's source");
  CHECK(etk_kv_clear(&m.c, 0) == ETK_OK && etk_kv_clear(&m.c, 1) == ETK_OK && m.c.n_free == desc->pages / m.c.page_unit, "pages back");
  /* everything evicted but the tail, then everything */
  CHECK(append(&m.c, 0, &s, 0, 128, NULL) == ETK_OK, "append");
  uint64_t nothing[3] = {0};
  CHECK(etk_kv_evict(&m.c, 0, 0, -1, nothing, 2) == ETK_OK && m.c.seq_k[row] == 0, "all evicted");
  CHECK(etk_kv_repack(&m.c, 0, 0, -1, &moved) == ETK_OK && moved == 0, "nothing to repack");
  CHECK(append(&m.c, 0, &s, 128, 30, NULL) == ETK_OK && kv_pos(&m.c, row)[0] == 128, "goes on");
  free(k), free(v), free(k2), free(v2);
  drop(&s);
  free(m.arena);
  free(copy.arena);
}

static void test_full(void) {
  etk_kv_desc desc = describe(8, 32, 32);
  desc.pages = 8; /* two layers, two heads: two pages each */
  cache_of m = open_cache(&desc);
  source s = draw(&desc, 600);
  etk_tensor none = {0}, k = rows_of(s.k, 2, 600, 0, 300, 32), v = rows_of(s.v, 2, 600, 0, 300, 32);
  CHECK(append(&m.c, 0, &s, 0, 150, NULL) == ETK_OK && m.c.n_free == 0, "fits: %d free", (int)m.c.n_free);
  uint64_t n0, n1;
  uint8_t *before = blob_of(&m.c, 0, &n0);
  CHECK(append(&m.c, 0, &s, 150, 42, NULL) == ETK_E_FULL, "no page for the 192nd token");
  CHECK(etk_kv_pack(&m.c, 0, 1, &k, &v, &none, NULL) == ETK_E_FULL, "another sequence");
  uint8_t *after = blob_of(&m.c, 0, &n1);
  CHECK(n0 == n1 && memcmp(before, after, n0) == 0, "a refused append left a trace");
  CHECK(append(&m.c, 0, &s, 150, 41, NULL) == ETK_OK, "191 tokens fit");
  desc.pages = 64;
  desc.max_tokens = 100;
  cache_of small = open_cache(&desc);
  CHECK(append(&small.c, 0, &s, 0, 100, NULL) == ETK_OK && append(&small.c, 0, &s, 100, 1, NULL) == ETK_E_FULL, "max_tokens");
  free(before);
  free(after);
  drop(&s);
  free(m.arena);
  free(small.arena);
}

static void test_blobs(const etk_kv_desc *desc) {
  cache_of m = open_cache(desc);
  source s = draw(desc, 140);
  CHECK(append(&m.c, 0, &s, 0, 140, NULL) == ETK_OK && append(&m.c, 1, &s, 0, 70, NULL) == ETK_OK, "append");
  uint64_t bytes, other_bytes;
  uint8_t *blob = blob_of(&m.c, 0, &bytes), *other = blob_of(&m.c, 1, &other_bytes), *bad = malloc(bytes);
  int64_t free_pages = m.c.n_free;
  for (uint64_t n = 0; n < bytes; n += n < 400 ? 1 : 977) {
    etk_status got = etk_kv_import(&m.c, 1, blob, n);
    CHECK(got < 0, "%d of %d bytes taken", (int)n, (int)bytes);
  }
  for (int i = 0; i < 300; i++) { /* a flipped byte is refused or gives a cache that still exports */
    memcpy(bad, blob, bytes);
    bad[i < 200 ? (uint64_t)i : next_u32() % bytes] ^= (uint8_t)(1 + next_u32() % 255);
    if (etk_kv_import(&m.c, 1, bad, bytes) != ETK_OK) continue;
    uint64_t n;
    free(blob_of(&m.c, 1, &n));
    CHECK(etk_kv_import(&m.c, 1, other, other_bytes) == ETK_OK, "back");
  }
  uint64_t n;
  uint8_t *again = blob_of(&m.c, 1, &n);
  CHECK(n == other_bytes && memcmp(again, other, n) == 0 && m.c.n_free == free_pages, "refused imports left a trace");
  etk_kv_desc wider = *desc;
  wider.d += 1;
  cache_of w = open_cache(&wider);
  CHECK(etk_kv_import(&w.c, 0, blob, bytes) == ETK_E_SHAPE, "another width");
  CHECK(etk_kv_export(&m.c, 0, bad, bytes - 1, &n) == ETK_E_WORKSPACE, "short buffer");
  free(again), free(blob), free(other), free(bad);
  drop(&s);
  free(m.arena);
  free(w.arena);
}

static void test_refusals(void) {
  etk_kv_desc good = describe(8, 32, 48), d;
  uint64_t bytes, align;
#define REFUSED(status, ...)                                                                      \
  do {                                                                                            \
    d = good;                                                                                     \
    __VA_ARGS__;                                                                                  \
    etk_status got_ = etk_kv_size(&d, &bytes, &align);                                            \
    CHECK(got_ == (status), "%s gave %d", #__VA_ARGS__, got_);                                    \
  } while (0)
  REFUSED(ETK_E_STRUCT, d.struct_size = 4);
  REFUSED(ETK_E_STRUCT, d.version = 1);
  REFUSED(ETK_E_SHAPE, d.layers = 0);
  REFUSED(ETK_E_SHAPE, d.d = 1025);
  REFUSED(ETK_E_SHAPE, d.hkv = -1);
  REFUSED(ETK_E_SHAPE, d.max_tokens = 0);
  REFUSED(ETK_E_UNSUPPORTED, d.bits = 5);
  REFUSED(ETK_E_UNSUPPORTED, (d.bits = 4, d.k_scale = ETK_KV_K_PER_TOKEN));
  REFUSED(ETK_E_RANGE, d.flags = 1u << 20);
  REFUSED(ETK_E_RANGE, d.k_scale = 2);
  REFUSED(ETK_E_RANGE, d.tail_pages = 65);
  REFUSED(ETK_E_OVERFLOW, d.pages = (int64_t)1 << 40);
  CHECK(etk_kv_size(NULL, &bytes, &align) == ETK_E_NULL && etk_kv_size(&good, NULL, &align) == ETK_E_NULL, "null");
  cache_of m = open_cache(&good);
  etk_kv_cache c;
  CHECK(etk_kv_init(&good, (char *)m.arena + 8, m.bytes, &c) == ETK_E_ALIGN, "align");
  CHECK(etk_kv_init(&good, m.arena, m.bytes - 1, &c) == ETK_E_WORKSPACE, "short arena");
  source s = draw(&good, 10);
  etk_tensor none = {0}, k = rows_of(s.k, 2, 10, 0, 10, 32), v = rows_of(s.v, 2, 10, 0, 10, 48), t;
  int32_t pos[10] = {5, 6, 7, 9, 20, 21, 22, 23, 24, 25};
  etk_tensor p = {.data = pos, .dtype = ETK_I32, .rank = 1, .dim = {10}, .stride = {4}, .capacity = 40};
  CHECK(etk_kv_pack(&m.c, 2, 0, &k, &v, &none, NULL) == ETK_E_RANGE, "layer");
  CHECK(etk_kv_pack(&m.c, 0, 3, &k, &v, &none, NULL) == ETK_E_RANGE, "seq");
  CHECK(etk_kv_pack(&m.c, 0, 0, &k, &k, &none, NULL) == ETK_E_SHAPE, "v width");
  CHECK((t = k, t.stride[2] = 8, etk_kv_pack(&m.c, 0, 0, &t, &v, &none, NULL)) == ETK_E_STRIDE, "stride");
  CHECK((t = k, t.capacity -= 1, etk_kv_pack(&m.c, 0, 0, &t, &v, &none, NULL)) == ETK_E_OVERFLOW, "capacity");
  CHECK((t = k, t.dtype = ETK_BF16, etk_kv_pack(&m.c, 0, 0, &t, &v, &none, NULL)) == ETK_E_DTYPE, "dtype");
  CHECK((t = k, t.data = NULL, etk_kv_pack(&m.c, 0, 0, &t, &v, &none, NULL)) == ETK_E_NULL, "null data");
  CHECK(etk_kv_pack(&m.c, 0, 0, &k, &v, &p, NULL) == ETK_OK && m.c.next_pos[0] == 26, "positions");
  CHECK(etk_kv_pack(&m.c, 0, 0, &k, &v, &p, NULL) == ETK_E_RANGE, "positions must rise");
  pos[0] = 30;
  CHECK(etk_kv_pack(&m.c, 0, 0, &k, &v, &p, NULL) == ETK_E_RANGE, "positions must rise within a call");
  CHECK(m.c.seq_k[0] == 10 && m.c.next_pos[0] == 26, "refusals changed something");
  s.k[3] = NAN, s.k[4] = INFINITY, s.v[0] = -1e30f;
  CHECK(etk_kv_pack(&m.c, 0, 1, &k, &v, &none, NULL) == ETK_NOTE_NONFINITE, "note");
  float back[480];
  etk_tensor tk = {.data = back, .dtype = ETK_F32, .rank = 2, .dim = {10, 32}, .stride = {128, 4}, .capacity = 1280};
  CHECK(etk_kv_unpack(&m.c, 0, 1, 0, 0, 10, 1, &tk, NULL) == ETK_OK && back[3] == 0.0f && back[4] == 65504.0f, "mapped");
  CHECK(etk_kv_unpack(&m.c, 0, 1, 0, 1, 10, 1, &tk, NULL) == ETK_E_RANGE, "past the end");
  CHECK(etk_kv_evict(&m.c, 0, 0, 1, NULL, 1) == ETK_E_RANGE, "per head without per-head tables");
  CHECK(etk_kv_evict(&m.c, 0, 0, -1, NULL, 2) == ETK_E_SHAPE, "words");
  CHECK(etk_kv_fork(&m.c, 0, 0) == ETK_E_RANGE && etk_kv_truncate(&m.c, 9, 0) == ETK_E_RANGE, "range");
  c = m.c;
  c.magic ^= 1;
  CHECK(etk_kv_clear(&c, 0) == ETK_E_STRUCT && etk_kv_clear(NULL, 0) == ETK_E_NULL, "not a cache");
  etk_kv_stats stats = {.struct_size = sizeof stats};
  CHECK(etk_kv_get_stats(&m.c, &stats) == ETK_OK && stats.slots == 40 && stats.pages_free == 64, "stats");
  drop(&s);
  free(m.arena);
}

int main(void) {
  test_helpers();
  test_refusals();
  test_full();
  const int32_t widths[][2] = {{16, 16}, {64, 64}, {40, 24}, {128, 80}};
  for (size_t i = 0; i < 4; i++) {
    test_round_trip(8, ETK_KV_K_PER_PAGE, 0, widths[i][0], widths[i][1]);
    test_round_trip(8, ETK_KV_K_PER_TOKEN, ETK_KV_PER_HEAD, widths[i][0], widths[i][1]);
    test_round_trip(8, ETK_KV_K_PER_PAGE, ETK_KV_ROT_K, widths[i][0], widths[i][1]);
    test_round_trip(4, ETK_KV_K_PER_PAGE, ETK_KV_NO_SMOOTH_K, widths[i][0], widths[i][1]);
    test_round_trip(16, ETK_KV_K_PER_PAGE, 0, widths[i][0], widths[i][1]);
  }
  const int32_t bits[] = {8, 4, 16};
  for (int i = 0; i < 3; i++)
    for (uint32_t per_head = 0; per_head < 2; per_head++) {
      etk_kv_desc desc = describe(bits[i], 40, 24);
      desc.flags = per_head ? ETK_KV_PER_HEAD : 0;
      desc.k_scale = per_head && bits[i] == 8 ? ETK_KV_K_PER_TOKEN : ETK_KV_K_PER_PAGE;
      test_cuts(&desc);
      test_truncate(&desc);
      test_fork(&desc);
      test_evict(&desc, 0);
      test_evict(&desc, 1);
      test_blobs(&desc);
    }
  if (failures) printf("test_kv: %d failures\n", failures);
  return failures != 0;
}
