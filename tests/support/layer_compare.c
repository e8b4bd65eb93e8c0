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

static char failure[768];

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

static int differs(const layer_run *r, const char *name, const double *got, const double *want,
                   int64_t count)
{
    double largest = 0;
    for (int64_t i = 0; i < count; i++)
        if (isfinite(want[i])) largest = fmax(largest, fabs(want[i]));
    for (int64_t i = 0; i < count; i++) {
        if (got[i] == want[i] || (isnan(got[i]) && isnan(want[i]))) continue;
        if (fabs(got[i] - want[i]) <= allowed(r, name, largest)) continue;
        char text[512];
        layer_case_print(r->c, text, sizeof text);
        (void)snprintf(failure, sizeof failure,
                       "%s: %s[%lld] is %.17g, want %.17g (largest %.3g), dtype %d", text, name,
                       (long long)i, got[i], want[i], largest, (int)r->dtype);
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
    int64_t count, each;
    double *got = layer_run_gradient(r, name, &count);
    each = count / r->c->E;
    for (int64_t i = each;
         i < 2 * each && r->c->E > 1 && r->c->bound == 2 && name[2] != 'g' && name[2] != 'n'; i++) {
        ck_assert(isnan(got[i])); /* expert 1 has none */
        got[i] = want[i];
    }
    int result = differs(r, name, got, want, count);
    free(got);
    return result;
}

static int plan_differs(const layer_run *r, const ref_result *want)
{
    const ref_problem *p = &r->c->p;
    const moe_plan *plan;
    moe_plan_view v;
    MUST(moe_pass_plan(r->pass, &plan));
    MUST(moe_plan_check(plan));
    MUST(moe_plan_view_init(&v, sizeof v));
    MUST(moe_plan_get(plan, &v));
    ck_assert_int_eq(v.entries, p->T * p->K);
    for (int64_t n = 0; n < v.entries; n++) {
        int masked = p->mask && !p->mask[n / p->K];
        if ((v.expert_of_entry[n] == want->ids[n] || (masked && r->plan)) &&
            (v.row_of_entry[n] >= 0) == want->keep[n])
            continue;
        char text[512];
        layer_case_print(r->c, text, sizeof text);
        (void)snprintf(failure, sizeof failure,
                       "%s: entry %lld is expert %d row %lld, want %d keep %d", text, (long long)n,
                       (int)v.expert_of_entry[n], (long long)v.row_of_entry[n], (int)want->ids[n],
                       want->keep[n]);
        return 1;
    }
    return output_differs(r, "weights", v.weight_of_entry, want->w, v.entries);
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
           differs(r, "load", load.data, want->load, r->c->E) ||
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
               output_differs(r, "d_logits", r->d_logits, want->d_logits, p->T * p->E)) ||
              (r->b.dx && !(r->c->no_experts && r->b.d_gate_x) &&
               output_differs(r, "dx", r->dx, dx, p->T * p->D)) ||
              (r->b.d_gate_x &&
               output_differs(r, "d_gate_x", r->d_gate_x, want->d_gate_x, p->T * p->gate_D));
    free(dx);
    return bad;
}

static int parameters_differ(const layer_run *r, const ref_result *want)
{
    if (r->gate && (gradient_differs(r, "dWg", want->dWg) ||
                    gradient_differs(r, "dbg", want->dbg) || gradient_differs(r, "dWn", want->dWn)))
        return 1;
    return r->experts &&
           (gradient_differs(r, "dW1", want->dW1) || gradient_differs(r, "db1", want->db1) ||
            gradient_differs(r, "dW3", want->dW3) || gradient_differs(r, "db3", want->db3) ||
            gradient_differs(r, "dW2", want->dW2) || gradient_differs(r, "db2", want->db2));
}

const char *layer_run_compare(const layer_run *r, const ref_result *want)
{
    const ref_problem *p = &r->c->p;
    if (plan_differs(r, want) || sums_differ(r, want)) return failure;
    if (r->experts &&
        (output_differs(r, "y", r->y, want->y, p->T * p->O) ||
         output_differs(r, "entry_weight_grad", r->entry_grad, want->d_w, p->T * p->K)))
        return failure;
    if (inputs_differ(r, want) || parameters_differ(r, want)) return failure;
    return layer_run_check_gaps(r);
}
