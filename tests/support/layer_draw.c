/* layer_draw.c - configurations drawn at random. */
#include "support/layer_case.h"

#include <string.h>

/* Takes out what contradicts itself. */
static void mend(layer_case *c)
{
    if (c->replay && c->capacity_kind == MOE_CAPACITY_FACTOR) c->capacity_kind = MOE_CAPACITY_NONE;
    if (c->per_call && c->capacity_kind == MOE_CAPACITY_FACTOR)
        c->per_call = 0; /* K is in the factor */
    if (c->per_call && c->kind == MOE_GATE_SOFTMAX_DENSE) c->per_call = 0;
    if (c->no_gate) c->cv_ddof = 0;
    if (c->no_gate == 2) c->layer_sigmoid = 0, c->per_call = 0;
    if (c->replay == 2) c->per_call = 0, c->gate_D = 0, c->logits_in = 0;
    if (c->replay == 2) memset(c->weight, 0, sizeof c->weight);
}

/* A configuration drawn at random; those that contradict themselves are mended. */
layer_case layer_case_draw(uint64_t *state)
{
    static const int activations[] = {0, 1, 2, 3, 16, 17, 18, 19};
#define BELOW(n) ((int)(random_uniform(state) * (double)(n)))
    layer_case c = {.name = "random"};
    c.T = BELOW(40), c.D = 1 + BELOW(20), c.E = 1 + BELOW(12), c.F = 1 + BELOW(20);
    c.K = 1 + BELOW(c.E), c.O = BELOW(2) ? 1 + BELOW(20) : 0;
    c.kind = BELOW(3);
    if (c.kind == MOE_GATE_TOP_K) {
        c.order = BELOW(2), c.score = BELOW(2), c.route_scale = BELOW(2) ? 2.5 : 1;
        c.renormalize = (c.order || c.score) && BELOW(2);
    }
    c.router_bias = BELOW(2), c.cv_ddof = BELOW(2), c.eval = BELOW(4) == 0;
    c.logits_in = BELOW(5) == 0, c.gate_D = BELOW(4) == 0 ? 1 + BELOW(9) : 0;
    c.activation = activations[BELOW(8)], c.expert_bias = BELOW(2),
    c.expert_sigmoid = BELOW(4) == 0;
    c.layer_sigmoid = BELOW(4) == 0, c.layout = BELOW(2), c.glu_order = BELOW(4);
    c.groups = BELOW(2) ? 1 + BELOW(5) : 0, c.masked = BELOW(3) == 0;
    c.sequence_softmax = BELOW(2), c.sequence_routed = BELOW(2), c.no_experts = BELOW(5) == 0;
    c.capacity_kind = BELOW(3), c.capacity = BELOW(8),
    c.capacity_factor = random_uniform(state) * 2;
    c.capacity_rounding = BELOW(3), c.capacity_minimum = BELOW(3),
    c.renormalize_after_drop = BELOW(2);
    for (int i = 0; i < REF_LOSSES; i++) c.weight[i] = BELOW(2) ? random_uniform(state) : 0;
    if (c.kind != MOE_GATE_NOISY_TOP_K) c.weight[MOE_LOSS_LOAD] = 0;
    c.loss_factors = BELOW(3) == 0, c.philox = BELOW(2), c.strided = BELOW(3) == 0,
    c.moved = BELOW(4) == 0;
    c.split = BELOW(4) == 0, c.bound = BELOW(3), c.replay = BELOW(4) == 0 ? 1 + BELOW(2) : 0;
    c.per_call = BELOW(3) == 0;
    if (c.replay == 2) c.no_experts = 0, c.no_gate = BELOW(3);
#undef BELOW
    mend(&c);
    return c;
}
