/* check_export.c - parameters of the storage modes: records, first values, export and import,
 * optimizers that walk opaque elements, zeroing, norms, layers of several pools, memory. */
#include "support/crew.h"
#include "support/storage_unit.h"
#include "support/suite.h"

#include "reals.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static moe_parameter_record record(const moe_experts *pool, const char *name)
{
    moe_parameter_record r;
    MUST(moe_parameter_record_init(&r, sizeof r));
    MUST(moe_experts_parameter(pool, moe_experts_parameter_find(pool, name), &r));
    return r;
}

static int64_t ceil_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* ---- records --------------------------------------------------------------------------------- */

START_TEST(test_export_records_of_panels)
{
    static const char *const separate[] = {"w13", "b1", "b3", "w2", "b2"};
    static const char *const fused[] = {"w13", "b13", "w2", "b2"};
    static const char *const plain[] = {"w1", "b1", "w2", "b2"};
    for (int gated = 0; gated < 2; gated++) {
        storage_unit u;
        moe_experts_config e = storage_config(gated ? MOE_ACTIVATION_SWIGLU : 0, MOE_STORAGE_PANELS,
                                              MOE_DTYPE_F16);
        e.weight_layout = _i;
        storage_unit_make(&u, NULL, &e, UNIT_OWNED, 1);
        ck_assert_int_eq(moe_experts_parameter_count(u.pool), gated ? 5 : 4);
        for (int i = 0; i < 4 + gated; i++)
            ck_assert_int_eq(moe_experts_parameter_find(u.pool, gated ? separate[i] : plain[i]), i);
        moe_parameter_record r = record(u.pool, gated ? "w13" : "w1"), b = record(u.pool, "b2");
        int64_t columns = gated ? 2 * e.d_hidden : e.d_hidden;
        ck_assert(r.opaque && r.owned && r.trainable && r.dims == 3);
        ck_assert(r.shape[0] == 4 && r.shape[1 + _i] == 37 && r.shape[2 - _i] == columns);
        ck_assert_int_eq(r.element_count,
                         4 * 37 * (gated ? 2 * ceil_to(e.d_hidden, 16) : ceil_to(e.d_hidden, 32)));
        for (int d = 0; d < MOE_MAX_DIMS; d++)
            ck_assert(r.data_stride[d] == 0 && r.grad_stride[d] == 0);
        ck_assert(r.data && r.grad && !r.data_per_expert && !r.grad_per_expert);
        ck_assert(r.data_dtype == MOE_DTYPE_F16 && r.grad_dtype == MOE_DTYPE_F32);
        r = record(u.pool, "w2");
        ck_assert(r.opaque && r.element_count == 4 * e.d_hidden * ceil_to(e.d_out, 32));
        ck_assert(!b.opaque && b.element_count == 4 * e.d_out && b.data_stride[0] == e.d_out);
        storage_unit_free(&u);
    }
    storage_unit u;
    moe_experts_config e = storage_config(MOE_ACTIVATION_SWIGLU, MOE_STORAGE_PANELS, 0);
    e.glu_order = MOE_GLU_INTERLEAVED, e.num_experts = MOE_NO_EXPERTS;
    moe_context *context;
    MUST(moe_context_create(&context, NULL));
    MUST(moe_experts_create(&u.pool, context, &e));
    for (int i = 0; i < 4; i++) ck_assert_int_eq(moe_experts_parameter_find(u.pool, fused[i]), i);
    ck_assert_int_eq(record(u.pool, "w13").element_count, 0);
    MUST(moe_experts_init_parameters(u.pool, 1));
    MUST(moe_experts_zero_gradients(u.pool, NULL));
    MUST(moe_experts_export(u.pool, 0, MOE_PARAMETER_DATA, 0, 0, NULL));
    moe_experts_destroy(u.pool);
    e.storage = MOE_STORAGE_PREPACKED;
    MUST(moe_experts_create(&u.pool, context, &e));
    moe_experts_destroy(u.pool), moe_context_destroy(context);
}
END_TEST

