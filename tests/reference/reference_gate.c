/* reference_gate.c - logits, noise, selection, weights and dropping, and the way back through
 * them. */
#include "reference/reference_parts.h"

#include <stdlib.h>
#include <string.h>

/* ---- gate ------------------------------------------------------------------------------------ */

void ref__gate_logits(const ref_problem *p, ref_result *r)
{
    for (int64_t t = 0; t < p->T; t++)
        for (int64_t e = 0; e < p->E; e++) {
            int64_t at = t * p->E + e;
            double raw = 0;
            if (p->logits_in) {
                r->logits[at] = p->logits_in[at];
            } else {
                for (int64_t d = 0; d < p->gate_D; d++)
                    r->logits[at] += gate_row(p, t)[d] * p->Wg[d * p->E + e];
                if (p->bg) r->logits[at] += p->bg[e];
            }
            r->H[at] = r->logits[at];
            if (p->kind != 1 || !p->train) continue;
            for (int64_t d = 0; d < p->gate_D; d++) raw += gate_row(p, t)[d] * p->Wn[d * p->E + e];
            r->sd[at] = (raw > 30 ? raw : log1p(exp(raw))) + p->noise_epsilon;
            r->H[at] += p->noise[at] * r->sd[at];
        }
}

void ref__select_experts(const ref_problem *p, ref_result *r)
{
    for (int64_t t = 0; t < p->T; t++) {
        int32_t *ids = r->ids + t * p->K;
        for (int64_t k = 0; k < p->K; k++) ids[k] = p->fixed_ids ? p->fixed_ids[t * p->K + k] : -1;
        for (int32_t e = 0; e < p->E && !p->fixed_ids; e++) {
            int64_t rank = p->kind == 2 ? e : rank_of(r->H + t * p->E, p->E, e);
            if (rank < p->K) ids[rank] = e;
        }
        for (int64_t k = 0; k < p->K && masked(p, t); k++) ids[k] = -1;
    }
}

static int after_selection(const ref_problem *p)
{
    return p->kind != 0 || (!p->score && !p->order);
}

/* Scores of the K chosen before renormalisation and scale. */
static void chosen_scores(const ref_problem *p, const ref_result *r, int64_t t, double *u)
{
    const double *h = r->H + t * p->E;
    const int32_t *ids = r->ids + t * p->K;
    double sum = 0, max = -INFINITY;
    for (int64_t e = 0; e < p->E; e++) max = fmax(max, h[e]);
    for (int64_t e = 0; e < p->E && !after_selection(p); e++) sum += exp(h[e] - max);
    for (int64_t k = 0; k < p->K && after_selection(p); k++)
        sum += ids[k] < 0 ? 0 : exp(h[ids[k]] - max);
    for (int64_t k = 0; k < p->K; k++)
        u[k] = ids[k] < 0                 ? 0
               : p->score && p->kind == 0 ? sigmoid(h[ids[k]])
                                          : exp(h[ids[k]] - max) / sum;
}

static double scores_divisor(const ref_problem *p, const double *u)
{
    double sum = p->renormalize_epsilon;
    if (!p->renormalize) return 1;
    for (int64_t k = 0; k < p->K; k++) sum += u[k];
    return sum;
}

void ref__weigh(const ref_problem *p, ref_result *r)
{
    for (int64_t t = 0; t < p->T; t++) {
        double *w = r->w_before + t * p->K;
        for (int64_t k = 0; k < p->K && p->fixed_weights; k++)
            w[k] = r->ids[t * p->K + k] < 0 ? 0 : p->fixed_weights[t * p->K + k];
        if (p->fixed_weights) continue;
        chosen_scores(p, r, t, w);
        double divisor = scores_divisor(p, w);
        for (int64_t k = 0; k < p->K; k++) w[k] *= p->route_scale / divisor;
    }
}

/* ---- plan ------------------------------------------------------------------------------------ */

static int64_t capacity_of_group(const ref_problem *p, int64_t g)
{
    int64_t tokens = 0;
    for (int64_t t = group_first(p, g); t < group_first(p, g + 1); t++) tokens += !masked(p, t);
    if (p->capacity == -2) return INT64_MAX;
    if (p->capacity >= 0) return p->capacity;
    double exact = p->capacity_factor * (double)(p->K * tokens) / (double)p->E;
    double rows = p->capacity_rounding == 0   ? ceil(exact)
                  : p->capacity_rounding == 1 ? floor(exact)
                                              : floor(exact + 0.5);
    rows = fmax(rows, (double)p->capacity_minimum);
    return (int64_t)fmin(rows, (double)(tokens * p->K));
}

