/* multitask.c - several tasks in one batch over one pool, as MultiModel has it (Kaiser et al.
 * 2017): 240 experts for all tasks, 60 for one, preset "multimodel". Routing, y and dx of a task
 * are the bytes of that task alone; the losses are balanced over the whole batch. */
#include "host.h"

enum { TASKS = 4, TOKENS = 30, ALL = TASKS * TOKENS };

typedef struct model {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
} model;

static void make(model *m, int64_t num_experts)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    OK(moe_context_create(&m->context, NULL));
    OK(moe_gate_config_init(&g, sizeof g));
    OK(moe_experts_config_init(&e, sizeof e));
    OK(moe_layer_config_init(&l, sizeof l));
    OK(moe_preset("multimodel", &g, &e, &l));
    g.d_model = e.d_model = D, e.d_hidden = 16, g.num_experts = e.num_experts = num_experts;
    OK(moe_gate_create(&m->gate, m->context, &g));
    OK(moe_experts_create(&m->experts, m->context, &e));
    l.gate = m->gate, l.experts = m->experts;
    OK(moe_layer_create(&m->layer, &l));
    OK(moe_layer_init_parameters(m->layer, 1));
    OK(moe_pass_create(&m->pass, m->layer, NULL));
    set_gate(m->layer);
}

static void free_model(model *m)
{
    moe_pass_destroy(m->pass), moe_layer_destroy(m->layer), moe_experts_destroy(m->experts);
    moe_gate_destroy(m->gate), moe_context_destroy(m->context);
}

/* Tokens first to first + tokens - 1; losses as the preset has them, or off. */
static void run(model *m, const float *x, float *y, const float *dy, float *dx, int64_t first,
                int64_t tokens, const double *weights)
{
    moe_forward_args f = forward_args(x + first * D, y + first * D, tokens);
    moe_backward_args b = backward_args(dy + first * D, dx + first * D);
    f.token_first = first, f.step = 2, f.loss_weights = weights;
    OK(moe_layer_forward(m->layer, m->pass, &f));
    OK(moe_layer_backward(m->layer, m->pass, &b));
}

/* Experts that a task's tokens met. */
static int experts_met(const model *m)
{
    moe_tensor_view v;
    int met = 0;
    OK(moe_tensor_view_init(&v, sizeof v));
    OK(moe_pass_tensor(m->pass, MOE_TENSOR_COUNTS, &v));
    for (int64_t e = 0; e < v.shape[0]; e++) met += ((const int64_t *)v.data)[e] > 0;
    return met;
}

static void tasks_in_one_batch(int64_t num_experts)
{
    static const double off[MOE_LOSS_SLOTS] = {0};
    model m;
    moe_losses losses;
    float *x = floats(ALL * D), *dy = floats(ALL * D);
    float *y[2] = {floats(ALL * D), floats(ALL * D)}, *dx[2] = {floats(ALL * D), floats(ALL * D)};
    fill(x, ALL * D, 1), fill(dy, ALL * D, 2);
    for (int64_t i = 0; i < ALL * D; i++) /* tasks differ in what their tokens are like */
        x[i] += (float)(i / (TOKENS * D) == i % TASKS);
    make(&m, num_experts);
    run(&m, x, y[0], dy, dx[0], 0, ALL, off);
    for (int task = 0; task < TASKS; task++) {
        run(&m, x, y[1], dy, dx[1], task * TOKENS, TOKENS, off);
        SHOW(experts_met(&m) >= 4);
    }
    SHOW(same(y[0], y[1], ALL * D) && same(dx[0], dx[1], ALL * D));
    run(&m, x, y[0], dy, dx[0], 0, ALL, NULL);
    OK(moe_losses_init(&losses, sizeof losses));
    OK(moe_pass_losses(m.pass, &losses));
    SHOW(losses.value[MOE_LOSS_IMPORTANCE] > 0 && losses.value[MOE_LOSS_LOAD] > 0);
    SHOW(same(y[0], y[1], ALL * D) && !same(dx[0], dx[1], ALL * D)); /* the losses' gradient */
    free_model(&m);
    free(x), free(dy), free(y[0]), free(y[1]), free(dx[0]), free(dx[1]);
}

int main(void)
{
    tasks_in_one_batch(240);
    tasks_in_one_batch(60);
    printf(
        "four tasks in one batch over 240 and over 60 experts: the bytes of each task alone; ok\n");
    return 0;
}
