/* Weights as callers bring them, read one group of one row at a time. Internal. */
#ifndef ETK_GEMM_SOURCE_H
#define ETK_GEMM_SOURCE_H

#include "gemm_packed.h"

typedef struct gemm_source {
  etk_gemm_source of;
  const etk_gemm_geom *geom;
  int32_t signed_codes;
} gemm_source;

/* Formats, shapes and types against the geometry. */
ETK_MUST_USE etk_status gemm_source_check(const etk_gemm_source *given, const etk_gemm_geom *geom, gemm_source *out);
/* Scale and offset of group g of a row. ETK_E_RANGE: not exact in the packed form; ETK_NOTE_NONFINITE. */
ETK_MUST_USE etk_status gemm_source_scale(const gemm_source *s, int64_t row, int64_t g, float *scale, float *offset);
/* len <= 256 unsigned codes from column k on, all of group g. */
void gemm_source_codes(const gemm_source *s, int64_t row, int64_t g, int64_t k, int32_t len, float scale, float offset,
                       uint8_t *u);
/* Nearest f16, ties to even; values beyond it become infinity. */
uint16_t gemm_to_f16(float x);

#endif
