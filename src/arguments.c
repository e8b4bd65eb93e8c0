/* arguments.c - the arguments of forward and backward: everything that can be wrong with them is
 * found here, before anything is written. */
#include "pass_state.h"
#include "plan_block.h"

enum {
    BACKWARD_FLAGS = MOE_BACKWARD_OVERWRITE | MOE_BACKWARD_SKIP_DX | MOE_BACKWARD_SKIP_PARAMETERS |
                     MOE_BACKWARD_ADD_DX
};

moe_status moe__check_range(const char *name, int64_t value, int64_t low, int64_t high,
                            const char *function)
{
    if (value < low || value > high)
        REFUSE_ARGUMENT("%s is %lld; it must be in [%lld, %lld]", name, (ll)value, (ll)low,
                        (ll)high);
    return MOE_OK;
}

moe_status moe__check_matrix(const char *name, const void *data, int64_t *stride, int64_t rows,
                             int64_t width, int64_t element, bool required, const char *function)
{
    if (!data && required && rows > 0 && width > 0)
        REFUSE_ARGUMENT("%s is NULL for %lld rows", name, (ll)rows);
    if (*stride < 0) REFUSE_ARGUMENT("%s_stride is %lld", name, (ll)*stride);
    if (*stride == 0) *stride = width;
    if (*stride < width && rows > 1)
        REFUSE_ARGUMENT("%s_stride is %lld, a row has %lld elements", name, (ll)*stride, (ll)width);
    int64_t span = moe__max(*stride, width);
    if (moe__mul(moe__mul(rows, span), element) < 0)
        REFUSE(MOE_ERROR_OVERFLOW, "%s: %lld rows of stride %lld do not fit in 63 bits", name,
               (ll)rows, (ll)span);
    return MOE_OK;
}

/* Whether two matrices of `rows` rows share memory. */
static bool overlap(const void *a, int64_t a_stride, int64_t a_width, const void *b,
                    int64_t b_stride, int64_t b_width, int64_t rows, int64_t element)
{
    if (!a || !b || rows == 0) return false;
    uintptr_t a_begin = (uintptr_t)a, b_begin = (uintptr_t)b;
    uintptr_t a_end = a_begin + (uintptr_t)(((rows - 1) * a_stride + a_width) * element);
    uintptr_t b_end = b_begin + (uintptr_t)(((rows - 1) * b_stride + b_width) * element);
    return a_begin < b_end && b_begin < a_end;
}

/* ---- forward --------------------------------------------------------------------------------- */

static moe_status check_flags(const moe_forward_args *a, const moe_pass *pass, int32_t uses,
                              const char *function)
{
    if (a->flags & ~(uint64_t)MOE__FORWARD_FLAGS)
        REFUSE_ARGUMENT("flags 0x%llx has unknown bits", (unsigned long long)a->flags);
    if ((a->flags & MOE_FORWARD_NO_SAVE) && (a->flags & MOE_FORWARD_PLAN_ONLY))
        REFUSE_ARGUMENT("MOE_FORWARD_NO_SAVE clashes with MOE_FORWARD_PLAN_ONLY");
    if ((a->flags & MOE_FORWARD_RECOMPUTE) &&
        (a->flags & (MOE_FORWARD_NO_SAVE | MOE_FORWARD_PLAN_ONLY | MOE_FORWARD_ADD)))
        REFUSE_ARGUMENT("MOE_FORWARD_RECOMPUTE clashes with NO_SAVE, PLAN_ONLY and ADD");
    if ((a->flags & MOE_FORWARD_RECOMPUTE) && a->plan)
        REFUSE_ARGUMENT("MOE_FORWARD_RECOMPUTE uses the kept plan; plan must be NULL");
    if ((uses & MOE__USE_LAYER) && pass->layer->config.output != MOE_OUTPUT_LINEAR &&
        (a->flags & MOE_FORWARD_ADD))
        REFUSE_ARGUMENT("MOE_FORWARD_ADD clashes with the layer's output function");
    if (a->tokens < 0) REFUSE_ARGUMENT("tokens is %lld", (ll)a->tokens);
    if (a->reserved != 0) REFUSE_ARGUMENT("reserved is %d", (int)a->reserved);
    return moe__check_stream(pass->context, a->stream, function);
}

