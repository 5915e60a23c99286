/* Attention over paged caches: close to a float64 softmax over what the pages hold, and bit for bit independent of the cut
 * into calls, the rows of a call, the threads, and of what padding holds. Every kernel that runs here. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attn_paged_core.h"
#include "edgetok/attn.h"
#include "edgetok/kv.h"
#include "kv_cache.h"

static int failures;
#define CHECK(cond, ...)                                \
  do {                                                  \
    if (!(cond)) {                                      \
      printf("%s:%d: %s: ", __FILE__, __LINE__, #cond); \
      printf(__VA_ARGS__);                              \
      printf("\n");                                     \
      failures++;                                       \
    }                                                   \
  } while (0)

static uint64_t seed = 20240608;
static uint32_t next_u32(void) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(seed >> 32);
}
static float uniform(void) { return (float)next_u32() / 4294967296.0f * 2.0f - 1.0f; }
static float gauss(void) { return (uniform() + uniform() + uniform() + uniform()) * 0.866f; }

typedef struct setup {
  etk_kv_desc kv;
  etk_attn_desc at;
  int64_t tokens;
  float *q, *k, *v; /* q [hq][tokens][d], k [hkv][tokens][d], v */
} setup;

static setup make(int32_t bits, int32_t k_scale, int32_t hq, int32_t hkv, int32_t d, int32_t dv, int64_t tokens) {
  setup s = {.kv = {.struct_size = sizeof(etk_kv_desc), .layers = 1, .batch = 1, .hkv = hkv, .d = d, .dv = dv, .bits = bits,
                    .k_scale = k_scale, .pages = hkv * (tokens / 64 + 1), .max_tokens = tokens},
             .at = {.struct_size = sizeof(etk_attn_desc), .batch = 1, .hq = hq, .hkv = hkv, .d = d, .dv = dv, .max_n = tokens, .max_m = tokens,
                    .compute = bits == 16 ? ETK_C_F32 : ETK_C_S8S8, .kv_layout = ETK_KV_PAGED, .mask_kind = ETK_MASK_CAUSAL},
             .tokens = tokens};
  s.q = malloc((size_t)(hq * tokens * d) * 4);
  s.k = malloc((size_t)(hkv * tokens * d) * 4);
  s.v = malloc((size_t)(hkv * tokens * dv) * 4);
  for (int64_t i = 0; i < hq * tokens * d; i++) s.q[i] = gauss() * 1.5f;
  for (int64_t i = 0; i < hkv * tokens * d; i++) s.k[i] = gauss() * (i % d == 3 ? 4.0f : 1.0f) + (i % d == 5 ? 3.0f : 0.0f);
  for (int64_t i = 0; i < hkv * tokens * dv; i++) s.v[i] = gauss() + 0.2f;
  for (int64_t c = 0; c < d; c++) s.k[c] = s.q[c] * 2.0f; /* slot 0 is a sink for some rows */
  return s;
}
static void drop(setup *s) {
  free(s->q);
  free(s->k);
  free(s->v);
}

typedef struct engine {
  etk_kv_cache c;
  const etk_attn_kernel *kernel;
  void *arena, *ws;
  uint64_t ws_bytes;
  float *o, *lse; /* [hq][tokens][dv], [hq][tokens] */
} engine;

static engine start(const setup *s, int32_t isa, int32_t nthreads) {
  engine e = {0};
  etk_kv_desc kv = s->kv;
  etk_status status;
  uint64_t bytes, align;
  kv.isa_cap = isa;
  e.kernel = etk_attn_kernel_pick(isa, &status);
  CHECK(etk_kv_size(&kv, &bytes, &align) == ETK_OK, "size");
  e.arena = aligned_alloc(64, bytes);
  memset(e.arena, 0xff, bytes);
  CHECK(etk_kv_init(&kv, e.arena, bytes, &e.c) == ETK_OK, "init");
  CHECK(etk_paged_workspace(&s->at, e.kernel, nthreads, &e.ws_bytes) == ETK_OK, "workspace");
  e.ws_bytes = (e.ws_bytes + 63) & ~(uint64_t)63;
  e.ws = aligned_alloc(64, e.ws_bytes);
  memset(e.ws, 0xff, e.ws_bytes);
  e.o = malloc((size_t)(s->at.hq * s->tokens * s->at.dv) * 4);
  e.lse = malloc((size_t)(s->at.hq * s->tokens) * 4);
  return e;
}
static void stop(engine *e) {
  free(e->arena);
  free(e->ws);
  free(e->o);
  free(e->lse);
}

