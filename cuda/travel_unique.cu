/* travel_unique.cu - the tokens that have rows for a node, in order. As src/cpu/travel.c:
 *
 *     marks    1 for each (node, token) with a row, in `place`, and in `scratch`
 *     scan     of scratch: where each is among all
 *     places   which of its node's each is, and the tokens themselves */
#include "elements.h"
#include "scan.h"

struct moe_unique {
    moe__plan_arrays plan;
    const int64_t *node_of_number;
    int64_t *place, *token, *begin, *scratch;
    int64_t nodes, slices;
};

MOE_GLOBAL(256) moe_unique_clear(moe_unique u)
{
    int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i <= u.nodes) u.begin[i] = 0;
    if (i < u.nodes * u.plan.tokens) u.place[i] = u.scratch[i] = 0;
}

/* A thread for each row. */
MOE_GLOBAL(256) moe_unique_mark(moe_unique u)
{
    int64_t row = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (row >= u.plan.expert_begin[u.plan.num_experts]) return;
    const int64_t *node = u.node_of_number +
                          u.plan.expert_of_entry[u.plan.entry_of_row[row]] * u.slices;
    for (int64_t s = 0; s < u.slices; s++) {
        int64_t at = node[s] * u.plan.tokens + u.plan.token_of_row[row];
        (void)moe_atomic_max(&u.place[at], 1);
        (void)moe_atomic_max(&u.scratch[at], 1);
    }
}

MOE_GLOBAL(256) moe_unique_place(moe_unique u)
{
    int64_t T = u.plan.tokens, i = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (i >= u.nodes * T) return;
    int64_t n = i / T, t = i - n * T, first = u.scratch[n * T], at = u.scratch[i];
    if (t == 0) u.begin[n] = first;
    if (u.place[i] == 0) return;
    u.token[at] = t;
    u.place[i] = at - first;
}

static dim3 threads_for(int64_t count) { return dim3((unsigned)((count + 255) / 256)); }

extern "C" moe_status moe__cuda_travel_unique(const moe__unique_job *job)
{
    moe_unique u = {*job->plan, job->node_of_number, job->place, job->token,
                    job->begin, job->scratch,        job->nodes, job->slices};
    int64_t all = job->nodes * job->plan->tokens;
    MOE_TRY(moe__cuda_launch(&job->workers, "travel_unique", moe_unique_clear,
                             threads_for(moe__max(all, job->nodes + 1)), dim3(256), 0, u));
    if (all == 0) return MOE_OK;
    if (job->plan->entries > 0)
        MOE_TRY(moe__cuda_launch(&job->workers, "travel_unique", moe_unique_mark,
                                 threads_for(job->plan->entries), dim3(256), 0, u));
    MOE_TRY(moe__cuda_scan(&job->workers, job->scratch, all, job->scratch + all,
                           job->begin + job->nodes));
    return moe__cuda_launch(&job->workers, "travel_unique", moe_unique_place, threads_for(all),
                            dim3(256), 0, u);
}
