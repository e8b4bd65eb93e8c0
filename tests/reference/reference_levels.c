/* reference_levels.c - the hierarchical gate: a noisy gate among A groups, one of each group among
 * its B experts.
 *
 *     w = route_scale G_i G_ij,   load_ij = load_i load(X_i)_j / |X_i|,   X_i the tokens of
 *     group i */
#include "reference/reference_parts.h"

#include <stdlib.h>

/* One gate at one token: weights [gate_D,n] and where its row of results lies. */
typedef struct gate_part {
    int64_t n, k;
    const double *W, *Wn, *noise;
    double *clean, *H, *sd, *w, *dW, *dWn;
    int *chosen;
} gate_part;

static gate_part primary_of(const ref_problem *p, ref_result *r, int64_t t)
{
    ref_levels *l = &r->levels;
    int64_t A = p->expert_groups, at = t * A;
    return (gate_part){A,
                       p->top_groups,
                       p->Wp,
                       p->Wq,
                       p->noise_primary + at,
                       l->clean1 + at,
                       l->H1 + at,
                       l->sd1 + at,
                       l->w1 + at,
                       r->dWp,
                       r->dWq,
                       l->chosen1 + at};
}

static gate_part secondary_of(const ref_problem *p, ref_result *r, int64_t t, int64_t i)
{
    ref_levels *l = &r->levels;
    int64_t B = p->E / p->expert_groups, at = t * p->E + i * B, matrix = i * p->gate_D * B;
    return (gate_part){
        B,          p->second_k, p->Wg + matrix, p->Wn + matrix,  p->noise + at,   l->clean2 + at,
        l->H2 + at, l->sd2 + at, l->w2 + at,     r->dWg + matrix, r->dWn + matrix, l->chosen2 + at};
}

static load_row row_of(const gate_part *g)
{
    return (load_row){g->n, g->clean, g->H, g->sd, g->chosen, g->w};
}

/* ---- forward --------------------------------------------------------------------------------- */

/* Logits and noise; chosen by H unless it is fixed; weights. */
static void part_forward(const ref_problem *p, int64_t t, const gate_part *g)
{
    double sum = 0, max = -INFINITY;
    for (int64_t i = 0; i < g->n; i++) {
        double raw = 0;
        for (int64_t d = 0; d < p->gate_D; d++) {
            g->clean[i] += gate_row(p, t)[d] * g->W[d * g->n + i];
            raw += gate_row(p, t)[d] * g->Wn[d * g->n + i];
        }
        g->sd[i] = p->train ? softplus(raw) + p->noise_epsilon : 0;
        g->H[i] = g->clean[i] + (p->train ? g->noise[i] * g->sd[i] : 0);
    }
    for (int32_t i = 0; i < g->n && !p->fixed_ids; i++)
        g->chosen[i] = rank_of(g->H, g->n, i) < g->k;
    for (int64_t i = 0; i < g->n; i++) max = fmax(max, g->chosen[i] ? g->H[i] : -INFINITY);
    for (int64_t i = 0; i < g->n; i++) sum += g->chosen[i] ? exp(g->H[i] - max) : 0;
    for (int64_t i = 0; i < g->n; i++) g->w[i] = g->chosen[i] ? exp(g->H[i] - max) / sum : 0;
}

/* Choices of a routing that is kept. */
static void fix_choices(const ref_problem *p, ref_result *r, int64_t t)
{
    int64_t A = p->expert_groups, B = p->E / A;
    for (int64_t n = t * p->K; n < (t + 1) * p->K && p->fixed_ids; n++) {
        if (p->fixed_ids[n] < 0) continue;
        r->levels.chosen1[t * A + p->fixed_ids[n] / B] = 1;
        r->levels.chosen2[t * p->E + p->fixed_ids[n]] = 1;
    }
}

/* The entries of a token: groups by descending H, experts of each by descending H. */
static void list_entries(const ref_problem *p, ref_result *r, int64_t t)
{
    int64_t A = p->expert_groups, B = p->E / A;
    for (int32_t i = 0; i < A; i++) {
        int64_t of_group = rank_of(r->levels.H1 + t * A, A, i);
        for (int32_t j = 0; j < B && of_group < p->top_groups; j++) {
            int64_t of_expert = rank_of(r->levels.H2 + t * p->E + i * B, B, j);
            if (of_expert < p->second_k)
                r->ids[t * p->K + of_group * p->second_k + of_expert] = (int32_t)(i * B + j);
        }
    }
}

void ref__levels_forward(const ref_problem *p, ref_result *r)
{
    int64_t A = p->expert_groups, B = p->E / A;
    for (int64_t t = 0; t < p->T; t++) {
        for (int64_t n = t * p->K; n < (t + 1) * p->K; n++)
            r->ids[n] = p->fixed_ids && !masked(p, t) ? p->fixed_ids[n] : -1;
        if (masked(p, t)) continue;
        fix_choices(p, r, t);
        gate_part first = primary_of(p, r, t);
        part_forward(p, t, &first);
        for (int64_t i = 0; i < A; i++) {
            gate_part second = secondary_of(p, r, t, i);
            if (!first.chosen[i]) continue;
            part_forward(p, t, &second);
            r->levels.rows[i]++;
        }
        if (!p->fixed_ids) list_entries(p, r, t);
        for (int64_t n = t * p->K; n < (t + 1) * p->K; n++)
            if (r->ids[n] >= 0)
                r->w_before[n] = p->route_scale * first.w[r->ids[n] / B] *
                                 r->levels.w2[t * p->E + r->ids[n]];
    }
}

