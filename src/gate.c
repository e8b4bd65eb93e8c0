/* gate.c - the gate object: its life, and the calls that route, that go back and that balance. Its
 * config is in gate_config.c, what that comes to in gate_call.c. */
#include "cv.h"
#include "numeric.h"
#include "pass_state.h"
#include "philox.h"

/* ---- life ------------------------------------------------------------------------------------ */

moe_status moe_gate_create(moe_gate **gate, moe_context *context, const moe_gate_config *config)
{
    moe_gate_config c;
    if (!gate || !context)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "%s is NULL",
                         gate ? "context" : "gate");
    MOE_TRY(moe__struct_read(&moe__gate_config_info, &c, config, false, __func__));
    MOE_TRY(moe__gate_config_check(&c, __func__));
    if (!moe__kernels(context, c.dtype))
        return moe__fail(MOE_ERROR_NOT_SUPPORTED, __func__, "dtype %d is not available on %s",
                         (int)c.dtype, context->memory->name);
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

static void set_element(void *v, int64_t i, int32_t dtype, double value)
{
    if (dtype == MOE_DTYPE_F64)
        ((double *)v)[i] = value;
    else
        ((float *)v)[i] = (float)value;
}

static moe_status check_real(int32_t dtype, const char *function)
{
    if (dtype == MOE_DTYPE_BF16 || dtype == MOE_DTYPE_F16)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "dtype %d is not available on CPU", (int)dtype);
    if (dtype != MOE_DTYPE_F32 && dtype != MOE_DTYPE_F64)
        REFUSE_ARGUMENT("dtype is %d", (int)dtype);
    return MOE_OK;
}

/* b_e + rate sign(mean - counts_e), the sign found in whole numbers: n counts_e against the sum. */
static moe_status step_bias(void *next, const void *bias, const int64_t *counts, int64_t n,
                            double rate, int32_t dtype, const char *function)
{
    int64_t sum = 0;
    MOE_TRY(moe__check_range("n", n, 0, INT64_MAX / 8, function));
    MOE_TRY(check_real(dtype, function));
    if (rate - rate != 0) REFUSE_ARGUMENT("rate is %g; it must be finite", rate);
    if (n > 0 && (!next || !bias || !counts))
        REFUSE_ARGUMENT("%s is NULL for %lld experts",
                        !next   ? "next"
                        : !bias ? "bias"
                                : "counts",
                        (ll)n);
    for (int64_t e = 0; e < n; e++) {
        if (counts[e] < 0) REFUSE_ARGUMENT("counts[%lld] is %lld", (ll)e, (ll)counts[e]);
        sum = moe__add(sum, counts[e]);
        if (moe__mul(n, counts[e]) < 0) sum = -1;
        if (sum < 0) REFUSE(MOE_ERROR_OVERFLOW, "the counts do not fit in 63 bits");
    }
    fenv_t saved;
    moe__fenv_enter(&saved);
    for (int64_t e = 0; e < n; e++) {
        int64_t scaled = n * counts[e];
        double sign = scaled < sum ? 1 : scaled > sum ? -1 : 0;
        set_element(next, e, dtype, element(bias, e, dtype) + rate * sign);
    }
    moe__fenv_leave(&saved);
    return MOE_OK;
}

moe_status moe_selection_bias_step(void *next, const void *bias, const int64_t *counts, int64_t n,
                                   double rate, int32_t dtype)
{
    return step_bias(next, bias, counts, n, rate, dtype, __func__);
}

/* A bias that is not in the host's memory; nor need the counts be. */
static moe_status step_elsewhere(moe_context *context, const moe__parameter *p,
                                 const int64_t *counts, int64_t n, double rate,
                                 const char *function)
{
    const moe__memory *memory = context->memory;
    moe__workers workers = moe__workers_of(context, function, NULL);
    int64_t words = n * (int64_t)sizeof *counts, bytes = words + p->own_bytes;
    if (!counts) REFUSE_ARGUMENT("counts is NULL for %lld experts", (ll)n);
    int64_t *here = moe__alloc(context, bytes);
    if (!here) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no %lld bytes", (ll)bytes);
    void *bias = here + n;
    moe_status status = memory->fetch(&workers, here, counts, words);
    if (status == MOE_OK) status = memory->fetch(&workers, bias, p->own_data, p->own_bytes);
    if (status == MOE_OK) status = step_bias(bias, bias, here, n, rate, p->dtype, function);
    if (status == MOE_OK) status = memory->store(&workers, p->own_data, bias, p->own_bytes);
    moe__free(context, here, bytes);
    return status;
}

moe_status moe_gate_update_selection_bias(moe_gate *gate, const int64_t *counts, double rate)
{
    const char *function = __func__;
    if (!gate) REFUSE_ARGUMENT("gate is NULL");
    const moe__parameter *p = moe__parameter_by_name(&gate->parameters, "selection_bias");
    if (!p) REFUSE(MOE_ERROR_INVALID_STATE, "the gate has no selection_bias");
    if (!p->owned) REFUSE(MOE_ERROR_INVALID_STATE, "selection_bias is bound: it is the host's");
    int64_t n = gate->config.num_experts;
    if (gate->context->memory->is_host)
        return step_bias(p->own_data, p->own_data, counts, n, rate, p->dtype, function);
    return step_elsewhere(gate->context, p, counts, n, rate, function);
}

moe_status moe_cv_squared(double *cv2, void *dv, const void *v, int64_t n, int32_t ddof,
                          int32_t dtype)
{
    const char *function = __func__;
    MOE_TRY(moe__check_range("n", n, 0, INT64_MAX / 8, function));
    MOE_TRY(moe__check_range("ddof", ddof, 0, 1, function));
    if (!v && n > 0) REFUSE_ARGUMENT("v is NULL for %lld elements", (ll)n);
    MOE_TRY(check_real(dtype, function));
    fenv_t saved;
    moe__fenv_enter(&saved);
    moe__cv cv = {.n = n, .ddof = ddof};
    for (int64_t i = 0; i < n; i++) moe__cv_add(&cv, element(v, i, dtype));
    for (int64_t i = 0; i < n; i++) moe__cv_add_square(&cv, element(v, i, dtype));
    for (int64_t i = 0; dv && i < n; i++) {
        set_element(dv, i, dtype, moe__cv_gradient(&cv, element(v, i, dtype)));
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
