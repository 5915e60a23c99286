/* Every attention kernel that runs here against the scalar one: codes, scales, S, P and tile sums bit for bit, the float
 * state within the bound stated at each check. P of the fused strip is read through V = identity. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attn_kernel.h"

extern const etk_attn_kernel etk_attn_s8_scalar_1x1, etk_attn_s8_scalar_1x1_p127;

#ifdef ETK_TEST_LIGHT /* sanitizers and emulators: a tenth of the shapes, every code path */
enum { LIGHT = 1 };
#else
enum { LIGHT = 0 };
#endif
enum { MAXD = 1024, ROWS = ETK_MAX_MR };
static int g_failed;
static uint64_t g_seed = 12345;

static void fail(const etk_attn_kernel *k, const char *what, int d, int rows, int i, double got, double want) {
  if (g_failed++ < 40) printf("%s: %s d=%d rows=%d at %d: got %.9g, want %.9g\n", k->name, what, d, rows, i, got, want);
}

static uint64_t rnd(void) {
  g_seed ^= g_seed << 13;
  g_seed ^= g_seed >> 7;
  return g_seed ^= g_seed << 17;
}
static float uniform(void) { return (float)(rnd() >> 40) * 0x1p-23f - 1.0f; }
static float normal(void) { return uniform() + uniform() + uniform(); }
static int32_t pad16(int32_t d) { return (d + 15) / 16 * 16; }
static void *block(size_t bytes) {
  void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) exit(2);
  memset(p, 0x5a, (bytes + 63) / 64 * 64);
  return p;
}

/* kind 0 normal, 1 an outlier channel, 2 zeros, 3 NaN and infinities, 4 huge, 5 below ETK_TINY, 6 around ETK_TINY */
static void fill(float *x, int64_t n, int32_t d, int kind) {
  for (int64_t i = 0; i < n; i++) {
    x[i] = normal();
    if (kind == 1 && i % d == 3) x[i] *= 60.0f;
    if (kind == 2) x[i] = i & 1 ? 0.0f : -0.0f;
    if (kind == 3 && rnd() % 7 == 0) x[i] = rnd() % 3 == 0 ? NAN : rnd() % 2 ? INFINITY : -INFINITY;
    if (kind == 4) x[i] *= 1e38f;
    if (kind == 5) x[i] *= 1e-40f;
    if (kind == 6) x[i] *= ETK_TINY;
  }
}

static void check_quant(const etk_attn_kernel *k, const etk_attn_kernel *ref, int32_t d) {
  const int32_t dp = pad16(d);
  const int64_t stride = d + 5;
  float *x = block((size_t)(stride * 64) * 4), mu[MAXD], sv[2][MAXD];
  int8_t *a = block((size_t)dp * 64), *b = block((size_t)dp * 64);
  void *page = block((size_t)dp * 64);
  int32_t sum[2][MAXD];
  for (int32_t c = 0; c < d; c++) mu[c] = normal();
  for (int kind = 0; kind < 7; kind++) {
    fill(x, stride * 64, d, kind);
    int32_t start, bad[2] = {0, 0};
    const float s0 = k->quant_q(x, d, dp, a, &start, &bad[0]), s1 = ref->quant_q(x, d, dp, b, &start, &bad[1]);
    if (s0 != s1 || bad[0] != bad[1]) fail(k, "quant_q scale", d, kind, 0, s0, s1);
    for (int32_t c = 0; c < dp; c++)
      if (a[c] != b[c]) fail(k, "quant_q code", d, kind, c, a[c], b[c]);
    const int32_t sizes[] = {0, 1, 3, 33, 63, 64};
    for (int t = 0; t < 6; t++) {
      const int32_t n = sizes[t];
      const float *shift = t & 1 ? mu : NULL;
      bad[0] = bad[1] = 0;
      const float p0 = k->pack_k(x, stride, n, d, dp, shift, page, &bad[0]), p1 = ref->pack_k(x, stride, n, d, dp, shift, b, &bad[1]);
      k->read_k(page, dp, a);
      if (p0 != p1 || bad[0] != bad[1]) fail(k, "pack_k scale", d, kind, n, p0, p1);
      if (memcmp(a, b, (size_t)dp * 64)) fail(k, "pack_k codes", d, kind, n, 0, 0);
      bad[0] = bad[1] = 0;
      k->pack_v(x, stride, n, d, dp, shift, page, sv[0], sum[0], t > 2, &bad[0]);
      ref->pack_v(x, stride, n, d, dp, shift, b, sv[1], sum[1], t > 2, &bad[1]);
      k->read_v(page, dp, a);
      if (memcmp(a, b, (size_t)dp * 64)) fail(k, "pack_v codes", d, kind, n, 0, 0);
      if (bad[0] != bad[1]) fail(k, "pack_v nonfinite", d, kind, n, bad[0], bad[1]);
      for (int32_t c = 0; c < dp; c++) {
        if (sv[0][c] != sv[1][c]) fail(k, "pack_v scale", d, kind, c, sv[0][c], sv[1][c]);
        if (sum[0][c] != sum[1][c]) fail(k, "pack_v colsum", d, kind, c, sum[0][c], sum[1][c]);
      }
    }
  }
  free(x), free(a), free(b), free(page);
}

