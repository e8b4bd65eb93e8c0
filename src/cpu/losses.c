/* losses.c - importance, load, the auxiliary losses, and the losses' gradients.
 *
 *     importance_e = sum_t w_te            load_e of load.c; for two levels, X_i the rows of
 *                                          group i:
 *                                          load_ij = load_i load(X_i)_j / |X_i|
 *     P = softmax(clean),  p_e = mean_t P_te,  n_e entries of expert e,  f_e first choices
 *     switch = E sum_e n_e/sum(n) p_e      gshard = E sum_e f_e/T p_e
 *     sequence = mean over groups of E sum_e n_ge/sum(n_g) mean_{t in g} s_te / sum_j s_tj
 *     z = mean_t lse(clean_t)^2            threshold = sum_te (above_te - taken_te) (P_te - thr_e)
 *
 * switch and gshard are of all tokens, or the mean over the token groups of that of each. Sums over
 * tokens are formed in double, token by token within a group, then group by group, and if they are
 * shared rank by rank. T counts the unmasked tokens; a masked token's row of `columns` is 0. */
#include "cpu/route.h"
#include "cpu/select.h"
#include "cpu/statistics.h"
#include "cpu/weigh.h"
#include "cv.h"

/* ---- counts and importance ------------------------------------------------------------------- */

/* importance, counts, first_counts; `load` serves as the sums of one group until it is needed. */
static void count_entries(const moe__losses_job *job)
{
    const moe__plan_arrays *plan = job->plan;
    const int32_t *ids = job->route->expert_of_entry;
    const real *w = job->route->weight;
    double *of_group = job->load;
    for (int64_t e = 0; e < plan->num_experts; e++) {
        job->importance[e] = of_group[e] = 0;
        job->counts[e] = job->first_counts[e] = 0;
    }
    for (int64_t g = 0; g < plan->groups; g++) {
        int64_t first = plan->token_begin[plan->group_begin[g]];
        int64_t last = plan->token_begin[plan->group_begin[g + 1]];
        for (int64_t t = plan->group_begin[g]; t < plan->group_begin[g + 1]; t++)
            for (int64_t n = plan->token_begin[t];
                 n < plan->token_begin[t + 1] && !is_masked(job->route->token_mask, t); n++)
                if (ids[n] >= 0) of_group[ids[n]] += (double)w[n], job->counts[ids[n]]++;
        for (int64_t n = first; n < last; n++) {
            if (ids[n] < 0) continue;
            job->importance[ids[n]] += of_group[ids[n]];
            of_group[ids[n]] = 0;
        }
    }
    for (int64_t t = 0; t < plan->tokens; t++) {
        int64_t n = plan->token_begin[t];
        if (is_masked(job->route->token_mask, t)) continue;
        if (n < plan->token_begin[t + 1] && ids[n] >= 0) job->first_counts[ids[n]]++;
    }
}

/* ---- sums over the columns of [rows,width] --------------------------------------------------- */

enum { BLOCK = 32 }; /* columns of one task */

typedef struct column_sums {
    const moe__losses_job *job;
    const moe__gate_level *level;
    double *total;    /* [parts,width] over all groups, or NULL */
    double *by_group; /* [G,width], or NULL */
} column_sums;

/* The sums of columns [first, first + n) over the rows of one part. */
static void sum_block(const column_sums *sums, int64_t part, int64_t first, int64_t n)
{
    const moe__plan_arrays *plan = sums->job->plan;
    const moe__gate_level *level = sums->level;
    const real *columns = sums->job->columns;
    double total[BLOCK] = {0};
    int64_t row = level->part_begin ? level->part_begin[part] : 0;
    int64_t last = level->part_begin ? level->part_begin[part + 1] : level->rows;
    for (int64_t g = 0; g < plan->groups; g++) {
        double of_group[BLOCK] = {0};
        for (; row < last && token_of(level, row) < plan->group_begin[g + 1]; row++)
            for (int64_t i = 0; i < n; i++)
                of_group[i] += (double)columns[row * level->width + first + i];
        for (int64_t i = 0; i < n; i++) {
            total[i] += of_group[i];
            if (sums->by_group) sums->by_group[g * level->width + first + i] = of_group[i];
        }
    }
    for (int64_t i = 0; i < n && sums->total; i++)
        sums->total[part * level->width + first + i] = total[i];
}

