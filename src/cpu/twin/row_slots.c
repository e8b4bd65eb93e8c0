/* row_slots.c - the slots of batches, plans, coefficients, rows and experts by both tables.
 *
 * What must not happen twice: the host's experts. The plain table is given functions that do
 * nothing, and finds in out, dx and workspace what the host left; rows gathered for them are
 * compared. The host's parallel-for is called again: a task knows nothing of how often. */
#include "cpu/twin/slots.h"

/* ---- plans ----------------------------------------------------------------------------------- */

/* All arrays of a plan but token_begin and group_begin. `choice`: who was chosen, too. */
void moe__kernel_twin_plan(moe__kernel_twin *t, moe__plan_arrays *p, bool choice)
{
    moe__kernel_twin_vector(t, "rows", &p->rows, 1, I64);
    if (choice) moe__kernel_twin_vector(t, "expert_of_entry", p->expert_of_entry, p->entries, I32);
    moe__kernel_twin_vector(t, "slot_of_entry", p->slot_of_entry, p->entries, I64);
    moe__kernel_twin_vector(t, "row_of_entry", p->row_of_entry, p->entries, I64);
    moe__kernel_twin_vector(t, "expert_begin", p->expert_begin, p->num_experts + 1, I64);
    moe__kernel_twin_used(t, "token_of_row", p->token_of_row, p->entries, &p->rows, I64);
    moe__kernel_twin_used(t, "entry_of_row", p->entry_of_row, p->entries, &p->rows, I64);
    moe__kernel_twin_vector(t, "weight_of_entry", p->weight_of_entry, p->entries, p->dtype);
}

moe_status moe__kernel_twin_batch_forward(const moe__kernel_twin_pair *pair, moe__batch_job *job)
{
    moe__kernel_twin t = twin_of(pair, "batch_forward", &job->workers);
    moe__plan_arrays *p = job->plan, *primary = job->primary;
    moe_status status;
    if (!job->given) {
        moe__kernel_twin_vector(&t, "token_begin", p->token_begin, job->tokens + 1, I64);
        moe__kernel_twin_vector(&t, "group_begin", p->group_begin, job->groups + 1, I64);
    }
    moe__kernel_twin_vector(&t, "valid_begin", job->valid_begin, p->groups + 1, I64);
    moe__kernel_twin_used(&t, "valid_token", job->valid_token, p->tokens,
                          job->valid_begin + p->groups, I64);
    moe__kernel_twin_vector(&t, "mask", job->mask, p->tokens, MOE__KERNEL_TWIN_BYTE);
    moe__kernel_twin_vector(&t, "group_capacity", job->group_capacity, job->groups, I64);
    if (primary) {
        moe__kernel_twin_vector(&t, "primary token_begin", primary->token_begin, job->tokens + 1,
                                I64);
        moe__kernel_twin_vector(&t, "primary group_begin", primary->group_begin, job->groups + 1,
                                I64);
        moe__kernel_twin_vector(&t, "second_begin", job->second_begin, primary->entries + 1, I64);
    }
    BOTH(batch_forward, job);
    return status;
}

moe_status moe__kernel_twin_entries_taken(const moe__kernel_twin_pair *pair,
                                          const moe__batch_job *job, int64_t *entries)
{
    moe__kernel_twin t = twin_of(pair, "entries_taken", &job->workers);
    moe_status status;
    moe__kernel_twin_vector(&t, "entries", entries, 1, I64);
    BOTH(entries_taken, job, entries);
    return status;
}

moe_status moe__kernel_twin_everyone_forward(const moe__kernel_twin_pair *pair,
                                             const moe__workers *workers, moe__plan_arrays *plan)
{
    moe__kernel_twin t = twin_of(pair, "everyone_forward", workers);
    moe_status status;
    moe__kernel_twin_vector(&t, "token_begin", plan->token_begin, plan->tokens + 1, I64);
    moe__kernel_twin_vector(&t, "expert_of_entry", plan->expert_of_entry, plan->entries, I32);
    moe__kernel_twin_vector(&t, "weight_of_entry", plan->weight_of_entry, plan->entries,
                            plan->dtype);
    BOTH(everyone_forward, workers, plan);
    return status;
}

