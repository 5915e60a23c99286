/* A matrix product as planned, and the workspace of a run. Internal. */
#ifndef ETK_GEMM_PLAN_H
#define ETK_GEMM_PLAN_H

#include "gemm_packed.h"

enum {
  GEMM_KC = 512,         /* K of a block: 512 x 64 codes are 32 KiB, two thirds of a 48 KiB L1 */
  GEMM_BLOCK_ROWS = 192, /* most rows that share a pass over the weights */
  GEMM_A_BYTES = 655360, /* most codes of A in such a block: it stays in L2 beside the panel */
};

struct etk_gemm_plan {
  etk_gemm_desc desc;
  const etk_gemm_kernel *kernel;
  etk_gemm_geom geom;
  int32_t nthreads;
  int32_t a_code;           /* ETK_S8 or ETK_U8 */
  int32_t s32;              /* one integer sum over all of K */
  int32_t run_len, per_rec; /* codes of a run; runs of a record */
  int64_t runs, k_pad;
};

/* Offsets in the workspace of a run of m rows. */
typedef struct gemm_ws {
  int64_t tiles;
  uint64_t a, start, rsum, as, sa, za, lo, hi;
  uint64_t lanes, lane_bytes, lane_c, lane_w; /* within a lane: codes of a tile at 0, c blocks, widened weights */
  uint64_t bytes;
  int bad;
} gemm_ws;

gemm_ws gemm_ws_of(const etk_gemm_plan *plan, int64_t m);

/* (scale, zero) of values between lo <= 0 and hi >= 0. */
etk_gemm_quant gemm_quant_of(float lo, float hi, int32_t code);

/* Pack the rows of A: codes in tiles, sums of runs, scales. *note: ETK_NOTE_NONFINITE when met. */
ETK_MUST_USE etk_status gemm_pack_a(const etk_gemm_plan *plan, const etk_gemm_io *io, const gemm_ws *at, uint8_t *ws, const etk_pool *pool,
                                    etk_status *note);

#endif
