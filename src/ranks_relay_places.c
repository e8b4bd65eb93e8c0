/* ranks_relay_places.c - where rows that go by way of nodes are: memory, and positions of both
 * stages (ranks_relay.c). */
#include "ranks_rows.h"

#include <string.h>

int64_t moe__relay_bytes(const moe_pass *pass, bool backward)
{
    const moe__experts_room *room = &pass->experts->room;
    int64_t bytes = moe__mul(backward ? room->d_out : room->d_model, moe__dtype_size(room->dtype));
    return moe__ranks_whole(false, bytes);
}

/* Rows of a block: of tokens, and those that hold the records. */
static int64_t block_rows(const moe_pass *pass, bool backward, int64_t unique, int64_t rows)
{
    int64_t bytes = moe__relay_bytes(pass, backward), records = moe__mul(rows, MOE__RECORD);
    if (backward || records < 0) return backward ? unique : -1;
    return moe__add(unique, records / bytes + (records % bytes != 0));
}

int64_t moe__relay_slots(const moe_pass *pass, int64_t node, int64_t number, int64_t *first)
{
    const moe__placement *w = pass->layer->where;
    int64_t p = w->grid.rank_at[node * w->grid.width + number];
    *first = w->first_slot[p];
    return w->first_slot[p + 1] - *first;
}

static int64_t rows_of_node(const moe_pass *pass, int64_t node)
{
    int64_t rows = 0, first;
    for (int64_t l = 0; l < moe__relay_grid(pass)->width; l++) {
        int64_t count = moe__relay_slots(pass, node, l, &first);
        for (int64_t s = first; s < first + count; s++) rows += pass->ranks.count[s];
    }
    return rows;
}

static int64_t rows_from(const moe_pass *pass, int64_t node)
{
    const int64_t slots = moe__relay_grid(pass)->slots,
                  *count = pass->ranks.relay.in_count + node * slots;
    int64_t rows = 0;
    for (int64_t q = 0; q < slots; q++) rows += count[q];
    return rows;
}

/* ---- memory ---------------------------------------------------------------------------------- */

void moe__relay_lay_out_counts(moe_pass *pass, moe__arena *arena)
{
    moe__relay *y = &pass->ranks.relay;
    const moe__grid *g = moe__relay_grid(pass);
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
    for (int64_t n = 0; n < moe__relay_grid(pass)->nodes; n++) {
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
        int64_t out, in, each = moe__relay_bytes(pass, backward);
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

/* ---- positions ------------------------------------------------------------------------------- */

/* Blocks that leave, and where the records of each slot are in them. */
static void place_blocks(const moe_pass *pass)
{
    const moe__ranks *k = &pass->ranks;
    const moe__relay *y = &k->relay;
    const moe__tables *t = &k->tables;
    const moe__grid *g = moe__relay_grid(pass);
    int64_t T = pass->plan.a.tokens, records = moe__relay_bytes(pass, pass->backward) / MOE__RECORD,
            first;
    memcpy(t->block_first, y->unique, (size_t)(g->nodes + 1) * sizeof *y->unique);
    y->rail_send[0] = 0;
    for (int64_t n = 0; n < g->nodes; n++) {
        int64_t unique = y->unique[n + 1] - y->unique[n];
        int64_t at = (y->rail_send[n] + unique) * records;
        t->block_to[n] = y->rail_send[n];
        y->rail_send[n + 1] = y->rail_send[n] +
                              block_rows(pass, pass->backward, unique, rows_of_node(pass, n));
        for (int64_t l = 0; l < g->width; l++) {
            int64_t count = moe__relay_slots(pass, n, l, &first);
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
    const moe__grid *g = moe__relay_grid(pass);
    int64_t records = moe__relay_bytes(pass, pass->backward) / MOE__RECORD, range = 0, row = 0,
            first;
    y->rail_recv[0] = 0;
    for (int64_t n = 0; n < g->nodes; n++)
        y->rail_recv[n + 1] = y->rail_recv[n] +
                              block_rows(pass, pass->backward, y->in_unique[n], rows_from(pass, n));
    for (int64_t l = 0, q = 0; l < g->width; l++) {
        int64_t count = moe__relay_slots(pass, g->node, l, &first);
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
    const moe__grid *g = moe__relay_grid(pass);
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
