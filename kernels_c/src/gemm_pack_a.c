/* The A side of a matrix product: quantize rows, sum their runs, lay them out in tiles; and the public quantizer. */
#include <float.h>
#include <stdatomic.h>
#include <string.h>

#include "gemm_plan.h"
#include "parallel.h"
#include "tensor.h"

typedef struct pack_job {
  const etk_gemm_plan *plan;
  const etk_gemm_io *io;
  const gemm_ws *at;
  uint8_t *ws;
  etk_gemm_quant whole; /* ETK_A_TENSOR and ETK_A_STATIC */
  float top;
  _Atomic int32_t bad;
} pack_job;

#define AT(type, offset) ((type *)(void *)(job->ws + (offset)))

static int64_t rows_of(const pack_job *job, int64_t tile) {
  const int64_t mr = job->plan->kernel->mr, left = job->io->a.dim[0] - tile * mr;
  return left < mr ? left : mr;
}

/* An empty tensor may have no data: arithmetic on a null pointer is undefined even by zero. */
static const uint8_t *row_at(const etk_tensor *t, int64_t row) {
  return t->data ? (const uint8_t *)t->data + row * t->stride[0] : NULL;
}

static void range_tile(void *arg, int64_t tile, int worker) {
  (void)worker;
  pack_job *job = arg;
  const etk_gemm_kernel *kernel = job->plan->kernel;
  for (int64_t r = 0; r < rows_of(job, tile); r++) {
    const int64_t row = tile * kernel->mr + r;
    const float *x = (const float *)(const void *)row_at(&job->io->a, row);
    if (kernel->range(x, job->plan->geom.k, AT(float, job->at->lo) + row, AT(float, job->at->hi) + row))
      atomic_store_explicit(&job->bad, 1, memory_order_relaxed);
  }
}

/* One float row: codes, scale and zero; group scales to as (every rows-th element). */
static void float_row(pack_job *job, const float *x, int8_t *codes, etk_gemm_quant *quant, float *as, int64_t as_step) {
  const etk_gemm_plan *p = job->plan;
  const int64_t step = p->desc.a_quant == ETK_A_GROUP32 ? 32 : p->geom.k;
  *quant = job->whole;
  float top = job->top;
  for (int64_t k = 0; k < p->geom.k; k += step) {
    const int64_t n = p->geom.k - k < step ? p->geom.k - k : step;
    if (p->desc.a_quant == ETK_A_ROW || p->desc.a_quant == ETK_A_GROUP32) {
      float lo, hi;
      if (p->kernel->range(x + k, n, &lo, &hi)) atomic_store_explicit(&job->bad, 1, memory_order_relaxed);
      *quant = gemm_quant_of(lo, hi, p->a_code);
      top = hi > -lo ? hi : -lo;
    }
    p->kernel->quantize(x + k, n, quant, top, codes + k);
    if (p->desc.a_quant == ETK_A_GROUP32) as[k / 32 * as_step] = quant->scale;
  }
}

static void code_row(pack_job *job, int64_t row, int8_t *codes, etk_gemm_quant *quant) {
  const etk_gemm_plan *p = job->plan;
  const uint8_t *x = row_at(&job->io->a, row);
  uint8_t *restrict to = (uint8_t *)codes;
  if (x) memcpy(to, x, (size_t)p->geom.k);
  for (int64_t k = 0; p->a_code == ETK_U8 && k < p->geom.k; k++) to[k] ^= 0x80;
  *quant = job->whole;
  if (p->desc.a_quant == ETK_A_ROW) {
    quant->scale = etk_absent(&job->io->a_scale) ? 1.0f : ((const float *)job->io->a_scale.data)[row];
    quant->zero = etk_absent(&job->io->a_zero) ? 0 : ((const int32_t *)job->io->a_zero.data)[row];
  }
}

