/* What a caller may ask for: the descriptor, then tensors against it. Nothing here writes to the caller's memory, and
 * only attn_check_index.c reads tensor contents. */
#include <math.h>

#include "attn_plan.h"
#include "tensor.h"

#define FLOATS (ETK_DT(ETK_F32) | ETK_DT(ETK_F16))
#define INTS (ETK_DT(ETK_I32) | ETK_DT(ETK_I64))
enum { KNOWN_FLAGS = (1 << 11) - 1, KNOWN_MASKS = 15, MAX_BATCH = 1 << 20, MAX_HEADS = 1 << 16 };

static int finite_from(float x, float least) { return x >= least && x <= 3.0e38f; }

static etk_status check_softmax(const etk_attn_desc *d) {
  if (d->softmax_mode < 0 || d->softmax_mode > ETK_SOFTMAX_LUT128) return ETK_E_RANGE;
  if (d->softmax_mode == ETK_SOFTMAX_DEFAULT) return ETK_OK;
  const int lut = d->softmax_mode == ETK_SOFTMAX_LUT256, s8s8 = d->compute == ETK_C_S8S8;
  return lut == s8s8 && d->softmax_mode != ETK_SOFTMAX_LUT128 ? ETK_OK : ETK_E_UNSUPPORTED;
}

static etk_status check_mask(const etk_attn_desc *d) {
  if (d->mask_kind & ~KNOWN_MASKS) return ETK_E_RANGE;
  if ((d->mask_kind & ETK_MASK_BSR) && (d->mask_kind & ETK_MASK_GATHER)) return ETK_E_RANGE;
  if (d->win_left < 0 || d->win_right < 0 || d->sink < 0) return ETK_E_RANGE;
  return ETK_OK;
}

static etk_status check_numbers(const etk_attn_desc *d) {
  if (!finite_from(d->scale, 0.0f) || !finite_from(d->softcap, 0.0f) || !finite_from(d->tile_skip_log2, 0.0f)) return ETK_E_RANGE;
  if (d->clip_gamma != 0.0f || d->clip_zeta != 0.0f)
    if (!(d->clip_gamma <= 0.0f && d->clip_gamma >= -1e6f && finite_from(d->clip_zeta, 1.0f) && d->clip_zeta <= 1e6f)) return ETK_E_RANGE;
  return ETK_OK;
}

etk_status attn_check_desc(const etk_attn_desc *desc, etk_attn_desc *d) {
  etk_status st = etk_struct_in(d, sizeof *d, desc);
  if (st != ETK_OK) return st;
  if (d->version != 0) return ETK_E_STRUCT;
  if (d->batch < 0 || d->batch > MAX_BATCH || d->hq < 1 || d->hq > MAX_HEADS || d->hkv < 1 || d->hq % d->hkv) return ETK_E_SHAPE;
  if (d->d < 1 || d->d > ATTN_MAX_D || d->dv < 1 || d->dv > ATTN_MAX_D) return ETK_E_SHAPE;
  if (d->max_n < 0 || d->max_n > INT32_MAX || d->max_m < 0 || d->max_m > INT32_MAX) return ETK_E_SHAPE;
  if (d->phase < 0 || d->phase > ETK_PHASE_DECODE || d->compute < 0 || d->compute > ETK_C_S4S8) return ETK_E_RANGE;
  if (d->kv_layout != ETK_KV_DENSE && d->kv_layout != ETK_KV_PAGED) return ETK_E_RANGE;
  if (d->flags & ~(uint32_t)KNOWN_FLAGS) return ETK_E_RANGE;
  if (d->compute == ETK_C_BF16 || d->compute == ETK_C_S4S8) return ETK_E_UNSUPPORTED;
  if (d->kv_layout == ETK_KV_DENSE && (d->flags & ETK_F_ROT_K)) return ETK_E_UNSUPPORTED;
  if ((st = check_softmax(d)) != ETK_OK || (st = check_mask(d)) != ETK_OK || (st = check_numbers(d)) != ETK_OK) return st;
  d->struct_size = sizeof *d;
  if (d->scale == 0.0f) d->scale = 1.0f / sqrtf((float)d->d);
  d->win_left = attn_clamp_pos(d->win_left), d->win_right = attn_clamp_pos(d->win_right), d->sink = attn_clamp_pos(d->sink);
  return ETK_OK;
}

