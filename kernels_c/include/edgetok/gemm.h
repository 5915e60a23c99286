/* Quantized matrix products: Y[M, N] = f(A[M, K] W[N, K]^T), weights INT8 or INT4 packed once, activations INT8.
 *
 *   A[m,k] = sa (a[m,k] - za)                   codes s8 (za = 0) or u8; static, or found for each row, call or 32 values
 *   W[n,k] = ws[n,g] u[n,k] + wb[n,g]           g = k / group; symmetric: u less its centre (128 or 8), wb = 0
 *   acc    = 0; for g ascending: acc = fma(ws[n,g], (f32)S, acc), wb: acc = fma(wb[n,g], (f32)R, acc)
 *            S = sum over the group of a u, exact; R = sum over the group of a
 *   v      = sa acc out_scale[n] + bias[n];  y = act(v), or act(v[n]) v[N + n] when gated;  Y = y + residual
 *
 * A row of Y does not depend on how many rows the call has, on the number of threads, or on the instruction set.
 * With one group the sum is one s32 and za is taken off exactly; with several, za costs one fma per output.
 *
 * Plan once, run many times: a plan is immutable and shareable between threads, a workspace is not. */
#ifndef EDGETOK_GEMM_H
#define EDGETOK_GEMM_H

#include "edgetok/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What packed weights hold. Set struct_size and zero the rest: a zero field means what stands behind it. */
typedef struct etk_gemm_weight {
  uint32_t struct_size, version; /* version 0 */
  int64_t n, k;                  /* rows (outputs; with gated: of each half) and columns; n <= 2^31, k <= 2^24 */
  int32_t bits;                  /* 8 or 4 */
  int32_t group;                 /* 16, 32, 64, 128, 256; 0 = one scale per row, k <= 65536 then */
  int32_t offset;                /* 1: an offset per group beside the scale; 0: symmetric */
  int32_t gated;                 /* 1: rows [0, n) are the gate, rows [n, 2n) what it multiplies */
  int32_t scale_dtype;           /* ETK_F32 or ETK_F16 (scales and offsets must be exact in it, except from floats) */
  int32_t layout;                /* 0 = that of the best kernel here; else a number that etk_gemm_packed_info gave */
  int32_t isa_cap;               /* ETK_ISA_*; 0 = best. Not part of the packed form */
} etk_gemm_weight;

enum { /* etk_gemm_source.format */
  ETK_W_CODES = 0, /* codes, scales and zeros or offsets as below */
  ETK_W_FLOAT = 1, /* f32 [N, K] to be quantized: 8 bits top/127, 4 bits m/-8 (m: the value of largest magnitude), with
                      offset (max - min)/(2^bits - 1) over min(values, 0)..max(values, 0) */
  ETK_W_Q4_0 = 2,  /* GGUF blocks of 32 as they lie in the file, u8 [N, K/32 * 18]: f16 d, 16 bytes of nibbles */
  ETK_W_Q4_1 = 3,  /* u8 [N, K/32 * 20]: f16 d, f16 m, nibbles */
  ETK_W_Q8_0 = 4,  /* u8 [N, K/32 * 34]: f16 d, 32 s8 */
};

/* Weights to pack; N counts both halves when gated. MatMulNBits is ETK_W_CODES with U4X2 or U8 codes (its [N, blocks,
 * bytes] seen as [N, K]) and zeros. */
typedef struct etk_gemm_source {
  uint32_t struct_size;
  int32_t format;
  etk_tensor codes;   /* s8 or u8 [N, K]; S4X2 or U4X2 [N, K], low nibble first; f32 [N, K]; or u8 blocks */
  etk_tensor scales;  /* f32 or f16 [N, groups]; CODES only */
  etk_tensor zeros;   /* u8 or f32 [N, groups] or U4X2 [N, groups]: W = scale (code - zero); absent = 0 for signed
                         codes and the centre (128, 8) for unsigned ones */
  etk_tensor offsets; /* f32 or f16 [N, groups]: W = scale code + offset; not together with zeros */
} etk_gemm_source;

/* Bytes of the packed form: a header of 128 bytes and panels, every part at a multiple of 64 from the start (32 for f16 scales
 * on ARM), no pointers: it may be written to a file and mapped. ETK_E_STRUCT, ETK_E_SHAPE, ETK_E_RANGE, ETK_E_OVERFLOW, ETK_E_ISA. */
ETK_API ETK_MUST_USE etk_status etk_gemm_packed_size(const etk_gemm_weight *weight, uint64_t *bytes);
/* Pack into caller memory, 64-byte aligned, at least the bytes asked for. Zeros or offsets need weight.offset = 1, except zeros that
 * all equal the centre. ETK_NOTE_NONFINITE: NaN or infinity in f32 weights, mapped to 0 and the largest finite value. */
ETK_API ETK_MUST_USE etk_status etk_gemm_pack(const etk_gemm_weight *weight, const etk_gemm_source *source, void *packed,
                                              uint64_t bytes, const etk_pool *pool);
/* Read and check the header of packed weights (bytes: readable from packed): ETK_E_STRUCT when it is not one, ETK_E_SHAPE when its sizes
 * are out of range or disagree, ETK_E_OVERFLOW when it is longer than bytes, ETK_E_UNSUPPORTED for a layout that no kernel here reads. */
