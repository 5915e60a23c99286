/* Bipartite soft matching (ToMe) and energy order (PiToMe) over unit rows. No similarity matrix is kept: the kernel reduces
 * each row to its best column, or to its energy, as the products come. */
#include <math.h>
#include <string.h>

#include "checked.h"
#include "edgetok/ops.h"
#include "ops_match.h"
#include "ops_order.h"

enum { k_most = 65536 };
static const float k_pad_size = 1e-6f, k_pad_energy = 1e3f;

static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

typedef struct scratch {
  float *unit, *a, *b, *scale, *sa, *sb, *pen0, *pen1, *best, *energy;
  int8_t *codes, *qa, *qb;
  int32_t *rowsum, *to, *idx, *idx_tmp, *order, *rows_a, *rows_b;
  uint32_t *keys, *key_tmp;
  uint8_t *pad, *pad_a;
} scratch;

static void *take(char *base, etk_carve *c, int64_t count, uint64_t size) {
  const uint64_t at = etk_take(c, (uint64_t)count, size);
  return base ? base + at : NULL;
}

/* Pieces at multiples of 64 bytes; base NULL: only the size. */
static uint64_t carve(scratch *s, char *base, int64_t tokens, int64_t width) {
  etk_carve c = {0, 0};
  const int64_t n = up(tokens, 16), w4 = up(width, 4);
  float **const wide[] = {&s->unit, &s->a, &s->b};
  int8_t **const coded[] = {&s->codes, &s->qa, &s->qb};
  float **const floats[] = {&s->scale, &s->sa, &s->sb, &s->pen0, &s->pen1, &s->best, &s->energy};
  int32_t **const ints[] = {&s->rowsum, &s->to, &s->idx, &s->idx_tmp, &s->order, &s->rows_a, &s->rows_b};
  for (int i = 0; i < 3; i++) *wide[i] = take(base, &c, n * width, sizeof(float));
  for (int i = 0; i < 3; i++) *coded[i] = take(base, &c, n * w4, 1);
  for (int i = 0; i < 7; i++) *floats[i] = take(base, &c, n, sizeof(float));
  for (int i = 0; i < 7; i++) *ints[i] = take(base, &c, n, sizeof(int32_t));
  s->keys = take(base, &c, n, sizeof(uint32_t)), s->key_tmp = take(base, &c, n, sizeof(uint32_t));
  s->pad = take(base, &c, n, 1), s->pad_a = take(base, &c, n, 1);
  return c.bad ? 0 : c.used;
}

uint64_t etk_match_scratch(int64_t tokens, int64_t width) {
  scratch s;
  return carve(&s, NULL, tokens, width);
}

/* Rows of one side as the kernel wants them; rows past n are 0. */
static void lay_a(const etk_match_spec *m, scratch *s, int64_t n) {
  const size_t c = (size_t)m->width, c4 = (size_t)up(m->width, 4), all = (size_t)up(n, 16), rows = (size_t)n;
  for (size_t i = 0; i < rows; i++) {
    const size_t row = (size_t)s->rows_a[i];
    s->pad_a[i] = s->pad[row];
    if (!m->s8) {
      memcpy(s->a + i * c, s->unit + row * c, c * sizeof(float));
      continue;
    }
    memcpy(s->qa + i * c4, s->codes + row * c4, c4);
    s->sa[i] = s->scale[row], s->rowsum[i] = 0;
    for (size_t k = 0; k < c4; k++) s->rowsum[i] += s->codes[row * c4 + k];
  }
  for (size_t i = rows; i < all; i++) s->sa[i] = 0.0f, s->rowsum[i] = 0;
  if (m->s8) memset(s->qa + rows * c4, 0, (all - rows) * c4);
  else memset(s->a + rows * c, 0, (all - rows) * c * sizeof(float));
}

