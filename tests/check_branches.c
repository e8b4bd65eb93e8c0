/* check_branches.c - a layer's shared experts, residual branch and dropped tokens: y from the
 * parts' own calls and coefficients found here, the parameters a layer has of its own, and what is
 * refused. Gradients are check_family's. */
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { T = 11, D = 6, O = 6, E = 4, K = 2 };

/* A layer with branches as asked, in double, and a batch. */
typedef struct bench {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts, *shared, *residual;
    moe_layer *layer;
    moe_pass *pass;
    moe_layer_config l;
    moe_gate_config g;
    scalar x[T * D], y[T * O], dx[T * D], dy[T * O];
    uint8_t mask[T];
    moe_forward_args f;
    moe_backward_args b;
} bench;

static moe_experts *new_pool(moe_context *context, int64_t experts, int64_t hidden, uint64_t seed)
{
    moe_experts *pool = NULL;
    moe_experts_config e;
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = hidden, e.num_experts = experts, e.dtype = REAL;
    e.activation = MOE_ACTIVATION_SILU, e.bias = 1;
    MUST(moe_experts_create(&pool, context, &e));
    MUST(moe_experts_init_parameters(pool, seed));
    return pool;
}

static void bench_begin(bench *n, int shared_experts, int residual)
{
    uint64_t state = 4;
    memset(n, 0, sizeof *n);
    n->context = new_context();
    MUST(moe_gate_config_init(&n->g, sizeof n->g));
    MUST(moe_layer_config_init(&n->l, sizeof n->l));
    MUST(moe_forward_args_init(&n->f, sizeof n->f));
    MUST(moe_backward_args_init(&n->b, sizeof n->b));
    n->g.d_model = D, n->g.num_experts = E, n->g.top_k = K, n->g.dtype = REAL;
    n->g.init_std = 1;
    n->experts = new_pool(n->context, E, 5, 1);
    if (shared_experts) n->shared = new_pool(n->context, shared_experts, 3, 2);
    if (residual) n->residual = new_pool(n->context, 1, 7, 3);
    for (int i = 0; i < T * D; i++) n->x[i] = (scalar)random_normal(&state);
    for (int i = 0; i < T * O; i++) n->dy[i] = (scalar)random_normal(&state);
    n->l.experts = n->experts, n->l.shared = n->shared, n->l.residual = n->residual;
    n->f.tokens = T, n->f.x = n->x, n->f.y = n->y;
    n->b.dx = n->dx, n->b.dy = n->dy;
}

static void bench_make(bench *n)
{
    MUST(moe_gate_create(&n->gate, n->context, &n->g));
    MUST(moe_gate_init_parameters(n->gate, 9));
    n->l.gate = n->gate;
    MUST(moe_layer_create(&n->layer, &n->l));
    MUST(moe_pass_create(&n->pass, n->layer, NULL));
}

static void bench_end(bench *n)
{
    moe_pass_destroy(n->pass), moe_layer_destroy(n->layer), moe_gate_destroy(n->gate);
    moe_experts_destroy(n->experts), moe_experts_destroy(n->shared);
    moe_experts_destroy(n->residual), moe_context_destroy(n->context);
}

/* out[T,O] of a layer of the routed experts alone, or of one pool whose experts all tokens
 * visit. */
static void routed_alone(const bench *n, scalar *out)
{
    moe_layer *layer = NULL;
    moe_pass *pass = NULL;
    moe_layer_config l = n->l;
    moe_forward_args f = n->f;
    l.shared = l.residual = NULL, l.shared_gate = l.residual_mix = l.output = l.dropped = 0;
    MUST(moe_layer_create(&layer, &l));
    MUST(moe_pass_create(&pass, layer, NULL));
    f.y = out, f.flags &= ~(uint64_t)MOE_FORWARD_ADD;
    MUST(moe_layer_forward(layer, pass, &f));
    moe_pass_destroy(pass), moe_layer_destroy(layer);
}

