/* check_storage.c - the storage modes of a pool give the same bytes: outputs, dx and gradients of
 * PREPACKED and PANELS against ROW_MAJOR; when the packed copy is renewed, and when it is not. */
#include "support/storage_unit.h"
#include "support/suite.h"

#include "internal.h"

#include <check.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static moe_context_config with(int32_t threads, int32_t isa)
{
    moe_context_config k;
    MUST(moe_context_config_init(&k, sizeof k));
    k.threads = threads, k.isa = isa;
    return k;
}

/* Whether this machine and build have it. */
static int has_isa(int32_t isa)
{
    moe_context *probe;
    moe_context_config k = with(1, isa);
    if (moe_context_create(&probe, &k) != MOE_OK) return 0;
    moe_context_destroy(probe);
    return 1;
}

/* ---- the same bytes -------------------------------------------------------------------------- */

/* The steps of a case: gradients set, then added to, then set again. */
static void run_steps(storage_unit *u)
{
    storage_unit_step(u, MOE_BACKWARD_OVERWRITE);
    storage_unit_step(u, 0);
}

static void compare(const moe_experts_config *e, int32_t where, const moe_context_config *k,
                    const storage_unit *want, const char *what)
{
    storage_unit u;
    storage_unit_make(&u, k, e, where, 3);
    run_steps(&u);
    const char *differs = storage_unit_compare(want, &u, 1);
    ck_assert_msg(!*differs,
                  "%s: storage %d where %d activation %d layout %d order %d dtype %d sizes "
                  "%lld %lld %lld isa %d threads %d: %s",
                  what, (int)e->storage, (int)where, (int)e->activation, (int)e->weight_layout,
                  (int)e->glu_order, (int)e->dtype, (long long)e->d_model, (long long)e->d_hidden,
                  (long long)e->d_out, k ? (int)k->isa : -1, k ? (int)k->threads : 0, differs);
    ck_assert_int_eq(storage_unit_filling(&u), 0);
    storage_unit_free(&u);
}

/* All modes and places of parameters against row-major of the pool's own. */
static void compare_modes(moe_experts_config e, const moe_context_config *k, const char *what)
{
    storage_unit want;
    e.storage = MOE_STORAGE_ROW_MAJOR;
    storage_unit_make(&want, k, &e, UNIT_OWNED, 3);
    run_steps(&want);
    for (int32_t where = UNIT_OWNED; where <= UNIT_EACH; where++) {
        e.storage = MOE_STORAGE_PREPACKED;
        compare(&e, where, k, &want, what);
    }
    e.storage = MOE_STORAGE_PANELS;
    compare(&e, UNIT_OWNED, k, &want, what);
    storage_unit_free(&want);
}

/* Every layout and GLU order, in every dtype. */
START_TEST(test_storage_modes_give_the_same_bytes)
{
    for (int layout = 0; layout < 2; layout++)
        for (int order = -1; order <= MOE_GLU_INTERLEAVED; order++) {
            moe_experts_config e = storage_config(
                order < 0 ? MOE_ACTIVATION_GELU_TANH : MOE_ACTIVATION_SWIGLU, 0, _i);
            e.weight_layout = layout, e.glu_order = order < 0 ? 0 : order;
            compare_modes(e, NULL, "layouts");
        }
}
END_TEST

/* Widths around those of a panel and of half a panel. */
START_TEST(test_storage_modes_give_the_same_bytes_at_every_width)
{
    static const int64_t widths[] = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        moe_experts_config e = storage_config(_i ? MOE_ACTIVATION_REGLU : MOE_ACTIVATION_RELU, 0,
                                              MOE_DTYPE_F32);
        e.d_hidden = widths[i];
        e.d_model = widths[(i + 5) % 12], e.d_out = widths[(i + 7) % 12];
        compare_modes(e, NULL, "widths");
    }
}
END_TEST

/* Every instruction set and number of threads against plain C on one. */
START_TEST(test_storage_modes_give_the_same_bytes_everywhere)
{
    for (int gated = 0; gated < 2; gated++) {
        moe_context_config k = with(1, MOE_ISA_PLAIN);
        storage_unit want;
        moe_experts_config e = storage_config(
            gated ? MOE_ACTIVATION_GEGLU_ERF : MOE_ACTIVATION_SILU, MOE_STORAGE_ROW_MAJOR, _i);
        storage_unit_make(&want, &k, &e, UNIT_OWNED, 3);
        run_steps(&want);
        for (int32_t isa = MOE_ISA_PLAIN; isa <= MOE_ISA_AVX512; isa++)
            for (int32_t threads = 1; threads <= 3 && has_isa(isa); threads += 2)
                for (int32_t storage = 0; storage <= MOE_STORAGE_PANELS; storage++) {
                    k = with(threads, isa);
                    e.storage = storage;
                    compare(&e, UNIT_OWNED, &k, &want, "machines");
                }
        storage_unit_free(&want);
    }
}
END_TEST

