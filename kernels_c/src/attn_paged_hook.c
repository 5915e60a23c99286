/* kv_layout PAGED: from a plan to the paged driver. */
#include "attn_paged_core.h"
#include "attn_plan.h"

etk_status etk_attn_paged_workspace(const etk_attn_plan *plan, uint64_t *bytes) {
  return etk_paged_workspace(&plan->desc, plan->kernel, plan->nthreads, bytes);
}

etk_status etk_attn_check_paged(const etk_attn_plan *plan, const etk_attn_io *io) {
  return etk_paged_check(&plan->desc, plan->kernel, io);
}

etk_status etk_attn_run_paged(const etk_attn_plan *plan, const etk_attn_io *io, void *ws, uint64_t ws_bytes, const etk_pool *pool) {
  return etk_paged_run(&plan->desc, plan->kernel, plan->nthreads, io, ws, ws_bytes, pool);
}

etk_status etk_attn_colmass_paged(const etk_attn_plan *plan, const etk_attn_io *io, const etk_colmass_desc *colmass,
                                  const etk_tensor *row_weight, etk_tensor *out, void *ws, uint64_t ws_bytes, const etk_pool *pool) {
  (void)plan, (void)io, (void)colmass, (void)row_weight, (void)out, (void)ws, (void)ws_bytes, (void)pool;
  return ETK_E_UNSUPPORTED;
}
