/* load.cu - the smooth load of a level, by load.h; as src/cpu/load.c. */
#include "load.h"
#include "losses.h"

/* columns = Phi((clean - thr) / sd); where all are chosen: 1 if the weight is not 0. A warp for
 * each row. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_load_rows(moe_level l, float guard, float *columns)
{
    int64_t row = moe_warp();
    if (row >= moe_rows_of(&l)) return;
    float *to = columns + row * l.width;
    const float *sd = l.noise ? l.noise_std + row * l.width : NULL;
    bool masked = moe_is_masked(l.token_mask, moe_token_of(&l, row));
    if (!masked && moe_distances(&l, row, to)) {
        for (int64_t i = moe_lane(); i < l.width; i += MOE_WARP) {
            float q = moe_load_quotient(to[i], sd ? sd[i] : 0.0f, guard);
            to[i] = 0.5f + 0.5f * moe__erf_f32(q);
        }
        return;
    }
    for (int64_t i = moe_lane(); i < l.width; i += MOE_WARP) to[i] = 0.0f;
    for (int64_t n = l.entry_begin[row]; n < l.entry_begin[row + 1] && !masked; n++)
        if (moe_is_mine(l.choice[n]) && l.weight[n] > 0.0f) to[l.choice[n]] = 1.0f;
}

moe_status moe__cuda_level_load(const moe__losses_job *job, const moe__gate_level *level,
                                double *load)
{
    const moe__workers *w = &job->route->workers;
    MOE_TRY(moe_over_rows(w, "moe_load_rows", moe_load_rows, level->rows,
                          moe_level_of(job->route, level), (float)job->route->config->cdf_guard,
                          (float *)job->columns));
    return moe__cuda_sum_columns(w, (const float *)job->columns, level->width, level->rows,
                                 level->part_begin, level->parts, load);
}