/* Weight on input or hidden, output function, no biases, one expert, more rows than a tile. */
START_TEST(test_storage_modes_give_the_same_bytes_with_other_options)
{
    moe_experts_config e = storage_config(MOE_ACTIVATION_SWIGLU, 0, MOE_DTYPE_F32), other = e;
    other.bias = 0;
    compare_modes(other, NULL, "no bias");
    other = e, other.weight_position = MOE_WEIGHT_ON_INPUT;
    compare_modes(other, NULL, "on input");
    other = e, other.weight_position = MOE_WEIGHT_ON_HIDDEN;
    compare_modes(other, NULL, "on hidden");
    other = e, other.output = MOE_OUTPUT_SIGMOID, other.activation_limit = 0.5;
    compare_modes(other, NULL, "sigmoid");
    other = e, other.num_experts = 1, other.d_hidden = 300;
    compare_modes(other, NULL, "one expert");
}
END_TEST

/* A forward that keeps nothing, and one token alone: the ways of inference. */
START_TEST(test_storage_modes_give_the_same_bytes_in_inference)
{
    for (int64_t T = 1; T <= 33; T += 16) {
        storage_unit want;
        for (int32_t storage = 0; storage <= MOE_STORAGE_PANELS; storage++) {
            storage_unit u;
            moe_experts_config e = storage_config(
                _i ? MOE_ACTIVATION_SWIGLU : MOE_ACTIVATION_GELU_ERF, storage, MOE_DTYPE_F32);
            storage_unit_make(&u, NULL, &e, UNIT_OWNED, 3);
            moe_plan_view view;
            moe_plan_args a;
            MUST(moe_plan_view_init(&view, sizeof view));
            MUST(moe_plan_get(u.plan, &view));
            moe_plan *few;
            MUST(moe_plan_create(&few, u.context));
            MUST(moe_plan_args_init(&a, sizeof a));
            a.tokens = T, a.num_experts = e.num_experts, a.top_k = u.K;
            a.expert_ids = view.expert_of_entry, a.weights = view.weight_of_entry;
            MUST(moe_plan_build(few, &a));
            u.f.flags = MOE_FORWARD_NO_SAVE, u.f.plan = few, u.f.tokens = T;
            MUST(moe_experts_forward(u.pool, u.pass, &u.f));
            moe_plan_destroy(few);
            if (storage == 0) {
                want = u;
            } else {
                ck_assert_str_eq(storage_unit_compare(&want, &u, 0), "");
                storage_unit_free(&u);
            }
        }
        storage_unit_free(&want);
    }
}
END_TEST

/* ---- the packed copy ------------------------------------------------------------------------- */

/* y of the unit's pool now, malloc'd. */
static void *output(storage_unit *u)
{
    void *y = malloc((size_t)u->y_bytes);
    MUST(moe_experts_forward(u->pool, u->pass, &u->f));
    return memcpy(y, u->y, (size_t)u->y_bytes);
}

/* Whether the pool computes with the weights that it has, as a row-major pool would. */
static int is_fresh(storage_unit *u)
{
    storage_unit twin;
    moe_experts_config e = u->e;
    e.storage = MOE_STORAGE_ROW_MAJOR, e.parameters = MOE_PARAMETERS_OWNED;
    storage_unit_make(&twin, NULL, &e, UNIT_OWNED, 1);
    for (int tensor = 0; tensor < UNIT_TENSORS; tensor++) {
        double *values = storage_unit_read(u, tensor, MOE_PARAMETER_DATA);
        if (values) storage_unit_write(&twin, tensor, values);
        free(values);
    }
    void *y = output(u);
    MUST(moe_experts_forward(twin.pool, twin.pass, &twin.f));
    int same = memcmp(y, twin.y, (size_t)u->y_bytes) == 0;
    storage_unit_free(&twin);
    free(y);
    return same;
}

