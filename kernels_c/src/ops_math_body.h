/* exp, and erf(x / sqrt 2), on 16 lanes.
 *
 * exp: n = rint(x log2 e), r = x - n ln 2 in two parts, 1 + r + r^2 P4(r), times 2^n by adding to the exponent. Valid, and
 * within 2 units in the last place, on [EXP_LOW, EXP_HIGH]; outside the caller clamps. NaN stays NaN.
 * erf: an odd rational of degree 11 over 10 fitted to |x| <= 5.5; 1.5e-8 off before rounding. */
#define EXP_LOW -86.5f /* 2^-124.8: results stay normal numbers */
#define EXP_HIGH 88.0f
#define ROUND 12582912.0f /* 1.5 x 2^23: adding it rounds to an integer, to even, which then lies in the low bits */

static inline vf v_exp(vf x) {
  const vf round = f_set(ROUND);
  const vf t = f_add(f_mul(x, f_set(1.44269504f)), round);
  const vf n = f_sub(t, round);
  vf r = f_sub(x, f_mul(n, f_set(0.693359375f))); /* exact: nine bits times at most eight */
  r = f_add(r, f_mul(n, f_set(2.12194440e-4f)));  /* ln 2 - 0.693359375, negated */
  vf p = f_set(0.00138144672f);
  p = f_add(f_mul(p, r), f_set(0.00836878084f));
  p = f_add(f_mul(p, r), f_set(0.0416683927f));
  p = f_add(f_mul(p, r), f_set(0.166665196f));
  p = f_add(f_mul(p, r), f_set(0.49999994f));
  p = f_add(f_add(f_mul(p, f_mul(r, r)), r), f_set(1.0f));
  return f_of(i_add(i_of(p), i_shl23(i_of(t))));
}

/* exp(x) for x <= 0 or NaN; below EXP_LOW exactly 0. */
static inline vf v_exp_neg(vf x) {
  const vf y = v_exp(f_max(f_set(EXP_LOW), x)); /* the order keeps NaN: MAXPS returns its second operand */
  return f_sel(m_lt(x, f_set(EXP_LOW)), f_set(0.0f), f_sel(m_nan(x), x, y));
}

/* x / (1 + exp(-z)): x times the logistic function of z. */
static inline vf v_logistic(vf x, vf z) {
  const vf n = f_sub(f_set(0.0f), z);
  const vf e = v_exp(f_min(f_set(EXP_HIGH), f_max(f_set(EXP_LOW), n)));
  const vf y = f_div(x, f_add(f_set(1.0f), e));
  return f_sel(m_lt(z, f_set(-EXP_HIGH)), f_set(0.0f), f_sel(m_nan(x), x, y));
}

static inline vf v_silu(vf x) { return v_logistic(x, x); }

/* 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x logistic(2 sqrt(2 / pi) (...)) */
static inline vf v_gelu_tanh(vf x) {
  const vf z = f_mul(x, f_add(f_set(1.59576912f), f_mul(f_set(0.0713548163f), f_mul(x, x))));
  return v_logistic(x, z);
}

/* 0.5 x (1 + erf(x / sqrt 2)); 0 below -5.5, where the value is above -1.05e-7. */
static inline vf v_gelu_erf(vf x) {
  const vf c = f_min(f_set(5.5f), f_max(f_set(-5.5f), x));
  const vf t = f_mul(c, c);
  vf p = f_set(4.5498630640850024e-08f);
  p = f_add(f_mul(p, t), f_set(1.270426218979992e-05f));
  p = f_add(f_mul(p, t), f_set(0.0003376543754711747f));
  p = f_add(f_mul(p, t), f_set(0.009354540146887302f));
  p = f_add(f_mul(p, t), f_set(0.06770558655261993f));
  p = f_add(f_mul(p, t), f_set(0.797884464263916f));
  vf q = f_set(1.1975034794886597e-06f);
  q = f_add(f_mul(q, t), f_set(7.364799967035651e-05f));
  q = f_add(f_mul(q, t), f_set(0.0018844534642994404f));
  q = f_add(f_mul(q, t), f_set(0.02864595502614975f));
  q = f_add(f_mul(q, t), f_set(0.2515222728252411f));
  q = f_add(f_mul(q, t), f_set(1.0f));
  const vf phi = f_add(f_set(0.5f), f_mul(f_set(0.5f), f_div(f_mul(c, p), q)));
  return f_sel(m_lt(x, f_set(-5.5f)), f_set(0.0f), f_mul(x, phi));
}

/* rint(x) clamped to -127..127 as integers; NaN is 0. */
static inline vi v_code(vf x) {
  const vf c = f_min(f_set(127.0f), f_max(f_set(-127.0f), x));
  return i_sub(i_of(f_add(f_sel(m_nan(x), f_set(0.0f), c), f_set(ROUND))), i_set(0x4b400000));
}
static inline vf v_abs(vf x) { return f_of(i_and(i_of(x), i_set(0x7fffffff))); }
/* |x| where it is finite, else 0. */
static inline vf v_abs_finite(vf x) {
  const vf a = v_abs(x);
  return f_sel(m_lt(a, f_set(INFINITY)), a, f_set(0.0f));
}
/* The scale of a row whose largest finite magnitude is top, and what to multiply by; a row too small to have one is zero. */
static inline float scale_of(float top, float *inverse) {
  const float s = top * (1.0f / 127.0f) > 0.0f ? top / 127.0f : 1.0f, inv = 1.0f / s;
  if (!(inv <= FLT_MAX)) {
    *inverse = 0.0f;
    return 1.0f;
  }
  *inverse = inv;
  return s;
}
/* The first n lanes, the others 0. */
static inline vf f_low(vf x, int64_t n) {
  float t[16] = {0};
  f_storen(t, x, n);
  return f_load(t);
}
