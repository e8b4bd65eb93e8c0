/* check_expert_config.c - what the config of a pool refuses for each kind, the host's callbacks in
 * it, and what moe_experts_create_parts refuses. */
#include "support/bad_fields.h"
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static int32_t nothing(void *user, const moe_expert_call *call)
{
    (void)user, (void)call;
    return 0;
}

static moe_experts_config config_of(int kind, const moe_expert_callbacks *callbacks)
{
    moe_experts_config c;
    MUST(moe_experts_config_init(&c, sizeof c));
    c.d_model = 4, c.num_experts = 3, c.kind = kind;
    if (kind == MOE_EXPERTS_FEED_FORWARD) c.d_hidden = 5;
    if (kind == MOE_EXPERTS_CALLBACK) c.callbacks = callbacks;
    return c;
}

static moe_expert_callbacks callbacks_of(void)
{
    moe_expert_callbacks k;
    MUST(moe_expert_callbacks_init(&k, sizeof k));
    ck_assert(!k.forward && !k.backward && !k.user && k.workspace_per_row == 0);
    k.forward = k.backward = nothing;
    return k;
}

static void must_say(const char *a, const char *b)
{
    const char *said = moe_last_error();
    ck_assert_msg(strstr(said, a) && strstr(said, b), "\"%s\" lacks %s or %s", said, a, b);
}

/* ---- kinds ----------------------------------------------------------------------------------- */

#define I(field, value) BAD_INTEGER(moe_experts_config, field, value, INVALID_ARGUMENT)
#define R(field, value) BAD_DOUBLE(moe_experts_config, field, value, INVALID_ARGUMENT)
static const bad_field no_network[] = {I(d_hidden, 5),
                                       I(activation, MOE_ACTIVATION_SILU),
                                       I(bias, 1),
                                       I(glu_order, MOE_GLU_GATE_UP),
                                       I(weight_layout, MOE_WEIGHT_OUT_IN),
                                       I(output, MOE_OUTPUT_SIGMOID),
                                       I(weight_position, MOE_WEIGHT_ON_INPUT),
                                       I(parameters, MOE_PARAMETERS_BOUND),
                                       R(activation_alpha, 1.5),
                                       R(activation_limit, 7),
                                       R(activation_offset, -1),
                                       R(init_std, 0.5)};
static const bad_field clamps[] = {R(activation_alpha, -0.5), R(activation_alpha, INFINITY),
                                   R(activation_limit, -7),   R(activation_limit, NAN),
                                   R(activation_offset, NAN), R(activation_offset, -INFINITY)};
static const bad_field elsewhere[] = {R(activation_alpha, 1.702), R(activation_limit, 7),
                                      R(activation_offset, 1)};
#undef I
#undef R

static void refuse_all(const bad_field *bad, size_t count, moe_experts_config good,
                       const char *second)
{
    moe_context *context = new_context();
    moe_experts *pool = NULL;
    for (size_t i = 0; i < count; i++) {
        moe_experts_config c = good;
        bad_field_put(&bad[i], &c);
        moe_status status = moe_experts_create(&pool, context, &c);
        must_say(bad[i].name, second);
        const char *complaint = bad_field_complaint(&bad[i], status);
        ck_assert_msg(complaint[0] == 0, "moe_experts_create: %s", complaint);
        ck_assert_ptr_null(pool);
    }
    MUST(moe_experts_create(&pool, context, &good));
    moe_experts_destroy(pool), moe_context_destroy(context);
}

/* A clash names both fields. */
START_TEST(test_expert_config_kinds_without_network_refuse_its_fields)
{
    moe_expert_callbacks k = callbacks_of();
    refuse_all(no_network, COUNT(no_network), config_of(MOE_EXPERTS_IDENTITY, NULL),
               "kind MOE_EXPERTS_IDENTITY");
    if (!ON_DEVICE) /* which has no such kind */
        refuse_all(no_network, COUNT(no_network), config_of(MOE_EXPERTS_CALLBACK, &k),
                   "kind MOE_EXPERTS_CALLBACK");
}
END_TEST

START_TEST(test_expert_config_clamp_is_for_swiglu)
{
    static const int32_t others[] = {0, 1, 2, 3, 17, 18, 19};
    moe_experts_config c = config_of(0, NULL);
    for (size_t i = 0; i < COUNT(others); i++) {
        c.activation = others[i];
        refuse_all(elsewhere, COUNT(elsewhere), c, "activation");
    }
    c.activation = MOE_ACTIVATION_SWIGLU;
    refuse_all(clamps, COUNT(clamps), c, "must be in");
}
END_TEST

