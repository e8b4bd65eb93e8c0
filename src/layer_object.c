/* layer_object.c - the layer object: its config and its life. Its steps are in layer.c. */
#include "pass_state.h"

#include <string.h>

static void layer_defaults(void *instance)
{
    *(moe_layer_config *)instance = (moe_layer_config){.expert_slices = 1, .exchange_chunks = 1};
}

const moe__struct_info moe__layer_config_info = {"moe_layer_config", sizeof(moe_layer_config),
                                                 offsetof(moe_layer_config, dropped),
                                                 layer_defaults};

moe_status moe_layer_config_init(moe_layer_config *config, size_t size)
{
    return moe__struct_init(&moe__layer_config_info, config, size, __func__);
}

/* Secondary gates that live with their groups. */
static moe_status check_secondary(const moe_layer_config *c, const char *function)
{
    if (!c->gate || c->gate->config.secondary == MOE_SECONDARY_REPLICATED) return MOE_OK;
    const moe_gate_config *g = &c->gate->config;
    if (!c->comm) REFUSE_ARGUMENT("the gate's secondary is MOE_SECONDARY_WITH_GROUP, comm is NULL");
    if (c->exchange != MOE_EXCHANGE_EXACT || c->expert_slices > 1)
        REFUSE_ARGUMENT("the gate's secondary MOE_SECONDARY_WITH_GROUP clashes with %s",
                        c->expert_slices > 1 ? "expert_slices" : "exchange MOE_EXCHANGE_PADDED");
    if (c->comm->size == 1 && g->local_groups != g->expert_groups)
        REFUSE_ARGUMENT("local_groups is %lld of %lld on the only rank", (ll)g->local_groups,
                        (ll)g->expert_groups);
    return MOE_OK;
}

/* Slices of an expert are summed, so nothing may come after them. */
static moe_status check_slices(const moe_layer_config *c, const char *function)
{
    const moe_experts_config *e = &c->experts->config;
    if (c->expert_slices == 1) return MOE_OK;
    if (e->kind != MOE_EXPERTS_FEED_FORWARD || c->experts->made_of_parts)
        REFUSE_ARGUMENT("expert_slices is %lld; the experts are not feed-forward networks",
                        (ll)c->expert_slices);
    if (e->bias || e->output != MOE_OUTPUT_LINEAR)
        REFUSE_ARGUMENT("expert_slices %lld clashes with %s %d of the experts",
                        (ll)c->expert_slices, e->bias ? "bias" : "output",
                        e->bias ? (int)e->bias : (int)e->output);
    return MOE_OK;
}

/* Rows by way of nodes. */
static moe_status check_rails(const moe_layer_config *c, const char *function)
{
    const moe_comm *node = c->node_comm, *rail = c->rail_comm;
    if (!node) return MOE_OK;
    if (!c->comm) REFUSE_ARGUMENT("node_comm is given, comm is NULL");
    if (node->context != c->comm->context || rail->context != c->comm->context)
        REFUSE_ARGUMENT("%s and comm are of different contexts",
                        node->context != c->comm->context ? "node_comm" : "rail_comm");
    return MOE_OK;
}

