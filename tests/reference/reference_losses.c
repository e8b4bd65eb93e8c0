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

static int chosen(const ref_problem *p, const ref_result *r, int64_t t, int64_t e)
{
    for (int64_t k = 0; k < p->K; k++)
        if (r->ids[t * p->K + k] == e) return 1;
    return 0;
}

/* The threshold of expert e at token t: the best other one if it was chosen, else the worst chosen.
 * -1 if there is none. */
static int64_t threshold(const ref_problem *p, const ref_result *r, int64_t t, int64_t e)
{
    int32_t found = -1;
    int inside = chosen(p, r, t, e);
    for (int32_t i = 0; i < p->E; i++) {
        if (chosen(p, r, t, i) == inside) continue;
        int better = found < 0 || before(r->H + t * p->E, i, found);
        if (found < 0 || better == inside) found = i;
    }
    return found;
}

/* Whether every expert is chosen: the load is then a count without gradient. */
static int all_chosen(const ref_problem *p, const ref_result *r, int64_t t)
{
    for (int64_t e = 0; e < p->E; e++)
        if (!chosen(p, r, t, e)) return 0;
    return 1;
}

static double load_of(const ref_problem *p, const ref_result *r, int64_t t, int64_t e)
{
    if (all_chosen(p, r, t)) {
        for (int64_t n = t * p->K; n < (t + 1) * p->K; n++)
            if (r->ids[n] == e) return r->w_before[n] > 0;
    }
    int64_t thr = threshold(p, r, t, e);
    if (thr < 0) return 0;
    double d = r->logits[t * p->E + e] - r->H[t * p->E + thr];
    double divisor = sqrt(2.0) * r->sd[t * p->E + e] + p->cdf_guard;
    if (divisor == 0) return d > 0 ? 1 : d < 0 ? 0 : 0.5;
    return 0.5 * (1 + erf(d / divisor));
}

void ref__count_all(const ref_problem *p, ref_result *r)
{
    for (int64_t n = 0; n < p->T * p->K; n++) {
        if (r->ids[n] < 0) continue;
        r->importance[r->ids[n]] += r->w_before[n];
        r->counts[r->ids[n]]++;
    }
    for (int64_t e = 0; e < p->E; e++)
        r->load[e] = p->kind == 1 && !p->fixed_weights ? 0 : (double)r->counts[e];
    for (int64_t t = 0; t < p->T && p->kind == 1 && !p->fixed_weights; t++)
        for (int64_t e = 0; e < p->E && !masked(p, t); e++) r->load[e] += load_of(p, r, t, e);
}

/* Importance and load. */
void ref__batch_losses(const ref_problem *p, ref_result *r)
{
    r->loss[0] = p->weight[0] * ref__cv2(r->importance, p->E, p->cv_ddof, 0, NULL);
    if (p->kind == 1) r->loss[1] = p->weight[1] * ref__cv2(r->load, p->E, p->cv_ddof, 0, NULL);
}

/* One token's softmax of the clean logits, and its logsumexp. */
double ref__softmax_row(const ref_problem *p, const double *z, double *P)
{
    double max = -INFINITY, sum = 0;
    for (int64_t e = 0; e < p->E; e++) max = fmax(max, z[e]);
    for (int64_t e = 0; e < p->E; e++) sum += exp(z[e] - max);
    for (int64_t e = 0; e < p->E; e++) P[e] = exp(z[e] - max) / sum;
    return max + log(sum);
}

static int64_t valid_tokens(const ref_problem *p, int64_t first, int64_t last)
{
    int64_t count = 0;
    for (int64_t t = first; t < last; t++) count += !masked(p, t);
    return count;
}