START_TEST(test_expert_config_identity_is_as_wide_as_its_input)
{
    moe_context *context = new_context();
    moe_experts *pool = NULL;
    moe_experts_config c = config_of(MOE_EXPERTS_IDENTITY, NULL);
    c.d_out = 3;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create(&pool, context, &c));
    must_say("d_out 3", "d_model is 4");
    c.d_out = 4;
    MUST(moe_experts_create(&pool, context, &c));
    ck_assert_int_eq(moe_experts_parameter_count(pool), 0);
    ck_assert_int_eq(moe_experts_parameter_find(pool, "w1"), -1);
    MUST(moe_experts_init_parameters(pool, 1));
    MUST(moe_experts_zero_gradients(pool, NULL));
    moe_experts_destroy(pool), moe_context_destroy(context);
}
END_TEST

/* ---- callbacks ------------------------------------------------------------------------------- */

START_TEST(test_expert_config_callbacks_are_checked)
{
    moe_context *context = new_context();
    moe_experts *pool = NULL;
    moe_expert_callbacks k = callbacks_of();
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_expert_callbacks_init(NULL, sizeof k));
    REFUSED(MOE_ERROR_STRUCT_SIZE, moe_expert_callbacks_init(&k, 0));
    for (int kind = 0; kind < 2; kind++) {
        moe_experts_config c = config_of(kind, NULL);
        c.callbacks = &k;
        REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create(&pool, context, &c));
        must_say("callbacks", "clash");
        must_say("kind", kind ? "MOE_EXPERTS_IDENTITY" : "MOE_EXPERTS_FEED_FORWARD");
    }
    moe_experts_config c = config_of(MOE_EXPERTS_CALLBACK, NULL);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create(&pool, context, &c));
    must_say("callbacks is NULL", "MOE_EXPERTS_CALLBACK");
    c.callbacks = &k;
    k.forward = NULL;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create(&pool, context, &c));
    must_say("forward", "NULL");
    k.forward = nothing, k.workspace_per_row = -8;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create(&pool, context, &c));
    must_say("workspace_per_row", "-8");
    k.workspace_per_row = 0, k.struct_size = 4;
    REFUSED(MOE_ERROR_STRUCT_SIZE, moe_experts_create(&pool, context, &c));
    k.struct_size = 16;
    REFUSED(MOE_ERROR_STRUCT_TOO_OLD, moe_experts_create(&pool, context, &c));
    ck_assert_ptr_null(pool);
    moe_context_destroy(context);
}
END_TEST

#ifndef MOE_TEST_DEVICE /* which has neither callbacks nor pools of parts */
/* The pool has a copy, and get_config shows it. */
START_TEST(test_expert_config_callbacks_are_copied)
{
    moe_context *context = new_context();
    moe_experts *pool = NULL;
    moe_expert_callbacks k = callbacks_of();
    moe_experts_config c = config_of(MOE_EXPERTS_CALLBACK, &k), got;
    k.user = &c, k.workspace_per_row = 24;
    MUST(moe_experts_create(&pool, context, &c));
    memset(&k, 0x5a, sizeof k);
    got.struct_size = sizeof got;
    MUST(moe_experts_get_config(pool, &got));
    ck_assert(got.callbacks && got.callbacks != &k);
    ck_assert_uint_eq(got.callbacks->struct_size, sizeof k);
    ck_assert(got.callbacks->forward == nothing && got.callbacks->backward == nothing);
    ck_assert(got.callbacks->user == &c && got.callbacks->workspace_per_row == 24);
    ck_assert_int_eq(got.kind, MOE_EXPERTS_CALLBACK);
    moe_experts *second = NULL; /* of the config that was shown */
    MUST(moe_experts_create(&second, context, &got));
    moe_experts_destroy(pool);
    got.struct_size = sizeof got;
    MUST(moe_experts_get_config(second, &got));
    ck_assert(got.callbacks->forward == nothing);
    moe_experts_destroy(second), moe_context_destroy(context);
}
END_TEST

