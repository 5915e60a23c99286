/* 64-bit sizes that refuse to wrap. Internal. Each returns non-zero on overflow and then leaves *out unspecified. */
#ifndef ETK_CHECKED_H
#define ETK_CHECKED_H

#include <stdint.h>

static inline int etk_mul(uint64_t a, uint64_t b, uint64_t *out) { return __builtin_mul_overflow(a, b, out); }
static inline int etk_add(uint64_t a, uint64_t b, uint64_t *out) { return __builtin_add_overflow(a, b, out); }

/* Round up to a multiple of align, a power of two. */
static inline int etk_round_up(uint64_t a, uint64_t align, uint64_t *out) {
  if (etk_add(a, align - 1, out)) return 1;
  *out &= ~(align - 1);
  return 0;
}

/* Give out a workspace piece by piece. Sizes only (no memory is touched); bad stays set once anything overflowed. */
typedef struct etk_carve {
  uint64_t used;
  int bad;
} etk_carve;

/* Offset of a piece of n x size bytes at a multiple of 64. */
static inline uint64_t etk_take(etk_carve *c, uint64_t n, uint64_t size) {
  uint64_t bytes, at = c->used;
  if (etk_mul(n, size, &bytes) || etk_round_up(bytes, 64, &bytes) || etk_add(at, bytes, &c->used) || c->used > INT64_MAX / 2)
    c->bad = 1;
  return at;
}

#endif
