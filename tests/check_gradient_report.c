/* check_gradient_report.c - moe_check_gradients: it passes where gradients are right, for every
 * kind of layer; it finds each planted error and says where; and it refuses nonsense.
 *
 * Errors are planted by standing in for moe_layer_backward (the linker's --wrap): after the real
 * one, one gradient of the library's own f64 copy is spoiled. */
#include "support/suite.h"

#include <moe/moe.h>

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- planting -------------------------------------------------------------------------------- */

static struct planted {
    const char *name; /* a parameter, "x", "gate_x", "logits" or "weights"; NULL: nothing */
    int64_t index;
    double factor, plus;
} planted;

moe_status __real_moe_layer_backward(moe_layer *layer, moe_pass *pass, const moe_backward_args *a);
moe_status __wrap_moe_layer_backward(moe_layer *layer, moe_pass *pass, const moe_backward_args *a);

moe_status __wrap_moe_layer_backward(moe_layer *layer, moe_pass *pass, const moe_backward_args *a)
{
    moe_status status = __real_moe_layer_backward(layer, pass, a);
    double *grad = NULL;
    if (status != MOE_OK || !planted.name) return status;
    int64_t i = moe_layer_parameter_find(layer, planted.name);
    if (strcmp(planted.name, "x") == 0) grad = a->dx;
    if (strcmp(planted.name, "gate_x") == 0) grad = a->d_gate_x;
    if (strcmp(planted.name, "logits") == 0) grad = a->d_logits_out;
    if (strcmp(planted.name, "weights") == 0) grad = a->entry_weight_grad;
    if (i >= 0) {
        moe_parameter_record p;
        ck_assert_int_eq(moe_parameter_record_init(&p, sizeof p), MOE_OK);
        ck_assert_int_eq(moe_layer_parameter(layer, i, &p), MOE_OK);
        grad = p.grad;
    }
    ck_assert_ptr_nonnull(grad);
    if (planted.index < 0) { /* the largest of `-index` elements */
        int64_t count = -planted.index;
        planted.index = 0;
        for (int64_t j = 1; j < count; j++)
            if (fabs(grad[j]) > fabs(grad[planted.index])) planted.index = j;
    }
    grad[planted.index] = grad[planted.index] * planted.factor + planted.plus;
    return status;
}

/* ---- layers ---------------------------------------------------------------------------------- */

typedef struct subject {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
} subject;

enum { D = 12, F = 10, E = 6 };

static moe_gate_config gate_config(void)
{
    moe_gate_config g;
    ck_assert_int_eq(moe_gate_config_init(&g, sizeof g), MOE_OK);
    g.d_model = D, g.num_experts = E, g.top_k = 2;
    return g;
}

static moe_experts_config experts_config(void)
{
    moe_experts_config e;
    ck_assert_int_eq(moe_experts_config_init(&e, sizeof e), MOE_OK);
    e.d_model = D, e.d_hidden = F, e.num_experts = E;
    return e;
}

static subject make(const moe_gate_config *g, const moe_experts_config *e, int32_t output)
{
    subject s = {0};
    moe_layer_config l;
    ck_assert_int_eq(moe_context_create(&s.context, NULL), MOE_OK);
    if (g) ck_assert_int_eq(moe_gate_create(&s.gate, s.context, g), MOE_OK);
    ck_assert_int_eq(moe_experts_create(&s.experts, s.context, e), MOE_OK);
    ck_assert_int_eq(moe_layer_config_init(&l, sizeof l), MOE_OK);
    l.gate = s.gate, l.experts = s.experts, l.output = output, l.layer_id = 3;
    ck_assert_int_eq(moe_layer_create(&s.layer, &l), MOE_OK);
    ck_assert_int_eq(moe_layer_init_parameters(s.layer, 5), MOE_OK);
    return s;
}

static void drop(subject *s)
{
    moe_layer_destroy(s->layer);
    moe_experts_destroy(s->experts);
    moe_gate_destroy(s->gate);
    moe_context_destroy(s->context);
}

