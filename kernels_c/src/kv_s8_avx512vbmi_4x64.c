/* Decode for AVX-512 VNNI with VBMI: up to 4 query rows by 64 keys at a time, straight from INT8 or INT4 pages.
 *
 *   S = sum_c q[c] k[c];  P = LUT[rint((Smax - S) 28 g)];  O = a O + (w sv) (P V)        (attn_kernel.h has the whole law)
 * INT4: a line of 64 bytes is two vectors of codes, one AND and one shift away; K codes 0..15 and V codes + 8 both enter
 * vpdpbusd as they are, and -8 sum(q) and -8 sum(P) are taken off once per row.
 *
 * Few rows are bound by the read of the pages (a page of INT8, d = 128, is 250 cycles of work and 1600 of one core's memory),
 * so the order of work keeps loads going: S of page t + 1 comes before P V of page t, which gives the softmax of each page a
 * stream of independent loads to hide behind, and every line read asks for one that is 4 KiB further along the pages. Many
 * rows are bound by vpdpbusd. */
#include <math.h>

#include "kv_avx512_body.h"
#include "kv_f16_avx512_body.h"

#include "attn_lut.h"

/* Codes of 16 keys x 4 channels; four = nibbles: vectors 2i and 2i + 1 come from line i. */
INLINE void load_pair(const uint8_t *at, const int four, __m512i *x, __m512i *y) {
  if (four) {
    const __m512i low = _mm512_set1_epi8(15), line = _mm512_load_si512(at);
    *x = _mm512_and_si512(line, low);
    *y = _mm512_and_si512(_mm512_srli_epi16(line, 4), low);
  } else {
    *x = _mm512_load_si512(at);
    *y = _mm512_load_si512(at + 64);
  }
}

INLINE int32_t quad_at(const void *q) {
  int32_t x;
  __builtin_memcpy(&x, q, 4);
  return x;
}

/* S of R rows to s[r][64]. A single row takes two channel quads at once into separate sums: four chains of vpdpbusd would wait
 * for their own latency. */
INLINE void qk(const uint8_t *k, int32_t d_pad, const int8_t *codes, const int32_t *start, const int R, const int four, ahead *next,
               int32_t *s) {
  const int bytes = four ? 128 : 256, lines = four ? 2 : 4, U = R == 1 ? 2 : 1;
  __m512i sum[4][4], other[4];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) sum[r][v] = _mm512_set1_epi32(four ? start[r] / 16 : start[r]);
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) other[v] = _mm512_setzero_si512();
#pragma GCC unroll 1
  for (int32_t c = 0; c < d_pad; c += 4 * U) { /* d_pad is a multiple of 16 */
    ask(next, lines * U);
#pragma GCC unroll 2
    for (int u = 0; u < U; u++, k += bytes) {
      __m512i x[4];
      load_pair(k, four, &x[0], &x[1]);
      load_pair(k + bytes / 2, four, &x[2], &x[3]);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const __m512i q = _mm512_set1_epi32(quad_at(codes + (int64_t)r * d_pad + c + 4 * u));
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
          if (u == 0) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], x[v], q);
          else other[v] = _mm512_dpbusd_epi32(other[v], x[v], q);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++)
      _mm512_store_si512(s + 64 * r + 16 * v, U == 2 ? _mm512_add_epi32(sum[r][v], other[v]) : sum[r][v]);
}

typedef struct row_weights {
  float old, w; /* factors of O and of the tile; w = 0: the row is left alone */
  int32_t p_sum;
} row_weights;

INLINE __m512i index_of(__m512i top, const int32_t *s, __m512 step) {
  __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(top, _mm512_load_si512(s))), step);
  return _mm512_cvtps_epi32(_mm512_min_ps(x, _mm512_set1_ps(255.0f)));
}

INLINE float exp2_of(float x) { return _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(x))); }