START_TEST(test_storage_copy_is_stale_until_told)
{
    for (int32_t where = UNIT_OWNED; where <= UNIT_EACH; where++) {
        storage_unit u;
        moe_parameter_record r;
        moe_experts_config e = storage_config(MOE_ACTIVATION_SWIGLU, MOE_STORAGE_PREPACKED,
                                              MOE_DTYPE_F32);
        storage_unit_make(&u, NULL, &e, where, 3);
        ck_assert(is_fresh(&u));
        void *before = output(&u);
        for (int64_t index = 0; index < 3; index += 2) { /* w1, w3 */
            MUST(moe_parameter_record_init(&r, sizeof r));
            MUST(moe_experts_parameter(u.pool, index, &r));
            float *first = where == UNIT_EACH ? r.data_per_expert[0] : r.data;
            *first += 1;
            void *after = output(&u);
            ck_assert_mem_eq(before, after, (size_t)u.y_bytes);
            ck_assert(!is_fresh(&u));
            MUST(moe_experts_weights_changed(u.pool));
            ck_assert(is_fresh(&u));
            free(before), before = after;
            after = output(&u);
            ck_assert(memcmp(before, after, (size_t)u.y_bytes) != 0);
            free(before), before = after;
        }
        /* biases are not copied */
        MUST(moe_experts_parameter(u.pool, moe_experts_parameter_find(u.pool, "b2"), &r));
        float *bias = where == UNIT_EACH ? r.data_per_expert[0] : r.data;
        *bias += 1;
        ck_assert(is_fresh(&u));
        free(before);
        storage_unit_free(&u);
    }
}
END_TEST

/* A backward uses the copy of its time: dx after a change that was told. */
START_TEST(test_storage_copy_is_renewed_by_a_backward)
{
    storage_unit u, twin;
    moe_experts_config e = storage_config(MOE_ACTIVATION_GELU_TANH, MOE_STORAGE_PREPACKED,
                                          MOE_DTYPE_F64);
    storage_unit_make(&u, NULL, &e, UNIT_OWNED, 3);
    e.storage = MOE_STORAGE_ROW_MAJOR;
    storage_unit_make(&twin, NULL, &e, UNIT_OWNED, 3);
    MUST(moe_experts_forward(u.pool, u.pass, &u.f));
    MUST(moe_experts_forward(twin.pool, twin.pass, &twin.f));
    storage_unit_draw(&u, 8); /* by imports */
    storage_unit_draw(&twin, 8);
    MUST(moe_experts_backward(u.pool, u.pass, &u.b));
    MUST(moe_experts_backward(twin.pool, twin.pass, &twin.b));
    ck_assert_str_eq(storage_unit_compare(&twin, &u, 1), "");
    storage_unit_free(&u), storage_unit_free(&twin);
}
END_TEST

START_TEST(test_storage_copy_is_renewed_by_import_and_init)
{
    storage_unit u;
    moe_experts_config e = storage_config(MOE_ACTIVATION_REGLU, MOE_STORAGE_PREPACKED,
                                          MOE_DTYPE_F32);
    storage_unit_make(&u, NULL, &e, UNIT_OWNED, 3);
    ck_assert(is_fresh(&u));
    MUST(moe_experts_init_parameters(u.pool, 5));
    ck_assert(is_fresh(&u));
    storage_unit_draw(&u, 6);
    ck_assert(is_fresh(&u));
    storage_unit_free(&u);
}
END_TEST

START_TEST(test_storage_copy_is_renewed_by_another_binding)
{
    storage_unit u;
    moe_binding b;
    moe_experts_config e = storage_config(MOE_ACTIVATION_SWIGLU, MOE_STORAGE_PREPACKED,
                                          MOE_DTYPE_F32);
    e.glu_order = MOE_GLU_UP_GATE;
    storage_unit_make(&u, NULL, &e, UNIT_OWNED, 3);
    ck_assert(is_fresh(&u));
    int64_t n = e.num_experts * e.d_model * 2 * e.d_hidden, gap = 3;
    float *other = malloc((size_t)(2 * n + gap) * sizeof *other);
    for (int64_t i = 0; i < 2 * n + gap; i++) other[i] = (float)(i % 11 - 5) / 16;
    MUST(moe_binding_init(&b, sizeof b));
    b.data = other;
    MUST(moe_experts_bind(u.pool, 0, &b));
    ck_assert(is_fresh(&u));
    b.data = other + gap; /* another place */
    MUST(moe_experts_bind(u.pool, 0, &b));
    ck_assert(is_fresh(&u));
    b.data_stride[0] = e.d_model * 2 * e.d_hidden, b.data_stride[1] = 1,
    b.data_stride[2] = e.d_model; /* other strides */
    MUST(moe_experts_bind(u.pool, 0, &b));
    ck_assert(is_fresh(&u));
    float *grad = malloc((size_t)n * sizeof *grad);
    b.grad = grad;
    other[gap] += 1;
    MUST(moe_experts_bind(u.pool, 0, &b)); /* the same data: not taken for changed */
    ck_assert(!is_fresh(&u));
    MUST(moe_experts_bind(u.pool, 0, NULL));
    ck_assert(is_fresh(&u));
    storage_unit_free(&u);
    free(other), free(grad);
}
END_TEST

