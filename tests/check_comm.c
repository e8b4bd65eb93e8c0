/* check_comm.c - the sentences of comm.h, on worlds of threads and on a host's collectives that
 * fail: what is exchanged, what is refused, who is named, and that nobody waits beyond the
 * deadline. */
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MOST = 16, ROW = 12 };

/* ---- a world, a thread for each rank --------------------------------------------------------- */

typedef struct rank_run rank_run;
typedef void (*rank_body)(rank_run *r);

struct rank_run {
    moe_comm *comm;
    int32_t rank, size, number; /* of the test's variation */
    rank_body body;
    char error[256]; /* of this rank's thread; "" */
};

static void *run_rank(void *argument)
{
    rank_run *r = argument;
    moe_clear_last_error();
    r->body(r);
    (void)snprintf(r->error, sizeof r->error, "%s", moe_last_error());
    return NULL;
}

/* Runs body on every rank; ranks are made before and destroyed after. */
static void run_world(rank_run ranks[MOST], int32_t size, int32_t number, double timeout,
                      rank_body body)
{
    moe_context *context = new_context();
    moe_world *world = NULL;
    pthread_t thread[MOST];
    MUST(moe_world_create(&world, context, size));
    for (int32_t p = 0; p < size; p++) {
        ranks[p] = (rank_run){.rank = p, .size = size, .number = number, .body = body};
        MUST(moe_comm_create_in_world(&ranks[p].comm, world, context, p, timeout));
    }
    moe_world_destroy(world);
    for (int32_t p = 0; p < size; p++)
        ck_assert_int_eq(pthread_create(&thread[p], NULL, run_rank, &ranks[p]), 0);
    for (int32_t p = 0; p < size; p++) ck_assert_int_eq(pthread_join(thread[p], NULL), 0);
    for (int32_t p = 0; p < size; p++) moe_comm_destroy(ranks[p].comm);
    moe_context_destroy(context);
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* Rows that rank `from` has for rank `to` in exchange n; some have none. */
static int64_t rows_of(int32_t from, int32_t to, int32_t n)
{
    return (from * 7 + to * 3 + n * 5) % 4 * ((from + to + n) % 3);
}

static unsigned char byte_of(int32_t from, int32_t to, int32_t n, int64_t at)
{
    return (unsigned char)(from * 31 + to * 17 + n * 7 + (int32_t)at);
}

typedef struct exchange_memory {
    moe_exchange e;
    int64_t recv_begin[MOST + 1], send_begin[MOST + 1];
    unsigned char *recv, *send;
} exchange_memory;

static void fill(exchange_memory *m, const rank_run *r, int32_t n)
{
    MUST(moe_exchange_init(&m->e, sizeof m->e));
    m->recv_begin[0] = m->send_begin[0] = 0;
    for (int32_t p = 0; p < r->size; p++) {
        m->recv_begin[p + 1] = m->recv_begin[p] + rows_of(p, r->rank, n);
        m->send_begin[p + 1] = m->send_begin[p] + rows_of(r->rank, p, n);
    }
    m->recv = calloc((size_t)m->recv_begin[r->size] * ROW + 1, 1);
    m->send = calloc((size_t)m->send_begin[r->size] * ROW + 1, 1);
    ck_assert(m->recv && m->send);
    for (int32_t p = 0; p < r->size; p++)
        for (int64_t i = 0; i < rows_of(r->rank, p, n) * ROW; i++)
            m->send[m->send_begin[p] * ROW + i] = byte_of(r->rank, p, n, i);
    m->e.recv = m->recv, m->e.send = m->send, m->e.row_bytes = ROW;
    m->e.recv_begin = m->recv_begin, m->e.send_begin = m->send_begin;
}

static void check_received(const exchange_memory *m, const rank_run *r, int32_t n)
{
    for (int32_t p = 0; p < r->size; p++)
        for (int64_t i = 0; i < rows_of(p, r->rank, n) * ROW; i++)
            ck_assert_int_eq(m->recv[m->recv_begin[p] * ROW + i], byte_of(p, r->rank, n, i));
}

static void free_memory(exchange_memory *m) { free(m->recv), free(m->send); }

/* Three exchanges at once, finished in another order on every rank; then one after another. */
static void exchange_body(rank_run *r)
{
    exchange_memory m[3];
    int32_t request[3];
    for (int32_t n = 0; n < 3; n++) {
        fill(&m[n], r, n);
        MUST(moe_comm_exchange_start(r->comm, &m[n].e, &request[n]));
    }
    for (int32_t n = 0; n < 3; n++) {
        int32_t which = (n + r->rank) % 3;
        MUST(moe_comm_exchange_finish(r->comm, request[which]));
        check_received(&m[which], r, which);
    }
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange_finish(r->comm, request[0]));
    for (int32_t n = 0; n < 3; n++) free_memory(&m[n]);
    for (int32_t n = 3; n < 20; n++) {
        fill(&m[0], r, n);
        MUST(moe_comm_exchange(r->comm, &m[0].e));
        check_received(&m[0], r, n);
        free_memory(&m[0]);
    }
    moe_clear_last_error();
}

