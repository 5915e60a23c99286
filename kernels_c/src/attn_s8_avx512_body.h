/* Attention for AVX-512 VNNI: the template behind attn_s8_avx512vnni_6x64 and attn_s8_avx512vbmi_6x64. Internal.
 *
 * The including file defines NAME (text), ISA and LOOK_UP(words0, words1): 64 table indices as 2 x 32 words to 64 bytes.
 *
 *   S[i,j] = sum_c q[i,c] k[j,c]: vpdpbusd with u8 K (k + 128) and s8 q broadcast from memory; accumulators start at
 *   -128 sum(q), which makes the offset vanish.   O += (w sv) (P V): vpdpbusd with u8 P broadcast and s8 V.
 *
 * Tile 6 x 64: 24 accumulators, 4 vectors of K (V), one broadcast. Bound by vpdpbusd: 2 x 384 for d = dv = 64.
 * K page [d/4][64][4] u8, V page [16 quads][dv][4] s8. Packing four vectors of 16 words into bytes interleaves keys by
 * 128-bit lanes; the quads of the V page stand in that order (quad t of the page holds keys 4 (4 (t % 4) + t / 4) ..). */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "attn_kernel.h"
#include "attn_lut.h"
#include "half.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { MR = 6, NV = 4 /* vectors across the 64 keys, or across 64 channels */ };

/* Instructions by name: given arrays of intrinsics, gcc 12 copies accumulators between registers. */
#define DOT(acc, u8, s8) __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u8), "v"(s8))
#define FMA(acc, a, b) __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b))

/* 2^x for x <= 0, |error| < 1.6e-7 of it; 2^0 = 1 and 2^-inf = 0 exactly. */
INLINE __m512 exp2_ps(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-1000.0f));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(1.32647273e-3f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.67151299e-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.55073358e-2f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.40222424e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93147004e-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

/* Lane i of the result: the largest (sum) of the 16 lanes of v[i], i < R <= 8. Log steps shared by four rows. */
#define ACROSS(name, type, op, lo32, hi32, lo64, hi64, shuffle, zero)                                     \
  INLINE type name##4(type a, type b, type c, type d) {                                                   \
    const type s = op(lo32(a, b), hi32(a, b)), t = op(lo32(c, d), hi32(c, d));                            \
    const type u = op(lo64(s, t), hi64(s, t));                                                            \
    const type v = op(u, shuffle(u, u, 0x4e));                                                            \
    return op(v, shuffle(v, v, 0xb1));                                                                    \
  }                                                                                                       \
  INLINE type name(const type *v, int R) {                                                                \
    const type z = zero;                                                                                  \
    const type lo = name##4(v[0], R > 1 ? v[1] : z, R > 2 ? v[2] : z, R > 3 ? v[3] : z);                  \
    if (R <= 4) return lo;                                                                                \
    return shuffle(lo, name##4(v[4], R > 5 ? v[5] : z, z, z), 0x44);                                      \
  }
ACROSS(max_across, __m512i, _mm512_max_epi32, _mm512_unpacklo_epi32, _mm512_unpackhi_epi32, _mm512_unpacklo_epi64,
       _mm512_unpackhi_epi64, _mm512_shuffle_i32x4, _mm512_setzero_si512())
ACROSS(sum_across, __m512i, _mm512_add_epi32, _mm512_unpacklo_epi32, _mm512_unpackhi_epi32, _mm512_unpacklo_epi64,
       _mm512_unpackhi_epi64, _mm512_shuffle_i32x4, _mm512_setzero_si512())
#define LOPD(a, b) _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)))
#define HIPD(a, b) _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)))
ACROSS(fmax_across, __m512, _mm512_max_ps, _mm512_unpacklo_ps, _mm512_unpackhi_ps, LOPD, HIPD, _mm512_shuffle_f32x4,
       _mm512_setzero_ps())
ACROSS(fsum_across, __m512, _mm512_add_ps, _mm512_unpacklo_ps, _mm512_unpackhi_ps, LOPD, HIPD, _mm512_shuffle_f32x4,
       _mm512_setzero_ps())
/* Rows 0-3 lie in lanes 0-3, rows 4-5 in lanes 8-9: the shuffle above puts 128-bit pairs (lo, lo, hi, hi). */
INLINE int lane_of(int row) { return row < 4 ? row : row + 4; }
INLINE __mmask16 lanes_of(int R) { return (__mmask16)(R <= 4 ? (1 << R) - 1 : 15 | ((1 << (R - 4)) - 1) << 8); }

/* State of up to 6 rows, in lanes; the pointers hold them densely. */
INLINE __m512 load_rows(const float *x, int R) {
  const __m512 dense = _mm512_maskz_loadu_ps((__mmask16)((1 << R) - 1), x);
  return R <= 4 ? dense : _mm512_shuffle_f32x4(dense, dense, 0xdc); /* 128-bit parts 0, 3, 1, 3 */
}
INLINE void store_rows(float *x, __m512 v, int R) { /* not by vpcompressd, which is slow to memory */
  _mm512_mask_storeu_ps(x, (__mmask16)((1 << R) - 1), R <= 4 ? v : _mm512_shuffle_f32x4(v, v, 0x08));
}

/* Rows meet a tile with maxima mt (lanes in `seen` only): new m, factors a of the old state and w of the tile. */
INLINE void meet(const etk_strip *s, __m512 mt, __mmask16 seen, int R, __m512 *a, __m512 *w) {
  const __m512 m = load_rows(s->m, R), mn = _mm512_mask_max_ps(m, seen, m, mt);
  *a = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), seen, exp2_ps(_mm512_sub_ps(m, mn)));
  *w = _mm512_maskz_mov_ps(seen, exp2_ps(_mm512_sub_ps(mt, mn)));
  store_rows(s->m, mn, R);
}
INLINE void meet_sum(const etk_strip *s, __m512 a, __m512 w, __m512 sum, int R) {
  store_rows(s->l, _mm512_fmadd_ps(w, sum, _mm512_mul_ps(a, load_rows(s->l, R))), R);
}

