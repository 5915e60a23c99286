/* Index builders that look at Q and K: every kernel variant that runs here held bit for bit against the scalar one, over
 * lengths around each tile edge; then the builders with small workspaces, missing pointers, wild values and an awkward
 * pool. One line per failure. The seed of the generator is fixed. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgetok/index.h"
#include "index_kernel.h"

static int failures;
#define EXPECT(cond)                                                   \
  do {                                                                 \
    if (!(cond)) {                                                     \
      failures++;                                                      \
      printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #cond);  \
    }                                                                  \
  } while (0)

static uint64_t state = 20261;
static uint32_t draw(void) {
  state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  return (uint32_t)(state >> 33);
}
static float draw_float(void) { return ((float)(draw() % 20001) - 10000.0f) / 3000.0f; }

enum { MAX_D = 96, ROWS = 64 };

/* One block of rows with a few wild values: sums, maxima, codes, pooled codes. */
static void compare_blocks(const etk_index_kernel *a, const etk_index_kernel *b, int32_t n, int32_t d, int with_mu) {
  static float x[ROWS * MAX_D], mu[MAX_D];
  static int8_t codes[2][ROWS * MAX_D];
  static int16_t pooled[2][MAX_D];
  static float sum[2][MAX_D];
  const int32_t dp = (d + 15) / 16 * 16;
  int32_t note[2] = {0, 0};
  for (int i = 0; i < ROWS * MAX_D; i++) x[i] = draw_float();
  for (int i = 0; i < MAX_D; i++) mu[i] = draw_float();
  if (n * d > 20) x[7] = NAN, x[11] = -INFINITY, x[13] = 3e38f;
  memset(codes, 1, sizeof codes);
  const etk_index_kernel *both[2] = {a, b};
  float top[2];
  int64_t self[2];
  for (int i = 0; i < 2; i++) {
    both[i]->sum_rows(x, MAX_D, n, d, sum[i], &note[i]);
    top[i] = both[i]->max_abs(x, MAX_D, n, d, with_mu ? mu : NULL);
    both[i]->quantize(x, MAX_D, n, d, dp, with_mu ? mu : NULL, 127.0f / 4.0f, with_mu ? 0 : 16, codes[i], &note[i]);
  }
  EXPECT(memcmp(sum[0], sum[1], sizeof(float) * (size_t)d) == 0 && note[0] == note[1]);
  EXPECT(top[0] == top[1]);
  x[13] = 1.0f;
  for (int i = 0; i < 2; i++) {
    const float t = both[i]->max_abs(x, MAX_D, n, d, with_mu ? mu : NULL);
    both[i]->quantize(x, MAX_D, n, d, dp, with_mu ? mu : NULL, 127.0f / t, n == 64 && !with_mu ? 16 : 0, codes[i], &note[i]);
    self[i] = both[i]->pool(codes[i], n, dp, pooled[i]);
  }
  EXPECT(memcmp(codes[0], codes[1], (size_t)(n * dp)) == 0);
  EXPECT(memcmp(pooled[0], pooled[1], sizeof(int16_t) * (size_t)dp) == 0 && self[0] == self[1]);
}

static void compare_products(const etk_index_kernel *a, const etk_index_kernel *b, int64_t rows, int64_t cols, int64_t depth) {
  const int64_t stride = (cols + 15) / 16 * 16;
  int8_t *left = malloc((size_t)(rows * depth)), *right = malloc((size_t)(cols * depth));
  void *packed = malloc(etk_index_packed((uint64_t)cols, (uint64_t)depth));
  int32_t *out[2] = {malloc((size_t)(rows * stride) * 4), malloc((size_t)(rows * stride) * 4)};
  for (int64_t i = 0; i < rows * depth; i++) left[i] = (int8_t)(draw() % 7 ? (int)(draw() % 255) - 127 : -127);
  for (int64_t i = 0; i < cols * depth; i++) right[i] = (int8_t)(draw() % 7 ? (int)(draw() % 255) - 127 : 127);
  const etk_index_kernel *both[2] = {a, b};
  for (int i = 0; i < 2; i++) {
    both[i]->pack_s8(right, cols, depth, packed);
    both[i]->dot_s8(left, rows, packed, cols, depth, out[i], stride);
  }
  int same = 1;
  for (int64_t r = 0; r < rows; r++) {
    same &= memcmp(out[0] + r * stride, out[1] + r * stride, (size_t)cols * 4) == 0;
    int32_t exact = 0;
    for (int64_t k = 0; k < depth; k++) exact += left[r * depth + k] * right[(cols - 1) * depth + k];
    same &= out[1][r * stride + cols - 1] == exact;
  }
  EXPECT(same);
  free(left), free(right), free(packed), free(out[0]), free(out[1]);
}

