/* check_layer.c - the layer, the gate alone and the pool alone against the reference: a table of
 * configurations and random ones (MOE_LONG=1: many more, MOE_FEW=1: few); and the sentences of
 * layer.h and pass.h. */
#include "support/bad_fields.h"
#include "support/layer_cases.h"
#include "support/layer_check.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- the reference --------------------------------------------------------------------------- */

START_TEST(test_layer_agrees_with_reference_in_f32)
{
    layer_case c = layer_cases[_i];
    layer_case_check(&c, (uint64_t)_i + 1, MOE_DTYPE_F32);
}
END_TEST

START_TEST(test_layer_agrees_with_reference_in_f64)
{
    layer_case c = layer_cases[_i];
    layer_case_check(&c, (uint64_t)_i + 1, MOE_DTYPE_F64);
}
END_TEST

START_TEST(test_layer_agrees_with_reference_for_random_configurations)
{
    const char *long_run = getenv("MOE_LONG"), *few = getenv("MOE_FEW");
    int count = long_run && long_run[0] == '1' ? 5000 : few ? 30 : 400;
    uint64_t state = 2026;
    for (int i = 0; i < count; i++) {
        layer_case c = layer_case_draw(&state);
        layer_case_check(&c, (uint64_t)i, i % 4 == 0 ? MOE_DTYPE_F32 : MOE_DTYPE_F64);
    }
}
END_TEST

#ifdef MOE_TEST_DEVICE
/* Rows of every expert as many as the host says, used or not. */
START_TEST(test_layer_agrees_with_reference_in_padded_rows)
{
    uint64_t state = 2027;
    for (int i = 0; i < 150; i++) {
        layer_case c = layer_case_draw(&state);
        if (c.no_experts || c.no_gate == 2) continue;
        c.padded_rows = (c.replay ? c.T * c.E : c.T) + 1; /* a plan may name an expert twice */
        layer_case_check(&c, (uint64_t)i, MOE_DTYPE_F32);
    }
}
END_TEST

static void same_numbers(const char *name, const double *a, const double *b, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        ck_assert_msg(fabs(a[i] - b[i]) <= 1e-5, "%s[%lld]: %g, not %g", name, (long long)i, a[i],
                      b[i]);
}

/* Rows for which there is no room have no output and no gradient, as those beyond a capacity. */
START_TEST(test_layer_leaves_out_rows_beyond_padded_rows)
{
    static const char *const gradients[] = {"dWg", "dW1", "db1", "dW2", "db2"};
    layer_case padded = {.T = 40, .D = 8, .E = 3, .F = 12, .K = 2, .expert_bias = 1}, dropped;
    layer_run r, want;
    padded.name = "padded", padded.masked = 1, padded.position = _i, padded.order = 1;
    dropped = padded;
    padded.padded_rows = dropped.capacity = 11;
    dropped.capacity_kind = MOE_CAPACITY_NUMBER;
    layer_run_begin(&r, &padded, MOE_DTYPE_F32);
    layer_run_begin(&want, &dropped, MOE_DTYPE_F32);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    MUST(layer_run_forward(&want));
    MUST(layer_run_backward(&want));
    moe_losses losses;
    MUST(moe_losses_init(&losses, sizeof losses));
    REFUSED(MOE_ERROR_BUFFER_TOO_SMALL, moe_pass_losses(r.pass, &losses));
    MUST(moe_pass_losses(want.pass, &losses));
    for (int64_t i = 0; i < padded.T * padded.D; i++) {
        double y[2] = {((float *)r.y)[i], ((float *)want.y)[i]};
        double dx[2] = {((float *)r.dx)[i], ((float *)want.dx)[i]};
        same_numbers("y", &y[0], &y[1], 1), same_numbers("dx", &dx[0], &dx[1], 1);
    }
    for (size_t i = 0; i < COUNT(gradients); i++) {
        int64_t count;
        double *a = layer_run_gradient(&r, gradients[i], &count);
        double *b = layer_run_gradient(&want, gradients[i], &count);
        same_numbers(gradients[i], a, b, count);
        free(a), free(b);
    }
    layer_run_end(&want, &dropped), layer_run_end(&r, &padded);
}
END_TEST
#endif

/* ---- what is refused ------------------------------------------------------------------------- */

static const layer_case base = {.name = "layer",
                                .T = 12,
                                .D = 6,
                                .E = 5,
                                .F = 7,
                                .K = 2,
                                .kind = MOE_GATE_NOISY_TOP_K,
                                .expert_bias = 1,
                                .weight = {0.1, 0.1, 0.1, 0.1, 0.01, 0.1}};