static void column_sums_range(void *argument, int64_t begin, int64_t end)
{
    const column_sums *sums = argument;
    int64_t width = sums->level->width, blocks = (width + BLOCK - 1) / BLOCK;
    for (int64_t b = begin; b < end; b++) {
        int64_t first = b % blocks * BLOCK;
        sum_block(sums, b / blocks, first, moe__min(BLOCK, width - first));
    }
}

moe_status MOE_KERNEL(sum_columns)(const moe__losses_job *job, const moe__gate_level *level,
                                   double *total, double *by_group)
{
    const moe__workers *w = &job->route->workers;
    column_sums sums = {job, level, total, by_group};
    return moe__parallel_range(w->context, level->parts * ((level->width + BLOCK - 1) / BLOCK), 1,
                               column_sums_range, &sums, w->function);
}

/* Runs `fill` for every token's row of columns. */
static moe_status fill_columns(const moe__losses_job *job, moe__range_fn fill)
{
    const moe__workers *w = &job->route->workers;
    return moe__parallel_range(w->context, job->plan->tokens, 16, fill, (void *)(uintptr_t)job,
                               w->function);
}

double MOE_KERNEL(sum_tokens)(const moe__losses_job *job)
{
    const moe__plan_arrays *plan = job->plan;
    double total = 0;
    for (int64_t g = 0; g < plan->groups; g++) {
        double of_group = 0;
        for (int64_t t = plan->group_begin[g]; t < plan->group_begin[g + 1]; t++)
            of_group += job->token_value[t];
        total += of_group;
    }
    return total;
}

static int clear_if_masked(const moe__losses_job *job, int64_t t, real *row)
{
    if (!is_masked(job->route->token_mask, t)) return 0;
    for (int64_t i = 0; i < job->plan->num_experts; i++) row[i] = R(0.0);
    job->token_value[t] = 0;
    return 1;
}

/* columns = P, token_value = lse^2 */
static void fill_softmax(void *argument, int64_t begin, int64_t end)
{
    const moe__losses_job *job = argument;
    int64_t E = job->plan->num_experts;
    for (int64_t t = begin; t < end; t++) {
        real *row = (real *)job->columns + t * E, max;
        if (clear_if_masked(job, t, row)) continue;
        real sum = exp_shifted(row, (const real *)job->route->level[0].logits + t * E, E, &max);
        double lse = (double)max + (double)r_log(sum);
        for (int64_t i = 0; i < E; i++) row[i] = row[i] / sum;
        job->token_value[t] = lse * lse;
    }
}

/* row = s / sum(s), and returns the sum; s as the sequence loss wants it. */
static real normalized_scores(const moe_gate_config *c, real *row, const real *logits)
{
    int64_t E = c->num_experts;
    if (c->sequence_score == MOE_SCORE_SOFTMAX) {
        softmax(row, logits, E);
        return R(1.0);
    }
    for (int64_t i = 0; i < E; i++) row[i] = r_sigmoid(logits[i]);
    real sum = lane_sum(row, E);
    for (int64_t i = 0; i < E; i++) row[i] = row[i] / sum;
    return sum;
}

static void fill_sequence(void *argument, int64_t begin, int64_t end)
{
    const moe__losses_job *job = argument;
    int64_t E = job->plan->num_experts, K = job->route->config->top_k;
    for (int64_t t = begin; t < end; t++) {
        const real *logits = (const real *)job->route->level[0].logits + t * E;
        real *row = (real *)job->columns + t * E;
        if (clear_if_masked(job, t, row)) continue;
        normalized_scores(job->route->config, row, logits);
        if (job->plain_ids) select_top(job->plain_ids + t * K, K, logits, E);
    }
}

