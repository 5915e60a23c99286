/* Small operations of a transformer, on the calling thread.
 *
 * Rules of this header, where nothing else is said. Tensors are float32, rank 1 to 5, with a dense last axis; a row is the last
 * axis, C its length, N the number of rows. Inputs may broadcast (stride 0). Zero rows are fine and do nothing. NULL or a
 * tensor with data NULL and rank 0 means "absent" where a parameter is called optional. An output may be exactly one of the
 * inputs of its own shape (same address and strides) where that is said, and may overlap nothing else. Split rows over
 * threads by passing views. Every instruction set gives the same bits (payloads of NaN excepted), and a row's result does
 * not depend on its neighbours.
 *
 * Each function returns ETK_OK or a note (>= 0), or ETK_E_NULL, ETK_E_SHAPE, ETK_E_STRIDE, ETK_E_DTYPE, ETK_E_ALIGN (an address
 * that is no multiple of the element), ETK_E_RANGE, ETK_E_OVERFLOW, ETK_E_ALIAS, ETK_E_WORKSPACE, or ETK_E_ISA (the
 * variable EDGETOK_MAX_ISA names none), in which case no output was written. */
#ifndef EDGETOK_OPS_H
#define EDGETOK_OPS_H

#include "edgetok/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The variant in use, as "ops_f32_avx2_1x16"; NULL when EDGETOK_MAX_ISA names no ISA. Static storage. */
ETK_API const char *etk_ops_kernel_name(void);

/* h = x + residual;  y = (h - mean h) / sqrt(mean (h - mean h)^2 + eps) * gamma + beta.
 * residual (optional): as x. gamma, beta (optional): [C]. sum (optional output): h. y (optional if q is given): as x.
 * q (optional): s8 as x, with q_scale: the dims of x without the last; scale = max|y| / 127 (1 for a zero row), q = y / scale
 * rounded to even; NaN gives 0, an infinity +-127, and the note ETK_NOTE_NONFINITE. In place: y or sum may be x or residual. */
ETK_API ETK_MUST_USE etk_status etk_layernorm(const etk_tensor *x, const etk_tensor *residual, const etk_tensor *gamma,
                                              const etk_tensor *beta, float eps, etk_tensor *y, etk_tensor *sum, etk_tensor *q,
                                              etk_tensor *q_scale);

/* y = h / sqrt(mean h^2 + eps) * gamma; the rest as etk_layernorm. */
ETK_API ETK_MUST_USE etk_status etk_rmsnorm(const etk_tensor *x, const etk_tensor *residual, const etk_tensor *gamma, float eps,
                                            etk_tensor *y, etk_tensor *sum, etk_tensor *q, etk_tensor *q_scale);

/* y = softmax over the last axis of scale x + mask. mask (optional): f32 added, or bool (or u8) where 0 hides an entry; its
 * dims align with those of x at the end and equal them or, but for the last, are 1. A row with nothing to see gives 0; NaN or +inf gives NaN.
 * exp(t) is within 7.2e-8 (3 + |t|) of itself, and 0 below -86.5. In place. */
ETK_API ETK_MUST_USE etk_status etk_softmax(const etk_tensor *x, const etk_tensor *mask, float scale, etk_tensor *y);

/* y = x Phi(x), by the error function, within 3e-7 max(1, |x|); tanh_form: 0.5 x (1 + tanh(sqrt(2/pi)
 * (x + 0.044715 x^3))), within 1.4e-7 max(1, |x|).
 * -inf gives 0. In place. */
ETK_API ETK_MUST_USE etk_status etk_gelu(const etk_tensor *x, int32_t tanh_form, etk_tensor *y);
/* y = x / (1 + exp(-x)), within 1.2e-7 max(1, |x|). -inf gives 0. In place. */
ETK_API ETK_MUST_USE etk_status etk_silu(const etk_tensor *x, etk_tensor *y);
/* y = gate / (1 + exp(-gate)) * up. y may be either. */
ETK_API ETK_MUST_USE etk_status etk_swiglu(const etk_tensor *gate, const etk_tensor *up, etk_tensor *y);
/* y = a + b, of the same dims. y may be either. */
ETK_API ETK_MUST_USE etk_status etk_add_rows(const etk_tensor *a, const etk_tensor *b, etk_tensor *y);

/* Tables for etk_rope: cos and sin [P, rot / 2] of amplitude * cos((first + p) * f[i]), with f = inv_freq [rot / 2] (optional),
 * else base^(-2i / rot). Angles in double. base > 0. */
ETK_API ETK_MUST_USE etk_status etk_rope_tables(const etk_tensor *inv_freq, double base, int64_t first, float amplitude,
                                                etk_tensor *cos_table, etk_tensor *sin_table);

/* Rotate the first rot columns of x [B, H, N, D] or [H, N, D] (logical order; strides are free) at table rows pos[n], i32 or
 * i64 [N] or [B, N]; absent: first + n. interleaved 0 pairs columns i and i + rot / 2, 1 pairs 2i and 2i + 1. rot = 2 x the
 * tables' width <= D; the other columns are copied. ETK_E_RANGE: a position without a row in the tables. In place. */
ETK_API ETK_MUST_USE etk_status etk_rope(const etk_tensor *x, const etk_tensor *cos_table, const etk_tensor *sin_table,
                                         const etk_tensor *pos, int64_t first, int32_t interleaved, etk_tensor *y);

/* idx (i32 or i64, dims of x without the last): where each row is largest, the lowest index of equals. NaN counts as the
 * largest of all. C >= 1. */
ETK_API ETK_MUST_USE etk_status etk_argmax(const etk_tensor *x, etk_tensor *idx);

