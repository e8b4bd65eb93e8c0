/* check_comm_nccl_kills.c - ranks as processes that make step after step, or group after group, one
 * of which is killed at some time, or stopped for longer than the deadlines: whatever kind of layer
 * and group it was, every call of the others returns within them, they are told, their streams go
 * on, and nothing of theirs is left. */
#include "layer_nccl_case.h"
#include "support/suite.h"

#include <check.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static const double SHORT = 0.25; /* a deadline that passes */
enum { SLOW = 8 };                /* seconds that no call takes */

static const layer_kind KINDS[] = {
    {.name = "exact"},
    {.name = "padded", .padded_rows = 44},
    {.name = "parts beside", .chunks = 3, .beside = true},
    {.name = "stages", .stages = true},
    {.name = "stages beside", .stages = true, .beside = true},
    {.name = "rounds", .received = MOE_RECEIVED_CHUNK, .max_received = 3},
    {.name = "padded beside, losses of all", .padded_rows = 44, .global = true, .beside = true}};
enum { KIND_COUNT = sizeof KINDS / sizeof *KINDS };

/* The rank that is killed or stopped, and after how many microseconds of the loop. */
static struct {
    int kind, how, victim;
    long after;
    int stops;
} trial;

static void nap(long microseconds)
{
    struct timespec t = {microseconds / 1000000, microseconds % 1000000 * 1000};
    (void)nanosleep(&t, NULL);
}

static void *kill_later(void *unused)
{
    (void)unused;
    nap(trial.after);
    (void)kill(getpid(), SIGKILL);
    return NULL;
}

/* By a process of its own, for a stopped one does nothing. */
static void stop_later(void)
{
    pid_t rank = getpid();
    if (fork() != 0) return;
    nap(trial.after);
    (void)kill(rank, SIGSTOP);
    nap(1500000);
    (void)kill(rank, SIGCONT);
    _exit(0);
}

static void begin_end(struct rank_case *r)
{
    pthread_t thread;
    if (r->rank != trial.victim) return;
    if (trial.stops)
        stop_later();
    else
        EXPECT(pthread_create(&thread, NULL, kill_later, NULL) == 0);
}

/* A slow machine may have ended the victim's loop before. */
static void wait_for_end(struct rank_case *r)
{
    while (r->rank == trial.victim && !trial.stops) nap(1000000);
    if (r->rank == trial.victim) (void)wait(NULL);
}

/* ---- groups ---------------------------------------------------------------------------------- */

/* Communicators of the host, which it ends. */
typedef struct stages {
    ncclComm_t node, rail;
} stages;

static void part_of(struct rank_case *r, const rank_comm *c, int color, int key, ncclComm_t *nccl,
                    moe_comm **comm)
{
    ncclResult_t state = ncclInProgress;
    moe_nccl_config config = c->config;
    NCCL(ncclCommSplit(r->comm, color, key, nccl, NULL));
    while (state == ncclInProgress) NCCL(ncclCommGetAsyncError(r->comm, &state));
    config.comm = *nccl;
    GOOD(moe_comm_create_nccl(comm, c->context, &config));
}

static void join_stages(struct rank_case *r, rank_comm *c, stages *s)
{
    int nodes = r->ranks % 2 ? r->ranks : 2, node = r->rank % nodes, number = r->rank / nodes;
    part_of(r, c, node, number, &s->node, &c->node_comm);
    part_of(r, c, number, node, &s->rail, &c->rail_comm);
}

/* ---- the loop -------------------------------------------------------------------------------- */

enum { FORWARD, BACKWARD, REDUCE, NORM, CALLS };

static moe_status make_call(struct rank_case *r, rank_layer *l, int call)
{
    double squared, begin = seconds();
    moe_status status = call == FORWARD    ? layer_forward(r, l, l->tokens)
                        : call == BACKWARD ? layer_backward(r, l)
                        : call == REDUCE   ? moe_layer_reduce_gradients(l->layer, r->stream)
                                           : moe_layer_gradient_norm(l->layer, &squared, r->stream);
    EXPECT(seconds() - begin < SLOW || r->rank == trial.victim);
    return status;
}

