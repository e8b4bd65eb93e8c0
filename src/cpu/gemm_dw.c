/* gemm_dw.c - the gradients of the weights of all experts.
 *
 *     dw[k,n] (=|+=) a[R,k]^T g[R,n],  dbias[n] (=|+=) sum of g
 *
 * The sum is over rows, in blocks of BLOCK_K. An expert with one block has tiles of WIDE_M by
 * WIDE_N, whose operands are packed once and whose results go straight to the gradient; of more
 * rows, tiles are smaller, and accumulators wait in scratch between two blocks. A chain ends after
 * SUM_ROWS rows of a segment: block sums are added in order, then segment sums. */
#include "cpu/activation.h"
#include "cpu/gemm_tile.h"

#include <string.h>

enum { SUM_ROWS = 4096 };

/* The panels of columns i .. i+m-1 of rows r .. r+k-1: column i of a is row i of dW. */
V_INLINE void pack_a_columns_of(tile_scratch *s, const moe__rows *a, int64_t r, int64_t k,
                                int64_t i, int64_t m, const int wide)
{
    int64_t panels = blocks(m, TILE_M);
    element room[WIDE_M];
    for (int64_t p = 0; p < k; p++) {
        const void *from = row_of(a, r + p, i);
        real scale = scale_of(a, r + p);
        if (a->activation) {
            const element *second = a->second ? (const element *)a->second + (r + p) * a->stride + i
                                              : NULL;
            MOE_KERNEL(activate)(a->activation, m, room, from, second);
            from = room;
        }
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

static int64_t rows_of_expert(const moe__gemm_dw_job *job, int64_t e)
{
    int64_t first = e * job->segments_per_expert;
    return job->segment_begin[first + job->segments_per_expert] - job->segment_begin[first];
}

/* Whether an expert's sum is one block of rows, which needs no scratch between. */
static int is_short(const moe__gemm_dw_job *job, int64_t e)
{
    return job->segments_per_expert == 1 && !job->carry && rows_of_expert(job, e) <= BLOCK_K;
}

static int64_t tiles_of(const moe__gemm_dw_job *job, int64_t e)
{
    int64_t m = is_short(job, e) ? WIDE_M : BLOCK_M, n = is_short(job, e) ? WIDE_N : BLOCK_N;
    return moe__max(1, blocks(job->k, m)) * blocks(job->n, n);
}

/* The bias of an expert is summed with the first row block of each column block of its matrix,
 * which is why a tile exists even for k = 0 or without dw. */
int64_t MOE_KERNEL(gemm_dw_plan)(moe__gemm_dw_job *job)
{
    job->tile_begin[0] = 0;
    for (int64_t e = 0; e < job->experts; e++) {
        bool wanted = matrix_of(&job->dw, e) || matrix_of(&job->dbias, e);
        bool work = wanted && (job->overwrite || rows_of_expert(job, e) > 0);
        job->tile_begin[e + 1] = job->tile_begin[e] + (work ? tiles_of(job, e) : 0);
    }
    return job->tile_begin[job->experts];
}

/* Rows i .. i+m-1 and columns j .. j+n-1 of one expert's gradient. */
typedef struct place {
    int64_t e, i, m, j, n;
} place;

/* All packed columns of a, panel by panel, times all packed panels of g. */
static void run_panels(tile_scratch *s, const place *at, int64_t k, int first, const sink *to)
{
    int64_t panels = blocks(at->m, TILE_M);
    micro_job job = {.k = k, .b_stride = TILE_N, .b_step = VEC_N, .from_stride = BLOCK_N};
    for (int64_t q = 0; q < panels; q++) {
        int64_t i = part(at->m, panels, q), m = part(at->m, panels, q + 1) - i;
        job.a = s->a + q * PANEL_A;
        for (int64_t l = 0; l < at->n; l += TILE_N) {
            job.b = s->b + l * BLOCK_K;
            job.ahead = no_ahead(job.b);
            MOE_KERNEL(run_piece)(s, &job, i, m, l, moe__min(TILE_N, at->n - l), first, to);
        }
    }
}

/* One chain over rows r .. r+count-1 of a[:,i..]^T g[:,j..], from +0 or from s->chain, to `to` or,
 * NULL, left in s->chain. */
static void dw_chain(const moe__gemm_dw_job *job, tile_scratch *s, const place *at, int64_t r,
                     int64_t count, int fresh, const sink *to)
{
    int64_t p = 0;
    do { /* once for no rows: the chains are +0 */
        int64_t k = moe__min(BLOCK_K, count - p);
        pack_a_columns(s, &job->a, r + p, k, at->i, at->m);
        MOE_KERNEL(pack_width)(s->b, TILE_N * BLOCK_K, &job->g, r + p, k, at->j, at->n);
        run_panels(s, at, k, fresh && p == 0, p + k == count ? to : NULL);
        p += BLOCK_K;
    } while (p < count);
}

/* The same for the bias: chain[n] = sum of rows r .. r+count-1 of g[:,j..], added in order. */
static void bias_chain(const moe__gemm_dw_job *job, tile_scratch *s, const place *at, int64_t r,
                       int64_t count, int fresh)
{
    if (fresh) memset(s->chain, 0, WIDE_N * sizeof *s->chain);
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
    int64_t first = at->e * job->segments_per_expert, m = at->m ? at->m : WIDE_N / BLOCK_N;
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
    for (int64_t i = 0; i < m; i++) MOE_KERNEL(store_line)(to, i, 0, s->sum + i * BLOCK_N, n);
}

/* Whether a gradient goes past the caches: it is all new, larger than they are, and aligned. */
static int can_stream(const moe__gemm_dw_job *job, const sink *to)
{
    enum { LARGE = 32 * 1024 * 1024 };
    int64_t size = (int64_t)sizeof(real), vector = VEC_N * size;
    uintptr_t all = (uintptr_t)to->out | (uintptr_t)((to->stride_row | to->panel_step) * size);
    return !to->add && all % (uintptr_t)vector == 0 && to->column % VEC_N == 0 &&
           job->experts * job->k * job->n >= LARGE / size;
}

void MOE_KERNEL(gemm_dw_tile)(const moe__gemm_dw_job *job, int64_t tile, void *scratch)
{
    tile_scratch *s = scratch;
    int64_t e = run_of(job->tile_begin, job->experts, tile);
    int64_t most_m = is_short(job, e) ? WIDE_M : BLOCK_M;
    int64_t most_n = is_short(job, e) ? WIDE_N : BLOCK_N;
    int64_t number = tile - job->tile_begin[e], columns = blocks(job->n, most_n);
    int64_t i = number / columns * most_m, j = number % columns * most_n;
    int64_t n = moe__min(most_n, job->n - j), rows = rows_of_expert(job, e);
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
    const place at = {e, i, moe__min(most_m, job->k - i), j, n};
    int64_t row = job->dw.stride_row;
    sink to = {.out = place_at(dw, i * row, job->dw.wide),
               .stride_row = row,
               .stride_col = job->dw.stride_col,
               .panel = job->dw.panel,
               .panel_step = job->dw.panel_step,
               .column = j,
               .add = !job->overwrite,
               .wide = job->dw.wide};
    to.stream = can_stream(job, &to);
    if (cut) {
        if (sum_on(job, s, &at)) store_sum(s, &to, at.m, n);
    } else if (job->segments_per_expert == 1 && rows <= SUM_ROWS) {
        dw_chain(job, s, &at, job->segment_begin[e], rows, 1, &to);
    } else {
        sum_segments(job, s, &at);
        store_sum(s, &to, at.m, n);
    }
    if (to.stream) v_fence();
}
