/* The law of the matrix product in plain C, one output at a time; every other kernel is held against this one.
 *
 *   S = start + sum_k u[k] a[k];  c = fma(ws as, (f32)S, c);  offsets: c = fma(wb as, rsum, c)
 *
 * Tile 1 row x 64 columns of layout 1. Bound by the scalar multiply. */
#include "gemm_body.h"
#include "gemm_quads.h"

static uint32_t dot(const etk_gemm_tile *t, const uint8_t *w, const int8_t *a, int32_t len, int32_t column) {
  uint32_t s = 0; /* wraps where s32 registers do */
  for (int32_t k = 0; k < len; k++) s += (uint32_t)(quads_code_at(w, k, column, t->bits) * a[k]);
  return s;
}

static void tile_f32(const etk_gemm_tile *t) {
  const int64_t run_bytes = (int64_t)t->len * QUADS_NR * t->bits / 8;
  for (int32_t i = 0; i < t->runs; i++) {
    const int64_t rec = (int64_t)(i / t->per_rec) * t->rec_bytes;
    const uint8_t *w = t->w + rec + (i % t->per_rec) * run_bytes;
    const int32_t len = i == t->runs - 1 ? t->last_len : t->len;
    float ws[QUADS_NR], wb[QUADS_NR];
    body_scales(t->ws + rec, QUADS_NR, t->f16, ws);
    if (t->wb) body_scales(t->wb + rec, QUADS_NR, t->f16, wb);
    for (int32_t j = 0; j < QUADS_NR; j++) {
      const int32_t s = (int32_t)((uint32_t)t->start[i] + dot(t, w, t->a + (int64_t)i * t->len, len, j));
      float c = t->first && i == 0 ? 0.0f : t->c[j];
      c = FMA(t->as ? ws[j] * t->as[i] : ws[j], (float)s, c);
      if (t->wb) c = FMA(t->as ? wb[j] * t->as[i] : wb[j], t->rsum[i], c);
      t->c[j] = c;
    }
  }
}

static void tile_s32(const etk_gemm_tile *t) {
  for (int32_t j = 0; j < QUADS_NR; j++) {
    const uint32_t before = (uint32_t)(t->first ? t->start[0] : t->ci[j]);
    t->ci[j] = (int32_t)(before + dot(t, t->w, t->a, t->len, j));
  }
}

extern const etk_gemm_kernel etk_gemm_s8_scalar_1x1;
const etk_gemm_kernel etk_gemm_s8_scalar_1x1 = {
    .name = "gemm_s8_scalar_1x1", .isa = ETK_ISA_SCALAR, .layout = 1, .mr = 1, .nr = QUADS_NR, .bias8 = 0,
    .lay = quads_lay, .code_at = quads_code_at, .widen = quads_widen,
    .range = body_range, .quantize = body_quantize, .sum = body_sum, .lay_a = quads_lay_a,
    .tile_f32 = tile_f32, .tile_s32 = tile_s32, .finish = body_finish,
};
