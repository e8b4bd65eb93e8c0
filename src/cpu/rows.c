/* rows.c - from entries to rows: who is kept, and the order by expert.
 *
 * An entry gets a row if it names an expert, its token is not masked, and fewer than the capacity
 * of its group's entries came before it at that expert, in order of token, then of choice. Rows are
 * sorted by (expert, token, entry) with one counting sort: O(N + E). */
#include "cpu/kernels.h"

/* slot_of_entry: place within (group, expert), -1 for what has no row. expert_begin[e + 1] counts,
 * group after group, and is set back to 0 by walking the group's entries again. */
static void admit(const moe__plan_rows_job *job)
{
    const moe__plan_arrays *p = job->plan;
    int64_t *used = p->expert_begin + 1;
    for (int64_t e = -1; e < p->num_experts; e++) used[e] = 0;
    for (int64_t g = 0; g < p->groups; g++) {
        int64_t room = job->group_capacity ? job->group_capacity[g] : -1;
        for (int64_t t = p->group_begin[g]; t < p->group_begin[g + 1]; t++) {
            int masked = job->token_mask && !job->token_mask[t];
            for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++) {
                int32_t e = p->expert_of_entry[n];
                int kept = e >= 0 && !masked && (room < 0 || used[e] < room);
                p->slot_of_entry[n] = kept ? used[e]++ : -1;
            }
        }
        for (int64_t n = p->token_begin[p->group_begin[g]];
             n < p->token_begin[p->group_begin[g + 1]]; n++)
            if (p->expert_of_entry[n] >= 0) used[p->expert_of_entry[n]] = 0;
    }
}

/* row_of_entry, expert_begin, token_of_row, entry_of_row from the slots. */
static void sort_by_expert(moe__plan_arrays *p)
{
    int64_t *begin = p->expert_begin, rows = 0;
    for (int64_t n = 0; n < p->entries; n++)
        if (p->slot_of_entry[n] >= 0) begin[p->expert_of_entry[n] + 1]++;
    for (int64_t e = 0; e < p->num_experts; e++) { /* begin[e + 1] becomes the first row of e */
        int64_t count = begin[e + 1];
        begin[e + 1] = rows;
        rows += count;
    }
    for (int64_t t = 0; t < p->tokens; t++)
        for (int64_t n = p->token_begin[t]; n < p->token_begin[t + 1]; n++) {
            p->row_of_entry[n] = -1;
            if (p->slot_of_entry[n] < 0) continue;
            int64_t row = begin[p->expert_of_entry[n] + 1]++; /* ends as the first row of e + 1 */
            p->row_of_entry[n] = row;
            p->token_of_row[row] = t;
            p->entry_of_row[row] = n;
        }
    p->rows = rows;
}

/* Weights of entries without a row become +0, whatever the sum; if asked, a token's others are
 * divided by their sum, or are 0 where that is 0. */
static void weigh_range(void *argument, int64_t begin, int64_t end)
{
    const moe__plan_rows_job *job = argument;
    const moe__plan_arrays *p = job->plan;
    real *w = p->weight_of_entry;
    for (int64_t t = begin; t < end; t++) {
        int64_t first = p->token_begin[t], last = p->token_begin[t + 1];
        real sum = R(0.0);
        for (int64_t n = first; n < last; n++) {
            if (p->row_of_entry[n] < 0)
                w[n] = R(0.0);
            else
                sum = sum + w[n];
        }
        for (int64_t n = first; n < last && job->renormalize_after_drop; n++)
            if (p->row_of_entry[n] >= 0) w[n] = sum != R(0.0) ? w[n] / sum : R(0.0);
    }
}

moe_status MOE_KERNEL(plan_rows)(moe__plan_rows_job *job)
{
    if (!job->keep_rows) {
        admit(job);
        sort_by_expert(job->plan);
    }
    return moe__parallel_range(job->workers.context, job->plan->tokens, 1024, weigh_range, job,
                               job->workers.function);
}
