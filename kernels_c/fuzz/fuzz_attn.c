/* Attention: descriptor, strides, index content, optional tensors, workspace and pool. A refused call writes nothing, and
 * what run refuses before it starts validate refuses as well. */
#include "fuzz.h"

static int32_t odd32(fuzz *f, int32_t usual) { return (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : usual); }
static float oddf(fuzz *f, float usual) { return fuzz_rarely(f) ? fuzz_float(f) : usual; }
static int sometimes(fuzz *f) { return fuzz_u8(f) % 4 == 3; }

static etk_tensor in(fuzz *f, int32_t dtype, int32_t rank, const int64_t *dim) {
  etk_tensor t = fuzz_tensor(f, dtype, rank, dim);
  if (fuzz_rarely(f)) fuzz_break(f, &t);
  return t;
}

typedef struct outputs {
  const void *data[4];
  uint64_t bytes[4];
  int n;
} outputs;

static etk_tensor out(fuzz *f, outputs *o, const int64_t *dim) {
  etk_tensor t = fuzz_output(f, ETK_F32, 4, dim);
  o->data[o->n] = t.data;
  o->bytes[o->n++] = t.capacity;
  if (fuzz_rarely(f)) fuzz_break(f, &t);
  return t;
}

/* A permutation of [0, n) for each of b x h, now and then with a wrong entry. */
static etk_tensor permutation(fuzz *f, int64_t n) {
  const int64_t dim[] = {1, 1, n};
  etk_tensor t = {.data = fuzz_block(f, (uint64_t)n * 4, 16), .dtype = ETK_I32, .rank = 3, .capacity = (uint64_t)n * 4};
  for (int a = 0; a < 3; a++) {
    t.dim[a] = dim[a];
    t.stride[a] = a == 2 ? 4 : n * 4;
  }
  for (int64_t i = 0; i < n; i++) ((int32_t *)t.data)[i] = (int32_t)(n - 1 - i);
  if (n && fuzz_rarely(f)) ((int32_t *)t.data)[fuzz_u8(f) % n] = (int32_t)fuzz_number(f);
  if (fuzz_rarely(f)) fuzz_break(f, &t);
  return t;
}

static void give_bsr(fuzz *f, etk_bsr *x, int64_t n, int64_t m) {
  const uint32_t keep = fuzz_u8(f);
  x->bq = x->bk = 64;
  x->nqb = (n + 63) / 64;
  x->nkb = (m + 63) / 64;
  x->rows = x->nqb;
  int64_t *row_ptr = fuzz_block(f, (uint64_t)(x->rows + 1) * 8, 16);
  row_ptr[0] = 0;
  for (int64_t r = 0; r < x->rows; r++) {
    row_ptr[r + 1] = row_ptr[r];
    for (int64_t c = 0; c < x->nkb; c++) row_ptr[r + 1] += (keep >> ((r + c) % 8)) & 1;
  }
  x->nnz = row_ptr[x->rows];
  int32_t *col = fuzz_block(f, (uint64_t)x->nnz * 4, 16), *idx = fuzz_block(f, (uint64_t)x->nnz * 4, 16);
  uint8_t *kind = fuzz_block(f, (uint64_t)x->nnz, 16);
  x->nbits = fuzz_upto(f, 2);
  uint64_t *bits = fuzz_block(f, (uint64_t)x->nbits * 512, 16);
  fuzz_fill(f, bits, ETK_U8, (uint64_t)x->nbits * 512);
  int64_t at = 0;
  for (int64_t r = 0; r < x->rows; r++)
    for (int64_t c = 0; c < x->nkb; c++)
      if ((keep >> ((r + c) % 8)) & 1) {
        col[at] = (int32_t)c;
        kind[at] = at & 1;
        idx[at] = (int32_t)(at % (x->nbits + 1)) - 1;
        at++;
      }
  if (x->nnz && fuzz_rarely(f)) col[fuzz_u8(f) % x->nnz] = (int32_t)fuzz_number(f);
  if (x->nnz && fuzz_rarely(f)) kind[fuzz_u8(f) % x->nnz] = fuzz_u8(f);
  if (x->nnz && fuzz_rarely(f)) idx[fuzz_u8(f) % x->nnz] = (int32_t)fuzz_number(f);
  if (fuzz_rarely(f)) row_ptr[fuzz_u8(f) % (x->rows + 1)] = fuzz_number(f);
  if (fuzz_rarely(f)) x->stride_b = fuzz_number(f);
  if (fuzz_rarely(f)) x->stride_h = fuzz_number(f);
  x->row_ptr = row_ptr;
  x->col = col;
  x->kind = fuzz_u8(f) & 1 ? kind : NULL;
  x->bits = bits;
  x->bits_idx = fuzz_u8(f) & 1 ? idx : NULL;
}

