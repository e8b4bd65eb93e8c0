/* ranks_rows.c - the rows that travel between ranks.
 *
 *     here      rows of this rank's plan by slot: of each rank a range
 *     came      what arrives, by source and slot; the owner's plan orders it by (slot, source)
 *     there     what goes back, at the positions at which it came
 *     results   what came back, by slot; merged: in the order of the plan
 *
 * EXACT: positions are consecutive. PADDED: of each (source, owner) a block of header_rows rows and
 * padded_rows for each slot. A round takes the rows whose place among all rows of their owner is in
 * its window of `limit`. */
#include "ranks_rows.h"

#include <string.h>

/* Rows of a block. */
static int64_t block_rows(const moe_pass *pass)
{
    const moe__placement *w = pass->layer->where;
    return moe__add(w->header_rows, moe__mul(w->most_slots, pass->layer->config.padded_rows));
}

/* ---- memory ---------------------------------------------------------------------------------- */

moe_status moe__ranks_room(moe_pass *pass, void **memory, int64_t *capacity, int64_t bytes,
                           const char *function)
{
    if (bytes < 0) REFUSE(MOE_ERROR_OVERFLOW, "the rows of all ranks do not fit in 63 bits");
    if (bytes <= *capacity) return MOE_OK;
    void *larger = moe__alloc(pass->context, bytes);
    if (!larger)
        REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no %lld bytes for rows of other ranks", (ll)bytes);
    moe__comm_free(moe__pass_comm(pass), pass->context, *memory, *capacity);
    *memory = larger;
    *capacity = bytes;
    return MOE_OK;
}

void moe__ranks_give_back(moe_pass *pass, void **memory, int64_t *bytes)
{
    moe__comm_free(pass->layer ? pass->layer->comm : NULL, pass->context, *memory, *bytes);
    *memory = NULL;
    *bytes = 0;
}

void moe__ranks_trim(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    moe__second_trim(pass);
    moe__ranks_give_back(pass, &k->keep_memory, &k->keep_bytes);
    if (pass->layer && pass->layer->where && moe__ranks_padded(pass))
        return; /* needed to take part */
    moe__ranks_give_back(pass, &k->rows_memory, &k->rows_bytes);
}

void moe__ranks_free(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    if (k->waiting) moe__comm_give_up(moe__pass_comm(pass), k->request);
    moe__second_free(pass);
    moe__ranks_give_back(pass, &k->keep_memory, &k->keep_bytes);
    moe__ranks_give_back(pass, &k->rows_memory, &k->rows_bytes);
    moe__ranks_give_back(pass, &k->counts_memory, &k->counts_bytes);
    *k = (moe__ranks){0};
}

static void lay_out_sums(moe__dw_sums *sums, moe__arena *arena, int64_t rows, int64_t cols,
                         int64_t size)
{
    sums->chain = moe__arena_take(arena, moe__mul(rows, cols), size);
    sums->ended = moe__arena_take(arena, moe__mul(rows, cols), size);
    sums->bias_chain = moe__arena_take(arena, cols, size);
    sums->bias_ended = moe__arena_take(arena, cols, size);
}

/* Of w1, w3 and w2, twice: they go from one to the other and back. */
static void lay_out_carry(moe__ranks *k, moe__arena *arena, const moe__experts_room *room)
{
    int64_t size = moe__dtype_size(room->dtype), D = room->d_model, F = room->d_hidden;
    for (int i = 0; i < 3; i++)
        for (int turn = 0; turn < 2; turn++)
            if (F > 0 && (i != 1 || room->gated))
                lay_out_sums(&k->sums[turn][i], arena, i == 2 ? F : D, i == 2 ? room->d_out : F,
                             size);
}

/* Numbers of rows that memory is laid out for. */
typedef struct row_counts {
    int64_t sent, came; /* positions */
    int64_t rows;       /* of experts */
    int64_t mine;       /* of this rank's plan, by slot */
    int64_t plan;       /* of this rank's plan */
} row_counts;

