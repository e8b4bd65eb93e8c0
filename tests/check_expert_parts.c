/* check_expert_parts.c - pools made of pools: values and gradients against the model, names and
 * bindings, touched experts and zeroing only those, one backward at a time, the gradient check. */
#include "support/layer_case.h"
#include "support/pool_model.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const model_part kinds[] = {
    {.E = 2, .F = 5, .bias = 1},
    {.E = 1, .kind = MOE_EXPERTS_IDENTITY},
    {.E = 3,
     .F = 11,
     .activation = MOE_ACTIVATION_SWIGLU,
     .alpha = 1.702,
     .limit = 0.75,
     .offset = 1,
     .glu_order = MOE_GLU_INTERLEAVED,
     .layout = 1,
     .bias = 1},
    {.E = 2, .F = 3, .kind = MOE_EXPERTS_CALLBACK, .bias = 1},
    {.E = 1, .F = 33, .activation = MOE_ACTIVATION_GELU_ERF, .position = MOE_WEIGHT_ON_INPUT},
    {.E = 2,
     .F = 8,
     .activation = MOE_ACTIVATION_GEGLU_TANH,
     .position = MOE_WEIGHT_ON_HIDDEN,
     .sigmoid = 1},
    {.E = 2, .F = 5, .kind = MOE_EXPERTS_CALLBACK},
    {.E = 4, .F = 1, .activation = MOE_ACTIVATION_SILU, .layout = 1, .sigmoid = 1}};

/* Mixtures: numbers of kinds[], -1 ends. */
static const int mixtures[][9] = {{0, 2, -1},
                                  {2, 0, 7, -1},
                                  {1, 0, -1},
                                  {3, 0, 6, -1},
                                  {4, -1},
                                  {4, 5, -1},
                                  {4, 0, -1},
                                  {5, 1, 4, -1},
                                  {0, 1, 2, 3, 4, 5, 6, 7, -1},
                                  {7, 6, 5, 4, 3, 2, 1, 0, -1}};

static void describe(pool_model *m, int mixture, int32_t dtype)
{
    *m = (pool_model){.T = 23, .D = 6, .O = 6, .K = 3, .dtype = dtype, .whole = 1};
    for (int i = 0; mixtures[mixture][i] >= 0; i++)
        m->part[m->parts++] = kinds[mixtures[mixture][i]];
}

/* ---- values and gradients -------------------------------------------------------------------- */

START_TEST(test_expert_parts_agree)
{
    for (int32_t dtype = 0; dtype < 2; dtype++) {
        pool_model m;
        describe(&m, _i, dtype);
        pool_model_make(&m, NULL, 5);
        pool_model_run(&m);
        for (int turn = 0; turn < 2; turn++) {
            MUST(pool_model_forward(&m));
            ck_assert_str_eq(pool_model_compare_y(&m), "");
            m.b.flags = turn ? MOE_BACKWARD_OVERWRITE : 0;
            for (int i = 0; i < m.parts; i++) /* the host's are added to */
                for (int w = 0; w < MODEL_PARAMETERS; w++)
                    if (m.part[i].host_d[w])
                        memset(m.part[i].host_d[w], 0,
                               (size_t)pool_model_elements(&m.part[i], w) * sizeof(double));
            MUST(pool_model_backward(&m));
            ck_assert_str_eq(pool_model_compare_gradients(&m), "");
        }
        m.f.flags = MOE_FORWARD_NO_SAVE;
        memset(m.lib_y, 0x5a, (size_t)(m.T * m.O) * pool_model_element(&m));
        MUST(pool_model_forward(&m));
        ck_assert_str_eq(pool_model_compare_y(&m), "");
        pool_model_free(&m);
    }
}
END_TEST

