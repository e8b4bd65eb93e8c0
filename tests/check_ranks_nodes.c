/* check_ranks_nodes.c - layers whose rows go by way of nodes: what is refused, on every rank alike;
 * that a token's row goes to a node once; passes in flight; and a rank that leaves. That results
 * are the same bytes is in check_ranks.c. */
#include "support/crew.h"
#include "support/layer_case.h"
#include "support/real.h"
#include "support/suite.h"

#include <check.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

enum { T = 6, E = 4, K = 2, D = CREW_D, RANKS = 4, NODES = 2, MOST = 6 };

typedef struct step {
    scalar x[T * D], y[T * D], dy[T * D], dx[T * D];
} step;

static void make_step(member *m, step *s)
{
    for (int i = 0; i < T * D; i++) s->x[i] = (scalar)((i * 7 + m->rank * 5) % 11 - 5);
    for (int i = 0; i < T * D; i++) s->dy[i] = (scalar)((i * 5 + m->rank * 3) % 7 - 3);
    m->f.tokens = T, m->f.x = s->x, m->f.y = s->y, m->b.dy = s->dy, m->b.dx = s->dx;
}

/* On four ranks, or three nodes of two. */
static void run(int32_t nodes, void (*call)(member *), void (*configure)(member *), void *test,
                member *m, step *s)
{
    crew c = {.ranks = nodes == 3 ? MOST : RANKS,
              .run = call,
              .configure = configure,
              .test = test,
              .nodes = nodes};
    memset(m, 0, (size_t)c.ranks * sizeof *m);
    for (int32_t r = 0; r < c.ranks; r++) m[r].own = s ? &s[r] : NULL;
    crew_run(&c, m);
}

/* ---- what is refused ------------------------------------------------------------------------- */

/* What all ranks do wrong, or rank 1, or ranks 3 and 4. */
enum {
    NO_RAIL,
    NO_NODE,
    NO_COMM,
    PADDED,
    ROUNDS,
    CHUNKS,
    OTHER_CONTEXT,
    ONE_RANK_ALONE,
    TOO_LARGE,
    IN_TURN,
    STRANGERS,
    MISTAKES
};

/* What the last rank says. */
static const char *const SAYS[MISTAKES] = {"node_comm is given, rail_comm is NULL",
                                           "rail_comm is given, node_comm is NULL",
                                           "node_comm is given, comm is NULL",
                                           "node_comm clashes with exchange 1",
                                           "node_comm clashes with received 3",
                                           "node_comm clashes with exchange_chunks 2",
                                           "node_comm and comm are of different contexts",
                                           "the size of node_comm is 2 on rank 1 and 0 on rank 0",
                                           "node_comm has 2 ranks and rail_comm 6, comm has 6",
                                           "node_comm is 3 on rank 1 and 2 on rank 0",
                                           "rank 0 failed: "};

typedef struct mistake {
    int what;
    moe_world *node[2];
} mistake;

static void make_mistake(member *m)
{
    const mistake *test = m->crew->test;
    moe_layer_config *l = &m->l;
    moe_comm *node = l->node_comm;
    switch (test->what) {
    case NO_RAIL: l->rail_comm = NULL; break;
    case NO_NODE: l->node_comm = NULL; break;
    case NO_COMM: l->comm = NULL; break;
    case PADDED: l->exchange = MOE_EXCHANGE_PADDED, l->padded_rows = T; break;
    case ROUNDS: l->received = MOE_RECEIVED_CHUNK, l->max_received = 3; break;
    case CHUNKS: l->exchange_chunks = 2; break;
    case ONE_RANK_ALONE:
        if (m->rank != 1) l->node_comm = l->rail_comm = NULL;
        break;
    case TOO_LARGE: l->rail_comm = m->comm; break;
    case IN_TURN:
        if (m->rank == 1) l->node_comm = l->rail_comm, l->rail_comm = node;
        break;
    default: break;
    }
}

/* Ranks 3 and 4 are each in the other's node; or node_comm is of another context. */
static void run_mistake(member *m)
{
    const mistake *test = m->crew->test;
    moe_context *other = NULL;
    if (test->what == OTHER_CONTEXT) {
        MUST(moe_context_create(&other, &m->context_config));
        moe_comm_destroy(m->node_comm), m->node_comm = NULL;
        MUST(moe_comm_create_self(&m->node_comm, other));
    }
    if (test->what == STRANGERS && m->rank % 3 != 2) {
        int32_t node = m->rank % 3, number = m->rank / 3;
        moe_comm_destroy(m->node_comm), m->node_comm = NULL;
        MUST(moe_comm_create_in_world(&m->node_comm, test->node[number ? 1 - node : node],
                                      m->context, number, 5));
    }
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, member_make(m, E));
    moe_context_destroy(other);
}

