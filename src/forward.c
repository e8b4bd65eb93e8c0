/* forward.c - a forward, step by step: the page to read first.
 *
 *     start     route -> plan -> (ranks agree) -> losses -> (rows leave)
 *     work      shared and residual experts, routed experts
 *     finish    combine -> branches -> losses and statistics for the host
 *
 * A gate alone runs the first three steps, a pool alone the last; all go through these functions,
 * and a call that is not cut in pieces runs the three in turn. Arguments were checked before
 * (arguments.c), memory is cut by pass_layout.c, shared experts and residual branch are in
 * branch.c, other ranks in ranks.c, and the arithmetic is the backend's (backend.h). */
#include "pass_state.h"

#include <string.h>

/* ---- routing --------------------------------------------------------------------------------- */

/* Groups, mask and what follows from them; of a routing that is not there yet, where the entries of
 * every token are. */
static moe__batch_job batch_of(moe_pass *pass, const moe__forward *f)
{
    moe__batch_job job = {.workers = pass->workers,
                          .tokens = f->a.tokens,
                          .groups = f->a.groups,
                          .plan = &pass->plan.a,
                          .entries_per_token = f->top_k,
                          .given = f->replay,
                          .group_begin = f->a.group_begin,
                          .token_mask = f->a.token_mask,
                          .mask = pass->mask,
                          .valid_token = pass->valid_token,
                          .valid_begin = pass->valid_begin};
    if (f->route) moe__gate_fill_batch(pass, f, &job);
    return job;
}

/* The weights before dropping are the plan's at first. */
static moe_status copy_weights(const moe_pass *pass, void *to, const void *from)
{
    const moe__plan_arrays *plan = &pass->plan.a;
    return pass->context->memory->copy(&pass->workers, to, from,
                                       plan->entries * moe__dtype_size(plan->dtype));
}

/* Logits, noise, choice, weights, capacity: the plan. */
static moe_status route_step(moe_pass *pass, const moe__forward *f, const moe__backend *kernels)
{
    moe__plan_arrays *plan = &pass->plan.a;
    moe__plan_rows_job rows;
    moe__gate_fill_route(pass, f);
    moe__second_hook(pass, f->uses);
    MOE_TRY(kernels->route_forward(&pass->route));
    MOE_TRY(copy_weights(pass, plan->weight_of_entry, pass->plan_weight));
    moe__gate_fill_rows(pass, f, &rows);
    return kernels->plan_rows(&rows);
}

/* A plan with weights takes the place of the route step: there are no logits. */
static moe_status replay_step(moe_pass *pass, const moe__forward *f)
{
    const moe__plan_arrays *plan = &pass->plan.a;
    memset(&pass->route, 0, sizeof pass->route);
    pass->route.workers = pass->workers;
    pass->route.config = &pass->gate_config;
    pass->route.tokens = plan->tokens;
    pass->route.token_mask = f->a.token_mask ? pass->mask : NULL;
    pass->route.token_begin = plan->token_begin;
    pass->route.expert_of_entry = plan->expert_of_entry;
    pass->route.weight = pass->plan_weight;
    return copy_weights(pass, pass->plan_weight, plan->weight_of_entry);
}

/* Without a gate and a plan every token visits the one expert, with weight 1. */
static moe_status everyone_step(moe_pass *pass, const moe__forward *f, const moe__backend *kernels)
{
    moe__plan_arrays *plan = &pass->plan.a;
    MOE_TRY(kernels->everyone_forward(&pass->workers, plan));
    MOE_TRY(replay_step(pass, f));
    moe__plan_rows_job rows = {.workers = pass->workers,
                               .plan = plan,
                               .token_mask = pass->route.token_mask};
    return kernels->plan_rows(&rows);
}

static moe_status losses_step(moe_pass *pass, const moe__forward *f, const moe__backend *kernels)
{
    moe__losses_job *l = &pass->losses;
    double *results = f->recompute ? pass->again : pass->results; /* counted by the first forward */
    moe__gate_fill_losses(pass, f);
    moe__share_losses(pass, f->uses);
    l->value = results;
    l->stats = results + MOE_LOSS_SLOTS;
    return kernels->losses_forward(l);
}

/* Where the routed experts' rows go: y, or for a recompute that wants none the saved copy. Returns
 * where to keep a copy, or NULL. */
static void *place_output(const moe_pass *pass, const moe__forward *f, moe__rows_job *combine)
{
    bool in_saved = !f->a.y;
    combine->tokens_out = in_saved ? pass->y_saved : f->a.y;
    combine->tokens_out_stride = in_saved ? pass->experts->config.d_out : f->a.y_stride;
    return in_saved ? NULL : pass->y_saved;
}