static void lay_b(const etk_match_spec *m, scratch *s, int64_t n) {
  const int64_t c = m->width, c4 = up(c, 4), all = up(n, 16);
  for (int64_t i = 0; i < all; i++) {
    const int64_t row = i < n ? s->rows_b[i] : 0;
    const int padded = i < n && s->pad[row];
    s->pen0[i] = i >= n ? -INFINITY : padded ? -4.0f : 0.0f; /* -4 pad_a - 4 pad_b + 10 pad_a pad_b */
    s->pen1[i] = i >= n ? -INFINITY : padded ? 2.0f : -4.0f;
    if (!m->s8) {
      float *to = s->b + i / 16 * 16 * c + i % 16;
      const float *from = s->unit + row * c;
      for (int64_t k = 0; k < c; k++) to[16 * k] = i < n ? from[k] : 0.0f;
      continue;
    }
    int8_t *to = s->qb + i / 16 * 16 * c4 + 4 * (i % 16);
    const int8_t *from = s->codes + row * c4;
    for (int64_t k = 0; k < c4; k += 4) memcpy(to + 16 * k, from + k, 4);
    s->sb[i] = i < n ? s->scale[row] : 0.0f;
  }
}

static etk_sim sides(const etk_match_spec *m, scratch *s, int64_t na, int64_t nb) {
  lay_a(m, s, na);
  lay_b(m, s, nb);
  const etk_sim sim = {.rows_a = na, .rows_b = nb, .c = (int32_t)m->width, .c4 = (int32_t)up(m->width, 4), .s8 = m->s8, .a = s->a, .b = s->b,
                       .qa = s->qa, .qb = s->qb, .sa = s->sa, .sb = s->sb, .rowsum = s->rowsum, .pen0 = s->pen0, .pen1 = s->pen1,
                       .pad_a = s->pad_a};
  return sim;
}

/* Unit rows from token `first` on, their codes, and which are padding. */
static void unit_rows(const etk_ops_kernel *k, const etk_match_spec *m, const etk_tensor *metric, const etk_tensor *size, int64_t b,
                      int64_t first, scratch *s) {
  const int32_t row_axis = metric->rank - 2;
  const int64_t n = m->tokens - first, step = metric->stride[row_axis];
  const char *x = (const char *)metric->data + b * metric->stride[0] + first * step;
  const int64_t heads = metric->rank == 4 ? metric->dim[1] : 1, x_head = metric->rank == 4 ? metric->stride[1] : 0;
  k->unit(x, step, x_head, heads, n, (int32_t)m->width, s->unit);
  if (m->s8) k->quant(s->unit, n, (int32_t)m->width, (int32_t)up(m->width, 4), s->codes, s->scale);
  for (int64_t i = 0; i < n; i++)
    s->pad[i] = size && *(const float *)(const void *)((const char *)size->data + b * size->stride[0] + (first + i) * size->stride[1]) <=
                            k_pad_size;
}

static void energies(const etk_ops_kernel *k, const etk_match_spec *m, scratch *s, int64_t n) {
  for (int64_t i = 0; i < n; i++) s->rows_a[i] = s->rows_b[i] = (int32_t)i;
  const etk_sim sim = sides(m, s, n, n);
  if (m->kind != ETK_MATCH_PITOME_TEXT) {
    k->sim_energy(&sim, 0, m->margin, m->alpha, s->energy);
    return;
  }
  const float sigma = 1.0f - m->margin > 1e-3f ? 1.0f - m->margin : 1e-3f, peak = sigma * 2.50662827f; /* sqrt(2 pi) */
  k->sim_energy(&sim, 1, 0.0f, 1.0f / sigma, s->energy);
  for (int64_t i = 0; i < n; i++) s->energy[i] /= peak;
}

/* The r strongest links of A: local rows in s->idx[0, r), the others after them, rising or by falling link. */
static void strongest(scratch *s, int64_t na, int64_t r, int rising) {
  for (int64_t i = 0; i < na; i++) s->keys[i] = etk_float_key(s->best[i]), s->idx[i] = (int32_t)i;
  etk_sort_falling(s->keys, s->idx, na, s->key_tmp, s->idx_tmp);
  if (!rising) return;
  memset(s->pad_a, 0, (size_t)na);
  for (int64_t i = 0; i < r; i++) s->pad_a[s->idx[i]] = 1;
  for (int64_t i = 0, out = r; i < na; i++)
    if (!s->pad_a[i]) s->idx[out++] = (int32_t)i;
}

