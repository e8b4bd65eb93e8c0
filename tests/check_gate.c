/* check_gate.c - the sentences of gate.h, experts.h, layer.h and pass.h that a comparison with the
 * reference does not see: what each call refuses, what it leaves alone, flags, replays, odd routings. */
#include "support/layer_case.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const layer_case base = {.name = "api", .T = 12, .D = 6, .E = 5, .F = 7, .K = 2, .kind = MOE_GATE_NOISY_TOP_K,
                                .expert_bias = 1, .weight = {0.1, 0.1, 0.1, 0.1, 0.01, 0.1}};

#define OK(call) ck_assert_msg((call) == MOE_OK, "%s: %s", #call, moe_last_error())
#define REFUSED(status, call)                                                                      \
    do {                                                                                           \
        moe_status refused_status = (call);                                                        \
        ck_assert_msg(refused_status == (status), "%s gave %s (%s)", #call,                        \
                      moe_status_name(refused_status), moe_last_error());                          \
    } while (0)

static void begin(layer_run *r, layer_case *c, int32_t dtype)
{
    layer_case_make(c, 9);
    layer_run_make(r, c, dtype, NULL);
}

static void end(layer_run *r, layer_case *c)
{
    layer_run_free(r);
    layer_case_free(c);
}

/* ---- NULL ------------------------------------------------------------------------------------------- */

START_TEST(test_api_refuses_null_handles)
{
    moe_forward_args f;
    moe_backward_args b;
    moe_losses losses;
    moe_stats stats;
    moe_tensor_view view;
    const moe_plan *plan;
    uint8_t touched[4];
    OK(moe_forward_args_init(&f, sizeof f));
    OK(moe_backward_args_init(&b, sizeof b));
    OK(moe_losses_init(&losses, sizeof losses));
    OK(moe_stats_init(&stats, sizeof stats));
    OK(moe_tensor_view_init(&view, sizeof view));
    moe_status refused[] = {moe_layer_forward(NULL, NULL, &f), moe_layer_backward(NULL, NULL, &b),
                            moe_gate_forward(NULL, NULL, &f),  moe_gate_backward(NULL, NULL, &b),
                            moe_experts_forward(NULL, NULL, &f), moe_experts_backward(NULL, NULL, &b),
                            moe_gate_create(NULL, NULL, NULL), moe_experts_create(NULL, NULL, NULL),
                            moe_layer_create(NULL, NULL), moe_pass_create(NULL, NULL, NULL),
                            moe_pass_create_for_gate(NULL, NULL, NULL), moe_pass_create_for_experts(NULL, NULL, NULL),
                            moe_pass_reserve(NULL, 1, 1, 1), moe_pass_plan(NULL, &plan), moe_pass_losses(NULL, &losses),
                            moe_pass_stats(NULL, &stats), moe_pass_tensor(NULL, 0, &view),
                            moe_experts_touched(NULL, touched, NULL), moe_experts_weights_changed(NULL),
                            moe_gate_get_config(NULL, NULL), moe_experts_get_config(NULL, NULL),
                            moe_layer_get_config(NULL, NULL), moe_layer_memory(NULL, NULL), moe_layer_flops(NULL, NULL),
                            moe_cv_squared(NULL, NULL, NULL, 3, 0, 0), moe_noise4(NULL, 0, 0, 0, 0, 0, 0),
                            moe_comm_create_self(NULL, NULL), moe_gate_zero_gradients(NULL, NULL),
                            moe_layer_init_parameters(NULL, 0), moe_layer_bind(NULL, 0, NULL)};
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        ck_assert_msg(refused[i] == MOE_ERROR_INVALID_ARGUMENT, "call %zu gave %s", i, moe_status_name(refused[i]));
    moe_layer_destroy(NULL), moe_gate_destroy(NULL), moe_experts_destroy(NULL), moe_pass_destroy(NULL);
    moe_comm_destroy(NULL), moe_context_destroy(NULL), moe_plan_destroy(NULL);
    ck_assert_int_eq(moe_pass_bytes(NULL), 0);
    ck_assert_int_eq(moe_comm_rank(NULL), -1);
    ck_assert_int_eq(moe_comm_size(NULL), 0);
}
END_TEST

/* ---- configs ---------------------------------------------------------------------------------------- */

static moe_context *new_context(void)
{
    moe_context *context = NULL;
    OK(moe_context_create(&context, NULL));
    return context;
}

