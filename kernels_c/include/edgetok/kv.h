/* Paged INT8 and INT4 KV caches. */
#ifndef EDGETOK_KV_H
#define EDGETOK_KV_H

#include "edgetok/base.h"

#endif
