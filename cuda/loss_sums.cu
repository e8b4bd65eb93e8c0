/* loss_sums.cu - the sums of a batch as a vector of doubles, and back, as src/cpu/loss_sums.c: what
 * src/share.c adds up over ranks. Counts are exact below 2^53. */
#include "losses.h"

/* Numbers one after the other: of an array of doubles, or of counts. */
struct moe_sum_run {
    double *reals;
    int64_t *counts;
    int64_t first; /* in the vector */
};

enum { MOST_RUNS = 12 };
struct moe_sum_runs {
    moe_sum_run run[MOST_RUNS];
    int64_t runs, count;
};

static void append(moe_sum_runs *r, double *reals, int64_t *counts, int64_t n)
{
    if (n == 0 || (!reals && !counts)) return;
    r->run[r->runs++] = {reals, counts, r->count};
    r->count += n;
}

static moe_sum_runs all_sums(const moe__losses_job *job)
{
    int64_t E = job->plan->num_experts;
    bool two = job->part_rows && job->route->level[0].kth;
    int64_t parts = two ? job->route->level[0].width : 0;
    moe_sum_runs r = {};
    append(&r, job->sums, NULL, MOE_SUM_ENTROPY + 1);
    append(&r, job->importance, NULL, E);
    append(&r, two ? job->part_load : job->load, NULL, E);
    append(&r, job->primary_load, NULL, parts);
    append(&r, job->part_rows, NULL, parts);
    append(&r, NULL, job->counts, E);
    append(&r, NULL, job->first_counts, E);
    append(&r, NULL, job->rows_of_expert, E);
    if (job->score_sum && !job->scoped) append(&r, job->score_sum, NULL, E);
    append(&r, NULL, job->over_taken, E);
    return r;
}

static moe_sum_runs partial_sums(const moe__losses_job *job)
{
    moe_sum_runs r = {};
    if (job->scoped) append(&r, job->value + MOE_LOSS_SWITCH, NULL, 1);
    if (job->scoped) append(&r, job->value + MOE_LOSS_GSHARD, NULL, 1);
    append(&r, job->value + MOE_LOSS_SEQUENCE, NULL, 1);
    return r;
}

MOE_GLOBAL(MOE_ROUTE_THREADS) moe_loss_sums(moe_sum_runs r, double *numbers, int32_t put)
{
    int64_t i = moe_thread(), k = r.runs - 1;
    if (i >= r.count) return;
    while (r.run[k].first > i) k--;
    const moe_sum_run run = r.run[k];
    int64_t at = i - run.first;
    if (!put)
        numbers[i] = run.reals ? run.reals[at] : (double)run.counts[at];
    else if (run.reals)
        run.reals[at] = numbers[i];
    else
        run.counts[at] = (int64_t)numbers[i];
}

extern "C" moe_status moe__cuda_loss_sums(moe__losses_job *job, double *numbers, bool partial,
                                          bool put, int64_t *count)
{
    moe_sum_runs r = partial ? partial_sums(job) : all_sums(job);
    *count = r.count;
    return moe_over_items(&job->route->workers, "moe_loss_sums", moe_loss_sums, r.count, r, numbers,
                          put);
}
