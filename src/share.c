/* share.c - losses and statistics over the tokens of all ranks.
 *
 *     every rank: its sums to every rank;  every rank: adds them in order of rank
 *
 * so that all have the same bytes, those of one rank with the same token groups if each rank has
 * one. Gradients then come right by themselves: a rank's logits act on the shared sums through its
 * own tokens alone. */
#include "ranks_rows.h"

enum { SINGLE = 7, PER_EXPERT = 7, PER_PART = 2, PARTIAL = 3 };

/* Of one rank. */
static int64_t numbers(int64_t E, int64_t parts)
{
    return moe__add(SINGLE, moe__add(moe__mul(E, PER_EXPERT), moe__mul(parts, PER_PART)));
}

int64_t moe__share_numbers(int64_t P, int64_t E, int64_t parts)
{
    return moe__mul(P + 1, numbers(E, parts));
}

int32_t moe__share_ranks(const moe_layer *layer)
{
    bool global = layer->config.loss_batch == MOE_BATCH_GLOBAL;
    return global && layer->where && layer->comm->size > 1 ? layer->comm->size : 0;
}

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
        double value = (double)values[i]; /* exact below 2^53 */
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

static moe_status share(moe__losses_job *job, bool partial)
{
    moe_pass *pass = job->share_user;
    int64_t P = moe__pass_comm(pass)->size, parts = job->part_rows ? job->route->level[0].width : 0;
    int64_t most = numbers(job->plan->num_experts, parts);
    double *all = job->shared, *own = all + P * most;
    cursor take = {own, false}, put = {own, true};
    partial ? walk_partial(job, &take) : walk_sums(job, &take);
    int64_t n = take.at - own;
    MOE_TRY(moe__ranks_gather(pass, all, own, n * (int64_t)sizeof *own));
    for (int64_t i = 0; i < n; i++) {
        double sum = all[i];
        for (int64_t p = 1; p < P; p++) sum += all[p * n + i];
        own[i] = sum;
    }
    partial ? walk_partial(job, &put) : walk_sums(job, &put);
    /* A gradient by itself, not through a rank's tokens: rank 0 adds that of all. */
    for (int64_t e = 0; e < job->plan->num_experts && !partial && job->over_taken; e++)
        if (moe__pass_comm(pass)->rank > 0) job->over_taken[e] = 0;
    return MOE_OK;
}

void moe__share_losses(moe_pass *pass, int32_t uses)
{
    bool shares = (uses & MOE__USE_LAYER) && moe__share_ranks(pass->layer) > 0;
    pass->losses.share = shares ? share : NULL;
    pass->losses.share_user = pass;
}
