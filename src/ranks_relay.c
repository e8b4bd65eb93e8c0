/* ranks_relay.c - rows of x and dy in two stages, so that a token's goes to each node once.
 *
 *     out     for node n, to its rank with this rank's number: rows of the tokens that have a row
 *             of some expert there, in order of token; in a forward then a record for each of those
 *             rows, by rank of the node, slot and token: which of the block's rows, and the weight
 *     in      such blocks, one of each node
 *     on      of every record a row, to the rank of its expert, by source node, slot and token
 *
 * An expert's rows come as if they had gone straight, at other positions: by source rank's number,
 * then node. What goes back goes straight, so that there are no partial sums. Rows of blocks have a
 * multiple of 16 bytes, so that a record of all is found by its number. */
#include "ranks_rows.h"

#include <string.h>

/* Of a record: the index, then the weight. */
enum { RECORD = 16, RECORD_WEIGHT = 8 };

static const moe__grid *grid_of(const moe_pass *pass) { return &pass->layer->where->grid; }

/* Rows of a token on the rail. */
static int64_t rail_bytes(const moe_pass *pass, bool backward)
{
    const moe__experts_room *room = &pass->experts->room;
    int64_t bytes = moe__mul(backward ? room->d_out : room->d_model, moe__dtype_size(room->dtype));
    return moe__ranks_whole(false, bytes);
}

/* Rows of a block: of tokens, and those that hold the records. */
static int64_t block_rows(const moe_pass *pass, bool backward, int64_t unique, int64_t rows)
{
    int64_t bytes = rail_bytes(pass, backward), records = moe__mul(rows, RECORD);
    if (backward || records < 0) return backward ? unique : -1;
    return moe__add(unique, records / bytes + (records % bytes != 0));
}

/* Slots of a node: from the first of each rank's on, rank by rank. */
static int64_t slots_of_rank(const moe_pass *pass, int64_t node, int64_t number, int64_t *first)
{
    const moe__placement *w = pass->layer->where;
    int64_t p = w->grid.rank_at[node * w->grid.width + number];
    *first = w->first_slot[p];
    return w->first_slot[p + 1] - *first;
}

static int64_t slots_of_node(const moe_pass *pass, int64_t node)
{
    int64_t slots = 0, first;
    for (int64_t l = 0; l < grid_of(pass)->width; l++)
        slots += slots_of_rank(pass, node, l, &first);
    return slots;
}

static int64_t rows_of_node(const moe_pass *pass, int64_t node)
{
    int64_t rows = 0, first;
    for (int64_t l = 0; l < grid_of(pass)->width; l++) {
        int64_t count = slots_of_rank(pass, node, l, &first);
        for (int64_t s = first; s < first + count; s++) rows += pass->ranks.count[s];
    }
    return rows;
}

static int64_t rows_from(const moe_pass *pass, int64_t node)
{
    const int64_t slots = grid_of(pass)->slots, *count = pass->ranks.relay.in_count + node * slots;
    int64_t rows = 0;
    for (int64_t q = 0; q < slots; q++) rows += count[q];
    return rows;
}

/* ---- memory ---------------------------------------------------------------------------------- */

void moe__relay_lay_out_counts(moe_pass *pass, moe__arena *arena)
{
    moe__relay *y = &pass->ranks.relay;
    const moe__grid *g = grid_of(pass);
    int64_t word = (int64_t)sizeof(int64_t);
    y->unique = moe__arena_take(arena, g->nodes + 1, word);
    y->in_unique = moe__arena_take(arena, g->nodes, word);
    y->in_count = moe__arena_take(arena, moe__mul(g->nodes, g->slots), word);
    y->rail_send = moe__arena_take(arena, g->nodes + 1, word);
    y->rail_recv = moe__arena_take(arena, g->nodes + 1, word);
    y->node_send = moe__arena_take(arena, g->width + 1, word);
    y->node_recv = moe__arena_take(arena, g->width + 1, word);
}