/* One problem in a kernel's own layouts. */
typedef struct side {
  etk_strip s;
  void *k, *v;
  float *o, *m, *l, *kf, *vf, *qf;
  int32_t *start, *colsum;
  int8_t *q;
} side;

typedef struct data {
  int32_t d, dv, dp, dvp, rows;
  int8_t q[ROWS * MAXD], k[64 * MAXD], v[64 * MAXD];
  float qx[ROWS * MAXD], g[ROWS], sv[MAXD];
  float kx[64 * MAXD], vx[64 * MAXD], y[ROWS * 64];
  uint64_t mask[ROWS];
} data;

static void draw_codes(int8_t *x, int64_t n, int extreme) {
  for (int64_t i = 0; i < n; i++) x[i] = (int8_t)(extreme == 1 ? 127 : extreme == 2 ? (rnd() & 1 ? 127 : -127) : (int)(rnd() % 255) - 127);
}

static void draw(data *x, int32_t d, int32_t dv, int32_t rows, int kind) {
  x->d = d, x->dv = dv, x->dp = pad16(d), x->dvp = pad16(dv), x->rows = rows;
  draw_codes(x->q, (int64_t)rows * x->dp, kind % 3);
  draw_codes(x->k, 64 * (int64_t)x->dp, kind % 3);
  draw_codes(x->v, 64 * (int64_t)x->dvp, kind % 3);
  for (int32_t i = 0; i < rows; i++) {
    for (int32_t c = d; c < x->dp; c++) x->q[i * x->dp + c] = 0;
    x->g[i] = kind == 4 ? (i & 1 ? 0.0f : 1e30f) : 0.0004f * (1.5f + uniform());
    x->mask[i] = kind % 4 == 0 ? ~UINT64_C(0) : kind % 4 == 1 ? rnd() : kind % 4 == 2 ? UINT64_C(1) << (rnd() & 63) : rnd() & rnd();
    if (kind % 4 != 0 && i % 3 == 1) x->mask[i] = 0;
  }
  for (int32_t c = 0; c < x->dvp; c++) x->sv[c] = 0.01f + 0.01f * fabsf(uniform());
  for (int i = 0; i < rows * x->dp; i++) x->qx[i] = i % x->dp < d ? 0.5f * normal() : 0.0f;
  for (int i = 0; i < 64 * x->dp; i++) x->kx[i] = i / 64 < d ? normal() : 0.0f;
  for (int i = 0; i < 64 * x->dvp; i++) x->vx[i] = normal();
  for (int i = 0; i < rows * 64; i++)
    x->y[i] = x->mask[i / 64] >> (i % 64) & 1 ? (kind == 4 ? 1e30f * uniform() : 6.0f * normal()) : -INFINITY;
}