moe_status moe__kernel_twin_plan_rows(const moe__kernel_twin_pair *pair, moe__plan_rows_job *job)
{
    moe__kernel_twin t = twin_of(pair, "plan_rows", &job->workers);
    moe__plan_arrays *p = job->plan;
    moe_status status;
    if (job->keep_rows)
        moe__kernel_twin_vector(&t, "weight_of_entry", p->weight_of_entry, p->entries, p->dtype);
    else
        moe__kernel_twin_plan(&t, p, false);
    BOTH(plan_rows, job);
    return status;
}

/* ---- the layer's coefficients ---------------------------------------------------------------- */

moe_status moe__kernel_twin_mix_forward(const moe__kernel_twin_pair *pair, moe__mix_job *job)
{
    moe__kernel_twin t = twin_of(pair, "mix_forward", &job->workers);
    int32_t real = real_of(pair);
    moe_status status;
    (void)moe__kernel_twin_rows(&t, "coefficient", job->coefficient, job->tokens, job->width,
                                job->width, real);
    for (int64_t i = 0; i < job->width; i++)
        moe__kernel_twin_vector(&t, "weight_out", job->weight_out[i], job->plan[i]->entries, real);
    BOTH(mix_forward, job);
    return status;
}

moe_status moe__kernel_twin_mix_backward(const moe__kernel_twin_pair *pair, moe__mix_job *job)
{
    moe__kernel_twin t = twin_of(pair, "mix_backward", &job->workers);
    int64_t D = job->input_width;
    moe_status status;
    for (int64_t i = 0; i < job->width; i++)
        moe__kernel_twin_vector(&t, "entry_grad", job->entry_grad[i], job->plan[i]->entries,
                                real_of(pair));
    (void)moe__kernel_twin_rows(&t, "dx", job->dx, job->tokens, D, job->dx_stride, pair->dtype);
    moe__kernel_twin_matrices(&t, "d_weight", &job->d_weight_matrix, 1, D, job->width);
    moe__kernel_twin_matrices(&t, "d_bias", &job->d_bias, 1, 1, job->width);
    BOTH(mix_backward, job);
    return status;
}

/* ---- rows ------------------------------------------------------------------------------------ */

static void add_tokens(moe__kernel_twin *t, moe__rows_job *job, int32_t dtype)
{
    (void)moe__kernel_twin_rows(t, "tokens_out", job->tokens_out, job->plan->tokens, job->width,
                                job->tokens_out_stride, dtype);
}

static void add_rows(moe__kernel_twin *t, moe__rows_job *job)
{
    (void)moe__kernel_twin_rows(t, "rows_out", job->rows_out, job->plan->rows, job->width,
                                job->rows_out_stride, t->pair->dtype);
}

moe_status moe__kernel_twin_dispatch_forward(const moe__kernel_twin_pair *pair, moe__rows_job *job)
{
    moe__kernel_twin t = twin_of(pair, "dispatch_forward", &job->workers);
    moe_status status;
    add_rows(&t, job);
    BOTH(dispatch_forward, job);
    return status;
}

moe_status moe__kernel_twin_dispatch_backward(const moe__kernel_twin_pair *pair, moe__rows_job *job)
{
    moe__kernel_twin t = twin_of(pair, "dispatch_backward", &job->workers);
    moe_status status;
    add_tokens(&t, job, job->tokens_wide ? real_of(pair) : pair->dtype);
    BOTH(dispatch_backward, job);
    return status;
}

moe_status moe__kernel_twin_combine_forward(const moe__kernel_twin_pair *pair, moe__rows_job *job)
{
    moe__kernel_twin t = twin_of(pair, "combine_forward", &job->workers);
    moe_status status;
    add_tokens(&t, job, pair->dtype);
    (void)moe__kernel_twin_rows(&t, "tokens_saved", job->tokens_saved, job->plan->tokens,
                                job->width, job->width, pair->dtype);
    BOTH(combine_forward, job);
    return status;
}

