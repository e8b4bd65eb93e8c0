/* bench_moe.c - libmoe as a peer: a pool of experts, and a plan made anew in every call.
 *
 * A call is moe_plan_build from ids and weights, moe_experts_forward and, for fwdbwd,
 * moe_experts_backward with every gradient set. Row-major and prepacked pools are bound to the
 * memory that the other peers read; panels are the pool's own, with the same values if --check is
 * given, when all peers must agree. A training
 * step changes weights, so a prepacked pool packs them again in each. */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct moe_peer {
    const bench_work *w;
    char name[32];
    int32_t storage;
    bool even;
    moe_context *context;
    moe_experts *pool;
    moe_plan *plan;
    moe_pass *pass;
    moe_plan_args plan_args;
    moe_forward_args f;
    moe_backward_args b;
} moe_peer;

static double run(bench_peer *p, int64_t call)
{
    moe_peer *m = p->state;
    bool backward = m->w->o->backward;
    double begin = bench_now();
    m->plan_args.expert_ids = m->even ? m->w->even_ids : bench_ids(m->w, call);
    MUST(moe_plan_build(m->plan, &m->plan_args));
    if (backward && m->storage == MOE_STORAGE_PREPACKED) MUST(moe_experts_weights_changed(m->pool));
    MUST(moe_experts_forward(m->pool, m->pass, &m->f));
    if (backward) MUST(moe_experts_backward(m->pool, m->pass, &m->b));
    return bench_now() - begin;
}

static void end(bench_peer *p)
{
    moe_peer *m = p->state;
    moe_pass_destroy(m->pass), moe_plan_destroy(m->plan);
    moe_experts_destroy(m->pool), moe_context_destroy(m->context);
    free(m);
}

static void bind(moe_peer *m, const char *name, const float *data, float *grad)
{
    moe_binding b;
    MUST(moe_binding_init(&b, sizeof b));
    b.data = data, b.grad = grad;
    MUST(moe_experts_bind(m->pool, moe_experts_parameter_find(m->pool, name), &b));
}

/* Returns MOE_OK, or MOE_ERROR_NOT_SUPPORTED of a storage mode that this build lacks. */
static moe_status make_pool(moe_peer *m, int32_t storage)
{
    const bench_work *w = m->w;
    moe_experts_config e;
    moe_status status;
    bench_experts_config(&e, w->o);
    e.storage = storage;
    if (storage != MOE_STORAGE_PANELS) e.parameters = MOE_PARAMETERS_BOUND;
    status = moe_experts_create(&m->pool, m->context, &e);
    if (status == MOE_ERROR_NOT_SUPPORTED) return status;
    bench_must(status, "moe_experts_create");
    if (storage == MOE_STORAGE_PANELS) {
        bench_fill_pool(w, m->pool);
        return MOE_OK;
    }
    bind(m, w->o->gated ? "w13" : "w1", w->w1, w->g1);
    bind(m, "w2", w->w2, w->g2);
    MUST(moe_experts_weights_changed(m->pool));
    return MOE_OK;
}

static void make_arguments(moe_peer *m)
{
    const bench_work *w = m->w;
    MUST(moe_plan_args_init(&m->plan_args, sizeof m->plan_args));
    m->plan_args.tokens = w->o->T, m->plan_args.num_experts = w->o->E;
    m->plan_args.top_k = w->o->K, m->plan_args.weights = w->entry_weight;
    MUST(moe_forward_args_init(&m->f, sizeof m->f));
    m->f.tokens = w->o->T, m->f.x = w->x, m->f.y = w->y, m->f.plan = m->plan;
    m->f.flags = w->o->backward ? MOE_FORWARD_TRAIN : MOE_FORWARD_NO_SAVE;
    MUST(moe_backward_args_init(&m->b, sizeof m->b));
    m->b.dy = w->dy, m->b.dx = w->dx, m->b.entry_weight_grad = w->entry_weight_grad;
    m->b.flags = MOE_BACKWARD_OVERWRITE;
}

static void make_context(moe_peer *m, int threads)
{
    moe_context_config c;
    MUST(moe_context_config_init(&c, sizeof c));
    c.threads = threads, c.isa = m->w->o->isa;
    MUST(moe_context_create(&m->context, &c));
}

bool bench_moe_peer(bench_peer *p, bench_work *w, int32_t storage, int threads, bool even)
{
    moe_peer *m = calloc(1, sizeof *m);
    const char *what = even ? "balanced" : threads < w->o->threads ? "one_thread" : "libmoe";
    if (!m) exit(1);
    m->w = w, m->storage = storage, m->even = even;
    (void)snprintf(m->name, sizeof m->name, "%s_%s", what, bench_storage_name(storage));
    if (storage != MOE_STORAGE_PANELS) bench_work_weights(w);
    make_context(m, threads);
    *p = (bench_peer){.name = m->name, .state = m, .run = run, .end = end};
    p->amount = bench_flops(w->o),
    p->comparable = !even && (storage != MOE_STORAGE_PANELS || w->o->check);
    if (make_pool(m, storage) != MOE_OK) {
        (void)fprintf(stderr, "bench: %s left out: %s\n", m->name, moe_last_error());
        end(p);
        return false;
    }
    MUST(moe_plan_create(&m->plan, m->context));
    MUST(moe_pass_create_for_experts(&m->pass, m->pool, NULL));
    make_arguments(m);
    return true;
}
