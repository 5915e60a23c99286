/* A run: A is packed once, then every task multiplies a block of rows by a range of panels.
 *
 * Many rows: K is cut into blocks of 512, whose codes (widened to 8 bits when they have 4) stay in L1 while the tiles of the block of rows
 * pass over them. Few rows (two tiles): the packed stream is read once from end to end, nibbles are widened in registers. Both add the
 * runs of a row in the same order, so the result is the same bits. */
#include <string.h>

#include "gemm_plan.h"
#include "parallel.h"
#include "tensor.h"

enum { FEW_TILES = 2, TASKS_PER_WORKER = 4 };

typedef struct gemm_job {
  const etk_gemm_plan *plan;
  const etk_gemm_io *io;
  const gemm_ws *at;
  uint8_t *ws;
  int64_t block_tiles, chunks, chunk_panels;
  int32_t few;
  int32_t zeros; /* some za may differ from 0 */
} gemm_job;

#define AT(type, offset) ((type *)(void *)(job->ws + (offset)))

/* K block [k0, k1) of one panel for the tiles [t0, t1). */
static void block(const gemm_job *job, uint8_t *lane, const uint8_t *panel, int64_t k0, int64_t k1, int64_t t0, int64_t t1, int32_t half) {
  const etk_gemm_plan *p = job->plan;
  const etk_gemm_geom *g = &p->geom;
  const etk_gemm_kernel *kernel = p->kernel;
  const int64_t group = g->one ? 0 : k0 / g->glen, within = k0 - group * g->glen, run0 = p->s32 ? 0 : k0 / p->run_len;
  const uint8_t *rec = panel + (int64_t)g->nr * 4 + group * (int64_t)g->rec_bytes;
  const uint8_t *codes = rec + g->code_off + within * g->nr * g->bits / 8;
  etk_gemm_tile t = {.bits = g->bits, .narrow = g->bits == 4, .per_rec = p->per_rec, .f16 = g->f16, .first = k0 == 0,
                     .rec_bytes = (int64_t)g->rec_bytes, .w = codes, .ws = rec, .wb = g->offset ? rec + g->scale_bytes : NULL};
  t.len = p->s32 ? (int32_t)(k1 - k0) : p->run_len;
  t.runs = p->s32 ? 1 : (int32_t)((k1 - k0 + t.len - 1) / t.len);
  t.last_len = (int32_t)(k1 - k0 - (int64_t)(t.runs - 1) * t.len);
  if (g->bits == 4 && !job->few) {
    uint8_t *to = lane + job->at->lane_w;
    const int64_t span = g->one ? k1 - k0 : g->glen; /* codes of a widened record */
    t.bits = 8, t.w = to + g->code_off, t.ws = to, t.wb = g->offset ? to + g->scale_bytes : NULL;
    t.rec_bytes = (int64_t)g->code_off + span * g->nr;
    for (int64_t k = k0; k < k1; k += span, to += t.rec_bytes, rec += g->rec_bytes, codes += g->rec_bytes) {
      memcpy(to, rec, g->code_off);
      kernel->widen(codes, (int32_t)(k1 - k < span ? k1 - k : span), to + g->code_off);
    }
  }
  /* The next block follows this one in memory: ask for a share of it with each tile, or every block would begin with misses. */
  const uint8_t *ahead = panel + (int64_t)g->nr * 4 + group * (int64_t)g->rec_bytes + g->code_off;
  const int64_t block_bytes = (k1 - k0) * g->nr * g->bits / 8 + (g->one ? 0 : t.runs * (int64_t)g->code_off);
  ahead += within * g->nr * g->bits / 8 + block_bytes;
  const int64_t share = job->few ? 0 : (block_bytes / (t1 - t0) + 63) / 64 * 64;
  for (int64_t tile = t0; tile < t1; tile++, ahead += share) {
    for (int64_t i = 0; i < share; i += 64) __builtin_prefetch(ahead + i, 0, 2);
    const int64_t left = job->io->a.dim[0] - tile * kernel->mr, base = tile * kernel->mr * p->runs;
    t.rows = (int32_t)(left < kernel->mr ? left : kernel->mr);
    t.a = (const int8_t *)job->ws + job->at->a + tile * kernel->mr * p->k_pad + k0 * t.rows;
    t.start = AT(int32_t, job->at->start) + base + run0 * t.rows;
    t.rsum = g->offset ? AT(float, job->at->rsum) + base + run0 * t.rows : NULL;
    t.as = p->desc.a_quant == ETK_A_GROUP32 ? AT(float, job->at->as) + base + run0 * t.rows : NULL;
    uint8_t *c = lane + job->at->lane_c + (((tile - t0) * g->halves + half) * kernel->mr * kernel->nr) * 4;
    t.c = (float *)(void *)c;
    t.ci = (int32_t *)(void *)c;
    if (p->s32) kernel->tile_s32(&t);
    else kernel->tile_f32(&t);
  }
}

