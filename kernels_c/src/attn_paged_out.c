/* Scores and column masses over a paged cache: a second pass over the pages once every row's lse is known.
 *
 *   scores[i, slot] = logit (natural log), -inf where masked;  colmass[slot] = sum_i exp(logit - lse[i])
 * A task owns the slots of up to 16 pages of one KV head, so that no two write the same place and rows add up in order. */
#include <math.h>
#include <string.h>

#include "attn_paged.h"
#include "parallel.h"

#define LN2 0.693147182f

static float *mass_at(const paged_run *r, const paged_unit *u, int32_t row, int64_t slot) {
  const etk_tensor *t = &r->io->colmass;
  int64_t h = r->desc->flags & ETK_F_COLMASS_PER_KV_HEAD ? u->h : (int64_t)u->h * r->group + row % r->group;
  return (float *)(void *)((uint8_t *)t->data + u->b * t->stride[0] + h * t->stride[1] + slot * t->stride[2]);
}

static float *score_at(const paged_run *r, const paged_unit *u, int32_t row, int64_t slot) {
  const etk_tensor *t = &r->io->scores;
  int64_t i = u->i0 + row / r->group - (r->n - r->io->score_rows);
  if (i < 0) return NULL;
  int64_t hq = (int64_t)u->h * r->group + row % r->group;
  return (float *)(void *)((uint8_t *)t->data + u->b * t->stride[0] + hq * t->stride[1] + i * t->stride[2] + slot * t->stride[3]);
}

static int listed(const paged_run *r, const paged_unit *u, int64_t page) {
  if (!r->io->gather.data) return 1;
  for (int64_t i = 0; i < r->n_sel; i++)
    if (paged_page(r, u, i) == page) return 1;
  return 0;
}

static void page_out(const paged_run *r, paged_lane *a, const paged_unit *u, int64_t page, int64_t slots, int visible) {
  int32_t rows = u->n * r->group, mr = r->kernel->mr, scores = (r->desc->flags & ETK_F_RETURN_SCORES) != 0;
  int32_t mass = (r->desc->flags & ETK_F_RETURN_COLMASS) != 0;
  int64_t from = page * KV_SLOTS;
  for (int32_t r0 = 0; r0 < rows; r0 += mr) {
    int32_t n = rows - r0 < mr ? rows - r0 : mr;
    if (visible) paged_logits(r, a, u, page, r0, n);
    for (int32_t i = 0; i < n; i++) {
      int32_t row = r0 + i;
      int64_t hq = (int64_t)u->h * r->group + row % r->group;
      float lse2 = r->lse2[((int64_t)u->b * r->desc->hq + hq) * r->n + u->i0 + row / r->group];
      for (int64_t j = 0; j < slots; j++) {
        float y = visible ? a->y[i * KV_SLOTS + j] : -INFINITY, *s = scores ? score_at(r, u, row, from + j) : NULL;
        if (s) *s = y * LN2;
        if (mass && y > -INFINITY) *mass_at(r, u, row, from + j) += exp2f(y - lse2);
      }
    }
  }
}

static void columns_task(void *arg, int64_t task, int worker) {
  const paged_run *r = (const paged_run *)arg;
  paged_lane a = paged_lane_at(r, worker);
  int64_t cuts = r->n_tasks / ((int64_t)r->desc->batch * r->desc->hkv), head = task / cuts, first = task % cuts * PAGED_SPLIT;
  int32_t b = (int32_t)(head / r->desc->hkv), h = (int32_t)(head % r->desc->hkv);
  int64_t slots = r->cache->seq_k[paged_row(r, b, h)];
  for (int64_t page = first; page < first + PAGED_SPLIT && page * KV_SLOTS < slots; page++) {
    int64_t n = slots - page * KV_SLOTS < KV_SLOTS ? slots - page * KV_SLOTS : KV_SLOTS;
    for (int64_t i = 0; i < r->n_units; i++) {
      const paged_unit *u = &r->units[i];
      if (u->b != b || u->h != h) continue;
      int visible = page <= u->own && listed(r, u, page);
      if (visible) {
        paged_load(r, &a, u);
        visible = paged_mask(r, &a, u, page) >= 0;
      }
      page_out(r, &a, u, page, n, visible);
    }
  }
}

/* Columns beyond a sequence, and masses before they add up. */
static void blank(const paged_run *r) {
  const etk_tensor *m = &r->io->colmass, *s = &r->io->scores;
  if (r->desc->flags & ETK_F_RETURN_COLMASS)
    for (int64_t b = 0; b < m->dim[0]; b++)
      for (int64_t h = 0; h < m->dim[1]; h++)
        memset((uint8_t *)m->data + b * m->stride[0] + h * m->stride[1], 0, (size_t)m->dim[2] * 4);
  if (!(r->desc->flags & ETK_F_RETURN_SCORES)) return;
  for (int64_t b = 0; b < s->dim[0]; b++)
    for (int64_t h = 0; h < s->dim[1]; h++)
      for (int64_t i = 0; i < s->dim[2]; i++) {
        float *row = (float *)(void *)((uint8_t *)s->data + b * s->stride[0] + h * s->stride[1] + i * s->stride[2]);
        for (int64_t j = 0; j < s->dim[3]; j++) row[j] = -INFINITY;
      }
}

etk_status paged_outputs(const paged_run *run, const etk_pool *pool) {
  paged_run r = *run;
  int64_t most = 0;
  for (int32_t b = 0; b < r.desc->batch; b++)
    for (int32_t h = 0; h < r.desc->hkv; h++) {
      int64_t pages = kv_pages_of(r.cache->seq_k[paged_row(&r, b, h)]);
      most = pages > most ? pages : most;
    }
  blank(&r);
  int64_t cuts = (most + PAGED_SPLIT - 1) / PAGED_SPLIT;
  r.n_tasks = cuts * r.desc->batch * r.desc->hkv;
  return etk_parallel(pool, r.workers, columns_task, &r, r.n_tasks);
}
