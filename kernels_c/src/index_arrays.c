/* From decisions to CSR arrays: size queries, capacities, kinds. */
#include <string.h>

#include "index_internal.h"

etk_status etk_index_desc(const void *src, void *dst, uint32_t size) {
  if (!src) return ETK_E_NULL;
  uint32_t given;
  memcpy(&given, src, sizeof given);
  if (given < sizeof given || given > 4096) return ETK_E_STRUCT;
  for (uint32_t i = size; i < given; i++)
    if (((const unsigned char *)src)[i]) return ETK_E_STRUCT;
  memset(dst, 0, size);
  memcpy(dst, src, given < size ? given : size);
  return ETK_OK;
}

etk_status etk_index_begin(etk_index_arrays *arrays, const etk_bsr *out, int64_t rows, int64_t nnz, int64_t nbits, int *fill) {
  arrays->rows = rows;
  arrays->nnz = nnz;
  arrays->nbits = nbits;
  *fill = 0;
  if (!arrays->row_ptr) return ETK_OK;
  if (!out || (nnz > 0 && (!arrays->col || !arrays->kind)) || (nbits > 0 && (!arrays->bits || !arrays->bits_idx)))
    return ETK_E_NULL;
  if (arrays->row_cap <= rows || arrays->nnz_cap < nnz || (nbits > 0 && arrays->bits_cap < nbits)) return ETK_E_RANGE;
  *fill = 1;
  return ETK_OK;
}

void etk_index_describe(const etk_index_arrays *arrays, int64_t nqb, int64_t nkb, etk_bsr *out) {
  const etk_bsr x = {.bq = ETK_BLOCK, .bk = ETK_BLOCK, .nqb = nqb, .nkb = nkb, .row_ptr = arrays->row_ptr, .rows = arrays->rows,
                     .col = arrays->col, .nnz = arrays->nnz, .kind = arrays->kind,
                     .bits = arrays->nbits > 0 ? arrays->bits : NULL, .nbits = arrays->nbits,
                     .bits_idx = arrays->nbits > 0 ? arrays->bits_idx : NULL};
  *out = x;
}

void etk_index_heads(etk_bsr *out, int64_t batch, int64_t heads) {
  out->stride_h = heads > 1 ? out->nqb : 0;
  out->stride_b = batch > 1 ? heads * out->nqb : 0;
}

int64_t etk_index_visible(int64_t r, int64_t n, int64_t m, int causal) {
  if (!causal) return etk_ceil_div(m, ETK_BLOCK);
  const int64_t last_row = r * ETK_BLOCK + 63 < n - 1 ? r * ETK_BLOCK + 63 : n - 1;
  const int64_t last_key = last_row + (m - n); /* < m, since last_row < n */
  return last_key < 0 ? 0 : last_key / ETK_BLOCK + 1;
}

int etk_index_full(int64_t r, int64_t c, int64_t n, int64_t m, int causal) {
  const int64_t last_key = c * ETK_BLOCK + 63 < m - 1 ? c * ETK_BLOCK + 63 : m - 1;
  return !causal || last_key <= r * ETK_BLOCK + (m - n);
}

etk_status etk_index_from_map(const uint8_t *map, int64_t patterns, int64_t nqb, int64_t nkb, int64_t n, int64_t m, int causal,
                              etk_index_arrays *arrays, etk_bsr *out) {
  const int64_t rows = patterns * nqb;
  int64_t nnz = 0;
  for (int64_t i = 0; i < rows * nkb; i++) nnz += map[i] != 0;
  int fill;
  const etk_status st = etk_index_begin(arrays, out, rows, nnz, 0, &fill);
  if (st != ETK_OK || !fill) return st;
  int64_t at = 0;
  arrays->row_ptr[0] = 0;
  for (int64_t r = 0; r < rows; r++) {
    const uint8_t *row = map + r * nkb;
    for (int64_t c = 0; c < nkb; c++) {
      if (!row[c]) continue;
      arrays->col[at] = (int32_t)c;
      arrays->kind[at++] = (uint8_t)!etk_index_full(r % nqb, c, n, m, causal);
    }
    arrays->row_ptr[r + 1] = at;
  }
  etk_index_describe(arrays, nqb, nkb, out);
  return ETK_OK;
}
