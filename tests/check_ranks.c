/* check_ranks.c - a layer on several ranks against one rank that has all tokens and experts, with
 * the same token groups: y, dx and every gradient are the same bytes, for every kind of gate,
 * uneven shards and ranks without tokens. And what ends well when a rank disagrees or leaves. */
#include "support/layer_case.h"
#include "support/real.h"
#include "support/ranks_asked.h"
#include "support/ranks_rig.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

START_TEST(test_ranks_are_one_rank_with_the_same_groups)
{
    static const int32_t RANKS[] = {2, 3, 4, 8, 16};
    uint64_t numbers = OVER_NCCL && !getenv("MOE_LONG") ? RANKS_WAYS : 2 * RANKS_WAYS;
    for (uint64_t number = 0; number < numbers; number++) {
        if (ON_DEVICE && !OVER_NCCL) rig_run(_i, number, number % 2 ? 2 : 4, 0);
        for (size_t i = 0; i < COUNT(RANKS); i++)
            if (OVER_NCCL ? ranks_asked(RANKS[i], RANKS[i] == 2) : !ON_DEVICE)
                rig_run(_i, number, RANKS[i], 0);
    }
}
END_TEST

/* Rows go to each node once, and on from there: the same bytes for every way that may. */
START_TEST(test_ranks_by_way_of_nodes_are_one_rank)
{
    static const int32_t GRID[][2] = {{4, 2}, {2, 2}, {4, 4}, {4, 1},
                                      {2, 1}, {8, 2}, {3, 3}, {8, 4}}; /* ranks, nodes */
    uint64_t run = (uint64_t)_i;
    for (uint64_t number = 0; number < 2 * RANKS_WAYS; number++) {
        if (!ranks_way_by_node(ranks_way(_i, number))) continue;
        for (int i = 0; i < (ON_DEVICE ? 1 : 3); i++, run++) {
            const int32_t *grid = GRID[run % (ON_DEVICE ? 5 : COUNT(GRID))];
            if (!OVER_NCCL || ranks_asked(grid[0], grid[0] == 2))
                rig_run(_i, number, grid[0], grid[1]);
        }
    }
}
END_TEST

/* ---- norm ------------------------------------------------------------------------------------ */

START_TEST(test_ranks_norm_is_that_of_all_gradients)
{
    whole w;
    moe_parameter_record r;
    double squared = -1, sum = 0;
    whole_make(&w, MOE_GATE_TOP_K, 4, 2, WAY_SHARDS);
    whole_run(&w);
    MUST(moe_parameter_record_init(&r, sizeof r));
    for (int64_t i = 0; i < moe_layer_parameter_count(w.f.layer); i++) {
        MUST(moe_layer_parameter(w.f.layer, i, &r));
        for (int64_t j = 0; r.grad && j < r.element_count; j++) {
            double g = w.element == 8 ? ((double *)r.grad)[j] : (double)((float *)r.grad)[j];
            sum += g * g;
        }
    }
    MUST(moe_layer_gradient_norm(w.f.layer, &squared, NULL));
    ck_assert(sum > 0 && fabs(squared - sum) <= 1e-12 * sum);
    squared = 7;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_gradient_norm(NULL, &squared, NULL));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_gradient_norm(w.f.layer, NULL, NULL));
    if (!ON_DEVICE) /* which would take it for a stream */
        REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_gradient_norm(w.f.layer, &squared, &squared));
    ck_assert(squared == 7);
    whole_free(&w);
}
END_TEST

/* ---- ranks that fail ------------------------------------------------------------------------- */

/* A small layer of a rank; what goes wrong is the test's. */
typedef struct lone {
    moe_world *world;
    int32_t rank, ranks, trouble;
    moe_status created, forward, again, backward, backward_again;
    float first_weight; /* of its first expert */
    char error[256];
} lone;

enum {
    NOTHING,
    OTHER_TOP_K,
    OTHER_WIDTH,
    TOO_FEW_EXPERTS,
    NO_CALL,
    NO_MEMORY,
    BAD_FORWARD,
    BAD_BACKWARD,
    OTHER_ORDER
};

static int fail_allocations;     /* of rank 1, from now on */
static atomic_int other_gave_up; /* rank 0 is through */

static void *failing_alloc(void *user, uint64_t bytes, uint64_t alignment)
{
    (void)user;
    if (fail_allocations) return NULL;
    return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}
static void failing_free(void *user, void *memory, uint64_t bytes)
{
    (void)user, (void)bytes;
    free(memory);
}

/* What all ranks were told is no end: the same call again, and a backward that one rank gets
 * wrong. */
