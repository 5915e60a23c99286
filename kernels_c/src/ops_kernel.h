/* What one instruction set provides to the small operations. Internal.
 *
 * Every function here is compiled from the same body (ops_*_body.h) over a vector of 16 floats (ops_lanes_*.h): sums run
 * in 16 lanes and are folded by one fixed tree, exponentials are polynomials, nothing is contracted. So every variant
 * gives the same bits; NaN payloads excepted. */
#ifndef ETK_OPS_KERNEL_H
#define ETK_OPS_KERNEL_H

#include "edgetok/base.h"

enum { ETK_SLOTS = 8, ETK_SCAN = 128 /* elements per block of scan_max */ };

/* A batch of rows: slot s of row i starts at at[s] + i * step[s] (bytes). A null slot is absent. */
typedef struct etk_rows {
  int64_t rows, cols;
  char *at[ETK_SLOTS];
  int64_t step[ETK_SLOTS];
  float f[2];
  int32_t i[2];
  int32_t nonfinite; /* out: or-ed */
} etk_rows;

typedef void (*etk_rows_fn)(etk_rows *a);

/* Rotary embedding of heads x tokens rows of width d, rot of them rotated. */
typedef struct etk_rope_arg {
  int64_t tokens, heads;
  const char *x;
  char *y;
  int64_t x_token, x_head, y_token, y_head; /* bytes */
  const char *cos_at, *sin_at;
  int64_t table_step; /* bytes between positions */
  const int64_t *row; /* [tokens] row of the tables, or NULL: first + token */
  int64_t first;
  int32_t d, rot, interleaved;
} etk_rope_arg;

/* Unit rows laid out for similarity; a row of A against 16 rows of B at a time. Sizes: c4 = 4 ceil(c / 4). */
typedef struct etk_sim {
  int64_t rows_a, rows_b; /* true counts; buffers are padded to 16 rows */
  int32_t c, c4, s8;      /* s8: codes instead of floats */
  const float *a;         /* [pad16(rows_a)][c] */
  const float *b;         /* [panels][c][16] */
  const int8_t *qa;       /* [pad16(rows_a)][c4] */
  const int8_t *qb;       /* [panels][c4 / 4][16][4] */
  const float *sa, *sb;   /* scales, padded with 0 */
  const int32_t *rowsum;  /* [pad16(rows_a)] sums of the codes of a row of A */
  const float *pen0, *pen1; /* [pad16(rows_b)] added to a similarity; pen1 for the rows of A with pad_a */
  const uint8_t *pad_a;   /* [rows_a] or NULL */
} etk_sim;

typedef struct etk_ops_kernel {
  const char *name;
  int32_t isa;
  etk_rows_fn norm;     /* 0 x, 1 residual, 2 gamma, 3 beta, 4 y, 5 sum, 6 q s8, 7 scale; f0 eps; i0: 1 = RMS */
  etk_rows_fn softmax;  /* 0 x, 1 float mask, 2 bool mask, 3 y; f0 scale */
  etk_rows_fn gelu;     /* 0 x, 1 y; i0: 1 = tanh form */
  etk_rows_fn silu;     /* 0 x, 1 y */
  etk_rows_fn swiglu;   /* 0 gate, 1 up, 2 y */
  etk_rows_fn add;      /* 0 a, 1 b, 2 y */
  etk_rows_fn exp;      /* 0 x, 1 y; for tests */
  void (*rope)(const etk_rope_arg *a);
  void (*scan_max)(const float *x, int64_t n, uint32_t *keys);  /* one ordered key for each ETK_SCAN elements */
  /* Append to keys and idx every element whose key is at least key_min, by rising index; returns how many. */
  int32_t (*collect)(const float *x, int32_t n, int32_t first, uint32_t key_min, uint32_t *keys, int32_t *idx);
  /* y[c] = mean over heads, divided by its length (at least 1e-6); rows x_row bytes apart, heads x_head bytes apart. */
  void (*unit)(const char *x, int64_t x_row, int64_t x_head, int64_t heads, int64_t rows, int32_t c, float *y);
  /* Codes of rows of floats, one scale each; columns c .. c4-1 are 0. */
  void (*quant)(const float *x, int64_t rows, int32_t c, int32_t c4, int8_t *q, float *scale);
  void (*sim_best)(const etk_sim *a, float *best, int32_t *to); /* each row of A: the largest of sim + penalty, its column */
  /* A and B the same rows: out[i] = mean over j of ELU_alpha(sim - margin), or (form 1) of exp(-((1 - sim) alpha)^2 / 2).
   * out: [pad16(rows_b)], padding unspecified. */
  void (*sim_energy)(const etk_sim *a, int32_t form, float margin, float alpha, float *out);
  /* out = sum of w[j] * row j of x (rows given by address), divided by total. */
  void (*blend)(const float *const *x, const float *w, int32_t n, float total, int64_t cols, float *out);
} etk_ops_kernel;

/* The best kernel here, under EDGETOK_MAX_ISA; NULL: that variable names no ISA. */
const etk_ops_kernel *etk_ops_kernel_pick(void);
/* Row i of the table, rows that this CPU cannot run skipped; NULL past the end. For tests. */
ETK_API const etk_ops_kernel *etk_ops_kernel_at(int32_t i);

/* Order of floats as unsigned integers: NaN above everything, -0 equal to +0. */
static inline uint32_t etk_float_key(float x) {
  if (x != x) return 0xffffffffu;
  union {
    float f;
    uint32_t u;
  } v = {x + 0.0f};
  return v.u & 0x80000000u ? ~v.u : v.u | 0x80000000u;
}
static inline float etk_key_float(uint32_t key) {
  union {
    uint32_t u;
    float f;
  } v = {key & 0x80000000u ? key & 0x7fffffffu : ~key};
  return v.f; /* NaN for 0xffffffff */
}

#endif
