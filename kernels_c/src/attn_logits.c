/* Logits formed one by one: what soft-cap, biases, clipping, float PV behind INT8 QK, scores and masses need.
 *
 *   y = (f32)S g + off  (off = q . mu_k in log2 units, only with soft-cap, bias or ALiBi; S8 QK)   or   q . k  (f32)
 *   y = cap tanh(y / cap);   y += log2e (bias[j] + slope (pos_k - pos_q));   hidden keys: -inf
 *
 * Bound by the loops below, about as long as the softmax itself; plain INT8 attention never comes here. */
#include <math.h>

#include "attn_plan.h"
#include "tensor.h"

/* 2^x for x <= 0 within 2 ulp; below 2^-126 it is 2^-126. Vectorized by any compiler: no call, no branch. */
static inline float exp2_nonpositive(float x) {
  const float z = x > -126.0f ? x : -126.0f;
  const float t = z + 0x1.8p23f; /* rounds to an integer */
  const float f = z - (t - 0x1.8p23f);
  float p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  int32_t e, bits;
  memcpy(&e, &t, 4);
  memcpy(&bits, &p, 4);
  bits = (int32_t)((uint32_t)bits + ((uint32_t)e << 23)); /* the low bits of t hold the integer */
  memcpy(&p, &bits, 4);
  return p;
}

void attn_softcap(float *restrict y, int32_t n, float cap) {
  const float inverse = 1.0f / cap;
  for (int32_t i = 0; i < n; i++) {
    const float t = y[i] * inverse, e = exp2_nonpositive(fabsf(t) * (-2.0f * ATTN_LOG2E)), r = cap * (1.0f - e) / (1.0f + e);
    y[i] = t < 0.0f ? -r : r;
  }
}

void attn_exp2_row(const float *restrict y, float lse2, float *restrict p) {
  for (int c = 0; c < ETK_PAGE; c++) {
    const float x = exp2_nonpositive(y[c] - lse2);
    p[c] = y[c] < -3.2e37f ? 0.0f : x;
  }
}

void attn_strip_page(const attn_job *j, const attn_piece *piece, const attn_tile *t, attn_lane *lane, etk_strip *a) {
  const etk_attn_plan *p = j->plan;
  const int64_t gp = attn_gp(piece, t->page);
  memset(a, 0, sizeof *a);
  a->d_pad = p->d_pad, a->dv_pad = p->dv_pad;
  a->k = j->kpages + (uint64_t)gp * p->kbytes;
  a->v = j->vpages + (uint64_t)gp * p->vbytes;
  a->sv = j->sv + gp * p->dv_pad;
  a->v_colsum = j->colsum ? j->colsum + gp * p->dv_pad : NULL;
  a->skip_log2 = j->desc->tile_skip_log2;
  if (!p->int8_qk) return;
  const float sk = j->kscale[gp];
  for (int32_t i = 0; i < piece->n; i++) { /* at most 1e30, so that Smax g is finite */
    const float g = piece->gq[i] * sk;
    lane->g[i] = g < 1e30f ? g : 1e30f;
  }
}

void attn_strip_rows(const attn_job *j, const attn_piece *piece, attn_lane *lane, int32_t row, int32_t rows, etk_strip *a) {
  const int64_t d = j->plan->d_pad;
  a->rows = rows;
  if (j->plan->int8_qk) a->q = piece->q + row * d;
  else a->qf = piece->qf + row * d;
  a->q_start = piece->start + row;
  a->g = lane->g + row;
  a->o = lane->o + (int64_t)row * j->plan->dv_pad;
  a->m = lane->m + row, a->l = lane->l + row;
}

void attn_tile_extras(const attn_job *j, const attn_piece *piece, const attn_tile *t, attn_lane *lane, uint64_t *mask) {
  if (!j->bias.data) return;
  const int32_t *slots = attn_slots(j, piece->b, piece->hk);
  uint64_t hidden = 0;
  for (int i = 0; i < ETK_PAGE; i++) {
    lane->kb[i] = 0.0f;
    if (!(t->keep >> i & 1)) continue;
    const int64_t slot = (int64_t)t->page * ETK_PAGE + i, row = slots ? slots[slot] : slot;
    const float bias = attn_f32(&j->bias, piece->b, piece->h, piece->seq->k0 + row);
    if (bias == -INFINITY) hidden |= UINT64_C(1) << i;
    else if (bias == bias) lane->kb[i] = (bias > 1e30f ? 1e30f : bias < -1e30f ? -1e30f : bias) * ATTN_LOG2E;
  }
  for (int32_t i = 0; hidden && i < piece->n; i++) mask[i] &= ~hidden;
}

static void add_alibi(const attn_job *j, const attn_piece *piece, const attn_tile *t, int32_t row, int32_t rows, float *restrict y) {
  const etk_tensor *slopes = &j->io.alibi_slope;
  float slope, at[ETK_PAGE];
  memcpy(&slope, (const uint8_t *)slopes->data + piece->h * 4, 4);
  slope = isfinite(slope) ? slope * ATTN_LOG2E : 0.0f;
  for (int32_t i = 0; i < rows; i++) {
    const int64_t q = piece->pos[row + i], first = (int64_t)t->page * ETK_PAGE - q;
    const int64_t *k = j->kpos + attn_gp(piece, t->page) * ETK_PAGE;
    for (int c = 0; c < ETK_PAGE; c++) at[c] = (float)(j->explicit_k ? k[c] - q : first + c);
    for (int c = 0; c < ETK_PAGE; c++) y[i * ETK_PAGE + c] += slope * at[c];
  }
}

void attn_logits(const attn_job *j, const attn_piece *piece, const attn_tile *t, attn_lane *lane, const etk_strip *a, int32_t row,
                 const uint64_t *mask) {
  float *restrict y = lane->y;
  const int32_t rows = a->rows;
  if (j->plan->int8_qk) {
    j->kernel->qk_s8(a, lane->s);
    for (int32_t i = 0; i < rows; i++) {
      const float g = a->g[i], off = j->general && j->use_off ? piece->off[row + i] : 0.0f;
      for (int c = 0; c < ETK_PAGE; c++) y[i * ETK_PAGE + c] = (float)lane->s[i * ETK_PAGE + c] * g + off;
    }
  } else {
    j->kernel->qk_f32(a, y);
  }
  if (j->general) {
    if (j->desc->softcap > 0.0f) attn_softcap(y, rows * ETK_PAGE, j->desc->softcap * ATTN_LOG2E);
    for (int32_t i = 0; j->bias.data && i < rows; i++)
      for (int c = 0; c < ETK_PAGE; c++) y[i * ETK_PAGE + c] += lane->kb[c];
    if (!etk_absent(&j->io.alibi_slope)) add_alibi(j, piece, t, row, rows, y);
    for (int32_t i = 0; i < rows * ETK_PAGE; i++) y[i] = y[i] < -3e37f ? -3e37f : y[i] < 3e37f ? y[i] : 3e37f;
  }
  if (j->weights) attn_noise(j, piece, t, row, rows, y);
  for (int32_t i = 0; mask && i < rows; i++) {
    if (mask[i] == ~UINT64_C(0)) continue;
    for (int c = 0; c < ETK_PAGE; c++) y[i * ETK_PAGE + c] = mask[i] >> c & 1 ? y[i * ETK_PAGE + c] : -INFINITY;
  }
}
