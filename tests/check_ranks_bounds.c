/* check_ranks_bounds.c - max_received and its policies, padded blocks, replicas, phases and the
 * report of a layer on ranks. */
#include "support/crew.h"
#include "support/family.h"
#include "support/layer_case.h"
#include "support/real.h"
#include "support/suite.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { T = 6, E = 4, D = CREW_D };

/* Tokens of a rank, drawn from their global number, so that one rank can have all. */
static void draw(scalar *x, int64_t first, int64_t count, uint64_t seed)
{
    for (int64_t i = 0; i < count; i++) {
        uint64_t state = seed + 1000 * (uint64_t)(first + i);
        x[i] = (scalar)random_normal(&state);
    }
}

/* ---- what the tests look at ------------------------------------------------------------------ */

typedef struct step {
    scalar x[T * D], y[T * D], dy[T * D], dx[T * D];
    scalar stats[MOE_STAT_SLOTS];
    int64_t rows[E];       /* kept of each expert */
    int64_t row_of[T * 2]; /* of each entry */
    scalar weight[T * 2];  /* of each entry */
    int32_t expert_of[T * 2];
    moe_pass_report report;
} step;

static void take_plan(member *m, step *s)
{
    const moe_plan *plan;
    moe_plan_view v;
    MUST(moe_plan_view_init(&v, sizeof v));
    MUST(moe_pass_plan(m->pass, &plan));
    MUST(moe_plan_get(plan, &v));
    for (int e = 0; e < E; e++) s->rows[e] = v.expert_begin[e + 1] - v.expert_begin[e];
    memcpy(s->row_of, v.row_of_entry, sizeof s->row_of);
    memcpy(s->weight, v.weight_of_entry, sizeof s->weight);
    memcpy(s->expert_of, v.expert_of_entry, sizeof s->expert_of);
}

static void forward(member *m, step *s)
{
    draw(s->x, m->rank * T * D, T * D, 3), draw(s->dy, m->rank * T * D, T * D, 9);
    m->f.tokens = T, m->f.x = s->x, m->f.y = s->y, m->f.stats_out = s->stats;
    m->f.token_first = m->rank * T;
    m->b.dy = s->dy, m->b.dx = s->dx;
    (void)member_note(m, moe_layer_forward(m->layer, m->pass, &m->f));
}

static void run_step(member *m)
{
    step *s = (step *)m->own;
    if (member_make(m, E) != MOE_OK) return;
    forward(m, s);
    if (m->status != MOE_OK) return;
    take_plan(m, s);
    MUST(moe_pass_report_init(&s->report, sizeof s->report));
    if (!(m->f.flags & MOE_FORWARD_NO_SAVE))
        (void)member_note(m, moe_layer_backward(m->layer, m->pass, &m->b));
    MUST(moe_pass_get_report(m->pass, &s->report));
}

static void run_as(crew c, member *m, step *s)
{
    int32_t ranks = c.ranks;
    memset(m, 0, (size_t)ranks * sizeof *m), memset(s, 0, (size_t)ranks * sizeof *s);
    for (int32_t r = 0; r < ranks; r++) m[r].own = &s[r];
    crew_run(&c, m);
}

static void run(int32_t ranks, void (*configure)(member *), member *m, step *s)
{
    run_as((crew){.ranks = ranks, .run = run_step, .configure = configure}, m, s);
}

static int64_t dropped_of(const step *s) { return (int64_t)s->stats[MOE_STAT_DROPPED]; }

/* ---- bounds ---------------------------------------------------------------------------------- */

static void bound_error(member *m) { m->l.max_received = m->rank == 1 ? 5 : 0; }

START_TEST(test_bound_error_is_on_every_rank)
{
    member m[3];
    step s[3];
    run(3, bound_error, m, s);
    for (int r = 0; r < 3; r++) ck_assert_int_eq(m[r].status, MOE_ERROR_BUFFER_TOO_SMALL);
    ck_assert_msg(strstr(m[1].error, "rows come to rank 1, max_received is 5") != NULL, "%s",
                  m[1].error);
    ck_assert_msg(strstr(m[0].error, "rank 1 failed: ") != NULL, "%s", m[0].error);
}
END_TEST

static int64_t room = 9;

/* Two ranks with two experts each; rank 0 takes `room` rows. */
static void bound_position(member *m)
{
    m->l.received = MOE_RECEIVED_DROP_POSITION;
    m->l.max_received = m->rank == 0 ? room : 0;
}

