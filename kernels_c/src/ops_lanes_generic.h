/* Sixteen floats as four vectors of four, in the compiler's own vector types: SSE2, NEON, or whatever the baseline has. */
typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef uint32_t u4 __attribute__((vector_size(16))); /* integers wrap */
typedef struct { f4 a, b, c, d; } vf;
typedef struct { i4 a, b, c, d; } vi;
typedef vi vm; /* all ones or all zeros per lane */

#define EACH2(out, x, y, op) \
  out r = {x.a op y.a, x.b op y.b, x.c op y.c, x.d op y.d}; \
  return r

static inline f4 ld4(const float *p) { f4 v; memcpy(&v, p, 16); return v; }
static inline vf f_load(const float *p) { vf r = {ld4(p), ld4(p + 4), ld4(p + 8), ld4(p + 12)}; return r; }
static inline void f_store(float *p, vf v) {
  memcpy(p, &v.a, 16); memcpy(p + 4, &v.b, 16); memcpy(p + 8, &v.c, 16); memcpy(p + 12, &v.d, 16);
}
static inline vf f_set(float x) { const f4 v = {x, x, x, x}; vf r = {v, v, v, v}; return r; }
static inline vf f_loadn(const float *p, int64_t n, float fill) {
  float t[16];
  for (int i = 0; i < 16; i++) t[i] = i < n ? p[i] : fill;
  return f_load(t);
}
static inline void f_storen(float *p, vf v, int64_t n) {
  float t[16];
  f_store(t, v);
  for (int64_t i = 0; i < n; i++) p[i] = t[i];
}
static inline vf f_add(vf x, vf y) { EACH2(vf, x, y, +); }
static inline vf f_sub(vf x, vf y) { EACH2(vf, x, y, -); }
static inline vf f_mul(vf x, vf y) { EACH2(vf, x, y, *); }
static inline vf f_div(vf x, vf y) { EACH2(vf, x, y, /); }
static inline vi i_of(vf x) { vi r = {(i4)x.a, (i4)x.b, (i4)x.c, (i4)x.d}; return r; }
static inline vf f_of(vi x) { vf r = {(f4)x.a, (f4)x.b, (f4)x.c, (f4)x.d}; return r; }
static inline vi i_set(int32_t x) { const i4 v = {x, x, x, x}; vi r = {v, v, v, v}; return r; }
static inline vi i_add(vi x, vi y) {
  vi r = {(i4)((u4)x.a + (u4)y.a), (i4)((u4)x.b + (u4)y.b), (i4)((u4)x.c + (u4)y.c), (i4)((u4)x.d + (u4)y.d)};
  return r;
}
static inline vi i_sub(vi x, vi y) {
  vi r = {(i4)((u4)x.a - (u4)y.a), (i4)((u4)x.b - (u4)y.b), (i4)((u4)x.c - (u4)y.c), (i4)((u4)x.d - (u4)y.d)};
  return r;
}
static inline vi i_and(vi x, vi y) { EACH2(vi, x, y, &); }
static inline vi i_xor(vi x, vi y) { EACH2(vi, x, y, ^); }
static inline vi i_shl23(vi x) {
  vi r = {(i4)((u4)x.a << 23), (i4)((u4)x.b << 23), (i4)((u4)x.c << 23), (i4)((u4)x.d << 23)};
  return r;
}
static inline vi i_load(const int32_t *p) { vi r; memcpy(&r, p, 64); return r; }
static inline void i_store(int32_t *p, vi v) { memcpy(p, &v, 64); }
static inline vf f_from_i(vi x) {
  vf r = {__builtin_convertvector(x.a, f4), __builtin_convertvector(x.b, f4), __builtin_convertvector(x.c, f4),
          __builtin_convertvector(x.d, f4)};
  return r;
}
static inline vm m_lt(vf x, vf y) { EACH2(vm, x, y, <); }
static inline vm m_ge(vf x, vf y) { EACH2(vm, x, y, >=); }
static inline vm m_nan2(vf x, vf y) { /* either is NaN */
  vm r = {(x.a != x.a) | (y.a != y.a), (x.b != x.b) | (y.b != y.b), (x.c != x.c) | (y.c != y.c), (x.d != x.d) | (y.d != y.d)};
  return r;
}
static inline vm m_or(vm x, vm y) { EACH2(vm, x, y, |); }
static inline vm m_and(vm x, vm y) { EACH2(vm, x, y, &); }
static inline vm m_none(void) { return i_set(0); }
static inline vi i_add_or_0(vm m, vi x, vi y) { return i_and(m, i_add(x, y)); }
static inline i4 pick4(i4 m, i4 x, i4 y) { return (m & x) | (~m & y); }
static inline vi i_sel(vm m, vi x, vi y) {
  vi r = {pick4(m.a, x.a, y.a), pick4(m.b, x.b, y.b), pick4(m.c, x.c, y.c), pick4(m.d, x.d, y.d)};
  return r;
}
static inline vf f_sel(vm m, vf x, vf y) { return f_of(i_sel(m, i_of(x), i_of(y))); }
/* As MAXPS and MINPS: the second operand when either is NaN. */
static inline vf f_max(vf x, vf y) { return f_sel(m_lt(y, x), x, y); }
static inline vf f_min(vf x, vf y) { return f_sel(m_lt(x, y), x, y); }
static inline uint32_t m_bits(vm m) {
  int32_t t[16];
  uint32_t r = 0;
  i_store(t, m);
  for (int i = 0; i < 16; i++) r |= (uint32_t)(t[i] & 1) << i;
  return r;
}
static inline int m_any(vm m) {
  const i4 o = m.a | m.b | m.c | m.d;
  return (o[0] | o[1] | o[2] | o[3]) != 0;
}
static inline vm m_from_bytes(const uint8_t *p) { /* non-zero bytes */
  int32_t t[16];
  for (int i = 0; i < 16; i++) t[i] = p[i] ? -1 : 0;
  return i_load(t);
}
/* Lane i with i + 8, then + 4, + 2, + 1. */
static inline float f_sum(vf v) {
  const f4 t = (v.a + v.c) + (v.b + v.d);
  return (t[0] + t[2]) + (t[1] + t[3]);
}
static inline float f_top(vf v) { /* of numbers, no NaN */
  float t[16], r;
  f_store(t, v);
  r = t[0];
  for (int i = 1; i < 16; i++) r = t[i] > r ? t[i] : r;
  return r;
}
static inline void i8_storen(int8_t *p, vi v, int64_t n) { /* the low byte of each lane */
  int32_t t[16];
  i_store(t, v);
  for (int64_t i = 0; i < n; i++) p[i] = (int8_t)(t[i] & 255);
}
static inline void i8_store(int8_t *p, vi v) { i8_storen(p, v, 16); }
static inline f4 swap4(f4 v) { const f4 r = {v[1], v[0], v[3], v[2]}; return r; }
static inline vf f_swap(vf v) { /* neighbours */
  vf r = {swap4(v.a), swap4(v.b), swap4(v.c), swap4(v.d)};
  return r;
}
static inline vf f_dup8(const float *p) { /* p0 p0 p1 p1 .. p7 p7 */
  const f4 a = {p[0], p[0], p[1], p[1]}, b = {p[2], p[2], p[3], p[3]}, c = {p[4], p[4], p[5], p[5]}, d = {p[6], p[6], p[7], p[7]};
  vf r = {a, b, c, d};
  return r;
}
#undef EACH2
#define ETK_TILE 4
