/* check_experts.c - the sentences of experts.h and parameter.h: what the pool's calls refuse and
 * leave alone, records and bindings, gradients that are not wanted, touched experts, pools that
 * are shared. */
#include "support/bad_fields.h"
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A pool's own calls with a host's plan. */
static const layer_case base = {.name = "pool",
                                .T = 12,
                                .D = 6,
                                .E = 5,
                                .F = 7,
                                .K = 2,
                                .O = 4,
                                .replay = 2,
                                .no_gate = 2,
                                .expert_bias = 1,
                                .activation = MOE_ACTIVATION_SWIGLU};

/* ---- creation -------------------------------------------------------------------------------- */

#define I(field, value) BAD_INTEGER(moe_experts_config, field, value, INVALID_ARGUMENT)
#define N(field, value) BAD_INTEGER(moe_experts_config, field, value, NOT_SUPPORTED)
#define R(field, value, status) BAD_DOUBLE(moe_experts_config, field, value, status)
static const bad_field bad_configs[] = {
    BAD_INTEGER(moe_experts_config, struct_size, 3, STRUCT_SIZE),
    BAD_INTEGER(moe_experts_config, struct_size, 24, STRUCT_TOO_OLD),
    I(d_model, 0),
    I(d_model, -3),
    I(d_hidden, 0),
    I(d_hidden, -3),
    I(d_out, 0),
    I(d_out, -2),
    I(num_experts, 0),
    I(num_experts, -1),
    I(num_experts, (int64_t)1 << 31),
    I(activation, 4),
    I(activation, 15),
    I(activation, 20),
    I(activation, -1),
    I(bias, 2),
    I(bias, -1),
    I(glu_order, 4),
    I(glu_order, -1),
    I(glu_order, MOE_GLU_GATE_UP) /* ReLU is not gated */,
    I(weight_layout, 2),
    I(weight_layout, -1),
    I(storage, 3),
    I(storage, -1),
    I(dtype, -1),
    I(dtype, 5),
    I(dtype, MOE_DTYPE_I64),
    I(dtype, MOE_DTYPE_F16 + 1),
    I(output, 2),
    I(output, -1),
    I(weight_position, -1),
    I(weight_position, 3),
    R(activation_alpha, 1.5, INVALID_ARGUMENT) /* ReLU has none of the three */,
    R(activation_limit, 7, INVALID_ARGUMENT),
    R(activation_offset, 1, INVALID_ARGUMENT),
    R(activation_alpha, -1, INVALID_ARGUMENT),
    R(activation_limit, NAN, INVALID_ARGUMENT),
    R(activation_offset, INFINITY, INVALID_ARGUMENT),
    I(kind, -1),
    I(kind, 3),
    I(reserved2, 1),
    I(d_hidden, 0),
    I(parameters, -1),
    I(parameters, 3),
    I(reserved, 1),
    R(init_std, NAN, INVALID_ARGUMENT),
    R(init_std, -2, INVALID_ARGUMENT),
    R(init_std, INFINITY, INVALID_ARGUMENT)};
#undef I
#undef N
#undef R

START_TEST(test_experts_create_refuses_bad_fields)
{
    moe_context *context = NULL;
    moe_experts_config good;
    MUST(moe_context_create(&context, NULL));
    MUST(moe_experts_config_init(&good, sizeof good));
    good.d_model = 8, good.d_hidden = 6, good.num_experts = 4;
    for (size_t i = 0; i < COUNT(bad_configs); i++) {
        moe_experts_config config = good;
        moe_experts *untouched = (moe_experts *)(uintptr_t)16, *pool = untouched;
        bad_field_put(&bad_configs[i], &config);
        const char *complaint = bad_field_complaint(&bad_configs[i],
                                                    moe_experts_create(&pool, context, &config));
        ck_assert_msg(complaint[0] == 0, "moe_experts_create: %s", complaint);
        ck_assert_ptr_eq(pool, untouched);
    }
    moe_experts *pool = NULL;
    MUST(moe_experts_create(&pool, context, &good));
    MUST(moe_experts_get_config(pool, &good));
    ck_assert_int_eq(good.d_out, 8); /* MOE_SAME */
    MUST(moe_experts_weights_changed(pool));
    moe_experts_destroy(pool), moe_context_destroy(context);
}
END_TEST

