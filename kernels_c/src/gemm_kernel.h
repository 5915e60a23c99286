/* What one instruction set provides to the matrix product driver. Internal.
 *
 * Packed weights are panels of nr rows of W (columns of the product). A panel is sums[nr], then one record per group:
 *   scales[nr], offsets[nr] (when weight.offset), codes of the group in the layout of the kernel
 * so that a product with few rows reads one ascending stream. Codes u are unsigned: 0..255 or 0..15. Layout 1 ("quads", shared
 * by the scalar and all x86 kernels, nr = 64): 8 bits [len/4][64 columns][4 k]; 4 bits [len/8][64 columns][4 bytes], the byte's low
 * nibble for k = 0..3 and its high nibble for k = 4..7 of the eight.
 *
 * Activations of a tile of rows <= mr: s8 codes [k/4][rows][4] (layout 4: [k/8][rows][8]; u8 codes less 128), padding 0. */
#ifndef ETK_GEMM_KERNEL_H
#define ETK_GEMM_KERNEL_H

#include "edgetok/gemm.h"

enum { ETK_GEMM_MAX_MR = 16, ETK_GEMM_MAX_NR = 64 };

/* rows x nr outputs over `runs` runs of K. A run is summed in s32; then, f32 tiles,
 *   c = fma(ws as, (f32)S, c), offsets: c = fma(wb as, rsum, c)         (as absent: ws and wb as they are)
 * S = start + sum of (code of the operand) a. Runs lie per_rec to a record; only the last one may be shorter. */
typedef struct etk_gemm_tile {
  int32_t rows;          /* 1..mr */
  int32_t bits;          /* 8 or 4: form of the codes at w */
  int32_t narrow;        /* 1: 8-bit codes that came from 4 bits, 0..15 */
  int32_t runs, per_rec; /* runs >= 1 */
  int32_t len, last_len; /* codes of a run, multiples of 8; len is the only one when runs == 1 == last */
  const int8_t *a;       /* [k/4][rows][4] from the first run on */
  const int32_t *start;  /* [runs][rows] (s32 tiles: [rows]) */
  const float *rsum;     /* [runs][rows], offsets only */
  const float *as;       /* [runs][rows] or NULL */
  const uint8_t *w;      /* codes of the first run */
  const uint8_t *ws;     /* scales of its record: nr f32, or f16 when f16 is 1 */
  const uint8_t *wb;     /* offsets, or NULL */
  int64_t rec_bytes;     /* from a record to the next: for w, ws, wb */
  int32_t f16;
  int32_t first;         /* 1: c and ci are written, not added to (s32: from start) */
  float *c;              /* [rows][nr], 64-byte aligned */
  int32_t *ci;           /* [rows][nr], s32 tiles: one run of len codes at w, added to ci */
} etk_gemm_tile;

/* Turn one tile (two when gated) into rows of the output. */
typedef struct etk_gemm_finish {
  int32_t rows, cols;       /* cols <= nr valid columns */
  int32_t nr, act;
  int32_t gated, out_i32;
  int32_t one;              /* 1: ci holds S of the only group, and ws, wb, rsum are its scales, offsets, row sums */
  int32_t f16;
  float *c[2];
  const int32_t *ci[2];
  const uint8_t *ws[2], *wb[2]; /* wb NULL = none */
  const void *sums[2];      /* [nr] of the panel: one and no wb: s32 sum_k u - centre; else f32 sum_k W */
  const float *rsum;        /* [rows] */
  const float *sa;          /* [rows]; NULL = 1 */
  const int32_t *za;        /* [rows], as of the s8 codes; NULL = all 0 */
  const float *out_scale[2], *bias[2]; /* [cols] or NULL */
  const float *residual;    /* first row, or NULL */
  void *out;
  int64_t residual_stride, out_stride; /* elements */
} etk_gemm_finish;

typedef struct etk_gemm_quant {
  int32_t code;   /* ETK_S8 or ETK_U8 */
  float scale;    /* > 0 */
  int32_t zero;
} etk_gemm_quant;

typedef struct etk_gemm_kernel {
  const char *name;  /* as in kernels.def */
  int32_t isa;       /* ETK_ISA_* */
  int32_t layout;    /* 1 quads; 2 NEON dot, 4 other NEON (gemm_neon_octets.h); recorded in packed weights, so the next ones
                      * also differ from these in two bits: a flipped bit is then no other layout */
  int32_t mr, nr;    /* nr a multiple of 16 */
  int32_t bias8;     /* the 8-bit operand is u - bias8 (0 on x86, 128 where operands are s8); 4-bit operands are u */

  /* Weights: write len codes of one column from k = k0 of its group on into the zeroed codes of the group; k0 is a multiple of 8. */
  void (*lay)(const uint8_t *u, int32_t k0, int32_t len, int32_t column, int32_t bits, uint8_t *codes);
  /* The code at k of a column. */
  int32_t (*code_at)(const uint8_t *codes, int32_t k, int32_t column, int32_t bits);
  /* len 4-bit codes of a panel (a multiple of 8) to the 8-bit form. */
  void (*widen)(const uint8_t *codes, int32_t len, uint8_t *out);

  /* Activations: (lo, hi) of a row with NaN as 0 and without infinities; returns whether any was met. */
  int32_t (*range)(const float *x, int64_t n, float *lo, float *hi);
  /* Quantize n values by a given scale; s8 codes are written (u8 codes less 128). top: what infinities become. */
  void (*quantize)(const float *x, int64_t n, const etk_gemm_quant *quant, float top, int8_t *codes);
  int32_t (*sum)(const int8_t *codes, int64_t n);
  /* Rows of codes (stride bytes apart) to [k/4][rows][4]; k a multiple of 8. */
  void (*lay_a)(const int8_t *codes, int64_t stride, int32_t rows, int64_t k, int8_t *out);

  void (*tile_f32)(const etk_gemm_tile *t);
  void (*tile_s32)(const etk_gemm_tile *t);
  void (*finish)(const etk_gemm_finish *f);
} etk_gemm_kernel;

/* The best kernel at or under isa_cap that this CPU may run and that reads `layout` (0 = any). NULL with *status ETK_E_ISA (the cap cannot
 * run) or ETK_E_UNSUPPORTED (no such layout). */
const etk_gemm_kernel *etk_gemm_kernel_pick(int32_t isa_cap, int32_t layout, etk_status *status);
/* Row i of the table, NULL past the end; rows the CPU cannot run are skipped. For tests. */
ETK_API const etk_gemm_kernel *etk_gemm_kernel_at(int32_t i);

#endif
