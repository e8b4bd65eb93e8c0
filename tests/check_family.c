/* check_family.c - what holds for every member of the family, on layers drawn at random: gradients
 * are central differences, results are the same bytes for any number of threads, any instruction
 * set, a replay, a recompute and a batch in two passes, and a reserved pass allocates nothing.
 *
 * MOE_LONG=1 draws ten times as many; an emulated device, which is slow, gets half. */
#include "support/family.h"
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

enum { KINDS = MOE_GATE_SINKHORN + 1 };

static uint64_t members(uint64_t few)
{
    const char *all = getenv("MOE_LONG");
#ifdef MOE_TEST_DEVICE
    few /= 2;
#endif
    return all && all[0] == '1' ? 10 * few : few;
}

static moe_context *context_of(int32_t threads, int32_t isa)
{
    moe_context *context = NULL;
    moe_context_config c;
    MUST(moe_context_config_init(&c, sizeof c));
    c.threads = threads, c.isa = isa;
    MUST(moe_context_create(&context, &c));
    return context;
}

START_TEST(test_family_gradients_are_differences)
{
    moe_context *context = context_of(1, MOE_ISA_AUTO);
    int64_t probes = 0, kinks = 0;
    for (uint64_t n = 0; n < members(40); n++) {
        family f;
        moe_gradient_check check;
        moe_gradient_report report;
        family_draw(&f, _i, n, MOE_DTYPE_F32); /* checked in f64 whatever it is */
        family_make(&f, context);
        MUST(moe_gradient_check_init(&check, sizeof check));
        MUST(moe_gradient_report_init(&report, sizeof report));
        check.tokens = f.T, check.groups = f.G, check.seed = n + 1, check.train = f.train;
        check.probes = 8;
        moe_status status = moe_check_gradients(f.layer, &check, &report);
        ck_assert_msg(status == MOE_OK, "%s: %s", f.text, moe_last_error());
        probes += report.probes, kinks += report.kinks;
        family_free(&f);
    }
    ck_assert_int_gt(probes, (int64_t)members(40) * 25);
    ck_assert_int_lt(kinks * 20, probes);
    moe_context_destroy(context);
}
END_TEST

/* One forward and backward of member n in a context; the hash of everything. */
static uint64_t run_in(int32_t kind, uint64_t n, int32_t threads, int32_t isa,
                       char text[FAMILY_TEXT])
{
    moe_context *context = context_of(threads, isa);
    family f;
    family_batch b;
    moe_pass *pass = NULL;
    family_draw(&f, kind, n, n % 2 ? MOE_DTYPE_F32 : REAL);
    family_make(&f, context);
    family_batch_make(&b, &f);
    memcpy(text, f.text, sizeof f.text);
    MUST(moe_pass_create(&pass, f.layer, NULL));
    MUST(moe_layer_forward(f.layer, pass, &b.fwd));
    MUST(moe_layer_backward(f.layer, pass, &b.bwd));
    uint64_t hash = family_hash(&f, &b, pass);
    moe_pass_destroy(pass), family_batch_free(&b), family_free(&f), moe_context_destroy(context);
    return hash;
}

/* On a device, which has neither, from run to run. */
START_TEST(test_family_is_the_same_for_any_threads_and_isa)
{
    char text[FAMILY_TEXT];
    for (uint64_t n = 0; n < members(30); n++) {
        uint64_t one = run_in(_i, n, 1, MOE_ISA_PLAIN, text);
        ck_assert_msg(run_in(_i, n, 3, MOE_ISA_PLAIN, text) == one, "3 threads: %s", text);
        ck_assert_msg(run_in(_i, n, 2, MOE_ISA_AUTO, text) == one, "best isa: %s", text);
    }
}
END_TEST

