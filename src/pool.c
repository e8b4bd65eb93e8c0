/* pool.c - the thread pool.
 *
 * A run is a job on its caller's stack, linked into the list of open jobs. Workers and the caller take
 * task numbers from the job's counter until there are none; the caller then unlinks the job and waits
 * until the last worker has left it. Idle workers spin for a moment, then wait on a condition. A
 * forked child has no workers: the first run there starts new ones. */
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

enum { SPINS = 2000 };

typedef struct job {
    struct job *next;
    moe_task_fn task;
    void *argument;
    int64_t count;
    _Atomic int64_t taken; /* next task number */
    int64_t helpers;       /* workers inside; under the pool's lock */
} job;

struct moe__pool {
    pthread_mutex_t lock;
    pthread_cond_t work;    /* a job was opened, or the pool ends */
    pthread_cond_t left;    /* a worker has left a job */
    job *jobs;              /* open jobs; under the lock */
    _Atomic int64_t opened; /* jobs opened so far: what spinning workers watch */
    int32_t threads;        /* wanted, the caller's included */
    int32_t workers;        /* started */
    int32_t refused;        /* 1: the system refused a thread; do not ask at every run */
    int32_t ending;
    _Atomic int64_t owner;  /* process the workers live in, 0 before the first run, negative while changing */
    moe_context *context;
    pthread_t handles[];    /* [threads - 1] */
};

static int64_t pool_bytes(int32_t threads)
{
    return (int64_t)sizeof(moe__pool) + (int64_t)threads * (int64_t)sizeof(pthread_t);
}

moe__pool *moe__pool_create(moe_context *context, int32_t threads)
{
    moe__pool *pool = moe__alloc_zeroed(context, pool_bytes(threads));
    if (!pool) return NULL;
    pool->threads = threads;
    pool->context = context;
    (void)pthread_mutex_init(&pool->lock, NULL);
    (void)pthread_cond_init(&pool->work, NULL);
    (void)pthread_cond_init(&pool->left, NULL);
    return pool;
}

/* Takes tasks until there are none. */
static void work_on(job *j)
{
    for (;;) {
        int64_t index = atomic_fetch_add(&j->taken, 1);
        if (index >= j->count) return;
        j->task(j->argument, index);
    }
}

/* An open job with tasks left, under the lock. */
static job *find_job(moe__pool *pool)
{
    for (job *j = pool->jobs; j; j = j->next)
        if (atomic_load(&j->taken) < j->count) return j;
    return NULL;
}

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void *worker(void *argument)
{
    moe__pool *pool = argument;
    (void)fesetenv(FE_DFL_ENV);
    (void)pthread_mutex_lock(&pool->lock);
    while (!pool->ending) {
        job *j = find_job(pool);
        if (j) {
            j->helpers++;
            (void)pthread_mutex_unlock(&pool->lock);
            work_on(j);
            (void)pthread_mutex_lock(&pool->lock);
            if (--j->helpers == 0) (void)pthread_cond_broadcast(&pool->left);
            continue;
        }
        int64_t seen = atomic_load(&pool->opened);
        (void)pthread_mutex_unlock(&pool->lock);
        for (int i = 0; i < SPINS && atomic_load(&pool->opened) == seen; i++) pause_briefly();
        (void)pthread_mutex_lock(&pool->lock);
        while (!pool->ending && atomic_load(&pool->opened) == seen)
            (void)pthread_cond_wait(&pool->work, &pool->lock);
    }
    (void)pthread_mutex_unlock(&pool->lock);
    return NULL;
}

/* Starts the workers that are missing, all signals blocked. Under the lock. */
static void start_workers(moe__pool *pool)
{
    sigset_t all, before;
    if (pool->refused || pool->workers >= pool->threads - 1) return;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->workers < pool->threads - 1 && !pool->refused) {
        int error = pthread_create(&pool->handles[pool->workers], NULL, worker, pool);
        pool->workers += error == 0;
        pool->refused = error != 0;
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* In a forked child the workers are gone and the lock may have been copied locked: begin anew. One
 * thread does it, others that come meanwhile wait. */
static void adopt(moe__pool *pool, int64_t self)
{
    for (;;) {
        int64_t owner = atomic_load(&pool->owner);
        if (owner == self) return;
        if (owner != -self && atomic_compare_exchange_strong(&pool->owner, &owner, -self)) {
            if (owner != 0) {
                (void)pthread_mutex_init(&pool->lock, NULL);
                (void)pthread_cond_init(&pool->work, NULL);
                (void)pthread_cond_init(&pool->left, NULL);
                pool->jobs = NULL;
                pool->workers = 0;
                pool->refused = 0;
            }
            atomic_store(&pool->owner, self);
            return;
        }
        pause_briefly();
    }
}

static void unlink_job(moe__pool *pool, const job *done)
{
    job **at = &pool->jobs;
    while (*at != done) at = &(*at)->next;
    *at = done->next;
}

void moe__pool_run(moe__pool *pool, int64_t count, moe_task_fn task, void *argument)
{
    job j = {.task = task, .argument = argument, .count = count};
    adopt(pool, (int64_t)getpid());
    (void)pthread_mutex_lock(&pool->lock);
    int32_t was_refused = pool->refused;
    start_workers(pool);
    int32_t refused_now = pool->refused && !was_refused ? pool->workers : -1;
    j.next = pool->jobs;
    pool->jobs = &j;
    (void)atomic_fetch_add(&pool->opened, 1);
    (void)pthread_cond_broadcast(&pool->work);
    (void)pthread_mutex_unlock(&pool->lock);
    if (refused_now >= 0)
        moe__log(pool->context, MOE_LOG_WARNING, "the system gave %d of %d threads", (int)refused_now,
                 (int)pool->threads - 1);
    work_on(&j);
    (void)pthread_mutex_lock(&pool->lock);
    unlink_job(pool, &j);
    while (j.helpers > 0) (void)pthread_cond_wait(&pool->left, &pool->lock);
    (void)pthread_mutex_unlock(&pool->lock);
}

void moe__pool_destroy(moe_context *context, moe__pool *pool)
{
    if (!pool) return;
    if (atomic_load(&pool->owner) == (int64_t)getpid()) {
        (void)pthread_mutex_lock(&pool->lock);
        pool->ending = 1;
        (void)pthread_cond_broadcast(&pool->work);
        (void)pthread_mutex_unlock(&pool->lock);
        for (int32_t i = 0; i < pool->workers; i++) (void)pthread_join(pool->handles[i], NULL);
    }
    moe__free(context, pool, pool_bytes(pool->threads));
}
