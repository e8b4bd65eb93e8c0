/* layer_compare.c - a run against the reference, tensor by tensor. */
#include "support/layer_case.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Largest allowed error, relative to the largest magnitude of the tensor, and absolute for what
 * cancels to 0. In f32 an element is a chain of some hundred terms of 6e-8 each; behind the gate's
 * backward the load divides by a standard deviation of down to 0.01, which is what the last column
 * is for. In f64 the same chains at 1.1e-16. Sums of a few counts and losses are formed in double
 * from numbers of the dtype. */
typedef struct allowance {
    const char *name;
    double f32, f64, floor_f32, floor_f64;
    double f32_with_load; /* instead of f32 when a load loss is there */
} allowance;

static const allowance allowances[] = {
    {"weights", 2e-5, 1e-11, 1e-7, 1e-14, 2e-5},
    {"importance", 2e-5, 1e-11, 1e-7, 1e-14, 2e-5},
    {"load", 2e-4, 1e-11, 1e-5, 1e-12, 2e-4},
    {"losses", 1e-4, 1e-11, 1e-7, 1e-14, 2e-4},
    {"stats", 2e-4, 1e-11, 1e-6, 1e-12, 2e-4},
    {"y", 2e-5, 1e-11, 1e-7, 1e-14, 2e-5},
    {"entry_weight_grad", 2e-5, 1e-11, 1e-6, 1e-13, 2e-5},
    {"", 3e-5, 1e-11, 2e-7, 1e-12, 2e-4}, /* every gradient */
};

static char failure[1024];

static const allowance *allowance_of(const char *name)
{
    const allowance *a = allowances;
    while (a->name[0] && strcmp(a->name, name) != 0) a++;
    return a;
}

static double allowed(const layer_run *r, const char *name, double largest)
{
    const allowance *a = allowance_of(name);
    int has_load = r->c->weight[MOE_LOSS_LOAD] != 0;
    if (r->dtype == MOE_DTYPE_F64) return a->f64 * largest + a->floor_f64;
    return (has_load ? a->f32_with_load : a->f32) * largest + a->floor_f32;
}

static int complain(const layer_run *r, const char *name, int64_t i, double got, double want,
                    double size)
{
    char text[768];
    layer_case_print(r->c, text, sizeof text);
    (void)snprintf(failure, sizeof failure,
                   "%s: %s[%lld] is %.17g, want %.17g (size %.3g), dtype %d", text, name,
                   (long long)i, got, want, size, (int)r->dtype);
    return 1;
}

/* ---- 16 bits --------------------------------------------------------------------------------- */

/* Largest allowed error of a layer of 16 bits against the reference on the same rounded inputs, in
 * units u, half an ulp of 1: 2^-8 in bf16, 2^-11 in f16. Of the tensor as a whole, the root of the
 * sum of squares against that of the reference; of one element, 4 times as much of its magnitude
 * and the tensor's root mean square together.
 *
 * An element of y has been rounded four or five times on its way (z1, z3, h, out, y), in random
 * directions; a gradient twice as often, and it multiplies what was rounded. What is f32 in such a
 * layer (the routing, its losses and statistics, and all of a gate by itself but dx) has the f32
 * column above. */
typedef struct half_allowance {
    const char *name;
    double units;
} half_allowance;

static const half_allowance half_allowances[] = {
    {"weights", 0}, {"importance", 0}, {"load", 0}, {"losses", 0},
    {"stats", 0},   {"counts", 0},     {"y", 4},    {"", 8}, /* every gradient */
};

static double half_units(const layer_run *r, const char *name)
{
    const half_allowance *a = half_allowances;
    int rounded = strcmp(name, "dx") == 0 || strcmp(name, "d_gate_x") == 0;
    if (r->c->no_experts && !rounded && !(r->c->bound && r->c->half_gradients)) return 0;
    while (a->name[0] && strcmp(a->name, name) != 0) a++;
    return a->units;
}

static double root_mean_square(const double *a, int64_t count)
{
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += isfinite(a[i]) ? a[i] * a[i] : 0;
    return count > 0 ? sqrt(sum / (double)count) : 0;
}

