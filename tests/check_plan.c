/* check_plan.c - plan.h, sentence by sentence: building, dropping, checking, saving and loading,
 * and dispatch and combine in both directions.
 *
 * The oracle is naive: an entry is kept if fewer than the capacity of kept entries before it share
 * its group and expert; a row's number is the count of kept entries that come before it in (expert,
 * entry). Sums are formed in the order and type the library promises, so every comparison is of
 * bytes. */
#include <check.h>
#include <fenv.h>
#include <math.h>
#include <moe/moe.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "numeric.h"

#define OK(call)                                                               \
    do {                                                                       \
        moe_status ok_status = (call);                                         \
        ck_assert_msg(ok_status == MOE_OK, "%s: %s", #call, moe_last_error()); \
    } while (0)
#define FAILS(call, status) ck_assert_str_eq(moe_status_name(call), #status)

enum { F32 = MOE_DTYPE_F32, F64 = MOE_DTYPE_F64, I32 = MOE_DTYPE_I32, I64 = MOE_DTYPE_I64 };

/* ---- numbers of either type ------------------------------------------------------------------ */

static uint64_t seed;

static uint64_t draw(uint64_t below)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (seed >> 33) % below;
}
static size_t size_of(int32_t dtype) { return dtype == F64 ? sizeof(double) : sizeof(float); }
static double get(const void *a, int32_t dtype, int64_t i)
{
    return dtype == F64 ? ((const double *)a)[i] : (double)((const float *)a)[i];
}
static void set(void *a, int32_t dtype, int64_t i, double value)
{
    if (dtype == F64)
        ((double *)a)[i] = value;
    else
        ((float *)a)[i] = (float)value;
}
static double add(int32_t dtype, double a, double b)
{
    return dtype == F64 ? a + b : (double)((float)a + (float)b);
}
static double multiply(int32_t dtype, double a, double b)
{
    return dtype == F64 ? a * b : (double)((float)a * (float)b);
}
static double divide(int32_t dtype, double a, double b)
{
    return dtype == F64 ? a / b : (double)((float)a / (float)b);
}
static double multiply_add(int32_t dtype, double a, double b, double c)
{
    return dtype == F64 ? fma(a, b, c) : (double)fmaf((float)a, (float)b, (float)c);
}

/* n numbers in (-1, 1). */
static void *numbers(int32_t dtype, int64_t n)
{
    void *a = calloc((size_t)n + 1, sizeof(double));
    for (int64_t i = 0; i < n; i++) set(a, dtype, i, (double)draw(2000001) / 1000000 - 1);
    return a;
}

/* ---- a case: a routing of the host and what must come of it ---------------------------------- */

typedef struct plan_case {
    int64_t tokens, experts, least_k, most_k, groups; /* least_k == most_k: token_begin NULL */
    int64_t capacity;
    int32_t mask, renormalize, dtype, id_dtype, isa, threads;
} plan_case;

static const plan_case cases[] = {
    {0, 1, 0, 0, 0, -1, 0, 0, F32, I32, MOE_ISA_AUTO, 1},
    {0, 7, 2, 2, 3, 4, 0, 1, F64, I64, MOE_ISA_AUTO, 1},
    {1, 1, 1, 1, 0, -1, 0, 0, F32, I32, MOE_ISA_PLAIN, 1},
    {9, 1, 3, 3, 1, 5, 0, 1, F64, I32, MOE_ISA_AUTO, 2},
    {5, 3, 0, 0, 0, -1, 0, 0, F32, I32, MOE_ISA_AUTO, 1},
    {40, 5, 2, 2, 0, -1, 0, 0, F32, I32, MOE_ISA_AUTO, 1},
    {40, 5, 2, 2, 0, -1, 1, 0, F32, I64, MOE_ISA_AUTO, 3},
    {64, 8, 4, 4, 4, 5, 1, 1, F32, I32, MOE_ISA_PLAIN, 2},
    {64, 8, 4, 4, 4, 0, 0, 1, F64, I64, MOE_ISA_AUTO, 2},
    {100, 300, 0, 9, 7, 2, 1, 1, F64, I32, MOE_ISA_AUTO, 1},
    {100, 6, 0, 9, 30, 2, 1, 1, F32, I64, MOE_ISA_AUTO, 1},
    {3000, 11, 0, 4, 3, 150, 1, 1, F32, I32, MOE_ISA_AUTO, 4},
    {3000, 4096, 2, 2, 0, 1, 0, 0, F64, I32, MOE_ISA_PLAIN, 4},
};
enum { CASES = sizeof cases / sizeof cases[0] };

