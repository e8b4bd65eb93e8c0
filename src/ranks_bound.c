/* ranks_bound.c - what max_received leaves of the rows that would come to a rank.
 *
 *     by position   of each (source, slot) the first n, and one more of some
 *     by score      the largest weights, which travel to the owner first; a byte for each row goes
 *                   back
 *     in rounds     all, `limit` at a time: see ranks_rows.c */
#include "ranks_rows.h"

#include <stdlib.h>
#include <string.h>

/* ---- who stays ------------------------------------------------------------------------------- */

static int64_t rows_up_to(const moe__ranks *k, int64_t n, int64_t each)
{
    int64_t rows = 0;
    for (int64_t i = 0; i < n; i++) rows += moe__min(k->in_count[i], each);
    return rows;
}

/* in_count becomes what stays of each: at most `each` for the largest that fits, and one more where
 * there is room. */
static void keep_by_position(moe_pass *pass, int64_t room)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass), low = 0, high = room;
    if (k->in_rows <= room) return;
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        if (rows_up_to(k, P * own, middle) <= room)
            low = middle;
        else
            high = middle - 1;
    }
    int64_t left = room - rows_up_to(k, P * own, low);
    for (int64_t i = 0; i < own; i++)
        for (int64_t p = 0; p < P; p++) {
            int64_t *n = &k->in_count[p * own + i];
            bool one_more = *n > low && left > 0;
            left -= one_more;
            *n = moe__min(*n, low + one_more);
        }
}

/* A row that may stay: its weight, and its number by slot, source and order. */
typedef struct candidate {
    double score;
    int64_t number;
} candidate;

/* The largest first, NaN last, equal ones by number. */
static int by_score(const void *a, const void *b)
{
    const candidate *x = a, *y = b;
    bool x_none = x->score != x->score, y_none = y->score != y->score;
    if (x_none != y_none) return x_none ? 1 : -1;
    if (x->score != y->score && !x_none) return x->score > y->score ? -1 : 1;
    return x->number < y->number ? -1 : x->number > y->number;
}

/* keep_there of what arrived by source and slot, and in_count of what stays. */
static moe_status keep_by_score(moe_pass *pass, int64_t room, const char *function)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass), at = 0;
    bool f64 = pass->plan.a.dtype == MOE_DTYPE_F64;
    if (k->in_rows > 0) memset(k->keep_there, 1, (size_t)k->in_rows);
    if (room == 0 || k->in_rows <= room) return MOE_OK;
    int64_t bytes = moe__mul(k->in_rows, (int64_t)sizeof(candidate));
    candidate *all = moe__alloc(pass->context, bytes);
    if (!all) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for %lld scores", (ll)k->in_rows);
    for (int64_t p = 0; p < P; p++) /* at: in order of arrival; number: in the owner's order */
        for (int64_t i = 0; i < own; i++)
            for (int64_t n = 0; n < k->in_count[p * own + i]; n++, at++) {
                int64_t number = k->in_place[p * own + i] + n;
                double score = f64 ? ((const double *)k->score_there)[at]
                                   : (double)((const float *)k->score_there)[at];
                k->order[number] = at;
                all[number] = (candidate){score, number};
            }
    qsort(all, (size_t)k->in_rows, sizeof *all, by_score);
    for (int64_t c = room; c < k->in_rows; c++) k->keep_there[k->order[all[c].number]] = 0;
    moe__free(pass->context, all, bytes);
    at = 0;
    for (int64_t i = 0; i < P * own; i++) {
        int64_t stay = 0;
        for (int64_t n = 0; n < k->in_count[i]; n++) stay += k->keep_there[at++];
        k->in_count[i] = stay;
    }
    return MOE_OK;
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* What MOE_RECEIVED_DROP_SCORE looks at. */
static void lay_out_scores(moe_pass *pass, moe__arena *arena)
{
    moe__ranks *k = &pass->ranks;
    int64_t size = moe__dtype_size(pass->plan.a.dtype), sent = pass->plan.a.rows;
    k->keep_here = moe__arena_take(arena, sent, 1);
    k->keep_there = moe__arena_take(arena, k->in_rows, 1);
    k->score_here = moe__arena_take(arena, sent, size);
    k->score_there = moe__arena_take(arena, k->in_rows, size);
    k->order = moe__arena_take(arena, k->in_rows, (int64_t)sizeof *k->order);
}

