/* gate_backward.c - the gate's gradients: from the weights and the losses to logits, parameters and
 * input. The forward is in route.c.
 *
 *     w' = w keep / S           S = sum of a token's kept weights, if renormalised after the drop
 *     w  = scale v              v by weigh.h; for two levels w = scale Gp Gs
 *     H  = clean + noise sd     sd = softplus(raw) + eps,  clean = x' Wg + b,  raw = x' Wnoise
 *     x' = x u */
#include "cpu/kernels.h"
#include "cpu/route.h"
#include "cpu/tiles.h"
#include "cpu/weigh.h"

/* ---- weights --------------------------------------------------------------------------------- */

/* dw_j = keep_j (g_j - sum_i g_i w'_i) / S; where S is below the minimum dw_j = keep_j g_j /
 * minimum. Without renormalisation dw_j = keep_j g_j. Importance adds its own: it counts before the
 * drop. */
static void drop_backward(const moe__gate_backward_job *job, int64_t t, real *dw)
{
    const moe__plan_arrays *plan = job->losses->plan;
    const moe_gate_config *c = job->losses->route->config;
    const real *g = job->entry_weight_grad, *before = job->losses->route->weight;
    const real *after = plan->weight_of_entry;
    int64_t first = plan->token_begin[t], last = plan->token_begin[t + 1];
    real dot = R(0.0), sum = R(0.0);
    int fixed = 0;
    for (int64_t n = first; n < last; n++) dw[n] = g && plan->row_of_entry[n] >= 0 ? g[n] : R(0.0);
    if (!g || !c->renormalize_after_drop) return;
    for (int64_t n = first; n < last; n++)
        if (plan->row_of_entry[n] >= 0) {
            sum = sum + before[n];
            dot = r_fma(dw[n], after[n], dot);
        }
    sum = divisor_of(sum, 0, c->renormalize_minimum, &fixed);
    if (fixed) dot = R(0.0);
    for (int64_t n = first; n < last; n++)
        dw[n] = plan->row_of_entry[n] >= 0 && sum != R(0.0) ? (dw[n] - dot) / sum : R(0.0);
}

static void weights_backward_range(void *argument, int64_t begin, int64_t end)
{
    const moe__gate_backward_job *job = argument;
    const moe__route_job *route = job->losses->route;
    real *dw = job->d_weight;
    int importance = job->loss_factor[MOE_LOSS_IMPORTANCE] != 0;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = route->token_begin[t], last = route->token_begin[t + 1];
        if (is_masked(route->token_mask, t)) {
            for (int64_t n = first; n < last; n++) dw[n] = R(0.0);
            continue;
        }
        drop_backward(job, t, dw);
        for (int64_t n = first; n < last && importance; n++)
            if (route->expert_of_entry[n] >= 0)
                dw[n] = dw[n] + (real)job->d_importance[route->expert_of_entry[n]];
    }
}

