/* Matrix products: every variant against the scalar one bit for bit, the scalar one against sums in double, rows and threads
 * that change nothing, packed headers that lie. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gemm_kernel.h"

static int g_failures;
#define CHECK(cond, ...)                                       \
  do {                                                         \
    if (!(cond)) {                                             \
      if (++g_failures < 40) {                                 \
        fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond); \
        fprintf(stderr, __VA_ARGS__);                          \
        fputc('\n', stderr);                                   \
      }                                                        \
    }                                                          \
  } while (0)

static uint64_t g_seed = 20240607;
static uint32_t next(void) {
  g_seed = g_seed * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(g_seed >> 33);
}
static float uniform(void) { return (float)(int32_t)(next() % 20001) / 10000.0f - 1.0f; }

static void *make(uint64_t bytes) {
  const uint64_t rounded = (bytes + 127) / 64 * 64;
  void *p = aligned_alloc(64, rounded);
  if (!p) exit(2);
  memset(p, 0x5a, rounded);
  return p;
}

static etk_tensor matrix(void *data, int32_t dtype, int64_t rows, int64_t columns, int64_t stride_bytes) {
  const int64_t item = dtype == ETK_F32 || dtype == ETK_I32 ? 4 : dtype == ETK_F16 ? 2 : 1;
  etk_tensor t = {.data = data, .dtype = dtype, .rank = 2, .dim = {rows, columns}, .stride = {stride_bytes, item}};
  t.capacity = rows * columns == 0 ? 0 : (uint64_t)((rows - 1) * stride_bytes + columns * item);
  return t;
}
static etk_tensor vector(void *data, int32_t dtype, int64_t n) {
  return (etk_tensor){.data = data, .dtype = dtype, .rank = 1, .dim = {n}, .stride = {4}, .capacity = (uint64_t)n * 4};
}

enum { LAYOUTS = 8 };

/* One problem: weights as codes, their packed forms, the same weights as double. */
typedef struct problem {
  etk_gemm_weight w;
  int64_t rows, groups;
  uint8_t *codes, *packed; /* packed: for the best kernel here */
  float *scales, *offsets;
  double *dense; /* [rows][k] */
  uint64_t bytes;
  uint8_t *other[LAYOUTS]; /* for kernels of another layout, by its number */
  uint64_t other_bytes[LAYOUTS];
} problem;

static int32_t layout_of(int32_t isa) {
  for (int32_t i = 0; etk_gemm_kernel_at(i); i++)
    if (isa == ETK_ISA_BEST || etk_gemm_kernel_at(i)->isa == isa) return etk_gemm_kernel_at(i)->layout;
  return 0;
}

static void pack_others(problem *p, const etk_gemm_source *s) {
  for (int32_t i = 0; etk_gemm_kernel_at(i); i++) {
    etk_gemm_weight w = p->w;
    w.layout = etk_gemm_kernel_at(i)->layout;
    CHECK(w.layout > 0 && w.layout < LAYOUTS, "layout %d", w.layout);
    if (w.layout == layout_of(ETK_ISA_BEST) || p->other[w.layout]) continue;
    etk_status status = etk_gemm_packed_size(&w, &p->other_bytes[w.layout]);
    CHECK(status == ETK_OK, "size in layout %d: %d", w.layout, status);
    p->other[w.layout] = make(p->other_bytes[w.layout]);
    status = etk_gemm_pack(&w, s, p->other[w.layout], p->other_bytes[w.layout], NULL);
    CHECK(status == ETK_OK, "pack in layout %d: %d", w.layout, status);
  }
}

