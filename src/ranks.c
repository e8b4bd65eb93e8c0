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

/* With a grid the others may wait on any of three. */
void moe__ranks_abort(moe_pass *pass)
{
    moe_comm_abort(moe__pass_comm(pass));
    moe_comm_abort(pass->layer->config.rail_comm);
    moe_comm_abort(pass->layer->config.node_comm);
}

moe_status moe__ranks_stop(moe_pass *pass, moe_status status)
{
    moe__ranks *k = &pass->ranks;
    bool held = moe__ranks_give_up(pass);
    k->to_store = NULL;
    status = moe__ranks_rejoin(pass, status);
    if (held || !k->agreed) moe__ranks_abort(pass);
    return status;
}

static int64_t element_bytes(const moe_pass *pass)
{
    return moe__dtype_size(pass->experts->room.dtype);
}
static int64_t real_bytes(const moe_pass *pass)
{
    return moe__dtype_size(moe__real_dtype(pass->experts->room.dtype));
}

/* All rows of this rank, packed in `here`, to their owners. */
static moe_status start_all(moe_pass *pass, void *to, int64_t row_bytes, bool backward)
{
    moe__ranks *k = &pass->ranks;
    k->took_part = true;
    for (k->chunk = 0; k->chunk < moe__ranks_chunks(pass); k->chunk++)
        MOE_TRY(moe__ranks_start(pass, to, k->here, row_bytes, false,
                                 &(moe__block_header){backward, MOE_OK}));
    k->chunk = 0;
    return MOE_OK;
}

/* ---- forward --------------------------------------------------------------------------------- */

/* x and the weight of each row in one: fewer messages. `weights` are the plan's, or mixed. */
static moe_status send_forward(moe_pass *pass, int64_t round)
{
    moe__ranks *k = &pass->ranks;
    const moe__plan_arrays *plan = pass->experts_job.plan;
    int64_t size = element_bytes(pass), D = pass->experts->room.d_model, real = real_bytes(pass);
    const moe__column columns[2] = {{.from = pass->x,
                                     .index = plan->token_of_row,
                                     .stride = pass->x_stride * size,
                                     .bytes = D * size},
                                    {.from = plan->weight_of_entry,
                                     .index = plan->entry_of_row,
                                     .stride = real,
                                     .bytes = real,
                                     .at = k->size.weight_at}};
    MOE_TRY(moe__ranks_blind(pass) ? moe__blind_write(pass, false, true, MOE_OK)
                                   : moe__ranks_set_round(pass, round));
    k->x_bytes = k->size.x;
    MOE_TRY(moe__ranks_pack_here(pass, k->x_bytes, columns, 2));
    return start_all(pass, k->x, k->x_bytes, false);
}

moe_status moe__ranks_send(moe_pass *pass)
{
    return moe__ranks_relays(pass) ? moe__relay_send(pass) : send_forward(pass, 0);
}

/* Rows of the round are here. */
static moe_status arrive(moe_pass *pass)
{
    return moe__ranks_relays(pass) ? moe__relay_wait(pass) : moe__ranks_wait(pass);
}

/* The experts on what came. */
static moe_status run_experts(moe_pass *pass, const moe__backend *kernels)
{
    moe__ranks *k = &pass->ranks;
    MOE_TRY(moe__ranks_order(pass));
    k->job.workers = pass->workers;
    if (k->scratch) k->job.workers.scratch = k->scratch;
    k->job.x = k->x;
    k->job.x_stride = k->x_bytes / element_bytes(pass);
    k->job.padded_rows = moe__ranks_padding(pass) * moe__pass_comm(pass)->size;
    moe__lap(pass, MOE_TIME_PACK);
    MOE_TRY(moe__experts_rows_forward(pass->experts, &k->job, kernels));
    moe__lap(pass, MOE_TIME_EXPERTS);
    return MOE_OK;
}

