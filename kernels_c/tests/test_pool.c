/* The pool: every task once, whatever the width, the nesting, the caller and the moment of a cancel. Built for TSan too. */
#define _POSIX_C_SOURCE 200809L
#include <fenv.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "edgetok/base.h"
#include "parallel.h"

static _Atomic int g_failures;
#define CHECK(cond, ...)                            \
  do {                                              \
    if (!(cond)) {                                  \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond); \
      fprintf(stderr, __VA_ARGS__);                 \
      fputc('\n', stderr);                          \
      atomic_fetch_add(&g_failures, 1);             \
    }                                               \
  } while (0)

static const etk_pool *make(int32_t nthreads, int32_t spin_us) {
  const etk_pool *pool = NULL;
  const etk_status status = etk_pool_create(nthreads, spin_us, &pool);
  CHECK(status == ETK_OK, "create(%d, %d) gave %d", nthreads, spin_us, status);
  if (status != ETK_OK) exit(1);
  return pool;
}

enum { k_most = 5000, k_workers = 256 };
typedef struct tally {
  int64_t ntasks;
  int32_t width;
  unsigned char count[k_most]; /* plain bytes: two runs of one task are a data race for TSan as well */
  _Atomic int32_t inside[k_workers];
} tally;

static void count_task(void *arg, int64_t task, int worker) {
  tally *t = arg;
  CHECK(task >= 0 && task < t->ntasks, "task %lld", (long long)task);
  CHECK(worker >= 0 && worker < t->width, "worker %d of %d", worker, t->width);
  CHECK(atomic_fetch_add(&t->inside[worker], 1) == 0, "worker %d runs two tasks at once", worker);
  t->count[task]++;
  atomic_fetch_sub(&t->inside[worker], 1);
}

static void check_counts(const tally *t, const char *what) {
  for (int64_t i = 0; i < t->ntasks; i++)
    CHECK(t->count[i] == 1, "%s: task %lld of %lld ran %d times", what, (long long)i, (long long)t->ntasks, t->count[i]);
}

static void run_once(const etk_pool *pool, int64_t ntasks, const char *what) {
  tally *t = calloc(1, sizeof *t);
  t->ntasks = ntasks;
  t->width = pool->nthreads(pool->ctx);
  CHECK(pool->parallel_for(pool->ctx, count_task, t, ntasks) == 0, "%s", what);
  check_counts(t, what);
  free(t);
}

static void test_every_task_runs_once(void) {
  const int32_t widths[] = {1, 2, 3, 8}, spins[] = {-1, 0, 200};
  const int64_t sizes[] = {0, 1, 2, 3, 7, 8, 9, 64, 1000, k_most};
  for (size_t w = 0; w < 4; w++)
    for (size_t s = 0; s < 3; s++) {
      const etk_pool *pool = make(widths[w], spins[s]);
      CHECK(pool->nthreads(pool->ctx) == widths[w], "width");
      for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) run_once(pool, sizes[i], "sizes");
      etk_pool_free(pool);
    }
}

static void test_bad_arguments_are_refused(void) {
  const etk_pool *pool = NULL;
  CHECK(etk_pool_create(1, 0, NULL) == ETK_E_NULL, "null");
  CHECK(etk_pool_create(0, 0, &pool) == ETK_E_RANGE && !pool, "0 threads");
  CHECK(etk_pool_create(257, 0, &pool) == ETK_E_RANGE && !pool, "257 threads");
  CHECK(etk_pool_create(2, 1000001, &pool) == ETK_E_RANGE && !pool, "spin");
  etk_pool_free(NULL);
  etk_pool_cancel(NULL, 1);
}

/* Jobs after pauses of every length: workers spin, are about to park, are parked. */
static void test_wakes_after_pauses(void) {
  const etk_pool *pool = make(3, 20);
  for (int i = 0; i < 400; i++) {
    const struct timespec nap = {0, (long)(i % 9) * 7000};
    if (i % 3) nanosleep(&nap, NULL);
    run_once(pool, 1 + i % 17, "pauses");
  }
  etk_pool_free(pool);
}

typedef struct present {
  _Atomic int32_t met[8];
} present;

static void long_task(void *arg, int64_t task, int worker) {
  (void)task;
  const struct timespec nap = {0, 10000000};
  nanosleep(&nap, NULL);
  atomic_store(&((present *)arg)->met[worker], 1);
}

/* The caller could do all the work alone; parked workers must come all the same. */
static void test_parked_workers_take_part(void) {
  const etk_pool *pool = make(3, -1);
  const struct timespec nap = {0, 20000000};
  nanosleep(&nap, NULL);
  present who = {0};
  CHECK(pool->parallel_for(pool->ctx, long_task, &who, 24) == 0, "long tasks");
  CHECK(atomic_load(&who.met[0]) && (atomic_load(&who.met[1]) || atomic_load(&who.met[2])), "nobody woke up");
  etk_pool_free(pool);
}

