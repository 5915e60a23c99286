/* Which pages a query block walks, and which of a page's keys each row sees.
 *
 *   visible(q, k) = (q - left <= k <= q + right, or k < sink), and k <= q when causal, for positions q and k;
 *   and the slot exists, its block is listed, and its bit is set where the tile has bits. */
#include "attn_plan.h"

const int32_t *attn_slots(const attn_job *j, int64_t b, int64_t hk) {
  if (j->gather.data) return attn_at(&j->gather, b, hk, 0);
  return j->k_perm.data ? attn_at(&j->k_perm, b, hk, 0) : NULL;
}

int64_t attn_query_row(const attn_job *j, int64_t b, int64_t h, int64_t r) {
  return j->q_perm.data ? *(const int32_t *)attn_at(&j->q_perm, b, h, r) : r;
}

int64_t attn_output_row(const attn_job *j, int64_t b, int64_t h, int64_t r) {
  return j->o_perm.data ? *(const int32_t *)attn_at(&j->o_perm, b, h, r) : attn_query_row(j, b, h, r);
}

const attn_seq *attn_find_task(const attn_job *j, int64_t task, int64_t *b, int64_t *h, int64_t *block) {
  int64_t lo = 0, hi = j->desc->batch - 1;
  while (lo < hi) {
    const int64_t mid = (lo + hi + 1) / 2;
    if (j->seqs[mid].first_task <= task) lo = mid;
    else hi = mid - 1;
  }
  const attn_seq *s = &j->seqs[lo];
  const int64_t at = (task - s->first_task) % s->blocks;
  *b = lo, *h = (task - s->first_task) / s->blocks;
  *block = j->reverse ? s->blocks - 1 - at : at;
  return s;
}

/* First CSR row of a head, or -1 when it is dense. */
static int64_t first_row(const etk_bsr *x, int64_t b, int64_t h) {
  if (x->head_pattern) return x->head_pattern[h] < 0 ? -1 : (int64_t)x->head_pattern[h] * x->nqb;
  return b * x->stride_b + h * x->stride_h;
}

static int64_t pattern_of(const etk_bsr *x, int64_t b, int64_t h) {
  const int64_t first = first_row(x, b, h);
  return first < 0 || x->nqb == 0 ? 0 : first / x->nqb;
}

void attn_block_rows(const attn_job *j, int64_t b, int64_t h, int64_t block, int64_t *r0, int64_t *r1) {
  const etk_bsr *x = &j->io.bsr;
  const int64_t n = j->seqs[b].n;
  if ((j->desc->mask_kind & ETK_MASK_BSR) && x->bq == 0) {
    const int32_t *at = x->q_block_ptr + pattern_of(x, b, h) * x->var_stride_q;
    *r0 = at[block], *r1 = at[block + 1];
    return;
  }
  *r0 = block * ATTN_ROWS;
  *r1 = *r0 + ATTN_ROWS < n ? *r0 + ATTN_ROWS : n;
}

/* 0: no row in the range sees any key of [k0, k1]; 1: every row sees every key; 2: look closer. */
static int classify(const attn_job *j, int64_t q0, int64_t q1, int64_t k0, int64_t k1) {
  const int causal = (j->desc->mask_kind & ETK_MASK_CAUSAL) != 0;
  if (!j->positional) return 1;
  if (k0 > k1 || (causal && k0 > q1)) return 0;
  if (!(k1 >= q0 - j->win_left && k0 <= q1 + j->win_right) && !(k0 < j->sink)) return 0;
  if (causal && k1 > q0) return 2;
  return (k0 >= q1 - j->win_left && k1 <= q0 + j->win_right) || k1 < j->sink ? 1 : 2;
}

static uint64_t low_bits(int64_t n) { return n >= 64 ? ~UINT64_C(0) : n <= 0 ? 0 : (UINT64_C(1) << n) - 1; }

/* Append a page unless it is empty; with a page already at the end (variable blocks) widen what it keeps. */
static int64_t add_page(const attn_job *j, const attn_seq *s, int64_t gp0, int64_t q0, int64_t q1, int64_t page, uint64_t keep,
                        int32_t bits, attn_tile *out, int64_t n) {
  const int64_t gp = gp0 + page, first = page * ETK_PAGE;
  if (n > 0 && out[n - 1].page == page) {
    out[n - 1].keep |= j->explicit_k ? keep & j->valid[gp] : keep;
    out[n - 1].masked = out[n - 1].partial || out[n - 1].keep != ~UINT64_C(0);
    return n;
  }
  int64_t k0 = first, k1 = (first + ETK_PAGE < s->slots ? first + ETK_PAGE : s->slots) - 1;
  if (j->explicit_k) {
    keep &= j->valid[gp];
    k0 = j->page_pos[2 * gp], k1 = j->page_pos[2 * gp + 1];
  } else {
    keep &= low_bits(s->slots - first);
  }
  const int seen = keep ? classify(j, q0, q1, k0, k1) : 0;
  if (!seen) return n;
  out[n] = (attn_tile){.page = (int32_t)page, .bits = bits, .partial = seen == 2, .keep = keep};
  out[n].masked = out[n].partial || bits >= 0 || keep != ~UINT64_C(0);
  return n + 1;
}

