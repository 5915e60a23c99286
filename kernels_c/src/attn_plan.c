/* Plans of attention: descriptor checked, kernel chosen, workspace laid out. */
#include "attn_plan.h"

#include <stdlib.h>

#include "checked.h"
#include "parallel.h"
#include "tensor.h"

static int32_t pad(int32_t d) { return (d + ETK_HEAD_UNIT - 1) / ETK_HEAD_UNIT * ETK_HEAD_UNIT; }

/* Pieces of a worker's slice; with base NULL only their total matters. */
static uint64_t carve_lane(const etk_attn_plan *p, uint8_t *base, attn_lane *lane) {
  const uint64_t r = ATTN_ROWS, d = (uint64_t)p->d_pad, dv = (uint64_t)p->dv_pad, strip = ETK_MAX_MR * ETK_PAGE;
  etk_carve c = {0, 0};
#define PIECE(field, count) lane->field = (void *)(base + etk_take(&c, (count), sizeof *lane->field))
  PIECE(o, r * dv);
  PIECE(own.q, r * d);
  PIECE(own.start, r);
  PIECE(own.gq, r);
  PIECE(own.off, r);
  PIECE(own.pos, r);
  PIECE(own.lse2, r);
  PIECE(m, r);
  PIECE(l, r);
  PIECE(g, r);
  PIECE(mask, r);
  PIECE(y, strip);
  PIECE(pf, strip);
  PIECE(s, strip);
  PIECE(p, strip);
  PIECE(w, ETK_MAX_MR);
  PIECE(kb, ETK_PAGE);
  PIECE(acc, ETK_PAGE);
  PIECE(zero, ETK_MAX_MR * ETK_HEAD_UNIT);
  PIECE(x, d > dv ? d : dv);
  PIECE(kx, ETK_PAGE * d);
  PIECE(vx, ETK_PAGE * dv);
  PIECE(tiles, (uint64_t)p->max_pages);
  PIECE(strips, r);
  PIECE(own.qf, p->int8_qk ? 0 : r * d);
#undef PIECE
  return c.bad ? UINT64_MAX : c.used;
}

uint64_t attn_lane_bytes(const etk_attn_plan *plan) {
  attn_lane lane;
  static uint8_t nowhere; /* offsets are added to it, never read */
  return carve_lane(plan, &nowhere, &lane);
}

attn_lane attn_lane_at(const attn_job *job, int worker) {
  attn_lane lane = {0};
  carve_lane(job->plan, job->lanes + (uint64_t)worker * job->plan->at.lane_bytes, &lane);
  return lane;
}

static etk_status lay_out(etk_attn_plan *p) {
  attn_layout *a = &p->at;
  etk_carve c = {0, 0};
  const uint64_t pages = (uint64_t)p->pages, rows = p->second ? (uint64_t)p->rows : 0;
  const uint64_t d = (uint64_t)p->d_pad, dv = (uint64_t)p->dv_pad, heads = (uint64_t)p->desc.batch * (uint64_t)p->desc.hkv;
  a->seqs = etk_take(&c, (uint64_t)p->desc.batch, sizeof(attn_seq));
  a->kpages = etk_take(&c, pages, p->kbytes);
  a->vpages = etk_take(&c, pages, p->vbytes);
  a->kscale = etk_take(&c, pages, 4);
  a->sv = etk_take(&c, pages, 4 * dv);
  a->colsum = etk_take(&c, p->kernel->needs_colsum ? pages : 0, 4 * dv);
  a->valid = etk_take(&c, pages, 8);
  a->kpos = etk_take(&c, pages, 8 * ETK_PAGE);
  a->page_pos = etk_take(&c, pages, 16);
  a->needed = etk_take(&c, pages, 1);
  a->mu_k = etk_take(&c, heads, 4 * d);
  a->mu_v = etk_take(&c, heads, 4 * dv);
  a->q = etk_take(&c, p->int8_qk ? rows : 0, d);
  a->qf = etk_take(&c, p->int8_qk ? 0 : rows, 4 * d);
  a->start = etk_take(&c, rows, 4);
  a->gq = etk_take(&c, rows, 4);
  a->off = etk_take(&c, rows, 4);
  a->qpos = etk_take(&c, rows, 8);
  a->lse2 = etk_take(&c, rows, 4);
  a->lane_bytes = attn_lane_bytes(p);
  if (c.bad || a->lane_bytes > INT64_MAX / 2) return ETK_E_OVERFLOW;
  a->lanes = etk_take(&c, (uint64_t)p->nthreads, a->lane_bytes);
  a->bytes = c.used;
  return c.bad || c.used > SIZE_MAX / 2 ? ETK_E_OVERFLOW : ETK_OK;
}