static void simple_body(rank_run *r)
{
    int32_t P = r->size, send[MOST] = {0}, recv[MOST], all[MOST * MOST] = {0};
    int64_t begin[MOST + 1] = {0};
    for (int32_t p = 0; p < P; p++) send[p] = 100 * r->rank + p;
    MUST(moe_comm_all_to_all(r->comm, recv, send, sizeof *send));
    for (int32_t p = 0; p < P; p++) ck_assert_int_eq(recv[p], 100 * p + r->rank);
    MUST(moe_comm_all_to_all(r->comm, NULL, NULL, 0));
    for (int32_t p = 0; p < P; p++) begin[p + 1] = begin[p] + p; /* rank p has p rows */
    MUST(moe_comm_all_gather(r->comm, all, begin, send, sizeof *send));
    for (int32_t p = 0; p < P; p++)
        for (int32_t i = 0; i < p; i++) ck_assert_int_eq(all[begin[p] + i], 100 * p + i);
    MUST(moe_comm_barrier(r->comm));
    MUST(moe_comm_poll(r->comm));
}

static const int32_t SIZES[] = {1, 2, 3, 5, 16};

START_TEST(test_world_exchanges_rows)
{
    rank_run ranks[MOST];
    run_world(ranks, SIZES[_i], 0, 60, exchange_body);
    for (int32_t p = 0; p < SIZES[_i]; p++) ck_assert_str_eq(ranks[p].error, "");
    run_world(ranks, SIZES[_i], 0, 60, simple_body);
    for (int32_t p = 0; p < SIZES[_i]; p++) ck_assert_str_eq(ranks[p].error, "");
}
END_TEST

START_TEST(test_self_is_a_world_of_one)
{
    moe_context *context = new_context();
    rank_run r = {.size = 1};
    MUST(moe_comm_create_self(&r.comm, context));
    ck_assert_int_eq(moe_comm_rank(r.comm), 0);
    ck_assert_int_eq(moe_comm_size(r.comm), 1);
    ck_assert_uint_eq(moe_comm_capabilities(r.comm), MOE_COMM_HOST_MEMORY);
    exchange_body(&r), simple_body(&r);
    moe_comm_destroy(r.comm), moe_context_destroy(context);
}
END_TEST

/* ---- ranks that fail ------------------------------------------------------------------------- */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void absent_body(rank_run *r)
{
    if (r->rank == 1) return; /* never calls */
    double begin = now();
    moe_status status = moe_comm_barrier(r->comm);
    /* the first to run out of time names rank 1; the others hear that it gave up */
    ck_assert(status == MOE_ERROR_TIMEOUT || status == MOE_ERROR_TRANSPORT);
    ck_assert_double_lt(now() - begin, 20);
    ck_assert(status != MOE_ERROR_TIMEOUT || strstr(moe_last_error(), "missing ranks: 1"));
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_poll(r->comm)); /* for good */
}

