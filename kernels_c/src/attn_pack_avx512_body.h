/* Quantize and lay out Q rows, K pages and V pages for the AVX-512 attention kernels. Internal; part of their template.
 *
 *   s = top / 127, code = rint(x (1/s)), top = largest finite |x|; NaN is 0, infinities +-top.
 *   K page: quad c of key j at byte 256 c + 4 j, code + 128. V page: quad t, channel c at 4 (t dv + c).
 * Two passes over a page (maximum, codes), 16 x 16 elements at a time; bound by the loads of the floats. */

INLINE float scale_of(float top) { return top < ETK_TINY ? 1.0f : top / 127.0f; }
INLINE float inverse_of(float top, float s) { return top < ETK_TINY ? 0.0f : 1.0f / s; }

/* |x| where finite, else 0 and the bit in *bad. */
INLINE __m512 finite_abs(__m512 x, __mmask16 *bad) {
  const __m512 a = _mm512_abs_ps(x);
  const __mmask16 ok = _mm512_cmp_ps_mask(a, _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
  *bad |= (__mmask16)~ok;
  return _mm512_maskz_mov_ps(ok, a);
}
INLINE __m512i codes_of(__m512 x, __m512 top, __m512 inverse) {
  const __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), top)), top);
  const __m512i c = _mm512_cvtps_epi32(_mm512_maskz_mul_ps(number, x, inverse));
  return _mm512_max_epi32(_mm512_min_epi32(c, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
}
/* The same where everything is finite: |x| <= top, so that the product rounds to at most 127 by itself. */
INLINE __m512i codes_clean(__m512 x, __m512 inverse) { return _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)); }
INLINE __m512i code_step(__m512 x, __m512 top, __m512 inverse, int clean) { return clean ? codes_clean(x, inverse) : codes_of(x, top, inverse); }
/* Magnitudes as integers: they order as floats do, and everything from 0x7f800000 up is not finite. */
INLINE __m512i magnitude(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }
INLINE int is_clean(__m512i most) { return _mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(0x7f800000)) == 0; }
INLINE __mmask16 tail(int32_t left) { return (__mmask16)(left >= 16 ? 0xffff : (1 << left) - 1); }
INLINE __m512 load_less(const float *x, const float *mu, __mmask16 k) {
  const __m512 v = _mm512_maskz_loadu_ps(k, x);
  return mu ? _mm512_maskz_sub_ps(k, v, _mm512_maskz_loadu_ps(k, mu)) : v;
}

/* Largest finite magnitude of n vectors' worth of rows; *clean: there is nothing else. */
INLINE float top_of(const float *x, int64_t stride, int32_t n, int32_t d, const float *mu, int *clean) {
  __m512i most = _mm512_setzero_si512();
  __m512 slow = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (int32_t c = 0; c < d; c += 16) { /* columns outside: one mask and one vector of mu at a time */
    const __mmask16 k = tail(d - c);
    const __m512 less = mu ? _mm512_maskz_loadu_ps(k, mu + c) : _mm512_setzero_ps();
    __m512i a = _mm512_setzero_si512(), b = a;
    int32_t j = 0;
    for (; j + 2 <= n; j += 2) {
      const __m512 v = _mm512_maskz_loadu_ps(k, x + j * stride + c), w = _mm512_maskz_loadu_ps(k, x + (j + 1) * stride + c);
      a = _mm512_max_epu32(a, magnitude(mu ? _mm512_sub_ps(v, less) : v));
      b = _mm512_max_epu32(b, magnitude(mu ? _mm512_sub_ps(w, less) : w));
    }
    if (j < n) a = _mm512_max_epu32(a, magnitude(load_less(x + j * stride + c, mu ? mu + c : NULL, k)));
    most = _mm512_max_epu32(most, _mm512_max_epu32(a, b));
  }
  *clean = is_clean(most);
  if (*clean) return _mm512_reduce_max_ps(_mm512_castsi512_ps(most));
  for (int32_t j = 0; j < n; j++)
    for (int32_t c = 0; c < d; c += 16)
      slow = _mm512_max_ps(slow, finite_abs(load_less(x + j * stride + c, mu ? mu + c : NULL, tail(d - c)), &bad));
  return _mm512_reduce_max_ps(slow);
}

INLINE __m512i quant_16(__m512 v, int8_t *codes, float top, float inverse, int clean) {
  const __m512i code = code_step(v, _mm512_set1_ps(top), _mm512_set1_ps(inverse), clean);
  _mm_storeu_si128((__m128i *)codes, _mm512_cvtepi32_epi8(code));
  return code;
}

