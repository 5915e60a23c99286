/* What the files of the attention driver share. Internal.
 *
 * A run goes: check (attn_check*.c) -> sequences and workspace (attn_plan.c, attn_run.c) -> pages of K and V packed once
 * per (batch, KV head) (attn_pack.c) -> one task per (batch, head, query block): tiles listed (attn_mask.c), pages
 * outside and strips inside (attn_task.c), rows finished (attn_finish.c) -> optional second walk by columns for scores
 * and masses (attn_outputs.c). A task writes only rows or columns of its own, so the thread count changes nothing.
 *
 * Words: a *slot* is a place in the problem's key order (k_perm, gather; else the tensor row itself); page p holds slots
 * 64 p .. 64 p + 63. Positions, biases, masses and scores belong to tensor rows. Variable key blocks are not padded: they
 * lie end to end in the pages, and a page that holds the end of one and the start of the next is visited once, with the
 * slots of unlisted blocks masked. A variable query block is one task, cut into pieces of 64 rows. */
#ifndef ETK_ATTN_PLAN_H
#define ETK_ATTN_PLAN_H

#include <stdatomic.h>
#include <string.h>

#include "attn_kernel.h"
#include "edgetok/attn.h"

enum { ATTN_ROWS = 64 /* rows of a piece */, ATTN_MAX_D = 1024 };
#define ATTN_LOG2E 1.44269504088896341f
#define ATTN_LN2 0.69314718055994531f
#define ATTN_POS_LIMIT ((int64_t)1 << 60) /* positions and windows are clamped to it, so that sums cannot wrap */

/* Where the pieces of the workspace start. */
typedef struct attn_layout {
  uint64_t seqs, kpages, vpages, kscale, sv, colsum, valid, kpos, page_pos, needed, mu_k, mu_v;
  uint64_t q, qf, start, gq, off, qpos, lse2; /* of every row of the run; only with scores or masses */
  uint64_t lanes, lane_bytes, bytes;
} attn_layout;

struct etk_attn_plan {
  etk_attn_desc desc;
  const etk_attn_kernel *kernel;
  int32_t nthreads, group, d_pad, dv_pad;
  int32_t int8_qk, int8_pv;
  int32_t second;      /* scores or masses: rows stay in the workspace for the walk by columns */
  float scale, tau2;   /* softmax scale; times log2 e */
  int64_t max_pages;   /* of one sequence */
  int64_t pages, rows; /* over all sequences and heads */
  uint64_t kbytes, vbytes;
  attn_layout at;
};

/* A tensor by (sequence, head, row); a stride is 0 on a broadcast axis. data NULL = absent. */
typedef struct attn_view {
  uint8_t *data;
  int64_t b, h, r;
  int32_t dtype;
  int64_t cols;
} attn_view;

static inline void *attn_at(const attn_view *v, int64_t b, int64_t h, int64_t r) {
  return v->data + b * v->b + h * v->h + r * v->r;
}
static inline float attn_f32(const attn_view *v, int64_t b, int64_t h, int64_t r) {
  return *(const float *)attn_at(v, b, h, r);
}
static inline int64_t attn_int(const attn_view *v, int64_t b, int64_t h, int64_t r) {
  const void *p = attn_at(v, b, h, r);
  return v->dtype == ETK_I32 ? *(const int32_t *)p : *(const int64_t *)p;
}
static inline int64_t attn_clamp_pos(int64_t x) {
  return x > ATTN_POS_LIMIT ? ATTN_POS_LIMIT : x < -ATTN_POS_LIMIT ? -ATTN_POS_LIMIT : x;
}

typedef struct attn_seq {
  int64_t q0, k0;     /* first row of the sequence in packed tensors, else 0 */
  int64_t n, m;       /* queries, keys that count */
  int64_t slots, pages;
  int64_t first_page; /* of KV head 0 in the workspace */
  int64_t first_row;  /* of query head 0 */
  int64_t blocks, first_task;
} attn_seq;

/* One listed tile of a query block. */
typedef struct attn_tile {
  int32_t page;
  int32_t bits;    /* index into bsr.bits, or -1 */
  int32_t partial; /* positions hide some pair */
  int32_t masked;  /* any of: partial, bits, keep not all ones */
  uint64_t keep;   /* slots that exist and are listed, whatever the row */
} attn_tile;

