/* nccl_comm.c - communicators: how calls on them begin and end, questions, and their end.
 *
 * A communicator is never freed, so that a call on one that is gone is told apart from nonsense. */
#include "nccl_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

struct ncclComm *nccl_comms;

/* ---- beginning and end of a call ------------------------------------------------------------- */

bool nccl_dead(const struct ncclComm *comm)
{
    return comm->life != NCCL_LIVE || comm->family->dead || comm->revoked;
}

struct nccl_seat *nccl_seat(const struct ncclComm *comm)
{
    return &comm->world->board->seat[comm->rank];
}

ncclResult_t nccl_refuse(ncclResult_t result, const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    emu_refuse(cudaErrorUnknown, "NCCL: %s", text);
    return result;
}

static bool known(const struct ncclComm *comm)
{
    for (const struct ncclComm *c = nccl_comms; c != NULL; c = c->next) {
        if (c == comm) return true;
    }
    return false;
}

/* Before the call gets the lock: who comes meanwhile uses it at the same time. */
static ncclResult_t claim(const char *name, struct ncclComm *comm)
{
    ncclResult_t result = ncclSuccess;
    emu_lock();
    if (!known(comm)) {
        result = nccl_refuse(ncclInvalidArgument, "%s of no communicator: %p", name, (void *)comm);
    } else if (comm->life != NCCL_LIVE) {
        emu_mistake("NCCL: %s of a communicator that was %s", name,
                    comm->life == NCCL_ABORTED ? "aborted" : "destroyed");
        result = ncclInvalidArgument;
    } else if (comm->user != NULL && comm->user != nccl_this_thread()) {
        emu_mistake("NCCL: rank %d of %d: %s while another thread uses the communicator",
                    comm->rank, comm->ranks, name);
        result = ncclInvalidUsage;
    } else {
        comm->user = nccl_this_thread();
    }
    emu_unlock();
    return result;
}

static ncclResult_t check_alive(const char *name, const struct ncclComm *comm)
{
    if (!known(comm)) {
        return nccl_refuse(ncclInvalidArgument, "%s of no communicator: %p", name, (void *)comm);
    }
    if (comm->life == NCCL_LIVE) return ncclSuccess;
    emu_mistake("NCCL: %s of a communicator that was %s", name,
                comm->life == NCCL_ABORTED ? "aborted" : "destroyed");
    return ncclInvalidArgument;
}

static ncclResult_t check_state(const char *name, const struct ncclComm *comm, enum nccl_need need)
{
    if (comm->family->dead) {
        return nccl_refuse(ncclInternalError, "%s: resources shared with an aborted communicator",
                           name);
    }
    if (nccl_in_progress(comm)) {
        return nccl_refuse(ncclInvalidArgument, "%s before the call before it returned ncclSuccess",
                           name);
    }
    if (comm->error != ncclSuccess) {
        return nccl_refuse(comm->error, "%s after an asynchronous error", name);
    }
    if (need == NCCL_READY) return ncclSuccess;
    if (comm->revoked || comm->finalized) {
        return nccl_refuse(ncclInvalidUsage, "%s of a communicator that was %s", name,
                           comm->revoked ? "revoked" : "finalized");
    }
    if (emu_device() != comm->device) {
        return nccl_refuse(ncclInvalidUsage, "%s: the communicator's device is %d, the thread's %d",
                           name, comm->device, emu_device());
    }
    return ncclSuccess;
}

static ncclResult_t enter(const char *name, struct ncclComm *comm, enum nccl_need need, int rank)
{
    ncclResult_t claimed = comm != NULL && need != NCCL_ANY ? claim(name, comm) : ncclSuccess;
    cudaError_t status = emu_enter("", need == NCCL_ANY ? EMU_QUIET : EMU_SAFE);
    if (claimed != ncclSuccess) return claimed;
    if (comm != NULL && check_alive(name, comm) != ncclSuccess) return ncclInvalidArgument;
    ncclResult_t fault = nccl_fault(comm != NULL ? comm->rank : rank, name);
    if (fault != ncclSuccess) return nccl_refuse(fault, "%s: as the test asked", name);
    if (status != cudaSuccess && need != NCCL_ANY) {
        return nccl_refuse(ncclUnhandledCudaError, "%s: %s", name, cudaGetErrorName(status));
    }
    return comm != NULL && need != NCCL_ANY ? check_state(name, comm, need) : ncclSuccess;
}