typedef struct routing {
    moe_plan_args args;
    int64_t entries, rows, *token_begin, *group_begin;
    int32_t *ids32;
    int64_t *ids64;
    uint8_t *mask;
    void *weights;
    /* what must come of it */
    void *weight;
    int64_t *row, *slot;
} routing;

static int64_t id_of(const routing *r, int64_t n) { return r->ids64[n]; }

static int64_t group_of(const routing *r, int64_t t)
{
    int64_t g = 0;
    while (r->args.group_begin && t >= r->group_begin[g + 1]) g++;
    return g;
}

/* Slots and weights, token by token. */
static void expect_slots(routing *r)
{
    int64_t *used = calloc((size_t)r->args.num_experts, sizeof *used), group = 0;
    for (int64_t t = 0; t < r->args.tokens; t++) {
        if (group_of(r, t) != group)
            memset(used, 0, (size_t)r->args.num_experts * sizeof *used), group = group_of(r, t);
        double sum = 0;
        for (int64_t n = r->token_begin[t]; n < r->token_begin[t + 1]; n++) {
            int kept = id_of(r, n) >= 0 && (!r->args.token_mask || r->mask[t]) &&
                       (r->args.capacity < 0 || used[id_of(r, n)] < r->args.capacity);
            r->slot[n] = kept ? used[id_of(r, n)]++ : -1;
            if (kept) sum = add(r->args.dtype, sum, get(r->weights, r->args.dtype, n));
        }
        for (int64_t n = r->token_begin[t]; n < r->token_begin[t + 1]; n++) {
            double w = get(r->weights, r->args.dtype, n);
            if (r->args.renormalize_after_drop) w = sum == 0 ? 0 : divide(r->args.dtype, w, sum);
            set(r->weight, r->args.dtype, n, r->slot[n] < 0 ? 0 : w);
        }
    }
    free(used);
}

static void expect(routing *r)
{
    int64_t *first = calloc((size_t)r->args.num_experts + 1, sizeof *first);
    expect_slots(r);
    for (int64_t n = 0; n < r->entries; n++)
        if (r->slot[n] >= 0) first[id_of(r, n) + 1]++, r->rows++;
    for (int64_t e = 0; e < r->args.num_experts; e++) first[e + 1] += first[e];
    for (int64_t n = 0; n < r->entries; n++) r->row[n] = r->slot[n] < 0 ? -1 : first[id_of(r, n)]++;
    free(first);
}

static void *words(int64_t n) { return calloc((size_t)n + 1, sizeof(int64_t)); }

/* Ids of -1 among the others, duplicates, masked tokens, groups without tokens. */
static routing *make_routing(const plan_case *c, uint64_t number)
{
    routing *r = calloc(1, sizeof *r);
    seed = number * 977 + 1;
    OK(moe_plan_args_init(&r->args, sizeof r->args));
    r->token_begin = words(c->tokens + 1);
    for (int64_t t = 0; t < c->tokens; t++)
        r->token_begin[t + 1] = r->token_begin[t] + c->least_k +
                                (int64_t)draw((uint64_t)(c->most_k - c->least_k + 1));
    r->entries = r->token_begin[c->tokens];
    r->ids32 = words(r->entries), r->ids64 = words(r->entries);
    r->row = words(r->entries), r->slot = words(r->entries), r->weight = words(r->entries);
    r->weights = numbers(c->dtype, r->entries);
    r->mask = calloc((size_t)c->tokens + 1, 1);
    r->group_begin = words(c->groups + 1);
    for (int64_t n = 0; n < r->entries; n++)
        r->ids32[n] = (int32_t)(r->ids64[n] = (int64_t)draw((uint64_t)c->experts + 1) - 1);
    for (int64_t t = 0; t < c->tokens; t++) r->mask[t] = (uint8_t)(draw(4) * 85);
    for (int64_t g = 1; g < c->groups; g++)
        r->group_begin[g] = r->group_begin[g - 1] +
                            (int64_t)draw((uint64_t)(c->tokens - r->group_begin[g - 1]) / 2 + 1);
    r->group_begin[c->groups] = c->groups ? c->tokens : 0;
    r->args.tokens = c->tokens, r->args.num_experts = c->experts, r->args.top_k = c->least_k;
    r->args.token_begin = c->least_k == c->most_k ? NULL : r->token_begin;
    r->args.id_dtype = c->id_dtype, r->args.dtype = c->dtype;
    r->args.expert_ids = c->id_dtype == I64 ? (void *)r->ids64 : (void *)r->ids32;
    r->args.weights = r->weights;
    r->args.token_mask = c->mask ? r->mask : NULL;
    r->args.groups = c->groups, r->args.group_begin = c->groups ? r->group_begin : NULL;
    r->args.capacity = c->capacity, r->args.renormalize_after_drop = c->renormalize;
    expect(r);
    return r;
}

