/* weigh.h - from logits to scores and weights, a warp for each row: what forward and backward of
 * the gate share. As src/cpu/weigh.h, with the same bits.
 *
 *     chosen:  w_j = softmax over the chosen logits
 *     scored:  u_j = softmax over all, or sigmoid, of which those of the chosen
 *              w_j = u_j / max(sum u + epsilon, minimum) if renormalised
 *     both:    times scale
 *
 * Thread l of the warp reads and writes entries j = l, l + 32, ... and elements likewise. Every
 * thread calls, with the same row. */
#ifndef MOE_CUDA_WEIGH_H
#define MOE_CUDA_WEIGH_H

#include "route.h"

struct moe_weighing {
    int32_t chosen_only; /* a softmax over the chosen logits */
    int32_t score, renormalize;
    float epsilon, minimum, scale;
};

/* The factor on a level's weights: a hierarchical gate applies its own to the products. */
static inline moe_weighing moe_weighing_of(const moe__route_job *job)
{
    const moe_gate_config *c = job->config;
    moe_weighing w = {c->score == MOE_SCORE_SOFTMAX && c->order == MOE_ORDER_SELECT_THEN_SCORE,
                      c->score,
                      c->renormalize,
                      (float)c->renormalize_epsilon,
                      (float)c->renormalize_minimum,
                      job->levels == 2 ? 1.0f : (float)c->route_scale};
    return w;
}

/* Rounds n up to whole warps: every thread makes the same turns. */
MOE_DEVICE int64_t moe_turns_end(int64_t n) { return (n + MOE_WARP - 1) / MOE_WARP * MOE_WARP; }

/* Largest value of a row and sum of exp(h - max). */
MOE_DEVICE float moe_shifted_sum(const float *h, int64_t n, float *max)
{
    float m = -moe_infinity(), lane = 0.0f;
    for (int64_t i = moe_lane(); i < n; i += MOE_WARP) m = h[i] > m ? h[i] : m;
    m = moe_warp_max(m);
    for (int64_t i = moe_lane(); i < moe_turns_end(n); i += MOE_WARP)
        moe_lanes_add(&lane, i < n ? moe__exp_f32(h[i] - m) : 0.0f);
    *max = m;
    return moe_lanes_tree(lane);
}

/* Sum of w[0..n). */
MOE_DEVICE float moe_row_sum(const float *w, int64_t n)
{
    float lane = 0.0f;
    for (int64_t j = moe_lane(); j < moe_turns_end(n); j += MOE_WARP)
        moe_lanes_add(&lane, j < n ? w[j] : 0.0f);
    return moe_lanes_tree(lane);
}

/* Sum of a_j b_j. */
MOE_DEVICE float moe_row_dot(const float *a, const float *b, int64_t n)
{
    float lane = 0.0f;
    for (int64_t j = moe_lane(); j < moe_turns_end(n); j += MOE_WARP)
        moe_lanes_fma(&lane, j < n ? a[j] : 0.0f, j < n ? b[j] : 0.0f);
    return moe_lanes_tree(lane);
}

/* w[j] = softmax over the chosen logits of entry j; entries without an expert get 0. */
MOE_DEVICE void moe_softmax_of_chosen(float *w, const int32_t *ids, int64_t n, const float *h)
{
    float max = -moe_infinity();
    for (int64_t j = moe_lane(); j < n; j += MOE_WARP)
        if (ids[j] >= 0 && h[ids[j]] > max) max = h[ids[j]];
    max = moe_warp_max(max);
    for (int64_t j = moe_lane(); j < n; j += MOE_WARP)
        w[j] = ids[j] < 0 ? 0.0f : moe__exp_f32(h[ids[j]] - max);
    float sum = moe_row_sum(w, n);
    for (int64_t j = moe_lane(); j < n; j += MOE_WARP) w[j] = ids[j] < 0 ? 0.0f : w[j] / sum;
}

/* w[j] = score of entry j: sigmoid, or softmax over all, with the largest value and the sum that it
 * is by. */
MOE_DEVICE void moe_score_of_chosen(float *w, const int32_t *ids, int64_t n, const float *h,
                                    int64_t width, int32_t score, float *max_out, float *sum_out)
{
    float max = 0.0f, sum = 1.0f;
    if (score != MOE_SCORE_SIGMOID) sum = moe_shifted_sum(h, width, &max);
    *max_out = max;
    *sum_out = sum;
    for (int64_t j = moe_lane(); j < n; j += MOE_WARP) {
        if (ids[j] < 0)
            w[j] = 0.0f;
        else
            w[j] = score == MOE_SCORE_SIGMOID ? moe__sigmoid_f32(h[ids[j]])
                                              : moe__exp_f32(h[ids[j]] - max) / sum;
    }
}

/* v[0..n) = score of every expert. */
MOE_DEVICE void moe_score_all(float *v, const float *h, int64_t n, int32_t score)
{
    float max = 0.0f, sum = 0.0f;
    if (score == MOE_SCORE_SOFTMAX) sum = moe_shifted_sum(h, n, &max);
    for (int64_t i = moe_lane(); i < n; i += MOE_WARP)
        v[i] = score == MOE_SCORE_SOFTMAX ? moe__exp_f32(h[i] - max) / sum : moe__sigmoid_f32(h[i]);
}

/* What renormalisation divides by; *fixed: it is the minimum, which has no gradient. */
MOE_DEVICE float moe_divisor_of(float sum, float epsilon, float minimum, bool *fixed)
{
    sum = sum + epsilon;
    *fixed = sum < minimum;
    return *fixed ? minimum : sum;
}

/* The weights before dropping of the n entries of one row. Without logits all are equal. */
MOE_DEVICE void moe_weigh(const moe_weighing *how, float *w, const int32_t *ids, int64_t n,
                          const float *h, int64_t width)
{
    float max, sum;
    bool fixed;
    if (!h) {
        for (int64_t j = moe_lane(); j < n; j += MOE_WARP)
            w[j] = ids[j] < 0 ? 0.0f : how->scale / (float)n;
        return;
    }
    if (how->chosen_only) {
        moe_softmax_of_chosen(w, ids, n, h);
    } else {
        moe_score_of_chosen(w, ids, n, h, width, how->score, &max, &sum);
        if (how->renormalize) {
            float divisor = moe_divisor_of(moe_row_sum(w, n), how->epsilon, how->minimum, &fixed);
            for (int64_t j = moe_lane(); j < n; j += MOE_WARP)
                w[j] = divisor != 0.0f ? w[j] / divisor : 0.0f;
        }
    }
    for (int64_t j = moe_lane(); j < n; j += MOE_WARP) w[j] = w[j] * how->scale;
}

#endif