static moe_status check_objects(const moe_layer_config *c, const char *function)
{
    const moe_gate *g = c->gate;
    const moe_experts *e = c->experts;
    if (!e) REFUSE_ARGUMENT("experts is NULL");
    if (g && g->context != e->context)
        REFUSE_ARGUMENT("gate and experts are of different contexts");
    MOE_TRY(check_rails(c, function));
    bool host = e->context->memory->is_host;
    if (!c->comm && (c->expert_slices > 1 || c->placement || c->max_received > 0 ||
                     c->exchange_chunks > 1 || (host && c->exchange == MOE_EXCHANGE_PADDED)))
        REFUSE_ARGUMENT("%s is given, comm is NULL", c->expert_slices > 1     ? "expert_slices"
                                                     : c->placement           ? "placement"
                                                     : c->max_received > 0    ? "max_received"
                                                     : c->exchange_chunks > 1 ? "exchange_chunks"
                                                                              : "exchange");
    if (!c->comm && e->config.num_experts == 0)
        REFUSE_ARGUMENT("experts has no experts, and comm is NULL");
    bool alone = !c->comm || (c->comm->size == 1 && c->expert_slices == 1 && !c->placement);
    if (g && alone && g->config.num_experts != e->config.num_experts)
        REFUSE_ARGUMENT("the gate has %lld experts, the pool has %lld", (ll)g->config.num_experts,
                        (ll)e->config.num_experts);
    if (g && g->config.dtype != e->config.dtype)
        REFUSE_ARGUMENT("the gate's dtype is %d, the pool's is %d", (int)g->config.dtype,
                        (int)e->config.dtype);
    if (c->comm && c->comm->context != e->context)
        REFUSE_ARGUMENT("comm and experts are of different contexts");
    if (host && moe__ranks_travels(c) && moe__is_half(e->config.dtype))
        REFUSE(MOE_ERROR_NOT_SUPPORTED,
               "dtype %d is not available on CPU where rows travel, on %d ranks or with "
               "expert_slices, placement, max_received or padded_rows",
               (int)e->config.dtype, (int)c->comm->size);
    if (c->comm && c->comm->size > 1 && e->made_of_parts)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "a pool of parts on %d ranks is not available",
               (int)c->comm->size);
    if (c->exchange_chunks > 1 && e->made_of_parts)
        REFUSE(MOE_ERROR_NOT_SUPPORTED,
               "a pool of parts with exchange_chunks %lld is not available",
               (ll)c->exchange_chunks);
    if (c->received == MOE_RECEIVED_CHUNK && e->made_of_parts)
        REFUSE(MOE_ERROR_NOT_SUPPORTED,
               "a pool of parts with received MOE_RECEIVED_CHUNK is not available");
    MOE_TRY(check_secondary(c, function));
    return check_slices(c, function);
}

/* Whether two pools are one, or have a part in common. */
static bool share_experts(const moe_experts *a, const moe_experts *b)
{
    for (int64_t i = 0; i < a->parts; i++)
        for (int64_t j = 0; j < b->parts; j++)
            if (a->part[i] == b->part[j]) return true;
    return false;
}

/* A pool beside the routed one: alike outside, and another. */
static moe_status check_branch(const char *name, const moe_experts *branch,
                               const moe_experts *other, const char *function)
{
    const moe_experts_config *b = &branch->config, *o = &other->config;
    if (branch->context != other->context)
        REFUSE_ARGUMENT("%s and experts are of different contexts", name);
    if (b->d_model != o->d_model || b->d_out != o->d_out)
        REFUSE_ARGUMENT("%s has d_model %lld and d_out %lld, experts have %lld and %lld", name,
                        (ll)b->d_model, (ll)b->d_out, (ll)o->d_model, (ll)o->d_out);
    if (b->dtype != o->dtype)
        REFUSE_ARGUMENT("%s has dtype %d, experts have %d", name, (int)b->dtype, (int)o->dtype);
    if (share_experts(branch, other))
        REFUSE_ARGUMENT("%s has experts of another pool of the layer", name);
    return MOE_OK;
}

/* A coefficient multiplies what the pool adds to y, so that is where its weight must act. */
static moe_status check_weight_position(const char *option, const char *name,
                                        const moe_experts *pool, const char *function)
{
    for (int64_t i = 0; i < pool->parts; i++)
        if (pool->part[i]->config.weight_position != MOE_WEIGHT_ON_OUTPUT)
            REFUSE_ARGUMENT("%s 1 clashes with weight_position %d of %s", option,
                            (int)pool->part[i]->config.weight_position, name);
    return MOE_OK;
}

static moe_status check_branches(const moe_layer_config *c, const char *function)
{
    const moe_experts *e = c->experts;
    if (c->shared) MOE_TRY(check_branch("shared", c->shared, e, function));
    if (c->residual) MOE_TRY(check_branch("residual", c->residual, e, function));
    if (c->residual && c->shared && share_experts(c->residual, c->shared))
        REFUSE_ARGUMENT("shared and residual have experts in common");
    if (c->shared_gate && !c->shared) REFUSE_ARGUMENT("shared_gate is 1, shared is NULL");
    if (c->residual_mix && !c->residual) REFUSE_ARGUMENT("residual_mix is 1, residual is NULL");
    if (c->shared_gate)
        MOE_TRY(check_weight_position("shared_gate", "shared", c->shared, function));
    if (c->residual_mix) {
        MOE_TRY(check_weight_position("residual_mix", "experts", e, function));
        MOE_TRY(check_weight_position("residual_mix", "residual", c->residual, function));
    }
    if (c->dropped == MOE_DROPPED_PASS_THROUGH && e->config.d_out != e->config.d_model)
        REFUSE_ARGUMENT("dropped MOE_DROPPED_PASS_THROUGH clashes with d_out %lld: x is %lld wide",
                        (ll)e->config.d_out, (ll)e->config.d_model);
    if (c->dropped == MOE_DROPPED_UNTOUCHED && (c->shared || c->residual))
        REFUSE_ARGUMENT("dropped MOE_DROPPED_UNTOUCHED clashes with %s: it writes y",
                        c->shared ? "shared" : "residual");
    return MOE_OK;
}