static void free_routing(routing *r)
{
    void *all[] = {r->token_begin, r->group_begin, r->ids32, r->ids64, r->mask,
                   r->weights,     r->weight,      r->row,   r->slot,  r};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

static moe_context *make_context(int32_t threads, int32_t isa)
{
    moe_context *context;
    moe_context_config config;
    OK(moe_context_config_init(&config, sizeof config));
    config.threads = threads, config.isa = isa;
    OK(moe_context_create(&context, &config));
    return context;
}

static moe_plan *make_plan(const plan_case *c, const routing *r)
{
    moe_plan *plan;
    moe_context *context = make_context(c->threads, c->isa);
    OK(moe_plan_create(&plan, context));
    moe_context_destroy(context); /* the plan holds its own reference */
    OK(moe_plan_build(plan, &r->args));
    return plan;
}

static moe_plan_view view_of(const moe_plan *plan)
{
    moe_plan_view view;
    OK(moe_plan_view_init(&view, sizeof view));
    OK(moe_plan_get(plan, &view));
    return view;
}

static int64_t *saved(const moe_plan *plan, int64_t *size)
{
    FAILS(moe_plan_save(plan, NULL, 0, size), MOE_ERROR_BUFFER_TOO_SMALL);
    int64_t *bytes = calloc(1, (size_t)*size);
    OK(moe_plan_save(plan, bytes, *size, size));
    return bytes;
}

static void same_bytes(const void *a, const void *b, size_t bytes, const char *what)
{
    for (size_t i = 0; i < bytes; i++)
        if (((const char *)a)[i] != ((const char *)b)[i])
            ck_abort_msg("%s: byte %zu of %zu differs", what, i, bytes);
}

static void same_plan(const moe_plan *a, const moe_plan *b)
{
    int64_t size_a, size_b;
    void *bytes_a = saved(a, &size_a), *bytes_b = saved(b, &size_b);
    moe_plan_view v = view_of(a), w = view_of(b);
    ck_assert_int_eq(size_a, size_b);
    same_bytes(bytes_a, bytes_b, (size_t)size_a, "saved plan");
    same_bytes(v.expert_begin, w.expert_begin, (size_t)(v.num_experts + 1) * 8, "expert_begin");
    same_bytes(v.token_of_row, w.token_of_row, (size_t)v.rows * 8, "token_of_row");
    same_bytes(v.entry_of_row, w.entry_of_row, (size_t)v.rows * 8, "entry_of_row");
    free(bytes_a), free(bytes_b);
}

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

/* Three tokens: ids and weights as given, capacity 1 unless changed. */
typedef struct small {
    moe_plan *plan;
    moe_plan_args args;
    int32_t ids[6];
    float weights[6];
} small;

static small *make_small(void)
{
    static const int32_t ids[6] = {0, 1, 0, 2, 2, 2};
    static const float weights[6] = {0.5F, 0.5F, 0.75F, 0.25F, 0.5F, 1.5F};
    small *s = calloc(1, sizeof *s);
    moe_context *context = make_context(1, MOE_ISA_AUTO);
    OK(moe_plan_create(&s->plan, context));
    moe_context_destroy(context);
    memcpy(s->ids, ids, sizeof ids);
    memcpy(s->weights, weights, sizeof weights);
    OK(moe_plan_args_init(&s->args, sizeof s->args));
    s->args.tokens = 3, s->args.top_k = 2, s->args.num_experts = 3;
    s->args.expert_ids = s->ids, s->args.weights = s->weights;
    return s;
}

static void free_small(small *s)
{
    moe_plan_destroy(s->plan);
    free(s);
}

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
    BEGIN_FIRST, BEGIN_ORDER, LAST_INVALID = BEGIN_ORDER,
    DTYPE_BF16, DTYPE_F16, POLICY_CHOICE, POLICY_RANDOM, PRIORITY, LAST_UNSUPPORTED = PRIORITY,
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
    case POLICY_CHOICE: a->drop_policy = MOE_DROP_CHOICE; break;
    case POLICY_RANDOM: a->drop_policy = MOE_DROP_RANDOM; break;
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
    broken b = {.left = INT64_MAX};
    moe_context *context = make_broken_context(&b, 1);
    moe_plan *plan, *reference;
    small *s = make_small();
    OK(moe_plan_create(&reference, context));
    for (int call = 0; call < 4; call++)
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
                                            : moe_plan_load(plan, bytes, size);
            b.left = INT64_MAX;
            if (status != MOE_OK) {
                ck_assert_int_eq(status, MOE_ERROR_OUT_OF_MEMORY);
                ck_assert(made == NULL && b.held == held && view_of(plan).tokens == 0);
            }
            OK(moe_plan_check(plan));
            moe_plan_destroy(made), moe_plan_destroy(plan), free(bytes);
            if (status == MOE_OK) break;
        }
    moe_plan_destroy(reference);
    moe_context_destroy(context);
    ck_assert_int_eq(b.held, 0);
    free_small(s);
}
END_TEST

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
    r->args.group_begin = group_begin;
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

