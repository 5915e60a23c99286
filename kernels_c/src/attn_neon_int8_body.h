/* INT8 strips for NEON, over the tile of the file that includes this. Before it, that file defines
 *   TILE_ROWS                      rows of the largest tile, 8 or 4
 *   TILE_VECTORS(rows)             columns of a tile, in vectors of four
 *   tile(a, lda, b, ldb, col, k, rows, c)   c[r][v] += sum over k of rows a x columns of b
 *   PV_TILE                        the same for P V
 *   P_SIGNED                       P is stored as P - 128 (the tile multiplies s8 x s8), else as u8
 *   Q_WORK, prepare_rows           bytes per row that the tile wants for its rows, and what copies them; 0: as they are
 *   LD_K(d_pad), LD_V(dv_pad)      the step ldb of the two page layouts
 *   row_sum(acc, p)                acc += sums of the 16 bytes of P, in four lanes
 * The table softmax looks up 16 codes with one `tbl` and three `tbx` of four registers each. */
#include "attn_neon_base.h"

/* Run body(rows) over blocks of rows: as many of TILE_ROWS as fit, then 4, 2, 1. Row r is the first of the block. */
#define ROW_BLOCKS(count, body)                                          \
  do {                                                                   \
    int32_t r = 0;                                                       \
    for (; r + TILE_ROWS <= (count); r += TILE_ROWS) body(TILE_ROWS);    \
    if (TILE_ROWS > 4 && r + 4 <= (count)) { body(4); r += 4; }          \
    if (r + 2 <= (count)) { body(2); r += 2; }                           \
    if (r < (count)) body(1);                                            \
  } while (0)

INLINE void qk_block(const int8_t *restrict q, const etk_strip *a, int32_t *restrict s, const int rows) {
  const int vectors = TILE_VECTORS(rows);
  for (size_t n = 0; n < ETK_PAGE; n += 4 * (size_t)vectors) {
    int32x4_t c[8][4];
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int v = 0; v < vectors; v++) c[r][v] = vdupq_n_s32(0);
    tile(q, (size_t)a->d_pad, a->k, LD_K((size_t)a->d_pad), n, a->d_pad, rows, c);
    UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int v = 0; v < vectors; v++) vst1q_s32(s + r * ETK_PAGE + n + 4 * (size_t)v, c[r][v]);
  }
}

static void qk_s8(const etk_strip *a, int32_t *s) {
#if Q_WORK
  int8_t q[STRIP * MAX_WIDTH];
  prepare_rows(a->q, a->rows, a->d_pad, q);
#else
  const int8_t *q = a->q;
#endif
#define BODY(rows) qk_block(q + (size_t)r * (size_t)a->d_pad, a, s + r * ETK_PAGE, rows)
  ROW_BLOCKS(a->rows, BODY);
#undef BODY
}

/* O = old O + (w sv) (P V) for a block of rows; old NULL: all 1. */
INLINE void pv_block(const etk_strip *a, const int8_t *restrict p, const float *restrict old, const float *restrict w,
                     float *restrict o, const int rows) {
  const size_t width = (size_t)a->dv_pad;
  const int vectors = TILE_VECTORS(rows);
  for (size_t n = 0; n < width; n += 4 * (size_t)vectors) {
    int32x4_t c[8][4];
    UNROLL for (int v = 0; v < vectors; v++) {
      const int32x4_t start = P_SIGNED ? vshlq_n_s32(vld1q_s32(a->v_colsum + n + 4 * (size_t)v), 7) : vdupq_n_s32(0);
      UNROLL for (int r = 0; r < rows; r++) c[r][v] = start;
    }
    PV_TILE(p, ETK_PAGE, a->v, LD_V(width), n, ETK_PAGE, rows, c);
    UNROLL for (int v = 0; v < vectors; v++) {
      const float32x4_t sv = vld1q_f32(a->sv + n + 4 * (size_t)v);
      UNROLL for (int r = 0; r < rows; r++) {
        float *at = o + (size_t)r * width + n + 4 * (size_t)v;
        float32x4_t x = vld1q_f32(at);
        if (old) x = vmulq_n_f32(x, old[r]);
        vst1q_f32(at, vfmaq_f32(x, vmulq_n_f32(sv, w[r]), vcvtq_f32_s32(c[r][v])));
      }
    }
  }
}

