/* Checks of tensors and versioned structs for the KV functions. Internal. */
#ifndef ETK_KV_TENSOR_H
#define ETK_KV_TENSOR_H

#include <string.h>

#include "edgetok/base.h"

static inline int kv_absent(const etk_tensor *t) { return t == NULL || (t->rank == 0 && t->data == NULL); }

static inline int64_t kv_elem_bytes(int32_t dtype) {
  switch (dtype) {
    case ETK_F32: case ETK_I32: return 4;
    case ETK_F16: return 2;
    case ETK_I64: case ETK_U64: return 8;
    default: return 0;
  }
}

/* rank and dims as given, one of two dtypes, dense last axis, strides in whole elements, everything within capacity. */
static inline etk_status kv_tensor_check(const etk_tensor *t, int32_t rank, const int64_t *dim, int32_t dtype_a, int32_t dtype_b) {
  if (t->rank != rank) return ETK_E_SHAPE;
  int64_t count = 1, bytes = kv_elem_bytes(t->dtype);
  for (int32_t i = 0; i < rank; i++) {
    if (t->dim[i] != dim[i]) return ETK_E_SHAPE;
    if (t->dim[i] == 0) count = 0;
  }
  if (t->dtype != dtype_a && t->dtype != dtype_b) return ETK_E_DTYPE;
  if (count == 0) return ETK_OK;
  if (!t->data) return ETK_E_NULL;
  if (t->dim[rank - 1] > 1 && t->stride[rank - 1] != bytes) return ETK_E_STRIDE;
  uint64_t end = (uint64_t)bytes;
  for (int32_t i = 0; i < rank; i++) {
    uint64_t span;
    if (t->stride[i] < 0 || t->stride[i] % bytes) return ETK_E_STRIDE;
    if (__builtin_mul_overflow((uint64_t)(t->dim[i] - 1), (uint64_t)t->stride[i], &span) ||
        __builtin_add_overflow(end, span, &end) || end > INT64_MAX)
      return ETK_E_OVERFLOW;
  }
  if (end > t->capacity) return ETK_E_OVERFLOW;
  if ((uintptr_t)t->data % (uint64_t)bytes) return ETK_E_ALIGN;
  return ETK_OK;
}

/* Copy a versioned struct of the caller into dst (size bytes): missing fields zero, unknown ones must be zero. */
static inline etk_status kv_take_struct(void *dst, uint64_t size, const void *src) {
  uint32_t given;
  memcpy(&given, src, sizeof given);
  if (given < 8 || given > 4096) return ETK_E_STRUCT;
  const uint8_t *bytes = (const uint8_t *)src;
  for (uint64_t i = size; i < given; i++)
    if (bytes[i]) return ETK_E_STRUCT;
  memset(dst, 0, size);
  memcpy(dst, src, given < size ? given : size);
  return ETK_OK;
}

#endif
