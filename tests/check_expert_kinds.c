/* check_expert_kinds.c - one pool of every kind against plain double loops (support/pool_model.h):
 * activations with their clamp, the weight's three places, identity, the host's own experts. */
#include "support/layer_case.h"
#include "support/pool_model.h"
#include "support/suite.h"

#include <check.h>
#include <fenv.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pool_model model_of(model_part part, int32_t dtype)
{
    pool_model m = {.T = 19, .D = 6, .O = 6, .K = 3, .dtype = dtype, .parts = 1};
    m.part[0] = part;
    m.part[0].E = 5;
    if (part.F == 0) m.part[0].F = 7;
    return m;
}

static const model_part gpt_oss = {.activation = MOE_ACTIVATION_SWIGLU,
                                   .bias = 1,
                                   .alpha = 1.702,
                                   .limit = 0.75,
                                   .offset = 1,
                                   .glu_order = MOE_GLU_INTERLEAVED};
#ifndef MOE_TEST_DEVICE
static const model_part host_expert = {.kind = MOE_EXPERTS_CALLBACK, .bias = 1};
#endif
static const model_part identity = {.kind = MOE_EXPERTS_IDENTITY};

static void must_agree(pool_model *m, const char *what)
{
    pool_model_run(m);
    MUST(pool_model_forward(m));
    const char *difference = pool_model_compare_y(m);
    ck_assert_msg(difference[0] == 0, "%s: %s", what, difference);
    MUST(pool_model_backward(m));
    difference = pool_model_compare_gradients(m);
    ck_assert_msg(difference[0] == 0, "%s: %s", what, difference);
}

static void run_both(model_part part, const char *what)
{
    for (int32_t dtype = MOE_DTYPE_F32; dtype <= REAL; dtype++) {
        pool_model m = model_of(part, dtype);
        pool_model_make(&m, NULL, 3);
        must_agree(&m, what);
        pool_model_free(&m);
    }
}

/* ---- values and gradients -------------------------------------------------------------------- */

/* Test i: activation i % 8, and a different mixture of the rest for each. */
START_TEST(test_expert_kinds_feed_forward_agrees)
{
    static const int activations[] = {0, 1, 2, 3, 16, 17, 18, 19};
    char text[128];
    model_part p = {.activation = activations[_i % 8],
                    .position = _i / 8 % 3,
                    .sigmoid = _i / 24 % 2,
                    .bias = _i % 5 != 0,
                    .layout = _i % 2,
                    .F = _i % 3 ? 7 : 33};
    if (p.activation >= MOE_ACTIVATION_SWIGLU) p.glu_order = (_i / 3) % 4;
    (void)snprintf(text, sizeof text, "activation %d, weight on %d, sigmoid %d, bias %d, layout %d",
                   p.activation, p.position, p.sigmoid, p.bias, p.layout);
    run_both(p, text);
}
END_TEST

/* Every GLU order and layout, each of the three numbers alone and together, every place of the
 * weight. */
START_TEST(test_expert_kinds_clamped_swiglu_agrees)
{
    static const double numbers[][3] = {{1.702, 0.75, 1}, {0.5, 0, 0}, {0, 0.3, 0},
                                        {0, 0, -0.7},     {2, 1, 0},   {0, 50, 0.25}};
    char text[128];
    model_part p = gpt_oss;
    p.glu_order = _i % 4, p.layout = _i / 4 % 2, p.position = _i % 3, p.sigmoid = _i == 7;
    for (size_t n = 0; n < COUNT(numbers); n++) {
        p.alpha = numbers[n][0], p.limit = numbers[n][1], p.offset = numbers[n][2];
        (void)snprintf(text, sizeof text, "alpha %g, limit %g, offset %g", p.alpha, p.limit,
                       p.offset);
        run_both(p, text);
    }
}
END_TEST

START_TEST(test_expert_kinds_identity_agrees) { run_both(identity, "identity"); }
END_TEST

