/* Token matching: every variant gives the bits of the scalar one, over widths and counts around the tiles; the public
 * functions refuse bad input and stay inside their workspace. One line per failure. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgetok/ops.h"
#include "ops_kernel.h"

static int failures;
#define EXPECT(cond)                                                                     \
  do {                                                                                   \
    if (!(cond)) failures++, printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #cond); \
  } while (0)

enum { ROWS = 48, WIDTH = 80 };
static uint64_t seed = 99;
static float uniform(void) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (float)(uint32_t)(seed >> 33) / 1073741824.0f - 1.0f;
}
static int same(const float *a, const float *b, int64_t n) {
  for (int64_t i = 0; i < n; i++)
    if (memcmp(a + i, b + i, 4) != 0 && !(a[i] != a[i] && b[i] != b[i])) return 0;
  return 1;
}

static float x[3 * ROWS * WIDTH], a[ROWS * WIDTH], b[ROWS * WIDTH], want[ROWS * WIDTH], got[ROWS * WIDTH];
static int8_t qa[ROWS * WIDTH], qb[ROWS * WIDTH], code_want[ROWS * WIDTH], code_got[ROWS * WIDTH];

static void test_rows(const etk_ops_kernel *k, const etk_ops_kernel *ref, int32_t c, int odd) {
  float sw[ROWS], sg[ROWS];
  const int32_t c4 = (c + 3) / 4 * 4;
  for (int i = 0; i < 3 * ROWS * WIDTH; i++) x[i] = uniform();
  if (odd) x[1] = NAN, x[c + c / 2] = INFINITY, memset(x + 2 * c, 0, (size_t)c * 4), x[3 * c] = 1e-30f, x[4 * c] = -3e38f;
  for (int64_t heads = 1; heads <= 3; heads += 2) {
    ref->unit((char *)(void *)x, 4 * c, 4 * ROWS * WIDTH, heads, 9, c, want);
    k->unit((char *)(void *)x, 4 * c, 4 * ROWS * WIDTH, heads, 9, c, got);
    EXPECT(same(got, want, 9 * c));
  }
  code_got[9 * c4] = 77;
  ref->quant(want, 9, c, c4, code_want, sw), k->quant(want, 9, c, c4, code_got, sg);
  EXPECT(same(sg, sw, 9) && memcmp(code_got, code_want, (size_t)(9 * c4)) == 0 && code_got[9 * c4] == 77);
  const float *rows[3] = {x, x + c, x + 2 * c}, w[3] = {1, 2, 0.5f};
  for (int32_t n = 1; n <= 3; n++) {
    ref->blend(rows, w, n, 3.5f, c, want), k->blend(rows, w, n, 3.5f, c, got);
    EXPECT(same(got, want, c));
  }
}

static void test_sim(const etk_ops_kernel *k, const etk_ops_kernel *ref, int32_t na, int32_t nb, int32_t c) {
  float sa[ROWS], sb[ROWS], pen0[ROWS], pen1[ROWS], best[2][ROWS], plain = 0;
  int32_t sum[ROWS] = {0}, to[2][ROWS];
  uint8_t pad[ROWS];
  const int32_t c4 = (c + 3) / 4 * 4;
  memset(qa, 0, sizeof qa), memset(qb, 0, sizeof qb), memset(a, 0, sizeof a), memset(b, 0, sizeof b);
  for (int i = 0; i < ROWS; i++) {
    sa[i] = sb[i] = 1.0f / 127.0f, pad[i] = i % 5 == 0;
    pen0[i] = i < nb ? i % 7 == 3 ? -4.0f : 0.0f : -INFINITY, pen1[i] = i < nb ? i % 7 == 3 ? 2.0f : -4.0f : -INFINITY;
    for (int j = 0; j < c; j++) {
      const int8_t code = (int8_t)(127.0f * uniform()), extreme = j % 2 ? 127 : -127;
      a[i * c + j] = 0.1f * uniform(), qa[i * c4 + j] = i == 1 ? extreme : code;
      sum[i] += qa[i * c4 + j];
      const int8_t other = i == 2 ? extreme : (int8_t)(127.0f * uniform());
      b[i / 16 * 16 * c + 16 * j + i % 16] = 0.1f * uniform();
      qb[i / 16 * 16 * c4 + j / 4 * 64 + 4 * (i % 16) + j % 4] = other;
    }
  }
  for (int s8 = 0; s8 < 2; s8++) {
    etk_sim s = {.rows_a = na, .rows_b = nb, .c = c, .c4 = c4, .s8 = s8, .a = a, .b = b, .qa = qa, .qb = qb, .sa = sa, .sb = sb, .rowsum = sum,
                 .pen0 = pen0, .pen1 = pen1, .pad_a = pad};
    ref->sim_best(&s, best[0], to[0]), k->sim_best(&s, best[1], to[1]);
    EXPECT(same(best[1], best[0], na) && memcmp(to[1], to[0], 4u * (size_t)na) == 0);
    for (int form = 0; form < 2; form++) {
      ref->sim_energy(&s, form, 0.2f, 0.9f, best[0]), k->sim_energy(&s, form, 0.2f, 0.9f, best[1]);
      EXPECT(same(best[1], best[0], nb));
    }
    if (s8 && na > 1 && nb > 2) { /* the largest product there is, against plain arithmetic */
      for (int j = 0; j < c; j++) plain += (float)(127 * 127);
      k->sim_best(&s, best[1], to[1]);
      EXPECT(best[1][1] == plain * (1.0f / 127.0f * (1.0f / 127.0f)) && to[1][1] == 2);
    }
  }
}

