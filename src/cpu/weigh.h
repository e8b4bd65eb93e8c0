/* weigh.h - from logits to scores and weights: what forward and backward of the gate share.
 *
 *     chosen:  w_j = softmax over the chosen logits
 *     scored:  u_j = softmax over all, or sigmoid, of which those of the chosen
 *              w_j = u_j / max(sum u + epsilon, minimum) if renormalised
 *     both:    times route_scale */
#ifndef MOE_CPU_WEIGH_H
#define MOE_CPU_WEIGH_H

#include "cpu/route.h"

/* w[j] = softmax over the chosen logits of entry j; entries without an expert get 0. */
static inline void softmax_of_chosen(real *w, const int32_t *ids, int64_t n, const real *h)
{
    real max = R(0.0), sum = R(0.0);
    int any = 0;
    for (int64_t j = 0; j < n; j++)
        if (ids[j] >= 0 && (!any || h[ids[j]] > max)) max = h[ids[j]], any = 1;
    for (int64_t j = 0; j < n; j++) w[j] = ids[j] < 0 ? R(0.0) : r_exp(h[ids[j]] - max);
    sum = lane_sum(w, n);
    for (int64_t j = 0; j < n; j++) w[j] = ids[j] < 0 ? R(0.0) : w[j] / sum;
}

/* Largest value and sum of exp(h - max) of a row, formed as exp_shifted forms them, in the same 16
 * lanes, without scratch for the row. */
static inline real shifted_sum(const real *h, int64_t E, real *max)
{
    real m = lane_max(h, E), chunk[16 * 16], lanes[16] = {R(0.0)};
    for (int64_t first = 0; first < E; first += 256) {
        int64_t n = moe__min(256, E - first);
        for (int64_t i = 0; i < n; i++) chunk[i] = r_exp(h[first + i] - m);
        for (int64_t i = n; i < 256; i++) chunk[i] = R(0.0);
        for (int64_t i = 0; i < 256; i += 16)
            for (int64_t l = 0; l < 16; l++) lanes[l] = lanes[l] + chunk[i + l];
    }
    *max = m;
    return lane_sum(lanes, 16);
}

/* w[j] = score of entry j: sigmoid, or softmax over all E. */
static inline void score_of_chosen(real *w, const int32_t *ids, int64_t n, const real *h, int64_t E,
                                   int32_t score)
{
    real max, sum;
    if (score == MOE_SCORE_SIGMOID) {
        for (int64_t j = 0; j < n; j++) w[j] = ids[j] < 0 ? R(0.0) : r_sigmoid(h[ids[j]]);
        return;
    }
    sum = shifted_sum(h, E, &max);
    for (int64_t j = 0; j < n; j++) w[j] = ids[j] < 0 ? R(0.0) : r_exp(h[ids[j]] - max) / sum;
}

/* v[0..E) = score of every expert. */
static inline void score_all(real *v, const real *h, int64_t E, int32_t score)
{
    if (score == MOE_SCORE_SOFTMAX) {
        softmax(v, h, E);
        return;
    }
    for (int64_t i = 0; i < E; i++) v[i] = r_sigmoid(h[i]);
}

/* Whether the weights are a softmax over the chosen logits only. */
static inline int selects_then_scores(const moe_gate_config *c)
{
    return c->score == MOE_SCORE_SOFTMAX && c->order == MOE_ORDER_SELECT_THEN_SCORE;
}

/* What renormalisation divides by; *fixed: it is the minimum, which has no gradient. */
static inline real divisor_of(real sum, double epsilon, double minimum, int *fixed)
{
    sum = sum + (real)epsilon;
    *fixed = sum < (real)minimum;
    return *fixed ? (real)minimum : sum;
}

/* The weights before dropping of the n entries of one row. Without logits all are equal. */
static inline void weigh(const moe_gate_config *c, real scale, real *w, const int32_t *ids,
                         int64_t n, const real *h, int64_t width)
{
    int fixed;
    if (!h) {
        for (int64_t j = 0; j < n; j++) w[j] = ids[j] < 0 ? R(0.0) : scale / (real)n;
        return;
    }
    if (selects_then_scores(c)) {
        softmax_of_chosen(w, ids, n, h);
    } else {
        score_of_chosen(w, ids, n, h, width, c->score);
        if (c->renormalize) {
            real divisor = divisor_of(lane_sum(w, n), c->renormalize_epsilon,
                                      c->renormalize_minimum, &fixed);
            for (int64_t j = 0; j < n; j++) w[j] = divisor != R(0.0) ? w[j] / divisor : R(0.0);
        }
    }
    for (int64_t j = 0; j < n; j++) w[j] = w[j] * scale;
}

/* Element i of a vector parameter. */
static inline real vector_at(const moe__matrices *m, int64_t i)
{
    return get_at(m->base, m->offset + i * m->stride_col, m->wide);
}

/* The factor on a level's weights: a hierarchical gate applies its own to the products. */
static inline real level_scale(const moe__route_job *job)
{
    return job->levels == 2 ? R(1.0) : (real)job->config->route_scale;
}

#endif
