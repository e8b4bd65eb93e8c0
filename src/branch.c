/* branch.c - what a layer has beside its routed experts: shared experts and the residual branch.
 *
 *     y = c0 routed + c1 residual(x) + s shared(x)
 *
 * Both are pools that every token visits with all its experts, so they run through the same steps
 * as the routed ones, over a plan of every token to every expert. The coefficients of a token are
 * weights of the plans' entries: c0 times the routed weight, c1 and s; where a coefficient is 1
 * there is nothing to find. */
#include "pass_state.h"

#include <string.h>

static moe__mix_job *mix_of(moe_pass *pass, const moe__branch *branch)
{
    const moe_layer_config *c = &pass->layer->config;
    if (branch == &pass->shared) return c->shared_gate ? &pass->shared_mix : NULL;
    return c->residual_mix ? &pass->residual_mix : NULL;
}

static moe__matrices own(const moe_pass *pass, const char *name, bool gradient)
{
    const moe__parameter *p = moe__parameter_by_name(&pass->layer->parameters, name);
    moe__matrices m = moe__parameter_operand(p, gradient);
    if (strcmp(name, "shared_gate") == 0) { /* [D] as [D,1] */
        m.stride_row = m.stride_col;
        m.stride_col = 1;
    }
    return m;
}

/* ---- forward --------------------------------------------------------------------------------- */

/* The plan of a branch; its weights may still be multiplied. */
static moe_status make_plan(moe_pass *pass, moe__branch *branch, const uint8_t *mask,
                            const moe__backend *kernels)
{
    moe__plan_arrays *plan = &branch->plan;
    const moe__memory *memory = pass->context->memory;
    moe__plan_rows_job rows = {.workers = pass->workers, .plan = plan, .token_mask = mask};
    MOE_TRY(memory->copy(&pass->workers, plan->group_begin, pass->plan.a.group_begin,
                         (plan->groups + 1) * (int64_t)sizeof *plan->group_begin));
    MOE_TRY(kernels->everyone_forward(&pass->workers, plan));
    branch->job.workers = pass->workers;
    branch->job.plan = plan;
    branch->job.padded_rows = memory->is_host ? 0 : plan->tokens; /* known without a wait */
    branch->job.x = pass->x;
    branch->job.x_stride = pass->x_stride;
    MOE_TRY(kernels->plan_rows(&rows));
    return memory->plan_ready ? memory->plan_ready(&pass->workers, plan, false) : MOE_OK;
}

static void begin_mix(moe_pass *pass, moe__mix_job *mix, const uint8_t *mask)
{
    const moe__plan_arrays *plan = &pass->plan.a;
    mix->workers = pass->workers;
    mix->tokens = plan->tokens;
    mix->input_width = pass->experts->config.d_model;
    mix->x = pass->x;
    mix->x_stride = pass->x_stride;
    mix->token_mask = mask;
    mix->entry_grad[0] = mix->entry_grad[1] = NULL; /* of an earlier backward */
    mix->groups = plan->groups;
    mix->valid_begin = pass->valid_begin;
    mix->valid_token = mask ? pass->valid_token : NULL;
}

static moe_status find_shared_weights(moe_pass *pass, const uint8_t *mask,
                                      const moe__backend *kernels)
{
    moe__mix_job *mix = &pass->shared_mix;
    begin_mix(pass, mix, mask);
    mix->weight_matrix = own(pass, "shared_gate", false);
    mix->bias = (moe__matrices){0};
    mix->plan[0] = &pass->shared.plan;
    mix->weight_in[0] = NULL;
    mix->weight_out[0] = pass->shared.plan.weight_of_entry;
    return kernels->mix_forward(mix);
}

/* The routed experts then work on a plan with weights of its own, so that what the pass shows stays
 * what the gate gave. */
