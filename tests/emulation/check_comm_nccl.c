/* check_comm_nccl.c - groups over the fake NCCL: the collectives with host and device memory,
 * ordered and waited for, in graphs; every kind of communicator; who may be destroyed when.
 * Failures are in check_comm_nccl_faults.c. */
#include "comm_nccl_case.h"
#include "support/ranks_asked.h"
#include "support/suite.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* A race detector needs a rank's room many times over. */
#ifdef __SANITIZE_THREAD__
enum { SIZES = 2 };
#else
enum { SIZES = 4 };
#endif

static int how; /* of the test, before its ranks start */

/* ---- host memory ----------------------------------------------------------------------------- */

/* Three exchanges at once, finished in another order on every rank; then one after another, of one
 * frame and of several rounds. */
static void body_host_rows(struct rank_case *r)
{
    rank_comm c;
    rank_rows m[3];
    int32_t request[3];
    join(r, &c, how, 20);
    uint64_t waits = emu_nccl_host_waits();
    for (int n = 0; n < 3; n++) {
        fill_rows(r, &m[n], n, n == 1 ? WIDE : NARROW);
        GOOD(moe_comm_exchange_start(c.comm, &m[n].e, &request[n]));
    }
    for (int n = 0; n < 3; n++) {
        int which = (n + r->rank) % 3;
        GOOD(moe_comm_exchange_finish(c.comm, request[which]));
        check_rows(r, &m[which], which);
    }
    for (int n = 0; n < 3; n++) free_rows(r, &m[n]);
    for (int n = 3; n < 12; n++) {
        fill_rows(r, &m[0], n, n % 2 ? NARROW : n * 2000);
        GOOD(moe_comm_exchange(c.comm, &m[0].e));
        check_rows(r, &m[0], n);
        free_rows(r, &m[0]);
    }
    if (!(how & COLD)) EXPECT(emu_nccl_host_waits() == waits); /* that was done at creation */
    leave(r, &c);
}

static void body_simple(struct rank_case *r)
{
    rank_comm c;
    int P = r->ranks, send[MOST_RANKS] = {0}, recv[MOST_RANKS], all[MOST_RANKS * MOST_RANKS];
    int64_t begin[MOST_RANKS + 1] = {0};
    join(r, &c, how, 20);
    for (int p = 0; p < P; p++) send[p] = 100 * r->rank + p;
    GOOD(moe_comm_all_to_all(c.comm, recv, send, sizeof *send));
    for (int p = 0; p < P; p++) EXPECT(recv[p] == 100 * p + r->rank);
    GOOD(moe_comm_all_to_all(c.comm, NULL, NULL, 0));
    for (int p = 0; p < P; p++) begin[p + 1] = begin[p] + p; /* rank p has p rows */
    GOOD(moe_comm_all_gather(c.comm, all, begin, send, sizeof *send));
    for (int p = 0; p < P; p++)
        for (int i = 0; i < p; i++) EXPECT(all[begin[p] + i] == 100 * p + i);
    GOOD(moe_comm_poll(c.comm));
    /* Nobody is through a barrier before all have come. */
    __atomic_add_fetch(&r->shared->word[0], 1, __ATOMIC_ACQ_REL);
    GOOD(moe_comm_barrier(c.comm));
    EXPECT(__atomic_load_n(&r->shared->word[0], __ATOMIC_ACQUIRE) == P);
    EXPECT(moe_comm_pending_bytes(c.comm) == 0);
    leave(r, &c);
}

/* ---- device memory --------------------------------------------------------------------------- */

/* Ordered and waited for in turns, on the rank's stream and on the legacy one. */
static void body_device_rows(struct rank_case *r)
{
    rank_comm c;
    rank_rows m;
    int32_t request = 0, done = 0;
    join(r, &c, how, 20);
    for (int n = 0; n < 12; n++) {
        fill_rows(r, &m, n, n % 3 ? NARROW : WIDE);
        rows_to_device(r, &m);
        m.e.ordered = n % 2;
        if (n == 7) CUDA(cudaStreamSynchronize(r->stream));
        if (n == 7) m.e.stream = NULL;
        GOOD(moe_comm_exchange_start(c.comm, &m.e, &request));
        EXPECT((request == MOE_COMM_NO_REQUEST) == (n % 2 == 1));
        if (n % 2) GOOD(moe_comm_exchange_test(c.comm, request, &done));
        if (n % 2) EXPECT(done == MOE_COMM_DONE);
        GOOD(moe_comm_exchange_finish(c.comm, request));
        if (n == 7) CUDA(cudaStreamSynchronize(NULL));
        rows_from_device(r, &m);
        check_rows(r, &m, n);
        free_rows(r, &m);
    }
    leave(r, &c);
}