/* ---- the experts ----------------------------------------------------------------------------- */

/* The plan again without the entries that lost their slot. */
static moe_status plan_again(moe_pass *pass, const moe__forward *f, const moe__backend *kernels)
{
    moe__plan_arrays *plan = &pass->plan.a;
    const moe__memory *memory = pass->context->memory;
    moe__plan_rows_job rows = {.workers = pass->workers, .plan = plan};
    if (f->route) moe__gate_fill_rows(pass, f, &rows);
    MOE_TRY(copy_weights(pass, plan->weight_of_entry, pass->plan_weight));
    rows.token_mask = pass->route.token_mask;
    rows.group_capacity = NULL;
    rows.keep_rows = 0;
    rows.keep_slots = 1;
    MOE_TRY(kernels->plan_rows(&rows));
    if (memory->plan_ready) MOE_TRY(memory->plan_ready(&pass->workers, plan, true));
    return moe__ranks_count(pass);
}

/* The ranks know what comes, or none goes on. */
static moe_status agree_step(moe_pass *pass, const moe__forward *f, const moe__backend *kernels,
                             const char *function)
{
    bool dropped;
    if (!moe__pass_has_ranks(pass, f->uses)) return MOE_OK;
    moe__lap(pass, MOE_TIME_GATE);
    MOE_TRY(moe__ranks_agree(pass, pass->call.save, &dropped, function));
    return dropped ? plan_again(pass, f, kernels) : MOE_OK;
}

static moe_status work_step(moe_pass *pass, const moe__forward *f, const moe__backend *kernels,
                            const char *function)
{
    if (!(f->uses & MOE__USE_EXPERTS)) return MOE_OK;
    if (moe__pass_has_branches(pass, f->uses)) MOE_TRY(moe__branches_work(pass, kernels));
    moe__lap(pass, MOE_TIME_EXPERTS);
    if (moe__pass_has_ranks(pass, f->uses)) return moe__ranks_work(pass, kernels, function);
    MOE_TRY(moe__experts_rows_forward(pass->experts, &pass->experts_job, kernels));
    moe__lap(pass, MOE_TIME_EXPERTS);
    return MOE_OK;
}

static moe_status combine_step(moe_pass *pass, const moe__forward *f, const moe__backend *kernels)
{
    moe__experts_job *e = &pass->experts_job;
    const moe_layer_config *layer = f->uses & MOE__USE_LAYER ? &pass->layer->config : NULL;
    bool sigmoid = layer && layer->output == MOE_OUTPUT_SIGMOID;
    bool branches = moe__pass_has_branches(pass, f->uses);
    bool ranks = moe__pass_has_ranks(pass, f->uses);
    int64_t element = moe__dtype_size(pass->experts->config.dtype);
    if (ranks) MOE_TRY(moe__ranks_receive(pass));
    moe__rows_job combine = {.workers = e->workers,
                             .tokens_in = pass->x,
                             .tokens_in_stride = pass->x_stride,
                             .add = (f->a.flags & MOE_FORWARD_ADD) != 0,
                             .dropped = layer ? layer->dropped : MOE_DROPPED_ZERO,
                             .sigmoid = sigmoid && !branches,
                             .token_mask = f->a.token_mask ? pass->mask : NULL};
    void *saved = place_output(pass, f, &combine);
    if (!branches) combine.tokens_saved = saved;
    if (combine.tokens_out) {
        moe__experts_combine(pass->experts, e, &combine);
        if (ranks) {
            combine.rows_in = pass->ranks.back_rows;
            combine.rows_in_stride = pass->ranks.back_bytes / element;
            combine.padded_rows = moe__ranks_padding(pass);
        }
        MOE_TRY(kernels->combine_forward(&combine));
    }
    if (branches) MOE_TRY(moe__branches_forward(pass, &combine, sigmoid, saved, kernels));
    moe__lap(pass, MOE_TIME_COMBINE);
    return MOE_OK;
}