/* The same first value for each logical element in every mode. */
START_TEST(test_export_first_values_are_the_same_in_every_mode)
{
    for (int layout = 0; layout < 2; layout++)
        for (int order = -1; order <= MOE_GLU_INTERLEAVED; order++) {
            storage_unit u[3];
            for (int32_t storage = 0; storage < 3; storage++) {
                moe_experts_config e = storage_config(order < 0 ? 0 : MOE_ACTIVATION_REGLU, storage,
                                                      _i);
                e.weight_layout = layout, e.glu_order = order < 0 ? 0 : order;
                storage_unit_make(&u[storage], NULL, &e, UNIT_OWNED, 1);
                MUST(moe_experts_init_parameters(u[storage].pool, 77));
                ck_assert_int_eq(storage_unit_filling(&u[storage]), 0);
            }
            for (int tensor = 0; tensor < UNIT_TENSORS; tensor++) {
                double *want = storage_unit_read(&u[0], tensor, MOE_PARAMETER_DATA);
                for (int32_t storage = 1; want && storage < 3; storage++) {
                    double *got = storage_unit_read(&u[storage], tensor, MOE_PARAMETER_DATA);
                    ck_assert_mem_eq(want, got,
                                     (size_t)storage_unit_count(&u[0], tensor) * sizeof *got);
                    free(got);
                }
                if (want && tensor < UNIT_B1) ck_assert(want[0] != 0);
                free(want);
            }
            for (int32_t storage = 0; storage < 3; storage++) storage_unit_free(&u[storage]);
        }
}
END_TEST

/* ---- export and import ----------------------------------------------------------------------- */

/* What a record says of element (e,i,j). */
static const char *element_of(const moe_parameter_record *r, int32_t what, int64_t e, int64_t i,
                              int64_t j)
{
    bool grad = what == MOE_PARAMETER_GRADIENT;
    const int64_t *s = grad ? r->grad_stride : r->data_stride;
    int64_t size = moe__dtype_size(grad ? r->grad_dtype : r->data_dtype);
    void *const *each = grad ? r->grad_per_expert : r->data_per_expert;
    const char *base = each ? each[e] : (const char *)(grad ? r->grad : r->data) + e * s[0] * size;
    return base + (i * s[1] + j * s[2]) * size;
}

/* By strides and by pointers it is what the record says; any range of experts. */
START_TEST(test_export_is_what_the_record_shows)
{
    for (int32_t where = UNIT_OWNED; where <= UNIT_EACH; where++) {
        storage_unit u;
        moe_experts_config e = storage_config(MOE_ACTIVATION_SWIGLU, MOE_STORAGE_ROW_MAJOR, _i);
        e.glu_order = where;
        storage_unit_make(&u, NULL, &e, where, 1);
        storage_unit_step(&u, 0);
        for (int64_t index = 0; index < moe_experts_parameter_count(u.pool); index++)
            for (int32_t what = 0; what < 2; what++) {
                moe_parameter_record r;
                MUST(moe_parameter_record_init(&r, sizeof r));
                MUST(moe_experts_parameter(u.pool, index, &r));
                int64_t size = moe__dtype_size(what ? r.grad_dtype : r.data_dtype);
                char *dense = malloc((size_t)(r.element_count * size + 1)), *at = dense;
                for (int64_t first = 0; first < 4; first++) {
                    int64_t count = 4 - first - first / 2;
                    int64_t bytes = count * r.shape[1] * r.shape[2] * size;
                    dense[bytes] = 0x33;
                    MUST(moe_experts_export(u.pool, index, what, first, count, dense));
                    at = dense;
                    for (int64_t x = first; x < first + count; x++)
                        for (int64_t i = 0; i < r.shape[1]; i++)
                            for (int64_t j = 0; j < r.shape[2]; j++, at += size)
                                ck_assert_mem_eq(at, element_of(&r, what, x, i, j), (size_t)size);
                    ck_assert(dense[bytes] == 0x33);
                }
                free(dense);
            }
        storage_unit_free(&u);
    }
}
END_TEST

/* What goes in comes out, bit for bit, in every mode and range; what fills panels up stays 0. */
START_TEST(test_export_gives_what_was_imported)
{
    for (int storage = 0; storage < 3; storage++)
        for (int order = -1; order <= MOE_GLU_INTERLEAVED; order++)
            for (int64_t index = 0; index < 2; index++) {
                storage_unit u;
                moe_parameter_record r;
                moe_experts_config e = storage_config(order < 0 ? 0 : MOE_ACTIVATION_REGLU, storage,
                                                      _i % 4);
                e.weight_layout = _i / 4, e.glu_order = order < 0 ? 0 : order;
                storage_unit_make(&u, NULL, &e, UNIT_OWNED, 1);
                MUST(moe_parameter_record_init(&r, sizeof r));
                MUST(moe_experts_parameter(u.pool, index, &r));
                for (int32_t what = 0; what < 2; what++) {
                    int64_t size = moe__dtype_size(what ? r.grad_dtype : r.data_dtype);
                    int64_t one = r.shape[1] * r.shape[2] * size;
                    char *before = malloc((size_t)(4 * one)), *in = malloc((size_t)(2 * one)),
                         *out = malloc((size_t)(4 * one));
                    for (int64_t i = 0; i < 2 * one; i++) in[i] = (char)(i * 37 % 251 + 1);
                    MUST(moe_experts_export(u.pool, index, what, 0, 4, before));
                    MUST(moe_experts_import(u.pool, index, what, 1, 2, in));
                    MUST(moe_experts_export(u.pool, index, what, 0, 4, out));
                    ck_assert_mem_eq(out, before, (size_t)one);
                    ck_assert_mem_eq(out + one, in, (size_t)(2 * one));
                    ck_assert_mem_eq(out + 3 * one, before + 3 * one, (size_t)one);
                    free(before), free(in), free(out);
                }
                ck_assert_int_eq(storage_unit_filling(&u), 0);
                storage_unit_free(&u);
            }
}
END_TEST