#ifndef MOE_TEST_DEVICE /* which calls no function of the host */
START_TEST(test_expert_kinds_hosts_expert_agrees)
{
    model_part p = host_expert;
    run_both(p, "a host's experts");
    p.bias = 0, p.F = 3; /* a workspace of 24 bytes a row */
    run_both(p, "a host's experts without bias");
    for (int32_t dtype = 0; dtype < 2; dtype++) { /* O != D */
        pool_model m = model_of(host_expert, dtype);
        m.O = 4;
        pool_model_make(&m, NULL, 5);
        must_agree(&m, "a host's experts of another width");
        ck_assert_int_ge(m.part[0].calls, 3);
        pool_model_free(&m);
    }
}
END_TEST

/* The host's experts and the library's of the same weights give the same, to rounding. */
START_TEST(test_expert_kinds_hosts_expert_is_as_the_librarys)
{
    model_part p = {.bias = 1};
    pool_model own = model_of(p, MOE_DTYPE_F64), host = model_of(host_expert, MOE_DTYPE_F64);
    pool_model_make(&own, NULL, 11), pool_model_make(&host, NULL, 11);
    MUST(pool_model_forward(&own));
    MUST(pool_model_forward(&host));
    MUST(pool_model_backward(&own));
    MUST(pool_model_backward(&host));
    const void *pairs[][2] = {{own.lib_y, host.lib_y},
                              {own.lib_dx, host.lib_dx},
                              {own.lib_dw, host.lib_dw}};
    int64_t counts[] = {19 * 6, 19 * 6, 19 * 3};
    for (int i = 0; i < 3; i++)
        for (int64_t n = 0; n < counts[i]; n++)
            ck_assert_double_eq_tol(((const double *)pairs[i][0])[n],
                                    ((const double *)pairs[i][1])[n], 1e-13);
    for (int w = 0; w < MODEL_PARAMETERS; w++) {
        int64_t count;
        if (!own.part[0].p[w]) continue;
        double *a = pool_model_gradient(&own.part[0], w, &count);
        double *b = pool_model_gradient(&host.part[0], w, &count);
        for (int64_t n = 0; n < count; n++) ck_assert_double_eq_tol(a[n], b[n], 1e-12);
        free(a), free(b);
    }
    pool_model_free(&own), pool_model_free(&host);
}
END_TEST
#endif

/* Of the model's double or the library's numbers, with the library's. */
static double dot(const void *a, int32_t of_a, const void *b, int64_t count)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += number_at(a, i, of_a) * number_at(b, i, REAL);
    return sum;
}

/* y is linear in the weights, and for the identity in x: y . dy = w . dw = x . dx. */
START_TEST(test_expert_kinds_adjoints)
{
    static const model_part parts[] = {{.activation = MOE_ACTIVATION_GELU_ERF, .bias = 1},
                                       {.kind = MOE_EXPERTS_IDENTITY},
                                       {.kind = MOE_EXPERTS_CALLBACK, .bias = 1}};
    pool_model m = model_of(parts[_i], REAL);
    pool_model_make(&m, NULL, 3);
    MUST(pool_model_forward(&m));
    MUST(pool_model_backward(&m));
    double want = dot(m.dy, MOE_DTYPE_F64, m.lib_y, 19 * 6);
    ck_assert_double_gt(fabs(want), 1e-3);
    ck_assert_double_eq_tol(dot(m.w, MOE_DTYPE_F64, m.lib_dw, 19 * 3), want, TOLERANCE(1e-12));
    if (parts[_i].kind == MOE_EXPERTS_IDENTITY)
        ck_assert_double_eq_tol(dot(m.x, MOE_DTYPE_F64, m.lib_dx, 19 * 6), want, TOLERANCE(1e-12));
    pool_model_free(&m);
}
END_TEST

