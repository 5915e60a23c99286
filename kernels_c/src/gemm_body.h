/* The parts of a matrix product kernel that are plain loops: quantizing rows and finishing outputs. Included by each kernel
 * file, whose compiler flags vectorize them; the operations and their order are the same on every instruction set, so the
 * results are the same bits. Internal. */
#ifndef ETK_GEMM_BODY_H
#define ETK_GEMM_BODY_H

#include <string.h>

#include "gemm_kernel.h"
#include "half.h"

#define FMA(a, b, c) __builtin_fmaf(a, b, c)

static inline int32_t gemm_bits(float x) {
  int32_t b;
  memcpy(&b, &x, 4);
  return b;
}
static inline float gemm_float(int32_t b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}
/* Nearest, ties to even, for |x| < 2^22. */
static inline float gemm_round(float x) { return (x + 12582912.0f) - 12582912.0f; }

static int32_t body_range(const float *restrict x, int64_t n, float *lo, float *hi) {
  int32_t least = 0, most = 0, bad = 0; /* floats as integers of the same order: negative ones with flipped magnitude bits */
  for (int64_t i = 0; i < n; i++) {
    const int32_t b = gemm_bits(x[i]), flip = b ^ ((b >> 31) & 0x7fffffff);
    const int32_t finite = (b & 0x7fffffff) < 0x7f800000, order = finite ? flip : 0;
    bad |= !finite;
    least = order < least ? order : least;
    most = order > most ? order : most;
  }
  *lo = gemm_float(least ^ ((least >> 31) & 0x7fffffff));
  *hi = gemm_float(most);
  return bad;
}

static void body_quantize(const float *restrict x, int64_t n, const etk_gemm_quant *quant, float top, int8_t *restrict codes) {
  const float inv = 1.0f / quant->scale;
  const int32_t zero = quant->zero, u8 = quant->code == ETK_U8;
  const int32_t lo = u8 ? 0 : -127, hi = u8 ? 255 : 127, shift = u8 ? 128 : 0;
  for (int64_t i = 0; i < n; i++) {
    const int32_t b = gemm_bits(x[i]), magnitude = b & 0x7fffffff;
    const float edge = b < 0 ? -top : top;
    const float value = magnitude < 0x7f800000 ? x[i] : magnitude > 0x7f800000 ? 0.0f : edge;
    float t = value * inv;
    t = t < -512.0f ? -512.0f : t;
    t = t > 512.0f ? 512.0f : t;
    int32_t code = (int32_t)gemm_round(t) + zero;
    code = code < lo ? lo : code;
    code = code > hi ? hi : code;
    codes[i] = (int8_t)(code - shift);
  }
}

static int32_t body_sum(const int8_t *restrict codes, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; i++) sum += codes[i];
  return sum;
}

/* e^x for x <= 88 (below -86: that of -86), relative error under 2e-7. */
static inline float gemm_exp(float x) {
  x = x < -86.0f ? -86.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = gemm_round(x * 1.44269504f);
  const float f = FMA(n, 2.12194440e-4f, FMA(n, -0.693359375f, x));
  float p = FMA(f, 1.98412698e-4f, 1.38888889e-3f);
  p = FMA(p, f, 8.33333333e-3f);
  p = FMA(p, f, 4.16666667e-2f);
  p = FMA(p, f, 1.66666667e-1f);
  p = FMA(p, f, 0.5f);
  p = FMA(p, f, 1.0f);
  p = FMA(p, f, 1.0f);
  return gemm_float(gemm_bits(p) + (int32_t)((uint32_t)(int32_t)n << 23));
}

static inline float gemm_silu(float x) {
  const float low = x < -80.0f ? -80.0f : x; /* x / (1 + e^-x) would be -inf / finite at -inf */
  return low / (1.0f + gemm_exp(-low));
}

static inline float gemm_gelu_tanh(float x) {
  const float c = x < -20.0f ? -20.0f : x > 20.0f ? 20.0f : x;
  const float inner = c * FMA(c * c, 0.0713548163f, 1.59576912f); /* 2 sqrt(2/pi) (c + 0.044715 c^3) */
  const float kept = x < -20.0f ? -20.0f : x;
  return kept / (1.0f + gemm_exp(-inner));
}

