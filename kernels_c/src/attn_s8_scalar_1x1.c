/* Attention, portable C: the law of attn_kernel.h, word for word. The other variants are held against this file.
 *
 *   S[i,j] = sum_c q[i,c] k[j,c];  mt = g max_j S;  P = LUT[rint(min((f32)(Smax - S) (28 g), 255))]
 *   mn = max(m, mt);  a = 2^(m - mn);  w = 2^(mt - mn);  l = a l + w sum_j P;  O = a O + (w sv) (f32)(sum_j P v)
 *
 * Tile 1 x 1: one row after the other, one key after the other; bound by the scalar (or baseline vector) multiply-add.
 * Pages are row-major s8. Float modes use the C library's exp2. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "attn_kernel.h"
#include "attn_lut.h"
#include "half.h"

enum { MR = 8 };

/* ---- quantization: s = max|x| / 127, code = rint(x (1/s)); see quant_q in attn_kernel.h ---- */

static int finite_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bits & 0x7f800000u) != 0x7f800000u;
}

static float finite_abs(float x, int32_t *bad) {
  if (finite_bits(x)) return fabsf(x);
  *bad = 1;
  return 0.0f;
}

static float scale_of(float top) { return top < ETK_TINY ? 1.0f : top / 127.0f; }

/* NaN is 0, infinities are top; inverse is 0 for a group that counts as zero. */
static int8_t code_of(float x, float top, float inverse) {
  if (x != x) return 0;
  x = x > top ? top : x < -top ? -top : x;
  const long c = lrintf(x * inverse);
  return (int8_t)(c > 127 ? 127 : c < -127 ? -127 : c);
}

static float quant_q(const float *x, int32_t d, int32_t d_pad, int8_t *codes, int32_t *start, int32_t *nonfinite) {
  float top = 0.0f;
  int32_t bad = 0;
  for (int32_t c = 0; c < d; c++) {
    const float a = finite_abs(x[c], &bad);
    top = a > top ? a : top;
  }
  const float s = scale_of(top), inverse = top < ETK_TINY ? 0.0f : 1.0f / s;
  for (int32_t c = 0; c < d; c++) codes[c] = code_of(x[c], top, inverse);
  memset(codes + d, 0, (size_t)(d_pad - d));
  *start = 0;
  *nonfinite |= bad;
  return s;
}

static float pack_k(const float *x, int64_t stride, int32_t n, int32_t d, int32_t d_pad, const float *mu, void *page,
                    int32_t *nonfinite) {
  int8_t *codes = page;
  float top = 0.0f;
  int32_t bad = 0;
  for (int32_t j = 0; j < n; j++)
    for (int32_t c = 0; c < d; c++) {
      const float a = finite_abs(x[j * stride + c] - (mu ? mu[c] : 0.0f), &bad);
      top = a > top ? a : top;
    }
  const float s = scale_of(top), inverse = top < ETK_TINY ? 0.0f : 1.0f / s;
  memset(codes, 0, (size_t)d_pad * ETK_PAGE);
  for (int32_t j = 0; j < n; j++)
    for (int32_t c = 0; c < d; c++) codes[j * d_pad + c] = code_of(x[j * stride + c] - (mu ? mu[c] : 0.0f), top, inverse);
  *nonfinite |= bad;
  return s;
}

static void pack_v(const float *x, int64_t stride, int32_t n, int32_t dv, int32_t dv_pad, const float *mu, void *page, float *sv,
                   int32_t *colsum, int32_t f16_scales, int32_t *nonfinite) {
  int8_t *codes = page;
  int32_t bad = 0;
  memset(codes, 0, (size_t)dv_pad * ETK_PAGE);
  for (int32_t c = 0; c < dv_pad; c++) {
    float top = 0.0f;
    for (int32_t j = 0; c < dv && j < n; j++) {
      const float a = finite_abs(x[j * stride + c] - (mu ? mu[c] : 0.0f), &bad);
      top = a > top ? a : top;
    }
    sv[c] = scale_of(top);
    if (f16_scales) sv[c] = etk_scale_f16(sv[c]);
    const float inverse = top < ETK_TINY ? 0.0f : 1.0f / sv[c];
    int32_t sum = 0;
    for (int32_t j = 0; c < dv && j < n; j++) {
      const int8_t code = code_of(x[j * stride + c] - (mu ? mu[c] : 0.0f), top, inverse);
      codes[j * dv_pad + c] = code;
      sum += code;
    }
    if (colsum) colsum[c] = sum;
  }
  *nonfinite |= bad;
}