/* In which parts, and by which way, rows travel. */
static moe_status check_travel(const moe_layer_config *c, bool padded, const char *function)
{
    MOE_TRY(
        moe__check_range("exchange_chunks", c->exchange_chunks, 1, MOE_COMM_REQUESTS, function));
    if (c->exchange_chunks > 1 && (padded || c->received == MOE_RECEIVED_CHUNK))
        REFUSE_ARGUMENT("exchange_chunks %lld clashes with %s", (ll)c->exchange_chunks,
                        padded ? "exchange MOE_EXCHANGE_PADDED" : "received MOE_RECEIVED_CHUNK");
    if (!c->node_comm != !c->rail_comm)
        REFUSE_ARGUMENT("%s is given, %s is NULL", c->node_comm ? "node_comm" : "rail_comm",
                        c->node_comm ? "rail_comm" : "node_comm");
    if (c->node_comm && (padded || c->received))
        REFUSE_ARGUMENT("node_comm clashes with %s %d", c->received ? "received" : "exchange",
                        c->received ? (int)c->received : (int)c->exchange);
    if (c->node_comm && c->exchange_chunks > 1)
        REFUSE_ARGUMENT("node_comm clashes with exchange_chunks %lld", (ll)c->exchange_chunks);
    return MOE_OK;
}

/* The fields that are for several ranks. */
static moe_status check_ranks(const moe_layer_config *c, const char *function)
{
    MOE_TRY(moe__check_range("expert_slices", c->expert_slices, 1, INT32_MAX, function));
    MOE_TRY(moe__check_range("max_received", c->max_received, 0, INT64_MAX / 4, function));
    MOE_TRY(moe__check_range("exchange", c->exchange, 0, MOE_EXCHANGE_PADDED, function));
    MOE_TRY(moe__check_range("received", c->received, 0, MOE_RECEIVED_CHUNK, function));
    MOE_TRY(moe__check_range("loss_batch", c->loss_batch, 0, MOE_BATCH_GLOBAL, function));
    MOE_TRY(moe__check_range("reserved", c->reserved, 0, 0, function));
    bool padded = c->exchange == MOE_EXCHANGE_PADDED;
    MOE_TRY(moe__check_range("padded_rows", c->padded_rows, padded, padded ? INT64_MAX / 4 : 0,
                             function));
    if (padded && (c->max_received > 0 || c->received))
        REFUSE_ARGUMENT("exchange MOE_EXCHANGE_PADDED clashes with %s %lld",
                        c->received ? "received" : "max_received",
                        c->received ? (ll)c->received : (ll)c->max_received);
    MOE_TRY(check_travel(c, padded, function));
    bool drops = c->received == MOE_RECEIVED_DROP_POSITION ||
                 c->received == MOE_RECEIVED_DROP_SCORE;
    if (drops && c->expert_slices > 1)
        REFUSE_ARGUMENT("received %d clashes with expert_slices %lld", (int)c->received,
                        (ll)c->expert_slices);
    return MOE_OK;
}

moe_status moe__layer_config_check(const moe_layer_config *c, const char *function)
{
    if (c->output < 0 || c->output > MOE_OUTPUT_SIGMOID)
        REFUSE_ARGUMENT("output is %d", (int)c->output);
    if (c->layer_id < 0 || c->layer_id > 65535)
        REFUSE_ARGUMENT("layer_id is %d; it must be in [0, 65535]", (int)c->layer_id);
    MOE_TRY(moe__check_range("shared_gate", c->shared_gate, 0, 1, function));
    MOE_TRY(moe__check_range("residual_mix", c->residual_mix, 0, 1, function));
    MOE_TRY(moe__check_range("dropped", c->dropped, 0, MOE_DROPPED_UNTOUCHED, function));
    MOE_TRY(moe__check_range("parameters", c->parameters, 0, MOE_PARAMETERS_BOUND, function));
    MOE_TRY(check_ranks(c, function));
    if (c->dropped && c->output != MOE_OUTPUT_LINEAR)
        REFUSE_ARGUMENT("dropped %d clashes with output %d", (int)c->dropped, (int)c->output);
    if (c->dropped && c->residual_mix)
        REFUSE_ARGUMENT("dropped %d clashes with residual_mix 1", (int)c->dropped);
    return MOE_OK;
}

