/* dispatch.c - tokens to rows, and the adjoint.
 *
 *     forward:   rows_out[r] = tokens_in[token_of_row[r]]
 *     backward:  tokens_out[t] (=|+=) sum over the rows of t, in order of entry, of rows_in[row];
 *                of tokens_in[t] for a token without rows that passed through */
#include "cpu/kernels.h"

#include <string.h>

static void forward_range(void *argument, int64_t begin, int64_t end)
{
    const moe__rows_job *job = argument;
    for (int64_t r = begin; r < end; r++) {
        const real *in = (const real *)job->tokens_in +
                         job->plan->token_of_row[r] * job->tokens_in_stride;
        memcpy((real *)job->rows_out + r * job->rows_out_stride, in,
               (size_t)job->width * sizeof *in);
    }
}

moe_status MOE_KERNEL(dispatch_forward)(moe__rows_job *job)
{
    return moe__parallel_range(job->workers.context, job->plan->rows, 64, forward_range, job,
                               job->workers.function);
}

/* Sums a stretch of one token's rows; the stretch stays in a register block. */
static void backward_token(const moe__rows_job *job, int64_t t)
{
    enum { STRETCH = 64 };
    const moe__plan_arrays *p = job->plan;
    real *out = (real *)job->tokens_out + t * job->tokens_out_stride;
    int masked = job->token_mask && !job->token_mask[t];
    const real *passed = job->dropped == MOE_DROPPED_PASS_THROUGH && !masked
                             ? (const real *)job->tokens_in + t * job->tokens_in_stride
                             : NULL;
    for (int64_t j = 0; j < job->width; j += STRETCH) {
        int64_t width = moe__min(STRETCH, job->width - j);
        real sum[STRETCH];
        int any = 0;
        for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++) {
            if (p->row_of_entry[n] < 0) continue;
            const real *in = (const real *)job->rows_in + p->row_of_entry[n] * job->rows_in_stride +
                             j;
            for (int64_t i = 0; i < width; i++) sum[i] = any ? sum[i] + in[i] : in[i];
            any = 1;
        }
        for (int64_t i = 0; i < width; i++) {
            real total = any ? sum[i] : passed ? passed[j + i] : R(0.0);
            out[j + i] = job->add ? out[j + i] + total : total;
        }
    }
}

static void backward_range(void *argument, int64_t begin, int64_t end)
{
    for (int64_t t = begin; t < end; t++) backward_token(argument, t);
}

moe_status MOE_KERNEL(dispatch_backward)(moe__rows_job *job)
{
    return moe__parallel_range(job->workers.context, job->plan->tokens, 64, backward_range, job,
                               job->workers.function);
}
