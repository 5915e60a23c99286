/* How every driver runs its tasks, whatever pool the caller lent. Internal. */
#ifndef ETK_PARALLEL_H
#define ETK_PARALLEL_H

#include "edgetok/base.h"

/* Workers that a call with this pool can use: at least 1, at most max_workers. */
int32_t etk_parallel_width(const etk_pool *pool, int32_t max_workers);

/* fn(arg, task, worker) for each task in [0, ntasks), with worker in [0, max_workers) even when the pool is wider; two
 * tasks with the same worker never overlap. ETK_OK when every task ran, ETK_E_CANCELLED otherwise. */
ETK_MUST_USE etk_status etk_parallel(const etk_pool *pool, int32_t max_workers, void (*fn)(void *arg, int64_t task, int worker),
                                     void *arg, int64_t ntasks);

#endif
