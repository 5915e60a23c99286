/* Pages and tail pages of a KV cache: quantize, lay out, read back.
 *
 *   INT8 page:  code = clamp(rint(x (1/s)), -127, 127), s = max|x| / 127
 *   INT4 K:     s = f16((max - min) / 15), z = f16(min), code = clamp(rint((x - z) (1/s)), 0, 15), per channel
 *   INT4 V:     s = f16(max|x| / 7), code = clamp(rint(x (1/s)), -7, 7), per channel
 * A scale that rounds to zero is 1 and its codes are 0. Plain C throughout: the same bytes on every ISA. */
#include "kv_cache.h"

#include <math.h>
#include <string.h>

/* Nearest even; |x| <= 2^22 here, since callers clamp. */
static inline int32_t rint_even(float x) { return (int32_t)((x + 12582912.0f) - 12582912.0f); }

static inline float clampf(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }

/* The f16 nearest to a scale, as float; not above the largest f16. */
static float scale_f16(const etk_kv_cache *c, float s, uint16_t *h) {
  float y;
  (void)kv_kern(c)->round_f16(&s, 1, h, &y);
  if (y > 0.0f) return y;
  s = 1.0f;
  (void)kv_kern(c)->round_f16(&s, 1, h, NULL);
  return 0.0f;
}

void kv_rotate(float *x, int32_t d) {
  int32_t block = d & -d;
  float norm = 1.0f / sqrtf((float)block);
  for (int32_t at = 0; at < d; at += block) {
    float *y = x + at;
    for (int32_t half = 1; half < block; half *= 2)
      for (int32_t i = 0; i < block; i += 2 * half)
        for (int32_t j = i; j < i + half; j++) {
          float a = y[j], b = y[j + half];
          y[j] = a + b;
          y[j + half] = a - b;
        }
    for (int32_t i = 0; i < block; i++) y[i] *= norm;
  }
}

/* Pair 64-byte chunks of codes into bytes, in place order; the inverse of expand4 with bias 0. */
static void pack4(const int8_t *laid, int64_t bytes, uint8_t *dst) {
  for (int64_t i = 0; i < bytes; i += 128, laid += 128, dst += 64)
    for (int j = 0; j < 64; j++) dst[j] = (uint8_t)((laid[j] & 15) | (laid[64 + j] & 15) << 4);
}

/* Rows outside, channels inside: the inner loops are vectors in any baseline. */
static void quantize_k4(const etk_kv_cache *c, const float *kx, int8_t *codes, uint16_t *scale, uint16_t *zero) {
  int32_t d = c->desc.d, pad = c->d_pad;
  float lo[1024], hi[1024], inverse[1024];
  memcpy(lo, kx, (size_t)d * 4);
  memcpy(hi, kx, (size_t)d * 4);
  for (int32_t j = 1; j < KV_SLOTS; j++) {
    const float *x = kx + (int64_t)j * pad;
    for (int32_t ch = 0; ch < d; ch++) {
      lo[ch] = x[ch] < lo[ch] ? x[ch] : lo[ch];
      hi[ch] = x[ch] > hi[ch] ? x[ch] : hi[ch];
    }
  }
  for (int32_t ch = 0; ch < d; ch++) {
    float s = scale_f16(c, (hi[ch] - lo[ch]) / 15.0f, &scale[ch]);
    inverse[ch] = s > 0.0f ? 1.0f / s : 0.0f;
  }
  (void)kv_kern(c)->round_f16(lo, d, zero, lo);
  for (int32_t j = 0; j < KV_SLOTS; j++) {
    const float *x = kx + (int64_t)j * pad;
    int8_t *code = codes + (int64_t)j * pad;
    for (int32_t ch = 0; ch < d; ch++) code[ch] = (int8_t)rint_even(clampf((x[ch] - lo[ch]) * inverse[ch], 0.0f, 15.0f));
    memset(code + d, 0, (size_t)(pad - d));
  }
  memset(scale + d, 0, (size_t)(pad - d) * 2); /* padding adds nothing to any product */
  memset(zero + d, 0, (size_t)(pad - d) * 2);
}

static void quantize_v4(const etk_kv_cache *c, const float *vx, int8_t *codes, uint16_t *scale) {
  int32_t dv = c->desc.dv, pad = c->dv_pad;
  float top[1024] = {0}, inverse[1024];
  for (int32_t j = 0; j < KV_SLOTS; j++) {
    const float *x = vx + (int64_t)j * pad;
    for (int32_t ch = 0; ch < dv; ch++) top[ch] = fabsf(x[ch]) > top[ch] ? fabsf(x[ch]) : top[ch];
  }
  for (int32_t ch = 0; ch < pad; ch++) {
    float s = scale_f16(c, top[ch] / 7.0f, &scale[ch]);
    inverse[ch] = s > 0.0f ? 1.0f / s : 0.0f;
  }
  for (int32_t j = 0; j < KV_SLOTS; j++) {
    const float *x = vx + (int64_t)j * pad;
    int8_t *code = codes + (int64_t)j * pad;
    for (int32_t ch = 0; ch < dv; ch++) code[ch] = (int8_t)rint_even(clampf(x[ch] * inverse[ch], -7.0f, 7.0f));
    memset(code + dv, 0, (size_t)(pad - dv));
  }
}

