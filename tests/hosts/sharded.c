/* sharded.c - a host of sharded training: parameters are gathered into fresh memory just before
 * each call and taken away after it. The old memory is made inaccessible, so that a late read
 * would be a crash. */
#include "host.h"

#include <sys/mman.h>

enum { PARAMETERS = 16 };

typedef struct shard {
    float *memory;
    size_t bytes;
} shard;

/* Maps a copy of every parameter, with room for a gradient behind it, and binds it. */
static void gather(shard *shards, moe_layer *layer, const moe_layer *truth, int with_grad)
{
    for (int64_t i = 0; i < moe_layer_parameter_count(layer); i++) {
        moe_parameter_record p = record_of(truth, i);
        moe_binding b;
        size_t half = ((size_t)p.element_count * sizeof(float) + 4095) & ~(size_t)4095;
        shards[i].bytes = 2 * half;
        shards[i].memory = mmap(NULL, 2 * half, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                                -1, 0);
        SHOW(shards[i].memory != MAP_FAILED);
        memcpy(shards[i].memory, p.data, (size_t)p.element_count * sizeof(float));
        OK(moe_binding_init(&b, sizeof b));
        b.data = shards[i].memory;
        if (with_grad) b.grad = (float *)(void *)((char *)shards[i].memory + half);
        OK(moe_layer_bind(layer, i, &b));
    }
}

/* Poisons and closes what was gathered. Gradients are compared before. */
static void release(shard *shards, const moe_layer *layer)
{
    for (int64_t i = 0; i < moe_layer_parameter_count(layer); i++) {
        memset(shards[i].memory, 0xff, shards[i].bytes);
        SHOW(mprotect(shards[i].memory, shards[i].bytes, PROT_NONE) == 0);
    }
}

static void drop(shard *shards, const moe_layer *layer)
{
    for (int64_t i = 0; i < moe_layer_parameter_count(layer); i++)
        SHOW(munmap(shards[i].memory, shards[i].bytes) == 0);
}

int main(void)
{
    small truth, host;
    shard forward[PARAMETERS], backward[PARAMETERS];
    float *x = floats(T * D), *dy = floats(T * D), *y = floats(T * D), *dx = floats(T * D);
    float *want_y = floats(T * D), *want_dx = floats(T * D);
    fill(x, T * D, 1), fill(dy, T * D, 2);
    small_make(&truth, NULL, MOE_PARAMETERS_OWNED);
    set_gate(truth.layer);
    small_make(&host, NULL, MOE_PARAMETERS_BOUND);
    for (int step = 0; step < 3; step++) {
        moe_forward_args f = forward_args(x, want_y, T);
        moe_backward_args b = backward_args(dy, want_dx);
        f.step = step;
        OK(moe_layer_zero_gradients(truth.layer, NULL));
        OK(moe_layer_forward(truth.layer, truth.pass, &f));
        OK(moe_layer_backward(truth.layer, truth.pass, &b));
        f.y = y, b.dx = dx;
        gather(forward, host.layer, truth.layer, 0);
        OK(moe_layer_forward(host.layer, host.pass, &f));
        release(forward, host.layer);
        gather(backward, host.layer, truth.layer, 1);
        OK(moe_layer_backward(host.layer, host.pass, &b));
        SHOW(same(y, want_y, T * D) && same(dx, want_dx, T * D));
        SHOW(same_gradients(truth.layer, host.layer));
        release(backward, host.layer);
        drop(forward, host.layer), drop(backward, host.layer);
    }
    small_free(&host), small_free(&truth);
    free(x), free(dy), free(y), free(dx), free(want_y), free(want_dx);
    printf("bound anew before forward and backward, old memory closed: the same bytes; ok\n");
    return 0;
}
