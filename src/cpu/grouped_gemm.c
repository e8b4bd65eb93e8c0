/* grouped_gemm.c - one blocked product over all experts of a plan: forward, dX and dW.
 *
 *     rows:  out[R,n] = a[R,k] b[k,n] + bias          dw:  dw[k,n] = a[R,k]^T g[R,n]
 *
 * A tile is up to BLOCK_M rows by BLOCK_N columns of one expert's result. The summed dimension (k,
 * or R for dW) is cut in blocks of BLOCK_K: the left operand is packed in panels [BLOCK_K][up to
 * TILE_M], the right one in a panel [BLOCK_K][TILE_N], and a micro-kernel keeps a piece of the
 * result in registers. Between two blocks the accumulators wait in scratch, exactly, so that every
 * element is one chain of fused multiply-adds from +0 in ascending index, whatever the tile. For dW
 * a chain ends after SUM_ROWS rows of a segment: block sums are added in order, then segment
 * sums.
 *
 * Everything between packing and the finished result is `real`: packing widens elements of 16 bits,
 * and what stores a result rounds it once. */
#include "cpu/kernels.h"
#include "cpu/gemm_pack.h"

#include <string.h>

enum {
    PANELS = 8,
    BLOCK_M = TILE_M * PANELS,
    BLOCK_N = 256,
    BLOCK_K = 256,
    SUM_ROWS = 4096,
    IN_PLACE_M = 4,                               /* up to so many rows b is not worth packing */
    PANEL_A = TILE_M * BLOCK_K + GROUPS_M * VEC_N /* whole vectors spill over the end of a panel */
};

_Static_assert(BLOCK_N % TILE_N == 0, "a tile is whole panels wide");

/* Scratch of a worker. */
typedef struct tile_scratch {
    real a[PANELS * PANEL_A];
    real b[BLOCK_K * TILE_N];
    real edge[TILE_M * TILE_N]; /* a piece of the result that is not stored as it is */
    real bias[TILE_N];
    real chain[BLOCK_M * BLOCK_N];   /* accumulators between two blocks of k */
    real segment[BLOCK_M * BLOCK_N]; /* dW over several blocks: the sum of a segment, of a matrix */
    real sum[BLOCK_M * BLOCK_N];
} tile_scratch;

size_t MOE_KERNEL(gemm_scratch)(void) { return sizeof(tile_scratch); }

/* ---- packing --------------------------------------------------------------------------------- */

/* The panels of rows r .. r+m-1. */
static void pack_a_rows(tile_scratch *s, const moe__rows *a, int64_t r, int64_t m, int64_t p,
                        int64_t k)
{
    int64_t panels = blocks(m, TILE_M);
    for (int64_t q = 0; q < panels; q++) {
        int64_t i = part(m, panels, q);
        int64_t width = part(m, panels, q + 1) - i;
        MOE_KERNEL(pack_rows)(s->a + q * PANEL_A, width, a, r + i, width, p, k);
    }
}

/* The panels of columns i .. i+m-1 of rows r .. r+k-1: column i of a is row i of dW. */
V_INLINE void pack_a_columns_of(tile_scratch *s, const moe__rows *a, int64_t r, int64_t k,
                                int64_t i, int64_t m, const int wide)
{
    int64_t panels = blocks(m, TILE_M);
    for (int64_t p = 0; p < k; p++) {
        const void *from = row_of(a, r + p, i);
        real scale = scale_of(a, r + p);
        for (int64_t q = 0; q < panels; q++) {
            int64_t first = part(m, panels, q), width = part(m, panels, q + 1) - first;
            real *to = s->a + q * PANEL_A + p * width;
            if (first + GROUPS_M * VEC_N <= m)
                for (int g = 0; g < GROUPS_M * VEC_N; g += VEC_N)
                    v_store(to + g, v_mul(v_get_at(from, first + g, wide), v_set1(scale)));
            else
                for (int64_t l = 0; l < width; l++) to[l] = get_at(from, first + l, wide) * scale;
        }
    }
}

static void pack_a_columns(tile_scratch *s, const moe__rows *a, int64_t r, int64_t k, int64_t i,
                           int64_t m)
{
    if (WIDE(a->wide))
        pack_a_columns_of(s, a, r, k, i, m, 1);
    else
        pack_a_columns_of(s, a, r, k, i, m, 0);
}

/* ---- results --------------------------------------------------------------------------------- */

