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
 * multiple of 16 bytes, so that a record of all is found by its number. Where all that is, is in
 * ranks_relay_places.c. */
#include "ranks_rows.h"

/* ---- which tokens go where ------------------------------------------------------------------- */

static void lay_out_unique(moe_pass *pass, moe__arena *arena, int64_t tokens)
{
    moe__relay *y = &pass->ranks.relay;
    int64_t N = moe__relay_grid(pass)->nodes, word = (int64_t)sizeof(int64_t),
            all = moe__mul(N, tokens);
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
    int64_t N = moe__relay_grid(pass)->nodes, bytes = (N + 1) * (int64_t)sizeof *y->unique;
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

static int64_t slots_of_node(const moe_pass *pass, int64_t node)
{
    int64_t slots = 0, first;
    for (int64_t l = 0; l < moe__relay_grid(pass)->width; l++)
        slots += moe__relay_slots(pass, node, l, &first);
    return slots;
}

int64_t moe__relay_words(const moe_pass *pass, int64_t rank, int64_t node)
{
    const moe__grid *g = moe__relay_grid(pass);
    return g->number_of[rank] == g->number ? 1 + slots_of_node(pass, node) : 0;
}

void moe__relay_say(const moe_pass *pass, int64_t rank, bool rows, int64_t *words)
{
    const moe__ranks *k = &pass->ranks;
    const moe__grid *g = moe__relay_grid(pass);
    int64_t n = g->node_of[rank], first;
    if (g->number_of[rank] != g->number) return;
    *words++ = rows ? k->relay.unique[n + 1] - k->relay.unique[n] : 0;
    for (int64_t l = 0; l < g->width; l++) {
        int64_t count = moe__relay_slots(pass, n, l, &first);
        for (int64_t s = first; s < first + count; s++) *words++ = rows ? k->count[s] : 0;
    }
}

/* What one rank of the rail said. */
static moe_status read_words(moe_pass *pass, int64_t node, const char *function)
{
    moe__relay *y = &pass->ranks.relay;
    const moe__grid *g = moe__relay_grid(pass);
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
    for (int64_t n = 0; n < moe__relay_grid(pass)->nodes; n++)
        MOE_TRY(read_words(pass, n, function));
    if (pass->ranks.relay.passing < 0)
        REFUSE(MOE_ERROR_TRANSPORT, "the rows of all nodes do not fit in 63 bits");
    return MOE_OK;
}

/* ---- packing --------------------------------------------------------------------------------- */

/* x or dy of the tokens of each block. */
static moe_status pack_tokens(moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__experts_job *e = &pass->experts_job;
    const moe__tables *t = &k->there_tables;
    const moe__experts_room *room = &pass->experts->room;
    int64_t size = moe__dtype_size(room->dtype), N = moe__relay_grid(pass)->nodes;
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
    return moe__ranks_pack(pass, &moves, k->relay.out, moe__relay_bytes(pass, backward), &row, 1);
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
                                     .at = MOE__RECORD_WEIGHT}};
    moe__moves moves = moe__ranks_moves_here(pass);
    moves.to = k->there_tables.record_to;
    return moe__ranks_pack(pass, &moves, k->relay.out, MOE__RECORD, columns, 2);
}

static moe__moves moves_on(const moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__tables *t = &k->there_tables;
    return (moe__moves){.count = moe__relay_grid(pass)->nodes * moe__relay_grid(pass)->slots,
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
    const moe__column index = {.from = y->in, .stride = MOE__RECORD, .bytes = word};
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
                                     .stride = moe__relay_bytes(pass, backward),
                                     .bytes = (backward ? room->d_out : room->d_model) * size,
                                     .by_place = 1},
                                    {.from = (const char *)y->in + MOE__RECORD_WEIGHT,
                                     .stride = MOE__RECORD,
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
    if (!backward) MOE_TRY(keep_index(pass));
    MOE_TRY(pack_on(pass));
    moe__lap(pass, MOE_TIME_PACK);
    return moe__ranks_start_on(pass, pass->layer->config.node_comm, &e);
}

/* Of bytes sent those to other nodes. */
static void report_bytes(moe_pass *pass, const moe_exchange *e)
{
    const moe__grid *g = moe__relay_grid(pass);
    const int64_t *begin = e->send_begin;
    int64_t own = begin[g->node + 1] - begin[g->node];
    *(pass->backward
          ? &pass->report.backward_bytes_to_nodes
          : &pass->report.forward_bytes_to_nodes) += (begin[g->nodes] - own) * e->row_bytes;
}

moe_status moe__relay_send(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    moe__relay *y = &k->relay;
    MOE_TRY(moe__ranks_set_round(pass, 0));
    if (!pass->backward) k->x_bytes = k->size.x;
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = y->in,
                      .recv_begin = y->rail_recv,
                      .send = y->out,
                      .send_begin = y->rail_send,
                      .row_bytes = moe__relay_bytes(pass, pass->backward)};
    MOE_TRY(pack_tokens(pass));
    if (!pass->backward) MOE_TRY(pack_records(pass));
    moe__lap(pass, MOE_TIME_PACK);
    k->took_part = true;
    report_bytes(pass, &e);
    return moe__ranks_start_on(pass, pass->layer->config.rail_comm, &e);
}

moe_status moe__relay_wait(moe_pass *pass)
{
    MOE_TRY(moe__ranks_wait(pass));
    MOE_TRY(go_on(pass));
    return moe__ranks_wait(pass);
}
