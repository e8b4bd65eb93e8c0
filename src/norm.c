/* norm.c - the squared norm of a layer's gradient over all ranks.
 *
 *     sum over parameters, over experts, over elements of gradient^2, each level in order, in
 *     double
 *
 * The experts of all ranks count, and what every rank has counts once. A rank finds the sums of its
 * own experts; all gather them and add in order of expert, so that every rank has the same bytes,
 * those of one rank with the same gradients. */
#include "pass_state.h"
#include "reals.h"

/* A parameter whose experts are summed: sums[e * step], e from 0. */
typedef struct summing {
    const moe__parameter *p;
    double *sums;
    int64_t step;
} summing;

static double sum_squares(const moe__parameter *p, int64_t expert)
{
    const int64_t *n = p->shape, *s = p->grad_stride, size = moe__dtype_size(p->grad_dtype);
    const char *part = p->grad_each ? p->grad_each[expert]
                                    : (const char *)p->grad + expert * s[0] * size;
    double sum = 0;
    for (int64_t j = 0; part && j < n[1]; j++)
        for (int64_t k = 0; k < n[2]; k++) {
            const void *at = part + moe__parameter_place(p, s, j, k) * size;
            double g = moe__real_at(at, 0, p->grad_dtype);
            sum += g * g;
        }
    return sum;
}

static void sum_range(void *argument, int64_t begin, int64_t end)
{
    const summing *s = argument;
    for (int64_t e = begin; e < end; e++) s->sums[e * s->step] = sum_squares(s->p, e);
}

/* ---- gradients that are not in the host's memory --------------------------------------------- */

/* The same sums over a copy: of each expert in turn, or of the whole. */
static moe_status sum_copies(const moe__workers *w, const moe__parameter *p, double *sums,
                             int64_t step)
{
    const moe__memory *memory = w->context->memory;
    int64_t lowest, size = moe__dtype_size(p->grad_dtype), count = p->per_expert ? p->shape[0] : 1;
    int64_t bytes = moe__parameter_span(p, p->grad_stride, p->per_expert, &lowest) * size;
    moe_status status = MOE_OK;
    char *copy = moe__alloc(w->context, bytes);
    if (!copy)
        return moe__fail(MOE_ERROR_OUT_OF_MEMORY, w->function, "no %lld bytes for a gradient",
                         (ll)bytes);
    for (int64_t i = 0; i < count && status == MOE_OK; i++) {
        moe__parameter here = *p;
        const char *from = p->grad_each ? p->grad_each[i]
                                        : (const char *)p->grad + i * p->grad_stride[0] * size;
        if (!from) continue;
        status = memory->fetch(w, copy, from + lowest * size, bytes);
        here.grad = copy - lowest * size;
        here.grad_each = NULL;
        int64_t rows = p->per_expert ? 1 : p->shape[0];
        for (int64_t e = 0; e < rows && status == MOE_OK; e++)
            sums[(i + e) * step] = sum_squares(&here, e);
    }
    moe__free(w->context, copy, bytes);
    return status;
}

/* sums[e * step] of the first dimension of a parameter; 0 without a gradient. */
static moe_status sum_parameter(moe_layer *layer, const moe__parameter *p, double *sums,
                                int64_t step, void *stream, const char *function)
{
    moe__workers workers = moe__workers_of(layer->context, function, stream);
    summing s = {p, sums, step};
    for (int64_t e = 0; e < p->shape[0]; e++) sums[e * step] = 0;
    if (!p->grad && !p->grad_each) return MOE_OK;
    if (moe__parameter_elements(p) == 0) return MOE_OK;
    if (!layer->context->memory->is_host) return sum_copies(&workers, p, sums, step);
    return moe__parallel_range(layer->context, p->shape[0], 1, sum_range, &s, function);
}

/* Of the routed experts' parameters. */
static bool is_of_experts(const moe_layer *layer, int64_t i)
{
    const moe__listed *entry = &layer->listing.entry[i];
    return moe__is_spread(layer, entry) && !moe__is_of_gate(layer, entry);
}

/* Sums of a gate's parameter that is spread by group: of all ranks in scratch, this rank's after
 * them. */
static moe_status gather_groups(moe_layer *layer, const moe__parameter *p, double *scratch,
                                void *stream, const char *function)
{
    double *own = scratch + layer->gate->config.expert_groups;
    MOE_TRY(sum_parameter(layer, p, own, 1, stream, function));
    return moe_comm_all_gather(layer->comm, scratch, layer->where->first_group, own,
                               (int64_t)sizeof *own);
}

