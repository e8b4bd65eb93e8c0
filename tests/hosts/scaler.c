/* scaler.c - a host with a loss scaler: the gradient by y and, through loss_grad, by every loss
 * comes in 2^16 times as large, and a power of two changes no digit of any gradient. */
#include "host.h"

int main(void)
{
    const float scale = 65536;
    small plain, scaled;
    float factor[MOE_LOSS_SLOTS];
    float *x = floats(T * D), *y = floats(T * D), *dy = floats(T * D), *dx = floats(T * D),
          *big_dx = floats(T * D);
    fill(x, T * D, 1), fill(dy, T * D, 2);
    small_make(&plain, NULL, MOE_PARAMETERS_OWNED), small_make(&scaled, NULL, MOE_PARAMETERS_OWNED);
    set_gate(plain.layer), set_gate(scaled.layer);
    moe_forward_args f = forward_args(x, y, T);
    moe_backward_args b = backward_args(dy, dx);
    OK(moe_layer_forward(plain.layer, plain.pass, &f));
    OK(moe_layer_backward(plain.layer, plain.pass, &b));
    for (int i = 0; i < T * D; i++) dy[i] *= scale;
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) factor[i] = scale;
    b.dx = big_dx, b.loss_grad = factor;
    OK(moe_layer_forward(scaled.layer, scaled.pass, &f));
    OK(moe_layer_backward(scaled.layer, scaled.pass, &b));
    for (int i = 0; i < T * D; i++) SHOW(big_dx[i] == scale * dx[i]);
    for (int64_t i = 0; i < moe_layer_parameter_count(plain.layer); i++) {
        moe_parameter_record p = record_of(plain.layer, i), q = record_of(scaled.layer, i);
        for (int64_t j = 0; j < p.element_count; j++)
            SHOW(((float *)q.grad)[j] == scale * ((float *)p.grad)[j]);
    }
    for (int i = 0; i < MOE_LOSS_SLOTS; i++)
        factor[i] = 0; /* losses switched off, dy = 0: nothing is left */
    memset(dy, 0, T * D * sizeof *dy);
    b.flags = MOE_BACKWARD_OVERWRITE;
    OK(moe_layer_backward(scaled.layer, scaled.pass, &b));
    for (int64_t i = 0; i < moe_layer_parameter_count(scaled.layer); i++) {
        moe_parameter_record p = record_of(scaled.layer, i);
        for (int64_t j = 0; j < p.element_count; j++) SHOW(((float *)p.grad)[j] == 0);
    }
    small_free(&plain), small_free(&scaled);
    free(x), free(y), free(dy), free(dx), free(big_dx);
    printf(
        "a loss scale of 2^16 through dy and loss_grad: every gradient exactly 2^16 times; ok\n");
    return 0;
}
