/* Block indices: content checks on hostile arrays, and the builders. What a builder accepts must pass the check. */
#include "fuzz.h"

static int64_t small(fuzz *f) { return fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 300); }

static int32_t *ints(fuzz *f, int64_t n) {
  int32_t *p = fuzz_block(f, (uint64_t)n * 4, 16);
  fuzz_fill(f, p, ETK_I32, (uint64_t)n * 4);
  return p;
}

/* A random valid index over n x m, then a few entries overwritten. */
static void check_target(fuzz *f) {
  const int64_t n = fuzz_upto(f, 200), m = fuzz_upto(f, 255), batch = fuzz_upto(f, 2), heads = fuzz_upto(f, 3);
  etk_bsr x = {.bq = 64, .bk = 64, .nqb = (n + 63) / 64, .nkb = (m + 63) / 64};
  const int variable = fuzz_u8(f) & 1;
  if (variable) x.bq = x.bk = 0;
  if (fuzz_rarely(f)) x.bq = (int32_t)fuzz_number(f);
  const int64_t patterns = 1 + fuzz_upto(f, 3);
  x.rows = patterns * x.nqb;
  int64_t *row_ptr = fuzz_block(f, (uint64_t)(x.rows + 1) * 8, 16);
  const uint32_t keep = fuzz_u8(f);
  row_ptr[0] = 0;
  int32_t *col = fuzz_block(f, (uint64_t)(x.rows * x.nkb) * 4, 16);
  for (int64_t r = 0; r < x.rows; r++) {
    for (int64_t c = 0; c < x.nkb; c++)
      if ((keep >> ((r + c) % 8)) & 1) col[x.nnz++] = (int32_t)c;
    row_ptr[r + 1] = x.nnz;
  }
  int32_t *cols = fuzz_block(f, (uint64_t)x.nnz * 4, 16); /* exactly nnz, so that one more read is seen */
  if (x.nnz) memcpy(cols, col, (size_t)x.nnz * 4);
  x.row_ptr = row_ptr;
  x.col = cols;
  x.nbits = fuzz_upto(f, 3);
  x.bits = fuzz_block(f, (uint64_t)x.nbits * 512, 16);
  uint8_t *kind = fuzz_block(f, (uint64_t)x.nnz, 16);
  int32_t *bits_idx = fuzz_block(f, (uint64_t)x.nnz * 4, 16);
  for (int64_t i = 0; i < x.nnz; i++) {
    kind[i] = i & 1;
    bits_idx[i] = (int32_t)(i % (x.nbits + 1)) - 1;
  }
  x.kind = fuzz_u8(f) & 1 ? kind : NULL;
  x.bits_idx = fuzz_u8(f) & 1 ? bits_idx : NULL;
  int32_t *qp = NULL, *kp = NULL, *head = NULL;
  if (variable) {
    const int64_t copies = fuzz_u8(f) & 1 ? patterns : 1;
    x.var_stride_q = copies > 1 ? x.nqb + 1 : 0;
    x.var_stride_k = copies > 1 ? x.nkb + 1 : 0;
    qp = fuzz_block(f, (uint64_t)(copies * (x.nqb + 1)) * 4, 16);
    kp = fuzz_block(f, (uint64_t)(copies * (x.nkb + 1)) * 4, 16);
    for (int64_t p = 0; p < copies; p++) {
      for (int64_t i = 0; i <= x.nqb; i++) qp[p * (x.nqb + 1) + i] = (int32_t)(i == x.nqb ? n : i * 5 < n ? i * 5 : n);
      for (int64_t i = 0; i <= x.nkb; i++) kp[p * (x.nkb + 1) + i] = (int32_t)(i == x.nkb ? m : i * 7 < m ? i * 7 : m);
    }
    if (fuzz_rarely(f)) qp[fuzz_u8(f) % (copies * (x.nqb + 1))] = (int32_t)fuzz_number(f);
    if (fuzz_rarely(f)) kp[fuzz_u8(f) % (copies * (x.nkb + 1))] = (int32_t)fuzz_number(f);
    x.q_block_ptr = qp;
    x.k_block_ptr = kp;
  }
  if (fuzz_u8(f) & 1) {
    head = ints(f, heads);
    for (int64_t h = 0; h < heads; h++) head[h] = (int32_t)(h % (patterns + 1)) - (h % (patterns + 1) == patterns ? 2 + (int32_t)patterns : 0);
    if (heads && fuzz_rarely(f)) head[fuzz_u8(f) % heads] = (int32_t)fuzz_number(f);
    x.head_pattern = head;
  } else if (patterns > 1) {
    x.stride_h = x.nqb * (fuzz_u8(f) & 1);
    x.stride_b = x.nqb * (fuzz_u8(f) & 1);
  }
  if (fuzz_rarely(f)) row_ptr[fuzz_u8(f) % (x.rows + 1)] = fuzz_number(f);
  if (x.nnz && fuzz_rarely(f)) cols[fuzz_u8(f) % x.nnz] = (int32_t)fuzz_number(f);
  if (x.nnz && fuzz_rarely(f)) kind[fuzz_u8(f) % x.nnz] = fuzz_u8(f);
  if (x.nnz && fuzz_rarely(f)) bits_idx[fuzz_u8(f) % x.nnz] = (int32_t)fuzz_number(f);
  if (fuzz_rarely(f)) x.stride_b = fuzz_number(f);
  if (fuzz_rarely(f)) x.stride_h = fuzz_number(f);
  const int64_t n2 = fuzz_rarely(f) ? fuzz_number(f) : n, m2 = fuzz_rarely(f) ? fuzz_number(f) : m;
  int64_t listed, visible;
  if (etk_bsr_check(&x, batch, heads, n2, m2) == ETK_OK) {
    FUZZ_CHECK(etk_bsr_count(&x, batch, heads, n2, m2, fuzz_u8(f) & 1, &listed, &visible) == ETK_OK);
    FUZZ_CHECK(listed >= 0 && visible >= 0);
  }
}