START_TEST(test_world_names_the_rank_that_does_not_come)
{
    rank_run ranks[MOST];
    run_world(ranks, 3, 0, 2, absent_body); /* within it ranks 0 and 2 come */
}
END_TEST

static void leaving_body(rank_run *r)
{
    if (r->rank == 2) {
        moe_comm_destroy(r->comm);
        r->comm = NULL;
        return;
    }
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(r->comm));
    ck_assert_msg(strstr(moe_last_error(), "rank 2 has left") ||
                      strstr(moe_last_error(), "gave up"),
                  "%s", moe_last_error());
}

static void aborting_body(rank_run *r)
{
    if (r->rank == 0) {
        moe_comm_abort(r->comm);
        REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(r->comm));
        return;
    }
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(r->comm));
    ck_assert_msg(strstr(moe_last_error(), "rank 0 gave up"), "%s", moe_last_error());
}

/* Rank 1 sends another number of rows, or rows of another width, than the others expect. */
static void disagreeing_body(rank_run *r)
{
    exchange_memory m;
    fill(&m, r, 1);
    if (r->rank == 1 && r->number == 0) m.e.row_bytes = ROW - 4;
    if (r->rank == 1 && r->number == 1)
        for (int32_t p = 1; p <= r->size; p++) m.send_begin[p] = 0;
    moe_status status = moe_comm_exchange(r->comm, &m.e);
    /* a rank whose part was as expected may be through before the others find out */
    ck_assert(status == MOE_ERROR_TRANSPORT || status == MOE_OK);
    free_memory(&m);
}

START_TEST(test_world_ends_every_wait)
{
    rank_run ranks[MOST];
    int said = 0;
    run_world(ranks, 4, 0, 60, leaving_body);
    run_world(ranks, 4, 0, 60, aborting_body);
    for (int32_t number = 0; number < 2; number++, said = 0) {
        run_world(ranks, 4, number, 60, disagreeing_body);
        for (int32_t p = 0; p < 4; p++) said += strstr(ranks[p].error, "are expected") != NULL;
        ck_assert_int_ge(said, 1);
    }
}
END_TEST

/* A rank that has left cannot come again, and who asks for it again hides that from nobody. */
START_TEST(test_rank_that_left_stays_away)
{
    moe_context *context = new_context();
    moe_world *world = NULL;
    moe_comm *comm[2] = {NULL, NULL};
    MUST(moe_world_create(&world, context, 2));
    for (int32_t p = 0; p < 2; p++) MUST(moe_comm_create_in_world(&comm[p], world, context, p, 10));
    moe_comm_destroy(comm[1]);
    REFUSED(MOE_ERROR_INVALID_STATE, moe_comm_create_in_world(&comm[1], world, context, 1, 10));
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(comm[0]));
    ck_assert_msg(strstr(moe_last_error(), "rank 1 has left"), "%s", moe_last_error());
    moe_comm_destroy(comm[0]), moe_world_destroy(world), moe_context_destroy(context);
}
END_TEST

/* ---- a host's collectives -------------------------------------------------------------------- */

typedef struct host {
    int calls, fail_at, released, aborted, cancelled;
    int64_t pending;
} host;

static int32_t host_start(void *user, const moe_exchange *e, void **request)
{
    host *h = user;
    *request = h;
    if (++h->calls == h->fail_at) return 7;
    memcpy(e->recv, e->send, (size_t)(e->recv_begin[1] * e->row_bytes));
    return 0;
}
static int32_t host_test(void *user, void *request, int32_t *done)
{
    host *h = user;
    (void)request;
    *done = h->pending ? MOE_COMM_PENDING : MOE_COMM_DONE;
    return ++h->calls == h->fail_at ? 9 : 0;
}
static void host_release(void *user) { ((host *)user)->released++; }
static void host_abort(void *user) { ((host *)user)->aborted++; }

static moe_collectives host_table(host *h)
{
    moe_collectives t;
    MUST(moe_collectives_init(&t, sizeof t));
    t.user = h, t.capabilities = MOE_COMM_HOST_MEMORY, t.timeout = 60;
    t.exchange_start = host_start, t.exchange_test = host_test;
    t.abort = host_abort, t.release = host_release;
    return t;
}

