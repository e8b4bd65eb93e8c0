/* backward.c - a backward, step by step.
 *
 *     start     gate and pools are taken -> output -> (rows leave)
 *     work      shared and residual experts, routed experts: gradients by their parameters
 *     finish    dispatch (its adjoint) -> branches -> gate
 */
#include "pass_state.h"

/* ---- the steps ------------------------------------------------------------------------------- */

/* dy through the layer's sigmoid: dy y (1 - y). */
static moe_status output_step(moe_pass *pass, const moe_backward_args *b,
                              const moe__backend *kernels)
{
    int64_t O = pass->experts->config.d_out;
    moe__rows_job job = {.workers = pass->workers,
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
    int64_t element = moe__dtype_size(pass->experts->config.dtype);
    bool ranks = moe__pass_has_ranks(pass, pass->uses);
    moe__rows_job job = {
        .workers = pass->workers,
        .plan = &pass->plan.a,
        .width = D,
        .rows_in = ranks ? pass->ranks.back_rows : pass->experts_job.dx_rows,
        .rows_in_stride = ranks ? pass->ranks.back_bytes / element : D,
        .tokens_in = pass->experts_job.dy,
        .tokens_in_stride = pass->experts_job.dy_stride,
        .tokens_out = b->dx,
        .tokens_out_stride = b->dx_stride,
        .dropped = pass->layer && (pass->uses & MOE__USE_LAYER) ? pass->layer->config.dropped
                                                                : MOE_DROPPED_ZERO,
        .token_mask = pass->route.token_mask,
        .padded_rows = ranks ? moe__ranks_padding(pass) : pass->experts_job.padded_rows,
        .add = (b->flags & MOE_BACKWARD_ADD_DX) != 0};
    return kernels->dispatch_backward(&job);
}

static bool wants_dx(const moe_backward_args *b)
{
    return b->dx && !(b->flags & MOE_BACKWARD_SKIP_DX);
}

static bool wants_weights(const moe_pass *pass, const moe_backward_args *b)
{
    return pass->routed || b->entry_weight_grad || pass->experts_job.plan == &pass->mixed;
}

/* What other ranks must send back. */
static int32_t wants(const moe_pass *pass, const moe_backward_args *b)
{
    bool gate_dx = b->d_gate_x || (pass->gate_saw_x && b->dx);
    return (wants_dx(b) ? MOE__WANT_DX : 0) | (wants_weights(pass, b) ? MOE__WANT_WEIGHTS : 0) |
           (gate_dx && !(b->flags & MOE_BACKWARD_SKIP_DX) ? MOE__WANT_GATE_DX : 0);
}

/* What the experts' backward is about; dy through the output. */
static moe_status begin_experts(moe_pass *pass, const moe_backward_args *b,
                                const moe__backend *kernels)
{
    moe__experts_job *e = &pass->experts_job;
    e->x = b->x ? b->x : pass->x;
    e->x_stride = b->x ? b->x_stride : pass->x_stride;
    e->parameters = !(b->flags & MOE_BACKWARD_SKIP_PARAMETERS);
    e->overwrite = (b->flags & MOE_BACKWARD_OVERWRITE) != 0;
    e->dy = b->dy;
    e->dy_stride = b->dy_stride;
    e->entry_weight_grad = wants_weights(pass, b) ? pass->entry_grad : NULL;
    if (!pass->y_saved) return MOE_OK;
    MOE_TRY(output_step(pass, b, kernels));
    e->dy = pass->dy_inner;
    e->dy_stride = pass->experts->config.d_out;
    return MOE_OK;
}

static moe_status work_step(moe_pass *pass, const moe_backward_args *b, const moe__backend *kernels,
                            const char *function)
{
    bool overwrite = (b->flags & MOE_BACKWARD_OVERWRITE) != 0 &&
                     !(b->flags & MOE_BACKWARD_SKIP_PARAMETERS);
    bool ranks = moe__pass_has_ranks(pass, pass->uses);
    if (ranks) MOE_TRY(moe__ranks_check_backward(pass, function));
    if (overwrite && (pass->uses & MOE__USE_LAYER)) /* its own are added to */
        MOE_TRY(moe__parameters_zero_gradients(&pass->workers, &pass->layer->parameters));
    if (!(pass->uses & MOE__USE_EXPERTS)) return MOE_OK;
    if (moe__pass_has_branches(pass, pass->uses))
        MOE_TRY(moe__branches_work_backward(pass, wants_dx(b), kernels));
    moe__lap(pass, MOE_TIME_EXPERTS);
    if (ranks) return moe__ranks_work_backward(pass, kernels);
    MOE_TRY(moe__experts_rows_backward(pass->experts, &pass->experts_job, wants_dx(b), kernels));
    moe__lap(pass, MOE_TIME_EXPERTS);
    return MOE_OK;
}

static moe_status finish_experts(moe_pass *pass, const moe_backward_args *b,
                                 const moe__backend *kernels)
{
    if (moe__pass_has_ranks(pass, pass->uses)) MOE_TRY(moe__ranks_receive_backward(pass));
    if (wants_dx(b)) MOE_TRY(dispatch_step(pass, b, kernels));
    if (moe__pass_has_branches(pass, pass->uses)) MOE_TRY(moe__branches_backward(pass, b, kernels));
    if (b->entry_weight_grad)
        MOE_TRY(pass->context->memory->copy(&pass->workers, b->entry_weight_grad, pass->entry_grad,
                                            pass->plan.a.entries *
                                                moe__dtype_size(pass->plan.a.dtype)));
    moe__lap(pass, MOE_TIME_COMBINE);
    return MOE_OK;
}

static moe_status gate_backward_step(moe_pass *pass, const moe_backward_args *b, bool with_experts,
                                     const moe__backend *kernels)
{
    moe__gate_backward_job *g = &pass->gate_job;
    bool want_dx = !(b->flags & MOE_BACKWARD_SKIP_DX);
    bool add = (b->flags & MOE_BACKWARD_ADD_DX) != 0;
    const void *moved = b->gate_x ? b->gate_x : pass->gate_saw_x ? b->x : NULL;
    pass->route.x = moved ? moved : pass->gate_x;
    pass->route.x_stride = !moved      ? pass->gate_x_stride
                           : b->gate_x ? b->gate_x_stride
                                       : b->x_stride;
    moe__gate_operands(pass->gate, &pass->route);
    moe__gate_gradients(pass->gate, &pass->route, g, !(b->flags & MOE_BACKWARD_SKIP_PARAMETERS));
    g->losses = &pass->losses;
    g->loss_grad = b->loss_grad;
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

static moe_status finish_steps(moe_pass *pass, const moe_backward_args *b,
                               const moe__backend *kernels)
{
    bool with_experts = (pass->uses & MOE__USE_EXPERTS) != 0;
    bool overwrite = (b->flags & MOE_BACKWARD_OVERWRITE) != 0 &&
                     !(b->flags & MOE_BACKWARD_SKIP_PARAMETERS);
    if (with_experts) MOE_TRY(finish_experts(pass, b, kernels));
    if (!pass->gate || !(pass->uses & MOE__USE_GATE)) return MOE_OK;
    /* Parameters that this forward did not use have gradient 0: set all to it, then add. */
    if (overwrite) MOE_TRY(moe__parameters_zero_gradients(&pass->workers, &pass->gate->parameters));
    if (pass->routed) MOE_TRY(gate_backward_step(pass, b, with_experts, kernels));
    moe__lap(pass, MOE_TIME_GATE);
    return MOE_OK;
}

/* ---- what surrounds them --------------------------------------------------------------------- */

/* One backward at a time per gate and per pool: takes the gate and the pools, or none of them. */
static moe_status take(moe_pass *pass, int32_t uses, const char *function)
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

static void give_back(moe_pass *pass, int32_t uses)
{
    if (pass->gate && (uses & MOE__USE_GATE)) atomic_flag_clear(&pass->gate->backward_running);
    if (uses & MOE__USE_EXPERTS) moe__experts_end_backward(pass->experts);
    if (!(uses & MOE__USE_LAYER)) return;
    if (pass->shared.experts) moe__experts_end_backward(pass->shared.experts);
    if (pass->residual.experts) moe__experts_end_backward(pass->residual.experts);
}

/* The call is over. */
static moe_status end_call(moe_pass *pass, moe_status status)
{
    give_back(pass, pass->uses);
    /* Of a failure that all ranks know nothing has come: a call that some rank refused. */
    if (status != MOE_OK && !pass->ranks.agreed) pass->state = MOE__PASS_FAILED;
    pass->call.phase = MOE__PHASE_NONE;
    return status;
}

void moe__backward_abandon(moe_pass *pass)
{
    if (pass->call.phase != MOE__PHASE_NONE && pass->backward) give_back(pass, pass->uses);
}

/* ---- the phases ------------------------------------------------------------------------------ */

static moe_status start_steps(moe_pass *pass, const moe_backward_args *b,
                              const moe__backend *kernels, const char *function)
{
    bool ranks = moe__pass_has_ranks(pass, pass->uses);
    if (ranks) MOE_TRY(moe__ranks_agree_backward(pass, function));
    if (!(pass->uses & MOE__USE_EXPERTS)) return MOE_OK;
    MOE_TRY(begin_experts(pass, b, kernels));
    moe__lap(pass, MOE_TIME_COMBINE);
    return ranks ? moe__ranks_send_backward(pass) : MOE_OK;
}

moe_status moe__backward_start(moe_pass *pass, const moe_backward_args *args, int32_t uses,
                               const char *function)
{
    moe__call *call = &pass->call;
    MOE_TRY(moe__pass_check_start(pass, uses, function));
    pass->ranks.took_part = pass->ranks.agreed = false;
    pass->ranks.wants = pass->ranks.wanted = 0;
    pass->backward = true;
    moe_status status = moe__backward_check(&call->b, pass, args, uses, function);
    if (status == MOE_OK) status = take(pass, uses, function);
    if (status != MOE_OK) return moe__refuse_on_ranks(pass, uses, status, function, call->b.stream);
    pass->ranks.wants = wants(pass, &call->b);
    moe__begin_report(pass);
    call->kernels = moe__kernels(pass->context, moe__pass_dtype(pass));
    fenv_t saved;
    status = moe__enter_phase(pass, function, call->b.stream, &saved);
    if (status == MOE_OK) status = start_steps(pass, &call->b, call->kernels, function);
    status = moe__leave_phase(pass, uses, status, function, &saved);
    if (status != MOE_OK) return end_call(pass, status);
    call->phase = MOE__PHASE_STARTED;
    return MOE_OK;
}

moe_status moe__backward_work(moe_pass *pass, const char *function)
{
    moe__call *call = &pass->call;
    fenv_t saved;
    moe_status status = moe__enter_phase(pass, function, call->b.stream, &saved);
    if (status == MOE_OK) status = work_step(pass, &call->b, call->kernels, function);
    status = moe__leave_phase(pass, pass->uses, status, function, &saved);
    if (status != MOE_OK) return end_call(pass, status);
    call->phase = MOE__PHASE_WORKED;
    return MOE_OK;
}

moe_status moe__backward_finish(moe_pass *pass, const char *function)
{
    moe__call *call = &pass->call;
    fenv_t saved;
    moe_status status = moe__enter_phase(pass, function, call->b.stream, &saved);
    if (status == MOE_OK) status = finish_steps(pass, &call->b, call->kernels);
    status = moe__leave_phase(pass, pass->uses, status, function, &saved);
    status = end_call(pass, status);
    return status == MOE_OK ? moe__ranks_earlier(pass, function) : status;
}

moe_status moe__run_backward(moe_pass *pass, const moe_backward_args *args, int32_t uses,
                             const char *function)
{
    MOE_TRY(moe__backward_start(pass, args, uses, function));
    MOE_TRY(moe__backward_work(pass, function));
    return moe__backward_finish(pass, function);
}
