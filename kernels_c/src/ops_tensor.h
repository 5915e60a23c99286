/* Checks of tensors and the walk over rows, for the small operations. Internal. */
#ifndef ETK_OPS_TENSOR_H
#define ETK_OPS_TENSOR_H

#include "edgetok/base.h"
#include "ops_kernel.h"
#include "tensor.h"

enum { /* what a tensor may be */
  ETK_IS_F32 = 1 << ETK_F32, ETK_IS_S8 = 1 << ETK_S8, ETK_IS_INDEX = 1 << ETK_I32 | 1 << ETK_I64,
  ETK_IS_MASK = 1 << ETK_F32 | 1 << ETK_BOOL | 1 << ETK_U8,
  ETK_IS_BYTES = 1 << ETK_F32 | 1 << ETK_F16 | 1 << ETK_BF16 | 1 << ETK_S8 | 1 << ETK_U8 | 1 << ETK_I32 | 1 << ETK_I64 |
                 1 << ETK_BOOL | 1 << ETK_U64,
  ETK_IS_OUTPUT = 1 << 20, /* no two elements share memory */
};

/* An optional tensor that is not there. */
static inline int ops_absent(const etk_tensor *t) { return !t || etk_absent(t); }
/* etk_tensor_in or etk_tensor_out, with the null pointer and a range of ranks. */
etk_status etk_ops_check(const etk_tensor *t, int32_t is, int32_t min_rank, int32_t max_rank);
/* a and b have the same dims, but for the last `drop` axes of a. */
int etk_ops_same_dims(const etk_tensor *a, const etk_tensor *b, int32_t drop);
/* 0 apart, 1 the same view, 2 anything else that shares bytes. */
int etk_ops_overlap(const etk_tensor *a, const etk_tensor *b);
/* ETK_E_ALIAS when out shares bytes with one of n inputs other than being exactly it; NULLs are skipped. */
etk_status etk_ops_apart(const etk_tensor *out, const etk_tensor *const *in, int32_t n, int in_place);
int64_t etk_ops_index_at(const etk_tensor *idx, const char *p);

/* Run fn over every row of `lead`. Slot s takes t[s] (NULL = absent); its axes before those of the row align with the ones of
 * lead at the end, and repeat where they are 1 or missing. flat: element-wise, so that dense rows may be joined into one. */
typedef struct etk_ops_walk {
  const etk_tensor *t[ETK_SLOTS];
  int32_t row_axes[ETK_SLOTS]; /* axes of the tensor that belong to the row: 1, or 0 */
  int32_t flat;
} etk_ops_walk;
void etk_ops_walk_rows(const etk_ops_walk *w, const etk_tensor *lead, etk_rows *a, etk_rows_fn fn);

#endif