/* Of each (source, expert) of rank 0 the first n stay, at most one more of some, `room` in all. */
START_TEST(test_bound_drops_by_position)
{
    room = 4 + _i;
    member m[2];
    step free[2], s[2];
    int64_t kept = 0, least = T, most = 0;
    run(2, NULL, m, free);
    run(2, bound_position, m, s);
    for (int r = 0; r < 2; r++) {
        ck_assert_int_eq(m[r].status, MOE_OK);
        ck_assert(s[r].rows[2] == free[r].rows[2] && s[r].rows[3] == free[r].rows[3]);
        for (int e = 0; e < 2; e++) {
            kept += s[r].rows[e];
            if (s[r].rows[e] < free[r].rows[e]) {
                if (s[r].rows[e] < least) least = s[r].rows[e];
            }
            if (s[r].rows[e] > most) most = s[r].rows[e];
            int64_t seen = 0; /* the first of them stay */
            for (int n = 0; n < T * 2; n++) {
                if (s[r].expert_of[n] != e) continue;
                ck_assert_int_eq(s[r].row_of[n] >= 0, seen++ < s[r].rows[e]);
            }
        }
        int64_t lost = free[r].rows[0] + free[r].rows[1] - s[r].rows[0] - s[r].rows[1];
        ck_assert_int_eq(dropped_of(&s[r]), lost);
    }
    ck_assert_int_eq(kept, room);
    ck_assert_int_le(most, least + 1);
}
END_TEST

static void bound_score(member *m)
{
    m->l.received = MOE_RECEIVED_DROP_SCORE;
    m->l.max_received = m->rank == 0 ? 9 : 0;
}

START_TEST(test_bound_drops_by_score)
{
    member m[2];
    step free[2], s[2];
    double least_kept = 2, most_lost = -1;
    int64_t kept = 0;
    run(2, NULL, m, free);
    run(2, bound_score, m, s);
    for (int r = 0; r < 2; r++) {
        ck_assert_int_eq(m[r].status, MOE_OK);
        for (int n = 0; n < T * 2; n++) {
            ck_assert_int_eq(s[r].expert_of[n], free[r].expert_of[n]);
            if (s[r].expert_of[n] >= 2) {
                ck_assert_int_ge(s[r].row_of[n], 0);
                continue;
            }
            double w = free[r].weight[n];
            bool stays = s[r].row_of[n] >= 0;
            kept += stays;
            if (stays && w < least_kept) least_kept = w;
            if (!stays && w > most_lost) most_lost = w;
            ck_assert(s[r].weight[n] == (stays ? w : 0));
        }
    }
    ck_assert_int_eq(kept, 9);
    ck_assert(least_kept >= most_lost);
}
END_TEST

/* What was dropped has no part in y: the output is that of a plan without it. */
START_TEST(test_bound_dropped_rows_are_gone)
{
    member m[2];
    step free[2], s[2];
    int touched = 0;
    run(2, NULL, m, free);
    run(2, bound_position, m, s);
    for (int r = 0; r < 2; r++)
        for (int t = 0; t < T; t++) {
            bool lost = s[r].row_of[2 * t] < 0 || s[r].row_of[2 * t + 1] < 0;
            bool same = memcmp(s[r].y + t * D, free[r].y + t * D, D * sizeof(scalar)) == 0;
            ck_assert_int_eq(same, !lost);
            touched += lost;
            bool all = s[r].row_of[2 * t] < 0 && s[r].row_of[2 * t + 1] < 0;
            for (int i = 0; all && i < D; i++) ck_assert(s[r].y[t * D + i] == 0);
        }
    ck_assert_int_gt(touched, 0);
}
END_TEST

/* ---- rounds of many rows --------------------------------------------------------------------- */

/* One expert with more rows than a chain of the sums over rows is long, whatever cuts them. On a
 * device each round adds its own sums. */
enum { MANY = 9001 };

typedef struct many {
    int64_t limit;
    scalar *x, *dy, *grad;
    int64_t grads;
} many;

static void configure_many(member *m)
{
    const many *a = (const many *)m->own;
    m->g.top_k = 1;
    m->e.bias = 1;
    m->l.received = MOE_RECEIVED_CHUNK;
    m->l.max_received = a->limit;
}

static void take_gradients(member *m, many *a)
{
    moe_parameter_record r;
    MUST(moe_parameter_record_init(&r, sizeof r));
    a->grad = calloc(1000, sizeof(scalar)), a->grads = 0;
    ck_assert_ptr_nonnull(a->grad);
    for (int64_t i = 0; i < moe_layer_parameter_count(m->layer); i++) {
        MUST(moe_layer_parameter(m->layer, i, &r));
        ck_assert_int_le(a->grads + r.element_count, 1000);
        memcpy(a->grad + a->grads, r.grad, (size_t)r.element_count * sizeof(scalar));
        a->grads += r.element_count;
    }
}

static void run_many(member *m)
{
    many *a = (many *)m->own;
    MUST(member_make(m, 2));
    scalar *y = calloc(MANY * D, sizeof *y);
    a->x = calloc(MANY * D, sizeof *y), a->dy = calloc(MANY * D, sizeof *y);
    ck_assert(y && a->x && a->dy);
    draw(a->x, 0, MANY * D, 1), draw(a->dy, 0, MANY * D, 2);
    m->f.tokens = MANY, m->f.x = a->x, m->f.y = y;
    m->b.dy = a->dy, m->b.dx = y, m->b.flags = MOE_BACKWARD_OVERWRITE;
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    m->b.flags = 0; /* and added once more */
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    take_gradients(m, a);
    free(y), free(a->x), free(a->dy);
}

