/* One task: a query block of one head. Its rows are brought into the worker's slice, its tiles listed, then pages
 * outside and strips inside, so that a page stays in L1 while the strips of the piece pass over it. */
#include <math.h>

#include "attn_plan.h"

void attn_piece_at(const attn_job *j, attn_lane *lane, const attn_seq *s, int64_t b, int64_t h, int64_t r0, int64_t n, attn_piece *out) {
  const int64_t d = j->plan->d_pad;
  *out = lane->own;
  out->seq = s, out->b = b, out->h = h, out->hk = h / j->plan->group, out->r0 = r0, out->n = (int32_t)n;
  if (!j->plan->second) return;
  const int64_t row = s->first_row + h * s->n + r0;
  out->q = j->q_all + row * d, out->start = j->start_all + row, out->gq = j->gq_all + row, out->off = j->off_all + row;
  out->pos = j->qpos_all + row, out->lse2 = j->lse2_all + row;
  if (!j->plan->int8_qk) out->qf = j->qf_all + row * d;
}

static float dot(const float *restrict x, const float *restrict y, int32_t n) {
  float s[8] = {0}, rest = 0.0f;
  int32_t c = 0;
  for (; c + 8 <= n; c += 8)
    for (int i = 0; i < 8; i++) s[i] += x[c + i] * y[c + i];
  for (; c < n; c++) rest += x[c] * y[c];
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])) + rest;
}

/* NaN to 0, infinities to the largest finite magnitude: what quant_q does to codes, on the floats. */
static const float *sane_row(const float *x, int32_t d, float *tmp) {
  float top = 0.0f;
  for (int32_t c = 0; c < d; c++)
    if (isfinite(x[c]) && fabsf(x[c]) > top) top = fabsf(x[c]);
  for (int32_t c = 0; c < d; c++) tmp[c] = isfinite(x[c]) ? x[c] : x[c] != x[c] ? 0.0f : x[c] > 0 ? top : -top;
  return tmp;
}

static void load_float_row(const attn_job *j, const float *x, float *restrict qf, float *tmp, int32_t *bad) {
  const int32_t d = j->desc->d;
  const float tau2 = j->plan->tau2;
  float sum = 0.0f;
  for (int32_t c = 0; c < d; c++) sum += x[c] * 0.0f; /* NaN when any is not finite */
  if (sum != 0.0f) {
    x = sane_row(x, d, tmp);
    *bad = 1;
  }
  for (int32_t c = 0; c < d; c++) qf[c] = x[c] * tau2;
  memset(qf + d, 0, (size_t)(j->plan->d_pad - d) * 4);
}

/* Rows are read once and from far away: ask for them early. */
static void fetch_row(const attn_job *j, const attn_piece *piece, int32_t i) {
  if (i >= piece->n) return;
  const char *x = attn_at(&j->q, piece->b, piece->h, piece->seq->q0 + attn_query_row(j, piece->b, piece->h, piece->r0 + i));
  const int32_t bytes = j->desc->d * (j->q.dtype == ETK_F32 ? 4 : 2);
  for (int32_t at = 0; at < bytes; at += 64) __builtin_prefetch(x + at);
}

void attn_load_piece(attn_job *j, attn_lane *lane, attn_piece *piece) {
  const etk_attn_plan *p = j->plan;
  const attn_seq *s = piece->seq;
  const int32_t d = j->desc->d;
  const float *mu = j->mu_k + (piece->b * j->desc->hkv + piece->hk) * p->d_pad;
  int32_t any_bad = 0;
  piece->pos_min = INT64_MAX, piece->pos_max = INT64_MIN;
  for (int32_t i = 0; i < piece->n; i++) {
    fetch_row(j, piece, i + 8);
    const int64_t row = attn_query_row(j, piece->b, piece->h, piece->r0 + i);
    const float *x = attn_row_f32(&j->q, attn_at(&j->q, piece->b, piece->h, s->q0 + row), d, lane->x);
    int32_t bad = 0;
    if (p->int8_qk) {
      const float sq = j->kernel->quant_q(x, d, p->d_pad, piece->q + (int64_t)i * p->d_pad, piece->start + i, &bad);
      piece->gq[i] = p->tau2 * sq;
      if (j->use_off) piece->off[i] = p->tau2 * dot(bad ? sane_row(x, d, lane->kx) : x, mu, d);
    } else {
      load_float_row(j, x, piece->qf + (int64_t)i * p->d_pad, lane->kx, &bad);
    }
    any_bad |= bad;
    const int64_t pos = j->q_pos.data ? attn_clamp_pos(attn_int(&j->q_pos, piece->b, 0, s->q0 + row)) : row + (s->m - s->n);
    piece->pos[i] = pos;
    if (pos < piece->pos_min) piece->pos_min = pos;
    if (pos > piece->pos_max) piece->pos_max = pos;
  }
  if (any_bad) atomic_store_explicit(&j->nonfinite, 1, memory_order_relaxed);
}

