/* check_drop.c - who gets a row: drop policies, second choices, renormalisation, given slots.
 *
 * The oracle ranks each entry among all others of its group and expert by the words of moe/gate.h,
 * in O(N^2); an entry is kept if its rank is below the capacity. What a gate alone can ask for is
 * asked of the backend's plan_rows directly. */
#include "philox.h"
#include "support/plan_case.h"
#include "support/suite.h"

static const char *const POLICY_NAMES[] = {"token order", "choice", "batch priority", "score",
                                           "random"};
enum { POLICIES = 5 };

/* ---- a case ---------------------------------------------------------------------------------- */

/* A routing and everything that plan_rows is told about it. */
typedef struct drop_case {
    routing *r;
    plan_case sizes;
    int64_t *capacity; /* [G], -1: none */
    double *priority;  /* [T] */
    double *given;     /* [N] weights */
    int32_t policy, second;
    double threshold, minimum;
    uint32_t stream;
    int64_t *token, *group; /* [N] of each entry */
    double *random;         /* [N] */
    int64_t *asks, *slot;   /* [N] what must come of it */
} drop_case;

static double uniform(const drop_case *d, int64_t token, uint32_t block, int64_t number)
{
    uint32_t words[4];
    moe__counter(words, d->stream, (uint32_t)d->r->args.step,
                 (uint32_t)(d->r->args.token_first + token), block + (uint32_t)(number / 4));
    moe__philox(d->r->args.seed, words, words);
    return moe__uniform_f32(words[number % 4]);
}

/* Few different values, so that there are ties; sometimes what is no usual number. */
static double drawn_value(void)
{
    static const double odd[] = {NAN, INFINITY, -INFINITY, -0.0, 0.0, -NAN};
    return draw(6) == 0 ? odd[draw(6)] : (double)draw(8) / 8 - 0.25;
}

static void write_weights(drop_case *d, int32_t dtype)
{
    d->r->args.dtype = dtype;
    for (int64_t n = 0; n < d->r->entries; n++) set(d->r->weights, dtype, n, d->given[n]);
}

static drop_case *make_case(uint64_t number, int32_t policy, int with_odd_values)
{
    drop_case *d = calloc(1, sizeof *d);
    seed = number * 7919 + 13;
    plan_case *c = &d->sizes;
    *c = (plan_case){.tokens = (int64_t)draw(40), .experts = 1 + (int64_t)draw(9)};
    c->least_k = (int64_t)draw(3), c->most_k = c->least_k + (int64_t)draw(2) * (int64_t)draw(6);
    c->groups = (int64_t)draw(4), c->capacity = (int64_t)draw(7) - 1;
    c->mask = (int32_t)draw(2), c->renormalize = (int32_t)draw(2);
    c->dtype = draw(2) ? F32 : WIDE, c->id_dtype = draw(2) ? I32 : I64;
    c->isa = MOE_ISA_AUTO, c->threads = 1;
    routing *r = d->r = make_routing(c, number);
    d->policy = r->args.drop_policy = policy;
    d->priority = words(c->tokens), d->given = words(r->entries), d->capacity = words(c->groups);
    d->token = words(r->entries), d->group = words(r->entries), d->random = words(r->entries);
    d->asks = words(r->entries), d->slot = words(r->entries);
    for (int64_t g = 0; g <= c->groups; g++) d->capacity[g] = c->capacity;
    for (int64_t n = 0; n < r->entries; n++)
        d->given[n] = with_odd_values ? drawn_value() : (double)draw(9) / 8;
    for (int64_t t = 0; t < c->tokens; t++) {
        d->priority[t] = drawn_value();
        for (int64_t n = r->token_begin[t]; n < r->token_begin[t + 1]; n++)
            d->token[n] = t, d->group[n] = group_of(r, t);
    }
    r->args.seed = number << 31 | draw(1000), r->args.step = (int64_t)draw(1000);
    r->args.token_first = draw(2) ? (int64_t)draw(1000) : ((int64_t)1 << 32) - c->tokens - 1;
    d->stream = moe__stream(0, 0, MOE__PURPOSE_DROP);
    write_weights(d, c->dtype);
    return d;
}