/* Sets one field, expects a status, and the field's name in the message. */
#define BAD_GATE(status, field, value)                                                             \
    do {                                                                                           \
        moe_gate_config bad = good;                                                                \
        bad.field = value;                                                                         \
        gate = NULL;                                                                               \
        REFUSED(status, moe_gate_create(&gate, context, &bad));                                    \
        ck_assert_ptr_null(gate);                                                                  \
        ck_assert_msg(strstr(moe_last_error(), #field), "%s: %s", #field, moe_last_error());       \
    } while (0)

START_TEST(test_gate_create_refuses_bad_configs)
{
    moe_context *context = new_context();
    moe_gate *gate = NULL;
    moe_gate_config good;
    OK(moe_gate_config_init(&good, sizeof good));
    good.d_model = 8, good.num_experts = 4, good.top_k = 2;
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, num_experts, 0);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, num_experts, (int64_t)1 << 31);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, d_model, -1);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, top_k, 0);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, top_k, 5);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, kind, -1);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, kind, 8);
    BAD_GATE(MOE_ERROR_NOT_SUPPORTED, kind, MOE_GATE_BALANCED);
    BAD_GATE(MOE_ERROR_NOT_SUPPORTED, kind, MOE_GATE_HIERARCHICAL);
    BAD_GATE(MOE_ERROR_NOT_SUPPORTED, kind, MOE_GATE_EXPERT_CHOICE);
    BAD_GATE(MOE_ERROR_NOT_SUPPORTED, kind, MOE_GATE_HASH);
    BAD_GATE(MOE_ERROR_NOT_SUPPORTED, kind, MOE_GATE_SINKHORN);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, score, 2);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, order, 2);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, renormalize, 2);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, renormalize, 1); /* clashes with the default order */
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, renormalize_epsilon, -1);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, route_scale, NAN);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, bias, 2);
    BAD_GATE(MOE_ERROR_NOT_SUPPORTED, selection_bias, 1);
    BAD_GATE(MOE_ERROR_NOT_SUPPORTED, expert_groups, 2);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, expert_groups, 0);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, top_groups, 2);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, group_score, 5);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, dtype, 99);
    BAD_GATE(MOE_ERROR_NOT_SUPPORTED, dtype, MOE_DTYPE_BF16);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, noise_epsilon, -1);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, cdf_guard, INFINITY);
    BAD_GATE(MOE_ERROR_NOT_SUPPORTED, jitter, 0.01);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, stream_id, 256);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, cv_ddof, 2);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, importance_weight, NAN);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, load_weight, 0.1); /* only a noisy gate has a load */
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, switch_weight, INFINITY);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, gshard_weight, NAN);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, z_weight, NAN);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, sequence_weight, NAN);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, sequence_score, 2);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, sequence_counts, 2);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, capacity_kind, 3);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, capacity_rounding, 3);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, capacity, -1);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, capacity_factor, -0.5);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, capacity_minimum, -1);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, drop_policy, 5);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, renormalize_after_drop, 2);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, parameters, 3);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, reserved, 1);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, init_std, -2);
    good.capacity_kind = MOE_CAPACITY_NUMBER;
    BAD_GATE(MOE_ERROR_NOT_SUPPORTED, drop_policy, MOE_DROP_CHOICE);
    good.kind = MOE_GATE_NOISY_TOP_K;
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, score, MOE_SCORE_SIGMOID);
    BAD_GATE(MOE_ERROR_INVALID_ARGUMENT, d_model, 0);
    OK(moe_gate_create(&gate, context, &good));
    moe_gate_destroy(gate);
    moe_context_destroy(context);
}
END_TEST

#define BAD_EXPERTS(status, field, value)                                                          \
    do {                                                                                           \
        moe_experts_config bad = good;                                                             \
        bad.field = value;                                                                         \
        pool = NULL;                                                                               \
        REFUSED(status, moe_experts_create(&pool, context, &bad));                                 \
        ck_assert_ptr_null(pool);                                                                  \
        ck_assert_msg(strstr(moe_last_error(), #field), "%s: %s", #field, moe_last_error());       \
    } while (0)

START_TEST(test_experts_create_refuses_bad_configs)
{
    moe_context *context = new_context();
    moe_experts *pool = NULL;
    moe_experts_config good;
    OK(moe_experts_config_init(&good, sizeof good));
    good.d_model = 8, good.d_hidden = 6, good.num_experts = 4;
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, d_model, 0);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, d_hidden, -3);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, d_out, 0);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, num_experts, 0);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, activation, 4);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, activation, 20);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, bias, 2);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, glu_order, 4);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, glu_order, MOE_GLU_GATE_UP); /* ReLU is not gated */
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, weight_layout, 2);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, storage, 3);
    BAD_EXPERTS(MOE_ERROR_NOT_SUPPORTED, storage, MOE_STORAGE_PANELS);
    BAD_EXPERTS(MOE_ERROR_NOT_SUPPORTED, storage, MOE_STORAGE_PREPACKED);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, dtype, -1);
    BAD_EXPERTS(MOE_ERROR_NOT_SUPPORTED, dtype, MOE_DTYPE_F16);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, output, 2);
    BAD_EXPERTS(MOE_ERROR_NOT_SUPPORTED, weight_position, MOE_WEIGHT_ON_HIDDEN);
    BAD_EXPERTS(MOE_ERROR_NOT_SUPPORTED, activation_alpha, 1.7);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, parameters, -1);
    BAD_EXPERTS(MOE_ERROR_INVALID_ARGUMENT, init_std, NAN);
    OK(moe_experts_create(&pool, context, &good));
    OK(moe_experts_get_config(pool, &good));
    ck_assert_int_eq(good.d_out, 8);
    moe_experts_destroy(pool);
    moe_context_destroy(context);
}
END_TEST

