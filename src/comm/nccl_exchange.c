/* nccl_exchange.c - exchanges over NCCL: grouped sends and receives on a stream, asked for without
 * blocking.
 *
 * Everything is put on streams where an exchange is started, in the order of the calls, so that all
 * ranks give NCCL the same order; rows of host memory that need several rounds are therefore waited
 * for there, all but the last round. */
#include "nccl_internal.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- rounds of host memory ------------------------------------------------------------------- */

static int32_t copy(moe__nccl_exchange *x, void *to, const void *from, const int64_t *at,
                    const int64_t *each, enum cudaMemcpyKind kind)
{
    moe__nccl_group *g = x->group;
    int64_t bytes = at[g->size - 1] + each[g->size - 1];
    if (bytes == 0) return 0;
    cudaError_t error = cudaMemcpyAsync(to, from, (size_t)bytes, kind, g->stream);
    return error == cudaSuccess ? 0 : moe__nccl_say_cuda(g, "cudaMemcpyAsync", error);
}

static int32_t record(moe__nccl_exchange *x, cudaStream_t stream)
{
    moe__nccl_group *g = x->group;
    cudaError_t error = cudaSuccess;
    if (x->done) error = cudaEventRecord(x->done, stream);
    if (x->done && error == cudaSuccess) x->recorded = true;
    if (error == cudaSuccess && x->posted) error = cudaEventRecord(g->last, stream);
    return error == cudaSuccess ? 0 : moe__nccl_say_cuda(g, "cudaEventRecord", error);
}

/* Notes the end of what was put on the stream, also if that failed half way; keeps why it did. */
static int32_t mark_end(moe__nccl_exchange *x, cudaStream_t stream, int32_t answer)
{
    moe__nccl_group *g = x->group;
    char why[sizeof g->why];
    if (g->unsettled) return answer;
    memcpy(why, g->why, sizeof why);
    int32_t recorded = record(x, stream);
    if (answer != 0) memcpy(g->why, why, sizeof why);
    return answer != 0 ? answer : recorded;
}

static int32_t put_round(moe__nccl_exchange *x)
{
    moe__nccl_group *g = x->group;
    if (g->size == 1) return 0;
    moe__nccl_pack(x);
    x->recorded = false;
    int32_t answer = copy(x, x->staged_send, x->pinned_send, x->send_at, x->send_bytes,
                          cudaMemcpyHostToDevice);
    if (answer == 0) answer = moe__nccl_post(x, g->stream);
    if (answer == 0)
        answer = copy(x, x->pinned_recv, x->staged_recv, x->recv_at, x->recv_bytes,
                      cudaMemcpyDeviceToHost);
    return mark_end(x, g->stream, answer);
}

/* Whether what was put on the stream is done; 1 if that or the communicator failed. */
static int32_t ask_round(moe__nccl_exchange *x, bool *done)
{
    moe__nccl_group *g = x->group;
    ncclResult_t state;
    *done = !x->recorded;
    if (*done) return 0;
    cudaError_t error = cudaEventQuery(x->done);
    *done = error == cudaSuccess;
    if (*done) return 0;
    if (error != cudaErrorNotReady) return moe__nccl_say_cuda(g, "an exchange", error);
    return moe__nccl_ask(g, &state);
}

static int32_t wait_round(moe__nccl_exchange *x)
{
    double begin = moe__nccl_seconds();
    for (;;) {
        bool done;
        if (ask_round(x, &done)) return 1;
        if (done) return 0;
        double now = moe__nccl_seconds();
        if (now > x->deadline) return MOE_COMM_LATE;
        moe__nccl_rest(now - begin);
    }
}

static int32_t put_host_rows(moe__nccl_exchange *x)
{
    x->last_round = moe__nccl_last_round(x);
    int32_t answer = put_round(x);
    while (answer == 0 && x->round < x->last_round) {
        answer = wait_round(x);
        if (answer == 0) answer = moe__nccl_unpack(x);
        if (answer != 0) break;
        x->round++;
        answer = put_round(x);
    }
    return answer;
}

/* ---- rows of the device ---------------------------------------------------------------------- */