/* At its bound a clamp lets the gradient through, beyond it none; NaN stays NaN. */
START_TEST(test_expert_kinds_clamp_at_its_bound)
{
    static const struct {
        double gate, up, h, dgate, dup;
    } want[] = {{2, 2, 4, 1, 1},     {2.5, 2, 4, 0, 1}, {2, 2.5, 4, 1, 0},   {2, -2, -4, 1, 1},
                {2, -2.5, -4, 1, 0}, {-9, 1, 0, 1, 1},  {NAN, 1, NAN, 1, 1}, {1, NAN, NAN, 1, 1}};
    for (size_t i = 0; i < COUNT(want); i++)
        for (int32_t dtype = 0; dtype <= REAL; dtype++) {
            model_part p = {.activation = MOE_ACTIVATION_SWIGLU, .limit = 2, .alpha = 40, .F = 1};
            pool_model m = {.T = 1, .D = 1, .O = 1, .K = 1, .dtype = dtype, .parts = 1};
            m.part[0] = p, m.part[0].E = 1;
            pool_model_make(&m, NULL, 3);
            m.part[0].p[MODEL_W1][0] = want[i].gate, m.part[0].p[MODEL_W3][0] = want[i].up;
            m.part[0].p[MODEL_W2][0] = 1;
            pool_model_set_parameters(&m.part[0]);
            pool_model_put(&m, m.lib_x, 0, 1);
            pool_model_put(&m, m.lib_dy, 0, 1);
            m.f.plan = NULL; /* the one expert with weight 1 */
            m.b.entry_weight_grad = NULL;
            MUST(pool_model_forward(&m));
            MUST(pool_model_backward(&m));
            int64_t count;
            double *g = pool_model_gradient(&m.part[0], MODEL_W1, &count);
            double *u = pool_model_gradient(&m.part[0], MODEL_W3, &count);
            double y = pool_model_at(&m, m.lib_y, 0);
            ck_assert_msg(isnan(want[i].h) ? isnan(y) : fabs(y - want[i].h) < 1e-6, "case %d: y %g",
                          (int)i, y);
            /* sigmoid(80) is 1: dgate is up where it passes, dup is gate */
            double dgate = want[i].dgate != 0 ? fmax(-2, fmin(want[i].up, 2)) : 0;
            double dup = want[i].dup != 0 ? fmin(want[i].gate, 2) : 0;
            if (want[i].gate == -9) dgate = dup = 0;
            if (isnan(want[i].h))
                ck_assert_msg(isnan(g[0]) && isnan(u[0]) == isnan(want[i].gate),
                              "case %d: NaN got lost", (int)i);
            else
                ck_assert_msg(fabs(g[0] - dgate) < 1e-5 && fabs(u[0] - dup) < 1e-5,
                              "case %d: %g %g, want %g %g", (int)i, g[0], u[0], dgate, dup);
            free(g), free(u);
            pool_model_free(&m);
        }
}
END_TEST

/* The same bytes in every GLU order and layout; alpha 0 is alpha 1. */
START_TEST(test_expert_kinds_clamped_bytes_do_not_depend_on_layout)
{
    float first[19 * 6], dx[19 * 6];
    for (int i = 0; i < 9; i++) {
        model_part p = gpt_oss;
        p.glu_order = i % 4, p.layout = i / 4 % 2, p.alpha = i == 8 ? 1 : 0;
        pool_model m = model_of(p, MOE_DTYPE_F32);
        pool_model_make(&m, NULL, 3);
        MUST(pool_model_forward(&m));
        MUST(pool_model_backward(&m));
        if (i == 0) memcpy(first, m.lib_y, sizeof first), memcpy(dx, m.lib_dx, sizeof dx);
        ck_assert_mem_eq(m.lib_y, first, sizeof first);
        for (int n = 0; n < 19 * 6 && ON_DEVICE; n++) /* one product or two, summed otherwise */
            ck_assert_float_eq_tol(((float *)m.lib_dx)[n], dx[n], 1e-5f);
        if (!ON_DEVICE) ck_assert_mem_eq(m.lib_dx, dx, sizeof dx);
        pool_model_free(&m);
    }
}
END_TEST

/* ---- what a call leaves out, and the ways of running a forward ------------------------------- */

static const model_part samples[] = {{.activation = MOE_ACTIVATION_SWIGLU, .bias = 1},
                                     {.position = MOE_WEIGHT_ON_HIDDEN, .bias = 1},
                                     {.position = MOE_WEIGHT_ON_INPUT, .sigmoid = 1},
                                     {.kind = MOE_EXPERTS_IDENTITY},
                                     {.activation = MOE_ACTIVATION_SWIGLU,
                                      .bias = 1,
                                      .alpha = 1.702,
                                      .limit = 0.75,
                                      .offset = 1,
                                      .glu_order = MOE_GLU_INTERLEAVED},
                                     {.kind = MOE_EXPERTS_CALLBACK, .bias = 1}};
