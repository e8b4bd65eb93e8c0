/* cost.c - how much memory and arithmetic a layer takes, answered from its configs.
 *
 *     parameters:  gate D E (+ E) (+ D E for the noise);  experts E (m D F + F O) (+ biases), m = 2
 *                  if gated
 *     forward:     2 T D E per router product + 2 N (m D F + F O) + 2 N O for combine
 *     backward:    twice the products (by the input and by the weight) + 4 N O around combine */
#include "cpus.h"
#include "pass_state.h"

#include <string.h>

static void query_defaults(void *instance)
{
    *(moe_cost_query *)instance = (moe_cost_query){.top_k = MOE_FROM_CONFIG};
}
static void cost_defaults(void *instance) { *(moe_cost *)instance = (moe_cost){0}; }

const moe__struct_info moe__cost_query_info = {"moe_cost_query", sizeof(moe_cost_query),
                                               offsetof(moe_cost_query, shared), query_defaults};
const moe__struct_info moe__cost_info = MOE__STRUCT_INFO(moe_cost, cost_defaults);

moe_status moe_cost_query_init(moe_cost_query *query, size_t size)
{
    return moe__struct_init(&moe__cost_query_info, query, size, __func__);
}
moe_status moe_cost_init(moe_cost *cost, size_t size)
{
    return moe__struct_init(&moe__cost_info, cost, size, __func__);
}

/* A query with its structs read and its defaults resolved. */
typedef struct cost_case {
    moe_cost_query q;
    moe_gate_config gate;
    moe_experts_config experts, shared, residual;
    moe__experts_room room, shared_room, residual_room;
    moe_layer_config layer;
    bool has_gate, has_experts, has_shared, has_residual;
    int64_t top_k, entries, groups, num_experts, threads;
} cost_case;

static moe_status read_pool(moe_experts_config *config, moe__experts_room *room,
                            const moe_experts_config *from, const char *function)
{
    moe_expert_callbacks callbacks;
    MOE_TRY(moe__struct_read(&moe__experts_config_info, config, from, false, function));
    MOE_TRY(moe__experts_config_check(config, &callbacks, function));
    *room = moe__experts_room_of(config, &callbacks);
    return MOE_OK;
}

/* Shared experts and residual branch stand beside routed ones of the same outside. */
static moe_status check_branches(const cost_case *c, const char *function)
{
    const struct {
        const char *name;
        const moe_experts_config *config;
        bool has;
    } branch[2] = {{"shared", &c->shared, c->has_shared},
                   {"residual", &c->residual, c->has_residual}};
    for (int i = 0; i < 2; i++) {
        const moe_experts_config *b = branch[i].config, *e = &c->experts;
        if (!branch[i].has) continue;
        if (!c->has_experts) REFUSE_ARGUMENT("%s is given, experts is NULL", branch[i].name);
        if (b->d_model != e->d_model || b->d_out != e->d_out || b->dtype != e->dtype)
            REFUSE_ARGUMENT(
                "%s has d_model %lld, d_out %lld, dtype %d, experts have %lld, %lld, %d",
                branch[i].name, (ll)b->d_model, (ll)b->d_out, (int)b->dtype, (ll)e->d_model,
                (ll)e->d_out, (int)e->dtype);
    }
    if (c->layer.shared_gate && !c->has_shared) REFUSE_ARGUMENT("shared_gate is 1, shared is NULL");
    if (c->layer.residual_mix && !c->has_residual)
        REFUSE_ARGUMENT("residual_mix is 1, residual is NULL");
    return MOE_OK;
}

static moe_status read_configs(cost_case *c, const moe_cost_query *query, const char *function)
{
    MOE_TRY(moe__struct_read(&moe__cost_query_info, &c->q, query, false, function));
    c->has_gate = c->q.gate != NULL;
    c->has_experts = c->q.experts != NULL;
    c->has_shared = c->q.shared != NULL;
    c->has_residual = c->q.residual != NULL;
    if (!c->has_gate && !c->has_experts)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "gate and experts are both NULL");
    if (c->has_gate) {
        MOE_TRY(moe__struct_read(&moe__gate_config_info, &c->gate, c->q.gate, false, function));
        MOE_TRY(moe__gate_config_check(&c->gate, function));
    }
    if (c->has_experts) MOE_TRY(read_pool(&c->experts, &c->room, c->q.experts, function));
    if (c->has_shared) MOE_TRY(read_pool(&c->shared, &c->shared_room, c->q.shared, function));
    if (c->has_residual)
        MOE_TRY(read_pool(&c->residual, &c->residual_room, c->q.residual, function));
    MOE_TRY(moe__struct_read(&moe__layer_config_info, &c->layer, c->q.layer, true, function));
    c->layer.gate = NULL;
    MOE_TRY(moe__layer_config_check(&c->layer, function));
    return check_branches(c, function);
}

