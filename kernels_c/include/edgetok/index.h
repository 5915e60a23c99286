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

/* The caller's arrays that a builder fills. Two calls: with row_ptr NULL a builder only writes rows, nnz and nbits
 * (out may then be NULL); with arrays of at least rows + 1, nnz and nbits entries it fills them and describes them in
 * *out, which points into them. Too small a capacity is ETK_E_RANGE with the needed sizes written and nothing else.
 * Builders whose tiles never carry bits leave bits and bits_idx alone; they may be NULL. */
typedef struct etk_index_arrays {
  int64_t *row_ptr;  /* [row_cap] */
  int64_t row_cap;   /* rows + 1 needed */
  int32_t *col;      /* [nnz_cap] */
  uint8_t *kind;     /* [nnz_cap] */
  int32_t *bits_idx; /* [nnz_cap] */
  int64_t nnz_cap;
  uint64_t *bits;    /* [bits_cap][64] */
  int64_t bits_cap;
  int64_t rows, nnz, nbits; /* out */
} etk_index_arrays;

/* Key k is visible to query i at position p = i + (m - n) when p - left <= k <= p + right, or k < sink; causal: k <= p
 * as well. One pattern for all heads. Equal bit tiles are stored once, in order of first use. */
typedef struct etk_window_desc {
  uint32_t struct_size;
  int32_t causal;
  int64_t n, m;        /* 0 .. INT32_MAX */
  int64_t left, right, sink; /* >= 0; INT64_MAX = without limit */
} etk_window_desc;

/* Returns ETK_E_NULL, ETK_E_STRUCT, ETK_E_SHAPE (n, m), ETK_E_RANGE (a parameter, or a capacity). */
ETK_API ETK_MUST_USE etk_status etk_bsr_from_window(const etk_window_desc *desc, etk_index_arrays *arrays, etk_bsr *out);

/* From a mask of tokens: ETK_BOOL (or ETK_U8, non-zero = visible) [.., N, M], or ETK_U64 [.., N, ceil(M / 64)] whose word
 * w holds keys 64 w .. 64 w + 63, bit 0 first (bits past M are ignored; m says how many keys there are). Leading axes
 * (at most two: batch, head) become patterns, batch outermost. Rank 2..4, last axis dense. A tile with no visible pair
 * is left out, one with all pairs is full, others are partial with bits in order of use. causal is ANDed; a tile that
 * only causality cuts gets no bits (bits_idx -1: attention is then run with ETK_MASK_CAUSAL as well).
 * ws: etk_bsr_from_mask_workspace bytes. Returns ETK_E_NULL, ETK_E_SHAPE, ETK_E_STRIDE, ETK_E_DTYPE, ETK_E_OVERFLOW,
 * ETK_E_WORKSPACE, ETK_E_RANGE (a capacity). */
ETK_API ETK_MUST_USE etk_status etk_bsr_from_mask_workspace(const etk_tensor *mask, int64_t m, uint64_t *bytes);
ETK_API ETK_MUST_USE etk_status etk_bsr_from_mask(const etk_tensor *mask, int64_t m, int32_t causal, etk_index_arrays *arrays,
                                                  etk_bsr *out, void *ws, uint64_t ws_bytes);

/* Radial attention over frames x tokens video tokens, then text tokens; integers only. With D = |frame i - frame j|,
 * L(x) = bits of x, e = L(tokens) - L(D): frames at D <= 1 see each other wholly; farther ones when e >= 6 or D is a
 * multiple of 2^(6 - e), and then tokens a, b of them at |a - b| <= max(decay 2^e, 64). sink_frame: all see frame 0.
 * A 64 x 64 block of video tokens is kept when more than 60 % of its non-empty columns are visible to more than 1/3 of
 * the rows; blocks with text tokens and the diagonal always. Every kept tile is full. One pattern for all heads. */
typedef struct etk_radial_desc {
  uint32_t struct_size;
  int32_t sink_frame;
  int64_t frames, tokens, text; /* frames * tokens + text <= 2^20 */
  int32_t decay_q8;             /* decay x 256; 0 = 256; at most 65536 */
} etk_radial_desc;
ETK_API ETK_MUST_USE etk_status etk_bsr_from_radial(const etk_radial_desc *desc, etk_index_arrays *arrays, etk_bsr *out);

