/* expert_ffn.c - every expert's network on its rows, forward and backward.
 *
 *     z1 = x W1 + b1,  z3 = x W3 + b3,  h = act(z1) [* z3],  out = o(h W2 + b2)
 *
 * Row r of a plan is token token_of_row[r]; x is gathered while it is packed. o is the identity or
 * the logistic function. Shapes: x [T,D], z1, z3, h [R,F], out [R,O]. */
#include "cpu/activation.h"
#include "cpu/tiles.h"
#include "numeric.h"

int64_t MOE_KERNEL(worker_bytes)(void)
{
    return ((int64_t)MOE_KERNEL(gemm_scratch)() + 63) & ~(int64_t)63;
}

/* out[rows,n] = a[rows,k] b[k,n] (+ bias), expert by expert. */
static moe_status product(const moe__experts_job *job, int64_t k, int64_t n, moe__rows a,
                          moe__matrices b, const moe__matrices *bias, void *out, int32_t add)
{
    moe__gemm_rows_job gemm = {.experts = job->plan->num_experts,
                               .expert_begin = job->plan->expert_begin,
                               .k = k,
                               .n = n,
                               .a = a,
                               .b = b,
                               .out = out,
                               .out_stride = n,
                               .out_add = add,
                               .tile_begin = job->tile_begin};
    if (bias) gemm.bias = *bias;
    return run_gemm_rows(&job->workers, &gemm);
}

/* The same weights read the other way round: [n,k]. */
static moe__matrices transposed(moe__matrices m)
{
    int64_t row = m.stride_row;
    m.stride_row = m.stride_col;
    m.stride_col = row;
    return m;
}

static void weight_of_row_range(void *argument, int64_t begin, int64_t end)
{
    const moe__experts_job *job = argument;
    const real *weight = job->plan->weight_of_entry;
    real *of_row = job->weight_of_row;
    for (int64_t r = begin; r < end; r++) of_row[r] = weight[job->plan->entry_of_row[r]];
}

static void sigmoid_range(void *argument, int64_t begin, int64_t end)
{
    real *out = argument;
    for (int64_t i = begin; i < end; i++) out[i] = r_sigmoid(out[i]);
}

moe_status MOE_KERNEL(experts_forward)(moe__experts_job *job)
{
    const moe__workers *w = &job->workers;
    const moe_experts_config *c = job->config;
    int64_t rows = job->plan->rows, D = c->d_model, F = c->d_hidden, O = c->d_out;
    moe__rows x = {job->x, job->x_stride, job->plan->token_of_row, NULL};
    moe__rows h = {job->h, F, NULL, NULL};

    MOE_TRY(moe__parallel_range(w->context, rows, 4096, weight_of_row_range, job, w->function));
    MOE_TRY(product(job, D, F, x, job->w1, &job->b1, job->z1, 0));
    if (job->z3) MOE_TRY(product(job, D, F, x, job->w3, &job->b3, job->z3, 0));
    MOE_TRY(MOE_KERNEL(activation_forward)(w, c->activation, rows * F, job->h, job->z1, job->z3));
    MOE_TRY(product(job, F, O, h, job->w2, &job->b2, job->out, 0));
    if (c->output != MOE_OUTPUT_SIGMOID) return MOE_OK;
    return moe__parallel_range(w->context, rows * O, 16384, sigmoid_range, job->out, w->function);
}

/* dz[r] = weight_r dy[t] o'(z) for o the logistic function: weight dy out (1 - out). */
static void dz_range(void *argument, int64_t begin, int64_t end)
{
    const moe__experts_job *job = argument;
    int64_t O = job->config->d_out;
    for (int64_t r = begin; r < end; r++) {
        const real *dy = (const real *)job->dy + job->plan->token_of_row[r] * job->dy_stride;
        const real *out = (const real *)job->out + r * O;
        real *dz = (real *)job->dz + r * O;
        real weight = ((const real *)job->weight_of_row)[r];
        for (int64_t j = 0; j < O; j++) dz[j] = weight * dy[j] * (out[j] * (R(1.0) - out[j]));
    }
}

/* dw[k,n] (=|+=) a^T g over each expert's rows, and dbias[n] (=|+=) their column sums. */
static moe_status weight_gradient(const moe__experts_job *job, int64_t k, int64_t n, moe__rows a,
                                  moe__rows g, const moe__matrices *dw, const moe__matrices *dbias)
{
    if (!has(dw) && !has(dbias)) return MOE_OK;
    moe__gemm_dw_job gemm = {.experts = job->plan->num_experts,
                             .segment_begin = job->plan->expert_begin,
                             .segments_per_expert = 1,
                             .k = k,
                             .n = n,
                             .a = a,
                             .g = g,
                             .dw = *dw,
                             .dbias = *dbias,
                             .overwrite = job->overwrite,
                             .tile_begin = job->tile_begin};
    return run_gemm_dw(&job->workers, &gemm);
}

/* The gradient by each weight: dy[t] . out[r]. */
static moe_status entry_weight_gradient(const moe__experts_job *job)
{
    moe__rows_job dots = {.workers = job->workers,
                          .plan = job->plan,
                          .width = job->config->d_out,
                          .tokens_in = job->dy,
                          .tokens_in_stride = job->dy_stride,
                          .rows_in = job->out,
                          .rows_in_stride = job->config->d_out,
                          .entry_weight_grad = job->entry_weight_grad};
    return MOE_KERNEL(combine_backward)(&dots);
}

/* y[t] = sum weight_r out[r]:  dz = weight dy o';  dh = dz W2^T;  dz1, dz3 by the activation;
 * dx_row = dz1 W1^T + dz3 W3^T;  dW2 = h^T dz,  dW1 = x^T dz1,  dW3 = x^T dz3, biases their
 * sums. */
moe_status MOE_KERNEL(experts_backward)(moe__experts_job *job)
{
    const moe__workers *w = &job->workers;
    const moe_experts_config *c = job->config;
    int64_t rows = job->plan->rows, D = c->d_model, F = c->d_hidden, O = c->d_out;
    moe__rows x = {job->x, job->x_stride, job->plan->token_of_row, NULL};
    moe__rows h = {job->h, F, NULL, NULL};
    moe__rows dz1 = {job->dh, F, NULL, NULL}, dz3 = {job->dz3, F, NULL, NULL};
    moe__rows dz = {job->dy, job->dy_stride, job->plan->token_of_row, job->weight_of_row};

    if (job->entry_weight_grad) MOE_TRY(entry_weight_gradient(job));
    if (job->dz) {
        MOE_TRY(moe__parallel_range(w->context, rows, 64, dz_range, job, w->function));
        dz = (moe__rows){job->dz, O, NULL, NULL};
    }
    MOE_TRY(product(job, O, F, dz, transposed(job->w2), NULL, job->dh, 0));
    MOE_TRY(MOE_KERNEL(activation_backward)(w, c->activation, rows * F, job->dh, job->dz3, job->h,
                                            job->z1, job->z3));
    MOE_TRY(weight_gradient(job, F, O, h, dz, &job->dw2, &job->db2));
    MOE_TRY(weight_gradient(job, D, F, x, dz1, &job->dw1, &job->db1));
    if (job->z3) MOE_TRY(weight_gradient(job, D, F, x, dz3, &job->dw3, &job->db3));
    if (!job->dx_rows) return MOE_OK;
    MOE_TRY(product(job, F, D, dz1, transposed(job->w1), NULL, job->dx_rows, 0));
    if (!job->z3) return MOE_OK;
    return product(job, F, D, dz3, transposed(job->w3), NULL, job->dx_rows, 1);
}
