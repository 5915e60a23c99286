/* A mask of tokens to CSR: any and all per 64 x 64 tile (the law is in index.h).
 *
 * Pass one reads the mask once and leaves a class per tile in the workspace; pass two goes back only to partial tiles.
 * A row of a tile is one 64-bit word whichever way the mask is stored. */
#include <string.h>

#include "index_internal.h"

enum { NONE = 0, FULL = 1, CAUSAL_ONLY = 2, BITS = 3 };

typedef struct mask_view {
  const unsigned char *data;
  int64_t outer, inner;               /* leading axes: batch, head */
  int64_t stride_outer, stride_inner; /* bytes */
  int64_t n, m, stride_n;
  int words;                          /* 1: ETK_U64, 0: bytes */
  int causal;
} mask_view;

static etk_status view(const etk_tensor *t, int64_t m, int causal, mask_view *v) {
  if (!t) return ETK_E_NULL;
  if (t->rank < 2 || t->rank > 4 || m < 0 || m > INT32_MAX) return ETK_E_SHAPE;
  const int words = t->dtype == ETK_U64;
  if (!words && t->dtype != ETK_BOOL && t->dtype != ETK_U8) return ETK_E_DTYPE;
  const int64_t size = words ? 8 : 1;
  uint64_t last = 0; /* byte offset of the last element */
  int64_t total = 1;
  for (int i = 0; i < t->rank; i++) {
    if (t->dim[i] < 0 || t->dim[i] > INT32_MAX) return ETK_E_SHAPE;
    if (t->stride[i] < 0 || (words && t->stride[i] % 8 != 0)) return ETK_E_STRIDE;
    if (t->dim[i] > 1 && t->stride[i] > INT64_MAX / 8 / t->dim[i]) return ETK_E_OVERFLOW;
    if (t->dim[i] > 1) last += (uint64_t)(t->dim[i] - 1) * (uint64_t)t->stride[i];
    total = t->dim[i] == 0 || total == 0 ? 0 : total > INT64_MAX / t->dim[i] ? INT64_MAX : total * t->dim[i];
  }
  const int row = t->rank - 2, col = t->rank - 1;
  if (t->dim[col] != (words ? etk_ceil_div(m, 64) : m)) return ETK_E_SHAPE;
  if (total > 0 && t->dim[col] > 1 && t->stride[col] != size) return ETK_E_STRIDE;
  if (total > 0 && !t->data) return ETK_E_NULL;
  if (words && (uintptr_t)t->data % 8 != 0) return ETK_E_ALIGN;
  if (total > 0 && last + (uint64_t)size > t->capacity) return ETK_E_OVERFLOW;
  v->data = t->data;
  v->outer = t->rank > 3 ? t->dim[0] : 1;
  v->inner = t->rank > 2 ? t->dim[row - 1] : 1;
  v->stride_outer = t->rank > 3 ? t->stride[0] : 0;
  v->stride_inner = t->rank > 2 ? t->stride[row - 1] : 0;
  v->n = t->dim[row];
  v->m = m;
  v->stride_n = t->stride[row];
  v->words = words;
  v->causal = causal;
  const int64_t nqb = etk_ceil_div(v->n, 64), nkb = etk_ceil_div(m, 64);
  const int64_t tiles = nqb * nkb; /* < 2^52 */
  if (v->outer > 0 && v->inner > (INT64_MAX / 16) / v->outer) return ETK_E_OVERFLOW;
  if (tiles > 0 && v->outer * v->inner > (INT64_MAX / 16) / tiles) return ETK_E_OVERFLOW;
  return ETK_OK;
}

static uint64_t row_word(const unsigned char *row, int words, int64_t c, int64_t width) {
  uint64_t bits = 0;
  if (words) {
    memcpy(&bits, row + c * 8, 8);
    return width == 64 ? bits : bits & ((UINT64_C(1) << width) - 1);
  }
  for (int64_t j = 0; j < width; j++) bits |= (uint64_t)(row[c * 64 + j] != 0) << j;
  return bits;
}

/* Keys of the word at or before position p. */
static uint64_t causal_word(int64_t p, int64_t c, int64_t width) {
  const int64_t count = p + 1 - c * 64 < width ? p + 1 - c * 64 : width;
  return count <= 0 ? 0 : count >= 64 ? ~UINT64_C(0) : (UINT64_C(1) << count) - 1;
}