static void compare_rows(const etk_index_kernel *a, const etk_index_kernel *b, int64_t n) {
  static int32_t dot[1100], norm[1100];
  static float scale[1100];
  static uint32_t weight[2][1100];
  static int16_t left[MAX_D], right[32 * MAX_D];
  int32_t out[2][32];
  int64_t count[2];
  for (int64_t i = 0; i < n; i++) {
    dot[i] = (int32_t)(draw() % 2000001) - 1000000;
    scale[i] = i % 5 == 4 ? 0.0f : (float)(draw() % 1000) * 1e-6f;
    norm[i] = (int32_t)(draw() % 1000);
  }
  if (n > 3) scale[1] = 3e38f, dot[2] = dot[0], scale[2] = scale[0];
  a->weights(dot, 0.7f, scale, n, weight[0]);
  b->weights(dot, 0.7f, scale, n, weight[1]);
  EXPECT(memcmp(weight[0], weight[1], (size_t)n * 4) == 0);
  for (uint32_t t = 0; t < 25; t++)
    EXPECT(a->mass_from(weight[0], n, 1u << t, &count[0]) == b->mass_from(weight[0], n, 1u << t, &count[1]) && count[0] == count[1]);
  EXPECT(a->nearest(dot, norm, n) == b->nearest(dot, norm, n));
  for (int i = 0; i < MAX_D; i++) left[i] = (int16_t)((int)(draw() % 2033) - 1016);
  for (int i = 0; i < 32 * MAX_D; i++) right[i] = (int16_t)((int)(draw() % 2033) - 1016);
  a->dot_s16(left, right, 32, MAX_D, out[0]);
  b->dot_s16(left, right, 32, MAX_D, out[1]);
  EXPECT(memcmp(out[0], out[1], sizeof out[0]) == 0);
}

static void test_variants(void) {
  static const int64_t cols[] = {1, 15, 16, 17, 63, 64, 65, 130};
  const etk_index_kernel *scalar = NULL, *kernel;
  for (int32_t i = 0; (kernel = etk_index_kernel_at(i)) != NULL; i++) scalar = kernel; /* best first, scalar last */
  EXPECT(scalar && scalar->isa == ETK_ISA_SCALAR);
  for (int32_t i = 0; scalar && (kernel = etk_index_kernel_at(i)) != NULL; i++) {
    const int before = failures;
    for (int32_t d = 1; d <= MAX_D; d += d < 20 ? 1 : 7)
      for (int32_t n = 1; n <= ROWS; n += 21) compare_blocks(scalar, kernel, n, d, n % 2), compare_blocks(scalar, kernel, 64, d, 0);
    for (int c = 0; c < 8; c++)
      for (int64_t rows = 1; rows <= 9; rows += 4) compare_products(scalar, kernel, rows, cols[c], 16 * (1 + c * 9));
    for (int64_t n = 1; n < 1100; n += n < 140 ? 1 : 177) compare_rows(scalar, kernel, n);
    if (failures != before) printf("in %s\n", kernel->name);
  }
}

/* A pool that runs its tasks backwards, each as another worker, and can be told to stop. */
static int stop_at = -1;
static int back_threads(void *ctx) { return *(int *)ctx; }
static int back_run(void *ctx, void (*fn)(void *arg, int64_t task, int worker), void *arg, int64_t ntasks) {
  for (int64_t t = ntasks - 1; t >= 0; t--) {
    if (t == stop_at) return 1;
    fn(arg, t, (int)(t % *(int *)ctx));
  }
  return 0;
}