static void pack_tile(void *arg, int64_t tile, int worker) {
  pack_job *job = arg;
  const etk_gemm_plan *p = job->plan;
  const int64_t mr = p->kernel->mr, rows = rows_of(job, tile), base = tile * mr * p->runs;
  int8_t *codes = (int8_t *)job->ws + job->at->lanes + (uint64_t)worker * job->at->lane_bytes;
  const int32_t bias = (p->geom.bits == 8 ? p->kernel->bias8 : 0) - p->geom.centre;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t row = tile * mr + r;
    int8_t *to = codes + r * p->k_pad;
    etk_gemm_quant quant = {0};
    if (p->desc.a_dtype == ETK_F32)
      float_row(job, (const float *)(const void *)row_at(&job->io->a, row), to, &quant, AT(float, job->at->as) + base + r, rows);
    else code_row(job, row, to, &quant);
    memset(to + p->geom.k, 0, (size_t)(p->k_pad - p->geom.k));
    AT(float, job->at->sa)[row] = p->desc.a_quant == ETK_A_GROUP32 ? 1.0f : quant.scale;
    AT(int32_t, job->at->za)[row] = quant.zero - (p->a_code == ETK_U8 ? 128 : 0);
    for (int64_t i = 0; i < p->runs; i++) {
      const int64_t k = i * p->run_len, n = p->k_pad - k < p->run_len ? p->k_pad - k : p->run_len;
      const int32_t sum = p->kernel->sum(to + k, n);
      AT(int32_t, job->at->start)[base + i * rows + r] = bias * sum; /* K <= 65536 where a run is all of it */
      if (p->geom.offset) AT(float, job->at->rsum)[base + i * rows + r] = (float)sum;
    }
  }
  p->kernel->lay_a(codes, p->k_pad, (int32_t)rows, p->k_pad, (int8_t *)job->ws + job->at->a + (uint64_t)(tile * mr * p->k_pad));
}

etk_status gemm_pack_a(const etk_gemm_plan *plan, const etk_gemm_io *io, const gemm_ws *at, uint8_t *ws, const etk_pool *pool,
                       etk_status *note) {
  pack_job packing = {.plan = plan, .io = io, .at = at, .ws = ws, .top = FLT_MAX}, *job = &packing;
  job->whole = (etk_gemm_quant){.code = plan->a_code, .scale = plan->desc.a_scale, .zero = plan->desc.a_zero};
  if (job->whole.scale == 0.0f) job->whole.scale = 1.0f;
  if (plan->desc.a_quant == ETK_A_TENSOR) {
    const etk_status status = etk_parallel(pool, plan->nthreads, range_tile, job, at->tiles);
    if (status != ETK_OK) return status;
    float lo = 0.0f, hi = 0.0f;
    for (int64_t r = 0; r < io->a.dim[0]; r++) {
      const float l = AT(float, at->lo)[r], h = AT(float, at->hi)[r];
      lo = l < lo ? l : lo;
      hi = h > hi ? h : hi;
    }
    job->whole = gemm_quant_of(lo, hi, plan->a_code);
    job->top = hi > -lo ? hi : -lo;
  }
  const etk_status status = etk_parallel(pool, plan->nthreads, pack_tile, job, at->tiles);
  *note = atomic_load(&job->bad) ? ETK_NOTE_NONFINITE : ETK_OK;
  return status;
}

