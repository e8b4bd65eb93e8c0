/* losses_backward.cu - the gradients of the losses, as the second half of src/cpu/losses.c: first
 * what every row needs, then what the losses of the logits give to a token's clean logits. */
#include "losses.h"

/* The arrays of moe__gate_backward_job that are the losses'. */
struct loss_gradients {
    const float *loss_grad;               /* [MOE_LOSS_SLOTS] or NULL: 1 */
    double *factor;                       /* [MOE_LOSS_SLOTS] */
    double *d_importance, *d_load;        /* [E] */
    double *first_d_load, *second_d_load; /* of the levels; NULL: not there */
    float *d_score;                       /* [scopes,E] */
    int64_t parts;                        /* of a hierarchical gate */
    float *d_clean;                       /* [T,E] of a flat one */
};

static loss_gradients gradients_of(const moe__gate_backward_job *job)
{
    const moe__route_job *route = job->losses->route;
    loss_gradients d = {};
    d.loss_grad = (const float *)job->loss_grad;
    d.factor = job->loss_factor;
    d.d_importance = job->d_importance, d.d_load = job->d_load;
    d.first_d_load = route->level[0].d_load;
    d.second_d_load = route->levels == 2 ? route->level[1].d_load : NULL;
    d.d_score = (float *)job->d_score;
    d.parts = route->level[0].width;
    d.d_clean = (float *)route->level[0].d_logits;
    return d;
}

MOE_DEVICE bool softmax_is_on(const double *factor)
{
    return factor[MOE_LOSS_SWITCH] != 0 || factor[MOE_LOSS_GSHARD] != 0 || factor[MOE_LOSS_Z] != 0;
}

/* ---- what every row needs -------------------------------------------------------------------- */

/* The gradients by the levels' loads: load_ij = P_i S_ij / n_i gives
 * dS_ij = d_load_ij P_i / n_i,  dP_i = sum_j d_load_ij S_ij / n_i. */
MOE_DEVICE void split_load(const moe_loss_arrays *l, const loss_gradients *d)
{
    for (int64_t e = threadIdx.x; !l->two && d->first_d_load && e < l->E; e += MOE_ROUTE_THREADS)
        d->first_d_load[e] = d->d_load[e];
    for (int64_t i = threadIdx.x; l->two && i < d->parts; i += MOE_ROUTE_THREADS) {
        double rows = l->part_rows[i], sum = 0;
        for (int64_t e = i * l->width; e < (i + 1) * l->width; e++) {
            double by_row = rows > 0 ? d->d_load[e] / rows : 0;
            d->second_d_load[e] = by_row * l->primary_load[i];
            sum += by_row * l->part_load[e];
        }
        d->first_d_load[i] = sum;
    }
}

/* loss_factor, d_importance, d_load of the levels, d_score; one block. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_losses_prepare(moe_loss_arrays l, loss_gradients d)
{
    MOE_SHARED(double, shared, MOE_ROUTE_ROWS);
    if (threadIdx.x < MOE_LOSS_SLOTS) {
        double weight = l.weights[threadIdx.x];
        double by_caller = d.loss_grad ? (double)d.loss_grad[threadIdx.x] : 1;
        d.factor[threadIdx.x] = weight != 0 ? weight * by_caller : 0;
    }
    moe_block_sync();
    moe_cv importance = moe_cv_of(l.importance, l.E, l.ddof, shared);
    moe_cv load = moe_cv_of(l.load, l.E, l.ddof, shared);
    for (int64_t e = threadIdx.x; e < l.E; e += MOE_ROUTE_THREADS) {
        d.d_importance[e] = d.factor[MOE_LOSS_IMPORTANCE] *
                            moe_cv_gradient(&importance, l.importance[e]);
        d.d_load[e] = d.factor[MOE_LOSS_LOAD] * moe_cv_gradient(&load, l.load[e]);
    }
    moe_block_sync();
    if (l.has_load) split_load(&l, &d);
    if (!l.has_logits || !d.d_score || !softmax_is_on(d.factor)) return;
    for (int64_t s = 0; s < l.scopes; s++) {
        double by_switch = d.factor[MOE_LOSS_SWITCH] * moe_switch_scale(&l, s, shared);
        double by_gshard = d.factor[MOE_LOSS_GSHARD] * moe_gshard_scale(&l, s);
        for (int64_t e = threadIdx.x; e < l.E; e += MOE_ROUTE_THREADS) {
            int64_t at = s * l.E + e;
            d.d_score[at] = (float)(by_switch * (double)l.scope_counts[at] +
                                    by_gshard * (double)l.scope_first[at]);
        }
    }
}

moe_status moe__cuda_losses_prepare(const moe__gate_backward_job *job, const moe_loss_arrays *l)
{
    return moe_over(&job->losses->route->workers, "moe_losses_prepare", moe_losses_prepare, 1, 1,
                    *l, gradients_of(job));
}

/* ---- a token --------------------------------------------------------------------------------- */

