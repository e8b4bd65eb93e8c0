/* nccl_group.c - groups: what was called in one becomes one operation of each communicator.
 *
 * The first sends, receives and collectives of a communicator connect its ranks: the end of the
 * group waits for the peers to come to theirs, on the host, which a stream that captures cannot. */
#include "nccl_internal.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

struct group {
    int depth;
    ncclResult_t error; /* the first */
    struct group_call {
        struct ncclComm *comm;
        struct nccl_transfer transfer;
        struct CUstream_st *stream;
    } * calls;
    int count, room;
    struct ncclComm **jobs;
    int job_count;
};

static __thread struct group group;
static pthread_key_t leaving;
static size_t open_groups;

const void *nccl_this_thread(void) { return &group; }
bool nccl_in_group(void) { return group.depth > 0; }
size_t nccl_open_groups(void) { return open_groups; }

static void *grown(void *p, size_t bytes)
{
    void *q = realloc(p, bytes);
    if (q == NULL) abort();
    return q;
}

static void thread_leaves(void *unused)
{
    (void)unused;
    emu_lock();
    if (group.depth > 0) {
        open_groups -= (size_t)group.depth;
        emu_mistake("NCCL: a thread ends with %d groups open", group.depth);
    }
    free(group.calls);
    free(group.jobs);
    memset(&group, 0, sizeof group);
    emu_unlock();
}

/* The main thread's group at the end of the process is reported by nccl_fault.c. */
static void watch_thread(void)
{
    static bool made;
    if (!made) pthread_key_create(&leaving, thread_leaves);
    made = true;
    pthread_setspecific(leaving, &group);
}

void nccl_group_failed(ncclResult_t result)
{
    if (group.depth > 0 && group.error == ncclSuccess) group.error = result;
}

/* ---- one communicator's operation ------------------------------------------------------------ */

static void add_stream(struct nccl_launch *l, struct CUstream_st *stream)
{
    for (int i = 0; i < l->stream_count; i++) {
        if (l->streams[i] == stream) return;
    }
    l->streams = grown(l->streams, (size_t)(l->stream_count + 1) * sizeof(struct CUstream_st *));
    l->streams[l->stream_count++] = stream;
}

/* All that the group has for the communicator. */
static struct nccl_launch *make_launch(struct ncclComm *comm)
{
    struct nccl_launch *l = calloc(1, sizeof *l);
    size_t bytes = sizeof *l->operation + (size_t)group.count * sizeof(struct nccl_transfer);
    if (l == NULL) abort();
    l->operation = grown(NULL, bytes);
    memset(l->operation, 0, sizeof *l->operation);
    l->operation->comm = comm;
    for (int i = 0; i < group.count; i++) {
        const struct group_call *c = &group.calls[i];
        if (c->comm != comm) continue;
        l->operation->list[l->operation->count++] = c->transfer;
        add_stream(l, c->stream);
    }
    return l;
}

void nccl_launch_drop(struct ncclComm *comm)
{
    if (comm->launch == NULL) return;
    free(comm->launch->operation);
    free(comm->launch->streams);
    free(comm->launch);
    comm->launch = NULL;
}

static bool captured(const struct nccl_launch *l)
{
    bool any = false;
    for (int i = 0; i < l->stream_count; i++) any |= emu_captures(l->streams[i]);
    return any;
}

static ncclResult_t check_launch(const struct ncclComm *comm, const struct nccl_launch *l)
{
    const struct nccl_operation *o = l->operation;
    int to_self = 0;
    size_t bytes = 0;
    for (int i = 0; i < o->count; i++) {
        const struct nccl_transfer *t = &o->list[i];
        bytes += (t->send_bytes + 15) & ~(size_t)15;
        if (t->peer != comm->rank) continue;
        to_self += (t->kind == NCCL_SEND) - (t->kind == NCCL_RECEIVE);
    }
    if (to_self != 0) {
        return nccl_refuse(ncclInvalidUsage, "rank %d of %d: a send to itself without a receive",
                           comm->rank, comm->ranks);
    }
    if (o->count > NCCL_TRANSFERS || bytes > NCCL_ROOM) {
        return nccl_refuse(ncclInternalError,
                           "a group of %d transfers, %zu bytes to send: more "
                           "than the emulator takes",
                           o->count, bytes);
    }
    return nccl_check_overlaps(o);
}

/* ---- connections ----------------------------------------------------------------------------- */

/* With one rank: asks it, and whether it asked. */
static bool connect_to(struct ncclComm *comm, int rank, bool sends, bool receives, bool ask)
{
    struct nccl_seat *mine = nccl_seat(comm);
    const struct nccl_seat *peer = &comm->world->board->seat[rank];
    if (rank == comm->rank) return true;
    if (ask && sends) mine->to[rank] = true;
    if (ask && receives) mine->from[rank] = true;
    return (!sends || peer->from[comm->rank]) && (!receives || peer->to[comm->rank]);
}

