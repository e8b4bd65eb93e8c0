/* nccl_init.c - communicators are made: from a unique id, all at once, or by splitting one. */
#include "nccl_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- one rank -------------------------------------------------------------------------------- */

static struct ncclComm *new_comm(struct nccl_world *w, int ranks, int rank, int device)
{
    struct ncclComm *comm = calloc(1, sizeof *comm);
    struct nccl_family *family = calloc(1, sizeof *family);
    if (comm == NULL || family == NULL) abort();
    comm->world = w;
    comm->family = family;
    comm->ranks = ranks;
    comm->rank = rank;
    comm->device = device;
    comm->blocking = true;
    comm->job = NCCL_JOIN;
    comm->next = nccl_comms;
    nccl_comms = comm;
    return comm;
}

struct ncclComm *nccl_stillborn(struct ncclComm *parent)
{
    struct ncclComm *comm = new_comm(parent->world, parent->ranks, parent->rank, parent->device);
    comm->world->references++;
    comm->family->dead = true;
    comm->blocking = false;
    comm->job = NCCL_NO_JOB;
    return comm;
}

ncclResult_t nccl_join(struct ncclComm **out, const char *path, int ranks, int rank, int device,
                       bool create)
{
    struct nccl_world *w = nccl_world_open(path, ranks, create);
    if (w == NULL) return ncclSystemError;
    struct nccl_seat *seat = &w->board->seat[rank];
    nccl_board_lock(w->board);
    bool taken = seat->pid != 0;
    if (!taken) {
        seat->pid = (int)getpid();
        seat->device = device;
        seat->shares_device = nccl_devices_shared();
        w->board->joined++;
    }
    nccl_board_unlock(w->board);
    if (taken) {
        nccl_world_close(w);
        return nccl_refuse(ncclInvalidUsage, "rank %d of %d joins twice", rank, ranks);
    }
    *out = new_comm(w, ranks, rank, device);
    nccl_job_watch(false);
    emu_notify();
    return ncclSuccess;
}

static ncclResult_t check_config(const ncclConfig_t *config)
{
    if (config == NULL) return ncclSuccess;
    if (config->magic != 0xcafebeef || config->size < offsetof(ncclConfig_t, cgaClusterSize)) {
        return nccl_refuse(ncclInvalidArgument, "a config without NCCL_CONFIG_INITIALIZER");
    }
    if (config->blocking != NCCL_CONFIG_UNDEF_INT && (config->blocking & ~1) != 0) {
        return nccl_refuse(ncclInvalidArgument, "config.blocking is %d", config->blocking);
    }
    if (config->splitShare != NCCL_CONFIG_UNDEF_INT && (config->splitShare & ~1) != 0) {
        return nccl_refuse(ncclInvalidArgument, "config.splitShare is %d", config->splitShare);
    }
    return ncclSuccess;
}

static bool blocks(const ncclConfig_t *config, bool otherwise)
{
    bool says = config != NULL && config->blocking != NCCL_CONFIG_UNDEF_INT;
    return says ? config->blocking != 0 : otherwise;
}

/* With the lock. A communicator that blocks is the caller's when all have come. */
static ncclResult_t begin(const char *name, ncclComm_t *out, int ranks, const ncclUniqueId *id,
                          int rank, int device, const ncclConfig_t *config)
{
    const char *path = nccl_id_path(id);
    struct ncclComm *comm = NULL;
    *out = NULL;
    if (ranks < 1 || ranks > NCCL_RANKS || rank < 0 || rank >= ranks) {
        return nccl_refuse(ncclInvalidArgument, "%s: rank %d of %d", name, rank, ranks);
    }
    if (path == NULL) return nccl_refuse(ncclInvalidArgument, "%s: no unique id", name);
    ncclResult_t result = check_config(config);
    if (result == ncclSuccess) result = nccl_join(&comm, path, ranks, rank, device, false);
    if (result != ncclSuccess) return result;
    comm->blocking = blocks(config, true);
    comm->user = nccl_this_thread();
    nccl_record_comm(name, comm);
    *out = comm;
    result = nccl_put_job(comm);
    if (result != ncclSuccess && result != ncclInProgress) *out = NULL;
    if (!nccl_in_group()) comm->user = NULL;
    return result;
}

