/* choose.c - who is chosen: the part of the gate in which the kinds differ.
 *
 *     top            the K first logits in the total order of select.h
 *       by scores    of s + bias, s = softmax or sigmoid over all; only from the best groups of
 *                    experts, a group's score being the sum of its n largest
 *       with noise   of logits + Gumbel noise
 *       Sinkhorn     of d_e exp(logit - max), d the column factors that make the group's matrix
 *                    balanced
 *     key            K distinct experts from the bits of (seed, key)
 *     by expert      each expert's first C tokens by score; entries of a token in order of expert
 *     above          the experts with score > threshold, in order
 *
 * Sigmoid and softmax rise with the logit, so without a bias the K first scores are the K first
 * logits, without the ties that rounding of a score would make. */
#include "cpu/route.h"
#include "cpu/select.h"
#include "cpu/weigh.h"
#include "philox.h"

/* ---- one row --------------------------------------------------------------------------------- */

/* v = selection scores of a token: s (+ bias). */
static void selection_scores(const moe__route_job *job, real *v, const real *h)
{
    int64_t E = job->level[0].width;
    score_all(v, h, E, job->config->score);
    for (int64_t i = 0; i < E && job->selection_bias.base; i++)
        v[i] = v[i] + vector_at(&job->selection_bias, i);
}

/* Sum of the n largest of v[0..count), largest first. */
static real sum_of_largest(const real *v, int64_t count, int64_t n)
{
    real sum = R(0.0);
    int32_t last = -1;
    for (int64_t round = 0; round < n; round++) {
        int32_t best = -1;
        for (int32_t i = 0; i < count; i++) {
            int after = last < 0 || comes_before(v[last], last, v[i], i);
            if (after && (best < 0 || comes_before(v[i], i, v[best], best))) best = i;
        }
        sum = round == 0 ? v[best] : sum + v[best];
        last = best;
    }
    return sum;
}

/* The best top_groups groups by v, in ascending order. */
static void choose_groups(const moe__route_job *job, int64_t row, const real *v, int32_t *groups)
{
    const moe_gate_config *c = job->config;
    int64_t count = c->expert_groups, size = c->num_experts / count;
    real *score = (real *)job->group_score + row * count;
    for (int64_t g = 0; g < count; g++)
        score[g] = sum_of_largest(v + g * size, size, moe__max(c->group_score, 1));
    select_top(groups, c->top_groups, score, count);
    for (int64_t i = 1; i < c->top_groups; i++)
        for (int64_t j = i; j > 0 && groups[j] < groups[j - 1]; j--) {
            int32_t swap = groups[j];
            groups[j] = groups[j - 1];
            groups[j - 1] = swap;
        }
}

/* By score plus bias, within the best groups. The candidates are moved together in v; what orders
 * them is the logit where there is no bias. */
static void choose_by_score(const moe__route_job *job, int64_t row, int32_t *ids, int64_t n,
                            const real *h)
{
    const moe_gate_config *c = job->config;
    int64_t E = c->num_experts, size = E / c->expert_groups;
    real *v = (real *)job->columns + row * E;
    int has_bias = job->selection_bias.base != NULL;
    if (has_bias || c->group_score > 1) selection_scores(job, v, h);
    if (!job->group_score) {
        select_top(ids, n, v, E);
        return;
    }
    int32_t *groups = job->group_ids + row * c->top_groups;
    choose_groups(job, row, has_bias || c->group_score > 1 ? v : h, groups);
    const real *order = has_bias ? v : h;
    for (int64_t i = 0; i < c->top_groups; i++)
        for (int64_t j = 0; j < size; j++) v[i * size + j] = order[groups[i] * size + j];
    select_top(ids, n, v, c->top_groups * size);
    for (int64_t j = 0; j < n; j++)
        ids[j] = (int32_t)(groups[ids[j] / size] * size + ids[j] % size);
}

/* v = h + Gumbel noise: -log(-log(u)), in f32 whatever the element type. */
static void add_gumbel(const moe__route_job *job, int64_t row, real *v, const real *h)
{
    int64_t E = job->config->num_experts;
    for (int64_t first = 0; first < E; first += 4) {
        uint32_t word[4];
        moe__counter(word, job->choice_stream, (uint32_t)job->step,
                     (uint32_t)(job->token_first + row), (uint32_t)(first / 4));
        moe__philox(job->config->seed, word, word);
        for (int64_t i = first; i < first + 4 && i < E; i++)
            v[i] = h[i] - (real)moe__log_f32(-moe__log_f32(moe__uniform_f32(word[i - first])));
    }
}

