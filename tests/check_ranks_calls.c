/* check_ranks_calls.c - calls of a layer on ranks that are refused, that differ from rank to rank
 * where they may, or that end while rows are under way: what a pass held before is still there, and
 * nobody waits. */
#include "support/crew.h"
#include "support/layer_case.h"
#include "support/real.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { T = 6, E = 4, D = CREW_D, RANKS = 3 };

static void draw(scalar *x, int64_t count, uint64_t seed)
{
    for (int64_t i = 0; i < count; i++) {
        uint64_t state = seed + 1000 * (uint64_t)i;
        x[i] = (scalar)random_normal(&state);
    }
}

/* What a rank has and gets. */
typedef struct step {
    scalar x[T * D], y[T * D], dy[T * D], dx[T * D], weight_grad[MOE_LOSS_SLOTS];
    scalar grad[200];
} step;

static void make_step(member *m, step *s)
{
    draw(s->x, T * D, 3 + (uint64_t)m->rank), draw(s->dy, T * D, 9 + (uint64_t)m->rank);
    m->f.tokens = T, m->f.x = s->x, m->f.y = s->y, m->f.token_first = m->rank * T;
    m->b.dy = s->dy, m->b.dx = s->dx;
}

/* All gradients of the rank, one after another. */
static void take_gradients(member *m, step *s)
{
    moe_parameter_record r;
    int64_t at = 0;
    MUST(moe_parameter_record_init(&r, sizeof r));
    for (int64_t i = 0; i < moe_layer_parameter_count(m->layer); i++) {
        MUST(moe_layer_parameter(m->layer, i, &r));
        ck_assert_int_le(at + r.element_count, 200);
        if (r.grad) memcpy(s->grad + at, r.grad, (size_t)r.element_count * sizeof(scalar));
        at += r.element_count;
    }
}

static void run(int32_t ranks, void (*call)(member *), void (*configure)(member *), void *test,
                member *m, step *s)
{
    crew c = {.ranks = ranks, .run = call, .configure = configure, .test = test};
    memset(m, 0, (size_t)ranks * sizeof *m);
    if (s) memset(s, 0, (size_t)ranks * sizeof *s);
    for (int32_t r = 0; s && r < ranks; r++) m[r].own = &s[r];
    crew_run(&c, m);
}

/* ---- layers and steps ------------------------------------------------------------------------ */

enum { EXACT, PADDED, CHUNKS, BY_GROUP, WAYS };

static void by_group(member *m)
{
    m->g.kind = MOE_GATE_HIERARCHICAL;
    m->g.expert_groups = m->crew->ranks == 2 ? 2 : E, m->g.top_groups = 2, m->g.top_k = 1;
    m->g.secondary = MOE_SECONDARY_WITH_GROUP;
    m->g.local_groups = member_share(m->rank, m->crew->ranks, m->g.expert_groups);
}

static void configure_way(member *m)
{
    int32_t way = *(const int32_t *)m->crew->test;
    if (way == PADDED) m->l.exchange = MOE_EXCHANGE_PADDED, m->l.padded_rows = 2 * T;
    if (way == CHUNKS) m->l.received = MOE_RECEIVED_CHUNK, m->l.max_received = 2 + m->rank;
    if (way == BY_GROUP) by_group(m);
}

/* ---- refused calls leave the pass as it was -------------------------------------------------- */

static void run_plain(member *m)
{
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    make_step(m, s);
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    take_gradients(m, s);
}

/* Every rank makes the same mistakes between forward and backward. */
static void run_refused(member *m)
{
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    make_step(m, s);
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    moe_forward_args f = m->f;
    moe_backward_args b = m->b;
    moe_pass_report before, after;
    MUST(moe_pass_report_init(&before, sizeof before));
    MUST(moe_pass_report_init(&after, sizeof after));
    MUST(moe_pass_get_report(m->pass, &before));
    f.flags = 1 << 20;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_forward(m->layer, m->pass, &f));
    b.dy = NULL;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_backward(m->layer, m->pass, &b));
    MUST(moe_pass_get_report(m->pass, &after));
    ck_assert_int_eq(memcmp(&before, &after, sizeof before), 0);
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    take_gradients(m, s);
}