static void optional_tensors(fuzz *f, etk_attn_io *io, const etk_attn_desc *d, int64_t n, int64_t m) {
  const int64_t b = d->batch, hq = d->hq, hkv = d->hkv;
  if (sometimes(f)) io->seq_k = in(f, ETK_I32, 1, (int64_t[]){b});
  if (sometimes(f)) io->key_bias = in(f, ETK_F32, 3, (int64_t[]){fuzz_u8(f) & 1 ? b : 1, fuzz_u8(f) & 1 ? hq : 1, m});
  if (sometimes(f)) io->alibi_slope = in(f, ETK_F32, 1, (int64_t[]){hq});
  if (sometimes(f)) io->q_pos = in(f, ETK_I32, 2, (int64_t[]){fuzz_u8(f) & 1 ? b : 1, n});
  if (sometimes(f)) io->k_pos = in(f, ETK_I64, 3, (int64_t[]){1, 1, m});
  if (sometimes(f)) io->q_perm = permutation(f, n);
  if (sometimes(f)) io->k_perm = permutation(f, m);
  if (sometimes(f)) io->o_perm = permutation(f, n);
  if (sometimes(f)) io->sink_logit = in(f, ETK_F32, 1, (int64_t[]){hq});
  if (sometimes(f)) io->gate = in(f, ETK_F32, 4, (int64_t[]){b, hq, n, fuzz_u8(f) & 1 ? 1 : d->dv});
  if (sometimes(f)) io->k_mean = in(f, ETK_F32, 3, (int64_t[]){fuzz_u8(f) & 1 ? b : 1, hkv, d->d});
}