static moe_status mix_weights(moe_pass *pass, const uint8_t *mask, const moe__backend *kernels)
{
    moe__mix_job *mix = &pass->residual_mix;
    void *weights = pass->mixed.weight_of_entry;
    pass->mixed = pass->plan.a;
    pass->mixed.weight_of_entry = weights;
    begin_mix(pass, mix, mask);
    mix->weight_matrix = own(pass, "residual_mix", false);
    mix->bias = own(pass, "residual_mix_bias", false);
    mix->plan[0] = &pass->plan.a;
    mix->weight_in[0] = pass->plan.a.weight_of_entry;
    mix->weight_out[0] = weights;
    mix->plan[1] = &pass->residual.plan;
    mix->weight_in[1] = NULL;
    mix->weight_out[1] = pass->residual.plan.weight_of_entry;
    return kernels->mix_forward(mix);
}

moe_status moe__branches_begin(moe_pass *pass, const moe__forward *f, const moe__backend *kernels,
                               const moe__plan_arrays **routed)
{
    const uint8_t *mask = f->a.token_mask ? pass->mask : NULL;
    *routed = &pass->plan.a;
    if (!(f->uses & MOE__USE_LAYER)) return MOE_OK;
    if (pass->shared.experts) {
        MOE_TRY(make_plan(pass, &pass->shared, mask, kernels));
        if (mix_of(pass, &pass->shared)) MOE_TRY(find_shared_weights(pass, mask, kernels));
    }
    if (!pass->residual.experts) return MOE_OK;
    MOE_TRY(make_plan(pass, &pass->residual, mask, kernels));
    if (!mix_of(pass, &pass->residual)) return MOE_OK;
    *routed = &pass->mixed;
    return mix_weights(pass, mask, kernels);
}

moe_status moe__branches_work(moe_pass *pass, const moe__backend *kernels)
{
    moe__branch *branch[2] = {&pass->residual, &pass->shared};
    for (int i = 0; i < 2; i++)
        if (branch[i]->experts)
            MOE_TRY(moe__experts_rows_forward(branch[i]->experts, &branch[i]->job, kernels));
    return MOE_OK;
}

/* Adds one branch to y; sigmoid and saved are of the last. */
static moe_status add_branch(moe__branch *branch, const moe__rows_job *to, bool sigmoid,
                             void *saved, const moe__backend *kernels)
{
    if (!to->tokens_out) return MOE_OK; /* a recompute that wants no y */
    moe__rows_job combine = {.workers = to->workers,
                             .tokens_out = to->tokens_out,
                             .tokens_out_stride = to->tokens_out_stride,
                             .add = 1,
                             .sigmoid = sigmoid,
                             .tokens_saved = saved,
                             .token_mask = to->token_mask};
    moe__experts_combine(branch->experts, &branch->job, &combine);
    return kernels->combine_forward(&combine);
}

moe_status moe__branches_forward(moe_pass *pass, const moe__rows_job *to, bool sigmoid, void *saved,
                                 const moe__backend *kernels)
{
    moe__branch *residual = pass->residual.experts ? &pass->residual : NULL;
    moe__branch *shared = pass->shared.experts ? &pass->shared : NULL;
    if (residual)
        MOE_TRY(add_branch(residual, to, sigmoid && !shared, shared ? NULL : saved, kernels));
    return shared ? add_branch(shared, to, sigmoid, saved, kernels) : MOE_OK;
}

/* ---- backward -------------------------------------------------------------------------------- */

/* Every rank has these parameters, so their gradients are summed group by group, as those of a
 * gate: an expert has a row of every token that is not masked, in order. */
static void find_segments(const moe_pass *pass, moe__branch *branch)
{
    const moe__plan_arrays *plan = &branch->plan;
    int64_t G = plan->groups, *begin = branch->segment_begin;
    branch->job.segment_begin = NULL;
    if (!pass->context->memory->is_host) return; /* one rank, one order */
    for (int64_t e = 0; e < plan->num_experts; e++)
        for (int64_t g = 0; g < G; g++)
            begin[e * G + g] = plan->expert_begin[e] + pass->valid_begin[g];
    begin[plan->num_experts * G] = plan->rows;
    branch->job.segment_begin = begin;
    branch->job.segments = G;
}