/* Every masked token of a replayed plan must be without rows, as it was when the plan was made.
 * Where the arrays are not the host's no one waits for them: then the plan's rows count. */
static moe_status check_replayed_mask(const moe_forward_args *a, const moe_pass *pass,
                                      const moe__plan_arrays *plan, const char *function)
{
    if (!pass->context->memory->is_host) return MOE_OK;
    for (int64_t t = 0; a->token_mask && t < a->tokens; t++)
        for (int64_t n = plan->token_begin[t]; n < plan->token_begin[t + 1] && !a->token_mask[t];
             n++)
            if (plan->row_of_entry[n] >= 0)
                REFUSE_ARGUMENT("token_mask masks token %lld, which has rows in the plan", (ll)t);
    return MOE_OK;
}

static moe_status check_replayed_groups(const moe_forward_args *a, const moe_pass *pass,
                                        const moe_plan *replayed, const char *function)
{
    moe__plan_block there;
    moe_status status = MOE_OK;
    moe__workers call = moe__call_workers(pass, a->stream, function);
    if (!a->group_begin) return MOE_OK;
    MOE_TRY(moe__plan_on_host(replayed, &there, pass->context, &call));
    for (int64_t g = 0; g <= there.a.groups && status == MOE_OK; g++)
        if (a->group_begin[g] != there.a.group_begin[g])
            status = moe__fail(MOE_ERROR_INVALID_ARGUMENT, function,
                               "group_begin[%lld] is %lld, the plan has %lld", (ll)g,
                               (ll)a->group_begin[g], (ll)there.a.group_begin[g]);
    moe__plan_block_free(pass->context, &there);
    return status;
}

static moe_status check_replay(const moe__forward *f, const moe_pass *pass,
                               const moe_plan *replayed, int64_t experts, int32_t dtype,
                               const char *function)
{
    const moe_forward_args *a = &f->a;
    const moe__plan_arrays *plan = &replayed->a;
    if (replayed->context->memory != pass->context->memory)
        REFUSE_ARGUMENT("the plan is of a context of %s, the pass of one of %s",
                        replayed->context->memory->name, pass->context->memory->name);
    if (plan->tokens != a->tokens)
        REFUSE_ARGUMENT("the plan is for %lld tokens, tokens is %lld", (ll)plan->tokens,
                        (ll)a->tokens);
    if (plan->num_experts != experts)
        REFUSE_ARGUMENT("the plan is for %lld experts, there are %lld", (ll)plan->num_experts,
                        (ll)experts);
    if (plan->dtype != moe__real_dtype(dtype))
        REFUSE_ARGUMENT("the plan's dtype is %d, the object's is %d", (int)plan->dtype, (int)dtype);
    if (f->recompute) return check_replayed_mask(a, pass, plan, function);
    if (a->top_k != MOE_FROM_CONFIG)
        REFUSE_ARGUMENT("top_k is %lld; with a plan it must be MOE_FROM_CONFIG", (ll)a->top_k);
    if (a->capacity != MOE_FROM_CONFIG)
        REFUSE_ARGUMENT("capacity is %lld; with a plan it must be MOE_FROM_CONFIG",
                        (ll)a->capacity);
    int64_t groups = a->groups == 0 && a->group_begin ? 1 : a->groups;
    if (groups != 0 && groups != plan->groups)
        REFUSE_ARGUMENT("groups is %lld, the plan has %lld", (ll)groups, (ll)plan->groups);
    MOE_TRY(check_replayed_groups(a, pass, replayed, function));
    return check_replayed_mask(a, pass, plan, function);
}

/* Every token to the one expert: nothing to choose, nothing to drop. */
static moe_status check_everyone(moe__forward *f, const char *function)
{
    if (f->a.top_k != MOE_FROM_CONFIG)
        REFUSE_ARGUMENT("top_k is %lld; without a gate it must be MOE_FROM_CONFIG", (ll)f->a.top_k);
    if (f->a.capacity != MOE_FROM_CONFIG)
        REFUSE_ARGUMENT("capacity is %lld; without a gate it must be MOE_FROM_CONFIG",
                        (ll)f->a.capacity);
    f->top_k = 1;
    f->entries = f->a.tokens;
    return MOE_OK;
}