static side side_make(const etk_attn_kernel *k, const data *x) {
  side z;
  const size_t rows = (size_t)x->rows + 1;
  z.k = block((size_t)x->dp * 64), z.v = block((size_t)x->dvp * 64);
  z.q = block((size_t)x->rows * (size_t)x->dp);
  z.o = block(rows * (size_t)x->dvp * 4), z.m = block(rows * 4), z.l = block(rows * 4);
  z.start = block(rows * 4), z.colsum = block((size_t)x->dvp * 4);
  k->lay_k(x->k, x->dp, z.k);
  k->lay_v(x->v, x->dvp, z.v);
  memcpy(z.q, x->q, (size_t)x->rows * (size_t)x->dp);
  for (int32_t i = 0; i < x->rows; i++) {
    int32_t sum = 0;
    for (int32_t c = 0; c < x->dp; c++) sum += x->q[i * x->dp + c];
    z.start[i] = k->layout == 1 ? -128 * sum : 0;
    z.m[i] = -INFINITY, z.l[i] = 0.0f;
  }
  for (int32_t c = 0; c < x->dvp; c++) {
    z.colsum[c] = 0;
    for (int32_t j = 0; j < 64; j++) z.colsum[c] += x->v[j * x->dvp + c];
  }
  memset(z.o, 0, (size_t)x->rows * (size_t)x->dvp * 4);
  z.s = (etk_strip){.rows = x->rows, .d_pad = x->dp, .dv_pad = x->dvp, .q = z.q, .q_start = z.start, .k = z.k, .g = x->g,
                    .qf = x->qx, .v = z.v, .sv = x->sv, .v_colsum = z.colsum, .mask = x->mask, .o = z.o, .m = z.m, .l = z.l};
  return z;
}

static void side_free(const etk_attn_kernel *k, side *z, const data *x) {
  for (int32_t c = 0; c < x->dvp; c++)
    if (((uint8_t *)z->o)[((size_t)x->rows * (size_t)x->dvp + (size_t)c) * 4] != 0x5a) fail(k, "wrote past its rows", x->d, x->rows, c, 0, 0);
  free(z->k), free(z->v), free(z->q), free(z->o), free(z->m), free(z->l), free(z->start), free(z->colsum);
}

/* sum_j P |v| in the scale of O after a masked tile and perhaps the full one, for the bound: fp32 order, fused multiply-add
 * and exp2 of 2 ulp are the only freedom. */
static float *magnitude(const etk_attn_kernel *ref, const data *x, int tiles) {
  static data y;
  y = *x;
  for (int i = 0; i < 64 * x->dvp; i++) y.v[i] = (int8_t)abs(x->v[i]);
  side z = side_make(ref, &y);
  for (int t = 0; t < tiles; t++) {
    z.s.mask = t ? NULL : y.mask;
    ref->strip_s8(&z.s);
  }
  float *out = z.o;
  z.o = block(((size_t)x->rows + 1) * (size_t)x->dvp * 4);
  side_free(ref, &z, &y);
  return out;
}

static void compare(const etk_attn_kernel *k, const char *what, const data *x, const side *a, const side *b, const float *size, float rel, int exact) {
  for (int32_t i = 0; i < x->rows; i++) {
    if (a->m[i] != b->m[i]) fail(k, what, x->d, x->rows, i, a->m[i], b->m[i]);
    if (exact ? a->l[i] != b->l[i] : !(fabsf(a->l[i] - b->l[i]) <= rel * b->l[i])) fail(k, "l", x->d, x->rows, i, a->l[i], b->l[i]);
    for (int32_t c = 0; c < x->dvp; c++) {
      const int32_t at = i * x->dvp + c;
      if (!(fabsf(a->o[at] - b->o[at]) <= rel * size[at])) fail(k, what, x->d, x->rows, at, a->o[at], b->o[at]);
    }
  }
}

