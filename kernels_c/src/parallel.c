/* Tasks on a pool that may be absent, narrower or wider than the plan, and not ours. */
#include "parallel.h"

#include <stdatomic.h>

typedef struct lanes {
  void (*fn)(void *arg, int64_t task, int worker);
  void *arg;
  int64_t ntasks;
  const etk_pool *pool;
  _Atomic int64_t next;
} lanes;

static int cancelled(const etk_pool *pool) { return pool && pool->cancelled && pool->cancelled(pool->ctx); }

/* A lane is a task of the lent pool and a worker of ours: there are max_workers of them, so that no more can overlap,
 * and a pool that runs them one after the other lets the first do all the work. */
static void run_lane(void *arg, int64_t lane, int worker) {
  (void)worker;
  lanes *l = arg;
  while (!cancelled(l->pool)) {
    const int64_t task = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed);
    if (task >= l->ntasks) return;
    l->fn(l->arg, task, (int)lane);
  }
}

int32_t etk_parallel_width(const etk_pool *pool, int32_t max_workers) {
  if (!pool || !pool->parallel_for || max_workers <= 1) return 1;
  const int n = pool->nthreads ? pool->nthreads(pool->ctx) : max_workers;
  return n < 1 ? 1 : n < max_workers ? n : max_workers;
}

etk_status etk_parallel(const etk_pool *pool, int32_t max_workers, void (*fn)(void *arg, int64_t task, int worker),
                        void *arg, int64_t ntasks) {
  if (ntasks <= 0) return ETK_OK;
  lanes l = {.fn = fn, .arg = arg, .ntasks = ntasks, .pool = pool};
  atomic_init(&l.next, 0);
  const int32_t width = ntasks == 1 ? 1 : etk_parallel_width(pool, max_workers);
  if (width == 1) {
    run_lane(&l, 0, 0);
    return atomic_load_explicit(&l.next, memory_order_relaxed) >= ntasks ? ETK_OK : ETK_E_CANCELLED;
  }
  if (pool->nthreads && pool->nthreads(pool->ctx) <= max_workers) {
    if (cancelled(pool)) return ETK_E_CANCELLED;
    return pool->parallel_for(pool->ctx, fn, arg, ntasks) == 0 ? ETK_OK : ETK_E_CANCELLED;
  }
  const int failed = pool->parallel_for(pool->ctx, run_lane, &l, ntasks < width ? ntasks : width);
  return failed || atomic_load_explicit(&l.next, memory_order_relaxed) < ntasks ? ETK_E_CANCELLED : ETK_OK;
}
