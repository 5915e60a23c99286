/* Small operations: every variant that runs here gives the bits of the scalar one, over widths around every tile edge and
 * values with NaN, infinities, zeros, subnormals; golden cases; bad input. One line per failure. */
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

enum { MOST = 5000 };
static const int32_t k_widths[] = {1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 129, 257, 384, 1000, 4099};
static uint64_t seed = 20240607;
static uint32_t draw(void) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(seed >> 33);
}
static float uniform(void) { return (float)draw() / 1073741824.0f - 1.0f; }

static const float k_odd[] = {0.0f, -0.0f, 1e-42f, -1e-42f, 1e30f, -1e30f, 88.5f, -88.5f, -86.5f, 5.5f, -5.5f, 1e-20f};
/* How odd: 0 normal values, 1 extremes that stay finite, 2 with NaN and infinities, 3 all equal. */
static void fill(float *x, int32_t n, int how) {
  for (int32_t i = 0; i < n; i++) {
    x[i] = how == 3 ? 0.25f : 4.0f * uniform();
    if (how && how < 3 && draw() % 5 == 0) x[i] = k_odd[draw() % 12];
    if (how == 2 && draw() % 9 == 0) x[i] = draw() % 3 == 0 ? NAN : draw() % 2 ? INFINITY : -INFINITY;
  }
}
static int same(const float *a, const float *b, int64_t n) { /* bits, any NaN equal to any other */
  for (int64_t i = 0; i < n; i++)
    if (memcmp(a + i, b + i, 4) != 0 && !(a[i] != a[i] && b[i] != b[i])) {
      printf("element %lld: %.9g against %.9g\n", (long long)i, (double)a[i], (double)b[i]);
      return 0;
    }
  return 1;
}

static const etk_ops_kernel *scalar(void) {
  const etk_ops_kernel *k = NULL;
  for (int32_t i = 0; etk_ops_kernel_at(i); i++) k = etk_ops_kernel_at(i);
  return k;
}

static float in[4][MOST + 64], want[2][MOST + 64], got[2][MOST + 64];
static int8_t code_want[MOST + 64], code_got[MOST + 64];

static etk_rows one_row(int32_t c) {
  etk_rows a = {.rows = 1, .cols = c};
  return a;
}
#define AT(p) ((char *)(void *)(p))

static void test_maps(const etk_ops_kernel *k, const etk_ops_kernel *ref, int32_t c, int how) {
  const struct {
    etk_rows_fn f, r;
    int ins, flag;
  } ops[] = {{k->gelu, ref->gelu, 1, 0}, {k->gelu, ref->gelu, 1, 1}, {k->silu, ref->silu, 1, 0},
             {k->exp, ref->exp, 1, 0},   {k->swiglu, ref->swiglu, 2, 0}, {k->add, ref->add, 2, 0}};
  fill(in[0], c, how), fill(in[1], c, how);
  for (size_t o = 0; o < sizeof ops / sizeof *ops; o++) {
    etk_rows a = one_row(c);
    a.i[0] = ops[o].flag;
    a.at[0] = AT(in[0]), a.at[1] = ops[o].ins == 2 ? AT(in[1]) : AT(want[0]), a.at[2] = AT(want[0]);
    want[0][c] = got[0][c] = 77.0f;
    ops[o].r(&a);
    a.at[ops[o].ins] = AT(got[0]);
    ops[o].f(&a);
    EXPECT(same(got[0], want[0], c) && got[0][c] == 77.0f);
    memcpy(got[0], in[0], sizeof(float) * (size_t)c); /* in place */
    a.at[0] = AT(got[0]);
    ops[o].f(&a);
    EXPECT(same(got[0], want[0], c));
  }
}

