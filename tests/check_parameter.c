/* check_parameter.c - the sentences of parameter.h: names and records, first values, binding,
 * zeroing. */
#include "philox.h"
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { E = 4, D = 5, F = 6, O = 3 };

static moe_experts_config pool_config(void)
{
    moe_experts_config e;
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.d_out = O, e.num_experts = E, e.bias = 1;
    e.activation = MOE_ACTIVATION_SWIGLU;
    return e;
}

static moe_experts *make_pool(moe_context **context, const moe_experts_config *config)
{
    moe_experts *pool = NULL;
    MUST(moe_context_create(context, NULL));
    MUST(moe_experts_create(&pool, *context, config));
    return pool;
}

static moe_parameter_record record(const moe_experts *pool, const char *name)
{
    moe_parameter_record p;
    int64_t index = moe_experts_parameter_find(pool, name);
    ck_assert_msg(index >= 0, "there is no %s", name);
    MUST(moe_parameter_record_init(&p, sizeof p));
    MUST(moe_experts_parameter(pool, index, &p));
    return p;
}

static void free_pool(moe_experts *pool, moe_context *context)
{
    moe_experts_destroy(pool);
    moe_context_destroy(context);
}

/* ---- names and records ----------------------------------------------------------------------- */

START_TEST(test_parameter_names_are_what_the_config_asks_for)
{
    static const char *const separate[] = {"w1", "b1", "w3", "b3", "w2", "b2"};
    static const char *const fused[] = {"w13", "b13", "w2", "b2"};
    moe_context *context;
    moe_experts_config e = pool_config();
    moe_experts *pool = make_pool(&context, &e);
    ck_assert_int_eq(moe_experts_parameter_count(pool), 6);
    for (int i = 0; i < 6; i++) ck_assert_int_eq(moe_experts_parameter_find(pool, separate[i]), i);
    ck_assert_int_eq(moe_experts_parameter_find(pool, "w13"), -1);
    ck_assert_int_eq(moe_experts_parameter_find(pool, NULL), -1);
    ck_assert_int_eq(moe_experts_parameter_find(NULL, "w1"), -1);
    free_pool(pool, context);
    e.glu_order = MOE_GLU_INTERLEAVED;
    pool = make_pool(&context, &e);
    ck_assert_int_eq(moe_experts_parameter_count(pool), 4);
    for (int i = 0; i < 4; i++) ck_assert_int_eq(moe_experts_parameter_find(pool, fused[i]), i);
    free_pool(pool, context);
    e.activation = MOE_ACTIVATION_RELU, e.glu_order = 0, e.bias = 0;
    pool = make_pool(&context, &e);
    ck_assert_int_eq(moe_experts_parameter_count(pool), 2);
    free_pool(pool, context);
}
END_TEST

START_TEST(test_parameter_record_tells_shape_strides_and_sharding)
{
    moe_context *context;
    moe_experts_config e = pool_config();
    moe_parameter_record p;
    e.weight_layout = MOE_WEIGHT_OUT_IN;
    moe_experts *pool = make_pool(&context, &e);
    p = record(pool, "w2");
    ck_assert_str_eq(p.name, "w2");
    ck_assert_int_eq(p.dims, 3);
    ck_assert(p.shape[0] == E && p.shape[1] == O && p.shape[2] == F && p.shape[3] == 1);
    ck_assert_mem_eq(p.shape, p.global_shape, sizeof p.shape);
    ck_assert(p.data_stride[0] == O * F && p.data_stride[1] == F && p.data_stride[2] == 1);
    ck_assert(p.global_offset[0] == 0 && p.element_count == E * O * F && p.owned && p.trainable &&
              !p.opaque);
    ck_assert_int_eq(p.sharding, MOE_SHARD_EXPERT);
    ck_assert_int_eq(p.kind, MOE_KIND_WEIGHT);
    for (int64_t i = 0; i < p.element_count; i++)
        ck_assert(((float *)p.data)[i] == 0 && ((float *)p.grad)[i] == 0);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_parameter(pool, 6, &p));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_parameter(pool, -1, &p));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_parameter(pool, 0, NULL));
    p.struct_size = 3;
    REFUSED(MOE_ERROR_STRUCT_SIZE, moe_experts_parameter(pool, 0, &p));
    free_pool(pool, context);
}
END_TEST

