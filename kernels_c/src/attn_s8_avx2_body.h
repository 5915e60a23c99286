/* Attention for 256-bit vectors: the template behind attn_s8_avx2_6x8 and attn_s8_avxvnni_6x16. Internal.
 *
 * The including file defines KERNEL, NAME (text), ISA, LAYOUT, U8_K (1: K codes are k + 128), P_MAX, QK_NV (vectors of 8
 * keys a full QK tile has), P_ROUND and the tables k_high and k_low (see look_up), and
 * these types and macros.
 *   qk_vec, QK_VEC(k)          a loaded vector of K, prepared once for all rows
 *   QK_DOT(acc, qk_vec, q)     acc[lane] += sum of 4 products of K and the broadcast quad q
 *   PV_DOT(acc, p, v)          acc[lane] += sum of 4 products of u8 P (broadcast quad) and s8 V
 *
 *   S[i,j] = sum_c q[i,c] k[j,c]  (u8 K: accumulators start at -128 sum(q));  O += (w sv) (P V)
 *
 * K page [d/4][64][4], V page [16 quads][dv][4]. S goes through L1, since 16 registers do not hold it. Packing
 * words into bytes interleaves quads of keys; P and the quads of the V page stand in the order that the AVX-512 kernels
 * have (quad t holds keys 4 (4 (t % 4) + t / 4) ..): vectors 0, 2, 4, 6 of S are packed together, then 1, 3, 5, 7. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "attn_kernel.h"
#include "attn_lut.h"
#include "half.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { MR = 6 };

typedef struct tile_rows { /* what the softmax hands to PV */
  uint8_t p[MR * 64];
  float a[8], w[8];
} __attribute__((aligned(32))) tile_rows;

INLINE __m256i quad_of(const void *at) {
  int32_t word;
  memcpy(&word, at, 4);
  return _mm256_set1_epi32(word);
}

/* 2^n of the polynomial's argument x = n + f, |f| <= 1/2: |error| < 1.6e-7 of it, 2^0 = 1. */
INLINE __m256 exp2_part(__m256 f) {
  __m256 y = _mm256_set1_ps(1.32647273e-3f);
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(9.67151299e-3f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(5.55073358e-2f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(2.40222424e-1f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(6.93147004e-1f));
  return _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.0f));
}
INLINE __m256i exponent(__m256 n) { return _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23); }
#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

/* 2^x for x <= 0; below 2^-126 it is 0. */
INLINE __m256 exp2_ps(__m256 x) {
  const __m256 least = _mm256_set1_ps(-126.0f), live = _mm256_cmp_ps(x, least, _CMP_GE_OQ);
  x = _mm256_max_ps(x, least);
  const __m256 n = _mm256_round_ps(x, NEAREST), y = exp2_part(_mm256_sub_ps(x, n));
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent(n))), live);
}
/* The same down to the smallest float: 2^n in two factors. */
INLINE __m256 exp2_wide(__m256 x) {
  const __m256i one = _mm256_castps_si256(_mm256_set1_ps(1.0f));
  x = _mm256_max_ps(x, _mm256_set1_ps(-250.0f));
  const __m256 n = _mm256_round_ps(x, NEAREST), h = _mm256_round_ps(_mm256_mul_ps(n, _mm256_set1_ps(0.5f)), NEAREST);
  const __m256 y = _mm256_mul_ps(exp2_part(_mm256_sub_ps(x, n)), _mm256_castsi256_ps(_mm256_add_epi32(one, exponent(h))));
  return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_add_epi32(one, exponent(_mm256_sub_ps(n, h)))));
}

