/* dispatch.c - tokens to rows, and the adjoint.
 *
 *     forward:   rows_out[r] = tokens_in[token_of_row[r]]
 *     backward:  tokens_out[t] (=|+=) sum over the rows of t, in order of entry, of rows_in[row];
 *                of tokens_in[t] for a token without rows that passed through */
#include "cpu/ahead.h"
#include "cpu/kernels.h"

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

/* The rows of entries [first, last) of a token, of which `first` has one. */
typedef struct token_rows {
    const moe__rows_job *job;
    int64_t first, last;
} token_rows;

/* sum[0 .. vectors VEC_N) over a token's rows, columns from j; the columns stay in registers. */
V_INLINE void sum_vectors(const int vectors, const token_rows *t, int64_t j, const int wide,
                          real *sum)
{
    const moe__rows_job *job = t->job;
    const int64_t *row = job->plan->row_of_entry, stride = job->rows_in_stride;
    vec acc[SUM_VECTORS];
    V_UNROLL
    for (int v = 0; v < vectors; v++)
        acc[v] = v_get_at(job->rows_in, row[t->first] * stride + j + v * VEC_N, wide);
    for (int64_t n = t->first + 1; n < t->last; n++) {
        if (row[n] < 0) continue;
        V_UNROLL
        for (int v = 0; v < vectors; v++)
            acc[v] = v_add(acc[v], v_get_at(job->rows_in, row[n] * stride + j + v * VEC_N, wide));
    }
    V_UNROLL
    for (int v = 0; v < vectors; v++) v_store(sum + v * VEC_N, acc[v]);
}

/* sum[0..width) likewise. */
V_INLINE void sum_rows(const token_rows *t, int64_t j, int64_t width, const int wide, real *sum)
{
    const moe__rows_job *job = t->job;
    const int64_t *row = job->plan->row_of_entry, stride = job->rows_in_stride;
    int64_t i = 0;
    if (width == STRETCH) {
        sum_vectors(SUM_VECTORS, t, j, wide, sum);
        return;
    }
    for (; i + VEC_N <= width; i += VEC_N) sum_vectors(1, t, j + i, wide, sum + i);
    for (; i < width; i++) {
        sum[i] = get_at(job->rows_in, row[t->first] * stride + j + i, wide);
        for (int64_t n = t->first + 1; n < t->last; n++)
            if (row[n] >= 0) sum[i] = sum[i] + get_at(job->rows_in, row[n] * stride + j + i, wide);
    }
}

/* Sums one token's rows, stretch by stretch. The flags are constants at every call. */
V_INLINE void backward_token_of(const moe__rows_job *job, int64_t t, const int rows_wide,
                                const int tokens_wide)
{
    const moe__plan_arrays *p = job->plan;
    token_rows rows = {job, p->token_begin[t], p->token_begin[t + 1]};
    void *out = place_at(job->tokens_out, t * job->tokens_out_stride, tokens_wide);
    int masked = job->token_mask && !job->token_mask[t];
    const element *passed = job->dropped == MOE_DROPPED_PASS_THROUGH && !masked
                                ? (const element *)job->tokens_in + t * job->tokens_in_stride
                                : NULL;
    while (rows.first < rows.last && p->row_of_entry[rows.first] < 0) rows.first++;
    int any = rows.first < rows.last;
    for (int64_t j = 0; j < job->width; j += STRETCH) {
        int64_t width = moe__min(STRETCH, job->width - j);
        real sum[STRETCH];
        look_ahead(job, t, j, width, rows_wide);
        if (any) sum_rows(&rows, j, width, rows_wide, sum);
        for (int64_t i = 0; i < width && !any; i++) sum[i] = passed ? get(passed[j + i]) : R(0.0);
        for (int64_t i = 0; i < width && job->add; i++)
            sum[i] = get_at(out, j + i, tokens_wide) + sum[i];
        for (int64_t i = 0; i < width; i++) put_at(out, j + i, tokens_wide, sum[i]);
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