/* ---- INT8 ---- */

INLINE void qk(const etk_strip *s, __m512i acc[MR][NV], int R) {
  const uint8_t *k = s->k;
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < NV; j++) acc[i][j] = _mm512_set1_epi32(s->q_start[i]);
  const int8_t *q = s->q;
  const int64_t stride = s->d_pad;
  for (int32_t c = 0; c < s->d_pad; c += 4, k += 256, q += 4) {
    const __m512i k0 = _mm512_load_si512(k), k1 = _mm512_load_si512(k + 64), k2 = _mm512_load_si512(k + 128),
                  k3 = _mm512_load_si512(k + 192);
    UNROLL for (int i = 0; i < R; i++) {
      int32_t word;
      memcpy(&word, q + i * stride, 4);
      const __m512i b = _mm512_set1_epi32(word);
      DOT(acc[i][0], k0, b);
      DOT(acc[i][1], k1, b);
      DOT(acc[i][2], k2, b);
      DOT(acc[i][3], k3, b);
    }
  }
}

/* n vectors of 16 channels from c on: o = a o + (w sv) (P V), P [R][64] bytes in page order. */
INLINE void pv(const etk_strip *s, const uint8_t *p, const float *a, const float *w, int32_t c, int R, int n, int scale) {
  __m512i acc[MR][NV];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < n; j++) acc[i][j] = _mm512_setzero_si512();
  const int8_t *v = (const int8_t *)s->v + (int64_t)c * 4;
  const int64_t stride = (int64_t)s->dv_pad * 4;
  for (int32_t t = 0; t < 64; t += 4, v += stride) {
    __m512i vv[NV];
    UNROLL for (int j = 0; j < n; j++) vv[j] = _mm512_load_si512(v + 64 * j);
    UNROLL for (int i = 0; i < R; i++) {
      int32_t word;
      memcpy(&word, p + i * 64 + t, 4);
      const __m512i b = _mm512_set1_epi32(word);
      UNROLL for (int j = 0; j < n; j++) DOT(acc[i][j], b, vv[j]);
    }
  }
  __m512 sv[NV];
  UNROLL for (int j = 0; j < n; j++) sv[j] = _mm512_loadu_ps(s->sv + c + 16 * j);
  UNROLL for (int i = 0; i < R; i++) {
    float *o = s->o + (int64_t)i * s->dv_pad + c;
    const __m512 wi = _mm512_set1_ps(w[i]), ai = scale ? _mm512_set1_ps(a[i]) : wi;
    UNROLL for (int j = 0; j < n; j++) {
      const __m512 old = _mm512_loadu_ps(o + 16 * j);
      _mm512_storeu_ps(o + 16 * j, _mm512_fmadd_ps(_mm512_mul_ps(wi, sv[j]), _mm512_cvtepi32_ps(acc[i][j]),
                                                   scale ? _mm512_mul_ps(ai, old) : old));
    }
  }
}

