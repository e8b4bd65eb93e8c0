/* layer_draw.c - configurations drawn at random. */
#include "support/layer_case.h"

#include <string.h>

#define BELOW(n) ((int)(random_uniform(state) * (double)(n)))

/* ---- what contradicts itself is taken out ---------------------------------------------------- */

/* What a kind of gate leaves no choice in. */
static void mend_kind(layer_case *c)
{
    int two = c->kind == MOE_GATE_HIERARCHICAL, top = c->kind == MOE_GATE_TOP_K;
    if (c->kind == MOE_GATE_NOISY_TOP_K || c->kind == MOE_GATE_SOFTMAX_DENSE || two ||
        c->kind == MOE_GATE_BALANCED)
        c->score = c->order = c->renormalize = 0;
    if (c->renormalize && !c->score && !c->order && c->kind != MOE_GATE_EXPERT_CHOICE)
        c->renormalize = 0;
    if (!top && !two) c->expert_groups = c->top_groups = 0;
    if (!top) c->selection_bias = c->group_score = 0;
    if (c->kind != MOE_GATE_NOISY_TOP_K && !two) c->weight[MOE_LOSS_LOAD] = 0;
    if (c->kind != MOE_GATE_BALANCED) c->weight[MOE_LOSS_THRESHOLD] = 0, c->thresholds = 0;
    if (c->kind != MOE_GATE_SINKHORN) {
        c->sinkhorn_iterations = 0;
    } else { /* one token among its columns ends as a tie of all experts */
        c->masked = 0;
        if (c->groups > 2) c->groups = 2;
        if (c->T < 8) c->T += 8;
    }
    if (c->renormalize && c->K == 1 && c->drop_policy == MOE_DROP_SCORE)
        c->drop_policy = 0; /* weights of 1 - 1e-9, equal in f32 */
    if (layer_case_varies(c)) {
        if (c->capacity_kind == MOE_CAPACITY_NONE) c->capacity_kind = MOE_CAPACITY_NUMBER;
        c->drop_policy = c->second_choice = c->renormalize_after_drop = 0;
    }
    if (!two) return;
    c->router_bias = c->logits_in = c->philox = 0;
    if (c->drop_policy == MOE_DROP_BATCH_PRIORITY) c->drop_policy = MOE_DROP_CHOICE;
    for (int i = MOE_LOSS_SWITCH; i <= MOE_LOSS_SEQUENCE; i++) c->weight[i] = 0;
}

/* A plan is made without the gate. */
static void mend_replay(layer_case *c)
{
    if (!c->replay) return;
    if (c->kind == MOE_GATE_BALANCED || c->kind == MOE_GATE_HIERARCHICAL ||
        c->kind == MOE_GATE_EXPERT_CHOICE || c->kind == MOE_GATE_HASH)
        c->kind = MOE_GATE_TOP_K;
    if (c->capacity_kind == MOE_CAPACITY_FACTOR) c->capacity_kind = MOE_CAPACITY_NONE;
    if (c->drop_policy == MOE_DROP_BATCH_PRIORITY) c->drop_policy = MOE_DROP_CHOICE;
    if (c->replay == 1 && c->drop_policy == MOE_DROP_SCORE) c->drop_policy = 0;
    c->second_choice = 0;
    if (c->replay != 2) return;
    c->per_call = 0, c->gate_D = 0, c->logits_in = 0;
    c->renormalize_minimum = 0;
    memset(c->weight, 0, sizeof c->weight);
}

/* What only a layer has, and what its parts refuse. */
static void mend_layer(layer_case *c)
{
    if (c->no_experts || c->no_gate == 2) c->shared = c->residual = c->dropped = 0;
    if (!c->shared) c->shared_gate = 0;
    if (!c->residual) c->residual_mix = 0;
    if (c->residual_mix) c->position = 0;
    if (c->layer_sigmoid || c->residual_mix) c->dropped = 0;
    if (c->dropped == MOE_DROPPED_PASS_THROUGH) c->O = 0;
    if (c->dropped == MOE_DROPPED_UNTOUCHED) c->shared = c->residual = c->shared_gate = 0;
    if (c->dropped == MOE_DROPPED_UNTOUCHED) c->strided = 0;
    if (c->activation != MOE_ACTIVATION_SWIGLU) c->alpha = c->limit = c->offset = 0;
}

static void mend(layer_case *c)
{
    mend_replay(c);
    mend_kind(c);
    if (c->per_call && c->capacity_kind == MOE_CAPACITY_FACTOR)
        c->per_call = 0; /* K is in the factor */
    if (c->per_call && c->kind == MOE_GATE_SOFTMAX_DENSE) c->per_call = 0;
    if (c->no_gate) c->cv_ddof = 0;
    if (c->no_gate == 2) c->layer_sigmoid = 0, c->per_call = 0;
    mend_layer(c);
}