START_TEST(test_export_refuses_bad_arguments)
{
    storage_unit u;
    float dense[64];
    moe_experts_config e = storage_config(0, MOE_STORAGE_PREPACKED, MOE_DTYPE_F32);
    e.parameters = MOE_PARAMETERS_OWNED_NO_GRAD;
    MUST(moe_context_create(&u.context, NULL));
    MUST(moe_experts_create(&u.pool, u.context, &e));
    moe_experts *p = u.pool;
    const int32_t data = MOE_PARAMETER_DATA, grad = MOE_PARAMETER_GRADIENT;
#define BOTH(status, words, pool, ...)                             \
    REFUSED(status, words, moe_experts_export(pool, __VA_ARGS__)); \
    REFUSED(status, words, moe_experts_import(pool, __VA_ARGS__))
    BOTH(MOE_ERROR_INVALID_ARGUMENT, "experts is NULL", NULL, 0, data, 0, 1, dense);
    BOTH(MOE_ERROR_INVALID_ARGUMENT, "index is -1", p, -1, data, 0, 1, dense);
    BOTH(MOE_ERROR_INVALID_ARGUMENT, "index is 4", p, 4, data, 0, 1, dense);
    BOTH(MOE_ERROR_INVALID_ARGUMENT, "what is 2", p, 0, 2, 0, 1, dense);
    BOTH(MOE_ERROR_INVALID_ARGUMENT, "what is -1", p, 0, -1, 0, 1, dense);
    BOTH(MOE_ERROR_INVALID_ARGUMENT, "first_expert is -1", p, 0, data, -1, 1, dense);
    BOTH(MOE_ERROR_INVALID_ARGUMENT, "first_expert is 5", p, 0, data, 5, 0, dense);
    BOTH(MOE_ERROR_INVALID_ARGUMENT, "count is 2", p, 0, data, 3, 2, dense);
    BOTH(MOE_ERROR_INVALID_ARGUMENT, "count is -1", p, 0, data, 0, -1, dense);
    BOTH(MOE_ERROR_INVALID_ARGUMENT, "NULL", p, 0, data, 0, 1, NULL);
    BOTH(MOE_ERROR_INVALID_STATE, "w1 has no gradient", p, 0, grad, 0, 1, dense);
    MUST(moe_experts_export(p, 0, data, 4, 0, NULL));
    moe_experts_destroy(p), moe_context_destroy(u.context);

    e.parameters = MOE_PARAMETERS_BOUND;
    MUST(moe_context_create(&u.context, NULL));
    MUST(moe_experts_create(&p, u.context, &e));
    BOTH(MOE_ERROR_INVALID_STATE, "w1 is not bound", p, 0, data, 0, 1, dense);
    moe_experts_destroy(p), moe_context_destroy(u.context);

    storage_unit_make(&u, NULL, &e, UNIT_EACH, 1);
    REFUSED(MOE_ERROR_INVALID_STATE, "b1 is bound",
            moe_experts_import(u.pool, 1, data, 0, 1, dense));
    MUST(moe_experts_import(u.pool, 1, grad, 0, 1, dense)); /* gradients may be written */
    u.memory[1].grad_each[2] = NULL;
    MUST(moe_experts_bind(u.pool, 1, &u.memory[1].binding));
    BOTH(MOE_ERROR_INVALID_STATE, "expert 2 has no gradient", u.pool, 1, grad, 1, 2, dense);
    MUST(moe_experts_export(u.pool, 1, grad, 3, 1, dense));
    storage_unit_free(&u);
#undef BOTH
}
END_TEST