static int tile(const mask_view *v, const unsigned char *head, int64_t r, int64_t c, uint64_t *bits) {
  const int64_t width = v->m - c * 64 < 64 ? v->m - c * 64 : 64, height = v->n - r * 64 < 64 ? v->n - r * 64 : 64;
  int any = 0, all = 1, as_causal = v->causal;
  for (int64_t i = 0; i < height; i++) {
    const int64_t at = r * 64 + i;
    const uint64_t open = v->causal ? causal_word(at + (v->m - v->n), c, width) : causal_word(v->m, c, width);
    const uint64_t word = row_word(head + at * v->stride_n, v->words, c, width) & open;
    any |= word != 0;
    all &= word == causal_word(v->m, c, width);
    as_causal &= word == open;
    if (bits) bits[i] = word;
  }
  for (int64_t i = height; bits && i < 64; i++) bits[i] = 0;
  return !any ? NONE : all ? FULL : as_causal ? CAUSAL_ONLY : BITS;
}

etk_status etk_bsr_from_mask_workspace(const etk_tensor *mask, int64_t m, uint64_t *bytes) {
  mask_view v;
  if (!bytes) return ETK_E_NULL;
  const etk_status st = view(mask, m, 0, &v);
  if (st != ETK_OK) return st;
  *bytes = (uint64_t)(v.outer * v.inner * etk_ceil_div(v.n, 64) * etk_ceil_div(v.m, 64));
  return ETK_OK;
}

etk_status etk_bsr_from_mask(const etk_tensor *mask, int64_t m, int32_t causal, etk_index_arrays *arrays, etk_bsr *out, void *ws,
                             uint64_t ws_bytes) {
  mask_view v;
  if (!arrays) return ETK_E_NULL;
  if (causal < 0 || causal > 1) return ETK_E_RANGE;
  etk_status st = view(mask, m, causal, &v);
  if (st != ETK_OK) return st;
  const int64_t nqb = etk_ceil_div(v.n, 64), nkb = etk_ceil_div(v.m, 64), patterns = v.outer * v.inner, rows = patterns * nqb;
  if (rows * nkb > 0 && !ws) return ETK_E_NULL;
  if (ws_bytes < (uint64_t)(rows * nkb)) return ETK_E_WORKSPACE;
  uint8_t *class_of = ws;
  int64_t nnz = 0, nbits = 0;
  for (int64_t i = 0; i < rows * nkb; i++) {
    const int64_t p = i / (nqb * nkb), r = i / nkb % nqb;
    const unsigned char *head = v.data + p / v.inner * v.stride_outer + p % v.inner * v.stride_inner;
    class_of[i] = (uint8_t)tile(&v, head, r, i % nkb, NULL);
    nnz += class_of[i] != NONE;
    nbits += class_of[i] == BITS;
  }
  if (nbits > INT32_MAX) return ETK_E_OVERFLOW;
  int fill;
  st = etk_index_begin(arrays, out, rows, nnz, nbits, &fill);
  if (st != ETK_OK || !fill) return st;
  int64_t at = 0, next_bits = 0;
  arrays->row_ptr[0] = 0;
  for (int64_t i = 0; i < rows * nkb; i++) {
    const int64_t p = i / (nqb * nkb), r = i / nkb % nqb;
    if (class_of[i] != NONE) {
      const unsigned char *head = v.data + p / v.inner * v.stride_outer + p % v.inner * v.stride_inner;
      arrays->col[at] = (int32_t)(i % nkb);
      arrays->kind[at] = class_of[i] != FULL;
      if (arrays->bits_idx) arrays->bits_idx[at] = class_of[i] == BITS ? (int32_t)next_bits : -1;
      if (class_of[i] == BITS) tile(&v, head, r, i % nkb, arrays->bits + next_bits++ * 64);
      at++;
    }
    if (i % nkb == nkb - 1) arrays->row_ptr[i / nkb + 1] = at;
  }
  for (int64_t r = 0; nkb == 0 && r < rows; r++) arrays->row_ptr[r + 1] = 0;
  etk_index_describe(arrays, nqb, nkb, out);
  etk_index_heads(out, v.outer, v.inner);
  return ETK_OK;
}
