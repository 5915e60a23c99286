/* The attention driver on random problems: every array exactly as large as it says (for AddressSanitizer), three threads
 * against none bit for bit (and for ThreadSanitizer), float and INT8 modes against a plain double loop. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgetok/attn.h"

static int g_failed;
static uint64_t g_state = 88172645463325252u;
static uint64_t rnd(void) {
  g_state ^= g_state << 13;
  g_state ^= g_state >> 7;
  return g_state ^= g_state << 17;
}
static int64_t upto(int64_t n) { return (int64_t)(rnd() % (uint64_t)(n + 1)); }
static float normal(void) {
  float s = 0.0f;
  for (int i = 0; i < 3; i++) s += (float)(rnd() >> 40) * 0x1p-23f - 1.0f;
  return s;
}
static void *block(size_t bytes) {
  void *p = malloc(bytes ? bytes : 1);
  if (!p) exit(2);
  return p;
}

static etk_tensor tensor(int32_t dtype, size_t item, int32_t rank, const int64_t *dim) {
  etk_tensor t = {.dtype = dtype, .rank = rank};
  int64_t step = (int64_t)item;
  for (int32_t i = rank - 1; i >= 0; i--) {
    t.dim[i] = dim[i], t.stride[i] = step;
    step *= dim[i];
  }
  t.capacity = (uint64_t)step;
  t.data = block((size_t)step);
  return t;
}
static etk_tensor floats(int32_t rank, const int64_t *dim, int fill) {
  etk_tensor t = tensor(ETK_F32, 4, rank, dim);
  for (uint64_t i = 0; i < t.capacity / 4; i++) ((float *)t.data)[i] = fill ? normal() : NAN;
  return t;
}
static etk_tensor permutation(int64_t heads, int64_t n) {
  const int64_t dim[3] = {1, heads, n};
  etk_tensor t = tensor(ETK_I32, 4, 3, dim);
  for (int64_t h = 0; h < heads; h++) {
    int32_t *p = (int32_t *)t.data + h * n;
    for (int64_t i = 0; i < n; i++) p[i] = (int32_t)i;
    for (int64_t i = n - 1; i > 0; i--) {
      const int64_t j = upto(i);
      const int32_t swap = p[i];
      p[i] = p[j], p[j] = swap;
    }
  }
  return t;
}

typedef struct problem {
  etk_attn_desc d;
  etk_attn_io io;
  int64_t n, m;
  int64_t *row_ptr;
  int32_t *col;
  uint8_t *listed; /* [hq][nqb][nkb] */
} problem;

static void add_blocks(problem *p) {
  const int64_t nqb = (p->n + 63) / 64, nkb = (p->m + 63) / 64, rows = p->d.hq * nqb;
  p->row_ptr = block((size_t)(rows + 1) * 8);
  p->col = block((size_t)(rows * nkb) * 4);
  p->listed = block((size_t)(rows * nkb));
  int64_t nnz = 0;
  p->row_ptr[0] = 0;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < nkb; c++)
      if ((p->listed[r * nkb + c] = rnd() % 5 < 3)) p->col[nnz++] = (int32_t)c;
    p->row_ptr[r + 1] = nnz;
  }
  p->io.bsr = (etk_bsr){.bq = 64, .bk = 64, .nqb = nqb, .nkb = nkb, .row_ptr = p->row_ptr, .rows = rows, .col = p->col, .nnz = nnz, .stride_h = nqb};
}

