/* Checks of tensors and the walk over rows, for the small operations. */
#include "ops_tensor.h"

#include <string.h>

etk_status etk_ops_check(const etk_tensor *t, int32_t is, int32_t min_rank, int32_t max_rank) {
  if (!t) return ETK_E_NULL;
  if (t->rank < min_rank || t->rank > max_rank) return ETK_E_SHAPE;
  const uint32_t types = (uint32_t)is & (ETK_IS_OUTPUT - 1u);
  return is & ETK_IS_OUTPUT ? etk_tensor_out(t, t->rank, types) : etk_tensor_in(t, t->rank, types);
}

int etk_ops_same_dims(const etk_tensor *a, const etk_tensor *b, int32_t drop) {
  if (a->rank - drop != b->rank) return 0;
  for (int32_t i = 0; i < b->rank; i++)
    if (a->dim[i] != b->dim[i]) return 0;
  return 1;
}

int etk_ops_overlap(const etk_tensor *a, const etk_tensor *b) {
  if (!etk_tensor_overlap(a, b)) return 0;
  if (a->data != b->data || a->dtype != b->dtype || !etk_ops_same_dims(a, b, 0)) return 2;
  for (int32_t i = 0; i < a->rank; i++)
    if (a->dim[i] > 1 && a->stride[i] != b->stride[i]) return 2;
  return 1;
}

etk_status etk_ops_apart(const etk_tensor *out, const etk_tensor *const *in, int32_t n, int in_place) {
  if (ops_absent(out)) return ETK_OK;
  for (int32_t i = 0; i < n; i++)
    if (!ops_absent(in[i]) && etk_ops_overlap(out, in[i]) > (in_place ? 1 : 0)) return ETK_E_ALIAS;
  return ETK_OK;
}

int64_t etk_ops_index_at(const etk_tensor *idx, const char *p) {
  int32_t a;
  int64_t b;
  if (idx->dtype == ETK_I32) {
    memcpy(&a, p, sizeof a);
    return a;
  }
  memcpy(&b, p, sizeof b);
  return b;
}

/* Stride of tensor s along leading axis i of `axes`, its own axes taken from the end; 0 where it has none or broadcasts. */
static int64_t lead_step(const etk_tensor *t, int32_t row_axes, int32_t axes, int32_t i) {
  const int32_t own = t->rank - row_axes, at = i - (axes - own);
  return at < 0 || t->dim[at] <= 1 ? 0 : t->stride[at];
}

void etk_ops_walk_rows(const etk_ops_walk *w, const etk_tensor *lead, etk_rows *a, etk_rows_fn fn) {
  int64_t dim[5] = {1, 1, 1, 1, 1}, step[ETK_SLOTS][5] = {{0}}, at[5] = {0};
  int32_t n = 0;
  const int32_t axes = lead->rank - 1;
  for (int32_t i = 0; i < lead->rank; i++)
    if (lead->dim[i] == 0) return;
  a->cols = lead->dim[axes];
  for (int32_t i = 0; i < axes; i++) { /* keep axes longer than one, joining an axis to the one before where all slots allow */
    if (lead->dim[i] == 1) continue;
    int join = n > 0;
    for (int32_t s = 0; s < ETK_SLOTS; s++) {
      if (!w->t[s]) continue;
      step[s][n] = lead_step(w->t[s], w->row_axes[s], axes, i);
      join = join && step[s][n - 1] == step[s][n] * lead->dim[i];
    }
    dim[n] = lead->dim[i];
    if (!join) {
      n++;
      continue;
    }
    for (int32_t s = 0; s < ETK_SLOTS; s++) step[s][n - 1] = step[s][n];
    dim[n - 1] *= dim[n];
    dim[n] = 1;
  }
  const int32_t inner = n > 0 ? n - 1 : 0;
  a->rows = dim[inner];
  if (w->flat && n <= 1) {
    int dense = 1;
    for (int32_t s = 0; s < ETK_SLOTS; s++)
      if (w->t[s] && dim[0] > 1 && step[s][0] != a->cols * etk_dtype_bytes(w->t[s]->dtype)) dense = 0;
    if (dense) a->cols *= a->rows, a->rows = 1;
  }
  for (;;) {
    for (int32_t s = 0; s < ETK_SLOTS; s++) {
      a->at[s] = w->t[s] ? (char *)w->t[s]->data : NULL;
      a->step[s] = w->t[s] ? step[s][inner] : 0;
      for (int32_t i = 0; w->t[s] && i < inner; i++) a->at[s] += at[i] * step[s][i];
    }
    fn(a);
    int32_t i = inner - 1;
    for (; i >= 0 && ++at[i] == dim[i]; i--) at[i] = 0;
    if (i < 0) return;
  }
}