static void free_case(drop_case *d)
{
    void *all[] = {d->capacity, d->priority, d->given, d->token,
                   d->group,    d->random,   d->asks,  d->slot};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    free_routing(d->r);
    free(d);
}

/* [T] in the dtype of the weights. */
static void *priority_as(const drop_case *d, int32_t dtype)
{
    void *p = words(d->sizes.tokens);
    for (int64_t t = 0; t < d->sizes.tokens; t++) set(p, dtype, t, d->priority[t]);
    return p;
}

/* ---- the oracle ------------------------------------------------------------------------------ */

static int asks(const drop_case *d, int64_t n)
{
    const routing *r = d->r;
    int64_t t = d->token[n], choice = n - r->token_begin[t];
    if (id_of(r, n) < 0 || (r->args.token_mask && !r->mask[t])) return 0;
    if (choice == 0 || d->second == MOE_SECOND_CHOICE_ALL) return 1;
    if (d->second == MOE_SECOND_CHOICE_NONE) return 0;
    if (d->second == MOE_SECOND_CHOICE_THRESHOLD) return d->given[n] > d->threshold;
    return uniform(d, t, 0x80000000u, choice) < d->given[n] / fmax(d->threshold, 1e-9);
}

/* 1: a is the larger, -1: b is, 0: neither. NaN is below all. */
static int larger(double a, double b)
{
    if (isnan(a) || isnan(b)) return isnan(b) - isnan(a);
    return (a > b) - (a < b);
}

/* Whether entry a comes before entry b of the same expert. */
static int before(const drop_case *d, int64_t a, int64_t b)
{
    int64_t s = d->token[a], t = d->token[b];
    int64_t i = a - d->r->token_begin[s], j = b - d->r->token_begin[t];
    switch (d->policy) {
    case MOE_DROP_BATCH_PRIORITY:
        if (i == j && larger(d->priority[s], d->priority[t]) != 0)
            return larger(d->priority[s], d->priority[t]) > 0;
        return i != j ? i < j : s < t;
    case MOE_DROP_CHOICE: return i != j ? i < j : s < t;
    case MOE_DROP_SCORE:
        if (larger(d->given[a], d->given[b]) != 0) return larger(d->given[a], d->given[b]) > 0;
        return a < b;
    case MOE_DROP_RANDOM: return d->random[a] != d->random[b] ? d->random[a] > d->random[b] : a < b;
    default: return a < b;
    }
}

/* Slots; an entry's is its rank, or for the best of an expert its place among the kept ones. */
static void expect_drop(drop_case *d)
{
    routing *r = d->r;
    int best = d->policy == MOE_DROP_SCORE || d->policy == MOE_DROP_RANDOM;
    for (int64_t n = 0; n < r->entries; n++) {
        d->asks[n] = asks(d, n);
        d->random[n] = d->asks[n] ? uniform(d, d->token[n], 0, id_of(r, n)) : 0;
    }
    for (int64_t n = 0; n < r->entries; n++) {
        int64_t room = d->capacity[d->group[n]], rank = 0;
        for (int64_t m = 0; m < r->entries && d->asks[n]; m++)
            if (d->asks[m] && id_of(r, m) == id_of(r, n) && d->group[m] == d->group[n])
                rank += room < 0 ? m < n : m != n && before(d, m, n);
        d->slot[n] = d->asks[n] && (room < 0 || rank < room) ? rank : -1;
    }
    memcpy(r->slot, d->slot, (size_t)r->entries * sizeof *r->slot);
    for (int64_t n = 0; n < r->entries; n++) {
        int64_t place = 0;
        for (int64_t m = 0; m < n; m++)
            place += d->slot[m] >= 0 && id_of(r, m) == id_of(r, n) && d->group[m] == d->group[n];
        if (best && d->slot[n] >= 0) r->slot[n] = place;
    }
}

