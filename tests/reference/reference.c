/* reference.c - the parts of ref_run in the order of the picture: gate, plan, losses, experts. */
#include "reference/reference.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *room(int64_t count, size_t size)
{
    void *memory = calloc((size_t)count + 1, size);
    if (!memory) {
        fprintf(stderr, "reference: out of memory\n");
        exit(2);
    }
    return memory;
}

static double *reals(int64_t count) { return room(count, sizeof(double)); }

static void make_room(const ref_problem *p, ref_result *r)
{
    int64_t TE = p->T * p->E, TK = p->T * p->K, expert = p->E;
    memset(r, 0, sizeof *r);
    r->logits = reals(TE), r->H = reals(TE), r->sd = reals(TE);
    r->ids = room(TK, sizeof *r->ids), r->keep = room(TK, sizeof *r->keep);
    r->w_before = reals(TK), r->w = reals(TK), r->d_w = reals(TK);
    r->importance = reals(p->E), r->load = reals(p->E);
    r->counts = room(p->E, sizeof *r->counts);
    r->y = reals(p->T * p->O), r->dx = reals(p->T * p->D), r->d_gate_x = reals(p->T * p->gate_D);
    r->d_logits = reals(TE), r->dWg = reals(p->gate_D * p->E), r->dbg = reals(p->E);
    r->dWn = reals(p->gate_D * p->E);
    r->dW1 = reals(expert * p->D * p->F), r->db1 = reals(expert * p->F);
    r->dW3 = reals(expert * p->D * p->F), r->db3 = reals(expert * p->F);
    r->dW2 = reals(expert * p->F * p->O), r->db2 = reals(expert * p->O);
}

void ref_free(ref_result *r)
{
    void *all[] = {r->logits, r->H,  r->sd, r->ids, r->keep,     r->w_before, r->w,   r->d_w, r->importance,
                   r->load,   r->counts, r->y, r->dx, r->d_gate_x, r->d_logits, r->dWg, r->dbg, r->dWn,
                   r->dW1,    r->db1, r->dW3, r->db3, r->dW2,      r->db2};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    memset(r, 0, sizeof *r);
}

static int64_t groups_of(const ref_problem *p) { return p->group_begin ? p->groups : 1; }
static int64_t group_first(const ref_problem *p, int64_t g) { return p->group_begin ? p->group_begin[g] : g * p->T; }
static int masked(const ref_problem *p, int64_t t) { return p->mask && !p->mask[t]; }

static double sigmoid(double z) { return z >= 0 ? 1 / (1 + exp(-z)) : exp(z) / (1 + exp(z)); }
static double normal_cdf(double z) { return 0.5 * erfc(-z / sqrt(2.0)); }
static double normal_pdf(double z) { return exp(-z * z / 2) / sqrt(8 * atan(1.0)); }

static const double *gate_row(const ref_problem *p, int64_t t)
{
    return (p->gate_x ? p->gate_x : p->x) + t * p->gate_D;
}

/* ---- gate ------------------------------------------------------------------------------------------ */

static void gate_logits(const ref_problem *p, ref_result *r)
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

/* Whether expert a comes before b. */
static int before(const double *v, int32_t a, int32_t b)
{
    if (isnan(v[a]) || isnan(v[b])) return isnan(v[a]) == isnan(v[b]) ? a < b : isnan(v[b]);
    return v[a] != v[b] ? v[a] > v[b] : a < b;
}

/* The number of experts that come before e. */
static int64_t rank_of(const double *v, int64_t E, int32_t e)
{
    int64_t rank = 0;
    for (int32_t i = 0; i < E; i++) rank += i != e && before(v, i, e);
    return rank;
}

static void select_experts(const ref_problem *p, ref_result *r)
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

static int after_selection(const ref_problem *p) { return p->kind != 0 || (!p->score && !p->order); }

