/* The index kernel of one instruction set: plain loops that its compiler flags vectorize, included by each variant.
 * Define INDEX_NAME, INDEX_TEXT, INDEX_ISA, and INDEX_OWN_DOT when the file brings its own pack_s8 and dot_s8.
 * Bound by loads: 64 x d floats are read twice from L1 or L2, everything else is element-wise or a sum of integers. */
#include <math.h>
#include <string.h>

#include "index_kernel.h"

static inline int32_t bits_of(float x) {
  int32_t b;
  memcpy(&b, &x, sizeof b);
  return b;
}

static inline float float_of(int32_t b) {
  float x;
  memcpy(&x, &b, sizeof x);
  return x;
}

static inline int32_t is_finite_bits(float x) { return (bits_of(x) & 0x7fffffff) < 0x7f800000; }
static inline float finite_or_0(float x) { return is_finite_bits(x) ? x : 0.0f; }
/* Nearest even for |x| < 2^22, in any instruction set. */
static inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

static void sum_rows(const float *restrict x, int64_t stride, int32_t n, int32_t d, float *restrict sum, int32_t *nonfinite) {
  int32_t bad = 0;
  for (int32_t c = 0; c < d; c++) sum[c] = 0.0f;
  for (int32_t i = 0; i < n; i++) {
    const float *restrict row = x + i * stride;
    for (int32_t c = 0; c < d; c++) {
      bad |= !is_finite_bits(row[c]);
      sum[c] += finite_or_0(row[c]);
    }
  }
  *nonfinite |= bad;
}

static float max_abs(const float *restrict x, int64_t stride, int32_t n, int32_t d, const float *restrict mu) {
  int32_t top = 0; /* floats without sign compare as integers */
  for (int32_t i = 0; i < n; i++) {
    const float *restrict row = x + i * stride;
    if (mu) {
      for (int32_t c = 0; c < d; c++) {
        const int32_t a = bits_of(finite_or_0(finite_or_0(row[c]) - mu[c])) & 0x7fffffff;
        top = a > top ? a : top;
      }
    } else {
      for (int32_t c = 0; c < d; c++) {
        const int32_t a = bits_of(finite_or_0(row[c])) & 0x7fffffff;
        top = a > top ? a : top;
      }
    }
  }
  return float_of(top);
}

static void quantize(const float *restrict x, int64_t stride, int32_t n, int32_t d, int32_t dp, const float *restrict mu,
                     float inverse, int32_t reverse, int8_t *restrict codes, int32_t *nonfinite) {
  int32_t bad = 0;
  for (int32_t i = 0; i < n; i++) {
    const float *restrict row = x + i * stride;
    const int32_t to = reverse > 0 ? i / reverse * reverse + (reverse - 1 - i % reverse) : i;
    int8_t *restrict out = codes + (int64_t)to * dp;
    if (mu) {
      for (int32_t c = 0; c < d; c++) {
        bad |= !is_finite_bits(row[c]);
        out[c] = (int8_t)(int32_t)round_even(finite_or_0(finite_or_0(row[c]) - mu[c]) * inverse);
      }
    } else {
      for (int32_t c = 0; c < d; c++) {
        bad |= !is_finite_bits(row[c]);
        out[c] = (int8_t)(int32_t)round_even(finite_or_0(row[c]) * inverse);
      }
    }
    for (int32_t c = d; c < dp; c++) out[c] = 0;
  }
  *nonfinite |= bad;
}

static int64_t pool(const int8_t *restrict codes, int32_t n, int32_t dp, int16_t *restrict pooled) {
  int32_t sum[ETK_INDEX_MAX_D], units[ETK_INDEX_MAX_D];
  memset(sum, 0, sizeof *sum * (size_t)dp);
  memset(units, 0, sizeof *units * (size_t)dp);
  for (int32_t i = 0; i < n; i++) {
    const int8_t *restrict row = codes + (int64_t)i * dp;
    int32_t square = 0;
    for (int32_t c = 0; c < dp; c++) square += (int32_t)row[c] * (int32_t)row[c];
    const float unit = square > 0 ? 4096.0f / sqrtf((float)square) : 0.0f;
    for (int32_t c = 0; c < dp; c++) {
      sum[c] += row[c];
      units[c] += (int32_t)round_even((float)row[c] * unit);
    }
  }
  int64_t self = 0;
  for (int32_t c = 0; c < dp; c++) {
    self += (int64_t)units[c] * units[c];
    pooled[c] = (int16_t)((sum[c] + 4) >> 3);
  }
  return self;
}

static void dot_s16(const int16_t *restrict a, const int16_t *restrict b, int64_t cols, int32_t dp, int32_t *restrict out) {
  for (int64_t j = 0; j < cols; j++) {
    const int16_t *restrict row = b + j * dp;
    int32_t sum = 0;
    for (int32_t c = 0; c < dp; c++) sum += (int32_t)a[c] * (int32_t)row[c];
    out[j] = sum;
  }
}

