/* check_ranks_faults.c - a layer on ranks when something fails: each exchange in turn, each
 * allocation in turn, and numbers that arrive changed. Nobody hangs, every rank returns, and
 * everything is freed. */
#include "support/crew.h"
#include "support/layer_case.h"
#include "support/real.h"
#include "support/suite.h"

#include <check.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { T = 5, E = 4, D = CREW_D, RANKS = 3 };

/* ---- a transport that fails ------------------------------------------------------------------ */

enum { FAIL_NEVER, FAIL_START, FAIL_TEST, CHANGE };

typedef struct flight {
    int32_t request;
    bool used, doomed;
    void *recv;
    const void *send;
    int64_t bytes, send_bytes;
} flight;

/* A table over a communicator of the world; its n-th exchange fails, or arrives changed. */
typedef struct faulty {
    moe_comm *inner;
    int32_t what;
    int64_t n, seen;
    int64_t word;     /* CHANGE: which */
    uint64_t pattern; /* and with what */
    bool happened;
    bool keeps; /* what has failed cannot be withdrawn */
    flight slot[MOE_COMM_REQUESTS];
} faulty;

static int32_t faulty_start(void *user, const moe_exchange *e, void **request)
{
    faulty *f = user;
    int64_t number = f->seen++;
    int i = 0;
    while (f->slot[i].used) i++;
    *request = &f->slot[i];
    if (f->what == FAIL_START && number == f->n) {
        f->happened = true;
        return 7;
    }
    if (moe_comm_exchange_start(f->inner, e, &f->slot[i].request) != MOE_OK) return 8;
    f->slot[i].used = true;
    f->slot[i].doomed = f->what >= FAIL_TEST && number == f->n;
    f->slot[i].recv = e->recv;
    f->slot[i].bytes = e->recv_begin[moe_comm_size(f->inner)] * e->row_bytes;
    f->slot[i].send = e->send;
    f->slot[i].send_bytes = e->send_begin[e->to_all ? 1 : moe_comm_size(f->inner)] * e->row_bytes;
    return 0;
}

static int32_t faulty_test(void *user, void *request, int32_t *done)
{
    faulty *f = user;
    flight *s = request;
    if (s->doomed && f->what == FAIL_TEST) {
        f->happened = true;
        return 9;
    }
    if (moe_comm_exchange_test(f->inner, s->request, done) != MOE_OK) return 10;
    if (!*done) return 0;
    s->used = false;
    if (s->doomed && (f->word + 1) * 8 <= s->bytes) {
        uint64_t value;
        memcpy(&value, (char *)s->recv + f->word * 8, 8);
        value ^= f->pattern;
        memcpy((char *)s->recv + f->word * 8, &value, 8);
        f->happened = true;
    }
    return 0;
}

static void faulty_abort(void *user) { moe_comm_abort(((faulty *)user)->inner); }

/* The inner communicator lets go of its requests when it goes. */
static int64_t faulty_cancel(void *user, void *request)
{
    faulty *f = user;
    (void)request;
    moe_comm_abort(f->inner);
    moe_comm_destroy(f->inner);
    f->inner = NULL;
    return 0;
}
static void faulty_release(void *user)
{
    faulty *f = user;
    moe_comm_destroy(f->inner);
    f->inner = NULL;
}

/* Puts it between the member and one of its communicators. */
static void interpose(member *m, moe_comm **comm, faulty *f)
{
    moe_collectives t;
    MUST(moe_collectives_init(&t, sizeof t));
    f->inner = *comm, *comm = NULL;
    t.user = f, t.rank = moe_comm_rank(f->inner), t.size = moe_comm_size(f->inner), t.timeout = 30;
    t.capabilities = MOE_COMM_HOST_MEMORY;
    t.exchange_start = faulty_start, t.exchange_test = faulty_test;
    t.exchange_cancel = f->keeps ? NULL : faulty_cancel;
    t.abort = faulty_abort, t.release = faulty_release;
    MUST(moe_comm_create(comm, m->context, &t));
}

/* ---- memory that is counted, and fails ------------------------------------------------------- */

typedef struct heap {
    atomic_long blocks;
    long n, seen;
    bool counts, happened; /* from when the layer is made */
} heap;