static void pv_rows(const etk_strip *a, const int8_t *p, const float *old, const float *w) {
#if Q_WORK
  int8_t ready[STRIP * ETK_PAGE];
  prepare_rows(p, a->rows, ETK_PAGE, ready);
  p = ready;
#endif
#define AT(x) ((x) + (size_t)r * (size_t)a->dv_pad)
#define BODY(rows) pv_block(a, p + r * ETK_PAGE, old ? old + r : NULL, w + r, AT(a->o), rows)
  ROW_BLOCKS(a->rows, BODY);
#undef BODY
#undef AT
}

/* ---- softmax by table ---- */

/* y[i] = LUT[x[i]] for 64 bytes. Part by part: all 256 entries at once are half the registers, and GCC spills them. */
INLINE void look_up(const uint8_t *lut, uint8x16_t x[4], uint8x16_t y[4]) {
  uint8x16x4_t part = vld1q_u8_x4(lut);
  UNROLL for (int i = 0; i < 4; i++) y[i] = vqtbl4q_u8(part, x[i]);
  UNROLL for (int t = 64; t < 256; t += 64) {
    part = vld1q_u8_x4(lut + t);
    UNROLL for (int i = 0; i < 4; i++) {
      x[i] = vsubq_u8(x[i], vdupq_n_u8(64));
      y[i] = vqtbx4q_u8(y[i], part, x[i]);
    }
  }
}

/* rint(min(x, 255)) as 16 bytes; NaN counts as 255, as in the scalar kernel. */
INLINE uint8x16_t index_of(const float32x4_t x[4]) {
  uint32x4_t n[4];
  UNROLL for (int i = 0; i < 4; i++) n[i] = vcvtnq_u32_f32(vminnmq_f32(x[i], vdupq_n_f32(255.0f)));
  const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(n[0]), vreinterpretq_u16_u32(n[1]));
  const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(n[2]), vreinterpretq_u16_u32(n[3]));
  return vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
}

INLINE int32_t row_max(const int32_t *s, uint64_t mask) {
  int32x4_t top = vdupq_n_s32(INT32_MIN);
  if (mask == ~UINT64_C(0)) {
    int32x4_t more = vld1q_s32(s + 4);
    top = vld1q_s32(s);
    UNROLL for (int j = 8; j < ETK_PAGE; j += 8) {
      top = vmaxq_s32(top, vld1q_s32(s + j));
      more = vmaxq_s32(more, vld1q_s32(s + j + 4));
    }
    return vmaxvq_s32(vmaxq_s32(top, more));
  }
  const int32x4_t low = top;
  for (int j = 0; j < ETK_PAGE; j += 16) {
    uint32x4_t seen[4];
    mask_words(mask_bytes((uint32_t)(mask >> j)), seen);
    UNROLL for (int i = 0; i < 4; i++) top = vmaxq_s32(top, vbslq_s32(seen[i], vld1q_s32(s + j + 4 * i), low));
  }
  return vmaxvq_s32(top);
}

/* One row of P from 64 values x >= 0 (28 times the distance to the maximum), got 4 at a time by `load`; returns the sum. */
#define P_ROW(load, mask, out, sum)                                                               \
  do {                                                                                            \
    uint32x4_t acc = vdupq_n_u32(0);                                                              \
    uint8x16_t index[4], found[4];                                                                \
    UNROLL for (int j = 0; j < 4; j++) {                                                          \
      float32x4_t x[4];                                                                           \
      UNROLL for (int i = 0; i < 4; i++) x[i] = load(16 * j + 4 * i);                             \
      index[j] = index_of(x);                                                                     \
    }                                                                                             \
    look_up(etk_lut_255, index, found);                                                           \
    UNROLL for (int j = 0; j < 4; j++) {                                                          \
      if ((mask) != ~UINT64_C(0)) found[j] = vandq_u8(found[j], mask_bytes((uint32_t)((mask) >> 16 * j))); \
      acc = row_sum(acc, found[j]);                                                               \
      vst1q_u8((out) + 16 * j, found[j]);                                                         \
    }                                                                                             \
    sum = (float)vaddvq_u32(acc);                                                                 \
  } while (0)