#ifndef MOE_TEST_DEVICE
static int some_number;
#endif
#define I(field, value) BAD_INTEGER(moe_forward_args, field, value, INVALID_ARGUMENT)
#define P(field, value) BAD_POINTER(moe_forward_args, field, value, INVALID_ARGUMENT)
static const bad_field bad_forwards[] = {
    BAD_INTEGER(moe_forward_args, struct_size, 0, STRUCT_SIZE),
    BAD_INTEGER(moe_forward_args, struct_size, 64, STRUCT_TOO_OLD),
    I(flags, 1 << 20),
    I(flags, MOE_FORWARD_NO_SAVE | MOE_FORWARD_PLAN_ONLY),
    I(tokens, -1),
    I(x_stride, 5),
    I(x_stride, -6),
    I(y_stride, 3),
    I(y_stride, -1),
    I(noise_stride, 4),
    I(groups, -1),
    I(groups, 2),
    I(top_k, 0),
    I(top_k, 6),
    I(capacity, -2),
    I(reserved, 1),
    I(plan_use, 2),
    P(x, NULL),
#ifndef MOE_TEST_DEVICE /* which takes any stream, and copies keys */
    P(stream, &some_number),
    P(token_key, &some_number),
#endif
    P(y, NULL)};
#undef I
#undef P
#define I(field, value) BAD_INTEGER(moe_backward_args, field, value, INVALID_ARGUMENT)
static const bad_field bad_backwards[] = {
    BAD_INTEGER(moe_backward_args, struct_size, 7, STRUCT_SIZE),
    I(flags, 1 << 9),
    I(dx_stride, 5),
    I(dy_stride, -1),
    I(dy_stride, 2),
    I(d_logits_stride, 4),
#ifndef MOE_TEST_DEVICE
    BAD_POINTER(moe_backward_args, stream, &some_number, INVALID_ARGUMENT),
#endif
    BAD_POINTER(moe_backward_args, dy, NULL, INVALID_ARGUMENT)};
#undef I

START_TEST(test_layer_forward_and_backward_refuse_bad_fields)
{
    layer_case c = base;
    layer_run r;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    REFUSED(MOE_ERROR_INVALID_STATE, layer_run_backward(&r)); /* no forward yet */
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    uint64_t before = layer_run_hash(&r);
    for (size_t i = 0; i < COUNT(bad_forwards); i++) {
        moe_forward_args good = r.f;
        bad_field_put(&bad_forwards[i], &r.f);
        const char *complaint = bad_field_complaint(&bad_forwards[i], layer_run_forward(&r));
        ck_assert_msg(complaint[0] == 0, "moe_layer_forward: %s", complaint);
        r.f = good;
        ck_assert_msg(layer_run_hash(&r) == before, "%s: something was written",
                      bad_forwards[i].name);
        MUST(moe_layer_zero_gradients(r.layer, NULL));
        MUST(layer_run_backward(&r));
        ck_assert_msg(layer_run_hash(&r) == before, "%s: the pass is not as it was",
                      bad_forwards[i].name);
    }
    for (size_t i = 0; i < COUNT(bad_backwards); i++) {
        moe_backward_args good = r.b;
        bad_field_put(&bad_backwards[i], &r.b);
        const char *complaint = bad_field_complaint(&bad_backwards[i], layer_run_backward(&r));
        ck_assert_msg(complaint[0] == 0, "moe_layer_backward: %s", complaint);
        ck_assert_msg(layer_run_hash(&r) == before, "%s: something was written",
                      bad_backwards[i].name);
        r.b = good;
    }
    r.f.y = r.x;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_forward(&r));
    r.b.dx = r.dy;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_backward(&r));
    layer_run_end(&r, &c);
}
END_TEST

