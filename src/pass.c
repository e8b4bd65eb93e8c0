/* pass.c - the pass object: its life, its memory, and what it shows of its last forward. */
#include "pass_state.h"

#include <string.h>

/* ---- structs --------------------------------------------------------------------------------- */

static void forward_defaults(void *instance)
{
    moe_forward_args *a = instance;
    *a = (moe_forward_args){.top_k = MOE_FROM_CONFIG, .capacity = MOE_FROM_CONFIG};
}
static void backward_defaults(void *instance)
{
    *(moe_backward_args *)instance = (moe_backward_args){0};
}
static void config_defaults(void *instance) { *(moe_pass_config *)instance = (moe_pass_config){0}; }
static void losses_defaults(void *instance) { *(moe_losses *)instance = (moe_losses){0}; }
static void stats_defaults(void *instance) { *(moe_stats *)instance = (moe_stats){0}; }
static void view_defaults(void *instance) { *(moe_tensor_view *)instance = (moe_tensor_view){0}; }

/* What came after the first fields begins at noise_primary, and at x_stride. */
const moe__struct_info moe__forward_args_info = {"moe_forward_args", sizeof(moe_forward_args),
                                                 offsetof(moe_forward_args, noise_primary),
                                                 forward_defaults};
const moe__struct_info moe__backward_args_info = {"moe_backward_args", sizeof(moe_backward_args),
                                                  offsetof(moe_backward_args, x_stride),
                                                  backward_defaults};
const moe__struct_info moe__pass_config_info = MOE__STRUCT_INFO(moe_pass_config, config_defaults);
const moe__struct_info moe__losses_info = MOE__STRUCT_INFO(moe_losses, losses_defaults);
const moe__struct_info moe__stats_info = MOE__STRUCT_INFO(moe_stats, stats_defaults);
const moe__struct_info moe__tensor_view_info = MOE__STRUCT_INFO(moe_tensor_view, view_defaults);

moe_status moe_forward_args_init(moe_forward_args *args, size_t size)
{
    return moe__struct_init(&moe__forward_args_info, args, size, __func__);
}
moe_status moe_backward_args_init(moe_backward_args *args, size_t size)
{
    return moe__struct_init(&moe__backward_args_info, args, size, __func__);
}
moe_status moe_pass_config_init(moe_pass_config *config, size_t size)
{
    return moe__struct_init(&moe__pass_config_info, config, size, __func__);
}
moe_status moe_losses_init(moe_losses *losses, size_t size)
{
    return moe__struct_init(&moe__losses_info, losses, size, __func__);
}
moe_status moe_stats_init(moe_stats *stats, size_t size)
{
    return moe__struct_init(&moe__stats_info, stats, size, __func__);
}
moe_status moe_tensor_view_init(moe_tensor_view *view, size_t size)
{
    return moe__struct_init(&moe__tensor_view_info, view, size, __func__);
}

/* ---- life ------------------------------------------------------------------------------------ */

static moe_status check_workspace(const moe_pass_config *c, const char *function)
{
    if (c->workspace_bytes < 0) REFUSE_ARGUMENT("workspace_bytes is %lld", (ll)c->workspace_bytes);
    if (!c->workspace && c->workspace_bytes > 0)
        REFUSE_ARGUMENT("workspace is NULL, workspace_bytes is %lld", (ll)c->workspace_bytes);
    if ((uintptr_t)c->workspace % 64 != 0)
        REFUSE_ARGUMENT("workspace %p is not aligned to 64 bytes", c->workspace);
    return MOE_OK;
}

static moe_status pass_create(moe_pass **pass, moe_context *context, moe_layer *layer,
                              moe_gate *gate, moe_experts *experts, const moe_pass_config *config,
                              const char *function)
{
    moe_pass_config c;
    MOE_TRY(moe__struct_read(&moe__pass_config_info, &c, config, true, function));
    MOE_TRY(check_workspace(&c, function));
    moe_pass *p = moe__alloc_zeroed(context, sizeof *p);
    if (!p) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for the pass");
    p->context = context;
    p->layer = layer;
    p->gate = gate;
    p->experts = experts;
    p->memory = c.workspace;
    p->capacity = c.workspace ? c.workspace_bytes : 0;
    p->host_memory = c.workspace != NULL;
    p->plan.context = context;
    p->plan.of_pass = true;
    moe__context_retain(context);
    if (layer) moe__layer_retain(layer);
    if (gate) moe__gate_retain(gate);
    if (experts) moe__experts_retain(experts);
    *pass = p;
    return MOE_OK;
}

