/* nccl_job.c - what a call waits for on the host: ranks to join, to split, to connect, to finalize.
 *
 * A communicator that blocks waits in its call, without the lock. Of one that does not the job goes
 * on whenever something runs, and its streams are reserved until ncclCommGetAsyncError has said
 * that it is over. */
#include "nccl_internal.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* ---- joining --------------------------------------------------------------------------------- */

static ncclResult_t check_devices(const struct ncclComm *comm)
{
    const struct nccl_board *board = comm->world->board;
    for (int i = 0; i < comm->ranks; i++) {
        for (int j = 0; j < i; j++) {
            const struct nccl_seat *a = &board->seat[j], *b = &board->seat[i];
            if (a->device != b->device || (a->shares_device && b->shares_device)) continue;
            return nccl_refuse(ncclInvalidUsage, "ranks %d and %d have one device, %d", j, i,
                               a->device);
        }
    }
    return ncclSuccess;
}

static bool joined(struct ncclComm *comm, ncclResult_t *result)
{
    struct nccl_board *board = comm->world->board;
    nccl_board_lock(board);
    bool all = board->joined == comm->ranks;
    nccl_board_unlock(board);
    if (!all) return false;
    for (int r = 0; r < comm->ranks; r++) {
        comm->world->remote |= board->seat[r].pid != (int)getpid();
    }
    nccl_world_unlink(comm->world);
    nccl_job_watch(comm->world->remote);
    *result = check_devices(comm);
    return true;
}

/* ---- splitting ------------------------------------------------------------------------------- */

static void post_split(struct ncclComm *comm)
{
    struct nccl_split *s = &comm->split;
    struct nccl_seat *seat = nccl_seat(comm);
    nccl_board_lock(comm->world->board);
    seat->color[comm->splits % 2] = s->color;
    seat->key[comm->splits % 2] = s->key;
    seat->splits = ++comm->splits;
    nccl_board_unlock(comm->world->board);
    s->posted = true;
    emu_notify();
}

/* Our rank among those of our color, and how many there are. */
static int rank_of_color(const struct ncclComm *comm, int *count)
{
    const struct nccl_split *s = &comm->split;
    uint64_t slot = (comm->splits - 1) % 2;
    int rank = 0;
    *count = 0;
    for (int r = 0; r < comm->ranks; r++) {
        const struct nccl_seat *seat = &comm->world->board->seat[r];
        if (seat->color[slot] != s->color) continue;
        int key = seat->key[slot];
        rank += key < s->key || (key == s->key && r < comm->rank);
        ++*count;
    }
    return rank;
}

static ncclResult_t make_child(struct ncclComm *comm)
{
    struct nccl_split *s = &comm->split;
    char path[NCCL_PATH];
    int count, rank = rank_of_color(comm, &count);
    int length = snprintf(path, sizeof path, "%s.%llu.%d", comm->world->path,
                          (unsigned long long)comm->splits, s->color);
    if (length >= (int)sizeof path) return nccl_refuse(ncclSystemError, "%s: too long", path);
    ncclResult_t result = nccl_join(&s->child, path, count, rank, comm->device, true);
    if (result != ncclSuccess) return result;
    s->child->blocking = s->blocking;
    if (s->shares) {
        free(s->child->family);
        s->child->family = comm->family;
    }
    return ncclSuccess;
}

static bool split(struct ncclComm *comm, ncclResult_t *result)
{
    struct nccl_split *s = &comm->split;
    if (!s->posted) post_split(comm);
    for (int r = 0; r < comm->ranks; r++) {
        if (comm->world->board->seat[r].splits < comm->splits) return false;
    }
    if (s->color == NCCL_SPLIT_NOCOLOR) return true;
    if (s->child == NULL) *result = make_child(comm);
    if (*result != ncclSuccess) return true;
    return nccl_job_over(s->child, result);
}

/* As the real one does, also without success. */
void nccl_split_ends(struct ncclComm *comm)
{
    struct nccl_split *s = &comm->split;
    if (s->color == NCCL_SPLIT_NOCOLOR) return;
    if (s->child == NULL) s->child = nccl_stillborn(comm);
    *s->out = s->child;
}

/* ---- finalizing ------------------------------------------------------------------------------ */