/* Every page, or with implicit positions only those of the window and the sink. */
static int64_t list_dense(const attn_job *j, const attn_seq *s, int64_t gp0, int64_t q0, int64_t q1, int64_t page0, int64_t page1,
                          attn_tile *out) {
  int64_t n = 0, sink_end = page0;
  if (!j->explicit_k && j->positional) {
    const int64_t last = q1 + j->win_right, first = q0 - j->win_left;
    const int64_t sink = j->sink < s->slots ? j->sink : s->slots;
    sink_end = (sink + ETK_PAGE - 1) / ETK_PAGE < page1 ? (sink + ETK_PAGE - 1) / ETK_PAGE : page1;
    for (int64_t p = page0; p < sink_end; p++) n = add_page(j, s, gp0, q0, q1, p, ~UINT64_C(0), -1, out, n);
    if (sink_end > page0) page0 = sink_end;
    if (first >= 0 && first / ETK_PAGE > page0) page0 = first / ETK_PAGE;
    if (last < 0) return n;
    if (last / ETK_PAGE + 1 < page1) page1 = last / ETK_PAGE + 1;
  }
  for (int64_t p = page0; p < page1; p++) n = add_page(j, s, gp0, q0, q1, p, ~UINT64_C(0), -1, out, n);
  return n;
}

static int64_t lower_bound(const int32_t *x, int64_t lo, int64_t hi, int64_t value) {
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (x[mid] < value) lo = mid + 1;
    else hi = mid;
  }
  return lo;
}

int64_t attn_list_tiles(const attn_job *j, const attn_seq *s, int64_t b, int64_t h, int64_t block, int64_t q0, int64_t q1,
                        int64_t page0, int64_t page1, attn_tile *out) {
  const etk_bsr *x = &j->io.bsr;
  const int64_t gp0 = s->first_page + h / j->plan->group * s->pages;
  const int64_t row = j->desc->mask_kind & ETK_MASK_BSR ? first_row(x, b, h) : -1;
  if (page1 > s->pages) page1 = s->pages;
  if (row < 0) return list_dense(j, s, gp0, q0, q1, page0, page1, out);
  int64_t n = 0, i = x->row_ptr[row + block];
  const int64_t end = x->row_ptr[row + block + 1];
  if (x->bq == 64) {
    if (page0 > 0) i = lower_bound(x->col, i, end, page0);
    for (; i < end && x->col[i] < page1; i++)
      n = add_page(j, s, gp0, q0, q1, x->col[i], ~UINT64_C(0), x->bits_idx ? x->bits_idx[i] : -1, out, n);
    return n;
  }
  const int32_t *at = x->k_block_ptr + pattern_of(x, b, h) * x->var_stride_k;
  for (; i < end; i++) {
    int64_t k0 = at[x->col[i]], k1 = at[x->col[i] + 1];
    if (k0 < page0 * ETK_PAGE) k0 = page0 * ETK_PAGE;
    if (k1 > page1 * ETK_PAGE) k1 = page1 * ETK_PAGE;
    for (int64_t p = k0 / ETK_PAGE; k0 < k1; p++, k0 = p * ETK_PAGE) {
      const uint64_t keep = low_bits(k1 - p * ETK_PAGE) & ~low_bits(k0 - p * ETK_PAGE);
      n = add_page(j, s, gp0, q0, q1, p, keep, -1, out, n);
    }
  }
  return n;
}

/* Positions of the page are first .. first + 63: the visible ones are runs of bits. */
static uint64_t run_of_bits(const attn_job *j, int64_t q, int64_t first) {
  const int causal = (j->desc->mask_kind & ETK_MASK_CAUSAL) != 0;
  uint64_t word = low_bits(q + j->win_right + 1 - first) & ~low_bits(q - j->win_left - first);
  word |= low_bits(j->sink - first);
  return causal ? word & low_bits(q + 1 - first) : word;
}

static uint64_t compare_bits(const attn_job *j, int64_t q, const int64_t *k) {
  const int causal = (j->desc->mask_kind & ETK_MASK_CAUSAL) != 0;
  const int64_t lo = q - j->win_left, hi = q + j->win_right;
  uint64_t word = 0;
  for (int i = 0; i < ETK_PAGE; i++) {
    const uint64_t seen = (uint64_t)(((k[i] >= lo) & (k[i] <= hi)) | (k[i] < j->sink)) & (uint64_t)(!causal | (k[i] <= q));
    word |= seen << i;
  }
  return word;
}

void attn_mask_words(const attn_job *j, const attn_piece *piece, const attn_tile *t, uint64_t *mask) {
  const int64_t gp = attn_gp(piece, t->page), first = (int64_t)t->page * ETK_PAGE;
  for (int32_t i = 0; i < piece->n; i++) mask[i] = t->keep;
  if (t->partial && j->explicit_k)
    for (int32_t i = 0; i < piece->n; i++) mask[i] &= compare_bits(j, piece->pos[i], j->kpos + gp * ETK_PAGE);
  else if (t->partial)
    for (int32_t i = 0; i < piece->n; i++) mask[i] &= run_of_bits(j, piece->pos[i], first);
  if (t->bits >= 0) {
    const uint64_t *bits = j->io.bsr.bits + (int64_t)t->bits * 64 + piece->block_row;
    for (int32_t i = 0; i < piece->n; i++) mask[i] &= bits[i];
  }
}