/* One chunk, when it has come; what becomes of it leaves. */
static moe_status work_chunk(moe_pass *pass, const moe__backend *kernels, const char *function)
{
    moe__ranks *k = &pass->ranks;
    int64_t bytes = pass->experts->room.d_out * element_bytes(pass);
    const moe__column out = {.from = k->job.out, .stride = bytes, .bytes = bytes};
    MOE_TRY(arrive(pass));
    if (moe__ranks_padded(pass))
        MOE_TRY(moe__ranks_blind(pass)
                    ? moe__blind_read(pass, false)
                    : moe__ranks_read_blocks(pass, false, k->x, k->x_bytes, function));
    MOE_TRY(run_experts(pass, kernels));
    MOE_TRY(moe__ranks_pack_there(pass, k->size.out, &out, 1));
    return moe__ranks_start(pass, k->home, k->there, k->size.out, true, NULL);
}

moe_status moe__ranks_work(moe_pass *pass, const moe__backend *kernels, const char *function)
{
    moe__ranks *k = &pass->ranks;
    for (int64_t round = 0; round < k->rounds; round++) {
        for (k->chunk = 0; k->chunk < moe__ranks_chunks(pass); k->chunk++)
            MOE_TRY(work_chunk(pass, kernels, function));
        k->chunk = 0;
        if (round + 1 == k->rounds) break;
        MOE_TRY(moe__ranks_wait(pass));
        MOE_TRY(moe__ranks_collect(pass, k->size.out));
        MOE_TRY(send_forward(pass, round + 1));
    }
    return MOE_OK;
}

/* What is wrong with blocks goes to the host on its own. */
static moe_status note_record(moe_pass *pass)
{
    const moe__memory *memory = pass->context->memory;
    return pass->ranks.record ? memory->note(&pass->workers, pass->ranks.record) : MOE_OK;
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
    const moe__grid *g = &w->grid;
    for (int64_t n = 0; n < g->nodes; n++)
        if (n != g->node) pass->report.rows_to_nodes += k->relay.unique[n + 1] - k->relay.unique[n];
    pass->report.rounds = k->rounds;
}

moe_status moe__ranks_receive(moe_pass *pass)
{
    int64_t bytes = pass->ranks.size.out;
    MOE_TRY(moe__ranks_wait_chunks(pass));
    MOE_TRY(moe__ranks_collect(pass, bytes));
    MOE_TRY(note_record(pass));
    report_rows(pass);
    return moe__ranks_merge(pass, bytes, pass->experts->room.d_out, -1);
}

/* ---- backward -------------------------------------------------------------------------------- */

/* After several rounds the experts' activations are gone: x and weights travel once more. */
static bool again(const moe_pass *pass) { return pass->ranks.rounds > 1; }

static moe_status send_backward(moe_pass *pass, int64_t round)
{
    moe__ranks *k = &pass->ranks;
    const moe__experts_job *e = &pass->experts_job;
    const moe__plan_arrays *plan = e->plan;
    int64_t size = element_bytes(pass), D = pass->experts->room.d_model, real = real_bytes(pass);
    int64_t O = pass->experts->room.d_out, bytes = again(pass) ? k->size.again : k->size.dy;
    const moe__column columns[3] = {
        {.from = e->dy,
         .index = plan->token_of_row,
         .stride = e->dy_stride * size,
         .bytes = O * size,
         .at = again(pass) ? k->size.dy_at : 0},
        {.from = e->x, .index = plan->token_of_row, .stride = e->x_stride * size, .bytes = D * size},
        {.from = plan->weight_of_entry,
         .index = plan->entry_of_row,
         .stride = real,
         .bytes = real,
         .at = k->size.weight_at}};
    MOE_TRY(moe__ranks_blind(pass) ? moe__blind_write(pass, true, true, MOE_OK)
                                   : moe__ranks_set_round(pass, round));
    if (again(pass)) k->x_bytes = bytes;
    MOE_TRY(moe__ranks_pack_here(pass, bytes, columns, again(pass) ? 3 : 1));
    return start_all(pass, again(pass) ? k->x : k->dy, bytes, true);
}