static bool connect_all(struct ncclComm *comm, const struct nccl_transfer *t, bool ask)
{
    bool connected = true, pairs = t->kind == NCCL_ALL_TO_ALL;
    if (ask && !pairs) nccl_seat(comm)->ring = true;
    for (int r = 0; r < comm->ranks; r++) {
        const struct nccl_seat *peer = &comm->world->board->seat[r];
        connected &= pairs ? connect_to(comm, r, true, true, ask) : peer->ring;
    }
    return connected;
}

bool nccl_connected(struct ncclComm *comm, const struct nccl_launch *launch, bool ask)
{
    const struct nccl_operation *o = launch->operation;
    bool connected = true;
    nccl_board_lock(comm->world->board);
    for (int i = 0; i < o->count; i++) {
        const struct nccl_transfer *t = &o->list[i];
        bool sends = t->kind == NCCL_SEND, receives = t->kind == NCCL_RECEIVE;
        connected &= sends || receives ? connect_to(comm, t->peer, sends, receives, ask)
                                       : connect_all(comm, t, ask);
    }
    nccl_board_unlock(comm->world->board);
    return connected;
}

/* ---- launching ------------------------------------------------------------------------------- */

static void record(const struct nccl_launch *l)
{
    const struct nccl_operation *o = l->operation;
    for (int i = 0; i < o->count; i++) {
        const struct nccl_transfer *t = &o->list[i];
        struct emu_call call = {.kind = EMU_CALL_NCCL,
                                .name = nccl_call_name(t->kind),
                                .stream = l->streams[0],
                                .bytes = t->send_bytes > 0 ? t->send_bytes : t->receive_bytes,
                                .to = t->receive,
                                .from = t->send,
                                .device = o->comm->device,
                                .comm = o->comm,
                                .rank = o->comm->rank,
                                .peer = t->peer,
                                .group = o->group};
        emu_record_call(&call);
    }
}

/* `after` waits for all that is on `before` now. */
static cudaError_t wait_for(struct CUstream_st *after, struct CUstream_st *before)
{
    struct CUevent_st event = {.device = before->device};
    cudaError_t status = emu_put_record(before, &event);
    if (status == cudaSuccess) status = emu_put_wait(after, event.mark);
    emu_mark_drop(event.mark);
    return status;
}

ncclResult_t nccl_launch_now(struct ncclComm *comm)
{
    struct nccl_launch *l = comm->launch;
    struct nccl_operation *o = l->operation;
    cudaError_t status = cudaSuccess;
    bool captures = captured(l);
    o->ticket = captures ? 0 : ++comm->tickets;
    for (int i = 0; i < o->count; i++) o->list[i].captured = captures;
    record(l);
    comm->launch = NULL;
    for (int i = 1; i < l->stream_count && status == cudaSuccess; i++) {
        status = wait_for(l->streams[0], l->streams[i]);
    }
    if (status == cudaSuccess) status = emu_put(l->streams[0], nccl_work(o));
    for (int i = 1; i < l->stream_count && status == cudaSuccess; i++) {
        status = wait_for(l->streams[i], l->streams[0]);
    }
    free(l->operation);
    free(l->streams);
    free(l);
    if (status == cudaSuccess) return ncclSuccess;
    return nccl_refuse(ncclUnhandledCudaError, "a launch: %s", cudaGetErrorName(status));
}

/* Before anything is asked of others. */
static ncclResult_t prepare(struct ncclComm *comm)
{
    struct nccl_launch *l = make_launch(comm);
    comm->launch = l;
    ncclResult_t result = check_launch(comm, l);
    if (result == ncclSuccess && captured(l) && !nccl_connected(comm, l, false)) {
        for (int i = 0; i < l->stream_count; i++) emu_capture_spoil(l->streams[i]);
        result = nccl_refuse(ncclInvalidUsage, "rank %d of %d: a capture would have to connect",
                             comm->rank, comm->ranks);
    }
    if (result != ncclSuccess) nccl_launch_drop(comm);
    return result;
}

/* Asks, and launches what is connected already. */
static ncclResult_t start(struct ncclComm *comm)
{
    comm->launch->operation->group = ++comm->groups;
    bool connected = nccl_connected(comm, comm->launch, true);
    emu_notify();
    if (!connected) nccl_count_host_wait();
    if (!comm->blocking) {
        comm->job = connected ? NCCL_NO_JOB : NCCL_CONNECT;
        ncclResult_t answer = nccl_job_answer(comm, !connected);
        if (answer == ncclInProgress) nccl_reserve(comm, comm->launch);
        if (!connected) return answer;
        ncclResult_t result = nccl_launch_now(comm);
        return result == ncclSuccess ? answer : result;
    }
    if (connected) return nccl_launch_now(comm);
    comm->job = NCCL_CONNECT;
    return ncclSuccess;
}

/* ---- the end of a group ---------------------------------------------------------------------- */

