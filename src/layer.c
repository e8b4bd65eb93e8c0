/* layer.c - the layer, step by step: the page to read first.
 *
 *     forward:   route -> plan -> losses -> experts -> combine -> branches
 *     backward:  output -> experts -> dispatch (its adjoint) -> branches -> gate
 *
 * A gate alone runs the first three steps, a pool alone the last two; all go through
 * moe__run_forward and moe__run_backward. Arguments were checked before (arguments.c), memory is
 * cut by pass_layout.c, shared experts and residual branch are in branch.c, and the arithmetic is
 * the backend's (backend.h). */
#include "pass_state.h"

#include <string.h>

/* ---- forward --------------------------------------------------------------------------------- */

/* The empty plan of a gate: the entries of every token, to be filled by the route step, which also
 * finds how many there are where they vary. */
static void start_plan(moe__plan_arrays *plan, const moe__forward *f, const moe_gate *gate)
{
    int64_t K = f->route ? moe__gate_entries_per_token(&gate->config, f->top_k) : f->top_k;
    for (int64_t t = 0; t <= f->a.tokens; t++) plan->token_begin[t] = t * K;
    for (int64_t g = 0; g <= f->a.groups; g++)
        plan->group_begin[g] = f->a.group_begin ? f->a.group_begin[g] : g * f->a.tokens;
}

/* Copies the mask and lists the tokens that are none: valid_token, and where each group's begin. */
static void note_mask(moe_pass *pass, const moe__forward *f)
{
    const moe__plan_arrays *plan = &pass->plan.a;
    int64_t count = 0;
    for (int64_t g = 0; g < plan->groups; g++) {
        pass->valid_begin[g] = count;
        for (int64_t t = plan->group_begin[g]; t < plan->group_begin[g + 1]; t++) {
            pass->mask[t] = !f->a.token_mask || f->a.token_mask[t];
            if (pass->mask[t]) pass->valid_token[count++] = t;
        }
    }
    pass->valid_begin[plan->groups] = count;
}

/* Logits, noise, choice, weights, capacity: the plan. */
static moe_status route_step(moe_pass *pass, const moe__forward *f, const moe__backend *kernels)
{
    moe__plan_arrays *plan = &pass->plan.a;
    moe__plan_rows_job rows;
    moe__gate_fill_route(pass, f);
    MOE_TRY(kernels->route_forward(&pass->route));
    memcpy(plan->weight_of_entry, pass->plan_weight,
           (size_t)(plan->entries * moe__dtype_size(plan->dtype)));
    moe__gate_fill_rows(pass, f, &rows);
    return kernels->plan_rows(&rows);
}

/* A plan with weights takes the place of the route step: there are no logits. */
static void replay_step(moe_pass *pass, const moe__forward *f)
{
    const moe__plan_arrays *plan = &pass->plan.a;
    moe__workers workers = pass->route.workers;
    memset(&pass->route, 0, sizeof pass->route);
    pass->route.workers = workers;
    pass->route.config = &pass->gate_config;
    pass->route.tokens = plan->tokens;
    pass->route.token_mask = f->a.token_mask ? pass->mask : NULL;
    pass->route.token_begin = plan->token_begin;
    pass->route.expert_of_entry = plan->expert_of_entry;
    pass->route.weight = pass->plan_weight;
    memcpy(pass->plan_weight, plan->weight_of_entry,
           (size_t)(plan->entries * moe__dtype_size(plan->dtype)));
}

/* Without a gate and a plan every token visits the one expert, with weight 1. */
static moe_status everyone_step(moe_pass *pass, const moe__forward *f, const moe__backend *kernels)
{
    moe__plan_arrays *plan = &pass->plan.a;
    moe__everyone_entries(plan);
    replay_step(pass, f);
    moe__plan_rows_job rows = {.workers = pass->route.workers,
                               .plan = plan,
                               .token_mask = pass->route.token_mask};
    return kernels->plan_rows(&rows);
}

