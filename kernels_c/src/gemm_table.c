/* The rows of op gemm in kernels.def, and which of them may run here. */
#include "gemm_kernel.h"

#define ETK_ROW_gemm(isa, name) extern const etk_gemm_kernel etk_##name;
#include "kernel_rows.h"
#undef ETK_ROW_gemm

static const etk_gemm_kernel *const k_rows[] = {
#define ETK_ROW_gemm(isa, name) &etk_##name,
#include "kernel_rows.h"
#undef ETK_ROW_gemm
};
enum { k_count = sizeof k_rows / sizeof k_rows[0] };

/* The CPU feature an ISA number needs; 0 for scalar, ~0 (never there) for an unknown number. */
static uint32_t feature(int32_t isa) {
  switch (isa) {
    case ETK_ISA_SCALAR: return 0;
    case ETK_ISA_AVX2: return ETK_CPU_AVX2;
    case ETK_ISA_AVXVNNI: return ETK_CPU_AVXVNNI;
    case ETK_ISA_AVX512VNNI: return ETK_CPU_AVX512VNNI;
    case ETK_ISA_AVX512VBMI: return ETK_CPU_AVX512VBMI;
    case ETK_ISA_NEON: return ETK_CPU_NEON;
    case ETK_ISA_NEONDOT: return ETK_CPU_NEONDOT;
    case ETK_ISA_NEONI8MM: return ETK_CPU_NEONI8MM;
    default: return ~0u;
  }
}

static int runs(int32_t isa, uint32_t usable) {
  const uint32_t need = feature(isa);
  return need != ~0u && (usable & need) == need;
}

const etk_gemm_kernel *etk_gemm_kernel_pick(int32_t isa_cap, int32_t layout, etk_status *status) {
  etk_caps caps = {.struct_size = sizeof caps};
  *status = etk_get_caps(&caps);
  if (*status != ETK_OK) return NULL;
  *status = ETK_E_ISA;
  if (isa_cap != ETK_ISA_BEST && !runs(isa_cap, caps.usable)) return NULL;
  for (int i = 0; i < k_count; i++) {
    if (!runs(k_rows[i]->isa, caps.usable) || (isa_cap != ETK_ISA_BEST && k_rows[i]->isa > isa_cap)) continue;
    *status = ETK_E_UNSUPPORTED;
    if (layout != 0 && k_rows[i]->layout != layout) continue;
    *status = ETK_OK;
    return k_rows[i];
  }
  return NULL;
}

const etk_gemm_kernel *etk_gemm_kernel_at(int32_t i) {
  etk_caps caps = {.struct_size = sizeof caps};
  if (etk_get_caps(&caps) != ETK_OK) return NULL;
  for (int r = 0; r < k_count; r++)
    if (runs(k_rows[r]->isa, caps.usable) && i-- == 0) return k_rows[r];
  return NULL;
}