START_TEST(test_rounds_sum_as_one)
{
    static const int64_t LIMIT[] = {0, 1000, 4096, 2048, 5000};
    many all[COUNT(LIMIT)];
    memset(all, 0, sizeof all);
    for (size_t i = 0; i < COUNT(LIMIT); i++) {
        crew c = {.ranks = 1, .run = run_many, .configure = configure_many};
        member m = {.own = &all[i]};
        all[i].limit = LIMIT[i];
        crew_run(&c, &m);
        ck_assert_int_eq(all[i].grads, all[0].grads);
        for (int64_t j = 0; j < all[0].grads; j++) {
            double got = (double)all[i].grad[j], want = (double)all[0].grad[j];
            double unit = ON_DEVICE ? 1e-5 * fabs(want) + 1e-3 : 0;
            ck_assert_msg(fabs(got - want) <= unit, "limit %d: %.17g, %.17g", (int)LIMIT[i], got,
                          want);
        }
    }
    for (size_t i = 0; i < COUNT(LIMIT); i++) free(all[i].grad);
}
END_TEST

static void chunk_small(member *m)
{
    m->l.received = MOE_RECEIVED_CHUNK;
    m->l.max_received = 2 + m->rank;
}

START_TEST(test_rounds_are_counted)
{
    member m[2];
    step s[2];
    run(2, chunk_small, m, s);
    int64_t to_0 = s[0].rows[0] + s[0].rows[1] + s[1].rows[0] + s[1].rows[1];
    int64_t to_1 = 4 * T - to_0, rounds_0 = (to_0 + 1) / 2, rounds_1 = (to_1 + 2) / 3;
    for (int r = 0; r < 2; r++) {
        ck_assert_int_eq(m[r].status, MOE_OK);
        ck_assert_int_eq(s[r].report.rounds, rounds_0 > rounds_1 ? rounds_0 : rounds_1);
    }
}
END_TEST

/* ---- padded ---------------------------------------------------------------------------------- */

static void padded_tight(member *m)
{
    m->l.exchange = MOE_EXCHANGE_PADDED;
    m->l.padded_rows = 1;
}

START_TEST(test_padded_rows_that_do_not_fit)
{
    member m[2];
    step s[2];
    run(2, padded_tight, m, s);
    for (int r = 0; r < 2; r++) ck_assert_int_eq(m[r].status, MOE_ERROR_BUFFER_TOO_SMALL);
    ck_assert_msg(strstr(m[0].error, "padded_rows is 1") || strstr(m[0].error, "rank 1 failed"),
                  "%s", m[0].error);
}
END_TEST

static void padded_wide(member *m)
{
    m->l.exchange = MOE_EXCHANGE_PADDED;
    m->l.padded_rows = 2 * T;
}

/* A backward that rank 1 gets wrong, and then the same one right: as if nothing had been. */
static void run_refused_backward(member *m)
{
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    forward(m, s);
    MUST(m->status);
    if (m->rank == 1) m->b.dy = NULL;
    (void)member_note(m, moe_layer_backward(m->layer, m->pass, &m->b));
    m->b.dy = s->dy;
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
}

START_TEST(test_padded_backward_that_is_refused)
{
    member m[3];
    step want[3], s[3];
    run(3, padded_wide, m, want);
    run_as((crew){.ranks = 3, .run = run_refused_backward, .configure = padded_wide}, m, s);
    for (int r = 0; r < 3; r++) {
        ck_assert_int_eq(m[r].status, MOE_ERROR_INVALID_ARGUMENT);
        ck_assert_int_eq(memcmp(s[r].dx, want[r].dx, sizeof s[r].dx), 0);
    }
}
END_TEST

/* ---- replicas -------------------------------------------------------------------------------- */

static const int64_t EVERYWHERE[E] = {0, 1, 2, 3};

static void replicas_everywhere(member *m)
{
    m->e.num_experts = E;
    m->l.placement = EVERYWHERE;
    if (m->crew->test) m->f.flags = MOE_FORWARD_NO_SAVE;
}

START_TEST(test_replicas_give_the_same_outputs)
{
    member m[3];
    step want[3], s[3];
    run(3, NULL, m, want);
    run_as((crew){.ranks = 3, .run = run_step, .configure = replicas_everywhere, .test = m}, m, s);
    for (int r = 0; r < 3; r++) {
        ck_assert_int_eq(m[r].status, MOE_OK);
        ck_assert_int_eq(memcmp(s[r].y, want[r].y, sizeof s[r].y), 0);
        ck_assert_int_eq(s[r].report.rows_sent, 0); /* all at home */
    }
    run(3, replicas_everywhere, m, s);
    for (int r = 0; r < 3; r++) {
        ck_assert_int_eq(m[r].status, MOE_ERROR_NOT_SUPPORTED);
        ck_assert_msg(strstr(m[r].error, "replicas") || strstr(m[r].error, "failed"), "%s",
                      m[r].error);
    }
}
END_TEST

