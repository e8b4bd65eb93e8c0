/* check_comm_nccl_faults.c - groups over the fake NCCL when something goes wrong: what is refused,
 * ranks that do not come, errors of NCCL and CUDA in every call, giving up from another thread. No
 * wait is longer than the deadline, and in the end nothing is left. */
#include "comm_nccl_case.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const double SHORT = 0.3; /* a deadline that passes */
static int how;                  /* of the test, before its ranks start */

static int version; /* what NCCL says it is; 0: the truth */
ncclResult_t __real_ncclGetVersion(int *out);
ncclResult_t __wrap_ncclGetVersion(int *out);
ncclResult_t __wrap_ncclGetVersion(int *out)
{
    if (version < 0) return ncclSystemError;
    ncclResult_t result = __real_ncclGetVersion(out);
    if (version > 0) *out = version;
    return result;
}

static void expect_all_gone(int failures, const char *what, int number)
{
    ck_assert_msg(failures == 0, "%s, %d: %d failures", what, number, failures);
    ck_assert_msg(all_is_gone(), "%s, %d", what, number);
}

static void join_hasty(struct rank_case *r, rank_comm *c)
{
    join(r, c, how, 30);
    shorten(c->comm, SHORT);
}

/* ---- refused --------------------------------------------------------------------------------- */

static void body_refused(struct rank_case *r)
{
    rank_comm c;
    prepare(r, &c, 0, 5);
    const moe_nccl_config good = c.config;
    const moe_status bad = MOE_ERROR_INVALID_ARGUMENT;
    c.config.comm = NULL;
    refuse(r, &c, bad, "config->comm is NULL");
    c.config = good, c.config.timeout = 0;
    refuse(r, &c, bad, "timeout is 0");
    c.config.timeout = NAN;
    refuse(r, &c, bad, "timeout is nan");
    c.config.timeout = 2e9;
    refuse(r, &c, bad, "timeout is 2e+09");
    c.config = good, c.config.duplicate = 2;
    refuse(r, &c, bad, "duplicate is 2");
    c.config = good, c.config.warm_up = -1;
    refuse(r, &c, bad, "warm_up is -1");
    c.config = good, c.config.struct_size = 3;
    refuse(r, &c, MOE_ERROR_STRUCT_SIZE, "moe_nccl_config");
    c.config = good;
    REFUSED(bad, moe_comm_create_nccl(NULL, c.context, &good));
    SAID("comm is NULL");
    REFUSED(bad, moe_comm_create_nccl(&c.comm, NULL, &good));
    SAID("context is NULL");
    REFUSED(bad, moe_comm_create_nccl(&c.comm, c.context, NULL));
    SAID("config is NULL");
    moe_context *cpu = NULL, *gpu = c.context;
    GOOD(moe_context_create(&cpu, NULL));
    c.context = cpu;
    refuse(r, &c, bad, "context is not on a GPU");
    moe_context_destroy(cpu);
    /* A context on another device than the communicator's. */
    struct rank_case elsewhere = *r;
    char text[100];
    elsewhere.rank = r->rank + 3;
    c.context = context_of_rank(&elsewhere);
    (void)snprintf(text, sizeof text, "config->comm is on device %d, the context is on device %d",
                   r->rank, r->rank + 3);
    refuse(r, &c, bad, text);
    moe_context_destroy(c.context);
    c.context = gpu;
    leave(r, &c);
}

static void body_old(struct rank_case *r)
{
    rank_comm c;
    prepare(r, &c, 0, 5);
    refuse(r, &c, MOE_ERROR_NOT_SUPPORTED,
           version > 0 ? "NCCL is version 21799; 21800" : "NCCL is version 0; 21800");
    leave(r, &c);
}

START_TEST(test_refused)
{
    version = 0;
    expect_all_gone(on_threads(2, body_refused), "refused", 0);
    ck_assert_int_eq(moe_nccl_oldest_version(), 21800);
    ck_assert_int_ge(moe_nccl_version(), 21800);
    version = 21799;
    ck_assert_int_eq(moe_nccl_version(), 21799);
    expect_all_gone(on_threads(2, body_old), "old", version);
    version = -1; /* it cannot say */
    ck_assert_int_eq(moe_nccl_version(), 0);
    expect_all_gone(on_threads(2, body_old), "no version", version);
    version = 21800;
    ck_assert_int_eq(moe_nccl_version(), 21800);
    version = 0;
}
END_TEST

/* ---- ranks that do not come ------------------------------------------------------------------ */

/* Rank 1 has an NCCL communicator, but does not join the group. The others' threads of the creation
 * stay inside NCCL until the host aborts its communicator, and then give all back. */
