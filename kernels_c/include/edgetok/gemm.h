/* INT8 and INT4 matrix products with packed weights. */
#ifndef EDGETOK_GEMM_H
#define EDGETOK_GEMM_H

#include "edgetok/base.h"

#endif
