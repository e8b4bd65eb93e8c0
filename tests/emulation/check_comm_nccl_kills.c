/* check_comm_nccl_kills.c - ranks as processes that make step after step, one of which is killed at
 * some time: whatever kind of layer and group it was, every call of the others returns within its
 * deadlines, they are told, their streams go on, and nothing of theirs is left. */
#include "layer_nccl_case.h"
#include "support/suite.h"

#include <check.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

/* The rank that is killed, and after how many microseconds of the loop. */
static struct {
    int kind, how, victim;
    long after;
} trial;

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
    shorten(c->node_comm, SHORT), shorten(c->rail_comm, SHORT);
}

/* ---- the loop -------------------------------------------------------------------------------- */

static void *kill_later(void *unused)
{
    struct timespec t = {trial.after / 1000000, trial.after % 1000000 * 1000};
    (void)unused;
    (void)nanosleep(&t, NULL);
    (void)kill(getpid(), SIGKILL);
    return NULL;
}

enum { FORWARD, BACKWARD, REDUCE, NORM, CALLS };

static moe_status make_call(struct rank_case *r, rank_layer *l, int call)
{
    double squared, begin = seconds();
    moe_status status = call == FORWARD    ? layer_forward(r, l, l->tokens)
                        : call == BACKWARD ? layer_backward(r, l)
                        : call == REDUCE   ? moe_layer_reduce_gradients(l->layer, r->stream)
                                           : moe_layer_gradient_norm(l->layer, &squared, r->stream);
    EXPECT(seconds() - begin < SLOW);
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
    pthread_t thread;
    join(r, &c, trial.how, 30);
    if (KINDS[trial.kind].stages) join_stages(r, &c, &s);
    make_layer(r, &l, &c, &KINDS[trial.kind]);
    (void)layer_step(r, &l);
    CUDA(cudaStreamSynchronize(r->stream));
    shorten(c.comm, SHORT);
    meet(r);
    if (r->rank == trial.victim) EXPECT(pthread_create(&thread, NULL, kill_later, NULL) == 0);
    run_loop(r, &l);
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

static const struct named_body BODIES[] = {{.name = "killed", .body = body_killed}, {.name = NULL}};

/* ---- in turn --------------------------------------------------------------------------------- */

static const char TRIAL[] = "MOE_TEST_TRIAL"; /* what a process is told by its parent */

static int run_told(char **argv)
{
    const char *text = getenv(TRIAL);
    if (!text ||
        sscanf(text, "%d %d %d %ld", &trial.kind, &trial.how, &trial.victim, &trial.after) != 4)
        return 126;
    return run_as_rank(argv, BODIES);
}

static uint64_t next_number(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 33;
}

/* MOE_KILLS: how many, MOE_EMULATION_SEED: which. The one that is killed has not ended well. */
START_TEST(test_rank_that_is_killed)
{
    const char *count = getenv("MOE_KILLS"), *seed = getenv("MOE_EMULATION_SEED");
    uint64_t state = (seed ? strtoull(seed, NULL, 10) : 1) * 1000 + (uint64_t)_i;
    int kills = count ? atoi(count) : getenv("MOE_LONG") ? 8 : 1;
    for (int n = 0; n < kills; n++) {
        char text[80], number[24];
        int ranks = 2 + (int)(next_number(&state) % 3), how = (int)(next_number(&state) % 4);
        int victim = (int)(next_number(&state) % (uint64_t)ranks);
        long after = (long)(next_number(&state) % 60000);
        (void)snprintf(text, sizeof text, "%d %d %d %ld", _i, how, victim, after);
        (void)snprintf(number, sizeof number, "%llu", (unsigned long long)(state >> 40));
        setenv(TRIAL, text, 1), setenv("MOE_EMULATION_SEED", number, 1);
        int failures = on_processes(ranks, &BODIES[0]);
        ck_assert_msg(failures == 1, "%s, %d ranks, trial %s, seed %s: %d ended badly",
                      KINDS[_i].name, ranks, text, number, failures);
    }
}
END_TEST

int main(int argc, char **argv)
{
    begin_program();
    if (argc == 7 && strcmp(argv[1], "--rank") == 0) return run_told(argv);
    Suite *suite = suite_create("comm_nccl_kills");
    TCase *tcase = tcase_create("kills");
    tcase_set_timeout(tcase, 1200);
    tcase_add_loop_test(tcase, test_rank_that_is_killed, 0, KIND_COUNT);
    suite_add_tcase(suite, tcase);
    return run_suite(suite, 0);
}