/* Another pointer for one expert is a change as well. */
START_TEST(test_storage_copy_is_renewed_by_another_pointer)
{
    storage_unit u;
    moe_experts_config e = storage_config(MOE_ACTIVATION_RELU, MOE_STORAGE_PREPACKED,
                                          MOE_DTYPE_F64);
    storage_unit_make(&u, NULL, &e, UNIT_EACH, 3);
    ck_assert(is_fresh(&u));
    void **each = u.memory[0].data_each;
    each[1] = each[2];
    MUST(moe_experts_bind(u.pool, 0, &u.memory[0].binding));
    ck_assert(is_fresh(&u));
    storage_unit_free(&u);
}
END_TEST

/* ---- several threads ------------------------------------------------------------------------- */

enum { CALLERS = 4, ROUNDS = 30 };

typedef struct caller {
    storage_unit *u;
    const void *want;
    pthread_barrier_t *together;
    moe_pass *pass;
    void *y;
    int64_t wrong;
} caller;

static void *call_often(void *argument)
{
    caller *c = argument;
    moe_forward_args f = c->u->f;
    f.y = c->y;
    for (int round = 0; round < ROUNDS; round++) {
        if (pthread_barrier_wait(c->together) == PTHREAD_BARRIER_SERIAL_THREAD)
            (void)moe_experts_weights_changed(c->u->pool);
        (void)pthread_barrier_wait(c->together);
        memset(c->y, 0, (size_t)c->u->y_bytes);
        c->wrong += moe_experts_forward(c->u->pool, c->pass, &f) != MOE_OK;
        c->wrong += memcmp(c->y, c->want, (size_t)c->u->y_bytes) != 0;
    }
    return NULL;
}

/* All threads forward at once right after a change, on passes of their own. */
START_TEST(test_storage_copy_is_renewed_with_several_callers)
{
    storage_unit u;
    caller c[CALLERS];
    pthread_t threads[CALLERS];
    pthread_barrier_t together;
    moe_context_config k = with(_i ? 2 : 1, MOE_ISA_AUTO);
    moe_experts_config e = storage_config(MOE_ACTIVATION_SWIGLU, MOE_STORAGE_PREPACKED,
                                          MOE_DTYPE_F32);
    storage_unit_make(&u, &k, &e, UNIT_STRIDED, 3);
    void *want = output(&u);
    (void)pthread_barrier_init(&together, NULL, CALLERS);
    for (int i = 0; i < CALLERS; i++) {
        c[i] = (caller){.u = &u, .want = want, .together = &together};
        MUST(moe_pass_create_for_experts(&c[i].pass, u.pool, NULL));
        c[i].y = malloc((size_t)u.y_bytes);
        ck_assert_int_eq(pthread_create(&threads[i], NULL, call_often, &c[i]), 0);
    }
    for (int i = 0; i < CALLERS; i++) {
        (void)pthread_join(threads[i], NULL);
        ck_assert_int_eq(c[i].wrong, 0);
        moe_pass_destroy(c[i].pass);
        free(c[i].y);
    }
    (void)pthread_barrier_destroy(&together);
    free(want);
    storage_unit_free(&u);
}
END_TEST

/* A host's parallel-for that fails, or begins another forward from within. */
typedef struct within {
    storage_unit *u;
    moe_pass *other;
    int64_t fail_at, calls;
    bool enter, inside;
    moe_status entered;
    void *y;
} within;

static int32_t parallel_within(void *user, int64_t count, moe_task_fn task, void *argument)
{
    within *w = user;
    if (++w->calls == w->fail_at) return 1;
    if (w->enter && !w->inside && w->u) {
        moe_forward_args f = w->u->f;
        f.y = w->y;
        w->inside = true;
        w->entered = moe_experts_forward(w->u->pool, w->other, &f);
        w->inside = false;
    }
    for (int64_t i = 0; i < count; i++) task(argument, i);
    return 0;
}

