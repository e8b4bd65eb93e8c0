/* check_ranks.c - a layer on several ranks against one rank that has all tokens and experts, with the
 * same token groups: y, dx and every gradient are the same bytes, for every kind of gate, uneven shards and ranks without tokens. And what ends well when a rank
 * disagrees or leaves. */
#include "support/family.h"
#include "support/layer_case.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { KINDS = MOE_GATE_SINKHORN + 1, MOST = 4, TOKENS = 19 };

/* Tokens of each rank; experts are shared out unevenly too. */
static const int64_t TOKENS_OF[MOST + 1][MOST] = {
    {0}, {TOKENS}, {12, 7}, {0, 13, 6}, {5, 0, 11, 3}};

typedef struct whole {
    family f;
    family_batch b;
    moe_context *context;
    moe_pass *pass;
    int64_t D, O, element;
} whole;

/* One rank with everything, run once. Losses are of a rank's own tokens, so they are off. */
static void run_whole(whole *w, int32_t kind, uint64_t number, int32_t ranks)
{
    memset(w, 0, sizeof *w);
    w->context = new_context();
    family_draw(&w->f, kind, number, number % 2 ? MOE_DTYPE_F32 : MOE_DTYPE_F64);
    moe_gate_config *g = &w->f.g;
    g->importance_weight = g->load_weight = g->switch_weight = g->gshard_weight = 0;
    g->z_weight = g->sequence_weight = g->threshold_weight = 0;
    w->f.T = TOKENS, w->f.G = ranks;
    family_make(&w->f, w->context);
    family_batch_make(&w->b, &w->f);
    for (int32_t r = 0; r < ranks; r++)
        w->b.group_begin[r + 1] = w->b.group_begin[r] + TOKENS_OF[ranks][r];
    w->D = w->f.e.d_model, w->O = w->b.y_bytes / TOKENS;
    w->element = w->f.g.dtype == MOE_DTYPE_F64 ? 8 : 4;
    w->O /= w->element;
}

static void finish_whole(whole *w)
{
    MUST(moe_pass_create(&w->pass, w->f.layer, NULL));
    MUST(moe_layer_forward(w->f.layer, w->pass, &w->b.fwd));
    MUST(moe_layer_backward(w->f.layer, w->pass, &w->b.bwd));
}

static void free_whole(whole *w)
{
    moe_pass_destroy(w->pass), family_batch_free(&w->b), family_free(&w->f);
    moe_context_destroy(w->context);
}

/* ---- a rank ----------------------------------------------------------------------------------- */

typedef struct part {
    const whole *w;
    moe_world *world;
    int32_t rank, ranks;
    int64_t first_token, tokens, first_expert, experts;
    moe_context *context;
    moe_comm *comm;
    family f; /* its objects */
    void *y, *dx;
} part;

/* The parameters of the whole layer, of experts those of this rank. */
static void copy_parameters(part *p)
{
    moe_parameter_record to, from;
    MUST(moe_parameter_record_init(&to, sizeof to));
    MUST(moe_parameter_record_init(&from, sizeof from));
    for (int64_t i = 0; i < moe_layer_parameter_count(p->f.layer); i++) {
        MUST(moe_layer_parameter(p->f.layer, i, &to));
        MUST(moe_layer_parameter(p->w->f.layer, i, &from));
        int64_t each = strncmp(to.name, "experts.", 8) == 0 ? to.element_count / p->experts : 0;
        memcpy(to.data, (const char *)from.data + p->first_expert * each * p->w->element,
               (size_t)(to.element_count * p->w->element));
    }
}

static void make_part(part *p)
{
    moe_context_config c;
    family *f = &p->f;
    *f = p->w->f;
    f->gate = NULL, f->experts = f->shared_experts = f->residual_experts = NULL, f->layer = NULL;
    MUST(moe_context_config_init(&c, sizeof c));
    c.threads = 1 + p->rank % 2;
    MUST(moe_context_create(&p->context, &c));
    MUST(moe_comm_create_in_world(&p->comm, p->world, p->context, p->rank, 30));
    MUST(moe_gate_create(&f->gate, p->context, &f->g));
    f->e.num_experts = p->experts;
    MUST(moe_experts_create(&f->experts, p->context, &f->e));
    if (f->has_shared) MUST(moe_experts_create(&f->shared_experts, p->context, &f->shared));
    if (f->has_residual) MUST(moe_experts_create(&f->residual_experts, p->context, &f->residual));
    f->l.gate = f->gate, f->l.experts = f->experts, f->l.comm = p->comm;
    f->l.shared = f->shared_experts, f->l.residual = f->residual_experts;
    MUST(moe_layer_create(&f->layer, &f->l));
    copy_parameters(p);
}

