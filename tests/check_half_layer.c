/* check_half_layer.c - the sentences on 16-bit layers of types.h, parameter.h and docs/numerics.md:
 * which numbers stay f32, what is equal to an f32 layer's bit for bit, what is refused. */
#include "support/bad_fields.h"
#include "support/crew.h"
#include "support/layer_cases.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int32_t halves[] = {MOE_DTYPE_BF16, MOE_DTYPE_F16};

static double unit(int32_t dtype) { return dtype == MOE_DTYPE_BF16 ? 0x1p-8 : 0x1p-11; }

static void rounded_case(layer_case *c, int32_t dtype, uint64_t seed)
{
    c->element = dtype;
    layer_case_make(c, seed);
}

static void train(layer_run *r, const layer_case *c, int32_t dtype)
{
    layer_run_make(r, c, dtype, NULL);
    MUST(layer_run_forward(r));
    MUST(layer_run_backward(r));
}

static moe_parameter_record record_of(const moe_layer *layer, const char *name)
{
    moe_parameter_record record;
    MUST(moe_parameter_record_init(&record, sizeof record));
    MUST(moe_layer_parameter(layer, moe_layer_parameter_find(layer, name), &record));
    return record;
}

static const layer_case plain = {.name = "plain",
                                 .T = 37,
                                 .D = 21,
                                 .E = 6,
                                 .F = 19,
                                 .K = 2,
                                 .router_bias = 1,
                                 .expert_bias = 1,
                                 .activation = MOE_ACTIVATION_SWIGLU,
                                 .weight = {0.1, 0, 0.1, 0.1, 0.01, 0.1}};

/* ---- routing --------------------------------------------------------------------------------- */

static void same_tensor(const layer_run *a, const layer_run *b, int32_t what)
{
    moe_tensor_view v[2];
    for (int i = 0; i < 2; i++) {
        MUST(moe_tensor_view_init(&v[i], sizeof v[i]));
        MUST(moe_pass_tensor((i ? b : a)->pass, what, &v[i]));
    }
    ck_assert_int_eq(v[0].dtype, v[1].dtype);
    ck_assert_int_eq(v[0].shape[0], v[1].shape[0]);
    ck_assert_mem_eq(v[0].data, v[1].data,
                     (size_t)(v[0].shape[0] * v[0].shape[1]) * number_bytes(v[0].dtype));
}

static void same_plan(const layer_run *a, const layer_run *b)
{
    moe_plan_view v, w;
    layer_run_view(a, &v);
    layer_run_view(b, &w);
    ck_assert_int_eq(v.dtype, MOE_DTYPE_F32);
    ck_assert_int_eq(w.dtype, MOE_DTYPE_F32);
    ck_assert_int_eq(v.entries, w.entries);
    ck_assert_int_eq(v.rows, w.rows);
    if (v.entries == 0) return;
    ck_assert_mem_eq(v.expert_of_entry, w.expert_of_entry, (size_t)v.entries * 4);
    ck_assert_mem_eq(v.row_of_entry, w.row_of_entry, (size_t)v.entries * 8);
    ck_assert_mem_eq(v.slot_of_entry, w.slot_of_entry, (size_t)v.entries * 8);
    ck_assert_mem_eq(v.weight_of_entry, w.weight_of_entry, (size_t)v.entries * 4);
}

/* The same choices, and weights but for rounding. */
static void near_plan(const layer_run *a, const layer_run *b)
{
    moe_plan_view v, w;
    layer_run_view(a, &v);
    layer_run_view(b, &w);
    ck_assert_int_eq(v.entries, w.entries);
    ck_assert_mem_eq(v.expert_of_entry, w.expert_of_entry, (size_t)v.entries * 4);
    for (int64_t n = 0; n < v.entries; n++)
        ck_assert_double_eq_tol(number_at(v.weight_of_entry, n, MOE_DTYPE_F32),
                                number_at(w.weight_of_entry, n, MOE_DTYPE_F32), 1e-4);
}

