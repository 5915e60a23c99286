/* Small operations of a transformer. */
#ifndef EDGETOK_OPS_H
#define EDGETOK_OPS_H

#include "edgetok/base.h"

#endif