static void test_created_and_freed_at_once(void) {
  for (int i = 0; i < 50; i++) {
    const etk_pool *pool = make(4, i % 2 ? -1 : 0);
    if (i % 3 == 0) run_once(pool, 5, "short life");
    etk_pool_free(pool);
  }
}

typedef struct nest {
  const etk_pool *inner;
  int through_another;
  _Atomic int64_t total;
} nest;
typedef struct nest_inner {
  nest *n;
  pthread_t self;
  int64_t next;
  int worker; /* of the outer task, when it runs on the same pool; -1 = not known */
} nest_inner;

static void inner_task(void *arg, int64_t task, int worker) {
  nest_inner *in = arg;
  CHECK(in->worker < 0 || in->worker == worker, "a nested call on worker %d became worker %d", in->worker, worker);
  CHECK(pthread_equal(in->self, pthread_self()), "a nested call left its thread");
  CHECK(task == in->next, "a nested call is not in order");
  in->next++;
  atomic_fetch_add(&in->n->total, 1);
}

static void outer_task(void *arg, int64_t task, int worker) {
  nest *n = arg;
  const struct timespec nap = {0, 100000};
  if (task < 3) nanosleep(&nap, NULL); /* so that workers get a share */
  nest_inner in = {n, pthread_self(), 0, n->through_another ? -1 : worker};
  CHECK(n->inner->parallel_for(n->inner->ctx, inner_task, &in, 10) == 0, "nested");
}

static void middle_task(void *arg, int64_t task, int worker) { /* through another pool and back */
  (void)task;
  (void)worker;
  void **both = arg;
  const etk_pool *second = both[1];
  CHECK(second->parallel_for(second->ctx, outer_task, both[0], 4) == 0, "middle");
}

static void test_nested_calls_run_serially_and_cannot_deadlock(void) {
  const etk_pool *a = make(3, 0), *b = make(3, 0);
  for (int i = 0; i < 50; i++) {
    nest n = {.inner = a};
    CHECK(a->parallel_for(a->ctx, outer_task, &n, 6) == 0, "outer");
    CHECK(atomic_load(&n.total) == 60, "total %lld", (long long)atomic_load(&n.total));
    n.through_another = 1;
    void *both[2];
    both[0] = &n;
    memcpy(&both[1], &b, sizeof b);
    CHECK(a->parallel_for(a->ctx, middle_task, both, 5) == 0, "a, b, a");
    CHECK(atomic_load(&n.total) == 260, "total %lld", (long long)atomic_load(&n.total));
  }
  etk_pool_free(a);
  etk_pool_free(b);
}

static void *caller_main(void *arg) {
  for (int i = 0; i < 200; i++) run_once(arg, 1 + i % 40, "concurrent callers");
  return NULL;
}

static void test_concurrent_callers(void) {
  const etk_pool *pool = make(3, 5);
  void *arg;
  memcpy(&arg, &pool, sizeof arg);
  pthread_t callers[4];
  for (int i = 0; i < 4; i++) CHECK(pthread_create(&callers[i], NULL, caller_main, arg) == 0, "thread");
  for (int i = 0; i < 4; i++) pthread_join(callers[i], NULL);
  etk_pool_free(pool);
}

typedef struct cancel_at {
  const etk_pool *pool;
  int64_t at;
  _Atomic int64_t ran;
} cancel_at;

static void cancelling_task(void *arg, int64_t task, int worker) {
  (void)worker;
  cancel_at *c = arg;
  atomic_fetch_add(&c->ran, 1);
  if (task == c->at) etk_pool_cancel(c->pool, 1);
}

static void test_cancel_stops_and_is_taken_back(void) {
  const int32_t widths[] = {1, 3};
  for (size_t w = 0; w < 2; w++) {
    const etk_pool *pool = make(widths[w], 0);
    cancel_at c = {.pool = pool, .at = 3};
    CHECK(pool->cancelled(pool->ctx) == 0, "fresh");
    CHECK(etk_parallel(pool, 256, cancelling_task, &c, INT64_C(1) << 40) == ETK_E_CANCELLED, "status");
    CHECK(pool->cancelled(pool->ctx) != 0, "flag");
    CHECK(atomic_load(&c.ran) > 3 && atomic_load(&c.ran) < INT64_C(1) << 30, "ran %lld", (long long)atomic_load(&c.ran));
    atomic_store(&c.ran, 0);
    CHECK(etk_parallel(pool, 256, cancelling_task, &c, 100) == ETK_E_CANCELLED, "later calls");
    CHECK(atomic_load(&c.ran) == 0, "a task ran after the cancel");
    etk_pool_cancel(pool, 0);
    run_once(pool, 100, "after the cancel");
    etk_pool_free(pool);
  }
}