START_TEST(test_layer_and_pass_calls_refuse_null)
{
    layer_case c = base;
    layer_run r;
    moe_losses losses;
    moe_stats stats;
    moe_layer_config l;
    const moe_plan *plan = NULL;
    moe_pass *pass = NULL;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(layer_run_forward(&r));
    MUST(moe_losses_init(&losses, sizeof losses));
    MUST(moe_stats_init(&stats, sizeof stats));
    MUST(moe_layer_config_init(&l, sizeof l));
    const moe_status got[] = {moe_layer_forward(NULL, r.pass, &r.f),
                              moe_layer_forward(r.layer, NULL, &r.f),
                              moe_layer_forward(r.layer, r.pass, NULL),
                              moe_layer_backward(NULL, r.pass, &r.b),
                              moe_layer_backward(r.layer, NULL, &r.b),
                              moe_layer_backward(r.layer, r.pass, NULL),
                              moe_layer_create(NULL, &l),
                              moe_layer_get_config(NULL, &l),
                              moe_layer_get_config(r.layer, NULL),
                              moe_pass_create(NULL, r.layer, NULL),
                              moe_pass_create(&pass, NULL, NULL),
                              moe_pass_reserve(NULL, 1, 1, 1),
                              moe_pass_reserve(r.pass, -1, 1, 1),
                              moe_pass_reserve(r.pass, 1, -1, 1),
                              moe_pass_reserve(r.pass, 1, 1, -2),
                              moe_pass_plan(NULL, &plan),
                              moe_pass_plan(r.pass, NULL),
                              moe_pass_losses(NULL, &losses),
                              moe_pass_losses(r.pass, NULL),
                              moe_pass_stats(NULL, &stats),
                              moe_pass_stats(r.pass, NULL),
                              moe_layer_zero_gradients(NULL, NULL),
#ifndef MOE_TEST_DEVICE
                              moe_layer_zero_gradients(r.layer, &c),
#endif
                              moe_layer_init_parameters(NULL, 1),
                              moe_layer_bind(NULL, 0, NULL),
                              moe_layer_bind(r.layer, 99, NULL),
                              moe_layer_bind(r.layer, -1, NULL),
                              moe_layer_parameter(r.layer, 0, NULL),
                              moe_forward_args_init(NULL, sizeof r.f),
                              moe_backward_args_init(NULL, sizeof r.b)};
    for (size_t i = 0; i < COUNT(got); i++)
        ck_assert_msg(got[i] == MOE_ERROR_INVALID_ARGUMENT, "call %zu gave %s", i,
                      moe_status_name(got[i]));
    ck_assert(!plan && !pass);
    ck_assert_int_eq(moe_pass_bytes(NULL), 0);
    ck_assert_int_eq(moe_layer_parameter_count(NULL), 0);
    ck_assert_int_eq(moe_layer_parameter_find(NULL, "gate.weight"), -1);
    ck_assert_int_ge(moe_layer_parameter_find(r.layer, "gate.noise_weight"), 0);
    ck_assert_int_ge(moe_layer_parameter_find(r.layer, "experts.w1"), 0);
    ck_assert_int_eq(moe_layer_parameter_find(r.layer, "w1"), -1);
    moe_layer_destroy(NULL), moe_pass_destroy(NULL);
    layer_run_end(&r, &c);
}
END_TEST

START_TEST(test_layer_create_refuses_what_does_not_fit)
{
    layer_case c = base;
    layer_run r;
    moe_layer *layer = NULL;
    moe_layer_config l;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    moe_context *other = new_context();
    moe_comm *comm = NULL;
    moe_gate_config g;
    moe_gate *gate = NULL;
    MUST(moe_layer_config_init(&l, sizeof l));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    l.experts = r.experts, l.gate = r.gate;
    l.shared = r.experts;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    l.shared = NULL, l.residual = r.experts;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    l.residual = NULL, l.layer_id = 65536;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    l.layer_id = 0, l.output = 7;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    l.output = 0;
    MUST(moe_comm_create_self(&comm, other));
    l.comm = comm;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    l.comm = NULL;
    MUST(moe_gate_config_init(&g, sizeof g));
    g.d_model = 6, g.num_experts = 4;
    MUST(moe_gate_create(&gate, r.context, &g));
    l.gate = gate;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "4 experts"));
    moe_gate_destroy(gate);
    g.num_experts = 5, g.dtype = ON_DEVICE ? MOE_DTYPE_F16 : MOE_DTYPE_F64;
    MUST(moe_gate_create(&gate, r.context, &g));
    l.gate = gate;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    moe_gate_destroy(gate);
    g.dtype = MOE_DTYPE_F32;
    MUST(moe_gate_create(&gate, other, &g));
    l.gate = gate;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    ck_assert_ptr_null(layer);
    moe_gate_destroy(gate), moe_comm_destroy(comm), moe_context_destroy(other);
    layer_run_end(&r, &c);
}
END_TEST

START_TEST(test_pass_of_another_object_is_refused)
{
    layer_case c = base;
    layer_run r, other;
    moe_pass *of_gate = NULL;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    layer_run_make(&other, &c, MOE_DTYPE_F32, NULL);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_forward(r.layer, other.pass, &r.f));
    MUST(moe_pass_create_for_gate(&of_gate, r.gate, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_forward(r.layer, of_gate, &r.f));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_forward(r.experts, of_gate, &r.f));
    moe_forward_args f = r.f;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT,
            moe_gate_forward(r.gate, of_gate, &f)); /* y is not for a gate */
    f.y = NULL;
    MUST(moe_gate_forward(r.gate, of_gate, &f));
    moe_pass_destroy(of_gate);
    layer_run_free(&other);
    layer_run_end(&r, &c);
}
END_TEST