static moe_status losses_step(moe_pass *pass, const moe__forward *f, const moe__backend *kernels)
{
    moe__losses_job *l = &pass->losses;
    double value[MOE_LOSS_SLOTS], stats[MOE_STAT_SLOTS];
    moe__gate_fill_losses(pass, f);
    l->value = value;
    l->stats = stats;
    MOE_TRY(kernels->losses_forward(l));
    for (int64_t e = 0; e < pass->plan.a.num_experts; e++)
        pass->rows_of_expert[e] = pass->plan.a.expert_begin[e + 1] - pass->plan.a.expert_begin[e];
    if (f->recompute) return MOE_OK; /* they were counted by the first forward */
    memcpy(pass->value, value, sizeof value);
    memcpy(pass->stats, stats, sizeof stats);
    pass->total = 0;
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) pass->total += value[i];
    return MOE_OK;
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

static moe_status experts_step(moe_pass *pass, const moe__forward *f, const moe__backend *kernels)
{
    moe__experts_job *e = &pass->experts_job;
    const moe_layer_config *layer = f->uses & MOE__USE_LAYER ? &pass->layer->config : NULL;
    bool sigmoid = layer && layer->output == MOE_OUTPUT_SIGMOID;
    bool branches = moe__pass_has_branches(pass, f->uses);
    bool ranks = moe__pass_has_ranks(pass, f->uses);
    bool save = (f->a.flags & (MOE_FORWARD_NO_SAVE | MOE_FORWARD_PLAN_ONLY)) == 0;
    e->x = pass->x;
    e->x_stride = pass->x_stride;
    MOE_TRY(moe__branches_begin(pass, f, kernels, &e->plan));
    MOE_TRY(ranks ? moe__ranks_forward(pass, e->plan, save, kernels, e->workers.function)
                  : moe__experts_rows_forward(pass->experts, e, kernels));
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
        if (ranks) combine.rows_in = pass->ranks.here;
        MOE_TRY(kernels->combine_forward(&combine));
    }
    return branches ? moe__branches_forward(pass, &combine, sigmoid, saved, kernels) : MOE_OK;
}

static moe_status forward_steps(moe_pass *pass, const moe__forward *f, const moe__backend *kernels)
{
    if (f->replay && !f->own_plan)
        moe__plan_copy_arrays(&pass->plan.a, &f->a.plan->a);
    else if (!f->replay)
        start_plan(&pass->plan.a, f, pass->gate);
    note_mask(pass, f);
    if (f->route)
        MOE_TRY(route_step(pass, f, kernels));
    else if (f->everyone)
        MOE_TRY(everyone_step(pass, f, kernels));
    else
        replay_step(pass, f);
    MOE_TRY(losses_step(pass, f, kernels));
    if (f->uses & MOE__USE_EXPERTS) return experts_step(pass, f, kernels);
    return MOE_OK;
}

/* For the messages of the steps. */
static void name_function(moe_pass *pass, const char *function)
{
    pass->route.workers.function = pass->experts_job.workers.function = function;
}

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

