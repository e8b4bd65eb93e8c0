/* experts_config.c - the config of a pool, the host's callbacks, and what is refused in them. */
#include "pass_state.h"

static void experts_defaults(void *instance)
{
    moe_experts_config *c = instance;
    *c = (moe_experts_config){.d_out = MOE_SAME, .init_std = MOE_INIT_DEFAULT};
}
static void callbacks_defaults(void *instance)
{
    *(moe_expert_callbacks *)instance = (moe_expert_callbacks){0};
}

const moe__struct_info moe__experts_config_info = {"moe_experts_config", sizeof(moe_experts_config),
                                                   offsetof(moe_experts_config, callbacks),
                                                   experts_defaults};
const moe__struct_info moe__expert_callbacks_info = MOE__STRUCT_INFO(moe_expert_callbacks,
                                                                     callbacks_defaults);

moe_status moe_experts_config_init(moe_experts_config *config, size_t size)
{
    return moe__struct_init(&moe__experts_config_info, config, size, __func__);
}
moe_status moe_expert_callbacks_init(moe_expert_callbacks *callbacks, size_t size)
{
    return moe__struct_init(&moe__expert_callbacks_info, callbacks, size, __func__);
}

/* Fields of integers: each in its range, whatever the kind. */
static moe_status check_ranges(const moe_experts_config *c, const char *function)
{
    if (c->num_experts != MOE_NO_EXPERTS)
        MOE_TRY(moe__check_range("num_experts", c->num_experts, 1, INT32_MAX, function));
    MOE_TRY(moe__check_range("d_model", c->d_model, 1, INT64_MAX, function));
    MOE_TRY(moe__check_range("d_out", c->d_out, 1, INT64_MAX, function));
    MOE_TRY(moe__check_range("kind", c->kind, 0, MOE_EXPERTS_CALLBACK, function));
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
    return moe__check_range("reserved2", c->reserved2, 0, 0, function);
}

/* The three numbers of the clamped SwiGLU: in range, and 0 for every other activation. */
static moe_status check_clamp(const moe_experts_config *c, const char *function)
{
    const struct {
        const char *name;
        double value, low, high;
    } fields[] = {{"activation_alpha", c->activation_alpha, 0, 1e30},
                  {"activation_limit", c->activation_limit, 0, 1e30},
                  {"activation_offset", c->activation_offset, -1e30, 1e30}};
    for (int i = 0; i < 3; i++) {
        if (!(fields[i].value >= fields[i].low && fields[i].value <= fields[i].high))
            REFUSE_ARGUMENT("%s is %g; it must be in [%g, %g]", fields[i].name, fields[i].value,
                            fields[i].low, fields[i].high);
        if (fields[i].value != 0 && c->activation != MOE_ACTIVATION_SWIGLU)
            REFUSE_ARGUMENT("%s %g clashes with activation %d, which is not MOE_ACTIVATION_SWIGLU",
                            fields[i].name, fields[i].value, (int)c->activation);
    }
    return MOE_OK;
}

static moe_status check_network(const moe_experts_config *c, const char *function)
{
    MOE_TRY(moe__check_range("d_hidden", c->d_hidden, 1, INT64_MAX, function));
    if (c->callbacks)
        REFUSE_ARGUMENT("callbacks %p clash with kind MOE_EXPERTS_FEED_FORWARD",
                        (const void *)c->callbacks);
    if (c->init_std != MOE_INIT_DEFAULT && !(c->init_std >= 0 && c->init_std <= 1e300))
        REFUSE_ARGUMENT("init_std is %g; it must be finite and not negative", c->init_std);
    if (c->glu_order != MOE_GLU_SEPARATE && !moe__is_gated(c->activation))
        REFUSE_ARGUMENT("glu_order %d clashes with activation %d, which is not gated",
                        (int)c->glu_order, (int)c->activation);
    if (c->storage == MOE_STORAGE_PANELS && c->parameters == MOE_PARAMETERS_BOUND)
        REFUSE_ARGUMENT("parameters MOE_PARAMETERS_BOUND clashes with storage MOE_STORAGE_PANELS, "
                        "whose order is the library's own");
    return check_clamp(c, function);
}

