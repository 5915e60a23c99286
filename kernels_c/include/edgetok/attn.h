/* Attention: dense and block-sparse, float and INT8, prefill and decode.
 *
 *   O[i,:] = sum_j p[i,j] V[j,:],  p = softmax_j(scale * Q[i]. K[j] + bias[j]),  over the keys that row i may see.
 *
 * Logical shapes: Q [B, Hq, N, d], K [B, Hkv, M, d], V [B, Hkv, M, dv], O [B, Hq, N, dv], any stride order with a dense
 * last axis. Packed variable length: rank 3 [total, H, d] with cu_q and cu_k. Query head h reads KV head h / (Hq/Hkv).
 * Causal is bottom-right: key j is visible when k_pos[j] <= q_pos[i], by default q_pos[i] = i + (M - N), k_pos[j] = j.
 *
 * Plan once, run many times: a plan is immutable and shareable between threads, a workspace is not. */
#ifndef EDGETOK_ATTN_H
#define EDGETOK_ATTN_H

#include "edgetok/base.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { ETK_PHASE_AUTO = 0, ETK_PHASE_PREFILL = 1, ETK_PHASE_DECODE = 2 };

enum { /* compute */
  ETK_C_F32 = 0,  /* float throughout */
  ETK_C_BF16 = 1, /* refused on CPU */
  ETK_C_S8S8 = 2, /* INT8 QK^T, table softmax, INT8 PV */
  ETK_C_S8F = 3,  /* INT8 QK^T, float softmax and PV */
  ETK_C_S4S8 = 4, /* CUDA only */
};

enum { ETK_KV_DENSE = 0, ETK_KV_PAGED = 1 }; /* kv_layout: tensors k, v, or an etk_kv_cache */

enum { /* mask_kind; ETK_MASK_CAUSAL may be or-ed onto WINDOW and BSR */
  ETK_MASK_NONE = 0, ETK_MASK_CAUSAL = 1,
  ETK_MASK_WINDOW = 2, /* k_pos in [q_pos - win_left, q_pos + win_right], or k_pos < sink */
  ETK_MASK_BSR = 4,    /* the blocks of io.bsr */
  ETK_MASK_GATHER = 8, /* the keys named by io.gather */
};

enum { ETK_SOFTMAX_DEFAULT = 0, ETK_SOFTMAX_EXACT = 1, ETK_SOFTMAX_POLY = 2, ETK_SOFTMAX_LUT256 = 3, ETK_SOFTMAX_LUT128 = 4 };

enum { /* flags; an unknown bit is ETK_E_RANGE */
  ETK_F_RETURN_LSE = 1u << 0, ETK_F_RETURN_COLMASS = 1u << 1, ETK_F_RETURN_SCORES = 1u << 2,
  ETK_F_DETERMINISTIC = 1u << 3, ETK_F_CHECK_FINITE = 1u << 4, ETK_F_VALIDATE_INDEX = 1u << 5,
  ETK_F_NO_SMOOTH_K = 1u << 6, /* K smoothing (subtract the mean of all keys) is on for INT8 unless this is set */
  ETK_F_SMOOTH_V = 1u << 7, ETK_F_ROT_K = 1u << 8, ETK_F_EMPTY_ROWS_NAN = 1u << 9,
  ETK_F_COLMASS_PER_KV_HEAD = 1u << 10,
};

typedef struct etk_attn_desc {
  uint32_t struct_size, version; /* version 0 */
  int32_t batch, hq, hkv, d, dv; /* 1 <= d, dv <= 1024; hq % hkv == 0 */
  int64_t max_n, max_m;          /* upper bounds of N and M in any run of the plan */
  int32_t phase, compute, kv_layout, mask_kind;
  float scale;                   /* 0 = 1/sqrt(d) */
  float softcap;                 /* 0 = off: s = c tanh(s / c) */
  float clip_gamma, clip_zeta;   /* both 0 = off: p = clip((zeta - gamma) p + gamma, 0, 1), two passes */
  int64_t win_left, win_right, sink;
  int32_t softmax_mode;
  uint32_t flags;
  float tile_skip_log2;          /* 0 = off: skip PV of a tile whose row maxima all lie this far below the running ones */
  int32_t isa_cap;               /* ETK_ISA_*; 0 = best */
} etk_attn_desc;

