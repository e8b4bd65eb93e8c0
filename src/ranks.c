/* ranks.c - experts on several ranks: rows to where their experts live, and back.
 *
 *     source:  rows of the plan, sorted by expert, so those of a rank are a range
 *     owner:   rows arrive by (source, expert, token); its pool works on them in the order (expert,
 *              source, token), which is the order that one rank with all tokens would have
 *     back:    results return in the order of arrival, which is the order of the source's rows
 *
 * The owner's view is a plan like any other: a "token" is a row that arrived, with one entry. Rank
 * r holds experts first_expert[r] to first_expert[r + 1] - 1. A gradient by a row, a weight or a
 * parameter is computed from the same numbers in the same order as on one rank, so it is the same
 * bytes. Rows and counts cross in exchanges of the communicator; a failure of one leaves the pass
 * failed. */
#include "pass_state.h"

#include <string.h>

static moe_comm *comm_of(const moe_pass *pass) { return pass->layer->comm; }
static int32_t ranks_of(const moe_pass *pass) { return comm_of(pass)->size; }

/* ---- memory ---------------------------------------------------------------------------------- */

/* Before the rows every rank tells every rank how it is doing, in a header, and how many rows it
 * has for each of its experts. */
enum { HEADER = 3, WORD_CALL = 0, WORD_LAYER = 1, WORD_STATUS = 2 };
enum { CALL_FORWARD = 1, CALL_BACKWARD = 2 };

/* The small arrays, whose sizes are known beforehand. */
static void lay_out_counts(moe__ranks *k, moe__arena *arena, int64_t P, int64_t experts, int64_t E)
{
    int64_t words_in = moe__mul(P, moe__add(experts, HEADER));
    k->send_begin = moe__arena_take(arena, P + 1, sizeof *k->send_begin);
    k->recv_begin = moe__arena_take(arena, P + 1, sizeof *k->recv_begin);
    k->out_begin = moe__arena_take(arena, P + 1, sizeof *k->out_begin);
    k->in_begin = moe__arena_take(arena, P + 1, sizeof *k->in_begin);
    k->words_out = moe__arena_take(arena, moe__add(E, P * HEADER), sizeof *k->words_out);
    k->words_in = moe__arena_take(arena, words_in, sizeof *k->words_in);
    k->verdict = moe__arena_take(arena, 2 * P, sizeof *k->verdict);
}

/* What depends on how many rows come. */
static void lay_out_rows(moe__ranks *k, moe__arena *arena, const moe__experts_room *room,
                         int64_t sent, int64_t rows, int64_t groups, bool save)
{
    int64_t real_size = moe__dtype_size(room->dtype);
    int64_t widest = moe__max(room->d_model, room->d_out);
    moe__plan_layout(&k->plan, arena, rows, rows, room->num_experts, groups, room->dtype);
    k->x = moe__arena_take(arena, moe__mul(rows, room->d_model), real_size);
    k->dy = save ? moe__arena_take(arena, moe__mul(rows, room->d_out), real_size) : NULL;
    k->here = moe__arena_take(arena, moe__mul(sent, widest), real_size);
    k->there = moe__arena_take(arena, moe__mul(rows, widest), real_size);
    k->weight_here = moe__arena_take(arena, sent, real_size);
    k->entry_grad = save ? moe__arena_take(arena, rows, real_size) : NULL;
    moe__lay_out_experts(&k->job, arena, room, rows, save, real_size);
}

static moe_status make_room(moe_pass *pass, void **memory, int64_t *capacity, int64_t bytes,
                            const char *function)
{
    if (bytes < 0) REFUSE(MOE_ERROR_OVERFLOW, "the rows of all ranks do not fit in 63 bits");
    if (bytes <= *capacity) return MOE_OK;
    void *larger = moe__alloc(pass->context, bytes);
    if (!larger)
        REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no %lld bytes for rows of other ranks", (ll)bytes);
    moe__comm_free(comm_of(pass), pass->context, *memory, *capacity);
    *memory = larger;
    *capacity = bytes;
    return MOE_OK;
}

void moe__ranks_trim(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    const moe_comm *comm = pass->layer ? pass->layer->comm : NULL;
    moe__comm_free(comm, pass->context, k->rows_memory, k->rows_bytes);
    k->rows_memory = NULL;
    k->rows_bytes = 0;
}

