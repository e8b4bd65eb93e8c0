/* nccl_end.c - the end of a group: a duplicate is finalised or aborted, and what NCCL may still
 * touch is given back when it is done. Also how the library's threads begin. */
#include "nccl_internal.h"

#include <signal.h>
#include <time.h>
#include <unistd.h>

/* ---- threads --------------------------------------------------------------------------------- */

bool moe__nccl_enter_thread(moe__nccl_group *g, moe__nccl_scope *scope)
{
    (void)cudaSetDevice(g->device);
    return moe__nccl_enter_call(g, scope);
}

int moe__nccl_start_thread(pthread_t *thread, void *(*body)(void *), moe__nccl_group *g)
{
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(thread, NULL, body, g);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

/* ---- the end --------------------------------------------------------------------------------- */

/* What was sent may still be on its way though the streams are done: only finalising waits for
 * that. One that has been aborted is gone. */
static void close_duplicate(moe__nccl_group *g)
{
    bool good = !atomic_load(&g->aborted);
    if (!g->owned) return;
    if (good && g->nccl) {
        ncclResult_t result = ncclCommFinalize(g->nccl);
        good = result == ncclSuccess ||
               (result == ncclInProgress &&
                moe__nccl_settle(g, moe__nccl_seconds() + g->timeout) == 0);
    }
    if (good && g->nccl) good = ncclCommDestroy(g->nccl) == ncclSuccess;
    if (!good && g->nccl) (void)ncclCommAbort(g->nccl);
    g->nccl = NULL;
    g->unsettled = false;
}

static void free_group(moe__nccl_group *g)
{
    moe_context *context = g->context;
    (void)pthread_mutex_destroy(&g->lock);
    moe__module_free(context, g->memory, g->memory_bytes);
    if (!g->splitting) moe__module_free(context, g, sizeof *g); /* else NCCL may write to it */
    moe_context_destroy(context);
}

static void nap(void)
{
    const struct timespec pause = {0, 10000000};
    (void)nanosleep(&pause, NULL);
}

/* A duplicate that was given up: NCCL hands it out when the split ends, also without success, and
 * is done with it soon. */
static void drop_split(moe__nccl_group *g)
{
    while (!__atomic_load_n(&g->split, __ATOMIC_ACQUIRE)) nap();
    nap();
    (void)ncclCommAbort(g->split);
    g->splitting = false;
}

/* Until the host has aborted its communicator, or a silent rank comes. */
static void *wait_for_nccl(void *argument)
{
    moe__nccl_group *g = argument;
    moe__nccl_scope scope;
    if (moe__nccl_enter_thread(g, &scope)) {
        if (g->splitting) drop_split(g);
        while (!moe__nccl_is_idle(g, 0)) nap();
        moe__nccl_unequip(g);
        moe__nccl_leave(&scope);
    }
    free_group(g);
    return NULL;
}

void moe__nccl_end_group(moe__nccl_group *g)
{
    moe__nccl_scope scope;
    pthread_t thread;
    bool done = true;
    if (atomic_load(&g->wanted)) moe__nccl_abort(g);
    if (g->process == getpid() && g->memory && moe__nccl_enter(g, &scope)) {
        bool idle = moe__nccl_is_idle(g, atomic_load(&g->aborted) ? 0.1 : g->timeout);
        if (!idle) atomic_store(&g->aborted, true);
        close_duplicate(g);
        done = !g->splitting && moe__nccl_is_idle(g, idle ? 0 : 0.1);
        if (done) moe__nccl_unequip(g);
        moe__nccl_leave(&scope);
    }
    if (done || g->unsettled || moe__nccl_start_thread(&thread, wait_for_nccl, g) != 0)
        free_group(g);
    else
        (void)pthread_detach(thread);
}
