/* libedgetok: everything. Include this, or only the part you use. */
#ifndef EDGETOK_H
#define EDGETOK_H

#include "edgetok/attn.h"
#include "edgetok/base.h"
#include "edgetok/gemm.h"
#include "edgetok/index.h"
#include "edgetok/kv.h"
#include "edgetok/ops.h"

#endif
