/* check_comm_nccl_layer_faults.c - whole layers over the fake NCCL when one rank fails, at every
 * call of a step in turn: a call that fails, an error that comes later, a rank that stays silent,
 * gives up or dies. Every call returns, nothing is left when the host has aborted its communicator,
 * and only the host does that. */
#include "layer_nccl_case.h"
#include "support/suite.h"

#include <check.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const double SHORT = 0.25; /* a deadline that passes */
enum { SLOW = 8 };                /* seconds that no call takes */

static const layer_kind KINDS[] = {
    {.name = "exact"},
    {.name = "padded", .padded_rows = 44},
    {.name = "rounds", .received = MOE_RECEIVED_CHUNK, .max_received = 3},
    {.name = "losses of all, slices", .slices = 2, .global = true}};
enum { KIND_COUNT = sizeof KINDS / sizeof *KINDS };
static const int GROUPS[KIND_COUNT] = {10, 7, 15, 11}; /* of a step */

/* What goes wrong at rank 1, at its n-th call, group or operation of a step. */
enum {
    FAILING_SEND,
    FAILING_RECEIVE,
    FAILING_FRAMES,
    FAILING_GROUP,
    LATER_ERROR,
    SILENT,
    GIVING_UP,
    DYING,
    FAULTS
};
static const char *const FAULT_NAME[FAULTS] = {"send",        "receive", "frames",    "group",
                                               "later error", "silent",  "giving up", "dying"};

typedef struct trial {
    const layer_kind *kind;
    int fault, n, how;
} trial;
static trial now; /* before the ranks start */

static atomic_int noticed; /* ranks that were told */

/* ---- between the library and NCCL ------------------------------------------------------------ */

static atomic_int groups_left; /* of rank 1 until it gives up or dies; 0: no more */
static _Thread_local bool is_rank_1, is_host;
static _Thread_local moe_comm *to_give_up;
static ncclComm_t borrowed[MOST_RANKS];
static atomic_int aborted_by_library;

ncclResult_t __real_ncclGroupEnd(void);
ncclResult_t __wrap_ncclGroupEnd(void);
ncclResult_t __real_ncclCommAbort(ncclComm_t comm);
ncclResult_t __wrap_ncclCommAbort(ncclComm_t comm);

ncclResult_t __wrap_ncclGroupEnd(void)
{
    if (is_rank_1 && atomic_load(&groups_left) > 0 && atomic_fetch_sub(&groups_left, 1) == 1) {
        if (now.fault == DYING) _exit(0);
        moe_comm_abort(to_give_up);
    }
    return __real_ncclGroupEnd();
}

ncclResult_t __wrap_ncclCommAbort(ncclComm_t comm)
{
    for (int r = 0; r < MOST_RANKS && !is_host; r++)
        if (comm == borrowed[r]) (void)atomic_fetch_add(&aborted_by_library, 1);
    return __real_ncclCommAbort(comm);
}

static void arrange(struct rank_case *r, const rank_comm *c)
{
    is_rank_1 = true, to_give_up = c->comm;
    if (now.fault == FAILING_SEND) emu_nccl_fail(r->rank, "ncclSend", now.n, ncclSystemError);
    if (now.fault == FAILING_RECEIVE) emu_nccl_fail(r->rank, "ncclRecv", now.n, ncclSystemError);
    if (now.fault == FAILING_FRAMES) emu_nccl_fail(r->rank, "ncclAlltoAll", now.n, ncclSystemError);
    if (now.fault == FAILING_GROUP) emu_nccl_fail(-1, "ncclGroupEnd", now.n, ncclInternalError);
    if (now.fault == LATER_ERROR) emu_nccl_async_error(r->rank, now.n, ncclRemoteError);
    if (now.fault == SILENT) emu_nccl_absent(r->rank, now.n);
    if (now.fault == GIVING_UP || now.fault == DYING) atomic_store(&groups_left, now.n);
}

