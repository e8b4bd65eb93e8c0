/* choose.cu - who is chosen, row by row: the part of the gate in which the kinds differ. As
 * src/cpu/choose.c; take.cu and sinkhorn.cu have what looks at all tokens.
 *
 *     top            the K first logits in the total order of select.h
 *       by scores    of s + bias, s = softmax or sigmoid over all; only from the best groups of
 *                    experts, a group's score being the sum of its n largest
 *       with noise   of logits + Gumbel noise
 *     key            K distinct experts from the bits of (seed, key)
 *
 * Up to TOP_OF_WARP entries of a row are found by a warp, in as many rounds; more by a block. */
#include "route.h"
#include "select.h"
#include "weigh.h"

#define TOP_OF_WARP 32

/* ---- selection scores ------------------------------------------------------------------------ */

/* v = s (+ bias); a warp for each row. */
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_choose_scores(moe_level l, int32_t score, moe_vector bias, float *v)
{
    int64_t row = moe_warp();
    if (row >= l.rows || moe_is_masked(l.token_mask, row)) return;
    v += row * l.width;
    moe_score_all(v, l.noisy + row * l.width, l.width, score);
    for (int64_t i = moe_lane(); i < l.width && bias.data; i += MOE_WARP)
        v[i] = v[i] + moe_vector_at(&bias, i);
}

/* v = h + Gumbel noise: -log(-log(u)); a thread for four candidates. */
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_choose_gumbel(moe_level l, uint64_t seed, uint32_t stream, uint32_t step, int64_t token_first,
                  float *v)
{
    int64_t quads = (l.width + 3) / 4, row = moe_thread() / quads;
    int64_t first = moe_thread() % quads * 4;
    uint32_t word[4];
    if (row >= l.rows) return;
    moe__counter(word, stream, step, (uint32_t)(token_first + row), (uint32_t)(first / 4));
    moe__philox(seed, word, word);
    for (int j = 0; j < 4; j++) {
        int64_t at = row * l.width + first + j;
        if (first + j < l.width)
            v[at] = l.noisy[at] - moe__log_f32(-moe__log_f32(moe__uniform_f32(word[j])));
    }
}

/* ---- the best groups ------------------------------------------------------------------------- */

struct moe_groups {
    int64_t count, size, top; /* groups of `size` experts, of which `top` are kept */
    int64_t largest;          /* a group's score is the sum of so many */
    float *score;             /* [T,count] */
    int32_t *ids;             /* [T,top], ascending */
};

/* Sum of the n largest of v[0..count), largest first. */
MOE_DEVICE float sum_of_largest(const float *v, int64_t count, int64_t n)
{
    float sum = 0.0f;
    uint64_t last = 0;
    for (int64_t round = 0; round < n; round++) {
        uint64_t best = MOE_NO_KEY;
        for (int64_t i = 0; i < count; i++) {
            uint64_t key = moe_order_key(v[i], i);
            if (key < best && (round == 0 || key > last)) best = key;
        }
        float value = v[(uint32_t)best];
        sum = round == 0 ? value : sum + value;
        last = best;
    }
    return sum;
}

/* A thread for each row and group. v: selection scores, or logits. */
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_choose_group_scores(moe_level l, moe_groups groups, const float *v)
{
    int64_t row = moe_thread() / groups.count, g = moe_thread() % groups.count;
    if (row >= l.rows || moe_is_masked(l.token_mask, row)) return;
    groups.score[row * groups.count + g] = sum_of_largest(v + row * l.width + g * groups.size,
                                                          groups.size, groups.largest);
}

MOE_GLOBAL(MOE_ROUTE_THREADS) moe_choose_groups(moe_level l, moe_groups groups)
{
    int64_t row = moe_warp();
    if (row >= l.rows || moe_is_masked(l.token_mask, row)) return;
    int32_t *ids = groups.ids + row * groups.top;
    moe_candidates all = {groups.score + row * groups.count, NULL, 1, INT32_MAX, groups.count};
    moe_select_warp(ids, groups.top, &all);
    if (moe_lane() != 0) return;
    for (int64_t i = 1; i < groups.top; i++)
        for (int64_t j = i; j > 0 && ids[j] < ids[j - 1]; j--) {
            int32_t swap = ids[j];
            ids[j] = ids[j - 1];
            ids[j - 1] = swap;
        }
}