enum { B = 1, HEADS = 4, KV = 2, N = 200, M = 230, D = 24, ROWCAP = 4096, NNZCAP = 65536 };
static float q_data[B * HEADS * M * D], k_data[B * HEADS * M * D];
static int64_t rows_store[2][ROWCAP];
static int32_t col_store[2][NNZCAP], ints[10][HEADS * 256 * 2];
static uint8_t kind_store[2][NNZCAP];

static etk_tensor tensor_of(float *data, int64_t heads, int64_t tokens) {
  const etk_tensor t = {.data = data, .dtype = ETK_F32, .rank = 4, .dim = {B, heads, tokens, D},
                        .stride = {heads * tokens * D * 4, tokens * D * 4, D * 4, 4},
                        .capacity = (uint64_t)(B * heads * tokens * D * 4)};
  return t;
}

static etk_index_arrays arrays_of(int i) {
  const etk_index_arrays a = {.row_ptr = rows_store[i], .row_cap = ROWCAP, .col = col_store[i], .kind = kind_store[i], .nnz_cap = NNZCAP};
  return a;
}

typedef etk_status (*size_fn)(const void *desc, const etk_tensor *q, const etk_tensor *k, const etk_pool *pool, uint64_t *bytes);
typedef etk_status (*run_fn)(const void *desc, const etk_tensor *q, const etk_tensor *k, etk_index_arrays *a, etk_bsr *out, void *ws,
                             uint64_t bytes, const etk_pool *pool);

static etk_status topp_size(const void *d, const etk_tensor *q, const etk_tensor *k, const etk_pool *p, uint64_t *bytes) {
  return etk_bsr_from_topp_workspace(d, q, k, p, bytes);
}
static etk_status topp_run(const void *d, const etk_tensor *q, const etk_tensor *k, etk_index_arrays *a, etk_bsr *out, void *ws,
                           uint64_t bytes, const etk_pool *p) {
  return etk_bsr_from_topp(d, q, k, a, out, ws, bytes, p);
}
static etk_status xattn_size(const void *d, const etk_tensor *q, const etk_tensor *k, const etk_pool *p, uint64_t *bytes) {
  return etk_bsr_from_xattn_workspace(d, q, k, p, bytes);
}
static etk_status xattn_run(const void *d, const etk_tensor *q, const etk_tensor *k, etk_index_arrays *a, etk_bsr *out, void *ws,
                            uint64_t bytes, const etk_pool *p) {
  return etk_bsr_from_xattn(d, q, k, a, out, ws, bytes, p);
}
static etk_status clusters_size(const void *d, const etk_tensor *q, const etk_tensor *k, const etk_pool *p, uint64_t *bytes) {
  return etk_bsr_from_clusters_workspace(d, q, k, p, bytes);
}
static etk_status clusters_run(const void *d, const etk_tensor *q, const etk_tensor *k, etk_index_arrays *a, etk_bsr *out, void *ws,
                               uint64_t bytes, const etk_pool *p) {
  const etk_cluster_arrays to = {ints[0], ints[1], ints[2], ints[3], ints[4], ints[5], ints[6], ints[7]};
  return etk_bsr_from_clusters(d, q, k, &to, a, out, ws, bytes, p);
}
static etk_status paro_size(const void *d, const etk_tensor *q, const etk_tensor *k, const etk_pool *p, uint64_t *bytes) {
  return etk_bsr_from_paro_workspace(d, q, k, p, bytes);
}
static etk_status paro_run(const void *d, const etk_tensor *q, const etk_tensor *k, etk_index_arrays *a, etk_bsr *out, void *ws,
                           uint64_t bytes, const etk_pool *p) {
  const etk_paro_arrays to = {.order = ints[0], .perm = ints[1], .inverse = ints[2]};
  return etk_bsr_from_paro(d, q, k, &to, a, out, ws, bytes, p);
}

static void *aligned(void *raw) { return (char *)raw + (64 - (uintptr_t)raw % 64) % 64; }

