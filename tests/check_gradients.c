/* check_gradients.c - every gradient against central differences: of the reference, and of the
 * library's own f64 path, in random directions, for every input and parameter by name.
 *
 *     (L(a + h v) - L(a - h v)) / 2h  =  <dL/da, v>      with relative error at most 1e-6
 *
 * The selection is held still: the reference by fixed_ids and fixed_keep, the library by replaying
 * the plan with MOE_PLAN_IDS. Then moe_check_gradients of the same layers. MOE_VERBOSE=1 prints
 * the largest error of each name. */
#include "support/layer_cases.h"
#include "support/suite.h"

#include <check.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double STEP = 1e-6, ALLOWED = 1e-6;

/* What L depends on beside the layer's parameters. */
typedef struct variable {
    const char *name;
    size_t in_problem, in_result; /* offsets of double pointers */
} variable;

#define VARIABLE(name, input, gradient)                                    \
    {                                                                      \
        name, offsetof(ref_problem, input), offsetof(ref_result, gradient) \
    }
static const variable inputs[] = {VARIABLE("x", x, dx), VARIABLE("gate_x", gate_x, d_gate_x),
                                  VARIABLE("logits_in", logits_in, d_logits),
                                  VARIABLE("weights", fixed_weights, d_w)};
enum { INPUTS = sizeof inputs / sizeof *inputs, VARIABLES = INPUTS + LAYER_TENSORS };

static double worst[2][VARIABLES]; /* reference, library */

static const layer_tensor *parameter_of(int v)
{
    return v < INPUTS ? NULL : &layer_tensors[v - INPUTS];
}

static const char *name_of(int v) { return v < INPUTS ? inputs[v].name : parameter_of(v)->name; }

static int64_t count_of(const layer_case *c, int v)
{
    const ref_problem *p = &c->p;
    const int64_t counts[INPUTS] = {p->T * p->D, p->T * p->gate_D, p->T * p->E, p->T * p->K};
    int64_t experts, rows, cols;
    return v < INPUTS ? counts[v] : layer_tensor_shape(p, parameter_of(v), &experts, &rows, &cols);
}

static const double **input_of(ref_problem *p, int v)
{
    if (parameter_of(v)) return layer_tensor_input(p, parameter_of(v));
    return (const double **)(void *)((char *)p + inputs[v].in_problem);
}

static const double *gradient_of(const ref_result *r, int v)
{
    if (parameter_of(v)) return layer_tensor_gradient(r, parameter_of(v));
    return *(double *const *)(const void *)((const char *)r + inputs[v].in_result);
}

/* Whether L depends on the variable at all in this case. */
static int is_used(layer_case *c, int v)
{
    const layer_tensor *t = parameter_of(v);
    int routes = c->replay != 2;
    if (!*input_of(&c->p, v)) return 0;
    if (t && t->owner != OF_GATE) {
        if (c->bound == 2 && t->owner != OF_LAYER) return 0; /* one expert has no gradient */
        return !c->no_experts;
    }
    if (!routes) return !t && (strcmp(name_of(v), "x") == 0 || strcmp(name_of(v), "weights") == 0);
    if (t && !t->in_result) return 0; /* a buffer */
    if (strcmp(name_of(v), "weights") == 0) return 0;
    if (strcmp(name_of(v), "dWg") == 0 || strcmp(name_of(v), "dbg") == 0) return !c->logits_in;
    return !(c->no_experts && strcmp(name_of(v), "x") == 0 && c->p.gate_x);
}

/* L of the library for the case's present contents, with this routing. */
static double library_value(const layer_case *c, const moe_plan *plan)
{
    layer_run r;
    moe_losses losses;
    moe_plan_view view;
    layer_run_make(&r, c, MOE_DTYPE_F64, NULL);
    if (c->replay != 2) r.f.plan = plan, r.f.plan_use = MOE_PLAN_IDS;
    ck_assert_msg(layer_run_forward(&r) == MOE_OK, "%s", moe_last_error());
    ck_assert_int_eq(moe_losses_init(&losses, sizeof losses), MOE_OK);
    ck_assert_int_eq(moe_pass_losses(r.pass, &losses), MOE_OK);
    double value = 0;
    for (int i = 0; i < REF_LOSSES; i++) value += c->p.factor[i] * losses.value[i];
    for (int64_t i = 0; i < c->p.T * c->p.O && c->p.dy; i++)
        value += c->p.dy[i] * ((double *)r.y)[i];
    layer_run_view(&r, &view);
    for (int64_t t = 0; t < view.tokens && c->p.weight_grad; t++)
        for (int64_t n = view.token_begin[t]; n < view.token_begin[t + 1]; n++)
            value += c->p.weight_grad[layer_run_slot(&r, &view, t, n)] *
                     ((const double *)view.weight_of_entry)[n];
    layer_run_free(&r);
    return value;
}

