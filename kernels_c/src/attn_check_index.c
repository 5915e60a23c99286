/* The part of the checks that reads memory: lengths, permutations, gathered keys, block indices. One linear pass over
 * each, small beside the attention that follows; a run makes it always, so that no index can lead outside a tensor. */
#include "attn_plan.h"
#include "edgetok/index.h"
#include "tensor.h"

static etk_status check_cu(const attn_view *v, int64_t batch, int64_t total, int64_t most) {
  int64_t last = 0;
  if (attn_int(v, 0, 0, 0) != 0) return ETK_E_RANGE;
  for (int64_t i = 1; i <= batch; i++) {
    const int64_t at = attn_int(v, 0, 0, i);
    if (at < last || at > total) return ETK_E_RANGE;
    if (at - last > most) return ETK_E_SHAPE;
    last = at;
  }
  return last == total ? ETK_OK : ETK_E_RANGE;
}

/* Every distinct row of a [B or 1, H or 1, n] permutation. */
static etk_status check_perm(const attn_view *v, int64_t batch, int64_t heads, int64_t n) {
  if (!v->data || n == 0) return ETK_OK;
  for (int64_t b = 0; b < (v->b ? batch : 1); b++)
    for (int64_t h = 0; h < (v->h ? heads : 1); h++) {
      const etk_status st = etk_perm_check(attn_at(v, b, h, 0), n);
      if (st != ETK_OK) return st;
    }
  return ETK_OK;
}

static etk_status check_gather(const attn_job *j, int64_t batch, int64_t heads) {
  const int64_t n = j->io.gather.dim[2];
  for (int64_t b = 0; n > 0 && b < (j->gather.b ? batch : 1); b++)
    for (int64_t h = 0; h < (j->gather.h ? heads : 1); h++) {
      const int32_t *at = attn_at(&j->gather, b, h, 0);
      for (int64_t i = 0; i < n; i++)
        if (at[i] < -1 || at[i] >= j->m) return ETK_E_RANGE;
    }
  return ETK_OK;
}

etk_status attn_check_content(const etk_attn_desc *d, const attn_job *j) {
  etk_status st = ETK_OK;
  if (d->batch == 0) return ETK_OK;
  if (j->packed) {
    st = check_cu(&j->cu_q, d->batch, j->n, d->max_n);
    return st == ETK_OK ? check_cu(&j->cu_k, d->batch, j->m, d->max_m) : st;
  }
  const etk_tensor *len = &j->io.seq_k;
  for (int64_t b = 0; !etk_absent(len) && b < d->batch; b++) {
    const int32_t at = *(const int32_t *)((const uint8_t *)len->data + (d->batch > 1 ? b * len->stride[0] : 0));
    if (at < 0 || at > j->m) return ETK_E_RANGE;
  }
  if ((st = check_perm(&j->q_perm, d->batch, d->hq, j->n)) != ETK_OK) return st;
  if ((st = check_perm(&j->o_perm, d->batch, d->hq, j->n)) != ETK_OK) return st;
  if ((st = check_perm(&j->k_perm, d->batch, d->hkv, j->m)) != ETK_OK) return st;
  if (j->gather.data) st = check_gather(j, d->batch, d->hkv);
  if (st == ETK_OK && (d->mask_kind & ETK_MASK_BSR)) {
    st = etk_bsr_check(&j->io.bsr, d->batch, d->hq, j->n, j->m);
    if (st == ETK_OK && j->io.bsr.bq == 0 && j->io.bsr.bits_idx) st = ETK_E_UNSUPPORTED; /* bits are 64 x 64 */
  }
  return st;
}
