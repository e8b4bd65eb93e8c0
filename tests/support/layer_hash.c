/* layer_hash.c - the choices of a hash gate, which only the library can draw. */
#include "support/layer_case.h"

#include <check.h>
#include <stdlib.h>

/* ids = what the library draws from the keys, by a gate without weights in a layer without experts
 * of its own: a reference for all but the draw, which must give distinct experts. */
static void draw_ids(layer_case *c)
{
    moe_context *context = new_context();
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    moe_forward_args f;
    moe_plan_view v;
    const moe_plan *plan;
    moe_gate *gate = NULL;
    moe_experts *pool = NULL;
    moe_layer *layer = NULL;
    moe_pass *pass = NULL;
    float *x = calloc((size_t)c->T + 1, sizeof *x), *y = calloc((size_t)c->T + 1, sizeof *y);
    MUST(moe_gate_config_init(&g, sizeof g));
    g.num_experts = c->E, g.top_k = c->K, g.kind = MOE_GATE_HASH, g.seed = CASE_SEED;
    g.stream_id = CASE_STREAM;
    MUST(moe_gate_create(&gate, context, &g));
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = 1, e.num_experts = c->E, e.kind = MOE_EXPERTS_IDENTITY;
    MUST(moe_experts_create(&pool, context, &e));
    MUST(moe_layer_config_init(&l, sizeof l));
    l.gate = gate, l.experts = pool, l.layer_id = c->no_experts ? 0 : CASE_LAYER;
    MUST(moe_layer_create(&layer, &l));
    MUST(moe_pass_create(&pass, layer, NULL));
    MUST(moe_forward_args_init(&f, sizeof f));
    f.tokens = c->T, f.x = x, f.y = y, f.token_key = c->token_key;
    MUST(moe_layer_forward(layer, pass, &f));
    MUST(moe_pass_plan(pass, &plan));
    MUST(moe_plan_view_init(&v, sizeof v));
    MUST(moe_plan_get(plan, &v));
    ck_assert_int_eq(v.entries, c->T * c->K);
    for (int64_t n = 0; n < v.entries; n++) {
        c->ids[n] = v.expert_of_entry[n];
        if (c->ids[n] >= c->E) ck_abort_msg("expert %d", (int)c->ids[n]);
        for (int64_t m = n / c->K * c->K; m < n; m++)
            if (c->ids[m] == c->ids[n]) ck_abort_msg("expert %d twice", (int)c->ids[n]);
    }
    moe_pass_destroy(pass), moe_layer_destroy(layer), moe_gate_destroy(gate);
    moe_experts_destroy(pool), moe_context_destroy(context);
    free(x), free(y);
}

void layer_case_hash(layer_case *c, uint64_t *state)
{
    static const int64_t some[] = {0, 1, -1, INT64_MAX, INT64_MIN, 42};
    c->token_key = malloc(((size_t)c->T + 1) * sizeof *c->token_key);
    c->ids = malloc(((size_t)(c->T * c->K) + 1) * sizeof *c->ids);
    ck_assert(c->token_key && c->ids);
    for (int64_t t = 0; t < c->T; t++)
        c->token_key[t] = t < 6 ? some[t] : (int64_t)(random_uniform(state) * 20);
    draw_ids(c);
    c->p.fixed_ids = c->ids;
}