/* O that differs from D, for the parts that can. */
START_TEST(test_expert_parts_of_another_output_width_agree)
{
    pool_model m = {.T = 9, .D = 5, .O = 3, .K = 2, .dtype = MOE_DTYPE_F64, .parts = 4};
    m.part[0] = kinds[3], m.part[1] = kinds[2], m.part[2] = kinds[4], m.part[3] = kinds[5];
    pool_model_make(&m, NULL, 5);
    pool_model_run(&m);
    MUST(pool_model_forward(&m));
    MUST(pool_model_backward(&m));
    ck_assert_str_eq(pool_model_compare_y(&m), "");
    ck_assert_str_eq(pool_model_compare_gradients(&m), "");
    pool_model_free(&m);
}
END_TEST

/* The same bytes for 1 and 2 threads, in plain C and with the best instructions; with rows enough
 * to be cut. */
START_TEST(test_expert_parts_bytes_do_not_depend_on_threads_or_instructions)
{
    enum { T = 700, D = 6, K = 3 };
    static float y[T * D], dx[T * D], dw[T * K];
    double *first = NULL;
    for (int run = 0; run < 3; run++) {
        pool_model m;
        moe_context_config k;
        moe_context *context = NULL;
        int64_t count;
        describe(&m, 8, MOE_DTYPE_F32);
        m.T = T;
        MUST(moe_context_config_init(&k, sizeof k));
        k.threads = run == 1 ? 2 : 1;
        k.isa = run == 2 ? MOE_ISA_PLAIN : MOE_ISA_AUTO;
        MUST(moe_context_create(&context, &k));
        pool_model_make(&m, context, 5);
        MUST(pool_model_forward(&m));
        MUST(pool_model_backward(&m));
        double *g = pool_model_gradient(&m.part[2], MODEL_W3, &count);
        if (run == 0) {
            memcpy(y, m.lib_y, sizeof y), memcpy(dx, m.lib_dx, sizeof dx);
            memcpy(dw, m.lib_dw, sizeof dw);
            first = g;
        } else {
            ck_assert_mem_eq(m.lib_y, y, sizeof y);
            ck_assert_mem_eq(m.lib_dx, dx, sizeof dx);
            ck_assert_mem_eq(m.lib_dw, dw, sizeof dw);
            ck_assert_mem_eq(g, first, (size_t)count * sizeof *g);
            free(g);
        }
        pool_model_free(&m);
    }
    free(first);
}
END_TEST

/* A part gives in the pool what it gives alone, byte for byte, and goes on working by itself. */
START_TEST(test_expert_parts_part_alone_gives_the_same_bytes)
{
    pool_model m;
    moe_plan_args a;
    moe_plan *plan = NULL;
    moe_pass *pass = NULL;
    float y[23 * 6], alone[23 * 6];
    int32_t ids[23 * 3], shifted[23 * 3];
    float weights[23 * 3];
    describe(&m, 1, MOE_DTYPE_F32); /* 3, 2 and 4 experts */
    pool_model_make(&m, NULL, 5);
    for (int n = 0; n < 23 * 3; n++) {
        ids[n] = n % 4, shifted[n] = 5 + n % 4;
        weights[n] = (float)m.w[n];
    }
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = 23, a.top_k = 3, a.weights = weights, a.num_experts = 9, a.expert_ids = shifted;
    MUST(moe_plan_build(m.plan, &a));
    MUST(pool_model_forward(&m));
    memcpy(y, m.lib_y, sizeof y);
    a.num_experts = 4, a.expert_ids = ids;
    MUST(moe_plan_create(&plan, m.context));
    MUST(moe_plan_build(plan, &a));
    MUST(moe_pass_create_for_experts(&pass, m.part[2].pool, NULL));
    m.f.plan = plan, m.f.y = alone;
    MUST(moe_experts_forward(m.part[2].pool, pass, &m.f));
    MUST(moe_experts_backward(m.part[2].pool, pass, &m.b));
    ck_assert_mem_eq(y, alone, sizeof y);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_forward(m.pool, pass, &m.f));
    moe_pass_destroy(pass), moe_plan_destroy(plan);
    pool_model_free(&m);
}
END_TEST

/* ---- parameters ------------------------------------------------------------------------------ */

