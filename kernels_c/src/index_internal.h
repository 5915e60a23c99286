/* What the index builders share. Internal. */
#ifndef ETK_INDEX_INTERNAL_H
#define ETK_INDEX_INTERNAL_H

#include "edgetok/index.h"
#include "index_kernel.h"

enum { ETK_BLOCK = 64, ETK_INDEX_MAX_WORKERS = 256 };

static inline int64_t etk_ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

/* Copy a versioned struct: missing fields are zero, unknown ones must be. */
etk_status etk_index_desc(const void *src, void *dst, uint32_t size);

/* The tail of every builder. Write sizes; ETK_OK with *fill = 0 for a size query, ETK_E_RANGE when a capacity is too
 * small, ETK_E_NULL when an array that is needed is missing; *fill = 1: go on and fill. */
etk_status etk_index_begin(etk_index_arrays *arrays, const etk_bsr *out, int64_t rows, int64_t nnz, int64_t nbits, int *fill);
/* *out over the filled arrays: 64-blocks, one pattern shared by all heads unless the strides are changed later. */
void etk_index_describe(const etk_index_arrays *arrays, int64_t nqb, int64_t nkb, etk_bsr *out);

/* Rows of their own for each batch and head. */
void etk_index_heads(etk_bsr *out, int64_t batch, int64_t heads);

/* 64-blocks of row r that hold a key at or before the last query of the block: 0..nkb. */
int64_t etk_index_visible(int64_t r, int64_t n, int64_t m, int causal);
/* Whether the tile is visible throughout. */
int etk_index_full(int64_t r, int64_t c, int64_t n, int64_t m, int causal);

/* CSR of a map u8 [patterns][nqb][nkb], non-zero = kept; kinds by causality (of 64-blocks). */
etk_status etk_index_from_map(const uint8_t *map, int64_t patterns, int64_t nqb, int64_t nkb, int64_t n, int64_t m, int causal,
                              etk_index_arrays *arrays, etk_bsr *out);

/* Q [B, Hq, N, d] and K [B, Hkv, M, d], checked: float32, dense last axis, sizes that cannot overflow below. */
typedef struct etk_index_qk {
  const float *q, *k;
  int64_t batch, hq, hkv, n, m, nqb, nkb;
  int64_t stride_q[3], stride_k[3]; /* batch, head, row, in floats */
  int32_t d, dp;                    /* dp: d rounded up to 16 */
  const etk_index_kernel *kernel;
} etk_index_qk;
etk_status etk_index_qk_read(const etk_tensor *q, const etk_tensor *k, etk_index_qk *out);

static inline const float *etk_index_q(const etk_index_qk *x, int64_t b, int64_t h) {
  return x->q + b * x->stride_q[0] + h * x->stride_q[1];
}
static inline const float *etk_index_k(const etk_index_qk *x, int64_t b, int64_t h) {
  return x->k + b * x->stride_k[0] + h * x->stride_k[1];
}

/* mu[c]: the mean of rows, f32 sums of 64 rows added in float64 in ascending order. block f32 [d], total f64 [d]. */
void etk_index_mean(const etk_index_kernel *kernel, const float *x, int64_t stride, int64_t n, int32_t d, float *mu, float *block,
                    double *total, int32_t *nonfinite);
/* Scale of a block of rows (max|y| / 127, 0 for none) and the inverse that quantize takes. */
float etk_index_scale(const etk_index_kernel *kernel, const float *x, int64_t stride, int32_t n, int32_t d, const float *mu,
                      float *inverse);

/* Cut pieces, each a multiple of 64 bytes, from a workspace; with base NULL only *at grows: the size. */
typedef struct etk_index_ws {
  unsigned char *base;
  uint64_t at;
  int overflow;
} etk_index_ws;
void *etk_index_take(etk_index_ws *ws, uint64_t count, uint64_t size);

/* Mark the fewest weights, largest first and ties by lower index, whose sum is at least target and whose number is at
 * least count (or all of them). Weight 0 is never marked and never counted. keep[order ? order[j] : j] = 1. */
void etk_index_select(const etk_index_kernel *kernel, const uint32_t *weight, int64_t n, uint64_t target, int64_t count,
                      const int32_t *order, uint8_t *keep);
/* k-means of rows that are INT8 codes, all with one scale. Everything but labels is scratch of its own. */
typedef struct etk_kmeans {
  int64_t n, clusters;
  int32_t dp;
  const int8_t *codes; /* [n][dp] */
  int32_t *label;      /* [n] in and out */
  int32_t *count;      /* [clusters] out */
  int16_t *centroid;   /* [clusters][dp] out: 8 x mean, rounded; 0 where empty */
  int32_t *sum;        /* [clusters][dp] */
  int8_t *nearest;     /* [clusters][dp] the centroids that rows are compared with */
  int32_t *norm;       /* [clusters] */
  void *packed;        /* etk_index_packed(clusters, dp) */
  int32_t *dot;        /* [64][clusters rounded up to 16] */
} etk_kmeans;
void etk_kmeans_carve(etk_index_ws *ws, uint64_t clusters, uint64_t dp, etk_kmeans *out);
/* Labels hold a start when warm, else seeds are tokens at equal distances. Stops early when no label changes. */
void etk_kmeans_run(const etk_index_kernel *kernel, etk_kmeans *x, int32_t iterations, int warm);

/* ceil(p * mass) in float64. */
uint64_t etk_index_target(float p, uint64_t mass);

#endif
