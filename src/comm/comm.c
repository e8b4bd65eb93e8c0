/* comm.c - the communicator: a table of collectives, checked and with a deadline.
 *
 * Every collective is an exchange of rows (moe_exchange): one of equal blocks, one of the same rows
 * to all, one of no rows. Waiting is asking again until the deadline; then the ranks that did not
 * come are named and the communicator has failed. */
#include "internal.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* ---- structs --------------------------------------------------------------------------------- */

static void collectives_defaults(void *instance)
{
    *(moe_collectives *)instance = (moe_collectives){.size = 1, .timeout = 60};
}
static void exchange_defaults(void *instance) { *(moe_exchange *)instance = (moe_exchange){0}; }

const moe__struct_info moe__collectives_info = MOE__STRUCT_INFO(moe_collectives,
                                                                collectives_defaults);
const moe__struct_info moe__exchange_info = MOE__STRUCT_INFO(moe_exchange, exchange_defaults);

moe_status moe_collectives_init(moe_collectives *collectives, size_t size)
{
    return moe__struct_init(&moe__collectives_info, collectives, size, __func__);
}
moe_status moe_exchange_init(moe_exchange *exchange, size_t size)
{
    return moe__struct_init(&moe__exchange_info, exchange, size, __func__);
}

/* ---- life ------------------------------------------------------------------------------------ */

static moe_status check_table(const moe_collectives *t, const char *function)
{
    MOE_TRY(moe__check_range("size", t->size, 1, INT32_MAX / 2, function));
    MOE_TRY(moe__check_range("rank", t->rank, 0, t->size - 1, function));
    if (!(t->timeout > 0 && t->timeout <= 1e9))
        REFUSE_ARGUMENT("timeout is %g; it must be above 0 and at most 1e9 seconds", t->timeout);
    if (!(t->capabilities & MOE_COMM_HOST_MEMORY))
        REFUSE_ARGUMENT("capabilities 0x%llx lack MOE_COMM_HOST_MEMORY",
                        (unsigned long long)t->capabilities);
    if (!t->exchange_start || !t->exchange_test)
        REFUSE_ARGUMENT("%s is NULL", t->exchange_start ? "exchange_test" : "exchange_start");
    return MOE_OK;
}

static int64_t scratch_bytes(const moe_comm *c)
{
    return 2 * ((int64_t)c->size + 1) * (int64_t)sizeof *c->scratch;
}

moe_status moe__comm_make(moe_comm **comm, moe_context *context, const moe_collectives *table,
                          const char *(*why)(void *user), const char *function)
{
    moe_comm *c = moe__alloc_zeroed(context, sizeof *c);
    if (!c) goto no_memory;
    c->context = context;
    c->table = *table;
    c->rank = table->rank;
    c->size = table->size;
    c->why = why;
    c->scratch = moe__alloc(context, scratch_bytes(c));
    c->missing = moe__alloc(context, c->size);
    if (!c->scratch || !c->missing) goto no_memory;
    atomic_init(&c->references, 1);
    atomic_init(&c->failed, false);
    moe__context_retain(context);
    *comm = c;
    return MOE_OK;

no_memory:
    if (c) {
        moe__free(context, c->scratch, scratch_bytes(c));
        moe__free(context, c->missing, c->size);
        moe__free(context, c, sizeof *c);
    }
    if (table->release && why) table->release(table->user);
    REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for the group of %d ranks", (int)table->size);
}

moe_status moe_comm_create(moe_comm **comm, moe_context *context,
                           const moe_collectives *collectives)
{
    moe_collectives t;
    const char *function = __func__;
    if (!comm || !context) REFUSE_ARGUMENT("%s is NULL", comm ? "context" : "comm");
    MOE_TRY(moe__struct_read(&moe__collectives_info, &t, collectives, false, function));
    MOE_TRY(check_table(&t, function));
    return moe__comm_make(comm, context, &t, NULL, function);
}

void moe__comm_retain(moe_comm *comm) { atomic_fetch_add(&comm->references, 1); }