INLINE void pv_all(const etk_strip *s, const uint8_t *p, const float *a, const float *w, int R, int scale) {
  int32_t c = 0;
  for (; c + 64 <= s->dv_pad; c += 64) pv(s, p, a, w, c, R, 4, scale);
  if (c + 32 <= s->dv_pad) pv(s, p, a, w, c, R, 2, scale), c += 32;
  if (c < s->dv_pad) pv(s, p, a, w, c, R, 1, scale);
}

/* 64 table indices, as 4 vectors of s32 in 0..255, to P in page order. */
INLINE __m512i to_p(__m512i a, __m512i b, __m512i c, __m512i d) {
  return LOOK_UP(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}
/* rint(min(below * step, 255)); NaN gives 255. Without `clamp` the packs that follow saturate instead, which is right
 * as long as the product fits 31 bits: below <= 2 * 127 * 127 * 1024 and step < 64. */
INLINE __m512i step_of(__m512i below, __m512 step, int clamp) {
  const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(below), step);
  return _mm512_cvtps_epi32(clamp ? _mm512_min_ps(x, _mm512_set1_ps(255.0f)) : x);
}

/* S to P and its sums: four partial sums of a row in each 128-bit lane. */
INLINE void look_up_rows(const etk_strip *s, uint8_t *p, __m512i acc[MR][NV], __m512i *sum, const int32_t *high,
                         const float *step, int R, int masked, int clamp) {
  UNROLL for (int i = 0; i < R; i++) {
    const __m512i t = _mm512_set1_epi32(high[lane_of(i)]);
    const __m512 c = _mm512_set1_ps(step[lane_of(i)]);
    __m512i x[NV];
    UNROLL for (int j = 0; j < NV; j++) {
      x[j] = step_of(_mm512_sub_epi32(t, acc[i][j]), c, clamp);
      if (masked) x[j] = _mm512_mask_mov_epi32(_mm512_set1_epi32(255), (__mmask16)(s->mask[i] >> 16 * j), x[j]);
    }
    const __m512i row = to_p(x[0], x[1], x[2], x[3]);
    _mm512_store_si512(p + 64 * i, row);
    sum[i] = _mm512_setzero_si512();
    DOT(sum[i], row, _mm512_set1_epi8(1));
  }
}

