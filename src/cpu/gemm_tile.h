/* gemm_tile.h - what tiles of the grouped products share: scratch, and where results go. */
#ifndef MOE_CPU_GEMM_TILE_H
#define MOE_CPU_GEMM_TILE_H

#include "cpu/gemm_pack.h"
#include "cpu/kernels.h"

enum {
    PANELS = 8,
    BLOCK_M = TILE_M * PANELS,
    BLOCK_N = 256,
    BLOCK_K = 256,
    WIDE_PANELS = 364 / TILE_M, /* of dW over so few rows that nothing waits in scratch */
    WIDE_M = TILE_M * WIDE_PANELS,
    WIDE_N = 512,
    PANEL_A = TILE_M * BLOCK_K + GROUPS_M * VEC_N /* whole vectors spill over the end of a panel */
};

_Static_assert(BLOCK_N % TILE_N == 0 && WIDE_N % TILE_N == 0, "a tile is whole panels wide");

/* Scratch of a worker. */
typedef struct tile_scratch {
    real a[WIDE_PANELS * PANEL_A];
    union {
        real b[BLOCK_K * WIDE_N];
        struct { /* beside the b of a tile that is not wide */
            real narrow_b[BLOCK_K * BLOCK_N];
            real chain[BLOCK_M * BLOCK_N];   /* accumulators between two blocks of k */
            real segment[BLOCK_M * BLOCK_N]; /* dW over several blocks: the sum of a segment, */
            real sum[BLOCK_M * BLOCK_N];     /* of a matrix */
        };
    };
    real edge[TILE_M * TILE_N]; /* a piece of the result that is not stored as it is */
    real bias[TILE_N];
    int32_t ahead[BLOCK_K]; /* read_ahead */
} tile_scratch;

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
    int32_t stream; /* 1: what is not added to may go past the caches */
} sink;

/* from[n] to row `row` of the tile, from its column j on. */
void MOE_KERNEL(store_line)(const sink *to, int64_t row, int64_t j, const real *from, int64_t n);

/* Rows i .. i+m-1 of a tile, packed in job.a, times panel j .. j+n-1, job.b. The chains go on from
 * scratch (but for the first block of k) and back to it, or, at the last block, to the sink. */
void MOE_KERNEL(run_piece)(tile_scratch *s, micro_job *job, int64_t i, int64_t m, int64_t j,
                           int64_t n, int first, const sink *to);

#endif
