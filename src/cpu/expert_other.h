/* expert_other.h - the rows of a job's experts, and the experts that are no network of ours. */
#ifndef MOE_CPU_EXPERT_OTHER_H
#define MOE_CPU_EXPERT_OTHER_H

#include "internal.h"
#include "cpu/real.h"

static inline int64_t job_first(const moe__experts_job *job) { return job->plan->expert_begin[0]; }
static inline int64_t job_rows(const moe__experts_job *job)
{
    return job->plan->expert_begin[job->plan->num_experts] - job_first(job);
}

/* out = x, and dx_row = weight dy. */
moe_status MOE_KERNEL(identity_forward)(moe__experts_job *job);
moe_status MOE_KERNEL(identity_backward)(moe__experts_job *job);
/* The host's functions, expert by expert, on gathered rows. */
moe_status MOE_KERNEL(callback_forward)(moe__experts_job *job);
moe_status MOE_KERNEL(callback_backward)(moe__experts_job *job);

#endif
