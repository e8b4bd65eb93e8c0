/* tied.c - one pool of experts serves two layers with gates of their own: its gradients collect
 * what both give, and it is one backward at a time that may write them. */
#include "host.h"

#include <pthread.h>
#include <stdatomic.h>

typedef struct racer {
    moe_layer *layer;
    moe_pass *pass;
    const moe_backward_args *args;
    int done, refused;
} racer;

/* Tries until its backward has run; being refused meanwhile is the library's word for "busy". */
static void *race(void *argument)
{
    racer *r = argument;
    while (r->done < 20) {
        moe_status status = moe_layer_backward(r->layer, r->pass, r->args);
        if (status == MOE_ERROR_INVALID_STATE) {
            r->refused++;
            continue;
        }
        if (status != MOE_OK) break;
        r->done++;
    }
    return NULL;
}

int main(void)
{
    small first;
    moe_gate *gate;
    moe_layer *second;
    moe_pass *pass;
    moe_layer_config l;
    moe_gate_config g = gate_config();
    float *x = floats(T * D), *dy = floats(T * D), *y = floats(T * D), *dx = floats(T * D),
          *dx2 = floats(T * D);
    fill(x, T * D, 1), fill(dy, T * D, 2);
    small_make(&first, NULL, MOE_PARAMETERS_OWNED);
    set_gate(first.layer);
    OK(moe_gate_create(&gate, first.context, &g));
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = gate, l.experts = first.experts, l.layer_id = 1;
    OK(moe_layer_create(&second, &l));
    OK(moe_pass_create(&pass, second, NULL));
    int64_t w1 = moe_experts_parameter_find(first.experts, "w1");
    moe_parameter_record p;
    OK(moe_parameter_record_init(&p, sizeof p));
    OK(moe_experts_parameter(first.experts, w1, &p));
    float *alone[2] = {floats(p.element_count), floats(p.element_count)};
    moe_forward_args f = forward_args(x, y, T);
    moe_backward_args b = backward_args(dy, dx);
    b.flags = MOE_BACKWARD_OVERWRITE;
    OK(moe_layer_forward(first.layer, first.pass,
                         &f)); /* both passes are in flight over one pool */
    OK(moe_layer_forward(second, pass, &f));
    OK(moe_layer_backward(first.layer, first.pass, &b));
    memcpy(alone[0], p.grad, (size_t)p.element_count * sizeof(float));
    OK(moe_layer_backward(second, pass, &b));
    memcpy(alone[1], p.grad, (size_t)p.element_count * sizeof(float));
    OK(moe_experts_zero_gradients(first.experts, NULL));
    b.flags = 0;
    OK(moe_layer_backward(first.layer, first.pass, &b));
    OK(moe_layer_backward(second, pass, &b));
    for (int64_t i = 0; i < p.element_count; i++)
        SHOW(((float *)p.grad)[i] == alone[0][i] + alone[1][i]);

    moe_backward_args b2 = b;
    b2.dx = dx2;
    racer racers[2] = {{first.layer, first.pass, &b, 0, 0}, {second, pass, &b2, 0, 0}};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) SHOW(pthread_create(&threads[i], NULL, race, &racers[i]) == 0);
    for (int i = 0; i < 2; i++) SHOW(pthread_join(threads[i], NULL) == 0);
    SHOW(racers[0].done == 20 && racers[1].done == 20);
    moe_pass_destroy(pass), moe_layer_destroy(second), moe_gate_destroy(gate);
    small_free(&first);
    free(x), free(dy), free(y), free(dx), free(dx2), free(alone[0]), free(alone[1]);
    printf(
        "a pool tied in two layers: gradients add, a second backward meanwhile is refused; ok\n");
    return 0;
}
