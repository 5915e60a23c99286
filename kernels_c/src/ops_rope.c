/* Rotary embedding: tables, checks, then the kernel batch by batch. */
#include <math.h>

#include "edgetok/ops.h"
#include "ops_tensor.h"

etk_status etk_rope_tables(const etk_tensor *inv_freq, double base, int64_t first, float amplitude, etk_tensor *cos_table,
                           etk_tensor *sin_table) {
  etk_status bad = etk_ops_check(cos_table, ETK_IS_F32 | ETK_IS_OUTPUT, 2, 2);
  if (!bad) bad = etk_ops_check(sin_table, ETK_IS_F32 | ETK_IS_OUTPUT, 2, 2);
  if (bad) return bad;
  const int has = !ops_absent(inv_freq);
  if (has && (bad = etk_ops_check(inv_freq, ETK_IS_F32, 1, 1))) return bad;
  const int64_t rows = cos_table->dim[0], half = cos_table->dim[1];
  if (!etk_ops_same_dims(cos_table, sin_table, 0) || (has && inv_freq->dim[0] != half)) return ETK_E_SHAPE;
  if (first < 0 || first > INT64_MAX - rows || (!has && !(base > 0.0))) return ETK_E_RANGE;
  const etk_tensor *const others[2] = {sin_table, has ? inv_freq : NULL};
  if ((bad = etk_ops_apart(cos_table, others, 2, 0)) || (bad = etk_ops_apart(sin_table, others + 1, 1, 0))) return bad;
  for (int64_t i = 0; i < half; i++) {
    const double f = has ? (double)((const float *)inv_freq->data)[i] : pow(base, -(double)i / (double)half);
    for (int64_t p = 0; p < rows; p++) {
      const double angle = (double)(first + p) * f;
      float *c = (float *)(void *)((char *)cos_table->data + p * cos_table->stride[0]);
      float *s = (float *)(void *)((char *)sin_table->data + p * sin_table->stride[0]);
      c[i] = (float)(amplitude * cos(angle));
      s[i] = (float)(amplitude * sin(angle));
    }
  }
  return ETK_OK;
}

enum { k_chunk = 256 }; /* positions resolved at a time, on the stack */

static etk_status check_positions(const etk_tensor *pos, int64_t batch, int64_t tokens, int64_t rows, int64_t first) {
  if (ops_absent(pos)) return first < 0 || first > rows - tokens ? ETK_E_RANGE : ETK_OK;
  const etk_status bad = etk_ops_check(pos, ETK_IS_INDEX, 1, 2);
  if (bad) return bad;
  if (pos->dim[pos->rank - 1] != tokens || (pos->rank == 2 && pos->dim[0] != batch)) return ETK_E_SHAPE;
  const int64_t step = pos->stride[pos->rank - 1], outer = pos->rank == 2 ? pos->stride[0] : 0;
  for (int64_t b = 0; b < (pos->rank == 2 ? batch : 1); b++)
    for (int64_t n = 0; n < tokens; n++) {
      const int64_t p = etk_ops_index_at(pos, (const char *)pos->data + b * outer + n * step);
      if (p < 0 || p >= rows) return ETK_E_RANGE;
    }
  return ETK_OK;
}

etk_status etk_rope(const etk_tensor *x, const etk_tensor *cos_table, const etk_tensor *sin_table, const etk_tensor *pos,
                    int64_t first, int32_t interleaved, etk_tensor *y) {
  etk_status bad = etk_ops_check(x, ETK_IS_F32, 3, 4);
  if (bad || (bad = etk_ops_check(cos_table, ETK_IS_F32, 2, 2)) || (bad = etk_ops_check(sin_table, ETK_IS_F32, 2, 2)) ||
      (bad = etk_ops_check(y, ETK_IS_F32 | ETK_IS_OUTPUT, x->rank, x->rank)))
    return bad;
  const int32_t r = x->rank;
  const int64_t batch = r == 4 ? x->dim[0] : 1, tokens = x->dim[r - 2], d = x->dim[r - 1], half = cos_table->dim[1];
  if (!etk_ops_same_dims(x, y, 0) || !etk_ops_same_dims(cos_table, sin_table, 0) || 2 * half > d || d > INT32_MAX) return ETK_E_SHAPE;
  if (cos_table->stride[0] != sin_table->stride[0] && cos_table->dim[0] > 1) return ETK_E_STRIDE;
  if (interleaved != 0 && interleaved != 1) return ETK_E_RANGE;
  const etk_tensor *const tables[3] = {cos_table, sin_table, pos};
  if ((bad = check_positions(pos, batch, tokens, cos_table->dim[0], first)) || (bad = etk_ops_apart(y, &x, 1, 1)) ||
      (bad = etk_ops_apart(y, tables, 3, 0)))
    return bad;
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  if (!k) return ETK_E_ISA;
  const int has = !ops_absent(pos);
  int64_t row[k_chunk];
  etk_rope_arg a = {.heads = x->dim[r - 3], .x_token = x->stride[r - 2], .x_head = x->stride[r - 3],
                    .y_token = y->stride[r - 2], .y_head = y->stride[r - 3], .cos_at = cos_table->data,
                    .sin_at = sin_table->data, .table_step = cos_table->stride[0], .row = has ? row : NULL,
                    .d = (int32_t)d, .rot = (int32_t)(2 * half), .interleaved = interleaved};
  if (d == 0) return ETK_OK;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t n = 0; n < tokens; n += k_chunk) {
      a.tokens = tokens - n < k_chunk ? tokens - n : k_chunk;
      a.first = first + n;
      for (int64_t i = 0; has && i < a.tokens; i++)
        row[i] = etk_ops_index_at(pos, (const char *)pos->data + (pos->rank == 2 ? b * pos->stride[0] : 0) +
                                       (n + i) * pos->stride[pos->rank - 1]);
      a.x = (const char *)x->data + (r == 4 ? b * x->stride[0] : 0) + n * a.x_token;
      a.y = (char *)y->data + (r == 4 ? b * y->stride[0] : 0) + n * a.y_token;
      k->rope(&a);
    }
  return ETK_OK;
}
