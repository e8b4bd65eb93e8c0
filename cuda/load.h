/* load.h - the smooth load of a row, and its gradient (Shazeer et al. 2017, eq. 8-10), by a warp;
 * as src/cpu/load.c.
 *
 *     load_e = sum_rows Phi((clean_e - thr_e) / sd_e)
 *
 * thr_e is the K-th largest of H without candidate e: the best other candidate's H for a chosen e,
 * the worst chosen one's for the rest. Where all candidates are chosen, the load is the number of
 * rows with a weight that is not 0. Candidate e of a row belongs to thread e % 32 of the warp: it
 * alone reads and writes what is e's. */
#ifndef MOE_CUDA_LOAD_H
#define MOE_CUDA_LOAD_H

#include "route.h"

#define SQRT_2 1.41421356237309504880f
#define ONE_OVER_SQRT_PI 0.56418958354775628695f

MOE_DEVICE bool moe_is_mine(int32_t candidate)
{
    return candidate >= 0 && candidate % MOE_WARP == moe_lane();
}

/* d_e = clean_e - thr_e for the candidates of one row. False if there are no thresholds, because
 * all were chosen or none. */
MOE_DEVICE bool moe_distances(const moe_level *l, int64_t row, float *d)
{
    const int32_t *ids = l->choice, *kth = l->kth + 2 * row;
    const float *clean = l->logits + row * l->width, *h = l->noisy + row * l->width;
    if (kth[0] < 0 || kth[1] < 0) return false;
    float worst = h[kth[0]], best_other = h[kth[1]];
    for (int64_t i = moe_lane(); i < l->width; i += MOE_WARP) d[i] = clean[i] - worst;
    for (int64_t n = l->entry_begin[row]; n < l->entry_begin[row + 1]; n++)
        if (moe_is_mine(ids[n])) d[ids[n]] = clean[ids[n]] - best_other;
    return true;
}

/* The quotient inside erf: d / (sqrt(2) sd + guard); a step where that divisor is 0. */
MOE_DEVICE float moe_load_quotient(float d, float sd, float guard)
{
    float divisor = moe__fma_f32(SQRT_2, sd, guard);
    float step = d > 0.0f ? 10.0f : d < 0.0f ? -10.0f : 0.0f; /* erf(10) = 1 */
    return divisor > 0.0f ? d / divisor : step;
}

/* With q the quotient inside erf, v its divisor and a_i = d_load_i exp(-q^2) / (sqrt(pi) v):
 * d_clean_i += a_i,  d_sd_i -= a_i sqrt(2) q,  and what each candidate adds is taken from the H
 * that is its threshold. Without noise the load is a count. */
MOE_DEVICE void moe_load_backward_row(const moe_level *l, const double *d_load, float guard,
                                      int64_t row, float *d_clean, float *d_noisy, float *d_std,
                                      float *a)
{
    const int32_t *ids = l->choice, *kth = l->kth + 2 * row;
    const float *sd = l->noise_std + row * l->width;
    float by_best_other = 0.0f, by_worst = 0.0f;
    d_load += moe_part_of(l, row) * l->width;
    if (!moe_distances(l, row, a)) return;
    for (int64_t i = moe_lane(); i < l->width; i += MOE_WARP) {
        float q = moe_load_quotient(a[i], sd[i], guard);
        float divisor = moe__fma_f32(SQRT_2, sd[i], guard);
        float density = (float)d_load[i] * (moe__exp_f32(-q * q) * ONE_OVER_SQRT_PI);
        float slope = sd[i] > 0.0f ? density / divisor : 0.0f;
        a[i] = slope;
        d_clean[i] = d_clean[i] + slope;
        d_std[i] = moe__fma_f32(-SQRT_2 * q, slope, d_std[i]);
    }
    for (int64_t n = l->entry_begin[row]; n < l->entry_begin[row + 1]; n++) {
        if (!moe_is_mine(ids[n])) continue;
        by_best_other = by_best_other + a[ids[n]];
        a[ids[n]] = 0.0f;
    }
    for (int64_t i = moe_lane(); i < l->width; i += MOE_WARP) by_worst = by_worst + a[i];
    by_best_other = moe_warp_sum(by_best_other);
    by_worst = moe_warp_sum(by_worst);
    if (moe_is_mine(kth[1])) d_noisy[kth[1]] = d_noisy[kth[1]] - by_best_other;
    if (moe_is_mine(kth[0])) d_noisy[kth[0]] = d_noisy[kth[0]] - by_worst;
}

#endif
