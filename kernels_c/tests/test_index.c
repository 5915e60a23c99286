/* Index checks and builders: golden cases, hostile input. One line per failure. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "edgetok/index.h"

static int failures;
#define EXPECT(cond)                                                   \
  do {                                                                 \
    if (!(cond)) {                                                     \
      failures++;                                                      \
      printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #cond);  \
    }                                                                  \
  } while (0)

static void test_check_refuses_each_fault(void) {
  const int64_t row_ptr[] = {0, 2, 3};
  const int32_t col[] = {0, 2, 1};
  const uint8_t kind[] = {0, 1, 0};
  const etk_bsr good = {.bq = 64, .bk = 64, .nqb = 2, .nkb = 3, .row_ptr = row_ptr, .rows = 2, .col = col, .nnz = 3, .kind = kind};
  EXPECT(etk_bsr_check(&good, 2, 4, 128, 190) == ETK_OK);
  EXPECT(etk_bsr_check(NULL, 1, 1, 128, 190) == ETK_E_NULL);
  EXPECT(etk_bsr_check(&good, 1, 1, 129, 190) == ETK_E_SHAPE);
  EXPECT(etk_bsr_check(&good, 1, 1, 128, 193) == ETK_E_SHAPE);
  EXPECT(etk_bsr_check(&good, -1, 1, 128, 190) == ETK_E_SHAPE);
  etk_bsr x = good;
  x.bq = 128;
  EXPECT(etk_bsr_check(&x, 1, 1, 128, 190) == ETK_E_UNSUPPORTED);
  x = good, x.row_ptr = NULL;
  EXPECT(etk_bsr_check(&x, 1, 1, 128, 190) == ETK_E_NULL);
  x = good, x.nnz = 2;
  EXPECT(etk_bsr_check(&x, 1, 1, 128, 190) == ETK_E_RANGE);
  x = good, x.stride_h = 2;
  EXPECT(etk_bsr_check(&x, 1, 2, 128, 190) == ETK_E_RANGE);
  x = good, x.stride_h = INT64_MAX;
  EXPECT(etk_bsr_check(&x, 1, 2, 128, 190) == ETK_E_OVERFLOW);
  x = good, x.rows = 3;
  EXPECT(etk_bsr_check(&x, 1, 1, 128, 190) == ETK_E_SHAPE);
  const int64_t falls[] = {0, 4, 3};
  x = good, x.row_ptr = falls;
  EXPECT(etk_bsr_check(&x, 1, 1, 128, 190) == ETK_E_RANGE);
  const int32_t bad_cols[][3] = {{2, 0, 1}, {0, 0, 1}, {0, 3, 1}, {-1, 2, 1}};
  for (int i = 0; i < 4; i++) {
    x = good, x.col = bad_cols[i];
    EXPECT(etk_bsr_check(&x, 1, 1, 128, 190) == ETK_E_RANGE);
  }
  const uint8_t bad_kind[] = {0, 2, 0};
  x = good, x.kind = bad_kind;
  EXPECT(etk_bsr_check(&x, 1, 1, 128, 190) == ETK_E_RANGE);
  const int32_t bits_idx[] = {-1, 0, -1}, bad_bits[] = {-1, 1, -1}, low_bits[] = {-1, -2, -1};
  const uint64_t bits[64] = {1};
  x = good, x.bits_idx = bits_idx, x.bits = bits, x.nbits = 1;
  EXPECT(etk_bsr_check(&x, 1, 1, 128, 190) == ETK_OK);
  x.bits = NULL;
  EXPECT(etk_bsr_check(&x, 1, 1, 128, 190) == ETK_E_NULL);
  x.bits = bits, x.bits_idx = bad_bits;
  EXPECT(etk_bsr_check(&x, 1, 1, 128, 190) == ETK_E_RANGE);
  x.bits_idx = low_bits;
  EXPECT(etk_bsr_check(&x, 1, 1, 128, 190) == ETK_E_RANGE);
  const int32_t patterns[] = {0, -2}, bad_patterns[] = {0, 1};
  x = good, x.head_pattern = patterns;
  EXPECT(etk_bsr_check(&x, 1, 2, 128, 190) == ETK_OK);
  int64_t listed = 0, visible = 0;
  EXPECT(etk_bsr_count(&x, 2, 2, 128, 190, 0, &listed, &visible) == ETK_OK && listed == 18 && visible == 24);
  EXPECT(etk_bsr_count(&good, 1, 1, 128, 190, 1, &listed, &visible) == ETK_OK && listed == 3 && visible == 5);
  x.head_pattern = bad_patterns;
  EXPECT(etk_bsr_check(&x, 1, 2, 128, 190) == ETK_E_RANGE);
}

static void test_check_of_variable_blocks(void) {
  const int64_t row_ptr[] = {0, 1, 2};
  const int32_t col[] = {1, 0}, q_ptr[] = {0, 0, 10}, k_ptr[] = {0, 3, 7};
  const etk_bsr good = {.nqb = 2, .nkb = 2, .row_ptr = row_ptr, .rows = 2, .col = col, .nnz = 2, .q_block_ptr = q_ptr, .k_block_ptr = k_ptr};
  EXPECT(etk_bsr_check(&good, 1, 1, 10, 7) == ETK_OK);
  EXPECT(etk_bsr_check(&good, 1, 1, 11, 7) == ETK_E_SHAPE);
  int64_t listed = 0, visible = 0;
  EXPECT(etk_bsr_count(&good, 1, 1, 10, 7, 0, &listed, &visible) == ETK_OK && listed == 30 && visible == 70);
  etk_bsr x = good;
  const int32_t falls[] = {0, 8, 7};
  x.k_block_ptr = falls;
  EXPECT(etk_bsr_check(&x, 1, 1, 10, 7) == ETK_E_RANGE);
  x.k_block_ptr = NULL;
  EXPECT(etk_bsr_check(&x, 1, 1, 10, 7) == ETK_E_NULL);
  x = good, x.var_stride_q = 2;
  EXPECT(etk_bsr_check(&x, 1, 1, 10, 7) == ETK_E_RANGE);
}

static void test_permutations(void) {
  static int32_t perm[70000];
  for (int32_t i = 0; i < 70000; i++) perm[i] = 69999 - i;
  EXPECT(etk_perm_check(perm, 70000) == ETK_OK);
  EXPECT(etk_perm_check(perm, 69999) == ETK_E_RANGE);
  perm[5] = perm[69000];
  EXPECT(etk_perm_check(perm, 70000) == ETK_E_RANGE);
  perm[5] = -1;
  EXPECT(etk_perm_check(perm, 70000) == ETK_E_RANGE);
  EXPECT(etk_perm_check(NULL, 0) == ETK_OK && etk_perm_check(NULL, 1) == ETK_E_NULL && etk_perm_check(perm, -1) == ETK_E_SHAPE);
}

/* Arrays for every case here. */
static int64_t store_row[64];
static int32_t store_col[4096], store_idx[4096];
static uint8_t store_kind[4096];
static uint64_t store_bits[64][64];
static etk_index_arrays store(void) {
  const etk_index_arrays a = {.row_ptr = store_row, .row_cap = 64, .col = store_col, .kind = store_kind, .bits_idx = store_idx,
                              .nnz_cap = 4096, .bits = store_bits[0], .bits_cap = 64};
  return a;
}