/* Where the routing comes from: the gate, a plan handed in, the one that was kept, or nowhere. */
static moe_status check_routing(moe__forward *f, const moe_pass *pass, const char *function)
{
    const moe_forward_args *a = &f->a;
    int64_t experts = moe__pass_experts(pass);
    int32_t dtype = moe__pass_dtype(pass);
    const moe_plan *plan = NULL;
    if (a->plan_use != MOE_PLAN_IDS_AND_WEIGHTS && a->plan_use != MOE_PLAN_IDS)
        REFUSE_ARGUMENT("plan_use is %d", (int)a->plan_use);
    f->recompute = (a->flags & MOE_FORWARD_RECOMPUTE) != 0;
    if (f->recompute) {
        if (pass->uses != f->uses ||
            (pass->state != MOE__PASS_PLAN && pass->state != MOE__PASS_SAVED))
            REFUSE(MOE_ERROR_INVALID_STATE,
                   "MOE_FORWARD_RECOMPUTE without a forward that kept its plan");
        plan = &pass->plan;
        f->route = pass->routed;
    } else if (a->plan == &pass->primary) {
        REFUSE_ARGUMENT("plan is the primary routing of this pass; hand in a copy of it");
    } else if (a->plan) {
        plan = a->plan;
        f->route = (f->uses & MOE__USE_GATE) && a->plan_use == MOE_PLAN_IDS;
        if (a->plan_use == MOE_PLAN_IDS && !pass->gate)
            REFUSE_ARGUMENT("plan_use is MOE_PLAN_IDS, but there is no gate to find the weights");
        if (f->uses == MOE__USE_GATE && !f->route)
            REFUSE_ARGUMENT("a gate replays a plan with plan_use MOE_PLAN_IDS only");
    } else {
        f->route = (f->uses & MOE__USE_GATE) != 0;
        f->everyone = !f->route && experts == 1;
        if (!f->route && !f->everyone)
            REFUSE_ARGUMENT("plan is NULL, and there is no gate to choose among %lld experts",
                            (ll)experts);
    }
    f->replay = plan != NULL;
    f->own_plan = plan == &pass->plan;
    if (f->own_plan && pass->state == MOE__PASS_FAILED)
        REFUSE(MOE_ERROR_INVALID_STATE,
               "the plan belongs to this pass, which failed in the middle");
    if (plan) {
        f->entries = plan->a.entries;
        MOE_TRY(check_replay(f, pass, plan, experts, dtype, function));
        f->a.groups = plan->a.groups;
        f->a.group_begin = plan->a.group_begin;
        return MOE_OK;
    }
    MOE_TRY(moe__check_groups(a->group_begin, a->groups, a->tokens, function));
    if (f->a.groups == 0) f->a.groups = 1;
    return f->everyone ? check_everyone(f, function) : MOE_OK;
}

/* Entries of a gate that routes: known beforehand, unless a threshold decides. */
static moe_status find_entries(moe__forward *f, const moe_pass *pass, const moe_gate_config *c,
                               const char *function)
{
    const moe_forward_args *a = &f->a;
    bool train = (a->flags & MOE_FORWARD_TRAIN) != 0;
    bool unseen = a->token_mask && !pass->context->memory->is_host;
    fenv_t saved;
    if (!moe__gate_takes_tokens(c)) {
        f->entries = moe__mul(a->tokens, moe__gate_entries_per_token(c, f->top_k));
    } else if (c->kind == MOE_GATE_BALANCED && !train) {
        f->entries = -1;
        return MOE_OK;
    } else {
        if (a->tokens > INT32_MAX)
            REFUSE(MOE_ERROR_OVERFLOW, "tokens is %lld; experts take from at most 2^31 - 1",
                   (ll)a->tokens);
        f->entries = -1;
        if (unseen) return MOE_OK;
        moe__fenv_enter(&saved);
        f->entries = moe__gate_entries_taken(c, a, f->top_k);
        moe__fenv_leave(&saved);
    }
    if (f->entries < 0)
        REFUSE(MOE_ERROR_OVERFLOW, "%lld tokens of %lld experts do not fit in 63 bits",
               (ll)a->tokens, (ll)f->top_k);
    return MOE_OK;
}

