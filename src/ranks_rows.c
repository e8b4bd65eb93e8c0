/* ranks_rows.c - the rows that travel between ranks: where they go, packing.
 *
 *     here      rows of this rank's plan by slot: of each rank a range
 *     came      what arrives, by source and slot; the owner's plan orders it by (slot, source)
 *     there     what goes back, at the positions at which it came
 *     results   what came back, by slot; merged: in the order of the plan
 *
 * EXACT: positions are consecutive, chunk by chunk. PADDED: of each (source, owner) a block of
 * header_rows rows and padded_rows for each slot. A round takes the rows whose place among all rows
 * of their owner is in its window of `limit`. What moves rows is the backend's; where they go is
 * found here, on the host. */
#include "ranks_rows.h"

/* ---- positions ------------------------------------------------------------------------------- */

/* Of `rows` whose first is at `place` those in a round's window. */
static moe__range cut(int64_t place, int64_t rows, int64_t round, int64_t limit)
{
    if (limit == 0) return (moe__range){0, rows};
    int64_t begin = round * limit - place, end = begin + limit;
    begin = moe__min(moe__max(begin, 0), rows);
    end = moe__min(moe__max(end, 0), rows);
    return (moe__range){begin, end - begin};
}

/* Where rows of a chunk by (rank, slot) are: begin[P+1] from 0, at[slots] from `base`. */
static void place_chunk(const moe_pass *pass, int64_t chunk, int64_t base, const moe__range *range,
                        const int64_t *first_slot, int64_t own, int64_t *at, int64_t *begin)
{
    int64_t P = moe__pass_comm(pass)->size, C = moe__ranks_chunks(pass), next = 0;
    for (int64_t p = 0; p < P; p++) {
        int64_t first = first_slot ? first_slot[p] : p * own;
        int64_t slots = first_slot ? first_slot[p + 1] - first : own;
        int64_t last = first + moe__chunk_slot(slots, C, chunk + 1);
        begin[p] = next;
        if (moe__ranks_padded(pass)) next += pass->layer->where->header_rows;
        for (int64_t s = first + moe__chunk_slot(slots, C, chunk); s < last; s++) {
            at[s] = base + next;
            next += moe__ranks_padded(pass) ? pass->layer->config.padded_rows : range[s].rows;
        }
        if (moe__ranks_padded(pass)) next = begin[p] + moe__ranks_block_rows(pass);
    }
    begin[P] = next;
}

void moe__ranks_place_rows(const moe_pass *pass, const moe__range *range, const int64_t *first_slot,
                           int64_t own, int64_t *at, int64_t *begin)
{
    int64_t P = moe__pass_comm(pass)->size, base = 0;
    for (int64_t c = 0; c < moe__ranks_chunks(pass); c++, begin += P + 1) {
        place_chunk(pass, c, base, range, first_slot, own, at, begin);
        base += begin[P];
    }
}

/* The owner's rows by slot and source. */
static void write_there(const moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__tables *t = &k->tables;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass), row = 0;
    for (int64_t i = 0; i < own; i++) {
        k->expert_begin[i] = row;
        for (int64_t p = 0; p < P; p++) {
            int64_t at = i * P + p;
            t->there_first[at] = t->there_from[at] = row;
            t->there_to[at] = t->there_back[at] = k->came_at[p * own + i];
            row += k->come[p * own + i].rows;
        }
    }
    k->expert_begin[own] = t->there_first[own * P] = row;
}

/* This rank's rows by slot. */
static void write_here(const moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__tables *t = &k->tables;
    int64_t slots = pass->layer->where->slots;
    t->here_first[0] = t->all_at[0] = 0;
    for (int64_t s = 0; s < slots; s++) {
        t->all_at[s + 1] = t->all_at[s] + k->count[s];
        t->here_first[s + 1] = t->here_first[s] + k->send[s].rows;
        t->here_from[s] = k->row[s] + k->send[s].first;
        t->here_to[s] = k->sent_at[s];
        t->back_to[s] = t->all_at[s] + k->send[s].first;
    }
}

