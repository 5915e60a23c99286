/* Matrix products: weight descriptors and sources, packed bytes that lie, activations, epilogues. */
#include "fuzz.h"

static etk_tensor in(fuzz *f, int32_t dtype, int32_t rank, const int64_t *dim) {
  etk_tensor t = fuzz_tensor(f, dtype, rank, dim);
  if (fuzz_rarely(f)) fuzz_break(f, &t);
  return t;
}

/* Two codes a byte: dims count codes, strides and capacity are those of the bytes. */
static etk_tensor nibbles(fuzz *f, int32_t dtype, int64_t n, int64_t k) {
  const int64_t dim[] = {n, (k + 1) / 2};
  etk_tensor t = fuzz_tensor(f, ETK_U8, 2, dim);
  t.dtype = dtype;
  t.dim[1] = k;
  if (fuzz_rarely(f)) fuzz_break(f, &t);
  return t;
}

static etk_gemm_weight choose_weight(fuzz *f) {
  static const int32_t groups[] = {0, 16, 32, 64, 128};
  etk_gemm_weight w = {.struct_size = sizeof w, .n = 1 + fuzz_upto(f, 80), .k = 1 + fuzz_upto(f, 200), .bits = fuzz_u8(f) & 1 ? 8 : 4,
                       .group = groups[fuzz_upto(f, 4)], .offset = fuzz_u8(f) & 1, .gated = fuzz_u8(f) % 4 == 3,
                       .scale_dtype = fuzz_u8(f) & 1 ? ETK_F16 : ETK_F32,
                       .isa_cap = fuzz_u8(f) & 1 ? 0 : ETK_ISA_SCALAR};
  if (w.group) w.k = w.group * (1 + w.k % 3);
  if (!fuzz_rarely(f)) return w;
  switch (fuzz_upto(f, 8)) {
    case 0: w.n = fuzz_number(f); break;
    case 1: w.k = fuzz_number(f); break;
    case 2: w.bits = (int32_t)fuzz_number(f); break;
    case 3: w.group = (int32_t)fuzz_number(f); break;
    case 4: w.offset = (int32_t)fuzz_number(f); break;
    case 5: w.gated = (int32_t)fuzz_number(f); break;
    case 6: w.scale_dtype = (int32_t)fuzz_number(f); break;
    case 7: w.layout = (int32_t)fuzz_number(f); break;
    default: w.isa_cap = (int32_t)fuzz_number(f); break;
  }
  return w;
}

static etk_gemm_source choose_source(fuzz *f, const etk_gemm_weight *w, int64_t n, int64_t k) {
  etk_gemm_source s = {.struct_size = sizeof s, .format = fuzz_upto(f, 4)};
  const int64_t groups = w->group > 0 && w->group <= k ? (k + w->group - 1) / w->group : 1, g[] = {n, groups};
  const int64_t block[] = {0, 0, 18, 20, 34};
  if (s.format >= ETK_W_Q4_0) {
    s.codes = in(f, ETK_U8, 2, (int64_t[]){n, k / 32 * block[s.format]});
  } else if (s.format == ETK_W_FLOAT) {
    s.codes = in(f, ETK_F32, 2, (int64_t[]){n, k});
  } else {
    const int is_signed = fuzz_u8(f) & 1;
    s.codes = w->bits == 4 ? nibbles(f, is_signed ? ETK_S4X2 : ETK_U4X2, n, k)
                           : in(f, is_signed ? ETK_S8 : ETK_U8, 2, (int64_t[]){n, k});
    s.scales = in(f, fuzz_u8(f) & 1 ? ETK_F16 : ETK_F32, 2, g);
    if (fuzz_u8(f) % 4 == 0) s.zeros = in(f, fuzz_u8(f) & 1 ? ETK_U8 : ETK_F32, 2, g);
    if (fuzz_u8(f) % 4 == 0) s.offsets = in(f, ETK_F32, 2, g);
  }
  if (fuzz_rarely(f)) s.format = (int32_t)fuzz_number(f);
  return s;
}