/* all[slots,count] of the experts' parameters, gathered from own[own experts,count]. Ranks may have
 * experts of different kinds: what one has fewer of than `count` is 0. */
static moe_status gather(moe_layer *layer, double *all, double *own, int64_t count, void *stream,
                         const char *function)
{
    int64_t k = 0;
    for (int64_t i = 0; i < layer->experts->config.num_experts * count; i++) own[i] = 0;
    for (int64_t i = 0; i < layer->listing.count; i++)
        if (is_of_experts(layer, i))
            MOE_TRY(sum_parameter(layer, moe__listed_parameter(&layer->listing, i), own + k++,
                                  count, stream, function));
    return moe_comm_all_gather(layer->comm, all, layer->where->first_slot, own,
                               count * (int64_t)sizeof *own);
}

/* Those of all ranks' experts, parameter by parameter. */
static void add_experts(const moe_layer *layer, const double *all, int64_t count, double *total)
{
    const moe__placement *w = layer->where;
    for (int64_t k = 0; k < count; k++) {
        double sum = 0;
        for (int64_t e = 0; e < w->numbers; e++) sum += all[w->first_holder[e] * count + k];
        *total += sum;
    }
}

/* Adds up in the order of the listing, where the experts' parameters follow the gate's. `scratch`
 * has room for the largest first dimension. */
static moe_status add_up(moe_layer *layer, const double *all, int64_t count, double *scratch,
                         double *squared, void *stream, const char *function)
{
    double total = 0;
    int64_t of_gate = layer->gate ? layer->gate->parameters.count : 0;
    if (of_gate == 0) add_experts(layer, all, count, &total);
    for (int64_t i = 0; i < layer->listing.count; i++) {
        const moe__parameter *p = moe__listed_parameter(&layer->listing, i);
        bool by_group = moe__is_spread(layer, &layer->listing.entry[i]);
        int64_t n = by_group ? layer->gate->config.expert_groups : p->shape[0];
        double sum = 0;
        if (is_of_experts(layer, i)) continue;
        MOE_TRY(by_group ? gather_groups(layer, p, scratch, stream, function)
                         : sum_parameter(layer, p, scratch, 1, stream, function));
        for (int64_t e = 0; e < n; e++) sum += scratch[e];
        total += sum;
        if (i + 1 == of_gate) add_experts(layer, all, count, &total);
    }
    *squared = total;
    return MOE_OK;
}

/* After a failure here, of the others. */
static void end_waits(const moe_layer *layer)
{
    if (layer->comm && layer->comm->size > 1) moe_comm_abort(layer->comm);
}

/* A stream that is being captured is refused on every rank alike: nothing has been sent, so that
 * the group goes on. */
static moe_status check_capture(const moe_layer *layer, void *stream, const char *function)
{
    moe__workers workers = moe__workers_of(layer->context, function, stream);
    const moe__memory *memory = layer->context->memory;
    moe_status status = memory->may_wait ? memory->may_wait(&workers) : MOE_OK;
    if (status != MOE_OK && status != MOE_ERROR_INVALID_STATE) end_waits(layer);
    return status;
}

moe_status moe_layer_gradient_norm(moe_layer *layer, double *squared, void *stream)
{
    const char *function = __func__;
    if (!layer || !squared) REFUSE_ARGUMENT("%s is NULL", layer ? "squared" : "layer");
    MOE_TRY(moe__check_stream(layer->context, stream, function));
    MOE_TRY(check_capture(layer, stream, function));
    int64_t count = layer->where ? layer->where->most_parameters : 0;
    int64_t most = 0, own = layer->experts->config.num_experts;
    for (int64_t i = 0; i < layer->listing.count; i++)
        most = moe__max(most, moe__listed_parameter(&layer->listing, i)->shape[0]);
    if (layer->gate) most = moe__max(most, 2 * layer->gate->config.expert_groups);
    int64_t elements = most + (count ? moe__mul(count, own + layer->where->slots) : 0);
    int64_t bytes = moe__mul(moe__max(elements, 1), sizeof(double));
    double *memory = moe__alloc(layer->context, bytes);
    if (!memory) {
        end_waits(layer);
        REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for %lld sums", (ll)elements);
    }
    double *own_sums = memory + most, *all = own_sums + count * own;
    fenv_t saved;
    moe__fenv_enter(&saved);
    moe_status status = count ? gather(layer, all, own_sums, count, stream, function) : MOE_OK;
    if (status == MOE_OK) status = add_up(layer, all, count, memory, squared, stream, function);
    moe__fenv_leave(&saved);
    if (status != MOE_OK) end_waits(layer);
    moe__comm_free(layer->comm, layer->context, memory, bytes);
    return status;
}