void moe__ranks_free(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    const moe_comm *comm = pass->layer ? pass->layer->comm : NULL;
    moe__ranks_trim(pass);
    moe__comm_free(comm, pass->context, k->counts_memory, k->counts_bytes);
    *k = (moe__ranks){0};
}

/* ---- counts and order ------------------------------------------------------------------------ */

moe_status moe__ranks_prepare(moe_pass *pass, const char *function)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = ranks_of(pass), own = pass->experts->config.num_experts;
    int64_t E = pass->layer->num_experts;
    moe__arena arena = {NULL, 0};
    lay_out_counts(k, &arena, P, own, E);
    MOE_TRY(make_room(pass, &k->counts_memory, &k->counts_bytes, arena.used, function));
    arena = (moe__arena){k->counts_memory, 0};
    lay_out_counts(k, &arena, P, own, E);
    return MOE_OK;
}

/* The rows of rank p for expert i of this rank. */
static int64_t count_in(const moe_pass *pass, int64_t p, int64_t i)
{
    return pass->ranks.words_in[pass->ranks.in_begin[p] + HEADER + i];
}

/* Another rank's failure, which all ranks know of. */
static moe_status failed_elsewhere(moe_pass *pass, int64_t rank, moe_status status,
                                   const char *function)
{
    pass->ranks.agreed = true;
    REFUSE(status, "rank %lld failed: %s", (ll)rank, moe_status_text(status));
}

/* Exchanges headers with `status`, in a forward followed by the rows of `plan` (NULL: none) for
 * each expert. Every rank fails if one does: this one with its own status if it has one. */
static moe_status exchange_words(moe_pass *pass, const moe__plan_arrays *plan, int32_t call,
                                 moe_status status, const char *function)
{
    moe__ranks *k = &pass->ranks;
    const int64_t *first = pass->layer->first_expert;
    bool counts = call == CALL_FORWARD;
    int64_t P = ranks_of(pass), own = counts ? pass->experts->config.num_experts : 0;
    for (int64_t p = 0; p <= P; p++) {
        k->out_begin[p] = p * HEADER + (counts ? first[p] : 0);
        k->in_begin[p] = p * (HEADER + own);
    }
    for (int64_t p = 0; p < P; p++) {
        int64_t *words = k->words_out + k->out_begin[p];
        words[WORD_CALL] = call;
        words[WORD_LAYER] = pass->layer->config.layer_id;
        words[WORD_STATUS] = status;
        for (int64_t e = first[p]; counts && e < first[p + 1]; e++)
            words[HEADER + e - first[p]] = plan ? plan->expert_begin[e + 1] - plan->expert_begin[e]
                                                : 0;
    }
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = k->words_in,
                      .recv_begin = k->in_begin,
                      .send = k->words_out,
                      .send_begin = k->out_begin,
                      .row_bytes = sizeof *k->words_out};
    k->took_part = true;
    MOE_TRY(moe_comm_exchange(comm_of(pass), &e));
    if (status != MOE_OK) {
        k->agreed = true;
        return status;
    }
    for (int64_t p = 0; p < P; p++) {
        const int64_t *words = k->words_in + k->in_begin[p];
        if (words[WORD_CALL] != call || words[WORD_LAYER] != pass->layer->config.layer_id)
            REFUSE(MOE_ERROR_TRANSPORT,
                   "rank %lld is in a %s of layer %lld, rank %d in a %s of layer %d", (ll)p,
                   words[WORD_CALL] == CALL_BACKWARD ? "backward" : "forward",
                   (ll)words[WORD_LAYER], (int)comm_of(pass)->rank,
                   call == CALL_BACKWARD ? "backward" : "forward",
                   (int)pass->layer->config.layer_id);
        if (words[WORD_STATUS] != MOE_OK)
            return failed_elsewhere(pass, p, (moe_status)words[WORD_STATUS], function);
    }
    return MOE_OK;
}

/* Rows to and from each rank. */
static moe_status add_up_counts(moe_pass *pass, const moe__plan_arrays *plan, const char *function)
{
    moe__ranks *k = &pass->ranks;
    const int64_t *first = pass->layer->first_expert;
    int64_t P = ranks_of(pass), own = pass->experts->config.num_experts;
    k->send_begin[0] = k->recv_begin[0] = 0;
    for (int64_t p = 0; p < P; p++) {
        int64_t rows = 0;
        for (int64_t i = 0; i < own; i++) rows = moe__add(rows, count_in(pass, p, i));
        k->send_begin[p + 1] = plan->expert_begin[first[p + 1]];
        k->recv_begin[p + 1] = moe__add(k->recv_begin[p], rows);
        if (k->recv_begin[p + 1] < 0)
            REFUSE(MOE_ERROR_TRANSPORT, "rank %lld sent counts that are none", (ll)p);
    }
    return MOE_OK;
}