static moe_status start_steps(moe_pass *pass, const moe__forward *f, const moe__backend *kernels,
                              const char *function)
{
    moe__experts_job *e = &pass->experts_job;
    const moe__memory *memory = pass->context->memory;
    if (f->replay && !f->own_plan)
        MOE_TRY(moe__plan_copy_arrays(&pass->workers, &pass->plan.a, &f->a.plan->a));
    moe__batch_job batch = batch_of(pass, f);
    MOE_TRY(kernels->batch_forward(&batch));
    if (f->route)
        MOE_TRY(route_step(pass, f, kernels));
    else if (f->everyone)
        MOE_TRY(everyone_step(pass, f, kernels));
    else
        MOE_TRY(replay_step(pass, f));
    if (memory->plan_ready)
        MOE_TRY(memory->plan_ready(&pass->workers, &pass->plan.a,
                                   moe__pass_counts_rows(pass, f->uses)));
    MOE_TRY(agree_step(pass, f, kernels, function));
    MOE_TRY(losses_step(pass, f, kernels));
    moe__lap(pass, MOE_TIME_GATE);
    if (!(f->uses & MOE__USE_EXPERTS)) return MOE_OK;
    e->x = pass->x;
    e->x_stride = pass->x_stride;
    MOE_TRY(moe__branches_begin(pass, f, kernels, &e->plan));
    moe__lap(pass, MOE_TIME_EXPERTS);
    return moe__pass_has_ranks(pass, f->uses) ? moe__ranks_send(pass) : MOE_OK;
}

/* ---- what surrounds them --------------------------------------------------------------------- */

/* Remembers where the inputs are, and which config this call has. */
static void note_arguments(moe_pass *pass, const moe__forward *f)
{
    const moe_forward_args *a = &f->a;
    memset(&pass->gate_config, 0, sizeof pass->gate_config);
    if (pass->gate)
        pass->gate_config = moe__gate_config_of_call(&pass->gate->config, f->route ? f->top_k : 1);
    pass->gate_config.num_experts = pass->plan.a.num_experts;
    pass->x = a->x;
    pass->x_stride = a->x_stride;
    pass->gate_saw_x = !a->gate_x;
    pass->gate_x = a->gate_x ? a->gate_x : a->x;
    pass->gate_x_stride = a->gate_x ? a->gate_x_stride : a->x_stride;
    pass->logits_from_host = a->logits_in != NULL;
}

static moe__pass_shape forward_shape(const moe_pass *pass, const moe__forward *f,
                                     double weights[MOE_LOSS_SLOTS])
{
    bool with_experts = (f->uses & MOE__USE_EXPERTS) != 0;
    memset(weights, 0, MOE_LOSS_SLOTS * sizeof *weights);
    if (f->route && f->weights)
        memcpy(weights, f->weights, MOE_LOSS_SLOTS * sizeof *weights);
    else if (f->route)
        moe__gate_loss_weights(&pass->gate->config, weights);
    moe__pass_shape shape = moe__pass_shape_of(
        pass->gate ? &pass->gate->config : NULL, with_experts ? &pass->experts->room : NULL,
        f->uses & MOE__USE_LAYER ? &pass->layer->config : NULL, weights, f->route, f->replay,
        f->a.flags);
    if (f->uses & MOE__USE_LAYER) {
        moe__pass_shape_branches(&shape, pass);
        shape.ranks = moe__pass_has_ranks(pass, f->uses);
        shape.share_ranks = moe__share_ranks(pass->layer);
        shape.num_experts = moe__pass_experts(pass);
    }
    shape.logits_in = f->a.logits_in != NULL;
    if (shape.logits_in && !shape.noise) shape.jitter = 0; /* no product reads the input */
    shape.tokens = f->a.tokens;
    shape.entries = moe__max(f->entries, 0);
    shape.groups = f->a.groups;
    shape.top_k = f->top_k;
    shape.threads = pass->context->threads;
    return shape;
}

/* Which tokens go to which experts is known before the gate has run, unless a threshold decides, or
 * experts take tokens and the mask is not the host's: then they are counted first, in a pass that
 * has room for no entries. */
static moe_status count_entries(moe_pass *pass, moe__forward *f, moe__pass_shape *shape,
                                const moe__backend *kernels, const char *function)
{
    if (f->entries >= 0) return MOE_OK;
    moe__batch_job batch = batch_of(pass, f);
    MOE_TRY(kernels->batch_forward(&batch));
    moe__gate_fill_route(pass, f);
    MOE_TRY(pass->route.choose == MOE__CHOOSE_BY_EXPERT
                ? kernels->entries_taken(&batch, &f->entries)
                : kernels->route_count(&pass->route, &f->entries));
    if (f->entries < 0)
        REFUSE(MOE_ERROR_OVERFLOW, "what %lld tokens send does not fit in 63 bits",
               (ll)f->a.tokens);
    shape->entries = f->entries;
    MOE_TRY(moe__pass_make_room(pass, shape, false, &pass->workers, function));
    moe__set_workers(pass, function, pass->workers.stream);
    return MOE_OK;
}

