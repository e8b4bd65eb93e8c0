/* check_mpi.c - a group over MPI; run by check_mpi.sh under mpirun.
 *
 *     check_mpi equal NUMBERS    layers of every kind are the bytes of one rank
 *     check_mpi refuse           what is refused, and ranks that disagree
 *     check_mpi TROUBLE          rank 1 is killed "before", "in" or "after" a forward, or is
 *     "silent": the
 *                                others' calls end and name it
 *
 * Each rank ends with 0 if all is well; a survivor of a trouble says so in one line. */
#include <mpi.h>

#include "support/layer_case.h"
#include "support/ranks.h"

#include <check.h>
#include <moe/mpi.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int rank, size;

/* Not ck_assert: a rank that fails ends all of them. */
static void must(int good, const char *what)
{
    if (good) return;
    (void)fprintf(stderr, "rank %d: %s: %s\n", rank, what, moe_last_error());
    (void)MPI_Abort(MPI_COMM_WORLD, 1);
    _exit(1);
}
#define GOOD(call) must((call) == MOE_OK, #call)

static moe_comm *join_some(moe_context *context, MPI_Comm ranks, double timeout)
{
    moe_comm *comm = NULL;
    moe_mpi_options o;
    GOOD(moe_mpi_options_init(&o, sizeof o));
    o.timeout = timeout;
    GOOD(moe_comm_create_mpi(&comm, context, ranks, &o));
    return comm;
}

static moe_comm *join(moe_context *context, double timeout)
{
    moe_comm *comm = join_some(context, MPI_COMM_WORLD, timeout);
    must(moe_comm_rank(comm) == rank && moe_comm_size(comm) == size, "rank and size");
    return comm;
}

/* ---- equal ----------------------------------------------------------------------------------- */

/* The ranks of one color, by key. */
static moe_comm *join_split(part *p, int color, int key)
{
    MPI_Comm some;
    must(MPI_Comm_split(MPI_COMM_WORLD, color, key, &some) == MPI_SUCCESS, "MPI_Comm_split");
    moe_comm *comm = join_some(p->context, some, 60);
    must(MPI_Comm_free(&some) == MPI_SUCCESS, "MPI_Comm_free");
    return comm;
}

static moe_comm *connect_mpi(part *p)
{
    if (p->nodes > 0) {
        p->node_comm = join_split(p, p->node, p->in_node);
        p->rail_comm = join_split(p, p->in_node, p->node);
    }
    return join(p->context, 60);
}

static int64_t numbers;

/* nodes 0: rows go straight */
static void run_layer(int32_t kind, uint64_t number, int32_t nodes)
{
    whole w;
    part parts[RANKS_MOST];
    part *own = &parts[rank];
    whole_make(&w, kind, number, size, ranks_way(kind, number));
    parts_share(parts, &w, number, size);
    if (nodes > 0) parts_by_node(parts, size, nodes, number);
    own->connect = connect_mpi;
    part_run(own);
    whole_run(&w);
    part_compare(own);
    part_free(own);
    whole_free(&w);
}

START_TEST(test_mpi_ranks_are_one_rank_with_the_same_groups)
{
    int64_t run = 0;
    for (int32_t kind = 0; kind < RANKS_KINDS; kind++)
        for (uint64_t number = 0; number < (uint64_t)numbers; number++) {
            run_layer(kind, number, 0);
            run++;
            if (!ranks_way_by_node(ranks_way(kind, number))) continue;
            run_layer(kind, number, size % 2 ? size : number % 3 == 0 ? size : 2);
        }
    ck_assert_int_gt(run, 0);
}
END_TEST

static int run_equal(void)
{
    Suite *suite = suite_create("mpi");
    TCase *c = tcase_create("ranks");
    tcase_add_test(c, test_mpi_ranks_are_one_rank_with_the_same_groups);
    suite_add_tcase(suite, c);
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, rank == 0 ? CK_NORMAL : CK_SILENT);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    if (failed) (void)MPI_Abort(MPI_COMM_WORLD, 1);
    return failed;
}

/* ---- a small layer --------------------------------------------------------------------------- */

enum { T = 6, D = 3 };

typedef struct small {
    moe_context *context;
    moe_comm *comm;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    float x[T * D], y[T * D], dx[T * D];
} small;

static int die_in_expert;

