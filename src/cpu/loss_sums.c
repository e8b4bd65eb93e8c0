/* loss_sums.c - the sums of a batch as a vector of doubles, and back: what src/share.c adds up over
 * ranks. Counts are exact below 2^53. */
#include "cpu/kernels.h"

/* A number that is taken, or put back as a sum. */
typedef struct cursor {
    double *at;
    bool put;
} cursor;

static void one(cursor *c, double *value)
{
    if (c->put)
        *value = *c->at++;
    else
        *c->at++ = *value;
}
static void reals(cursor *c, double *values, int64_t n)
{
    for (int64_t i = 0; i < n; i++) one(c, &values[i]);
}
static void counts(cursor *c, int64_t *values, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        double value = (double)values[i];
        one(c, &value);
        values[i] = (int64_t)value;
    }
}

static void walk_sums(moe__losses_job *job, cursor *c)
{
    int64_t E = job->plan->num_experts;
    bool two = job->part_rows && job->route->level[0].kth;
    int64_t parts = two ? job->route->level[0].width : 0;
    one(c, &job->tokens), one(c, &job->groups), one(c, &job->rows);
    one(c, &job->with_logits);
    one(c, &job->z_sum), one(c, &job->threshold_sum), one(c, &job->entropy_sum);
    reals(c, job->importance, E);
    reals(c, two ? job->part_load : job->load, E);
    reals(c, job->primary_load, parts);
    reals(c, job->part_rows, parts);
    counts(c, job->counts, E);
    counts(c, job->first_counts, E);
    counts(c, job->rows_of_expert, E);
    if (job->score_sum && !job->scoped) reals(c, job->score_sum, E);
    if (job->over_taken) counts(c, job->over_taken, E);
}

static void walk_partial(moe__losses_job *job, cursor *c)
{
    if (job->scoped) {
        one(c, &job->value[MOE_LOSS_SWITCH]);
        one(c, &job->value[MOE_LOSS_GSHARD]);
    }
    one(c, &job->value[MOE_LOSS_SEQUENCE]);
}

moe_status MOE_KERNEL(loss_sums)(moe__losses_job *job, double *numbers, bool partial, bool put,
                                 int64_t *count)
{
    cursor c = {numbers, put};
    partial ? walk_partial(job, &c) : walk_sums(job, &c);
    *count = c.at - numbers;
    return MOE_OK;
}
