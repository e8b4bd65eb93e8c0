/* check_comm_nccl_terms.c - what moe/nccl.h says of a group beside its results: what is allocated
 * and waited for, and when; what is refused at creation, and why; and that a communicator of the
 * host stays the host's. */
#include "comm_nccl_case.h"
#include "support/suite.h"

#include <check.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { INLINE = 1984 }; /* bytes for one rank that go in one round */

static const double SHORT = 0.3; /* a deadline that passes */
static int how;                  /* of the test, before its ranks start */

static void run(int ranks, rank_body *body, const char *what)
{
    int failures = on_threads(ranks, body);
    ck_assert_msg(failures == 0, "%s on %d ranks, kind %d: %d failures", what, ranks, how,
                  failures);
    ck_assert_msg(all_is_gone(), "%s on %d ranks, kind %d", what, ranks, how);
}

/* The calls of all ranks, from the first on; no rank makes one between the others, where they are
 * looked at. */
static void start_counting(struct rank_case *r)
{
    meet(r);
    if (r->rank == 0) emu_record_start();
    meet(r);
}

static void begin_looking(struct rank_case *r) { meet(r); }

static void end_looking(struct rank_case *r)
{
    meet(r);
    if (r->rank == 0) emu_record_stop();
}

/* ---- memory and waits ------------------------------------------------------------------------ */

/* Exchanges of every kind, of one round and of several. */
static void exchange_all(struct rank_case *r, rank_comm *c, rank_rows *host, rank_rows *device)
{
    GOOD(moe_comm_exchange(c->comm, &host[0].e));
    GOOD(moe_comm_exchange(c->comm, &host[1].e));
    device->e.ordered = 0;
    GOOD(moe_comm_exchange(c->comm, &device->e));
    device->e.ordered = 1;
    GOOD(moe_comm_exchange(c->comm, &device->e));
    GOOD(moe_comm_barrier(c->comm));
    GOOD(moe_comm_poll(c->comm));
}

/* 4 MiB of the device and as much that is pinned, with a frame for each rank; then no more, and
 * nothing is synchronised. */
static void body_memory(struct rank_case *r)
{
    const uint64_t MIB = 1 << 20, ranks = (uint64_t)r->ranks;
    rank_comm c;
    rank_rows host[2], device;
    prepare(r, &c, how, 20);
    start_counting(r);
    GOOD(moe_comm_create_nccl(&c.comm, c.context, &c.config));
    begin_looking(r);
    EXPECT(emu_count_bytes(EMU_CALL_ALLOCATE) == 4 * MIB * ranks);
    EXPECT(emu_count_bytes(EMU_CALL_ALLOCATE_HOST) == (4 * MIB + 2048 * ranks) * ranks);
    EXPECT(emu_count(EMU_CALL_SYNCHRONIZE) == 0);
    end_looking(r);
    fill_rows(r, &host[0], 3, NARROW), fill_rows(r, &host[1], 4, 100000);
    fill_rows(r, &device, 4, NARROW);
    rows_to_device(r, &device);
    CUDA(cudaStreamSynchronize(r->stream));
    start_counting(r);
    exchange_all(r, &c, host, &device);
    begin_looking(r);
    EXPECT(emu_count(EMU_CALL_ALLOCATE) == 0 && emu_count(EMU_CALL_ALLOCATE_HOST) == 0);
    EXPECT(emu_count(EMU_CALL_OBJECT) == 0 && emu_count(EMU_CALL_SYNCHRONIZE) == 0);
    end_looking(r);
    rows_from_device(r, &device);
    check_rows(r, &host[0], 3), check_rows(r, &host[1], 4), check_rows(r, &device, 4);
    free_rows(r, &host[0]), free_rows(r, &host[1]), free_rows(r, &device);
    leave(r, &c);
}