static etk_tensor view3(float *x, int64_t h, int64_t all, int64_t from, int64_t n, int64_t d) {
  etk_tensor t = {.data = x + from * d, .dtype = ETK_F32, .rank = 3, .dim = {h, n, d}, .stride = {all * d * 4, d * 4, 4}};
  t.capacity = (uint64_t)(((h - 1) * all + n) * d * 4);
  return t;
}
static etk_tensor view4(float *x, int64_t h, int64_t all, int64_t from, int64_t n, int64_t d) {
  etk_tensor a = view3(x, h, all, from, n, d), t = a;
  t.rank = 4;
  t.dim[0] = 1, t.stride[0] = 0;
  for (int i = 0; i < 3; i++) t.dim[i + 1] = a.dim[i], t.stride[i + 1] = a.stride[i];
  return t;
}

static void push(engine *e, const setup *s, int64_t from, int64_t n) {
  etk_tensor none = {0}, k = view3(s->k, s->kv.hkv, s->tokens, from, n, s->kv.d), v = view3(s->v, s->kv.hkv, s->tokens, from, n, s->kv.dv);
  etk_status got = etk_kv_pack(&e->c, 0, 0, &k, &v, &none, NULL);
  CHECK(got == ETK_OK, "pack %d", got);
}

static etk_attn_io query(engine *e, const setup *s, int64_t from, int64_t n) {
  etk_attn_io io = {.struct_size = sizeof io, .kv = &e->c};
  io.q = view4(s->q, s->at.hq, s->tokens, from, n, s->at.d);
  io.o = view4(e->o, s->at.hq, s->tokens, from, n, s->at.dv);
  io.lse = view3(e->lse, s->at.hq, s->tokens, from, n, 1);
  io.lse.dim[0] = 1, io.lse.dim[1] = s->at.hq, io.lse.dim[2] = n;
  io.lse.stride[0] = 0, io.lse.stride[1] = s->tokens * 4, io.lse.stride[2] = 4;
  return io;
}

static void attend(engine *e, const setup *s, int64_t from, int64_t n, int32_t nthreads, const etk_pool *pool) {
  etk_attn_io io = query(e, s, from, n);
  etk_status got = etk_paged_run(&s->at, e->kernel, nthreads, &io, e->ws, e->ws_bytes, pool);
  CHECK(got >= 0, "run %d", got);
}

/* What each row should read: own page from f16, earlier ones from codes. In double. */
static void reference(const engine *e, const setup *s, int64_t row, int32_t h, double *o, double *lse) {
  int64_t d = s->at.d, dv = s->at.dv, own = row / 64 * 64;
  int32_t hk = h / (s->at.hq / s->at.hkv);
  float *k = malloc((size_t)((row + 1) * d) * 4), *v = malloc((size_t)((row + 1) * dv) * 4);
  etk_tensor tk = {.data = k, .dtype = ETK_F32, .rank = 2, .dim = {own, d}, .stride = {d * 4, 4}, .capacity = (uint64_t)(own * d * 4)};
  etk_tensor tv = {.data = v, .dtype = ETK_F32, .rank = 2, .dim = {own, dv}, .stride = {dv * 4, 4}, .capacity = (uint64_t)(own * dv * 4)};
  CHECK(etk_kv_unpack(&e->c, 0, 0, hk, 0, own, 0, &tk, &tv) == ETK_OK, "unpack");
  for (int64_t j = own; j <= row; j++) { /* own page: the values themselves, f16 apart */
    memcpy(k + j * d, s->k + ((int64_t)hk * s->tokens + j) * d, (size_t)d * 4);
    memcpy(v + j * dv, s->v + ((int64_t)hk * s->tokens + j) * dv, (size_t)dv * 4);
  }
  double *y = malloc((size_t)(row + 1) * 8), top = -INFINITY, sum = 0.0, scale = 1.0 / sqrt((double)d);
  const float *q = s->q + ((int64_t)h * s->tokens + row) * d;
  for (int64_t j = 0; j <= row; j++) {
    y[j] = 0.0;
    for (int64_t c = 0; c < d; c++) y[j] += (double)q[c] * (double)k[j * d + c];
    y[j] *= scale;
    top = y[j] > top ? y[j] : top;
  }
  for (int64_t c = 0; c < dv; c++) o[c] = 0.0;
  for (int64_t j = 0; j <= row; j++) {
    double p = exp(y[j] - top);
    sum += p;
    for (int64_t c = 0; c < dv; c++) o[c] += p * (double)v[j * dv + c];
  }
  for (int64_t c = 0; c < dv; c++) o[c] /= sum;
  *lse = top + log(sum);
  free(k), free(v), free(y);
}

