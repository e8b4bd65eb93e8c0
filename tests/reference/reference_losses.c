/* reference_losses.c - importance, load, the losses, the statistics, and their gradients. */
#include "reference/reference_parts.h"

#include <stdlib.h>

/* ---- losses ---------------------------------------------------------------------------------- */

double ref__cv2(const double *v, int64_t n, int ddof, double factor, double *dv)
{
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < n; i++) mean += v[i] / (double)n;
    for (int64_t i = 0; i < n && n > ddof; i++)
        variance += (v[i] - mean) * (v[i] - mean) / (double)(n - ddof);
    double scale = mean * mean + 1e-10;
    for (int64_t i = 0; i < n && dv; i++) {
        dv[i] = -factor * variance / (scale * scale) * 2 * mean / (double)n;
        if (n > ddof) dv[i] += factor * 2 * (v[i] - mean) / (double)(n - ddof) / scale;
    }
    return variance / scale;
}

load_row ref__row_of(const ref_problem *p, const ref_result *r, int64_t t, int *chosen, double *w)
{
    for (int64_t e = 0; e < p->E; e++) chosen[e] = 0, w[e] = 0;
    for (int64_t n = t * p->K; n < (t + 1) * p->K; n++)
        if (r->ids[n] >= 0) chosen[r->ids[n]] = 1, w[r->ids[n]] = r->w_before[n];
    int64_t at = t * p->E;
    return (load_row){p->E, r->logits + at, r->H + at, r->sd + at, chosen, w};
}

/* The smooth load of a flat gate. */
static void find_load(const ref_problem *p, ref_result *r)
{
    int *chosen = room(p->E, sizeof *chosen);
    double *w = reals(p->E);
    for (int64_t e = 0; e < p->E; e++) r->load[e] = 0;
    for (int64_t t = 0; t < p->T; t++) {
        load_row row = ref__row_of(p, r, t, chosen, w);
        for (int64_t e = 0; e < p->E && !masked(p, t); e++)
            r->load[e] += ref__load_of(&row, p->cdf_guard, e);
    }
    free(chosen), free(w);
}

void ref__count_all(const ref_problem *p, ref_result *r)
{
    for (int64_t n = 0; n < p->T * p->K; n++) {
        if (r->ids[n] < 0) continue;
        r->importance[r->ids[n]] += r->w_before[n];
        r->counts[r->ids[n]]++;
    }
    for (int64_t e = 0; e < p->E; e++) r->load[e] = (double)r->counts[e];
    if (p->fixed_weights) return;
    if (p->kind == NOISY) find_load(p, r);
    if (p->kind == HIERARCHICAL) ref__levels_load(p, r);
}

/* Importance and load. */
void ref__batch_losses(const ref_problem *p, ref_result *r)
{
    r->loss[0] = p->weight[0] * ref__cv2(r->importance, p->E, p->cv_ddof, 0, NULL);
    if (p->kind == NOISY || p->kind == HIERARCHICAL)
        r->loss[1] = p->weight[1] * ref__cv2(r->load, p->E, p->cv_ddof, 0, NULL);
}

/* Softmax of z[0..n), and its logsumexp. */
double ref__softmax_row(const double *z, int64_t n, double *P)
{
    double max = -INFINITY, sum = 0;
    for (int64_t e = 0; e < n; e++) max = fmax(max, z[e]);
    for (int64_t e = 0; e < n; e++) sum += exp(z[e] - max);
    for (int64_t e = 0; e < n; e++) P[e] = exp(z[e] - max) / sum;
    return max + log(sum);
}

/* Groups that have tokens. */
static double used_groups(const ref_problem *p)
{
    double used = 0;
    for (int64_t g = 0; g < groups_of(p); g++)
        used += valid_tokens(p, group_first(p, g), group_first(p, g + 1)) > 0;
    return used;
}

/* What P_te is multiplied by in switch and gshard, for the tokens [first, last) as one batch whose
 * losses have the factor `share`. */
static void softmax_slopes(const ref_problem *p, const ref_result *r, int64_t first, int64_t last,
                           double share, double *by_switch, double *by_gshard)
{
    double T = (double)valid_tokens(p, first, last), entries = 0;
    for (int64_t e = 0; e < p->E; e++) by_switch[e] = by_gshard[e] = 0;
    for (int64_t n = first * p->K; n < last * p->K; n++) {
        if (r->ids[n] < 0) continue;
        entries++;
        by_switch[r->ids[n]]++;
        if (n % p->K == 0) by_gshard[r->ids[n]]++;
    }
    for (int64_t e = 0; e < p->E && entries > 0; e++) {
        by_switch[e] *= share * (double)p->E / entries / T;
        by_gshard[e] *= share * (double)p->E / T / T;
    }
}

/* Adds switch, gshard and z of the tokens [first, last); z is of all T tokens. */
static void softmax_losses_of(const ref_problem *p, ref_result *r, int64_t first, int64_t last,
                              double share)
{
    double *P = reals(p->E), *dP = reals(p->E), T = (double)valid_tokens(p, 0, p->T);
    double *by_switch = reals(p->E), *by_gshard = reals(p->E);
    softmax_slopes(p, r, first, last, share, by_switch, by_gshard);
    for (int64_t t = first; t < last; t++) {
        if (masked(p, t)) continue;
        double lse = ref__softmax_row(r->logits + t * p->E, p->E, P), dot = 0;
        for (int64_t e = 0; e < p->E; e++) {
            r->loss[2] += p->weight[2] * by_switch[e] * P[e];
            r->loss[3] += p->weight[3] * by_gshard[e] * P[e];
            dP[e] = p->factor[2] * p->weight[2] * by_switch[e] +
                    p->factor[3] * p->weight[3] * by_gshard[e];
            dot += P[e] * dP[e];
        }
        r->loss[4] += p->weight[4] * lse * lse / T;
        double dz = p->factor[4] * p->weight[4] * 2 * lse / T;
        for (int64_t e = 0; e < p->E; e++) r->d_logits[t * p->E + e] += P[e] * (dP[e] - dot + dz);
    }
    free(P), free(dP), free(by_switch), free(by_gshard);
}

