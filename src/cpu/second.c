/* second.c - the secondary gates of a hierarchical gate over rows of several ranks: the products of
 * route.c and gate_backward.c, with the same chains, where the parameters are.
 *
 *     logits[r] = x W_i,  noise_raw[r] = x Wnoise_i       for the rows r of group i
 *     dx[r] = d W_i^T + d_noise Wnoise_i^T,  dW_i += x^T d  source by source */
#include "cpu/kernels.h"
#include "cpu/tiles.h"

static moe_status product(const moe__second_job *job, const moe__matrices *w, void *out)
{
    moe__gemm_rows_job gemm = {
        .experts = job->parts,
        .expert_begin = job->part_begin,
        .k = job->input_width,
        .n = job->width,
        .a = {.data = job->x, .stride = job->x_stride, .row_index = job->index, .wide = job->x_wide},
        .b = *w,
        .out = out,
        .out_wide = 1,
        .out_stride = job->width,
        .tile_begin = job->tile_begin};
    return run_gemm_rows(&job->workers, &gemm);
}

moe_status MOE_KERNEL(second_forward)(moe__second_job *job)
{
    MOE_TRY(product(job, &job->weight_matrix, job->logits));
    return job->noise_raw ? product(job, &job->noise_weight, job->noise_raw) : MOE_OK;
}

/* d by the logits, or by the raw noise after them. */
static moe__rows gradient(const moe__second_job *job, int noise)
{
    return (moe__rows){.data = (const real *)job->d + (noise ? job->width : 0),
                       .stride = job->d_stride,
                       .row_index = job->index,
                       .wide = 1};
}

static moe_status input(const moe__second_job *job, const moe__matrices *w, int noise)
{
    moe__gemm_rows_job gemm = {.experts = job->parts,
                               .expert_begin = job->part_begin,
                               .k = job->width,
                               .n = job->input_width,
                               .a = gradient(job, noise),
                               .b = *w,
                               .out = job->dx_rows,
                               .out_wide = 1,
                               .out_stride = job->input_width,
                               .out_add = noise,
                               .tile_begin = job->tile_begin};
    gemm.b.stride_row = w->stride_col;
    gemm.b.stride_col = w->stride_row;
    return run_gemm_rows(&job->workers, &gemm);
}

static moe_status parameters(const moe__second_job *job, const moe__matrices *dw, int noise)
{
    if (!has(dw)) return MOE_OK;
    moe__gemm_dw_job gemm = {
        .experts = job->parts,
        .segment_begin = job->segment_begin,
        .segments_per_expert = job->segments,
        .k = job->input_width,
        .n = job->width,
        .a = {.data = job->x, .stride = job->x_stride, .row_index = job->index, .wide = job->x_wide},
        .g = gradient(job, noise),
        .dw = *dw,
        .tile_begin = job->tile_begin};
    return run_gemm_dw(&job->workers, &gemm);
}

moe_status MOE_KERNEL(second_backward)(moe__second_job *job)
{
    bool noise = job->with_noise;
    if (job->dx_rows) MOE_TRY(input(job, &job->weight_matrix, 0));
    if (job->dx_rows && noise) MOE_TRY(input(job, &job->noise_weight, 1));
    MOE_TRY(parameters(job, &job->d_weight_matrix, 0));
    return noise ? parameters(job, &job->d_noise_weight, 1) : MOE_OK;
}
