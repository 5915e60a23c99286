/* Scans for argmax and top-k: one key per block of ETK_SCAN elements, then the elements of the few blocks that matter.
 * Reads each element once at the speed of memory; two operations per 16. */
static inline uint32_t scan_key(vf top, vm odd) { return m_any(odd) ? 0xffffffffu : etk_float_key(f_top(top)); }

static void k_scan_max(const float *x, int64_t n, uint32_t *keys) {
  int64_t i = 0;
  for (; i + ETK_SCAN <= n; i += ETK_SCAN) {
    vf t0 = f_load(x + i), t1 = f_load(x + i + 16);
    vm odd = m_nan2(t0, t1);
    for (int j = 32; j < ETK_SCAN; j += 32) {
      const vf u = f_load(x + i + j), v = f_load(x + i + j + 16);
      odd = m_or(odd, m_nan2(u, v));
      t0 = f_max(u, t0), t1 = f_max(v, t1);
    }
    *keys++ = scan_key(f_max(t0, t1), odd);
  }
  if (i == n) return;
  vf top = f_set(-INFINITY);
  vm odd = m_none();
  for (; i < n; i += 16) {
    const vf u = f_loadn(x + i, n - i < 16 ? n - i : 16, -INFINITY);
    odd = m_or(odd, m_nan2(u, u));
    top = f_max(u, top);
  }
  *keys = scan_key(top, odd);
}

static int32_t k_collect(const float *x, int32_t n, int32_t first, uint32_t key_min, uint32_t *keys, int32_t *idx) {
  const vf least = f_set(etk_key_float(key_min)); /* NaN: nothing but NaN is at least that */
  int32_t count = 0;
  for (int32_t i = 0; i < n; i += 16) {
    const int32_t m = n - i < 16 ? n - i : 16;
    const vf u = m == 16 ? f_load(x + i) : f_loadn(x + i, m, -INFINITY);
    uint32_t bits = m_bits(m_or(m_ge(u, least), m_nan2(u, u))) & ((1u << m) - 1u);
    for (; bits; bits &= bits - 1u) {
      const int32_t at = i + __builtin_ctz(bits);
      keys[count] = etk_float_key(x[at]);
      idx[count++] = first + at;
    }
  }
  return count;
}