static moe_status check_top_k(moe__forward *f, const moe_pass *pass, const moe_gate_config *c,
                              const char *function)
{
    int64_t asked = f->a.top_k, most = moe__gate_most_k(c);
    f->top_k = c->kind == MOE_GATE_SOFTMAX_DENSE ? c->num_experts
               : asked == MOE_FROM_CONFIG        ? c->top_k
                                                 : asked;
    if (asked != MOE_FROM_CONFIG && (asked < 1 || asked > most || f->top_k != asked))
        REFUSE_ARGUMENT("top_k is %lld with %lld experts%s", (ll)asked, (ll)most,
                        most != c->num_experts ? " to choose from" : "");
    if (f->a.capacity < MOE_FROM_CONFIG) REFUSE_ARGUMENT("capacity is %lld", (ll)f->a.capacity);
    return f->replay ? MOE_OK : find_entries(f, pass, c, function);
}

/* A replay must be what a hierarchical gate makes: for each chosen group top_k of its experts. */
static moe_status check_two_levels(const moe__forward *f, const moe_gate_config *c,
                                   const moe__plan_arrays *plan, const char *function)
{
    int64_t per_token = moe__gate_entries_per_token(c, f->top_k);
    int64_t width = c->num_experts / c->expert_groups;
    for (int64_t t = 0; t < plan->tokens; t++) {
        int64_t first = plan->token_begin[t], count = plan->token_begin[t + 1] - first;
        if (count != per_token)
            REFUSE_ARGUMENT("the plan has %lld entries of token %lld, the gate has %lld", (ll)count,
                            (ll)t, (ll)per_token);
        for (int64_t j = 0; j < count; j++) {
            int32_t e = plan->expert_of_entry[first + j];
            int32_t other = plan->expert_of_entry[first + j - j % f->top_k];
            if (e >= 0 && (other < 0 || e / width != other / width))
                REFUSE_ARGUMENT("the plan's entry %lld is expert %d, not of the group of %d",
                                (ll)(first + j), (int)e, (int)other);
        }
    }
    return MOE_OK;
}

/* Whether this call draws numbers at (step, token). */
static bool draws_numbers(const moe__forward *f, const moe_gate_config *c)
{
    const moe_forward_args *a = &f->a;
    bool train = (a->flags & MOE_FORWARD_TRAIN) != 0;
    bool noisy = moe__gate_is_noisy(c), jitter = c->jitter > 0 && (!a->logits_in || noisy);
    if (train && ((noisy && !a->noise) || jitter)) return true;
    if (f->replay) return false;
    if (train && (c->choice_noise || c->second_choice == MOE_SECOND_CHOICE_RANDOM)) return true;
    return moe__gate_is_limited(c, a) && c->drop_policy == MOE_DROP_RANDOM;
}

static moe_status check_noise(const moe__forward *f, const moe_gate_config *c, const char *function)
{
    const int64_t limit = (int64_t)1 << 32; /* words of the counter have 32 bits */
    const moe_forward_args *a = &f->a;
    bool two = c->kind == MOE_GATE_HIERARCHICAL;
    if (a->noise && !moe__gate_is_noisy(c))
        REFUSE_ARGUMENT("noise is given, but the gate's kind %s has none",
                        moe__gate_kind_name(c->kind));
    if (a->noise_primary && !two)
        REFUSE_ARGUMENT("noise_primary is given, but the gate's kind %s has no primary gate",
                        moe__gate_kind_name(c->kind));
    if (two && !a->noise != !a->noise_primary)
        REFUSE_ARGUMENT("%s is given without %s", a->noise ? "noise" : "noise_primary",
                        a->noise ? "noise_primary" : "noise");
    if (!draws_numbers(f, c)) return MOE_OK;
    if (a->step < 0 || a->step >= limit)
        REFUSE_ARGUMENT("step is %lld; with noise it must be in [0, 2^32)", (ll)a->step);
    if (a->token_first < 0 || a->token_first >= limit || a->tokens > limit - a->token_first)
        REFUSE_ARGUMENT(
            "token_first is %lld with %lld tokens; with noise both must stay below 2^32",
            (ll)a->token_first, (ll)a->tokens);
    return MOE_OK;
}