START_TEST(test_parameter_of_a_layer_carries_its_objects_name)
{
    static const char *const names[] = {"gate.weight", "gate.bias", "gate.noise_weight",
                                        "experts.w1", "experts.w2"};
    layer_case c = {.name = "names",
                    .T = 3,
                    .D = 4,
                    .E = 3,
                    .F = 2,
                    .K = 1,
                    .kind = MOE_GATE_NOISY_TOP_K,
                    .router_bias = 1};
    layer_run r;
    layer_case_make(&c, 1);
    layer_run_make(&r, &c, MOE_DTYPE_F32, NULL);
    ck_assert_int_eq(moe_layer_parameter_count(r.layer), 5);
    for (int i = 0; i < 5; i++) {
        moe_parameter_record p;
        MUST(moe_parameter_record_init(&p, sizeof p));
        MUST(moe_layer_parameter(r.layer, i, &p));
        ck_assert_str_eq(p.name, names[i]);
        ck_assert_int_eq(moe_layer_parameter_find(r.layer, names[i]), i);
        ck_assert_int_eq(p.sharding, i < 3 ? MOE_SHARD_REPLICATED : MOE_SHARD_EXPERT);
    }
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

/* ---- first values ---------------------------------------------------------------------------- */

/* The number the documentation gives for a logical element. */
static float documented(uint64_t seed, uint32_t tensor, uint32_t expert, uint32_t row,
                        uint32_t column, double std)
{
    uint32_t counter[4] = {2u << 24 | tensor, expert, row, column / 4}, bits[4];
    float four[4];
    moe__philox(seed, counter, bits);
    moe__normal4(bits, four);
    return (float)(std * (double)four[column % 4]);
}

static double value_at(const moe_parameter_record *p, int64_t i)
{
    return p->data_dtype == MOE_DTYPE_F64 ? ((double *)p->data)[i] : (double)((float *)p->data)[i];
}

/* Every element of W1, W3 and W2 is the documented one, in any layout, GLU order and dtype. */
START_TEST(test_parameter_init_is_the_same_in_every_layout)
{
    moe_context *context;
    moe_experts_config e = pool_config();
    e.weight_layout = _i / 4 % 2, e.glu_order = _i % 4, e.dtype = _i / 8 ? REAL : MOE_DTYPE_F32;
    moe_experts *pool = make_pool(&context, &e);
    MUST(moe_experts_init_parameters(pool, 77));
    int fused = e.glu_order != MOE_GLU_SEPARATE;
    for (uint32_t x = 0; x < E; x++)
        for (uint32_t i = 0; i < D; i++)
            for (uint32_t j = 0; j < F; j++)
                for (int up = 0; up < 2; up++) {
                    moe_parameter_record p = record(pool, fused ? "w13" : up ? "w3" : "w1");
                    uint32_t column = e.glu_order == MOE_GLU_INTERLEAVED ? 2 * j + (uint32_t)up
                                      : e.glu_order == MOE_GLU_GATE_UP   ? j + (up ? F : 0)
                                      : e.glu_order == MOE_GLU_UP_GATE   ? j + (up ? 0 : F)
                                                                         : j;
                    const int64_t *s = p.data_stride;
                    int64_t at = e.weight_layout ? x * s[0] + column * s[1] + i * s[2]
                                                 : x * s[0] + i * s[1] + column * s[2];
                    double want = (double)documented(77, up ? 18 : 16, x, i, j,
                                                     1 / sqrt((double)D));
                    ck_assert_msg(value_at(&p, at) == want, "expert %u row %u column %u up %d", x,
                                  i, j, up);
                }
    moe_parameter_record w2 = record(pool, "w2"), b2 = record(pool, "b2");
    int64_t at = e.weight_layout ? w2.data_stride[0] * 2 + w2.data_stride[1] * 1 + 4
                                 : w2.data_stride[0] * 2 + 4 * w2.data_stride[1] + 1;
    ck_assert(value_at(&w2, at) == (double)documented(77, 20, 2, 4, 1, 1 / sqrt((double)F)));
    for (int64_t i = 0; i < b2.element_count; i++) ck_assert(value_at(&b2, i) == 0);
    free_pool(pool, context);
}
END_TEST

START_TEST(test_parameter_init_of_gates_follows_the_rule)
{
    static const struct {
        int32_t kind;
        double std, want;
    } cases[] = {{MOE_GATE_TOP_K, MOE_INIT_DEFAULT, 0.02},
                 {MOE_GATE_NOISY_TOP_K, MOE_INIT_DEFAULT, 0},
                 {MOE_GATE_NOISY_TOP_K, 0.5, 0.5},
                 {MOE_GATE_TOP_K, 0, 0}};
    moe_context *context;
    MUST(moe_context_create(&context, NULL));
    for (int c = 0; c < 4; c++) {
        moe_gate_config g;
        moe_gate *gate;
        moe_parameter_record p;
        double sum = 0;
        MUST(moe_gate_config_init(&g, sizeof g));
        g.d_model = 60, g.num_experts = 50, g.kind = cases[c].kind, g.init_std = cases[c].std;
        MUST(moe_gate_create(&gate, context, &g));
        MUST(moe_gate_init_parameters(gate, 3));
        MUST(moe_parameter_record_init(&p, sizeof p));
        MUST(moe_gate_parameter(gate, 0, &p));
        for (int64_t i = 0; i < p.element_count; i++) sum += value_at(&p, i) * value_at(&p, i);
        ck_assert_double_eq_tol(sqrt(sum / 3000), cases[c].want, 0.05 * cases[c].want + 1e-12);
        moe_gate_destroy(gate);
    }
    moe_context_destroy(context);
}
END_TEST

/* ---- binding --------------------------------------------------------------------------------- */

#define BAD_BINDING(status, field, value)                    \
    do {                                                     \
        moe_binding bad = good;                              \
        bad.field = value;                                   \
        REFUSED(status, moe_experts_bind(pool, 0, &bad));    \
        ck_assert_ptr_eq(record(pool, "w1").data, own.data); \
    } while (0)

START_TEST(test_parameter_bind_refuses_what_cannot_be)
{
    float *data = calloc(2 * E * D * F, sizeof *data), *grad = data + E * D * F;
    const void *each[E] = {data, data + 30, NULL, data + 90};
    void *grads[E] = {grad, NULL, data + 60, NULL};
    moe_context *context;
    moe_experts_config e = pool_config();
    moe_experts *pool = make_pool(&context, &e);
    moe_parameter_record own = record(pool, "w1");
    moe_binding good;
    MUST(moe_binding_init(&good, sizeof good));
    ck_assert_ptr_nonnull(data);
    good.data = data, good.grad = grad;
    BAD_BINDING(MOE_ERROR_INVALID_ARGUMENT, data, NULL);
    BAD_BINDING(MOE_ERROR_INVALID_ARGUMENT, grad, data);
    BAD_BINDING(MOE_ERROR_NOT_SUPPORTED, data_dtype, MOE_DTYPE_F64);
    BAD_BINDING(MOE_ERROR_NOT_SUPPORTED, grad_dtype, MOE_DTYPE_BF16);
    BAD_BINDING(MOE_ERROR_INVALID_ARGUMENT, data_dtype, MOE_DTYPE_I32);
    BAD_BINDING(MOE_ERROR_INVALID_ARGUMENT, data_per_expert, each); /* and data as well */
    BAD_BINDING(MOE_ERROR_INVALID_ARGUMENT, grad_per_expert, grads);
    BAD_BINDING(MOE_ERROR_INVALID_ARGUMENT, data_stride[0],
                30); /* the others are 0: one place for all */
    BAD_BINDING(MOE_ERROR_STRUCT_TOO_OLD, struct_size, 16);
    good.data_stride[0] = 30, good.data_stride[1] = 5, good.data_stride[2] = 1; /* a row has 6 */
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(pool, 0, &good));
    good.data_stride[1] = INT64_MAX / 2;
    REFUSED(MOE_ERROR_OVERFLOW, moe_experts_bind(pool, 0, &good));
    memset(good.data_stride, 0, sizeof good.data_stride);
    good.data = NULL, good.data_per_expert = each;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(pool, 0, &good));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "expert 2"));
    each[2] = data + 60, good.grad = NULL, good.grad_per_expert = grads;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT,
            moe_experts_bind(pool, 0, &good)); /* expert 2's are the same */
    grads[2] = grad + 60;
    MUST(moe_experts_bind(pool, 0, &good));
    ck_assert_ptr_eq(record(pool, "w1").data_per_expert[3], data + 90);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(pool, 6, &good));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_bind(NULL, 0, &good));
    MUST(moe_experts_bind(pool, 0, NULL)); /* back to its own memory */
    ck_assert_ptr_eq(record(pool, "w1").data, own.data);
    free_pool(pool, context);
    free(data);
}
END_TEST

