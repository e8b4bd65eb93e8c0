/* route.c - from tokens to experts and weights.
 *
 *     x' = x u,  u uniform in (1 - r, 1 + r)           the input jitter, in training
 *     clean = x' Wg (+ bias)                           [T,E]
 *     sd = softplus(x' Wnoise) + eps,  H = clean + noise * sd      in training; else H = clean
 *     ids by choose.c, weights by weigh.h
 *
 * A hierarchical gate does this twice: for the tokens among groups, then for the rows of that
 * routing among the experts of their group; the weights are the products. The backward is in
 * gate_backward.c. */
#include "cpu/route.h"
#include "cpu/kernels.h"
#include "cpu/select.h"
#include "cpu/tiles.h"
#include "cpu/weigh.h"
#include "philox.h"

/* ---- the input ------------------------------------------------------------------------------- */

void MOE_KERNEL(jitter4)(const moe__route_job *job, int64_t token, int64_t first, real factor[4])
{
    uint32_t word[4];
    real r = (real)job->config->jitter;
    moe__counter(word, job->jitter_stream, (uint32_t)job->step,
                 (uint32_t)(job->token_first + token), (uint32_t)(first / 4));
    moe__philox(job->config->seed, word, word);
    for (int j = 0; j < 4; j++)
        factor[j] = r_fma(r, R(2.0) * (real)moe__uniform_f32(word[j]) - R(1.0), R(1.0));
}

static void jitter_range(void *argument, int64_t begin, int64_t end)
{
    const moe__route_job *job = argument;
    int64_t D = job->input_width;
    for (int64_t t = begin; t < end; t++) {
        const element *in = (const element *)job->x + t * job->x_stride;
        real *out = (real *)job->x_jittered + t * D, factor[4];
        for (int64_t first = 0; first < D; first += 4) {
            MOE_KERNEL(jitter4)(job, t, first, factor);
            for (int64_t j = first; j < first + 4 && j < D; j++)
                out[j] = get(in[j]) * factor[j - first];
        }
    }
}

moe__rows MOE_KERNEL(gate_input)(const moe__route_job *job, const int64_t *token_of_row)
{
    bool jitter = job->x_jittered != NULL;
    return (moe__rows){.data = jitter ? job->x_jittered : job->x,
                       .stride = jitter ? job->input_width : job->x_stride,
                       .row_index = token_of_row,
                       .wide = jitter};
}

/* ---- logits ---------------------------------------------------------------------------------- */

moe_status MOE_KERNEL(level_product)(const moe__route_job *job, const moe__gate_level *level,
                                     const moe__matrices *w, const moe__matrices *bias, void *out)
{
    int64_t all[2] = {0, level->rows};
    moe__gemm_rows_job gemm = {.experts = level->parts,
                               .expert_begin = level->part_begin ? level->part_begin : all,
                               .k = job->input_width,
                               .n = level->width,
                               .a = MOE_KERNEL(gate_input)(job, level->token_of_row),
                               .b = *w,
                               .out = out,
                               .out_wide = 1,
                               .out_stride = level->width,
                               .tile_begin = job->tile_begin};
    if (bias) gemm.bias = *bias;
    return run_gemm_rows(&job->workers, &gemm);
}

static void copy_logits_range(void *argument, int64_t begin, int64_t end)
{
    const moe__route_job *job = argument;
    int64_t E = job->level[0].width;
    for (int64_t t = begin; t < end; t++) {
        const real *in = (const real *)job->logits_in + t * job->logits_stride;
        real *out = (real *)job->level[0].logits + t * E;
        for (int64_t i = 0; i < E; i++) out[i] = in[i];
    }
}

enum { BLOCKS = 16 }; /* of the counter that are drawn at a time, in vectors */

/* The normal numbers of blocks [block, block + BLOCKS). */
static void normals(const moe__route_job *job, uint32_t stream, int64_t token, int64_t block,
                    float drawn[4 * BLOCKS])
{
    uint32_t bits[4][BLOCKS];
    float pair[4][BLOCKS];
    for (int b = 0; b < BLOCKS; b++) {
        uint32_t words[4];
        moe__counter(words, stream, (uint32_t)job->step, (uint32_t)token, (uint32_t)(block + b));
        moe__philox(job->config->seed, words, words);
        for (int j = 0; j < 4; j++) bits[j][b] = words[j];
    }
    for (int j = 0; j < 4; j += 2)
        for (int b = 0; b < BLOCKS; b++) {
            float two[2];
            moe__normal2(bits[j][b], bits[j + 1][b], two);
            pair[j][b] = two[0];
            pair[j + 1][b] = two[1];
        }
    for (int b = 0; b < BLOCKS; b++)
        for (int j = 0; j < 4; j++) drawn[4 * b + j] = pair[j][b];
}

/* noise[row,:] = the host's numbers, or those of the counter (stream, step, token, candidate / 4),
 * the candidates of all parts numbered one after another. */