moe_status moe_pass_create(moe_pass **pass, moe_layer *layer, const moe_pass_config *config)
{
    if (!pass || !layer)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "%s is NULL",
                         pass ? "layer" : "pass");
    return pass_create(pass, layer->context, layer, layer->gate, layer->experts, config, __func__);
}

moe_status moe_pass_create_for_gate(moe_pass **pass, moe_gate *gate, const moe_pass_config *config)
{
    if (!pass || !gate)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "%s is NULL",
                         pass ? "gate" : "pass");
    return pass_create(pass, gate->context, NULL, gate, NULL, config, __func__);
}

moe_status moe_pass_create_for_experts(moe_pass **pass, moe_experts *experts,
                                       const moe_pass_config *config)
{
    if (!pass || !experts)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "%s is NULL",
                         pass ? "experts" : "pass");
    return pass_create(pass, experts->context, NULL, NULL, experts, config, __func__);
}

void moe_pass_destroy(moe_pass *pass)
{
    if (!pass) return;
    moe_context *context = pass->context;
    if (!pass->host_memory) moe__free(context, pass->memory, pass->capacity);
    moe_layer_destroy(pass->layer);
    moe_gate_destroy(pass->gate);
    moe_experts_destroy(pass->experts);
    moe__free(context, pass, sizeof *pass);
    moe_context_destroy(context);
}

/* ---- memory ---------------------------------------------------------------------------------- */

moe_status moe_pass_reserve(moe_pass *pass, int64_t max_tokens, int64_t max_groups,
                            int64_t max_top_k)
{
    const char *function = __func__;
    double weights[MOE_LOSS_SLOTS] = {0};
    if (!pass) REFUSE_ARGUMENT("pass is NULL");
    const moe_gate_config *gate = pass->gate ? &pass->gate->config : NULL;
    const moe__experts_room *experts = pass->experts ? &pass->experts->room : NULL;
    if (max_tokens < 0) REFUSE_ARGUMENT("max_tokens is %lld", (ll)max_tokens);
    if (max_groups < 0) REFUSE_ARGUMENT("max_groups is %lld", (ll)max_groups);
    if (max_top_k == MOE_FROM_CONFIG && gate)
        max_top_k = gate->kind == MOE_GATE_SOFTMAX_DENSE ? gate->num_experts : gate->top_k;
    if (max_top_k < 0) REFUSE_ARGUMENT("max_top_k is %lld", (ll)max_top_k);
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) weights[i] = 1; /* a call may bring its own */
    moe__pass_shape shape = moe__pass_shape_of(gate, experts,
                                               pass->layer ? pass->layer->config.output : 0,
                                               weights, true, true, MOE_FORWARD_TRAIN);
    shape.tokens = max_tokens;
    shape.groups = moe__max(max_groups, 1);
    shape.top_k = max_top_k;
    shape.entries = moe__mul(max_tokens, max_top_k);
    shape.threads = pass->context->threads;
    if (shape.entries < 0)
        REFUSE(MOE_ERROR_OVERFLOW, "%lld tokens of %lld experts do not fit in 63 bits",
               (ll)max_tokens, (ll)max_top_k);
    MOE_TRY(moe__pass_make_room(pass, &shape, false, function));
    pass->state = MOE__PASS_EMPTY;
    pass->uses = 0;
    return MOE_OK;
}

moe_status moe_pass_trim(moe_pass *pass)
{
    if (!pass) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "pass is NULL");
    return moe__pass_trim(pass, __func__);
}

int64_t moe_pass_bytes(const moe_pass *pass)
{
    return !pass ? 0 : pass->host_memory ? pass->used : pass->capacity;
}

/* ---- what it shows --------------------------------------------------------------------------- */