START_TEST(test_layer_create_refuses_what_does_not_fit)
{
    layer_case c = base;
    layer_run r;
    moe_layer *layer = NULL;
    moe_layer_config l;
    begin(&r, &c, MOE_DTYPE_F32);
    moe_context *other = new_context();
    moe_comm *comm = NULL;
    moe_gate_config g;
    moe_gate *gate = NULL;
    OK(moe_layer_config_init(&l, sizeof l));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    l.experts = r.experts, l.gate = r.gate;
    l.shared = r.experts;
    REFUSED(MOE_ERROR_NOT_SUPPORTED, moe_layer_create(&layer, &l));
    l.shared = NULL, l.residual = r.experts;
    REFUSED(MOE_ERROR_NOT_SUPPORTED, moe_layer_create(&layer, &l));
    l.residual = NULL, l.layer_id = 65536;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    l.layer_id = 0, l.output = 7;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    l.output = 0;
    OK(moe_comm_create_self(&comm, other));
    l.comm = comm;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    l.comm = NULL;
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = 6, g.num_experts = 4;
    OK(moe_gate_create(&gate, r.context, &g));
    l.gate = gate;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "4 experts"));
    moe_gate_destroy(gate);
    g.num_experts = 5, g.dtype = MOE_DTYPE_F64;
    OK(moe_gate_create(&gate, r.context, &g));
    l.gate = gate;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    moe_gate_destroy(gate);
    g.dtype = MOE_DTYPE_F32;
    OK(moe_gate_create(&gate, other, &g));
    l.gate = gate;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    ck_assert_ptr_null(layer);
    moe_gate_destroy(gate), moe_comm_destroy(comm), moe_context_destroy(other);
    end(&r, &c);
}
END_TEST

/* ---- arguments of forward and backward ------------------------------------------------------------------ */

/* Changes one field, expects a refusal, and that y and the pass are as they were. */
#define BAD_FORWARD(status, field, value)                                                          \
    do {                                                                                           \
        moe_forward_args good = r.f;                                                               \
        memset(r.y, 0x5a, (size_t)(c.T * c.D) * 4);                                                \
        r.f.field = value;                                                                         \
        REFUSED(status, layer_run_forward(&r));                                                    \
        for (int64_t i = 0; i < c.T * c.D * 4; i++) ck_assert_int_eq(((unsigned char *)r.y)[i], 0x5a); \
        r.f = good;                                                                                \
        OK(layer_run_backward(&r)); /* the forward before still stands */                          \
    } while (0)

START_TEST(test_layer_forward_refuses_bad_arguments)
{
    layer_case c = base;
    layer_run r;
    int64_t groups[3] = {0, 5, 11}, down[3] = {0, 13, 12}, key[12] = {0};
    double weights[MOE_LOSS_SLOTS] = {0};
    begin(&r, &c, MOE_DTYPE_F32);
    OK(layer_run_forward(&r));
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, flags, 1u << 20);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, flags, MOE_FORWARD_NO_SAVE | MOE_FORWARD_PLAN_ONLY);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, flags, MOE_FORWARD_RECOMPUTE | MOE_FORWARD_ADD);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, tokens, -1);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, x, NULL);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, y, NULL);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, y, r.x);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, x_stride, 5);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, x_stride, -6);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, y_stride, 3);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, noise_stride, 4);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, groups, -1);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, groups, 2);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, top_k, 0);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, top_k, 6);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, capacity, -2);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, stream, r.x);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, reserved, 1);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, plan_use, 2);
    BAD_FORWARD(MOE_ERROR_NOT_SUPPORTED, token_key, key);
    BAD_FORWARD(MOE_ERROR_STRUCT_SIZE, struct_size, 0);
    BAD_FORWARD(MOE_ERROR_STRUCT_TOO_OLD, struct_size, 64);
    weights[MOE_LOSS_THRESHOLD] = 1;
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, loss_weights, weights);
    r.f.groups = 2;
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, group_begin, groups);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, group_begin, down);
    r.f.groups = 0;
    r.f.noise = NULL;
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, step, (int64_t)1 << 32);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, step, -1);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, token_first, -1);
    BAD_FORWARD(MOE_ERROR_INVALID_ARGUMENT, token_first, ((int64_t)1 << 32) - 3);
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "4294967293"));
    end(&r, &c);
}
END_TEST