static void draw_noise(const moe__route_job *job, const moe__gate_level *level, int64_t row,
                       real *noise)
{
    int64_t t = token_of(level, row), first = part_of(level, row) * level->width;
    if (level->noise_in) {
        const real *in = (const real *)level->noise_in + t * level->noise_stride + first;
        for (int64_t i = 0; i < level->width; i++) noise[i] = in[i];
        return;
    }
    for (int64_t block = first / 4; block * 4 < first + level->width; block += BLOCKS) {
        float drawn[4 * BLOCKS];
        normals(job, level->noise_stream, job->token_first + t, block, drawn);
        int64_t begin = moe__max(0, block * 4 - first), skip = first + begin - block * 4;
        int64_t count = moe__min(4 * BLOCKS - skip, level->width - begin);
        for (int64_t i = 0; i < count; i++) noise[begin + i] = (real)drawn[skip + i];
    }
}

/* sd and H of one row. */
static void add_noise(const moe__route_job *job, const moe__gate_level *level, int64_t row)
{
    int64_t n = level->width, at = row * n;
    const real *clean = (const real *)level->logits + at;
    const real *raw = (const real *)level->noise_raw + at;
    real *sd = (real *)level->noise_std + at, *noise = (real *)level->noise + at;
    real *noisy = (real *)level->noisy + at;
    real epsilon = (real)job->config->noise_epsilon;
    draw_noise(job, level, row, noise);
    for (int64_t i = 0; i < n; i++) sd[i] = r_softplus(raw[i]) + epsilon;
    for (int64_t i = 0; i < n; i++) noisy[i] = r_fma(noise[i], sd[i], clean[i]);
}