static moe_status check_config(const moe_layer_config *c, const char *function)
{
    MOE_TRY(moe__layer_config_check(c, function));
    MOE_TRY(check_objects(c, function));
    return check_branches(c, function);
}

/* The layer's own copy of its placement. */
static moe_status copy_placement(moe_layer *l, const char *function)
{
    int64_t count = l->config.experts->config.num_experts;
    if (!l->config.placement) return MOE_OK;
    l->placement = moe__alloc(l->context, moe__max(count, 1) * (int64_t)sizeof *l->placement);
    if (!l->placement) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for %lld experts", (ll)count);
    memcpy(l->placement, l->config.placement, (size_t)count * sizeof *l->placement);
    l->config.placement = l->placement;
    return MOE_OK;
}

static void free_parts(moe_layer *l)
{
    int64_t count = l->config.experts->config.num_experts;
    moe__ranks_leave(l);
    l->context->memory->free(l->context, l->reduction, l->reduction_bytes);
    moe__listing_free(&l->listing, l->context);
    moe__parameters_free(&l->parameters);
    moe__free(l->context, l->placement, moe__max(count, 1) * (int64_t)sizeof *l->placement);
    moe__free(l->context, l, sizeof *l);
}

/* Everything but what concerns other ranks. */
static moe_status make_layer(moe_layer **layer, const moe_layer_config *c, const char *function)
{
    MOE_TRY(check_config(c, function));
    moe_layer *l = moe__alloc_zeroed(c->experts->context, sizeof *l);
    if (!l) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for the layer");
    l->context = c->experts->context;
    l->config = *c;
    l->gate = c->gate;
    l->experts = c->experts;
    l->shared = c->shared;
    l->residual = c->residual;
    l->comm = c->comm;
    l->num_experts = l->experts->config.num_experts;
    moe__layer_parameters_describe(l);
    moe_status status = copy_placement(l, function);
    if (status == MOE_OK)
        status = moe__parameters_allocate(&l->parameters, c->parameters, function);
    if (status == MOE_OK) status = moe__layer_list_parameters(l, function);
    if (status == MOE_OK)
        *layer = l;
    else
        free_parts(l);
    return status;
}

moe_status moe_layer_create(moe_layer **layer, const moe_layer_config *config)
{
    moe_layer_config c;
    moe_layer *l = NULL;
    if (!layer) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "layer is NULL");
    MOE_TRY(moe__struct_read(&moe__layer_config_info, &c, config, false, __func__));
    moe_status status = make_layer(&l, &c, __func__);
    if (status != MOE_OK) return moe__ranks_join_failed(&c, status, __func__);
    status = moe__ranks_join(l, __func__);
    if (status != MOE_OK) {
        free_parts(l);
        return status;
    }
    atomic_init(&l->references, 1);
    moe__context_retain(l->context);
    moe__experts_retain(l->experts);
    if (l->shared) moe__experts_retain(l->shared);
    if (l->residual) moe__experts_retain(l->residual);
    if (l->gate) moe__gate_retain(l->gate);
    if (l->comm) moe__comm_retain(l->comm);
    if (c.node_comm) moe__comm_retain(c.node_comm);
    if (c.rail_comm) moe__comm_retain(c.rail_comm);
    *layer = l;
    return MOE_OK;
}

void moe__layer_retain(moe_layer *layer) { atomic_fetch_add(&layer->references, 1); }

void moe_layer_destroy(moe_layer *layer)
{
    if (!layer || atomic_fetch_sub(&layer->references, 1) != 1) return;
    moe_layer held = *layer;
    free_parts(layer);
    moe_gate_destroy(held.gate);
    moe_experts_destroy(held.experts);
    moe_experts_destroy(held.shared);
    moe_experts_destroy(held.residual);
    moe_comm_destroy(held.comm);
    moe_comm_destroy(held.config.node_comm);
    moe_comm_destroy(held.config.rail_comm);
    moe_context_destroy(held.context);
}

moe_status moe_layer_get_config(const moe_layer *layer, moe_layer_config *config)
{
    if (!layer) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "layer is NULL");
    MOE_TRY(moe__struct_check_out(&moe__layer_config_info, config, __func__));
    moe__struct_write(&moe__layer_config_info, config, &layer->config);
    return MOE_OK;
}