/* Builders that look at Q f32 [B, Hq, N, d] and K f32 [B, Hkv, M, d] (dense last axis, d <= 1024, Hq % Hkv == 0). They
 * work on INT8 codes of K less its mean over keys, with scores as integers, so that the same input gives the same index on
 * every machine; values that are not finite count as 0 (ETK_NOTE_NONFINITE). Rows of the index: [B][Hq][nqb]. Heads are
 * the tasks given to the pool. ws: the bytes that *_workspace names for the same tensors and pool, aligned to 64. Common
 * statuses: ETK_E_NULL, ETK_E_STRUCT, ETK_E_SHAPE, ETK_E_STRIDE, ETK_E_DTYPE, ETK_E_ALIGN, ETK_E_OVERFLOW,
 * ETK_E_WORKSPACE, ETK_E_ISA, ETK_E_CANCELLED, ETK_E_RANGE (a parameter, or a capacity). Worst case of nnz: B Hq nqb nkb. */

/* SpargeAttention's rule on pooled blocks. Blocks whose self-similarity (mean cosine of all pairs of rows) is under theta
 * are computed wholly: such key blocks by every row, such query blocks over all visible keys. In the other rows the similar
 * key blocks compete: softmax of pooled q . pooled k, largest first, until the mass reaches p (or, with p = 0, the share
 * topk of the visible blocks), at least min_keep. The first sink_blocks columns and local_blocks around the diagonal
 * (1 = the diagonal itself) are added. causal: bottom-right, by block. */
typedef struct etk_topp_desc {
  uint32_t struct_size;
  int32_t causal;
  float scale;         /* 0 = 1/sqrt(d) */
  float theta;         /* -1 .. 1 */
  float p, topk;       /* 0 .. 1, not both 0 */
  int32_t min_keep;    /* 0 = 1 */
  int32_t sink_blocks, local_blocks; /* 0 = none */
} etk_topp_desc;
ETK_API ETK_MUST_USE etk_status etk_bsr_from_topp_workspace(const etk_topp_desc *desc, const etk_tensor *q, const etk_tensor *k,
                                                            const etk_pool *pool, uint64_t *bytes);
ETK_API ETK_MUST_USE etk_status etk_bsr_from_topp(const etk_topp_desc *desc, const etk_tensor *q, const etk_tensor *k,
                                                  etk_index_arrays *arrays, etk_bsr *out, void *ws, uint64_t ws_bytes,
                                                  const etk_pool *pool);

/* XAttention's rule. Squares of stride x stride queries and keys are scored by the sum of one antidiagonal (query
 * S - 1 - i with key i), scaled by scale / stride; softmax along each strided row; mass of a 64 x 64 block = sum over its
 * squares. The first block and those on the diagonal (of bottom-right positions) are kept, then the largest others until
 * the mass reaches threshold x the row's, and at least min_keep blocks. causal: a square is visible when its first key is
 * not after its last query. */
typedef struct etk_xattn_desc {
  uint32_t struct_size;
  int32_t causal;
  float scale;      /* 0 = 1/sqrt(d) */
  float threshold;  /* > 0, <= 1 */
  int32_t stride;   /* 4, 8, 16, 32 or 64; 0 = 16 */
  int32_t min_keep;
} etk_xattn_desc;
ETK_API ETK_MUST_USE etk_status etk_bsr_from_xattn_workspace(const etk_xattn_desc *desc, const etk_tensor *q, const etk_tensor *k,
                                                             const etk_pool *pool, uint64_t *bytes);
ETK_API ETK_MUST_USE etk_status etk_bsr_from_xattn(const etk_xattn_desc *desc, const etk_tensor *q, const etk_tensor *k,
                                                   etk_index_arrays *arrays, etk_bsr *out, void *ws, uint64_t ws_bytes,
                                                   const etk_pool *pool);

/* Sparse VideoGen2's rule. Tokens of each head are grouped by k-means (Euclid; Q and K apart) and laid side by side; blocks
 * are clusters, of any size, also none. Codes of one head have one scale; centroids are compared as rounded INT8, ties go to
 * the lower cluster; seeds are tokens (2 i + 1) N / (2 clusters), or the means of the labels given (warm). An empty cluster
 * keeps its centroid. Query cluster i keeps the key clusters with the largest n_j exp(scale cq_i . ck_j), ties by lower
 * index, until the weight reaches p, and at least the share min_ratio of those that are not empty, and one. Positions are
 * permuted, so there is no causal form. Attention runs with q_perm, k_perm and the index's block boundaries. */