START_TEST(test_host_failures_end_the_communicator)
{
    moe_context *context = new_context();
    int32_t a = 5, b = 0, request;
    for (int fail_at = 0; fail_at < 4; fail_at++) {
        host h = {.fail_at = fail_at};
        moe_collectives t = host_table(&h);
        moe_comm *comm = NULL;
        MUST(moe_comm_create(&comm, context, &t));
        moe_status status = moe_comm_all_to_all(comm, &b, &a, sizeof a);
        if (fail_at == 0 || fail_at == 3) {
            ck_assert_int_eq(status, MOE_OK);
            ck_assert_int_eq(b, 5);
        } else {
            ck_assert_int_eq(status, MOE_ERROR_TRANSPORT);
            ck_assert_ptr_nonnull(
                strstr(moe_last_error(), fail_at == 1 ? "returned 7" : "returned 9"));
            ck_assert_int_gt(h.aborted, 0);
            REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(comm));
        }
        moe_comm_destroy(comm);
        ck_assert_int_eq(h.released, 1);
    }
    host h = {.pending = 1};
    moe_collectives t = host_table(&h);
    moe_comm *comm = NULL;
    moe_exchange e;
    const int64_t begin[2] = {0, 1};
    t.timeout = 0.05;
    MUST(moe_comm_create(&comm, context, &t));
    MUST(moe_exchange_init(&e, sizeof e));
    e.recv = &b, e.send = &a, e.recv_begin = e.send_begin = begin, e.row_bytes = sizeof a;
    for (int i = 0; i < MOE_COMM_REQUESTS; i++) MUST(moe_comm_exchange_start(comm, &e, &request));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_comm_exchange_start(comm, &e, &request));
    REFUSED(MOE_ERROR_TIMEOUT, moe_comm_exchange_finish(comm, request));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "waited 0.05 s"));
    /* nothing can withdraw them: the transport owns both buffers of each */
    ck_assert_int_eq(moe_comm_pending_bytes(comm), MOE_COMM_REQUESTS * 2 * (int64_t)sizeof a);
    moe_comm_destroy(comm), moe_context_destroy(context);
}
END_TEST

static int64_t host_cancel(void *user, void *request)
{
    (void)request;
    ((host *)user)->cancelled++;
    return 0;
}

/* After moe_comm_abort a wait ends, and what was in flight is given up before it does: the caller
 * may free its buffers. */
START_TEST(test_abort_gives_up_what_is_in_flight)
{
    moe_context *context = new_context();
    int32_t a = 5, b = 0, request, done;
    const int64_t begin[2] = {0, 1};
    for (int waits = 0; waits < 2; waits++) {
        host h = {.pending = 1};
        moe_collectives t = host_table(&h);
        moe_comm *comm = NULL;
        moe_exchange e;
        t.exchange_cancel = host_cancel;
        MUST(moe_comm_create(&comm, context, &t));
        MUST(moe_exchange_init(&e, sizeof e));
        e.recv = &b, e.send = &a, e.recv_begin = e.send_begin = begin, e.row_bytes = sizeof a;
        for (int i = 0; i < 2; i++) MUST(moe_comm_exchange_start(comm, &e, &request));
        moe_comm_abort(comm);
        ck_assert_int_eq(h.cancelled, 0); /* it may be another thread's call */
        if (waits)
            REFUSED(MOE_ERROR_TRANSPORT, moe_comm_exchange_finish(comm, request));
        else
            REFUSED(MOE_ERROR_TRANSPORT, moe_comm_exchange_test(comm, request, &done));
        ck_assert_int_eq(h.cancelled, 2);
        int aborted = h.aborted;
        REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(comm));
        ck_assert_int_gt(h.aborted, aborted); /* once more, by the owner's thread */
        moe_comm_destroy(comm);
        ck_assert_int_eq(h.cancelled, 2);
    }
    moe_context_destroy(context);
}
END_TEST

