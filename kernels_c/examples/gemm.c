/* A linear layer with INT4 weights from C: pack once, plan, run; weights may be written to a file and mapped. */
#include <edgetok/edgetok.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 5, OUTPUTS = 96, INPUTS = 256 };
static float x[ROWS * INPUTS], w[OUTPUTS * INPUTS], y[ROWS * OUTPUTS];

static etk_tensor matrix(float *data, int64_t rows, int64_t cols) {
  const int64_t item = sizeof *data;
  return (etk_tensor){.data = data, .dtype = ETK_F32, .rank = 2, .dim = {rows, cols}, .stride = {cols * item, item},
                      .capacity = (uint64_t)(rows * cols * item)};
}

static int fail(const char *what, etk_status status) {
  fprintf(stderr, "%s: %s\n", what, etk_strerror(status));
  return 1;
}

/* Cosine between the result and the product in double. */
static double cosine(void) {
  double xy = 0, xx = 0, yy = 0;
  for (int i = 0; i < ROWS; i++)
    for (int n = 0; n < OUTPUTS; n++) {
      double sum = 0;
      for (int c = 0; c < INPUTS; c++) sum += (double)x[i * INPUTS + c] * w[n * INPUTS + c];
      xy += sum * y[i * OUTPUTS + n];
      xx += sum * sum;
      yy += (double)y[i * OUTPUTS + n] * y[i * OUTPUTS + n];
    }
  return xy / sqrt(xx * yy);
}

int main(void) {
  uint32_t state = 1;
  for (int i = 0; i < OUTPUTS * INPUTS; i++) {
    state = state * 1664525u + 1013904223u;
    w[i] = (float)(state >> 8) / 8388608.0f - 1.0f;
    if (i < ROWS * INPUTS) x[i] = (float)((state >> 3) % 2001) / 1000.0f - 1.0f;
  }
  const etk_gemm_weight weight = {.struct_size = sizeof weight, .n = OUTPUTS, .k = INPUTS, .bits = 4, .group = 32};
  uint64_t packed_bytes = 0;
  etk_status status = etk_gemm_packed_size(&weight, &packed_bytes);
  if (status < 0) return fail("packed size", status);
  void *packed = aligned_alloc(64, (packed_bytes + 63) / 64 * 64);
  if (!packed) return fail("memory", ETK_E_MEMORY);
  const etk_gemm_source source = {.struct_size = sizeof source, .format = ETK_W_FLOAT, .codes = matrix(w, OUTPUTS, INPUTS)};
  status = etk_gemm_pack(&weight, &source, packed, packed_bytes, NULL);
  if (status < 0) return fail("pack", status);

  const etk_gemm_desc desc = {.struct_size = sizeof desc, .weight = weight, .max_m = ROWS, .a_dtype = ETK_F32,
                              .a_quant = ETK_A_ROW, .out_dtype = ETK_F32};
  etk_gemm_plan *plan = NULL;
  status = etk_gemm_plan_create(&desc, 1, &plan);
  if (status < 0) return fail("plan", status);
  uint64_t bytes = 0, align = 0;
  status = etk_gemm_workspace(plan, &bytes, &align);
  if (status < 0) return fail("workspace", status);
  void *workspace = aligned_alloc(align, (bytes + align - 1) / align * align);
  if (!workspace && bytes) return fail("memory", ETK_E_MEMORY);
  const etk_gemm_io io = {.struct_size = sizeof io, .a = matrix(x, ROWS, INPUTS), .w = packed, .w_bytes = packed_bytes,
                          .out = matrix(y, ROWS, OUTPUTS)};
  status = etk_gemm_run(plan, &io, workspace, bytes, NULL);
  printf("%s: %s\n", etk_gemm_plan_kernel(plan), etk_strerror(status));
  free(workspace);
  free(packed);
  etk_gemm_plan_free(plan);
  const double close = cosine();
  printf("%llu bytes for %d weights; cosine with double precision %.5f\n", (unsigned long long)packed_bytes,
         OUTPUTS * INPUTS, close);
  return status < 0 || !(close > 0.99);
}