static void match_tome(const etk_ops_kernel *k, const etk_match_spec *m, scratch *s, const etk_plan_rows *out) {
  const int64_t p = m->keep, a0 = p + p % 2, b0 = p + (p + 1) % 2;
  const int64_t na = m->tokens > a0 ? (m->tokens - a0 + 1) / 2 : 0, nb = m->tokens > b0 ? (m->tokens - b0 + 1) / 2 : 0;
  for (int64_t i = 0; i < na; i++) s->rows_a[i] = (int32_t)(a0 + 2 * i);
  for (int64_t i = 0; i < nb; i++) s->rows_b[i] = (int32_t)(b0 + 2 * i);
  const etk_sim sim = sides(m, s, na, nb);
  k->sim_best(&sim, s->best, s->to);
  strongest(s, na, m->r, p > 0);
  for (int64_t i = 0; i < p; i++) out->kept[i] = i;
  for (int64_t i = m->r; i < na; i++) out->kept[p + i - m->r] = s->rows_a[s->idx[i]];
  for (int64_t i = 0; i < nb; i++) out->kept[p + na - m->r + i] = s->rows_b[i];
  for (int64_t i = 0; i < m->r; i++) {
    out->removed[i] = s->rows_a[s->idx[i]];
    out->target[i] = p + na - m->r + s->to[s->idx[i]];
  }
}

static void match_pitome(const etk_ops_kernel *k, const etk_match_spec *m, scratch *s, const etk_plan_rows *out) {
  const int64_t p = m->keep, n = m->tokens - p, r = m->r;
  const int hybrid = m->kind == ETK_MATCH_PITOME_HYBRID, text = m->kind == ETK_MATCH_PITOME_TEXT;
  energies(k, m, s, n);
  for (int64_t i = 0; i < n; i++) {
    s->keys[i] = etk_float_key(s->energy[i] + (s->pad[i] ? k_pad_energy : 0.0f));
    s->order[i] = (int32_t)i;
  }
  etk_sort_falling(s->keys, s->order, n, s->key_tmp, s->idx_tmp);
  const int64_t na = hybrid ? (n + 1) / 2 : r, nb = hybrid ? n / 2 : r, rest = hybrid ? na - r : n - 2 * r;
  for (int64_t i = 0; i < na; i++) s->rows_a[i] = s->order[text ? i : 2 * i];
  for (int64_t i = 0; i < nb; i++) s->rows_b[i] = s->order[text ? r + i : 2 * i + 1];
  const etk_sim sim = sides(m, s, na, nb);
  k->sim_best(&sim, s->best, s->to);
  if (hybrid) strongest(s, na, r, 1);
  for (int64_t i = 0; i < p; i++) out->kept[i] = i;
  for (int64_t i = 0; i < rest; i++) out->kept[p + i] = p + (hybrid ? s->rows_a[s->idx[r + i]] : s->order[2 * r + i]);
  for (int64_t i = 0; i < nb; i++) out->kept[p + rest + i] = p + s->rows_b[i];
  for (int64_t i = 0; i < r; i++) {
    const int64_t a = hybrid ? s->idx[i] : i;
    out->removed[i] = p + s->rows_a[a];
    out->target[i] = p + rest + s->to[a];
  }
}

void etk_match_one(const etk_ops_kernel *k, const etk_match_spec *m, const etk_tensor *metric, const etk_tensor *size, int64_t b,
                   const etk_plan_rows *out, void *ws) {
  scratch s;
  carve(&s, ws, m->tokens, m->width);
  unit_rows(k, m, metric, size, b, m->kind == ETK_MATCH_TOME ? 0 : m->keep, &s);
  if (m->kind == ETK_MATCH_TOME) match_tome(k, m, &s, out);
  else match_pitome(k, m, &s, out);
}