moe_status moe__kernel_twin_combine_backward(const moe__kernel_twin_pair *pair, moe__rows_job *job)
{
    moe__kernel_twin t = twin_of(pair, "combine_backward", &job->workers);
    moe_status status;
    add_rows(&t, job);
    moe__kernel_twin_vector(&t, "entry_weight_grad", job->entry_weight_grad, job->plan->entries,
                            real_of(pair));
    BOTH(combine_backward, job);
    return status;
}

moe_status moe__kernel_twin_output_backward(const moe__kernel_twin_pair *pair, moe__rows_job *job)
{
    moe__kernel_twin t = twin_of(pair, "output_backward", &job->workers);
    moe_status status;
    add_tokens(&t, job, pair->dtype);
    BOTH(output_backward, job);
    return status;
}

moe_status moe__kernel_twin_matrices_copy(const moe__kernel_twin_pair *pair,
                                          const moe__copy_job *job)
{
    moe__kernel_twin t = twin_of(pair, "matrices_copy", &job->workers);
    moe_status status;
    moe__kernel_twin_matrices(&t, "to", &job->to, job->experts, job->rows, job->cols);
    BOTH(matrices_copy, job);
    return status;
}

/* ---- experts --------------------------------------------------------------------------------- */

static int32_t do_nothing(void *user, const moe_expert_call *call)
{
    (void)user, (void)call;
    return 0;
}

/* The job as the plain table sees it: experts of the host have been called already. */
typedef struct second_turn {
    moe__experts_job job;
    moe_experts_config config;
    moe_expert_callbacks callbacks;
} second_turn;

static moe__experts_job *turn_of(second_turn *turn, moe__experts_job *job)
{
    if (job->config->kind != MOE_EXPERTS_CALLBACK) return job;
    turn->job = *job;
    turn->config = *job->config;
    turn->callbacks = *job->config->callbacks;
    turn->callbacks.forward = turn->callbacks.backward = do_nothing;
    turn->config.callbacks = &turn->callbacks;
    turn->job.config = &turn->config;
    return &turn->job;
}

static int64_t rows_of(const moe__plan_arrays *plan)
{
    return plan->expert_begin[plan->num_experts] - plan->expert_begin[0];
}

/* The job's rows of an array of all rows. */
static void add_expert_rows(moe__kernel_twin *t, const char *name, const moe__experts_job *job,
                            void *base, int64_t width, int32_t dtype)
{
    int64_t skip = job->plan->expert_begin[0] * width * moe__dtype_size(dtype);
    if (!base) return;
    (void)moe__kernel_twin_rows(t, name, (char *)base + skip, rows_of(job->plan), width, width,
                                dtype);
}

static moe_status run_experts(moe__kernel_twin *t, moe__experts_job *job,
                              moe_status (*fast)(moe__experts_job *),
                              moe_status (*plain)(moe__experts_job *))
{
    second_turn turn;
    moe_status status = moe__kernel_twin_begin(t);
    if (status == MOE_OK) status = moe__kernel_twin_between(t, fast(job));
    if (status == MOE_OK) status = moe__kernel_twin_end(t, plain(turn_of(&turn, job)));
    moe__kernel_twin_free(t);
    return status;
}

/* z1, z3 and h are kept for a backward, h where blocks of rows keep it too; else they are scratch.
 */
