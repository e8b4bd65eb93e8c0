/* bench_layer.c - a whole layer as a peer, with what its routing takes; and the memory of a pool.
 *
 * The layer has a softmax gate of the shape's top K. What its report says of gate, packing and
 * combining is the part that is printed as layer_routing. */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct layer_peer {
    const bench_work *w;
    moe_context *context;
    moe_gate *gate;
    moe_experts *pool;
    moe_layer *layer;
    moe_pass *pass;
    moe_forward_args f;
    moe_backward_args b;
} layer_peer;

static double routing_seconds(const moe_pass *pass, bool backward)
{
    static const int parts[] = {MOE_TIME_GATE, MOE_TIME_PACK, MOE_TIME_COMBINE};
    moe_pass_report r;
    double sum = 0;
    MUST(moe_pass_report_init(&r, sizeof r));
    MUST(moe_pass_get_report(pass, &r));
    for (int i = 0; i < 3; i++)
        sum += r.forward_seconds[parts[i]] + (backward ? r.backward_seconds[parts[i]] : 0);
    return sum;
}

static double run(bench_peer *p, int64_t call)
{
    layer_peer *m = p->state;
    bool backward = m->w->o->backward;
    double begin = bench_now(), seconds;
    (void)call;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    if (backward) MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    seconds = bench_now() - begin;
    p->second_seconds = routing_seconds(m->pass, backward);
    return seconds;
}

static void end(bench_peer *p)
{
    layer_peer *m = p->state;
    moe_pass_destroy(m->pass), moe_layer_destroy(m->layer), moe_gate_destroy(m->gate);
    moe_experts_destroy(m->pool), moe_context_destroy(m->context);
    free(m);
}

static void make_layer(layer_peer *m)
{
    const bench_options *o = m->w->o;
    moe_gate_config g;
    moe_layer_config l;
    MUST(moe_gate_config_init(&g, sizeof g));
    g.d_model = o->D, g.num_experts = o->E, g.top_k = o->K;
    MUST(moe_gate_create(&m->gate, m->context, &g));
    MUST(moe_layer_config_init(&l, sizeof l));
    l.gate = m->gate, l.experts = m->pool;
    MUST(moe_layer_create(&m->layer, &l));
    MUST(moe_gate_init_parameters(m->gate, o->seed));
    MUST(moe_pass_create(&m->pass, m->layer, NULL));
    MUST(moe_forward_args_init(&m->f, sizeof m->f));
    m->f.tokens = o->T, m->f.x = m->w->x, m->f.y = m->w->y;
    m->f.flags = o->backward ? MOE_FORWARD_TRAIN : MOE_FORWARD_NO_SAVE;
    MUST(moe_backward_args_init(&m->b, sizeof m->b));
    m->b.dy = m->w->dy, m->b.dx = m->w->dx, m->b.flags = MOE_BACKWARD_OVERWRITE;
}

bool bench_layer_peer(bench_peer *p, bench_work *w, int32_t storage)
{
    layer_peer *m = calloc(1, sizeof *m);
    moe_context_config c;
    moe_experts_config e;
    if (!m) exit(1);
    m->w = w;
    *p = (bench_peer){.name = "layer", .state = m, .run = run, .end = end};
    p->amount = bench_flops(w->o), p->second = "layer_routing";
    MUST(moe_context_config_init(&c, sizeof c));
    c.threads = w->o->threads, c.isa = w->o->isa;
    MUST(moe_context_create(&m->context, &c));
    bench_experts_config(&e, w->o);
    e.storage = storage;
    if (moe_experts_create(&m->pool, m->context, &e) != MOE_OK) {
        (void)fprintf(stderr, "bench: layer left out: %s\n", moe_last_error());
        end(p);
        return false;
    }
    make_layer(m);
    bench_fill_pool(w, m->pool);
    return true;
}

/* ---- memory ---------------------------------------------------------------------------------- */

static void *counted_alloc(void *user, uint64_t size, uint64_t alignment)
{
    void *memory = NULL;
    ++*(int64_t *)user;
    return posix_memalign(&memory, (size_t)alignment, (size_t)size) == 0 ? memory : NULL;
}

static void counted_free(void *user, void *memory, uint64_t size)
{
    (void)user, (void)size;
    free(memory);
}