static moe_status check_has_forward(const moe_pass *pass, const void *out, const char *name,
                                    const char *function)
{
    if (!pass) REFUSE_ARGUMENT("pass is NULL");
    if (!out) REFUSE_ARGUMENT("%s is NULL", name);
    if (pass->uses == 0) REFUSE(MOE_ERROR_INVALID_STATE, "the pass has had no forward");
    if (pass->state == MOE__PASS_FAILED)
        REFUSE(MOE_ERROR_INVALID_STATE, "the pass failed in the middle of a call");
    return MOE_OK;
}

moe_status moe_pass_plan(const moe_pass *pass, const moe_plan **plan)
{
    MOE_TRY(check_has_forward(pass, plan, "plan", __func__));
    *plan = &pass->plan;
    return MOE_OK;
}

moe_status moe_pass_losses(const moe_pass *pass, moe_losses *losses)
{
    moe_losses known = {0};
    MOE_TRY(check_has_forward(pass, losses, "losses", __func__));
    MOE_TRY(moe__struct_check_out(&moe__losses_info, losses, __func__));
    known.total = pass->total;
    memcpy(known.value, pass->value, sizeof known.value);
    moe__struct_write(&moe__losses_info, losses, &known);
    return MOE_OK;
}

moe_status moe_pass_stats(const moe_pass *pass, moe_stats *stats)
{
    moe_stats known = {0};
    MOE_TRY(check_has_forward(pass, stats, "stats", __func__));
    MOE_TRY(moe__struct_check_out(&moe__stats_info, stats, __func__));
    memcpy(known.value, pass->stats, sizeof known.value);
    moe__struct_write(&moe__stats_info, stats, &known);
    return MOE_OK;
}

/* Data and dtype of a tensor; NULL data if the last forward did not make it. */
static moe_status find_tensor(const moe_pass *pass, int32_t what, moe_tensor_view *v,
                              const char *function)
{
    int32_t dtype = pass->plan.a.dtype;
    bool kept = pass->routed && pass->state == MOE__PASS_SAVED;
    switch (what) {
    case MOE_TENSOR_LOGITS: v->data = kept ? pass->route.logits : NULL; break;
    case MOE_TENSOR_NOISY_LOGITS: v->data = kept ? pass->route.noisy : NULL; break;
    case MOE_TENSOR_NOISE_STD: v->data = kept ? pass->route.noise_std : NULL; break;
    case MOE_TENSOR_IMPORTANCE: v->data = pass->losses.importance, dtype = MOE_DTYPE_F64; break;
    case MOE_TENSOR_LOAD: v->data = pass->losses.load, dtype = MOE_DTYPE_F64; break;
    case MOE_TENSOR_COUNTS: v->data = pass->losses.counts, dtype = MOE_DTYPE_I64; break;
    case MOE_TENSOR_ROWS: v->data = pass->rows_of_expert, dtype = MOE_DTYPE_I64; break;
    default: REFUSE_ARGUMENT("what is %d; it must be a MOE_TENSOR_*", (int)what);
    }
    v->dtype = dtype;
    if (!v->data)
        REFUSE(MOE_ERROR_INVALID_STATE, "the last forward did not keep tensor %d", (int)what);
    return MOE_OK;
}

moe_status moe_pass_tensor(const moe_pass *pass, int32_t what, moe_tensor_view *view)
{
    moe_tensor_view known = {0};
    MOE_TRY(check_has_forward(pass, view, "view", __func__));
    MOE_TRY(moe__struct_check_out(&moe__tensor_view_info, view, __func__));
    MOE_TRY(find_tensor(pass, what, &known, __func__));
    known.dims = what <= MOE_TENSOR_NOISE_STD ? 2 : 1;
    for (int i = 0; i < MOE_MAX_DIMS; i++) known.shape[i] = 1;
    known.shape[0] = known.dims == 2 ? pass->plan.a.tokens : pass->plan.a.num_experts;
    if (known.dims == 2) known.shape[1] = pass->plan.a.num_experts;
    moe__struct_write(&moe__tensor_view_info, view, &known);
    return MOE_OK;
}
