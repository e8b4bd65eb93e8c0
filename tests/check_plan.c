/* check_plan.c - plan.h, sentence by sentence: building, dropping, checking, saving and loading. */
#include "support/plan_case.h"
#include "support/suite.h"

/* ---- building -------------------------------------------------------------------------------- */

START_TEST(test_plan_create_empty)
{
    moe_context *context = make_context(1, MOE_ISA_AUTO);
    moe_plan *plan = NULL;
    OK(moe_plan_create(&plan, context));
    OK(moe_plan_check(plan));
    moe_plan_view v = view_of(plan);
    ck_assert(v.tokens == 0 && v.entries == 0 && v.rows == 0 && v.num_experts == 1 &&
              v.groups == 1);
    ck_assert(v.token_begin[0] == 0 && v.expert_begin[0] == 0 && v.expert_begin[1] == 0);
    ck_assert(v.group_begin[0] == 0 && v.group_begin[1] == 0 && v.dtype == F32);
    moe_plan *untouched = plan;
    FAILS(moe_plan_create(&untouched, NULL), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_ptr_eq(untouched, plan);
    FAILS(moe_plan_create(NULL, context), MOE_ERROR_INVALID_ARGUMENT);
    moe_plan_destroy(NULL);
    moe_context_destroy(context);
    moe_plan_destroy(plan);
}
END_TEST

START_TEST(test_plan_build_case)
{
    const plan_case *c = &cases[_i];
    routing *r = make_routing(c, (uint64_t)_i);
    moe_plan *plan = make_plan(c, r);
    moe_plan_view v = view_of(plan);
    size_t entries = (size_t)r->entries;
    OK(moe_plan_check(plan));
    ck_assert(v.tokens == c->tokens && v.entries == r->entries && v.rows == r->rows);
    ck_assert(v.num_experts == c->experts && v.dtype == c->dtype);
    ck_assert_int_eq(v.groups, c->groups ? c->groups : 1);
    same_bytes(v.token_begin, r->token_begin, (size_t)(c->tokens + 1) * 8, "token_begin");
    same_bytes(v.expert_of_entry, r->ids32, entries * 4, "expert_of_entry");
    same_bytes(v.row_of_entry, r->row, entries * 8, "row_of_entry");
    same_bytes(v.slot_of_entry, r->slot, entries * 8, "slot_of_entry");
    same_bytes(v.weight_of_entry, r->weight, entries * size_of(c->dtype), "weight_of_entry");
    for (int64_t g = 0; g <= v.groups; g++)
        ck_assert_int_eq(v.group_begin[g], c->groups ? r->group_begin[g] : g * c->tokens);
    for (int64_t t = 0; t < c->tokens; t++)
        for (int64_t n = r->token_begin[t]; n < r->token_begin[t + 1]; n++)
            if (r->row[n] >= 0)
                ck_assert(v.entry_of_row[r->row[n]] == n && v.token_of_row[r->row[n]] == t);
    ck_assert(v.expert_begin[0] == 0 && v.expert_begin[c->experts] == r->rows);
    for (int64_t e = 0; e < c->experts; e++)
        for (int64_t i = v.expert_begin[e]; i < v.expert_begin[e + 1]; i++)
            ck_assert_int_eq(v.expert_of_entry[v.entry_of_row[i]], e);
    moe_plan_destroy(plan);
    free_routing(r);
}
END_TEST
START_TEST(test_plan_build_twice_same_expert)
{
    small *s = make_small();
    OK(moe_plan_build(s->plan, &s->args));
    static const int64_t rows[6] = {0, 2, 1, 3, 4, 5}, slots[6] = {0, 0, 1, 0, 1, 2};
    same_bytes(view_of(s->plan).row_of_entry, rows, sizeof rows, "rows");
    same_bytes(view_of(s->plan).slot_of_entry, slots, sizeof slots, "slots");
    s->args.weights = NULL;
    OK(moe_plan_build(s->plan, &s->args));
    for (int i = 0; i < 6; i++) ck_assert(get(view_of(s->plan).weight_of_entry, F32, i) == 1);
    free_small(s);
}
END_TEST

/* Dropped: entries 2 (expert 0 is full), 4 and 5. What is dropped is +0 whatever the kept weights
 * are. */
static void renormalised(small *s, const float *given, const float *expected)
{
    memcpy(s->weights, given, sizeof s->weights);
    s->args.capacity = 1, s->args.renormalize_after_drop = 1;
    OK(moe_plan_build(s->plan, &s->args));
    const float *w = view_of(s->plan).weight_of_entry;
    for (int i = 0; i < 6; i++)
        ck_assert_msg(isnan(expected[i]) ? isnan(w[i]) : memcmp(w + i, expected + i, 4) == 0,
                      "weight %d is %g instead of %g", i, (double)w[i], (double)expected[i]);
    OK(moe_plan_check(s->plan));
}

START_TEST(test_plan_renormalize_special)
{
    small *s = make_small();
    const float nan = NAN, inf = INFINITY;
    renormalised(s, (float[]){1, 3, 5, 2, 1, 1}, (float[]){0.25F, 0.75F, 0, 1, 0, 0});
    renormalised(s, (float[]){1, -1, 5, 0, 1, 1}, (float[]){0, 0, 0, 0, 0, 0});
    renormalised(s, (float[]){-1, -3, 5, -2, -1, 1}, (float[]){0.25F, 0.75F, 0, 1, 0, 0});
    renormalised(s, (float[]){nan, 1, nan, nan, nan, 1}, (float[]){nan, nan, 0, nan, 0, 0});
    renormalised(s, (float[]){inf, 1, inf, inf, 1, 1}, (float[]){nan, 0, 0, nan, 0, 0});
    s->args.renormalize_after_drop = 0;
    s->weights[0] = nan;
    OK(moe_plan_build(s->plan, &s->args));
    ck_assert(isnan(get(view_of(s->plan).weight_of_entry, F32, 0)));
    OK(moe_plan_check(s->plan));
    free_small(s);
}
END_TEST

START_TEST(test_plan_build_ignores_rounding_mode)
{
    small *s = make_small();
    s->args.capacity = 2, s->args.renormalize_after_drop = 1;
    s->weights[0] = 0.1F, s->weights[1] = 0.2F;
    OK(moe_plan_build(s->plan, &s->args));
    float w = (float)get(view_of(s->plan).weight_of_entry, F32, 1);
    fesetround(FE_UPWARD);
    OK(moe_plan_build(s->plan, &s->args));
    int mode = fegetround();
    fesetround(FE_TONEAREST);
    ck_assert_int_eq(mode, FE_UPWARD);
    ck_assert(w == (float)get(view_of(s->plan).weight_of_entry, F32, 1));
    free_small(s);
}
END_TEST

/* ---- building: what is refused --------------------------------------------------------------- */

/* Each number is a change that build refuses. */
/* clang-format off */
enum {
    TOKENS, EXPERTS_0, EXPERTS_BIG, TOP_K, IDS_NULL, ID_LOW, ID_HIGH, ID_HIGH_64, ID_DTYPE, DTYPE,
    GROUPS, GROUPS_NULL, GROUP_FIRST, GROUP_LAST, GROUP_ORDER, CAPACITY, POLICY, RENORMALIZE,
    BEGIN_FIRST, BEGIN_ORDER, PRIORITY, LAST_INVALID = PRIORITY,
    DTYPE_BF16, DTYPE_F16, LAST_UNSUPPORTED = DTYPE_F16,
    OVER_ENTRIES, OVER_TOKENS, OVER_BYTES, OVER_BEGIN, LAST_OVERFLOW = OVER_BEGIN, CHANGES
};
/* clang-format on */

static void change(moe_plan_args *a, int which)
{
    static const int64_t group_first[3] = {1, 2, 3}, group_last[3] = {0, 2, 4},
                         descending[4] = {0, 3, 2, 3};
    static const int64_t begin_first[4] = {1, 2, 4, 6}, begin_order[4] = {0, 4, 2, 6};
    static const int64_t begin_huge[4] = {0, 2, 4, INT64_MAX};
    static const int32_t low[6] = {0, 0, 0, -2, 0, 0}, high[6] = {0, 0, 0, 3, 0, 0};
    static const int64_t high_64[6] = {0, 0, 0, (int64_t)1 << 32, 0, 0};
    switch (which) {
    case TOKENS: a->tokens = -1; break;
    case EXPERTS_0: a->num_experts = 0; break;
    case EXPERTS_BIG: a->num_experts = (int64_t)1 << 31; break;
    case TOP_K: a->top_k = -1; break;
    case IDS_NULL: a->expert_ids = NULL; break;
    case ID_LOW: a->expert_ids = low; break;
    case ID_HIGH: a->expert_ids = high; break;
    case ID_HIGH_64: a->expert_ids = high_64, a->id_dtype = I64; break;
    case ID_DTYPE: a->id_dtype = F32; break;
    case DTYPE: a->dtype = I32; break;
    case GROUPS: a->groups = -1; break;
    case GROUPS_NULL: a->groups = 2; break;
    case GROUP_FIRST: a->groups = 2, a->group_begin = group_first; break;
    case GROUP_LAST: a->groups = 2, a->group_begin = group_last; break;
    case GROUP_ORDER: a->groups = 3, a->group_begin = descending; break;
    case CAPACITY: a->capacity = -2; break;
    case POLICY: a->drop_policy = 5; break;
    case RENORMALIZE: a->renormalize_after_drop = 2; break;
    case BEGIN_FIRST: a->token_begin = begin_first; break;
    case BEGIN_ORDER: a->token_begin = begin_order; break;
    case DTYPE_BF16: a->dtype = MOE_DTYPE_BF16; break;
    case DTYPE_F16: a->dtype = MOE_DTYPE_F16; break;
    case PRIORITY: a->token_priority = low; break;
    case OVER_ENTRIES: a->top_k = INT64_MAX; break;
    case OVER_TOKENS: a->tokens = INT64_MAX, a->top_k = 0; break;
    case OVER_BYTES: a->top_k = INT64_MAX / 16; break;
    default: a->token_begin = begin_huge; break;
    }
}

START_TEST(test_plan_build_refuses)
{
    small *s = make_small();
    moe_plan *before;
    moe_context *context = make_context(1, MOE_ISA_AUTO);
    OK(moe_plan_create(&before, context));
    OK(moe_plan_build(s->plan, &s->args));
    OK(moe_plan_copy(before, s->plan));
    for (int which = 0; which < CHANGES; which++) {
        moe_plan_args a = s->args;
        change(&a, which);
        moe_status expected = which <= LAST_INVALID       ? MOE_ERROR_INVALID_ARGUMENT
                              : which <= LAST_UNSUPPORTED ? MOE_ERROR_NOT_SUPPORTED
                                                          : MOE_ERROR_OVERFLOW;
        moe_status status = moe_plan_build(s->plan, &a);
        ck_assert_msg(status == expected, "change %d gives %s: %s", which, moe_status_name(status),
                      moe_last_error());
        same_plan(s->plan, before);
    }
    FAILS(moe_plan_build(NULL, &s->args), MOE_ERROR_INVALID_ARGUMENT);
    FAILS(moe_plan_build(s->plan, NULL), MOE_ERROR_INVALID_ARGUMENT);
    moe_plan_destroy(before);
    moe_context_destroy(context);
    free_small(s);
}
END_TEST

START_TEST(test_plan_build_names_token_entry_id)
{
    static const int64_t begin[4] = {0, 0, 1, 6};
    small *s = make_small();
    s->ids[3] = 77;
    FAILS(moe_plan_build(s->plan, &s->args), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "moe_plan_build"));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "token 1, entry 3"));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "77"));
    s->args.token_begin = begin;
    FAILS(moe_plan_build(s->plan, &s->args), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "token 2, entry 3"));
    free_small(s);
}
END_TEST