/* The copy is made once for all changes: the host's parallel-for is asked for it by one call. */
START_TEST(test_storage_copy_is_made_once)
{
    storage_unit u;
    within w = {0};
    moe_context_config k = with(2, MOE_ISA_AUTO);
    k.parallel = parallel_within, k.parallel_user = &w;
    moe_experts_config e = storage_config(MOE_ACTIVATION_SWIGLU, MOE_STORAGE_PREPACKED,
                                          MOE_DTYPE_F32);
    e.num_experts = 8, e.d_model = 300, e.d_hidden = 200;
    storage_unit_make(&u, &k, &e, UNIT_STRIDED, 3);
    int64_t calls[4];
    for (int i = 0; i < 4; i++) {
        if (i == 2) {
            MUST(moe_experts_weights_changed(u.pool));
            MUST(moe_experts_weights_changed(u.pool));
        }
        w.calls = 0;
        storage_unit_step(&u, 0);
        calls[i] = w.calls;
    }
    ck_assert(calls[0] == calls[1] + 3 && calls[2] == calls[0] && calls[3] == calls[1]);
    storage_unit_free(&u);
}
END_TEST

/* A thread that waits for the copy being made may be given other work that needs it. */
START_TEST(test_storage_copy_is_renewed_when_the_host_enters_again)
{
    storage_unit u;
    within w = {0};
    moe_context_config k = with(2, MOE_ISA_AUTO);
    k.parallel = parallel_within, k.parallel_user = &w;
    moe_experts_config e = storage_config(MOE_ACTIVATION_SWIGLU, MOE_STORAGE_PREPACKED,
                                          MOE_DTYPE_F32);
    e.num_experts = 8, e.d_model = 300, e.d_hidden = 200;
    storage_unit_make(&u, &k, &e, UNIT_STRIDED, 3);
    void *want = output(&u);
    w.u = &u, w.enter = true, w.y = malloc((size_t)u.y_bytes);
    MUST(moe_pass_create_for_experts(&w.other, u.pool, NULL));
    MUST(moe_experts_weights_changed(u.pool));
    void *got = output(&u);
    ck_assert_int_eq(w.entered, MOE_OK);
    ck_assert_mem_eq(got, want, (size_t)u.y_bytes);
    ck_assert_mem_eq(w.y, want, (size_t)u.y_bytes);
    w.enter = false;
    /* one that fails half way: the copy is made by the next call */
    for (int64_t at = 1; at < 40; at++) {
        MUST(moe_experts_weights_changed(u.pool));
        w.calls = 0, w.fail_at = at;
        moe_status status = moe_experts_forward(u.pool, u.pass, &u.f);
        ck_assert(status == MOE_OK || status == MOE_ERROR_CALLBACK);
        w.fail_at = 0;
        free(got), got = output(&u);
        ck_assert_mem_eq(got, want, (size_t)u.y_bytes);
        if (status == MOE_OK) break;
    }
    moe_pass_destroy(w.other);
    free(want), free(got), free(w.y);
    storage_unit_free(&u);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("storage");
    TCase *bytes = tcase_create("bytes"), *copy = tcase_create("copy");
    tcase_set_timeout(bytes, 300), tcase_set_timeout(copy, 120);
    tcase_add_loop_test(bytes, test_storage_modes_give_the_same_bytes, MOE_DTYPE_F32,
                        MOE_DTYPE_F16 + 1);
    tcase_add_loop_test(bytes, test_storage_modes_give_the_same_bytes_at_every_width, 0, 2);
    tcase_add_loop_test(bytes, test_storage_modes_give_the_same_bytes_everywhere, MOE_DTYPE_F32,
                        MOE_DTYPE_F16 + 1);
    tcase_add_test(bytes, test_storage_modes_give_the_same_bytes_with_other_options);
    tcase_add_loop_test(bytes, test_storage_modes_give_the_same_bytes_in_inference, 0, 2);
    tcase_add_test(copy, test_storage_copy_is_stale_until_told);
    tcase_add_test(copy, test_storage_copy_is_renewed_by_a_backward);
    tcase_add_test(copy, test_storage_copy_is_renewed_by_import_and_init);
    tcase_add_test(copy, test_storage_copy_is_renewed_by_another_binding);
    tcase_add_test(copy, test_storage_copy_is_renewed_by_another_pointer);
    tcase_add_loop_test(copy, test_storage_copy_is_renewed_with_several_callers, 0, 2);
    if (COUNTS_HOLD) tcase_add_test(copy, test_storage_copy_is_made_once);
    tcase_add_test(copy, test_storage_copy_is_renewed_when_the_host_enters_again);
    suite_add_tcase(suite, bytes);
    suite_add_tcase(suite, copy);
    return run_suite(suite, 1);
}
