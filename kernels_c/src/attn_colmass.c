/* Weighted column masses: mass[k, j] = sum_i row_weight[i] mean_{h in group} softmax((s[i,:] + noise) / temperature)[j].
 *
 * Two walks: normalizers by rows, then sums by columns (attn_outputs.c). V is not read. Noise is Gumbel(0, 1) from a
 * counter: u = (top 24 bits of x + 1/2) 2^-24, noise = -ln(-ln u), with
 *   x = mix(mix(mix(mix(seed + G (1 + layer)) + G (1 + query head)) + G (1 + query position)) + G (1 + key position)),
 * G = 0x9e3779b97f4a7c15 and mix the finalizer of SplitMix64. */
#include <math.h>

#include "attn_plan.h"
#include "parallel.h"
#include "tensor.h"

#define STEP_OF(k) (UINT64_C(0x9e3779b97f4a7c15) * (1 + (uint64_t)(k)))

static uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
  return x ^ (x >> 31);
}

void attn_noise(const attn_job *j, const attn_piece *piece, const attn_tile *t, int32_t row, int32_t rows, float *y) {
  const attn_weights *w = j->weights;
  const int64_t *k = j->kpos + attn_gp(piece, t->page) * ETK_PAGE;
  const uint64_t head = mix(mix(w->seed + STEP_OF(w->layer)) + STEP_OF(piece->h));
  for (int32_t i = 0; i < rows; i++, y += ETK_PAGE) {
    const uint64_t query = mix(head + STEP_OF(piece->pos[row + i]));
    for (int c = 0; w->seed && c < ETK_PAGE; c++) {
      const int64_t at = j->explicit_k ? k[c] : (int64_t)t->page * ETK_PAGE + c;
      const float u = ((float)(mix(query + STEP_OF(at)) >> 40) + 0.5f) * 0x1p-24f;
      y[c] -= ATTN_LOG2E * logf(-logf(u < 1.0f ? u : 0x1.fffffep-1f));
    }
    for (int c = 0; c < ETK_PAGE; c++) y[c] *= w->cold;
  }
}

static etk_status take_weights(const etk_attn_plan *plan, const attn_job *j, const etk_colmass_desc *d, const etk_tensor *weight,
                               const etk_tensor *out, attn_weights *w) {
  if (!(d->temperature >= 0.0f && d->temperature <= 1e6f) || (d->temperature > 0.0f && d->temperature < 1e-6f)) return ETK_E_RANGE;
  if (d->sum_group != 0 && d->sum_group != 1) return ETK_E_RANGE;
  if (weight && !etk_absent(weight)) {
    const etk_status st = etk_tensor_in(weight, 1, ETK_DT(ETK_F32));
    if (st != ETK_OK) return st;
    if (weight->dim[0] != j->n) return ETK_E_SHAPE;
    w->weight = (attn_view){.data = weight->data, .r = 4};
  }
  const etk_status st = etk_tensor_out(out, 3, ETK_DT(ETK_F32));
  if (st != ETK_OK) return st;
  if (out->dim[0] != plan->desc.batch || out->dim[1] != plan->desc.hkv || out->dim[2] != j->m) return ETK_E_SHAPE;
  w->out = (attn_view){.data = out->data, .b = out->stride[0], .h = out->stride[1], .r = 4};
  w->cold = d->temperature > 0.0f ? 1.0f / d->temperature : 1.0f;
  w->share = d->sum_group ? 1.0f : 1.0f / (float)plan->group;
  w->seed = d->seed, w->layer = d->layer;
  if ((weight && etk_tensor_overlap(out, weight)) || etk_tensor_overlap(out, &j->io.q) || etk_tensor_overlap(out, &j->io.k)) return ETK_E_ALIAS;
  return ETK_OK;
}

etk_status etk_attn_colmass(const etk_attn_plan *plan, const etk_attn_io *io, const etk_colmass_desc *colmass,
                            const etk_tensor *row_weight, etk_tensor *out, void *ws, uint64_t ws_bytes, const etk_pool *pool) {
  if (!plan || !io || !colmass || !out) return ETK_E_NULL;
  if (plan->desc.kv_layout == ETK_KV_PAGED)
    return etk_attn_colmass_paged(plan, io, colmass, row_weight, out, ws, ws_bytes, pool);
  if (!plan->second) return ETK_E_RANGE;
  etk_colmass_desc d;
  attn_weights w = {0};
  attn_job j;
  etk_status st = etk_struct_in(&d, sizeof d, colmass);
  j.weights = &w;
  if (st == ETK_OK) st = attn_job_begin(&j, plan, io, ws, ws_bytes);
  if (st == ETK_OK && j.packed) st = ETK_E_UNSUPPORTED;
  if (st == ETK_OK) st = take_weights(plan, &j, &d, row_weight, out, &w);
  if (st == ETK_OK && (plan->desc.flags & ETK_F_CHECK_FINITE)) st = attn_check_finite(&j, pool);
  if (st == ETK_OK) st = attn_pack(&j, pool);
  if (st == ETK_OK) st = etk_parallel(pool, plan->nthreads, attn_stats_task, &j, j.ntasks);
  if (st == ETK_OK) st = attn_outputs(&j, pool);
  if (st != ETK_OK) return st;
  return atomic_load_explicit(&j.nonfinite, memory_order_relaxed) ? ETK_NOTE_NONFINITE : ETK_OK;
}