static etk_tensor view(void *p, int32_t dtype, int32_t rank, int64_t n0, int64_t n1, int64_t n2) {
  const int64_t elem = dtype == ETK_I64 ? 8 : 4, d[3] = {n0, n1, n2};
  etk_tensor t = {.data = p, .dtype = dtype, .rank = rank};
  int64_t step = elem;
  for (int32_t i = rank - 1; i >= 0; i--) t.dim[i] = d[i], t.stride[i] = step, step *= d[i];
  t.capacity = (uint64_t)step;
  return t;
}

static void test_public(void) {
  static int64_t kept[ROWS], removed[ROWS], target[ROWS], map[ROWS];
  static float y[ROWS * WIDTH], size[ROWS], out[ROWS];
  for (int i = 0; i < 3 * ROWS * WIDTH; i++) x[i] = uniform();
  for (int i = 0; i < ROWS; i++) size[i] = i > 40 ? 0.0f : 1.0f + (float)(i % 3);
  for (int64_t n = 0; n <= ROWS; n++)
    for (int32_t kind = 0; kind < 4; kind++)
      for (int64_t keep = 0; keep <= n && keep < 4; keep++) {
        const int64_t c = 1 + n % 21, r = (n - keep) / 3;
        const uint64_t bytes = etk_match_workspace(n, c);
        void *ws = aligned_alloc(64, (bytes + 63) / 64 * 64); /* its own block, so that a step outside is seen */
        etk_tensor m = view(x, ETK_F32, 3, 1, n, c), tx = view(a, ETK_F32, 3, 1, n, 5), ts = view(size, ETK_F32, 2, 1, n, 0);
        etk_tensor ty = view(y, ETK_F32, 3, 1, n - r, 5), to = view(out, ETK_F32, 2, 1, n - r, 0), tm = view(map, ETK_I64, 2, 1, n, 0);
        etk_tensor tk = view(kept, ETK_I64, 2, 1, n - r, 0), tr = view(removed, ETK_I64, 2, 1, r, 0), tt = view(target, ETK_I64, 2, 1, r, 0);
        const int32_t s8 = (int32_t)(n & 1);
        EXPECT(ws && etk_match(kind, &m, &ts, keep, r, 0.1f, 1.0f, s8, &tk, &tr, &tt, ws, bytes) == ETK_OK);
        uint64_t seen = 0;
        for (int64_t i = 0; i < n - r; i++) seen |= (uint64_t)1 << kept[i];
        for (int64_t i = 0; i < r; i++) seen |= (uint64_t)1 << removed[i];
        EXPECT(seen == ((uint64_t)1 << n) - 1);
        EXPECT(etk_token_merge(kind, &m, &tx, &ts, keep, r, 0.1f, 1.0f, s8, &ty, &to, &tm, ws, bytes) == ETK_OK);
        float sum = 0, all = 0;
        for (int64_t i = 0; i < n - r; i++) sum += out[i];
        for (int64_t i = 0; i < n; i++) all += size[i];
        EXPECT(sum == all);
        free(ws);
        ws = aligned_alloc(64, (etk_merge_workspace(n - r, r) + 63) / 64 * 64);
        EXPECT(ws && etk_merge_rows(&tx, NULL, &tk, &tr, &tt, &ty, NULL, NULL, ws, etk_merge_workspace(n - r, r)) == ETK_OK);
        free(ws);
      }
  static uint64_t room[1 << 15];
  void *ws = (void *)(((uintptr_t)room + 63) / 64 * 64);
  const uint64_t bytes = sizeof room - 64;
  etk_tensor m = view(x, ETK_F32, 3, 1, 20, 8), tk = view(kept, ETK_I64, 2, 1, 16, 0), tr = view(removed, ETK_I64, 2, 1, 4, 0);
  etk_tensor tt = view(target, ETK_I64, 2, 1, 4, 0), t;
  kept[0] = 77;
#define TRY(...) etk_match(__VA_ARGS__, &tk, &tr, &tt, ws, bytes)
  EXPECT(TRY(0, NULL, NULL, 0, 4, 0, 1, 0) == ETK_E_NULL);
  EXPECT(TRY(4, &m, NULL, 0, 4, 0, 1, 0) == ETK_E_RANGE && TRY(-1, &m, NULL, 0, 4, 0, 1, 0) == ETK_E_RANGE);
  EXPECT(TRY(0, &m, NULL, 0, 4, 0, 1, 2) == ETK_E_RANGE && TRY(0, &m, NULL, 13, 4, 0, 1, 0) == ETK_E_RANGE);
  EXPECT(TRY(0, &m, NULL, -1, 4, 0, 1, 0) == ETK_E_RANGE && TRY(0, &m, NULL, 0, -4, 0, 1, 0) == ETK_E_RANGE);
  EXPECT(TRY(1, &m, NULL, 0, 4, NAN, 1, 0) == ETK_E_RANGE && TRY(1, &m, NULL, 0, 4, 0, INFINITY, 0) == ETK_E_RANGE);
  EXPECT(TRY(0, &m, NULL, 0, 3, 0, 1, 0) == ETK_E_SHAPE && TRY(0, &m, &tk, 0, 4, 0, 1, 0) == ETK_E_DTYPE);
  t = m, t.dtype = ETK_F16;
  EXPECT(TRY(0, &t, NULL, 0, 4, 0, 1, 0) == ETK_E_DTYPE);
  EXPECT(etk_match(0, &m, NULL, 0, 4, 0, 1, 0, &tk, &tr, &tr, ws, bytes) == ETK_E_ALIAS);
  EXPECT(etk_match(0, &m, NULL, 0, 4, 0, 1, 0, &tk, &tr, &tt, ws, etk_match_workspace(20, 8) - 1) == ETK_E_WORKSPACE);
  EXPECT(etk_match(0, &m, NULL, 0, 4, 0, 1, 0, &tk, &tr, &tt, (char *)ws + 8, bytes - 8) == ETK_E_WORKSPACE);
  EXPECT(kept[0] == 77);
  EXPECT(etk_match_workspace(65537, 8) == 0 && etk_match_workspace(8, 0) == 0 && etk_merge_workspace(-1, 0) == 0);
}

int main(void) {
  static const int32_t counts[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48}, widths[] = {1, 3, 4, 5, 16, 17, 33, 64, 79};
  const etk_ops_kernel *ref = NULL;
  for (int32_t i = 0; etk_ops_kernel_at(i); i++) ref = etk_ops_kernel_at(i);
  if (!ref || ref->isa != ETK_ISA_SCALAR) return printf("no scalar variant\n"), 1;
  for (int32_t i = 0; etk_ops_kernel_at(i); i++) {
    const etk_ops_kernel *k = etk_ops_kernel_at(i);
    const int before = failures;
    for (size_t w = 0; w < sizeof widths / sizeof *widths; w++) {
      test_rows(k, ref, widths[w], 0), test_rows(k, ref, widths[w], 1);
      for (size_t p = 0; p < sizeof counts / sizeof *counts; p++) {
        test_sim(k, ref, counts[p], counts[(p + w) % 15], widths[w]);
        test_sim(k, ref, counts[(p + w) % 15], counts[p], widths[w]);
      }
    }
    if (failures > before) printf("in %s\n", k->name);
  }
  test_public();
  return failures != 0;
}