/* ---- flags and replays ----------------------------------------------------------------------- */

START_TEST(test_layer_flags_add_overwrite_and_skip)
{
    layer_case c = base;
    layer_run r;
    int64_t count;
    layer_run_begin(&r, &c, MOE_DTYPE_F64);
    size_t bytes = (size_t)(c.T * c.D) * number_bytes(r.dtype);
    double allowed = r.dtype == MOE_DTYPE_F64 ? 1e-14 : 1e-6;
    void *y = malloc(bytes), *dx = malloc(bytes);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    memcpy(y, r.y, bytes);
    memcpy(dx, r.dx, bytes);
    double *once = layer_run_gradient(&r, "dW2", &count),
           *gate_once = layer_run_gradient(&r, "dWn", &count);
    r.f.flags |= MOE_FORWARD_ADD;
    MUST(layer_run_forward(&r));
    r.b.flags = MOE_BACKWARD_ADD_DX; /* and gradients are added to by default */
    MUST(layer_run_backward(&r));
    for (int64_t i = 0; i < c.T * c.D; i++) {
        ck_assert_double_eq(number_at(r.y, i, r.dtype), 2 * number_at(y, i, r.dtype));
        ck_assert_double_eq_tol(number_at(r.dx, i, r.dtype), 2 * number_at(dx, i, r.dtype),
                                allowed);
    }
    double *twice = layer_run_gradient(&r, "dW2", &count);
    for (int64_t i = 0; i < count; i++) ck_assert_double_eq(twice[i], 2 * once[i]);
    r.b.flags = MOE_BACKWARD_OVERWRITE | MOE_BACKWARD_SKIP_DX;
    memset(r.dx, 0x5a, bytes);
    MUST(layer_run_backward(&r));
    ck_assert_int_eq(((unsigned char *)r.dx)[5], 0x5a);
    double *set = layer_run_gradient(&r, "dW2", &count),
           *gate_set = layer_run_gradient(&r, "dWn", &count);
    for (int64_t i = 0; i < count; i++) ck_assert_double_eq(gate_set[i], gate_once[i]);
    ck_assert_double_eq(set[3], once[3]);
    MUST(moe_layer_zero_gradients(r.layer, NULL));
    r.b.flags = MOE_BACKWARD_SKIP_PARAMETERS;
    MUST(layer_run_backward(&r));
    double *zero = layer_run_gradient(&r, "dW2", &count);
    for (int64_t i = 0; i < count; i++) ck_assert_double_eq(zero[i], 0);
    ck_assert_double_eq(number_at(r.dx, 7, r.dtype), number_at(dx, 7, r.dtype));
    free(y), free(dx), free(once), free(gate_once), free(twice), free(set), free(gate_set),
        free(zero);
    layer_run_end(&r, &c);
}
END_TEST

/* Hash of a step, and of the losses and statistics it leaves. */
static uint64_t step_hash(layer_run *r)
{
    moe_losses losses;
    moe_stats stats;
    MUST(layer_run_backward(r));
    MUST(moe_losses_init(&losses, sizeof losses));
    MUST(moe_stats_init(&stats, sizeof stats));
    MUST(moe_pass_losses(r->pass, &losses));
    MUST(moe_pass_stats(r->pass, &stats));
    uint64_t hash = layer_run_hash(r);
    for (size_t i = 0; i < sizeof losses; i++)
        hash = (hash ^ ((const unsigned char *)&losses)[i]) * 0x100000001b3u;
    for (size_t i = 0; i < sizeof stats; i++)
        hash = (hash ^ ((const unsigned char *)&stats)[i]) * 0x100000001b3u;
    return hash;
}

/* Activations made anew, and the plan replayed by its ids, give the bytes of the plain step for
 * every case. */
