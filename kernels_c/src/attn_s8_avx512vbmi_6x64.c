/* Attention for AVX-512 VNNI with VBMI: S (6 x 64) in registers, P through a 256-byte table in four registers.
 * Formula, tile and bound are in attn_s8_avx512_body.h; here the table: two vpermi2b of 128 entries, chosen by bit 7. */
#define NAME "attn_s8_avx512vbmi_6x64"
#define KERNEL etk_attn_s8_avx512vbmi_6x64
#define ISA ETK_ISA_AVX512VBMI
#define LOOK_UP look_up
#include <immintrin.h>

#include "attn_lut.h"

static inline __attribute__((always_inline)) __m512i look_up(__m512i low, __m512i high) {
  const __m512i x = _mm512_packus_epi16(low, high);
  const __m512i *t = (const __m512i *)etk_lut_255;
  const __m512i near = _mm512_permutex2var_epi8(t[0], x, t[1]), far = _mm512_permutex2var_epi8(t[2], x, t[3]);
  return _mm512_mask_mov_epi8(near, _mm512_movepi8_mask(x), far);
}

#include "attn_s8_avx512_body.h"
