/* Attention for AVX-512 VNNI without VBMI: as attn_s8_avx512vbmi_6x64 but for the table.
 * Formula, tile and bound are in attn_s8_avx512_body.h; here the table as 128 words of two entries: two vpermi2w of 64
 * words, chosen by bit 7 of the index, then the byte by bit 0. */
#define NAME "attn_s8_avx512vnni_6x64"
#define KERNEL etk_attn_s8_avx512vnni_6x64
#define ISA ETK_ISA_AVX512VNNI
#define LOOK_UP look_up
#include <immintrin.h>

#include "attn_lut.h"

static inline __attribute__((always_inline)) __m512i look_up_words(__m512i x) {
  x = _mm512_min_epu16(x, _mm512_set1_epi16(255));
  const __m512i *t = (const __m512i *)etk_lut_255;
  const __m512i word = _mm512_srli_epi16(x, 1);
  const __m512i near = _mm512_permutex2var_epi16(t[0], word, t[1]), far = _mm512_permutex2var_epi16(t[2], word, t[3]);
  const __m512i pair = _mm512_mask_mov_epi16(near, _mm512_movepi16_mask(_mm512_slli_epi16(x, 8)), far);
  const __m512i shift = _mm512_slli_epi16(_mm512_and_si512(x, _mm512_set1_epi16(1)), 3);
  return _mm512_and_si512(_mm512_srlv_epi16(pair, shift), _mm512_set1_epi16(255));
}
static inline __attribute__((always_inline)) __m512i look_up(__m512i low, __m512i high) {
  return _mm512_packus_epi16(look_up_words(low), look_up_words(high));
}

#include "attn_s8_avx512_body.h"
