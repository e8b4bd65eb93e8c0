/* take.cu - choices in which the entries of a token vary: those of experts that take tokens, and
 * those above a threshold. As the second half of src/cpu/choose.c.
 *
 *     by expert      each expert's first C tokens of each group by score; entries of a token in
 *                    order of expert, the slot is the rank in the expert's order
 *     above          the experts with score > threshold, in order
 *
 * Both count the entries of each token, sum the counts to token_begin, and list. */
#include "route.h"
#include "select.h"
#include "weigh.h"

#define SCAN_ITEMS 8 /* of a thread at a time */
#define TAKE_TOKENS 32

/* ---- token_begin ----------------------------------------------------------------------------- */

/* counts[0..n) become their sums before each; counts[n] the sum of all. One block. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_take_scan(int64_t *counts, int64_t n)
{
    MOE_SHARED(int64_t, warps, MOE_ROUTE_ROWS);
    int64_t total = 0;
    for (int64_t first = 0; first < n; first += MOE_ROUTE_THREADS * SCAN_ITEMS) {
        int64_t mine = first + (int64_t)threadIdx.x * SCAN_ITEMS, sum = 0, end;
        for (int i = 0; i < SCAN_ITEMS; i++) sum += mine + i < n ? counts[mine + i] : 0;
        end = sum;
        for (int by = 1; by < MOE_WARP; by *= 2) {
            int64_t before = moe_shuffle_up(end, by);
            if (moe_lane() >= by) end += before;
        }
        if (moe_lane() == MOE_WARP - 1) warps[threadIdx.x / MOE_WARP] = end;
        moe_block_sync();
        int64_t begin = total + end - sum;
        for (int w = 0; w < MOE_ROUTE_ROWS; w++) {
            begin += w < (int)(threadIdx.x / MOE_WARP) ? warps[w] : 0;
            total += warps[w];
        }
        for (int i = 0; i < SCAN_ITEMS && mine + i < n; i++) {
            int64_t count = counts[mine + i];
            counts[mine + i] = begin;
            begin += count;
        }
        moe_block_sync();
    }
    if (threadIdx.x == 0) counts[n] = total;
}

static moe_status scan(const moe__workers *workers, int64_t *counts, int64_t n)
{
    return moe_over(workers, "moe_take_scan", moe_take_scan, 1, 1, counts, n);
}

/* ---- each expert takes tokens ---------------------------------------------------------------- */

struct moe_taking {
    int64_t groups, E;
    const int64_t *valid_begin, *valid_token, *taken_of_group;
    float *columns; /* [E,valid] scores; then, as integers, the ranks of the takers, or -1 */
    int32_t *taken; /* [N] of each group, each expert's, numbered within the group */
    int32_t *scratch;
    int64_t *token_begin;
    int32_t *expert_of_entry;
    int64_t *slot_of_entry;
};

/* columns[e,v] = score of the v-th unmasked token at expert e; a block for 32 tokens, a warp for
 * each of them to find max and sum, then 32 x 32 scores at a time through shared memory. */
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_take_scores(moe_taking taking, const float *logits, int32_t score)
{
    MOE_SHARED(float, max, TAKE_TOKENS);
    MOE_SHARED(float, sum, TAKE_TOKENS);
    MOE_SHARED(float, tile, MOE_WARP *(TAKE_TOKENS + 1));
    int64_t E = taking.E, valid = taking.valid_begin[taking.groups];
    int64_t first = (int64_t)blockIdx.x * TAKE_TOKENS;
    int warp = (int)threadIdx.x / MOE_WARP;
    bool sigmoid = score == MOE_SCORE_SIGMOID;
    for (int i = warp; i < TAKE_TOKENS && first + i < valid && !sigmoid; i += MOE_ROUTE_ROWS) {
        float of_row, row_sum;
        row_sum = moe_shifted_sum(logits + taking.valid_token[first + i] * E, E, &of_row);
        if (moe_lane() == 0) max[i] = of_row, sum[i] = row_sum;
    }
    moe_block_sync();
    for (int64_t e = 0; e < E; e += MOE_WARP) {
        for (int i = warp; i < TAKE_TOKENS && first + i < valid; i += MOE_ROUTE_ROWS) {
            if (e + moe_lane() >= E) continue;
            float h = logits[taking.valid_token[first + i] * E + e + moe_lane()];
            tile[moe_lane() * (TAKE_TOKENS + 1) + i] = sigmoid ? moe__sigmoid_f32(h)
                                                               : moe__exp_f32(h - max[i]) / sum[i];
        }
        moe_block_sync();
        for (int j = warp; j < MOE_WARP && e + j < E; j += MOE_ROUTE_ROWS)
            if (first + moe_lane() < valid)
                taking.columns[(e + j) * valid + first + moe_lane()] =
                    tile[j * (TAKE_TOKENS + 1) + moe_lane()];
        moe_block_sync();
    }
}

/* The best C tokens of a group at an expert; a block for each of both. Then the scores are done
 * with, and their place holds the ranks. */