static double reference_value(const layer_case *c)
{
    ref_result r;
    ref_run(&c->p, &r, 0);
    double value = r.total;
    ref_free(&r);
    return value;
}

/* The gradient that the library found, in the reference's order; NULL if it has none. */
static double *library_gradient(const layer_run *r, const char *name, int64_t count)
{
    const void *from = strcmp(name, "x") == 0           ? r->dx
                       : strcmp(name, "weights") == 0   ? r->entry_grad
                       : strcmp(name, "gate_x") == 0    ? r->d_gate_x
                       : strcmp(name, "logits_in") == 0 ? r->d_logits
                                                        : NULL;
    int64_t got;
    if (!from) return layer_run_gradient(r, name, &got);
    double *gradient = malloc(((size_t)count + 1) * sizeof *gradient);
    ck_assert_ptr_nonnull(gradient);
    for (int64_t i = 0; i < count; i++) gradient[i] = number_at(from, i, r->dtype);
    if (from != r->dx || r->c->p.gate_x || !r->b.d_gate_x) return gradient;
    for (int64_t i = 0; i < count; i++)
        gradient[i] += number_at(r->d_gate_x, i, r->dtype); /* its share by itself */
    return gradient;
}

/* value[2] is L at both sides; what their rounding leaves in the quotient is taken off first.
 * Returns 0 instead of failing if there is `another` direction to try. */
static int agrees(const layer_case *c, int which, int v, const double *value, double product,
                  double scale, int another)
{
    double difference = (value[0] - value[1]) / (2 * STEP);
    double rounding = 4 * DBL_EPSILON * (1 + fabs(value[0])) / STEP;
    double error = fmax(0, fabs(difference - product) - rounding) / fmax(fabs(product), scale);
    char text[512];
    if (error > ALLOWED && another) return 0;
    worst[which][v] = fmax(worst[which][v], error);
    layer_case_print(c, text, sizeof text);
    ck_assert_msg(error <= ALLOWED,
                  "%s: %s by %s: difference %.12g, gradient %.12g, relative error %.3g", text,
                  which ? "library" : "reference", name_of(v), difference, product, error);
    return 1;
}

/* One direction of one variable, for the reference and the library. */
static int check_direction(layer_case *c, int v, const ref_result *want, const layer_run *run,
                           const moe_plan *plan, uint64_t *state, int another)
{
    const double **slot = input_of(&c->p, v), *kept = *slot;
    int64_t count = count_of(c, v);
    double *moved = malloc(((size_t)count + 1) * sizeof *moved),
           *direction = malloc(((size_t)count + 1) * sizeof *direction);
    double *of_library = library_gradient(run, name_of(v), count);
    double value[2][2], by_reference = 0, by_library = 0, size = 0;
    const double *of_reference = gradient_of(want, v);
    ck_assert(moved && direction);
    int is_x = strcmp(name_of(v), "x") == 0;
    for (int64_t i = 0; i < count; i++) {
        direction[i] = random_normal(state);
        double g = of_reference[i] + (is_x && !c->p.gate_x ? want->d_gate_x[i] : 0);
        by_reference += g * direction[i];
        by_library += of_library[i] * direction[i];
        size += g * g;
    }
    for (int side = 0; side < 2; side++) {
        for (int64_t i = 0; i < count; i++)
            moved[i] = kept[i] + (side ? -STEP : STEP) * direction[i];
        *slot = moved;
        value[0][side] = reference_value(c);
        value[1][side] = library_value(c, plan);
        *slot = kept;
    }
    double scale = sqrt(size) + 1e-6;
    int good = agrees(c, 0, v, value[0], by_reference, scale, another) &&
               agrees(c, 1, v, value[1], by_library, scale, another);
    free(moved), free(direction), free(of_library);
    return good;
}

/* Two directions. A step may cross the kink of a ReLU, which makes a difference wrong; a gradient
 * that is wrong is so in every direction. */