START_TEST(test_nodes_that_are_no_grid_are_refused_on_every_rank)
{
    member m[MOST];
    mistake test = {.what = _i};
    moe_context *context = NULL;
    MUST(moe_context_create(&context, NULL));
    for (int i = 0; i < 2; i++) MUST(moe_world_create(&test.node[i], context, 2));
    run(3, run_mistake, make_mistake, &test, m, NULL);
    ck_assert_msg(strstr(m[MOST - 1].error, SAYS[_i]) != NULL, "%s", m[MOST - 1].error);
    if (_i == STRANGERS)
        ck_assert_msg(strstr(m[4].error, "rank 0 of rank 4's node_comm is rank 0 of comm, not "
                                         "rank 1") != NULL,
                      "%s", m[4].error);
    for (int i = 0; i < 2; i++) moe_world_destroy(test.node[i]);
    moe_context_destroy(context);
}
END_TEST

/* A rank and its number are of one size: both are rank 1 of node_comm and 0 of rail_comm. */
static void swap_parts(member *m)
{
    moe_comm *node = m->l.node_comm;
    if (m->rank == 1) m->l.node_comm = m->l.rail_comm, m->l.rail_comm = node;
}

static void run_swapped(member *m)
{
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, member_make(m, E));
    ck_assert_msg(strstr(m->error, "ranks 1 and 2 are both rank 1 of node_comm and 0 of rail_comm"),
                  "%s", m->error);
}

START_TEST(test_two_ranks_in_one_place)
{
    member m[RANKS];
    run(NODES, run_swapped, swap_parts, NULL, m, NULL);
}
END_TEST

/* ---- a row of a token ------------------------------------------------------------------------ */

static moe_pass_report report_of(const member *m)
{
    moe_pass_report report;
    MUST(moe_pass_report_init(&report, sizeof report));
    MUST(moe_pass_get_report(m->pass, &report));
    return report;
}

/* Every token goes to both experts of node 1, on ranks 1 and 3. Before, the pass had other
 * sizes. */
static void run_plan(member *m)
{
    static const int32_t IDS[T * K] = {1, 3, 3, 1, 1, 3, 1, 3, 3, 1, 1, 3};
    scalar weights[T * K];
    moe_plan *plan = NULL;
    moe_plan_args a;
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    make_step(m, s);
    MUST(moe_plan_args_init(&a, sizeof a));
    for (int i = 0; i < T * K; i++) weights[i] = (scalar)(1 + i) / 8;
    a.tokens = T, a.num_experts = E, a.top_k = K, a.expert_ids = IDS, a.weights = weights;
    a.dtype = REAL;
    MUST(moe_plan_create(&plan, m->context));
    MUST(moe_plan_build(plan, &a));
    m->f.tokens = 1;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    m->f.tokens = T, m->f.plan = plan, m->f.plan_use = MOE_PLAN_IDS_AND_WEIGHTS;
    m->f.flags = MOE_FORWARD_NO_SAVE;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_pass_trim(m->pass));
    m->f.flags = 0;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    moe_plan_destroy(plan);
    if (m->crew->test) *((moe_pass_report *)m->crew->test + m->rank) = report_of(m);
}

START_TEST(test_a_row_of_a_token_goes_to_a_node_once)
{
    member m[RANKS];
    step straight[RANKS], by_node[RANKS];
    moe_pass_report a[RANKS], b[RANKS];
    int64_t each = (D * (int64_t)sizeof(scalar) + 15) / 16 * 16, word = 8;
    run(0, run_plan, NULL, a, m, straight);
    run(NODES, run_plan, NULL, b, m, by_node);
    ck_assert(straight[0].y[0] != 0 && straight[0].dx[0] != 0);
    for (int r = 0; r < RANKS; r++) {
        bool away = r % NODES == 0; /* from node 1, which has both experts */
        ck_assert_int_eq(memcmp(&straight[r], &by_node[r], sizeof straight[r]), 0);
        ck_assert_int_eq(a[r].rows_to_nodes + a[r].forward_bytes_to_nodes, 0);
        ck_assert_int_eq(a[r].rows_sent, away ? K * T : T);
        ck_assert_int_eq(b[r].rows_sent, a[r].rows_sent);
        ck_assert_int_eq(b[r].rows_to_nodes, away ? T : 0);
        ck_assert_int_eq(b[r].forward_bytes_to_nodes, away ? T * each + T * K * 16 : 0);
        ck_assert_int_eq(b[r].backward_bytes_to_nodes, away ? T * each : 0);
    }
    /* Rows of x with their weights over comm before; now over the node, and words of the rail. */
    int64_t row = a[0].forward_bytes_sent - b[0].forward_bytes_sent + b[0].forward_bytes_to_nodes;
    ck_assert_int_gt(row + 3 * word, K * T * D * (int64_t)sizeof(scalar));
}
END_TEST

/* With one rank on each node comm itself may be the rail. */
static void use_comm_twice(member *m) { m->l.rail_comm = m->comm; }

