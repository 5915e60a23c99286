/* Reading weights: codes with scales and zeros, GGUF blocks, floats to be quantized. */
#include "gemm_source.h"

#include <math.h>
#include <string.h>

#include "half.h"
#include "tensor.h"

#define TINY 0x1p-119f

uint16_t gemm_to_f16(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  const uint16_t sign = (uint16_t)(b >> 16 & 0x8000u);
  b &= 0x7fffffffu;
  if (b > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (b >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);
  if (b < 0x38800000u) { /* subnormal f16: multiples of 2^-24 */
    float m;
    memcpy(&m, &b, 4);
    return (uint16_t)(sign | (uint32_t)lrintf(m * 0x1p24f));
  }
  b += 0xfffu + (b >> 13 & 1u);
  return (uint16_t)(sign | ((b - 0x38000000u) >> 13));
}

/* An empty tensor may have no data: arithmetic on a null pointer is undefined even by zero. */
static const uint8_t *row_of(const etk_tensor *t, int64_t row) {
  return t->data ? (const uint8_t *)t->data + row * t->stride[0] : NULL;
}

static etk_status shape_is(const etk_tensor *t, int64_t rows, int64_t columns) {
  return t->dim[0] == rows && t->dim[1] == columns ? ETK_OK : ETK_E_SHAPE;
}

static etk_status check(const etk_tensor *t, uint32_t dtypes, int64_t rows, int64_t columns) {
  const etk_status status = etk_tensor_in(t, 2, dtypes);
  return status != ETK_OK ? status : shape_is(t, rows, columns);
}

static etk_status check_codes(const gemm_source *s, int64_t rows) {
  const etk_gemm_source *of = &s->of;
  const etk_gemm_geom *g = s->geom;
  const uint32_t types = g->bits == 8 ? ETK_DT(ETK_S8) | ETK_DT(ETK_U8) : ETK_DT(ETK_S4X2) | ETK_DT(ETK_U4X2);
  etk_status status = check(&of->codes, types, rows, g->k);
  if (status != ETK_OK) return status;
  status = check(&of->scales, ETK_DT(ETK_F32) | ETK_DT(ETK_F16), rows, g->groups);
  if (status != ETK_OK) return status;
  if (!etk_absent(&of->zeros) && !etk_absent(&of->offsets)) return ETK_E_RANGE;
  if (!etk_absent(&of->zeros)) return check(&of->zeros, ETK_DT(ETK_U8) | ETK_DT(ETK_F32) | ETK_DT(ETK_U4X2), rows, g->groups);
  if (!etk_absent(&of->offsets)) {
    if (!g->offset) return ETK_E_RANGE;
    return check(&of->offsets, ETK_DT(ETK_F32) | ETK_DT(ETK_F16), rows, g->groups);
  }
  return ETK_OK;
}

etk_status gemm_source_check(const etk_gemm_source *given, const etk_gemm_geom *geom, gemm_source *out) {
  etk_status status = etk_struct_in(&out->of, sizeof out->of, given);
  if (status != ETK_OK) return status;
  out->geom = geom;
  out->signed_codes = out->of.codes.dtype == ETK_S8 || out->of.codes.dtype == ETK_S4X2;
  const int64_t rows = geom->n * geom->halves, blocks = geom->k / 32;
  const int gguf = out->of.format >= ETK_W_Q4_0 && out->of.format <= ETK_W_Q8_0;
  if (gguf && (geom->glen != 32 || geom->one)) return ETK_E_RANGE;
  if (gguf && geom->k % 32 != 0) return ETK_E_SHAPE;
  if (out->of.format != ETK_W_CODES && !(etk_absent(&out->of.scales) && etk_absent(&out->of.zeros) && etk_absent(&out->of.offsets)))
    return ETK_E_RANGE;
  switch (out->of.format) {
    case ETK_W_CODES: return check_codes(out, rows);
    case ETK_W_FLOAT: return check(&out->of.codes, ETK_DT(ETK_F32), rows, geom->k);
    case ETK_W_Q4_0: return geom->bits != 4 ? ETK_E_RANGE : check(&out->of.codes, ETK_DT(ETK_U8), rows, blocks * 18);
    case ETK_W_Q4_1:
      return geom->bits != 4 || !geom->offset ? ETK_E_RANGE : check(&out->of.codes, ETK_DT(ETK_U8), rows, blocks * 20);
    case ETK_W_Q8_0: return geom->bits != 8 ? ETK_E_RANGE : check(&out->of.codes, ETK_DT(ETK_U8), rows, blocks * 34);
    default: return ETK_E_RANGE;
  }
}

static float read_half(const uint8_t *at) { return etk_f16_to_f32((uint16_t)(at[0] | at[1] << 8)); }

static float read_float(const etk_tensor *t, int64_t row, int64_t g) {
  const uint8_t *at = row_of(t, row);
  float x;
  if (t->dtype == ETK_F32) {
    memcpy(&x, at + g * 4, 4);
    return x;
  }
  if (t->dtype == ETK_F16) {
    uint16_t h;
    memcpy(&h, at + g * 2, 2);
    return etk_f16_to_f32(h);
  }
  return t->dtype == ETK_U8 ? (float)at[g] : (float)(at[g / 2] >> (g % 2 * 4) & 15);
}

static int exact(float x, int32_t f16) { return !f16 || x != x || etk_f16_to_f32(gemm_to_f16(x)) == x; }

/* W = scale (u - zero) + offset, seen as scale u + *offset. */
static etk_status scale_codes(const gemm_source *s, int64_t row, int64_t g, float *scale, float *offset) {
  const etk_gemm_geom *geom = s->geom;
  const float centre = geom->bits == 8 ? 128.0f : 8.0f, shift = s->signed_codes ? centre : 0.0f;
  *scale = read_float(&s->of.scales, row, g);
  float zero = centre, add = 0.0f;
  if (!etk_absent(&s->of.zeros)) zero = read_float(&s->of.zeros, row, g) + shift;
  if (!etk_absent(&s->of.offsets)) zero = shift, add = read_float(&s->of.offsets, row, g);
  if (!geom->offset && zero != centre) return ETK_E_RANGE;
  *offset = geom->offset ? (zero == 0.0f ? add : add - *scale * zero) : 0.0f;
  return exact(*scale, geom->f16) && exact(*offset, geom->f16) ? ETK_OK : ETK_E_RANGE;
}

static float finite_at(const float *row, int64_t k, int32_t *bad) {
  const float x = row[k];
  if (x - x == 0.0f) return x;
  *bad = 1;
  return 0.0f;
}

static etk_status scale_floats(const gemm_source *s, int64_t row, int64_t g, float *scale, float *offset) {
  const etk_gemm_geom *geom = s->geom;
  const float *x = (const float *)(const void *)row_of(&s->of.codes, row);
  const int64_t k0 = g * geom->glen, k1 = k0 + geom->glen < geom->k ? k0 + geom->glen : geom->k;
  float lo = 0.0f, hi = 0.0f;
  int32_t bad = 0;
  for (int64_t k = k0; k < k1; k++) {
    const float v = finite_at(x, k, &bad);
    lo = v < lo ? v : lo;
    hi = v > hi ? v : hi;
  }
  const float levels = geom->bits == 8 ? 255.0f : 15.0f, top = hi > -lo ? hi : -lo;
  *offset = 0.0f;
  if (!(top >= TINY)) *scale = 1.0f;
  else if (geom->offset) *scale = hi / levels - lo / levels, *offset = lo;
  else if (geom->bits == 8) *scale = top / 127.0f;
  else *scale = (hi > -lo ? hi : lo) / -8.0f;
  if (geom->f16) {
    const float rounded = etk_scale_f16(fabsf(*scale));
    *scale = *scale < 0.0f ? -rounded : rounded;
    *offset = etk_f16_to_f32(gemm_to_f16(*offset < -65504.0f ? -65504.0f : *offset));
  }
  return bad ? ETK_NOTE_NONFINITE : ETK_OK;
}

etk_status gemm_source_scale(const gemm_source *s, int64_t row, int64_t g, float *scale, float *offset) {
  const uint8_t *blocks = row_of(&s->of.codes, row);
  *offset = 0.0f;
  switch (s->of.format) {
    case ETK_W_FLOAT: return scale_floats(s, row, g, scale, offset);
    case ETK_W_Q4_0:
      *scale = read_half(blocks + g * 18);
      if (s->geom->offset) *offset = -8.0f * *scale;
      break;
    case ETK_W_Q4_1:
      *scale = read_half(blocks + g * 20);
      *offset = read_half(blocks + g * 20 + 2);
      break;
    case ETK_W_Q8_0:
      *scale = read_half(blocks + g * 34);
      if (s->geom->offset) *offset = -128.0f * *scale;
      break;
    default: return scale_codes(s, row, g, scale, offset);
  }
  return exact(*offset, s->geom->f16) ? ETK_OK : ETK_E_RANGE;
}

/* 1/scale may overflow for a subnormal scale that a caller's floats led to; the clamp then decides. */
static void quantize(const gemm_source *s, const float *x, int32_t len, float scale, float offset, uint8_t *u) {
  const int32_t levels = s->geom->bits == 8 ? 255 : 15, least = s->geom->bits == 8 && !s->geom->offset;
  const float zero = s->geom->offset ? 0.0f : s->geom->bits == 8 ? 128.0f : 8.0f;
  for (int32_t i = 0; i < len; i++) {
    float v = x[i];
    if (v != v) v = 0.0f;
    float t = (v - offset) / scale + zero;
    if (!(t > (float)least)) t = (float)least;
    if (t > (float)levels) t = (float)levels;
    u[i] = (uint8_t)lrintf(t);
  }
}

void gemm_source_codes(const gemm_source *s, int64_t row, int64_t g, int64_t k, int32_t len, float scale, float offset,
                       uint8_t *u) {
  const uint8_t *at = row_of(&s->of.codes, row);
  const int32_t four = s->of.format == ETK_W_Q4_0 ? 18 : 20;
  switch (s->of.format) {
    case ETK_W_FLOAT: quantize(s, (const float *)(const void *)at + k, len, scale, offset, u); return;
    case ETK_W_Q4_0:
    case ETK_W_Q4_1:
      at += g * four + (four - 16);
      for (int32_t i = 0; i < len; i++) {
        const int64_t j = k - g * 32 + i;
        u[i] = j < 16 ? at[j] & 15 : at[j - 16] >> 4;
      }
      return;
    case ETK_W_Q8_0:
      at += g * 34 + 2 + (k - g * 32);
      for (int32_t i = 0; i < len; i++) u[i] = at[i] ^ 0x80;
      return;
    default: break;
  }
  const uint8_t flip = s->signed_codes ? (s->geom->bits == 8 ? 0x80 : 8) : 0;
  for (int32_t i = 0; i < len; i++) {
    const int64_t j = k + i;
    u[i] = s->geom->bits == 8 ? at[j] ^ flip : (uint8_t)(at[j / 2] >> (j % 2 * 4) & 15) ^ flip;
  }
}