/* The gradient by a stored y loses what y (1 - y) does: its error is u of dy, however small the
 * product is. */
static double sigmoid_loss(const layer_run *r, const ref_result *want)
{
    const ref_problem *p = &r->c->p;
    double all = 0, left = 0, of_experts = r->c->expert_sigmoid ? 4 : 1;
    if (!p->layer_sigmoid || r->c->no_experts) return of_experts;
    for (int64_t i = 0; i < p->T * p->O; i++) {
        double y = want->y[i], d = p->dy[i], slope = d * y * (1 - y) * 4;
        all += d * d, left += isfinite(slope) ? slope * slope : 0;
    }
    return left > 0 ? of_experts * fmin(sqrt(all / left), 16) : of_experts;
}

/* Gradients of the gate and of the layer's own parameters are sums over tokens of differences of
 * products dy . out, the gradients by weights, which may cancel: the size of such a sum if they did
 * not, with inputs of about 1. */
static double size_of_terms(const layer_run *r, const char *name)
{
    static const char *const sums[] = {"dWg", "dbg", "dWn", "dWp", "dWq", "dWc", "dbc", "dws"};
    const ref_problem *p = &r->c->p;
    int alone = r->c->no_experts;
    int of_branch = strcmp(name, "dWc") == 0 || strcmp(name, "dbc") == 0 ||
                    strcmp(name, "dws") == 0;
    double each = root_mean_square(alone ? p->weight_grad : r->want->d_w, p->T * p->K);
    if (of_branch && !alone) /* of the branch's out the reference keeps no more than y */
        each = fmax(each, root_mean_square(p->dy, p->T * p->O) * sqrt((double)p->O) *
                              root_mean_square(r->want->y, p->T * p->O));
    if (strcmp(name, "d_logits") == 0 || strcmp(name, "d_gate_x") == 0) return each;
    for (size_t i = 0; i < COUNT(sums); i++)
        if (strcmp(name, sums[i]) == 0) return each * sqrt((double)p->T);
    return 0;
}

static int half_differs(const layer_run *r, const char *name, double units, const double *got,
                        const double *want, int64_t count)
{
    double u = r->dtype == MOE_DTYPE_BF16 ? 0x1p-8 : 0x1p-11, error = 0;
    double size = fmax(root_mean_square(want, count), size_of_terms(r, name));
    double factor = units * u * sigmoid_loss(r, r->want), least = allowance_of(name)->floor_f32;
    for (int64_t i = 0; i < count; i++) {
        if (got[i] == want[i] || (isnan(got[i]) && isnan(want[i]))) continue;
        double off = fabs(got[i] - want[i]);
        error += off * off;
        if (!(off <= 4 * factor * (size + fabs(want[i])) + least))
            return complain(r, name, i, got[i], want[i], size);
    }
    error = count > 0 ? sqrt(error / (double)count) : 0;
    return error > factor * size + least ? complain(r, name, -1, error, factor * size, size) : 0;
}

static int differs(const layer_run *r, const char *name, const double *got, const double *want,
                   int64_t count)
{
    double largest = 0, units = number_is_half(r->dtype) ? half_units(r, name) : 0;
    if (units > 0) return half_differs(r, name, units, got, want, count);
    for (int64_t i = 0; i < count; i++)
        if (isfinite(want[i])) largest = fmax(largest, fabs(want[i]));
    for (int64_t i = 0; i < count; i++) {
        if (got[i] == want[i] || (isnan(got[i]) && isnan(want[i]))) continue;
        if (fabs(got[i] - want[i]) <= allowed(r, name, largest)) continue;
        return complain(r, name, i, got[i], want[i], largest);
    }
    return 0;
}

static int output_differs(const layer_run *r, const char *name, int32_t dtype, const void *got,
                          const double *want, int64_t count)
{
    double *wide = malloc(((size_t)count + 1) * sizeof *wide);
    ck_assert_ptr_nonnull(wide);
    for (int64_t i = 0; i < count; i++) wide[i] = number_at(got, i, dtype);
    int result = differs(r, name, wide, want, count);
    free(wide);
    return result;
}