static void check_variable(layer_case *c, int v, const ref_result *want, const layer_run *run,
                           const moe_plan *plan, uint64_t *state)
{
    int kinks = c->activation == MOE_ACTIVATION_RELU || c->activation == MOE_ACTIVATION_REGLU;
    for (int turn = 0; turn < 2; turn++)
        for (int left = kinks ? 2 : 0; left >= 0; left--)
            if (check_direction(c, v, want, run, plan, state, left > 0)) break;
}

/* The case as drawn, with what does not change a value left out. */
static void check_case(layer_case *c, uint64_t seed)
{
    layer_run run;
    ref_result want, fixed;
    const moe_plan *used;
    moe_plan *plan = NULL;
    uint64_t state = 77 + seed;
    c->per_call = 0; /* K of the call would not be that of the replay */
    layer_case_make(c, 1000 + seed);
    ref_run(&c->p, &fixed, 0);
    c->p.fixed_ids = fixed.ids, c->p.fixed_keep = fixed.keep;
    ref_run(&c->p, &want, 1);
    layer_run_make(&run, c, MOE_DTYPE_F64, NULL);
    ck_assert_msg(layer_run_forward(&run) == MOE_OK, "%s", moe_last_error());
    ck_assert_msg(layer_run_backward(&run) == MOE_OK, "%s", moe_last_error());
    ck_assert_int_eq(moe_pass_plan(run.pass, &used), MOE_OK);
    ck_assert_int_eq(moe_plan_create(&plan, run.context), MOE_OK);
    ck_assert_int_eq(moe_plan_copy(plan, used), MOE_OK);
    for (int v = 0; v < VARIABLES; v++)
        if (is_used(c, v)) check_variable(c, v, &want, &run, plan, &state);
    moe_plan_destroy(plan);
    layer_run_free(&run);
    c->p.fixed_ids = NULL, c->p.fixed_keep = NULL;
    ref_free(&want), ref_free(&fixed);
    layer_case_free(c);
}

START_TEST(test_gradients_agree_with_central_differences)
{
    layer_case c = layer_cases[_i];
    check_case(&c, (uint64_t)_i);
}
END_TEST

START_TEST(test_gradients_agree_with_central_differences_for_random_configurations)
{
    const char *long_run = getenv("MOE_LONG");
    int count = long_run && long_run[0] == '1' ? 600 : 60;
    uint64_t state = 4052;
    for (int i = 0; i < count; i++) {
        layer_case c = layer_case_draw(&state);
        if (c.replay == 2)
            c.renormalize_after_drop = 0; /* entry_weight_grad is by the weights after it */
        if (c.E * c.D * c.F > 2000 && !c.expert_groups) c.E = 3, c.K = c.K > 3 ? 3 : c.K;
        if (c.E * c.D * c.F > 2000) c.D = c.F = 7;
        check_case(&c, 5000 + (uint64_t)i);
    }
}
END_TEST

/* ---- the library's own check ----------------------------------------------------------------- */

static char report_text[8192];

static void keep_errors(void *user, int32_t level, const char *message)
{
    (void)user;
    size_t used = strlen(report_text);
    if (level == MOE_LOG_ERROR)
        (void)snprintf(report_text + used, sizeof report_text - used, "%s\n", message);
}

