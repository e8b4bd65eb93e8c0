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

/* Groups of a hierarchical gate. */
static int64_t most_parts(const moe_layer *layer)
{
    const moe_gate *g = layer->gate;
    return g && g->config.kind == MOE_GATE_HIERARCHICAL ? g->config.expert_groups : 0;
}

int64_t moe__share_most(const moe_layer *layer)
{
    int64_t P = moe__share_ranks(layer);
    return P > 0 ? moe__share_numbers(P, layer->num_experts, most_parts(layer)) : 0;
}

int32_t moe__share_ranks(const moe_layer *layer)
{
    bool global = layer->config.loss_batch == MOE_BATCH_GLOBAL;
    return global && layer->where && layer->comm->size > 1 ? layer->comm->size : 0;
}

/* Every rank's numbers [P,n], of which `own` are this one's: all on all, then added in order. */
static moe_status add_up(moe_pass *pass, double *all, double *own, int64_t n)
{
    const moe__memory *memory = pass->context->memory;
    int64_t P = moe__pass_comm(pass)->size, bytes = n * (int64_t)sizeof *own;
    MOE_TRY(moe__ranks_gather(pass, all, own, bytes));
    MOE_TRY(pass->call.kernels->travel_add(&pass->workers, all, n, P, MOE_DTYPE_F64));
    return memory->copy(&pass->workers, own, all, bytes);
}

/* Numbers that travel. Where nobody waits they are as many in every call, so that a rank that
 * declines can take part. */
static int64_t count_of(const moe_pass *pass, bool partial, int64_t n)
{
    const moe_layer *layer = pass->layer;
    if (!moe__ranks_blind(pass)) return n;
    return partial ? PARTIAL : numbers(layer->num_experts, most_parts(layer));
}

static moe_status share(moe__losses_job *job, bool partial)
{
    moe_pass *pass = job->share_user;
    const moe__backend *kernels = pass->call.kernels;
    const moe__memory *memory = pass->context->memory;
    int64_t E = job->plan->num_experts, parts = job->part_rows ? job->route->level[0].width : 0, n;
    int64_t room = numbers(E, parts);
    double *all = job->shared, *own = all + moe__pass_comm(pass)->size * room;
    pass->ranks.took_part = pass->ranks.took_part || moe__ranks_blind(pass);
    if (moe__ranks_blind(pass))
        MOE_TRY(memory->zero(&pass->workers, own, room * (int64_t)sizeof *own));
    MOE_TRY(kernels->loss_sums(job, own, partial, false, &n));
    MOE_TRY(add_up(pass, all, own, count_of(pass, partial, n)));
    MOE_TRY(kernels->loss_sums(job, own, partial, true, &n));
    /* A gradient by itself, not through a rank's tokens: rank 0 adds that of all. */
    if (partial || !job->over_taken || moe__pass_comm(pass)->rank == 0) return MOE_OK;
    return memory->zero(&pass->workers, job->over_taken, E * (int64_t)sizeof *job->over_taken);
}

moe_status moe__share_nothing(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__share_ranks(pass->layer), room = moe__share_most(pass->layer) / (P + 1);
    double *all = k->no_sums, *own = all + P * room;
    if (P == 0) return MOE_OK;
    MOE_TRY(pass->context->memory->zero(&pass->workers, own, room * (int64_t)sizeof *own));
    for (int partial = 0; partial < 2; partial++)
        MOE_TRY(
            moe__ranks_gather(pass, all, own, count_of(pass, partial, 0) * (int64_t)sizeof *own));
    return MOE_OK;
}

void moe__share_losses(moe_pass *pass, int32_t uses)
{
    bool shares = (uses & MOE__USE_LAYER) && moe__share_ranks(pass->layer) > 0;
    pass->losses.share = shares ? share : NULL;
    pass->losses.share_user = pass;
    pass->losses.share_both = shares && moe__ranks_blind(pass);
}
