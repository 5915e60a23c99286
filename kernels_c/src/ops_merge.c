/* Size-weighted merging of rows by a plan: one pass over memory, arithmetic only where rows meet. */
#include <string.h>

#include "checked.h"
#include "edgetok/ops.h"
#include "ops_match.h"

static const float k_tiny = 1e-12f;

typedef struct scratch {
  const float **x;      /* [r + 1] rows that meet in one output row */
  float *w;             /* [r + 1] their sizes */
  int32_t *head, *next; /* [m], [r] the removed rows of each output row, in the order of the plan */
} scratch;

static uint64_t carve(scratch *s, char *base, int64_t m, int64_t r) {
  etk_carve c = {0, 0};
  const uint64_t met = (uint64_t)r + 1;
  const uint64_t x = etk_take(&c, met, sizeof *s->x), w = etk_take(&c, met, sizeof *s->w);
  const uint64_t head = etk_take(&c, (uint64_t)m, sizeof *s->head), next = etk_take(&c, (uint64_t)r, sizeof *s->next);
  if (base) {
    s->x = (const float **)(void *)(base + x), s->w = (float *)(void *)(base + w);
    s->head = (int32_t *)(void *)(base + head), s->next = (int32_t *)(void *)(base + next);
  }
  return c.used;
}

uint64_t etk_merge_scratch(int64_t m, int64_t r) {
  scratch s;
  return carve(&s, NULL, m, r);
}

uint64_t etk_merge_workspace(int64_t m, int64_t r) {
  if (m < 0 || r < 0 || m > INT32_MAX || r > INT32_MAX) return 0;
  return etk_merge_scratch(m, r) + 8 * (uint64_t)(m + 2 * r) + 64;
}

etk_status etk_merge_check(const etk_tensor *x, const etk_tensor *size, int64_t m, const etk_tensor *y, const etk_tensor *size_out,
                           const etk_tensor *map) {
  etk_status bad = etk_ops_check(x, ETK_IS_F32, 3, 3);
  if (bad || (bad = etk_ops_check(y, ETK_IS_F32 | ETK_IS_OUTPUT, 3, 3))) return bad;
  if (y->dim[0] != x->dim[0] || y->dim[1] != m || y->dim[2] != x->dim[2]) return ETK_E_SHAPE;
  const struct {
    const etk_tensor *t;
    int32_t is;
    int64_t n;
  } rest[] = {{size, ETK_IS_F32, x->dim[1]}, {size_out, ETK_IS_F32 | ETK_IS_OUTPUT, m}, {map, 1 << ETK_I64 | ETK_IS_OUTPUT, x->dim[1]}};
  for (int i = 0; i < 3; i++) {
    if (ops_absent(rest[i].t)) continue;
    if ((bad = etk_ops_check(rest[i].t, rest[i].is, 2, 2))) return bad;
    if (rest[i].t->dim[0] != x->dim[0] || rest[i].t->dim[1] != rest[i].n) return ETK_E_SHAPE;
  }
  const etk_tensor *const others[] = {x, size, y, size_out};
  if ((bad = etk_ops_apart(y, others, 2, 0)) || (bad = etk_ops_apart(size_out, others, 3, 0))) return bad;
  return etk_ops_apart(map, others, 4, 0);
}

static float size_at(const etk_tensor *size, int64_t b, int64_t row) {
  if (!size) return 1.0f;
  return *(const float *)(const void *)((const char *)size->data + b * size->stride[0] + row * size->stride[1]);
}

