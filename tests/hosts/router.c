/* router.c - the host has a router of its own: it hands in ids (64-bit, -1 for none) and weights,
 * and takes the gradient by the weights back. */
#include "host.h"

#include <math.h>

static double value(moe_layer *layer, moe_pass *pass, moe_plan *plan, const moe_plan_args *a,
                    const float *x, float *y, const float *dy)
{
    moe_forward_args f = forward_args(x, y, T);
    double sum = 0;
    OK(moe_plan_build(plan, a));
    f.plan = plan;
    OK(moe_layer_forward(layer, pass, &f));
    for (int i = 0; i < T * D; i++) sum += (double)y[i] * (double)dy[i];
    return sum;
}

int main(void)
{
    small s;
    moe_layer *layer;
    moe_pass *pass;
    moe_plan *plan;
    moe_layer_config l;
    moe_plan_args a;
    int64_t ids[T * K];
    float weights[T * K], gradient[T * K];
    float *x = floats(T * D), *dy = floats(T * D), *y = floats(T * D), *dx = floats(T * D);
    fill(x, T * D, 1), fill(dy, T * D, 2), fill(weights, T * K, 3);
    small_make(&s, NULL, MOE_PARAMETERS_OWNED);
    OK(moe_layer_config_init(&l, sizeof l));
    l.experts = s.experts; /* no gate */
    OK(moe_layer_create(&layer, &l));
    OK(moe_pass_create(&pass, layer, NULL));
    OK(moe_plan_create(&plan, s.context));
    for (int n = 0; n < T * K; n++) ids[n] = n % 5 == 0 ? -1 : (n * 7) % E;
    OK(moe_plan_args_init(&a, sizeof a));
    a.tokens = T, a.num_experts = E, a.top_k = K;
    a.expert_ids = ids, a.id_dtype = MOE_DTYPE_I64, a.weights = weights;
    (void)value(layer, pass, plan, &a, x, y, dy);
    moe_backward_args b = backward_args(dy, dx);
    b.entry_weight_grad = gradient;
    OK(moe_layer_backward(layer, pass, &b));
    for (int n = 0; n < T * K; n += 3) { /* y is linear in each weight */
        float here = weights[n];
        weights[n] = here + 1;
        double up = value(layer, pass, plan, &a, x, y, dy);
        weights[n] = here - 1;
        double down = value(layer, pass, plan, &a, x, y, dy);
        weights[n] = here;
        SHOW(fabs((up - down) / 2 - (double)gradient[n]) < 1e-3);
        SHOW(ids[n] >= 0 || gradient[n] == 0);
    }
    ids[17] = E; /* nonsense is refused with its place, and the plan stays */
    SHOW(moe_plan_build(plan, &a) == MOE_ERROR_INVALID_ARGUMENT);
    SHOW(strstr(moe_last_error(), "token 8, entry 17: expert id 6") != NULL);
    moe_plan_destroy(plan), moe_pass_destroy(pass), moe_layer_destroy(layer);
    small_free(&s);
    free(x), free(dy), free(y), free(dx);
    printf("ids and weights of the host's router, and the gradient by its weights; ok\n");
    return 0;
}
