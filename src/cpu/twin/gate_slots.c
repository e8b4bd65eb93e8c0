/* gate_slots.c - the slots of routing, losses and the gate's gradients by both tables.
 *
 * What must not happen twice: the second gates' exchange (route_forward, gate_backward) and the
 * losses' (losses_forward). It is done in the fast table's turn; in the plain one's all arrays must
 * be as they were before it, and become what they were after it. What it does with slots of its own
 * is compared there, and gradients that these add to are no region of gate_backward. The host's
 * noise and logits are arrays, read again. */
#include "cpu/twin/slots.h"

/* ---- routing --------------------------------------------------------------------------------- */

static void add_logits(moe__kernel_twin *t, const moe__gate_level *l, const int64_t *used)
{
    int32_t real = real_of(t->pair);
    void *array[5] = {l->logits, l->noisy, NULL, NULL, NULL};
    static const char *const name[5] = {"logits", "noisy", "noise_raw", "noise_std", "noise"};
    if (l->noise) array[2] = l->noise_raw, array[3] = l->noise_std, array[4] = l->noise;
    for (int i = 0; i < 5; i++) {
        moe__region *r = moe__kernel_twin_rows(t, name[i], array[i], l->rows, l->width, l->width,
                                               real);
        if (r) r->used = used;
    }
    moe__region *kth = moe__kernel_twin_rows(t, "kth", l->kth, l->rows, 2, 2, I32);
    if (kth) kth->used = used;
}

static void add_jitter(moe__kernel_twin *t, const moe__route_job *job)
{
    moe__kernel_twin_vector(t, "x_jittered", job->x_jittered, job->tokens * job->input_width,
                            real_of(t->pair));
}

moe_status moe__kernel_twin_route_count(const moe__kernel_twin_pair *pair, moe__route_job *job,
                                        int64_t *entries)
{
    moe__kernel_twin t = twin_of(pair, "route_count", &job->workers);
    moe__gate_level *l = &job->level[0];
    int32_t real = real_of(pair);
    moe_status status;
    moe__kernel_twin_vector(&t, "logits", l->logits, l->rows * l->width, real);
    moe__kernel_twin_vector(&t, "token_begin", job->token_begin, job->tokens, I64);
    moe__kernel_twin_vector(&t, "entries", entries, 1, I64);
    add_jitter(&t, job);
    BOTH(route_count, job, entries);
    return status;
}

/* Entries of a flat gate; -1: known when it has routed. */
static int64_t entries_of(const moe__route_job *job)
{
    int64_t entries = 0;
    if (job->choose == MOE__CHOOSE_THRESHOLD) return -1;
    if (job->choose != MOE__CHOOSE_BY_EXPERT) return job->token_begin[job->tokens];
    for (int64_t g = 0; g < job->groups; g++)
        entries += job->level[0].width * job->taken_of_group[g];
    return entries;
}

static void add_entries(moe__kernel_twin *t, moe__route_job *job, int64_t entries)
{
    int32_t real = real_of(t->pair);
    moe__kernel_twin_vector(t, "expert_of_entry", job->expert_of_entry, entries, I32);
    moe__kernel_twin_vector(t, "weight", job->weight, entries, real);
    if (job->choose == MOE__CHOOSE_BY_EXPERT)
        moe__kernel_twin_vector(t, "slot_of_entry", job->slot_of_entry, entries, I64);
}

/* A choice of rows among rows; the second level's are counted by the first. */
static void add_choice(moe__kernel_twin *t, moe__gate_level *l, const int64_t *used)
{
    moe__region *choice = moe__kernel_twin_rows(t, "choice", l->choice, l->rows, l->top_k, l->top_k,
                                                I32);
    moe__region *weight = moe__kernel_twin_rows(t, "weight of a level", l->weight, l->rows,
                                                l->top_k, l->top_k, real_of(t->pair));
    if (choice) choice->used = used;
    if (weight) weight->used = used;
}

static void add_route(moe__kernel_twin *t, moe__route_job *job)
{
    bool two = job->levels == 2;
    moe__gate_level *second = &job->level[1];
    int64_t entries = two ? job->primary->entries * second->top_k : entries_of(job);
    add_jitter(t, job);
    moe__kernel_twin_vector(t, "token_priority", job->token_priority, job->tokens,
                            real_of(t->pair));
    if (job->choose == MOE__CHOOSE_BY_EXPERT || job->choose == MOE__CHOOSE_THRESHOLD)
        moe__kernel_twin_vector(t, "token_begin", job->token_begin, job->tokens + 1, I64);
    add_logits(t, &job->level[0], NULL);
    if (two) {
        add_choice(t, &job->level[0], NULL);
        moe__kernel_twin_plan(t, job->primary, true);
        add_logits(t, second, &job->primary->rows);
        add_choice(t, second, &job->primary->rows);
    }
    add_entries(t, job, entries);
}

/* Stands for the hook of a job while both tables run. */
typedef struct route_hook {
    moe__kernel_twin *twin;
    moe_status (*second)(moe__route_job *job);
    void *user;
} route_hook;