static moe_status check_storage(const cost_case *c, const char *function)
{
    if (!c->q.context) return MOE_OK;
    if (c->has_experts) MOE_TRY(moe__storage_check(c->q.context, &c->experts, function));
    if (c->has_shared) MOE_TRY(moe__storage_check(c->q.context, &c->shared, function));
    return c->has_residual ? moe__storage_check(c->q.context, &c->residual, function) : MOE_OK;
}

static moe_status read_query(cost_case *c, const moe_cost_query *query, const char *function)
{
    memset(c, 0, sizeof *c);
    MOE_TRY(read_configs(c, query, function));
    int64_t top_k = c->q.top_k;
    c->num_experts = c->has_gate ? c->gate.num_experts : c->experts.num_experts;
    bool alone = !c->layer.comm;
    if (c->has_gate && c->has_experts && alone && c->num_experts != c->experts.num_experts)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "the gate has %lld experts, the pool has %lld",
               (ll)c->num_experts, (ll)c->experts.num_experts);
    if (c->has_gate && c->has_experts && c->gate.dtype != c->experts.dtype)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "the gate's dtype is %d, the pool's is %d",
               (int)c->gate.dtype, (int)c->experts.dtype);
    int32_t dtype = c->has_gate ? c->gate.dtype : c->experts.dtype;
    if (c->q.context && !moe__kernels(c->q.context, dtype))
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "dtype %d is not available on %s", (int)dtype,
               c->q.context->memory->name);
    MOE_TRY(check_storage(c, function));
    if (c->q.flags & ~(uint64_t)MOE__FORWARD_FLAGS)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "flags 0x%llx has unknown bits",
               (unsigned long long)c->q.flags);
    if (c->q.reserved != 0)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "reserved is %d", (int)c->q.reserved);
    if (c->has_gate && top_k == MOE_FROM_CONFIG) top_k = c->gate.top_k;
    if (c->has_gate && c->gate.kind == MOE_GATE_SOFTMAX_DENSE) top_k = c->num_experts;
    if (top_k < 0 || (c->has_gate && (top_k < 1 || top_k > moe__gate_most_k(&c->gate))))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "top_k is %lld with %lld experts", (ll)top_k,
               (ll)c->num_experts);
    if (c->q.tokens < 0) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "tokens is %lld", (ll)c->q.tokens);
    if (c->q.groups < 0) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "groups is %lld", (ll)c->q.groups);
    if (c->q.threads < 0 || c->q.threads > 4096)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "threads is %d", (int)c->q.threads);
    c->top_k = top_k;
    c->groups = moe__max(c->q.groups, 1);
    c->threads = c->q.threads ? c->q.threads : moe__available_threads();
    fenv_t saved;
    moe__fenv_enter(&saved);
    c->entries = c->has_gate ? moe__gate_most_entries(&c->gate, c->q.tokens, c->groups, top_k,
                                                      (c->q.flags & MOE_FORWARD_TRAIN) != 0)
                             : moe__mul(c->q.tokens, top_k);
    moe__fenv_leave(&saved);
    return MOE_OK;
}

/* Multiply-adds of one row: m D F + F O; 0 for identity, and for what only the host knows. */
static int64_t expert_products(const moe_experts_config *e)
{
    int64_t in = moe__mul(e->d_model, e->d_hidden), out = moe__mul(e->d_hidden, e->d_out);
    return moe__add(moe__mul(moe__is_gated(e->activation) ? 2 : 1, in), out);
}

/* Elements of weights that are no parameters: what fills panels up, or the packed copy. */
static int64_t extra_weights(const moe_experts_config *e, int64_t experts, int32_t storage)
{
    if (e->kind != MOE_EXPERTS_FEED_FORWARD || e->storage != storage) return 0;
    int64_t panels = moe__storage_panel_elements(e), weights = expert_products(e);
    if (panels < 0 || weights < 0) return -1;
    return moe__mul(experts, storage == MOE_STORAGE_PANELS ? panels - weights : panels);
}