/* CSR over 64 x 64 blocks (bq = bk = 64), or over variable blocks (bq = bk = 0) with boundaries in q_block_ptr and
 * k_block_ptr. Row r of a pattern is query block r; a (batch, head) starts at row b * stride_b + h * stride_h, or, with
 * head_pattern, at row head_pattern[h] * nqb (-2: that head is dense). */
typedef struct etk_bsr {
  int32_t bq, bk;
  int64_t nqb, nkb;            /* blocks a pattern has; 64-blocks: ceil(N/64), ceil(M/64) */
  const int64_t *row_ptr;      /* [rows + 1] */
  int64_t rows;                /* patterns x nqb */
  const int32_t *col;          /* [nnz], ascending and unique within a row */
  int64_t nnz;
  const uint8_t *kind;         /* [nnz] 0 full, 1 partial; NULL = check every tile against mask_kind */
  const uint64_t *bits;        /* [nbits][64]: bit j of word i = key j visible to row i of the tile; or NULL */
  int64_t nbits;
  const int32_t *bits_idx;     /* [nnz], -1 = none; NULL = none anywhere */
  const int32_t *q_block_ptr;  /* [patterns or 1][nqb + 1] row boundaries, variable blocks only */
  const int32_t *k_block_ptr;  /* [patterns or 1][nkb + 1] */
  int64_t var_stride_q, var_stride_k; /* elements between patterns in the two arrays; 0 = shared */
  int64_t stride_b, stride_h;  /* in rows; 0 = shared */
  const int32_t *head_pattern; /* [hq] or NULL */
} etk_bsr;

struct etk_kv_cache;

/* Positions, biases, gates and every output go by rows of the tensors, whatever q_perm, k_perm or gather do to the order
 * in which they are walked. With packed sequences the batch axis is gone and tokens come first: q, k, v, o [total, H, d],
 * lse [total, Hq], colmass [total, H], gate [total, Hq, 1 or dv], key_bias [total, Hq or 1], q_pos, k_pos [total]; seq_k,
 * permutations, BSR, GATHER and scores are then ETK_E_UNSUPPORTED. An output tensor may not be given without its flag
 * (lse excepted). Lengths, permutations and block indices are checked by every run. */
typedef struct etk_attn_io {
  uint32_t struct_size, reserved;
  etk_tensor q, k, v, o;       /* f32 (q, k, v also f16) */
  const struct etk_kv_cache *kv; /* kv_layout PAGED: instead of k and v */
  int32_t kv_layer, kv_seq;    /* layer of the cache; sequence of batch row 0, the others follow it */
  etk_bsr bsr;
  etk_tensor gather;           /* i32 [B, Hkv or 1, n_sel] key indices, -1 = padding; PAGED: page numbers of the sequence */
  etk_tensor cu_q, cu_k;       /* i32 or i64 [B + 1], packed variable length */
  etk_tensor seq_k;            /* i32 [B]: keys that count, of M */
  etk_tensor key_bias;         /* f32 [B or 1, Hq or 1, M], natural log; -inf hides a key */
  etk_tensor alibi_slope;      /* f32 [Hq]: bias slope * (k_pos - q_pos) */
  etk_tensor q_pos, k_pos;     /* i32 or i64 [B or 1, N], [B or 1, Hkv or 1, M] */
  etk_tensor q_perm, k_perm;   /* i32 [B or 1, H or 1, N or M] row orders: row r of the problem is row perm[r] of the tensor */
  etk_tensor o_perm;           /* i32, as q_perm: row r of the problem is written to row o_perm[r]; absent = q_perm's order */
  etk_tensor sink_logit;       /* f32 [Hq]: one more logit per row, with value zero; part of lse */
  etk_tensor gate;             /* f32 [B, Hq, N, 1 or dv]: multiplies O */
  etk_tensor k_mean;           /* f32 [B or 1, Hkv, d]: the smoothing vector; absent = mean of all keys */
  etk_tensor lse;              /* f32 [B, Hq, N], natural log, true keys (smoothing undone); -inf for empty rows */
  etk_tensor colmass;          /* f32 [B, Hq or Hkv, M]: sum over rows of p */
  etk_tensor scores;           /* f32 [B, Hq, score_rows, M]: logits of the last score_rows rows, -inf where masked */
  int64_t score_rows;
} etk_attn_io;

typedef struct etk_attn_plan etk_attn_plan;

/* Check the descriptor (and, when io is not NULL, the shapes of its tensors) and choose kernels. Allocates the plan.
 * nthreads: the most workers a run may use, 1..256. */
