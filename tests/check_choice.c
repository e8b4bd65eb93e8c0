/* check_choice.c - the choice among many candidates, and the sort of many entries, each against the
 * obvious way and on every instruction set and number of threads.
 *
 * Rows are longer and shorter than any vector and no multiple of one; they hold numbers, ties, NaN
 * and infinities. */
#include "support/plan_case.h"
#include "support/suite.h"

static moe_context *context_with(int32_t threads, int32_t isa)
{
    moe_context *context = NULL;
    moe_context_config k;
    OK(moe_context_config_init(&k, sizeof k));
    k.threads = threads, k.isa = isa;
    moe_status status = moe_context_create(&context, &k);
    ck_assert(status == MOE_OK || status == MOE_ERROR_NOT_SUPPORTED);
    return context;
}

/* ---- the K first of a row -------------------------------------------------------------------- */

/* What a row is filled with. */
enum { NUMBERS, TIES, SPECIALS, EQUAL, ALL_NAN, FILLINGS };

static double logit(int filling)
{
    double special[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0, 1e30, -1e30};
    double number = (double)draw(2000001) / 1000000 - 1;
    switch (filling) {
    case TIES: return (double)draw(3) - 1;
    case SPECIALS: return draw(3) ? number : special[draw(7)];
    case EQUAL: return -0.5;
    case ALL_NAN: return NAN;
    default: return number;
    }
}

/* Whether logit i comes before logit j in the total order. */
static int before(const void *h, int32_t dtype, int64_t i, int64_t j)
{
    double a = get(h, dtype, i), b = get(h, dtype, j);
    if (isnan(a) || isnan(b)) return isnan(a) == isnan(b) ? i < j : isnan(b);
    return a != b ? a > b : i < j;
}

static void check_row(const void *h, int32_t dtype, int64_t E, const int32_t *ids, int64_t K)
{
    for (int64_t i = 0; i < E; i++) {
        int64_t rank = 0;
        for (int64_t j = 0; j < E && rank < K; j++) rank += before(h, dtype, j, i);
        if (rank < K)
            ck_assert_msg(ids[rank] == i, "E %d, K %d: choice %d is %d, not %d", (int)E, (int)K,
                          (int)rank, (int)ids[rank], (int)i);
    }
}

typedef struct choice_case {
    int64_t T, E, K;
    int32_t dtype, order, kind;
    void *logits;
} choice_case;

/* Routes the logits and returns one number of ids and weights; ids are checked as well. */
static uint64_t route(const choice_case *c, int32_t isa)
{
    moe_context *context = context_with(2, isa);
    moe_gate *gate;
    moe_pass *pass;
    const moe_plan *plan;
    moe_gate_config g;
    moe_forward_args f;
    moe_plan_view v;
    uint64_t hash = 0xcbf29ce484222325u;
    if (!context) return 0;
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = 1, g.num_experts = c->E, g.top_k = c->K, g.dtype = c->dtype, g.order = c->order;
    g.kind = c->kind;
    OK(moe_gate_create(&gate, context, &g));
    OK(moe_pass_create_for_gate(&pass, gate, NULL));
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = c->T, f.logits_in = c->logits;
    OK(moe_gate_forward(gate, pass, &f));
    OK(moe_pass_plan(pass, &plan));
    OK(moe_plan_view_init(&v, sizeof v));
    OK(moe_plan_get(plan, &v));
    for (int64_t t = 0; t < c->T; t++)
        check_row((const char *)c->logits + t * c->E * (int64_t)size_of(c->dtype), c->dtype, c->E,
                  v.expert_of_entry + t * c->K, c->K);
    for (int64_t n = 0; n < v.entries; n++) {
        double weight = get(v.weight_of_entry, c->dtype, n);
        uint64_t bits = 1; /* of any NaN */
        if (!isnan(weight)) memcpy(&bits, &weight, sizeof bits);
        hash = (hash ^ bits) * 0x100000001b3u;
    }
    moe_pass_destroy(pass), moe_gate_destroy(gate), moe_context_destroy(context);
    return hash;
}