void ref__levels_load(const ref_problem *p, ref_result *r)
{
    ref_levels *l = &r->levels;
    int64_t A = p->expert_groups, B = p->E / A;
    for (int64_t t = 0; t < p->T; t++) {
        if (masked(p, t)) continue;
        gate_part first = primary_of(p, r, t);
        load_row row = row_of(&first);
        for (int64_t i = 0; i < A; i++) {
            gate_part second = secondary_of(p, r, t, i);
            load_row inner = row_of(&second);
            l->load1[i] += ref__load_of(&row, p->cdf_guard, i);
            for (int64_t j = 0; j < B && first.chosen[i]; j++)
                l->load2[i * B + j] += ref__load_of(&inner, p->cdf_guard, j);
        }
    }
    for (int64_t e = 0; e < p->E; e++)
        r->load[e] = l->rows[e / B] ? l->load1[e / B] * l->load2[e] / (double)l->rows[e / B] : 0;
}

/* ---- backward -------------------------------------------------------------------------------- */

/* From dw and the gradient by this gate's load to parameters and input. */
static void part_backward(const ref_problem *p, ref_result *r, int64_t t, const gate_part *g,
                          const double *dw, const double *d_load)
{
    double *dH = reals(g->n), *d_sd = reals(g->n), *d_clean = reals(g->n);
    load_row row = row_of(g);
    for (int64_t i = 0; i < g->n; i++)
        for (int64_t j = 0; j < g->n; j++) dH[j] += dw[i] * g->w[i] * ((i == j) - g->w[j]);
    if (p->train) ref__load_backward(&row, p->cdf_guard, d_load, d_clean, dH, d_sd);
    for (int64_t i = 0; i < g->n; i++) {
        double draw = 0;
        d_clean[i] += dH[i];
        if (p->train) draw = (d_sd[i] + dH[i] * g->noise[i]) * -expm1(p->noise_epsilon - g->sd[i]);
        for (int64_t d = 0; d < p->gate_D; d++) {
            g->dW[d * g->n + i] += gate_row(p, t)[d] * d_clean[i];
            g->dWn[d * g->n + i] += gate_row(p, t)[d] * draw;
            r->d_gate_x[t * p->gate_D + d] += g->W[d * g->n + i] * d_clean[i] +
                                              g->Wn[d * g->n + i] * draw;
        }
    }
    free(dH), free(d_sd), free(d_clean);
}

static void token_backward(const ref_problem *p, ref_result *r, int64_t t, const double *dw,
                           const double *d_load1, const double *d_load2)
{
    int64_t A = p->expert_groups, B = p->E / A;
    double *dw1 = reals(A), *dw2 = reals(p->E);
    gate_part first = primary_of(p, r, t);
    for (int64_t k = 0; k < p->K; k++) {
        int32_t e = r->ids[t * p->K + k];
        if (e < 0) continue;
        dw1[e / B] += p->route_scale * dw[k] * r->levels.w2[t * p->E + e];
        dw2[e] += p->route_scale * dw[k] * first.w[e / B];
    }
    part_backward(p, r, t, &first, dw1, d_load1);
    for (int64_t i = 0; i < A; i++) {
        gate_part second = secondary_of(p, r, t, i);
        if (first.chosen[i]) part_backward(p, r, t, &second, dw2 + i * B, d_load2 + i * B);
    }
    free(dw1), free(dw2);
}

void ref__levels_backward(const ref_problem *p, ref_result *r)
{
    const ref_levels *l = &r->levels;
    int64_t A = p->expert_groups, B = p->E / A;
    double *d_importance = reals(p->E), *d_load = reals(p->E), *dw = reals(p->K);
    double *d_load1 = reals(A), *d_load2 = reals(p->E);
    (void)ref__cv2(r->importance, p->E, p->cv_ddof, p->factor[0] * p->weight[0], d_importance);
    (void)ref__cv2(r->load, p->E, p->cv_ddof, p->factor[1] * p->weight[1], d_load);
    for (int64_t e = 0; e < p->E; e++) {
        if (!l->rows[e / B]) continue;
        d_load1[e / B] += d_load[e] * l->load2[e] / (double)l->rows[e / B];
        d_load2[e] = d_load[e] * l->load1[e / B] / (double)l->rows[e / B];
    }
    for (int64_t t = 0; t < p->T; t++) {
        if (masked(p, t)) continue;
        ref__drop_backward(p, r, t, d_importance, dw);
        token_backward(p, r, t, dw, d_load1, d_load2);
    }
    free(d_importance), free(d_load), free(dw), free(d_load1), free(d_load2);
}