static void pool_alone(const bench *n, moe_experts *pool, int32_t experts, scalar *out)
{
    moe_pass *pass = NULL;
    moe_plan *plan = NULL;
    moe_plan_args a;
    moe_forward_args f = n->f;
    int32_t ids[2 * T];
    scalar ones[2 * T];
    for (int i = 0; i < T * experts; i++) ids[i] = i % experts, ones[i] = 1;
    MUST(moe_plan_args_init(&a, sizeof a));
    a.tokens = T, a.num_experts = experts, a.top_k = experts, a.expert_ids = ids;
    a.weights = ones, a.dtype = REAL;
    MUST(moe_plan_create(&plan, n->context));
    MUST(moe_plan_build(plan, &a));
    MUST(moe_pass_create_for_experts(&pass, pool, NULL));
    f.y = out, f.plan = plan, f.token_mask = NULL, f.flags = 0;
    MUST(moe_experts_forward(pool, pass, &f));
    moe_pass_destroy(pass), moe_plan_destroy(plan);
}

/* The layer's own parameter, set to drawn numbers. */
static scalar *draw_own(bench *n, const char *name)
{
    uint64_t state = 31;
    moe_parameter_record p;
    MUST(moe_parameter_record_init(&p, sizeof p));
    MUST(moe_layer_parameter(n->layer, moe_layer_parameter_find(n->layer, name), &p));
    ck_assert_int_eq(p.sharding, MOE_SHARD_REPLICATED);
    for (int64_t i = 0; i < p.element_count; i++)
        ((scalar *)p.data)[i] = (scalar)random_normal(&state);
    return p.data;
}

static void compare(const scalar *got, const double *want)
{
    for (int i = 0; i < T * O; i++)
        ck_assert_msg(fabs((double)got[i] - want[i]) < TOLERANCE(1e-12),
                      "y[%d] is %.17g, want %.17g", i, (double)got[i], want[i]);
}

/* ---- values ---------------------------------------------------------------------------------- */

/* y = c0 routed + c1 residual + s shared with both coefficients, without, and with output. */
START_TEST(test_branches_are_added_with_their_coefficients)
{
    bench n;
    scalar routed[T * O], shared[T * O], residual[T * O];
    double want[T * O];
    int gate = _i & 1, mix = (_i >> 1) & 1, sigmoid = (_i >> 2) & 1, add = !sigmoid && gate;
    bench_begin(&n, 2, 1);
    n.l.shared_gate = gate, n.l.residual_mix = mix, n.l.output = sigmoid;
    bench_make(&n);
    const scalar *ws = gate ? draw_own(&n, "shared_gate") : NULL;
    const scalar *wc = mix ? draw_own(&n, "residual_mix") : NULL;
    const scalar *bc = mix ? draw_own(&n, "residual_mix_bias") : NULL;
    routed_alone(&n, routed);
    pool_alone(&n, n.shared, 2, shared), pool_alone(&n, n.residual, 1, residual);
    for (int t = 0; t < T; t++) {
        double zs = 0, z[2] = {bc ? (double)bc[0] : 0, bc ? (double)bc[1] : 0};
        for (int d = 0; d < D; d++) {
            zs += ws ? (double)n.x[t * D + d] * (double)ws[d] : 0;
            for (int i = 0; i < 2 && wc; i++)
                z[i] += (double)n.x[t * D + d] * (double)wc[d * 2 + i];
        }
        double s = ws ? 1 / (1 + exp(-zs)) : 1, c = wc ? 1 / (1 + exp(z[1] - z[0])) : 1;
        for (int i = t * O; i < (t + 1) * O; i++) {
            want[i] = c * (double)routed[i] + (wc ? 1 - c : 1) * (double)residual[i] +
                      s * (double)shared[i];
            if (sigmoid) want[i] = 1 / (1 + exp(-want[i]));
            n.y[i] = (scalar)(add ? i : 0);
            if (add) want[i] += i;
        }
    }
    if (add) n.f.flags |= MOE_FORWARD_ADD;
    MUST(moe_layer_forward(n.layer, n.pass, &n.f));
    compare(n.y, want);
    bench_end(&n);
}
END_TEST