START_TEST(test_experts_calls_refuse_null)
{
    layer_case c = base;
    layer_run r;
    moe_experts *pool = NULL;
    moe_pass *pass = NULL;
    moe_experts_config e;
    moe_parameter_record record;
    uint8_t touched[5] = {7, 7, 7, 7, 7};
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_parameter_record_init(&record, sizeof record));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create(NULL, r.context, &e));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create(&pool, NULL, &e));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create(&pool, r.context, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_get_config(NULL, &e));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_get_config(r.experts, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_forward(NULL, r.pass, &r.f));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_forward(r.experts, NULL, &r.f));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_forward(r.experts, r.pass, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_backward(NULL, r.pass, &r.b));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_backward(r.experts, NULL, &r.b));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_backward(r.experts, r.pass, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_weights_changed(NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_touched(NULL, touched, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_touched(r.experts, NULL, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_zero_gradients(NULL, NULL));
    if (!ON_DEVICE) /* which takes any stream */
        REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_zero_gradients(r.experts, r.x));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_init_parameters(NULL, 1));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(NULL, 0, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_parameter(NULL, 0, &record));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_parameter(r.experts, 0, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_parameter(r.experts, -1, &record));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_parameter(r.experts, 6, &record));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "6"));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_pass_create_for_experts(NULL, r.experts, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_pass_create_for_experts(&pass, NULL, NULL));
    ck_assert_int_eq(moe_experts_parameter_count(NULL), 0);
    ck_assert_int_eq(moe_experts_parameter_find(NULL, "w1"), -1);
    ck_assert_int_eq(moe_experts_parameter_find(r.experts, NULL), -1);
    ck_assert(touched[0] == 7 && !pool && !pass);
    moe_experts_destroy(NULL);
    layer_run_end(&r, &c);
}
END_TEST

/* ---- forward and backward -------------------------------------------------------------------- */

static int some_number;
#define I(field, value) BAD_INTEGER(moe_forward_args, field, value, INVALID_ARGUMENT)
#define P(field, value) BAD_POINTER(moe_forward_args, field, value, INVALID_ARGUMENT)
static const bad_field bad_forwards[] = {BAD_INTEGER(moe_forward_args, struct_size, 0, STRUCT_SIZE),
                                         I(flags, 1 << 12),
                                         I(tokens, -5),
                                         I(tokens, 11),
                                         I(tokens, 13),
                                         I(x_stride, 5),
                                         I(x_stride, -6),
                                         I(y_stride, 3),
                                         I(y_stride, -4),
                                         P(x, NULL),
                                         P(y, NULL),
                                         P(plan, NULL),
#ifndef MOE_TEST_DEVICE /* which takes any stream */
                                         P(stream, &some_number),
#endif
                                         I(reserved, 1),
                                         I(plan_use, 3),
                                         I(top_k, 2),
                                         I(capacity, 3),
                                         I(groups, 2),
                                         I(groups, -1)};
#undef I
#undef P
#define I(field, value) BAD_INTEGER(moe_backward_args, field, value, INVALID_ARGUMENT)
#define P(field, value) BAD_POINTER(moe_backward_args, field, value, INVALID_ARGUMENT)
static const bad_field bad_backwards[] = {
    BAD_INTEGER(moe_backward_args, struct_size, 9, STRUCT_TOO_OLD),
    I(flags, 1 << 7),
    I(dx_stride, 5),
    I(dx_stride, -6),
    I(dy_stride, 3),
    I(dy_stride, -1),
    P(dy, NULL),
#ifndef MOE_TEST_DEVICE
    P(stream, &some_number),
#endif
    P(d_gate_x, &some_number),
    P(d_logits_out, &some_number)};
#undef I
#undef P