static void test_norm(const etk_ops_kernel *k, const etk_ops_kernel *ref, int32_t c, int how) {
  for (int v = 0; v < 32; v++) { /* RMS, residual, gamma and beta, sum, codes */
    float sw = 0, sg = 0;
    for (int i = 0; i < 4; i++) fill(in[i], c, how);
    etk_rows a = one_row(c);
    a.f[0] = 1e-5f, a.i[0] = v & 1;
    a.at[0] = AT(in[0]), a.at[1] = v & 2 ? AT(in[1]) : NULL, a.at[2] = v & 4 ? AT(in[2]) : NULL, a.at[3] = v & 4 ? AT(in[3]) : NULL;
    etk_rows b = a;
    a.at[4] = AT(want[0]), b.at[4] = AT(got[0]), a.at[5] = v & 8 ? AT(want[1]) : NULL, b.at[5] = v & 8 ? AT(got[1]) : NULL;
    if (v & 16) a.at[6] = AT(code_want), b.at[6] = AT(code_got), a.at[7] = AT(&sw), b.at[7] = AT(&sg);
    want[0][c] = got[0][c] = want[1][c] = got[1][c] = 77.0f, code_got[c] = 77;
    ref->norm(&a), k->norm(&b);
    EXPECT(same(got[0], want[0], c) && got[0][c] == 77.0f && a.nonfinite == b.nonfinite);
    if (v & 8) EXPECT(same(got[1], want[1], c) && got[1][c] == 77.0f);
    if (!(v & 16)) continue;
    EXPECT(same(&sg, &sw, 1) && memcmp(code_got, code_want, (size_t)c) == 0 && code_got[c] == 77);
    memcpy(got[1], code_want, (size_t)c);
    b.at[4] = NULL; /* codes alone are the same codes */
    k->norm(&b);
    EXPECT(memcmp(code_got, got[1], (size_t)c) == 0 || (v & 8));
  }
}

static void test_softmax(const etk_ops_kernel *k, const etk_ops_kernel *ref, int32_t c, int how) {
  static uint8_t keep[MOST];
  for (int v = 0; v < 4; v++) {
    fill(in[0], c, how), fill(in[1], c, 0);
    for (int32_t i = 0; i < c; i++) keep[i] = draw() % 3 != 0;
    etk_rows a = one_row(c);
    a.f[0] = 0.7f, a.at[0] = AT(in[0]), a.at[1] = v & 1 ? AT(in[1]) : NULL, a.at[2] = v & 2 ? AT(keep) : NULL, a.at[3] = AT(want[0]);
    ref->softmax(&a);
    a.at[3] = AT(got[0]), got[0][c] = 77.0f;
    k->softmax(&a);
    EXPECT(same(got[0], want[0], c) && got[0][c] == 77.0f);
  }
}

static void test_rope(const etk_ops_kernel *k, const etk_ops_kernel *ref, int how) {
  static const int32_t rots[] = {2, 8, 14, 16, 18, 30, 32, 34, 64, 80, 96, 128};
  for (size_t i = 0; i < sizeof rots / sizeof *rots; i++)
    for (int inter = 0; inter < 2; inter++)
      for (int32_t rest = 0; rest < 10; rest += 9) {
        const int32_t d = rots[i] + rest, rows = 6;
        const int64_t row[6] = {3, 0, 1, 2, 3, 3};
        for (int j = 0; j < 3; j++) fill(in[j], d * rows, how);
        etk_rope_arg a = {.tokens = 3, .heads = 2, .x = AT(in[0]), .y = AT(want[0]), .x_token = 4 * d, .x_head = 12 * d, .y_token = 8 * d,
                          .y_head = 4 * d, .cos_at = AT(in[1]), .sin_at = AT(in[2]), .table_step = 2 * rots[i], .row = row, .d = d,
                          .rot = rots[i], .interleaved = inter};
        ref->rope(&a);
        a.y = AT(got[0]);
        k->rope(&a);
        EXPECT(same(got[0], want[0], d * rows));
      }
}