/* A masked token gets 0 whatever stands beside the routed experts, and NaN in its x goes
 * nowhere. */
START_TEST(test_branches_leave_masked_tokens_alone)
{
    bench n;
    moe_parameter_record p;
    bench_begin(&n, 2, 1);
    n.l.shared_gate = n.l.residual_mix = 1;
    bench_make(&n);
    for (int t = 0; t < T; t++) n.mask[t] = t % 3 != 0;
    for (int i = 0; i < T * D; i++)
        if (!n.mask[i / D]) n.x[i] = (scalar)NAN;
    n.f.token_mask = n.mask;
    MUST(moe_layer_forward(n.layer, n.pass, &n.f));
    MUST(moe_layer_backward(n.layer, n.pass, &n.b));
    for (int i = 0; i < T * D; i++) {
        ck_assert_msg(n.mask[i / D] ? isfinite(n.y[i]) : n.y[i] == 0, "y[%d] is %g", i,
                      (double)n.y[i]);
        ck_assert_msg(n.mask[i / D] ? isfinite(n.dx[i]) : n.dx[i] == 0, "dx[%d] is %g", i,
                      (double)n.dx[i]);
    }
    MUST(moe_parameter_record_init(&p, sizeof p));
    for (int64_t i = 0; i < moe_layer_parameter_count(n.layer); i++) {
        MUST(moe_layer_parameter(n.layer, i, &p));
        for (int64_t j = 0; j < p.element_count; j++)
            ck_assert_msg(isfinite(((scalar *)p.grad)[j]), "%s[%d]", p.name, (int)j);
    }
    bench_end(&n);
}
END_TEST

/* What a token without rows gets: 0, its x, or nothing at all; with ADD the same on top. */
START_TEST(test_dropped_tokens_get_what_was_asked)
{
    bench n;
    const moe_plan *plan;
    moe_plan_view v;
    int dropped = _i / 2, add = _i % 2, seen = 0;
    scalar routed[T * O];
    bench_begin(&n, 0, 0);
    n.l.dropped = dropped;
    n.g.capacity_kind = MOE_CAPACITY_NUMBER, n.g.capacity = 2, n.g.top_k = 1;
    bench_make(&n);
    for (int t = 0; t < T; t++) n.mask[t] = t != 10;
    n.f.token_mask = n.mask;
    routed_alone(&n, routed);
    for (int i = 0; i < T * O; i++) n.y[i] = (scalar)(100 + i);
    if (add) n.f.flags = MOE_FORWARD_ADD;
    MUST(moe_layer_forward(n.layer, n.pass, &n.f));
    MUST(moe_pass_plan(n.pass, &plan));
    MUST(moe_plan_view_init(&v, sizeof v));
    MUST(moe_plan_get(plan, &v));
    MUST(moe_layer_backward(n.layer, n.pass, &n.b));
    for (int t = 0; t < T; t++) {
        int none = n.mask[t] && v.row_of_entry[t] < 0;
        seen += none;
        for (int i = t * O; i < (t + 1) * O; i++) {
            scalar old = (scalar)(100 + i),
                   part = none && dropped == MOE_DROPPED_PASS_THROUGH ? n.x[i] : routed[i];
            scalar want = none && dropped == MOE_DROPPED_UNTOUCHED ? old : add ? old + part : part;
            ck_assert_msg(n.y[i] == want, "token %d: %g, want %g", t, (double)n.y[i], (double)want);
            if (none) ck_assert(n.dx[i] == (dropped == MOE_DROPPED_PASS_THROUGH ? n.dy[i] : 0));
        }
    }
    ck_assert_int_gt(seen, 1);
    bench_end(&n);
}
END_TEST

/* ---- parameters ------------------------------------------------------------------------------ */

