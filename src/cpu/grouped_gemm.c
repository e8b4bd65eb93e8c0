/* grouped_gemm.c - rows times the weights of their experts: forward and dX.
 *
 *     out[R,n] = a[R,k] b[k,n] + bias
 *
 * A tile is up to BLOCK_M rows by BLOCK_N columns of one expert's result. The summed dimension is
 * cut in blocks of BLOCK_K: the left operand is packed in panels [BLOCK_K][up to TILE_M], the right
 * one is, or is packed as, a panel [BLOCK_K][TILE_N], and a micro-kernel keeps a piece of the
 * result in registers. Between two blocks the accumulators wait in scratch, exactly, so that every
 * element is one chain of fused multiply-adds from +0 in ascending index, whatever the tile.
 *
 * Everything between packing and the finished result is `real`: packing widens elements of 16 bits,
 * and what stores a result rounds it once. */
#include "cpu/gemm_tile.h"

enum { IN_PLACE_M = 4 }; /* up to so many rows b is not worth packing */

size_t MOE_KERNEL(gemm_scratch)(void) { return sizeof(tile_scratch); }

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

/* A block of k for panel j .. j+n-1 of a tile: all its packed rows. What is fetched ahead is
 * fetched with the first of them. */
static void run_panel(tile_scratch *s, micro_job *job, int64_t m, int64_t j, int64_t n, int first,
                      const sink *to)
{
    int64_t panels = blocks(m, TILE_M);
    for (int64_t q = 0; q < panels; q++) {
        int64_t i = part(m, panels, q);
        job->a = s->a + q * PANEL_A;
        MOE_KERNEL(run_piece)(s, job, i, part(m, panels, q + 1) - i, j, n, first, to);
        job->ahead = no_ahead(job->b);
    }
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

/* Two lines of each of k rows, or in turn the pairs of lines of columns, from `at` on. */
static read_ahead ahead_of(tile_scratch *s, const char *at, int64_t k, int64_t row, int64_t col,
                           int by_columns)
{
    if (k * moe__max(row, col) > INT32_MAX) return no_ahead(s->b);
    for (int64_t p = 0; p < k; p++)
        s->ahead[p] = (int32_t)(by_columns ? p / 8 * col + p % 8 * 128 : p * row);
    return (read_ahead){.at = at, .too = at + 64, .offset = s->ahead, .next = 1};
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
    micro_job job = {
        .k = k,
        .b = s->b,
        .b_stride = TILE_N,
        .b_step = VEC_N,
        .from_stride = BLOCK_N,
    };
    if (WIDE(m->wide) && m->stride_col == 1 && in_panel &&
        (m->panel || (rows <= IN_PLACE_M && n == TILE_N))) {
        job.b = place_at(b, element_of(m, p, j), m->wide);
        job.b_stride = m->stride_row;
        if (!m->panel) next = (const char *)job.b + 16 * row;
    } else {
        MOE_KERNEL(pack_columns)(s->b, TILE_N, TILE_N, m, b, p, k, j, n);
    }
    job.ahead = ahead_of(s, next, k, row, col, by_columns);
    return job;
}

void MOE_KERNEL(gemm_rows_tile)(const moe__gemm_rows_job *job, int64_t tile, void *scratch)
{
    tile_scratch *s = scratch;
    int64_t e = run_of(job->tile_begin, job->experts, tile);
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
            run_panel(s, &work, m, l, width, p == 0, p + k == job->k ? &out : NULL);
        }
        p += BLOCK_K;
    } while (p < job->k);
}