START_TEST(test_choice_of_any_row)
{
    static const int64_t most[] = {3, 9, 40, 150, 700};
    seed = (uint64_t)_i + 1;
    for (int filling = 0; filling < FILLINGS; filling++) {
        choice_case c = {.T = 7, .E = 1 + (int64_t)draw((uint64_t)most[_i % 5])};
        c.K = 1 + (int64_t)draw((uint64_t)(_i % 2 ? c.E : moe__min(c.E, 12)));
        c.dtype = draw(2) ? F32 : WIDE;
        c.order = draw(2) ? MOE_ORDER_SELECT_THEN_SCORE : MOE_ORDER_SCORE_THEN_SELECT;
        c.kind = draw(3) || c.order != MOE_ORDER_SELECT_THEN_SCORE ? MOE_GATE_TOP_K
                                                                   : MOE_GATE_NOISY_TOP_K;
        c.logits = calloc((size_t)(c.T * c.E), sizeof(double));
        for (int64_t i = 0; i < c.T * c.E; i++) set(c.logits, c.dtype, i, logit(filling));
        uint64_t want = route(&c, MOE_ISA_PLAIN);
        for (int32_t isa = MOE_ISA_AVX2; isa <= MOE_ISA_AVX512; isa++) {
            uint64_t got = route(&c, isa);
            ck_assert_msg(got == want || got == 0, "E %d, K %d: weights differ with isa %d",
                          (int)c.E, (int)c.K, (int)isa);
        }
        free(c.logits);
    }
}
END_TEST

/* ---- rows of many entries -------------------------------------------------------------------- */

/* A routing of runs of tokens that are sorted side by side: 0 to 7 entries a token, or K of all. */
static void check_sort(int32_t threads, int64_t T, int64_t E, int64_t groups, int64_t capacity)
{
    moe_context *context = context_with(threads, MOE_ISA_AUTO);
    int64_t *begin = calloc((size_t)T + 1, sizeof *begin), *group = calloc(4, sizeof *group);
    int64_t *next = calloc((size_t)E, sizeof *next), *slots = calloc((size_t)E, sizeof *slots);
    moe_plan *plan;
    moe_plan_args a;
    moe_plan_view v;
    for (int64_t t = 0; t < T; t++) begin[t + 1] = begin[t] + (int64_t)draw(8);
    for (int64_t g = 0; g <= groups; g++) group[g] = T * g / groups;
    int32_t *ids = calloc((size_t)begin[T] + 1, sizeof *ids);
    for (int64_t n = 0; n < begin[T]; n++) ids[n] = (int32_t)draw((uint64_t)E + 1) - 1;
    OK(moe_plan_create(&plan, context));
    OK(moe_plan_args_init(&a, sizeof a));
    a.tokens = T, a.num_experts = E, a.token_begin = begin, a.expert_ids = ids;
    a.group_begin = group, a.groups = groups, a.capacity = capacity;
    OK(moe_plan_build(plan, &a));
    OK(moe_plan_check(plan));
    OK(moe_plan_view_init(&v, sizeof v));
    OK(moe_plan_get(plan, &v));
    for (int64_t e = 0; e < E; e++) next[e] = v.expert_begin[e];
    for (int64_t g = 0; g < groups; g++) {
        memset(slots, 0, (size_t)E * sizeof *slots);
        for (int64_t t = group[g]; t < group[g + 1]; t++)
            for (int64_t n = begin[t]; n < begin[t + 1]; n++) {
                int kept = ids[n] >= 0 && (capacity < 0 || slots[ids[n]] < capacity);
                int64_t row = kept ? next[ids[n]]++ : -1, slot = kept ? slots[ids[n]]++ : -1;
                ck_assert_int_eq(v.row_of_entry[n], row);
                ck_assert_int_eq(v.slot_of_entry[n], slot);
                if (!kept) continue;
                ck_assert_int_eq(v.token_of_row[row], t);
                ck_assert_int_eq(v.entry_of_row[row], n);
            }
    }
    for (int64_t e = 0; e < E; e++) ck_assert_int_eq(next[e], v.expert_begin[e + 1]);
    ck_assert_int_eq(v.expert_begin[E], v.rows);
    moe_plan_destroy(plan), moe_context_destroy(context);
    free(begin), free(group), free(next), free(slots), free(ids);
}

START_TEST(test_choice_sort_of_many_entries)
{
    static const int32_t threads[] = {1, 2, 3, 8};
    seed = 77;
    for (int64_t groups = 1; groups <= 3; groups += 2)
        for (int64_t capacity = -1; capacity <= 50; capacity += 51) {
            check_sort(threads[_i], 5003, 7, groups, capacity);
            check_sort(threads[_i], 4001, 1500, groups, capacity);
            check_sort(threads[_i], 3000, 40000, groups, capacity);
        }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("choice");
    TCase *tests = tcase_create("choice");
    tcase_set_timeout(tests, 120);
    tcase_add_loop_test(tests, test_choice_of_any_row, 0, 60);
    tcase_add_loop_test(tests, test_choice_sort_of_many_entries, 0, 4);
    suite_add_tcase(suite, tests);
    return run_suite(suite, 1);
}