#define BAD_BACKWARD(status, field, value)                                                         \
    do {                                                                                           \
        moe_backward_args good = r.b;                                                              \
        memset(r.dx, 0x5a, (size_t)(c.T * c.D) * 4);                                               \
        r.b.field = value;                                                                         \
        REFUSED(status, layer_run_backward(&r));                                                   \
        for (int64_t i = 0; i < c.T * c.D * 4; i++) ck_assert_int_eq(((unsigned char *)r.dx)[i], 0x5a); \
        r.b = good;                                                                                \
    } while (0)

START_TEST(test_layer_backward_refuses_bad_arguments)
{
    layer_case c = base;
    layer_run r;
    begin(&r, &c, MOE_DTYPE_F32);
    REFUSED(MOE_ERROR_INVALID_STATE, layer_run_backward(&r)); /* no forward yet */
    OK(layer_run_forward(&r));
    BAD_BACKWARD(MOE_ERROR_INVALID_ARGUMENT, flags, 1u << 9);
    BAD_BACKWARD(MOE_ERROR_INVALID_ARGUMENT, dy, NULL);
    BAD_BACKWARD(MOE_ERROR_INVALID_ARGUMENT, dy, r.dx);
    BAD_BACKWARD(MOE_ERROR_INVALID_ARGUMENT, dx_stride, 5);
    BAD_BACKWARD(MOE_ERROR_INVALID_ARGUMENT, dy_stride, -1);
    BAD_BACKWARD(MOE_ERROR_INVALID_ARGUMENT, d_logits_stride, 4);
    BAD_BACKWARD(MOE_ERROR_INVALID_ARGUMENT, stream, r.x);
    BAD_BACKWARD(MOE_ERROR_STRUCT_SIZE, struct_size, 7);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_backward(r.layer, r.pass, NULL));
    OK(layer_run_backward(&r));
    r.f.flags = MOE_FORWARD_NO_SAVE;
    OK(layer_run_forward(&r));
    REFUSED(MOE_ERROR_INVALID_STATE, layer_run_backward(&r));
    r.f.flags = MOE_FORWARD_PLAN_ONLY;
    OK(layer_run_forward(&r));
    REFUSED(MOE_ERROR_INVALID_STATE, layer_run_backward(&r));
    end(&r, &c);
}
END_TEST

START_TEST(test_pass_of_another_object_is_refused)
{
    layer_case c = base;
    layer_run r, other;
    moe_pass *of_gate = NULL;
    begin(&r, &c, MOE_DTYPE_F32);
    layer_run_make(&other, &c, MOE_DTYPE_F32, NULL);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_forward(r.layer, other.pass, &r.f));
    OK(moe_pass_create_for_gate(&of_gate, r.gate, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_forward(r.layer, of_gate, &r.f));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_forward(r.experts, of_gate, &r.f));
    moe_forward_args f = r.f;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_forward(r.gate, of_gate, &f)); /* y is not for a gate */
    f.y = NULL;
    OK(moe_gate_forward(r.gate, of_gate, &f));
    moe_pass_destroy(of_gate);
    layer_run_free(&other);
    end(&r, &c);
}
END_TEST

/* ---- flags ------------------------------------------------------------------------------------------------ */