static void test_scan(const etk_ops_kernel *k, const etk_ops_kernel *ref, int32_t c, int how) {
  static uint32_t a[MOST], b[MOST];
  static int32_t ia[MOST], ib[MOST];
  fill(in[0], c, how);
  const int32_t blocks = (c + ETK_SCAN - 1) / ETK_SCAN;
  k->scan_max(in[0], c, a), ref->scan_max(in[0], c, b);
  EXPECT(memcmp(a, b, 4u * (size_t)blocks) == 0);
  const int32_t n = c < ETK_SCAN ? c : ETK_SCAN;
  const uint32_t floors[] = {0x007fffff, etk_float_key(0.5f), etk_float_key(-0.0f), etk_float_key(INFINITY), etk_float_key(NAN), b[0]};
  for (size_t f = 0; f < sizeof floors / sizeof *floors; f++) {
    const int32_t m = k->collect(in[0], n, 9, floors[f], a, ia);
    EXPECT(m == ref->collect(in[0], n, 9, floors[f], b, ib));
    EXPECT(memcmp(a, b, 4u * (size_t)m) == 0 && memcmp(ia, ib, 4u * (size_t)m) == 0);
    int32_t count = 0;
    for (int32_t i = 0; i < n; i++) count += etk_float_key(in[0][i]) >= floors[f];
    EXPECT(count == m);
  }
}

static etk_tensor view(void *p, int32_t dtype, int64_t n, int64_t c, int64_t elem) {
  etk_tensor t = {.data = p, .dtype = dtype, .rank = 2, .dim = {n, c}, .stride = {c * elem, elem}, .capacity = (uint64_t)(n * c * elem)};
  return t;
}

static void test_topk_is_a_stable_sort(void) {
  static float x[MOST], v[MOST];
  static int32_t idx[MOST], order[MOST];
  static uint64_t ws[1 << 16];
  for (int how = 0; how < 5; how++)
    for (size_t w = 0; w < sizeof k_widths / sizeof *k_widths; w++) {
      const int32_t c = k_widths[w];
      fill(x, c, how == 4 ? 0 : how);
      for (int32_t i = 0; how == 4 && i < c; i++) x[i] = (float)i; /* rising: every block beats the ones before */
      for (int32_t i = 0; i < c; i++) order[i] = i;
      for (int32_t i = 1; i < c; i++) { /* insertion sort by (key falling, index) */
        const int32_t o = order[i];
        int32_t j = i;
        for (; j > 0 && etk_float_key(x[order[j - 1]]) < etk_float_key(x[o]); j--) order[j] = order[j - 1];
        order[j] = o;
      }
      const int32_t ks[] = {1, 3, c / 3, c};
      for (int i = 0; i < 4; i++) {
        const int32_t k = ks[i] < 1 || ks[i] > c ? 1 : ks[i];
        etk_tensor tx = view(x, ETK_F32, 1, c, 4), tv = view(v, ETK_F32, 1, k, 4), ti = view(idx, ETK_I32, 1, k, 4);
        EXPECT(etk_topk_workspace(c, k) <= sizeof ws);
        EXPECT(etk_topk(&tx, k, &tv, &ti, ws, sizeof ws) == ETK_OK);
        EXPECT(memcmp(idx, order, 4u * (size_t)k) == 0);
        for (int32_t j = 0; j < k; j++) EXPECT(etk_float_key(v[j]) == etk_float_key(x[order[j]]));
        int64_t best = -1;
        etk_tensor tb = {.data = &best, .dtype = ETK_I64, .rank = 1, .dim = {1}, .stride = {8}, .capacity = 8};
        EXPECT(etk_argmax(&tx, &tb) == ETK_OK && best == order[0]);
      }
    }
}