START_TEST(test_export_modes_that_are_refused)
{
    moe_context *context;
    moe_experts *pool = NULL;
    moe_binding b;
    float memory[4];
    MUST(moe_context_create(&context, NULL));
    moe_experts_config e = storage_config(0, MOE_STORAGE_PANELS, MOE_DTYPE_F32);
    e.parameters = MOE_PARAMETERS_BOUND;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, "MOE_STORAGE_PANELS",
            moe_experts_create(&pool, context, &e));
    e.parameters = MOE_PARAMETERS_OWNED_NO_GRAD;
    MUST(moe_experts_create(&pool, context, &e));
    MUST(moe_binding_init(&b, sizeof b));
    b.data = memory;
    REFUSED(MOE_ERROR_NOT_SUPPORTED, "w1 is kept in MOE_STORAGE_PANELS",
            moe_experts_bind(pool, 0, &b));
    MUST(moe_experts_bind(pool, 0, NULL)); /* where it is */
    moe_experts_destroy(pool);
    for (int32_t storage = 1; storage < 3; storage++) {
        MUST(moe_experts_config_init(&e, sizeof e));
        e.d_model = 4, e.num_experts = 2, e.kind = MOE_EXPERTS_IDENTITY, e.storage = storage;
        REFUSED(MOE_ERROR_INVALID_ARGUMENT, "storage", moe_experts_create(&pool, context, &e));
        e = storage_config(0, storage, MOE_DTYPE_F32);
        e.d_model = INT64_MAX / 16, e.d_hidden = 1, e.d_out = 1;
        REFUSED(MOE_ERROR_OVERFLOW, "63 bits", moe_experts_create(&pool, context, &e));
        e.d_model = 1, e.d_hidden = INT64_MAX - 3;
        REFUSED(MOE_ERROR_OVERFLOW, "63 bits", moe_experts_create(&pool, context, &e));
    }
    moe_context_destroy(context);
}
END_TEST

/* ---- optimizers, zeroing, norms -------------------------------------------------------------- */

/* Momentum and weight decay, each element alike, over all elements of every record. */
static void optimize(storage_unit *u, double *momentum[])
{
    for (int64_t index = 0; index < moe_experts_parameter_count(u->pool); index++) {
        moe_parameter_record r;
        MUST(moe_parameter_record_init(&r, sizeof r));
        MUST(moe_experts_parameter(u->pool, index, &r));
        if (!momentum[index]) momentum[index] = calloc((size_t)r.element_count, sizeof(double));
        for (int64_t i = 0; i < r.element_count; i++) {
            double g = moe__real_at(r.grad, i, r.grad_dtype),
                   w = moe__real_at(r.data, i, u->e.dtype);
            momentum[index][i] = 0.875 * momentum[index][i] + g;
            moe__set_real(r.data, i, u->e.dtype, w - 0.125 * (momentum[index][i] + 0.25 * w));
        }
    }
    MUST(moe_experts_weights_changed(u->pool));
}

/* Three steps of training give the same weights in every mode. */
START_TEST(test_export_optimizer_walks_opaque_elements)
{
    storage_unit u[3];
    for (int32_t storage = 0; storage < 3; storage++) {
        double *momentum[UNIT_TENSORS] = {NULL};
        moe_experts_config e = storage_config(
            _i / 4 ? MOE_ACTIVATION_GEGLU_TANH : MOE_ACTIVATION_GELU_TANH, storage, _i % 4);
        storage_unit_make(&u[storage], NULL, &e, UNIT_OWNED, 1);
        for (int step = 0; step < 3; step++) {
            MUST(moe_experts_zero_gradients(u[storage].pool, NULL));
            storage_unit_step(&u[storage], 0);
            optimize(&u[storage], momentum);
            ck_assert_int_eq(storage_unit_filling(&u[storage]), 0);
        }
        for (int i = 0; i < UNIT_TENSORS; i++) free(momentum[i]);
        for (int tensor = 0; storage && tensor < UNIT_TENSORS; tensor++) {
            double *want = storage_unit_read(&u[0], tensor, MOE_PARAMETER_DATA);
            double *got = storage_unit_read(&u[storage], tensor, MOE_PARAMETER_DATA);
            if (want)
                ck_assert_mem_eq(want, got,
                                 (size_t)storage_unit_count(&u[0], tensor) * sizeof *got);
            free(want), free(got);
        }
        if (storage) ck_assert_str_eq(storage_unit_compare(&u[0], &u[storage], 1), "");
    }
    for (int32_t storage = 0; storage < 3; storage++) storage_unit_free(&u[storage]);
}
END_TEST