INLINE void strip(const etk_strip *s, int R, int masked) {
  __m512i acc[MR][NV], top[MR], sum[MR];
  uint8_t p[MR * 64] __attribute__((aligned(64)));
  float a[16], w[16], step[16] __attribute__((aligned(64)));
  int32_t high[16] __attribute__((aligned(64)));
  qk(s, acc, R);
  const __m512i least = _mm512_set1_epi32(INT32_MIN);
  UNROLL for (int i = 0; i < R; i++) {
    if (masked) {
      const uint64_t m = s->mask[i];
      UNROLL for (int j = 0; j < NV; j++) acc[i][j] = _mm512_mask_mov_epi32(least, (__mmask16)(m >> 16 * j), acc[i][j]);
    }
    top[i] = _mm512_max_epi32(_mm512_max_epi32(acc[i][0], acc[i][1]), _mm512_max_epi32(acc[i][2], acc[i][3]));
  }
  const __m512i tops = max_across(top, R);
  const __mmask16 seen = masked ? _mm512_mask_cmpneq_epi32_mask(lanes_of(R), tops, least) : lanes_of(R);
  const __m512 g = load_rows(s->g, R), mt = _mm512_mul_ps(_mm512_cvtepi32_ps(tops), g);
  if (__builtin_expect(s->skip_log2 != 0.0f, 0)) {
    const __m512 edge = _mm512_sub_ps(load_rows(s->m, R), _mm512_set1_ps(s->skip_log2));
    if (!_mm512_mask_cmp_ps_mask(seen, mt, edge, _CMP_NLT_UQ)) return;
  }
  if (masked && !seen) return;
  _mm512_store_si512(high, tops);
  _mm512_store_ps(step, _mm512_mul_ps(_mm512_set1_ps((float)ETK_STEP), g));
  if (_mm512_mask_cmp_ps_mask(lanes_of(R), g, _mm512_set1_ps(64.0f / ETK_STEP), _CMP_NLT_UQ))
    look_up_rows(s, p, acc, sum, high, step, R, masked, 1);
  else
    look_up_rows(s, p, acc, sum, high, step, R, masked, 0);
  __m512 av, wv;
  meet(s, mt, seen, R, &av, &wv);
  meet_sum(s, av, wv, _mm512_cvtepi32_ps(sum_across(sum, R)), R);
  store_rows(w, wv, R);
  if (_mm512_mask_cmp_ps_mask(lanes_of(R), av, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ)) {
    store_rows(a, av, R);
    pv_all(s, p, a, w, R, 1);
  } else {
    pv_all(s, p, a, w, R, 0);
  }
}

/* The general softmax, one row at a time: y in log2 units. */
static void softmax_u8(const etk_strip *s, const float *y, uint8_t *p, float *w) {
  for (int32_t i = 0; i < s->rows; i++, y += 64, p += 64) {
    __m512 v[NV], top[1];
    UNROLL for (int j = 0; j < NV; j++) v[j] = _mm512_loadu_ps(y + 16 * j);
    top[0] = _mm512_max_ps(_mm512_max_ps(v[0], v[1]), _mm512_max_ps(v[2], v[3]));
    const float mt = _mm512_reduce_max_ps(top[0]);
    w[i] = 0.0f;
    if (mt == -INFINITY) {
      memset(p, 0, 64);
      continue;
    }
    __m512i x[NV];
    UNROLL for (int j = 0; j < NV; j++)
      x[j] = _mm512_cvtps_epi32(_mm512_min_ps(
          _mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(mt), v[j]), _mm512_set1_ps((float)ETK_STEP)), _mm512_set1_ps(255.0f)));
    const __m512i row = to_p(x[0], x[1], x[2], x[3]);
    _mm512_storeu_si512(p, row);
    const float sum = (float)_mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), row, _mm512_set1_epi8(1)));
    const float mn = s->m[i] > mt ? s->m[i] : mt;
    const float a = _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(s->m[i] - mn)));
    w[i] = _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(mt - mn)));
    s->l[i] = a * s->l[i] + w[i] * sum;
    s->m[i] = mn;
    float *o = s->o + (int64_t)i * s->dv_pad;
    for (int32_t c = 0; c < s->dv_pad; c += 16) _mm512_storeu_ps(o + c, _mm512_mul_ps(_mm512_set1_ps(a), _mm512_loadu_ps(o + c)));
  }
}

/* ---- float ---- */

INLINE void qkf(const etk_strip *s, __m512 acc[MR][NV], int R) {
  const float *k = s->k, *q = s->qf;
  const int64_t stride = s->d_pad;
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < NV; j++) acc[i][j] = _mm512_setzero_ps();
  for (int32_t c = 0; c < s->d_pad; c++, k += 64, q++) {
    const __m512 k0 = _mm512_load_ps(k), k1 = _mm512_load_ps(k + 16), k2 = _mm512_load_ps(k + 32), k3 = _mm512_load_ps(k + 48);
    UNROLL for (int i = 0; i < R; i++) {
      const __m512 b = _mm512_set1_ps(q[i * stride]);
      FMA(acc[i][0], b, k0);
      FMA(acc[i][1], b, k1);
      FMA(acc[i][2], b, k2);
      FMA(acc[i][3], b, k3);
    }
  }
}