/* The plan replayed by its ids, and recomputed: all bytes as at first, losses counted once. */
START_TEST(test_family_replays_and_recomputes)
{
    moe_context *context = context_of(2, MOE_ISA_AUTO);
    for (uint64_t n = 0; n < members(30); n++) {
        family f;
        family_batch b;
        moe_pass *pass = NULL;
        moe_plan *plan = NULL;
        const moe_plan *routed;
        family_draw(&f, _i, n + 1000, REAL);
        family_make(&f, context);
        family_batch_make(&b, &f);
        MUST(moe_pass_create(&pass, f.layer, NULL));
        MUST(moe_layer_forward(f.layer, pass, &b.fwd));
        MUST(moe_layer_backward(f.layer, pass, &b.bwd));
        uint64_t first = family_hash(&f, &b, pass);
        MUST(moe_plan_create(&plan, context));
        MUST(moe_pass_plan(pass, &routed));
        MUST(moe_plan_check(routed));
        MUST(moe_plan_copy(plan, routed));
        MUST(moe_layer_zero_gradients(f.layer, NULL));
        b.fwd.plan = plan, b.fwd.plan_use = MOE_PLAN_IDS, b.fwd.token_key = NULL;
        MUST(moe_layer_forward(f.layer, pass, &b.fwd));
        MUST(moe_layer_backward(f.layer, pass, &b.bwd));
        ck_assert_msg(family_hash(&f, &b, pass) == first, "replay: %s", f.text);
        b.fwd.plan = NULL, b.fwd.plan_use = 0, b.fwd.token_key = b.key;
        b.fwd.flags |= MOE_FORWARD_PLAN_ONLY;
        MUST(moe_layer_forward(f.layer, pass, &b.fwd));
        MUST(moe_pass_trim(pass));
        b.fwd.flags = (b.fwd.flags & ~(uint64_t)MOE_FORWARD_PLAN_ONLY) | MOE_FORWARD_RECOMPUTE;
        b.fwd.token_key = NULL;
        MUST(moe_layer_forward(f.layer, pass, &b.fwd));
        MUST(moe_layer_zero_gradients(f.layer, NULL));
        MUST(moe_layer_backward(f.layer, pass, &b.bwd));
        ck_assert_msg(family_hash(&f, &b, pass) == first, "recompute: %s", f.text);
        moe_plan_destroy(plan), moe_pass_destroy(pass), family_batch_free(&b), family_free(&f);
    }
    moe_context_destroy(context);
}
END_TEST

/* ---- memory ---------------------------------------------------------------------------------- */

static int64_t allocations;

static void *count_alloc(void *user, uint64_t bytes, uint64_t alignment)
{
    (void)user;
    allocations++;
    return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}
static void count_free(void *user, void *memory, uint64_t bytes)
{
    (void)user, (void)bytes;
    free(memory);
}

START_TEST(test_family_allocates_nothing_after_reserve)
{
    moe_context *context = NULL;
    moe_context_config c;
    MUST(moe_context_config_init(&c, sizeof c));
    c.threads = 1, c.alloc = count_alloc, c.free = count_free;
    MUST(moe_context_create(&context, &c));
    for (uint64_t n = 0; n < members(40); n++) {
        family f;
        family_batch b;
        moe_pass *pass = NULL;
        family_draw(&f, _i, n + 2000, MOE_DTYPE_F32);
        family_make(&f, context);
        family_batch_make(&b, &f);
        MUST(moe_pass_create(&pass, f.layer, NULL));
        MUST(moe_pass_reserve(pass, f.T, f.G, MOE_FROM_CONFIG));
        int64_t before = allocations;
        for (int train = 0; train < 2; train++) {
            b.fwd.flags = train ? MOE_FORWARD_TRAIN : 0;
            MUST(moe_layer_forward(f.layer, pass, &b.fwd));
            MUST(moe_layer_backward(f.layer, pass, &b.bwd));
        }
        ck_assert_msg(allocations == before, "%lld allocations: %s",
                      (long long)(allocations - before), f.text);
        if (_i != MOE_GATE_SOFTMAX_DENSE) { /* a K of the call's, reserved for; now in training */
            moe_pass_destroy(pass), pass = NULL, b.fwd.top_k = 1;
            MUST(moe_pass_create(&pass, f.layer, NULL));
            MUST(moe_pass_reserve(pass, f.T, f.G, 1));
            before = allocations;
            MUST(moe_layer_forward(f.layer, pass, &b.fwd));
            MUST(moe_layer_backward(f.layer, pass, &b.bwd));
        }
        ck_assert_msg(allocations == before, "%lld allocations: %s",
                      (long long)(allocations - before), f.text);
        moe_pass_destroy(pass), family_batch_free(&b), family_free(&f);
    }
    moe_context_destroy(context);
}
END_TEST

/* moe_layer_memory says what a pass takes: never less than it takes, and exactly where the entries
 * do not depend on the tokens. */