START_TEST(test_refused_calls_leave_the_pass_as_it_was)
{
    member m[RANKS];
    step want[RANKS], got[RANKS];
    int32_t way = _i % WAYS, ranks = _i < WAYS ? RANKS : 1;
    run(ranks, run_plain, configure_way, &way, m, want);
    run(ranks, run_refused, configure_way, &way, m, got);
    for (int r = 0; r < ranks; r++) {
        ck_assert_int_eq(memcmp(got[r].dx, want[r].dx, sizeof want[r].dx), 0);
        ck_assert_int_eq(memcmp(got[r].grad, want[r].grad, sizeof want[r].grad), 0);
    }
}
END_TEST

/* One rank asks for what its pass has not kept; where secondary gates are with their groups too all
 * ranks hear of it, and the group goes on. */
static void run_recompute(member *m)
{
    step *s = (step *)m->own;
    moe_pass *other = NULL;
    MUST(member_make(m, E));
    MUST(moe_pass_create(&other, m->layer, NULL));
    make_step(m, s);
    m->f.flags = MOE_FORWARD_PLAN_ONLY;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    m->f.flags = MOE_FORWARD_RECOMPUTE;
    moe_pass *asked = m->rank == 1 ? other : m->pass;
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_forward(m->layer, asked, &m->f));
    m->f.flags = 0;
    MUST(moe_layer_forward(m->layer, other, &m->f));
    MUST(moe_layer_backward(m->layer, other, &m->b));
    moe_pass_destroy(other);
}

START_TEST(test_recompute_without_a_plan_on_one_rank)
{
    member m[RANKS];
    step s[RANKS];
    int32_t way = _i;
    if (OVER_NCCL && way == PADDED) return; /* it is told later, for nobody waits for the word */
    run(2, run_recompute, configure_way, &way, m, s);
}
END_TEST

/* ---- a reserve that fails -------------------------------------------------------------------- */

static void bounded(member *m)
{
    m->l.received = m->crew->test ? MOE_RECEIVED_CHUNK : MOE_RECEIVED_ERROR;
    m->l.max_received = 100;
}

static void run_reserve(member *m)
{
    step *s = (step *)m->own;
    moe_pass_config c;
    enum { BYTES = 1 << 23 };
    void *memory = aligned_alloc(64, BYTES);
    ck_assert_ptr_nonnull(memory);
    MUST(member_make(m, E));
    MUST(moe_pass_config_init(&c, sizeof c));
    c.workspace = memory, c.workspace_bytes = BYTES;
    moe_pass_destroy(m->pass), m->pass = NULL;
    MUST(moe_pass_create(&m->pass, m->layer, &c));
    make_step(m, s);
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    REFUSED(MOE_ERROR_OVERFLOW, moe_pass_reserve(m->pass, INT64_MAX / 4, 1, MOE_FROM_CONFIG));
    REFUSED(MOE_ERROR_BUFFER_TOO_SMALL, moe_pass_reserve(m->pass, 100000, 1, MOE_FROM_CONFIG));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    take_gradients(m, s);
    moe_pass_destroy(m->pass), m->pass = NULL;
    free(memory);
}

START_TEST(test_reserve_that_fails_leaves_the_pass_as_it_was)
{
    member m[RANKS];
    step want[RANKS], got[RANKS];
    int yes = 1;
    run(RANKS, run_plain, bounded, _i ? &yes : NULL, m, want);
    run(RANKS, run_reserve, bounded, _i ? &yes : NULL, m, got);
    for (int r = 0; r < RANKS; r++) {
        ck_assert_int_eq(memcmp(got[r].dx, want[r].dx, sizeof want[r].dx), 0);
        ck_assert_int_eq(memcmp(got[r].grad, want[r].grad, sizeof want[r].grad), 0);
    }
}
END_TEST

/* ---- backwards that want different things ---------------------------------------------------- */

static void few_tokens(member *m, step *s)
{
    make_step(m, s);
    if (m->rank == 0) m->f.tokens = 0;
}

static void run_few(member *m)
{
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    few_tokens(m, s);
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    take_gradients(m, s);
}

