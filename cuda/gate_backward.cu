/* gate_backward.cu - the gate's gradients: from the weights and the losses to logits, parameters
 * and input; as src/cpu/gate_backward.c. The forward is in route.cu.
 *
 *     w' = w keep / S           S = sum of a token's kept weights, if renormalised after the drop
 *     w  = scale v              v by weigh.h; for two levels w = scale Gp Gs
 *     H  = clean + noise sd     sd = softplus(raw) + eps,  clean = x' Wg + b,  raw = x' Wnoise
 *     x' = x u
 *
 * Candidate e of a row belongs to thread e % 32 of the row's warp: it alone adds to e's gradients,
 * entry after entry, so that an expert may be there twice. */
#include "load.h"
#include "losses.h"
#include "router_gemm.h"
#include "weigh.h"

/* ---- weights --------------------------------------------------------------------------------- */

/* From the gradients by the kept weights to those by the weights before dropping. */
struct weights_backward {
    const float *g, *before, *after; /* [N]; g NULL: 0 */
    const int64_t *row_of_entry;
    float *dw; /* [N] */
    const double *d_importance, *factor;
    int32_t renormalize;
    float minimum;
};

/* dw_j = keep_j (g_j - sum_i g_i w'_i) / S; where S is below the minimum dw_j = keep_j g_j /
 * minimum. Without renormalisation dw_j = keep_j g_j. */
MOE_DEVICE void drop_backward(const weights_backward *b, int64_t first, int64_t last)
{
    float dot = 0.0f, sum = 0.0f;
    bool fixed;
    for (int64_t n = first; n < last; n++)
        b->dw[n] = b->g && b->row_of_entry[n] >= 0 ? b->g[n] : 0.0f;
    if (!b->g || !b->renormalize) return;
    for (int64_t n = first; n < last; n++)
        if (b->row_of_entry[n] >= 0) {
            sum = sum + b->before[n];
            dot = moe__fma_f32(b->dw[n], b->after[n], dot);
        }
    sum = moe_divisor_of(sum, 0.0f, b->minimum, &fixed);
    if (fixed) dot = 0.0f;
    for (int64_t n = first; n < last; n++)
        b->dw[n] = b->row_of_entry[n] >= 0 && sum != 0.0f ? (b->dw[n] - dot) / sum : 0.0f;
}

/* Importance adds its own: it counts before the drop. A thread for each token. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_gate_weights_backward(moe_loss_arrays l, weights_backward b)
{
    int64_t t = moe_thread();
    if (t >= l.T) return;
    int64_t first = l.token_begin[t], last = l.token_begin[t + 1];
    if (moe_is_masked(l.token_mask, t)) {
        for (int64_t n = first; n < last; n++) b.dw[n] = 0.0f;
        return;
    }
    drop_backward(&b, first, last);
    if (b.factor[MOE_LOSS_IMPORTANCE] == 0) return;
    for (int64_t n = first; n < last; n++)
        if (l.ids[n] >= 0) b.dw[n] = b.dw[n] + (float)b.d_importance[l.ids[n]];
}

struct split_levels {
    int64_t entries, K;
    const int64_t *row_of_entry;
    const float *group_weight, *second_weight, *dw; /* [entries], [rows,K], [entries,K] */
    float *first_dw, *second_dw;                    /* [entries], [rows,K] */
    float scale;
    int32_t reserved;
};

