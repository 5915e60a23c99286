/* Largest errors of the element-wise functions over floats, against double libm. Not a test by itself: prints one line per
 * function, which tests/kernels/test_ops_sweep.py holds against the bounds in edgetok/ops.h. Argument: step between bit
 * patterns where the functions are not trivial (magnitudes 2^-26 .. 2^7); elsewhere it is 997 times as wide. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ops_kernel.h"

static double law_exp(double x) { return exp(x); }
static double law_silu(double x) { return x / (1 + exp(-x)); }
static double law_erf(double x) { return x * 0.5 * erfc(-x / sqrt(2)); }
static double law_tanh(double x) { return x / (1 + exp(-2 * sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x))); }

enum { BATCH = 4096 };
typedef struct worst {
  double error;
  float at;
} worst;

static void check(etk_rows_fn fn, int32_t flag, double (*law)(double), int relative, const float *x, int64_t n, worst *w) {
  static float y[BATCH];
  etk_rows a = {.rows = 1, .cols = n, .i = {flag, 0}};
  a.at[0] = (char *)(uintptr_t)x, a.at[1] = (char *)(void *)y;
  fn(&a);
  for (int64_t i = 0; i < n; i++) {
    const double v = (double)x[i], want = law(v);
    double scale = relative ? want * (3 + fabs(v)) : fmax(1, fabs(v));
    if (relative && v < -86.5) scale = 1; /* flushed to zero */
    const double error = fabs((double)y[i] - want) / scale;
    if (!(error <= w->error)) w->error = error, w->at = x[i];
  }
}

int main(int argc, char **argv) {
  const uint32_t step = argc > 1 ? (uint32_t)atoi(argv[1]) : 1009;
  const etk_ops_kernel *k = etk_ops_kernel_at(0);
  const struct {
    const char *name;
    etk_rows_fn fn;
    int32_t flag;
    double (*law)(double);
    int relative; /* only x <= 0 */
  } ops[] = {{"exp", k->exp, 0, law_exp, 1}, {"silu", k->silu, 0, law_silu, 0}, {"gelu", k->gelu, 0, law_erf, 0},
             {"gelu_tanh", k->gelu, 1, law_tanh, 0}};
  for (size_t o = 0; o < sizeof ops / sizeof *ops && step > 0; o++) {
    worst w = {0, 0};
    static float x[BATCH];
    int64_t n = 0;
    for (uint32_t sign = ops[o].relative; sign < 2; sign++)
      for (uint64_t u = 0; u <= 0x7f7fffff;) { /* every finite magnitude */
        const uint32_t bits = (uint32_t)u | sign << 31;
        memcpy(x + n++, &bits, 4);
        u += u >= 0x32800000u && u < 0x43000000u ? step : (uint64_t)step * 997;
        if (n == BATCH || u > 0x7f7fffff) check(ops[o].fn, ops[o].flag, ops[o].law, ops[o].relative, x, n, &w), n = 0;
      }
    printf("%s %.4g %.9g\n", ops[o].name, w.error, (double)w.at);
  }
  return 0;
}
