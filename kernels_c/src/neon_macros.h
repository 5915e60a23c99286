/* Macros of the NEON kernel files. Internal. */
#ifndef ETK_NEON_MACROS_H
#define ETK_NEON_MACROS_H

#include <arm_neon.h>
#include <stddef.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define ROLLED _Pragma("clang loop unroll(disable)")
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1") /* a loop of constant length that GCC would otherwise unroll into spills */
#endif

#endif