moe_status moe__ranks_send_backward(moe_pass *pass)
{
    return moe__ranks_relays(pass) ? moe__relay_send(pass) : send_backward(pass, 0);
}

/* MOE_EXCHANGE_PADDED: before anything is written it must be known that no rank declined. */
moe_status moe__ranks_check_backward(moe_pass *pass, const char *function)
{
    if (!moe__ranks_padded(pass) || moe__ranks_blind(pass)) return MOE_OK;
    MOE_TRY(moe__ranks_wait(pass));
    return moe__ranks_read_blocks(pass, true, pass->ranks.dy, pass->ranks.size.dy, function);
}

/* Rows of the first expert of the round that earlier rounds had, and of the last that later ones
 * have. Elsewhere than on the host a round adds its own sums to the gradients. */
static void find_carry(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass);
    int64_t limit = k->limit[moe__pass_comm(pass)->rank], first = -1, last = -1;
    int64_t begin = k->round * limit, before = 0, after = 0;
    for (int64_t i = 0; i < own; i++) {
        if (k->expert_begin[i + 1] == k->expert_begin[i]) continue;
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
    k->job.carry = limit > 0 && moe__ranks_on_host(pass) ? k->carry : NULL;
}

/* What came once more: activations anew, and sums over rows that go on from round to round. */
static moe_status run_experts_again(moe_pass *pass, const moe__backend *kernels)
{
    moe__ranks *k = &pass->ranks;
    const moe__experts_job *e = &pass->experts_job;
    if (k->round == 0 && e->parameters && e->overwrite) {
        MOE_TRY(moe__parameters_zero_gradients(&pass->workers, &pass->experts->parameters));
        MOE_TRY(moe__experts_forget_touched(pass->experts, &pass->workers));
    }
    MOE_TRY(run_experts(pass, kernels));
    find_carry(pass);
    k->job.overwrite = 0;
    k->job.dy = (const char *)k->x + k->size.dy_at;
    k->job.dy_stride = k->x_bytes / element_bytes(pass);
    return MOE_OK;
}

static bool wanted(const moe_pass *pass, int32_t what) { return pass->ranks.wanted & what; }

static moe_status run_backward(moe_pass *pass, const moe__backend *kernels)
{
    moe__ranks *k = &pass->ranks;
    const moe__experts_job *e = &pass->experts_job;
    k->job.workers = e->workers;
    if (k->scratch) k->job.workers.scratch = k->scratch;
    k->job.parameters = e->parameters;
    k->job.overwrite = e->overwrite;
    k->job.carry = NULL;
    k->job.dy = k->dy;
    k->job.dy_stride = k->size.dy / element_bytes(pass);
    k->job.entry_weight_grad = wanted(pass, MOE__WANT_WEIGHTS) ? k->entry_grad : NULL;
    moe__ranks_set_view(pass);
    if (again(pass)) MOE_TRY(run_experts_again(pass, kernels));
    bool dx = wanted(pass, MOE__WANT_DX);
    MOE_TRY(moe__experts_rows_backward(pass->experts, &k->job, dx, kernels));
    moe__lap(pass, MOE_TIME_EXPERTS);
    return MOE_OK;
}

/* What comes back of a row: dx and the gradient by its weight, as far as some rank wants them: rows
 * are of one width. */
typedef struct back_row {
    moe__column columns[2];
    int64_t count, bytes, width;
    int64_t real_at; /* -1: no gradient by the weight */
} back_row;