void etk_merge_one(const etk_ops_kernel *k, const etk_tensor *x, const etk_tensor *size, int64_t b, const etk_plan_rows *plan,
                   etk_tensor *y, etk_tensor *size_out, etk_tensor *map, void *ws) {
  const int64_t cols = x->dim[2];
  const char *from = (const char *)x->data + b * x->stride[0];
  char *to = (char *)y->data + b * y->stride[0];
  scratch s = {0};
  carve(&s, ws, plan->m, plan->r);
  for (int64_t i = 0; i < plan->m; i++) s.head[i] = -1;
  for (int64_t i = plan->r - 1; i >= 0; i--) { /* backwards, so that lists come out in the order of the plan */
    s.next[i] = s.head[plan->target[i]];
    s.head[plan->target[i]] = (int32_t)i;
  }
  for (int64_t i = 0; i < plan->m; i++) {
    int32_t n = 1;
    float total = s.w[0] = size_at(size, b, plan->kept[i]);
    s.x[0] = (const float *)(const void *)(from + plan->kept[i] * x->stride[1]);
    for (int32_t j = s.head[i]; j >= 0; j = s.next[j], n++) {
      s.x[n] = (const float *)(const void *)(from + plan->removed[j] * x->stride[1]);
      total += s.w[n] = size_at(size, b, plan->removed[j]);
    }
    float *out = (float *)(void *)(to + i * y->stride[1]);
    if (n > 1 && !(total <= k_tiny)) k->blend(s.x, s.w, n, total, cols, out);
    else if (cols) memcpy(out, s.x[0], (size_t)cols * sizeof *out);
    if (!ops_absent(size_out))
      *(float *)(void *)((char *)size_out->data + b * size_out->stride[0] + i * size_out->stride[1]) = total;
  }
  if (ops_absent(map) || map->dim[1] == 0) return;
  int64_t *at = (int64_t *)(void *)((char *)map->data + b * map->stride[0]);
  for (int64_t i = 0; i < map->dim[1]; i++) at[i] = -1;
  for (int64_t i = 0; i < plan->m; i++) at[plan->kept[i]] = i;
  for (int64_t i = 0; i < plan->r; i++) at[plan->removed[i]] = plan->target[i];
}

static etk_status check_list(const etk_tensor *t, int64_t batch, int64_t n, int64_t below) {
  const etk_status bad = etk_ops_check(t, ETK_IS_INDEX, 2, 2);
  if (bad) return bad;
  if (t->dim[0] != batch || (n >= 0 && t->dim[1] != n) || t->dim[1] > INT32_MAX) return ETK_E_SHAPE;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t i = 0; i < t->dim[1]; i++) {
      const int64_t v = etk_ops_index_at(t, (const char *)t->data + b * t->stride[0] + i * t->stride[1]);
      if (v < 0 || v >= below) return ETK_E_RANGE;
    }
  return ETK_OK;
}

static void read_list(const etk_tensor *t, int64_t b, int64_t *out) {
  for (int64_t i = 0; i < t->dim[1]; i++)
    out[i] = etk_ops_index_at(t, (const char *)t->data + b * t->stride[0] + i * t->stride[1]);
}

etk_status etk_merge_rows(const etk_tensor *x, const etk_tensor *size, const etk_tensor *kept, const etk_tensor *removed,
                          const etk_tensor *target, etk_tensor *y, etk_tensor *size_out, etk_tensor *map, void *ws,
                          uint64_t ws_bytes) {
  if (!kept || !removed || !target || !x) return ETK_E_NULL;
  etk_status bad = etk_ops_check(kept, ETK_IS_INDEX, 2, 2);
  if (bad || (bad = etk_merge_check(x, size, kept->dim[1], y, size_out, map))) return bad;
  const int64_t batch = x->dim[0], m = kept->dim[1];
  if ((bad = check_list(kept, batch, -1, x->dim[1])) || (bad = check_list(removed, batch, -1, x->dim[1])) ||
      (bad = check_list(target, batch, removed->dim[1], m)))
    return bad;
  const etk_tensor *const lists[] = {kept, removed, target};
  if ((bad = etk_ops_apart(y, lists, 3, 0)) || (bad = etk_ops_apart(size_out, lists, 3, 0)) || (bad = etk_ops_apart(map, lists, 3, 0)))
    return bad;
  const int64_t r = removed->dim[1];
  if (!ws || (uintptr_t)ws % 64 || ws_bytes < etk_merge_workspace(m, r)) return ETK_E_WORKSPACE;
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  if (!k) return ETK_E_ISA;
  int64_t *list = ws;
  const etk_plan_rows plan = {list, list + m, list + m + r, m, r};
  char *rest = (char *)ws + (8 * (uint64_t)(m + 2 * r) + 63) / 64 * 64;
  for (int64_t b = 0; b < batch; b++) {
    read_list(kept, b, plan.kept), read_list(removed, b, plan.removed), read_list(target, b, plan.target);
    etk_merge_one(k, x, ops_absent(size) ? NULL : size, b, &plan, y, size_out, map, rest);
  }
  return ETK_OK;
}