static void finish(const gemm_job *job, uint8_t *lane, int64_t panel, int64_t t0, int64_t t1) {
  const etk_gemm_plan *p = job->plan;
  const etk_gemm_geom *g = &p->geom;
  const etk_gemm_io *io = job->io;
  const int64_t n0 = panel * g->nr, left = g->n - n0;
  etk_gemm_finish f = {.cols = (int32_t)(left < g->nr ? left : g->nr), .nr = g->nr, .act = p->desc.act, .gated = g->halves == 2,
                       .out_i32 = p->desc.out_dtype == ETK_I32, .one = p->s32, .f16 = g->f16};
  for (int32_t h = 0; h < g->halves; h++) {
    const uint8_t *at = (const uint8_t *)io->w + etk_gemm_panel_at(g, panel, h), *rec = at + (int64_t)g->nr * 4;
    f.sums[h] = at;
    f.ws[h] = rec;
    f.wb[h] = g->offset ? rec + g->scale_bytes : NULL;
    if (!etk_absent(&io->out_scale)) f.out_scale[h] = (const float *)io->out_scale.data + h * g->n + n0;
    if (!etk_absent(&io->bias)) f.bias[h] = (const float *)io->bias.data + h * g->n + n0;
  }
  f.out_stride = io->out.stride[0] / 4;
  f.residual_stride = io->residual.stride[0] / 4;
  for (int64_t tile = t0; tile < t1; tile++) {
    const int64_t row = tile * p->kernel->mr, rest = io->a.dim[0] - row;
    f.rows = (int32_t)(rest < p->kernel->mr ? rest : p->kernel->mr);
    for (int32_t h = 0; h < g->halves; h++) {
      uint8_t *c = lane + job->at->lane_c + (((tile - t0) * g->halves + h) * p->kernel->mr * p->kernel->nr) * 4;
      f.c[h] = (float *)(void *)c;
      f.ci[h] = (const int32_t *)(const void *)c;
    }
    f.rsum = g->offset && p->s32 ? AT(float, job->at->rsum) + row : NULL;
    f.sa = AT(float, job->at->sa) + row;
    f.za = job->zeros ? AT(int32_t, job->at->za) + row : NULL;
    f.out = (uint8_t *)io->out.data + row * io->out.stride[0] + n0 * 4;
    f.residual = etk_absent(&io->residual)
                     ? NULL : (const float *)(const void *)((const uint8_t *)io->residual.data + row * io->residual.stride[0]) + n0;
    p->kernel->finish(&f);
  }
}

static void run_task(void *arg, int64_t task, int worker) {
  gemm_job *job = arg;
  const etk_gemm_plan *p = job->plan;
  const etk_gemm_geom *g = &p->geom;
  uint8_t *lane = job->ws + job->at->lanes + (uint64_t)worker * job->at->lane_bytes;
  const int64_t t0 = task / job->chunks * job->block_tiles, end = t0 + job->block_tiles;
  const int64_t t1 = end < job->at->tiles ? end : job->at->tiles, p0 = task % job->chunks * job->chunk_panels;
  const int64_t p1 = p0 + job->chunk_panels < g->panels ? p0 + job->chunk_panels : g->panels;
  const int64_t step = job->few ? (p->k_pad ? p->k_pad : 1) : GEMM_KC;
  for (int64_t panel = p0; panel < p1; panel++) {
    for (int32_t h = 0; h < g->halves; h++) {
      const uint8_t *at = (const uint8_t *)job->io->w + etk_gemm_panel_at(g, panel, h);
      if (p->k_pad == 0) memset(lane + job->at->lane_c, 0, (size_t)((t1 - t0) * g->halves * p->kernel->mr * p->kernel->nr * 4));
      for (int64_t k = 0; k < p->k_pad; k += step) block(job, lane, at, k, k + step < p->k_pad ? k + step : p->k_pad, t0, t1, h);
    }
    finish(job, lane, panel, t0, t1);
  }
}

static etk_status check_vector(const etk_tensor *t, uint32_t dtypes, int64_t n) {
  if (etk_absent(t)) return ETK_OK;
  const etk_status status = etk_tensor_in(t, 1, dtypes);
  return status != ETK_OK ? status : t->dim[0] == n ? ETK_OK : ETK_E_SHAPE;
}

static etk_status check_scales(const etk_gemm_plan *p, const etk_gemm_io *io, int64_t m) {
  const int given = p->desc.a_dtype != ETK_F32 && p->desc.a_quant == ETK_A_ROW;
  if (!given) return etk_absent(&io->a_scale) && etk_absent(&io->a_zero) ? ETK_OK : ETK_E_RANGE;
  if (p->desc.out_dtype == ETK_F32 && etk_absent(&io->a_scale)) return ETK_E_NULL;
  if (p->desc.out_dtype == ETK_I32 && !etk_absent(&io->a_scale)) return ETK_E_RANGE;
  etk_status status = check_vector(&io->a_scale, ETK_DT(ETK_F32), m);
  if (status == ETK_OK) status = check_vector(&io->a_zero, ETK_DT(ETK_I32), m);
  if (status != ETK_OK || etk_absent(&io->a_zero)) return status;
  const int32_t lo = p->a_code == ETK_S8 ? -128 : 0, *zero = io->a_zero.data;
  for (int64_t r = 0; r < m; r++)
    if (zero[r] < lo || zero[r] > lo + 255) return ETK_E_RANGE;
  return ETK_OK;
}