/* ---- placement that is none ------------------------------------------------------------------ */

static const int64_t TWICE[2] = {0, 0}, BEYOND[2] = {0, 4}, OTHERS[2] = {2, 3};

static void place_twice(member *m) { m->l.placement = m->rank ? OTHERS : TWICE; }
static void place_beyond(member *m) { m->l.placement = m->rank ? OTHERS : BEYOND; }

START_TEST(test_placement_is_checked_on_every_rank)
{
    member m[2];
    step s[2];
    run(2, place_twice, m, s);
    for (int r = 0; r < 2; r++) {
        ck_assert_int_eq(m[r].status, MOE_ERROR_INVALID_ARGUMENT);
        ck_assert_msg(strstr(m[r].error, "no rank's placement has expert 1"), "%s", m[r].error);
    }
    run(2, place_beyond, m, s);
    for (int r = 0; r < 2; r++) {
        ck_assert_int_eq(m[r].status, MOE_ERROR_INVALID_ARGUMENT);
        ck_assert_msg(strstr(m[r].error, "placement[1] of rank 0 is 4; there are 4 experts"), "%s",
                      m[r].error);
    }
}
END_TEST

/* So many slices that their numbers would not fit in memory; and the group goes on. */
static void far_too_many_slices(member *m) { m->l.expert_slices = INT32_MAX; }

static void run_too_many(member *m)
{
    (void)member_make(m, E);
    MUST(moe_comm_barrier(m->comm));
}

START_TEST(test_slices_are_counted_before_memory_is_asked_for)
{
    member m[2];
    crew c = {.ranks = 2, .run = run_too_many, .configure = far_too_many_slices};
    memset(m, 0, sizeof m);
    crew_run(&c, m);
    for (int r = 0; r < 2; r++) {
        ck_assert_int_eq(m[r].status, MOE_ERROR_INVALID_ARGUMENT);
        ck_assert_msg(strstr(m[r].error, "4 experts in slices, the pools of all ranks have 4"),
                      "%s", m[r].error);
    }
}
END_TEST

static void bad_layer_on_one(member *m)
{
    if (m->rank == 1) m->l.dropped = 9;
}

START_TEST(test_layer_refused_on_one_rank_is_refused_on_all)
{
    member m[3];
    step s[3];
    run(3, bad_layer_on_one, m, s);
    for (int r = 0; r < 3; r++) ck_assert_int_eq(m[r].status, MOE_ERROR_INVALID_ARGUMENT);
    ck_assert_msg(strstr(m[1].error, "dropped is 9"), "%s", m[1].error);
    ck_assert_msg(strstr(m[0].error, "rank 1 failed"), "%s", m[0].error);
}
END_TEST

/* What is another on the last of three ranks, and what all say of it. */
static const char *const OTHER[] = {"capacity_factor is 1.5 on rank 2 and 1.25 on rank 0",
                                    ON_DEVICE ? "dtype is 2 on rank 2 and 0 on rank 0"
                                              : "dtype is 0 on rank 2 and 1 on rank 0",
                                    "seed is 9 on rank 2 and 0 on rank 0",
                                    "d_out is 2 on rank 2 and 3 on rank 0",
                                    "layer_id is 4 on rank 2 and 0 on rank 0",
                                    "received is 3 on rank 2 and 0 on rank 0",
                                    "loss_batch is 1 on rank 2 and 0 on rank 0",
                                    "weight_position is 1 on rank 2 and 0 on rank 0",
                                    "gate kind is 1 on rank 2 and 0 on rank 0",
                                    "drop_policy is 3 on rank 2 and 0 on rank 0",
                                    "exchange_chunks is 3 on rank 2 and 1 on rank 0"};

static void differ(member *m)
{
    m->g.capacity_kind = MOE_CAPACITY_FACTOR, m->g.capacity_factor = 1.25;
    if (m->rank != 2) return;
    switch (*(const int *)m->crew->test) {
    case 0: m->g.capacity_factor = 1.5; break;
    case 1: m->g.dtype = m->e.dtype = ON_DEVICE ? MOE_DTYPE_BF16 : MOE_DTYPE_F32; break;
    case 2: m->g.seed = 9; break;
    case 3: m->e.d_out = 2; break;
    case 4: m->l.layer_id = 4; break;
    case 5: m->l.received = MOE_RECEIVED_CHUNK; break;
    case 6: m->l.loss_batch = MOE_BATCH_GLOBAL; break;
    case 7: m->e.weight_position = MOE_WEIGHT_ON_HIDDEN; break;
    case 8: m->g.kind = MOE_GATE_NOISY_TOP_K; break;
    case 9: m->g.drop_policy = MOE_DROP_SCORE; break;
    default: m->l.exchange_chunks = 3; break;
    }
}

