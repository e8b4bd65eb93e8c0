/* losses.cu - importance, load and the auxiliary losses, as src/cpu/losses.c; the gradients are in
 * losses_backward.cu.
 *
 *     importance_e = sum_t w_te            load_e of load.cu; for two levels, X_i the rows of
 *                                          group i:
 *                                          load_ij = load_i load(X_i)_j / |X_i|
 *     P = softmax(clean),  p_e = mean_t P_te,  n_e entries of expert e,  f_e first choices
 *     switch = E sum_e n_e/sum(n) p_e      gshard = E sum_e f_e/T p_e
 *     sequence = mean over groups of E sum_e n_ge/sum(n_g) mean_{t in g} s_te / sum_j s_tj
 *     z = mean_t lse(clean_t)^2            threshold = sum_te (above_te - taken_te) (P_te - thr_e)
 *
 * Sums over tokens are in double, of a number of partial sums that the shape alone decides, in
 * order; counts are whole numbers. What src/ reads as plain fields of the job is in job->sums. */
#include "losses.h"
#include "select.h"

/* Doubles of partial sums, and partial sums of a column, at most. */
#define PARTIAL_COLUMNS ((int64_t)1 << 18)
#define PARTIAL_IMPORTANCE ((int64_t)1 << 20)
#define MOST_CHUNKS 64
#define MOST_WARPS 256

moe_loss_arrays moe__cuda_losses_of(const moe__losses_job *job)
{
    const moe__route_job *route = job->route;
    const moe__plan_arrays *plan = job->plan;
    moe_loss_arrays l = {};
    l.T = plan->tokens, l.E = plan->num_experts, l.G = plan->groups;
    l.K = route->config->top_k;
    l.token_begin = plan->token_begin, l.group_begin = plan->group_begin;
    l.expert_begin = plan->expert_begin, l.valid_begin = job->valid_begin;
    l.token_mask = route->token_mask;
    l.ids = route->expert_of_entry, l.weight = (const float *)route->weight;
    l.has_logits = route->level[0].logits != NULL;
    l.two = route->levels == 2;
    l.logits = (const float *)route->level[0].logits;
    l.has_load = route->level[0].kth != NULL;
    l.scoped = job->scoped;
    l.sequence_score = route->config->sequence_score, l.ddof = route->config->cv_ddof;
    l.width = route->level[1].width;
    l.threshold = moe_vector_of(&route->threshold);
    l.importance = job->importance, l.load = job->load, l.primary_load = job->primary_load;
    l.part_load = job->part_load, l.part_rows = job->part_rows;
    l.counts = job->counts, l.first_counts = job->first_counts;
    l.scopes = job->scopes, l.score_sum = job->score_sum;
    l.scope_counts = job->scope_counts, l.scope_first = job->scope_first;
    l.sequence_sum = job->sequence_sum, l.sequence_scale = job->sequence_scale;
    l.sequence_counts = job->sequence_counts, l.over_taken = job->over_taken;
    l.rows_of_expert = job->rows_of_expert;
    l.value = job->value, l.stats = job->stats, l.sums = job->sums;
    l.columns = (float *)job->columns;
    l.token_value = job->token_value, l.plain_ids = job->plain_ids;
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) l.weights[i] = job->weights[i];
    return l;
}

/* ---- counts and importance ------------------------------------------------------------------- */