/* A table that waits itself, and one that cannot take an exchange now. */
typedef struct answering {
    host h;
    int32_t of_start, of_test;
} answering;

static int32_t answering_start(void *user, const moe_exchange *e, void **request)
{
    answering *a = user;
    (void)e;
    *request = a;
    return a->of_start;
}
static int32_t answering_test(void *user, void *request, int32_t *done)
{
    (void)request;
    *done = MOE_COMM_DONE;
    return ((answering *)user)->of_test;
}
static void answering_missing(void *user, void *request, uint8_t *missing)
{
    ck_assert_ptr_eq(user, request);
    missing[0] = 1;
}

START_TEST(test_answers_of_a_table)
{
    moe_context *context = new_context();
    answering a = {.of_start = MOE_COMM_REFUSED};
    moe_collectives t = host_table(&a.h);
    moe_comm *comm = NULL;
    int32_t late;
    t.user = &a, t.exchange_start = answering_start, t.exchange_test = answering_test;
    t.missing = answering_missing, t.exchange_cancel = host_cancel;
    MUST(moe_comm_create(&comm, context, &t));
    for (int i = 0; i < 2 * MOE_COMM_REQUESTS; i++)
        REFUSED(MOE_ERROR_INVALID_STATE, moe_comm_barrier(comm));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "refused the exchange"));
    a.of_start = 0;
    MUST(moe_comm_barrier(comm)); /* it goes on */
    moe_comm_destroy(comm);
    for (late = 0; late < 2; late++) {
        a = (answering){.of_start = late ? MOE_COMM_LATE : 0, .of_test = MOE_COMM_LATE};
        MUST(moe_comm_create(&comm, context, &t));
        REFUSED(MOE_ERROR_TIMEOUT, moe_comm_barrier(comm));
        ck_assert_ptr_nonnull(strstr(moe_last_error(), "missing ranks: 0"));
        ck_assert(a.h.cancelled == 1 && a.h.aborted > 0);
        REFUSED(MOE_ERROR_TRANSPORT, moe_comm_poll(comm));
        moe_comm_destroy(comm);
    }
    moe_context_destroy(context);
}
END_TEST

/* ---- device memory and streams --------------------------------------------------------------- */

typedef struct device_host {
    host h;
    moe_exchange last; /* as the table saw it */
} device_host;

static int32_t device_start(void *user, const moe_exchange *e, void **request)
{
    device_host *d = user;
    d->last = *e;
    if (!e->ordered) *request = d;
    return ++d->h.calls == d->h.fail_at ? 7 : 0;
}

/* A table with every capability is given memory, stream and order as they are; what is ordered is
 * done at once, takes no slot and is never tested. */
START_TEST(test_ordered_exchange_has_no_request)
{
    moe_context *context = new_context();
    device_host d = {.h = {.pending = 1}};
    moe_collectives t = host_table(&d.h);
    moe_comm *comm = NULL;
    moe_exchange e;
    const int64_t begin[2] = {0, 1};
    int32_t a = 5, b = 0, request = 77, done = 0;
    t.user = &d, t.exchange_start = device_start;
    t.capabilities |= MOE_COMM_DEVICE_MEMORY | MOE_COMM_STREAM_ORDERED | MOE_COMM_CAPTURABLE;
    MUST(moe_comm_create(&comm, context, &t));
    ck_assert_uint_eq(moe_comm_capabilities(comm), 15);
    MUST(moe_exchange_init(&e, sizeof e));
    e.recv = &b, e.send = &a, e.recv_begin = e.send_begin = begin, e.row_bytes = sizeof a;
    e.memory = MOE_COMM_DEVICE_MEMORY, e.stream = &a, e.ordered = 1;
    for (int i = 0; i < 2 * MOE_COMM_REQUESTS; i++)
        MUST(moe_comm_exchange_start(comm, &e, &request));
    ck_assert_int_eq(request, MOE_COMM_NO_REQUEST);
    ck_assert(d.last.stream == &a && d.last.memory == MOE_COMM_DEVICE_MEMORY && d.last.ordered);
    MUST(moe_comm_exchange_test(comm, request, &done));
    ck_assert_int_eq(done, MOE_COMM_DONE);
    MUST(moe_comm_exchange_finish(comm, request));
    MUST(moe_comm_exchange(comm, &e));
    ck_assert_int_eq(d.h.calls, 2 * MOE_COMM_REQUESTS + 1); /* starts, and no test */
    e.ordered = 0;                                          /* device memory that is waited for */
    MUST(moe_comm_exchange_start(comm, &e, &request));
    ck_assert_int_eq(request, 0);
    MUST(moe_comm_exchange_test(comm, request, &done));
    ck_assert_int_eq(done, MOE_COMM_PENDING);
    e.ordered = 1, d.h.fail_at = d.h.calls + 1, request = 77;
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_exchange_start(comm, &e, &request));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "exchange_start returned 7"));
    ck_assert_int_eq(request, 77);
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_exchange_finish(comm, MOE_COMM_NO_REQUEST));
    moe_comm_destroy(comm), moe_context_destroy(context);
}
END_TEST

