/* Quantizing and laying out for NEON: s = max|x| / 127, code = rint(x (1/s)), as quant_q in attn_kernel.h says; bit for bit
 * the scalar kernel's. Before it, the file that includes this defines
 *   lay_key(codes, d_pad, j, page)                the codes of key j into a K page
 *   lay_octet(rows, stride, dv_pad, octet, page)  8 rows of codes, keys 8 octet .. 8 octet + 7, into a V page
 *   k_at(d_pad, j, c), v_at(dv_pad, j, c)         the byte of a code in either page
 * Static only. */
#include "attn_neon_base.h"

enum { GROUP = 8 /* keys laid at once */ };

/* x less mu for the channels c .. c + 3; channels from `width` on are 0. */
INLINE float32x4_t load4(const float *restrict x, const float *restrict mu, int32_t c, int32_t width) {
  if (c + 4 <= width) {
    const float32x4_t v = vld1q_f32(x + c);
    return mu ? vsubq_f32(v, vld1q_f32(mu + c)) : v;
  }
  float part[4] = {0};
  for (int32_t i = c; i < width; i++) part[i - c] = x[i] - (mu ? mu[i] : 0.0f);
  return vld1q_f32(part);
}

/* |x| where finite, else 0; *bad gathers the lanes that are not. */
INLINE float32x4_t finite_abs(float32x4_t x, uint32x4_t *bad) {
  const float32x4_t size = vabsq_f32(x);
  const uint32x4_t finite = vcleq_f32(size, vdupq_n_f32(FLT_MAX));
  *bad = vornq_u32(*bad, finite);
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(size), finite));
}

INLINE void row_top(const float *x, const float *mu, int32_t d, float32x4_t *top, uint32x4_t *bad) {
  for (int32_t c = 0; c < d; c += 4) *top = vmaxq_f32(*top, finite_abs(load4(x, mu, c, d), bad));
}

/* Codes of four values; a NaN is 0, infinities are top. inverse 0 gives 0. */
INLINE int32x4_t codes4(float32x4_t x, float32x4_t top, float32x4_t inverse) {
  const uint32x4_t number = vceqq_f32(x, x);
  x = vmaxnmq_f32(vminnmq_f32(x, top), vnegq_f32(top));
  const int32x4_t c = vcvtnq_s32_f32(vmulq_f32(x, inverse));
  const int32x4_t held = vmaxq_s32(vminq_s32(c, vdupq_n_s32(127)), vdupq_n_s32(-127));
  return vandq_s32(held, vreinterpretq_s32_u32(number));
}

INLINE int8x16_t narrow16(const int32x4_t c[4]) {
  const int16x8_t low = vcombine_s16(vmovn_s32(c[0]), vmovn_s32(c[1])), high = vcombine_s16(vmovn_s32(c[2]), vmovn_s32(c[3]));
  return vcombine_s8(vmovn_s16(low), vmovn_s16(high));
}

INLINE float scale_of(float top) { return top < ETK_TINY ? 1.0f : top / 127.0f; }
INLINE float inverse_of(float top, float s) { return top < ETK_TINY ? 0.0f : 1.0f / s; }

/* One row with one scale; the codes of the channels d .. d_pad - 1 are 0. */
INLINE void quant_row(const float *x, const float *mu, int32_t d, int32_t d_pad, float top, float inverse, int8_t *codes) {
  const float32x4_t t = vdupq_n_f32(top), inv = vdupq_n_f32(inverse);
  for (int32_t c = 0; c < d_pad; c += 16) {
    int32x4_t part[4];
    UNROLL for (int i = 0; i < 4; i++) part[i] = codes4(load4(x, mu, c + 4 * i, d), t, inv);
    vst1q_s8(codes + c, narrow16(part));
  }
}

static float quant_q(const float *x, int32_t d, int32_t d_pad, int8_t *codes, int32_t *start, int32_t *nonfinite) {
  float32x4_t tops = vdupq_n_f32(0.0f);
  uint32x4_t bad = vdupq_n_u32(0);
  row_top(x, NULL, d, &tops, &bad);
  const float top = vmaxvq_f32(tops), s = scale_of(top);
  quant_row(x, NULL, d, d_pad, top, inverse_of(top, s), codes);
  *start = 0;
  *nonfinite |= vmaxvq_u32(bad) != 0;
  return s;
}

