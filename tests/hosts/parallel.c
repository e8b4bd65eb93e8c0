/* parallel.c - a host with threads of its own: seven of them run the library's tasks in shuffled
 * order, and the bytes are those of the library's own pool with 1, 2 or 3 threads. */
#include "host.h"

#include <pthread.h>
#include <stdatomic.h>

enum { THREADS = 7, MOST = 4096 };

typedef struct loop {
    moe_task_fn task;
    void *argument;
    int64_t order[MOST], count;
    _Atomic int64_t next;
} loop;

static void *work(void *argument)
{
    loop *l = argument;
    for (int64_t i; (i = atomic_fetch_add(&l->next, 1)) < l->count;)
        l->task(l->argument, l->order[i]);
    return NULL;
}

/* The host's parallel-for: any order, any thread. */
static int32_t parallel(void *user, int64_t count, moe_task_fn task, void *argument)
{
    static loop l;
    uint64_t *seed = user;
    pthread_t threads[THREADS];
    if (count > MOST) return 1;
    l.task = task, l.argument = argument, l.count = count;
    atomic_store(&l.next, 0);
    for (int64_t i = 0; i < count; i++) l.order[i] = i;
    for (int64_t i = count - 1; i > 0; i--) {
        *seed = *seed * 6364136223846793005u + 1442695040888963407u;
        int64_t j = (int64_t)((*seed >> 33) % (uint64_t)(i + 1)), swap = l.order[i];
        l.order[i] = l.order[j], l.order[j] = swap;
    }
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, work, &l) != 0) return 2;
    for (int i = 0; i < THREADS; i++) (void)pthread_join(threads[i], NULL);
    return 0;
}

static int32_t broken(void *user, int64_t count, moe_task_fn task, void *argument)
{
    for (int64_t i = 0; i < count; i++) task(argument, i);
    return --*(int *)user < 0 ? 42 : 0; /* works a few times, then reports a failure */
}

static void step(small *s, const float *x, float *y, const float *dy, float *dx)
{
    moe_forward_args f = forward_args(x, y, T);
    moe_backward_args b = backward_args(dy, dx);
    OK(moe_layer_forward(s->layer, s->pass, &f));
    OK(moe_layer_backward(s->layer, s->pass, &b));
}

/* Whichever call of the parallel-for fails: the message says so, the pass wants a new forward, and
 * all can be freed. */
static void survive(const float *x, float *y)
{
    moe_context_config c;
    int left = 1000000, failed = 0;
    small s;
    OK(moe_context_config_init(&c, sizeof c));
    c.parallel = broken, c.parallel_user = &left, c.threads = 4;
    small_make(&s, &c, MOE_PARAMETERS_OWNED);
    moe_forward_args f = forward_args(x, y, T);
    for (int good = 0;; good++, failed++) {
        left = good;
        moe_status status = moe_layer_forward(s.layer, s.pass, &f);
        if (status == MOE_OK) break; /* fewer calls than that */
        SHOW(status == MOE_ERROR_CALLBACK && strstr(moe_last_error(), "42") != NULL);
    }
    SHOW(failed > 0);
    small_free(&s);
}

int main(void)
{
    uint64_t seed = 3;
    moe_context_config c;
    float *x = floats(T * D), *dy = floats(T * D);
    float *y[4], *dx[4];
    small s[4];
    fill(x, T * D, 1), fill(dy, T * D, 2);
    for (int i = 0; i < 4; i++) {
        y[i] = floats(T * D), dx[i] = floats(T * D);
        OK(moe_context_config_init(&c, sizeof c));
        c.threads = i < 3 ? i + 1 : THREADS;
        if (i == 3) c.parallel = parallel, c.parallel_user = &seed;
        small_make(&s[i], &c, MOE_PARAMETERS_OWNED);
        set_gate(s[i].layer);
        step(&s[i], x, y[i], dy, dx[i]);
        SHOW(same(y[0], y[i], T * D) && same(dx[0], dx[i], T * D));
        SHOW(same_gradients(s[0].layer, s[i].layer));
    }
    survive(x, y[0]);
    for (int i = 0; i < 4; i++) small_free(&s[i]), free(y[i]), free(dx[i]);
    free(x), free(dy);
    printf("seven host threads in shuffled order: the bytes of 1, 2 and 3 own threads; ok\n");
    return 0;
}