/* A device calls no function of the host: the last one is for the CPU. */
enum { SAMPLES = ON_DEVICE ? 5 : 6, ADJOINTS = ON_DEVICE ? 2 : 3 };

static void make_sample(pool_model *m, int i, int32_t dtype)
{
    *m = model_of(samples[i], dtype);
    pool_model_make(m, NULL, 21);
}

/* entry_weight_grad without dx, dx without entry_weight_grad, neither; and no parameters. */
START_TEST(test_expert_kinds_gradients_do_not_need_each_other)
{
    pool_model m;
    size_t dx_bytes = 19 * 6 * sizeof(scalar), dw_bytes = 19 * 3 * sizeof(scalar);
    scalar dx[19 * 6], dw[19 * 3];
    make_sample(&m, _i, REAL);
    MUST(pool_model_forward(&m));
    MUST(pool_model_backward(&m));
    memcpy(dx, m.lib_dx, dx_bytes), memcpy(dw, m.lib_dw, dw_bytes);
    memset(m.lib_dw, 0x5a, dw_bytes);
    m.b.dx = NULL;
    MUST(pool_model_backward(&m));
    ck_assert_mem_eq(m.lib_dw, dw, dw_bytes);
    ck_assert(m.part[0].kind != MOE_EXPERTS_CALLBACK || !m.part[0].dx_seen);
    m.b.dx = m.lib_dx, m.b.entry_weight_grad = NULL;
    memset(m.lib_dx, 0x5a, dx_bytes);
    m.b.flags = MOE_BACKWARD_SKIP_PARAMETERS;
    MUST(pool_model_backward(&m));
    ck_assert_mem_eq(m.lib_dx, dx, dx_bytes);
    ck_assert(m.part[0].kind != MOE_EXPERTS_CALLBACK ||
              (m.part[0].dx_seen && !m.part[0].parameters_seen));
    memset(m.lib_dx, 0x5a, dx_bytes);
    m.b.flags = MOE_BACKWARD_SKIP_DX, m.b.entry_weight_grad = m.lib_dw;
    memset(m.lib_dw, 0x5a, dw_bytes);
    MUST(pool_model_backward(&m));
    ck_assert_mem_eq(m.lib_dw, dw, dw_bytes);
    ck_assert_int_eq(((unsigned char *)m.lib_dx)[0], 0x5a);
    ck_assert(m.part[0].kind != MOE_EXPERTS_CALLBACK || m.part[0].parameters_seen);
    pool_model_free(&m);
}
END_TEST

/* Inference, a recompute, x that moved, and y that is added to. */
START_TEST(test_expert_kinds_ways_of_running_agree)
{
    pool_model m;
    float y[19 * 6], dx[19 * 6], moved[19 * 6];
    make_sample(&m, _i, MOE_DTYPE_F32);
    MUST(pool_model_forward(&m));
    MUST(pool_model_backward(&m));
    memcpy(y, m.lib_y, sizeof y), memcpy(dx, m.lib_dx, sizeof dx);
    m.f.flags = MOE_FORWARD_NO_SAVE;
    memset(m.lib_y, 0x5a, sizeof y);
    MUST(pool_model_forward(&m));
    ck_assert_mem_eq(m.lib_y, y, sizeof y);
    REFUSED(MOE_ERROR_INVALID_STATE, pool_model_backward(&m));
    m.f.flags = MOE_FORWARD_PLAN_ONLY;
    memset(m.lib_y, 0x5a, sizeof y);
    MUST(pool_model_forward(&m));
    ck_assert_mem_eq(m.lib_y, y, sizeof y);
    MUST(moe_pass_trim(m.pass));
    m.f.flags = MOE_FORWARD_RECOMPUTE, m.f.plan = NULL, m.f.y = NULL;
    MUST(pool_model_forward(&m));
    memcpy(moved, m.lib_x, sizeof moved);
    memset(m.lib_x, 0x5a, sizeof moved);
    memset(m.lib_dx, 0x5a, sizeof dx);
    m.b.x = moved;
    MUST(pool_model_backward(&m));
    ck_assert_mem_eq(m.lib_dx, dx, sizeof dx);
    memcpy(m.lib_x, moved, sizeof moved);
    m.f.flags = MOE_FORWARD_ADD, m.f.plan = m.plan, m.f.y = m.lib_y;
    for (int i = 0; i < 19 * 6; i++) ((float *)m.lib_y)[i] = 1;
    MUST(pool_model_forward(&m));
    for (int i = 0; i < 19 * 6; i++) ck_assert_float_eq(((float *)m.lib_y)[i], 1 + y[i]);
    pool_model_free(&m);
}
END_TEST

