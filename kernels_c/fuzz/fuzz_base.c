/* The base header: the probe, the table, the pool's arguments. */
#include "fuzz.h"

static void count_task(void *arg, int64_t task, int worker) {
  (void)worker;
  *(int64_t *)arg += task + 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  fuzz f = {.data = data, .size = size};
  const etk_caps plain = {.struct_size = sizeof plain};
  etk_caps *caps = fuzz_struct(&f, &plain, sizeof plain);
  const etk_status st = etk_get_caps(caps);
  FUZZ_CHECK(st == ETK_OK || st == ETK_E_STRUCT);
  const etk_kernel_info none = {.struct_size = sizeof none};
  etk_kernel_info *info = fuzz_struct(&f, &none, sizeof none);
  (void)!etk_kernel_at((int32_t)fuzz_number(&f), info);
  FUZZ_CHECK(etk_strerror((etk_status)fuzz_number(&f)) != NULL);
  const etk_pool *pool = NULL;
  const int32_t threads = (int32_t)(fuzz_rarely(&f) ? fuzz_number(&f) : 1);
  if (threads <= 4 && etk_pool_create(threads, (int32_t)fuzz_number(&f), &pool) == ETK_OK && threads == 1) {
    const int64_t ntasks = fuzz_upto(&f, 40);
    int64_t sum = 0;
    FUZZ_CHECK(pool->parallel_for(pool->ctx, count_task, &sum, ntasks) == 0 && sum == ntasks * (ntasks + 1) / 2);
  }
  etk_pool_free(pool);
  fuzz_free(&f);
  return 0;
}