static void perm_target(fuzz *f) {
  const int64_t n = fuzz_upto(f, 255);
  int32_t *p = fuzz_block(f, (uint64_t)n * 4, 16);
  for (int64_t i = 0; i < n; i++) p[i] = (int32_t)((i * 5 + 3) % n);
  if (n && (fuzz_u8(f) & 1)) p[fuzz_u8(f) % n] = (int32_t)fuzz_number(f);
  unsigned char met[256] = {0};
  int good = 1;
  for (int64_t i = 0; i < n; i++) good = good && p[i] >= 0 && p[i] < n && !met[p[i]]++;
  FUZZ_CHECK((etk_perm_check(p, n) == ETK_OK) == good);
}

/* Arrays of the capacities that the first call asked for, at times one less: then nothing may be written. */
static int give_arrays(fuzz *f, etk_index_arrays *a) {
  FUZZ_CHECK(a->rows >= 0 && a->nnz >= 0 && a->nbits >= 0);
  if (a->rows > 1 << 16 || a->nnz > 1 << 18 || a->nbits > 1 << 12) return 0; /* many rows of nothing, say */
  const int64_t less = fuzz_rarely(f);
  a->row_cap = a->rows + 1 - less;
  a->nnz_cap = a->nnz;
  a->bits_cap = a->nbits;
  a->row_ptr = fuzz_block(f, (uint64_t)a->row_cap * 8, 16);
  a->col = fuzz_block(f, (uint64_t)a->nnz * 4, 16);
  a->kind = fuzz_block(f, (uint64_t)a->nnz, 16);
  a->bits_idx = fuzz_block(f, (uint64_t)a->nnz * 4, 16);
  a->bits = fuzz_block(f, (uint64_t)a->nbits * 512, 16);
  if (a->row_cap) memset(a->row_ptr, FUZZ_POISON, (size_t)a->row_cap * 8);
  return 1;
}