/* partial[i,e] = sum of the weights of expert e among the tokens of warp i; of 32 entries the first
 * thread with an expert adds for all that have it, in order. */
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_losses_importance(moe_loss_arrays l, int64_t warps, double *partial)
{
    int64_t warp = moe_warp();
    if (warp >= warps) return;
    partial += warp * l.E;
    for (int64_t e = moe_lane(); e < l.E; e += MOE_WARP) partial[e] = 0;
    moe_warp_sync();
    int64_t first = l.token_begin[l.T * warp / warps],
            last = l.token_begin[l.T * (warp + 1) / warps];
    for (; first < last; first += MOE_WARP) {
        int64_t n = first + moe_lane();
        int32_t e = n < last ? l.ids[n] : -1;
        if (e >= 0 && l.token_mask && !l.token_mask[moe_range_of(l.token_begin, l.T, n)]) e = -1;
        float w = e >= 0 ? l.weight[n] : 0.0f;
        double sum = 0;
        bool first_of_expert = true;
        for (int lane = 0; lane < MOE_WARP; lane++) {
            int32_t other = moe_shuffle(e, lane);
            float v = moe_shuffle(w, lane);
            if (other != e) continue;
            sum += (double)v;
            if (lane < moe_lane()) first_of_expert = false;
        }
        if (e >= 0 && first_of_expert) partial[e] += sum;
        moe_warp_sync();
    }
}

MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_losses_add_importance(moe_loss_arrays l, int64_t warps, const double *partial)
{
    int64_t e = moe_thread();
    double sum = 0;
    if (e >= l.E) return;
    for (int64_t i = 0; i < warps; i++) sum += partial[i * l.E + e];
    l.importance[e] = sum;
}

/* counts[G,E] or [E], and first (may be NULL), of the tokens; ids: the plan's, or `plain`. */
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_losses_count(moe_loss_arrays l, bool by_group, const int32_t *plain, int64_t *counts,
                 int64_t *first)
{
    int64_t t = moe_thread();
    if (t >= l.T || moe_is_masked(l.token_mask, t)) return;
    int64_t g = by_group ? moe_group_of(&l, t) : 0;
    const int32_t *ids = plain ? plain + t * l.K : l.ids + l.token_begin[t];
    int64_t n = plain ? l.K : l.token_begin[t + 1] - l.token_begin[t];
    if (first && n > 0 && ids[0] >= 0) (void)moe_atomic_add(first + g * l.E + ids[0], (int64_t)1);
    for (int64_t j = 0; j < n; j++)
        if (ids[j] >= 0) (void)moe_atomic_add(counts + g * l.E + ids[j], (int64_t)1);
}

static moe_status count(const moe__workers *w, const moe_loss_arrays *l, bool by_group,
                        const int32_t *plain, int64_t *counts, int64_t *first)
{
    size_t bytes = (size_t)((by_group ? l->G : 1) * l->E) * sizeof(int64_t);
    cudaStream_t stream = (cudaStream_t)w->stream;
    MOE_TRY(moe__cuda_status(cudaMemsetAsync(counts, 0, bytes, stream), w, "cudaMemsetAsync"));
    if (first)
        MOE_TRY(moe__cuda_status(cudaMemsetAsync(first, 0, bytes, stream), w, "cudaMemsetAsync"));
    return moe_over_items(w, "moe_losses_count", moe_losses_count, l->T, *l, by_group, plain,
                          counts, first);
}

static int64_t warps_of(int64_t T, int64_t E)
{
    int64_t warps = moe__min(MOST_WARPS, PARTIAL_IMPORTANCE / E);
    return moe__max(moe__min(warps, (T + MOE_WARP - 1) / MOE_WARP), 1);
}

