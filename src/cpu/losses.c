/* losses.c - importance, load, the auxiliary losses and the statistics, and the losses' gradients.
 *
 *     importance_e = sum_t w_te            load_e = sum_t Phi((clean_e - thr_e) / sd_e)
 *     P = softmax(clean),  p_e = mean_t P_te,  n_e entries of expert e,  f_e first choices
 *     switch = E sum_e n_e/sum(n) p_e      gshard = E sum_e f_e/T p_e      z = mean_t
 *     lse(clean_t)^2
 *     sequence = mean over groups of E sum_e n_ge/sum(n_g) mean_{t in g} s_te / sum_j s_tj
 *
 * thr_e is the K-th largest of H without entry e: the best other expert's H for a chosen e, the
 * worst chosen one's for the rest. Sums over tokens are formed in double, token by token within a
 * group, then group by group. T counts the unmasked tokens; a masked token's row of `columns` is
 * 0. */
#include "cpu/route.h"
#include "cpu/select.h"
#include "cv.h"

#define SQRT_2 R(1.41421356237309504880)
#define ONE_OVER_SQRT_PI R(0.56418958354775628695)

/* Which group a token is in. */
static int64_t group_of_token(const moe__plan_arrays *plan, int64_t t)
{
    int64_t low = 0, high = plan->groups - 1;
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        if (plan->group_begin[middle] <= t)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

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

/* ---- sums over the columns of [T,E] ---------------------------------------------------------- */

typedef struct column_sums {
    const moe__losses_job *job;
    double *total;    /* [E] over all groups, or NULL */
    double *by_group; /* [G,E], or NULL */
} column_sums;

static void column_sums_range(void *argument, int64_t begin, int64_t end)
{
    enum { WIDTH = 32 };
    const column_sums *sums = argument;
    const moe__plan_arrays *plan = sums->job->plan;
    int64_t E = plan->num_experts;
    for (int64_t e = begin; e < end; e += WIDTH) {
        int64_t width = moe__min(WIDTH, end - e);
        double total[WIDTH] = {0};
        for (int64_t g = 0; g < plan->groups; g++) {
            double of_group[WIDTH] = {0};
            for (int64_t t = plan->group_begin[g]; t < plan->group_begin[g + 1]; t++) {
                const real *row = (const real *)sums->job->columns + t * E + e;
                for (int64_t i = 0; i < width; i++) of_group[i] += (double)row[i];
            }
            for (int64_t i = 0; i < width; i++) {
                total[i] += of_group[i];
                if (sums->by_group) sums->by_group[g * E + e + i] = of_group[i];
            }
        }
        for (int64_t i = 0; i < width && sums->total; i++) sums->total[e + i] = total[i];
    }
}

/* Runs `fill` for every token's row of columns, then sums the columns. */
static moe_status sum_columns(const moe__losses_job *job, moe__range_fn fill, double *total,
                              double *by_group)
{
    const moe__workers *w = &job->route->workers;
    column_sums sums = {job, total, by_group};
    MOE_TRY(moe__parallel_range(w->context, job->plan->tokens, 16, fill, (void *)(uintptr_t)job,
                                w->function));
    return moe__parallel_range(w->context, job->plan->num_experts, 32, column_sums_range, &sums,
                               w->function);
}

/* Sum of token_value in canonical order. */
static double sum_tokens(const moe__losses_job *job)
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
        real sum = exp_shifted(row, (const real *)job->route->logits + t * E, E, &max);
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
        const real *logits = (const real *)job->route->logits + t * E;
        real *row = (real *)job->columns + t * E;
        if (clear_if_masked(job, t, row)) continue;
        normalized_scores(job->route->config, row, logits);
        if (job->plain_ids) select_top(job->plain_ids + t * K, K, logits, E);
    }
}

/* d_e = clean_e - thr_e for the experts of one token. Returns 0 if there are no thresholds, because
 * every expert was chosen or none. */
static int distances(const moe__losses_job *job, int64_t t, real *d)
{
    const moe__route_job *route = job->route;
    const int32_t *ids = route->expert_of_entry, *kth = route->kth + 2 * t;
    int64_t E = job->plan->num_experts;
    const real *clean = (const real *)route->logits + t * E;
    const real *h = (const real *)route->noisy + t * E;
    if (kth[0] < 0 || kth[1] < 0) return 0;
    for (int64_t i = 0; i < E; i++) d[i] = clean[i] - h[kth[0]];
    for (int64_t n = route->token_begin[t]; n < route->token_begin[t + 1]; n++)
        if (ids[n] >= 0) d[ids[n]] = clean[ids[n]] - h[kth[1]];
    return 1;
}