/* Its tokens through its layer. */
static void run_part(part *p)
{
    const family_batch *b = &p->w->b;
    moe_pass *pass = NULL;
    moe_forward_args fwd = b->fwd;
    moe_backward_args bwd = b->bwd;
    int64_t x = p->w->D * p->w->element, o = p->w->O * p->w->element, first = p->first_token;
    MUST(moe_pass_create(&pass, p->f.layer, NULL));
    p->y = calloc((size_t)(p->tokens * o) + 1, 1), p->dx = calloc((size_t)(p->tokens * x) + 1, 1);
    ck_assert(p->y && p->dx);
    fwd.tokens = p->tokens, fwd.token_first += first, fwd.groups = 1, fwd.group_begin = NULL;
    fwd.x = (const char *)b->x + first * x, fwd.y = p->y;
    if (fwd.logits_in)
        fwd.logits_in = (const char *)fwd.logits_in + first * p->f.g.num_experts * p->w->element;
    if (fwd.token_key) fwd.token_key += first;
    if (fwd.token_mask) fwd.token_mask += first;
    bwd.dy = (const char *)b->dy + first * o, bwd.dx = p->dx;
    MUST(moe_layer_forward(p->f.layer, pass, &fwd));
    MUST(moe_layer_backward(p->f.layer, pass, &bwd));
    MUST(moe_layer_reduce_gradients(p->f.layer, NULL));
    moe_pass_destroy(pass);
}

static void *part_thread(void *argument)
{
    part *p = argument;
    make_part(p);
    run_part(p);
    return NULL;
}

static void free_part(part *p)
{
    free(p->y), free(p->dx);
    family_free(&p->f);
    moe_comm_destroy(p->comm), moe_context_destroy(p->context);
}

/* ---- comparison ------------------------------------------------------------------------------- */

/* Gradients of experts are the bytes of their range, of replicated parameters those of one rank. */
static void compare_gradients(const whole *w, part *parts, int32_t ranks)
{
    moe_parameter_record want, got;
    MUST(moe_parameter_record_init(&want, sizeof want));
    MUST(moe_parameter_record_init(&got, sizeof got));
    for (int64_t i = 0; i < moe_layer_parameter_count(w->f.layer); i++) {
        MUST(moe_layer_parameter(w->f.layer, i, &want));
        if (!want.grad) continue;
        int shared_out = strncmp(want.name, "experts.", 8) == 0;
        for (int32_t r = 0; r < ranks && shared_out; r++) {
            MUST(moe_layer_parameter(parts[r].f.layer, i, &got));
            int64_t each = got.element_count / parts[r].experts;
            ck_assert_msg(
                memcmp(got.grad,
                       (const char *)want.grad + parts[r].first_expert * each * w->element,
                       (size_t)(got.element_count * w->element)) == 0,
                "%s of rank %d, %s", want.name, (int)r, w->f.text);
        }
        for (int32_t r = 0; r < ranks && !shared_out; r++) {
            MUST(moe_layer_parameter(parts[r].f.layer, i, &got));
            ck_assert_msg(memcmp(got.grad, want.grad, (size_t)(got.element_count * w->element)) ==
                              0,
                          "%s of rank %d of %d, %s", want.name, (int)r, (int)ranks, w->f.text);
        }
    }
}

