/* statistics.cu - what MOE_STAT_* shows of a routing, and the results as the caller's floats; as
 * src/cpu/statistics.c. */
#include "losses.h"

/* token_value = entropy of a token's weights, normalised to sum 1; a thread for each token. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_statistics_entropy(moe_loss_arrays l)
{
    int64_t t = moe_thread();
    double sum = 0, entropy = 0;
    if (t >= l.T) return;
    int64_t first = l.token_begin[t], last = l.token_begin[t + 1];
    for (int64_t n = first; n < last; n++) sum += (double)l.weight[n];
    for (int64_t n = first; n < last; n++) {
        double q = sum > 0 ? (double)l.weight[n] / sum : 0;
        if (q > 0) entropy -= q * moe__log_f64(q);
    }
    l.token_value[t] = entropy;
}

moe_status moe__cuda_sum_entropy(const moe__losses_job *job, const moe_loss_arrays *l)
{
    const moe__workers *w = &job->route->workers;
    MOE_TRY(moe_over_items(w, "moe_statistics_entropy", moe_statistics_entropy, l->T, *l));
    return moe__cuda_sum_tokens(w, l->token_value, l->T, l->sums + MOE_SUM_ENTROPY);
}

/* stats[] of counts, importance, load and sums; one block. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_statistics_finish(moe_loss_arrays l)
{
    MOE_SHARED(double, shared, MOE_ROUTE_ROWS);
    MOE_SHARED(int64_t, most_of, MOE_ROUTE_THREADS);
    double entries = moe_sum_counts(l.counts, l.E, shared), entropy = 0, touched = 0;
    int64_t most = 0;
    for (int64_t e = threadIdx.x; e < l.E; e += MOE_ROUTE_THREADS) {
        double share = entries > 0 ? (double)l.counts[e] / entries : 0;
        if (share > 0) entropy -= share * moe__log_f64(share);
        most = l.counts[e] > most ? l.counts[e] : most;
        touched += l.rows_of_expert[e] > 0;
    }
    most_of[threadIdx.x] = most;
    entropy = moe_block_sum(entropy, shared);
    touched = moe_block_sum(touched, shared);
    double cv_importance = moe_cv_of(l.importance, l.E, l.ddof, shared).value;
    double cv_load = moe_cv_of(l.load, l.E, l.ddof, shared).value;
    if (threadIdx.x != 0) return;
    for (int i = 1; i < MOE_ROUTE_THREADS; i++) most = most_of[i] > most ? most_of[i] : most;
    double tokens = l.sums[MOE_SUM_TOKENS], rows = l.sums[MOE_SUM_ROWS];
    for (int i = 0; i < MOE_STAT_SLOTS; i++) l.stats[i] = 0;
    l.stats[MOE_STAT_TOKENS] = tokens;
    l.stats[MOE_STAT_ENTRIES] = entries;
    l.stats[MOE_STAT_ROWS] = rows;
    l.stats[MOE_STAT_DROPPED] = entries - rows;
    l.stats[MOE_STAT_TOUCHED] = touched;
    l.stats[MOE_STAT_CV_IMPORTANCE] = moe__sqrt_f64(cv_importance);
    l.stats[MOE_STAT_CV_LOAD] = moe__sqrt_f64(cv_load);
    l.stats[MOE_STAT_MAX_OVER_MEAN] = entries > 0 ? (double)most * (double)l.E / entries : 0;
    l.stats[MOE_STAT_LOAD_ENTROPY] = entropy;
    if (tokens > 0) l.stats[MOE_STAT_GATE_ENTROPY] = l.sums[MOE_SUM_ENTROPY] / tokens;
}

moe_status moe__cuda_statistics(const moe__losses_job *job, const moe_loss_arrays *l)
{
    return moe_over(&job->route->workers, "moe_statistics_finish", moe_statistics_finish, 1, 1, *l);
}

MOE_GLOBAL(MOE_WARP)
moe_statistics_write(const double *value, const double *stats, float *losses_out, float *stats_out)
{
    int i = (int)threadIdx.x;
    if (i < MOE_LOSS_SLOTS && losses_out) losses_out[i] = (float)value[i];
    if (i < MOE_STAT_SLOTS && stats_out) stats_out[i] = (float)stats[i];
}

extern "C" moe_status moe__cuda_write_results(const moe__losses_job *job, void *losses_out,
                                              void *stats_out)
{
    if (!losses_out && !stats_out) return MOE_OK;
    return moe__cuda_launch(&job->route->workers, "moe_statistics_write", moe_statistics_write,
                            dim3(1), dim3(MOE_WARP), 0, (const double *)job->value,
                            (const double *)job->stats, (float *)losses_out, (float *)stats_out);
}