/* Until a call fails; then all of them once more. */
static void run_loop(struct rank_case *r, rank_layer *l)
{
    moe_status status = MOE_OK;
    for (int call = FORWARD; status == MOE_OK; call = (call + 1) % CALLS)
        status = make_call(r, l, call);
    EXPECT(status == MOE_ERROR_TRANSPORT || status == MOE_ERROR_TIMEOUT);
    EXPECT(moe_last_error()[0] != 0);
    for (int call = FORWARD; call < CALLS; call++) (void)make_call(r, l, call);
    moe_comm_abort(l->c->comm), moe_comm_abort(l->c->node_comm), moe_comm_abort(l->c->rail_comm);
    EXPECT(make_call(r, l, FORWARD) != MOE_OK);
    EXPECT(moe_comm_poll(l->c->comm) == MOE_ERROR_TRANSPORT);
}

static void end(struct rank_case *r, ncclComm_t *nccl)
{
    if (*nccl) NCCL(ncclCommAbort(*nccl));
    *nccl = NULL;
}

static void body_killed(struct rank_case *r)
{
    rank_comm c;
    rank_layer l;
    stages s = {NULL, NULL};
    join(r, &c, trial.how, 30);
    if (KINDS[trial.kind].stages) join_stages(r, &c, &s);
    make_layer(r, &l, &c, &KINDS[trial.kind]);
    (void)layer_step(r, &l);
    CUDA(cudaStreamSynchronize(r->stream));
    shorten(c.comm, SHORT);
    if (s.node) shorten(c.node_comm, SHORT), shorten(c.rail_comm, SHORT);
    meet(r);
    begin_end(r);
    run_loop(r, &l);
    wait_for_end(r);
    if (trial.how & DUPLICATE) CUDA(cudaStreamSynchronize(r->stream)); /* the host's is not asked */
    end(r, &r->comm), end(r, &s.node), end(r, &s.rail);
    CUDA(cudaStreamSynchronize(r->stream));
    if (l.beside) CUDA(cudaStreamSynchronize(l.beside));
    free_layer(r, &l);
    moe_comm_destroy(c.node_comm), moe_comm_destroy(c.rail_comm);
    moe_comm_destroy(c.comm), moe_context_destroy(c.context);
    EXPECT(emu_live_allocations(0) + emu_live_allocations(1) == 0 && emu_nccl_live() == 0);
    EXPECT(emu_live_objects() == 1); /* the rank's stream */
}

/* ---- groups that come and go ----------------------------------------------------------------- */

/* The group's life, until a call of it fails. */
static moe_status run_group(struct rank_case *r, rank_comm *c, rank_rows *host, rank_rows *device)
{
    double begin = seconds();
    c->comm = NULL;
    moe_status status = moe_comm_create_nccl(&c->comm, c->context, &c->config);
    if (status == MOE_OK) status = moe_comm_exchange(c->comm, &host->e);
    if (status == MOE_OK) status = moe_comm_exchange(c->comm, &device->e);
    if (status == MOE_OK) status = moe_comm_barrier(c->comm);
    EXPECT(seconds() - begin < SLOW);
    if (status == MOE_OK) moe_comm_destroy(c->comm);
    EXPECT(seconds() - begin < SLOW);
    return status;
}

