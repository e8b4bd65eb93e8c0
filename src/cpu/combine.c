/* combine.c - weighted rows back to tokens, and the adjoint.
 *
 *     forward:   acc = fma(weight, rows_in[row], acc) in order of entry from +0;  tokens_out =
 *                o(acc), or o(tokens_out + acc)
 *     backward:  rows_out[r] = weight tokens_in[t],  entry_weight_grad[n] = tokens_in[t] .
 *                rows_in[row]
 *
 * o is the identity or the logistic function; output_backward is its gradient. Weights and
 * entry_weight_grad are reals, all matrices are elements. */
#include "cpu/ahead.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"

/* acc[0 .. vectors VEC_N) for the columns from j of token t; the columns stay in registers. */
V_INLINE void accumulate_vectors(const int vectors, const moe__rows_job *job, int64_t t, int64_t j,
                                 real *acc)
{
    const moe__plan_arrays *p = job->plan;
    const real *weight = job->weights ? job->weights : p->weight_of_entry;
    vec sum[SUM_VECTORS];
    V_UNROLL
    for (int v = 0; v < vectors; v++) sum[v] = v_zero();
    for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++) {
        if (p->row_of_entry[n] < 0) continue;
        const element *in = (const element *)job->rows_in +
                            p->row_of_entry[n] * job->rows_in_stride + j;
        vec w = v_set1(job->unweighted ? R(1.0) : weight[n]);
        V_UNROLL
        for (int v = 0; v < vectors; v++) sum[v] = v_fma(w, v_get(in + v * VEC_N), sum[v]);
    }
    V_UNROLL
    for (int v = 0; v < vectors; v++) v_store(acc + v * VEC_N, sum[v]);
}

/* acc[0..width) for the columns from j of token t. */
static void accumulate(const moe__rows_job *job, int64_t t, int64_t j, int64_t width, real *acc)
{
    const moe__plan_arrays *p = job->plan;
    const real *weight = job->weights ? job->weights : p->weight_of_entry;
    int64_t whole = width / VEC_N * VEC_N;
    look_ahead(job, t, j, width, 0);
    if (width == STRETCH) {
        accumulate_vectors(SUM_VECTORS, job, t, j, acc);
        return;
    }
    for (int64_t i = 0; i < whole; i += VEC_N) accumulate_vectors(1, job, t, j + i, acc + i);
    for (int64_t i = whole; i < width; i++) acc[i] = R(0.0);
    for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1] && whole < width; n++) {
        if (p->row_of_entry[n] < 0) continue;
        const element *in = (const element *)job->rows_in +
                            p->row_of_entry[n] * job->rows_in_stride + j;
        real w = job->unweighted ? R(1.0) : weight[n];
        for (int64_t i = whole; i < width; i++) acc[i] = r_fma(w, get(in[i]), acc[i]);
    }
}

static int has_rows(const moe__plan_arrays *p, int64_t t)
{
    for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++)
        if (p->row_of_entry[n] >= 0) return 1;
    return 0;
}

static void forward_token(const moe__rows_job *job, int64_t t)
{
    element *out = (element *)job->tokens_out + t * job->tokens_out_stride;
    int masked = job->token_mask && !job->token_mask[t];
    int dropped = job->dropped != MOE_DROPPED_ZERO && !masked && !has_rows(job->plan, t);
    if (dropped && job->dropped == MOE_DROPPED_UNTOUCHED) return;
    for (int64_t j = 0; j < job->width; j += STRETCH) {
        int64_t width = moe__min(STRETCH, job->width - j);
        real acc[STRETCH];
        accumulate(job, t, j, width, acc);
        for (int64_t i = 0; i < width && dropped; i++)
            acc[i] = get(((const element *)job->tokens_in)[t * job->tokens_in_stride + j + i]);
        for (int64_t i = 0; i < width && masked; i++) acc[i] = R(0.0);
        for (int64_t i = 0; i < width && job->add; i++) acc[i] = get(out[j + i]) + acc[i];
        for (int64_t i = 0; i < width && job->sigmoid && !masked; i++) acc[i] = r_sigmoid(acc[i]);
        for (int64_t i = 0; i < width; i++) out[j + i] = put(acc[i]);
        if (!job->tokens_saved) continue;
        element *saved = (element *)job->tokens_saved + t * job->width + j;
        for (int64_t i = 0; i < width; i++) saved[i] = put(acc[i]);
    }
}

static void forward_range(void *argument, int64_t begin, int64_t end)
{
    for (int64_t t = begin; t < end; t++) forward_token(argument, t);
}

moe_status MOE_KERNEL(combine_forward)(moe__rows_job *job)
{
    return moe__parallel_range(job->workers.context, job->plan->tokens, 64, forward_range, job,
                               job->workers.function);
}

/* By token, so that entries without a row get their 0 too. */
static void backward_range(void *argument, int64_t begin, int64_t end)
{
    const moe__rows_job *job = argument;
    const moe__plan_arrays *p = job->plan;
    const real *weight = p->weight_of_entry;
    real *grad = job->entry_weight_grad;
    for (int64_t t = begin; t < end; t++) {
        const element *d = (const element *)job->tokens_in + t * job->tokens_in_stride;
        if (grad) look_ahead(job, t, 0, job->width, 0);
        for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++) {
            int64_t row = p->row_of_entry[n];
            if (grad) grad[n] = R(0.0);
            if (row < 0) continue;
            if (grad)
                grad[n] = element_dot(d, (const element *)job->rows_in + row * job->rows_in_stride,
                                      job->width);
            if (!job->rows_out) continue;
            element *out = (element *)job->rows_out + row * job->rows_out_stride;
            real w = job->unweighted ? R(1.0) : weight[n];
            for (int64_t j = 0; j < job->width; j++) out[j] = put(w * get(d[j]));
        }
    }
}

moe_status MOE_KERNEL(combine_backward)(moe__rows_job *job)
{
    return moe__parallel_range(job->workers.context, job->plan->tokens, 64, backward_range, job,
                               job->workers.function);
}

/* tokens_out = tokens_in y (1 - y), y = tokens_saved dense */
static void output_range(void *argument, int64_t begin, int64_t end)
{
    const moe__rows_job *job = argument;
    for (int64_t t = begin; t < end; t++) {
        const element *d = (const element *)job->tokens_in + t * job->tokens_in_stride;
        const element *saved = (const element *)job->tokens_saved + t * job->width;
        element *out = (element *)job->tokens_out + t * job->tokens_out_stride;
        for (int64_t j = 0; j < job->width; j++) {
            real y = get(saved[j]);
            out[j] = put(get(d[j]) * (y * (R(1.0) - y)));
        }
    }
}

moe_status MOE_KERNEL(output_backward)(moe__rows_job *job)
{
    return moe__parallel_range(job->workers.context, job->plan->tokens, 64, output_range, job,
                               job->workers.function);
}