static moe_status second_of_route(moe__route_job *job)
{
    route_hook *hook = job->second_user;
    if (hook->twin->again) return moe__kernel_twin_replay(hook->twin);
    MOE_TRY(moe__kernel_twin_hook_begin(hook->twin));
    job->second = hook->second, job->second_user = hook->user;
    moe_status status = job->second(job);
    job->second = second_of_route, job->second_user = hook;
    return moe__kernel_twin_hook_end(hook->twin, status);
}

moe_status moe__kernel_twin_route_forward(const moe__kernel_twin_pair *pair, moe__route_job *job)
{
    moe__kernel_twin t = twin_of(pair, "route_forward", &job->workers);
    route_hook hook = {&t, job->second, job->second_user};
    add_route(&t, job);
    if (job->second) job->second = second_of_route, job->second_user = &hook;
    moe_status status = moe__kernel_twin_begin(&t);
    if (status == MOE_OK) status = pair->fast->route_forward(job);
    if (status == MOE_OK && job->levels == 1 && job->choose == MOE__CHOOSE_THRESHOLD)
        add_entries(&t, job, job->token_begin[job->tokens]);
    status = moe__kernel_twin_between(&t, status);
    if (status == MOE_OK) status = moe__kernel_twin_end(&t, pair->plain->route_forward(job));
    job->second = hook.second, job->second_user = hook.user;
    moe__kernel_twin_free(&t);
    return status;
}

moe_status moe__kernel_twin_second_forward(const moe__kernel_twin_pair *pair, moe__second_job *job)
{
    moe__kernel_twin t = twin_of(pair, "second_forward", &job->workers);
    int64_t count = job->part_begin[job->parts] * job->width;
    int32_t real = real_of(pair);
    moe_status status;
    moe__kernel_twin_vector(&t, "logits", job->logits, count, real);
    moe__kernel_twin_vector(&t, "noise_raw", job->noise_raw, count, real);
    BOTH(second_forward, job);
    return status;
}

moe_status moe__kernel_twin_second_backward(const moe__kernel_twin_pair *pair, moe__second_job *job)
{
    moe__kernel_twin t = twin_of(pair, "second_backward", &job->workers);
    int64_t D = job->input_width;
    moe_status status;
    moe__kernel_twin_vector(&t, "dx_rows", job->dx_rows, job->part_begin[job->parts] * D,
                            real_of(pair));
    moe__kernel_twin_matrices(&t, "d_weight", &job->d_weight_matrix, job->parts, D, job->width);
    if (job->d_stride > job->width)
        moe__kernel_twin_matrices(&t, "d_noise_weight", &job->d_noise_weight, job->parts, D,
                                  job->width);
    BOTH(second_backward, job);
    return status;
}

/* ---- losses ---------------------------------------------------------------------------------- */

static void add_losses(moe__kernel_twin *t, moe__losses_job *job)
{
    const moe__plan_arrays *p = job->plan;
    int64_t E = p->num_experts, scoped = job->scopes * E, G = p->groups;
    int64_t parts = job->route->levels == 2 ? job->route->level[0].width : 0;
    double *number[7] = {&job->tokens, &job->groups,        &job->rows,       &job->with_logits,
                         &job->z_sum,  &job->threshold_sum, &job->entropy_sum};
    static const char *const name[7] = {"tokens", "groups",        "rows",       "with_logits",
                                        "z_sum",  "threshold_sum", "entropy_sum"};
    for (int i = 0; i < 7; i++) moe__kernel_twin_vector(t, name[i], number[i], 1, F64);
    moe__kernel_twin_vector(t, "importance", job->importance, E, F64);
    moe__kernel_twin_vector(t, "load", job->load, E, F64);
    moe__kernel_twin_vector(t, "primary_load", job->primary_load, parts, F64);
    moe__kernel_twin_vector(t, "part_load", job->part_load, parts ? E : 0, F64);
    moe__kernel_twin_vector(t, "part_rows", job->part_rows, parts, F64);
    moe__kernel_twin_vector(t, "counts", job->counts, E, I64);
    moe__kernel_twin_vector(t, "first_counts", job->first_counts, E, I64);
    moe__kernel_twin_vector(t, "score_sum", job->score_sum, scoped, F64);
    moe__kernel_twin_vector(t, "scope_counts", job->scope_counts, scoped, I64);
    moe__kernel_twin_vector(t, "scope_first", job->scope_first, scoped, I64);
    moe__kernel_twin_vector(t, "sequence_sum", job->sequence_sum, G * E, F64);
    moe__kernel_twin_vector(t, "sequence_counts", job->sequence_counts, G * E, I64);
    moe__kernel_twin_vector(t, "sequence_scale", job->sequence_scale, G, F64);
    moe__kernel_twin_vector(t, "over_taken", job->over_taken, E, I64);
    moe__kernel_twin_vector(t, "rows_of_expert", job->rows_of_expert, E, I64);
    moe__kernel_twin_vector(t, "value", job->value, MOE_LOSS_SLOTS, F64);
    moe__kernel_twin_vector(t, "stats", job->stats, MOE_STAT_SLOTS, F64);
}