/* Sizes of the axes b(atch), h(ead), r(ow), c(olumn). */
typedef struct sizes {
  int64_t b, h, r, c;
} sizes;

/* Check a tensor whose axes are named by letters and describe it by (b, h, r). A capital letter also takes size 1. */
static etk_status take(const etk_tensor *t, const char *axes, sizes z, uint32_t dtypes, int output, attn_view *v) {
  const int32_t rank = (int32_t)strlen(axes);
  const etk_status st = output ? etk_tensor_out(t, rank, dtypes) : etk_tensor_in(t, rank, dtypes);
  if (st != ETK_OK) return st;
  *v = (attn_view){.data = t->data, .dtype = t->dtype, .cols = 1};
  for (int32_t i = 0; i < rank; i++) {
    const char low = (char)(axes[i] | 32);
    const int64_t want = low == 'b' ? z.b : low == 'h' ? z.h : low == 'r' ? z.r : z.c;
    int64_t step = t->stride[i];
    if (t->dim[i] != want && (axes[i] == low || t->dim[i] != 1)) return ETK_E_SHAPE;
    if (t->dim[i] == 1) step = 0;
    if (low == 'b') v->b = step;
    else if (low == 'h') v->h = step;
    else if (low == 'r') v->r = step;
    else v->cols = t->dim[i];
  }
  return ETK_OK;
}

static etk_status take_if(const etk_tensor *t, const char *axes, sizes z, uint32_t dtypes, attn_view *v) {
  return etk_absent(t) ? ETK_OK : take(t, axes, z, dtypes, 0, v);
}

/* Q, K, V and O fix N and M. */
static etk_status take_main(const etk_attn_desc *d, int values, attn_job *j) {
  const etk_attn_io *io = &j->io;
  j->packed = !etk_absent(&io->cu_q) || !etk_absent(&io->cu_k);
  if (etk_absent(&io->q) || etk_absent(&io->k) || (values && (etk_absent(&io->v) || etk_absent(&io->o)))) return ETK_E_NULL;
  if (j->packed && (etk_absent(&io->cu_q) || etk_absent(&io->cu_k))) return ETK_E_NULL;
  const char *axes = j->packed ? "rhc" : "bhrc";
  const int32_t row_axis = j->packed ? 0 : 2;
  if (io->q.rank != (int32_t)strlen(axes) || io->k.rank != io->q.rank) return ETK_E_SHAPE;
  j->n = io->q.dim[row_axis], j->m = io->k.dim[row_axis];
  if (j->n < 0 || j->m < 0 || j->n > INT32_MAX || j->m > INT32_MAX) return ETK_E_SHAPE;
  if (!j->packed && (j->n > d->max_n || j->m > d->max_m)) return ETK_E_SHAPE;
  const int64_t b = d->batch;
  etk_status st = take(&io->q, axes, (sizes){b, d->hq, j->n, d->d}, FLOATS, 0, &j->q);
  if (st == ETK_OK) st = take(&io->k, axes, (sizes){b, d->hkv, j->m, d->d}, FLOATS, 0, &j->k);
  if (st == ETK_OK && values) st = take(&io->v, axes, (sizes){b, d->hkv, j->m, d->dv}, FLOATS, 0, &j->v);
  if (st == ETK_OK && values) st = take(&io->o, axes, (sizes){b, d->hq, j->n, d->dv}, ETK_DT(ETK_F32), 1, &j->o);
  if (st != ETK_OK || !j->packed) return st;
  st = take(&io->cu_q, "r", (sizes){.r = b + 1}, INTS, 0, &j->cu_q);
  return st == ETK_OK ? take(&io->cu_k, "r", (sizes){.r = b + 1}, INTS, 0, &j->cu_k) : st;
}