/* Entries of token t at expert e: a plan that was handed in has them in any order. */
static int64_t entries_at(const moe__route_job *route, int64_t t, int64_t e)
{
    int64_t count = 0;
    for (int64_t n = route->token_begin[t]; n < route->token_begin[t + 1]; n++)
        count += route->expert_of_entry[n] == e;
    return count;
}

/* columns = P, token_value = sum_e (above - taken)(P - thr); taken: the entries of the token. */
static void fill_threshold(void *argument, int64_t begin, int64_t end)
{
    const moe__losses_job *job = argument;
    const moe__route_job *route = job->route;
    int64_t E = job->plan->num_experts;
    for (int64_t t = begin; t < end; t++) {
        real *row = (real *)job->columns + t * E;
        double value = 0;
        if (clear_if_masked(job, t, row)) continue;
        softmax(row, (const real *)route->level[0].logits + t * E, E);
        for (int64_t e = 0; e < E; e++) {
            double over = (double)row[e] - (double)vector_at(&route->threshold, e);
            int64_t above = row[e] > vector_at(&route->threshold, e);
            value += (double)(above - entries_at(route, t, e)) * over;
        }
        job->token_value[t] = value;
    }
}

/* ---- the losses ------------------------------------------------------------------------------ */

static int64_t valid_in_group(const moe__losses_job *job, int64_t g)
{
    return job->valid_begin[g + 1] - job->valid_begin[g];
}

static double nonempty_groups(const moe__losses_job *job)
{
    double count = 0;
    for (int64_t g = 0; g < job->plan->groups; g++) count += valid_in_group(job, g) > 0;
    return count;
}

/* counts[G,E], and first[G,E] (may be NULL), of the tokens of each group. */
static void count_by_group(const moe__losses_job *job, const int32_t *plain, int64_t *counts,
                           int64_t *first)
{
    const moe__plan_arrays *plan = job->plan;
    int64_t E = plan->num_experts, K = job->route->config->top_k;
    for (int64_t i = 0; i < plan->groups * E; i++) {
        counts[i] = 0;
        if (first) first[i] = 0;
    }
    for (int64_t g = 0; g < plan->groups; g++)
        for (int64_t t = plan->group_begin[g]; t < plan->group_begin[g + 1]; t++) {
            if (is_masked(job->route->token_mask, t)) continue;
            const int32_t *ids = plain ? plain + t * K
                                       : job->route->expert_of_entry + plan->token_begin[t];
            int64_t n = plain ? K : plan->token_begin[t + 1] - plan->token_begin[t];
            if (first && n > 0 && ids[0] >= 0) first[g * E + ids[0]]++;
            for (int64_t j = 0; j < n; j++)
                if (ids[j] >= 0) counts[g * E + ids[j]]++;
        }
}

/* sequence_scale_g = E / (sum(n_g) T_g groups): what n_ge sum_t s_te/sum(s_t) is multiplied by. 0
 * for an empty group. */
static void sequence_scales(const moe__losses_job *job)
{
    int64_t E = job->plan->num_experts;
    for (int64_t g = 0; g < job->plan->groups; g++) {
        double entries = (double)sum_counts(job->sequence_counts + g * E, E);
        double tokens = (double)valid_in_group(job, g);
        bool empty = entries <= 0 || tokens <= 0;
        job->sequence_scale[g] = empty ? 0 : (double)E / entries / tokens / job->groups;
    }
}

static double sequence_loss(const moe__losses_job *job)
{
    int64_t E = job->plan->num_experts;
    double loss = 0;
    for (int64_t g = 0; g < job->plan->groups; g++) {
        double sum = 0;
        for (int64_t i = g * E; i < (g + 1) * E; i++)
            sum += (double)job->sequence_counts[i] * job->sequence_sum[i];
        loss += job->sequence_scale[g] * sum;
    }
    return loss;
}