INLINE __m512i quant_row(const float *x, int32_t d, int32_t d_pad, int8_t *codes, float top, float inverse, int clean) {
  __m512i sum = _mm512_setzero_si512();
  int32_t c = 0;
  for (; c + 16 <= d; c += 16) sum = _mm512_add_epi32(sum, quant_16(_mm512_loadu_ps(x + c), codes + c, top, inverse, clean));
  if (c < d_pad) sum = _mm512_add_epi32(sum, quant_16(_mm512_maskz_loadu_ps(tail(d - c), x + c), codes + c, top, inverse, clean));
  return sum;
}

static float quant_q(const float *x, int32_t d, int32_t d_pad, int8_t *codes, int32_t *start, int32_t *nonfinite) {
  __m512i most = _mm512_setzero_si512();
  int32_t c = 0;
  for (; c + 16 <= d; c += 16) most = _mm512_max_epu32(most, magnitude(_mm512_loadu_ps(x + c)));
  if (c < d) most = _mm512_max_epu32(most, magnitude(_mm512_maskz_loadu_ps(tail(d - c), x + c)));
  int clean = is_clean(most);
  const float top = clean ? _mm512_reduce_max_ps(_mm512_castsi512_ps(most)) : top_of(x, 0, 1, d, NULL, &clean);
  const float s = scale_of(top), inverse = inverse_of(top, s);
  const __m512i sum = clean ? quant_row(x, d, d_pad, codes, top, inverse, 1) : quant_row(x, d, d_pad, codes, top, inverse, 0);
  *start = -128 * _mm512_reduce_add_epi32(sum);
  *nonfinite |= !clean;
  return s;
}

/* 16 keys x 16 channels: rows of four quads to four vectors, each one quad of the 16 keys. */
INLINE void turn(const __m128i *rows, uint8_t *page) {
  const __m512i pick01 = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i pick23 = _mm512_add_epi32(pick01, _mm512_set1_epi32(2)), flip = _mm512_set1_epi8((char)0x80);
  const __m512i *z = (const __m512i *)rows;
  const __m512i a = _mm512_permutex2var_epi32(z[0], pick01, z[1]), b = _mm512_permutex2var_epi32(z[0], pick23, z[1]);
  const __m512i c = _mm512_permutex2var_epi32(z[2], pick01, z[3]), e = _mm512_permutex2var_epi32(z[2], pick23, z[3]);
  _mm512_store_si512(page, _mm512_xor_si512(_mm512_shuffle_i32x4(a, c, 0x44), flip));
  _mm512_store_si512(page + 256, _mm512_xor_si512(_mm512_shuffle_i32x4(a, c, 0xee), flip));
  _mm512_store_si512(page + 512, _mm512_xor_si512(_mm512_shuffle_i32x4(b, e, 0x44), flip));
  _mm512_store_si512(page + 768, _mm512_xor_si512(_mm512_shuffle_i32x4(b, e, 0xee), flip));
}

INLINE void codes_k(const float *x, int64_t stride, int32_t n, int32_t d, int32_t d_pad, const float *mu, uint8_t *page, __m512 limit,
                    __m512 inverse, int clean) {
  __m128i rows[16] __attribute__((aligned(64)));
  for (int32_t c = 0; c < d_pad; c += 16) {
    const __mmask16 k = tail(d > c ? d - c : 0);
    const __m512 less = mu ? _mm512_maskz_loadu_ps(k, mu + c) : _mm512_setzero_ps();
    for (int32_t j = 0; j < ETK_PAGE; j += 16) {
      for (int32_t r = 0; r < 16; r++) {
        if (j + r >= n) {
          rows[r] = _mm_setzero_si128();
          continue;
        }
        const __m512 v = _mm512_maskz_loadu_ps(k, x + (j + r) * stride + c);
        rows[r] = _mm512_cvtepi32_epi8(code_step(mu ? _mm512_sub_ps(v, less) : v, limit, inverse, clean));
      }
      turn(rows, page + c * 64 + j * 4);
    }
  }
}

static float pack_k(const float *x, int64_t stride, int32_t n, int32_t d, int32_t d_pad, const float *mu, void *page,
                    int32_t *nonfinite) {
  int clean;
  const float top = top_of(x, stride, n, d, mu, &clean), s = scale_of(top);
  const __m512 limit = _mm512_set1_ps(top), inverse = _mm512_set1_ps(inverse_of(top, s));
  if (clean) codes_k(x, stride, n, d, d_pad, mu, page, limit, inverse, 1);
  else codes_k(x, stride, n, d, d_pad, mu, page, limit, inverse, 0);
  *nonfinite |= !clean;
  return s;
}

/* Keys of quad t of the V page begin here. */
INLINE int32_t quad_key(int32_t t) { return 4 * (4 * (t % 4) + t / 4); }