static moe_parameter_record record_of(const moe_experts *pool, const char *name)
{
    moe_parameter_record r;
    int64_t index = moe_experts_parameter_find(pool, name);
    ck_assert_msg(index >= 0, "no parameter %s", name);
    MUST(moe_parameter_record_init(&r, sizeof r));
    MUST(moe_experts_parameter(pool, index, &r));
    ck_assert_str_eq(r.name, name);
    return r;
}

START_TEST(test_expert_parts_names_are_the_parts)
{
    static const char *const names[] = {"0.w1",  "0.b1",  "0.w2", "0.b2",
                                        "2.w13", "2.b13", "2.w2", "2.b2"};
    pool_model m = {.T = 1, .D = 6, .O = 6, .K = 1, .parts = 3};
    moe_layer_config l;
    moe_layer *layer = NULL;
    moe_parameter_record r;
    char text[64];
    m.part[0] = kinds[0], m.part[1] = kinds[1], m.part[2] = kinds[2];
    pool_model_make(&m, NULL, 5);
    MUST(moe_layer_config_init(&l, sizeof l));
    l.experts = m.pool;
    MUST(moe_layer_create(&layer, &l));
    ck_assert_int_eq(moe_experts_parameter_count(m.pool), 8);
    ck_assert_int_eq(moe_layer_parameter_count(layer), 8);
    MUST(moe_parameter_record_init(&r, sizeof r));
    for (int i = 0; i < 8; i++) {
        moe_parameter_record in_pool = record_of(m.pool, names[i]);
        moe_parameter_record in_part = record_of(m.part[names[i][0] - '0'].pool, names[i] + 2);
        (void)snprintf(text, sizeof text, "experts.%s", names[i]);
        ck_assert_int_eq(moe_experts_parameter_find(m.pool, names[i]), i);
        ck_assert_int_eq(moe_layer_parameter_find(layer, text), i);
        MUST(moe_layer_parameter(layer, i, &r));
        ck_assert_str_eq(r.name, text);
        ck_assert(r.data == in_part.data && in_pool.data == in_part.data &&
                  in_pool.grad == in_part.grad && in_pool.element_count == in_part.element_count);
        ck_assert_int_eq(in_pool.shape[0], names[i][0] == '0' ? 2 : 3);
    }
    ck_assert_int_eq(moe_experts_parameter_find(m.pool, "w1"), -1);
    ck_assert_int_eq(moe_experts_parameter_find(m.pool, "1.w1"), -1);
    ck_assert_int_eq(moe_experts_parameter_find(m.pool, "0.w3"), -1);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_parameter(m.pool, 8, &r));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_parameter(layer, 8, &r));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(m.pool, 8, NULL));
    moe_layer_destroy(layer);
    pool_model_free(&m);
}
END_TEST

/* Binding through the pool binds the part; what is not bound is named by the pool's name. */
START_TEST(test_expert_parts_binding_is_the_parts)
{
    static float memory[200];
    pool_model m = {.T = 2, .D = 6, .O = 6, .K = 1, .parts = 2};
    moe_binding b;
    m.part[0] = kinds[7], m.part[1] = kinds[0];
    pool_model_make(&m, NULL, 5);
    MUST(moe_binding_init(&b, sizeof b));
    b.data = memory;
    MUST(moe_experts_bind(m.pool, moe_experts_parameter_find(m.pool, "1.w2"), &b));
    ck_assert_ptr_eq(record_of(m.part[1].pool, "w2").data, memory);
    MUST(moe_experts_bind(m.part[1].pool, moe_experts_parameter_find(m.part[1].pool, "w2"), NULL));
    ck_assert_ptr_ne(record_of(m.pool, "1.w2").data, memory);

    moe_experts_config c;
    moe_experts *parts[2] = {m.part[0].pool, NULL}, *all = NULL;
    moe_pass *pass = NULL;
    c.struct_size = sizeof c;
    MUST(moe_experts_get_config(m.part[1].pool, &c));
    c.parameters = MOE_PARAMETERS_BOUND;
    MUST(moe_experts_create(&parts[1], m.context, &c));
    MUST(moe_experts_create_parts(&all, parts, 2));
    MUST(moe_pass_create_for_experts(&pass, all, NULL));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_experts_forward(all, pass, &m.f));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "1.w1"));
    moe_pass_destroy(pass), moe_experts_destroy(all), moe_experts_destroy(parts[1]);
    pool_model_free(&m);
}
END_TEST