/* A workspace that cannot be: found before anything is allocated. */
START_TEST(test_expert_config_workspace_may_not_overflow)
{
    moe_context *context = new_context();
    moe_experts *pool = NULL, *all = NULL;
    moe_pass *pass = NULL;
    moe_expert_callbacks k = callbacks_of();
    moe_experts_config c = config_of(MOE_EXPERTS_CALLBACK, &k);
    k.workspace_per_row = INT64_MAX;
    MUST(moe_experts_create(&pool, context, &c));
    MUST(moe_pass_create_for_experts(&pass, pool, NULL));
    REFUSED(MOE_ERROR_OVERFLOW, moe_pass_reserve(pass, 2, 1, 1));
    REFUSED(MOE_ERROR_OVERFLOW, moe_experts_create_parts(&all, &pool, 1));
    must_say("workspace_per_row", "9223372036854775807");
    ck_assert_ptr_null(all);
    moe_pass_destroy(pass), moe_experts_destroy(pool), moe_context_destroy(context);
}
END_TEST

/* ---- parts ----------------------------------------------------------------------------------- */

static moe_experts *pool_of(moe_context *context, moe_experts_config c)
{
    moe_experts *pool = NULL;
    MUST(moe_experts_create(&pool, context, &c));
    return pool;
}

START_TEST(test_expert_config_parts_must_fit)
{
    moe_context *context = new_context(), *other = new_context();
    moe_experts *parts[9] = {NULL}, *untouched = (moe_experts *)(uintptr_t)16, *all = untouched;
    moe_experts_config c = config_of(0, NULL);
    for (int i = 0; i < 9; i++) parts[i] = pool_of(context, c);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create_parts(NULL, parts, 2));
    must_say("experts", "NULL");
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create_parts(&all, NULL, 2));
    must_say("parts", "NULL");
    static const int64_t counts[] = {0, -1, 9};
    for (int i = 0; i < 3; i++)
        REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create_parts(&all, parts, counts[i]));
    must_say("count is 9", "[1, 8]");
    moe_experts *second = parts[1], *bad;
    parts[1] = NULL;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create_parts(&all, parts, 2));
    must_say("parts[1]", "NULL");
    parts[1] = parts[0];
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create_parts(&all, parts, 2));
    must_say("parts[1] is parts[0] again", "");
    for (int i = 0; i < 4; i++) {
        static const char *const said[] = {"contexts", "dtype of parts[1] is 1",
                                           "d_model of parts[1] is 6", "d_out of parts[1] is 2"};
        moe_experts_config b = c;
        if (i == 1) b.dtype = MOE_DTYPE_F64;
        if (i == 2) b.d_model = 6, b.d_out = 4;
        if (i == 3) b.d_out = 2;
        parts[1] = bad = pool_of(i == 0 ? other : context, b);
        REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create_parts(&all, parts, 2));
        must_say(said[i], "moe_experts_create_parts");
        moe_experts_destroy(bad);
    }
    ck_assert_ptr_eq(all, untouched);
    parts[1] = second;
    MUST(moe_experts_create_parts(&all, parts, 8));
    parts[1] = all;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_experts_create_parts(&untouched, parts, 2));
    must_say("parts[1] is made of parts", "");
    parts[1] = second;
    for (int i = 0; i < 9; i++) moe_experts_destroy(parts[i]);
    moe_experts_destroy(all), moe_context_destroy(context), moe_context_destroy(other);
}
END_TEST

/* More experts than an id can number. Parts own nothing, so that the sizes cost nothing. */
START_TEST(test_expert_config_parts_may_not_have_too_many_experts)
{
    moe_context *context = new_context();
    moe_experts *parts[2], *all = NULL;
    moe_experts_config c = config_of(MOE_EXPERTS_IDENTITY, NULL);
    c.num_experts = (int64_t)1 << 30;
    parts[0] = pool_of(context, c), parts[1] = pool_of(context, c);
    REFUSED(MOE_ERROR_OVERFLOW, moe_experts_create_parts(&all, parts, 2));
    must_say("2147483648", "experts");
    ck_assert_ptr_null(all);
    moe_experts_destroy(parts[0]), moe_experts_destroy(parts[1]), moe_context_destroy(context);
}
END_TEST