static void give_up(moe_comm *c, moe__request *r)
{
    int64_t bytes = r->recv_bytes + r->send_bytes;
    if (c->table.exchange_cancel) bytes = c->table.exchange_cancel(c->table.user, r->handle);
    c->pending_bytes += bytes;
    r->used = false;
    r->kept = bytes > 0;
}

static bool overlap(const void *a, int64_t a_bytes, const void *b, int64_t b_bytes)
{
    uintptr_t from = (uintptr_t)a, with = (uintptr_t)b;
    return a_bytes > 0 && b_bytes > 0 && from < with + (uintptr_t)b_bytes &&
           with < from + (uintptr_t)a_bytes;
}

bool moe__comm_keeps(const moe_comm *c, const void *memory, int64_t bytes)
{
    for (int i = 0; c && memory && i < MOE_COMM_REQUESTS; i++) {
        const moe__request *r = &c->request[i];
        if (r->kept && (overlap(memory, bytes, r->recv, r->recv_bytes) ||
                        overlap(memory, bytes, r->send, r->send_bytes)))
            return true;
    }
    return false;
}

void moe__comm_free(const moe_comm *c, moe_context *context, void *memory, int64_t bytes)
{
    if (!moe__comm_keeps(c, memory, bytes)) moe__free(context, memory, bytes);
}

void moe_comm_destroy(moe_comm *comm)
{
    if (!comm || atomic_fetch_sub(&comm->references, 1) != 1) return;
    moe_context *context = comm->context;
    for (int i = 0; i < MOE_COMM_REQUESTS; i++)
        if (comm->request[i].used) give_up(comm, &comm->request[i]);
    if (comm->table.release) comm->table.release(comm->table.user);
    moe__free(context, comm->scratch, scratch_bytes(comm));
    moe__free(context, comm->missing, comm->size);
    moe__free(context, comm, sizeof *comm);
    moe_context_destroy(context);
}

int32_t moe_comm_rank(const moe_comm *comm) { return comm ? comm->rank : -1; }
int32_t moe_comm_size(const moe_comm *comm) { return comm ? comm->size : 0; }
uint64_t moe_comm_capabilities(const moe_comm *comm) { return comm ? comm->table.capabilities : 0; }
int64_t moe_comm_pending_bytes(const moe_comm *comm) { return comm ? comm->pending_bytes : 0; }

/* ---- failure --------------------------------------------------------------------------------- */

static void give_all_up(moe_comm *c)
{
    for (int i = 0; i < MOE_COMM_REQUESTS; i++)
        if (c->request[i].used) give_up(c, &c->request[i]);
}

/* The communicator has failed: requests are given up, other ranks are told. */
static moe_status fail(moe_comm *c, moe_status status, const char *what, int32_t answer,
                       const char *function)
{
    const char *why = c->why ? c->why(c->table.user) : NULL;
    atomic_store(&c->failed, true);
    if (c->table.abort) c->table.abort(c->table.user);
    give_all_up(c);
    if (why && why[0]) REFUSE(status, "rank %d of %d: %s", (int)c->rank, (int)c->size, why);
    REFUSE(status, "rank %d of %d: %s returned %d", (int)c->rank, (int)c->size, what, (int)answer);
}

/* r: NULL of an ordered exchange. */
static moe_status time_is_up(moe_comm *c, const moe__request *r, const char *function)
{
    char list[120] = "";
    int32_t named = 0, count = 0;
    memset(c->missing, 0, (size_t)c->size);
    if (c->table.missing && r) c->table.missing(c->table.user, r->handle, c->missing);
    for (int32_t p = 0; p < c->size; p++) {
        count += c->missing[p];
        if (!c->missing[p] || named == 8) continue;
        size_t used = strlen(list);
        (void)snprintf(list + used, sizeof list - used, "%s %d", named ? "," : "", (int)p);
        named++;
    }
    atomic_store(&c->failed, true);
    if (c->table.abort) c->table.abort(c->table.user);
    give_all_up(c);
    REFUSE(MOE_ERROR_TIMEOUT, "rank %d of %d waited %g s; %s%s%s", (int)c->rank, (int)c->size,
           c->table.timeout, count ? "missing ranks:" : "who is missing is not known", list,
           count > named ? ", ..." : "");
}