etk_status etk_match_check(etk_match_spec *m, const etk_tensor *metric, const etk_tensor *size) {
  etk_status bad = etk_ops_check(metric, ETK_IS_F32, 3, 4);
  if (bad) return bad;
  m->tokens = metric->dim[metric->rank - 2], m->width = metric->dim[metric->rank - 1];
  if (m->tokens > k_most || m->width > k_most || m->width < 1 || (metric->rank == 4 && metric->dim[1] < 1)) return ETK_E_SHAPE;
  if (!ops_absent(size)) {
    if ((bad = etk_ops_check(size, ETK_IS_F32, 2, 2))) return bad;
    if (size->dim[0] != metric->dim[0] || size->dim[1] != m->tokens) return ETK_E_SHAPE;
  }
  if (m->kind < 0 || m->kind > ETK_MATCH_PITOME_TEXT || (m->s8 != 0 && m->s8 != 1) || m->keep < 0 || m->keep > m->tokens)
    return ETK_E_RANGE;
  if (m->kind != ETK_MATCH_TOME && (!(m->margin >= -1.0f && m->margin <= 1.0f) || !(m->alpha >= 0.0f && m->alpha <= 100.0f)))
    return ETK_E_RANGE;
  const int64_t free_rows = m->tokens - m->keep, a0 = m->keep + m->keep % 2;
  const int64_t rows_a = m->tokens > a0 ? (m->tokens - a0 + 1) / 2 : 0;
  if (m->r < 0 || m->r > free_rows / 2 || (m->kind == ETK_MATCH_TOME && m->r > rows_a)) return ETK_E_RANGE;
  return ETK_OK;
}

static uint64_t all_scratch(int64_t tokens, int64_t width) {
  const uint64_t n = (uint64_t)tokens;
  return etk_match_scratch(tokens, width) + 24 * n + 128 + etk_merge_scratch(tokens, tokens);
}

uint64_t etk_match_workspace(int64_t tokens, int64_t width) {
  return tokens < 0 || tokens > k_most || width < 1 || width > k_most ? 0 : all_scratch(tokens, width);
}

static int bad_ws(const etk_match_spec *m, const void *ws, uint64_t bytes) {
  return !ws || (uintptr_t)ws % 64 || bytes < all_scratch(m->tokens, m->width);
}

static etk_plan_rows plan_in(const etk_match_spec *m, void *ws, char **rest) {
  int64_t *p = ws;
  const etk_plan_rows plan = {p, p + (m->tokens - m->r), p + m->tokens, m->tokens - m->r, m->r};
  *rest = (char *)ws + (24 * (uint64_t)m->tokens + 63) / 64 * 64;
  return plan;
}

static etk_status check_list(const etk_tensor *t, const etk_tensor *metric, int64_t n) {
  const etk_status bad = etk_ops_check(t, 1 << ETK_I64 | ETK_IS_OUTPUT, 2, 2);
  return bad ? bad : t->dim[0] == metric->dim[0] && t->dim[1] == n ? ETK_OK : ETK_E_SHAPE;
}

static void put(const etk_tensor *t, int64_t b, const int64_t *from, int64_t n) {
  if (n) memcpy((char *)t->data + b * t->stride[0], from, (size_t)n * sizeof *from);
}