START_TEST(test_layer_recompute_and_replay_are_the_plain_step)
{
    layer_case c = layer_cases[_i];
    layer_run plain, again, replayed;
    const moe_plan *routed;
    layer_case_make(&c, 3);
    layer_run_make(&plain, &c, MOE_DTYPE_F32, NULL);
    layer_run_make(&again, &c, MOE_DTYPE_F32, NULL);
    layer_run_make(&replayed, &c, MOE_DTYPE_F32, NULL);
    MUST(layer_run_forward(&plain));
    uint64_t want = step_hash(&plain);

    uint64_t flags = again.f.flags;
    void *y = again.f.y;
    double losses_out[MOE_LOSS_SLOTS] = {-7};
    again.f.flags = flags | MOE_FORWARD_PLAN_ONLY;
    MUST(layer_run_forward(&again));
    again.f.flags = flags | MOE_FORWARD_RECOMPUTE, again.f.plan = NULL,
    again.f.losses_out = losses_out;
    again.f.y = c.T % 2 ? NULL : y;
    MUST(layer_run_forward(&again));
    ck_assert_double_eq(losses_out[0], -7); /* not written again */
    ck_assert_msg(step_hash(&again) == want, "%s: a recompute gives other bytes", c.name);

    if (!c.replay && !c.per_call) {
        MUST(moe_pass_plan(plain.pass, &routed));
        MUST(moe_plan_create(&replayed.plan, replayed.context));
        MUST(moe_plan_copy(replayed.plan, routed));
        replayed.f.plan = replayed.plan, replayed.f.plan_use = MOE_PLAN_IDS;
        MUST(layer_run_forward(&replayed));
        ck_assert_msg(step_hash(&replayed) == want, "%s: a replay gives other bytes", c.name);
    }
    layer_run_free(&replayed), layer_run_free(&again), layer_run_free(&plain);
    layer_case_free(&c);
}
END_TEST

START_TEST(test_layer_recompute_is_the_plain_step_and_counts_losses_once)
{
    layer_case c = base;
    layer_run r;
    double losses_out[MOE_LOSS_SLOTS], stats_out[MOE_STAT_SLOTS], untouched[MOE_LOSS_SLOTS] = {-7};
    layer_run_begin(&r, &c, MOE_DTYPE_F64);
    r.f.losses_out = losses_out;
    r.f.stats_out = stats_out;
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    uint64_t plain = layer_run_hash(&r);
    int64_t bytes = moe_pass_bytes(r.pass);
    moe_pass_destroy(r.pass);
    r.pass = NULL;
    MUST(moe_pass_create(&r.pass, r.layer, NULL));
    MUST(moe_layer_zero_gradients(r.layer, NULL));
    REFUSED(MOE_ERROR_INVALID_STATE, (r.f.flags |= MOE_FORWARD_RECOMPUTE, layer_run_forward(&r)));
    r.f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_PLAN_ONLY;
    MUST(layer_run_forward(&r));
    ck_assert_int_lt(moe_pass_bytes(r.pass), bytes);
    r.f.flags = MOE_FORWARD_TRAIN | MOE_FORWARD_RECOMPUTE;
    r.f.losses_out = untouched;
    r.f.y = NULL;
    MUST(layer_run_forward(&r));
    ck_assert_double_eq(untouched[0], -7);
    MUST(layer_run_backward(&r));
    ck_assert_uint_eq(layer_run_hash(&r), plain);
    moe_losses losses;
    MUST(moe_losses_init(&losses, sizeof losses));
    MUST(moe_pass_losses(r.pass, &losses));
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) {
        double value = r.dtype == MOE_DTYPE_F64 ? losses.value[i] : (double)(float)losses.value[i];
        ck_assert_double_eq(number_at(losses_out, i, r.dtype), value);
    }
    ck_assert_double_eq(number_at(stats_out, MOE_STAT_TOKENS, r.dtype), 12);
    layer_run_end(&r, &c);
}
END_TEST

START_TEST(test_layer_replays_plans)
{
    layer_case c = base;
    layer_run r, again;
    const moe_plan *routed;
    moe_plan *plan = NULL;
    layer_run_begin(&r, &c, MOE_DTYPE_F64);
    layer_run_make(&again, &c, MOE_DTYPE_F64, NULL);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    MUST(moe_pass_plan(r.pass, &routed));
    MUST(moe_plan_create(&plan, again.context));
    MUST(moe_plan_copy(plan, routed));
    again.f.plan = plan;
    again.f.plan_use = MOE_PLAN_IDS; /* everything anew but the selection */
    MUST(layer_run_forward(&again));
    MUST(layer_run_backward(&again));
    ck_assert_uint_eq(layer_run_hash(&again), layer_run_hash(&r));
    again.f.plan_use = MOE_PLAN_IDS_AND_WEIGHTS; /* the gate does not run */
    MUST(layer_run_forward(&again));
    ck_assert_mem_eq(again.y, r.y, (size_t)(c.T * c.D) * number_bytes(r.dtype));
    moe_losses losses;
    MUST(moe_losses_init(&losses, sizeof losses));
    MUST(moe_pass_losses(again.pass, &losses));
    ck_assert_double_eq(losses.total, 0);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT,
            layer_run_backward(&again)); /* d_logits_out without logits */
    again.b.d_logits_out = NULL;
    MUST(layer_run_backward(&again));
    ck_assert_mem_eq(again.entry_grad, r.entry_grad, (size_t)(c.T * c.K) * number_bytes(r.dtype));
    again.f.tokens = 11;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_forward(&again));
    again.f.tokens = 12;
    again.f.top_k = 2;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_forward(&again));
    again.f.top_k = MOE_FROM_CONFIG;
    uint8_t mask[12] = {0};
    again.f.token_mask = mask; /* masks tokens that have rows */
    if (!ON_DEVICE) REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_forward(&again));
    moe_plan_destroy(plan);
    layer_run_free(&again);
    layer_run_end(&r, &c);
}
END_TEST