static moe_status check_loss_weights(const moe__forward *f, const moe_gate_config *c,
                                     const char *function)
{
    const double *w = f->weights;
    const char *kind = moe__gate_kind_name(c->kind);
    if (!w) return MOE_OK;
    for (int i = 0; i < MOE_LOSS_SLOTS; i++)
        if (w[i] - w[i] != 0) REFUSE_ARGUMENT("loss_weights[%d] is %g; it must be finite", i, w[i]);
    for (int i = MOE_LOSS_THRESHOLD + 1; i < MOE_LOSS_SLOTS; i++)
        if (w[i] != 0) REFUSE_ARGUMENT("loss_weights[%d] is %g, there is no such loss", i, w[i]);
    if (w[MOE_LOSS_LOAD] != 0 && !moe__gate_is_noisy(c))
        REFUSE_ARGUMENT("loss_weights[MOE_LOSS_LOAD] is %g, but the gate is %s", w[MOE_LOSS_LOAD],
                        kind);
    if (w[MOE_LOSS_THRESHOLD] != 0 && c->kind != MOE_GATE_BALANCED)
        REFUSE_ARGUMENT("loss_weights[MOE_LOSS_THRESHOLD] is %g, but the gate is %s",
                        w[MOE_LOSS_THRESHOLD], kind);
    for (int i = MOE_LOSS_SWITCH; i <= MOE_LOSS_SEQUENCE; i++)
        if (w[i] != 0 && c->kind == MOE_GATE_HIERARCHICAL)
            REFUSE_ARGUMENT("loss_weights[%d] is %g, but the gate is %s: it has no logits of all "
                            "experts",
                            i, w[i], kind);
    return MOE_OK;
}

/* Keys of a hash gate, and what needs logits although the gate may do without. */
static moe_status check_key(const moe__forward *f, const moe_gate_config *c, const char *function)
{
    const moe_forward_args *a = &f->a;
    bool hash = c->kind == MOE_GATE_HASH;
    if (a->token_key && !hash)
        REFUSE_ARGUMENT("token_key is given, but the gate's kind is %s",
                        moe__gate_kind_name(c->kind));
    if (hash && !a->token_key && !f->replay && a->tokens > 0)
        REFUSE_ARGUMENT("token_key is NULL for %lld tokens of MOE_GATE_HASH", (ll)a->tokens);
    if (hash && c->d_model == 0 && !a->logits_in && moe__gate_is_limited(c, a) && !f->replay &&
        c->drop_policy == MOE_DROP_BATCH_PRIORITY)
        REFUSE_ARGUMENT("drop_policy MOE_DROP_BATCH_PRIORITY clashes with kind MOE_GATE_HASH where "
                        "d_model is 0 and logits_in is NULL: there are no scores");
    return MOE_OK;
}

/* Parameters that are read: with the host's logits only those beside them. */
static moe_status check_gate_bound(const moe_gate *gate, bool logits_only, const char *function)
{
    if (!logits_only) return moe__parameters_check_bound(&gate->parameters, function);
    for (int64_t i = 0; i < gate->parameters.count; i++) {
        const moe__parameter *p = &gate->parameters.p[i];
        if (p->kind != MOE_KIND_WEIGHT && !p->data)
            REFUSE(MOE_ERROR_INVALID_STATE, "parameter %s is not bound", p->name);
    }
    return MOE_OK;
}

