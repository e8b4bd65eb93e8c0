/* router_gemm.h - the products of the gate and of the layer's own coefficients.
 *
 *     rows:  out[r,:] (=|+=) a[r,:] b_p (+ bias_p)      for the rows r of each part p
 *     dw:    dw_p += sum over p's rows of a[r,:]^T g[r,:],  dbias_p += sum of g[r,:]
 *
 * Any mix of element types: an operand carries its dtype, elements are widened when they are read
 * and rounded once when they are stored, sums are of floats. Each element of a product of rows is
 * one chain of fused multiply-adds in ascending index of the summed dimension, as on the CPU; but
 * where cuBLAS takes it, and where n is at most MOE_NARROW (a warp for each row). A sum over rows
 * is of a fixed number of partial sums, in order. So the bits depend on the shape alone, and on
 * cuBLAS. */
#ifndef MOE_CUDA_ROUTER_GEMM_H
#define MOE_CUDA_ROUTER_GEMM_H

#include "route.h"

#define MOE_NARROW 4

/* Row r is data[(index ? index[r] : r) * stride + 0, 1, ...]. In device memory. */
struct moe_row_operand {
    const void *data;
    int64_t stride;
    const int64_t *index;
    int32_t dtype, reserved;
};

/* Rows of part p: begin[p * step] to begin[(p + 1) * step] - 1, read on the device; begin NULL: one
 * part of all rows. rows: at most so many in all, the bound of the launch. */
struct moe_row_ranges {
    int64_t rows, parts;
    const int64_t *begin;
    int64_t step;
};

struct moe_rows_product {
    moe_row_ranges ranges;
    int64_t k, n; /* a is [rows,k], b [parts][k,n] */
    moe_row_operand a;
    moe__matrices b;
    moe__matrices bias; /* [parts][n] by stride_col, or not there */
    void *out;          /* [rows,n] */
    int64_t out_stride;
    int32_t out_dtype;
    int32_t add; /* 1: out = out + result */
};

struct moe_dw_product {
    moe_row_ranges ranges;
    int64_t k, n; /* a is [rows,k], g [rows,n] */
    moe_row_operand a, g;
    moe__matrices dw;    /* [parts][k,n], or not there; added to */
    moe__matrices dbias; /* [parts][n] by stride_col, or not there; added to */
};

/* The same matrices with rows and columns exchanged. */
static inline moe__matrices moe_transposed(const moe__matrices *m)
{
    moe__matrices t = *m;
    t.stride_row = m->stride_col;
    t.stride_col = m->stride_row;
    return t;
}
static inline bool moe_is_there(const moe__matrices *m) { return m->base || m->each; }

/* What the gate's products read: x, or the jittered input, floats. */
template <typename T>
static inline moe_row_operand moe_gate_input(const moe__route_job *job, const int64_t *token_of_row)
{
    moe_row_operand x = {job->x, job->x_stride, token_of_row, moe_dtype_of<T>::value, 0};
    moe_row_operand jittered = {job->x_jittered, job->input_width, token_of_row, MOE_DTYPE_F32, 0};
    return job->x_jittered ? jittered : x;
}

moe_status moe__cuda_rows_product(const moe__workers *workers, const moe_rows_product *job);
/* Uses workers->scratch from its beginning: at most moe__cuda_dw_scratch bytes. */
moe_status moe__cuda_dw_product(const moe__workers *workers, const moe_dw_product *job);
int64_t moe__cuda_dw_scratch(int64_t parts, int64_t k, int64_t n);

#endif