START_TEST(test_plan_struct_sizes)
{
    small *s = make_small();
    struct {
        moe_plan_args known;
        uint64_t tail;
    } longer;
    memset(&longer, 0, sizeof longer);
    longer.known = s->args;
    longer.known.struct_size = sizeof longer;
    OK(moe_plan_build(s->plan, &longer.known));
    longer.tail = 1;
    FAILS(moe_plan_build(s->plan, &longer.known), MOE_ERROR_STRUCT_TOO_NEW);
    s->args.struct_size = 16;
    FAILS(moe_plan_build(s->plan, &s->args), MOE_ERROR_STRUCT_TOO_OLD);
    s->args.struct_size = 0;
    FAILS(moe_plan_build(s->plan, &s->args), MOE_ERROR_STRUCT_SIZE);
    moe_plan_view view = {.struct_size = 3};
    FAILS(moe_plan_get(s->plan, &view), MOE_ERROR_STRUCT_SIZE);
    FAILS(moe_plan_get(s->plan, NULL), MOE_ERROR_INVALID_ARGUMENT);
    FAILS(moe_plan_args_init(NULL, sizeof s->args), MOE_ERROR_INVALID_ARGUMENT);
    FAILS(moe_plan_view_init(&view, 4), MOE_ERROR_STRUCT_SIZE);
    OK(moe_plan_view_init(&view, sizeof view));
    FAILS(moe_plan_get(NULL, &view), MOE_ERROR_INVALID_ARGUMENT);
    FAILS(moe_plan_check(NULL), MOE_ERROR_INVALID_ARGUMENT);
    moe_rows_args rows;
    OK(moe_rows_args_init(&rows, sizeof rows));
    ck_assert(rows.flags == 0 && rows.width == 0 && rows.dtype == F32 && rows.stream == NULL);
    free_small(s);
}
END_TEST