/* r->weight from the slots. */
static void expect_weights(drop_case *d)
{
    routing *r = d->r;
    int32_t dtype = r->args.dtype;
    for (int64_t t = 0; t < d->sizes.tokens; t++) {
        double sum = 0, minimum = dtype == F64 ? d->minimum : (double)(float)d->minimum;
        for (int64_t n = r->token_begin[t]; n < r->token_begin[t + 1]; n++)
            if (r->slot[n] >= 0) sum = add(dtype, sum, d->given[n]);
        if (minimum > 0 && sum < minimum) sum = minimum;
        for (int64_t n = r->token_begin[t]; n < r->token_begin[t + 1]; n++) {
            double w = d->given[n];
            if (r->args.renormalize_after_drop) w = sum == 0 ? 0 : divide(dtype, w, sum);
            set(r->weight, dtype, n, r->slot[n] < 0 ? 0 : w);
        }
    }
}

static void same_drop(const drop_case *d, const moe_plan *plan, int number)
{
    const routing *r = d->r;
    moe_plan_view v = view_of(plan);
    OK(moe_plan_check(plan));
    for (int64_t n = 0; n < r->entries; n++) {
        double w = get(v.weight_of_entry, r->args.dtype, n);
        double expected = get(r->weight, r->args.dtype, n);
        ck_assert_msg(v.slot_of_entry[n] == r->slot[n],
                      "%s, case %d: entry %d of token %d has slot %d instead of %d",
                      POLICY_NAMES[d->policy], number, (int)n, (int)d->token[n],
                      (int)v.slot_of_entry[n], (int)r->slot[n]);
        ck_assert_msg(isnan(expected) ? isnan(w)
                                      : w == expected && !signbit(w) == !signbit(expected),
                      "%s, case %d: weight %d is %g instead of %g", POLICY_NAMES[d->policy], number,
                      (int)n, w, expected);
    }
}

/* Each (group, expert) keeps as many of those that ask as there is room for. */
static void balanced(const drop_case *d, const moe_plan *plan)
{
    moe_plan_view v = view_of(plan);
    for (int64_t g = 0; g < v.groups; g++)
        for (int64_t e = 0; e < v.num_experts; e++) {
            int64_t count = 0, kept = 0;
            for (int64_t n = 0; n < v.entries; n++) {
                if (d->group[n] != g || v.expert_of_entry[n] != e) continue;
                count += d->asks[n], kept += v.row_of_entry[n] >= 0;
            }
            ck_assert_int_eq(kept, d->capacity[g] >= 0 && d->capacity[g] < count ? d->capacity[g]
                                                                                 : count);
        }
}

/* ---- moe_plan_build -------------------------------------------------------------------------- */

enum { BUILDS = 150 };

/* Both dtypes in turn; slots are the same since the weights are. */
START_TEST(test_drop_build_policy)
{
    moe_context *context = make_context(1, MOE_ISA_AUTO);
    int64_t dropped = 0;
    moe_plan *plan;
    OK(moe_plan_create(&plan, context));
    for (int number = 0; number < BUILDS; number++) {
        drop_case *d = make_case((uint64_t)number, _i, 1);
        for (int32_t dtype = F32; dtype <= WIDE; dtype += F64 - F32) {
            void *priority = priority_as(d, dtype);
            write_weights(d, dtype);
            d->r->args.token_priority = _i == MOE_DROP_BATCH_PRIORITY ? priority : NULL;
            expect_drop(d);
            expect_weights(d);
            OK(moe_plan_build(plan, &d->r->args));
            same_drop(d, plan, number);
            balanced(d, plan);
            free(priority);
        }
        for (int64_t n = 0; n < d->r->entries; n++) dropped += d->asks[n] && d->r->slot[n] < 0;
        free_case(d);
    }
    ck_assert_int_gt(dropped, 1000);
    moe_plan_destroy(plan);
    moe_context_destroy(context);
}
END_TEST