INLINE int32_t max_lanes(__m256i v) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
INLINE float top_lane(__m256 m) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
INLINE int32_t sum_sad(__m256i v) { /* four sums of bytes, one in each 64-bit lane */
  const __m128i x = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_unpackhi_epi64(x, x)));
}
/* Lane i is all ones when bit i of the byte is set. */
INLINE __m256i bits_to_lanes(uint32_t byte) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int32_t)byte), bit), bit);
}
/* Byte b is all ones when the key that stands there in half h of P is visible. */
INLINE __m256i bits_to_p(uint64_t mask, int h) {
  const __m256i from = _mm256_setr_epi8(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6, 0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  const __m256i bit = _mm256_setr_epi32(0x08040201, 0x08040201, 0x08040201, 0x08040201, (int32_t)0x80402010, (int32_t)0x80402010,
                                        (int32_t)0x80402010, (int32_t)0x80402010);
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi64x((int64_t)(mask >> 8 * h)), from);
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
}

/* ---- INT8 ---- */

INLINE void qk_keys(const etk_strip *s, int32_t key, int32_t *out, int R, int nv) {
  __m256i acc[MR][4];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < nv; j++) acc[i][j] = _mm256_set1_epi32(s->q_start[i]);
  const uint8_t *k = (const uint8_t *)s->k + key * 4;
  const int64_t stride = s->d_pad;
  const int8_t *q = s->q, *q3 = q + 3 * stride; /* two pointers and a stride reach six rows: no more fit the registers */
  for (int32_t c = 0; c < s->d_pad; c += 4, k += 256, q += 4, q3 += 4) {
    qk_vec kv[4];
    UNROLL for (int j = 0; j < nv; j++) kv[j] = QK_VEC(_mm256_load_si256((const __m256i *)(k + 32 * j)));
    UNROLL for (int i = 0; i < R; i++) {
      const __m256i b = quad_of(i < 3 ? q + i * stride : q3 + (i - 3) * stride);
      UNROLL for (int j = 0; j < nv; j++) QK_DOT(acc[i][j], kv[j], b);
    }
  }
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < nv; j++)
      _mm256_storeu_si256((__m256i *)(out + 64 * i + key + 8 * j), acc[i][j]);
}
INLINE void qk(const etk_strip *s, int32_t *out, int R) {
  const int nv = R == 1 ? 4 : QK_NV;
  for (int32_t key = 0; key < 64; key += 8 * nv) qk_keys(s, key, out, R, nv);
}

/* n vectors of 8 channels from c on: o = a o + (w sv) (P V), P [R][64] bytes in page order. */
INLINE void pv(const etk_strip *s, const uint8_t *p, const float *a, const float *w, int32_t c, int R, int n) {
  __m256i acc[MR][4];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < n; j++) acc[i][j] = _mm256_setzero_si256();
  const int8_t *v = (const int8_t *)s->v + (int64_t)c * 4;
  const int64_t stride = (int64_t)s->dv_pad * 4;
  for (int32_t t = 0; t < 64; t += 4, v += stride) {
    __m256i vv[4];
    UNROLL for (int j = 0; j < n; j++) vv[j] = _mm256_load_si256((const __m256i *)(v + 32 * j));
    UNROLL for (int i = 0; i < R; i++) {
      const __m256i b = quad_of(p + i * 64 + t);
      UNROLL for (int j = 0; j < n; j++) PV_DOT(acc[i][j], b, vv[j]);
    }
  }
  UNROLL for (int i = 0; i < R; i++) {
    float *o = s->o + (int64_t)i * s->dv_pad + c;
    const __m256 wi = _mm256_set1_ps(w[i]), ai = _mm256_set1_ps(a[i]);
    UNROLL for (int j = 0; j < n; j++) {
      const __m256 old = _mm256_mul_ps(ai, _mm256_loadu_ps(o + 8 * j));
      const __m256 scale = _mm256_mul_ps(wi, _mm256_loadu_ps(s->sv + c + 8 * j));
      _mm256_storeu_ps(o + 8 * j, _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(acc[i][j]), old));
    }
  }
}
INLINE void pv_all(const etk_strip *s, const uint8_t *p, const float *a, const float *w, int R) {
  int32_t c = 0;
  if (R <= 2) /* few rows: more channels at a time, to have enough sums in flight */
    for (; c + 32 <= s->dv_pad; c += 32) pv(s, p, a, w, c, R, 4);
  for (; c < s->dv_pad; c += 16) pv(s, p, a, w, c, R, 2);
}

