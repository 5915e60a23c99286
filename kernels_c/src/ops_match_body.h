/* Similarity of unit rows, ETK_TILE rows of A against 16 rows of B: each product sum runs over the columns in order, in
 * one lane, so it is the same for (i, j) and (j, i), for any tile and for any instruction set.
 *   sim(i, j) = sum_c a[i, c] b[j, c]       or   (f32)(sum_c qa[i, c] qb[j, c]) * (sa[i] * sb[j])
 * Bound by multiplies: 16 products an instruction (float), 64 (INT8). */
static void k_unit(const char *x, int64_t x_row, int64_t x_head, int64_t heads, int64_t rows, int32_t c, float *y) {
  for (int64_t row = 0; row < rows; row++, y += c) {
    vf squares = f_set(0.0f);
    const vf share = f_set((float)heads);
    for (int32_t i = 0; i < c; i += 16) {
      const int64_t n = c - i < 16 ? c - i : 16;
      vf v = f_loadn((const float *)(const void *)(x + row * x_row) + i, n, 0.0f);
      for (int64_t h = 1; h < heads; h++)
        v = f_add(v, f_loadn((const float *)(const void *)(x + row * x_row + h * x_head) + i, n, 0.0f));
      if (heads > 1) v = f_div(v, share);
      f_storen(y + i, v, n);
      squares = f_add(squares, f_mul(v, v));
    }
    const float length = sqrtf(f_sum(squares));
    const vf len = f_set(length > 1e-6f ? length : length != length ? length : 1e-6f);
    for (int32_t i = 0; i < c; i += 16) {
      const int64_t n = c - i < 16 ? c - i : 16;
      f_storen(y + i, f_div(f_loadn(y + i, n, 0.0f), len), n);
    }
  }
}

static void k_quant(const float *x, int64_t rows, int32_t c, int32_t c4, int8_t *q, float *scale) {
  for (int64_t row = 0; row < rows; row++, x += c, q += c4) {
    vf top = f_set(0.0f);
    float inv;
    for (int32_t i = 0; i < c; i += 16) top = f_max(top, v_abs_finite(f_loadn(x + i, c - i < 16 ? c - i : 16, 0.0f)));
    scale[row] = scale_of(f_top(top), &inv);
    for (int32_t i = 0; i < c; i += 16) {
      const int64_t n = c - i < 16 ? c - i : 16;
      i8_storen(q + i, v_code_any(f_mul(f_loadn(x + i, n, 0.0f), f_set(inv))), n);
    }
    for (int32_t i = c; i < c4; i++) q[i] = 0;
  }
}

static inline void sim_f32(const etk_sim *s, int64_t i, int64_t panel, vf *out) {
  const float *a = s->a + i * s->c, *b = s->b + panel * 16 * s->c;
  const int64_t c = s->c;
  vf acc[ETK_TILE];
  for (int r = 0; r < ETK_TILE; r++) acc[r] = f_set(0.0f);
  for (int64_t k = 0; k < c; k++) {
    const vf v = f_load(b + 16 * k);
    for (int r = 0; r < ETK_TILE; r++) acc[r] = f_add(acc[r], f_mul(f_set(a[r * c + k]), v));
  }
  for (int r = 0; r < ETK_TILE; r++) out[r] = acc[r];
}

static inline void sim_s8(const etk_sim *s, int64_t i, int64_t panel, vf *out) {
  const int64_t c4 = s->c4;
  const int8_t *a = s->qa + i * c4, *b = s->qb + panel * 16 * c4;
  const vf sb = f_load(s->sb + 16 * panel);
  vi acc[ETK_TILE];
  for (int r = 0; r < ETK_TILE; r++) acc[r] = i_set(-ETK_DOT_BIAS * s->rowsum[i + r]);
  for (int64_t k = 0; k < c4; k += 4) {
    const vdot v = i_dot_b(b + 16 * k);
    for (int r = 0; r < ETK_TILE; r++) acc[r] = i_dot4(acc[r], a + r * c4 + k, v);
  }
  for (int r = 0; r < ETK_TILE; r++) out[r] = f_mul(f_from_i(acc[r]), f_mul(f_set(s->sa[i + r]), sb));
}

