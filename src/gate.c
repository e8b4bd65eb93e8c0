/* gate.c - the gate object: its config, its life, and the calls that route and that go back. */
#include "cv.h"
#include "numeric.h"
#include "pass_state.h"
#include "philox.h"

#include <string.h>

/* ---- config ---------------------------------------------------------------------------------- */

static void gate_defaults(void *instance)
{
    moe_gate_config *c = instance;
    *c = (moe_gate_config){
        .top_k = 1,
        .route_scale = 1,
        .expert_groups = 1,
        .top_groups = 1,
        .noise_epsilon = 1e-2,
        .cdf_guard = 1e-20,
        .sequence_score = MOE_SCORE_SIGMOID,
        .capacity_factor = 1,
        .init_std = MOE_INIT_DEFAULT,
    };
}

const moe__struct_info moe__gate_config_info = {"moe_gate_config", sizeof(moe_gate_config),
                                                offsetof(moe_gate_config, threshold_weight),
                                                gate_defaults};

moe_status moe_gate_config_init(moe_gate_config *config, size_t size)
{
    return moe__struct_init(&moe__gate_config_info, config, size, __func__);
}

double moe_init_default(void) { return MOE_INIT_DEFAULT; }

/* Finite and not negative. */
static moe_status check_factor(const char *name, double value, const char *function)
{
    if (!(value >= 0 && value <= 1.7976931348623157e308))
        REFUSE_ARGUMENT("%s is %g; it must be finite and not negative", name, value);
    return MOE_OK;
}

static moe_status check_finite(const char *name, double value, const char *function)
{
    if (!(value - value == 0)) REFUSE_ARGUMENT("%s is %g; it must be finite", name, value);
    return MOE_OK;
}

/* Fields that hold one of a few numbers. */
static moe_status check_choices(const moe_gate_config *c, const char *function)
{
    MOE_TRY(moe__check_range("kind", c->kind, MOE_GATE_TOP_K, MOE_GATE_SINKHORN, function));
    MOE_TRY(moe__check_range("score", c->score, MOE_SCORE_SOFTMAX, MOE_SCORE_SIGMOID, function));
    MOE_TRY(moe__check_range("order", c->order, 0, MOE_ORDER_SCORE_THEN_SELECT, function));
    MOE_TRY(moe__check_range("renormalize", c->renormalize, 0, 1, function));
    MOE_TRY(moe__check_range("bias", c->bias, 0, 1, function));
    MOE_TRY(moe__check_range("selection_bias", c->selection_bias, 0, 1, function));
    MOE_TRY(moe__check_range("group_score", c->group_score, 0, 1, function));
    MOE_TRY(moe__check_range("cv_ddof", c->cv_ddof, 0, 1, function));
    MOE_TRY(moe__check_range("stream_id", c->stream_id, 0, 255, function));
    MOE_TRY(moe__check_range("sequence_score", c->sequence_score, 0, MOE_SCORE_SIGMOID, function));
    MOE_TRY(moe__check_range("sequence_counts", c->sequence_counts, 0, MOE_SEQUENCE_COUNTS_ROUTED,
                             function));
    MOE_TRY(moe__check_range("capacity_kind", c->capacity_kind, 0, MOE_CAPACITY_FACTOR, function));
    MOE_TRY(moe__check_range("capacity_rounding", c->capacity_rounding, 0, MOE_ROUND_NEAREST,
                             function));
    MOE_TRY(moe__check_range("capacity", c->capacity, 0, INT64_MAX, function));
    MOE_TRY(moe__check_range("capacity_minimum", c->capacity_minimum, 0, INT64_MAX, function));
    MOE_TRY(moe__check_range("drop_policy", c->drop_policy, 0, MOE_DROP_RANDOM, function));
    MOE_TRY(moe__check_range("renormalize_after_drop", c->renormalize_after_drop, 0, 1, function));
    MOE_TRY(moe__check_range("parameters", c->parameters, 0, MOE_PARAMETERS_BOUND, function));
    return moe__check_range("reserved", c->reserved, 0, 0, function);
}