/* Softmax of one row; P is written in the page's key order, zero when the row is left alone. */
INLINE row_weights softmax_row(const int32_t *s, uint64_t mask, float g, float y0, float skip, const uint8_t *p_order, float *m, float *l,
                               uint8_t *p) {
  const __m512i least = _mm512_set1_epi32(INT32_MIN);
  __m512i a = _mm512_mask_loadu_epi32(least, (__mmask16)mask, s), b = _mm512_mask_loadu_epi32(least, (__mmask16)(mask >> 16), s + 16);
  __m512i c = _mm512_mask_loadu_epi32(least, (__mmask16)(mask >> 32), s + 32), d = _mm512_mask_loadu_epi32(least, (__mmask16)(mask >> 48), s + 48);
  const int32_t top = _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_max_epi32(a, b), _mm512_max_epi32(c, d)));
  const float mt = (float)top * g + y0;
  row_weights out = {1.0f, 0.0f, 0};
  if (!mask || (skip > 0.0f && mt < *m - skip)) {
    _mm512_store_si512(p, _mm512_setzero_si512());
    return out;
  }
  const __m512i tops = _mm512_set1_epi32(top);
  const __m512 step = _mm512_set1_ps((float)ETK_STEP * g);
  const __m128i b0 = _mm512_cvtepi32_epi8(index_of(tops, s, step)), b1 = _mm512_cvtepi32_epi8(index_of(tops, s + 16, step));
  const __m128i b2 = _mm512_cvtepi32_epi8(index_of(tops, s + 32, step)), b3 = _mm512_cvtepi32_epi8(index_of(tops, s + 48, step));
  const __m512i index = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(b1, b0)), _mm256_set_m128i(b3, b2), 1);
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(etk_lut_255), index, _mm512_load_si512(etk_lut_255 + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(etk_lut_255 + 128), index, _mm512_load_si512(etk_lut_255 + 192));
  __m512i codes = _mm512_maskz_mov_epi8(mask, _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(index), high));
  out.p_sum = (int32_t)_mm512_reduce_add_epi64(_mm512_sad_epu8(codes, _mm512_setzero_si512()));
  if (p_order) codes = _mm512_permutexvar_epi8(_mm512_loadu_si512(p_order), codes);
  _mm512_store_si512(p, codes);
  const float before = *m, mn = before > mt ? before : mt;
  out.old = exp2_of(before - mn);
  out.w = exp2_of(mt - mn);
  *l = out.old * *l + out.w * (float)out.p_sum;
  *m = mn;
  return out;
}

/* O of R rows over `pairs` pairs of 16 channels from channel c on. */
INLINE void pv(const uint8_t *v, const uint16_t *sv, int32_t dv_pad, const int R, const int four, const int pairs, int32_t c, const uint8_t *p,
               const row_weights *rw, ahead *next, float *o) {
  __m512i sum[4][8];
  const int64_t quad_bytes = (int64_t)dv_pad * (four ? 2 : 4);
  const int lines = four ? pairs : 2 * pairs;
  v += (int64_t)c * (four ? 2 : 4);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < 2 * pairs; i++) sum[r][i] = _mm512_set1_epi32(four ? -8 * rw[r].p_sum : 0);
#pragma GCC unroll 1
  for (int kq = 0; kq < ETK_PAGE; kq += 4, v += quad_bytes) {
    ask(next, lines);
    __m512i quad[4];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) quad[r] = _mm512_set1_epi32(quad_at(p + r * ETK_PAGE + kq));
