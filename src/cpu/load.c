/* load.c - the smooth load, and its gradient (Shazeer et al. 2017, eq. 8-10).
 *
 *     load_e = sum_rows Phi((clean_e - thr_e) / sd_e)
 *
 * thr_e is the K-th largest of H without candidate e: the best other candidate's H for a chosen e,
 * the worst chosen one's for the rest. Where all candidates are chosen, the load is the number of
 * rows with a weight that is not 0. */
#include "cpu/route.h"

#define SQRT_2 R(1.41421356237309504880)
#define ONE_OVER_SQRT_PI R(0.56418958354775628695)

/* d_e = clean_e - thr_e for the candidates of one row. Returns 0 if there are no thresholds,
 * because all were chosen or none. */
static int distances(const moe__gate_level *level, int64_t row, real *d)
{
    const int32_t *ids = level->choice, *kth = level->kth + 2 * row;
    const real *clean = (const real *)level->logits + row * level->width;
    const real *h = (const real *)level->noisy + row * level->width;
    if (kth[0] < 0 || kth[1] < 0) return 0;
    for (int64_t i = 0; i < level->width; i++) d[i] = clean[i] - h[kth[0]];
    for (int64_t n = level->entry_begin[row]; n < level->entry_begin[row + 1]; n++)
        if (ids[n] >= 0) d[ids[n]] = clean[ids[n]] - h[kth[1]];
    return 1;
}

/* The quotient inside erf: d / (sqrt(2) sd + guard); a step where that divisor is 0. */
static inline real quotient(real d, real sd, real guard)
{
    real divisor = r_fma(SQRT_2, sd, guard);
    real step = d > R(0.0) ? R(10.0) : d < R(0.0) ? R(-10.0) : R(0.0); /* erf(10) = 1 */
    return divisor > R(0.0) ? d / divisor : step;
}

/* row = Phi(row / sd). Without noise sd is 0 and only the guard divides: a step, but for distances
 * not far above it. */
static void normal_cdfs(real *row, const real *sd, real guard, int64_t n)
{
    int32_t near = sd != NULL;
    for (int64_t i = 0; i < n && !sd; i++)
        near |= (row[i] != R(0.0)) & !(r_abs(row[i]) >= R(10.0) * guard);
    if (near) {
        for (int64_t i = 0; i < n; i++)
            row[i] = R(0.5) + R(0.5) * r_erf(quotient(row[i], sd ? sd[i] : R(0.0), guard));
        return;
    }
    for (int64_t i = 0; i < n; i++)
        row[i] = row[i] > R(0.0) ? R(1.0) : row[i] < R(0.0) ? R(0.0) : R(0.5);
}

typedef struct load_run {
    const moe__losses_job *job;
    const moe__gate_level *level;
} load_run;

/* columns = Phi((clean - thr) / sd); where all are chosen: 1 if the weight is not 0. */
static void load_range(void *argument, int64_t begin, int64_t end)
{
    const load_run *run = argument;
    const moe__gate_level *level = run->level;
    int64_t width = level->width;
    real guard = (real)run->job->route->config->cdf_guard;
    for (int64_t r = begin; r < end; r++) {
        real *row = (real *)run->job->columns + r * width;
        const real *sd = level->noise ? (const real *)level->noise_std + r * width : NULL;
        int masked = is_masked(run->job->route->token_mask, token_of(level, r));
        if (!masked && distances(level, r, row)) {
            normal_cdfs(row, sd, guard, width);
            continue;
        }
        for (int64_t i = 0; i < width; i++) row[i] = R(0.0);
        for (int64_t n = level->entry_begin[r]; n < level->entry_begin[r + 1] && !masked; n++)
            if (level->choice[n] >= 0 && ((const real *)level->weight)[n] > R(0.0))
                row[level->choice[n]] = R(1.0);
    }
}

moe_status MOE_KERNEL(level_load)(const moe__losses_job *job, const moe__gate_level *level,
                                  double *load)
{
    const moe__workers *w = &job->route->workers;
    load_run run = {job, level};
    MOE_TRY(moe__parallel_range(w->context, level->rows, 16, load_range, &run, w->function));
    return MOE_KERNEL(sum_columns)(job, level, load, NULL);
}

/* With q the quotient inside erf, v its divisor and a_i = d_load_i exp(-q^2) / (sqrt(pi) v):
 * d_clean_i += a_i,  d_sd_i -= a_i sqrt(2) q,  and what each candidate adds is taken from the H
 * that is its threshold. Without noise the load is a count. */
void MOE_KERNEL(load_backward_row)(const moe__losses_job *job, const moe__gate_level *level,
                                   int64_t row, real *d_clean, real *d_noisy, real *d_std, real *a)
{
    const int32_t *ids = level->choice, *kth = level->kth + 2 * row;
    int64_t width = level->width;
    const real *sd = (const real *)level->noise_std + row * width;
    const double *d_load = level->d_load + part_of(level, row) * width;
    real guard = (real)job->route->config->cdf_guard, by_best_other = R(0.0);
    if (!distances(level, row, a)) return;
    for (int64_t i = 0; i < width; i++) {
        real q = quotient(a[i], sd[i], guard), divisor = r_fma(SQRT_2, sd[i], guard);
        real density = (real)d_load[i] * (r_exp(-q * q) * ONE_OVER_SQRT_PI);
        real slope = sd[i] > R(0.0) ? density / divisor : R(0.0);
        a[i] = slope;
        d_clean[i] = d_clean[i] + slope;
        d_std[i] = r_fma(-SQRT_2 * q, slope, d_std[i]);
    }
    for (int64_t n = level->entry_begin[row]; n < level->entry_begin[row + 1]; n++) {
        if (ids[n] < 0) continue;
        by_best_other = by_best_other + a[ids[n]];
        a[ids[n]] = R(0.0);
    }
    d_noisy[kth[1]] = d_noisy[kth[1]] - by_best_other;
    d_noisy[kth[0]] = d_noisy[kth[0]] - lane_sum(a, width);
}
