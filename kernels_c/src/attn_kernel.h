/* What one instruction set provides to the attention driver. Internal.
 *
 * A page is 64 keys of one KV head. A strip is up to mr query rows. The driver walks (query block of 64 rows) x (listed
 * pages), pages outside, strips inside, so that a page stays in L1 while the strips of the block pass over it.
 *
 * One strip over one page, INT8 (the law; every variant gives the same S, P and integer sums bit for bit):
 *   S[i,j] = sum_c q[i,c] k[j,c]                                   s32, exact
 *   Smax   = max over visible j;  mt = (f32)Smax * g[i]            log2 units; no visible key: the row is left alone
 *   P[i,j] = LUT[rint(min((f32)(Smax - S[i,j]) * (28 * g[i]), 255))], masked: 0;   LUT[x] = rint(p_max 2^(-x/28)), LUT[255] = 0
 *   mn = max(m[i], mt);  a = 2^(m[i] - mn);  w = 2^(mt - mn)
 *   l[i] = a l[i] + w sum_j P[i,j];   O[i,:] = a O[i,:] + (w sv[:]) (f32)(sum_j P[i,j] v[j,:]);   m[i] = mn
 * Floating-point contraction is off in index arithmetic: S * (28 g) is one product of f32 values. */
#ifndef ETK_ATTN_KERNEL_H
#define ETK_ATTN_KERNEL_H

#include "edgetok/base.h"

enum { ETK_PAGE = 64, ETK_MAX_MR = 16, ETK_HEAD_UNIT = 16 /* d and dv are padded to this */, ETK_STEP = 28 };

/* Groups whose largest magnitude is below this count as zero: 1/scale would overflow. */
#define ETK_TINY 0x1p-119f

/* Bytes of a page's codes are d_pad * 64 (K) and dv_pad * 64 (V) in every INT8 layout. Float pages: K [d_pad][64] f32,
 * V [64][dv_pad] f32, in every ISA. Pages are 64-byte aligned. Padding keys have code 0 (u8 layouts: 128). */

typedef struct etk_strip {
  int32_t rows, d_pad, dv_pad; /* 1 <= rows <= mr */
  /* INT8 QK */
  const int8_t *q;        /* [rows][d_pad] codes, dense, padding 0 */
  const int32_t *q_start; /* [rows] where the accumulators start: -128 sum(q) for u8 K layouts, else 0 (from quant_q) */
  const void *k;          /* packed page: s8 codes, or f32 for the float kernels */
  const float *g;         /* [rows] log2 units per integer step, ((scale*LOG2E)*sq[i])*sk; float kernels: unused */
  /* float QK */
  const float *qf;        /* [rows][d_pad], already times scale*LOG2E */
  /* PV */
  const void *v;          /* packed page: s8 codes, or f32 */
  const float *sv;        /* [dv_pad] V scales (INT8) */
  const int32_t *v_colsum;/* [dv_pad] sums of the V codes over the 64 keys; layouts with needs_colsum only */
  const uint64_t *mask;   /* [rows] bit j = key j visible; NULL = all 64 */
  /* running state */
  float *o;               /* [rows][dv_pad] */
  float *m;               /* [rows] log2 units, starts at -inf */
  float *l;               /* [rows] starts at 0; INT8: in units of P */
  float skip_log2;        /* 0 = off; else leave the strip's PV out when mt < m - skip_log2 in every row */
} etk_strip;

typedef struct etk_attn_kernel {
  const char *name;       /* as in kernels.def */
  int32_t isa;            /* ETK_ISA_* */
  int32_t mr;             /* rows of a full strip */
  int32_t p_max;          /* 255; 127 on AVX2 without VNNI */
  int32_t layout;         /* number of the INT8 page layout: 0 row-major, 1 x86 quads u8, 2 AVX2, 3 NEON dot, 4 NEON i8mm,
                           * 5 NEON without either */
  int32_t needs_colsum;
  const uint8_t *p_order; /* [64]: byte b of a row of P belongs to key p_order[b]; NULL = identity */

  /* Quantize one row: codes[d_pad] s8, returns the scale s. top = largest finite |x|; top < ETK_TINY: s = 1, codes 0; else
   * s = top / 127, code = clamp(rint(x (1/s)), -127, 127). NaN maps to 0, infinities to +-top; *nonfinite is or-ed.
   * *start = q_start. */
  float (*quant_q)(const float *x, int32_t d, int32_t d_pad, int8_t *codes, int32_t *start, int32_t *nonfinite);
  /* Quantize and lay out n <= 64 keys (rows of f32, stride in floats), less mu[d] (or NULL), one scale per page:
   * returned. Rows n..63 are padding. */
  float (*pack_k)(const float *x, int64_t stride, int32_t n, int32_t d, int32_t d_pad, const float *mu, void *page,
                  int32_t *nonfinite);
  /* The same for V with one scale per channel: sv[dv_pad] (padding channels 1), colsum[dv_pad] when not NULL. f16_scales:
   * round the scales to f16 (etk_scale_f16 of half.h) before quantizing with them. */
  void (*pack_v)(const float *x, int64_t stride, int32_t n, int32_t dv, int32_t dv_pad, const float *mu, void *page,
                 float *sv, int32_t *colsum, int32_t f16_scales, int32_t *nonfinite);
  /* Row-major s8 codes [64][d_pad] to and from the layout (INT4 pages, save and load, tests). */
  void (*lay_k)(const int8_t *codes, int32_t d_pad, void *page);
  void (*lay_v)(const int8_t *codes, int32_t dv_pad, void *page);
  void (*read_k)(const void *page, int32_t d_pad, int8_t *codes);
  void (*read_v)(const void *page, int32_t dv_pad, int8_t *codes);

  void (*strip_s8)(const etk_strip *a);                                  /* all of the law above */
  /* strip_s8 and strip_f32 for any number of rows at once; NULL when that would gain nothing over strips of mr rows. */
  void (*block_s8)(const etk_strip *a);
  void (*block_f32)(const etk_strip *a);
  void (*qk_s8)(const etk_strip *a, int32_t *s);                         /* s[rows][64], natural key order */
  /* The general softmax: y[rows][64] logits in log2 units, -inf = masked; updates m and l, scales o by a, writes P in
   * p_order and w[rows] (0 for a row without a visible key, whose P is 0). */
  void (*softmax_u8)(const etk_strip *a, const float *y, uint8_t *p, float *w);
  void (*pv_s8)(const etk_strip *a, const uint8_t *p, const float *w);   /* o += (w sv) (P V) */

  void (*strip_f32)(const etk_strip *a);                                 /* QK, softmax (POLY exp2), PV, all f32 */
  void (*qk_f32)(const etk_strip *a, float *y);                          /* y[rows][64] log2 units */
  void (*softmax_f32)(const etk_strip *a, const float *y, float *p);     /* updates m, l, o; p[rows][64] relative to the new m */
  void (*pv_f32)(const etk_strip *a, const float *p);                    /* o += P V */
} etk_attn_kernel;

/* The best kernel at or under isa_cap that this CPU may run; NULL and *status = ETK_E_ISA when the cap itself cannot run. */
const etk_attn_kernel *etk_attn_kernel_pick(int32_t isa_cap, etk_status *status);
/* Row i of the table, NULL past the end; rows the CPU cannot run are skipped. For tests. */
ETK_API const etk_attn_kernel *etk_attn_kernel_at(int32_t i);

#endif