/* Four tokens of two choices, one place at each of three experts: who gets it, by hand. */
START_TEST(test_drop_build_by_hand)
{
    static const int32_t ids[8] = {0, 1, 1, 0, 1, 2, 2, 0};
    static const float weights[8] = {0.5F, 0.25F, 0.5F, 0.75F, 0.5F, 0.125F, 0.0F, 1.0F};
    static const float priority[4] = {0, NAN, 1, 1};
    static const int8_t kept[4][8] = {{1, 1, 0, 0, 0, 1, 0, 0},
                                      {1, 0, 1, 0, 0, 0, 1, 0},
                                      {1, 0, 0, 0, 1, 0, 1, 0},
                                      {0, 0, 1, 0, 0, 1, 0, 1}};
    small *s = make_small();
    s->args.tokens = 4, s->args.expert_ids = ids, s->args.weights = weights, s->args.capacity = 1;
    for (int32_t policy = 0; policy < MOE_DROP_RANDOM; policy++) {
        s->args.drop_policy = policy;
        s->args.token_priority = policy == MOE_DROP_BATCH_PRIORITY ? priority : NULL;
        OK(moe_plan_build(s->plan, &s->args));
        moe_plan_view v = view_of(s->plan);
        for (int n = 0; n < 8; n++)
            ck_assert_msg((v.row_of_entry[n] >= 0) == kept[policy][n], "%s: entry %d",
                          POLICY_NAMES[policy], n);
    }
    free_small(s);
}
END_TEST

/* More tokens than one thread takes. */
START_TEST(test_drop_build_same_bytes_for_threads)
{
    static const plan_case one = {5000, 37, 0, 5, 3, 90, 1, 1, F32, I32, MOE_ISA_PLAIN, 1};
    plan_case four = one;
    routing *r = make_routing(&one, 21);
    void *priority = numbers(F32, one.tokens);
    four.isa = MOE_ISA_AUTO, four.threads = 4;
    r->args.drop_policy = _i;
    r->args.token_priority = _i == MOE_DROP_BATCH_PRIORITY ? priority : NULL;
    moe_plan *a = make_plan(&one, r), *b = make_plan(&four, r);
    same_plan(a, b);
    OK(moe_plan_check(a));
    moe_plan_destroy(a), moe_plan_destroy(b);
    free(priority);
    free_routing(r);
}
END_TEST

/* Work is in the number of entries and experts, not in their product, nor in that of the tokens and
 * the longest of them: with either this would not end. */
START_TEST(test_drop_build_many_experts)
{
    static const plan_case c = {2048, 131072, 2, 2, 64, 1, 0, 0, F32, I32, MOE_ISA_AUTO, 1};
    routing *r = make_routing(&c, 22);
    void *priority = numbers(F32, c.tokens);
    for (int64_t n = 0; n < r->entries; n += 3) r->ids32[n] = 131071;
    r->args.drop_policy = _i;
    r->args.token_priority = _i == MOE_DROP_BATCH_PRIORITY ? priority : NULL;
    moe_plan *plan = make_plan(&c, r);
    OK(moe_plan_check(plan));
    moe_plan_view v = view_of(plan);
    int64_t groups_with_tokens = 0;
    for (int64_t g = 0; g < 64; g++) groups_with_tokens += v.group_begin[g] < v.group_begin[g + 1];
    ck_assert_int_ge(groups_with_tokens, 5);
    ck_assert_int_le(v.expert_begin[131072] - v.expert_begin[131071], groups_with_tokens);
    ck_assert_int_gt(v.rows, 2000);
    moe_plan_destroy(plan);
    free(priority);
    free_routing(r);
}
END_TEST