/* Losses and statistics on the host's side, in the layer's dtype. */
static void write_results(const moe_pass *pass, const moe_forward_args *a)
{
    bool f64 = pass->plan.a.dtype == MOE_DTYPE_F64;
    for (int i = 0; a->losses_out && i < MOE_LOSS_SLOTS; i++) {
        if (f64)
            ((double *)a->losses_out)[i] = pass->value[i];
        else
            ((float *)a->losses_out)[i] = (float)pass->value[i];
    }
    for (int i = 0; a->stats_out && i < MOE_STAT_SLOTS; i++) {
        if (f64)
            ((double *)a->stats_out)[i] = pass->stats[i];
        else
            ((float *)a->stats_out)[i] = (float)pass->stats[i];
    }
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

/* Which tokens go to which experts is known before the gate has run, unless a threshold decides:
 * then it counts first, in a pass that has room for no entries. */
static moe_status count_entries(moe_pass *pass, moe__forward *f, moe__pass_shape *shape,
                                const moe__backend *kernels, const char *function)
{
    if (f->entries >= 0) return MOE_OK;
    start_plan(&pass->plan.a, f, pass->gate);
    note_mask(pass, f);
    moe__gate_fill_route(pass, f);
    MOE_TRY(kernels->route_count(&pass->route, &f->entries));
    shape->entries = f->entries;
    MOE_TRY(moe__pass_make_room(pass, shape, false, function));
    name_function(pass, function);
    return MOE_OK;
}

/* A layer on several ranks takes part in every call, so that the others need not wait for one that
 * fails here. */
static moe_status fail_on_ranks(moe_pass *pass, int32_t uses, bool backward, moe_status status,
                                const char *function)
{
    if (status == MOE_OK || !moe__pass_has_ranks(pass, uses)) return status;
    return moe__ranks_decline(pass, backward, status, function);
}

/* Everything that can be refused before anything is written. */
static moe_status prepare_forward(moe_pass *pass, moe__forward *f, const moe_forward_args *args,
                                  int32_t uses, double weights[MOE_LOSS_SLOTS],
                                  moe__pass_shape *shape, const char *function)
{
    MOE_TRY(moe__forward_check(f, pass, args, uses, function));
    *shape = forward_shape(pass, f, weights);
    return moe__pass_make_room(pass, shape, f->own_plan, function);
}

moe_status moe__run_forward(moe_pass *pass, const moe_forward_args *args, int32_t uses,
                            const char *function)
{
    moe__forward f;
    moe__pass_shape shape;
    double weights[MOE_LOSS_SLOTS];
    pass->ranks.took_part = pass->ranks.agreed = false;
    moe_status status = prepare_forward(pass, &f, args, uses, weights, &shape, function);
    if (status != MOE_OK) return fail_on_ranks(pass, uses, false, status, function);
    const moe__backend *kernels = moe__kernels(pass->context, shape.dtype);

    memcpy(pass->weights, weights, sizeof weights);
    note_arguments(pass, &f);
    name_function(pass, function);
    fenv_t saved;
    moe__fenv_enter(&saved);
    status = count_entries(pass, &f, &shape, kernels, function);
    if (status == MOE_OK) status = forward_steps(pass, &f, kernels);
    status = fail_on_ranks(pass, uses, false, status, function);
    if (status == MOE_OK && !f.recompute) write_results(pass, &f.a);
    moe__fenv_leave(&saved);

    pass->uses = uses;
    pass->routed = f.route;
    pass->primary_shown = f.route && !f.replay && pass->route.levels == 2;
    pass->state = status != MOE_OK                      ? MOE__PASS_FAILED
                  : shape.save                          ? MOE__PASS_SAVED
                  : (f.a.flags & MOE_FORWARD_PLAN_ONLY) ? MOE__PASS_PLAN
                                                        : MOE__PASS_EMPTY;
    return status;
}

/* ---- backward -------------------------------------------------------------------------------- */

/* dy through the layer's sigmoid: dy y (1 - y). */
static moe_status output_step(moe_pass *pass, const moe_backward_args *b,
                              const moe__backend *kernels)
{
    int64_t O = pass->experts->config.d_out;
    moe__rows_job job = {.workers = pass->experts_job.workers,
                         .plan = &pass->plan.a,
                         .width = O,
                         .tokens_in = b->dy,
                         .tokens_in_stride = b->dy_stride,
                         .tokens_out = pass->dy_inner,
                         .tokens_out_stride = O,
                         .tokens_saved = pass->y_saved};
    return kernels->output_backward(&job);
}

/* dx[T,D] of the experts' rows. */
static moe_status dispatch_step(moe_pass *pass, const moe_backward_args *b,
                                const moe__backend *kernels)
{
    int64_t D = pass->experts->config.d_model;
    moe__rows_job job = {
        .workers = pass->experts_job.workers,
        .plan = &pass->plan.a,
        .width = D,
        .rows_in = moe__pass_has_ranks(pass, pass->uses) ? pass->ranks.here
                                                         : pass->experts_job.dx_rows,
        .rows_in_stride = D,
        .tokens_in = pass->experts_job.dy,
        .tokens_in_stride = pass->experts_job.dy_stride,
        .tokens_out = b->dx,
        .tokens_out_stride = b->dx_stride,
        .dropped = pass->layer && (pass->uses & MOE__USE_LAYER) ? pass->layer->config.dropped
                                                                : MOE_DROPPED_ZERO,
        .token_mask = pass->route.token_mask,
        .add = (b->flags & MOE_BACKWARD_ADD_DX) != 0};
    return kernels->dispatch_backward(&job);
}

static moe_status experts_backward_step(moe_pass *pass, const moe_backward_args *b,
                                        const moe__backend *kernels)
{
    moe__experts_job *e = &pass->experts_job;
    bool parameters = !(b->flags & MOE_BACKWARD_SKIP_PARAMETERS);
    bool want_dx = b->dx && !(b->flags & MOE_BACKWARD_SKIP_DX);
    e->x = b->x ? b->x : pass->x;
    e->x_stride = b->x ? b->x_stride : pass->x_stride;
    e->parameters = parameters;
    e->overwrite = (b->flags & MOE_BACKWARD_OVERWRITE) != 0;
    e->dy = b->dy;
    e->dy_stride = b->dy_stride;
    bool mixed = e->plan == &pass->mixed;
    bool weights = pass->routed || b->entry_weight_grad || mixed;
    e->entry_weight_grad = weights ? pass->entry_grad : NULL;
    if (pass->y_saved) {
        MOE_TRY(output_step(pass, b, kernels));
        e->dy = pass->dy_inner;
        e->dy_stride = pass->experts->config.d_out;
    }
    MOE_TRY(moe__pass_has_ranks(pass, pass->uses)
                ? moe__ranks_backward(pass, e, want_dx, kernels)
                : moe__experts_rows_backward(pass->experts, e, want_dx, kernels));
    if (want_dx) MOE_TRY(dispatch_step(pass, b, kernels));
    if (moe__pass_has_branches(pass, pass->uses)) MOE_TRY(moe__branches_backward(pass, b, kernels));
    if (b->entry_weight_grad)
        memcpy(b->entry_weight_grad, pass->entry_grad,
               (size_t)(pass->plan.a.entries * moe__dtype_size(pass->plan.a.dtype)));
    return MOE_OK;
}

/* Weight of each loss times the host's factor. */
static void find_loss_factors(moe_pass *pass, const moe_backward_args *b)
{
    bool f64 = pass->plan.a.dtype == MOE_DTYPE_F64;
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) {
        double factor = !b->loss_grad ? 1
                        : f64         ? ((const double *)b->loss_grad)[i]
                                      : (double)((const float *)b->loss_grad)[i];
        pass->factor[i] = pass->weights[i] != 0 ? pass->weights[i] * factor : 0;
    }
}