/* Without gradients a backward finds dx alone. */
START_TEST(test_export_pools_without_gradients)
{
    storage_unit u[3];
    for (int32_t storage = 0; storage < 3; storage++) {
        moe_experts_config e = storage_config(MOE_ACTIVATION_SWIGLU, storage, MOE_DTYPE_F32);
        e.parameters = MOE_PARAMETERS_OWNED_NO_GRAD;
        storage_unit_make(&u[storage], NULL, &e, UNIT_OWNED, 1);
        storage_unit_step(&u[storage], 0);
        ck_assert_str_eq(storage_unit_compare(&u[0], &u[storage], 0), "");
        ck_assert_mem_eq(u[storage].dx, u[0].dx, (size_t)u[0].x_bytes);
        ck_assert_ptr_null(record(u[storage].pool, "w2").grad);
        ck_assert_int_eq(storage_unit_filling(&u[storage]), 0);
    }
    for (int32_t storage = 0; storage < 3; storage++) storage_unit_free(&u[storage]);
}
END_TEST

static int all_zero(const moe_parameter_record *r, int64_t first, int64_t end)
{
    for (int64_t i = first; i < end; i++)
        if (moe__real_at(r->grad, i, r->grad_dtype) != 0) return 0;
    return 1;
}

START_TEST(test_export_gradients_of_panels_are_zeroed)
{
    storage_unit u;
    uint8_t touched[4];
    int64_t count;
    moe_experts_config e = storage_config(_i ? MOE_ACTIVATION_SWIGLU : 0, MOE_STORAGE_PANELS,
                                          MOE_DTYPE_F32);
    storage_unit_make(&u, NULL, &e, UNIT_OWNED, 1);
    for (int way = 0; way < 2; way++) {
        storage_unit_step(&u, 0);
        MUST(moe_experts_touched(u.pool, touched, &count));
        ck_assert(count == 3 && !touched[3]);
        moe_parameter_record r = record(u.pool, _i ? "w13" : "w1");
        int64_t one = r.element_count / 4;
        ck_assert(!all_zero(&r, 0, one) && all_zero(&r, 3 * one, 4 * one));
        float *mark = (float *)r.grad + 3 * one; /* of the expert without rows */
        *mark = 1;
        MUST(way ? moe_experts_zero_touched_gradients(u.pool, NULL)
                 : moe_experts_zero_gradients(u.pool, NULL));
        ck_assert(all_zero(&r, 0, 3 * one) && *mark == (way ? 1.0f : 0.0f));
        *mark = 0;
        r = record(u.pool, "w2");
        ck_assert(all_zero(&r, 0, r.element_count));
    }
    storage_unit_free(&u);
}
END_TEST

/* ---- layers ---------------------------------------------------------------------------------- */

/* Routed, shared and residual pools in one mode: y, dx, the squared norm, the check. */
typedef struct whole {
    moe_context *context;
    moe_gate *gate;
    moe_experts *pool[3];
    moe_layer *layer;
    moe_pass *pass;
    double y[7 * 5], dx[7 * 5], squared;
} whole;

static void make_whole(whole *w, int32_t storage, int32_t order, int32_t layout)
{
    moe_gate_config g;
    moe_layer_config l;
    MUST(moe_context_create(&w->context, NULL));
    MUST(moe_gate_config_init(&g, sizeof g));
    g.d_model = 5, g.num_experts = 4, g.top_k = 2, g.dtype = MOE_DTYPE_F64;
    MUST(moe_gate_create(&w->gate, w->context, &g));
    for (int i = 0; i < 3; i++) {
        moe_experts_config e = storage_config(
            i == 1 ? MOE_ACTIVATION_GELU_ERF : MOE_ACTIVATION_SWIGLU, storage, MOE_DTYPE_F64);
        e.d_model = e.d_out = 5, e.d_hidden = 19 + i, e.num_experts = i ? i : 4;
        e.weight_layout = layout, e.glu_order = i == 1 ? 0 : order;
        if (i == 2) e.num_experts = 1;
        MUST(moe_experts_create(&w->pool[i], w->context, &e));
    }
    MUST(moe_layer_config_init(&l, sizeof l));
    l.gate = w->gate, l.experts = w->pool[0], l.shared = w->pool[1], l.residual = w->pool[2];
    MUST(moe_layer_create(&w->layer, &l));
    MUST(moe_layer_init_parameters(w->layer, 4));
    MUST(moe_pass_create(&w->pass, w->layer, NULL));
}

