/* grouped_gemm.h - plain descriptions of the three grouped products; kernels.h has their functions.
 *
 *     rows:  out[r,:] (=|+=) (scale_r a[r,:]) b_e (+ bias_e)    for the rows r of each expert e
 *     dw:    dw_e (=|+=) sum over e's rows of a[r,:]^T g[r,:],  dbias_e (=|+=) sum of g[r,:]
 *
 * Strides count elements: the kernel's `element`, or its `real` where an operand is `wide`; they
 * are the same type in the f32 and f64 tables. dX is the first with the strides of the weights
 * exchanged. Each element of a product is one chain of fused multiply-adds from +0 in ascending
 * index of the summed dimension; docs/numerics.md has the rule for sums over rows. */
#ifndef MOE_CPU_GROUPED_GEMM_H
#define MOE_CPU_GROUPED_GEMM_H

#include <stddef.h>
#include <stdint.h>

/* Row r is data[(row_index ? row_index[r] : r) * stride + 0, 1, ...]; if there is a scale, each
 * element times scale[r], rounded. */
typedef struct moe__rows {
    const void *data;
    int64_t stride;
    const int64_t *row_index;
    const void *scale; /* reals */
    int32_t wide;      /* 1: that is what is computed with, rather than 16 bits */
    /* Of dW: element i is the activation of data's, times that of `second` if it is there, rounded
     * and not wide. second is as data; both dense. NULL: elements are data's. */
    const void *activation, *second;
} moe__rows;

/* Columns of a panel of packed weights, on every instruction set and for every dtype. */
enum { MOE__PANEL = 32 };

/* Element (e,i,j) is (each ? each[e] : base + e stride_expert)[offset + i stride_row + j
 * stride_col]. base and each both NULL: not there. each[e] may be NULL where it is written: not
 * wanted.
 *
 * In panels, matrix e is cut in groups of `panel` columns, and row i of a group is contiguous:
 *
 *     (i,j) at  base + e stride_expert + offset + (j / panel) panel_step + i MOE__PANEL + j % panel
 *
 * A matrix by itself has panel = MOE__PANEL; W1 and W3 of a gated expert have half of each panel:
 * panel = MOE__PANEL / 2, offset 0 and MOE__PANEL / 2. There stride_row is MOE__PANEL,
 * stride_col 1, panel_step rows * MOE__PANEL; what of the last panel is beyond the matrix is 0 and
 * stays 0. The transposed matrix, its strides exchanged, has the same panels, cut along its
 * rows. */
typedef struct moe__matrices {
    void *base;
    void *const *each;
    int64_t offset;
    int64_t stride_expert, stride_row, stride_col;
    int64_t panel, panel_step; /* 0, 0: not in panels */
    int32_t dtype;             /* MOE_DTYPE_* of its elements */
    int32_t wide;              /* 1: that is what is computed with, rather than 16 bits */
} moe__matrices;

typedef struct moe__gemm_rows_job {
    int64_t experts;
    const int64_t *expert_begin; /* [experts+1] */
    int64_t k, n;                /* a is [rows,k], b [k,n] */
    moe__rows a;
    moe__matrices b;
    moe__matrices bias; /* [n] by stride_col, or not there; added after the chain */
    void *out;          /* [rows,n] */
    int64_t out_stride;
    const int64_t *out_index; /* row r goes to row out_index[r] of out; NULL: to row r */
    int32_t out_add;          /* 1: out = out + result */
    int32_t out_wide;
    int64_t *tile_begin; /* [experts+1] of the caller */
} moe__gemm_rows_job;

/* Sums over rows that wait for more rows: what a tile has of the chain it is in, and of the chains
 * that have ended, of [k,n] and of [n]. */
typedef struct moe__dw_sums {
    void *chain, *ended, *bias_chain, *bias_ended;
} moe__dw_sums;

/* Sums that are computed in several calls. An expert may be the last of one call while another is
 * its first, so they come from one place and go to another. */
typedef struct moe__dw_carry {
    moe__dw_sums from, to;
    int64_t before; /* rows of the first expert with rows that earlier calls have had */
    int64_t after;  /* rows of the last one that later calls have */
} moe__dw_carry;

/* Expert e sums segments e * segments_per_expert and on; segment s is the rows segment_begin[s] to
 * segment_begin[s+1] - 1. */
typedef struct moe__gemm_dw_job {
    int64_t experts;
    const int64_t *segment_begin;
    int64_t segments_per_expert;
    int64_t k, n; /* a is [rows,k], g [rows,n] */
    moe__rows a, g;
    moe__matrices dw;    /* [k,n], or not there */
    moe__matrices dbias; /* [n] by stride_col, or not there */
    int32_t overwrite;   /* 1: set, 0 where an expert has no rows; 0: add, and leave those alone */
    const moe__dw_carry *carry; /* with one segment and without overwrite; NULL: all rows are here.
                                   The sum of an expert is written by the call with its last row */
    int64_t *tile_begin;        /* [experts+1] of the caller */
} moe__gemm_dw_job;

#endif