/* Rows [row, row + rows) of masks: 0 nothing visible, 1 everything, 2 some. */
static int strip_mask(const uint64_t *mask, int32_t rows) {
  uint64_t any = 0, all = ~UINT64_C(0);
  for (int32_t i = 0; i < rows; i++) any |= mask[i], all &= mask[i];
  return !any ? 0 : all == ~UINT64_C(0) ? 1 : 2;
}

/* INT8 throughout or f32 throughout, nothing added to the logits: the fused strip. What a strip is told changes from page
 * to page in five fields only. */
static void walk_fused(const attn_job *j, attn_lane *lane, const attn_piece *piece, int64_t ntiles) {
  void (*const strip)(const etk_strip *) = j->plan->int8_qk ? j->kernel->strip_s8 : j->kernel->strip_f32;
  /* All rows at once where the kernel can; tile skipping is decided strip by strip. */
  void (*const all)(const etk_strip *) = j->plan->int8_qk ? j->kernel->block_s8 : j->kernel->block_f32;
  void (*const block)(const etk_strip *) = j->desc->tile_skip_log2 == 0.0f ? all : NULL;
  const int32_t mr = j->kernel->mr, n = piece->n;
  etk_strip page;
  for (int64_t t = 0; t < ntiles; t++) {
    const attn_tile *tile = lane->tiles + t;
    attn_strip_page(j, piece, tile, lane, &page);
    if (t == 0)
      for (int32_t row = 0, i = 0; row < n; row += mr, i++) {
        lane->strips[i] = page;
        attn_strip_rows(j, piece, lane, row, n - row < mr ? n - row : mr, &lane->strips[i]);
      }
    if (!tile->masked && block) {
      attn_strip_rows(j, piece, lane, 0, n, &page);
      page.mask = NULL;
      block(&page);
      continue;
    }
    if (tile->masked) attn_mask_words(j, piece, tile, lane->mask);
    etk_strip *a = lane->strips;
    for (int32_t row = 0; row < n; row += mr, a++) {
      const int seen = tile->masked ? strip_mask(lane->mask + row, a->rows) : 1;
      if (!seen) continue;
      a->k = page.k, a->v = page.v, a->sv = page.sv, a->v_colsum = page.v_colsum;
      a->mask = seen == 2 ? lane->mask + row : NULL;
      strip(a);
    }
  }
}

typedef void (*strip_fn)(const attn_job *j, attn_lane *lane, etk_strip *a, int32_t row);

/* Logits one by one, then `use` on lane->y. */
static void walk_general(const attn_job *j, attn_lane *lane, const attn_piece *piece, int64_t ntiles, strip_fn use) {
  const int32_t mr = j->kernel->mr, n = piece->n;
  etk_strip a;
  for (int64_t t = 0; t < ntiles; t++) {
    const attn_tile *tile = lane->tiles + t;
    attn_strip_page(j, piece, tile, lane, &a);
    attn_mask_words(j, piece, tile, lane->mask);
    attn_tile_extras(j, piece, tile, lane, lane->mask);
    for (int32_t row = 0; row < n; row += mr) {
      const int32_t rows = n - row < mr ? n - row : mr;
      if (!strip_mask(lane->mask + row, rows)) continue;
      attn_strip_rows(j, piece, lane, row, rows, &a);
      attn_logits(j, piece, tile, lane, &a, row, lane->mask + row);
      use(j, lane, &a, row);
    }
  }
}

static void use_attention(const attn_job *j, attn_lane *lane, etk_strip *a, int32_t row) {
  (void)row;
  if (j->plan->int8_pv) {
    j->kernel->softmax_u8(a, lane->y, lane->p, lane->w);
    j->kernel->pv_s8(a, lane->p, lane->w);
  } else {
    j->kernel->softmax_f32(a, lane->y, lane->pf);
    j->kernel->pv_f32(a, lane->pf);
  }
}

/* Normalizers only: an O of one unit that stays zero. */
static void use_stats(const attn_job *j, attn_lane *lane, etk_strip *a, int32_t row) {
  (void)row;
  a->o = lane->zero;
  a->dv_pad = ETK_HEAD_UNIT;
  j->kernel->softmax_f32(a, lane->y, lane->pf);
  a->dv_pad = j->plan->dv_pad;
}