static void judge(const etk_index_arrays *a, const etk_bsr *x, etk_status st, int64_t batch, int64_t heads, int64_t n, int64_t m) {
  if (st < 0) {
    if (st != ETK_E_CANCELLED) fuzz_untouched(a->row_ptr, (uint64_t)a->row_cap * 8);
    return;
  }
  FUZZ_CHECK(etk_bsr_check(x, batch, heads, n, m) == ETK_OK);
}

static void window_target(fuzz *f) {
  const etk_window_desc plain = {sizeof plain, fuzz_u8(f) & 1, small(f), small(f), small(f), small(f), small(f)};
  const etk_window_desc *desc = fuzz_struct(f, &plain, sizeof plain);
  etk_index_arrays a = {0};
  etk_bsr x;
  if (plain.n > 4096 || plain.m > 4096) { /* long ones: only that the refusal or the count comes */
    (void)!etk_bsr_from_window(desc->struct_size > 4096 || plain.n > INT32_MAX || plain.m > INT32_MAX ? desc : NULL, &a, NULL);
    return;
  }
  if (etk_bsr_from_window(desc, &a, NULL) != ETK_OK) return;
  if (!give_arrays(f, &a)) return;
  if (desc->struct_size < sizeof plain) return;
  judge(&a, &x, etk_bsr_from_window(desc, &a, &x), 1, 1, plain.n, plain.m);
}

static void radial_target(fuzz *f) {
  const etk_radial_desc plain = {.struct_size = sizeof plain, .sink_frame = fuzz_u8(f) & 1,
                                 .frames = fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 9),
                                 .tokens = fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 90),
                                 .text = fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 70),
                                 .decay_q8 = (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 255))};
  const etk_radial_desc *desc = fuzz_struct(f, &plain, sizeof plain);
  etk_index_arrays a = {0};
  etk_bsr x;
  const int big = plain.frames > 64 || plain.tokens > 256 || plain.text > 256;
  if (big && plain.frames > 0 && plain.frames < 1 << 20 && plain.tokens > 0 && plain.tokens < 1 << 20) return; /* slow */
  if (big && plain.frames * (plain.tokens > 0) == 0 && plain.text < 1 << 21) return;
  if (etk_bsr_from_radial(desc, &a, NULL) != ETK_OK || desc->struct_size < sizeof plain) return;
  if (!give_arrays(f, &a)) return;
  const int64_t all = plain.frames * plain.tokens + plain.text;
  judge(&a, &x, etk_bsr_from_radial(desc, &a, &x), 1, 1, all, all);
}

static void mask_target(fuzz *f) {
  const int32_t dtypes[] = {ETK_BOOL, ETK_U8, ETK_U64};
  const int32_t dtype = dtypes[fuzz_upto(f, 2)];
  const int64_t n = fuzz_upto(f, 150), m = fuzz_upto(f, 200);
  const int64_t dim[] = {fuzz_upto(f, 2), fuzz_upto(f, 2), n, dtype == ETK_U64 ? (m + 63) / 64 : m};
  const int32_t rank = 2 + fuzz_upto(f, 2);
  etk_tensor mask = fuzz_tensor(f, dtype, rank, dim + 4 - rank);
  if (fuzz_u8(f) % 4 == 3) fuzz_break(f, &mask);
  const int64_t m2 = fuzz_rarely(f) ? fuzz_number(f) : m;
  const int32_t causal = fuzz_u8(f) & 1;
  uint64_t bytes = 0;
  if (etk_bsr_from_mask_workspace(&mask, m2, &bytes) < 0 || bytes > FUZZ_MAX_BYTES) return;
  void *ws = fuzz_block(f, bytes, 64);
  etk_index_arrays a = {0};
  etk_bsr x;
  if (etk_bsr_from_mask(&mask, m2, causal, &a, NULL, ws, bytes) < 0) return;
  if (bytes) FUZZ_CHECK(etk_bsr_from_mask(&mask, m2, causal, &a, NULL, ws, bytes - 1) == ETK_E_WORKSPACE);
  if (!give_arrays(f, &a)) return;
  const etk_status st = etk_bsr_from_mask(&mask, m2, causal, &a, &x, ws, bytes);
  const int64_t batch = mask.rank == 4 ? mask.dim[0] : 1, heads = mask.rank >= 3 ? mask.dim[mask.rank - 3] : 1;
  judge(&a, &x, st, batch, heads, mask.dim[mask.rank - 2], m2);
}