typedef struct attn_job {
  const etk_attn_plan *plan;
  const etk_attn_desc *desc;
  const etk_attn_kernel *kernel;
  etk_attn_io io; /* complete copy of the caller's */
  attn_view q, k, v, o, lse, gate, bias, colmass, scores, q_pos, k_pos, q_perm, k_perm, o_perm, gather, k_mean, cu_q, cu_k;
  int64_t n, m;        /* of the tensors; packed: totals */
  int32_t packed;
  int32_t explicit_k;  /* slot positions are in the workspace */
  int32_t general;     /* soft-cap, bias or ALiBi: logits are formed one by one, with the smoothing put back */
  int32_t clip, smooth_k, smooth_v, use_off;
  int32_t positional;  /* causal or window */
  int64_t win_left, win_right, sink;
  int64_t npages, ntasks;
  int32_t reverse;     /* later query blocks first: they are the longer ones under causality */
  int32_t sparse_pack; /* the needed map is in use */
  const struct attn_weights *weights; /* weighted column masses: no PV, no O */
  /* workspace */
  attn_seq *seqs;
  uint8_t *kpages, *vpages, *needed, *lanes;
  float *kscale, *sv, *mu_k, *mu_v;
  int32_t *colsum;
  uint64_t *valid;
  int64_t *kpos, *page_pos;
  /* of every row, when plan->second */
  int8_t *q_all;
  float *qf_all, *gq_all, *off_all, *lse2_all;
  int32_t *start_all;
  int64_t *qpos_all;
  _Atomic int32_t nonfinite, empty;
} attn_job;

/* Up to 64 query rows of one head and what is known of them. Arrays lie in a lane or in the arrays of every row. */
typedef struct attn_piece {
  const attn_seq *seq;
  int64_t b, h, hk;
  int64_t r0;           /* first row, in problem order */
  int32_t n;
  int32_t block_row;    /* r0 less the first row of its query block */
  int64_t pos_min, pos_max;
  int8_t *q;            /* [n][d_pad] */
  float *qf;            /* [n][d_pad] times tau2 (float QK) */
  int32_t *start;
  float *gq;            /* tau2 sq */
  float *off;           /* q . mu_k in log2 units (use_off) */
  int64_t *pos;
  float *lse2;          /* log2 of the normalizer, in the units of y; only plan->second */
} attn_piece;

/* A worker's slice of the workspace. */
typedef struct attn_lane {
  attn_piece own;       /* pointers to its row arrays */
  float *m, *l, *o;     /* [64], [64], [64][dv_pad] */
  float *g;             /* [64] */
  uint64_t *mask;       /* [64] */
  float *y, *pf;        /* [16][64] */
  int32_t *s;           /* [16][64] */
  uint8_t *p;           /* [16][64] */
  float *w;             /* [16] */
  float *kb, *acc;      /* [64] key bias in log2 units; column sums */
  float *zero;          /* [16][16] an O that nobody reads */
  float *x, *kx, *vx;   /* [1][d_pad], [64][d_pad], [64][dv_pad] rows as f32 */
  attn_tile *tiles;     /* [max_pages] */
  etk_strip *strips;    /* [64] those of the piece, with what does not change from page to page */
} attn_lane;

attn_lane attn_lane_at(const attn_job *job, int worker);
uint64_t attn_lane_bytes(const etk_attn_plan *plan);

/* attn_check.c. Whole descriptor; *out is complete and normalised. */
etk_status attn_check_desc(const etk_attn_desc *desc, etk_attn_desc *out);
/* Shapes, strides, dtypes, capacities and aliases of io against the descriptor; job->io and the views are filled. With
 * content: indices and lengths as well (their memory is read). Nothing is written but *job. */
etk_status attn_check_io(const etk_attn_desc *desc, const etk_attn_io *io, int content, attn_job *job);
/* attn_check_index.c: the part of the above that reads memory. */
etk_status attn_check_content(const etk_attn_desc *desc, const attn_job *job);

/* attn_plan.c */
void attn_plan_init(etk_attn_plan *plan);
etk_status attn_job_begin(attn_job *job, const etk_attn_plan *plan, const etk_attn_io *io, void *ws, uint64_t ws_bytes);

/* attn_pack.c */
etk_status attn_pack(attn_job *job, const etk_pool *pool);
etk_status attn_check_finite(attn_job *job, const etk_pool *pool);
/* One row as f32: x itself, or tmp holding the f16 row widened. */
const float *attn_row_f32(const attn_view *v, const void *row, int32_t d, float *tmp);