/* Clipped softmax, second pass: p = clip((zeta - gamma) 2^(y - m) / l + gamma, 0, 1), with m and l final. */
static void use_clipped(const attn_job *j, attn_lane *lane, etk_strip *a, int32_t row) {
  const float gamma = j->desc->clip_gamma, span = j->desc->clip_zeta - gamma;
  float m[ETK_MAX_MR], l[ETK_MAX_MR] = {0}, *const o = a->o;
  memcpy(m, lane->m + row, (size_t)a->rows * 4);
  a->m = m, a->l = l;
  use_stats(j, lane, a, row);
  a->o = o;
  for (int32_t i = 0; i < a->rows; i++) {
    float *restrict pf = lane->pf + i * ETK_PAGE, top = 0.0f;
    const float scale = lane->l[row + i] > 0.0f ? span / lane->l[row + i] : 0.0f;
    for (int c = 0; c < ETK_PAGE; c++) {
      const float x = pf[c] * scale + gamma;
      pf[c] = x > 1.0f ? 1.0f : x > 0.0f ? x : 0.0f;
      top = pf[c] > top ? pf[c] : top;
    }
    if (!j->plan->int8_pv) continue;
    const float to_code = top > 0.0f ? (float)j->kernel->p_max / top : 0.0f;
    const uint8_t *order = j->kernel->p_order;
    for (int c = 0; c < ETK_PAGE; c++) lane->p[i * ETK_PAGE + c] = (uint8_t)lrintf(pf[order ? order[c] : c] * to_code);
    lane->w[i] = top / (float)j->kernel->p_max;
  }
  if (j->plan->int8_pv) j->kernel->pv_s8(a, lane->p, lane->w);
  else j->kernel->pv_f32(a, lane->pf);
}

static void reset(const attn_job *j, attn_lane *lane, int32_t n) {
  for (int32_t i = 0; i < n; i++) lane->m[i] = -INFINITY, lane->l[i] = 0.0f;
  memset(lane->o, 0, (size_t)n * (size_t)j->plan->dv_pad * 4);
}

static int64_t list(const attn_job *j, attn_lane *lane, const attn_piece *piece, int64_t block) {
  return attn_list_tiles(j, piece->seq, piece->b, piece->h, block, piece->pos_min, piece->pos_max, 0, piece->seq->pages, lane->tiles);
}

static void run_piece(attn_job *j, attn_lane *lane, attn_piece *piece, int64_t block) {
  attn_load_piece(j, lane, piece);
  const int64_t ntiles = list(j, lane, piece, block);
  reset(j, lane, piece->n);
  float unit = j->plan->int8_pv ? (float)j->kernel->p_max : 1.0f; /* of l */
  if (j->clip) {
    memset(lane->zero, 0, sizeof *lane->zero * ETK_MAX_MR * ETK_HEAD_UNIT);
    walk_general(j, lane, piece, ntiles, use_stats);
    unit = 1.0f;
    attn_add_sink(j, piece, unit, lane->m, lane->l, NULL);
    walk_general(j, lane, piece, ntiles, use_clipped);
  } else if (j->general || j->desc->compute == ETK_C_S8F) {
    walk_general(j, lane, piece, ntiles, use_attention);
  } else {
    walk_fused(j, lane, piece, ntiles);
  }
  attn_finish(j, lane, piece, unit);
}

static void stats_piece(attn_job *j, attn_lane *lane, attn_piece *piece, int64_t block) {
  attn_load_piece(j, lane, piece);
  const int64_t ntiles = list(j, lane, piece, block);
  reset(j, lane, piece->n);
  memset(lane->zero, 0, sizeof *lane->zero * ETK_MAX_MR * ETK_HEAD_UNIT);
  walk_general(j, lane, piece, ntiles, use_stats);
  for (int32_t i = 0; i < piece->n; i++) piece->lse2[i] = lane->l[i] > 0.0f ? lane->m[i] + log2f(lane->l[i]) : -INFINITY;
}

static void each_piece(attn_job *j, int64_t task, int worker, void (*run)(attn_job *, attn_lane *, attn_piece *, int64_t)) {
  attn_lane lane = attn_lane_at(j, worker);
  int64_t b, h, block, r0, r1;
  const attn_seq *s = attn_find_task(j, task, &b, &h, &block);
  attn_block_rows(j, b, h, block, &r0, &r1);
  for (int64_t r = r0; r < r1; r += ATTN_ROWS) {
    attn_piece piece;
    attn_piece_at(j, &lane, s, b, h, r, r1 - r < ATTN_ROWS ? r1 - r : ATTN_ROWS, &piece);
    piece.block_row = (int32_t)(r - r0);
    run(j, &lane, &piece, block);
  }
}

void attn_task(void *job, int64_t task, int worker) { each_piece(job, task, worker, run_piece); }
void attn_stats_task(void *job, int64_t task, int worker) { each_piece(job, task, worker, stats_piece); }
