/* route.h - what src/cpu/route.c and src/cpu/losses.c share. */
#ifndef MOE_CPU_ROUTE_H
#define MOE_CPU_ROUTE_H

#include "backend.h"
#include "cpu/lanes.h"
#include "cpu/real.h"
#include "numeric.h"

/* v[0..n) = exp(in - max) and returns their sum; *max out. in and v may be the same. */
static inline real exp_shifted(real *v, const real *in, int64_t n, real *max)
{
    real m = in[0];
    for (int64_t i = 1; i < n; i++) m = in[i] > m ? in[i] : m;
    for (int64_t i = 0; i < n; i++) v[i] = r_exp(in[i] - m);
    if (max) *max = m;
    return lane_sum(v, n);
}

/* v = softmax(in). A NaN anywhere, or a largest value that is infinite, makes all of v NaN. */
static inline void softmax(real *v, const real *in, int64_t n)
{
    real sum = exp_shifted(v, in, n, NULL);
    for (int64_t i = 0; i < n; i++) v[i] = v[i] / sum;
}

static inline int is_masked(const uint8_t *mask, int64_t token) { return mask && !mask[token]; }

/* Finds what every row's gradient needs: d_importance, d_load, d_score. */
void MOE_KERNEL(losses_backward_prepare)(const moe__gate_backward_job *job);

/* Adds to each token's rows d_logits (by the clean logits) and d_std (by sd; NULL without noise)
 * what the losses give, and to d_weight (by the weights before dropping) what importance gives;
 * d_noisy is by H, for the thresholds. Called by gate_backward for tokens [begin,end). */
void MOE_KERNEL(losses_backward_row)(const moe__gate_backward_job *job, int64_t token,
                                     real *d_clean, real *d_noisy, real *d_std, real *p);

#endif