/* Pages and rows over all sequences: from the bounds of the descriptor, or from the totals of packed tensors. */
static etk_status count(etk_attn_plan *p, const attn_job *shape) {
  const etk_attn_desc *d = &p->desc;
  uint64_t per_seq = (uint64_t)d->max_m / ETK_PAGE + 1, pages, rows;
  p->max_pages = (int64_t)per_seq;
  if (shape && shape->packed) {
    pages = (uint64_t)shape->m / ETK_PAGE + (uint64_t)d->batch;
    rows = (uint64_t)shape->n;
  } else {
    if (etk_mul(per_seq, (uint64_t)d->batch, &pages) || etk_mul((uint64_t)d->max_n, (uint64_t)d->batch, &rows)) return ETK_E_OVERFLOW;
  }
  if (etk_mul(pages, (uint64_t)d->hkv, &pages) || etk_mul(rows, (uint64_t)d->hq, &rows)) return ETK_E_OVERFLOW;
  if (pages > INT64_MAX / 4096 || rows > INT64_MAX / 4096) return ETK_E_OVERFLOW;
  p->pages = (int64_t)pages, p->rows = (int64_t)rows;
  return ETK_OK;
}

static etk_status make(etk_attn_plan *p, const etk_attn_io *shape_only, int32_t nthreads) {
  etk_attn_desc *d = &p->desc;
  etk_status st;
  p->kernel = etk_attn_kernel_pick(d->isa_cap, &st);
  if (!p->kernel) return st;
  if (d->softmax_mode == ETK_SOFTMAX_EXACT && p->kernel->isa != ETK_ISA_SCALAR) return ETK_E_UNSUPPORTED;
  p->nthreads = nthreads, p->group = d->hq / d->hkv;
  p->d_pad = pad(d->d), p->dv_pad = pad(d->dv);
  p->int8_qk = d->compute != ETK_C_F32, p->int8_pv = d->compute == ETK_C_S8S8;
  p->second = (d->flags & (ETK_F_RETURN_COLMASS | ETK_F_RETURN_SCORES)) != 0;
  p->scale = d->scale, p->tau2 = d->scale * ATTN_LOG2E;
  p->kbytes = (uint64_t)p->d_pad * ETK_PAGE * (p->int8_qk ? 1 : 4);
  p->vbytes = (uint64_t)p->dv_pad * ETK_PAGE * (p->int8_pv ? 1 : 4);
  if (d->kv_layout == ETK_KV_PAGED) return etk_attn_paged_workspace(p, &p->at.bytes);
  attn_job shape;
  if (shape_only && (st = attn_check_io(d, shape_only, 1, &shape)) != ETK_OK) return st;
  st = count(p, shape_only ? &shape : NULL);
  return st == ETK_OK ? lay_out(p) : st;
}

etk_status etk_attn_plan_create(const etk_attn_desc *desc, const etk_attn_io *shape_only, int32_t nthreads, etk_attn_plan **out) {
  if (!desc || !out) return ETK_E_NULL;
  if (nthreads < 1 || nthreads > 256) return ETK_E_RANGE;
  etk_attn_plan plan = {0};
  etk_status st = attn_check_desc(desc, &plan.desc);
  if (st == ETK_OK) st = make(&plan, shape_only, nthreads);
  if (st != ETK_OK) return st;
  etk_attn_plan *kept = malloc(sizeof *kept);
  if (!kept) return ETK_E_MEMORY;
  *kept = plan;
  *out = kept;
  return ETK_OK;
}

void etk_attn_plan_free(etk_attn_plan *plan) { free(plan); }

etk_status etk_attn_workspace(const etk_attn_plan *plan, uint64_t *bytes, uint64_t *align) {
  if (!plan || !bytes || !align) return ETK_E_NULL;
  *bytes = plan->at.bytes;
  *align = 64;
  return ETK_OK;
}

const char *etk_attn_plan_kernel(const etk_attn_plan *plan) { return plan ? plan->kernel->name : ""; }