/* init_parameters of the pool draws what the parts would draw alone. */
START_TEST(test_expert_parts_initial_numbers_are_the_parts)
{
    pool_model m = {.T = 1, .D = 6, .O = 6, .K = 1, .parts = 2};
    moe_experts *alone = NULL;
    moe_experts_config c;
    m.part[0] = kinds[0], m.part[1] = kinds[2];
    pool_model_make(&m, NULL, 5);
    MUST(moe_experts_init_parameters(m.pool, 99));
    for (int i = 0; i < 2; i++) {
        c.struct_size = sizeof c;
        MUST(moe_experts_get_config(m.part[i].pool, &c));
        MUST(moe_experts_create(&alone, m.context, &c));
        MUST(moe_experts_init_parameters(alone, 99));
        for (int64_t n = 0; n < moe_experts_parameter_count(alone); n++) {
            moe_parameter_record r, want;
            MUST(moe_parameter_record_init(&want, sizeof want));
            MUST(moe_experts_parameter(alone, n, &want));
            r = record_of(m.part[i].pool, want.name);
            ck_assert_mem_eq(r.data, want.data, (size_t)want.element_count * sizeof(float));
        }
        moe_experts_destroy(alone);
    }
    pool_model_free(&m);
}
END_TEST

/* ---- touched --------------------------------------------------------------------------------- */

static void fill(void *memory, size_t bytes) { memset(memory, 0x3c, bytes); }
static int is_filled(const void *memory, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if (((const unsigned char *)memory)[i] != 0x3c) return 0;
    return 1;
}
static int is_zero(const float *memory, int64_t count, int64_t step)
{
    for (int64_t i = 0; i < count; i++)
        if (memory[i * step] != 0) return 0;
    return 1;
}

/* Experts 1 and 4 of 2 + 3 get rows; expert 1 of part 0 and 2 of part 1 are touched. */
static void touch_two(pool_model *m)
{
    int32_t ids[4] = {1, 4, 4, 1};
    moe_plan_args a;
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = 4, a.top_k = 1, a.num_experts = 5, a.expert_ids = ids;
    MUST(moe_plan_build(m->plan, &a));
    m->b.entry_weight_grad = NULL;
    MUST(pool_model_forward(m));
    MUST(pool_model_backward(m));
}

static void expect_touched(const moe_experts *pool, const char *want)
{
    uint8_t touched[5];
    int64_t count, sum = 0;
    MUST(moe_experts_touched(pool, touched, &count));
    for (int64_t e = 0; want[e]; e++) {
        ck_assert_msg(touched[e] == want[e] - '0', "expert %d", (int)e);
        sum += touched[e];
    }
    ck_assert_int_eq(count, sum);
}

