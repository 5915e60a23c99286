/* Content checks of block indices and permutations, and the count behind density. Plain loops over caller memory:
 * nothing is allocated, nothing is written but the results. */
#include <string.h>

#include "edgetok/index.h"

/* First row of (b, h) in row_ptr, or -1 when that head is dense. */
static int64_t first_row(const etk_bsr *x, int64_t b, int64_t h) {
  if (x->head_pattern) return x->head_pattern[h] < 0 ? -1 : (int64_t)x->head_pattern[h] * x->nqb;
  return b * x->stride_b + h * x->stride_h;
}

static etk_status check_boundaries(const int32_t *ptr, int64_t blocks, int64_t stride, int64_t patterns, int64_t end) {
  const int64_t copies = stride == 0 ? 1 : patterns;
  for (int64_t p = 0; p < copies; p++) {
    const int32_t *at = ptr + p * stride;
    if (at[0] != 0 || at[blocks] != end) return ETK_E_SHAPE;
    for (int64_t i = 0; i < blocks; i++)
      if (at[i + 1] < at[i]) return ETK_E_RANGE;
  }
  return ETK_OK;
}

static etk_status check_shape(const etk_bsr *x, int64_t n, int64_t m) {
  if (x->bq == 64 && x->bk == 64) {
    if (x->nqb != n / 64 + (n % 64 != 0) || x->nkb != m / 64 + (m % 64 != 0)) return ETK_E_SHAPE;
  } else if (x->bq == 0 && x->bk == 0) {
    if (!x->q_block_ptr || !x->k_block_ptr) return ETK_E_NULL;
    if (n > INT32_MAX || m > INT32_MAX) return ETK_E_SHAPE;
    if (x->nqb < 0 || x->nkb < 0) return ETK_E_SHAPE;
    if (x->var_stride_q != 0 && x->var_stride_q <= x->nqb) return ETK_E_RANGE;
    if (x->var_stride_k != 0 && x->var_stride_k <= x->nkb) return ETK_E_RANGE;
  } else {
    return ETK_E_UNSUPPORTED;
  }
  if (x->nkb > INT32_MAX || x->nqb > INT32_MAX) return ETK_E_SHAPE;
  if (x->rows < 0 || x->nnz < 0 || x->nbits < 0) return ETK_E_SHAPE;
  if (x->nqb == 0 ? x->rows != 0 : x->rows % x->nqb != 0) return ETK_E_SHAPE;
  /* Addresses of the arrays themselves must not wrap. */
  if (x->rows > INT64_MAX / 16 || x->nnz > INT64_MAX / 16 || x->nbits > INT64_MAX / 1024) return ETK_E_OVERFLOW;
  return ETK_OK;
}

/* Where each (batch, head) starts: inside rows, on a pattern's first row when boundaries differ by pattern. */
static etk_status check_heads(const etk_bsr *x, int64_t batch, int64_t heads) {
  if (batch == 0 || heads == 0 || x->nqb == 0) return ETK_OK;
  if (x->head_pattern) {
    const int64_t patterns = x->rows / x->nqb;
    for (int64_t h = 0; h < heads; h++)
      if (x->head_pattern[h] != -2 && (x->head_pattern[h] < 0 || x->head_pattern[h] >= patterns)) return ETK_E_RANGE;
    return ETK_OK;
  }
  if (x->stride_b < 0 || x->stride_h < 0) return ETK_E_RANGE;
  if (x->stride_b > INT64_MAX / 4 / batch || x->stride_h > INT64_MAX / 4 / heads) return ETK_E_OVERFLOW;
  if ((batch - 1) * x->stride_b + (heads - 1) * x->stride_h + x->nqb > x->rows) return ETK_E_RANGE;
  if ((x->var_stride_q != 0 || x->var_stride_k != 0) && (x->stride_b % x->nqb != 0 || x->stride_h % x->nqb != 0))
    return ETK_E_RANGE;
  return ETK_OK;
}

static etk_status check_entries(const etk_bsr *x) {
  if (x->row_ptr[0] != 0 || x->row_ptr[x->rows] != x->nnz) return ETK_E_RANGE;
  for (int64_t r = 0; r < x->rows; r++)
    if (x->row_ptr[r + 1] < x->row_ptr[r] || x->row_ptr[r + 1] > x->nnz) return ETK_E_RANGE;
  for (int64_t r = 0; r < x->rows; r++) {
    int64_t last = -1;
    for (int64_t i = x->row_ptr[r]; i < x->row_ptr[r + 1]; i++) {
      if (x->col[i] <= last || x->col[i] >= x->nkb) return ETK_E_RANGE;
      last = x->col[i];
    }
  }
  for (int64_t i = 0; x->kind && i < x->nnz; i++)
    if (x->kind[i] > 1) return ETK_E_RANGE;
  for (int64_t i = 0; x->bits_idx && i < x->nnz; i++)
    if (x->bits_idx[i] < -1 || x->bits_idx[i] >= x->nbits) return ETK_E_RANGE;
  return ETK_OK;
}