/* Of all pools. */
static int64_t all_extra_weights(const cost_case *c, int32_t storage)
{
    int64_t sum = c->has_experts ? extra_weights(&c->experts, c->num_experts, storage) : 0;
    if (c->has_shared)
        sum = moe__add(sum, extra_weights(&c->shared, c->shared.num_experts, storage));
    if (c->has_residual)
        sum = moe__add(sum, extra_weights(&c->residual, c->residual.num_experts, storage));
    return sum;
}

static int64_t expert_parameters(const moe_experts_config *e)
{
    if (e->kind != MOE_EXPERTS_FEED_FORWARD) return 0;
    int64_t biases = moe__add(moe__mul(moe__is_gated(e->activation) ? 2 : 1, e->d_hidden),
                              e->d_out);
    return moe__add(expert_products(e), e->bias ? biases : 0);
}

/* Elements of a router's matrices: D E, or for two levels D A + A D B, of A those that are here;
 * twice with noise. */
static int64_t router_matrices(const moe_gate_config *g, bool noise)
{
    int64_t primary = g->kind == MOE_GATE_HIERARCHICAL ? g->expert_groups : 0;
    int64_t columns = g->num_experts;
    if (g->secondary == MOE_SECONDARY_WITH_GROUP)
        columns = g->num_experts / g->expert_groups * g->local_groups;
    return moe__mul(noise ? 2 : 1, moe__mul(g->d_model, moe__add(columns, primary)));
}

static int64_t gate_parameters(const moe_gate_config *g)
{
    int64_t vectors = g->bias + g->selection_bias + (g->kind == MOE_GATE_BALANCED);
    return moe__add(router_matrices(g, moe__gate_is_noisy(g)), moe__mul(vectors, g->num_experts));
}

/* Of them, those that are f32 where the others have 16 bits. */
static int64_t f32_vectors(const moe_gate_config *g)
{
    return moe__mul(g->selection_bias + (g->kind == MOE_GATE_BALANCED), g->num_experts);
}

/* Parameters of everything that each token meets but the routed experts. */
static int64_t fixed_parameters(const cost_case *c)
{
    int64_t sum = c->has_gate ? gate_parameters(&c->gate) : 0;
    if (c->has_shared)
        sum = moe__add(sum, moe__mul(c->shared.num_experts, expert_parameters(&c->shared)));
    if (c->has_residual)
        sum = moe__add(sum, moe__mul(c->residual.num_experts, expert_parameters(&c->residual)));
    if (c->layer.shared_gate) sum = moe__add(sum, c->experts.d_model);
    if (c->layer.residual_mix) sum = moe__add(sum, moe__add(moe__mul(2, c->experts.d_model), 2));
    return sum;
}

moe_status moe_layer_memory(const moe_cost_query *query, moe_cost *cost)
{
    cost_case c;
    double weights[MOE_LOSS_SLOTS] = {0};
    MOE_TRY(moe__struct_check_out(&moe__cost_info, cost, __func__));
    MOE_TRY(read_query(&c, query, __func__));
    int32_t dtype = c.has_gate ? c.gate.dtype : c.experts.dtype;
    int64_t element = moe__dtype_size(dtype), vectors = c.has_gate ? f32_vectors(&c.gate) : 0;
    int64_t real_size = moe__dtype_size(moe__real_dtype(dtype));
    int64_t fixed = fixed_parameters(&c);
    int64_t expert = c.has_experts ? expert_parameters(&c.experts) : 0;
    int64_t per_token = c.has_gate ? moe__gate_entries_per_token(&c.gate, c.top_k) : c.top_k;
    int64_t count = moe__add(fixed, moe__mul(c.num_experts, expert));
    if (c.has_gate) moe__gate_loss_weights(&c.gate, weights);
    moe__pass_shape shape = moe__pass_shape_of(c.has_gate ? &c.gate : NULL,
                                               c.has_experts ? &c.room : NULL, &c.layer, weights,
                                               true, false, c.q.flags);
    shape.shared = c.has_shared ? &c.shared_room : NULL;
    shape.residual = c.has_residual ? &c.residual_room : NULL;
    shape.tokens = c.q.tokens;
    shape.entries = c.entries;
    shape.groups = c.groups;
    shape.top_k = c.top_k;
    shape.threads = (int32_t)c.threads;
    if (c.q.context && !c.q.context->memory->is_host) {
        shape.threads = 1;
        shape.padded_rows = c.layer.padded_rows;
        c.room.keep_h = c.shared_room.keep_h = c.residual_room.keep_h = true;
    }
    int64_t wider = moe__mul(vectors, real_size - element);
    int64_t filling = all_extra_weights(&c, MOE_STORAGE_PANELS);
    int64_t stored = moe__add(count,
                              moe__add(filling, all_extra_weights(&c, MOE_STORAGE_PREPACKED)));
    moe_cost known = {.parameter_bytes = moe__add(moe__mul(stored, element), wider),
                      .gradient_bytes = moe__mul(moe__add(count, filling), real_size),
                      .parameter_count = count,
                      .pass_bytes = moe__pass_shape_bytes(c.q.context, &shape),
                      .active_parameters = moe__add(fixed, moe__mul(per_token, expert))};
    if (known.parameter_bytes < 0 || known.gradient_bytes < 0 || known.pass_bytes < 0 ||
        known.active_parameters < 0)
        return moe__fail(MOE_ERROR_OVERFLOW, __func__, "the answer does not fit in 63 bits");
    moe__struct_write(&moe__cost_info, cost, &known);
    return MOE_OK;
}

