/* The table of all kernels by name, for listings and tests: each dispatcher has its own of functions. */
#include <string.h>

#include "cpu.h"

typedef struct row {
  const char *op, *isa, *name;
} row;

#define ETK_ANY(op, isa, name) {#op, #isa, #name},
#if defined(__x86_64__)
#define ETK_X86(op, isa, name) {#op, #isa, #name},
#define ETK_ARM(op, isa, name)
#elif defined(__aarch64__)
#define ETK_X86(op, isa, name)
#define ETK_ARM(op, isa, name) {#op, #isa, #name},
#else
#define ETK_X86(op, isa, name)
#define ETK_ARM(op, isa, name)
#endif
static const row k_rows[] = {
#include "../kernels.def"
    {NULL, NULL, NULL}};

etk_status etk_kernel_at(int32_t i, etk_kernel_info *info) {
  if (!info) return ETK_E_NULL;
  if (info->struct_size != sizeof *info) return ETK_E_STRUCT;
  if (i < 0 || i >= (int32_t)(sizeof k_rows / sizeof *k_rows) - 1) return ETK_E_RANGE;
  etk_caps caps = {.struct_size = sizeof caps};
  const etk_status status = etk_get_caps(&caps);
  if (status != ETK_OK) return status;
  const row *r = &k_rows[i];
  const etk_kernel_info full = {sizeof full, etk_isa_usable(r->isa, caps.usable), r->op, r->isa, r->name};
  memcpy(info, &full, sizeof full);
  return ETK_OK;
}