static moe_status check_numbers(const moe_gate_config *c, const char *function)
{
    MOE_TRY(check_factor("renormalize_epsilon", c->renormalize_epsilon, function));
    MOE_TRY(check_finite("route_scale", c->route_scale, function));
    MOE_TRY(check_factor("noise_epsilon", c->noise_epsilon, function));
    MOE_TRY(check_factor("cdf_guard", c->cdf_guard, function));
    MOE_TRY(check_factor("jitter", c->jitter, function));
    MOE_TRY(check_finite("importance_weight", c->importance_weight, function));
    MOE_TRY(check_finite("load_weight", c->load_weight, function));
    MOE_TRY(check_finite("switch_weight", c->switch_weight, function));
    MOE_TRY(check_finite("gshard_weight", c->gshard_weight, function));
    MOE_TRY(check_finite("z_weight", c->z_weight, function));
    MOE_TRY(check_finite("sequence_weight", c->sequence_weight, function));
    MOE_TRY(check_factor("capacity_factor", c->capacity_factor, function));
    if (c->init_std != MOE_INIT_DEFAULT) return check_factor("init_std", c->init_std, function);
    return MOE_OK;
}

/* What is known but not there yet. */
static moe_status check_supported(const moe_gate_config *c, const char *function)
{
    if (c->kind > MOE_GATE_SOFTMAX_DENSE)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "kind %d (%s) is not available", (int)c->kind,
               c->kind == MOE_GATE_BALANCED        ? "MOE_GATE_BALANCED"
               : c->kind == MOE_GATE_HIERARCHICAL  ? "MOE_GATE_HIERARCHICAL"
               : c->kind == MOE_GATE_EXPERT_CHOICE ? "MOE_GATE_EXPERT_CHOICE"
               : c->kind == MOE_GATE_HASH          ? "MOE_GATE_HASH"
                                                   : "MOE_GATE_SINKHORN");
    if (c->selection_bias) REFUSE(MOE_ERROR_NOT_SUPPORTED, "selection_bias is not available");
    if (c->expert_groups > 1)
        REFUSE(MOE_ERROR_NOT_SUPPORTED,
               "expert_groups is %lld: group-limited selection is not available",
               (ll)c->expert_groups);
    if (c->jitter > 0) REFUSE(MOE_ERROR_NOT_SUPPORTED, "jitter is %g: not available", c->jitter);
    if (c->drop_policy != MOE_DROP_TOKEN_ORDER && c->capacity_kind != MOE_CAPACITY_NONE)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "drop_policy %d is not available", (int)c->drop_policy);
    if (c->dtype != MOE_DTYPE_F32 && c->dtype != MOE_DTYPE_F64) {
        if (c->dtype != MOE_DTYPE_BF16 && c->dtype != MOE_DTYPE_F16)
            REFUSE_ARGUMENT("dtype is %d", (int)c->dtype);
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "dtype %d is not available on CPU", (int)c->dtype);
    }
    return MOE_OK;
}

/* Pairs of fields that contradict each other. */
static moe_status check_clashes(const moe_gate_config *c, const char *function)
{
    bool noisy = c->kind == MOE_GATE_NOISY_TOP_K;
    if (c->kind != MOE_GATE_TOP_K && (c->score != MOE_SCORE_SOFTMAX || c->order || c->renormalize))
        REFUSE_ARGUMENT(
            "kind %d clashes with score %d, order %d, renormalize %d: it is a softmax over "
            "the chosen logits",
            (int)c->kind, (int)c->score, (int)c->order, (int)c->renormalize);
    if (c->renormalize && c->score == MOE_SCORE_SOFTMAX && c->order != MOE_ORDER_SCORE_THEN_SELECT)
        REFUSE_ARGUMENT("renormalize 1 clashes with order MOE_ORDER_SELECT_THEN_SCORE");
    if (noisy && c->d_model == 0)
        REFUSE_ARGUMENT(
            "kind MOE_GATE_NOISY_TOP_K clashes with d_model 0: its noise needs weights");
    if (!noisy && c->load_weight != 0)
        REFUSE_ARGUMENT(
            "load_weight %g clashes with kind %d: only MOE_GATE_NOISY_TOP_K has a load loss",
            c->load_weight, (int)c->kind);
    if (c->d_model == 0 && c->bias) REFUSE_ARGUMENT("bias 1 clashes with d_model 0");
    return MOE_OK;
}