static void quantize_k8_per_token(const etk_kv_cache *c, const float *kx, int8_t *codes, uint16_t *scale) {
  int32_t d = c->desc.d, pad = c->d_pad;
  for (int32_t j = 0; j < KV_SLOTS; j++) {
    const float *x = kx + (int64_t)j * pad;
    float top = 0.0f;
    for (int32_t ch = 0; ch < d; ch++) top = fabsf(x[ch]) > top ? fabsf(x[ch]) : top;
    float s = scale_f16(c, top / 127.0f, &scale[j]), inverse = s > 0.0f ? 1.0f / s : 0.0f;
    for (int32_t ch = 0; ch < pad; ch++)
      codes[(int64_t)j * pad + ch] = (int8_t)(ch < d ? rint_even(clampf(x[ch] * inverse, -127.0f, 127.0f)) : 0);
  }
}

/* Sums of the V codes of a page over its 64 keys, for layouts that need them. */
static void write_colsum(const etk_kv_cache *c, const int8_t *v, int32_t *colsum) {
  for (int32_t ch = 0; ch < c->dv_pad; ch++) colsum[ch] = 0;
  for (int32_t j = 0; j < KV_SLOTS; j++)
    for (int32_t ch = 0; ch < c->dv_pad; ch++) colsum[ch] += v[(int64_t)j * c->dv_pad + ch];
}

void kv_page_from_codes(const etk_kv_cache *c, uint8_t *page, const int8_t *k, const int8_t *v, int8_t *laid) {
  const etk_attn_kernel *a = kv_attn(c);
  kv_geometry g = kv_page_geometry(c);
  if (a->needs_colsum) write_colsum(c, v, (int32_t *)(void *)(page + g.colsum));
  if (c->desc.bits == 8) {
    a->lay_k(k, c->d_pad, page + g.k);
    a->lay_v(v, c->dv_pad, page + g.v);
    return;
  }
  a->lay_k(k, c->d_pad, laid); /* u8 layouts add 128, which leaves the low nibble as it is */
  pack4(laid, (int64_t)c->d_pad * KV_SLOTS, page + g.k);
  a->lay_v(v, c->dv_pad, laid);
  for (int64_t i = 0; i < (int64_t)c->dv_pad * KV_SLOTS; i++) laid[i] = (int8_t)(laid[i] + 8);
  pack4(laid, (int64_t)c->dv_pad * KV_SLOTS, page + g.v);
}

void kv_page_codes(const etk_kv_cache *c, const uint8_t *page, int8_t *k, int8_t *v, int8_t *laid) {
  const etk_attn_kernel *a = kv_attn(c);
  kv_geometry g = kv_page_geometry(c);
  if (c->desc.bits == 8) {
    a->read_k(page + g.k, c->d_pad, k);
    a->read_v(page + g.v, c->dv_pad, v);
    return;
  }
  kv_kern(c)->expand4(page + g.k, (int64_t)c->d_pad * 32, c->k_bias, (uint8_t *)laid);
  a->read_k(laid, c->d_pad, k);
  kv_kern(c)->expand4(page + g.v, (int64_t)c->dv_pad * 32, -8, (uint8_t *)laid);
  a->read_v(laid, c->dv_pad, v);
}

void kv_page_write(const etk_kv_cache *c, uint8_t *page, const float *mu, const kv_scratch *s) {
  const etk_attn_kernel *a = kv_attn(c);
  kv_geometry g = kv_page_geometry(c);
  if (c->desc.bits == 16) {
    kv_tail_write(c, page, 0, KV_SLOTS, s->kx, s->vx);
    return;
  }
  for (int32_t j = 0; j < KV_SLOTS; j++) {
    float *x = s->kx + (int64_t)j * c->d_pad;
    for (int32_t ch = 0; ch < c->desc.d; ch++) x[ch] -= mu[ch];
    if (c->desc.flags & ETK_KV_ROT_K) kv_rotate(x, c->desc.d);
  }
  uint16_t *v_scale = (uint16_t *)(void *)(page + g.v_scale), *k_scale = (uint16_t *)(void *)page;
  int8_t *k = s->codes, *v = s->codes + (int64_t)c->d_pad * KV_SLOTS;
  int32_t nonfinite = 0;
  if (c->desc.bits == 4) {
    quantize_k4(c, s->kx, k, k_scale, k_scale + c->d_pad);
    quantize_v4(c, s->vx, v, v_scale);
    kv_page_from_codes(c, page, k, v, s->laid);
    return;
  }
  float *sv = s->scales;
  a->pack_v(s->vx, c->dv_pad, KV_SLOTS, c->desc.dv, c->dv_pad, NULL, page + g.v, sv,
            a->needs_colsum ? (int32_t *)(void *)(page + g.colsum) : NULL, 1, &nonfinite);
  (void)kv_kern(c)->round_f16(sv, c->dv_pad, v_scale, NULL);
  if (c->desc.k_scale == ETK_KV_K_PER_TOKEN) {
    quantize_k8_per_token(c, s->kx, k, k_scale);
    a->lay_k(k, c->d_pad, page + g.k);
    return;
  }
  float sk = a->pack_k(s->kx, c->d_pad, KV_SLOTS, c->desc.d, c->d_pad, NULL, page + g.k, &nonfinite);
  memcpy(page, &sk, sizeof sk);
}

