/* grouped_gemm.c - one blocked product over all experts of a plan: forward, dX and dW.
 *
 * A tile is up to BLOCK_M rows by BLOCK_N columns of one expert's result. It is computed in scratch, k
 * block by k block: a panels [k][TILE_M] and b panels [k][NR] are packed, and a micro-kernel of TILE_M x
 * NR accumulators runs over them. Accumulators of a later k block begin with what the earlier one
 * stored, so that every element is one chain of fused multiply-adds in ascending k from +0, whatever
 * the tile shape; only whole chains leave the scratch. For dW the summed dimension is rows, in blocks
 * of SUM_ROWS from the start of a segment: block sums are added in order, then segments. */
#include "cpu/kernels.h"
#include "cpu/simd.h"

#include <string.h>

enum {
    NR = TILE_V * VEC_N,
    PANELS_M = 8,
    BLOCK_M = TILE_M * PANELS_M, /* rows of a tile */
    BLOCK_N = 256 / NR * NR,     /* columns of a tile */
    BLOCK_K = 256,
    SUM_ROWS = 4096
};

/* Scratch of a worker. */
typedef struct tile_scratch {
    real a[BLOCK_M * BLOCK_K]; /* packed a: [panel][k][TILE_M] */
    real b[BLOCK_K * NR];      /* one packed panel of b: [k][NR] */
    real c[BLOCK_M * BLOCK_N]; /* the chains */
    real sum[BLOCK_M * BLOCK_N]; /* dW: sums of blocks and segments */
    real segment[BLOCK_M * BLOCK_N];
} tile_scratch;

size_t MOE_KERNEL(gemm_scratch)(void) { return sizeof(tile_scratch); }

/* ---- micro-kernel --------------------------------------------------------------------------------- */

/* c[m,NR] = chain over p of a[p,m] b[p,NR], continued from c. m is a constant at every call, so that
 * the loops unroll and acc lives in registers. */
static inline __attribute__((always_inline)) void micro(int m, int64_t k, const real *a, const real *b,
                                                        real *c, int64_t c_stride)
{
    vec acc[TILE_M][TILE_V];
    for (int i = 0; i < m; i++)
        for (int v = 0; v < TILE_V; v++) acc[i][v] = v_load(c + i * c_stride + v * VEC_N);
    for (int64_t p = 0; p < k; p++) {
        vec row[TILE_V];
        for (int v = 0; v < TILE_V; v++) row[v] = v_load(b + p * NR + v * VEC_N);
#pragma GCC unroll 16
        for (int i = 0; i < m; i++) {
            vec x = v_set1(a[p * TILE_M + i]);
            for (int v = 0; v < TILE_V; v++) acc[i][v] = v_fma(x, row[v], acc[i][v]);
        }
    }
    for (int i = 0; i < m; i++)
        for (int v = 0; v < TILE_V; v++) v_store(c + i * c_stride + v * VEC_N, acc[i][v]);
}

/* Few rows take a smaller kernel; c has room for all rows of the one that is taken. */
static void micro_rows(int64_t m, int64_t k, const real *a, const real *b, real *c, int64_t c_stride)
{
#if defined(__AVX512F__)
    if (m > 8) {
        micro(14, k, a, b, c, c_stride);
        return;
    }
    if (m > 4) {
        micro(8, k, a, b, c, c_stride);
        return;
    }
#elif defined(__aarch64__) && defined(__ARM_NEON)
    if (m > 4) {
        micro(8, k, a, b, c, c_stride);
        return;
    }
#elif defined(__AVX2__) && defined(__FMA__)
    if (m > 4) {
        micro(6, k, a, b, c, c_stride);
        return;
    }
#endif
    if (m > 2)
        micro(4, k, a, b, c, c_stride);
    else if (m == 2)
        micro(2, k, a, b, c, c_stride);
    else
        micro(1, k, a, b, c, c_stride);
}

/* ---- packing -------------------------------------------------------------------------------------- */

static const real *row_of(const moe__rows *rows, int64_t r)
{
    return (const real *)rows->data + (rows->row_index ? rows->row_index[r] : r) * rows->stride;
}