static void run_whole(whole *w)
{
    double x[7 * 5], dy[7 * 5];
    moe_forward_args f;
    moe_backward_args b;
    for (int i = 0; i < 7 * 5; i++) x[i] = (i * 7 % 11 - 5) / 8.0, dy[i] = (i * 5 % 13 - 6) / 8.0;
    MUST(moe_forward_args_init(&f, sizeof f));
    MUST(moe_backward_args_init(&b, sizeof b));
    f.tokens = 7, f.x = x, f.y = w->y, b.dy = dy, b.dx = w->dx;
    MUST(moe_layer_forward(w->layer, w->pass, &f));
    MUST(moe_layer_backward(w->layer, w->pass, &b));
    MUST(moe_layer_gradient_norm(w->layer, &w->squared, NULL));
}

static void free_whole(whole *w)
{
    moe_pass_destroy(w->pass), moe_layer_destroy(w->layer), moe_gate_destroy(w->gate);
    for (int i = 0; i < 3; i++) moe_experts_destroy(w->pool[i]);
    moe_context_destroy(w->context);
}

START_TEST(test_export_layer_is_the_same_in_every_mode)
{
    whole w[3];
    for (int32_t storage = 0; storage < 3; storage++) {
        moe_gradient_check check;
        moe_gradient_report report;
        make_whole(&w[storage], storage, _i % 4, _i / 4);
        run_whole(&w[storage]);
        MUST(moe_gradient_check_init(&check, sizeof check));
        MUST(moe_gradient_report_init(&report, sizeof report));
        for (int32_t parameters = MOE_CHECK_DRAWN; parameters <= MOE_CHECK_CURRENT; parameters++) {
            check.tokens = 6, check.probes = 4, check.parameters = parameters;
            MUST(moe_check_gradients(w[storage].layer, &check, &report));
            ck_assert(report.probes > 0 && report.disagreements == 0);
        }
        if (storage == 0) continue;
        ck_assert_mem_eq(w[storage].y, w[0].y, sizeof w[0].y);
        ck_assert_mem_eq(w[storage].dx, w[0].dx, sizeof w[0].dx);
        if (_i % 4 != MOE_GLU_SEPARATE || storage == MOE_STORAGE_PREPACKED)
            ck_assert_mem_eq(&w[storage].squared, &w[0].squared, sizeof w[0].squared);
        else /* w13's elements are in another order than w1's and w3's */
            ck_assert_double_eq_tol(w[storage].squared, w[0].squared, 1e-12 * w[0].squared);
    }
    for (int32_t storage = 0; storage < 3; storage++) free_whole(&w[storage]);
}
END_TEST

/* Parts of different modes behind one pool: what the parts are told, and what they give. */
START_TEST(test_export_parts_of_every_mode)
{
    storage_unit whole_pool[2];
    for (int mixed = 0; mixed < 2; mixed++) {
        storage_unit *u = &whole_pool[mixed], part[3];
        moe_experts *pools[3], *all;
        moe_experts_config e = storage_config(MOE_ACTIVATION_SWIGLU, 0, MOE_DTYPE_F32);
        e.num_experts = 12;
        storage_unit_make(u, NULL, &e, UNIT_OWNED, 1);
        memset(part, 0, sizeof part);
        for (int i = 0; i < 3; i++) {
            e.num_experts = 4, e.d_hidden = 20 + 13 * i, e.storage = mixed ? 2 - i : 0;
            part[i].e = e;
            MUST(moe_experts_create(&pools[i], u->context, &e));
            part[i].pool = pools[i];
            storage_unit_draw(&part[i], (uint64_t)i);
        }
        MUST(moe_experts_create_parts(&all, pools, 3));
        ck_assert_int_eq(moe_experts_parameter_find(all, mixed ? "0.w13" : "0.w1"), 0);
        moe_pass_destroy(u->pass);
        moe_experts_destroy(u->pool);
        u->pool = all;
        MUST(moe_pass_create_for_experts(&u->pass, u->pool, NULL));
        storage_unit_step(u, MOE_BACKWARD_OVERWRITE);
        /* a change of a part through the whole */
        int64_t b2 = moe_experts_parameter_find(all, "1.w2"), n = 4 * 33 * 70;
        float *values = malloc((size_t)n * sizeof *values);
        for (int64_t i = 0; i < n; i++) values[i] = (float)(i % 7 - 3) / 32;
        MUST(moe_experts_import(all, b2, MOE_PARAMETER_DATA, 0, 4, values));
        storage_unit_step(u, MOE_BACKWARD_OVERWRITE);
        free(values);
        for (int i = 0; i < 3; i++) {
            if (i == 1 && mixed) { /* prepacked, written past the library, and told the whole */
                moe_parameter_record r = record(pools[i], "w2");
                ((float *)r.data)[0] += 1;
                MUST(moe_experts_weights_changed(all));
            } else if (i == 1) {
                ((float *)record(pools[i], "w2").data)[0] += 1;
            }
        }
        storage_unit_step(u, MOE_BACKWARD_OVERWRITE);
        for (int i = 0; i < 3; i++) moe_experts_destroy(pools[i]);
    }
    ck_assert_mem_eq(whole_pool[0].y, whole_pool[1].y, (size_t)whole_pool[0].y_bytes);
    ck_assert_mem_eq(whole_pool[0].dx, whole_pool[1].dx, (size_t)whole_pool[0].x_bytes);
    for (int mixed = 0; mixed < 2; mixed++) storage_unit_free(&whole_pool[mixed]);
}
END_TEST