/* Clean logits and raw noise of a level. */
static moe_status level_logits(const moe__route_job *job, const moe__gate_level *level)
{
    const moe__workers *w = &job->workers;
    if (!level->logits) return MOE_OK;
    if (job->logits_in)
        MOE_TRY(moe__parallel_range(w->context, job->tokens, 64, copy_logits_range,
                                    (void *)(uintptr_t)job, w->function));
    else
        MOE_TRY(MOE_KERNEL(level_product)(job, level, &level->weight_matrix, &level->bias,
                                          level->logits));
    return level->noise
               ? MOE_KERNEL(level_product)(job, level, &level->noise_weight, NULL, level->noise_raw)
               : MOE_OK;
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* kth[0]: the last of the chosen candidates; kth[1]: the first of the others. -1: there is none. */
static void find_thresholds(int32_t kth[2], const int32_t *ids, int64_t n, const real *h,
                            int64_t width)
{
    kth[0] = kth[1] = -1;
    for (int64_t j = 0; j < n; j++)
        if (ids[j] >= 0 && (kth[0] < 0 || comes_before(h[kth[0]], kth[0], h[ids[j]], ids[j])))
            kth[0] = ids[j];
    for (int64_t i = 0; i < width; i++) {
        if (kth[1] >= 0) i = next_before(h, i, width, h[kth[1]]);
        int chosen = i == width;
        for (int64_t j = 0; j < n && !chosen; j++) chosen = ids[j] == i;
        if (!chosen) kth[1] = (int32_t)i;
    }
}

/* The largest score over all experts. */
static real priority(const moe__route_job *job, int64_t t)
{
    int64_t E = job->level[0].width;
    const real *clean = (const real *)job->level[0].logits + t * E;
    int32_t best = 0;
    real score;
    for (int32_t i = 1; i < E; i++)
        if (comes_before(clean[i], i, clean[best], best)) best = i;
    score_of_chosen(&score, &best, 1, clean, E, job->config->score);
    return score;
}

typedef struct level_run {
    const moe__route_job *job;
    const moe__gate_level *level;
} level_run;

static void route_range(void *argument, int64_t begin, int64_t end)
{
    const level_run *run = argument;
    const moe__route_job *job = run->job;
    const moe__gate_level *level = run->level;
    real scale = level_scale(job);
    for (int64_t r = begin; r < end; r++) {
        int64_t first = level->entry_begin[r], n = level->entry_begin[r + 1] - first;
        int32_t *ids = level->choice + first;
        real *w = (real *)level->weight + first;
        const real *h = level->noisy ? (const real *)level->noisy + r * level->width : NULL;
        if (level->noise) add_noise(job, level, r);
        if (is_masked(job->token_mask, token_of(level, r))) {
            for (int64_t j = 0; j < n; j++) ids[j] = -1, w[j] = R(0.0);
            if (job->token_priority) ((real *)job->token_priority)[r] = R(0.0);
            continue;
        }
        MOE_KERNEL(choose_row)(job, level, r, ids, n);
        weigh(job->config, scale, w, ids, n, h, level->width);
        if (level->kth) find_thresholds(level->kth + 2 * r, ids, n, h, level->width);
        if (job->token_priority) ((real *)job->token_priority)[r] = priority(job, r);
    }
}

static moe_status route_rows(const moe__route_job *job, const moe__gate_level *level)
{
    level_run run = {job, level};
    return moe__parallel_range(job->workers.context, level->rows, 16, route_range, &run,
                               job->workers.function);
}

/* ---- two levels ------------------------------------------------------------------------------ */

/* The groups of a replayed routing: that of the first expert of each run of top_k entries. */
static void groups_of_given(const moe__route_job *job)
{
    const moe__gate_level *groups = &job->level[0], *experts = &job->level[1];
    for (int64_t n = 0; n < job->tokens * groups->top_k; n++) {
        groups->choice[n] = -1;
        for (int64_t j = (n + 1) * experts->top_k - 1; j >= n * experts->top_k; j--)
            if (job->expert_of_entry[j] >= 0)
                groups->choice[n] = (int32_t)(job->expert_of_entry[j] / experts->width);
    }
}

/* The rows of the second level: the entries of the first whose weight is not 0, by group. */
static moe_status start_second_level(moe__route_job *job)
{
    moe__plan_arrays *p = job->primary;
    moe__gate_level *first = &job->level[0], *second = &job->level[1];
    const real *weight = first->weight;
    int64_t width = second->width;
    for (int64_t n = 0; n < p->entries; n++) {
        int32_t group = first->choice[n];
        p->expert_of_entry[n] = weight[n] == R(0.0) ? -1 : group;
        ((real *)p->weight_of_entry)[n] = weight[n];
    }
    moe__plan_rows_job rows = {.workers = job->workers, .plan = p, .token_mask = job->token_mask};
    MOE_TRY(MOE_KERNEL(plan_rows)(&rows));
    second->rows = p->rows;
    for (int64_t r = 0; r < p->rows && job->choose == MOE__CHOOSE_GIVEN; r++)
        for (int64_t j = 0; j < second->top_k; j++) {
            int32_t e = job->expert_of_entry[p->entry_of_row[r] * second->top_k + j];
            second->choice[r * second->top_k + j] = e < 0 ? -1 : (int32_t)(e % width);
        }
    return MOE_OK;
}

/* The plan's entries: experts by their number among all, weights Gp Gs. Those of a replay stay
 * where they are, with weight 0 if the group's has vanished. */
static void combine_levels(const moe__route_job *job)
{
    const moe__plan_arrays *p = job->primary;
    const moe__gate_level *second = &job->level[1];
    real scale = (real)job->config->route_scale;
    int64_t K = second->top_k;
    for (int64_t n = 0; n < p->entries; n++) {
        int64_t r = p->row_of_entry[n];
        int masked = is_masked(job->token_mask, n / job->level[0].top_k);
        real by_group = ((const real *)p->weight_of_entry)[n] * scale;
        for (int64_t j = 0; j < K; j++) {
            int32_t local = r < 0 ? -1 : second->choice[r * K + j];
            real w = r < 0 ? R(0.0) : by_group * ((const real *)second->weight)[r * K + j];
            ((real *)job->weight)[n * K + j] = local < 0 ? R(0.0) : w;
            if (job->choose == MOE__CHOOSE_GIVEN && !masked) continue;
            job->expert_of_entry[n * K + j] =
                local < 0 ? -1 : (int32_t)(p->expert_of_entry[n] * second->width + local);
        }
    }
}

static moe_status route_two_levels(moe__route_job *job)
{
    if (job->choose == MOE__CHOOSE_GIVEN) groups_of_given(job);
    MOE_TRY(route_rows(job, &job->level[0]));
    MOE_TRY(start_second_level(job));
    MOE_TRY(job->second ? job->second(job) : level_logits(job, &job->level[1]));
    MOE_TRY(route_rows(job, &job->level[1]));
    combine_levels(job);
    return MOE_OK;
}

/* ---- the step -------------------------------------------------------------------------------- */

moe_status MOE_KERNEL(first_logits)(const moe__route_job *job)
{
    const moe__workers *w = &job->workers;
    if (job->x_jittered)
        MOE_TRY(moe__parallel_range(w->context, job->tokens, 64, jitter_range,
                                    (void *)(uintptr_t)job, w->function));
    return level_logits(job, &job->level[0]);
}

moe_status MOE_KERNEL(route_forward)(moe__route_job *job)
{
    MOE_TRY(MOE_KERNEL(first_logits)(job));
    if (job->levels == 2) return route_two_levels(job);
    if (job->choose == MOE__CHOOSE_BY_EXPERT) MOE_TRY(MOE_KERNEL(choose_by_expert)(job));
    if (job->choose == MOE__CHOOSE_THRESHOLD) MOE_TRY(MOE_KERNEL(choose_above)(job));
    if (job->column_factor) MOE_TRY(MOE_KERNEL(sinkhorn)(job));
    return route_rows(job, &job->level[0]);
}