static void go_on(lone *l, moe_layer *layer, moe_pass *pass, moe_forward_args *f)
{
    moe_backward_args b;
    static const float dy[6 * 3];
    MUST(moe_backward_args_init(&b, sizeof b));
    f->tokens = 6;
    l->again = moe_layer_forward(layer, pass, f);
    b.dy = l->rank == 1 && l->trouble == BAD_BACKWARD ? NULL : dy;
    l->backward = moe_layer_backward(layer, pass, &b);
    if (l->backward != MOE_OK) (void)snprintf(l->error, sizeof l->error, "%s", moe_last_error());
    b.dy = dy;
    l->backward_again = moe_layer_backward(layer, pass, &b);
    f->flags |= MOE_FORWARD_NO_SAVE;
    MUST(moe_layer_forward(layer, pass, f));
    MUST(moe_pass_trim(pass));
    MUST(moe_layer_forward(layer, pass, f));
}

static void *lone_thread(void *argument)
{
    enum { T = 6, D = 3, E = 4 };
    lone *l = argument;
    int odd = l->rank == 1;
    moe_context *context = NULL;
    moe_comm *comm = NULL;
    moe_gate *gate = NULL;
    moe_experts *experts = NULL;
    moe_layer *layer = NULL, *other = NULL;
    moe_pass *pass = NULL, *other_pass = NULL;
    moe_context_config k;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config c;
    moe_forward_args f;
    float x[T * D] = {0}, y[T * D];
    MUST(moe_context_config_init(&k, sizeof k));
    k.threads = 1;
    if (odd) k.alloc = failing_alloc, k.free = failing_free;
    MUST(moe_context_create(&context, &k));
    MUST(moe_comm_create_in_world(&comm, l->world, context, l->rank,
                                  l->trouble == NO_CALL ? 3 : 60));
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_layer_config_init(&c, sizeof c));
    MUST(moe_forward_args_init(&f, sizeof f));
    g.d_model = e.d_model = odd && l->trouble == OTHER_WIDTH ? D + 1 : D;
    e.d_hidden = 2, e.num_experts = odd && l->trouble == TOO_FEW_EXPERTS ? 1 : E / 2;
    g.num_experts = E, g.top_k = odd && l->trouble == OTHER_TOP_K ? 3 : 2;
    MUST(moe_gate_create(&gate, context, &g));
    MUST(moe_experts_create(&experts, context, &e));
    c.gate = gate, c.experts = experts, c.comm = comm;
    l->created = moe_layer_create(&layer, &c);
    if (l->created == MOE_OK) {
        moe_parameter_record w1;
        MUST(moe_parameter_record_init(&w1, sizeof w1));
        MUST(moe_layer_init_parameters(layer, 5));
        MUST(moe_layer_parameter(layer, moe_layer_parameter_find(layer, "experts.w1"), &w1));
        l->first_weight = *(const float *)w1.data;
        MUST(moe_pass_create(&pass, layer, NULL));
        MUST(moe_pass_reserve(pass, T, 1, MOE_FROM_CONFIG));
        f.tokens = T, f.x = x, f.y = y;
        if (odd && l->trouble == NO_MEMORY) fail_allocations = 1;
        if (odd && l->trouble == BAD_FORWARD) f.tokens = -1;
        if (l->trouble == OTHER_ORDER) { /* the same but for its number */
            c.layer_id = 1;
            MUST(moe_layer_create(&other, &c));
            MUST(moe_pass_create(&other_pass, other, NULL));
        }
        if (odd && other)
            l->forward = moe_layer_forward(other, other_pass, &f);
        else if (!odd || l->trouble != NO_CALL)
            l->forward = moe_layer_forward(layer, pass, &f);
        if (odd) fail_allocations = 0;
    }
    (void)snprintf(l->error, sizeof l->error, "%s", moe_last_error());
    if (l->trouble >= NO_MEMORY && l->trouble <= BAD_BACKWARD) go_on(l, layer, pass, &f);
    moe_pass_destroy(pass), moe_layer_destroy(layer), moe_gate_destroy(gate);
    moe_pass_destroy(other_pass), moe_layer_destroy(other), moe_experts_destroy(experts);
    if (l->trouble != NO_CALL || !odd) moe_comm_destroy(comm), comm = NULL;
    if (!odd) atomic_store(&other_gave_up, 1);
    while (comm && !atomic_load(&other_gave_up)) { /* stays, silent */
        struct timespec pause = {0, 1000000};
        (void)nanosleep(&pause, NULL);
    }
    moe_comm_destroy(comm);
    moe_context_destroy(context);
    return NULL;
}

static void run_lone(lone l[2], int32_t trouble)
{
    moe_context *context = new_context();
    moe_world *world = NULL;
    pthread_t thread[2];
    MUST(moe_world_create(&world, context, 2));
    atomic_store(&other_gave_up, 0);
    for (int32_t r = 0; r < 2; r++) {
        l[r] = (lone){.world = world, .rank = r, .ranks = 2, .trouble = trouble};
        ck_assert_int_eq(pthread_create(&thread[r], NULL, lone_thread, &l[r]), 0);
    }
    for (int32_t r = 0; r < 2; r++) ck_assert_int_eq(pthread_join(thread[r], NULL), 0);
    moe_world_destroy(world), moe_context_destroy(context);
}