/* Expects `text` and that nothing was sent: the group goes on. */
static void refuse_memory(moe_comm *comm, const moe_exchange *e, const char *text)
{
    int32_t request = 77;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange(comm, e));
    ck_assert_msg(strstr(moe_last_error(), text) != NULL, "%s", moe_last_error());
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange_start(comm, e, &request));
    ck_assert_int_eq(request, 77);
}

START_TEST(test_memory_that_a_table_lacks_is_refused)
{
    moe_context *context = new_context();
    device_host d = {0};
    moe_collectives t = host_table(&d.h);
    moe_comm *comm[2] = {NULL, NULL}; /* of threads, and of a host without streams */
    moe_exchange e;
    const int64_t begin[2] = {0, 1};
    int32_t a = 5, b = 0;
    MUST(moe_comm_create_self(&comm[0], context));
    t.user = &d, t.exchange_start = device_start, t.capabilities |= MOE_COMM_DEVICE_MEMORY;
    MUST(moe_comm_create(&comm[1], context, &t));
    MUST(moe_exchange_init(&e, sizeof e));
    ck_assert(e.memory == 0 && e.stream == NULL && e.ordered == 0);
    e.recv = &b, e.send = &a, e.recv_begin = e.send_begin = begin, e.row_bytes = sizeof a;
    for (int i = 0; i < 2; i++) {
        e.memory = 3;
        refuse_memory(comm[i], &e, "memory is 3");
        e.memory = -1;
        refuse_memory(comm[i], &e, "memory is -1");
        e.memory = 0, e.ordered = 2;
        refuse_memory(comm[i], &e, "ordered is 2");
        e.ordered = 1;
        refuse_memory(comm[i], &e, "ordered is 1, but memory is 0");
        e.memory = MOE_COMM_DEVICE_MEMORY;
        refuse_memory(comm[i], &e,
                      i ? "capabilities 0x3 lack MOE_COMM_STREAM_ORDERED"
                        : "memory is 2, but capabilities 0x1 lack MOE_COMM_DEVICE_MEMORY");
        e.ordered = 0, e.memory = MOE_COMM_HOST_MEMORY, e.reserved = 1;
        refuse_memory(comm[i], &e, "reserved is 1");
        e.reserved = 0, e.stream = &a; /* not read */
        MUST(moe_comm_exchange(comm[i], &e));
    }
    ck_assert_int_eq(b, 5);
    ck_assert_int_eq(d.h.calls, 2); /* start and test of the one that was right */
    moe_comm_destroy(comm[0]), moe_comm_destroy(comm[1]), moe_context_destroy(context);
}
END_TEST

/* ---- refused --------------------------------------------------------------------------------- */