START_TEST(test_layer_flags_add_overwrite_and_skip)
{
    layer_case c = base;
    layer_run r;
    int64_t count;
    begin(&r, &c, MOE_DTYPE_F64);
    double *y = malloc((size_t)(c.T * c.D) * 8), *dx = malloc((size_t)(c.T * c.D) * 8);
    OK(layer_run_forward(&r));
    OK(layer_run_backward(&r));
    memcpy(y, r.y, (size_t)(c.T * c.D) * 8);
    memcpy(dx, r.dx, (size_t)(c.T * c.D) * 8);
    double *once = layer_run_gradient(&r, "dW2", &count), *gate_once = layer_run_gradient(&r, "dWn", &count);
    r.f.flags |= MOE_FORWARD_ADD;
    OK(layer_run_forward(&r));
    r.b.flags = MOE_BACKWARD_ADD_DX; /* and gradients are added to by default */
    OK(layer_run_backward(&r));
    for (int64_t i = 0; i < c.T * c.D; i++) {
        ck_assert_double_eq(((double *)r.y)[i], 2 * y[i]);
        ck_assert_double_eq_tol(((double *)r.dx)[i], 2 * dx[i], 1e-14);
    }
    double *twice = layer_run_gradient(&r, "dW2", &count);
    for (int64_t i = 0; i < count; i++) ck_assert_double_eq(twice[i], 2 * once[i]);
    r.b.flags = MOE_BACKWARD_OVERWRITE | MOE_BACKWARD_SKIP_DX;
    memset(r.dx, 0x5a, (size_t)(c.T * c.D) * 8);
    OK(layer_run_backward(&r));
    ck_assert_int_eq(((unsigned char *)r.dx)[5], 0x5a);
    double *set = layer_run_gradient(&r, "dW2", &count), *gate_set = layer_run_gradient(&r, "dWn", &count);
    for (int64_t i = 0; i < count; i++) ck_assert_double_eq(gate_set[i], gate_once[i]);
    ck_assert_double_eq(set[3], once[3]);
    OK(moe_layer_zero_gradients(r.layer, NULL));
    r.b.flags = MOE_BACKWARD_SKIP_PARAMETERS;
    OK(layer_run_backward(&r));
    double *zero = layer_run_gradient(&r, "dW2", &count);
    for (int64_t i = 0; i < count; i++) ck_assert_double_eq(zero[i], 0);
    ck_assert_double_eq(((double *)r.dx)[7], dx[7]);
    free(y), free(dx), free(once), free(gate_once), free(twice), free(set), free(gate_set), free(zero);
    end(&r, &c);
}
END_TEST

START_TEST(test_layer_recompute_is_the_plain_step_and_counts_losses_once)
{
    layer_case c = base;
    layer_run r;
    double losses_out[MOE_LOSS_SLOTS], stats_out[MOE_STAT_SLOTS], untouched[MOE_LOSS_SLOTS] = {-7};
    begin(&r, &c, MOE_DTYPE_F64);
    r.f.losses_out = losses_out;
    r.f.stats_out = stats_out;
    OK(layer_run_forward(&r));
    OK(layer_run_backward(&r));
    uint64_t plain = layer_run_hash(&r);
    int64_t bytes = moe_pass_bytes(r.pass);
    moe_pass_destroy(r.pass);
    r.pass = NULL;
    OK(moe_pass_create(&r.pass, r.layer, NULL));
    OK(moe_layer_zero_gradients(r.layer, NULL));
    REFUSED(MOE_ERROR_INVALID_STATE, (r.f.flags |= MOE_FORWARD_RECOMPUTE, layer_run_forward(&r)));
    r.f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_PLAN_ONLY;
    OK(layer_run_forward(&r));
    ck_assert_int_lt(moe_pass_bytes(r.pass), bytes);
    r.f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_RECOMPUTE;
    r.f.losses_out = untouched;
    r.f.y = NULL;
    OK(layer_run_forward(&r));
    ck_assert_double_eq(untouched[0], -7);
    OK(layer_run_backward(&r));
    ck_assert_uint_eq(layer_run_hash(&r), plain);
    moe_losses losses;
    OK(moe_losses_init(&losses, sizeof losses));
    OK(moe_pass_losses(r.pass, &losses));
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) ck_assert_double_eq(losses.value[i], losses_out[i]);
    ck_assert_double_eq(stats_out[MOE_STAT_TOKENS], 12);
    end(&r, &c);
}
END_TEST

START_TEST(test_layer_replays_plans)
{
    layer_case c = base;
    layer_run r, again;
    const moe_plan *routed;
    moe_plan *plan = NULL;
    begin(&r, &c, MOE_DTYPE_F64);
    layer_run_make(&again, &c, MOE_DTYPE_F64, NULL);
    OK(layer_run_forward(&r));
    OK(layer_run_backward(&r));
    OK(moe_pass_plan(r.pass, &routed));
    OK(moe_plan_create(&plan, again.context));
    OK(moe_plan_copy(plan, routed));
    again.f.plan = plan;
    again.f.plan_use = MOE_PLAN_IDS; /* everything anew but the selection */
    OK(layer_run_forward(&again));
    OK(layer_run_backward(&again));
    ck_assert_uint_eq(layer_run_hash(&again), layer_run_hash(&r));
    again.f.plan_use = MOE_PLAN_IDS_AND_WEIGHTS; /* the gate does not run */
    OK(layer_run_forward(&again));
    ck_assert_mem_eq(again.y, r.y, (size_t)(c.T * c.D) * 8);
    moe_losses losses;
    OK(moe_losses_init(&losses, sizeof losses));
    OK(moe_pass_losses(again.pass, &losses));
    ck_assert_double_eq(losses.total, 0);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_backward(&again)); /* d_logits_out without logits */
    again.b.d_logits_out = NULL;
    OK(layer_run_backward(&again));
    ck_assert_mem_eq(again.entry_grad, r.entry_grad, (size_t)(c.T * c.K) * 8);
    again.f.tokens = 11;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_forward(&again));
    again.f.tokens = 12;
    again.f.top_k = 2;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_forward(&again));
    again.f.top_k = MOE_FROM_CONFIG;
    uint8_t mask[12] = {0};
    again.f.token_mask = mask; /* masks tokens that have rows */
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_forward(&again));
    moe_plan_destroy(plan);
    layer_run_free(&again);
    end(&r, &c);
}
END_TEST