void kv_page_read(const etk_kv_cache *c, const uint8_t *page, const float *mu, float *kx, float *vx, const kv_scratch *s) {
  if (c->desc.bits == 16) {
    kv_tail_read(c, page, 0, KV_SLOTS, kx, vx);
    return;
  }
  kv_geometry g = kv_page_geometry(c);
  int8_t *k = s->codes, *v = s->codes + (int64_t)c->d_pad * KV_SLOTS;
  kv_page_codes(c, page, k, v, s->laid);
  const etk_kv_kernel *kern = kv_kern(c);
  const uint16_t *scales = (const uint16_t *)(const void *)page;
  float *sk = s->scales, *zk = sk + c->d_pad, *sv = zk + c->d_pad + KV_SLOTS; /* sk: d_pad or 64 */
  int per_channel = c->desc.bits == 4, per_token = c->desc.k_scale == ETK_KV_K_PER_TOKEN;
  if (per_channel) kern->widen_f16(scales, 2 * (int64_t)c->d_pad, sk);
  else if (per_token) kern->widen_f16(scales, KV_SLOTS, sk);
  else memcpy(sk, page, sizeof *sk);
  for (int32_t j = 0; j < KV_SLOTS; j++) {
    float *x = kx + (int64_t)j * c->d_pad, row = per_token ? sk[j] : sk[0];
    const int8_t *code = k + (int64_t)j * c->d_pad;
    for (int32_t ch = 0; ch < c->desc.d; ch++)
      x[ch] = per_channel ? sk[ch] * (float)code[ch] + zk[ch] : row * (float)code[ch];
    if (c->desc.flags & ETK_KV_ROT_K) kv_rotate(x, c->desc.d);
    for (int32_t ch = 0; ch < c->desc.d; ch++) x[ch] += mu[ch];
  }
  kern->widen_f16((const uint16_t *)(const void *)(page + g.v_scale), c->dv_pad, sv);
  for (int32_t j = 0; j < KV_SLOTS; j++)
    for (int32_t ch = 0; ch < c->desc.dv; ch++) vx[(int64_t)j * c->dv_pad + ch] = sv[ch] * (float)v[(int64_t)j * c->dv_pad + ch];
}

void kv_tail_read(const etk_kv_cache *c, const uint8_t *tail, int64_t slot, int64_t n, float *kx, float *vx) {
  const uint16_t *k = (const uint16_t *)(const void *)tail, *v = kv_tail_v(c, tail);
  float wide[KV_SLOTS];
  for (int32_t ch = 0; ch < c->desc.d && kx; ch++) {
    kv_kern(c)->widen_f16(k + (int64_t)ch * KV_SLOTS + slot, n, wide);
    for (int64_t j = 0; j < n; j++) kx[j * c->d_pad + ch] = wide[j];
  }
  for (int64_t j = 0; j < n && vx; j++)
    kv_kern(c)->widen_f16(v + (slot + j) * c->dv_pad, c->desc.dv, vx + j * c->dv_pad);
}

void kv_tail_write(const etk_kv_cache *c, uint8_t *tail, int64_t slot, int64_t n, const float *kx, const float *vx) {
  uint16_t *k = (uint16_t *)(void *)tail, *v = k + (int64_t)c->d_pad * KV_SLOTS, half[1024];
  for (int64_t j = 0; j < n; j++) {
    (void)kv_kern(c)->round_f16(kx + j * c->d_pad, c->desc.d, half, NULL);
    for (int32_t ch = 0; ch < c->desc.d; ch++) k[(int64_t)ch * KV_SLOTS + slot + j] = half[ch];
    (void)kv_kern(c)->round_f16(vx + j * c->dv_pad, c->desc.dv, v + (slot + j) * c->dv_pad, NULL);
  }
}
