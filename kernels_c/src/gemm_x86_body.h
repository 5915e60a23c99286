/* Tiles of the matrix product for x86, included by one file per instruction set. Internal.
 *
 *   S[r, n] = start[r] + sum_k u[n, k] a[r, k]       u: 0..255, the unsigned operand; a: s8, four at a time to every lane
 *
 * Weights are the unsigned operand, so neither side is shifted: the centre of the codes is taken off through `start`, one number for a row
 * and a run. Bound by vpdpbusd: with 6 x 64 outputs each step of 4 k is 24 of them on 4 loads of weights and 6 broadcasts.
 *
 * The including file defines VI and VF (vectors), LANES, NV (vectors of a pass over the columns), MR (6 or 4), LOAD, SET1, CVT, FMADD,
 * MUL, LOADF, LOADH (f16 to VF), SET1F, STOREF, STOREI, ZEROF, and either DP, DP_AT (broadcast from memory), LOW, HIGH, or OWN_DOTS with
 * its own dot8 and dot4, which may make use of `narrow`: codes of 0..15. */
#include "gemm_body.h"
#include "gemm_quads.h"

enum { COLS = NV * LANES };
/* Bytes to prefetch ahead where few rows make weights come from memory: on Zen 5 the processor's own prefetcher gives 3/4 of that. */
enum { AHEAD = 8192 };
#define ALWAYS static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

#ifndef OWN_DOTS
ALWAYS VI broadcast4(const int8_t *a) {
  int32_t four;
  memcpy(&four, a, 4);
  return SET1(four);
}

/* acc += codes of len k at columns [at, at + COLS). */
ALWAYS void dot8(VI (*acc)[NV], const uint8_t *restrict w, const int8_t *restrict a, int32_t len, const int32_t rows, int32_t narrow) {
  (void)narrow;
  for (int32_t q = 0; q < len / 4; q++, w += 4 * QUADS_NR, a += 4 * rows) {
    if (rows <= 3) UNROLL for (int32_t v = 0; v < NV; v++) __builtin_prefetch(w + AHEAD + v * LANES * 4, 0, 3);
    VI u[NV];
    UNROLL for (int32_t v = 0; v < NV; v++) {
      u[v] = LOAD(w + v * LANES * 4);
      __asm__("" : "+v"(u[v])); /* or gcc loads it again for every row */
    }
    UNROLL for (int32_t r = 0; r < rows; r++) {
      const VI x = broadcast4(a + r * 4);
      UNROLL for (int32_t v = 0; v < NV; v++) acc[r][v] = DP(acc[r][v], u[v], x);
    }
  }
}

/* The same from nibbles, in two steps of 4 k for each load. With many rows the broadcast is left to the operand of vpdpbusd: there are
 * not enough registers to keep twelve of them over the columns. */
ALWAYS void dot4(VI (*acc)[NV], const uint8_t *restrict w, const int8_t *restrict a, int32_t len, const int32_t rows) {
  for (int32_t q = 0; q < len / 8; q++, w += 4 * QUADS_NR, a += 8 * rows) {
    UNROLL for (int32_t v = 0; v < NV; v++) __builtin_prefetch(w + AHEAD + v * LANES * 4, 0, 3);
    UNROLL for (int32_t v = 0; v < NV; v++) {
      const VI two = LOAD(w + v * LANES * 4), low = LOW(two), high = HIGH(two);
      UNROLL for (int32_t r = 0; r < rows; r++)
        acc[r][v] = rows > 2 ? DP_AT(acc[r][v], low, a + r * 4) : DP(acc[r][v], low, broadcast4(a + r * 4));
      UNROLL for (int32_t r = 0; r < rows; r++)
        acc[r][v] = rows > 2 ? DP_AT(acc[r][v], high, a + (rows + r) * 4) : DP(acc[r][v], high, broadcast4(a + (rows + r) * 4));
    }
  }
}

#endif

ALWAYS VF scale_at(const uint8_t *at, int32_t column, int32_t f16) { return f16 ? LOADH(at + column * 2) : LOADF((const float *)(const void *)at + column); }

/* sum += S ws, and R wb with offsets, of one run. keep: c is in registers, not at memory. */
ALWAYS void fold(VF (*c)[NV], float *restrict memory, VI (*acc)[NV], const uint8_t *ws, const uint8_t *wb, const float *rsum, const float *as,
                 int32_t f16, int32_t at, const int32_t rows, const int32_t keep, const int32_t has_wb, const int32_t has_as) {
  UNROLL for (int32_t v = 0; v < NV; v++) {
    const VF s = scale_at(ws, at + v * LANES, f16);
    const VF b = has_wb ? scale_at(wb, at + v * LANES, f16) : s;
    UNROLL for (int32_t r = 0; r < rows; r++) {
      float *to = memory + r * QUADS_NR + v * LANES;
      VF sum = keep ? c[r][v] : LOADF(to);
      sum = FMADD(has_as ? MUL(s, SET1F(as[r])) : s, CVT(acc[r][v]), sum);
      if (has_wb) sum = FMADD(has_as ? MUL(b, SET1F(as[r])) : b, SET1F(rsum[r]), sum);
      if (keep) c[r][v] = sum;
      else STOREF(to, sum);
    }
  }
}

