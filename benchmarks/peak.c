/* What the machine can do at most, for shares in benchmarks/gemm.py: compiled there with the compiler at hand, x86 with VNNI only. */
#include <immintrin.h>
#include <stdint.h>

/* vpdpbusd on twelve independent accumulators, `turns` times; operations done (one multiply-add is two). */
double int8_operations(int64_t turns) {
  __m512i acc[12];
  const __m512i x = _mm512_set1_epi32(3), y = _mm512_set1_epi32(7);
#pragma GCC unroll 12
  for (int j = 0; j < 12; j++) acc[j] = _mm512_set1_epi32(j);
  for (int64_t i = 0; i < turns; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; j++) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(acc[j]) : "v"(x), "v"(y));
  }
#pragma GCC unroll 12
  for (int j = 0; j < 12; j++) __asm__ volatile("" ::"v"(acc[j]));
  return 12.0 * 128.0 * (double)turns;
}

/* Reads every line once, in order, the lines 8 KiB ahead prefetched. */
void read_all(const char *memory, int64_t bytes) {
  __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t i = 0; i + 256 <= bytes; i += 256) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      _mm_prefetch(memory + i + 8192 + j * 64, _MM_HINT_T0);
      sum[j] = _mm512_add_epi32(sum[j], _mm512_loadu_si512(memory + i + j * 64));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) __asm__ volatile("" ::"v"(sum[j]));
}
