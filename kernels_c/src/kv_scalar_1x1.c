/* KV cache helpers in plain C: the law that the other variants follow bit for bit.
 *
 *   f16:     h = f16(x) nearest even;  y = f32(h), exact
 *   expand4: dst[128 i + j] = (src[64 i + j] & 15) + bias, dst[128 i + 64 + j] = (src[64 i + j] >> 4) + bias
 *   fold:    x = q s;  code = rint(x (1 / (max|x| / 127)));  dot = sum q (z + 8 s)
 * Written without branches over plain arrays, so that a compiler may use whatever vectors the baseline has. */
#include <math.h>
#include <string.h>

#include "kv_kernel.h"

static inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
static inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

/* Exact. Subnormals go through an addition of normal numbers, so that a caller's denormals-are-zero mode does no harm. */
static inline float widen(uint16_t h) {
  uint32_t magnitude = h & 0x7fffu, sign = (uint32_t)(h & 0x8000u) << 16;
  uint32_t normal = (magnitude << 13) + (112u << 23);
  float small = float_of((113u << 23) | (magnitude << 13)) - float_of(113u << 23);
  uint32_t value = magnitude < 0x0400u ? bits_of(small) : normal;
  return float_of(value | sign);
}

/* x finite and |x| <= 65504. Below 2^-14 the unit is 2^-24 and adding 0.5 rounds to it. */
static inline uint16_t narrow(float x) {
  uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, m = u & 0x7fffffffu;
  uint32_t small = bits_of(float_of(m) + 0.5f) - bits_of(0.5f);
  uint32_t normal = (m - (112u << 23) + 0xfffu + ((m >> 13) & 1u)) >> 13;
  return (uint16_t)(sign | (m < (113u << 23) ? small : normal));
}

static int32_t round_f16(const float *x, int64_t n, uint16_t *h, float *y) {
  int32_t bad = 0;
  for (int64_t i = 0; i < n; i++) {
    float v = x[i];
    int32_t out = !(fabsf(v) <= 65504.0f);
    bad |= out;
    v = v > 65504.0f ? 65504.0f : v < -65504.0f ? -65504.0f : v;
    v = v != v ? 0.0f : v;
    uint16_t code = narrow(v);
    if (h) h[i] = code;
    if (y) y[i] = widen(code);
  }
  return bad;
}

static void widen_f16(const uint16_t *h, int64_t n, float *y) {
  for (int64_t i = 0; i < n; i++) y[i] = widen(h[i]);
}

static void expand4(const uint8_t *src, int64_t bytes, int32_t bias, uint8_t *dst) {
  uint8_t b = (uint8_t)bias;
  for (int64_t i = 0; i < bytes; i += 64, src += 64, dst += 128) {
    for (int j = 0; j < 64; j++) {
      dst[j] = (uint8_t)((src[j] & 15) + b);
      dst[64 + j] = (uint8_t)((src[j] >> 4) + b);
    }
  }
}

static float fold_q4(const float *q, const uint16_t *s, const uint16_t *z, int32_t d_pad, int32_t u8_layout, int8_t *codes,
                     int32_t *start, float *dot) {
  float sums[16] = {0}, top = 0.0f;
  for (int32_t c = 0; c < d_pad; c += 16) {
    for (int i = 0; i < 16; i++) {
      float sc = widen(s[c + i]), x = fabsf(q[c + i] * sc);
      top = x > top ? x : top;
      sums[i] = sums[i] + q[c + i] * (widen(z[c + i]) + 8.0f * sc);
    }
  }
  for (int width = 8; width; width >>= 1)
    for (int i = 0; i < width; i++) sums[i] = sums[i] + sums[i + width];
  *dot = sums[0];
  int zero = !(top > 1e-30f);
  float scale = zero ? 1.0f : top / 127.0f, inverse = zero ? 0.0f : 1.0f / scale;
  int32_t total = 0;
  for (int32_t c = 0; c < d_pad; c++) {
    float x = q[c] * widen(s[c]) * inverse;
    int32_t code = (int32_t)((x + 12582912.0f) - 12582912.0f); /* |x| <= 127: rounds to the nearest even integer */
    codes[c] = (int8_t)code;
    total += code;
  }
  *start = u8_layout ? -128 * total : 0;
  return scale;
}

const etk_kv_kernel etk_kv_scalar_1x1 = {
    .name = "kv_scalar_1x1",
    .isa = ETK_ISA_SCALAR,
    .round_f16 = round_f16,
    .widen_f16 = widen_f16,
    .expand4 = expand4,
    .fold_q4 = fold_q4,
};
