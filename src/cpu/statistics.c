/* statistics.c - what MOE_STAT_* shows of a routing. */
#include "cpu/statistics.h"
#include "cv.h"

enum { CHUNK = 64 }; /* shares whose logarithms are found together, in vectors */

/* entropy - sum of q ln q over q[0..n), n <= CHUNK, in order; shares of 0 count nothing. */
static double less_entropy(double entropy, const double *q, const double *log_q, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (q[i] > 0) entropy -= q[i] * log_q[i];
    return entropy;
}

static void find_logs(double *log_q, const double *q, int64_t n)
{
    for (int64_t i = 0; i < n; i++) log_q[i] = moe__log_f64(q[i]);
}

/* q = w normalised to sum 1 */
static void find_shares(double *q, const real *w, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)w[i];
    for (int64_t i = 0; i < n; i++) q[i] = sum > 0 ? (double)w[i] / sum : 0;
}

/* A token of more entries than a chunk. */
static double entropy_of_many(const real *w, int64_t n)
{
    double sum = 0, entropy = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)w[i];
    for (int64_t i = 0; i < n; i++) {
        double q = sum > 0 ? (double)w[i] / sum : 0;
        if (q > 0) entropy -= q * moe__log_f64(q);
    }
    return entropy;
}

/* token_value = entropy of a token's weights, normalised to sum 1; as many tokens at a time as fit
 * into a chunk. */
static void fill_entropy(void *argument, int64_t begin, int64_t end)
{
    const moe__losses_job *job = argument;
    const real *w = job->route->weight;
    const int64_t *first = job->plan->token_begin;
    double q[CHUNK], log_q[CHUNK];
    for (int64_t t = begin, next; t < end; t = next) {
        for (next = t; next < end && first[next + 1] - first[t] <= CHUNK; next++)
            find_shares(q + (first[next] - first[t]), w + first[next],
                        first[next + 1] - first[next]);
        if (next == t) {
            job->token_value[t] = entropy_of_many(w + first[t], first[t + 1] - first[t]);
            next++;
            continue;
        }
        find_logs(log_q, q, first[next] - first[t]);
        for (int64_t u = t; u < next; u++) {
            int64_t at = first[u] - first[t];
            job->token_value[u] = less_entropy(0, q + at, log_q + at, first[u + 1] - first[u]);
        }
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
    for (int64_t begin = 0; begin < E; begin += CHUNK) {
        double share[CHUNK], log_share[CHUNK];
        int64_t n = moe__min(CHUNK, E - begin), touched = 0;
        for (int64_t i = 0; i < n; i++) {
            int64_t count = job->counts[begin + i];
            share[i] = entries > 0 ? (double)count / entries : 0;
            most = moe__max(most, count);
            touched += job->rows_of_expert[begin + i] > 0;
        }
        find_logs(log_share, share, n);
        entropy = less_entropy(entropy, share, log_share, n);
        stats[MOE_STAT_TOUCHED] += (double)touched;
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