/* What the gate reads: x or gate_x, the host's logits and noise. */
static moe_status check_gate(moe__forward *f, const moe_pass *pass, const char *function)
{
    moe_forward_args *a = &f->a;
    const moe_gate_config *c = &pass->gate->config;
    int64_t element = moe__dtype_size(c->dtype);
    int64_t real_size = moe__dtype_size(moe__real_dtype(c->dtype));
    MOE_TRY(check_top_k(f, pass, c, function));
    if (f->replay && c->kind == MOE_GATE_HIERARCHICAL) {
        const moe_plan *plan = f->own_plan ? &pass->plan : a->plan;
        moe__plan_block there;
        moe__workers call = moe__call_workers(pass, a->stream, function);
        MOE_TRY(moe__plan_on_host(plan, &there, pass->context, &call));
        moe_status status = check_two_levels(f, c, &there.a, function);
        moe__plan_block_free(pass->context, &there);
        MOE_TRY(status);
    }
    MOE_TRY(check_noise(f, c, function));
    MOE_TRY(check_key(f, c, function));
    f->weights = a->loss_weights;
    MOE_TRY(check_loss_weights(f, c, function));
    if (a->logits_in && c->kind == MOE_GATE_HIERARCHICAL)
        REFUSE_ARGUMENT("logits_in is given, but the gate's kind %s has two levels of them",
                        moe__gate_kind_name(c->kind));
    bool draws = moe__gate_is_noisy(c) && (a->flags & MOE_FORWARD_TRAIN);
    bool reads = draws || (!a->logits_in && c->d_model > 0);
    if (c->d_model == 0 && !a->logits_in && a->tokens > 0 && c->kind != MOE_GATE_HASH)
        REFUSE_ARGUMENT("logits_in is NULL and the gate has no weights (its d_model is 0)");
    if (a->gate_x)
        MOE_TRY(moe__check_matrix("gate_x", a->gate_x, &a->gate_x_stride, a->tokens, c->d_model,
                                  element, reads, function));
    else if (reads && pass->experts && (f->uses & MOE__USE_EXPERTS) &&
             c->d_model != pass->experts->config.d_model)
        REFUSE_ARGUMENT("gate_x is NULL, and x is %lld wide where the gate reads %lld",
                        (ll)pass->experts->config.d_model, (ll)c->d_model);
    else if (reads || !(f->uses & MOE__USE_EXPERTS)) /* else x is the experts' alone, of their
                                                        width */
        MOE_TRY(moe__check_matrix("x", a->x, &a->x_stride, a->tokens, c->d_model, element, reads,
                                  function));
    MOE_TRY(moe__check_matrix("logits", a->logits_in, &a->logits_stride, a->tokens, c->num_experts,
                              real_size, false, function));
    MOE_TRY(moe__check_matrix("noise", a->noise, &a->noise_stride, a->tokens, c->num_experts,
                              real_size, false, function));
    MOE_TRY(moe__check_matrix("noise_primary", a->noise_primary, &a->noise_primary_stride,
                              a->tokens, c->expert_groups, real_size, false, function));
    return check_gate_bound(pass->gate, a->logits_in && !draws, function);
}

/* The layer's own parameters, the pools beside the routed one, and what replicas cannot do. */
static moe_status check_layer(const moe_layer *layer, uint64_t flags, const char *function)
{
    if (layer->where && layer->where->replicas &&
        !(flags & (MOE_FORWARD_NO_SAVE | MOE_FORWARD_PLAN_ONLY)))
        REFUSE(MOE_ERROR_NOT_SUPPORTED,
               "experts have replicas: a forward needs MOE_FORWARD_NO_SAVE");
    MOE_TRY(moe__parameters_check_bound(&layer->parameters, function));
    if (layer->shared) MOE_TRY(moe__experts_check_bound(layer->shared, function));
    return layer->residual ? moe__experts_check_bound(layer->residual, function) : MOE_OK;
}

static moe_status check_experts(moe__forward *f, const moe_pass *pass, const char *function)
{
    moe_forward_args *a = &f->a;
    const moe_experts_config *c = &pass->experts->config;
    int64_t element = moe__dtype_size(c->dtype);
    MOE_TRY(
        moe__check_matrix("x", a->x, &a->x_stride, a->tokens, c->d_model, element, true, function));
    MOE_TRY(moe__check_matrix("y", a->y, &a->y_stride, a->tokens, c->d_out, element, !f->recompute,
                              function));
    if (overlap(a->x, a->x_stride, c->d_model, a->y, a->y_stride, c->d_out, a->tokens, element))
        REFUSE_ARGUMENT("x and y overlap");
    if (f->uses & MOE__USE_LAYER) MOE_TRY(check_layer(pass->layer, a->flags, function));
    return moe__experts_check_bound(pass->experts, function);
}