static void body_absent_at_creation(struct rank_case *r)
{
    rank_comm c;
    prepare(r, &c, how, SHORT);
    meet(r);
    double begin = seconds();
    if (r->rank != 1) {
        REFUSED(MOE_ERROR_TIMEOUT, moe_comm_create_nccl(&c.comm, c.context, &c.config));
        SAID("waited 0.3 s for all ranks");
        EXPECT(c.comm == NULL);
        EXPECT(seconds() - begin < 20 && seconds() - begin >= SHORT);
    }
    leave_after_failure(r, &c);
}

/* Rank 1 joins a first group and no second: connections are there, so that NCCL returns, and the
 * others' frames are under way when the creation has failed, until the host aborts. */
static void body_absent_at_next_creation(struct rank_case *r)
{
    rank_comm c;
    join(r, &c, how, 30);
    moe_comm_destroy(c.comm), c.comm = NULL;
    c.config.timeout = SHORT;
    meet(r);
    if (r->rank != 1) {
        REFUSED(MOE_ERROR_TIMEOUT, moe_comm_create_nccl(&c.comm, c.context, &c.config));
        EXPECT(c.comm == NULL);
    }
    leave_after_failure(r, &c);
}

/* Rank 1 is there at creation and not later: its operations never begin. */
static void body_absent_later(struct rank_case *r)
{
    rank_comm c;
    join_hasty(r, &c);
    GOOD(moe_comm_barrier(c.comm));
    meet(r);
    double begin = seconds();
    if (r->rank != 1) {
        REFUSED(MOE_ERROR_TIMEOUT, moe_comm_barrier(c.comm));
        SAID("missing ranks: 1");
        EXPECT(strstr(moe_last_error(), "missing ranks: 1,") == NULL);
        EXPECT(seconds() - begin < 20);
        REFUSED(MOE_ERROR_TRANSPORT, moe_comm_poll(c.comm)); /* for good */
        REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(c.comm));
        EXPECT(moe_comm_pending_bytes(c.comm) == 0); /* rows of the host are in staging */
    }
    leave_after_failure(r, &c);
}

/* Where NCCL's all-to-all moves as a whole nothing is known of three ranks, of two it is plain. */
static void body_absent_whole(struct rank_case *r)
{
    rank_comm c;
    join_hasty(r, &c);
    emu_nccl_whole(1);
    if (r->rank == 1) emu_nccl_absent(1, 1);
    meet(r);
    if (r->rank != 1) {
        REFUSED(MOE_ERROR_TIMEOUT, moe_comm_barrier(c.comm));
        SAID(r->ranks == 2 ? "missing ranks: 1" : "who is missing is not known");
    }
    leave_after_failure(r, &c);
}

/* The same in the middle of an exchange of several rounds, and with device memory. */
static void body_absent_in_rounds(struct rank_case *r)
{
    rank_comm c;
    rank_rows m;
    int32_t request;
    join_hasty(r, &c);
    fill_rows(r, &m, 1, 40000);
    meet(r);
    if (r->rank == 1) emu_nccl_absent(1, 2); /* the second round */
    meet(r);
    if (r->rank != 1) {
        moe_status status = moe_comm_exchange_start(c.comm, &m.e, &request);
        if (status == MOE_OK) status = moe_comm_exchange_finish(c.comm, request);
        /* Ranks that have no more rounds with rank 1 are through. */
        EXPECT(status == MOE_OK || status == MOE_ERROR_TIMEOUT);
        if (status != MOE_OK) __atomic_add_fetch(&r->shared->word[0], 1, __ATOMIC_ACQ_REL);
    } else {
        REFUSED(MOE_ERROR_TIMEOUT, moe_comm_exchange(c.comm, &m.e));
        SAID("who is missing is not known");
    }
    meet(r);
    EXPECT(__atomic_load_n(&r->shared->word[0], __ATOMIC_ACQUIRE) > 0);
    leave_after_failure(r, &c);
    free_rows(r, &m);
}

static void body_absent_device(struct rank_case *r)
{
    rank_comm c;
    rank_rows m;
    join_hasty(r, &c);
    fill_rows(r, &m, 1, NARROW);
    int64_t even[MOST_RANKS + 1] = {0};
    for (int p = 0; p < r->ranks; p++) even[p + 1] = p + 1;
    free(m.recv), free(m.send);
    m.recv = calloc(MOST_RANKS, NARROW), m.send = calloc(MOST_RANKS, NARROW);
    memcpy(m.recv_begin, even, sizeof even), memcpy(m.send_begin, even, sizeof even);
    rows_to_device(r, &m);
    CUDA(cudaStreamSynchronize(r->stream));
    meet(r);
    if (r->rank != 1) {
        REFUSED(MOE_ERROR_TIMEOUT, moe_comm_exchange(c.comm, &m.e));
        SAID("who is missing is not known");
        EXPECT(moe_comm_pending_bytes(c.comm) ==
               (how & DUPLICATE ? 0 : 2 * (int64_t)r->ranks * NARROW));
    }
    leave_after_failure(r, &c);
    CUDA(cudaStreamSynchronize(r->stream));
    free_rows(r, &m);
}

