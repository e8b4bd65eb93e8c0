/* torch.c - a host like PyTorch: parameters are its own tensors, their gradients do not exist at
 * first and are fresh memory in every step, outputs too. Everything is bound anew each step,
 * nothing is copied. */
#include "host.h"

enum { PARAMETERS = 16 };

typedef struct module {
    float *data[PARAMETERS], *grad[PARAMETERS];
    int64_t count;
} module;

/* The host's tensors get the values of a layer that owns its own. */
static void make_module(module *m, const moe_layer *owner)
{
    m->count = moe_layer_parameter_count(owner);
    for (int64_t i = 0; i < m->count; i++) {
        moe_parameter_record p = record_of(owner, i);
        m->data[i] = floats(p.element_count);
        m->grad[i] = NULL;
        memcpy(m->data[i], p.data, (size_t)p.element_count * sizeof(float));
    }
}

static void bind(const module *m, moe_layer *layer)
{
    for (int64_t i = 0; i < m->count; i++) {
        moe_binding b;
        OK(moe_binding_init(&b, sizeof b));
        b.data = m->data[i];
        b.grad = m->grad[i];
        OK(moe_layer_bind(layer, i, &b));
    }
}

static void fresh_gradients(module *m, const moe_layer *layer)
{
    for (int64_t i = 0; i < m->count; i++) {
        free(m->grad[i]);
        m->grad[i] = floats(record_of(layer, i).element_count);
        memset(m->grad[i], 0xff, (size_t)record_of(layer, i).element_count * sizeof(float));
    }
}

int main(void)
{
    small owner, host;
    module m;
    float *x = floats(T * D), *dy = floats(T * D), *want_y = floats(T * D),
          *want_dx = floats(T * D);
    fill(x, T * D, 1), fill(dy, T * D, 2);
    small_make(&owner, NULL, MOE_PARAMETERS_OWNED);
    set_gate(owner.layer);
    small_make(&host, NULL, MOE_PARAMETERS_BOUND);
    make_module(&m, owner.layer);
    for (int step = 0; step < 3; step++) {
        float *y = floats(T * D), *dx = floats(T * D);
        moe_forward_args f = forward_args(x, want_y, T);
        moe_backward_args b = backward_args(dy, want_dx);
        f.step = step;
        b.flags = MOE_BACKWARD_OVERWRITE;
        OK(moe_layer_forward(owner.layer, owner.pass, &f));
        OK(moe_layer_backward(owner.layer, owner.pass, &b));
        bind(&m, host.layer); /* in step 0 every gradient is NULL: nothing is wanted yet */
        f.y = y, b.dx = dx;
        OK(moe_layer_forward(host.layer, host.pass, &f));
        if (step > 0) fresh_gradients(&m, host.layer);
        bind(&m, host.layer); /* between forward and backward: same contents, other gradients */
        OK(moe_layer_backward(host.layer, host.pass, &b));
        SHOW(same(y, want_y, T * D) && same(dx, want_dx, T * D));
        SHOW(step == 0 || same_gradients(owner.layer, host.layer));
        free(y), free(dx);
    }
    for (int64_t i = 0; i < m.count; i++) free(m.data[i]), free(m.grad[i]);
    small_free(&host), small_free(&owner);
    free(x), free(dy), free(want_y), free(want_dx);
    printf("gradients NULL at first, then fresh in every step: the bytes of an owning layer; ok\n");
    return 0;
}
