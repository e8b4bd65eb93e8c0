/* microbatch.c - gradient accumulation: micro-batches with token_first draw the noise of the whole
 * batch, so y and dx are its bytes; with one token group a micro-batch, losses and statistics
 * are told apart. */
#include "host.h"

#include <math.h>

enum { PARTS = 4, PART = T / PARTS };

/* Losses look at a whole batch; they are off here, and each part's gradient by y is the batch's
 * own. */
static void run(small *s, const float *x, float *y, const float *dy, float *dx, int64_t first,
                int64_t tokens)
{
    static const double off[MOE_LOSS_SLOTS] = {0};
    moe_forward_args f = forward_args(x + first * D, y + first * D, tokens);
    moe_backward_args b = backward_args(dy + first * D, dx + first * D);
    f.token_first = 1000 + first, f.step = 5, f.loss_weights = off;
    OK(moe_layer_forward(s->layer, s->pass, &f));
    OK(moe_layer_backward(s->layer, s->pass, &b));
}

int main(void)
{
    small whole, parts;
    float *x = floats(T * D), *dy = floats(T * D);
    float *y[2] = {floats(T * D), floats(T * D)}, *dx[2] = {floats(T * D), floats(T * D)};
    fill(x, T * D, 1), fill(dy, T * D, 2);
    small_make(&whole, NULL, MOE_PARAMETERS_OWNED), small_make(&parts, NULL, MOE_PARAMETERS_OWNED);
    set_gate(whole.layer), set_gate(parts.layer);
    run(&whole, x, y[0], dy, dx[0], 0, T);
    for (int p = 0; p < PARTS; p++) run(&parts, x, y[1], dy, dx[1], p * PART, PART);
    SHOW(same(y[0], y[1], T * D) && same(dx[0], dx[1], T * D));
    for (int64_t i = 0; i < moe_layer_parameter_count(whole.layer); i++) {
        moe_parameter_record p = record_of(whole.layer, i), q = record_of(parts.layer, i);
        for (int64_t j = 0; j < p.element_count; j++) /* sums over tokens in another order */
            SHOW(fabsf(((float *)p.grad)[j] - ((float *)q.grad)[j]) <= 1e-4f);
    }
    uint8_t a[E], b[E];
    OK(moe_experts_touched(whole.experts, a, NULL));
    OK(moe_experts_touched(parts.experts, b, NULL));
    SHOW(memcmp(a, b, E) == 0);

    /* The router's gradient is formed group by group: one group a micro-batch gives the very
     * bytes. */
    int64_t groups[PARTS + 1];
    for (int p = 0; p <= PARTS; p++) groups[p] = p * PART;
    static const double off[MOE_LOSS_SLOTS] = {0};
    moe_forward_args f = forward_args(x, y[0], T);
    moe_backward_args back = backward_args(dy, dx[0]);
    f.token_first = 1000, f.step = 5, f.loss_weights = off;
    f.group_begin = groups, f.groups = PARTS;
    back.flags = MOE_BACKWARD_OVERWRITE;
    OK(moe_layer_forward(whole.layer, whole.pass, &f));
    OK(moe_layer_backward(whole.layer, whole.pass, &back));
    moe_parameter_record p = record_of(whole.layer,
                                       moe_layer_parameter_find(whole.layer, "gate.weight"));
    moe_parameter_record q = record_of(parts.layer,
                                       moe_layer_parameter_find(parts.layer, "gate.weight"));
    SHOW(same(p.grad, q.grad, p.element_count));
    small_free(&whole), small_free(&parts);
    free(x), free(dy), free(y[0]), free(y[1]), free(dx[0]), free(dx[1]);
    printf("four micro-batches with token_first: y and dx are the bytes of one batch; ok\n");
    return 0;
}
