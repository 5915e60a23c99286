/* Many rows against one page without a mask; part of attn_s8_avx512_body.h. Internal.
 *
 * Strips of 4 rows in a pipeline: while the vpdpbusd of QK of one strip fill two of the four vector ports, the softmax of
 * the strip before runs on the others, a row after each quarter of the channels. Its S waits in L1.
 *   QK(0);  for n: QK(n + 1) with softmax(n), PV(n)
 * 4 x 64 has 16 accumulators, which leaves 16 registers to the softmax. Bound by vpdpbusd: 2 x 256 for d = dv = 64. */

enum { BR = 4 };

typedef struct turn_rows { /* what passes from QK to softmax and PV of a strip */
  int32_t s[BR * 64];
  uint8_t p[BR * 64];
  __m512i sum[BR];
  int32_t top[16];
  float step[16], a[16], w[16];
  int scale;
} __attribute__((aligned(64))) turn_rows;

/* Row i: S to P and 16 partial sums of P. The packs saturate in place of min(x, 255): see step_of. */
INLINE void block_row(turn_rows *t, int i) {
  const __m512i top = _mm512_set1_epi32(t->top[i]);
  const __m512 c = _mm512_set1_ps(t->step[i]);
  __m512i x[NV];
  UNROLL for (int j = 0; j < NV; j++) x[j] = step_of(_mm512_sub_epi32(top, _mm512_load_si512(t->s + 64 * i + 16 * j)), c, 0);
  const __m512i row = to_p(x[0], x[1], x[2], x[3]);
  _mm512_store_si512(t->p + 64 * i, row);
  __m512i sum = _mm512_setzero_si512();
  DOT(sum, row, _mm512_set1_epi8(1));
  _mm512_store_si512(t->sum + i, sum);
}

/* QK of the strip that begins at `row`, and the softmax of `before` when there is one. */
INLINE void block_qk(const etk_strip *s, int32_t row, turn_rows *t, turn_rows *before) {
  const int64_t stride = s->d_pad;
  const uint8_t *k = s->k;
  const int8_t *q = s->q + row * stride, *q2 = q + 2 * stride;
  __m512i acc[BR][NV];
  UNROLL for (int i = 0; i < BR; i++) UNROLL for (int j = 0; j < NV; j++) acc[i][j] = _mm512_set1_epi32(s->q_start[row + i]);
  UNROLL for (int u = 0; u < BR; u++) {
    if (before) block_row(before, u);
    for (const uint8_t *end = k + 16 * stride; k != end; k += 256, q += 4, q2 += 4) {
      const __m512i k0 = _mm512_load_si512(k), k1 = _mm512_load_si512(k + 64), k2 = _mm512_load_si512(k + 128),
                    k3 = _mm512_load_si512(k + 192);
      UNROLL for (int i = 0; i < BR; i++) {
        int32_t word;
        memcpy(&word, (i < 2 ? q : q2) + (i & 1) * stride, 4);
        const __m512i b = _mm512_set1_epi32(word);
        DOT(acc[i][0], k0, b);
        DOT(acc[i][1], k1, b);
        DOT(acc[i][2], k2, b);
        DOT(acc[i][3], k3, b);
      }
    }
  }
  __m512i top[BR];
  UNROLL for (int i = 0; i < BR; i++) {
    UNROLL for (int j = 0; j < NV; j++) _mm512_store_si512(t->s + 64 * i + 16 * j, acc[i][j]);
    top[i] = _mm512_max_epi32(_mm512_max_epi32(acc[i][0], acc[i][1]), _mm512_max_epi32(acc[i][2], acc[i][3]));
  }
  const __m512i tops = max_across(top, BR);
  const __m512 g = load_rows(s->g + row, BR), mt = _mm512_mul_ps(_mm512_cvtepi32_ps(tops), g);
  _mm512_store_si512(t->top, tops);
  _mm512_store_ps(t->step, _mm512_mul_ps(_mm512_set1_ps((float)ETK_STEP), g));
  const __m512 m = load_rows(s->m + row, BR), mn = _mm512_max_ps(m, mt), one = _mm512_set1_ps(1.0f);
  const __mmask16 up = _mm512_cmp_ps_mask(m, mt, _CMP_LT_OQ); /* of a and w only one is not 1 */
  const __m512 less = exp2_ps(_mm512_sub_ps(_mm512_min_ps(m, mt), mn)), a = _mm512_mask_mov_ps(one, up, less);
  _mm512_store_ps(t->a, a);
  _mm512_store_ps(t->w, _mm512_mask_mov_ps(less, up, one));
  t->scale = _mm512_mask_cmp_ps_mask(lanes_of(BR), a, one, _CMP_NEQ_UQ) != 0;
  store_rows(s->m + row, mn, BR);
}

INLINE void block_pv(const etk_strip *s, int32_t row, const turn_rows *t) {
  etk_strip x = *s;
  x.o += (int64_t)row * s->dv_pad;
  const __m512 a = _mm512_load_ps(t->a), w = _mm512_load_ps(t->w), sum = _mm512_cvtepi32_ps(sum_across(t->sum, BR));
  store_rows(s->l + row, _mm512_fmadd_ps(w, sum, _mm512_mul_ps(a, load_rows(s->l + row, BR))), BR);
  if (t->scale) pv_all(&x, t->p, t->a, t->w, BR, 1);
  else pv_all(&x, t->p, t->a, t->w, BR, 0);
}

