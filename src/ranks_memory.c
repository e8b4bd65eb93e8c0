/* ranks_memory.c - the memory of rows that travel: blocks that grow when more come, of the host's
 * memory or the backend's. */
#include "ranks_rows.h"

#include <string.h>

void moe__layer_free(const moe_layer_config *c, moe_context *context, void *memory, int64_t bytes)
{
    if (c && moe__comm_keeps(c->rail_comm, memory, bytes)) return;
    if (c && moe__comm_keeps(c->node_comm, memory, bytes)) return;
    moe__comm_free(c ? c->comm : NULL, context, memory, bytes);
}

/* ---- rooms ----------------------------------------------------------------------------------- */

static void free_room(moe_pass *pass, const moe__room *room, int where)
{
    const moe__memory *memory = pass->context->memory;
    if (where == MOE__ON_BACKEND && !memory->is_host)
        memory->free(pass->context, room->memory, room->bytes);
    else
        moe__layer_free(pass->layer ? &pass->layer->config : NULL, pass->context, room->memory,
                        room->bytes);
}

moe_status moe__ranks_room(moe_pass *pass, moe__room *room, int where, int64_t bytes,
                           const char *function)
{
    const moe__memory *memory = pass->context->memory;
    if (bytes < 0) REFUSE(MOE_ERROR_OVERFLOW, "the rows of all ranks do not fit in 63 bits");
    if (bytes <= room->bytes) return MOE_OK;
    bool blocks = moe__ranks_padded(pass); /* whose unused rows travel as well */
    void *larger = where == MOE__ON_BACKEND ? memory->alloc(pass->context, bytes, blocks)
                                            : moe__alloc(pass->context, bytes);
    if (!larger)
        REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no %lld bytes for rows of other ranks", (ll)bytes);
    free_room(pass, room, where);
    *room = (moe__room){larger, bytes};
    return MOE_OK;
}

void moe__ranks_give_back(moe_pass *pass, moe__room *room, int where)
{
    free_room(pass, room, where);
    *room = (moe__room){0};
}

void moe__ranks_trim(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    moe__second_trim(pass);
    moe__ranks_give_back(pass, &k->keep, MOE__ON_HOST);
    moe__ranks_give_back(pass, &k->keep_rows, MOE__ON_BACKEND);
    moe__ranks_give_back(pass, &k->relay.room, MOE__ON_BACKEND);
    if (pass->layer && pass->layer->where && moe__ranks_padded(pass))
        return; /* needed to take part */
    moe__ranks_give_back(pass, &k->staged, MOE__ON_HOST);
    k->stage_out_bytes = k->stage_in_bytes = 0;
    moe__ranks_give_back(pass, &k->rows, MOE__ON_BACKEND);
}

/* Rows in the order of streams are in no request, but the others wait for the rest of the call. */
static bool is_left_in_a_call(const moe_pass *pass)
{
    return pass->call.phase != MOE__PHASE_NONE && pass->layer && pass->layer->where;
}

void moe__ranks_free(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    if (moe__ranks_give_up(pass) || is_left_in_a_call(pass)) moe__ranks_abort(pass);
    moe__second_free(pass);
    moe__ranks_give_back(pass, &k->relay.room, MOE__ON_BACKEND);
    moe__ranks_give_back(pass, &k->keep, MOE__ON_HOST);
    moe__ranks_give_back(pass, &k->keep_rows, MOE__ON_BACKEND);
    moe__ranks_give_back(pass, &k->staged, MOE__ON_HOST);
    moe__ranks_give_back(pass, &k->rows, MOE__ON_BACKEND);
    moe__ranks_give_back(pass, &k->tables_room, MOE__ON_BACKEND);
    moe__ranks_give_back(pass, &k->counts, MOE__ON_HOST);
    *k = (moe__ranks){0};
}

int64_t moe__ranks_bytes(const moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__room *rooms[] = {
        &k->counts,    &k->tables_room,   &k->rows,          &k->keep,        &k->keep_rows,
        &k->staged,    &k->second.counts, &k->second.device, &k->second.rows, &k->second.index_room,
        &k->relay.room};
    int64_t bytes = 0;
    for (size_t i = 0; i < sizeof rooms / sizeof *rooms; i++) bytes += rooms[i]->bytes;
    return bytes;
}

/* ---- tables ---------------------------------------------------------------------------------- */

