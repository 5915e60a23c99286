/* Sixteen floats as two AVX2 registers. */
#include <immintrin.h>
typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi;
typedef vi vm; /* all ones or all zeros per lane */

static inline vf two(__m256 a, __m256 b) { vf r = {a, b}; return r; }
static inline vi itwo(__m256i a, __m256i b) { vi r = {a, b}; return r; }
static inline vf f_load(const float *p) { return two(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static inline void f_store(float *p, vf v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
static inline vf f_set(float x) { return two(_mm256_set1_ps(x), _mm256_set1_ps(x)); }
static inline vi i_of(vf x) { return itwo(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)); }
static inline vf f_of(vi x) { return two(_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)); }
static inline vm low16(int64_t n) {
  static const int32_t ones[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  const int32_t *p = ones + 16 - n;
  return itwo(_mm256_loadu_si256((const __m256i *)(const void *)p), _mm256_loadu_si256((const __m256i *)(const void *)(p + 8)));
}
static inline vf f_sel(vm m, vf x, vf y) {
  const vf t = f_of(m);
  return two(_mm256_blendv_ps(y.a, x.a, t.a), _mm256_blendv_ps(y.b, x.b, t.b));
}
static inline vi i_sel(vm m, vi x, vi y) { return i_of(f_sel(m, f_of(x), f_of(y))); }
static inline vf f_loadn(const float *p, int64_t n, float fill) {
  const vm m = low16(n);
  return f_sel(m, two(_mm256_maskload_ps(p, m.a), _mm256_maskload_ps(p + 8, m.b)), f_set(fill));
}
static inline void f_storen(float *p, vf v, int64_t n) {
  const vm m = low16(n);
  _mm256_maskstore_ps(p, m.a, v.a);
  _mm256_maskstore_ps(p + 8, m.b, v.b);
}
static inline vf f_add(vf x, vf y) { return two(_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)); }
static inline vf f_sub(vf x, vf y) { return two(_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)); }
static inline vf f_mul(vf x, vf y) { return two(_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)); }
static inline vf f_div(vf x, vf y) { return two(_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)); }
static inline vf f_max(vf x, vf y) { return two(_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)); }
static inline vf f_min(vf x, vf y) { return two(_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)); }
static inline vi i_set(int32_t x) { return itwo(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
static inline vi i_add(vi x, vi y) { return itwo(_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)); }
static inline vi i_sub(vi x, vi y) { return itwo(_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)); }
static inline vi i_and(vi x, vi y) { return itwo(_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)); }
static inline vi i_add_or_0(vm m, vi x, vi y) { return i_and(m, i_add(x, y)); }
static inline vi i_xor(vi x, vi y) { return itwo(_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)); }
static inline vi i_shl23(vi x) { return itwo(_mm256_slli_epi32(x.a, 23), _mm256_slli_epi32(x.b, 23)); }
static inline vi i_load(const int32_t *p) {
  return itwo(_mm256_loadu_si256((const __m256i *)(const void *)p), _mm256_loadu_si256((const __m256i *)(const void *)(p + 8)));
}
static inline void i_store(int32_t *p, vi v) {
  _mm256_storeu_si256((__m256i *)(void *)p, v.a);
  _mm256_storeu_si256((__m256i *)(void *)(p + 8), v.b);
}
static inline vf f_from_i(vi x) { return two(_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)); }
static inline vm m_lt(vf x, vf y) { return i_of(two(_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))); }
static inline vm m_ge(vf x, vf y) { return i_of(two(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ))); }
static inline vm m_nan2(vf x, vf y) { /* either is NaN */
  return i_of(two(_mm256_cmp_ps(x.a, y.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, y.b, _CMP_UNORD_Q)));
}
static inline vm m_or(vm x, vm y) { return itwo(_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)); }
static inline vm m_and(vm x, vm y) { return i_and(x, y); }
static inline vm m_none(void) { return i_set(0); }
static inline uint32_t m_bits(vm m) {
  const vf t = f_of(m);
  return (uint32_t)_mm256_movemask_ps(t.a) | (uint32_t)_mm256_movemask_ps(t.b) << 8;
}
static inline int m_any(vm m) { return m_bits(m) != 0; }
static inline vm m_from_bytes(const uint8_t *p) {
  const __m128i z = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(const void *)p), _mm_setzero_si128());
  const __m128i m = _mm_xor_si128(z, _mm_set1_epi8(-1));
  return itwo(_mm256_cvtepi8_epi32(m), _mm256_cvtepi8_epi32(_mm_srli_si128(m, 8)));
}
static inline float f_sum(vf v) {
  const __m256 a = _mm256_add_ps(v.a, v.b);
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
static inline float f_top(vf v) {
  const __m256 a = _mm256_max_ps(v.a, v.b);
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
static inline void i8_store(int8_t *p, vi x) { /* the low byte of each lane */
  const vi v = i_and(x, i_set(255));
  const __m256i w = _mm256_permute4x64_epi64(_mm256_packus_epi32(v.a, v.b), 0xd8);
  const __m128i b = _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
  _mm_storeu_si128((__m128i *)(void *)p, b);
}
static inline void i8_storen(int8_t *p, vi v, int64_t n) {
  int8_t t[16];
  i8_store(t, v);
  for (int64_t i = 0; i < n; i++) p[i] = t[i];
}
static inline vf f_swap(vf v) { return two(_mm256_permute_ps(v.a, 0xb1), _mm256_permute_ps(v.b, 0xb1)); }
static inline vf f_dup8(const float *p) {
  const __m256i at = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), up = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
  const __m256 v = _mm256_loadu_ps(p);
  return two(_mm256_permutevar8x32_ps(v, at), _mm256_permutevar8x32_ps(v, up));
}
/* acc[lane] += sum of four products. Codes lie in -127..127, so a pair of products fits 16 bits: |a| times b with a's sign. */
#define ETK_DOT_BIAS 0
typedef vi vdot;
static inline vdot i_dot_b(const int8_t *b) { return i_load((const int32_t *)(const void *)b); }
static inline __m256i dot8(__m256i acc, __m256i a, __m256i b) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static inline vi i_dot4(vi acc, const int8_t *a, vdot b) {
  int32_t quad;
  memcpy(&quad, a, 4);
  const __m256i q = _mm256_set1_epi32(quad);
  return itwo(dot8(acc.a, q, b.a), dot8(acc.b, q, b.b));
}
#define ETK_TILE 4