START_TEST(test_parameter_that_is_not_bound_is_named)
{
    float *data = calloc(E * D * F, sizeof *data);
    moe_context *context;
    moe_experts_config e = pool_config();
    moe_pass *pass;
    moe_plan *plan;
    moe_forward_args f;
    moe_binding b;
    float x[D] = {0}, y[O];
    e.parameters = MOE_PARAMETERS_BOUND;
    moe_experts *pool = make_pool(&context, &e);
    ck_assert_ptr_null(record(pool, "w1").data);
    REFUSED(MOE_ERROR_INVALID_STATE, moe_experts_bind(pool, 0, NULL)); /* it owns nothing */
    MUST(moe_pass_create_for_experts(&pass, pool, NULL));
    MUST(moe_plan_create(&plan, context));
    moe_plan_args a;
    int32_t id = 0;
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = 1, a.num_experts = E, a.top_k = 1, a.expert_ids = &id;
    MUST(moe_plan_build(plan, &a));
    MUST(moe_forward_args_init(&f, sizeof f));
    f.tokens = 1, f.x = x, f.y = y, f.plan = plan;
    REFUSED(MOE_ERROR_INVALID_STATE, moe_experts_forward(pool, pass, &f));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "w1"));
    MUST(moe_binding_init(&b, sizeof b));
    b.data = data;
    MUST(moe_experts_bind(pool, 0, &b));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_experts_forward(pool, pass, &f));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "b1"));
    moe_pass_destroy(pass), moe_plan_destroy(plan);
    free_pool(pool, context);
    free(data);
}
END_TEST