/* ---- the first of a row ---------------------------------------------------------------------- */

/* What the K first are chosen from. */
struct moe_top {
    const float *order;    /* [rows,width] */
    const int32_t *groups; /* [rows,top_groups], NULL: from all */
    int64_t top_groups, size;
    const float *first; /* [rows,width] by which the first choice is; NULL: as the others */
};

MOE_DEVICE moe_candidates candidates_of(const moe_top *top, int64_t row, int64_t width)
{
    moe_candidates c = {top->order + row * width, NULL, 1, INT32_MAX, width};
    if (!top->groups) return c;
    c.groups = top->groups + row * top->top_groups;
    c.size = (int32_t)top->size;
    c.count = top->top_groups * top->size;
    return c;
}

MOE_GLOBAL(MOE_ROUTE_THREADS) moe_choose_top(moe_level l, moe_top top)
{
    int64_t row = moe_warp();
    if (row >= moe_rows_of(&l) || moe_is_masked(l.token_mask, moe_token_of(&l, row))) return;
    int64_t n = l.entry_begin[row + 1] - l.entry_begin[row];
    int32_t *ids = l.choice + l.entry_begin[row];
    moe_candidates c = candidates_of(&top, row, l.width);
    if (top.first) {
        moe_candidates all = {top.first + row * l.width, NULL, 1, INT32_MAX, l.width};
        c.skip = (int32_t)(uint32_t)moe_next_key(&all, true, 0);
        c.count--;
        if (moe_lane() == 0) ids[0] = c.skip;
        ids++, n--;
    }
    moe_select_warp(ids, n, &c);
}

/* The same by a block for each row. scratch: [entries] */
MOE_GLOBAL(MOE_SELECT_THREADS) moe_choose_top_of_many(moe_level l, moe_top top, int32_t *scratch)
{
    MOE_SHARED(moe_select_shared, shared, 1);
    MOE_SHARED(int32_t, skip, 1);
    int64_t row = blockIdx.x;
    if (row >= moe_rows_of(&l) || moe_is_masked(l.token_mask, moe_token_of(&l, row))) return;
    int64_t begin = l.entry_begin[row], n = l.entry_begin[row + 1] - begin;
    moe_candidates c = candidates_of(&top, row, l.width);
    if (top.first) {
        if (threadIdx.x < MOE_WARP) {
            moe_candidates all = {top.first + row * l.width, NULL, 1, INT32_MAX, l.width};
            int32_t first = (int32_t)(uint32_t)moe_next_key(&all, true, 0);
            if (threadIdx.x == 0) skip[0] = l.choice[begin] = first;
        }
        moe_block_sync();
        c.skip = skip[0];
        c.count--;
        begin++, n--;
    }
    if (n > 0) moe_select_block(shared, l.choice + begin, scratch + begin, (int)n, &c);
}

/* ---- without scores -------------------------------------------------------------------------- */

MOE_GLOBAL(MOE_ROUTE_THREADS) moe_choose_all(moe_level l)
{
    int64_t row = moe_warp();
    if (row >= moe_rows_of(&l)) return;
    int64_t first = l.entry_begin[row], n = l.entry_begin[row + 1] - first;
    for (int64_t j = moe_lane(); j < n; j += MOE_WARP) l.choice[first + j] = (int32_t)j;
}

/* Draw j is uniform among the E - j experts that are left, numbered in ascending order; a thread
 * for each row. */
MOE_GLOBAL(MOE_ROUTE_THREADS)
moe_choose_key(moe_level l, const int64_t *token_key, uint64_t seed, uint32_t stream)
{
    int64_t row = moe_thread();
    if (row >= l.rows) return;
    uint64_t key = (uint64_t)token_key[row], E = (uint64_t)l.width;
    int64_t n = l.entry_begin[row + 1] - l.entry_begin[row];
    int32_t *ids = l.choice + l.entry_begin[row];
    uint32_t word[4] = {0};
    for (int64_t j = 0; j < n; j++) {
        if (j % 4 == 0) {
            moe__counter(word, stream, (uint32_t)(j / 4), (uint32_t)key, (uint32_t)(key >> 32));
            moe__philox(seed, word, word);
        }
        int64_t left = (int64_t)((word[j % 4] * (E - (uint64_t)j)) >> 32), id = left, before = -1;
        while (id != before) {
            before = id;
            id = left;
            for (int64_t i = 0; i < j; i++) id += ids[i] <= before;
        }
        ids[j] = (int32_t)id;
    }
}