static etk_status check_aliases(const etk_gemm_plan *p, const etk_gemm_io *io) {
  const etk_tensor w = {.data = (void *)(uintptr_t)io->w, .dtype = ETK_U8, .rank = 1, .dim = {(int64_t)p->geom.bytes}, .stride = {1}};
  const etk_tensor *in[] = {&io->a, &w, &io->a_scale, &io->a_zero, &io->out_scale, &io->bias};
  for (size_t i = 0; i < sizeof in / sizeof *in; i++)
    if (etk_tensor_overlap(&io->out, in[i])) return ETK_E_ALIAS;
  const int same = io->residual.data == io->out.data && (io->out.dim[0] <= 1 || io->residual.stride[0] == io->out.stride[0]);
  return !same && etk_tensor_overlap(&io->out, &io->residual) ? ETK_E_ALIAS : ETK_OK;
}

static etk_status check_io(const etk_gemm_plan *p, const etk_gemm_io *io) {
  const etk_gemm_weight *w = &p->desc.weight;
  const int64_t n = p->geom.n * p->geom.halves;
  etk_status status = etk_tensor_in(&io->a, 2, ETK_DT(p->desc.a_dtype));
  if (status == ETK_OK) status = etk_tensor_out(&io->out, 2, ETK_DT(p->desc.out_dtype));
  if (status != ETK_OK) return status;
  const int64_t m = io->a.dim[0];
  if (m > p->desc.max_m || io->a.dim[1] != p->geom.k || io->out.dim[0] != m || io->out.dim[1] != p->geom.n) return ETK_E_SHAPE;
  etk_gemm_weight found;
  status = etk_gemm_check_header(io->w, io->w_bytes, p->kernel, &found);
  if (status != ETK_OK) return status;
  if (found.n != w->n || found.k != w->k || found.bits != w->bits || found.group != w->group || found.offset != w->offset ||
      found.gated != w->gated || found.scale_dtype != w->scale_dtype || found.layout != w->layout)
    return ETK_E_SHAPE;
  if (p->desc.out_dtype == ETK_I32 && !(etk_absent(&io->bias) && etk_absent(&io->out_scale) && etk_absent(&io->residual)))
    return ETK_E_RANGE;
  if (!etk_absent(&io->residual)) {
    status = etk_tensor_in(&io->residual, 2, ETK_DT(ETK_F32));
    if (status != ETK_OK) return status;
    if (io->residual.dim[0] != m || io->residual.dim[1] != p->geom.n) return ETK_E_SHAPE;
  }
  status = check_scales(p, io, m);
  if (status == ETK_OK) status = check_vector(&io->out_scale, ETK_DT(ETK_F32), n);
  if (status == ETK_OK) status = check_vector(&io->bias, ETK_DT(ETK_F32), n);
  return status == ETK_OK ? check_aliases(p, io) : status;
}

etk_status etk_gemm_run(const etk_gemm_plan *plan, const etk_gemm_io *given, void *ws, uint64_t ws_bytes, const etk_pool *pool) {
  if (!plan) return ETK_E_NULL;
  etk_gemm_io io;
  etk_status status = etk_struct_in(&io, sizeof io, given);
  if (status == ETK_OK) status = check_io(plan, &io);
  if (status != ETK_OK) return status;
  if (io.a.dim[0] == 0 || plan->geom.n == 0) return ETK_OK;
  const gemm_ws at = gemm_ws_of(plan, io.a.dim[0]);
  if (!ws || ws_bytes < at.bytes || (uintptr_t)ws % 64) return ETK_E_WORKSPACE;
  gemm_job job = {.plan = plan, .io = &io, .at = &at, .ws = ws};
  job.zeros = plan->a_code == ETK_U8 || plan->desc.a_zero != 0 || !etk_absent(&io.a_zero);
  const int64_t mr = plan->kernel->mr;
  int64_t most = GEMM_BLOCK_ROWS / mr;
  const int64_t fit = GEMM_A_BYTES / (mr * (plan->k_pad ? plan->k_pad : 1)), least = 48 / mr;
  most = fit < least ? least : fit < most ? fit : most;
  const int64_t blocks = (at.tiles + most - 1) / most;
  job.block_tiles = (at.tiles + blocks - 1) / blocks;
  job.few = at.tiles <= FEW_TILES;
  const int32_t width = etk_parallel_width(pool, plan->nthreads);
  const int64_t wanted = width == 1 ? 1 : (TASKS_PER_WORKER * width + blocks - 1) / blocks;
  job.chunk_panels = (plan->geom.panels + wanted - 1) / wanted;
  job.chunks = (plan->geom.panels + job.chunk_panels - 1) / job.chunk_panels;
  etk_status note;
  status = gemm_pack_a(plan, &io, &at, ws, pool, &note);
  if (status == ETK_OK) status = etk_parallel(pool, plan->nthreads, run_task, &job, blocks * job.chunks);
  return status == ETK_OK ? note : status;
}
