/* gemm_tile.c - pieces of tiles, from packed operands to where the result goes. */
#include "cpu/gemm_tile.h"

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

void MOE_KERNEL(store_line)(const sink *to, int64_t row, int64_t j, const real *from, int64_t n)
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
    for (int64_t l = 0; l < m; l++) MOE_KERNEL(store_line)
    (to, to->index ? to->index[i + l] : i + l, j, s->edge + l * TILE_N, n);
}

/* Whether vectors of registers can be stored where they go. */
static int is_direct(const sink *to, int64_t n)
{
    return WIDE(to->wide) && n == TILE_N && to->stride_col == 1 && !to->index &&
           to->panel % VEC_N == 0;
}

void MOE_KERNEL(run_piece)(tile_scratch *s, micro_job *job, int64_t i, int64_t m, int64_t j,
                           int64_t n, int first, const sink *to)
{
    real *chain = s->chain + i * BLOCK_N + j, *plain = to ? s->edge : chain;
    int direct = to && is_direct(to, n);
    job->bias = NULL;
    if (to && to->bias) {
        for (int64_t l = 0; l < TILE_N; l++)
            s->bias[l] = l < n ? get_at(to->bias, (j + l) * to->bias_step, to->bias_wide) : R(0.0);
        job->bias = s->bias;
    }
    for (int v = 0; v < TILE_V; v++) {
        job->from[v] = first ? NULL : chain + v * VEC_N;
        job->out[v] = direct ? sink_at(to, i, j + v * VEC_N) : plain + v * VEC_N;
    }
    job->out_stride = direct ? to->stride_row : to ? TILE_N : BLOCK_N;
    job->store = !direct ? MICRO_SET : to->add ? MICRO_ADD : to->stream ? MICRO_STREAM : MICRO_SET;
    MOE_KERNEL(micro_right)(m, job);
    if (to && !direct) store_edge(s, to, i, m, j, n);
}
