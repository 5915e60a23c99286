/* What one instruction set provides to the KV cache beside its attention kernel. Internal.
 *
 * Every function here is exact or has one rounding, so that all variants agree bit for bit. */
#ifndef ETK_KV_KERNEL_H
#define ETK_KV_KERNEL_H

#include "attn_kernel.h"

/* Rows over the pages of a chunk: the INT8 strip law of attn_kernel.h page after page, tile skipping row by row. */
typedef struct etk_kv_chunk {
  int32_t rows, d, d_pad, dv_pad, n_pages;
  const uint8_t *const *pages;  /* [n_pages], and one more that is only asked for from memory, or NULL */
  const uint64_t *masks;        /* [n_pages][rows] visible slots; NULL = all */
  uint64_t v_scale, k, v;       /* offsets in a page; K scales are at 0 */
  const float *q;               /* [rows][d_pad]; INT4: to be folded; f16: times scale * LOG2E */
  const int8_t *codes;          /* INT8: [rows][d_pad] */
  const int32_t *start;         /* INT8: [rows] */
  const float *gq;              /* INT8: [rows] scale * LOG2E * sq */
  float tau2, skip_log2;
  const uint8_t *p_order;
  float *m, *l, *o;             /* state of the rows, as in etk_strip; INT4 maxima are true ones but for mu_k */
} etk_kv_chunk;

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
  /* All pages of a chunk for any number of rows, layout 1; dv_pad a multiple of 32 for INT4. NULL: not offered here, and the
   * strips of the attention kernel are used instead. */
  void (*chunk_s8)(const etk_kv_chunk *a);
  void (*chunk_s4)(const etk_kv_chunk *a);
  void (*chunk_f16)(const etk_kv_chunk *a); /* l in natural units */
} etk_kv_kernel;

/* The best kernel at or under isa_cap; never NULL: every CPU runs the scalar one. */
const etk_kv_kernel *etk_kv_kernel_pick(int32_t isa_cap);
/* Row i of the table, NULL past the end; for tests. */
ETK_API const etk_kv_kernel *etk_kv_kernel_at(int32_t i);

#endif