/* P of the rows whose tile maximum is top (INT32_MIN: none visible, P = 0), and the row sums. */
static void p_rows(const etk_strip *a, const int32_t *s, const int32_t *top, uint8_t *p, float *sum) {
  for (int32_t r = 0; r < a->rows; r++, s += ETK_PAGE, p += ETK_PAGE) {
    const float32x4_t step = vdupq_n_f32((float)ETK_STEP * a->g[r]);
    const int32x4_t most = vdupq_n_s32(top[r]);
    const uint64_t mask = a->mask ? a->mask[r] : ~UINT64_C(0);
#define LOAD(at) vmulq_f32(vcvtq_f32_s32(vsubq_s32(most, vld1q_s32(s + (at)))), step)
    if (mask == ~UINT64_C(0)) P_ROW(LOAD, ~UINT64_C(0), p, sum[r]);
    else P_ROW(LOAD, mask, p, sum[r]);
#undef LOAD
  }
}

/* l = old l + w sum. */
INLINE void add_sums(const etk_strip *a, const float *old, const float *w, const float *sum) {
  for (int32_t r = 0; r < a->rows; r++) a->l[r] = old[r] * a->l[r] + w[r] * sum[r];
}

INLINE void to_signed(uint8_t *p, int32_t rows) {
  if (P_SIGNED)
    for (int32_t i = 0; i < rows * ETK_PAGE; i += 16) vst1q_u8(p + i, veorq_u8(vld1q_u8(p + i), vdupq_n_u8(128)));
}

static void strip_s8(const etk_strip *a) {
  int32_t s[STRIP * ETK_PAGE], top[STRIP];
  uint8_t p[STRIP * ETK_PAGE];
  float mt[STRIP], old[STRIP], w[STRIP], sum[STRIP];
  int needed = a->skip_log2 == 0.0f;
  qk_s8(a, s);
  for (int32_t r = 0; r < STRIP; r++) {
    top[r] = INT32_MIN;
    mt[r] = -INFINITY;
    if (r >= a->rows) continue;
    top[r] = row_max(s + r * ETK_PAGE, a->mask ? a->mask[r] : ~UINT64_C(0));
    if (top[r] == INT32_MIN) continue;
    mt[r] = (float)top[r] * a->g[r];
    if (!(mt[r] < a->m[r] - a->skip_log2)) needed = 1;
  }
  if (!needed) return;
  p_rows(a, s, top, p, sum);
  const int grown = meet(a, mt, old, w);
  add_sums(a, old, w, sum);
  to_signed(p, a->rows);
  pv_rows(a, (const int8_t *)p, grown ? old : NULL, w);
}

static void softmax_u8(const etk_strip *a, const float *y, uint8_t *p, float *w) {
  float mt[STRIP], old[STRIP], weight[STRIP], sum[STRIP];
  for (int32_t r = 0; r < STRIP; r++) mt[r] = -INFINITY;
  for (int32_t r = 0; r < a->rows; r++, y += ETK_PAGE, p += ETK_PAGE) {
    float32x4_t top = vdupq_n_f32(-INFINITY);
    for (int j = 0; j < ETK_PAGE; j += 4) top = vmaxnmq_f32(top, vld1q_f32(y + j));
    mt[r] = vmaxnmvq_f32(top);
    sum[r] = 0.0f;
    if (mt[r] == -INFINITY) {
      memset(p, 0, ETK_PAGE);
      continue;
    }
    const float32x4_t most = vdupq_n_f32(mt[r]);
#define LOAD(at) vmulq_n_f32(vsubq_f32(most, vld1q_f32(y + (at))), (float)ETK_STEP)
    P_ROW(LOAD, ~UINT64_C(0), p, sum[r]);
#undef LOAD
  }
  if (meet(a, mt, old, weight)) scale_rows(a, old);
  add_sums(a, old, weight, sum);
  memcpy(w, weight, (size_t)a->rows * sizeof *w);
}

static void pv_s8(const etk_strip *a, const uint8_t *p, const float *w) {
  uint8_t own[STRIP * ETK_PAGE];
  memcpy(own, p, (size_t)a->rows * ETK_PAGE);
  to_signed(own, a->rows);
  pv_rows(a, (const int8_t *)own, NULL, w);
}
