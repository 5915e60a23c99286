/* KV cache helpers for NEON: the formulas of kv_scalar_1x1.c, 4 floats or 16 bytes of nibbles at a time.
 *
 * f16 by `fcvtn` and `fcvtl`, which round to nearest even as the law asks. Ends of rows that do not fill a vector go through
 * a small buffer. Bound by loads and stores. */
#include <string.h>

#include "kv_kernel.h"
#include "neon_macros.h"

static int32_t round_f16(const float *x, int64_t n, uint16_t *h, float *y) {
  const float32x4_t top = vdupq_n_f32(65504.0f);
  uint32x4_t good = vdupq_n_u32(~0u);
  for (int64_t i = 0; i < n; i += 4) {
    float part[4] = {0};
    uint16_t half[4];
    const size_t m = n - i < 4 ? (size_t)(n - i) : 4;
    memcpy(part, x + i, m * 4);
    float32x4_t v = vld1q_f32(part);
    good = vandq_u32(good, vcaleq_f32(v, top));
    v = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vceqq_f32(v, v)));
    const float16x4_t code = vcvt_f16_f32(vmaxq_f32(vminq_f32(v, top), vnegq_f32(top)));
    vst1_u16(half, vreinterpret_u16_f16(code));
    vst1q_f32(part, vcvt_f32_f16(code));
    if (h) memcpy(h + i, half, m * 2);
    if (y) memcpy(y + i, part, m * 4);
  }
  return vminvq_u32(good) == 0;
}

INLINE float32x4_t load_f16(const uint16_t *h) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h))); }

static void widen_f16(const uint16_t *h, int64_t n, float *y) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) vst1q_f32(y + i, load_f16(h + i));
  if (i < n) {
    uint16_t half[4] = {0};
    float part[4];
    memcpy(half, h + i, (size_t)(n - i) * 2);
    vst1q_f32(part, load_f16(half));
    memcpy(y + i, part, (size_t)(n - i) * 4);
  }
}

static void expand4(const uint8_t *src, int64_t bytes, int32_t bias, uint8_t *dst) {
  const uint8x16_t low = vdupq_n_u8(15), add = vdupq_n_u8((uint8_t)bias);
  for (int64_t i = 0; i < bytes; i += 64, dst += 128)
    UNROLL for (int j = 0; j < 64; j += 16) {
      const uint8x16_t x = vld1q_u8(src + i + j);
      vst1q_u8(dst + j, vaddq_u8(vandq_u8(x, low), add));
      vst1q_u8(dst + 64 + j, vaddq_u8(vshrq_n_u8(x, 4), add));
    }
}

static float fold_q4(const float *q, const uint16_t *s, const uint16_t *z, int32_t d_pad, int32_t u8_layout, int8_t *codes,
                     int32_t *start, float *dot) {
  const float32x4_t eight = vdupq_n_f32(8.0f);
  float32x4_t sums[4], top = vdupq_n_f32(0.0f);
  UNROLL for (int i = 0; i < 4; i++) sums[i] = vdupq_n_f32(0.0f);
  for (int32_t c = 0; c < d_pad; c += 16)
    UNROLL for (int i = 0; i < 4; i++) {
      const int32_t at = c + 4 * i;
      const float32x4_t x = vld1q_f32(q + at), sc = load_f16(s + at);
      top = vmaxnmq_f32(top, vabsq_f32(vmulq_f32(x, sc)));
      sums[i] = vaddq_f32(sums[i], vmulq_f32(x, vaddq_f32(load_f16(z + at), vmulq_f32(eight, sc))));
    }
  const float32x4_t four = vaddq_f32(vaddq_f32(sums[0], sums[2]), vaddq_f32(sums[1], sums[3])); /* the tree of the law */
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  *dot = vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  const float most = vmaxnmvq_f32(top);
  const int zero = !(most > 1e-30f);
  const float scale = zero ? 1.0f : most / 127.0f, inverse = zero ? 0.0f : 1.0f / scale;
  int32x4_t total = vdupq_n_s32(0);
  for (int32_t c = 0; c < d_pad; c += 8) {
    int32x4_t code[2];
    UNROLL for (int i = 0; i < 2; i++) {
      const int32_t at = c + 4 * i;
      code[i] = vcvtnq_s32_f32(vmulq_n_f32(vmulq_f32(vld1q_f32(q + at), load_f16(s + at)), inverse));
      total = vaddq_s32(total, code[i]);
    }
    vst1_s8(codes + c, vmovn_s16(vcombine_s16(vmovn_s32(code[0]), vmovn_s32(code[1]))));
  }
  *start = u8_layout ? -128 * vaddvq_s32(total) : 0;
  return scale;
}

extern const etk_kv_kernel etk_kv_neon_1x16;
const etk_kv_kernel etk_kv_neon_1x16 = {
    .name = "kv_neon_1x16",
    .isa = ETK_ISA_NEON,
    .round_f16 = round_f16,
    .widen_f16 = widen_f16,
    .expand4 = expand4,
    .fold_q4 = fold_q4,
};