static void lay_out_tables(const moe_pass *pass, moe__tables *t, moe__arena *arena)
{
    const moe__placement *w = pass->layer->where;
    int64_t word = (int64_t)sizeof(int64_t);
    int64_t from_all = moe__mul(moe__pass_comm(pass)->size, moe__ranks_own(pass));
    t->slot_of_number = moe__arena_take(arena, w->numbers, word);
    t->number_of_slot = moe__arena_take(arena, w->slots, word);
    t->first_slot = moe__arena_take(arena, moe__pass_comm(pass)->size + 1, word);
    t->here_first = moe__arena_take(arena, w->slots + 1, word);
    t->here_from = moe__arena_take(arena, w->slots, word);
    t->here_to = moe__arena_take(arena, w->slots, word);
    t->back_to = moe__arena_take(arena, w->slots, word);
    t->all_at = moe__arena_take(arena, w->slots + 1, word);
    t->there_first = moe__arena_take(arena, moe__add(from_all, 1), word);
    t->there_from = moe__arena_take(arena, from_all, word);
    t->there_to = moe__arena_take(arena, from_all, word);
    t->there_back = t->there_to;
    if (moe__ranks_relays(pass)) moe__relay_lay_out_tables(pass, t, arena);
}

int64_t moe__ranks_table_bytes(const moe_pass *pass)
{
    moe__tables counted;
    moe__arena arena = {NULL, 0};
    lay_out_tables(pass, &counted, &arena);
    return arena.used;
}

moe_status moe__ranks_make_tables(moe_pass *pass, void *block, const char *function)
{
    moe__ranks *k = &pass->ranks;
    const moe__placement *w = pass->layer->where;
    const moe__memory *memory = pass->context->memory;
    int64_t bytes = moe__ranks_table_bytes(pass);
    moe__arena arena = {block, 0};
    moe__workers workers = moe__workers_of(pass->context, function, NULL);
    lay_out_tables(pass, &k->tables, &arena);
    memcpy(k->tables.slot_of_number, w->slot_of_number,
           (size_t)w->numbers * sizeof *w->slot_of_number);
    memcpy(k->tables.number_of_slot, w->number_of_slot,
           (size_t)w->slots * sizeof *w->number_of_slot);
    memcpy(k->tables.first_slot, w->first_slot,
           (size_t)(moe__pass_comm(pass)->size + 1) * sizeof *w->first_slot);
    if (moe__ranks_blind(pass)) moe__ranks_place_blocks(pass);
    if (moe__ranks_relays(pass)) moe__relay_make_tables(pass, &k->tables);
    k->there_tables = k->tables;
    if (memory->is_host) return MOE_OK;
    MOE_TRY(moe__ranks_room(pass, &k->tables_room, MOE__ON_BACKEND, bytes, function));
    arena = (moe__arena){k->tables_room.memory, 0};
    lay_out_tables(pass, &k->there_tables, &arena);
    return memory->store(&workers, k->tables_room.memory, block, bytes);
}

/* ---- rows ------------------------------------------------------------------------------------ */

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

int64_t moe__ranks_block_rows(const moe_pass *pass)
{
    const moe__placement *w = pass->layer->where;
    return moe__add(w->header_rows, moe__mul(w->most_slots, pass->layer->config.padded_rows));
}

static row_counts count_rows(const moe_pass *pass)
{
    const moe__placement *w = pass->layer->where;
    const moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, limit = k->limit[moe__pass_comm(pass)->rank];
    if (moe__ranks_padded(pass)) {
        int64_t blocks = moe__mul(P, moe__ranks_block_rows(pass));
        int64_t each = pass->layer->config.padded_rows;
        return (row_counts){.sent = blocks,
                            .came = blocks,
                            .rows = moe__mul(moe__mul(P, moe__ranks_own(pass)), each),
                            .mine = moe__mul(moe__max(w->numbers, w->slots), each),
                            .plan = moe__mul(w->numbers / w->slices, each)};
    }
    int64_t came = limit > 0 ? moe__min(k->in_rows, limit) : k->in_rows, mine = 0;
    for (int64_t s = 0; s < w->slots; s++) mine += k->count[s];
    return (row_counts){mine, came, came, mine, k->plan_rows};
}

/* Rows of both directions have `here` and `there` in turn. */
static int64_t widest_out(const moe_pass *pass, bool again)
{
    const moe__row_sizes *size = &pass->ranks.size;
    return moe__max(again ? size->again : size->x, size->dy);
}
static int64_t widest_back(const moe_pass *pass, bool save)
{
    const moe__row_sizes *size = &pass->ranks.size;
    return save ? moe__max(size->out, size->back) : size->out;
}

/* What the experts use beside their rows; the pass's own is for this rank's. */
static void lay_out_scratch(moe_pass *pass, moe__arena *arena, const row_counts *n)
{
    const moe__experts_room *room = &pass->experts->room;
    moe__pass_shape shape = {.experts = room,
                             .entries = n->rows,
                             .num_experts = room->num_experts,
                             .groups = 1,
                             .dtype = room->dtype,
                             .threads = 1};
    pass->ranks.scratch = NULL;
    if (moe__ranks_on_host(pass)) return;
    int64_t bytes = moe__kernels(pass->context, room->dtype)->worker_bytes(&shape);
    pass->ranks.scratch = moe__arena_take(arena, bytes, 1);
}