START_TEST(test_experts_forward_and_backward_refuse_bad_fields)
{
    layer_case c = base;
    layer_run r;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    REFUSED(MOE_ERROR_INVALID_STATE, layer_run_backward(&r));
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    uint64_t before = layer_run_hash(&r);
    for (size_t i = 0; i < COUNT(bad_forwards); i++) {
        moe_forward_args good = r.f;
        bad_field_put(&bad_forwards[i], &r.f);
        const char *complaint = bad_field_complaint(&bad_forwards[i], layer_run_forward(&r));
        ck_assert_msg(complaint[0] == 0, "moe_experts_forward: %s", complaint);
        r.f = good;
        MUST(moe_experts_zero_gradients(r.experts, NULL));
        MUST(layer_run_backward(&r));
        ck_assert_msg(layer_run_hash(&r) == before, "%s: something was written",
                      bad_forwards[i].name);
    }
    for (size_t i = 0; i < COUNT(bad_backwards); i++) {
        moe_backward_args good = r.b;
        bad_field_put(&bad_backwards[i], &r.b);
        const char *complaint = bad_field_complaint(&bad_backwards[i], layer_run_backward(&r));
        ck_assert_msg(complaint[0] == 0, "moe_experts_backward: %s", complaint);
        ck_assert_msg(layer_run_hash(&r) == before, "%s: something was written",
                      bad_backwards[i].name);
        r.b = good;
    }
    r.f.y = r.x;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_forward(&r));
    r.b.dy = r.dx;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_backward(&r));
    layer_run_end(&r, &c);
}
END_TEST

/* Plans for another number of experts, or of another dtype. */
START_TEST(test_experts_forward_refuses_plans_that_do_not_fit)
{
    layer_case c = base;
    layer_run r;
    moe_plan_args a;
    static const int32_t ids[24] = {0};
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = 12, a.num_experts = 4, a.top_k = 2, a.expert_ids = ids;
    MUST(moe_plan_build(r.plan, &a));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_forward(&r));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "4 experts"));
    a.num_experts = 5, a.dtype = MOE_DTYPE_F64;
    MUST(moe_plan_build(r.plan, &a));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_forward(&r));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "dtype"));
    layer_run_end(&r, &c);
}
END_TEST

/* moe_experts_forward is the plain weighted sum, also through the pass of a layer with an output
 * function. */
START_TEST(test_experts_forward_through_a_layers_pass_is_the_plain_sum)
{
    layer_case c = base;
    layer_run r;
    moe_layer_config l;
    moe_layer *layer = NULL;
    moe_pass *pass = NULL;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(layer_run_forward(&r));
    size_t bytes = 12 * 4 * sizeof(float);
    float *y = malloc(bytes);
    ck_assert_ptr_nonnull(y);
    memcpy(y, r.y, bytes);
    MUST(moe_layer_config_init(&l, sizeof l));
    l.experts = r.experts, l.output = MOE_OUTPUT_SIGMOID;
    MUST(moe_layer_create(&layer, &l));
    MUST(moe_pass_create(&pass, layer, NULL));
    MUST(moe_experts_forward(r.experts, pass, &r.f));
    ck_assert_mem_eq(r.y, y, bytes);
    moe_pass_destroy(pass), moe_layer_destroy(layer);
    free(y);
    layer_run_end(&r, &c);
}
END_TEST

/* No tokens: no pointers needed; overwriting sets every gradient to 0. */
START_TEST(test_experts_without_tokens_need_no_pointers)
{
    layer_case c = base;
    layer_run r;
    moe_plan_args a;
    moe_backward_args b;
    int64_t count;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    MUST(moe_plan_args_init(&a, sizeof a));
    a.num_experts = 5;
    MUST(moe_plan_build(r.plan, &a));
    MUST(moe_forward_args_init(&r.f, sizeof r.f));
    r.f.plan = r.plan;
    MUST(moe_experts_forward(r.experts, r.pass, &r.f));
    MUST(moe_backward_args_init(&b, sizeof b));
    MUST(moe_experts_backward(r.experts, r.pass, &b));
    double *before = layer_run_gradient(&r, "dW2", &count);
    b.flags = MOE_BACKWARD_OVERWRITE;
    MUST(moe_experts_backward(r.experts, r.pass, &b));
    double *after = layer_run_gradient(&r, "dW2", &count), sum = 0;
    for (int64_t i = 0; i < count; i++) {
        sum += fabs(before[i]);
        ck_assert_double_eq(after[i], 0);
    }
    ck_assert_double_gt(sum, 0);
    free(before), free(after);
    layer_run_end(&r, &c);
}
END_TEST

