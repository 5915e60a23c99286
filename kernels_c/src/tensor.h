/* Checks of etk_tensor and of versioned structs that every public function makes. Internal. */
#ifndef ETK_TENSOR_H
#define ETK_TENSOR_H

#include "edgetok/base.h"

/* For the dtypes argument: bit d set = dtype d is taken. */
#define ETK_DT(d) (1u << (d))

static inline int etk_absent(const etk_tensor *t) { return t->rank == 0 && t->data == NULL; }

/* Bytes of one element; 0 for an unknown dtype and for the 4-bit ones (two to a byte). */
int64_t etk_dtype_bytes(int32_t dtype);

/* Bytes from data to the end of the last element; 0 when any dimension is. ETK_E_SHAPE: rank or a negative dimension;
 * ETK_E_STRIDE: negative; ETK_E_OVERFLOW: does not fit 63 bits. */
ETK_MUST_USE etk_status etk_tensor_extent(const etk_tensor *t, uint64_t *bytes);

/* An input: rank, dtype among dtypes, a dense last axis, strides that keep elements aligned, a data pointer that is
 * aligned to its elements and not null (unless the tensor is empty), and extent <= capacity. Dimensions are the
 * caller's to compare. Every status of the list above, ETK_E_DTYPE, ETK_E_NULL, ETK_E_ALIGN. */
ETK_MUST_USE etk_status etk_tensor_in(const etk_tensor *t, int32_t rank, uint32_t dtypes);

/* An output: the same, and no two elements share memory (no broadcast axis). */
ETK_MUST_USE etk_status etk_tensor_out(const etk_tensor *t, int32_t rank, uint32_t dtypes);

/* Non-zero when the two (checked) tensors touch a common byte range. */
int etk_tensor_overlap(const etk_tensor *a, const etk_tensor *b);

/* Copy a versioned struct of the caller (it begins with uint32_t struct_size) into dst, size bytes: missing fields are
 * zero, bytes past the known ones must be, or ETK_E_STRUCT. src NULL is ETK_E_NULL. */
ETK_MUST_USE etk_status etk_struct_in(void *dst, uint32_t size, const void *src);

#endif