/* w = scale Gp Gs:  dGs = scale Gp dw,  dGp = scale sum_j Gs_j dw_j. A thread for each entry of the
 * primary gate. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_gate_split_levels(split_levels s)
{
    int64_t n = moe_thread();
    if (n >= s.entries) return;
    int64_t r = s.row_of_entry[n];
    const float *dw = s.dw + n * s.K;
    s.first_dw[n] = 0.0f;
    if (r < 0) return;
    float by_group = s.scale * s.group_weight[n];
    for (int64_t j = 0; j < s.K; j++) s.second_dw[r * s.K + j] = by_group * dw[j];
    s.first_dw[n] = s.scale * moe_thread_dot(s.second_weight + r * s.K, dw, s.K);
}

static moe_status weights_backward_of(const moe__gate_backward_job *job, const moe_loss_arrays *l)
{
    const moe__plan_arrays *plan = job->losses->plan;
    const moe__route_job *route = job->losses->route;
    const moe__plan_arrays *p = route->primary;
    weights_backward b = {(const float *)job->entry_weight_grad,
                          (const float *)route->weight,
                          (const float *)plan->weight_of_entry,
                          plan->row_of_entry,
                          (float *)job->d_weight,
                          job->d_importance,
                          job->loss_factor,
                          route->config->renormalize_after_drop,
                          (float)route->config->renormalize_minimum};
    MOE_TRY(moe_over_items(&route->workers, "moe_gate_weights_backward", moe_gate_weights_backward,
                           l->T, *l, b));
    if (route->levels == 1) return MOE_OK;
    split_levels s = {p->entries,
                      route->level[1].top_k,
                      p->row_of_entry,
                      (const float *)p->weight_of_entry,
                      (const float *)route->level[1].weight,
                      (const float *)job->d_weight,
                      (float *)route->level[0].d_weight,
                      (float *)route->level[1].d_weight,
                      (float)route->config->route_scale,
                      0};
    return moe_over_items(&route->workers, "moe_gate_split_levels", moe_gate_split_levels,
                          s.entries, s);
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* The backward of one level. */
struct level_gradients {
    float *dw, *scores;                     /* [entries] */
    float *d_clean, *d_noisy, *d_noise_raw; /* [rows,width] */
    const double *d_load;                   /* [parts,width]; NULL: no load */
    const double *factor;
    float *p; /* [rows,width] scratch of the load */
    float guard;
    int32_t started; /* d_clean has the losses' already */
    float *d_logits_out;
    int64_t d_logits_stride;
};

/* w_j = scale s_j, s the softmax of the chosen:  dh_j = s_j (g_j - sum_i s_i g_i), g = scale dw. */
MOE_DEVICE void chosen_backward(float scale, const float *dw, float *s, const int32_t *ids,
                                int64_t n, const float *h, float *dh)
{
    moe_softmax_of_chosen(s, ids, n, h);
    float dot = moe_row_dot(s, dw, n);
    moe_warp_sync();
    for (int64_t j = 0; j < n; j++)
        if (moe_is_mine(ids[j])) dh[ids[j]] = moe__fma_f32(scale * s[j], dw[j] - dot, dh[ids[j]]);
}

/* v_j = u_j / (U + eps), U = sum u:  du_j = (dv_j - sum_i dv_i v_i) / (U + eps); no sum where the
 * divisor is the minimum. False if all weights are 0, for want of a divisor. Dividing before the
 * sum lets a gradient that must vanish, such as that of a single renormalised score, cancel
 * exactly. */
MOE_DEVICE bool renormalized_backward(const moe_weighing *how, float *du, const float *u, int64_t n)
{
    bool fixed;
    float sum = moe_divisor_of(moe_row_sum(u, n), how->epsilon, how->minimum, &fixed), lane = 0.0f;
    if (sum == 0.0f) return false;
    for (int64_t j = moe_lane(); j < moe_turns_end(n); j += MOE_WARP)
        moe_lanes_fma(&lane, j < n ? du[j] : 0.0f, j < n ? u[j] / sum : 0.0f);
    float dot = fixed ? 0.0f : moe_lanes_tree(lane);
    for (int64_t j = moe_lane(); j < n; j += MOE_WARP) du[j] = (du[j] - dot) / sum;
    return true;
}

/* w_j = scale v_j; sigmoid: dh_j = du_j u_j (1 - u_j);  softmax over all: dh_i = p_i (dp_i - sum_j
 * p_j dp_j), where only the chosen have dp = du and p = u. */
MOE_DEVICE void scored_backward(const moe_weighing *how, float *dw, float *u, const int32_t *ids,
                                int64_t n, const float *h, int64_t width, float *dh)
{
    bool any = false, sigmoid = how->score == MOE_SCORE_SIGMOID;
    float max, sum;
    for (int64_t j = moe_lane(); j < n; j += MOE_WARP) any = any || ids[j] >= 0;
    if (!moe_any(any)) return; /* its scores sum to 0 */
    moe_score_of_chosen(u, ids, n, h, width, how->score, &max, &sum);
    if (how->renormalize && !renormalized_backward(how, dw, u, n)) return;
    for (int64_t j = moe_lane(); j < n; j += MOE_WARP) dw[j] = dw[j] * how->scale;
    float dot = sigmoid ? 0.0f : moe_row_dot(dw, u, n);
    moe_warp_sync();
    for (int64_t i = moe_lane(); i < width && !sigmoid; i += MOE_WARP)
        dh[i] = moe__fma_f32(-dot, moe__exp_f32(h[i] - max) / sum, dh[i]);
    for (int64_t j = 0; j < n; j++)
        if (moe_is_mine(ids[j]))
            dh[ids[j]] = moe__fma_f32(dw[j], sigmoid ? u[j] * (1.0f - u[j]) : u[j], dh[ids[j]]);
}

