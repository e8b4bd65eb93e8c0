/* ranks_words.c - what ranks tell each other before rows move.
 *
 *     words     to every rank: which call this is, of which layer, how it is going here; in a
 *               forward also this rank's rows for each of the receiver's slots
 *     answers   from each owner: whether it has memory, its rounds, and for each slot where the
 *               first of the asker's rows is among all of its rows, or how many of them stay
 *
 * A rank that cannot go on says so in words or answers: every rank then ends the call with an
 * error and the group lives on. MOE_EXCHANGE_PADDED puts the words into the blocks of rows. What a
 * bound leaves of the rows is in ranks_bound.c. */
#include "ranks_rows.h"

#include <string.h>

enum { WORD_CALL = 0, WORD_LAYER = 1, WORD_STATUS = 2 };
enum { CALL_FORWARD = 1, CALL_BACKWARD = 2 };
enum { CALLS = MOE__RANKS_CALLS }; /* plus CALLS times MOE__WANT_* */
enum { ANSWER = 3, ANSWER_STATUS = 0, ANSWER_ROUNDS = 1, ANSWER_LIMIT = 2 };

/* ---- memory ---------------------------------------------------------------------------------- */

/* The small arrays, whose sizes are known beforehand. Returns the tables' block. */
static void *lay_out_counts(moe_pass *pass, moe__arena *arena)
{
    moe__ranks *k = &pass->ranks;
    const moe__placement *w = pass->layer->where;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass),
            word = (int64_t)sizeof(int64_t);
    int64_t from_all = moe__mul(P, own);
    const moe__grid *g = &w->grid; /* words of the rail: for all nodes, and from all for this one */
    int64_t to_nodes = g->nodes ? g->nodes + w->slots : 0;
    int64_t from_nodes = moe__mul(g->nodes, g->slots + 1);
    k->out_begin = moe__arena_take(arena, P + 1, word);
    k->in_begin = moe__arena_take(arena, P + 1, word);
    k->words_out = moe__arena_take(arena, moe__add(w->slots, P * MOE__RANKS_HEADER + to_nodes),
                                   word);
    k->words_in = moe__arena_take(
        arena, moe__add(moe__add(from_all, from_nodes), P * MOE__RANKS_HEADER), word);
    k->answer_out = moe__arena_take(arena, moe__add(from_all, P * ANSWER), word);
    k->answer_in = moe__arena_take(arena, moe__add(w->slots, P * ANSWER), word);
    k->count = moe__arena_take(arena, w->slots, word);
    k->place = moe__arena_take(arena, w->slots, word);
    k->row = moe__arena_take(arena, w->slots, word);
    k->limit = moe__arena_take(arena, P, word);
    k->in_count = moe__arena_take(arena, from_all, word);
    k->in_place = moe__arena_take(arena, from_all, word);
    k->send = moe__arena_take(arena, w->slots, sizeof *k->send);
    k->come = moe__arena_take(arena, from_all, sizeof *k->come);
    k->sent_at = moe__arena_take(arena, w->slots, word);
    k->came_at = moe__arena_take(arena, from_all, word);
    int64_t begins = pass->layer->config.exchange_chunks * (P + 1);
    k->send_begin = moe__arena_take(arena, begins, word);
    k->recv_begin = moe__arena_take(arena, begins, word);
    k->expert_begin = moe__arena_take(arena, own + 1, word);
    if (g->nodes) moe__relay_lay_out_counts(pass, arena);
    return moe__arena_take(arena, moe__ranks_table_bytes(pass), 1);
}

moe_status moe__ranks_prepare(moe_pass *pass, const char *function)
{
    moe__ranks *k = &pass->ranks;
    moe__arena arena = {NULL, 0};
    (void)lay_out_counts(pass, &arena);
    MOE_TRY(moe__ranks_room(pass, &k->counts, MOE__ON_HOST, arena.used, function));
    memset(k->counts.memory, 0, (size_t)k->counts.bytes);
    arena = (moe__arena){k->counts.memory, 0};
    void *tables = lay_out_counts(pass, &arena);
    MOE_TRY(moe__ranks_make_tables(pass, tables, function));
    k->rounds = 1;
    k->size = moe__row_sizes_of(&pass->experts->config, moe__ranks_on_host(pass));
    if (pass->layer->where->first_group) MOE_TRY(moe__second_prepare(pass, function));
    if (!moe__ranks_padded(pass)) return MOE_OK;
    return moe__ranks_lay_out(pass, true, function); /* their sizes are known too */
}