/* A NaN in one token's x stays in that token's y and dx. */
START_TEST(test_expert_kinds_nan_stays_in_its_token)
{
    pool_model m;
    scalar y[19 * 6], dx[19 * 6];
    make_sample(&m, _i, REAL);
    MUST(pool_model_forward(&m));
    MUST(pool_model_backward(&m));
    memcpy(y, m.lib_y, sizeof y), memcpy(dx, m.lib_dx, sizeof dx);
    ((scalar *)m.lib_x)[4 * 6 + 1] = (scalar)NAN;
    MUST(pool_model_forward(&m));
    MUST(pool_model_backward(&m));
    for (int i = 0; i < 19 * 6; i++) {
        if (i / 6 == 4) continue;
        ck_assert(((scalar *)m.lib_y)[i] == y[i]);
        ck_assert(((scalar *)m.lib_dx)[i] == dx[i]);
    }
    ck_assert(isnan(((scalar *)m.lib_y)[4 * 6 + 1]));
    pool_model_free(&m);
}
END_TEST

START_TEST(test_expert_kinds_without_tokens)
{
    pool_model m = model_of(samples[_i], MOE_DTYPE_F32);
    m.T = 0;
    pool_model_make(&m, NULL, 3);
    m.f.x = m.f.y = NULL;
    m.b.dy = m.b.dx = NULL;
    MUST(pool_model_forward(&m));
    MUST(pool_model_backward(&m));
    ck_assert_int_eq(m.part[0].calls, 0);
    pool_model_free(&m);
}
END_TEST

/* ---- memory ---------------------------------------------------------------------------------- */

static long allocations;
static void *counting_alloc(void *user, uint64_t size, uint64_t alignment)
{
    (void)user;
    allocations++;
    return aligned_alloc((size_t)alignment, (size_t)((size + alignment - 1) & ~(alignment - 1)));
}
static void counting_free(void *user, void *memory, uint64_t size)
{
    (void)user, (void)size;
    free(memory);
}

static moe_context *counting_context(void)
{
    moe_context_config k;
    moe_context *context = NULL;
    MUST(moe_context_config_init(&k, sizeof k));
    k.alloc = counting_alloc, k.free = counting_free, k.threads = 2;
    MUST(moe_context_create(&context, &k));
    return context;
}

/* Nothing is allocated in a second step, nor in the first after a reserve; and a pass holds what
 * moe_layer_memory said. */
