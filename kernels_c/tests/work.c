/* Small fixed workloads for counting instructions: `work ITEM` runs one, `work` lists those that this CPU can run. An
 * item's counted part is counted_work(), which a profiler switches on and off by name. Not a test by itself. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attn_kernel.h"

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

int main(int argc, char **argv) {
  const char *wanted = argc > 1 ? argv[1] : NULL;
  const int found = attn_items(wanted);
  return wanted && !found;
}