START_TEST(test_layer_fields_are_compared)
{
    member m[3];
    step s[3];
    run_as((crew){.ranks = 3, .run = run_step, .configure = differ, .test = &_i}, m, s);
    for (int r = 0; r < 3; r++) {
        ck_assert_int_eq(m[r].status, MOE_ERROR_INVALID_ARGUMENT);
        ck_assert_msg(strstr(m[r].error, OTHER[_i]) != NULL, "%s", m[r].error);
    }
}
END_TEST

/* What cannot be with it, on every rank. */
static const char *const CLASH[] = {"exchange_chunks is 0", "exchange_chunks is 9",
                                    "exchange_chunks 2 clashes with exchange MOE_EXCHANGE_PADDED",
                                    "exchange_chunks 2 clashes with received MOE_RECEIVED_CHUNK"};

static void clash(member *m)
{
    int what = *(const int *)m->crew->test;
    m->l.exchange_chunks = what == 0 ? 0 : what == 1 ? MOE_COMM_REQUESTS + 1 : 2;
    if (what == 2) m->l.exchange = MOE_EXCHANGE_PADDED, m->l.padded_rows = 2 * T;
    if (what == 3) m->l.received = MOE_RECEIVED_CHUNK, m->l.max_received = 3;
}

START_TEST(test_what_clashes_with_chunks)
{
    member m[2];
    step s[2];
    run_as((crew){.ranks = 2, .run = run_step, .configure = clash, .test = &_i}, m, s);
    for (int r = 0; r < 2; r++) {
        ck_assert_int_eq(m[r].status, MOE_ERROR_INVALID_ARGUMENT);
        ck_assert_msg(strstr(m[r].error, CLASH[_i]) != NULL, "%s", m[r].error);
    }
}
END_TEST

/* Shared experts are on every rank, so they are alike in all that shapes their parameters. */
static void other_shared_bias(member *m)
{
    moe_experts_config e = m->e;
    e.num_experts = 1, e.bias = m->rank == 1;
    MUST(moe_experts_create(&m->l.shared, m->context, &e));
}

static void run_with_shared(member *m)
{
    (void)member_make(m, E);
    moe_experts_destroy(m->l.shared);
}

START_TEST(test_shared_experts_are_compared)
{
    member m[2];
    crew c = {.ranks = 2, .run = run_with_shared, .configure = other_shared_bias};
    memset(m, 0, sizeof m);
    crew_run(&c, m);
    for (int r = 0; r < 2; r++) {
        ck_assert_int_eq(m[r].status, MOE_ERROR_INVALID_ARGUMENT);
        ck_assert_msg(
            strstr(m[r].error, "bias of shared or residual is 1 on rank 1 and 0 on rank 0"), "%s",
            m[r].error);
    }
}
END_TEST

/* ---- secondary gates with their groups ------------------------------------------------------- */

static int wrong_group; /* what is wrong in the next layer */

static void by_group(member *m)
{
    static const int64_t OTHER_WAY[2][2] = {{2, 3}, {0, 1}};
    m->g.kind = MOE_GATE_HIERARCHICAL;
    m->g.expert_groups = 2, m->g.secondary = MOE_SECONDARY_WITH_GROUP;
    m->g.local_groups = wrong_group == 1 ? m->rank : 1;
    if (wrong_group == 2) m->l.placement = OTHER_WAY[m->rank];
    if (wrong_group == 3) m->l.exchange = MOE_EXCHANGE_PADDED, m->l.padded_rows = 20;
    if (wrong_group == 4) m->l.placement = EVERYWHERE, m->e.num_experts = E;
}

START_TEST(test_secondary_gates_are_where_their_experts_are)
{
    static const char *const SAYS[] = {
        "", "local_groups of all ranks are 1, the gate has 2 groups",
        "expert 0 is not on rank 0, which has the secondary gate of its group 0",
        "clashes with exchange MOE_EXCHANGE_PADDED", "experts have replicas"};
    member m[2];
    step s[2];
    for (wrong_group = 1; wrong_group < 5; wrong_group++) {
        run(2, by_group, m, s);
        for (int r = 0; r < 2; r++) {
            ck_assert_int_eq(m[r].status, MOE_ERROR_INVALID_ARGUMENT);
            ck_assert_msg(strstr(m[r].error, SAYS[wrong_group]) != NULL, "%s", m[r].error);
        }
    }
    wrong_group = 0;
    run(2, by_group, m, s);
    for (int r = 0; r < 2; r++) ck_assert_int_eq(m[r].status, MOE_OK);
}
END_TEST