static problem make_problem(int64_t n, int64_t k, int32_t bits, int32_t group, int32_t offset, int32_t gated, int32_t extreme) {
  problem p = {.w = {.struct_size = sizeof p.w, .n = n, .k = k, .bits = bits, .group = group, .offset = offset, .gated = gated}};
  p.rows = n * (1 + gated);
  const int64_t glen = group ? group : k ? k : 1;
  p.groups = group ? (k + glen - 1) / glen : 1;
  const int64_t row_bytes = bits == 8 ? k : (k + 1) / 2;
  p.codes = make((uint64_t)(p.rows * row_bytes));
  p.scales = make((uint64_t)(p.rows * p.groups) * 4);
  p.offsets = make((uint64_t)(p.rows * p.groups) * 4);
  p.dense = make((uint64_t)(p.rows * k) * 8);
  for (int64_t i = 0; i < p.rows * row_bytes; i++) p.codes[i] = extreme ? (next() & 1 ? 0x80 : 0x7f) : (uint8_t)next();
  if (extreme == 2) memset(p.codes, bits == 8 ? 0x80 : 0x88, (size_t)(p.rows * row_bytes));
  for (int64_t i = 0; i < p.rows * p.groups; i++) p.scales[i] = uniform() * 0.05f, p.offsets[i] = uniform() * 0.2f;
  for (int64_t r = 0; r < p.rows; r++)
    for (int64_t j = 0; j < k; j++) {
      const uint8_t b = p.codes[r * row_bytes + (bits == 8 ? j : j / 2)];
      const int32_t nibble = (b >> (j % 2 * 4)) & 15;
      const int32_t code = bits == 8 ? (int8_t)b : (nibble ^ 8) - 8;
      const int64_t g = r * p.groups + j / glen;
      p.dense[r * k + j] = (double)code * (double)p.scales[g] + (offset ? (double)p.offsets[g] : 0.0);
    }
  etk_gemm_source s = {.struct_size = sizeof s, .format = ETK_W_CODES,
                       .codes = matrix(p.codes, bits == 8 ? ETK_S8 : ETK_S4X2, p.rows, k, row_bytes),
                       .scales = matrix(p.scales, ETK_F32, p.rows, p.groups, p.groups * 4)};
  if (bits == 4) s.codes.capacity = (uint64_t)(p.rows * row_bytes);
  if (offset) s.offsets = matrix(p.offsets, ETK_F32, p.rows, p.groups, p.groups * 4);
  etk_status status = etk_gemm_packed_size(&p.w, &p.bytes);
  CHECK(status == ETK_OK, "size %d", status);
  p.packed = make(p.bytes);
  status = etk_gemm_pack(&p.w, &s, p.packed, p.bytes, NULL);
  CHECK(status == ETK_OK, "pack %d: n %lld k %lld bits %d group %d", status, (long long)n, (long long)k, bits, group);
  pack_others(&p, &s);
  return p;
}

static void drop(problem *p) {
  for (int32_t i = 0; i < LAYOUTS; i++) free(p->other[i]);
  free(p->codes), free(p->packed), free(p->scales), free(p->offsets), free(p->dense);
}

static etk_status run(const problem *p, etk_gemm_desc d, etk_gemm_io io, int32_t isa, int32_t threads, const etk_pool *pool) {
  d.struct_size = sizeof d;
  d.weight = p->w;
  d.weight.isa_cap = isa;
  if (!d.max_m) d.max_m = io.a.dim[0];
  io.struct_size = sizeof io;
  const int32_t layout = layout_of(isa);
  io.w = p->other[layout] ? p->other[layout] : p->packed;
  io.w_bytes = p->other[layout] ? p->other_bytes[layout] : p->bytes;
  etk_gemm_plan *plan = NULL;
  etk_status status = etk_gemm_plan_create(&d, threads, &plan);
  if (status != ETK_OK) return status;
  uint64_t bytes = 0, align = 0;
  status = etk_gemm_workspace(plan, &bytes, &align);
  CHECK(status == ETK_OK && align == 64, "workspace %d", status);
  void *ws = make(bytes);
  status = etk_gemm_run(plan, &io, ws, bytes, pool);
  free(ws);
  etk_gemm_plan_free(plan);
  return status;
}

static double act_of(double x, int32_t act) {
  switch (act) {
    case ETK_ACT_GELU_ERF: return 0.5 * x * (1.0 + erf(x / sqrt(2.0)));
    case ETK_ACT_GELU_TANH: return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case ETK_ACT_SILU: return x / (1.0 + exp(-x));
    default: return x;
  }
}