/* ---- a step ---------------------------------------------------------------------------------- */

enum { FORWARD, BACKWARD, REDUCE, NORM, POLL, CALLS };

static moe_status make_call(struct rank_case *r, rank_layer *l, int call)
{
    double squared;
    if (call == FORWARD) return layer_forward(r, l, l->tokens);
    if (call == BACKWARD) return layer_backward(r, l);
    if (call == REDUCE) return moe_layer_reduce_gradients(l->layer, r->stream);
    if (call == NORM) return moe_layer_gradient_norm(l->layer, &squared, r->stream);
    return moe_comm_poll(l->c->comm);
}

/* What a rank is told when a call of its group has failed, or its device waits for another's. */
static void check_failure(struct rank_case *r, moe_status status)
{
    const char *words = moe_last_error();
    bool of_device = strstr(words, "was not done in") != NULL;
    EXPECT(status == MOE_ERROR_TRANSPORT || status == MOE_ERROR_TIMEOUT);
    if (of_device)
        SAID("device");
    else
        SAID("rank ");
    /* Another rank may be behind one that is missing, and a group that fails be anyone's. */
    const char *missing = strstr(words, "missing ranks: ");
    if (missing && r->rank != 1 && now.fault != FAILING_GROUP) EXPECT(strchr(missing, '1') != NULL);
    (void)atomic_fetch_add(&noticed, 1);
}

/* Until a call fails, and that one again: the group has ended for good. */
static void run_calls(struct rank_case *r, rank_layer *l)
{
    moe_status status = MOE_OK;
    for (int call = FORWARD; call < CALLS && status == MOE_OK; call++) {
        double begin = seconds();
        status = make_call(r, l, call);
        if (status != MOE_OK) check_failure(r, status);
        EXPECT(seconds() - begin < SLOW);
        if (status == MOE_OK || strstr(moe_last_error(), "device")) continue;
        moe_status again = make_call(r, l, call);
        EXPECT(again == MOE_ERROR_TRANSPORT || again == MOE_ERROR_INVALID_STATE);
        EXPECT(moe_comm_poll(l->c->comm) == MOE_ERROR_TRANSPORT);
        EXPECT(seconds() - begin < SLOW);
    }
}

/* A communicator of the host's is the host's to end. */
static void abort_own(struct rank_case *r)
{
    is_host = true;
    NCCL(ncclCommAbort(r->comm));
    is_host = false;
    r->comm = NULL;
}

/* A layer that has made a step, and what goes wrong in rank 1's next one. */
static void begin_case(struct rank_case *r, rank_comm *c, rank_layer *l)
{
    join(r, c, now.how, 30);
    make_layer(r, l, c, now.kind);
    (void)layer_step(r, l);
    CUDA(cudaStreamSynchronize(r->stream));
    borrowed[r->rank] = r->comm;
    shorten(c->comm, SHORT);
    meet(r);
    if (r->rank == 1) arrange(r, c);
}

static void body_step(struct rank_case *r)
{
    rank_comm c;
    rank_layer l;
    begin_case(r, &c, &l);
    meet(r);
    run_calls(r, &l);
    is_rank_1 = false;
    meet(r);
    if (r->rank == 0) emu_nccl_heal();
    abort_own(r);
    meet(r);
    CUDA(cudaStreamSynchronize(r->stream));
    free_layer(r, &l);
    moe_comm_destroy(c.comm), moe_context_destroy(c.context);
}

/* As processes rank 1 dies in the middle; the others are told nothing. */
static void body_dying(struct rank_case *r)
{
    rank_comm c;
    rank_layer l;
    begin_case(r, &c, &l);
    run_calls(r, &l);
    EXPECT(r->rank != 1 && atomic_load(&noticed) == 1 && atomic_load(&aborted_by_library) == 0);
    abort_own(r);
    CUDA(cudaStreamSynchronize(r->stream));
    free_layer(r, &l);
    moe_comm_destroy(c.comm), moe_context_destroy(c.context);
    EXPECT(emu_live_allocations(0) + emu_live_allocations(1) == 0 && emu_nccl_live() == 0);
}

