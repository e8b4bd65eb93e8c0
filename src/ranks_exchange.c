/* ranks_exchange.c - exchanges of a pass: words of the host, and rows of the backend's memory.
 *
 *     the host's backend       rows are sent from where they are
 *     a transport on streams   likewise, behind what is on the stream; nobody waits
 *     another transport        rows go through memory of the host, which waits for the stream */
#include "ranks_rows.h"

#include <string.h>

/* Bytes to and from other ranks, for the report. */
static void count_bytes(moe_pass *pass, const moe_comm *comm, const moe_exchange *e)
{
    int32_t P = comm->size, rank = comm->rank;
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
    count_bytes(pass, moe__pass_comm(pass), e);
    moe_status status = moe_comm_exchange(moe__pass_comm(pass), e);
    moe__lap(pass, MOE_TIME_EXCHANGE);
    return status;
}

moe_status moe__ranks_exchange(moe_pass *pass, void *recv, const int64_t *recv_begin,
                               const void *send, const int64_t *send_begin, int64_t row_bytes)
{
    const moe_exchange e = {.struct_size = sizeof e,
                            .recv = recv,
                            .recv_begin = recv_begin,
                            .send = send,
                            .send_begin = send_begin,
                            .row_bytes = row_bytes};
    return exchange(pass, &e);
}

/* ---- rows ------------------------------------------------------------------------------------ */

bool moe__comm_takes(const moe_comm *comm, const moe_context *context)
{
    const uint64_t all = MOE_COMM_DEVICE_MEMORY | MOE_COMM_STREAM_ORDERED;
    return context->memory->is_host || (comm->table.capabilities & all) == all;
}

bool moe__ranks_stages(const moe_pass *pass)
{
    const moe_layer_config *c = &pass->layer->config;
    const moe_context *context = pass->context;
    bool relay = !c->rail_comm ||
                 (moe__comm_takes(c->rail_comm, context) && moe__comm_takes(c->node_comm, context));
    return !relay || !moe__comm_takes(moe__pass_comm(pass), context);
}

moe_status moe__ranks_make_stage(moe_pass *pass, int64_t out, int64_t in, const char *function)
{
    moe__ranks *k = &pass->ranks;
    if (!moe__ranks_stages(pass)) return MOE_OK;
    if (out < 0 || in < 0) return moe__ranks_room(pass, &k->staged, MOE__ON_HOST, -1, function);
    int64_t most_out = moe__max(out, k->stage_out_bytes), most_in = moe__max(in, k->stage_in_bytes);
    moe__arena arena = {NULL, 0};
    (void)moe__arena_take(&arena, most_out, 1), (void)moe__arena_take(&arena, most_in, 1);
    MOE_TRY(moe__ranks_room(pass, &k->staged, MOE__ON_HOST, arena.used, function));
    arena = (moe__arena){k->staged.memory, 0};
    k->stage_out = moe__arena_take(&arena, most_out, 1);
    k->stage_in = moe__arena_take(&arena, most_in, 1);
    k->stage_out_bytes = most_out, k->stage_in_bytes = most_in;
    return MOE_OK;
}

/* Hands the exchange of the backend's memory to the transport; with a header's words first, where
 * they are the host's. beside: it may be on another stream than the call's until the wait. */
static moe_status start(moe_pass *pass, moe_comm *comm, moe_exchange *e,
                        const moe__block_header *header, bool beside)
{
    moe__ranks *k = &pass->ranks;
    const moe__memory *memory = pass->context->memory;
    int32_t P = comm->size;
    int64_t sent = e->send_begin[e->to_all ? 1 : P];
    k->to_store = NULL;
    count_bytes(pass, comm, e);
    if (!moe__comm_takes(comm, pass->context)) {
        MOE_TRY(memory->fetch(&pass->workers, k->stage_out, e->send, sent * e->row_bytes));
        if (header) moe__ranks_write_blocks(pass, header, k->stage_out, e->row_bytes);
        k->to_store = e->recv;
        k->store_bytes = e->recv_begin[P] * e->row_bytes;
        e->send = k->stage_out;
        e->recv = k->stage_in;
    } else if (memory->is_host) {
        if (header) moe__ranks_write_blocks(pass, header, k->here, e->row_bytes);
    } else {
        e->memory = MOE_COMM_DEVICE_MEMORY;
        e->stream = pass->workers.stream;
        e->ordered = 1;
        if (beside) MOE_TRY(memory->fork(&pass->workers, &e->stream));
    }
    k->on[k->started % MOE_COMM_REQUESTS] = comm;
    MOE_TRY(moe_comm_exchange_start(comm, e, &k->request[k->started % MOE_COMM_REQUESTS]));
    k->started++;
    return e->ordered && beside ? memory->end_fork(&pass->workers) : MOE_OK;
}