START_TEST(test_expert_kinds_second_step_allocates_nothing)
{
    pool_model m = model_of(samples[_i], MOE_DTYPE_F32);
    moe_expert_callbacks callbacks;
    moe_cost_query q;
    moe_cost cost;
    pool_model_make(&m, counting_context(), 3);
    MUST(moe_pass_reserve(m.pass, m.T, 1, m.K));
    for (int step = 0; step < 2; step++) {
        long before = allocations;
        MUST(pool_model_forward(&m));
        MUST(pool_model_backward(&m));
        MUST(moe_experts_zero_touched_gradients(m.pool, NULL));
        ck_assert_int_eq(allocations, before);
    }
    moe_experts_config c = pool_model_config(&m, &m.part[0], &callbacks);
    MUST(moe_cost_query_init(&q, sizeof q));
    MUST(moe_cost_init(&cost, sizeof cost));
    q.experts = &c, q.tokens = m.T, q.top_k = m.K, q.threads = 2;
    if (ON_DEVICE) q.context = m.context;
    MUST(moe_layer_memory(&q, &cost));
    ck_assert_int_eq(cost.pass_bytes, moe_pass_bytes(m.pass));
    int64_t elements = 0;
    for (int64_t i = 0; i < moe_experts_parameter_count(m.pool); i++) {
        moe_parameter_record r;
        MUST(moe_parameter_record_init(&r, sizeof r));
        MUST(moe_experts_parameter(m.pool, i, &r));
        elements += r.element_count;
    }
    ck_assert_int_eq(cost.parameter_count, elements);
    MUST(moe_layer_flops(&q, &cost));
    ck_assert((m.part[0].kind == MOE_EXPERTS_FEED_FORWARD) ==
              (cost.forward_flops > 2 * m.T * m.K * m.O));
    pool_model_free(&m);
}
END_TEST

#ifndef MOE_TEST_DEVICE /* nor fails for one */
/* ---- the host's functions that fail ---------------------------------------------------------- */

static void must_say(const char *a, const char *b)
{
    const char *said = moe_last_error();
    ck_assert_msg(strstr(said, a) && strstr(said, b), "\"%s\" lacks %s or %s", said, a, b);
}

START_TEST(test_expert_kinds_failing_forward_fails_the_step)
{
    pool_model m = model_of(host_expert, MOE_DTYPE_F32);
    pool_model_make(&m, NULL, 3);
    m.part[0].fail_expert = 3, m.part[0].fail_with = 77;
    REFUSED(MOE_ERROR_CALLBACK, pool_model_forward(&m));
    must_say("expert 3", "77");
    must_say("forward", "moe_experts_forward");
    REFUSED(MOE_ERROR_INVALID_STATE, pool_model_backward(&m));
    m.part[0].fail_with = 0;
    must_agree(&m, "after a failed forward");
    pool_model_free(&m);
}
END_TEST

START_TEST(test_expert_kinds_failing_backward_fails_the_step)
{
    pool_model m = model_of(host_expert, MOE_DTYPE_F32);
    pool_model_make(&m, NULL, 3);
    m.part[0].fail_expert = 2, m.part[0].fail_with = -5, m.part[0].fail_backward = 1;
    MUST(pool_model_forward(&m));
    REFUSED(MOE_ERROR_CALLBACK, pool_model_backward(&m));
    must_say("expert 2", "-5");
    must_say("backward", "moe_experts_backward");
    m.part[0].fail_with = 0;
    REFUSED(MOE_ERROR_INVALID_STATE, pool_model_backward(&m));
    MUST(pool_model_forward(&m));
    MUST(pool_model_backward(&m));
    pool_model_free(&m);
}
END_TEST

/* Without a backward the pool is for inference: a backward is refused before anything is
 * written. */
START_TEST(test_expert_kinds_host_without_backward)
{
    pool_model m = model_of(host_expert, MOE_DTYPE_F32);
    moe_expert_callbacks callbacks;
    moe_experts *pool = NULL;
    moe_pass *pass = NULL;
    pool_model_make(&m, NULL, 3);
    moe_experts_config c = pool_model_config(&m, &m.part[0], &callbacks);
    callbacks.backward = NULL;
    MUST(moe_experts_create(&pool, m.context, &c));
    MUST(moe_pass_create_for_experts(&pass, pool, NULL));
    pool_model_run(&m);
    MUST(moe_experts_forward(pool, pass, &m.f));
    ck_assert_str_eq(pool_model_compare_y(&m), "");
    memset(m.lib_dx, 0x5a, 19 * 6 * 4), memset(m.lib_dw, 0x5a, 19 * 3 * 4);
    REFUSED(MOE_ERROR_INVALID_STATE, moe_experts_backward(pool, pass, &m.b));
    must_say("backward of the callbacks", "NULL");
    for (int i = 0; i < 19 * 6 * 4; i++) ck_assert_int_eq(((unsigned char *)m.lib_dx)[i], 0x5a);
    for (int i = 0; i < 19 * 3 * 4; i++) ck_assert_int_eq(((unsigned char *)m.lib_dw)[i], 0x5a);
    moe_pass_destroy(pass), moe_experts_destroy(pool);
    pool_model_free(&m);
}
END_TEST