/* Of a communicator of the host that is still in progress it is never known when NCCL has let go:
 * the memory, streams and events of both ranks stay. */
START_TEST(test_absent_in_progress)
{
    how = NOT_BLOCKING;
    ck_assert_int_eq(on_threads(3, body_absent_at_creation), 0);
    ck_assert_uint_eq(emu_live_allocations(0), 2);
    ck_assert_uint_eq(emu_live_allocations(1), 2);
    ck_assert_uint_eq(emu_nccl_live(), 0);
}
END_TEST

START_TEST(test_absent)
{
    rank_body *const body[] = {body_absent_at_creation, body_absent_at_next_creation,
                               body_absent_later, body_absent_in_rounds, body_absent_device};
    for (int kind = 0; kind < 4; kind++) {
        how = kind;
        if (_i == 0 && how == NOT_BLOCKING) continue;
        if (_i == 1 && how & DUPLICATE) continue; /* which connects anew */
        expect_all_gone(on_threads(3, body[_i]), "absent", kind * 10 + _i);
    }
    for (int ranks = 2; ranks <= 3 && _i < 4; ranks++) {
        how = _i;
        expect_all_gone(on_threads(ranks, body_absent_whole), "absent as a whole", _i);
    }
}
END_TEST

/* ---- errors of NCCL that come later ---------------------------------------------------------- */

static void body_async_error(struct rank_case *r)
{
    rank_comm c;
    join_hasty(r, &c);
    meet(r);
    if (r->rank == 1) emu_nccl_async_error(1, 1, ncclRemoteError);
    meet(r);
    moe_status status = moe_comm_barrier(c.comm);
    if (r->rank == 1) {
        EXPECT(status == MOE_ERROR_TRANSPORT);
        SAID("NCCL: remote process exited");
    } else {
        EXPECT(status == MOE_ERROR_TIMEOUT); /* nobody told them */
        SAID("missing ranks: 1");
    }
    leave_after_failure(r, &c);
}

/* An ordered exchange has it too: the next poll finds out. */
static void body_async_ordered(struct rank_case *r)
{
    rank_comm c;
    rank_rows m;
    join_hasty(r, &c);
    fill_rows(r, &m, 4, NARROW);
    rows_to_device(r, &m);
    m.e.ordered = 1;
    meet(r);
    emu_nccl_async_error(r->rank, 1, ncclSystemError);
    moe_status status = moe_comm_exchange(c.comm, &m.e);
    double begin = seconds();
    while (status == MOE_OK && seconds() - begin < 5) {
        (void)cudaStreamQuery(r->stream);
        status = moe_comm_poll(c.comm);
    }
    EXPECT(status == MOE_ERROR_TRANSPORT);
    SAID("NCCL: unhandled system error");
    leave_after_failure(r, &c);
    CUDA(cudaStreamSynchronize(r->stream)); /* the host's abort lets it go on */
    free_rows(r, &m);
}

/* A communicator that does not block is in progress for a while after each call. */
static void body_in_progress(struct rank_case *r)
{
    rank_comm c;
    rank_rows m;
    join(r, &c, how, 20);
    for (int n = 0; n < 4; n++) {
        fill_rows(r, &m, n, WIDE);
        if (n % 2) rows_to_device(r, &m);
        m.e.ordered = n == 3;
        GOOD(moe_comm_exchange(c.comm, &m.e));
        if (n % 2) rows_from_device(r, &m);
        check_rows(r, &m, n);
        free_rows(r, &m);
    }
    leave(r, &c);
}

static void body_in_progress_long(struct rank_case *r)
{
    emu_nccl_polls(25);
    meet(r);
    body_in_progress(r);
}

START_TEST(test_errors_that_come_later)
{
    for (int kind = 0; kind < 4; kind++) {
        how = kind;
        expect_all_gone(on_threads(3, body_async_error), "asynchronous", kind);
        if (!(how & DUPLICATE)) /* the error is of the communicator that has the rank's number */
            expect_all_gone(on_threads(2, body_async_ordered), "ordered", kind);
        expect_all_gone(on_threads(3, body_in_progress_long), "in progress", kind);
    }
}
END_TEST

/* ---- ranks that disagree --------------------------------------------------------------------- */