static row_counts count_rows(const moe_pass *pass)
{
    const moe__placement *w = pass->layer->where;
    const moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, limit = k->limit[moe__pass_comm(pass)->rank];
    if (moe__ranks_padded(pass)) {
        int64_t blocks = moe__mul(P, block_rows(pass)), each = pass->layer->config.padded_rows;
        return (row_counts){.sent = blocks,
                            .came = blocks,
                            .rows = moe__mul(moe__mul(P, moe__ranks_own(pass)), each),
                            .mine = moe__mul(w->numbers, each),
                            .plan = moe__mul(w->numbers / w->slices, each)};
    }
    int64_t came = limit > 0 ? moe__min(k->in_rows, limit) : k->in_rows, mine = 0;
    for (int64_t s = 0; s < w->slots; s++) mine += k->count[s];
    return (row_counts){mine, came, came, mine, pass->plan.a.rows};
}

static void lay_out_rows(moe_pass *pass, moe__arena *arena, const row_counts *n, bool save)
{
    moe__ranks *k = &pass->ranks;
    const moe_layer_config *c = &pass->layer->config;
    const moe__experts_room *room = &pass->experts->room;
    int64_t size = moe__dtype_size(room->dtype), D = room->d_model, O = room->d_out;
    int64_t back = save ? moe__max(O, D + 1) : O;
    bool chunked = c->received == MOE_RECEIVED_CHUNK, again = chunked && save;
    int64_t widest = D + 1 + (again ? O : 0);
    moe__plan_layout(&k->plan, arena, n->came, n->came, room->num_experts, 1, room->dtype);
    k->x = moe__arena_take(arena, moe__mul(n->came, widest), size);
    k->dy = save ? moe__arena_take(arena, moe__mul(n->came, O), size) : NULL;
    k->here = moe__arena_take(arena, moe__mul(n->sent, moe__max(widest, back)), size);
    k->there = moe__arena_take(arena, moe__mul(n->came, back), size);
    bool apart = chunked ||
                 moe__ranks_padded(pass); /* results do not come back as `results` has them */
    k->results = apart ? moe__arena_take(arena, moe__mul(n->mine, back), size) : k->here;
    k->merged = pass->layer->where->in_order
                    ? NULL
                    : moe__arena_take(arena, moe__mul(n->plan, back), size);
    k->entry_grad = save ? moe__arena_take(arena, n->came, size) : NULL;
    if (again) lay_out_carry(k, arena, room);
    moe__lay_out_experts(&k->job, arena, room, n->rows, save, size);
}

moe_status moe__ranks_lay_out(moe_pass *pass, bool save, const char *function)
{
    moe__ranks *k = &pass->ranks;
    row_counts n = count_rows(pass);
    moe__arena arena = {NULL, 0};
    lay_out_rows(pass, &arena, &n, save);
    MOE_TRY(moe__ranks_room(pass, &k->rows_memory, &k->rows_bytes, arena.used, function));
    arena = (moe__arena){k->rows_memory, 0};
    lay_out_rows(pass, &arena, &n, save);
    return MOE_OK;
}

/* What the pass holds stays where it is, also if this succeeds. */
moe_status moe__ranks_set_aside(moe_pass *pass, int64_t entries, void **memory, int64_t *bytes,
                                const char *function)
{
    const moe__ranks held = pass->ranks;
    int64_t most = pass->layer->config.max_received;
    int64_t mine = moe__mul(entries, pass->layer->where->slices);
    row_counts n = {mine, most, most, mine, entries};
    moe__arena arena = {NULL, 0};
    *memory = NULL;
    *bytes = 0;
    if (moe__ranks_padded(pass) || most == 0) return MOE_OK;
    lay_out_rows(pass, &arena, &n, true);
    pass->ranks = held;
    if (arena.used >= 0 && arena.used <= held.rows_bytes) return MOE_OK;
    return moe__ranks_room(pass, memory, bytes, arena.used, function);
}

void moe__ranks_take_memory(moe_pass *pass, void *memory, int64_t bytes)
{
    moe__ranks *k = &pass->ranks;
    if (!memory) return;
    moe__ranks_give_back(pass, &k->rows_memory, &k->rows_bytes);
    k->rows_memory = memory;
    k->rows_bytes = bytes;
}

/* ---- exchanges ------------------------------------------------------------------------------- */

/* Bytes to and from other ranks, for the report. */
static void count_bytes(moe_pass *pass, const moe_exchange *e)
{
    int32_t P = moe__pass_comm(pass)->size, rank = moe__pass_comm(pass)->rank;
    int64_t sent = e->to_all ? (P - 1) * e->send_begin[1]
                             : e->send_begin[P] - e->send_begin[rank + 1] + e->send_begin[rank];
    int64_t came = e->recv_begin[P] - e->recv_begin[rank + 1] + e->recv_begin[rank];
    bool back = pass->backward;
    *(back ? &pass->report.backward_bytes_sent : &pass->report.forward_bytes_sent) += sent *
                                                                                      e->row_bytes;
    *(back ? &pass->report.backward_bytes_received
           : &pass->report.forward_bytes_received) += came * e->row_bytes;
}