/* Everything that can be refused before anything is written. */
static moe_status prepare(moe_pass *pass, moe__forward *f, const moe_forward_args *args,
                          int32_t uses, double weights[MOE_LOSS_SLOTS], moe__pass_shape *shape,
                          const char *function)
{
    MOE_TRY(moe__forward_check(f, pass, args, uses, function));
    *shape = forward_shape(pass, f, weights);
    moe__workers call = moe__call_workers(pass, f->a.stream, function);
    return moe__pass_make_room(pass, shape, f->own_plan, &call, function);
}

/* The call is over. */
static void end_call(moe_pass *pass, moe_status status)
{
    const moe__call *call = &pass->call;
    pass->uses = call->f.uses;
    pass->routed = call->f.route;
    pass->primary_shown = call->f.route && !call->f.replay && pass->route.levels == 2;
    pass->state = status != MOE_OK                            ? MOE__PASS_FAILED
                  : call->save                                ? MOE__PASS_SAVED
                  : (call->f.a.flags & MOE_FORWARD_PLAN_ONLY) ? MOE__PASS_PLAN
                                                              : MOE__PASS_EMPTY;
    pass->call.phase = MOE__PHASE_NONE;
}

/* Whether the gate runs in a call with these arguments, whatever else is wrong with them. */
static bool will_route(const moe_pass *pass, const moe_forward_args *args)
{
    if (!pass->gate || !args) return pass->gate != NULL;
    if ((args->flags & MOE_FORWARD_RECOMPUTE) && pass->uses) return pass->routed;
    return !args->plan || args->plan_use == MOE_PLAN_IDS;
}

/* ---- the phases ------------------------------------------------------------------------------ */

moe_status moe__forward_start(moe_pass *pass, const moe_forward_args *args, int32_t uses,
                              const char *function)
{
    moe__call *call = &pass->call;
    moe__pass_shape shape;
    double weights[MOE_LOSS_SLOTS];
    MOE_TRY(moe__pass_check_start(pass, uses, function));
    pass->ranks.took_part = pass->ranks.agreed = pass->backward = false;
    pass->ranks.routes = will_route(pass, args);
    moe_status status = prepare(pass, &call->f, args, uses, weights, &shape, function);
    if (status != MOE_OK)
        return moe__refuse_on_ranks(pass, uses, status, function, call->f.a.stream);
    call->kernels = moe__kernels(pass->context, shape.dtype);
    call->save = shape.save;
    moe__begin_report(pass);
    memcpy(pass->weights, weights, sizeof weights);
    note_arguments(pass, &call->f);

    fenv_t saved;
    status = moe__enter_phase(pass, function, call->f.a.stream, &saved);
    if (status == MOE_OK) status = count_entries(pass, &call->f, &shape, call->kernels, function);
    if (status == MOE_OK) status = start_steps(pass, &call->f, call->kernels, function);
    status = moe__leave_phase(pass, uses, status, function, &saved);
    if (status != MOE_OK)
        end_call(pass, status);
    else
        call->phase = MOE__PHASE_STARTED;
    return status;
}

moe_status moe__forward_work(moe_pass *pass, const char *function)
{
    moe__call *call = &pass->call;
    fenv_t saved;
    moe_status status = moe__enter_phase(pass, function, call->f.a.stream, &saved);
    if (status == MOE_OK) status = work_step(pass, &call->f, call->kernels, function);
    status = moe__leave_phase(pass, call->f.uses, status, function, &saved);
    if (status != MOE_OK)
        end_call(pass, status);
    else
        call->phase = MOE__PHASE_WORKED;
    return status;
}

moe_status moe__forward_finish(moe_pass *pass, const char *function)
{
    moe__call *call = &pass->call;
    const moe_forward_args *a = &call->f.a;
    fenv_t saved;
    moe_status status = moe__enter_phase(pass, function, a->stream, &saved);
    if (status == MOE_OK && (call->f.uses & MOE__USE_EXPERTS))
        status = combine_step(pass, &call->f, call->kernels);
    if (status == MOE_OK && !call->f.recompute && (a->losses_out || a->stats_out))
        status = call->kernels->write_results(&pass->losses, a->losses_out, a->stats_out);
    status = moe__leave_phase(pass, call->f.uses, status, function, &saved);
    end_call(pass, status);
    return status == MOE_OK ? moe__ranks_earlier(pass, function) : status;
}

moe_status moe__run_forward(moe_pass *pass, const moe_forward_args *args, int32_t uses,
                            const char *function)
{
    MOE_TRY(moe__forward_start(pass, args, uses, function));
    MOE_TRY(moe__forward_work(pass, function));
    return moe__forward_finish(pass, function);
}