typedef struct losses_hook {
    moe__kernel_twin *twin;
    moe_status (*share)(moe__losses_job *job, bool partial);
    void *user;
} losses_hook;

static moe_status share_of_losses(moe__losses_job *job, bool partial)
{
    losses_hook *hook = job->share_user;
    if (hook->twin->again) return moe__kernel_twin_replay(hook->twin);
    MOE_TRY(moe__kernel_twin_hook_begin(hook->twin));
    job->share = hook->share, job->share_user = hook->user;
    moe_status status = job->share(job, partial);
    job->share = share_of_losses, job->share_user = hook;
    return moe__kernel_twin_hook_end(hook->twin, status);
}

moe_status moe__kernel_twin_losses_forward(const moe__kernel_twin_pair *pair, moe__losses_job *job)
{
    moe__kernel_twin t = twin_of(pair, "losses_forward", &job->route->workers);
    losses_hook hook = {&t, job->share, job->share_user};
    moe_status status;
    add_losses(&t, job);
    if (job->share) job->share = share_of_losses, job->share_user = &hook;
    BOTH(losses_forward, job);
    job->share = hook.share, job->share_user = hook.user;
    return status;
}

moe_status moe__kernel_twin_write_results(const moe__kernel_twin_pair *pair,
                                          const moe__losses_job *job, void *losses_out,
                                          void *stats_out)
{
    moe__kernel_twin t = twin_of(pair, "write_results", &job->route->workers);
    int32_t real = real_of(pair);
    moe_status status;
    moe__kernel_twin_vector(&t, "losses_out", losses_out, MOE_LOSS_SLOTS, real);
    moe__kernel_twin_vector(&t, "stats_out", stats_out, MOE_STAT_SLOTS, real);
    BOTH(write_results, job, losses_out, stats_out);
    return status;
}

/* ---- the gate's gradients -------------------------------------------------------------------- */

static void add_level_gradients(moe__kernel_twin *t, const moe__gate_level *l, int64_t D)
{
    moe__kernel_twin_matrices(t, "d_weight", &l->d_weight_matrix, l->parts, D, l->width);
    moe__kernel_twin_matrices(t, "d_bias", &l->d_bias, l->parts, 1, l->width);
    if (l->noise)
        moe__kernel_twin_matrices(t, "d_noise_weight", &l->d_noise_weight, l->parts, D, l->width);
}

/* What the second gates' exchange reads and writes here. */
static void add_exchanged(moe__kernel_twin *t, const moe__gate_level *l, int64_t D)
{
    int32_t real = real_of(t->pair);
    (void)moe__kernel_twin_rows(t, "d_logits", l->d_logits, l->rows, l->width, l->width, real);
    if (l->noise)
        (void)moe__kernel_twin_rows(t, "d_noise_raw", l->d_noise_raw, l->rows, l->width, l->width,
                                    real);
    (void)moe__kernel_twin_rows(t, "dx_rows", l->dx_rows, l->rows, D, D, real);
}

typedef struct gate_hook {
    moe__kernel_twin *twin;
    moe_status (*second)(moe__gate_backward_job *job);
    void *user;
} gate_hook;

static moe_status second_of_gate(moe__gate_backward_job *job)
{
    moe__route_job *route = job->losses->route;
    gate_hook *hook = route->second_user;
    if (hook->twin->again) return moe__kernel_twin_replay(hook->twin);
    MOE_TRY(moe__kernel_twin_hook_begin(hook->twin));
    job->second = hook->second, route->second_user = hook->user;
    moe_status status = job->second(job);
    job->second = second_of_gate, route->second_user = hook;
    return moe__kernel_twin_hook_end(hook->twin, status);
}

moe_status moe__kernel_twin_gate_backward(const moe__kernel_twin_pair *pair,
                                          moe__gate_backward_job *job)
{
    moe__route_job *route = job->losses->route;
    moe__kernel_twin t = twin_of(pair, "gate_backward", &route->workers);
    gate_hook hook = {&t, job->second, route->second_user};
    int64_t D = route->input_width, E = job->losses->plan->num_experts;
    moe_status status;
    moe__kernel_twin_vector(&t, "loss_factor", job->loss_factor, MOE_LOSS_SLOTS, F64);
    (void)moe__kernel_twin_rows(&t, "d_logits_out", job->d_logits_out, route->level[0].rows,
                                route->level[0].width, job->d_logits_stride, real_of(pair));
    (void)moe__kernel_twin_rows(&t, "dx", job->dx, route->tokens, D, job->dx_stride, pair->dtype);
    moe__kernel_twin_matrices(&t, "d_threshold", &job->d_threshold, 1, 1, E);
    for (int32_t i = 0; i < route->levels; i++)
        if (i == 1 && job->second)
            add_exchanged(&t, &route->level[1], D);
        else
            add_level_gradients(&t, &route->level[i], D);
    if (job->second) job->second = second_of_gate, route->second_user = &hook;
    BOTH(gate_backward, job);
    job->second = hook.second, route->second_user = hook.user;
    return status;
}