/* out = x, dx = dout; or the end. */
static int32_t same_forward(void *user, const moe_expert_call *call)
{
    (void)user;
    if (die_in_expert) (void)raise(SIGKILL);
    memcpy(call->out, call->x, (size_t)call->rows * D * sizeof(float));
    return 0;
}
static int32_t same_backward(void *user, const moe_expert_call *call)
{
    (void)user;
    if (call->dx) memcpy(call->dx, call->dout, (size_t)call->rows * D * sizeof(float));
    return 0;
}

static moe_status make_small(small *s, double timeout, int64_t top_k)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    moe_expert_callbacks c;
    memset(s, 0, sizeof *s);
    for (int i = 0; i < T * D; i++) s->x[i] = (float)(i % 7) - 3;
    GOOD(moe_gate_config_init(&g, sizeof g));
    GOOD(moe_experts_config_init(&e, sizeof e));
    GOOD(moe_layer_config_init(&l, sizeof l));
    GOOD(moe_expert_callbacks_init(&c, sizeof c));
    GOOD(moe_context_create(&s->context, NULL));
    s->comm = join(s->context, timeout);
    g.d_model = e.d_model = D, e.num_experts = 1, g.num_experts = size, g.top_k = top_k;
    c.forward = same_forward, c.backward = same_backward;
    e.kind = MOE_EXPERTS_CALLBACK, e.callbacks = &c;
    GOOD(moe_gate_create(&s->gate, s->context, &g));
    GOOD(moe_experts_create(&s->experts, s->context, &e));
    l.gate = s->gate, l.experts = s->experts, l.comm = s->comm;
    moe_status status = moe_layer_create(&s->layer, &l);
    if (status != MOE_OK) return status;
    GOOD(moe_layer_init_parameters(s->layer, 1));
    GOOD(moe_pass_create(&s->pass, s->layer, NULL));
    return MOE_OK;
}

static void free_small(small *s)
{
    moe_pass_destroy(s->pass), moe_layer_destroy(s->layer), moe_gate_destroy(s->gate);
    moe_experts_destroy(s->experts), moe_comm_destroy(s->comm), moe_context_destroy(s->context);
}

static moe_status step(small *s, int backward)
{
    moe_forward_args f;
    moe_backward_args b;
    GOOD(moe_forward_args_init(&f, sizeof f));
    GOOD(moe_backward_args_init(&b, sizeof b));
    f.tokens = T, f.x = s->x, f.y = s->y, b.dy = s->x, b.dx = s->dx;
    return backward ? moe_layer_backward(s->layer, s->pass, &b)
                    : moe_layer_forward(s->layer, s->pass, &f);
}

/* ---- troubles -------------------------------------------------------------------------------- */

/* Rank 1 is in trouble in the third step; every other rank's calls end with an error that names a
 * rank, and everything can be freed. */
static int run_trouble(const char *trouble)
{
    small s;
    moe_status status = MOE_OK;
    char text[300];
    GOOD(make_small(&s, 3, 2));
    for (int i = 0; i < 5 && status == MOE_OK; i++) {
        int now = rank == 1 && i == 2;
        if (now && strcmp(trouble, "before") == 0) (void)raise(SIGKILL);
        if (now && strcmp(trouble, "in") == 0) die_in_expert = 1;
        if (now && strcmp(trouble, "silent") == 0) {
            (void)sleep(7);
            _exit(0);
        }
        status = step(&s, 0);
        if (now && strcmp(trouble, "after") == 0) (void)raise(SIGKILL);
        if (status == MOE_OK) status = step(&s, 1);
    }
    (void)snprintf(text, sizeof text, "%s", moe_last_error());
    must(status == MOE_ERROR_TIMEOUT || status == MOE_ERROR_TRANSPORT, "ends with an error");
    must(strstr(text, "rank 1") || strstr(text, "ranks: 1"), text);
    must(moe_comm_barrier(s.comm) == MOE_ERROR_TRANSPORT, "has failed for good");
    long long pending = (long long)moe_comm_pending_bytes(s.comm);
    free_small(&s);
    (void)printf("survivor %d: %lld bytes pending: %s\n", rank, pending, text);
    (void)fflush(stdout);
    _exit(0); /* MPI_Finalize would wait for the dead */
}

/* ---- refused --------------------------------------------------------------------------------- */