#pragma GCC unroll 4
    for (int i = 0; i < pairs; i++) {
      __m512i x, y;
      load_pair(v + i * (four ? 64 : 128), four, &x, &y);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        sum[r][2 * i] = _mm512_dpbusd_epi32(sum[r][2 * i], quad[r], x);
        sum[r][2 * i + 1] = _mm512_dpbusd_epi32(sum[r][2 * i + 1], quad[r], y);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
    float *to = o + (int64_t)r * dv_pad + c;
    const __m512 old = _mm512_set1_ps(rw[r].old), w = _mm512_set1_ps(rw[r].w);
#pragma GCC unroll 8
    for (int i = 0; i < 2 * pairs; i++) {
      const __m512 scale = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(const void *)(sv + c + 16 * i)));
      const __m512 gain = _mm512_mul_ps(w, scale), kept = _mm512_mul_ps(old, _mm512_loadu_ps(to + 16 * i));
      _mm512_storeu_ps(to + 16 * i, _mm512_fmadd_ps(gain, _mm512_cvtepi32_ps(sum[r][i]), kept));
    }
  }
}

/* The last 16 channels of a width that is not a multiple of 32; INT8 only. */
static void pv_last(const uint8_t *v, const uint16_t *sv, int32_t dv_pad, int32_t c, const uint8_t *p, const row_weights *rw, float *o) {
  __m512i sum = _mm512_setzero_si512();
  v += (int64_t)c * 4;
  for (int kq = 0; kq < ETK_PAGE; kq += 4, v += (int64_t)dv_pad * 4)
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(quad_at(p + kq)), _mm512_load_si512(v));
  const __m512 scale = _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(const void *)(sv + c)));
  const __m512 gain = _mm512_mul_ps(_mm512_set1_ps(rw->w), scale), kept = _mm512_mul_ps(_mm512_set1_ps(rw->old), _mm512_loadu_ps(o + c));
  _mm512_storeu_ps(o + c, _mm512_fmadd_ps(gain, _mm512_cvtepi32_ps(sum), kept));
}

/* What is known of a page before its softmax: of up to 8 rows. */
typedef struct page_state {
  int32_t s[GROUP * ETK_PAGE] __attribute__((aligned(64)));
  float g[GROUP], y0[GROUP];
} page_state;

INLINE void page_qk(const etk_kv_chunk *a, int32_t t, int32_t r0, int32_t rows, const int four, int8_t *folded, ahead *next, page_state *st) {
  const uint8_t *page = a->pages[t], *k = page + a->k;
  const int8_t *codes = a->codes + (int64_t)r0 * a->d_pad;
  const int32_t *start = a->start + r0;
  int32_t fold_start[GROUP], r = 0;
  if (four) {
    const uint16_t *scale = (const uint16_t *)(const void *)page;
    for (int32_t i = 0; i < rows; i++) {
      st->g[i] = a->tau2 * fold_q4(a->q + (int64_t)(r0 + i) * a->d_pad, scale, scale + a->d_pad, a->d_pad, 1,
                                   folded + (int64_t)i * a->d_pad, &fold_start[i], &st->y0[i]);
      st->y0[i] *= a->tau2;
    }
    codes = folded;
    start = fold_start;
  } else {
    float sk;
    __builtin_memcpy(&sk, page, sizeof sk);
    for (int32_t i = 0; i < rows; i++) {
      st->g[i] = a->gq[r0 + i] * sk;
      st->y0[i] = 0.0f;
    }
  }
  for (; rows - r >= 4; r += 4) qk(k, a->d_pad, codes + (int64_t)r * a->d_pad, start + r, 4, four, next, st->s + 64 * r);
  for (; rows - r >= 2; r += 2) qk(k, a->d_pad, codes + (int64_t)r * a->d_pad, start + r, 2, four, next, st->s + 64 * r);
  if (rows > r) qk(k, a->d_pad, codes + (int64_t)r * a->d_pad, start + r, 1, four, next, st->s + 64 * r);
}