/* ---- dispatch and combine -------------------------------------------------------------------- */

/* What a call is given and what must come of it: rows of `width` numbers, `stride` apart. The gaps
 * are compared too. */
typedef struct matrix {
    void *data;
    int64_t rows, width, stride;
    int32_t dtype;
} matrix;

static matrix make_matrix(int32_t dtype, int64_t rows, int64_t width, int64_t gap)
{
    matrix m = {NULL, rows, width, width + gap, dtype};
    m.data = numbers(dtype, rows * m.stride);
    return m;
}
static matrix copy_of(const matrix *from)
{
    matrix m = *from;
    size_t bytes = (size_t)(m.rows * m.stride + 1) * size_of(m.dtype);
    m.data = malloc(bytes);
    memcpy(m.data, from->data, bytes);
    return m;
}
static double at(const matrix *m, int64_t i, int64_t j)
{
    return get(m->data, m->dtype, i * m->stride + j);
}
static void put(matrix *m, int64_t i, int64_t j, double v)
{
    set(m->data, m->dtype, i * m->stride + j, v);
}
static void same_matrix(const matrix *a, const matrix *b, const char *what)
{
    same_bytes(a->data, b->data, (size_t)(a->rows * a->stride) * size_of(a->dtype), what);
}

/* The promised sum of a token's rows; `weighted` by fused multiply-adds from +0. */
static double sum_of(const moe_plan_view *v, const matrix *rows, int64_t t, int64_t j, int weighted)
{
    double sum = 0;
    int any = 0;
    for (int64_t n = v->token_begin[t]; n < v->token_begin[t + 1]; n++) {
        if (v->row_of_entry[n] < 0) continue;
        double x = at(rows, v->row_of_entry[n], j);
        if (weighted)
            sum = multiply_add(v->dtype, get(v->weight_of_entry, v->dtype, n), x, sum);
        else
            sum = any ? add(v->dtype, sum, x) : x;
        any = 1;
    }
    return sum;
}

static double dot(const matrix *a, int64_t i, const matrix *b, int64_t k)
{
    double lane[16] = {0};
    for (int64_t j = 0; j < a->width; j++)
        lane[j % 16] = multiply_add(a->dtype, at(a, i, j), at(b, k, j), lane[j % 16]);
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++) lane[l] = add(a->dtype, lane[l], lane[l + half]);
    return lane[0];
}

typedef struct operands {
    moe_plan *plan;
    moe_plan_view v;
    moe_rows_args args;
    matrix tokens, rows, tokens_out, rows_out;
} operands;

static operands *make_operands(moe_plan *plan, int64_t width, int64_t gap)
{
    operands *o = calloc(1, sizeof *o);
    o->plan = plan, o->v = view_of(plan);
    o->tokens = make_matrix(o->v.dtype, o->v.tokens, width, gap);
    o->rows = make_matrix(o->v.dtype, o->v.rows, width, 2 * gap);
    o->tokens_out = make_matrix(o->v.dtype, o->v.tokens, width, 3 * gap);
    o->rows_out = make_matrix(o->v.dtype, o->v.rows, width, gap);
    OK(moe_rows_args_init(&o->args, sizeof o->args));
    o->args.width = width, o->args.dtype = o->v.dtype;
    o->args.tokens_in = o->tokens.data, o->args.tokens_in_stride = gap ? o->tokens.stride : 0;
    o->args.rows_in = o->rows.data, o->args.rows_in_stride = gap ? o->rows.stride : 0;
    o->args.tokens_out = o->tokens_out.data,
    o->args.tokens_out_stride = gap ? o->tokens_out.stride : 0;
    o->args.rows_out = o->rows_out.data, o->args.rows_out_stride = gap ? o->rows_out.stride : 0;
    return o;
}

