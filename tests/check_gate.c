/* check_gate.c - the sentences of gate.h: what its calls refuse and leave alone, odd logits and odd
 * plans, the numbers of the noise, CV^2. Values and gradients are check_layer's and
 * check_gradients'. */
#include "support/bad_fields.h"
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const layer_case base = {.name = "gate",
                                .T = 12,
                                .D = 6,
                                .E = 5,
                                .F = 1,
                                .K = 2,
                                .kind = MOE_GATE_NOISY_TOP_K,
                                .router_bias = 1,
                                .no_experts = 1,
                                .weight = {0.1, 0.1, 0.1, 0.1, 0.01, 0.1}};

/* ---- creation -------------------------------------------------------------------------------- */

#define I(field, value) BAD_INTEGER(moe_gate_config, field, value, INVALID_ARGUMENT)
#define R(field, value) BAD_DOUBLE(moe_gate_config, field, value, INVALID_ARGUMENT)
static const bad_field bad_configs[] = {
    BAD_INTEGER(moe_gate_config, struct_size, 0, STRUCT_SIZE),
    BAD_INTEGER(moe_gate_config, struct_size, 16, STRUCT_TOO_OLD),
    I(num_experts, 0),
    I(num_experts, -1),
    I(num_experts, (int64_t)1 << 31),
    I(d_model, -1),
    I(top_k, 0),
    I(top_k, 5),
    I(top_k, -1),
    I(kind, -1),
    I(kind, 8),
    I(kind, MOE_GATE_BALANCED) /* clashes with capacity_kind none, as the next */,
    I(kind, MOE_GATE_EXPERT_CHOICE),
    I(score, 2),
    I(score, -1),
    I(order, 2),
    I(order, -1),
    I(renormalize, 2),
    I(renormalize, 1) /* clashes with the default order */,
    R(renormalize_epsilon, -1),
    R(renormalize_epsilon, NAN),
    R(route_scale, NAN),
    R(route_scale, INFINITY),
    I(bias, 2),
    I(bias, -1),
    I(selection_bias, 2),
    I(expert_groups, 3) /* does not divide E */,
    I(expert_groups, 0),
    I(expert_groups, 5),
    I(top_groups, 2),
    I(top_groups, 0),
    I(group_score, 5),
    I(group_score, -1),
    I(dtype, 99),
    I(dtype, -1),
    I(dtype, MOE_DTYPE_I32),
    I(dtype, MOE_DTYPE_F16 + 1),
    R(noise_epsilon, -1),
    R(noise_epsilon, NAN),
    R(cdf_guard, INFINITY),
    R(cdf_guard, -1e-3),
    R(jitter, 1),
    R(jitter, -0.5),
    R(jitter, NAN),
    I(stream_id, 256),
    I(stream_id, -1),
    I(cv_ddof, 2),
    I(cv_ddof, -1),
    R(importance_weight, NAN),
    R(load_weight, 0.1) /* only a noisy gate has a load */,
    R(load_weight, NAN),
    R(switch_weight, INFINITY),
    R(gshard_weight, NAN),
    R(z_weight, -INFINITY),
    R(sequence_weight, NAN),
    I(sequence_score, 2),
    I(sequence_score, -1),
    I(sequence_counts, 2),
    I(sequence_counts, -1),
    I(capacity_kind, 3),
    I(capacity_kind, -1),
    I(capacity_rounding, 5),
    I(capacity_rounding, -1),
    I(capacity, -1),
    R(capacity_factor, -0.5),
    R(capacity_factor, INFINITY),
    I(capacity_minimum, -1),
    I(drop_policy, 5),
    I(drop_policy, -1),
    I(renormalize_after_drop, 2),
    I(parameters, 3),
    I(parameters, -1),
    I(reserved, 1),
    R(init_std, -2),
    R(init_std, NAN),
    R(threshold_weight, 0.1) /* only a balanced gate has thresholds */,
    R(threshold_weight, NAN),
    R(renormalize_minimum, -1),
    R(capacity_factor_eval, INFINITY),
    I(capacity_multiple, -1),
    R(second_threshold, NAN),
    R(sinkhorn_tolerance, -1e-9),
    I(sinkhorn_iterations, -1),
    I(choice_noise, 3),
    I(choice_noise, -1),
    I(second_choice, 4),
    I(second_choice, -1),
    I(loss_scope, 2),
    I(loss_scope, -1)};
/* Of a noisy gate, which has no score to choose, needs weights, and chooses by noise already. */
static const bad_field bad_noisy[] = {
    I(score, MOE_SCORE_SIGMOID), I(order, 1),        I(renormalize, 1),  I(d_model, 0),
    I(selection_bias, 1),        I(choice_noise, 1), I(expert_groups, 2)};
