/* The walk by columns: raw scores and column masses, after every row's normalizer is known.
 *
 *   scores[i,j] = ln2 y (with the smoothing put back);   colmass[j] = sum_i p[i,j], p = 2^(y - lse2), clipped where asked
 *
 * A task owns the columns of one page, for all heads of a group, and walks the rows in ascending order: no column is
 * shared, no sum depends on the threads. With gathered keys, which may repeat, a task owns all pages of a KV head. */
#include <math.h>

#include "attn_plan.h"
#include "parallel.h"
#include "tensor.h"

/* Columns that no slot holds. */
static void clear_task(void *arg, int64_t task, int worker) {
  (void)worker;
  attn_job *j = arg;
  const attn_view *mass = j->weights ? &j->weights->out : &j->colmass;
  const int64_t b = task / j->desc->hq, h = task % j->desc->hq;
  const int64_t heads = j->weights || (j->desc->flags & ETK_F_COLMASS_PER_KV_HEAD) ? j->desc->hkv : j->desc->hq;
  const attn_seq *s = &j->seqs[b];
  if (mass->data && h < heads)
    for (int64_t i = 0; i < (j->packed ? s->m : j->m); i++) *(float *)attn_at(mass, b, h, s->k0 + i) = 0.0f;
  for (int64_t r = 0; j->scores.data && r < j->io.score_rows; r++) {
    float *out = attn_at(&j->scores, b, h, r);
    for (int64_t i = 0; i < j->m; i++) out[i] = -INFINITY;
  }
}

/* Scores row of a query row, or -1. */
static int64_t score_row(const attn_job *j, const attn_piece *piece, int32_t i) {
  if (!j->scores.data) return -1;
  const int64_t row = attn_output_row(j, piece->b, piece->h, piece->r0 + i), first = piece->seq->n - j->io.score_rows;
  return row < first ? -1 : row - first;
}

static int64_t slot_row(const int32_t *slots, int64_t page, int c) {
  const int64_t slot = page * ETK_PAGE + c;
  return slots ? slots[slot] : slot;
}

static void put_scores(attn_job *j, const attn_piece *piece, const attn_tile *t, const float *y, int32_t i) {
  const int64_t row = score_row(j, piece, i);
  if (row < 0) return;
  const int32_t *slots = attn_slots(j, piece->b, piece->hk);
  const float off = j->use_off && !j->general ? piece->off[i] : 0.0f;
  float *out = attn_at(&j->scores, piece->b, piece->h, row);
  for (int c = 0; c < ETK_PAGE; c++)
    if (t->keep >> c & 1) out[slot_row(slots, t->page, c)] = y[c] == -INFINITY ? -INFINITY : ATTN_LN2 * (y[c] + off);
}

/* p of the table softmax, as PV used it: rows of P then sum to l, and masses to the number of rows. */
static void table_row(const attn_job *j, attn_lane *lane, const etk_strip *like, const float *y, float lse2, float *restrict p) {
  float m = -INFINITY, l = 0.0f, w;
  etk_strip a = *like;
  a.rows = 1, a.m = &m, a.l = &l, a.o = lane->zero, a.dv_pad = ETK_HEAD_UNIT;
  j->kernel->softmax_u8(&a, y, lane->p, &w);
  const float scale = exp2f(m - lse2) / (float)j->kernel->p_max;
  const uint8_t *order = j->kernel->p_order;
  for (int c = 0; c < ETK_PAGE; c++) p[order ? order[c] : c] = m == -INFINITY ? 0.0f : scale * (float)lane->p[c];
}

static void add_masses(const attn_job *j, const attn_piece *piece, attn_lane *lane, const etk_strip *a, const float *y, int32_t i) {
  float *restrict p = lane->pf, *restrict acc = lane->acc, weight = 1.0f;
  if (piece->lse2[i] == -INFINITY) return;
  if (j->weights && j->weights->weight.data) weight = attn_f32(&j->weights->weight, 0, 0, attn_query_row(j, piece->b, piece->h, piece->r0 + i));
  if (j->plan->int8_pv && !j->clip && !j->weights) table_row(j, lane, a, y, piece->lse2[i], p);
  else attn_exp2_row(y, piece->lse2[i], p);
  if (j->clip && !j->weights) {
    const float gamma = j->desc->clip_gamma, span = j->desc->clip_zeta - gamma;
    for (int c = 0; c < ETK_PAGE; c++) {
      const float x = span * p[c] + gamma;
      p[c] = x > 1.0f ? 1.0f : x > 0.0f ? x : 0.0f;
    }
  }
  for (int c = 0; c < ETK_PAGE; c++) acc[c] += weight * p[c];
}

