/* check_io_storage.c - files of layers in every storage mode: the same bytes, and what comes back
 * is the same; values of an optimizer in opaque order. */
#include "support/files.h"
#include "support/storage_unit.h"
#include "support/suite.h"

#include "reals.h"

#include <moe/io.h>

#include <check.h>
#include <stdlib.h>
#include <string.h>

/* A layer over a unit's pool. */
typedef struct stored {
    storage_unit u;
    moe_gate *gate;
    moe_layer *layer;
    void *moments[8];
} stored;

static void make(stored *s, int32_t storage, int32_t order, int32_t layout, int32_t dtype,
                 uint64_t seed)
{
    moe_gate_config g;
    moe_layer_config l;
    moe_experts_config e = storage_config(order < 0 ? 0 : MOE_ACTIVATION_SWIGLU, storage, dtype);
    memset(s, 0, sizeof *s);
    e.glu_order = order < 0 ? 0 : order, e.weight_layout = layout, e.d_out = MOE_SAME;
    storage_unit_make(&s->u, NULL, &e, UNIT_OWNED, seed);
    MUST(moe_gate_config_init(&g, sizeof g));
    g.d_model = e.d_model, g.num_experts = 4, g.top_k = 2, g.dtype = dtype;
    MUST(moe_gate_create(&s->gate, s->u.context, &g));
    MUST(moe_layer_config_init(&l, sizeof l));
    l.gate = s->gate, l.experts = s->u.pool;
    MUST(moe_layer_create(&s->layer, &l));
    MUST(moe_gate_init_parameters(s->gate, 2));
    for (int64_t i = 0; i < moe_layer_parameter_count(s->layer); i++) {
        moe_parameter_record r;
        MUST(moe_parameter_record_init(&r, sizeof r));
        MUST(moe_layer_parameter(s->layer, i, &r));
        s->moments[i] = calloc((size_t)r.element_count, 8);
    }
}

static void drop(stored *s)
{
    for (int i = 0; i < 8; i++) free(s->moments[i]);
    moe_layer_destroy(s->layer), moe_gate_destroy(s->gate);
    storage_unit_free(&s->u);
}

/* The parameters, and an optimizer's moments of each of them. */
static void items_of(const stored *s, moe_checkpoint_item items[2])
{
    for (int i = 0; i < 2; i++) {
        MUST(moe_checkpoint_item_init(&items[i], sizeof items[i]));
        items[i].layer = s->layer;
        items[i].name = i ? "moment." : "";
    }
    items[1].values = s->moments;
}

static void expect_same(const stored *a, const stored *b)
{
    for (int tensor = 0; tensor < UNIT_TENSORS; tensor++) {
        double *x = storage_unit_read(&a->u, tensor, MOE_PARAMETER_DATA);
        double *y = storage_unit_read(&b->u, tensor, MOE_PARAMETER_DATA);
        ck_assert(!x == !y);
        if (x) ck_assert_mem_eq(x, y, (size_t)storage_unit_count(&a->u, tensor) * sizeof *x);
        free(x), free(y);
    }
    ck_assert_int_eq(storage_unit_filling(&b->u), 0);
}

/* Saved from one mode and loaded into another, the file of that is the first again. */
START_TEST(test_io_storage_files_are_the_same_in_every_mode)
{
    int32_t order = _i % 5 - 1, layout = _i / 5;
    stored first;
    moe_checkpoint_item items[2];
    make(&first, MOE_STORAGE_ROW_MAJOR, order, layout, _i % 4, 3);
    for (int64_t i = 0; i < moe_layer_parameter_count(first.layer); i++) {
        moe_parameter_record r;
        MUST(moe_parameter_record_init(&r, sizeof r));
        MUST(moe_layer_parameter(first.layer, i, &r));
        for (int64_t n = 0; n < r.element_count; n++)
            moe__set_real(first.moments[i], n, r.data_dtype, (double)(n * 7 % 127 + 1) / 8);
    }
    items_of(&first, items);
    MUST(moe_checkpoint_save(files_path("first"), items, 2, NULL));
    for (int32_t storage = 0; storage < 3; storage++) {
        stored s;
        make(&s, storage, order, layout, _i % 4, 9);
        storage_unit_step(&s.u, 0); /* a copy is packed */
        items_of(&s, items);
        MUST(moe_checkpoint_load(files_path("first"), items, 2, NULL, NULL));
        expect_same(&first, &s);
        MUST(moe_checkpoint_save(files_path("again"), items, 2, NULL));
        ck_assert(files_equal(files_path("first"), files_path("again")));
        MUST(moe_experts_zero_gradients(first.u.pool, NULL));
        MUST(moe_experts_zero_gradients(s.u.pool, NULL));
        storage_unit_step(&first.u, 0), storage_unit_step(&s.u, 0);
        ck_assert_str_eq(storage_unit_compare(&first.u, &s.u, 1), "");
        drop(&s);
    }
    drop(&first);
}
END_TEST

/* Under a model's names, and a dense network made experts. */
START_TEST(test_io_storage_of_models_and_upcycling)
{
    stored s[3];
    moe_tensor_names names;
    moe_upcycle_args a;
    double *dense[3];
    int64_t n = 37 * 90;
    for (int i = 0; i < 3; i++) {
        dense[i] = malloc((size_t)n * sizeof *dense[i]);
        for (int64_t k = 0; k < n; k++) dense[i][k] = (double)((k * 5 + i) % 97 - 48) / 64;
    }
    MUST(moe_tensor_names_init(&names, sizeof names));
    names.gate = "router", names.w1 = "{e}.gate", names.w3 = "{e}.up", names.w2 = "{e}.down";
    names.b1 = "{e}.gb", names.b3 = "{e}.ub", names.b2 = "{e}.db";
    for (int32_t storage = 0; storage < 3; storage++) {
        make(&s[storage], storage, _i, _i % 2, MOE_DTYPE_F32, 3 + (uint64_t)storage);
        storage_unit_step(&s[storage].u, 0);
        MUST(moe_upcycle_args_init(&a, sizeof a));
        a.w1 = dense[0], a.w3 = dense[1], a.w2 = dense[2], a.width = 90, a.dtype = MOE_DTYPE_F64;
        a.noise_std = 0.01;
        MUST(moe_upcycle(s[storage].layer, &a));
        if (storage) expect_same(&s[0], &s[storage]);
        storage_unit_step(&s[storage].u, MOE_BACKWARD_OVERWRITE);
        if (storage) ck_assert_str_eq(storage_unit_compare(&s[0].u, &s[storage].u, 1), "");
    }
    for (int i = 0; i < 3; i++) free(dense[i]), drop(&s[i]);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("io_storage");
    TCase *tests = tcase_create("files");
    tcase_set_timeout(tests, 120);
    tcase_add_checked_fixture(tests, files_begin, files_end);
    tcase_add_loop_test(tests, test_io_storage_files_are_the_same_in_every_mode, 0, 10);
    tcase_add_loop_test(tests, test_io_storage_of_models_and_upcycling, 0, 4);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