/* erfc(z) = poly(1 / (1 + p z)) e^(-z z), Abramowitz and Stegun 7.1.26, |error| <= 1.5e-7. */
static inline float gemm_gelu_erf(float x) {
  const float c = x < -20.0f ? -20.0f : x > 20.0f ? 20.0f : x;
  const float z = (c < 0.0f ? -c : c) * 0.707106781f;
  const float t = 1.0f / FMA(0.3275911f, z, 1.0f);
  float p = FMA(t, 1.061405429f, -1.453152027f);
  p = FMA(p, t, 1.421413741f);
  p = FMA(p, t, -0.284496736f);
  p = FMA(p, t, 0.254829592f);
  const float half = 0.5f * c * (p * t * gemm_exp(-z * z));
  return x > 0.0f ? x - half : half + (x != x ? x : 0.0f);
}

static inline void body_scales(const uint8_t *at, int32_t n, int32_t f16, float *restrict out) {
  if (!f16) {
    memcpy(out, at, (size_t)n * 4);
    return;
  }
  uint16_t h[ETK_GEMM_MAX_NR];
  memcpy(h, at, (size_t)n * 2);
  for (int32_t i = 0; i < n; i++) out[i] = etk_f16_to_f32(h[i]);
}

/* acc of one row of one half, the corrections taken off, times sa, out_scale, plus bias. */
static inline void body_linear(const etk_gemm_finish *f, int32_t half, int32_t r, float *restrict v) {
  const int32_t nr = f->nr;
  const float sa = f->sa ? f->sa[r] : 1.0f;
  const int32_t za = f->za ? f->za[r] : 0;
  float scales[ETK_GEMM_MAX_NR];
  if (f->one) {
    const int32_t *restrict s = f->ci[half] + r * nr;
    const int32_t *restrict sums = f->sums[half];
    const uint32_t exact = f->wb[half] ? 0 : (uint32_t)za;
    body_scales(f->ws[half], nr, f->f16, scales);
    for (int32_t j = 0; j < nr; j++) v[j] = FMA(scales[j], (float)(int32_t)((uint32_t)s[j] - exact * (uint32_t)sums[j]), 0.0f);
    if (f->wb[half]) {
      body_scales(f->wb[half], nr, f->f16, scales);
      for (int32_t j = 0; j < nr; j++) v[j] = FMA(scales[j], f->rsum[r], v[j]);
    }
  } else {
    memcpy(v, f->c[half] + r * nr, (size_t)nr * 4);
  }
  if (za != 0 && !(f->one && !f->wb[half])) {
    const float *restrict sums = f->sums[half];
    const float minus = -(float)za;
    for (int32_t j = 0; j < nr; j++) v[j] = FMA(minus, sums[j], v[j]);
  }
  const float *restrict scale = f->out_scale[half], *restrict bias = f->bias[half];
  for (int32_t j = 0; j < nr; j++) v[j] *= sa;
  for (int32_t j = 0; scale && j < f->cols; j++) v[j] *= scale[j];
  for (int32_t j = 0; bias && j < f->cols; j++) v[j] += bias[j];
}

static void body_finish(const etk_gemm_finish *f) {
  float v[ETK_GEMM_MAX_NR], up[ETK_GEMM_MAX_NR];
  for (int32_t r = 0; r < f->rows; r++) {
    if (f->out_i32) {
      int32_t *out = (int32_t *)f->out + r * f->out_stride;
      const uint32_t za = f->za ? (uint32_t)f->za[r] : 0;
      const int32_t *sums = f->sums[0], *s = f->ci[0] + r * f->nr;
      if (za == 0) memcpy(out, s, (size_t)f->cols * 4);
      else for (int32_t j = 0; j < f->cols; j++) out[j] = (int32_t)((uint32_t)s[j] - za * (uint32_t)sums[j]);
      continue;
    }
    body_linear(f, 0, r, v);
    switch (f->act) {
      case ETK_ACT_GELU_ERF: for (int32_t j = 0; j < f->nr; j++) v[j] = gemm_gelu_erf(v[j]); break;
      case ETK_ACT_GELU_TANH: for (int32_t j = 0; j < f->nr; j++) v[j] = gemm_gelu_tanh(v[j]); break;
      case ETK_ACT_SILU: for (int32_t j = 0; j < f->nr; j++) v[j] = gemm_silu(v[j]); break;
      default: break;
    }
    if (f->gated) {
      body_linear(f, 1, r, up);
      for (int32_t j = 0; j < f->nr; j++) v[j] *= up[j];
    }
    float *out = (float *)f->out + r * f->out_stride;
    if (f->residual) {
      const float *add = f->residual + r * f->residual_stride;
      for (int32_t j = 0; j < f->cols; j++) v[j] += add[j];
    }
    memcpy(out, v, (size_t)f->cols * 4);
  }
}

#endif