/* Where a tile's finished chains go: (i,j) to element (row(i), column + j) of a matrix from `out`
 * on, row(i) being index[i] if there is an index, else i. */
typedef struct sink {
    void *out;
    int64_t stride_row, stride_col, panel, panel_step; /* as moe__matrices */
    int64_t column;
    const int64_t *index;
    const void *bias; /* by bias_step, or NULL */
    int64_t bias_step;
    int32_t add, wide, bias_wide;
} sink;

/* from[n] to, or onto, what lies `step` apart from `out` on. */
V_INLINE void store_line_of(void *out, int64_t step, const real *from, int64_t n, int add,
                            const int wide)
{
    if (!WIDE(wide) && step == 1) { /* so that rounding vectorises */
        for (int64_t c = 0; c < n; c++)
            put_at(out, c, wide, add ? get_at(out, c, wide) + from[c] : from[c]);
        return;
    }
    for (int64_t c = 0; c < n; c++)
        put_at(out, c * step, wide, add ? get_at(out, c * step, wide) + from[c] : from[c]);
}

/* Where element (row,j) of the tile goes. */
static void *sink_at(const sink *to, int64_t row, int64_t j)
{
    int64_t column = to->column + j, at = row * to->stride_row + column * to->stride_col;
    if (to->panel) at += column / to->panel * (to->panel_step - to->panel);
    return place_at(to->out, at, to->wide);
}

static void store_line(const sink *to, int64_t row, int64_t j, const real *from, int64_t n)
{
    for (int64_t part; n > 0; n -= part, j += part, from += part) {
        part = to->panel ? moe__min(n, to->panel - (to->column + j) % to->panel) : n;
        if (WIDE(to->wide))
            store_line_of(sink_at(to, row, j), to->stride_col, from, part, to->add, 1);
        else
            store_line_of(sink_at(to, row, j), to->stride_col, from, part, to->add, 0);
    }
}

/* edge[m,TILE_N], bias added, to columns j .. j+n-1 of rows i .. i+m-1. */
static void store_edge(const tile_scratch *s, const sink *to, int64_t i, int64_t m, int64_t j,
                       int64_t n)
{
    for (int64_t l = 0; l < m; l++)
        store_line(to, to->index ? to->index[i + l] : i + l, j, s->edge + l * TILE_N, n);
}

/* A block of k for panel j .. j+n-1 of a tile [m,..]: all packed rows of a times job->b. The chains
 * go on from scratch and back to it, or, at the last block, to the sink. */
static void run_panel(tile_scratch *s, micro_job job, int64_t m, int64_t j, int64_t n, int first,
                      const sink *to)
{
    int64_t panels = blocks(m, TILE_M);
    int direct = to && WIDE(to->wide) && n == TILE_N && to->stride_col == 1 && !to->index &&
                 to->panel % TILE_N == 0;
    if (to && to->bias) {
        for (int64_t l = 0; l < TILE_N; l++)
            s->bias[l] = l < n ? get_at(to->bias, (j + l) * to->bias_step, to->bias_wide) : R(0.0);
        job.bias = s->bias;
    }
    for (int64_t q = 0; q < panels; q++) {
        int64_t i = part(m, panels, q), rows = part(m, panels, q + 1) - i;
        real *chain = s->chain + i * BLOCK_N + j;
        job.a = s->a + q * PANEL_A;
        job.from = first ? NULL : chain;
        real *out = direct ? sink_at(to, i, j) : to ? s->edge : chain;
        for (int v = 0; v < TILE_V; v++) job.out[v] = out + v * VEC_N;
        job.out_stride = direct ? to->stride_row : to ? TILE_N : BLOCK_N;
        job.add = direct && to->add;
        MOE_KERNEL(micro_right)(rows, &job);
        if (to && !direct) store_edge(s, to, i, rows, j, n);
        job.ahead = (read_ahead){.at = (const char *)job.b, .too = (const char *)job.b};
    }
}

/* ---- tiles ----------------------------------------------------------------------------------- */