/* w = scale Gp Gs:  dGs = scale Gp dw,  dGp = scale sum_j Gs_j dw_j. */
static void split_levels_range(void *argument, int64_t begin, int64_t end)
{
    const moe__gate_backward_job *job = argument;
    const moe__route_job *route = job->losses->route;
    const moe__plan_arrays *p = route->primary;
    const moe__gate_level *first = &route->level[0], *second = &route->level[1];
    real scale = (real)route->config->route_scale;
    int64_t K = second->top_k;
    for (int64_t n = begin; n < end; n++) {
        int64_t r = p->row_of_entry[n];
        const real *dw = (const real *)job->d_weight + n * K;
        ((real *)first->d_weight)[n] = R(0.0);
        if (r < 0) continue;
        real by_group = scale * ((const real *)p->weight_of_entry)[n];
        real *ds = (real *)second->d_weight + r * K;
        for (int64_t j = 0; j < K; j++) ds[j] = by_group * dw[j];
        ((real *)first->d_weight)[n] = scale *
                                       lane_dot((const real *)second->weight + r * K, dw, K);
    }
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* w_j = scale s_j, s the softmax of the chosen:  dh_j = s_j (g_j - sum_i s_i g_i), g = scale dw. */
static void chosen_backward(real scale, const real *dw, real *s, const int32_t *ids, int64_t n,
                            const real *h, real *dh)
{
    softmax_of_chosen(s, ids, n, h);
    real dot = lane_dot(s, dw, n);
    for (int64_t j = 0; j < n; j++)
        if (ids[j] >= 0) dh[ids[j]] = r_fma(scale * s[j], dw[j] - dot, dh[ids[j]]);
}

/* sum_j a_j (u_j / sum) in the lanes of lane_dot. Dividing first lets a gradient that must vanish,
 * such as that of a single renormalised score, cancel exactly. */
static real normalized_dot(const real *a, const real *u, int64_t n, real sum)
{
    real lane[16] = {R(0.0)};
    for (int64_t j = 0; j < n; j++) lane[j % 16] = r_fma(a[j], u[j] / sum, lane[j % 16]);
    return lane_sum(lane, 16);
}

/* v_j = u_j / (U + eps), U = sum u:  du_j = (dv_j - sum_i dv_i v_i) / (U + eps); no sum where the
 * divisor is the minimum. Returns 0 if all weights are 0, for want of a divisor. */
static int renormalized_backward(const moe_gate_config *c, real *du, const real *u, int64_t n)
{
    int fixed;
    real sum = divisor_of(lane_sum(u, n), c->renormalize_epsilon, c->renormalize_minimum, &fixed);
    if (sum == R(0.0)) return 0;
    real dot = fixed ? R(0.0) : normalized_dot(du, u, n, sum);
    for (int64_t j = 0; j < n; j++) du[j] = (du[j] - dot) / sum;
    return 1;
}

/* w_j = scale v_j; sigmoid: dh_j = du_j u_j (1 - u_j);  softmax over all: dh_i = p_i (dp_i - sum_j
 * p_j dp_j), where only the chosen have dp = du and p = u. */
static void scored_backward(const moe_gate_config *c, real scale, real *dw, real *u,
                            const int32_t *ids, int64_t n, const real *h, int64_t width, real *dh,
                            real *p)
{
    int any = 0;
    for (int64_t j = 0; j < n; j++) any |= ids[j] >= 0;
    if (!any) return; /* its scores sum to 0 */
    score_of_chosen(u, ids, n, h, width, c->score);
    if (c->renormalize && !renormalized_backward(c, dw, u, n)) return;
    for (int64_t j = 0; j < n; j++) dw[j] = dw[j] * scale;
    if (c->score == MOE_SCORE_SIGMOID) {
        for (int64_t j = 0; j < n; j++)
            if (ids[j] >= 0) dh[ids[j]] = r_fma(dw[j], u[j] * (R(1.0) - u[j]), dh[ids[j]]);
        return;
    }
    real dot = lane_dot(dw, u, n);
    softmax(p, h, width);
    for (int64_t i = 0; i < width; i++) dh[i] = r_fma(-dot, p[i], dh[i]);
    for (int64_t j = 0; j < n; j++)
        if (ids[j] >= 0) dh[ids[j]] = r_fma(dw[j], u[j], dh[ids[j]]);
}

/* d_clean = dH, 0 but for the chosen: where neither noise nor a loss adds to it. d_noisy holds what
 * the chosen get; a choice may name an expert twice. */
static void chosen_only(const moe__gate_level *level, real scale, const real *dw, real *scores,
                        int64_t row, real *d_clean, real *d_noisy)
{
    int64_t width = level->width, first = level->entry_begin[row];
    int64_t n = level->entry_begin[row + 1] - first;
    const int32_t *ids = level->choice + first;
    for (int64_t i = 0; i < width; i++) d_clean[i] = R(0.0);
    for (int64_t j = 0; j < n; j++)
        if (ids[j] >= 0) d_noisy[ids[j]] = R(0.0);
    chosen_backward(scale, dw, scores, ids, n, (const real *)level->noisy + row * width, d_noisy);
    for (int64_t j = 0; j < n; j++)
        if (ids[j] >= 0) d_clean[ids[j]] = R(0.0) + d_noisy[ids[j]];
}

/* Whether a loss reaches the logits by another way than the weights. */
static int has_logit_losses(const double *factor)
{
    return factor[MOE_LOSS_SWITCH] != 0 || factor[MOE_LOSS_GSHARD] != 0 ||
           factor[MOE_LOSS_Z] != 0 || factor[MOE_LOSS_SEQUENCE] != 0 ||
           factor[MOE_LOSS_THRESHOLD] != 0 || factor[MOE_LOSS_LOAD] != 0;
}

/* d_clean += dH;  d_raw = (dH noise + d_sd) sigmoid(raw). */
static void noise_backward(const moe__gate_level *level, int64_t row, real *d_clean,
                           const real *d_noisy, real *d_std)
{
    int64_t n = level->width;
    for (int64_t i = 0; i < n; i++) d_clean[i] = d_clean[i] + d_noisy[i];
    if (!level->noise) return;
    const real *noise = (const real *)level->noise + row * n;
    const real *raw = (const real *)level->noise_raw + row * n;
    for (int64_t i = 0; i < n; i++)
        d_std[i] = r_fma(d_noisy[i], noise[i], d_std[i]) * r_sigmoid(raw[i]);
}

/* ---- rows of a level ------------------------------------------------------------------------- */

typedef struct level_run {
    const moe__gate_backward_job *job;
    const moe__gate_level *level;
} level_run;

/* d_logits[row,:] and d_noise_raw[row,:]. */
static void level_backward_row(const moe__gate_backward_job *job, const moe__gate_level *level,
                               int64_t row)
{
    const moe__route_job *route = job->losses->route;
    int64_t width = level->width, first = level->entry_begin[row];
    int64_t n = level->entry_begin[row + 1] - first;
    const int32_t *ids = level->choice + first;
    const real *h = (const real *)level->noisy + row * width;
    real *dw = (real *)level->d_weight + first, *scores = (real *)level->scores + first;
    real *d_clean = (real *)level->d_logits + row * width;
    real *d_noisy = (real *)level->d_noisy + row * width;
    real *d_std = level->noise ? (real *)level->d_noise_raw + row * width : NULL;
    real *p = (real *)job->losses->columns + row * width, scale = level_scale(route);

    if (selects_then_scores(route->config) && !level->noise &&
        !has_logit_losses(job->loss_factor) &&
        !is_masked(route->token_mask, token_of(level, row))) {
        chosen_only(level, scale, dw, scores, row, d_clean, d_noisy);
        return;
    }
    for (int64_t i = 0; i < width; i++) d_clean[i] = R(0.0), d_noisy[i] = R(0.0);
    for (int64_t i = 0; d_std && i < width; i++) d_std[i] = R(0.0);
    if (is_masked(route->token_mask, token_of(level, row))) return;
    if (route->levels == 1) MOE_KERNEL(losses_backward_row)(job, row, d_clean, p);
    if (job->loss_factor[MOE_LOSS_LOAD] != 0 && level->kth && level->noise)
        MOE_KERNEL(load_backward_row)(job->losses, level, row, d_clean, d_noisy, d_std, p);
    if (selects_then_scores(route->config))
        chosen_backward(scale, dw, scores, ids, n, h, d_noisy);
    else
        scored_backward(route->config, scale, dw, scores, ids, n, h, width, d_noisy, p);
    noise_backward(level, row, d_clean, d_noisy, d_std);
}

static void level_backward_range(void *argument, int64_t begin, int64_t end)
{
    const level_run *run = argument;
    const moe__gate_backward_job *job = run->job;
    int64_t width = run->level->width;
    for (int64_t r = begin; r < end; r++) {
        level_backward_row(job, run->level, r);
        if (!job->d_logits_out) continue;
        const real *from = (const real *)run->level->d_logits + r * width;
        real *to = (real *)job->d_logits_out + r * job->d_logits_stride;
        for (int64_t i = 0; i < width; i++) to[i] = from[i];
    }
}

static moe_status level_backward(const moe__gate_backward_job *job, const moe__gate_level *level)
{
    const moe__workers *w = &job->losses->route->workers;
    level_run run = {job, level};
    return moe__parallel_range(w->context, level->rows, 16, level_backward_range, &run,
                               w->function);
}

/* ---- the input ------------------------------------------------------------------------------- */

/* Where a level's dx goes: set at first, then added to. */
typedef struct destination {
    void *data;
    int64_t stride;
    int32_t add, wide;
} destination;

/* to[rows,D] (=|+=) g[rows,width] w^T */
static moe_status input_product(const moe__route_job *route, const moe__gate_level *level,
                                const void *g, const moe__matrices *w, destination *to)
{
    int64_t all[2] = {0, level->rows};
    moe__gemm_rows_job gemm = {.experts = level->parts,
                               .expert_begin = level->part_begin ? level->part_begin : all,
                               .k = level->width,
                               .n = route->input_width,
                               .a = {.data = g, .stride = level->width, .wide = 1},
                               .b = *w,
                               .out = to->data,
                               .out_wide = to->wide,
                               .out_stride = to->stride,
                               .out_add = to->add,
                               .tile_begin = route->tile_begin};
    gemm.b.stride_row = w->stride_col;
    gemm.b.stride_col = w->stride_row;
    to->add = 1;
    return run_gemm_rows(&route->workers, &gemm);
}

/* `made`: dx_rows are there. */
static moe_status level_input(const moe__gate_backward_job *job, const moe__gate_level *level,
                              bool made, destination *dx)
{
    const moe__route_job *route = job->losses->route;
    destination rows = {level->dx_rows, route->input_width, 0, 1};
    destination *to = level->dx_rows ? &rows : dx;
    if (!job->logits_from_host && !made)
        MOE_TRY(input_product(route, level, level->d_logits, &level->weight_matrix, to));
    if (level->noise && !made)
        MOE_TRY(input_product(route, level, level->d_noise_raw, &level->noise_weight, to));
    if (!level->dx_rows) return MOE_OK;
    moe__rows_job sum = {.workers = route->workers,
                         .plan = route->primary,
                         .width = route->input_width,
                         .rows_in = rows.data,
                         .rows_in_stride = rows.stride,
                         .tokens_out = dx->data,
                         .tokens_out_stride = dx->stride,
                         .add = dx->add,
                         .rows_wide = 1,
                         .tokens_wide = dx->wide};
    return MOE_KERNEL(dispatch_backward)(&sum);
}

static void zero_dx_range(void *argument, int64_t begin, int64_t end)
{
    const moe__gate_backward_job *job = argument;
    for (int64_t t = begin; t < end; t++) {
        element *dx = (element *)job->dx + t * job->dx_stride;
        for (int64_t j = 0; j < job->losses->route->input_width; j++) dx[j] = put(R(0.0));
    }
}

/* dx (=|+=) dx' u */
static void jitter_backward_range(void *argument, int64_t begin, int64_t end)
{
    const moe__gate_backward_job *job = argument;
    int64_t D = job->losses->route->input_width;
    for (int64_t t = begin; t < end; t++) {
        const real *in = (const real *)job->d_x_jittered + t * D;
        element *dx = (element *)job->dx + t * job->dx_stride;
        real factor[4];
        for (int64_t j = 0; j < D; j++) {
            if (j % 4 == 0) MOE_KERNEL(jitter4)(job->losses->route, t, j, factor);
            real d = in[j] * factor[j % 4];
            dx[j] = put(job->dx_add ? get(dx[j]) + d : d);
        }
    }
}

/* dx, when every level has added its own to `sum`. */
static moe_status finish_input(const moe__gate_backward_job *job, const destination *sum)
{
    const moe__route_job *route = job->losses->route;
    const moe__workers *w = &route->workers;
    void *argument = (void *)(uintptr_t)job;
    if (!sum->add) /* nothing came from there */
        return moe__parallel_range(w->context, route->tokens, 64, zero_dx_range, argument,
                                   w->function);
    return job->d_x_jittered ? moe__parallel_range(w->context, route->tokens, 64,
                                                   jitter_backward_range, argument, w->function)
                             : MOE_OK;
}

/* ---- the parameters -------------------------------------------------------------------------- */

/* dw[parts][D,width] += x'^T g, each part group by group over its rows that are not masked. */
static moe_status parameter_product(const moe__gate_backward_job *job, const moe__gate_level *level,
                                    const void *g, const moe__matrices *dw,
                                    const moe__matrices *dbias)
{
    const moe__route_job *route = job->losses->route;
    const moe__losses_job *losses = job->losses;
    int tokens = level->segment_begin == NULL;
    if (!has(dw) && !has(dbias)) return MOE_OK;
    moe__gemm_dw_job gemm = {
        .experts = level->parts,
        .segment_begin = tokens ? losses->valid_begin : level->segment_begin,
        .segments_per_expert = losses->plan->groups,
        .k = route->input_width,
        .n = level->width,
        .a = MOE_KERNEL(gate_input)(route, tokens ? losses->valid_token : level->token_of_row),
        .g = {.data = g,
              .stride = level->width,
              .row_index = tokens ? losses->valid_token : NULL,
              .wide = 1},
        .dw = *dw,
        .dbias = *dbias,
        .tile_begin = route->tile_begin};
    return run_gemm_dw(&route->workers, &gemm);
}

/* Where each token group's rows of each part begin. */
static void find_segments(const moe__route_job *route, const moe__gate_level *level)
{
    for (int64_t i = 0; i < level->parts; i++) {
        int64_t row = level->part_begin[i];
        for (int64_t g = 0; g < route->groups; g++) {
            while (row < level->part_begin[i + 1] && token_of(level, row) < route->group_begin[g])
                row++;
            level->segment_begin[i * route->groups + g] = row;
        }
    }
    level->segment_begin[level->parts * route->groups] = level->rows;
}

static moe_status level_parameters(const moe__gate_backward_job *job, const moe__gate_level *level)
{
    const moe__matrices none = {0};
    if (level->segment_begin) find_segments(job->losses->route, level);
    if (!job->logits_from_host)
        MOE_TRY(parameter_product(job, level, level->d_logits, &level->d_weight_matrix,
                                  &level->d_bias));
    if (!level->noise) return MOE_OK;
    return parameter_product(job, level, level->d_noise_raw, &level->d_noise_weight, &none);
}

/* L = sum (above - taken)(p - thr):  dthr_e = n_e - (tokens above)_e. */
static void threshold_gradient(const moe__gate_backward_job *job)
{
    const moe__losses_job *losses = job->losses;
    const moe__matrices *d = &job->d_threshold;
    double factor = job->loss_factor[MOE_LOSS_THRESHOLD];
    if (factor == 0 || !d->base || !losses->over_taken) return;
    for (int64_t e = 0; e < losses->plan->num_experts; e++) {
        int64_t at = d->offset + e * d->stride_col;
        put_at(d->base, at, d->wide,
               get_at(d->base, at, d->wide) + (real)(factor * (double)losses->over_taken[e]));
    }
}

/* Weight of each loss times the caller's factor. */
static void find_loss_factors(const moe__gate_backward_job *job)
{
    const double *weight = job->losses->weights;
    const real *grad = job->loss_grad;
    for (int64_t i = 0; i < MOE_LOSS_SLOTS; i++)
        job->loss_factor[i] = weight[i] != 0 ? weight[i] * (grad ? (double)grad[i] : 1) : 0;
}

moe_status MOE_KERNEL(gate_backward)(moe__gate_backward_job *job)
{
    const moe__route_job *route = job->losses->route;
    const moe__workers *w = &route->workers;
    destination dx = {job->dx, job->dx_stride, job->dx_add, 0};
    if (job->d_x_jittered) dx = (destination){job->d_x_jittered, route->input_width, 0, 1};
    find_loss_factors(job);
    MOE_KERNEL(losses_backward_prepare)(job);
    MOE_TRY(moe__parallel_range(w->context, route->tokens, 64, weights_backward_range, job,
                                w->function));
    if (route->levels == 2)
        MOE_TRY(moe__parallel_range(w->context, route->primary->entries, 64, split_levels_range,
                                    job, w->function));
    for (int32_t i = 0; i < route->levels && route->level[i].logits; i++) {
        bool elsewhere = i == 1 && job->second;
        MOE_TRY(level_backward(job, &route->level[i]));
        if (elsewhere) MOE_TRY(job->second(job));
        if (job->dx) MOE_TRY(level_input(job, &route->level[i], elsewhere, &dx));
        if (!elsewhere) MOE_TRY(level_parameters(job, &route->level[i]));
    }
    threshold_gradient(job);
    return job->dx ? finish_input(job, &dx) : MOE_OK;
}