START_TEST(test_layer_keeps_a_nan_token_to_itself)
{
    layer_case c = base;
    layer_run r, clean;
    memset(c.weight, 0, sizeof c.weight);
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    layer_run_make(&clean, &c, MOE_DTYPE_F32, NULL);
    ((float *)r.x)[3 * 6 + 2] = NAN;
    MUST(layer_run_forward(&r));
    MUST(layer_run_forward(&clean));
    for (int64_t i = 0; i < c.T * c.D; i++) {
        if (i / 6 == 3)
            ck_assert(isnan(((float *)r.y)[i]));
        else
            ck_assert_mem_eq((float *)r.y + i, (float *)clean.y + i, 4);
    }
    layer_run_free(&clean);
    layer_run_end(&r, &c);
}
END_TEST

/* ---- gate, pool and layer together ----------------------------------------------------------- */

/* Gate and pool called one after the other, with a plan between them, are the layer, to the
 * byte. */
START_TEST(test_layer_is_gate_then_experts)
{
    layer_case c = base;
    layer_run r, parts;
    moe_pass *of_gate = NULL, *of_pool = NULL;
    const moe_plan *plan;
    layer_run_begin(&r, &c, _i ? MOE_DTYPE_F64 : MOE_DTYPE_F32);
    layer_run_make(&parts, &c, r.dtype, NULL);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    MUST(moe_pass_create_for_gate(&of_gate, parts.gate, NULL));
    MUST(moe_pass_create_for_experts(&of_pool, parts.experts, NULL));
    moe_forward_args f = parts.f;
    moe_backward_args b = parts.b;
    f.y = NULL;
    MUST(moe_gate_forward(parts.gate, of_gate, &f));
    MUST(moe_pass_plan(of_gate, &plan));
    MUST(moe_forward_args_init(&f, sizeof f));
    f.tokens = c.T, f.x = parts.x, f.y = parts.y, f.plan = plan;
    MUST(moe_experts_forward(parts.experts, of_pool, &f));
    b.d_logits_out = NULL;
    MUST(moe_experts_backward(parts.experts, of_pool, &b));
    b.dy = NULL, b.d_logits_out = parts.d_logits, b.flags = MOE_BACKWARD_ADD_DX;
    MUST(moe_gate_backward(parts.gate, of_gate, &b));
    ck_assert_mem_eq(parts.y, r.y, (size_t)(c.T * c.D) * number_bytes(r.dtype));
    ck_assert_mem_eq(parts.d_logits, r.d_logits, (size_t)(c.T * c.E) * number_bytes(r.real));
    ck_assert_uint_eq(layer_run_hash(&parts), layer_run_hash(&r));
    moe_pass_destroy(of_gate), moe_pass_destroy(of_pool);
    layer_run_free(&parts);
    layer_run_end(&r, &c);
}
END_TEST

/* Logits of the host need no input of the gate; its width may then be another one than x's. */
START_TEST(test_layer_takes_logits_for_a_gate_of_another_width)
{
    layer_case c = base;
    layer_run r;
    ref_result want;
    c.kind = MOE_GATE_TOP_K, c.logits_in = 1, c.gate_D = _i ? 20 : 3, c.weight[MOE_LOSS_LOAD] = 0;
    layer_run_begin(&r, &c, MOE_DTYPE_F64);
    ref_run(&c.p, &want, 1);
    r.f.gate_x = NULL, r.b.d_gate_x = NULL;
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    double allowed = r.dtype == MOE_DTYPE_F64 ? 1e-12 : 1e-5;
    for (int64_t i = 0; i < c.T * c.D; i++) {
        ck_assert_double_eq_tol(number_at(r.y, i, r.dtype), want.y[i], allowed);
        ck_assert_double_eq_tol(number_at(r.dx, i, r.dtype), want.dx[i], allowed);
    }
    ref_free(&want);
    layer_run_end(&r, &c);
}
END_TEST

