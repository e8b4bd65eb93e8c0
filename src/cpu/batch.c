/* batch.c - what is known of a batch before anything is computed: the entries of tokens whose
 * number is fixed, the token groups, the mask, and the rows of an expert in each group. */
#include "capacity.h"
#include "cpu/kernels.h"

#include <string.h>

static void set_ranges(int64_t *begin, int64_t count, int64_t each)
{
    for (int64_t i = 0; i <= count; i++) begin[i] = i * each;
}

/* The mask, and the tokens that are not masked: valid_token, and where each group's begin. */
static void note_mask(const moe__batch_job *job)
{
    const moe__plan_arrays *plan = job->plan;
    int64_t count = 0;
    for (int64_t g = 0; g < plan->groups; g++) {
        job->valid_begin[g] = count;
        for (int64_t t = plan->group_begin[g]; t < plan->group_begin[g + 1]; t++) {
            job->mask[t] = !job->token_mask || job->token_mask[t];
            if (job->mask[t]) job->valid_token[count++] = t;
        }
    }
    job->valid_begin[plan->groups] = count;
}

static int64_t valid_in_group(const moe__batch_job *job, int64_t g)
{
    return job->valid_begin[g + 1] - job->valid_begin[g];
}

moe_status MOE_KERNEL(batch_forward)(moe__batch_job *job)
{
    moe__plan_arrays *plan = job->plan, *primary = job->primary;
    size_t group_bytes = (size_t)(job->groups + 1) * sizeof *plan->group_begin;
    if (!job->given) {
        set_ranges(plan->token_begin, job->tokens, job->entries_per_token);
        for (int64_t g = 0; g <= job->groups; g++)
            plan->group_begin[g] = job->group_begin ? job->group_begin[g] : g * job->tokens;
    }
    note_mask(job);
    for (int64_t g = 0; job->group_capacity && g < job->groups; g++)
        job->group_capacity[g] = moe__capacity_of_group(job->config, job->capacity,
                                                        valid_in_group(job, g), job->train);
    if (!primary) return MOE_OK;
    set_ranges(primary->token_begin, job->tokens, job->primary_per_token);
    set_ranges(job->second_begin, primary->entries, job->second_per_row);
    memcpy(primary->group_begin, plan->group_begin, group_bytes);
    return MOE_OK;
}

/* -1: does not fit. */
moe_status MOE_KERNEL(entries_taken)(const moe__batch_job *job, int64_t *entries)
{
    *entries = 0;
    for (int64_t g = 0; g < job->groups; g++) {
        int64_t rows = moe__min(job->group_capacity[g], valid_in_group(job, g));
        *entries = moe__add(*entries, moe__mul(job->config->num_experts, rows));
    }
    return MOE_OK;
}

moe_status MOE_KERNEL(everyone_forward)(const moe__workers *workers, moe__plan_arrays *plan)
{
    int64_t E = plan->num_experts;
    (void)workers;
    set_ranges(plan->token_begin, plan->tokens, E);
    for (int64_t n = 0; n < plan->entries; n++) plan->expert_of_entry[n] = (int32_t)(n % E);
    for (int64_t n = 0; n < plan->entries; n++) ((real *)plan->weight_of_entry)[n] = R(1.0);
    return MOE_OK;
}