static int32_t put_device_rows(moe__nccl_exchange *x)
{
    moe__nccl_group *g = x->group;
    const moe_exchange *e = &x->e;
    cudaStream_t stream = (cudaStream_t)e->stream;
    int captured;
    for (int32_t p = 0; p < g->size; p++) {
        bool other = p != g->rank;
        x->send_at[p] = e->to_all ? 0 : e->send_begin[p] * e->row_bytes;
        x->recv_at[p] = e->recv_begin[p] * e->row_bytes;
        x->send_bytes[p] = other ? moe__nccl_rows_to(e, p) * e->row_bytes : 0;
        x->recv_bytes[p] = other ? moe__nccl_rows_from(e, p) * e->row_bytes : 0;
    }
    x->send = e->send;
    x->recv = e->recv;
    int64_t own = moe__nccl_rows_from(e, g->rank) * e->row_bytes;
    int32_t answer = 0;
    if (own > 0) {
        cudaError_t error = cudaMemcpyAsync(moe__nccl_received(e, g->rank),
                                            moe__nccl_sent(e, g->rank), (size_t)own,
                                            cudaMemcpyDeviceToDevice, stream);
        if (error != cudaSuccess) answer = moe__nccl_say_cuda(g, "cudaMemcpyAsync", error);
    }
    if (answer == 0) answer = moe__nccl_post(x, stream);
    /* In a graph an event would be a node of it, and says nothing of the graph's runs. */
    if (e->ordered && (moe__nccl_captured(stream, &captured) != cudaSuccess || captured))
        return answer;
    return mark_end(x, stream, answer);
}

/* ---- the table ------------------------------------------------------------------------------- */

/* What must not be put on a stream that is being captured. Nothing has been done yet. */
static int32_t refuse_capture(moe__nccl_group *g, const moe_exchange *e)
{
    bool on_host = e->memory != MOE_COMM_DEVICE_MEMORY;
    int captured;
    cudaError_t error = moe__nccl_captured(on_host ? g->stream : (cudaStream_t)e->stream,
                                           &captured);
    if (on_host && e->stream && error == cudaSuccess && captured == MOE__NCCL_NOT_CAPTURED)
        error = moe__nccl_captured((cudaStream_t)e->stream, &captured);
    if (error != cudaSuccess) return moe__nccl_say_cuda(g, "cudaStreamIsCapturing", error);
    if (captured == MOE__NCCL_NOT_CAPTURED || (captured == MOE__NCCL_CAPTURED && e->ordered))
        return 0;
    (void)snprintf(g->why, sizeof g->why,
                   captured == MOE__NCCL_CAPTURED
                       ? "the stream is being captured, and this exchange waits"
                       : "the stream cannot be used while another one is being captured");
    return MOE_COMM_REFUSED;
}

static int32_t check_own(moe__nccl_group *g, const moe_exchange *e)
{
    int64_t rows = moe__nccl_rows_to(e, g->rank), expected = moe__nccl_rows_from(e, g->rank);
    if (rows == expected) return 0;
    (void)snprintf(g->why, sizeof g->why, "%lld rows for itself, %lld are expected", (ll)rows,
                   (ll)expected);
    return 1;
}

static moe__nccl_exchange *take_slot(moe__nccl_group *g, const moe_exchange *e)
{
    int i = e->ordered ? MOE_COMM_REQUESTS : 0;
    while (i < MOE_COMM_REQUESTS && g->exchange[i].active) i++;
    moe__nccl_exchange *x = &g->exchange[i];
    x->e = *e;
    x->on_host = e->memory != MOE_COMM_DEVICE_MEMORY;
    x->together = x->on_host && g->all_to_all;
    x->number = g->next++;
    x->round = x->last_round = 0;
    x->deadline = moe__nccl_seconds() + g->timeout;
    x->recorded = x->posted = x->bad = false;
    x->active = !e->ordered;
    return x;
}

static int32_t put(moe__nccl_exchange *x)
{
    const moe_exchange *e = &x->e;
    int32_t rank = x->group->rank;
    int64_t own = moe__nccl_rows_from(e, rank) * e->row_bytes;
    if (!x->on_host) return put_device_rows(x);
    if (own > 0) memcpy(moe__nccl_received(e, rank), moe__nccl_sent(e, rank), (size_t)own);
    return put_host_rows(x);
}

/* What could not be put on the stream as a whole is told by a test, so that it is given up with the
 * part that could. */
int32_t moe__nccl_start(void *user, const moe_exchange *exchange, void **request)
{
    moe__nccl_group *g = user;
    moe__nccl_scope scope;
    if (check_own(g, exchange) || !moe__nccl_enter_call(g, &scope)) return 1;
    int32_t answer = refuse_capture(g, exchange);
    *request = NULL;
    if (answer == 0) {
        moe__nccl_exchange *x = take_slot(g, exchange);
        answer = put(x);
        *request = exchange->ordered ? NULL : x;
        x->bad = answer == 1;
        if (x->bad && !exchange->ordered) answer = 0;
    }
    moe__nccl_leave(&scope);
    return answer;
}