static bool finalized(struct ncclComm *comm)
{
    if (comm->active || comm->tickets_done < comm->tickets) return false;
    nccl_seat(comm)->finalized = true;
    for (int r = 0; r < comm->ranks; r++) {
        const struct nccl_seat *seat = &comm->world->board->seat[r];
        if (!seat->finalized && !seat->left) return false;
    }
    return true;
}

/* ---- jobs ------------------------------------------------------------------------------------ */

bool nccl_job_over(struct ncclComm *comm, ncclResult_t *result)
{
    enum nccl_job job = comm->job;
    bool over = true;
    *result = ncclSuccess;
    if (nccl_dead(comm) && job != NCCL_SPLIT) {
        *result = ncclInternalError;
    } else if (comm->family->dead) {
        *result = ncclInternalError;
    } else if (job == NCCL_JOIN) {
        over = joined(comm, result);
    } else if (job == NCCL_SPLIT) {
        over = split(comm, result);
    } else if (job == NCCL_FINALIZE) {
        over = finalized(comm);
    } else if (job == NCCL_CONNECT) {
        over = nccl_connected(comm, comm->launch, false);
    }
    if (!over) return false;
    if (job == NCCL_SPLIT) nccl_split_ends(comm);
    comm->job = NCCL_NO_JOB;
    if (job == NCCL_CONNECT && *result == ncclSuccess) *result = nccl_launch_now(comm);
    if (job == NCCL_JOIN && *result != ncclSuccess && comm->blocking) {
        comm->life = NCCL_DESTROYED;
        nccl_comm_release(comm);
    }
    return true;
}

ncclResult_t nccl_job_wait(struct ncclComm *comm)
{
    ncclResult_t result;
    while (!nccl_job_over(comm, &result)) {
        if (!emu_run_one()) emu_wait();
    }
    emu_notify();
    return result;
}

bool nccl_in_progress(const struct ncclComm *comm)
{
    return !comm->blocking && (comm->job != NCCL_NO_JOB || comm->polls > 0);
}

ncclResult_t nccl_job_answer(struct ncclComm *comm, bool waits)
{
    int polls = nccl_polls(waits);
    if (polls > comm->polls) comm->polls = polls;
    return nccl_in_progress(comm) ? ncclInProgress : ncclSuccess;
}

void nccl_reserve(struct ncclComm *comm, const struct nccl_launch *launch)
{
    size_t bytes = (size_t)launch->stream_count * sizeof *comm->reserved;
    comm->reserved = malloc(bytes);
    if (comm->reserved == NULL) abort();
    comm->reserved_count = launch->stream_count;
    for (int i = 0; i < launch->stream_count; i++) {
        comm->reserved[i] = launch->streams[i];
        launch->streams[i]->reserved++;
        launch->streams[i]->waiters++;
    }
}

void nccl_unreserve(struct ncclComm *comm)
{
    for (int i = 0; i < comm->reserved_count; i++) {
        comm->reserved[i]->reserved--;
        comm->reserved[i]->waiters--;
    }
    free(comm->reserved);
    comm->reserved = NULL;
    comm->reserved_count = 0;
}

/* ---- what goes on by itself ------------------------------------------------------------------ */

static void go_on(void)
{
    for (struct ncclComm *c = nccl_comms; c != NULL; c = c->next) {
        ncclResult_t result;
        if (c->life != NCCL_LIVE || c->blocking || c->job == NCCL_NO_JOB) continue;
        if (nccl_job_over(c, &result) && result != ncclSuccess) c->error = result;
    }
}

static bool busy(void)
{
    for (struct ncclComm *c = nccl_comms; c != NULL; c = c->next) {
        if (c->operations > 0 || (c->life == NCCL_LIVE && c->job != NCCL_NO_JOB)) return true;
    }
    return false;
}

/* Devices run while the host does something else; another process can see that. */
static void *run_streams(void *unused)
{
    (void)unused;
    for (;;) {
        usleep(1000);
        emu_lock();
        for (int i = 0; i < 64 && busy() && emu_run_one(); i++) {}
        emu_notify();
        emu_unlock();
    }
    return NULL;
}

void nccl_job_watch(bool remote)
{
    static bool running;
    pthread_t thread;
    emu_on_progress(go_on);
    if (!remote || running) return;
    running = pthread_create(&thread, NULL, run_streams, NULL) == 0;
    if (running) pthread_detach(thread);
}