/* The same rows to all, several bytes wide; and exchanges of both memories between each other. */
static void body_to_all(struct rank_case *r)
{
    rank_comm c;
    rank_rows m;
    int P = r->ranks, mine = r->rank % 3;
    int64_t own[2] = {0, mine};
    join(r, &c, how, 20);
    for (int ordered = 0; ordered < 2; ordered++) {
        fill_rows(r, &m, 0, NARROW);
        free(m.recv), free(m.send);
        m.send = malloc(3 * NARROW), m.recv = malloc(MOST_RANKS * 3 * NARROW);
        memset(m.send, 10 + r->rank, 3 * NARROW);
        for (int p = 0; p < P; p++) m.recv_begin[p + 1] = m.recv_begin[p] + p % 3;
        for (int p = 0; p < P; p++) m.send_begin[p + 1] = 3; /* room */
        rows_to_device(r, &m);
        m.e.to_all = 1, m.e.send_begin = own, m.e.ordered = ordered;
        GOOD(moe_comm_exchange(c.comm, &m.e));
        GOOD(moe_comm_barrier(c.comm));
        rows_from_device(r, &m);
        for (int p = 0; p < P; p++)
            for (int64_t i = m.recv_begin[p] * NARROW; i < m.recv_begin[p + 1] * NARROW; i++)
                EXPECT(m.recv[i] == 10 + p);
        free_rows(r, &m);
    }
    leave(r, &c);
}

/* ---- graphs ---------------------------------------------------------------------------------- */