/* Unmasked tokens of a scope, and the share of its mean in the loss. */
static double scope_tokens(const moe__losses_job *job, int64_t scope)
{
    return !job->scoped ? job->tokens : (double)valid_in_group(job, scope);
}
static double scope_share(const moe__losses_job *job)
{
    double groups = !job->scoped ? 1 : job->groups;
    return groups > 0 ? 1 / groups : 0;
}

/* What n_e sum_t P_te is multiplied by: in switch E / (sum(n) T), in gshard (of f_e) E / T^2. */
static double switch_scale(const moe__losses_job *job, int64_t scope)
{
    int64_t E = job->plan->num_experts;
    double entries = (double)sum_counts(job->scope_counts + scope * E, E);
    double tokens = scope_tokens(job, scope);
    return entries > 0 && tokens > 0 ? scope_share(job) * ((double)E / entries / tokens) : 0;
}
static double gshard_scale(const moe__losses_job *job, int64_t scope)
{
    double tokens = scope_tokens(job, scope), E = (double)job->plan->num_experts;
    return tokens > 0 ? scope_share(job) * (E / tokens / tokens) : 0;
}

static double weighted_sum(const int64_t *counts, const double *sums, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)counts[i] * sums[i];
    return sum;
}

static moe_status softmax_sums(moe__losses_job *job)
{
    bool by_group = job->scoped;
    MOE_TRY(fill_columns(job, fill_softmax));
    MOE_TRY(MOE_KERNEL(sum_columns)(job, &job->route->level[0], by_group ? NULL : job->score_sum,
                                    by_group ? job->score_sum : NULL));
    if (by_group) count_by_group(job, NULL, job->scope_counts, job->scope_first);
    job->z_sum = MOE_KERNEL(sum_tokens)(job);
    return MOE_OK;
}

static void softmax_losses(moe__losses_job *job)
{
    double *value = job->value;
    int64_t E = job->plan->num_experts;
    for (int64_t s = 0; s < job->scopes; s++) {
        const double *sum = job->score_sum + s * E;
        value[MOE_LOSS_SWITCH] += switch_scale(job, s) *
                                  weighted_sum(job->scope_counts + s * E, sum, E);
        value[MOE_LOSS_GSHARD] += gshard_scale(job, s) *
                                  weighted_sum(job->scope_first + s * E, sum, E);
    }
    if (job->tokens > 0) value[MOE_LOSS_Z] = job->z_sum / job->tokens;
}

static void count_above_range(void *argument, int64_t begin, int64_t end)
{
    const moe__losses_job *job = argument;
    const moe__route_job *route = job->route;
    int64_t E = job->plan->num_experts;
    for (int64_t e = begin; e < end; e++) job->over_taken[e] = job->counts[e];
    for (int64_t t = 0; t < job->plan->tokens; t++) {
        if (is_masked(route->token_mask, t)) continue;
        const real *p = (const real *)job->columns + t * E;
        for (int64_t e = begin; e < end; e++)
            job->over_taken[e] -= p[e] > vector_at(&route->threshold, e);
    }
}

static moe_status threshold_sums(moe__losses_job *job)
{
    const moe__workers *w = &job->route->workers;
    MOE_TRY(fill_columns(job, fill_threshold));
    job->threshold_sum = MOE_KERNEL(sum_tokens)(job);
    return moe__parallel_range(w->context, job->plan->num_experts, 64, count_above_range, job,
                               w->function);
}

/* Load of the levels. */
static moe_status load_sums(const moe__losses_job *job)
{
    const moe__gate_level *first = &job->route->level[0], *second = &job->route->level[1];
    if (!first->kth) return MOE_OK;
    if (job->route->levels == 1) return MOE_KERNEL(level_load)(job, first, job->load);
    MOE_TRY(MOE_KERNEL(level_load)(job, first, job->primary_load));
    for (int64_t i = 0; i < first->width; i++)
        job->part_rows[i] = (double)(second->part_begin[i + 1] - second->part_begin[i]);
    return MOE_KERNEL(level_load)(job, second, job->part_load);
}