START_TEST(test_drop_build_one_long_token)
{
    enum { T = 200001, N = 2 * T };
    small *s = make_small();
    int64_t *begin = words(T);
    int32_t *ids = words(N);
    float *values = words(N);
    for (int64_t t = 0; t <= T; t++) begin[t] = t == 0 ? 0 : T + t;
    for (int64_t n = 0; n < N; n++) ids[n] = (int32_t)draw(3), values[n] = (float)draw(1000);
    s->args.tokens = T, s->args.token_begin = begin, s->args.expert_ids = ids;
    s->args.weights = values, s->args.capacity = 100000, s->args.drop_policy = _i;
    s->args.token_priority = _i == MOE_DROP_BATCH_PRIORITY ? values : NULL;
    OK(moe_plan_build(s->plan, &s->args));
    OK(moe_plan_check(s->plan));
    ck_assert_int_eq(view_of(s->plan).rows, 300000);
    free(begin), free(ids), free(values);
    free_small(s);
}
END_TEST

/* ---- random ---------------------------------------------------------------------------------- */

/* A group draws the same numbers wherever the batch is cut, given the number of its first token. */
START_TEST(test_drop_random_any_split)
{
    static const plan_case c = {400, 5, 2, 2, 0, 40, 0, 0, F32, I32, MOE_ISA_AUTO, 1};
    static const int64_t group_begin[4] = {0, 150, 150, 400};
    routing *r = make_routing(&c, 23);
    r->args.drop_policy = MOE_DROP_RANDOM, r->args.seed = 77, r->args.step = 5;
    r->args.groups = 3, r->args.group_begin = group_begin, r->args.token_first = 1000;
    moe_plan *whole = make_plan(&c, r), *part = make_plan(&c, r);
    moe_plan_view v = view_of(whole);
    r->args.groups = 0, r->args.group_begin = NULL;
    for (int g = 0; g < 3; g += 2) {
        int64_t first = group_begin[g], tokens = group_begin[g + 1] - first;
        r->args.tokens = tokens, r->args.token_first = 1000 + first;
        r->args.expert_ids = r->ids32 + 2 * first;
        r->args.weights = (float *)r->weights + 2 * first;
        OK(moe_plan_build(part, &r->args));
        same_bytes(view_of(part).slot_of_entry, v.slot_of_entry + 2 * first,
                   (size_t)(2 * tokens) * 8, "slots of a part");
    }
    for (int what = 0; what < 3; what++) { /* but another seed, step or place draws others */
        moe_plan_args a = r->args;
        a.seed += what == 0, a.step += what == 1, a.token_first += what == 2;
        OK(moe_plan_build(part, &a));
        ck_assert(memcmp(view_of(part).slot_of_entry, v.slot_of_entry + 300, 500 * 8) != 0);
    }
    moe_plan_destroy(whole), moe_plan_destroy(part);
    free_routing(r);
}
END_TEST

/* Everyone is kept as often: the sum of squares has 63 degrees of freedom, deviation 11.2. */
START_TEST(test_drop_random_uniform)
{
    enum { T = 64, C = 16, STEPS = 4000 };
    int32_t ids[T];
    int64_t kept[T] = {0};
    small *s = make_small();
    for (int t = 0; t < T; t++) ids[t] = 2;
    s->args.tokens = T, s->args.top_k = 1, s->args.expert_ids = ids, s->args.weights = NULL;
    s->args.capacity = C, s->args.drop_policy = MOE_DROP_RANDOM, s->args.seed = 3;
    for (s->args.step = 0; s->args.step < STEPS; s->args.step++) {
        OK(moe_plan_build(s->plan, &s->args));
        for (int t = 0; t < T; t++) kept[t] += view_of(s->plan).row_of_entry[t] >= 0;
    }
    double mean = (double)STEPS * C / T, squares = 0;
    for (int t = 0; t < T; t++) squares += ((double)kept[t] - mean) * ((double)kept[t] - mean);
    squares *= (T - 1.0) / T / (mean * (1 - (double)C / T));
    ck_assert_msg(squares > 20 && squares < 120, "sum of squares %g", squares);
    free_small(s);
}
END_TEST