/* ---- the step -------------------------------------------------------------------------------- */

/* By score plus bias, within the best groups. What orders them is the logit where there is no
 * bias. */
static moe_status order_by_score(const moe__route_job *job, const moe__gate_level *level,
                                 moe_top *top)
{
    const moe__workers *w = &job->workers;
    const moe_gate_config *c = job->config;
    moe_level l = moe_level_of(job, level);
    bool has_bias = job->selection_bias.base != NULL, scores = has_bias || c->group_score > 1;
    float *v = (float *)job->columns;
    if (scores)
        MOE_TRY(moe_over_rows(w, "moe_choose_scores", moe_choose_scores, level->rows, l, c->score,
                              moe_vector_of(&job->selection_bias), v));
    top->order = has_bias ? v : l.noisy;
    if (!job->group_score) return MOE_OK;
    moe_groups groups = {c->expert_groups,
                         c->num_experts / c->expert_groups,
                         c->top_groups,
                         moe__max(c->group_score, 1),
                         (float *)job->group_score,
                         job->group_ids};
    MOE_TRY(moe_over_items(w, "moe_choose_group_scores", moe_choose_group_scores,
                           level->rows * groups.count, l, groups,
                           (const float *)(scores ? v : l.noisy)));
    top->groups = groups.ids;
    top->top_groups = groups.top;
    top->size = groups.size;
    return moe_over_rows(w, "moe_choose_groups", moe_choose_groups, level->rows, l, groups);
}

static moe_status order_with_noise(const moe__route_job *job, const moe__gate_level *level,
                                   moe_top *top)
{
    float *v = (float *)job->columns;
    top->order = v;
    if (job->config->choice_noise != MOE_CHOICE_NOISE_GUMBEL)
        top->first = (const float *)level->noisy;
    return moe_over_items(&job->workers, "moe_choose_gumbel", moe_choose_gumbel,
                          level->rows * ((level->width + 3) / 4), moe_level_of(job, level),
                          job->config->seed, job->choice_stream, (uint32_t)job->step,
                          job->token_first, v);
}

static moe_status choose_top(const moe__route_job *job, const moe__gate_level *level)
{
    const moe__workers *w = &job->workers;
    moe_top top = {(const float *)level->noisy, NULL, 0, 0, NULL};
    if (job->column_factor)
        top.order = (const float *)job->columns;
    else if (job->selection_bias.base || job->group_score)
        MOE_TRY(order_by_score(job, level, &top));
    else if (job->config->choice_noise != MOE_CHOICE_NOISE_NONE && job->train)
        MOE_TRY(order_with_noise(job, level, &top));
    if (level->top_k > TOP_OF_WARP)
        return moe_over(w, "moe_choose_top_of_many", moe_choose_top_of_many, level->rows, 1,
                        moe_level_of(job, level), top, (int32_t *)w->scratch);
    return moe_over_rows(w, "moe_choose_top", moe_choose_top, level->rows, moe_level_of(job, level),
                         top);
}

moe_status moe__cuda_choose_rows(const moe__route_job *job, const moe__gate_level *level)
{
    const moe__workers *w = &job->workers;
    moe_level l = moe_level_of(job, level);
    switch (job->choose) {
    case MOE__CHOOSE_ALL: return moe_over_rows(w, "moe_choose_all", moe_choose_all, level->rows, l);
    case MOE__CHOOSE_KEY:
        return moe_over_items(w, "moe_choose_key", moe_choose_key, level->rows, l, job->token_key,
                              job->config->seed, job->choice_stream);
    case MOE__CHOOSE_TOP: return choose_top(job, level);
    default: return MOE_OK; /* chosen already */
    }
}
