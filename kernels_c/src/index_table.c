/* Which index kernels exist and which one runs here. */
#include <stddef.h>

#include "index_kernel.h"

#define ETK_ROW_index(isa, name) extern const etk_index_kernel etk_##name;
#include "kernel_rows.h"
#undef ETK_ROW_index

static const etk_index_kernel *const k_table[] = {
#define ETK_ROW_index(isa, name) &etk_##name,
#include "kernel_rows.h"
#undef ETK_ROW_index
};
enum { COUNT = sizeof k_table / sizeof k_table[0] };

static int runs(const etk_index_kernel *kernel, uint32_t usable) {
  switch (kernel->isa) {
    case ETK_ISA_SCALAR: return 1;
    case ETK_ISA_AVX2: return (usable & ETK_CPU_AVX2) != 0;
    case ETK_ISA_AVX512VNNI: return (usable & ETK_CPU_AVX512VNNI) != 0;
    case ETK_ISA_NEON: return (usable & ETK_CPU_NEON) != 0;
    case ETK_ISA_NEONDOT: return (usable & ETK_CPU_NEONDOT) != 0;
    default: return 0;
  }
}

const etk_index_kernel *etk_index_kernel_pick(void) {
  etk_caps caps = {.struct_size = sizeof caps};
  if (etk_get_caps(&caps) != ETK_OK) return NULL;
  for (int i = 0; i < COUNT; i++)
    if (runs(k_table[i], caps.usable)) return k_table[i];
  return NULL;
}

const etk_index_kernel *etk_index_kernel_at(int32_t at) {
  etk_caps caps = {.struct_size = sizeof caps};
  if (etk_get_caps(&caps) != ETK_OK) return NULL;
  for (int i = 0; i < COUNT; i++)
    if (runs(k_table[i], caps.usable) && at-- == 0) return k_table[i];
  return NULL;
}