/* What a function of the table answered that was not 0; nothing has been sent if it refused. */
static moe_status give_answer(moe_comm *c, const moe__request *r, const char *what, int32_t answer,
                              const char *function)
{
    const char *why = c->why ? c->why(c->table.user) : NULL;
    if (answer == MOE_COMM_LATE) return time_is_up(c, r, function);
    if (answer != MOE_COMM_REFUSED) return fail(c, MOE_ERROR_TRANSPORT, what, answer, function);
    REFUSE(MOE_ERROR_INVALID_STATE, "rank %d of %d: %s", (int)c->rank, (int)c->size,
           why && why[0] ? why : "the transport refused the exchange");
}

/* A table may have kept an abort of another thread for this one, which is the owner's. */
static moe_status check_alive(const moe_comm *c, const char *function)
{
    if (!c) REFUSE_ARGUMENT("comm is NULL");
    if (!atomic_load(&c->failed)) return MOE_OK;
    if (c->table.abort) c->table.abort(c->table.user);
    REFUSE(MOE_ERROR_TRANSPORT, "rank %d of %d: the communicator has failed before", (int)c->rank,
           (int)c->size);
}

/* ---- exchange -------------------------------------------------------------------------------- */

/* begin[0..count] from 0, ascending; the rows fit in 63 bits. */
static moe_status check_begins(const char *name, const int64_t *begin, int64_t count,
                               const void *rows, int64_t row_bytes, const char *function)
{
    if (!begin) REFUSE_ARGUMENT("%s_begin is NULL", name);
    if (begin[0] != 0) REFUSE_ARGUMENT("%s_begin[0] is %lld", name, (ll)begin[0]);
    for (int64_t p = 0; p < count; p++)
        if (begin[p + 1] < begin[p])
            REFUSE_ARGUMENT("%s_begin[%lld] is %lld after %lld", name, (ll)(p + 1),
                            (ll)begin[p + 1], (ll)begin[p]);
    if (moe__mul(begin[count], row_bytes) < 0)
        REFUSE(MOE_ERROR_OVERFLOW, "%s: %lld rows of %lld bytes do not fit in 63 bits", name,
               (ll)begin[count], (ll)row_bytes);
    if (!rows && begin[count] > 0)
        REFUSE_ARGUMENT("%s is NULL for %lld rows", name, (ll)begin[count]);
    return MOE_OK;
}

/* Whether the table can do what is asked for: rows of a device mean nothing to one of the host. */
static moe_status check_memory(const moe_comm *c, const moe_exchange *e, const char *function)
{
    unsigned long long can = c->table.capabilities;
    bool device = e->memory == MOE_COMM_DEVICE_MEMORY;
    if (e->memory != 0 && e->memory != MOE_COMM_HOST_MEMORY && !device)
        REFUSE_ARGUMENT("memory is %d; it must be MOE_COMM_HOST_MEMORY or MOE_COMM_DEVICE_MEMORY",
                        (int)e->memory);
    if (device && !(can & MOE_COMM_DEVICE_MEMORY))
        REFUSE_ARGUMENT("memory is %d, but capabilities 0x%llx lack MOE_COMM_DEVICE_MEMORY",
                        (int)e->memory, can);
    if (e->ordered != 0 && e->ordered != 1) REFUSE_ARGUMENT("ordered is %d", (int)e->ordered);
    if (e->ordered && !device)
        REFUSE_ARGUMENT("ordered is 1, but memory is %d, not MOE_COMM_DEVICE_MEMORY",
                        (int)e->memory);
    if (e->ordered && !(can & MOE_COMM_STREAM_ORDERED))
        REFUSE_ARGUMENT("ordered is 1, but capabilities 0x%llx lack MOE_COMM_STREAM_ORDERED", can);
    return MOE_OK;
}