/* Padding is in no statistic, also where the host's plan has entries for it. */
START_TEST(test_layer_replay_leaves_padding_out_of_the_statistics)
{
    layer_case c = base;
    layer_run r;
    moe_stats stats;
    c.replay = 2, c.masked = 1;
    memset(c.weight, 0, sizeof c.weight);
    layer_run_begin(&r, &c, MOE_DTYPE_F64);
    double tokens = 0, entries = 0;
    for (int64_t n = 0; n < c.T * c.K; n++) entries += c.mask[n / c.K] && c.ids[n] >= 0;
    for (int64_t t = 0; t < c.T; t++) tokens += c.mask[t];
    ck_assert_double_lt(tokens, (double)c.T);
    MUST(layer_run_forward(&r));
    MUST(moe_stats_init(&stats, sizeof stats));
    MUST(moe_pass_stats(r.pass, &stats));
    ck_assert_double_eq(stats.value[MOE_STAT_TOKENS], tokens);
    ck_assert_double_eq(stats.value[MOE_STAT_DROPPED], 0);
    ck_assert_double_eq(stats.value[MOE_STAT_ENTRIES], entries);
    layer_run_end(&r, &c);
}
END_TEST

/* Two layers over one pool, two passes in flight over each: gradients add up, nothing mixes. */
START_TEST(test_layers_share_a_pool_with_passes_in_flight)
{
    layer_case c = base;
    layer_run r;
    moe_layer_config l;
    moe_layer *tied = NULL;
    moe_pass *passes[4];
    int64_t count;
    layer_run_begin(&r, &c, MOE_DTYPE_F64);
    MUST(moe_layer_config_init(&l, sizeof l));
    MUST(moe_layer_get_config(r.layer, &l));
    MUST(moe_layer_create(&tied, &l));
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    double *once = layer_run_gradient(&r, "dW1", &count);
    size_t bytes = (size_t)(c.T * c.D) * number_bytes(r.dtype);
    double allowed = r.dtype == MOE_DTYPE_F64 ? 1e-13 : 1e-5;
    void *y = malloc(bytes), *dx = malloc(bytes);
    ck_assert(y && dx);
    memcpy(y, r.y, bytes), memcpy(dx, r.dx, bytes);
    MUST(moe_layer_zero_gradients(r.layer, NULL));
    for (int i = 0; i < 4; i++) {
        moe_layer *layer = i % 2 ? tied : r.layer;
        MUST(moe_pass_create(&passes[i], layer, NULL));
        memset(r.y, 0, bytes);
        MUST(moe_layer_forward(layer, passes[i], &r.f));
        ck_assert_mem_eq(r.y, y, bytes);
    }
    for (int i = 3; i >= 0; i--) {
        MUST(moe_layer_backward(i % 2 ? tied : r.layer, passes[i], &r.b));
        ck_assert_mem_eq(r.dx, dx, bytes);
    }
    double *all = layer_run_gradient(&r, "dW1", &count);
    for (int64_t i = 0; i < count; i++) ck_assert_double_eq_tol(all[i], 4 * once[i], allowed);
    moe_layer_destroy(tied); /* its passes still hold it */
    for (int i = 0; i < 4; i++) moe_pass_destroy(passes[i]);
    free(once), free(all), free(y), free(dx);
    layer_run_end(&r, &c);
}
END_TEST

/* No tokens: no pointers are needed anywhere. */
START_TEST(test_layer_without_tokens_needs_no_pointers)
{
    layer_case c = base;
    layer_run r;
    moe_forward_args f;
    moe_backward_args b;
    int64_t count;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    MUST(moe_forward_args_init(&f, sizeof f));
    MUST(moe_backward_args_init(&b, sizeof b));
    f.flags = MOE_FORWARD_TRAIN, b.flags = MOE_BACKWARD_OVERWRITE;
    MUST(moe_layer_forward(r.layer, r.pass, &f));
    MUST(moe_layer_backward(r.layer, r.pass, &b));
    static const char *const names[] = {"dWg", "dWn", "dW1", "dW2", "db2"};
    for (size_t i = 0; i < COUNT(names); i++) {
        double *zero = layer_run_gradient(&r, names[i], &count);
        for (int64_t n = 0; n < count; n++)
            ck_assert_msg(zero[n] == 0, "%s is not overwritten", names[i]);
        free(zero);
    }
    layer_run_end(&r, &c);
}
END_TEST

/* ---- statistics, references ------------------------------------------------------------------ */