static etk_status take_extras(const etk_attn_desc *d, attn_job *j) {
  const etk_attn_io *io = &j->io;
  const uint32_t f32 = ETK_DT(ETK_F32), i32 = ETK_DT(ETK_I32);
  const int pk = j->packed;
  const sizes q = {d->batch, d->hq, j->n, d->dv}, k = {d->batch, d->hkv, j->m, 0}, kq = {d->batch, d->hq, j->m, 0};
  attn_view unused;
  etk_status st;
  if (pk && (!etk_absent(&io->seq_k) || !etk_absent(&io->q_perm) || !etk_absent(&io->k_perm) || !etk_absent(&io->o_perm) ||
             (d->mask_kind & (ETK_MASK_BSR | ETK_MASK_GATHER)) || (d->flags & ETK_F_RETURN_SCORES)))
    return ETK_E_UNSUPPORTED;
  if ((st = take_if(&io->seq_k, "r", (sizes){.r = d->batch}, i32, &unused)) != ETK_OK) return st;
  if ((st = take_if(&io->key_bias, pk ? "rH" : "BHr", kq, f32, &j->bias)) != ETK_OK) return st;
  if ((st = take_if(&io->alibi_slope, "r", (sizes){.r = d->hq}, f32, &unused)) != ETK_OK) return st;
  if ((st = take_if(&io->sink_logit, "r", (sizes){.r = d->hq}, f32, &unused)) != ETK_OK) return st;
  if ((st = take_if(&io->q_pos, pk ? "r" : "Br", q, INTS, &j->q_pos)) != ETK_OK) return st;
  if ((st = take_if(&io->k_pos, pk ? "r" : "BHr", k, INTS, &j->k_pos)) != ETK_OK) return st;
  if ((st = take_if(&io->q_perm, "BHr", q, i32, &j->q_perm)) != ETK_OK) return st;
  if ((st = take_if(&io->k_perm, "BHr", k, i32, &j->k_perm)) != ETK_OK) return st;
  if ((st = take_if(&io->o_perm, "BHr", q, i32, &j->o_perm)) != ETK_OK) return st;
  if ((st = take_if(&io->gate, pk ? "rhC" : "bhrC", q, f32, &j->gate)) != ETK_OK) return st;
  if ((st = take_if(&io->k_mean, "BhC", (sizes){d->batch, d->hkv, 0, d->d}, f32, &j->k_mean)) != ETK_OK) return st;
  if (j->k_mean.data && j->k_mean.cols != d->d) return ETK_E_SHAPE;
  if (!(d->mask_kind & ETK_MASK_GATHER)) return ETK_OK;
  if (etk_absent(&io->gather)) return ETK_E_NULL;
  if (!etk_absent(&io->k_perm)) return ETK_E_UNSUPPORTED;
  if (io->gather.rank != 3 || io->gather.dim[2] < 0 || io->gather.dim[2] > d->max_m) return ETK_E_SHAPE;
  return take(&io->gather, "BHr", (sizes){d->batch, d->hkv, io->gather.dim[2], 0}, i32, 0, &j->gather);
}

