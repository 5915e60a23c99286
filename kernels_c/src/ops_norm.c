/* LayerNorm and RMSNorm: checks, then the kernel row by row. */
#include "edgetok/ops.h"
#include "ops_tensor.h"

const char *etk_ops_kernel_name(void) {
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  return k ? k->name : NULL;
}

static etk_status vector_of(const etk_tensor *t, int64_t cols) {
  if (ops_absent(t)) return ETK_OK;
  const etk_status bad = etk_ops_check(t, ETK_IS_F32, 1, 1);
  return bad ? bad : t->dim[0] == cols ? ETK_OK : ETK_E_SHAPE;
}

static etk_status like(const etk_tensor *t, int32_t is, const etk_tensor *x, int32_t drop) {
  if (ops_absent(t)) return ETK_OK;
  const etk_status bad = etk_ops_check(t, is, x->rank - drop, x->rank - drop);
  return bad ? bad : etk_ops_same_dims(x, t, drop) ? ETK_OK : ETK_E_SHAPE;
}

/* Outputs stay apart from each other and from everything but, for y and sum, exactly x or residual. */
static etk_status all_apart(const etk_tensor *const in[4], const etk_tensor *const out[4]) {
  for (int32_t i = 0; i < 4; i++) {
    etk_status bad = etk_ops_apart(out[i], in, 2, i < 2);
    if (!bad) bad = etk_ops_apart(out[i], in + 2, 2, 0);
    if (!bad) bad = etk_ops_apart(out[i], out, i, 0);
    if (bad) return bad;
  }
  return ETK_OK;
}

static etk_status norm(const etk_tensor *x, const etk_tensor *residual, const etk_tensor *gamma, const etk_tensor *beta,
                       float eps, int32_t rms, etk_tensor *y, etk_tensor *sum, etk_tensor *q, etk_tensor *q_scale) {
  etk_status bad = etk_ops_check(x, ETK_IS_F32, 1, 5);
  if (bad) return bad;
  const int64_t cols = x->dim[x->rank - 1];
  if (!(eps >= 0.0f)) return ETK_E_RANGE;
  const int has_q = !ops_absent(q), has_y = !ops_absent(y);
  if ((!has_q && !has_y) || (has_q && !q_scale)) return ETK_E_NULL;
  if ((bad = like(residual, ETK_IS_F32, x, 0)) || (bad = vector_of(gamma, cols)) || (bad = vector_of(beta, cols)) ||
      (bad = like(y, ETK_IS_F32 | ETK_IS_OUTPUT, x, 0)) || (bad = like(sum, ETK_IS_F32 | ETK_IS_OUTPUT, x, 0)) ||
      (bad = like(q, ETK_IS_S8 | ETK_IS_OUTPUT, x, 0)))
    return bad;
  if (has_q && ((bad = etk_ops_check(q_scale, ETK_IS_F32 | ETK_IS_OUTPUT, x->rank - 1, x->rank - 1)) ||
                (bad = etk_ops_same_dims(x, q_scale, 1) ? ETK_OK : ETK_E_SHAPE)))
    return bad;
  const etk_tensor *const in[4] = {x, residual, gamma, beta}, *const out[4] = {y, sum, q, has_q ? q_scale : NULL};
  if ((bad = all_apart(in, out))) return bad;
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  if (!k) return ETK_E_ISA;
  etk_ops_walk w = {{0}, {1, 1, 1, 1, 1, 1, 1, 0}, 0};
  for (int32_t i = 0; i < 4; i++) {
    w.t[i] = ops_absent(in[i]) ? NULL : in[i];
    w.t[4 + i] = i == 3 ? out[3] : ops_absent(out[i]) ? NULL : out[i];
  }
  etk_rows a = {.f = {eps, 0.0f}, .i = {rms, 0}};
  etk_ops_walk_rows(&w, x, &a, k->norm);
  return a.nonfinite ? ETK_NOTE_NONFINITE : ETK_OK;
}

etk_status etk_layernorm(const etk_tensor *x, const etk_tensor *residual, const etk_tensor *gamma, const etk_tensor *beta,
                         float eps, etk_tensor *y, etk_tensor *sum, etk_tensor *q, etk_tensor *q_scale) {
  return norm(x, residual, gamma, beta, eps, 0, y, sum, q, q_scale);
}

etk_status etk_rmsnorm(const etk_tensor *x, const etk_tensor *residual, const etk_tensor *gamma, float eps, etk_tensor *y,
                       etk_tensor *sum, etk_tensor *q, etk_tensor *q_scale) {
  return norm(x, residual, gamma, NULL, eps, 1, y, sum, q, q_scale);
}
