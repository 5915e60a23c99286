/* Checks of a run over a paged cache, and where its rows stand. Nothing here writes. */
#include "attn_paged.h"
#include "attn_paged_core.h"
#include "kv_tensor.h"

int64_t paged_row_pos(const etk_attn_io *io, int32_t b, int64_t i, int64_t next, int64_t n) {
  const etk_tensor *t = &io->q_pos;
  if (!t->data) return next - n + i;
  const uint8_t *at = (const uint8_t *)t->data + (t->dim[0] == 1 ? 0 : b) * t->stride[0] + i * t->stride[1];
  return t->dtype == ETK_I32 ? *(const int32_t *)(const void *)at : *(const int64_t *)(const void *)at;
}

/* Last page with a slot at or before pos; -1 = none. */
static int64_t page_of(const etk_kv_cache *c, int64_t row, int64_t pos) {
  const int32_t *p = kv_pos(c, row);
  int64_t lo = 0, hi = c->seq_k[row];
  while (lo < hi) {
    int64_t mid = lo + (hi - lo) / 2;
    if (p[mid] <= pos) lo = mid + 1;
    else hi = mid;
  }
  return lo == 0 ? -1 : (lo - 1) / KV_SLOTS;
}

/* The page that row i of (b, h) reads from the tail. */
int64_t paged_own_page(const etk_attn_desc *d, const etk_attn_io *io, int32_t b, int64_t row, int64_t i, int64_t n) {
  const etk_kv_cache *c = io->kv;
  if (!(d->mask_kind & ETK_MASK_CAUSAL)) return kv_pages_of(c->seq_k[row]) - 1;
  int64_t next = c->next_pos[(int64_t)io->kv_layer * c->desc.batch + io->kv_seq + b];
  return page_of(c, row, paged_row_pos(io, b, i, next, n));
}

static etk_status check_optional(const etk_tensor *t, int32_t rank, const int64_t *dim, const int64_t *wide, int32_t a, int32_t b) {
  if (kv_absent(t)) return ETK_OK;
  int64_t want[5];
  if (t->rank != rank) return ETK_E_SHAPE;
  for (int32_t i = 0; i < rank; i++) want[i] = t->dim[i] == 1 && wide[i] ? 1 : dim[i];
  return kv_tensor_check(t, rank, want, a, b);
}

static etk_status check_extras(const etk_attn_desc *d, const etk_attn_io *io, int64_t n, int64_t slots) {
  const int64_t one[4] = {1, 1, 0, 0}, none[4] = {0}, wide_gate[4] = {0, 0, 0, 1};
  etk_status s;
  if (!kv_absent(&io->cu_q) || !kv_absent(&io->cu_k) || !kv_absent(&io->k_pos) || !kv_absent(&io->q_perm) || !kv_absent(&io->k_perm) ||
      !kv_absent(&io->o_perm) || !kv_absent(&io->k_mean) || !kv_absent(&io->seq_k) || !kv_absent(&io->k) || !kv_absent(&io->v))
    return ETK_E_UNSUPPORTED;
  int64_t m = kv_absent(&io->key_bias) ? 0 : io->key_bias.rank == 3 ? io->key_bias.dim[2] : -1;
  if (m && m < slots) return ETK_E_SHAPE;
  if ((s = check_optional(&io->key_bias, 3, (int64_t[]){d->batch, d->hq, m}, one, ETK_F32, ETK_F32)) < 0) return s;
  if ((s = check_optional(&io->alibi_slope, 1, (int64_t[]){d->hq}, none, ETK_F32, ETK_F32)) < 0) return s;
  if ((s = check_optional(&io->sink_logit, 1, (int64_t[]){d->hq}, none, ETK_F32, ETK_F32)) < 0) return s;
  if ((s = check_optional(&io->q_pos, 2, (int64_t[]){d->batch, n}, one, ETK_I32, ETK_I64)) < 0) return s;
  if ((s = check_optional(&io->gate, 4, (int64_t[]){d->batch, d->hq, n, d->dv}, wide_gate, ETK_F32, ETK_F32)) < 0) return s;
  if ((s = check_optional(&io->lse, 3, (int64_t[]){d->batch, d->hq, n}, none, ETK_F32, ETK_F32)) < 0) return s;
  if (d->flags & ETK_F_RETURN_COLMASS) {
    int64_t heads = d->flags & ETK_F_COLMASS_PER_KV_HEAD ? d->hkv : d->hq;
    if (kv_absent(&io->colmass)) return ETK_E_NULL;
    if (io->colmass.rank != 3 || io->colmass.dim[2] < slots) return ETK_E_SHAPE;
    if ((s = kv_tensor_check(&io->colmass, 3, (int64_t[]){d->batch, heads, io->colmass.dim[2]}, ETK_F32, ETK_F32)) < 0) return s;
  }
  if (d->flags & ETK_F_RETURN_SCORES) {
    if (kv_absent(&io->scores)) return ETK_E_NULL;
    if (io->scores.rank != 4 || io->scores.dim[3] < slots || io->score_rows < 0 || io->score_rows > n) return ETK_E_SHAPE;
    int64_t dim[4] = {d->batch, d->hq, io->score_rows, io->scores.dim[3]};
    if ((s = kv_tensor_check(&io->scores, 4, dim, ETK_F32, ETK_F32)) < 0) return s;
  }
  if (d->flags & ETK_F_RETURN_LSE && kv_absent(&io->lse)) return ETK_E_NULL;
  return ETK_OK;
}

