/* Element-wise operations and softmax: checks, then the kernel row by row. */
#include "edgetok/ops.h"
#include "ops_tensor.h"

static etk_status same(const etk_tensor *t, int32_t is, const etk_tensor *x) {
  const etk_status bad = etk_ops_check(t, is, x->rank, x->rank);
  return bad ? bad : etk_ops_same_dims(x, t, 0) ? ETK_OK : ETK_E_SHAPE;
}

/* n inputs of one shape, one output of that shape. */
static etk_status map(const etk_tensor *const *in, int32_t n, etk_tensor *y, etk_rows *a, etk_rows_fn fn) {
  etk_status bad = etk_ops_check(in[0], ETK_IS_F32, 1, 5);
  for (int32_t i = 1; i < n && !bad; i++) bad = same(in[i], ETK_IS_F32, in[0]);
  if (!bad) bad = same(y, ETK_IS_F32 | ETK_IS_OUTPUT, in[0]);
  if (!bad) bad = etk_ops_apart(y, in, n, 1);
  if (bad) return bad;
  etk_ops_walk w = {{0}, {1, 1, 1}, 1};
  for (int32_t i = 0; i < n; i++) w.t[i] = in[i];
  w.t[n] = y;
  etk_ops_walk_rows(&w, in[0], a, fn);
  return ETK_OK;
}

etk_status etk_gelu(const etk_tensor *x, int32_t tanh_form, etk_tensor *y) {
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  etk_rows a = {.i = {tanh_form, 0}};
  if (!k) return ETK_E_ISA;
  return tanh_form == 0 || tanh_form == 1 ? map(&x, 1, y, &a, k->gelu) : ETK_E_RANGE;
}

etk_status etk_silu(const etk_tensor *x, etk_tensor *y) {
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  etk_rows a = {0};
  return k ? map(&x, 1, y, &a, k->silu) : ETK_E_ISA;
}

etk_status etk_swiglu(const etk_tensor *gate, const etk_tensor *up, etk_tensor *y) {
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  const etk_tensor *const in[2] = {gate, up};
  etk_rows a = {0};
  return k ? map(in, 2, y, &a, k->swiglu) : ETK_E_ISA;
}

etk_status etk_add_rows(const etk_tensor *a, const etk_tensor *b, etk_tensor *y) {
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  const etk_tensor *const in[2] = {a, b};
  etk_rows rows = {0};
  return k ? map(in, 2, y, &rows, k->add) : ETK_E_ISA;
}

etk_status etk_softmax(const etk_tensor *x, const etk_tensor *mask, float scale, etk_tensor *y) {
  etk_status bad = etk_ops_check(x, ETK_IS_F32, 1, 5);
  if (!bad) bad = same(y, ETK_IS_F32 | ETK_IS_OUTPUT, x);
  if (!bad) bad = etk_ops_apart(y, &x, 1, 1);
  if (bad) return bad;
  etk_ops_walk w = {{x, NULL, NULL, y}, {1, 1, 1, 1}, 0};
  if (!ops_absent(mask)) {
    if ((bad = etk_ops_check(mask, ETK_IS_MASK, 1, x->rank)) || (bad = etk_ops_apart(y, &mask, 1, 0))) return bad;
    for (int32_t i = 1; i <= mask->rank; i++) {
      const int64_t want = x->dim[x->rank - i], have = mask->dim[mask->rank - i];
      if (have != want && (have != 1 || i == 1)) return ETK_E_SHAPE;
    }
    w.t[mask->dtype == ETK_F32 ? 1 : 2] = mask;
  }
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  if (!k) return ETK_E_ISA;
  etk_rows a = {.f = {scale, 0.0f}};
  etk_ops_walk_rows(&w, x, &a, k->softmax);
  return ETK_OK;
}