/* switch, gshard: dP_i = d_score_i, d_clean_i += P_i (dP_i - sum_j P_j dP_j);
 * z: d_clean_i += factor 2 lse / T P_i. */
MOE_DEVICE void softmax_losses_row(const moe_loss_arrays *l, const loss_gradients *d, int64_t t,
                                   const float *clean, float *d_clean)
{
    const float *d_score = d->d_score + (l->scoped ? moe_group_of(l, t) * l->E : 0);
    float max, sum = moe_shifted_sum(clean, l->E, &max), lane = 0.0f;
    double lse = (double)max + (double)moe__log_f32(sum);
    double by_z = d->factor[MOE_LOSS_Z] * 2 * lse / l->sums[MOE_SUM_TOKENS];
    sum = 1.0f / sum;
    for (int64_t i = moe_lane(); i < moe_turns_end(l->E); i += MOE_WARP)
        moe_lanes_fma(&lane, i < l->E ? moe__exp_f32(clean[i] - max) * sum : 0.0f,
                      i < l->E ? d_score[i] : 0.0f);
    float rest = (float)(by_z - (double)moe_lanes_tree(lane));
    for (int64_t i = moe_lane(); i < l->E; i += MOE_WARP)
        d_clean[i] = moe__fma_f32(moe__exp_f32(clean[i] - max) * sum, d_score[i] + rest,
                                  d_clean[i]);
}

/* r = s / sum(s), dr_i = c n_gi:  ds_i = (dr_i - sum_j r_j dr_j) / sum(s), then s' = s (1 - s); for
 * softmax d_clean_i += r_i (dr_i - sum_j r_j dr_j). */
MOE_DEVICE void sequence_loss_row(const moe_loss_arrays *l, const loss_gradients *d, int64_t t,
                                  const float *clean, float *d_clean)
{
    float *r = l->columns + t * l->E;
    float sum = moe_normalized_scores(r, clean, l->E, l->sequence_score), dot = 0.0f;
    bool softmax = l->sequence_score == MOE_SCORE_SOFTMAX;
    int64_t g = moe_group_of(l, t);
    const int64_t *counts = l->sequence_counts + g * l->E;
    float scale = (float)(d->factor[MOE_LOSS_SEQUENCE] * l->sequence_scale[g]);
    for (int64_t i = moe_lane(); i < l->E; i += MOE_WARP)
        dot = moe__fma_f32(r[i], scale * (float)counts[i], dot);
    dot = moe_warp_sum(dot);
    for (int64_t i = moe_lane(); i < l->E; i += MOE_WARP) {
        float slope = softmax ? r[i] : r[i] * (1.0f - r[i] * sum);
        d_clean[i] = moe__fma_f32(scale * (float)counts[i] - dot, slope, d_clean[i]);
    }
}