/* One row for each rank, but rank 1 has two for rank 0, or wider ones for all. */
static void disagree(struct rank_case *r, int64_t row_bytes, int64_t wider, int64_t more)
{
    rank_comm c;
    unsigned char *memory = calloc(2 * (MOST_RANKS + 1), (size_t)(row_bytes + wider));
    int64_t in[MOST_RANKS + 1], out[MOST_RANKS + 1];
    moe_exchange e;
    join(r, &c, how, 2);
    for (int p = 0; p <= r->ranks; p++) {
        in[p] = p;
        out[p] = p + (r->rank == 1 && p > 0 ? more : 0);
    }
    GOOD(moe_exchange_init(&e, sizeof e));
    e.recv = memory, e.send = memory + (MOST_RANKS + 1) * (row_bytes + wider);
    e.recv_begin = in, e.send_begin = out, e.row_bytes = row_bytes + (r->rank == 1 ? wider : 0);
    moe_status status = moe_comm_exchange(c.comm, &e);
    bool concerned = r->rank < 2 || wider > 0;
    /* Rank 2's later rounds find nobody. */
    EXPECT(status == (concerned          ? MOE_ERROR_TRANSPORT
                      : row_bytes > WIDE ? MOE_ERROR_TIMEOUT
                                         : MOE_OK));
    if (r->rank == 0 && more > 0) SAID("rank 1 sends 2 rows of ");
    if (r->rank == 0 && more > 0) SAID("here 1 of ");
    if (r->rank == 1 && more > 0) SAID("and expects 1, here 1 of ");
    if (concerned) SAID("are expected");
    leave_after_failure(r, &c);
    free(memory);
}
static void body_more_rows(struct rank_case *r) { disagree(r, NARROW, 0, 1); }
static void body_more_rounds(struct rank_case *r) { disagree(r, 200000, 0, 1); }
static void body_wider(struct rank_case *r) { disagree(r, NARROW, 4, 0); }

/* Rows for itself are another number than it expects. */
static void body_own(struct rank_case *r)
{
    rank_comm c;
    char a[16] = {0}, b[16] = {0};
    int64_t in[MOST_RANKS + 1] = {0}, out[MOST_RANKS + 1] = {0};
    moe_exchange e;
    join(r, &c, how, 5);
    for (int p = 0; p <= r->ranks; p++) {
        in[p] = p > r->rank;
        out[p] = 2 * (p > r->rank);
    }
    GOOD(moe_exchange_init(&e, sizeof e));
    e.recv = a, e.send = b, e.recv_begin = in, e.send_begin = out, e.row_bytes = 4;
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_exchange(c.comm, &e));
    SAID("2 rows for itself, 1 are expected");
    leave_after_failure(r, &c);
}

/* What is no note of this library: rank 1 is a program of its own. */
static void body_stranger(struct rank_case *r)
{
    rank_comm c;
    enum { FRAME = 2048 };
    prepare(r, &c, 0, 5);
    if (r->rank == 0) {
        REFUSED(MOE_ERROR_TRANSPORT, moe_comm_create_nccl(&c.comm, c.context, &c.config));
        SAID("rank 1 has another version of libmoe_nccl");
    } else {
        char *device = NULL;
        CUDA(cudaMalloc((void **)&device, 4 * FRAME));
        CUDA(cudaMemsetAsync(device, 3, 4 * FRAME, r->stream));
        NCCL(ncclAlltoAll(device, device + 2 * FRAME, FRAME, ncclUint8, r->comm, r->stream));
        CUDA(cudaStreamSynchronize(r->stream));
        CUDA(cudaFree(device));
    }
    leave_after_failure(r, &c);
}

START_TEST(test_ranks_that_disagree)
{
    rank_body *const body[] = {body_more_rows, body_more_rounds, body_wider, body_own};
    for (int kind = 0; kind < 4; kind++) {
        how = kind;
        for (int i = 0; i < 4; i++)
            expect_all_gone(on_threads(3, body[i]), "disagree", 10 * kind + i);
    }
    expect_all_gone(on_threads(2, body_stranger), "a stranger", 0);
}
END_TEST

int main(void)
{
    begin_program();
    Suite *suite = suite_create("comm_nccl_faults");
    TCase *tcase = tcase_create("faults");
    tcase_set_timeout(tcase, 300);
    tcase_add_test(tcase, test_refused);
    tcase_add_loop_test(tcase, test_absent, 0, 5);
    tcase_add_test(tcase, test_errors_that_come_later);
    tcase_add_test(tcase, test_ranks_that_disagree);
    tcase_add_test(tcase, test_absent_in_progress); /* last: it leaves things */
    suite_add_tcase(suite, tcase);
    return run_suite(suite, 1);
}