/* Bytes or weights of rows in slot order, to the owners or back. */
static moe_status exchange_rows(moe_pass *pass, void *recv, const void *send, int64_t size,
                                bool back)
{
    moe__ranks *k = &pass->ranks;
    const int64_t *first = pass->layer->where->first_slot;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass);
    k->send_begin[0] = k->recv_begin[0] = 0;
    for (int64_t p = 0; p < P; p++) {
        k->send_begin[p + 1] = k->send_begin[p];
        k->recv_begin[p + 1] = k->recv_begin[p];
        for (int64_t s = first[p]; s < first[p + 1]; s++) k->send_begin[p + 1] += k->count[s];
        for (int64_t i = 0; i < own; i++)
            k->recv_begin[p + 1] +=
                k->words_in[p * (MOE__RANKS_HEADER + own) + MOE__RANKS_HEADER + i];
    }
    const int64_t *there = k->recv_begin, *here = k->send_begin;
    return moe__ranks_exchange(pass, recv, back ? here : there, send, back ? there : here, size);
}

moe_status moe__bound_fetch_scores(moe_pass *pass, const char *function)
{
    if (pass->layer->config.received != MOE_RECEIVED_DROP_SCORE) return MOE_OK;
    moe__ranks *k = &pass->ranks;
    const moe__placement *w = pass->layer->where;
    const moe__plan_arrays *plan = &pass->plan.a;
    int64_t size = moe__dtype_size(plan->dtype), at = 0;
    moe__arena arena = {NULL, 0};
    lay_out_scores(pass, &arena);
    MOE_TRY(moe__ranks_agree_on(
        pass, moe__ranks_room(pass, &k->keep_memory, &k->keep_bytes, arena.used, function),
        function));
    arena = (moe__arena){k->keep_memory, 0};
    lay_out_scores(pass, &arena);
    for (int64_t s = 0; s < w->slots; s++) {
        int64_t row = plan->expert_begin[w->number_of_slot[s]];
        for (int64_t n = 0; n < k->count[s]; n++)
            memcpy((char *)k->score_here + at++ * size,
                   (const char *)plan->weight_of_entry + plan->entry_of_row[row + n] * size,
                   (size_t)size);
    }
    return exchange_rows(pass, k->score_there, k->score_here, size, false);
}

moe_status moe__bound_rows(moe_pass *pass, const char *function)
{
    moe__ranks *k = &pass->ranks;
    const moe_layer_config *c = &pass->layer->config;
    int64_t room = c->max_received;
    k->limit[moe__pass_comm(pass)->rank] = c->received == MOE_RECEIVED_CHUNK ? room : 0;
    if (room == 0 && c->received != MOE_RECEIVED_DROP_SCORE) return MOE_OK;
    if (c->received == MOE_RECEIVED_DROP_POSITION) keep_by_position(pass, room);
    if (c->received == MOE_RECEIVED_DROP_SCORE) MOE_TRY(keep_by_score(pass, room, function));
    if (c->received == MOE_RECEIVED_ERROR && k->in_rows > room)
        REFUSE(MOE_ERROR_BUFFER_TOO_SMALL, "%lld rows come to rank %d, max_received is %lld",
               (ll)k->in_rows, (int)moe__pass_comm(pass)->rank, (ll)room);
    return MOE_OK;
}

/* Entries whose row does not stay lose their slot. Returns whether there are any. */
static bool take_slots(moe_pass *pass, bool by_score)
{
    moe__ranks *k = &pass->ranks;
    const moe__placement *w = pass->layer->where;
    const moe__plan_arrays *plan = &pass->plan.a;
    bool any = false;
    for (int64_t s = 0, at = 0; s < w->slots; s++) {
        int64_t row = plan->expert_begin[w->number_of_slot[s]];
        for (int64_t n = 0; n < k->count[s]; n++, at++) {
            if (by_score ? k->keep_here[at] : n < k->place[s]) continue;
            plan->slot_of_entry[plan->entry_of_row[row + n]] = -1;
            any = true;
        }
    }
    return any;
}

moe_status moe__bound_drop(moe_pass *pass, bool *dropped)
{
    moe__ranks *k = &pass->ranks;
    int32_t policy = pass->layer->config.received;
    bool by_score = policy == MOE_RECEIVED_DROP_SCORE;
    if (by_score) MOE_TRY(exchange_rows(pass, k->keep_here, k->keep_there, 1, true));
    if (by_score || policy == MOE_RECEIVED_DROP_POSITION) *dropped = take_slots(pass, by_score);
    return MOE_OK;
}