/* The builders that look at Q and K, by one shape of call. */
typedef struct builder {
  int xattn;
  const void *desc;
} builder;

static etk_status workspace(const builder *how, const etk_tensor *q, const etk_tensor *k, const etk_pool *pool, uint64_t *bytes) {
  return how->xattn ? etk_bsr_from_xattn_workspace(how->desc, q, k, pool, bytes)
                    : etk_bsr_from_topp_workspace(how->desc, q, k, pool, bytes);
}

static etk_status build(const builder *how, const etk_tensor *q, const etk_tensor *k, etk_index_arrays *a, etk_bsr *x, void *ws,
                        uint64_t bytes, const etk_pool *pool) {
  return how->xattn ? etk_bsr_from_xattn(how->desc, q, k, a, x, ws, bytes, pool)
                    : etk_bsr_from_topp(how->desc, q, k, a, x, ws, bytes, pool);
}

static builder choose_builder(fuzz *f) {
  if (fuzz_u8(f) & 1) {
    const etk_xattn_desc x = {.struct_size = sizeof x, .causal = fuzz_u8(f) & 1, .scale = fuzz_rarely(f) ? fuzz_float(f) : 0.0f,
                              .threshold = fuzz_rarely(f) ? fuzz_float(f) : 0.9f,
                              .stride = (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : 4 << fuzz_upto(f, 4)),
                              .min_keep = (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : 0)};
    return (builder){1, fuzz_struct(f, &x, sizeof x)};
  }
  const etk_topp_desc x = {.struct_size = sizeof x, .causal = fuzz_u8(f) & 1, .scale = fuzz_rarely(f) ? fuzz_float(f) : 0.0f,
                           .theta = fuzz_rarely(f) ? fuzz_float(f) : 0.3f, .p = fuzz_rarely(f) ? fuzz_float(f) : 0.9f,
                           .topk = fuzz_rarely(f) ? fuzz_float(f) : 0.0f,
                           .min_keep = (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : 0),
                           .sink_blocks = (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 2)),
                           .local_blocks = (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 2))};
  return (builder){0, fuzz_struct(f, &x, sizeof x)};
}

static void scores_target(fuzz *f) {
  const int64_t hkv = 1 + fuzz_upto(f, 1), hq = hkv * (1 + fuzz_upto(f, 1)), batch = fuzz_upto(f, 2), d = 1 + fuzz_upto(f, 70);
  const int64_t qd[] = {batch, hq, fuzz_upto(f, 200), d}, kd[] = {batch, hkv, fuzz_upto(f, 200), d};
  etk_tensor q = fuzz_tensor(f, ETK_F32, 4, qd), k = fuzz_tensor(f, ETK_F32, 4, kd);
  if (fuzz_u8(f) % 8 == 7) fuzz_break(f, &q);
  if (fuzz_u8(f) % 8 == 7) fuzz_break(f, &k);
  const builder how = choose_builder(f);
  fuzz_pool state;
  const etk_pool *pool = fuzz_make_pool(f, &state);
  uint64_t bytes = 0;
  if (workspace(&how, &q, &k, pool, &bytes) < 0 || bytes > FUZZ_MAX_BYTES) return;
  void *ws = fuzz_block(f, bytes, 64);
  etk_index_arrays a = {0};
  etk_bsr x;
  if (build(&how, &q, &k, &a, NULL, ws, bytes, pool) < 0) return;
  if (bytes) FUZZ_CHECK(build(&how, &q, &k, &a, NULL, ws, bytes - 1, pool) < 0);
  if (!give_arrays(f, &a)) return;
  judge(&a, &x, build(&how, &q, &k, &a, &x, ws, bytes, pool), q.dim[0], q.dim[1], q.dim[2], k.dim[2]);
}

