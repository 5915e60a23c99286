/* Which variant of the small operations runs here. */
#include <stdatomic.h>

#include "ops_kernel.h"

#define ETK_ROW_ops(isa, name) extern const etk_ops_kernel etk_##name;
#include "kernel_rows.h"
#undef ETK_ROW_ops

#define ETK_ROW_ops(isa, name) &etk_##name,
static const etk_ops_kernel *const k_rows[] = {
#include "kernel_rows.h"
};
#undef ETK_ROW_ops
enum { k_row_count = sizeof k_rows / sizeof k_rows[0] };

static uint32_t bit_of(int32_t isa) {
  switch (isa) {
    case ETK_ISA_AVX2: return ETK_CPU_AVX2;
    case ETK_ISA_AVX512VNNI: return ETK_CPU_AVX512VNNI;
    case ETK_ISA_NEON: return ETK_CPU_NEON;
    default: return 0;
  }
}

static const etk_ops_kernel *at(uint32_t usable, int32_t i) {
  for (int32_t r = 0; r < k_row_count; r++) {
    const uint32_t bit = bit_of(k_rows[r]->isa);
    if ((bit == 0 || (usable & bit)) && i-- == 0) return k_rows[r];
  }
  return NULL;
}

const etk_ops_kernel *etk_ops_kernel_pick(void) {
  static _Atomic(const etk_ops_kernel *) chosen;
  const etk_ops_kernel *k = atomic_load_explicit(&chosen, memory_order_acquire);
  if (k) return k;
  etk_caps caps = {sizeof caps, 0, 0, 0};
  if (etk_get_caps(&caps) != ETK_OK) return NULL;
  k = at(caps.usable, 0);
  atomic_store_explicit(&chosen, k, memory_order_release);
  return k;
}

const etk_ops_kernel *etk_ops_kernel_at(int32_t i) {
  etk_caps caps = {sizeof caps, 0, 0, 0};
  return i < 0 || etk_get_caps(&caps) != ETK_OK ? NULL : at(caps.cpu, i);
}