/* ---- where the arrays are -------------------------------------------------------------------- */

/* An array that a call was given. */
typedef struct named_array {
    const char *name;
    const void *data;
} named_array;

static moe_status check_arrays(const moe__workers *workers, const named_array *array, size_t count)
{
    const moe__memory *memory = workers->context->memory;
    for (size_t i = 0; i < count && memory->check_pointer; i++)
        if (array[i].data) MOE_TRY(memory->check_pointer(workers, array[i].name, array[i].data));
    return MOE_OK;
}

/* Of a backend with memory of its own: that the arrays are there, and that the host can wait where
 * it must: for the rows of experts, and for entries that are not known before. */
static moe_status check_backend(const moe__forward *f, const moe_pass *pass, const char *function)
{
    const moe_forward_args *a = &f->a;
    const moe__memory *memory = pass->context->memory;
    moe__workers workers = moe__call_workers(pass, a->stream, function);
    if (memory->is_host) return MOE_OK;
    bool counted = moe__pass_counts_rows(pass, f->uses);
    bool captured = !moe__pass_has_ranks(pass, f->uses) || moe__comm_captures(pass->layer->comm);
    if (memory->may_wait && (f->entries < 0 || counted || !captured))
        MOE_TRY(memory->may_wait(&workers));
    if (a->tokens == 0) return MOE_OK;
    const named_array array[] = {{"y", a->y},
                                 {"x", a->x},
                                 {"gate_x", f->route ? a->gate_x : NULL},
                                 {"logits_in", f->route ? a->logits_in : NULL},
                                 {"noise", f->route ? a->noise : NULL},
                                 {"noise_primary", f->route ? a->noise_primary : NULL},
                                 {"token_mask", a->token_mask},
                                 {"token_key", f->route ? a->token_key : NULL},
                                 {"losses_out", a->losses_out},
                                 {"stats_out", a->stats_out},
                                 {"plan", a->plan ? a->plan->a.token_begin : NULL}};
    return check_arrays(&workers, array, sizeof array / sizeof *array);
}

static moe_status check_backend_backward(const moe_backward_args *b, const moe_pass *pass,
                                         const char *function)
{
    moe__workers workers = moe__call_workers(pass, b->stream, function);
    if (pass->context->memory->is_host || pass->plan.a.tokens == 0) return MOE_OK;
    const named_array array[] = {{"dx", b->dx},
                                 {"dy", b->dy},
                                 {"d_gate_x", b->d_gate_x},
                                 {"d_logits_out", b->d_logits_out},
                                 {"entry_weight_grad", b->entry_weight_grad},
                                 {"loss_grad", b->loss_grad},
                                 {"x", b->x},
                                 {"gate_x", b->gate_x}};
    return check_arrays(&workers, array, sizeof array / sizeof *array);
}

/* ---- all of a forward ------------------------------------------------------------------------ */

moe_status moe__forward_check(moe__forward *f, const moe_pass *pass, const moe_forward_args *args,
                              int32_t uses, const char *function)
{
    *f = (moe__forward){.uses = uses};
    MOE_TRY(moe__struct_read(&moe__forward_args_info, &f->a, args, false, function));
    MOE_TRY(check_flags(&f->a, pass, uses, function));
    MOE_TRY(check_routing(f, pass, function));
    if (f->route) MOE_TRY(check_gate(f, pass, function));
    if (uses & MOE__USE_EXPERTS)
        MOE_TRY(check_experts(f, pass, function));
    else if (f->a.y)
        REFUSE_ARGUMENT("y must be NULL: a gate writes no y");
    return check_backend(f, pass, function);
}

/* ---- backward -------------------------------------------------------------------------------- */

