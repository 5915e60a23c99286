/* All pages of a chunk of an f16 cache, AVX-512: 1 or 2 query rows by 64 keys. Included by each AVX-512 variant of the helpers.
 *
 *   y[j] = sum_c q[c] K[c][j] (even and odd channels apart, whatever the rows);  p = 2^(y - m);  O = a O + p V
 * K [d][64], V [64][dv_pad] f16. Bound by one conversion of 16 values a cycle, 1000 cycles for a page of d = 128, under the 3000
 * that one core's memory takes for its 32 KiB; every line read asks for one 4 KiB further along. */

/* 2^x for x <= 0, within two units in the last place; 0 below -150. Taylor to the sixth power about the nearest integer. */
INLINE __m512 exp2_ps(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(0x1.430912p-13f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.5d87fep-10f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.3b2ab6p-7f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.c6b08ep-5f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.ebfbep-3f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0x1.62e43p-1f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

INLINE __m512 half16(const uint16_t *h) { return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(const void *)h)); }

INLINE void f16_qk(const uint16_t *k, int32_t d, int32_t d_pad, const float *q, const int R, ahead *next, float *y) {
  __m512 sum[2][2][4]; /* [row][even, odd][keys] */
#pragma GCC unroll 2
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) sum[r][v / 4][v % 4] = _mm512_setzero_ps();
#pragma GCC unroll 1
  for (int32_t c = 0; c + 1 < d; c += 2, k += 2 * ETK_PAGE) {
    ask(next, 4);
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
      const __m512 x = half16(k + 16 * v);
#pragma GCC unroll 2
      for (int r = 0; r < R; r++)
        sum[r][v / 4][v % 4] = _mm512_fmadd_ps(_mm512_set1_ps(q[(int64_t)r * d_pad + c + v / 4]), x, sum[r][v / 4][v % 4]);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      if (d & 1) sum[r][0][v] = _mm512_fmadd_ps(_mm512_set1_ps(q[(int64_t)r * d_pad + d - 1]), half16(k + 16 * v), sum[r][0][v]);
      _mm512_store_ps(y + ETK_PAGE * r + 16 * v, _mm512_add_ps(sum[r][0][v], sum[r][1][v]));
    }
}

/* y becomes p; the factor of O is returned. A row that sees nothing gets p = 0 and is left alone. */
INLINE float f16_softmax(float *y, uint64_t mask, float *m, float *l) {
  const __m512 none = _mm512_set1_ps(-INFINITY);
  __m512 x[4], total;
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) x[v] = _mm512_mask_mov_ps(none, (__mmask16)(mask >> (16 * v)), _mm512_load_ps(y + 16 * v));
  const float mt = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3])));
  const float before = *m, mn = before > mt ? before : mt;
  if (!mask) {
    for (int v = 0; v < 4; v++) _mm512_store_ps(y + 16 * v, _mm512_setzero_ps());
    return 1.0f;
  }
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) {
    x[v] = exp2_ps(_mm512_sub_ps(x[v], _mm512_set1_ps(mn)));
    _mm512_store_ps(y + 16 * v, x[v]);
  }
  total = _mm512_add_ps(_mm512_add_ps(x[0], x[1]), _mm512_add_ps(x[2], x[3]));
  const float old = _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(before - mn)));
  *l = old * *l + _mm512_reduce_add_ps(total);
  *m = mn;
  return old;
}

INLINE void f16_pv(const uint16_t *v, int32_t dv_pad, int32_t c, const int R, const int NV, const float *p, const float *old, ahead *next,
                   float *o) {
  __m512 sum[2][8];
#pragma GCC unroll 2
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < NV; i++)
      sum[r][i] = _mm512_mul_ps(_mm512_set1_ps(old[r]), _mm512_loadu_ps(o + (int64_t)r * dv_pad + c + 16 * i));
  v += c;
#pragma GCC unroll 1
  for (int j = 0; j < ETK_PAGE; j++, v += dv_pad) {
    ask(next, (NV + 1) / 2);
#pragma GCC unroll 8
    for (int i = 0; i < NV; i++) {
      const __m512 x = half16(v + 16 * i);
#pragma GCC unroll 2
      for (int r = 0; r < R; r++) sum[r][i] = _mm512_fmadd_ps(_mm512_set1_ps(p[ETK_PAGE * r + j]), x, sum[r][i]);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < NV; i++) _mm512_storeu_ps(o + (int64_t)r * dv_pad + c + 16 * i, sum[r][i]);
}

INLINE void f16_rows(const etk_kv_chunk *a, const uint8_t *page, const uint8_t *then, int32_t t, int32_t r0, const int R) {
  float y[2 * ETK_PAGE] __attribute__((aligned(64))), old[2];
  const uint16_t *v = (const uint16_t *)(const void *)(page + a->v);
  float *o = a->o + (int64_t)r0 * a->dv_pad;
  int32_t c = 0;
  ahead next = follow(page + a->k, a->d * 2, page + a->v);
  f16_qk((const uint16_t *)(const void *)(page + a->k), a->d, a->d_pad, a->q + (int64_t)r0 * a->d_pad, R, &next, y);
#pragma GCC unroll 2
  for (int r = 0; r < R; r++)
    old[r] = f16_softmax(y + ETK_PAGE * r, a->masks ? a->masks[(int64_t)t * a->rows + r0 + r] : ~(uint64_t)0, &a->m[r0 + r], &a->l[r0 + r]);
  next = follow(page + a->v, a->dv_pad * 2, then);
  for (; c + 128 <= a->dv_pad; c += 128) f16_pv(v, a->dv_pad, c, R, 8, y, old, &next, o);
  for (; c + 64 <= a->dv_pad; c += 64) f16_pv(v, a->dv_pad, c, R, 4, y, old, &next, o);
  for (; c < a->dv_pad; c += 16) f16_pv(v, a->dv_pad, c, R, 1, y, old, &next, o);
}

static void chunk_f16(const etk_kv_chunk *a) {
  for (int32_t t = 0; t < a->n_pages; t++) {
    const uint8_t *then = a->pages[t + 1] ? a->pages[t + 1] + a->k : NULL;
    int32_t r = 0;
    for (; a->rows - r >= 2; r += 2) f16_rows(a, a->pages[t], then, t, r, 2);
    if (r < a->rows) f16_rows(a, a->pages[t], then, t, r, 1);
  }
}