/* What needs no logits: load = counts, rows of the experts, tokens, groups. One thread for each
 * expert, the first for the rest. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_losses_start(moe_loss_arrays l)
{
    int64_t e = moe_thread(), groups = 0;
    if (e < l.E) {
        l.load[e] = (double)l.counts[e];
        l.rows_of_expert[e] = l.expert_begin[e + 1] - l.expert_begin[e];
    }
    if (e != 0) return;
    for (int64_t g = 0; g < l.G; g++) groups += moe_valid_in_group(&l, g) > 0;
    for (int i = 0; i < MOE__SUM_SLOTS; i++) l.sums[i] = 0;
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) l.value[i] = 0;
    l.sums[MOE_SUM_TOKENS] = (double)l.valid_begin[l.G];
    l.sums[MOE_SUM_GROUPS] = (double)groups;
    l.sums[MOE_SUM_ROWS] = (double)l.expert_begin[l.E];
    l.sums[MOE_SUM_WITH_LOGITS] = l.has_logits;
}

static moe_status count_entries(const moe__workers *w, const moe_loss_arrays *l)
{
    int64_t warps = warps_of(l->T, l->E);
    double *partial = (double *)w->scratch;
    MOE_TRY(moe_over_rows(w, "moe_losses_importance", moe_losses_importance, warps, *l, warps,
                          partial));
    MOE_TRY(moe_over_items(w, "moe_losses_add_importance", moe_losses_add_importance, l->E, *l,
                           warps, (const double *)partial));
    MOE_TRY(count(w, l, false, NULL, l->counts, l->first_counts));
    return moe_over_items(w, "moe_losses_start", moe_losses_start, l->E, *l);
}

/* ---- sums over the columns of [rows,width] --------------------------------------------------- */

struct column_sums {
    const float *columns;
    int64_t width, rows;
    const int64_t *begin; /* of segments of rows; NULL: one, of all */
    int64_t segments, chunks;
    double *to; /* [segments,chunks,width] */
};

/* 32 columns by 8 rows of threads for each segment, chunk of its rows and 32 columns; each thread
 * has every 8th row of its column, then the 8 in order. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_losses_sum_columns(column_sums s)
{
    MOE_SHARED(double, shared, MOE_ROUTE_THREADS);
    int64_t blocks = (s.width + MOE_WARP - 1) / MOE_WARP, at = (int64_t)blockIdx.x / blocks;
    int64_t i = (int64_t)blockIdx.x % blocks * MOE_WARP + moe_lane();
    int64_t segment = at / s.chunks, chunk = at % s.chunks;
    int64_t begin = s.begin ? s.begin[segment] : 0;
    int64_t rows = (s.begin ? s.begin[segment + 1] : s.rows) - begin;
    int64_t end = begin + rows * (chunk + 1) / s.chunks;
    double sum = 0;
    begin += rows * chunk / s.chunks;
    for (int64_t r = begin + threadIdx.x / MOE_WARP; r < end && i < s.width; r += MOE_ROUTE_ROWS)
        sum += (double)s.columns[r * s.width + i];
    shared[threadIdx.x] = sum;
    moe_block_sync();
    if (threadIdx.x >= MOE_WARP || i >= s.width) return;
    for (int j = 1; j < MOE_ROUTE_ROWS; j++) sum += shared[j * MOE_WARP + (int)threadIdx.x];
    s.to[at * s.width + i] = sum;
}

MOE_GLOBAL(MOE_ROUTE_THREADS) moe_losses_add_chunks(column_sums s, double *sum)
{
    int64_t at = moe_thread(), segment = at / s.width, i = at % s.width;
    double total = 0;
    if (segment >= s.segments) return;
    for (int64_t c = 0; c < s.chunks; c++) total += s.to[(segment * s.chunks + c) * s.width + i];
    sum[at] = total;
}

moe_status moe__cuda_sum_columns(const moe__workers *workers, const float *columns, int64_t width,
                                 int64_t rows, const int64_t *begin, int64_t segments, double *sum)
{
    column_sums s = {columns, width, rows, begin, segments, 1, sum};
    int64_t chunks = moe__min(rows / segments / MOE_WARP, PARTIAL_COLUMNS / (segments * width));
    s.chunks = moe__max(moe__min(chunks, MOST_CHUNKS), 1);
    if (s.chunks > 1) s.to = (double *)workers->scratch;
    MOE_TRY(moe_over(workers, "moe_losses_sum_columns", moe_losses_sum_columns,
                     segments * s.chunks * ((width + MOE_WARP - 1) / MOE_WARP), 1, s));
    if (s.chunks == 1) return MOE_OK;
    return moe_over_items(workers, "moe_losses_add_chunks", moe_losses_add_chunks, segments * width,
                          s, sum);
}

MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_losses_sum_tokens(const double *token_value, int64_t T, double *sum)
{
    MOE_SHARED(double, shared, MOE_ROUTE_ROWS);
    double mine = 0;
    for (int64_t t = threadIdx.x; t < T; t += MOE_ROUTE_THREADS) mine += token_value[t];
    mine = moe_block_sum(mine, shared);
    if (threadIdx.x == 0) *sum = mine;
}

moe_status moe__cuda_sum_tokens(const moe__workers *workers, const double *token_value, int64_t T,
                                double *sum)
{
    return moe_over(workers, "moe_losses_sum_tokens", moe_losses_sum_tokens, 1, 1, token_value, T,
                    sum);
}

/* ---- what is summed, a warp for each token --------------------------------------------------- */