static moe_status gate_backward_step(moe_pass *pass, const moe_backward_args *b, bool with_experts,
                                     const moe__backend *kernels)
{
    moe__gate_backward_job *g = &pass->gate_job;
    bool want_dx = !(b->flags & MOE_BACKWARD_SKIP_DX);
    bool add = (b->flags & MOE_BACKWARD_ADD_DX) != 0;
    const void *moved = b->gate_x ? b->gate_x : pass->gate_saw_x ? b->x : NULL;
    find_loss_factors(pass, b);
    pass->route.x = moved ? moved : pass->gate_x;
    pass->route.x_stride = !moved      ? pass->gate_x_stride
                           : b->gate_x ? b->gate_x_stride
                                       : b->x_stride;
    moe__gate_operands(pass->gate, &pass->route);
    moe__gate_gradients(pass->gate, &pass->route, g, !(b->flags & MOE_BACKWARD_SKIP_PARAMETERS));
    g->losses = &pass->losses;
    g->loss_factor = pass->factor;
    g->entry_weight_grad = with_experts ? pass->entry_grad : b->entry_weight_grad;
    g->dx = NULL;
    if (want_dx && b->d_gate_x) {
        g->dx = b->d_gate_x;
        g->dx_stride = b->d_gate_x_stride;
        g->dx_add = add;
    } else if (want_dx && pass->gate_saw_x && b->dx) {
        g->dx = b->dx;
        g->dx_stride = b->dx_stride;
        g->dx_add = with_experts || add; /* the experts' share is there already */
    }
    g->d_logits_out = want_dx ? b->d_logits_out : NULL;
    g->d_logits_stride = b->d_logits_stride;
    g->logits_from_host = pass->logits_from_host;
    return kernels->gate_backward(g);
}

static moe_status backward_steps(moe_pass *pass, const moe_backward_args *b, int32_t uses,
                                 const moe__backend *kernels)
{
    bool with_experts = (uses & MOE__USE_EXPERTS) != 0;
    bool overwrite = (b->flags & MOE_BACKWARD_OVERWRITE) != 0 &&
                     !(b->flags & MOE_BACKWARD_SKIP_PARAMETERS);
    if (overwrite && (uses & MOE__USE_LAYER)) /* its own are added to */
        MOE_TRY(moe__parameters_zero_gradients(&pass->layer->parameters, ""));
    if (with_experts) MOE_TRY(experts_backward_step(pass, b, kernels));
    if (!pass->gate || !(uses & MOE__USE_GATE)) return MOE_OK;
    /* Parameters that this forward did not use have gradient 0: set all to it, then add. */
    if (overwrite) MOE_TRY(moe_gate_zero_gradients(pass->gate, NULL));
    return pass->routed ? gate_backward_step(pass, b, with_experts, kernels) : MOE_OK;
}

