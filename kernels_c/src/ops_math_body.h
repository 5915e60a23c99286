/* Exponentials and the error function on 16 lanes, in plain adds and multiplies: no instruction set is given a fused one.
 *
 * 2^t: n = rint(t), f = t - n (exact), 2^f as a polynomial of degree 5 within 1.9e-7 of itself (relative, rounding included),
 * times 2^n by adding to the exponent. exp(x) is 2^(x log2 e); the rounding of that product adds |x| 2^-24.
 * Phi: 1/2 plus an odd rational of degree 11 over 10 fitted to |x| <= 5.5, 1.5e-8 off before rounding. */
#define ROUND 12582912.0f /* 1.5 x 2^23: adding it rounds to an integer, to even, which then lies in the low bits */
#define LOG2E 1.44269504f
#define EXP2_LOW -125.0f  /* from here on results are normal numbers */

/* 1 + f (c1 + f (c2 + ...)) before the exponent is added; *s holds n in its low bits. */
static inline vf v_exp2_parts(vf t, vf *s) {
  *s = f_add(t, f_set(ROUND));
  const vf f = f_sub(t, f_sub(*s, f_set(ROUND)));
  vf p = f_set(0.0013264591107144952f);
  p = f_add(f_mul(p, f), f_set(0.009671619161963463f));
  p = f_add(f_mul(p, f), f_set(0.0555073507130146f));
  p = f_add(f_mul(p, f), f_set(0.24022240936756134f));
  p = f_add(f_mul(p, f), f_set(0.6931470036506653f));
  return f_add(f_mul(p, f), f_set(1.0f));
}

/* 2^t for t in [-126, 128]; exactly infinity at 128. */
static inline vf v_exp2(vf t) {
  vf s;
  const vf p = v_exp2_parts(t, &s);
  return f_of(i_add(i_of(p), i_shl23(i_of(s))));
}

/* 2^t for t <= 0, exactly 0 below EXP2_LOW and for NaN. */
static inline vf v_exp2_neg(vf t) {
  vf s;
  const vf p = v_exp2_parts(t, &s);
  return f_of(i_add_or_0(m_ge(t, f_set(EXP2_LOW)), i_of(p), i_shl23(i_of(s))));
}
static inline vf v_exp_neg(vf x) { return v_exp2_neg(f_mul(x, f_set(LOG2E))); }

/* x / (1 + 2^t). 2^t is infinite from t = 128, where x, kept finite, gives 0; NaN in x stays. */
static inline vf v_logistic(vf x, vf t) {
  const vf e = v_exp2(f_min(f_set(128.0f), f_max(f_set(-126.0f), t)));
  return f_div(f_max(f_set(-FLT_MAX), x), f_add(f_set(1.0f), e));
}

static inline vf v_silu(vf x) { return v_logistic(x, f_mul(x, f_set(-LOG2E))); }

/* 0.5 x (1 + tanh(z)) = x / (1 + exp(-2 z)), z = sqrt(2 / pi) (x + 0.044715 x^3) */
static inline vf v_gelu_tanh(vf x) {
  const vf t = f_mul(x, f_add(f_set(-2.3022082f), f_mul(f_set(-0.10294324f), f_mul(x, x))));
  return v_logistic(x, t);
}

/* x Phi(x); 0 below -5.5, where the value is above -1.05e-7. */
static inline vf v_gelu_erf(vf x) {
  const vf c = f_min(f_set(5.5f), f_max(f_set(-5.5f), x));
  const vf t = f_mul(c, c);
  vf p = f_set(0.5f * 4.5498630640850024e-08f);
  p = f_add(f_mul(p, t), f_set(0.5f * 1.270426218979992e-05f));
  p = f_add(f_mul(p, t), f_set(0.5f * 0.0003376543754711747f));
  p = f_add(f_mul(p, t), f_set(0.5f * 0.009354540146887302f));
  p = f_add(f_mul(p, t), f_set(0.5f * 0.06770558655261993f));
  p = f_add(f_mul(p, t), f_set(0.5f * 0.797884464263916f));
  vf q = f_set(1.1975034794886597e-06f);
  q = f_add(f_mul(q, t), f_set(7.364799967035651e-05f));
  q = f_add(f_mul(q, t), f_set(0.0018844534642994404f));
  q = f_add(f_mul(q, t), f_set(0.02864595502614975f));
  q = f_add(f_mul(q, t), f_set(0.2515222728252411f));
  q = f_add(f_mul(q, t), f_set(1.0f));
  const vf phi = f_add(f_set(0.5f), f_div(f_mul(c, p), q));
  return f_sel(m_lt(x, f_set(-5.5f)), f_set(0.0f), f_mul(x, phi));
}

/* rint(x) in the low byte of each lane: of |x| <= 127.5, or of anything, clamped to -127..127, NaN giving 0. */
static inline vi v_code(vf x) { return i_of(f_add(x, f_set(ROUND))); }
static inline vi v_code_any(vf x) {
  const vf c = f_min(f_set(127.0f), f_max(f_set(-127.0f), x));
  return v_code(f_sel(m_nan2(x, x), f_set(0.0f), c));
}
static inline vf v_abs(vf x) { return f_of(i_and(i_of(x), i_set(0x7fffffff))); }
/* |x| where it is finite, else 0. */
static inline vf v_abs_finite(vf x) {
  const vf a = v_abs(x);
  return f_sel(m_lt(a, f_set(INFINITY)), a, f_set(0.0f));
}
/* The scale of a row whose largest finite magnitude is top, and what to multiply by; a row too small to have one is zero. */
static inline float scale_of(float top, float *inverse) {
  const float s = top / 127.0f, inv = 1.0f / s;
  const int fine = s > 0.0f && inv <= FLT_MAX;
  *inverse = fine ? inv : 0.0f;
  return fine ? s : 1.0f;
}
/* The first n lanes, the others 0. */
static inline vf f_low(vf x, int64_t n) {
  float t[16] = {0};
  f_storen(t, x, n);
  return f_load(t);
}