/* ---- plan_rows, as a gate asks --------------------------------------------------------------- */

static moe_status run_rows(const drop_case *d, moe_plan *plan, const void *priority)
{
    const moe_plan_args *a = &d->r->args;
    moe__plan_rows_job job = {.workers = {.context = plan->context, .function = "test"},
                              .plan = &plan->a,
                              .token_mask = a->token_mask,
                              .group_capacity = d->capacity,
                              .drop_policy = d->policy,
                              .renormalize_after_drop = a->renormalize_after_drop,
                              .renormalize_minimum = d->minimum,
                              .second_choice = d->second,
                              .second_threshold = d->threshold,
                              .token_priority = priority,
                              .seed = a->seed,
                              .drop_stream = d->stream,
                              .step = a->step,
                              .token_first = a->token_first};
    size_t bytes = (size_t)d->r->entries * size_of(a->dtype);
    if (bytes) memcpy(plan->a.weight_of_entry, d->r->weights, bytes);
    return WAITED(moe__kernels(plan->context, a->dtype)->plan_rows(&job));
}

/* Every policy with every rule for second choices; each group has a capacity of its own. */
START_TEST(test_drop_second_choice)
{
    int64_t refused = 0, asked = 0, dropped = 0;
    for (int number = 0; number < BUILDS; number++) {
        drop_case *d = make_case((uint64_t)number, number % POLICIES, number % 2);
        d->r->args.drop_policy = MOE_DROP_TOKEN_ORDER;
        moe_plan *plan = make_plan(&d->sizes, d->r);
        void *priority = priority_as(d, d->sizes.dtype);
        for (int64_t g = 0; g <= d->sizes.groups; g++) d->capacity[g] = (int64_t)draw(7) - 1;
        d->second = _i;
        d->threshold = (double)draw(4) / 4 - 0.25, d->minimum = (double)draw(3) / 3;
        d->stream = moe__stream(3, 2, MOE__PURPOSE_DROP);
        expect_drop(d);
        expect_weights(d);
        OK(run_rows(d, plan, d->policy == MOE_DROP_BATCH_PRIORITY ? priority : NULL));
        same_drop(d, plan, number);
        balanced(d, plan);
        for (int64_t n = 0; n < d->r->entries; n++) {
            refused += id_of(d->r, n) >= 0 && !d->asks[n] && n != d->r->token_begin[d->token[n]];
            asked += d->asks[n], dropped += d->asks[n] && d->r->slot[n] < 0;
        }
        free(priority);
        moe_plan_destroy(plan);
        free_case(d);
    }
    ck_assert_int_gt(asked, 1000);
    ck_assert_int_gt(dropped, 100);
    ck_assert_int_gt(refused, 300);
}
END_TEST

/* The second of 20000 tokens, weight 1/8: with a threshold of 1/2 a quarter stays; with 0 all. */
START_TEST(test_drop_second_choice_random_rate)
{
    static const plan_case c = {20000, 4, 2, 2, 0, -1, 0, 0, WIDE, I32, MOE_ISA_AUTO, 2};
    routing *r = make_routing(&c, 24);
    int64_t *capacity = words(0);
    drop_case d = {.r = r, .sizes = c, .capacity = capacity, .second = MOE_SECOND_CHOICE_RANDOM};
    for (int64_t n = 0; n < r->entries; n++)
        r->ids32[n] = (int32_t)(n % 4), set(r->weights, WIDE, n, 0.125);
    moe_plan *plan = make_plan(&c, r);
    capacity[0] = -1;
    for (int free_pass = 0; free_pass < 2; free_pass++) {
        d.threshold = free_pass ? 0 : 0.5;
        OK(run_rows(&d, plan, NULL));
        OK(moe_plan_check(plan));
        int64_t firsts = 0, seconds = 0;
        for (int64_t n = 0; n < r->entries; n++)
            *(n % 2 ? &seconds : &firsts) += view_of(plan).row_of_entry[n] >= 0;
        ck_assert_int_eq(firsts, c.tokens);
        if (free_pass)
            ck_assert_int_eq(seconds, c.tokens);
        else /* deviation 61 */
            ck_assert_msg(seconds > 4750 && seconds < 5250, "%d seconds", (int)seconds);
    }
    moe_plan_destroy(plan);
    free(capacity);
    free_routing(r);
}
END_TEST

