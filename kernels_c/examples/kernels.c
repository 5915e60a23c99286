/* What libedgetok would use on this machine, and a thread pool at work. */
#include <edgetok/edgetok.h>
#include <stdatomic.h>
#include <stdio.h>

static void add_task(void *arg, int64_t task, int worker) {
  (void)worker;
  atomic_fetch_add((_Atomic int64_t *)arg, task);
}

int main(void) {
  etk_caps caps = {.struct_size = sizeof caps};
  etk_status status = etk_get_caps(&caps);
  if (status != ETK_OK || caps.abi != ETK_ABI) {
    fprintf(stderr, "libedgetok: %s; ABI %u, this program needs %d\n", etk_strerror(status), caps.abi, ETK_ABI);
    return 1;
  }
  printf("libedgetok %s, best instruction set %s\n", etk_version(), etk_isa_name(caps.usable));
  etk_kernel_info kernel = {.struct_size = sizeof kernel};
  for (int32_t i = 0; etk_kernel_at(i, &kernel) == ETK_OK; i++)
    printf("%s %s\n", kernel.usable ? "  runs " : "  needs", kernel.name);

  const etk_pool *pool = NULL;
  status = etk_pool_create(2, 0, &pool);
  if (status != ETK_OK) {
    fprintf(stderr, "no pool: %s\n", etk_strerror(status));
    return 1;
  }
  _Atomic int64_t sum = 0;
  const int failed = pool->parallel_for(pool->ctx, add_task, &sum, 101);
  etk_pool_free(pool);
  printf("0 + 1 + ... + 100 = %lld\n", (long long)sum);
  return failed || sum != 5050;
}
