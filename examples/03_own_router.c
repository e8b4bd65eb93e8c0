/* 03_own_router.c - the host has a router of its own: first one that the library knows nothing of
 * (ids and weights go in, the gradient by the weights comes back), then logits of the host that the
 * library's gate turns into a routing with losses.
 *
 * Introduces: moe_plan_create, moe_plan_build, moe_forward_args.plan, entry_weight_grad, a layer
 * without a gate; a gate of width 0, logits_in, d_logits_out. */
#include "example.h"

#include <math.h>

enum { T = 32, D = 12, F = 24, E = 6, K = 2 };

static moe_experts *make_experts(moe_context *context)
{
    moe_experts *experts;
    moe_experts_config e;
    OK(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.num_experts = E, e.activation = MOE_ACTIVATION_SILU;
    OK(moe_experts_create(&experts, context, &e));
    OK(moe_experts_init_parameters(experts, 1));
    return experts;
}

static moe_layer *make_layer(moe_gate *gate, moe_experts *experts)
{
    moe_layer *layer;
    moe_layer_config l;
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = gate, l.experts = experts;
    OK(moe_layer_create(&layer, &l));
    return layer;
}

/* ---- 1: ids and weights ---------------------------------------------------------------------- */

/* A router as odd as it likes: token t goes to experts t mod E and t/2 mod E, a third of the tokens
 * to one only; the weights are the host's variables. */
static void route(int32_t *ids)
{
    for (int t = 0; t < T; t++) {
        ids[t * K] = t % E;
        ids[t * K + 1] = t % 3 == 0 ? -1 : (t / 2 + 1) % E;
    }
}

static double own_ids(moe_context *context, moe_experts *experts, const float *x, const float *dy)
{
    static float weights[T * K], dweights[T * K], y[T * D], dx[T * D];
    static int32_t ids[T * K];
    moe_layer *layer = make_layer(NULL, experts);
    moe_pass *pass;
    moe_plan *plan;
    double error = 0;
    route(ids);
    fill(weights, T * K, 4);
    OK(moe_pass_create(&pass, layer, NULL));
    OK(moe_plan_create(&plan, context));

    /* snippet: own-plan */
    moe_plan_args a;
    OK(moe_plan_args_init(&a, sizeof a));
    a.tokens = T, a.num_experts = E, a.top_k = K;
    a.expert_ids = ids; /* [T,K]; -1: none */
    a.weights = weights;
    OK(moe_plan_build(plan, &a));

    moe_forward_args f;
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.x = x, f.y = y, f.plan = plan;
    OK(moe_layer_forward(layer, pass, &f));

    moe_backward_args b;
    OK(moe_backward_args_init(&b, sizeof b));
    b.dy = dy, b.dx = dx;
    b.entry_weight_grad = dweights; /* [T,K]: what the host's router learns from */
    OK(moe_layer_backward(layer, pass, &b));
    /* end snippet */

    /* y is linear in each weight, so a difference over a whole unit tells the same. */
    static float moved[T * D];
    for (int n = 0; n < T * K; n++) {
        double rise = 0;
        weights[n] += 1;
        OK(moe_plan_build(plan, &a));
        f.y = moved;
        OK(moe_layer_forward(layer, pass, &f));
        weights[n] -= 1;
        for (int i = 0; i < T * D; i++) rise += (double)(moved[i] - y[i]) * (double)dy[i];
        error = fmax(error, fabs(rise - (double)dweights[n]));
        HOLDS(ids[n] >= 0 || dweights[n] == 0); /* no expert, no gradient */
    }
    moe_plan_destroy(plan), moe_pass_destroy(pass), moe_layer_destroy(layer);
    return error;
}

/* ---- 2: logits ------------------------------------------------------------------------------- */

static double own_logits(moe_context *context, moe_experts *experts, const float *x,
                         const float *dy, double *balance)
{
    static float logits[T * E], dlogits[T * E], y[T * D];
    moe_gate *gate;
    moe_pass *pass;
    moe_losses losses;
    double sum = 0;

    /* snippet: own-logits */
    moe_gate_config g;
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = 0; /* no weights of its own: every forward brings logits */
    g.num_experts = E, g.top_k = K;
    g.order = MOE_ORDER_SCORE_THEN_SELECT, g.renormalize = 1;
    g.switch_weight = 0.01; /* the losses are there as with any other gate */
    OK(moe_gate_create(&gate, context, &g));
    moe_layer *layer = make_layer(gate, experts);
    OK(moe_pass_create(&pass, layer, NULL));

    fill(logits, T * E, 5); /* from any network of the host */
    moe_forward_args f;
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.x = x, f.y = y, f.logits_in = logits;
    OK(moe_layer_forward(layer, pass, &f));

    moe_backward_args b;
    OK(moe_backward_args_init(&b, sizeof b));
    b.dy = dy, b.d_logits_out = dlogits; /* back into the host's network, losses included */
    OK(moe_layer_backward(layer, pass, &b));
    /* end snippet */

    OK(moe_losses_init(&losses, sizeof losses));
    OK(moe_pass_losses(pass, &losses));
    *balance = losses.value[MOE_LOSS_SWITCH];
    for (int i = 0; i < T * E; i++) sum += (double)dlogits[i];
    moe_pass_destroy(pass), moe_layer_destroy(layer), moe_gate_destroy(gate);
    return sum;
}

int main(void)
{
    static float x[T * D], dy[T * D];
    double balance;
    moe_context *context;
    fill(x, T * D, 1), fill(dy, T * D, 2);
    OK(moe_context_create(&context, NULL));
    moe_experts *experts = make_experts(context);

    double error = own_ids(context, experts, x, dy);
    printf("own ids and weights: gradient by the weights agrees with differences: %s\n",
           error < 1e-4 ? "yes" : "no");
    HOLDS(error < 1e-4);

    /* Softmax does not see a constant added to all logits of a token: their gradients sum to 0. */
    double sum = own_logits(context, experts, x, dy, &balance);
    printf("own logits: switch loss %.4f, sum of gradients by the logits %.4f\n", balance,
           fabs(sum) < 1e-4 ? 0.0 : sum);
    HOLDS(fabs(sum) < 1e-4);

    moe_experts_destroy(experts), moe_context_destroy(context);
    return 0;
}
