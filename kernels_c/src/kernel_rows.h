/* Expand the rows of one op. Usage, in src/<op>_table.c:
 *   #define ETK_ROW_attn(isa, name) extern const etk_attn_kernel etk_##name;
 *   #include "kernel_rows.h"
 *   #undef ETK_ROW_attn
 * Rows of other ops and of other processor families vanish. */
#ifndef ETK_ROW_attn
#define ETK_ROW_attn(isa, name)
#define ETK_UNDEF_attn
#endif
#ifndef ETK_ROW_gemm
#define ETK_ROW_gemm(isa, name)
#define ETK_UNDEF_gemm
#endif
#ifndef ETK_ROW_index
#define ETK_ROW_index(isa, name)
#define ETK_UNDEF_index
#endif
#ifndef ETK_ROW_ops
#define ETK_ROW_ops(isa, name)
#define ETK_UNDEF_ops
#endif
#ifndef ETK_ROW_kv
#define ETK_ROW_kv(isa, name)
#define ETK_UNDEF_kv
#endif
#define ETK_ANY(op, isa, name) ETK_ROW_##op(isa, name)
#if defined(__x86_64__)
#define ETK_X86(op, isa, name) ETK_ROW_##op(isa, name)
#define ETK_ARM(op, isa, name)
#elif defined(__aarch64__)
#define ETK_X86(op, isa, name)
#define ETK_ARM(op, isa, name) ETK_ROW_##op(isa, name)
#else
#define ETK_X86(op, isa, name)
#define ETK_ARM(op, isa, name)
#endif
#include "../kernels.def"
#undef ETK_ANY
#undef ETK_X86
#undef ETK_ARM
#ifdef ETK_UNDEF_attn
#undef ETK_ROW_attn
#undef ETK_UNDEF_attn
#endif
#ifdef ETK_UNDEF_gemm
#undef ETK_ROW_gemm
#undef ETK_UNDEF_gemm
#endif
#ifdef ETK_UNDEF_index
#undef ETK_ROW_index
#undef ETK_UNDEF_index
#endif
#ifdef ETK_UNDEF_ops
#undef ETK_ROW_ops
#undef ETK_UNDEF_ops
#endif
#ifdef ETK_UNDEF_kv
#undef ETK_ROW_kv
#undef ETK_UNDEF_kv
#endif
