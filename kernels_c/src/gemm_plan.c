/* Descriptor checks, the plan and its workspace. */
#include "gemm_plan.h"

#include <math.h>
#include <stdlib.h>

#include "checked.h"
#include "tensor.h"

enum { MAX_THREADS = 256 };

static etk_status check_a(const etk_gemm_desc *d, int32_t *code) {
  if (d->a_dtype != ETK_F32 && d->a_dtype != ETK_S8 && d->a_dtype != ETK_U8) return ETK_E_DTYPE;
  const int32_t natural = d->a_dtype == ETK_F32 ? ETK_S8 : d->a_dtype;
  *code = d->a_code ? d->a_code : natural;
  if (*code != ETK_S8 && *code != ETK_U8) return ETK_E_DTYPE;
  if (d->a_dtype != ETK_F32 && *code != d->a_dtype) return ETK_E_DTYPE;
  if (d->a_quant < ETK_A_ROW || d->a_quant > ETK_A_STATIC) return ETK_E_RANGE;
  if (d->a_quant == ETK_A_STATIC) {
    const int32_t lo = *code == ETK_S8 ? -128 : 0;
    if (d->a_zero < lo || d->a_zero > lo + 255) return ETK_E_RANGE;
    if (d->a_scale == 0.0f && d->a_dtype != ETK_F32) return ETK_OK;
    return d->a_scale >= 0x1p-126f && d->a_scale <= 0x1p126f ? ETK_OK : ETK_E_RANGE;
  }
  if (d->a_scale != 0.0f || d->a_zero != 0) return ETK_E_RANGE;
  if (d->a_dtype != ETK_F32 && d->a_quant != ETK_A_ROW) return ETK_E_RANGE;
  if (d->a_quant == ETK_A_GROUP32 && *code != ETK_S8) return ETK_E_RANGE;
  if (d->a_quant == ETK_A_GROUP32 && d->weight.group % 32 != 0) return ETK_E_UNSUPPORTED;
  return ETK_OK;
}

static etk_status check_desc(const etk_gemm_desc *d, int32_t *code) {
  if (d->version != 0) return ETK_E_STRUCT;
  if (d->flags != 0 || d->act < ETK_ACT_NONE || d->act > ETK_ACT_SILU) return ETK_E_RANGE;
  if (d->max_m < 0 || d->max_m > (int64_t)1 << 31) return ETK_E_SHAPE;
  if (d->out_dtype != ETK_F32 && d->out_dtype != ETK_I32) return ETK_E_DTYPE;
  if (d->out_dtype == ETK_I32) {
    if (d->weight.group != 0 || d->weight.offset || d->weight.gated || d->act != ETK_ACT_NONE) return ETK_E_RANGE;
    if (d->a_dtype == ETK_F32 || (d->a_quant == ETK_A_STATIC && d->a_scale != 0.0f)) return ETK_E_RANGE;
  }
  return check_a(d, code);
}

etk_status etk_gemm_plan_create(const etk_gemm_desc *desc, int32_t nthreads, etk_gemm_plan **out) {
  if (!out) return ETK_E_NULL;
  etk_gemm_plan p = {0};
  etk_status status = etk_struct_in(&p.desc, sizeof p.desc, desc);
  if (status != ETK_OK) return status;
  const etk_gemm_weight given = p.desc.weight;
  if (given.struct_size != sizeof given) return ETK_E_STRUCT; /* nested: of one size only */
  status = etk_gemm_resolve(&given, &p.desc.weight, &p.kernel, &p.geom);
  if (status != ETK_OK) return status;
  status = check_desc(&p.desc, &p.a_code);
  if (status != ETK_OK) return status;
  if (nthreads < 1 || nthreads > MAX_THREADS) return ETK_E_RANGE;
  p.nthreads = nthreads;
  const int groups32 = p.desc.a_quant == ETK_A_GROUP32;
  p.k_pad = (p.geom.k + 7) / 8 * 8;
  p.s32 = p.geom.one && !groups32;
  p.run_len = groups32 ? 32 : (int32_t)p.geom.glen;
  p.per_rec = !groups32 ? 1 : p.geom.one ? INT32_MAX : (int32_t)(p.geom.glen / 32);
  p.runs = p.s32 ? 1 : (p.geom.k + p.run_len - 1) / p.run_len;
  if (gemm_ws_of(&p, p.desc.max_m).bad) return ETK_E_OVERFLOW;
  etk_gemm_plan *made = malloc(sizeof *made);
  if (!made) return ETK_E_MEMORY;
  *made = p;
  *out = made;
  return ETK_OK;
}