START_TEST(test_pass_statistics_and_touched_experts)
{
    layer_case c = {.name = "stats",
                    .T = 10,
                    .D = 6,
                    .E = 5,
                    .F = 7,
                    .K = 1,
                    .capacity_kind = MOE_CAPACITY_NUMBER,
                    .capacity = 4,
                    .logits_in = 1};
    layer_run r;
    moe_stats stats;
    uint8_t touched[5];
    int64_t count;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    for (int i = 0; i < 50; i++)
        ((float *)r.logits_in)[i] = i / 5 < 7 ? (i % 5 == 2 ? 5.0f : 0.0f)
                                              : (i % 5 == 4 ? 5.0f : 0.0f);
    MUST(moe_stats_init(&stats, sizeof stats));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_pass_stats(r.pass, &stats));
    MUST(layer_run_forward(&r));
    MUST(moe_pass_stats(r.pass, &stats)); /* 7 tokens to expert 2, 3 to expert 4; 4 rows at most */
    ck_assert_double_eq(stats.value[MOE_STAT_TOKENS], 10);
    ck_assert_double_eq(stats.value[MOE_STAT_ENTRIES], 10);
    ck_assert_double_eq(stats.value[MOE_STAT_ROWS], 7);
    ck_assert_double_eq(stats.value[MOE_STAT_DROPPED], 3);
    ck_assert_double_eq(stats.value[MOE_STAT_TOUCHED], 2);
    ck_assert_double_eq_tol(stats.value[MOE_STAT_MAX_OVER_MEAN], 3.5, 1e-12);
    ck_assert_double_eq_tol(stats.value[MOE_STAT_CV_LOAD], sqrt((4 + 25 + 4 + 1 + 4) / 5.0) / 2,
                            1e-9);
    ck_assert_double_eq_tol(stats.value[MOE_STAT_LOAD_ENTROPY], -0.7 * log(0.7) - 0.3 * log(0.3),
                            1e-12);
    ck_assert_double_eq(stats.value[MOE_STAT_GATE_ENTROPY], 0);
    MUST(moe_experts_touched(r.experts, touched, &count));
    ck_assert_int_eq(count, 0);
    MUST(layer_run_backward(&r));
    MUST(moe_experts_touched(r.experts, touched, &count));
    ck_assert_int_eq(count, 2);
    ck_assert(touched[2] && touched[4] && !touched[0]);
    MUST(moe_experts_zero_gradients(r.experts, NULL));
    MUST(moe_experts_touched(r.experts, touched, NULL));
    ck_assert(!touched[2]);
    layer_run_end(&r, &c);
}
END_TEST

/* Handles may be destroyed in any order; what is still used lives on. */
START_TEST(test_objects_live_as_long_as_they_are_used)
{
    layer_case c = base;
    layer_run r;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    moe_context_destroy(r.context), moe_gate_destroy(r.gate), moe_experts_destroy(r.experts);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    moe_layer *layer = r.layer;
    moe_layer_destroy(layer); /* the pass still holds it */
    MUST(moe_layer_forward(layer, r.pass, &r.f));
    r.context = NULL, r.gate = NULL, r.experts = NULL, r.layer = NULL;
    layer_run_end(&r, &c);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("layer");
    TCase *tests = tcase_create("reference and sentences");
    tcase_set_timeout(tests, 600);
    tcase_add_loop_test(tests, test_layer_agrees_with_reference_in_f32, 0, LAYER_CASES);
    tcase_add_loop_test(tests, test_layer_agrees_with_reference_in_f64, 0, LAYER_CASES);
    tcase_add_test(tests, test_layer_agrees_with_reference_for_random_configurations);
#ifdef MOE_TEST_DEVICE
    tcase_add_test(tests, test_layer_agrees_with_reference_in_padded_rows);
    tcase_add_loop_test(tests, test_layer_leaves_out_rows_beyond_padded_rows, 0, 3);
#endif
    tcase_add_test(tests, test_layer_forward_and_backward_refuse_bad_fields);
    tcase_add_test(tests, test_layer_and_pass_calls_refuse_null);
    tcase_add_test(tests, test_layer_create_refuses_what_does_not_fit);
    tcase_add_test(tests, test_pass_of_another_object_is_refused);
    tcase_add_test(tests, test_layer_flags_add_overwrite_and_skip);
    tcase_add_loop_test(tests, test_layer_recompute_and_replay_are_the_plain_step, 0, LAYER_CASES);
    tcase_add_test(tests, test_layer_recompute_is_the_plain_step_and_counts_losses_once);
    tcase_add_test(tests, test_layer_replays_plans);
    tcase_add_test(tests, test_layer_keeps_a_nan_token_to_itself);
    tcase_add_loop_test(tests, test_layer_is_gate_then_experts, 0, 2);
    tcase_add_loop_test(tests, test_layer_takes_logits_for_a_gate_of_another_width, 0, 2);
    tcase_add_test(tests, test_layer_replay_leaves_padding_out_of_the_statistics);
    tcase_add_test(tests, test_layers_share_a_pool_with_passes_in_flight);
    tcase_add_test(tests, test_layer_without_tokens_needs_no_pointers);
    tcase_add_test(tests, test_pass_statistics_and_touched_experts);
    tcase_add_test(tests, test_objects_live_as_long_as_they_are_used);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
