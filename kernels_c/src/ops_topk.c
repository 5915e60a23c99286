/* argmax and top-k.
 *
 * The kernel reduces a row to one key per ETK_SCAN elements in a single pass. The k-th largest of these keys is a floor for
 * the k-th largest element, so only blocks that reach it are looked at again, element by element. */
#include "edgetok/ops.h"
#include "ops_order.h"
#include "ops_tensor.h"

enum { k_lowest = 0x007fffff /* the key of -inf */, k_spare = 2048 };

static void store_index(const etk_tensor *idx, char *at, int64_t value) {
  if (idx->dtype == ETK_I32) *(int32_t *)(void *)at = (int32_t)value;
  else *(int64_t *)(void *)at = value;
}

static int64_t row_argmax(const etk_ops_kernel *k, const float *x, int64_t cols) {
  enum { blocks = 64 };
  uint32_t keys[blocks], best = 0;
  int64_t at = 0;
  for (int64_t i = 0; i < cols; i += (int64_t)blocks * ETK_SCAN) {
    const int64_t n = cols - i < (int64_t)blocks * ETK_SCAN ? cols - i : (int64_t)blocks * ETK_SCAN;
    k->scan_max(x + i, n, keys);
    for (int64_t b = 0; b * ETK_SCAN < n; b++)
      if (keys[b] > best) best = keys[b], at = i + b * ETK_SCAN;
  }
  while (etk_float_key(x[at]) != best) at++;
  return at;
}

/* A walk over the rows of x with their place in other tensors of the same leading dims. */
static int64_t lead_offset(const etk_tensor *t, const int64_t at[4], int32_t axes) {
  int64_t o = 0;
  for (int32_t i = 0; i < axes; i++) o += at[i] * t->stride[i];
  return o;
}
static int next_row(const etk_tensor *x, int64_t at[4]) {
  for (int32_t i = x->rank - 2; i >= 0; i--) {
    if (++at[i] < x->dim[i]) return 1;
    at[i] = 0;
  }
  return 0;
}
static int empty(const etk_tensor *x) {
  for (int32_t i = 0; i < x->rank; i++)
    if (x->dim[i] == 0) return 1;
  return 0;
}

etk_status etk_argmax(const etk_tensor *x, etk_tensor *idx) {
  etk_status bad = etk_ops_check(x, ETK_IS_F32, 1, 5);
  if (bad || (bad = etk_ops_check(idx, ETK_IS_INDEX | ETK_IS_OUTPUT, x->rank - 1, x->rank - 1))) return bad;
  const int64_t cols = x->dim[x->rank - 1];
  if (!etk_ops_same_dims(x, idx, 1) || cols < 1 || (cols > INT32_MAX && idx->dtype == ETK_I32)) return ETK_E_SHAPE;
  if ((bad = etk_ops_apart(idx, &x, 1, 0))) return bad;
  const etk_ops_kernel *k = etk_ops_kernel_pick();
  if (!k) return ETK_E_ISA;
  int64_t at[4] = {0};
  if (empty(x)) return ETK_OK;
  do {
    const float *row = (const float *)(const void *)((const char *)x->data + lead_offset(x, at, x->rank - 1));
    store_index(idx, (char *)idx->data + lead_offset(idx, at, x->rank - 1), row_argmax(k, row, cols));
  } while (next_row(x, at));
  return ETK_OK;
}

static int64_t candidates(int64_t cols, int64_t k) {
  const int64_t room = 2 * k + k_spare;
  return (room < cols ? room : cols) + ETK_SCAN;
}

uint64_t etk_topk_workspace(int64_t cols, int64_t k) {
  if (cols < 1 || k < 1 || k > cols || cols > INT32_MAX) return 0;
  return (uint64_t)(4 * ((cols + ETK_SCAN - 1) / ETK_SCAN) + 16 * candidates(cols, k));
}

typedef struct topk_ws {
  uint32_t *blocks, *keys, *key_tmp;
  int32_t *idx, *idx_tmp;
  int64_t room;
} topk_ws;