static void multiply(fuzz *f, const etk_gemm_weight *w, const void *packed, uint64_t bytes) {
  static const int32_t dtypes[] = {ETK_F32, ETK_F32, ETK_S8, ETK_U8};
  const int64_t rows = fuzz_upto(f, 20), both = w->gated == 1 ? 2 * w->n : w->n;
  const int32_t a_dtype = dtypes[fuzz_upto(f, 3)];
  etk_gemm_desc plain = {.struct_size = sizeof plain, .weight = *w, .max_m = rows, .a_dtype = a_dtype, .a_quant = fuzz_upto(f, 3),
                         .a_code = a_dtype == ETK_F32 && (fuzz_u8(f) & 1) ? ETK_U8 : 0, .out_dtype = fuzz_rarely(f) ? ETK_I32 : ETK_F32,
                         .a_scale = fuzz_rarely(f) ? fuzz_float(f) : 0.05f, .a_zero = (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : 0),
                         .act = fuzz_upto(f, 3)};
  if (fuzz_rarely(f)) plain.a_quant = (int32_t)fuzz_number(f);
  if (fuzz_rarely(f)) plain.act = (int32_t)fuzz_number(f);
  if (fuzz_rarely(f)) plain.max_m = fuzz_number(f);
  if (fuzz_rarely(f)) plain.flags = fuzz_u32(f);
  const etk_gemm_desc *desc = fuzz_struct(f, &plain, sizeof plain);
  etk_gemm_plan *plan = NULL;
  const etk_status made = etk_gemm_plan_create(desc, (int32_t)(fuzz_rarely(f) ? fuzz_number(f) : 1 + fuzz_upto(f, 2)), &plan);
  FUZZ_CHECK((made >= 0) == (plan != NULL));
  uint64_t need = 0, align = 0;
  if (plan && etk_gemm_workspace(plan, &need, &align) >= 0 && need <= FUZZ_MAX_BYTES && w->n <= 4096 && w->k <= 4096) {
    etk_gemm_io whole = {.struct_size = sizeof whole, .w = fuzz_rarely(f) ? NULL : packed, .w_bytes = bytes};
    whole.a = in(f, a_dtype, 2, (int64_t[]){rows, w->k});
    if (a_dtype != ETK_F32 && plain.a_quant == ETK_A_ROW) whole.a_scale = in(f, ETK_F32, 1, &rows);
    if (a_dtype == ETK_U8 && (fuzz_u8(f) & 1)) whole.a_zero = in(f, ETK_I32, 1, &rows);
    if (fuzz_u8(f) % 4 == 0) whole.out_scale = in(f, ETK_F32, 1, &both);
    if (fuzz_u8(f) % 4 == 0) whole.bias = in(f, ETK_F32, 1, &both);
    if (fuzz_u8(f) % 4 == 0) whole.residual = in(f, ETK_F32, 2, (int64_t[]){rows, w->n});
    whole.out = fuzz_output(f, plain.out_dtype, 2, (int64_t[]){rows, w->n});
    const void *data = whole.out.data;
    const uint64_t size = whole.out.capacity;
    if (fuzz_rarely(f)) fuzz_break(f, &whole.out);
    const etk_gemm_io *io = fuzz_struct(f, &whole, sizeof whole);
    unsigned char *ws = fuzz_block(f, need, align);
    fuzz_pool state;
    const etk_status st = etk_gemm_run(plan, io, ws, need - (need && fuzz_rarely(f)), fuzz_make_pool(f, &state));
    if (st < 0 && st != ETK_E_CANCELLED) fuzz_untouched(data, size);
  }
  etk_gemm_plan_free(plan);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  fuzz f = {.data = data, .size = size};
  const etk_gemm_weight plain = choose_weight(&f);
  const etk_gemm_weight *w = fuzz_struct(&f, &plain, sizeof plain);
  const int small = plain.n >= 0 && plain.n <= 4096 && plain.k >= 0 && plain.k <= 4096;
  const int64_t n = (small ? plain.n : 3) * (plain.gated == 1 ? 2 : 1), k = small ? plain.k : 32;
  uint64_t bytes = 0;
  if (etk_gemm_packed_size(w, &bytes) >= 0 && bytes <= FUZZ_MAX_BYTES && w->struct_size >= sizeof plain) {
    const etk_gemm_source source = choose_source(&f, &plain, n, k);
    unsigned char *packed = fuzz_block(&f, bytes, 64);
    memset(packed, FUZZ_POISON, bytes);
    const etk_status st = etk_gemm_pack(w, fuzz_struct(&f, &source, sizeof source), packed,
                                        bytes - (bytes && fuzz_rarely(&f)), NULL);
    if (st >= 0) {
      if (fuzz_rarely(&f)) { /* a file that lies: its header first of all */
        const int64_t value = fuzz_number(&f);
        memcpy(packed + (fuzz_u8(&f) & ~7u) % 128, &value, fuzz_u8(&f) & 1 ? 8 : 4);
      }
      multiply(&f, &plain, packed, bytes);
    } else {
      fuzz_untouched(packed, bytes);
    }
  }
  fuzz_free(&f);
  return 0;
}
