/* route.cu - from tokens to experts and weights, as src/cpu/route.c.
 *
 *     x' = x u,  u uniform in (1 - r, 1 + r)           the input jitter, in training
 *     clean = x' Wg (+ bias)                           [T,E]
 *     sd = softplus(x' Wnoise) + eps,  H = clean + noise * sd      in training; else H = clean
 *     ids by choose.cu, weights by weigh.h
 *
 * A hierarchical gate does this twice: for the tokens among groups, then for the rows of that
 * routing among the experts of their group; the weights are the products. How many rows the second
 * level has is known on the device alone: its launches are for level[1].rows, a bound. The backward
 * is in gate_backward.cu. */
#include "route.h"
#include "router_gemm.h"
#include "select.h"
#include "weigh.h"

/* ---- the input ------------------------------------------------------------------------------- */

/* out[T,D] = in u, floats; a thread for four columns. */
template <typename T>
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_route_jitter(const T *in, int64_t in_stride, float *out, int64_t tokens, int64_t D,
                 moe_jitter how)
{
    int64_t quads = (D + 3) / 4, t = moe_thread() / quads, first = moe_thread() % quads * 4;
    float factor[4];
    if (t >= tokens) return;
    moe_jitter4(&how, t, first, factor);
    for (int j = 0; j < 4; j++)
        if (first + j < D)
            out[t * D + first + j] = moe_element(in, moe_dtype_of<T>::value,
                                                 t * in_stride + first + j) *
                                     factor[j];
}

/* ---- logits ---------------------------------------------------------------------------------- */

MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_route_copy_logits(const float *in, int64_t in_stride, float *out, int64_t tokens, int64_t E)
{
    int64_t i = moe_thread();
    if (i < tokens * E) out[i] = in[i / E * in_stride + i % E];
}

/* What a level draws its noise by. */
struct moe_noise {
    uint64_t seed;
    uint32_t stream, step;
    int64_t token_first;
    const float *in; /* the host's numbers, or NULL */
    int64_t in_stride;
    float epsilon;
    int32_t reserved;
};

/* Noise, sd and H; a thread for the candidates of a row in one block of the counter, the candidates
 * of all parts numbered one after another. */
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_route_noise(moe_level l, moe_noise how, int64_t blocks)
{
    int64_t row = moe_thread() / blocks;
    if (row >= moe_rows_of(&l)) return;
    int64_t t = moe_token_of(&l, row), first = moe_part_of(&l, row) * l.width;
    int64_t block = first / 4 + moe_thread() % blocks;
    uint32_t counter[4], bits[4];
    float four[4];
    if (!how.in) {
        moe__counter(counter, how.stream, how.step, (uint32_t)(how.token_first + t),
                     (uint32_t)block);
        moe__philox(how.seed, counter, bits);
        moe__normal4(bits, four);
    }
    for (int j = 0; j < 4; j++) {
        int64_t i = block * 4 + j - first, at = row * l.width + i;
        if (i < 0 || i >= l.width) continue;
        float noise = how.in ? how.in[t * how.in_stride + first + i] : four[j];
        float sd = moe__softplus_f32(l.noise_raw[at]) + how.epsilon;
        l.noise[at] = noise;
        l.noise_std[at] = sd;
        l.noisy[at] = moe__fma_f32(noise, sd, l.logits[at]);
    }
}

/* out[rows,width] = x w (+ bias), each row with its part's. */
template <typename T>
static moe_status level_product(const moe__route_job *job, const moe__gate_level *level,
                                const moe__matrices *w, const moe__matrices *bias, void *out)
{
    moe_rows_product product = {};
    product.ranges = {level->rows, level->parts, level->part_begin, 1};
    product.k = job->input_width;
    product.n = level->width;
    product.a = moe_gate_input<T>(job, level->token_of_row);
    product.b = *w;
    if (bias) product.bias = *bias;
    product.out = out;
    product.out_stride = level->width;
    product.out_dtype = MOE_DTYPE_F32;
    return moe__cuda_rows_product(&job->workers, &product);
}