/* ---- parameters ------------------------------------------------------------------------------ */

static moe_experts *new_pool(moe_context *context, int32_t dtype, int32_t glu, int32_t layout)
{
    moe_experts *pool = NULL;
    moe_experts_config e;
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = 3, e.d_hidden = 6, e.d_out = 5, e.num_experts = 2, e.bias = 1,
    e.activation = MOE_ACTIVATION_SWIGLU;
    e.glu_order = glu, e.weight_layout = layout, e.dtype = dtype;
    MUST(moe_experts_create(&pool, context, &e));
    MUST(moe_experts_init_parameters(pool, 77));
    return pool;
}

static moe_parameter_record record_of(const moe_experts *pool, const char *name)
{
    moe_parameter_record record;
    int64_t index = moe_experts_parameter_find(pool, name);
    ck_assert_msg(index >= 0, "no parameter %s", name);
    MUST(moe_parameter_record_init(&record, sizeof record));
    MUST(moe_experts_parameter(pool, index, &record));
    ck_assert_str_eq(record.name, name);
    return record;
}

START_TEST(test_experts_records_name_and_shape_every_parameter)
{
    static const struct {
        int32_t glu, layout, count;
        const char *name;
        int64_t shape[3];
    } want[] = {
        {MOE_GLU_SEPARATE, 0, 6, "w1", {2, 3, 6}},     {MOE_GLU_SEPARATE, 1, 6, "w3", {2, 6, 3}},
        {MOE_GLU_SEPARATE, 1, 6, "b3", {2, 6, 1}},     {MOE_GLU_SEPARATE, 0, 6, "w2", {2, 6, 5}},
        {MOE_GLU_SEPARATE, 1, 6, "w2", {2, 5, 6}},     {MOE_GLU_SEPARATE, 1, 6, "b2", {2, 5, 1}},
        {MOE_GLU_GATE_UP, 0, 4, "w13", {2, 3, 12}},    {MOE_GLU_UP_GATE, 1, 4, "w13", {2, 12, 3}},
        {MOE_GLU_INTERLEAVED, 0, 4, "b13", {2, 12, 1}}};
    moe_context *context = NULL;
    MUST(moe_context_create(&context, NULL));
    for (size_t i = 0; i < COUNT(want); i++) {
        moe_experts *pool = new_pool(context, MOE_DTYPE_F32, want[i].glu, want[i].layout);
        moe_parameter_record record = record_of(pool, want[i].name);
        ck_assert_int_eq(moe_experts_parameter_count(pool), want[i].count);
        int64_t elements = 1;
        for (int d = 0; d < 3; d++) {
            ck_assert_int_eq(record.shape[d], want[i].shape[d]);
            ck_assert_int_eq(record.global_shape[d], want[i].shape[d]);
            ck_assert_int_eq(record.global_offset[d], 0);
            elements *= want[i].shape[d];
        }
        ck_assert_int_eq(record.element_count, elements);
        ck_assert_int_eq(record.dims, want[i].shape[2] == 1 ? 2 : 3);
        ck_assert_int_eq(record.sharding, MOE_SHARD_EXPERT);
        ck_assert(record.owned && record.trainable && !record.opaque && record.data && record.grad);
        ck_assert_int_eq(record.data_stride[0], elements / 2);
        ck_assert_int_eq(record.data_stride[record.dims - 1], 1);
        moe_experts_destroy(pool);
    }
    moe_context_destroy(context);
}
END_TEST

