/* nccl_operation.c - a rank's operation runs: it begins when its stream comes to it and the one
 * before is complete, and is complete when all of its transfers have moved.
 *
 * When it begins, what it sends is copied to the rank's room and what it receives is filled with
 * the pattern. When its communicator is aborted it ends with that. */
#include "nccl_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* One time that an operation runs: a captured one does so at each launch of its graph. */
struct run {
    bool begun, absent;
    ncclResult_t error;
    double begin_at; /* ms */
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* ---- beginning ------------------------------------------------------------------------------- */

static bool received_over(const struct nccl_operation *o, const void *p, size_t bytes)
{
    for (int i = 0; i < o->count; i++) {
        if (nccl_overlap(o->list[i].receive, o->list[i].receive_bytes, p, bytes)) return true;
    }
    return false;
}

/* What a receive leaves until it is complete, or for good when it is aborted. */
static void spoil(const struct nccl_operation *o)
{
    for (int i = 0; i < o->count; i++) {
        const struct nccl_transfer *t = &o->list[i];
        if (t->receive_bytes > 0 && emu_range_fault(t->receive, t->receive_bytes) == NULL) {
            emu_fill(t->receive, t->receive_bytes);
        }
    }
}

static void publish(const struct nccl_operation *o)
{
    struct nccl_seat *seat = nccl_seat(o->comm);
    unsigned char *room = nccl_room(o->comm->world, o->comm->rank);
    size_t used = 0;
    nccl_board_lock(o->comm->world->board);
    for (int i = 0; i < o->count; i++) {
        struct nccl_transfer *t = &seat->list[i];
        *t = o->list[i];
        t->index = t->kind == NCCL_SEND      ? seat->sends[t->peer]++
                   : t->kind == NCCL_RECEIVE ? seat->receives[t->peer]++
                                             : seat->collectives++;
        t->at = used;
        if (t->send_bytes > 0) memcpy(room + used, t->send, t->send_bytes);
        used += (t->send_bytes + 15) & ~(size_t)15;
    }
    seat->count = o->count;
    seat->active = true;
    nccl_board_unlock(o->comm->world->board);
}

static void begin(const struct nccl_operation *o)
{
    struct ncclComm *comm = o->comm;
    comm->active = true;
    for (int i = 0; i < o->count; i++) {
        if (nccl_buffers_gone(comm, &o->list[i])) return;
    }
    publish(o);
    bool in_place = false;
    for (int i = 0; i < o->count; i++) {
        in_place |= received_over(o, o->list[i].send, o->list[i].send_bytes);
    }
    if (!in_place) spoil(o);
}

/* ---- the steps of an operation --------------------------------------------------------------- */

static bool complete(const struct ncclComm *comm)
{
    const struct nccl_seat *seat = nccl_seat(comm);
    if (comm->error != ncclSuccess || !seat->active) return false;
    for (int i = 0; i < seat->count; i++) {
        const struct nccl_transfer *t = &seat->list[i];
        if (!t->done || (nccl_is_collective(t) && t->readers < comm->ranks)) return false;
    }
    return true;
}

/* It is the rank's turn: the misfortunes are counted here. */
static struct run *come_to(const struct nccl_operation *o)
{
    struct ncclComm *comm = o->comm;
    if (comm->active || comm->error != ncclSuccess) return NULL;
    if (o->ticket != 0 && o->ticket != comm->tickets_done + 1) return NULL;
    struct nccl_misfortune m = nccl_misfortune(comm->rank);
    struct run *run = calloc(1, sizeof *run);
    if (run == NULL) abort();
    run->absent = m.absent;
    run->error = m.error;
    run->begin_at = now() + m.delay;
    comm->active = true;
    return run;
}

static void end(const struct nccl_operation *o, struct run *run)
{
    struct ncclComm *comm = o->comm;
    if (run != NULL && comm->world != NULL) {
        nccl_board_lock(comm->world->board);
        nccl_seat(comm)->active = false;
        nccl_board_unlock(comm->world->board);
        comm->active = false;
    }
    if (o->ticket != 0) comm->tickets_done++;
    free(run);
    emu_notify();
}

static enum emu_step step(void *closure, void **state)
{
    const struct nccl_operation *o = closure;
    struct ncclComm *comm = o->comm;
    if (nccl_dead(comm)) {
        if (comm->life == NCCL_DESTROYED) {
            emu_mistake("NCCL: a graph runs with a communicator that was destroyed");
        }
        spoil(o);
        end(o, *state);
        *state = NULL;
        return EMU_DONE;
    }
    struct run *run = *state != NULL ? *state : (*state = come_to(o));
    if (run == NULL || run->absent) return EMU_BLOCKED;
    bool moved = false;
    if (!run->begun && now() < run->begin_at) return EMU_BLOCKED;
    if (!run->begun && run->error != ncclSuccess) comm->error = run->error;
    if (!run->begun && comm->error == ncclSuccess) begin(o);
    moved = !run->begun;
    run->begun = true;
    moved |= nccl_deliver(comm->world);
    if (!complete(comm)) return moved ? EMU_MOVED : EMU_BLOCKED;
    end(o, run);
    *state = NULL;
    return EMU_DONE;
}

/* The device has a sticky error. */
static void give_up(void *closure, void *state)
{
    const struct nccl_operation *o = closure;
    o->comm->error = ncclUnhandledCudaError;
    end(o, state);
}

static void drop(void *closure)
{
    const struct nccl_operation *o = closure;
    struct ncclComm *comm = o->comm;
    comm->operations--;
    comm->captured -= o->ticket == 0;
    nccl_comm_release(comm);
}

struct emu_work *nccl_work(const struct nccl_operation *o)
{
    size_t bytes = sizeof *o + (size_t)o->count * sizeof o->list[0];
    struct emu_work *work = emu_work_new("nccl", NULL, o, bytes);
    work->step = step;
    work->give_up = give_up;
    work->drop = drop;
    o->comm->operations++;
    o->comm->captured += o->ticket == 0;
    return work;
}

/* ---- what is pending ------------------------------------------------------------------------- */

const char *emu_nccl_pending(void)
{
    static __thread char text[4096];
    size_t used = 0;
    text[0] = 0;
    emu_lock();
    for (const struct ncclComm *c = nccl_comms; c != NULL; c = c->next) {
        if (c->world == NULL || !c->active || c->life != NCCL_LIVE) continue;
        const struct nccl_seat *seat = nccl_seat(c);
        for (int i = 0; i < seat->count && used < sizeof text - 256; i++) {
            char line[160];
            if (!seat->active || (seat->list[i].done && !nccl_is_collective(&seat->list[i])))
                continue;
            nccl_describe(line, sizeof line, &seat->list[i]);
            used += (size_t)snprintf(text + used, sizeof text - used, "rank %d of %d: %s\n",
                                     c->rank, c->ranks, line);
        }
    }
    emu_unlock();
    return text;
}