static moe_status work_backward(moe_pass *pass, moe__branch *branch, bool want_dx,
                                const moe__backend *kernels)
{
    const moe__experts_job *routed = &pass->experts_job;
    moe__experts_job *job = &branch->job;
    job->workers = routed->workers;
    job->x = routed->x;
    job->x_stride = routed->x_stride;
    job->parameters = routed->parameters;
    job->overwrite = routed->overwrite;
    job->dy = routed->dy;
    job->dy_stride = routed->dy_stride;
    job->entry_weight_grad = branch->entry_grad;
    find_segments(pass, branch);
    return moe__experts_rows_backward(branch->experts, job, want_dx, kernels);
}

moe_status moe__branches_work_backward(moe_pass *pass, bool want_dx, const moe__backend *kernels)
{
    moe__branch *branch[2] = {&pass->residual, &pass->shared};
    for (int i = 0; i < 2; i++)
        if (branch[i]->experts) MOE_TRY(work_backward(pass, branch[i], want_dx, kernels));
    return MOE_OK;
}

/* Adds its share to dx. */
static moe_status add_dx(moe_pass *pass, moe__branch *branch, const moe_backward_args *b,
                         const moe__backend *kernels)
{
    int64_t D = branch->experts->config.d_model;
    if (!b->dx || (b->flags & MOE_BACKWARD_SKIP_DX)) return MOE_OK;
    moe__rows_job dispatch = {.workers = pass->workers,
                              .plan = &branch->plan,
                              .width = D,
                              .rows_in = branch->job.dx_rows,
                              .rows_in_stride = D,
                              .tokens_out = b->dx,
                              .tokens_out_stride = b->dx_stride,
                              .padded_rows = branch->job.padded_rows,
                              .add = 1};
    return kernels->dispatch_backward(&dispatch);
}

/* Gradients by a mix's parameters and input. */
static moe_status mix_backward(moe_pass *pass, moe__mix_job *mix, const moe_backward_args *b,
                               const moe__backend *kernels)
{
    bool want_dx = b->dx && !(b->flags & MOE_BACKWARD_SKIP_DX);
    mix->workers = pass->workers;
    mix->x = pass->experts_job.x;
    mix->x_stride = pass->experts_job.x_stride;
    mix->dx = want_dx ? b->dx : NULL;
    mix->dx_stride = b->dx_stride;
    return kernels->mix_backward(mix);
}

moe_status moe__branches_backward(moe_pass *pass, const moe_backward_args *b,
                                  const moe__backend *kernels)
{
    const moe__matrices none = {0};
    bool wanted = !(b->flags & MOE_BACKWARD_SKIP_PARAMETERS);
    moe__mix_job *two = &pass->residual_mix, *one = &pass->shared_mix;
    if (pass->residual.experts) {
        MOE_TRY(add_dx(pass, &pass->residual, b, kernels));
        if (mix_of(pass, &pass->residual)) {
            two->weight_matrix = own(pass, "residual_mix", false);
            two->d_weight_matrix = wanted ? own(pass, "residual_mix", true) : none;
            two->d_bias = wanted ? own(pass, "residual_mix_bias", true) : none;
            two->entry_grad[0] = pass->entry_grad;
            two->entry_grad[1] = pass->residual.entry_grad;
            MOE_TRY(mix_backward(pass, two, b, kernels));
        }
    }
    if (!pass->shared.experts) return MOE_OK;
    MOE_TRY(add_dx(pass, &pass->shared, b, kernels));
    if (!mix_of(pass, &pass->shared)) return MOE_OK;
    one->weight_matrix = own(pass, "shared_gate", false);
    one->d_weight_matrix = wanted ? own(pass, "shared_gate", true) : none;
    one->d_bias = none;
    one->entry_grad[0] = pass->shared.entry_grad;
    return mix_backward(pass, one, b, kernels);
}