ETK_API ETK_MUST_USE etk_status etk_gemm_packed_info(const void *packed, uint64_t bytes, etk_gemm_weight *weight);
/* The weights as f32 [N, K] (both halves when gated). */
ETK_API ETK_MUST_USE etk_status etk_gemm_unpack(const void *packed, uint64_t bytes, etk_tensor *out);

enum { /* a_quant: where the scale and zero of A come from */
  ETK_A_ROW = 0,    /* f32 A: found for each row; code A: io.a_scale and io.a_zero, one per row */
  ETK_A_TENSOR = 1, /* f32 A: found for the whole call (rows then do depend on each other) */
  ETK_A_GROUP32 = 2,/* f32 A, s8 codes: found for 32 values at a time; group 0 or a multiple of 32 */
  ETK_A_STATIC = 3, /* desc.a_scale, desc.a_zero */
};
enum { ETK_ACT_NONE = 0, ETK_ACT_GELU_ERF = 1, ETK_ACT_GELU_TANH = 2, ETK_ACT_SILU = 3 };

typedef struct etk_gemm_desc {
  uint32_t struct_size, version; /* version 0 */
  etk_gemm_weight weight;        /* its own struct_size as well */
  int64_t max_m;                 /* upper bound of M in any run of the plan */
  int32_t a_dtype;               /* ETK_F32 (quantized while packing), ETK_S8 or ETK_U8 (codes given) */
  int32_t a_code;                /* f32 A: 0 or ETK_S8 symmetric, ETK_U8 with zero point; code A: 0 or a_dtype */
  int32_t a_quant;
  float a_scale;                 /* ETK_A_STATIC; code A: 0 = 1 */
  int32_t a_zero;                /* ETK_A_STATIC: -128..127 (s8) or 0..255 (u8) */
  int32_t out_dtype;             /* ETK_F32, or ETK_I32: the integer sum (group 0, no offset, code A, no epilogue) */
  int32_t act;                   /* ETK_ACT_* */
  uint32_t flags;                /* 0 */
} etk_gemm_desc;

/* The law of quantizing f32 A. NaN counts as 0, infinities as the largest finite magnitude of their
 * row (call, 32 values); static: as the ends of the range.
 *   s8: top = max |x|; top < 2^-119: scale 1, zero 0; scale = top/127, code = clamp(rint(x (1/scale)), -127, 127)
 *   u8: lo = min(x, 0), hi = max(x, 0); the same with scale = hi/255 - lo/255, zero = rint(-lo (1/scale)),
 *       code = clamp(rint(x (1/scale)) + zero, 0, 255)
 *   static: code = clamp(rint(x (1/scale)) + zero, -127 or 0, 127 or 255) */
typedef struct etk_gemm_io {
  uint32_t struct_size, reserved;
  etk_tensor a;         /* [M, K] */
  const void *w;        /* packed weights, 64-byte aligned; the header is checked against the plan in every run */
  uint64_t w_bytes;     /* readable bytes from w */
  etk_tensor a_scale;   /* f32 [M], code A with ETK_A_ROW; else absent */
  etk_tensor a_zero;    /* i32 [M] or absent */
  etk_tensor out_scale; /* f32 [N] ([2N] gated), or absent */
  etk_tensor bias;      /* f32 [N] ([2N] gated), or absent */
  etk_tensor residual;  /* f32 [M, N], or absent; may be out itself */
  etk_tensor out;       /* f32 or i32 [M, N] */
} etk_gemm_io;

typedef struct etk_gemm_plan etk_gemm_plan;

/* Check the descriptor and choose the kernel. nthreads: the most workers a run may use, 1..256. */
ETK_API ETK_MUST_USE etk_status etk_gemm_plan_create(const etk_gemm_desc *desc, int32_t nthreads, etk_gemm_plan **out);
ETK_API void etk_gemm_plan_free(etk_gemm_plan *plan);
ETK_API ETK_MUST_USE etk_status etk_gemm_workspace(const etk_gemm_plan *plan, uint64_t *bytes, uint64_t *align);
ETK_API ETK_MUST_USE etk_status etk_gemm_run(const etk_gemm_plan *plan, const etk_gemm_io *io, void *ws, uint64_t ws_bytes,
                                             const etk_pool *pool);
/* The name of the kernel the plan chose, as "gemm_s8_avx512vnni_6x64". Static storage. */
ETK_API const char *etk_gemm_plan_kernel(const etk_gemm_plan *plan);

/* Quantize f32 x [M, K] by the law above: codes s8 or u8 [M, K] (its dtype chooses), scale f32 [M] ([1] for TENSOR, [M, ceil(K/32)] for
 * GROUP32), zero i32 like scale (u8; may be absent for s8). a_quant: ROW, TENSOR or GROUP32 (s8 only). */
ETK_API ETK_MUST_USE etk_status etk_gemm_quantize(const etk_tensor *x, int32_t a_quant, etk_tensor *codes, etk_tensor *scale,
                                                  etk_tensor *zero);

#ifdef __cplusplus
}
#endif
#endif