etk_status etk_bsr_check(const etk_bsr *bsr, int64_t batch, int64_t heads, int64_t n, int64_t m) {
  if (!bsr) return ETK_E_NULL;
  if (batch < 0 || heads < 0 || n < 0 || m < 0) return ETK_E_SHAPE;
  etk_status st = check_shape(bsr, n, m);
  if (st != ETK_OK) return st;
  if (!bsr->row_ptr || (bsr->nnz > 0 && !bsr->col)) return ETK_E_NULL;
  if (bsr->bits_idx && bsr->nbits > 0 && !bsr->bits) return ETK_E_NULL;
  st = check_heads(bsr, batch, heads);
  if (st != ETK_OK) return st;
  if (bsr->bq == 0) {
    const int64_t patterns = bsr->nqb == 0 ? 1 : bsr->rows / bsr->nqb;
    st = check_boundaries(bsr->q_block_ptr, bsr->nqb, bsr->var_stride_q, patterns, n);
    if (st == ETK_OK) st = check_boundaries(bsr->k_block_ptr, bsr->nkb, bsr->var_stride_k, patterns, m);
    if (st != ETK_OK) return st;
  }
  return check_entries(bsr);
}

etk_status etk_perm_check(const int32_t *perm, int64_t n) {
  enum { WINDOW = 65536 };
  uint64_t seen[WINDOW / 64];
  if (n < 0 || n > INT32_MAX) return ETK_E_SHAPE;
  if (n > 0 && !perm) return ETK_E_NULL;
  for (int64_t base = 0; base < n; base += WINDOW) { /* one pass per 64k values: no heap, linear for usual n */
    const int64_t width = n - base < WINDOW ? n - base : WINDOW;
    int64_t found = 0;
    memset(seen, 0, sizeof seen);
    for (int64_t i = 0; i < n; i++) {
      const int64_t v = (int64_t)perm[i] - base;
      if (v < 0 || v >= width) continue;
      const uint64_t one = UINT64_C(1) << (v & 63);
      if (seen[v >> 6] & one) return ETK_E_RANGE;
      seen[v >> 6] |= one;
      found++;
    }
    if (found != width) return ETK_E_RANGE;
  }
  return ETK_OK;
}

/* 64-blocks that hold a pair with key <= query + (m - n), in query block r. */
static int64_t visible_blocks(int64_t r, int64_t n, int64_t m, int64_t nkb, int32_t causal) {
  if (!causal) return nkb;
  const int64_t last_row = r * 64 + 63 < n - 1 ? r * 64 + 63 : n - 1;
  const int64_t last_key = last_row + (m - n) < m - 1 ? last_row + (m - n) : m - 1;
  return last_key < 0 ? 0 : last_key / 64 + 1;
}

etk_status etk_bsr_count(const etk_bsr *bsr, int64_t batch, int64_t heads, int64_t n, int64_t m, int32_t causal,
                         int64_t *listed, int64_t *visible) {
  if (!bsr || !listed || !visible) return ETK_E_NULL;
  uint64_t all = 0, kept = 0; /* unsigned: hostile boundaries may wrap, which is then only a wrong count */
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t h = 0; h < heads; h++) {
      const int64_t first = first_row(bsr, b, h), pattern = first < 0 || bsr->nqb == 0 ? 0 : first / bsr->nqb;
      const int32_t *qp = bsr->bq == 0 ? bsr->q_block_ptr + pattern * bsr->var_stride_q : NULL;
      const int32_t *kp = bsr->bq == 0 ? bsr->k_block_ptr + pattern * bsr->var_stride_k : NULL;
      if (qp) all += (uint64_t)n * (uint64_t)m;
      for (int64_t r = 0; r < bsr->nqb; r++) {
        const int64_t every = qp ? 0 : visible_blocks(r, n, m, bsr->nkb, causal);
        all += (uint64_t)every;
        if (first < 0) kept += (uint64_t)(qp ? (int64_t)(qp[r + 1] - qp[r]) * m : every);
        for (int64_t i = first < 0 ? 0 : bsr->row_ptr[first + r]; first >= 0 && i < bsr->row_ptr[first + r + 1]; i++)
          kept += (uint64_t)(qp ? (int64_t)(qp[r + 1] - qp[r]) * (kp[bsr->col[i] + 1] - kp[bsr->col[i]]) : 1);
      }
    }
  }
  *listed = (int64_t)kept;
  *visible = (int64_t)all;
  return ETK_OK;
}