static problem draw(void) {
  static const int32_t widths[] = {1, 16, 33, 40, 64, 72, 128};
  problem p = {0};
  etk_attn_desc *d = &p.d;
  d->struct_size = sizeof *d;
  d->batch = (int32_t)upto(2), d->hkv = 1 + (int32_t)upto(1), d->hq = d->hkv * (1 + (int32_t)upto(2));
  d->d = widths[upto(6)], d->dv = widths[upto(6)];
  p.n = upto(140), p.m = upto(200);
  d->max_n = p.n + upto(3), d->max_m = p.m + upto(3);
  d->mask_kind = (int32_t[]){0, 1, 2, 3, 4, 5, 7, 8, 9}[upto(8)];
  if (d->mask_kind & ETK_MASK_WINDOW) d->win_left = upto(90), d->win_right = upto(90), d->sink = upto(70);
  d->flags = ETK_F_RETURN_LSE | (rnd() & 1 ? ETK_F_RETURN_COLMASS | ETK_F_RETURN_SCORES : 0) | (rnd() & 1 ? ETK_F_SMOOTH_V : 0);
  if (rnd() % 4 == 0) d->softcap = 2.0f;
  etk_attn_io *io = &p.io;
  const int64_t b = d->batch, hq = d->hq, hkv = d->hkv;
  io->struct_size = sizeof *io;
  io->q = floats(4, (int64_t[]){b, hq, p.n, d->d}, 1);
  io->k = floats(4, (int64_t[]){b, hkv, p.m, d->d}, 1);
  io->v = floats(4, (int64_t[]){b, hkv, p.m, d->dv}, 1);
  io->o = floats(4, (int64_t[]){b, hq, p.n, d->dv}, 0);
  io->lse = floats(3, (int64_t[]){b, hq, p.n}, 0);
  if (d->flags & ETK_F_RETURN_COLMASS) io->colmass = floats(3, (int64_t[]){b, hq, p.m}, 0);
  if (d->flags & ETK_F_RETURN_SCORES) {
    io->score_rows = upto(p.n);
    io->scores = floats(4, (int64_t[]){b, hq, io->score_rows, p.m}, 0);
  }
  if (rnd() % 3 == 0) io->key_bias = floats(3, (int64_t[]){1, hq, p.m}, 1);
  if (rnd() % 3 == 0) io->q_perm = permutation(hq, p.n);
  if (rnd() % 3 == 0 && !(d->mask_kind & ETK_MASK_GATHER)) io->k_perm = permutation(hkv, p.m);
  if (d->mask_kind & ETK_MASK_GATHER) {
    io->gather = permutation(1, p.m);
    for (int64_t i = 0; i < p.m; i++)
      if (rnd() % 3 == 0) ((int32_t *)io->gather.data)[i] = -1;
  }
  if (d->mask_kind & ETK_MASK_BSR) add_blocks(&p);
  return p;
}

static void drop(problem *p) {
  etk_tensor *const all[] = {&p->io.q, &p->io.k, &p->io.v, &p->io.o, &p->io.lse, &p->io.colmass, &p->io.scores, &p->io.key_bias, &p->io.q_perm, &p->io.k_perm, &p->io.gather};
  for (unsigned i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]->data);
  free(p->row_ptr), free(p->col), free(p->listed);
}

static int64_t slot_of(const etk_tensor *perm, int64_t h, int64_t row) { /* the place that holds a row */
  if (!perm->data) return row;
  const int32_t *p = (const int32_t *)perm->data + (perm->dim[1] > 1 ? h * perm->dim[2] : 0);
  for (int64_t i = 0; i < perm->dim[2]; i++)
    if (p[i] == row) return i;
  return -1;
}

static int visible(const problem *p, int64_t h, int64_t i, int64_t j) {
  const etk_attn_desc *d = &p->d;
  const int64_t q = i + (p->m - p->n);
  if ((d->mask_kind & ETK_MASK_CAUSAL) && j > q) return 0;
  if ((d->mask_kind & ETK_MASK_WINDOW) && !((j >= q - d->win_left && j <= q + d->win_right) || j < d->sink)) return 0;
  if ((d->mask_kind & ETK_MASK_GATHER) && slot_of(&p->io.gather, 0, j) < 0) return 0;
  if (!(d->mask_kind & ETK_MASK_BSR)) return 1;
  const int64_t r = slot_of(&p->io.q_perm, h, i) / 64, c = slot_of(&p->io.k_perm, h / (d->hq / d->hkv), j) / 64;
  return p->listed[(h * p->io.bsr.nqb + r) * p->io.bsr.nkb + c];
}

