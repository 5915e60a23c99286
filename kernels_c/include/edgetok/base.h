/* What every part of libedgetok shares: status codes, element types, tensors, the thread pool table, the CPU probe.
 *
 * Rules that hold everywhere. A status below zero means that no output was written (ETK_E_CANCELLED excepted: outputs
 * are then unspecified); zero and above mean complete. Only functions named *_plan, *_create and *_free touch the heap.
 * Nothing prints or exits. Strides are in bytes. A struct with struct_size is versioned by it: shorter means that the
 * missing fields are zero, longer (up to 4096) only goes when all past the known fields is zero, else ETK_E_STRUCT.
 * A zero-filled field always means "off" or "default". */
#ifndef EDGETOK_BASE_H
#define EDGETOK_BASE_H

#include <stddef.h>
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
#define ETK_ABI 2

typedef int32_t etk_status;
enum {
  ETK_OK = 0,
  ETK_NOTE_NONFINITE = 1,   /* NaN or infinity met in an input and mapped to 0 or the largest finite value */
  ETK_NOTE_EMPTY_ROWS = 2,  /* at least one row sees no key: its output is 0 and its lse -inf */
  ETK_E_NULL = -1,          /* a required pointer is null */
  ETK_E_STRUCT = -2,        /* struct_size is unknown, or bytes past the known fields are not zero */
  ETK_E_SHAPE = -3,         /* a dimension is negative, over a limit, or does not match another */
  ETK_E_STRIDE = -4,        /* a stride this function cannot use (the last axis must be dense) */
  ETK_E_DTYPE = -5,         /* an element type this function does not take */
  ETK_E_ALIGN = -6,         /* a pointer less aligned than required */
  ETK_E_RANGE = -7,         /* an index out of range, unsorted or duplicated; a parameter out of range */
  ETK_E_OVERFLOW = -8,      /* dims x strides do not fit 63 bits, or exceed a tensor's capacity */
  ETK_E_WORKSPACE = -9,     /* the workspace is too small or misaligned */
  ETK_E_UNSUPPORTED = -10,  /* valid, but not offered by this version */
  ETK_E_ISA = -11,          /* the asked ISA does not run here, or EDGETOK_MAX_ISA is not a known name */
  ETK_E_NONFINITE = -12,    /* CHECK_FINITE was set and an input holds NaN or infinity */
  ETK_E_ALIAS = -13,        /* an output overlaps an input */
  ETK_E_CUDA = -14,
  ETK_E_CANCELLED = -15,    /* the pool asked to stop; outputs are unspecified */
  ETK_E_MEMORY = -16,       /* a *_plan or *_create could not allocate */
  ETK_E_FULL = -17,         /* a KV cache has no page left */
};

/* A fixed sentence for a status; never NULL. Static storage. */
ETK_API const char *etk_strerror(etk_status status);

enum { /* etk_tensor.dtype */
  ETK_F32 = 0, ETK_F16 = 1, ETK_BF16 = 2, ETK_S8 = 3, ETK_U8 = 4, ETK_S4X2 = 5, ETK_U4X2 = 6, ETK_I32 = 7, ETK_I64 = 8,
  ETK_BOOL = 9, ETK_U64 = 10,
};

/* A view of memory that the caller owns. rank 0 with data NULL means "absent". ETK_S4X2/U4X2 hold two codes a byte. */
typedef struct etk_tensor {
  void *data;
  int32_t dtype;
  int32_t rank;      /* 0..5 */
  int64_t dim[5];    /* in elements */
  int64_t stride[5]; /* in bytes; 0 broadcasts an input axis; negative is ETK_E_STRIDE */
  uint64_t capacity; /* bytes valid from data; checked against dims x strides */
} etk_tensor;

