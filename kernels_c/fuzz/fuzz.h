/* What the fuzz targets share: choices drawn from the input, memory sized exactly by what a struct claims, and tensors
 * with one thing or another wrong. A target builds a problem that is mostly valid, breaks a few fields, calls the library
 * and checks that a refused call wrote nothing. What a caller may not lie about (capacities, lengths of index arrays) is
 * allocated to the letter, so that AddressSanitizer sees any reach past it. */
#ifndef ETK_FUZZ_H
#define ETK_FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgetok/edgetok.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define FUZZ_CHECK(cond)                                                      \
  do {                                                                        \
    if (!(cond)) {                                                            \
      fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #cond); \
      abort();                                                                \
    }                                                                         \
  } while (0)

enum { FUZZ_MAX_BLOCKS = 64, FUZZ_MAX_BYTES = 1 << 24, FUZZ_POISON = 0xA5 };

typedef struct fuzz {
  const uint8_t *data;
  size_t size;
  void *blocks[FUZZ_MAX_BLOCKS];
  int nblocks;
} fuzz;

/* An exhausted input gives zeros: the plain choice everywhere. */
static inline uint8_t fuzz_u8(fuzz *f) {
  if (f->size == 0) return 0;
  f->size--;
  return *f->data++;
}
static inline uint32_t fuzz_u32(fuzz *f) {
  uint32_t v = 0;
  for (int i = 0; i < 4; i++) v = v << 8 | fuzz_u8(f);
  return v;
}
static inline int fuzz_upto(fuzz *f, int most) { return fuzz_u8(f) % (most + 1); }
/* True once in 16: what breaks a problem must be rare, or nothing gets past the first check. */
static inline int fuzz_rarely(fuzz *f) { return fuzz_u8(f) % 16 == 15; }

static inline int64_t fuzz_number(fuzz *f) {
  static const int64_t odd[] = {0, 1, -1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 40, 63, 64, 65, 80, 96, 127, 128, 129, 255, 256, 257,
                                1023, 1024, 1025, 4096, 65535, 65536, INT32_MAX, INT32_MIN, (int64_t)INT32_MAX + 1, UINT32_MAX,
                                INT64_MAX, INT64_MIN, INT64_MAX / 4, INT64_MAX / 64, INT64_C(1) << 40, INT64_C(1) << 62, -64, -2};
  const int i = fuzz_u8(f);
  if (i < (int)(sizeof odd / sizeof *odd)) return odd[i];
  return (int32_t)fuzz_u32(f);
}
static inline float fuzz_float(fuzz *f) {
  static const float odd[] = {0.0f, -0.0f, 1.0f, -1.0f, 1e-40f, 3.4e38f, -3.4e38f, 1e30f, 0.5f, 127.0f, 255.0f, 1e-6f, 88.0f, -104.0f};
  const int i = fuzz_u8(f);
  if (i < (int)(sizeof odd / sizeof *odd)) return odd[i];
  const uint32_t bits = i == 14 ? 0x7f800000u : i == 15 ? 0xff800000u : i == 16 ? 0x7fc00000u : fuzz_u32(f);
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

static inline void *fuzz_block(fuzz *f, uint64_t bytes, uint64_t align) {
  FUZZ_CHECK(f->nblocks < FUZZ_MAX_BLOCKS && bytes <= (uint64_t)4 * FUZZ_MAX_BYTES);
  void *p = NULL;
  if (posix_memalign(&p, align < 16 ? 16 : align, bytes)) abort();
  f->blocks[f->nblocks++] = p;
  return p;
}
static inline void fuzz_free(fuzz *f) {
  for (int i = 0; i < f->nblocks; i++) free(f->blocks[i]);
  f->nblocks = 0;
}

static inline int64_t fuzz_item(int32_t dtype) {
  switch (dtype) {
    case ETK_F16: case ETK_BF16: return 2;
    case ETK_F32: case ETK_I32: return 4;
    case ETK_I64: case ETK_U64: return 8;
    default: return 1;
  }
}

/* Content by kind: a counter-based pattern of small values, with one odd value somewhere when asked. */
static inline void fuzz_fill(fuzz *f, void *data, int32_t dtype, uint64_t bytes) {
  uint32_t state = (uint32_t)fuzz_u8(f) * 2654435761u + 1;
  const int kind = fuzz_upto(f, 7);
  const uint64_t n = bytes / (uint64_t)fuzz_item(dtype);
  for (uint64_t i = 0; i < n; i++) {
    state = state * 1664525u + 1013904223u;
    const int32_t small = kind == 6 ? 0 : (int32_t)(state >> 24) - 128;
    switch (dtype) {
      case ETK_F32: ((float *)data)[i] = (float)small / 64.0f; break;
      case ETK_F16: ((uint16_t *)data)[i] = (uint16_t)((state >> 16 & 0x83ffu) | 0x3800u); break;
      case ETK_I32: ((int32_t *)data)[i] = (int32_t)(state >> 26); break;
      case ETK_I64: case ETK_U64: ((int64_t *)data)[i] = (int64_t)(state >> 26); break;
      default: ((uint8_t *)data)[i] = (uint8_t)(state >> 24);
    }
  }
  for (int odd = kind == 7 ? 3 : kind == 5 ? 1 : 0; odd > 0 && n > 0; odd--) {
    const uint64_t i = fuzz_u32(f) % n;
    switch (dtype) {
      case ETK_F32: ((float *)data)[i] = fuzz_float(f); break;
      case ETK_F16: ((uint16_t *)data)[i] = (uint16_t)fuzz_u32(f); break;
      case ETK_I32: ((int32_t *)data)[i] = (int32_t)fuzz_number(f); break;
      case ETK_I64: case ETK_U64: ((int64_t *)data)[i] = fuzz_number(f); break;
      default: ((uint8_t *)data)[i] = fuzz_u8(f);
    }
  }
}

/* A tensor of these dims with an axis order and padding of its own. Dims must be small and not negative. */
static inline etk_tensor fuzz_tensor(fuzz *f, int32_t dtype, int32_t rank, const int64_t *dim) {
  etk_tensor t = {.dtype = dtype, .rank = rank};
  const int64_t item = fuzz_item(dtype);
  const int how = fuzz_u8(f);
  int64_t at = item;
  int order[5] = {0, 1, 2, 3, 4};
  if (rank >= 3 && (how & 1)) { /* the two axes before the last one swapped in memory */
    order[rank - 2] = rank - 3;
    order[rank - 3] = rank - 2;
  }
  for (int a = rank - 1; a >= 0; a--) {
    const int axis = order[a];
    t.dim[axis] = dim[axis];
    t.stride[axis] = at;
    at *= dim[axis] > 0 ? dim[axis] : 1;
    if (a == rank - 1 && (how & 2)) at += item * (1 + how % 5); /* padded rows */
  }
  int64_t last = item;
  int empty = 0;
  for (int a = 0; a < rank; a++) {
    last += (t.dim[a] - 1) * t.stride[a];
    empty |= t.dim[a] == 0;
  }
  t.capacity = empty ? 0 : (uint64_t)last;
  FUZZ_CHECK(t.capacity <= FUZZ_MAX_BYTES);
  t.data = fuzz_block(f, t.capacity, 64);
  fuzz_fill(f, t.data, dtype, t.capacity);
  return t;
}

/* One thing wrong with a tensor. Never a capacity above what was allocated. */
static inline void fuzz_break(fuzz *f, etk_tensor *t) {
  const int axis = fuzz_upto(f, 4);
  switch (fuzz_upto(f, 9)) {
    case 0: t->dim[axis] = fuzz_number(f); break;
    case 1: t->stride[axis] = fuzz_number(f); break;
    case 2: t->dtype = (int32_t)fuzz_number(f); break;
    case 3: t->rank = (int32_t)fuzz_number(f); break;
    case 4: t->capacity = t->capacity ? t->capacity - 1 : 0; break;
    case 5: t->data = NULL; break;
    case 6: memset(t, 0, sizeof *t); break;
    case 7:
      if (t->data && t->capacity > 3) { /* misaligned, the end where it was */
        t->data = (char *)t->data + 3;
        t->capacity -= 3;
      }
      break;
    case 8: t->stride[axis] = 0; break;
    default: t->dim[axis] += fuzz_upto(f, 2) - 1; break;
  }
}

/* An output: poisoned, so that a refused call can be shown to have written nothing. */
static inline etk_tensor fuzz_output(fuzz *f, int32_t dtype, int32_t rank, const int64_t *dim) {
  etk_tensor t = fuzz_tensor(f, dtype, rank, dim);
  if (t.capacity) memset(t.data, FUZZ_POISON, t.capacity);
  return t;
}
static inline void fuzz_untouched(const void *data, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; i++) FUZZ_CHECK(((const uint8_t *)data)[i] == FUZZ_POISON);
}

