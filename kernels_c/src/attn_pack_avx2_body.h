/* Quantize and lay out Q rows, K pages and V pages for the 256-bit attention kernels; part of their template. Internal.
 *
 *   s = top / 127, code = rint(x (1/s)), top = largest finite |x|; NaN is 0, infinities +-top.
 *   K page: quad c of key j at byte 256 c + 4 j (U8_K: code + 128). V page: quad t, channel c at 4 (t dv + c).
 * Two passes over a page (maximum, codes); bound by the loads of the floats. */

INLINE float scale_of(float top) { return top < ETK_TINY ? 1.0f : top / 127.0f; }
INLINE float inverse_of(float top, float s) { return top < ETK_TINY ? 0.0f : 1.0f / s; }

/* max(most, |x| where finite); *bad gathers lanes that are not. */
INLINE __m256 most_of(__m256 most, __m256 x, __m256 *bad) {
  const __m256 a = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), ok = _mm256_cmp_ps(a, _mm256_set1_ps(INFINITY), _CMP_LT_OQ);
  *bad = _mm256_or_ps(*bad, _mm256_andnot_ps(ok, _mm256_castsi256_ps(_mm256_set1_epi32(-1))));
  return _mm256_max_ps(most, _mm256_and_ps(ok, a));
}
INLINE __m256i codes_of(__m256 x, __m256 top, __m256 inverse) {
  const __m256 number = _mm256_cmp_ps(x, x, _CMP_ORD_Q);
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_sub_ps(_mm256_setzero_ps(), top)), top);
  const __m256i c = _mm256_cvtps_epi32(_mm256_and_ps(number, _mm256_mul_ps(x, inverse)));
  return _mm256_max_epi32(_mm256_min_epi32(c, _mm256_set1_epi32(127)), _mm256_set1_epi32(-127));
}
INLINE __m256 load_less(const float *x, const float *mu, int32_t left) {
  if (left >= 8) return mu ? _mm256_sub_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(mu)) : _mm256_loadu_ps(x);
  const __m256i k = first_lanes(left);
  const __m256 v = _mm256_maskload_ps(x, k);
  return mu ? _mm256_sub_ps(v, _mm256_maskload_ps(mu, k)) : v;
}
/* Codes of 16 channels of a row, of which `left` exist. */
INLINE __m128i codes16(const float *x, const float *mu, int32_t left, __m256 top, __m256 inverse, __m256i *sum) {
  const __m256i a = codes_of(load_less(x, mu, left), top, inverse);
  const __m256i b = left > 8 ? codes_of(load_less(x + 8, mu ? mu + 8 : NULL, left - 8), top, inverse) : _mm256_setzero_si256();
  *sum = _mm256_add_epi32(*sum, _mm256_add_epi32(a, b));
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

static float quant_q(const float *x, int32_t d, int32_t d_pad, int8_t *codes, int32_t *start, int32_t *nonfinite) {
  __m256 most = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
  for (int32_t c = 0; c < d; c += 8) most = most_of(most, load_less(x + c, NULL, d - c), &bad);
  const float top = top_lane(most), s = scale_of(top), inverse = inverse_of(top, s);
  __m256i sum = _mm256_setzero_si256();
  for (int32_t c = 0; c < d_pad; c += 16)
    _mm_storeu_si128((__m128i *)(codes + c), codes16(x + c, NULL, d - c, _mm256_set1_ps(top), _mm256_set1_ps(inverse), &sum));
  const __m256i pairs = _mm256_hadd_epi32(sum, sum), fours = _mm256_hadd_epi32(pairs, pairs);
  *start = U8_K ? -128 * (_mm256_extract_epi32(fours, 0) + _mm256_extract_epi32(fours, 4)) : 0;
  *nonfinite |= _mm256_movemask_ps(bad) != 0;
  return s;
}

static float pack_k(const float *x, int64_t stride, int32_t n, int32_t d, int32_t d_pad, const float *mu, void *page,
                    int32_t *nonfinite) {
  __m256 most = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
  for (int32_t j = 0; j < n; j++)
    for (int32_t c = 0; c < d; c += 8) most = most_of(most, load_less(x + j * stride + c, mu ? mu + c : NULL, d - c), &bad);
  const float top = top_lane(most), s = scale_of(top);
  const __m256 limit = _mm256_set1_ps(top), inverse = _mm256_set1_ps(inverse_of(top, s));
  const __m128i flip = _mm_set1_epi8(U8_K ? (char)0x80 : 0);
  __m256i unused = _mm256_setzero_si256();
  for (int32_t c = 0; c < d_pad; c += 16)
    for (int32_t j = 0; j < ETK_PAGE; j += 4) { /* 4 keys x 4 quads, turned */
      __m128i r[4];
      for (int32_t e = 0; e < 4; e++)
        r[e] = j + e < n ? codes16(x + (j + e) * stride + c, mu ? mu + c : NULL, d - c, limit, inverse, &unused) : _mm_setzero_si128();
      const __m128i a = _mm_xor_si128(_mm_unpacklo_epi32(r[0], r[1]), flip), b = _mm_xor_si128(_mm_unpacklo_epi32(r[2], r[3]), flip);
      const __m128i e = _mm_xor_si128(_mm_unpackhi_epi32(r[0], r[1]), flip), f = _mm_xor_si128(_mm_unpackhi_epi32(r[2], r[3]), flip);
      uint8_t *at = (uint8_t *)page + c * 64 + j * 4;
      _mm_store_si128((__m128i *)at, _mm_unpacklo_epi64(a, b));
      _mm_store_si128((__m128i *)(at + 256), _mm_unpackhi_epi64(a, b));
      _mm_store_si128((__m128i *)(at + 512), _mm_unpacklo_epi64(e, f));
      _mm_store_si128((__m128i *)(at + 768), _mm_unpackhi_epi64(e, f));
    }
  *nonfinite |= _mm256_movemask_ps(bad) != 0;
  return s;
}

/* Keys of quad t of the V page begin here. */
INLINE int32_t quad_key(int32_t t) { return 4 * (4 * (t % 4) + t / 4); }

static void pack_v(const float *x, int64_t stride, int32_t n, int32_t dv, int32_t dv_pad, const float *mu, void *page, float *sv,
                   int32_t *colsum, int32_t f16_scales, int32_t *nonfinite) {
  __m256 bad = _mm256_setzero_ps();
  for (int32_t c = 0; c < dv_pad; c += 8) {
    const int32_t left = dv > c ? dv - c : 0;
    const float *at = x + c, *less = mu ? mu + c : NULL;
    __m256 top = _mm256_setzero_ps();
    float tops[8], inverse[8];
    for (int32_t j = 0; left && j < n; j++) top = most_of(top, load_less(at + j * stride, less, left), &bad);
    _mm256_storeu_ps(tops, top);
    for (int i = 0; i < 8; i++) {
      sv[c + i] = scale_of(tops[i]);
      if (f16_scales) sv[c + i] = etk_scale_f16(sv[c + i]);
      inverse[i] = inverse_of(tops[i], sv[c + i]);
    }
    const __m256 inv = _mm256_loadu_ps(inverse);
    __m256i sum = _mm256_setzero_si256();
    for (int32_t t = 0; t < 16; t++) {
      __m256i quad = _mm256_setzero_si256();
      for (int32_t e = 3; e >= 0; e--) {
        const int32_t j = quad_key(t) + e;
        const __m256i v = left && j < n ? codes_of(load_less(at + j * stride, less, left), top, inv) : _mm256_setzero_si256();
        sum = _mm256_add_epi32(sum, v);
        quad = _mm256_or_si256(_mm256_slli_epi32(quad, 8), _mm256_and_si256(v, _mm256_set1_epi32(255)));
      }
      _mm256_store_si256((__m256i *)((int8_t *)page + 4 * (t * dv_pad + c)), quad);
    }
    if (colsum) _mm256_storeu_si256((__m256i *)(colsum + c), sum);
  }
  *nonfinite |= _mm256_movemask_ps(bad) != 0;
}

static void lay_k(const int8_t *codes, int32_t d_pad, void *page) {
  for (int32_t j = 0; j < ETK_PAGE; j++)
    for (int32_t c = 0; c < d_pad; c++) ((uint8_t *)page)[c / 4 * 256 + j * 4 + c % 4] = (uint8_t)(codes[j * d_pad + c] ^ (U8_K ? 0x80 : 0));
}
static void read_k(const void *page, int32_t d_pad, int8_t *codes) {
  for (int32_t j = 0; j < ETK_PAGE; j++)
    for (int32_t c = 0; c < d_pad; c++) codes[j * d_pad + c] = (int8_t)(((const uint8_t *)page)[c / 4 * 256 + j * 4 + c % 4] ^ (U8_K ? 0x80 : 0));
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
