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
static void report_defaults(void *instance) { *(moe_pass_report *)instance = (moe_pass_report){0}; }
static void view_defaults(void *instance) { *(moe_tensor_view *)instance = (moe_tensor_view){0}; }

/* What came after the first fields begins at noise_primary, at x_stride and at rows_to_nodes. */
const moe__struct_info moe__forward_args_info = {"moe_forward_args", sizeof(moe_forward_args),
                                                 offsetof(moe_forward_args, noise_primary),
                                                 forward_defaults};
const moe__struct_info moe__backward_args_info = {"moe_backward_args", sizeof(moe_backward_args),
                                                  offsetof(moe_backward_args, x_stride),
                                                  backward_defaults};
const moe__struct_info moe__pass_config_info = MOE__STRUCT_INFO(moe_pass_config, config_defaults);
const moe__struct_info moe__losses_info = MOE__STRUCT_INFO(moe_losses, losses_defaults);
const moe__struct_info moe__stats_info = MOE__STRUCT_INFO(moe_stats, stats_defaults);
const moe__struct_info moe__pass_report_info = {"moe_pass_report", sizeof(moe_pass_report),
                                                offsetof(moe_pass_report, rows_to_nodes),
                                                report_defaults};
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
moe_status moe_pass_report_init(moe_pass_report *report, size_t size)
{
    return moe__struct_init(&moe__pass_report_info, report, size, __func__);
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

/* The pass itself; its memory is gone. */
static void free_pass(moe_pass *p)
{
    const moe__memory *memory = p->context->memory;
    moe__ranks_free(p);
    if (memory->pass_destroy && p->workers.of_pass)
        memory->pass_destroy(p->context, p->workers.of_pass);
    moe__free(p->context, p, sizeof *p);
}

static moe_status pass_create(moe_pass **pass, moe_context *context, moe_layer *layer,
                              moe_gate *gate, moe_experts *experts, const moe_pass_config *config,
                              const char *function)
{
    moe_pass_config c;
    MOE_TRY(moe__struct_read(&moe__pass_config_info, &c, config, true, function));
    MOE_TRY(check_workspace(&c, function));
    if (context->memory->check_pointer) {
        moe__workers workers = moe__workers_of(context, function, NULL);
        MOE_TRY(context->memory->check_pointer(&workers, "workspace", c.workspace));
    }
    moe_pass *p = moe__alloc_zeroed(context, sizeof *p);
    if (!p) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for the pass");
    p->context = context;
    p->layer = layer;
    p->gate = gate;
    p->experts = experts;
    p->memory = c.workspace;
    p->capacity = c.workspace ? c.workspace_bytes : 0;
    p->host_memory = c.workspace != NULL;
    p->plan.context = p->primary.context = context;
    p->plan.of_pass = p->primary.of_pass = true;
    p->plan.workers = p->primary.workers = &p->workers;
    p->workers = moe__workers_of(context, function, NULL);
    if (layer) {
        p->shared.experts = layer->shared;
        p->residual.experts = layer->residual;
    }
    moe_status status = MOE_OK;
    if (context->memory->pass_create)
        status = context->memory->pass_create(context, &p->workers.of_pass, function);
    if (status == MOE_OK && layer && layer->where) status = moe__ranks_prepare(p, function);
    if (status != MOE_OK) {
        free_pass(p);
        return status;
    }
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
    if (gate->config.secondary == MOE_SECONDARY_WITH_GROUP)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__,
                         "the gate's secondary is MOE_SECONDARY_WITH_GROUP: it is for layers");
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
    moe_layer *layer = pass->layer;
    moe_gate *gate = pass->gate;
    moe_experts *experts = pass->experts;
    moe__backward_abandon(pass);
    if (!pass->host_memory) moe__pass_free_memory(pass);
    free_pass(pass);
    moe_layer_destroy(layer);
    moe_gate_destroy(gate);
    moe_experts_destroy(experts);
    moe_context_destroy(context);
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* Entries that a gate may make of so many tokens; with `own_k` by its config alone, else at least
 * top_k of each. */
static int64_t reserved_entries(const moe_gate_config *gate, int64_t tokens, int64_t groups,
                                int64_t top_k, bool own_k)
{
    int64_t asked = moe__mul(tokens, top_k);
    fenv_t saved;
    if (!gate) return asked;
    moe__fenv_enter(&saved);
    int64_t most = moe__gate_most_entries(gate, tokens, groups, top_k, !own_k);
    moe__fenv_leave(&saved);
    if (own_k || !moe__gate_takes_tokens(gate)) return most;
    return asked < 0 || most < 0 ? -1 : moe__max(asked, most);
}

moe_status moe_pass_reserve(moe_pass *pass, int64_t max_tokens, int64_t max_groups,
                            int64_t max_top_k)
{
    const char *function = __func__;
    double weights[MOE_LOSS_SLOTS] = {0};
    if (!pass) REFUSE_ARGUMENT("pass is NULL");
    MOE_TRY(moe__pass_check_idle(pass, function));
    const moe_gate_config *gate = pass->gate ? &pass->gate->config : NULL;
    const moe__experts_room *experts = pass->experts ? &pass->experts->room : NULL;
    if (max_tokens < 0) REFUSE_ARGUMENT("max_tokens is %lld", (ll)max_tokens);
    if (max_groups < 0) REFUSE_ARGUMENT("max_groups is %lld", (ll)max_groups);
    bool own_k = max_top_k == MOE_FROM_CONFIG && gate;
    int64_t top_k = !own_k                                 ? max_top_k
                    : gate->kind == MOE_GATE_SOFTMAX_DENSE ? gate->num_experts
                                                           : gate->top_k;
    if (top_k < 0) REFUSE_ARGUMENT("max_top_k is %lld", (ll)max_top_k);
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) weights[i] = 1; /* a call may bring its own */
    moe__pass_shape shape = moe__pass_shape_of(gate, experts,
                                               pass->layer ? &pass->layer->config : NULL, weights,
                                               true, true, MOE_FORWARD_TRAIN);
    if (pass->layer) {
        moe__pass_shape_branches(&shape, pass);
        shape.ranks = pass->layer->where != NULL;
        shape.share_ranks = moe__share_ranks(pass->layer);
        shape.num_experts = pass->layer->num_experts;
    }
    shape.tokens = max_tokens;
    shape.groups = moe__max(max_groups, 1);
    shape.top_k = top_k;
    shape.entries = reserved_entries(gate, max_tokens, shape.groups, top_k, own_k);
    shape.threads = pass->context->threads;
    if (shape.entries < 0)
        REFUSE(MOE_ERROR_OVERFLOW, "%lld tokens of %lld experts do not fit in 63 bits",
               (ll)max_tokens, (ll)top_k);
    moe__room rows = {0};
    if (shape.ranks) MOE_TRY(moe__ranks_set_aside(pass, shape.entries, &rows, function));
    moe_status status = moe__pass_make_room(pass, &shape, false, NULL, function);
    if (status != MOE_OK) {
        moe__ranks_forget_memory(pass, &rows);
        return status;
    }
    moe__ranks_take_memory(pass, &rows);
    pass->state = MOE__PASS_EMPTY;
    pass->uses = 0;
    return MOE_OK;
}