/* Of a hierarchical gate, which has no logits of all experts. */
static const bad_field bad_two_levels[] = {
    I(bias, 1),          I(selection_bias, 1),
    I(group_score, 1),   I(drop_policy, MOE_DROP_BATCH_PRIORITY),
    I(d_model, 0),       I(top_k, 3) /* a group has two */,
    R(switch_weight, 1), R(gshard_weight, 1),
    R(z_weight, 1),      R(sequence_weight, 1)};
/* Of gates whose experts take tokens: nothing is dropped, and a token has no choices. */
static const bad_field bad_by_expert[] = {
    I(drop_policy, MOE_DROP_CHOICE), I(second_choice, MOE_SECOND_CHOICE_NONE),
    I(renormalize_after_drop, 1), I(capacity_kind, MOE_CAPACITY_NONE), R(load_weight, 0.1)};
#undef I
#undef R

static void refuse_configs(const bad_field *bad, size_t count, const moe_gate_config *good)
{
    moe_context *context = new_context();
    for (size_t i = 0; i < count; i++) {
        moe_gate_config config = *good;
        moe_gate *untouched = (moe_gate *)(uintptr_t)16, *gate = untouched;
        bad_field_put(&bad[i], &config);
        const char *complaint = bad_field_complaint(&bad[i],
                                                    moe_gate_create(&gate, context, &config));
        ck_assert_msg(complaint[0] == 0, "moe_gate_create: %s", complaint);
        ck_assert_ptr_eq(gate, untouched);
    }
    moe_context_destroy(context);
}

START_TEST(test_gate_create_refuses_bad_fields)
{
    moe_gate_config good;
    MUST(moe_gate_config_init(&good, sizeof good));
    good.d_model = 8, good.num_experts = 4, good.top_k = 2;
    refuse_configs(bad_configs, COUNT(bad_configs), &good);
    good.kind = MOE_GATE_NOISY_TOP_K;
    refuse_configs(bad_noisy, COUNT(bad_noisy), &good);
    good.kind = MOE_GATE_HIERARCHICAL, good.expert_groups = 2;
    refuse_configs(bad_two_levels, COUNT(bad_two_levels), &good);
    good.kind = MOE_GATE_BALANCED, good.expert_groups = 1;
    good.capacity_kind = MOE_CAPACITY_NUMBER;
    refuse_configs(bad_by_expert, COUNT(bad_by_expert), &good);
    good.kind = MOE_GATE_EXPERT_CHOICE;
    refuse_configs(bad_by_expert, COUNT(bad_by_expert), &good);
}
END_TEST

START_TEST(test_gate_calls_refuse_null)
{
    layer_case c = base;
    layer_run r;
    moe_gate *gate = NULL;
    moe_pass *pass = NULL;
    moe_gate_config g;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(moe_gate_config_init(&g, sizeof g));
    g.num_experts = 3;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_create(NULL, r.context, &g));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_create(&gate, NULL, &g));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_create(&gate, r.context, NULL));
    ck_assert_ptr_null(gate);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_get_config(NULL, &g));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_get_config(r.gate, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_forward(NULL, r.pass, &r.f));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_forward(r.gate, NULL, &r.f));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_forward(r.gate, r.pass, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_backward(NULL, r.pass, &r.b));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_backward(r.gate, NULL, &r.b));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_backward(r.gate, r.pass, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_pass_create_for_gate(NULL, r.gate, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_pass_create_for_gate(&pass, NULL, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_zero_gradients(NULL, NULL));
    if (!ON_DEVICE) /* which takes any stream */
        REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_zero_gradients(r.gate, r.x));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_init_parameters(NULL, 1));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_bind(NULL, 0, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_config_init(NULL, sizeof g));
    ck_assert_int_eq(moe_gate_parameter_count(NULL), 0);
    ck_assert_int_eq(moe_gate_parameter_find(NULL, "weight"), -1);
    ck_assert_int_eq(moe_gate_parameter_find(r.gate, NULL), -1);
    ck_assert_int_eq(moe_gate_parameter_find(r.gate, "w1"), -1);
    moe_gate_destroy(NULL);
    layer_run_end(&r, &c);
}
END_TEST

START_TEST(test_gate_get_config_gives_what_was_set)
{
    layer_case c = base;
    layer_run r;
    moe_gate_config g;
    layer_run_begin(&r, &c, MOE_DTYPE_F64);
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_gate_get_config(r.gate, &g));
    ck_assert_int_eq(g.num_experts, 5);
    ck_assert_int_eq(g.kind, MOE_GATE_NOISY_TOP_K);
    ck_assert_int_eq(g.dtype, REAL);
    ck_assert_int_eq((int64_t)g.seed, CASE_SEED);
    ck_assert_double_eq(g.z_weight, 0.01);
    ck_assert_int_eq((int64_t)g.struct_size, (int64_t)sizeof g);
    ck_assert_double_eq(moe_init_default(), g.init_std);
    layer_run_end(&r, &c);
}
END_TEST

