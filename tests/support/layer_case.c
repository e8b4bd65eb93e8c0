/* layer_case.c - the contents of a case. Inputs are rounded to f32 first, so that f32 and f64
 * see the same; tokens and weights of a 16-bit case to its elements. */
#include "support/layer_case.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- the case -------------------------------------------------------------------------------- */

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

static double *random_numbers(layer_case *c, uint64_t *state, int64_t count, double size,
                              int32_t dtype)
{
    double *a = malloc(((size_t)count + 1) * sizeof *a), rounded;
    ck_assert_ptr_nonnull(a);
    for (int64_t i = 0; i < count; i++) {
        number_set(&rounded, 0, dtype, size * random_normal(state));
        a[i] = number_at(&rounded, 0, dtype);
    }
    return c->arrays[c->array_count++] = a;
}

/* Of what is stored as the layer's dtype, and of what is f32 even if that has 16 bits. */
static double *random_array(layer_case *c, uint64_t *state, int64_t count, double size)
{
    return random_numbers(c, state, count, size, c->element);
}
static double *random_reals(layer_case *c, uint64_t *state, int64_t count, double size)
{
    return random_numbers(c, state, count, size, MOE_DTYPE_F32);
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

int layer_case_varies(const layer_case *c)
{
    return c->kind == MOE_GATE_BALANCED || c->kind == MOE_GATE_EXPERT_CHOICE;
}

/* Who goes where, as a host might have decided: one in eight nowhere, some twice. */
static void make_routing(layer_case *c, uint64_t *state)
{
    ref_problem *p = &c->p;
    int64_t entries = c->T * p->K;
    if (c->kind == MOE_GATE_HASH) layer_case_hash(c, state);
    if (!c->replay) return;
    c->ids = malloc(((size_t)entries + 1) * sizeof *c->ids);
    ck_assert_ptr_nonnull(c->ids);
    for (int64_t n = 0; n < entries; n++)
        c->ids[n] = random_uniform(state) < 0.125 ? -1
                                                  : (int32_t)(random_uniform(state) * (double)c->E);
    p->fixed_ids = c->ids;
    if (c->replay != 2) return;
    double *weights = random_reals(c, state, entries, 1);
    for (int64_t n = 0; n < entries; n++)
        weights[n] = fabs(weights[n]) + 0.125; /* a sum to divide by */
    p->fixed_weights = weights;
}

/* The numbers the library will draw. */
static const double *philox_noise(layer_case *c)
{
    double *noise = malloc(((size_t)(c->T * c->E) + 1) * sizeof *noise);
    int32_t layer_id = c->no_experts ? 0 : CASE_LAYER;
    float four[4];
    ck_assert_ptr_nonnull(noise);
    for (int64_t t = 0; t < c->T; t++)
        for (int64_t e = 0; e < c->E; e++) {
            if (e % 4 == 0 && moe_noise4(four, CASE_SEED, layer_id, CASE_STREAM, CASE_STEP,
                                         CASE_TOKEN_FIRST + t, e / 4) != MOE_OK)
                ck_abort_msg("%s", moe_last_error());
            noise[t * c->E + e] = (double)four[e % 4];
        }
    return c->arrays[c->array_count++] = noise;
}

static void make_pool_arrays(layer_case *c, uint64_t *state, ref_pool *q)
{
    double in = 1 / sqrt((double)c->D), hidden = 1 / sqrt((double)q->F);
    q->W1 = random_array(c, state, q->E * c->D * q->F, in);
    q->W3 = random_array(c, state, q->E * c->D * q->F, in);
    q->W2 = random_array(c, state, q->E * q->F * c->p.O, hidden);
    if (c->expert_bias) {
        q->b1 = random_array(c, state, q->E * q->F, 0.5);
        q->b3 = random_array(c, state, q->E * q->F, 0.5);
        q->b2 = random_array(c, state, q->E * c->p.O, 0.5);
    }
    if (q->activation < MOE_ACTIVATION_SWIGLU) q->W3 = NULL, q->b3 = NULL;
}

/* What the other kinds of gates and the branches of a layer have. */
static void make_family_arrays(layer_case *c, uint64_t *state)
{
    ref_problem *p = &c->p;
    int64_t A = c->expert_groups;
    double of_gate = 1 / sqrt((double)p->gate_D);
    if (c->selection_bias) p->selection_bias = random_reals(c, state, c->E, 0.2);
    if (c->kind == MOE_GATE_BALANCED) {
        double *threshold = random_reals(c, state, c->E, c->thresholds ? 0.3 / (double)c->E : 0);
        for (int64_t e = 0; e < c->E && c->thresholds; e++)
            threshold[e] = (double)(float)(threshold[e] + 1 / (double)c->E);
        p->threshold = threshold;
    }
    if (c->kind == MOE_GATE_HIERARCHICAL) {
        p->Wp = random_array(c, state, p->gate_D * A, of_gate);
        p->Wq = random_array(c, state, p->gate_D * A, of_gate);
        p->noise_primary = random_reals(c, state, c->T * A, 1);
    }
    if (c->shared) make_pool_arrays(c, state, &p->shared);
    if (c->residual) make_pool_arrays(c, state, &p->residual);
    if (c->shared_gate) p->ws = random_array(c, state, c->D, 1 / sqrt((double)c->D));
    if (c->residual_mix) {
        p->Wc = random_array(c, state, 2 * c->D, 1 / sqrt((double)c->D));
        p->bc = random_array(c, state, 2, 0.5);
    }
}

static void make_arrays(layer_case *c, uint64_t *state)
{
    ref_problem *p = &c->p;
    double size = c->spread != 0 ? c->spread : 1;
    double of_gate = 1 / sqrt((double)p->gate_D);
    double *x = random_array(c, state, c->T * c->D, size);
    for (int64_t i = 0; c->masked && i < c->T * c->D; i++)
        if (!c->mask[i / c->D]) x[i] = NAN;
    p->x = x;
    if (c->gate_D) p->gate_x = random_array(c, state, c->T * p->gate_D, size);
    if (c->logits_in) p->logits_in = random_reals(c, state, c->T * c->E, 1);
    p->noise = random_reals(c, state, c->T * c->E, 1);
    if (c->philox) p->noise = philox_noise(c);
    p->Wg = random_array(c, state, p->gate_D * c->E, of_gate);
    if (c->router_bias) p->bg = random_array(c, state, c->E, 0.3);
    if (c->kind == MOE_GATE_NOISY_TOP_K || c->kind == MOE_GATE_HIERARCHICAL)
        p->Wn = random_array(c, state, p->gate_D * c->E, of_gate);
    make_pool_arrays(c, state, &p->routed);
    if (c->no_experts)
        p->weight_grad = random_reals(c, state, c->T * p->K, 1);
    else
        p->dy = random_array(c, state, c->T * p->O, 1);
    make_family_arrays(c, state);
}

static void make_gate_options(layer_case *c)
{
    ref_problem *p = &c->p;
    p->kind = c->kind, p->score = c->score, p->order = c->order, p->renormalize = c->renormalize;
    p->renormalize_epsilon = c->renormalize_epsilon;
    p->renormalize_minimum = c->renormalize_minimum;
    p->route_scale = c->route_scale != 0 ? c->route_scale : 1;
    p->noise_epsilon = c->noise_epsilon != 0 ? c->noise_epsilon : 1e-2;
    p->cdf_guard = 1e-20;
    p->train = !c->eval;
    p->cv_ddof = c->cv_ddof, p->sequence_softmax = c->sequence_softmax;
    p->sequence_routed = c->sequence_routed, p->loss_by_group = c->loss_by_group;
    p->expert_groups = c->expert_groups, p->top_groups = c->top_groups;
    p->group_score = c->group_score, p->second_k = c->K;
    p->sinkhorn_iterations = c->sinkhorn_iterations;
    p->capacity = c->capacity_kind == MOE_CAPACITY_NONE     ? -2
                  : c->capacity_kind == MOE_CAPACITY_NUMBER ? c->capacity
                                                            : -1;
    p->capacity_factor = c->capacity_factor, p->capacity_rounding = c->capacity_rounding;
    p->capacity_factor_eval = c->capacity_factor_eval;
    p->capacity_minimum = c->capacity_minimum, p->capacity_multiple = c->capacity_multiple;
    p->drop_policy = c->drop_policy, p->second_choice = c->second_choice;
    p->second_threshold = c->second_threshold;
    p->renormalize_after_drop = c->renormalize_after_drop;
}

static double rounded_to(int32_t dtype, double x)
{
    double rounded;
    number_set(&rounded, 0, dtype, x);
    return number_at(&rounded, 0, dtype);
}
static double rounded_to_bf16(double x) { return rounded_to(MOE_DTYPE_BF16, x); }
static double rounded_to_f16(double x) { return rounded_to(MOE_DTYPE_F16, x); }

static void make_pools(layer_case *c)
{
    ref_problem *p = &c->p;
    double (*stored)(double) = c->limit == 0                  ? NULL
                               : c->element == MOE_DTYPE_BF16 ? rounded_to_bf16
                               : c->element == MOE_DTYPE_F16  ? rounded_to_f16
                                                              : NULL;
    p->routed = (ref_pool){.E = c->E,
                           .F = c->F,
                           .activation = c->activation,
                           .sigmoid = c->expert_sigmoid,
                           .position = c->position,
                           .alpha = c->alpha,
                           .limit = c->limit,
                           .stored = stored,
                           .offset = c->offset};
    p->shared = (ref_pool){.E = c->shared, .F = c->F + 2, .activation = c->branch_activation};
    p->residual = (ref_pool){.E = c->residual, .F = c->F + 1, .activation = c->branch_activation};
    p->layer_sigmoid = c->layer_sigmoid, p->dropped = c->dropped;
    p->untouched = 77;
}

void layer_case_make(layer_case *c, uint64_t seed)
{
    static const double factors[REF_LOSSES] = {0.5, 2, 0, -1.5, 1.25, 0.75, -0.5};
    uint64_t state = seed * 7919 + 1;
    ref_problem *p = &c->p;
    memset(p, 0, sizeof *p);
    c->array_count = 0;
    make_groups_and_mask(c, &state);
    p->T = c->T, p->D = c->D, p->E = c->E;
    p->O = c->O ? c->O : c->D;
    p->K = c->kind == MOE_GATE_SOFTMAX_DENSE || layer_case_varies(c) ? c->E : c->K;
    if (c->kind == MOE_GATE_HIERARCHICAL) p->K = c->top_groups * c->K;
    p->top_k = layer_case_varies(c) ? c->K : p->K;
    p->gate_D = c->gate_D ? c->gate_D : c->D;
    make_gate_options(c);
    make_pools(c);
    for (int i = 0; i < REF_LOSSES; i++)
        p->weight[i] = c->call_weights[i] = c->weight[i],
        p->factor[i] = c->loss_factors ? factors[i] : 1;
    p->groups = c->groups;
    p->group_begin = c->group_begin;
    p->mask = c->mask;
    make_arrays(c, &state);
    make_routing(c, &state);
}

void layer_case_free(layer_case *c)
{
    for (int i = 0; i < c->array_count; i++) free(c->arrays[i]);
    free(c->group_begin);
    free(c->mask);
    free(c->ids);
    free(c->token_key);
    c->ids = NULL;
    c->token_key = NULL;
    c->array_count = 0;
    c->group_begin = NULL;
    c->mask = NULL;
}
