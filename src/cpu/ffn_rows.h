/* ffn_rows.h - an expert's whole network on a block of its rows, which stays in the cache between
 * the products. ffn_blocks.c cuts rows in blocks, ffn_rows.c has the forward of one,
 * ffn_rows_backward.c the backward. */
#ifndef MOE_CPU_FFN_ROWS_H
#define MOE_CPU_FFN_ROWS_H

#include "cpu/activation.h"
#include "cpu/gemm_pack.h"
#include "cpu/kernels.h"

enum {
    GROUP = 128, /* hidden columns between a product and its activation */
    LANES = TILE_N,
    BLOCK_BYTES = 1200 * 1024, /* of packed rows: what stays in the second cache of most machines */
    SPILL = GROUPS_M * VEC_N   /* numbers that whole vectors may write too much */
};

/* Rows of a block, and numbers of reals: where its scratch is cut, and all of it. rows 0: such
 * networks are not computed by blocks. */
typedef struct ffn_block {
    int64_t rows;
    int64_t first, second, third;         /* packed rows, left operands or lanes */
    int64_t panel, chain, line, line3, h; /* weights, and what the products write */
    int64_t ahead;                        /* integers: 0 at first, and the offsets of read_ahead */
    int64_t reals;
} ffn_block;

ffn_block MOE_KERNEL(ffn_block_forward)(int64_t d_model, int64_t d_hidden);
ffn_block MOE_KERNEL(ffn_block_backward)(int64_t d_hidden, int64_t d_out, bool gated);

/* A piece of a block's scratch, of whole cache lines. */
static inline int64_t take(int64_t *reals, int64_t count)
{
    int64_t at = *reals;
    *reals += (count + 15) & ~(int64_t)15;
    return at;
}

/* Blocks of rows on the context's threads. */
typedef struct ffn_run {
    moe__experts_job *job;
    ffn_block block;
    activation act;
    moe__rows in; /* x forward, dz backward */
    const void *hidden_scale;
    void (*body)(const struct ffn_run *run, int64_t e, int64_t next, int64_t r, int64_t m,
                 real *scratch);
    int64_t count, used; /* blocks, and experts with rows */
    _Atomic int64_t next;
} ffn_run;

/* Whether the rows are worth it and there is scratch: then the blocks are planned. */
bool MOE_KERNEL(ffn_run_begin)(ffn_run *run);
moe_status MOE_KERNEL(ffn_run_all)(ffn_run *run);

/* z1, z3 (where they are kept) and out of all rows. */
void MOE_KERNEL(ffn_rows_forward)(const ffn_run *run, int64_t e, int64_t next, int64_t r, int64_t m,
                                  real *scratch);
/* From dz [R,O]: h, dz1 (in dh), dz3 and, if wanted, dx_rows of all rows. */
void MOE_KERNEL(ffn_rows_backward)(const ffn_run *run, int64_t e, int64_t next, int64_t r,
                                   int64_t m, real *scratch);

#endif