static void *heap_alloc(void *user, uint64_t bytes, uint64_t alignment)
{
    heap *h = user;
    if (h->counts && h->seen++ == h->n) {
        h->happened = true;
        return NULL;
    }
    void *memory = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (memory) atomic_fetch_add(&h->blocks, 1);
    return memory;
}
static void heap_free(void *user, void *memory, uint64_t bytes)
{
    (void)bytes;
    atomic_fetch_sub(&((heap *)user)->blocks, 1);
    free(memory);
}

static void use_heap(member *m, heap *h, long n)
{
    *h = (heap){.n = n};
    MUST(moe_context_config_init(&m->context_config, sizeof m->context_config));
    m->context_config.threads = 1;
    m->context_config.alloc = heap_alloc, m->context_config.free = heap_free;
    m->context_config.alloc_user = h;
}

/* ---- the work -------------------------------------------------------------------------------- */

/* The last three by way of nodes; what fails is comm of them, rail_comm with a node for each rank,
 * or node_comm with one node. */
enum { PLAIN, CHUNKS, PADDED, BY_SCORE, GLOBAL, BY_GROUP, IN_PARTS, NODES, RAIL, NODE, WAYS };

static int32_t nodes_of(int32_t way) { return way < NODES ? 0 : way == NODE ? 1 : RANKS; }
/* Exchanges of what fails, of a trial in which nothing does, are more than: */
static int64_t exchanges_of(int32_t way) { return way > NODES ? 2 : 5; }

typedef struct trial {
    faulty f;
    heap h;
    int32_t way;
    int32_t done; /* calls that returned MOE_OK */
    moe_status ended;
} trial;

static void configure(member *m)
{
    const trial *t = (const trial *)m->own;
    if (t->way == CHUNKS) m->l.received = MOE_RECEIVED_CHUNK, m->l.max_received = 3 + m->rank;
    if (t->way == IN_PARTS) m->l.exchange_chunks = 2;
    if (t->way == PADDED) m->l.exchange = MOE_EXCHANGE_PADDED, m->l.padded_rows = 2 * T;
    if (t->way == BY_SCORE) m->l.received = MOE_RECEIVED_DROP_SCORE, m->l.max_received = 8;
    if (t->way == BY_GROUP) {
        m->g.kind = MOE_GATE_HIERARCHICAL;
        m->g.expert_groups = E, m->g.top_groups = 2, m->g.top_k = 1;
        m->g.secondary = MOE_SECONDARY_WITH_GROUP;
        m->g.local_groups = member_share(m->rank, RANKS, E);
        m->f.flags = MOE_FORWARD_TRAIN;
    }
    if (t->way == GLOBAL) {
        m->l.loss_batch = MOE_BATCH_GLOBAL;
        m->g.switch_weight = 0.1, m->g.sequence_weight = 0.1;
    }
}

static void count_from_now(member *m) { ((trial *)m->own)->h.counts = true; }

#define STEP(call)                       \
    do {                                 \
        t->ended = member_note(m, call); \
        if (t->ended != MOE_OK) return;  \
        t->done++;                       \
    } while (0)

/* Calls in turn until one fails. */
static void run_calls(member *m)
{
    trial *t = (trial *)m->own;
    scalar x[T * D], y[T * D], dx[T * D];
    double squared;
    moe_comm **comm = t->way == RAIL ? &m->rail_comm : t->way == NODE ? &m->node_comm : &m->comm;
    if (t->f.what != FAIL_NEVER) interpose(m, comm, &t->f);
    for (int i = 0; i < T * D; i++) x[i] = (scalar)((i * 7 + m->rank * 5) % 11 - 5);
    t->ended = member_make(m, E);
    if (t->ended != MOE_OK) return;
    t->done = 1;
    m->f.tokens = T, m->f.x = x, m->f.y = y, m->b.dy = x, m->b.dx = dx;
    STEP(moe_layer_forward(m->layer, m->pass, &m->f));
    STEP(moe_layer_backward(m->layer, m->pass, &m->b));
    STEP(moe_layer_reduce_gradients(m->layer, NULL));
    STEP(moe_layer_gradient_norm(m->layer, &squared, NULL));
}

