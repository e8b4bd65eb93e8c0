/* ranks.c - experts on several ranks, step by step: rows to where their experts live, and back.
 *
 *     send      rows of the plan, sorted by slot, so those of a rank are a range
 *     work      rows arrive by (source, slot, token); the pool works on them in the order (slot,
 *               source, token), which is the order that one rank with all tokens would have
 *     receive   results return in the order of arrival, which is the order of the source's rows
 *
 * The owner's view is a plan like any other: a "token" is a row that arrived, with one entry. A
 * gradient by a row, a weight or a parameter is computed from the same numbers in the same order as
 * on one rank, so it is the same bytes. What ranks say first is in ranks_words.c, how rows are laid
 * out in ranks_rows.c. */
#include "ranks_rows.h"

#include <string.h>

moe_status moe__ranks_stop(moe_pass *pass, moe_status status)
{
    moe__ranks *k = &pass->ranks;
    if (k->waiting) moe__comm_give_up(moe__pass_comm(pass), k->request);
    k->waiting = false;
    if (!k->agreed) moe_comm_abort(moe__pass_comm(pass));
    return status;
}

static int64_t element_bytes(const moe_pass *pass)
{
    return moe__dtype_size(pass->experts->room.dtype);
}

/* ---- forward --------------------------------------------------------------------------------- */

/* x and the weight of each row in one: fewer messages. `weights` are the plan's, or mixed. */
static moe_status send_forward(moe_pass *pass, int64_t round)
{
    moe__ranks *k = &pass->ranks;
    const moe__plan_arrays *plan = pass->experts_job.plan;
    int64_t size = element_bytes(pass), D = pass->experts->room.d_model;
    const moe__column columns[2] = {{pass->x, plan->token_of_row, pass->x_stride * size, D * size},
                                    {plan->weight_of_entry, plan->entry_of_row, size, size}};
    moe__ranks_set_round(pass, round);
    k->x_width = D + 1;
    MOE_TRY(moe__ranks_pack_here(pass, columns, 2));
    if (moe__ranks_padded(pass))
        moe__ranks_write_blocks(pass, false, MOE_OK, k->here, k->x_width * size);
    k->took_part = true;
    return moe__ranks_start(pass, k->x, k->here, k->x_width * size, false);
}

moe_status moe__ranks_send(moe_pass *pass) { return send_forward(pass, 0); }

/* The experts on what came. */
static moe_status run_experts(moe_pass *pass, const moe__backend *kernels)
{
    moe__ranks *k = &pass->ranks;
    moe__ranks_order(pass);
    k->job.workers = pass->workers;
    k->job.plan = &k->plan;
    k->job.x = k->x;
    k->job.x_stride = k->x_width;
    moe__lap(pass, MOE_TIME_PACK);
    MOE_TRY(moe__experts_rows_forward(pass->experts, &k->job, kernels));
    moe__lap(pass, MOE_TIME_EXPERTS);
    return MOE_OK;
}

moe_status moe__ranks_work(moe_pass *pass, const moe__backend *kernels, const char *function)
{
    moe__ranks *k = &pass->ranks;
    int64_t size = element_bytes(pass), O = pass->experts->room.d_out;
    for (int64_t round = 0; round < k->rounds; round++) {
        const moe__column out = {k->job.out, NULL, O * size, O * size};
        MOE_TRY(moe__ranks_wait(pass));
        if (moe__ranks_padded(pass))
            MOE_TRY(moe__ranks_read_blocks(pass, false, k->x, k->x_width * size, function));
        MOE_TRY(run_experts(pass, kernels));
        MOE_TRY(moe__ranks_pack_there(pass, &out, 1));
        MOE_TRY(moe__ranks_start(pass, k->here, k->there, O * size, true));
        if (round + 1 == k->rounds) break;
        MOE_TRY(moe__ranks_wait(pass));
        moe__ranks_collect(pass, O * size);
        MOE_TRY(send_forward(pass, round + 1));
    }
    return MOE_OK;
}

static void report_rows(moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__placement *w = pass->layer->where;
    int64_t P = moe__pass_comm(pass)->size, rank = moe__pass_comm(pass)->rank;
    int64_t own = moe__ranks_own(pass);
    for (int64_t s = 0; s < w->slots; s++)
        if (s < w->first_slot[rank] || s >= w->first_slot[rank + 1])
            pass->report.rows_sent += k->count[s];
    for (int64_t p = 0; p < P; p++)
        for (int64_t i = 0; i < own && p != rank; i++)
            pass->report.rows_received += k->in_count[p * own + i];
    pass->report.rounds = k->rounds;
}