void moe__relay_lay_out_tables(const moe_pass *pass, moe__tables *t, moe__arena *arena)
{
    const moe__placement *w = pass->layer->where;
    const moe__grid *g = &w->grid;
    int64_t word = (int64_t)sizeof(int64_t), own = moe__ranks_own(pass);
    int64_t ranges = moe__mul(g->nodes, g->slots);
    t->there_back = moe__arena_take(arena, moe__mul(moe__pass_comm(pass)->size, own), word);
    t->node_of_number = moe__arena_take(arena, w->numbers, word);
    t->block_first = moe__arena_take(arena, g->nodes + 1, word);
    t->block_to = moe__arena_take(arena, g->nodes, word);
    t->record_to = moe__arena_take(arena, w->slots, word);
    t->record_window = moe__arena_take(arena, w->slots, sizeof *t->record_window);
    t->on_first = moe__arena_take(arena, moe__add(ranges, 1), word);
    t->on_from = moe__arena_take(arena, ranges, word);
    t->on_window = moe__arena_take(arena, ranges, sizeof *t->on_window);
}

void moe__relay_make_tables(const moe_pass *pass, moe__tables *t)
{
    const moe__placement *w = pass->layer->where;
    for (int64_t p = 0; p < moe__pass_comm(pass)->size; p++)
        for (int64_t s = w->first_slot[p]; s < w->first_slot[p + 1]; s++)
            if (w->slot_of_number[w->number_of_slot[s]] == s)
                t->node_of_number[w->number_of_slot[s]] = w->grid.node_of[p];
}

/* Rows that leave and come on the rail. */
static void count_rail(const moe_pass *pass, bool backward, int64_t *out, int64_t *in)
{
    const moe__relay *y = &pass->ranks.relay;
    *out = *in = 0;
    for (int64_t n = 0; n < grid_of(pass)->nodes; n++) {
        int64_t unique = y->unique[n + 1] - y->unique[n];
        *out = moe__add(*out, block_rows(pass, backward, unique, rows_of_node(pass, n)));
        *in = moe__add(*in, block_rows(pass, backward, y->in_unique[n], rows_from(pass, n)));
    }
}

/* Bytes of the three arrays, of both directions. */
typedef struct widths {
    int64_t out, in, on;
} widths;

static widths count_bytes(const moe_pass *pass, bool save)
{
    const moe__ranks *k = &pass->ranks;
    widths bytes = {.on = moe__mul(k->relay.passing, k->size.x)};
    for (int backward = 0; backward <= save; backward++) {
        int64_t out, in, each = rail_bytes(pass, backward);
        count_rail(pass, backward, &out, &in);
        out = moe__mul(out, each), in = moe__mul(in, each);
        bytes.out = out < 0 || bytes.out < 0 ? -1 : moe__max(out, bytes.out);
        bytes.in = in < 0 || bytes.in < 0 ? -1 : moe__max(in, bytes.in);
    }
    int64_t back = save ? moe__mul(k->relay.passing, k->size.dy) : 0;
    bytes.on = back < 0 || bytes.on < 0 ? -1 : moe__max(back, bytes.on);
    return bytes;
}

void moe__relay_lay_out_rows(moe_pass *pass, moe__arena *arena, bool save)
{
    moe__relay *y = &pass->ranks.relay;
    widths bytes = count_bytes(pass, save);
    y->out = moe__arena_take(arena, bytes.out, 1);
    y->in = moe__arena_take(arena, bytes.in, 1);
    y->on = moe__arena_take(arena, bytes.on, 1);
    y->index = moe__arena_take(arena, y->passing, (int64_t)sizeof *y->index);
}

void moe__relay_stage(const moe_pass *pass, bool save, int64_t *out, int64_t *in)
{
    widths bytes = count_bytes(pass, save);
    bool fits = *out >= 0 && *in >= 0 && bytes.out >= 0 && bytes.in >= 0 && bytes.on >= 0;
    *out = fits ? moe__max(*out, moe__max(bytes.out, bytes.on)) : -1;
    *in = fits ? moe__max(*in, bytes.in) : -1;
}

/* ---- which tokens go where ------------------------------------------------------------------- */

static void lay_out_unique(moe_pass *pass, moe__arena *arena, int64_t tokens)
{
    moe__relay *y = &pass->ranks.relay;
    int64_t N = grid_of(pass)->nodes, word = (int64_t)sizeof(int64_t), all = moe__mul(N, tokens);
    int64_t scratch = moe__ranks_on_host(pass) ? 0 : moe__add(moe__mul(2, all), 8);
    y->place = moe__arena_take(arena, all, word);
    y->token = moe__arena_take(arena, all, word);
    y->begin = moe__arena_take(arena, N + 1, word);
    y->scratch = moe__arena_take(arena, scratch, word);
}

