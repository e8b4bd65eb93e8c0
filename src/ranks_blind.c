/* ranks_blind.c - blocks of MOE_EXCHANGE_PADDED that nobody waits for: a backend with memory of its
 * own over a transport that takes it, in the order of a stream.
 *
 *     positions   are the same in every call: padded_rows for each slot
 *     counts      are found, sent and read by the backend, in the blocks
 *     failures    of a rank, or more rows than fit, are noted in a word of the backend's memory;
 *                 the next call of the pass returns it, having done its own work all the same, so
 *                 that the ranks stay in step
 *
 * A rank that declines takes part in every exchange of the call, with no rows and its status. */
#include "ranks_rows.h"

int64_t moe__ranks_padding(const moe_pass *pass)
{
    return moe__ranks_blind(pass) ? pass->layer->config.padded_rows : 0;
}

void moe__ranks_place_blocks(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    const moe__placement *w = pass->layer->where;
    const moe__tables *t = &k->tables;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass);
    int64_t each = pass->layer->config.padded_rows;
    moe__ranks_place_rows(pass, k->send, w->first_slot, 0, k->sent_at, k->send_begin);
    moe__ranks_place_rows(pass, k->come, NULL, own, k->came_at, k->recv_begin);
    for (int64_t s = 0; s < w->slots; s++) {
        t->here_to[s] = k->sent_at[s];
        t->back_to[s] = t->all_at[s] = s * each;
    }
    for (int64_t i = 0; i < own; i++)
        for (int64_t p = 0; p < P; p++) t->there_to[i * P + p] = k->came_at[p * own + i];
}

/* ---- headers --------------------------------------------------------------------------------- */

static moe__blocks_job job_of(const moe_pass *pass, bool backward, moe_status status)
{
    const moe__ranks *k = &pass->ranks;
    const moe__tables *t = &k->there_tables;
    const moe__placement *w = pass->layer->where;
    moe__blocks_job job = {.workers = pass->workers,
                           .ranks = moe__pass_comm(pass)->size,
                           .rank = moe__pass_comm(pass)->rank,
                           .slots = w->slots,
                           .own = moe__ranks_own(pass),
                           .slices = w->slices,
                           .padded_rows = pass->layer->config.padded_rows,
                           .first_slot = t->first_slot,
                           .number_of_slot = t->number_of_slot,
                           .slot_of_number = t->slot_of_number,
                           .calls = MOE__RANKS_CALLS,
                           .counts = !backward,
                           .record = k->record};
    job.block_bytes = moe__ranks_block_rows(pass) * (backward ? k->size.dy : k->size.x);
    moe__ranks_header(pass, backward, status, job.words);
    return job;
}

moe_status moe__blind_write(moe_pass *pass, bool backward, bool rows, moe_status status)
{
    moe__ranks *k = &pass->ranks;
    const moe__backend *kernels = moe__kernels(pass->context, moe__pass_dtype(pass));
    moe__blocks_job job = job_of(pass, backward, status);
    job.plan = rows && !backward ? &pass->plan.a : NULL;
    job.blocks = k->here;
    job.first = k->there_tables.here_first;
    job.from = k->there_tables.here_from;
    return kernels->travel_write_blocks(&job);
}

moe_status moe__blind_read(moe_pass *pass, bool backward)
{
    moe__ranks *k = &pass->ranks;
    moe__blocks_job job = job_of(pass, backward, MOE_OK);
    job.blocks = backward ? k->dy : k->x;
    job.first = k->there_tables.there_first;
    job.from = k->there_tables.there_from;
    return pass->call.kernels->travel_read_blocks(&job);
}

/* ---- a call ---------------------------------------------------------------------------------- */

/* An earlier record goes with this call's end. Everything may be wanted by some rank. */
moe_status moe__blind_begin(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    const moe__memory *memory = pass->context->memory;
    k->wanted = MOE__WANT_DX | MOE__WANT_WEIGHTS;
    k->seen = memory->noted(&pass->workers);
    return k->seen ? memory->zero(&pass->workers, k->record, (int64_t)sizeof *k->record) : MOE_OK;
}

/* What an earlier forward left for a backward stays. */
moe_status moe__blind_decline(moe_pass *pass, bool backward, moe_status status)
{
    moe__ranks *k = &pass->ranks;
    int64_t bytes = backward ? k->size.dy : k->size.x;
    k->took_part = true;
    if (!backward) MOE_TRY(moe__share_nothing(pass));
    MOE_TRY(moe__blind_write(pass, backward, false, status));
    moe_status sent = moe__ranks_start(pass, backward ? k->dy : k->there, k->here, bytes, false,
                                       NULL);
    if (sent == MOE_OK)
        sent = moe__ranks_start(pass, k->here, k->there, backward ? k->size.back : k->size.out,
                                true, NULL);
    MOE_TRY(moe__ranks_rejoin(pass, sent));
    k->agreed = true;
    return status;
}

/* ---- what went wrong ------------------------------------------------------------------------- */

static moe_status tell(const moe_pass *pass, int64_t record, const char *function)
{
    int64_t kind = record >> 56, rank = record >> 32 & 0xffffff, number = record & 0xffffffff;
    switch (kind) {
    case MOE__BLOCKS_ROWS:
        REFUSE(MOE_ERROR_BUFFER_TOO_SMALL,
               "rank %d had more rows for expert %lld than padded_rows, which is %lld",
               (int)moe__pass_comm(pass)->rank, (ll)number, (ll)pass->layer->config.padded_rows);
    case MOE__BLOCKS_FAILED:
        REFUSE((moe_status)-number, "rank %lld failed: %s", (ll)rank,
               moe_status_text((moe_status)-number));
    case MOE__BLOCKS_CALL:
        REFUSE(MOE_ERROR_TRANSPORT,
               "rank %lld was in another call or of another layer than rank %d", (ll)rank,
               (int)moe__pass_comm(pass)->rank);
    default:
        REFUSE(MOE_ERROR_TRANSPORT, "rank %lld had %lld rows of %lld", (ll)rank, (ll)number,
               (ll)pass->layer->config.padded_rows);
    }
}

moe_status moe__ranks_earlier(moe_pass *pass, const char *function)
{
    int64_t seen = pass->ranks.seen;
    pass->ranks.seen = 0;
    return seen ? tell(pass, seen, function) : MOE_OK;
}

moe_status moe__ranks_look(const moe_pass *pass, const char *function)
{
    int64_t record = 0;
    moe__workers workers = pass->workers;
    workers.function = function;
    if (!moe__ranks_blind(pass)) return MOE_OK; /* the call has looked */
    MOE_TRY(pass->context->memory->fetch(&workers, &record, pass->ranks.record,
                                         (int64_t)sizeof record));
    return record ? tell(pass, record, function) : MOE_OK;
}