/* Only rank 0 has rows, for rank 1: nobody else sends or receives, and nobody asks for the end. */
static void body_one_pair(struct rank_case *r)
{
    rank_comm c;
    int64_t in[MOST_RANKS + 1] = {0}, out[MOST_RANKS + 1] = {0};
    moe_exchange e;
    float *send, *recv;
    float got[4] = {0};
    join(r, &c, how, 20);
    send = floats(r, 4, 5), recv = floats(r, 4, 0);
    for (int p = 1; p <= r->ranks; p++) in[p] = r->rank == 1, out[p] = r->rank == 0 && p > 1;
    GOOD(moe_exchange_init(&e, sizeof e));
    e.recv = recv, e.recv_begin = in, e.send = send, e.send_begin = out, e.row_bytes = 16;
    e.memory = MOE_COMM_DEVICE_MEMORY, e.stream = r->stream, e.ordered = 1;
    start_counting(r);
    GOOD(moe_comm_exchange(c.comm, &e));
    begin_looking(r);
    EXPECT(emu_count(EMU_CALL_NCCL) == 2 && emu_count_bytes(EMU_CALL_NCCL) == 2 * 16);
    EXPECT(emu_count(EMU_CALL_ON_DEVICE) == 0 && emu_count(EMU_CALL_QUERY) == 0);
    end_looking(r);
    read_floats(r, got, recv, 4);
    EXPECT(r->rank == 1 ? got[0] == 5 && got[3] == 8 : got[0] == 0);
    CUDA(cudaFree(send)), CUDA(cudaFree(recv));
    leave(r, &c);
}

START_TEST(test_memory_and_waits)
{
    const int kinds[] = {0, COLD};
    for (int k = 0; k < 2; k++) {
        how = kinds[k];
        for (int ranks = 2; ranks <= 8; ranks *= 2) run(ranks, body_memory, "memory");
        run(3, body_one_pair, "one pair");
    }
}
END_TEST

/* Bytes that go in one round are not waited for where the exchange is started; one more, and they
 * are: rank 1 comes when rank 0 is through. */
static int64_t bytes_each;

static void body_rounds(struct rank_case *r)
{
    rank_comm c;
    int64_t begin[3] = {0, bytes_each, 2 * bytes_each};
    char *memory = calloc(4, (size_t)bytes_each);
    moe_exchange e;
    int32_t request = -5;
    bool first = r->rank == 0, waits = bytes_each > INLINE;
    join(r, &c, how, 30);
    GOOD(moe_exchange_init(&e, sizeof e));
    e.recv = memory, e.send = memory + 2 * bytes_each, e.row_bytes = 1;
    e.recv_begin = e.send_begin = begin;
    if (waits) shorten(c.comm, SHORT);
    if (first && waits) {
        REFUSED(MOE_ERROR_TIMEOUT, moe_comm_exchange_start(c.comm, &e, &request));
        SAID("missing ranks: 1");
    } else if (first) {
        GOOD(moe_comm_exchange_start(c.comm, &e, &request));
    }
    meet(r);
    if (!first && !waits) GOOD(moe_comm_exchange(c.comm, &e));
    if (first && !waits) GOOD(moe_comm_exchange_finish(c.comm, request));
    if (waits)
        leave_after_failure(r, &c);
    else
        leave(r, &c);
    free(memory);
}

START_TEST(test_rounds_are_waited_for)
{
    for (how = 0; how <= (NOT_BLOCKING | DUPLICATE); how++)
        for (bytes_each = INLINE; bytes_each <= INLINE + 1; bytes_each++)
            run(2, body_rounds, "rounds");
}
END_TEST

/* ---- refused at creation --------------------------------------------------------------------- */

/* A stream of another device: nothing is put on it. */
static void body_stream_elsewhere(struct rank_case *r)
{
    rank_comm c;
    cudaStream_t elsewhere;
    prepare(r, &c, how, 20);
    CUDA(cudaSetDevice((r->rank + 1) % 8));
    CUDA(cudaStreamCreateWithFlags(&elsewhere, cudaStreamNonBlocking));
    CUDA(cudaSetDevice(r->rank));
    c.config.stream = elsewhere;
    refuse(r, &c, MOE_ERROR_INVALID_ARGUMENT,
           r->rank == 0 ? "config->stream is no stream of device 0"
                        : "config->stream is no stream of device 1");
    CUDA(cudaStreamDestroy(elsewhere));
    c.config.stream = r->stream;
    meet(r);
    GOOD(moe_comm_create_nccl(&c.comm, c.context, &c.config));
    GOOD(moe_comm_barrier(c.comm));
    leave(r, &c);
}

static _Thread_local bool other_version;
int32_t __real_moe__module_version(void);
int32_t __wrap_moe__module_version(void);
int32_t __wrap_moe__module_version(void) { return __real_moe__module_version() + other_version; }