/* ---- arguments ------------------------------------------------------------------------------- */

/* Everything a forward or backward of a gate may write, as one number. */
static uint64_t outputs(const layer_run *r)
{
    moe_losses losses;
    uint64_t hash = layer_run_hash(r);
    MUST(moe_losses_init(&losses, sizeof losses));
    MUST(moe_pass_losses(r->pass, &losses));
    for (size_t i = 0; i < sizeof losses; i++)
        hash = (hash ^ ((const unsigned char *)&losses)[i]) * 0x100000001b3u;
    return hash;
}

#define I(field, value) BAD_INTEGER(moe_forward_args, field, value, INVALID_ARGUMENT)
#define P(field, value, status) BAD_POINTER(moe_forward_args, field, value, status)
static int64_t some_key[12];
static const int64_t groups_down[3] = {0, 13, 12}, groups_short[3] = {0, 5, 11},
                     groups_late[3] = {1, 5, 12};
static const bad_field bad_forwards[] = {
    BAD_INTEGER(moe_forward_args, struct_size, 7, STRUCT_SIZE),
    BAD_INTEGER(moe_forward_args, struct_size, 64, STRUCT_TOO_OLD),
    I(flags, 1 << 20),
    I(flags, MOE_FORWARD_NO_SAVE | MOE_FORWARD_PLAN_ONLY),
    I(flags, MOE_FORWARD_RECOMPUTE | MOE_FORWARD_ADD),
    I(flags, MOE_FORWARD_RECOMPUTE | MOE_FORWARD_NO_SAVE),
    I(flags, MOE_FORWARD_RECOMPUTE | MOE_FORWARD_PLAN_ONLY),
    I(tokens, -1),
    I(x_stride, 5),
    I(x_stride, -6),
    P(x, NULL, INVALID_ARGUMENT),
    I(noise_stride, 4),
    I(noise_stride, -1),
    I(groups, -1),
    I(groups, 2),
    I(top_k, 0),
    I(top_k, 6),
    I(top_k, -2),
    I(capacity, -2),
    I(reserved, 1),
    I(plan_use, 2),
    I(plan_use, -1),
#ifndef MOE_TEST_DEVICE /* which takes any stream */
    P(stream, some_key, INVALID_ARGUMENT),
#endif
    P(token_key, some_key, INVALID_ARGUMENT),
    P(noise_primary, some_key, INVALID_ARGUMENT)};
static const bad_field bad_grouped[] = {
    P(group_begin, groups_down, INVALID_ARGUMENT), P(group_begin, groups_short, INVALID_ARGUMENT),
    P(group_begin, groups_late, INVALID_ARGUMENT), P(group_begin, NULL, INVALID_ARGUMENT)};
static const bad_field bad_noises[] = {I(step, (int64_t)1 << 32), I(step, -1), I(token_first, -1),
                                       I(token_first, ((int64_t)1 << 32) - 3)};
#undef I
#undef P

static void refuse_forwards(layer_run *r, const bad_field *bad, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        moe_forward_args good = r->f;
        uint64_t before = outputs(r);
        bad_field_put(&bad[i], &r->f);
        const char *complaint = bad_field_complaint(&bad[i], layer_run_forward(r));
        ck_assert_msg(complaint[0] == 0, "moe_gate_forward: %s", complaint);
        ck_assert_msg(outputs(r) == before, "%s: something was written", bad[i].name);
        r->f = good;
        MUST(moe_gate_zero_gradients(r->gate, NULL));
        MUST(layer_run_backward(r)); /* the forward before still stands */
        ck_assert_msg(outputs(r) == before, "%s: the pass is not as it was", bad[i].name);
    }
}

START_TEST(test_gate_forward_refuses_bad_fields)
{
    static const int64_t groups[3] = {0, 5, 12};
    layer_case c = base;
    layer_run r;
    double weights[MOE_LOSS_SLOTS] = {0};
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    refuse_forwards(&r, bad_forwards, COUNT(bad_forwards));
    weights[MOE_LOSS_THRESHOLD] = 1;
    const bad_field loss = BAD_POINTER(moe_forward_args, loss_weights, weights, INVALID_ARGUMENT);
    const bad_field y = BAD_POINTER(moe_forward_args, y, r.y, INVALID_ARGUMENT);
    refuse_forwards(&r, &loss, 1);
    weights[MOE_LOSS_THRESHOLD] = 0, weights[MOE_LOSS_Z] = NAN;
    refuse_forwards(&r, &loss, 1);
    weights[MOE_LOSS_Z] = -INFINITY;
    refuse_forwards(&r, &loss, 1);
    refuse_forwards(&r, &y, 1);
    r.f.noise = NULL;
    MUST(layer_run_forward(&r));
    MUST(moe_gate_zero_gradients(r.gate, NULL));
    MUST(layer_run_backward(&r));
    refuse_forwards(&r, bad_noises, COUNT(bad_noises));
    r.f.groups = 2, r.f.group_begin = groups;
    MUST(layer_run_forward(&r));
    MUST(moe_gate_zero_gradients(r.gate, NULL));
    MUST(layer_run_backward(&r));
    refuse_forwards(&r, bad_grouped, COUNT(bad_grouped));
    layer_run_end(&r, &c);
}
END_TEST

