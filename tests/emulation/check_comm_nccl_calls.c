/* check_comm_nccl_calls.c - every call of NCCL and of CUDA that a group makes fails in turn, groups
 * are given up from another thread, and end while work is under way: all waits end, nothing is
 * left. */
#include "comm_nccl_case.h"
#include "support/suite.h"

#include <check.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double SHORT = 0.25;
static int how; /* of the test, before its ranks start */

/* ---- calls that fail in turn ----------------------------------------------------------------- */

static const char *function; /* whose n-th call fails */
static int number;
static bool of_nccl;
static atomic_int failures; /* ranks that noticed */

/* Everything a group does, until something fails. */
static moe_status work(rank_comm *c, rank_rows *host, rank_rows *device)
{
    moe_status status = moe_comm_create_nccl(&c->comm, c->context, &c->config);
    if (status == MOE_OK) status = moe_comm_barrier(c->comm);
    if (status == MOE_OK) status = moe_comm_exchange(c->comm, &host->e);
    if (status == MOE_OK) status = moe_comm_exchange(c->comm, &device->e);
    device->e.ordered = 1;
    if (status == MOE_OK) status = moe_comm_exchange(c->comm, &device->e);
    if (status == MOE_OK) status = moe_comm_poll(c->comm);
    if (status == MOE_OK) status = moe_comm_barrier(c->comm);
    return status;
}

static void body_work(struct rank_case *r)
{
    rank_comm c;
    rank_rows host, device;
    prepare(r, &c, how, SHORT);
    fill_rows(r, &host, 3, 3000), fill_rows(r, &device, 3, NARROW); /* two rows of each */
    rows_to_device(r, &device);
    CUDA(cudaStreamSynchronize(r->stream));
    meet(r);
    if (r->rank == 0 && of_nccl) {
        bool without = strcmp(function, "ncclGroupEnd") == 0 ||
                       strcmp(function, "ncclGroupStart") == 0;
        emu_nccl_fail(without ? -1 : 0, function, number, ncclSystemError);
    } else if (r->rank == 0) {
        emu_fail(function, number, cudaErrorUnknown);
    }
    meet(r);
    double begin = seconds();
    moe_status status = work(&c, &host, &device);
    EXPECT(seconds() - begin < 30);
    if (status != MOE_OK) {
        (void)atomic_fetch_add(&failures, 1);
        EXPECT(moe_last_error()[0] != 0);
        EXPECT(status == MOE_ERROR_TRANSPORT || status == MOE_ERROR_TIMEOUT ||
               status == MOE_ERROR_DEVICE);
    }
    meet(r);
    if (of_nccl) emu_nccl_heal();
    emu_fail(function, 0, 0);
    NCCL(ncclCommAbort(r->comm));
    meet(r);
    CUDA(cudaStreamSynchronize(r->stream));
    if (status == MOE_OK) check_rows(r, &host, 3);
    moe_comm_destroy(c.comm);
    moe_context_destroy(c.context);
    free_rows(r, &host), free_rows(r, &device);
}

static const char *const NCCL_CALLS[] = {
    "ncclCommCount",  "ncclCommUserRank", "ncclCommCuDevice", "ncclCommSplit",
    "ncclGroupStart", "ncclGroupEnd",     "ncclSend",         "ncclRecv",
    "ncclAlltoAll",   "ncclCommFinalize", "ncclCommDestroy",  "ncclCommGetAsyncError"};
static const char *const CUDA_CALLS[] = {
    "cudaStreamCreate", /* as the emulator calls both */
    "cudaEventCreate",       "cudaHostAlloc",       "cudaMalloc",     "cudaMemsetAsync",
    "cudaMemcpyAsync",       "cudaEventRecord",     "cudaEventQuery", "cudaStreamQuery",
    "cudaStreamIsCapturing", "cudaStreamWaitEvent", "cudaSetDevice",  "cudaGetDevice"};
enum {
    NCCL_COUNT = sizeof NCCL_CALLS / sizeof *NCCL_CALLS,
    CUDA_COUNT = sizeof CUDA_CALLS / sizeof *CUDA_CALLS
};