static real scale_of(const moe__rows *rows, int64_t r) { return ((const real *)rows->scale)[r]; }

/* Rows r .. r+m-1, columns p .. p+k-1, as panels [panel][k][TILE_M]; missing rows of a panel are 0. */
static void pack_a_rows(real *to, const moe__rows *a, int64_t r, int64_t m, int64_t p, int64_t k)
{
    for (int64_t i = 0; i < m; i++) {
        const real *from = row_of(a, r + i) + p;
        real *panel = to + i / TILE_M * TILE_M * BLOCK_K + i % TILE_M;
        if (a->scale) {
            real scale = scale_of(a, r + i);
            for (int64_t j = 0; j < k; j++) panel[j * TILE_M] = from[j] * scale;
        } else {
            for (int64_t j = 0; j < k; j++) panel[j * TILE_M] = from[j];
        }
    }
    for (int64_t i = m; i % TILE_M != 0; i++) {
        real *panel = to + i / TILE_M * TILE_M * BLOCK_K + i % TILE_M;
        for (int64_t j = 0; j < k; j++) panel[j * TILE_M] = R(0.0);
    }
}

/* The same transposed: columns i .. i+m-1 of rows r .. r+k-1 become panel rows. */
static void pack_a_columns(real *to, const moe__rows *a, int64_t r, int64_t k, int64_t i, int64_t m)
{
    for (int64_t j = 0; j < k; j++) {
        const real *from = row_of(a, r + j) + i;
        real scale = a->scale ? scale_of(a, r + j) : R(1.0);
        for (int64_t first = 0; first < m; first += TILE_M) {
            real *panel = to + first * BLOCK_K + j * TILE_M;
            int64_t width = moe__min(TILE_M, m - first);
            for (int64_t l = 0; l < width; l++)
                panel[l] = a->scale ? from[first + l] * scale : from[first + l];
            for (int64_t l = width; l < TILE_M; l++) panel[l] = R(0.0);
        }
    }
}

/* b[p .. p+k-1, j .. j+n-1] as one panel [k][NR], columns beyond n are 0. */
static void pack_b(real *to, const real *b, int64_t stride_row, int64_t stride_col, int64_t k,
                   int64_t n)
{
    if (n < NR) memset(to, 0, (size_t)(k * NR) * sizeof *to);
    if (stride_col == 1 && n == NR) {
        for (int64_t p = 0; p < k; p++)
            for (int v = 0; v < TILE_V; v++)
                v_store(to + p * NR + v * VEC_N, v_load(b + p * stride_row + v * VEC_N));
    } else if (stride_row == 1) { /* read along k, a few columns at a time */
        for (int64_t j = 0; j < n; j++)
            for (int64_t p = 0; p < k; p++) to[p * NR + j] = b[j * stride_col + p];
    } else {
        for (int64_t p = 0; p < k; p++)
            for (int64_t j = 0; j < n; j++) to[p * NR + j] = b[p * stride_row + j * stride_col];
    }
}

/* Rows r .. r+k-1 of g, columns j .. j+n-1, as a panel of b. */
static void pack_g(real *to, const moe__rows *g, int64_t r, int64_t k, int64_t j, int64_t n)
{
    if (n < NR) memset(to, 0, (size_t)(k * NR) * sizeof *to);
    for (int64_t p = 0; p < k; p++) {
        const real *from = row_of(g, r + p) + j;
        if (g->scale) {
            real scale = scale_of(g, r + p);
            for (int64_t i = 0; i < n; i++) to[p * NR + i] = from[i] * scale;
        } else {
            for (int64_t i = 0; i < n; i++) to[p * NR + i] = from[i];
        }
    }
}

/* One packed k block: c[m,n] continues its chains with a panels and the panel of b at column j. */
static void run_panels(tile_scratch *s, int64_t m, int64_t k, int64_t j)
{
    for (int64_t i = 0; i < m; i += TILE_M)
        micro_rows(moe__min(TILE_M, m - i), k, s->a + i * BLOCK_K, s->b, s->c + i * BLOCK_N + j,
                   BLOCK_N);
}