typedef struct etk_clusters_desc {
  uint32_t struct_size;
  int32_t q_clusters, k_clusters; /* 1 .. 65536: nqb, nkb */
  int32_t iterations;             /* 0 = 4; at most 1000 */
  int32_t warm;                   /* 1: start from the labels in the arrays */
  float scale;                    /* 0 = 1/sqrt(d) */
  float p, min_ratio;             /* 0 .. 1 */
} etk_clusters_desc;
typedef struct etk_cluster_arrays { /* the caller's; out, labels also in when warm */
  int32_t *q_labels;          /* [B][Hq][N] */
  int32_t *k_labels;          /* [B][Hkv][M] */
  int32_t *q_perm, *q_inverse;/* [B][Hq][N]: row r of the problem is token q_perm[r]; q_inverse[q_perm[r]] = r */
  int32_t *k_perm, *k_inverse;/* [B][Hkv][M] */
  int32_t *q_block_ptr;       /* [B][Hq][q_clusters + 1] */
  int32_t *k_block_ptr;       /* [B][Hq][k_clusters + 1], those of the head's keys */
} etk_cluster_arrays;
/* N and M at most 2^24. A size query (arrays->row_ptr NULL) does all the work and writes only sizes. */
ETK_API ETK_MUST_USE etk_status etk_bsr_from_clusters_workspace(const etk_clusters_desc *desc, const etk_tensor *q,
                                                                const etk_tensor *k, const etk_pool *pool, uint64_t *bytes);
ETK_API ETK_MUST_USE etk_status etk_bsr_from_clusters(const etk_clusters_desc *desc, const etk_tensor *q, const etk_tensor *k,
                                                      const etk_cluster_arrays *clusters, etk_index_arrays *arrays, etk_bsr *out,
                                                      void *ws, uint64_t ws_bytes, const etk_pool *pool);

/* PAROAttention's rule: for each head one of the six orders of (frame, height, width) in which attention falls into blocks,
 * and a static mask in that order. Tokens: text, then frames x height x width with width fastest. Orders, outermost axis
 * first: 0 FHW (the tensor's own), 1 FWH, 2 HFW, 3 HWF, 4 WFH, 5 WHF; text tokens stay in front. Of the attention maps of
 * all batch entries (calibration samples), in blocks of 64 x 64 of the permuted tokens:
 *   quant  = mean over blocks of max / mean;  sparse = share of blocks whose mean is under eps
 * both divided by their sum over the six orders (sparse all 0: 1/6 each); chosen is the least
 * alpha quant + (1 - alpha)(1 - sparse), ties to the lower number. Mask: in each block row text columns and a partial last
 * column are kept, then the largest blocks until mass x the row's and density x the columns are reached (0 = no such
 * goal; one must be set), at least one; rows with text and a partial last row are kept wholly. */
typedef struct etk_paro_desc {
  uint32_t struct_size;
  int64_t frames, height, width, text; /* text + frames x height x width = N = M <= 2^24 */
  float scale;         /* 0 = 1/sqrt(d) */
  float alpha;         /* 0 .. 1 */
  float eps;           /* of a probability; 0 = 0.1 / N */
  float density, mass; /* 0 .. 1 */
} etk_paro_desc;
typedef struct etk_paro_arrays { /* the caller's, out */
  int32_t *order;         /* [H] */
  double *quant, *sparse; /* [H][6], before dividing; may be NULL */
  int32_t *perm, *inverse;/* [H][N]: row r of the problem is token perm[r], for Q, K and V alike */
} etk_paro_arrays;
/* Hq must be Hkv (else ETK_E_UNSUPPORTED: heads that share keys would need one order). Costs a dense map per head and
 * sample: for calibration. Rows of the index: [H][nqb], shared by the batch. */
ETK_API ETK_MUST_USE etk_status etk_bsr_from_paro_workspace(const etk_paro_desc *desc, const etk_tensor *q, const etk_tensor *k,
                                                            const etk_pool *pool, uint64_t *bytes);
ETK_API ETK_MUST_USE etk_status etk_bsr_from_paro(const etk_paro_desc *desc, const etk_tensor *q, const etk_tensor *k,
                                                  const etk_paro_arrays *paro, etk_index_arrays *arrays, etk_bsr *out, void *ws,
                                                  uint64_t ws_bytes, const etk_pool *pool);
/* The permutation of one order (0..5): perm [N], inverse [N] or NULL. ETK_E_NULL, ETK_E_SHAPE, ETK_E_RANGE. */
ETK_API ETK_MUST_USE etk_status etk_paro_permutation(int32_t order, int64_t frames, int64_t height, int64_t width, int64_t text,
                                                     int32_t *perm, int32_t *inverse);

#ifdef __cplusplus
}
#endif
#endif