START_TEST(test_layer_lists_and_binds_its_own_parameters)
{
    static const char *const NAMES[] = {
        "gate.weight", "experts.w1",  "experts.b1",   "experts.w2",
        "experts.b2",  "shared.w1",   "shared.b1",    "shared.w2",
        "shared.b2",   "residual.w1", "residual.b1",  "residual.w2",
        "residual.b2", "shared_gate", "residual_mix", "residual_mix_bias"};
    bench n;
    moe_parameter_record p;
    moe_binding b;
    scalar first[T * O], *own = calloc(4 * D + 2, sizeof *own); /* what is bound */
    scalar *shared_gate = own, *grad = own + D, *mix = grad + D, *bias = mix + D * 2;
    ck_assert_ptr_nonnull(own);
    bench_begin(&n, 1, 1);
    n.l.shared_gate = n.l.residual_mix = 1, n.l.parameters = MOE_PARAMETERS_BOUND;
    bench_make(&n);
    MUST(moe_parameter_record_init(&p, sizeof p));
    ck_assert_int_eq(moe_layer_parameter_count(n.layer), COUNT(NAMES));
    for (int64_t i = 0; i < (int64_t)COUNT(NAMES); i++) {
        MUST(moe_layer_parameter(n.layer, i, &p));
        ck_assert_str_eq(p.name, NAMES[i]);
    }
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_forward(n.layer, n.pass, &n.f));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "shared_gate"));
    bias[0] = 50, bias[1] = -50; /* all routed, no residual */
    scalar *data[3] = {shared_gate, mix, bias};
    MUST(moe_binding_init(&b, sizeof b));
    b.data_dtype = b.grad_dtype = REAL;
    for (int i = 0; i < 3; i++) {
        b.data = data[i], b.grad = i == 0 ? grad : NULL;
        MUST(moe_layer_bind(n.layer, 13 + i, &b));
    }
    MUST(moe_layer_forward(n.layer, n.pass, &n.f));
    memcpy(first, n.y, sizeof first);
    MUST(moe_layer_backward(n.layer, n.pass, &n.b));
    double once = (double)grad[2];
    ck_assert_double_ne(once, 0);
    MUST(moe_layer_backward(n.layer, n.pass, &n.b));
    ck_assert_double_eq((double)grad[2], once + once);
    n.b.flags = MOE_BACKWARD_OVERWRITE;
    MUST(moe_layer_backward(n.layer, n.pass, &n.b));
    ck_assert_double_eq((double)grad[2], once);
    MUST(moe_layer_zero_gradients(n.layer, NULL));
    ck_assert_double_eq((double)grad[2], 0);
    n.b.flags = MOE_BACKWARD_SKIP_PARAMETERS;
    MUST(moe_layer_backward(n.layer, n.pass, &n.b));
    ck_assert_double_eq((double)grad[2], 0);
    scalar routed[T * O], shared[T * O];
    double want[T * O];
    routed_alone(&n, routed), pool_alone(&n, n.shared, 1, shared);
    for (int i = 0; i < T * O; i++) want[i] = (double)routed[i] + (double)shared[i] / 2;
    compare(first, want);
    bench_end(&n);
    free(own);
}
END_TEST

/* Pools of one layer begin with other numbers, though their shapes are the same. */
START_TEST(test_layer_init_makes_its_pools_differ)
{
    bench n;
    const void *data[3];
    static const char *const NAMES[] = {"experts.w1", "shared.w1", "residual.w1"};
    moe_parameter_record p;
    bench_begin(&n, 1, 1);
    bench_make(&n);
    MUST(moe_layer_init_parameters(n.layer, 7));
    MUST(moe_parameter_record_init(&p, sizeof p));
    for (int i = 0; i < 3; i++) {
        MUST(moe_layer_parameter(n.layer, moe_layer_parameter_find(n.layer, NAMES[i]), &p));
        data[i] = p.data;
        for (int j = 0; j < i; j++)
            ck_assert(((const scalar *)data[i])[0] != ((const scalar *)data[j])[0]);
    }
    bench_end(&n);
}
END_TEST

/* ---- refused --------------------------------------------------------------------------------- */

static void refuse(bench *n, const char *first, const char *second)
{
    moe_layer *layer = NULL;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &n->l));
    ck_assert_ptr_null(layer);
    ck_assert_msg(strstr(moe_last_error(), first) && strstr(moe_last_error(), second),
                  "\"%s\" does not name %s and %s", moe_last_error(), first, second);
}

