/* Checks of etk_tensor and of versioned structs. Reads what the struct says, never the tensor's data. */
#include "tensor.h"

#include <string.h>

#include "checked.h"

int64_t etk_dtype_bytes(int32_t dtype) {
  switch (dtype) {
    case ETK_F32: case ETK_I32: return 4;
    case ETK_F16: case ETK_BF16: return 2;
    case ETK_S8: case ETK_U8: case ETK_BOOL: return 1;
    case ETK_I64: case ETK_U64: return 8;
    default: return 0;
  }
}

static int packed4(int32_t dtype) { return dtype == ETK_S4X2 || dtype == ETK_U4X2; }

etk_status etk_tensor_extent(const etk_tensor *t, uint64_t *bytes) {
  if (t->rank < 0 || t->rank > 5) return ETK_E_SHAPE;
  const int64_t item = packed4(t->dtype) ? 1 : etk_dtype_bytes(t->dtype);
  if (item == 0) return ETK_E_DTYPE;
  uint64_t end = (uint64_t)item;
  int empty = 0;
  for (int32_t i = 0; i < t->rank; i++) {
    if (t->dim[i] < 0) return ETK_E_SHAPE;
    if (t->dim[i] == 0) empty = 1;
  }
  for (int32_t i = 0; i < t->rank && !empty; i++) {
    uint64_t span, steps = (uint64_t)t->dim[i] - 1;
    if (t->stride[i] < 0) return ETK_E_STRIDE;
    if (packed4(t->dtype) && i == t->rank - 1) steps /= 2;
    if (etk_mul(steps, (uint64_t)t->stride[i], &span) || etk_add(end, span, &end) || end > INT64_MAX) return ETK_E_OVERFLOW;
  }
  *bytes = empty ? 0 : end;
  return ETK_OK;
}

etk_status etk_tensor_in(const etk_tensor *t, int32_t rank, uint32_t dtypes) {
  if (t->rank != rank) return ETK_E_SHAPE;
  if (t->dtype < 0 || t->dtype > 31 || !(dtypes & ETK_DT(t->dtype))) return ETK_E_DTYPE;
  uint64_t bytes;
  const etk_status st = etk_tensor_extent(t, &bytes);
  if (st != ETK_OK || bytes == 0) return st;
  const int64_t item = packed4(t->dtype) ? 1 : etk_dtype_bytes(t->dtype);
  if (!t->data) return ETK_E_NULL;
  if (bytes > t->capacity || bytes > UINTPTR_MAX - (uintptr_t)t->data) return ETK_E_OVERFLOW;
  if ((uintptr_t)t->data % (uint64_t)item) return ETK_E_ALIGN;
  for (int32_t i = 0; i < rank; i++)
    if (t->dim[i] > 1 && t->stride[i] % item) return ETK_E_STRIDE;
  if (rank > 0 && t->dim[rank - 1] > 1 && t->stride[rank - 1] != item) return ETK_E_STRIDE;
  return ETK_OK;
}

/* Axes taken by rising stride; each must step over all that the smaller ones span. */
static int overlaps_itself(const etk_tensor *t) {
  const int64_t item = packed4(t->dtype) ? 1 : etk_dtype_bytes(t->dtype);
  uint64_t span = (uint64_t)item; /* bytes covered so far */
  int32_t left[5], n = 0;
  for (int32_t i = 0; i < t->rank; i++)
    if (t->dim[i] > 1) left[n++] = i;
  while (n > 0) {
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
      if (t->stride[left[i]] < t->stride[left[best]]) best = i;
    const int32_t axis = left[best];
    uint64_t steps = (uint64_t)t->dim[axis] - 1;
    if (packed4(t->dtype) && axis == t->rank - 1) steps /= 2;
    if (steps > 0 && (uint64_t)t->stride[axis] < span) return 1;
    span += steps * (uint64_t)t->stride[axis];
    left[best] = left[--n];
  }
  return 0;
}

etk_status etk_tensor_out(const etk_tensor *t, int32_t rank, uint32_t dtypes) {
  const etk_status st = etk_tensor_in(t, rank, dtypes);
  if (st != ETK_OK) return st;
  for (int32_t i = 0; i < rank; i++)
    if (t->dim[i] == 0) return ETK_OK;
  return overlaps_itself(t) ? ETK_E_STRIDE : ETK_OK;
}

int etk_tensor_overlap(const etk_tensor *a, const etk_tensor *b) {
  uint64_t na, nb;
  if (etk_absent(a) || etk_absent(b)) return 0;
  if (etk_tensor_extent(a, &na) != ETK_OK || etk_tensor_extent(b, &nb) != ETK_OK || na == 0 || nb == 0) return 0;
  const uintptr_t x = (uintptr_t)a->data, y = (uintptr_t)b->data;
  return x < y + nb && y < x + na;
}

etk_status etk_struct_in(void *dst, uint32_t size, const void *src) {
  enum { MOST = 4096 };
  uint32_t given;
  if (!src) return ETK_E_NULL;
  memcpy(&given, src, sizeof given);
  if (given < sizeof given || given > MOST) return ETK_E_STRUCT;
  const unsigned char *bytes = src;
  for (uint32_t i = size; i < given; i++)
    if (bytes[i]) return ETK_E_STRUCT;
  memset(dst, 0, size);
  memcpy(dst, src, given < size ? given : size);
  return ETK_OK;
}