/* ---- memory and callbacks that fail ---------------------------------------------------------- */

typedef struct broken {
    int64_t left;     /* allocations that succeed */
    int64_t held;     /* bytes */
    int32_t parallel; /* what the parallel-for returns */
} broken;

static void *broken_alloc(void *user, uint64_t size, uint64_t alignment)
{
    broken *b = user;
    void *memory = NULL;
    if (b->left-- <= 0 || posix_memalign(&memory, (size_t)alignment, (size_t)size) != 0)
        return NULL;
    memset(memory, 0xa5, (size_t)size);
    b->held += (int64_t)size;
    return memory;
}

static void broken_free(void *user, void *memory, uint64_t size)
{
    ((broken *)user)->held -= (int64_t)size;
    free(memory);
}

static int32_t broken_parallel(void *user, int64_t count, moe_task_fn task, void *argument)
{
    for (int64_t i = count - 1; i >= 0; i--) task(argument, i);
    return ((broken *)user)->parallel;
}

static moe_context *make_broken_context(broken *b, int32_t threads)
{
    moe_context *context;
    moe_context_config config;
    OK(moe_context_config_init(&config, sizeof config));
    config.threads = threads;
    config.alloc = broken_alloc, config.free = broken_free, config.alloc_user = b;
    config.parallel = broken_parallel, config.parallel_user = b;
    OK(moe_context_create(&context, &config));
    return context;
}

