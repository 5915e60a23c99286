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

int main(void) {
  test_check_refuses_each_fault();
  test_check_of_variable_blocks();
  test_permutations();
  if (failures == 0) printf("test_index: ok\n");
  return failures != 0;
}