static void body_graph(struct rank_case *r)
{
    rank_comm c;
    rank_rows m, host;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    join(r, &c, how, 20);
    if (how & COLD) GOOD(moe_comm_barrier(c.comm)); /* a capture cannot connect */
    fill_rows(r, &m, 4, NARROW), fill_rows(r, &host, 5, NARROW);
    rows_to_device(r, &m);
    CUDA(cudaStreamSynchronize(r->stream));
    m.e.ordered = 1;
    CUDA(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
    GOOD(moe_comm_exchange(c.comm, &m.e));
    /* What waits is refused, and nothing of it is in the graph or was sent. */
    m.e.ordered = 0;
    REFUSED(MOE_ERROR_INVALID_STATE, moe_comm_exchange(c.comm, &m.e));
    SAID("the stream is being captured, and this exchange waits");
    host.e.stream = r->stream;
    REFUSED(MOE_ERROR_INVALID_STATE, moe_comm_exchange(c.comm, &host.e));
    SAID("the stream is being captured, and this exchange waits");
    CUDA(cudaStreamEndCapture(r->stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    for (int i = 0; i < 3; i++) {
        memset(m.recv, 0, (size_t)m.recv_begin[r->ranks] * NARROW);
        CUDA(cudaMemsetAsync(m.device_recv, 0, (size_t)m.recv_begin[r->ranks] * NARROW + 1,
                             r->stream));
        CUDA(cudaGraphLaunch(exec, r->stream));
        rows_from_device(r, &m);
        check_rows(r, &m, 4);
    }
    GOOD(moe_comm_exchange(c.comm, &host.e)); /* the group goes on */
    check_rows(r, &host, 5);
    CUDA(cudaGraphExecDestroy(exec));
    free_rows(r, &m), free_rows(r, &host);
    leave(r, &c);
}

/* The host's own stream for host memory: refused while it is captured, also at creation. */
static void body_own_stream(struct rank_case *r)
{
    rank_comm c;
    cudaGraph_t graph;
    prepare(r, &c, how, 20);
    c.config.stream = r->stream;
    CUDA(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_comm_create_nccl(&c.comm, c.context, &c.config));
    SAID("config->stream is being captured");
    CUDA(cudaStreamEndCapture(r->stream, &graph));
    CUDA(cudaGraphDestroy(graph));
    GOOD(moe_comm_create_nccl(&c.comm, c.context, &c.config));
    GOOD(moe_comm_barrier(c.comm));
    CUDA(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_comm_barrier(c.comm));
    CUDA(cudaStreamEndCapture(r->stream, &graph));
    CUDA(cudaGraphDestroy(graph));
    GOOD(moe_comm_barrier(c.comm));
    leave(r, &c);
}

/* ---- life ------------------------------------------------------------------------------------ */

/* The thread's device and its last error stay as they were. */
static void body_surroundings(struct rank_case *r)
{
    rank_comm c;
    int elsewhere = (r->rank + 3) % 8, now = -1;
    prepare(r, &c, how, 20);
    CUDA(cudaSetDevice(elsewhere));
    EXPECT(cudaEventQuery(NULL) != cudaSuccess);
    GOOD(moe_comm_create_nccl(&c.comm, c.context, &c.config));
    GOOD(moe_comm_barrier(c.comm));
    GOOD(moe_comm_poll(c.comm));
    CUDA(cudaGetDevice(&now));
    EXPECT(now == elsewhere);
    EXPECT(cudaGetLastError() != cudaSuccess); /* the host's own */
    moe_comm_destroy(c.comm);
    c.comm = NULL;
    CUDA(cudaGetDevice(&now));
    EXPECT(now == elsewhere);
    EXPECT(cudaGetLastError() == cudaSuccess);
    CUDA(cudaSetDevice(r->rank % 8));
    leave(r, &c);
}

/* The context goes first, then the host's communicator, then the group; a duplicate lives on. */
static void body_destroy_orders(struct rank_case *r)
{
    rank_comm c;
    join(r, &c, how, 20);
    moe_context_destroy(c.context);
    c.context = NULL;
    GOOD(moe_comm_barrier(c.comm));
    meet(r);
    if (how & NOT_BLOCKING)
        NCCL(ncclCommAbort(r->comm));
    else
        NCCL(ncclCommDestroy(r->comm));
    r->comm = NULL;
    if (how & DUPLICATE) GOOD(moe_comm_barrier(c.comm));
    leave(r, &c);
}

/* Ranks that end at different times: that of a duplicate waits for others up to its timeout. */
static void body_ends_apart(struct rank_case *r)
{
    rank_comm c;
    if (r->ranks > 2) return;
    join(r, &c, how, 3);
    GOOD(moe_comm_barrier(c.comm));
    double begin = seconds();
    for (int turn = 0; turn < 2; turn++) {
        if (turn == r->rank) moe_comm_destroy(c.comm);
        meet(r);
    }
    EXPECT(seconds() - begin < 30);
    c.comm = NULL;
    leave(r, &c);
}

/* A child of a fork can destroy what its parent made, which its parent goes on to use. */
static void body_fork(struct rank_case *r)
{
    rank_comm c;
    int status = 0;
    join(r, &c, how, 20);
    meet(r);
    if (r->rank == 0) {
        (void)fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            moe_comm_abort(c.comm);
            moe_comm_destroy(c.comm);
            _exit(7);
        }
        EXPECT(waitpid(child, &status, 0) == child);
        EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 7);
    }
    meet(r);
    GOOD(moe_comm_barrier(c.comm));
    leave(r, &c);
}

/* ---- cases ----------------------------------------------------------------------------------- */

static const struct named_body bodies[] = {
    {.name = "host_rows", .body = body_host_rows},
    {.name = "simple", .body = body_simple},
    {.name = "device_rows", .body = body_device_rows},
    {.name = "to_all", .body = body_to_all},
    {.name = "graph", .body = body_graph},
    {.name = "own_stream", .body = body_own_stream},
    {.name = "surroundings", .body = body_surroundings},
    {.name = "destroy_orders", .body = body_destroy_orders},
    {.name = "ends_apart", .body = body_ends_apart},
    {.name = "fork", .body = body_fork},
    {.name = NULL},
};

START_TEST(test_groups)
{
    const int ranks[] = {1, 2, 4, 8},
              kinds[] = {0, NOT_BLOCKING, DUPLICATE, NOT_BLOCKING | DUPLICATE, COLD};
    const struct named_body *b = &bodies[_i];
    for (int i = 0; i < SIZES; i++) {
        if (!ranks_asked(ranks[i], true)) continue;
        for (int k = 0; k < 5; k++) {
            how = kinds[k];
            emu_set_seed((uint64_t)(i * 5 + k + 1));
            int failures = on_threads(ranks[i], b->body);
            ck_assert_msg(failures == 0, "%s on %d ranks, kind %d: %d failures", b->name, ranks[i],
                          kinds[k], failures);
            ck_assert_msg(all_is_gone(), "%s on %d ranks, kind %d", b->name, ranks[i], kinds[k]);
        }
    }
}
END_TEST

START_TEST(test_processes)
{
    for (int ranks = 2; ranks <= 3; ranks++) {
        if (!ranks_asked(ranks, true)) continue;
        int failures = on_processes(ranks, &bodies[_i]);
        ck_assert_msg(failures == 0, "%s on %d processes: %d failures", bodies[_i].name, ranks,
                      failures);
    }
}
END_TEST

int main(int argc, char **argv)
{
    begin_program();
    if (argc == 7 && strcmp(argv[1], "--rank") == 0) return run_as_rank(argv, bodies);
    int count = (int)(sizeof bodies / sizeof bodies[0]) - 1;
    Suite *suite = suite_create("comm_nccl");
    TCase *tcase = tcase_create("groups");
    tcase_set_timeout(tcase, 300);
    tcase_add_loop_test(tcase, test_groups, 0, count);
    tcase_add_loop_test(tcase, test_processes, 0, 4);
    suite_add_tcase(suite, tcase);
    return run_suite(suite, 1);
}