ncclResult_t nccl_enter(const char *name, struct ncclComm *comm, enum nccl_need need)
{
    return enter(name, comm, need, -1);
}

ncclResult_t nccl_enter_as(const char *name, int rank)
{
    return enter(name, NULL, NCCL_READY, rank);
}

ncclResult_t nccl_leave(struct ncclComm *comm, ncclResult_t result)
{
    bool mine = comm != NULL && known(comm) && comm->user == nccl_this_thread();
    if (mine && !nccl_in_group()) comm->user = NULL;
    emu_leave(cudaSuccess);
    return result;
}

void nccl_record_comm(const char *name, const struct ncclComm *comm)
{
    struct emu_call call = {.kind = EMU_CALL_NCCL,
                            .name = name,
                            .device = comm->device,
                            .comm = comm,
                            .rank = comm->rank,
                            .peer = -1};
    emu_record_call(&call);
}

/* ---- questions ------------------------------------------------------------------------------- */

static ncclResult_t ask(const char *name, ncclComm_t comm, int *out, int value(const ncclComm_t))
{
    ncclResult_t result = nccl_enter(name, comm, NCCL_ANY);
    if (result == ncclSuccess && (comm == NULL || out == NULL)) {
        result = nccl_refuse(ncclInvalidArgument, "%s with a NULL", name);
    }
    if (result == ncclSuccess && nccl_in_progress(comm)) {
        result = nccl_refuse(ncclInvalidArgument, "%s of a communicator in progress", name);
    }
    if (result == ncclSuccess) *out = value(comm);
    return nccl_leave(NULL, result);
}

static int count_of(const ncclComm_t comm) { return comm->ranks; }
static int rank_of(const ncclComm_t comm) { return comm->rank; }
static int device_of(const ncclComm_t comm) { return comm->device; }

ncclResult_t ncclCommCount(const ncclComm_t comm, int *count)
{
    return ask("ncclCommCount", comm, count, count_of);
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank)
{
    return ask("ncclCommUserRank", comm, rank, rank_of);
}

ncclResult_t ncclCommCuDevice(const ncclComm_t comm, int *device)
{
    return ask("ncclCommCuDevice", comm, device, device_of);
}

ncclResult_t ncclGetVersion(int *version)
{
#ifdef EMU_NCCL_218
    int answer = 21805;
#else
    int answer = NCCL_VERSION_CODE;
#endif
    if (version == NULL) return ncclInvalidArgument;
    *version = answer;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result)
{
    switch (result) {
    case ncclSuccess: return "no error";
    case ncclUnhandledCudaError: return "unhandled cuda error";
    case ncclSystemError: return "unhandled system error";
    case ncclInternalError: return "internal error";
    case ncclInvalidArgument: return "invalid argument";
    case ncclInvalidUsage: return "invalid usage";
    case ncclRemoteError: return "remote process exited or there was a network error";
    case ncclInProgress: return "NCCL operation in progress";
    default: return "unknown result code";
    }
}

const char *ncclGetLastError(ncclComm_t comm)
{
    (void)comm;
    return emu_last_message();
}

/* While something is in progress each question counts. As questions of CUDA do, it moves things a
 * little, so that asking again and again comes to an end. */
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *out)
{
    ncclResult_t result = nccl_enter("ncclCommGetAsyncError", comm, NCCL_ANY), job;
    if (result == ncclSuccess && (comm == NULL || out == NULL)) {
        result = nccl_refuse(ncclInvalidArgument, "ncclCommGetAsyncError with a NULL");
    }
    if (result != ncclSuccess) return nccl_leave(NULL, result);
    if (emu_coin(2)) emu_run_one();
    if (comm->job != NCCL_NO_JOB && !comm->blocking && nccl_job_over(comm, &job)) comm->error = job;
    if (emu_sticky(comm->device) != cudaSuccess) comm->error = ncclUnhandledCudaError;
    *out = comm->family->dead           ? ncclInternalError
           : comm->error != ncclSuccess ? comm->error
           : nccl_in_progress(comm)     ? ncclInProgress
                                        : ncclSuccess;
    if (comm->job == NCCL_NO_JOB && comm->polls > 0) comm->polls--;
    if (*out != ncclInProgress) nccl_unreserve(comm);
    return nccl_leave(NULL, result);
}