/* The same seed gives an element the same number in every layout, order and dtype. */
START_TEST(test_experts_initial_numbers_do_not_depend_on_layout)
{
    moe_context *context = NULL;
    MUST(moe_context_create(&context, NULL));
    moe_experts *plain = new_pool(context, MOE_DTYPE_F32, MOE_GLU_SEPARATE, MOE_WEIGHT_IN_OUT);
    const float *w1 = record_of(plain, "w1").data, *w3 = record_of(plain, "w3").data,
                *w2 = record_of(plain, "w2").data;
    for (int32_t glu = MOE_GLU_SEPARATE; glu <= MOE_GLU_INTERLEAVED; glu++)
        for (int32_t layout = 0; layout < 2; layout++) {
            moe_experts *pool = new_pool(context, REAL, glu, layout);
            int fused = glu != MOE_GLU_SEPARATE;
            const scalar *up = fused ? NULL : record_of(pool, "w3").data,
                         *two = record_of(pool, "w2").data;
            const scalar *gate = record_of(pool, fused ? "w13" : "w1").data;
            int64_t width = fused ? 12 : 6;
            for (int64_t n = 0; n < 36; n++) {
                int64_t e = n / 18, i = n / 6 % 3, j = n % 6;
                int64_t first = glu == MOE_GLU_UP_GATE       ? 6 + j
                                : glu == MOE_GLU_INTERLEAVED ? 2 * j
                                                             : j;
                int64_t second = glu == MOE_GLU_UP_GATE       ? j
                                 : glu == MOE_GLU_INTERLEAVED ? 2 * j + 1
                                 : glu                        ? 6 + j
                                                              : j;
                int64_t at1 = e * 3 * width + (layout ? first * 3 + i : i * width + first);
                int64_t at3 = e * 3 * width + (layout ? second * 3 + i : i * width + second);
                ck_assert_double_eq((double)gate[at1], (double)w1[n]);
                ck_assert_double_eq((double)(fused ? gate : up)[at3], (double)w3[n]);
            }
            for (int64_t n = 0; n < 60; n++) {
                int64_t e = n / 30, i = n / 5 % 6, j = n % 5;
                ck_assert_double_eq((double)two[layout ? e * 30 + j * 6 + i : n], (double)w2[n]);
            }
            moe_experts_destroy(pool);
        }
    moe_experts_destroy(plain), moe_context_destroy(context);
}
END_TEST

static float host_memory[200];
static void *pointers[2] = {host_memory, NULL};
#define I(field, value, status) BAD_INTEGER(moe_binding, field, value, status)
#define P(field, value) BAD_POINTER(moe_binding, field, value, INVALID_ARGUMENT)
static const bad_field bad_bindings[] = {BAD_INTEGER(moe_binding, struct_size, 1, STRUCT_SIZE),
                                         P(data, NULL),
                                         P(data_per_expert, pointers),
                                         I(data_dtype, 99, INVALID_ARGUMENT),
                                         I(data_dtype, MOE_DTYPE_F64, NOT_SUPPORTED),
                                         I(data_dtype, MOE_DTYPE_I32, INVALID_ARGUMENT),
                                         I(grad_dtype, -1, INVALID_ARGUMENT),
                                         I(grad_dtype, MOE_DTYPE_BF16, NOT_SUPPORTED)};
#undef I
#undef P

START_TEST(test_experts_bind_refuses_bad_fields)
{
    moe_context *context = NULL;
    moe_binding good, b;
    float *data = calloc(400, sizeof *data), *grad = data + 200;
    ck_assert_ptr_nonnull(data);
    MUST(moe_context_create(&context, NULL));
    moe_experts *pool = new_pool(context, MOE_DTYPE_F32, MOE_GLU_SEPARATE, MOE_WEIGHT_IN_OUT);
    int64_t w1 = moe_experts_parameter_find(pool, "w1");
    void *own = record_of(pool, "w1").data;
    MUST(moe_binding_init(&good, sizeof good));
    good.data = data, good.grad = grad;
    for (size_t i = 0; i < COUNT(bad_bindings); i++) {
        b = good;
        bad_field_put(&bad_bindings[i], &b);
        const char *complaint = bad_field_complaint(&bad_bindings[i],
                                                    moe_experts_bind(pool, w1, &b));
        ck_assert_msg(strstr(complaint, "status") == NULL, "moe_experts_bind: %s", complaint);
        ck_assert_ptr_eq(record_of(pool, "w1").data, own);
    }
    b = good, b.grad = data; /* the same memory */
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(pool, w1, &b));
    b = good, b.data = NULL, b.data_per_expert = (const void *const *)pointers;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(pool, w1, &b)); /* expert 1 has none */
    b = good, b.data_stride[0] = 18, b.data_stride[1] = 5,
    b.data_stride[2] = 1; /* rows of 6 overlap */
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(pool, w1, &b));
    b = good, b.data_stride[1] = 6, b.data_stride[2] = 1; /* experts in one place */
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(pool, w1, &b));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(pool, 6, &good));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(pool, -1, &good));
    ck_assert_ptr_eq(record_of(pool, "w1").data, own);
    MUST(moe_experts_bind(pool, w1, &good));
    ck_assert_ptr_eq(record_of(pool, "w1").data, data);
    ck_assert_int_eq(record_of(pool, "w1").owned, 0);
    MUST(moe_experts_bind(pool, w1, NULL)); /* back to its own, which is what it was */
    ck_assert_ptr_eq(record_of(pool, "w1").data, own);
    moe_experts_destroy(pool), moe_context_destroy(context);
    free(data);
}
END_TEST