static void k_sim_best(const etk_sim *s, float *best, int32_t *to) {
  static const int32_t k_lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t panels = (s->rows_b + 15) / 16;
  for (int64_t i = 0; i < s->rows_a; i += ETK_TILE) {
    vf top[ETK_TILE], sim[ETK_TILE];
    vi at[ETK_TILE];
    for (int r = 0; r < ETK_TILE; r++) top[r] = f_set(-INFINITY), at[r] = i_set(0);
    for (int64_t p = 0; p < panels; p++) {
      if (s->s8) sim_s8(s, i, p, sim);
      else sim_f32(s, i, p, sim);
      const vi here = i_add(i_load(k_lane), i_set((int32_t)(16 * p)));
      for (int r = 0; r < ETK_TILE; r++) {
        const int padded = s->pad_a && i + r < s->rows_a && s->pad_a[i + r];
        const vf v = f_add(sim[r], f_load((padded ? s->pen1 : s->pen0) + 16 * p));
        const vm better = m_lt(top[r], v);
        top[r] = f_sel(better, v, top[r]);
        at[r] = i_sel(better, here, at[r]);
      }
    }
    for (int r = 0; r < ETK_TILE && i + r < s->rows_a; r++) {
      float t[16];
      int32_t w[16], lane = 0;
      f_store(t, top[r]), i_store(w, at[r]);
      for (int j = 1; j < 16; j++)
        if (t[j] > t[lane] || (t[j] == t[lane] && w[j] < w[lane])) lane = j;
      best[i + r] = t[lane], to[i + r] = t[lane] > -INFINITY ? w[lane] : 0;
    }
  }
}

static inline vf energy_of(vf sim, int32_t form, vf margin, vf alpha) {
  const vf one = f_set(1.0f), zero = f_set(0.0f);
  if (form) {
    const vf far = f_mul(f_sub(one, sim), alpha);
    return v_exp_neg(f_mul(f_mul(far, far), f_set(-0.5f)));
  }
  const vf z = f_sub(sim, margin);
  return f_sel(m_ge(z, zero), z, f_mul(alpha, f_sub(v_exp_neg(f_min(zero, z)), one)));
}

/* Similarity is symmetric, so only the 16 x 16 blocks on and right of the diagonal are computed: those right of it count for
 * their rows at once, in lanes, and for their columns through out, which is complete for a row when its turn comes. */
static void k_sim_energy(const etk_sim *s, int32_t form, float margin, float alpha, float *out) {
  const int64_t panels = (s->rows_b + 15) / 16;
  const vf mar = f_set(margin), al = f_set(alpha);
  for (int64_t i = 0; i < 16 * panels; i += 16) f_store(out + i, f_set(0.0f));
  for (int64_t i = 0; i < s->rows_b; i += ETK_TILE) {
    vf sum[ETK_TILE], sim[ETK_TILE];
    for (int r = 0; r < ETK_TILE; r++) sum[r] = f_set(0.0f);
    for (int64_t p = i / 16; p < panels; p++) {
      const int64_t n = s->rows_b - 16 * p;
      vf column = f_load(out + 16 * p);
      if (s->s8) sim_s8(s, i, p, sim);
      else sim_f32(s, i, p, sim);
      for (int r = 0; r < ETK_TILE; r++) {
        const vf e = energy_of(sim[r], form, mar, al);
        sum[r] = f_add(sum[r], n < 16 ? f_low(e, n) : e);
        column = f_add(column, e);
      }
      if (p > i / 16) f_store(out + 16 * p, column);
    }
    for (int r = 0; r < ETK_TILE; r++) out[i + r] = (f_sum(sum[r]) + out[i + r]) / (float)s->rows_b;
  }
}

static void k_blend(const float *const *x, const float *w, int32_t n, float total, int64_t cols, float *out) {
  const vf all = f_set(total);
  for (int64_t i = 0; i < cols; i += 16) {
    const int64_t m = cols - i < 16 ? cols - i : 16;
    vf sum = f_mul(f_loadn(x[0] + i, m, 0.0f), f_set(w[0]));
    for (int32_t j = 1; j < n; j++) sum = f_add(sum, f_mul(f_loadn(x[j] + i, m, 0.0f), f_set(w[j])));
    f_storen(out + i, f_div(sum, all), m);
  }
}