/* ---- the end --------------------------------------------------------------------------------- */

void nccl_comm_release(struct ncclComm *comm)
{
    if (comm->life == NCCL_LIVE || comm->operations > 0 || comm->world == NULL) return;
    nccl_world_close(comm->world);
    comm->world = NULL;
}

static void end(struct ncclComm *comm, bool aborted)
{
    nccl_launch_drop(comm);
    nccl_unreserve(comm);
    if (comm->job == NCCL_SPLIT) nccl_split_ends(comm);
    comm->job = NCCL_NO_JOB;
    comm->life = aborted ? NCCL_ABORTED : NCCL_DESTROYED;
    nccl_board_lock(comm->world->board);
    nccl_seat(comm)->left = true;
    nccl_board_unlock(comm->world->board);
    nccl_comm_release(comm);
    emu_notify();
}

/* The real one waits, without a deadline, until the graphs are destroyed. */
static void check_graphs(const char *name, const struct ncclComm *comm)
{
    if (comm->captured > 0) {
        emu_mistake("NCCL: rank %d of %d: %s of a communicator that a graph has", comm->rank,
                    comm->ranks, name);
    }
}

/* Waits for what was put, as the real one does: for good when a peer never comes. */
ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    if (comm == NULL) return ncclSuccess;
    ncclResult_t result = nccl_enter("ncclCommDestroy", comm, NCCL_READY);
    if (result != ncclSuccess) return nccl_leave(comm, result);
    nccl_record_comm("ncclCommDestroy", comm);
    check_graphs("ncclCommDestroy", comm);
    while (!nccl_dead(comm) && (comm->active || comm->tickets_done < comm->tickets)) {
        if (!emu_run_one()) emu_wait();
    }
    if (comm->life == NCCL_LIVE) end(comm, false);
    return nccl_leave(comm, result);
}

/* What has begun ends without its data; others are not waited for, nor told. */
ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    if (comm == NULL) return ncclSuccess;
    ncclResult_t result = nccl_enter("ncclCommAbort", comm, NCCL_ANY);
    if (result != ncclSuccess) return nccl_leave(NULL, result);
    nccl_record_comm("ncclCommAbort", comm);
    check_graphs("ncclCommAbort", comm);
    comm->family->dead = true;
    end(comm, true);
    return nccl_leave(NULL, result);
}

#ifndef EMU_NCCL_218
ncclResult_t ncclCommRevoke(ncclComm_t comm, int flags)
{
    ncclResult_t result = nccl_enter("ncclCommRevoke", comm, NCCL_ANY);
    if (result == ncclSuccess && (comm == NULL || flags != NCCL_REVOKE_DEFAULT)) {
        result = nccl_refuse(ncclInvalidArgument, "ncclCommRevoke with flags %d", flags);
    }
    if (result != ncclSuccess) return nccl_leave(NULL, result);
    nccl_record_comm("ncclCommRevoke", comm);
    nccl_launch_drop(comm);
    nccl_unreserve(comm);
    comm->job = NCCL_NO_JOB;
    comm->revoked = true;
    comm->error = ncclSuccess;
    emu_notify();
    return nccl_leave(NULL, comm->blocking ? ncclSuccess : nccl_job_answer(comm, true));
}
#endif

ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    ncclResult_t result = nccl_enter("ncclCommFinalize", comm, NCCL_USABLE);
    if (result == ncclSuccess && comm == NULL) result = ncclInvalidArgument;
    if (result != ncclSuccess) return nccl_leave(comm, result);
    nccl_record_comm("ncclCommFinalize", comm);
    check_graphs("ncclCommFinalize", comm);
    comm->finalized = true;
    comm->job = NCCL_FINALIZE;
    return nccl_leave(comm, nccl_put_job(comm));
}

size_t emu_nccl_live(void)
{
    size_t live = 0;
    emu_lock();
    for (const struct ncclComm *c = nccl_comms; c != NULL; c = c->next) {
        live += c->life == NCCL_LIVE;
    }
    emu_unlock();
    return live;
}