/* A read-only mapping stands zeroing and init; negative and wide strides reach their elements
 * only. */
START_TEST(test_parameter_bound_data_is_never_written_and_gaps_are_left_alone)
{
    moe_context *context;
    moe_experts_config e = pool_config();
    moe_experts *pool = make_pool(&context, &e);
    size_t bytes = E * D * F * sizeof(float);
    /* On a device there is no such mapping; what is written shows. */
    float *read_only = ON_DEVICE ? calloc(1, bytes)
                                 : mmap(NULL, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    float *grad = calloc(E * 40, sizeof *grad);
    moe_binding b;
    ck_assert(read_only != MAP_FAILED && grad);
    for (int i = 0; i < E * 40; i++) grad[i] = 5;
    MUST(moe_binding_init(&b, sizeof b));
    b.data = read_only;
    b.grad = grad + 39; /* experts 40 apart, rows 8 apart and backwards, columns backwards */
    b.grad_stride[0] = 40, b.grad_stride[1] = -8, b.grad_stride[2] = -1;
    MUST(moe_experts_bind(pool, 0, &b));
    MUST(moe_experts_init_parameters(pool, 1));
    MUST(moe_experts_zero_gradients(pool, NULL));
    for (int i = 0; i < E * 40; i++) {
        int column = 7 - i % 8;
        ck_assert_msg(grad[i] == (column < F ? 0 : 5), "element %d is %g", i, (double)grad[i]);
    }
    if (!ON_DEVICE)
        REFUSED(MOE_ERROR_INVALID_ARGUMENT,
                moe_experts_zero_gradients(pool, grad)); /* a stream on CPU */
    MUST(moe_experts_bind(pool, 0, NULL));
    ck_assert(((float *)record(pool, "w1").data)[0] == 0); /* init left it out while it was bound */
    for (int i = 0; i < E * D * F; i++) ck_assert(read_only[i] == 0);
    free_pool(pool, context);
    free(grad);
    if (ON_DEVICE)
        free(read_only);
    else
        ck_assert_int_eq(munmap(read_only, bytes), 0);
}
END_TEST

START_TEST(test_parameter_zero_gradients_skips_experts_without_one)
{
    moe_context *context;
    moe_experts_config e = pool_config();
    moe_experts *pool = make_pool(&context, &e);
    float *data = calloc((E + 2) * D * F, sizeof *data), *grad = data + E * D * F;
    const void *each[E] = {data, data + 30, data + 60, data + 90};
    void *grads[E] = {grad, NULL, NULL, grad + D * F};
    moe_binding b;
    ck_assert_ptr_nonnull(data);
    memset(grad, 0x5a, 2 * D * F * sizeof *grad);
    MUST(moe_binding_init(&b, sizeof b));
    b.data_per_expert = each, b.grad_per_expert = grads;
    MUST(moe_experts_bind(pool, 0, &b));
    MUST(moe_experts_zero_gradients(pool, NULL));
    for (int i = 0; i < 2 * D * F; i++) ck_assert(grad[i] == 0);
    free_pool(pool, context);
    free(data);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("parameter");
    TCase *tests = tcase_create("sentences");
    tcase_set_timeout(tests, 60);
    tcase_add_test(tests, test_parameter_names_are_what_the_config_asks_for);
    tcase_add_test(tests, test_parameter_record_tells_shape_strides_and_sharding);
    tcase_add_test(tests, test_parameter_of_a_layer_carries_its_objects_name);
    tcase_add_loop_test(tests, test_parameter_init_is_the_same_in_every_layout, 0, 16);
    tcase_add_test(tests, test_parameter_init_of_gates_follows_the_rule);
    tcase_add_test(tests, test_parameter_bind_refuses_what_cannot_be);
    tcase_add_test(tests, test_parameter_that_is_not_bound_is_named);
    tcase_add_test(tests, test_parameter_bound_data_is_never_written_and_gaps_are_left_alone);
    tcase_add_test(tests, test_parameter_zero_gradients_skips_experts_without_one);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
