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
INLINE __mmask16 tail(int32_t left) { return (__mmask16)(left >= 16 ? 0xffff : (1 << left) - 1); }
INLINE __m512 load_less(const float *x, const float *mu, __mmask16 k) {
  const __m512 v = _mm512_maskz_loadu_ps(k, x);
  return mu ? _mm512_maskz_sub_ps(k, v, _mm512_maskz_loadu_ps(k, mu)) : v;
}

static float quant_q(const float *x, int32_t d, int32_t d_pad, int8_t *codes, int32_t *start, int32_t *nonfinite) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (int32_t c = 0; c < d; c += 16) most = _mm512_max_ps(most, finite_abs(_mm512_maskz_loadu_ps(tail(d - c), x + c), &bad));
  const float top = _mm512_reduce_max_ps(most), s = scale_of(top), inverse = inverse_of(top, s);
  __m512i sum = _mm512_setzero_si512();
  for (int32_t c = 0; c < d_pad; c += 16) {
    const __mmask16 k = tail(d > c ? d - c : 0);
    const __m512i v = codes_of(_mm512_maskz_loadu_ps(k, x + c), _mm512_set1_ps(top), _mm512_set1_ps(inverse));
    sum = _mm512_add_epi32(sum, v);
    _mm_storeu_si128((__m128i *)(codes + c), _mm512_cvtepi32_epi8(v));
  }
  *start = -128 * _mm512_reduce_add_epi32(sum);
  *nonfinite |= bad != 0;
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

static float pack_k(const float *x, int64_t stride, int32_t n, int32_t d, int32_t d_pad, const float *mu, void *page,
                    int32_t *nonfinite) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (int32_t j = 0; j < n; j++)
    for (int32_t c = 0; c < d; c += 16)
      most = _mm512_max_ps(most, finite_abs(load_less(x + j * stride + c, mu ? mu + c : NULL, tail(d - c)), &bad));
  const float top = _mm512_reduce_max_ps(most), s = scale_of(top);
  const __m512 limit = _mm512_set1_ps(top), inverse = _mm512_set1_ps(inverse_of(top, s));
  __m128i rows[16] __attribute__((aligned(64)));
  for (int32_t c = 0; c < d_pad; c += 16)
    for (int32_t j = 0; j < ETK_PAGE; j += 16) {
      const __mmask16 k = tail(d > c ? d - c : 0);
      for (int32_t r = 0; r < 16; r++)
        rows[r] = j + r < n ? _mm512_cvtepi32_epi8(codes_of(load_less(x + (j + r) * stride + c, mu ? mu + c : NULL, k), limit, inverse))
                            : _mm_setzero_si128();
      turn(rows, (uint8_t *)page + c * 64 + j * 4);
    }
  *nonfinite |= bad != 0;
  return s;
}

/* Keys of quad t of the V page begin here. */
INLINE int32_t quad_key(int32_t t) { return 4 * (4 * (t % 4) + t / 4); }

static void pack_v(const float *x, int64_t stride, int32_t n, int32_t dv, int32_t dv_pad, const float *mu, void *page, float *sv,
                   int32_t *colsum, int32_t f16_scales, int32_t *nonfinite) {
  __mmask16 bad = 0;
  for (int32_t c = 0; c < dv_pad; c += 16) {
    const __mmask16 k = tail(dv > c ? dv - c : 0);
    const float *at = x + c, *less = mu ? mu + c : NULL;
    __m512 top = _mm512_setzero_ps();
    float tops[16], inverse[16];
    for (int32_t j = 0; j < n; j++) top = _mm512_max_ps(top, finite_abs(load_less(at + j * stride, less, k), &bad));
    _mm512_storeu_ps(tops, top);
    for (int i = 0; i < 16; i++) {
      sv[c + i] = scale_of(tops[i]);
      if (f16_scales) sv[c + i] = etk_scale_f16(sv[c + i]);
      inverse[i] = inverse_of(tops[i], sv[c + i]);
    }
    const __m512 inv = _mm512_loadu_ps(inverse);
    __m512i sum = _mm512_setzero_si512();
    for (int32_t t = 0; t < 16; t++) {
      __m512i quad = _mm512_setzero_si512();
      for (int32_t e = 3; e >= 0; e--) {
        const int32_t j = quad_key(t) + e;
        const __m512i v = j < n ? codes_of(load_less(at + j * stride, less, k), top, inv) : _mm512_setzero_si512();
        sum = _mm512_add_epi32(sum, v);
        quad = _mm512_or_si512(_mm512_slli_epi32(quad, 8), _mm512_and_si512(v, _mm512_set1_epi32(255)));
      }
      _mm512_store_si512((int8_t *)page + 4 * (t * dv_pad + c), quad);
    }
    if (colsum) _mm512_storeu_si512(colsum + c, sum);
  }
  *nonfinite |= bad != 0;
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