/* load_ij = load_i load(X_i)_j / |X_i| */
static void join_loads(const moe__losses_job *job)
{
    int64_t width = job->route->level[1].width;
    if (!job->route->level[0].kth || job->route->levels == 1) return;
    for (int64_t i = 0; i < job->plan->num_experts / width; i++) {
        double rows = job->part_rows[i], first = job->primary_load[i];
        for (int64_t e = i * width; e < (i + 1) * width; e++)
            job->load[e] = rows == 0 ? 0 : first * job->part_load[e] / rows;
    }
}

static bool has_softmax_losses(const moe__losses_job *job)
{
    const double *weight = job->weights;
    return weight[MOE_LOSS_SWITCH] != 0 || weight[MOE_LOSS_GSHARD] != 0 || weight[MOE_LOSS_Z] != 0;
}

/* Of a call without logits, whose tokens are in none of these sums: other ranks may have them. */
static void no_score_sums(const moe__losses_job *job)
{
    int64_t E = job->plan->num_experts;
    for (int64_t i = 0; job->score_sum && i < job->scopes * E; i++) job->score_sum[i] = 0;
    if (job->score_sum && job->scoped)
        count_by_group(job, NULL, job->scope_counts, job->scope_first);
    for (int64_t i = 0; job->sequence_sum && i < job->plan->groups * E; i++)
        job->sequence_sum[i] = 0, job->sequence_counts[i] = 0;
}

/* What is summed over tokens. */
static moe_status sums(moe__losses_job *job)
{
    const double *weight = job->weights;
    job->z_sum = job->threshold_sum = 0;
    job->tokens = (double)job->valid_begin[job->plan->groups];
    job->groups = nonempty_groups(job);
    count_entries(job);
    for (int64_t e = 0; e < job->plan->num_experts; e++) {
        job->load[e] = (double)job->counts[e];
        job->rows_of_expert[e] = job->plan->expert_begin[e + 1] - job->plan->expert_begin[e];
    }
    job->rows = (double)(job->plan->expert_begin[job->plan->num_experts] -
                         job->plan->expert_begin[0]);
    job->with_logits = job->route->level[0].logits != NULL;
    if (job->share && !job->route->level[0].logits) no_score_sums(job);
    if (job->route->level[0].logits) {
        if (has_softmax_losses(job)) MOE_TRY(softmax_sums(job));
        if (weight[MOE_LOSS_SEQUENCE] != 0) {
            MOE_TRY(fill_columns(job, fill_sequence));
            MOE_TRY(MOE_KERNEL(sum_columns)(job, &job->route->level[0], NULL, job->sequence_sum));
            count_by_group(job, job->plain_ids, job->sequence_counts, NULL);
        }
        if (weight[MOE_LOSS_THRESHOLD] != 0 && job->over_taken) MOE_TRY(threshold_sums(job));
        MOE_TRY(load_sums(job));
    }
    return MOE_KERNEL(sum_entropy)(job);
}

/* value[] of the sums. */
static moe_status losses(moe__losses_job *job)
{
    const double *weight = job->weights;
    int32_t ddof = job->route->config->cv_ddof;
    int64_t E = job->plan->num_experts;
    bool sequence = weight[MOE_LOSS_SEQUENCE] != 0;
    if (has_softmax_losses(job)) softmax_losses(job);
    if (sequence) {
        sequence_scales(job);
        job->value[MOE_LOSS_SEQUENCE] = sequence_loss(job);
    }
    if (job->share && (sequence || job->scoped)) MOE_TRY(job->share(job, true));
    job->value[MOE_LOSS_THRESHOLD] = job->threshold_sum;
    if (weight[MOE_LOSS_IMPORTANCE] != 0)
        job->value[MOE_LOSS_IMPORTANCE] = moe__cv2(job->importance, E, ddof, 0, NULL);
    if (weight[MOE_LOSS_LOAD] != 0 && job->route->level[0].kth)
        job->value[MOE_LOSS_LOAD] = moe__cv2(job->load, E, ddof, 0, NULL);
    return MOE_OK;
}