int32_t moe__nccl_test(void *user, void *request, int32_t *done)
{
    moe__nccl_group *g = user;
    moe__nccl_exchange *x = request;
    moe__nccl_scope scope;
    bool over = false;
    if (x->bad || !moe__nccl_enter_call(g, &scope)) return 1;
    int32_t answer = ask_round(x, &over);
    moe__nccl_leave(&scope);
    if (answer == 0 && over && x->on_host && g->size > 1) answer = moe__nccl_unpack(x);
    if (answer != 0 || !over) return answer;
    x->active = false;
    *done = MOE_COMM_DONE;
    return 0;
}

/* Whether the transport has let go of rows of the device. One that failed does nothing any more. */
static bool is_over(const moe__nccl_exchange *x)
{
    return !x->group->unsettled && x->recorded && cudaEventQuery(x->done) != cudaErrorNotReady;
}

/* An owned communicator has been revoked by now, so that its work ends soon; of one of the host
 * only the host can say. Rows of host memory are copies in staging, which is the group's and goes
 * with it. */
int64_t moe__nccl_cancel(void *user, void *request)
{
    moe__nccl_group *g = user;
    moe__nccl_exchange *x = request;
    const moe_exchange *e = &x->e;
    moe__nccl_scope scope;
    double begin = moe__nccl_seconds(), waited = 0;
    x->active = false;
    if (x->on_host || g->process != getpid() || !moe__nccl_enter(g, &scope)) return 0;
    bool over = is_over(x);
    while (!over && waited < 0.1) {
        moe__nccl_rest(waited);
        over = is_over(x);
        waited = moe__nccl_seconds() - begin;
    }
    moe__nccl_leave(&scope);
    if (over) return 0;
    return (e->recv_begin[g->size] + e->send_begin[e->to_all ? 1 : g->size]) * e->row_bytes;
}

/* The frames that have come are in staging, though the stream does not get past the receive. */
static bool look(moe__nccl_group *g, const moe__nccl_exchange *x)
{
    double begin = moe__nccl_seconds(), waited = 0;
    if (cudaStreamQuery(g->side) != cudaSuccess) return false; /* an earlier look */
    int32_t frames = x->together ? g->size : g->size - 1;
    if (cudaMemcpyAsync(g->peek, x->staged_recv, (size_t)frames * MOE__NCCL_FRAME,
                        cudaMemcpyDeviceToHost, g->side) != cudaSuccess)
        return false;
    while (cudaStreamQuery(g->side) == cudaErrorNotReady && waited < 0.1) {
        moe__nccl_rest(waited);
        waited = moe__nccl_seconds() - begin;
    }
    return cudaStreamQuery(g->side) == cudaSuccess;
}

void moe__nccl_missing(void *user, void *request, uint8_t *missing)
{
    moe__nccl_group *g = user;
    const moe__nccl_exchange *x = request;
    moe__nccl_scope scope;
    if (!x->on_host || x->round > 0 || g->size == 1 || !moe__nccl_enter(g, &scope)) return;
    bool seen = look(g, x);
    moe__nccl_leave(&scope);
    /* An all-to-all that has not even brought this rank its own frame tells nothing of others. */
    if (x->together && g->size > 2)
        seen = seen && moe__nccl_has_come(x, g->peek + x->recv_at[g->rank]);
    for (int32_t p = 0; p < g->size && seen; p++)
        missing[p] = p != g->rank && !moe__nccl_has_come(x, g->peek + x->recv_at[p]);
}

int32_t moe__nccl_poll(void *user)
{
    moe__nccl_group *g = user;
    moe__nccl_scope scope;
    ncclResult_t state;
    if (!moe__nccl_enter_call(g, &scope)) return 1;
    int32_t answer = moe__nccl_ask(g, &state);
    moe__nccl_leave(&scope);
    return answer;
}

/* ---- creation -------------------------------------------------------------------------------- */

/* An exchange of no rows: every pair sends its note. An all-to-all is a send and a receive of each
 * pair, so that it connects them too. */
int32_t moe__nccl_meet(moe__nccl_group *g, double deadline)
{
    moe_exchange e = {.struct_size = sizeof e, .row_bytes = 1};
    e.recv_begin = e.send_begin = g->no_rows;
    moe__nccl_exchange *x = take_slot(g, &e);
    x->deadline = deadline;
    int32_t answer = put_host_rows(x);
    if (answer == 0) answer = wait_round(x);
    if (answer == 0) answer = moe__nccl_unpack(x);
    x->active = false;
    return answer;
}