moe_status moe__relay_count(moe_pass *pass, const char *function)
{
    moe__ranks *k = &pass->ranks;
    moe__relay *y = &k->relay;
    const moe__memory *memory = pass->context->memory;
    int64_t N = grid_of(pass)->nodes, bytes = (N + 1) * (int64_t)sizeof *y->unique;
    moe__arena arena = {NULL, 0};
    lay_out_unique(pass, &arena, pass->plan.a.tokens);
    MOE_TRY(moe__ranks_room(pass, &y->room, MOE__ON_BACKEND, arena.used, function));
    arena = (moe__arena){y->room.memory, 0};
    lay_out_unique(pass, &arena, pass->plan.a.tokens);
    const moe__unique_job job = {.workers = pass->workers,
                                 .plan = &pass->plan.a,
                                 .nodes = N,
                                 .slices = pass->layer->where->slices,
                                 .node_of_number = k->there_tables.node_of_number,
                                 .place = y->place,
                                 .token = y->token,
                                 .begin = y->begin,
                                 .scratch = y->scratch};
    MOE_TRY(pass->call.kernels->travel_unique(&job));
    return memory->fetch(&pass->workers, y->unique, y->begin, bytes);
}

/* ---- words ----------------------------------------------------------------------------------- */

int64_t moe__relay_words(const moe_pass *pass, int64_t rank, int64_t node)
{
    const moe__grid *g = grid_of(pass);
    return g->number_of[rank] == g->number ? 1 + slots_of_node(pass, node) : 0;
}

void moe__relay_say(const moe_pass *pass, int64_t rank, bool rows, int64_t *words)
{
    const moe__ranks *k = &pass->ranks;
    const moe__grid *g = grid_of(pass);
    int64_t n = g->node_of[rank], first;
    if (g->number_of[rank] != g->number) return;
    *words++ = rows ? k->relay.unique[n + 1] - k->relay.unique[n] : 0;
    for (int64_t l = 0; l < g->width; l++) {
        int64_t count = slots_of_rank(pass, n, l, &first);
        for (int64_t s = first; s < first + count; s++) *words++ = rows ? k->count[s] : 0;
    }
}

/* What one rank of the rail said. */
static moe_status read_words(moe_pass *pass, int64_t node, const char *function)
{
    moe__relay *y = &pass->ranks.relay;
    const moe__grid *g = grid_of(pass);
    int64_t p = g->rank_at[node * g->width + g->number], rows = 0;
    const int64_t *words = pass->ranks.words_in + pass->ranks.in_begin[p] + MOE__RANKS_HEADER +
                           moe__ranks_own(pass);
    for (int64_t q = 0; q < g->slots; q++) {
        int64_t n = words[1 + q];
        if (n < 0) REFUSE(MOE_ERROR_TRANSPORT, "rank %lld has %lld rows", (ll)p, (ll)n);
        y->in_count[node * g->slots + q] = n;
        rows = moe__add(rows, n);
    }
    if (words[0] < (rows != 0) || (rows >= 0 && words[0] > rows))
        REFUSE(MOE_ERROR_TRANSPORT, "rank %lld has %lld tokens for %lld rows of the node", (ll)p,
               (ll)words[0], (ll)rows);
    y->in_unique[node] = words[0];
    y->passing = moe__add(y->passing, rows);
    return MOE_OK;
}

moe_status moe__relay_read(moe_pass *pass, const char *function)
{
    pass->ranks.relay.passing = 0;
    for (int64_t n = 0; n < grid_of(pass)->nodes; n++) MOE_TRY(read_words(pass, n, function));
    if (pass->ranks.relay.passing < 0)
        REFUSE(MOE_ERROR_TRANSPORT, "the rows of all nodes do not fit in 63 bits");
    return MOE_OK;
}

/* ---- positions ------------------------------------------------------------------------------- */