/* The expert a tile belongs to: the last with tile_begin <= tile. */
static int64_t expert_of_tile(const int64_t *tile_begin, int64_t experts, int64_t tile)
{
    int64_t low = 0, high = experts - 1;
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        if (tile_begin[middle] <= tile)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

int64_t MOE_KERNEL(gemm_rows_plan)(moe__gemm_rows_job *job)
{
    int64_t columns = blocks(job->n, BLOCK_N);
    job->tile_begin[0] = 0;
    for (int64_t e = 0; e < job->experts; e++) {
        int64_t rows = job->expert_begin[e + 1] - job->expert_begin[e];
        job->tile_begin[e + 1] = job->tile_begin[e] + blocks(rows, BLOCK_M) * columns;
    }
    return job->tile_begin[job->experts];
}

/* Rows p .. p+k-1 of columns j .. j+n-1 of b: in place where they are a panel, or for a few rows;
 * else packed while the columns after them are fetched, two cache lines at a time. */
static micro_job right_operand(tile_scratch *s, const moe__matrices *m, const void *b, int64_t p,
                               int64_t k, int64_t j, int64_t n, int64_t rows)
{
    int64_t bytes = WIDE(m->wide) ? (int64_t)sizeof(real) : (int64_t)sizeof(element);
    int64_t row = m->stride_row * bytes, col = m->stride_col * bytes;
    int by_columns = m->stride_row == 1 && m->stride_col != 1, in_panel = m->panel % TILE_N == 0;
    const char *next = place_at(b, element_of(m, p, j + n), m->wide);
    micro_job job = {.k = k,
                     .b = s->b,
                     .b_stride = TILE_N,
                     .b_step = VEC_N,
                     .from_stride = BLOCK_N,
                     .ahead = {.at = next, .too = next + 64, .step = row}};
    if (WIDE(m->wide) && m->stride_col == 1 && in_panel &&
        (m->panel || (rows <= IN_PLACE_M && n == TILE_N))) {
        job.b = place_at(b, element_of(m, p, j), m->wide);
        job.b_stride = m->stride_row;
        if (!m->panel) {
            job.ahead.at = (const char *)job.b + 16 * row;
            job.ahead.too = job.ahead.at + 64;
        }
        return job;
    }
    MOE_KERNEL(pack_columns)(s->b, TILE_N, TILE_N, m, b, p, k, j, n);
    if (by_columns) job.ahead = (read_ahead){.at = next, .too = next + 64, .step = col, .shift = 3};
    return job;
}

void MOE_KERNEL(gemm_rows_tile)(const moe__gemm_rows_job *job, int64_t tile, void *scratch)
{
    tile_scratch *s = scratch;
    int64_t e = expert_of_tile(job->tile_begin, job->experts, tile);
    int64_t place = tile - job->tile_begin[e], columns = blocks(job->n, BLOCK_N);
    int64_t all = job->expert_begin[e + 1] - job->expert_begin[e], parts = blocks(all, BLOCK_M);
    int64_t i = part(all, parts, place / columns), m = part(all, parts, place / columns + 1) - i;
    int64_t r = job->expert_begin[e] + i, j = place % columns * BLOCK_N;
    int64_t n = moe__min(BLOCK_N, job->n - j);
    const void *b = matrix_of(&job->b, e), *bias = matrix_of(&job->bias, e);
    int64_t bias_at = j * job->bias.stride_col, first = job->out_index ? 0 : r * job->out_stride;
    const sink out = {.out = place_at(job->out, first + j, job->out_wide),
                      .stride_row = job->out_stride,
                      .stride_col = 1,
                      .index = job->out_index ? job->out_index + r : NULL,
                      .bias = bias ? place_at(bias, bias_at, job->bias.wide) : NULL,
                      .bias_step = job->bias.stride_col,
                      .bias_wide = job->bias.wide,
                      .add = job->out_add,
                      .wide = job->out_wide};
    int64_t p = 0;
    do { /* once for k = 0, whose chains are +0 */
        int64_t k = moe__min(BLOCK_K, job->k - p);
        pack_a_rows(s, &job->a, r, m, p, k);
        for (int64_t l = 0; l < n; l += TILE_N) {
            int64_t width = moe__min(TILE_N, n - l);
            micro_job work = right_operand(s, &job->b, b, p, k, j + l, width, m);
            run_panel(s, work, m, l, width, p == 0, p + k == job->k ? &out : NULL);
        }
        p += BLOCK_K;
    } while (p < job->k);
}

/* ---- dW -------------------------------------------------------------------------------------- */

static int64_t rows_of_expert(const moe__gemm_dw_job *job, int64_t e)
{
    int64_t first = e * job->segments_per_expert;
    return job->segment_begin[first + job->segments_per_expert] - job->segment_begin[first];
}

/* The bias of an expert is summed with the first row block of each column block of its matrix,
 * which is why a tile exists even for k = 0 or without dw. */
int64_t MOE_KERNEL(gemm_dw_plan)(moe__gemm_dw_job *job)
{
    int64_t of_matrix = moe__max(1, blocks(job->k, BLOCK_M)) * blocks(job->n, BLOCK_N);
    job->tile_begin[0] = 0;
    for (int64_t e = 0; e < job->experts; e++) {
        bool wanted = matrix_of(&job->dw, e) || matrix_of(&job->dbias, e);
        bool work = wanted && (job->overwrite || rows_of_expert(job, e) > 0);
        job->tile_begin[e + 1] = job->tile_begin[e] + (work ? of_matrix : 0);
    }
    return job->tile_begin[job->experts];
}

/* Rows i .. i+m-1 and columns j .. j+n-1 of one expert's gradient. */
typedef struct place {
    int64_t e, i, m, j, n;
} place;

/* One chain over rows r .. r+count-1 of a[:,i..]^T g[:,j..], from +0 or from s->chain, to `to` or,
 * NULL, left in s->chain. */
static void dw_chain(const moe__gemm_dw_job *job, tile_scratch *s, const place *at, int64_t r,
                     int64_t count, int fresh, const sink *to)
{
    int64_t p = 0;
    do { /* once for no rows: the chains are +0 */
        int64_t k = moe__min(BLOCK_K, count - p);
        pack_a_columns(s, &job->a, r + p, k, at->i, at->m);
        for (int64_t l = 0; l < at->n; l += TILE_N) {
            int64_t width = moe__min(TILE_N, at->n - l);
            MOE_KERNEL(pack_width)(s->b, &job->g, r + p, k, at->j + l, width);
            micro_job work = {.k = k,
                              .b = s->b,
                              .b_stride = TILE_N,
                              .b_step = VEC_N,
                              .from_stride = BLOCK_N,
                              .ahead = {.at = (const char *)s->b, .too = (const char *)s->b}};
            run_panel(s, work, at->m, l, width, fresh && p == 0, p + k == count ? to : NULL);
        }
        p += BLOCK_K;
    } while (p < count);
}

/* The same for the bias: chain[n] = sum of rows r .. r+count-1 of g[:,j..], added in order. */
static void bias_chain(const moe__gemm_dw_job *job, tile_scratch *s, const place *at, int64_t r,
                       int64_t count, int fresh)
{
    if (fresh) memset(s->chain, 0, BLOCK_N * sizeof *s->chain);
    for (int64_t p = r; p < r + count; p++) {
        const void *from = row_of(&job->g, p, at->j);
        real scale = scale_of(&job->g, p);
        for (int64_t l = 0; l < at->n; l++)
            s->chain[l] = s->chain[l] + get_at(from, l, job->g.wide) * scale;
    }
}

static void add_chains(real *to, const real *from, int64_t m, int first)
{
    if (first)
        memcpy(to, from, (size_t)(m * BLOCK_N) * sizeof *to);
    else
        for (int64_t i = 0; i < m * BLOCK_N; i++) to[i] = to[i] + from[i];
}

/* s->sum[m,n] over all segments of the expert, each over its blocks of SUM_ROWS rows; m = 0: one
 * row, the bias. A segment without rows is not added. */
static void sum_segments(const moe__gemm_dw_job *job, tile_scratch *s, const place *at)
{
    int64_t first = at->e * job->segments_per_expert, m = moe__max(1, at->m);
    memset(s->sum, 0, (size_t)(m * BLOCK_N) * sizeof *s->sum);
    for (int64_t g = 0, any = 0; g < job->segments_per_expert; g++) {
        int64_t begin = job->segment_begin[first + g], end = job->segment_begin[first + g + 1];
        for (int64_t r = begin; r < end; r += SUM_ROWS) {
            if (at->m == 0)
                bias_chain(job, s, at, r, moe__min(SUM_ROWS, end - r), 1);
            else
                dw_chain(job, s, at, r, moe__min(SUM_ROWS, end - r), 1, NULL);
            add_chains(s->segment, s->chain, m, r == begin);
        }
        if (end > begin) add_chains(s->sum, s->segment, m, !any++);
    }
}

/* ---- dW of rows that come in several calls --------------------------------------------------- */

/* Rows of a matrix that is `width` wide, and of a tile. */
static void carry_tile(real *of_matrix, int64_t width, const place *at, real *of_tile, int out)
{
    int64_t m = moe__max(1, at->m);
    for (int64_t i = 0; i < m; i++) {
        real *there = of_matrix + (at->i + i) * width + at->j, *here = of_tile + i * BLOCK_N;
        memcpy(out ? there : here, out ? here : there, (size_t)at->n * sizeof *here);
    }
}

/* A tile's sums from where they waited, or to where they wait. */
static void carry(const moe__gemm_dw_job *job, tile_scratch *s, const place *at, int out)
{
    const moe__dw_sums *c = out ? &job->carry->to : &job->carry->from;
    carry_tile(at->m ? c->chain : c->bias_chain, job->n, at, s->chain, out);
    carry_tile(at->m ? c->ended : c->bias_ended, job->n, at, s->segment, out);
}

/* Whether rows of expert e went before, or will come. */
static int went_before(const moe__gemm_dw_job *job, int64_t e)
{
    return job->carry && job->carry->before > 0 && job->segment_begin[e] == job->segment_begin[0];
}
static int will_come(const moe__gemm_dw_job *job, int64_t e)
{
    return job->carry && job->carry->after > 0 &&
           job->segment_begin[e + 1] == job->segment_begin[job->experts];
}

/* As sum_segments over the rows that are here, from where the last call stopped: the same blocks.
 * Returns whether these were the last. */
static int sum_on(const moe__gemm_dw_job *job, tile_scratch *s, const place *at)
{
    int begun = went_before(job, at->e), more = will_come(job, at->e);
    int64_t r = job->segment_begin[at->e], end = job->segment_begin[at->e + 1];
    int64_t row = begun ? job->carry->before : 0, m = moe__max(1, at->m);
    if (begun) carry(job, s, at, 0);
    while (r < end) {
        int64_t phase = row % SUM_ROWS, count = moe__min(SUM_ROWS - phase, end - r);
        if (at->m == 0)
            bias_chain(job, s, at, r, count, phase == 0);
        else
            dw_chain(job, s, at, r, count, phase == 0, NULL);
        r += count, row += count;
        if (row % SUM_ROWS == 0 || (r == end && !more))
            add_chains(s->segment, s->chain, m, row <= SUM_ROWS);
    }
    if (more)
        carry(job, s, at, 1);
    else
        memcpy(s->sum, s->segment, (size_t)(m * BLOCK_N) * sizeof *s->sum);
    return !more;
}

static void store_sum(const tile_scratch *s, const sink *to, int64_t m, int64_t n)
{
    for (int64_t i = 0; i < m; i++) store_line(to, i, 0, s->sum + i * BLOCK_N, n);
}

void MOE_KERNEL(gemm_dw_tile)(const moe__gemm_dw_job *job, int64_t tile, void *scratch)
{
    tile_scratch *s = scratch;
    int64_t e = expert_of_tile(job->tile_begin, job->experts, tile);
    int64_t number = tile - job->tile_begin[e], columns = blocks(job->n, BLOCK_N);
    int64_t i = number / columns * BLOCK_M, j = number % columns * BLOCK_N;
    int64_t n = moe__min(BLOCK_N, job->n - j), rows = rows_of_expert(job, e);
    const void *dw = matrix_of(&job->dw, e), *dbias = matrix_of(&job->dbias, e);
    int cut = went_before(job, e) || will_come(job, e);
    if (dbias && i == 0) {
        int64_t col = job->dbias.stride_col;
        const place of_bias = {e, 0, 0, j, n};
        const sink bias = {.out = place_at(dbias, j * col, job->dbias.wide),
                           .stride_col = col,
                           .add = !job->overwrite,
                           .wide = job->dbias.wide};
        if (!cut) sum_segments(job, s, &of_bias);
        if (!cut || sum_on(job, s, &of_bias)) store_sum(s, &bias, 1, n);
    }
    if (!dw || job->k == 0) return;
    const place at = {e, i, moe__min(BLOCK_M, job->k - i), j, n};
    int64_t row = job->dw.stride_row;
    const sink to = {.out = place_at(dw, i * row, job->dw.wide),
                     .stride_row = row,
                     .stride_col = job->dw.stride_col,
                     .panel = job->dw.panel,
                     .panel_step = job->dw.panel_step,
                     .column = j,
                     .add = !job->overwrite,
                     .wide = job->dw.wide};
    if (cut) {
        if (sum_on(job, s, &at)) store_sum(s, &to, at.m, n);
    } else if (job->segments_per_expert == 1 && rows <= SUM_ROWS) {
        dw_chain(job, s, &at, job->segment_begin[e], rows, 1, &to);
    } else {
        sum_segments(job, s, &at);
        store_sum(s, &to, at.m, n);
    }
}
