/* batch.cu - what is known of a batch before anything is computed: where the entries of each token
 * and the tokens of each group begin, the mask, the unmasked tokens, the room in each group. As
 * src/cpu/batch.c.
 *
 * The host's group_begin travels as arguments of kernels, a few hundred groups a launch. */
#include "scan.h"

#include "capacity.h"
#include "elements.h"

enum { TILE = 1024 }; /* tokens of a block */

/* Some of the host's groups: begin[i] of group first + i. */
enum { GROUPS = 256 };
struct moe_some_groups {
    int64_t first, count;
    int64_t begin[GROUPS];
};

static void take_groups(moe_some_groups *some, const moe__batch_job *job, int64_t first)
{
    memset(some, 0, sizeof *some);
    some->first = first;
    some->count = moe__min(job->groups + 1 - first, GROUPS);
    for (int64_t i = 0; i < some->count; i++)
        some->begin[i] = job->group_begin ? job->group_begin[first + i] : (first + i) * job->tokens;
}

/* What of a call and its gate says how much room there is, and nothing else of them. */
struct moe_capacity_rule {
    moe_gate_config config;
    int64_t capacity, train;
};

static moe_capacity_rule rule_of(const moe__batch_job *job)
{
    const moe_gate_config *c = job->config;
    moe_capacity_rule rule;
    memset(&rule, 0, sizeof rule);
    if (!job->group_capacity) return rule;
    rule.config.num_experts = c->num_experts;
    rule.config.top_k = c->top_k;
    rule.config.top_groups = c->top_groups;
    rule.config.kind = c->kind;
    rule.config.capacity_kind = c->capacity_kind;
    rule.config.capacity_rounding = c->capacity_rounding;
    rule.config.capacity = c->capacity;
    rule.config.capacity_factor = c->capacity_factor;
    rule.config.capacity_factor_eval = c->capacity_factor_eval;
    rule.config.capacity_minimum = c->capacity_minimum;
    rule.config.capacity_multiple = c->capacity_multiple;
    rule.capacity = job->capacity;
    rule.train = job->train;
    return rule;
}

/* ---- the arrays of the batch ----------------------------------------------------------------- */

MOE_GLOBAL(256) moe_batch_groups(moe_some_groups some, int64_t *group_begin, int64_t *primary)
{
    int64_t i = threadIdx.x;
    if (i >= some.count) return;
    group_begin[some.first + i] = some.begin[i];
    if (primary) primary[some.first + i] = some.begin[i];
}

/* out[i] = i factor, i < count */
MOE_GLOBAL(256) moe_batch_multiples(int64_t *out, int64_t count, int64_t factor)
{
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i < count) out[i] = i * factor;
}

/* mask, and the unmasked tokens of each tile; without a token_mask all are valid, in order. */
MOE_GLOBAL(1024)
moe_batch_mask(const uint8_t *token_mask, int64_t tokens, uint8_t *mask, int64_t *valid_token,
               int64_t *count)
{
    MOE_SHARED(int64_t, warp_sum, 32);
    int64_t t = (int64_t)blockIdx.x * TILE + threadIdx.x, all;
    bool valid = t < tokens && (!token_mask || token_mask[t]);
    if (t < tokens) mask[t] = valid;
    if (!token_mask) {
        if (valid) valid_token[t] = t;
        return;
    }
    moe_block_scan(valid, TILE, warp_sum, &all);
    if (threadIdx.x == 0) count[blockIdx.x] = all;
}

/* valid_token behind `before` of earlier tiles */
MOE_GLOBAL(1024)
moe_batch_valid(const uint8_t *mask, int64_t tokens, const int64_t *before, int64_t *valid_token)
{
    MOE_SHARED(int64_t, warp_sum, 32);
    int64_t t = (int64_t)blockIdx.x * TILE + threadIdx.x, all;
    bool valid = t < tokens && mask[t];
    int64_t rank = moe_block_scan(valid, TILE, warp_sum, &all);
    if (valid) valid_token[before[blockIdx.x] + rank] = t;
}

