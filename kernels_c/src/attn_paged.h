/* Attention over a paged KV cache: what its files share. Internal.
 *
 * A unit is a run of query rows (i, head of the group) of one KV head that have the same own page, at most 64 rows (or one
 * i of a wide group). Its pages are cut every 16 into chunks. One chunk gives a partial (m, l, O); partials are merged in
 * ascending order, the f16 page last. Which worker does which chunk changes nothing, nor do the other rows of a unit. */
#ifndef ETK_ATTN_PAGED_H
#define ETK_ATTN_PAGED_H

#include "edgetok/attn.h"
#include "kv_cache.h"

enum { PAGED_SPLIT = 16 /* pages of a chunk */, PAGED_ROWS = 64 };

typedef struct paged_unit {
  int32_t b, h;        /* batch row, KV head */
  int32_t i0, n;       /* query rows i0 .. i0 + n - 1 */
  int32_t own;         /* last page the rows see; -1 = none */
  int32_t own_in_tail; /* that page is read from its f16 copy */
  int32_t chunks;      /* of quantized pages; the f16 page is one more when own_in_tail */
  int32_t first_chunk; /* number of the unit's first chunk in the whole run */
} paged_unit;

/* State of a worker; every pointer is into its slice of the workspace. R = most rows of a unit. */
typedef struct paged_lane {
  const paged_unit *loaded; /* whose rows are in q.. */
  float *q;                 /* [R][d_pad] as given (rotated where the cache is) */
  float *qf;                /* [R][d_pad] unrotated, times scale * LOG2E */
  int8_t *codes;            /* [R][d_pad] */
  int32_t *start;           /* [R] */
  float *gq;                /* [R] (scale * LOG2E) * sq */
  float *off;               /* [R] q . mu_k in log2 units */
  int64_t *pos;             /* [R] position of the row */
  int8_t *fold;             /* [R][d_pad] codes of one INT4 page */
  int32_t *fold_start;      /* [R] */
  float *g, *y0;            /* [R] per page: log2 units per step; offset of the page */
  uint64_t *mask;           /* [R] */
  uint64_t *masks;          /* [16][R] of the pages of a chunk */
  float *m, *l, *o;         /* [R], [R], [R][dv_pad]: the chunk */
  float *am, *al, *ao;      /* the same: the unit, when one task does it whole */
  float *sv;                /* [dv_pad] */
  int32_t *colsum;          /* [dv_pad] zeros, for kernels that want it with float V */
  uint8_t *page;            /* expanded INT4 codes: K, V */
  float *kf, *vf;           /* float page: K [d_pad][64], V [64][dv_pad] */
  float *y, *w;             /* [mr][64], [mr] */
  int32_t *s;               /* [mr][64] */
  uint8_t *p;               /* [mr][64] */
  kv_scratch scratch;       /* for pages read as floats */
} paged_lane;

typedef struct paged_run {
  const etk_attn_desc *desc;
  const etk_attn_io *io;
  const etk_attn_kernel *kernel;
  const etk_kv_cache *cache;
  kv_geometry geometry;
  int32_t group, d_pad, dv_pad, rows_max;
  void (*whole)(const etk_kv_chunk *); /* the kernel that takes a chunk at once, or NULL */
  int32_t general;   /* bias, soft-cap, ALiBi or per-token scales: logits are formed one by one */
  float tau2;        /* scale * LOG2E */
  float inv_p;       /* 1 / p_max */
  int64_t n, n_sel;
  paged_unit *units;
  int64_t n_units, n_chunks;
  float *partials;   /* [n_chunks] of partial_floats, when chunks are tasks of their own */
  uint64_t partial_floats;
  float *lse2;       /* [B][Hq][N] log2 units; only with scores or colmass */
  uint8_t *lanes;
  uint64_t lane_bytes;
  int32_t workers, split;
  int64_t n_tasks;
  int32_t note;
} paged_run;

paged_lane paged_lane_at(const paged_run *r, int worker);
uint64_t paged_lane_bytes(const paged_run *r);

static inline int32_t paged_seq(const paged_run *r, int32_t b) { return r->io->kv_seq + b; }
static inline int64_t paged_row(const paged_run *r, int32_t b, int32_t h) {
  return kv_row(r->cache, r->io->kv_layer, paged_seq(r, b), kv_table_of(r->cache, h));
}

/* Position of query row i. */
int64_t paged_row_pos(const etk_attn_io *io, int32_t b, int64_t i, int64_t next, int64_t n);
/* The last page that row i of a call sees; -1 = none. row: of the cache's tables. */
int64_t paged_own_page(const etk_attn_desc *d, const etk_attn_io *io, int32_t b, int64_t row, int64_t i, int64_t n);
/* Everything of a run but its units; io must have been checked. lanes are taken at ws. */
paged_run paged_begin(const etk_attn_desc *desc, const etk_attn_kernel *kernel, int32_t nthreads, const etk_attn_io *io, void *ws);

/* Bring the unit's query rows into the lane. */
void paged_load(const paged_run *r, paged_lane *a, const paged_unit *u);
/* One chunk into a->m, l, o (natural units of p, log2 maxima with the smoothing put back). Returns 0 when no row saw a key. */
int paged_chunk(const paged_run *r, paged_lane *a, const paged_unit *u, int32_t chunk);
/* Logits in log2 units of strip rows [r0, r0 + rows) against a page into a->y [rows][64], -inf where masked. */
void paged_logits(const paged_run *r, paged_lane *a, const paged_unit *u, int64_t page, int32_t r0, int32_t rows);
/* Set a->mask for the page; 1 = every row sees all 64 slots, 0 = masks matter, -1 = no row sees any. */
int paged_mask(const paged_run *r, const paged_lane *a, const paged_unit *u, int64_t page);
/* The i-th page of the unit's list, or -1. */
int64_t paged_page(const paged_run *r, const paged_unit *u, int64_t i);
/* Fold (m, l, o) of rows into (am, al, ao). */
void paged_merge(const paged_run *r, int32_t rows, const float *m, const float *l, const float *o, float *am, float *al, float *ao);
/* Second pass: scores and column masses, once lse2 is known. */
etk_status paged_outputs(const paged_run *r, const etk_pool *pool);

#endif
