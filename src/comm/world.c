/* world.c - ranks as threads of one process, and the group of one rank, which is a world of one.
 *
 * A rank posts what it sends under the number of the exchange; each of the others copies its part
 * from there into its own buffer and notes that it has. An exchange is done on a rank when it has
 * copied from all and all have copied from it; asking for one makes all of a rank's go on. Copies
 * run outside the lock; giving up waits for those that are on their way. */
#include "internal.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

/* What a rank has to give in one exchange. */
typedef struct posting {
    moe_exchange e;
    int64_t number;  /* of the exchange; counted by every rank alike */
    int32_t left;    /* ranks that have not copied yet */
    int32_t readers; /* that are copying */
    bool active;
    uint8_t *taken_by; /* [P] */
    uint8_t *got;      /* [P] from whom this rank has copied */
} posting;

typedef struct world_rank {
    moe_world *world;
    int32_t rank;
    int64_t next;   /* number of the next exchange */
    int32_t silent; /* the first rank that it waited for in vain, or -1 */
    bool here;
    posting post[MOE_COMM_REQUESTS];
    char why[160];
} world_rank;

struct moe_world {
    atomic_int references;
    moe_context *context;
    int32_t size;
    pthread_mutex_t lock;
    bool aborted;
    int32_t aborter, silent; /* of that rank */
    world_rank *ranks;       /* [P] */
    uint8_t *bytes;          /* [P][REQUESTS][2][P] taken_by and got */
};

/* ---- life ------------------------------------------------------------------------------------ */

static int64_t ranks_bytes(const moe_world *w) { return w->size * (int64_t)sizeof *w->ranks; }
static int64_t marks_bytes(const moe_world *w)
{
    return (int64_t)w->size * MOE_COMM_REQUESTS * 2 * w->size;
}

moe_status moe_world_create(moe_world **world, moe_context *context, int32_t size)
{
    const char *function = __func__;
    if (!world || !context) REFUSE_ARGUMENT("%s is NULL", world ? "context" : "world");
    MOE_TRY(moe__check_range("size", size, 1, 4096, function));
    moe_world *w = moe__alloc_zeroed(context, sizeof *w);
    if (!w) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for the world");
    w->context = context;
    w->size = size;
    w->ranks = moe__alloc_zeroed(context, ranks_bytes(w));
    w->bytes = moe__alloc_zeroed(context, marks_bytes(w));
    bool locked = w->ranks && w->bytes && pthread_mutex_init(&w->lock, NULL) == 0;
    if (!locked) {
        bool memory = !w->ranks || !w->bytes;
        moe__free(context, w->ranks, ranks_bytes(w));
        moe__free(context, w->bytes, marks_bytes(w));
        moe__free(context, w, sizeof *w);
        if (memory) REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for %d ranks", (int)size);
        REFUSE(MOE_ERROR_SYSTEM, "no lock");
    }
    for (int32_t r = 0; r < size; r++) {
        w->ranks[r].world = w;
        w->ranks[r].rank = r;
        w->ranks[r].silent = -1;
        for (int32_t i = 0; i < MOE_COMM_REQUESTS; i++) {
            uint8_t *marks = w->bytes + ((int64_t)r * MOE_COMM_REQUESTS + i) * 2 * size;
            w->ranks[r].post[i].taken_by = marks;
            w->ranks[r].post[i].got = marks + size;
        }
    }
    atomic_init(&w->references, 1);
    moe__context_retain(context);
    *world = w;
    return MOE_OK;
}

void moe_world_destroy(moe_world *world)
{
    if (!world || atomic_fetch_sub(&world->references, 1) != 1) return;
    moe_context *context = world->context;
    (void)pthread_mutex_destroy(&world->lock);
    moe__free(context, world->ranks, ranks_bytes(world));
    moe__free(context, world->bytes, marks_bytes(world));
    moe__free(context, world, sizeof *world);
    moe_context_destroy(context);
}

/* ---- the table ------------------------------------------------------------------------------- */

static int32_t world_start(void *user, const moe_exchange *exchange, void **request)
{
    world_rank *me = user;
    moe_world *w = me->world;
    posting *p = NULL;
    (void)pthread_mutex_lock(&w->lock);
    for (int32_t i = 0; i < MOE_COMM_REQUESTS && !p; i++)
        if (!me->post[i].active) p = &me->post[i];
    if (p) { /* there is one: the communicator starts no more */
        p->e = *exchange;
        p->number = me->next++;
        p->left = w->size;
        p->active = true;
        memset(p->taken_by, 0, (size_t)w->size);
        memset(p->got, 0, (size_t)w->size);
    }
    (void)pthread_mutex_unlock(&w->lock);
    *request = p;
    return p ? 0 : 1;
}