static void test_bad_input_is_refused(void) {
  static float x[64], y[64];
  static int8_t q[64];
  static int32_t idx[8];
  float s[4];
  for (int i = 0; i < 64; i++) y[i] = 77.0f;
  etk_tensor tx = view(x, ETK_F32, 4, 16, 4), ty = view(y, ETK_F32, 4, 16, 4), tq = view(q, ETK_S8, 4, 16, 1), none = {0};
  etk_tensor ts = {.data = s, .dtype = ETK_F32, .rank = 1, .dim = {4}, .stride = {4}, .capacity = 16}, t;
  EXPECT(etk_layernorm(NULL, NULL, NULL, NULL, 1e-5f, &ty, NULL, NULL, NULL) == ETK_E_NULL);
  EXPECT(etk_layernorm(&tx, NULL, NULL, NULL, 1e-5f, &none, NULL, NULL, NULL) == ETK_E_NULL);
  EXPECT(etk_layernorm(&tx, NULL, NULL, NULL, NAN, &ty, NULL, NULL, NULL) == ETK_E_RANGE);
  EXPECT(etk_layernorm(&tx, NULL, &ts, NULL, 1e-5f, &ty, NULL, NULL, NULL) == ETK_E_SHAPE);
  EXPECT(etk_layernorm(&tx, NULL, NULL, NULL, 1e-5f, &ty, NULL, &tq, NULL) == ETK_E_NULL);
  EXPECT(etk_layernorm(&tx, NULL, NULL, NULL, 1e-5f, &ty, &ty, NULL, NULL) == ETK_E_ALIAS);
  t = ts, t.dim[0] = 3;
  EXPECT(etk_rmsnorm(&tx, NULL, NULL, 1e-5f, NULL, NULL, &tq, &t) == ETK_E_SHAPE);
  t = tx, t.dtype = ETK_F16;
  EXPECT(etk_gelu(&t, 0, &ty) == ETK_E_DTYPE);
  EXPECT(etk_gelu(&tx, 2, &ty) == ETK_E_RANGE);
  t = tx, t.stride[1] = 8;
  EXPECT(etk_silu(&t, &ty) != ETK_OK);
  t = tx, t.stride[0] = -64;
  EXPECT(etk_silu(&t, &ty) == ETK_E_STRIDE);
  t = tx, t.dim[0] = INT64_MAX / 2;
  EXPECT(etk_silu(&t, &ty) == ETK_E_OVERFLOW);
  t = tx, t.capacity--;
  EXPECT(etk_silu(&t, &ty) == ETK_E_OVERFLOW);
  t = tx, t.data = (char *)t.data + 2, t.capacity -= 2, t.dim[0] = 3;
  etk_tensor three = ty;
  three.dim[0] = 3;
  EXPECT(etk_silu(&t, &three) == ETK_E_ALIGN);
  t = tx, t.dim[0] = 3, t.data = x + 1, t.capacity -= 4;
  three = tx, three.dim[0] = 3;
  EXPECT(etk_silu(&t, &three) == ETK_E_ALIAS);
  t = ty, t.stride[0] = 0;
  EXPECT(etk_add_rows(&tx, &tx, &t) == ETK_E_STRIDE);
  EXPECT(etk_swiglu(&tx, &ts, &ty) == ETK_E_SHAPE);
  EXPECT(etk_softmax(&tx, &ts, 1.0f, &ty) == ETK_E_SHAPE);
  uint64_t ws[8];
  etk_tensor ti = view(idx, ETK_I32, 4, 2, 4);
  EXPECT(etk_topk(&tx, 2, NULL, &ti, ws, sizeof ws) == ETK_E_WORKSPACE);
  EXPECT(etk_topk(&tx, 17, NULL, &ti, ws, sizeof ws) == ETK_E_SHAPE);
  EXPECT(etk_topk_workspace(16, 17) == 0 && etk_topk_workspace(INT64_MAX, 2) == 0);
  idx[0] = 4;
  etk_tensor rows = {.data = idx, .dtype = ETK_I32, .rank = 1, .dim = {1}, .stride = {4}, .capacity = 4}, out = ty;
  out.dim[0] = 1;
  EXPECT(etk_gather_rows(&tx, &rows, &out) == ETK_E_RANGE);
  idx[0] = -1;
  EXPECT(etk_gather_rows(&tx, &rows, &out) == ETK_E_RANGE);
  for (int i = 0; i < 64; i++) EXPECT(y[i] == 77.0f);
  t = tx, t.dim[0] = 0, t.data = NULL, t.capacity = 0;
  EXPECT(etk_silu(&t, &t) == ETK_OK && etk_softmax(&t, NULL, 1.0f, &t) == ETK_OK);
}