/* The k largest, sorted, in w->keys and w->idx. */
static void row_topk(const etk_ops_kernel *kern, const float *x, int64_t cols, int64_t k, topk_ws *w) {
  const int64_t blocks = (cols + ETK_SCAN - 1) / ETK_SCAN;
  kern->scan_max(x, cols, w->blocks);
  uint32_t floor = k < blocks ? etk_kth_key(w->blocks, blocks, k) : k_lowest;
  if (floor < k_lowest) floor = k_lowest;
  int64_t n = 0;
  int closed = 0; /* the k kept are NaN: nothing can follow */
  for (int64_t b = 0; b < blocks && !closed; b++) {
    if (w->blocks[b] < floor) continue;
    const int64_t at = b * ETK_SCAN, m = cols - at < ETK_SCAN ? cols - at : ETK_SCAN;
    n += kern->collect(x + at, (int32_t)m, (int32_t)at, floor, w->keys + n, w->idx + n);
    if (n + ETK_SCAN <= w->room) continue;
    etk_keep_top(w->keys, w->idx, n, k); /* no room for another block: from now on only what beats the k-th */
    if (n > k) n = k;
    const uint32_t kth = etk_kth_key(w->keys, n, n);
    closed = n == k && kth == 0xffffffffu;
    if (n == k && kth + 1u > floor) floor = kth + 1u;
  }
  etk_keep_top(w->keys, w->idx, n, k);
  etk_sort_falling(w->keys, w->idx, k, w->key_tmp, w->idx_tmp);
}

etk_status etk_topk(const etk_tensor *x, int64_t k, etk_tensor *values, etk_tensor *idx, void *ws, uint64_t ws_bytes) {
  etk_status bad = etk_ops_check(x, ETK_IS_F32, 1, 5);
  if (bad || (bad = etk_ops_check(idx, ETK_IS_INDEX | ETK_IS_OUTPUT, x->rank, x->rank))) return bad;
  const int32_t axes = x->rank - 1;
  const int64_t cols = x->dim[axes];
  const int has = !ops_absent(values);
  if (has && (bad = etk_ops_check(values, ETK_IS_F32 | ETK_IS_OUTPUT, x->rank, x->rank))) return bad;
  if (cols > INT32_MAX || idx->dim[axes] != k || (has && !etk_ops_same_dims(idx, values, 0))) return ETK_E_SHAPE;
  for (int32_t i = 0; i < axes; i++)
    if (idx->dim[i] != x->dim[i]) return ETK_E_SHAPE;
  if (k < 1 || k > cols) return ETK_E_RANGE;
  const etk_tensor *const others[2] = {x, values};
  if ((bad = etk_ops_apart(idx, others, 2, 0)) || (bad = etk_ops_apart(values, &x, 1, 0))) return bad;
  if (!ws || (uintptr_t)ws % 8 || ws_bytes < etk_topk_workspace(cols, k)) return ETK_E_WORKSPACE;
  const etk_ops_kernel *kern = etk_ops_kernel_pick();
  if (!kern) return ETK_E_ISA;
  const int64_t room = candidates(cols, k);
  uint32_t *const p = ws;
  topk_ws w = {p + 4 * room, p, p + room, (int32_t *)(void *)(p + 2 * room), (int32_t *)(void *)(p + 3 * room), room};
  int64_t at[4] = {0};
  if (empty(x)) return ETK_OK;
  do {
    const float *row = (const float *)(const void *)((const char *)x->data + lead_offset(x, at, axes));
    char *out = (char *)idx->data + lead_offset(idx, at, axes);
    row_topk(kern, row, cols, k, &w);
    for (int64_t i = 0; i < k; i++) store_index(idx, out + i * etk_dtype_bytes(idx->dtype), w.idx[i]);
    if (!has) continue;
    float *v = (float *)(void *)((char *)values->data + lead_offset(values, at, axes));
    for (int64_t i = 0; i < k; i++) v[i] = row[w.idx[i]];
  } while (next_row(x, at));
  return ETK_OK;
}