/* ---- words ----------------------------------------------------------------------------------- */

moe_status moe__ranks_plan_counts(moe_pass *pass, const moe__plan_arrays *plan,
                                  const int64_t **expert_begin)
{
    const moe__memory *memory = pass->context->memory;
    *expert_begin = plan->expert_begin;
    return memory->is_host ? MOE_OK : memory->plan_counts(&pass->workers, plan, expert_begin);
}

moe_status moe__ranks_count(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    const moe__placement *w = pass->layer->where;
    const int64_t *begin;
    MOE_TRY(moe__ranks_plan_counts(pass, &pass->plan.a, &begin));
    for (int64_t s = 0; s < w->slots; s++) {
        int64_t v = w->number_of_slot[s], e = v / w->slices;
        bool here = w->slot_of_number[v] == s;
        k->count[s] = here ? begin[e + 1] - begin[e] : 0;
        k->row[s] = begin[e];
    }
    k->plan_rows = begin[pass->plan.a.num_experts];
    return MOE_OK;
}

void moe__ranks_header(const moe_pass *pass, bool backward, moe_status status, int64_t *words)
{
    words[WORD_CALL] = backward ? CALL_BACKWARD + CALLS * pass->ranks.wants : CALL_FORWARD;
    words[WORD_LAYER] = pass->layer->config.layer_id;
    words[WORD_STATUS] = status;
}

/* A word that is no status is a failure of the transport. */
moe_status moe__ranks_failed_elsewhere(moe_pass *pass, int64_t rank, int64_t word,
                                       const char *function)
{
    moe_status status = (moe_status)word;
    if (!moe__is_status(word))
        REFUSE(MOE_ERROR_TRANSPORT, "rank %lld sent status %lld", (ll)rank, (ll)word);
    pass->ranks.agreed = true;
    REFUSE(status, "rank %lld failed: %s", (ll)rank, moe_status_text(status));
}

moe_status moe__ranks_check_header(moe_pass *pass, int64_t p, bool backward, const int64_t *words,
                                   const char *function)
{
    int64_t call = words[WORD_CALL] % CALLS, wants = words[WORD_CALL] / CALLS;
    int32_t layer = pass->layer->config.layer_id;
    bool known = wants >= 0 && wants < (backward ? MOE__WANTS : 1);
    if (call != (backward ? CALL_BACKWARD : CALL_FORWARD) || words[WORD_LAYER] != layer || !known)
        REFUSE(MOE_ERROR_TRANSPORT,
               "rank %lld is in a %s of layer %lld, rank %d in a %s of layer %d", (ll)p,
               call == CALL_BACKWARD ? "backward" : "forward", (ll)words[WORD_LAYER],
               (int)moe__pass_comm(pass)->rank, backward ? "backward" : "forward", (int)layer);
    if (backward) pass->ranks.wanted |= (int32_t)wants;
    if (words[WORD_STATUS] != MOE_OK)
        return moe__ranks_failed_elsewhere(pass, p, words[WORD_STATUS], function);
    return MOE_OK;
}

moe_status moe__ranks_exchange_words(moe_pass *pass, bool backward, const moe__counts *counts,
                                     moe_status status, const char *function)
{
    moe__ranks *k = &pass->ranks;
    const moe__grid *g = &pass->layer->where->grid;
    int64_t P = moe__pass_comm(pass)->size, own = counts ? counts->own : 0;
    bool relayed = counts && counts->relayed;
    k->out_begin[0] = k->in_begin[0] = 0;
    for (int64_t p = 0; p < P; p++) {
        int64_t to = counts ? counts->first[p + 1] - counts->first[p] : 0;
        if (relayed) to += moe__relay_words(pass, p, g->node_of[p]);
        k->out_begin[p + 1] = k->out_begin[p] + MOE__RANKS_HEADER + to;
        int64_t from = own + (relayed ? moe__relay_words(pass, p, g->node) : 0);
        k->in_begin[p + 1] = k->in_begin[p] + MOE__RANKS_HEADER + from;
    }
    for (int64_t p = 0; p < P; p++) {
        int64_t *words = k->words_out + k->out_begin[p];
        moe__ranks_header(pass, backward, status, words);
        words += MOE__RANKS_HEADER;
        for (int64_t s = counts ? counts->first[p] : 0; counts && s < counts->first[p + 1]; s++)
            *words++ = status == MOE_OK ? counts->rows[s] : 0;
        if (relayed) moe__relay_say(pass, p, status == MOE_OK, words);
    }
    k->took_part = true;
    MOE_TRY(moe__ranks_exchange(pass, k->words_in, k->in_begin, k->words_out, k->out_begin,
                                (int64_t)sizeof(int64_t)));
    if (status != MOE_OK) {
        k->agreed = true;
        return status;
    }
    for (int64_t p = 0; p < P; p++)
        MOE_TRY(moe__ranks_check_header(pass, p, backward, k->words_in + k->in_begin[p], function));
    return MOE_OK;
}