/* Rank 0 has no tokens and hands in nothing, rank 1 does not ask for dx, rank 2 for all. */
static void run_different(member *m)
{
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    few_tokens(m, s);
    if (m->rank == 0) m->f.x = NULL, m->f.y = NULL, m->b.dy = NULL, m->b.dx = NULL;
    if (m->rank == 1) m->b.flags = MOE_BACKWARD_SKIP_DX;
    if (m->rank == 2) m->b.entry_weight_grad = s->weight_grad;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    take_gradients(m, s);
}

START_TEST(test_backwards_may_want_different_things)
{
    member m[RANKS];
    step want[RANKS], got[RANKS];
    int32_t way = _i;
    run(RANKS, run_few, configure_way, &way, m, want);
    run(RANKS, run_different, configure_way, &way, m, got);
    for (int r = 0; r < RANKS; r++)
        ck_assert_int_eq(memcmp(got[r].grad, want[r].grad, sizeof want[r].grad), 0);
    ck_assert_int_eq(memcmp(got[2].dx, want[2].dx, sizeof want[2].dx), 0);
    for (int i = 0; i < T * D; i++) ck_assert(got[1].dx[i] == 0);
}
END_TEST

/* The same with a plan, where gradients by the weights are not needed by themselves. */
static void run_replayed(member *m)
{
    step *s = (step *)m->own;
    const moe_plan *plan = NULL;
    bool all = m->crew->test == NULL;
    MUST(member_make(m, E));
    make_step(m, s);
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_pass_plan(m->pass, &plan));
    m->f.plan = plan;
    if (!all && m->rank != 2) m->b.dx = NULL;
    if (all || m->rank == 1) m->b.entry_weight_grad = s->weight_grad;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    take_gradients(m, s);
}

START_TEST(test_backwards_of_a_plan_may_want_different_things)
{
    member m[RANKS];
    step want[RANKS], got[RANKS];
    run(RANKS, run_replayed, NULL, NULL, m, want);
    run(RANKS, run_replayed, NULL, m, m, got);
    for (int r = 0; r < RANKS; r++)
        ck_assert_int_eq(memcmp(got[r].grad, want[r].grad, sizeof want[r].grad), 0);
    ck_assert_int_eq(memcmp(got[2].dx, want[2].dx, sizeof want[2].dx), 0);
    ck_assert_int_eq(memcmp(got[1].weight_grad, want[1].weight_grad, sizeof want[1].weight_grad),
                     0);
}
END_TEST

/* ---- no tokens anywhere ---------------------------------------------------------------------- */

static void configure_none(member *m)
{
    int32_t way = *(const int32_t *)m->crew->test;
    if (way < WAYS) configure_way(m);
    if (way == WAYS) m->l.received = MOE_RECEIVED_DROP_SCORE, m->l.max_received = 3;
    if (way > WAYS) m->l.received = MOE_RECEIVED_DROP_POSITION, m->l.max_received = 3;
    m->l.loss_batch = MOE_BATCH_GLOBAL, m->g.importance_weight = 0.1;
}

static void run_none(member *m)
{
    MUST(member_make(m, E));
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    MUST(moe_layer_reduce_gradients(m->layer, NULL));
}

START_TEST(test_no_rank_has_tokens)
{
    member m[RANKS];
    int32_t way = _i;
    run(RANKS, run_none, configure_none, &way, m, NULL);
}
END_TEST

/* ---- no gate and one expert ------------------------------------------------------------------ */

/* A plain network, whole on rank 0 or in two slices. */
static void run_plain_network(member *m)
{
    int64_t slices = *(const int *)m->crew->test, ranks = m->crew->ranks;
    step *s = (step *)m->own;
    MUST(moe_experts_config_init(&m->e, sizeof m->e));
    MUST(moe_layer_config_init(&m->l, sizeof m->l));
    MUST(moe_forward_args_init(&m->f, sizeof m->f));
    MUST(moe_backward_args_init(&m->b, sizeof m->b));
    m->e.d_model = D, m->e.d_hidden = 4, m->e.dtype = REAL;
    m->e.num_experts = member_share(m->rank, (int32_t)ranks, slices);
    if (m->e.num_experts == 0) m->e.num_experts = MOE_NO_EXPERTS;
    MUST(moe_experts_create(&m->experts, m->context, &m->e));
    m->l.experts = m->experts, m->l.comm = m->comm, m->l.expert_slices = slices;
    MUST(moe_layer_create(&m->layer, &m->l));
    MUST(moe_layer_init_parameters(m->layer, 5));
    MUST(moe_pass_create(&m->pass, m->layer, NULL));
    draw(s->x, T * D, 3), draw(s->dy, T * D, 9);
    m->f.tokens = T, m->f.x = s->x, m->f.y = s->y, m->b.dy = s->dy, m->b.dx = s->dx;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
}