static void check_int8(const etk_attn_kernel *k, const etk_attn_kernel *ref, const data *x) {
  int32_t s[2][ROWS * 64];
  uint8_t p[2][ROWS * 64];
  float w[2][ROWS];
  side a = side_make(k, x), b = side_make(ref, x);
  k->qk_s8(&a.s, s[0]);
  ref->qk_s8(&b.s, s[1]);
  for (int i = 0; i < x->rows * 64; i++)
    if (s[0][i] != s[1][i]) fail(k, "S", x->d, x->rows, i, s[0][i], s[1][i]);
  float *size = magnitude(ref, x, 1);
  for (int full = 0; full < 2; full++) { /* one tile from the empty state, then a second on top of it */
    a.s.mask = b.s.mask = full ? NULL : x->mask;
    k->strip_s8(&a.s), ref->strip_s8(&b.s);
    if (full) {
      free(size);
      size = magnitude(ref, x, 2);
    }
    compare(k, full ? "strip_s8, second tile" : "strip_s8", x, &a, &b, size, 2e-6f, !full);
  }
  free(size);
  side_free(k, &a, x), side_free(ref, &b, x);
  a = side_make(k, x), b = side_make(ref, x);
  k->softmax_u8(&a.s, x->y, p[0], w[0]);
  ref->softmax_u8(&b.s, x->y, p[1], w[1]);
  for (int i = 0; i < x->rows * 64; i++) {
    const int at = i / 64 * 64 + (k->p_order ? k->p_order[i % 64] : i % 64);
    if (p[0][i] != p[1][at]) fail(k, "P", x->d, x->rows, at, p[0][i], p[1][at]);
  }
  for (int i = 0; i < x->rows; i++)
    if (w[0][i] != w[1][i]) fail(k, "w of a first tile", x->d, x->rows, i, w[0][i], w[1][i]);
  size = block((size_t)x->rows * (size_t)x->dvp * 4);
  for (int i = 0; i < x->rows * x->dvp; i++) size[i] = 64.0f * 255 * 127 * 0.02f;
  k->pv_s8(&a.s, p[0], w[0]), ref->pv_s8(&b.s, p[1], w[1]);
  compare(k, "pv_s8", x, &a, &b, size, 1e-6f, 1);
  free(size);
  side_free(k, &a, x), side_free(ref, &b, x);
}

static void check_p_of_strip(const etk_attn_kernel *k, const etk_attn_kernel *ref, data *x) {
  if (x->dvp < 64) return;
  memset(x->v, 0, (size_t)x->dvp * 64);
  for (int j = 0; j < 64; j++) x->v[j * x->dvp + j] = 1;
  for (int c = 0; c < x->dvp; c++) x->sv[c] = 1.0f;
  side a = side_make(k, x), b = side_make(ref, x);
  k->strip_s8(&a.s), ref->strip_s8(&b.s);
  for (int i = 0; i < x->rows * x->dvp; i++)
    if (a.o[i] != b.o[i]) fail(k, "P of strip_s8", x->d, x->rows, i, a.o[i], b.o[i]);
  a.s.skip_log2 = b.s.skip_log2 = 3.0f; /* the same tile again with a far higher maximum: left out whole */
  for (int i = 0; i < x->rows; i++) a.m[i] = b.m[i] = 1e35f;
  k->strip_s8(&a.s), ref->strip_s8(&b.s);
  for (int i = 0; i < x->rows * x->dvp; i++)
    if (a.o[i] != b.o[i]) fail(k, "skipped strip_s8", x->d, x->rows, i, a.o[i], b.o[i]);
  side_free(k, &a, x), side_free(ref, &b, x);
}