/* Rows a block cannot take: masked, with tile skipping, with steps that need the clamp, and the last rows % 4. */
static void block_rest(const etk_strip *s, int32_t row) {
  for (; row < s->rows; row += MR) {
    etk_strip x = *s;
    x.rows = s->rows - row < MR ? s->rows - row : MR;
    x.q += (int64_t)row * s->d_pad, x.q_start += row, x.g += row, x.m += row, x.l += row;
    x.o += (int64_t)row * s->dv_pad;
    if (s->mask) x.mask += row;
    strip_s8(&x);
  }
}

static void block_s8(const etk_strip *s) {
  turn_rows t[2];
  int32_t n = s->rows / BR;
  for (int32_t i = 0; i < s->rows; i++)
    if (!(s->g[i] < 64.0f / ETK_STEP)) n = 0;
  if (n < 2 || s->mask || s->skip_log2 != 0.0f) {
    block_rest(s, 0);
    return;
  }
  block_qk(s, 0, &t[0], NULL);
  for (int32_t i = 0; i < n; i++) {
    turn_rows *now = &t[i & 1];
    if (i + 1 < n) block_qk(s, (i + 1) * BR, &t[~i & 1], now);
    else UNROLL for (int u = 0; u < BR; u++) block_row(now, u);
    block_pv(s, i * BR, now);
  }
  block_rest(s, n * BR);
}

/* ---- float: the same pipeline; p relative to the new maximum ---- */

typedef struct turn_floats {
  float y[BR * 64]; /* logits, then p */
  __m512 sum[BR];
  float next[16], a[16];
} __attribute__((aligned(64))) turn_floats;

INLINE void blockf_row(turn_floats *t, int i) {
  const __m512 m = _mm512_set1_ps(t->next[i]);
  __m512 e[NV];
  UNROLL for (int j = 0; j < NV; j++) {
    e[j] = exp2_ps(_mm512_sub_ps(_mm512_load_ps(t->y + 64 * i + 16 * j), m));
    _mm512_store_ps(t->y + 64 * i + 16 * j, e[j]);
  }
  t->sum[i] = _mm512_add_ps(_mm512_add_ps(e[0], e[1]), _mm512_add_ps(e[2], e[3]));
}

INLINE void blockf_qk(const etk_strip *s, int32_t row, turn_floats *t, turn_floats *before) {
  const int64_t stride = s->d_pad;
  const float *k = s->k, *q = s->qf + row * stride, *q2 = q + 2 * stride;
  __m512 acc[BR][NV];
  UNROLL for (int i = 0; i < BR; i++) UNROLL for (int j = 0; j < NV; j++) acc[i][j] = _mm512_setzero_ps();
  UNROLL for (int u = 0; u < BR; u++) {
    if (before) blockf_row(before, u);
    for (const float *end = k + 16 * stride; k != end; k += 64, q++, q2++) {
      const __m512 k0 = _mm512_load_ps(k), k1 = _mm512_load_ps(k + 16), k2 = _mm512_load_ps(k + 32), k3 = _mm512_load_ps(k + 48);
      UNROLL for (int i = 0; i < BR; i++) {
        const __m512 b = _mm512_set1_ps((i < 2 ? q : q2)[(i & 1) * stride]);
        FMA(acc[i][0], b, k0);
        FMA(acc[i][1], b, k1);
        FMA(acc[i][2], b, k2);
        FMA(acc[i][3], b, k3);
      }
    }
  }
  __m512 top[BR];
  UNROLL for (int i = 0; i < BR; i++) {
    UNROLL for (int j = 0; j < NV; j++) _mm512_store_ps(t->y + 64 * i + 16 * j, acc[i][j]);
    top[i] = _mm512_max_ps(_mm512_max_ps(acc[i][0], acc[i][1]), _mm512_max_ps(acc[i][2], acc[i][3]));
  }
  const __m512 mt = fmax_across(top, BR), m = load_rows(s->m + row, BR);
  const __mmask16 seen = _mm512_mask_cmp_ps_mask(lanes_of(BR), mt, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
  const __m512 mn = _mm512_mask_max_ps(m, seen, m, mt);
  _mm512_store_ps(t->a, _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), seen, exp2_ps(_mm512_sub_ps(m, mn))));
  _mm512_store_ps(t->next, _mm512_mask_mov_ps(_mm512_setzero_ps(), seen, mn));
  store_rows(s->m + row, mn, BR);
}

INLINE void blockf_pv(const etk_strip *s, int32_t row, const turn_floats *t) {
  etk_strip x = *s;
  x.o += (int64_t)row * s->dv_pad;
  store_rows(s->l + row, _mm512_fmadd_ps(_mm512_load_ps(t->a), load_rows(s->l + row, BR), fsum_across(t->sum, BR)), BR);
  pvf_all(&x, t->y, t->a, BR);
}

static void blockf_rest(const etk_strip *s, int32_t row) {
  for (; row < s->rows; row += MR) {
    etk_strip x = *s;
    x.rows = s->rows - row < MR ? s->rows - row : MR;
    x.qf += (int64_t)row * s->d_pad, x.m += row, x.l += row;
    x.o += (int64_t)row * s->dv_pad;
    if (s->mask) x.mask += row;
    strip_f32(&x);
  }
}

static void block_f32(const etk_strip *s) {
  turn_floats t[2];
  const int32_t n = s->mask || s->skip_log2 != 0.0f || s->rows < 2 * BR ? 0 : s->rows / BR;
  if (n) blockf_qk(s, 0, &t[0], NULL);
  for (int32_t i = 0; i < n; i++) {
    turn_floats *now = &t[i & 1];
    if (i + 1 < n) blockf_qk(s, (i + 1) * BR, &t[~i & 1], now);
    else UNROLL for (int u = 0; u < BR; u++) blockf_row(now, u);
    blockf_pv(s, i * BR, now);
  }
  blockf_rest(s, n * BR);
}