START_TEST(test_every_token_visits_the_only_expert)
{
    member m[RANKS];
    step want, got[RANKS];
    int slices = _i;
    run(1, run_plain_network, NULL, &slices, m, &want);
    run(RANKS, run_plain_network, NULL, &slices, m, got);
    ck_assert(want.y[0] != 0 && want.dx[0] != 0);
    for (int r = 0; r < RANKS; r++) {
        ck_assert_int_eq(memcmp(got[r].y, want.y, sizeof want.y), 0);
        ck_assert_int_eq(memcmp(got[r].dx, want.dx, sizeof want.dx), 0);
    }
}
END_TEST

/* ---- more passes than exchanges -------------------------------------------------------------- */

static void run_too_many(member *m)
{
    moe_pass *pass[MOE_COMM_REQUESTS + 1];
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    make_step(m, s);
    for (int i = 0; i <= MOE_COMM_REQUESTS; i++) MUST(moe_pass_create(&pass[i], m->layer, NULL));
    moe_pass *last = pass[MOE_COMM_REQUESTS];
    for (int i = 0; i < MOE_COMM_REQUESTS; i++)
        MUST(moe_layer_forward_start(m->layer, pass[i], &m->f));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_forward_start(m->layer, last, &m->f));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_forward(m->layer, last, &m->f));
    for (int i = 0; i < MOE_COMM_REQUESTS; i++) MUST(moe_layer_forward_finish(m->layer, pass[i]));
    MUST(moe_layer_forward(m->layer, last, &m->f));
    for (int i = 0; i <= MOE_COMM_REQUESTS; i++) moe_pass_destroy(pass[i]);
}

START_TEST(test_a_pass_too_many_is_refused_on_every_rank)
{
    member m[RANKS];
    step s[RANKS];
    int32_t way = _i;
    run(RANKS, run_too_many, configure_way, &way, m, s);
}
END_TEST

static void in_three(member *m) { m->l.exchange_chunks = 3; }

/* Two passes have three exchanges each. */
static void run_too_many_chunks(member *m)
{
    moe_pass *pass[3];
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    make_step(m, s);
    for (int i = 0; i < 3; i++) MUST(moe_pass_create(&pass[i], m->layer, NULL));
    for (int i = 0; i < 2; i++) MUST(moe_layer_forward_start(m->layer, pass[i], &m->f));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_forward_start(m->layer, pass[2], &m->f));
    ck_assert_ptr_nonnull(strstr(moe_last_error(), "6 exchanges of the group are in flight"));
    for (int i = 0; i < 2; i++) MUST(moe_layer_forward_finish(m->layer, pass[i]));
    MUST(moe_layer_forward(m->layer, pass[2], &m->f));
    (void)moe_layer_forward_start(m->layer, pass[0], &m->f); /* and goes, or another rank has */
    for (int i = 0; i < 3; i++) moe_pass_destroy(pass[i]);
}

START_TEST(test_chunks_of_a_pass_too_many)
{
    member m[RANKS];
    step s[RANKS];
    int32_t way = _i;
    run(RANKS, run_too_many_chunks, in_three, &way, m, s);
}
END_TEST

/* ---- losses of all ranks --------------------------------------------------------------------- */

/* A gate by hash whose logits are the host's. */
static void hashed(member *m)
{
    m->g.kind = MOE_GATE_HASH, m->g.d_model = 0, m->g.top_k = 1;
    m->g.importance_weight = 0.5, m->g.switch_weight = 0.2, m->g.sequence_weight = 0.1;
    m->g.z_weight = 0.1, m->g.loss_scope = *(const int *)m->crew->test >= 2;
    m->l.loss_batch = MOE_BATCH_GLOBAL;
}

