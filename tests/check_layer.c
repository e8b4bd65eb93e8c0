/* check_layer.c - the layer, and the gate alone, against the reference: a table of configurations, and
 * random ones. MOE_LONG=1 runs many more of the latter. */
#include "support/layer_cases.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

static void compare(layer_case *c, uint64_t seed, int32_t dtype)
{
    layer_run r;
    ref_result want;
    layer_case_make(c, seed);
    ref_run(&c->p, &want, 1);
    layer_run_make(&r, c, dtype, NULL);
    ck_assert_msg(layer_run_forward(&r) == MOE_OK, "%s: %s", c->name, moe_last_error());
    ck_assert_msg(layer_run_backward(&r) == MOE_OK, "%s: %s", c->name, moe_last_error());
    const char *difference = layer_run_compare(&r, &want);
    ck_assert_msg(difference[0] == 0, "%s (seed %llu)", difference, (unsigned long long)seed);
    layer_run_free(&r);
    ref_free(&want);
    layer_case_free(c);
}

START_TEST(test_layer_agrees_with_reference_in_f32)
{
    layer_case c = layer_cases[_i];
    compare(&c, (uint64_t)_i + 1, MOE_DTYPE_F32);
}
END_TEST

START_TEST(test_layer_agrees_with_reference_in_f64)
{
    layer_case c = layer_cases[_i];
    compare(&c, (uint64_t)_i + 1, MOE_DTYPE_F64);
}
END_TEST

/* A configuration drawn at random; those that contradict themselves are mended. */
static layer_case draw(uint64_t *state)
{
    static const int activations[] = {0, 1, 2, 3, 16, 17, 18, 19};
#define BELOW(n) ((int)(random_uniform(state) * (double)(n)))
    layer_case c = {.name = "random"};
    c.T = BELOW(40), c.D = 1 + BELOW(20), c.E = 1 + BELOW(12), c.F = 1 + BELOW(20);
    c.K = 1 + BELOW(c.E), c.O = BELOW(2) ? 1 + BELOW(20) : 0;
    c.kind = BELOW(3);
    if (c.kind == MOE_GATE_TOP_K) {
        c.order = BELOW(2), c.score = BELOW(2), c.route_scale = BELOW(2) ? 2.5 : 1;
        c.renormalize = (c.order || c.score) && BELOW(2);
    }
    c.router_bias = BELOW(2), c.cv_ddof = BELOW(2), c.eval = BELOW(4) == 0;
    c.logits_in = BELOW(5) == 0, c.gate_D = BELOW(4) == 0 ? 1 + BELOW(9) : 0;
    c.activation = activations[BELOW(8)], c.expert_bias = BELOW(2), c.expert_sigmoid = BELOW(4) == 0;
    c.layer_sigmoid = BELOW(4) == 0, c.layout = BELOW(2), c.glu_order = BELOW(4);
    c.groups = BELOW(2) ? 1 + BELOW(5) : 0, c.masked = BELOW(3) == 0;
    c.sequence_softmax = BELOW(2), c.sequence_routed = BELOW(2), c.no_experts = BELOW(5) == 0;
    c.capacity_kind = BELOW(3), c.capacity = BELOW(8), c.capacity_factor = random_uniform(state) * 2;
    c.capacity_rounding = BELOW(3), c.capacity_minimum = BELOW(3), c.renormalize_after_drop = BELOW(2);
    for (int i = 0; i < REF_LOSSES; i++) c.weight[i] = BELOW(2) ? random_uniform(state) : 0;
    if (c.kind != MOE_GATE_NOISY_TOP_K) c.weight[MOE_LOSS_LOAD] = 0;
#undef BELOW
    return c;
}

START_TEST(test_layer_agrees_with_reference_for_random_configurations)
{
    const char *long_run = getenv("MOE_LONG");
    int count = long_run && long_run[0] == '1' ? 5000 : 400;
    uint64_t state = 2026;
    for (int i = 0; i < count; i++) {
        layer_case c = draw(&state);
        compare(&c, (uint64_t)i, i % 4 == 0 ? MOE_DTYPE_F32 : MOE_DTYPE_F64);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("layer");
    TCase *tests = tcase_create("reference");
    tcase_set_timeout(tests, 600);
    tcase_add_loop_test(tests, test_layer_agrees_with_reference_in_f32, 0, LAYER_CASES);
    tcase_add_loop_test(tests, test_layer_agrees_with_reference_in_f64, 0, LAYER_CASES);
    tcase_add_test(tests, test_layer_agrees_with_reference_for_random_configurations);
    suite_add_tcase(suite, tests);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
