/* Small operations: mostly valid tensors, a few of them broken. A refused call writes nothing. */
#include "fuzz.h"

enum { k_most_outputs = 4 };

typedef struct outputs {
  const void *data[k_most_outputs];
  uint64_t bytes[k_most_outputs];
  int n;
} outputs;

/* What comes at the last axis: the shape of a row without it. */
typedef struct shape {
  int32_t rank;
  int64_t dim[5];
} shape;

static shape choose_shape(fuzz *f) {
  shape s = {.rank = 1 + fuzz_upto(f, 3)};
  for (int a = 0; a < s.rank - 1; a++) s.dim[a] = fuzz_upto(f, 4);
  s.dim[s.rank - 1] = fuzz_upto(f, 70);
  return s;
}

static etk_tensor in(fuzz *f, int32_t dtype, int32_t rank, const int64_t *dim) {
  etk_tensor t = fuzz_tensor(f, dtype, rank, dim);
  if (fuzz_rarely(f)) fuzz_break(f, &t);
  return t;
}

static etk_tensor out(fuzz *f, outputs *o, int32_t dtype, int32_t rank, const int64_t *dim) {
  etk_tensor t = fuzz_output(f, dtype, rank, dim);
  o->data[o->n] = t.data;
  o->bytes[o->n++] = t.capacity;
  if (fuzz_rarely(f)) fuzz_break(f, &t);
  return t;
}

static etk_tensor *maybe(fuzz *f, etk_tensor *t) { return fuzz_u8(f) % 4 ? t : NULL; }

static etk_status norm(fuzz *f, outputs *o, int rms) {
  const shape s = choose_shape(f);
  const int64_t cols = s.dim[s.rank - 1];
  etk_tensor x = in(f, ETK_F32, s.rank, s.dim), residual = in(f, ETK_F32, s.rank, s.dim), gamma = in(f, ETK_F32, 1, &cols),
             beta = in(f, ETK_F32, 1, &cols), y = out(f, o, ETK_F32, s.rank, s.dim), sum = out(f, o, ETK_F32, s.rank, s.dim),
             q = out(f, o, ETK_S8, s.rank, s.dim), scale = out(f, o, ETK_F32, s.rank - 1, s.dim);
  const float eps = fuzz_rarely(f) ? fuzz_float(f) : 1e-5f;
  const int alias = fuzz_upto(f, 7);
  etk_tensor *py = maybe(f, &y), *pq = maybe(f, &q);
  if (alias == 1) py = &x; /* in place: what is written is then an input, whose bytes are not watched */
  if (alias == 2 && x.data) { /* overlapping by one row: must be refused or harmless to memory */
    sum = x;
    if (sum.capacity > 4) {
      sum.data = (char *)sum.data + 4;
      sum.capacity -= 4;
    }
  }
  etk_tensor *pr = maybe(f, &residual), *pg = maybe(f, &gamma), *pb = maybe(f, &beta), *ps = maybe(f, &sum);
  if (rms) return etk_rmsnorm(&x, pr, pg, eps, py, ps, pq, pq ? &scale : NULL);
  return etk_layernorm(&x, pr, pg, pb, eps, py, ps, pq, pq ? &scale : NULL);
}

static etk_status elementwise(fuzz *f, outputs *o) {
  const shape s = choose_shape(f);
  etk_tensor a = in(f, ETK_F32, s.rank, s.dim), b = in(f, ETK_F32, s.rank, s.dim), y = out(f, o, ETK_F32, s.rank, s.dim);
  const int how = fuzz_upto(f, 5);
  if (fuzz_rarely(f)) y = a;
  switch (how) {
    case 0: return etk_gelu(&a, 0, &y);
    case 1: return etk_gelu(&a, 1, &y);
    case 2: return etk_silu(&a, &y);
    case 3: return etk_swiglu(&a, &b, &y);
    case 4: return etk_add_rows(&a, &b, &y);
    default: {
      shape m = s;
      for (int i = 0; i < m.rank - 1; i++)
        if (fuzz_u8(f) & 1) m.dim[i] = 1;
      const int skip = fuzz_upto(f, m.rank - 1);
      const int32_t dtype = fuzz_u8(f) & 1 ? ETK_F32 : ETK_BOOL;
      etk_tensor mask = in(f, dtype, m.rank - skip, m.dim + skip);
      return etk_softmax(&a, maybe(f, &mask), fuzz_rarely(f) ? fuzz_float(f) : 1.0f, &y);
    }
  }
}