START_TEST(test_comm_calls_refuse)
{
    moe_context *context = new_context();
    moe_comm *comm = NULL, *other = NULL;
    moe_world *world = NULL;
    host h = {0};
    moe_collectives good = host_table(&h), t;
    t = good, t.timeout = 0;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_create(&comm, context, &t));
    t = good, t.timeout = NAN;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_create(&comm, context, &t));
    t = good, t.rank = 1;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_create(&comm, context, &t));
    t = good, t.size = 0;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_create(&comm, context, &t));
    t = good, t.capabilities = MOE_COMM_DEVICE_MEMORY;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_create(&comm, context, &t));
    t = good, t.exchange_test = NULL;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_create(&comm, context, &t));
    t = good, t.struct_size = 1;
    REFUSED(MOE_ERROR_STRUCT_SIZE, moe_comm_create(&comm, context, &t));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_create(NULL, context, &good));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_create(&comm, context, NULL));
    ck_assert(comm == NULL && h.released == 0);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_world_create(&world, context, 0));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_world_create(NULL, context, 2));
    MUST(moe_world_create(&world, context, 2));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_create_in_world(&comm, world, context, 2, 1));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_create_in_world(&comm, world, context, 0, -1));
    MUST(moe_comm_create_in_world(&comm, world, context, 0, 1));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_comm_create_in_world(&other, world, context, 0, 1));
    moe_comm_destroy(comm), moe_world_destroy(world);
    MUST(moe_comm_create_self(&comm, context));
    moe_exchange e;
    int64_t begin[2] = {0, 1}, odd[2] = {1, 1}, down[2] = {0, -1};
    int32_t a = 0, done;
    MUST(moe_exchange_init(&e, sizeof e));
    e.recv = &a, e.send = &a, e.recv_begin = e.send_begin = begin, e.row_bytes = 4;
    const moe_exchange fine = e;
    e.row_bytes = 0;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange(comm, &e));
    e = fine, e.recv = NULL;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange(comm, &e));
    e = fine, e.send_begin = odd;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange(comm, &e));
    e = fine, e.send_begin = down;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange(comm, &e));
    e = fine, e.send_begin = NULL;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange(comm, &e));
    e = fine, e.row_bytes = INT64_MAX, begin[1] = 2;
    REFUSED(MOE_ERROR_OVERFLOW, moe_comm_exchange(comm, &e));
    e = fine, e.to_all = 2;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange(comm, &e));
    int32_t pair[3] = {1, 2, 3};
    e = fine, e.recv = pair, e.send = pair + 1; /* two rows of each */
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange(comm, &e));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "recv, 8 bytes at 0x"));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "overlaps send, 8 bytes at 0x"));
    begin[1] = 1;
    MUST(moe_comm_exchange(comm, &e)); /* one beside the other */
    ck_assert(pair[0] == 2 && pair[1] == 2 && pair[2] == 3);
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange(NULL, &fine));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_exchange_test(comm, 0, &done));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_all_to_all(comm, &a, &a, -1));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_comm_all_gather(comm, &a, NULL, &a, 4));
    MUST(moe_comm_barrier(comm)); /* refusing is no failure */
    ck_assert_int_eq(moe_comm_rank(NULL), -1);
    ck_assert_int_eq(moe_comm_size(NULL), 0);
    ck_assert_int_eq(moe_comm_pending_bytes(NULL), 0);
    moe_comm_abort(NULL), moe_comm_destroy(NULL), moe_world_destroy(NULL);
    moe_comm_destroy(comm), moe_context_destroy(context);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("comm");
    TCase *c = tcase_create("groups");
    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, test_world_exchanges_rows, 0, COUNT(SIZES));
    tcase_add_test(c, test_self_is_a_world_of_one);
    tcase_add_test(c, test_world_names_the_rank_that_does_not_come);
    tcase_add_test(c, test_world_ends_every_wait);
    tcase_add_test(c, test_rank_that_left_stays_away);
    tcase_add_test(c, test_host_failures_end_the_communicator);
    tcase_add_test(c, test_abort_gives_up_what_is_in_flight);
    tcase_add_test(c, test_answers_of_a_table);
    tcase_add_test(c, test_ordered_exchange_has_no_request);
    tcase_add_test(c, test_memory_that_a_table_lacks_is_refused);
    tcase_add_test(c, test_comm_calls_refuse);
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