/* c of few rows stays in registers over the runs: a store and a load would be most of the time of a short run. */
ALWAYS void runs_f32(const etk_gemm_tile *t, const int32_t rows, const int32_t bits, int32_t at) {
  const int64_t run_bytes = (int64_t)t->len * QUADS_NR * bits / 8, back = run_bytes * t->per_rec, rec_bytes = t->rec_bytes;
  const int32_t keep = rows <= 3, f16 = t->f16, runs = t->runs, full = t->len, per_rec = t->per_rec, narrow = t->narrow;
  const uint8_t *w = t->w + at * 4, *ws = t->ws, *wb = t->wb;
  const int32_t *start = t->start;
  const float *rsum = t->rsum, *as = t->as;
  const int8_t *a = t->a;
  float *restrict const memory = t->c + at;
  VF c[MR][NV];
  UNROLL for (int32_t r = 0; r < rows; r++)
    UNROLL for (int32_t v = 0; v < NV; v++) {
      if (keep) c[r][v] = t->first ? ZEROF() : LOADF(memory + r * QUADS_NR + v * LANES);
      else if (t->first) STOREF(memory + r * QUADS_NR + v * LANES, ZEROF());
    }
  for (int32_t i = 0, in_rec = 0; i < runs; i++) {
    const int32_t len = i == runs - 1 ? t->last_len : full;
    VI acc[MR][NV];
    UNROLL for (int32_t r = 0; r < rows; r++)
      UNROLL for (int32_t v = 0; v < NV; v++) acc[r][v] = SET1(start[r]);
    if (bits == 8) dot8(acc, w, a, len, rows, narrow);
    else dot4(acc, w, a, len, rows);
    if (as) {
      if (wb) fold(c, memory, acc, ws, wb, rsum, as, f16, at, rows, keep, 1, 1);
      else fold(c, memory, acc, ws, wb, rsum, as, f16, at, rows, keep, 0, 1);
      as += rows;
    } else if (wb) {
      fold(c, memory, acc, ws, wb, rsum, as, f16, at, rows, keep, 1, 0);
    } else {
      fold(c, memory, acc, ws, wb, rsum, as, f16, at, rows, keep, 0, 0);
    }
    start += rows;
    if (rsum) rsum += rows;
    a += (int64_t)full * rows;
    w += run_bytes;
    if (++in_rec == per_rec) {
      in_rec = 0;
      w += rec_bytes - back;
      ws += rec_bytes;
      if (wb) wb += rec_bytes;
    }
  }
  if (keep)
    UNROLL for (int32_t r = 0; r < rows; r++)
      UNROLL for (int32_t v = 0; v < NV; v++) STOREF(memory + r * QUADS_NR + v * LANES, c[r][v]);
}

ALWAYS void run_s32(const etk_gemm_tile *t, const int32_t rows, const int32_t bits, int32_t at) {
  int32_t *restrict const ci = t->ci + at;
  VI acc[MR][NV];
  if (t->first)
    UNROLL for (int32_t r = 0; r < rows; r++)
      UNROLL for (int32_t v = 0; v < NV; v++) acc[r][v] = SET1(t->start[r]);
  else
    UNROLL for (int32_t r = 0; r < rows; r++)
      UNROLL for (int32_t v = 0; v < NV; v++) acc[r][v] = LOAD((const uint8_t *)(ci + r * QUADS_NR + v * LANES));
  if (bits == 8) dot8(acc, t->w + at * 4, t->a, t->len, rows, t->narrow);
  else dot4(acc, t->w + at * 4, t->a, t->len, rows);
  UNROLL for (int32_t r = 0; r < rows; r++)
    UNROLL for (int32_t v = 0; v < NV; v++) STOREI(ci + r * QUADS_NR + v * LANES, acc[r][v]);
}

/* One function for each number of rows, kept apart so that the compiler allots registers to each on its own. */
#define TILE(rows)                                                                               \
  static __attribute__((noinline)) void f32_8_##rows(const etk_gemm_tile *t) {                   \
    for (int32_t at = 0; at < QUADS_NR; at += COLS) runs_f32(t, rows, 8, at);                    \
  }                                                                                              \
  static __attribute__((noinline)) void f32_4_##rows(const etk_gemm_tile *t) {                   \
    for (int32_t at = 0; at < QUADS_NR; at += COLS) runs_f32(t, rows, 4, at);                    \
  }                                                                                              \
  static __attribute__((noinline)) void s32_8_##rows(const etk_gemm_tile *t) {                   \
    for (int32_t at = 0; at < QUADS_NR; at += COLS) run_s32(t, rows, 8, at);                     \
  }                                                                                              \
  static __attribute__((noinline)) void s32_4_##rows(const etk_gemm_tile *t) {                   \
    for (int32_t at = 0; at < QUADS_NR; at += COLS) run_s32(t, rows, 4, at);                     \
  }
TILE(1)
TILE(2)
TILE(3)
TILE(4)
#if MR == 6
TILE(5)
TILE(6)
#define EACH(f) {f##1, f##2, f##3, f##4, f##5, f##6}
#else
#define EACH(f) {f##1, f##2, f##3, f##4}
#endif

typedef void tile_fn(const etk_gemm_tile *t);
static tile_fn *const k_f32[2][MR] = {EACH(f32_8_), EACH(f32_4_)};
static tile_fn *const k_s32[2][MR] = {EACH(s32_8_), EACH(s32_4_)};

static void tile_f32(const etk_gemm_tile *t) { k_f32[t->bits == 4][t->rows - 1](t); }
static void tile_s32(const etk_gemm_tile *t) { k_s32[t->bits == 4][t->rows - 1](t); }