static void free_operands(operands *o)
{
    free(o->tokens.data), free(o->rows.data), free(o->tokens_out.data), free(o->rows_out.data),
        free(o);
}

/* Both calls that write tokens, set and added to, weighted or not. */
static void check_to_tokens(operands *o, int combine, uint64_t flags)
{
    matrix expected = copy_of(&o->tokens_out);
    for (int64_t t = 0; t < o->v.tokens; t++)
        for (int64_t j = 0; j < o->args.width; j++) {
            double sum = sum_of(&o->v, &o->rows, t, j, combine && !(flags & MOE_ROWS_UNWEIGHTED));
            if (flags & MOE_ROWS_ADD) sum = add(o->v.dtype, at(&expected, t, j), sum);
            put(&expected, t, j, sum);
        }
    o->args.flags = flags;
    OK(combine ? moe_combine_forward(o->plan, &o->args) : moe_dispatch_backward(o->plan, &o->args));
    same_matrix(&expected, &o->tokens_out, combine ? "combine_forward" : "dispatch_backward");
    free(expected.data);
}

static void check_to_rows(operands *o, int combine, uint64_t flags)
{
    matrix expected = copy_of(&o->rows_out);
    void *grad = numbers(o->v.dtype, o->v.entries), *dots = numbers(o->v.dtype, o->v.entries);
    for (int64_t n = 0; n < o->v.entries; n++) set(dots, o->v.dtype, n, 0);
    for (int64_t i = 0; i < o->v.rows; i++) {
        int64_t t = o->v.token_of_row[i], n = o->v.entry_of_row[i];
        double w = combine && !(flags & MOE_ROWS_UNWEIGHTED)
                       ? get(o->v.weight_of_entry, o->v.dtype, n)
                       : 1;
        for (int64_t j = 0; j < o->args.width; j++)
            put(&expected, i, j, multiply(o->v.dtype, w, at(&o->tokens, t, j)));
        set(dots, o->v.dtype, n, dot(&o->tokens, t, &o->rows, i));
    }
    o->args.flags = flags;
    o->args.entry_weight_grad = combine ? grad : NULL;
    OK(combine ? moe_combine_backward(o->plan, &o->args) : moe_dispatch_forward(o->plan, &o->args));
    same_matrix(&expected, &o->rows_out, combine ? "combine_backward" : "dispatch_forward");
    if (combine)
        same_bytes(grad, dots, (size_t)o->v.entries * size_of(o->v.dtype), "entry_weight_grad");
    o->args.entry_weight_grad = NULL;
    free(expected.data), free(grad), free(dots);
}

START_TEST(test_rows_case)
{
    static const int64_t widths[] = {1, 15, 16, 37, 64, 130};
    const plan_case *c = &cases[_i];
    routing *r = make_routing(c, (uint64_t)_i);
    moe_plan *plan = make_plan(c, r);
    for (size_t w = 0; w < sizeof widths / sizeof widths[0]; w++) {
        if (c->tokens > 1000 && w % 2) continue;
        for (int64_t gap = 0; gap <= 3; gap += 3) {
            operands *o = make_operands(plan, widths[w], gap);
            for (uint64_t flags = 0; flags < 4; flags++) check_to_tokens(o, 1, flags);
            check_to_tokens(o, 0, 0), check_to_tokens(o, 0, MOE_ROWS_ADD);
            check_to_rows(o, 0, 0);
            check_to_rows(o, 1, 0), check_to_rows(o, 1, MOE_ROWS_UNWEIGHTED);
            free_operands(o);
        }
    }
    moe_plan_destroy(plan);
    free_routing(r);
}
END_TEST

static double inner(const matrix *a, const matrix *b)
{
    double sum = 0;
    for (int64_t i = 0; i < a->rows; i++)
        for (int64_t j = 0; j < a->width; j++) sum += at(a, i, j) * at(b, i, j);
    return sum;
}