/* Until nobody notices any more; without MOE_LONG fewer. */
static void fail_in_turn(const char *name, bool nccl)
{
    const int numbers[] = {1, 2, 4, 9};
    int step = getenv("MOE_LONG") ? 1 : 2;
    int noticed = 0;
    function = name, of_nccl = nccl;
    if (strcmp(name, "ncclAlltoAll") == 0 && !dlsym(RTLD_DEFAULT, name)) return; /* an old NCCL */
    for (int i = 0; i < 4 && (i == 0 || atomic_load(&failures) > 0); i += step) {
        number = numbers[i];
        atomic_store(&failures, 0);
        int bad = on_threads(2, body_work);
        ck_assert_msg(bad == 0, "%s, call %d, kind %d: %d failures", name, number, how, bad);
        ck_assert_msg(all_is_gone(), "%s, call %d, kind %d", name, number, how);
        noticed += atomic_load(&failures) > 0;
    }
    /* What only the end needs, or a question that is asked again, is nobody's error. */
    if (strcmp(name, "ncclCommFinalize") != 0 && strcmp(name, "ncclCommDestroy") != 0 &&
        strcmp(name, "cudaStreamQuery") != 0 && (how != 0 || strcmp(name, "ncclCommSplit") != 0))
        ck_assert_msg(noticed > 0, "%s never failed", name);
}

START_TEST(test_every_call_fails)
{
    const int kinds[] = {0, DUPLICATE};
    for (int k = 0; k < 2; k++) {
        how = kinds[k];
        if (k != _i % 2 && !getenv("MOE_LONG")) continue;
        if (_i < NCCL_COUNT)
            fail_in_turn(NCCL_CALLS[_i], true);
        else
            fail_in_turn(CUDA_CALLS[_i - NCCL_COUNT], false);
    }
}
END_TEST

/* ---- giving up ------------------------------------------------------------------------------- */

typedef struct giving_up {
    moe_comm *comm;
    int after; /* ms */
} giving_up;

static void *give_up(void *argument)
{
    const giving_up *g = argument;
    sleep_ms(g->after);
    moe_comm_abort(g->comm);
    moe_comm_abort(g->comm);
    return NULL;
}

/* A thread that no rank is: CUDA makes a context on every device that it is put on. */
static _Thread_local bool of_rank;
static atomic_int strayed; /* such threads that were on more than one */
cudaError_t __real_cudaSetDevice(int device);
cudaError_t __wrap_cudaSetDevice(int device);
cudaError_t __wrap_cudaSetDevice(int device)
{
    static _Thread_local int first = -1;
    if (first < 0) first = device;
    if (!of_rank && device != first) (void)atomic_fetch_add(&strayed, 1);
    return __real_cudaSetDevice(device);
}

static void body_devices(struct rank_case *r)
{
    rank_comm c;
    pthread_t thread;
    of_rank = true;
    join(r, &c, how, 20);
    giving_up g = {c.comm, 0};
    EXPECT(pthread_create(&thread, NULL, give_up, &g) == 0);
    EXPECT(pthread_join(thread, NULL) == 0);
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(c.comm));
    leave_after_failure(r, &c);
    EXPECT(atomic_load(&strayed) == 0);
}

/* Another thread of rank 0 ends its wait for rank 1; with a duplicate the stream goes on too. */
static void body_abort(struct rank_case *r)
{
    rank_comm c;
    rank_rows m;
    giving_up g;
    pthread_t thread;
    join(r, &c, how, 20);
    fill_rows(r, &m, 1, NARROW);
    rows_to_device(r, &m);
    m.e.ordered = 1;
    meet(r);
    if (r->rank == 0) {
        double begin = seconds();
        GOOD(moe_comm_exchange(c.comm, &m.e));
        g = (giving_up){c.comm, 50};
        EXPECT(pthread_create(&thread, NULL, give_up, &g) == 0);
        REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(c.comm));
        SAID("rank 0 of 2: ");
        EXPECT(pthread_join(thread, NULL) == 0);
        if (how & DUPLICATE) CUDA(cudaStreamSynchronize(r->stream));
        EXPECT(seconds() - begin < 10);
        REFUSED(MOE_ERROR_TRANSPORT, moe_comm_poll(c.comm));
    }
    leave_after_failure(r, &c);
    CUDA(cudaStreamSynchronize(r->stream));
    free_rows(r, &m);
}