START_TEST(test_experts_that_are_not_bound_are_refused)
{
    layer_case c = base;
    layer_run r;
    moe_experts_config e;
    moe_experts *pool = NULL;
    moe_pass *pass = NULL;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_experts_get_config(r.experts, &e));
    e.parameters = MOE_PARAMETERS_BOUND;
    MUST(moe_experts_create(&pool, r.context, &e));
    MUST(moe_pass_create_for_experts(&pass, pool, NULL));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_experts_forward(pool, pass, &r.f));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "w1"));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_experts_bind(pool, 0, NULL)); /* it owns none */
    MUST(moe_experts_init_parameters(pool, 1));                        /* leaves bound ones out */
    moe_pass_destroy(pass), moe_experts_destroy(pool);
    layer_run_end(&r, &c);
}
END_TEST

/* Gradients that are NULL are not written, and change no other. */
START_TEST(test_experts_gradients_that_are_not_wanted_are_left_out)
{
    static const char *const names[] = {"w1", "b1", "w3", "b3", "w2", "b2"};
    layer_case c = base;
    layer_run r;
    int64_t count;
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    double *all[6], *some;
    for (int i = 0; i < 6; i++) {
        char name[8];
        (void)snprintf(name, sizeof name, "d%c%c", names[i][0] == 'w' ? 'W' : 'b', names[i][1]);
        all[i] = layer_run_gradient(&r, name, &count);
    }
    for (int left_out = 0; left_out < 6; left_out++) {
        moe_binding b;
        int64_t index = moe_experts_parameter_find(r.experts, names[left_out]);
        MUST(moe_binding_init(&b, sizeof b));
        b.data = record_of(r.experts, names[left_out]).data;
        MUST(moe_experts_bind(r.experts, index, &b));
        MUST(moe_experts_zero_gradients(r.experts, NULL));
        MUST(layer_run_backward(&r));
        for (int i = 0; i < 6; i++) {
            char name[8];
            (void)snprintf(name, sizeof name, "d%c%c", names[i][0] == 'w' ? 'W' : 'b', names[i][1]);
            if (i == left_out) continue;
            some = layer_run_gradient(&r, name, &count);
            ck_assert_mem_eq(some, all[i], (size_t)count * sizeof *some);
            free(some);
        }
        MUST(moe_experts_bind(r.experts, index, NULL));
    }
    for (int i = 0; i < 6; i++) free(all[i]);
    layer_run_end(&r, &c);
}
END_TEST

/* ---- touched, shared ------------------------------------------------------------------------- */

START_TEST(test_experts_touched_are_those_with_gradients)
{
    layer_case c = base;
    layer_run r;
    moe_plan_args a;
    uint8_t touched[5];
    int64_t count;
    int32_t ids[12];
    layer_run_begin(&r, &c, MOE_DTYPE_F32);
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = 12, a.num_experts = 5, a.top_k = 1, a.expert_ids = ids;
    r.b.entry_weight_grad = NULL;
    for (int turn = 0; turn < 3; turn++) { /* expert 1; then 3 as well; then only 4 */
        for (int t = 0; t < 12; t++) ids[t] = turn == 0 ? 1 : turn == 1 ? 3 : 4;
        MUST(moe_plan_build(r.plan, &a));
        MUST(layer_run_forward(&r));
        MUST(moe_experts_touched(r.experts, touched, &count));
        ck_assert_int_eq(count, turn); /* a forward touches none */
        r.b.flags = turn == 2 ? MOE_BACKWARD_OVERWRITE : 0;
        MUST(layer_run_backward(&r));
        MUST(moe_experts_touched(r.experts, touched, &count));
        ck_assert_int_eq(count, turn == 1 ? 2 : 1);
        ck_assert(touched[1] == (turn < 2) && touched[3] == (turn == 1) &&
                  touched[4] == (turn == 2));
    }
    r.b.flags = MOE_BACKWARD_SKIP_PARAMETERS;
    ids[0] = 0;
    MUST(moe_plan_build(r.plan, &a));
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    MUST(moe_experts_touched(r.experts, touched, &count));
    ck_assert_int_eq(count, 1);
    MUST(moe_experts_zero_gradients(r.experts, NULL));
    MUST(moe_experts_touched(r.experts, touched, &count));
    ck_assert_int_eq(count, 0);
    layer_run_end(&r, &c);
}
END_TEST