typedef struct mode {
  int32_t a_dtype, a_code, a_quant, act, full; /* full: bias, out_scale, residual */
} mode;

/* Rows m of every variant: equal bits; the scalar one against doubles with the activations' own quantization error allowed. */
static void check_case(const problem *p, int64_t m, mode how) {
  const int64_t n = p->w.n, k = p->w.k, columns = p->rows;
  const int code = how.a_dtype != ETK_F32;
  float *a = make((uint64_t)(m * k) * 4), *bias = make((uint64_t)columns * 4), *scale = make((uint64_t)columns * 4);
  float *sa = make((uint64_t)m * 4), *residual = make((uint64_t)(m * n) * 4), *first = make((uint64_t)(m * n) * 4);
  int32_t *za = make((uint64_t)m * 4);
  uint8_t *ac = make((uint64_t)(m * k));
  for (int64_t i = 0; i < m * k; i++) a[i] = uniform() * (i % 7 == 3 ? 6.0f : 1.0f), ac[i] = (uint8_t)next();
  for (int64_t i = 0; i < columns; i++) bias[i] = uniform(), scale[i] = 0.5f + uniform() * 0.25f;
  for (int64_t i = 0; i < m * n; i++) residual[i] = uniform();
  for (int64_t i = 0; i < m; i++) sa[i] = 0.01f + 0.001f * (float)(i % 5), za[i] = how.a_dtype == ETK_U8 ? (int32_t)(next() % 256) : (int32_t)(next() % 256) - 128;
  etk_gemm_desc d = {.a_dtype = how.a_dtype, .a_code = how.a_code, .a_quant = how.a_quant, .act = how.act};
  if (how.a_quant == ETK_A_STATIC) d.a_scale = 0.05f, d.a_zero = how.a_code == ETK_U8 || how.a_dtype == ETK_U8 ? 131 : 0;
  etk_gemm_io io = {.a = code ? matrix(ac, how.a_dtype, m, k, k) : matrix(a, ETK_F32, m, k, k * 4)};
  if (code && how.a_quant == ETK_A_ROW) io.a_scale = vector(sa, ETK_F32, m), io.a_zero = vector(za, ETK_I32, m);
  if (how.full) {
    io.bias = vector(bias, ETK_F32, columns), io.out_scale = vector(scale, ETK_F32, columns);
    io.residual = matrix(residual, ETK_F32, m, n, n * 4);
  }
  io.out = matrix(first, ETK_F32, m, n, n * 4);
  etk_status status = run(p, d, io, ETK_ISA_SCALAR, 1, NULL);
  CHECK(status == ETK_OK, "scalar: %d", status);
  for (int32_t i = 0;; i++) {
    const etk_gemm_kernel *kernel = etk_gemm_kernel_at(i);
    if (!kernel) break;
    if (kernel->isa == ETK_ISA_SCALAR) continue;
    float *out = make((uint64_t)(m * n) * 4);
    io.out = matrix(out, ETK_F32, m, n, n * 4);
    status = run(p, d, io, kernel->isa, 1, NULL);
    CHECK(status == ETK_OK, "%s: %d", kernel->name, status);
    int64_t wrong = -1;
    for (int64_t j = 0; j < m * n && wrong < 0; j++)
      if (memcmp(out + j, first + j, 4) != 0) wrong = j;
    CHECK(wrong < 0, "%s: m %lld n %lld k %lld bits %d group %d offset %d gated %d a %d/%d/%d act %d: at %lld %.9g, scalar %.9g", kernel->name,
          (long long)m, (long long)n, (long long)k, p->w.bits, p->w.group, p->w.offset, p->w.gated, how.a_dtype, how.a_code, how.a_quant,
          how.act, (long long)wrong, (double)out[wrong < 0 ? 0 : wrong], (double)first[wrong < 0 ? 0 : wrong]);
    free(out);
  }
  for (int64_t r = 0; r < m; r++) {
    const float s = how.a_quant == ETK_A_STATIC ? 0.05f : sa[r];
    const int32_t z = how.a_quant == ETK_A_STATIC ? d.a_zero : za[r];
    double top = 0;
    const int64_t from = how.a_quant == ETK_A_TENSOR ? 0 : r * k, to = how.a_quant == ETK_A_TENSOR ? m * k : r * k + k;
    for (int64_t j = from; j < to; j++) top = fmax(top, fabs((double)a[j]));
    /* half a step of A, plus what the clamp of a static scale cuts off */
    const double step = how.a_quant == ETK_A_STATIC ? (how.a_code == ETK_U8 ? 0.025 : 0.025 + fmax(0.0, 6.0 - 6.35)) : top * (how.a_code == ETK_U8 ? 2.0 : 1.0) / 127 * 0.51;
    for (int64_t c = 0; c < n; c++) {
      double v[2] = {0, 0}, slack[2] = {0, 0};
      for (int32_t h = 0; h <= p->w.gated; h++) {
        const int64_t row = h * n + c;
        double size = 0;
        for (int64_t j = 0; j < k; j++) {
          const double w = p->dense[row * k + j];
          const double x = code ? (double)s * ((how.a_dtype == ETK_U8 ? ac[r * k + j] : (int8_t)ac[r * k + j]) - z) : (double)a[r * k + j];
          v[h] += x * w;
          size += fabs(w) * (code ? 4.0 * (double)s * 256.0 : 4 * top);
          slack[h] += code ? 0 : fabs(w) * step;
        }
        slack[h] += 4e-7 * size + 1e-5 + (code && p->w.offset ? 1e-6 * (double)k * 256.0 * (double)s * 8 : 0);
        if (how.full) v[h] = v[h] * (double)scale[row] + (double)bias[row];
      }
      double y = act_of(v[0], how.act) * (p->w.gated ? v[1] : 1.0) + (how.full ? (double)residual[r * n + c] : 0.0);
      double allow = 1.2 * slack[0] + 1e-6 * fabs(y);
      if (p->w.gated) allow = 1.2 * slack[0] * (fabs(v[1]) + slack[1]) + 1.2 * slack[1] * (fabs(v[0]) + slack[0]) + 1e-5 * fabs(y);
      CHECK(fabs(y - (double)first[r * n + c]) <= allow, "scalar: m %lld n %lld k %lld bits %d group %d offset %d gated %d a %d/%d/%d: (%lld, %lld) %.7g, exact %.7g, allowed %.2g",
            (long long)m, (long long)n, (long long)k, p->w.bits, p->w.group, p->w.offset, p->w.gated, how.a_dtype, how.a_code, how.a_quant,
            (long long)r, (long long)c, (double)first[r * n + c], y, allow);
    }
  }
  free(a), free(bias), free(scale), free(sa), free(residual), free(first), free(za), free(ac);
}