static posting *posting_of(world_rank *from, int64_t number)
{
    for (int32_t i = 0; i < MOE_COMM_REQUESTS; i++)
        if (from->post[i].active && from->post[i].number == number) return &from->post[i];
    return NULL;
}

/* Checks that what `from` gives is what this rank expects. Returns 1 and says why if not. */
static int32_t differs(world_rank *me, const posting *mine, const world_rank *from,
                       const posting *theirs, int64_t *rows)
{
    const moe_exchange *a = &mine->e, *b = &theirs->e;
    int64_t expected = a->recv_begin[from->rank + 1] - a->recv_begin[from->rank];
    *rows = b->to_all ? b->send_begin[1] : b->send_begin[me->rank + 1] - b->send_begin[me->rank];
    if (a->row_bytes == b->row_bytes && expected == *rows) return 0;
    (void)snprintf(me->why, sizeof me->why,
                   "in exchange %lld rank %d sends %lld rows of %lld bytes, here %lld of %lld are "
                   "expected",
                   (ll)mine->number, (int)from->rank, (ll)*rows, (ll)b->row_bytes, (ll)expected,
                   (ll)a->row_bytes);
    return 1;
}

/* Copies from one rank, if it has come. The lock is held, but not while copying. */
static int32_t copy_from(world_rank *me, posting *mine, world_rank *from)
{
    moe_world *w = me->world;
    posting *theirs = posting_of(from, mine->number);
    int64_t rows;
    if (!theirs) {
        if (from->here || from->next == 0) return 0;
        (void)snprintf(me->why, sizeof me->why, "rank %d has left", (int)from->rank);
        return 1;
    }
    if (differs(me, mine, from, theirs, &rows)) return 1;
    const moe_exchange *a = &mine->e, *b = &theirs->e;
    int64_t bytes = a->row_bytes, first = b->to_all ? 0 : b->send_begin[me->rank];
    theirs->readers++;
    (void)pthread_mutex_unlock(&w->lock);
    if (rows > 0)
        memcpy((char *)a->recv + a->recv_begin[from->rank] * bytes,
               (const char *)b->send + first * bytes, (size_t)(rows * bytes));
    (void)pthread_mutex_lock(&w->lock);
    theirs->readers--;
    theirs->taken_by[me->rank] = 1;
    theirs->left--;
    mine->got[from->rank] = 1;
    return 0;
}

/* Copies what has come for one exchange. */
static int32_t progress(world_rank *me, posting *mine)
{
    int32_t bad = 0;
    for (int32_t p = 0; p < me->world->size && !bad; p++)
        if (!mine->got[p]) bad = copy_from(me, mine, &me->world->ranks[p]);
    return bad;
}

/* Whether this rank has copied from all and all have copied from it. */
static bool complete(const world_rank *me, const posting *mine)
{
    int32_t missing = mine->left;
    for (int32_t p = 0; p < me->world->size; p++) missing += !mine->got[p];
    return missing == 0;
}

static void say_aborted(world_rank *me)
{
    const moe_world *w = me->world;
    if (w->silent >= 0)
        (void)snprintf(me->why, sizeof me->why, "rank %d gave up waiting for rank %d",
                       (int)w->aborter, (int)w->silent);
    else
        (void)snprintf(me->why, sizeof me->why, "rank %d gave up", (int)w->aborter);
}

/* All of this rank's exchanges go on, whichever is asked for: others may wait for another first.
 * What is complete stays so, whoever gives up after it. */
static int32_t world_test(void *user, void *request, int32_t *done)
{
    world_rank *me = user;
    moe_world *w = me->world;
    posting *mine = request;
    int32_t bad = 0;
    (void)pthread_mutex_lock(&w->lock);
    for (int32_t i = 0; i < MOE_COMM_REQUESTS && !bad && !w->aborted; i++)
        if (me->post[i].active) bad = progress(me, &me->post[i]);
    *done = !bad && complete(me, mine);
    if (*done) {
        mine->active = false;
    } else if (!bad && w->aborted) {
        say_aborted(me);
        bad = 1;
    }
    (void)pthread_mutex_unlock(&w->lock);
    return bad;
}

