/* mix.c - the layer's own coefficients of a token, and their gradients.
 *
 *     width 1:  s = sigmoid(x w)               of the shared part
 *     width 2:  c = softmax(x W + b)           of routed and residual part
 *
 * x [T,D] and W [D,width] are elements, coefficients and weights are reals. The weights of a plan's
 * entries are multiplied by them. */
#include "cpu/kernels.h"
#include "cpu/route.h"
#include "cpu/tiles.h"

/* weight_out = coefficient weight_in */
static void weigh_entries(const moe__mix_job *job, int64_t i, int64_t t, real coefficient)
{
    const moe__plan_arrays *p = job->plan[i];
    const real *in = job->weight_in[i];
    real *out = job->weight_out[i];
    for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++)
        out[n] = in ? coefficient * in[n] : coefficient;
}

static void coefficients_range(void *argument, int64_t begin, int64_t end)
{
    const moe__mix_job *job = argument;
    for (int64_t t = begin; t < end; t++) {
        real *c = (real *)job->coefficient + t * job->width;
        if (is_masked(job->token_mask, t))
            for (int64_t i = 0; i < job->width; i++) c[i] = R(0.0);
        else if (job->width == 1)
            c[0] = r_sigmoid(c[0]);
        else
            softmax(c, c, job->width);
        for (int64_t i = 0; i < job->width; i++) weigh_entries(job, i, t, c[i]);
    }
}

moe_status MOE_KERNEL(mix_forward)(moe__mix_job *job)
{
    int64_t rows[2] = {0, job->tokens};
    moe__gemm_rows_job gemm = {.experts = 1,
                               .expert_begin = rows,
                               .k = job->input_width,
                               .n = job->width,
                               .a = {.data = job->x, .stride = job->x_stride},
                               .b = job->weight_matrix,
                               .bias = job->bias,
                               .out = job->coefficient,
                               .out_wide = 1,
                               .out_stride = job->width,
                               .tile_begin = job->tile_begin};
    MOE_TRY(run_gemm_rows(&job->workers, &gemm));
    return moe__parallel_range(job->workers.context, job->tokens, 256, coefficients_range, job,
                               job->workers.function);
}

/* out_n = c in_n:  dc = sum_n in_n dout_n,  din_n = c dout_n. */
static real entries_backward(const moe__mix_job *job, int64_t i, int64_t t, real coefficient)
{
    const moe__plan_arrays *p = job->plan[i];
    const real *in = job->weight_in[i];
    real *grad = job->entry_grad[i], sum = R(0.0);
    for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++) {
        if (p->row_of_entry[n] < 0) continue; /* its gradient is 0 */
        sum = in ? r_fma(in[n], grad[n], sum) : sum + grad[n];
        grad[n] = coefficient * grad[n];
    }
    return sum;
}

/* sigmoid: dz = ds s (1 - s);  softmax: dz_i = c_i (dc_i - sum_j c_j dc_j). */
static void coefficients_backward_range(void *argument, int64_t begin, int64_t end)
{
    const moe__mix_job *job = argument;
    for (int64_t t = begin; t < end; t++) {
        const real *c = (const real *)job->coefficient + t * job->width;
        real *d = (real *)job->d_coefficient + t * job->width;
        for (int64_t i = 0; i < job->width; i++) d[i] = entries_backward(job, i, t, c[i]);
        if (job->width == 1) {
            d[0] = d[0] * (c[0] * (R(1.0) - c[0]));
            continue;
        }
        real dot = lane_dot(c, d, job->width);
        for (int64_t i = 0; i < job->width; i++) d[i] = c[i] * (d[i] - dot);
    }
}

moe_status MOE_KERNEL(mix_backward)(moe__mix_job *job)
{
    int64_t rows[2] = {0, job->tokens};
    MOE_TRY(moe__parallel_range(job->workers.context, job->tokens, 256, coefficients_backward_range,
                                job, job->workers.function));
    if (job->dx) {
        moe__gemm_rows_job gemm = {
            .experts = 1,
            .expert_begin = rows,
            .k = job->width,
            .n = job->input_width,
            .a = {.data = job->d_coefficient, .stride = job->width, .wide = 1},
            .b = job->weight_matrix,
            .out = job->dx,
            .out_stride = job->dx_stride,
            .out_add = 1,
            .tile_begin = job->tile_begin};
        gemm.b.stride_row = job->weight_matrix.stride_col;
        gemm.b.stride_col = job->weight_matrix.stride_row;
        MOE_TRY(run_gemm_rows(&job->workers, &gemm));
    }
    if (!has(&job->d_weight_matrix) && !has(&job->d_bias)) return MOE_OK;
    moe__gemm_dw_job gemm = {
        .experts = 1,
        .segment_begin = job->valid_begin,
        .segments_per_expert = job->groups,
        .k = job->input_width,
        .n = job->width,
        .a = {.data = job->x, .stride = job->x_stride, .row_index = job->valid_token},
        .g = {.data = job->d_coefficient,
              .stride = job->width,
              .row_index = job->valid_token,
              .wide = 1},
        .dw = job->d_weight_matrix,
        .dbias = job->d_bias,
        .tile_begin = job->tile_begin};
    return run_gemm_dw(&job->workers, &gemm);
}