/* Codes of one column block; returns their sums. */
INLINE __m512i codes_v(const float *at, int64_t stride, int32_t n, __mmask16 k, const float *mu, int8_t *out, int32_t dv_pad, __m512 top,
                       __m512 inv, int clean) {
  const __m512 less = mu ? _mm512_maskz_loadu_ps(k, mu) : _mm512_setzero_ps();
  __m512i sum = _mm512_setzero_si512();
  for (int32_t t = 0; t < 16; t++) {
    __m512i quad = _mm512_setzero_si512();
    for (int32_t e = 3; e >= 0; e--) {
      const int32_t j = quad_key(t) + e;
      const __m512 x = _mm512_maskz_loadu_ps(j < n ? k : 0, at + (j < n ? j : 0) * stride);
      const __m512i v = j < n ? code_step(mu ? _mm512_sub_ps(x, less) : x, top, inv, clean) : _mm512_setzero_si512();
      sum = _mm512_add_epi32(sum, v);
      quad = _mm512_or_si512(_mm512_slli_epi32(quad, 8), _mm512_and_si512(v, _mm512_set1_epi32(255)));
    }
    _mm512_store_si512(out + 4 * t * dv_pad, quad);
  }
  return sum;
}

static void pack_v(const float *x, int64_t stride, int32_t n, int32_t dv, int32_t dv_pad, const float *mu, void *page, float *sv,
                   int32_t *colsum, int32_t f16_scales, int32_t *nonfinite) {
  int any = 0;
  for (int32_t c = 0; c < dv_pad; c += 16) {
    const __mmask16 k = tail(dv > c ? dv - c : 0);
    const float *at = x + c, *less = mu ? mu + c : NULL;
    __m512i most = _mm512_setzero_si512();
    for (int32_t j = 0; j < n; j++) most = _mm512_max_epu32(most, magnitude(load_less(at + j * stride, less, k)));
    __m512 top = _mm512_castsi512_ps(most);
    const int clean = is_clean(most);
    if (!clean) {
      __mmask16 bad = 0;
      top = _mm512_setzero_ps();
      for (int32_t j = 0; j < n; j++) top = _mm512_max_ps(top, finite_abs(load_less(at + j * stride, less, k), &bad));
      any = 1;
    }
    const __mmask16 tiny = _mm512_cmp_ps_mask(top, _mm512_set1_ps(ETK_TINY), _CMP_LT_OQ);
    __m512 scale = _mm512_mask_mov_ps(_mm512_div_ps(top, _mm512_set1_ps(127.0f)), tiny, _mm512_set1_ps(1.0f));
    _mm512_storeu_ps(sv + c, scale);
    if (f16_scales) {
      for (int i = 0; i < 16; i++) sv[c + i] = etk_scale_f16(sv[c + i]);
      scale = _mm512_loadu_ps(sv + c);
    }
    const __m512 inv = _mm512_maskz_div_ps((__mmask16)~tiny, _mm512_set1_ps(1.0f), scale);
    /* a scale rounded to f16 may be the smaller one: codes need their clamp then */
    const __m512i sum = clean && !f16_scales ? codes_v(at, stride, n, k, less, (int8_t *)page + 4 * c, dv_pad, top, inv, 1)
                                             : codes_v(at, stride, n, k, less, (int8_t *)page + 4 * c, dv_pad, top, inv, 0);
    if (colsum) _mm512_storeu_si512(colsum + c, sum);
  }
  *nonfinite |= any;
}

static void lay_k(const int8_t *codes, int32_t d_pad, void *page) {
  for (int32_t j = 0; j < ETK_PAGE; j++)
    for (int32_t c = 0; c < d_pad; c++) ((uint8_t *)page)[c / 4 * 256 + j * 4 + c % 4] = (uint8_t)(codes[j * d_pad + c] ^ 0x80);
}
static void read_k(const void *page, int32_t d_pad, int8_t *codes) {
  for (int32_t j = 0; j < ETK_PAGE; j++)
    for (int32_t c = 0; c < d_pad; c++) codes[j * d_pad + c] = (int8_t)(((const uint8_t *)page)[c / 4 * 256 + j * 4 + c % 4] ^ 0x80);
}
static void lay_v(const int8_t *codes, int32_t dv_pad, void *page) {
  for (int32_t t = 0; t < 16; t++)
    for (int32_t c = 0; c < dv_pad; c++)
      for (int32_t e = 0; e < 4; e++) ((int8_t *)page)[4 * (t * dv_pad + c) + e] = codes[(quad_key(t) + e) * dv_pad + c];
}
static void read_v(const void *page, int32_t dv_pad, int8_t *codes) {
  for (int32_t t = 0; t < 16; t++)
    for (int32_t c = 0; c < dv_pad; c++)
      for (int32_t e = 0; e < 4; e++) codes[(quad_key(t) + e) * dv_pad + c] = ((const int8_t *)page)[4 * (t * dv_pad + c) + e];
}