/* Gradients in memory with gaps, dense, and by expert: zeroed where touched, and nowhere else. */
START_TEST(test_expert_parts_zero_touched_gradients)
{
    enum { GAP = 3, W1_ROW = 2 * 5 + 1, W1_EXPERT = 6 * W1_ROW + 4 };
    static float w1[2 * W1_EXPERT], each[3][2 * 6 * 11];
    pool_model m = {.T = 4, .D = 6, .O = 6, .K = 1, .parts = 2};
    moe_layer_config l;
    moe_layer *layer = NULL;
    moe_gate_config g;
    moe_parameter_record of_gate;
    moe_binding b;
    m.part[0] = kinds[0], m.part[1] = kinds[2];
    pool_model_make(&m, NULL, 5);
    MUST(moe_layer_config_init(&l, sizeof l));
    MUST(moe_gate_config_init(&g, sizeof g));
    g.d_model = 6, g.num_experts = 5;
    MUST(moe_gate_create(&l.gate, m.context, &g));
    l.experts = m.pool;
    MUST(moe_layer_create(&layer, &l));
    moe_gate_destroy(l.gate);
    MUST(moe_parameter_record_init(&of_gate, sizeof of_gate));
    MUST(moe_layer_parameter(layer, 0, &of_gate));
    ck_assert_str_eq(of_gate.name, "gate.weight");
    MUST(moe_binding_init(&b, sizeof b));
    b.data = record_of(m.pool, "0.w1").data, b.grad = w1;
    b.grad_stride[0] = W1_EXPERT, b.grad_stride[1] = W1_ROW, b.grad_stride[2] = 2;
    MUST(moe_experts_bind(m.pool, moe_experts_parameter_find(m.pool, "0.w1"), &b));
    void *pointers[3] = {NULL, each[1], each[2]};
    MUST(moe_binding_init(&b, sizeof b));
    b.data = record_of(m.pool, "1.w13").data, b.grad_per_expert = pointers;
    MUST(moe_experts_bind(m.pool, moe_experts_parameter_find(m.pool, "1.w13"), &b));
    float *w2 = record_of(m.pool, "0.w2").grad, *b2 = record_of(m.pool, "1.b2").grad;
    for (int turn = 0; turn < 2; turn++) {
        touch_two(&m);
        expect_touched(m.pool, "01001");
        expect_touched(m.part[0].pool, "01");
        expect_touched(m.part[1].pool, "001");
        fill(w1, sizeof w1), fill(each, sizeof each), fill(w2, 2 * 30 * 4), fill(b2, 3 * 6 * 4);
        fill(of_gate.grad, 6 * 5 * 4);
        if (turn == 0)
            MUST(moe_experts_zero_touched_gradients(m.pool, NULL));
        else
            MUST(moe_layer_zero_touched_gradients(layer, NULL));
        ck_assert(turn ? is_zero(of_gate.grad, 30, 1) : is_filled(of_gate.grad, 6 * 5 * 4));
        ck_assert(is_filled(w1, W1_EXPERT * 4) && is_filled(each[0], 2 * sizeof each[0]));
        ck_assert(is_filled(w2, 30 * 4) && is_filled(b2, 2 * 6 * 4));
        for (int i = 0; i < 6; i++) {
            float *row = w1 + W1_EXPERT + i * W1_ROW;
            ck_assert(is_zero(row, 5, 2));
            for (int j = 0; j < 5; j++) ck_assert(is_filled(row + 2 * j + 1, 4));
        }
        ck_assert(is_zero(each[2], 2 * 6 * 11, 1));
        ck_assert(is_zero(w2 + 30, 30, 1) && is_zero(b2 + 12, 6, 1));
        expect_touched(m.pool, "00000");
        fill(w2, 2 * 30 * 4); /* none is touched: none is written */
        MUST(moe_experts_zero_touched_gradients(m.pool, NULL));
        ck_assert(is_filled(w2, 2 * 30 * 4));
    }
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_zero_touched_gradients(NULL, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_zero_touched_gradients(NULL, NULL));
    touch_two(&m);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_zero_touched_gradients(m.pool, w1));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "stream"));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_zero_touched_gradients(layer, w1));
    expect_touched(m.pool, "01001");
    MUST(moe_experts_zero_gradients(m.part[0].pool, NULL)); /* of the part: it forgets its own */
    expect_touched(m.pool, "00001");
    MUST(moe_experts_zero_gradients(m.pool, NULL));
    expect_touched(m.pool, "00000");
    ck_assert(is_zero(w2, 2 * 30, 1) && is_zero(each[1], 2 * 6 * 11, 1));
    moe_layer_destroy(layer);
    pool_model_free(&m);
}
END_TEST

/* ---- one backward at a time ------------------------------------------------------------------ */

typedef struct second {
    moe_experts *pool;
    moe_pass *pass;
    moe_backward_args b;
    moe_status got;
} second;

static void try_backward(void *argument)
{
    second *s = argument;
    s->got = moe_experts_backward(s->pool, s->pass, &s->b);
}

/* From inside the backward of a host's expert: neither the pool nor any part of it can start
 * another; afterwards they can. And a pool whose second part is busy leaves its first one free. */