static void walk_piece(attn_job *j, attn_lane *lane, attn_piece *piece, int64_t block, int64_t page) {
  const int32_t mr = j->kernel->mr, n = piece->n;
  const int masses = j->weights || j->colmass.data;
  int wanted = masses;
  piece->pos_min = INT64_MAX, piece->pos_max = INT64_MIN;
  for (int32_t i = 0; i < n; i++) {
    if (piece->pos[i] < piece->pos_min) piece->pos_min = piece->pos[i];
    if (piece->pos[i] > piece->pos_max) piece->pos_max = piece->pos[i];
    wanted |= !wanted && score_row(j, piece, i) >= 0;
  }
  if (!wanted) return;
  attn_tile *t = lane->tiles;
  etk_strip a;
  if (!attn_list_tiles(j, piece->seq, piece->b, piece->h, block, piece->pos_min, piece->pos_max, page, page + 1, t)) return;
  attn_strip_page(j, piece, t, lane, &a);
  attn_mask_words(j, piece, t, lane->mask);
  attn_tile_extras(j, piece, t, lane, lane->mask);
  for (int32_t row = 0; row < n; row += mr) {
    attn_strip_rows(j, piece, lane, row, n - row < mr ? n - row : mr, &a);
    attn_logits(j, piece, t, lane, &a, row, lane->mask + row);
    for (int32_t i = 0; i < a.rows; i++) {
      if (masses) add_masses(j, piece, lane, &a, lane->y + i * ETK_PAGE, row + i);
      put_scores(j, piece, t, lane->y + i * ETK_PAGE, row + i);
    }
  }
}

static void put_masses(attn_job *j, const attn_seq *s, int64_t b, int64_t h, int64_t hk, int64_t page, const float *acc) {
  const attn_view *mass = j->weights ? &j->weights->out : &j->colmass;
  const int grouped = j->weights || (j->desc->flags & ETK_F_COLMASS_PER_KV_HEAD);
  const int32_t *slots = attn_slots(j, b, hk);
  const float share = j->weights ? j->weights->share : 1.0f;
  for (int c = 0; c < ETK_PAGE && page * ETK_PAGE + c < s->slots; c++) {
    const int64_t row = slot_row(slots, page, c);
    if (row < 0 || row >= s->m) continue;
    float *out = attn_at(mass, b, grouped ? hk : h, s->k0 + row);
    *out += share * acc[c];
  }
}

static void page_columns(attn_job *j, attn_lane *lane, const attn_seq *s, int64_t b, int64_t hk, int64_t page) {
  memset(lane->zero, 0, sizeof *lane->zero * ETK_MAX_MR * ETK_HEAD_UNIT);
  for (int64_t h = hk * j->plan->group; h < (hk + 1) * j->plan->group; h++) {
    memset(lane->acc, 0, ETK_PAGE * 4);
    for (int64_t block = 0; block < s->blocks; block++) {
      int64_t r0, r1;
      attn_block_rows(j, b, h, block, &r0, &r1);
      for (int64_t r = r0; r < r1; r += ATTN_ROWS) {
        attn_piece piece;
        attn_piece_at(j, lane, s, b, h, r, r1 - r < ATTN_ROWS ? r1 - r : ATTN_ROWS, &piece);
        piece.block_row = (int32_t)(r - r0);
        walk_piece(j, lane, &piece, block, page);
      }
    }
    if (j->weights || j->colmass.data) put_masses(j, s, b, h, hk, page, lane->acc);
  }
}

static void column_task(void *arg, int64_t task, int worker) {
  attn_job *j = arg;
  attn_lane lane = attn_lane_at(j, worker);
  if (j->gather.data) {
    const int64_t b = task / j->desc->hkv, hk = task % j->desc->hkv;
    for (int64_t page = 0; page < j->seqs[b].pages; page++) page_columns(j, &lane, &j->seqs[b], b, hk, page);
    return;
  }
  int64_t b = j->desc->batch - 1;
  while (j->seqs[b].first_page > task) b--;
  const attn_seq *s = &j->seqs[b];
  page_columns(j, &lane, s, b, (task - s->first_page) / s->pages, (task - s->first_page) % s->pages);
}

etk_status attn_outputs(attn_job *j, const etk_pool *pool) {
  const int32_t w = j->plan->nthreads;
  const int64_t batch = j->desc->batch;
  const etk_status st = etk_parallel(pool, w, clear_task, j, batch * j->desc->hq);
  if (st != ETK_OK) return st;
  return etk_parallel(pool, w, column_task, j, j->gather.data ? batch * j->desc->hkv : j->npages);
}