/* Pools that are not ours. */
static int reverse_for(void *ctx, void (*fn)(void *, int64_t, int), void *arg, int64_t ntasks) {
  const int width = *(int *)ctx;
  for (int64_t i = ntasks - 1; i >= 0; i--) fn(arg, i, (int)(i % width));
  return 0;
}
static int failing_for(void *ctx, void (*fn)(void *, int64_t, int), void *arg, int64_t ntasks) {
  (void)ctx;
  if (ntasks) fn(arg, 0, 0);
  return 1;
}
static int give_width(void *ctx) { return *(int *)ctx; }

static void test_lent_pools(void) {
  int widths[] = {-3, 0, 1, 4, 100};
  for (size_t i = 0; i < 5; i++) {
    const etk_pool pools[] = {{.ctx = &widths[i], .nthreads = give_width, .parallel_for = reverse_for},
                              {.ctx = &widths[3], .parallel_for = reverse_for},
                              {.ctx = &widths[3], .nthreads = give_width}};
    for (size_t p = 0; p < 3; p++)
      for (int32_t most = 1; most <= 6; most += 5) {
        tally *t = calloc(1, sizeof *t);
        t->ntasks = 50;
        t->width = most;
        CHECK(etk_parallel_width(&pools[p], most) >= 1 && etk_parallel_width(&pools[p], most) <= most, "width");
        CHECK(etk_parallel(&pools[p], most, count_task, t, 50) == ETK_OK, "lent pool");
        check_counts(t, "lent pool");
        free(t);
      }
  }
  tally *t = calloc(1, sizeof *t);
  t->ntasks = 9;
  t->width = 4;
  const etk_pool failing = {.ctx = &widths[3], .nthreads = give_width, .parallel_for = failing_for};
  CHECK(etk_parallel(&failing, 4, count_task, t, 9) == ETK_E_CANCELLED, "a pool that fails");
  memset(t->count, 0, sizeof t->count);
  CHECK(etk_parallel(NULL, 4, count_task, t, 9) == ETK_OK, "no pool");
  check_counts(t, "no pool");
  CHECK(etk_parallel(NULL, 4, count_task, t, 0) == ETK_OK && etk_parallel(NULL, 4, count_task, t, -1) == ETK_OK, "none");
  free(t);
}

/* Our pool, wider than the plan: workers are numbered below the plan's, and never two at once. */
static void test_wider_pool_than_plan(void) {
  const etk_pool *pool = make(6, 0);
  for (int i = 0; i < 100; i++) {
    tally *t = calloc(1, sizeof *t);
    t->ntasks = 200;
    t->width = 2;
    CHECK(etk_parallel(pool, 2, count_task, t, 200) == ETK_OK, "wider");
    check_counts(t, "wider");
    free(t);
  }
  etk_pool_free(pool);
}

static void rounding_task(void *arg, int64_t task, int worker) {
  (void)arg;
  (void)worker;
  CHECK(fegetround() == FE_UPWARD, "task %lld runs with another rounding than its caller", (long long)task);
  const struct timespec nap = {0, 200000};
  nanosleep(&nap, NULL); /* so that workers get a share */
}

static void test_workers_take_the_callers_float_environment(void) {
#if defined(FE_UPWARD)
  const etk_pool *pool = make(3, 0);
  fesetround(FE_UPWARD);
  CHECK(pool->parallel_for(pool->ctx, rounding_task, NULL, 12) == 0, "rounding");
  fesetround(FE_TONEAREST);
  etk_pool_free(pool);
#endif
}

static void test_child_of_fork_runs_serially(void) {
#if defined(__SANITIZE_THREAD__)
  return; /* TSan does not follow fork in a process with threads */
#endif
  const etk_pool *pool = make(3, 0);
  run_once(pool, 100, "before fork");
  fflush(NULL);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20); /* a lock that nobody holds any more would hang */
    atomic_store(&g_failures, 0);
    for (int i = 0; i < 10; i++) run_once(pool, 100, "in the child");
    etk_pool_free(pool);
    if (!getenv("EDGETOK_EMULATED")) { /* qemu-user 7.2 aborts when the child of a threaded process starts a thread */
      const etk_pool *own = make(2, 0);
      run_once(own, 100, "the child's own pool");
      etk_pool_free(own);
    }
    _exit(atomic_load(&g_failures) != 0);
  }
  int status = 0;
  CHECK(child > 0 && waitpid(child, &status, 0) == child, "fork");
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %d", status);
  run_once(pool, 100, "after fork");
  etk_pool_free(pool);
}

int main(void) {
  test_bad_arguments_are_refused();
  test_every_task_runs_once();
  test_wakes_after_pauses();
  test_parked_workers_take_part();
  test_created_and_freed_at_once();
  test_nested_calls_run_serially_and_cannot_deadlock();
  test_concurrent_callers();
  test_cancel_stops_and_is_taken_back();
  test_lent_pools();
  test_wider_pool_than_plan();
  test_workers_take_the_callers_float_environment();
  test_child_of_fork_runs_serially();
  return atomic_load(&g_failures) != 0;
}