static void test_window_sizes_then_fill(void) {
  const etk_window_desc d = {.struct_size = sizeof d, .causal = 1, .n = 1000, .m = 1000, .left = 200, .sink = 70};
  etk_index_arrays sizes = {0}, full = store();
  etk_bsr out;
  EXPECT(etk_bsr_from_window(&d, &sizes, NULL) == ETK_OK && sizes.rows == 16 && sizes.nnz > 0 && sizes.nbits > 0);
  EXPECT(etk_bsr_from_window(&d, &full, &out) == ETK_OK && full.nnz == sizes.nnz && full.nbits == sizes.nbits);
  EXPECT(etk_bsr_check(&out, 2, 3, 1000, 1000) == ETK_OK);
  etk_index_arrays small = store();
  small.nnz_cap = sizes.nnz - 1;
  store_col[0] = 77;
  EXPECT(etk_bsr_from_window(&d, &small, &out) == ETK_E_RANGE && small.nnz == sizes.nnz && store_col[0] == 77);
  small = store(), small.row_cap = sizes.rows;
  EXPECT(etk_bsr_from_window(&d, &small, &out) == ETK_E_RANGE);
  small = store(), small.bits_cap = sizes.nbits - 1;
  EXPECT(etk_bsr_from_window(&d, &small, &out) == ETK_E_RANGE);
  small = store(), small.bits = NULL;
  EXPECT(etk_bsr_from_window(&d, &small, &out) == ETK_E_NULL && store_col[0] == 77);
  EXPECT(etk_bsr_from_window(&d, NULL, &out) == ETK_E_NULL && etk_bsr_from_window(NULL, &full, &out) == ETK_E_NULL);
}

