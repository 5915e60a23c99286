/* Quantizing and laying out for NEON: s = max|x| / 127, code = rint(x (1/s)), as quant_q in attn_kernel.h says; bit for bit
 * the scalar kernel's. Before it, the file that includes this defines
 *   lay_key(codes, d_pad, j, page)                the codes of key j into a K page
 *   lay_octet(rows, stride, dv_pad, octet, page)  8 rows of codes, keys 8 octet .. 8 octet + 7, into a V page
 *   k_at(d_pad, j, c), v_at(dv_pad, j, c)         the byte of a code in either page
 * Static only. */
#include "attn_neon_base.h"

enum { GROUP = 8 /* keys laid at once */ };

static const float k_no_shift[MAX_WIDTH] = {0};

/* 16 channels of x less mu from c on; those from d on are 0. */
INLINE void load16(const float *restrict x, const float *restrict mu, int32_t c, int32_t d, float32x4_t out[4]) {
  if (c + 16 <= d) {
    UNROLL for (int i = 0; i < 4; i++) out[i] = vsubq_f32(vld1q_f32(x + c + 4 * i), vld1q_f32(mu + c + 4 * i));
    return;
  }
  float part[16] = {0};
  for (int32_t i = c; i < d; i++) part[i - c] = x[i] - mu[i];
  UNROLL for (int i = 0; i < 4; i++) out[i] = vld1q_f32(part + 4 * i);
}

INLINE uint32x4_t abs_bits(float32x4_t x) { return vreinterpretq_u32_f32(vabsq_f32(x)); }

/* The bits of |x| order as |x| does, and all that is not finite comes last: one maximum finds both. */
INLINE uint32x4_t finite_bits(float32x4_t x) {
  const uint32x4_t bits = abs_bits(x);
  return vandq_u32(bits, vcltq_u32(bits, vdupq_n_u32(0x7f800000u)));
}

/* The largest finite |x - mu| of n rows; *bad: whether something is not finite. */
static float rows_top(const float *x, int64_t stride, int32_t n, int32_t d, const float *mu, int *bad) {
  uint32x4_t most = vdupq_n_u32(0);
  for (int pass = 0; pass < 2; pass++) {
    uint32x4_t top = vdupq_n_u32(0);
    for (int32_t j = 0; j < n; j++)
      for (int32_t c = 0; c < d; c += 16) {
        float32x4_t v[4];
        load16(x + j * stride, mu, c, d, v);
        UNROLL for (int i = 0; i < 4; i++) top = vmaxq_u32(top, pass ? finite_bits(v[i]) : abs_bits(v[i]));
      }
    most = top;
    if (pass == 0) *bad = vmaxvq_u32(top) >= 0x7f800000u;
    if (!*bad) break;
  }
  return vmaxvq_f32(vreinterpretq_f32_u32(most));
}

/* Codes of 16 values. clean: all finite and |x| <= top, so that saturation is all that is left to do (scales rounded to
 * f16 can exceed 127); else NaN is 0 and infinities are top. inverse 0 gives 0. */
INLINE int8x16_t codes16(const float32x4_t x[4], const float32x4_t top[4], const float32x4_t inverse[4], const int clean) {
  int32x4_t c[4];
  UNROLL for (int i = 0; i < 4; i++) {
    float32x4_t v = x[i];
    if (!clean) {
      v = vmaxnmq_f32(vminnmq_f32(v, top[i]), vnegq_f32(top[i]));
      v = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vceqq_f32(x[i], x[i])));
    }
    c[i] = vcvtnq_s32_f32(vmulq_f32(v, inverse[i]));
  }
  const int16x8_t low = vqmovn_high_s32(vqmovn_s32(c[0]), c[1]), high = vqmovn_high_s32(vqmovn_s32(c[2]), c[3]);
  return vmaxq_s8(vqmovn_high_s16(vqmovn_s16(low), high), vdupq_n_s8(-127));
}

INLINE float scale_of(float top) { return top < ETK_TINY ? 1.0f : top / 127.0f; }
INLINE float inverse_of(float top, float s) { return top < ETK_TINY ? 0.0f : 1.0f / s; }

/* One row with one scale; the codes of the channels d .. d_pad - 1 are 0. */
INLINE void quant_row(const float *x, const float *mu, int32_t d, int32_t d_pad, float top, float inverse, int8_t *codes,
                      const int clean) {
  const float32x4_t t = vdupq_n_f32(top), inv = vdupq_n_f32(inverse), tops[4] = {t, t, t, t}, all[4] = {inv, inv, inv, inv};
  for (int32_t c = 0; c < d_pad; c += 16) {
    float32x4_t v[4];
    load16(x, mu, c, d, v);
    vst1q_s8(codes + c, codes16(v, tops, all, clean));
  }
}

