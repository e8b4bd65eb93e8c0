/* reference_gate.c - logits, noise and weights of a gate of one level, and the way back through
 * them. */
#include "reference/reference_parts.h"

#include <stdlib.h>

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
            if (p->kind != NOISY || !p->train) continue;
            for (int64_t d = 0; d < p->gate_D; d++) raw += gate_row(p, t)[d] * p->Wn[d * p->E + e];
            r->sd[at] = softplus(raw) + p->noise_epsilon;
            r->H[at] += p->noise[at] * r->sd[at];
        }
}

/* The weights are a softmax over the chosen logits alone. */
static int after_selection(const ref_problem *p)
{
    if (p->kind == BALANCED || p->kind == EXPERT_CHOICE) return 0;
    if (p->kind == NOISY || p->kind == DENSE) return 1;
    return !p->score && !p->order;
}

static int renormalizes(const ref_problem *p) { return p->renormalize || p->kind == BALANCED; }

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
        u[k] = ids[k] < 0 ? 0 : p->score ? sigmoid(h[ids[k]]) : exp(h[ids[k]] - max) / sum;
}

/* What the scores are divided by. *fixed: it is the minimum, which has no gradient. */
static double scores_divisor(const ref_problem *p, const double *u, int *fixed)
{
    double sum = p->kind == BALANCED ? 0 : p->renormalize_epsilon;
    double minimum = p->kind == BALANCED ? 0 : p->renormalize_minimum;
    *fixed = 1;
    if (!renormalizes(p)) return 1;
    for (int64_t k = 0; k < p->K; k++) sum += u[k];
    *fixed = sum < minimum;
    return fmax(sum, minimum);
}

void ref__weigh(const ref_problem *p, ref_result *r)
{
    int fixed;
    for (int64_t t = 0; t < p->T; t++) {
        double *w = r->w_before + t * p->K;
        for (int64_t k = 0; k < p->K && p->fixed_weights; k++)
            w[k] = r->ids[t * p->K + k] < 0 ? 0 : p->fixed_weights[t * p->K + k];
        if (p->fixed_weights) continue;
        chosen_scores(p, r, t, w);
        double divisor = scores_divisor(p, w, &fixed);
        for (int64_t k = 0; k < p->K; k++)
            w[k] = divisor != 0 ? w[k] * p->route_scale / divisor : 0;
    }
}

/* ---- back through the gate ------------------------------------------------------------------- */

void ref__drop_backward(const ref_problem *p, const ref_result *r, int64_t t,
                        const double *d_importance, double *dw)
{
    double sum = 0, dot = 0;
    for (int64_t k = 0; k < p->K; k++) {
        int64_t n = t * p->K + k;
        dw[k] = r->keep[n] ? r->d_w[n] : 0;
        sum += r->keep[n] ? r->w_before[n] : 0;
        dot += dw[k] * r->w[n];
    }
    if (sum < p->renormalize_minimum) sum = p->renormalize_minimum, dot = 0;
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
    int fixed;
    chosen_scores(p, r, t, u);
    double divisor = scores_divisor(p, u, &fixed);
    for (int64_t k = 0; k < p->K && divisor != 0; k++)
        for (int64_t j = 0; j < p->K; j++) {
            double d = (k == j ? 1 / divisor : 0) - (fixed ? 0 : u[j] / divisor / divisor);
            du[k] += p->route_scale * dw[j] * d;
        }
    (void)ref__softmax_row(r->H + t * p->E, p->E, P);
    for (int64_t k = 0; k < p->K; k++) {
        if (ids[k] < 0) continue;
        if (p->score) {
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

/* The gradients by one token's logits and noise, to the input and the parameters. */
static void logits_backward(const ref_problem *p, ref_result *r, int64_t t, const double *dH,
                            const double *d_sd)
{
    double *d_clean = r->d_logits + t * p->E, *dx = r->d_gate_x + t * p->gate_D;
    for (int64_t e = 0; e < p->E; e++) {
        double draw = 0, sd = r->sd[t * p->E + e];
        d_clean[e] += dH[e];
        if (p->kind == NOISY && p->train) /* softplus' = 1 - exp(-softplus) */
            draw = (d_sd[e] + dH[e] * p->noise[t * p->E + e]) * -expm1(p->noise_epsilon - sd);
        if (!p->logits_in && p->bg) r->dbg[e] += d_clean[e];
        for (int64_t d = 0; d < p->gate_D; d++) {
            int64_t at = d * p->E + e;
            double x = gate_row(p, t)[d];
            if (p->Wn) r->dWn[at] += x * draw, dx[d] += draw * p->Wn[at];
            if (p->logits_in) continue;
            r->dWg[at] += x * d_clean[e];
            dx[d] += d_clean[e] * p->Wg[at];
        }
    }
}

void ref__gate_backward(const ref_problem *p, ref_result *r)
{
    double *d_importance = reals(p->E), *d_load = reals(p->E), *dw = reals(p->K), *w = reals(p->E);
    int *chosen = room(p->E, sizeof *chosen);
    (void)ref__cv2(r->importance, p->E, p->cv_ddof, p->factor[0] * p->weight[0], d_importance);
    (void)ref__cv2(r->load, p->E, p->cv_ddof, p->factor[1] * p->weight[1], d_load);
    for (int64_t t = 0; t < p->T; t++) {
        double *dH = reals(p->E), *d_sd = reals(p->E), *d_clean = r->d_logits + t * p->E;
        load_row row = ref__row_of(p, r, t, chosen, w);
        if (!masked(p, t)) {
            ref__drop_backward(p, r, t, d_importance, dw);
            scores_backward(p, r, t, dw, dH);
            if (p->kind == NOISY && p->train)
                ref__load_backward(&row, p->cdf_guard, d_load, d_clean, dH, d_sd);
            logits_backward(p, r, t, dH, d_sd);
        }
        free(dH), free(d_sd);
    }
    free(d_importance), free(d_load), free(dw), free(w), free(chosen);
}