static void lay_out_rows(moe_pass *pass, moe__arena *arena, const row_counts *n, bool save)
{
    moe__ranks *k = &pass->ranks;
    const moe_layer_config *c = &pass->layer->config;
    const moe__experts_room *room = &pass->experts->room;
    int64_t real_size = moe__dtype_size(moe__real_dtype(room->dtype));
    int64_t back = widest_back(pass, save);
    bool chunked = c->received == MOE_RECEIVED_CHUNK, again = chunked && save;
    moe__plan_layout(&k->plan, arena, n->came, n->came, room->num_experts, 1,
                     moe__real_dtype(room->dtype));
    k->x = moe__arena_take(arena, n->came, again ? k->size.again : k->size.x);
    k->dy = save ? moe__arena_take(arena, n->came, k->size.dy) : NULL;
    bool relays = moe__ranks_relays(pass); /* what leaves is elsewhere then */
    int64_t out = relays ? 0 : again ? k->size.again : k->size.x;
    k->here = moe__arena_take(arena, n->sent, moe__max(out, back));
    bool beside = moe__ranks_chunks(pass) > 1 && moe__ranks_on_host(pass);
    k->home = beside ? moe__arena_take(arena, n->sent, back) : k->here;
    k->there = moe__arena_take(arena, n->came, back);
    bool apart = chunked || moe__ranks_padded(pass) ||
                 moe__ranks_chunks(pass) > 1; /* results do not come back as `results` has them */
    k->results = apart ? moe__arena_take(arena, n->mine, back) : k->home;
    k->merged = pass->layer->where->in_order ? NULL : moe__arena_take(arena, n->plan, back);
    k->entry_grad = save ? moe__arena_take(arena, n->came, real_size) : NULL;
    if (again && moe__ranks_on_host(pass)) lay_out_carry(k, arena, room);
    moe__lay_out_experts(&k->job, arena, room, n->rows, save, room->dtype);
    lay_out_scratch(pass, arena, n);
    bool blind = moe__ranks_blind(pass);
    k->record = blind ? moe__arena_take(arena, 1, sizeof *k->record) : NULL;
    k->no_sums = blind ? moe__arena_take(arena, moe__share_most(pass->layer), sizeof(double))
                       : NULL;
    if (relays) moe__relay_lay_out_rows(pass, arena, save);
}

/* What goes through the host's memory at once. */
static moe_status make_stage(moe_pass *pass, const row_counts *n, bool save, const char *function)
{
    int64_t there = widest_out(pass, save && pass->layer->config.received == MOE_RECEIVED_CHUNK);
    int64_t back = widest_back(pass, save);
    int64_t out = moe__max(moe__mul(n->sent, there), moe__mul(n->came, back));
    int64_t in = moe__max(moe__mul(n->came, there), moe__mul(n->sent, back));
    if (moe__ranks_relays(pass)) moe__relay_stage(pass, save, &out, &in);
    int64_t shared = moe__mul(moe__share_most(pass->layer), (int64_t)sizeof(double));
    return moe__ranks_make_stage(pass, shared < 0 ? -1 : moe__max(out, shared),
                                 shared < 0 ? -1 : moe__max(in, shared), function);
}

moe_status moe__ranks_lay_out(moe_pass *pass, bool save, const char *function)
{
    moe__ranks *k = &pass->ranks;
    row_counts n = count_rows(pass);
    moe__arena arena = {NULL, 0};
    lay_out_rows(pass, &arena, &n, save);
    MOE_TRY(moe__ranks_room(pass, &k->rows, MOE__ON_BACKEND, arena.used, function));
    MOE_TRY(make_stage(pass, &n, save, function));
    arena = (moe__arena){k->rows.memory, 0};
    lay_out_rows(pass, &arena, &n, save);
    return MOE_OK;
}

/* What the pass holds stays where it is, also if this succeeds. */
moe_status moe__ranks_set_aside(moe_pass *pass, int64_t entries, moe__room *room,
                                const char *function)
{
    const moe__ranks held = pass->ranks;
    int64_t most = pass->layer->config.max_received;
    int64_t mine = moe__mul(entries, pass->layer->where->slices);
    row_counts n = {mine, most, most, mine, entries};
    moe__arena arena = {NULL, 0};
    *room = (moe__room){0};
    if (moe__ranks_padded(pass) || most == 0) return MOE_OK;
    lay_out_rows(pass, &arena, &n, true);
    pass->ranks = held;
    MOE_TRY(make_stage(pass, &n, true, function));
    if (arena.used >= 0 && arena.used <= held.rows.bytes) return MOE_OK;
    return moe__ranks_room(pass, room, MOE__ON_BACKEND, arena.used, function);
}

void moe__ranks_take_memory(moe_pass *pass, const moe__room *room)
{
    if (!room->memory) return;
    moe__ranks_give_back(pass, &pass->ranks.rows, MOE__ON_BACKEND);
    pass->ranks.rows = *room;
}

void moe__ranks_forget_memory(moe_pass *pass, moe__room *room)
{
    moe__ranks_give_back(pass, room, MOE__ON_BACKEND);
}
