/* route.c - from tokens to experts and weights, and the gate's gradients.
 *
 *     clean = x Wg (+ bias)                            [T,E]
 *     sd = softplus(x Wnoise) + eps,  H = clean + noise * sd      in training; else H = clean
 *     ids = the K first of H in the total order of select.h
 *     weight: softmax over the chosen H | softmax or sigmoid over all, [/ (sum + eps)];  *
 *     route_scale
 *
 * Sigmoid and softmax rise with the logit, so the K first scores are the K first logits, without
 * the ties that rounding of a score would make. */
#include "cpu/route.h"
#include "cpu/select.h"
#include "cpu/tiles.h"
#include "philox.h"

/* ---- logits ---------------------------------------------------------------------------------- */

/* out[T,E] = x[T,D] w[D,E] (+ bias[E]) */
static moe_status logits_product(const moe__route_job *job, const moe__matrices *w,
                                 const moe__matrices *bias, void *out)
{
    int64_t rows[2] = {0, job->tokens};
    moe__gemm_rows_job gemm = {.experts = 1,
                               .expert_begin = rows,
                               .k = job->input_width,
                               .n = job->config->num_experts,
                               .a = {job->x, job->x_stride, NULL, NULL},
                               .b = *w,
                               .out = out,
                               .out_stride = job->config->num_experts,
                               .tile_begin = job->tile_begin};
    if (bias) gemm.bias = *bias;
    return run_gemm_rows(&job->workers, &gemm);
}

static void copy_logits_range(void *argument, int64_t begin, int64_t end)
{
    const moe__route_job *job = argument;
    int64_t E = job->config->num_experts;
    for (int64_t t = begin; t < end; t++) {
        const real *in = (const real *)job->logits_in + t * job->logits_stride;
        real *out = (real *)job->logits + t * E;
        for (int64_t i = 0; i < E; i++) out[i] = in[i];
    }
}

/* noise[t,:] = the host's numbers, or those of the counter (stream, step, token, expert / 4). */
static void draw_noise(const moe__route_job *job, int64_t t, real *noise)
{
    int64_t E = job->config->num_experts;
    if (job->noise_in) {
        const real *in = (const real *)job->noise_in + t * job->noise_stride;
        for (int64_t i = 0; i < E; i++) noise[i] = in[i];
        return;
    }
    for (int64_t first = 0; first < E; first += 4) {
        uint32_t counter[4], bits[4];
        float four[4];
        moe__counter(counter, job->noise_stream, (uint32_t)job->step,
                     (uint32_t)(job->token_first + t), (uint32_t)(first / 4));
        moe__philox(job->config->seed, counter, bits);
        moe__normal4(bits, four);
        for (int64_t i = first; i < first + 4 && i < E; i++) noise[i] = (real)four[i - first];
    }
}

/* sd and H of one token. */
static void add_noise(const moe__route_job *job, int64_t t)
{
    int64_t E = job->config->num_experts;
    const real *clean = (const real *)job->logits + t * E;
    const real *raw = (const real *)job->noise_raw + t * E;
    real *sd = (real *)job->noise_std + t * E, *noise = (real *)job->noise + t * E;
    real *noisy = (real *)job->noisy + t * E;
    real epsilon = (real)job->config->noise_epsilon;
    draw_noise(job, t, noise);
    for (int64_t i = 0; i < E; i++) sd[i] = r_softplus(raw[i]) + epsilon;
    for (int64_t i = 0; i < E; i++) noisy[i] = r_fma(noise[i], sd[i], clean[i]);
}

/* ---- weights --------------------------------------------------------------------------------- */

/* w[j] = softmax over the chosen logits of entry j; entries without an expert get 0. */
static void softmax_of_chosen(real *w, const int32_t *ids, int64_t n, const real *h)
{
    real max = R(0.0), sum = R(0.0);
    int any = 0;
    for (int64_t j = 0; j < n; j++)
        if (ids[j] >= 0 && (!any || h[ids[j]] > max)) max = h[ids[j]], any = 1;
    for (int64_t j = 0; j < n; j++) w[j] = ids[j] < 0 ? R(0.0) : r_exp(h[ids[j]] - max);
    sum = lane_sum(w, n);
    for (int64_t j = 0; j < n; j++) w[j] = ids[j] < 0 ? R(0.0) : w[j] / sum;
}

/* w[j] = score of entry j: sigmoid, or softmax over all E. Without scratch for the whole softmax
 * its sum is formed as exp_shifted forms it, in the same 16 lanes. */