/* The k largest of each row, falling, equal ones by rising index; NaN counts as the largest of all, -0 equals +0.
 * 1 <= k <= C < 2^31. values (optional): f32 [.., k]. idx: i32 or i64 [.., k]. ws: at least etk_topk_workspace(C, k) bytes,
 * 8-byte aligned. */
ETK_API uint64_t etk_topk_workspace(int64_t cols, int64_t k);
ETK_API ETK_MUST_USE etk_status etk_topk(const etk_tensor *x, int64_t k, etk_tensor *values, etk_tensor *idx, void *ws,
                                         uint64_t ws_bytes);

/* y[b, m, :] = x[b, idx[b, m], :]; x [B, N, C] or [N, C] of any element type of at least a byte, idx i32 or i64 [B, M] or [M],
 * every index in 0..N-1 (ETK_E_RANGE). */
ETK_API ETK_MUST_USE etk_status etk_gather_rows(const etk_tensor *x, const etk_tensor *idx, etk_tensor *y);
/* y[b, idx[b, m], :] = x[b, m, :]; other rows stay. Of equal indices the last wins. */
ETK_API ETK_MUST_USE etk_status etk_scatter_rows(const etk_tensor *x, const etk_tensor *idx, etk_tensor *y);

/* Token merging: which rows go where, then the size-weighted mean.
 *
 * metric [B, N, c], or [B, H, N, c], whose mean over H is taken (the keys of an attention); rows are divided by their length
 * (at least 1e-6). size (optional): f32 [B, N]; rows of size <= 1e-6 are padding and merge among themselves first. The
 * first `keep` rows never move. sim = cosine, in float or (int8 = 1) from INT8 codes of the unit rows.
 *
 *   TOME           A = even rows, B = odd rows: every A row links to its most similar B row, the r strongest links merge.
 *                  Output rows: kept ones, unlinked A (rising when keep > 0, else by falling link), B.
 *   PITOME         rows ordered by falling energy = mean over all j of ELU_alpha(sim - margin); of the first 2r, odd places merge
 *                  into even ones (places 0, 2, .. go to the most similar of 1, 3, ..). Output: kept, the rest in order, B.
 *   PITOME_HYBRID  A = places 0, 2, .. of the whole order, B = 1, 3, ..; the r strongest links, as TOME.
 *   PITOME_TEXT    energy = mean exp(-((1 - sim) / s)^2 / 2) / (s sqrt(2 pi)), s = max(1 - margin, 1e-3); the first r of the order
 *                  merge into the next r.
 * Ties go to the lower index everywhere; NaN similarities never link while others are left.
 * r: 0 .. (N - keep) / 2, for TOME also at most the number of A rows, and 0 where there is no B row (ETK_E_RANGE). */
enum { ETK_MATCH_TOME = 0, ETK_MATCH_PITOME = 1, ETK_MATCH_PITOME_HYBRID = 2, ETK_MATCH_PITOME_TEXT = 3 };

/* Bytes of workspace (64-byte aligned) for etk_match, etk_pitome_energy and etk_token_merge, 0 when a number is out of range: tokens <= 65536,
 * width (c) <= 65536. */
ETK_API uint64_t etk_match_workspace(int64_t tokens, int64_t width);

/* kept: i64 [B, N - r], the input row behind each output row; removed: i64 [B, r]; target: i64 [B, r], the output row that
 * each removed row goes into. With r = 0 removed and target are [B, 0]. */
ETK_API ETK_MUST_USE etk_status etk_match(int32_t kind, const etk_tensor *metric, const etk_tensor *size, int64_t keep, int64_t r,
                                          float margin, float alpha, int32_t int8, etk_tensor *kept, etk_tensor *removed,
                                          etk_tensor *target, void *ws, uint64_t ws_bytes);

/* energy: f32 [B, N - keep], of PITOME or PITOME_TEXT, padding included as any row. */
ETK_API ETK_MUST_USE etk_status etk_pitome_energy(int32_t kind, const etk_tensor *metric, int64_t keep, float margin, float alpha,
                                                  int32_t int8, etk_tensor *energy, void *ws, uint64_t ws_bytes);

/* Apply: x [B, N, C], size [B, N] (optional: ones), and a plan kept [B, M], removed, target [B, R] (i32 or i64, all in range, or
 * ETK_E_RANGE; a row may appear more than once):
 *   size_out[m] = size[kept m] + sum of size over removed rows with target m;  y[m] = sum of size x over the same / size_out[m]
 * Rows that nothing merges into, or of size_out <= 1e-12, are copied bit for bit. y [B, M, C], size_out f32 [B, M] (optional);
 * map (optional): i64 [B, N], the output row of each input row, -1 for rows in neither list. ws: etk_merge_workspace(M, R)
 * bytes, 64-byte aligned; M, R < 2^31. */
ETK_API uint64_t etk_merge_workspace(int64_t m, int64_t r);
ETK_API ETK_MUST_USE etk_status etk_merge_rows(const etk_tensor *x, const etk_tensor *size, const etk_tensor *kept,
                                               const etk_tensor *removed, const etk_tensor *target, etk_tensor *y,
                                               etk_tensor *size_out, etk_tensor *map, void *ws, uint64_t ws_bytes);

/* etk_match and etk_merge_rows in one call; the plan stays in ws (etk_match_workspace). y [B, N - r, C]. */
ETK_API ETK_MUST_USE etk_status etk_token_merge(int32_t kind, const etk_tensor *metric, const etk_tensor *x, const etk_tensor *size,
                                                int64_t keep, int64_t r, float margin, float alpha, int32_t int8, etk_tensor *y,
                                                etk_tensor *size_out, etk_tensor *map, void *ws, uint64_t ws_bytes);

#ifdef __cplusplus
}
#endif
#endif
