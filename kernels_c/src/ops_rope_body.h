/* Rotary embedding. Pairs are (x[i], x[i + rot/2]) (half-split) or (x[2i], x[2i + 1]) (interleaved):
 *   y0 = x0 cos - x1 sin;  y1 = x1 cos + x0 sin;  columns rot .. d-1 are copied
 * Two loads, two stores, six operations per 32 elements: bound by memory. */
static inline void rope_half(const float *x, float *y, const float *c, const float *s, int64_t h) {
  int64_t i = 0;
  for (; i + 16 <= h; i += 16) {
    const vf u = f_load(x + i), v = f_load(x + h + i), cc = f_load(c + i), ss = f_load(s + i);
    f_store(y + i, f_sub(f_mul(u, cc), f_mul(v, ss)));
    f_store(y + h + i, f_add(f_mul(v, cc), f_mul(u, ss)));
  }
  if (i < h) {
    const int64_t n = h - i;
    const vf u = f_loadn(x + i, n, 0), v = f_loadn(x + h + i, n, 0), cc = f_loadn(c + i, n, 0), ss = f_loadn(s + i, n, 0);
    f_storen(y + i, f_sub(f_mul(u, cc), f_mul(v, ss)), n);
    f_storen(y + h + i, f_add(f_mul(v, cc), f_mul(u, ss)), n);
  }
}

static inline vf rope_pairs(vf x, vf c, vf s) {
  static const int32_t even[16] = {INT32_MIN, 0, INT32_MIN, 0, INT32_MIN, 0, INT32_MIN, 0,
                                   INT32_MIN, 0, INT32_MIN, 0, INT32_MIN, 0, INT32_MIN, 0};
  const vf signed_s = f_of(i_xor(i_of(s), i_load(even)));
  return f_add(f_mul(x, c), f_mul(f_swap(x), signed_s));
}

static inline void rope_inter(const float *x, float *y, const float *c, const float *s, int64_t h) {
  int64_t i = 0;
  for (; i + 8 <= h; i += 8) f_store(y + 2 * i, rope_pairs(f_load(x + 2 * i), f_dup8(c + i), f_dup8(s + i)));
  if (i < h) {
    const int64_t n = h - i;
    float cc[16], ss[16];
    f_store(cc, f_loadn(c + i, n, 0)), f_store(ss, f_loadn(s + i, n, 0));
    f_storen(y + 2 * i, rope_pairs(f_loadn(x + 2 * i, 2 * n, 0), f_dup8(cc), f_dup8(ss)), 2 * n);
  }
}

static inline void rope_row(const etk_rope_arg *a, int64_t t, int64_t head) {
  const float *x = (const float *)(const void *)(a->x + t * a->x_token + head * a->x_head);
  float *y = (float *)(void *)(a->y + t * a->y_token + head * a->y_head);
  const int64_t at = (a->row ? a->row[t] : a->first + t) * a->table_step, h = a->rot / 2;
  const float *c = (const float *)(const void *)(a->cos_at + at), *s = (const float *)(const void *)(a->sin_at + at);
  if (a->interleaved) rope_inter(x, y, c, s, h);
  else rope_half(x, y, c, s, h);
  if (x != y && a->rot < a->d) memcpy(y + a->rot, x + a->rot, (size_t)(a->d - a->rot) * sizeof *y);
}

/* Rows in the order of memory. */
static void k_rope(const etk_rope_arg *a) {
  if (a->x_token >= a->x_head)
    for (int64_t t = 0; t < a->tokens; t++)
      for (int64_t head = 0; head < a->heads; head++) rope_row(a, t, head);
  else
    for (int64_t head = 0; head < a->heads; head++)
      for (int64_t t = 0; t < a->tokens; t++) rope_row(a, t, head);
}