/* Query codes (1/127 of the row's largest) and P codes are the only errors left: the gates of the specification hold with
 * room. INT4 folds a scale per channel into the query codes, which costs up to the ratio of the widest to a usual channel. */
static void check_close(const engine *e, const setup *s, int64_t row, const char *what) {
  double o[256], lse, dot = 0, aa = 0, bb = 0, gap = 0, size = 0, lse_gap = 0;
  for (int32_t h = 0; h < s->at.hq; h++) {
    reference(e, s, row, h, o, &lse);
    const float *got = e->o + ((int64_t)h * s->tokens + row) * s->at.dv;
    for (int64_t c = 0; c < s->at.dv; c++) {
      dot += o[c] * (double)got[c], aa += o[c] * o[c], bb += (double)got[c] * (double)got[c];
      gap += fabs(o[c] - (double)got[c]), size += fabs(o[c]);
    }
    lse_gap = fmax(lse_gap, fabs(lse - (double)e->lse[(int64_t)h * s->tokens + row]));
  }
  int exact = s->kv.bits == 16 || row < 64 || s->at.compute == ETK_C_F32;
  double cosine = dot / sqrt(aa * bb), l1 = gap / size;
  CHECK(cosine >= (exact ? 0.999999 : 0.9990), "%s row %d: cosine %.6f", what, (int)row, cosine);
  CHECK(l1 <= (exact ? 2e-3 : 0.05), "%s row %d: relative L1 %.4f", what, (int)row, l1);
  CHECK(lse_gap <= (exact ? 5e-3 : 0.1), "%s row %d: lse off by %.4f", what, (int)row, lse_gap);
}

static void one_config(const setup *s, const etk_attn_kernel *kernel, const char *what) {
  const int32_t isa = kernel->isa;
  engine step = start(s, isa, 1), cut = start(s, isa, 3);
  const etk_pool *pool = NULL;
  CHECK(etk_pool_create(3, 0, &pool) == ETK_OK, "pool");
  const int64_t begin = s->tokens > 300 ? s->tokens - 70 : 0; /* of a long sequence only the end is attended to */
  if (begin) push(&step, s, 0, begin), push(&cut, s, 0, begin);
  memset(step.o, 0, (size_t)(s->at.hq * s->tokens * s->at.dv) * 4), memset(cut.o, 0, (size_t)(s->at.hq * s->tokens * s->at.dv) * 4);
  memset(step.lse, 0, (size_t)(s->at.hq * s->tokens) * 4), memset(cut.lse, 0, (size_t)(s->at.hq * s->tokens) * 4);
  for (int64_t i = begin; i < s->tokens; i++) { /* decode token by token */
    push(&step, s, i, 1);
    attend(&step, s, i, 1, 1, NULL);
    if (i % 61 == 3 || i == 63 || i == 64 || i + 1 == s->tokens) check_close(&step, s, i, what);
  }
  for (int64_t at = begin; at < s->tokens;) { /* prefill in pieces, three threads */
    int64_t n = 1 + next_u32() % 65;
    if (n > s->tokens - at) n = s->tokens - at;
    push(&cut, s, at, n);
    attend(&cut, s, at, n, 3, pool);
    at += n;
  }
  size_t o_bytes = (size_t)(s->at.hq * s->tokens * s->at.dv) * 4, lse_bytes = (size_t)(s->at.hq * s->tokens) * 4;
  CHECK(memcmp(step.o, cut.o, o_bytes) == 0, "%s on %s: pieces and decode differ", what, kernel->name);
  CHECK(memcmp(step.lse, cut.lse, lse_bytes) == 0, "%s on %s: lse of pieces and decode differ", what, kernel->name);
  etk_pool_free(pool);
  stop(&step);
  stop(&cut);
}