/* A permutation and its inverse, or an abort. */
static void judge_order(const int32_t *perm, const int32_t *inverse, int64_t heads, int64_t n) {
  for (int64_t h = 0; h < heads; h++) {
    FUZZ_CHECK(etk_perm_check(perm + h * n, n) == ETK_OK);
    for (int64_t i = 0; i < n; i++) FUZZ_CHECK(inverse[h * n + perm[h * n + i]] == i);
  }
}

static int32_t *room(fuzz *f, int64_t n) { return fuzz_block(f, (uint64_t)n * 4, 16); }

static void clusters_target(fuzz *f) {
  const int64_t hkv = 1 + fuzz_upto(f, 1), hq = hkv * (1 + fuzz_upto(f, 1)), batch = fuzz_upto(f, 2), d = 1 + fuzz_upto(f, 40);
  const int64_t qd[] = {batch, hq, fuzz_upto(f, 130), d}, kd[] = {batch, hkv, fuzz_upto(f, 130), d};
  etk_tensor q = fuzz_tensor(f, ETK_F32, 4, qd), k = fuzz_tensor(f, ETK_F32, 4, kd);
  if (fuzz_u8(f) % 8 == 7) fuzz_break(f, &q);
  if (fuzz_u8(f) % 8 == 7) fuzz_break(f, &k);
  const etk_clusters_desc plain = {.struct_size = sizeof plain,
                                   .q_clusters = (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : 1 + fuzz_upto(f, 70)),
                                   .k_clusters = (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : 1 + fuzz_upto(f, 70)),
                                   .iterations = (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 3)),
                                   .warm = fuzz_rarely(f) ? (int32_t)fuzz_number(f) : fuzz_u8(f) & 1,
                                   .scale = fuzz_rarely(f) ? fuzz_float(f) : 0.0f, .p = fuzz_rarely(f) ? fuzz_float(f) : 0.8f,
                                   .min_ratio = fuzz_rarely(f) ? fuzz_float(f) : 0.1f};
  const etk_clusters_desc *desc = fuzz_struct(f, &plain, sizeof plain);
  fuzz_pool state;
  const etk_pool *pool = fuzz_make_pool(f, &state);
  uint64_t bytes = 0;
  if (etk_bsr_from_clusters_workspace(desc, &q, &k, pool, &bytes) < 0 || bytes > FUZZ_MAX_BYTES) return;
  void *ws = fuzz_block(f, bytes, 64);
  const int64_t qn = q.dim[0] * q.dim[1] * q.dim[2], kn = k.dim[0] * k.dim[1] * k.dim[2], heads = q.dim[0] * q.dim[1];
  const etk_cluster_arrays to = {room(f, qn), room(f, kn), room(f, qn), room(f, qn), room(f, kn), room(f, kn),
                                 room(f, heads * (plain.q_clusters + 1)), room(f, heads * (plain.k_clusters + 1))};
  for (int64_t i = 0; i < qn; i++) to.q_labels[i] = (int32_t)(i % plain.q_clusters);
  for (int64_t i = 0; i < kn; i++) to.k_labels[i] = (int32_t)(i % plain.k_clusters);
  if (qn && fuzz_rarely(f)) to.q_labels[fuzz_u8(f) % qn] = (int32_t)fuzz_number(f);
  if (kn && fuzz_rarely(f)) to.k_labels[fuzz_u8(f) % kn] = (int32_t)fuzz_number(f);
  etk_index_arrays a = {0};
  etk_bsr x;
  if (etk_bsr_from_clusters(desc, &q, &k, &to, &a, NULL, ws, bytes, pool) < 0) return;
  FUZZ_CHECK(etk_bsr_from_clusters(desc, &q, &k, &to, &a, NULL, ws, bytes - 1, pool) < 0);
  if (!give_arrays(f, &a)) return;
  const etk_status st = etk_bsr_from_clusters(desc, &q, &k, &to, &a, &x, ws, bytes, pool);
  judge(&a, &x, st, q.dim[0], q.dim[1], q.dim[2], k.dim[2]);
  if (st < 0) return;
  judge_order(to.q_perm, to.q_inverse, heads, q.dim[2]);
  judge_order(to.k_perm, to.k_inverse, k.dim[0] * k.dim[1], k.dim[2]);
}