/* Ranks that expect different numbers of rows. */
static void disagree_about_rows(void)
{
    moe_context *context = NULL;
    int64_t recv_begin[RANKS_MOST + 1] = {0}, send_begin[RANKS_MOST + 1] = {0}, data[64] = {0},
                                    here[64] = {0};
    moe_exchange e;
    GOOD(moe_context_create(&context, NULL));
    moe_comm *comm = join(context, 10);
    for (int p = 0; p < size; p++) {
        send_begin[p + 1] = send_begin[p] + 2;
        recv_begin[p + 1] = recv_begin[p] + (rank == 0 && p == 1 ? 3 : 2);
    }
    GOOD(moe_exchange_init(&e, sizeof e));
    e.recv = here, e.send = data, e.row_bytes = 8;
    e.recv_begin = recv_begin, e.send_begin = send_begin;
    moe_status status = moe_comm_exchange(comm, &e);
    if (rank == 0) {
        must(status == MOE_ERROR_TRANSPORT, "another number of rows");
        must(strstr(moe_last_error(), "rank 1 sends 2 rows of 8 bytes") != NULL, "its message");
        must(strstr(moe_last_error(), "here 3 of 8 are expected") != NULL, "its message");
    }
    moe_comm_destroy(comm), moe_context_destroy(context);
}

static int run_refuse(void)
{
    moe_context *context = NULL;
    moe_comm *comm = NULL;
    moe_mpi_options o;
    small s;
    GOOD(moe_context_create(&context, NULL));
    GOOD(moe_mpi_options_init(&o, sizeof o));
    must(moe_comm_create_mpi(&comm, context, MPI_COMM_NULL, NULL) == MOE_ERROR_INVALID_ARGUMENT,
         "MPI_COMM_NULL");
    must(moe_comm_create_mpi(NULL, context, MPI_COMM_WORLD, NULL) == MOE_ERROR_INVALID_ARGUMENT,
         "comm NULL");
    must(moe_comm_create_mpi(&comm, NULL, MPI_COMM_WORLD, NULL) == MOE_ERROR_INVALID_ARGUMENT,
         "context NULL");
    o.timeout = 0;
    must(moe_comm_create_mpi(&comm, context, MPI_COMM_WORLD, &o) == MOE_ERROR_INVALID_ARGUMENT,
         "timeout 0");
    o.timeout = 60, o.struct_size = 3;
    must(moe_comm_create_mpi(&comm, context, MPI_COMM_WORLD, &o) == MOE_ERROR_STRUCT_SIZE,
         "struct_size");
    GOOD(moe_comm_create_mpi_f(&comm, context, (int32_t)MPI_Comm_c2f(MPI_COMM_WORLD), NULL));
    GOOD(moe_comm_barrier(comm));
    moe_comm_destroy(comm), moe_context_destroy(context);

    moe_status status = make_small(&s, 60, rank == 1 ? 1 : 2);
    must(status == MOE_ERROR_INVALID_ARGUMENT, "another top_k");
    must(strstr(moe_last_error(), "top_k is 1 on rank 1 and 2 on rank 0") != NULL, "its message");
    free_small(&s);
    (void)MPI_Barrier(MPI_COMM_WORLD);
    disagree_about_rows();
    (void)MPI_Barrier(MPI_COMM_WORLD);
    GOOD(make_small(&s, 60, 2)); /* after all that */
    GOOD(step(&s, 0));
    GOOD(step(&s, 1));
    free_small(&s);
    if (rank == 0) (void)printf("100%%: refuse on %d ranks\n", size);
    return 0;
}

/* MPICH's launcher sends SIGUSR1 to the others when one dies. */
static void told_of_a_death(int number) { (void)number; }

int main(int argc, char **argv)
{
    int level, failed = 0;
    moe_context *early = NULL;
    moe_comm *none = NULL;
    must(argc >= 2, "a word");
    GOOD(moe_context_create(&early, NULL));
    if (moe_comm_create_mpi_f(&none, early, 0, NULL) != MOE_ERROR_INVALID_STATE) return 1;
    moe_context_destroy(early);
    (void)MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &level);
    (void)signal(SIGUSR1, told_of_a_death);
    (void)MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    (void)MPI_Comm_size(MPI_COMM_WORLD, &size);
    numbers = argc > 2 ? atoll(argv[2]) : 1;
    if (strcmp(argv[1], "equal") == 0)
        failed = run_equal();
    else if (strcmp(argv[1], "refuse") == 0)
        failed = run_refuse();
    else
        failed = run_trouble(argv[1]);
    (void)MPI_Finalize();
    return failed;
}
