/* KV cache helpers for AVX-512: the formulas of kv_scalar_1x1.c; see kv_avx512_body.h and, for
 * f16 pages, kv_f16_avx512_body.h. */
#include <math.h>

#include "kv_avx512_body.h"
#include "kv_f16_avx512_body.h"

const etk_kv_kernel etk_kv_avx512vnni_1x64 = {
    .name = "kv_avx512vnni_1x64",
    .isa = ETK_ISA_AVX512VNNI,
    .round_f16 = round_f16,
    .widen_f16 = widen_f16,
    .expand4 = expand4,
    .fold_q4 = fold_q4,
    .chunk_f16 = chunk_f16,
};