START_TEST(test_layer_takes_k_capacity_and_weights_of_a_call)
{
    layer_case c = base, other = base;
    layer_run r, want;
    double weights[MOE_LOSS_SLOTS] = {0.3, 0, 0.2, 0, 0, 0};
    other.K = 3, other.capacity_kind = MOE_CAPACITY_NUMBER, other.capacity = 4;
    memset(other.weight, 0, sizeof other.weight);
    other.weight[0] = 0.3, other.weight[2] = 0.2;
    begin(&r, &c, MOE_DTYPE_F64);
    layer_case_make(&other, 9); /* the same contents */
    layer_run_make(&want, &other, MOE_DTYPE_F64, NULL);
    layer_run_set_parameters(&want, &c.p);
    want.f.x = r.x, want.f.noise = r.noise, want.b.dy = r.dy;
    OK(layer_run_forward(&want));
    OK(layer_run_backward(&want));
    r.f.top_k = 3, r.f.capacity = 4, r.f.loss_weights = weights;
    r.b.entry_weight_grad = NULL;
    OK(layer_run_forward(&r));
    OK(layer_run_backward(&r));
    ck_assert_uint_eq(layer_run_hash(&r), layer_run_hash(&want));
    end(&want, &other);
    end(&r, &c);
}
END_TEST

/* ---- odd routings ------------------------------------------------------------------------------------------ */

static void route_logits(const float *logits, int64_t T, int64_t E, int64_t K, int32_t order, int32_t *ids, float *w)
{
    moe_context *context = new_context();
    moe_gate_config g;
    moe_gate *gate = NULL;
    moe_pass *pass = NULL;
    moe_forward_args f;
    const moe_plan *plan;
    moe_plan_view v;
    OK(moe_gate_config_init(&g, sizeof g));
    g.num_experts = E, g.top_k = K, g.order = order;
    OK(moe_gate_create(&gate, context, &g));
    OK(moe_pass_create_for_gate(&pass, gate, NULL));
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.logits_in = logits;
    OK(moe_gate_forward(gate, pass, &f));
    OK(moe_pass_plan(pass, &plan));
    OK(moe_plan_check(plan));
    OK(moe_plan_view_init(&v, sizeof v));
    OK(moe_plan_get(plan, &v));
    memcpy(ids, v.expert_of_entry, (size_t)(T * K) * sizeof *ids);
    memcpy(w, v.weight_of_entry, (size_t)(T * K) * sizeof *w);
    moe_pass_destroy(pass), moe_gate_destroy(gate), moe_context_destroy(context);
}

START_TEST(test_gate_orders_nan_below_numbers_and_ties_by_index)
{
    const float n = NAN, inf = INFINITY;
    const float logits[6][4] = {{1, n, 2, 1}, {n, n, n, n}, {-inf, n, -inf, n}, {0, 0, 0, 0}, {-0.0f, 0, -1, 1}, {3, inf, 2, 1}};
    const int32_t want[6][3] = {{2, 0, 3}, {0, 1, 2}, {0, 2, 1}, {0, 1, 2}, {3, 0, 1}, {1, 0, 2}};
    int32_t ids[18];
    float w[18];
    for (int32_t order = 0; order < 2; order++) {
        route_logits(&logits[0][0], 6, 4, 3, order, ids, w);
        for (int t = 0; t < 6; t++)
            for (int k = 0; k < 3; k++) ck_assert_msg(ids[t * 3 + k] == want[t][k], "order %d token %d choice %d: %d", (int)order, t, k, (int)ids[t * 3 + k]);
        ck_assert_float_eq(w[9], order ? 0.25f : 1.0f / 3);
        ck_assert_msg(order ? isnan(w[0]) : !isnan(w[0]), "a NaN that was not chosen");
        ck_assert(isnan(w[3]));
    }
}
END_TEST