START_TEST(test_family_memory_is_known_beforehand)
{
    moe_context *context = context_of(2, MOE_ISA_AUTO);
    for (uint64_t n = 0; n < members(40); n++) {
        family f;
        family_batch b;
        moe_pass *pass = NULL;
        moe_cost_query q;
        moe_cost cost;
        family_draw(&f, _i, n + 3000, MOE_DTYPE_F32);
        f.train = n % 2, f.masked = 0;
        family_make(&f, context);
        family_batch_make(&b, &f);
        MUST(moe_pass_create(&pass, f.layer, NULL));
        MUST(moe_layer_forward(f.layer, pass, &b.fwd));
        MUST(moe_cost_query_init(&q, sizeof q));
        MUST(moe_cost_init(&cost, sizeof cost));
        q.gate = &f.g, q.experts = &f.e, q.layer = &f.l, q.tokens = f.T, q.groups = f.G;
        q.shared = f.has_shared ? &f.shared : NULL;
        q.residual = f.has_residual ? &f.residual : NULL;
        q.flags = b.fwd.flags, q.threads = 2;
        if (ON_DEVICE) q.context = context;
        MUST(moe_layer_memory(&q, &cost));
        int64_t elements = 0;
        moe_parameter_record p;
        MUST(moe_parameter_record_init(&p, sizeof p));
        for (int64_t i = 0; i < moe_layer_parameter_count(f.layer); i++) {
            MUST(moe_layer_parameter(f.layer, i, &p));
            elements += p.shape[0] * p.shape[1] * p.shape[2];
        }
        ck_assert_msg(cost.parameter_count == elements, "%lld elements, want %lld: %s",
                      (long long)cost.parameter_count, (long long)elements, f.text);
        int varies = _i == MOE_GATE_BALANCED || _i == MOE_GATE_EXPERT_CHOICE;
        int64_t bytes = moe_pass_bytes(pass);
        ck_assert_msg(varies ? cost.pass_bytes >= bytes : cost.pass_bytes == bytes,
                      "%lld bytes, the pass has %lld: %s", (long long)cost.pass_bytes,
                      (long long)bytes, f.text);
        moe_pass_destroy(pass), family_batch_free(&b), family_free(&f);
    }
    moe_context_destroy(context);
}
END_TEST

/* Numbers of groups and experts whose product has no place in 63 bits. */
START_TEST(test_sizes_beyond_63_bits_are_refused)
{
    moe_context *context = context_of(1, MOE_ISA_AUTO);
    moe_gate_config g;
    moe_gate *gate = NULL;
    moe_pass *pass = NULL;
    moe_cost_query q;
    moe_cost cost;
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_cost_query_init(&q, sizeof q));
    MUST(moe_cost_init(&cost, sizeof cost));
    g.kind = MOE_GATE_EXPERT_CHOICE, g.capacity_kind = MOE_CAPACITY_FACTOR;
    g.d_model = 8, g.num_experts = INT32_MAX;
    q.gate = &g, q.tokens = (int64_t)1 << 40, q.groups = (int64_t)1 << 61;
    ck_assert_int_eq(moe_layer_memory(&q, &cost), MOE_ERROR_OVERFLOW);
    g.num_experts = 8;
    MUST(moe_gate_create(&gate, context, &g));
    MUST(moe_pass_create_for_gate(&pass, gate, NULL));
    ck_assert_int_eq(moe_pass_reserve(pass, 8, INT64_MAX, MOE_FROM_CONFIG), MOE_ERROR_OVERFLOW);
    moe_pass_destroy(pass), moe_gate_destroy(gate), moe_context_destroy(context);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("family");
    TCase *cases = tcase_create("any member");
    tcase_set_timeout(cases, 600);
    tcase_add_loop_test(cases, test_family_gradients_are_differences, 0, KINDS);
    tcase_add_loop_test(cases, test_family_is_the_same_for_any_threads_and_isa, 0, KINDS);
    tcase_add_loop_test(cases, test_family_replays_and_recomputes, 0, KINDS);
    if (COUNTS_HOLD)
        tcase_add_loop_test(cases, test_family_allocates_nothing_after_reserve, 0, KINDS);
    tcase_add_loop_test(cases, test_family_memory_is_known_beforehand, 0, KINDS);
    tcase_add_test(cases, test_sizes_beyond_63_bits_are_refused);
    suite_add_tcase(suite, cases);
    return run_suite(suite, 1);
}