moe_status MOE_KERNEL(losses_forward)(moe__losses_job *job)
{
    for (int64_t i = 0; i < MOE_LOSS_SLOTS; i++) job->value[i] = 0;
    MOE_TRY(sums(job));
    if (job->share) MOE_TRY(job->share(job, false));
    join_loads(job);
    if (job->with_logits > 0) MOE_TRY(losses(job));
    for (int64_t i = 0; i < MOE_LOSS_SLOTS; i++)
        job->value[i] = job->weights[i] != 0 ? job->weights[i] * job->value[i] : 0;
    MOE_KERNEL(statistics)(job);
    return MOE_OK;
}

moe_status MOE_KERNEL(write_results)(const moe__losses_job *job, void *losses_out, void *stats_out)
{
    for (int64_t i = 0; losses_out && i < MOE_LOSS_SLOTS; i++)
        ((real *)losses_out)[i] = (real)job->value[i];
    for (int64_t i = 0; stats_out && i < MOE_STAT_SLOTS; i++)
        ((real *)stats_out)[i] = (real)job->stats[i];
    return MOE_OK;
}

/* ---- backward -------------------------------------------------------------------------------- */

/* The gradients by the levels' loads: load_ij = P_i S_ij / n_i gives
 * dS_ij = d_load_ij P_i / n_i,  dP_i = sum_j d_load_ij S_ij / n_i. */
static void split_load(const moe__gate_backward_job *job)
{
    const moe__losses_job *losses = job->losses;
    const moe__gate_level *first = &losses->route->level[0], *second = &losses->route->level[1];
    int64_t E = losses->plan->num_experts;
    for (int64_t e = 0; losses->route->levels == 1 && first->d_load && e < E; e++)
        first->d_load[e] = job->d_load[e];
    for (int64_t i = 0; losses->route->levels == 2 && i < first->width; i++) {
        double rows = losses->part_rows[i];
        first->d_load[i] = 0;
        for (int64_t e = i * second->width; e < (i + 1) * second->width; e++) {
            double d = rows > 0 ? job->d_load[e] / rows : 0;
            second->d_load[e] = d * losses->primary_load[i];
            first->d_load[i] += d * losses->part_load[e];
        }
    }
}

void MOE_KERNEL(losses_backward_prepare)(const moe__gate_backward_job *job)
{
    const moe__losses_job *losses = job->losses;
    int32_t ddof = losses->route->config->cv_ddof;
    int64_t E = losses->plan->num_experts;
    const double *factor = job->loss_factor;
    if (factor[MOE_LOSS_IMPORTANCE] != 0)
        (void)moe__cv2(losses->importance, E, ddof, factor[MOE_LOSS_IMPORTANCE], job->d_importance);
    if (factor[MOE_LOSS_LOAD] != 0) {
        (void)moe__cv2(losses->load, E, ddof, factor[MOE_LOSS_LOAD], job->d_load);
        split_load(job);
    }
    if (factor[MOE_LOSS_SWITCH] == 0 && factor[MOE_LOSS_GSHARD] == 0 && factor[MOE_LOSS_Z] == 0)
        return;
    for (int64_t s = 0; s < losses->scopes; s++) {
        double by_switch = factor[MOE_LOSS_SWITCH] * switch_scale(losses, s);
        double by_gshard = factor[MOE_LOSS_GSHARD] * gshard_scale(losses, s);
        for (int64_t i = s * E; i < (s + 1) * E; i++)
            ((real *)job->d_score)[i] = (real)(by_switch * (double)losses->scope_counts[i] +
                                               by_gshard * (double)losses->scope_first[i]);
    }
}

static int64_t group_of_token(const moe__plan_arrays *plan, int64_t t)
{
    return run_of(plan->group_begin, plan->groups, t);
}

/* switch, gshard: dP_i = d_score_i, d_clean_i += P_i (dP_i - sum_j P_j dP_j);
 * z: d_clean_i += factor 2 lse / T P_i. */