MOE_DEVICE bool clear_if_masked(const moe_loss_arrays *l, int64_t t, float *row)
{
    if (!moe_is_masked(l->token_mask, t)) return false;
    for (int64_t i = moe_lane(); i < l->E; i += MOE_WARP) row[i] = 0.0f;
    if (moe_lane() == 0) l->token_value[t] = 0;
    return true;
}

/* columns = P, token_value = lse^2 */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_losses_softmax(moe_loss_arrays l)
{
    int64_t t = moe_warp();
    if (t >= l.T) return;
    const float *clean = l.logits + t * l.E;
    float *row = l.columns + t * l.E, max;
    if (clear_if_masked(&l, t, row)) return;
    float sum = moe_shifted_sum(clean, l.E, &max);
    for (int64_t i = moe_lane(); i < l.E; i += MOE_WARP)
        row[i] = moe__exp_f32(clean[i] - max) / sum;
    double lse = (double)max + (double)moe__log_f32(sum);
    if (moe_lane() == 0) l.token_value[t] = lse * lse;
}

/* columns = s / sum(s); the plain ids: the K first logits. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_losses_sequence(moe_loss_arrays l)
{
    int64_t t = moe_warp();
    if (t >= l.T) return;
    const float *clean = l.logits + t * l.E;
    float *row = l.columns + t * l.E;
    if (clear_if_masked(&l, t, row)) return;
    (void)moe_normalized_scores(row, clean, l.E, l.sequence_score);
    moe_candidates all = {clean, NULL, 1, INT32_MAX, l.E};
    if (l.plain_ids) moe_select_warp(l.plain_ids + t * l.K, l.K, &all);
}

/* columns = P, token_value = sum_e (above - taken)(P - thr); taken: the entries of the token. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_losses_threshold(moe_loss_arrays l)
{
    int64_t t = moe_warp();
    if (t >= l.T) return;
    float *row = l.columns + t * l.E;
    double value = 0;
    if (clear_if_masked(&l, t, row)) return;
    moe_score_all(row, l.logits + t * l.E, l.E, MOE_SCORE_SOFTMAX);
    for (int64_t e = moe_lane(); e < l.E; e += MOE_WARP) {
        float threshold = moe_vector_at(&l.threshold, e);
        value += (double)(row[e] > threshold) * ((double)row[e] - (double)threshold);
    }
    moe_warp_sync();
    for (int64_t n = l.token_begin[t] + moe_lane(); n < l.token_begin[t + 1]; n += MOE_WARP)
        if (l.ids[n] >= 0)
            value -= (double)row[l.ids[n]] - (double)moe_vector_at(&l.threshold, l.ids[n]);
    value = moe_warp_sum(value);
    if (moe_lane() == 0) l.token_value[t] = value;
}

/* over_taken = entries less tokens above; a thread for each expert and 64 tokens. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_losses_over_taken(moe_loss_arrays l)
{
    int64_t e = moe_thread() % l.E, first = moe_thread() / l.E * 64, over = 0;
    if (first >= l.T && first > 0) return;
    float threshold = moe_vector_at(&l.threshold, e);
    for (int64_t t = first; t < first + 64 && t < l.T; t++)
        if (!moe_is_masked(l.token_mask, t)) over -= l.columns[t * l.E + e] > threshold;
    if (first == 0) over += l.counts[e];
    (void)moe_atomic_add(l.over_taken + e, over);
}

MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_losses_part_rows(const int64_t *begin, int64_t parts, double *rows)
{
    int64_t i = moe_thread();
    if (i < parts) rows[i] = (double)(begin[i + 1] - begin[i]);
}

/* ---- sums ------------------------------------------------------------------------------------ */