/* Of a communicator of the host that does not block NCCL may be in progress for ever. */
static void body_group_killed(struct rank_case *r)
{
    rank_comm c;
    rank_rows host, device;
    moe_status status = MOE_OK;
    prepare(r, &c, trial.how, 2 * SHORT);
    fill_rows(r, &host, 3, 3000), fill_rows(r, &device, 3, NARROW);
    rows_to_device(r, &device);
    device.e.ordered = 1;
    CUDA(cudaStreamSynchronize(r->stream));
    meet(r);
    begin_end(r);
    while (status == MOE_OK) status = run_group(r, &c, &host, &device);
    EXPECT(status == MOE_ERROR_TRANSPORT || status == MOE_ERROR_TIMEOUT);
    wait_for_end(r);
    end(r, &r->comm);
    CUDA(cudaStreamSynchronize(r->stream));
    moe_comm_destroy(c.comm), moe_context_destroy(c.context);
    free_rows(r, &host), free_rows(r, &device);
    for (int i = 0; i < 2000 && emu_live_objects() + emu_nccl_live() > 1; i++) sleep_ms(1);
    bool gone = emu_live_allocations(0) + emu_live_allocations(1) == 0 && emu_live_objects() == 1;
    EXPECT(gone || trial.how == NOT_BLOCKING);
    EXPECT(emu_nccl_live() == 0);
}

static const struct named_body BODIES[] = {{.name = "step", .body = body_killed},
                                           {.name = "group", .body = body_group_killed},
                                           {.name = NULL}};

/* ---- in turn --------------------------------------------------------------------------------- */

static const char TRIAL[] = "MOE_TEST_TRIAL"; /* what a process is told by its parent */

static int run_told(char **argv)
{
    const char *text = getenv(TRIAL);
    if (!text || sscanf(text, "%d %d %d %ld %d", &trial.kind, &trial.how, &trial.victim,
                        &trial.after, &trial.stops) != 5)
        return 126;
    return run_as_rank(argv, BODIES);
}

static uint64_t seed; /* of the program */

static uint64_t next_number(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

/* MOE_KILLS: how many, MOE_EMULATION_SEED: which. One that is killed has not ended well. */
static void try_all(const char *name, const struct named_body *body, int kind, bool may_stop)
{
    const char *count = getenv("MOE_KILLS");
    uint64_t state = seed * 1000 + (uint64_t)kind;
    int kills = count ? atoi(count) : getenv("MOE_LONG") ? 8 : 1;
    for (int n = 0; n < kills; n++) {
        char text[80], number[24];
        int ranks = 2 + (int)(next_number(&state) % 3), how = (int)(next_number(&state) % 4);
        int victim = (int)(next_number(&state) % (uint64_t)ranks);
        long after = (long)(next_number(&state) % 60000);
        bool stops = may_stop && (n + kind) % 3 == 2;
        (void)snprintf(text, sizeof text, "%d %d %d %ld %d", kind, how, victim, after, stops);
        (void)snprintf(number, sizeof number, "%llu", (unsigned long long)(state >> 40));
        setenv(TRIAL, text, 1), setenv("MOE_EMULATION_SEED", number, 1);
        int failures = on_processes(ranks, body);
        ck_assert_msg(failures == !stops, "%s, %d ranks, trial %s, seed %s: %d ended badly", name,
                      ranks, text, number, failures);
    }
}

START_TEST(test_steps) { try_all(KINDS[_i].name, &BODIES[0], _i, true); }
END_TEST

START_TEST(test_groups) { try_all("groups", &BODIES[1], KIND_COUNT + _i, false); }
END_TEST

int main(int argc, char **argv)
{
    begin_program();
    if (argc == 7 && strcmp(argv[1], "--rank") == 0) return run_told(argv);
    const char *told = getenv("MOE_EMULATION_SEED");
    seed = told ? strtoull(told, NULL, 10) : 1;
    Suite *suite = suite_create("comm_nccl_kills");
    TCase *tcase = tcase_create("kills");
    tcase_set_timeout(tcase, 1200);
    tcase_add_loop_test(tcase, test_steps, 0, KIND_COUNT);
    tcase_add_loop_test(tcase, test_groups, 0, 3);
    suite_add_tcase(suite, tcase);
    return run_suite(suite, 0);
}
