/* Small fixed workloads for counting instructions: `work ITEM` runs one, `work` lists those that this CPU can run. An
 * item's counted part is counted_work(), which a profiler switches on and off by name. Not a test by itself. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attn_kernel.h"
#include "edgetok/gemm.h"
#include "ops_kernel.h"

enum { k_d = 64, k_pages = 4, k_item_bytes = 96 };

typedef struct job job;
typedef void step_fn(job *j);
struct job {
  step_fn *step;
  const etk_attn_kernel *attn;
  float *x;      /* [64][k_d] and more, small values */
  float *scales; /* [k_d] */
  int32_t *sums; /* [k_d] */
  int8_t *codes; /* [16][k_d] */
  void *k, *v;   /* pages */
  etk_strip strip;
  const etk_ops_kernel *ops;
  etk_rows rows;
  const etk_gemm_plan *plan;
  etk_gemm_io io;
  void *ws;
  uint64_t ws_bytes;
  etk_status status;
};

void counted_work(job *j);
__attribute__((noinline)) void counted_work(job *j) { j->step(j); }

static void *memory(size_t bytes) {
  void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) exit(1);
  memset(p, 0, (bytes + 63) / 64 * 64);
  return p;
}

static float next(uint32_t *state) {
  *state = *state * 1664525u + 1013904223u;
  return ((float)(*state >> 8) / 16777216.0f - 0.5f) * 4.0f;
}

static void do_quant_q(job *j) {
  int32_t start = 0, odd = 0;
  for (int i = 0; i < 64; i++) (void)j->attn->quant_q(j->x + i * k_d, k_d, k_d, j->codes, &start, &odd);
}
static void do_pack_k(job *j) {
  int32_t odd = 0;
  (void)j->attn->pack_k(j->x, k_d, 64, k_d, k_d, NULL, j->k, &odd);
}
static void do_pack_v(job *j) {
  int32_t odd = 0;
  j->attn->pack_v(j->x, k_d, 64, k_d, k_d, NULL, j->v, j->scales, j->sums, 0, &odd);
}
static void do_strip_s8(job *j) {
  for (int i = 0; i < k_pages; i++) j->attn->strip_s8(&j->strip);
}
static void do_strip_f32(job *j) {
  for (int i = 0; i < k_pages; i++) j->attn->strip_f32(&j->strip);
}

static const struct {
  const char *name;
  step_fn *step;
  int is_float;
} k_attn_steps[] = {{"quant_q", do_quant_q, 0},
                    {"pack_k", do_pack_k, 0},
                    {"pack_v", do_pack_v, 0},
                    {"strip_s8", do_strip_s8, 0},
                    {"strip_f32", do_strip_f32, 1}};

/* A full strip of mr rows over one page, packed by the kernel itself. */
static void prepare_attn(job *j, const etk_attn_kernel *kernel, int is_float) {
  const int32_t rows = kernel->mr;
  uint32_t state = 1;
  j->attn = kernel;
  j->x = memory(64 * k_d * sizeof *j->x);
  for (int i = 0; i < 64 * k_d; i++) j->x[i] = next(&state);
  j->scales = memory(k_d * sizeof *j->scales);
  j->sums = memory(k_d * sizeof *j->sums);
  j->codes = memory(ETK_MAX_MR * k_d);
  j->k = memory(64 * k_d * sizeof(float));
  j->v = memory(64 * k_d * sizeof(float));
  int32_t *start = memory(ETK_MAX_MR * sizeof *start), odd = 0;
  float *g = memory(ETK_MAX_MR * sizeof *g), *m = memory(ETK_MAX_MR * sizeof *m);
  for (int32_t i = 0; i < rows; i++) {
    g[i] = kernel->quant_q(j->x + i * k_d, k_d, k_d, j->codes + i * k_d, &start[i], &odd) * 0.003f;
    m[i] = -__builtin_inff();
  }
  if (is_float) {
    memcpy(j->k, j->x, 64 * k_d * sizeof *j->x);
    memcpy(j->v, j->x, 64 * k_d * sizeof *j->x);
  } else {
    (void)kernel->pack_k(j->x, k_d, 64, k_d, k_d, NULL, j->k, &odd);
    kernel->pack_v(j->x, k_d, 64, k_d, k_d, NULL, j->v, j->scales, j->sums, 0, &odd);
  }
  j->strip = (etk_strip){.rows = rows, .d_pad = k_d, .dv_pad = k_d, .q = j->codes, .q_start = start, .k = j->k, .g = g,
                         .qf = j->x, .v = j->v, .sv = j->scales, .v_colsum = j->sums,
                         .o = memory((size_t)(ETK_MAX_MR * k_d) * sizeof(float)), .m = m,
                         .l = memory(ETK_MAX_MR * sizeof(float))};
}

static int attn_items(const char *wanted) {
  const etk_attn_kernel *kernel;
  for (int32_t i = 0; (kernel = etk_attn_kernel_at(i)) != NULL; i++)
    for (size_t s = 0; s < sizeof k_attn_steps / sizeof *k_attn_steps; s++) {
      char name[k_item_bytes];
      snprintf(name, sizeof name, "%s/%s", kernel->name, k_attn_steps[s].name);
      if (!wanted) {
        puts(name);
      } else if (strcmp(wanted, name) == 0) {
        job j = {.step = k_attn_steps[s].step};
        prepare_attn(&j, kernel, k_attn_steps[s].is_float);
        counted_work(&j);
        return 1;
      }
    }
  return 0;
}

