/* layer_case.c - the contents of a case. Inputs are rounded to f32 first, so that f32 and f64
 * see the same. */
#include "support/layer_case.h"

#include <check.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
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

/* Who goes where, as a host might have decided: one in eight nowhere, some twice. */
static void make_routing(layer_case *c, uint64_t *state)
{
    ref_problem *p = &c->p;
    int64_t entries = c->T * p->K;
    if (!c->replay) return;
    c->ids = malloc(((size_t)entries + 1) * sizeof *c->ids);
    ck_assert_ptr_nonnull(c->ids);
    for (int64_t n = 0; n < entries; n++)
        c->ids[n] = random_uniform(state) < 0.125 ? -1
                                                  : (int32_t)(random_uniform(state) * (double)c->E);
    p->fixed_ids = c->ids;
    if (c->replay != 2) return;
    double *weights = random_array(c, state, entries, 1);
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
            if (e % 4 == 0)
                ck_assert_int_eq(moe_noise4(four, CASE_SEED, layer_id, CASE_STREAM, CASE_STEP,
                                            CASE_TOKEN_FIRST + t, e / 4),
                                 MOE_OK);
            noise[t * c->E + e] = (double)four[e % 4];
        }
    return c->arrays[c->array_count++] = noise;
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
    if (c->philox) p->noise = philox_noise(c);
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
    static const double factors[REF_LOSSES] = {0.5, 2, 0, -1.5, 1.25, 0.75};
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
    p->capacity = c->capacity_kind == MOE_CAPACITY_NONE     ? -2
                  : c->capacity_kind == MOE_CAPACITY_NUMBER ? c->capacity
                                                            : -1;
    p->capacity_factor = c->capacity_factor, p->capacity_rounding = c->capacity_rounding;
    p->capacity_minimum = c->capacity_minimum;
    p->renormalize_after_drop = c->renormalize_after_drop;
    p->activation = c->activation;
    p->expert_sigmoid = c->expert_sigmoid, p->layer_sigmoid = c->layer_sigmoid;
    for (int i = 0; i < REF_LOSSES; i++)
        p->weight[i] = c->call_weights[i] = c->weight[i],
        p->factor[i] = c->loss_factors ? factors[i] : 1;
    p->groups = c->groups;
    p->group_begin = c->group_begin;
    p->mask = c->mask;
    make_arrays(c, &state);
    make_routing(c, &state);
    if (!gated) p->W3 = NULL, p->b3 = NULL;
}

void layer_case_free(layer_case *c)
{
    for (int i = 0; i < c->array_count; i++) free(c->arrays[i]);
    free(c->group_begin);
    free(c->mask);
    free(c->ids);
    c->ids = NULL;
    c->array_count = 0;
    c->group_begin = NULL;
    c->mask = NULL;
}

void layer_case_print(const layer_case *c, char *text, size_t size)
{
    static const struct {
        const char *name;
        size_t at; /* of an int */
    } flags[] = {
#define FLAG(field) {#field, offsetof(layer_case, field)}
        FLAG(kind),
        FLAG(score),
        FLAG(order),
        FLAG(renormalize),
        FLAG(router_bias),
        FLAG(logits_in),
        FLAG(activation),
        FLAG(expert_bias),
        FLAG(expert_sigmoid),
        FLAG(layer_sigmoid),
        FLAG(layout),
        FLAG(glu_order),
        FLAG(no_experts),
        FLAG(eval),
        FLAG(cv_ddof),
        FLAG(sequence_softmax),
        FLAG(sequence_routed),
        FLAG(capacity_kind),
        FLAG(capacity_rounding),
        FLAG(renormalize_after_drop),
        FLAG(masked),
        FLAG(loss_factors),
        FLAG(philox),
        FLAG(per_call),
        FLAG(replay),
        FLAG(no_gate),
        FLAG(strided),
        FLAG(moved),
        FLAG(split),
        FLAG(bound)};
#undef FLAG
    int used = snprintf(text, size, "%s: T %lld D %lld E %lld F %lld O %lld K %lld", c->name,
                        (long long)c->T, (long long)c->D, (long long)c->E, (long long)c->F,
                        (long long)c->p.O, (long long)c->p.K);
    if (c->gate_D && used < (int)size)
        used += snprintf(text + used, size - (size_t)used, " gate_D %lld", (long long)c->gate_D);
    if (c->groups && used < (int)size)
        used += snprintf(text + used, size - (size_t)used, " groups %lld", (long long)c->groups);
    for (size_t i = 0; i < sizeof flags / sizeof *flags && used < (int)size; i++) {
        int value;
        memcpy(&value, (const char *)c + flags[i].at, sizeof value);
        if (value)
            used += snprintf(text + used, size - (size_t)used, " %s %d", flags[i].name, value);
    }
}
