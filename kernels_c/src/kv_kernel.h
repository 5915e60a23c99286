/* What one instruction set provides to the KV cache beside its attention kernel. Internal.
 *
 * Every function here is exact or has one rounding, so that all variants agree bit for bit. */
#ifndef ETK_KV_KERNEL_H
#define ETK_KV_KERNEL_H

#include "edgetok/base.h"

typedef struct etk_kv_kernel {
  const char *name; /* as in kernels.def */
  int32_t isa;
  /* y = f32(f16(x)), h = f16(x), either may be NULL; nearest even; NaN is 0, beyond 65504 is 65504. Returns whether any
   * value was NaN, infinite or beyond. y may be x. */
  int32_t (*round_f16)(const float *x, int64_t n, uint16_t *h, float *y);
  void (*widen_f16)(const uint16_t *h, int64_t n, float *y);
  /* Unpack nibbles: dst byte = (nibble + bias) & 255; chunks of 64 bytes as in kv_cache.h. bytes: of src, a multiple of 64. */
  void (*expand4)(const uint8_t *src, int64_t bytes, int32_t bias, uint8_t *dst);
  /* Requantize one query row for an INT4 page: x = q[c] s[c] over d channels; codes[d_pad] s8 (padding 0) with the scale
   * max|x| / 127 (1 for an all-zero row), returned; *start = -128 sum(codes) for u8 layouts, else 0;
   * *dot = sum q[c] (z[c] + 8 s[c]), added in 16 interleaved f32 sums and a fixed tree (kv_fold_tree). */
  float (*fold_q4)(const float *q, const uint16_t *s, const uint16_t *z, int32_t d_pad, int32_t u8_layout, int8_t *codes,
                   int32_t *start, float *dot);
} etk_kv_kernel;

/* The best kernel at or under isa_cap; never NULL: every CPU runs the scalar one. */
const etk_kv_kernel *etk_kv_kernel_pick(int32_t isa_cap);
/* Row i of the table, NULL past the end; for tests. */
ETK_API const etk_kv_kernel *etk_kv_kernel_at(int32_t i);

#endif