/* o = a o + P V for n vectors of 16 channels. */
INLINE void pvf(const etk_strip *s, const float *p, const float *a, int32_t c, int R, int n) {
  __m512 acc[MR][NV];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < n; j++)
      acc[i][j] = _mm512_mul_ps(_mm512_set1_ps(a[i]), _mm512_loadu_ps(s->o + (int64_t)i * s->dv_pad + c + 16 * j));
  const float *v = (const float *)s->v + c;
  for (int32_t t = 0; t < 64; t++, v += s->dv_pad) {
    __m512 vv[NV];
    UNROLL for (int j = 0; j < n; j++) vv[j] = _mm512_loadu_ps(v + 16 * j);
    UNROLL for (int i = 0; i < R; i++) {
      const __m512 b = _mm512_set1_ps(p[i * 64 + t]);
      UNROLL for (int j = 0; j < n; j++) FMA(acc[i][j], b, vv[j]);
    }
  }
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < n; j++)
      _mm512_storeu_ps(s->o + (int64_t)i * s->dv_pad + c + 16 * j, acc[i][j]);
}

INLINE void pvf_all(const etk_strip *s, const float *p, const float *a, int R) {
  int32_t c = 0;
  for (; c + 64 <= s->dv_pad; c += 64) pvf(s, p, a, c, R, 4);
  if (c + 32 <= s->dv_pad) pvf(s, p, a, c, R, 2), c += 32;
  if (c < s->dv_pad) pvf(s, p, a, c, R, 1);
}

/* y to p relative to the new maximum; updates m and l, gives the factors a. 0 when no row needs this tile. */
INLINE int soften(const etk_strip *s, __m512 y[MR][NV], float *p, float *a, int R, float skip) {
  __m512 top[MR], sum[MR];
  float next[16] __attribute__((aligned(64)));
  UNROLL for (int i = 0; i < R; i++)
    top[i] = _mm512_max_ps(_mm512_max_ps(y[i][0], y[i][1]), _mm512_max_ps(y[i][2], y[i][3]));
  const __m512 mt = fmax_across(top, R), m = load_rows(s->m, R);
  const __mmask16 seen = _mm512_mask_cmp_ps_mask(lanes_of(R), mt, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
  if (skip != 0.0f && !_mm512_mask_cmp_ps_mask(seen, mt, _mm512_sub_ps(m, _mm512_set1_ps(skip)), _CMP_NLT_UQ)) return 0;
  const __m512 mn = _mm512_mask_max_ps(m, seen, m, mt);
  const __m512 av = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), seen, exp2_ps(_mm512_sub_ps(m, mn)));
  _mm512_store_ps(next, _mm512_mask_mov_ps(_mm512_setzero_ps(), seen, mn)); /* -inf - 0 = -inf: P = 0 */
  UNROLL for (int i = 0; i < R; i++) {
    const __m512 mi = _mm512_set1_ps(next[lane_of(i)]);
    __m512 e[NV];
    UNROLL for (int j = 0; j < NV; j++) {
      e[j] = exp2_ps(_mm512_sub_ps(y[i][j], mi));
      _mm512_storeu_ps(p + 64 * i + 16 * j, e[j]);
    }
    sum[i] = _mm512_add_ps(_mm512_add_ps(e[0], e[1]), _mm512_add_ps(e[2], e[3]));
  }
  store_rows(s->l, _mm512_fmadd_ps(av, load_rows(s->l, R), fsum_across(sum, R)), R);
  store_rows(s->m, mn, R);
  store_rows(a, av, R);
  return 1;
}

INLINE void stripf(const etk_strip *s, int R, int masked) {
  __m512 y[MR][NV];
  float p[MR * 64] __attribute__((aligned(64))), a[16];
  qkf(s, y, R);
  if (masked)
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < NV; j++)
        y[i][j] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(s->mask[i] >> 16 * j), y[i][j]);
  if (soften(s, y, p, a, R, s->skip_log2)) pvf_all(s, p, a, R);
}

INLINE void softenf(const etk_strip *s, const float *y, float *p, int R) {
  __m512 v[MR][NV];
  float a[16];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < NV; j++) v[i][j] = _mm512_loadu_ps(y + 64 * i + 16 * j);
  soften(s, v, p, a, R, 0.0f);
  for (int i = 0; i < R; i++)
    for (int32_t c = 0; c < s->dv_pad; c += 16) {
      float *o = s->o + (int64_t)i * s->dv_pad + c;
      _mm512_storeu_ps(o, _mm512_mul_ps(_mm512_set1_ps(a[i]), _mm512_loadu_ps(o)));
    }
}