/* A libmoe that this library was not made for. */
static void body_other_version(struct rank_case *r)
{
    rank_comm c;
    prepare(r, &c, how, 5);
    other_version = true;
    refuse(r, &c, MOE_ERROR_NOT_SUPPORTED, "this module needs interface ");
    other_version = false;
    leave(r, &c);
}

/* Rank 0 waits for all to meet, rank 1 does not: what it sends later is not taken for that. */
static void body_warm_up_differs(struct rank_case *r)
{
    rank_comm c;
    prepare(r, &c, how, 5);
    c.config.warm_up = r->rank == 0;
    if (r->rank == 0) {
        refuse(r, &c, MOE_ERROR_TRANSPORT, "in exchange 0 rank 1 sends 0 rows");
    } else {
        GOOD(moe_comm_create_nccl(&c.comm, c.context, &c.config));
        REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(c.comm));
        SAID("in exchange 1 rank 0 sends 0 rows");
    }
    leave_after_failure(r, &c);
}

START_TEST(test_refused_at_creation)
{
    moe_nccl_config c = {.timeout = 7};
    ck_assert_int_eq(moe_nccl_config_init(NULL, sizeof c), MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_int_eq(moe_nccl_config_init(&c, 4), MOE_ERROR_STRUCT_SIZE);
    ck_assert(c.timeout == 7);
    for (how = 0; how <= DUPLICATE; how += DUPLICATE) {
        run(1, body_other_version, "another libmoe");
        run(2, body_stream_elsewhere, "a stream of another device");
        run(2, body_warm_up_differs, "warm_up differs");
    }
}
END_TEST

/* ---- no memory, no thread, words of CUDA ----------------------------------------------------- */

static _Thread_local bool no_threads;
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                          void *(*start)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                          void *(*start)(void *), void *argument);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                          void *(*start)(void *), void *argument)
{
    return no_threads ? EAGAIN : __real_pthread_create(thread, attributes, start, argument);
}

static _Thread_local int allocations_left; /* until one fails; 0: none */

static void *host_alloc(void *user, uint64_t size, uint64_t alignment)
{
    (void)user;
    if (allocations_left > 0 && --allocations_left == 0) return NULL;
    return aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
}

static void host_free(void *user, void *memory, uint64_t size)
{
    (void)user, (void)size;
    free(memory);
}

/* One rank, that meets nobody. */
static void body_no_memory(struct rank_case *r)
{
    rank_comm c;
    moe_context_config host;
    moe_cuda_config config;
    prepare(r, &c, how, 20);
    moe_context_destroy(c.context);
    GOOD(moe_context_config_init(&host, sizeof host));
    host.alloc = host_alloc, host.free = host_free;
    GOOD(moe_cuda_config_init(&config, sizeof config));
    config.host = &host;
    GOOD(moe_cuda_context_create(&c.context, &config));
    int failed = 0;
    for (int n = 1; !c.comm && n < 20; n++) {
        allocations_left = n;
        moe_status status = moe_comm_create_nccl(&c.comm, c.context, &c.config);
        EXPECT(status == MOE_OK || (status == MOE_ERROR_OUT_OF_MEMORY && !c.comm));
        if (status != MOE_OK) SAID("no memory for the group");
        failed += status != MOE_OK;
    }
    allocations_left = 0;
    EXPECT(failed >= 4 && c.comm);
    leave(r, &c);
}

/* Before the ranks meet, so that each of two fails alone. */
static void body_calls_that_fail(struct rank_case *r)
{
    rank_comm c;
    prepare(r, &c, how, 20);
    for (int rank = 0; rank < 2; rank++) {
        meet(r);
        if (r->rank != rank) continue;
        emu_fail("cudaHostAlloc", 1, cudaErrorMemoryAllocation);
        refuse(r, &c, MOE_ERROR_OUT_OF_MEMORY, "cudaErrorMemoryAllocation (out of memory)");
        emu_fail("cudaMalloc", 1, cudaErrorMemoryAllocation);
        refuse(r, &c, MOE_ERROR_OUT_OF_MEMORY, "cudaErrorMemoryAllocation (out of memory)");
        emu_fail("cudaMalloc", 1, cudaErrorUnknown);
        refuse(r, &c, MOE_ERROR_DEVICE, "cudaErrorUnknown (unknown error)");
        no_threads = true;
        refuse(r, &c, MOE_ERROR_SYSTEM, "no thread");
        no_threads = false;
    }
    meet(r);
    GOOD(moe_comm_create_nccl(&c.comm, c.context, &c.config));
    GOOD(moe_comm_barrier(c.comm));
    leave(r, &c);
}