#ifndef INDEX_OWN_DOT
/* packed: s16 [cols / 16][depth][16]: one broadcast of a against 16 neighbours. */
static void pack_s8(const int8_t *restrict b, int64_t cols, int64_t depth, void *packed) {
  int16_t *restrict to = packed;
  for (int64_t g = 0; g < cols; g += 16) {
    for (int64_t k = 0; k < depth; k++)
      for (int64_t j = 0; j < 16; j++) to[k * 16 + j] = g + j < cols ? (int16_t)b[(g + j) * depth + k] : 0;
    to += depth * 16;
  }
}

static void dot_s8(const int8_t *restrict a, int64_t rows, const void *packed, int64_t cols, int64_t depth, int32_t *restrict out,
                   int64_t out_stride) {
  for (int64_t g = 0; g < cols; g += 16) {
    const int16_t *restrict b = (const int16_t *)packed + g * depth;
    for (int64_t i = 0; i < rows; i++) {
      int32_t sum[16] = {0};
      for (int64_t k = 0; k < depth; k++)
        for (int64_t j = 0; j < 16; j++) sum[j] += (int32_t)a[i * depth + k] * (int32_t)b[k * 16 + j];
      memcpy(out + i * out_stride + g, sum, sizeof sum);
    }
  }
}
#endif

static inline float score(int32_t dot, float a, float b) {
  const float g = a * b;
  return (float)dot * (g < 1e25f ? g : 1e25f);
}

static void weights(const int32_t *restrict dot, float a, const float *restrict b, int64_t n, uint32_t *restrict weight) {
  int32_t top = INT32_MIN; /* with the low bits of negative floats flipped, floats compare as integers */
  for (int64_t j = 0; j < n; j++) {
    const int32_t bits = bits_of(score(dot[j], a, b[j]));
    const int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
    top = key > top ? key : top;
    weight[j] = (uint32_t)bits;
  }
  const float largest = float_of(top ^ ((top >> 31) & 0x7fffffff));
  for (int64_t j = 0; j < n; j++) { /* the clamp at -64 is on the bits: as a float it becomes a branch, which stops vectors */
    const int32_t size = bits_of(float_of((int32_t)weight[j]) - largest) & 0x7fffffff;
    weight[j] = (uint32_t)(size < 0x42800000 ? size : 0x42800000);
  }
  for (int64_t j = 0; j < n; j++) {
    const float x = -float_of((int32_t)weight[j]);
    const int32_t whole = (int32_t)x;
    const float f = x - (float)whole; /* in (-1, 0] */
    float p = 0.0009449036442674696f;
    p = 0.009205798618495464f + p * f;
    p = 0.0552973598241806f + p * f;
    p = 0.2401801496744156f + p * f;
    p = 0.6931437253952026f + p * f;
    p = 1.0f + p * f;
    weight[j] = (uint32_t)((int32_t)(p * float_of((whole + 151) << 23)) + 1);
  }
}

static uint64_t mass_from(const uint32_t *restrict weight, int64_t n, uint32_t t, int64_t *count) {
  uint64_t mass = 0;
  int64_t found = 0;
  for (int64_t start = 0; start < n; start += 64) { /* 64 weights cannot overflow 32 bits */
    const int64_t stop = start + 64 < n ? start + 64 : n;
    uint32_t part = 0, hits = 0;
    for (int64_t j = start; j < stop; j++) {
      const uint32_t in = (int32_t)weight[j] >= (int32_t)t;
      part += in ? weight[j] : 0;
      hits += in;
    }
    mass += part;
    found += hits;
  }
  *count = found;
  return mass;
}

static int64_t nearest(const int32_t *restrict dot, const int32_t *restrict norm, int64_t n) {
  int32_t best = INT32_MIN;
  for (int64_t j = 0; j < n; j++) {
    const int32_t s = 2 * dot[j] - norm[j];
    best = s > best ? s : best;
  }
  int64_t start = 0; /* whole chunks are compared side by side; the first hit is inside the first chunk that has one */
  for (; start + 64 < n; start += 64) {
    int32_t hits = 0;
    for (int64_t j = start; j < start + 64; j++) hits += 2 * dot[j] - norm[j] == best;
    if (hits) break;
  }
  while (2 * dot[start] - norm[start] != best) start++;
  return start;
}

static void add_codes(const int8_t *restrict codes, const int32_t *restrict label, int64_t n, int32_t dp, int32_t *restrict sum) {
  for (int64_t i = 0; i < n; i++) {
    int32_t *restrict to = sum + (int64_t)label[i] * dp;
    for (int32_t c = 0; c < dp; c++) to[c] += codes[i * dp + c];
  }
}

extern const etk_index_kernel INDEX_NAME;
const etk_index_kernel INDEX_NAME = {
    .name = INDEX_TEXT,
    .isa = INDEX_ISA,
    .sum_rows = sum_rows,
    .max_abs = max_abs,
    .quantize = quantize,
    .pool = pool,
    .dot_s16 = dot_s16,
    .pack_s8 = pack_s8,
    .dot_s8 = dot_s8,
    .weights = weights,
    .mass_from = mass_from,
    .nearest = nearest,
    .add_codes = add_codes,
};