static etk_status check_quantize(const etk_tensor *x, int32_t a_quant, const etk_tensor *codes, const etk_tensor *scale,
                                 const etk_tensor *zero) {
  if (!x || !codes || !scale || !zero) return ETK_E_NULL;
  if (a_quant < ETK_A_ROW || a_quant > ETK_A_GROUP32) return ETK_E_RANGE;
  etk_status status = etk_tensor_in(x, 2, ETK_DT(ETK_F32));
  if (status != ETK_OK) return status;
  status = etk_tensor_out(codes, 2, ETK_DT(ETK_S8) | ETK_DT(ETK_U8));
  if (status != ETK_OK) return status;
  const int32_t rank = a_quant == ETK_A_GROUP32 ? 2 : 1;
  status = etk_tensor_out(scale, rank, ETK_DT(ETK_F32));
  if (status != ETK_OK) return status;
  if (codes->dtype == ETK_U8 && a_quant == ETK_A_GROUP32) return ETK_E_UNSUPPORTED;
  if (codes->dtype == ETK_U8 && etk_absent(zero)) return ETK_E_NULL;
  if (!etk_absent(zero)) {
    status = etk_tensor_out(zero, rank, ETK_DT(ETK_I32));
    if (status != ETK_OK) return status;
  }
  const int64_t m = x->dim[0], k = x->dim[1], n0 = a_quant == ETK_A_TENSOR ? 1 : m;
  if (codes->dim[0] != m || codes->dim[1] != k || scale->dim[0] != n0) return ETK_E_SHAPE;
  if (rank == 2 && scale->dim[1] != (k + 31) / 32) return ETK_E_SHAPE;
  if (!etk_absent(zero) && (zero->dim[0] != n0 || (rank == 2 && zero->dim[1] != scale->dim[1]))) return ETK_E_SHAPE;
  const etk_tensor *out[3] = {codes, scale, zero};
  for (int i = 0; i < 3; i++)
    for (int j = -1; j < i; j++)
      if (etk_tensor_overlap(out[i], j < 0 ? x : out[j])) return ETK_E_ALIAS;
  return ETK_OK;
}

static void *element(const etk_tensor *t, int64_t i, int64_t j) { return (uint8_t *)t->data + i * t->stride[0] + j * 4; }

etk_status etk_gemm_quantize(const etk_tensor *x, int32_t a_quant, etk_tensor *codes, etk_tensor *scale, etk_tensor *zero) {
  etk_status status = check_quantize(x, a_quant, codes, scale, zero);
  if (status != ETK_OK) return status;
  const etk_gemm_kernel *kernel = etk_gemm_kernel_pick(ETK_ISA_BEST, 0, &status);
  if (!kernel) return status;
  const int64_t m = x->dim[0], k = x->dim[1], step = a_quant == ETK_A_GROUP32 ? 32 : k;
  float lo = 0.0f, hi = 0.0f;
  int32_t bad = 0;
  for (int64_t r = 0; a_quant == ETK_A_TENSOR && r < m; r++) {
    float l, h;
    bad |= kernel->range((const float *)(const void *)row_at(x, r), k, &l, &h);
    lo = l < lo ? l : lo;
    hi = h > hi ? h : hi;
  }
  etk_gemm_quant quant = gemm_quant_of(lo, hi, codes->dtype);
  if (a_quant == ETK_A_TENSOR) {
    memcpy(element(scale, 0, 0), &quant.scale, 4);
    if (!etk_absent(zero)) memcpy(element(zero, 0, 0), &quant.zero, 4);
  }
  for (int64_t r = 0; r < m; r++) {
    const float *row = (const float *)(const void *)row_at(x, r);
    uint8_t *to = codes->data ? (uint8_t *)codes->data + r * codes->stride[0] : NULL;
    for (int64_t at = 0; at < k || (at == 0 && a_quant == ETK_A_ROW); at += step) {
      const int64_t n = k - at < step ? k - at : step, group = a_quant == ETK_A_GROUP32 ? at / 32 : 0;
      if (a_quant != ETK_A_TENSOR) {
        bad |= kernel->range(row + at, n, &lo, &hi);
        quant = gemm_quant_of(lo, hi, codes->dtype);
        memcpy(element(scale, r, group), &quant.scale, 4);
        if (!etk_absent(zero)) memcpy(element(zero, r, group), &quant.zero, 4);
      }
      kernel->quantize(row + at, n, &quant, hi > -lo ? hi : -lo, (int8_t *)to + at);
      if (step == 0) break;
    }
    for (int64_t j = 0; codes->dtype == ETK_U8 && j < k; j++) to[j] ^= 0x80;
  }
  return bad ? ETK_NOTE_NONFINITE : ETK_OK;
}