INLINE void rows_pv(const etk_kv_chunk *a, const uint8_t *page, int32_t r0, const int R, const int four, const uint8_t *p, const row_weights *rw,
                    ahead *next) {
  const uint8_t *v = page + a->v;
  const uint16_t *sv = (const uint16_t *)(const void *)(page + a->v_scale);
  float *o = a->o + (int64_t)r0 * a->dv_pad;
  int32_t c = 0;
  if (R <= 2)
    for (; c + 128 <= a->dv_pad; c += 128) pv(v, sv, a->dv_pad, R, four, 4, c, p, rw, next, o);
  for (; c + 64 <= a->dv_pad; c += 64) pv(v, sv, a->dv_pad, R, four, 2, c, p, rw, next, o);
  for (; c + 32 <= a->dv_pad; c += 32) pv(v, sv, a->dv_pad, R, four, 1, c, p, rw, next, o);
  for (int r = 0; r < R && c < a->dv_pad; r++) pv_last(v, sv, a->dv_pad, c, p + r * ETK_PAGE, &rw[r], o + (int64_t)r * a->dv_pad);
}

INLINE void page_pv(const etk_kv_chunk *a, const uint8_t *page, int32_t r0, int32_t rows, const int four, const uint8_t *p,
                    const row_weights *rw, ahead *next) {
  int32_t r = 0;
  for (; rows - r >= 4; r += 4) rows_pv(a, page, r0 + r, 4, four, p + r * ETK_PAGE, rw + r, next);
  for (; rows - r >= 2; r += 2) rows_pv(a, page, r0 + r, 2, four, p + r * ETK_PAGE, rw + r, next);
  if (rows > r) rows_pv(a, page, r0 + r, 1, four, p + r * ETK_PAGE, rw + r, next);
}

INLINE void chunk(const etk_kv_chunk *a, const int four) {
  page_state st[2];
  uint8_t p[GROUP * ETK_PAGE] __attribute__((aligned(64)));
  int8_t folded[GROUP * 1024] __attribute__((aligned(64)));
  row_weights rw[GROUP];
  const int32_t k_lines = a->d_pad / (four ? 2 : 1), v_lines = a->dv_pad / (four ? 2 : 1);
  for (int32_t r0 = 0; r0 < a->rows; r0 += GROUP) {
    const int32_t rows = a->rows - r0 < GROUP ? a->rows - r0 : GROUP;
    ahead next = follow(a->pages[0] + a->k, k_lines, a->pages[0] + a->v);
    page_qk(a, 0, r0, rows, four, folded, &next, &st[0]);
    for (int32_t t = 0; t < a->n_pages; t++) {
      const page_state *now = &st[t & 1];
      const uint8_t *page = a->pages[t], *later = t + 2 <= a->n_pages ? a->pages[t + 2] : NULL;
      for (int32_t r = 0; r < rows; r++)
        rw[r] = softmax_row(now->s + ETK_PAGE * r, a->masks ? a->masks[(int64_t)t * a->rows + r0 + r] : ~(uint64_t)0, now->g[r], now->y0[r],
                            a->skip_log2, a->p_order, &a->m[r0 + r], &a->l[r0 + r], p + ETK_PAGE * r);
      if (t + 1 < a->n_pages) {
        next = follow(a->pages[t + 1] + a->k, k_lines, page + a->v);
        page_qk(a, t + 1, r0, rows, four, folded, &next, &st[(t + 1) & 1]);
      }
      next = follow(page + a->v, v_lines, later);
      page_pv(a, page, r0, rows, four, p, rw, &next);
    }
  }
}

static void chunk_s8(const etk_kv_chunk *a) { chunk(a, 0); }
static void chunk_s4(const etk_kv_chunk *a) { chunk(a, 1); }

const etk_kv_kernel etk_kv_s8_avx512vbmi_4x64 = {
    .name = "kv_s8_avx512vbmi_4x64",
    .isa = ETK_ISA_AVX512VBMI,
    .round_f16 = round_f16,
    .widen_f16 = widen_f16,
    .expand4 = expand4,
    .fold_q4 = fold_q4,
    .chunk_s8 = chunk_s8,
    .chunk_s4 = chunk_s4,
    .chunk_f16 = chunk_f16,
};
