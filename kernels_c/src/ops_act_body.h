/* Element-wise: y = f(x), f(gate) * up, a + b. One load and one store per 16 elements and the polynomial between. */
#define ROW(s) ((float *)(void *)(a->at[s] + row * a->step[s]))
#define MAP1(name, f)                                             \
  static void name(etk_rows *a) {                                 \
    const int64_t cols = a->cols;                                 \
    for (int64_t row = 0; row < a->rows; row++) {                 \
      const float *x = ROW(0);                                    \
      float *y = ROW(1);                                          \
      int64_t i = 0;                                              \
      for (; i + 16 <= cols; i += 16) f_store(y + i, f(f_load(x + i))); \
      if (i < cols) f_storen(y + i, f(f_loadn(x + i, cols - i, 0.0f)), cols - i); \
    }                                                             \
  }
#define MAP2(name, f)                                             \
  static void name(etk_rows *a) {                                 \
    const int64_t cols = a->cols;                                 \
    for (int64_t row = 0; row < a->rows; row++) {                 \
      const float *x = ROW(0), *u = ROW(1);                       \
      float *y = ROW(2);                                          \
      int64_t i = 0;                                              \
      for (; i + 16 <= cols; i += 16) f_store(y + i, f(f_load(x + i), f_load(u + i))); \
      if (i < cols) {                                             \
        const int64_t n = cols - i;                               \
        f_storen(y + i, f(f_loadn(x + i, n, 0.0f), f_loadn(u + i, n, 0.0f)), n); \
      }                                                           \
    }                                                             \
  }
static inline vf v_swiglu(vf g, vf u) { return f_mul(v_silu(g), u); }
MAP1(k_gelu_erf, v_gelu_erf)
MAP1(k_gelu_tanh, v_gelu_tanh)
MAP1(k_silu, v_silu)
MAP1(k_exp, v_exp_neg)
MAP2(k_swiglu, v_swiglu)
MAP2(k_add, f_add)
static void k_gelu(etk_rows *a) { (a->i[0] ? k_gelu_tanh : k_gelu_erf)(a); }

/* Softmax of rows: s = scale x + mask (or -inf where the bool mask is 0); y = exp(s - max s) / sum, in base 2. A row without
 * anything finite because all of it is masked or -inf gives 0; NaN or +inf gives NaN. Three passes over a row in L1: the
 * largest entry, the exponentials (21 operations per 16), the division. Masked logits wait in y between the first two. */
static inline vf soft_in(const float *x, const float *mask, const uint8_t *keep, vf k, int64_t i) {
  vf s = f_mul(f_load(x + i), k);
  if (mask) s = f_add(s, f_mul(f_load(mask + i), f_set(LOG2E)));
  if (keep) s = f_sel(m_from_bytes(keep + i), s, f_set(-INFINITY));
  return s;
}
/* The masked logits of the last n < 16 entries, -inf beyond them. */
static inline vf soft_inn(const float *x, const float *mask, const uint8_t *keep, vf k, int64_t i, int64_t n) {
  float t[16] = {0}, m[16] = {0};
  uint8_t bits[16] = {0};
  f_storen(t, f_loadn(x + i, n, 0.0f), n);
  if (mask) f_storen(m, f_loadn(mask + i, n, 0.0f), n);
  for (int64_t j = 0; keep && j < n; j++) bits[j] = keep[i + j];
  f_store(t, soft_in(t, mask ? m : NULL, keep ? bits : NULL, k, 0));
  return f_loadn(t, n, -INFINITY);
}

/* The largest entry; NaN if there is one. */
static float soft_top(const float *x, int64_t cols) {
  vf t0 = f_set(-INFINITY), t1 = t0;
  vm odd = m_none();
  int64_t i = 0;
  for (; i + 32 <= cols; i += 32) {
    const vf u = f_load(x + i), v = f_load(x + i + 16);
    odd = m_or(odd, m_nan2(u, v));
    t0 = f_max(u, t0), t1 = f_max(v, t1); /* the order leaves NaN out */
  }
  for (; i < cols; i += 16) {
    const vf u = cols - i < 16 ? f_loadn(x + i, cols - i, -INFINITY) : f_load(x + i);
    odd = m_or(odd, m_nan2(u, u));
    t0 = f_max(u, t0);
  }
  return m_any(odd) ? NAN : f_top(f_max(t0, t1));
}

/* y = 2^(k x - peak); returns the sum. */
static float soft_exp(const float *x, int64_t cols, float scale, float top, float *y) {
  const vf k = f_set(scale), peak = f_set(top);
  vf u = f_set(0.0f), v = u;
  int64_t i = 0;
  for (; i + 32 <= cols; i += 32) {
    const vf e = v_exp2_neg(f_sub(f_mul(f_load(x + i), k), peak)), f = v_exp2_neg(f_sub(f_mul(f_load(x + i + 16), k), peak));
    f_store(y + i, e), f_store(y + i + 16, f);
    u = f_add(u, e), v = f_add(v, f);
  }
  for (; i < cols; i += 16) {
    const int64_t n = cols - i < 16 ? cols - i : 16;
    const vf e = v_exp2_neg(f_sub(f_mul(f_loadn(x + i, n, 0.0f), k), peak)), w = n < 16 ? f_low(e, n) : e;
    f_storen(y + i, w, n);
    u = f_add(u, w);
  }
  return f_sum(f_add(u, v));
}

static void k_softmax(etk_rows *a) {
  const int64_t cols = a->cols, full = cols & ~(int64_t)15;
  const float k = a->f[0] * LOG2E;
  const int plain = !a->at[1] && !a->at[2] && k > 0.0f;
  for (int64_t row = 0; row < a->rows; row++) {
    const float *x = ROW(0), *mask = a->at[1] ? ROW(1) : NULL;
    const uint8_t *keep = a->at[2] ? (const uint8_t *)(a->at[2] + row * a->step[2]) : NULL;
    float *y = ROW(3);
    int64_t i = 0;
    for (; !plain && i < full; i += 16) f_store(y + i, soft_in(x, mask, keep, f_set(k), i));
    if (!plain && i < cols) f_storen(y + i, soft_inn(x, mask, keep, f_set(k), i, cols - i), cols - i);
    const float top = plain ? soft_top(x, cols) * k : soft_top(y, cols);
    if (!(top > -INFINITY && top < INFINITY)) {
      const float all = top == -INFINITY ? 0.0f : NAN;
      for (i = 0; i < cols; i++) y[i] = all;
      continue;
    }
    const float sum = plain ? soft_exp(x, cols, k, top, y) : soft_exp(y, cols, 1.0f, top, y);
    const vf inv = f_set(1.0f / sum);
    for (i = 0; i < full; i += 16) f_store(y + i, f_mul(f_load(y + i), inv));
    if (i < cols) f_storen(y + i, f_mul(f_loadn(y + i, cols - i, 0.0f), inv), cols - i);
  }
}
#undef MAP1
#undef MAP2
#undef ROW
