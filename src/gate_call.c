/* gate_call.c - a gate in one call: what its config comes to, how many entries there will be, and
 * the jobs of the route, losses and gate backward steps. */
#include "capacity.h"
#include "pass_state.h"
#include "philox.h"

/* ---- what the config comes to ---------------------------------------------------------------- */

bool moe__gate_takes_tokens(const moe_gate_config *c) { return moe__takes_tokens(c); }

bool moe__gate_is_noisy(const moe_gate_config *c)
{
    return c->kind == MOE_GATE_NOISY_TOP_K || c->kind == MOE_GATE_HIERARCHICAL;
}

int64_t moe__gate_most_k(const moe_gate_config *c)
{
    int64_t of_group = c->num_experts / c->expert_groups;
    if (c->kind == MOE_GATE_HIERARCHICAL) return of_group;
    return c->kind == MOE_GATE_TOP_K ? c->top_groups * of_group : c->num_experts;
}

int64_t moe__gate_entries_per_token(const moe_gate_config *c, int64_t top_k)
{
    return moe__entries_per_token(c, top_k);
}

/* Each kind is one way to choose and one way to weigh; the kernels know those only. */
moe_gate_config moe__gate_config_of_call(const moe_gate_config *config, int64_t top_k)
{
    moe_gate_config c = *config;
    c.top_k = c.kind == MOE_GATE_SOFTMAX_DENSE ? c.num_experts : top_k;
    if (c.kind == MOE_GATE_EXPERT_CHOICE) c.order = MOE_ORDER_SCORE_THEN_SELECT;
    if (c.kind == MOE_GATE_BALANCED) {
        c.order = MOE_ORDER_SCORE_THEN_SELECT;
        c.renormalize = 1;
        c.renormalize_epsilon = c.renormalize_minimum = 0;
    }
    return c;
}

static int32_t how_to_choose(const moe__forward *f, const moe_gate_config *c)
{
    bool train = (f->a.flags & MOE_FORWARD_TRAIN) != 0;
    if (f->replay) return MOE__CHOOSE_GIVEN;
    switch (c->kind) {
    case MOE_GATE_SOFTMAX_DENSE: return MOE__CHOOSE_ALL;
    case MOE_GATE_HASH: return MOE__CHOOSE_KEY;
    case MOE_GATE_EXPERT_CHOICE: return MOE__CHOOSE_BY_EXPERT;
    case MOE_GATE_BALANCED: return train ? MOE__CHOOSE_BY_EXPERT : MOE__CHOOSE_THRESHOLD;
    default: return MOE__CHOOSE_TOP;
    }
}

/* ---- capacity -------------------------------------------------------------------------------- */

bool moe__gate_is_limited(const moe_gate_config *c, const moe_forward_args *a)
{
    return a->capacity != MOE_FROM_CONFIG || c->capacity_kind != MOE_CAPACITY_NONE;
}

int64_t moe__gate_entries_taken(const moe_gate_config *config, const moe_forward_args *a,
                                int64_t top_k)
{
    moe_gate_config c = moe__gate_config_of_call(config, top_k);
    int32_t train = (a->flags & MOE_FORWARD_TRAIN) != 0;
    int64_t entries = 0, groups = moe__max(a->groups, 1);
    for (int64_t g = 0; g < groups; g++) {
        int64_t first = a->group_begin ? a->group_begin[g] : 0, tokens = 0;
        int64_t last = a->group_begin ? a->group_begin[g + 1] : a->tokens;
        for (int64_t t = first; t < last; t++) tokens += !a->token_mask || a->token_mask[t];
        int64_t rows = moe__capacity_of_group(&c, a->capacity, tokens, train);
        entries = moe__add(entries, moe__mul(c.num_experts, rows));
    }
    return entries;
}

/* Where experts take tokens K f T / E and what rounding, minimum and multiple add in each group, or
 * `capacity` in each; thresholds may choose them all. */
int64_t moe__gate_most_entries(const moe_gate_config *c, int64_t tokens, int64_t groups,
                               int64_t top_k, bool train)
{
    int64_t all = moe__mul(tokens, c->num_experts);
    double E = (double)c->num_experts, G = (double)groups;
    if (!moe__gate_takes_tokens(c)) return moe__mul(tokens, moe__gate_entries_per_token(c, top_k));
    if (c->kind == MOE_GATE_BALANCED && !train) return all;
    double factor = c->capacity_factor_eval > c->capacity_factor ? c->capacity_factor_eval
                                                                 : c->capacity_factor,
           more = (double)c->capacity_minimum;
    double by_factor = factor * (double)top_k * ((double)tokens + G * E);
    more += (double)c->capacity_multiple + (double)top_k * (factor + 2);
    double most = c->capacity_kind == MOE_CAPACITY_NUMBER ? (double)c->capacity * G * E
                                                          : by_factor + more * G * E;
    return all >= 0 && most >= (double)all ? all : most < 9e18 ? (int64_t)most : -1;
}