/* The first value of an expert where one rank has all four. */
static float first_weight_on_one_rank(int64_t expert)
{
    moe_context *context = new_context();
    moe_experts *experts = NULL;
    moe_experts_config e;
    moe_parameter_record w1;
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_parameter_record_init(&w1, sizeof w1));
    e.d_model = 3, e.d_hidden = 2, e.num_experts = 4;
    MUST(moe_experts_create(&experts, context, &e));
    MUST(moe_experts_init_parameters(experts, 5));
    MUST(moe_experts_parameter(experts, moe_experts_parameter_find(experts, "w1"), &w1));
    float value = ((const float *)w1.data)[expert * 6];
    moe_experts_destroy(experts), moe_context_destroy(context);
    return value;
}

START_TEST(test_ranks_that_differ_are_found_at_creation)
{
    static const char *const SAYS[] = {"", "top_k is 3 on rank 1 and 2 on rank 0",
                                       "d_model is 4 on rank 1 and 3 on rank 0",
                                       "the gate has 4 experts, the pools of all ranks have 3"};
    lone l[2];
    run_lone(l, NOTHING);
    for (int r = 0; r < 2; r++) ck_assert(l[r].created == MOE_OK && l[r].forward == MOE_OK);
    for (int r = 0; r < 2; r++) ck_assert(l[r].first_weight == first_weight_on_one_rank(2 * r));
    for (int32_t trouble = OTHER_TOP_K; trouble <= TOO_FEW_EXPERTS; trouble++) {
        run_lone(l, trouble);
        for (int r = 0; r < 2; r++) {
            ck_assert_int_eq(l[r].created, MOE_ERROR_INVALID_ARGUMENT);
            ck_assert_msg(strstr(l[r].error, SAYS[trouble]) != NULL, "%s", l[r].error);
        }
    }
}
END_TEST

START_TEST(test_ranks_end_when_one_fails)
{
    lone l[2];
    run_lone(l, NO_CALL);
    ck_assert_int_eq(l[0].forward, MOE_ERROR_TIMEOUT);
    ck_assert_msg(strstr(l[0].error, "missing ranks: 1") != NULL, "%s", l[0].error);
    run_lone(l, NO_MEMORY);
    for (int r = 0; r < 2; r++) ck_assert_int_eq(l[r].forward, MOE_ERROR_OUT_OF_MEMORY);
    ck_assert_msg(strstr(l[0].error, "rank 1 failed: ") != NULL, "%s", l[0].error);
    for (int r = 0; r < 2; r++) ck_assert(l[r].again == MOE_OK && l[r].backward_again == MOE_OK);
    run_lone(l, OTHER_ORDER);
    for (int r = 0; r < 2; r++) ck_assert_int_eq(l[r].forward, MOE_ERROR_TRANSPORT);
    ck_assert_msg(strstr(l[0].error, "rank 1 is in a forward of layer 1, rank 0 in a forward of "
                                     "layer 0") ||
                      strstr(l[0].error, "rank 1 gave up"),
                  "%s", l[0].error);
    ck_assert_msg(strstr(l[0].error, "of layer") || strstr(l[1].error, "of layer"), "%s",
                  l[1].error);
}
END_TEST

START_TEST(test_ranks_all_hear_of_a_wrong_argument)
{
    lone l[2];
    run_lone(l, BAD_FORWARD);
    for (int r = 0; r < 2; r++) ck_assert_int_eq(l[r].forward, MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_msg(strstr(l[0].error, "rank 1 failed: ") != NULL, "%s", l[0].error);
    ck_assert_msg(strstr(l[1].error, "tokens is -1") != NULL, "%s", l[1].error);
    for (int r = 0; r < 2; r++) ck_assert(l[r].again == MOE_OK && l[r].backward == MOE_OK);
    run_lone(l, BAD_BACKWARD);
    for (int r = 0; r < 2; r++) ck_assert(l[r].forward == MOE_OK && l[r].again == MOE_OK);
    for (int r = 0; r < 2; r++) ck_assert_int_eq(l[r].backward, MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_msg(strstr(l[0].error, "rank 1 failed: ") != NULL, "%s", l[0].error);
    ck_assert_msg(strstr(l[1].error, "dy is NULL") != NULL, "%s", l[1].error);
    for (int r = 0; r < 2; r++) ck_assert_int_eq(l[r].backward_again, MOE_OK);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ranks");
    TCase *c = tcase_create("ranks");
    tcase_set_timeout(c, 300);
    tcase_add_loop_test(c, test_ranks_are_one_rank_with_the_same_groups, 0, RANKS_KINDS);
    tcase_add_loop_test(c, test_ranks_by_way_of_nodes_are_one_rank, 0, RANKS_KINDS);
    if (!OVER_NCCL) { /* ranks of a world */
        tcase_add_test(c, test_ranks_norm_is_that_of_all_gradients);
        tcase_add_test(c, test_ranks_that_differ_are_found_at_creation);
        tcase_add_test(c, test_ranks_end_when_one_fails);
        tcase_add_test(c, test_ranks_all_hear_of_a_wrong_argument);
    }
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