/* LUT[x] = (high[x / 16] low[x % 16] / 2^16 + 2^(k-1)) / 2^k with integer divisions, 2^15-k = P_ROUND: the tables were
 * checked against it for each x. */
INLINE __m256i look_up(__m256i x) {
  const __m256i nibble = _mm256_set1_epi8(15), round = _mm256_set1_epi16(P_ROUND);
#define TABLE(name) _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(name)))
  const __m256i lo = _mm256_and_si256(x, nibble), hi = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
  const __m256i h0 = _mm256_shuffle_epi8(TABLE(k_high), hi), h1 = _mm256_shuffle_epi8(TABLE(k_high + 16), hi);
  const __m256i l0 = _mm256_shuffle_epi8(TABLE(k_low), lo), l1 = _mm256_shuffle_epi8(TABLE(k_low + 16), lo);
#undef TABLE
  const __m256i a = _mm256_mulhi_epu16(_mm256_unpacklo_epi8(h0, h1), _mm256_unpacklo_epi8(l0, l1));
  const __m256i b = _mm256_mulhi_epu16(_mm256_unpackhi_epi8(h0, h1), _mm256_unpackhi_epi8(l0, l1));
  return _mm256_packus_epi16(_mm256_mulhrs_epi16(a, round), _mm256_mulhrs_epi16(b, round));
}
INLINE __m256i to_p(__m256i a, __m256i b, __m256i c, __m256i d) {
  return look_up(_mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)));
}

/* One row of S to P; the sum of P. The packs saturate in place of min(x, 255), which is right while the product fits 31
 * bits: Smax - S <= 2 * 127 * 127 * 1024 and step < 64; `clamp` otherwise (it also makes NaN 255). */
INLINE int32_t p_row(const int32_t *s, int32_t top, float step, uint64_t mask, int masked, int clamp, uint8_t *p) {
  const __m256i t = _mm256_set1_epi32(top);
  const __m256 c = _mm256_set1_ps(step);
  __m256i sum = _mm256_setzero_si256();
  for (int h = 0; h < 2; h++) {
    __m256i x[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const __m256i below = _mm256_sub_epi32(t, _mm256_load_si256((const __m256i *)(s + 16 * j + 8 * h)));
      __m256 y = _mm256_mul_ps(_mm256_cvtepi32_ps(below), c);
      if (clamp) y = _mm256_min_ps(y, _mm256_set1_ps(255.0f));
      x[j] = _mm256_cvtps_epi32(y);
    }
    __m256i row = to_p(x[0], x[1], x[2], x[3]);
    if (masked) row = _mm256_and_si256(row, bits_to_p(mask, h));
    _mm256_store_si256((__m256i *)(p + 32 * h), row);
    sum = _mm256_add_epi32(sum, _mm256_sad_epu8(row, _mm256_setzero_si256()));
  }
  return sum_sad(sum);
}
static __attribute__((noinline)) int32_t p_row_clamped(const int32_t *s, int32_t top, float step, uint64_t mask, uint8_t *p) {
  return p_row(s, top, step, mask, 1, 1, p);
}

INLINE int32_t row_max(const int32_t *s, uint64_t mask, int masked) {
  __m256i m[8];
  UNROLL for (int j = 0; j < 8; j++) {
    m[j] = _mm256_load_si256((const __m256i *)(s + 8 * j));
    if (masked) m[j] = _mm256_blendv_epi8(_mm256_set1_epi32(INT32_MIN), m[j], bits_to_lanes((uint32_t)(mask >> 8 * j) & 255));
  }
  UNROLL for (int j = 0; j < 4; j++) m[j] = _mm256_max_epi32(m[j], m[j + 4]);
  return max_lanes(_mm256_max_epi32(_mm256_max_epi32(m[0], m[1]), _mm256_max_epi32(m[2], m[3])));
}