#ifndef MOE_TEST_DEVICE /* which calls no function of the host in the middle of a backward */
/* A host's parallel-for that, once, tries a second backward of the same pool in the middle of
 * the first. */
typedef struct second_backward {
    layer_run *run;
    moe_pass *pass;
    int armed;
    moe_status got;
} second_backward;

static void *try_second(void *argument)
{
    second_backward *s = argument;
    s->got = moe_experts_backward(s->run->experts, s->pass, &s->run->b);
    return NULL;
}

static int32_t interrupting_parallel(void *user, int64_t count, moe_task_fn task, void *argument)
{
    second_backward *s = user;
    pthread_t thread;
    if (s->armed) {
        s->armed = 0;
        if (pthread_create(&thread, NULL, try_second, s) != 0) return 1;
        (void)pthread_join(thread, NULL);
    }
    for (int64_t i = 0; i < count; i++) task(argument, i);
    return 0;
}

START_TEST(test_experts_one_backward_at_a_time)
{
    layer_case c = base;
    layer_run r;
    second_backward s = {.run = &r, .got = MOE_OK};
    moe_context_config k;
    c.T = 400, c.D = 30, c.F = 40; /* enough for more than one task */
    MUST(moe_context_config_init(&k, sizeof k));
    k.parallel = interrupting_parallel, k.parallel_user = &s, k.threads = 2;
    layer_case_make(&c, 9);
    layer_run_make(&r, &c, MOE_DTYPE_F32, &k);
    MUST(moe_pass_create_for_experts(&s.pass, r.experts, NULL));
    MUST(moe_experts_forward(r.experts, s.pass, &r.f));
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    uint64_t want = layer_run_hash(&r);
    MUST(moe_experts_zero_gradients(r.experts, NULL));
    s.armed = 1;
    MUST(layer_run_backward(&r));
    ck_assert_int_eq(s.armed, 0);
    ck_assert_int_eq(s.got, MOE_ERROR_INVALID_STATE);
    ck_assert_uint_eq(layer_run_hash(&r), want);
    MUST(moe_experts_backward(r.experts, s.pass, &r.b)); /* afterwards it works */
    moe_pass_destroy(s.pass);
    layer_run_end(&r, &c);
}
END_TEST
#endif

int main(void)
{
    Suite *suite = suite_create("experts");
    TCase *tests = tcase_create("sentences");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, test_experts_create_refuses_bad_fields);
    tcase_add_test(tests, test_experts_calls_refuse_null);
    tcase_add_test(tests, test_experts_forward_and_backward_refuse_bad_fields);
    tcase_add_test(tests, test_experts_forward_refuses_plans_that_do_not_fit);
    tcase_add_test(tests, test_experts_forward_through_a_layers_pass_is_the_plain_sum);
    tcase_add_test(tests, test_experts_without_tokens_need_no_pointers);
    tcase_add_test(tests, test_experts_records_name_and_shape_every_parameter);
    tcase_add_test(tests, test_experts_initial_numbers_do_not_depend_on_layout);
    tcase_add_test(tests, test_experts_bind_refuses_bad_fields);
    tcase_add_test(tests, test_experts_that_are_not_bound_are_refused);
    tcase_add_test(tests, test_experts_gradients_that_are_not_wanted_are_left_out);
    tcase_add_test(tests, test_experts_touched_are_those_with_gradients);
#ifndef MOE_TEST_DEVICE
    tcase_add_test(tests, test_experts_one_backward_at_a_time);
#endif
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