static const mode k_modes[] = {
    {ETK_F32, 0, ETK_A_ROW, 0, 0}, {ETK_F32, ETK_U8, ETK_A_ROW, ETK_ACT_SILU, 1}, {ETK_F32, 0, ETK_A_TENSOR, ETK_ACT_GELU_ERF, 1},
    {ETK_F32, 0, ETK_A_GROUP32, ETK_ACT_GELU_TANH, 0}, {ETK_F32, ETK_U8, ETK_A_STATIC, 0, 1}, {ETK_S8, 0, ETK_A_ROW, 0, 0},
    {ETK_U8, 0, ETK_A_STATIC, 0, 1}, {ETK_U8, 0, ETK_A_ROW, 0, 0},
};

/* Every kind of weight, shapes around the edges of tiles, panels, groups and K blocks; each with some of the modes in turn. */
static void test_shapes(void) {
  static const int64_t shapes[][3] = {{1, 64, 64}, {2, 63, 40}, {5, 65, 100}, {6, 1, 1}, {7, 130, 33}, {8, 64, 512}, {13, 66, 520},
                                      {1, 1, 7}, {3, 70, 8}, {12, 64, 256}, {14, 5, 1030}, {1, 129, 1024}};
  static const struct { int32_t bits, group, offset; } kinds[] = {{8, 0, 0}, {8, 32, 0}, {8, 16, 1}, {8, 0, 1}, {4, 0, 0}, {4, 32, 0},
                                                                  {4, 32, 1}, {4, 128, 0}, {4, 64, 1}, {4, 16, 0}, {8, 256, 1}};
  int32_t turn = 0;
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
      problem p = make_problem(shapes[s][1], shapes[s][2], kinds[i].bits, kinds[i].group, kinds[i].offset, turn % 3 == 0, 0);
      for (int32_t j = 0; j < 3; j++) {
        const mode how = k_modes[turn++ % (int32_t)(sizeof k_modes / sizeof *k_modes)];
        if (how.a_quant == ETK_A_GROUP32 && kinds[i].group == 16) continue;
        check_case(&p, shapes[s][0], how);
      }
      drop(&p);
    }
}

