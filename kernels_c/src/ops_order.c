/* Selection by histograms of eight bits from the top, sorting by counting from the bottom: four passes each, whatever the
 * data. */
#include "ops_order.h"

#include <string.h>

uint32_t etk_kth_key(const uint32_t *keys, int64_t n, int64_t k) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t hist[256] = {0};
    for (int64_t i = 0; i < n; i++)
      if (((keys[i] ^ prefix) & mask) == 0) hist[keys[i] >> shift & 255]++;
    uint32_t digit = 255;
    for (; digit > 0 && hist[digit] < k; digit--) k -= hist[digit];
    prefix |= digit << shift;
    mask |= 255u << shift;
  }
  return prefix;
}

void etk_keep_top(uint32_t *keys, int32_t *idx, int64_t n, int64_t k) {
  if (n <= k) return;
  const uint32_t kth = etk_kth_key(keys, n, k);
  int64_t above = 0, out = 0;
  for (int64_t i = 0; i < n; i++) above += keys[i] > kth;
  for (int64_t i = 0, equal = k - above; i < n; i++) {
    if (keys[i] < kth || (keys[i] == kth && equal-- <= 0)) continue;
    keys[out] = keys[i];
    idx[out++] = idx[i];
  }
}

void etk_sort_falling(uint32_t *keys, int32_t *idx, int64_t n, uint32_t *key_tmp, int32_t *idx_tmp) {
  if (n <= 48) {
    for (int64_t i = 1; i < n; i++) {
      const uint32_t key = keys[i];
      const int32_t at = idx[i];
      int64_t j = i;
      for (; j > 0 && keys[j - 1] < key; j--) keys[j] = keys[j - 1], idx[j] = idx[j - 1];
      keys[j] = key, idx[j] = at;
    }
    return;
  }
  uint32_t *ks = keys, *kd = key_tmp;
  int32_t *is = idx, *id = idx_tmp;
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t start[257] = {0}; /* start[d + 1] counts digit d of the complement, so that large keys come first */
    for (int64_t i = 0; i < n; i++) start[(~ks[i] >> shift & 255) + 1]++;
    if (start[(~ks[0] >> shift & 255) + 1] == n) continue; /* one digit for all */
    for (int d = 0; d < 256; d++) start[d + 1] += start[d];
    for (int64_t i = 0; i < n; i++) {
      const int64_t to = start[~ks[i] >> shift & 255]++;
      kd[to] = ks[i];
      id[to] = is[i];
    }
    uint32_t *const k = ks;
    int32_t *const x = is;
    ks = kd, kd = k, is = id, id = x;
  }
  if (ks != keys) {
    memcpy(keys, ks, (size_t)n * sizeof *keys);
    memcpy(idx, is, (size_t)n * sizeof *idx);
  }
}
