/* check_preset.c - each preset by the formulas of its source, computed here in double from a table
 * of its own, and moe_describe. */
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { T = 24, D = 8, F = 6, E = 16 };

/* ---- what the sources say -------------------------------------------------------------------- */

enum { RELU, GELU, SWIGLU, CLAMPED };
enum { DROPLESS, BY_TOKEN, BY_CHOICE, AT_RANDOM };

typedef struct source {
    const char *name;
    int K;
    int sigmoid;     /* scores: sigmoid of the logit, else softmax */
    int over_all;    /* softmax over all experts, else over the chosen */
    int renormalize; /* 1 before the drop, 2 after it */
    double epsilon, scale;
    int groups, top_groups, group_sum;
    int router_bias, selection_bias;
    int policy; /* and the capacity of 24 tokens outside training: */
    int rows;
    int activation, expert_bias, on_input, shared_gate, residual_mix;
    double loss[7]; /* importance, load, switch, gshard, z, sequence, threshold */
} source;

static const source SOURCES[] = {
    {"shazeer2017", .K = 4, .loss = {0.1, 0.1}},
    {"hierarchical2017", .K = 2, .loss = {0.1, 0.1}},
    {"balanced2017", .K = 4, .over_all = 1, .loss = {0, 0, 0, 0, 0, 0, 1}},
    {"multimodel", .K = 4, .loss = {0.01, 0.01}},
    {"gshard", .K = 2, .over_all = 1, .renormalize = 1, .epsilon = 1e-9, .policy = BY_CHOICE,
     .rows = 4, .loss = {0, 0, 0, 0.01}}, /* max(4, floor(2 24 / 16)) */
    {"switch", .K = 1, .over_all = 1, .policy = BY_TOKEN, .rows = 4, .loss = {0, 0, 0.01}},
    {"deepspeed_top1", .K = 1, .over_all = 1, .policy = AT_RANDOM, .rows = 4, .loss = {0, 0, 0.01}},
    {"deepspeed_top2", .K = 2, .over_all = 1, .renormalize = 2, .policy = BY_CHOICE, .rows = 4,
     .loss = {0, 0, 0, 0.01}},
    {"prmoe", .K = 1, .over_all = 1, .policy = AT_RANDOM, .rows = 4, .residual_mix = 1,
     .loss = {0, 0, 0.01}},
    {"tutel", .K = 2, .over_all = 1, .renormalize = 1, .policy = BY_CHOICE, .rows = 4,
     .loss = {0, 0, 0, 0.01}}, /* 2 int(1.0 ceil(24 / 16)) */
    {"megablocks", .K = 1, .over_all = 1, .activation = GELU, .loss = {0, 0, 0.1}},
    {"mixtral", .K = 2, .activation = SWIGLU, .loss = {0, 0, 0.04}},
    {"dbrx", .K = 4, .over_all = 1, .renormalize = 1, .activation = SWIGLU, .loss = {0, 0, 0.2}},
    {"olmoe", .K = 8, .over_all = 1, .activation = SWIGLU, .loss = {0, 0, 0.01, 0, 0.001}},
    {"qwen2", .K = 4, .over_all = 1, .activation = SWIGLU, .shared_gate = 1, .loss = {0, 0, 0.004}},
    {"qwen3", .K = 8, .over_all = 1, .renormalize = 1, .activation = SWIGLU, .loss = {0, 0, 0.008}},
    {"deepseek_v2", .K = 6, .over_all = 1, .scale = 16, .groups = 8, .top_groups = 3,
     .group_sum = 1, .activation = SWIGLU, .loss = {0, 0, 0, 0, 0, 0.003}},
    {"deepseek_v3", .K = 8, .sigmoid = 1, .renormalize = 1, .epsilon = 1e-20, .scale = 2.5,
     .groups = 8, .top_groups = 4, .group_sum = 2, .selection_bias = 1, .activation = SWIGLU,
     .loss = {0, 0, 0, 0, 0, 1e-4}},
    {"gpt_oss", .K = 4, .router_bias = 1, .activation = CLAMPED, .expert_bias = 1},
    {"llama4", .K = 1, .sigmoid = 1, .activation = SWIGLU, .on_input = 1},
};