void etk_gemm_plan_free(etk_gemm_plan *plan) { free(plan); }

const char *etk_gemm_plan_kernel(const etk_gemm_plan *plan) { return plan ? plan->kernel->name : ""; }

gemm_ws gemm_ws_of(const etk_gemm_plan *p, int64_t m) {
  const uint64_t mr = (uint64_t)p->kernel->mr, nr = (uint64_t)p->kernel->nr, tiles = ((uint64_t)m + mr - 1) / mr, rows = tiles * mr;
  const uint64_t halves = (uint64_t)p->geom.halves, runs = (uint64_t)p->runs;
  const int dynamic = p->desc.a_quant == ETK_A_TENSOR;
  gemm_ws at = {.tiles = (int64_t)tiles};
  uint64_t per_run, blocks = GEMM_BLOCK_ROWS / mr;
  if (blocks > tiles) blocks = tiles;
  etk_carve lane = {0}, all = {0};
  (void)etk_take(&lane, mr * (uint64_t)p->k_pad, 1);
  at.lane_c = etk_take(&lane, blocks * mr * nr * halves, 4);
  at.lane_w = lane.used;
  if (p->geom.bits == 4) { /* records of one K block with 8-bit codes */
    const uint64_t records = p->geom.one ? 1 : (uint64_t)(GEMM_KC / p->geom.glen);
    (void)etk_take(&lane, records * p->geom.code_off + GEMM_KC * nr, 1);
  }
  at.lane_bytes = lane.used;
  if (etk_mul(rows, runs, &per_run)) all.bad = 1;
  uint64_t codes = 0;
  if (etk_mul(rows, (uint64_t)p->k_pad, &codes)) all.bad = 1;
  at.a = etk_take(&all, codes, 1);
  at.start = etk_take(&all, per_run, 4);
  at.rsum = etk_take(&all, p->geom.offset ? per_run : 0, 4);
  at.as = etk_take(&all, p->desc.a_quant == ETK_A_GROUP32 ? per_run : 0, 4);
  at.sa = etk_take(&all, rows, 4);
  at.za = etk_take(&all, rows, 4);
  at.lo = etk_take(&all, dynamic ? rows : 0, 4);
  at.hi = etk_take(&all, dynamic ? rows : 0, 4);
  at.lanes = etk_take(&all, (uint64_t)p->nthreads, at.lane_bytes);
  at.bytes = all.used;
  at.bad = all.bad | lane.bad;
  return at;
}

etk_status etk_gemm_workspace(const etk_gemm_plan *plan, uint64_t *bytes, uint64_t *align) {
  if (!plan || !bytes || !align) return ETK_E_NULL;
  *bytes = gemm_ws_of(plan, plan->desc.max_m).bytes;
  *align = 64;
  return ETK_OK;
}

etk_gemm_quant gemm_quant_of(float lo, float hi, int32_t code) {
  const float top = hi > -lo ? hi : -lo;
  etk_gemm_quant q = {.code = code, .scale = 1.0f, .zero = 0};
  if (top < 0x1p-119f) return q;
  q.scale = code == ETK_S8 ? top / 127.0f : hi / 255.0f - lo / 255.0f;
  if (code == ETK_U8) q.zero = (int32_t)((-lo * (1.0f / q.scale) + 12582912.0f) - 12582912.0f);
  return q;
}