START_TEST(test_layer_refuses_branches_that_clash)
{
    bench n;
    moe_experts *narrow = NULL;
    moe_experts_config e;
    bench_begin(&n, 1, 1);
    const moe_layer_config good = n.l;
    n.l.dropped = MOE_DROPPED_UNTOUCHED, refuse(&n, "dropped", "shared");
    n.l.shared = NULL, refuse(&n, "dropped", "residual");
    n.l = good, n.l.dropped = 1, n.l.residual_mix = 1, refuse(&n, "dropped", "residual_mix");
    n.l = good, n.l.dropped = 1, n.l.output = MOE_OUTPUT_SIGMOID, refuse(&n, "dropped", "output");
    n.l = good, n.l.dropped = 3, refuse(&n, "dropped", "3");
    n.l = good, n.l.shared_gate = 2, refuse(&n, "shared_gate", "2");
    n.l = good, n.l.residual_mix = -1, refuse(&n, "residual_mix", "-1");
    n.l = good, n.l.parameters = 9, refuse(&n, "parameters", "9");
    n.l = good, n.l.shared = NULL, n.l.shared_gate = 1, refuse(&n, "shared_gate", "NULL");
    n.l = good, n.l.residual = NULL, n.l.residual_mix = 1, refuse(&n, "residual_mix", "NULL");
    n.l = good, n.l.shared = n.residual, refuse(&n, "shared", "residual");
    n.l = good, n.l.shared = n.experts, refuse(&n, "shared", "another pool");
    MUST(moe_experts_get_config(n.shared, (e.struct_size = sizeof e, &e)));
    e.weight_position = MOE_WEIGHT_ON_HIDDEN;
    MUST(moe_experts_create(&narrow, n.context, &e));
    n.l = good, n.l.shared = narrow, n.l.shared_gate = 1,
    refuse(&n, "shared_gate", "weight_position");
    moe_experts_destroy(narrow);
    e.d_out = 3, e.weight_position = 0;
    MUST(moe_experts_create(&narrow, n.context, &e));
    n.l = good, n.l.shared = narrow, refuse(&n, "d_out 3", "6");
    moe_experts_destroy(narrow);
    e.d_out = O, e.dtype = ON_DEVICE ? MOE_DTYPE_F16 : MOE_DTYPE_F32;
    MUST(moe_experts_create(&narrow, n.context, &e));
    n.l = good, n.l.residual = narrow, refuse(&n, "residual", "dtype");
    moe_experts_destroy(narrow), bench_end(&n);
}
END_TEST

/* The pools beside the routed one count their touched experts, and are zeroed with the layer. */
START_TEST(test_branch_pools_count_touched_experts)
{
    bench n;
    uint8_t touched[2];
    int64_t count = 0;
    bench_begin(&n, 2, 1);
    bench_make(&n);
    MUST(moe_layer_forward(n.layer, n.pass, &n.f));
    MUST(moe_layer_backward(n.layer, n.pass, &n.b));
    MUST(moe_experts_touched(n.shared, touched, &count));
    ck_assert_int_eq(count, 2);
    MUST(moe_layer_zero_touched_gradients(n.layer, NULL));
    MUST(moe_experts_touched(n.shared, touched, &count));
    ck_assert_int_eq(count, 0);
    bench_end(&n);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("branches");
    TCase *c = add_case(suite, "branches");
    tcase_add_loop_test(c, test_branches_are_added_with_their_coefficients, 0, 8);
    tcase_add_test(c, test_branches_leave_masked_tokens_alone);
    tcase_add_loop_test(c, test_dropped_tokens_get_what_was_asked, 0, 6);
    tcase_add_test(c, test_layer_lists_and_binds_its_own_parameters);
    tcase_add_test(c, test_layer_init_makes_its_pools_differ);
    tcase_add_test(c, test_layer_refuses_branches_that_clash);
    tcase_add_test(c, test_branch_pools_count_touched_experts);
    return run_suite(suite, 1);
}