static void compare_parts(const whole *w, part *parts, int32_t ranks)
{
    for (int32_t r = 0; r < ranks; r++) {
        const part *p = &parts[r];
        int64_t x = w->D * w->element, o = w->O * w->element;
        int untouched = w->f.l.dropped == MOE_DROPPED_UNTOUCHED;
        if (!untouched)
            ck_assert_msg(memcmp(p->y, (const char *)w->b.y + p->first_token * o,
                                 (size_t)(p->tokens * o)) == 0,
                          "y of rank %d of %d, %s", (int)r, (int)ranks, w->f.text);
        ck_assert_msg(
            memcmp(p->dx, (const char *)w->b.dx + p->first_token * x, (size_t)(p->tokens * x)) == 0,
            "dx of rank %d of %d, %s", (int)r, (int)ranks, w->f.text);
    }
    compare_gradients(w, parts, ranks);
}

static void run_ranks(int32_t kind, uint64_t number, int32_t ranks)
{
    whole w;
    part parts[MOST];
    pthread_t thread[MOST];
    moe_world *world = NULL;
    int64_t token = 0, expert = 0;
    run_whole(&w, kind, number, ranks);
    MUST(moe_world_create(&world, w.context, ranks));
    for (int32_t r = 0; r < ranks; r++) {
        int64_t left = w.f.g.num_experts - expert, others = ranks - 1 - r;
        int64_t own = others == 0 ? left : 1 + (int64_t)(number + (uint64_t)r) % (left - others);
        parts[r] = (part){.w = &w,
                          .world = world,
                          .rank = r,
                          .ranks = ranks,
                          .first_token = token,
                          .tokens = TOKENS_OF[ranks][r],
                          .first_expert = expert,
                          .experts = own};
        token += parts[r].tokens, expert += own;
    }
    for (int32_t r = 0; r < ranks; r++)
        ck_assert_int_eq(pthread_create(&thread[r], NULL, part_thread, &parts[r]), 0);
    for (int32_t r = 0; r < ranks; r++) ck_assert_int_eq(pthread_join(thread[r], NULL), 0);
    finish_whole(&w);
    compare_parts(&w, parts, ranks);
    for (int32_t r = 0; r < ranks; r++) free_part(&parts[r]);
    moe_world_destroy(world), free_whole(&w);
}

START_TEST(test_ranks_are_one_rank_with_the_same_groups)
{
    for (uint64_t number = 0; number < 12; number++)
        for (int32_t ranks = 2; ranks <= MOST; ranks++) run_ranks(_i, number, ranks);
}
END_TEST

/* ---- ranks that fail -------------------------------------------------------------------------- */

/* A small layer of a rank; what goes wrong is the test's. */
typedef struct lone {
    moe_world *world;
    int32_t rank, ranks, trouble;
    moe_status created, forward;
    float first_weight; /* of its first expert */
    char error[256];
} lone;

enum { NOTHING, OTHER_TOP_K, OTHER_WIDTH, TOO_FEW_EXPERTS, NO_CALL, NO_MEMORY };

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

static void *lone_thread(void *argument)
{
    enum { T = 6, D = 3, E = 4 };
    lone *l = argument;
    int odd = l->rank == 1;
    moe_context *context = NULL;
    moe_comm *comm = NULL;
    moe_gate *gate = NULL;
    moe_experts *experts = NULL;
    moe_layer *layer = NULL;
    moe_pass *pass = NULL;
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
        if (!odd || l->trouble != NO_CALL) l->forward = moe_layer_forward(layer, pass, &f);
        if (odd) fail_allocations = 0;
    }
    (void)snprintf(l->error, sizeof l->error, "%s", moe_last_error());
    moe_pass_destroy(pass), moe_layer_destroy(layer), moe_gate_destroy(gate);
    moe_experts_destroy(experts);
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
    ck_assert_int_eq(l[1].forward, MOE_ERROR_OUT_OF_MEMORY);
    ck_assert_int_eq(l[0].forward, MOE_ERROR_TRANSPORT);
    ck_assert_msg(strstr(l[0].error, "rank 1 gave up") || strstr(l[0].error, "has left"), "%s",
                  l[0].error);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ranks");
    TCase *c = tcase_create("ranks");
    tcase_set_timeout(c, 300);
    tcase_add_loop_test(c, test_ranks_are_one_rank_with_the_same_groups, 0, KINDS);
    tcase_add_test(c, test_ranks_that_differ_are_found_at_creation);
    tcase_add_test(c, test_ranks_end_when_one_fails);
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