/* Given up again and again while the owner is in calls. */
static void body_abort_storm(struct rank_case *r)
{
    rank_comm c;
    giving_up g;
    pthread_t thread;
    join(r, &c, how, 5);
    g = (giving_up){c.comm, r->rank + 1};
    EXPECT(pthread_create(&thread, NULL, give_up, &g) == 0);
    moe_status status = MOE_OK;
    while (status == MOE_OK) status = moe_comm_barrier(c.comm);
    EXPECT(status == MOE_ERROR_TRANSPORT || status == MOE_ERROR_TIMEOUT);
    EXPECT(pthread_join(thread, NULL) == 0);
    leave_after_failure(r, &c);
}

START_TEST(test_giving_up)
{
    for (int kind = 0; kind < 4; kind++) {
        how = kind;
        atomic_store(&strayed, 0);
        int bad = on_threads(2, body_devices);
        ck_assert_msg(bad == 0 && all_is_gone(), "devices, kind %d: %d failures", kind, bad);
        bad = on_threads(2, body_abort);
        ck_assert_msg(bad == 0 && all_is_gone(), "kind %d: %d failures", kind, bad);
        for (int i = 0; i < 5; i++) {
            bad = on_threads(4, body_abort_storm);
            ck_assert_msg(bad == 0 && all_is_gone(), "storm, kind %d: %d failures", kind, bad);
        }
    }
}
END_TEST

/* ---- the end --------------------------------------------------------------------------------- */

/* The end of a group waits for what is on another stream than the last exchange, which had no rows
 * for anybody: of host memory, or ordered. After the deadline the staging stays until the host has
 * aborted its communicator. */
static bool of_host;

static void body_end_under_way(struct rank_case *r)
{
    rank_comm c;
    rank_rows rows;
    moe_exchange none;
    const int64_t zeros[MOST_RANKS + 1] = {0};
    int32_t request;
    cudaStream_t stream;
    prepare(r, &c, 0, 30);
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    c.config.stream = stream;
    meet(r);
    GOOD(moe_comm_create_nccl(&c.comm, c.context, &c.config));
    shorten(c.comm, SHORT);
    fill_rows(r, &rows, 3, NARROW); /* two rows of each */
    if (!of_host) rows_to_device(r, &rows), rows.e.ordered = 1, rows.e.stream = stream;
    meet(r);
    if (r->rank == 0) { /* rank 1 does not come */
        GOOD(moe_exchange_init(&none, sizeof none));
        none.recv_begin = none.send_begin = zeros, none.row_bytes = 1;
        none.memory = MOE_COMM_DEVICE_MEMORY, none.stream = r->stream, none.ordered = 1;
        GOOD(moe_comm_exchange_start(c.comm, &rows.e, &request));
        GOOD(moe_comm_exchange(c.comm, &none));
        double begin = seconds();
        moe_comm_destroy(c.comm), c.comm = NULL;
        EXPECT(seconds() - begin >= SHORT && seconds() - begin < 20);
    }
    leave_after_failure(r, &c);
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaStreamDestroy(stream));
    free_rows(r, &rows);
}

START_TEST(test_end_under_way)
{
    of_host = _i == 0;
    int bad = on_threads(2, body_end_under_way);
    ck_assert_msg(bad == 0 && all_is_gone(), "%d failures", bad);
}
END_TEST

int main(void)
{
    begin_program();
    Suite *suite = suite_create("comm_nccl_calls");
    TCase *tcase = tcase_create("calls");
    tcase_set_timeout(tcase, 600);
    tcase_add_loop_test(tcase, test_every_call_fails, 0, NCCL_COUNT + CUDA_COUNT);
    tcase_add_test(tcase, test_giving_up);
    tcase_add_loop_test(tcase, test_end_under_way, 0, 2);
    suite_add_tcase(suite, tcase);
    return run_suite(suite, 1);
}