static moe_status exchange(moe_pass *pass, const moe_exchange *e)
{
    moe__lap(pass, MOE_TIME_PACK);
    count_bytes(pass, e);
    moe_status status = moe_comm_exchange(moe__pass_comm(pass), e);
    moe__lap(pass, MOE_TIME_EXCHANGE);
    return status;
}

moe_status moe__ranks_exchange(moe_pass *pass, void *recv, const int64_t *recv_begin,
                               const void *send, const int64_t *send_begin, int64_t row_bytes)
{
    const moe_exchange e = {sizeof e, recv, recv_begin, send, send_begin, row_bytes, 0, 0};
    return exchange(pass, &e);
}

moe_status moe__ranks_gather(moe_pass *pass, void *recv, const void *send, int64_t bytes)
{
    int64_t *begin = pass->ranks.in_begin;
    const int64_t once[2] = {0, 1};
    for (int64_t p = 0; p <= moe__pass_comm(pass)->size; p++) begin[p] = p;
    const moe_exchange e = {sizeof e, recv, begin, send, once, bytes, 1, 0};
    return exchange(pass, &e);
}

moe_status moe__ranks_start(moe_pass *pass, void *recv, const void *send, int64_t row_bytes,
                            bool back)
{
    moe__ranks *k = &pass->ranks;
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = recv,
                      .recv_begin = back ? k->send_begin : k->recv_begin,
                      .send = send,
                      .send_begin = back ? k->recv_begin : k->send_begin,
                      .row_bytes = row_bytes};
    count_bytes(pass, &e);
    MOE_TRY(moe_comm_exchange_start(moe__pass_comm(pass), &e, &k->request));
    k->waiting = true;
    return MOE_OK;
}

moe_status moe__ranks_wait(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    moe__lap(pass, MOE_TIME_PACK);
    k->waiting = false;
    moe_status status = moe_comm_exchange_finish(moe__pass_comm(pass), k->request);
    moe__lap(pass, MOE_TIME_EXCHANGE);
    return status;
}

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

/* Where rows by (rank, slot) are: begin[P+1], at[slots]. */
static void place_rows(const moe_pass *pass, const moe__range *range, const int64_t *first_slot,
                       int64_t own, int64_t *at, int64_t *begin)
{
    int64_t P = moe__pass_comm(pass)->size, next = 0;
    for (int64_t p = 0; p < P; p++) {
        int64_t first = first_slot ? first_slot[p] : p * own;
        int64_t last = first_slot ? first_slot[p + 1] : first + own;
        begin[p] = next;
        if (moe__ranks_padded(pass)) next += pass->layer->where->header_rows;
        for (int64_t s = first; s < last; s++) {
            at[s] = next;
            next += moe__ranks_padded(pass) ? pass->layer->config.padded_rows : range[s].rows;
        }
        if (moe__ranks_padded(pass)) next = begin[p] + block_rows(pass);
    }
    begin[P] = next;
}

static void find_came(moe_pass *pass, int64_t round)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass);
    int64_t limit = k->limit[moe__pass_comm(pass)->rank];
    for (int64_t i = 0; i < P * own; i++)
        k->come[i] = cut(k->in_place[i], k->in_count[i], round, limit);
    place_rows(pass, k->come, NULL, own, k->came_at, k->recv_begin);
}

void moe__ranks_set_round(moe_pass *pass, int64_t round)
{
    moe__ranks *k = &pass->ranks;
    const moe__placement *w = pass->layer->where;
    int64_t P = moe__pass_comm(pass)->size;
    k->round = round;
    for (int64_t p = 0; p < P; p++)
        for (int64_t s = w->first_slot[p]; s < w->first_slot[p + 1]; s++)
            k->send[s] = cut(k->place[s], k->count[s], round, k->limit[p]);
    place_rows(pass, k->send, w->first_slot, 0, k->sent_at, k->send_begin);
    find_came(pass, round);
    k->all_at[0] = 0;
    for (int64_t s = 0; s < w->slots; s++) k->all_at[s + 1] = k->all_at[s] + k->count[s];
}