moe_status moe_pass_trim(moe_pass *pass)
{
    if (!pass) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "pass is NULL");
    MOE_TRY(moe__pass_check_idle(pass, __func__));
    return moe__pass_trim(pass, __func__);
}

int64_t moe_pass_bytes(const moe_pass *pass)
{
    if (!pass) return 0;
    return moe__ranks_bytes(pass) + (pass->host_memory ? pass->used : pass->capacity);
}

/* ---- what it shows --------------------------------------------------------------------------- */

static moe_status check_has_forward(const moe_pass *pass, const void *out, const char *name,
                                    const char *function)
{
    if (!pass) REFUSE_ARGUMENT("pass is NULL");
    if (!out) REFUSE_ARGUMENT("%s is NULL", name);
    MOE_TRY(moe__pass_check_idle(pass, function));
    if (pass->uses == 0) REFUSE(MOE_ERROR_INVALID_STATE, "the pass has had no forward");
    if (pass->state == MOE__PASS_FAILED)
        REFUSE(MOE_ERROR_INVALID_STATE, "the pass failed in the middle of a call");
    return MOE_OK;
}

/* What the last forward left in backend memory. */
static moe_status fetch(const moe_pass *pass, void *to, const void *from, size_t bytes,
                        const char *function)
{
    moe__workers workers = pass->workers;
    workers.function = function;
    return pass->context->memory->fetch(&workers, to, from, (int64_t)bytes);
}

moe_status moe_pass_plan(const moe_pass *pass, const moe_plan **plan)
{
    MOE_TRY(check_has_forward(pass, plan, "plan", __func__));
    *plan = &pass->plan;
    return MOE_OK;
}

moe_status moe_pass_primary_plan(const moe_pass *pass, const moe_plan **plan)
{
    const char *function = __func__;
    MOE_TRY(check_has_forward(pass, plan, "plan", function));
    if (!pass->primary_shown)
        REFUSE(MOE_ERROR_INVALID_STATE, "the last forward has no primary routing");
    *plan = &pass->primary;
    return MOE_OK;
}