static void weak_free(void *user, void *memory, uint64_t bytes)
{
    (void)user, (void)bytes;
    free(memory);
}

static void *soiled_alloc(void *user, uint64_t bytes, uint64_t alignment)
{
    (void)user;
    scalar *memory = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    for (uint64_t i = 0; memory && i < bytes / 8; i++) memory[i] = 1e10;
    return memory;
}

/* Rank 0 has no tokens, and in odd cases no logits either. */
static void run_hashed(member *m)
{
    static const int64_t KEY[T] = {3, 1, 4, 1, 5, 9};
    step *s = (step *)m->own;
    scalar logits[T * E];
    MUST(member_make(m, E));
    few_tokens(m, s);
    draw(logits, T * E, 5 + (uint64_t)m->rank);
    m->f.token_key = KEY, m->f.logits_in = logits;
    if (m->rank == 0 && *(const int *)m->crew->test % 2) m->f.logits_in = NULL;
    m->f.losses_out = s->weight_grad;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
}

START_TEST(test_losses_of_all_need_no_logits_of_a_rank_without_tokens)
{
    step s[4][RANKS];
    for (int i = 0; i < 4; i++) {
        member m[RANKS];
        crew c = {.ranks = RANKS, .run = run_hashed, .configure = hashed, .test = &i};
        memset(m, 0, sizeof m), memset(s[i], 0, sizeof s[i]);
        for (int32_t r = 0; r < RANKS; r++) {
            m[r].own = &s[i][r];
            MUST(moe_context_config_init(&m[r].context_config, sizeof m[r].context_config));
            m[r].context_config.threads = 1;
            m[r].context_config.alloc = soiled_alloc, m[r].context_config.free = weak_free;
        }
        crew_run(&c, m);
        for (int r = 0; r < RANKS; r++) {
            const scalar *losses = s[i - i % 2][1].weight_grad;
            ck_assert(losses[MOE_LOSS_SWITCH] > 0 && losses[MOE_LOSS_SEQUENCE] > 0);
            ck_assert_int_eq(memcmp(s[i][r].weight_grad, losses, 12 * sizeof *losses), 0);
        }
    }
}
END_TEST

/* ---- after the backward ---------------------------------------------------------------------- */

static atomic_int no_memory, all_here, all_through;

static void wait_for(atomic_int *count, int most)
{
    while (atomic_load(count) < most) {
        struct timespec pause = {0, 1000000};
        (void)nanosleep(&pause, NULL);
    }
}