/* Switch, gshard and z; adds their gradients to d_logits. */
void ref__softmax_losses(const ref_problem *p, ref_result *r)
{
    if (!p->loss_by_group) {
        softmax_losses_of(p, r, 0, p->T, 1);
        return;
    }
    for (int64_t g = 0; g < groups_of(p); g++)
        softmax_losses_of(p, r, group_first(p, g), group_first(p, g + 1), 1 / used_groups(p));
}

/* sum_te (above_te - taken_te) (P_te - thr_e), in training. */
void ref__threshold_loss(const ref_problem *p, ref_result *r)
{
    double *P = reals(p->E), *w = reals(p->E), factor = p->factor[6] * p->weight[6];
    int *taken = room(p->E, sizeof *taken);
    for (int64_t t = 0; t < p->T && p->kind == BALANCED && p->train; t++) {
        double dot = 0;
        if (masked(p, t)) continue;
        (void)ref__softmax_row(r->logits + t * p->E, p->E, P);
        (void)ref__row_of(p, r, t, taken, w);
        for (int64_t e = 0; e < p->E; e++) {
            int more = (P[e] > p->threshold[e]) - taken[e];
            r->loss[6] += p->weight[6] * more * (P[e] - p->threshold[e]);
            r->d_threshold[e] -= factor * more;
            dot += P[e] * more;
        }
        for (int64_t e = 0; e < p->E; e++) {
            int more = (P[e] > p->threshold[e]) - taken[e];
            r->d_logits[t * p->E + e] += factor * P[e] * (more - dot);
        }
    }
    free(P), free(w), free(taken);
}

static void sequence_counts(const ref_problem *p, const ref_result *r, int64_t g, double *counts)
{
    for (int64_t e = 0; e < p->E; e++) counts[e] = 0;
    for (int64_t t = group_first(p, g); t < group_first(p, g + 1); t++)
        for (int32_t e = 0; e < p->E && !masked(p, t); e++) {
            int plain = p->kind == DENSE || rank_of(r->logits + t * p->E, p->E, e) < p->top_k;
            if (!p->sequence_routed) counts[e] += plain;
            for (int64_t k = 0; k < p->K && p->sequence_routed; k++)
                counts[e] += r->ids[t * p->K + k] == e;
        }
}

void ref__sequence_loss(const ref_problem *p, ref_result *r)
{
    double *counts = reals(p->E), *s = reals(p->E), used = used_groups(p);
    for (int64_t g = 0; g < groups_of(p); g++) {
        double T = (double)valid_tokens(p, group_first(p, g), group_first(p, g + 1)), entries = 0;
        sequence_counts(p, r, g, counts);
        for (int64_t e = 0; e < p->E; e++) entries += counts[e];
        for (int64_t t = group_first(p, g); t < group_first(p, g + 1) && entries > 0; t++) {
            const double *z = r->logits + t * p->E;
            double sum = 0, dot = 0, scale = (double)p->E / entries / T / used;
            if (masked(p, t)) continue;
            if (p->sequence_softmax) (void)ref__softmax_row(z, p->E, s);
            for (int64_t e = 0; e < p->E; e++)
                sum += s[e] = p->sequence_softmax ? s[e] : sigmoid(z[e]);
            for (int64_t e = 0; e < p->E; e++) dot += scale * counts[e] * s[e] / sum;
            r->loss[5] += p->weight[5] * dot;
            for (int64_t e = 0; e < p->E; e++) {
                double d = p->factor[5] * p->weight[5] * (scale * counts[e] - dot) / sum;
                r->d_logits[t * p->E + e] += d * s[e] * (p->sequence_softmax ? 1 : 1 - s[e]);
            }
        }
    }
    free(counts), free(s);
}

/* ---- statistics ------------------------------------------------------------------------------ */

/* Entropy of v[0..n) over its sum. */
static double entropy(const double *v, int64_t n)
{
    double sum = 0, result = 0;
    for (int64_t i = 0; i < n; i++) sum += v[i];
    for (int64_t i = 0; i < n && sum > 0; i++)
        if (v[i] > 0) result -= v[i] / sum * log(v[i] / sum);
    return result;
}

void ref__statistics(const ref_problem *p, ref_result *r)
{
    double *counts = reals(p->E), *s = r->stats, most = 0;
    int *touched = room(p->E, sizeof *touched);
    for (int64_t e = 0; e < p->E; e++) {
        counts[e] = (double)r->counts[e];
        s[1] += counts[e];
        most = fmax(most, counts[e]);
    }
    for (int64_t n = 0; n < p->T * p->K; n++)
        if (r->keep[n]) s[2]++, touched[r->ids[n]] = 1;
    for (int64_t e = 0; e < p->E; e++) s[4] += touched[e];
    s[0] = (double)valid_tokens(p, 0, p->T);
    s[3] = s[1] - s[2];
    s[5] = sqrt(ref__cv2(r->importance, p->E, p->cv_ddof, 0, NULL));
    s[6] = sqrt(ref__cv2(r->load, p->E, p->cv_ddof, 0, NULL));
    s[7] = s[1] > 0 ? most * (double)p->E / s[1] : 0;
    s[8] = entropy(counts, p->E);
    for (int64_t t = 0; t < p->T; t++)
        if (!masked(p, t)) s[9] += entropy(r->w_before + t * p->K, p->K) / s[0];
    free(counts), free(touched);
}
