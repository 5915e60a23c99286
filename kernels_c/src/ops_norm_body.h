/* LayerNorm and RMSNorm of rows, residual added first, the result also as INT8 codes with one scale per row.
 *   h = x + residual;  LayerNorm: m = mean h, v = mean (h - m)^2;  RMSNorm: m = 0, v = mean h^2
 *   y = (h - m) / sqrt(v + eps) * gamma + beta;  scale = max|y| / 127, q = rint(y / scale)
 * Three passes over a row that stays in L1; bound by loads and stores. */
typedef struct norm_row {
  const float *x, *res, *gamma, *beta;
} norm_row;

static inline vf norm_h(const norm_row *r, int64_t i) {
  const vf x = f_load(r->x + i);
  return r->res ? f_add(x, f_load(r->res + i)) : x;
}
static inline vf norm_hn(const norm_row *r, int64_t i, int64_t n) {
  const vf x = f_loadn(r->x + i, n, 0.0f);
  return r->res ? f_add(x, f_loadn(r->res + i, n, 0.0f)) : x;
}

/* Sum of h; writes h to sum when it is wanted. */
static inline float norm_sum(const norm_row *r, int64_t cols, float *sum) {
  vf a = f_set(0.0f), b = a;
  int64_t i = 0;
  for (; i + 32 <= cols; i += 32) {
    const vf u = norm_h(r, i), v = norm_h(r, i + 16);
    if (sum) f_store(sum + i, u), f_store(sum + i + 16, v);
    a = f_add(a, u), b = f_add(b, v);
  }
  for (; i < cols; i += 16) {
    const int64_t n = cols - i < 16 ? cols - i : 16;
    const vf u = norm_hn(r, i, n);
    if (sum) f_storen(sum + i, u, n);
    a = f_add(a, u);
  }
  return f_sum(f_add(a, b));
}

/* Sum of (h - m)^2; lanes past the end add nothing. Also writes h, for RMSNorm, which has no other first pass. */
static inline float norm_squares(const norm_row *r, int64_t cols, float m, float *sum) {
  const vf mean = f_set(m);
  vf a = f_set(0.0f), b = a;
  int64_t i = 0;
  for (; i + 32 <= cols; i += 32) {
    const vf hu = norm_h(r, i), hv = norm_h(r, i + 16), u = f_sub(hu, mean), v = f_sub(hv, mean);
    if (sum) f_store(sum + i, hu), f_store(sum + i + 16, hv);
    a = f_add(a, f_mul(u, u)), b = f_add(b, f_mul(v, v));
  }
  for (; i < cols; i += 16) {
    const int64_t n = cols - i < 16 ? cols - i : 16;
    const vf h = norm_hn(r, i, n), u = n == 16 ? f_sub(h, mean) : f_low(f_sub(h, mean), n);
    if (sum) f_storen(sum + i, h, n);
    a = f_add(a, f_mul(u, u));
  }
  return f_sum(f_add(a, b));
}

static inline vf norm_y(vf h, vf mean, vf rstd, vf gamma, vf beta) {
  return f_add(f_mul(f_mul(f_sub(h, mean), rstd), gamma), beta);
}
static inline vf norm_yn(const norm_row *r, int64_t i, int64_t n, vf mean, vf rstd) {
  const vf g = r->gamma ? f_loadn(r->gamma + i, n, 0.0f) : f_set(1.0f);
  const vf b = r->beta ? f_loadn(r->beta + i, n, 0.0f) : f_set(0.0f);
  return norm_y(norm_hn(r, i, n), mean, rstd, g, b);
}
static inline vf norm_yv(const norm_row *r, int64_t i, vf mean, vf rstd) {
  const vf g = r->gamma ? f_load(r->gamma + i) : f_set(1.0f);
  const vf b = r->beta ? f_load(r->beta + i) : f_set(0.0f);
  return norm_y(norm_h(r, i), mean, rstd, g, b);
}

static inline void norm_quant(const norm_row *r, const float *y, int64_t cols, vf mean, vf rstd, vf top, vm odd, int8_t *q,
                              float *scale, int32_t *nonfinite) {
  float inv;
  *scale = scale_of(f_top(top), &inv);
  *nonfinite |= m_any(odd);
  const vf k = f_set(inv);
  int64_t i = 0;
  for (; i + 16 <= cols; i += 16) i8_store(q + i, v_code(f_mul(y ? f_load(y + i) : norm_yv(r, i, mean, rstd), k)));
  if (i < cols) {
    const int64_t n = cols - i;
    i8_storen(q + i, v_code(f_mul(y ? f_loadn(y + i, n, 0.0f) : norm_yn(r, i, n, mean, rstd), k)), n);
  }
}

static void k_norm(etk_rows *a) {
  const int64_t cols = a->cols;
  const float *gamma = (const float *)(const void *)a->at[2], *beta = (const float *)(const void *)a->at[3];
  for (int64_t row = 0; row < a->rows; row++) {
    float *y = a->at[4] ? (float *)(void *)(a->at[4] + row * a->step[4]) : NULL;
    float *sum = a->at[5] ? (float *)(void *)(a->at[5] + row * a->step[5]) : NULL;
    int8_t *q = a->at[6] ? (int8_t *)a->at[6] + row * a->step[6] : NULL;
    norm_row r = {(const float *)(const void *)(a->at[0] + row * a->step[0]),
                  a->at[1] ? (const float *)(const void *)(a->at[1] + row * a->step[1]) : NULL, gamma, beta};
    float m = 0.0f;
    if (!a->i[0]) {
      m = norm_sum(&r, cols, sum) / (float)cols;
      if (sum) r.x = sum, r.res = NULL;
    }
    const float v = norm_squares(&r, cols, m, a->i[0] ? sum : NULL) / (float)cols;
    if (sum) r.x = sum, r.res = NULL;
    const vf mean = f_set(m), rstd = f_set(1.0f / sqrtf(v + a->f[0]));
    vf top = f_set(0.0f);
    vm odd = m_none();
    int64_t i = 0;
    if (!q) {
      for (; i + 16 <= cols; i += 16) f_store(y + i, norm_yv(&r, i, mean, rstd));
      if (i < cols) f_storen(y + i, norm_yn(&r, i, cols - i, mean, rstd), cols - i);
      continue;
    }
    for (; i < cols; i += 16) {
      const int64_t n = cols - i < 16 ? cols - i : 16;
      const vf u = n == 16 ? norm_yv(&r, i, mean, rstd) : f_low(norm_yn(&r, i, n, mean, rstd), n);
      if (y && n == 16) f_store(y + i, u);
      else if (y) f_storen(y + i, u, n);
      odd = m_or(odd, m_or(m_nan(u), m_ge(v_abs(u), f_set(INFINITY))));
      top = f_max(top, v_abs_finite(u));
    }
    norm_quant(&r, y, cols, mean, rstd, top, odd, q, (float *)(void *)(a->at[7] + row * a->step[7]), &a->nonfinite);
  }
}
