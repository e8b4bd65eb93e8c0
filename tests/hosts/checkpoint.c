/* checkpoint.c - activation checkpointing: the forward keeps the routing only and is run again
 * before the backward, on the same pass or, from a saved plan, in another. Nothing is routed or
 * counted twice. */
#include "host.h"

typedef struct step {
    float y[T * D], dx[T * D];
    double loss;
} step;

static double total_loss(const moe_pass *pass)
{
    moe_losses losses;
    OK(moe_losses_init(&losses, sizeof losses));
    OK(moe_pass_losses(pass, &losses));
    return losses.total;
}

/* PLAN_ONLY, then RECOMPUTE on the same pass. */
static void with_recompute(small *s, const float *x, const float *dy, step *out,
                           int64_t *kept_bytes)
{
    moe_forward_args f = forward_args(x, out->y, T);
    moe_backward_args b = backward_args(dy, out->dx);
    f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_PLAN_ONLY;
    OK(moe_layer_forward(s->layer, s->pass, &f));
    OK(moe_pass_trim(s->pass)); /* while it waits, the routing is all it holds */
    *kept_bytes = moe_pass_bytes(s->pass);
    out->loss = total_loss(s->pass);
    f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_RECOMPUTE;
    f.y = NULL; /* the output is there already */
    OK(moe_layer_forward(s->layer, s->pass, &f));
    OK(moe_layer_backward(s->layer, s->pass, &b));
    SHOW(total_loss(s->pass) == out->loss);
}

/* An inference-like forward whose plan is kept as bytes; later a new pass replays it. */
static void with_saved_plan(small *s, const float *x, const float *dy, step *out)
{
    moe_forward_args f = forward_args(x, out->y, T);
    moe_backward_args b = backward_args(dy, out->dx);
    const moe_plan *routed;
    moe_plan *plan;
    moe_pass *later;
    int64_t size;
    f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_NO_SAVE;
    OK(moe_layer_forward(s->layer, s->pass, &f));
    out->loss = total_loss(s->pass);
    OK(moe_pass_plan(s->pass, &routed));
    SHOW(moe_plan_save(routed, NULL, 0, &size) == MOE_ERROR_BUFFER_TOO_SMALL);
    void *bytes = malloc((size_t)size);
    SHOW(bytes != NULL);
    OK(moe_plan_save(routed, bytes, size, &size));
    OK(moe_plan_create(&plan, s->context));
    OK(moe_plan_load(plan, bytes, size));
    OK(moe_pass_create(&later, s->layer, NULL));
    f.flags = MOE_FORWARD_TRAIN;
    f.plan = plan, f.plan_use = MOE_PLAN_IDS;
    OK(moe_layer_forward(s->layer, later, &f));
    OK(moe_layer_backward(s->layer, later, &b));
    moe_pass_destroy(later), moe_plan_destroy(plan), free(bytes);
}

int main(void)
{
    static step plain, again, replayed;
    small s[3];
    float *x = floats(T * D), *dy = floats(T * D);
    int64_t kept;
    fill(x, T * D, 1), fill(dy, T * D, 2);
    for (int i = 0; i < 3; i++) small_make(&s[i], NULL, MOE_PARAMETERS_OWNED), set_gate(s[i].layer);
    moe_forward_args f = forward_args(x, plain.y, T);
    moe_backward_args b = backward_args(dy, plain.dx);
    OK(moe_layer_forward(s[0].layer, s[0].pass, &f));
    OK(moe_layer_backward(s[0].layer, s[0].pass, &b));
    plain.loss = total_loss(s[0].pass);
    with_recompute(&s[1], x, dy, &again, &kept);
    with_saved_plan(&s[2], x, dy, &replayed);
    SHOW(kept < moe_pass_bytes(s[0].pass) / 50);
    SHOW(memcmp(&plain, &again, sizeof plain) == 0 && memcmp(&plain, &replayed, sizeof plain) == 0);
    SHOW(same_gradients(s[0].layer, s[1].layer) && same_gradients(s[0].layer, s[2].layer));
    printf(
        "recomputed and replayed: the bytes of the plain step, %lld instead of %lld bytes kept; ok\n",
        (long long)kept, (long long)moe_pass_bytes(s[0].pass));
    for (int i = 0; i < 3; i++) small_free(&s[i]);
    free(x), free(dy);
    return 0;
}
