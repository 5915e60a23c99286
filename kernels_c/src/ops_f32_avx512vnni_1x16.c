/* Small operations for AVX-512 with VNNI. Tile: one row, 16 floats in one register, VPDPBUSD for INT8 similarity.
 * Formulas and bounds stand in the bodies. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "ops_kernel.h"
#include "ops_lanes_avx512.h"
#include "ops_math_body.h"

#include "ops_act_body.h"
#include "ops_match_body.h"
#include "ops_norm_body.h"
#include "ops_rope_body.h"
#include "ops_scan_body.h"

const etk_ops_kernel etk_ops_f32_avx512vnni_1x16 = {
    "ops_f32_avx512vnni_1x16", ETK_ISA_AVX512VNNI, k_norm, k_softmax, k_gelu, k_silu, k_swiglu, k_add, k_exp, k_rope,
    k_scan_max, k_collect, k_unit, k_quant, k_sim_best, k_sim_energy, k_blend,
};
