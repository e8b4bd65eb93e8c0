/* pool.c - the thread pool.
 *
 * A run takes one of a few job slots and opens it. Workers enter open jobs, take task numbers from
 * the job's counter until there are none, and leave; the caller works as well, then closes the job
 * to newcomers and waits until the last worker has left. All this is atomics; the lock is for
 * sleeping only. A thread with nothing to do spins for a moment, then says in a counter that it
 * sleeps and looks once more; who changes something looks at that counter afterwards, so no wake-up
 * is lost. A forked child has no workers: the first run there starts new ones. */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

/* With all slots taken by other callers, a caller does its tasks alone. */
enum { SLOTS = 16, SPIN_NANOSECONDS = 20000, LINE = 64 };

/* States of a slot: 0 free, CLAIMED by its caller, CLAIMED + OPEN + number of workers inside. */
static const int64_t CLAIMED = (int64_t)1 << 32, OPEN = (int64_t)1 << 33;

typedef struct job {
    _Alignas(LINE) _Atomic int64_t state;
    moe_task_fn task;
    void *argument;
    int64_t count;
    _Alignas(LINE) _Atomic int64_t taken; /* next task number */
} job;

struct moe__pool {
    job jobs[SLOTS];
    _Atomic int64_t opened;   /* jobs opened so far, plus one at the end: what idle workers watch */
    _Atomic int64_t sleepers; /* workers that wait for `work` */
    _Atomic int64_t waiters;  /* callers that wait for `left` */
    _Atomic int64_t busy;     /* processor of the last caller; -1: not known */
    _Atomic int64_t owner;    /* process of the workers, 0 before the first run, < 0: changing */
    atomic_int started, ending;
    pthread_mutex_t lock;
    pthread_cond_t work; /* a job was opened, or the pool ends */
    pthread_cond_t left; /* the last worker has left a closed job */
    int32_t threads;     /* wanted, the caller's included */
    int32_t workers;     /* that were started; under the lock */
    moe_context *context;
    pthread_t handles[]; /* [threads - 1] */
};

static int64_t pool_bytes(int32_t threads)
{
    return (int64_t)sizeof(moe__pool) + (int64_t)threads * (int64_t)sizeof(pthread_t);
}

static void init_locks(moe__pool *pool)
{
    (void)pthread_mutex_init(&pool->lock, NULL);
    (void)pthread_cond_init(&pool->work, NULL);
    (void)pthread_cond_init(&pool->left, NULL);
}

moe__pool *moe__pool_create(moe_context *context, int32_t threads)
{
    moe__pool *pool = moe__alloc_zeroed(context, pool_bytes(threads));
    if (!pool) return NULL;
    pool->threads = threads;
    pool->context = context;
    init_locks(pool);
    return pool;
}

/* ---- waiting --------------------------------------------------------------------------------- */

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Watches `word` for a moment, until it equals `value` (equal) or no longer does (!equal). */
static void spin(_Atomic int64_t *word, int64_t value, bool equal)
{
    int64_t deadline = now() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 16; i++) {
            if ((atomic_load(word) == value) == equal) return;
            pause_briefly();
        }
    } while (now() < deadline);
}

/* The processor that this thread is on; -1 where that cannot be asked. */
static int processor(void)
{
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

/* A worker may be woken on the processor of the caller, which is at work, and be left there for
 * longer than a call lasts, though others are idle. Then it leaves. */
static void step_aside(int64_t busy)
{
#ifdef __linux__
    cpu_set_t all, others;
    int here = processor();
    if (here < 0 || here != busy || sched_getaffinity(0, sizeof all, &all) != 0) return;
    others = all;
    CPU_CLR((size_t)here, &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
    (void)sched_setaffinity(0, sizeof all, &all);
#else
    (void)busy;
#endif
}

/* ---- jobs ------------------------------------------------------------------------------------ */

/* Takes tasks until there are none; how many it did. */
static int64_t work_on(job *j)
{
    for (int64_t done = 0;; done++) {
        int64_t index = atomic_fetch_add(&j->taken, 1);
        if (index >= j->count) return done;
        j->task(j->argument, index);
    }
}

static bool enter(job *j)
{
    int64_t state = atomic_load(&j->state);
    while (state & OPEN)
        if (atomic_compare_exchange_weak(&j->state, &state, state + 1)) return true;
    return false;
}

static void leave(moe__pool *pool, job *j)
{
    if (atomic_fetch_sub(&j->state, 1) != CLAIMED + 1 || atomic_load(&pool->waiters) == 0) return;
    (void)pthread_mutex_lock(&pool->lock);
    (void)pthread_cond_broadcast(&pool->left);
    (void)pthread_mutex_unlock(&pool->lock);
}

/* A free slot, claimed; NULL if there is none. */
static job *claim(moe__pool *pool)
{
    for (int i = 0; i < SLOTS; i++) {
        int64_t state = 0;
        if (atomic_compare_exchange_strong(&pool->jobs[i].state, &state, CLAIMED))
            return &pool->jobs[i];
    }
    return NULL;
}

static void open_job(moe__pool *pool, job *j)
{
    atomic_store(&j->taken, 0);
    atomic_store(&pool->busy, processor());
    (void)atomic_fetch_add(&j->state, OPEN);
    (void)atomic_fetch_add(&pool->opened, 1);
    int64_t sleepers = atomic_load(&pool->sleepers);
    if (sleepers == 0) return;
    (void)pthread_mutex_lock(&pool->lock);
    if (j->count > sleepers)
        (void)pthread_cond_broadcast(&pool->work);
    else
        for (int64_t i = 1; i < j->count; i++) (void)pthread_cond_signal(&pool->work);
    (void)pthread_mutex_unlock(&pool->lock);
}

/* Lets no more workers in, waits for those inside, and frees the slot. */
static void close_job(moe__pool *pool, job *j)
{
    int cancel;
    if (atomic_fetch_sub(&j->state, OPEN) != CLAIMED + OPEN) spin(&j->state, CLAIMED, true);
    if (atomic_load(&j->state) != CLAIMED) {
        /* Workers read what is on the caller's stack: it must not be unwound by a cancellation. */
        (void)pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel);
        (void)pthread_mutex_lock(&pool->lock);
        (void)atomic_fetch_add(&pool->waiters, 1);
        while (atomic_load(&j->state) != CLAIMED) (void)pthread_cond_wait(&pool->left, &pool->lock);
        (void)atomic_fetch_sub(&pool->waiters, 1);
        (void)pthread_mutex_unlock(&pool->lock);
        (void)pthread_setcancelstate(cancel, NULL);
    }
    atomic_store(&j->state, 0);
}

/* ---- workers --------------------------------------------------------------------------------- */

/* Waits until a job is opened after `seen`. */
static void idle(moe__pool *pool, int64_t seen)
{
    spin(&pool->opened, seen, false);
    if (atomic_load(&pool->opened) != seen) return;
    (void)pthread_mutex_lock(&pool->lock);
    (void)atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->opened) == seen) (void)pthread_cond_wait(&pool->work, &pool->lock);
    (void)atomic_fetch_sub(&pool->sleepers, 1);
    (void)pthread_mutex_unlock(&pool->lock);
    step_aside(atomic_load(&pool->busy));
}