#define I(field, value) BAD_INTEGER(moe_backward_args, field, value, INVALID_ARGUMENT)
static const bad_field bad_backwards[] = {
    BAD_INTEGER(moe_backward_args, struct_size, 0, STRUCT_SIZE),
    BAD_INTEGER(moe_backward_args, struct_size, 32, STRUCT_TOO_OLD),
    I(flags, 1 << 9),
    I(dx_stride, 5),
    I(dx_stride, -1),
    I(d_logits_stride, 4),
    I(d_logits_stride, -5),
#ifndef MOE_TEST_DEVICE /* which takes any stream */
    BAD_POINTER(moe_backward_args, stream, some_key, INVALID_ARGUMENT),
#endif
    BAD_POINTER(moe_backward_args, dy, some_key, INVALID_ARGUMENT)};
#undef I

START_TEST(test_gate_backward_refuses_bad_fields)
{
    layer_case c = base;
    layer_run r;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    REFUSED(MOE_ERROR_INVALID_STATE, layer_run_backward(&r));
    MUST(layer_run_forward(&r));
    for (size_t i = 0; i < COUNT(bad_backwards); i++) {
        moe_backward_args good = r.b;
        uint64_t before = outputs(&r);
        bad_field_put(&bad_backwards[i], &r.b);
        const char *complaint = bad_field_complaint(&bad_backwards[i], layer_run_backward(&r));
        ck_assert_msg(complaint[0] == 0, "moe_gate_backward: %s", complaint);
        ck_assert_msg(outputs(&r) == before, "%s: something was written", bad_backwards[i].name);
        r.b = good;
    }
    MUST(layer_run_backward(&r));
    const uint64_t without[] = {MOE_FORWARD_NO_SAVE, MOE_FORWARD_PLAN_ONLY};
    for (int i = 0; i < 2; i++) {
        r.f.flags = without[i];
        MUST(layer_run_forward(&r));
        REFUSED(MOE_ERROR_INVALID_STATE, layer_run_backward(&r));
    }
    layer_run_end(&r, &c);
}
END_TEST

/* ---- CV^2 and noise -------------------------------------------------------------------------- */

START_TEST(test_gate_cv_squared_is_the_formula)
{
    const double v[4] = {1, 2, 3, 10}, mean = 4;
    for (int ddof = 0; ddof < 2; ddof++) {
        double want = 50.0 / (4 - ddof) / (mean * mean + 1e-10), got = -1, dv[4], moved, h = 1e-6;
        MUST(moe_cv_squared(&got, dv, v, 4, ddof, MOE_DTYPE_F64));
        ck_assert_double_eq_tol(got, want, 1e-14);
        for (int i = 0; i < 4; i++) {
            double side[4] = {v[0], v[1], v[2], v[3]}, low;
            side[i] += h;
            MUST(moe_cv_squared(&moved, NULL, side, 4, ddof, MOE_DTYPE_F64));
            side[i] -= 2 * h;
            MUST(moe_cv_squared(&low, NULL, side, 4, ddof, MOE_DTYPE_F64));
            ck_assert_double_eq_tol(dv[i], (moved - low) / (2 * h), 1e-8);
        }
    }
    const float narrow[2] = {1, 3};
    float d[2];
    double got = -1;
    MUST(moe_cv_squared(&got, d, narrow, 2, 0, MOE_DTYPE_F32));
    ck_assert_double_eq_tol(got, 0.25, 1e-10);
    MUST(moe_cv_squared(&got, NULL, narrow, 1, 1, MOE_DTYPE_F32));
    ck_assert_double_eq(got, 0);
    MUST(moe_cv_squared(&got, NULL, NULL, 0, 1, MOE_DTYPE_F32));
    ck_assert_double_eq(got, 0);
    MUST(moe_cv_squared(NULL, NULL, narrow, 2, 0, MOE_DTYPE_F32));
}
END_TEST

