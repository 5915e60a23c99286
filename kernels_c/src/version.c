/* The version and the ABI number. */
#include "edgetok/base.h"

const char *etk_version(void) { return ETK_VERSION; }

uint32_t etk_abi(void) { return ETK_ABI; }