/* ---- parameters ------------------------------------------------------------------------------ */

/* [parts,D,n], [D,n] or [n] of a parameter's data or gradient. */
static moe__matrices gate_operand(const moe_gate *gate, const char *name, bool gradient)
{
    const moe__parameter *p = moe__parameter_by_name(&gate->parameters, name);
    return p ? moe__parameter_operand(p, gradient) : (moe__matrices){0};
}

void moe__gate_operands(const moe_gate *gate, moe__route_job *job)
{
    moe__gate_level *last = &job->level[job->levels == 2];
    last->weight_matrix = gate_operand(gate, "weight", false);
    last->bias = gate_operand(gate, "bias", false);
    last->noise_weight = gate_operand(gate, "noise_weight", false);
    job->selection_bias = gate_operand(gate, "selection_bias", false);
    job->threshold = gate_operand(gate, "threshold", false);
    if (job->levels == 1) return;
    job->level[0].weight_matrix = gate_operand(gate, "primary_weight", false);
    job->level[0].noise_weight = gate_operand(gate, "primary_noise_weight", false);
    job->level[0].bias = (moe__matrices){0};
}

void moe__gate_gradients(const moe_gate *gate, moe__route_job *job, moe__gate_backward_job *back,
                         bool wanted)
{
    const moe__matrices none = {0};
    moe__gate_level *last = &job->level[job->levels == 2];
    last->d_weight_matrix = wanted ? gate_operand(gate, "weight", true) : none;
    last->d_bias = wanted ? gate_operand(gate, "bias", true) : none;
    last->d_noise_weight = wanted ? gate_operand(gate, "noise_weight", true) : none;
    back->d_threshold = wanted ? gate_operand(gate, "threshold", true) : none;
    if (job->levels == 1) return;
    job->level[0].d_weight_matrix = wanted ? gate_operand(gate, "primary_weight", true) : none;
    job->level[0].d_noise_weight = wanted ? gate_operand(gate, "primary_noise_weight", true) : none;
    job->level[0].d_bias = none;
}

/* ---- jobs ------------------------------------------------------------------------------------ */

void moe__gate_fill_batch(const moe_pass *pass, const moe__forward *f, moe__batch_job *job)
{
    const moe_gate_config *c = &pass->gate_config;
    bool two = f->route && c->kind == MOE_GATE_HIERARCHICAL;
    bool taken = how_to_choose(f, c) == MOE__CHOOSE_BY_EXPERT;
    bool limited = moe__gate_is_limited(c, &f->a) && !moe__gate_takes_tokens(c);
    job->entries_per_token = moe__entries_per_token(c, f->top_k);
    job->primary = two ? (moe__plan_arrays *)(uintptr_t)&pass->primary.a : NULL;
    job->primary_per_token = c->top_groups;
    job->second_begin = pass->second_begin;
    job->second_per_row = c->top_k;
    job->config = c;
    job->capacity = f->a.capacity;
    job->train = (f->a.flags & MOE_FORWARD_TRAIN) != 0;
    job->group_capacity = !f->replay && (taken || limited) ? pass->group_capacity : NULL;
}

static uint32_t stream_of(const moe_pass *pass, uint32_t purpose)
{
    uint32_t layer_id = pass->layer ? (uint32_t)pass->layer->config.layer_id : 0;
    return moe__stream(layer_id, (uint32_t)pass->gate_config.stream_id, purpose);
}

/* The one level of a flat gate: its entries are the plan's. */
static void fill_one_level(moe_pass *pass, const moe_forward_args *a)
{
    moe__gate_level *l = &pass->route.level[0];
    l->rows = a->tokens;
    l->width = pass->gate_config.num_experts;
    l->top_k = pass->gate_config.top_k;
    l->parts = 1;
    l->entry_begin = pass->plan.a.token_begin;
    l->noise_in = a->noise;
    l->noise_stride = a->noise_stride;
    l->noise_stream = stream_of(pass, MOE__PURPOSE_NOISE);
    l->choice = pass->plan.a.expert_of_entry;
    l->weight = pass->plan_weight;
}

/* Tokens among groups, and the rows of that routing among the experts of their group. The second
 * level's number of rows is known when the first has chosen. */