/* Integer sums: exact in every variant, at the ends of the ranges. */
static void test_integers_are_exact(void) {
  const int64_t m = 7, n = 70, k = 1030;
  for (int32_t extreme = 0; extreme < 3; extreme++)
    for (int32_t u8 = 0; u8 < 2; u8++) {
      problem p = make_problem(n, k, 8, 0, 0, 0, extreme);
      uint8_t *a = make((uint64_t)(m * k));
      int32_t *out = make((uint64_t)(m * n) * 4), za[7];
      for (int64_t i = 0; i < m * k; i++) a[i] = extreme == 2 ? (u8 ? 0xff : 0x80) : (uint8_t)next();
      for (int64_t i = 0; i < m; i++) za[i] = u8 ? (int32_t)(i * 42) : (int32_t)(i * 42) - 128;
      for (int32_t i = 0; etk_gemm_kernel_at(i); i++) {
        const etk_gemm_kernel *kernel = etk_gemm_kernel_at(i);
        const etk_gemm_desc d = {.a_dtype = u8 ? ETK_U8 : ETK_S8, .out_dtype = ETK_I32};
        const etk_gemm_io io = {.a = matrix(a, d.a_dtype, m, k, k), .a_zero = vector(za, ETK_I32, m), .out = matrix(out, ETK_I32, m, n, n * 4)};
        const etk_status status = run(&p, d, io, kernel->isa, 1, NULL);
        CHECK(status == ETK_OK, "%s: %d", kernel->name, status);
        for (int64_t r = 0; r < m; r++)
          for (int64_t c = 0; c < n; c++) {
            int64_t sum = 0;
            for (int64_t j = 0; j < k; j++) sum += ((u8 ? a[r * k + j] : (int8_t)a[r * k + j]) - za[r]) * (int64_t)(int8_t)p.codes[c * k + j];
            CHECK(sum == out[r * n + c], "%s: %d, exact %lld", kernel->name, out[r * n + c], (long long)sum);
          }
      }
      free(a), free(out);
      drop(&p);
    }
}