void ref__drop(const ref_problem *p, ref_result *r)
{
    int64_t *used = room(p->E, sizeof *used);
    for (int64_t g = 0; g < groups_of(p); g++) {
        memset(used, 0, (size_t)p->E * sizeof *used);
        for (int64_t n = group_first(p, g) * p->K; n < group_first(p, g + 1) * p->K; n++) {
            r->keep[n] = r->ids[n] >= 0 && used[r->ids[n]] < capacity_of_group(p, g);
            if (r->keep[n]) used[r->ids[n]]++;
        }
    }
    free(used);
    for (int64_t t = 0; t < p->T; t++) {
        double sum = 0;
        for (int64_t n = t * p->K; n < (t + 1) * p->K; n++)
            sum += r->w[n] = r->keep[n] ? r->w_before[n] : 0;
        for (int64_t n = t * p->K; n < (t + 1) * p->K && p->renormalize_after_drop; n++)
            r->w[n] = sum != 0 ? r->w[n] / sum : 0;
    }
}

/* ---- back through the gate ------------------------------------------------------------------- */

/* Gradient by the weights before dropping, of one token. */
static void drop_backward(const ref_problem *p, const ref_result *r, int64_t t,
                          const double *d_importance, double *dw)
{
    double sum = 0, dot = 0;
    for (int64_t k = 0; k < p->K; k++) {
        int64_t n = t * p->K + k;
        dw[k] = r->keep[n] ? r->d_w[n] : 0;
        sum += r->keep[n] ? r->w_before[n] : 0;
        dot += dw[k] * r->w[n];
    }
    for (int64_t k = 0; k < p->K; k++) {
        int64_t n = t * p->K + k;
        if (p->renormalize_after_drop) dw[k] = r->keep[n] && sum != 0 ? (dw[k] - dot) / sum : 0;
        if (r->ids[n] >= 0) dw[k] += d_importance[r->ids[n]];
    }
}

/* dH of one token from dw. The Jacobian of the scores is written out entry by entry. */
static void scores_backward(const ref_problem *p, const ref_result *r, int64_t t, double *dw,
                            double *dH)
{
    double *u = reals(p->K), *du = reals(p->K), *P = reals(p->E);
    const int32_t *ids = r->ids + t * p->K;
    chosen_scores(p, r, t, u);
    double divisor = scores_divisor(p, u);
    for (int64_t k = 0; k < p->K; k++)
        for (int64_t j = 0; j < p->K; j++) {
            double d = (k == j ? 1 / divisor : 0) - (p->renormalize ? u[j] / divisor / divisor : 0);
            du[k] += p->route_scale * dw[j] * d;
        }
    (void)ref__softmax_row(p, r->H + t * p->E, P);
    for (int64_t k = 0; k < p->K; k++) {
        if (ids[k] < 0) continue;
        if (p->score && p->kind == 0) {
            dH[ids[k]] += du[k] * u[k] * (1 - u[k]);
        } else if (after_selection(p)) {
            for (int64_t j = 0; j < p->K; j++)
                if (ids[j] >= 0) dH[ids[j]] += du[k] * u[k] * ((k == j) - u[j]);
        } else {
            for (int64_t e = 0; e < p->E; e++) dH[e] += du[k] * u[k] * ((e == ids[k]) - P[e]);
        }
    }
    free(u), free(du), free(P);
}

void ref__gate_backward(const ref_problem *p, ref_result *r)
{
    double *d_importance = reals(p->E), *d_load = reals(p->E), *dw = reals(p->K);
    (void)ref__cv2(r->importance, p->E, p->cv_ddof, p->factor[0] * p->weight[0], d_importance);
    (void)ref__cv2(r->load, p->E, p->cv_ddof, p->factor[1] * p->weight[1], d_load);
    for (int64_t t = 0; t < p->T; t++) {
        double *dH = reals(p->E), *d_sd = reals(p->E), *d_clean = r->d_logits + t * p->E;
        if (!masked(p, t)) {
            drop_backward(p, r, t, d_importance, dw);
            scores_backward(p, r, t, dw, dH);
            ref__load_backward(p, r, t, d_load, d_clean, dH, d_sd);
        }
        for (int64_t e = 0; e < p->E && !masked(p, t); e++) {
            double draw = 0, sd = r->sd[t * p->E + e];
            d_clean[e] += dH[e];
            if (p->kind == 1 && p->train) /* softplus' = 1 - exp(-softplus) */
                draw = (d_sd[e] + dH[e] * p->noise[t * p->E + e]) * -expm1(p->noise_epsilon - sd);
            if (!p->logits_in && p->bg) r->dbg[e] += d_clean[e];
            for (int64_t d = 0; d < p->gate_D; d++) {
                int64_t at = d * p->E + e;
                double x = gate_row(p, t)[d];
                if (p->Wn)
                    r->dWn[at] += x * draw, r->d_gate_x[t * p->gate_D + d] += draw * p->Wn[at];
                if (p->logits_in) continue;
                r->dWg[at] += x * d_clean[e];
                r->d_gate_x[t * p->gate_D + d] += d_clean[e] * p->Wg[at];
            }
        }
        free(dH), free(d_sd);
    }
    free(d_importance), free(d_load), free(dw);
}
