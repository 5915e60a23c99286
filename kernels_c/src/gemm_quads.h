/* Layout 1 of packed weights and the activation tiles that go with it: plain loops, included by each kernel file. Internal. */
#ifndef ETK_GEMM_QUADS_H
#define ETK_GEMM_QUADS_H

#include <string.h>

#include "gemm_kernel.h"

enum { QUADS_NR = 64 };

static void quads_lay(const uint8_t *u, int32_t k0, int32_t len, int32_t column, int32_t bits, uint8_t *codes) {
  for (int32_t i = 0; i < len; i++) {
    const int32_t k = k0 + i;
    if (bits == 8) {
      codes[((int64_t)(k / 4) * QUADS_NR + column) * 4 + k % 4] = u[i];
    } else {
      uint8_t *at = codes + ((int64_t)(k / 8) * QUADS_NR + column) * 4 + k % 4;
      *at = (uint8_t)(*at | (k % 8 < 4 ? u[i] : u[i] << 4));
    }
  }
}

static int32_t quads_code_at(const uint8_t *codes, int32_t k, int32_t column, int32_t bits) {
  if (bits == 8) return codes[((int64_t)(k / 4) * QUADS_NR + column) * 4 + k % 4];
  const int32_t two = codes[((int64_t)(k / 8) * QUADS_NR + column) * 4 + k % 4];
  return k % 8 < 4 ? two & 15 : two >> 4;
}

static void quads_widen(const uint8_t *restrict codes, int32_t len, uint8_t *restrict out) {
  for (int32_t k = 0; k < len; k += 8) {
    const uint8_t *restrict in = codes + k * (QUADS_NR / 2);
    uint8_t *restrict to = out + k * QUADS_NR;
    for (int32_t i = 0; i < 4 * QUADS_NR; i++) to[i] = in[i] & 15;
    for (int32_t i = 0; i < 4 * QUADS_NR; i++) to[4 * QUADS_NR + i] = in[i] >> 4;
  }
}

static void quads_lay_a(const int8_t *codes, int64_t stride, int32_t rows, int64_t k, int8_t *out) {
  if (rows == 1) {
    memcpy(out, codes, (size_t)k);
    return;
  }
  for (int64_t q = 0; q < k / 4; q++)
    for (int32_t r = 0; r < rows; r++) memcpy(out + (q * rows + r) * 4, codes + r * stride + q * 4, 4);
}

#endif
