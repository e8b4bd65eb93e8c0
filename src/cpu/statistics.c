/* statistics.c - what MOE_STAT_* shows of a routing. */
#include "cpu/statistics.h"
#include "cv.h"

/* token_value = entropy of a token's weights, normalised to sum 1 */
static void fill_entropy(void *argument, int64_t begin, int64_t end)
{
    const moe__losses_job *job = argument;
    const real *w = job->route->weight;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = job->plan->token_begin[t], last = job->plan->token_begin[t + 1];
        double sum = 0, entropy = 0;
        for (int64_t n = first; n < last; n++) sum += (double)w[n];
        for (int64_t n = first; n < last; n++) {
            double q = sum > 0 ? (double)w[n] / sum : 0;
            if (q > 0) entropy -= q * moe__log_f64(q);
        }
        job->token_value[t] = entropy;
    }
}

moe_status MOE_KERNEL(sum_entropy)(moe__losses_job *job)
{
    const moe__workers *w = &job->route->workers;
    MOE_TRY(
        moe__parallel_range(w->context, job->plan->tokens, 256, fill_entropy, job, w->function));
    job->entropy_sum = MOE_KERNEL(sum_tokens)(job);
    return MOE_OK;
}

/* Coefficients of variation of importance and load: two sums at a time, for each is one chain. */
static void variations(const moe__losses_job *job, double *importance, double *load)
{
    int64_t E = job->plan->num_experts;
    moe__cv a = {.n = E, .ddof = job->route->config->cv_ddof}, b = a;
    for (int64_t e = 0; e < E; e++) {
        moe__cv_add(&a, job->importance[e]);
        moe__cv_add(&b, job->load[e]);
    }
    for (int64_t e = 0; e < E; e++) {
        moe__cv_add_square(&a, job->importance[e]);
        moe__cv_add_square(&b, job->load[e]);
    }
    *importance = __builtin_sqrt(moe__cv_value(&a));
    *load = __builtin_sqrt(moe__cv_value(&b));
}

void MOE_KERNEL(statistics)(const moe__losses_job *job)
{
    const moe__plan_arrays *plan = job->plan;
    int64_t E = plan->num_experts, most = 0;
    double *stats = job->stats, entries = (double)sum_counts(job->counts, E), entropy = 0;
    for (int64_t i = 0; i < MOE_STAT_SLOTS; i++) stats[i] = 0;
    for (int64_t e = 0; e < E; e++) {
        double share = entries > 0 ? (double)job->counts[e] / entries : 0;
        if (share > 0) entropy -= share * moe__log_f64(share);
        most = moe__max(most, job->counts[e]);
        stats[MOE_STAT_TOUCHED] += job->rows_of_expert[e] > 0;
    }
    stats[MOE_STAT_TOKENS] = job->tokens;
    stats[MOE_STAT_ENTRIES] = entries;
    stats[MOE_STAT_ROWS] = job->rows;
    stats[MOE_STAT_DROPPED] = entries - job->rows;
    variations(job, &stats[MOE_STAT_CV_IMPORTANCE], &stats[MOE_STAT_CV_LOAD]);
    stats[MOE_STAT_MAX_OVER_MEAN] = entries > 0 ? (double)most * (double)E / entries : 0;
    stats[MOE_STAT_LOAD_ENTROPY] = entropy;
    if (job->tokens > 0) stats[MOE_STAT_GATE_ENTROPY] = job->entropy_sum / job->tokens;
}
