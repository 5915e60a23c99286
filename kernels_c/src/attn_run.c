/* etk_attn_run: check, pack, attend, and walk once more by columns when scores or masses are asked for. */
#include "attn_plan.h"
#include "parallel.h"

etk_status etk_attn_run(const etk_attn_plan *plan, const etk_attn_io *io, void *ws, uint64_t ws_bytes, const etk_pool *pool) {
  if (!plan || !io) return ETK_E_NULL;
  if (plan->desc.kv_layout == ETK_KV_PAGED) return etk_attn_run_paged(plan, io, ws, ws_bytes, pool);
  attn_job j;
  j.weights = NULL;
  etk_status st = attn_job_begin(&j, plan, io, ws, ws_bytes);
  if (st != ETK_OK) return st;
  if ((plan->desc.flags & ETK_F_CHECK_FINITE) && (st = attn_check_finite(&j, pool)) != ETK_OK) return st;
  j.reverse = plan->nthreads > 1 && (plan->desc.mask_kind & ETK_MASK_CAUSAL) != 0;
  if ((st = attn_pack(&j, pool)) != ETK_OK) return st;
  if ((st = etk_parallel(pool, plan->nthreads, attn_task, &j, j.ntasks)) != ETK_OK) return st;
  if (plan->second && (st = attn_outputs(&j, pool)) != ETK_OK) return st;
  if (atomic_load_explicit(&j.nonfinite, memory_order_relaxed)) return ETK_NOTE_NONFINITE;
  return atomic_load_explicit(&j.empty, memory_order_relaxed) ? ETK_NOTE_EMPTY_ROWS : ETK_OK;
}
