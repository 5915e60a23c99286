/* CPU feature probe: which ISA variants may run here.
 *
 * An instruction set counts only when CPUID (HWCAP on ARM) reports it and the operating system saves its
 * registers: XCR0 bits 1-2 for AVX, and bits 5-7 as well for AVX-512. The cap EDGETOK_MAX_ISA then clears
 * everything above the named ISA of the same family. */
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

static uint64_t xcr0(void) {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return ((uint64_t)hi << 32) | lo;
}

static int bit(uint32_t word, int n) { return (int)((word >> n) & 1u); }

static uint32_t probe(void) {
  uint32_t a = 0, b = 0, c = 0, d = 0, a1 = 0, b1 = 0, c1 = 0, d1 = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const int osxsave = bit(c, 27), avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
  if (!osxsave || !avx) return 0;
  const uint64_t xcr = xcr0();
  if ((xcr & 0x6) != 0x6) return 0;
  const int zmm = (xcr & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const int has_leaf1 = a >= 1 && __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
  uint32_t out = 0;
  if (bit(b, 5) && fma && f16c) out |= ETK_CPU_AVX2;
  if (has_leaf1 && bit(a1, 4)) out |= ETK_CPU_AVXVNNI;
  /* AVX512 F, DQ, BW, VL and VNNI together are the variant "avx512vnni". */
  if (zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11)) {
    out |= ETK_CPU_AVX512VNNI;
    if (bit(c, 1)) out |= ETK_CPU_AVX512VBMI;
    if (has_leaf1 && bit(a1, 5)) out |= ETK_CPU_AVX512BF16;
  }
  return out;
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

/* Values of the Linux ABI (asm/hwcap.h); old headers lack the later ones. */
#define HWCAP_ASIMD_BIT (1ul << 1)
#define HWCAP_ASIMDDP_BIT (1ul << 20)
#define HWCAP2_I8MM_BIT (1ul << 13)

static uint32_t probe(void) {
  const unsigned long one = getauxval(AT_HWCAP), two = getauxval(AT_HWCAP2);
  uint32_t out = 0;
  if (one & HWCAP_ASIMD_BIT) out |= ETK_CPU_NEON;
  if (one & HWCAP_ASIMDDP_BIT) out |= ETK_CPU_NEONDOT;
  if (two & HWCAP2_I8MM_BIT) out |= ETK_CPU_NEONI8MM;
  return out;
}

#elif defined(__aarch64__)
static uint32_t probe(void) { return ETK_CPU_NEON; }

#else
static uint32_t probe(void) { return 0; }
#endif

/* Best first within each family. BF16 rides with avx512vbmi: no kernel depends on it alone. */
static const struct {
  const char *name;
  uint32_t bits; /* the ISA itself and everything below it */
  uint32_t own;  /* the bit that makes it the best */
} k_isas[] = {
    {"avx512vbmi", ETK_CPU_AVX2 | ETK_CPU_AVXVNNI | ETK_CPU_AVX512VNNI | ETK_CPU_AVX512VBMI | ETK_CPU_AVX512BF16,
     ETK_CPU_AVX512VBMI},
    {"avx512vnni", ETK_CPU_AVX2 | ETK_CPU_AVXVNNI | ETK_CPU_AVX512VNNI, ETK_CPU_AVX512VNNI},
    {"avxvnni", ETK_CPU_AVX2 | ETK_CPU_AVXVNNI, ETK_CPU_AVXVNNI},
    {"avx2", ETK_CPU_AVX2, ETK_CPU_AVX2},
    {"neoni8mm", ETK_CPU_NEON | ETK_CPU_NEONDOT | ETK_CPU_NEONI8MM, ETK_CPU_NEONI8MM},
    {"neondot", ETK_CPU_NEON | ETK_CPU_NEONDOT, ETK_CPU_NEONDOT},
    {"neon", ETK_CPU_NEON, ETK_CPU_NEON},
    {"scalar", 0, 0},
};
enum { k_isa_count = sizeof k_isas / sizeof k_isas[0] };

/* 0 and *mask set when the cap is absent or known. */
static int cap_mask(uint32_t *mask) {
  const char *cap = getenv("EDGETOK_MAX_ISA");
  *mask = ~0u;
  if (!cap || !*cap) return 0;
  for (int i = 0; i < k_isa_count; i++) {
    if (strcmp(cap, k_isas[i].name) == 0) {
      *mask = k_isas[i].bits;
      return 0;
    }
  }
  return -1;
}

etk_status etk_get_caps(etk_caps *caps) {
  if (!caps) return ETK_E_NULL;
  if (caps->struct_size < sizeof(uint32_t) || caps->struct_size > 4096) return ETK_E_STRUCT;
  if (caps->struct_size > sizeof *caps) {
    const unsigned char *bytes = (const unsigned char *)caps;
    for (uint32_t i = sizeof *caps; i < caps->struct_size; i++)
      if (bytes[i]) return ETK_E_STRUCT;
  }
  uint32_t mask;
  if (cap_mask(&mask)) return ETK_E_ISA;
  const uint32_t cpu = probe();
  const etk_caps full = {caps->struct_size, ETK_ABI, cpu, cpu & mask};
  const size_t known = caps->struct_size < sizeof full ? caps->struct_size : sizeof full;
  memcpy(caps, &full, known);
  return ETK_OK;
}

const char *etk_isa_name(uint32_t usable) {
  for (int i = 0; i < k_isa_count; i++)
    if (k_isas[i].own == 0 || (usable & k_isas[i].own)) return k_isas[i].name;
  return "scalar";
}

int etk_isa_usable(const char *isa, uint32_t usable) {
  for (int i = 0; i < k_isa_count; i++)
    if (strcmp(isa, k_isas[i].name) == 0) return k_isas[i].own == 0 || (usable & k_isas[i].own) != 0;
  return 0;
}