/* Divided by what is kept, or by the minimum where that is more. */
START_TEST(test_drop_renormalize_minimum)
{
    static const double expected[3][6] = {{0.5, 0.5, 0.75, 0.25, 0.25, 0.75},
                                          {0.5, 0.5, 0.75, 0.25, 0.25, 0.75},
                                          {0.125, 0.125, 0.1875, 0.0625, 0.125, 0.375}};
    static const double minimum[3] = {0, 0.5, 4};
    small *s = make_small();
    for (int i = 0; i < 3; i++) {
        OK(moe_plan_build(s->plan, &s->args));
        moe__plan_rows_job job = {.workers = {.context = s->plan->context, .function = "test"},
                                  .plan = &s->plan->a,
                                  .renormalize_after_drop = 1,
                                  .renormalize_minimum = minimum[i]};
        OK(WAITED(moe__kernels(s->plan->context, F32)->plan_rows(&job)));
        for (int n = 0; n < 6; n++)
            ck_assert_double_eq(get(s->plan->a.weight_of_entry, F32, n), expected[i][n]);
    }
    free_small(s);
}
END_TEST

/* Experts that chose: the slots stay as they are, whatever else is said, and rows follow. */
START_TEST(test_drop_keep_slots)
{
    static const int64_t slots[6] = {1, 0, 0, 1, 2, 0}, rows[6] = {0, 2, 1, 3, 4, 5};
    small *s = make_small();
    int64_t *capacity = words(0);
    capacity[0] = 1;
    OK(moe_plan_build(s->plan, &s->args));
    moe__plan_rows_job job = {.workers = {.context = s->plan->context, .function = "test"},
                              .plan = &s->plan->a,
                              .group_capacity = capacity,
                              .second_choice = MOE_SECOND_CHOICE_NONE,
                              .keep_slots = 1};
    memcpy(s->plan->a.slot_of_entry, slots, sizeof slots);
    memset(s->plan->a.row_of_entry, 0x5a, sizeof rows);
    s->plan->a.rows = 0;
    OK(WAITED(moe__kernels(s->plan->context, F32)->plan_rows(&job)));
    OK(moe_plan_check(s->plan));
    ck_assert_int_eq(view_of(s->plan).rows, 6);
    same_bytes(s->plan->a.slot_of_entry, slots, sizeof slots, "slots");
    same_bytes(s->plan->a.row_of_entry, rows, sizeof rows, "rows");
    same_bytes(s->plan->a.weight_of_entry, s->weights, sizeof s->weights, "weights");
    s->plan->a.expert_of_entry[3] = -1, s->plan->a.slot_of_entry[3] = -1;
    s->plan->a.slot_of_entry[4] = 1;
    OK(WAITED(moe__kernels(s->plan->context, F32)->plan_rows(&job)));
    OK(moe_plan_check(s->plan));
    ck_assert(view_of(s->plan).rows == 5 && get(s->plan->a.weight_of_entry, F32, 3) == 0);
    free(capacity);
    free_small(s);
}
END_TEST

/* ---- what build refuses ---------------------------------------------------------------------- */

