/* 01_layer.c - a Mixture-of-Experts layer in one page: make it, run it, look at what it chose.
 *
 * Introduces: moe_context_create, moe_gate_create, moe_experts_create, moe_layer_create,
 * moe_layer_init_parameters, moe_pass_create, moe_layer_forward, moe_pass_plan, moe_plan_get. */
#include "example.h"

enum { T = 8, D = 16, F = 32, E = 4, K = 2 };

int main(void)
{
    /* snippet: objects */
    moe_context *context; /* where work runs: all cores of this machine */
    moe_gate *gate;       /* decides which experts a token visits */
    moe_experts *experts; /* E small feed-forward networks */
    moe_layer *layer;     /* both together */
    moe_pass *pass;       /* one batch on its way through the layer */

    OK(moe_context_create(&context, NULL));

    moe_gate_config g;
    OK(moe_gate_config_init(&g, sizeof g)); /* every default */
    g.d_model = D, g.num_experts = E, g.top_k = K;
    OK(moe_gate_create(&gate, context, &g));

    moe_experts_config e;
    OK(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.num_experts = E, e.activation = MOE_ACTIVATION_SWIGLU;
    OK(moe_experts_create(&experts, context, &e));

    moe_layer_config l;
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = gate, l.experts = experts;
    OK(moe_layer_create(&layer, &l));
    OK(moe_layer_init_parameters(layer, 1)); /* the same seed, the same numbers, everywhere */
    OK(moe_pass_create(&pass, layer, NULL));
    /* end snippet */

    float x[T * D], y[T * D];
    fill(x, T * D, 7);

    /* snippet: forward */
    moe_forward_args f;
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.x = x, f.y = y;
    OK(moe_layer_forward(layer, pass, &f));
    /* end snippet */

    /* snippet: plan */
    const moe_plan *plan; /* the routing, which belongs to the pass */
    moe_plan_view v;
    OK(moe_pass_plan(pass, &plan));
    OK(moe_plan_view_init(&v, sizeof v));
    OK(moe_plan_get(plan, &v));
    const float *weight = v.weight_of_entry;
    for (int64_t t = 0; t < v.tokens; t++) {
        printf("token %d:", (int)t);
        for (int64_t n = v.token_begin[t]; n < v.token_begin[t + 1]; n++)
            printf("  expert %d with weight %.4f", (int)v.expert_of_entry[n], (double)weight[n]);
        printf("   y[0] = %+.5f\n", (double)y[t * D]);
    }
    for (int64_t i = 0; i < v.num_experts; i++)
        printf("expert %d computed %d rows\n", (int)i,
               (int)(v.expert_begin[i + 1] - v.expert_begin[i]));
    /* end snippet */

    moe_pass_destroy(pass); /* in any order: objects hold what they need */
    moe_layer_destroy(layer);
    moe_experts_destroy(experts);
    moe_gate_destroy(gate);
    moe_context_destroy(context);
    return 0;
}