static void choose_with_noise(const moe__route_job *job, int64_t row, int32_t *ids, int64_t n,
                              const real *h)
{
    int64_t E = job->config->num_experts;
    real *v = (real *)job->columns + row * E;
    add_gumbel(job, row, v, h);
    if (job->config->choice_noise == MOE_CHOICE_NOISE_GUMBEL) {
        select_top(ids, n, v, E);
        return;
    }
    select_top(ids, 1, h, E);
    for (int64_t i = ids[0]; i + 1 < E; i++) v[i] = v[i + 1]; /* the rest, moved together */
    if (n > 1) select_top(ids + 1, n - 1, v, E - 1);
    for (int64_t j = 1; j < n; j++) ids[j] += ids[j] >= ids[0];
}

/* Draw j is uniform among the E - j experts that are left, numbered in ascending order. */
static void choose_by_key(const moe__route_job *job, int64_t row, int32_t *ids, int64_t n)
{
    uint64_t key = (uint64_t)job->token_key[row], E = (uint64_t)job->config->num_experts;
    uint32_t word[4] = {0};
    for (int64_t j = 0; j < n; j++) {
        if (j % 4 == 0) {
            moe__counter(word, job->choice_stream, (uint32_t)(j / 4), (uint32_t)key,
                         (uint32_t)(key >> 32));
            moe__philox(job->config->seed, word, word);
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

void MOE_KERNEL(choose_row)(const moe__route_job *job, const moe__gate_level *level, int64_t row,
                            int32_t *ids, int64_t n)
{
    const moe_gate_config *c = job->config;
    const real *h = level->noisy ? (const real *)level->noisy + row * level->width : NULL;
    if (job->choose == MOE__CHOOSE_ALL) {
        for (int64_t j = 0; j < n; j++) ids[j] = (int32_t)j;
    } else if (job->choose == MOE__CHOOSE_KEY) {
        choose_by_key(job, row, ids, n);
    } else if (job->choose == MOE__CHOOSE_TOP) {
        if (job->column_factor)
            select_top(ids, n, (const real *)job->columns + row * level->width, level->width);
        else if (job->selection_bias.base || job->group_score)
            choose_by_score(job, row, ids, n, h);
        else if (c->choice_noise != MOE_CHOICE_NOISE_NONE && job->train)
            choose_with_noise(job, row, ids, n, h);
        else
            select_top(ids, n, h, level->width);
    }
}

/* ---- each expert takes tokens ---------------------------------------------------------------- */

/* columns[e,v] = score of the v-th unmasked token at expert e. */
static void transposed_scores_range(void *argument, int64_t begin, int64_t end)
{
    const moe__route_job *job = argument;
    int64_t E = job->level[0].width, valid = job->valid_begin[job->groups];
    real *columns = job->columns;
    for (int64_t v = begin; v < end; v++) {
        const real *h = (const real *)job->level[0].logits + job->valid_token[v] * E;
        real max = R(0.0), sum = R(1.0);
        int sigmoid = job->config->score == MOE_SCORE_SIGMOID;
        if (!sigmoid) sum = shifted_sum(h, E, &max);
        for (int64_t e = 0; e < E; e++)
            columns[e * valid + v] = sigmoid ? r_sigmoid(h[e]) : r_exp(h[e] - max) / sum;
    }
}

/* taken: of each group, each expert's C best, numbered within the group's unmasked tokens. */
static void take_range(void *argument, int64_t begin, int64_t end)
{
    const moe__route_job *job = argument;
    int64_t E = job->level[0].width, valid = job->valid_begin[job->groups], base = 0;
    for (int64_t g = 0; g < job->groups; g++) {
        int64_t first = job->valid_begin[g], C = job->taken_of_group[g];
        for (int64_t e = begin; e < end && C > 0; e++)
            select_top(job->taken + base + e * C, C, (const real *)job->columns + e * valid + first,
                       job->valid_begin[g + 1] - first);
        base += E * C;
    }
}

/* Entries by token from the experts' lists; the slot is the rank in the expert's order. */
static void list_by_token(const moe__route_job *job)
{
    int64_t E = job->level[0].width, T = job->tokens, *begin = job->token_begin;
    for (int64_t t = 0; t <= T; t++) begin[t] = 0;
    for (int32_t fill = 0; fill < 2; fill++) {
        const int32_t *taken = job->taken;
        for (int64_t g = 0; g < job->groups; g++)
            for (int64_t i = 0; i < E * job->taken_of_group[g]; i++) {
                int64_t t = job->valid_token[job->valid_begin[g] + *taken++];
                if (!fill) {
                    begin[t + 1]++;
                    continue;
                }
                int64_t n = begin[t]++; /* ends as the first entry of t + 1 */
                job->expert_of_entry[n] = (int32_t)(i / job->taken_of_group[g]);
                job->slot_of_entry[n] = i % job->taken_of_group[g];
            }
        for (int64_t t = 0; t < T && !fill; t++) begin[t + 1] += begin[t];
    }
    for (int64_t t = T; t > 0; t--) begin[t] = begin[t - 1];
    begin[0] = 0;
}

moe_status MOE_KERNEL(choose_by_expert)(const moe__route_job *job)
{
    const moe__workers *w = &job->workers;
    void *argument = (void *)(uintptr_t)job;
    MOE_TRY(moe__parallel_range(w->context, job->valid_begin[job->groups], 16,
                                transposed_scores_range, argument, w->function));
    MOE_TRY(
        moe__parallel_range(w->context, job->level[0].width, 1, take_range, argument, w->function));
    list_by_token(job);
    return MOE_OK;
}

/* ---- experts above their threshold ----------------------------------------------------------- */

/* columns = scores; token_begin[t] = how many are above. */
static void above_range(void *argument, int64_t begin, int64_t end)
{
    const moe__route_job *job = argument;
    int64_t E = job->level[0].width;
    for (int64_t t = begin; t < end; t++) {
        const real *h = (const real *)job->level[0].logits + t * E;
        real *p = (real *)job->columns + t * E;
        job->token_begin[t] = 0;
        if (is_masked(job->token_mask, t)) continue;
        score_all(p, h, E, job->config->score);
        for (int64_t e = 0; e < E; e++) job->token_begin[t] += p[e] > vector_at(&job->threshold, e);
    }
}

static moe_status count_above(const moe__route_job *job)
{
    return moe__parallel_range(job->workers.context, job->tokens, 16, above_range,
                               (void *)(uintptr_t)job, job->workers.function);
}

static void list_above_range(void *argument, int64_t begin, int64_t end)
{
    const moe__route_job *job = argument;
    int64_t E = job->level[0].width;
    for (int64_t t = begin; t < end; t++) {
        const real *p = (const real *)job->columns + t * E;
        int64_t n = job->token_begin[t];
        for (int64_t e = 0; e < E && n < job->token_begin[t + 1]; e++)
            if (p[e] > vector_at(&job->threshold, e)) job->expert_of_entry[n++] = (int32_t)e;
    }
}

moe_status MOE_KERNEL(choose_above)(const moe__route_job *job)
{
    int64_t entries = 0, *begin = job->token_begin;
    MOE_TRY(count_above(job));
    for (int64_t t = 0; t < job->tokens; t++) {
        int64_t count = begin[t];
        begin[t] = entries;
        entries += count;
    }
    begin[job->tokens] = entries;
    return moe__parallel_range(job->workers.context, job->tokens, 16, list_above_range,
                               (void *)(uintptr_t)job, job->workers.function);
}

moe_status MOE_KERNEL(route_count)(moe__route_job *job, int64_t *entries)
{
    MOE_TRY(MOE_KERNEL(first_logits)(job));
    MOE_TRY(count_above(job));
    *entries = 0;
    for (int64_t t = 0; t < job->tokens; t++) *entries += job->token_begin[t];
    return MOE_OK;
}

/* ---- Sinkhorn -------------------------------------------------------------------------------- */

/* One group's half round: c = columns, d0 row_factor, d1 column_factor[0..E). */
typedef struct half_round {
    const moe__route_job *job;
    int64_t first, last, tokens; /* of the group; tokens unmasked */
} half_round;

static void exponentials_range(void *argument, int64_t begin, int64_t end)
{
    const moe__route_job *job = argument;
    int64_t E = job->level[0].width;
    for (int64_t t = begin; t < end; t++)
        (void)exp_shifted((real *)job->columns + t * E, (const real *)job->level[0].noisy + t * E,
                          E, NULL);
}

/* d0_t = 1 / (T_g (sum_e d1_e c_te + 1e-8)); 0 for masked tokens */
static void row_factors_range(void *argument, int64_t begin, int64_t end)
{
    const half_round *run = argument;
    const moe__route_job *job = run->job;
    int64_t E = job->level[0].width;
    for (int64_t t = run->first + begin; t < run->first + end; t++) {
        const real *c = (const real *)job->columns + t * E;
        double sum = 0;
        for (int64_t e = 0; e < E; e++)
            sum = __builtin_fma(job->column_factor[e], (double)c[e], sum);
        job->row_factor[t] = is_masked(job->token_mask, t)
                                 ? 0
                                 : 1 / ((double)run->tokens * (sum + 1e-8));
    }
}

/* d1_e = 1 / (E (sum_t d0_t c_te + 1e-8)); column_factor[E + e] = its change */
static void column_factors_range(void *argument, int64_t begin, int64_t end)
{
    const half_round *run = argument;
    const moe__route_job *job = run->job;
    int64_t E = job->level[0].width;
    double *factor = job->column_factor;
    for (int64_t e = begin; e < end; e++) factor[2 * E + e] = 0;
    for (int64_t t = run->first; t < run->last; t++) {
        const real *c = (const real *)job->columns + t * E;
        if (is_masked(job->token_mask, t)) continue;
        for (int64_t e = begin; e < end; e++)
            factor[2 * E + e] = __builtin_fma(job->row_factor[t], (double)c[e], factor[2 * E + e]);
    }
    for (int64_t e = begin; e < end; e++) {
        double next = 1 / ((double)E * (factor[2 * E + e] + 1e-8));
        factor[E + e] = __builtin_fabs(factor[e] - next);
        factor[e] = next;
    }
}

/* columns = d1_e c_te: a row's order is that of the normalised matrix. */
static void balanced_range(void *argument, int64_t begin, int64_t end)
{
    const half_round *run = argument;
    const moe__route_job *job = run->job;
    int64_t E = job->level[0].width;
    for (int64_t t = run->first + begin; t < run->first + end; t++) {
        real *c = (real *)job->columns + t * E;
        for (int64_t e = 0; e < E; e++) c[e] = (real)(job->column_factor[e] * (double)c[e]);
    }
}

static moe_status balance_group(half_round *run)
{
    const moe__route_job *job = run->job;
    const moe__workers *w = &job->workers;
    const moe_gate_config *c = job->config;
    int64_t E = job->level[0].width, T = run->last - run->first;
    int64_t rounds = c->sinkhorn_iterations ? c->sinkhorn_iterations : 100;
    double tolerance = c->sinkhorn_tolerance != 0 ? c->sinkhorn_tolerance : 1e-4;
    for (int64_t e = 0; e < E; e++) job->column_factor[e] = 1;
    for (int64_t round = 0; round < rounds; round++) {
        double change = 0;
        MOE_TRY(moe__parallel_range(w->context, T, 64, row_factors_range, run, w->function));
        MOE_TRY(moe__parallel_range(w->context, E, 16, column_factors_range, run, w->function));
        for (int64_t e = 0; e < E; e++) change += job->column_factor[E + e];
        if (!(change > tolerance * (double)E)) break;
    }
    return moe__parallel_range(w->context, T, 64, balanced_range, run, w->function);
}

moe_status MOE_KERNEL(sinkhorn)(const moe__route_job *job)
{
    MOE_TRY(moe__parallel_range(job->workers.context, job->tokens, 16, exponentials_range,
                                (void *)(uintptr_t)job, job->workers.function));
    for (int64_t g = 0; g < job->groups; g++) {
        half_round run = {job, job->group_begin[g], job->group_begin[g + 1],
                          job->valid_begin[g + 1] - job->valid_begin[g]};
        if (run.tokens > 0) MOE_TRY(balance_group(&run));
    }
    return MOE_OK;
}
