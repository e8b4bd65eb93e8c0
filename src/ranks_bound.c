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
    int64_t size = moe__dtype_size(pass->plan.a.dtype), sent = k->plan_rows;
    k->keep_here = moe__arena_take(arena, sent, 1);
    k->keep_there = moe__arena_take(arena, k->in_rows, 1);
    k->score_here = moe__arena_take(arena, sent, size);
    k->score_there = moe__arena_take(arena, k->in_rows, size);
    k->order = moe__arena_take(arena, k->in_rows, (int64_t)sizeof *k->order);
}

/* Room for all that, and where the backend's memory is another for weights there. */
static moe_status make_room(moe_pass *pass, const char *function)
{
    moe__ranks *k = &pass->ranks;
    moe__arena arena = {NULL, 0};
    lay_out_scores(pass, &arena);
    MOE_TRY(moe__ranks_room(pass, &k->keep, MOE__ON_HOST, arena.used, function));
    if (moe__ranks_on_host(pass)) return MOE_OK;
    int64_t bytes = moe__mul(k->plan_rows, moe__dtype_size(pass->plan.a.dtype));
    return moe__ranks_room(pass, &k->keep_rows, MOE__ON_BACKEND, moe__max(bytes, 1), function);
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

/* Weights of this rank's rows by slot. */
static moe_status find_scores(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    const moe__memory *memory = pass->context->memory;
    const moe__plan_arrays *plan = &pass->plan.a;
    int64_t size = moe__dtype_size(plan->dtype);
    const moe__column weight = {.from = plan->weight_of_entry,
                                .index = plan->entry_of_row,
                                .stride = size,
                                .bytes = size};
    moe__moves moves;
    void *to = memory->is_host ? k->score_here : k->keep_rows.memory;
    MOE_TRY(moe__ranks_all_moves(pass, NULL, &moves));
    MOE_TRY(moe__ranks_pack(pass, &moves, to, size, &weight, 1));
    if (memory->is_host) return MOE_OK;
    return memory->fetch(&pass->workers, k->score_here, to, moves.most * size);
}

moe_status moe__bound_fetch_scores(moe_pass *pass, const char *function)
{
    if (pass->layer->config.received != MOE_RECEIVED_DROP_SCORE) return MOE_OK;
    moe__ranks *k = &pass->ranks;
    MOE_TRY(moe__ranks_agree_on(pass, make_room(pass, function), function));
    moe__arena arena = {k->keep.memory, 0};
    lay_out_scores(pass, &arena);
    MOE_TRY(find_scores(pass));
    return exchange_rows(pass, k->score_there, k->score_here, moe__dtype_size(pass->plan.a.dtype),
                         false);
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

/* Whether some row does not stay. */
static bool any_goes(const moe_pass *pass, bool by_score)
{
    const moe__ranks *k = &pass->ranks;
    for (int64_t s = 0, at = 0; s < pass->layer->where->slots; at += k->count[s++]) {
        if (!by_score && k->place[s] < k->count[s]) return true;
        for (int64_t n = 0; n < k->count[s] && by_score; n++)
            if (!k->keep_here[at + n]) return true;
    }
    return false;
}

/* Entries whose row does not stay lose their slot. */
static moe_status take_slots(moe_pass *pass, bool by_score)
{
    moe__ranks *k = &pass->ranks;
    const moe__memory *memory = pass->context->memory;
    moe__drop_job job = {.workers = pass->workers, .plan = &pass->plan.a};
    MOE_TRY(moe__ranks_all_moves(pass, k->place, &job.moves));
    job.stay = k->there_tables.back_to;
    if (by_score) {
        job.keep = memory->is_host ? k->keep_here : k->keep_rows.memory;
        if (!memory->is_host)
            MOE_TRY(memory->put(&pass->workers, k->keep_rows.memory, k->keep_here, job.moves.most));
    }
    return pass->call.kernels->travel_drop(&job);
}

moe_status moe__bound_drop(moe_pass *pass, bool *dropped)
{
    moe__ranks *k = &pass->ranks;
    int32_t policy = pass->layer->config.received;
    bool by_score = policy == MOE_RECEIVED_DROP_SCORE;
    if (by_score) MOE_TRY(exchange_rows(pass, k->keep_here, k->keep_there, 1, true));
    if (!by_score && policy != MOE_RECEIVED_DROP_POSITION) return MOE_OK;
    *dropped = any_goes(pass, by_score);
    return *dropped ? take_slots(pass, by_score) : MOE_OK;
}