static ncclResult_t init_rank(const char *name, ncclComm_t *out, int ranks, const ncclUniqueId *id,
                              int rank, const ncclConfig_t *config)
{
    ncclResult_t result = nccl_enter_as(name, rank);
    if (result == ncclSuccess && out == NULL) {
        result = nccl_refuse(ncclInvalidArgument, "%s with a NULL", name);
    }
    if (result == ncclSuccess) result = begin(name, out, ranks, id, rank, emu_device(), config);
    return nccl_leave(NULL, result);
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    ncclResult_t result = nccl_enter("ncclGetUniqueId", NULL, NCCL_READY);
    if (result == ncclSuccess && id == NULL) result = ncclInvalidArgument;
    if (result == ncclSuccess && !nccl_id_make(id)) result = ncclSystemError;
    return nccl_leave(NULL, result);
}

ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank)
{
    return init_rank("ncclCommInitRank", comm, ranks, &id, rank, NULL);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t *config)
{
    return init_rank("ncclCommInitRankConfig", comm, ranks, &id, rank, config);
}

/* ---- all ranks of a process ------------------------------------------------------------------ */

static bool devices_are_wrong(int count, const int *devices)
{
    for (int i = 0; i < count; i++) {
        int device = devices != NULL ? devices[i] : i;
        if (device < 0 || device >= emu_device_count()) return true;
        for (int j = 0; devices != NULL && j < i && !nccl_devices_shared(); j++) {
            if (devices[j] == device) return true;
        }
    }
    return false;
}

ncclResult_t ncclCommInitAll(ncclComm_t *comms, int count, const int *devices)
{
    ncclUniqueId id;
    ncclResult_t result = nccl_enter("ncclCommInitAll", NULL, NCCL_READY);
    if (result == ncclSuccess && (comms == NULL || count < 1 || count > NCCL_RANKS)) {
        result = nccl_refuse(ncclInvalidArgument, "ncclCommInitAll of %d ranks", count);
    }
    if (result == ncclSuccess && devices_are_wrong(count, devices)) {
        result = nccl_refuse(ncclInvalidUsage, "ncclCommInitAll: a device twice, or none");
    }
    if (result == ncclSuccess && !nccl_id_make(&id)) result = ncclSystemError;
    if (result != ncclSuccess) return nccl_leave(NULL, result);
    ncclGroupStart();
    for (int r = 0; r < count; r++) {
        result = begin("ncclCommInitAll", &comms[r], count, &id, r,
                       devices != NULL ? devices[r] : r, NULL);
    }
    result = ncclGroupEnd();
    return nccl_leave(NULL, result);
}

/* ---- parts of one ---------------------------------------------------------------------------- */

/* As the real one does: of a communicator that does not block only ncclCommGetAsyncError tells that
 * the split is in progress. */
ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *out,
                           ncclConfig_t *config)
{
    ncclResult_t result = nccl_enter("ncclCommSplit", comm, NCCL_READY);
    if (result == ncclSuccess && (comm == NULL || out == NULL || color < NCCL_SPLIT_NOCOLOR)) {
        result = nccl_refuse(ncclInvalidArgument, "ncclCommSplit with color %d", color);
    }
    if (result == ncclSuccess) result = check_config(config);
    if (result != ncclSuccess) return nccl_leave(comm, result);
    bool asks = config != NULL && config->splitShare == 1;
    struct nccl_split s = {.out = out,
                           .color = color,
                           .key = key,
                           .blocking = blocks(config, comm->blocking),
                           .shares = asks && !comm->revoked};
    nccl_record_comm("ncclCommSplit", comm);
    *out = NULL;
    comm->split = s;
    comm->job = NCCL_SPLIT;
    result = nccl_put_job(comm);
    return nccl_leave(comm, result == ncclInProgress ? ncclSuccess : result);
}