static etk_status take_outputs(const etk_attn_desc *d, attn_job *j) {
  const etk_attn_io *io = &j->io;
  const uint32_t f32 = ETK_DT(ETK_F32);
  const int colmass = (d->flags & ETK_F_RETURN_COLMASS) != 0, scores = (d->flags & ETK_F_RETURN_SCORES) != 0;
  etk_status st = ETK_OK;
  if ((d->flags & ETK_F_RETURN_LSE) && etk_absent(&io->lse)) return ETK_E_NULL;
  if ((colmass && etk_absent(&io->colmass)) || (scores && etk_absent(&io->scores))) return ETK_E_NULL;
  if ((!colmass && !etk_absent(&io->colmass)) || (!scores && !etk_absent(&io->scores))) return ETK_E_RANGE;
  if (!etk_absent(&io->lse)) st = take(&io->lse, j->packed ? "rh" : "bhr", (sizes){d->batch, d->hq, j->n, 0}, f32, 1, &j->lse);
  if (st == ETK_OK && colmass) {
    const int64_t heads = d->flags & ETK_F_COLMASS_PER_KV_HEAD ? d->hkv : d->hq;
    st = take(&io->colmass, j->packed ? "rh" : "bhr", (sizes){d->batch, heads, j->m, 0}, f32, 1, &j->colmass);
  }
  if (st == ETK_OK && scores) {
    if (io->score_rows < 0 || io->score_rows > j->n) return ETK_E_RANGE;
    st = take(&io->scores, "bhrc", (sizes){d->batch, d->hq, io->score_rows, j->m}, f32, 1, &j->scores);
  }
  return st;
}

static int aliased(const etk_attn_io *io) {
  const etk_tensor *const out[] = {&io->o, &io->lse, &io->colmass, &io->scores};
  const etk_tensor *const in[] = {&io->q,      &io->k,      &io->v,      &io->gather, &io->cu_q,       &io->cu_k, &io->seq_k,  &io->key_bias, &io->alibi_slope,
                                  &io->q_pos,  &io->k_pos,  &io->q_perm, &io->k_perm, &io->o_perm, &io->sink_logit, &io->gate, &io->k_mean};
  for (int o = 0; o < 4; o++) {
    for (unsigned i = 0; i < sizeof in / sizeof in[0]; i++)
      if (etk_tensor_overlap(out[o], in[i])) return 1;
    for (int p = 0; p < o; p++)
      if (etk_tensor_overlap(out[o], out[p])) return 1;
  }
  return 0;
}

static void settle(const etk_attn_desc *d, attn_job *j) {
  const int int8 = d->compute != ETK_C_F32, softcap = d->softcap > 0.0f;
  j->desc = d;
  j->explicit_k = j->k_pos.data || j->k_perm.data || j->gather.data;
  j->general = softcap || j->bias.data || !etk_absent(&j->io.alibi_slope);
  j->clip = d->clip_gamma != 0.0f || d->clip_zeta != 0.0f;
  j->smooth_k = int8 && !(d->flags & ETK_F_NO_SMOOTH_K);
  j->smooth_v = d->compute == ETK_C_S8S8 && (d->flags & ETK_F_SMOOTH_V) && !j->clip;
  j->use_off = j->smooth_k && (j->general || j->lse.data || j->colmass.data || j->scores.data || !etk_absent(&j->io.sink_logit));
  j->positional = (d->mask_kind & (ETK_MASK_CAUSAL | ETK_MASK_WINDOW)) != 0;
  j->win_left = j->win_right = ATTN_POS_LIMIT;
  if (d->mask_kind & ETK_MASK_WINDOW) j->win_left = d->win_left, j->win_right = d->win_right, j->sink = d->sink;
  if ((d->mask_kind & ETK_MASK_CAUSAL) && j->win_right > 0) j->win_right = 0;
}

etk_status attn_check_io(const etk_attn_desc *d, const etk_attn_io *io, int values, attn_job *j) {
  memset(j, 0, sizeof *j);
  etk_status st = etk_struct_in(&j->io, sizeof j->io, io);
  if (st == ETK_OK) st = take_main(d, values, j);
  if (st == ETK_OK) st = take_extras(d, j);
  if (st == ETK_OK && values) st = take_outputs(d, j);
  if (st != ETK_OK) return st;
  if (values && aliased(&j->io)) return ETK_E_ALIAS;
  settle(d, j);
  return ETK_OK;
}
