/* layer_case.c - see layer_case.h. Inputs are rounded to f32 first, so that f32 and f64 see the same. */
#include "support/layer_case.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- the case ------------------------------------------------------------------------------------- */

double random_uniform(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (double)((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
}

double random_normal(uint64_t *state)
{
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += random_uniform(state);
    return sum;
}

static double *random_array(layer_case *c, uint64_t *state, int64_t count, double size)
{
    double *a = malloc(((size_t)count + 1) * sizeof *a);
    ck_assert_ptr_nonnull(a);
    for (int64_t i = 0; i < count; i++) a[i] = (double)(float)(size * random_normal(state));
    return c->arrays[c->array_count++] = a;
}

static void make_groups_and_mask(layer_case *c, uint64_t *state)
{
    if (c->groups > 0) {
        c->group_begin = malloc(((size_t)c->groups + 1) * sizeof *c->group_begin);
        ck_assert_ptr_nonnull(c->group_begin);
        c->group_begin[0] = 0;
        for (int64_t g = 1; g <= c->groups; g++) /* uneven, some empty */
            c->group_begin[g] = g == c->groups ? c->T : c->T * g * g / c->groups / c->groups;
    }
    if (c->masked) {
        c->mask = malloc((size_t)c->T + 1);
        ck_assert_ptr_nonnull(c->mask);
        for (int64_t t = 0; t < c->T; t++) c->mask[t] = random_uniform(state) > 0.25;
    }
}

static void make_arrays(layer_case *c, uint64_t *state)
{
    ref_problem *p = &c->p;
    double size = c->spread != 0 ? c->spread : 1;
    double in = 1 / sqrt((double)c->D), hidden = 1 / sqrt((double)c->F);
    double *x = random_array(c, state, c->T * c->D, size);
    for (int64_t i = 0; c->masked && i < c->T * c->D; i++)
        if (!c->mask[i / c->D]) x[i] = NAN;
    p->x = x;
    if (c->gate_D) p->gate_x = random_array(c, state, c->T * p->gate_D, size);
    if (c->logits_in) p->logits_in = random_array(c, state, c->T * c->E, 1);
    p->noise = random_array(c, state, c->T * c->E, 1);
    p->Wg = random_array(c, state, p->gate_D * c->E, 1 / sqrt((double)p->gate_D));
    if (c->router_bias) p->bg = random_array(c, state, c->E, 0.3);
    if (c->kind == MOE_GATE_NOISY_TOP_K)
        p->Wn = random_array(c, state, p->gate_D * c->E, 1 / sqrt((double)p->gate_D));
    p->W1 = random_array(c, state, c->E * c->D * c->F, in);
    p->W3 = random_array(c, state, c->E * c->D * c->F, in);
    p->W2 = random_array(c, state, c->E * c->F * p->O, hidden);
    if (c->expert_bias) {
        p->b1 = random_array(c, state, c->E * c->F, 0.5);
        p->b3 = random_array(c, state, c->E * c->F, 0.5);
        p->b2 = random_array(c, state, c->E * p->O, 0.5);
    }
    if (c->no_experts)
        p->weight_grad = random_array(c, state, c->T * p->K, 1);
    else
        p->dy = random_array(c, state, c->T * p->O, 1);
}

void layer_case_make(layer_case *c, uint64_t seed)
{
    uint64_t state = seed * 7919 + 1;
    ref_problem *p = &c->p;
    int gated = c->activation >= MOE_ACTIVATION_SWIGLU;
    memset(p, 0, sizeof *p);
    c->array_count = 0;
    make_groups_and_mask(c, &state);
    p->T = c->T, p->D = c->D, p->E = c->E, p->F = c->F;
    p->O = c->O ? c->O : c->D;
    p->K = c->kind == MOE_GATE_SOFTMAX_DENSE ? c->E : c->K;
    p->gate_D = c->gate_D ? c->gate_D : c->D;
    p->kind = c->kind, p->score = c->score, p->order = c->order, p->renormalize = c->renormalize;
    p->renormalize_epsilon = c->renormalize_epsilon;
    p->route_scale = c->route_scale != 0 ? c->route_scale : 1;
    p->noise_epsilon = c->noise_epsilon != 0 ? c->noise_epsilon : 1e-2;
    p->cdf_guard = 1e-20;
    p->train = !c->eval && c->kind == MOE_GATE_NOISY_TOP_K;
    p->cv_ddof = c->cv_ddof, p->sequence_softmax = c->sequence_softmax;
    p->sequence_routed = c->sequence_routed;
    p->capacity = c->capacity_kind == MOE_CAPACITY_NONE ? -2 : c->capacity_kind == MOE_CAPACITY_NUMBER ? c->capacity : -1;
    p->capacity_factor = c->capacity_factor, p->capacity_rounding = c->capacity_rounding;
    p->capacity_minimum = c->capacity_minimum;
    p->renormalize_after_drop = c->renormalize_after_drop;
    p->activation = c->activation;
    p->expert_sigmoid = c->expert_sigmoid, p->layer_sigmoid = c->layer_sigmoid;
    for (int i = 0; i < REF_LOSSES; i++) p->weight[i] = c->weight[i], p->factor[i] = 1;
    p->groups = c->groups;
    p->group_begin = c->group_begin;
    p->mask = c->mask;
    make_arrays(c, &state);
    if (!gated) p->W3 = NULL, p->b3 = NULL;
}

void layer_case_free(layer_case *c)
{
    for (int i = 0; i < c->array_count; i++) free(c->arrays[i]);
    free(c->group_begin);
    free(c->mask);
    c->array_count = 0;
    c->group_begin = NULL;
    c->mask = NULL;
}

void layer_case_print(const layer_case *c, char *text, size_t size)
{
    (void)snprintf(text, size,
                   "%s: T %lld D %lld E %lld F %lld O %lld K %lld kind %d score %d order %d renorm %d act %d "
                   "layout %d glu %d groups %lld mask %d capacity %d",
                   c->name, (long long)c->T, (long long)c->D, (long long)c->E, (long long)c->F,
                   (long long)c->p.O, (long long)c->p.K, c->kind, c->score, c->order, c->renormalize,
                   c->activation, c->layout, c->glu_order, (long long)c->groups, c->masked,
                   c->capacity_kind);
}

/* ---- the library's side ------------------------------------------------------------------------------ */

#define OK(call)                                                                                   \
    do {                                                                                           \
        moe_status ok_status = (call);                                                             \
        if (ok_status != MOE_OK) ck_abort_msg("%s: %s", #call, moe_last_error());                  \
    } while (0)

static int64_t element(const layer_run *r) { return r->dtype == MOE_DTYPE_F64 ? 8 : 4; }

double layer_run_at(const layer_run *r, const void *data, int64_t i)
{
    return r->dtype == MOE_DTYPE_F64 ? ((const double *)data)[i] : (double)((const float *)data)[i];
}

static void set_at(const layer_run *r, void *data, int64_t i, double value)
{
    if (r->dtype == MOE_DTYPE_F64)
        ((double *)data)[i] = value;
    else
        ((float *)data)[i] = (float)value;
}

static void *narrowed(const layer_run *r, const double *from, int64_t count)
{
    void *to = calloc((size_t)count + 1, (size_t)element(r));
    ck_assert_ptr_nonnull(to);
    for (int64_t i = 0; from && i < count; i++) set_at(r, to, i, from[i]);
    return to;
}

static void make_gate(layer_run *r)
{
    const layer_case *c = r->c;
    moe_gate_config g;
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = c->p.gate_D, g.num_experts = c->E, g.top_k = c->K ? c->K : 1;
    g.kind = c->kind, g.score = c->score, g.order = c->order, g.renormalize = c->renormalize;
    g.renormalize_epsilon = c->renormalize_epsilon, g.route_scale = c->p.route_scale;
    g.bias = c->router_bias, g.dtype = r->dtype;
    g.noise_epsilon = c->p.noise_epsilon, g.cv_ddof = c->cv_ddof;
    g.importance_weight = c->weight[0], g.load_weight = c->weight[1], g.switch_weight = c->weight[2];
    g.gshard_weight = c->weight[3], g.z_weight = c->weight[4], g.sequence_weight = c->weight[5];
    g.sequence_score = c->sequence_softmax ? MOE_SCORE_SOFTMAX : MOE_SCORE_SIGMOID;
    g.sequence_counts = c->sequence_routed;
    g.capacity_kind = c->capacity_kind, g.capacity = c->capacity;
    g.capacity_factor = c->capacity_factor, g.capacity_rounding = c->capacity_rounding;
    g.capacity_minimum = c->capacity_minimum, g.renormalize_after_drop = c->renormalize_after_drop;
    OK(moe_gate_create(&r->gate, r->context, &g));
}

static void make_layer(layer_run *r)
{
    const layer_case *c = r->c;
    moe_experts_config e;
    moe_layer_config l;
    OK(moe_experts_config_init(&e, sizeof e));
    e.d_model = c->D, e.d_hidden = c->F, e.d_out = c->p.O, e.num_experts = c->E;
    e.activation = c->activation, e.bias = c->expert_bias, e.dtype = r->dtype;
    e.glu_order = c->activation >= MOE_ACTIVATION_SWIGLU ? c->glu_order : 0;
    e.weight_layout = c->layout, e.output = c->expert_sigmoid;
    OK(moe_experts_create(&r->experts, r->context, &e));
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = r->gate, l.experts = r->experts, l.output = c->layer_sigmoid;
    OK(moe_layer_create(&r->layer, &l));
    OK(moe_pass_create(&r->pass, r->layer, NULL));
}

static void make_arguments(layer_run *r)
{
    const ref_problem *p = &r->c->p;
    r->x = narrowed(r, p->x, p->T * p->D);
    r->gate_x = p->gate_x ? narrowed(r, p->gate_x, p->T * p->gate_D) : NULL;
    r->logits_in = p->logits_in ? narrowed(r, p->logits_in, p->T * p->E) : NULL;
    r->noise = narrowed(r, p->noise, p->T * p->E);
    r->dy = narrowed(r, p->dy, p->T * p->O);
    r->weight_grad = narrowed(r, p->weight_grad, p->T * p->K);
    r->y = narrowed(r, NULL, p->T * p->O);
    r->dx = narrowed(r, NULL, p->T * p->D);
    r->d_gate_x = narrowed(r, NULL, p->T * p->gate_D);
    r->d_logits = narrowed(r, NULL, p->T * p->E);
    r->entry_grad = narrowed(r, NULL, p->T * p->K);
    OK(moe_forward_args_init(&r->f, sizeof r->f));
    r->f.tokens = p->T, r->f.x = r->x, r->f.gate_x = r->gate_x, r->f.logits_in = r->logits_in;
    r->f.flags = r->c->eval ? 0 : MOE_FORWARD_TRAIN;
    r->f.y = r->c->no_experts ? NULL : r->y;
    r->f.noise = p->kind == MOE_GATE_NOISY_TOP_K ? r->noise : NULL;
    r->f.token_mask = p->mask, r->f.group_begin = p->group_begin, r->f.groups = p->groups;
    OK(moe_backward_args_init(&r->b, sizeof r->b));
    r->b.dx = r->dx, r->b.d_logits_out = r->d_logits;
    if (!r->c->no_experts) r->b.dy = r->dy;
    r->b.entry_weight_grad = r->c->no_experts ? r->weight_grad : r->entry_grad;
    if (p->gate_x) r->b.d_gate_x = r->d_gate_x;
    if (p->gate_x && r->c->no_experts) r->b.dx = NULL;
}

void layer_run_make(layer_run *r, const layer_case *c, int32_t dtype, const moe_context_config *config)
{
    memset(r, 0, sizeof *r);
    r->c = c;
    r->dtype = dtype;
    OK(moe_context_create(&r->context, config));
    make_gate(r);
    if (c->no_experts)
        OK(moe_pass_create_for_gate(&r->pass, r->gate, NULL));
    else
        make_layer(r);
    make_arguments(r);
    layer_run_set_parameters(r, &c->p);
}

void layer_run_free(layer_run *r)
{
    void *all[] = {r->x, r->gate_x, r->logits_in, r->noise,    r->dy,        r->weight_grad,
                   r->y, r->dx,     r->d_gate_x,  r->d_logits, r->entry_grad};
    moe_pass_destroy(r->pass);
    moe_layer_destroy(r->layer);
    moe_experts_destroy(r->experts);
    moe_gate_destroy(r->gate);
    moe_context_destroy(r->context);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

moe_status layer_run_forward(layer_run *r)
{
    return r->layer ? moe_layer_forward(r->layer, r->pass, &r->f) : moe_gate_forward(r->gate, r->pass, &r->f);
}

moe_status layer_run_backward(layer_run *r)
{
    return r->layer ? moe_layer_backward(r->layer, r->pass, &r->b)
                    : moe_gate_backward(r->gate, r->pass, &r->b);
}

/* ---- parameters, in the reference's order ---------------------------------------------------------------- */

/* A tensor of the reference: [E,rows,cols] of a pool, or [rows,cols] of a gate (experts = 1). */
typedef struct place {
    moe_parameter_record record;
    int found, out_in;
    int64_t experts, rows, cols, first, step;
} place;

static void find_parameter(const layer_run *r, const char *name, moe_parameter_record *record, int *found)
{
    int64_t of_gate = moe_gate_parameter_find(r->gate, name);
    int64_t of_pool = r->experts ? moe_experts_parameter_find(r->experts, name) : -1;
    OK(moe_parameter_record_init(record, sizeof *record));
    *found = of_gate >= 0 || of_pool >= 0;
    if (of_gate >= 0) OK(moe_gate_parameter(r->gate, of_gate, record));
    if (of_pool >= 0) OK(moe_experts_parameter(r->experts, of_pool, record));
}

static place pool_place(const layer_run *r, const char *name, const char *fused, int up, int64_t rows,
                        int64_t cols, int is_bias)
{
    place p = {.experts = r->c->E, .rows = rows, .cols = cols, .step = 1};
    find_parameter(r, name, &p.record, &p.found);
    p.out_in = r->c->layout == MOE_WEIGHT_OUT_IN && !is_bias;
    if (p.found || !fused) return p;
    find_parameter(r, fused, &p.record, &p.found);
    if (r->c->glu_order == MOE_GLU_INTERLEAVED) p.step = 2, p.first = up;
    if (r->c->glu_order == MOE_GLU_GATE_UP) p.first = up ? cols : 0;
    if (r->c->glu_order == MOE_GLU_UP_GATE) p.first = up ? 0 : cols;
    return p;
}

static place place_of(const layer_run *r, const char *name)
{
    const layer_case *c = r->c;
    place p = {.experts = 1, .rows = c->p.gate_D, .cols = c->E, .step = 1};
    if (strcmp(name, "dW1") == 0) return pool_place(r, "w1", "w13", 0, c->D, c->F, 0);
    if (strcmp(name, "dW3") == 0) return pool_place(r, "w3", "w13", 1, c->D, c->F, 0);
    if (strcmp(name, "dW2") == 0) return pool_place(r, "w2", NULL, 0, c->F, c->p.O, 0);
    if (strcmp(name, "db1") == 0) return pool_place(r, "b1", "b13", 0, 1, c->F, 1);
    if (strcmp(name, "db3") == 0) return pool_place(r, "b3", "b13", 1, 1, c->F, 1);
    if (strcmp(name, "db2") == 0) return pool_place(r, "b2", NULL, 0, 1, c->p.O, 1);
    if (strcmp(name, "dbg") == 0) p.rows = 1;
    find_parameter(r, strcmp(name, "dWg") == 0 ? "weight" : strcmp(name, "dbg") == 0 ? "bias" : "noise_weight",
                   &p.record, &p.found);
    return p;
}

/* Where element (e,i,j) lies in the parameter's own contiguous memory. */
static int64_t element_at(const place *p, int64_t e, int64_t i, int64_t j)
{
    const int64_t *s = p->record.data_stride;
    int64_t column = p->first + j * p->step;
    if (p->experts == 1 && p->record.dims == 1) return column * s[0];
    if (p->record.dims == 2 && p->record.sharding == MOE_SHARD_REPLICATED) return i * s[0] + column * s[1];
    if (p->record.dims == 2) return e * s[0] + column * s[1];
    return e * s[0] + (p->out_in ? column * s[1] + i * s[2] : i * s[1] + column * s[2]);
}

static void set_parameter(layer_run *r, const char *name, const double *from)
{
    place p = place_of(r, name);
    if (!p.found) return;
    ck_assert_ptr_nonnull(from);
    for (int64_t e = 0; e < p.experts; e++)
        for (int64_t i = 0; i < p.rows; i++)
            for (int64_t j = 0; j < p.cols; j++)
                set_at(r, p.record.data, element_at(&p, e, i, j), from[(e * p.rows + i) * p.cols + j]);
}

void layer_run_set_parameters(layer_run *r, const ref_problem *p)
{
    set_parameter(r, "dWg", p->Wg), set_parameter(r, "dbg", p->bg), set_parameter(r, "dWn", p->Wn);
    if (!r->experts) return;
    set_parameter(r, "dW1", p->W1), set_parameter(r, "dW3", p->W3), set_parameter(r, "dW2", p->W2);
    set_parameter(r, "db1", p->b1), set_parameter(r, "db3", p->b3), set_parameter(r, "db2", p->b2);
}

double *layer_run_gradient(const layer_run *r, const char *name, int64_t *count)
{
    place p = place_of(r, name);
    *count = p.found ? p.experts * p.rows * p.cols : 0;
    double *to = calloc((size_t)*count + 1, sizeof *to);
    ck_assert_ptr_nonnull(to);
    for (int64_t n = 0; n < *count; n++) {
        int64_t j = n % p.cols, i = n / p.cols % p.rows, e = n / p.cols / p.rows;
        to[n] = layer_run_at(r, p.record.grad, element_at(&p, e, i, j));
    }
    return to;
}

uint64_t layer_run_hash(const layer_run *r)
{
    static const char *const names[] = {"dWg", "dbg", "dWn", "dW1", "db1", "dW3", "db3", "dW2", "db2"};
    const ref_problem *p = &r->c->p;
    const void *outputs[] = {r->y, r->dx, r->d_gate_x, r->d_logits};
    const int64_t counts[] = {p->T * p->O, p->T * p->D, p->T * p->gate_D, p->T * p->E};
    uint64_t hash = 0xcbf29ce484222325u;
    for (int i = 0; i < 4; i++)
        for (int64_t b = 0; b < counts[i] * element(r); b++)
            hash = (hash ^ ((const unsigned char *)outputs[i])[b]) * 0x100000001b3u;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int64_t count;
        double *gradient = layer_run_gradient(r, names[i], &count);
        for (size_t b = 0; b < (size_t)count * sizeof *gradient; b++)
            hash = (hash ^ ((const unsigned char *)gradient)[b]) * 0x100000001b3u;
        free(gradient);
    }
    return hash;
}

/* ---- comparison ----------------------------------------------------------------------------------------- */

/* Largest allowed error over the largest magnitude of the tensor. f32: chains of some hundred terms at
 * 6e-8 each, behind a gate whose load divides by a standard deviation of down to 0.01. f64: the same
 * chains at 1.1e-16. */
static double tolerance(const layer_run *r) { return r->dtype == MOE_DTYPE_F64 ? 1e-11 : 2e-4; }

/* What is left of a gradient that cancels to 0. */
static double noise_floor(const layer_run *r) { return r->dtype == MOE_DTYPE_F64 ? 1e-12 : 2e-6; }

static char failure[512];

static int differs(const layer_run *r, const char *name, const double *got, const double *want, int64_t count)
{
    double largest = 0;
    for (int64_t i = 0; i < count; i++) largest = fmax(largest, fabs(want[i]));
    for (int64_t i = 0; i < count; i++) {
        if (got[i] == want[i] || (isnan(got[i]) && isnan(want[i]))) continue;
        if (fabs(got[i] - want[i]) <= tolerance(r) * largest + noise_floor(r)) continue;
        char text[256];
        layer_case_print(r->c, text, sizeof text);
        (void)snprintf(failure, sizeof failure, "%s: %s[%lld] is %.17g, want %.17g (largest %.3g), dtype %d", text,
                       name, (long long)i, got[i], want[i], largest, (int)r->dtype);
        return 1;
    }
    return 0;
}

static int output_differs(const layer_run *r, const char *name, const void *got, const double *want,
                          int64_t count)
{
    double *wide = malloc(((size_t)count + 1) * sizeof *wide);
    ck_assert_ptr_nonnull(wide);
    for (int64_t i = 0; i < count; i++) wide[i] = layer_run_at(r, got, i);
    int result = differs(r, name, wide, want, count);
    free(wide);
    return result;
}

static int gradient_differs(const layer_run *r, const char *name, const double *want)
{
    int64_t count;
    double *got = layer_run_gradient(r, name, &count);
    int result = differs(r, name, got, want, count);
    free(got);
    return result;
}

static int plan_differs(const layer_run *r, const ref_result *want)
{
    const moe_plan *plan;
    moe_plan_view v;
    OK(moe_pass_plan(r->pass, &plan));
    OK(moe_plan_check(plan));
    OK(moe_plan_view_init(&v, sizeof v));
    OK(moe_plan_get(plan, &v));
    for (int64_t n = 0; n < v.entries; n++)
        if (v.expert_of_entry[n] != want->ids[n] || (v.row_of_entry[n] >= 0) != want->keep[n]) {
            (void)snprintf(failure, sizeof failure, "%s: entry %lld is expert %d row %lld, want %d keep %d",
                           r->c->name, (long long)n, (int)v.expert_of_entry[n],
                           (long long)v.row_of_entry[n], (int)want->ids[n], want->keep[n]);
            return 1;
        }
    return output_differs(r, "weights", v.weight_of_entry, want->w, v.entries);
}

static int sums_differ(const layer_run *r, const ref_result *want)
{
    moe_losses losses;
    moe_tensor_view importance, load;
    OK(moe_losses_init(&losses, sizeof losses));
    OK(moe_pass_losses(r->pass, &losses));
    OK(moe_tensor_view_init(&importance, sizeof importance));
    OK(moe_pass_tensor(r->pass, MOE_TENSOR_IMPORTANCE, &importance));
    OK(moe_tensor_view_init(&load, sizeof load));
    OK(moe_pass_tensor(r->pass, MOE_TENSOR_LOAD, &load));
    return differs(r, "importance", importance.data, want->importance, r->c->E) ||
           differs(r, "load", load.data, want->load, r->c->E) ||
           differs(r, "losses", losses.value, want->loss, REF_LOSSES);
}

const char *layer_run_compare(const layer_run *r, const ref_result *want)
{
    const ref_problem *p = &r->c->p;
    if (plan_differs(r, want) || sums_differ(r, want)) return failure;
    double *dx = malloc(((size_t)(p->T * p->D) + 1) * sizeof *dx);
    ck_assert_ptr_nonnull(dx);
    for (int64_t i = 0; i < p->T * p->D; i++) dx[i] = want->dx[i] + (p->gate_x ? 0 : want->d_gate_x[i]);
    int bad = (!r->c->no_experts && (output_differs(r, "y", r->y, want->y, p->T * p->O) ||
                                     output_differs(r, "entry_weight_grad", r->entry_grad, want->d_w, p->T * p->K))) ||
              output_differs(r, "d_logits", r->d_logits, want->d_logits, p->T * p->E) ||
              (r->b.dx && output_differs(r, "dx", r->dx, dx, p->T * p->D)) ||
              (p->gate_x && output_differs(r, "d_gate_x", r->d_gate_x, want->d_gate_x, p->T * p->gate_D)) ||
              gradient_differs(r, "dWg", want->dWg) || gradient_differs(r, "dbg", want->dbg) ||
              gradient_differs(r, "dWn", want->dWn);
    if (!bad && r->experts)
        bad = gradient_differs(r, "dW1", want->dW1) || gradient_differs(r, "db1", want->db1) ||
              gradient_differs(r, "dW3", want->dW3) || gradient_differs(r, "db3", want->db3) ||
              gradient_differs(r, "dW2", want->dW2) || gradient_differs(r, "db2", want->db2);
    free(dx);
    return bad ? failure : "";
}
