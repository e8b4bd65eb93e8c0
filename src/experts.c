/* experts.c - the expert pool: its config, its life, its operands and its calls. */
#include "pass_state.h"

#include <string.h>

/* ---- config ---------------------------------------------------------------------------------- */

static void experts_defaults(void *instance)
{
    moe_experts_config *c = instance;
    *c = (moe_experts_config){.d_out = MOE_SAME, .init_std = MOE_INIT_DEFAULT};
}

const moe__struct_info moe__experts_config_info = {"moe_experts_config", sizeof(moe_experts_config),
                                                   offsetof(moe_experts_config, callbacks),
                                                   experts_defaults};

moe_status moe_experts_config_init(moe_experts_config *config, size_t size)
{
    return moe__struct_init(&moe__experts_config_info, config, size, __func__);
}

static moe_status check_supported(const moe_experts_config *c, const char *function)
{
    if (c->storage != MOE_STORAGE_ROW_MAJOR)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "storage %s is not available",
               c->storage == MOE_STORAGE_PANELS ? "MOE_STORAGE_PANELS" : "MOE_STORAGE_PREPACKED");
    if (c->weight_position != MOE_WEIGHT_ON_OUTPUT)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "weight_position %s is not available",
               c->weight_position == MOE_WEIGHT_ON_HIDDEN ? "MOE_WEIGHT_ON_HIDDEN"
                                                          : "MOE_WEIGHT_ON_INPUT");
    if (c->activation_alpha != 0 || c->activation_limit != 0 || c->activation_offset != 0)
        REFUSE(MOE_ERROR_NOT_SUPPORTED,
               "activation_alpha %g, activation_limit %g, activation_offset %g: not available",
               c->activation_alpha, c->activation_limit, c->activation_offset);
    if (c->dtype == MOE_DTYPE_BF16 || c->dtype == MOE_DTYPE_F16)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "dtype %d is not available on CPU", (int)c->dtype);
    if (c->dtype != MOE_DTYPE_F32 && c->dtype != MOE_DTYPE_F64)
        REFUSE_ARGUMENT("dtype is %d", (int)c->dtype);
    return MOE_OK;
}

moe_status moe__experts_config_check(moe_experts_config *c, const char *function)
{
    if (c->d_out == MOE_SAME) c->d_out = c->d_model;
    MOE_TRY(moe__check_range("num_experts", c->num_experts, 1, INT32_MAX, function));
    MOE_TRY(moe__check_range("d_model", c->d_model, 1, INT64_MAX, function));
    MOE_TRY(moe__check_range("d_hidden", c->d_hidden, 1, INT64_MAX, function));
    MOE_TRY(moe__check_range("d_out", c->d_out, 1, INT64_MAX, function));
    if (c->activation < MOE_ACTIVATION_SWIGLU)
        MOE_TRY(moe__check_range("activation", c->activation, 0, MOE_ACTIVATION_SILU, function));
    MOE_TRY(moe__check_range("activation", c->activation, 0, MOE_ACTIVATION_REGLU, function));
    MOE_TRY(moe__check_range("bias", c->bias, 0, 1, function));
    MOE_TRY(moe__check_range("glu_order", c->glu_order, 0, MOE_GLU_INTERLEAVED, function));
    MOE_TRY(moe__check_range("weight_layout", c->weight_layout, 0, MOE_WEIGHT_OUT_IN, function));
    MOE_TRY(moe__check_range("storage", c->storage, 0, MOE_STORAGE_PANELS, function));
    MOE_TRY(moe__check_range("output", c->output, 0, MOE_OUTPUT_SIGMOID, function));
    MOE_TRY(
        moe__check_range("weight_position", c->weight_position, 0, MOE_WEIGHT_ON_INPUT, function));
    MOE_TRY(moe__check_range("parameters", c->parameters, 0, MOE_PARAMETERS_BOUND, function));
    MOE_TRY(moe__check_range("reserved", c->reserved, 0, 0, function));
    if (c->init_std != MOE_INIT_DEFAULT && !(c->init_std >= 0 && c->init_std <= 1e300))
        REFUSE_ARGUMENT("init_std is %g; it must be finite and not negative", c->init_std);
    if (c->glu_order != MOE_GLU_SEPARATE && !moe__is_gated(c->activation))
        REFUSE_ARGUMENT("glu_order %d clashes with activation %d, which is not gated",
                        (int)c->glu_order, (int)c->activation);
    return check_supported(c, function);
}

/* ---- life ------------------------------------------------------------------------------------ */

moe_status moe_experts_create(moe_experts **experts, moe_context *context,
                              const moe_experts_config *config)
{
    moe_experts_config c;
    if (!experts || !context)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "%s is NULL",
                         experts ? "context" : "experts");
    MOE_TRY(moe__struct_read(&moe__experts_config_info, &c, config, false, __func__));
    MOE_TRY(moe__experts_config_check(&c, __func__));
    moe_experts *e = moe__alloc_zeroed(context, sizeof *e);
    uint8_t *touched = moe__alloc_zeroed(context, c.num_experts);
    moe_status status = MOE_OK;
    if (!e || !touched) {
        status = moe__fail(MOE_ERROR_OUT_OF_MEMORY, __func__, "no memory for the pool");
        goto free_objects;
    }
    atomic_init(&e->references, 1);
    atomic_flag_clear(&e->backward_running);
    e->context = context;
    e->config = c;
    e->touched = touched;
    moe__experts_parameters_describe(e);
    status = moe__parameters_allocate(&e->parameters, c.parameters, __func__);
    if (status != MOE_OK) goto free_objects;
    moe__context_retain(context);
    *experts = e;
    return MOE_OK;