/* ---- ranks ----------------------------------------------------------------------------------- */

enum { RANKS = 2 };

typedef struct rank_result {
    double y[7 * CREW_D], dx[7 * CREW_D], squared, shared[2 * CREW_D * CREW_F];
} rank_result;

static void configure_rank(member *m) { m->e.storage = *(const int32_t *)m->crew->test; }

static void add_shared(member *m)
{
    moe_experts_config e = m->e;
    e.num_experts = 1;
    MUST(moe_experts_create(&m->l.shared, m->context, &e));
}

static void run_rank(member *m)
{
    rank_result *r = m->own;
    double x[7 * CREW_D], dy[7 * CREW_D];
    for (int i = 0; i < 7 * CREW_D; i++)
        x[i] = ((i + m->rank) * 7 % 11 - 5) / 8.0, dy[i] = ((i - m->rank) * 5 % 13 - 6) / 8.0;
    MUST(member_make(m, 4));
    moe_experts *shared = m->l.shared;
    m->f.tokens = 7, m->f.x = x, m->f.y = r->y, m->b.dy = dy, m->b.dx = r->dx;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    MUST(moe_layer_reduce_gradients(m->layer, NULL));
    MUST(moe_layer_gradient_norm(m->layer, &r->squared, NULL));
    MUST(moe_experts_export(shared, 0, MOE_PARAMETER_GRADIENT, 0, 1, r->shared));
    MUST(moe_experts_export(shared, 1, MOE_PARAMETER_GRADIENT, 0, 1, r->shared + CREW_D * CREW_F));
    moe_experts_destroy(shared);
}

START_TEST(test_export_ranks_are_the_same_in_every_mode)
{
    rank_result result[3][RANKS];
    for (int32_t storage = 0; storage < 3; storage++) {
        member m[RANKS];
        crew c = {.ranks = RANKS,
                  .run = run_rank,
                  .configure = configure_rank,
                  .ready = add_shared,
                  .test = &storage};
        memset(m, 0, sizeof m);
        for (int r = 0; r < RANKS; r++) m[r].own = &result[storage][r];
        crew_run(&c, m);
        ck_assert_mem_eq(&result[storage], &result[0], sizeof result[0]);
    }
}
END_TEST

/* ---- memory ---------------------------------------------------------------------------------- */

typedef struct failing {
    long calls, fail_at, blocks;
} failing;

static void *failing_alloc(void *user, uint64_t size, uint64_t alignment)
{
    failing *f = user;
    void *memory = NULL;
    if (++f->calls == f->fail_at) return NULL;
    if (posix_memalign(&memory, (size_t)alignment, (size_t)size) != 0) return NULL;
    memset(memory, 0xa5, (size_t)size);
    f->blocks++;
    return memory;
}
static void failing_free(void *user, void *memory, uint64_t size)
{
    failing *f = user;
    (void)size;
    f->blocks--;
    free(memory);
}

/* Every failing allocation of a creation; afterwards a step and a change allocate nothing. */
START_TEST(test_export_memory_that_fails_and_a_step_that_needs_none)
{
    failing f = {0};
    moe_context_config k;
    storage_unit u;
    MUST(moe_context_config_init(&k, sizeof k));
    k.alloc = failing_alloc, k.free = failing_free, k.alloc_user = &f;
    k.threads = 1;
    moe_experts_config e = storage_config(MOE_ACTIVATION_SWIGLU, _i, MOE_DTYPE_F32);
    MUST(moe_context_create(&u.context, &k));
    long before = f.blocks;
    for (long at = 1;; at++) {
        f.calls = 0, f.fail_at = at;
        moe_experts *pool = NULL;
        moe_status status = moe_experts_create(&pool, u.context, &e);
        f.fail_at = 0;
        if (status == MOE_OK) {
            moe_experts_destroy(pool);
            ck_assert_int_eq(f.blocks, before);
            ck_assert_int_gt(at, _i == MOE_STORAGE_PREPACKED ? 12 : 10);
            break;
        }
        ck_assert_int_eq(status, MOE_ERROR_OUT_OF_MEMORY);
        ck_assert_ptr_null(pool);
        ck_assert_int_eq(f.blocks, before);
    }
    moe_context_destroy(u.context);
    storage_unit_make(&u, &k, &e, UNIT_OWNED, 1);
    storage_unit_step(&u, 0);
    f.calls = 0;
    MUST(moe_experts_weights_changed(u.pool));
    storage_unit_step(&u, 0);
    ck_assert_int_eq(f.calls, 0);
    storage_unit_free(&u);
    ck_assert_int_eq(f.blocks, 0);
}
END_TEST

