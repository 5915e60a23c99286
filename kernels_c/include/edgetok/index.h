/* Builders of sparse block indices. */
#ifndef EDGETOK_INDEX_H
#define EDGETOK_INDEX_H

#include "edgetok/base.h"

#endif
