/* f16 in plain C, for baseline code. Internal. */
#ifndef ETK_HALF_H
#define ETK_HALF_H

#include <stdint.h>
#include <string.h>

/* Exact. */
static inline float etk_f16_to_f32(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = (h >> 10) & 31u, m = h & 1023u;
  uint32_t bits;
  float f;
  if (e == 0) { /* zero and subnormals: m 2^-24 */
    f = (float)m * 0x1p-24f;
    memcpy(&bits, &f, 4);
    bits |= sign;
  } else {
    bits = sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13;
  }
  memcpy(&f, &bits, 4);
  return f;
}

/* A positive finite scale rounded to the nearest f16 (even on ties), within [2^-24, 65504], as f32. */
static inline float etk_scale_f16(float s) {
  if (s > 65504.0f) return 65504.0f;
  if (s < 0x1p-14f) { /* subnormal f16: multiples of 2^-24 */
    const float r = (s + 0x1.8p-1f) - 0x1.8p-1f; /* 0.75 has an ulp of 2^-24 */
    return r > 0x1p-24f ? r : 0x1p-24f;
  }
  uint32_t bits;
  memcpy(&bits, &s, 4);
  bits = (bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu;
  memcpy(&s, &bits, 4);
  return s > 65504.0f ? 65504.0f : s;
}

#endif