static bool has_softmax_losses(const moe_loss_arrays *l)
{
    return l->weights[MOE_LOSS_SWITCH] != 0 || l->weights[MOE_LOSS_GSHARD] != 0 ||
           l->weights[MOE_LOSS_Z] != 0;
}

static moe_status softmax_sums(const moe__workers *w, const moe_loss_arrays *l)
{
    MOE_TRY(moe_over_rows(w, "moe_losses_softmax", moe_losses_softmax, l->T, *l));
    MOE_TRY(moe__cuda_sum_columns(w, l->columns, l->E, l->T, l->scoped ? l->group_begin : NULL,
                                  l->scopes, l->score_sum));
    if (l->scoped) MOE_TRY(count(w, l, true, NULL, l->scope_counts, l->scope_first));
    return moe__cuda_sum_tokens(w, l->token_value, l->T, l->sums + MOE_SUM_Z);
}

static moe_status sequence_sums(const moe__workers *w, const moe_loss_arrays *l)
{
    MOE_TRY(moe_over_rows(w, "moe_losses_sequence", moe_losses_sequence, l->T, *l));
    MOE_TRY(
        moe__cuda_sum_columns(w, l->columns, l->E, l->T, l->group_begin, l->G, l->sequence_sum));
    return count(w, l, true, l->plain_ids, l->sequence_counts, NULL);
}

static moe_status threshold_sums(const moe__workers *w, const moe_loss_arrays *l)
{
    MOE_TRY(moe_over_rows(w, "moe_losses_threshold", moe_losses_threshold, l->T, *l));
    MOE_TRY(moe__cuda_sum_tokens(w, l->token_value, l->T, l->sums + MOE_SUM_THRESHOLD));
    MOE_TRY(moe__cuda_status(
        cudaMemsetAsync(l->over_taken, 0, (size_t)l->E * sizeof(int64_t), (cudaStream_t)w->stream),
        w, "cudaMemsetAsync"));
    return moe_over_items(w, "moe_losses_over_taken", moe_losses_over_taken,
                          l->E * moe__max((l->T + 63) / 64, 1), *l);
}

/* Load of the levels. */
static moe_status load_sums(const moe__losses_job *job)
{
    const moe__workers *w = &job->route->workers;
    const moe__gate_level *first = &job->route->level[0], *second = &job->route->level[1];
    if (!first->kth) return MOE_OK;
    if (job->route->levels == 1) return moe__cuda_level_load(job, first, job->load);
    MOE_TRY(moe__cuda_level_load(job, first, job->primary_load));
    MOE_TRY(moe_over_items(w, "moe_losses_part_rows", moe_losses_part_rows, second->parts,
                           second->part_begin, second->parts, job->part_rows));
    return moe__cuda_level_load(job, second, job->part_load);
}

/* ---- the losses ------------------------------------------------------------------------------ */