moe_status moe__kernel_twin_experts_forward(const moe__kernel_twin_pair *pair,
                                            moe__experts_job *job)
{
    moe__kernel_twin t = twin_of(pair, "experts_forward", &job->workers);
    const moe_experts_config *c = job->config;
    int32_t dtype = pair->dtype;
    bool network = c->kind == MOE_EXPERTS_FEED_FORWARD, saved = network && job->h != job->z1;
    add_expert_rows(&t, "weight_of_row", job, job->weight_of_row, 1, moe__real_dtype(dtype));
    if (c->kind == MOE_EXPERTS_CALLBACK)
        add_expert_rows(&t, "x_rows", job, job->x_rows, c->d_model, dtype);
    else
        add_expert_rows(&t, "out", job, job->out, c->d_out, dtype);
    if (saved) {
        add_expert_rows(&t, "z1", job, job->z1, c->d_hidden, dtype);
        add_expert_rows(&t, "z3", job, job->z3, c->d_hidden, dtype);
    }
    if (saved && job->h != job->dh && c->weight_position == MOE_WEIGHT_ON_HIDDEN)
        add_expert_rows(&t, "h", job, job->h, c->d_hidden, dtype);
    return run_experts(&t, job, pair->fast->experts_forward, pair->plain->experts_forward);
}

/* Gradients of a weight and its bias; of sums that wait for more rows, the chains they are in. */
static void add_gradients(moe__kernel_twin *t, const moe__experts_job *job, const moe__matrices *dw,
                          const moe__matrices *db, int64_t rows, int64_t cols,
                          const moe__dw_carry *carry)
{
    int32_t real = real_of(t->pair);
    moe__kernel_twin_matrices(t,
                              dw == &job->dw1   ? "dw1"
                              : dw == &job->dw2 ? "dw2"
                                                : "dw3",
                              dw, job->plan->num_experts, rows, cols);
    moe__kernel_twin_matrices(t,
                              dw == &job->dw1   ? "db1"
                              : dw == &job->dw2 ? "db2"
                                                : "db3",
                              db, job->plan->num_experts, 1, cols);
    if (!carry || carry->after == 0) return;
    (void)moe__kernel_twin_rows(t, "chain of dw", carry->to.chain, rows, cols, cols, real);
    moe__kernel_twin_vector(t, "chain of db", carry->to.bias_chain, cols, real);
}

moe_status moe__kernel_twin_experts_backward(const moe__kernel_twin_pair *pair,
                                             moe__experts_job *job)
{
    moe__kernel_twin t = twin_of(pair, "experts_backward", &job->workers);
    const moe_experts_config *c = job->config;
    int64_t D = c->d_model, F = c->d_hidden, O = c->d_out, first = job->plan->expert_begin[0];
    const moe__dw_carry *carry = job->carry;
    moe__region *grad = moe__kernel_twin_rows(&t, "entry_weight_grad", job->entry_weight_grad,
                                              rows_of(job->plan), 1, 1, real_of(pair));
    if (grad) grad->index = job->plan->entry_of_row + first;
    if (c->kind == MOE_EXPERTS_CALLBACK)
        add_expert_rows(&t, "dz", job, job->dz, O, pair->dtype);
    else
        add_expert_rows(&t, "dx_rows", job, job->dx_rows, D, pair->dtype);
    if (c->kind == MOE_EXPERTS_FEED_FORWARD) {
        if (c->weight_position == MOE_WEIGHT_ON_HIDDEN && job->h != job->dh)
            add_expert_rows(&t, "h", job, job->h, F, pair->dtype);
        add_gradients(&t, job, &job->dw1, &job->db1, D, F, carry ? &carry[0] : NULL);
        if (job->z3) add_gradients(&t, job, &job->dw3, &job->db3, D, F, carry ? &carry[1] : NULL);
        add_gradients(&t, job, &job->dw2, &job->db2, F, O, carry ? &carry[2] : NULL);
    }
    return run_experts(&t, job, pair->fast->experts_backward, pair->plain->experts_backward);
}

/* ---- scratch --------------------------------------------------------------------------------- */

int64_t moe__kernel_twin_worker_bytes(const moe__kernel_twin_pair *pair,
                                      const moe__pass_shape *shape)
{
    return moe__max(pair->fast->worker_bytes(shape), pair->plain->worker_bytes(shape));
}