/* Multiply-adds of a batch in the router: of two levels, D A and top_groups times D B a token. */
static int64_t router_products(const cost_case *c)
{
    const moe_gate_config *g = &c->gate;
    bool noise = moe__gate_is_noisy(g) && (c->q.flags & MOE_FORWARD_TRAIN);
    int64_t candidates = g->num_experts;
    if (g->kind == MOE_GATE_HIERARCHICAL)
        candidates = moe__add(g->expert_groups,
                              moe__mul(g->top_groups, g->num_experts / g->expert_groups));
    return moe__mul(moe__mul(noise ? 2 : 1, moe__mul(g->d_model, candidates)), c->q.tokens);
}

static void add_branch(const moe_experts_config *branch, int64_t tokens, int64_t *rows,
                       int64_t *combine)
{
    int64_t entries = moe__mul(tokens, branch->num_experts);
    *rows = moe__add(*rows, moe__mul(entries, expert_products(branch)));
    *combine = moe__add(*combine, moe__mul(entries, branch->d_out));
}

moe_status moe_layer_flops(const moe_cost_query *query, moe_cost *cost)
{
    cost_case c;
    MOE_TRY(moe__struct_check_out(&moe__cost_info, cost, __func__));
    MOE_TRY(read_query(&c, query, __func__));
    int64_t router = 0, rows = 0, combine = 0;
    if (c.has_gate) router = router_products(&c);
    /* Thresholds may choose every expert, but the mean number is K. */
    bool by_threshold = c.has_gate && c.gate.kind == MOE_GATE_BALANCED &&
                        !(c.q.flags & MOE_FORWARD_TRAIN);
    int64_t entries = by_threshold ? moe__mul(c.q.tokens, c.top_k) : c.entries;
    if (c.has_experts) {
        rows = moe__mul(entries, expert_products(&c.experts));
        combine = moe__mul(entries, c.experts.d_out);
    }
    if (c.has_shared) add_branch(&c.shared, c.q.tokens, &rows, &combine);
    if (c.has_residual) add_branch(&c.residual, c.q.tokens, &rows, &combine);
    if (c.layer.shared_gate) router = moe__add(router, moe__mul(c.q.tokens, c.experts.d_model));
    if (c.layer.residual_mix)
        router = moe__add(router, moe__mul(c.q.tokens, moe__mul(2, c.experts.d_model)));
    int64_t products = moe__add(router, rows);
    moe_cost known = {0};
    MOE_TRY(moe__struct_read(&moe__cost_info, &known, cost, false, __func__));
    known.forward_flops = moe__mul(2, moe__add(products, combine));
    known.backward_flops = moe__mul(4, moe__add(products, combine));
    if (known.forward_flops < 0 || known.backward_flops < 0)
        return moe__fail(MOE_ERROR_OVERFLOW, __func__, "the answer does not fit in 63 bits");
    moe__struct_write(&moe__cost_info, cost, &known);
    return MOE_OK;
}