START_TEST(test_secondary_gate_alone)
{
    moe_context *context = new_context();
    moe_gate *gate = NULL;
    moe_experts *experts = NULL;
    moe_layer *layer = NULL;
    moe_pass *pass = NULL;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_layer_config_init(&l, sizeof l));
    g.d_model = e.d_model = D, e.d_hidden = 2, g.num_experts = e.num_experts = E;
    g.secondary = MOE_SECONDARY_WITH_GROUP, g.local_groups = 1;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_create(&gate, context, &g));
    g.kind = MOE_GATE_HIERARCHICAL, g.expert_groups = 2, g.local_groups = 3;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_gate_create(&gate, context, &g));
    g.local_groups = 1;
    MUST(moe_gate_create(&gate, context, &g));
    MUST(moe_experts_create(&experts, context, &e));
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_pass_create_for_gate(&pass, gate, NULL));
    l.gate = gate, l.experts = experts;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &l));
    moe_gate_destroy(gate), moe_experts_destroy(experts), moe_context_destroy(context);
}
END_TEST

/* On the only rank they are all there, and what checks a layer of one rank checks this. */
static void run_alone(member *m)
{
    MUST(member_make(m, E));
    MUST(moe_check_gradients(m->layer, NULL, NULL));
}
static void by_group_alone(member *m)
{
    by_group(m);
    m->g.local_groups = 2;
}

START_TEST(test_secondary_gates_on_one_rank)
{
    member m = {0};
    crew c = {.ranks = 1, .run = run_alone, .configure = by_group_alone};
    crew_run(&c, &m);
}
END_TEST

/* ---- fields without a comm ------------------------------------------------------------------- */

START_TEST(test_fields_that_need_a_comm)
{
    moe_context *context = new_context();
    moe_experts *experts = NULL;
    moe_experts_config e;
    moe_layer *layer = NULL;
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = 2, e.num_experts = 1;
    MUST(moe_experts_create(&experts, context, &e));
    for (int i = 0; i < 9; i++) {
        if (ON_DEVICE && i == 3) continue; /* padded rows without a comm are a device's */
        moe_layer_config c;
        MUST(moe_layer_config_init(&c, sizeof c));
        c.experts = experts;
        switch (i) {
        case 0: c.expert_slices = 2; break;
        case 1: c.placement = EVERYWHERE; break;
        case 2: c.max_received = 3; break;
        case 3: c.exchange = MOE_EXCHANGE_PADDED, c.padded_rows = 1; break;
        case 4: c.exchange = 2; break;
        case 5: c.received = -1; break;
        case 6: c.padded_rows = 1; break;
        case 7: c.exchange_chunks = 2; break;
        default: c.loss_batch = 2; break;
        }
        REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &c));
        ck_assert_ptr_null(layer);
    }
    moe_experts_destroy(experts);
    e.num_experts = MOE_NO_EXPERTS;
    MUST(moe_experts_create(&experts, context, &e));
    moe_layer_config c;
    MUST(moe_layer_config_init(&c, sizeof c));
    c.experts = experts;
    REFUSED(MOE_ERROR_INVALID_ARGUMENT, moe_layer_create(&layer, &c));
    MUST(moe_experts_get_config(experts, &e));
    ck_assert_int_eq(e.num_experts, MOE_NO_EXPERTS);
    MUST(moe_experts_init_parameters(experts, 1));
    MUST(moe_experts_zero_gradients(experts, NULL));
    MUST(moe_experts_zero_touched_gradients(experts, NULL));
    moe_binding b;
    void *none[1] = {NULL};
    MUST(moe_binding_init(&b, sizeof b));
    b.data_per_expert = (const void *const *)none;
    MUST(moe_experts_bind(experts, 0, &b));
    moe_experts_destroy(experts), moe_context_destroy(context);
}
END_TEST

/* Rounds of a pool of parts would carry sums from one part to another, and a chunk is a range of
 * one pool's experts. */