moe_status moe__ranks_decline(moe_pass *pass, bool backward, moe_status status,
                              const char *function)
{
    if (pass->ranks.took_part) return status;
    return exchange_words(pass, NULL, backward ? CALL_BACKWARD : CALL_FORWARD, status, function);
}

/* The plan of what arrives: row order (expert, source, token). */
static void order_rows(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    moe__plan_arrays *plan = &k->plan;
    int64_t P = ranks_of(pass), own = plan->num_experts, row = 0;
    int64_t *next = k->out_begin; /* the next row of each source; the counts are here already */
    for (int64_t p = 0; p < P; p++) next[p] = k->recv_begin[p];
    for (int64_t e = 0; e < own; e++) {
        plan->expert_begin[e] = row;
        for (int64_t p = 0; p < P; p++)
            for (int64_t n = 0; n < count_in(pass, p, e); n++, row++) {
                int64_t at = next[p]++;
                plan->token_of_row[row] = plan->entry_of_row[row] = at;
                plan->row_of_entry[at] = row;
                plan->slot_of_entry[at] = 0;
                plan->expert_of_entry[at] = (int32_t)e;
            }
    }
    plan->expert_begin[own] = row;
    for (int64_t t = 0; t <= plan->tokens; t++) plan->token_begin[t] = t;
    for (int64_t g = 0; g <= plan->groups; g++) plan->group_begin[g] = g ? plan->tokens : 0;
    plan->rows = row;
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* Rows [sent,width] of this rank's plan to their owners, or back if `home`. */
static moe_status move_rows(moe_pass *pass, void *to, const void *from, int64_t width, bool home)
{
    const moe__ranks *k = &pass->ranks;
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = to,
                      .recv_begin = home ? k->send_begin : k->recv_begin,
                      .send = from,
                      .send_begin = home ? k->recv_begin : k->send_begin,
                      .row_bytes = width * moe__dtype_size(k->plan.dtype)};
    return moe_comm_exchange(comm_of(pass), &e);
}

/* rows_out[r] = tokens_in[token_of_row[r]] of a plan. */
static moe_status gather(const moe_pass *pass, const moe__plan_arrays *plan, const void *tokens,
                         int64_t stride, void *rows, int64_t width, const moe__backend *kernels)
{
    moe__rows_job job = {.workers = pass->experts_job.workers,
                         .plan = plan,
                         .width = width,
                         .tokens_in = tokens,
                         .tokens_in_stride = stride,
                         .rows_out = rows,
                         .rows_out_stride = width};
    return kernels->dispatch_forward(&job);
}

/* Rows of the owner's plan in the order in which they arrived: every token has one row. */
static moe_status in_order_of_arrival(const moe_pass *pass, const void *rows, void *to,
                                      int64_t width, const moe__backend *kernels)
{
    moe__rows_job job = {.workers = pass->experts_job.workers,
                         .plan = &pass->ranks.plan,
                         .width = width,
                         .rows_in = rows,
                         .rows_in_stride = width,
                         .tokens_out = to,
                         .tokens_out_stride = width};
    return kernels->dispatch_backward(&job);
}

static void copy_element(void *to, int64_t i, const void *from, int64_t j, int64_t size)
{
    memcpy((char *)to + i * size, (const char *)from + j * size, (size_t)size);
}

/* Weights of `plan`'s rows to their owners. */
static moe_status send_weights(moe_pass *pass, const moe__plan_arrays *plan)
{
    moe__ranks *k = &pass->ranks;
    int64_t size = moe__dtype_size(plan->dtype);
    for (int64_t r = 0; r < plan->rows; r++)
        copy_element(k->weight_here, r, plan->weight_of_entry, plan->entry_of_row[r], size);
    return move_rows(pass, k->plan.weight_of_entry, k->weight_here, 1, false);
}

