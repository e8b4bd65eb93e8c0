/* layer_object.c - the layer object: its config and its life. Its steps are in layer.c. */
#include "pass_state.h"

static void layer_defaults(void *instance)
{
    *(moe_layer_config *)instance = (moe_layer_config){0};
}

const moe__struct_info moe__layer_config_info = {"moe_layer_config", sizeof(moe_layer_config),
                                                 offsetof(moe_layer_config, dropped),
                                                 layer_defaults};

moe_status moe_layer_config_init(moe_layer_config *config, size_t size)
{
    return moe__struct_init(&moe__layer_config_info, config, size, __func__);
}

static moe_status check_objects(const moe_layer_config *c, const char *function)
{
    const moe_gate *g = c->gate;
    const moe_experts *e = c->experts;
    if (!e) REFUSE_ARGUMENT("experts is NULL");
    if (g && g->context != e->context)
        REFUSE_ARGUMENT("gate and experts are of different contexts");
    if (g && g->config.num_experts != e->config.num_experts)
        REFUSE_ARGUMENT("the gate has %lld experts, the pool has %lld", (ll)g->config.num_experts,
                        (ll)e->config.num_experts);
    if (g && g->config.dtype != e->config.dtype)
        REFUSE_ARGUMENT("the gate's dtype is %d, the pool's is %d", (int)g->config.dtype,
                        (int)e->config.dtype);
    if (c->comm && c->comm->context != e->context)
        REFUSE_ARGUMENT("comm and experts are of different contexts");
    return MOE_OK;
}

moe_status moe__layer_config_check(const moe_layer_config *c, const char *function)
{
    if (c->output < 0 || c->output > MOE_OUTPUT_SIGMOID)
        REFUSE_ARGUMENT("output is %d", (int)c->output);
    if (c->layer_id < 0 || c->layer_id > 65535)
        REFUSE_ARGUMENT("layer_id is %d; it must be in [0, 65535]", (int)c->layer_id);
    if (c->shared) REFUSE(MOE_ERROR_NOT_SUPPORTED, "shared: a shared expert is not available");
    if (c->residual)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "residual: a residual branch is not available");
    if (c->shared_gate)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "shared_gate is %d: not available", (int)c->shared_gate);
    if (c->residual_mix)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "residual_mix is %d: not available", (int)c->residual_mix);
    return MOE_OK;
}

moe_status moe_layer_create(moe_layer **layer, const moe_layer_config *config)
{
    moe_layer_config c;
    if (!layer) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "layer is NULL");
    MOE_TRY(moe__struct_read(&moe__layer_config_info, &c, config, false, __func__));
    MOE_TRY(moe__layer_config_check(&c, __func__));
    MOE_TRY(check_objects(&c, __func__));
    moe_context *context = c.experts->context;
    moe_layer *l = moe__alloc_zeroed(context, sizeof *l);
    if (!l) return moe__fail(MOE_ERROR_OUT_OF_MEMORY, __func__, "no memory for the layer");
    l->context = context;
    l->config = c;
    l->gate = c.gate;
    l->experts = c.experts;
    l->comm = c.comm;
    moe_status status = moe__layer_list_parameters(l, __func__);
    if (status != MOE_OK) {
        moe__free(context, l, sizeof *l);
        return status;
    }
    atomic_init(&l->references, 1);
    moe__context_retain(context);
    moe__experts_retain(l->experts);
    if (l->gate) moe__gate_retain(l->gate);
    if (l->comm) moe__comm_retain(l->comm);
    *layer = l;
    return MOE_OK;
}

void moe__layer_retain(moe_layer *layer) { atomic_fetch_add(&layer->references, 1); }

void moe_layer_destroy(moe_layer *layer)
{
    if (!layer || atomic_fetch_sub(&layer->references, 1) != 1) return;
    moe_context *context = layer->context;
    moe_gate_destroy(layer->gate);
    moe_experts_destroy(layer->experts);
    moe_comm_destroy(layer->comm);
    moe__listing_free(&layer->listing, context);
    moe__free(context, layer, sizeof *layer);
    moe_context_destroy(context);
}

moe_status moe_layer_get_config(const moe_layer *layer, moe_layer_config *config)
{
    if (!layer) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "layer is NULL");
    MOE_TRY(moe__struct_check_out(&moe__layer_config_info, config, __func__));
    moe__struct_write(&moe__layer_config_info, config, &layer->config);
    return MOE_OK;
}