static void test_golden(void) {
  float x[6] = {1, 2, 3, 4, 5, 6}, y[6], c[2] = {0, 1}, s[2] = {1, 0};
  etk_tensor tx = {.data = x, .dtype = ETK_F32, .rank = 3, .dim = {1, 1, 5}, .stride = {20, 20, 4}, .capacity = 20}, ty = tx;
  etk_tensor tc = view(c, ETK_F32, 1, 2, 4), ts = view(s, ETK_F32, 1, 2, 4);
  ty.data = y;
  EXPECT(etk_rope(&tx, &tc, &ts, NULL, 0, 0, &ty) == ETK_OK);
  EXPECT(y[0] == -3 && y[1] == 2 && y[2] == 1 && y[3] == 4 && y[4] == 5);
  EXPECT(etk_rope(&tx, &tc, &ts, NULL, 0, 1, &ty) == ETK_OK);
  EXPECT(y[0] == -2 && y[1] == 1 && y[2] == 3 && y[3] == 4 && y[4] == 5);
  EXPECT(etk_rope(&tx, &tc, &ts, NULL, 1, 0, &ty) == ETK_E_RANGE);
  x[0] = 1, x[1] = 3;
  tx = view(x, ETK_F32, 1, 2, 4), ty = view(y, ETK_F32, 1, 2, 4);
  EXPECT(etk_layernorm(&tx, NULL, NULL, NULL, 0.0f, &ty, NULL, NULL, NULL) == ETK_OK && y[0] == -1 && y[1] == 1);
  EXPECT(etk_layernorm(&tx, &tx, NULL, NULL, 0.0f, NULL, &ty, &tx, &ty) == ETK_E_DTYPE);
  uint8_t keep[4] = {0, 0, 0, 0};
  etk_tensor m = {.data = keep, .dtype = ETK_BOOL, .rank = 1, .dim = {4}, .stride = {1}, .capacity = 4};
  tx = view(x, ETK_F32, 1, 4, 4), ty = view(y, ETK_F32, 1, 4, 4);
  EXPECT(etk_softmax(&tx, &m, 1.0f, &ty) == ETK_OK && y[0] == 0 && y[3] == 0);
  keep[2] = 1;
  EXPECT(etk_softmax(&tx, &m, 1.0f, &ty) == ETK_OK && y[0] == 0 && y[2] == 1);
}

int main(void) {
  const etk_ops_kernel *ref = scalar();
  if (!ref || ref->isa != ETK_ISA_SCALAR) return printf("no scalar variant\n"), 1;
  for (int32_t i = 0; etk_ops_kernel_at(i); i++) {
    const etk_ops_kernel *k = etk_ops_kernel_at(i);
    const int before = failures;
    for (int how = 0; how < 4; how++) {
      for (size_t w = 0; w < sizeof k_widths / sizeof *k_widths; w++) {
        test_maps(k, ref, k_widths[w], how);
        test_norm(k, ref, k_widths[w], how);
        test_softmax(k, ref, k_widths[w], how);
        test_scan(k, ref, k_widths[w], how);
      }
      test_rope(k, ref, how);
    }
    if (failures > before) printf("in %s\n", k->name);
  }
  test_topk_is_a_stable_sort();
  test_bad_input_is_refused();
  test_golden();
  return failures != 0;
}