ETK_API ETK_MUST_USE etk_status etk_attn_plan_create(const etk_attn_desc *desc, const etk_attn_io *shape_only, int32_t nthreads,
                                                     etk_attn_plan **out);
ETK_API void etk_attn_plan_free(etk_attn_plan *plan);
ETK_API ETK_MUST_USE etk_status etk_attn_workspace(const etk_attn_plan *plan, uint64_t *bytes, uint64_t *align);
/* Run. ws: at least the bytes and alignment asked for; touched and owned by this call until it returns. */
ETK_API ETK_MUST_USE etk_status etk_attn_run(const etk_attn_plan *plan, const etk_attn_io *io, void *ws, uint64_t ws_bytes,
                                             const etk_pool *pool);
/* The name of the kernel the plan chose, as "attn_s8_avx512vbmi_6x64". Static storage. */
ETK_API const char *etk_attn_plan_kernel(const etk_attn_plan *plan);
/* Every check that run makes, and the content of indices as well. Touches nothing. */
ETK_API ETK_MUST_USE etk_status etk_attn_validate(const etk_attn_desc *desc, const etk_attn_io *io);

/* Merge n partial results over disjoint keys: lse = logsumexp(lse_i), O = sum exp(lse_i - lse) O_i. o, o_out f32
 * [B, H, N, dv], lse f32 [B, H, N]. Outputs may be one of the inputs. */
ETK_API ETK_MUST_USE etk_status etk_attn_merge(int32_t n, const etk_tensor *o, const etk_tensor *lse, etk_tensor *o_out,
                                               etk_tensor *lse_out);

/* Choose keys by score only: mean of the queries of the chunk, logits against every key, softmax per head, sum over
 * heads of a KV group (or over all heads), optional max-pool along keys, top k; ties go to the lower index. */
typedef struct etk_select_desc {
  uint32_t struct_size;
  int32_t k;          /* tokens to select */
  int32_t pool_width; /* odd; 0 or 1 = off */
  int32_t n_init, n_local; /* always selected */
  int32_t sum_heads;  /* 0: one list per KV head, 1: one list for all */
  int32_t softmax;    /* 1: softmax per head before summing; 0: raw logits */
  int32_t round_pages;/* 1: idx_out holds page numbers (64 keys), k rounded up to whole pages */
} etk_select_desc;

/* Reads io.q (its mean over N) and the keys: io.k of a DENSE plan (io.seq_k counts), every live slot of the cache of a PAGED one.
 * Masks of the plan play no part. n_init first and n_local last keys are taken beside the k best; with round_pages the pages
 * of the best keys are taken until there are ceil(k / 64) of them, and those of n_init and n_local beside them. Equal scores: lower index.
 * idx_out: i32 [B, Hkv or 1 (sum_heads), capacity], ascending, padded with -1; ETK_E_SHAPE when capacity is under what can be
 * selected: min(k + n_init + n_local, keys), pages counted whole. ws: etk_attn_select_workspace bytes, aligned to 64. Otherwise as
 * etk_attn_run. */
ETK_API ETK_MUST_USE etk_status etk_attn_select_workspace(const etk_attn_plan *plan, uint64_t *bytes, uint64_t *align);
ETK_API ETK_MUST_USE etk_status etk_attn_select(const etk_attn_plan *plan, const etk_attn_io *io, const etk_select_desc *select,
                                                etk_tensor *idx_out, void *ws, uint64_t ws_bytes, const etk_pool *pool);

/* Column masses with weights: mass[k, j] = sum_i row_weight[i] mean_{h in group} softmax((s[i, :] + noise) / temperature)[j].
 * row_weight f32 [N] (absent = 1), temperature 0 = 1; seed 0 = no Gumbel noise, else noise from a counter-based
 * generator keyed by (seed, layer, query head, query position, key position). out f32 [B, Hkv, M]. The plan must have
 * ETK_F_RETURN_COLMASS (its workspace then keeps the rows), else ETK_E_RANGE; io's v and outputs are not read. */
typedef struct etk_colmass_desc {
  uint32_t struct_size;
  float temperature;
  uint64_t seed;
  int32_t layer;
  int32_t sum_group; /* 1: sum over the group's heads instead of the mean */
} etk_colmass_desc;
ETK_API ETK_MUST_USE etk_status etk_attn_colmass(const etk_attn_plan *plan, const etk_attn_io *io, const etk_colmass_desc *colmass,
                                                 const etk_tensor *row_weight, etk_tensor *out, void *ws, uint64_t ws_bytes,
                                                 const etk_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