static etk_status rope(fuzz *f, outputs *o) {
  const int64_t table[] = {fuzz_upto(f, 9), 1 + fuzz_upto(f, 12)}, n = fuzz_upto(f, 6), b = fuzz_upto(f, 2);
  etk_tensor c = out(f, o, ETK_F32, 2, table), s = out(f, o, ETK_F32, 2, table), freq = in(f, ETK_F32, 1, table + 1);
  double base = 10000.0;
  if (fuzz_rarely(f)) base = (double)fuzz_float(f);
  const etk_status st = etk_rope_tables(maybe(f, &freq), base, fuzz_rarely(f) ? fuzz_number(f) : 0, 1.0f, &c, &s);
  if (st < 0) return st;
  o->n = 0;
  const int64_t dim[] = {b, 2, n, table[1] * 2 + fuzz_upto(f, 5)}, at[] = {b, n};
  const int32_t rank = 3 + (fuzz_u8(f) & 1), prank = 1 + (fuzz_u8(f) & 1);
  etk_tensor x = in(f, ETK_F32, rank, dim + (4 - rank)), y = out(f, o, ETK_F32, rank, dim + (4 - rank)),
             pos = in(f, fuzz_u8(f) & 1 ? ETK_I32 : ETK_I64, prank, at + (2 - prank));
  if (!(fuzz_u8(f) & 1)) /* positions that the tables have */
    for (uint64_t i = 0; i < pos.capacity && pos.data; i++) ((uint8_t *)pos.data)[i] = 0;
  return etk_rope(&x, &c, &s, maybe(f, &pos), fuzz_rarely(f) ? fuzz_number(f) : 0, fuzz_u8(f) & 1, &y);
}

static etk_status ranking(fuzz *f, outputs *o) {
  shape s = choose_shape(f);
  etk_tensor x = in(f, ETK_F32, s.rank, s.dim);
  const int32_t dtype = fuzz_u8(f) & 1 ? ETK_I32 : ETK_I64;
  if (fuzz_u8(f) & 1) {
    etk_tensor idx = out(f, o, dtype, s.rank - 1, s.dim);
    return etk_argmax(&x, &idx);
  }
  const int64_t cols = s.dim[s.rank - 1], k = fuzz_rarely(f) ? fuzz_number(f) : cols ? 1 + fuzz_upto(f, (int)cols - 1) : 0;
  if (k > 0 && k < 256) s.dim[s.rank - 1] = k;
  etk_tensor values = out(f, o, ETK_F32, s.rank, s.dim), idx = out(f, o, dtype, s.rank, s.dim);
  uint64_t bytes = etk_topk_workspace(x.rank >= 1 && x.rank <= 5 ? x.dim[x.rank - 1] : cols, k);
  if (bytes > FUZZ_MAX_BYTES) bytes = 64;
  if (fuzz_rarely(f)) bytes = fuzz_u8(f);
  void *ws = fuzz_block(f, bytes, 64);
  return etk_topk(&x, k, maybe(f, &values), &idx, ws, bytes);
}

static etk_status rows(fuzz *f, outputs *o) {
  static const int32_t dtypes[] = {ETK_F32, ETK_F16, ETK_S8, ETK_I64};
  const int32_t dtype = dtypes[fuzz_upto(f, 3)], rank = 2 + (fuzz_u8(f) & 1);
  const int64_t b = fuzz_upto(f, 2), n = 1 + fuzz_upto(f, 40), m = fuzz_upto(f, 20), c = fuzz_upto(f, 20);
  const int64_t big[] = {b, n, c}, some[] = {b, m, c}, at[] = {b, m};
  etk_tensor idx = in(f, fuzz_u8(f) & 1 ? ETK_I32 : ETK_I64, rank - 1, at + (3 - rank));
  if (fuzz_u8(f) & 1) {
    etk_tensor x = in(f, dtype, rank, big + (3 - rank)), y = out(f, o, dtype, rank, some + (3 - rank));
    return etk_gather_rows(&x, &idx, &y);
  }
  etk_tensor x = in(f, dtype, rank, some + (3 - rank)), y = out(f, o, dtype, rank, big + (3 - rank));
  return etk_scatter_rows(&x, &idx, &y);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  fuzz f = {.data = data, .size = size};
  outputs o = {.n = 0};
  etk_status st;
  switch (fuzz_upto(&f, 5)) {
    case 0: st = norm(&f, &o, 0); break;
    case 1: st = norm(&f, &o, 1); break;
    case 2: st = elementwise(&f, &o); break;
    case 3: st = rope(&f, &o); break;
    case 4: st = ranking(&f, &o); break;
    default: st = rows(&f, &o); break;
  }
  for (int i = 0; i < o.n && st < 0; i++) fuzz_untouched(o.data[i], o.bytes[i]);
  fuzz_free(&f);
  return 0;
}