moe_status moe__ranks_read_counts(moe_pass *pass, int64_t own, int64_t *in_count, int64_t *in_rows,
                                  const char *function)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, rows = 0;
    for (int64_t p = 0; p < P; p++)
        for (int64_t i = 0; i < own; i++) {
            int64_t n = k->words_in[k->in_begin[p] + MOE__RANKS_HEADER + i];
            if (n < 0) REFUSE(MOE_ERROR_TRANSPORT, "rank %lld has %lld rows", (ll)p, (ll)n);
            in_count[p * own + i] = n;
            rows = moe__add(rows, n);
        }
    if (rows < 0) REFUSE(MOE_ERROR_TRANSPORT, "the rows of all ranks do not fit in 63 bits");
    *in_rows = rows;
    return MOE_OK;
}

static moe__counts slot_counts(const moe_pass *pass)
{
    return (moe__counts){pass->ranks.count, pass->layer->where->first_slot, moe__ranks_own(pass),
                         moe__ranks_relays(pass)};
}

/* Where each source's rows are among all of this rank: by slot, then source. */
static void find_in_places(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass), at = 0;
    for (int64_t i = 0; i < own; i++)
        for (int64_t p = 0; p < P; p++) {
            k->in_place[p * own + i] = at;
            at += k->in_count[p * own + i];
        }
    k->in_rows = at;
}

moe_status moe__ranks_agree_on(moe_pass *pass, moe_status status, const char *function)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size;
    for (int64_t p = 0; p < P; p++) k->answer_out[p] = status, k->out_begin[p] = p;
    k->out_begin[P] = P;
    MOE_TRY(moe__ranks_exchange(pass, k->answer_in, k->out_begin, k->answer_out, k->out_begin,
                                (int64_t)sizeof(int64_t)));
    k->agreed = status != MOE_OK;
    for (int64_t p = 0; p < P && status == MOE_OK; p++)
        if (k->answer_in[p] != MOE_OK)
            status = moe__ranks_failed_elsewhere(pass, p, k->answer_in[p], function);
    return status;
}

/* ---- answers --------------------------------------------------------------------------------- */

static void write_answers(moe_pass *pass, moe_status status)
{
    moe__ranks *k = &pass->ranks;
    const moe_layer_config *c = &pass->layer->config;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass);
    int64_t limit = k->limit[moe__pass_comm(pass)->rank];
    bool kept = c->received == MOE_RECEIVED_DROP_POSITION;
    for (int64_t p = 0; p < P; p++) {
        int64_t *words = k->answer_out + p * (ANSWER + own);
        words[ANSWER_STATUS] = status;
        words[ANSWER_ROUNDS] = limit > 0 ? k->in_rows / limit + (k->in_rows % limit != 0) : 1;
        words[ANSWER_LIMIT] = limit;
        for (int64_t i = 0; i < own; i++)
            words[ANSWER + i] = kept ? k->in_count[p * own + i] : k->in_place[p * own + i];
    }
}

/* Takes what the owners said; keep_here of rows by slot is not looked at here. */
static moe_status read_answers(moe_pass *pass, moe_status status, const char *function)
{
    moe__ranks *k = &pass->ranks;
    const int64_t *first = pass->layer->where->first_slot;
    int64_t P = moe__pass_comm(pass)->size;
    k->agreed = status != MOE_OK;
    k->rounds = 1;
    for (int64_t p = 0; p < P && status == MOE_OK; p++) {
        const int64_t *words = k->answer_in + k->in_begin[p];
        if (words[ANSWER_STATUS] != MOE_OK)
            return moe__ranks_failed_elsewhere(pass, p, words[ANSWER_STATUS], function);
        int64_t rounds = words[ANSWER_ROUNDS], limit = words[ANSWER_LIMIT], most = INT64_MAX / 4;
        if (rounds < 0 || limit < 0 || rounds > most / moe__max(limit, 1))
            REFUSE(MOE_ERROR_TRANSPORT, "rank %lld answered %lld rounds of %lld rows", (ll)p,
                   (ll)rounds, (ll)limit);
        k->rounds = moe__max(k->rounds, rounds);
        k->limit[p] = limit;
        for (int64_t s = first[p]; s < first[p + 1]; s++) {
            k->place[s] = words[ANSWER + s - first[p]];
            if (k->place[s] < 0 || k->place[s] > most)
                REFUSE(MOE_ERROR_TRANSPORT, "rank %lld answered row %lld", (ll)p, (ll)k->place[s]);
        }
    }
    return status;
}