static void paro_target(fuzz *f) {
  const int64_t frames = fuzz_upto(f, 4), height = fuzz_upto(f, 6), width = fuzz_upto(f, 8), text = fuzz_upto(f, 70);
  const int64_t heads = 1 + fuzz_upto(f, 2), d = 1 + fuzz_upto(f, 20);
  const int64_t dim[] = {fuzz_upto(f, 2), heads, frames * height * width + text, d};
  etk_tensor q = fuzz_tensor(f, ETK_F32, 4, dim), k = fuzz_tensor(f, ETK_F32, 4, dim);
  if (fuzz_u8(f) % 8 == 7) fuzz_break(f, &q);
  if (fuzz_u8(f) % 8 == 7) fuzz_break(f, &k);
  const etk_paro_desc plain = {.struct_size = sizeof plain, .frames = fuzz_rarely(f) ? fuzz_number(f) : frames,
                               .height = fuzz_rarely(f) ? fuzz_number(f) : height, .width = fuzz_rarely(f) ? fuzz_number(f) : width,
                               .text = fuzz_rarely(f) ? fuzz_number(f) : text, .scale = fuzz_rarely(f) ? fuzz_float(f) : 0.0f,
                               .alpha = fuzz_rarely(f) ? fuzz_float(f) : 0.5f, .eps = fuzz_rarely(f) ? fuzz_float(f) : 0.0f,
                               .density = fuzz_rarely(f) ? fuzz_float(f) : 0.2f, .mass = fuzz_rarely(f) ? fuzz_float(f) : 0.0f};
  const etk_paro_desc *desc = fuzz_struct(f, &plain, sizeof plain);
  fuzz_pool state;
  const etk_pool *pool = fuzz_make_pool(f, &state);
  uint64_t bytes = 0;
  if (etk_bsr_from_paro_workspace(desc, &q, &k, pool, &bytes) < 0 || bytes > FUZZ_MAX_BYTES) return;
  void *ws = fuzz_block(f, bytes, 64);
  const int64_t n = q.dim[2];
  const etk_paro_arrays to = {.order = room(f, heads), .quant = fuzz_block(f, (uint64_t)heads * 48, 16),
                              .sparse = fuzz_u8(f) & 1 ? fuzz_block(f, (uint64_t)heads * 48, 16) : NULL,
                              .perm = room(f, heads * n), .inverse = room(f, heads * n)};
  etk_index_arrays a = {0};
  etk_bsr x;
  if (etk_bsr_from_paro(desc, &q, &k, &to, &a, NULL, ws, bytes, pool) < 0) return;
  FUZZ_CHECK(etk_bsr_from_paro(desc, &q, &k, &to, &a, NULL, ws, bytes - 1, pool) < 0);
  if (!give_arrays(f, &a)) return;
  const etk_status st = etk_bsr_from_paro(desc, &q, &k, &to, &a, &x, ws, bytes, pool);
  judge(&a, &x, st, q.dim[0], q.dim[1], n, n);
  if (st >= 0) judge_order(to.perm, to.inverse, q.dim[1], n);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  fuzz f = {.data = data, .size = size};
  switch (fuzz_upto(&f, 7)) {
    case 0: check_target(&f); break;
    case 1: perm_target(&f); break;
    case 2: window_target(&f); break;
    case 3: radial_target(&f); break;
    case 4: mask_target(&f); break;
    case 5: clusters_target(&f); break;
    case 6: paro_target(&f); break;
    default: scores_target(&f); break;
  }
  fuzz_free(&f);
  return 0;
}