static void lay(const int8_t *codes, int32_t pad, void *page) { memcpy(page, codes, (size_t)pad * ETK_PAGE); }
static void read(const void *page, int32_t pad, int8_t *codes) { memcpy(codes, page, (size_t)pad * ETK_PAGE); }

/* ---- INT8 ---- */

static int visible(const etk_strip *a, int32_t i, int32_t j) { return !a->mask || (a->mask[i] >> j & 1u); }

static void qk_s8(const etk_strip *a, int32_t *s) {
  for (int32_t i = 0; i < a->rows; i++)
    for (int32_t j = 0; j < ETK_PAGE; j++) {
      const int8_t *q = a->q + (int64_t)i * a->d_pad, *k = (const int8_t *)a->k + (int64_t)j * a->d_pad;
      int32_t sum = 0;
      for (int32_t c = 0; c < a->d_pad; c++) sum += q[c] * k[c];
      s[i * ETK_PAGE + j] = sum;
    }
}

/* Row i meets a tile with maximum mt: new m, l and O scaled; returns w. */
static float meet(const etk_strip *a, int32_t i, float mt, float p_sum) {
  const float mn = a->m[i] > mt ? a->m[i] : mt;
  const float old = exp2f(a->m[i] - mn), w = exp2f(mt - mn);
  float *o = a->o + (int64_t)i * a->dv_pad;
  a->l[i] = old * a->l[i] + w * p_sum;
  for (int32_t c = 0; c < a->dv_pad; c++) o[c] = old * o[c];
  a->m[i] = mn;
  return w;
}

static uint8_t look_up(const uint8_t *lut, float x) { return lut[lrintf(x < 255.0f ? x : 255.0f)]; }

static void pv_row(const etk_strip *a, int32_t i, const uint8_t *p, float w) {
  float *o = a->o + (int64_t)i * a->dv_pad;
  int32_t sum[1024] = {0};
  for (int32_t j = 0; j < ETK_PAGE; j++) {
    const int8_t *v = (const int8_t *)a->v + (int64_t)j * a->dv_pad;
    for (int32_t c = 0; c < a->dv_pad; c++) sum[c] += p[j] * v[c];
  }
  for (int32_t c = 0; c < a->dv_pad; c++) o[c] += (w * a->sv[c]) * (float)sum[c];
}

static void pv_s8(const etk_strip *a, const uint8_t *p, const float *w) {
  for (int32_t i = 0; i < a->rows; i++) pv_row(a, i, p + i * ETK_PAGE, w[i]);
}

static inline void strip_row(const etk_strip *a, int32_t i, const int32_t *s, int32_t top, const uint8_t *lut) {
  uint8_t p[ETK_PAGE];
  int32_t sum = 0;
  const float step = (float)ETK_STEP * a->g[i];
  for (int32_t j = 0; j < ETK_PAGE; j++) {
    p[j] = visible(a, i, j) ? look_up(lut, (float)(top - s[j]) * step) : 0;
    sum += p[j];
  }
  pv_row(a, i, p, meet(a, i, (float)top * a->g[i], (float)sum));
}

static inline void strip_law(const etk_strip *a, const uint8_t *lut) {
  int32_t s[ETK_MAX_MR * ETK_PAGE], top[ETK_MAX_MR], needed = a->skip_log2 == 0.0f;
  qk_s8(a, s);
  for (int32_t i = 0; i < a->rows; i++) {
    top[i] = INT32_MIN;
    for (int32_t j = 0; j < ETK_PAGE; j++)
      if (visible(a, i, j) && s[i * ETK_PAGE + j] > top[i]) top[i] = s[i * ETK_PAGE + j];
    if (top[i] != INT32_MIN && !((float)top[i] * a->g[i] < a->m[i] - a->skip_log2)) needed = 1;
  }
  for (int32_t i = 0; needed && i < a->rows; i++)
    if (top[i] != INT32_MIN) strip_row(a, i, s + i * ETK_PAGE, top[i], lut);
}

static inline void softmax_law(const etk_strip *a, const float *y, uint8_t *p, float *w, const uint8_t *lut) {
  for (int32_t i = 0; i < a->rows; i++, y += ETK_PAGE, p += ETK_PAGE) {
    float mt = -INFINITY;
    int32_t sum = 0;
    for (int32_t j = 0; j < ETK_PAGE; j++) mt = y[j] > mt ? y[j] : mt;
    w[i] = 0.0f;
    memset(p, 0, ETK_PAGE);
    if (mt == -INFINITY) continue;
    for (int32_t j = 0; j < ETK_PAGE; j++) sum += p[j] = look_up(lut, (mt - y[j]) * (float)ETK_STEP);
    w[i] = meet(a, i, mt, (float)sum);
  }
}