/* ---- a layer of a preset --------------------------------------------------------------------- */

enum { PARAMETERS = 32 };

typedef struct made {
    const source *s;
    moe_context *context;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    moe_gate *gate;
    moe_experts *experts, *shared, *residual;
    moe_layer *layer;
    moe_pass *pass;
    scalar lib_x[T * D], lib_y[T * D];
    double x[T * D], y[T * D], *value[PARAMETERS]; /* the same, and the parameters, in double */
    moe_plan_view v;
    double gates[T * E]; /* what the plan says, scattered */
} made;

static void draw_parameters(made *m)
{
    moe_parameter_record p;
    uint64_t state = 3;
    MUST(moe_parameter_record_init(&p, sizeof p));
    for (int64_t i = 0; i < moe_layer_parameter_count(m->layer); i++) {
        MUST(moe_layer_parameter(m->layer, i, &p));
        double scale = p.kind == MOE_KIND_THRESHOLD ? 0 : p.kind == MOE_KIND_BUFFER ? 0.2 : 1;
        ck_assert_int_lt(i, PARAMETERS);
        m->value[i] = calloc((size_t)p.element_count, sizeof(double));
        ck_assert_ptr_nonnull(m->value[i]);
        for (int64_t j = 0; j < p.element_count; j++)
            m->value[i][j] = (double)(((scalar *)p.data)[j] = (scalar)(scale *
                                                                       random_normal(&state)));
    }
}

static void make(made *m, const source *s)
{
    uint64_t state = 91;
    memset(m, 0, sizeof *m);
    m->s = s, m->context = new_context();
    MUST(moe_gate_config_init(&m->g, sizeof m->g));
    MUST(moe_experts_config_init(&m->e, sizeof m->e));
    MUST(moe_layer_config_init(&m->l, sizeof m->l));
    MUST(moe_plan_view_init(&m->v, sizeof m->v));
    m->g.d_model = m->e.d_model = D, m->e.d_hidden = F, m->g.num_experts = m->e.num_experts = E;
    m->g.dtype = m->e.dtype = REAL;
    if (strcmp(s->name, "hierarchical2017") == 0) m->g.expert_groups = 4;
    MUST(moe_preset(s->name, &m->g, &m->e, &m->l));
    MUST(moe_gate_create(&m->gate, m->context, &m->g));
    MUST(moe_experts_create(&m->experts, m->context, &m->e));
    moe_experts_config one = m->e;
    one.num_experts = 1, one.weight_position = MOE_WEIGHT_ON_OUTPUT;
    if (s->shared_gate) MUST(moe_experts_create(&m->shared, m->context, &one));
    if (s->residual_mix) MUST(moe_experts_create(&m->residual, m->context, &one));
    m->l.gate = m->gate, m->l.experts = m->experts;
    m->l.shared = m->shared, m->l.residual = m->residual;
    MUST(moe_layer_create(&m->layer, &m->l));
    MUST(moe_pass_create(&m->pass, m->layer, NULL));
    draw_parameters(m);
    for (int i = 0; i < T * D; i++) m->x[i] = (double)(m->lib_x[i] = (scalar)random_normal(&state));
}

static void unmake(made *m)
{
    moe_pass_destroy(m->pass), moe_layer_destroy(m->layer), moe_gate_destroy(m->gate);
    moe_experts_destroy(m->experts), moe_experts_destroy(m->shared);
    moe_experts_destroy(m->residual), moe_context_destroy(m->context);
    for (int i = 0; i < PARAMETERS; i++) free(m->value[i]);
}