/* Blocks that leave, and where the records of each slot are in them. */
static void place_blocks(const moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__relay *y = &k->relay;
    const moe__tables *t = &k->tables;
    const moe__grid *g = grid_of(pass);
    int64_t T = pass->plan.a.tokens, records = rail_bytes(pass, pass->backward) / RECORD, first;
    memcpy(t->block_first, y->unique, (size_t)(g->nodes + 1) * sizeof *y->unique);
    y->rail_send[0] = 0;
    for (int64_t n = 0; n < g->nodes; n++) {
        int64_t unique = y->unique[n + 1] - y->unique[n];
        int64_t at = (y->rail_send[n] + unique) * records;
        t->block_to[n] = y->rail_send[n];
        y->rail_send[n + 1] = y->rail_send[n] +
                              block_rows(pass, pass->backward, unique, rows_of_node(pass, n));
        for (int64_t l = 0; l < g->width; l++) {
            int64_t count = slots_of_rank(pass, n, l, &first);
            for (int64_t s = first; s < first + count; at += k->count[s++]) {
                t->record_to[s] = at;
                t->record_window[s] = (moe__window){n * T, T};
            }
        }
    }
}

/* Blocks that come, and of each the rows that go on: ranges by rank, source node and slot. */
static void place_on(const moe_pass *pass)
{
    const moe__relay *y = &pass->ranks.relay;
    const moe__tables *t = &pass->ranks.tables;
    const moe__grid *g = grid_of(pass);
    int64_t records = rail_bytes(pass, pass->backward) / RECORD, range = 0, row = 0, first;
    y->rail_recv[0] = 0;
    for (int64_t n = 0; n < g->nodes; n++)
        y->rail_recv[n + 1] = y->rail_recv[n] +
                              block_rows(pass, pass->backward, y->in_unique[n], rows_from(pass, n));
    for (int64_t l = 0, q = 0; l < g->width; l++) {
        int64_t count = slots_of_rank(pass, g->node, l, &first);
        y->node_send[l] = row;
        for (int64_t n = 0; n < g->nodes; n++) {
            const int64_t *rows = y->in_count + n * g->slots;
            int64_t record = (y->rail_recv[n] + y->in_unique[n]) * records;
            for (int64_t i = 0; i < q; i++) record += rows[i];
            for (int64_t i = q; i < q + count; record += rows[i++]) {
                t->on_first[range] = row;
                t->on_from[range] = record;
                t->on_window[range++] = (moe__window){y->rail_recv[n], y->in_unique[n]};
                row += rows[i];
            }
        }
        q += count;
    }
    t->on_first[range] = y->node_send[g->width] = row;
}

void moe__relay_find_places(moe_pass *pass)
{
    place_blocks(pass);
    place_on(pass);
}

void moe__relay_find_came(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    const moe__grid *g = grid_of(pass);
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass), at = 0;
    for (int64_t l = 0; l < g->width; l++) {
        k->relay.node_recv[l] = at;
        for (int64_t n = 0; n < g->nodes; n++) {
            int64_t p = g->rank_at[n * g->width + l];
            for (int64_t i = 0; i < own; i++) {
                k->tables.there_to[i * P + p] = at;
                at += k->come[p * own + i].rows;
            }
        }
    }
    k->relay.node_recv[g->width] = at;
}

/* ---- packing --------------------------------------------------------------------------------- */

/* x or dy of the tokens of each block. */
static moe_status pack_tokens(moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__experts_job *e = &pass->experts_job;
    const moe__tables *t = &k->there_tables;
    const moe__experts_room *room = &pass->experts->room;
    int64_t size = moe__dtype_size(room->dtype), N = grid_of(pass)->nodes;
    bool backward = pass->backward;
    const moe__column row = {.from = backward ? e->dy : pass->x,
                             .index = k->relay.token,
                             .stride = (backward ? e->dy_stride : pass->x_stride) * size,
                             .bytes = (backward ? room->d_out : room->d_model) * size};
    const moe__moves moves = {.count = N,
                              .most = k->relay.unique[N],
                              .first = t->block_first,
                              .from = t->block_first,
                              .to = t->block_to};
    return moe__ranks_pack(pass, &moves, k->relay.out, rail_bytes(pass, backward), &row, 1);
}

static moe_status pack_records(moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__plan_arrays *plan = pass->experts_job.plan;
    int64_t real = moe__dtype_size(moe__real_dtype(pass->experts->room.dtype));
    int64_t word = (int64_t)sizeof(int64_t);
    const moe__column columns[2] = {{.from = k->relay.place,
                                     .index = plan->token_of_row,
                                     .window = k->there_tables.record_window,
                                     .stride = word,
                                     .bytes = word},
                                    {.from = plan->weight_of_entry,
                                     .index = plan->entry_of_row,
                                     .stride = real,
                                     .bytes = real,
                                     .at = RECORD_WEIGHT}};
    moe__moves moves = moe__ranks_moves_here(pass);
    moves.to = k->there_tables.record_to;
    return moe__ranks_pack(pass, &moves, k->relay.out, RECORD, columns, 2);
}

