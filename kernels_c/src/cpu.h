/* What the parts ask of the CPU probe. Internal. */
#ifndef ETK_CPU_H
#define ETK_CPU_H

#include "edgetok/base.h"

/* Whether kernels of the ISA token `isa` may run when the bits `usable` (etk_caps) are set. */
int etk_isa_usable(const char *isa, uint32_t usable);

#endif
