/* INT8 attention from C: describe, plan, run with a thread pool, compare with the sums written out in double. */
#include <edgetok/edgetok.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 2, TOKENS = 200, WIDTH = 64, COUNT = HEADS * TOKENS * WIDTH };
static float q[COUNT], k[COUNT], v[COUNT], o[COUNT];

/* A dense [1, HEADS, TOKENS, WIDTH] view: the library is told how many bytes it may touch. */
static etk_tensor view(float *data) {
  const int64_t item = sizeof *data;
  return (etk_tensor){.data = data, .dtype = ETK_F32, .rank = 4, .dim = {1, HEADS, TOKENS, WIDTH},
                      .stride = {COUNT * item, TOKENS * WIDTH * item, WIDTH * item, item}, .capacity = COUNT * sizeof *data};
}

static double worst_error(void) {
  double worst = 0;
  for (int h = 0; h < HEADS; h++)
    for (int i = 0; i < TOKENS; i += 37) {
      double sum = 0, out[WIDTH] = {0};
      for (int j = 0; j <= i; j++) { /* causal */
        double s = 0;
        for (int c = 0; c < WIDTH; c++) s += (double)q[(h * TOKENS + i) * WIDTH + c] * k[(h * TOKENS + j) * WIDTH + c];
        const double p = exp(s / sqrt(WIDTH));
        sum += p;
        for (int c = 0; c < WIDTH; c++) out[c] += p * v[(h * TOKENS + j) * WIDTH + c];
      }
      for (int c = 0; c < WIDTH; c++) worst = fmax(worst, fabs(out[c] / sum - o[(h * TOKENS + i) * WIDTH + c]));
    }
  return worst;
}

static int fail(const char *what, etk_status status) {
  fprintf(stderr, "%s: %s\n", what, etk_strerror(status));
  return 1;
}

int main(void) {
  uint32_t state = 1;
  float *const inputs[] = {q, k, v};
  for (int t = 0; t < 3; t++)
    for (int i = 0; i < COUNT; i++) {
      state = state * 1664525u + 1013904223u;
      inputs[t][i] = (float)(state >> 8) / 8388608.0f - 1.0f;
    }
  const etk_attn_desc desc = {.struct_size = sizeof desc, .batch = 1, .hq = HEADS, .hkv = HEADS, .d = WIDTH, .dv = WIDTH,
                              .max_n = TOKENS, .max_m = TOKENS, .compute = ETK_C_S8S8, .mask_kind = ETK_MASK_CAUSAL};
  const etk_attn_io io = {.struct_size = sizeof io, .q = view(q), .k = view(k), .v = view(v), .o = view(o)};
  etk_attn_plan *plan = NULL;
  etk_status status = etk_attn_plan_create(&desc, &io, 2, &plan);
  if (status < 0) return fail("plan", status);
  uint64_t bytes = 0, align = 0;
  status = etk_attn_workspace(plan, &bytes, &align);
  if (status < 0) return fail("workspace", status);
  void *workspace = aligned_alloc(align, (bytes + align - 1) / align * align);
  const etk_pool *pool = NULL;
  status = etk_pool_create(2, 0, &pool);
  if (status < 0 || !workspace) return fail("pool or memory", status);
  status = etk_attn_run(plan, &io, workspace, bytes, pool);
  printf("%s: %s\n", etk_attn_plan_kernel(plan), etk_strerror(status));
  etk_pool_free(pool);
  free(workspace);
  etk_attn_plan_free(plan);
  const double error = worst_error();
  printf("largest difference from double precision: %.4f\n", error);
  return status < 0 || !(error < 0.03); /* values in [-1, 1], 8-bit steps of the codes and of the probabilities */
}