free_objects:
    moe__free(context, touched, c.num_experts);
    moe__free(context, e, sizeof *e);
    return status;
}

void moe__experts_retain(moe_experts *experts) { atomic_fetch_add(&experts->references, 1); }

void moe_experts_destroy(moe_experts *experts)
{
    if (!experts || atomic_fetch_sub(&experts->references, 1) != 1) return;
    moe_context *context = experts->context;
    moe__parameters_free(&experts->parameters);
    moe__free(context, experts->touched, experts->config.num_experts);
    moe__free(context, experts, sizeof *experts);
    moe_context_destroy(context);
}

moe_status moe_experts_get_config(const moe_experts *experts, moe_experts_config *config)
{
    if (!experts) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "experts is NULL");
    MOE_TRY(moe__struct_check_out(&moe__experts_config_info, config, __func__));
    moe__struct_write(&moe__experts_config_info, config, &experts->config);
    return MOE_OK;
}

moe_status moe_experts_weights_changed(moe_experts *experts)
{
    if (!experts) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "experts is NULL");
    return MOE_OK; /* row-major storage has no packed copy */
}

moe_status moe_experts_touched(const moe_experts *experts, uint8_t *touched, int64_t *count)
{
    if (!experts || !touched)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "%s is NULL",
                         experts ? "touched" : "experts");
    int64_t sum = 0;
    for (int64_t e = 0; e < experts->config.num_experts; e++) {
        touched[e] = experts->touched[e];
        sum += experts->touched[e];
    }
    if (count) *count = sum;
    return MOE_OK;
}

/* ---- operands -------------------------------------------------------------------------------- */

/* Part of a parameter as [E, in, out] or [E, out]: the columns first, first + step, ... of the
 * output dimension. `fused` is the name of the parameter that holds it if `name` does not exist. */
typedef struct operand {
    const char *name, *fused;
    int64_t first, step; /* within the fused parameter */
} operand;

static moe__matrices strided(const moe_experts *experts, operand o, bool gradient)
{
    moe__matrices m = {0};
    const moe__parameter *p = moe__parameter_by_name(&experts->parameters, o.name);
    bool fused = !p && o.fused;
    if (fused) p = moe__parameter_by_name(&experts->parameters, o.fused);
    if (!p) return m;
    const int64_t *stride = gradient ? p->grad_stride : p->data_stride;
    bool out_in = experts->config.weight_layout == MOE_WEIGHT_OUT_IN && p->dims == 3;
    m.base = gradient ? p->grad : p->data;
    m.each = gradient ? p->grad_each : p->data_each;
    m.stride_expert = stride[0];
    m.stride_row = p->dims == 3 ? stride[out_in ? 2 : 1] : 0;
    m.stride_col = stride[p->dims == 2 || out_in ? 1 : 2];
    if (fused) {
        m.offset = o.first * m.stride_col;
        m.stride_col *= o.step;
    }
    return m;
}

/* Where gate (half 0) and up (half 1) lie in a fused parameter. */
static operand glu_half(const moe_experts *experts, const char *name, const char *fused, int half)
{
    int64_t F = experts->config.d_hidden;
    switch (experts->config.glu_order) {
    case MOE_GLU_GATE_UP: return (operand){name, fused, half ? F : 0, 1};
    case MOE_GLU_UP_GATE: return (operand){name, fused, half ? 0 : F, 1};
    case MOE_GLU_INTERLEAVED: return (operand){name, fused, half, 2};
    default: return (operand){name, NULL, 0, 1};
    }
}

static void operands(const moe_experts *e, bool gradient, moe__matrices m[6])
{
    m[0] = strided(e, glu_half(e, "w1", "w13", 0), gradient);
    m[1] = strided(e, glu_half(e, "b1", "b13", 0), gradient);
    m[2] = strided(e, glu_half(e, "w3", "w13", 1), gradient);
    m[3] = strided(e, glu_half(e, "b3", "b13", 1), gradient);
    m[4] = strided(e, (operand){"w2", NULL, 0, 1}, gradient);
    m[5] = strided(e, (operand){"b2", NULL, 0, 1}, gradient);
}

void moe__experts_operands(const moe_experts *experts, moe__experts_job *job)
{
    moe__matrices m[6];
    operands(experts, false, m);
    job->w1 = m[0], job->b1 = m[1], job->w3 = m[2];
    job->b3 = m[3], job->w2 = m[4], job->b2 = m[5];
}

void moe__experts_gradients(const moe_experts *experts, moe__experts_job *job, bool wanted)
{
    moe__matrices m[6];
    memset(m, 0, sizeof m);
    if (wanted) operands(experts, true, m);
    job->dw1 = m[0], job->db1 = m[1], job->dw3 = m[2];
    job->db3 = m[3], job->dw2 = m[4], job->db2 = m[5];
}

/* ---- work ------------------------------------------------------------------------------------ */

static moe_status check_pass(const moe_experts *experts, const moe_pass *pass, const char *function)
{
    if (!experts) REFUSE_ARGUMENT("experts is NULL");
    if (!pass) REFUSE_ARGUMENT("pass is NULL");
    if (pass->experts != experts) REFUSE_ARGUMENT("the pass was made for another pool");
    return MOE_OK;
}

moe_status moe_experts_forward(moe_experts *experts, moe_pass *pass, const moe_forward_args *args)
{
    MOE_TRY(check_pass(experts, pass, __func__));
    return moe__run_forward(pass, args, MOE__USE_EXPERTS, __func__);
}

moe_status moe_experts_backward(moe_experts *experts, moe_pass *pass, const moe_backward_args *args)
{
    MOE_TRY(check_pass(experts, pass, __func__));
    return moe__run_backward(pass, args, MOE__USE_EXPERTS, __func__);
}