/* moe_check_gradients of a layer like each case's: every parameter it has is compared. */
START_TEST(test_own_check_agrees_for_every_configuration)
{
    layer_case c = layer_cases[_i];
    layer_run r;
    moe_gradient_check check;
    moe_gradient_report report;
    if (c.no_experts || c.no_gate == 2) return; /* there is no layer */
    c.bound = 0;
    layer_case_make(&c, 12);
    layer_run_make(&r, &c, MOE_DTYPE_F32, NULL);
    MUST(moe_gradient_check_init(&check, sizeof check));
    MUST(moe_gradient_report_init(&report, sizeof report));
    check.tokens = 15, check.groups = c.groups > 3 ? 3 : c.groups > 0 ? c.groups : 1;
    check.probes = 8, check.train = !c.eval, check.report = keep_errors;
    report_text[0] = 0;
    moe_status status = moe_check_gradients(r.layer, &check, &report);
    ck_assert_msg(status == MOE_OK, "%s: %s\n%s", c.name, moe_last_error(), report_text);
    ck_assert_int_eq(report.disagreements, 0);
    int64_t trained = 0, count = moe_layer_parameter_count(r.layer);
    for (int64_t i = 0; i < count; i++) {
        moe_parameter_record record;
        MUST(moe_parameter_record_init(&record, sizeof record));
        MUST(moe_layer_parameter(r.layer, i, &record));
        trained += record.trainable;
    }
    ck_assert_msg(report.tensors > trained, "%s: %lld tensors of %lld parameters and inputs",
                  c.name, (long long)report.tensors, (long long)trained);
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

/* By the weights of a plan: y is linear in them, so the difference is exact but for rounding. */
START_TEST(test_gradients_of_entry_weights_agree_with_central_differences)
{
    layer_case c = {.name = "entry weights",
                    .T = 12,
                    .D = 7,
                    .E = 5,
                    .F = 6,
                    .K = 3,
                    .activation = MOE_ACTIVATION_SWIGLU,
                    .layer_sigmoid = 1};
    layer_run r;
    uint64_t state = 5;
    double weights[36], direction[36], value[2], product = 0;
    int32_t ids[36];
    moe_plan_args a;
    moe_plan *plan = NULL;
    layer_case_make(&c, 3);
    layer_run_make(&r, &c, MOE_DTYPE_F64, NULL);
    ck_assert_int_eq(moe_plan_create(&plan, r.context), MOE_OK);
    ck_assert_int_eq(moe_plan_args_init(&a, sizeof a), MOE_OK);
    for (int n = 0; n < 36; n++) {
        ids[n] = (int32_t)(random_uniform(&state) * 6) -
                 1; /* some are none, some twice in a token */
        weights[n] = random_normal(&state);
        direction[n] = random_normal(&state);
    }
    a.tokens = 12, a.num_experts = 5, a.top_k = 3, a.expert_ids = ids, a.dtype = MOE_DTYPE_F64;
    r.f.plan = plan;
    r.b.d_logits_out = NULL;
    for (int side = 2; side >= 0; side--) { /* the last one is the point itself */
        double moved[36];
        for (int n = 0; n < 36; n++)
            moved[n] = weights[n] + (side == 2 ? 1e-5 : side == 1 ? -1e-5 : 0) * direction[n];
        a.weights = moved;
        ck_assert_int_eq(moe_plan_build(plan, &a), MOE_OK);
        ck_assert_msg(layer_run_forward(&r) == MOE_OK, "%s", moe_last_error());
        double sum = 0;
        for (int64_t i = 0; i < 12 * 7; i++) sum += ((double *)r.y)[i] * c.p.dy[i];
        if (side > 0) value[side - 1] = sum;
    }
    ck_assert_msg(layer_run_backward(&r) == MOE_OK, "%s", moe_last_error());
    for (int n = 0; n < 36; n++) {
        if (ids[n] < 0) ck_assert_double_eq(((double *)r.entry_grad)[n], 0);
        product += ((double *)r.entry_grad)[n] * direction[n];
    }
    ck_assert_double_le(fabs((value[1] - value[0]) / 2e-5 - product), 1e-6 * fabs(product));
    moe_plan_destroy(plan);
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

/* ---- exact identities ------------------------------------------------------------------------ */

static double dot(const double *a, const double *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* y is linear in W2 and b2, and for gated experts in W3 and b3: a step of any length gives the
 * gradient. */
START_TEST(test_gradients_of_linear_parts_are_adjoint)
{
    static const char *const used[] = {"dW3", "db3", "dW2", "db2"};
    layer_case c = {.name = "adjoint",
                    .T = 30,
                    .D = 7,
                    .E = 5,
                    .F = 6,
                    .K = 3,
                    .O = 4,
                    .order = 1,
                    .expert_bias = 1,
                    .activation = MOE_ACTIVATION_GEGLU_TANH,
                    .groups = 2,
                    .capacity_kind = MOE_CAPACITY_NUMBER,
                    .capacity = 7};
    layer_run r;
    uint64_t state = 8;
    layer_case_make(&c, 3);
    layer_run_make(&r, &c, MOE_DTYPE_F64, NULL);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    double before = dot(r.y, c.p.dy, c.T * c.p.O);
    for (size_t u = 0; u < sizeof used / sizeof *used; u++) {
        int v = INPUTS;
        while (strcmp(name_of(v), used[u]) != 0) ck_assert_int_lt(++v, VARIABLES);
        const double **slot = input_of(&c.p, v), *kept = *slot;
        int64_t count = count_of(&c, v), got;
        double *gradient = layer_run_gradient(&r, name_of(v), &got),
               *moved = malloc((size_t)count * sizeof *moved);
        ck_assert_ptr_nonnull(moved);
        ck_assert_int_eq(got, count);
        double product = 0;
        for (int64_t i = 0; i < count; i++) {
            double d = 3 * random_normal(&state);
            moved[i] = kept[i] + d;
            product += gradient[i] * d;
        }
        *slot = moved;
        layer_run_set_parameters(&r, &c.p);
        MUST(layer_run_forward(&r));
        double difference = dot(r.y, c.p.dy, c.T * c.p.O) - before;
        ck_assert_msg(fabs(difference - product) <= 1e-11 * (fabs(before) + fabs(product)),
                      "%s: %.17g, want %.17g", name_of(v), difference, product);
        *slot = kept;
        layer_run_set_parameters(&r, &c.p);
        free(gradient), free(moved);
    }
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

/* logits = x Wg + b:  <dWg, V> = <d_logits, x V>,  <dx, v> = <d_logits, v Wg>,  dbg = sum_t
 * d_logits. */
START_TEST(test_gradients_of_logits_are_adjoint)
{
    layer_case c = {.name = "adjoint",
                    .T = 30,
                    .D = 7,
                    .E = 5,
                    .F = 1,
                    .K = 3,
                    .router_bias = 1,
                    .no_experts = 1,
                    .weight = {0.3, 0, 0.2, 0.1, 0.1, 0.4}};
    layer_run r;
    uint64_t state = 8;
    double V[35], v[210], left[3] = {0}, right[3] = {0};
    int64_t count;
    layer_case_make(&c, 3);
    layer_run_make(&r, &c, MOE_DTYPE_F64, NULL);
    MUST(layer_run_forward(&r));
    MUST(layer_run_backward(&r));
    double *dWg = layer_run_gradient(&r, "dWg", &count),
           *dbg = layer_run_gradient(&r, "dbg", &count);
    const double *d_logits = r.d_logits, *x = r.x;
    for (int i = 0; i < 35; i++) V[i] = random_normal(&state);
    for (int i = 0; i < 210; i++) v[i] = random_normal(&state);
    left[0] = dot(dWg, V, 35), left[1] = dot(r.dx, v, 210), left[2] = dot(dbg, V, 5);
    for (int t = 0; t < 30; t++)
        for (int e = 0; e < 5; e++) {
            double g = d_logits[t * 5 + e];
            for (int d = 0; d < 7; d++) {
                right[0] += g * x[t * 7 + d] * V[d * 5 + e];
                right[1] += g * v[t * 7 + d] * c.p.Wg[d * 5 + e];
            }
            right[2] += g * V[e];
        }
    for (int i = 0; i < 3; i++) ck_assert_double_eq_tol(left[i], right[i], 1e-12);
    free(dWg), free(dbg);
    layer_run_free(&r);
    layer_case_free(&c);
}
END_TEST

static void print_worst(void)
{
    const char *verbose = getenv("MOE_VERBOSE");
    if (!verbose || verbose[0] != '1') return;
    printf("%-12s %12s %12s\n", "by", "reference", "library");
    for (int v = 0; v < VARIABLES; v++)
        printf("%-12s %12.2e %12.2e\n", name_of(v), worst[0][v], worst[1][v]);
}

int main(void)
{
    Suite *suite = suite_create("gradients");
    TCase *tests = tcase_create("central differences");
    tcase_set_timeout(tests, 600);
    tcase_add_loop_test(tests, test_gradients_agree_with_central_differences, 0, LAYER_CASES);
    tcase_add_loop_test(tests, test_own_check_agrees_for_every_configuration, 0, LAYER_CASES);
    tcase_add_test(tests, test_gradients_of_entry_weights_agree_with_central_differences);
    tcase_add_test(tests, test_gradients_agree_with_central_differences_for_random_configurations);
    tcase_add_test(tests, test_gradients_of_linear_parts_are_adjoint);
    tcase_add_test(tests, test_gradients_of_logits_are_adjoint);
    suite_add_tcase(suite, tests);
    int failed = run_suite(suite, 0);
    print_worst();
    return failed;
}