static void softmax_losses_row(const moe__gate_backward_job *job, int64_t t, const real *clean,
                               real *d_clean, real *p)
{
    const moe__losses_job *losses = job->losses;
    int64_t E = losses->plan->num_experts;
    int64_t scope = !losses->scoped ? 0 : group_of_token(losses->plan, t);
    const real *d_score = (const real *)job->d_score + scope * E;
    real max, sum = exp_shifted(p, clean, E, &max);
    double lse = (double)max + (double)r_log(sum);
    double by_z = job->loss_factor[MOE_LOSS_Z] * 2 * lse / losses->tokens;
    for (int64_t i = 0; i < E; i++) p[i] = p[i] / sum;
    real dot = lane_dot(p, d_score, E);
    real rest = (real)(by_z - (double)dot);
    for (int64_t i = 0; i < E; i++) d_clean[i] = r_fma(p[i], d_score[i] + rest, d_clean[i]);
}

/* r = s / sum(s), dr_i = c n_gi:  ds_i = (dr_i - sum_j r_j dr_j) / sum(s), then s' = s (1 - s); for
 * softmax d_clean_i += r_i (dr_i - sum_j r_j dr_j). */
static void sequence_loss_row(const moe__gate_backward_job *job, int64_t t, const real *clean,
                              real *d_clean, real *r)
{
    const moe__losses_job *losses = job->losses;
    const moe_gate_config *c = losses->route->config;
    int64_t E = c->num_experts, g = group_of_token(losses->plan, t);
    const int64_t *counts = losses->sequence_counts + g * E;
    real scale = (real)(job->loss_factor[MOE_LOSS_SEQUENCE] * losses->sequence_scale[g]);
    real sum = normalized_scores(c, r, clean), lanes[16] = {R(0.0)};
    for (int64_t i = 0; i < E; i++)
        lanes[i % 16] = r_fma(r[i], scale * (real)counts[i], lanes[i % 16]);
    real dot = lane_sum(lanes, 16);
    for (int64_t i = 0; i < E; i++) {
        real d = scale * (real)counts[i] - dot;
        real slope = c->sequence_score == MOE_SCORE_SOFTMAX ? r[i] : r[i] * (R(1.0) - r[i] * sum);
        d_clean[i] = r_fma(d, slope, d_clean[i]);
    }
}

/* dP_e = factor (above - taken), masks constant:  d_clean_i += P_i (dP_i - sum_j P_j dP_j). */
static void threshold_loss_row(const moe__gate_backward_job *job, int64_t t, const real *clean,
                               real *d_clean, real *p)
{
    const moe__route_job *route = job->losses->route;
    int64_t E = job->losses->plan->num_experts;
    real factor = (real)job->loss_factor[MOE_LOSS_THRESHOLD], lanes[16] = {R(0.0)};
    softmax(p, clean, E);
    for (int32_t turn = 0; turn < 2; turn++) {
        real dot = turn ? lane_sum(lanes, 16) : R(0.0);
        for (int64_t e = 0; e < E; e++) {
            int64_t above = p[e] > vector_at(&route->threshold, e);
            real d = factor * (real)(above - entries_at(route, t, e));
            if (turn)
                d_clean[e] = r_fma(p[e], d - dot, d_clean[e]);
            else
                lanes[e % 16] = r_fma(p[e], d, lanes[e % 16]);
        }
    }
}

void MOE_KERNEL(losses_backward_row)(const moe__gate_backward_job *job, int64_t token,
                                     real *d_clean, real *p)
{
    const double *factor = job->loss_factor;
    const moe__gate_level *level = &job->losses->route->level[0];
    const real *clean = (const real *)level->logits + token * level->width;
    if (factor[MOE_LOSS_SWITCH] != 0 || factor[MOE_LOSS_GSHARD] != 0 || factor[MOE_LOSS_Z] != 0)
        softmax_losses_row(job, token, clean, d_clean, p);
    if (factor[MOE_LOSS_SEQUENCE] != 0) sequence_loss_row(job, token, clean, d_clean, p);
    if (factor[MOE_LOSS_THRESHOLD] != 0 && job->losses->over_taken)
        threshold_loss_row(job, token, clean, d_clean, p);
}