/* above - taken of an expert, from the ids of a token in any order. */
MOE_DEVICE int64_t over_threshold(const moe_loss_arrays *l, int64_t first, int64_t last, int64_t e,
                                  float p)
{
    int64_t over = p > moe_vector_at(&l->threshold, e);
    for (int64_t n = first; n < last; n++) over -= l->ids[n] == e;
    return over;
}

/* dP_e = factor (above - taken), masks constant:  d_clean_i += P_i (dP_i - sum_j P_j dP_j). */
MOE_DEVICE void threshold_loss_row(const moe_loss_arrays *l, const loss_gradients *d, int64_t t,
                                   const float *clean, float *d_clean)
{
    int64_t first = l->token_begin[t], last = l->token_begin[t + 1];
    float factor = (float)d->factor[MOE_LOSS_THRESHOLD], dot = 0.0f;
    float max, sum = moe_shifted_sum(clean, l->E, &max);
    for (int64_t e = moe_lane(); e < l->E; e += MOE_WARP) {
        float p = moe__exp_f32(clean[e] - max) / sum;
        dot = moe__fma_f32(p, factor * (float)over_threshold(l, first, last, e, p), dot);
    }
    dot = moe_warp_sum(dot);
    for (int64_t e = moe_lane(); e < l->E; e += MOE_WARP) {
        float p = moe__exp_f32(clean[e] - max) / sum;
        float d_p = factor * (float)over_threshold(l, first, last, e, p);
        d_clean[e] = moe__fma_f32(p, d_p - dot, d_clean[e]);
    }
}

/* d_clean [T,E] (=|+=) of one of the losses of the logits, SWITCH for all that are of P alone; a
 * warp for each token. */
template <int LOSS>
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_losses_rows(moe_loss_arrays l, loss_gradients d, bool add)
{
    int64_t t = moe_warp();
    if (t >= l.T) return;
    const float *clean = l.logits + t * l.E;
    float *d_clean = d.d_clean + t * l.E;
    bool on = LOSS == MOE_LOSS_SWITCH ? softmax_is_on(d.factor) : d.factor[LOSS] != 0;
    for (int64_t i = moe_lane(); i < l.E && !add; i += MOE_WARP) d_clean[i] = 0.0f;
    if (!on || moe_is_masked(l.token_mask, t)) return;
    if (LOSS == MOE_LOSS_SWITCH) softmax_losses_row(&l, &d, t, clean, d_clean);
    if (LOSS == MOE_LOSS_SEQUENCE) sequence_loss_row(&l, &d, t, clean, d_clean);
    if (LOSS == MOE_LOSS_THRESHOLD) threshold_loss_row(&l, &d, t, clean, d_clean);
}

template <int LOSS>
static moe_status loss_rows(const moe__gate_backward_job *job, const moe_loss_arrays *l,
                            bool *started)
{
    bool add = *started;
    *started = true;
    return moe_over_rows(&job->losses->route->workers, "moe_losses_rows", moe_losses_rows<LOSS>,
                         l->T, *l, gradients_of(job), add);
}

moe_status moe__cuda_losses_rows(const moe__gate_backward_job *job, const moe_loss_arrays *l,
                                 bool *started)
{
    const double *weight = l->weights;
    *started = false;
    if (!l->has_logits || l->two) return MOE_OK;
    if (weight[MOE_LOSS_SWITCH] != 0 || weight[MOE_LOSS_GSHARD] != 0 || weight[MOE_LOSS_Z] != 0)
        MOE_TRY(loss_rows<MOE_LOSS_SWITCH>(job, l, started));
    if (weight[MOE_LOSS_SEQUENCE] != 0) MOE_TRY(loss_rows<MOE_LOSS_SEQUENCE>(job, l, started));
    if (weight[MOE_LOSS_THRESHOLD] != 0 && l->over_taken)
        MOE_TRY(loss_rows<MOE_LOSS_THRESHOLD>(job, l, started));
    return MOE_OK;
}