static void forward(made *m, uint64_t flags)
{
    moe_forward_args f;
    const moe_plan *plan;
    MUST(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.x = m->lib_x, f.y = m->lib_y, f.flags = flags;
    MUST(moe_layer_forward(m->layer, m->pass, &f));
    for (int i = 0; i < T * D; i++) m->y[i] = (double)m->lib_y[i];
    MUST(moe_pass_plan(m->pass, &plan));
    MUST(moe_plan_get(plan, &m->v));
    memset(m->gates, 0, sizeof m->gates);
    for (int64_t t = 0; t < T; t++)
        for (int64_t n = m->v.token_begin[t]; n < m->v.token_begin[t + 1]; n++)
            if (m->v.row_of_entry[n] >= 0)
                m->gates[t * E + m->v.expert_of_entry[n]] =
                    (double)((const scalar *)m->v.weight_of_entry)[n];
}

static const double *parameter(const made *m, const char *name)
{
    int64_t index = moe_layer_parameter_find(m->layer, name);
    return index < 0 ? NULL : m->value[index];
}

/* ---- the formulas ---------------------------------------------------------------------------- */

/* z[n] = x[D] w[D,n] + b */
static void product(double *z, const double *x, const double *w, const double *b, int64_t rows,
                    int64_t n)
{
    for (int64_t j = 0; j < n; j++) {
        z[j] = b ? b[j] : 0;
        for (int64_t d = 0; d < rows; d++) z[j] += x[d] * w[d * n + j];
    }
}

static double sigmoid(double z) { return 1 / (1 + exp(-z)); }

static void softmax(double *p, const double *z, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += p[i] = exp(z[i]);
    for (int64_t i = 0; i < n; i++) p[i] /= sum;
}

/* The place of v[i] in descending order; equal ones by index. */
static int rank_of(const double *v, int n, int i)
{
    int rank = 0;
    for (int j = 0; j < n; j++) rank += v[j] > v[i] || (v[j] == v[i] && j < i);
    return rank;
}

/* choice[e]: 0 for the first expert of a token, 1 for the second, -1 for those not chosen. */
static void choose(const made *m, const double *z, int choice[E])
{
    const source *s = m->s;
    const double *bias = parameter(m, "gate.selection_bias");
    double by[E], of_group[E] = {0};
    int groups = s->groups ? s->groups : 1, each = E / groups;
    softmax(by, z, E);
    for (int e = 0; e < E; e++) {
        if (s->sigmoid) by[e] = sigmoid(z[e]);
        by[e] += s->selection_bias ? bias[e] : 0;
    }
    for (int e = 0; e < E; e++)
        if (rank_of(by + e / each * each, each, e % each) < s->group_sum)
            of_group[e / each] += by[e];
    for (int e = 0; e < E && s->groups; e++)
        if (rank_of(of_group, groups, e / each) >= s->top_groups) by[e] = -1e9;
    for (int e = 0; e < E; e++) choice[e] = rank_of(by, E, e) < s->K ? rank_of(by, E, e) : -1;
}

static void weigh(const source *s, const double *z, const int choice[E], double w[E])
{
    double p[E], sum = 0;
    softmax(p, z, E);
    for (int e = 0; e < E; e++) {
        w[e] = choice[e] < 0 ? 0 : s->sigmoid ? sigmoid(z[e]) : s->over_all ? p[e] : exp(z[e]);
        sum += w[e];
    }
    int divide = s->renormalize == 1 || (!s->sigmoid && !s->over_all);
    for (int e = 0; e < E; e++) {
        if (divide) w[e] /= sum + s->epsilon;
        w[e] *= s->scale != 0 ? s->scale : 1;
    }
}

/* Who stays, of all tokens at once. */
static void drop(const source *s, int choice[T][E], double w[T][E])
{
    int used[E] = {0};
    for (int pass = 0; pass < (s->policy == BY_CHOICE ? s->K : 1); pass++)
        for (int t = 0; t < T; t++)
            for (int e = 0; e < E; e++) {
                if (choice[t][e] < 0 || (s->policy == BY_CHOICE && choice[t][e] != pass)) continue;
                if (used[e]++ >= s->rows) w[t][e] = 0;
            }
    for (int t = 0; t < T && s->renormalize == 2; t++) {
        double sum = 0;
        for (int e = 0; e < E; e++) sum += w[t][e];
        for (int e = 0; e < E && sum > 0; e++) w[t][e] /= sum;
    }
}

static double activation(const source *s, double z1, double z3)
{
    double cube = 0.7978845608028654 * (z1 + 0.044715 * z1 * z1 * z1);
    if (s->activation == RELU) return z1 > 0 ? z1 : 0;
    if (s->activation == GELU) return z1 / 2 * (1 + tanh(cube));
    if (s->activation == SWIGLU) return z1 * sigmoid(z1) * z3;
    double g = fmin(z1, 7), u = fmax(fmin(z3, 7), -7);
    return g * sigmoid(1.702 * g) * (u + 1);
}

/* y[D] += w expert(x) for expert e of the pool `prefix`. */
static void add_expert(const made *m, const char *prefix, int e, const double *x, double w,
                       double *y)
{
    static const char *const NAMES[6] = {"w1", "b1", "w3", "b3", "w2", "b2"};
    const double *p[6];
    double z1[F], z3[F] = {0}, h[F], out[D], in[D];
    for (int i = 0; i < 6; i++) {
        char name[32];
        (void)snprintf(name, sizeof name, "%s.%s", prefix, NAMES[i]);
        p[i] = parameter(m, name);
        int64_t size = i == 5 ? D : i % 2 ? F : D * F;
        if (p[i]) p[i] += e * size;
    }
    int on_input = m->s->on_input && strcmp(prefix, "experts") == 0;
    for (int d = 0; d < D; d++) in[d] = on_input ? w * x[d] : x[d];
    product(z1, in, p[0], p[1], D, F);
    if (p[2]) product(z3, in, p[2], p[3], D, F);
    for (int f = 0; f < F; f++) h[f] = activation(m->s, z1[f], z3[f]);
    product(out, h, p[4], p[5], F, D);
    for (int d = 0; d < D; d++) y[d] += (on_input ? 1 : w) * out[d];
}

/* y of the whole layer from its gates. */
static void output(const made *m, const double *gates, double *y)
{
    const double *ws = parameter(m, "shared_gate"), *wc = parameter(m, "residual_mix");
    const double *bc = parameter(m, "residual_mix_bias");
    memset(y, 0, T * D * sizeof *y);
    for (int t = 0; t < T; t++) {
        const double *x = m->x + t * D;
        double c[2] = {1, 0}, z[2], s;
        if (wc) product(z, x, wc, bc, D, 2), softmax(c, z, 2);
        for (int e = 0; e < E; e++)
            if (gates[t * E + e] != 0)
                add_expert(m, "experts", e, x, c[0] * gates[t * E + e], y + t * D);
        if (wc) add_expert(m, "residual", 0, x, c[1], y + t * D);
        if (ws) product(&s, x, ws, NULL, D, 1);
        if (ws) add_expert(m, "shared", 0, x, sigmoid(s), y + t * D);
    }
}

static void compare(const char *what, const double *got, const double *want, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        ck_assert_msg(fabs(got[i] - want[i]) <= (ON_DEVICE ? 1e-4 : 1e-11) * (1 + fabs(want[i])),
                      "%s[%lld] is %.17g, want %.17g", what, (long long)i, got[i], want[i]);
}

/* ---- the tests ------------------------------------------------------------------------------- */

START_TEST(test_preset_computes_the_formulas_of_its_source)
{
    const source *s = &SOURCES[_i];
    made m;
    double w[T][E], y[T * D];
    int choice[T][E];
    make(&m, s);
    forward(&m, 0);
    const double *Wg = parameter(&m, "gate.weight"), *Wp = parameter(&m, "gate.primary_weight");
    for (int t = 0; t < T; t++) {
        double z[E], primary[4], p[E];
        if (Wp) { /* groups of 4; the 2 best of the 2 best */
            product(primary, m.x + t * D, Wp, NULL, D, 4);
            memset(w[t], 0, sizeof w[t]);
            double sum = 0;
            for (int i = 0; i < 4; i++) sum += rank_of(primary, 4, i) < 2 ? exp(primary[i]) : 0;
            for (int i = 0; i < 4; i++) {
                double within = 0;
                product(z, m.x + t * D, Wg + i * D * 4, NULL, D, 4);
                for (int j = 0; j < 4; j++) within += rank_of(z, 4, j) < 2 ? exp(z[j]) : 0;
                for (int j = 0; j < 4; j++)
                    if (rank_of(primary, 4, i) < 2 && rank_of(z, 4, j) < 2)
                        w[t][i * 4 + j] = exp(primary[i]) / sum * exp(z[j]) / within;
            }
            continue;
        }
        product(z, m.x + t * D, Wg, parameter(&m, "gate.bias"), D, E);
        choose(&m, z, choice[t]);
        weigh(s, z, choice[t], w[t]);
        softmax(p, z, E); /* balanced: thresholds begin at 0, so that all are chosen */
        if (s->loss[6] != 0) memcpy(w[t], p, sizeof p);
    }
    if (s->policy == BY_TOKEN || s->policy == BY_CHOICE) drop(s, choice, w);
    if (s->policy == AT_RANDOM) { /* who stays is drawn: how many stay, and with what weight */
        for (int e = 0; e < E; e++) {
            int asked = 0, kept = 0;
            for (int t = 0; t < T; t++) {
                asked += choice[t][e] >= 0, kept += m.gates[t * E + e] != 0;
                if (m.gates[t * E + e] == 0) w[t][e] = 0;
            }
            ck_assert_int_eq(kept, asked < s->rows ? asked : s->rows);
        }
    }
    compare("gates", m.gates, &w[0][0], T * E);
    output(&m, &w[0][0], y);
    compare("y", m.y, y, T * D);
    unmake(&m);
}
END_TEST

START_TEST(test_preset_sets_losses_and_leaves_sizes)
{
    const source *s = &SOURCES[_i];
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    moe_gate *gate = (moe_gate *)(uintptr_t)64;
    ck_assert_str_eq(moe_preset_name(_i), s->name);
    ck_assert_uint_gt(strlen(moe_preset_source(_i)), 10);
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_layer_config_init(&l, sizeof l));
    g.d_model = 5, g.num_experts = 77, g.dtype = 1, g.seed = 9, g.stream_id = 3, g.parameters = 2;
    g.init_std = 0.5, g.bias = 1, g.z_weight = 9, g.jitter = 0.9, g.kind = MOE_GATE_HASH;
    e.d_model = 6, e.d_hidden = 7, e.d_out = 8, e.num_experts = 79, e.dtype = 1, e.glu_order = 2;
    e.weight_layout = 1, e.parameters = 1, e.init_std = 0.25, e.activation_limit = 3;
    l.gate = gate, l.layer_id = 12, l.output = 1, l.dropped = 2, l.parameters = 1;
    MUST(moe_preset(s->name, &g, &e, &l));
    ck_assert(g.d_model == 5 && g.num_experts == 77 && g.dtype == 1 && g.seed == 9);
    ck_assert(g.stream_id == 3 && g.parameters == 2 && g.init_std == 0.5);
    ck_assert(e.d_model == 6 && e.d_hidden == 7 && e.d_out == 8 && e.num_experts == 79);
    ck_assert(e.dtype == 1 && e.glu_order == 2 && e.weight_layout == 1 && e.parameters == 1);
    ck_assert(l.gate == gate && l.layer_id == 12 && l.parameters == 1);
    ck_assert(l.output == 0 && l.dropped == 0 && l.shared_gate == s->shared_gate);
    ck_assert(g.importance_weight == s->loss[0] && g.load_weight == s->loss[1]);
    ck_assert(g.switch_weight == s->loss[2] && g.gshard_weight == s->loss[3]);
    ck_assert(g.z_weight == s->loss[4] && g.sequence_weight == s->loss[5]);
    ck_assert(g.threshold_weight == s->loss[6] && g.bias == s->router_bias);
    ck_assert(e.bias == s->expert_bias && e.kind == MOE_EXPERTS_FEED_FORWARD);
    moe_gate_config once = g;
    MUST(moe_preset(s->name, &g, NULL, NULL)); /* by itself, and again */
    ck_assert_mem_eq(&once, &g, sizeof g);
}
END_TEST