/* The kinds of layer that are checked; each must agree everywhere. */
static subject make_kind(int kind)
{
    moe_gate_config g = gate_config();
    moe_experts_config e = experts_config();
    switch (kind) {
    case 0: /* the 2017 layer */
        g.kind = MOE_GATE_NOISY_TOP_K, g.importance_weight = g.load_weight = 0.3;
        return make(&g, &e, MOE_OUTPUT_SIGMOID);
    case 1: /* fused GLU with biases, torch's order, capacity, three losses */
        g.order = MOE_ORDER_SCORE_THEN_SELECT, g.renormalize = 1, g.bias = 1;
        g.switch_weight = 0.1, g.z_weight = 0.05, g.sequence_weight = 0.2;
        g.capacity_kind = MOE_CAPACITY_FACTOR, g.renormalize_after_drop = 1;
        e.activation = MOE_ACTIVATION_SWIGLU, e.bias = 1, e.glu_order = MOE_GLU_INTERLEAVED;
        e.weight_layout = MOE_WEIGHT_OUT_IN, e.d_out = 7;
        return make(&g, &e, MOE_OUTPUT_LINEAR);
    case 2: /* the gate sees another tensor */
        g.d_model = 5, g.score = MOE_SCORE_SIGMOID, g.order = MOE_ORDER_SCORE_THEN_SELECT;
        g.gshard_weight = 0.5;
        e.activation = MOE_ACTIVATION_GEGLU_ERF, e.output = MOE_OUTPUT_SIGMOID;
        return make(&g, &e, MOE_OUTPUT_LINEAR);
    case 3: /* the host computes the logits */
        g.d_model = 0, g.z_weight = 0.1;
        e.activation = MOE_ACTIVATION_GELU_TANH;
        return make(&g, &e, MOE_OUTPUT_LINEAR);
    case 4: /* no gate */ e.activation = MOE_ACTIVATION_SILU; return make(NULL, &e, 0);
    default: /* f64, all experts, host memory */
        g.kind = MOE_GATE_SOFTMAX_DENSE, g.top_k = 1, g.dtype = e.dtype = MOE_DTYPE_F64;
        g.importance_weight = 1;
        return make(&g, &e, MOE_OUTPUT_LINEAR);
    }
}
enum { KINDS = 6 };

static const char *const tensors_of[KINDS][8] = {
    {"x", "gate.weight", "gate.noise_weight", "experts.w1", "experts.w2", NULL},
    {"x", "gate.weight", "gate.bias", "experts.w13", "experts.b13", "experts.w2", "experts.b2",
     NULL},
    {"x", "gate_x", "gate.weight", "experts.w1", "experts.w3", "experts.w2", NULL},
    {"x", "logits", "experts.w1", "experts.w2", NULL},
    {"x", "weights", "experts.w1", "experts.w2", NULL},
    {"x", "gate.weight", "experts.w1", "experts.w2", NULL}};

/* ---- what it says ---------------------------------------------------------------------------- */

typedef struct lines {
    char text[4096];
    int count, errors;
} lines;

static void take_line(void *user, int32_t level, const char *text)
{
    lines *l = user;
    size_t used = strlen(l->text);
    l->count++;
    l->errors += level == MOE_LOG_ERROR;
    ck_assert_ptr_null(strchr(text, '\n'));
    (void)snprintf(l->text + used, sizeof l->text - used, "%s\n", text);
}

static moe_gradient_check question(lines *l)
{
    moe_gradient_check c;
    ck_assert_int_eq(moe_gradient_check_init(&c, sizeof c), MOE_OK);
    memset(l, 0, sizeof *l);
    c.report = take_line, c.report_user = l;
    return c;
}

static moe_gradient_report empty_report(void)
{
    moe_gradient_report r;
    ck_assert_int_eq(moe_gradient_report_init(&r, sizeof r), MOE_OK);
    return r;
}

/* ---- tests ----------------------------------------------------------------------------------- */

START_TEST(test_report_agrees_for_each_kind_of_layer)
{
    subject s = make_kind(_i);
    lines l;
    int count = 0;
    for (int32_t train = 0; train < 2; train++) {
        moe_gradient_check c = question(&l);
        moe_gradient_report r = empty_report();
        c.train = train, c.groups = 3, c.probes = 40;
        moe_status status = moe_check_gradients(s.layer, &c, &r);
        ck_assert_msg(status == MOE_OK, "kind %d: %s\n%s", _i, moe_last_error(), l.text);
        for (count = 0; tensors_of[_i][count]; count++)
            ck_assert_msg(strstr(l.text, tensors_of[_i][count]), "no line of %s:\n%s",
                          tensors_of[_i][count], l.text);
        ck_assert_int_eq(r.tensors, count);
        ck_assert_int_eq(l.count, count + 3);
        ck_assert_int_eq(l.errors, 0);
        ck_assert_int_eq(r.disagreements, 0);
        ck_assert_int_eq(r.kinks, 0);
        ck_assert(r.probes > 20 * count && r.worst <= 1e-6 && r.worst_name != NULL);
        ck_assert(fabs(r.worst_gradient - r.worst_difference) < 1e-3);
    }
    drop(&s);
}
END_TEST

