/* 05_host_memory.c - a host that owns everything: its memory holds the parameters, gradients and
 * the workspace, its allocator gives the rest, its threads do the work. After the first step
 * nothing is allocated any more, and the bytes of the results are those of the library's own
 * threads.
 *
 * Introduces: moe_context_config (alloc, free, parallel), MOE_PARAMETERS_BOUND, moe_layer_bind,
 * moe_pass_config (workspace), moe_layer_memory, moe_layer_flops. */
#include "example.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

enum { T = 64, D = 32, F = 48, E = 8, K = 2, THREADS = 3, PARAMETERS = 8 };

/* ---- the host's allocator and threads -------------------------------------------------------- */

/* snippet: allocator */
typedef struct counter {
    int calls;
    long long live; /* bytes */
} counter;

static void *give(void *user, uint64_t size, uint64_t alignment)
{
    counter *c = user;
    c->calls++;
    c->live += (long long)size;
    return aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
}

static void take_back(void *user, void *memory, uint64_t size)
{
    ((counter *)user)->live -= (long long)size;
    free(memory);
}
/* end snippet */

/* snippet: parallel */
typedef struct job {
    moe_task_fn task;
    void *argument;
    int64_t count;
    _Atomic int64_t next;
} job;

static void *work(void *argument)
{
    job *j = argument;
    for (int64_t i; (i = atomic_fetch_add(&j->next, 1)) < j->count;) j->task(j->argument, i);
    return NULL;
}

/* Runs the library's tasks on threads of the host, any of them anywhere. A real host would hand
 * them to the pool it has. */
static int32_t parallel(void *user, int64_t count, moe_task_fn task, void *argument)
{
    pthread_t threads[THREADS - 1];
    job j = {task, argument, count, 0};
    (void)user;
    for (int i = 0; i < THREADS - 1; i++)
        if (pthread_create(&threads[i], NULL, work, &j) != 0)
            return 1; /* ends the library's call */
    (void)work(&j);
    for (int i = 0; i < THREADS - 1; i++) (void)pthread_join(threads[i], NULL);
    return 0;
}
/* end snippet */

/* ---- the layer ------------------------------------------------------------------------------- */

typedef struct host {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    float *data[PARAMETERS], *grad[PARAMETERS];
    void *workspace;
} host;

static void configure(moe_gate_config *g, moe_experts_config *e)
{
    OK(moe_gate_config_init(g, sizeof *g));
    g->d_model = D, g->num_experts = E, g->top_k = K;
    OK(moe_experts_config_init(e, sizeof *e));
    e->d_model = D, e->d_hidden = F, e->num_experts = E, e->bias = 1;
    g->parameters = e->parameters = MOE_PARAMETERS_BOUND;
}

/* snippet: ask-before */
/* How much will it take? Nothing has been created yet. */
static moe_cost ask(int64_t tokens, int32_t threads)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_cost_query q;
    moe_cost cost;
    configure(&g, &e);
    OK(moe_cost_query_init(&q, sizeof q));
    q.gate = &g, q.experts = &e, q.tokens = tokens, q.threads = threads;
    OK(moe_cost_init(&cost, sizeof cost));
    OK(moe_layer_memory(&q, &cost));
    OK(moe_layer_flops(&q, &cost));
    return cost;
}
/* end snippet */

/* snippet: bind */
static void bind_all(host *h)
{
    for (int64_t i = 0; i < moe_layer_parameter_count(h->layer); i++) {
        moe_parameter_record p;
        moe_binding b;
        OK(moe_parameter_record_init(&p, sizeof p));
        OK(moe_layer_parameter(h->layer, i, &p));
        size_t bytes = (size_t)p.element_count * sizeof(float);
        h->data[i] = malloc(bytes), h->grad[i] = calloc(1, bytes);
        HOLDS(h->data[i] && h->grad[i]);
        fill(h->data[i], p.element_count, 10 + (uint64_t)i);
        OK(moe_binding_init(&b, sizeof b));
        b.data = h->data[i]; /* never written to by the library */
        b.grad = h->grad[i]; /* NULL: not wanted, its work is saved */
        OK(moe_layer_bind(h->layer, i, &b));
    }
}
/* end snippet */

static void make(host *h, const moe_context_config *config, int64_t workspace_bytes)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    moe_pass_config w;
    OK(moe_context_create(&h->context, config));
    configure(&g, &e);
    OK(moe_gate_create(&h->gate, h->context, &g));
    OK(moe_experts_create(&h->experts, h->context, &e));
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = h->gate, l.experts = h->experts;
    OK(moe_layer_create(&h->layer, &l));
    bind_all(h);
    OK(moe_pass_config_init(&w, sizeof w));
    h->workspace = workspace_bytes ? aligned_alloc(64, (size_t)workspace_bytes) : NULL;
    w.workspace = h->workspace, w.workspace_bytes = workspace_bytes;
    OK(moe_pass_create(&h->pass, h->layer, &w));
}

static void drop(host *h)
{
    moe_pass_destroy(h->pass);
    moe_layer_destroy(h->layer);
    moe_experts_destroy(h->experts);
    moe_gate_destroy(h->gate);
    moe_context_destroy(h->context);
    for (int i = 0; i < PARAMETERS; i++) free(h->data[i]), free(h->grad[i]);
    free(h->workspace);
}

static void step(host *h, const float *x, float *y, const float *dy, float *dx)
{
    moe_forward_args f;
    moe_backward_args b;
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.x = x, f.y = y;
    OK(moe_layer_forward(h->layer, h->pass, &f));
    OK(moe_backward_args_init(&b, sizeof b));
    b.dy = dy, b.dx = dx, b.flags = MOE_BACKWARD_OVERWRITE;
    OK(moe_layer_backward(h->layer, h->pass, &b));
}

int main(void)
{
    static float x[T * D], dy[T * D], y[2][T * D], dx[2][T * D];
    counter memory = {0, 0};
    host own = {0}, plain = {0};
    moe_context_config c;
    fill(x, T * D, 1), fill(dy, T * D, 2);

    moe_cost cost = ask(T, THREADS);
    printf("parameters %d bytes, forward %.2f MFLOP, backward %.2f MFLOP\n",
           (int)cost.parameter_bytes, (double)cost.forward_flops / 1e6,
           (double)cost.backward_flops / 1e6);

    OK(moe_context_config_init(&c, sizeof c));
    c.alloc = give, c.free = take_back, c.alloc_user = &memory;
    c.parallel = parallel, c.threads = THREADS;
    make(&own, &c, cost.pass_bytes); /* the pass gets exactly what was answered, and no more */
    step(&own, x, y[0], dy, dx[0]);
    int after_first = memory.calls;
    for (int i = 0; i < 5; i++) step(&own, x, y[0], dy, dx[0]);
    printf("allocations after the first step: %d\n", memory.calls - after_first);
    HOLDS(memory.calls == after_first && moe_pass_bytes(own.pass) <= cost.pass_bytes);

    make(&plain, NULL, 0); /* the library's own memory and threads */
    step(&plain, x, y[1], dy, dx[1]);
    HOLDS(memcmp(y[0], y[1], sizeof y[0]) == 0 && memcmp(dx[0], dx[1], sizeof dx[0]) == 0);
    printf("the host's threads and the library's give the same bytes: y[0] = %.5f\n",
           (double)y[0][0]);

    drop(&plain), drop(&own);
    printf("bytes of the host's allocator still in use: %lld\n", memory.live);
    HOLDS(memory.live == 0);
    return 0;
}