/* <dispatch(x), r> = <x, dispatch_backward(r)>, the same for combine, and by the weights:
 * sum_n w_n dw_n = <combine(r), d>. */
START_TEST(test_rows_adjoint)
{
    static const plan_case c = {200, 9, 0, 4, 3, 20, 1, 1, F64, I32, MOE_ISA_AUTO, 2};
    routing *r = make_routing(&c, 4);
    moe_plan *plan = make_plan(&c, r);
    operands *o = make_operands(plan, 33, 2);
    double *grad = numbers(F64, o->v.entries), by_weights = 0;
    OK(moe_dispatch_forward(plan, &o->args));
    OK(moe_dispatch_backward(plan, &o->args));
    ck_assert_double_eq_tol(inner(&o->rows_out, &o->rows), inner(&o->tokens, &o->tokens_out),
                            1e-10);
    o->args.entry_weight_grad = grad;
    OK(moe_combine_forward(plan, &o->args));
    OK(moe_combine_backward(plan, &o->args));
    double expected = inner(&o->tokens_out, &o->tokens);
    ck_assert_double_eq_tol(inner(&o->rows, &o->rows_out), expected, 1e-10);
    for (int64_t n = 0; n < o->v.entries; n++)
        by_weights += get(o->v.weight_of_entry, F64, n) * grad[n];
    ck_assert_double_eq_tol(by_weights, expected, 1e-10);
    free(grad);
    free_operands(o);
    moe_plan_destroy(plan);
    free_routing(r);
}
END_TEST

START_TEST(test_rows_optional_arrays)
{
    small *s = make_small();
    OK(moe_plan_build(s->plan, &s->args));
    operands *o = make_operands(s->plan, 5, 0);
    matrix untouched = copy_of(&o->rows_out);
    float grad[6], with_rows[6];
    o->args.tokens_out = NULL, o->args.rows_out = NULL; /* only the gradient by the weights */
    o->args.entry_weight_grad = grad;
    OK(moe_combine_backward(s->plan, &o->args));
    same_matrix(&untouched, &o->rows_out, "rows_out");
    o->args.rows_out = o->rows_out.data, o->args.entry_weight_grad = with_rows;
    OK(moe_combine_backward(s->plan, &o->args));
    same_bytes(grad, with_rows, sizeof grad, "entry_weight_grad");
    o->args.rows_in = NULL, o->args.entry_weight_grad = NULL; /* only the rows */
    OK(moe_combine_backward(s->plan, &o->args));
    o->args.entry_weight_grad = grad; /* read by combine_backward alone */
    OK(moe_dispatch_forward(s->plan, &o->args));
    free(untouched.data);
    free_operands(o);
    free_small(s);
}
END_TEST

/* T = 0, or no rows: nothing is read, pointers may be NULL. */
START_TEST(test_rows_nothing_to_do)
{
    small *s = make_small();
    moe_rows_args args;
    OK(moe_rows_args_init(&args, sizeof args));
    args.width = 4;
    OK(moe_dispatch_forward(s->plan, &args));
    OK(moe_dispatch_backward(s->plan, &args));
    OK(moe_combine_forward(s->plan, &args));
    OK(moe_combine_backward(s->plan, &args));
    s->args.capacity = 0;
    OK(moe_plan_build(s->plan, &s->args));
    float tokens[12], zeros[12] = {0}, grad[6];
    memset(tokens, 0x7f, sizeof tokens), memset(grad, 0x7f, sizeof grad);
    args.tokens_out = tokens;
    OK(moe_combine_forward(s->plan, &args));
    same_bytes(tokens, zeros, sizeof tokens, "tokens without rows");
    args.tokens_in = tokens, args.tokens_out = NULL, args.entry_weight_grad = grad;
    OK(moe_combine_backward(s->plan, &args));
    same_bytes(grad, zeros, sizeof grad, "entry_weight_grad without rows");
    free_small(s);
}
END_TEST

typedef moe_status (*rows_call)(const moe_plan *plan, const moe_rows_args *args);

static void refused_by_all(const operands *o, const moe_rows_args *args, moe_status expected,
                           int line)
{
    static const rows_call calls[4] = {moe_dispatch_forward, moe_dispatch_backward,
                                       moe_combine_forward, moe_combine_backward};
    for (int i = 0; i < 4; i++) {
        moe_status status = calls[i](o->plan, args);
        ck_assert_msg(status == expected, "line %d, call %d gives %s", line, i,
                      moe_status_name(status));
    }
}