/* A copy of a versioned struct whose struct_size (its first field) is now and then another: the memory is as long as it
 * says, up to 4096 bytes; a longer one must be refused unread. */
static inline void *fuzz_struct(fuzz *f, const void *from, uint32_t size) {
  uint32_t claimed = size;
  if (fuzz_rarely(f)) {
    static const uint32_t odd[] = {0, 1, 3, 4, 5, 4096, 4097, UINT32_MAX};
    const int i = fuzz_upto(f, 15);
    claimed = i < 8 ? odd[i] : size + (uint32_t)i - 12;
  }
  const uint32_t bytes = claimed > 4096 ? size : claimed < 4 ? 4 : claimed;
  unsigned char *p = fuzz_block(f, bytes, 16);
  memset(p, 0, bytes);
  memcpy(p, from, bytes < size ? bytes : size);
  memcpy(p, &claimed, 4);
  if (bytes > size && (fuzz_u8(f) & 1)) p[bytes - 1] = 1;
  return p;
}

/* Pools that are not ours: in reverse, cancelled midway, none. Zero-initialised state lives in the target. */
typedef struct fuzz_pool {
  etk_pool face;
  int width, reverse;
  int64_t cancel_after, ran; /* cancel_after < 0: never */
} fuzz_pool;

static inline int fuzz_pool_width(void *ctx) { return ((fuzz_pool *)ctx)->width; }
static inline int fuzz_pool_cancelled(void *ctx) {
  const fuzz_pool *p = ctx;
  return p->cancel_after >= 0 && p->ran >= p->cancel_after;
}
static inline int fuzz_pool_for(void *ctx, void (*fn)(void *arg, int64_t task, int worker), void *arg, int64_t ntasks) {
  fuzz_pool *p = ctx;
  for (int64_t i = 0; i < ntasks; i++) {
    if (fuzz_pool_cancelled(ctx)) return 1;
    p->ran++;
    fn(arg, p->reverse ? ntasks - 1 - i : i, (int)(i % p->width));
  }
  return 0;
}
static inline const etk_pool *fuzz_make_pool(fuzz *f, fuzz_pool *p) {
  const int how = fuzz_u8(f);
  if (how % 4 == 0) return NULL;
  *p = (fuzz_pool){.width = 1 + how % 5, .reverse = how >> 3 & 1, .cancel_after = (how >> 4) == 15 ? how % 3 : -1};
  p->face = (etk_pool){p, fuzz_pool_width, fuzz_pool_for, how & 64 ? fuzz_pool_cancelled : NULL};
  if (!p->face.cancelled) p->cancel_after = -1;
  return &p->face;
}

#endif