/* How a caller lends threads. parallel_for runs fn(arg, task, worker) once for each task in [0, ntasks), in any order,
 * with worker in [0, nthreads) and never two tasks of one worker at the same time, and returns 0 when all of them ran
 * (non-zero: some were left out, which the call reports as ETK_E_CANCELLED). Tasks never wait for one another, so a
 * serial pool is a valid pool. A NULL etk_pool* runs everything on the calling thread. */
typedef struct etk_pool {
  void *ctx;
  int (*nthreads)(void *ctx);
  int (*parallel_for)(void *ctx, void (*fn)(void *arg, int64_t task, int worker), void *arg, int64_t ntasks);
  int (*cancelled)(void *ctx); /* may be NULL; non-zero asks the running call to stop soon */
} etk_pool;

/* The library's own pool: nthreads - 1 workers beside the caller. A worker spins at most spin_us (0 = default, 50;
 * negative = not at all; at most 1000000) before it parks. A call from inside a task runs serially on its worker, a call
 * while another thread's call is running serially on its own thread. After fork the child's pool runs on the calling
 * thread. *out is usable with every function here until etk_pool_free, which no call may overlap (NULL is allowed).
 * Returns ETK_OK, ETK_E_NULL, ETK_E_RANGE (nthreads outside 1..256, spin_us), ETK_E_MEMORY (no memory or no thread). */
ETK_API ETK_MUST_USE etk_status etk_pool_create(int32_t nthreads, int32_t spin_us, const etk_pool **out);
ETK_API void etk_pool_free(const etk_pool *pool);
/* on != 0: the running call on this pool, and every later one, starts no further task and returns ETK_E_CANCELLED, until
 * on = 0. Any thread may ask. pool: one of etk_pool_create, or NULL (ignored). */
ETK_API void etk_pool_cancel(const etk_pool *pool, int32_t on);

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

/* ISA tokens by number: isa_cap fields and rows of kernels.def. 0 means "best". */
enum {
  ETK_ISA_BEST = 0, ETK_ISA_SCALAR = 1,
  ETK_ISA_AVX2 = 2, ETK_ISA_AVXVNNI = 3, ETK_ISA_AVX512VNNI = 4, ETK_ISA_AVX512VBMI = 5,
  ETK_ISA_NEON = 18, ETK_ISA_NEONDOT = 19, ETK_ISA_NEONI8MM = 20,
};

/* What the library can use on this machine. A caller sets struct_size = sizeof(etk_caps) and the rest to zero. */
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
 * neondot neoni8mm); an unknown value is ETK_E_ISA, so that a typo is not taken for "no cap".
 * Returns ETK_OK, ETK_E_NULL, ETK_E_ISA or ETK_E_STRUCT; on an error *caps is unchanged. */
ETK_API ETK_MUST_USE etk_status etk_get_caps(etk_caps *caps);

/* One row of the table of kernels compiled into this library. Within the rows of one op and one pair of element types the
 * best comes first, and the first usable one is what a plan without isa_cap takes. */
typedef struct etk_kernel_info {
  uint32_t struct_size; /* in: bytes of the caller's struct */
  int32_t usable;       /* out: 1 when this CPU may run it, after EDGETOK_MAX_ISA */
  const char *op;       /* out: "attn"; these three are static storage */
  const char *isa;      /* out: "avx512vnni" */
  const char *name;     /* out: "attn_s8_avx512vnni_6x64" */
} etk_kernel_info;

/* Describe row i = 0, 1, ... Returns ETK_OK, ETK_E_NULL, ETK_E_STRUCT, ETK_E_ISA (EDGETOK_MAX_ISA), or ETK_E_RANGE past the
 * last row; on an error *info is unchanged. */
ETK_API ETK_MUST_USE etk_status etk_kernel_at(int32_t i, etk_kernel_info *info);

/* The best ISA token usable here, as "avx512vbmi"; "scalar" when none. Static storage. */
ETK_API const char *etk_isa_name(uint32_t usable);

#ifdef __cplusplus
}
#endif
#endif
