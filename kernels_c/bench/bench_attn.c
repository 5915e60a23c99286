/* Time of one strip over one page, hot in L1/L2, for every attention kernel that runs here: the whole strip and its parts.
 *
 *   bench_attn [d ...]      default 64 128
 *
 * Prints ns per strip (best of many short runs: the machine may be shared), GOP/s (a multiply-add is two operations) and
 * the share of the processor's peak, which is measured first with the same instructions and no memory. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "attn_kernel.h"

enum { PAGES = 8, ROUNDS = 400, ROWS = 64 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static uint32_t g_seed = 7;
static uint32_t rnd(void) { return g_seed = g_seed * 1664525u + 1013904223u; }
static void *block(size_t bytes) {
  void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) exit(2);
  memset(p, 0, (bytes + 63) / 64 * 64);
  return p;
}

typedef struct work {
  const etk_attn_kernel *k;
  etk_strip s[PAGES];
  int32_t out[ROWS * 64];
  uint8_t p[ROWS * 64];
  float y[ROWS * 64], pf[ROWS * 64], w[ROWS];
} work;

typedef void (*phase)(work *w, int t);
static void strip_s8(work *w, int t) { w->k->strip_s8(&w->s[t]); }
static void block_s8(work *w, int t) { w->k->block_s8(&w->s[t]); }
static void block_f32(work *w, int t) { w->k->block_f32(&w->s[t]); }
static void qk_s8(work *w, int t) { w->k->qk_s8(&w->s[t], w->out); }
static void pv_s8(work *w, int t) { w->k->pv_s8(&w->s[t], w->p, w->w); }
static void strip_f32(work *w, int t) { w->k->strip_f32(&w->s[t]); }
static void qk_f32(work *w, int t) { w->k->qk_f32(&w->s[t], w->y); }
static void pv_f32(work *w, int t) { w->k->pv_f32(&w->s[t], w->pf); }

static double best(work *w, phase run) {
  double least = 1e30;
  for (int r = 0; r < ROUNDS; r++) {
    const double t = now();
    for (int i = 0; i < 8 * PAGES; i++) run(w, i % PAGES);
    const double took = (now() - t) / (8 * PAGES);
    least = took < least ? took : least;
  }
  return least;
}

static void set_up(work *w, const etk_attn_kernel *k, int d, int as_float) {
  const size_t dp = (size_t)(d + 15) / 16 * 16, page = dp * 64 * (as_float ? 4 : 1);
  int8_t *codes = block(dp * 64), *q = block(dp * ROWS);
  int32_t *start = block(ROWS * 4), *colsum = block(dp * 4);
  float *g = block(ROWS * 4), *qf = block(dp * ROWS * 4), *sv = block(dp * 4);
  float *o = block(dp * ROWS * 4), *m = block(ROWS * 4), *l = block(ROWS * 4);
  for (size_t i = 0; i < dp * ROWS; i++) q[i] = (int8_t)(rnd() >> 24 | 1), qf[i] = (float)q[i] * 0.002f;
  for (int i = 0; i < ROWS; i++) {
    g[i] = 0.0001f, m[i] = 40.0f, w->w[i] = 0.5f;
    for (size_t c = 0; c < dp; c++) start[i] -= k->layout == 1 ? 128 * q[i * (int)dp + (int)c] : 0;
  }
  for (size_t c = 0; c < dp; c++) sv[c] = 0.01f;
  for (int t = 0; t < PAGES; t++) {
    void *kp = block(page), *vp = block(page);
    for (size_t i = 0; i < dp * 64; i++) codes[i] = (int8_t)((int)(rnd() >> 24) % 127);
    if (as_float)
      for (size_t i = 0; i < dp * 64; i++) ((float *)kp)[i] = ((float *)vp)[i] = (float)codes[i] * 0.01f;
    else
      k->lay_k(codes, (int32_t)dp, kp), k->lay_v(codes, (int32_t)dp, vp);
    w->s[t] = (etk_strip){.rows = k->mr, .d_pad = (int32_t)dp, .dv_pad = (int32_t)dp, .q = q, .q_start = start, .k = kp, .g = g,
                          .qf = qf, .v = vp, .sv = sv, .v_colsum = colsum, .o = o, .m = m, .l = l};
  }
  w->k = k;
  memset(w->p, 7, sizeof w->p);
}

#if defined(__x86_64__)
#define SIX(x) x "\n" x "\n" x "\n" x "\n" x "\n" x "\n"
__attribute__((target("avx512f,avx512vnni"))) static double peak_int8(void) {
  double least = 1e30;
  for (int r = 0; r < 200; r++) {
    const double t = now();
    for (int i = 0; i < 2000; i++)
      __asm__ volatile(
          "vpdpbusd %%zmm0,%%zmm1,%%zmm8\nvpdpbusd %%zmm0,%%zmm1,%%zmm9\nvpdpbusd %%zmm0,%%zmm1,%%zmm10\n"
          "vpdpbusd %%zmm0,%%zmm1,%%zmm11\nvpdpbusd %%zmm0,%%zmm1,%%zmm12\nvpdpbusd %%zmm0,%%zmm1,%%zmm13\n"
          "vpdpbusd %%zmm0,%%zmm1,%%zmm14\nvpdpbusd %%zmm0,%%zmm1,%%zmm15\nvpdpbusd %%zmm0,%%zmm1,%%zmm16\n"
          "vpdpbusd %%zmm0,%%zmm1,%%zmm17\nvpdpbusd %%zmm0,%%zmm1,%%zmm18\nvpdpbusd %%zmm0,%%zmm1,%%zmm19" ::
              : "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19");
    const double took = now() - t;
    least = took < least ? took : least;
  }
  return 2000.0 * 12 * 128 / least;
}
#else
static double peak_int8(void) { return 0; }
#endif

int main(int argc, char **argv) {
  etk_caps caps = {.struct_size = sizeof caps};
  if (etk_get_caps(&caps) != ETK_OK) return 1;
  const double peak = caps.cpu & ETK_CPU_AVX512VNNI ? peak_int8() : 0;
  printf("peak of one core: %.0f GOP/s int8 (512-bit vpdpbusd), %.0f GFLOP/s fp32\n", peak, peak / 4);
  printf("%-28s %4s %5s  %9s %8s %6s   %9s %9s\n", "kernel", "d", "rows", "strip ns", "GOP/s", "peak", "QK ns", "PV ns");
  static const int usual[] = {64, 128};
  for (int a = 0; a < (argc > 1 ? argc - 1 : 2); a++) {
    const int d = argc > 1 ? atoi(argv[a + 1]) : usual[a];
    if (d < 1 || d > 1024) return 2;
    for (int i = 0; etk_attn_kernel_at(i); i++) {
      const etk_attn_kernel *k = etk_attn_kernel_at(i);
      static work w;
      for (int as_float = 0; as_float < 2; as_float++) {
        set_up(&w, k, d, as_float);
        const double strip = best(&w, as_float ? strip_f32 : strip_s8);
        const double ops = 4.0 * k->mr * 64 * d, top = as_float ? peak / 4 : peak;
        printf("%-28s %4d %5d  %9.1f %8.0f %5.0f%%   %9.1f %9.1f %s\n", k->name, d, k->mr, strip, ops / strip,
               top > 0 ? 100 * ops / strip / top : 0, best(&w, as_float ? qk_f32 : qk_s8), best(&w, as_float ? pv_f32 : pv_s8),
               as_float ? "fp32" : "int8");
        if (!(as_float ? k->block_f32 : k->block_s8)) continue;
        for (int t = 0; t < PAGES; t++) w.s[t].rows = ROWS;
        const double whole = best(&w, as_float ? block_f32 : block_s8), all = 4.0 * ROWS * 64 * d;
        printf("%-28s %4d %5d  %9.1f %8.0f %5.0f%%   a block of rows in one call, %s\n", k->name, d, ROWS, whole, all / whole,
               top > 0 ? 100 * all / whole / top : 0, as_float ? "fp32" : "int8");
      }
    }
  }
  return 0;
}