static void same_losses(const layer_run *a, const layer_run *b)
{
    moe_losses v, w;
    MUST(moe_losses_init(&v, sizeof v));
    MUST(moe_losses_init(&w, sizeof w));
    MUST(moe_pass_losses(a->pass, &v));
    MUST(moe_pass_losses(b->pass, &w));
    ck_assert_mem_eq(&v, &w, sizeof v);
}

START_TEST(test_half_routing_is_that_of_an_f32_layer_bit_for_bit)
{
    layer_case c = layer_cases[_i / 2];
    layer_run half, wide;
    rounded_case(&c, halves[_i % 2], (uint64_t)_i + 1);
    train(&half, &c, halves[_i % 2]);
    train(&wide, &c, MOE_DTYPE_F32);
    same_plan(&half, &wide);
    same_losses(&half, &wide);
    if (c.replay != 2 && (c.kind != MOE_GATE_HASH || c.D > 0) && c.T > 0)
        same_tensor(&half, &wide, MOE_TENSOR_LOGITS);
    layer_run_free(&half);
    layer_run_free(&wide);
    layer_case_free(&c);
}
END_TEST

/* Several blocks of every product, and jitter, whose products read f32. */
START_TEST(test_half_routing_of_a_wide_gate_with_jitter_is_that_of_f32)
{
    enum { T = 70, D = 700, E = 300 };
    int32_t dtype = halves[_i];
    uint64_t state = 5;
    moe_context *context = new_context();
    void *x[2], *dx[2], *w[2];
    float *d_weight[2];
    moe_gate *gate[2];
    moe_pass *pass[2];
    float *weight_grad = calloc((size_t)T * 2, sizeof *weight_grad);
    ck_assert_ptr_nonnull(weight_grad);
    for (int64_t i = 0; i < T * 2; i++) weight_grad[i] = (float)random_normal(&state);
    for (int k = 0; k < 2; k++) {
        int32_t of = k ? MOE_DTYPE_F32 : dtype;
        uint64_t again = 77;
        moe_gate_config g;
        MUST(moe_gate_config_init(&g, sizeof g));
        g.d_model = D, g.num_experts = E, g.top_k = 2, g.jitter = 0.1, g.dtype = of;
        MUST(moe_gate_create(&gate[k], context, &g));
        MUST(moe_pass_create_for_gate(&pass[k], gate[k], NULL));
        x[k] = calloc((size_t)T * D, 8), dx[k] = calloc((size_t)T * D, 8);
        moe_parameter_record record;
        MUST(moe_parameter_record_init(&record, sizeof record));
        MUST(moe_gate_parameter(gate[k], 0, &record));
        w[k] = record.data, d_weight[k] = record.grad;
        ck_assert_int_eq(record.data_dtype, of);
        ck_assert_int_eq(record.grad_dtype, MOE_DTYPE_F32);
        for (int64_t i = 0; i < T * D + D * E; i++) { /* the f32 gate has the rounded numbers */
            uint16_t h;
            number_set(&h, 0, dtype, random_normal(&again));
            void *to = i < T * D ? x[k] : w[k];
            number_set(to, i < T * D ? i : i - T * D, of, number_at(&h, 0, dtype));
        }
        moe_forward_args f;
        moe_backward_args b;
        MUST(moe_forward_args_init(&f, sizeof f));
        MUST(moe_backward_args_init(&b, sizeof b));
        f.tokens = T, f.x = x[k], f.flags = MOE_FORWARD_TRAIN;
        MUST(moe_gate_forward(gate[k], pass[k], &f));
        b.entry_weight_grad = weight_grad, b.dx = dx[k];
        MUST(moe_gate_backward(gate[k], pass[k], &b));
    }
    layer_run a = {.pass = pass[0]}, b = {.pass = pass[1]};
    if (!ON_DEVICE) {
        same_plan(&a, &b);
        same_tensor(&a, &b, MOE_TENSOR_LOGITS);
        ck_assert_mem_eq(d_weight[0], d_weight[1], (size_t)D * E * sizeof(float));
    } else { /* which has products of its own where a factor is f32 and one is not */
        near_plan(&a, &b);
        for (int64_t i = 0; i < D * E; i++)
            ck_assert_float_eq_tol(d_weight[0][i], d_weight[1][i], 1e-3f);
    }
    for (int64_t i = 0; i < T * D && ON_DEVICE; i++) {
        double want = number_at(dx[1], i, MOE_DTYPE_F32);
        ck_assert_double_eq_tol(number_at(dx[0], i, dtype), want, unit(dtype) * fabs(want) + 1e-3);
    }
    for (int64_t i = 0; i < T * D && !ON_DEVICE; i++) { /* dx alone was rounded */
        uint16_t h;
        number_set(&h, 0, dtype, number_at(dx[1], i, MOE_DTYPE_F32));
        ck_assert_uint_eq(h, ((uint16_t *)dx[0])[i]);
    }
    for (int k = 0; k < 2; k++) {
        moe_pass_destroy(pass[k]), moe_gate_destroy(gate[k]);
        free(x[k]), free(dx[k]);
    }
    free(weight_grad);
    moe_context_destroy(context);
}
END_TEST

