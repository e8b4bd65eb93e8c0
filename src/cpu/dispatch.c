/* dispatch.c - tokens to rows, and the adjoint.
 *
 *     forward:   rows_out[r] = tokens_in[token_of_row[r]]
 *     backward:  tokens_out[t] (=|+=) sum over the rows of t, in order of entry, of rows_in[row];
 *                of tokens_in[t] for a token without rows that passed through */
#include "cpu/kernels.h"
#include "cpu/simd.h"

#include <string.h>

static void forward_range(void *argument, int64_t begin, int64_t end)
{
    const moe__rows_job *job = argument;
    for (int64_t r = begin; r < end; r++) {
        const element *in = (const element *)job->tokens_in +
                            job->plan->token_of_row[r] * job->tokens_in_stride;
        memcpy((element *)job->rows_out + r * job->rows_out_stride, in,
               (size_t)job->width * sizeof *in);
    }
}

moe_status MOE_KERNEL(dispatch_forward)(moe__rows_job *job)
{
    return moe__parallel_range(job->workers.context, job->plan->rows, 64, forward_range, job,
                               job->workers.function);
}

/* Sums a stretch of one token's rows; the stretch stays in a register block. The flags are
 * constants at every call. */
V_INLINE void backward_token_of(const moe__rows_job *job, int64_t t, const int rows_wide,
                                const int tokens_wide)
{
    enum { STRETCH = 64 };
    const moe__plan_arrays *p = job->plan;
    void *out = place_at(job->tokens_out, t * job->tokens_out_stride, tokens_wide);
    int masked = job->token_mask && !job->token_mask[t];
    const element *passed = job->dropped == MOE_DROPPED_PASS_THROUGH && !masked
                                ? (const element *)job->tokens_in + t * job->tokens_in_stride
                                : NULL;
    for (int64_t j = 0; j < job->width; j += STRETCH) {
        int64_t width = moe__min(STRETCH, job->width - j);
        real sum[STRETCH];
        int any = 0;
        for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++) {
            if (p->row_of_entry[n] < 0) continue;
            const void *in = place_at(job->rows_in, p->row_of_entry[n] * job->rows_in_stride + j,
                                      rows_wide);
            for (int64_t i = 0; i < width; i++)
                sum[i] = any ? sum[i] + get_at(in, i, rows_wide) : get_at(in, i, rows_wide);
            any = 1;
        }
        for (int64_t i = 0; i < width; i++) {
            real total = any ? sum[i] : passed ? get(passed[j + i]) : R(0.0);
            put_at(out, j + i, tokens_wide,
                   job->add ? get_at(out, j + i, tokens_wide) + total : total);
        }
    }
}

static void backward_token(const moe__rows_job *job, int64_t t)
{
    if (WIDE(job->rows_wide) && WIDE(job->tokens_wide))
        backward_token_of(job, t, 1, 1);
    else if (WIDE(job->rows_wide))
        backward_token_of(job, t, 1, 0);
    else
        backward_token_of(job, t, 0, 0);
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