/* Many rows at once give the bits that strips of mr rows give. */
static void check_block(const etk_attn_kernel *k, const data *x) {
  side a = side_make(k, x), b = side_make(k, x);
  for (int tile = 0; tile < 4; tile++) { /* full, full, masked, full with skipping */
    a.s.mask = tile == 2 ? x->mask : NULL;
    a.s.skip_log2 = tile == 3 ? 0.5f : 0.0f;
    k->block_s8(&a.s);
    for (int32_t row = 0; row < x->rows; row += k->mr) {
      etk_strip s = a.s;
      s.rows = x->rows - row < k->mr ? x->rows - row : k->mr;
      s.q = b.q + row * x->dp, s.q_start = b.start + row, s.k = b.k, s.g += row, s.v = b.v, s.m = b.m + row, s.l = b.l + row;
      s.o = b.o + row * x->dvp;
      if (s.mask) s.mask += row;
      k->strip_s8(&s);
    }
  }
  for (int32_t i = 0; i < x->rows; i++)
    if (a.m[i] != b.m[i] || a.l[i] != b.l[i]) fail(k, "block_s8 l", x->d, x->rows, i, a.l[i], b.l[i]);
  for (int32_t i = 0; i < x->rows * x->dvp; i++)
    if (a.o[i] != b.o[i]) fail(k, "block_s8", x->d, x->rows, i, a.o[i], b.o[i]);
  side_free(k, &a, x), side_free(k, &b, x);
}

static void check_block_float(const etk_attn_kernel *k, const data *x) {
  side a = side_make(k, x), b = side_make(k, x);
  float *kf = memcpy(block((size_t)x->dp * 256), x->kx, (size_t)x->dp * 256);
  float *vf = memcpy(block((size_t)x->dvp * 256), x->vx, (size_t)x->dvp * 256);
  a.s.k = b.s.k = kf, a.s.v = b.s.v = vf;
  for (int tile = 0; tile < 3; tile++) {
    a.s.mask = tile == 1 ? x->mask : NULL;
    k->block_f32(&a.s);
    for (int32_t row = 0; row < x->rows; row += k->mr) {
      etk_strip s = a.s;
      s.rows = x->rows - row < k->mr ? x->rows - row : k->mr;
      s.qf += row * x->dp, s.m = b.m + row, s.l = b.l + row, s.o = b.o + row * x->dvp;
      if (s.mask) s.mask += row;
      k->strip_f32(&s);
    }
  }
  for (int32_t i = 0; i < x->rows; i++)
    if (a.m[i] != b.m[i] || a.l[i] != b.l[i]) fail(k, "block_f32 l", x->d, x->rows, i, a.l[i], b.l[i]);
  for (int32_t i = 0; i < x->rows * x->dvp; i++)
    if (a.o[i] != b.o[i]) fail(k, "block_f32", x->d, x->rows, i, a.o[i], b.o[i]);
  free(kf), free(vf);
  side_free(k, &a, x), side_free(k, &b, x);
}