MOE_DEVICE void softmax_losses(const moe_loss_arrays *l, double value[MOE_LOSS_SLOTS],
                               double *shared)
{
    double tokens = l->sums[MOE_SUM_TOKENS];
    for (int64_t s = 0; s < l->scopes; s++) {
        const double *sum = l->score_sum + s * l->E;
        double by_switch = moe_switch_scale(l, s, shared), by_gshard = moe_gshard_scale(l, s);
        value[MOE_LOSS_SWITCH] += by_switch *
                                  moe_weighted_sum(l->scope_counts + s * l->E, sum, l->E, shared);
        value[MOE_LOSS_GSHARD] += by_gshard *
                                  moe_weighted_sum(l->scope_first + s * l->E, sum, l->E, shared);
    }
    if (tokens > 0) value[MOE_LOSS_Z] = l->sums[MOE_SUM_Z] / tokens;
}

/* sequence_scale_g = E / (sum(n_g) T_g groups): what n_ge sum_t s_te/sum(s_t) is multiplied by. 0
 * for an empty group. */
MOE_DEVICE double sequence_loss(const moe_loss_arrays *l, double *shared)
{
    double loss = 0, groups = l->sums[MOE_SUM_GROUPS];
    for (int64_t g = 0; g < l->G; g++) {
        const int64_t *counts = l->sequence_counts + g * l->E;
        double entries = moe_sum_counts(counts, l->E, shared);
        double tokens = (double)moe_valid_in_group(l, g);
        bool empty = entries <= 0 || tokens <= 0;
        double scale = empty ? 0 : (double)l->E / entries / tokens / groups;
        if (threadIdx.x == 0) l->sequence_scale[g] = scale;
        loss += scale * moe_weighted_sum(counts, l->sequence_sum + g * l->E, l->E, shared);
    }
    return loss;
}

/* The losses that are formed group by group: this rank's, not weighted, in value[]; one block. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_losses_by_group(moe_loss_arrays l)
{
    MOE_SHARED(double, shared, MOE_ROUTE_ROWS);
    double value[MOE_LOSS_SLOTS] = {0};
    if (l.scoped) softmax_losses(&l, value, shared);
    if (l.weights[MOE_LOSS_SEQUENCE] != 0) value[MOE_LOSS_SEQUENCE] = sequence_loss(&l, shared);
    if (threadIdx.x != 0) return;
    for (int i = 0; i < MOE_LOSS_SLOTS; i++) l.value[i] = value[i];
}

/* value[] of the sums, and load_ij = load_i load(X_i)_j / |X_i|; one block. by_group: those of
 * moe_losses_by_group are there, of all ranks. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_losses_finish(moe_loss_arrays l, bool by_group)
{
    MOE_SHARED(double, shared, MOE_ROUTE_ROWS);
    double value[MOE_LOSS_SLOTS] = {0};
    for (int64_t e = threadIdx.x; e < l.E && l.has_load && l.two; e += MOE_ROUTE_THREADS) {
        double rows = l.part_rows[e / l.width], first = l.primary_load[e / l.width];
        l.load[e] = rows == 0 ? 0 : first * l.part_load[e] / rows;
    }
    if (!(l.sums[MOE_SUM_WITH_LOGITS] > 0)) {
        for (int i = threadIdx.x; i < MOE_LOSS_SLOTS; i += MOE_ROUTE_THREADS) l.value[i] = 0;
        return;
    }
    if (l.weights[MOE_LOSS_SWITCH] != 0 || l.weights[MOE_LOSS_GSHARD] != 0 ||
        l.weights[MOE_LOSS_Z] != 0)
        softmax_losses(&l, value, shared);
    if (by_group && l.scoped) value[MOE_LOSS_SWITCH] = l.value[MOE_LOSS_SWITCH];
    if (by_group && l.scoped) value[MOE_LOSS_GSHARD] = l.value[MOE_LOSS_GSHARD];
    if (by_group)
        value[MOE_LOSS_SEQUENCE] = l.value[MOE_LOSS_SEQUENCE];
    else if (l.weights[MOE_LOSS_SEQUENCE] != 0)
        value[MOE_LOSS_SEQUENCE] = sequence_loss(&l, shared);
    value[MOE_LOSS_THRESHOLD] = l.sums[MOE_SUM_THRESHOLD];
    value[MOE_LOSS_IMPORTANCE] = moe_cv_of(l.importance, l.E, l.ddof, shared).value;
    if (l.has_load) value[MOE_LOSS_LOAD] = moe_cv_of(l.load, l.E, l.ddof, shared).value;
    if (threadIdx.x != 0) return;
    for (int i = 0; i < MOE_LOSS_SLOTS; i++)
        l.value[i] = l.weights[i] != 0 ? l.weights[i] * value[i] : 0;
}

/* Of a call without logits, whose tokens are in none of these sums: other ranks may have them. */
static moe_status no_score_sums(const moe__workers *w, const moe_loss_arrays *l)
{
    cudaStream_t stream = (cudaStream_t)w->stream;
    size_t by_scope = (size_t)(l->scopes * l->E), by_group = (size_t)(l->G * l->E);
    cudaError_t error = cudaSuccess;
    if (l->score_sum)
        error = cudaMemsetAsync(l->score_sum, 0, by_scope * sizeof *l->score_sum, stream);
    if (error == cudaSuccess && l->sequence_sum)
        error = cudaMemsetAsync(l->sequence_sum, 0, by_group * sizeof *l->sequence_sum, stream);
    if (error == cudaSuccess && l->sequence_sum)
        error = cudaMemsetAsync(l->sequence_counts, 0, by_group * sizeof(int64_t), stream);
    MOE_TRY(moe__cuda_status(error, w, "cudaMemsetAsync"));
    return l->score_sum && l->scoped ? count(w, l, true, NULL, l->scope_counts, l->scope_first)
                                     : MOE_OK;
}

