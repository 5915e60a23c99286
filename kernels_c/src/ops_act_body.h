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

/* Softmax of rows: s = scale x + mask (or -inf where the bool mask is 0); y = exp(s - max s) / sum. A row without a finite
 * largest entry because all of it is masked or -inf gives 0. The logits wait in y between the passes. */
static inline vf soft_in(const float *x, const float *mask, const uint8_t *keep, vf scale, int64_t i) {
  vf s = f_mul(f_load(x + i), scale);
  if (mask) s = f_add(s, f_load(mask + i));
  if (keep) s = f_sel(m_from_bytes(keep + i), s, f_set(-INFINITY));
  return s;
}
static inline vf soft_inn(const float *x, const float *mask, const uint8_t *keep, vf scale, int64_t i, int64_t n) {
  float t[16];
  uint8_t k[16] = {0};
  f_store(t, f_mul(f_loadn(x + i, n, 0.0f), scale));
  if (mask) f_store(t, f_add(f_load(t), f_loadn(mask + i, n, 0.0f)));
  if (keep) {
    for (int64_t j = 0; j < n; j++) k[j] = keep[i + j];
    f_store(t, f_sel(m_from_bytes(k), f_load(t), f_set(-INFINITY)));
  }
  return f_loadn(t, n, -INFINITY);
}

static void k_softmax(etk_rows *a) {
  const int64_t cols = a->cols, full = cols & ~(int64_t)15;
  const vf scale = f_set(a->f[0]), low = f_set(-INFINITY);
  for (int64_t row = 0; row < a->rows; row++) {
    const float *x = ROW(0), *mask = a->at[1] ? ROW(1) : NULL;
    const uint8_t *keep = a->at[2] ? (const uint8_t *)(a->at[2] + row * a->step[2]) : NULL;
    float *y = ROW(3);
    vf top = low;
    vm odd = m_none();
    for (int64_t i = 0; i < full; i += 16) {
      const vf s = soft_in(x, mask, keep, scale, i);
      f_store(y + i, s);
      odd = m_or(odd, m_nan(s));
      top = f_max(s, top); /* NaN in s leaves top as it is */
    }
    if (full < cols) {
      const vf s = soft_inn(x, mask, keep, scale, full, cols - full);
      f_storen(y + full, s, cols - full);
      odd = m_or(odd, m_nan(s));
      top = f_max(s, top);
    }
    const float t = m_any(odd) ? NAN : f_top(top);
    if (t == -INFINITY) {
      memset(y, 0, (size_t)cols * sizeof *y);
      continue;
    }
    const vf peak = f_set(t);
    vf u = f_set(0.0f), v = u;
    int64_t i = 0;
    for (; i + 32 <= full; i += 32) {
      const vf e = v_exp_neg(f_sub(f_load(y + i), peak)), f = v_exp_neg(f_sub(f_load(y + i + 16), peak));
      f_store(y + i, e), f_store(y + i + 16, f);
      u = f_add(u, e), v = f_add(v, f);
    }
    for (; i < cols; i += 16) {
      const int64_t n = cols - i < 16 ? cols - i : 16;
      const vf e = v_exp_neg(f_sub(f_loadn(y + i, n, -INFINITY), peak));
      f_storen(y + i, e, n);
      u = f_add(u, e);
    }
    const vf inv = f_set(1.0f / f_sum(f_add(u, v)));
    for (i = 0; i < full; i += 16) f_store(y + i, f_mul(f_load(y + i), inv));
    if (full < cols) f_storen(y + full, f_mul(f_loadn(y + full, cols - full, 0.0f), inv), cols - full);
  }
}
#undef MAP1
#undef MAP2
#undef ROW