moe_status moe__ranks_receive(moe_pass *pass)
{
    int64_t O = pass->experts->room.d_out;
    MOE_TRY(moe__ranks_wait(pass));
    moe__ranks_collect(pass, O * element_bytes(pass));
    report_rows(pass);
    return moe__ranks_merge(pass, O);
}

/* ---- backward -------------------------------------------------------------------------------- */

/* After several rounds the experts' activations are gone: x and weights travel once more. */
static bool again(const moe_pass *pass) { return pass->ranks.rounds > 1; }

static moe_status send_backward(moe_pass *pass, int64_t round)
{
    moe__ranks *k = &pass->ranks;
    const moe__experts_job *e = &pass->experts_job;
    const moe__plan_arrays *plan = e->plan;
    int64_t size = element_bytes(pass), D = pass->experts->room.d_model;
    int64_t O = pass->experts->room.d_out;
    const moe__column columns[3] = {{e->x, plan->token_of_row, e->x_stride * size, D * size},
                                    {plan->weight_of_entry, plan->entry_of_row, size, size},
                                    {e->dy, plan->token_of_row, e->dy_stride * size, O * size}};
    int64_t width = again(pass) ? D + 1 + O : O;
    moe__ranks_set_round(pass, round);
    if (again(pass)) k->x_width = width;
    MOE_TRY(moe__ranks_pack_here(pass, again(pass) ? columns : columns + 2, again(pass) ? 3 : 1));
    if (moe__ranks_padded(pass)) moe__ranks_write_blocks(pass, true, MOE_OK, k->here, width * size);
    k->took_part = true;
    return moe__ranks_start(pass, again(pass) ? k->x : k->dy, k->here, width * size, false);
}

moe_status moe__ranks_send_backward(moe_pass *pass) { return send_backward(pass, 0); }

/* MOE_EXCHANGE_PADDED: before anything is written it must be known that no rank declined. */
moe_status moe__ranks_check_backward(moe_pass *pass, const char *function)
{
    if (!moe__ranks_padded(pass)) return MOE_OK;
    MOE_TRY(moe__ranks_wait(pass));
    return moe__ranks_read_blocks(pass, true, pass->ranks.dy,
                                  pass->experts->room.d_out * element_bytes(pass), function);
}

/* Rows of the first expert of the round that earlier rounds had, and of the last that later ones
 * have. */
static void find_carry(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass);
    int64_t limit = k->limit[moe__pass_comm(pass)->rank], first = -1, last = -1;
    int64_t begin = k->round * limit, before = 0, after = 0;
    for (int64_t i = 0; i < own; i++) {
        if (k->plan.expert_begin[i + 1] == k->plan.expert_begin[i]) continue;
        if (first < 0) first = i;
        last = i;
    }
    if (first >= 0 && limit > 0) {
        int64_t end = k->in_place[(P - 1) * own + last] + k->in_count[(P - 1) * own + last];
        before = moe__max(begin - k->in_place[first], 0);
        after = moe__max(end - (begin + limit), 0);
    }
    for (int i = 0; i < 3; i++)
        k->carry[i] = (moe__dw_carry){k->sums[k->round % 2][i], k->sums[(k->round + 1) % 2][i],
                                      before, after};
    k->job.carry = limit > 0 ? k->carry : NULL;
}

/* What came once more: activations anew, and sums over rows that go on from round to round. */
static moe_status run_experts_again(moe_pass *pass, const moe__backend *kernels)
{
    moe__ranks *k = &pass->ranks;
    const moe__experts_job *e = &pass->experts_job;
    int64_t size = element_bytes(pass), D = pass->experts->room.d_model;
    if (k->round == 0 && e->parameters && e->overwrite) {
        MOE_TRY(moe__parameters_zero_gradients(&pass->workers, &pass->experts->parameters));
        moe__experts_forget_touched(pass->experts);
    }
    MOE_TRY(run_experts(pass, kernels));
    find_carry(pass);
    k->job.overwrite = 0;
    k->job.dy = (const char *)k->x + (D + 1) * size;
    k->job.dy_stride = k->x_width;
    return MOE_OK;
}

static bool wanted(const moe_pass *pass, int32_t what) { return pass->ranks.wanted & what; }

