/* nccl_calls.c - calls of NCCL on a communicator: one thread at a time, groups that are always
 * ended, answers that come later, and giving up from any thread. */
#include "nccl_internal.h"

#include <stdio.h>
#include <unistd.h>

/* ---- giving up ------------------------------------------------------------------------------- */

/* The lock is held. What is owned is revoked, so that its streams go on; its handle stays valid
 * then, while one that is aborted is gone. Both set the device where they need it: a thread that
 * has none would be given one by going back. */
static void give_up(moe__nccl_group *g)
{
    if (atomic_exchange(&g->aborted, true) || !g->owned || !g->nccl) return;
    ncclResult_t result = g->revoke ? g->revoke(g->nccl, 0) : ncclInvalidUsage;
    if (result != ncclSuccess && result != ncclInProgress) {
        (void)ncclCommAbort(g->nccl);
        g->nccl = NULL;
    }
}

/* If the owner is inside NCCL, it gives up when it comes out. */
static void try_give_up(moe__nccl_group *g)
{
    if (atomic_load(&g->aborted) || pthread_mutex_trylock(&g->lock) != 0) return;
    give_up(g);
    (void)pthread_mutex_unlock(&g->lock);
}

void moe__nccl_abort(void *user)
{
    moe__nccl_group *g = user;
    atomic_store(&g->wanted, true);
    if (g->process == getpid()) try_give_up(g);
}

bool moe__nccl_begin(moe__nccl_group *g)
{
    (void)pthread_mutex_lock(&g->lock);
    if (!atomic_load(&g->wanted)) return true;
    give_up(g);
    (void)pthread_mutex_unlock(&g->lock);
    (void)snprintf(g->why, sizeof g->why, "this rank gave up");
    return false;
}

/* Another thread may have found the lock taken. */
void moe__nccl_end(moe__nccl_group *g)
{
    (void)pthread_mutex_unlock(&g->lock);
    if (atomic_load(&g->wanted)) try_give_up(g);
}

/* ---- NCCL ------------------------------------------------------------------------------------ */

int32_t moe__nccl_ask(moe__nccl_group *g, ncclResult_t *state)
{
    *state = ncclSuccess;
    if (!moe__nccl_begin(g)) return 1;
    if (g->size == 1) {
        moe__nccl_end(g);
        return 0;
    }
    ncclResult_t result = ncclCommGetAsyncError(g->nccl, state);
    int32_t answer = 0;
    if (result != ncclSuccess) {
        answer = moe__nccl_say(g, "ncclCommGetAsyncError", result);
    } else {
        g->in_progress = *state == ncclInProgress;
        if (*state != ncclSuccess && !g->in_progress) answer = moe__nccl_say(g, "NCCL", *state);
    }
    moe__nccl_end(g);
    return answer;
}

int32_t moe__nccl_settle(moe__nccl_group *g, double deadline)
{
    double begin = moe__nccl_seconds();
    for (;;) {
        ncclResult_t state;
        if (moe__nccl_ask(g, &state)) return 1;
        if (state == ncclSuccess) return 0;
        double now = moe__nccl_seconds();
        if (now > deadline) return MOE_COMM_LATE;
        moe__nccl_rest(now - begin);
    }
}

/* After a wait that ended early: between ranks that have met, what is in progress is over soon, and
 * an owned communicator is when it is revoked or gone. */
static bool settles_soon(moe__nccl_group *g)
{
    double begin = moe__nccl_seconds(), waited = 0;
    while (waited < 0.5 && atomic_load(&g->meeting) != MOE__NCCL_LEFT) {
        ncclResult_t state = ncclSuccess;
        (void)pthread_mutex_lock(&g->lock);
        bool known = !g->nccl || ncclCommGetAsyncError(g->nccl, &state) == ncclSuccess;
        (void)pthread_mutex_unlock(&g->lock);
        if (known && state != ncclInProgress) return true;
        moe__nccl_rest(waited);
        waited = moe__nccl_seconds() - begin;
    }
    return false;
}

/* Frames of one size to and from every rank, the own one among them. */
static ncclResult_t post_together(const moe__nccl_exchange *x, cudaStream_t stream,
                                  const char **call)
{
    const moe__nccl_group *g = x->group;
    *call = "ncclAlltoAll";
    ncclResult_t result = g->all_to_all(x->send, x->recv, MOE__NCCL_FRAME, ncclUint8, g->nccl,
                                        stream);
    return result == ncclInProgress ? ncclSuccess : result;
}

/* Neighbours first, so that not all ranks send to the same one. */
static ncclResult_t post_all(const moe__nccl_exchange *x, cudaStream_t stream, const char **call)
{
    const moe__nccl_group *g = x->group;
    ncclResult_t result = ncclSuccess;
    for (int32_t i = 1; i < g->size && result == ncclSuccess; i++) {
        int32_t to = (g->rank + i) % g->size, from = (g->rank + g->size - i) % g->size;
        *call = "ncclRecv";
        if (x->recv_bytes[from] > 0)
            result = ncclRecv(x->recv + x->recv_at[from], (size_t)x->recv_bytes[from], ncclUint8,
                              from, g->nccl, stream);
        if (result != ncclSuccess && result != ncclInProgress) return result;
        *call = "ncclSend";
        result = ncclSuccess;
        if (x->send_bytes[to] > 0)
            result = ncclSend(x->send + x->send_at[to], (size_t)x->send_bytes[to], ncclUint8, to,
                              g->nccl, stream);
        if (result == ncclInProgress) result = ncclSuccess;
    }
    return result;
}

/* A group that was begun is ended, whatever happened in it. */
int32_t moe__nccl_post(moe__nccl_exchange *x, cudaStream_t stream)
{
    moe__nccl_group *g = x->group;
    const char *call = "ncclGroupStart";
    int64_t bytes = 0;
    for (int32_t p = 0; p < g->size; p++) bytes += x->send_bytes[p] + x->recv_bytes[p];
    if (bytes == 0) return 0;
    if (!moe__nccl_begin(g)) return 1;
    ncclResult_t result = ncclGroupStart();
    if (result == ncclSuccess) {
        x->posted = true;
        result = x->together && x->round == 0 ? post_together(x, stream, &call)
                                              : post_all(x, stream, &call);
        ncclResult_t end = ncclGroupEnd();
        if (result == ncclSuccess) result = end, call = "ncclGroupEnd";
    }
    int32_t answer = 0;
    if (result != ncclSuccess && result != ncclInProgress) answer = moe__nccl_say(g, call, result);
    moe__nccl_end(g);
    if (result != ncclInProgress) return answer;
    g->in_progress = true;
    answer = moe__nccl_settle(g, x->deadline);
    g->unsettled = answer != 0 && g->in_progress && !settles_soon(g);
    return answer;
}
