/* losses.h - what the files of the losses share: losses.cu, load.cu, statistics.cu,
 * losses_backward.cu, gate_backward.cu. */
#ifndef MOE_CUDA_LOSSES_H
#define MOE_CUDA_LOSSES_H

#include "route.h"
#include "weigh.h"

/* The plain fields of moe__losses_job that are found on the device: numbers in job->sums. */
enum {
    MOE_SUM_TOKENS = 0,
    MOE_SUM_GROUPS = 1,
    MOE_SUM_ROWS = 2,
    MOE_SUM_WITH_LOGITS = 3,
    MOE_SUM_Z = 4,
    MOE_SUM_THRESHOLD = 5,
    MOE_SUM_ENTROPY = 6
};

/* The arrays of moe__losses_job, and what of the config and the route they are read with. */
struct moe_loss_arrays {
    int64_t T, E, G, K;
    const int64_t *token_begin, *group_begin, *expert_begin, *valid_begin;
    const uint8_t *token_mask;
    const int32_t *ids;      /* [N] */
    const float *weight;     /* [N] before dropping */
    const float *logits;     /* [T,E] of a flat gate, NULL: none */
    int32_t has_logits, two; /* two: a hierarchical gate */
    int32_t has_load;        /* a smooth one */
    int32_t scoped, sequence_score, ddof;
    int64_t width; /* experts of a group of a hierarchical gate */
    moe_vector threshold;
    double *importance, *load, *primary_load, *part_load, *part_rows;
    int64_t *counts, *first_counts;
    int64_t scopes;
    double *score_sum;
    int64_t *scope_counts, *scope_first;
    double *sequence_sum, *sequence_scale;
    int64_t *sequence_counts, *over_taken, *rows_of_expert;
    double *value, *stats, *sums;
    float *columns;
    double *token_value;
    int32_t *plain_ids;
    double weights[MOE_LOSS_SLOTS];
};

/* losses.cu */
moe_loss_arrays moe__cuda_losses_of(const moe__losses_job *job);
/* Sums the columns of [rows,width] over segments of rows, begin[s] to begin[s + 1] - 1, or over all
 * rows: sum [segments,width]. Scratch from its beginning. */
moe_status moe__cuda_sum_columns(const moe__workers *workers, const float *columns, int64_t width,
                                 int64_t rows, const int64_t *begin, int64_t segments, double *sum);
/* *sum = that of token_value, by one block. */
moe_status moe__cuda_sum_tokens(const moe__workers *workers, const double *token_value, int64_t T,
                                double *sum);
/* load.cu: the smooth load of a level's candidates, [parts,width]. */
moe_status moe__cuda_level_load(const moe__losses_job *job, const moe__gate_level *level,
                                double *load);
/* statistics.cu: the sum of entropies; job->stats of all else. */
moe_status moe__cuda_sum_entropy(const moe__losses_job *job, const moe_loss_arrays *l);
moe_status moe__cuda_statistics(const moe__losses_job *job, const moe_loss_arrays *l);
/* losses_backward.cu: loss_factor, d_importance, d_load of the levels, d_score; and d_logits of a
 * flat gate, if a loss of the logits is on. *started: whether it is. */
moe_status moe__cuda_losses_prepare(const moe__gate_backward_job *job, const moe_loss_arrays *l);
moe_status moe__cuda_losses_rows(const moe__gate_backward_job *job, const moe_loss_arrays *l,
                                 bool *started);

/* ---- what kernels share ---------------------------------------------------------------------- */

MOE_DEVICE int64_t moe_group_of(const moe_loss_arrays *l, int64_t t)
{
    return moe_range_of(l->group_begin, l->G, t);
}
MOE_DEVICE int64_t moe_valid_in_group(const moe_loss_arrays *l, int64_t g)
{
    return l->valid_begin[g + 1] - l->valid_begin[g];
}

/* row = s / sum(s), and returns the sum; s as the sequence loss wants it. By a warp. */
MOE_DEVICE float moe_normalized_scores(float *row, const float *clean, int64_t n, int32_t score)
{
    moe_score_all(row, clean, n, score);
    if (score == MOE_SCORE_SOFTMAX) return 1.0f;
    float sum = moe_row_sum(row, n);
    for (int64_t i = moe_lane(); i < n; i += MOE_WARP) row[i] = row[i] / sum;
    return sum;
}

/* Sums over i in [0, n) by one block of 256 threads; shared: [8]. */
MOE_DEVICE double moe_sum_counts(const int64_t *counts, int64_t n, double *shared)
{
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += MOE_ROUTE_THREADS) sum += (double)counts[i];
    return moe_block_sum(sum, shared);
}
MOE_DEVICE double moe_weighted_sum(const int64_t *counts, const double *sums, int64_t n,
                                   double *shared)
{
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += MOE_ROUTE_THREADS) sum += (double)counts[i] * sums[i];
    return moe_block_sum(sum, shared);
}

/* The squared coefficient of variation, as src/cv.h, by one block. */
struct moe_cv {
    double mean, scale, per_freedom, value, per_element;
};

MOE_DEVICE moe_cv moe_cv_of(const double *v, int64_t n, int32_t ddof, double *shared)
{
    moe_cv cv;
    double sum = 0, squares = 0;
    for (int64_t i = threadIdx.x; i < n; i += MOE_ROUTE_THREADS) sum += v[i];
    cv.mean = n ? moe_block_sum(sum, shared) / (double)n : 0;
    for (int64_t i = threadIdx.x; i < n; i += MOE_ROUTE_THREADS)
        squares += (v[i] - cv.mean) * (v[i] - cv.mean);
    squares = moe_block_sum(squares, shared);
    cv.scale = cv.mean * cv.mean + 1e-10;
    cv.per_freedom = n > ddof ? 1 / (double)(n - ddof) : 0;
    cv.value = squares * cv.per_freedom / cv.scale;
    cv.per_element = n ? 1 / (double)n : 0;
    return cv;
}
MOE_DEVICE double moe_cv_gradient(const moe_cv *cv, double v)
{
    double by_variance = 2 * (v - cv->mean) * cv->per_freedom / cv->scale;
    return by_variance - cv->value * (2 * cv->mean * cv->per_element) / cv->scale;
}

/* Unmasked tokens of a scope, and the share of its mean in the loss. */
MOE_DEVICE double moe_scope_tokens(const moe_loss_arrays *l, int64_t scope)
{
    return !l->scoped ? l->sums[MOE_SUM_TOKENS] : (double)moe_valid_in_group(l, scope);
}
MOE_DEVICE double moe_scope_share(const moe_loss_arrays *l)
{
    double groups = !l->scoped ? 1 : l->sums[MOE_SUM_GROUPS];
    return groups > 0 ? 1 / groups : 0;
}

/* What n_e sum_t P_te is multiplied by: in switch E / (sum(n) T), in gshard (of f_e) E / T^2; by
 * one block. */
MOE_DEVICE double moe_switch_scale(const moe_loss_arrays *l, int64_t scope, double *shared)
{
    double entries = moe_sum_counts(l->scope_counts + scope * l->E, l->E, shared);
    double tokens = moe_scope_tokens(l, scope), E = (double)l->E;
    return entries > 0 && tokens > 0 ? moe_scope_share(l) * (E / entries / tokens) : 0;
}
MOE_DEVICE double moe_gshard_scale(const moe_loss_arrays *l, int64_t scope)
{
    double tokens = moe_scope_tokens(l, scope);
    return tokens > 0 ? moe_scope_share(l) * ((double)l->E / tokens / tokens) : 0;
}

#endif
