/* Gather and scatter of rows: one memcpy per row, bound by memory. */
#include <string.h>

#include "edgetok/ops.h"
#include "ops_tensor.h"

/* big: the side that is indexed. */
static etk_status check_rows(const etk_tensor *big, const etk_tensor *idx, const etk_tensor *small) {
  const int32_t r = big->rank;
  etk_status bad = etk_ops_check(idx, ETK_IS_INDEX, r - 1, r - 1);
  if (bad) return bad;
  if (small->rank != r || small->dtype != big->dtype) return small->rank != r ? ETK_E_SHAPE : ETK_E_DTYPE;
  if (small->dim[r - 1] != big->dim[r - 1] || small->dim[r - 2] != idx->dim[r - 2]) return ETK_E_SHAPE;
  if (r == 3 && (small->dim[0] != big->dim[0] || idx->dim[0] != big->dim[0])) return ETK_E_SHAPE;
  for (int64_t b = 0; b < (r == 3 ? idx->dim[0] : 1); b++)
    for (int64_t m = 0; m < idx->dim[r - 2]; m++) {
      const char *p = (const char *)idx->data + (r == 3 ? b * idx->stride[0] : 0) + m * idx->stride[r - 2];
      const int64_t at = etk_ops_index_at(idx, p);
      if (at < 0 || at >= big->dim[r - 2]) return ETK_E_RANGE;
    }
  return ETK_OK;
}

/* The next row is asked for while this one is copied: the processor's own prefetching cannot know where it lies. */
static void ask_for(const char *p, size_t bytes) {
  for (size_t i = 0; i < bytes && i < 256; i += 64) __builtin_prefetch(p + i);
}

static void move(const etk_tensor *from, const etk_tensor *idx, const etk_tensor *to, int gather) {
  const int32_t r = from->rank;
  const size_t bytes = (size_t)(from->dim[r - 1] * etk_dtype_bytes(from->dtype));
  const int64_t count = idx->dim[r - 2], step = idx->stride[r - 2];
  if (bytes == 0 || count == 0) return; /* empty tensors may have no data */
  for (int64_t b = 0; b < (r == 3 ? from->dim[0] : 1); b++) {
    const char *p = (const char *)idx->data + (r == 3 ? b * idx->stride[0] : 0);
    const char *const src = (const char *)from->data + (r == 3 ? b * from->stride[0] : 0);
    char *const dst = (char *)to->data + (r == 3 ? b * to->stride[0] : 0);
    for (int64_t m = 0; m < count; m++, p += step) {
      const int64_t at = etk_ops_index_at(idx, p);
      if (gather && m + 1 < count) ask_for(src + etk_ops_index_at(idx, p + step) * from->stride[r - 2], bytes);
      memcpy(dst + (gather ? m : at) * to->stride[r - 2], src + (gather ? at : m) * from->stride[r - 2], bytes);
    }
  }
}

static etk_status both(const etk_tensor *x, const etk_tensor *idx, etk_tensor *y, int gather) {
  etk_status bad = etk_ops_check(x, ETK_IS_BYTES, 2, 3);
  if (bad || (bad = etk_ops_check(y, ETK_IS_BYTES | ETK_IS_OUTPUT, 2, 3))) return bad;
  if ((bad = gather ? check_rows(x, idx, y) : check_rows(y, idx, x))) return bad;
  const etk_tensor *const in[2] = {x, idx};
  if ((bad = etk_ops_apart(y, in, 2, 0))) return bad;
  move(x, idx, y, gather);
  return ETK_OK;
}

etk_status etk_gather_rows(const etk_tensor *x, const etk_tensor *idx, etk_tensor *y) { return both(x, idx, y, 1); }
etk_status etk_scatter_rows(const etk_tensor *x, const etk_tensor *idx, etk_tensor *y) { return both(x, idx, y, 0); }