static float pack_k(const float *x, int64_t stride, int32_t n, int32_t d, int32_t d_pad, const float *mu, void *page,
                    int32_t *nonfinite) {
  int8_t codes[MAX_WIDTH];
  float32x4_t tops = vdupq_n_f32(0.0f);
  uint32x4_t bad = vdupq_n_u32(0);
  for (int32_t j = 0; j < n; j++) row_top(x + j * stride, mu, d, &tops, &bad);
  const float top = vmaxvq_f32(tops), s = scale_of(top), inverse = inverse_of(top, s);
  for (int32_t j = 0; j < ETK_PAGE; j++) {
    if (j < n) quant_row(x + j * stride, mu, d, d_pad, top, inverse, codes);
    if (j == n) memset(codes, 0, sizeof codes);
    lay_key(codes, d_pad, j, page);
  }
  *nonfinite |= vmaxvq_u32(bad) != 0;
  return s;
}

/* One row with a scale per channel; sums gathers the codes. */
INLINE void quant_channels(const float *x, const float *mu, int32_t dv, int32_t dv_pad, const float *top, const float *inverse,
                           int32_t *sums, int8_t *codes) {
  for (int32_t c = 0; c < dv_pad; c += 16) {
    int32x4_t part[4];
    UNROLL for (int i = 0; i < 4; i++) {
      const int32_t at = c + 4 * i;
      part[i] = codes4(load4(x, mu, at, dv), vld1q_f32(top + at), vld1q_f32(inverse + at));
      vst1q_s32(sums + at, vaddq_s32(vld1q_s32(sums + at), part[i]));
    }
    vst1q_s8(codes + c, narrow16(part));
  }
}

static void pack_v(const float *x, int64_t stride, int32_t n, int32_t dv, int32_t dv_pad, const float *mu, void *page, float *sv,
                   int32_t *colsum, int32_t f16_scales, int32_t *nonfinite) {
  float top[MAX_WIDTH] = {0}, inverse[MAX_WIDTH];
  int32_t sums[MAX_WIDTH] = {0};
  int8_t codes[GROUP * MAX_WIDTH];
  uint32x4_t bad = vdupq_n_u32(0);
  for (int32_t j = 0; j < n; j++)
    for (int32_t c = 0; c < dv; c += 4)
      vst1q_f32(top + c, vmaxq_f32(vld1q_f32(top + c), finite_abs(load4(x + j * stride, mu, c, dv), &bad)));
  for (int32_t c = 0; c < dv_pad; c++) {
    sv[c] = scale_of(top[c]);
    if (f16_scales) sv[c] = etk_scale_f16(sv[c]);
    inverse[c] = inverse_of(top[c], sv[c]);
  }
  for (int32_t octet = 0; octet < ETK_PAGE / GROUP; octet++) {
    for (int32_t i = 0; i < GROUP; i++) {
      const int32_t j = octet * GROUP + i;
      if (j < n) quant_channels(x + j * stride, mu, dv, dv_pad, top, inverse, sums, codes + i * MAX_WIDTH);
      else memset(codes + i * MAX_WIDTH, 0, (size_t)dv_pad);
    }
    lay_octet(codes, MAX_WIDTH, dv_pad, octet, page);
  }
  if (colsum) memcpy(colsum, sums, (size_t)dv_pad * sizeof *colsum);
  *nonfinite |= vmaxvq_u32(bad) != 0;
}

static void lay_k(const int8_t *codes, int32_t d_pad, void *page) {
  for (int32_t j = 0; j < ETK_PAGE; j++) lay_key(codes + (size_t)j * (size_t)d_pad, d_pad, j, page);
}

static void lay_v(const int8_t *codes, int32_t dv_pad, void *page) {
  for (int32_t octet = 0; octet < ETK_PAGE / GROUP; octet++)
    lay_octet(codes + (size_t)(octet * GROUP) * (size_t)dv_pad, (size_t)dv_pad, dv_pad, octet, page);
}

/* Saving only: byte by byte. */
static void read_k(const void *page, int32_t d_pad, int8_t *codes) {
  for (int32_t j = 0; j < ETK_PAGE; j++)
    for (int32_t c = 0; c < d_pad; c++) codes[j * d_pad + c] = ((const int8_t *)page)[k_at((size_t)d_pad, (size_t)j, (size_t)c)];
}

static void read_v(const void *page, int32_t dv_pad, int8_t *codes) {
  for (int32_t j = 0; j < ETK_PAGE; j++)
    for (int32_t c = 0; c < dv_pad; c++) codes[j * dv_pad + c] = ((const int8_t *)page)[v_at((size_t)dv_pad, (size_t)j, (size_t)c)];
}