/* Largest difference from the double law over all rows, as a share of the largest value. */
static double distance(const problem *p) {
  const etk_attn_desc *d = &p->d;
  const int64_t group = d->hq / d->hkv;
  double worst = 0.0, *s = block((size_t)(p->m + 1) * 8);
  for (int64_t b = 0; b < d->batch; b++)
    for (int64_t h = 0; h < d->hq; h++)
      for (int64_t i = 0; i < p->n; i++) {
        const float *q = (const float *)p->io.q.data + ((b * d->hq + h) * p->n + i) * d->d, *o = (const float *)p->io.o.data + ((b * d->hq + h) * p->n + i) * d->dv;
        double top = -INFINITY, sum = 0.0;
        for (int64_t j = 0; j < p->m; j++) {
          const float *k = (const float *)p->io.k.data + ((b * d->hkv + h / group) * p->m + j) * d->d;
          double x = 0.0;
          for (int32_t c = 0; c < d->d; c++) x += (double)q[c] * k[c];
          x /= sqrt((double)d->d);
          if (d->softcap > 0.0f) x = d->softcap * tanh(x / d->softcap);
          if (p->io.key_bias.data) x += ((const float *)p->io.key_bias.data)[h * p->m + j];
          s[j] = visible(p, h, i, j) ? x : -INFINITY;
          top = s[j] > top ? s[j] : top;
        }
        for (int64_t j = 0; j < p->m; j++) sum += s[j] = top > -INFINITY ? exp(s[j] - top) : 0.0;
        for (int32_t c = 0; c < d->dv; c++) {
          double x = 0.0;
          for (int64_t j = 0; j < p->m; j++) x += s[j] * ((const float *)p->io.v.data)[((b * d->hkv + h / group) * p->m + j) * d->dv + c];
          const double gap = fabs((sum > 0.0 ? x / sum : 0.0) - o[c]);
          worst = gap <= worst ? worst : gap; /* NaN is the worst */
        }
        const double lse = sum > 0.0 ? top + log(sum) : -INFINITY, got = ((const float *)p->io.lse.data)[(b * d->hq + h) * p->n + i];
        if (!(lse == got) && !(fabs(lse - got) <= 0.2)) worst = INFINITY;
      }
  free(s);
  return worst;
}

static etk_status run(const problem *p, int32_t nthreads, const etk_pool *pool) {
  etk_attn_plan *plan;
  uint64_t bytes, align;
  etk_status st = etk_attn_plan_create(&p->d, NULL, nthreads, &plan);
  if (st != ETK_OK) return st;
  st = etk_attn_workspace(plan, &bytes, &align);
  void *ws = aligned_alloc((size_t)align, (size_t)(bytes + align - 1) / align * align);
  if (st == ETK_OK) {
    if (ws) memset(ws, 0xff, (size_t)bytes); /* whatever lay there before */
    st = etk_attn_run(plan, &p->io, ws, bytes, pool);
  }
  free(ws);
  etk_attn_plan_free(plan);
  return st;
}

static void check(problem *p, int32_t compute, int number, const etk_pool *pool) {
  /* float sums of 200 terms; INT8: a few percent of values of size 1 in these draws, at most a fifth in the worst row */
  static const double near[] = {2e-5, 0, 0.2, 0.2};
  p->d.compute = compute;
  const etk_status st = run(p, 1, NULL);
  if (st != ETK_OK && st != ETK_NOTE_EMPTY_ROWS) {
    g_failed++, printf("problem %d compute %d: status %d\n", number, compute, st);
    return;
  }
  const double far = distance(p);
  if (!(far <= near[compute])) g_failed++, printf("problem %d compute %d mask %d: off by %g\n", number, compute, p->d.mask_kind, far);
  const etk_tensor *outs[] = {&p->io.o, &p->io.lse, &p->io.colmass, &p->io.scores};
  void *kept[4];
  for (int i = 0; i < 4; i++) {
    kept[i] = block((size_t)outs[i]->capacity);
    if (outs[i]->data) memcpy(kept[i], outs[i]->data, (size_t)outs[i]->capacity), memset(outs[i]->data, 0xff, (size_t)outs[i]->capacity);
  }
  if (run(p, 3, pool) != st) g_failed++, printf("problem %d compute %d: another status with threads\n", number, compute);
  for (int i = 0; i < 4; i++) {
    if (outs[i]->data && memcmp(kept[i], outs[i]->data, (size_t)outs[i]->capacity)) g_failed++, printf("problem %d compute %d: output %d differs with threads\n", number, compute, i);
    free(kept[i]);
  }
}

int main(void) {
  const etk_pool *pool;
  if (etk_pool_create(3, 0, &pool) != ETK_OK) return 2;
  for (int i = 0; i < 60; i++) {
    problem p = draw();
    static const int32_t modes[] = {ETK_C_F32, ETK_C_S8S8, ETK_C_S8F};
    for (int c = 0; c < 3; c++) check(&p, modes[c], i, pool);
    drop(&p);
  }
  etk_pool_free(pool);
  printf("attention driver: %s\n", g_failed ? "FAILED" : "ok");
  return g_failed != 0;
}
