/* What the NEON attention variants share before their tiles: macros, 2^x, masks. Static only: each variant compiles its own
 * copy with its own flags. Internal. */
#ifndef ETK_ATTN_NEON_BASE_H
#define ETK_ATTN_NEON_BASE_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "attn_kernel.h"
#include "attn_lut.h"
#include "half.h"
#include "neon_macros.h"

enum { STRIP = 8 /* mr */, MAX_WIDTH = 1024 /* d_pad, dv_pad */ };

/* 2^x for x <= 0, 1 at 0, 0 below -126 and at -inf, NaN at NaN; elsewhere within 2 ulp: x = n + f, |f| <= 1/2, a polynomial
 * of degree 5 for 2^f (relative error 9.2e-8 before rounding) and n added to its exponent. */
INLINE float32x4_t exp2_4(float32x4_t x) {
  const uint32x4_t zero = vcltq_f32(x, vdupq_n_f32(-126.0f));
  x = vmaxq_f32(x, vdupq_n_f32(-126.0f));
  const float32x4_t n = vrndnq_f32(x), f = vsubq_f32(x, n);
  float32x4_t p = vfmaq_f32(vdupq_n_f32(0x1.3cea88p-7f), f, vdupq_n_f32(0x1.5bba14p-10f));
  p = vfmaq_f32(vdupq_n_f32(0x1.c6b752p-5f), p, f);
  p = vfmaq_f32(vdupq_n_f32(0x1.ebf9bcp-3f), p, f);
  p = vfmaq_f32(vdupq_n_f32(0x1.62e42ap-1f), p, f);
  p = vfmaq_f32(vdupq_n_f32(1.0f), p, f);
  const int32x4_t bits = vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vcvtq_s32_f32(n), 23));
  return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_s32(bits), zero));
}

/* Bytes 0xff where the 16 bits of a mask are set. */
INLINE uint8x16_t mask_bytes(uint32_t bits) {
  static const uint8_t places[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t x = vcombine_u8(vdup_n_u8((uint8_t)bits), vdup_n_u8((uint8_t)(bits >> 8)));
  return vtstq_u8(x, vld1q_u8(places));
}

/* The 16 bytes as 4 vectors of 32-bit masks. */
INLINE void mask_words(uint8x16_t bytes, uint32x4_t out[4]) {
  const int8x16_t b = vreinterpretq_s8_u8(bytes);
  const int16x8_t low = vmovl_s8(vget_low_s8(b)), high = vmovl_high_s8(b);
  out[0] = vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(low)));
  out[1] = vreinterpretq_u32_s32(vmovl_high_s16(low));
  out[2] = vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(high)));
  out[3] = vreinterpretq_u32_s32(vmovl_high_s16(high));
}

/* The state of a strip's rows when a tile with row maxima mt comes: old[r] = 2^(m - mn), w[r] = 2^(mt - mn), m = mn. Rows
 * without a visible key (mt -inf) and rows past the strip keep m, with old 1 and w 0. Returns whether any old is not 1. */
INLINE int meet(const etk_strip *a, const float mt[STRIP], float old[STRIP], float w[STRIP]) {
  float m[STRIP];
  uint32x4_t changed = vdupq_n_u32(0);
  UNROLL for (int32_t r = 0; r < STRIP; r++) m[r] = r < a->rows ? a->m[r] : 0.0f;
  UNROLL for (int i = 0; i < STRIP; i += 4) {
    const float32x4_t top = vld1q_f32(mt + i), before = vld1q_f32(m + i);
    const uint32x4_t dead = vceqq_f32(top, vdupq_n_f32(-INFINITY));
    const float32x4_t after = vmaxnmq_f32(before, top);
    const float32x4_t grown = vbslq_f32(dead, vdupq_n_f32(1.0f), exp2_4(vsubq_f32(before, after)));
    changed = vorrq_u32(changed, vmvnq_u32(vceqq_f32(grown, vdupq_n_f32(1.0f))));
    vst1q_f32(old + i, grown);
    vst1q_f32(w + i, vbslq_f32(dead, vdupq_n_f32(0.0f), exp2_4(vsubq_f32(top, after))));
    vst1q_f32(m + i, after);
  }
  for (int32_t r = 0; r < a->rows; r++) a->m[r] = m[r];
  return vmaxvq_u32(changed) != 0;
}

/* O[r,:] *= old[r], for the callers of the softmax alone. */
static void scale_rows(const etk_strip *a, const float *old) {
  for (int32_t r = 0; r < a->rows; r++)
    for (int32_t c = 0; c < a->dv_pad; c += 4) {
      float *o = a->o + (size_t)r * (size_t)a->dv_pad + c;
      vst1q_f32(o, vmulq_n_f32(vld1q_f32(o), old[r]));
    }
}

/* 8 rows of 8 codes turned: out[c] holds the 8 keys of channel c. */
INLINE void turn8(const int8_t *rows, size_t stride, int8x8_t out[8]) {
  int8x8_t x[8];
  int16x4_t y[8];
  UNROLL for (int i = 0; i < 8; i++) x[i] = vld1_s8(rows + (size_t)i * stride);
  UNROLL for (int i = 0; i < 8; i += 2) {
    y[i] = vreinterpret_s16_s8(vtrn1_s8(x[i], x[i + 1]));
    y[i + 1] = vreinterpret_s16_s8(vtrn2_s8(x[i], x[i + 1]));
  }
  UNROLL for (int i = 0; i < 2; i++) {
    const int32x2_t a = vreinterpret_s32_s16(vtrn1_s16(y[i], y[i + 2])), b = vreinterpret_s32_s16(vtrn2_s16(y[i], y[i + 2]));
    const int32x2_t e = vreinterpret_s32_s16(vtrn1_s16(y[i + 4], y[i + 6])), f = vreinterpret_s32_s16(vtrn2_s16(y[i + 4], y[i + 6]));
    out[i] = vreinterpret_s8_s32(vtrn1_s32(a, e));
    out[i + 2] = vreinterpret_s8_s32(vtrn1_s32(b, f));
    out[i + 4] = vreinterpret_s8_s32(vtrn2_s32(a, e));
    out[i + 6] = vreinterpret_s8_s32(vtrn2_s32(b, f));
  }
}

#define ETK_NEON_ATTN(text, token, number)                                                                                 \
  {                                                                                                                       \
    .name = text, .isa = token, .mr = STRIP, .p_max = 255, .layout = number, .needs_colsum = P_SIGNED, .quant_q = quant_q, \
    .pack_k = pack_k, .pack_v = pack_v, .lay_k = lay_k, .lay_v = lay_v, .read_k = read_k, .read_v = read_v,               \
    .strip_s8 = strip_s8, .qk_s8 = qk_s8, .softmax_u8 = softmax_u8, .pv_s8 = pv_s8, .strip_f32 = strip_f32,               \
    .qk_f32 = qk_f32, .softmax_f32 = softmax_f32, .pv_f32 = pv_f32,                                                       \
  }

#endif
