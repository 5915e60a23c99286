/* The end of a row:  O = O / l + mu_v,  times the gate;  lse = ln2 (m + log2(l / unit)) + scale q . mu_k.
 *
 * A sink logit z adds 2^(z log2e) to the normalizer and nothing to O. Rows that see no key give 0 (or NaN when asked),
 * and lse -inf. Bound by one multiply and one store per channel. */
#include <math.h>

#include "attn_plan.h"
#include "tensor.h"

static float sink_of(const attn_job *j, const attn_piece *piece, int32_t i) {
  float z;
  memcpy(&z, (const uint8_t *)j->io.sink_logit.data + piece->h * 4, 4);
  if (!(z <= 1e30f)) z = z != z ? -INFINITY : 1e30f;
  z = z < -1e30f ? -INFINITY : z * ATTN_LOG2E;
  return j->general || !j->use_off ? z : z - piece->off[i]; /* m is less the smoothing on the plain path */
}

void attn_add_sink(const attn_job *j, const attn_piece *piece, float unit, float *m, float *l, float *share) {
  for (int32_t i = 0; i < piece->n; i++) {
    if (share) share[i] = 1.0f;
    if (etk_absent(&j->io.sink_logit)) continue;
    const float z = sink_of(j, piece, i);
    if (z == -INFINITY) continue;
    const float mn = m[i] > z ? m[i] : z, keys = l[i] * exp2f(m[i] - mn), all = keys + unit * exp2f(z - mn);
    if (share) share[i] = keys / all; /* what the keys keep of the row */
    m[i] = mn, l[i] = all;
  }
}

/* Rows of O, of the gate and of the outputs all go by the output row. */
static void write_row(const attn_job *j, const attn_piece *piece, int64_t row, const float *restrict o, float inverse, float share) {
  const int32_t dv = j->desc->dv;
  const float *restrict mu = j->mu_v + (piece->b * j->desc->hkv + piece->hk) * j->plan->dv_pad;
  float *restrict out = attn_at(&j->o, piece->b, piece->h, piece->seq->q0 + row);
  if (j->smooth_v)
    for (int32_t c = 0; c < dv; c++) out[c] = o[c] * inverse + share * mu[c];
  else
    for (int32_t c = 0; c < dv; c++) out[c] = o[c] * inverse;
  if (!j->gate.data) return;
  const float *restrict gate = attn_at(&j->gate, piece->b, piece->h, piece->seq->q0 + row);
  for (int32_t c = 0; c < dv; c++) out[c] *= gate[j->gate.cols == 1 ? 0 : c];
}

/* Output rows are far away as well; owning their lines takes longer than filling them. */
static void own_row(const attn_job *j, const attn_piece *piece, int32_t i) {
  if (i >= piece->n || !j->o.data) return;
  char *out = attn_at(&j->o, piece->b, piece->h, piece->seq->q0 + attn_output_row(j, piece->b, piece->h, piece->r0 + i));
  for (int32_t at = 0; at < j->desc->dv * 4; at += 64) __builtin_prefetch(out + at, 1);
}

void attn_finish(attn_job *j, attn_lane *lane, const attn_piece *piece, float unit) {
  const int want_lse = j->lse.data || j->plan->second;
  float share[ATTN_ROWS];
  int32_t empty = 0;
  for (int32_t i = 0; i < piece->n; i++) empty |= lane->m[i] == -INFINITY;
  if (!j->clip) { /* O / l of the keys alone, then the share that the sink leaves them */
    for (int32_t i = 0; i < piece->n; i++) lane->g[i] = lane->l[i] > 0.0f ? 1.0f / lane->l[i] : 0.0f;
    attn_add_sink(j, piece, unit, lane->m, lane->l, share);
  }
  for (int32_t i = 0; i < 8; i++) own_row(j, piece, i);
  for (int32_t i = 0; i < piece->n; i++) {
    own_row(j, piece, i + 8);
    const int64_t row = attn_output_row(j, piece->b, piece->h, piece->r0 + i);
    const float *o = lane->o + (int64_t)i * j->plan->dv_pad;
    const int none = !(lane->l[i] > 0.0f);
    float inverse = j->clip ? 1.0f : lane->g[i] * share[i];
    if (none) inverse = j->desc->flags & ETK_F_EMPTY_ROWS_NAN ? NAN : 0.0f;
    if (j->o.data) write_row(j, piece, row, o, inverse, none || j->clip || lane->g[i] == 0.0f ? 0.0f : share[i]);
    if (!want_lse) continue;
    const float lse2 = none ? -INFINITY : lane->m[i] + log2f(lane->l[i] / unit);
    if (j->plan->second) piece->lse2[i] = lse2;
    if (!j->lse.data) continue;
    float *out = attn_at(&j->lse, piece->b, piece->h, piece->seq->q0 + row);
    *out = ATTN_LN2 * (lse2 + (j->use_off && !j->general ? piece->off[i] : 0.0f));
  }
  if (empty) atomic_store_explicit(&j->empty, 1, memory_order_relaxed);
}
