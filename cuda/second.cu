/* second.cu - the secondary gates of a hierarchical gate over rows of several ranks, as
 * src/cpu/second.c: the products of the gate where the parameters are.
 *
 *     logits[r] = x W_i,  noise_raw[r] = x Wnoise_i       for the rows r of group i
 *     dx[r] = d W_i^T + d_noise Wnoise_i^T,  dW_i += x^T d
 *
 * The sums of dW are cut as router_gemm.cu cuts them, not source by source. */
#include "router_gemm.h"

static moe_row_ranges ranges_of(const moe__second_job *job)
{
    moe_row_ranges r = {job->rows, job->parts, job->part_begin, 1};
    return r;
}

template <typename T> static moe_row_operand input_of(const moe__second_job *job)
{
    int32_t dtype = job->x_wide ? (int32_t)MOE_DTYPE_F32 : moe_dtype_of<T>::value;
    moe_row_operand x = {job->x, job->x_stride, job->index, dtype, 0};
    return x;
}

/* d by the logits, or by the raw noise after them. */
static moe_row_operand gradient_of(const moe__second_job *job, int noise)
{
    const float *d = (const float *)job->d + (noise ? job->width : 0);
    moe_row_operand g = {d, job->d_stride, job->index, MOE_DTYPE_F32, 0};
    return g;
}

template <typename T>
static moe_status logits(const moe__second_job *job, const moe__matrices *w, void *out)
{
    moe_rows_product product = {};
    product.ranges = ranges_of(job);
    product.k = job->input_width, product.n = job->width;
    product.a = input_of<T>(job);
    product.b = *w;
    product.out = out;
    product.out_stride = job->width;
    product.out_dtype = MOE_DTYPE_F32;
    return moe__cuda_rows_product(&job->workers, &product);
}

template <typename T> static moe_status second_forward(moe__second_job *job)
{
    if (job->rows == 0) return MOE_OK;
    MOE_TRY(logits<T>(job, &job->weight_matrix, job->logits));
    return job->noise_raw ? logits<T>(job, &job->noise_weight, job->noise_raw) : MOE_OK;
}

MOE_CUDA_SLOT(second_forward, moe__second_job *)

static moe_status input(const moe__second_job *job, const moe__matrices *w, int noise)
{
    moe_rows_product product = {};
    product.ranges = ranges_of(job);
    product.k = job->width, product.n = job->input_width;
    product.a = gradient_of(job, noise);
    product.b = moe_transposed(w);
    product.out = job->dx_rows;
    product.out_stride = job->input_width;
    product.out_dtype = MOE_DTYPE_F32;
    product.add = noise;
    return moe__cuda_rows_product(&job->workers, &product);
}

template <typename T>
static moe_status parameters(const moe__second_job *job, const moe__matrices *dw, int noise)
{
    moe_dw_product product = {};
    if (!moe_is_there(dw)) return MOE_OK;
    product.ranges = ranges_of(job);
    product.k = job->input_width, product.n = job->width;
    product.a = input_of<T>(job);
    product.g = gradient_of(job, noise);
    product.dw = *dw;
    return moe__cuda_dw_product(&job->workers, &product);
}

template <typename T> static moe_status second_backward(moe__second_job *job)
{
    if (job->rows == 0) return MOE_OK;
    if (job->dx_rows) MOE_TRY(input(job, &job->weight_matrix, 0));
    if (job->dx_rows && job->with_noise) MOE_TRY(input(job, &job->noise_weight, 1));
    MOE_TRY(parameters<T>(job, &job->d_weight_matrix, 0));
    return job->with_noise ? parameters<T>(job, &job->d_noise_weight, 1) : MOE_OK;
}

MOE_CUDA_SLOT(second_backward, moe__second_job *)