START_TEST(test_preset_refuses)
{
    moe_gate_config g, before;
    moe_experts_config e;
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_experts_config_init(&e, sizeof e));
    before = g;
    ck_assert_int_eq(moe_preset_count(), COUNT(SOURCES));
    ck_assert_ptr_null(moe_preset_name(-1));
    ck_assert_ptr_null(moe_preset_name(moe_preset_count()));
    ck_assert_ptr_null(moe_preset_source(-1));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_preset(NULL, &g, NULL, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_preset("Mixtral", &g, NULL, NULL));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "\"Mixtral\""));
    MUST(moe_preset("mixtral", NULL, NULL, NULL));
    e.struct_size = 3;
    REFUSED(MOE_ERROR_STRUCT_SIZE, moe_preset("mixtral", &g, &e, NULL));
    ck_assert_mem_eq(&before, &g, sizeof g);
    g.struct_size = offsetof(moe_gate_config, threshold_weight); /* of the first release */
    MUST(moe_preset("mixtral", &g, NULL, NULL));
    ck_assert_int_eq(g.top_k, 2);
    ck_assert_uint_eq(g.struct_size, offsetof(moe_gate_config, threshold_weight));
    REFUSED(MOE_ERROR_STRUCT_TOO_OLD, moe_preset("gshard", &g, NULL, NULL));
    ck_assert_int_eq(g.drop_policy, 0);
}
END_TEST

