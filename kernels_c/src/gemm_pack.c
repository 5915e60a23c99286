/* Packing weights into panels, and back to floats. */
#include <stdatomic.h>
#include <string.h>

#include "gemm_source.h"
#include "half.h"
#include "parallel.h"
#include "tensor.h"

enum { CHUNK = 256, MAX_WORKERS = 256 };

typedef struct pack_job {
  gemm_source source;
  const etk_gemm_kernel *kernel;
  const etk_gemm_geom *geom;
  uint8_t *packed;
  _Atomic int32_t failed, note;
} pack_job;

static void put_scale(uint8_t *at, int32_t column, int32_t f16, float x) {
  const uint16_t h = gemm_to_f16(x);
  if (f16) memcpy(at + column * 2, &h, 2);
  else memcpy(at + column * 4, &x, 4);
}

static float get_scale(const uint8_t *at, int32_t column, int32_t f16) {
  uint16_t h;
  float x;
  if (!f16) {
    memcpy(&x, at + column * 4, 4);
    return x;
  }
  memcpy(&h, at + column * 2, 2);
  return etk_f16_to_f32(h);
}

static void pack_column(pack_job *job, int64_t row, int32_t column, uint8_t *panel) {
  const etk_gemm_geom *g = job->geom;
  uint8_t *rec = panel + (int64_t)g->nr * 4;
  int32_t exact = 0; /* cannot wrap: k <= 65536 when it is used */
  float sum = 0.0f;
  for (int64_t i = 0; i < g->groups; i++, rec += g->rec_bytes) {
    const int64_t k0 = i * g->glen, k1 = k0 + g->glen < g->k ? k0 + g->glen : g->k;
    float scale, offset;
    const etk_status status = gemm_source_scale(&job->source, row, i, &scale, &offset);
    if (status < 0) {
      atomic_store_explicit(&job->failed, status, memory_order_relaxed);
      return;
    }
    if (status > 0) atomic_store_explicit(&job->note, status, memory_order_relaxed);
    put_scale(rec, column, g->f16, scale);
    if (g->offset) put_scale(rec + g->scale_bytes, column, g->f16, offset);
    int32_t total = 0;
    for (int64_t k = k0; k < k1; k += CHUNK) {
      uint8_t u[CHUNK];
      const int32_t len = k1 - k < CHUNK ? (int32_t)(k1 - k) : CHUNK;
      gemm_source_codes(&job->source, row, i, k, len, scale, offset, u);
      for (int32_t j = 0; j < len; j++) total += u[j] - g->centre;
      job->kernel->lay(u, (int32_t)(k - k0), len, column, g->bits, rec + g->code_off);
    }
    exact += total;
    sum = __builtin_fmaf(scale, (float)total, sum);
    if (g->offset) sum = __builtin_fmaf(offset, (float)(k1 - k0), sum);
  }
  if (g->one && !g->offset) memcpy(panel + column * 4, &exact, 4);
  else memcpy(panel + column * 4, &sum, 4);
}

static void pack_panel(void *arg, int64_t task, int worker) {
  (void)worker;
  pack_job *job = arg;
  const etk_gemm_geom *g = job->geom;
  const int64_t p = task / g->halves, half = task % g->halves;
  uint8_t *panel = job->packed + etk_gemm_panel_at(g, p, (int32_t)half);
  memset(panel, 0, g->panel_bytes);
  for (int32_t j = 0; j < g->nr && p * g->nr + j < g->n; j++) pack_column(job, half * g->n + p * g->nr + j, j, panel);
}

etk_status etk_gemm_pack(const etk_gemm_weight *given, const etk_gemm_source *source, void *packed, uint64_t bytes,
                         const etk_pool *pool) {
  etk_gemm_weight weight;
  const etk_gemm_kernel *kernel;
  etk_gemm_geom geom;
  etk_status status = etk_gemm_resolve(given, &weight, &kernel, &geom);
  if (status != ETK_OK) return status;
  pack_job job = {.kernel = kernel, .geom = &geom, .packed = packed};
  status = gemm_source_check(source, &geom, &job.source);
  if (status != ETK_OK) return status;
  if (!packed) return ETK_E_NULL;
  if ((uintptr_t)packed % 64) return ETK_E_ALIGN;
  if (bytes < geom.bytes) return ETK_E_OVERFLOW;
  const etk_tensor whole = {.data = packed, .dtype = ETK_U8, .rank = 1, .dim = {(int64_t)geom.bytes}, .stride = {1}};
  if (etk_tensor_overlap(&whole, &job.source.of.codes) || etk_tensor_overlap(&whole, &job.source.of.scales) ||
      etk_tensor_overlap(&whole, &job.source.of.zeros) || etk_tensor_overlap(&whole, &job.source.of.offsets))
    return ETK_E_ALIAS;
  for (int64_t row = 0; job.source.of.format != ETK_W_FLOAT && row < geom.n * geom.halves; row++)
    for (int64_t g = 0; g < geom.groups; g++) { /* nothing is written when a scale does not fit */
      float scale, offset;
      status = gemm_source_scale(&job.source, row, g, &scale, &offset);
      if (status < 0) return status;
    }
  memset(packed, 0, GEMM_HEADER); /* no header until everything is there */
  status = etk_parallel(pool, MAX_WORKERS, pack_panel, &job, geom.panels * geom.halves);
  if (status != ETK_OK) return status;
  if (atomic_load(&job.failed) < 0) return atomic_load(&job.failed);
  etk_gemm_write_header(&weight, kernel, &geom, packed);
  return atomic_load(&job.note);
}

etk_status etk_gemm_unpack(const void *packed, uint64_t bytes, etk_tensor *out) {
  etk_gemm_weight found = {.struct_size = sizeof found}, weight;
  etk_status status = etk_gemm_packed_info(packed, bytes, &found);
  if (status != ETK_OK) return status;
  if (!out) return ETK_E_NULL;
  const etk_gemm_kernel *kernel;
  etk_gemm_geom g;
  status = etk_gemm_resolve(&found, &weight, &kernel, &g);
  if (status != ETK_OK) return status;
  status = etk_tensor_out(out, 2, ETK_DT(ETK_F32));
  if (status != ETK_OK) return status;
  if (out->dim[0] != g.n * g.halves || out->dim[1] != g.k) return ETK_E_SHAPE;
  const etk_tensor whole = {.data = (void *)(uintptr_t)packed, .dtype = ETK_U8, .rank = 1, .dim = {(int64_t)g.bytes}, .stride = {1}};
  if (etk_tensor_overlap(&whole, out)) return ETK_E_ALIAS;
  for (int64_t row = 0; g.k > 0 && row < g.n * g.halves; row++) {
    const int64_t half = row / g.n, at = row % g.n;
    const uint8_t *rec = (const uint8_t *)packed + etk_gemm_panel_at(&g, at / g.nr, (int32_t)half) + (int64_t)g.nr * 4;
    const int32_t column = (int32_t)(at % g.nr);
    float *to = (float *)(void *)((uint8_t *)out->data + row * out->stride[0]);
    for (int64_t k = 0; k < g.k; k++) {
      const uint8_t *r = rec + k / g.glen * (int64_t)g.rec_bytes;
      const float u = (float)(kernel->code_at(r + g.code_off, (int32_t)(k % g.glen), column, g.bits) - g.centre);
      const float offset = g.offset ? get_scale(r + g.scale_bytes, column, g.f16) : 0.0f;
      to[k] = __builtin_fmaf(get_scale(r, column, g.f16), u, offset);
    }
  }
  return ETK_OK;
}
