/* Small operations, baseline instructions: the law that every other variant follows bit for bit.
 *
 * Tile: one row, 16 floats in four vectors. Formulas and bounds stand in the bodies. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "ops_kernel.h"
#include "ops_lanes_generic.h"

/* acc[lane] += sum of four products of codes. */
#define ETK_DOT_BIAS 0
typedef const int8_t *vdot;
static inline vdot i_dot_b(const int8_t *b) { return b; }
static inline vi i_dot4(vi acc, const int8_t *a, vdot b) {
  int32_t t[16];
  for (int i = 0; i < 16; i++) t[i] = a[0] * b[4 * i] + a[1] * b[4 * i + 1] + a[2] * b[4 * i + 2] + a[3] * b[4 * i + 3];
  return i_add(acc, i_load(t));
}

#include "ops_math_body.h"

#include "ops_act_body.h"
#include "ops_match_body.h"
#include "ops_norm_body.h"
#include "ops_rope_body.h"
#include "ops_scan_body.h"

const etk_ops_kernel etk_ops_f32_scalar_1x16 = {
    "ops_f32_scalar_1x16", ETK_ISA_SCALAR, k_norm, k_softmax, k_gelu, k_silu, k_swiglu, k_add, k_exp, k_rope,
    k_scan_max, k_collect, k_unit, k_quant, k_sim_best, k_sim_energy, k_blend,
};
