/* Matrix product tiles for NEON, over the sums of the file that includes this. Before it, that file defines
 *   sums(t, a, w, row, rows, col, len, bits, s)   s[r][v] += the products of `len` codes: rows row .. row + rows - 1 of the tile's
 *                                       activations at a, columns col .. col + 4 COLUMNS(rows) - 1 of the weights at w
 *   COLUMNS(rows)                       vectors of four columns that go with a block of rows
 *   TILE_ROWS, PANEL                    rows of the largest block; columns of a panel, 16
 * The block of 16 columns is short enough that a run's weights (a cache line for each 4 codes) stay in L1 while the blocks of
 * rows and columns pass over them, so that a product with few rows still reads its weights as one ascending stream. */
#ifndef ETK_GEMM_NEON_BODY_H
#define ETK_GEMM_NEON_BODY_H

/* c[r][:] = fma(ws as, (f32)s, c), fma(wb as, rsum, c) for one block of one run. */
INLINE void add_run(const etk_gemm_tile *t, int32_t run, int32_t row, const int rows, int32_t col, const float *ws, const float *wb,
                    int32x4_t s[8][4]) {
  const int vectors = COLUMNS(rows);
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int v = 0; v < vectors; v++) {
      float *at = t->c + (row + r) * PANEL + col + 4 * v;
      float32x4_t c = t->first && run == 0 ? vdupq_n_f32(0.0f) : vld1q_f32(at);
      float32x4_t scale = vld1q_f32(ws + col + 4 * v);
      const int32_t place = run * t->rows + row + r;
      if (t->as) scale = vmulq_n_f32(scale, t->as[place]);
      c = vfmaq_f32(c, scale, vcvtq_f32_s32(s[r][v]));
      if (wb) {
        float32x4_t offset = vld1q_f32(wb + col + 4 * v);
        if (t->as) offset = vmulq_n_f32(offset, t->as[place]);
        c = vfmaq_n_f32(c, offset, t->rsum[place]);
      }
      vst1q_f32(at, c);
    }
}

INLINE void block_f32(const etk_gemm_tile *t, int32_t run, const int8_t *a, const uint8_t *w, int32_t len, const float *ws,
                      const float *wb, int32_t row, const int rows, const int bits) {
  const int vectors = COLUMNS(rows);
  for (int32_t col = 0; col < PANEL; col += 4 * vectors) {
    int32x4_t s[8][4];
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int v = 0; v < vectors; v++) s[r][v] = vdupq_n_s32(t->start[run * t->rows + row + r]);
    sums(t, a, w, row, rows, col, len, bits, s);
    add_run(t, run, row, rows, col, ws, wb, s);
  }
}

INLINE void block_s32(const etk_gemm_tile *t, const int8_t *a, const uint8_t *w, int32_t len, int32_t fresh, int32_t row,
                      const int rows, const int bits) {
  const int vectors = COLUMNS(rows);
  for (int32_t col = 0; col < PANEL; col += 4 * vectors) {
    int32x4_t s[8][4];
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int v = 0; v < vectors; v++) s[r][v] = vdupq_n_s32(0);
    sums(t, a, w, row, rows, col, len, bits, s);
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int v = 0; v < vectors; v++) {
        int32_t *at = t->ci + (row + r) * PANEL + col + 4 * v;
        vst1q_s32(at, vaddq_s32(s[r][v], fresh ? vdupq_n_s32(t->start[row + r]) : vld1q_s32(at)));
      }
  }
}

/* Blocks of TILE_ROWS, then 4, 2, 1. */
#define ROW_BLOCKS(count, body)                                          \
  do {                                                                   \
    int32_t row = 0;                                                     \
    for (; row + TILE_ROWS <= (count); row += TILE_ROWS) body(TILE_ROWS); \
    if (TILE_ROWS > 4 && row + 4 <= (count)) { body(4); row += 4; }      \
    if (row + 2 <= (count)) { body(2); row += 2; }                       \
    if (row < (count)) body(1);                                          \
  } while (0)

/* 16 scales or offsets as f32. */
INLINE void load_scales(const uint8_t *at, int32_t f16, float out[PANEL]) {
  if (!f16) {
    memcpy(out, at, PANEL * sizeof *out);
    return;
  }
  uint16_t h[PANEL];
  memcpy(h, at, sizeof h);
  UNROLL for (int i = 0; i < PANEL; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h + i))));
}

INLINE void tile_f32_bits(const etk_gemm_tile *t, const int bits) {
  const int64_t run_bytes = (int64_t)t->len * PANEL * bits / 8;
  float ws[PANEL], wb[PANEL];
  int32_t within = 0;
  int64_t rec = 0;
  for (int32_t i = 0; i < t->runs; i++) {
    const uint8_t *w = t->w + rec + within * run_bytes;
    const int8_t *a = t->a + (int64_t)i * t->len * t->rows;
    const int32_t len = i == t->runs - 1 ? t->last_len : t->len;
    if (within == 0) {
      load_scales(t->ws + rec, t->f16, ws);
      if (t->wb) load_scales(t->wb + rec, t->f16, wb);
    }
#define BODY(rows) block_f32(t, i, a, w, len, ws, t->wb ? wb : NULL, row, rows, bits)
    ROW_BLOCKS(t->rows, BODY);
#undef BODY
    if (++within == t->per_rec) within = 0, rec += t->rec_bytes;
  }
}

static void tile_f32(const etk_gemm_tile *t) {
  if (t->bits == 8) tile_f32_bits(t, 8);
  else tile_f32_bits(t, 4);
}

enum { STEP = 512 }; /* codes: 8 KiB of weights between two visits of the accumulators in memory */

INLINE void tile_s32_bits(const etk_gemm_tile *t, const int bits) {
  for (int32_t k = 0; k < t->len; k += STEP) {
    const int32_t len = t->len - k < STEP ? t->len - k : STEP, fresh = t->first && k == 0;
    const uint8_t *w = t->w + (int64_t)k * PANEL * bits / 8;
    const int8_t *a = t->a + (int64_t)k * t->rows;
#define BODY(rows) block_s32(t, a, w, len, fresh, row, rows, bits)
    ROW_BLOCKS(t->rows, BODY);
#undef BODY
  }
}

static void tile_s32(const etk_gemm_tile *t) {
  if (t->bits == 8) tile_s32_bits(t, 8);
  else tile_s32_bits(t, 4);
}

#define ETK_NEON_GEMM(text, token, number)                                                                             \
  {                                                                                                                    \
    .name = text, .isa = token, .layout = number, .mr = 8, .nr = PANEL, .bias8 = 128, .lay = lay, .code_at = code_at, \
    .widen = widen, .range = body_range, .quantize = body_quantize, .sum = body_sum, .lay_a = lay_a,                  \
    .tile_f32 = tile_f32, .tile_s32 = tile_s32, .finish = body_finish,                                                \
  }

#endif