static void clear_chains(tile_scratch *s, int64_t m)
{
    int64_t rows = (m + TILE_M - 1) / TILE_M * TILE_M;
    memset(s->c, 0, (size_t)(rows * BLOCK_N) * sizeof *s->c);
}

/* ---- tiles ---------------------------------------------------------------------------------------- */

static int64_t blocks(int64_t n, int64_t block) { return n / block + (n % block != 0); }

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

static real *matrix_of(const moe__matrices *m, int64_t e)
{
    real *base = m->each ? m->each[e] : m->base ? (real *)m->base + e * m->stride_expert : NULL;
    return base ? base + m->offset : NULL;
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

/* Chains to out: bias, then set or add. */
static void store_rows(const moe__gemm_rows_job *job, const tile_scratch *s, int64_t e, int64_t r,
                       int64_t m, int64_t j, int64_t n)
{
    const real *bias = matrix_of(&job->bias, e);
    int64_t step = job->bias.stride_col;
    for (int64_t i = 0; i < m; i++) {
        real *out = (real *)job->out + (r + i) * job->out_stride + j;
        const real *c = s->c + i * BLOCK_N;
        if (job->out_add)
            for (int64_t l = 0; l < n; l++) out[l] = out[l] + (bias ? c[l] + bias[(j + l) * step] : c[l]);
        else if (bias)
            for (int64_t l = 0; l < n; l++) out[l] = c[l] + bias[(j + l) * step];
        else
            memcpy(out, c, (size_t)n * sizeof *out);
    }
}

void MOE_KERNEL(gemm_rows_tile)(const moe__gemm_rows_job *job, int64_t tile, void *scratch)
{
    tile_scratch *s = scratch;
    int64_t e = expert_of_tile(job->tile_begin, job->experts, tile);
    int64_t place = tile - job->tile_begin[e], columns = blocks(job->n, BLOCK_N);
    int64_t r = job->expert_begin[e] + place / columns * BLOCK_M, j = place % columns * BLOCK_N;
    int64_t m = moe__min(BLOCK_M, job->expert_begin[e + 1] - r), n = moe__min(BLOCK_N, job->n - j);
    const real *b = matrix_of(&job->b, e);
    int64_t row = job->b.stride_row, col = job->b.stride_col;
    clear_chains(s, m);
    for (int64_t p = 0; p < job->k; p += BLOCK_K) {
        int64_t k = moe__min(BLOCK_K, job->k - p);
        pack_a_rows(s->a, &job->a, r, m, p, k);
        for (int64_t l = 0; l < n; l += NR) {
            pack_b(s->b, b + p * row + (j + l) * col, row, col, k, moe__min(NR, n - l));
            run_panels(s, m, k, l);
        }
    }
    store_rows(job, s, e, r, m, j, n);
}

/* ---- dW ------------------------------------------------------------------------------------------- */

static int64_t rows_of_expert(const moe__gemm_dw_job *job, int64_t e)
{
    int64_t first = e * job->segments_per_expert;
    return job->segment_begin[first + job->segments_per_expert] - job->segment_begin[first];
}

/* The bias of an expert is summed with the first row block of each column block of its matrix, which is
 * why a tile exists even for k = 0 or without dw. */
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

/* c[m,n] = one chain over rows r .. r+count-1 of a[:,i..]^T g[:,j..]. */
static void dw_chain(const moe__gemm_dw_job *job, tile_scratch *s, int64_t r, int64_t count, int64_t i,
                     int64_t m, int64_t j, int64_t n)
{
    clear_chains(s, m);
    for (int64_t p = 0; p < count; p += BLOCK_K) {
        int64_t k = moe__min(BLOCK_K, count - p);
        pack_a_columns(s->a, &job->a, r + p, k, i, m);
        for (int64_t l = 0; l < n; l += NR) {
            pack_g(s->b, &job->g, r + p, k, j + l, moe__min(NR, n - l));
            run_panels(s, m, k, l);
        }
    }
}

static void add_tile(real *to, const real *from, int64_t m, int first)
{
    if (first)
        memcpy(to, from, (size_t)(m * BLOCK_N) * sizeof *to);
    else
        for (int64_t i = 0; i < m * BLOCK_N; i++) to[i] = to[i] + from[i];
}

/* sum[m,n] over all segments of expert e, each over its blocks of SUM_ROWS rows. */
static void dw_sum(const moe__gemm_dw_job *job, tile_scratch *s, int64_t e, int64_t i, int64_t m,
                   int64_t j, int64_t n)
{
    int64_t first = e * job->segments_per_expert;
    memset(s->sum, 0, (size_t)(m * BLOCK_N) * sizeof *s->sum);
    for (int64_t g = 0, any = 0; g < job->segments_per_expert; g++) {
        int64_t begin = job->segment_begin[first + g], end = job->segment_begin[first + g + 1];
        for (int64_t r = begin; r < end; r += SUM_ROWS) {
            dw_chain(job, s, r, moe__min(SUM_ROWS, end - r), i, m, j, n);
            add_tile(s->segment, s->c, m, r == begin);
        }
        if (end > begin) add_tile(s->sum, s->segment, m, !any++);
    }
}

/* sum[0,n] of the columns of g, by the same rule with plain additions. */
static void bias_sum(const moe__gemm_dw_job *job, tile_scratch *s, int64_t e, int64_t j, int64_t n)
{
    int64_t first = e * job->segments_per_expert;
    memset(s->sum, 0, BLOCK_N * sizeof *s->sum);
    for (int64_t g = 0, any = 0; g < job->segments_per_expert; g++) {
        int64_t begin = job->segment_begin[first + g], end = job->segment_begin[first + g + 1];
        for (int64_t r = begin; r < end; r += SUM_ROWS) {
            memset(s->c, 0, BLOCK_N * sizeof *s->c);
            for (int64_t p = r; p < moe__min(r + SUM_ROWS, end); p++) {
                const real *row = row_of(&job->g, p) + j;
                real scale = job->g.scale ? scale_of(&job->g, p) : R(1.0);
                for (int64_t l = 0; l < n; l++)
                    s->c[l] = s->c[l] + (job->g.scale ? row[l] * scale : row[l]);
            }
            add_tile(s->segment, s->c, 1, r == begin);
        }
        if (end > begin) add_tile(s->sum, s->segment, 1, !any++);
    }
}

static void store_gradient(real *to, int64_t row, int64_t col, const real *sum, int64_t m, int64_t n,
                           int32_t overwrite)
{
    for (int64_t i = 0; i < m; i++) {
        real *out = to + i * row;
        const real *from = sum + i * BLOCK_N;
        if (col == 1 && overwrite)
            memcpy(out, from, (size_t)n * sizeof *out);
        else if (col == 1)
            for (int64_t l = 0; l < n; l++) out[l] = out[l] + from[l];
        else
            for (int64_t l = 0; l < n; l++)
                out[l * col] = overwrite ? from[l] : out[l * col] + from[l];
    }
}

void MOE_KERNEL(gemm_dw_tile)(const moe__gemm_dw_job *job, int64_t tile, void *scratch)
{
    tile_scratch *s = scratch;
    int64_t e = expert_of_tile(job->tile_begin, job->experts, tile);
    int64_t place = tile - job->tile_begin[e], columns = blocks(job->n, BLOCK_N);
    int64_t i = place / columns * BLOCK_M, j = place % columns * BLOCK_N;
    int64_t m = moe__min(BLOCK_M, job->k - i), n = moe__min(BLOCK_N, job->n - j);
    real *dw = matrix_of(&job->dw, e), *dbias = matrix_of(&job->dbias, e);
    if (dbias && i == 0) {
        bias_sum(job, s, e, j, n);
        store_gradient(dbias + j * job->dbias.stride_col, 0, job->dbias.stride_col, s->sum, 1, n,
                       job->overwrite);
    }
    if (!dw || m <= 0) return;
    dw_sum(job, s, e, i, m, j, n);
    store_gradient(dw + i * job->dw.stride_row + j * job->dw.stride_col, job->dw.stride_row,
                   job->dw.stride_col, s->sum, m, n, job->overwrite);
}