/* In padded mode nobody waited to see whether every expert's rows had room. */
static moe_status check_room(const moe_pass *pass, const char *function)
{
    int64_t padded = pass->experts_job.padded_rows, E = pass->plan.a.num_experts, rows[64];
    if (!moe__pass_is_padded(pass, pass->uses) || !pass->rows_of_expert) return MOE_OK;
    if (moe__pass_has_ranks(pass, pass->uses)) return moe__ranks_look(pass, function);
    for (int64_t first = 0; first < E; first += 64) {
        int64_t n = moe__min(64, E - first);
        MOE_TRY(
            fetch(pass, rows, pass->rows_of_expert + first, (size_t)n * sizeof *rows, function));
        for (int64_t i = 0; i < n; i++)
            if (rows[i] > padded)
                REFUSE(MOE_ERROR_BUFFER_TOO_SMALL, "expert %lld had %lld rows, padded_rows is %lld",
                       (ll)(first + i), (ll)rows[i], (ll)padded);
    }
    return MOE_OK;
}

moe_status moe_pass_losses(const moe_pass *pass, moe_losses *losses)
{
    moe_losses known = {0};
    MOE_TRY(check_has_forward(pass, losses, "losses", __func__));
    MOE_TRY(check_room(pass, __func__));
    MOE_TRY(moe__struct_check_out(&moe__losses_info, losses, __func__));
    MOE_TRY(fetch(pass, known.value, pass->results, sizeof known.value, __func__));
    fenv_t saved;
    moe__fenv_enter(&saved);
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) known.total += known.value[i];
    moe__fenv_leave(&saved);
    moe__struct_write(&moe__losses_info, losses, &known);
    return MOE_OK;
}

moe_status moe_pass_stats(const moe_pass *pass, moe_stats *stats)
{
    moe_stats known = {0};
    MOE_TRY(check_has_forward(pass, stats, "stats", __func__));
    MOE_TRY(check_room(pass, __func__));
    MOE_TRY(moe__struct_check_out(&moe__stats_info, stats, __func__));
    MOE_TRY(fetch(pass, known.value, pass->results + MOE_LOSS_SLOTS, sizeof known.value, __func__));
    moe__struct_write(&moe__stats_info, stats, &known);
    return MOE_OK;
}

moe_status moe_pass_get_report(const moe_pass *pass, moe_pass_report *report)
{
    MOE_TRY(check_has_forward(pass, report, "report", __func__));
    MOE_TRY(moe__struct_check_out(&moe__pass_report_info, report, __func__));
    moe__struct_write(&moe__pass_report_info, report, &pass->report);
    return MOE_OK;
}

/* Data, dtype and shape of a tensor; NULL data if the last forward did not make it. */
static moe_status find_tensor(const moe_pass *pass, int32_t what, moe_tensor_view *v,
                              const char *function)
{
    bool kept = pass->routed && pass->state == MOE__PASS_SAVED;
    const moe__gate_level *level = &pass->route.level[pass->routed && pass->route.levels == 2];
    const moe__losses_job *l = &pass->losses;
    for (int i = 0; i < MOE_MAX_DIMS; i++) v->shape[i] = 1;
    v->dims = what <= MOE_TENSOR_NOISE_STD ? 2 : 1;
    v->shape[0] = v->dims == 2                      ? level->rows
                  : what == MOE_TENSOR_PRIMARY_LOAD ? pass->primary.a.num_experts
                                                    : pass->plan.a.num_experts;
    if (v->dims == 2) v->shape[1] = level->width;
    v->dtype = what <= MOE_TENSOR_NOISE_STD                           ? pass->plan.a.dtype
               : what == MOE_TENSOR_COUNTS || what == MOE_TENSOR_ROWS ? MOE_DTYPE_I64
                                                                      : MOE_DTYPE_F64;
    switch (what) {
    case MOE_TENSOR_LOGITS: v->data = kept ? level->logits : NULL; break;
    case MOE_TENSOR_NOISY_LOGITS: v->data = kept ? level->noisy : NULL; break;
    case MOE_TENSOR_NOISE_STD: v->data = kept ? level->noise_std : NULL; break;
    case MOE_TENSOR_IMPORTANCE: v->data = l->importance; break;
    case MOE_TENSOR_LOAD: v->data = l->load; break;
    case MOE_TENSOR_COUNTS: v->data = l->counts; break;
    case MOE_TENSOR_ROWS: v->data = pass->rows_of_expert; break;
    case MOE_TENSOR_PRIMARY_LOAD: v->data = pass->routed ? l->primary_load : NULL; break;
    default: REFUSE_ARGUMENT("what is %d; it must be a MOE_TENSOR_*", (int)what);
    }
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
    moe__struct_write(&moe__tensor_view_info, view, &known);
    return MOE_OK;
}