/* ---- describe -------------------------------------------------------------------------------- */

START_TEST(test_describe_keeps_to_its_size)
{
    made m;
    char text[4096], again[4096];
    int64_t size = -1, same = -1;
    make(&m, &SOURCES[_i]);
    REFUSED(MOE_ERROR_BUFFER_TOO_SMALL, moe_describe(NULL, 0, &size, &m.g, &m.e, &m.l));
    ck_assert_int_gt(size, 100);
    memset(text, 'x', sizeof text);
    REFUSED(MOE_ERROR_BUFFER_TOO_SMALL, moe_describe(text, size - 1, &same, &m.g, &m.e, &m.l));
    ck_assert_int_eq(size, same);
    ck_assert_int_eq(text[0], 'x');
    MUST(moe_describe(text, size, &same, &m.g, &m.e, &m.l));
    ck_assert_int_eq((int64_t)strlen(text), size - 1);
    ck_assert_int_eq(text[size], 'x');
    ck_assert_int_eq(text[size - 2], '\n');
    (void)setlocale(LC_ALL, "de_DE.UTF-8"); /* a decimal comma, where there is one */
    MUST(moe_describe(again, sizeof again, &same, &m.g, &m.e, &m.l));
    (void)setlocale(LC_ALL, "C");
    ck_assert_str_eq(text, again);
    unmake(&m);
}
END_TEST