START_TEST(test_layer_keeps_a_nan_token_to_itself)
{
    layer_case c = base;
    layer_run r, clean;
    memset(c.weight, 0, sizeof c.weight);
    begin(&r, &c, MOE_DTYPE_F32);
    layer_run_make(&clean, &c, MOE_DTYPE_F32, NULL);
    ((float *)r.x)[3 * 6 + 2] = NAN;
    OK(layer_run_forward(&r));
    OK(layer_run_forward(&clean));
    for (int64_t i = 0; i < c.T * c.D; i++) {
        if (i / 6 == 3)
            ck_assert(isnan(((float *)r.y)[i]));
        else
            ck_assert_mem_eq((float *)r.y + i, (float *)clean.y + i, 4);
    }
    layer_run_free(&clean);
    end(&r, &c);
}
END_TEST

START_TEST(test_layer_without_gate_takes_none_and_twice)
{
    layer_case c = base;
    layer_run r;
    moe_layer *bare = NULL;
    moe_layer_config l;
    moe_pass *pass = NULL;
    moe_plan *plan = NULL;
    moe_plan_args a;
    int64_t ids[12 * 2];
    float weights[12 * 2], single[12 * 6];
    begin(&r, &c, MOE_DTYPE_F32);
    OK(moe_layer_config_init(&l, sizeof l));
    l.experts = r.experts;
    OK(moe_layer_create(&bare, &l));
    OK(moe_pass_create(&pass, bare, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_forward(bare, pass, &r.f)); /* who routes? */
    OK(moe_plan_create(&plan, r.context));
    OK(moe_plan_args_init(&a, sizeof a));
    a.tokens = 12, a.num_experts = 5, a.top_k = 2, a.expert_ids = ids, a.id_dtype = MOE_DTYPE_I64, a.weights = weights;
    for (int turn = 0; turn < 2; turn++) { /* once with weight 1, then twice with weight 1/2 */
        for (int n = 0; n < 24; n++) {
            ids[n] = n % 2 == 0 || turn == 1 ? n / 2 % 5 : -1;
            weights[n] = turn == 1 ? 0.5f : 1.0f;
            if (n / 2 == 7) ids[n] = -1; /* a token that goes nowhere */
        }
        OK(moe_plan_build(plan, &a));
        r.f.plan = plan, r.f.noise = NULL;
        OK(moe_layer_forward(bare, pass, &r.f));
        if (turn == 0) memcpy(single, r.y, sizeof single);
    }
    for (int i = 0; i < 12 * 6; i++) {
        ck_assert_float_eq_tol(((float *)r.y)[i], single[i], 1e-6f);
        if (i / 6 == 7) ck_assert_float_eq(single[i], 0);
    }
    ids[5] = 5;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_plan_build(plan, &a));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "token 2, entry 5: expert id 5"));
    moe_plan_destroy(plan), moe_pass_destroy(pass), moe_layer_destroy(bare);
    end(&r, &c);
}
END_TEST

/* ---- statistics, references ----------------------------------------------------------------------------------- */

START_TEST(test_pass_statistics_and_touched_experts)
{
    layer_case c = {.name = "stats", .T = 10, .D = 6, .E = 5, .F = 7, .K = 1, .capacity_kind = MOE_CAPACITY_NUMBER,
                    .capacity = 4, .logits_in = 1};
    layer_run r;
    moe_stats stats;
    uint8_t touched[5];
    int64_t count;
    begin(&r, &c, MOE_DTYPE_F32);
    for (int i = 0; i < 50; i++) ((float *)r.logits_in)[i] = i / 5 < 7 ? (i % 5 == 2 ? 5.0f : 0.0f) : (i % 5 == 4 ? 5.0f : 0.0f);
    OK(moe_stats_init(&stats, sizeof stats));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_pass_stats(r.pass, &stats));
    OK(layer_run_forward(&r));
    OK(moe_pass_stats(r.pass, &stats)); /* 7 tokens to expert 2, 3 to expert 4; 4 rows at most */
    ck_assert_double_eq(stats.value[MOE_STAT_TOKENS], 10);
    ck_assert_double_eq(stats.value[MOE_STAT_ENTRIES], 10);
    ck_assert_double_eq(stats.value[MOE_STAT_ROWS], 7);
    ck_assert_double_eq(stats.value[MOE_STAT_DROPPED], 3);
    ck_assert_double_eq(stats.value[MOE_STAT_TOUCHED], 2);
    ck_assert_double_eq_tol(stats.value[MOE_STAT_MAX_OVER_MEAN], 3.5, 1e-12);
    ck_assert_double_eq_tol(stats.value[MOE_STAT_CV_LOAD], sqrt((4 + 25 + 4 + 1 + 4) / 5.0) / 2, 1e-9);
    ck_assert_double_eq_tol(stats.value[MOE_STAT_LOAD_ENTROPY], -0.7 * log(0.7) - 0.3 * log(0.3), 1e-12);
    ck_assert_double_eq(stats.value[MOE_STAT_GATE_ENTROPY], 0);
    OK(moe_experts_touched(r.experts, touched, &count));
    ck_assert_int_eq(count, 0);
    OK(layer_run_backward(&r));
    OK(moe_experts_touched(r.experts, touched, &count));
    ck_assert_int_eq(count, 2);
    ck_assert(touched[2] && touched[4] && !touched[0]);
    OK(moe_experts_zero_gradients(r.experts, NULL));
    OK(moe_experts_touched(r.experts, touched, NULL));
    ck_assert(!touched[2]);
    end(&r, &c);
}
END_TEST