/* How many of the ascending list [count] are below t. */
MOE_DEVICE int64_t moe_count_below(const int64_t *list, int64_t count, int64_t t)
{
    int64_t low = 0, high = count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (list[middle] < t)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* valid_begin [G+1] and group_capacity [G] or NULL; count: of unmasked tokens, NULL: no mask */
MOE_GLOBAL(256)
moe_batch_capacity(const int64_t *group_begin, int64_t groups, const int64_t *valid_token,
                   const int64_t *count, moe_capacity_rule rule, int64_t *valid_begin,
                   int64_t *group_capacity)
{
    int64_t g = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (g > groups) return;
    int64_t begin = group_begin[g], end = group_begin[g < groups ? g + 1 : g];
    if (count) {
        begin = moe_count_below(valid_token, *count, begin);
        end = moe_count_below(valid_token, *count, end);
    }
    valid_begin[g] = begin;
    if (group_capacity && g < groups)
        group_capacity[g] = moe__capacity_of_group(&rule.config, rule.capacity, end - begin,
                                                   (int32_t)rule.train);
}

static dim3 blocks_of(int64_t count, int64_t size)
{
    return dim3((unsigned)((count + size - 1) / size));
}

static moe_status multiples(const moe__batch_job *job, int64_t *out, int64_t count, int64_t factor)
{
    return moe__cuda_launch(&job->workers, "batch", moe_batch_multiples, blocks_of(count, 256),
                            dim3(256), 0, out, count, factor);
}

static moe_status write_groups(const moe__batch_job *job)
{
    int64_t *primary = job->primary ? job->primary->group_begin : NULL, end = job->groups + 1;
    if (job->given) {
        if (!primary) return MOE_OK;
        cudaError_t error = cudaMemcpyAsync(primary, job->plan->group_begin,
                                            (size_t)end * sizeof *primary, cudaMemcpyDeviceToDevice,
                                            (cudaStream_t)job->workers.stream);
        return error == cudaSuccess ? MOE_OK : moe__cuda_status(error, &job->workers, "batch");
    }
    for (int64_t g = 0; g < end; g += GROUPS) {
        moe_some_groups some;
        take_groups(&some, job, g);
        MOE_TRY(moe__cuda_launch(&job->workers, "batch", moe_batch_groups, dim3(1), dim3(256), 0,
                                 some, job->plan->group_begin, primary));
    }
    return MOE_OK;
}

/* mask, valid_token; *count is where their number is, or NULL: all. */
static moe_status write_mask(const moe__batch_job *job, const int64_t **count)
{
    const moe__workers *workers = &job->workers;
    int64_t tiles = (job->tokens + TILE - 1) / TILE;
    int64_t *total = (int64_t *)workers->scratch, *before = total + 1;
    dim3 grid = blocks_of(job->tokens, TILE), block(TILE);
    *count = job->token_mask && tiles > 0 ? total : NULL;
    if (tiles == 0) return MOE_OK;
    MOE_TRY(moe__cuda_launch(workers, "batch", moe_batch_mask, grid, block, 0, job->token_mask,
                             job->tokens, job->mask, job->valid_token, before));
    if (!job->token_mask) return MOE_OK;
    MOE_TRY(moe__cuda_scan(workers, before, tiles, before + tiles, total));
    return moe__cuda_launch(workers, "batch", moe_batch_valid, grid, block, 0, job->mask,
                            job->tokens, before, job->valid_token);
}

extern "C" int64_t moe__cuda_batch_scratch(const moe__pass_shape *shape)
{
    int64_t tiles = shape ? shape->tokens / TILE + 1 : 0;
    int64_t words = 1 + tiles + moe_scan_sums(tiles);
    return (words * (int64_t)sizeof(int64_t) + 63) & ~(int64_t)63;
}

extern "C" moe_status moe__cuda_batch_forward(moe__batch_job *job)
{
    const int64_t *count;
    moe_capacity_rule rule = rule_of(job);
    MOE_TRY(write_groups(job));
    if (!job->given)
        MOE_TRY(multiples(job, job->plan->token_begin, job->tokens + 1, job->entries_per_token));
    if (job->primary) {
        MOE_TRY(multiples(job, job->primary->token_begin, job->tokens + 1, job->primary_per_token));
        MOE_TRY(multiples(job, job->second_begin, job->primary->entries + 1, job->second_per_row));
    }
    MOE_TRY(write_mask(job, &count));
    return moe__cuda_launch(&job->workers, "batch", moe_batch_capacity,
                            blocks_of(job->groups + 1, 256), dim3(256), 0, job->plan->group_begin,
                            job->groups, job->valid_token, count, rule, job->valid_begin,
                            job->group_capacity);
}

/* ---- entries of experts that take tokens ----------------------------------------------------- */

/* *total = E times the sum of min(group_capacity, unmasked tokens): one block */
MOE_GLOBAL(1024)
moe_batch_taken(const int64_t *valid_begin, const int64_t *group_capacity, int64_t groups,
                int64_t num_experts, int64_t *total)
{
    MOE_SHARED(int64_t, warp_sum, 32);
    int64_t rows = 0, all;
    for (int64_t g = threadIdx.x; g < groups; g += 1024) {
        int64_t tokens = valid_begin[g + 1] - valid_begin[g];
        rows += group_capacity[g] < tokens ? group_capacity[g] : tokens;
    }
    moe_block_scan(rows, 1024, warp_sum, &all);
    if (threadIdx.x == 0) *total = all * num_experts;
}

extern "C" moe_status moe__cuda_entries_taken(const moe__batch_job *job, int64_t *entries)
{
    const moe__workers *workers = &job->workers;
    int64_t *total = (int64_t *)workers->scratch, E = job->config->num_experts;
    *entries = moe__mul(job->tokens, E); /* the most; -1: does not fit */
    if (*entries <= 0) return MOE_OK;
    MOE_TRY(moe__cuda_launch(workers, "entries_taken", moe_batch_taken, dim3(1), dim3(1024), 0,
                             job->valid_begin, job->group_capacity, job->groups, E, total));
    return moe__cuda_fetch(workers, entries, total, sizeof *entries);
}

/* ---- every token to every expert ------------------------------------------------------------- */

MOE_GLOBAL(256)
moe_everyone_entries(int32_t *expert_of_entry, float *weight, int64_t entries, int64_t num_experts)
{
    int64_t n = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (n >= entries) return;
    expert_of_entry[n] = (int32_t)(n % num_experts);
    weight[n] = 1.0f;
}

extern "C" moe_status moe__cuda_everyone_forward(const moe__workers *workers,
                                                 moe__plan_arrays *plan)
{
    int64_t E = plan->num_experts, tokens = plan->tokens + 1;
    MOE_TRY(moe__cuda_launch(workers, "everyone", moe_batch_multiples, blocks_of(tokens, 256),
                             dim3(256), 0, plan->token_begin, tokens, E));
    if (plan->entries == 0) return MOE_OK;
    return moe__cuda_launch(workers, "everyone", moe_everyone_entries,
                            blocks_of(plan->entries, 256), dim3(256), 0, plan->expert_of_entry,
                            (float *)plan->weight_of_entry, plan->entries, E);
}
