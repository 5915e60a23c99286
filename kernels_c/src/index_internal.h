/* What the index builders share. Internal. */
#ifndef ETK_INDEX_INTERNAL_H
#define ETK_INDEX_INTERNAL_H

#include "edgetok/index.h"

enum { ETK_BLOCK = 64 };

static inline int64_t etk_ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

/* Copy a versioned struct: missing fields are zero, unknown ones must be. */
etk_status etk_index_desc(const void *src, void *dst, uint32_t size);

/* The tail of every builder. Write sizes; ETK_OK with *fill = 0 for a size query, ETK_E_RANGE when a capacity is too
 * small, ETK_E_NULL when an array that is needed is missing; *fill = 1: go on and fill. */
etk_status etk_index_begin(etk_index_arrays *arrays, const etk_bsr *out, int64_t rows, int64_t nnz, int64_t nbits, int *fill);
/* *out over the filled arrays: 64-blocks, one pattern shared by all heads unless the strides are changed later. */
void etk_index_describe(const etk_index_arrays *arrays, int64_t nqb, int64_t nkb, etk_bsr *out);

/* 64-blocks of row r that hold a key at or before the last query of the block: 0..nkb. */
int64_t etk_index_visible(int64_t r, int64_t n, int64_t m, int causal);
/* Whether the tile is visible throughout. */
int etk_index_full(int64_t r, int64_t c, int64_t n, int64_t m, int causal);

/* CSR of a map u8 [patterns][nqb][nkb], non-zero = kept; kinds by causality. */
etk_status etk_index_from_map(const uint8_t *map, int64_t patterns, int64_t n, int64_t m, int causal, etk_index_arrays *arrays,
                              etk_bsr *out);

#endif