static void fill_two_levels(moe_pass *pass, const moe_forward_args *a)
{
    const moe_gate_config *c = &pass->gate_config;
    moe__plan_arrays *primary = &pass->primary.a;
    moe__gate_level *first = &pass->route.level[0], *second = &pass->route.level[1];
    first->rows = a->tokens;
    first->width = c->expert_groups;
    first->top_k = c->top_groups;
    first->parts = 1;
    first->entry_begin = primary->token_begin;
    first->noise_in = a->noise_primary;
    first->noise_stride = a->noise_primary_stride;
    first->noise_stream = stream_of(pass, MOE__PURPOSE_PRIMARY);
    second->rows = primary->entries; /* at most */
    second->width = c->num_experts / c->expert_groups;
    second->top_k = c->top_k;
    second->parts = c->expert_groups;
    second->part_begin = primary->expert_begin;
    second->token_of_row = primary->token_of_row;
    second->entry_begin = pass->second_begin;
    second->noise_in = a->noise;
    second->noise_stride = a->noise_stride;
    second->noise_stream = stream_of(pass, MOE__PURPOSE_NOISE);
    pass->route.primary = primary;
}

void moe__gate_fill_route(moe_pass *pass, const moe__forward *f)
{
    moe__route_job *r = &pass->route;
    const moe_forward_args *a = &f->a;
    const moe_gate_config *c = &pass->gate_config;
    r->config = c;
    r->choose = how_to_choose(f, c);
    r->train = (a->flags & MOE_FORWARD_TRAIN) != 0;
    r->tokens = a->tokens;
    r->input_width = c->d_model;
    r->x = pass->gate_x;
    r->x_stride = pass->gate_x_stride;
    r->jitter_stream = stream_of(pass, MOE__PURPOSE_JITTER);
    r->choice_stream = stream_of(pass, c->kind == MOE_GATE_HASH ? MOE__PURPOSE_HASH
                                                                : MOE__PURPOSE_CHOICE);
    r->logits_in = a->logits_in;
    r->logits_stride = a->logits_stride;
    r->token_mask = a->token_mask ? pass->mask : NULL;
    r->token_key = a->token_key;
    r->step = a->step;
    r->token_first = a->token_first;
    r->groups = pass->plan.a.groups;
    r->group_begin = pass->plan.a.group_begin;
    r->valid_begin = pass->valid_begin;
    r->valid_token = pass->valid_token;
    r->taken_of_group = r->choose == MOE__CHOOSE_BY_EXPERT ? pass->group_capacity : NULL;
    r->token_begin = pass->plan.a.token_begin;
    r->expert_of_entry = pass->plan.a.expert_of_entry;
    r->slot_of_entry = pass->plan.a.slot_of_entry;
    r->weight = pass->plan_weight;
    /* Without a limit nothing asks for it, and a hash gate may have no scores. */
    r->token_priority = f->replay || !moe__gate_is_limited(c, a) ? NULL : pass->token_priority;
    if (f->replay || !r->train) r->column_factor = NULL; /* Sinkhorn is for training */
    if (r->levels == 2)
        fill_two_levels(pass, a);
    else
        fill_one_level(pass, a);
    moe__gate_operands(pass->gate, r);
}

void moe__gate_fill_rows(moe_pass *pass, const moe__forward *f, moe__plan_rows_job *rows)
{
    const moe_gate_config *c = &pass->gate_config;
    bool train = (f->a.flags & MOE_FORWARD_TRAIN) != 0;
    bool by_expert = pass->route.choose == MOE__CHOOSE_BY_EXPERT;
    bool limited = !f->replay && !moe__gate_takes_tokens(c) && moe__gate_is_limited(c, &f->a);
    *rows = (moe__plan_rows_job){
        .workers = pass->workers,
        .plan = &pass->plan.a,
        .token_mask = pass->route.token_mask,
        .group_capacity = limited ? pass->group_capacity : NULL,
        .drop_policy = c->drop_policy,
        .renormalize_after_drop = c->renormalize_after_drop,
        .renormalize_minimum = c->renormalize_minimum,
        .keep_rows = f->replay,
        .keep_slots = by_expert,
        .second_choice = c->second_choice == MOE_SECOND_CHOICE_RANDOM && !train
                             ? MOE_SECOND_CHOICE_ALL
                             : c->second_choice,
        .second_threshold = c->second_threshold,
        .token_priority = pass->route.token_priority,
        .seed = c->seed,
        .drop_stream = stream_of(pass, MOE__PURPOSE_DROP),
        .step = f->a.step,
        .token_first = f->a.token_first,
    };
}

void moe__gate_fill_losses(moe_pass *pass, const moe__forward *f)
{
    moe__losses_job *l = &pass->losses;
    l->route = &pass->route;
    l->plan = &pass->plan.a;
    l->weights = pass->weights;
    l->valid_begin = pass->valid_begin;
    l->valid_token = f->a.token_mask ? pass->valid_token : NULL;
    if (!l->scoped) {
        l->scope_counts = l->counts;
        l->scope_first = l->first_counts;
    }
}