START_TEST(test_comm_itself_may_be_the_rail)
{
    member m[RANKS];
    step straight[RANKS], by_node[RANKS];
    moe_pass_report a[RANKS], b[RANKS];
    run(0, run_plan, NULL, a, m, straight);
    run(RANKS, run_plan, use_comm_twice, b, m, by_node);
    for (int r = 0; r < RANKS; r++) {
        ck_assert_int_eq(memcmp(&straight[r], &by_node[r], sizeof straight[r]), 0);
        ck_assert_int_eq(b[r].rows_to_nodes, a[r].rows_sent); /* an expert on each of two nodes */
        ck_assert_int_gt(b[r].forward_bytes_to_nodes, 0);
        ck_assert_int_lt(b[r].forward_bytes_to_nodes, b[r].forward_bytes_sent);
    }
}
END_TEST

/* ---- replicas -------------------------------------------------------------------------------- */

/* Each expert is on two ranks of other nodes, so that what a rank sends to is on some node only. */
static void place_replicas(member *m)
{
    static const int64_t NUMBERS[RANKS][2] = {{0, 1}, {1, 2}, {2, 3}, {3, 0}};
    m->e.num_experts = 2, m->l.placement = NUMBERS[m->rank];
}

static void run_replicas(member *m)
{
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    make_step(m, s);
    m->f.flags = MOE_FORWARD_NO_SAVE;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
}

START_TEST(test_replicas_by_way_of_nodes)
{
    member m[RANKS];
    step straight[RANKS], by_node[RANKS];
    memset(straight, 0, sizeof straight), memset(by_node, 0, sizeof by_node);
    run(0, run_replicas, place_replicas, NULL, m, straight);
    for (int32_t nodes = 1; nodes <= RANKS; nodes *= 2) {
        run(nodes, run_replicas, place_replicas, NULL, m, by_node);
        for (int r = 0; r < RANKS; r++)
            ck_assert_int_eq(memcmp(straight[r].y, by_node[r].y, sizeof by_node[r].y), 0);
    }
    ck_assert(straight[0].y[0] != 0);
}
END_TEST

/* ---- passes in flight ------------------------------------------------------------------------ */

static void run_too_many(member *m)
{
    moe_pass *pass[MOE_COMM_REQUESTS + 1];
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    make_step(m, s);
    for (int i = 0; i <= MOE_COMM_REQUESTS; i++) MUST(moe_pass_create(&pass[i], m->layer, NULL));
    moe_pass *last = pass[MOE_COMM_REQUESTS];
    for (int i = 0; i < MOE_COMM_REQUESTS; i++) {
        MUST(moe_layer_forward_start(m->layer, pass[i], &m->f));
        if (i % 2) MUST(moe_layer_forward_work(m->layer, pass[i])); /* results under way */
    }
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_forward_start(m->layer, last, &m->f));
    for (int i = 0; i < MOE_COMM_REQUESTS; i++) MUST(moe_layer_forward_finish(m->layer, pass[i]));
    MUST(moe_layer_forward(m->layer, last, &m->f));
    for (int i = 0; i <= MOE_COMM_REQUESTS; i++) moe_pass_destroy(pass[i]);
}

START_TEST(test_a_pass_too_many_is_refused_on_every_rank)
{
    member m[RANKS];
    step s[RANKS];
    run(NODES, run_too_many, NULL, NULL, m, s);
}
END_TEST

static atomic_int started;

/* Rank 1 goes in the middle of a forward: rank 2 is neither of its node nor of its rail. */
static void run_leaver(member *m)
{
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    make_step(m, s);
    MUST(moe_layer_forward_start(m->layer, m->pass, &m->f));
    atomic_fetch_add(&started, 1);
    if (m->rank == 1) {
        while (atomic_load(&started) < RANKS) (void)sched_yield();
        moe_pass_destroy(m->pass), m->pass = NULL;
        return;
    }
    (void)member_note(m, moe_layer_forward_finish(m->layer, m->pass));
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(m->comm));
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(m->node_comm));
    REFUSED(MOE_ERROR_TRANSPORT, moe_comm_barrier(m->rail_comm));
}

START_TEST(test_a_rank_that_leaves_ends_all_three)
{
    member m[RANKS];
    step s[RANKS];
    atomic_store(&started, 0);
    run(NODES, run_leaver, NULL, NULL, m, s);
    for (int r = 0; r < RANKS; r++)
        if (r != 1) ck_assert_int_eq(m[r].status, MOE_ERROR_TRANSPORT);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ranks, by way of nodes");
    TCase *c = tcase_create("nodes");
    tcase_set_timeout(c, 120);
    tcase_add_loop_test(c, test_nodes_that_are_no_grid_are_refused_on_every_rank, 0, MISTAKES);
    tcase_add_test(c, test_two_ranks_in_one_place);
    tcase_add_test(c, test_a_row_of_a_token_goes_to_a_node_once);
    tcase_add_test(c, test_comm_itself_may_be_the_rail);
    tcase_add_test(c, test_replicas_by_way_of_nodes);
    tcase_add_test(c, test_a_pass_too_many_is_refused_on_every_rank);
    tcase_add_test(c, test_a_rank_that_leaves_ends_all_three);
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
