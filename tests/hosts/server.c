/* server.c - inference: batches of 0 to 64 tokens from several threads over one layer, each with
 * its own pass. A token's output is the same bytes alone and in any company; after the reserve
 * nothing is allocated. */
#include "host.h"

#include <pthread.h>
#include <stdatomic.h>

static _Atomic long allocations;

static void *counted_alloc(void *user, uint64_t size, uint64_t alignment)
{
    void *memory = NULL;
    (void)user;
    atomic_fetch_add(&allocations, 1);
    return posix_memalign(&memory, (size_t)alignment, (size_t)size) == 0 ? memory : NULL;
}

static void counted_free(void *user, void *memory, uint64_t size)
{
    (void)user, (void)size;
    free(memory);
}

typedef struct client {
    moe_layer *layer;
    moe_pass *pass;
    const float *x, *want; /* [T,D] */
    int number, failed;
} client;

static void *serve(void *argument)
{
    client *c = argument;
    float y[T * D];
    moe_forward_args f = forward_args(NULL, y, 0);
    f.flags = MOE_FORWARD_NO_SAVE;
    for (int request = 0; request < 150 && !c->failed; request++) {
        int64_t first = (request * 7 + c->number * 13) % T,
                tokens = (request * 11) % (T - first + 1);
        f.tokens = tokens, f.x = c->x + first * D;
        c->failed = moe_layer_forward(c->layer, c->pass, &f) != MOE_OK ||
                    !same(y, c->want + first * D, tokens * D);
    }
    return NULL;
}

int main(void)
{
    enum { CLIENTS = 4 };
    small s;
    moe_context_config k;
    client clients[CLIENTS];
    pthread_t threads[CLIENTS];
    float *x = floats(T * D), *want = floats(T * D);
    fill(x, T * D, 1);
    OK(moe_context_config_init(&k, sizeof k));
    k.alloc = counted_alloc, k.free = counted_free, k.threads = 2;
    small_make(&s, &k, MOE_PARAMETERS_OWNED_NO_GRAD);
    set_gate(s.layer);
    for (int64_t t = 0; t < T; t++) { /* each token alone */
        moe_forward_args f = forward_args(x + t * D, want + t * D, 1);
        f.flags = MOE_FORWARD_NO_SAVE;
        OK(moe_layer_forward(s.layer, s.pass, &f));
    }
    for (int i = 0; i < CLIENTS; i++) {
        clients[i] = (client){.layer = s.layer, .x = x, .want = want, .number = i};
        OK(moe_pass_create(&clients[i].pass, s.layer, NULL));
        OK(moe_pass_reserve(clients[i].pass, T, 1, MOE_FROM_CONFIG));
    }
    long before = allocations;
    for (int i = 0; i < CLIENTS; i++)
        SHOW(pthread_create(&threads[i], NULL, serve, &clients[i]) == 0);
    for (int i = 0; i < CLIENTS; i++)
        SHOW(pthread_join(threads[i], NULL) == 0 && !clients[i].failed);
#ifdef MOE_TWIN /* whose copies are allocations */
    (void)before;
#else
    SHOW(allocations == before);
#endif
    for (int i = 0; i < CLIENTS; i++) moe_pass_destroy(clients[i].pass);
    small_free(&s);
    free(x), free(want);
    printf(
        "600 requests of 0 to 64 tokens from 4 threads: the bytes of each token alone, no allocation; ok\n");
    return 0;
}