#define REFUSED(status, ...)                     \
    do {                                         \
        moe_rows_args a = o->args;               \
        __VA_ARGS__;                             \
        refused_by_all(o, &a, status, __LINE__); \
    } while (0)

START_TEST(test_rows_refuses)
{
    small *s = make_small();
    OK(moe_plan_build(s->plan, &s->args));
    operands *o = make_operands(s->plan, 4, 0);
    matrix tokens = copy_of(&o->tokens_out), rows = copy_of(&o->rows_out);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.width = 0);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.width = -4);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.dtype = F64);
    REFUSED(MOE_ERROR_NOT_SUPPORTED, a.dtype = MOE_DTYPE_BF16);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.flags = 4);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.reserved = 1);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.stream = s);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.tokens_in = NULL, a.rows_in = NULL);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.tokens_in_stride = a.rows_in_stride = 3);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.tokens_in_stride = a.rows_in_stride = -4);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.tokens_out_stride = a.rows_out_stride = 3);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, a.tokens_out = NULL, a.rows_out = NULL);
    REFUSED(MOE_ERROR_OVERFLOW, a.width = INT64_MAX / 2);
    REFUSED(MOE_ERROR_STRUCT_TOO_OLD, a.struct_size = 24);
    refused_by_all(o, NULL, MOE_ERROR_INVALID_ARGUMENT, __LINE__);
    moe_plan *plan = o->plan;
    o->plan = NULL;
    refused_by_all(o, &o->args, MOE_ERROR_INVALID_ARGUMENT, __LINE__);
    o->plan = plan;
    moe_rows_args a = o->args;
    a.rows_in = NULL, a.entry_weight_grad = s->weights;
    FAILS(moe_combine_backward(s->plan, &a), MOE_ERROR_INVALID_ARGUMENT);
    same_matrix(&tokens, &o->tokens_out, "tokens_out"),
        same_matrix(&rows, &o->rows_out, "rows_out");
    free(tokens.data), free(rows.data);
    free_operands(o);
    free_small(s);
}
END_TEST

/* A stride below the width is no matter where there is one row; the width still has to fit. */
START_TEST(test_rows_single_token_stride)
{
    small *s = make_small();
    s->args.tokens = 1, s->args.top_k = 1;
    OK(moe_plan_build(s->plan, &s->args));
    operands *o = make_operands(s->plan, 4, 0);
    o->args.tokens_in_stride = o->args.rows_out_stride = 1;
    OK(moe_dispatch_forward(s->plan, &o->args));
    same_bytes(o->tokens.data, o->rows_out.data, 16, "one row");
    o->args.width = INT64_MAX;
    FAILS(moe_dispatch_forward(s->plan, &o->args), MOE_ERROR_OVERFLOW);
    free_operands(o);
    free_small(s);
}
END_TEST

/* ---- what only the library's own calls reach ------------------------------------------------- */

static double sigmoid_of(int32_t dtype, double x)
{
    return dtype == F64 ? moe__sigmoid_f64(x) : (double)moe__sigmoid_f32((float)x);
}

/* combine with the logistic function, a mask over tokens that do have rows, and the dense copy;
 * then the gradient through it. */
START_TEST(test_combine_output_case)
{
    const plan_case *c = &cases[_i];
    routing *r = make_routing(c, (uint64_t)_i);
    moe_plan *plan = make_plan(c, r);
    operands *o = make_operands(plan, 37, 3);
    const moe__backend *kernels = moe__kernels(plan->context, c->dtype);
    for (int sigmoid = 0; sigmoid < 2; sigmoid++) {
        matrix expected = copy_of(&o->tokens_out), dense = make_matrix(c->dtype, c->tokens, 37, 0);
        matrix copied = copy_of(&dense), through = copy_of(&o->tokens_out);
        for (int64_t t = 0; t < c->tokens; t++)
            for (int64_t j = 0; j < 37; j++) {
                double sum = sum_of(&o->v, &o->rows, t, j, 1);
                double y = !r->mask[t] ? 0 : sigmoid ? sigmoid_of(c->dtype, sum) : sum;
                double slope = multiply(c->dtype, y, add(c->dtype, 1, -y));
                put(&expected, t, j, y), put(&dense, t, j, y);
                put(&through, t, j, multiply(c->dtype, at(&o->tokens, t, j), slope));
            }
        moe__rows_job job = {.workers = {.context = plan->context, .function = "test"},
                             .plan = &plan->a,
                             .width = 37,
                             .tokens_in = o->tokens.data,
                             .tokens_in_stride = o->tokens.stride,
                             .tokens_out = o->tokens_out.data,
                             .tokens_out_stride = o->tokens_out.stride,
                             .rows_in = o->rows.data,
                             .rows_in_stride = o->rows.stride,
                             .sigmoid = sigmoid,
                             .tokens_saved = copied.data,
                             .token_mask = r->mask};
        OK(kernels->combine_forward(&job));
        same_matrix(&expected, &o->tokens_out, "tokens_out");
        same_matrix(&dense, &copied, "tokens_saved");
        OK(kernels->output_backward(&job));
        same_matrix(&through, &o->tokens_out, "output_backward");
        free(expected.data), free(dense.data), free(copied.data), free(through.data);
    }
    free_operands(o);
    moe_plan_destroy(plan);
    free_routing(r);
}
END_TEST

