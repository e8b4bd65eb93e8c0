/* 06_checkpointing.c - trading arithmetic for memory: a forward that keeps the routing only, run
 * again before the backward; and a routing saved as bytes and replayed by another pass. Neither
 * routes anew, so the gradients are the bytes of the plain step even with a noisy gate.
 *
 * Introduces: MOE_FORWARD_PLAN_ONLY, MOE_FORWARD_RECOMPUTE, moe_pass_trim, moe_pass_bytes,
 * moe_plan_save, moe_plan_load, MOE_PLAN_IDS. */
#include "example.h"

#include <string.h>

enum { T = 256, D = 32, F = 128, E = 8, K = 2 };

typedef struct step_result {
    float y[T * D], dx[T * D];
    double losses;
} step_result;

typedef struct model {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
} model;

static void make(model *m)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    OK(moe_context_create(&m->context, NULL));
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.kind = MOE_GATE_NOISY_TOP_K;
    g.importance_weight = g.load_weight = 0.1;
    OK(moe_gate_create(&m->gate, m->context, &g));
    OK(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.num_experts = E;
    OK(moe_experts_create(&m->experts, m->context, &e));
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = m->gate, l.experts = m->experts;
    OK(moe_layer_create(&m->layer, &l));
    OK(moe_layer_init_parameters(m->layer, 1));
}

static moe_forward_args forward_args(const float *x, float *y)
{
    moe_forward_args f;
    OK(moe_forward_args_init(&f, sizeof f));
    f.flags = MOE_FORWARD_TRAIN, f.step = 17;
    f.tokens = T, f.x = x, f.y = y;
    return f;
}

static void backward(const model *m, moe_pass *pass, const float *dy, step_result *out)
{
    moe_backward_args b;
    moe_losses losses;
    OK(moe_backward_args_init(&b, sizeof b));
    b.dy = dy, b.dx = out->dx;
    OK(moe_layer_backward(m->layer, pass, &b));
    OK(moe_losses_init(&losses, sizeof losses));
    OK(moe_pass_losses(pass, &losses));
    out->losses = losses.total;
}

static void plain_step(const model *m, moe_pass *pass, const float *x, const float *dy,
                       step_result *out)
{
    moe_forward_args f = forward_args(x, out->y);
    OK(moe_layer_forward(m->layer, pass, &f));
    backward(m, pass, dy, out);
}

/* Returns what the pass kept between the two forwards. */
static int64_t recomputed_step(const model *m, moe_pass *pass, const float *x, const float *dy,
                               step_result *out)
{
    /* snippet: recompute */
    moe_forward_args f = forward_args(x, out->y);
    f.flags |= MOE_FORWARD_PLAN_ONLY; /* y is complete; activations are not kept */
    OK(moe_layer_forward(m->layer, pass, &f));
    OK(moe_pass_trim(pass)); /* while it waits it holds the routing only */
    int64_t kept = moe_pass_bytes(pass);

    /* ... the rest of the network, forward and back, happens here ... */

    f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_RECOMPUTE;
    f.y = NULL; /* it is there already */
    OK(moe_layer_forward(m->layer, pass, &f));
    /* end snippet */
    backward(m, pass, dy, out);
    return kept;
}

static int64_t replayed_step(const model *m, const float *x, const float *dy, step_result *out)
{
    moe_pass *first, *second;
    const moe_plan *routed;
    moe_plan *plan;
    int64_t size = 0;
    OK(moe_pass_create(&first, m->layer, NULL));
    OK(moe_pass_create(&second, m->layer, NULL));
    moe_forward_args f = forward_args(x, out->y);
    f.flags |= MOE_FORWARD_NO_SAVE;
    OK(moe_layer_forward(m->layer, first, &f));

    /* snippet: save-plan */
    OK(moe_pass_plan(first, &routed));
    HOLDS(moe_plan_save(routed, NULL, 0, &size) == MOE_ERROR_BUFFER_TOO_SMALL); /* asks the size */
    void *bytes = malloc((size_t)size);
    HOLDS(bytes != NULL);
    OK(moe_plan_save(routed, bytes, size, &size)); /* to a file, to another process, ... */

    OK(moe_plan_create(&plan, m->context));
    OK(moe_plan_load(plan, bytes, size)); /* checked: damage is found */
    f.flags = MOE_FORWARD_TRAIN;
    f.plan = plan, f.plan_use = MOE_PLAN_IDS; /* the choice is kept, weights and losses are new */
    OK(moe_layer_forward(m->layer, second, &f));
    /* end snippet */

    backward(m, second, dy, out);
    free(bytes), moe_plan_destroy(plan), moe_pass_destroy(second), moe_pass_destroy(first);
    return size;
}

int main(void)
{
    static step_result plain, again, replayed;
    static float x[T * D], dy[T * D];
    model m;
    moe_pass *pass, *other;
    make(&m);
    fill(x, T * D, 1), fill(dy, T * D, 2);
    OK(moe_pass_create(&pass, m.layer, NULL));
    OK(moe_pass_create(&other, m.layer, NULL));

    plain_step(&m, pass, x, dy, &plain);
    int64_t kept = recomputed_step(&m, other, x, dy, &again);
    int64_t size = replayed_step(&m, x, dy, &replayed);
    HOLDS(memcmp(&plain, &again, sizeof plain) == 0);
    HOLDS(memcmp(&plain, &replayed, sizeof plain) == 0);
    HOLDS(kept < moe_pass_bytes(pass) / 20);
    printf("losses %.5f; recomputed and replayed steps give the bytes of the plain one\n",
           plain.losses);
    printf("the routing of %d tokens as bytes: %d\n", T, (int)size);

    moe_pass_destroy(other), moe_pass_destroy(pass), moe_layer_destroy(m.layer);
    moe_experts_destroy(m.experts), moe_gate_destroy(m.gate), moe_context_destroy(m.context);
    return 0;
}
