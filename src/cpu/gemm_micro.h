/* gemm_micro.h - the kernels at the bottom of every product on the CPU.
 *
 *     right:  out[m,TILE_N] (=|+=) chain over p of a[p,m] b[p,TILE_N]     vectors lie across b
 *     left:   out[TILE_M,lanes] = chain over p of w[TILE_M,p] b[p,lanes]  vectors lie across rows
 *     few:    out[m,n] goes on over FEW_K rows of b[p,n], which are read in order, once
 *
 * A chain is one fused multiply-add after the other in ascending p, from +0 or from where an
 * earlier block of p stopped. The first two keep TILE_M x TILE_V vectors of accumulators in
 * registers; those of the third wait in `out`, as memory is slower than the first cache. */
#ifndef MOE_CPU_GEMM_MICRO_H
#define MOE_CPU_GEMM_MICRO_H

#include "cpu/grouped_gemm.h"
#include "cpu/simd.h"

enum {
    TILE_N = TILE_V * VEC_N,
    GROUPS_M = (TILE_M + VEC_N - 1) / VEC_N, /* vectors that cover the TILE_M of a line of a */
    HALF_PANEL = MOE__PANEL / 2
};

_Static_assert(MOE__PANEL % TILE_N == 0 && HALF_PANEL % VEC_N == 0, "panels hold whole tiles");

/* Lines that are wanted soon: at step p, those offset[p next] bytes from two places on. */
typedef struct read_ahead {
    const char *at, *too;
    const int32_t *offset;
    int32_t next; /* 1; 0: the same at every step */
} read_ahead;

/* Nothing: the line at `there`, again and again. */
static inline read_ahead no_ahead(const void *there)
{
    static const int32_t zero;
    return (read_ahead){.at = there, .too = there, .offset = &zero};
}

/* How results are stored: in place of, or added to, what is there; or past the caches, vectors
 * aligned and a v_fence after the last. */
enum { MICRO_SET, MICRO_ADD, MICRO_STREAM };

typedef struct micro_job {
    int64_t k;
    const real *a; /* [k][m] */
    const real *b; /* row p at b + p b_stride, its vectors b_step apart */
    int64_t b_stride, b_step;
    const real *from[TILE_V]; /* as out, from_stride apart; NULL: +0 */
    int64_t from_stride;
    real *out[TILE_V]; /* vector v of row i goes to out[v] + i out_stride */
    int64_t out_stride;
    const real *bias; /* [TILE_N], added after the chain; or NULL */
    int32_t store;    /* MICRO_* */
    read_ahead ahead;
} micro_job;

/* m from 1 to TILE_M rows. */
void MOE_KERNEL(micro_right)(int64_t m, const micro_job *job);

typedef struct left_job {
    int64_t groups, width; /* p = group * width + column */
    const real *w;         /* (i,p) at w + group * w_step + i * MOE__PANEL + column */
    int64_t w_step;
    const real *b; /* [groups * width][TILE_N] */
    real *chain;   /* [TILE_M][TILE_N]: where chains go on from and to */
    int32_t fresh; /* 1: they begin */
    read_ahead ahead;
    int64_t ahead_group; /* `at` moves on by so many bytes with each group */
} left_job;

/* The first `vectors` of the lanes, 1 to TILE_V. */
void MOE_KERNEL(micro_left)(int64_t vectors, const left_job *job);

enum { FEW_M = 4, FEW_K = 8 }; /* rows of a and of b that one call takes */

/* Rows that are fetched while as many of b are read. */
typedef struct few_ahead {
    const real *at;
    int64_t stride;
} few_ahead;

typedef struct few_job {
    int64_t m, k, n; /* 1 to FEW_M; 1 to FEW_K; any */
    const real *a;   /* [k][m] */
    const real *b;   /* row p at b + p b_stride, contiguous */
    int64_t b_stride;
    real *out; /* row i at out + i out_stride */
    int64_t out_stride;
    int32_t fresh; /* 1: chains begin */
    few_ahead ahead;
} few_job;

void MOE_KERNEL(micro_few)(const few_job *job);

#endif