/* attn_mask.c */
const attn_seq *attn_find_task(const attn_job *job, int64_t task, int64_t *b, int64_t *h, int64_t *block);
void attn_block_rows(const attn_job *job, int64_t b, int64_t h, int64_t block, int64_t *r0, int64_t *r1);
/* Tiles of a query block with pages in [page0, page1) that any of the rows at positions [pos_min, pos_max] may see. */
int64_t attn_list_tiles(const attn_job *job, const attn_seq *seq, int64_t b, int64_t h, int64_t block, int64_t pos_min,
                        int64_t pos_max, int64_t page0, int64_t page1, attn_tile *out);
/* Visible slots of each row of the piece. */
void attn_mask_words(const attn_job *job, const attn_piece *piece, const attn_tile *tile, uint64_t *mask);
const int32_t *attn_slots(const attn_job *job, int64_t b, int64_t hk); /* slot -> row, or NULL for identity */
int64_t attn_query_row(const attn_job *job, int64_t b, int64_t h, int64_t r);
int64_t attn_output_row(const attn_job *job, int64_t b, int64_t h, int64_t r);
static inline int64_t attn_gp(const attn_piece *p, int64_t page) { return p->seq->first_page + p->hk * p->seq->pages + page; }

/* attn_task.c */
void attn_piece_at(const attn_job *job, attn_lane *lane, const attn_seq *seq, int64_t b, int64_t h, int64_t r0, int64_t n, attn_piece *out);
void attn_load_piece(attn_job *job, attn_lane *lane, attn_piece *piece);
void attn_task(void *job, int64_t task, int worker);
void attn_stats_task(void *job, int64_t task, int worker); /* normalizers only, into lse2 */

/* attn_logits.c */
/* Point a strip at a page of K and V. */
void attn_strip_page(const attn_job *job, const attn_piece *piece, const attn_tile *tile, attn_lane *lane, etk_strip *a);
void attn_strip_rows(const attn_job *job, const attn_piece *piece, attn_lane *lane, int32_t row, int32_t rows, etk_strip *a);
/* What the general path adds per key; call once per tile, before attn_logits. Clears mask bits of keys hidden by bias. */
void attn_tile_extras(const attn_job *job, const attn_piece *piece, const attn_tile *tile, attn_lane *lane, uint64_t *mask);
/* Logits in log2 units of the strip's rows into lane->y, -inf where mask (rows of the strip; NULL = none) says. */
void attn_logits(const attn_job *job, const attn_piece *piece, const attn_tile *tile, attn_lane *lane, const etk_strip *a,
                 int32_t row, const uint64_t *mask);
/* p = 2^(y - lse2), 0 where y is -inf; 64 values. */
void attn_exp2_row(const float *y, float lse2, float *p);
/* y[n] = cap tanh(y / cap), within 3e-7 cap. */
void attn_softcap(float *y, int32_t n, float cap);

/* attn_finish.c */
void attn_finish(attn_job *job, attn_lane *lane, const attn_piece *piece, float unit);
/* Fold the sink logit of the head into (m, l), l in units of `unit`. */
void attn_add_sink(const attn_job *job, const attn_piece *piece, float unit, float *m, float *l, float *share);

/* attn_outputs.c. Scores and column masses, once every row's normalizer is known. */
etk_status attn_outputs(attn_job *job, const etk_pool *pool);

/* attn_colmass.c */
typedef struct attn_weights {
  attn_view weight;   /* [N], or absent */
  attn_view out;      /* [B, Hkv, M] */
  float cold;         /* 1 / temperature */
  float share;        /* of a head in its group: 1 / G, or 1 for sums */
  uint64_t seed;
  int32_t layer;
} attn_weights;
/* y = (y + Gumbel noise) / temperature, in log2 units. */
void attn_noise(const attn_job *job, const attn_piece *piece, const attn_tile *tile, int32_t row, int32_t rows, float *y);

/* attn_paged_hook.c: kv_layout PAGED. */
etk_status etk_attn_paged_workspace(const etk_attn_plan *plan, uint64_t *bytes);
etk_status etk_attn_check_paged(const etk_attn_plan *plan, const etk_attn_io *io);
etk_status etk_attn_run_paged(const etk_attn_plan *plan, const etk_attn_io *io, void *ws, uint64_t ws_bytes, const etk_pool *pool);
etk_status etk_attn_colmass_paged(const etk_attn_plan *plan, const etk_attn_io *io, const etk_colmass_desc *colmass,
                                  const etk_tensor *row_weight, etk_tensor *out, void *ws, uint64_t ws_bytes, const etk_pool *pool);

#endif