static void score_of_chosen(real *w, const int32_t *ids, int64_t n, const real *h, int64_t E,
                            int32_t score)
{
    if (score == MOE_SCORE_SIGMOID) {
        for (int64_t j = 0; j < n; j++) w[j] = ids[j] < 0 ? R(0.0) : r_sigmoid(h[ids[j]]);
        return;
    }
    real max = h[0], chunk[16 * 16], lanes[16] = {R(0.0)};
    for (int64_t i = 1; i < E; i++) max = h[i] > max ? h[i] : max;
    for (int64_t first = 0; first < E; first += 256) {
        int64_t m = moe__min(256, E - first);
        for (int64_t i = 0; i < m; i++) chunk[i] = r_exp(h[first + i] - max);
        for (int64_t i = m; i < 256; i++) chunk[i] = R(0.0);
        for (int64_t i = 0; i < 256; i += 16)
            for (int64_t l = 0; l < 16; l++) lanes[l] = lanes[l] + chunk[i + l];
    }
    real sum = lane_sum(lanes, 16);
    for (int64_t j = 0; j < n; j++) w[j] = ids[j] < 0 ? R(0.0) : r_exp(h[ids[j]] - max) / sum;
}

/* Whether the weights are a softmax over the chosen logits only. */
static int selects_then_scores(const moe_gate_config *c)
{
    return c->kind != MOE_GATE_TOP_K ||
           (c->score == MOE_SCORE_SOFTMAX && c->order == MOE_ORDER_SELECT_THEN_SCORE);
}

/* The weights before dropping of the n entries of one token. */
static void weigh(const moe_gate_config *c, real *w, const int32_t *ids, int64_t n, const real *h)
{
    real scale = (real)c->route_scale;
    if (selects_then_scores(c)) {
        softmax_of_chosen(w, ids, n, h);
    } else {
        score_of_chosen(w, ids, n, h, c->num_experts, c->score);
        if (c->renormalize) {
            real sum = lane_sum(w, n) + (real)c->renormalize_epsilon;
            for (int64_t j = 0; j < n; j++) w[j] = w[j] / sum;
        }
    }
    for (int64_t j = 0; j < n; j++) w[j] = w[j] * scale;
}

/* kth[0]: the last of the chosen experts; kth[1]: the first of the others. -1: there is none. */
static void find_thresholds(int32_t kth[2], const int32_t *ids, int64_t n, const real *h, int64_t E)
{
    kth[0] = kth[1] = -1;
    for (int64_t j = 0; j < n; j++)
        if (ids[j] >= 0 && (kth[0] < 0 || comes_before(h[kth[0]], kth[0], h[ids[j]], ids[j])))
            kth[0] = ids[j];
    for (int32_t i = 0; i < E; i++) {
        if (kth[1] >= 0 && !comes_before(h[i], i, h[kth[1]], kth[1])) continue;
        int chosen = 0;
        for (int64_t j = 0; j < n && !chosen; j++) chosen = ids[j] == i;
        if (!chosen) kth[1] = i;
    }
}

static void route_range(void *argument, int64_t begin, int64_t end)
{
    const moe__route_job *job = argument;
    const moe_gate_config *c = job->config;
    int64_t E = c->num_experts;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = job->token_begin[t], n = job->token_begin[t + 1] - first;
        int32_t *ids = job->expert_of_entry + first;
        real *w = (real *)job->weight + first;
        const real *h = (const real *)job->noisy + t * E;
        if (job->noise) add_noise(job, t);
        if (is_masked(job->token_mask, t)) {
            for (int64_t j = 0; j < n; j++) ids[j] = -1, w[j] = R(0.0);
            continue;
        }
        if (!job->keep_ids && c->kind == MOE_GATE_SOFTMAX_DENSE)
            for (int64_t j = 0; j < n; j++) ids[j] = (int32_t)j;
        else if (!job->keep_ids)
            select_top(ids, n, h, E);
        weigh(c, w, ids, n, h);
        if (job->kth) find_thresholds(job->kth + 2 * t, ids, n, h, E);
    }
}

moe_status MOE_KERNEL(route_forward)(moe__route_job *job)
{
    const moe__workers *w = &job->workers;
    if (job->logits_in)
        MOE_TRY(
            moe__parallel_range(w->context, job->tokens, 64, copy_logits_range, job, w->function));
    else
        MOE_TRY(logits_product(job, &job->weight_matrix, &job->bias, job->logits));
    if (job->noise) MOE_TRY(logits_product(job, &job->noise_weight, NULL, job->noise_raw));
    return moe__parallel_range(w->context, job->tokens, 16, route_range, job, w->function);
}

/* ---- backward -------------------------------------------------------------------------------- */

/* weight_after = weight keep / S, S = sum of kept weights:  dw_j = keep_j (g_j - sum_i g_i after_i)
 * / S. Without renormalisation dw_j = keep_j g_j. */