/* Everything a builder promises whatever its rule is. */
static void exercise(const char *name, size_fn size, run_fn run, const void *desc, etk_tensor q, etk_tensor k) {
  const int before = failures;
  const int64_t n = q.dim[2], m = k.dim[2];
  int two = 2;
  const etk_pool backwards = {.ctx = &two, .nthreads = back_threads, .parallel_for = back_run};
  const etk_pool *real = NULL;
  uint64_t bytes = 0, bytes2 = 0;
  etk_bsr out[2];
  etk_index_arrays a = arrays_of(0), b = arrays_of(1), sizes = {0};
  EXPECT(size(desc, &q, &k, NULL, &bytes) == ETK_OK && size(desc, &q, &k, &backwards, &bytes2) == ETK_OK && bytes2 > bytes);
  void *raw = malloc(bytes2 + 64), *ws = aligned(raw);
  EXPECT(run(desc, &q, &k, &a, &out[0], ws, bytes, NULL) == ETK_OK && etk_bsr_check(&out[0], B, HEADS, n, m) == ETK_OK);
  EXPECT(run(desc, &q, &k, &sizes, NULL, ws, bytes, NULL) == ETK_OK && sizes.nnz == a.nnz && sizes.rows == a.rows);
  EXPECT(run(desc, &q, &k, &b, &out[1], ws, bytes2, &backwards) == ETK_OK && b.nnz == a.nnz);
  EXPECT(memcmp(col_store[0], col_store[1], (size_t)a.nnz * 4) == 0 && memcmp(rows_store[0], rows_store[1], (size_t)(a.rows + 1) * 8) == 0);
  EXPECT(etk_pool_create(2, 0, &real) == ETK_OK);
  b = arrays_of(1);
  memset(col_store[1], 0, sizeof col_store[1]);
  EXPECT(run(desc, &q, &k, &b, &out[1], ws, bytes2, real) == ETK_OK && memcmp(col_store[0], col_store[1], (size_t)a.nnz * 4) == 0);
  etk_pool_free(real);
  stop_at = 0;
  b = arrays_of(1);
  EXPECT(run(desc, &q, &k, &b, &out[1], ws, bytes2, &backwards) == ETK_E_CANCELLED);
  stop_at = -1;
  EXPECT(run(desc, &q, &k, &b, &out[1], ws, bytes - 1, NULL) == ETK_E_WORKSPACE);
  EXPECT(run(desc, &q, &k, &b, &out[1], (char *)ws + 8, bytes, NULL) == ETK_E_WORKSPACE);
  EXPECT(run(desc, &q, &k, &b, &out[1], NULL, bytes, NULL) == ETK_E_NULL);
  EXPECT(run(desc, NULL, &k, &b, &out[1], ws, bytes, NULL) == ETK_E_NULL && run(desc, &q, NULL, &b, &out[1], ws, bytes, NULL) == ETK_E_NULL);
  EXPECT(run(NULL, &q, &k, &b, &out[1], ws, bytes, NULL) == ETK_E_NULL && run(desc, &q, &k, NULL, &out[1], ws, bytes, NULL) == ETK_E_NULL);
  EXPECT(run(desc, &q, &k, &b, NULL, ws, bytes, NULL) == ETK_E_NULL && size(desc, &q, &k, NULL, NULL) == ETK_E_NULL);
  b = arrays_of(1), b.nnz_cap = a.nnz - 1, col_store[1][0] = -5;
  EXPECT(run(desc, &q, &k, &b, &out[1], ws, bytes, NULL) == ETK_E_RANGE && b.nnz == a.nnz && col_store[1][0] == -5);
  etk_tensor bad = q;
  bad.capacity--;
  EXPECT(size(desc, &bad, &k, NULL, &bytes2) == ETK_E_OVERFLOW);
  bad = q, bad.dtype = ETK_F16;
  EXPECT(size(desc, &bad, &k, NULL, &bytes2) == ETK_E_DTYPE);
  bad = q, bad.stride[3] = 8;
  EXPECT(size(desc, &bad, &k, NULL, &bytes2) == ETK_E_STRIDE);
  bad = q, bad.stride[2] = 2;
  EXPECT(size(desc, &bad, &k, NULL, &bytes2) == ETK_E_STRIDE);
  bad = q, bad.dim[1] = 3;
  EXPECT(size(desc, &bad, &k, NULL, &bytes2) < 0);
  bad = q, bad.dim[2] = -1;
  EXPECT(size(desc, &bad, &k, NULL, &bytes2) == ETK_E_SHAPE);
  bad = q, bad.dim[2] = INT64_MAX, bad.stride[2] = INT64_MAX - 3;
  EXPECT(size(desc, &bad, &k, NULL, &bytes2) == ETK_E_SHAPE);
  bad = q, bad.stride[1] = INT64_MAX - 3;
  EXPECT(size(desc, &bad, &k, NULL, &bytes2) == ETK_E_OVERFLOW);
  bad = q, bad.data = NULL;
  EXPECT(size(desc, &bad, &k, NULL, &bytes2) == ETK_E_NULL);
  free(raw);
  if (failures != before) printf("in %s\n", name);
}