static ncclResult_t finish_jobs(void)
{
    ncclResult_t result = ncclSuccess;
    for (int i = 0; i < group.job_count; i++) {
        struct ncclComm *comm = group.jobs[i];
        ncclResult_t one = comm->blocking            ? nccl_job_wait(comm)
                           : comm->life == NCCL_LIVE ? nccl_job_answer(comm, true)
                                                     : ncclInternalError;
        if (result == ncclSuccess || result == ncclInProgress) {
            result = one != ncclSuccess ? one : result;
        }
    }
    return result;
}

static bool first_of_comm(int i)
{
    for (int j = 0; j < i; j++) {
        if (group.calls[j].comm == group.calls[i].comm) return false;
    }
    return true;
}

static ncclResult_t launch_all(void)
{
    ncclResult_t result = ncclSuccess;
    bool progress = false;
    for (int i = 0; i < group.count && result == ncclSuccess; i++) {
        if (first_of_comm(i)) result = prepare(group.calls[i].comm);
    }
    for (int i = 0; i < group.count; i++) {
        struct ncclComm *comm = group.calls[i].comm;
        if (!first_of_comm(i) || comm->launch == NULL) continue;
        if (result != ncclSuccess) {
            nccl_launch_drop(comm);
            continue;
        }
        result = start(comm);
        progress |= result == ncclInProgress;
        if (result == ncclInProgress) result = ncclSuccess;
    }
    for (int i = 0; i < group.count; i++) {
        struct ncclComm *comm = group.calls[i].comm;
        if (!first_of_comm(i) || !comm->blocking || comm->job != NCCL_CONNECT) continue;
        ncclResult_t one = nccl_job_wait(comm);
        if (result == ncclSuccess) result = one;
    }
    return result == ncclSuccess && progress ? ncclInProgress : result;
}

static ncclResult_t end_group(void)
{
    ncclResult_t result = group.error;
    if (result == ncclSuccess && group.job_count > 0 && group.count > 0) {
        result = nccl_refuse(ncclInvalidUsage, "a group that makes communicators and moves data");
    }
    if (result == ncclSuccess && group.count > 0) result = launch_all();
    if (result == ncclSuccess && group.job_count > 0) result = finish_jobs();
    group.error = ncclSuccess;
    group.count = group.job_count = 0;
    for (struct ncclComm *c = nccl_comms; c != NULL; c = c->next) {
        if (c->user == &group) c->user = NULL;
    }
    return result;
}

static void begin_group(void)
{
    watch_thread();
    group.depth++;
    open_groups++;
}

static ncclResult_t close_group(void)
{
    open_groups--;
    return --group.depth == 0 ? end_group() : ncclSuccess;
}

ncclResult_t ncclGroupStart(void)
{
    ncclResult_t result = nccl_enter("ncclGroupStart", NULL, NCCL_READY);
    if (result == ncclSuccess) begin_group();
    return nccl_leave(NULL, result);
}

/* The group ends also when the call fails: as the real one's does. */
ncclResult_t ncclGroupEnd(void)
{
    ncclResult_t result = nccl_enter("ncclGroupEnd", NULL, NCCL_READY);
    if (group.depth == 0) {
        result = nccl_refuse(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
        return nccl_leave(NULL, result);
    }
    nccl_group_failed(result);
    return nccl_leave(NULL, close_group());
}

/* ---- what goes into it ----------------------------------------------------------------------- */

ncclResult_t nccl_put(struct ncclComm *comm, const struct nccl_transfer *t, cudaStream_t handle)
{
    cudaError_t status = cudaSuccess;
    struct CUstream_st *stream = emu_stream(handle, &status);
    ncclResult_t result = ncclSuccess;
    if (stream == NULL) {
        result = nccl_refuse(ncclUnhandledCudaError, "%s: the stream: %s", nccl_call_name(t->kind),
                             cudaGetErrorName(status));
    } else if (stream->device != comm->device) {
        result = nccl_refuse(ncclInvalidArgument, "%s: a stream of device %d, the rank's is %d",
                             nccl_call_name(t->kind), stream->device, comm->device);
    }
    nccl_group_failed(result);
    if (result != ncclSuccess) return result;
    bool alone = group.depth == 0;
    if (alone) begin_group();
    if (group.count == group.room) {
        group.room = group.room > 0 ? 2 * group.room : 64;
        group.calls = grown(group.calls, (size_t)group.room * sizeof *group.calls);
    }
    struct group_call c = {comm, *t, stream};
    group.calls[group.count++] = c;
    return alone ? close_group() : ncclSuccess;
}

ncclResult_t nccl_put_job(struct ncclComm *comm)
{
    bool alone = group.depth == 0;
    if (alone) begin_group();
    group.jobs = grown(group.jobs, (size_t)(group.job_count + 1) * sizeof *group.jobs);
    group.jobs[group.job_count++] = comm;
    return alone ? close_group() : ncclSuccess;
}