/* d_clean += dH;  d_raw = (dH noise + d_sd) sigmoid(raw). */
MOE_DEVICE void noise_backward(const moe_level *l, int64_t row, float *d_clean,
                               const float *d_noisy, float *d_std)
{
    const float *noise = l->noise + row * l->width, *raw = l->noise_raw + row * l->width;
    for (int64_t i = moe_lane(); i < l->width; i += MOE_WARP) {
        d_clean[i] = d_clean[i] + d_noisy[i];
        d_std[i] = moe__fma_f32(d_noisy[i], noise[i], d_std[i]) * moe__sigmoid_f32(raw[i]);
    }
}

/* d_logits[row,:] and d_noise_raw[row,:]; a warp for each row. Without noise H is the clean
 * logits. */
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_gate_rows_backward(moe_level l, moe_weighing how, level_gradients d)
{
    int64_t row = moe_warp();
    if (row >= moe_rows_of(&l)) return;
    int64_t first = l.entry_begin[row], n = l.entry_begin[row + 1] - first, at = row * l.width;
    const int32_t *ids = l.choice + first;
    const float *h = l.noisy + at;
    float *d_clean = d.d_clean + at, *dh = l.noise ? d.d_noisy + at : d_clean;
    float *d_std = l.noise ? d.d_noise_raw + at : NULL;
    for (int64_t i = moe_lane(); i < l.width; i += MOE_WARP) {
        if (!d.started) d_clean[i] = 0.0f;
        if (d_std) dh[i] = d_std[i] = 0.0f;
    }
    if (!moe_is_masked(l.token_mask, moe_token_of(&l, row))) {
        if (d.d_load && d_std && d.factor[MOE_LOSS_LOAD] != 0)
            moe_load_backward_row(&l, d.d_load, d.guard, row, d_clean, dh, d_std, d.p + at);
        if (how.chosen_only)
            chosen_backward(how.scale, d.dw + first, d.scores + first, ids, n, h, dh);
        else
            scored_backward(&how, d.dw + first, d.scores + first, ids, n, h, l.width, dh);
        if (d_std) noise_backward(&l, row, d_clean, dh, d_std);
    }
    for (int64_t i = moe_lane(); i < l.width && d.d_logits_out; i += MOE_WARP)
        d.d_logits_out[row * d.d_logits_stride + i] = d_clean[i];
}

static moe_status level_backward(const moe__gate_backward_job *job, const moe__gate_level *level,
                                 bool started)
{
    const moe__route_job *route = job->losses->route;
    level_gradients d = {};
    d.dw = (float *)level->d_weight, d.scores = (float *)level->scores;
    d.d_clean = (float *)level->d_logits, d.d_noisy = (float *)level->d_noisy;
    d.d_noise_raw = (float *)level->d_noise_raw;
    d.d_load = level->kth ? level->d_load : NULL;
    d.factor = job->loss_factor;
    d.p = (float *)job->losses->columns;
    d.guard = (float)route->config->cdf_guard;
    d.started = started;
    d.d_logits_out = route->levels == 1 ? (float *)job->d_logits_out : NULL;
    d.d_logits_stride = job->d_logits_stride;
    return moe_over_rows(&route->workers, "moe_gate_rows_backward", moe_gate_rows_backward,
                         level->rows, moe_level_of(route, level), moe_weighing_of(route), d);
}

/* ---- the input ------------------------------------------------------------------------------- */

/* Where a level's dx goes: set at first, then added to. */
struct destination {
    void *data;
    int64_t stride;
    int32_t add, dtype;
};