START_TEST(test_expert_config_of_parts_is_their_sum)
{
    moe_context *context = new_context();
    moe_experts *parts[2], *all = NULL;
    moe_experts_config c = config_of(0, NULL), got;
    c.d_out = 7, c.dtype = MOE_DTYPE_F64;
    parts[0] = pool_of(context, c);
    c.num_experts = 11, c.d_hidden = 2, c.bias = 1;
    parts[1] = pool_of(context, c);
    MUST(moe_experts_create_parts(&all, parts, 2));
    got.struct_size = sizeof got;
    MUST(moe_experts_get_config(all, &got));
    ck_assert(got.d_model == 4 && got.d_hidden == 0 && got.d_out == 7 && got.num_experts == 14 &&
              got.dtype == MOE_DTYPE_F64 && got.kind == MOE_EXPERTS_FEED_FORWARD && !got.callbacks);
    MUST(moe_experts_weights_changed(all));
    moe_experts_destroy(all);
    moe_experts_destroy(parts[1]), moe_experts_destroy(parts[0]), moe_context_destroy(context);
}
END_TEST
#endif

/* ---- memory ---------------------------------------------------------------------------------- */

static long calls, fail_at, live;
static void *failing_alloc(void *user, uint64_t size, uint64_t alignment)
{
    (void)user;
    if (++calls == fail_at) return NULL;
    live++;
    return aligned_alloc((size_t)alignment, (size_t)((size + alignment - 1) & ~(alignment - 1)));
}
static void failing_free(void *user, void *memory, uint64_t size)
{
    (void)user, (void)size;
    live--;
    free(memory);
}

static moe_status make_everything(moe_context *context)
{
    moe_expert_callbacks k = callbacks_of();
    enum { PARTS = ON_DEVICE ? 1 : 3 }; /* a device has no pools of parts */
    moe_experts *parts[3] = {NULL}, *all = NULL;
    moe_layer *layer = NULL;
    moe_pass *pass = NULL;
    moe_layer_config l;
    MUST(moe_layer_config_init(&l, sizeof l));
    moe_status status = MOE_OK;
    for (int i = 0; i < PARTS && status == MOE_OK; i++) {
        moe_experts_config c = config_of(i, &k);
        status = moe_experts_create(&parts[i], context, &c);
    }
    if (status == MOE_OK && !ON_DEVICE) status = moe_experts_create_parts(&all, parts, PARTS);
    for (int i = 0; i < PARTS && !ON_DEVICE; i++) moe_experts_destroy(parts[i]);
    if (ON_DEVICE) all = parts[0];
    l.experts = all;
    if (status == MOE_OK) status = moe_layer_create(&layer, &l);
    if (status == MOE_OK) status = moe_pass_create(&pass, layer, NULL);
    if (status == MOE_OK) status = moe_pass_reserve(pass, 5, 1, 2);
    moe_experts_destroy(all), moe_layer_destroy(layer), moe_pass_destroy(pass);
    return status;
}

START_TEST(test_expert_config_every_allocation_may_fail)
{
    moe_context_config k;
    moe_context *context = NULL;
    MUST(moe_context_config_init(&k, sizeof k));
    k.alloc = failing_alloc, k.free = failing_free, k.threads = 1;
    MUST(moe_context_create(&context, &k));
    long before = live, failures = 0;
    for (long n = 1;; n++, failures++) {
        calls = 0, fail_at = n;
        moe_status status = make_everything(context);
        ck_assert_int_eq(live, before);
        if (status == MOE_OK) break;
        ck_assert_int_eq(status, MOE_ERROR_OUT_OF_MEMORY);
    }
    ck_assert_int_ge(failures, ON_DEVICE ? 5 : 20); /* of a device those of its memory */
    fail_at = 0;
    moe_context_destroy(context);
    ck_assert_int_eq(live, 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("expert_config");
    TCase *tests = tcase_create("sentences");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, test_expert_config_kinds_without_network_refuse_its_fields);
    tcase_add_test(tests, test_expert_config_clamp_is_for_swiglu);
    tcase_add_test(tests, test_expert_config_identity_is_as_wide_as_its_input);
    tcase_add_test(tests, test_expert_config_callbacks_are_checked);
#ifndef MOE_TEST_DEVICE
    tcase_add_test(tests, test_expert_config_callbacks_are_copied);
    tcase_add_test(tests, test_expert_config_workspace_may_not_overflow);
    tcase_add_test(tests, test_expert_config_parts_must_fit);
    tcase_add_test(tests, test_expert_config_parts_may_not_have_too_many_experts);
    tcase_add_test(tests, test_expert_config_of_parts_is_their_sum);
#endif
    tcase_add_test(tests, test_expert_config_every_allocation_may_fail);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