typedef struct memory_case {
    bench_work w;
    moe_context *context;
    moe_experts *pool;
    moe_pass *pass;
    moe_plan *plan;
    int64_t allocations;
} memory_case;

static void memory_step(memory_case *m)
{
    const bench_options *o = m->w.o;
    moe_forward_args f;
    moe_backward_args b;
    MUST(moe_forward_args_init(&f, sizeof f));
    f.tokens = o->T, f.x = m->w.x, f.y = m->w.y, f.plan = m->plan;
    f.flags = o->backward ? MOE_FORWARD_TRAIN : MOE_FORWARD_NO_SAVE;
    MUST(moe_experts_forward(m->pool, m->pass, &f));
    if (!o->backward) return;
    MUST(moe_backward_args_init(&b, sizeof b));
    b.dy = m->w.dy, b.dx = m->w.dx, b.entry_weight_grad = m->w.entry_weight_grad;
    b.flags = MOE_BACKWARD_OVERWRITE;
    MUST(moe_experts_backward(m->pool, m->pass, &b));
}

/* Built once: moe_plan_build allocates in each call, what it replaces being kept on error. */
static void memory_plan(memory_case *m)
{
    const bench_options *o = m->w.o;
    moe_plan_args a;
    MUST(moe_plan_create(&m->plan, m->context));
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = o->T, a.num_experts = o->E, a.top_k = o->K;
    a.expert_ids = m->w.ids, a.weights = m->w.entry_weight;
    MUST(moe_plan_build(m->plan, &a));
}

static int memory_make(memory_case *m, const bench_options *o)
{
    moe_context_config c;
    moe_experts_config e;
    MUST(moe_context_config_init(&c, sizeof c));
    c.threads = o->threads, c.isa = o->isa;
    c.alloc = counted_alloc, c.free = counted_free, c.alloc_user = &m->allocations;
    MUST(moe_context_create(&m->context, &c));
    bench_experts_config(&e, o);
    e.storage = o->storage[0];
    if (moe_experts_create(&m->pool, m->context, &e) != MOE_OK) {
        (void)fprintf(stderr, "bench: %s\n", moe_last_error());
        return 1;
    }
    bench_fill_pool(&m->w, m->pool);
    MUST(moe_pass_create_for_experts(&m->pass, m->pool, NULL));
    memory_plan(m);
    return 0;
}

/* Parameters, gradients, and of the activations what a backward cannot do without: R rows of `wide`
 * before the activation function, and R outputs, whose products with dy are the gradients of the
 * weights. */
static double least_bytes(const bench_work *w)
{
    const bench_options *o = w->o;
    double parameters = 4 * (double)o->E * (double)o->D * (double)(w->wide + o->F);
    double saved = 4 * (double)w->R * (double)(w->wide + o->D);
    return o->backward ? 2 * parameters + saved : parameters;
}

/* memory, storage, shape, routing, pass, peak MiB, MiB of the formula above, MiB of the pass,
 * allocations in three steady steps. Peak memory is without what the process had before, the host's
 * x, y, dx and dy among it. */
int bench_memory_run(const bench_options *o)
{
    memory_case m;
    bench_crew *crew = bench_crew_start(1);
    double before, least;
    int64_t warm;
    int status;
    memset(&m, 0, sizeof m);
    bench_work_make(&m.w, o, crew);
    memset(m.w.y, 1, (size_t)(4 * o->T * o->D)), memset(m.w.dx, 1, (size_t)(4 * o->T * o->D));
    before = bench_memory("VmRSS"), least = least_bytes(&m.w);
    status = memory_make(&m, o);
    if (status == 0) {
        for (int i = 0; i < 2; i++) memory_step(&m);
        warm = m.allocations;
        for (int i = 0; i < 3; i++) memory_step(&m);
        printf("memory,%s,%s,%s,%s,%.1f,%.1f,%.1f,%lld\n", bench_storage_name(o->storage[0]),
               o->shape, o->routing, o->backward ? "fwdbwd" : "fwd",
               (bench_memory("VmHWM") - before) / 1048576, least / 1048576,
               (double)moe_pass_bytes(m.pass) / 1048576, (long long)(m.allocations - warm));
    }
    moe_pass_destroy(m.pass), moe_plan_destroy(m.plan), moe_experts_destroy(m.pool);
    moe_context_destroy(m.context);
    bench_work_free(&m.w), bench_crew_stop(crew);
    return status;
}
