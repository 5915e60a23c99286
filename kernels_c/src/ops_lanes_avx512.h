/* Sixteen floats as one AVX-512 register (F, BW, DQ, VL, VNNI). */
#include <immintrin.h>
typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

static inline __mmask16 low16(int64_t n) { return (__mmask16)((1u << n) - 1u); } /* n in 0..16 */
static inline vf f_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void f_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
static inline vf f_set(float x) { return _mm512_set1_ps(x); }
static inline vf f_loadn(const float *p, int64_t n, float fill) { return _mm512_mask_loadu_ps(f_set(fill), low16(n), p); }
static inline void f_storen(float *p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, low16(n), v); }
static inline vf f_add(vf x, vf y) { return _mm512_add_ps(x, y); }
static inline vf f_sub(vf x, vf y) { return _mm512_sub_ps(x, y); }
static inline vf f_mul(vf x, vf y) { return _mm512_mul_ps(x, y); }
static inline vf f_div(vf x, vf y) { return _mm512_div_ps(x, y); }
static inline vf f_max(vf x, vf y) { return _mm512_max_ps(x, y); }
static inline vf f_min(vf x, vf y) { return _mm512_min_ps(x, y); }
static inline vi i_of(vf x) { return _mm512_castps_si512(x); }
static inline vf f_of(vi x) { return _mm512_castsi512_ps(x); }
static inline vi i_set(int32_t x) { return _mm512_set1_epi32(x); }
static inline vi i_add(vi x, vi y) { return _mm512_add_epi32(x, y); }
static inline vi i_sub(vi x, vi y) { return _mm512_sub_epi32(x, y); }
static inline vi i_and(vi x, vi y) { return _mm512_and_si512(x, y); }
static inline vi i_xor(vi x, vi y) { return _mm512_xor_si512(x, y); }
static inline vi i_shl23(vi x) { return _mm512_slli_epi32(x, 23); }
static inline vi i_load(const int32_t *p) { return _mm512_loadu_si512(p); }
static inline void i_store(int32_t *p, vi v) { _mm512_storeu_si512(p, v); }
static inline vf f_from_i(vi x) { return _mm512_cvtepi32_ps(x); }
static inline vm m_lt(vf x, vf y) { return _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ); }
static inline vm m_ge(vf x, vf y) { return _mm512_cmp_ps_mask(x, y, _CMP_GE_OQ); }
static inline vm m_nan2(vf x, vf y) { return _mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q); } /* either is NaN */
static inline vm m_or(vm x, vm y) { return (vm)(x | y); }
static inline vm m_and(vm x, vm y) { return (vm)(x & y); }
static inline vm m_none(void) { return 0; }
static inline vi i_add_or_0(vm m, vi x, vi y) { return _mm512_maskz_add_epi32(m, x, y); }
static inline vi i_sel(vm m, vi x, vi y) { return _mm512_mask_mov_epi32(y, m, x); }
static inline vf f_sel(vm m, vf x, vf y) { return _mm512_mask_mov_ps(y, m, x); }
static inline uint32_t m_bits(vm m) { return m; }
static inline int m_any(vm m) { return m != 0; }
static inline vm m_from_bytes(const uint8_t *p) {
  const __m128i v = _mm_loadu_si128((const __m128i *)(const void *)p);
  return _mm_test_epi8_mask(v, v);
}
static inline float f_sum(vf v) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
static inline float f_top(vf v) {
  const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
/* The low byte of each lane. */
static inline void i8_storen(int8_t *p, vi v, int64_t n) { _mm512_mask_cvtepi32_storeu_epi8(p, low16(n), v); }
static inline void i8_store(int8_t *p, vi v) { _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(v)); }
static inline vf f_swap(vf v) { return _mm512_permute_ps(v, 0xb1); }
static inline vf f_dup8(const float *p) {
  const __m512i at = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(at, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
/* acc[lane] += sum of four products. Codes of B become unsigned by + 128, which the caller takes back through the sums of
 * the codes of A, so that those can be broadcast from memory by the instruction itself. */
#define ETK_DOT_BIAS 128
typedef vi vdot;
static inline vdot i_dot_b(const int8_t *b) { return _mm512_xor_si512(_mm512_loadu_si512(b), _mm512_set1_epi8(-128)); }
static inline vi i_dot4(vi acc, const int8_t *a, vdot b) {
  int32_t quad;
  memcpy(&quad, a, 4);
  return _mm512_dpbusd_epi32(acc, b, _mm512_set1_epi32(quad));
}
#define ETK_TILE 8