/* Every tensor of every kind, spoiled by 1e-4 in the largest of its first E elements. */
START_TEST(test_report_finds_a_small_error_in_each_tensor)
{
    for (int i = 0; tensors_of[_i][i]; i++) {
        subject s = make_kind(_i);
        lines l;
        moe_gradient_check c = question(&l);
        moe_gradient_report r = empty_report();
        char where[32];
        c.probes = 0, c.tokens = 16;
        planted = (struct planted){tensors_of[_i][i], -E, 1.0001, 0};
        ck_assert_msg(moe_check_gradients(s.layer, &c, &r) == MOE_ERROR_WRONG_GRADIENT,
                      "kind %d: an error in %s was not found", _i, planted.name);
        ck_assert_str_eq(r.worst_name, planted.name);
        ck_assert_int_eq(r.worst_index, planted.index);
        ck_assert_int_eq(r.disagreements, 1);
        ck_assert_ptr_nonnull(strstr(moe_last_error(), planted.name));
        (void)snprintf(where, sizeof where, "[%lld]", (long long)planted.index);
        ck_assert_ptr_nonnull(strstr(moe_last_error(), where));
        ck_assert_ptr_nonnull(strstr(l.text, "DISAGREES"));
        ck_assert(l.errors >= 2);
        planted.name = NULL;
        drop(&s);
    }
}
END_TEST

START_TEST(test_report_probes_the_largest_gradients)
{
    subject s = make_kind(0);
    lines l;
    moe_gradient_check c = question(&l);
    moe_gradient_report r = empty_report();
    planted = (struct planted){"experts.w2", 700, 0, 1e6}; /* by chance 4 of 720 would miss it */
    c.probes = 4;
    ck_assert_int_eq(moe_check_gradients(s.layer, &c, &r), MOE_ERROR_WRONG_GRADIENT);
    ck_assert_int_eq(r.worst_index, 700);
    ck_assert(r.worst_gradient == 1e6);
    planted.name = NULL;
    drop(&s);
}
END_TEST

START_TEST(test_report_nan_gradient_disagrees)
{
    subject s = make_kind(0);
    lines l;
    moe_gradient_check c = question(&l);
    moe_gradient_report r = empty_report();
    planted = (struct planted){"x", 3, NAN, 0};
    c.probes = 0;
    ck_assert_int_eq(moe_check_gradients(s.layer, &c, &r), MOE_ERROR_WRONG_GRADIENT);
    ck_assert_int_eq(r.worst_index, 3);
    planted.name = NULL;
    drop(&s);
}
END_TEST

/* Zero weights and biases put every ReLU exactly on its kink: left out, not called wrong. */
START_TEST(test_report_leaves_kinks_out)
{
    moe_experts_config e = experts_config();
    lines l;
    e.bias = 1;
    subject s = make(NULL, &e, 0);
    moe_gradient_check c = question(&l);
    moe_gradient_report r = empty_report();
    int64_t w1 = moe_layer_parameter_find(s.layer, "experts.w1");
    moe_parameter_record p;
    ck_assert_int_eq(moe_parameter_record_init(&p, sizeof p), MOE_OK);
    ck_assert_int_eq(moe_layer_parameter(s.layer, w1, &p), MOE_OK);
    memset(p.data, 0, (size_t)p.element_count * sizeof(float));
    c.parameters = MOE_CHECK_CURRENT, c.probes = 0;
    ck_assert_msg(moe_check_gradients(s.layer, &c, &r) == MOE_OK, "%s\n%s", moe_last_error(),
                  l.text);
    ck_assert(r.kinks > 0);
    planted = (struct planted){"experts.b2", 0, 1, 1e-3}; /* the smooth ones are still compared */
    ck_assert_int_eq(moe_check_gradients(s.layer, &c, &r), MOE_ERROR_WRONG_GRADIENT);
    planted = (struct planted){"experts.b1", 0, NAN, 0}; /* no number is no subgradient */
    ck_assert_int_eq(moe_check_gradients(s.layer, &c, &r), MOE_ERROR_WRONG_GRADIENT);
    planted.name = NULL;
    drop(&s);
}
END_TEST