/* A row alone, among others, and on three threads: the same bits. */
static void test_rows_and_threads_change_nothing(void) {
  static const struct { int32_t bits, group, offset, quant; } kinds[] = {{8, 0, 0, ETK_A_ROW}, {4, 32, 1, ETK_A_ROW}, {4, 128, 0, ETK_A_GROUP32}, {8, 32, 0, ETK_A_ROW}};
  const int64_t m = 211, n = 200, k = 1100;
  const etk_pool *pool = NULL;
  CHECK(etk_pool_create(3, 0, &pool) == ETK_OK, "pool");
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    problem p = make_problem(n, k, kinds[i].bits, kinds[i].group, kinds[i].offset, 1, 0);
    float *a = make((uint64_t)(m * k) * 4), *all = make((uint64_t)(m * n) * 4), *out = make((uint64_t)(m * n) * 4);
    for (int64_t j = 0; j < m * k; j++) a[j] = uniform();
    const etk_gemm_desc d = {.a_quant = kinds[i].quant, .act = ETK_ACT_SILU};
    etk_gemm_io io = {.a = matrix(a, ETK_F32, m, k, k * 4), .out = matrix(all, ETK_F32, m, n, n * 4)};
    CHECK(run(&p, d, io, 0, 1, NULL) == ETK_OK, "all");
    io.out = matrix(out, ETK_F32, m, n, n * 4);
    CHECK(run(&p, d, io, 0, 3, pool) == ETK_OK, "threads");
    CHECK(memcmp(all, out, (size_t)(m * n) * 4) == 0, "three threads differ: bits %d group %d", kinds[i].bits, kinds[i].group);
    for (int64_t rows = 1; rows <= 20; rows++) {
      const int64_t at = (int64_t)(next() % (uint32_t)(m - rows));
      io.a = matrix(a + at * k, ETK_F32, rows, k, k * 4);
      io.out = matrix(out, ETK_F32, rows, n, n * 4);
      CHECK(run(&p, d, io, 0, 3, rows & 1 ? pool : NULL) == ETK_OK, "rows");
      CHECK(memcmp(all + at * n, out, (size_t)(rows * n) * 4) == 0, "%lld rows differ: bits %d group %d", (long long)rows, kinds[i].bits, kinds[i].group);
    }
    free(a), free(all), free(out);
    drop(&p);
  }
  etk_pool_free(pool);
}

/* Any byte of the header changed: refused, or (none is) read as something within bounds. */
static void test_hostile_headers(void) {
  problem p = make_problem(70, 100, 4, 32, 1, 0, 0);
  float a[100] = {0}, out[70];
  etk_gemm_desc d = {.max_m = 1};
  const etk_gemm_io io = {.a = matrix(a, ETK_F32, 1, 100, 400), .out = matrix(out, ETK_F32, 1, 70, 280)};
  CHECK(run(&p, d, io, 0, 1, NULL) == ETK_OK, "good");
  for (int32_t at = 0; at < 128; at++)
    for (int32_t bit = 0; bit < 8; bit++) {
      p.packed[at] ^= (uint8_t)(1 << bit);
      memset(out, 0x7f, sizeof out);
      float before[70];
      memcpy(before, out, sizeof out);
      etk_gemm_weight w = {.struct_size = sizeof w};
      const int same_size = (at >= 48 && at < 64); /* n and k may change within the padding: the plan refuses those */
      CHECK(etk_gemm_packed_info(p.packed, p.bytes, &w) < 0 || same_size, "byte %d bit %d", at, bit);
      CHECK(run(&p, d, io, 0, 1, NULL) < 0, "byte %d bit %d", at, bit);
      CHECK(memcmp(before, out, sizeof out) == 0, "byte %d bit %d wrote", at, bit);
      p.packed[at] ^= (uint8_t)(1 << bit);
    }
  p.bytes--;
  CHECK(run(&p, d, io, 0, 1, NULL) == ETK_E_OVERFLOW, "short");
  p.bytes = 10;
  CHECK(run(&p, d, io, 0, 1, NULL) == ETK_E_OVERFLOW, "shorter than a header");
  drop(&p);
}