/* Every n-th allocation of each call fails once: the plan keeps what it held, nothing leaks. */
START_TEST(test_plan_survives_no_memory)
{
    /* Allocations of each call; of a device those of its memory. */
    static const int64_t steps[2][5] = {{2, 2, 1, 2, 1}, {1, 1, 1, 1, 0}};
    broken b = {.left = INT64_MAX};
    moe_context *context = make_broken_context(&b, 1);
    moe_plan *plan, *reference;
    small *s = make_small();
    s->args.capacity = 3, s->args.drop_policy = MOE_DROP_CHOICE; /* the slots do not ascend */
    OK(moe_plan_create(&reference, context));
    for (int call = 0; call < 5; call++)
        for (int64_t n = 0;; n++) {
            int64_t size;
            void *bytes;
            b.left = INT64_MAX;
            OK(moe_plan_build(reference, &s->args));
            bytes = saved(reference, &size);
            moe_plan *made = NULL;
            OK(moe_plan_create(&plan, context));
            int64_t held = b.held;
            b.left = n;
            moe_status status = call == 0   ? moe_plan_create(&made, context)
                                : call == 1 ? moe_plan_build(plan, &s->args)
                                : call == 2 ? moe_plan_copy(plan, reference)
                                : call == 3 ? moe_plan_load(plan, bytes, size)
                                            : moe_plan_check(reference);
            b.left = INT64_MAX;
            if (status != MOE_OK) {
                ck_assert_int_eq(status, MOE_ERROR_OUT_OF_MEMORY);
                ck_assert(made == NULL && b.held == held && view_of(plan).tokens == 0);
            }
            OK(moe_plan_check(plan));
            moe_plan_destroy(made), moe_plan_destroy(plan), free(bytes);
            ck_assert(status != MOE_OK || n == steps[ON_DEVICE][call]);
            if (status == MOE_OK) break;
        }
    moe_plan_destroy(reference);
    moe_context_destroy(context);
    ck_assert_int_eq(b.held, 0);
    free_small(s);
}
END_TEST