static void test_builders(void) {
  for (size_t i = 0; i < sizeof q_data / sizeof *q_data; i++) q_data[i] = draw_float(), k_data[i] = draw_float();
  const etk_tensor q = tensor_of(q_data, HEADS, N), k = tensor_of(k_data, KV, M), same = tensor_of(k_data, HEADS, N);
  const etk_topp_desc topp = {.struct_size = sizeof topp, .p = 0.6f, .theta = -1.0f, .causal = 1, .sink_blocks = 1};
  exercise("topp", topp_size, topp_run, &topp, q, k);
  const etk_xattn_desc xattn = {.struct_size = sizeof xattn, .threshold = 0.7f, .causal = 1};
  exercise("xattn", xattn_size, xattn_run, &xattn, q, k);
  const etk_clusters_desc clusters = {.struct_size = sizeof clusters, .q_clusters = 9, .k_clusters = 20, .p = 0.7f};
  exercise("clusters", clusters_size, clusters_run, &clusters, q, k);
  const etk_paro_desc paro = {.struct_size = sizeof paro, .frames = 4, .height = 5, .width = 9, .text = 20, .mass = 0.7f};
  exercise("paro", paro_size, paro_run, &paro, q, same);
}

static void test_wild_values_are_noted(void) {
  etk_tensor q = tensor_of(q_data, HEADS, N), k = tensor_of(k_data, KV, M);
  q_data[5] = NAN, k_data[100] = INFINITY, k_data[200] = -3e38f;
  const etk_topp_desc topp = {.struct_size = sizeof topp, .p = 0.6f};
  etk_index_arrays a = arrays_of(0);
  etk_bsr out;
  uint64_t bytes;
  EXPECT(etk_bsr_from_topp_workspace(&topp, &q, &k, NULL, &bytes) == ETK_OK);
  void *raw = malloc(bytes + 64);
  EXPECT(etk_bsr_from_topp(&topp, &q, &k, &a, &out, aligned(raw), bytes, NULL) == ETK_NOTE_NONFINITE);
  EXPECT(etk_bsr_check(&out, B, HEADS, N, M) == ETK_OK);
  free(raw);
}

static void test_permutation_limits(void) {
  int32_t perm[8], inverse[8];
  EXPECT(etk_paro_permutation(5, 2, 1, 3, 1, perm, inverse) == ETK_OK && perm[2] == 4 && inverse[4] == 2);
  EXPECT(etk_paro_permutation(6, 2, 1, 3, 1, perm, inverse) == ETK_E_RANGE && etk_paro_permutation(-1, 2, 1, 3, 1, perm, inverse) == ETK_E_RANGE);
  EXPECT(etk_paro_permutation(0, INT64_MAX, 2, 2, 0, perm, inverse) == ETK_E_SHAPE && etk_paro_permutation(0, 1 << 24, 1 << 24, 1, 0, perm, NULL) == ETK_E_SHAPE);
  EXPECT(etk_paro_permutation(0, 1, 1, 1, 0, NULL, NULL) == ETK_E_NULL && etk_paro_permutation(0, 0, 1, 1, 0, NULL, NULL) == ETK_OK);
}

int main(void) {
  test_variants();
  test_builders();
  test_wild_values_are_noted();
  test_permutation_limits();
  if (failures == 0) printf("test_index_scores: ok\n");
  return failures != 0;
}