static int gradient_differs(const layer_run *r, const layer_tensor *t, const ref_result *want)
{
    int64_t count, experts, rows, cols;
    double *got = layer_run_gradient(r, t->name, &count);
    const double *expected = layer_tensor_gradient(want, t);
    int of_pool = t->owner != OF_GATE && t->owner != OF_LAYER;
    (void)layer_tensor_shape(&r->c->p, t, &experts, &rows, &cols);
    for (int64_t i = rows * cols; i < 2 * rows * cols && i < count && r->c->bound == 2 && of_pool;
         i++) {
        ck_assert(isnan(got[i])); /* expert 1 has none */
        got[i] = expected[i];
    }
    int result = differs(r, t->name, got, expected, count);
    free(got);
    return result;
}

static int entry_differs(const layer_run *r, const char *what, int64_t t, int64_t n, int64_t got,
                         int64_t want)
{
    char text[768];
    if (got == want) return 0;
    layer_case_print(r->c, text, sizeof text);
    (void)snprintf(failure, sizeof failure, "%s: %s of token %lld's entry %lld is %lld, want %lld",
                   text, what, (long long)t, (long long)n, (long long)got, (long long)want);
    return 1;
}

/* Experts, rows and slots of one token's entries. */
static int token_differs(const layer_run *r, const ref_result *want, const moe_plan_view *v,
                         int64_t t)
{
    const ref_problem *p = &r->c->p;
    int64_t entries = 0, got = v->token_begin[t + 1] - v->token_begin[t];
    int masked = p->mask && !p->mask[t];
    for (int64_t k = 0; k < p->K; k++) entries += want->ids[t * p->K + k] >= 0;
    if (entry_differs(r, "number", t, -1, got, layer_case_varies(r->c) ? entries : p->K)) return 1;
    for (int64_t n = v->token_begin[t]; n < v->token_begin[t + 1]; n++) {
        int64_t slot = layer_run_slot(r, v, t, n), k = n - v->token_begin[t];
        if (!(masked && r->plan) &&
            entry_differs(r, "expert", t, k, v->expert_of_entry[n], want->ids[slot]))
            return 1;
        if (entry_differs(r, "row (1) or none (0)", t, k, v->row_of_entry[n] >= 0,
                          want->keep[slot]) ||
            entry_differs(r, "slot", t, k, v->slot_of_entry[n], want->slot[slot]))
            return 1;
    }
    return 0;
}

/* An array in order of entry against one [T,K]. */
static int entries_differ(const layer_run *r, const char *name, const void *got, const double *want)
{
    moe_plan_view v;
    layer_run_view(r, &v);
    double *wide = calloc((size_t)v.entries + 1, sizeof *wide);
    double *expected = calloc((size_t)v.entries + 1, sizeof *expected);
    ck_assert(wide && expected);
    for (int64_t t = 0; t < v.tokens; t++)
        for (int64_t n = v.token_begin[t]; n < v.token_begin[t + 1]; n++) {
            wide[n] = number_at(got, n, r->real);
            expected[n] = want[layer_run_slot(r, &v, t, n)];
        }
    int result = differs(r, name, wide, expected, v.entries);
    free(wide), free(expected);
    return result;
}

static int plan_differs(const layer_run *r, const ref_result *want)
{
    moe_plan_view v;
    layer_run_view(r, &v);
    for (int64_t t = 0; t < v.tokens; t++)
        if (token_differs(r, want, &v, t)) return 1;
    return entries_differ(r, "weights", v.weight_of_entry, want->w);
}

/* The load of a hierarchical gate's groups. */
static int primary_differs(const layer_run *r, const ref_result *want)
{
    moe_tensor_view v;
    if (r->c->kind != MOE_GATE_HIERARCHICAL || r->c->replay == 2) return 0;
    MUST(moe_tensor_view_init(&v, sizeof v));
    MUST(moe_pass_tensor(r->pass, MOE_TENSOR_PRIMARY_LOAD, &v));
    return differs(r, "load", v.data, want->levels.load1, r->c->expert_groups);
}