START_TEST(test_rounds_and_chunks_are_not_for_parts)
{
    moe_context *context = new_context();
    moe_comm *comm = NULL;
    moe_experts *part[2], *pool = NULL;
    moe_experts_config e;
    moe_layer *layer = NULL;
    moe_layer_config c;
    MUST(moe_comm_create_self(&comm, context));
    MUST(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.num_experts = 1;
    for (int i = 0; i < 2; i++) {
        e.d_hidden = 2 + i;
        MUST(moe_experts_create(&part[i], context, &e));
    }
    MUST(moe_experts_create_parts(&pool, part, 2));
    MUST(moe_layer_config_init(&c, sizeof c));
    c.experts = pool, c.comm = comm, c.max_received = 2;
    c.received = MOE_RECEIVED_CHUNK;
    REFUSED(MOE_ERROR_NOT_SUPPORTED, moe_layer_create(&layer, &c));
    c.received = MOE_RECEIVED_ERROR, c.exchange_chunks = 2;
    REFUSED(MOE_ERROR_NOT_SUPPORTED, moe_layer_create(&layer, &c));
    c.exchange_chunks = 1;
    MUST(moe_layer_create(&layer, &c));
    moe_layer_destroy(layer), moe_experts_destroy(pool), moe_comm_destroy(comm);
    moe_experts_destroy(part[0]), moe_experts_destroy(part[1]), moe_context_destroy(context);
}
END_TEST

/* ---- phases ---------------------------------------------------------------------------------- */

/* Two passes in flight at once do what they do one after the other. */
static void run_two(member *m)
{
    step *s = (step *)m->own;
    moe_pass *second = NULL;
    moe_forward_args f2;
    moe_backward_args b2;
    MUST(member_make(m, E));
    MUST(moe_pass_create(&second, m->layer, NULL));
    scalar y2[T * D], dx2[T * D];
    draw(s->x, m->rank * T * D, T * D, 3), draw(s->dy, m->rank * T * D, T * D, 9);
    m->f.tokens = T, m->f.x = s->x, m->f.y = s->y, m->b.dy = s->dy, m->b.dx = s->dx;
    f2 = m->f, b2 = m->b, f2.y = y2, b2.dx = dx2;
    f2.tokens = T / 2;
    MUST(moe_layer_forward_start(m->layer, m->pass, &m->f));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_forward(m->layer, m->pass, &m->f));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_backward(m->layer, m->pass, &m->b));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_pass_reserve(m->pass, 1, 1, 1));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_pass_trim(m->pass));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_backward_finish(m->layer, m->pass));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_forward_work(m->layer, second));
    MUST(moe_layer_forward_start(m->layer, second, &f2));
    MUST(moe_layer_forward_work(m->layer, m->pass));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_forward_work(m->layer, m->pass));
    MUST(moe_layer_forward_work(m->layer, second));
    MUST(moe_layer_forward_finish(m->layer, m->pass));
    MUST(moe_layer_forward_finish(m->layer, second));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_forward_finish(m->layer, second));
    MUST(moe_layer_backward_start(m->layer, m->pass, &m->b));
    REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_forward_finish(m->layer, m->pass));
    MUST(moe_layer_backward_finish(m->layer, m->pass));
    scalar y1[T * D], dx1[T * D], want_y2[T * D], want_dx2[T * D];
    memcpy(y1, s->y, sizeof y1), memcpy(dx1, s->dx, sizeof dx1);
    MUST(moe_layer_backward(m->layer, second, &b2));
    memcpy(want_y2, y2, sizeof y2), memcpy(want_dx2, dx2, sizeof dx2);
    MUST(moe_layer_forward(m->layer, m->pass, &m->f));
    MUST(moe_layer_backward(m->layer, m->pass, &m->b));
    MUST(moe_layer_forward(m->layer, second, &f2));
    MUST(moe_layer_backward(m->layer, second, &b2));
    ck_assert_int_eq(memcmp(y1, s->y, sizeof y1), 0);
    ck_assert_int_eq(memcmp(dx1, s->dx, sizeof dx1), 0);
    ck_assert_int_eq(memcmp(want_y2, y2, T / 2 * D * sizeof(scalar)), 0);
    ck_assert_int_eq(memcmp(want_dx2, dx2, T / 2 * D * sizeof(scalar)), 0);
    moe_pass_destroy(second);
}

START_TEST(test_phases_of_two_passes)
{
    member m[3];
    step s[3];
    run_as((crew){.ranks = 3, .run = run_two}, m, s);
}
END_TEST

/* A pass that is destroyed in the middle ends the group; nobody waits. */
static void run_abandoned(member *m)
{
    step *s = (step *)m->own;
    MUST(member_make(m, E));
    draw(s->x, 0, T * D, 3);
    m->f.tokens = T, m->f.x = s->x, m->f.y = s->y;
    (void)member_note(m, moe_layer_forward_start(m->layer, m->pass, &m->f));
    if (m->rank == 1) {
        moe_pass_destroy(m->pass), m->pass = NULL;
        return;
    }
    if (m->status == MOE_OK) (void)member_note(m, moe_layer_forward_finish(m->layer, m->pass));
}

START_TEST(test_phases_abandoned)
{
    member m[2];
    step s[2];
    run_as((crew){.ranks = 2, .run = run_abandoned}, m, s);
    ck_assert_int_eq(m[0].status, MOE_ERROR_TRANSPORT);
}
END_TEST