/* Sums of all ranks instead of this one's; `by_group` if the losses by group are too. */
static moe_status share(moe__losses_job *job, const moe_loss_arrays *l, bool *by_group)
{
    const moe__workers *w = &job->route->workers;
    MOE_TRY(job->share(job, false));
    *by_group = l->scoped || l->weights[MOE_LOSS_SEQUENCE] != 0;
    if (*by_group) MOE_TRY(moe_over(w, "moe_losses_by_group", moe_losses_by_group, 1, 1, *l));
    return *by_group || job->share_both ? job->share(job, true) : MOE_OK;
}

template <typename T> static moe_status losses_forward(moe__losses_job *job)
{
    const moe__workers *w = &job->route->workers;
    moe_loss_arrays l = moe__cuda_losses_of(job);
    bool by_group = false;
    MOE_TRY(count_entries(w, &l));
    if (job->share && !l.has_logits) MOE_TRY(no_score_sums(w, &l));
    if (l.has_logits) {
        if (has_softmax_losses(&l)) MOE_TRY(softmax_sums(w, &l));
        if (l.weights[MOE_LOSS_SEQUENCE] != 0) MOE_TRY(sequence_sums(w, &l));
        if (l.weights[MOE_LOSS_THRESHOLD] != 0 && l.over_taken) MOE_TRY(threshold_sums(w, &l));
        MOE_TRY(load_sums(job));
    }
    MOE_TRY(moe__cuda_sum_entropy(job, &l));
    if (job->share) MOE_TRY(share(job, &l, &by_group));
    MOE_TRY(moe_over(w, "moe_losses_finish", moe_losses_finish, 1, 1, l, by_group));
    return moe__cuda_statistics(job, &l);
}

/* The larger of the two kinds of partial sums. */
int64_t moe__cuda_losses_scratch(const moe__pass_shape *shape)
{
    if (!shape || !shape->gate) return 0;
    int64_t E = shape->num_experts, importance = moe__mul(warps_of(INT64_MAX - MOE_WARP, E), E);
    importance = moe__mul(importance, (int64_t)sizeof(double));
    return importance < 0 ? -1 : moe__max(importance, PARTIAL_COLUMNS * (int64_t)sizeof(double));
}

MOE_CUDA_SLOT(losses_forward, moe__losses_job *)