static moe__moves moves_on(const moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__tables *t = &k->there_tables;
    return (moe__moves){.count = grid_of(pass)->nodes * grid_of(pass)->slots,
                        .most = k->relay.passing,
                        .first = t->on_first,
                        .from = t->on_from,
                        .to = t->on_first};
}

/* The indices stay for a backward, whose blocks have none. */
static moe_status keep_index(moe_pass *pass)
{
    const moe__relay *y = &pass->ranks.relay;
    int64_t word = (int64_t)sizeof(int64_t);
    const moe__column index = {.from = y->in, .stride = RECORD, .bytes = word};
    moe__moves moves = moves_on(pass);
    return moe__ranks_pack(pass, &moves, y->index, word, &index, 1);
}

/* Rows that go on: of a record in the forward, of its index in the backward. */
static moe_status pack_on(moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__relay *y = &k->relay;
    const moe__experts_room *room = &pass->experts->room;
    int64_t size = moe__dtype_size(room->dtype),
            real = moe__dtype_size(moe__real_dtype(room->dtype));
    bool backward = pass->backward;
    const moe__column columns[2] = {{.from = y->in,
                                     .index = y->index,
                                     .window = k->there_tables.on_window,
                                     .stride = rail_bytes(pass, backward),
                                     .bytes = (backward ? room->d_out : room->d_model) * size,
                                     .by_place = 1},
                                    {.from = (const char *)y->in + RECORD_WEIGHT,
                                     .stride = RECORD,
                                     .bytes = real,
                                     .at = k->size.weight_at}};
    moe__moves moves = moves_on(pass);
    int64_t bytes = backward ? k->size.dy : k->size.x;
    return moe__ranks_pack(pass, &moves, y->on, bytes, columns, backward ? 1 : 2);
}

/* ---- the stages ------------------------------------------------------------------------------ */

/* What came on the rail to the ranks of the node. */
static moe_status go_on(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    moe__relay *y = &k->relay;
    bool backward = pass->backward;
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = backward ? k->dy : k->x,
                      .recv_begin = y->node_recv,
                      .send = y->on,
                      .send_begin = y->node_send,
                      .row_bytes = backward ? k->size.dy : k->size.x};
    y->went_on = true;
    if (!backward) MOE_TRY(keep_index(pass));
    MOE_TRY(pack_on(pass));
    moe__lap(pass, MOE_TIME_PACK);
    return moe__ranks_start_on(pass, pass->layer->config.node_comm, &e);
}

/* Of bytes sent those to other nodes. */
static void report_bytes(moe_pass *pass, const moe_exchange *e)
{
    const moe__grid *g = grid_of(pass);
    const int64_t *begin = e->send_begin;
    int64_t own = begin[g->node + 1] - begin[g->node];
    *(pass->backward
          ? &pass->report.backward_bytes_to_nodes
          : &pass->report.forward_bytes_to_nodes) += (begin[g->nodes] - own) * e->row_bytes;
}

/* Where nobody waits for an exchange the second stage follows the first on the stream. */
moe_status moe__relay_send(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    moe__relay *y = &k->relay;
    MOE_TRY(moe__ranks_set_round(pass, 0));
    if (!pass->backward) k->x_bytes = k->size.x;
    y->went_on = false;
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = y->in,
                      .recv_begin = y->rail_recv,
                      .send = y->out,
                      .send_begin = y->rail_send,
                      .row_bytes = rail_bytes(pass, pass->backward)};
    MOE_TRY(pack_tokens(pass));
    if (!pass->backward) MOE_TRY(pack_records(pass));
    moe__lap(pass, MOE_TIME_PACK);
    k->took_part = true;
    report_bytes(pass, &e);
    MOE_TRY(moe__ranks_start_on(pass, pass->layer->config.rail_comm, &e));
    return k->waiting ? MOE_OK : go_on(pass);
}

moe_status moe__relay_wait(moe_pass *pass)
{
    if (!pass->ranks.relay.went_on) {
        MOE_TRY(moe__ranks_wait(pass));
        MOE_TRY(go_on(pass));
    }
    return moe__ranks_wait(pass);
}