etk_status etk_attn_validate(const etk_attn_desc *desc, const etk_attn_io *io) {
  if (!desc || !io) return ETK_E_NULL;
  etk_attn_plan plan = {0};
  etk_status st = attn_check_desc(desc, &plan.desc);
  if (st == ETK_OK) st = make(&plan, NULL, 1);
  if (st != ETK_OK) return st;
  if (plan.desc.kv_layout == ETK_KV_PAGED) return etk_attn_check_paged(&plan, io);
  attn_job job;
  st = attn_check_io(&plan.desc, io, 1, &job);
  return st == ETK_OK ? attn_check_content(&plan.desc, &job) : st;
}

static int64_t seq_keys(const attn_job *j, int64_t b) {
  const etk_tensor *t = &j->io.seq_k;
  if (etk_absent(t)) return j->m;
  return *(const int32_t *)((const uint8_t *)t->data + (t->dim[0] > 1 ? b * t->stride[0] : 0));
}

/* Sequences: where each one's rows, pages and tasks lie. */
static etk_status list_sequences(attn_job *j) {
  const etk_attn_desc *d = j->desc;
  const int bsr = (d->mask_kind & ETK_MASK_BSR) != 0;
  int64_t pages = 0, rows = 0, tasks = 0;
  for (int64_t b = 0; b < d->batch; b++) {
    attn_seq s = {.n = j->n, .m = seq_keys(j, b), .first_page = pages, .first_row = rows, .first_task = tasks};
    if (j->packed) {
      s.q0 = attn_int(&j->cu_q, 0, 0, b), s.k0 = attn_int(&j->cu_k, 0, 0, b);
      s.n = attn_int(&j->cu_q, 0, 0, b + 1) - s.q0, s.m = attn_int(&j->cu_k, 0, 0, b + 1) - s.k0;
    }
    s.slots = j->gather.data ? j->io.gather.dim[2] : j->k_perm.data ? j->m : s.m;
    s.pages = (s.slots + ETK_PAGE - 1) / ETK_PAGE;
    s.blocks = bsr ? j->io.bsr.nqb : (s.n + ATTN_ROWS - 1) / ATTN_ROWS;
    pages += s.pages * d->hkv, rows += s.n * d->hq, tasks += s.blocks * d->hq;
    if (pages > j->plan->pages || (j->plan->second && rows > j->plan->rows)) return ETK_E_WORKSPACE;
    j->seqs[b] = s;
  }
  j->npages = pages, j->ntasks = tasks;
  return ETK_OK;
}

etk_status attn_job_begin(attn_job *j, const etk_attn_plan *plan, const etk_attn_io *io, void *ws, uint64_t ws_bytes) {
  const struct attn_weights *weights = j->weights; /* the check fills *j from nothing */
  etk_status st = attn_check_io(&plan->desc, io, weights == NULL, j);
  j->weights = weights;
  if (st == ETK_OK) st = attn_check_content(&plan->desc, j);
  if (st != ETK_OK) return st;
  if (ws_bytes < plan->at.bytes || (plan->at.bytes && !ws) || (uintptr_t)ws % 64) return ETK_E_WORKSPACE;
  uint8_t *base = ws;
  const attn_layout *a = &plan->at;
  j->plan = plan, j->kernel = plan->kernel;
  j->seqs = (void *)(base + a->seqs);
  j->kpages = base + a->kpages, j->vpages = base + a->vpages, j->needed = base + a->needed, j->lanes = base + a->lanes;
  j->kscale = (void *)(base + a->kscale), j->sv = (void *)(base + a->sv);
  j->mu_k = (void *)(base + a->mu_k), j->mu_v = (void *)(base + a->mu_v);
  j->colsum = plan->kernel->needs_colsum ? (void *)(base + a->colsum) : NULL;
  j->valid = (void *)(base + a->valid);
  j->kpos = (void *)(base + a->kpos), j->page_pos = (void *)(base + a->page_pos);
  j->q_all = (void *)(base + a->q), j->qf_all = (void *)(base + a->qf);
  j->start_all = (void *)(base + a->start), j->gq_all = (void *)(base + a->gq), j->off_all = (void *)(base + a->off);
  j->qpos_all = (void *)(base + a->qpos), j->lse2_all = (void *)(base + a->lse2);
  return list_sequences(j);
}
