/* Sizes and header of packed weights. Internal. */
#ifndef ETK_GEMM_PACKED_H
#define ETK_GEMM_PACKED_H

#include "gemm_kernel.h"

enum { GEMM_HEADER = 128, GEMM_MAX_ONE = 65536 /* K of a single s32 sum: 65536 x 255 x 128 < 2^31 */ };

/* Where everything lies, computed from the weight's fields and the kernel's panel width alone. */
typedef struct etk_gemm_geom {
  int64_t n, k;              /* of one half */
  int32_t bits, offset, halves, f16, nr, one; /* one: a single group by definition, not by chance */
  int32_t centre;            /* 128 or 8; 0 with offsets */
  int64_t glen, groups;      /* codes of a group (one: k rounded up to 8), groups = ceil(k / glen) */
  int64_t last_glen;         /* of the last group, rounded up to 8 */
  int64_t panels;            /* of one half */
  uint64_t scale_bytes, code_off, rec_bytes, panel_bytes, bytes;
} etk_gemm_geom;

/* ETK_E_STRUCT (version), ETK_E_SHAPE, ETK_E_RANGE, ETK_E_OVERFLOW. */
ETK_MUST_USE etk_status etk_gemm_geometry(const etk_gemm_weight *weight, int32_t nr, etk_gemm_geom *geom);

/* weight as the caller gave it -> checked copy, kernel, geometry. */
ETK_MUST_USE etk_status etk_gemm_resolve(const etk_gemm_weight *given, etk_gemm_weight *weight, const etk_gemm_kernel **kernel,
                                         etk_gemm_geom *geom);

void etk_gemm_write_header(const etk_gemm_weight *weight, const etk_gemm_kernel *kernel, const etk_gemm_geom *geom, void *packed);

/* etk_gemm_packed_info for a kernel already chosen: asking the CPU again may cost more than a small product. NULL: any kernel. */
ETK_MUST_USE etk_status etk_gemm_check_header(const void *packed, uint64_t bytes, const etk_gemm_kernel *kernel, etk_gemm_weight *out);

/* A panel: panel p of half h. Halves alternate, so that a gated product reads one stream. */
static inline uint64_t etk_gemm_panel_at(const etk_gemm_geom *g, int64_t p, int32_t h) {
  return GEMM_HEADER + (uint64_t)(p * g->halves + h) * g->panel_bytes;
}

#endif