/* ---- large products -------------------------------------------------------------------------- */

static void near(const layer_run *r, const char *name, const double *got, const double *want,
                 int64_t count)
{
    double error = 0, size = 0;
    for (int64_t i = 0; i < count; i++) {
        error += (got[i] - want[i]) * (got[i] - want[i]), size += want[i] * want[i];
    }
    ck_assert_msg(sqrt(error) <= 8 * unit(r->dtype) * sqrt(size), "%s: %g of %g, dtype %d", name,
                  sqrt(error), sqrt(size), (int)r->dtype);
}

static void near_rows(const layer_run *half, const layer_run *wide, const char *name, const void *a,
                      const void *b, int64_t count)
{
    double *got = calloc((size_t)count + 1, sizeof *got);
    double *want = calloc((size_t)count + 1, sizeof *want);
    ck_assert(got && want);
    for (int64_t i = 0; i < count; i++)
        got[i] = number_at(a, i, half->dtype), want[i] = number_at(b, i, wide->dtype);
    near(half, name, got, want, count);
    free(got), free(want);
}

/* Every product in several blocks of every dimension, and more rows of an expert than one chain of
 * a gradient has; both layouts of weights, few rows of some experts. */
START_TEST(test_half_layer_of_many_blocks_is_near_an_f32_layer)
{
    static const char *const gradients[] = {"dWg", "dW1", "db1", "dW3", "dW2", "db2"};
    int tall = _i / 2 % 2;
    layer_case c = plain;
    layer_run half, wide;
    c.T = tall ? 9000 : 90, c.D = tall ? 17 : 300, c.F = tall ? 9 : 290, c.E = tall ? 2 : 6;
    c.layout = _i / 4, c.half_gradients = _i / 4, c.K = tall ? 1 : 2;
    rounded_case(&c, halves[_i % 2], 3);
    train(&half, &c, halves[_i % 2]);
    train(&wide, &c, MOE_DTYPE_F32);
    same_plan(&half, &wide);
    near_rows(&half, &wide, "y", half.y, wide.y, c.T * c.D);
    near_rows(&half, &wide, "dx", half.dx, wide.dx, c.T * c.D);
    for (size_t i = 0; i < COUNT(gradients); i++) {
        int64_t count;
        double *got = layer_run_gradient(&half, gradients[i], &count);
        double *want = layer_run_gradient(&wide, gradients[i], &count);
        near(&half, gradients[i], got, want, count);
        free(got), free(want);
    }
    layer_run_free(&half);
    layer_run_free(&wide);
    layer_case_free(&c);
}
END_TEST

/* ---- gradients ------------------------------------------------------------------------------- */