static moe_status check_exchange(const moe_comm *c, const moe_exchange *e, const char *function)
{
    if (e->row_bytes < 1) REFUSE_ARGUMENT("row_bytes is %lld", (ll)e->row_bytes);
    if (e->to_all != 0 && e->to_all != 1) REFUSE_ARGUMENT("to_all is %d", (int)e->to_all);
    if (e->reserved != 0) REFUSE_ARGUMENT("reserved is %d", (int)e->reserved);
    MOE_TRY(check_memory(c, e, function));
    MOE_TRY(check_begins("recv", e->recv_begin, c->size, e->recv, e->row_bytes, function));
    int32_t parts = e->to_all ? 1 : c->size;
    MOE_TRY(check_begins("send", e->send_begin, parts, e->send, e->row_bytes, function));
    int64_t in = e->recv_begin[c->size] * e->row_bytes, out = e->send_begin[parts] * e->row_bytes;
    if (overlap(e->recv, in, e->send, out))
        REFUSE_ARGUMENT("recv, %lld bytes at %p, overlaps send, %lld bytes at %p", (ll)in, e->recv,
                        (ll)out, e->send);
    return MOE_OK;
}

/* Nobody asks for an ordered exchange again, so that it takes no slot. */
static moe_status start_ordered(moe_comm *c, const moe_exchange *e, int32_t *request,
                                const char *function)
{
    void *handle = NULL;
    int32_t answer = c->table.exchange_start(c->table.user, e, &handle);
    if (answer != 0) return give_answer(c, NULL, "exchange_start", answer, function);
    *request = MOE_COMM_NO_REQUEST;
    return MOE_OK;
}

static moe_status start(moe_comm *c, const moe_exchange *e, int32_t *request, const char *function)
{
    int32_t free_slot = 0;
    MOE_TRY(check_alive(c, function));
    MOE_TRY(check_exchange(c, e, function));
    if (e->ordered) return start_ordered(c, e, request, function);
    while (free_slot < MOE_COMM_REQUESTS && c->request[free_slot].used) free_slot++;
    if (free_slot == MOE_COMM_REQUESTS)
        REFUSE(MOE_ERROR_INVALID_STATE, "%d exchanges are in flight", MOE_COMM_REQUESTS);
    moe__request *r = &c->request[free_slot];
    *r = (moe__request){.recv = e->recv,
                        .send = e->send,
                        .recv_bytes = e->recv_begin[c->size] * e->row_bytes,
                        .send_bytes = e->send_begin[e->to_all ? 1 : c->size] * e->row_bytes};
    int32_t answer = c->table.exchange_start(c->table.user, e, &r->handle);
    r->used = answer == 0 || answer == MOE_COMM_LATE;
    if (answer != 0) return give_answer(c, r, "exchange_start", answer, function);
    *request = free_slot;
    return MOE_OK;
}

/* After moe_comm_abort the caller goes its way, so nothing of its memory may be in flight. */
static moe_status test(moe_comm *c, int32_t request, int32_t *done, const char *function)
{
    if (c && atomic_load(&c->failed)) give_all_up(c);
    MOE_TRY(check_alive(c, function));
    *done = MOE_COMM_DONE;
    if (request == MOE_COMM_NO_REQUEST) return MOE_OK;
    if (request < 0 || request >= MOE_COMM_REQUESTS || !c->request[request].used)
        REFUSE_ARGUMENT("request is %d, which is not in flight", (int)request);
    *done = MOE_COMM_PENDING;
    int32_t answer = c->table.exchange_test(c->table.user, c->request[request].handle, done);
    if (answer == MOE_COMM_LATE) return time_is_up(c, &c->request[request], function);
    if (answer != 0) return fail(c, MOE_ERROR_TRANSPORT, "exchange_test", answer, function);
    if (*done) c->request[request].used = false;
    return MOE_OK;
}