START_TEST(test_gate_cv_squared_and_noise4_refuse_and_write_nothing)
{
    const double v[2] = {1, 2};
    double cv = -7, dv[2] = {-7, -7};
    float four[4] = {-7, -7, -7, -7};
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_cv_squared(&cv, dv, NULL, 2, 0, MOE_DTYPE_F64));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_cv_squared(&cv, dv, v, -1, 0, MOE_DTYPE_F64));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "-1"));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_cv_squared(&cv, dv, v, 2, 2, MOE_DTYPE_F64));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_cv_squared(&cv, dv, v, 2, -1, MOE_DTYPE_F64));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_cv_squared(&cv, dv, v, 2, 0, 77));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "77"));
    REFUSED(MOE_ERROR_NOT_SUPPORTED, moe_cv_squared(&cv, dv, v, 2, 0, MOE_DTYPE_BF16));
    ck_assert(cv == -7 && dv[0] == -7 && dv[1] == -7);
    const int64_t limit = (int64_t)1 << 32;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_noise4(NULL, 1, 0, 0, 0, 0, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_noise4(four, 1, 65536, 0, 0, 0, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_noise4(four, 1, -1, 0, 0, 0, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_noise4(four, 1, 0, 256, 0, 0, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_noise4(four, 1, 0, 0, limit, 0, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_noise4(four, 1, 0, 0, 0, limit, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_noise4(four, 1, 0, 0, 0, -1, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_noise4(four, 1, 0, 0, 0, 0, limit));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "4294967296"));
    ck_assert(four[0] == -7 && four[3] == -7);
}
END_TEST

/* ---- odd logits and odd plans ---------------------------------------------------------------- */

static void route_logits(const float *logits, int64_t T, int64_t E, int64_t K, int32_t order,
                         int32_t *ids, float *w)
{
    moe_context *context = new_context();
    moe_gate_config g;
    moe_gate *gate = NULL;
    moe_pass *pass = NULL;
    moe_forward_args f;
    const moe_plan *plan;
    moe_plan_view v;
    MUST(moe_gate_config_init(&g, sizeof g));
    g.num_experts = E, g.top_k = K, g.order = order;
    MUST(moe_gate_create(&gate, context, &g));
    MUST(moe_pass_create_for_gate(&pass, gate, NULL));
    MUST(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.logits_in = logits;
    MUST(moe_gate_forward(gate, pass, &f));
    MUST(moe_pass_plan(pass, &plan));
    MUST(moe_plan_check(plan));
    MUST(moe_plan_view_init(&v, sizeof v));
    MUST(moe_plan_get(plan, &v));
    memcpy(ids, v.expert_of_entry, (size_t)(T * K) * sizeof *ids);
    memcpy(w, v.weight_of_entry, (size_t)(T * K) * sizeof *w);
    moe_pass_destroy(pass), moe_gate_destroy(gate), moe_context_destroy(context);
}

START_TEST(test_gate_orders_nan_below_numbers_and_ties_by_index)
{
    const float n = NAN, inf = INFINITY;
    const float logits[6][4] = {{1, n, 2, 1}, {n, n, n, n},      {-inf, n, -inf, n},
                                {0, 0, 0, 0}, {-0.0f, 0, -1, 1}, {3, inf, 2, 1}};
    const int32_t want[6][3] = {{2, 0, 3}, {0, 1, 2}, {0, 2, 1}, {0, 1, 2}, {3, 0, 1}, {1, 0, 2}};
    int32_t ids[18];
    float w[18];
    for (int32_t order = 0; order < 2; order++) {
        route_logits(&logits[0][0], 6, 4, 3, order, ids, w);
        for (int t = 0; t < 6; t++)
            for (int k = 0; k < 3; k++)
                ck_assert_msg(ids[t * 3 + k] == want[t][k], "order %d token %d choice %d: %d",
                              (int)order, t, k, (int)ids[t * 3 + k]);
        ck_assert_float_eq(w[9], order ? 0.25f : 1.0f / 3);
        ck_assert_msg(order ? isnan(w[0]) : !isnan(w[0]), "a NaN that was not chosen");
        ck_assert(isnan(w[3]));
    }
}
END_TEST

/* Tokens whose logits are NaN or infinite leave the weights and gradients of all others alone. */
START_TEST(test_gate_keeps_odd_logits_to_their_token)
{
    layer_case c = base;
    layer_run odd, plain;
    const moe_plan *plan[2];
    moe_plan_view v[2];
    c.kind = MOE_GATE_TOP_K, c.router_bias = 0, c.logits_in = 1, c.order = _i, c.T = 9;
    memset(c.weight, 0, sizeof c.weight);
    layer_run_begin(&odd, &c, MOE_DTYPE_F32);
    layer_run_make(&plain, &c, MOE_DTYPE_F32, NULL);
    float *logits = odd.logits_in;
    logits[3 * 5 + 1] = NAN;
    logits[5 * 5 + 2] = INFINITY;
    for (int e = 0; e < 5; e++) logits[7 * 5 + e] = -INFINITY;
    MUST(layer_run_forward(&odd));
    MUST(layer_run_backward(&odd));
    MUST(layer_run_forward(&plain));
    MUST(layer_run_backward(&plain));
    for (int i = 0; i < 2; i++) {
        MUST(moe_pass_plan(i ? plain.pass : odd.pass, &plan[i]));
        MUST(moe_plan_check(plan[i]));
        MUST(moe_plan_view_init(&v[i], sizeof v[i]));
        MUST(moe_plan_get(plan[i], &v[i]));
    }
    for (int t = 0; t < 9; t++) {
        if (t == 3 || t == 5 || t == 7) continue;
        ck_assert_mem_eq(v[0].expert_of_entry + t * 2, v[1].expert_of_entry + t * 2, 8);
        ck_assert_mem_eq((const float *)v[0].weight_of_entry + t * 2,
                         (const float *)v[1].weight_of_entry + t * 2, 8);
        ck_assert_mem_eq((float *)odd.d_logits + t * 5, (float *)plain.d_logits + t * 5, 20);
    }
    ck_assert_int_eq(v[0].expert_of_entry[10], 2); /* +inf is the largest */
    ck_assert_int_eq(v[0].expert_of_entry[14], 0); /* equals: the lower index */
    layer_run_free(&plain);
    layer_run_end(&odd, &c);
}
END_TEST

/* A token of a replayed plan that names no expert: weights and gradients of 0, nothing
 * undefined. */
START_TEST(test_gate_replay_of_a_token_without_experts_has_gradient_zero)
{
    static const int32_t ids[6] = {0, 1, -1, -1, 2, 0};
    layer_case c = base;
    layer_run r;
    moe_plan_args a;
    c.T = 3, c.kind = MOE_GATE_TOP_K, c.order = 1, c.score = _i, c.renormalize = 1;
    c.weight[MOE_LOSS_LOAD] = 0;
    if (_i == 2)
        c.kind = MOE_GATE_NOISY_TOP_K, c.order = c.score = c.renormalize = 0,
        c.weight[MOE_LOSS_LOAD] = 0.1;
    layer_run_begin(&r, &c, MOE_DTYPE_F64);
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = 3, a.num_experts = 5, a.top_k = 2, a.expert_ids = ids, a.dtype = REAL;
    MUST(moe_plan_create(&r.plan, r.context));
    MUST(moe_plan_build(r.plan, &a));
    r.f.plan = r.plan, r.f.plan_use = MOE_PLAN_IDS;
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    for (int i = 0; i < 15; i++)
        ck_assert_msg(isfinite(((scalar *)r.d_logits)[i]), "d_logits[%d] is %g", i,
                      (double)((scalar *)r.d_logits)[i]);
    layer_run_end(&r, &c);
}
END_TEST

/* MOE_SEQUENCE_COUNTS_SCORES counts plain scores, for a dense gate all experts, whatever is
 * replayed. */
START_TEST(test_gate_dense_replay_counts_plain_scores)
{
    static const int32_t ids[8] = {0, 0, 0, 0, 1, 1, -1, -1};
    layer_case c = base;
    layer_run r;
    moe_plan_args a;
    moe_losses plain, replayed;
    c.T = 2, c.E = 4, c.kind = MOE_GATE_SOFTMAX_DENSE;
    memset(c.weight, 0, sizeof c.weight);
    c.weight[MOE_LOSS_SEQUENCE] = 1;
    layer_run_begin(&r, &c, MOE_DTYPE_F64);
    MUST(moe_losses_init(&plain, sizeof plain));
    MUST(moe_losses_init(&replayed, sizeof replayed));
    MUST(layer_run_forward(&r));
    MUST(moe_pass_losses(r.pass, &plain));
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = 2, a.num_experts = 4, a.top_k = 4, a.expert_ids = ids, a.dtype = REAL;
    MUST(moe_plan_create(&r.plan, r.context));
    MUST(moe_plan_build(r.plan, &a));
    r.f.plan = r.plan, r.f.plan_use = MOE_PLAN_IDS;
    MUST(layer_run_forward(&r));
    MUST(moe_pass_losses(r.pass, &replayed));
    ck_assert_double_eq(replayed.value[MOE_LOSS_SEQUENCE], plain.value[MOE_LOSS_SEQUENCE]);
    layer_run_end(&r, &c);
}
END_TEST

/* A plan of a varying number of entries, replayed by its ids. */
START_TEST(test_gate_replays_plans_of_varying_k)
{
    static const int64_t token_begin[5] = {0, 1, 1, 4, 6};
    static const int64_t ids[6] = {4, 0, 1, 2, 3, 3};
    layer_case c = base;
    layer_run r;
    moe_plan_args a;
    moe_plan_view v;
    const moe_plan *plan;
    c.T = 4;
    layer_run_begin(&r, &c, MOE_DTYPE_F64);
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = 4, a.num_experts = 5, a.token_begin = token_begin, a.expert_ids = ids,
    a.id_dtype = MOE_DTYPE_I64;
    a.dtype = REAL;
    MUST(moe_plan_create(&r.plan, r.context));
    MUST(moe_plan_build(r.plan, &a));
    r.f.plan = r.plan, r.f.plan_use = MOE_PLAN_IDS;
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    MUST(moe_pass_plan(r.pass, &plan));
    MUST(moe_plan_check(plan));
    MUST(moe_plan_view_init(&v, sizeof v));
    MUST(moe_plan_get(plan, &v));
    const scalar *w = v.weight_of_entry;
    ck_assert_int_eq(v.entries, 6);
    ck_assert(w[0] == 1);
    ck_assert_double_eq_tol((double)w[1] + (double)w[2] + (double)w[3], 1, TOLERANCE(1e-14));
    ck_assert(w[4] == (scalar)0.5); /* the same expert twice */
    ck_assert(w[5] == (scalar)0.5);
    for (int i = 0; i < 20; i++) ck_assert(isfinite(((scalar *)r.d_logits)[i]));
    layer_run_end(&r, &c);
}
END_TEST

/* A gate without weights routes the host's logits, and goes back to them. */
START_TEST(test_gate_without_weights_takes_logits)
{
    moe_context *context = new_context();
    moe_gate *gate = NULL;
    moe_pass *pass = NULL;
    moe_gate_config g;
    moe_forward_args f;
    moe_backward_args b;
    const scalar logits[4] = {1, 2, 3, 3}, d[2] = {1, 0};
    scalar d_logits[4] = {9, 9, 9, 9};
    MUST(moe_gate_config_init(&g, sizeof g));
    g.num_experts = 4, g.top_k = 2, g.dtype = REAL;
    MUST(moe_gate_create(&gate, context, &g));
    ck_assert_int_eq(moe_gate_parameter_count(gate), 0);
    MUST(moe_pass_create_for_gate(&pass, gate, NULL));
    MUST(moe_forward_args_init(&f, sizeof f));
    MUST(moe_backward_args_init(&b, sizeof b));
    MUST(moe_gate_forward(gate, pass, &f)); /* T = 0 needs no pointers */
    MUST(moe_gate_backward(gate, pass, &b));
    f.tokens = 1;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_forward(gate, pass, &f));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "logits_in"));
    f.logits_in = logits;
    MUST(moe_gate_forward(gate, pass, &f));
    b.entry_weight_grad = (void *)(uintptr_t)d, b.d_logits_out = d_logits;
    MUST(moe_gate_backward(gate, pass, &b));
    ck_assert(d_logits[0] == 0);
    ck_assert_double_eq_tol((double)d_logits[2], 0.25, TOLERANCE(1e-15));
    ck_assert_double_eq_tol((double)d_logits[3], -0.25, TOLERANCE(1e-15));
    moe_pass_destroy(pass), moe_gate_destroy(gate), moe_context_destroy(context);
}
END_TEST

/* x that moved for one backward is not read by the next, which names none: it is where it was. */
START_TEST(test_gate_backward_forgets_where_x_moved)
{
    layer_case c = base;
    layer_run r;
    layer_run_begin(&r, &c, MOE_DTYPE_F64);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    uint64_t once = layer_run_hash(&r);
    size_t bytes = (size_t)(c.T * c.D) * number_bytes(r.dtype);
    void *copy = malloc(bytes);
    ck_assert_ptr_nonnull(copy);
    memcpy(copy, r.x, bytes);
    r.b.x = copy, r.b.flags = MOE_BACKWARD_OVERWRITE;
    MUST(layer_run_backward(&r));
    ck_assert_uint_eq(layer_run_hash(&r), once);
    memset(copy, 0xff, bytes); /* NaN */
    r.b.x = NULL;
    MUST(layer_run_backward(&r));
    ck_assert_uint_eq(layer_run_hash(&r), once);
    free(copy);
    layer_run_end(&r, &c);
}
END_TEST

/* Which tensors a pass shows after which forward. */
START_TEST(test_pass_tensor_shows_what_was_made)
{
    layer_case c = base;
    layer_run r;
    moe_tensor_view v;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(moe_tensor_view_init(&v, sizeof v));
    for (int32_t what = MOE_TENSOR_LOGITS; what <= MOE_TENSOR_ROWS; what++)
        REFUSED(MOE_ERROR_INVALID_STATE, moe_pass_tensor(r.pass, what, &v));
    MUST(layer_run_forward(&r));
    for (int32_t what = MOE_TENSOR_LOGITS; what <= MOE_TENSOR_ROWS; what++) {
        MUST(moe_pass_tensor(r.pass, what, &v));
        ck_assert_int_eq(v.dims, what <= MOE_TENSOR_NOISE_STD ? 2 : 1);
        ck_assert_int_eq(v.shape[0], what <= MOE_TENSOR_NOISE_STD ? 12 : 5);
        ck_assert_int_eq(v.shape[1], what <= MOE_TENSOR_NOISE_STD ? 5 : 1);
        ck_assert_int_eq(v.dtype, what <= MOE_TENSOR_NOISE_STD ? MOE_DTYPE_F32
                                  : what <= MOE_TENSOR_LOAD    ? MOE_DTYPE_F64
                                                               : MOE_DTYPE_I64);
    }
    REFUSED(MOE_ERROR_INVALID_STATE, moe_pass_tensor(r.pass, MOE_TENSOR_PRIMARY_LOAD, &v));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_pass_tensor(r.pass, 8, &v));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_pass_tensor(r.pass, -1, &v));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_pass_tensor(r.pass, 0, NULL));
    r.f.flags = 0;
    MUST(layer_run_forward(&r));
    MUST(moe_pass_tensor(r.pass, MOE_TENSOR_NOISY_LOGITS, &v));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_pass_tensor(r.pass, MOE_TENSOR_NOISE_STD, &v));
    r.f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_NO_SAVE;
    MUST(layer_run_forward(&r));
    for (int32_t what = MOE_TENSOR_LOGITS; what <= MOE_TENSOR_NOISE_STD; what++)
        REFUSED(MOE_ERROR_INVALID_STATE, moe_pass_tensor(r.pass, what, &v));
    MUST(moe_pass_tensor(r.pass, MOE_TENSOR_LOAD, &v));
    layer_run_end(&r, &c);
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
    MUST(moe_noise4(four, 42, 0, 0, 0, 0, 0));
    ck_assert_mem_eq(four, golden, sizeof golden);
    MUST(moe_gate_config_init(&g, sizeof g));
    g.kind = MOE_GATE_NOISY_TOP_K, g.d_model = 1, g.num_experts = 6, g.seed = 42, g.stream_id = 3;
    MUST(moe_gate_create(&gate, context, &g));
    MUST(moe_pass_create_for_gate(&pass, gate, NULL));
    MUST(moe_forward_args_init(&f, sizeof f));
    f.tokens = 2, f.x = x, f.step = 8, f.token_first = 100, f.flags = MOE_FORWARD_TRAIN;
    MUST(moe_gate_forward(gate, pass, &f));
    MUST(moe_tensor_view_init(&noisy, sizeof noisy));
    MUST(moe_tensor_view_init(&std, sizeof std));
    MUST(moe_tensor_view_init(&clean, sizeof clean));
    MUST(moe_pass_tensor(pass, MOE_TENSOR_NOISY_LOGITS, &noisy));
    MUST(moe_pass_tensor(pass, MOE_TENSOR_NOISE_STD, &std));
    MUST(moe_noise4(three, 42, 0, 3, 8, 101, 1));
    ck_assert_float_eq(((const float *)std.data)[0], logf(2) + 0.01f);
    ck_assert_float_eq(((const float *)noisy.data)[6 + 5],
                       three[1] * ((const float *)std.data)[6 + 5]);
    moe_pass_destroy(pass), moe_gate_destroy(gate), moe_context_destroy(context);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("gate");
    TCase *tests = tcase_create("sentences");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, test_gate_create_refuses_bad_fields);
    tcase_add_test(tests, test_gate_calls_refuse_null);
    tcase_add_test(tests, test_gate_get_config_gives_what_was_set);
    tcase_add_test(tests, test_gate_forward_refuses_bad_fields);
    tcase_add_test(tests, test_gate_backward_refuses_bad_fields);
    tcase_add_test(tests, test_gate_cv_squared_is_the_formula);
    tcase_add_test(tests, test_gate_cv_squared_and_noise4_refuse_and_write_nothing);
    tcase_add_test(tests, test_gate_orders_nan_below_numbers_and_ties_by_index);
    tcase_add_loop_test(tests, test_gate_keeps_odd_logits_to_their_token, 0, 2);
    tcase_add_loop_test(tests, test_gate_replay_of_a_token_without_experts_has_gradient_zero, 0, 3);
    tcase_add_test(tests, test_gate_dense_replay_counts_plain_scores);
    tcase_add_test(tests, test_gate_replays_plans_of_varying_k);
    tcase_add_test(tests, test_gate_without_weights_takes_logits);
    tcase_add_test(tests, test_gate_backward_forgets_where_x_moved);
    tcase_add_test(tests, test_pass_tensor_shows_what_was_made);
    tcase_add_test(tests, test_gate_noise_is_the_documented_philox);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