static int counts_differ(const layer_run *r, const ref_result *want)
{
    moe_tensor_view v;
    double *counts = calloc((size_t)r->c->E + 1, sizeof *counts),
           *expected = calloc((size_t)r->c->E + 1, sizeof *counts);
    ck_assert(counts && expected);
    MUST(moe_tensor_view_init(&v, sizeof v));
    MUST(moe_pass_tensor(r->pass, MOE_TENSOR_COUNTS, &v));
    for (int64_t e = 0; e < r->c->E; e++) {
        counts[e] = (double)((const int64_t *)v.data)[e];
        expected[e] = (double)want->counts[e];
    }
    int result = differs(r, "counts", counts, expected, r->c->E);
    free(counts), free(expected);
    return result;
}

static int sums_differ(const layer_run *r, const ref_result *want)
{
    moe_losses losses;
    moe_stats stats;
    moe_tensor_view importance, load;
    MUST(moe_losses_init(&losses, sizeof losses));
    MUST(moe_pass_losses(r->pass, &losses));
    MUST(moe_stats_init(&stats, sizeof stats));
    MUST(moe_pass_stats(r->pass, &stats));
    MUST(moe_tensor_view_init(&importance, sizeof importance));
    MUST(moe_pass_tensor(r->pass, MOE_TENSOR_IMPORTANCE, &importance));
    MUST(moe_tensor_view_init(&load, sizeof load));
    MUST(moe_pass_tensor(r->pass, MOE_TENSOR_LOAD, &load));
    for (int i = REF_LOSSES; i < MOE_LOSS_SLOTS; i++) ck_assert_double_eq(losses.value[i], 0);
    for (int i = REF_STATS; i < MOE_STAT_SLOTS; i++) ck_assert_double_eq(stats.value[i], 0);
    if (differs(r, "losses", losses.value, want->loss, REF_LOSSES)) return 1;
    /* A plan with weights knows its weights after dropping only. */
    if (r->c->replay == 2 && (r->c->p.capacity >= 0 || r->c->renormalize_after_drop)) return 0;
    return counts_differ(r, want) ||
           differs(r, "importance", importance.data, want->importance, r->c->E) ||
           differs(r, "load", load.data, want->load, r->c->E) || primary_differs(r, want) ||
           differs(r, "stats", stats.value, want->stats, REF_STATS);
}

static int inputs_differ(const layer_run *r, const ref_result *want)
{
    const ref_problem *p = &r->c->p;
    double *dx = malloc(((size_t)(p->T * p->D) + 1) * sizeof *dx);
    ck_assert_ptr_nonnull(dx);
    for (int64_t i = 0; i < p->T * p->D; i++)
        dx[i] = want->dx[i] + (p->gate_x || r->b.d_gate_x ? 0 : want->d_gate_x[i]);
    int bad = (r->b.d_logits_out &&
               output_differs(r, "d_logits", r->real, r->d_logits, want->d_logits, p->T * p->E)) ||
              (r->b.dx && !(r->c->no_experts && r->b.d_gate_x) &&
               output_differs(r, "dx", r->dtype, r->dx, dx, p->T * p->D)) ||
              (r->b.d_gate_x && output_differs(r, "d_gate_x", r->dtype, r->d_gate_x, want->d_gate_x,
                                               p->T * p->gate_D));
    free(dx);
    return bad;
}

static int parameters_differ(const layer_run *r, const ref_result *want)
{
    for (int k = 0; k < LAYER_TENSORS; k++)
        if (layer_tensors[k].in_result && gradient_differs(r, &layer_tensors[k], want)) return 1;
    return 0;
}

const char *layer_run_compare(layer_run *r, const ref_result *want)
{
    r->want = want;
    const ref_problem *p = &r->c->p;
    if (plan_differs(r, want) || sums_differ(r, want)) return failure;
    if (r->experts && (output_differs(r, "y", r->dtype, r->y, want->y, p->T * p->O) ||
                       entries_differ(r, "entry_weight_grad", r->entry_grad, want->d_w)))
        return failure;
    if (inputs_differ(r, want) || parameters_differ(r, want)) return failure;
    return layer_run_check_gaps(r);
}
