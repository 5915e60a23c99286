/* The paged driver's entry, free of the plan: what src/attn_paged_hook.c calls. Internal. */
#ifndef ETK_ATTN_PAGED_CORE_H
#define ETK_ATTN_PAGED_CORE_H

#include "attn_kernel.h"
#include "edgetok/attn.h"

/* Workspace of any run of the plan. */
etk_status etk_paged_workspace(const etk_attn_desc *desc, const etk_attn_kernel *kernel, int32_t nthreads, uint64_t *bytes);
/* The cache against the plan; the most slots of a sequence go to *slots. */
etk_status etk_paged_check_cache(const etk_attn_desc *desc, const etk_attn_kernel *kernel, const etk_attn_io *io, int64_t *slots);
/* Every check of a run over a cache; touches nothing. */
etk_status etk_paged_check(const etk_attn_desc *desc, const etk_attn_kernel *kernel, const etk_attn_io *io);
etk_status etk_paged_run(const etk_attn_desc *desc, const etk_attn_kernel *kernel, int32_t nthreads, const etk_attn_io *io, void *ws,
                         uint64_t ws_bytes, const etk_pool *pool);

#endif