static void test_bad_arguments(void) {
  problem p = make_problem(10, 20, 8, 0, 0, 0, 0);
  float a[40] = {0}, out[20];
  memset(out, 0, sizeof out);
  const etk_gemm_desc good = {.max_m = 2};
  const etk_gemm_io io = {.a = matrix(a, ETK_F32, 2, 20, 80), .out = matrix(out, ETK_F32, 2, 10, 40)};
  etk_gemm_desc d;
  etk_gemm_io x;
  d = good, d.act = 9;
  CHECK(run(&p, d, io, 0, 1, NULL) == ETK_E_RANGE, "act");
  d = good, d.flags = 1;
  CHECK(run(&p, d, io, 0, 1, NULL) == ETK_E_RANGE, "flags");
  d = good, d.a_quant = ETK_A_STATIC;
  CHECK(run(&p, d, io, 0, 1, NULL) == ETK_E_RANGE, "static without a scale");
  d.a_scale = NAN;
  CHECK(run(&p, d, io, 0, 1, NULL) == ETK_E_RANGE, "NaN scale");
  d = good, d.out_dtype = ETK_I32;
  CHECK(run(&p, d, io, 0, 1, NULL) == ETK_E_RANGE, "i32 from floats");
  d = good, d.max_m = 1;
  CHECK(run(&p, d, io, 0, 1, NULL) == ETK_E_SHAPE, "more rows than planned");
  d = good, d.max_m = INT64_MAX;
  CHECK(run(&p, d, io, 0, 1, NULL) == ETK_E_SHAPE, "max_m");
  x = io, x.a.dim[1] = 19;
  CHECK(run(&p, good, x, 0, 1, NULL) == ETK_E_SHAPE, "k");
  x = io, x.a.data = NULL;
  CHECK(run(&p, good, x, 0, 1, NULL) == ETK_E_NULL, "null a");
  x = io, x.out.capacity = 4;
  CHECK(run(&p, good, x, 0, 1, NULL) == ETK_E_OVERFLOW, "capacity");
  x = io, x.out.data = a;
  CHECK(run(&p, good, x, 0, 1, NULL) == ETK_E_ALIAS, "alias");
  x = io, x.bias = vector(a, ETK_F32, 9);
  CHECK(run(&p, good, x, 0, 1, NULL) == ETK_E_SHAPE, "bias");
  x = io, x.residual = x.out;
  CHECK(run(&p, good, x, 0, 1, NULL) == ETK_OK, "residual in place");
  x.residual.data = (float *)x.out.data + 1;
  x.residual.dim[0] = 2;
  CHECK(run(&p, good, x, 0, 1, NULL) == ETK_E_ALIAS, "residual half in place");
  x = io, x.a_scale = vector(a, ETK_F32, 2);
  CHECK(run(&p, good, x, 0, 1, NULL) == ETK_E_RANGE, "scale for floats");
  x = io, x.a.dim[0] = x.out.dim[0] = 0;
  CHECK(run(&p, good, x, 0, 1, NULL) == ETK_OK, "no rows");
  uint64_t bytes;
  etk_gemm_weight w = p.w;
  w.k = 65537;
  CHECK(etk_gemm_packed_size(&w, &bytes) == ETK_E_SHAPE, "one group too long");
  w = p.w, w.group = 24;
  CHECK(etk_gemm_packed_size(&w, &bytes) == ETK_E_RANGE, "group");
  w = p.w, w.n = INT64_MAX;
  CHECK(etk_gemm_packed_size(&w, &bytes) == ETK_E_SHAPE, "n");
  w = p.w, w.struct_size = 3;
  CHECK(etk_gemm_packed_size(&w, &bytes) == ETK_E_STRUCT, "struct");
  drop(&p);
}

