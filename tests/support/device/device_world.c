/* device_world.c - device_world.h.
 *
 *     every rank:  posts its rows and an event of its stream;  all have;  copies what is for it
 *     behind the others' events, and has the stream wait until all have copied */
#include "support/device/device_world.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { RANKS = 16 };

/* What a rank sends; copied, for it may leave in the middle. */
typedef struct post {
    const char *send;
    int64_t begin[RANKS + 1], row_bytes;
    cudaEvent_t ready, copied;
} post;

struct device_world {
    moe_world *inner;
    int32_t ranks;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int32_t arrived, failed;
    uint64_t turn;
    int failing; /* exchanges of rank 1 until one fails; 0: none */
    post of[RANKS];
};

typedef struct member {
    device_world *world;
    moe_comm *inner;
    int32_t rank;
    double timeout;
} member;

device_world *device_world_create(moe_context *context, int32_t ranks)
{
    device_world *w = calloc(1, sizeof *w);
    if (!w || ranks > RANKS) abort();
    w->ranks = ranks;
    (void)pthread_mutex_init(&w->mutex, NULL);
    (void)pthread_cond_init(&w->changed, NULL);
    if (moe_world_create(&w->inner, context, ranks) != MOE_OK) abort();
    return w;
}

void device_world_destroy(device_world *w)
{
    moe_world_destroy(w->inner);
    (void)pthread_cond_destroy(&w->changed);
    (void)pthread_mutex_destroy(&w->mutex);
    free(w);
}

void device_world_fail(device_world *w, int n) { w->failing = n; }

/* Until all ranks are here; 0, or 1 if one has failed or does not come. */
static int32_t meet(const member *m)
{
    device_world *w = m->world;
    struct timespec until;
    int timed_out = 0;
    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += (time_t)m->timeout + 1;
    (void)pthread_mutex_lock(&w->mutex);
    uint64_t turn = w->turn;
    if (++w->arrived == w->ranks) {
        w->arrived = 0, w->turn++;
        (void)pthread_cond_broadcast(&w->changed);
    }
    while (w->turn == turn && !w->failed && !timed_out)
        timed_out = pthread_cond_timedwait(&w->changed, &w->mutex, &until) != 0;
    int32_t failed = w->turn == turn;
    (void)pthread_mutex_unlock(&w->mutex);
    return failed;
}

static int32_t copy_from(const member *m, const moe_exchange *e, int32_t p)
{
    const post *of = &m->world->of[p];
    cudaStream_t stream = e->stream;
    int64_t first = of->begin[m->rank], rows = of->begin[m->rank + 1] - first;
    if (e->to_all) first = 0, rows = of->begin[1];
    if (rows != e->recv_begin[p + 1] - e->recv_begin[p] || of->row_bytes != e->row_bytes) return 1;
    if (cudaStreamWaitEvent(stream, of->ready, 0) != cudaSuccess) return 1;
    if (rows == 0) return 0;
    return cudaMemcpyAsync((char *)e->recv + e->recv_begin[p] * e->row_bytes,
                           of->send + first * e->row_bytes, (size_t)(rows * e->row_bytes),
                           cudaMemcpyDeviceToDevice, stream) != cudaSuccess;
}

/* The posts stay until all have met twice more. */
static int32_t exchange(const member *m, const moe_exchange *e)
{
    device_world *w = m->world;
    post *own = &w->of[m->rank];
    cudaStream_t stream = e->stream;
    if (m->rank == 1 && w->failing > 0 && --w->failing == 0) return 1;
    own->send = e->send, own->row_bytes = e->row_bytes;
    for (int32_t p = 0; p <= (e->to_all ? 1 : w->ranks); p++) own->begin[p] = e->send_begin[p];
    if (!own->ready && cudaEventCreateWithFlags(&own->ready, cudaEventDisableTiming)) return 1;
    if (!own->copied && cudaEventCreateWithFlags(&own->copied, cudaEventDisableTiming)) return 1;
    if (cudaEventRecord(own->ready, stream) != cudaSuccess || meet(m)) return 1;
    for (int32_t p = 0; p < w->ranks; p++)
        if (copy_from(m, e, p)) return 1;
    if (cudaEventRecord(own->copied, stream) != cudaSuccess || meet(m)) return 1;
    for (int32_t p = 0; p < w->ranks; p++)
        if (cudaStreamWaitEvent(stream, w->of[p].copied, 0) != cudaSuccess) return 1;
    return meet(m);
}

/* ---- the table ------------------------------------------------------------------------------- */

static void give_up(void *user)
{
    member *m = user;
    (void)pthread_mutex_lock(&m->world->mutex);
    m->world->failed = 1;
    (void)pthread_cond_broadcast(&m->world->changed);
    (void)pthread_mutex_unlock(&m->world->mutex);
    moe_comm_abort(m->inner);
}

static int32_t start(void *user, const moe_exchange *e, void **request)
{
    member *m = user;
    int32_t number;
    if (e->memory == MOE_COMM_DEVICE_MEMORY) return e->ordered ? exchange(m, e) : 1;
    if (moe_comm_exchange_start(m->inner, e, &number) != MOE_OK) return 1;
    *request = (void *)(intptr_t)number;
    return 0;
}

static int32_t test(void *user, void *request, int32_t *done)
{
    member *m = user;
    return moe_comm_exchange_test(m->inner, (int32_t)(intptr_t)request, done) != MOE_OK;
}

static int64_t cancel(void *user, void *request)
{
    (void)request;
    give_up(user);
    return 0;
}

static void drop(void *user)
{
    member *m = user;
    post *own = &m->world->of[m->rank];
    if (own->ready) (void)cudaEventDestroy(own->ready);
    if (own->copied) (void)cudaEventDestroy(own->copied);
    *own = (post){0};
    moe_comm_destroy(m->inner);
    free(m);
}

moe_comm *device_world_connect(device_world *world, moe_context *context, int32_t rank,
                               double timeout)
{
    moe_comm *comm = NULL;
    moe_collectives table;
    member *m = calloc(1, sizeof *m);
    if (!m) abort();
    *m = (member){.world = world, .rank = rank, .timeout = timeout};
    if (moe_comm_create_in_world(&m->inner, world->inner, context, rank, timeout) != MOE_OK)
        return NULL;
    if (moe_collectives_init(&table, sizeof table) != MOE_OK) return NULL;
    table.user = m, table.rank = rank, table.size = world->ranks, table.timeout = timeout;
    table.capabilities = MOE_COMM_HOST_MEMORY | MOE_COMM_DEVICE_MEMORY | MOE_COMM_STREAM_ORDERED |
                         MOE_COMM_CAPTURABLE;
    table.exchange_start = start, table.exchange_test = test, table.exchange_cancel = cancel;
    table.abort = give_up, table.release = drop;
    return moe_comm_create(&comm, context, &table) == MOE_OK ? comm : NULL;
}