/* All ranks have memory for the rows that come, or none goes on. */
static moe_status agree_on_room(moe_pass *pass, moe_status status, const char *function)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = ranks_of(pass), *there = k->verdict + P;
    for (int64_t p = 0; p < P; p++) k->verdict[p] = status;
    MOE_TRY(moe_comm_all_to_all(comm_of(pass), there, k->verdict, sizeof *there));
    k->agreed = status != MOE_OK;
    for (int64_t p = 0; p < P && status == MOE_OK; p++)
        if (there[p] != MOE_OK) status = failed_elsewhere(pass, p, (moe_status)there[p], function);
    return status;
}

static moe_status forward_steps(moe_pass *pass, const moe__plan_arrays *plan, bool save,
                                const moe__backend *kernels, const char *function)
{
    moe__ranks *k = &pass->ranks;
    const moe__experts_room *room = &pass->experts->room;
    int64_t P = ranks_of(pass);
    MOE_TRY(exchange_words(pass, plan, CALL_FORWARD, MOE_OK, function));
    MOE_TRY(add_up_counts(pass, plan, function));
    moe__arena arena = {NULL, 0};
    lay_out_rows(k, &arena, room, plan->rows, k->recv_begin[P], 1, save);
    MOE_TRY(agree_on_room(
        pass, make_room(pass, &k->rows_memory, &k->rows_bytes, arena.used, function), function));
    arena = (moe__arena){k->rows_memory, 0};
    lay_out_rows(k, &arena, room, plan->rows, k->recv_begin[P], 1, save);
    order_rows(pass);
    MOE_TRY(gather(pass, plan, pass->x, pass->x_stride, k->here, room->d_model, kernels));
    MOE_TRY(move_rows(pass, k->x, k->here, room->d_model, false));
    MOE_TRY(send_weights(pass, plan));
    k->job.workers = pass->experts_job.workers;
    k->job.plan = &k->plan;
    k->job.x = k->x;
    k->job.x_stride = room->d_model;
    MOE_TRY(moe__experts_rows_forward(pass->experts, &k->job, kernels));
    MOE_TRY(in_order_of_arrival(pass, k->job.out, k->there, room->d_out, kernels));
    return move_rows(pass, k->here, k->there, room->d_out, true);
}

/* A rank that cannot go on for a reason that the others do not know ends their waits. */
static moe_status end_waits(moe_pass *pass, moe_status status)
{
    if (status != MOE_OK && !pass->ranks.agreed) moe_comm_abort(comm_of(pass));
    return status;
}

moe_status moe__ranks_forward(moe_pass *pass, const moe__plan_arrays *plan, bool save,
                              const moe__backend *kernels, const char *function)
{
    return end_waits(pass, forward_steps(pass, plan, save, kernels, function));
}

/* ---- backward -------------------------------------------------------------------------------- */

/* entry_grad of this rank's entries from the owners' rows; of those without a row 0. */
static moe_status fetch_weight_gradients(moe_pass *pass, const moe__plan_arrays *plan)
{
    moe__ranks *k = &pass->ranks;
    int64_t size = moe__dtype_size(plan->dtype);
    MOE_TRY(move_rows(pass, k->weight_here, k->entry_grad, 1, true));
    memset(pass->entry_grad, 0, (size_t)(plan->entries * size));
    for (int64_t r = 0; r < plan->rows; r++)
        copy_element(pass->entry_grad, plan->entry_of_row[r], k->weight_here, r, size);
    return MOE_OK;
}

moe_status moe__ranks_begin_backward(moe_pass *pass, const char *function)
{
    return end_waits(pass, exchange_words(pass, NULL, CALL_BACKWARD, MOE_OK, function));
}

static moe_status backward_steps(moe_pass *pass, const moe__experts_job *wanted, bool want_dx,
                                 const moe__backend *kernels)
{
    moe__ranks *k = &pass->ranks;
    const moe__plan_arrays *plan = wanted->plan;
    const moe__experts_room *room = &pass->experts->room;
    MOE_TRY(gather(pass, plan, wanted->dy, wanted->dy_stride, k->here, room->d_out, kernels));
    MOE_TRY(move_rows(pass, k->dy, k->here, room->d_out, false));
    k->job.workers = pass->experts_job.workers;
    k->job.parameters = wanted->parameters;
    k->job.overwrite = wanted->overwrite;
    k->job.dy = k->dy;
    k->job.dy_stride = room->d_out;
    k->job.entry_weight_grad = wanted->entry_weight_grad ? k->entry_grad : NULL;
    MOE_TRY(moe__experts_rows_backward(pass->experts, &k->job, want_dx, kernels));
    if (wanted->entry_weight_grad) MOE_TRY(fetch_weight_gradients(pass, plan));
    if (!want_dx) return MOE_OK;
    MOE_TRY(in_order_of_arrival(pass, k->job.dx_rows, k->there, room->d_model, kernels));
    return move_rows(pass, k->here, k->there, room->d_model, true);
}