/* Clean logits and raw noise of a level. */
template <typename T>
static moe_status level_logits(const moe__route_job *job, const moe__gate_level *level)
{
    if (!level->logits) return MOE_OK;
    if (job->logits_in)
        MOE_TRY(moe_over_items(&job->workers, "moe_route_copy_logits", moe_route_copy_logits,
                               job->tokens * level->width, (const float *)job->logits_in,
                               job->logits_stride, (float *)level->logits, job->tokens,
                               level->width));
    else
        MOE_TRY(level_product<T>(job, level, &level->weight_matrix, &level->bias, level->logits));
    return level->noise ? level_product<T>(job, level, &level->noise_weight, NULL, level->noise_raw)
                        : MOE_OK;
}

static moe_status add_noise(const moe__route_job *job, const moe__gate_level *level)
{
    moe_noise how = {job->config->seed,
                     level->noise_stream,
                     (uint32_t)job->step,
                     job->token_first,
                     (const float *)level->noise_in,
                     level->noise_stride,
                     (float)job->config->noise_epsilon,
                     0};
    int64_t blocks = (level->width + 3) / 4 + (level->parts > 1 && level->width % 4 != 0);
    if (!level->noise) return MOE_OK;
    return moe_over_items(&job->workers, "moe_route_noise", moe_route_noise, level->rows * blocks,
                          moe_level_of(job, level), how, blocks);
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* kth[0]: the last of the chosen candidates; kth[1]: the first of the others. -1: there is none. */
MOE_DEVICE void find_thresholds(int32_t kth[2], const int32_t *ids, int64_t n, const float *h,
                                int64_t width)
{
    uint64_t worst = MOE_NO_KEY, best = MOE_NO_KEY; /* worst: of the keys' complements */
    for (int64_t j = moe_lane(); j < n; j += MOE_WARP) {
        if (ids[j] < 0) continue;
        uint64_t key = ~moe_order_key(h[ids[j]], ids[j]);
        if (key < worst) worst = key;
    }
    for (int64_t i = moe_lane(); i < width; i += MOE_WARP) {
        uint64_t key = moe_order_key(h[i], i);
        if (key >= best) continue;
        bool chosen = false;
        for (int64_t j = 0; j < n && !chosen; j++) chosen = ids[j] == i;
        if (!chosen) best = key;
    }
    worst = moe_warp_least(worst);
    best = moe_warp_least(best);
    if (moe_lane() != 0) return;
    kth[0] = worst == MOE_NO_KEY ? -1 : (int32_t)(uint32_t)~worst;
    kth[1] = best == MOE_NO_KEY ? -1 : (int32_t)(uint32_t)best;
}

/* Weights of the ids that were chosen, and thresholds; a warp for each row. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_route_weigh(moe_level l, moe_weighing how)
{
    int64_t row = moe_warp();
    if (row >= moe_rows_of(&l)) return;
    int64_t first = l.entry_begin[row], n = l.entry_begin[row + 1] - first;
    int32_t *ids = l.choice + first;
    float *w = l.weight + first;
    const float *h = l.noisy ? l.noisy + row * l.width : NULL;
    if (moe_is_masked(l.token_mask, moe_token_of(&l, row))) {
        for (int64_t j = moe_lane(); j < n; j += MOE_WARP) ids[j] = -1, w[j] = 0.0f;
        return;
    }
    moe_weigh(&how, w, ids, n, h, l.width);
    if (l.kth) find_thresholds(l.kth + 2 * row, ids, n, h, l.width);
}

/* The largest score over all experts, 0 for masked tokens; a warp for each token. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_route_priority(moe_level l, int32_t score, float *priority)
{
    int64_t row = moe_warp();
    uint64_t best = MOE_NO_KEY;
    float max = 0.0f, sum = 1.0f;
    if (row >= l.rows) return;
    const float *clean = l.logits + row * l.width;
    for (int64_t i = moe_lane(); i < l.width; i += MOE_WARP) {
        uint64_t key = moe_order_key(clean[i], i);
        best = key < best ? key : best;
    }
    float first = clean[(uint32_t)moe_warp_least(best)];
    if (score != MOE_SCORE_SIGMOID) sum = moe_shifted_sum(clean, l.width, &max);
    if (moe_lane() != 0) return;
    bool masked = moe_is_masked(l.token_mask, row);
    float value = score == MOE_SCORE_SIGMOID ? moe__sigmoid_f32(first)
                                             : moe__exp_f32(first - max) / sum;
    priority[row] = masked ? 0.0f : value;
}

static moe_status route_rows(const moe__route_job *job, const moe__gate_level *level)
{
    const moe__workers *w = &job->workers;
    moe_level l = moe_level_of(job, level);
    MOE_TRY(moe__cuda_choose_rows(job, level));
    MOE_TRY(
        moe_over_rows(w, "moe_route_weigh", moe_route_weigh, level->rows, l, moe_weighing_of(job)));
    if (!job->token_priority || level != &job->level[0]) return MOE_OK;
    return moe_over_rows(w, "moe_route_priority", moe_route_priority, level->rows, l,
                         job->config->score, (float *)job->token_priority);
}

/* ---- two levels ------------------------------------------------------------------------------ */

/* The arrays of the two routings. */
struct moe_two_levels {
    int64_t entries, top_groups, K,
        width;                 /* of the primary plan; K and width of the second level */
    const float *group_weight; /* [entries] before dropping */
    int32_t *group_choice;     /* [entries] */
    int32_t *group;            /* [entries] of the primary plan */
    float *weight_of_group;    /* [entries] of the primary plan */
    const int64_t *row_of_entry, *entry_of_row, *rows;
    int32_t *choice;     /* [rows,K] */
    const float *second; /* [rows,K] */
    int32_t *experts;    /* [entries,K] of the plan */
    float *weight;       /* [entries,K] */
    const uint8_t *token_mask;
    int32_t given;
    float scale;
};

static moe_two_levels two_levels_of(const moe__route_job *job)
{
    const moe__plan_arrays *p = job->primary;
    const moe__gate_level *first = &job->level[0], *second = &job->level[1];
    moe_two_levels l = {p->entries,
                        first->top_k,
                        second->top_k,
                        second->width,
                        (const float *)first->weight,
                        first->choice,
                        p->expert_of_entry,
                        (float *)p->weight_of_entry,
                        p->row_of_entry,
                        p->entry_of_row,
                        p->expert_begin + p->num_experts,
                        second->choice,
                        (const float *)second->weight,
                        job->expert_of_entry,
                        (float *)job->weight,
                        job->token_mask,
                        job->choose == MOE__CHOOSE_GIVEN,
                        (float)job->config->route_scale};
    return l;
}

/* The groups of a replayed routing: that of the first expert of each run of K entries. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_route_given_groups(moe_two_levels l)
{
    int64_t n = moe_thread();
    int32_t group = -1;
    if (n >= l.entries) return;
    for (int64_t j = (n + 1) * l.K - 1; j >= n * l.K; j--)
        if (l.experts[j] >= 0) group = (int32_t)(l.experts[j] / l.width);
    l.group_choice[n] = group;
}

/* The entries of the first level whose weight is not 0 ask for a row. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_route_ask_rows(moe_two_levels l)
{
    int64_t n = moe_thread();
    if (n >= l.entries) return;
    l.group[n] = l.group_weight[n] == 0.0f ? -1 : l.group_choice[n];
    l.weight_of_group[n] = l.group_weight[n];
}

/* The second level's choices of a replayed routing. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_route_given_experts(moe_two_levels l)
{
    int64_t r = moe_thread() / l.K, j = moe_thread() % l.K;
    if (r >= *l.rows) return;
    int32_t e = l.experts[l.entry_of_row[r] * l.K + j];
    l.choice[r * l.K + j] = e < 0 ? -1 : (int32_t)(e % l.width);
}

/* The plan's entries: experts by their number among all, weights Gp Gs. Those of a replay stay
 * where they are, with weight 0 if the group's has vanished. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_route_combine_levels(moe_two_levels l)
{
    int64_t n = moe_thread() / l.K, j = moe_thread() % l.K;
    if (n >= l.entries) return;
    int64_t r = l.row_of_entry[n];
    bool masked = moe_is_masked(l.token_mask, n / l.top_groups);
    int32_t local = r < 0 ? -1 : l.choice[r * l.K + j];
    float by_group = l.weight_of_group[n] * l.scale;
    l.weight[n * l.K + j] = local < 0 ? 0.0f : by_group * l.second[r * l.K + j];
    if (l.given && !masked) return;
    l.experts[n * l.K + j] = local < 0 ? -1 : (int32_t)(l.group[n] * l.width + local);
}

/* The rows of the second level, by group. */
static moe_status start_second_level(moe__route_job *job)
{
    const moe__workers *w = &job->workers;
    moe__plan_arrays *p = job->primary;
    moe__plan_rows_job rows = {};
    MOE_TRY(moe_over_items(w, "moe_route_ask_rows", moe_route_ask_rows, p->entries,
                           two_levels_of(job)));
    rows.workers = *w;
    rows.plan = p;
    rows.token_mask = job->token_mask;
    MOE_TRY(moe__cuda_plan_rows(&rows));
    if (job->choose != MOE__CHOOSE_GIVEN) return MOE_OK;
    return moe_over_items(w, "moe_route_given_experts", moe_route_given_experts,
                          job->level[1].rows * job->level[1].top_k, two_levels_of(job));
}

template <typename T> static moe_status route_two_levels(moe__route_job *job)
{
    const moe__workers *w = &job->workers;
    int64_t entries = job->primary->entries, K = job->level[1].top_k;
    if (job->choose == MOE__CHOOSE_GIVEN)
        MOE_TRY(moe_over_items(w, "moe_route_given_groups", moe_route_given_groups, entries,
                               two_levels_of(job)));
    MOE_TRY(route_rows(job, &job->level[0]));
    MOE_TRY(start_second_level(job));
    MOE_TRY(job->second ? job->second(job) : level_logits<T>(job, &job->level[1]));
    MOE_TRY(add_noise(job, &job->level[1]));
    MOE_TRY(route_rows(job, &job->level[1]));
    return moe_over_items(w, "moe_route_combine_levels", moe_route_combine_levels, entries * K,
                          two_levels_of(job));
}

/* ---- the step -------------------------------------------------------------------------------- */

/* Jitter, logits and noise of the first level. */
template <typename T> static moe_status first_logits(const moe__route_job *job)
{
    int64_t D = job->input_width;
    if (job->x_jittered)
        MOE_TRY(moe_over_items(&job->workers, "moe_route_jitter", moe_route_jitter<T>,
                               job->tokens * ((D + 3) / 4), (const T *)job->x, job->x_stride,
                               (float *)job->x_jittered, job->tokens, D, moe_jitter_of(job)));
    MOE_TRY(level_logits<T>(job, &job->level[0]));
    return add_noise(job, &job->level[0]);
}

template <typename T> static moe_status route_forward(moe__route_job *job)
{
    MOE_TRY(first_logits<T>(job));
    if (job->levels == 2) return route_two_levels<T>(job);
    if (job->choose == MOE__CHOOSE_BY_EXPERT) MOE_TRY(moe__cuda_choose_by_expert(job));
    if (job->choose == MOE__CHOOSE_THRESHOLD) MOE_TRY(moe__cuda_choose_above(job));
    if (job->column_factor) MOE_TRY(moe__cuda_sinkhorn(job));
    return route_rows(job, &job->level[0]);
}

template <typename T> static moe_status route_count(moe__route_job *job, int64_t *entries)
{
    *entries = 0;
    if (job->tokens == 0) return MOE_OK;
    MOE_TRY(first_logits<T>(job));
    MOE_TRY(moe__cuda_count_above(job));
    return moe__cuda_fetch(&job->workers, entries, job->token_begin + job->tokens, sizeof *entries);
}

int64_t moe__cuda_route_scratch(const moe__pass_shape *shape)
{
    (void)shape; /* what it calls has its own */
    return 0;
}

MOE_CUDA_SLOT(route_forward, moe__route_job *)
extern "C" moe_status moe__cuda_route_count_f32(moe__route_job *job, int64_t *entries)
{
    return route_count<float>(job, entries);
}
extern "C" moe_status moe__cuda_route_count_bf16(moe__route_job *job, int64_t *entries)
{
    return route_count<moe_bf16>(job, entries);
}
extern "C" moe_status moe__cuda_route_count_f16(moe__route_job *job, int64_t *entries)
{
    return route_count<moe_f16>(job, entries);
}