static void *worker(void *argument)
{
    moe__pool *pool = argument;
    (void)fesetenv(FE_DFL_ENV);
    while (!atomic_load(&pool->ending)) {
        int64_t seen = atomic_load(&pool->opened), done = 0;
        for (int i = 0; i < SLOTS; i++) {
            job *j = &pool->jobs[i];
            if (!enter(j)) continue;
            done += work_on(j);
            leave(pool, j);
        }
        if (done == 0 && !atomic_load(&pool->ending)) idle(pool, seen);
    }
    return NULL;
}

/* In a forked child the workers are gone and the lock may have been copied locked: begin anew. One
 * thread does it, others that come meanwhile wait. */
static void adopt(moe__pool *pool)
{
    int64_t self = (int64_t)getpid(), owner;
    while ((owner = atomic_load(&pool->owner)) != self) {
        if (owner == -self || !atomic_compare_exchange_strong(&pool->owner, &owner, -self)) {
            pause_briefly();
            continue;
        }
        if (owner != 0) {
            for (int i = 0; i < SLOTS; i++) atomic_store(&pool->jobs[i].state, 0);
            atomic_store(&pool->sleepers, 0);
            atomic_store(&pool->waiters, 0);
            atomic_store(&pool->started, 0);
            pool->workers = 0;
            init_locks(pool);
        }
        atomic_store(&pool->owner, self);
    }
}

/* Starts the workers, all signals blocked, if they are not there. */
static void start_workers(moe__pool *pool)
{
    sigset_t all, before;
    int error = 0;
    int32_t wanted = pool->threads - 1, got;
    if (atomic_load(&pool->started)) return;
    (void)pthread_mutex_lock(&pool->lock);
    if (!atomic_load(&pool->started)) {
        (void)sigfillset(&all);
        (void)pthread_sigmask(SIG_SETMASK, &all, &before);
        while (error == 0 && pool->workers < wanted) {
            error = pthread_create(&pool->handles[pool->workers], NULL, worker, pool);
            pool->workers += error == 0;
        }
        (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
        atomic_store(&pool->started, 1);
    }
    got = pool->workers;
    (void)pthread_mutex_unlock(&pool->lock);
    if (error != 0)
        moe__log(pool->context, MOE_LOG_WARNING,
                 "the system gave %d of %d threads (error %d); going on with them", (int)got,
                 (int)wanted, error);
}

/* ---- calls ----------------------------------------------------------------------------------- */

void moe__pool_run(moe__pool *pool, int64_t count, moe_task_fn task, void *argument)
{
    job alone, *j;
    fenv_t saved;
    adopt(pool);
    start_workers(pool);
    j = claim(pool);
    if (!j) atomic_init(&alone.taken, 0);
    job *mine = j ? j : &alone;
    mine->task = task;
    mine->argument = argument;
    mine->count = count;
    if (j) open_job(pool, j);
    moe__fenv_enter(&saved);
    (void)work_on(mine);
    moe__fenv_leave(&saved);
    if (j) close_job(pool, j);
}

void moe__pool_destroy(moe_context *context, moe__pool *pool)
{
    if (!pool) return;
    if (atomic_load(&pool->owner) == (int64_t)getpid()) {
        (void)pthread_mutex_lock(&pool->lock);
        atomic_store(&pool->ending, 1);
        (void)atomic_fetch_add(&pool->opened, 1);
        (void)pthread_cond_broadcast(&pool->work);
        (void)pthread_mutex_unlock(&pool->lock);
        for (int32_t i = 0; i < pool->workers; i++) (void)pthread_join(pool->handles[i], NULL);
        (void)pthread_cond_destroy(&pool->left);
        (void)pthread_cond_destroy(&pool->work);
        (void)pthread_mutex_destroy(&pool->lock);
    }
    moe__free(context, pool, pool_bytes(pool->threads));
}
