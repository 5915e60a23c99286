/* Selection and sorting of ordered keys, in linear time. Internal. */
#ifndef ETK_OPS_ORDER_H
#define ETK_OPS_ORDER_H

#include "edgetok/base.h"

/* The k-th largest of n keys, 1 <= k <= n. */
uint32_t etk_kth_key(const uint32_t *keys, int64_t n, int64_t k);
/* Keep the k largest, equal ones by their order; the order of the kept ones stays. */
void etk_keep_top(uint32_t *keys, int32_t *idx, int64_t n, int64_t k);
/* Sort falling, equal keys in their order. key_tmp and idx_tmp: room for n each. */
void etk_sort_falling(uint32_t *keys, int32_t *idx, int64_t n, uint32_t *key_tmp, int32_t *idx_tmp);

#endif