static void says(const moe_gate_config *g, const moe_experts_config *e, const moe_layer_config *l,
                 const char *words)
{
    char text[4096];
    int64_t size;
    MUST(moe_describe(text, sizeof text, &size, g, e, l));
    ck_assert_msg(strstr(text, words) != NULL, "\"%s\" is not in:\n%s", words, text);
}

START_TEST(test_describe_says_what_is_configured)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_layer_config_init(&l, sizeof l));
    g.d_model = e.d_model = 64, g.num_experts = e.num_experts = 256, e.d_hidden = 32;
    MUST(moe_preset("deepseek_v3", &g, &e, &l));
    says(&g, NULL, NULL, "8 of 256 experts");
    says(&g, NULL, NULL, "best 4 of 8 groups");
    says(&g, NULL, NULL, "the sum of its 2 largest");
    says(&g, NULL, NULL, "sigmoid(logit)");
    says(&g, NULL, NULL, "(their sum + 1e-20), times 2.5");
    says(&g, NULL, NULL, "0.0001 sequence");
    MUST(moe_preset("gpt_oss", &g, &e, &l));
    says(NULL, &e, NULL, "256 of widths 64, 32, 64");
    says(NULL, &e, NULL, "g sigmoid(1.702 g) (u + 1)");
    MUST(moe_preset("switch", &g, &e, &l));
    g.capacity_multiple = 8, g.drop_policy = MOE_DROP_SCORE;
    says(&g, &e, &l, "max(4, floor(1.25 * 1 T_g / 256)) in training");
    says(&g, &e, &l, "multiple of 8");
    says(&g, &e, &l, "the largest weights");
    says(&g, &e, &l, "(0.99, 1.01)");
    l.shared_gate = l.residual_mix = 1;
    says(NULL, NULL, &l, "c0 routed + c1 residual");
    says(NULL, NULL, &l, "sigmoid(x \"shared_gate\") shared");
    l.residual_mix = 0, l.dropped = MOE_DROPPED_PASS_THROUGH;
    says(NULL, NULL, &l, "is x\n");
    g.route_scale = -1.0 / 3;
    says(&g, NULL, NULL, "times -0.3333333333333333\n");
    g.route_scale = 1e300;
    says(&g, NULL, NULL, "times 1e300\n");
    g.route_scale = 123456.75;
    says(&g, NULL, NULL, "times 123456.75\n");
    l.expert_slices = 2, l.max_received = 100, l.received = MOE_RECEIVED_CHUNK;
    l.loss_batch = MOE_BATCH_GLOBAL;
    says(NULL, NULL, &l, "the sum of 2 networks");
    says(NULL, NULL, &l, "at most 100 rows of all ranks at once: in rounds\n");
    says(NULL, NULL, &l, "of the tokens of all ranks\n");
    l.received = MOE_RECEIVED_ERROR;
    l.node_comm = l.rail_comm = (moe_comm *)(void *)&g; /* which is not looked at */
    says(NULL, NULL, &l, "a token's row goes to each once");
    MUST(moe_preset("hierarchical2017", &g, &e, &l));
    g.expert_groups = 16, g.secondary = MOE_SECONDARY_WITH_GROUP, g.local_groups = 4;
    says(&g, NULL, NULL, "\"weight\" [4,64,16], on the rank of the group's experts");
}
END_TEST

