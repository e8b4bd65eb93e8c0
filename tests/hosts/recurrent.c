/* recurrent.c - the convolutional use of Shazeer et al. 2017 (section 3.1): a recurrent network
 * runs over all its time steps first, then one layer is applied to all of them at once, as one
 * large batch. That gives the bytes of applying it step by step, and one step of the experts
 * instead of many. */
#include "host.h"

#include <math.h>

enum { STEPS = 16, BATCH = T / STEPS };

/* h_s = tanh(u + h_{s-1} a + x_s), elementwise: a host's own recurrence. */
static void recur(float *h, const float *x, float a)
{
    for (int s = 0; s < STEPS; s++)
        for (int i = 0; i < BATCH * D; i++) {
            float before = s ? h[(s - 1) * BATCH * D + i] : 0;
            h[s * BATCH * D + i] = tanhf(0.1f + before * a + x[s * BATCH * D + i]);
        }
}

/* dx of the recurrence, from the last time step back. */
static void recur_backward(float *dx, const float *h, const float *dh, float a)
{
    for (int s = STEPS - 1; s >= 0; s--)
        for (int i = s * BATCH * D; i < (s + 1) * BATCH * D; i++) {
            float later = s + 1 < STEPS ? a * dx[i + BATCH * D] : 0;
            dx[i] = (dh[i] + later) * (1 - h[i] * h[i]);
        }
}

static const double OFF[MOE_LOSS_SLOTS] = {0};

static moe_forward_args step_args(const float *h, float *y, int64_t first, int64_t tokens)
{
    moe_forward_args f = forward_args(h + first * D, y + first * D, tokens);
    f.token_first = first, f.step = 3, f.loss_weights = OFF;
    return f;
}

int main(void)
{
    small s;
    moe_pass *passes[STEPS];
    float *x = floats(T * D), *h = floats(T * D), *dy = floats(T * D);
    float *y[2] = {floats(T * D), floats(T * D)}, *dh[2] = {floats(T * D), floats(T * D)};
    float *dx[2] = {floats(T * D), floats(T * D)};
    fill(x, T * D, 1), fill(dy, T * D, 2);
    small_make(&s, NULL, MOE_PARAMETERS_OWNED), set_gate(s.layer);
    recur(h, x, 0.5f);

    /* All time steps at once. */
    moe_forward_args f = step_args(h, y[0], 0, T);
    moe_backward_args b = backward_args(dy, dh[0]);
    OK(moe_layer_forward(s.layer, s.pass, &f));
    OK(moe_layer_backward(s.layer, s.pass, &b));
    recur_backward(dx[0], h, dh[0], 0.5f);

    /* One after another, a pass for each, and backwards from the last. */
    for (int i = 0; i < STEPS; i++) {
        f = step_args(h, y[1], i * BATCH, BATCH);
        OK(moe_pass_create(&passes[i], s.layer, NULL));
        OK(moe_layer_forward(s.layer, passes[i], &f));
    }
    for (int i = STEPS - 1; i >= 0; i--) {
        b = backward_args(dy + i * BATCH * D, dh[1] + i * BATCH * D);
        OK(moe_layer_backward(s.layer, passes[i], &b));
        moe_pass_destroy(passes[i]);
    }
    recur_backward(dx[1], h, dh[1], 0.5f);
    SHOW(same(y[0], y[1], T * D) && same(dh[0], dh[1], T * D) && same(dx[0], dx[1], T * D));
    small_free(&s);
    free(x), free(h), free(dy), free(y[0]), free(y[1]), free(dh[0]), free(dh[1]);
    free(dx[0]), free(dx[1]);
    printf("one layer on all %d time steps at once: the bytes of step by step; ok\n", STEPS);
    return 0;
}
