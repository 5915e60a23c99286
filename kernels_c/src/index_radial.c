/* Radial attention: the law is in index.h. Integers only, so that every machine builds the same index.
 *
 * A tile asks, for each of its key columns, how many of its rows see that key. Rows of one frame are an interval of
 * tokens, and what a key sees in another frame is an interval as well, so a count is one intersection per frame met. */
#include "index_internal.h"

typedef struct radial {
  int64_t frames, tokens, video, total;
  int64_t decay_q8;
  int sink_frame, length_bits;
} radial;

static int bit_length(int64_t x) {
  int bits = 0;
  for (; x > 0; x >>= 1) bits++;
  return bits;
}

/* How far tokens of frames i and j see each other: -1 not at all, tokens = wholly. */
static int64_t reach(const radial *x, int64_t i, int64_t j) {
  const int64_t distance = i < j ? j - i : i - j;
  if (distance <= 1 || (x->sink_frame && j == 0)) return x->tokens;
  const int e = x->length_bits - bit_length(distance);
  if (e < 6) {
    const int shift = 6 - e; /* e > -25 and shift < 31: frames and tokens are at most 2^20 */
    if (distance & (((int64_t)1 << shift) - 1)) return -1;
  }
  const int64_t scaled = e >= 0 ? (x->decay_q8 << e) >> 8 : x->decay_q8 >> (8 - e);
  return scaled > 64 ? scaled : 64;
}

/* Rows of [row0, row1) that see video token key. */
static int64_t rows_seeing(const radial *x, int64_t row0, int64_t row1, int64_t key) {
  const int64_t j = key / x->tokens, b = key % x->tokens;
  int64_t count = 0;
  for (int64_t i = row0 / x->tokens; i * x->tokens < row1; i++) {
    const int64_t w = reach(x, i, j);
    if (w < 0) continue;
    const int64_t start = i * x->tokens;
    int64_t lo = b - w < 0 ? 0 : b - w, hi = b + w + 1 > x->tokens ? x->tokens : b + w + 1;
    lo = start + lo > row0 ? start + lo : row0;
    hi = start + hi < row1 ? start + hi : row1;
    if (hi > lo) count += hi - lo;
  }
  return count;
}

/* What the frames that a tile touches decide alone: 0 nothing is visible, 1 everything is, -1 keys must be counted. */
static int by_frames(const radial *x, int64_t row0, int64_t row1, int64_t key0, int64_t key1) {
  int any = 0, all = 1;
  for (int64_t i = row0 / x->tokens; i * x->tokens < row1; i++) {
    const int64_t a0 = row0 > i * x->tokens ? row0 - i * x->tokens : 0, a1 = row1 - i * x->tokens < x->tokens ? row1 - i * x->tokens : x->tokens;
    for (int64_t j = key0 / x->tokens; j * x->tokens < key1; j++) {
      const int64_t b0 = key0 > j * x->tokens ? key0 - j * x->tokens : 0, b1 = key1 - j * x->tokens < x->tokens ? key1 - j * x->tokens : x->tokens;
      const int64_t w = reach(x, i, j);
      const int64_t nearest = b0 >= a1 ? b0 - (a1 - 1) : a0 >= b1 ? a0 - (b1 - 1) : 0;
      const int64_t farthest = b1 - 1 - a0 > a1 - 1 - b0 ? b1 - 1 - a0 : a1 - 1 - b0;
      any |= nearest <= w;
      all &= farthest <= w;
    }
    if (any && !all) return -1;
  }
  return any ? (all ? 1 : -1) : 0;
}

static int keep_tile(const radial *x, int64_t r, int64_t c) {
  const int64_t row0 = r * 64, key0 = c * 64;
  const int64_t row1 = row0 + 64 < x->total ? row0 + 64 : x->total, key1 = key0 + 64 < x->total ? key0 + 64 : x->total;
  if (r == c || row1 > x->video || key1 > x->video) return 1;
  const int quick = by_frames(x, row0, row1, key0, key1);
  if (quick >= 0) return quick;
  int64_t seen = 0, dense = 0;
  for (int64_t key = key0; key < key1; key++) {
    const int64_t count = rows_seeing(x, row0, row1, key);
    seen += count > 0;
    dense += 3 * count > row1 - row0;
  }
  return 5 * dense > 3 * seen;
}

static int64_t walk(const radial *x, etk_index_arrays *arrays) {
  const int64_t blocks = etk_ceil_div(x->total, 64);
  int64_t at = 0;
  if (arrays) arrays->row_ptr[0] = 0;
  for (int64_t r = 0; r < blocks; r++) {
    for (int64_t c = 0; c < blocks; c++) {
      if (!keep_tile(x, r, c)) continue;
      if (arrays) {
        arrays->col[at] = (int32_t)c;
        arrays->kind[at] = 0;
      }
      at++;
    }
    if (arrays) arrays->row_ptr[r + 1] = at;
  }
  return at;
}

etk_status etk_bsr_from_radial(const etk_radial_desc *desc, etk_index_arrays *arrays, etk_bsr *out) {
  etk_radial_desc d;
  const int64_t limit = (int64_t)1 << 20;
  if (!arrays) return ETK_E_NULL;
  etk_status st = etk_index_desc(desc, &d, sizeof d);
  if (st != ETK_OK) return st;
  if (d.frames < 0 || d.tokens < 0 || d.text < 0 || d.frames > limit || d.tokens > limit || d.text > limit) return ETK_E_SHAPE;
  if (d.frames * d.tokens + d.text > limit) return ETK_E_SHAPE;
  if (d.decay_q8 < 0 || d.decay_q8 > 65536 || d.sink_frame < 0 || d.sink_frame > 1) return ETK_E_RANGE;
  const radial x = {d.frames, d.tokens, d.frames * d.tokens, d.frames * d.tokens + d.text, d.decay_q8 ? d.decay_q8 : 256,
                    d.sink_frame, bit_length(d.tokens)};
  const int64_t nnz = walk(&x, NULL), blocks = etk_ceil_div(x.total, 64);
  int fill;
  st = etk_index_begin(arrays, out, blocks, nnz, 0, &fill);
  if (st != ETK_OK || !fill) return st;
  walk(&x, arrays);
  etk_index_describe(arrays, blocks, blocks, out);
  return ETK_OK;
}