static void test_hostile_descriptors(void) {
  etk_index_arrays a = {0};
  etk_window_desc d = {.struct_size = sizeof d, .n = 10, .m = 10, .left = INT64_MAX, .right = INT64_MAX, .sink = INT64_MAX};
  EXPECT(etk_bsr_from_window(&d, &a, NULL) == ETK_OK && a.nnz == 1 && a.nbits == 0);
  d.n = INT64_MAX;
  EXPECT(etk_bsr_from_window(&d, &a, NULL) == ETK_E_SHAPE);
  d.n = 10, d.left = -1;
  EXPECT(etk_bsr_from_window(&d, &a, NULL) == ETK_E_RANGE);
  d.left = 1, d.struct_size = 0;
  EXPECT(etk_bsr_from_window(&d, &a, NULL) == ETK_E_STRUCT);
  struct { etk_window_desc d; uint64_t more; } longer = {{.struct_size = sizeof longer, .n = 10, .m = 10}, 0};
  EXPECT(etk_bsr_from_window(&longer.d, &a, NULL) == ETK_OK);
  longer.more = 1;
  EXPECT(etk_bsr_from_window(&longer.d, &a, NULL) == ETK_E_STRUCT);
  etk_radial_desc r = {.struct_size = sizeof r, .frames = INT64_MAX, .tokens = INT64_MAX};
  EXPECT(etk_bsr_from_radial(&r, &a, NULL) == ETK_E_SHAPE);
  r.frames = 1 << 12, r.tokens = 1 << 12;
  EXPECT(etk_bsr_from_radial(&r, &a, NULL) == ETK_E_SHAPE);
  r.frames = 2, r.tokens = 64, r.decay_q8 = -1;
  EXPECT(etk_bsr_from_radial(&r, &a, NULL) == ETK_E_RANGE);
  r.decay_q8 = 0;
  EXPECT(etk_bsr_from_radial(&r, &a, NULL) == ETK_OK && a.nnz == 4);
}

static void test_mask_tensors(void) {
  static uint8_t mask[100][130], ws[64];
  for (int i = 0; i < 100; i++)
    for (int j = 0; j < 130; j++) mask[i][j] = (uint8_t)(j <= i + 30);
  etk_tensor t = {.data = mask, .dtype = ETK_BOOL, .rank = 2, .dim = {100, 130}, .stride = {130, 1}, .capacity = sizeof mask};
  etk_index_arrays a = store();
  etk_bsr out;
  uint64_t bytes = 0;
  EXPECT(etk_bsr_from_mask_workspace(&t, 130, &bytes) == ETK_OK && bytes == 6);
  EXPECT(etk_bsr_from_mask(&t, 130, 0, &a, &out, ws, bytes) == ETK_OK && a.nnz == 5 && a.nbits == 4);
  EXPECT(etk_bsr_check(&out, 1, 1, 100, 130) == ETK_OK);
  a = store();
  EXPECT(etk_bsr_from_mask(&t, 130, 1, &a, &out, ws, bytes) == ETK_OK && a.nnz == 5 && a.nbits == 0);
  EXPECT(etk_bsr_from_mask(&t, 130, 0, &a, &out, ws, bytes - 1) == ETK_E_WORKSPACE);
  EXPECT(etk_bsr_from_mask(&t, 130, 0, &a, &out, NULL, bytes) == ETK_E_NULL);
  EXPECT(etk_bsr_from_mask(&t, 131, 0, &a, &out, ws, bytes) == ETK_E_SHAPE);
  EXPECT(etk_bsr_from_mask(&t, 130, 2, &a, &out, ws, bytes) == ETK_E_RANGE);
  t.capacity--;
  EXPECT(etk_bsr_from_mask(&t, 130, 0, &a, &out, ws, bytes) == ETK_E_OVERFLOW);
  t.capacity++, t.stride[0] = INT64_MAX;
  EXPECT(etk_bsr_from_mask(&t, 130, 0, &a, &out, ws, bytes) == ETK_E_OVERFLOW);
  t.stride[0] = -130;
  EXPECT(etk_bsr_from_mask(&t, 130, 0, &a, &out, ws, bytes) == ETK_E_STRIDE);
  t.stride[0] = 130, t.dtype = ETK_F32;
  EXPECT(etk_bsr_from_mask(&t, 130, 0, &a, &out, ws, bytes) == ETK_E_DTYPE);
}

int main(void) {
  test_window_sizes_then_fill();
  test_hostile_descriptors();
  test_mask_tensors();
  test_check_refuses_each_fault();
  test_check_of_variable_blocks();
  test_permutations();
  if (failures == 0) printf("test_index: ok\n");
  return failures != 0;
}