/* New m, factors a of the old state and w of the tile, for rows whose lane of `seen` is set; l = a l + w sum. */
INLINE void meet(const etk_strip *s, __m256i rows, __m256 mt, __m256 seen, __m256 sum, tile_rows *out) {
  const __m256 m = _mm256_maskload_ps(s->m, rows), l = _mm256_maskload_ps(s->l, rows);
  const __m256 mn = _mm256_blendv_ps(m, _mm256_max_ps(m, mt), seen);
  const __m256 a = _mm256_blendv_ps(_mm256_set1_ps(1.0f), exp2_wide(_mm256_sub_ps(m, mn)), seen);
  const __m256 w = _mm256_and_ps(seen, exp2_wide(_mm256_sub_ps(mt, mn)));
  _mm256_store_ps(out->a, a);
  _mm256_store_ps(out->w, w);
  _mm256_maskstore_ps(s->m, rows, mn);
  _mm256_maskstore_ps(s->l, rows, _mm256_fmadd_ps(w, sum, _mm256_mul_ps(a, l)));
}
INLINE __m256i first_lanes(int32_t n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }

/* The law from S to P, m, l, a and w. 0: the strip is left out. */
INLINE int soften_rows(const etk_strip *s, const int32_t *x, tile_rows *out, int masked) {
  int32_t top[8] __attribute__((aligned(32))) = {0}, sum[8] __attribute__((aligned(32))) = {0};
  float step[8] __attribute__((aligned(32)));
  const __m256i rows = first_lanes(s->rows), least = _mm256_set1_epi32(INT32_MIN);
  for (int32_t i = 0; i < s->rows; i++) top[i] = row_max(x + 64 * i, masked ? s->mask[i] : 0, masked);
  const __m256i tops = _mm256_load_si256((const __m256i *)top);
  const __m256 g = _mm256_maskload_ps(s->g, rows), mt = _mm256_mul_ps(_mm256_cvtepi32_ps(tops), g);
  const __m256 seen = _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpeq_epi32(tops, least), rows));
  if (__builtin_expect(s->skip_log2 != 0.0f, 0)) {
    const __m256 edge = _mm256_sub_ps(_mm256_maskload_ps(s->m, rows), _mm256_set1_ps(s->skip_log2));
    if (!_mm256_movemask_ps(_mm256_and_ps(seen, _mm256_cmp_ps(mt, edge, _CMP_NLT_UQ)))) return 0;
  }
  if (masked && !_mm256_movemask_ps(seen)) return 0;
  const __m256 steps = _mm256_mul_ps(_mm256_set1_ps((float)ETK_STEP), g);
  _mm256_store_ps(step, steps);
  if (_mm256_movemask_ps(_mm256_cmp_ps(steps, _mm256_set1_ps(64.0f), _CMP_NLT_UQ)))
    for (int32_t i = 0; i < s->rows; i++)
      sum[i] = p_row_clamped(x + 64 * i, top[i], step[i], masked ? s->mask[i] : ~UINT64_C(0), out->p + 64 * i);
  else
    for (int32_t i = 0; i < s->rows; i++)
      sum[i] = p_row(x + 64 * i, top[i], step[i], masked ? s->mask[i] : 0, masked, 0, out->p + 64 * i);
  meet(s, rows, mt, seen, _mm256_cvtepi32_ps(_mm256_load_si256((const __m256i *)sum)), out);
  return 1;
}
static __attribute__((noinline)) int soften_all(const etk_strip *s, const int32_t *x, tile_rows *out) { return soften_rows(s, x, out, 0); }
static __attribute__((noinline)) int soften_seen(const etk_strip *s, const int32_t *x, tile_rows *out) { return soften_rows(s, x, out, 1); }

INLINE void strip(const etk_strip *s, int R) {
  int32_t x[MR * 64] __attribute__((aligned(32)));
  tile_rows t;
  qk(s, x, R);
  if (s->mask ? soften_seen(s, x, &t) : soften_all(s, x, &t)) pv_all(s, t.p, t.a, t.w, R);
}