static void find_came(moe_pass *pass, int64_t round)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass);
    int64_t limit = k->limit[moe__pass_comm(pass)->rank];
    for (int64_t i = 0; i < P * own; i++)
        k->come[i] = cut(k->in_place[i], k->in_count[i], round, limit);
    moe__ranks_place_rows(pass, k->come, NULL, own, k->came_at, k->recv_begin);
    write_there(pass);
    if (moe__ranks_relays(pass)) moe__relay_find_came(pass);
}

/* The tables to where the backend reads them. */
static moe_status put_tables(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    const moe__memory *memory = pass->context->memory;
    if (memory->is_host) return MOE_OK;
    return memory->put(&pass->workers, k->there_tables.slot_of_number, k->tables.slot_of_number,
                       moe__ranks_table_bytes(pass));
}

moe_status moe__ranks_find_came(moe_pass *pass, int64_t round)
{
    find_came(pass, round);
    return put_tables(pass);
}

moe_status moe__ranks_set_round(moe_pass *pass, int64_t round)
{
    moe__ranks *k = &pass->ranks;
    const moe__placement *w = pass->layer->where;
    int64_t P = moe__pass_comm(pass)->size;
    k->round = round;
    for (int64_t p = 0; p < P; p++)
        for (int64_t s = w->first_slot[p]; s < w->first_slot[p + 1]; s++)
            k->send[s] = cut(k->place[s], k->count[s], round, k->limit[p]);
    moe__ranks_place_rows(pass, k->send, w->first_slot, 0, k->sent_at, k->send_begin);
    find_came(pass, round);
    write_here(pass);
    if (moe__ranks_relays(pass)) moe__relay_find_places(pass);
    return put_tables(pass);
}

/* ---- moves ----------------------------------------------------------------------------------- */

moe__moves moe__ranks_moves_here(const moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__tables *t = &k->there_tables;
    int64_t slots = pass->layer->where->slots;
    int64_t most = pass->layer->where->numbers * moe__ranks_padding(pass);
    return (moe__moves){.count = slots,
                        .most = most > 0 ? most : k->tables.here_first[slots],
                        .first = t->here_first,
                        .from = t->here_from,
                        .to = t->here_to};
}

moe_status moe__ranks_all_moves(moe_pass *pass, const int64_t *numbers, moe__moves *moves)
{
    const moe__ranks *k = &pass->ranks;
    const moe__tables *t = &k->tables;
    int64_t slots = pass->layer->where->slots;
    t->here_first[0] = 0;
    for (int64_t s = 0; s < slots; s++) {
        t->here_first[s + 1] = t->here_first[s] + k->count[s];
        t->here_from[s] = k->row[s];
        t->here_to[s] = t->here_first[s];
        t->back_to[s] = numbers ? numbers[s] : 0;
    }
    *moves = moe__ranks_moves_here(pass);
    return put_tables(pass);
}

/* The first of this rank's slots that travel in a chunk. */
static int64_t own_slot(const moe_pass *pass, int64_t chunk)
{
    return moe__chunk_slot(moe__ranks_own(pass), moe__ranks_chunks(pass), chunk);
}

static moe__moves moves_there(const moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__tables *t = &k->there_tables;
    int64_t P = moe__pass_comm(pass)->size;
    int64_t first = own_slot(pass, k->chunk) * P, end = own_slot(pass, k->chunk + 1) * P;
    int64_t most = (end - first) * moe__ranks_padding(pass);
    const int64_t *row = k->tables.there_first;
    return (moe__moves){.count = end - first,
                        .most = most > 0 ? most : row[end] - row[first],
                        .first = t->there_first + first,
                        .from = t->there_from + first,
                        .to = t->there_to + first};
}

void moe__ranks_set_view(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    int64_t first = own_slot(pass, k->chunk);
    k->view = k->plan;
    k->view.expert_begin += first;
    k->view.num_experts = own_slot(pass, k->chunk + 1) - first;
    k->job.plan = &k->view;
    k->job.first_expert = first;
}

