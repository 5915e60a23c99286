/* Builders of sparse block indices: which 64 x 64 tiles of Q K^T attention computes.
 *
 * A tile is "full" (kind 0) when every query row before N sees every key before M in it, else "partial" (kind 1). A
 * partial tile carries bits (bit j of word i = key j visible to row i; rows at or past N and keys at or past M are 0),
 * or bits_idx -1 and is then checked against mask_kind of the attention descriptor (causal). Full tiles at the end of
 * the sequence still end at key M: attention never reads keys that do not exist. */
#ifndef EDGETOK_INDEX_H
#define EDGETOK_INDEX_H

#include "edgetok/attn.h"
#include "edgetok/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Check the content of an index against a problem of batch x heads query heads, n queries and m keys: sizes, row_ptr
 * (starts at 0, never falls, ends at nnz), columns ascending, unique and in range, kind 0 or 1, bits_idx in [-1, nbits),
 * block boundaries (start at 0, never fall, end at n and m), head_pattern and strides within rows. Reads everything
 * that the struct says is there and writes nothing. An empty row is valid.
 * Returns ETK_OK, ETK_E_NULL, ETK_E_SHAPE (nqb, nkb or a boundary does not match n, m), ETK_E_RANGE (content),
 * ETK_E_UNSUPPORTED (bq, bk other than 64, 64 or 0, 0), ETK_E_OVERFLOW. */
ETK_API ETK_MUST_USE etk_status etk_bsr_check(const etk_bsr *bsr, int64_t batch, int64_t heads, int64_t n, int64_t m);

/* ETK_OK when perm[0..n) holds every number of [0, n) once, else ETK_E_RANGE. n <= INT32_MAX, else ETK_E_SHAPE. */
ETK_API ETK_MUST_USE etk_status etk_perm_check(const int32_t *perm, int64_t n);

/* Query-key pairs inside listed tiles, and inside all tiles that hold a visible pair (causal: bottom-right), summed
 * over batch x heads; density = listed / visible. With 64-blocks the unit is a tile, with variable blocks a pair (causal
 * is then ignored, since positions are permuted). The index must have passed etk_bsr_check. Returns ETK_OK, ETK_E_NULL. */
ETK_API ETK_MUST_USE etk_status etk_bsr_count(const etk_bsr *bsr, int64_t batch, int64_t heads, int64_t n, int64_t m,
                                              int32_t causal, int64_t *listed, int64_t *visible);

#ifdef __cplusplus
}
#endif
#endif