moe_status moe__ranks_rejoin(moe_pass *pass, moe_status status)
{
    const moe__memory *memory = pass->context->memory;
    char message[MOE__MESSAGE_SIZE];
    pass->ranks.finished = pass->ranks.started;
    if (!memory->join) return status;
    if (status == MOE_OK) return memory->join(&pass->workers, true);
    memcpy(message, moe_last_error(), sizeof message);
    (void)memory->join(&pass->workers, true);
    moe__restore_message(message);
    return status;
}

bool moe__ranks_give_up(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    bool held = false;
    for (; k->finished != k->started; k->finished++) {
        uint32_t i = k->finished % MOE_COMM_REQUESTS;
        if (k->request[i] == MOE_COMM_NO_REQUEST) continue;
        moe__comm_give_up(k->on[i], k->request[i]);
        held = true;
    }
    return held;
}

int64_t moe__ranks_chunks(const moe_pass *pass)
{
    return moe__ranks_stages(pass) ? 1 : pass->layer->config.exchange_chunks;
}

moe_status moe__ranks_start(moe_pass *pass, void *recv, const void *send, int64_t row_bytes,
                            bool back, const moe__block_header *header)
{
    moe__ranks *k = &pass->ranks;
    int64_t P = moe__pass_comm(pass)->size;
    const int64_t *in = back ? k->send_begin : k->recv_begin;
    const int64_t *out = back ? k->recv_begin : k->send_begin;
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = (char *)recv + moe__chunk_position(in, P, k->chunk) * row_bytes,
                      .recv_begin = moe__chunk_begin(in, P, k->chunk),
                      .send = (const char *)send +
                              moe__chunk_position(out, P, k->chunk) * row_bytes,
                      .send_begin = moe__chunk_begin(out, P, k->chunk),
                      .row_bytes = row_bytes};
    return start(pass, moe__pass_comm(pass), &e, moe__ranks_padded(pass) ? header : NULL, true);
}

moe_status moe__ranks_start_on(moe_pass *pass, moe_comm *comm, moe_exchange *exchange)
{
    return start(pass, comm, exchange, NULL, true);
}

moe_status moe__ranks_wait(moe_pass *pass)
{
    moe__ranks *k = &pass->ranks;
    void *to = k->to_store;
    const moe__memory *memory = pass->context->memory;
    uint32_t i = k->finished++ % MOE_COMM_REQUESTS;
    moe__lap(pass, MOE_TIME_PACK);
    k->to_store = NULL;
    moe_status status = moe_comm_exchange_finish(k->on[i], k->request[i]);
    if (status == MOE_OK && memory->join) status = memory->join(&pass->workers, false);
    if (status == MOE_OK && to)
        status = memory->store(&pass->workers, to, k->stage_in, k->store_bytes);
    moe__lap(pass, MOE_TIME_EXCHANGE);
    return status;
}

moe_status moe__ranks_wait_chunks(moe_pass *pass)
{
    for (int64_t i = 0; i < moe__ranks_chunks(pass); i++) MOE_TRY(moe__ranks_wait(pass));
    return MOE_OK;
}

moe_status moe__ranks_move(moe_pass *pass, void *recv, const int64_t *recv_begin, const void *send,
                           const int64_t *send_begin, int64_t row_bytes)
{
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = recv,
                      .recv_begin = recv_begin,
                      .send = send,
                      .send_begin = send_begin,
                      .row_bytes = row_bytes};
    moe__lap(pass, MOE_TIME_PACK);
    MOE_TRY(start(pass, moe__pass_comm(pass), &e, NULL, false));
    return moe__ranks_wait(pass);
}

moe_status moe__ranks_gather(moe_pass *pass, void *recv, const void *send, int64_t bytes)
{
    int64_t *begin = pass->ranks.in_begin;
    const int64_t once[2] = {0, 1};
    for (int64_t p = 0; p <= moe__pass_comm(pass)->size; p++) begin[p] = p;
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = recv,
                      .recv_begin = begin,
                      .send = send,
                      .send_begin = once,
                      .row_bytes = bytes,
                      .to_all = 1};
    moe__lap(pass, MOE_TIME_PACK);
    MOE_TRY(moe__ranks_make_stage(pass, bytes, bytes * moe__pass_comm(pass)->size,
                                  pass->workers.function));
    MOE_TRY(start(pass, moe__pass_comm(pass), &e, NULL, false));
    return moe__ranks_wait(pass);
}