static moe_status run_backward(moe_pass *pass, const moe__backend *kernels)
{
    moe__ranks *k = &pass->ranks;
    const moe__experts_job *e = &pass->experts_job;
    k->job.workers = e->workers;
    k->job.parameters = e->parameters;
    k->job.overwrite = e->overwrite;
    k->job.carry = NULL;
    k->job.dy = k->dy;
    k->job.dy_stride = pass->experts->room.d_out;
    k->job.entry_weight_grad = wanted(pass, MOE__WANT_WEIGHTS) ? k->entry_grad : NULL;
    if (again(pass)) MOE_TRY(run_experts_again(pass, kernels));
    bool dx = wanted(pass, MOE__WANT_DX);
    MOE_TRY(moe__experts_rows_backward(pass->experts, &k->job, dx, kernels));
    moe__lap(pass, MOE_TIME_EXPERTS);
    return MOE_OK;
}

/* dx and the gradient by the weight of each row, as far as some rank wants them: rows are of one
 * width. */
static int back_columns(const moe_pass *pass, moe__column columns[2])
{
    const moe__ranks *k = &pass->ranks;
    int64_t size = element_bytes(pass), D = pass->experts->room.d_model;
    int count = 0;
    if (wanted(pass, MOE__WANT_DX))
        columns[count++] = (moe__column){k->job.dx_rows, NULL, D * size, D * size};
    if (wanted(pass, MOE__WANT_WEIGHTS))
        columns[count++] = (moe__column){k->entry_grad, k->plan.entry_of_row, size, size};
    return count;
}
static int64_t back_width(const moe_pass *pass)
{
    return (wanted(pass, MOE__WANT_DX) ? pass->experts->room.d_model : 0) +
           wanted(pass, MOE__WANT_WEIGHTS);
}

moe_status moe__ranks_work_backward(moe_pass *pass, const moe__backend *kernels)
{
    moe__ranks *k = &pass->ranks;
    int64_t bytes = back_width(pass) * element_bytes(pass);
    moe__column columns[2];
    for (int64_t round = 0; round < k->rounds; round++) {
        if (!moe__ranks_padded(pass)) MOE_TRY(moe__ranks_wait(pass));
        MOE_TRY(run_backward(pass, kernels));
        if (bytes > 0) {
            int count = back_columns(pass, columns);
            MOE_TRY(moe__ranks_pack_there(pass, columns, count));
            MOE_TRY(moe__ranks_start(pass, k->here, k->there, bytes, true));
        }
        if (round + 1 == k->rounds) break;
        if (bytes > 0) MOE_TRY(moe__ranks_wait(pass));
        moe__ranks_collect(pass, bytes);
        MOE_TRY(send_backward(pass, round + 1));
    }
    return MOE_OK;
}

/* entry_grad of this rank's entries from the last column; of those without a row 0. */
static void take_weight_gradients(moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__plan_arrays *plan = &pass->plan.a;
    int64_t size = element_bytes(pass), last = k->row_stride - 1;
    if (plan->entries > 0) memset(pass->entry_grad, 0, (size_t)(plan->entries * size));
    for (int64_t r = 0; r < plan->rows; r++)
        memcpy((char *)pass->entry_grad + plan->entry_of_row[r] * size,
               (const char *)k->rows + (r * k->row_stride + last) * size, (size_t)size);
}

moe_status moe__ranks_receive_backward(moe_pass *pass)
{
    int64_t width = back_width(pass);
    if (width == 0) return MOE_OK;
    MOE_TRY(moe__ranks_wait(pass));
    moe__ranks_collect(pass, width * element_bytes(pass));
    MOE_TRY(moe__ranks_merge(pass, width));
    if (pass->experts_job.entry_weight_grad) take_weight_gradients(pass);
    moe__lap(pass, MOE_TIME_PACK);
    return MOE_OK;
}

/* ---- a rank that declines ------------------------------------------------------------------- */

/* What an earlier forward left for a backward stays: its counts, and x. */
moe_status moe__ranks_decline_padded(moe_pass *pass, bool backward, moe_status status)
{
    moe__ranks *k = &pass->ranks;
    int64_t O = pass->experts->room.d_out, D = pass->experts->room.d_model;
    int64_t bytes = (backward ? O : D + 1) * element_bytes(pass);
    moe__ranks_set_round(pass, 0);
    moe__ranks_write_blocks(pass, backward, status, k->here, bytes);
    k->took_part = true;
    MOE_TRY(moe__ranks_start(pass, backward ? k->dy : k->there, k->here, bytes, false));
    MOE_TRY(moe__ranks_wait(pass));
    k->agreed = true;
    return status;
}