START_TEST(test_half_parameters_have_f32_gradients_and_f32_buffers)
{
    layer_case c = plain;
    layer_run r;
    int32_t dtype = halves[_i];
    c.selection_bias = 1;
    rounded_case(&c, dtype, 1);
    layer_run_make(&r, &c, dtype, NULL);
    for (int64_t i = 0; i < moe_layer_parameter_count(r.layer); i++) {
        moe_parameter_record record;
        MUST(moe_parameter_record_init(&record, sizeof record));
        MUST(moe_layer_parameter(r.layer, i, &record));
        bool buffer = record.kind == MOE_KIND_BUFFER;
        ck_assert_int_eq(record.data_dtype, buffer ? MOE_DTYPE_F32 : dtype);
        ck_assert_int_eq(record.grad_dtype, MOE_DTYPE_F32);
    }
    const int64_t counts[6] = {5, 0, 9, 0, 0, 4};
    float *bias = record_of(r.layer, "gate.selection_bias").data, before = bias[1];
    MUST(moe_gate_update_selection_bias(r.gate, counts, 0.001));
    ck_assert_float_eq(bias[1], (float)((double)before + 0.001));
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

/* A gradient of 16 bits is the f32 one, rounded; one that is added to is widened, added to in f32
 * and rounded; OVERWRITE forgets what was there. */
START_TEST(test_half_gradients_are_the_f32_ones_rounded_at_each_step)
{
    layer_case narrow = plain, wide = plain;
    layer_run n, w;
    int32_t dtype = halves[_i];
    narrow.bound = wide.bound = 1, narrow.half_gradients = 1;
    rounded_case(&narrow, dtype, 1), rounded_case(&wide, dtype, 1);
    train(&n, &narrow, dtype), train(&w, &wide, dtype);
    for (int step = 0; step < 3; step++) { /* once, added, overwritten */
        if (step == 1) MUST(layer_run_backward(&n));
        if (step == 2) n.b.flags = MOE_BACKWARD_OVERWRITE;
        if (step == 2) MUST(layer_run_backward(&n));
        for (int k = 0; k < LAYER_TENSORS; k++) {
            int64_t count;
            if (!layer_tensors[k].in_result) continue;
            double *got = layer_run_gradient(&n, layer_tensors[k].name, &count);
            double *want = layer_run_gradient(&w, layer_tensors[k].name, &count);
            for (int64_t i = 0; i < count; i++) {
                uint16_t h;
                number_set(&h, 0, dtype, want[i]);
                if (step == 1)
                    number_set(&h, 0, dtype,
                               (double)((float)number_at(&h, 0, dtype) + (float)want[i]));
                ck_assert_msg(got[i] == number_at(&h, 0, dtype), "%s[%lld], step %d",
                              layer_tensors[k].name, (long long)i, step);
            }
            free(got), free(want);
        }
    }
    ck_assert_str_eq(layer_run_check_gaps(&n), "");
    layer_run_free(&n), layer_run_free(&w);
    layer_case_free(&narrow), layer_case_free(&wide);
}
END_TEST

/* y and dx that are added to: the sum of what was there and of the plain result, to an ulp of
 * each; dx twice, by the experts and by the gate. */
START_TEST(test_half_outputs_are_added_to_in_f32)
{
    layer_case c = plain;
    layer_run r, added;
    int32_t dtype = halves[_i];
    int64_t count = c.T * c.D;
    rounded_case(&c, dtype, 1);
    train(&r, &c, dtype);
    layer_run_make(&added, &c, dtype, NULL);
    for (int64_t i = 0; i < count; i++) number_set(added.y, i, dtype, 0.5);
    for (int64_t i = 0; i < count; i++) number_set(added.dx, i, dtype, -0.25);
    added.f.flags |= MOE_FORWARD_ADD, added.b.flags |= MOE_BACKWARD_ADD_DX;
    MUST(layer_run_forward(&added));
    MUST(layer_run_backward(&added));
    for (int64_t i = 0; i < count; i++) {
        double y = number_at(r.y, i, dtype), dx = number_at(r.dx, i, dtype), u = unit(dtype);
        ck_assert_double_le(fabs(number_at(added.y, i, dtype) - (0.5 + y)),
                            u * (fabs(y) + fabs(0.5 + y)));
        ck_assert_double_le(fabs(number_at(added.dx, i, dtype) - (dx - 0.25)),
                            4 * u * (fabs(dx) + 0.25));
    }
    layer_run_free(&r), layer_run_free(&added);
    layer_case_free(&c);
}
END_TEST

/* ---- parameters ------------------------------------------------------------------------------ */

START_TEST(test_half_parameters_are_drawn_as_f32_and_rounded)
{
    layer_case c = plain;
    layer_run half, wide;
    int32_t dtype = halves[_i];
    rounded_case(&c, dtype, 1);
    layer_run_make(&half, &c, dtype, NULL), layer_run_make(&wide, &c, MOE_DTYPE_F32, NULL);
    MUST(moe_layer_init_parameters(half.layer, 3));
    MUST(moe_layer_init_parameters(wide.layer, 3));
    for (int64_t i = 0; i < moe_layer_parameter_count(half.layer); i++) {
        moe_parameter_record a, b;
        MUST(moe_parameter_record_init(&a, sizeof a));
        MUST(moe_parameter_record_init(&b, sizeof b));
        MUST(moe_layer_parameter(half.layer, i, &a));
        MUST(moe_layer_parameter(wide.layer, i, &b));
        for (int64_t n = 0; n < a.element_count; n++) {
            uint16_t h;
            number_set(&h, 0, dtype, number_at(b.data, n, MOE_DTYPE_F32));
            ck_assert_uint_eq(((const uint16_t *)a.data)[n], h);
        }
    }
    layer_run_free(&half), layer_run_free(&wide);
    layer_case_free(&c);
}
END_TEST

/* A gate of 16 bits with its weights in f32: the bytes of the one that has them rounded. */
START_TEST(test_half_gate_takes_f32_weights)
{
    layer_case c = plain;
    layer_run r, bound;
    int32_t dtype = halves[_i];
    c.selection_bias = 1;
    rounded_case(&c, dtype, 1);
    train(&r, &c, dtype);
    layer_run_make(&bound, &c, dtype, NULL);
    float *memory = calloc((size_t)(c.D * c.E), sizeof *memory);
    ck_assert_ptr_nonnull(memory);
    moe_parameter_record own = record_of(bound.layer, "gate.weight");
    for (int64_t i = 0; i < c.D * c.E; i++) memory[i] = (float)number_at(own.data, i, dtype);
    moe_binding b;
    MUST(moe_binding_init(&b, sizeof b));
    b.data = memory, b.grad = own.grad;
    MUST(moe_layer_bind(bound.layer, moe_layer_parameter_find(bound.layer, "gate.weight"), &b));
    ck_assert_int_eq(record_of(bound.layer, "gate.weight").data_dtype, MOE_DTYPE_F32);
    MUST(layer_run_forward(&bound));
    MUST(layer_run_backward(&bound));
    same_plan(&r, &bound);
    same_tensor(&r, &bound, MOE_TENSOR_LOGITS);
    ck_assert_mem_eq(r.y, bound.y, (size_t)(c.T * c.D) * 2);
    ck_assert_mem_eq(r.dx, bound.dx, (size_t)(c.T * c.D) * 2);
    ck_assert_mem_eq(record_of(r.layer, "gate.weight").grad, own.grad,
                     (size_t)(c.D * c.E) * sizeof(float));
    layer_run_free(&r), layer_run_free(&bound);
    free(memory);
    layer_case_free(&c);
}
END_TEST

/* ---- what is refused ------------------------------------------------------------------------- */

START_TEST(test_half_bindings_of_other_dtypes_are_refused)
{
    static const struct {
        const char *name;
        int32_t data, grad;
    } bad[] = {{"experts.w1", MOE_DTYPE_F32, MOE_DTYPE_F32},
               {"experts.w1", -1, MOE_DTYPE_F64},
               {"experts.b2", MOE_DTYPE_F64, MOE_DTYPE_F32},
               {"gate.weight", MOE_DTYPE_F64, MOE_DTYPE_F32},
               {"gate.weight", -1, MOE_DTYPE_F64}};
    layer_case c = plain;
    layer_run r;
    int32_t dtype = halves[_i], other = halves[1 - _i];
    rounded_case(&c, dtype, 1);
    layer_run_make(&r, &c, dtype, NULL);
    char memory[64] = {0};
    for (size_t i = 0; i < 2 * COUNT(bad); i++) {
        moe_binding b;
        int64_t index = moe_layer_parameter_find(r.layer, bad[i / 2].name);
        moe_parameter_record before = record_of(r.layer, bad[i / 2].name), after;
        MUST(moe_binding_init(&b, sizeof b));
        b.data = memory, b.grad = memory + 32;
        b.data_dtype = bad[i / 2].data < 0 ? dtype : bad[i / 2].data,
        b.grad_dtype = bad[i / 2].grad;
        if (i % 2) b.data_dtype = dtype, b.grad_dtype = other;
        REFUSED(MOE_ERROR_NOT_SUPPORTED, moe_layer_bind(r.layer, index, &b));
        ck_assert_ptr_nonnull(strstr(moe_last_error(), "dtype is"));
        after = record_of(r.layer, bad[i / 2].name);
        ck_assert_mem_eq(&before, &after, sizeof before);
    }
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

START_TEST(test_half_layer_takes_plans_of_f32)
{
    layer_case c = plain;
    layer_run r;
    int32_t dtype = halves[_i], ids[] = {0, 1};
    moe_plan_args a;
    moe_plan *plan;
    rounded_case(&c, dtype, 1);
    layer_run_make(&r, &c, dtype, NULL);
    MUST(moe_plan_create(&plan, r.context));
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = 1, a.num_experts = c.E, a.top_k = 2, a.expert_ids = ids, a.dtype = dtype;
    REFUSED(MOE_ERROR_NOT_SUPPORTED, moe_plan_build(plan, &a));
    a.dtype = MOE_DTYPE_F64;
    MUST(moe_plan_build(plan, &a));
    r.f.tokens = 1, r.f.plan = plan;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, layer_run_forward(&r));
    a.dtype = MOE_DTYPE_F32;
    MUST(moe_plan_build(plan, &a));
    MUST(layer_run_forward(&r));
    moe_plan_destroy(plan);
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

#ifndef MOE_TEST_DEVICE /* whose layers are refused before */
static void configure_half(member *m) { m->g.dtype = m->e.dtype = MOE_DTYPE_BF16; }
static void refused_on_ranks(member *m)
{
    REFUSED(MOE_ERROR_NOT_SUPPORTED, member_make(m, 4));
    ck_assert_ptr_nonnull(strstr(m->error, "dtype 2"));
    ck_assert_ptr_null(m->layer);
}

START_TEST(test_half_layer_on_several_ranks_is_refused)
{
    member members[2] = {{0}};
    crew two = {.ranks = 2, .run = refused_on_ranks, .configure = configure_half};
    crew_run(&two, members);
}
END_TEST
#endif

/* ---- around ---------------------------------------------------------------------------------- */

#ifndef MOE_TEST_DEVICE /* which calls no function of the host */
/* out = x, dx = dout, in the bytes that come. */
static int32_t copying_forward(void *user, const moe_expert_call *call)
{
    *(int32_t *)user = call->dtype;
    memcpy(call->out, call->x, (size_t)(call->rows * 5) * 2);
    return 0;
}
static int32_t copying_backward(void *user, const moe_expert_call *call)
{
    *(int32_t *)user += 100;
    memcpy(call->dx, call->dout, (size_t)(call->rows * 5) * 2);
    return 0;
}

START_TEST(test_half_host_experts_see_rows_of_16_bits)
{
    enum { T = 9, D = 5 };
    int32_t dtype = halves[_i], seen = -1;
    uint16_t x[T * D], y[T * D], dx[T * D];
    uint64_t state = 1;
    moe_context *context = new_context();
    moe_experts *pool;
    moe_pass *pass;
    moe_experts_config e;
    moe_expert_callbacks k;
    moe_forward_args f;
    moe_backward_args b;
    MUST(moe_expert_callbacks_init(&k, sizeof k));
    k.user = &seen, k.forward = copying_forward, k.backward = copying_backward;
    MUST(moe_experts_config_init(&e, sizeof e));
    e.kind = MOE_EXPERTS_CALLBACK, e.callbacks = &k, e.d_model = D, e.num_experts = 1,
    e.dtype = dtype;
    MUST(moe_experts_create(&pool, context, &e));
    MUST(moe_pass_create_for_experts(&pass, pool, NULL));
    for (int i = 0; i < T * D; i++) number_set(x, i, dtype, random_normal(&state));
    MUST(moe_forward_args_init(&f, sizeof f));
    MUST(moe_backward_args_init(&b, sizeof b));
    f.tokens = T, f.x = x, f.y = y, b.dy = x, b.dx = dx;
    MUST(moe_experts_forward(pool, pass, &f));
    ck_assert_int_eq(seen, dtype);
    MUST(moe_experts_backward(pool, pass, &b));
    ck_assert_int_eq(seen, dtype + 100);
    ck_assert_mem_eq(x, y, sizeof x);
    ck_assert_mem_eq(x, dx, sizeof x);
    moe_pass_destroy(pass), moe_experts_destroy(pool), moe_context_destroy(context);
}
END_TEST
#endif

/* Weights and their gradients are f32 beside rows of 16 bits. */
START_TEST(test_half_rows_are_dispatched_and_combined)
{
    enum { T = 3, W = 4 };
    static const int32_t ids[T * 2] = {1, 0, 1, -1, 0, 1};
    static const float weights[T * 2] = {0.5f, 0.25f, 2, 0, 1, 0.125f};
    int32_t dtype = halves[_i];
    uint16_t tokens[T * W], rows[T * 2 * W], out[T * W], scaled[T * 2 * W];
    float grad[T * 2];
    moe_context *context = new_context();
    moe_plan *plan;
    moe_plan_args a;
    moe_rows_args k;
    MUST(moe_plan_create(&plan, context));
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = T, a.num_experts = 2, a.top_k = 2, a.expert_ids = ids, a.weights = weights;
    MUST(moe_plan_build(plan, &a));
    for (int i = 0; i < T * W; i++) number_set(tokens, i, dtype, i + 1);
    MUST(moe_rows_args_init(&k, sizeof k));
    k.dtype = dtype, k.width = W, k.tokens_in = tokens, k.rows_out = rows;
    MUST(moe_dispatch_forward(plan, &k));
    k.rows_in = rows, k.tokens_out = out;
    MUST(moe_combine_forward(plan, &k));
    k.rows_out = scaled, k.entry_weight_grad = grad;
    MUST(moe_combine_backward(plan, &k));
    for (int t = 0; t < T; t++) {
        double sum = 0, squares = 0;
        for (int j = 0; j < 2; j++) sum += ids[2 * t + j] < 0 ? 0 : (double)weights[2 * t + j];
        for (int i = 0; i < W; i++) {
            double x = t * W + i + 1;
            squares += x * x;
            ck_assert_double_le(fabs(number_at(out, t * W + i, dtype) - sum * x),
                                unit(dtype) * sum * x);
        }
        for (int j = 0; j < 2; j++)
            ck_assert_double_eq((double)grad[2 * t + j], ids[2 * t + j] < 0 ? 0 : squares);
    }
    moe_plan_destroy(plan), moe_context_destroy(context);
}
END_TEST

START_TEST(test_half_layer_is_described_counted_and_checked)
{
    layer_case c = plain;
    layer_run r;
    int32_t dtype = halves[_i];
    char text[4096];
    double squared, sum = 0;
    int64_t size, bytes = 0, gradients = 0;
    c.selection_bias = 1;
    rounded_case(&c, dtype, 1);
    train(&r, &c, dtype);
    moe_cost_query q;
    moe_cost cost;
    moe_gate_config g;
    moe_experts_config e;
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_gate_get_config(r.gate, &g));
    MUST(moe_experts_get_config(r.experts, &e));
    MUST(moe_cost_query_init(&q, sizeof q));
    MUST(moe_cost_init(&cost, sizeof cost));
    q.gate = &g, q.experts = &e, q.tokens = c.T, q.threads = moe_context_threads(r.context);
    q.flags = MOE_FORWARD_TRAIN;
    if (ON_DEVICE) q.context = r.context;
    MUST(moe_layer_memory(&q, &cost));
    for (int64_t i = 0; i < moe_layer_parameter_count(r.layer); i++) {
        moe_parameter_record record;
        MUST(moe_parameter_record_init(&record, sizeof record));
        MUST(moe_layer_parameter(r.layer, i, &record));
        bytes += record.element_count * (int64_t)number_bytes(record.data_dtype);
        gradients += record.element_count * (int64_t)number_bytes(record.grad_dtype);
        for (int64_t n = 0; record.grad && n < record.element_count; n++)
            sum += pow(number_at(record.grad, n, record.grad_dtype), 2);
    }
    ck_assert_int_eq(cost.parameter_bytes, bytes);
    ck_assert_int_eq(cost.gradient_bytes, gradients);
    ck_assert_int_eq(cost.pass_bytes, moe_pass_bytes(r.pass));
    MUST(moe_layer_gradient_norm(r.layer, &squared, NULL));
    ck_assert_double_le(fabs(squared - sum), 1e-12 * sum);
    MUST(moe_describe(text, sizeof text, &size, &g, &e, NULL));
    ck_assert_ptr_nonnull(strstr(text, dtype == MOE_DTYPE_BF16 ? "bf16" : "f16"));
    moe_gradient_check check;
    moe_gradient_report report;
    MUST(moe_gradient_check_init(&check, sizeof check));
    MUST(moe_gradient_report_init(&report, sizeof report));
    check.parameters = MOE_CHECK_CURRENT;
    MUST(moe_check_gradients(r.layer, &check, &report));
    ck_assert_int_eq(report.disagreements, 0);
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("half_layer");
    TCase *tests = tcase_create("sentences");
    tcase_set_timeout(tests, 600);
    tcase_add_loop_test(tests, test_half_routing_is_that_of_an_f32_layer_bit_for_bit, 0,
                        2 * LAYER_CASES);
    tcase_add_loop_test(tests, test_half_routing_of_a_wide_gate_with_jitter_is_that_of_f32, 0, 2);
    tcase_add_loop_test(tests, test_half_layer_of_many_blocks_is_near_an_f32_layer, 0, 8);
    tcase_add_loop_test(tests, test_half_parameters_have_f32_gradients_and_f32_buffers, 0, 2);
    tcase_add_loop_test(tests, test_half_gradients_are_the_f32_ones_rounded_at_each_step, 0, 2);
    tcase_add_loop_test(tests, test_half_outputs_are_added_to_in_f32, 0, 2);
    tcase_add_loop_test(tests, test_half_parameters_are_drawn_as_f32_and_rounded, 0, 2);
    tcase_add_loop_test(tests, test_half_gate_takes_f32_weights, 0, 2);
    tcase_add_loop_test(tests, test_half_bindings_of_other_dtypes_are_refused, 0, 2);
    tcase_add_loop_test(tests, test_half_layer_takes_plans_of_f32, 0, 2);
#ifndef MOE_TEST_DEVICE
    tcase_add_test(tests, test_half_layer_on_several_ranks_is_refused);
    tcase_add_loop_test(tests, test_half_host_experts_see_rows_of_16_bits, 0, 2);
#endif
    tcase_add_loop_test(tests, test_half_rows_are_dispatched_and_combined, 0, 2);
    tcase_add_loop_test(tests, test_half_layer_is_described_counted_and_checked, 0, 2);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