/* A replay keeps rows, slots and order, and makes the weights of fresh ones. */
START_TEST(test_plan_rows_keeps_rows_case)
{
    const plan_case *c = &cases[_i];
    routing *r = make_routing(c, (uint64_t)_i);
    moe_plan *plan = make_plan(c, r), *again = make_plan(c, r);
    moe__plan_rows_job job = {.workers = {.context = again->context, .function = "test"},
                              .plan = &again->a,
                              .renormalize_after_drop = c->renormalize,
                              .keep_rows = 1};
    size_t bytes = (size_t)r->entries * size_of(c->dtype);
    if (bytes) memcpy(again->a.weight_of_entry, r->weights, bytes);
    OK(moe__kernels(again->context, c->dtype)->plan_rows(&job));
    same_plan(plan, again);
    moe_plan_destroy(plan), moe_plan_destroy(again);
    free_routing(r);
}
END_TEST

/* Every instruction set and number of threads gives the same bytes for the longest sums. */
START_TEST(test_rows_same_bytes_everywhere)
{
    plan_case c = {500, 20, 5, 5, 0, -1, 1, 1, F32, I32, MOE_ISA_PLAIN, 1};
    routing *r = make_routing(&c, 6);
    matrix out[2];
    void *grad[2];
    for (int isa = MOE_ISA_PLAIN; isa <= MOE_ISA_AVX512; isa++)
        for (int threads = 1; threads <= 4; threads += 3) {
            if (!moe__cpu_backend(isa, F32)) continue;
            int first = isa == MOE_ISA_PLAIN && threads == 1;
            c.isa = isa, c.threads = threads;
            moe_plan *plan = make_plan(&c, r);
            seed = 1;
            operands *o = make_operands(plan, 1003, 0);
            o->args.entry_weight_grad = grad[!first] = numbers(F32, o->v.entries);
            OK(moe_combine_forward(plan, &o->args));
            OK(moe_combine_backward(plan, &o->args));
            out[!first] = copy_of(&o->tokens_out);
            if (!first) {
                same_matrix(&out[0], &out[1], "combine_forward");
                same_bytes(grad[0], grad[1], (size_t)o->v.entries * 4, "entry_weight_grad");
                free(out[1].data), free(grad[1]);
            }
            free_operands(o);
            moe_plan_destroy(plan);
        }
    free(out[0].data), free(grad[0]);
    free_routing(r);
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
    tcase_add_test(tests, test_plan_survives_no_memory);
    tcase_add_test(tests, test_plan_build_callback_fails);
    tcase_add_loop_test(tests, test_plan_copy_save_load_case, 0, CASES);
    tcase_add_test(tests, test_plan_save_arguments);
    tcase_add_test(tests, test_plan_load_hostile);
    tcase_add_test(tests, test_plan_check_finds);
    tcase_add_test(tests, test_plan_of_pass);
    tcase_add_loop_test(tests, test_rows_case, 0, CASES);
    tcase_add_test(tests, test_rows_adjoint);
    tcase_add_test(tests, test_rows_optional_arrays);
    tcase_add_test(tests, test_rows_nothing_to_do);
    tcase_add_test(tests, test_rows_refuses);
    tcase_add_test(tests, test_rows_single_token_stride);
    tcase_add_loop_test(tests, test_combine_output_case, 0, CASES);
    tcase_add_loop_test(tests, test_plan_rows_keeps_rows_case, 0, CASES);
    tcase_add_test(tests, test_rows_same_bytes_everywhere);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_NORMAL);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