static etk_attn_desc choose_desc(fuzz *f, int64_t n, int64_t m) {
  static const int32_t masks[] = {0, 0, 1, 2, 3, 4, 5, 8}, computes[] = {ETK_C_F32, ETK_C_S8S8, ETK_C_S8F, ETK_C_S8S8};
  const int32_t hkv = 1 + fuzz_upto(f, 1), d = 1 + fuzz_upto(f, 70);
  etk_attn_desc x = {.struct_size = sizeof x, .batch = fuzz_upto(f, 2), .hq = hkv * (1 + fuzz_upto(f, 1)), .hkv = hkv, .d = d,
                     .dv = fuzz_u8(f) & 1 ? d : 1 + fuzz_upto(f, 70), .max_n = n, .max_m = m, .phase = fuzz_upto(f, 2),
                     .compute = computes[fuzz_upto(f, 3)], .mask_kind = masks[fuzz_upto(f, 7)], .scale = oddf(f, 0),
                     .softcap = oddf(f, sometimes(f) ? 20.0f : 0), .clip_gamma = oddf(f, 0), .clip_zeta = oddf(f, 0),
                     .win_left = fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 100),
                     .win_right = fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 100),
                     .sink = fuzz_rarely(f) ? fuzz_number(f) : fuzz_upto(f, 5), .softmax_mode = odd32(f, 0),
                     .tile_skip_log2 = oddf(f, 0), .isa_cap = odd32(f, sometimes(f) ? ETK_ISA_SCALAR : 0)};
  x.flags = sometimes(f) ? fuzz_u32(f) & 0x7ffu : fuzz_u8(f) & 7u;
  if (!fuzz_rarely(f)) return x;
  switch (fuzz_upto(f, 9)) {
    case 0: x.batch = (int32_t)fuzz_number(f); break;
    case 1: x.hq = (int32_t)fuzz_number(f); break;
    case 2: x.hkv = (int32_t)fuzz_number(f); break;
    case 3: x.d = (int32_t)fuzz_number(f); break;
    case 4: x.dv = (int32_t)fuzz_number(f); break;
    case 5: x.max_n = fuzz_number(f); break;
    case 6: x.max_m = fuzz_number(f); break;
    case 7: x.compute = (int32_t)fuzz_number(f); break;
    case 8: x.mask_kind = (int32_t)fuzz_number(f); break;
    default: x.flags = fuzz_u32(f); break;
  }
  return x;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  fuzz f = {.data = data, .size = size};
  const int64_t n = fuzz_upto(&f, 150), m = fuzz_upto(&f, 200);
  const etk_attn_desc plain = choose_desc(&f, n, m);
  etk_attn_desc shape = plain; /* of the tensors: small even where the descriptor is not */
  if (shape.batch < 0 || shape.batch > 4) shape.batch = 1;
  if (shape.hq < 1 || shape.hq > 8) shape.hq = 2;
  if (shape.hkv < 1 || shape.hkv > 8) shape.hkv = 1;
  if (shape.d < 1 || shape.d > 128) shape.d = 16;
  if (shape.dv < 1 || shape.dv > 128) shape.dv = 16;
  const etk_attn_desc *desc = fuzz_struct(&f, &plain, sizeof plain);
  outputs o = {.n = 0};
  etk_attn_io whole = {.struct_size = sizeof whole};
  const int32_t kv = fuzz_rarely(&f) ? ETK_F16 : ETK_F32;
  whole.q = in(&f, kv, 4, (int64_t[]){shape.batch, shape.hq, n, shape.d});
  whole.k = in(&f, kv, 4, (int64_t[]){shape.batch, shape.hkv, m, shape.d});
  whole.v = in(&f, kv, 4, (int64_t[]){shape.batch, shape.hkv, m, shape.dv});
  whole.o = out(&f, &o, (int64_t[]){shape.batch, shape.hq, n, shape.dv});
  if (plain.mask_kind & ETK_MASK_BSR) give_bsr(&f, &whole.bsr, n, m);
  if (plain.mask_kind & ETK_MASK_GATHER)
    whole.gather = in(&f, ETK_I32, 3, (int64_t[]){shape.batch, fuzz_u8(&f) & 1 ? shape.hkv : 1, fuzz_upto(&f, 90)});
  const int64_t lse[] = {shape.batch, shape.hq, n}, mass[] = {shape.batch, shape.hq, m};
  if (plain.flags & ETK_F_RETURN_LSE) whole.lse = in(&f, ETK_F32, 3, lse);
  if (plain.flags & ETK_F_RETURN_COLMASS) whole.colmass = in(&f, ETK_F32, 3, mass);
  whole.score_rows = fuzz_rarely(&f) ? fuzz_number(&f) : n ? 1 + fuzz_u8(&f) % n : 0;
  if (plain.flags & ETK_F_RETURN_SCORES && whole.score_rows >= 0 && whole.score_rows <= n)
    whole.scores = in(&f, ETK_F32, 4, (int64_t[]){shape.batch, shape.hq, whole.score_rows, m});
  optional_tensors(&f, &whole, &shape, n, m);
  const etk_attn_io *io = fuzz_struct(&f, &whole, sizeof whole);
  const etk_status valid = etk_attn_validate(desc, io);
  etk_attn_plan *plan = NULL;
  const int32_t threads = (int32_t)(fuzz_rarely(&f) ? fuzz_number(&f) : 1 + fuzz_upto(&f, 2));
  etk_status st = etk_attn_plan_create(desc, fuzz_u8(&f) & 1 ? io : NULL, threads, &plan);
  FUZZ_CHECK((st >= 0) == (plan != NULL));
  uint64_t bytes = 0, align = 0;
  if (plan && etk_attn_workspace(plan, &bytes, &align) >= 0 && bytes <= FUZZ_MAX_BYTES) {
    FUZZ_CHECK(etk_attn_plan_kernel(plan) != NULL);
    unsigned char *ws = fuzz_block(&f, bytes, align);
    fuzz_pool state;
    const etk_pool *pool = fuzz_make_pool(&f, &state);
    if (bytes && fuzz_rarely(&f)) {
      st = etk_attn_run(plan, io, ws, bytes - 1, pool);
      FUZZ_CHECK(st < 0);
    } else {
      st = etk_attn_run(plan, io, ws, bytes, pool);
    }
    if (st < 0 && st != ETK_E_CANCELLED)
      for (int i = 0; i < o.n; i++) fuzz_untouched(o.data[i], o.bytes[i]);
    if (st >= 0) FUZZ_CHECK(valid >= 0 || valid == ETK_E_RANGE); /* content of indices: validate only, unless asked for */
  }
  etk_attn_plan_free(plan);
  fuzz_free(&f);
  return 0;
}