/* Page lists: ascending, unique, within the sequence; -1 anywhere is padding. */
static etk_status check_gather(const etk_attn_desc *d, const etk_attn_io *io) {
  const etk_tensor *g = &io->gather;
  if (!(d->mask_kind & ETK_MASK_GATHER)) return kv_absent(g) ? ETK_OK : ETK_E_UNSUPPORTED;
  if (kv_absent(g)) return ETK_E_NULL;
  if (g->rank != 3) return ETK_E_SHAPE;
  etk_status s = check_optional(g, 3, (int64_t[]){d->batch, d->hkv, g->dim[2]}, (int64_t[]){0, 1, 0}, ETK_I32, ETK_I32);
  if (s < 0) return s;
  for (int64_t b = 0; b < d->batch; b++)
    for (int32_t h = 0; h < d->hkv; h++) {
      int64_t row = kv_row(io->kv, io->kv_layer, io->kv_seq + (int32_t)b, kv_table_of(io->kv, h)), before = -1;
      const uint8_t *at = (const uint8_t *)g->data + b * g->stride[0] + (g->dim[1] == 1 ? 0 : h) * g->stride[1];
      for (int64_t i = 0; i < g->dim[2]; i++) {
        int32_t page = *(const int32_t *)(const void *)(at + i * g->stride[2]);
        if (page == -1) continue;
        if (page <= before || page >= kv_pages_of(io->kv->seq_k[row])) return ETK_E_RANGE;
        before = page;
      }
    }
  return ETK_OK;
}

static etk_status check_cache(const etk_attn_desc *d, const etk_attn_kernel *kernel, const etk_attn_io *io) {
  etk_status s = kv_check(io->kv);
  if (s < 0) return s;
  const etk_kv_desc *c = &io->kv->desc;
  if (c->d != d->d || c->dv != d->dv || c->hkv != d->hkv) return ETK_E_SHAPE;
  if (io->kv_layer < 0 || io->kv_layer >= c->layers || io->kv_seq < 0 || d->batch > c->batch - io->kv_seq) return ETK_E_RANGE;
  if (c->bits != 16 && (io->kv->layout != kernel->layout || kv_attn(io->kv)->needs_colsum != kernel->needs_colsum)) return ETK_E_UNSUPPORTED;
  if (d->compute != ETK_C_F32 && d->compute != ETK_C_S8S8 && d->compute != ETK_C_S8F) return ETK_E_UNSUPPORTED;
  if ((d->mask_kind & ETK_MASK_BSR) || d->clip_gamma != 0.0f || d->clip_zeta != 0.0f) return ETK_E_UNSUPPORTED;
  if (d->win_left < 0 || d->win_right < 0 || d->win_left > INT32_MAX || d->win_right > INT32_MAX) return ETK_E_RANGE;
  return ETK_OK;
}

etk_status etk_paged_check_cache(const etk_attn_desc *d, const etk_attn_kernel *kernel, const etk_attn_io *io, int64_t *slots) {
  etk_status s = check_cache(d, kernel, io);
  if (s < 0) return s;
  *slots = 0;
  for (int32_t b = 0; b < d->batch; b++)
    for (int32_t t = 0; t < io->kv->tables; t++) {
      int64_t used = io->kv->seq_k[kv_row(io->kv, io->kv_layer, io->kv_seq + b, t)];
      *slots = used > *slots ? used : *slots;
    }
  return *slots > d->max_m ? ETK_E_SHAPE : ETK_OK;
}

etk_status etk_paged_check(const etk_attn_desc *d, const etk_attn_kernel *kernel, const etk_attn_io *io) {
  int64_t slots;
  etk_status s = etk_paged_check_cache(d, kernel, io, &slots);
  if (s < 0) return s;
  if (io->q.rank != 4) return ETK_E_SHAPE;
  int64_t n = io->q.dim[2];
  if (n < 0 || n > d->max_n) return ETK_E_SHAPE;
  if ((s = kv_tensor_check(&io->q, 4, (int64_t[]){d->batch, d->hq, n, d->d}, ETK_F32, ETK_F16)) < 0) return s;
  if ((s = kv_tensor_check(&io->o, 4, (int64_t[]){d->batch, d->hq, n, d->dv}, ETK_F32, ETK_F32)) < 0) return s;
  if ((s = check_extras(d, io, n, slots)) < 0 || (s = check_gather(d, io)) < 0) return s;
  if (!(d->mask_kind & ETK_MASK_CAUSAL)) return ETK_OK;
  /* Every row's own page must still be in the tail, or be the last one; and rows ascend. */
  for (int32_t b = 0; b < d->batch; b++)
    for (int32_t t = 0; t < io->kv->tables; t++) {
      int64_t row = kv_row(io->kv, io->kv_layer, io->kv_seq + b, t), last = kv_pages_of(io->kv->seq_k[row]) - 1, before = -1;
      for (int64_t i = 0; i < n; i++) {
        int64_t own = paged_own_page(d, io, b, row, i, n);
        if (own < before || (own >= 0 && own != last && !kv_in_tail(io->kv, row, own))) return ETK_E_RANGE;
        before = own;
      }
    }
  return ETK_OK;
}