/* QK: d roundings of at most the sum of magnitudes. softmax: exp2 within 4e-6. PV: 64 roundings. */
static void check_float(const etk_attn_kernel *k, const etk_attn_kernel *ref, const data *x) {
  float y[2][ROWS * 64], p[2][ROWS * 64];
  side a = side_make(k, x), b = side_make(ref, x);
  a.s.k = b.s.k = memcpy(block((size_t)x->dp * 256), x->kx, (size_t)x->dp * 256);
  a.s.v = b.s.v = memcpy(block((size_t)x->dvp * 256), x->vx, (size_t)x->dvp * 256);
  a.s.qf = b.s.qf = memcpy(block((size_t)(x->rows * x->dp) * 4), x->qx, (size_t)(x->rows * x->dp) * 4);
  k->qk_f32(&a.s, y[0]), ref->qk_f32(&b.s, y[1]);
  float near = (float)x->dp * 6e-8f * (float)x->dp * 2.0f;
  for (int i = 0; i < x->rows * 64; i++)
    if (!(fabsf(y[0][i] - y[1][i]) <= near)) fail(k, "qk_f32", x->d, x->rows, i, y[0][i], y[1][i]);
  k->softmax_f32(&a.s, x->y, p[0]), ref->softmax_f32(&b.s, x->y, p[1]);
  for (int i = 0; i < x->rows * 64; i++)
    if (!(fabsf(p[0][i] - p[1][i]) <= 4e-6f * p[1][i] + 1e-37f)) fail(k, "softmax_f32", x->d, x->rows, i, p[0][i], p[1][i]);
  k->pv_f32(&a.s, p[1]), ref->pv_f32(&b.s, p[1]);
  float *size = block((size_t)x->rows * (size_t)x->dvp * 4);
  for (int i = 0; i < x->rows * x->dvp; i++) size[i] = 3.0f * b.l[i / x->dvp];
  compare(k, "pv_f32", x, &a, &b, size, 1e-5f, 0);
  for (int full = 0; full < 2; full++) {
    a.s.mask = b.s.mask = full ? NULL : x->mask;
    k->strip_f32(&a.s), ref->strip_f32(&b.s);
    for (int i = 0; i < x->rows; i++)
      if (!(fabsf(a.m[i] - b.m[i]) <= near) && a.m[i] != b.m[i]) fail(k, "strip_f32 m", x->d, x->rows, i, a.m[i], b.m[i]);
    for (int i = 0; i < x->rows * x->dvp; i++) {
      const float la = a.l[i / x->dvp], lb = b.l[i / x->dvp], oa = la > 0 ? a.o[i] / la : 0, ob = lb > 0 ? b.o[i] / lb : 0;
      if (!(fabsf(oa - ob) <= 1e-5f + 4.0f * near)) fail(k, "strip_f32", x->d, x->rows, i, oa, ob);
    }
  }
  free((void *)(uintptr_t)a.s.k), free((void *)(uintptr_t)a.s.v), free((void *)(uintptr_t)a.s.qf), free(size);
  side_free(k, &a, x), side_free(ref, &b, x);
}

int main(void) {
  static data x;
  static const int32_t widths[] = {16, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 256, 1024, 1};
  for (int n = 0; etk_attn_kernel_at(n); n++) {
    const etk_attn_kernel *k = etk_attn_kernel_at(n), *ref = k->p_max == 127 ? &etk_attn_s8_scalar_1x1_p127 : &etk_attn_s8_scalar_1x1;
    const int before = g_failed;
    if (k->mr < 1 || k->mr > ETK_MAX_MR || (k->p_max != 255 && k->p_max != 127)) fail(k, "fields", 0, 0, 0, k->mr, k->p_max);
    for (int t = 0; t < 14; t++) {
      if (LIGHT && widths[t] > 256) continue;
      const int32_t d = widths[t], dv = t % 4 == 3 ? widths[(t + 5) % 12] : d;
      check_quant(k, ref, d);
      for (int32_t rows = 1; rows <= k->mr; rows++)
        for (int kind = 0; kind < 5; kind++) {
          if (d > 128 && rows != k->mr && kind != rows % 5) continue;
          if (LIGHT && rows != k->mr && kind != rows % 5) continue;
          draw(&x, d, dv, rows, kind);
          check_int8(k, ref, &x);
          if (kind != 4) check_float(k, ref, &x);
          check_p_of_strip(k, ref, &x);
        }
      for (int32_t rows = 1; k->block_s8 && rows <= ROWS && d <= 256; rows++) {
        draw(&x, d, dv, rows, rows % 5);
        check_block(k, &x);
        if (k->block_f32) check_block_float(k, &x);
      }
    }
    printf("%s: %s\n", k->name, g_failed == before ? "ok" : "FAILED");
  }
  etk_status status;
  if (etk_attn_kernel_pick(ETK_ISA_SCALAR, &status) != &etk_attn_s8_scalar_1x1 || status != ETK_OK) g_failed++, printf("pick scalar\n");
  if (etk_attn_kernel_pick(99, &status) || status != ETK_E_ISA) g_failed++, printf("pick 99\n");
  return g_failed != 0;
}