/* Scores of the K chosen before renormalisation and scale. */
static void chosen_scores(const ref_problem *p, const ref_result *r, int64_t t, double *u)
{
    const double *h = r->H + t * p->E;
    const int32_t *ids = r->ids + t * p->K;
    double sum = 0, max = -INFINITY;
    for (int64_t e = 0; e < p->E; e++) max = fmax(max, h[e]);
    for (int64_t e = 0; e < p->E && !after_selection(p); e++) sum += exp(h[e] - max);
    for (int64_t k = 0; k < p->K && after_selection(p); k++) sum += ids[k] < 0 ? 0 : exp(h[ids[k]] - max);
    for (int64_t k = 0; k < p->K; k++)
        u[k] = ids[k] < 0 ? 0 : p->score && p->kind == 0 ? sigmoid(h[ids[k]]) : exp(h[ids[k]] - max) / sum;
}

static double scores_divisor(const ref_problem *p, const double *u)
{
    double sum = p->renormalize_epsilon;
    if (!p->renormalize) return 1;
    for (int64_t k = 0; k < p->K; k++) sum += u[k];
    return sum;
}

static void weigh(const ref_problem *p, ref_result *r)
{
    for (int64_t t = 0; t < p->T; t++) {
        double *w = r->w_before + t * p->K;
        chosen_scores(p, r, t, w);
        double divisor = scores_divisor(p, w);
        for (int64_t k = 0; k < p->K; k++) w[k] *= p->route_scale / divisor;
    }
}

/* ---- plan ------------------------------------------------------------------------------------------ */

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

static void drop(const ref_problem *p, ref_result *r)
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

/* ---- losses ---------------------------------------------------------------------------------------- */

static double cv2(const double *v, int64_t n, int ddof, double factor, double *dv)
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

static void count_all(const ref_problem *p, ref_result *r)
{
    for (int64_t n = 0; n < p->T * p->K; n++) {
        if (r->ids[n] < 0) continue;
        r->importance[r->ids[n]] += r->w_before[n];
        r->counts[r->ids[n]]++;
    }
    for (int64_t e = 0; e < p->E; e++) r->load[e] = p->kind == 1 ? 0 : (double)r->counts[e];
    for (int64_t t = 0; t < p->T && p->kind == 1; t++)
        for (int64_t e = 0; e < p->E && !masked(p, t); e++) r->load[e] += load_of(p, r, t, e);
}

