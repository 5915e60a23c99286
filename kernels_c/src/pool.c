/* The thread pool: nthreads - 1 workers that spin, then park, beside a caller that works too.
 *
 * A job is a function and a counter; every thread takes the next task until none is left. The caller alone could finish
 * any job, so a worker that wakes late costs nothing: it finds the job closed. Joining and closing meet in one word:
 *
 *   gate = generation << 18 | stop << 17 | open << 16 | workers inside
 *
 * A worker joins by adding one while the job is open; the caller closes it and waits until nobody is inside, after which
 * the plain fields of the job may be written again. A call while another one runs, and a call from inside a task, run
 * serially on their own thread: nothing ever waits for a second job, so no nesting of pools can deadlock. A child of
 * fork has no workers, and everything runs serially there.
 *
 * Workers take over the caller's floating-point environment (rounding, flush to zero), or a result could depend on who
 * computed it. */
#define _POSIX_C_SOURCE 200809L
#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "edgetok/base.h"

enum { k_max_threads = 256, k_default_spin_us = 50, k_max_spin_us = 1000000, k_pauses = 32, k_line = 64 };
#define GATE_INSIDE UINT64_C(0xffff)
#define GATE_OPEN (UINT64_C(1) << 16)
#define GATE_STOP (UINT64_C(1) << 17)
#define GATE_SHIFT 18

typedef void task_fn(void *arg, int64_t task, int worker);

typedef struct pool pool;
typedef struct seat {
  pool *pool;
  pthread_t thread;
  int32_t worker;
} seat;

struct pool {
  etk_pool face;
  int32_t nthreads, started;
  int64_t spin_ns;
  pid_t owner;
  pthread_mutex_t lock;
  pthread_cond_t work, done;
  _Atomic int32_t sleepers; /* workers parked on `work` or about to be */
  _Atomic int32_t waiting;  /* the caller is parked on `done` or about to be */
  _Atomic int32_t busy, cancel;
  /* The job: written while the gate is closed and nobody is inside. */
  task_fn *fn;
  void *arg;
  int64_t ntasks;
  fenv_t env;
  _Alignas(k_line) _Atomic uint64_t gate;
  _Alignas(k_line) _Atomic int64_t next;
  _Alignas(k_line) seat seats[];
};

/* The innermost pool whose task this thread is running. */
static _Thread_local const pool *t_pool;
static _Thread_local int t_worker;

static void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int has_news(const pool *p, uint64_t last) {
  const uint64_t gate = atomic_load_explicit(&p->gate, memory_order_acquire);
  return (gate & GATE_STOP) || ((gate & GATE_OPEN) && gate >> GATE_SHIFT != last);
}

static int nobody_inside(const pool *p, uint64_t unused) {
  (void)unused;
  return (atomic_load_explicit(&p->gate, memory_order_acquire) & GATE_INSIDE) == 0;
}

/* Spin until ready() or the pool's time is over. Yields now and then, for whoever shares the core. */
static int spin(const pool *p, int (*ready)(const pool *, uint64_t), uint64_t last) {
  if (ready(p, last)) return 1;
  if (p->spin_ns == 0) return 0;
  const int64_t end = now_ns() + p->spin_ns;
  do {
    for (int i = 0; i < k_pauses; i++) {
      pause_cpu();
      if (ready(p, last)) return 1;
    }
    sched_yield();
  } while (now_ns() < end);
  return ready(p, last);
}

/* Take tasks until none is left or the call is cancelled. */
static void drain(pool *p, int worker) {
  while (!atomic_load_explicit(&p->cancel, memory_order_relaxed)) {
    const int64_t task = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed);
    if (task >= p->ntasks) return;
    p->fn(p->arg, task, worker);
  }
}

/* Enter the open job that is newer than `last`; returns its generation, 0 when there is none any more. */
static uint64_t join(pool *p, uint64_t last) {
  uint64_t gate = atomic_load_explicit(&p->gate, memory_order_relaxed);
  while (!(gate & GATE_STOP) && (gate & GATE_OPEN) && gate >> GATE_SHIFT != last)
    if (atomic_compare_exchange_weak_explicit(&p->gate, &gate, gate + 1, memory_order_acquire, memory_order_relaxed))
      return gate >> GATE_SHIFT;
  return 0;
}

/* The order "count me in, then look at the gate" against the caller's "open the gate, then look at the count" (both
 * sequentially consistent) is what makes a lost wake-up impossible; the same on the way out with `waiting`. */
static void park(pool *p, uint64_t last) {
  pthread_mutex_lock(&p->lock);
  atomic_fetch_add(&p->sleepers, 1);
  for (;;) {
    const uint64_t gate = atomic_load(&p->gate);
    if ((gate & GATE_STOP) || ((gate & GATE_OPEN) && gate >> GATE_SHIFT != last)) break;
    pthread_cond_wait(&p->work, &p->lock);
  }
  atomic_fetch_sub(&p->sleepers, 1);
  pthread_mutex_unlock(&p->lock);
}

static void leave(pool *p) {
  const uint64_t before = atomic_fetch_sub(&p->gate, 1);
  if ((before & GATE_INSIDE) != 1 || (before & GATE_OPEN) || !atomic_load(&p->waiting)) return;
  pthread_mutex_lock(&p->lock);
  pthread_cond_signal(&p->done);
  pthread_mutex_unlock(&p->lock);
}

static void *worker_main(void *arg) {
  const seat *s = arg;
  pool *p = s->pool;
  t_pool = p;
  t_worker = s->worker;
  for (uint64_t last = 0;;) {
    if (!spin(p, has_news, last)) park(p, last);
    if (atomic_load_explicit(&p->gate, memory_order_acquire) & GATE_STOP) return NULL;
    const uint64_t generation = join(p, last);
    if (generation == 0) continue;
    last = generation;
    fesetenv(&p->env);
    drain(p, s->worker);
    leave(p);
  }
}

