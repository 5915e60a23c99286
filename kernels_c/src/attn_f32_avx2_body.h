/* Float attention for 256-bit vectors; part of attn_s8_avx2_body.h. Internal.
 *
 *   y = qf . k (log2 units);  p = 2^(y - m), a polynomial of degree 5;  O = a O + P V
 *
 * Tiles of 6 rows x 16 keys or channels: 12 accumulators, two vectors of K (V), one broadcast; bound by vfmadd231ps. */

#define FMA(acc, a, b) __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b))

INLINE void qkf_keys(const etk_strip *s, int32_t key, float *out, int R, int nv) {
  __m256 acc[MR][4];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < nv; j++) acc[i][j] = _mm256_setzero_ps();
  const int64_t stride = s->d_pad;
  const float *k = (const float *)s->k + key, *q = s->qf, *q3 = q + 3 * stride;
  for (int32_t c = 0; c < s->d_pad; c++, k += 64, q++, q3++) {
    __m256 kv[4];
    UNROLL for (int j = 0; j < nv; j++) kv[j] = _mm256_load_ps(k + 8 * j);
    UNROLL for (int i = 0; i < R; i++) {
      const __m256 b = _mm256_broadcast_ss(i < 3 ? q + i * stride : q3 + (i - 3) * stride);
      UNROLL for (int j = 0; j < nv; j++) FMA(acc[i][j], b, kv[j]);
    }
  }
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < nv; j++) _mm256_storeu_ps(out + 64 * i + key + 8 * j, acc[i][j]);
}
INLINE void qkf(const etk_strip *s, float *out, int R) {
  const int nv = R <= 2 ? 4 : 2;
  for (int32_t key = 0; key < 64; key += 8 * nv) qkf_keys(s, key, out, R, nv);
}

INLINE void pvf(const etk_strip *s, const float *p, const float *a, int32_t c, int R, int n) {
  __m256 acc[MR][4];
  const float *v = (const float *)s->v + c;
  float *o = s->o + c;
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < n; j++)
      acc[i][j] = _mm256_mul_ps(_mm256_set1_ps(a[i]), _mm256_loadu_ps(o + (int64_t)i * s->dv_pad + 8 * j));
  for (int32_t t = 0; t < 64; t++, v += s->dv_pad) {
    __m256 vv[4];
    UNROLL for (int j = 0; j < n; j++) vv[j] = _mm256_load_ps(v + 8 * j);
    UNROLL for (int i = 0; i < R; i++) {
      const __m256 b = _mm256_broadcast_ss(p + i * 64 + t);
      UNROLL for (int j = 0; j < n; j++) FMA(acc[i][j], b, vv[j]);
    }
  }
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < n; j++)
      _mm256_storeu_ps(o + (int64_t)i * s->dv_pad + 8 * j, acc[i][j]);
}
INLINE void pvf_all(const etk_strip *s, const float *p, const float *a, int R) {
  int32_t c = 0;
  if (R <= 2)
    for (; c + 32 <= s->dv_pad; c += 32) pvf(s, p, a, c, R, 4);
  for (; c < s->dv_pad; c += 16) pvf(s, p, a, c, R, 2);
}

INLINE float max_of(const float *y) {
  __m256 m[4];
  UNROLL for (int j = 0; j < 4; j++) m[j] = _mm256_max_ps(_mm256_loadu_ps(y + 16 * j), _mm256_loadu_ps(y + 16 * j + 8));
  return top_lane(_mm256_max_ps(_mm256_max_ps(m[0], m[1]), _mm256_max_ps(m[2], m[3])));
}

/* One row of logits with maximum mt to p relative to the new m; returns a, the factor of the old state. */
INLINE float soften_row(const etk_strip *s, int32_t i, const float *y, float mt, float *p) {
  if (mt == -INFINITY) {
    memset(p, 0, 64 * sizeof *p);
    return 1.0f;
  }
  const float old = s->m[i], mn = old > mt ? old : mt;
  const __m256 most = _mm256_set1_ps(mn);
  __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  UNROLL for (int j = 0; j < 8; j++) {
    const __m256 e = exp2_ps(_mm256_sub_ps(_mm256_loadu_ps(y + 8 * j), most));
    sum[j & 1] = _mm256_add_ps(sum[j & 1], e);
    _mm256_storeu_ps(p + 8 * j, e);
  }
  sum[0] = _mm256_add_ps(sum[0], sum[1]);
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(sum[0]), _mm256_extractf128_ps(sum[0], 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  const float total = _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  const float a = old == mn ? 1.0f : _mm256_cvtss_f32(exp2_wide(_mm256_set1_ps(old - mn)));
  s->l[i] = a * s->l[i] + total;
  s->m[i] = mn;
  return a;
}

static void softmax_f32(const etk_strip *s, const float *y, float *p) {
  for (int32_t i = 0; i < s->rows; i++, y += 64, p += 64) {
    const float a = soften_row(s, i, y, max_of(y), p);
    if (a == 1.0f) continue;
    float *o = s->o + (int64_t)i * s->dv_pad;
    for (int32_t c = 0; c < s->dv_pad; c += 8) _mm256_storeu_ps(o + c, _mm256_mul_ps(_mm256_set1_ps(a), _mm256_loadu_ps(o + c)));
  }
}

static void hide(float *y, uint64_t mask) {
  for (int j = 0; j < 8; j++) {
    const __m256 on = _mm256_castsi256_ps(bits_to_lanes((uint32_t)(mask >> 8 * j) & 255));
    _mm256_storeu_ps(y + 8 * j, _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), _mm256_loadu_ps(y + 8 * j), on));
  }
}

/* Softmax of a strip in place; 0: the strip is left out. */
static __attribute__((noinline)) int soften_strip(const etk_strip *s, float *y, float *a) {
  float top[MR];
  int needed = s->skip_log2 == 0.0f;
  for (int32_t i = 0; i < s->rows; i++) {
    if (s->mask) hide(y + 64 * i, s->mask[i]);
    top[i] = max_of(y + 64 * i);
    if (top[i] != -INFINITY && !(top[i] < s->m[i] - s->skip_log2)) needed = 1;
  }
  if (!needed) return 0;
  for (int32_t i = 0; i < s->rows; i++) a[i] = soften_row(s, i, y + 64 * i, top[i], y + 64 * i);
  return 1;
}

INLINE void stripf(const etk_strip *s, int R) {
  float y[MR * 64] __attribute__((aligned(32))), a[8];
  qkf(s, y, R);
  if (soften_strip(s, y, a)) pvf_all(s, y, a, R);
}