#ifndef MOE_TEST_DEVICE /* which calls no function of the host */
START_TEST(test_plan_build_callback_fails)
{
    static const plan_case c = {5000, 7, 2, 2, 0, -1, 0, 0, F32, I32, MOE_ISA_AUTO, 4};
    broken b = {.left = INT64_MAX};
    routing *r = make_routing(&c, 5);
    moe_context *context = make_broken_context(&b, 4);
    moe_plan *plan;
    OK(moe_plan_create(&plan, context));
    b.parallel = 9;
    FAILS(moe_plan_build(plan, &r->args), MOE_ERROR_CALLBACK);
    ck_assert_int_eq(view_of(plan).tokens, 0);
    b.parallel = 0;
    OK(moe_plan_build(plan, &r->args));
    moe_plan_destroy(plan);
    moe_context_destroy(context);
    ck_assert_int_eq(b.held, 0);
    free_routing(r);
}
END_TEST
#endif

/* ---- copy, save, load, check ----------------------------------------------------------------- */

START_TEST(test_plan_copy_save_load_case)
{
    const plan_case *c = &cases[_i];
    routing *r = make_routing(c, (uint64_t)_i);
    moe_plan *plan = make_plan(c, r), *other;
    moe_context *context = make_context(1, MOE_ISA_PLAIN);
    int64_t size;
    char *bytes = (char *)saved(plan, &size), *shifted = malloc((size_t)size + 1);
    OK(moe_plan_create(&other, context));
    OK(moe_plan_copy(other, plan));
    same_plan(other, plan);
    OK(moe_plan_copy(other, other));
    same_plan(other, plan);
    memcpy(shifted + 1, bytes, (size_t)size); /* the buffer need not be aligned */
    moe_plan_destroy(other);
    OK(moe_plan_create(&other, context));
    OK(moe_plan_load(other, shifted + 1, size));
    OK(moe_plan_check(other));
    same_plan(other, plan);
    FAILS(moe_plan_load(other, bytes, size - 1), MOE_ERROR_CORRUPT_DATA);
    same_plan(other, plan);
    free(bytes), free(shifted);
    moe_plan_destroy(other), moe_plan_destroy(plan);
    moe_context_destroy(context);
    free_routing(r);
}
END_TEST