static void wake(pool *p, int64_t wanted) {
  int64_t asleep = atomic_load(&p->sleepers);
  if (asleep == 0) return;
  if (asleep > wanted) asleep = wanted;
  pthread_mutex_lock(&p->lock);
  pthread_mutex_unlock(&p->lock); /* whoever counted itself is now waiting, or has seen the open gate */
  for (int64_t i = 0; i < asleep; i++) pthread_cond_signal(&p->work);
}

static void wait_until_left(pool *p) {
  if (spin(p, nobody_inside, 0)) return;
  pthread_mutex_lock(&p->lock);
  atomic_store(&p->waiting, 1);
  while ((atomic_load(&p->gate) & GATE_INSIDE) != 0) pthread_cond_wait(&p->done, &p->lock);
  atomic_store(&p->waiting, 0);
  pthread_mutex_unlock(&p->lock);
}

static int run_serially(pool *p, task_fn *fn, void *arg, int64_t ntasks, int worker) {
  for (int64_t task = 0; task < ntasks; task++) {
    if (atomic_load_explicit(&p->cancel, memory_order_relaxed)) return ETK_E_CANCELLED;
    fn(arg, task, worker);
  }
  return ETK_OK;
}

static int run(void *ctx, task_fn *fn, void *arg, int64_t ntasks) {
  pool *p = ctx;
  if (t_pool == p) return run_serially(p, fn, arg, ntasks, t_worker);
  if (ntasks <= 1 || p->nthreads == 1 || getpid() != p->owner ||
      atomic_exchange_explicit(&p->busy, 1, memory_order_acquire))
    return run_serially(p, fn, arg, ntasks, 0);
  p->fn = fn;
  p->arg = arg;
  p->ntasks = ntasks;
  fegetenv(&p->env);
  atomic_store_explicit(&p->next, 0, memory_order_relaxed);
  const uint64_t generation = (atomic_load_explicit(&p->gate, memory_order_relaxed) >> GATE_SHIFT) + 1;
  atomic_store(&p->gate, generation << GATE_SHIFT | GATE_OPEN);
  wake(p, ntasks - 1);
  const pool *outer = t_pool;
  const int outer_worker = t_worker;
  t_pool = p;
  t_worker = 0;
  drain(p, 0);
  t_pool = outer;
  t_worker = outer_worker;
  atomic_fetch_and(&p->gate, ~GATE_OPEN);
  wait_until_left(p);
  const int all = atomic_load_explicit(&p->next, memory_order_relaxed) >= ntasks;
  atomic_store_explicit(&p->busy, 0, memory_order_release);
  return all ? ETK_OK : ETK_E_CANCELLED;
}

static int width(void *ctx) { return ((const pool *)ctx)->nthreads; }

static int is_cancelled(void *ctx) { return atomic_load_explicit(&((pool *)ctx)->cancel, memory_order_relaxed); }

static void stop_workers(pool *p) {
  atomic_fetch_or(&p->gate, GATE_STOP);
  pthread_mutex_lock(&p->lock);
  pthread_cond_broadcast(&p->work);
  pthread_mutex_unlock(&p->lock);
  for (int32_t i = 0; i < p->started; i++) pthread_join(p->seats[i].thread, NULL);
}

static void destroy(pool *p) {
  pthread_cond_destroy(&p->done);
  pthread_cond_destroy(&p->work);
  pthread_mutex_destroy(&p->lock);
  free(p);
}

/* Workers take no signals: those belong to the threads of the program. */
static int start_workers(pool *p) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int failed = 0;
  while (!failed && p->started < p->nthreads - 1) {
    seat *s = &p->seats[p->started];
    s->pool = p;
    s->worker = p->started + 1;
    failed = pthread_create(&s->thread, NULL, worker_main, s) != 0;
    if (!failed) p->started++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return failed;
}

etk_status etk_pool_create(int32_t nthreads, int32_t spin_us, const etk_pool **out) {
  if (!out) return ETK_E_NULL;
  if (nthreads < 1 || nthreads > k_max_threads || spin_us > k_max_spin_us) return ETK_E_RANGE;
  const size_t bytes = sizeof(pool) + (size_t)(nthreads - 1) * sizeof(seat);
  pool *p = aligned_alloc(k_line, (bytes + k_line - 1) / k_line * k_line);
  if (!p) return ETK_E_MEMORY;
  *p = (pool){.nthreads = nthreads, .owner = getpid()};
  p->face = (etk_pool){.ctx = p, .nthreads = width, .parallel_for = run, .cancelled = is_cancelled};
  p->spin_ns = spin_us < 0 ? 0 : (int64_t)(spin_us == 0 ? k_default_spin_us : spin_us) * 1000;
  pthread_mutex_init(&p->lock, NULL);
  pthread_cond_init(&p->work, NULL);
  pthread_cond_init(&p->done, NULL);
  if (start_workers(p)) {
    stop_workers(p);
    destroy(p);
    return ETK_E_MEMORY;
  }
  *out = &p->face;
  return ETK_OK;
}

void etk_pool_free(const etk_pool *face) {
  if (!face) return;
  pool *p = face->ctx;
  if (getpid() != p->owner) {
    free(p); /* a child of fork: no worker to join, and the lock may be held by a thread that is not here */
    return;
  }
  stop_workers(p);
  destroy(p);
}

void etk_pool_cancel(const etk_pool *face, int32_t on) {
  if (face) atomic_store_explicit(&((pool *)face->ctx)->cancel, on != 0, memory_order_relaxed);
}
