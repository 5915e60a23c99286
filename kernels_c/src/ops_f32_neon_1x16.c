/* Small operations for NEON. Tile: one row, 16 floats in four registers. Formulas and bounds stand in the bodies. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "ops_kernel.h"
#include <arm_neon.h>

#include "ops_lanes_generic.h"

/* acc[lane] += sum of four products. Codes lie in -127..127, so a pair of products fits 16 bits. */
#define ETK_DOT_BIAS 0
typedef int8x16x4_t vdot;
static inline vdot i_dot_b(const int8_t *b) {
  vdot r = {{vld1q_s8(b), vld1q_s8(b + 16), vld1q_s8(b + 32), vld1q_s8(b + 48)}};
  return r;
}
static inline i4 dot4(i4 acc, int8x16_t a, int8x16_t v) {
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(v)), high = vmull_s8(vget_high_s8(a), vget_high_s8(v));
  return (i4)vaddq_s32((int32x4_t)acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
static inline vi i_dot4(vi acc, const int8_t *a, vdot b) {
  int32_t quad;
  memcpy(&quad, a, 4);
  const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(quad));
  vi r = {dot4(acc.a, q, b.val[0]), dot4(acc.b, q, b.val[1]), dot4(acc.c, q, b.val[2]), dot4(acc.d, q, b.val[3])};
  return r;
}

#include "ops_math_body.h"

#include "ops_act_body.h"
#include "ops_match_body.h"
#include "ops_norm_body.h"
#include "ops_rope_body.h"
#include "ops_scan_body.h"

const etk_ops_kernel etk_ops_f32_neon_1x16 = {
    "ops_f32_neon_1x16", ETK_ISA_NEON, k_norm, k_softmax, k_gelu, k_silu, k_swiglu, k_add, k_exp, k_rope,
    k_scan_max, k_collect, k_unit, k_quant, k_sim_best, k_sim_energy, k_blend,
};