static const struct named_body BODIES[] = {{.name = "dying", .body = body_dying}, {.name = NULL}};

/* What a process is told by its parent. */
static const char TRIAL[] = "MOE_TEST_TRIAL";

static void tell_trial(int kind, int n, int how)
{
    char text[60];
    (void)snprintf(text, sizeof text, "%d %d %d", kind, n, how);
    setenv(TRIAL, text, 1);
}

static int run_told(char **argv)
{
    const char *text = getenv(TRIAL);
    int kind = 0;
    if (!text || sscanf(text, "%d %d %d", &kind, &now.n, &now.how) != 3) return 126;
    now.kind = &KINDS[kind], now.fault = DYING;
    return run_as_rank(argv, BODIES);
}

/* ---- in turn --------------------------------------------------------------------------------- */

static void try_once(int ranks)
{
    atomic_store(&noticed, 0), atomic_store(&groups_left, 0), atomic_store(&aborted_by_library, 0);
    memset(borrowed, 0, sizeof borrowed);
    int failures = on_threads(ranks, body_step);
    bool gone = all_is_gone();
    ck_assert_msg(failures == 0 && gone && atomic_load(&aborted_by_library) == 0,
                  "%s, %s %d, kind %d: %d failures, the host's was aborted %d times",
                  now.kind->name, FAULT_NAME[now.fault], now.n, now.how, failures,
                  atomic_load(&aborted_by_library));
}

/* Every one, until there are no more; without MOE_LONG a part of them. */
START_TEST(test_every_call_of_a_step)
{
    static const int HOW[] = {0, DUPLICATE, NOT_BLOCKING, NOT_BLOCKING | DUPLICATE};
    bool all = getenv("MOE_LONG") != NULL;
    int failed = 0;
    for (int k = 0; k < KIND_COUNT; k++) {
        if (!all && k != _i % KIND_COUNT) continue;
        atomic_store(&noticed, 1);
        for (int n = 1; atomic_load(&noticed) > 0; n += all ? 1 : 3) {
            now = (trial){.kind = &KINDS[k], .fault = _i, .n = n, .how = HOW[(_i + k + n) % 4]};
            try_once(all ? 2 + n % 2 : 2);
            failed += atomic_load(&noticed) > 0;
        }
    }
    ck_assert_int_gt(failed, 0);
}
END_TEST

START_TEST(test_rank_that_dies)
{
    static const int HOW[] = {0, DUPLICATE, NOT_BLOCKING};
    bool all = getenv("MOE_LONG") != NULL;
    for (int n = 1; n <= GROUPS[_i]; n++) {
        int ranks = all && n % 2 ? 3 : 2, way = HOW[(_i + n) % 3];
        if (!all && n % KIND_COUNT != _i) continue;
        tell_trial(_i, n, way);
        int failures = on_processes(ranks, &BODIES[0]);
        ck_assert_msg(failures == 0, "%s, group %d of %d processes, kind %d: %d failures",
                      KINDS[_i].name, n, ranks, way, failures);
    }
}
END_TEST

int main(int argc, char **argv)
{
    begin_program();
    if (argc == 7 && strcmp(argv[1], "--rank") == 0) return run_told(argv);
    Suite *suite = suite_create("comm_nccl_layer_faults");
    TCase *tcase = tcase_create("faults"), *dying = tcase_create("dying");
    tcase_set_timeout(tcase, 600), tcase_set_timeout(dying, 600);
    tcase_add_loop_test(tcase, test_every_call_of_a_step, 0, DYING);
    tcase_add_loop_test(dying, test_rank_that_dies, 0, KIND_COUNT);
    suite_add_tcase(suite, tcase), suite_add_tcase(suite, dying);
    return run_suite(suite, 0);
}