START_TEST(test_plan_save_arguments)
{
    small *s = make_small();
    int64_t size = 0;
    char buffer[1024];
    memset(buffer, 'x', sizeof buffer);
    OK(moe_plan_build(s->plan, &s->args));
    FAILS(moe_plan_save(NULL, buffer, 1024, &size), MOE_ERROR_INVALID_ARGUMENT);
    FAILS(moe_plan_save(s->plan, buffer, 1024, NULL), MOE_ERROR_INVALID_ARGUMENT);
    FAILS(moe_plan_save(s->plan, buffer, -1, &size), MOE_ERROR_INVALID_ARGUMENT);
    FAILS(moe_plan_save(s->plan, NULL, 8, &size), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_int_eq(size, 0);
    FAILS(moe_plan_save(s->plan, NULL, 0, &size), MOE_ERROR_BUFFER_TOO_SMALL);
    ck_assert(size > 0 && size < 1024);
    FAILS(moe_plan_save(s->plan, buffer, size - 1, &size), MOE_ERROR_BUFFER_TOO_SMALL);
    for (int i = 0; i < 1024; i++) ck_assert(buffer[i] == 'x');
    OK(moe_plan_save(s->plan, buffer, 1024, &size));
    ck_assert(memcmp(buffer, "MOEPLAN1", 8) == 0 && buffer[size] == 'x');
    FAILS(moe_plan_load(NULL, buffer, size), MOE_ERROR_INVALID_ARGUMENT);
    FAILS(moe_plan_load(s->plan, NULL, size), MOE_ERROR_INVALID_ARGUMENT);
    FAILS(moe_plan_load(s->plan, buffer, -1), MOE_ERROR_INVALID_ARGUMENT);
    FAILS(moe_plan_copy(NULL, s->plan), MOE_ERROR_INVALID_ARGUMENT);
    FAILS(moe_plan_copy(s->plan, NULL), MOE_ERROR_INVALID_ARGUMENT);
    free_small(s);
}
END_TEST

/* FNV-1a of all but the last 8 bytes, little-endian, into the last 8. */
static void seal(unsigned char *bytes, int64_t size)
{
    uint64_t hash = 0xcbf29ce484222325u;
    for (int64_t i = 0; i < size - 8; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    for (int i = 0; i < 8; i++) bytes[size - 8 + i] = (unsigned char)(hash >> (8 * i));
}

/* Mutates 1 to 4 bytes; half of the time a small change, so that fields stay plausible. */
static void mutate(unsigned char *bytes, int64_t size)
{
    for (uint64_t i = 0; i <= draw(4); i++) {
        unsigned char *at = bytes + draw((uint64_t)size);
        *at = (unsigned char)(draw(2) ? draw(256) : *at + (draw(2) ? 1u : 255u));
    }
}

/* Bytes that were damaged are refused; bytes that were forged, checksum included, are refused or
 * make a plan that holds every invariant. The copy has exactly `size` bytes, so that a sanitizer
 * sees every step beyond. num_experts, at byte 32, costs memory if it grows, and is left alone. */
START_TEST(test_plan_load_hostile)
{
    static const plan_case c = {12, 5, 0, 3, 3, 2, 1, 1, F32, I32, MOE_ISA_AUTO, 1};
    routing *r = make_routing(&c, 3);
    r->args.drop_policy = _i;
    moe_plan *plan = make_plan(&c, r), *other = make_plan(&c, r);
    int64_t size, good = 0, refused = 0;
    unsigned char *bytes = (unsigned char *)saved(plan, &size);
    for (int round = 0; round < 6000; round++) {
        int forged = round % 3 != 0;
        int64_t length = round % 5 ? size : (int64_t)draw((uint64_t)size + 1);
        unsigned char *damaged = malloc((size_t)length + (length == 0));
        memcpy(damaged, bytes, (size_t)length);
        if (length > 0 && length == size) mutate(damaged, length);
        if (length >= 40) memcpy(damaged + 32, bytes + 32, 8);
        if (forged && length >= 8) seal(damaged, length);
        int equal = length == size && memcmp(damaged, bytes, (size_t)size) == 0;
        moe_status status = moe_plan_load(other, damaged, length);
        int accepted = equal || (forged && status == MOE_OK);
        ck_assert_int_eq(status, accepted ? MOE_OK : MOE_ERROR_CORRUPT_DATA);
        good += accepted, refused += !accepted;
        OK(moe_plan_check(other));
        OK(moe_plan_load(other, bytes, size));
        free(damaged);
    }
    ck_assert(refused > 4000 && good > 0);
    same_plan(plan, other);
    free(bytes);
    moe_plan_destroy(plan), moe_plan_destroy(other);
    free_routing(r);
}
END_TEST

/* Each array of a plan is spoilt in turn, in every place; check finds it, and once mended is
 * content. */
static void spoil(moe_plan *plan, const int64_t *array, int64_t count, const char *name)
{
    for (int64_t i = 0; i < count; i++)
        for (int64_t by = -1; by <= 1000; by = by < 0 ? 1 : by == 1 ? 1000 : 1001) {
            ((int64_t *)array)[i] += by;
            moe_status status = moe_plan_check(plan);
            ((int64_t *)array)[i] -= by;
            ck_assert_msg(status == MOE_ERROR_CORRUPT_DATA, "%s[%d] by %d gives %s", name, (int)i,
                          (int)by, moe_status_name(status));
        }
    OK(moe_plan_check(plan));
}

START_TEST(test_plan_check_finds)
{
    static const plan_case c = {12, 3, 3, 3, 2, 3, 1, 0, F32, I32, MOE_ISA_AUTO, 1};
    static const int64_t group_begin[3] = {0, 6, 12};
    routing *r = make_routing(&c, 8);
    for (int t = 0; t < 12; t++) r->mask[t] = t != 4;
    r->args.group_begin = group_begin, r->args.drop_policy = _i;
    moe_plan *plan = make_plan(&c, r);
    moe_plan_view v = view_of(plan);
    ck_assert(v.rows > 6 && v.rows < v.entries);
    spoil(plan, v.token_begin, 1, "token_begin"), spoil(plan, v.token_begin + 12, 1, "token_begin");
    spoil(plan, v.group_begin, 1, "group_begin"), spoil(plan, v.group_begin + 2, 1, "group_begin");
    spoil(plan, v.row_of_entry, v.entries, "row_of_entry");
    spoil(plan, v.slot_of_entry, v.entries, "slot_of_entry");
    spoil(plan, v.expert_begin, c.experts + 1, "expert_begin");
    spoil(plan, v.token_of_row, v.rows, "token_of_row");
    spoil(plan, v.entry_of_row, v.rows, "entry_of_row");
    for (int64_t n = 0; n < v.entries; n++) {
        int32_t *id = (int32_t *)v.expert_of_entry + n, was = *id;
        for (int32_t bad = -2; bad <= 3; bad += 5) {
            *id = bad;
            FAILS(moe_plan_check(plan), MOE_ERROR_CORRUPT_DATA);
        }
        *id = v.row_of_entry[n] < 0 ? was : -1;
        if (v.row_of_entry[n] >= 0) FAILS(moe_plan_check(plan), MOE_ERROR_CORRUPT_DATA);
        *id = was;
        if (v.row_of_entry[n] >= 0) continue;
        ((float *)v.weight_of_entry)[n] = 0.5F;
        FAILS(moe_plan_check(plan), MOE_ERROR_CORRUPT_DATA);
        ((float *)v.weight_of_entry)[n] = 0;
    }
    OK(moe_plan_check(plan));
    moe_plan_destroy(plan);
    free_routing(r);
}
END_TEST

/* Slots may stand in any order of their (group, expert), once each. */
START_TEST(test_plan_check_slots_in_any_order)
{
    small *s = make_small();
    OK(moe_plan_build(s->plan, &s->args));
    int64_t *slot = s->plan->a.slot_of_entry, size;
    for (int i = 0; i < 27; i++) {
        const int64_t want[3] = {i % 3, i / 3 % 3, i / 9};
        int each_once = want[0] != want[1] && want[1] != want[2] && want[2] != want[0];
        memcpy(slot + 3, want, sizeof want); /* entries 3, 4, 5 are expert 2's */
        void *bytes = saved(s->plan, &size);
        moe_status expected = each_once ? MOE_OK : MOE_ERROR_CORRUPT_DATA;
        ck_assert_int_eq(moe_plan_check(s->plan), expected);
        ck_assert_int_eq(moe_plan_load(s->plan, bytes, size), expected);
        slot = s->plan->a.slot_of_entry;
        free(bytes);
    }
    free_small(s);
}
END_TEST

/* A plan of a pass is read like any other, and not written to or destroyed. */
START_TEST(test_plan_of_pass)
{
    static const float logits[6] = {0, 1, 2, 2, 1, 0};
    moe_context *context = make_context(1, MOE_ISA_AUTO);
    moe_gate_config config;
    moe_gate *gate;
    moe_pass *pass;
    moe_forward_args args;
    const moe_plan *plan;
    moe_plan *own;
    int64_t size;
    small *s = make_small();
    OK(moe_gate_config_init(&config, sizeof config));
    config.num_experts = 3, config.top_k = 2;
    OK(moe_gate_create(&gate, context, &config));
    OK(moe_pass_create_for_gate(&pass, gate, NULL));
    OK(moe_forward_args_init(&args, sizeof args));
    args.tokens = 2, args.logits_in = logits;
    OK(moe_gate_forward(gate, pass, &args));
    OK(moe_pass_plan(pass, &plan));
    OK(moe_plan_create(&own, context));
    OK(moe_plan_check(plan));
    OK(moe_plan_copy(own, plan));
    void *bytes = saved(plan, &size);
    moe_plan *of_pass = (moe_plan *)plan;
    FAILS(moe_plan_build(of_pass, &s->args), MOE_ERROR_INVALID_STATE);
    FAILS(moe_plan_copy(of_pass, own), MOE_ERROR_INVALID_STATE);
    FAILS(moe_plan_load(of_pass, bytes, size), MOE_ERROR_INVALID_STATE);
    moe_plan_destroy(of_pass);
    same_plan(plan, own);
    OK(moe_plan_load(own, bytes, size));
    same_plan(plan, own);
    free(bytes);
    moe_plan_destroy(own);
    moe_pass_destroy(pass), moe_gate_destroy(gate), moe_context_destroy(context);
    free_small(s);
}
END_TEST
int main(void)
{
    Suite *suite = suite_create("plan");
    TCase *tests = tcase_create("plan");
    tcase_set_timeout(tests, 120);
    tcase_add_test(tests, test_plan_create_empty);
    tcase_add_loop_test(tests, test_plan_build_case, 0, CASES);
    tcase_add_test(tests, test_plan_build_twice_same_expert);
    tcase_add_test(tests, test_plan_renormalize_special);
    tcase_add_test(tests, test_plan_build_ignores_rounding_mode);
    tcase_add_test(tests, test_plan_build_refuses);
    tcase_add_test(tests, test_plan_build_names_token_entry_id);
    tcase_add_test(tests, test_plan_struct_sizes);
    if (COUNTS_HOLD) tcase_add_test(tests, test_plan_survives_no_memory);
#ifndef MOE_TEST_DEVICE
    tcase_add_test(tests, test_plan_build_callback_fails);
#endif
    tcase_add_loop_test(tests, test_plan_copy_save_load_case, 0, CASES);
    tcase_add_test(tests, test_plan_save_arguments);
    tcase_add_loop_test(tests, test_plan_load_hostile, MOE_DROP_TOKEN_ORDER, MOE_DROP_CHOICE + 1);
    tcase_add_loop_test(tests, test_plan_check_finds, MOE_DROP_TOKEN_ORDER, MOE_DROP_CHOICE + 1);
    tcase_add_test(tests, test_plan_check_slots_in_any_order);
    tcase_add_test(tests, test_plan_of_pass);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