static back_row back_row_of(const moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    int64_t dx = pass->experts->room.d_model * element_bytes(pass), real = real_bytes(pass);
    back_row b = {.real_at = -1};
    if (wanted(pass, MOE__WANT_DX)) {
        b.columns[b.count++] = (moe__column){.from = k->job.dx_rows, .stride = dx, .bytes = dx};
        b.width = pass->experts->room.d_model;
        b.bytes = dx;
    }
    if (wanted(pass, MOE__WANT_WEIGHTS)) {     /* an entry is a position, of what came */
        bool relays = moe__ranks_relays(pass); /* and goes back from another */
        b.real_at = b.count ? k->size.grad_at : 0;
        b.columns[b.count++] = (moe__column){.from = k->entry_grad,
                                             .index = relays ? k->plan.entry_of_row : NULL,
                                             .stride = real,
                                             .bytes = real,
                                             .at = b.real_at,
                                             .by_place = !relays};
        b.bytes = b.real_at + real;
    }
    b.bytes = moe__ranks_whole(moe__ranks_on_host(pass), b.bytes);
    return b;
}

static moe_status work_chunk_backward(moe_pass *pass, const moe__backend *kernels)
{
    moe__ranks *k = &pass->ranks;
    if (!moe__ranks_padded(pass) || moe__ranks_blind(pass)) MOE_TRY(arrive(pass));
    if (moe__ranks_blind(pass)) MOE_TRY(moe__blind_read(pass, true));
    MOE_TRY(run_backward(pass, kernels));
    back_row b = back_row_of(pass);
    if (b.bytes == 0) return MOE_OK;
    MOE_TRY(moe__ranks_pack_there(pass, b.bytes, b.columns, b.count));
    return moe__ranks_start(pass, k->home, k->there, b.bytes, true, NULL);
}

moe_status moe__ranks_work_backward(moe_pass *pass, const moe__backend *kernels)
{
    moe__ranks *k = &pass->ranks;
    int64_t bytes = back_row_of(pass).bytes;
    for (int64_t round = 0; round < k->rounds; round++) {
        for (k->chunk = 0; k->chunk < moe__ranks_chunks(pass); k->chunk++)
            MOE_TRY(work_chunk_backward(pass, kernels));
        k->chunk = 0;
        if (round + 1 == k->rounds) break;
        if (bytes > 0) MOE_TRY(moe__ranks_wait(pass));
        MOE_TRY(moe__ranks_collect(pass, bytes));
        MOE_TRY(send_backward(pass, round + 1));
    }
    return MOE_OK;
}

/* entry_grad of this rank's entries; of those without a row 0. */
static moe_status take_weight_gradients(moe_pass *pass, const back_row *b)
{
    const moe__entry_grad_job job = {.workers = pass->workers,
                                     .plan = &pass->plan.a,
                                     .rows = pass->ranks.back_rows,
                                     .row_bytes = b->bytes,
                                     .real_at = b->real_at,
                                     .padded_rows = moe__ranks_padding(pass),
                                     .entry_grad = pass->entry_grad};
    return pass->call.kernels->travel_entry_grad(&job);
}

moe_status moe__ranks_receive_backward(moe_pass *pass)
{
    back_row b = back_row_of(pass);
    if (b.bytes == 0) return MOE_OK;
    MOE_TRY(moe__ranks_wait_chunks(pass));
    MOE_TRY(moe__ranks_collect(pass, b.bytes));
    MOE_TRY(note_record(pass));
    MOE_TRY(moe__ranks_merge(pass, b.bytes, b.width, b.real_at));
    if (pass->experts_job.entry_weight_grad) MOE_TRY(take_weight_gradients(pass, &b));
    moe__lap(pass, MOE_TIME_PACK);
    return MOE_OK;
}

/* ---- a rank that declines ------------------------------------------------------------------- */

/* What an earlier forward left for a backward stays: its counts, and x. */
moe_status moe__ranks_decline_padded(moe_pass *pass, bool backward, moe_status status)
{
    moe__ranks *k = &pass->ranks;
    int64_t bytes = backward ? k->size.dy : k->size.x;
    MOE_TRY(moe__ranks_set_round(pass, 0));
    k->took_part = true;
    MOE_TRY(moe__ranks_start(pass, backward ? k->dy : k->there, k->here, bytes, false,
                             &(moe__block_header){backward, status}));
    MOE_TRY(moe__ranks_wait(pass));
    k->agreed = true;
    return status;
}