static void do_norm(job *j) { j->ops->norm(&j->rows); }
static void do_softmax(job *j) { j->ops->softmax(&j->rows); }

/* 16 rows of 384 columns, in and out apart. */
static int ops_items(const char *wanted) {
  static const char *const steps[] = {"layernorm", "rmsnorm", "softmax"};
  enum { rows = 16, cols = 384 };
  const etk_ops_kernel *kernel;
  for (int32_t i = 0; (kernel = etk_ops_kernel_at(i)) != NULL; i++)
    for (int s = 0; s < 3; s++) {
      char name[k_item_bytes];
      snprintf(name, sizeof name, "%s/%s", kernel->name, steps[s]);
      if (!wanted) puts(name);
      if (!wanted || strcmp(wanted, name) != 0) continue;
      job j = {.step = s == 2 ? do_softmax : do_norm, .ops = kernel};
      uint32_t state = 1;
      float *x = memory(rows * cols * sizeof *x), *y = memory(rows * cols * sizeof *y), *gamma = memory(cols * sizeof *gamma);
      for (int k = 0; k < rows * cols; k++) x[k] = next(&state);
      for (int k = 0; k < cols; k++) gamma[k] = next(&state);
      j.rows = (etk_rows){.rows = rows, .cols = cols};
      j.rows.at[0] = (char *)x;
      j.rows.step[0] = cols * (int64_t)sizeof *x;
      const int out = s == 2 ? 3 : 4;
      j.rows.at[out] = (char *)y;
      j.rows.step[out] = cols * (int64_t)sizeof *y;
      if (s < 2) j.rows.at[2] = (char *)gamma;
      j.rows.f[0] = s == 2 ? 1.0f : 1e-5f;
      j.rows.i[0] = s == 1;
      counted_work(&j);
      return 1;
    }
  return 0;
}

static void do_gemm(job *j) { j->status = etk_gemm_run(j->plan, &j->io, j->ws, j->ws_bytes, NULL); }

static etk_tensor matrix(float *data, int64_t rows, int64_t cols) {
  return (etk_tensor){.data = data, .dtype = ETK_F32, .rank = 2, .dim = {rows, cols}, .stride = {cols * 4, 4},
                      .capacity = (uint64_t)(rows * cols) * 4};
}

/* [8, 256] x [64, 256]^T and one row of it: INT8 by row, INT4 in groups of 128; the best kernel here and the scalar one. */
static int gemm_items(const char *wanted) {
  enum { n = 64, k = 256 };
  for (int cap = 0; cap < 2; cap++)
    for (int bits = 8; bits >= 4; bits -= 4)
      for (int m = 8; m >= 1; m -= 7) {
        const etk_gemm_weight weight = {.struct_size = sizeof weight, .n = n, .k = k, .bits = bits, .group = bits == 4 ? 128 : 0,
                                        .isa_cap = cap ? ETK_ISA_SCALAR : ETK_ISA_BEST};
        const etk_gemm_desc desc = {.struct_size = sizeof desc, .weight = weight, .max_m = m, .a_dtype = ETK_F32};
        etk_gemm_plan *plan = NULL;
        uint64_t bytes = 0, align = 64;
        job j = {.step = do_gemm};
        if (etk_gemm_plan_create(&desc, 1, &plan) < 0 || etk_gemm_workspace(plan, &j.ws_bytes, &align) < 0) exit(1);
        if (etk_gemm_packed_size(&weight, &bytes) < 0) exit(1);
        char name[k_item_bytes];
        snprintf(name, sizeof name, "%s/s%d_m%d%s", etk_gemm_plan_kernel(plan), bits, m, cap ? "_capped" : "");
        if (!wanted) puts(name);
        if (wanted && strcmp(wanted, name) == 0) {
          uint32_t state = 1;
          float *w = memory(n * k * sizeof *w), *x = memory(8 * k * sizeof *x), *y = memory(8 * n * sizeof *y);
          for (int i = 0; i < n * k; i++) w[i] = next(&state);
          for (int i = 0; i < 8 * k; i++) x[i] = next(&state);
          void *packed = memory(bytes);
          const etk_gemm_source source = {.struct_size = sizeof source, .format = ETK_W_FLOAT, .codes = matrix(w, n, k)};
          if (etk_gemm_pack(&weight, &source, packed, bytes, NULL) < 0) exit(1);
          j.plan = plan;
          j.ws = memory(j.ws_bytes + 64);
          j.io = (etk_gemm_io){.struct_size = sizeof j.io, .a = matrix(x, m, k), .w = packed, .w_bytes = bytes, .out = matrix(y, m, n)};
          counted_work(&j);
          if (j.status < 0) exit(1);
          return 1;
        }
        etk_gemm_plan_free(plan);
      }
  return 0;
}

int main(int argc, char **argv) {
  const char *wanted = argc > 1 ? argv[1] : NULL;
  const int found = attn_items(wanted) + ops_items(wanted) + gemm_items(wanted);
  return wanted && !found;
}