static void *weak_alloc(void *user, uint64_t bytes, uint64_t alignment)
{
    (void)user;
    if (atomic_load(&no_memory)) return NULL;
    return aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

/* Rank 1 has no memory to reduce, or for the norm, and stays. */
static void run_without_memory(member *m)
{
    step *s = (step *)m->own;
    double squared;
    MUST(member_make(m, E));
    make_step(m, s);
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    atomic_fetch_add(&all_here, 1), wait_for(&all_here, RANKS);
    if (m->rank == 1) atomic_store(&no_memory, 1);
    (void)member_note(m, *(const int *)m->crew->test
                             ? moe_layer_gradient_norm(m->layer, &squared, NULL)
                             : moe_layer_reduce_gradients(m->layer, NULL));
    if (m->rank != 1) atomic_fetch_add(&all_through, 1);
    wait_for(&all_through, RANKS - 1); /* stays, silent */
}

START_TEST(test_reductions_that_fail_end_the_waits)
{
    member m[RANKS];
    step s[RANKS];
    crew c = {.ranks = RANKS, .run = run_without_memory, .test = &_i, .timeout = 10};
    memset(m, 0, sizeof m), memset(s, 0, sizeof s);
    for (int32_t r = 0; r < RANKS; r++) m[r].own = &s[r];
    MUST(moe_context_config_init(&m[1].context_config, sizeof m[1].context_config));
    m[1].context_config.threads = 1;
    m[1].context_config.alloc = weak_alloc, m[1].context_config.free = weak_free;
    atomic_store(&no_memory, 0), atomic_store(&all_here, 0), atomic_store(&all_through, 0);
    crew_run(&c, m);
    for (int r = 0; r < RANKS; r++)
        ck_assert_msg(m[r].status == (r == 1 ? MOE_ERROR_OUT_OF_MEMORY : MOE_ERROR_TRANSPORT),
                      "rank %d: %s", r, m[r].error);
}
END_TEST

/* Experts of different kinds: the norm is of all of them, on every rank. */
static void configure_kinds(member *m)
{
    int32_t way = *(const int32_t *)m->crew->test;
    if (m->rank == 0) m->e.activation = MOE_ACTIVATION_SWIGLU, m->e.bias = 1;
    if (m->rank == 1 && way == 0) m->e.kind = MOE_EXPERTS_IDENTITY, m->e.d_hidden = 0;
    if (m->rank == 1 && way == 1) m->e.num_experts = MOE_NO_EXPERTS;
    if (m->rank == 0 && way == 1) m->e.num_experts = 3;
    if (m->rank == 2) m->e.d_hidden = 7;
}

typedef struct summed {
    step s;
    double experts, rest, squared;
} summed;

static void run_norm(member *m)
{
    summed *n = (summed *)m->own;
    moe_parameter_record r;
    MUST(member_make(m, E));
    make_step(m, &n->s);
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    MUST(moe_layer_reduce_gradients(m->layer, NULL));
    (void)member_note(m, moe_layer_gradient_norm(m->layer, &n->squared, NULL));
    MUST(moe_parameter_record_init(&r, sizeof r));
    for (int64_t i = 0; i < moe_layer_parameter_count(m->layer); i++) {
        MUST(moe_layer_parameter(m->layer, i, &r));
        bool of_experts = strncmp(r.name, "experts.", 8) == 0;
        for (int64_t j = 0; r.grad && j < r.element_count; j++) {
            double g = ((const scalar *)r.grad)[j];
            *(of_experts ? &n->experts : &n->rest) += g * g;
        }
    }
}

START_TEST(test_norm_of_experts_of_different_kinds)
{
    member m[RANKS];
    summed n[RANKS];
    crew c = {.ranks = RANKS, .run = run_norm, .configure = configure_kinds, .test = &_i};
    memset(m, 0, sizeof m), memset(n, 0, sizeof n);
    for (int32_t r = 0; r < RANKS; r++) m[r].own = &n[r];
    crew_run(&c, m);
    double want = n[0].rest + n[0].experts + n[1].experts + n[2].experts;
    for (int r = 0; r < RANKS; r++) {
        ck_assert_msg(m[r].status == MOE_OK, "rank %d: %s", r, m[r].error);
        ck_assert(n[r].squared == n[0].squared);
    }
    ck_assert_msg(want > 0 && fabs(n[0].squared - want) <= 1e-12 * want, "%.17g, %.17g",
                  n[0].squared, want);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ranks, calls");
    TCase *c = tcase_create("calls");
    tcase_set_timeout(c, 300);
    tcase_add_loop_test(c, test_refused_calls_leave_the_pass_as_it_was, 0, 2 * WAYS);
    tcase_add_loop_test(c, test_recompute_without_a_plan_on_one_rank, 0, WAYS);
    tcase_add_loop_test(c, test_reserve_that_fails_leaves_the_pass_as_it_was, 0, 2);
    tcase_add_loop_test(c, test_backwards_may_want_different_things, 0, WAYS);
    tcase_add_test(c, test_backwards_of_a_plan_may_want_different_things);
    tcase_add_loop_test(c, test_no_rank_has_tokens, 0, WAYS + 2);
    tcase_add_loop_test(c, test_every_token_visits_the_only_expert, 1, 3);
    if (!ON_DEVICE) tcase_add_test(c, test_chunks_of_a_pass_too_many); /* one exchange there */
    if (!OVER_NCCL) /* where started passes are ordered on the stream, without requests */
        tcase_add_loop_test(c, test_a_pass_too_many_is_refused_on_every_rank, 0, WAYS);
    tcase_add_test(c, test_losses_of_all_need_no_logits_of_a_rank_without_tokens);
    if (!OVER_NCCL) /* the stream waits, not the host */
        tcase_add_loop_test(c, test_reductions_that_fail_end_the_waits, 0, ON_DEVICE ? 1 : 2);
    tcase_add_loop_test(c, test_norm_of_experts_of_different_kinds, 0, 2);
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