/* The quotient inside erf: d / (sqrt(2) sd + guard); a step where that divisor is 0. */
static inline real quotient(real d, real sd, real guard)
{
    real divisor = r_fma(SQRT_2, sd, guard);
    real step = d > R(0.0) ? R(10.0) : d < R(0.0) ? R(-10.0) : R(0.0); /* erf(10) = 1 */
    return divisor > R(0.0) ? d / divisor : step;
}

/* columns = Phi((clean - thr) / sd); where all experts are chosen: 1 if the weight is not 0. */
static void fill_load(void *argument, int64_t begin, int64_t end)
{
    const moe__losses_job *job = argument;
    const moe__route_job *route = job->route;
    int64_t E = job->plan->num_experts;
    real guard = (real)route->config->cdf_guard;
    for (int64_t t = begin; t < end; t++) {
        real *row = (real *)job->columns + t * E;
        const real *sd = route->noise ? (const real *)route->noise_std + t * E : NULL;
        if (clear_if_masked(job, t, row)) continue;
        if (distances(job, t, row)) {
            for (int64_t i = 0; i < E; i++)
                row[i] = R(0.5) + R(0.5) * r_erf(quotient(row[i], sd ? sd[i] : R(0.0), guard));
            continue;
        }
        for (int64_t i = 0; i < E; i++) row[i] = R(0.0);
        for (int64_t n = route->token_begin[t]; n < route->token_begin[t + 1]; n++)
            if (route->expert_of_entry[n] >= 0 && ((const real *)route->weight)[n] > R(0.0))
                row[route->expert_of_entry[n]] = R(1.0);
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

static void sequence_counts(const moe__losses_job *job)
{
    const moe__plan_arrays *plan = job->plan;
    int64_t E = plan->num_experts, K = job->route->config->top_k;
    for (int64_t g = 0; g < plan->groups; g++) {
        int64_t *counts = job->sequence_counts + g * E;
        for (int64_t e = 0; e < E; e++) counts[e] = 0;
        for (int64_t t = plan->group_begin[g]; t < plan->group_begin[g + 1]; t++) {
            if (is_masked(job->route->token_mask, t)) continue;
            const int32_t *ids = job->plain_ids
                                     ? job->plain_ids + t * K
                                     : job->route->expert_of_entry + plan->token_begin[t];
            int64_t n = job->plain_ids ? K : plan->token_begin[t + 1] - plan->token_begin[t];
            for (int64_t j = 0; j < n; j++)
                if (ids[j] >= 0) counts[ids[j]]++;
        }
    }
}

static int64_t sum_counts(const int64_t *counts, int64_t n)
{
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += counts[i];
    return sum;
}

/* sequence_scale_g = E / (sum(n_g) T_g groups): what n_ge sum_t s_te/sum(s_t) is multiplied by. 0 for an
 * empty group. */
static void sequence_scales(const moe__losses_job *job)
{
    int64_t E = job->plan->num_experts;
    double groups = nonempty_groups(job);
    for (int64_t g = 0; g < job->plan->groups; g++) {
        double entries = (double)sum_counts(job->sequence_counts + g * E, E);
        double tokens = (double)valid_in_group(job, g);
        bool empty = entries <= 0 || tokens <= 0;
        job->sequence_scale[g] = empty ? 0 : (double)E / entries / tokens / groups;
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

/* The unweighted factor of P_te's mean in switch (n_e / sum n) and gshard (f_e / T), times E /
 * T. */
static double switch_scale(const moe__losses_job *job)
{
    double entries = (double)sum_counts(job->counts, job->plan->num_experts);
    double tokens = (double)job->valid_tokens;
    return entries > 0 && tokens > 0 ? (double)job->plan->num_experts / entries / tokens : 0;
}

static double gshard_scale(const moe__losses_job *job)
{
    double tokens = (double)job->valid_tokens;
    return tokens > 0 ? (double)job->plan->num_experts / tokens / tokens : 0;
}

static double weighted_sum(const int64_t *counts, const double *sums, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)counts[i] * sums[i];
    return sum;
}

/* value[] from the logits; importance and load come from count_entries and here. */
static moe_status logit_losses(moe__losses_job *job)
{
    const double *weight = job->weights;
    double *value = job->value;
    int64_t E = job->plan->num_experts;
    if (weight[MOE_LOSS_SWITCH] != 0 || weight[MOE_LOSS_GSHARD] != 0 || weight[MOE_LOSS_Z] != 0) {
        MOE_TRY(sum_columns(job, fill_softmax, job->score_sum, NULL));
        value[MOE_LOSS_SWITCH] = switch_scale(job) * weighted_sum(job->counts, job->score_sum, E);
        value[MOE_LOSS_GSHARD] = gshard_scale(job) *
                                 weighted_sum(job->first_counts, job->score_sum, E);
        if (job->valid_tokens > 0) value[MOE_LOSS_Z] = sum_tokens(job) / (double)job->valid_tokens;
    }
    if (weight[MOE_LOSS_SEQUENCE] != 0) {
        MOE_TRY(sum_columns(job, fill_sequence, NULL, job->sequence_sum));
        sequence_counts(job);
        sequence_scales(job);
        value[MOE_LOSS_SEQUENCE] = sequence_loss(job);
    }
    if (job->route->kth) MOE_TRY(sum_columns(job, fill_load, job->load, NULL));
    return MOE_OK;
}

/* ---- statistics ------------------------------------------------------------------------------ */

/* token_value = entropy of a token's weights, normalised to sum 1 */
static void fill_entropy(void *argument, int64_t begin, int64_t end)
{
    const moe__losses_job *job = argument;
    const real *w = job->route->weight;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = job->plan->token_begin[t], last = job->plan->token_begin[t + 1];
        double sum = 0, entropy = 0;
        for (int64_t n = first; n < last; n++) sum += (double)w[n];
        for (int64_t n = first; n < last; n++) {
            double q = sum > 0 ? (double)w[n] / sum : 0;
            if (q > 0) entropy -= q * moe__log_f64(q);
        }
        job->token_value[t] = entropy;
    }
}

static moe_status statistics(const moe__losses_job *job)
{
    const moe__plan_arrays *plan = job->plan;
    const moe__workers *w = &job->route->workers;
    int32_t ddof = job->route->config->cv_ddof;
    int64_t E = plan->num_experts, most = 0;
    double *stats = job->stats, entries = (double)sum_counts(job->counts, E), entropy = 0;
    for (int64_t i = 0; i < MOE_STAT_SLOTS; i++) stats[i] = 0;
    for (int64_t e = 0; e < E; e++) {
        double share = entries > 0 ? (double)job->counts[e] / entries : 0;
        if (share > 0) entropy -= share * moe__log_f64(share);
        most = moe__max(most, job->counts[e]);
        stats[MOE_STAT_TOUCHED] += plan->expert_begin[e + 1] > plan->expert_begin[e];
    }
    stats[MOE_STAT_TOKENS] = (double)job->valid_tokens;
    stats[MOE_STAT_ENTRIES] = entries;
    stats[MOE_STAT_ROWS] = (double)plan->rows;
    stats[MOE_STAT_DROPPED] = entries - (double)plan->rows;
    stats[MOE_STAT_CV_IMPORTANCE] = __builtin_sqrt(moe__cv2(job->importance, E, ddof, 0, NULL));
    stats[MOE_STAT_CV_LOAD] = __builtin_sqrt(moe__cv2(job->load, E, ddof, 0, NULL));
    stats[MOE_STAT_MAX_OVER_MEAN] = entries > 0 ? (double)most * (double)E / entries : 0;
    stats[MOE_STAT_LOAD_ENTROPY] = entropy;
    MOE_TRY(moe__parallel_range(w->context, plan->tokens, 256, fill_entropy, (void *)(uintptr_t)job,
                                w->function));
    if (job->valid_tokens > 0)
        stats[MOE_STAT_GATE_ENTROPY] = sum_tokens(job) / (double)job->valid_tokens;
    return MOE_OK;
}

moe_status MOE_KERNEL(losses_forward)(moe__losses_job *job)
{
    int32_t ddof = job->route->config->cv_ddof;
    int64_t E = job->plan->num_experts;
    for (int64_t i = 0; i < MOE_LOSS_SLOTS; i++) job->value[i] = 0;
    count_entries(job);
    for (int64_t e = 0; e < E; e++) job->load[e] = (double)job->counts[e];
    if (job->route->logits) {
        MOE_TRY(logit_losses(job));
        job->value[MOE_LOSS_IMPORTANCE] = moe__cv2(job->importance, E, ddof, 0, NULL);
        if (job->route->kth) job->value[MOE_LOSS_LOAD] = moe__cv2(job->load, E, ddof, 0, NULL);
    }
    for (int64_t i = 0; i < MOE_LOSS_SLOTS; i++)
        job->value[i] = job->weights[i] != 0 ? job->weights[i] * job->value[i] : 0;
    return statistics(job);
}

/* ---- backward -------------------------------------------------------------------------------- */

/* d_importance, d_load: the gradients by importance and load. d_score: what P_te's gradient is. */
void MOE_KERNEL(losses_backward_prepare)(const moe__gate_backward_job *job)
{
    const moe__losses_job *losses = job->losses;
    int32_t ddof = losses->route->config->cv_ddof;
    int64_t E = losses->plan->num_experts;
    const double *factor = job->loss_factor;
    double by_switch = factor[MOE_LOSS_SWITCH] * switch_scale(losses);
    double by_gshard = factor[MOE_LOSS_GSHARD] * gshard_scale(losses);
    (void)moe__cv2(losses->importance, E, ddof, factor[MOE_LOSS_IMPORTANCE], job->d_importance);
    (void)moe__cv2(losses->load, E, ddof, factor[MOE_LOSS_LOAD], job->d_load);
    for (int64_t e = 0; e < E; e++)
        ((real *)job->d_score)[e] = (real)(by_switch * (double)losses->counts[e] +
                                           by_gshard * (double)losses->first_counts[e]);
}

/* switch, gshard: dP_i = d_score_i, d_clean_i += P_i (dP_i - sum_j P_j dP_j);
 * z: d_clean_i += factor 2 lse / T P_i. */
static void softmax_losses_row(const moe__gate_backward_job *job, const real *clean, real *d_clean,
                               real *p)
{
    int64_t E = job->losses->plan->num_experts;
    const real *d_score = job->d_score;
    real max, sum = exp_shifted(p, clean, E, &max);
    double lse = (double)max + (double)r_log(sum);
    double by_z = job->loss_factor[MOE_LOSS_Z] * 2 * lse / (double)job->losses->valid_tokens;
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

/* load_i = Phi(d_i / sd_i), d_i = clean_i - thr_i. With q the quotient inside erf, its divisor v
 * and a_i = d_load_i exp(-q^2) / (sqrt(pi) v):  d_clean_i += a_i,  d_sd_i -= a_i sqrt(2) q,  and
 * what each expert adds is taken from the H that is its threshold. Without noise the load is a
 * count. */
static void load_row(const moe__gate_backward_job *job, int64_t t, real *d_clean, real *d_noisy,
                     real *d_std, real *a)
{
    const moe__route_job *route = job->losses->route;
    const int32_t *ids = route->expert_of_entry, *kth = route->kth + 2 * t;
    int64_t E = job->losses->plan->num_experts;
    const real *sd = (const real *)route->noise_std + t * E;
    real guard = (real)route->config->cdf_guard, by_best_other = R(0.0);
    if (!distances(job->losses, t, a)) return;
    for (int64_t i = 0; i < E; i++) {
        real q = quotient(a[i], sd[i], guard), divisor = r_fma(SQRT_2, sd[i], guard);
        real density = (real)job->d_load[i] * (r_exp(-q * q) * ONE_OVER_SQRT_PI);
        real slope = sd[i] > R(0.0) ? density / divisor : R(0.0);
        a[i] = slope;
        d_clean[i] = d_clean[i] + slope;
        d_std[i] = r_fma(-SQRT_2 * q, slope, d_std[i]);
    }
    for (int64_t n = route->token_begin[t]; n < route->token_begin[t + 1]; n++) {
        if (ids[n] < 0) continue;
        by_best_other = by_best_other + a[ids[n]];
        a[ids[n]] = R(0.0);
    }
    d_noisy[kth[1]] = d_noisy[kth[1]] - by_best_other;
    d_noisy[kth[0]] = d_noisy[kth[0]] - lane_sum(a, E);
}

void MOE_KERNEL(losses_backward_row)(const moe__gate_backward_job *job, int64_t token,
                                     real *d_clean, real *d_noisy, real *d_std, real *p)
{
    const moe__route_job *route = job->losses->route;
    const double *factor = job->loss_factor;
    const real *clean = (const real *)route->logits + token * job->losses->plan->num_experts;
    const int32_t *ids = route->expert_of_entry;
    real *d_weight = job->d_weight;
    if (factor[MOE_LOSS_IMPORTANCE] != 0)
        for (int64_t n = route->token_begin[token]; n < route->token_begin[token + 1]; n++)
            if (ids[n] >= 0) d_weight[n] = d_weight[n] + (real)job->d_importance[ids[n]];
    if (factor[MOE_LOSS_SWITCH] != 0 || factor[MOE_LOSS_GSHARD] != 0 || factor[MOE_LOSS_Z] != 0)
        softmax_losses_row(job, clean, d_clean, p);
    if (factor[MOE_LOSS_SEQUENCE] != 0) sequence_loss_row(job, token, clean, d_clean, p);
    if (factor[MOE_LOSS_LOAD] != 0 && route->kth && route->noise)
        load_row(job, token, d_clean, d_noisy, d_std, p);
}