static void run_trial(trial *t, member *m, double timeout)
{
    crew c = {.ranks = RANKS,
              .run = run_calls,
              .configure = configure,
              .ready = count_from_now,
              .timeout = timeout,
              .nodes = nodes_of(t[0].way)};
    for (int r = 0; r < RANKS; r++) {
        m[r].own = &t[r], t[r].way = t[0].way;
        use_heap(&m[r], &t[r].h, t[r].h.n);
    }
    crew_run(&c, m);
    for (int r = 0; r < RANKS; r++)
        ck_assert_msg(atomic_load(&t[r].h.blocks) == 0, "rank %d keeps %ld blocks", r,
                      (long)atomic_load(&t[r].h.blocks));
}

static void begin_trial(trial *t, member *m, int32_t way)
{
    memset(t, 0, RANKS * sizeof *t), memset(m, 0, RANKS * sizeof *m);
    for (int r = 0; r < RANKS; r++) t[r].h.n = -1;
    t[0].way = way;
}

/* The n-th exchange of rank 1 fails, for every n there is: it says so, and the others' calls end
 * with what it was. */
static void sweep_exchanges(int32_t what, int32_t way)
{
    for (int64_t n = 0;; n++) {
        trial t[RANKS];
        member m[RANKS];
        begin_trial(t, m, way);
        t[1].f.what = what, t[1].f.n = n;
        run_trial(t, m, 60);
        if (!t[1].f.happened) {
            for (int r = 0; r < RANKS; r++)
                ck_assert_msg(t[r].done == 5, "%d calls: %s", (int)t[r].done, m[r].error);
            ck_assert_int_gt(n, exchanges_of(way));
            return;
        }
        ck_assert_int_eq(t[1].ended, MOE_ERROR_TRANSPORT);
        ck_assert_msg(strstr(m[1].error, "rank 1 of 3: exchange_"), "%s", m[1].error);
        for (int r = 0; r < RANKS; r++) { /* another may be a call behind or ahead */
            ck_assert_int_ge(t[r].done, t[1].done - 1);
            ck_assert_int_le(t[r].done, t[1].done + 1);
            if (r != 1 && t[r].ended != MOE_OK)
                ck_assert_msg(t[r].ended == MOE_ERROR_TRANSPORT && strstr(m[r].error, "rank "),
                              "%d: %s", (int)n, m[r].error);
        }
    }
}

START_TEST(test_every_exchange_that_fails_to_start) { sweep_exchanges(FAIL_START, _i); }
END_TEST
START_TEST(test_every_exchange_that_fails_on_its_way) { sweep_exchanges(FAIL_TEST, _i); }
END_TEST

/* The n-th allocation of rank 1 fails, for every n there is. */
START_TEST(test_every_allocation_of_one_rank)
{
    int32_t agreed = 0;
    for (long n = 0;; n++) {
        trial t[RANKS];
        member m[RANKS];
        begin_trial(t, m, _i);
        t[1].h.n = n;
        run_trial(t, m, 60);
        if (!t[1].h.happened) {
            ck_assert_int_eq(t[0].done, 5);
            break;
        }
        if (t[1].done == 5) continue; /* it was for something that can be done without */
        ck_assert_msg(t[1].ended == MOE_ERROR_OUT_OF_MEMORY, "%ld: %s", n, m[1].error);
        for (int r = 0; r < RANKS; r++)
            ck_assert_msg(t[r].ended != MOE_OK || t[r].done == 5, "%ld, rank %d", n, r);
        agreed += t[0].ended == MOE_ERROR_OUT_OF_MEMORY;
    }
    ck_assert_int_gt(agreed, 0);
}
END_TEST

/* ---- memory that a transport keeps ----------------------------------------------------------- */

/* Blocks of a context. What the transport of `f` keeps is not among those given back. */
typedef struct keeper {
    trial t;
    void *block[500];
    uint64_t bytes[500];
    int count, gave_kept;
} keeper;

static void *keeper_alloc(void *user, uint64_t bytes, uint64_t alignment)
{
    keeper *k = user;
    void *memory = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    ck_assert(memory && k->count < 500);
    k->block[k->count] = memory, k->bytes[k->count++] = bytes;
    return memory;
}