START_TEST(test_export_memory_is_what_the_query_says)
{
    int64_t bytes[3], gradients[3];
    for (int32_t storage = 0; storage < 3; storage++) {
        storage_unit u;
        moe_cost_query q;
        moe_cost cost;
        moe_experts_config e = storage_config(_i ? MOE_ACTIVATION_SWIGLU : 0, storage,
                                              MOE_DTYPE_BF16);
        storage_unit_make(&u, NULL, &e, UNIT_OWNED, 1);
        bytes[storage] = gradients[storage] = 0;
        for (int64_t index = 0; index < moe_experts_parameter_count(u.pool); index++) {
            moe_parameter_record r;
            MUST(moe_parameter_record_init(&r, sizeof r));
            MUST(moe_experts_parameter(u.pool, index, &r));
            bytes[storage] += r.element_count * 2;
            gradients[storage] += r.element_count * 4;
        }
        MUST(moe_cost_query_init(&q, sizeof q));
        MUST(moe_cost_init(&cost, sizeof cost));
        q.experts = &e, q.top_k = 2, q.tokens = 1;
        /* the query is about a layer whose experts are all of num_experts */
        int64_t biases = 4 * ((_i ? 2 : 1) * e.d_hidden + e.d_out) * 2;
        if (storage == MOE_STORAGE_PANELS)
            bytes[MOE_STORAGE_PREPACKED] += bytes[MOE_STORAGE_PANELS] - biases;
        MUST(moe_layer_memory(&q, &cost));
        if (storage != MOE_STORAGE_PREPACKED)
            ck_assert_int_eq(cost.parameter_bytes, bytes[storage]);
        else
            bytes[0] = cost.parameter_bytes; /* compared below */
        ck_assert_int_eq(cost.gradient_bytes, gradients[storage]);
        ck_assert_int_eq(cost.parameter_count, 4 * (37 * 45 * (_i ? 2 : 1) + 45 * 70) + biases / 2);
        storage_unit_free(&u);
    }
    ck_assert_int_eq(bytes[0], bytes[MOE_STORAGE_PREPACKED]);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("export");
    TCase *values = tcase_create("values"), *layers = tcase_create("layers"),
          *memory = tcase_create("memory");
    tcase_set_timeout(values, 120), tcase_set_timeout(layers, 120);
    tcase_set_timeout(memory, 120);
    tcase_add_loop_test(values, test_export_records_of_panels, 0, 2);
    tcase_add_loop_test(values, test_export_first_values_are_the_same_in_every_mode, 0, 4);
    tcase_add_loop_test(values, test_export_is_what_the_record_shows, 0, 4);
    tcase_add_loop_test(values, test_export_gives_what_was_imported, 0, 8);
    tcase_add_test(values, test_export_refuses_bad_arguments);
    tcase_add_test(values, test_export_modes_that_are_refused);
    tcase_add_loop_test(layers, test_export_optimizer_walks_opaque_elements, 0, 8);
    tcase_add_test(layers, test_export_pools_without_gradients);
    tcase_add_loop_test(layers, test_export_gradients_of_panels_are_zeroed, 0, 2);
    tcase_add_loop_test(layers, test_export_layer_is_the_same_in_every_mode, 0, 8);
    tcase_add_test(layers, test_export_parts_of_every_mode);
    tcase_add_test(layers, test_export_ranks_are_the_same_in_every_mode);
    if (COUNTS_HOLD)
        tcase_add_loop_test(memory, test_export_memory_that_fails_and_a_step_that_needs_none, 0, 3);
    tcase_add_loop_test(memory, test_export_memory_is_what_the_query_says, 0, 2);
    suite_add_tcase(suite, values);
    suite_add_tcase(suite, layers);
    suite_add_tcase(suite, memory);
    return run_suite(suite, 1);
}