/* One token's softmax of the clean logits, and its logsumexp. */
static double softmax_row(const ref_problem *p, const double *z, double *P)
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
static void softmax_losses(const ref_problem *p, ref_result *r)
{
    double *P = reals(p->E), *dP = reals(p->E), T = (double)valid_tokens(p, 0, p->T), entries = 0;
    int64_t *firsts = room(p->E, sizeof *firsts);
    for (int64_t e = 0; e < p->E; e++) entries += (double)r->counts[e];
    for (int64_t t = 0; t < p->T; t++)
        if (r->ids[t * p->K] >= 0) firsts[r->ids[t * p->K]]++;
    for (int64_t t = 0; t < p->T && entries > 0; t++) {
        if (masked(p, t)) continue;
        double lse = softmax_row(p, r->logits + t * p->E, P), dot = 0;
        for (int64_t e = 0; e < p->E; e++) {
            double by_switch = (double)p->E * (double)r->counts[e] / entries / T;
            double by_gshard = (double)p->E * (double)firsts[e] / T / T;
            r->loss[2] += p->weight[2] * by_switch * P[e];
            r->loss[3] += p->weight[3] * by_gshard * P[e];
            dP[e] = p->factor[2] * p->weight[2] * by_switch + p->factor[3] * p->weight[3] * by_gshard;
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

static void sequence_loss(const ref_problem *p, ref_result *r)
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
            if (p->sequence_softmax) (void)softmax_row(p, z, s);
            for (int64_t e = 0; e < p->E; e++) sum += s[e] = p->sequence_softmax ? s[e] : sigmoid(z[e]);
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

/* ---- experts ---------------------------------------------------------------------------------------- */

static double act(int activation, double z, double *slope)
{
    const double c = sqrt(2 / (4 * atan(1.0)));
    double u = c * (z + 0.044715 * z * z * z), t = tanh(u), s = sigmoid(z);
    switch (activation) {
    case 1:
    case 17:
        *slope = 0.5 * (1 + t);
        if (fabs(t) < 1) *slope += 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z);
        return 0.5 * z * (1 + t);
    case 2:
    case 18: *slope = normal_cdf(z) + z * normal_pdf(z); return z * normal_cdf(z);
    case 3:
    case 16: *slope = s * (1 + z * (1 - s)); return z * s;
    default: *slope = z > 0; return z > 0 ? z : 0;
    }
}

typedef struct expert_state {
    double *z1, *z3, *h, *slope, *a, *out, *dz, *dh;
} expert_state;

static void expert_forward(const ref_problem *p, int64_t e, const double *x, expert_state *s)
{
    int gated = p->activation >= 16;
    for (int64_t f = 0; f < p->F; f++) {
        s->z1[f] = p->b1 ? p->b1[e * p->F + f] : 0;
        s->z3[f] = p->b3 ? p->b3[e * p->F + f] : 0;
        for (int64_t d = 0; d < p->D; d++) {
            s->z1[f] += x[d] * p->W1[(e * p->D + d) * p->F + f];
            if (gated) s->z3[f] += x[d] * p->W3[(e * p->D + d) * p->F + f];
        }
        s->a[f] = act(p->activation, s->z1[f], &s->slope[f]);
        s->h[f] = gated ? s->a[f] * s->z3[f] : s->a[f];
    }
    for (int64_t o = 0; o < p->O; o++) {
        s->out[o] = p->b2 ? p->b2[e * p->O + o] : 0;
        for (int64_t f = 0; f < p->F; f++) s->out[o] += s->h[f] * p->W2[(e * p->F + f) * p->O + o];
        if (p->expert_sigmoid) s->out[o] = sigmoid(s->out[o]);
    }
}

/* dz is the gradient by out; adds to dx and to the expert's parameters. */
static void expert_backward(const ref_problem *p, ref_result *r, int64_t e, const double *x, double *dx,
                            expert_state *s)
{
    int gated = p->activation >= 16;
    for (int64_t o = 0; o < p->O && p->expert_sigmoid; o++) s->dz[o] *= s->out[o] * (1 - s->out[o]);
    for (int64_t o = 0; o < p->O; o++) r->db2[e * p->O + o] += s->dz[o];
    for (int64_t f = 0; f < p->F; f++) {
        s->dh[f] = 0;
        for (int64_t o = 0; o < p->O; o++) {
            r->dW2[(e * p->F + f) * p->O + o] += s->h[f] * s->dz[o];
            s->dh[f] += s->dz[o] * p->W2[(e * p->F + f) * p->O + o];
        }
        double dz1 = s->dh[f] * s->slope[f] * (gated ? s->z3[f] : 1), dz3 = s->dh[f] * s->a[f];
        r->db1[e * p->F + f] += dz1;
        if (gated) r->db3[e * p->F + f] += dz3;
        for (int64_t d = 0; d < p->D; d++) {
            int64_t at = (e * p->D + d) * p->F + f;
            r->dW1[at] += x[d] * dz1;
            dx[d] += dz1 * p->W1[at];
            if (!gated) continue;
            r->dW3[at] += x[d] * dz3;
            dx[d] += dz3 * p->W3[at];
        }
    }
}

static void run_token(const ref_problem *p, ref_result *r, int64_t t, expert_state *s, int backward)
{
    const double *x = p->x + t * p->D;
    double *y = r->y + t * p->O, *dy = reals(p->O);
    for (int64_t n = t * p->K; n < (t + 1) * p->K; n++) {
        if (!r->keep[n]) continue;
        expert_forward(p, r->ids[n], x, s);
        for (int64_t o = 0; o < p->O; o++) y[o] += r->w[n] * s->out[o];
    }
    for (int64_t o = 0; o < p->O; o++) {
        if (p->layer_sigmoid) y[o] = masked(p, t) ? 0 : sigmoid(y[o]);
        r->total += y[o] * p->dy[t * p->O + o];
        dy[o] = p->dy[t * p->O + o] * (p->layer_sigmoid ? y[o] * (1 - y[o]) : 1);
    }
    for (int64_t n = t * p->K; n < (t + 1) * p->K && backward; n++) {
        if (!r->keep[n]) continue;
        expert_forward(p, r->ids[n], x, s);
        for (int64_t o = 0; o < p->O; o++) {
            r->d_w[n] += dy[o] * s->out[o];
            s->dz[o] = r->w[n] * dy[o];
        }
        expert_backward(p, r, r->ids[n], x, r->dx + t * p->D, s);
    }
    free(dy);
}

static void run_experts(const ref_problem *p, ref_result *r, int backward)
{
    expert_state s = {reals(p->F), reals(p->F), reals(p->F), reals(p->F),
                      reals(p->F), reals(p->O), reals(p->O), reals(p->F)};
    for (int64_t t = 0; t < p->T; t++) run_token(p, r, t, &s, backward);
    free(s.z1), free(s.z3), free(s.h), free(s.slope), free(s.a), free(s.out), free(s.dz), free(s.dh);
}

/* ---- back through the gate ---------------------------------------------------------------------------- */

/* Gradient by the weights before dropping, of one token. */
static void drop_backward(const ref_problem *p, const ref_result *r, int64_t t, const double *d_importance,
                          double *dw)
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
static void scores_backward(const ref_problem *p, const ref_result *r, int64_t t, double *dw, double *dH)
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
    (void)softmax_row(p, r->H + t * p->E, P);
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

static void load_backward(const ref_problem *p, const ref_result *r, int64_t t, const double *d_load,
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

static void gate_backward(const ref_problem *p, ref_result *r)
{
    double *d_importance = reals(p->E), *d_load = reals(p->E), *dw = reals(p->K);
    (void)cv2(r->importance, p->E, p->cv_ddof, p->factor[0] * p->weight[0], d_importance);
    (void)cv2(r->load, p->E, p->cv_ddof, p->factor[1] * p->weight[1], d_load);
    for (int64_t t = 0; t < p->T; t++) {
        double *dH = reals(p->E), *d_sd = reals(p->E), *d_clean = r->d_logits + t * p->E;
        if (!masked(p, t)) {
            drop_backward(p, r, t, d_importance, dw);
            scores_backward(p, r, t, dw, dH);
            load_backward(p, r, t, d_load, d_clean, dH, d_sd);
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
                if (p->Wn) r->dWn[at] += x * draw, r->d_gate_x[t * p->gate_D + d] += draw * p->Wn[at];
                if (p->logits_in) continue;
                r->dWg[at] += x * d_clean[e];
                r->d_gate_x[t * p->gate_D + d] += d_clean[e] * p->Wg[at];
            }
        }
        free(dH), free(d_sd);
    }
    free(d_importance), free(d_load), free(dw);
}

void ref_run(const ref_problem *p, ref_result *r, int backward)
{
    make_room(p, r);
    gate_logits(p, r);
    select_experts(p, r);
    weigh(p, r);
    drop(p, r);
    count_all(p, r);
    r->loss[0] = p->weight[0] * cv2(r->importance, p->E, p->cv_ddof, 0, NULL);
    r->loss[1] = p->kind == 1 ? p->weight[1] * cv2(r->load, p->E, p->cv_ddof, 0, NULL) : 0;
    softmax_losses(p, r);
    sequence_loss(p, r);
    if (p->dy) run_experts(p, r, backward);
    for (int i = 0; i < REF_LOSSES; i++) r->total += p->factor[i] * r->loss[i];
    for (int64_t n = 0; n < p->T * p->K && p->weight_grad; n++) {
        r->total += p->weight_grad[n] * r->w[n];
        r->d_w[n] += r->keep[n] ? p->weight_grad[n] : 0;
    }
    if (backward) gate_backward(p, r);
}