static bool touches(const void *a, uint64_t a_bytes, const void *b, int64_t b_bytes)
{
    uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
    return b_bytes > 0 && x < y + (uintptr_t)b_bytes && y < x + a_bytes;
}

static void keeper_free(void *user, void *memory, uint64_t bytes)
{
    keeper *k = user;
    int i = 0;
    for (int s = 0; s < MOE_COMM_REQUESTS; s++) {
        const flight *f = &k->t.f.slot[s];
        bool kept = k->t.f.happened && f->used && f->doomed;
        k->gave_kept += kept && (touches(memory, bytes, f->recv, f->bytes) ||
                                 touches(memory, bytes, f->send, f->send_bytes));
    }
    while (k->block[i] != memory) i++;
    k->count--;
    k->block[i] = k->block[k->count], k->bytes[i] = k->bytes[k->count];
    free(memory);
}

/* The n-th exchange of rank 1 fails and cannot be withdrawn: its memory outlives all objects. */
START_TEST(test_memory_that_a_transport_keeps)
{
    for (int64_t n = 0, kept = 0;; n++) {
        keeper k[RANKS];
        member m[RANKS];
        crew c = {.ranks = RANKS, .run = run_calls, .configure = configure, .nodes = nodes_of(_i)};
        memset(k, 0, sizeof k), memset(m, 0, sizeof m);
        for (int r = 0; r < RANKS; r++) {
            moe_context_config *config = &m[r].context_config;
            m[r].own = &k[r].t, k[r].t.way = _i;
            MUST(moe_context_config_init(config, sizeof *config));
            config->threads = 1, config->alloc_user = &k[r];
            config->alloc = keeper_alloc, config->free = keeper_free;
        }
        k[1].t.f.what = FAIL_TEST, k[1].t.f.n = n, k[1].t.f.keeps = true;
        crew_run(&c, m);
        ck_assert_msg(k[1].gave_kept == 0, "exchange %d: freed under way", (int)n);
        ck_assert(k[0].count == 0 && k[2].count == 0);
        kept += k[1].count;
        while (k[1].count > 0) free(k[1].block[--k[1].count]);
        if (k[1].t.f.happened) continue;
        ck_assert_int_gt(kept, 0);
        return;
    }
}
END_TEST

/* A word of the n-th exchange arrives changed at rank 1: whatever comes of it, every rank
 * returns. */
START_TEST(test_changed_words)
{
    static const uint64_t PATTERN[] = {1, (uint64_t)1 << 33, (uint64_t)1 << 63};
    int32_t refused = 0;
    int64_t first = _i > NODES ? 0 : 2; /* rows and records of nodes are changed as well */
    for (int64_t n = first; n < first + 4; n++)
        for (int64_t word = 0; word < 9; word++) {
            if (word % 3 == _i % 3 && n > 3) continue;
            trial t[RANKS];
            member m[RANKS];
            begin_trial(t, m, _i);
            t[1].f.what = CHANGE, t[1].f.n = n, t[1].f.word = word;
            t[1].f.pattern = PATTERN[(n + word) % 3];
            run_trial(t, m, 4);
            for (int r = 0; r < RANKS; r++)
                if (t[r].ended != MOE_OK) {
                    ck_assert_int_ne(m[r].error[0], 0);
                    ck_assert_str_ne(moe_status_name(t[r].ended), "unknown status");
                }
            refused += t[1].ended != MOE_OK;
        }
    ck_assert_int_gt(refused, 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("ranks, faults");
    TCase *c = tcase_create("faults");
    tcase_set_timeout(c, 300);
    tcase_add_loop_test(c, test_every_exchange_that_fails_to_start, 0, WAYS);
    tcase_add_loop_test(c, test_every_exchange_that_fails_on_its_way, 0, WAYS);
    tcase_add_loop_test(c, test_every_allocation_of_one_rank, 0, WAYS);
    tcase_add_loop_test(c, test_changed_words, 0, WAYS);
    if (!ON_DEVICE) /* what a transport has there is of the host's own allocator */
        tcase_add_loop_test(c, test_memory_that_a_transport_keeps, 0, WAYS);
    suite_add_tcase(suite, c);
    return run_suite(suite, 1);
}