moe_status moe__ranks_order(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    const moe__memory *memory = pass->context->memory;
    int64_t P = moe__pass_comm(pass)->size;
    moe__order_job job = {.workers = pass->workers,
                          .plan = &k->view,
                          .sources = P,
                          .moves = moves_there(pass),
                          .holes = moe__ranks_padded(pass),
                          .x = k->x,
                          .row_bytes = k->x_bytes,
                          .weight_at = k->size.weight_at};
    k->plan.tokens = k->plan.entries = moe__chunk_position(k->recv_begin, P,
                                                           moe__ranks_chunks(pass));
    k->plan.rows = moe__ranks_blind(pass) ? -1 : k->tables.there_first[moe__ranks_own(pass) * P];
    moe__ranks_set_view(pass);
    MOE_TRY(pass->call.kernels->travel_order(&job));
    if (memory->is_host || k->chunk > 0) return MOE_OK;
    if (moe__ranks_blind(pass)) return memory->plan_ready(&pass->workers, &k->plan, false);
    return memory->plan_known(&pass->workers, &k->plan, k->expert_begin);
}

/* ---- packing --------------------------------------------------------------------------------- */

moe_status moe__ranks_pack(moe_pass *pass, const moe__moves *moves, void *to, int64_t row_bytes,
                           const moe__column *columns, int64_t count)
{
    moe__pack_job job = {.workers = pass->workers,
                         .moves = *moves,
                         .to = to,
                         .row_bytes = row_bytes,
                         .columns = count};
    for (int64_t c = 0; c < count; c++) job.column[c] = columns[c];
    return pass->call.kernels->travel_pack(&job);
}

moe_status moe__ranks_pack_here(moe_pass *pass, int64_t row_bytes, const moe__column *columns,
                                int64_t count)
{
    moe__moves moves = moe__ranks_moves_here(pass);
    MOE_TRY(moe__ranks_pack(pass, &moves, pass->ranks.here, row_bytes, columns, count));
    moe__lap(pass, MOE_TIME_PACK);
    return MOE_OK;
}

moe_status moe__ranks_pack_there(moe_pass *pass, int64_t row_bytes, const moe__column *columns,
                                 int64_t count)
{
    moe__moves moves = moves_there(pass);
    moves.to = pass->ranks.there_tables.there_back +
               own_slot(pass, pass->ranks.chunk) * moe__pass_comm(pass)->size;
    MOE_TRY(moe__ranks_pack(pass, &moves, pass->ranks.there, row_bytes, columns, count));
    moe__lap(pass, MOE_TIME_PACK);
    return MOE_OK;
}

moe_status moe__ranks_collect(moe_pass *pass, int64_t row_bytes)
{
    moe__ranks *k = &pass->ranks;
    const moe__column row = {.from = k->home, .stride = row_bytes, .bytes = row_bytes};
    moe__moves moves = moe__ranks_moves_here(pass);
    if (k->results == k->home || row_bytes == 0) return MOE_OK;
    moves.from = moves.to;
    moves.to = k->there_tables.back_to;
    MOE_TRY(moe__ranks_pack(pass, &moves, k->results, row_bytes, &row, 1));
    moe__lap(pass, MOE_TIME_PACK);
    return MOE_OK;
}

/* ---- sums of slices -------------------------------------------------------------------------- */

moe_status moe__ranks_merge(moe_pass *pass, int64_t row_bytes, int64_t width, int64_t real_at)
{
    moe__ranks *k = &pass->ranks;
    const moe__merge_job job = {.workers = pass->workers,
                                .plan = &pass->plan.a,
                                .most = moe__ranks_blind(pass)
                                            ? pass->plan.a.num_experts * moe__ranks_padding(pass)
                                            : k->plan_rows,
                                .slices = pass->layer->where->slices,
                                .slot_of_number = k->there_tables.slot_of_number,
                                .all_at = k->there_tables.all_at,
                                .results = k->results,
                                .merged = k->merged,
                                .row_bytes = row_bytes,
                                .width = width,
                                .real_at = real_at,
                                .padded_rows = moe__ranks_padding(pass)};
    k->back_rows = k->merged ? k->merged : k->results;
    k->back_bytes = row_bytes;
    if (!k->merged) return MOE_OK;
    MOE_TRY(pass->call.kernels->travel_merge(&job));
    moe__lap(pass, MOE_TIME_PACK);
    return MOE_OK;
}