/* The general softmax, one row at a time: y in log2 units. */
static void softmax_u8(const etk_strip *s, const float *y, uint8_t *p, float *w) {
  for (int32_t i = 0; i < s->rows; i++, y += 64, p += 64) {
    __m256 m = _mm256_loadu_ps(y);
    for (int j = 1; j < 8; j++) m = _mm256_max_ps(m, _mm256_loadu_ps(y + 8 * j));
    const float mt = top_lane(m);
    w[i] = 0.0f;
    if (mt == -INFINITY) {
      memset(p, 0, 64);
      continue;
    }
    __m256i sum = _mm256_setzero_si256();
    for (int h = 0; h < 2; h++) {
      __m256i x[4];
      UNROLL for (int e = 0; e < 4; e++)
        x[e] = _mm256_cvtps_epi32(_mm256_min_ps(
            _mm256_mul_ps(_mm256_sub_ps(_mm256_set1_ps(mt), _mm256_loadu_ps(y + 16 * e + 8 * h)), _mm256_set1_ps((float)ETK_STEP)),
            _mm256_set1_ps(255.0f)));
      const __m256i row = to_p(x[0], x[1], x[2], x[3]);
      _mm256_storeu_si256((__m256i *)(p + 32 * h), row);
      sum = _mm256_add_epi32(sum, _mm256_sad_epu8(row, _mm256_setzero_si256()));
    }
    const float mn = s->m[i] > mt ? s->m[i] : mt;
    const __m256 two = exp2_wide(_mm256_setr_ps(s->m[i] - mn, mt - mn, 0, 0, 0, 0, 0, 0));
    const float a = _mm256_cvtss_f32(two);
    w[i] = _mm_cvtss_f32(_mm_movehdup_ps(_mm256_castps256_ps128(two)));
    s->l[i] = a * s->l[i] + w[i] * (float)sum_sad(sum);
    s->m[i] = mn;
    float *o = s->o + (int64_t)i * s->dv_pad;
    for (int32_t c = 0; c < s->dv_pad; c += 8) _mm256_storeu_ps(o + c, _mm256_mul_ps(_mm256_set1_ps(a), _mm256_loadu_ps(o + c)));
  }
}

static const float k_ones[8] = {1, 1, 1, 1, 1, 1, 1, 1};

#include "attn_f32_avx2_body.h"
#include "attn_pack_avx2_body.h"

/* One function for each number of rows, so that every loop over rows has a constant bound. */
#define ROWS(R)                                                                                            \
  static void strip_##R(const etk_strip *s) { strip(s, R); }                                               \
  static void qk_##R(const etk_strip *s, int32_t *out) { qk(s, out, R); }                                  \
  static void pv_##R(const etk_strip *s, const uint8_t *p, const float *w) { pv_all(s, p, k_ones, w, R); } \
  static void stripf_##R(const etk_strip *s) { stripf(s, R); }                                             \
  static void qkf_##R(const etk_strip *s, float *out) { qkf(s, out, R); }                                  \
  static void pvf_##R(const etk_strip *s, const float *p) { pvf_all(s, p, k_ones, R); }
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
static void pv_f32(const etk_strip *s, const float *p) { BY_ROWS(pvf, (s, p)) }

static const uint8_t k_p_order[64] = {
    0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51, 4, 5, 6, 7, 20, 21, 22, 23, 36, 37, 38, 39, 52, 53, 54, 55,
    8, 9, 10, 11, 24, 25, 26, 27, 40, 41, 42, 43, 56, 57, 58, 59, 12, 13, 14, 15, 28, 29, 30, 31, 44, 45, 46, 47, 60, 61, 62, 63,
};

extern const etk_attn_kernel KERNEL;
const etk_attn_kernel KERNEL = {
    .name = NAME, .isa = ISA, .mr = MR, .p_max = P_MAX, .layout = LAYOUT, .p_order = k_p_order, .quant_q = quant_q,
    .pack_k = pack_k, .pack_v = pack_v, .lay_k = lay_k, .lay_v = lay_v, .read_k = read_k, .read_v = read_v,
    .strip_s8 = strip_s8, .qk_s8 = qk_s8, .softmax_u8 = softmax_u8, .pv_s8 = pv_s8, .strip_f32 = strip_f32,
    .qk_f32 = qk_f32, .softmax_f32 = softmax_f32, .pv_f32 = pv_f32,
};