/* ---- blocks ---------------------------------------------------------------------------------- */

static char *block_of(const moe_pass *pass, char *blocks, int64_t p, int64_t row_bytes)
{
    return blocks + p * block_rows(pass) * row_bytes;
}

void moe__ranks_write_blocks(moe_pass *pass, bool backward, moe_status status, char *blocks,
                             int64_t row_bytes)
{
    moe__ranks *k = &pass->ranks;
    const int64_t *first = pass->layer->where->first_slot;
    int64_t P = moe__pass_comm(pass)->size, word = (int64_t)sizeof(int64_t);
    for (int64_t p = 0; p < P; p++) {
        int64_t header[MOE__RANKS_HEADER];
        char *block = block_of(pass, blocks, p, row_bytes);
        moe__ranks_header(pass, backward, status, header);
        memcpy(block, header, sizeof header);
        if (!backward && first[p + 1] > first[p])
            memcpy(block + sizeof header, k->count + first[p],
                   (size_t)((first[p + 1] - first[p]) * word));
    }
}

moe_status moe__ranks_read_blocks(moe_pass *pass, bool backward, const char *blocks,
                                  int64_t row_bytes, const char *function)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass), n;
    for (int64_t p = 0; p < P; p++) {
        int64_t header[MOE__RANKS_HEADER];
        const char *block = block_of(pass, (char *)(uintptr_t)blocks, p, row_bytes);
        memcpy(header, block, sizeof header);
        MOE_TRY(moe__ranks_check_header(pass, p, backward, header, function));
        for (int64_t i = 0; i < own && !backward; i++) {
            memcpy(&n, block + sizeof header + i * (int64_t)sizeof n, sizeof n);
            if (n < 0 || n > pass->layer->config.padded_rows)
                REFUSE(MOE_ERROR_TRANSPORT, "rank %lld has %lld rows of %lld", (ll)p, (ll)n,
                       (ll)pass->layer->config.padded_rows);
            k->in_count[p * own + i] = n;
        }
    }
    if (!backward) find_came(pass, 0);
    return MOE_OK;
}

/* ---- the owner's plan ------------------------------------------------------------------------ */

static void copy_element(void *to, int64_t i, const void *from, int64_t j, int64_t size)
{
    memcpy((char *)to + i * size, (const char *)from + j * size, (size_t)size);
}

/* A token is a position and has one entry, or in a block's unused rows none with a row. Row order
 * (slot, source, order of arrival); weights from the last column of x. */
void moe__ranks_order(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    moe__plan_arrays *plan = &k->plan;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass), row = 0;
    int64_t size = moe__dtype_size(plan->dtype), D = pass->experts->room.d_model;
    plan->tokens = plan->entries = k->recv_begin[P];
    for (int64_t i = 0; i < plan->entries && moe__ranks_padded(pass); i++)
        plan->row_of_entry[i] = plan->slot_of_entry[i] = plan->expert_of_entry[i] = -1;
    for (int64_t i = 0; i < own; i++) {
        plan->expert_begin[i] = row;
        for (int64_t p = 0; p < P; p++)
            for (int64_t n = 0, at = k->came_at[p * own + i]; n < k->come[p * own + i].rows;
                 n++, at++, row++) {
                plan->token_of_row[row] = plan->entry_of_row[row] = at;
                plan->row_of_entry[at] = row;
                plan->slot_of_entry[at] = 0;
                plan->expert_of_entry[at] = (int32_t)i;
                copy_element(plan->weight_of_entry, at, k->x, at * k->x_width + D, size);
            }
    }
    plan->expert_begin[own] = row;
    for (int64_t t = 0; t <= plan->tokens; t++) plan->token_begin[t] = t;
    plan->group_begin[0] = 0, plan->group_begin[1] = plan->tokens;
    plan->rows = row;
}

/* ---- packing --------------------------------------------------------------------------------- */

typedef struct packing {
    const moe__column *columns;
    int count;
    char *to;
    int64_t row_bytes;
    int64_t row;          /* the first */
    const int64_t *place; /* position of each row; NULL: consecutive */
} packing;