moe_status moe__gate_config_check(const moe_gate_config *c, const char *function)
{
    MOE_TRY(moe__check_range("num_experts", c->num_experts, 1, INT32_MAX, function));
    MOE_TRY(moe__check_range("d_model", c->d_model, 0, INT64_MAX, function));
    MOE_TRY(moe__check_range("expert_groups", c->expert_groups, 1, c->num_experts, function));
    MOE_TRY(moe__check_range("top_groups", c->top_groups, 1, c->expert_groups, function));
    MOE_TRY(check_choices(c, function));
    MOE_TRY(check_numbers(c, function));
    MOE_TRY(check_supported(c, function));
    if (c->kind != MOE_GATE_SOFTMAX_DENSE)
        MOE_TRY(moe__check_range("top_k", c->top_k, 1, c->num_experts, function));
    return check_clashes(c, function);
}

void moe__gate_loss_weights(const moe_gate_config *c, double weights[MOE_LOSS_SLOTS])
{
    memset(weights, 0, MOE_LOSS_SLOTS * sizeof *weights);
    weights[MOE_LOSS_IMPORTANCE] = c->importance_weight;
    weights[MOE_LOSS_LOAD] = c->load_weight;
    weights[MOE_LOSS_SWITCH] = c->switch_weight;
    weights[MOE_LOSS_GSHARD] = c->gshard_weight;
    weights[MOE_LOSS_Z] = c->z_weight;
    weights[MOE_LOSS_SEQUENCE] = c->sequence_weight;
}

/* ---- life ------------------------------------------------------------------------------------ */

moe_status moe_gate_create(moe_gate **gate, moe_context *context, const moe_gate_config *config)
{
    moe_gate_config c;
    if (!gate || !context)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "%s is NULL",
                         gate ? "context" : "gate");
    MOE_TRY(moe__struct_read(&moe__gate_config_info, &c, config, false, __func__));
    MOE_TRY(moe__gate_config_check(&c, __func__));
    moe_gate *g = moe__alloc_zeroed(context, sizeof *g);
    if (!g) return moe__fail(MOE_ERROR_OUT_OF_MEMORY, __func__, "no memory for the gate");
    atomic_init(&g->references, 1);
    atomic_flag_clear(&g->backward_running);
    g->context = context;
    g->config = c;
    moe__gate_parameters_describe(g);
    moe_status status = moe__parameters_allocate(&g->parameters, c.parameters, __func__);
    if (status != MOE_OK) {
        moe__free(context, g, sizeof *g);
        return status;
    }
    moe__context_retain(context);
    *gate = g;
    return MOE_OK;
}

void moe__gate_retain(moe_gate *gate) { atomic_fetch_add(&gate->references, 1); }

void moe_gate_destroy(moe_gate *gate)
{
    if (!gate || atomic_fetch_sub(&gate->references, 1) != 1) return;
    moe_context *context = gate->context;
    moe__parameters_free(&gate->parameters);
    moe__free(context, gate, sizeof *gate);
    moe_context_destroy(context);
}

moe_status moe_gate_get_config(const moe_gate *gate, moe_gate_config *config)
{
    if (!gate) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "gate is NULL");
    MOE_TRY(moe__struct_check_out(&moe__gate_config_info, config, __func__));
    moe__struct_write(&moe__gate_config_info, config, &gate->config);
    return MOE_OK;
}

/* ---- operands -------------------------------------------------------------------------------- */

/* [D,E] or [E] of a parameter's data or gradient. */
static moe__matrices gate_operand(const moe_gate *gate, const char *name, bool gradient)
{
    moe__matrices m = {0};
    const moe__parameter *p = moe__parameter_by_name(&gate->parameters, name);
    if (!p) return m;
    const int64_t *stride = gradient ? p->grad_stride : p->data_stride;
    m.base = gradient ? p->grad : p->data;
    m.stride_row = p->dims == 2 ? stride[0] : 0;
    m.stride_col = stride[p->dims - 1];
    return m;
}

void moe__gate_operands(const moe_gate *gate, moe__route_job *job)
{
    job->weight_matrix = gate_operand(gate, "weight", false);
    job->bias = gate_operand(gate, "bias", false);
    job->noise_weight = gate_operand(gate, "noise_weight", false);
}