/* to[rows,D] (=|+=) g[rows,width] w^T */
static moe_status input_product(const moe__route_job *route, const moe__gate_level *level,
                                const void *g, const moe__matrices *w, destination *to)
{
    moe_rows_product product = {};
    product.ranges = {level->rows, level->parts, level->part_begin, 1};
    product.k = level->width;
    product.n = route->input_width;
    product.a = {g, level->width, NULL, MOE_DTYPE_F32, 0};
    product.b = moe_transposed(w);
    product.out = to->data;
    product.out_stride = to->stride;
    product.out_dtype = to->dtype;
    product.add = to->add;
    to->add = 1;
    return moe__cuda_rows_product(&route->workers, &product);
}

static moe_status sum_rows(moe__rows_job *job, const float *)
{
    return moe__cuda_dispatch_backward_f32(job);
}
static moe_status sum_rows(moe__rows_job *job, const moe_bf16 *)
{
    return moe__cuda_dispatch_backward_bf16(job);
}
static moe_status sum_rows(moe__rows_job *job, const moe_f16 *)
{
    return moe__cuda_dispatch_backward_f16(job);
}

/* `made`: dx_rows are there. */
template <typename T>
static moe_status level_input(const moe__gate_backward_job *job, const moe__gate_level *level,
                              bool made, destination *dx)
{
    const moe__route_job *route = job->losses->route;
    destination rows = {level->dx_rows, route->input_width, 0, MOE_DTYPE_F32};
    destination *to = level->dx_rows ? &rows : dx;
    if (!job->logits_from_host && !made)
        MOE_TRY(input_product(route, level, level->d_logits, &level->weight_matrix, to));
    if (level->noise && !made)
        MOE_TRY(input_product(route, level, level->d_noise_raw, &level->noise_weight, to));
    if (!level->dx_rows) return MOE_OK;
    moe__rows_job sum = {};
    sum.workers = route->workers;
    sum.plan = route->primary;
    sum.width = route->input_width;
    sum.rows_in = rows.data, sum.rows_in_stride = rows.stride;
    sum.tokens_out = dx->data, sum.tokens_out_stride = dx->stride;
    sum.add = dx->add;
    sum.rows_wide = 1;
    sum.tokens_wide = dx->dtype == MOE_DTYPE_F32;
    return sum_rows(&sum, (const T *)NULL);
}

/* dx (=|+=) dx' u, or 0 where nothing came (in NULL); a thread for four columns. */
template <typename T>
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_gate_finish_input(const float *in, T *dx, int64_t dx_stride, bool add, int64_t tokens,
                      int64_t D, moe_jitter how)
{
    int64_t quads = (D + 3) / 4, t = moe_thread() / quads, first = moe_thread() % quads * 4;
    int32_t dtype = moe_dtype_of<T>::value;
    float factor[4];
    if (t >= tokens) return;
    if (in) moe_jitter4(&how, t, first, factor);
    for (int j = 0; j < 4; j++) {
        int64_t at = t * dx_stride + first + j;
        if (first + j >= D) continue;
        float v = in ? in[t * D + first + j] * factor[j] : 0.0f;
        moe_set_element(dx, dtype, at, add ? moe_element(dx, dtype, at) + v : v);
    }
}

/* dx, when every level has added its own to `sum`. */
template <typename T>
static moe_status finish_input(const moe__gate_backward_job *job, const destination *sum)
{
    const moe__route_job *route = job->losses->route;
    int64_t D = route->input_width;
    const float *in = sum->add ? (const float *)job->d_x_jittered : NULL;
    bool add = sum->add && job->dx_add; /* else nothing came from there */
    if (sum->add && !in) return MOE_OK;
    return moe_over_items(&route->workers, "moe_gate_finish_input", moe_gate_finish_input<T>,
                          route->tokens * ((D + 3) / 4), in, (T *)job->dx, job->dx_stride, add,
                          route->tokens, D, moe_jitter_of(route));
}

/* ---- the parameters -------------------------------------------------------------------------- */