START_TEST(test_expert_parts_one_backward_at_a_time)
{
    pool_model m = {.T = 4, .D = 6, .O = 6, .K = 1, .parts = 2};
    moe_experts *reversed = NULL, *other = NULL;
    static float y[24], dy[24], dx[24];
    m.part[0] = kinds[0], m.part[1] = kinds[3];
    m.part[0].E = 1, m.part[1].E = 1;
    pool_model_make(&m, NULL, 5);
    moe_experts *parts[2] = {m.part[1].pool, m.part[0].pool};
    moe_experts_config c;
    c.struct_size = sizeof c;
    MUST(moe_experts_get_config(m.part[0].pool, &c));
    MUST(moe_experts_create(&other, m.context, &c));
    moe_experts *mixed[2] = {other, m.part[0].pool}, *with_other = NULL;
    MUST(moe_experts_create_parts(&reversed, parts, 2));
    MUST(moe_experts_create_parts(&with_other, mixed, 2));
    moe_experts *const tried[] = {m.pool, reversed, m.part[0].pool, with_other, other};
    for (size_t i = 0; i < COUNT(tried); i++) {
        second s = {.pool = tried[i], .b = m.b};
        moe_forward_args f = m.f;
        MUST(moe_pass_create_for_experts(&s.pass, tried[i], NULL));
        f.y = y;
        s.b.dy = dy, s.b.dx = dx, s.b.entry_weight_grad = NULL;
        if (tried[i] == m.part[0].pool || tried[i] == other) f.plan = NULL;
        MUST(moe_experts_forward(tried[i], s.pass, &f));
        MUST(pool_model_forward(&m));
        m.part[1].during = try_backward, m.part[1].during_argument = &s;
        MUST(pool_model_backward(&m));
        m.part[1].during = NULL;
        ck_assert_int_eq(s.got, tried[i] == other ? MOE_OK : MOE_ERROR_INVALID_STATE);
        MUST(moe_experts_backward(tried[i], s.pass, &s.b));
        moe_pass_destroy(s.pass);
    }
    moe_experts_destroy(with_other), moe_experts_destroy(reversed), moe_experts_destroy(other);
    pool_model_free(&m);
}
END_TEST

/* Parts, pool, layer and pass go in any order. */
START_TEST(test_expert_parts_are_destroyed_in_any_order)
{
    for (int order = 0; order < 3; order++) {
        pool_model m = {.T = 3, .D = 6, .O = 6, .K = 2, .parts = 2};
        m.part[0] = kinds[0], m.part[1] = kinds[2];
        pool_model_make(&m, NULL, 5);
        moe_experts *const parts[2] = {m.part[0].pool, m.part[1].pool};
        moe_experts *again = NULL;
        MUST(moe_experts_create_parts(&again, parts, 2));
        if (order == 0) moe_experts_destroy(again);
        for (int i = 0; i < 2; i++) {
            moe_experts_destroy(m.part[i].pool);
            m.part[i].pool = NULL;
        }
        MUST(pool_model_forward(&m));
        MUST(pool_model_backward(&m));
        ck_assert_int_eq(moe_experts_parameter_find(m.pool, "1.w2"), 6);
        if (order == 1) moe_experts_destroy(again);
        moe_pass *pass = NULL;
        if (order == 2) {
            MUST(moe_pass_create_for_experts(&pass, again, NULL));
            moe_experts_destroy(again);
            MUST(moe_pass_reserve(pass, 5, 1, 2));
        }
        moe_pass_destroy(pass);
        pool_model_free(&m);
    }
}
END_TEST

/* ---- in a layer ------------------------------------------------------------------------------ */

/* A gate before every mixture: the library's own check finds nothing, in both numberings of the
 * parameters, and leaves the gradients of the host's experts alone. */