START_TEST(test_no_memory_and_no_thread)
{
    for (how = 0; how <= DUPLICATE; how += DUPLICATE) {
        run(1, body_no_memory, "no memory");
        run(2, body_calls_that_fail, "calls that fail");
    }
}
END_TEST

/* ---- the host's communicator ----------------------------------------------------------------- */

/* The host's own sum over all ranks. */
static void sum_of_host(struct rank_case *r)
{
    float *x = floats(r, 2, (float)r->rank + 1), got[2];
    NCCL(ncclAllReduce(x, x, 2, ncclFloat, ncclSum, r->comm, r->stream));
    read_floats(r, got, x, 2);
    EXPECT(got[0] == (float)(r->ranks * (r->ranks + 1) / 2));
    CUDA(cudaFree(x));
}

/* It works on between a group's exchanges, and after the group has failed, and is gone. */
static void body_stays_of_host(struct rank_case *r)
{
    rank_comm c;
    join(r, &c, how, 5);
    GOOD(moe_comm_barrier(c.comm));
    sum_of_host(r);
    GOOD(moe_comm_barrier(c.comm));
    meet(r);
    moe_comm_abort(c.comm);
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(c.comm));
    SAID("has failed before");
    sum_of_host(r);
    moe_comm_destroy(c.comm);
    c.comm = NULL;
    sum_of_host(r);
    c.config.comm = r->comm; /* a new group of it */
    GOOD(moe_comm_create_nccl(&c.comm, c.context, &c.config));
    GOOD(moe_comm_barrier(c.comm));
    leave(r, &c);
}

/* Of a borrowed one a rank's end waits for nobody. */
static void body_ends_alone(struct rank_case *r)
{
    rank_comm c;
    join(r, &c, how, 20);
    GOOD(moe_comm_barrier(c.comm));
    meet(r);
    double begin = seconds();
    if (r->rank == 0) moe_comm_destroy(c.comm), c.comm = NULL;
    EXPECT(seconds() - begin < 15);
    meet(r);
    leave(r, &c);
}

/* The legacy stream, while the thread captures another one that waits for it. */
static void body_beside_a_capture(struct rank_case *r)
{
    rank_comm c;
    rank_rows m;
    cudaStream_t captured;
    cudaGraph_t graph = NULL;
    join(r, &c, how, 20);
    fill_rows(r, &m, 4, NARROW);
    rows_to_device(r, &m);
    CUDA(cudaStreamSynchronize(r->stream));
    m.e.stream = NULL, m.e.ordered = 1;
    CUDA(cudaStreamCreate(&captured));
    CUDA(cudaStreamBeginCapture(captured, cudaStreamCaptureModeThreadLocal));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_comm_exchange(c.comm, &m.e));
    SAID("the stream cannot be used while another one is being captured");
    (void)cudaStreamEndCapture(captured, &graph);
    if (graph) CUDA(cudaGraphDestroy(graph));
    (void)cudaGetLastError();
    GOOD(moe_comm_exchange(c.comm, &m.e)); /* the group goes on */
    CUDA(cudaStreamSynchronize(NULL));
    rows_from_device(r, &m);
    check_rows(r, &m, 4);
    CUDA(cudaStreamDestroy(captured));
    free_rows(r, &m);
    leave(r, &c);
}

START_TEST(test_what_is_of_the_host)
{
    for (how = 0; how <= DUPLICATE; how += DUPLICATE) {
        run(3, body_stays_of_host, "the host's communicator");
        run(2, body_beside_a_capture, "beside a capture");
    }
    how = 0;
    run(3, body_ends_alone, "an end alone");
}
END_TEST

int main(void)
{
    begin_program();
    Suite *suite = suite_create("comm_nccl_terms");
    TCase *tcase = tcase_create("terms");
    tcase_set_timeout(tcase, 300);
    tcase_add_test(tcase, test_memory_and_waits);
    tcase_add_test(tcase, test_rounds_are_waited_for);
    tcase_add_test(tcase, test_refused_at_creation);
    tcase_add_test(tcase, test_no_memory_and_no_thread);
    tcase_add_test(tcase, test_what_is_of_the_host);
    suite_add_tcase(suite, tcase);
    return run_suite(suite, 1);
}