static moe_status check_backward_flags(const moe_backward_args *b, const moe_pass *pass,
                                       int32_t uses, const char *function)
{
    if (b->flags & ~(uint64_t)BACKWARD_FLAGS)
        REFUSE_ARGUMENT("flags 0x%llx has unknown bits", (unsigned long long)b->flags);
    MOE_TRY(moe__check_stream(pass->context, b->stream, function));
    if (pass->state == MOE__PASS_FAILED)
        REFUSE(MOE_ERROR_INVALID_STATE, "the pass failed in the middle; it needs a new forward");
    if (pass->state != MOE__PASS_SAVED || pass->uses != uses)
        REFUSE(MOE_ERROR_INVALID_STATE,
               "the pass holds no forward of this kind with its activations");
    return MOE_OK;
}

static moe_status check_layer_backward(const moe_layer *layer, const char *function)
{
    MOE_TRY(moe__parameters_check_bound(&layer->parameters, function));
    if (layer->shared) MOE_TRY(moe__experts_check_backward(layer->shared, function));
    return layer->residual ? moe__experts_check_backward(layer->residual, function) : MOE_OK;
}

moe_status moe__backward_check(moe_backward_args *b, const moe_pass *pass,
                               const moe_backward_args *args, int32_t uses, const char *function)
{
    MOE_TRY(moe__struct_read(&moe__backward_args_info, b, args, false, function));
    MOE_TRY(check_backward_flags(b, pass, uses, function));
    int64_t T = pass->plan.a.tokens, E = pass->plan.a.num_experts;
    int64_t element = moe__dtype_size(moe__pass_dtype(pass));
    int64_t real_size = moe__dtype_size(pass->plan.a.dtype);
    const moe_experts_config *c = uses & MOE__USE_EXPERTS ? &pass->experts->config : NULL;
    int64_t gate_width = pass->gate ? pass->gate->config.d_model : 0;
    int64_t width = c ? c->d_model : gate_width;
    if (c)
        MOE_TRY(
            moe__check_matrix("dy", b->dy, &b->dy_stride, T, c->d_out, element, true, function));
    else if (b->dy)
        REFUSE_ARGUMENT("dy must be NULL: a gate has entry_weight_grad instead");
    if (b->x_stride == 0) b->x_stride = pass->x_stride;
    if (b->gate_x_stride == 0) b->gate_x_stride = pass->gate_x_stride;
    if (b->x && (c || pass->gate_saw_x)) /* else nothing reads it */
        MOE_TRY(moe__check_matrix("x", b->x, &b->x_stride, T, width, element, false, function));
    if (b->gate_x && pass->routed)
        MOE_TRY(moe__check_matrix("gate_x", b->gate_x, &b->gate_x_stride, T, gate_width, element,
                                  false, function));
    MOE_TRY(moe__check_matrix("dx", b->dx, &b->dx_stride, T, width, element, false, function));
    MOE_TRY(moe__check_matrix("d_gate_x", b->d_gate_x, &b->d_gate_x_stride, T, gate_width, element,
                              false, function));
    MOE_TRY(moe__check_matrix("d_logits", b->d_logits_out, &b->d_logits_stride, T, E, real_size,
                              false, function));
    if (c && overlap(b->dx, b->dx_stride, width, b->dy, b->dy_stride, c->d_out, T, element))
        REFUSE_ARGUMENT("dx and dy overlap");
    if (b->d_logits_out && pass->routed && pass->route.levels == 2)
        REFUSE_ARGUMENT("d_logits_out is given, but the gate has two levels of logits");
    if (b->d_logits_out && pass->routed && !pass->route.level[0].logits)
        REFUSE_ARGUMENT("d_logits_out is given, but the gate had no logits");
    if (!pass->routed && b->d_gate_x)
        REFUSE_ARGUMENT("d_gate_x is given, but the gate did not run in the forward");
    if (!pass->routed && b->d_logits_out)
        REFUSE_ARGUMENT("d_logits_out is given, but the gate did not run in the forward");
    if (pass->routed && (uses & MOE__USE_GATE))
        MOE_TRY(check_gate_bound(pass->gate, pass->logits_from_host && !pass->route.level[0].noise,
                                 function));
    if (uses & MOE__USE_LAYER) MOE_TRY(check_layer_backward(pass->layer, function));
    if (c) MOE_TRY(moe__experts_check_backward(pass->experts, function));
    return check_backend_backward(b, pass, function);
}