/* ---- the table: one body for each number of rows ---- */

static const float k_ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

#define ROWS(R)                                                                                            \
  static void strip_##R(const etk_strip *s) { s->mask ? strip(s, R, 1) : strip(s, R, 0); }                 \
  static void stripf_##R(const etk_strip *s) { s->mask ? stripf(s, R, 1) : stripf(s, R, 0); }              \
  static void qk_##R(const etk_strip *s, int32_t *out) {                                                   \
    __m512i acc[MR][NV];                                                                                   \
    qk(s, acc, R);                                                                                         \
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < NV; j++)                                 \
        _mm512_storeu_si512(out + 64 * i + 16 * j, acc[i][j]);                                             \
  }                                                                                                        \
  static void qkf_##R(const etk_strip *s, float *out) {                                                    \
    __m512 acc[MR][NV];                                                                                    \
    qkf(s, acc, R);                                                                                        \
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < NV; j++)                                 \
        _mm512_storeu_ps(out + 64 * i + 16 * j, acc[i][j]);                                                \
  }                                                                                                        \
  static void pv_##R(const etk_strip *s, const uint8_t *p, const float *w) { pv_all(s, p, w, w, R, 0); }   \
  static void pvf_##R(const etk_strip *s, const float *p) { pvf_all(s, p, k_ones, R); }                    \
  static void soft_##R(const etk_strip *s, const float *y, float *p) { softenf(s, y, p, R); }
ROWS(1)
ROWS(2)
ROWS(3)
ROWS(4)
ROWS(5)
ROWS(6)

#define BY_ROWS(name, call)                                              \
  switch (s->rows) {                                                     \
    case 1: name##_1 call; break;                                        \
    case 2: name##_2 call; break;                                        \
    case 3: name##_3 call; break;                                        \
    case 4: name##_4 call; break;                                        \
    case 5: name##_5 call; break;                                        \
    default: name##_6 call;                                              \
  }
static void strip_s8(const etk_strip *s) { BY_ROWS(strip, (s)) }
static void qk_s8(const etk_strip *s, int32_t *out) { BY_ROWS(qk, (s, out)) }
static void pv_s8(const etk_strip *s, const uint8_t *p, const float *w) { BY_ROWS(pv, (s, p, w)) }
static void strip_f32(const etk_strip *s) { BY_ROWS(stripf, (s)) }
static void qk_f32(const etk_strip *s, float *y) { BY_ROWS(qkf, (s, y)) }
static void softmax_f32(const etk_strip *s, const float *y, float *p) { BY_ROWS(soft, (s, y, p)) }
static void pv_f32(const etk_strip *s, const float *p) { BY_ROWS(pvf, (s, p)) }

#include "attn_block_avx512_body.h"
#include "attn_pack_avx512_body.h"

static const uint8_t k_p_order[64] = {
    0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51, 4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39, 52, 53, 54, 55,
    8, 9, 10, 11, 24, 25, 26, 27, 40, 41, 42, 43, 56, 57, 58, 59, 12, 13, 14, 15, 28, 29, 30, 31, 44, 45, 46, 47, 60, 61, 62, 63,
};

extern const etk_attn_kernel KERNEL;
const etk_attn_kernel KERNEL = {
    .name = NAME, .isa = ISA, .mr = MR, .p_max = 255, .layout = 1, .p_order = k_p_order, .quant_q = quant_q,
    .pack_k = pack_k, .pack_v = pack_v, .lay_k = lay_k, .lay_v = lay_v, .read_k = read_k, .read_v = read_v,
    .strip_s8 = strip_s8, .block_s8 = block_s8, .block_f32 = block_f32, .qk_s8 = qk_s8, .softmax_u8 = softmax_u8, .pv_s8 = pv_s8, .strip_f32 = strip_f32,
    .qk_f32 = qk_f32, .softmax_f32 = softmax_f32, .pv_f32 = pv_f32,
};