/* ---- the draw -------------------------------------------------------------------------------- */

static void draw_gate(layer_case *c, uint64_t *state)
{
    c->kind = BELOW(8);
    c->order = BELOW(2), c->score = BELOW(2), c->route_scale = BELOW(2) ? 2.5 : 1;
    c->renormalize = BELOW(2), c->renormalize_minimum = BELOW(4) == 0 ? 0.4 : 0;
    c->renormalize_epsilon = 1e-9; /* an expert may be chosen by nobody's sigmoid */
    c->selection_bias = BELOW(3) == 0, c->thresholds = BELOW(2);
    c->sinkhorn_iterations = BELOW(2) ? 1 + BELOW(5) : 0;
    c->router_bias = BELOW(2), c->cv_ddof = BELOW(2), c->eval = BELOW(4) == 0;
    c->logits_in = BELOW(5) == 0, c->gate_D = BELOW(4) == 0 ? 1 + BELOW(9) : 0;
    c->sequence_softmax = BELOW(2), c->sequence_routed = BELOW(2), c->loss_by_group = BELOW(2);
    for (int i = 0; i < REF_LOSSES; i++) c->weight[i] = BELOW(2) ? random_uniform(state) : 0;
}

/* E is a multiple of the groups, and K what they leave. */
static void draw_groups(layer_case *c, uint64_t *state)
{
    int two = c->kind == MOE_GATE_HIERARCHICAL;
    int64_t size = 1 + BELOW(4), most;
    if (!two && (c->kind != MOE_GATE_TOP_K || BELOW(3) != 0)) return;
    c->expert_groups = 1 + BELOW(4), c->top_groups = 1 + BELOW(c->expert_groups);
    c->E = c->expert_groups * size;
    most = two ? size : c->top_groups * size;
    c->K = 1 + BELOW(most);
    c->group_score = BELOW(size + 1);
}

static void draw_capacity(layer_case *c, uint64_t *state)
{
    c->capacity_kind = BELOW(3), c->capacity = BELOW(8);
    c->capacity_factor = random_uniform(state) * 2;
    c->capacity_factor_eval = BELOW(2) ? random_uniform(state) : 0;
    c->capacity_rounding = BELOW(5), c->capacity_minimum = BELOW(3);
    c->capacity_multiple = BELOW(4), c->drop_policy = BELOW(4);
    c->second_choice = BELOW(3), c->second_threshold = random_uniform(state) * 0.4;
    if (BELOW(2)) c->second_choice = 0;
    c->renormalize_after_drop = BELOW(2);
}

static void draw_experts(layer_case *c, uint64_t *state)
{
    static const int activations[] = {0, 1, 2, 3, 16, 17, 18, 19};
    c->activation = activations[BELOW(8)], c->expert_bias = BELOW(2);
    c->branch_activation = activations[BELOW(8)];
    c->expert_sigmoid = BELOW(4) == 0, c->position = BELOW(2) ? BELOW(3) : 0;
    c->layout = BELOW(2), c->glu_order = BELOW(4);
    if (BELOW(2)) c->alpha = 1.702, c->limit = 0.5, c->offset = 1;
    c->shared = BELOW(3) ? 0 : 1 + BELOW(3), c->shared_gate = BELOW(2);
    c->residual = BELOW(3) == 0, c->residual_mix = BELOW(2);
    c->layer_sigmoid = BELOW(4) == 0, c->dropped = BELOW(3);
}

/* A configuration drawn at random; those that contradict themselves are mended. */
layer_case layer_case_draw(uint64_t *state)
{
    layer_case c = {.name = "random"};
    c.T = BELOW(40), c.D = 1 + BELOW(20), c.E = 1 + BELOW(12), c.F = 1 + BELOW(20);
    c.K = 1 + BELOW(c.E), c.O = BELOW(2) ? 1 + BELOW(20) : 0;
    draw_gate(&c, state);
    draw_groups(&c, state);
    draw_capacity(&c, state);
    draw_experts(&c, state);
    c.groups = BELOW(2) ? 1 + BELOW(5) : 0, c.masked = BELOW(3) == 0;
    c.no_experts = BELOW(5) == 0;
    c.loss_factors = BELOW(3) == 0, c.philox = BELOW(2), c.strided = BELOW(3) == 0;
    c.moved = BELOW(4) == 0, c.split = BELOW(4) == 0, c.bound = BELOW(3);
    c.replay = BELOW(4) == 0 ? 1 + BELOW(2) : 0, c.per_call = BELOW(3) == 0;
    if (c.replay == 2) c.no_experts = 0, c.no_gate = BELOW(3);
    c.packed = !ON_DEVICE && (c.T + c.D + c.F) % 2;
    mend(&c);
    return c;
}