double moe__seconds(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Between two questions: others' turn at first, then a rest that grows to a fifth of a
 * millisecond. */
static void rest(double waited)
{
    struct timespec pause = {0, waited < 2e-3 ? 20000 : 200000};
    if (waited < 2e-4)
        (void)sched_yield();
    else
        (void)nanosleep(&pause, NULL);
}

static moe_status finish(moe_comm *c, int32_t request, const char *function)
{
    int32_t done = MOE_COMM_PENDING;
    double begin = moe__seconds();
    for (;;) {
        MOE_TRY(test(c, request, &done, function));
        if (done) return MOE_OK;
        double waited = moe__seconds() - begin;
        if (waited > c->table.timeout) return time_is_up(c, &c->request[request], function);
        rest(waited);
    }
}

static moe_status run(moe_comm *c, const moe_exchange *e, const char *function)
{
    int32_t request;
    MOE_TRY(start(c, e, &request, function));
    return finish(c, request, function);
}

/* ---- the calls ------------------------------------------------------------------------------- */

moe_status moe_comm_exchange(moe_comm *comm, const moe_exchange *exchange)
{
    moe_exchange e;
    MOE_TRY(check_alive(comm, __func__));
    MOE_TRY(moe__struct_read(&moe__exchange_info, &e, exchange, false, __func__));
    return run(comm, &e, __func__);
}

moe_status moe_comm_exchange_start(moe_comm *comm, const moe_exchange *exchange, int32_t *request)
{
    moe_exchange e;
    MOE_TRY(check_alive(comm, __func__));
    if (!request) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "request is NULL");
    MOE_TRY(moe__struct_read(&moe__exchange_info, &e, exchange, false, __func__));
    return start(comm, &e, request, __func__);
}

moe_status moe_comm_exchange_test(moe_comm *comm, int32_t request, int32_t *done)
{
    if (!done) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "done is NULL");
    return test(comm, request, done, __func__);
}

moe_status moe_comm_exchange_finish(moe_comm *comm, int32_t request)
{
    return finish(comm, request, __func__);
}

moe_status moe_comm_all_to_all(moe_comm *comm, void *recv, const void *send, int64_t bytes)
{
    MOE_TRY(check_alive(comm, __func__));
    if (bytes < 0)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "bytes is %lld", (ll)bytes);
    for (int32_t p = 0; p <= comm->size; p++) comm->scratch[p] = bytes ? p : 0;
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = recv,
                      .recv_begin = comm->scratch,
                      .send = send,
                      .send_begin = comm->scratch,
                      .row_bytes = moe__max(bytes, 1)};
    return run(comm, &e, __func__);
}

moe_status moe_comm_all_gather(moe_comm *comm, void *recv, const int64_t *recv_begin,
                               const void *send, int64_t row_bytes)
{
    const char *function = __func__;
    MOE_TRY(check_alive(comm, function));
    if (!recv_begin) REFUSE_ARGUMENT("recv_begin is NULL");
    int64_t own[2] = {0, recv_begin[comm->rank + 1] - recv_begin[comm->rank]};
    moe_exchange e = {.struct_size = sizeof e,
                      .recv = recv,
                      .recv_begin = recv_begin,
                      .send = send,
                      .send_begin = own,
                      .row_bytes = row_bytes,
                      .to_all = 1};
    return run(comm, &e, function);
}

moe_status moe_comm_barrier(moe_comm *comm)
{
    MOE_TRY(check_alive(comm, __func__));
    for (int32_t p = 0; p <= comm->size; p++) comm->scratch[p] = 0;
    moe_exchange e = {.struct_size = sizeof e,
                      .recv_begin = comm->scratch,
                      .send_begin = comm->scratch,
                      .row_bytes = 1};
    return run(comm, &e, __func__);
}

moe_status moe_comm_poll(moe_comm *comm)
{
    MOE_TRY(check_alive(comm, __func__));
    int32_t answer = comm->table.poll ? comm->table.poll(comm->table.user) : 0;
    return answer ? fail(comm, MOE_ERROR_TRANSPORT, "poll", answer, __func__) : MOE_OK;
}

int32_t moe__comm_in_flight(const moe_comm *comm)
{
    int32_t count = 0;
    for (int i = 0; comm && i < MOE_COMM_REQUESTS; i++) count += comm->request[i].used;
    return count;
}

void moe__comm_give_up(moe_comm *comm, int32_t request)
{
    moe_comm_abort(comm);
    if (comm->request[request].used) give_up(comm, &comm->request[request]);
}

void moe_comm_abort(moe_comm *comm)
{
    if (!comm) return;
    atomic_store(&comm->failed, true);
    if (comm->table.abort) comm->table.abort(comm->table.user);
}