static int64_t world_cancel(void *user, void *request)
{
    world_rank *me = user;
    posting *mine = request;
    (void)pthread_mutex_lock(&me->world->lock);
    while (mine->readers > 0) {
        (void)pthread_mutex_unlock(&me->world->lock);
        (void)sched_yield();
        (void)pthread_mutex_lock(&me->world->lock);
    }
    mine->active = false;
    (void)pthread_mutex_unlock(&me->world->lock);
    return 0;
}

static void world_missing(void *user, void *request, uint8_t *missing)
{
    world_rank *me = user;
    const posting *mine = request;
    (void)pthread_mutex_lock(&me->world->lock);
    me->silent = -1;
    for (int32_t p = 0; p < me->world->size; p++) {
        missing[p] = !mine->got[p] || !mine->taken_by[p];
        if (missing[p] && me->silent < 0) me->silent = p;
    }
    (void)pthread_mutex_unlock(&me->world->lock);
}

static int32_t world_poll(void *user)
{
    world_rank *me = user;
    (void)pthread_mutex_lock(&me->world->lock);
    bool aborted = me->world->aborted;
    if (aborted) say_aborted(me);
    (void)pthread_mutex_unlock(&me->world->lock);
    return aborted;
}

static void world_abort(void *user)
{
    world_rank *me = user;
    (void)pthread_mutex_lock(&me->world->lock);
    if (!me->world->aborted) {
        me->world->aborter = me->rank;
        me->world->silent = me->silent;
    }
    me->world->aborted = true;
    (void)pthread_mutex_unlock(&me->world->lock);
}

static void world_release(void *user)
{
    world_rank *me = user;
    (void)pthread_mutex_lock(&me->world->lock);
    me->here = false;
    if (me->next == 0) me->next = 1; /* it was here, and will not be again */
    (void)pthread_mutex_unlock(&me->world->lock);
    moe_world_destroy(me->world);
}

static const char *world_why(void *user) { return ((world_rank *)user)->why; }

/* ---- communicators --------------------------------------------------------------------------- */

static moe_status join(moe_comm **comm, moe_world *world, moe_context *context, int32_t rank,
                       double timeout, const char *function)
{
    world_rank *me = &world->ranks[rank];
    (void)pthread_mutex_lock(&world->lock);
    bool taken = me->here || me->next > 0;
    if (!taken) me->here = true; /* one that has left stays away */
    (void)pthread_mutex_unlock(&world->lock);
    if (taken) REFUSE(MOE_ERROR_INVALID_STATE, "rank %d of the world is taken", (int)rank);
    atomic_fetch_add(&world->references, 1);
    moe_collectives table = {.struct_size = sizeof table,
                             .user = me,
                             .rank = rank,
                             .size = world->size,
                             .capabilities = MOE_COMM_HOST_MEMORY,
                             .timeout = timeout,
                             .exchange_start = world_start,
                             .exchange_test = world_test,
                             .exchange_cancel = world_cancel,
                             .missing = world_missing,
                             .poll = world_poll,
                             .abort = world_abort,
                             .release = world_release};
    moe_status status = moe__comm_make(comm, context, &table, world_why, function);
    if (status == MOE_OK) return MOE_OK;
    (void)pthread_mutex_lock(&world->lock);
    me->next = 0; /* the rank is free again */
    (void)pthread_mutex_unlock(&world->lock);
    return status;
}

moe_status moe_comm_create_in_world(moe_comm **comm, moe_world *world, moe_context *context,
                                    int32_t rank, double timeout)
{
    const char *function = __func__;
    if (!comm || !world || !context)
        REFUSE_ARGUMENT("%s is NULL", !comm ? "comm" : world ? "context" : "world");
    MOE_TRY(moe__check_range("rank", rank, 0, world->size - 1, function));
    if (!(timeout > 0 && timeout <= 1e9))
        REFUSE_ARGUMENT("timeout is %g; it must be above 0 and at most 1e9 seconds", timeout);
    return join(comm, world, context, rank, timeout, function);
}

moe_status moe_comm_create_self(moe_comm **comm, moe_context *context)
{
    const char *function = __func__;
    moe_world *world;
    if (!comm || !context) REFUSE_ARGUMENT("%s is NULL", comm ? "context" : "comm");
    MOE_TRY(moe_world_create(&world, context, 1));
    moe_status status = join(comm, world, context, 0, 60, function);
    moe_world_destroy(world);
    return status;
}
