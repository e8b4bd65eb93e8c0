/* experts_step.c - the rows of a pool, forward and backward, part by part.
 *
 * Rows are sorted by expert, so the experts of a part and their rows are ranges. A part works on
 * the pool's arrays with the pool's row numbers. Where a row of its own is narrower, its array
 * begins so that its first row r lies where row r of the widest part would:
 *
 *     begin = array + r (widest - width),   row r = begin + r width = array + r widest */
#include "pass_state.h"

static void *ahead(void *memory, int64_t bytes) { return memory ? (char *)memory + bytes : NULL; }

/* The job of `part`, whose experts begin at number `first`; view is the plan as it sees it. */
static moe__experts_job job_of_part(const moe__experts_job *all, const moe__experts_room *room,
                                    const moe_experts *part, int64_t first, bool packed,
                                    moe__plan_arrays *view)
{
    const moe_experts_config *c = &part->config;
    /* Elsewhere a pool has one part, which begins at the first row. */
    bool host = part->context->memory->is_host;
    int64_t row = host ? all->plan->expert_begin[first] : 0;
    int64_t skip = row * (room->d_hidden - c->d_hidden) * moe__dtype_size(c->dtype);
    bool gated = part->room.gated, workspace = part->room.workspace_per_row > 0;
    moe__experts_job job = *all;
    *view = *all->plan;
    view->num_experts = moe__min(c->num_experts, all->plan->num_experts);
    view->expert_begin = all->plan->expert_begin + first;
    job.config = c;
    job.plan = view;
    if (job.segment_begin) job.segment_begin += first * job.segments;
    job.z1 = ahead(all->z1, skip);
    job.z3 = gated ? ahead(all->z3, skip) : NULL;
    job.h = ahead(all->h, skip);
    job.dh = ahead(all->dh, skip);
    job.dz3 = gated ? ahead(all->dz3, skip) : NULL;
    job.workspace = workspace ? ahead(all->workspace, row * room->workspace_per_row) : NULL;
    moe__experts_operands(part, &job, packed);
    return job;
}

moe_status moe__experts_rows_forward(const moe_experts *experts, moe__experts_job *job,
                                     const moe__backend *kernels)
{
    moe__plan_arrays view;
    int64_t first = 0;
    for (int64_t i = 0; i < experts->parts; i++) {
        bool packed;
        moe_experts *part = experts->part[i];
        MOE_TRY(moe__storage_renew(part, &job->workers, &packed));
        moe__experts_job one = job_of_part(job, &experts->room, part, first, packed, &view);
        MOE_TRY(kernels->experts_forward(&one));
        first += part->config.num_experts;
    }
    return MOE_OK;
}

/* [N] what combine multiplies: the entry's weight, or 1 where its part has used it already. */
static void fill_combine_weight(const moe_experts *experts, const moe__experts_job *job)
{
    const moe__plan_arrays *plan = job->plan;
    int64_t first = 0;
    for (int64_t i = 0; i < experts->parts; i++) {
        const moe_experts_config *c = &experts->part[i]->config;
        bool weighted = c->weight_position == MOE_WEIGHT_ON_OUTPUT;
        int64_t end = plan->expert_begin[first + c->num_experts];
        for (int64_t r = plan->expert_begin[first]; r < end; r++) {
            int64_t n = plan->entry_of_row[r];
            if (plan->dtype == MOE_DTYPE_F64)
                ((double *)job->combine_weight)[n] =
                    weighted ? ((const double *)plan->weight_of_entry)[n] : 1;
            else
                ((float *)job->combine_weight)[n] = weighted
                                                        ? ((const float *)plan->weight_of_entry)[n]
                                                        : 1;
        }
        first += c->num_experts;
    }
}

void moe__experts_combine(const moe_experts *experts, const moe__experts_job *job,
                          moe__rows_job *combine)
{
    if (job->combine_weight) fill_combine_weight(experts, job);
    combine->plan = job->plan;
    combine->width = experts->config.d_out;
    combine->rows_in = job->out;
    combine->rows_in_stride = experts->config.d_out;
    combine->padded_rows = job->padded_rows;
    combine->weights = job->combine_weight;
    combine->unweighted = !job->combine_weight &&
                          experts->part[0]->config.weight_position != MOE_WEIGHT_ON_OUTPUT;
}

moe_status moe__experts_rows_backward(moe_experts *experts, moe__experts_job *job, bool want_dx,
                                      const moe__backend *kernels)
{
    const moe__plan_arrays *plan = job->plan;
    moe__plan_arrays view;
    int64_t first = 0;
    if (job->entry_weight_grad && job->first_expert == 0) /* of those without a row it stays 0 */
        MOE_TRY(experts->context->memory->zero(&job->workers, job->entry_weight_grad,
                                               plan->entries * moe__dtype_size(plan->dtype)));
    for (int64_t i = 0; i < experts->parts; i++) {
        bool packed;
        moe_experts *part = experts->part[i];
        MOE_TRY(moe__storage_renew(part, &job->workers, &packed));
        moe__experts_job one = job_of_part(job, &experts->room, part, first, packed, &view);
        bool scratch = one.entry_weight_grad && part->config.weight_position == MOE_WEIGHT_ON_INPUT;
        if (!want_dx && !scratch) one.dx_rows = NULL;
        moe__experts_gradients(part, &one, job->parameters);
        MOE_TRY(kernels->experts_backward(&one));
        first += part->config.num_experts;
    }
    return job->parameters ? moe__experts_note_touched(experts, job) : MOE_OK;
}