/* The same numbers in another layout, bound with strides and per expert, give the same report. */
START_TEST(test_report_current_reads_bound_memory)
{
    moe_experts_config e = experts_config();
    moe_gate_config g = gate_config();
    g.kind = MOE_GATE_NOISY_TOP_K;
    subject s = make(&g, &e, 0);
    lines l;
    char plain[4096];
    moe_gradient_check c = question(&l);
    static float memory[E][D][2 * F], list_memory[E][F * D];
    const void *list[E];
    moe_parameter_record p;
    moe_binding b;
    c.parameters = MOE_CHECK_CURRENT;
    ck_assert_int_eq(moe_check_gradients(s.layer, &c, NULL), MOE_OK);
    memcpy(plain, l.text, sizeof plain);
    for (int which = 0; which < 2; which++) {
        int64_t i = moe_layer_parameter_find(s.layer, which ? "experts.w2" : "experts.w1");
        ck_assert_int_eq(moe_parameter_record_init(&p, sizeof p), MOE_OK);
        ck_assert_int_eq(moe_layer_parameter(s.layer, i, &p), MOE_OK);
        ck_assert_int_eq(moe_binding_init(&b, sizeof b), MOE_OK);
        const float *from = p.data;
        for (int n = 0; n < E * D * F; n++) {
            if (which)
                list_memory[n / (F * D)][n % (F * D)] = from[n];
            else
                memory[n / (D * F)][n / F % D][2 * (n % F)] = from[n];
        }
        for (int expert = 0; expert < E; expert++) list[expert] = list_memory[expert];
        if (which) b.data_per_expert = list;
        if (!which)
            b.data = memory, b.data_stride[0] = 2 * D * F, b.data_stride[1] = 2 * F,
            b.data_stride[2] = 2;
        ck_assert_int_eq(moe_layer_bind(s.layer, i, &b), MOE_OK);
    }
    memset(&l, 0, sizeof l);
    ck_assert_int_eq(moe_check_gradients(s.layer, &c, NULL), MOE_OK);
    ck_assert_str_eq(l.text, plain);
    memory[0][0][0] += 1; /* and they are what is used */
    memset(&l, 0, sizeof l);
    ck_assert_int_eq(moe_check_gradients(s.layer, &c, NULL), MOE_OK);
    ck_assert_str_ne(l.text, plain);
    drop(&s);
}
END_TEST

START_TEST(test_report_leaves_the_layer_alone)
{
    subject s = make_kind(1);
    moe_gradient_report r = empty_report();
    moe_parameter_record p;
    uint8_t touched[E];
    ck_assert_int_eq(moe_check_gradients(s.layer, NULL, &r), MOE_OK);
    for (int64_t i = 0; i < moe_layer_parameter_count(s.layer); i++) {
        ck_assert_int_eq(moe_parameter_record_init(&p, sizeof p), MOE_OK);
        ck_assert_int_eq(moe_layer_parameter(s.layer, i, &p), MOE_OK);
        for (int64_t j = 0; j < p.element_count; j++) ck_assert(((float *)p.grad)[j] == 0);
    }
    int64_t count = -1;
    ck_assert_int_eq(moe_experts_touched(s.experts, touched, &count), MOE_OK);
    ck_assert_int_eq(count, 0);
    drop(&s);
}
END_TEST