START_TEST(test_expert_parts_gradient_check_agrees)
{
    pool_model m;
    moe_gate_config g;
    moe_layer_config l;
    moe_gate *gate = NULL;
    moe_layer *layer = NULL;
    moe_gradient_check check;
    moe_gradient_report report;
    int64_t host = 0;
    describe(&m, _i, MOE_DTYPE_F32);
    pool_model_make(&m, NULL, 5);
    MUST(moe_gate_config_init(&g, sizeof g));
    g.d_model = 6, g.num_experts = m.E, g.top_k = m.E > 1 ? 2 : 1, g.importance_weight = 0.1;
    MUST(moe_gate_create(&gate, m.context, &g));
    MUST(moe_gate_init_parameters(gate, 3));
    MUST(moe_layer_config_init(&l, sizeof l));
    l.gate = gate, l.experts = m.pool;
    MUST(moe_layer_create(&layer, &l));
    MUST(moe_gradient_check_init(&check, sizeof check));
    MUST(moe_gradient_report_init(&report, sizeof report));
    for (int i = 0; i < m.parts; i++) host += m.part[i].kind == MOE_EXPERTS_CALLBACK;
    check.probes = 8;
    for (int current = 0; current < 2; current++) {
        check.parameters = current ? MOE_CHECK_CURRENT : MOE_CHECK_DRAWN;
        MUST(moe_check_gradients(layer, &check, &report));
        ck_assert_int_eq(report.tensors, 1 + moe_layer_parameter_count(layer));
        ck_assert_int_eq(report.disagreements, 0);
        ck_assert_int_gt(report.probes, report.kinks);
    }
    for (int i = 0; i < m.parts; i++)
        for (int64_t n = 0; m.part[i].host_d[0] && n < pool_model_elements(&m.part[i], 0); n++)
            ck_assert_double_eq(m.part[i].host_d[0][n], 0);
    ck_assert_int_eq(host > 0, _i == 3 || _i >= 8);
    moe_layer_destroy(layer), moe_gate_destroy(gate);
    pool_model_free(&m);
}
END_TEST

/* Through a layer with a gate: the plan's weights, so the model's with them. */
START_TEST(test_expert_parts_in_a_layer_agree)
{
    pool_model m;
    moe_layer_config l;
    moe_layer *layer = NULL;
    moe_pass *pass = NULL;
    describe(&m, _i, MOE_DTYPE_F64);
    pool_model_make(&m, NULL, 5);
    pool_model_run(&m);
    MUST(moe_layer_config_init(&l, sizeof l));
    l.experts = m.pool;
    MUST(moe_layer_create(&layer, &l));
    MUST(moe_pass_create(&pass, layer, NULL));
    MUST(moe_layer_forward(layer, pass, &m.f));
    ck_assert_str_eq(pool_model_compare_y(&m), "");
    MUST(moe_layer_backward(layer, pass, &m.b));
    ck_assert_str_eq(pool_model_compare_gradients(&m), "");
    moe_pass_destroy(pass), moe_layer_destroy(layer);
    pool_model_free(&m);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("expert_parts");
    TCase *tests = tcase_create("parts");
    tcase_set_timeout(tests, 240);
    tcase_add_loop_test(tests, test_expert_parts_agree, 0, (int)COUNT(mixtures));
    tcase_add_test(tests, test_expert_parts_of_another_output_width_agree);
    tcase_add_test(tests, test_expert_parts_bytes_do_not_depend_on_threads_or_instructions);
    tcase_add_test(tests, test_expert_parts_part_alone_gives_the_same_bytes);
    tcase_add_test(tests, test_expert_parts_names_are_the_parts);
    tcase_add_test(tests, test_expert_parts_binding_is_the_parts);
    tcase_add_test(tests, test_expert_parts_initial_numbers_are_the_parts);
    tcase_add_test(tests, test_expert_parts_zero_touched_gradients);
    tcase_add_test(tests, test_expert_parts_one_backward_at_a_time);
    tcase_add_test(tests, test_expert_parts_are_destroyed_in_any_order);
    tcase_add_loop_test(tests, test_expert_parts_gradient_check_agrees, 0, (int)COUNT(mixtures));
    tcase_add_loop_test(tests, test_expert_parts_in_a_layer_agree, 0, (int)COUNT(mixtures));
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