void moe__gate_gradients(const moe_gate *gate, moe__gate_backward_job *job, bool wanted)
{
    const moe__matrices none = {0};
    job->d_weight_matrix = wanted ? gate_operand(gate, "weight", true) : none;
    job->d_bias = wanted ? gate_operand(gate, "bias", true) : none;
    job->d_noise_weight = wanted ? gate_operand(gate, "noise_weight", true) : none;
}

/* ---- work ------------------------------------------------------------------------------------ */

static moe_status check_pass(const moe_gate *gate, const moe_pass *pass, const char *function)
{
    if (!gate) REFUSE_ARGUMENT("gate is NULL");
    if (!pass) REFUSE_ARGUMENT("pass is NULL");
    if (pass->gate != gate) REFUSE_ARGUMENT("the pass was made for another gate");
    return MOE_OK;
}

moe_status moe_gate_forward(moe_gate *gate, moe_pass *pass, const moe_forward_args *args)
{
    MOE_TRY(check_pass(gate, pass, __func__));
    return moe__run_forward(pass, args, MOE__USE_GATE, __func__);
}

moe_status moe_gate_backward(moe_gate *gate, moe_pass *pass, const moe_backward_args *args)
{
    MOE_TRY(check_pass(gate, pass, __func__));
    return moe__run_backward(pass, args, MOE__USE_GATE, __func__);
}

/* Element i of a vector of f32 or f64. */
static double element(const void *v, int64_t i, int32_t dtype)
{
    return dtype == MOE_DTYPE_F64 ? ((const double *)v)[i] : (double)((const float *)v)[i];
}

moe_status moe_cv_squared(double *cv2, void *dv, const void *v, int64_t n, int32_t ddof,
                          int32_t dtype)
{
    const char *function = __func__;
    MOE_TRY(moe__check_range("n", n, 0, INT64_MAX / 8, function));
    MOE_TRY(moe__check_range("ddof", ddof, 0, 1, function));
    if (!v && n > 0) REFUSE_ARGUMENT("v is NULL for %lld elements", (ll)n);
    if (dtype == MOE_DTYPE_BF16 || dtype == MOE_DTYPE_F16)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "dtype %d is not available on CPU", (int)dtype);
    if (dtype != MOE_DTYPE_F32 && dtype != MOE_DTYPE_F64)
        REFUSE_ARGUMENT("dtype is %d", (int)dtype);
    fenv_t saved;
    moe__fenv_enter(&saved);
    moe__cv cv = {.n = n, .ddof = ddof};
    for (int64_t i = 0; i < n; i++) moe__cv_add(&cv, element(v, i, dtype));
    for (int64_t i = 0; i < n; i++) moe__cv_add_square(&cv, element(v, i, dtype));
    for (int64_t i = 0; dv && i < n; i++) {
        double d = moe__cv_gradient(&cv, element(v, i, dtype));
        if (dtype == MOE_DTYPE_F64)
            ((double *)dv)[i] = d;
        else
            ((float *)dv)[i] = (float)d;
    }
    if (cv2) *cv2 = moe__cv_value(&cv);
    moe__fenv_leave(&saved);
    return MOE_OK;
}

moe_status moe_noise4(float *out, uint64_t seed, int32_t layer_id, int32_t stream_id, int64_t step,
                      int64_t token, int64_t block)
{
    const char *function = __func__;
    uint32_t counter[4], bits[4];
    if (!out) REFUSE_ARGUMENT("out is NULL");
    MOE_TRY(moe__check_range("layer_id", layer_id, 0, 65535, function));
    MOE_TRY(moe__check_range("stream_id", stream_id, 0, 255, function));
    MOE_TRY(moe__check_range("step", step, 0, UINT32_MAX, function));
    MOE_TRY(moe__check_range("token", token, 0, UINT32_MAX, function));
    MOE_TRY(moe__check_range("block", block, 0, UINT32_MAX, function));
    fenv_t saved;
    moe__fenv_enter(&saved);
    moe__counter(counter, moe__stream((uint32_t)layer_id, (uint32_t)stream_id, MOE__PURPOSE_NOISE),
                 (uint32_t)step, (uint32_t)token, (uint32_t)block);
    moe__philox(seed, counter, bits);
    moe__normal4(bits, out);
    moe__fenv_leave(&saved);
    return MOE_OK;
}
