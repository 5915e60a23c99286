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

/* y of 16 columns: from memory, or from h again. */
static inline vf norm_again(const norm_row *r, const float *y, int64_t i, int64_t n, vf mean, vf rstd) {
  if (y) return n == 16 ? f_load(y + i) : f_loadn(y + i, n, 0.0f);
  return n == 16 ? norm_yv(r, i, mean, rstd) : f_low(norm_yn(r, i, n, mean, rstd), n);
}

/* Codes of a row whose largest magnitude is top; NaN or infinite: look again, at the finite ones. Returns the scale. */
static inline float norm_quant(const norm_row *r, const float *y, int64_t cols, vf mean, vf rstd, float top, int8_t *q,
                               int32_t *nonfinite) {
  const int odd = !(top < INFINITY);
  float inv;
  int64_t i = 0;
  if (odd) {
    vf t = f_set(0.0f);
    for (; i < cols; i += 16) t = f_max(t, v_abs_finite(norm_again(r, y, i, cols - i < 16 ? cols - i : 16, mean, rstd)));
    top = f_top(t), *nonfinite = 1;
  }
  const float scale = scale_of(top, &inv);
  const vf k = f_set(inv);
  for (i = 0; !odd && i + 16 <= cols; i += 16) i8_store(q + i, v_code(f_mul(norm_again(r, y, i, 16, mean, rstd), k)));
  for (; i < cols; i += 16) {
    const int64_t n = cols - i < 16 ? cols - i : 16;
    i8_storen(q + i, v_code_any(f_mul(norm_again(r, y, i, n, mean, rstd), k)), n);
  }
  return scale;
}

/* Write y (when it has a place); with `largest`, return the largest magnitude, NaN if there is one. has: which of residual,
 * gamma, beta there are; a constant where this is inlined, so that the loop holds no tests. */
static inline __attribute__((always_inline)) float norm_write(const norm_row *row, int has, int largest, int64_t cols, vf mean,
                                                             vf rstd, float *y) {
  const norm_row r = {row->x, has & 1 ? row->res : NULL, has & 2 ? row->gamma : NULL, has & 4 ? row->beta : NULL};
  vf t0 = f_set(0.0f), t1 = t0;
  vm odd = m_none();
  int64_t i = 0;
  for (; i + 32 <= cols; i += 32) {
    const vf u = norm_yv(&r, i, mean, rstd), v = norm_yv(&r, i + 16, mean, rstd);
    if (!largest || y) f_store(y + i, u), f_store(y + i + 16, v);
    if (!largest) continue;
    odd = m_or(odd, m_nan2(u, v));
    t0 = f_max(v_abs(u), t0), t1 = f_max(v_abs(v), t1);
  }
  for (; i < cols; i += 16) {
    const int64_t n = cols - i < 16 ? cols - i : 16;
    const vf u = norm_again(&r, NULL, i, n, mean, rstd);
    if (y) f_storen(y + i, u, n);
    odd = m_or(odd, m_nan2(u, u));
    t0 = f_max(v_abs(u), t0);
  }
  return !largest ? 0.0f : m_any(odd) ? NAN : f_top(f_max(t0, t1));
}

static float norm_write_any(const norm_row *r, int largest, int64_t cols, vf mean, vf rstd, float *y) {
  const int has = (r->res ? 1 : 0) | (r->gamma ? 2 : 0) | (r->beta ? 4 : 0);
  if (has == 6) return largest ? norm_write(r, 6, 1, cols, mean, rstd, y) : norm_write(r, 6, 0, cols, mean, rstd, y);
  if (has == 2) return largest ? norm_write(r, 2, 1, cols, mean, rstd, y) : norm_write(r, 2, 0, cols, mean, rstd, y);
  return norm_write(r, has, largest, cols, mean, rstd, y);
}

enum { NORM_STASH = 4096 /* y of a row kept on the stack when only its codes are wanted */, NORM_ROWS = 4,
       NORM_L1 = 24 * 1024 /* bytes of rows in flight */ };

/* Up to four rows at a time, as many as stay in L1: while the sums of one are folded, the next one is read. */
static void k_norm(etk_rows *a) {
  const int64_t cols = a->cols;
  const float *gamma = (const float *)(const void *)a->at[2], *beta = (const float *)(const void *)a->at[3];
  const float share = 1.0f / (float)cols;
  const int64_t row_bytes = 4 * cols * (1 + (a->at[1] != NULL) + (a->at[4] != NULL) + (a->at[5] != NULL));
  const int group = NORM_ROWS * row_bytes <= NORM_L1 ? NORM_ROWS : 2 * row_bytes <= NORM_L1 ? 2 : 1;
  float stash[NORM_STASH];
  for (int64_t first = 0; first < a->rows; first += group) {
    const int n = a->rows - first < group ? (int)(a->rows - first) : group;
    norm_row r[NORM_ROWS];
    float m[NORM_ROWS] = {0}, v[NORM_ROWS];
    float *sum[NORM_ROWS];
    for (int j = 0; j < n; j++) {
      const int64_t row = first + j;
      sum[j] = a->at[5] ? (float *)(void *)(a->at[5] + row * a->step[5]) : NULL;
      r[j].x = (const float *)(const void *)(a->at[0] + row * a->step[0]);
      r[j].res = a->at[1] ? (const float *)(const void *)(a->at[1] + row * a->step[1]) : NULL;
      r[j].gamma = gamma, r[j].beta = beta;
      if (a->i[0]) continue;
      m[j] = norm_sum(&r[j], cols, sum[j]) * share;
      if (sum[j]) r[j].x = sum[j], r[j].res = NULL;
    }
    for (int j = 0; j < n; j++) {
      v[j] = norm_squares(&r[j], cols, m[j], a->i[0] ? sum[j] : NULL) * share;
      if (sum[j]) r[j].x = sum[j], r[j].res = NULL;
    }
    for (int j = 0; j < n; j++) {
      const int64_t row = first + j;
      const vf mean = f_set(m[j]), rstd = f_set(1.0f / sqrtf(v[j] + a->f[0]));
      float *y = a->at[4] ? (float *)(void *)(a->at[4] + row * a->step[4]) : NULL;
      if (!a->at[6]) {
        norm_write_any(&r[j], 0, cols, mean, rstd, y);
        continue;
      }
      float *const to = y ? y : cols <= NORM_STASH ? stash : NULL;
      const float top = norm_write_any(&r[j], 1, cols, mean, rstd, to);
      float *const scale = (float *)(void *)(a->at[7] + row * a->step[7]);
      *scale = norm_quant(&r[j], to, cols, mean, rstd, top, (int8_t *)a->at[6] + row * a->step[6], &a->nonfinite);
    }
  }
}