/* The other kinds have no network: what describes one must have its default. */
static moe_status check_no_network(const moe_experts_config *c, const char *function)
{
    const char *kind = c->kind == MOE_EXPERTS_IDENTITY ? "MOE_EXPERTS_IDENTITY"
                                                       : "MOE_EXPERTS_CALLBACK";
    const struct {
        const char *name;
        double value, usual;
    } fields[] = {{"d_hidden", (double)c->d_hidden, 0},
                  {"activation", c->activation, 0},
                  {"bias", c->bias, 0},
                  {"glu_order", c->glu_order, 0},
                  {"weight_layout", c->weight_layout, 0},
                  {"storage", c->storage, 0},
                  {"output", c->output, 0},
                  {"weight_position", c->weight_position, 0},
                  {"activation_alpha", c->activation_alpha, 0},
                  {"activation_limit", c->activation_limit, 0},
                  {"activation_offset", c->activation_offset, 0},
                  {"parameters", c->parameters, 0},
                  {"init_std", c->init_std, MOE_INIT_DEFAULT}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (!(fields[i].value == fields[i].usual))
            REFUSE_ARGUMENT("%s %g clashes with kind %s", fields[i].name, fields[i].value, kind);
    if (c->kind == MOE_EXPERTS_IDENTITY && c->d_out != c->d_model)
        REFUSE_ARGUMENT("d_out %lld clashes with kind MOE_EXPERTS_IDENTITY: d_model is %lld",
                        (ll)c->d_out, (ll)c->d_model);
    if (c->kind == MOE_EXPERTS_IDENTITY && c->callbacks)
        REFUSE_ARGUMENT("callbacks %p clash with kind %s", (const void *)c->callbacks, kind);
    return MOE_OK;
}

static moe_status read_callbacks(const moe_experts_config *c, moe_expert_callbacks *callbacks,
                                 const char *function)
{
    if (!c->callbacks) REFUSE_ARGUMENT("callbacks is NULL, kind is MOE_EXPERTS_CALLBACK");
    MOE_TRY(
        moe__struct_read(&moe__expert_callbacks_info, callbacks, c->callbacks, false, function));
    if (!callbacks->forward) REFUSE_ARGUMENT("forward of the callbacks is NULL");
    return moe__check_range("workspace_per_row", callbacks->workspace_per_row, 0, INT64_MAX,
                            function);
}

moe_status moe__experts_config_check(moe_experts_config *c, moe_expert_callbacks *callbacks,
                                     const char *function)
{
    *callbacks = (moe_expert_callbacks){0};
    if (c->d_out == MOE_SAME) c->d_out = c->d_model;
    MOE_TRY(check_ranges(c, function));
    if (c->kind == MOE_EXPERTS_FEED_FORWARD)
        MOE_TRY(check_network(c, function));
    else
        MOE_TRY(check_no_network(c, function));
    if (c->kind == MOE_EXPERTS_CALLBACK) MOE_TRY(read_callbacks(c, callbacks, function));
    if (c->num_experts == MOE_NO_EXPERTS) c->num_experts = 0;
    return moe__check_range("dtype", c->dtype, MOE_DTYPE_F32, MOE_DTYPE_F16, function);
}

moe__experts_room moe__experts_room_of(const moe_experts_config *c,
                                       const moe_expert_callbacks *callbacks)
{
    bool callback = c->kind == MOE_EXPERTS_CALLBACK;
    return (moe__experts_room){.d_model = c->d_model,
                               .d_hidden = c->d_hidden,
                               .d_out = c->d_out,
                               .num_experts = c->num_experts,
                               .workspace_per_row = callback ? callbacks->workspace_per_row : 0,
                               .dtype = c->dtype,
                               .gated = moe__is_gated(c->activation),
                               .x_rows = callback,
                               .keep_h = c->weight_position == MOE_WEIGHT_ON_HIDDEN,
                               .dz = callback || c->output == MOE_OUTPUT_SIGMOID};
}