/* Switch, gshard and z over the batch; adds their gradients to d_logits. */
void ref__softmax_losses(const ref_problem *p, ref_result *r)
{
    double *P = reals(p->E), *dP = reals(p->E), T = (double)valid_tokens(p, 0, p->T), entries = 0;
    int64_t *firsts = room(p->E, sizeof *firsts);
    for (int64_t e = 0; e < p->E; e++) entries += (double)r->counts[e];
    for (int64_t t = 0; t < p->T; t++)
        if (r->ids[t * p->K] >= 0) firsts[r->ids[t * p->K]]++;
    for (int64_t t = 0; t < p->T && entries > 0; t++) {
        if (masked(p, t)) continue;
        double lse = ref__softmax_row(p, r->logits + t * p->E, P), dot = 0;
        for (int64_t e = 0; e < p->E; e++) {
            double by_switch = (double)p->E * (double)r->counts[e] / entries / T;
            double by_gshard = (double)p->E * (double)firsts[e] / T / T;
            r->loss[2] += p->weight[2] * by_switch * P[e];
            r->loss[3] += p->weight[3] * by_gshard * P[e];
            dP[e] = p->factor[2] * p->weight[2] * by_switch +
                    p->factor[3] * p->weight[3] * by_gshard;
            dot += P[e] * dP[e];
        }
        r->loss[4] += p->weight[4] * lse * lse / T;
        double dz = p->factor[4] * p->weight[4] * 2 * lse / T;
        for (int64_t e = 0; e < p->E; e++) r->d_logits[t * p->E + e] += P[e] * (dP[e] - dot + dz);
    }
    free(P), free(dP), free(firsts);
}

static void sequence_counts(const ref_problem *p, const ref_result *r, int64_t g, double *counts)
{
    for (int64_t e = 0; e < p->E; e++) counts[e] = 0;
    for (int64_t t = group_first(p, g); t < group_first(p, g + 1); t++)
        for (int32_t e = 0; e < p->E && !masked(p, t); e++)
            for (int64_t k = 0; k < p->K; k++) {
                int routed = r->ids[t * p->K + k] == e;
                int plain = p->kind == 2 ? k == e : rank_of(r->logits + t * p->E, p->E, e) == k;
                counts[e] += p->sequence_routed ? routed : plain;
            }
}

void ref__sequence_loss(const ref_problem *p, ref_result *r)
{
    double *counts = reals(p->E), *s = reals(p->E), used = 0;
    for (int64_t g = 0; g < groups_of(p); g++)
        used += valid_tokens(p, group_first(p, g), group_first(p, g + 1)) > 0;
    for (int64_t g = 0; g < groups_of(p); g++) {
        double T = (double)valid_tokens(p, group_first(p, g), group_first(p, g + 1)), entries = 0;
        sequence_counts(p, r, g, counts);
        for (int64_t e = 0; e < p->E; e++) entries += counts[e];
        for (int64_t t = group_first(p, g); t < group_first(p, g + 1) && entries > 0; t++) {
            const double *z = r->logits + t * p->E;
            double sum = 0, dot = 0, scale = (double)p->E / entries / T / used;
            if (masked(p, t)) continue;
            if (p->sequence_softmax) (void)ref__softmax_row(p, z, s);
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

void ref__load_backward(const ref_problem *p, const ref_result *r, int64_t t, const double *d_load,
                        double *d_clean, double *dH, double *d_sd)
{
    if (p->kind != 1 || !p->train || all_chosen(p, r, t)) return;
    for (int64_t e = 0; e < p->E; e++) {
        int64_t at = t * p->E + e, thr = threshold(p, r, t, e);
        if (thr < 0 || r->sd[at] <= 0) continue;
        double divisor = sqrt(2.0) * r->sd[at] + p->cdf_guard;
        double q = (r->logits[at] - r->H[t * p->E + thr]) / divisor;
        double slope = d_load[e] * exp(-q * q) / sqrt(4 * atan(1.0)) / divisor;
        d_clean[e] += slope;
        dH[thr] -= slope;
        d_sd[e] -= slope * q * sqrt(2.0);
    }
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