/* dw[parts][D,width] += x'^T g, each part over its rows that are not masked. */
template <typename T>
static moe_status parameter_product(const moe__gate_backward_job *job, const moe__gate_level *level,
                                    const void *g, const moe__matrices *dw,
                                    const moe__matrices *dbias)
{
    const moe__route_job *route = job->losses->route;
    const moe__losses_job *losses = job->losses;
    bool masked = !level->part_begin && losses->valid_token;
    moe_dw_product product = {};
    if (!moe_is_there(dw) && !moe_is_there(dbias)) return MOE_OK;
    product.ranges = {level->rows, level->parts, masked ? losses->valid_begin : level->part_begin,
                      masked ? losses->plan->groups : 1};
    product.k = route->input_width;
    product.n = level->width;
    product.a = moe_gate_input<T>(route, masked ? losses->valid_token : level->token_of_row);
    product.g = {g, level->width, masked ? losses->valid_token : NULL, MOE_DTYPE_F32, 0};
    product.dw = *dw;
    product.dbias = *dbias;
    return moe__cuda_dw_product(&route->workers, &product);
}

template <typename T>
static moe_status level_parameters(const moe__gate_backward_job *job, const moe__gate_level *level)
{
    const moe__matrices none = {};
    if (!job->logits_from_host)
        MOE_TRY(parameter_product<T>(job, level, level->d_logits, &level->d_weight_matrix,
                                     &level->d_bias));
    if (!level->noise) return MOE_OK;
    return parameter_product<T>(job, level, level->d_noise_raw, &level->d_noise_weight, &none);
}

/* L = sum (above - taken)(p - thr):  dthr_e = n_e - (tokens above)_e. */
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_gate_threshold_backward(moe_vector d, const double *factor, const int64_t *over_taken,
                            int64_t E)
{
    int64_t e = moe_thread(), at = d.offset + e * d.stride;
    if (e >= E || factor[MOE_LOSS_THRESHOLD] == 0) return;
    moe_set_element(d.data, d.dtype, at,
                    moe_element(d.data, d.dtype, at) +
                        (float)(factor[MOE_LOSS_THRESHOLD] * (double)over_taken[e]));
}

static moe_status threshold_gradient(const moe__gate_backward_job *job, const moe_loss_arrays *l)
{
    if (l->weights[MOE_LOSS_THRESHOLD] == 0 || !job->d_threshold.base || !l->over_taken)
        return MOE_OK;
    return moe_over_items(&job->losses->route->workers, "moe_gate_threshold_backward",
                          moe_gate_threshold_backward, l->E, moe_vector_of(&job->d_threshold),
                          (const double *)job->loss_factor, (const int64_t *)l->over_taken, l->E);
}

/* ---- the step -------------------------------------------------------------------------------- */

template <typename T> static moe_status gate_backward(moe__gate_backward_job *job)
{
    const moe__route_job *route = job->losses->route;
    moe_loss_arrays l = moe__cuda_losses_of(job->losses);
    destination dx = {job->dx, job->dx_stride, job->dx_add, moe_dtype_of<T>::value};
    bool started = false;
    if (job->d_x_jittered) dx = {job->d_x_jittered, route->input_width, 0, MOE_DTYPE_F32};
    MOE_TRY(moe__cuda_losses_prepare(job, &l));
    MOE_TRY(weights_backward_of(job, &l));
    MOE_TRY(moe__cuda_losses_rows(job, &l, &started));
    for (int32_t i = 0; i < route->levels && route->level[i].logits; i++) {
        bool elsewhere = i == 1 && job->second;
        MOE_TRY(level_backward(job, &route->level[i], started));
        if (elsewhere) MOE_TRY(job->second(job));
        if (job->dx) MOE_TRY(level_input<T>(job, &route->level[i], elsewhere, &dx));
        if (!elsewhere) MOE_TRY(level_parameters<T>(job, &route->level[i]));
    }
    MOE_TRY(threshold_gradient(job, &l));
    return job->dx ? finish_input<T>(job, &dx) : MOE_OK;
}

/* Partial sums of the gradients by the parameters of a level. */
int64_t moe__cuda_gate_backward_scratch(const moe__pass_shape *shape)
{
    if (!shape || !shape->gate) return 0;
    const moe_gate_config *c = shape->gate;
    int64_t A = c->expert_groups;
    if (c->kind != MOE_GATE_HIERARCHICAL)
        return moe__cuda_dw_scratch(1, c->d_model, c->num_experts);
    return moe__max(moe__cuda_dw_scratch(1, c->d_model, A),
                    moe__cuda_dw_scratch(A, c->d_model, c->num_experts / A));
}

MOE_CUDA_SLOT(gate_backward, moe__gate_backward_job *)