static void test_configs(const etk_attn_kernel *kernel) {
  static const struct { int32_t bits, k_scale, hq, hkv, d, dv; uint32_t flags; int32_t compute; int64_t tokens; const char *what; } cases[] = {
      {8, 0, 2, 2, 64, 64, 0, ETK_C_S8S8, 200, "int8"},
      {8, 0, 6, 2, 40, 24, 0, ETK_C_S8S8, 150, "int8 grouped, odd widths"},
      {8, 0, 1, 1, 32, 32, 0, ETK_C_S8S8, 1200, "int8, two chunks"},
      {8, 1, 4, 2, 64, 64, ETK_KV_PER_HEAD, ETK_C_S8S8, 150, "int8 per token"},
      {8, 0, 2, 1, 64, 48, ETK_KV_ROT_K, ETK_C_S8S8, 150, "int8 rotated"},
      {8, 0, 2, 1, 64, 48, 0, ETK_C_S8F, 150, "int8, float PV"},
      {8, 0, 2, 1, 64, 48, 0, ETK_C_F32, 150, "int8 in float"},
      {4, 0, 2, 2, 64, 64, 0, ETK_C_S8S8, 200, "int4"},
      {4, 0, 3, 1, 128, 128, 0, ETK_C_S8S8, 200, "int4 grouped"},
      {4, 0, 9, 3, 40, 24, ETK_KV_ROT_K, ETK_C_S8S8, 150, "int4 rotated"},
      {4, 0, 1, 1, 32, 32, 0, ETK_C_F32, 150, "int4 in float"},
      {16, 0, 4, 2, 40, 64, 0, ETK_C_F32, 200, "f16"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
    setup s = make(cases[i].bits, cases[i].k_scale, cases[i].hq, cases[i].hkv, cases[i].d, cases[i].dv, cases[i].tokens);
    s.kv.flags = cases[i].flags;
    s.at.compute = cases[i].compute;
    one_config(&s, kernel, cases[i].what);
    drop(&s);
  }
}

/* Evicted slots weigh nothing: the same as a float64 softmax without them; windows by position; lists of pages; empty rows. */
static void masked_reference(const engine *e, const setup *s, int32_t h, const uint8_t *hidden, double *o) {
  int64_t n = e->c.seq_k[0], d = s->at.d, dv = s->at.dv;
  float *k = malloc((size_t)(n * d) * 4), *v = malloc((size_t)(n * dv) * 4);
  etk_tensor tk = {.data = k, .dtype = ETK_F32, .rank = 2, .dim = {n, d}, .stride = {d * 4, 4}, .capacity = (uint64_t)(n * d * 4)};
  etk_tensor tv = {.data = v, .dtype = ETK_F32, .rank = 2, .dim = {n, dv}, .stride = {dv * 4, 4}, .capacity = (uint64_t)(n * dv * 4)};
  CHECK(etk_kv_unpack(&e->c, 0, 0, h, 0, n, 0, &tk, &tv) == ETK_OK, "unpack");
  double sum = 0.0;
  const float *q = s->q + ((int64_t)h * s->tokens + s->tokens - 1) * d;
  for (int64_t c = 0; c < dv; c++) o[c] = 0.0;
  for (int64_t j = 0; j < n; j++) {
    double y = 0.0;
    if (hidden[j]) continue;
    for (int64_t c = 0; c < d; c++) y += (double)q[c] * (double)k[j * d + c];
    double p = exp(y / sqrt((double)d));
    sum += p;
    for (int64_t c = 0; c < dv; c++) o[c] += p * (double)v[j * dv + c];
  }
  for (int64_t c = 0; c < dv; c++) o[c] /= sum;
  free(k), free(v);
}

static void check_masked(engine *e, const setup *s, const uint8_t *hidden, const char *what) {
  for (int32_t h = 0; h < s->at.hq; h++) {
    double o[256], dot = 0, aa = 0, bb = 0;
    masked_reference(e, s, h, hidden, o);
    const float *got = e->o + ((int64_t)h * s->tokens + s->tokens - 1) * s->at.dv;
    for (int64_t c = 0; c < s->at.dv; c++) dot += o[c] * (double)got[c], aa += o[c] * o[c], bb += (double)got[c] * (double)got[c];
    CHECK(dot / sqrt(aa * bb) >= 0.999, "%s: cosine %.5f", what, dot / sqrt(aa * bb));
  }
}

static void test_masks(const etk_attn_kernel *kernel, int32_t bits) {
  enum { N = 300 };
  setup s = make(bits, 0, 2, 2, 64, 64, N);
  engine e = start(&s, kernel->isa, 1);
  uint8_t hidden[N] = {0};
  uint64_t keep[5];
  push(&e, &s, 0, N);
  for (int i = 0; i < 5; i++) keep[i] = (uint64_t)next_u32() << 32 | next_u32();
  keep[1] = 0;
  int64_t out = 0;
  for (int64_t j = 0; j < N; j++) /* page 1 leaves the table */
    if (j / 64 != 1) hidden[out++] = !(keep[j / 64] >> (j % 64) & 1);
  CHECK(etk_kv_evict(&e.c, 0, 0, -1, keep, 5) == ETK_OK, "evict");
  attend(&e, &s, N - 1, 1, 1, NULL);
  check_masked(&e, &s, hidden, "evicted");
  CHECK(etk_kv_repack(&e.c, 0, 0, -1, NULL) == ETK_OK, "repack");
  memset(hidden, 0, sizeof hidden);
  attend(&e, &s, N - 1, 1, 1, NULL);
  check_masked(&e, &s, hidden, "repacked");
  stop(&e);
  e = start(&s, kernel->isa, 1);
  push(&e, &s, 0, N);
  setup w = s;
  w.at.mask_kind = ETK_MASK_CAUSAL | ETK_MASK_WINDOW;
  w.at.win_left = 100;
  w.at.sink = 3;
  for (int64_t j = 0; j < N; j++) hidden[j] = j < N - 1 - 100 && j >= 3;
  attend(&e, &w, N - 1, 1, 1, NULL);
  check_masked(&e, &w, hidden, "window");
  setup g = s;
  int32_t list[6] = {0, -1, 2, 4, -1, -1};
  g.at.mask_kind = ETK_MASK_CAUSAL | ETK_MASK_GATHER;
  for (int64_t j = 0; j < N; j++) hidden[j] = j / 64 == 1 || j / 64 == 3;
  etk_attn_io io = query(&e, &g, N - 1, 1);
  io.gather = (etk_tensor){.data = list, .dtype = ETK_I32, .rank = 3, .dim = {1, 1, 6}, .stride = {24, 24, 4}, .capacity = 24};
  CHECK(etk_paged_run(&g.at, e.kernel, 1, &io, e.ws, e.ws_bytes, NULL) == ETK_OK, "gather");
  check_masked(&e, &g, hidden, "gather");
  list[3] = 2;
  CHECK(etk_paged_run(&g.at, e.kernel, 1, &io, e.ws, e.ws_bytes, NULL) == ETK_E_RANGE, "a page twice");
  list[3] = 5;
  CHECK(etk_paged_run(&g.at, e.kernel, 1, &io, e.ws, e.ws_bytes, NULL) == ETK_E_RANGE, "a page past the end");
  for (int i = 0; i < 6; i++) list[i] = -1;
  CHECK(etk_paged_run(&g.at, e.kernel, 1, &io, e.ws, e.ws_bytes, NULL) == ETK_NOTE_EMPTY_ROWS, "no page");
  CHECK(e.o[N * 64 - 1] == 0.0f && e.lse[N - 1] == -INFINITY, "an empty row is zero");
  stop(&e);
  drop(&s);
}

/* Scores and masses of a decode step: masses add up to one per row, scores reproduce the lse, as far as the codes of P allow:
 * each of up to 64 keys of a page may be off by 1/510 of the page's largest, 12 % at worst and under 2 % of a row here; twice that
 * where P ends at 127. */
static void test_outputs(const etk_attn_kernel *kernel, int32_t bits) {
  enum { N = 210 };
  setup s = make(bits, 0, 4, 2, 64, 32, N);
  s.at.flags = ETK_F_RETURN_SCORES | ETK_F_RETURN_COLMASS | ETK_F_RETURN_LSE;
  engine e = start(&s, kernel->isa, 2);
  push(&e, &s, 0, N);
  etk_attn_io io = query(&e, &s, N - 2, 2);
  static float scores[4 * 2 * 256], mass[4 * 256];
  io.score_rows = 2;
  io.scores = (etk_tensor){.data = scores, .dtype = ETK_F32, .rank = 4, .dim = {1, 4, 2, 256}, .stride = {8192, 2048, 1024, 4}, .capacity = sizeof scores};
  io.colmass = (etk_tensor){.data = mass, .dtype = ETK_F32, .rank = 3, .dim = {1, 4, 256}, .stride = {4096, 1024, 4}, .capacity = sizeof mass};
  const etk_pool *pool;
  CHECK(etk_pool_create(2, 0, &pool) == ETK_OK, "pool");
  CHECK(etk_paged_run(&s.at, e.kernel, 2, &io, e.ws, e.ws_bytes, pool) == ETK_OK, "run");
  etk_pool_free(pool);
  const double coarse = 255.0 / kernel->p_max;
  for (int h = 0; h < 4; h++) {
    double total = 0.0;
    for (int j = 0; j < 256; j++) total += (double)mass[h * 256 + j];
    CHECK(fabs(total - 2.0) < 0.04 * coarse, "head %d: mass %.5f of two rows", h, total);
    for (int i = 0; i < 2; i++) {
      double sum = 0.0;
      for (int j = 0; j < 256; j++) sum += exp((double)scores[(h * 2 + i) * 256 + j]);
      CHECK(fabs(log(sum) - (double)e.lse[h * N + N - 2 + i]) < 0.02 * 255 / kernel->p_max, "head %d row %d: %.5f and %.5f", h, i, log(sum), (double)e.lse[h * N + N - 2 + i]);
      CHECK(scores[(h * 2 + i) * 256 + N - 1 + i] == -INFINITY && scores[(h * 2 + i) * 256 + N - 2 + i] > -INFINITY, "mask of scores");
    }
  }
  stop(&e);
  drop(&s);
}

/* Selection over pages and over the same keys as a tensor: the lists agree where the pages are exact (f16), and what is refused. */
static void test_select(const etk_attn_kernel *kernel) {
  enum { N = 300, K = 40 };
  setup s = make(16, 0, 4, 2, 48, 32, N);
  engine e = start(&s, kernel->isa, 2);
  push(&e, &s, 0, N);
  const etk_kv_kernel *rounding = etk_kv_kernel_pick(ETK_ISA_SCALAR);
  for (int64_t i = 0; i < 2 * N * 48; i++) { /* the tensor holds what the pages hold */
    uint16_t h;
    rounding->round_f16(&s.k[i], 1, &h, &s.k[i]);
  }
  etk_attn_desc desc = s.at, dense = s.at;
  desc.isa_cap = dense.isa_cap = kernel->isa;
  dense.kv_layout = ETK_KV_DENSE;
  etk_attn_plan *paged = NULL, *plain = NULL;
  CHECK(etk_attn_plan_create(&desc, NULL, 2, &paged) == ETK_OK && etk_attn_plan_create(&dense, NULL, 2, &plain) == ETK_OK, "plans");
  uint64_t bytes, more, align;
  CHECK(etk_attn_select_workspace(paged, &bytes, &align) == ETK_OK && etk_attn_select_workspace(plain, &more, &align) == ETK_OK, "sizes");
  bytes = bytes > more ? bytes : more;
  void *ws = aligned_alloc(64, (bytes + 63) & ~(uint64_t)63);
  int32_t a[2 * K], b[2 * K];
  etk_tensor ta = {.data = a, .dtype = ETK_I32, .rank = 3, .dim = {1, 2, K}, .stride = {8 * K, 4 * K, 4}, .capacity = sizeof a}, tb = ta;
  tb.data = b;
  etk_attn_io io = query(&e, &s, N - 5, 5), flat = io;
  flat.kv = NULL;
  flat.k = view4(s.k, 2, N, 0, N, 48);
  etk_select_desc want = {.struct_size = sizeof want, .k = K, .softmax = 1, .pool_width = 3};
  CHECK(etk_attn_select(paged, &io, &want, &ta, ws, bytes, NULL) == ETK_OK, "paged");
  CHECK(etk_attn_select(plain, &flat, &want, &tb, ws, bytes, NULL) == ETK_OK, "dense");
  int differ = 0;
  for (int i = 0; i < 2 * K; i++) differ += a[i] != b[i];
  CHECK(differ <= 6, "%d of %d entries differ", differ, 2 * K); /* sums in another order may swap neighbours at the cut */
  want.round_pages = 1;
  want.n_init = want.n_local = 1;
  CHECK(etk_attn_select(paged, &io, &want, &ta, ws, bytes, NULL) == ETK_OK && a[0] == 0 && (a[1] == 4 || a[2] == 4), "pages");
  ta.dim[2] = 2;
  CHECK(etk_attn_select(paged, &io, &want, &ta, ws, bytes, NULL) == ETK_E_SHAPE, "short list");
  ta.dim[2] = K;
  want.pool_width = 2;
  CHECK(etk_attn_select(paged, &io, &want, &ta, ws, bytes, NULL) == ETK_E_RANGE, "even window");
  want.pool_width = 0;
  CHECK(etk_attn_select(paged, &io, &want, &ta, ws, 64, NULL) == ETK_E_WORKSPACE, "workspace");
  CHECK(etk_attn_select(plain, &io, &want, &ta, ws, bytes, NULL) < 0, "no keys");
  CHECK(etk_attn_select(paged, &flat, &want, &ta, ws, bytes, NULL) == ETK_E_NULL, "no cache");
  want.k = -1;
  CHECK(etk_attn_select(paged, &io, &want, &ta, ws, bytes, NULL) == ETK_E_RANGE, "k");
  etk_attn_plan_free(paged);
  etk_attn_plan_free(plain);
  free(ws);
  stop(&e);
  drop(&s);
}

static void test_refusals(const etk_attn_kernel *kernel) {
  setup s = make(8, 0, 2, 1, 32, 32, 200);
  engine e = start(&s, kernel->isa, 1);
  push(&e, &s, 0, 200);
  etk_attn_io io = query(&e, &s, 199, 1);
  uint8_t before[64];
  memset(e.o, 0x5a, 64);
  memcpy(before, e.o, 64);
#define GIVES(want, ...)                                                                                \
  do {                                                                                                  \
    etk_attn_desc d = s.at;                                                                             \
    etk_attn_io x = io;                                                                                 \
    (void)d;                                                                                            \
    __VA_ARGS__;                                                                                        \
    etk_status got_ = etk_paged_run(&d, e.kernel, 1, &x, e.ws, e.ws_bytes, NULL);                       \
    CHECK(got_ == (want), "%s gave %d", #__VA_ARGS__, got_);                                            \
  } while (0)
  GIVES(ETK_E_NULL, x.kv = NULL);
  GIVES(ETK_E_SHAPE, d.hkv = 2);
  GIVES(ETK_E_SHAPE, d.d = 16);
  GIVES(ETK_E_RANGE, x.kv_layer = 1);
  GIVES(ETK_E_RANGE, x.kv_seq = 1);
  GIVES(ETK_E_RANGE, x.kv_seq = -1);
  GIVES(ETK_E_SHAPE, d.max_m = 199);
  GIVES(ETK_E_SHAPE, x.q.dim[1] = 1);
  GIVES(ETK_E_DTYPE, x.o.dtype = ETK_F16);
  GIVES(ETK_E_OVERFLOW, x.o.capacity = 8);
  GIVES(ETK_E_UNSUPPORTED, d.mask_kind = ETK_MASK_BSR);
  GIVES(ETK_E_UNSUPPORTED, d.clip_gamma = -0.1f);
  GIVES(ETK_E_UNSUPPORTED, x.k = x.q);
  GIVES(ETK_E_NULL, d.mask_kind = ETK_MASK_GATHER);
  GIVES(ETK_E_NULL, d.flags = ETK_F_RETURN_COLMASS);
  CHECK(etk_paged_run(&s.at, e.kernel, 1, &io, e.ws, 64, NULL) == ETK_E_WORKSPACE, "short workspace");
  etk_attn_io wide = query(&e, &s, 0, 200); /* four pages of rows, two in the tail */
  CHECK(etk_paged_run(&s.at, e.kernel, 1, &wide, e.ws, e.ws_bytes, NULL) == ETK_E_RANGE, "rows whose page has left the tail");
  CHECK(memcmp(before, e.o, 64) == 0, "a refused run wrote");
  GIVES(ETK_OK, x.q.dim[2] = x.o.dim[2] = x.lse.dim[2] = 0);
  stop(&e);
  drop(&s);
}

int main(void) {
  const etk_attn_kernel *kernel;
  for (int32_t row = 0; (kernel = etk_attn_kernel_at(row)) != NULL; row++) {
    etk_status status;
    if (etk_attn_kernel_pick(kernel->isa, &status) != kernel) continue; /* not the one a cache of that ISA takes */
    test_configs(kernel);
    test_masks(kernel, 8);
    test_masks(kernel, 4);
    test_outputs(kernel, 8);
    test_outputs(kernel, 4);
    test_select(kernel);
    test_refusals(kernel);
  }
  if (failures) printf("test_kv_attn: %d failures\n", failures);
  return failures != 0;
}