/* One backward at a time per gate and per pool: takes the gate and the pools, or none of them. */
static moe_status begin_backward(moe_pass *pass, int32_t uses, const char *function)
{
    bool with_gate = pass->gate && (uses & MOE__USE_GATE), layer = (uses & MOE__USE_LAYER) != 0;
    moe_experts *pool[3] = {uses & MOE__USE_EXPERTS ? pass->experts : NULL,
                            layer ? pass->shared.experts : NULL,
                            layer ? pass->residual.experts : NULL};
    if (with_gate && atomic_flag_test_and_set(&pass->gate->backward_running))
        REFUSE(MOE_ERROR_INVALID_STATE, "another backward of the gate is running");
    for (int i = 0; i < 3; i++) {
        if (!pool[i] || moe__experts_begin_backward(pool[i])) continue;
        while (i-- > 0)
            if (pool[i]) moe__experts_end_backward(pool[i]);
        if (with_gate) atomic_flag_clear(&pass->gate->backward_running);
        REFUSE(MOE_ERROR_INVALID_STATE, "another backward of the expert pool is running");
    }
    return MOE_OK;
}

static void end_backward(moe_pass *pass, int32_t uses)
{
    if (pass->gate && (uses & MOE__USE_GATE)) atomic_flag_clear(&pass->gate->backward_running);
    if (uses & MOE__USE_EXPERTS) moe__experts_end_backward(pass->experts);
    if (!(uses & MOE__USE_LAYER)) return;
    if (pass->shared.experts) moe__experts_end_backward(pass->shared.experts);
    if (pass->residual.experts) moe__experts_end_backward(pass->residual.experts);
}

moe_status moe__run_backward(moe_pass *pass, const moe_backward_args *args, int32_t uses,
                             const char *function)
{
    moe_backward_args b;
    pass->ranks.took_part = pass->ranks.agreed = false;
    moe_status status = moe__backward_check(&b, pass, args, uses, function);
    if (status == MOE_OK) status = begin_backward(pass, uses, function);
    if (status != MOE_OK) return fail_on_ranks(pass, uses, true, status, function);
    if (moe__pass_has_ranks(pass, uses)) status = moe__ranks_begin_backward(pass, function);
    if (status != MOE_OK) {
        end_backward(pass, uses);
        if (!pass->ranks.agreed) pass->state = MOE__PASS_FAILED;
        return status;
    }
    const moe__backend *kernels = moe__kernels(pass->context, pass->plan.a.dtype);
    name_function(pass, function);
    fenv_t saved;
    moe__fenv_enter(&saved);
    status = backward_steps(pass, &b, uses, kernels);
    moe__fenv_leave(&saved);
    end_backward(pass, uses);
    if (status != MOE_OK) pass->state = MOE__PASS_FAILED;
    return status;
}

/* ---- the calls ------------------------------------------------------------------------------- */

static moe_status check_pass(const moe_layer *layer, const moe_pass *pass, const char *function)
{
    if (!layer) REFUSE_ARGUMENT("layer is NULL");
    if (!pass) REFUSE_ARGUMENT("pass is NULL");
    if (pass->layer != layer) REFUSE_ARGUMENT("the pass was made for another layer");
    return MOE_OK;
}

moe_status moe_layer_forward(moe_layer *layer, moe_pass *pass, const moe_forward_args *args)
{
    MOE_TRY(check_pass(layer, pass, __func__));
    int32_t uses = MOE__USE_LAYER | MOE__USE_EXPERTS | (layer->gate ? MOE__USE_GATE : 0);
    return moe__run_forward(pass, args, uses, __func__);
}

moe_status moe_layer_backward(moe_layer *layer, moe_pass *pass, const moe_backward_args *args)
{
    MOE_TRY(check_pass(layer, pass, __func__));
    int32_t uses = MOE__USE_LAYER | MOE__USE_EXPERTS | (layer->gate ? MOE__USE_GATE : 0);
    return moe__run_backward(pass, args, uses, __func__);
}