static void drop_backward(const moe__gate_backward_job *job, int64_t first, int64_t n, real *dw)
{
    const moe__plan_arrays *plan = job->losses->plan;
    const real *g = job->entry_weight_grad, *before = job->losses->route->weight;
    const real *after = plan->weight_of_entry;
    const int64_t *row = plan->row_of_entry + first;
    real dot = R(0.0), sum = R(0.0);
    for (int64_t j = 0; j < n; j++) dw[j] = g && row[j] >= 0 ? g[first + j] : R(0.0);
    if (!g || !job->losses->route->config->renormalize_after_drop) return;
    for (int64_t j = 0; j < n; j++)
        if (row[j] >= 0) {
            sum = sum + before[first + j];
            dot = r_fma(dw[j], after[first + j], dot);
        }
    for (int64_t j = 0; j < n; j++)
        dw[j] = row[j] >= 0 && sum != R(0.0) ? (dw[j] - dot) / sum : R(0.0);
}

/* w_j = scale s_j, s the softmax of the chosen:  dh_j = s_j (g_j - sum_i s_i g_i), g = scale dw. */
static void chosen_backward(const moe_gate_config *c, const real *dw, real *s, const int32_t *ids,
                            int64_t n, const real *h, real *dh)
{
    real scale = (real)c->route_scale;
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

/* w_j = scale v_j, v_j = u_j / (U + eps), U = sum u:  du_j = scale (dw_j - sum_i dw_i v_i) / (U +
 * eps); sigmoid: dh_j = du_j u_j (1 - u_j);  softmax over all: dh_i = p_i (dp_i - sum_j p_j dp_j),
 * where only the chosen have dp = du and p = u. */
static void scored_backward(const moe_gate_config *c, real *dw, real *u, const int32_t *ids,
                            int64_t n, const real *h, real *dh, real *p)
{
    real scale = (real)c->route_scale;
    int any = 0;
    for (int64_t j = 0; j < n; j++) any |= ids[j] >= 0;
    if (!any) return; /* its scores sum to 0 */
    score_of_chosen(u, ids, n, h, c->num_experts, c->score);
    if (c->renormalize) {
        real sum = lane_sum(u, n) + (real)c->renormalize_epsilon;
        real dot = normalized_dot(dw, u, n, sum);
        for (int64_t j = 0; j < n; j++) dw[j] = (dw[j] - dot) / sum;
    }
    for (int64_t j = 0; j < n; j++) dw[j] = dw[j] * scale;
    if (c->score == MOE_SCORE_SIGMOID) {
        for (int64_t j = 0; j < n; j++)
            if (ids[j] >= 0) dh[ids[j]] = r_fma(dw[j], u[j] * (R(1.0) - u[j]), dh[ids[j]]);
        return;
    }
    real dot = lane_dot(dw, u, n);
    softmax(p, h, c->num_experts);
    for (int64_t i = 0; i < c->num_experts; i++) dh[i] = r_fma(-dot, p[i], dh[i]);
    for (int64_t j = 0; j < n; j++)
        if (ids[j] >= 0) dh[ids[j]] = r_fma(dw[j], u[j], dh[ids[j]]);
}

/* H = clean + noise sd, sd = softplus(raw) + eps:
 * d_clean += dH;  d_raw = (dH noise + d_sd) sigmoid(raw). */
static void noise_backward(const moe__route_job *route, int64_t t, real *d_clean,
                           const real *d_noisy, real *d_std)
{
    int64_t E = route->config->num_experts;
    for (int64_t i = 0; i < E; i++) d_clean[i] = d_clean[i] + d_noisy[i];
    if (!route->noise) return;
    const real *noise = (const real *)route->noise + t * E;
    const real *raw = (const real *)route->noise_raw + t * E;
    for (int64_t i = 0; i < E; i++)
        d_std[i] = r_fma(d_noisy[i], noise[i], d_std[i]) * r_sigmoid(raw[i]);
}

/* One token: d_logits[t,:] and d_noise_raw[t,:]. */
static void gate_backward_row(const moe__gate_backward_job *job, int64_t t)
{
    const moe__route_job *route = job->losses->route;
    const moe_gate_config *c = route->config;
    int64_t E = c->num_experts, first = route->token_begin[t];
    int64_t n = route->token_begin[t + 1] - first;
    const int32_t *ids = route->expert_of_entry + first;
    const real *h = (const real *)route->noisy + t * E;
    real *dw = (real *)job->d_weight + first, *scores = (real *)job->scores + first;
    real *d_clean = (real *)job->d_logits + t * E, *d_noisy = (real *)job->d_noisy + t * E;
    real *d_std = route->noise ? (real *)job->d_noise_raw + t * E : NULL;
    real *p = (real *)job->losses->columns + t * E;

    for (int64_t i = 0; i < E; i++) d_clean[i] = R(0.0), d_noisy[i] = R(0.0);
    for (int64_t i = 0; d_std && i < E; i++) d_std[i] = R(0.0);
    for (int64_t j = 0; j < n; j++) dw[j] = R(0.0);
    if (is_masked(route->token_mask, t)) return;
    drop_backward(job, first, n, dw);
    MOE_KERNEL(losses_backward_row)(job, t, d_clean, d_noisy, d_std, p);
    if (selects_then_scores(c))
        chosen_backward(c, dw, scores, ids, n, h, d_noisy);
    else
        scored_backward(c, dw, scores, ids, n, h, d_noisy, p);
    noise_backward(route, t, d_clean, d_noisy, d_std);
}

static void gate_backward_range(void *argument, int64_t begin, int64_t end)
{
    const moe__gate_backward_job *job = argument;
    int64_t E = job->losses->route->config->num_experts;
    for (int64_t t = begin; t < end; t++) {
        gate_backward_row(job, t);
        if (!job->d_logits_out) continue;
        const real *from = (const real *)job->d_logits + t * E;
        real *to = (real *)job->d_logits_out + t * job->d_logits_stride;
        for (int64_t i = 0; i < E; i++) to[i] = from[i];
    }
}

/* dx[T,D] (=|+=) g[T,E] w^T */
static moe_status input_gradient(const moe__gate_backward_job *job, const void *g,
                                 const moe__matrices *w, int32_t add)
{
    const moe__route_job *route = job->losses->route;
    int64_t rows[2] = {0, route->tokens}, E = route->config->num_experts;
    moe__gemm_rows_job gemm = {.experts = 1,
                               .expert_begin = rows,
                               .k = E,
                               .n = route->input_width,
                               .a = {g, E, NULL, NULL},
                               .b = *w,
                               .out = job->dx,
                               .out_stride = job->dx_stride,
                               .out_add = add,
                               .tile_begin = route->tile_begin};
    gemm.b.stride_row = w->stride_col;
    gemm.b.stride_col = w->stride_row;
    return run_gemm_rows(&route->workers, &gemm);
}

/* dw[D,E] (=|+=) x^T g, group by group over the tokens that are not masked. */
static moe_status parameter_gradient(const moe__gate_backward_job *job, const void *g,
                                     const moe__matrices *dw, const moe__matrices *dbias)
{
    const moe__route_job *route = job->losses->route;
    int64_t E = route->config->num_experts;
    if (!has(dw) && !has(dbias)) return MOE_OK;
    moe__gemm_dw_job gemm = {.experts = 1,
                             .segment_begin = job->losses->valid_begin,
                             .segments_per_expert = job->losses->plan->groups,
                             .k = route->input_width,
                             .n = E,
                             .a = {route->x, route->x_stride, job->losses->valid_token, NULL},
                             .g = {g, E, job->losses->valid_token, NULL},
                             .dw = *dw,
                             .dbias = *dbias,
                             .tile_begin = route->tile_begin};
    return run_gemm_dw(&route->workers, &gemm);
}

static void zero_dx_range(void *argument, int64_t begin, int64_t end)
{
    const moe__gate_backward_job *job = argument;
    for (int64_t t = begin; t < end; t++) {
        real *dx = (real *)job->dx + t * job->dx_stride;
        for (int64_t j = 0; j < job->losses->route->input_width; j++) dx[j] = R(0.0);
    }
}

moe_status MOE_KERNEL(gate_backward)(moe__gate_backward_job *job)
{
    const moe__route_job *route = job->losses->route;
    const moe__workers *w = &route->workers;
    const moe__matrices none = {0};
    int32_t through_weight = !job->logits_from_host;
    MOE_KERNEL(losses_backward_prepare)(job);
    MOE_TRY(
        moe__parallel_range(w->context, route->tokens, 16, gate_backward_range, job, w->function));
    if (job->dx) {
        int32_t add = job->dx_add;
        if (through_weight) {
            MOE_TRY(input_gradient(job, job->d_logits, &route->weight_matrix, add));
            add = 1;
        }
        if (route->noise) {
            MOE_TRY(input_gradient(job, job->d_noise_raw, &route->noise_weight, add));
            add = 1;
        }
        if (!add)
            MOE_TRY(moe__parallel_range(w->context, route->tokens, 64, zero_dx_range, job,
                                        w->function));
    }
    if (through_weight)
        MOE_TRY(parameter_gradient(job, job->d_logits, &job->d_weight_matrix, &job->d_bias));
    if (route->noise)
        MOE_TRY(parameter_gradient(job, job->d_noise_raw, &job->d_noise_weight, &none));
    return MOE_OK;
}
