/* Shared by token matching and merging. Internal. */
#ifndef ETK_OPS_MATCH_H
#define ETK_OPS_MATCH_H

#include "ops_kernel.h"
#include "ops_tensor.h"

/* One sample's plan, dense arrays. */
typedef struct etk_plan_rows {
  int64_t *kept, *removed, *target;
  int64_t m, r;
} etk_plan_rows;

typedef struct etk_match_spec {
  int32_t kind, heads_axis, s8;
  int64_t tokens, width, keep, r;
  float margin, alpha;
} etk_match_spec;

/* Bytes of scratch of match_one and of merge_one. */
uint64_t etk_match_scratch(int64_t tokens, int64_t width);
uint64_t etk_merge_scratch(int64_t m, int64_t r);

etk_status etk_match_check(etk_match_spec *s, const etk_tensor *metric, const etk_tensor *size);
void etk_match_one(const etk_ops_kernel *k, const etk_match_spec *s, const etk_tensor *metric, const etk_tensor *size, int64_t b,
                   const etk_plan_rows *out, void *scratch);

etk_status etk_merge_check(const etk_tensor *x, const etk_tensor *size, int64_t m, const etk_tensor *y, const etk_tensor *size_out,
                           const etk_tensor *map);
void etk_merge_one(const etk_ops_kernel *k, const etk_tensor *x, const etk_tensor *size, int64_t b, const etk_plan_rows *plan,
                   etk_tensor *y, etk_tensor *size_out, etk_tensor *map, void *scratch);

#endif