static void pack_range(void *argument, int64_t begin, int64_t end)
{
    const packing *p = argument;
    for (int64_t i = begin; i < end; i++) {
        int64_t row = p->row + i;
        char *to = p->to + (p->place ? p->place[row] : i) * p->row_bytes;
        for (int c = 0; c < p->count; c++) {
            const moe__column *from = &p->columns[c];
            int64_t at = from->index ? from->index[row] : row;
            memcpy(to, (const char *)from->from + at * from->stride, (size_t)from->bytes);
            to += from->bytes;
        }
    }
}

static int64_t bytes_of(const moe__column *columns, int count)
{
    int64_t bytes = 0;
    for (int c = 0; c < count; c++) bytes += columns[c].bytes;
    return bytes;
}

moe_status moe__ranks_pack(moe_pass *pass, void *to, const int64_t *place, int64_t row,
                           int64_t rows, const moe__column *columns, int count)
{
    const moe__workers *workers = &pass->workers;
    packing p = {columns, count, to, bytes_of(columns, count), row, place};
    return moe__parallel_range(workers->context, rows, 64, pack_range, &p, workers->function);
}

moe_status moe__ranks_pack_here(moe_pass *pass, const moe__column *columns, int count)
{
    moe__ranks *k = &pass->ranks;
    const moe__placement *w = pass->layer->where;
    int64_t bytes = bytes_of(columns, count);
    for (int64_t s = 0; s < w->slots; s++) {
        int64_t row = pass->plan.a.expert_begin[w->number_of_slot[s] / w->slices];
        if (k->send[s].rows > 0)
            MOE_TRY(moe__ranks_pack(pass, (char *)k->here + k->sent_at[s] * bytes, NULL,
                                    row + k->send[s].first, k->send[s].rows, columns, count));
    }
    moe__lap(pass, MOE_TIME_PACK);
    return MOE_OK;
}

moe_status moe__ranks_pack_there(moe_pass *pass, const moe__column *columns, int count)
{
    moe__ranks *k = &pass->ranks;
    MOE_TRY(moe__ranks_pack(pass, k->there, k->plan.entry_of_row, 0, k->plan.rows, columns, count));
    moe__lap(pass, MOE_TIME_PACK);
    return MOE_OK;
}

void moe__ranks_collect(moe_pass *pass, int64_t row_bytes)
{
    moe__ranks *k = &pass->ranks;
    const moe__placement *w = pass->layer->where;
    if (k->results == k->here) return;
    for (int64_t s = 0; s < w->slots; s++)
        if (k->send[s].rows > 0)
            memcpy((char *)k->results + (k->all_at[s] + k->send[s].first) * row_bytes,
                   (const char *)k->here + k->sent_at[s] * row_bytes,
                   (size_t)(k->send[s].rows * row_bytes));
    moe__lap(pass, MOE_TIME_PACK);
}

/* ---- sums of slices -------------------------------------------------------------------------- */

typedef struct merging {
    const moe_pass *pass;
    int64_t width;
} merging;

/* Row by row: slice 0, plus slice 1, and so on. */
static void merge_range(void *argument, int64_t begin, int64_t end)
{
    const merging *m = argument;
    const moe__ranks *k = &m->pass->ranks;
    const moe__placement *w = m->pass->layer->where;
    const moe__plan_arrays *plan = &m->pass->plan.a;
    int64_t bytes = m->width * moe__dtype_size(plan->dtype);
    for (int64_t r = begin; r < end; r++) {
        int64_t e = plan->expert_of_entry[plan->entry_of_row[r]], n = r - plan->expert_begin[e];
        char *to = (char *)k->merged + r * bytes;
        for (int64_t s = 0; s < w->slices; s++) {
            const char *from = (const char *)k->results +
                               (k->all_at[w->slot_of_number[e * w->slices + s]] + n) * bytes;
            if (s == 0)
                memcpy(to, from, (size_t)bytes);
            else
                moe__add_reals(to, from, m->width, plan->dtype);
        }
    }
}

moe_status moe__ranks_merge(moe_pass *pass, int64_t width)
{
    moe__ranks *k = &pass->ranks;
    const moe__workers *workers = &pass->workers;
    merging m = {pass, width};
    k->rows = k->merged ? k->merged : k->results;
    k->row_stride = width;
    if (!k->merged) return MOE_OK;
    MOE_TRY(moe__parallel_range(workers->context, pass->plan.a.rows, 64, merge_range, &m,
                                workers->function));
    moe__lap(pass, MOE_TIME_PACK);
    return MOE_OK;
}
