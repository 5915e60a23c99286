/* Window + sink: the law is in index.h.
 *
 * A row's tiles are an interval around the diagonal and the tiles of the sink, so the walk is over tiles that exist.
 * Partial tiles repeat along the diagonal: at most four shapes (two edges of the window, two tiles each), with and
 * without the sink beside them, and the same again where the ends of the sequence cut them. Each is stored once. */
#include <string.h>

#include "index_internal.h"

/* Keys before hi and not before lo, in bits of a word that starts at key c0. */
static uint64_t span(int64_t lo, int64_t hi, int64_t c0) {
  lo = lo - c0 < 0 ? 0 : lo - c0;
  hi = hi - c0 > 64 ? 64 : hi - c0;
  if (lo >= hi) return 0;
  const uint64_t below_hi = hi == 64 ? ~UINT64_C(0) : (UINT64_C(1) << hi) - 1;
  return below_hi & ~((UINT64_C(1) << lo) - 1);
}

/* Visible keys of query i: [first, last) and [0, sink_end), cut to [0, m). */
typedef struct keys {
  int64_t first, last, sink_end;
} keys;

static keys keys_of(const etk_window_desc *x, int64_t i) {
  const int64_t p = i + (x->m - x->n);
  keys out = {p - x->left, p + x->right + 1, x->sink};
  if (x->causal && out.sink_end > p + 1) out.sink_end = p + 1;
  if (out.first < 0) out.first = 0;
  if (out.last > x->m) out.last = x->m;
  if (out.sink_end > x->m) out.sink_end = x->m;
  return out;
}

static void tile_bits(const etk_window_desc *x, int64_t r, int64_t c, uint64_t bits[64]) {
  for (int64_t i = 0; i < 64; i++) {
    bits[i] = 0;
    if (r * 64 + i >= x->n) continue;
    const keys v = keys_of(x, r * 64 + i);
    bits[i] = span(v.first, v.last, c * 64) | span(0, v.sink_end, c * 64);
  }
}

/* 0 full, 1 partial, -1 empty. */
static int classify(const etk_window_desc *x, int64_t r, int64_t c, uint64_t bits[64]) {
  const int64_t width = x->m - c * 64 < 64 ? x->m - c * 64 : 64, height = x->n - r * 64 < 64 ? x->n - r * 64 : 64;
  const uint64_t every = width == 64 ? ~UINT64_C(0) : (UINT64_C(1) << width) - 1;
  uint64_t any = 0, all = every;
  tile_bits(x, r, c, bits);
  for (int64_t i = 0; i < height; i++) {
    any |= bits[i];
    all &= bits[i];
  }
  return any == 0 ? -1 : all != every;
}

enum { MAX_SHAPES = 64 };

typedef struct shapes {
  int64_t count;
  struct { int64_t r, c; } at[MAX_SHAPES]; /* where each stored tile was first met: its bits are recomputed, not kept */
} shapes;

static int64_t shape_of(const etk_window_desc *x, shapes *s, int64_t r, int64_t c, const uint64_t bits[64]) {
  uint64_t other[64];
  for (int64_t i = s->count - 1; i >= 0; i--) {
    tile_bits(x, s->at[i].r, s->at[i].c, other);
    if (memcmp(bits, other, sizeof other) == 0) return i;
  }
  if (s->count == MAX_SHAPES) return -1;
  s->at[s->count].r = r;
  s->at[s->count].c = c;
  return s->count++;
}

/* Walk every tile that may hold a visible pair; fill when arrays is not NULL, count always. */
static etk_status walk(const etk_window_desc *x, etk_index_arrays *arrays, int64_t *nnz, shapes *s) {
  const int64_t nqb = etk_ceil_div(x->n, 64);
  uint64_t bits[64];
  int64_t at = 0;
  s->count = 0;
  if (arrays) arrays->row_ptr[0] = 0;
  for (int64_t r = 0; r < nqb; r++) {
    const keys top = keys_of(x, r * 64), end = keys_of(x, r * 64 + 63 < x->n ? r * 64 + 63 : x->n - 1);
    const int64_t sink_blocks = end.sink_end <= 0 ? 0 : etk_ceil_div(end.sink_end, 64);
    const int64_t last = end.last <= 0 ? 0 : etk_ceil_div(end.last, 64);
    const int64_t stop = last > sink_blocks ? last : sink_blocks;
    for (int64_t c = 0; c < stop; c++) {
      if (c >= sink_blocks && c < top.first / 64) c = top.first / 64;
      if (c >= stop) break;
      /* Both ends of a row's window rise with the row: the last row's first key and the first row's last key decide. */
      const int64_t tile_end = c * 64 + 64 < x->m ? c * 64 + 64 : x->m;
      const int full = tile_end <= top.sink_end || (c * 64 >= end.first && tile_end <= top.last);
      const int partial = full ? 0 : classify(x, r, c, bits);
      if (partial < 0) continue;
      const int64_t shape = partial ? shape_of(x, s, r, c, bits) : -1;
      if (partial && shape < 0) return ETK_E_UNSUPPORTED; /* cannot happen: see the count above */
      if (arrays) {
        arrays->col[at] = (int32_t)c;
        arrays->kind[at] = (uint8_t)partial;
        if (arrays->bits_idx) arrays->bits_idx[at] = (int32_t)shape;
        if (partial) memcpy(arrays->bits + shape * 64, bits, sizeof bits);
      }
      at++;
    }
    if (arrays) arrays->row_ptr[r + 1] = at;
  }
  *nnz = at;
  return ETK_OK;
}

etk_status etk_bsr_from_window(const etk_window_desc *desc, etk_index_arrays *arrays, etk_bsr *out) {
  etk_window_desc x;
  if (!arrays) return ETK_E_NULL;
  etk_status st = etk_index_desc(desc, &x, sizeof x);
  if (st != ETK_OK) return st;
  if (x.n < 0 || x.m < 0 || x.n > INT32_MAX || x.m > INT32_MAX) return ETK_E_SHAPE;
  if (x.left < 0 || x.right < 0 || x.sink < 0 || x.causal < 0 || x.causal > 1) return ETK_E_RANGE;
  const int64_t far = (int64_t)1 << 33; /* past any position: sums cannot overflow */
  x.left = x.left < far ? x.left : far;
  x.right = x.causal ? 0 : x.right < far ? x.right : far;
  x.sink = x.sink < far ? x.sink : far;
  shapes s;
  int64_t nnz;
  int fill;
  st = walk(&x, NULL, &nnz, &s);
  if (st == ETK_OK) st = etk_index_begin(arrays, out, etk_ceil_div(x.n, 64), nnz, s.count, &fill);
  if (st != ETK_OK || !fill) return st;
  st = walk(&x, arrays, &nnz, &s);
  etk_index_describe(arrays, etk_ceil_div(x.n, 64), etk_ceil_div(x.m, 64), out);
  return st;
}