/* A config that create refuses is refused with the same words. */
START_TEST(test_describe_refuses_what_create_refuses)
{
    moe_gate_config g;
    moe_gate *gate = NULL;
    moe_context *context = new_context();
    char text[512], why[256];
    int64_t size = 5;
    MUST(moe_gate_config_init(&g, sizeof g));
    g.num_experts = 8, g.kind = MOE_GATE_BALANCED;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_create(&gate, context, &g));
    (void)snprintf(why, sizeof why, "%s", strchr(moe_last_error(), ':'));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_describe(text, 512, &size, &g, NULL, NULL));
    ck_assert_str_eq(strchr(moe_last_error(), ':'), why);
    ck_assert_ptr_nonnull(strstr(why, "capacity_kind"));
    ck_assert_ptr_nonnull(strstr(why, "MOE_GATE_BALANCED"));
    ck_assert_int_eq(size, 5);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_describe(text, 512, &size, NULL, NULL, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_describe(text, 512, NULL, &g, NULL, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_describe(text, -1, &size, &g, NULL, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_describe(NULL, 5, &size, &g, NULL, NULL));
    moe_context_destroy(context);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("preset");
    TCase *c = add_case(suite, "presets");
    tcase_add_loop_test(c, test_preset_computes_the_formulas_of_its_source, 0, COUNT(SOURCES));
    tcase_add_loop_test(c, test_preset_sets_losses_and_leaves_sizes, 0, COUNT(SOURCES));
    tcase_add_test(c, test_preset_refuses);
    tcase_add_loop_test(c, test_describe_keeps_to_its_size, 0, COUNT(SOURCES));
    tcase_add_test(c, test_describe_says_what_is_configured);
    tcase_add_test(c, test_describe_refuses_what_create_refuses);
    return run_suite(suite, 1);
}