etk_status etk_match(int32_t kind, const etk_tensor *metric, const etk_tensor *size, int64_t keep, int64_t r, float margin,
                     float alpha, int32_t int8, etk_tensor *kept, etk_tensor *removed, etk_tensor *target, void *ws,
                     uint64_t ws_bytes) {
  etk_match_spec m = {.kind = kind, .keep = keep, .r = r, .margin = margin, .alpha = alpha, .s8 = int8};
  etk_status bad = etk_match_check(&m, metric, size);
  if (bad || (bad = check_list(kept, metric, m.tokens - r)) || (bad = check_list(removed, metric, r)) ||
      (bad = check_list(target, metric, r)))
    return bad;
  const etk_tensor *const others[] = {metric, size, kept, removed};
  if ((bad = etk_ops_apart(kept, others, 2, 0)) || (bad = etk_ops_apart(removed, others, 3, 0)) ||
      (bad = etk_ops_apart(target, others, 4, 0)))
    return bad;
  if (bad_ws(&m, ws, ws_bytes)) return ETK_E_WORKSPACE;
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  if (!k) return ETK_E_ISA;
  char *rest;
  const etk_plan_rows plan = plan_in(&m, ws, &rest);
  for (int64_t b = 0; b < metric->dim[0]; b++) {
    etk_match_one(k, &m, metric, ops_absent(size) ? NULL : size, b, &plan, rest);
    put(kept, b, plan.kept, plan.m), put(removed, b, plan.removed, r), put(target, b, plan.target, r);
  }
  return ETK_OK;
}

etk_status etk_pitome_energy(int32_t kind, const etk_tensor *metric, int64_t keep, float margin, float alpha, int32_t int8,
                             etk_tensor *energy, void *ws, uint64_t ws_bytes) {
  etk_match_spec m = {.kind = kind, .keep = keep, .margin = margin, .alpha = alpha, .s8 = int8};
  etk_status bad = etk_match_check(&m, metric, NULL);
  if (bad || (bad = etk_ops_check(energy, ETK_IS_F32 | ETK_IS_OUTPUT, 2, 2))) return bad;
  if (energy->dim[0] != metric->dim[0] || energy->dim[1] != m.tokens - keep) return ETK_E_SHAPE;
  if (kind == ETK_MATCH_TOME) return ETK_E_RANGE;
  if ((bad = etk_ops_apart(energy, &metric, 1, 0))) return bad;
  if (bad_ws(&m, ws, ws_bytes)) return ETK_E_WORKSPACE;
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  if (!k) return ETK_E_ISA;
  const int64_t n = m.tokens - keep;
  scratch s;
  carve(&s, ws, m.tokens, m.width);
  for (int64_t b = 0; n > 0 && b < metric->dim[0]; b++) {
    unit_rows(k, &m, metric, NULL, b, keep, &s);
    energies(k, &m, &s, n);
    memcpy((char *)energy->data + b * energy->stride[0], s.energy, (size_t)n * sizeof(float));
  }
  return ETK_OK;
}

etk_status etk_token_merge(int32_t kind, const etk_tensor *metric, const etk_tensor *x, const etk_tensor *size, int64_t keep,
                           int64_t r, float margin, float alpha, int32_t int8, etk_tensor *y, etk_tensor *size_out,
                           etk_tensor *map, void *ws, uint64_t ws_bytes) {
  etk_match_spec m = {.kind = kind, .keep = keep, .r = r, .margin = margin, .alpha = alpha, .s8 = int8};
  etk_status bad = etk_match_check(&m, metric, size);
  if (bad || (bad = etk_merge_check(x, size, m.tokens - r, y, size_out, map))) return bad;
  if (x->dim[0] != metric->dim[0] || x->dim[1] != m.tokens) return ETK_E_SHAPE;
  if ((bad = etk_ops_apart(y, &metric, 1, 0)) || (bad = etk_ops_apart(size_out, &metric, 1, 0)) ||
      (bad = etk_ops_apart(map, &metric, 1, 0)))
    return bad;
  if (bad_ws(&m, ws, ws_bytes)) return ETK_E_WORKSPACE;
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  if (!k) return ETK_E_ISA;
  const etk_tensor *sizes = ops_absent(size) ? NULL : size;
  char *rest;
  const etk_plan_rows plan = plan_in(&m, ws, &rest);
  for (int64_t b = 0; b < x->dim[0]; b++) {
    etk_match_one(k, &m, metric, sizes, b, &plan, rest);
    etk_merge_one(k, x, sizes, b, &plan, y, size_out, map, rest);
  }
  return ETK_OK;
}