static moe_status exchange_answers(moe_pass *pass, moe_status status, const char *function)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size, own = moe__ranks_own(pass);
    write_answers(pass, status);
    for (int64_t p = 0; p <= P; p++) {
        k->out_begin[p] = p * (ANSWER + own);
        k->in_begin[p] = p * ANSWER + pass->layer->where->first_slot[p];
    }
    MOE_TRY(moe__ranks_exchange(pass, k->answer_in, k->in_begin, k->answer_out, k->out_begin,
                                (int64_t)sizeof(int64_t)));
    return read_answers(pass, status, function);
}

/* ---- the steps ------------------------------------------------------------------------------- */

/* MOE_EXCHANGE_PADDED: nothing to ask, but this rank's own rows must fit. */
static moe_status check_padded(moe_pass *pass, const char *function)
{
    const moe__placement *w = pass->layer->where;
    int64_t most = pass->layer->config.padded_rows;
    for (int64_t s = 0; s < w->slots; s++)
        if (pass->ranks.count[s] > most)
            REFUSE(MOE_ERROR_BUFFER_TOO_SMALL,
                   "rank %d has %lld rows for expert %lld, padded_rows is %lld",
                   (int)moe__pass_comm(pass)->rank, (ll)pass->ranks.count[s],
                   (ll)(w->number_of_slot[s] / w->slices), (ll)most);
    if (pass->layer->config.loss_batch != MOE_BATCH_GLOBAL) return MOE_OK;
    return moe__ranks_exchange_words(pass, false, NULL, MOE_OK, function);
}

moe_status moe__ranks_agree(moe_pass *pass, bool save, bool *dropped, const char *function)
{
    moe__ranks *k = &pass->ranks;
    *dropped = false;
    if (moe__ranks_blind(pass)) return moe__blind_begin(pass);
    if (moe__ranks_relays(pass)) MOE_TRY(moe__relay_count(pass, function));
    MOE_TRY(moe__ranks_count(pass));
    if (moe__ranks_padded(pass)) return check_padded(pass, function);
    moe__counts counts = slot_counts(pass);
    MOE_TRY(moe__ranks_exchange_words(pass, false, &counts, MOE_OK, function));
    MOE_TRY(moe__ranks_read_counts(pass, counts.own, k->in_count, &k->in_rows, function));
    if (counts.relayed) MOE_TRY(moe__relay_read(pass, function));
    find_in_places(pass);
    MOE_TRY(moe__bound_fetch_scores(pass, function));
    moe_status status = moe__bound_rows(pass, function);
    find_in_places(pass);
    if (status == MOE_OK) status = moe__ranks_lay_out(pass, save, function);
    MOE_TRY(exchange_answers(pass, status, function));
    return moe__bound_drop(pass, dropped);
}

moe_status moe__ranks_agree_backward(moe_pass *pass, const char *function)
{
    if (moe__ranks_blind(pass)) return moe__blind_begin(pass);
    if (moe__ranks_padded(pass)) return MOE_OK; /* in the blocks */
    return moe__ranks_exchange_words(pass, true, NULL, MOE_OK, function);
}

/* The first thing that the others wait for is the words of the secondary gates' rows, of the
 * experts' rows, or a header. */
moe_status moe__ranks_decline(moe_pass *pass, bool backward, moe_status status,
                              const char *function)
{
    bool padded = moe__ranks_padded(pass);
    if (moe__ranks_blind(pass)) return moe__blind_decline(pass, backward, status);
    bool header = backward || padded; /* without counts */
    if (padded && (backward || pass->layer->config.loss_batch != MOE_BATCH_GLOBAL))
        return moe__ranks_decline_padded(pass, backward, status);
    moe__counts counts = slot_counts(pass);
    if (pass->ranks.routes && pass->layer->where->first_group) counts = moe__second_counts(pass);
    return moe__ranks_exchange_words(pass, backward, header ? NULL : &counts, status, function);
}