static void strip_s8(const etk_strip *a) { strip_law(a, etk_lut_255); }
static void strip_s8_127(const etk_strip *a) { strip_law(a, etk_lut_127); }
static void softmax_u8(const etk_strip *a, const float *y, uint8_t *p, float *w) { softmax_law(a, y, p, w, etk_lut_255); }
static void softmax_u8_127(const etk_strip *a, const float *y, uint8_t *p, float *w) { softmax_law(a, y, p, w, etk_lut_127); }

/* ---- float ---- */

static void qk_f32(const etk_strip *a, float *y) {
  const float *k = a->k; /* [d_pad][64] */
  memset(y, 0, (size_t)a->rows * ETK_PAGE * sizeof *y);
  for (int32_t i = 0; i < a->rows; i++)
    for (int32_t c = 0; c < a->d_pad; c++) {
      const float q = a->qf[(int64_t)i * a->d_pad + c];
      for (int32_t j = 0; j < ETK_PAGE; j++) y[i * ETK_PAGE + j] += q * k[c * ETK_PAGE + j];
    }
}

static void softmax_f32(const etk_strip *a, const float *y, float *p) {
  for (int32_t i = 0; i < a->rows; i++, y += ETK_PAGE, p += ETK_PAGE) {
    float mt = -INFINITY, sum = 0.0f;
    for (int32_t j = 0; j < ETK_PAGE; j++) mt = y[j] > mt ? y[j] : mt;
    memset(p, 0, ETK_PAGE * sizeof *p);
    if (mt == -INFINITY) continue;
    const float mn = a->m[i] > mt ? a->m[i] : mt, old = exp2f(a->m[i] - mn);
    float *o = a->o + (int64_t)i * a->dv_pad;
    for (int32_t j = 0; j < ETK_PAGE; j++) sum += p[j] = exp2f(y[j] - mn);
    a->l[i] = old * a->l[i] + sum;
    for (int32_t c = 0; c < a->dv_pad; c++) o[c] = old * o[c];
    a->m[i] = mn;
  }
}

static void pv_f32(const etk_strip *a, const float *p) {
  const float *v = a->v; /* [64][dv_pad] */
  for (int32_t i = 0; i < a->rows; i++) {
    float *o = a->o + (int64_t)i * a->dv_pad;
    for (int32_t j = 0; j < ETK_PAGE; j++)
      for (int32_t c = 0; c < a->dv_pad; c++) o[c] += p[i * ETK_PAGE + j] * v[j * a->dv_pad + c];
  }
}

static void strip_f32(const etk_strip *a) {
  float y[ETK_MAX_MR * ETK_PAGE], p[ETK_MAX_MR * ETK_PAGE];
  int needed = a->skip_log2 == 0.0f;
  qk_f32(a, y);
  for (int32_t i = 0; i < a->rows; i++)
    for (int32_t j = 0; j < ETK_PAGE; j++) {
      if (!visible(a, i, j)) y[i * ETK_PAGE + j] = -INFINITY;
      else if (!(y[i * ETK_PAGE + j] < a->m[i] - a->skip_log2)) needed = 1;
    }
  if (!needed) return;
  softmax_f32(a, y, p);
  pv_f32(a, p);
}

#define ETK_SCALAR_ROW(text, top, strip, soft)                                                                           \
  {                                                                                                                      \
    .name = text, .isa = ETK_ISA_SCALAR, .mr = MR, .p_max = top, .layout = 0, .quant_q = quant_q, .pack_k = pack_k,      \
    .pack_v = pack_v, .lay_k = lay, .lay_v = lay, .read_k = read, .read_v = read, .strip_s8 = strip, .qk_s8 = qk_s8,     \
    .softmax_u8 = soft, .pv_s8 = pv_s8, .strip_f32 = strip_f32, .qk_f32 = qk_f32, .softmax_f32 = softmax_f32,            \
    .pv_f32 = pv_f32,                                                                                                    \
  }

extern const etk_attn_kernel etk_attn_s8_scalar_1x1, etk_attn_s8_scalar_1x1_p127;
const etk_attn_kernel etk_attn_s8_scalar_1x1 = ETK_SCALAR_ROW("attn_s8_scalar_1x1", 255, strip_s8, softmax_u8);
/* The same with P up to 127: what variants with that maximum are held against. Never chosen. */
const etk_attn_kernel etk_attn_s8_scalar_1x1_p127 = ETK_SCALAR_ROW("attn_s8_scalar_1x1_p127", 127, strip_s8_127, softmax_u8_127);