/* Handles may be destroyed in any order; what is still used lives on. */
START_TEST(test_objects_live_as_long_as_they_are_used)
{
    layer_case c = base;
    layer_run r;
    begin(&r, &c, MOE_DTYPE_F32);
    moe_context_destroy(r.context), moe_gate_destroy(r.gate), moe_experts_destroy(r.experts);
    OK(layer_run_forward(&r));
    OK(layer_run_backward(&r));
    moe_layer *layer = r.layer;
    moe_layer_destroy(layer); /* the pass still holds it */
    OK(moe_layer_forward(layer, r.pass, &r.f));
    r.context = NULL, r.gate = NULL, r.experts = NULL, r.layer = NULL;
    end(&r, &c);
}
END_TEST

START_TEST(test_gate_noise_is_the_documented_philox)
{
    static const uint32_t golden[4] = {0xbfd73394, 0xbea43738, 0xbf0f51ee, 0x3f27d2e1};
    float four[4], three[4];
    moe_context *context = new_context();
    moe_gate_config g;
    moe_gate *gate = NULL;
    moe_pass *pass = NULL;
    moe_forward_args f;
    moe_tensor_view noisy, std, clean;
    float x[2] = {0, 0};
    OK(moe_noise4(four, 42, 0, 0, 0, 0, 0));
    ck_assert_mem_eq(four, golden, sizeof golden);
    OK(moe_gate_config_init(&g, sizeof g));
    g.kind = MOE_GATE_NOISY_TOP_K, g.d_model = 1, g.num_experts = 6, g.seed = 42, g.stream_id = 3;
    OK(moe_gate_create(&gate, context, &g));
    OK(moe_pass_create_for_gate(&pass, gate, NULL));
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = 2, f.x = x, f.step = 8, f.token_first = 100, f.flags = MOE_FORWARD_TRAIN;
    OK(moe_gate_forward(gate, pass, &f));
    OK(moe_tensor_view_init(&noisy, sizeof noisy));
    OK(moe_tensor_view_init(&std, sizeof std));
    OK(moe_tensor_view_init(&clean, sizeof clean));
    OK(moe_pass_tensor(pass, MOE_TENSOR_NOISY_LOGITS, &noisy));
    OK(moe_pass_tensor(pass, MOE_TENSOR_NOISE_STD, &std));
    OK(moe_noise4(three, 42, 0, 3, 8, 101, 1));
    ck_assert_float_eq(((const float *)std.data)[0], logf(2) + 0.01f);
    ck_assert_float_eq(((const float *)noisy.data)[6 + 5], three[1] * ((const float *)std.data)[6 + 5]);
    moe_pass_destroy(pass), moe_gate_destroy(gate), moe_context_destroy(context);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("gate, experts, layer, pass");
    TCase *tests = tcase_create("sentences");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, test_api_refuses_null_handles);
    tcase_add_test(tests, test_gate_create_refuses_bad_configs);
    tcase_add_test(tests, test_experts_create_refuses_bad_configs);
    tcase_add_test(tests, test_layer_create_refuses_what_does_not_fit);
    tcase_add_test(tests, test_layer_forward_refuses_bad_arguments);
    tcase_add_test(tests, test_layer_backward_refuses_bad_arguments);
    tcase_add_test(tests, test_pass_of_another_object_is_refused);
    tcase_add_test(tests, test_layer_flags_add_overwrite_and_skip);
    tcase_add_test(tests, test_layer_recompute_is_the_plain_step_and_counts_losses_once);
    tcase_add_test(tests, test_layer_replays_plans);
    tcase_add_test(tests, test_layer_takes_k_capacity_and_weights_of_a_call);
    tcase_add_test(tests, test_gate_orders_nan_below_numbers_and_ties_by_index);
    tcase_add_test(tests, test_layer_keeps_a_nan_token_to_itself);
    tcase_add_test(tests, test_layer_without_gate_takes_none_and_twice);
    tcase_add_test(tests, test_pass_statistics_and_touched_experts);
    tcase_add_test(tests, test_objects_live_as_long_as_they_are_used);
    tcase_add_test(tests, test_gate_noise_is_the_documented_philox);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
