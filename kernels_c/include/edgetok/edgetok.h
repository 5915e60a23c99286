/* libedgetok: the C ABI.
 *
 * Every public function that can fail returns etk_status; a status below zero means nothing was written.
 * No function here allocates, prints, exits or keeps state.
 */
#ifndef EDGETOK_H
#define EDGETOK_H

#include <stdint.h>

#if defined(_WIN32)
#define ETK_API __declspec(dllexport)
#else
#define ETK_API __attribute__((visibility("default")))
#endif

#if defined(__GNUC__)
#define ETK_MUST_USE __attribute__((warn_unused_result))
#else
#define ETK_MUST_USE
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by one whenever a struct or a signature changes; edgetok.native refuses another number. */
#define ETK_ABI 1

typedef int32_t etk_status;
enum {
  ETK_OK = 0,
  ETK_E_ARG = -1,    /* a null pointer or a value out of range */
  ETK_E_STRUCT = -2, /* struct_size is unknown, or bytes past the known fields are not zero */
};

/* CPU features, one bit each. A bit is set only when the instructions exist AND the operating system keeps
 * their registers (XGETBV on x86, HWCAP on Linux ARM). */
enum {
  ETK_CPU_AVX2 = 1u << 0, /* with FMA and F16C */
  ETK_CPU_AVXVNNI = 1u << 1,
  ETK_CPU_AVX512VNNI = 1u << 2, /* with F, BW, DQ, VL */
  ETK_CPU_AVX512VBMI = 1u << 3,
  ETK_CPU_AVX512BF16 = 1u << 4,
  ETK_CPU_NEON = 1u << 8,
  ETK_CPU_NEONDOT = 1u << 9,
  ETK_CPU_NEONI8MM = 1u << 10,
};

/* What the library can use on this machine. A caller sets struct_size = sizeof(etk_caps) and the rest to zero.
 * Shorter structs (older callers) get the fields they know. */
typedef struct etk_caps {
  uint32_t struct_size; /* in: bytes of the caller's struct */
  uint32_t abi;         /* out: ETK_ABI of the library */
  uint32_t cpu;         /* out: ETK_CPU_* bits found */
  uint32_t usable;      /* out: cpu, capped by EDGETOK_MAX_ISA */
} etk_caps;

/* The version, as "0.1.0"; static storage. */
ETK_API const char *etk_version(void);

/* ETK_ABI as compiled in. */
ETK_API uint32_t etk_abi(void);

/* Fill *caps. Reads the environment variable EDGETOK_MAX_ISA (scalar avx2 avxvnni avx512vnni avx512vbmi neon
 * neondot neoni8mm); an unknown value is ETK_E_ARG, so that a typo is not taken for "no cap".
 * Returns ETK_OK, ETK_E_ARG or ETK_E_STRUCT; on an error *caps is unchanged. */
ETK_API ETK_MUST_USE etk_status etk_get_caps(etk_caps *caps);

/* The best ISA token usable here, as "avx512vbmi"; "scalar" when none. Static storage. */
ETK_API const char *etk_isa_name(uint32_t usable);

#ifdef __cplusplus
}
#endif
#endif