static float quant_q(const float *x, int32_t d, int32_t d_pad, int8_t *codes, int32_t *start, int32_t *nonfinite) {
  int bad = 0;
  const float top = rows_top(x, 0, 1, d, k_no_shift, &bad), s = scale_of(top), inverse = inverse_of(top, s);
  if (bad) quant_row(x, k_no_shift, d, d_pad, top, inverse, codes, 0);
  else quant_row(x, k_no_shift, d, d_pad, top, inverse, codes, 1);
  *start = 0;
  *nonfinite |= bad;
  return s;
}

static float pack_k(const float *x, int64_t stride, int32_t n, int32_t d, int32_t d_pad, const float *mu, void *page,
                    int32_t *nonfinite) {
  int8_t codes[MAX_WIDTH];
  int bad = 0;
  if (!mu) mu = k_no_shift;
  const float top = rows_top(x, stride, n, d, mu, &bad), s = scale_of(top), inverse = inverse_of(top, s);
  for (int32_t j = 0; j < ETK_PAGE; j++) {
    if (j == n) memset(codes, 0, sizeof codes);
    if (j < n && bad) quant_row(x + j * stride, mu, d, d_pad, top, inverse, codes, 0);
    if (j < n && !bad) quant_row(x + j * stride, mu, d, d_pad, top, inverse, codes, 1);
    lay_key(codes, d_pad, j, page);
  }
  *nonfinite |= bad;
  return s;
}

/* The largest finite |x - mu| of each channel, as bits; returns whether something is not finite. */
static int channel_tops(const float *x, int64_t stride, int32_t n, int32_t d, const float *mu, uint32_t *top) {
  uint32x4_t all = vdupq_n_u32(0);
  for (int32_t j = 0; j < n; j++)
    for (int32_t c = 0; c < d; c += 16) {
      float32x4_t v[4];
      load16(x + j * stride, mu, c, d, v);
      UNROLL for (int i = 0; i < 4; i++) {
        all = vmaxq_u32(all, abs_bits(v[i]));
        vst1q_u32(top + c + 4 * i, vmaxq_u32(vld1q_u32(top + c + 4 * i), finite_bits(v[i])));
      }
    }
  return vmaxvq_u32(all) >= 0x7f800000u;
}

/* One row with a scale per channel; sums gathers the codes (64 of them fit 16 bits). */
INLINE void quant_channels(const float *x, const float *mu, int32_t dv, int32_t dv_pad, const float *top, const float *inverse,
                           int16_t *sums, int8_t *codes, const int clean) {
  for (int32_t c = 0; c < dv_pad; c += 16) {
    float32x4_t v[4], t[4], inv[4];
    load16(x, mu, c, dv, v);
    UNROLL for (int i = 0; i < 4; i++) {
      t[i] = vld1q_f32(top + c + 4 * i);
      inv[i] = vld1q_f32(inverse + c + 4 * i);
    }
    const int8x16_t q = codes16(v, t, inv, clean);
    vst1q_s16(sums + c, vaddw_s8(vld1q_s16(sums + c), vget_low_s8(q)));
    vst1q_s16(sums + c + 8, vaddw_high_s8(vld1q_s16(sums + c + 8), q));
    vst1q_s8(codes + c, q);
  }
}

static void pack_v(const float *x, int64_t stride, int32_t n, int32_t dv, int32_t dv_pad, const float *mu, void *page, float *sv,
                   int32_t *colsum, int32_t f16_scales, int32_t *nonfinite) {
  float top[MAX_WIDTH], inverse[MAX_WIDTH];
  uint32_t bits[MAX_WIDTH] = {0};
  int16_t sums[MAX_WIDTH] = {0};
  int8_t codes[GROUP * MAX_WIDTH];
  if (!mu) mu = k_no_shift;
  const int bad = channel_tops(x, stride, n, dv, mu, bits);
  memcpy(top, bits, sizeof top);
  for (int32_t c = 0; c < dv_pad; c++) {
    sv[c] = scale_of(top[c]);
    if (f16_scales) sv[c] = etk_scale_f16(sv[c]);
    inverse[c] = inverse_of(top[c], sv[c]);
  }
  for (int32_t octet = 0; octet < ETK_PAGE / GROUP; octet++) {
    for (int32_t i = 0; i < GROUP; i++) {
      const int32_t j = octet * GROUP + i;
      int8_t *row = codes + i * MAX_WIDTH;
      if (j >= n) memset(row, 0, (size_t)dv_pad);
      else if (bad) quant_channels(x + j * stride, mu, dv, dv_pad, top, inverse, sums, row, 0);
      else quant_channels(x + j * stride, mu, dv, dv_pad, top, inverse, sums, row, 1);
    }
    lay_octet(codes, MAX_WIDTH, dv_pad, octet, page);
  }
  for (int32_t c = 0; colsum && c < dv_pad; c++) colsum[c] = sums[c];
  *nonfinite |= bad;
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
