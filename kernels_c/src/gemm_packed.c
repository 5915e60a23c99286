/* Packed weights: geometry, header, the checks that a mapped file must pass. */
#include "gemm_packed.h"

#include <string.h>

#include "checked.h"
#include "tensor.h"

#define MAGIC "ETKGEMM\1"

/* Little-endian, 128 bytes. */
typedef struct header {
  char magic[8];
  uint32_t header_bytes, layout, nr, bias8;
  int32_t bits, group, offset, gated, scale_dtype;
  uint32_t zero;
  int64_t n, k;
  uint64_t bytes;
  uint8_t rest[56];
} header;
_Static_assert(sizeof(header) == GEMM_HEADER, "header of packed weights");

etk_status etk_gemm_geometry(const etk_gemm_weight *w, int32_t nr, etk_gemm_geom *g) {
  if (w->version != 0) return ETK_E_STRUCT;
  if (w->n < 0 || w->k < 0 || w->n > (int64_t)1 << 31 || w->k > (int64_t)1 << 24) return ETK_E_SHAPE;
  if (w->bits != 8 && w->bits != 4) return ETK_E_RANGE;
  if (w->group != 0 && w->group != 16 && w->group != 32 && w->group != 64 && w->group != 128 && w->group != 256) return ETK_E_RANGE;
  if ((w->offset | w->gated) & ~1) return ETK_E_RANGE;
  if (w->scale_dtype != ETK_F32 && w->scale_dtype != ETK_F16) return ETK_E_DTYPE;
  if (w->group == 0 && w->k > GEMM_MAX_ONE) return ETK_E_SHAPE;
  memset(g, 0, sizeof *g);
  g->n = w->n, g->k = w->k, g->bits = w->bits, g->offset = w->offset, g->halves = w->gated ? 2 : 1, g->nr = nr;
  g->f16 = w->scale_dtype == ETK_F16, g->one = w->group == 0, g->centre = w->offset ? 0 : w->bits == 8 ? 128 : 8;
  g->glen = g->one ? (w->k + 7) / 8 * 8 : w->group;
  g->groups = g->one ? 1 : (w->k + g->glen - 1) / g->glen;
  g->last_glen = g->groups == 0 ? 0 : (w->k - (g->groups - 1) * g->glen + 7) / 8 * 8;
  g->panels = (w->n + nr - 1) / nr;
  g->scale_bytes = (uint64_t)nr * (g->f16 ? 2 : 4);
  g->code_off = g->scale_bytes * (uint64_t)(1 + g->offset);
  g->rec_bytes = g->code_off + (uint64_t)(g->glen * nr * g->bits / 8);
  uint64_t panel = (uint64_t)nr * 4, total;
  if (g->groups > 0)
    panel += (uint64_t)(g->groups - 1) * g->rec_bytes + g->code_off + (uint64_t)(g->last_glen * nr * g->bits / 8);
  if (etk_round_up(panel, 64, &g->panel_bytes)) return ETK_E_OVERFLOW;
  if (etk_mul((uint64_t)(g->panels * g->halves), g->panel_bytes, &total) || etk_add(total, GEMM_HEADER, &g->bytes) ||
      g->bytes > INT64_MAX / 2)
    return ETK_E_OVERFLOW;
  return ETK_OK;
}

etk_status etk_gemm_resolve(const etk_gemm_weight *given, etk_gemm_weight *weight, const etk_gemm_kernel **kernel,
                            etk_gemm_geom *geom) {
  etk_status status = etk_struct_in(weight, sizeof *weight, given);
  if (status != ETK_OK) return status;
  if (weight->layout < 0) return ETK_E_RANGE;
  *kernel = etk_gemm_kernel_pick(weight->isa_cap, weight->layout, &status);
  if (!*kernel) return status;
  weight->layout = (*kernel)->layout;
  return etk_gemm_geometry(weight, (*kernel)->nr, geom);
}

etk_status etk_gemm_packed_size(const etk_gemm_weight *given, uint64_t *bytes) {
  if (!bytes) return ETK_E_NULL;
  etk_gemm_weight weight;
  const etk_gemm_kernel *kernel;
  etk_gemm_geom geom = {0};
  const etk_status status = etk_gemm_resolve(given, &weight, &kernel, &geom);
  if (status == ETK_OK) *bytes = geom.bytes;
  return status;
}

void etk_gemm_write_header(const etk_gemm_weight *w, const etk_gemm_kernel *kernel, const etk_gemm_geom *g, void *packed) {
  header h = {.header_bytes = GEMM_HEADER, .layout = (uint32_t)kernel->layout, .nr = (uint32_t)kernel->nr,
              .bias8 = (uint32_t)kernel->bias8, .bits = w->bits, .group = w->group, .offset = w->offset, .gated = w->gated,
              .scale_dtype = w->scale_dtype, .n = w->n, .k = w->k, .bytes = g->bytes};
  memcpy(h.magic, MAGIC, sizeof h.magic);
  memcpy(packed, &h, sizeof h);
}

etk_status etk_gemm_check_header(const void *packed, uint64_t bytes, const etk_gemm_kernel *kernel, etk_gemm_weight *out) {
  if (!packed) return ETK_E_NULL;
  if ((uintptr_t)packed % 64) return ETK_E_ALIGN;
  if (bytes < GEMM_HEADER) return ETK_E_OVERFLOW;
  header h;
  memcpy(&h, packed, sizeof h);
  if (memcmp(h.magic, MAGIC, sizeof h.magic) != 0 || h.header_bytes != GEMM_HEADER || h.zero != 0) return ETK_E_STRUCT;
  for (size_t i = 0; i < sizeof h.rest; i++)
    if (h.rest[i]) return ETK_E_STRUCT;
  if (h.layout == 0 || h.layout > INT32_MAX) return ETK_E_UNSUPPORTED;
  etk_status status;
  if (!kernel) kernel = etk_gemm_kernel_pick(ETK_ISA_BEST, (int32_t)h.layout, &status);
  if (!kernel) return status;
  if (h.layout != (uint32_t)kernel->layout || h.nr != (uint32_t)kernel->nr || h.bias8 != (uint32_t)kernel->bias8) return ETK_E_SHAPE;
  const etk_gemm_weight w = {.struct_size = sizeof w, .n = h.n, .k = h.k, .bits = h.bits, .group = h.group, .offset = h.offset,
                             .gated = h.gated, .scale_dtype = h.scale_dtype, .layout = (int32_t)h.layout};
  etk_gemm_geom geom;
  if (etk_gemm_geometry(&w, kernel->nr, &geom) != ETK_OK || h.bytes != geom.bytes) return ETK_E_SHAPE;
  if (h.bytes > bytes) return ETK_E_OVERFLOW;
  *out = w;
  return ETK_OK;
}

etk_status etk_gemm_packed_info(const void *packed, uint64_t bytes, etk_gemm_weight *out) {
  if (!out) return ETK_E_NULL;
  if (out->struct_size != sizeof *out) return ETK_E_STRUCT;
  return etk_gemm_check_header(packed, bytes, NULL, out);
}