MOE_GLOBAL(MOE_SELECT_THREADS) moe_take_tokens(moe_taking taking)
{
    MOE_SHARED(moe_select_shared, shared, 1);
    uint32_t experts = (uint32_t)taking.E;
    int64_t E = taking.E, e = blockIdx.x % experts, g = blockIdx.x / experts, base = 0;
    int64_t valid = taking.valid_begin[taking.groups], first = taking.valid_begin[g];
    int64_t n = taking.valid_begin[g + 1] - first, C = taking.taken_of_group[g];
    for (int64_t i = 0; i < g; i++) base += E * taking.taken_of_group[i];
    base += e * C;
    moe_candidates all = {taking.columns + e * valid + first, NULL, 1, INT32_MAX, n};
    if (C > 0) moe_select_block(shared, taking.taken + base, taking.scratch + base, (int)C, &all);
    int32_t *rank = (int32_t *)(void *)taking.columns + e * valid + first;
    for (int64_t v = threadIdx.x; v < n; v += MOE_SELECT_THREADS) rank[v] = -1;
    moe_block_sync();
    for (int64_t i = threadIdx.x; i < C; i += MOE_SELECT_THREADS)
        rank[taking.taken[base + i]] = (int32_t)i;
}

/* How many experts take a token; a thread for each unmasked one. */
MOE_GLOBAL(MOE_ROUTE_THREADS) moe_take_count(moe_taking taking)
{
    int64_t v = moe_thread(), valid = taking.valid_begin[taking.groups], count = 0;
    const int32_t *rank = (const int32_t *)(const void *)taking.columns;
    if (v >= valid) return;
    for (int64_t e = 0; e < taking.E; e++) count += rank[e * valid + v] >= 0;
    taking.token_begin[taking.valid_token[v]] = count;
}

MOE_GLOBAL(MOE_ROUTE_THREADS) moe_take_list(moe_taking taking)
{
    int64_t v = moe_thread(), valid = taking.valid_begin[taking.groups];
    const int32_t *rank = (const int32_t *)(const void *)taking.columns;
    if (v >= valid) return;
    int64_t n = taking.token_begin[taking.valid_token[v]];
    for (int64_t e = 0; e < taking.E; e++) {
        int32_t of_token = rank[e * valid + v];
        if (of_token < 0) continue;
        taking.expert_of_entry[n] = (int32_t)e;
        taking.slot_of_entry[n++] = of_token;
    }
}

moe_status moe__cuda_choose_by_expert(const moe__route_job *job)
{
    const moe__workers *w = &job->workers;
    int64_t T = job->tokens, E = job->level[0].width;
    moe_taking taking = {job->groups,         E,
                         job->valid_begin,    job->valid_token,
                         job->taken_of_group, (float *)job->columns,
                         job->taken,          (int32_t *)w->scratch,
                         job->token_begin,    job->expert_of_entry,
                         job->slot_of_entry};
    MOE_TRY(moe__cuda_status(cudaMemsetAsync(job->token_begin, 0, (size_t)(T + 1) * sizeof(int64_t),
                                             (cudaStream_t)w->stream),
                             w, "cudaMemsetAsync"));
    MOE_TRY(moe_over(w, "moe_take_scores", moe_take_scores, T, TAKE_TOKENS, taking,
                     (const float *)job->level[0].logits, job->config->score));
    if (T > 0) MOE_TRY(moe_over(w, "moe_take_tokens", moe_take_tokens, E * job->groups, 1, taking));
    MOE_TRY(moe_over_items(w, "moe_take_count", moe_take_count, T, taking));
    MOE_TRY(scan(w, job->token_begin, T));
    return moe_over_items(w, "moe_take_list", moe_take_list, T, taking);
}

/* ---- experts above their threshold ----------------------------------------------------------- */

/* columns = scores; count[t] = how many are above; a warp for each token. */
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_take_above(moe_level l, int32_t score, moe_vector threshold, float *columns, int64_t *count)
{
    int64_t t = moe_warp(), above = 0;
    if (t >= l.rows) return;
    float *p = columns + t * l.width;
    bool masked = moe_is_masked(l.token_mask, t);
    if (!masked) moe_score_all(p, l.logits + t * l.width, l.width, score);
    for (int64_t e = moe_lane(); e < l.width && !masked; e += MOE_WARP)
        above += p[e] > moe_vector_at(&threshold, e);
    above = moe_warp_sum(above);
    if (moe_lane() == 0) count[t] = above;
}

MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_take_list_above(moe_level l, moe_vector threshold, const float *columns,
                    const int64_t *token_begin, int32_t *expert_of_entry)
{
    int64_t t = moe_warp();
    if (t >= l.rows || moe_is_masked(l.token_mask, t)) return;
    const float *p = columns + t * l.width;
    int64_t n = token_begin[t];
    for (int64_t first = 0; first < l.width; first += MOE_WARP) {
        int64_t e = first + moe_lane();
        bool above = e < l.width && p[e] > moe_vector_at(&threshold, e);
        uint32_t all = moe_ballot(above);
        if (above) expert_of_entry[n + moe_popcount(all & ((1u << moe_lane()) - 1))] = (int32_t)e;
        n += moe_popcount(all);
    }
}

moe_status moe__cuda_count_above(const moe__route_job *job)
{
    const moe__workers *w = &job->workers;
    MOE_TRY(moe_over_rows(w, "moe_take_above", moe_take_above, job->tokens,
                          moe_level_of(job, &job->level[0]), job->config->score,
                          moe_vector_of(&job->threshold), (float *)job->columns, job->token_begin));
    return scan(w, job->token_begin, job->tokens);
}

moe_status moe__cuda_choose_above(const moe__route_job *job)
{
    MOE_TRY(moe__cuda_count_above(job));
    return moe_over_rows(&job->workers, "moe_take_list_above", moe_take_list_above, job->tokens,
                         moe_level_of(job, &job->level[0]), moe_vector_of(&job->threshold),
                         (const float *)job->columns, (const int64_t *)job->token_begin,
                         job->expert_of_entry);
}