/* Workspace 0: none is handed out. A host that changes the rounding changes only its own
 * results. */
static int32_t rounding_expert(void *user, const moe_expert_call *c)
{
    if (c->workspace || fegetround() != FE_TONEAREST) return 9;
    for (int64_t i = 0; i < c->rows * 6; i++) ((double *)c->out)[i] = 3 * ((const double *)c->x)[i];
    *(int *)user += 1;
    return fesetround(FE_UPWARD);
}

START_TEST(test_expert_kinds_host_may_change_the_rounding)
{
    pool_model m = model_of(identity, MOE_DTYPE_F64);
    moe_expert_callbacks callbacks;
    moe_experts *pool = NULL;
    moe_pass *pass = NULL;
    double y[19 * 6];
    int calls = 0;
    pool_model_make(&m, NULL, 3);
    MUST(pool_model_forward(&m));
    memcpy(y, m.lib_y, sizeof y);
    MUST(moe_expert_callbacks_init(&callbacks, sizeof callbacks));
    callbacks.forward = rounding_expert, callbacks.user = &calls;
    moe_experts_config c;
    MUST(moe_experts_get_config(m.pool, (c.struct_size = sizeof c, &c)));
    c.kind = MOE_EXPERTS_CALLBACK, c.callbacks = &callbacks;
    MUST(moe_experts_create(&pool, m.context, &c));
    MUST(moe_pass_create_for_experts(&pass, pool, NULL));
    fesetround(FE_DOWNWARD);
    MUST(moe_experts_forward(pool, pass, &m.f));
    ck_assert_int_eq(fegetround(), FE_DOWNWARD);
    fesetround(FE_TONEAREST);
    ck_assert_int_ge(calls, 2);
    for (int i = 0; i < 19 * 6; i++)
        ck_assert_double_eq_tol(((double *)m.lib_y)[i], 3 * y[i], 1e-14);
    moe_pass_destroy(pass), moe_experts_destroy(pool);
    pool_model_free(&m);
}
END_TEST
#endif

int main(void)
{
    Suite *suite = suite_create("expert_kinds");
    TCase *tests = tcase_create("kinds");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, test_expert_kinds_feed_forward_agrees, 0, 48);
    tcase_add_loop_test(tests, test_expert_kinds_clamped_swiglu_agrees, 0, 8);
    tcase_add_test(tests, test_expert_kinds_identity_agrees);
#ifndef MOE_TEST_DEVICE
    tcase_add_test(tests, test_expert_kinds_hosts_expert_agrees);
    tcase_add_test(tests, test_expert_kinds_hosts_expert_is_as_the_librarys);
    tcase_add_test(tests, test_expert_kinds_failing_forward_fails_the_step);
    tcase_add_test(tests, test_expert_kinds_failing_backward_fails_the_step);
    tcase_add_test(tests, test_expert_kinds_host_without_backward);
    tcase_add_test(tests, test_expert_kinds_host_may_change_the_rounding);
#endif
    tcase_add_loop_test(tests, test_expert_kinds_adjoints, 0, ADJOINTS);
    tcase_add_test(tests, test_expert_kinds_clamp_at_its_bound);
    tcase_add_test(tests, test_expert_kinds_clamped_bytes_do_not_depend_on_layout);
    tcase_add_loop_test(tests, test_expert_kinds_gradients_do_not_need_each_other, 0, SAMPLES);
    tcase_add_loop_test(tests, test_expert_kinds_ways_of_running_agree, 0, SAMPLES);
    tcase_add_loop_test(tests, test_expert_kinds_nan_stays_in_its_token, 0, SAMPLES);
    tcase_add_loop_test(tests, test_expert_kinds_without_tokens, 0, SAMPLES);
    if (COUNTS_HOLD)
        tcase_add_loop_test(tests, test_expert_kinds_second_step_allocates_nothing, 0, SAMPLES);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