START_TEST(test_report_refuses_nonsense)
{
    subject s = make_kind(0);
    lines l;
    moe_gradient_report r = empty_report();
    moe_gradient_check good = question(&l);
    const struct {
        size_t offset;
        int kind; /* 0 int64, 1 int32, 2 double */
        double value;
        const char *says;
    } bad[] = {{offsetof(moe_gradient_check, tokens), 0, 0, "tokens is 0"},
               {offsetof(moe_gradient_check, groups), 0, 33, "groups is 33"},
               {offsetof(moe_gradient_check, groups), 0, 0, "groups is 0"},
               {offsetof(moe_gradient_check, probes), 0, -1, "probes is -1"},
               {offsetof(moe_gradient_check, parameters), 1, 2, "parameters is 2"},
               {offsetof(moe_gradient_check, train), 1, 5, "train is 5"},
               {offsetof(moe_gradient_check, step), 2, 0, "step is 0"},
               {offsetof(moe_gradient_check, step), 2, INFINITY, "step is inf"},
               {offsetof(moe_gradient_check, tolerance), 2, -1, "tolerance is -1"},
               {offsetof(moe_gradient_check, tolerance), 2, NAN, "tolerance is"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        moe_gradient_check c = good;
        char *at = (char *)&c + bad[i].offset;
        int64_t wide = (int64_t)(bad[i].kind == 0 ? bad[i].value : 0);
        int32_t narrow = (int32_t)(bad[i].kind == 1 ? bad[i].value : 0);
        if (bad[i].kind == 0) memcpy(at, &wide, sizeof wide);
        if (bad[i].kind == 1) memcpy(at, &narrow, sizeof narrow);
        if (bad[i].kind == 2) memcpy(at, &bad[i].value, sizeof bad[i].value);
        ck_assert_int_eq(moe_check_gradients(s.layer, &c, &r), MOE_ERROR_INVALID_ARGUMENT);
        ck_assert_msg(strstr(moe_last_error(), bad[i].says), "%s", moe_last_error());
    }
    ck_assert_int_eq(moe_check_gradients(NULL, &good, &r), MOE_ERROR_INVALID_ARGUMENT);
    good.struct_size = 3;
    ck_assert_int_eq(moe_check_gradients(s.layer, &good, &r), MOE_ERROR_STRUCT_SIZE);
    r.struct_size = 0;
    ck_assert_int_eq(moe_check_gradients(s.layer, NULL, &r), MOE_ERROR_STRUCT_SIZE);
    ck_assert_int_eq(l.count, 0);
    drop(&s);
}
END_TEST

START_TEST(test_report_needs_bound_parameters_only_for_current)
{
    moe_experts_config e = experts_config();
    e.parameters = MOE_PARAMETERS_BOUND;
    subject s = make(NULL, &e, 0);
    lines l;
    moe_gradient_check c = question(&l);
    ck_assert_int_eq(moe_check_gradients(s.layer, &c, NULL), MOE_OK);
    c.parameters = MOE_CHECK_CURRENT;
    ck_assert_int_eq(moe_check_gradients(s.layer, &c, NULL), MOE_ERROR_INVALID_STATE);
    drop(&s);
}
END_TEST

/* Every n-th allocation fails once: the call says so, and nothing leaks. */
static int left, live;
static void *alloc(void *user, uint64_t size, uint64_t alignment)
{
    (void)user;
    if (left-- == 0) return NULL;
    live++;
    return aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
}
static void give_back(void *user, void *memory, uint64_t size)
{
    (void)user, (void)size;
    live--;
    free(memory);
}

START_TEST(test_report_survives_each_failed_allocation)
{
    moe_context_config c;
    moe_experts_config e = experts_config();
    moe_gate_config g = gate_config();
    moe_layer_config l;
    subject s = {0};
    int failed = 0;
    ck_assert_int_eq(moe_context_config_init(&c, sizeof c), MOE_OK);
    c.alloc = alloc, c.free = give_back;
    left = 1 << 30;
    ck_assert_int_eq(moe_context_create(&s.context, &c), MOE_OK);
    ck_assert_int_eq(moe_gate_create(&s.gate, s.context, &g), MOE_OK);
    ck_assert_int_eq(moe_experts_create(&s.experts, s.context, &e), MOE_OK);
    ck_assert_int_eq(moe_layer_config_init(&l, sizeof l), MOE_OK);
    l.gate = s.gate, l.experts = s.experts;
    ck_assert_int_eq(moe_layer_create(&s.layer, &l), MOE_OK);
    int before = live;
    for (int n = 0;; n++, failed++) {
        left = n;
        moe_status status = moe_check_gradients(s.layer, NULL, NULL);
        ck_assert_int_eq(live, before);
        if (status == MOE_OK) break;
        ck_assert_int_eq(status, MOE_ERROR_OUT_OF_MEMORY);
    }
    ck_assert_int_gt(failed, 8);
    left = 1 << 30;
    drop(&s);
    ck_assert_int_eq(live, 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("gradient report");
    TCase *cases = tcase_create("all");
    tcase_set_timeout(cases, 120);
    tcase_add_loop_test(cases, test_report_agrees_for_each_kind_of_layer, 0, KINDS);
    tcase_add_loop_test(cases, test_report_finds_a_small_error_in_each_tensor, 0, KINDS);
    tcase_add_test(cases, test_report_probes_the_largest_gradients);
    tcase_add_test(cases, test_report_nan_gradient_disagrees);
    tcase_add_test(cases, test_report_leaves_kinks_out);
    tcase_add_test(cases, test_report_current_reads_bound_memory);
    tcase_add_test(cases, test_report_leaves_the_layer_alone);
    tcase_add_test(cases, test_report_refuses_nonsense);
    tcase_add_test(cases, test_report_needs_bound_parameters_only_for_current);
    if (COUNTS_HOLD) tcase_add_test(cases, test_report_survives_each_failed_allocation);
    suite_add_tcase(suite, cases);
    return run_suite(suite, 1);
}