moe_status moe__ranks_backward(moe_pass *pass, const moe__experts_job *wanted, bool want_dx,
                               const moe__backend *kernels)
{
    return end_waits(pass, backward_steps(pass, wanted, want_dx, kernels));
}

/* ---- the layers of a group ------------------------------------------------------------------- */

enum { FIELDS = 12 };

/* What must be the same on every rank, and last how many experts this rank has. */
static void describe_layer(const moe_layer_config *c, int64_t value[FIELDS],
                           const char *name[FIELDS])
{
    const moe_gate_config *g = c->gate ? &c->gate->config : NULL;
    const moe_experts_config *e = &c->experts->config;
    const struct {
        const char *name;
        int64_t value;
    } field[FIELDS] = {{"gate num_experts", g ? g->num_experts : 0},
                       {"gate kind", g ? g->kind : -1},
                       {"top_k", g ? g->top_k : 0},
                       {"d_model", e->d_model},
                       {"d_out", e->d_out},
                       {"dtype", e->dtype},
                       {"weight_position", c->experts->part[0]->config.weight_position},
                       {"output", c->output},
                       {"layer_id", c->layer_id},
                       {"residual_mix", c->residual_mix},
                       {"dropped", c->dropped},
                       {"experts of the pool", e->num_experts}};
    for (int i = 0; i < FIELDS; i++) {
        value[i] = field[i].value;
        name[i] = field[i].name;
    }
}

static moe_status compare_layers(const int64_t *all, const char *const name[FIELDS], int32_t P,
                                 const char *function)
{
    for (int32_t p = 1; p < P; p++)
        for (int i = 0; i < FIELDS - 1; i++)
            if (all[p * FIELDS + i] != all[i])
                REFUSE_ARGUMENT("%s is %lld on rank %d and %lld on rank 0", name[i],
                                (ll)all[p * FIELDS + i], (int)p, (ll)all[i]);
    return MOE_OK;
}

moe_status moe__ranks_join(moe_layer *layer, const char *function)
{
    const moe_layer_config *c = &layer->config;
    int32_t P = c->comm->size;
    const char *name[FIELDS];
    int64_t bytes = (int64_t)(P + 1) * (int64_t)sizeof(int64_t);
    int64_t *all = moe__alloc(layer->context, bytes * FIELDS); /* of all ranks, then its own */
    int64_t *begin = moe__alloc(layer->context, bytes);
    layer->first_expert = moe__alloc(layer->context, bytes);
    moe_status status = MOE_OK;
    if (!all || !begin || !layer->first_expert)
        status = moe__fail(MOE_ERROR_OUT_OF_MEMORY, function, "no memory for %d ranks", (int)P);
    int64_t *own = all ? all + (int64_t)P * FIELDS : NULL;
    if (own) describe_layer(c, own, name);
    for (int32_t p = 0; p <= P && status == MOE_OK; p++) begin[p] = p;
    if (status == MOE_OK)
        status = moe_comm_all_gather(c->comm, all, begin, own, FIELDS * (int64_t)sizeof *own);
    if (status == MOE_OK) status = compare_layers(all, name, P, function);
    for (int32_t p = 0; p < P && status == MOE_OK; p++) {
        if (p == 0) layer->first_expert[0] = 0;
        layer->first_expert[p + 1] = layer->first_expert[p] + all[p * FIELDS + FIELDS - 1];
    }
    if (status == MOE_OK) layer->num_experts = layer->first_expert[P];
    if (status == MOE_OK && c->gate && c->gate->config.num_experts != layer->num_experts)
        status = moe__fail(MOE_ERROR_INVALID_ARGUMENT, function,
                           "the gate has %lld experts, the pools of all ranks have %lld",
                           (ll)c->gate->config.num_experts, (ll)layer->num_experts);
    moe__comm_free(c->comm, layer->context, all, bytes * FIELDS);
    moe__comm_free(c->comm, layer->context, begin, bytes);
    if (status != MOE_OK) {
        moe__free(layer->context, layer->first_expert, bytes);
        layer->first_expert = NULL;
    }
    return status;
}