static void refuses(small *s, const moe_plan_args *a, const char *first, const char *second)
{
    FAILS(moe_plan_build(s->plan, a), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_msg(strstr(moe_last_error(), first) && strstr(moe_last_error(), second),
                  "\"%s\" lacks \"%s\" or \"%s\"", moe_last_error(), first, second);
    ck_assert(view_of(s->plan).tokens == 3 && view_of(s->plan).rows == 6);
    OK(moe_plan_check(s->plan));
}

START_TEST(test_drop_build_refuses)
{
    const int64_t limit = (int64_t)1 << 32;
    static const float priority[3] = {1, 2, 3};
    small *s = make_small();
    moe_plan_args a = s->args;
    OK(moe_plan_build(s->plan, &a));
    for (int32_t policy = 0; policy < POLICIES; policy++) {
        a.drop_policy = policy, a.token_priority = priority;
        if (policy != MOE_DROP_BATCH_PRIORITY) refuses(s, &a, "token_priority", "drop_policy");
    }
    a = s->args, a.drop_policy = MOE_DROP_BATCH_PRIORITY, a.capacity = 1;
    refuses(s, &a, "token_priority is NULL", "MOE_DROP_BATCH_PRIORITY");
    a.drop_policy = -1;
    refuses(s, &a, "drop_policy is -1", "");
    a.drop_policy = MOE_DROP_RANDOM, a.step = limit;
    refuses(s, &a, "step is 4294967296", "MOE_DROP_RANDOM");
    a.step = -1;
    refuses(s, &a, "step is -1", "2^32");
    a.step = limit - 1, a.token_first = limit - 2;
    refuses(s, &a, "token_first is 4294967294 with 3 tokens", "MOE_DROP_RANDOM");
    a.token_first = -1;
    refuses(s, &a, "token_first is -1", "2^32");
    a.token_first = limit - 3;
    OK(moe_plan_build(s->plan, &a));
    free_small(s);
}
END_TEST

/* What nothing reads is not checked: numbers that are not drawn, priorities without a capacity. */
START_TEST(test_drop_build_without_capacity)
{
    static const float priority[3] = {1, 2, 3};
    static const int64_t slots[6] = {0, 0, 1, 0, 1, 2};
    small *s = make_small();
    s->args.step = s->args.token_first = -5;
    for (int32_t policy = 0; policy < POLICIES; policy++)
        for (int given = 0; given <= (policy == MOE_DROP_BATCH_PRIORITY); given++) {
            s->args.drop_policy = policy, s->args.token_priority = given ? priority : NULL;
            OK(moe_plan_build(s->plan, &s->args));
            same_bytes(view_of(s->plan).slot_of_entry, slots, sizeof slots, "slots");
        }
    s->args.tokens = 0, s->args.capacity = 1, s->args.drop_policy = MOE_DROP_BATCH_PRIORITY;
    s->args.token_priority = NULL;
    OK(moe_plan_build(s->plan, &s->args));
    free_small(s);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("drop");
    TCase *tests = tcase_create("drop");
    tcase_set_timeout(tests, 60);
    tcase_add_loop_test(tests, test_drop_build_policy, 0, POLICIES);
    tcase_add_test(tests, test_drop_build_by_hand);
    tcase_add_loop_test(tests, test_drop_build_same_bytes_for_threads, 0, POLICIES);
    tcase_add_loop_test(tests, test_drop_build_many_experts, 0, POLICIES);
    tcase_add_loop_test(tests, test_drop_build_one_long_token, 0, POLICIES);
    tcase_add_test(tests, test_drop_random_any_split);
    tcase_add_test(tests, test_drop_random_uniform);
    tcase_add_loop_test(tests, test_drop_second_choice, 1, 4);
    tcase_add_test(tests, test_drop_second_choice_random_rate);
    tcase_add_test(tests, test_drop_renormalize_minimum);
    tcase_add_test(tests, test_drop_keep_slots);
    tcase_add_test(tests, test_drop_build_refuses);
    tcase_add_test(tests, test_drop_build_without_capacity);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
