/* The KV helpers of each instruction set, best first. */
#include "kv_kernel.h"

#define ETK_ROW_kv(isa, name) extern const etk_kv_kernel etk_##name;
#include "kernel_rows.h"
#undef ETK_ROW_kv

static const etk_kv_kernel *const TABLE[] = {
#define ETK_ROW_kv(isa, name) &etk_##name,
#include "kernel_rows.h"
#undef ETK_ROW_kv
};
enum { ROWS = (int)(sizeof TABLE / sizeof TABLE[0]) };

static int runs(const etk_kv_kernel *k, uint32_t usable) {
  switch (k->isa) {
    case ETK_ISA_SCALAR: return 1;
    case ETK_ISA_AVX2: return (usable & ETK_CPU_AVX2) != 0;
    case ETK_ISA_AVX512VBMI: return (usable & ETK_CPU_AVX512VBMI) != 0;
    case ETK_ISA_AVX512VNNI: return (usable & ETK_CPU_AVX512VNNI) != 0;
    case ETK_ISA_NEON: return (usable & ETK_CPU_NEON) != 0;
    case ETK_ISA_NEONDOT: return (usable & ETK_CPU_NEONDOT) != 0;
    default: return 0;
  }
}

static uint32_t usable(void) {
  etk_caps caps = {.struct_size = sizeof(etk_caps)};
  return etk_get_caps(&caps) == ETK_OK ? caps.usable : 0;
}

const etk_kv_kernel *etk_kv_kernel_pick(int32_t isa_cap) {
  uint32_t have = usable();
  for (int i = 0; i < ROWS; i++)
    if ((isa_cap == ETK_ISA_BEST || TABLE[i]->isa <= isa_cap) && runs(TABLE[i], have)) return TABLE[i];
  return TABLE[ROWS - 1];
}

const etk_kv_kernel *etk_kv_kernel_at(int32_t i) {
  uint32_t have = usable();
  for (int row = 0; row < ROWS; row++)
    if (runs(TABLE[row], have) && i-- == 0) return TABLE[row];
  return 0;
}