/* Blocks of a GGUF file, dequantized here by the definition of the format. */
static void test_gguf_blocks(void) {
  static const struct { int32_t format, bits, offset, bytes; } kinds[] = {{ETK_W_Q4_0, 4, 0, 18}, {ETK_W_Q4_1, 4, 1, 20}, {ETK_W_Q8_0, 8, 0, 34}};
  for (size_t i = 0; i < 3; i++)
    for (int32_t f16 = 0; f16 < 2; f16++) {
      const int64_t n = 66, k = 96, row = k / 32 * kinds[i].bytes;
      uint8_t *raw = make((uint64_t)(n * row));
      float *dense = make((uint64_t)(n * k) * 4);
      for (int64_t j = 0; j < n * row; j++) raw[j] = (uint8_t)next();
      for (int64_t b = 0; b < n * k / 32; b++) raw[b * kinds[i].bytes] = 0, raw[b * kinds[i].bytes + 1] = 0x2c; /* d = 2^-4 */
      if (kinds[i].format == ETK_W_Q4_1)
        for (int64_t b = 0; b < n * k / 32; b++) raw[b * 20 + 2] = 0, raw[b * 20 + 3] = 0xb8; /* m = -1/2 */
      etk_gemm_weight w = {.struct_size = sizeof w, .n = n, .k = k, .bits = kinds[i].bits, .group = 32, .offset = kinds[i].offset,
                           .scale_dtype = f16 ? ETK_F16 : ETK_F32};
      const etk_gemm_source s = {.struct_size = sizeof s, .format = kinds[i].format, .codes = matrix(raw, ETK_U8, n, row, row)};
      uint64_t bytes = 0;
      CHECK(etk_gemm_packed_size(&w, &bytes) == ETK_OK, "size");
      uint8_t *packed = make(bytes);
      etk_status status = etk_gemm_pack(&w, &s, packed, bytes, NULL);
      CHECK(status == ETK_OK, "format %d: %d", kinds[i].format, status);
      etk_tensor out = matrix(dense, ETK_F32, n, k, k * 4);
      status = etk_gemm_unpack(packed, bytes, &out);
      CHECK(status == ETK_OK, "unpack %d", status);
      for (int64_t r = 0; r < n; r++)
        for (int64_t c = 0; c < k; c++) {
          const uint8_t *block = raw + r * row + c / 32 * kinds[i].bytes;
          const int64_t j = c % 32;
          float want;
          if (kinds[i].bits == 8) {
            want = 0.0625f * (float)(int8_t)block[2 + j];
          } else {
            const uint8_t *q = block + kinds[i].bytes - 16;
            const int32_t code = j < 16 ? q[j] & 15 : q[j - 16] >> 4;
            want = kinds[i].offset ? 0.0625f * (float)code - 0.5f : 0.0625f * (float)(code - 8);
          }
          CHECK(dense[r * k + c] == want, "format %d (%lld, %lld): %g, %g", kinds[i].format, (long long)r, (long long)c, (double)dense[r * k + c], (double)want);
        }
      free(raw), free(dense), free(packed);
    }
}

/* Values that are not finite, and rows of zeros. */
static void test_nonfinite_rows(void) {
  problem p = make_problem(65, 50, 4, 32, 0, 0, 0);
  float a[4 * 50], b[4 * 50], out[4 * 65], want[4 * 65];
  for (int32_t i = 0; i < 200; i++) a[i] = b[i] = uniform();
  memset(a + 150, 0, 200), memset(b + 150, 0, 200);
  a[3] = NAN, b[3] = 0.0f;
  a[50] = 0.5f * (a[51] = 4.0f), b[50] = 2.0f, b[51] = 4.0f;
  a[60] = -INFINITY, b[60] = -4.0f;
  etk_gemm_io io = {.a = matrix(a, ETK_F32, 4, 50, 200), .out = matrix(out, ETK_F32, 4, 65, 260)};
  for (int32_t i = 0; etk_gemm_kernel_at(i); i++) {
    const etk_gemm_desc d = {.max_m = 4};
    io.a.data = a, io.out.data = out;
    const etk_status status = run(&p, d, io, etk_gemm_kernel_at(i)->isa, 1, NULL);
    CHECK(status == ETK_NOTE_NONFINITE, "%d", status);
    io.a.data = b, io.out.data = want;
    CHECK(run(&p, d, io, etk_gemm_kernel_at(i)->isa, 1, NULL) == ETK_OK, "finite");
    CHECK(memcmp(out, want, sizeof out) == 0, "%s", etk_gemm_kernel_at(i)->name);
    for (int32_t j = 195; j < 260; j++) CHECK(out[j] == 0.0f, "row of zeros");
  }
  drop(&p);
}

int main(void) {
  test_shapes();
  test_integers_are_exact();
  test_rows_and_threads_change_nothing();
  test_hostile_headers();
  test_bad_arguments();
  test_gguf_blocks();
  test_nonfinite_rows();
  if (g_failures) fprintf(stderr, "%d failures\n", g_failures);
  return g_failures != 0;
}
