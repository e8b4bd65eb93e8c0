/* route.h - what the files of the gate share: route.c, choose.c, losses.c, load.c,
 * gate_backward.c. */
#ifndef MOE_CPU_ROUTE_H
#define MOE_CPU_ROUTE_H

#include "cpu/kernels.h"
#include "internal.h"
#include "cpu/lanes.h"
#include "cpu/real.h"
#include "numeric.h"

/* v[0..n) = exp(in - max) and returns their sum; *max out. in and v may be the same. */
static inline real exp_shifted(real *v, const real *in, int64_t n, real *max)
{
    real m = lane_max(in, n);
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

static inline int64_t token_of(const moe__gate_level *level, int64_t row)
{
    return level->token_of_row ? level->token_of_row[row] : row;
}

static inline int64_t part_of(const moe__gate_level *level, int64_t row)
{
    return level->part_begin ? run_of(level->part_begin, level->parts, row) : 0;
}

/* choose.c: the choice of one row, and those that need all tokens: chosen before the rows' loop. */
void MOE_KERNEL(choose_row)(const moe__route_job *job, const moe__gate_level *level, int64_t row,
                            int32_t *ids, int64_t n);
moe_status MOE_KERNEL(choose_by_expert)(const moe__route_job *job);
moe_status MOE_KERNEL(choose_above)(const moe__route_job *job);
moe_status MOE_KERNEL(sinkhorn)(const moe__route_job *job);

/* route.c: what the gate's products read: x, or x' where there is jitter. */
moe__rows MOE_KERNEL(gate_input)(const moe__route_job *job, const int64_t *token_of_row);
/* Jitter and logits of the first level. */
moe_status MOE_KERNEL(first_logits)(const moe__route_job *job);
/* out[rows,width] = x w (+ bias), each row with its part's. */
moe_status MOE_KERNEL(level_product)(const moe__route_job *job, const moe__gate_level *level,
                                     const moe__matrices *w, const moe__matrices *bias, void *out);
/* factor[j] of the input jitter for columns [first, first + 4) of a token. */
void MOE_KERNEL(jitter4)(const moe__route_job *job, int64_t token, int64_t first, real factor[4]);

/* load.c: the smooth load of a level's candidates, [parts,width]; and its gradient: adds to one
 * row's d_clean, d_noisy and d_std; `a` is scratch of a row. */
moe_status MOE_KERNEL(level_load)(const moe__losses_job *job, const moe__gate_level *level,
                                  double *load);
void MOE_KERNEL(load_backward_row)(const moe__losses_job *job, const moe__gate_level *level,
                                   int64_t row, real *d_clean, real *d_noisy, real *d_std, real *a);

/* losses.c. Sums the columns of job->columns [rows,width] over each part's rows, token by token
 * within a group, then group by group: total [parts,width], by_group [G,width] (one part); either
 * may be NULL. */
moe_status MOE_KERNEL(sum_columns)(const moe__losses_job *job, const moe__gate_level *level,
                                   double *total, double *by_group);
/* Finds what every row's gradient needs: d_importance, d_load of the levels, d_score. */
void MOE_KERNEL(losses_backward_prepare)(const moe__gate_backward_job *job);
/* Adds to a token's d_clean (by the clean logits) what the losses of the logits give; p is scratch
 * of a row. */
void MOE_KERNEL(losses_backward_row)(const moe__gate_backward_job *job, int64_t token,
                                     real *d_clean, real *p);

#endif