START_TEST(test_phases_on_one_rank)
{
    family f;
    family_batch b;
    moe_context *context = new_context();
    moe_pass *pass = NULL;
    for (uint64_t number = 0; number < 6; number++) {
        family_draw(&f, MOE_GATE_TOP_K, number, REAL);
        family_make(&f, context), family_batch_make(&b, &f);
        MUST(moe_pass_create(&pass, f.layer, NULL));
        MUST(moe_layer_forward(f.layer, pass, &b.fwd));
        MUST(moe_layer_backward(f.layer, pass, &b.bwd));
        uint64_t want = family_hash(&f, &b, pass);
        MUST(moe_layer_zero_gradients(f.layer, NULL));
        MUST(moe_layer_forward_start(f.layer, pass, &b.fwd));
        if (number % 2) MUST(moe_layer_forward_work(f.layer, pass));
        MUST(moe_layer_forward_finish(f.layer, pass));
        MUST(moe_layer_backward_start(f.layer, pass, &b.bwd));
        REFUSED(MOE_ERROR_INVALID_STATE, moe_layer_backward(f.layer, pass, &b.bwd));
        MUST(moe_layer_backward_finish(f.layer, pass));
        ck_assert(family_hash(&f, &b, pass) == want);
        MUST(moe_layer_backward_start(f.layer, pass, &b.bwd));
        moe_pass_destroy(pass); /* gives gate and pool back */
        MUST(moe_pass_create(&pass, f.layer, NULL));
        MUST(moe_layer_forward(f.layer, pass, &b.fwd));
        MUST(moe_layer_backward(f.layer, pass, &b.bwd));
        moe_pass_destroy(pass), family_batch_free(&b), family_free(&f);
    }
    moe_context_destroy(context);
}
END_TEST

/* ---- report ---------------------------------------------------------------------------------- */

START_TEST(test_report_counts_rows_and_bytes)
{
    member m[2];
    step s[2];
    int64_t row = ON_DEVICE ? 16 : (D + 1) * 8, back = ON_DEVICE ? 16 : D * 8, words = 8;
    run(2, NULL, m, s);
    for (int r = 0; r < 2; r++) {
        int64_t there = s[r].rows[2 * (1 - r)] + s[r].rows[2 * (1 - r) + 1];
        int64_t here = s[1 - r].rows[2 * r] + s[1 - r].rows[2 * r + 1];
        const moe_pass_report *p = &s[r].report;
        double seconds = 0;
        ck_assert_int_eq(p->rows_sent, there);
        ck_assert_int_eq(p->rows_received, here);
        ck_assert_int_eq(p->rounds, 1);
        /* header and counts, answers, rows; results */
        ck_assert_int_eq(p->forward_bytes_sent,
                         (3 + 2 + 3 + 2) * words + there * row + here * back);
        ck_assert_int_eq(p->forward_bytes_received,
                         (3 + 2 + 3 + 2) * words + here * row + there * back);
        ck_assert_int_eq(p->backward_bytes_sent, 3 * words + there * back + here * row);
        for (int i = 0; i < MOE_TIME_SLOTS; i++) {
            ck_assert(p->forward_seconds[i] >= 0 && p->backward_seconds[i] >= 0);
            seconds += p->forward_seconds[i];
        }
        ck_assert(seconds > 0);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ranks, bounds");
    TCase *c = tcase_create("bounds");
    tcase_set_timeout(c, 300);
    tcase_add_test(c, test_bound_error_is_on_every_rank);
    tcase_add_loop_test(c, test_bound_drops_by_position, 0, 6);
    tcase_add_test(c, test_bound_drops_by_score);
    tcase_add_test(c, test_bound_dropped_rows_are_gone);
    tcase_add_test(c, test_rounds_sum_as_one);
    tcase_add_test(c, test_rounds_are_counted);
    if (!ON_DEVICE)
        tcase_add_test(c, test_rounds_and_chunks_are_not_for_parts); /* which has no parts */
    if (!OVER_NCCL) { /* where nobody waits for the word */
        tcase_add_test(c, test_padded_rows_that_do_not_fit);
        tcase_add_test(c, test_padded_backward_that_is_refused);
    }
    tcase_add_test(c, test_replicas_give_the_same_outputs);
    tcase_add_test(c, test_placement_is_checked_on_every_rank);
    tcase_add_test(c, test_slices_are_counted_before_memory_is_asked_for);
    tcase_add_test(c, test_layer_refused_on_one_rank_is_refused_on_all);
    tcase_add_loop_test(c, test_layer_fields_are_compared, 0, (int)COUNT(OTHER));
    tcase_add_loop_test(c, test_what_clashes_with_chunks, 0, (int)COUNT(CLASH));
    tcase_add_test(c, test_shared_experts_are_compared);
    tcase_add_test(c, test_secondary_gates_are_where_their_experts_are);
    tcase_add_test(c, test_secondary_gate_alone);
    tcase_add_test(c, test_secondary_gates_on_one_rank);
    tcase_add_test(c, test_fields_that_need_a_comm);
    tcase_add_test(c, test_phases_of_two_passes);
    if (!OVER_NCCL) tcase_add_test(c, test_phases_abandoned); /* the stream waits, not the host */
    tcase_add_test(c, test_phases_on_one_rank);
    tcase_add_test(c, test_report_counts_rows_and_bytes);
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
