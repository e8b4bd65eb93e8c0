/* nccl_match.c - transfers that belong together move.
 *
 * The k-th send of a pair belongs to the k-th receive, the k-th collective of a rank to everybody's
 * k-th. What does not fit is a mistake, after which nothing of the communicator moves, as with the
 * real library. */
#include "nccl_internal.h"

#include <stdio.h>
#include <string.h>

bool nccl_is_collective(const struct nccl_transfer *t)
{
    return t->kind != NCCL_SEND && t->kind != NCCL_RECEIVE;
}

/* ---- mistakes -------------------------------------------------------------------------------- */

/* Reported when the board is unlocked, for the process may end by it; the first one only. */
static char report[400];

static struct ncclComm *comm_of(const struct nccl_world *w, int rank)
{
    for (struct ncclComm *c = nccl_comms; c != NULL; c = c->next) {
        if (c->world == w && c->rank == rank && c->life == NCCL_LIVE) return c;
    }
    return NULL;
}

static void stop(const struct nccl_world *w, int rank)
{
    struct ncclComm *c = comm_of(w, rank);
    if (c != NULL) c->error = ncclInternalError;
}

static void mismatch(const struct nccl_world *w, int a, const struct nccl_transfer *ta, int b,
                     const struct nccl_transfer *tb)
{
    char mine[160], theirs[160];
    nccl_describe(mine, sizeof mine, ta);
    nccl_describe(theirs, sizeof theirs, tb);
    stop(w, a);
    stop(w, b);
    if (report[0] != 0) return;
    snprintf(report, sizeof report, "mismatch: rank %d: %s; rank %d: %s", a, mine, b, theirs);
}

static void faulty_buffer(const struct ncclComm *comm, const struct nccl_transfer *t,
                          const char *what)
{
    char text[160];
    nccl_describe(text, sizeof text, t);
    stop(comm->world, comm->rank);
    if (report[0] != 0) return;
    snprintf(report, sizeof report, "rank %d: %s: %s", comm->rank, text, what);
}

bool nccl_buffers_gone(const struct ncclComm *comm, const struct nccl_transfer *t)
{
    const char *fault = t->send_bytes > 0 ? emu_range_fault(t->send, t->send_bytes) : NULL;
    if (fault == NULL && t->receive_bytes > 0)
        fault = emu_range_fault(t->receive, t->receive_bytes);
    if (fault != NULL) faulty_buffer(comm, t, fault);
    return fault != NULL;
}

static const struct nccl_transfer *collective_at(const struct nccl_seat *seat, uint64_t index)
{
    for (int i = 0; seat->active && i < seat->count; i++) {
        if (nccl_is_collective(&seat->list[i]) && seat->list[i].index == index)
            return &seat->list[i];
    }
    return NULL;
}

static bool same_call(const struct nccl_transfer *a, const struct nccl_transfer *b)
{
    return a->kind == b->kind && a->type == b->type && a->count == b->count && a->op == b->op &&
           a->peer == b->peer && a->captured == b->captured;
}

/* ---- moving ---------------------------------------------------------------------------------- */

/* Bytes that were changed between the beginning of a send and its end. */
static void check_unchanged(const struct nccl_world *w, int rank, const struct nccl_transfer *t)
{
    const struct ncclComm *comm = comm_of(w, rank);
    if (comm == NULL || t->send_bytes == 0 || t->send == t->receive) return;
    if (nccl_overlap(t->send, t->send_bytes, t->receive, t->receive_bytes)) return;
    if (nccl_buffers_gone(comm, t)) return;
    if (memcmp(t->send, nccl_room(w, rank) + t->at, t->send_bytes) == 0) return;
    faulty_buffer(comm, t, "the send buffer was changed before the transfer was complete");
}

static bool fits(const struct nccl_transfer *send, const struct nccl_transfer *receive)
{
    return send->count == receive->count && send->type == receive->type &&
           send->captured == receive->captured;
}

/* False when it does not fit. */
static bool take(const struct nccl_world *w, int from, struct nccl_transfer *send, int to,
                 struct nccl_transfer *receive)
{
    if (!fits(send, receive)) {
        mismatch(w, from, send, to, receive);
        return false;
    }
    check_unchanged(w, from, send);
    memcpy(receive->receive, nccl_room(w, from) + send->at, receive->receive_bytes);
    emu_mark_written(receive->receive, receive->receive_bytes);
    send->done = receive->done = true;
    return true;
}

/* The other side of a send or a receive, NULL as long as it has not begun. */
static struct nccl_transfer *partner(const struct ncclComm *comm, const struct nccl_transfer *t)
{
    struct nccl_seat *peer = &comm->world->board->seat[t->peer];
    enum nccl_kind kind = t->kind == NCCL_SEND ? NCCL_RECEIVE : NCCL_SEND;
    for (int i = 0; peer->active && i < peer->count; i++) {
        struct nccl_transfer *s = &peer->list[i];
        if (s->kind == kind && s->peer == comm->rank && s->index == t->index) return s;
    }
    return NULL;
}

/* Receives move; of a send to another process it is only seen whether it fits. */
static bool exchange(const struct ncclComm *comm, struct nccl_transfer *t)
{
    struct nccl_transfer *other = partner(comm, t);
    if (other == NULL) return false;
    if (t->kind == NCCL_RECEIVE) return take(comm->world, t->peer, other, comm->rank, t);
    if (!fits(t, other)) mismatch(comm->world, comm->rank, t, t->peer, other);
    return false;
}

static void write_result(const struct ncclComm *comm, const struct nccl_transfer *t,
                         const unsigned char *const *in)
{
    size_t one = t->count * nccl_type_bytes(t->type), ours = (size_t)comm->rank * one;
    const void *from[NCCL_RANKS];
    unsigned char *out = t->receive;
    for (int r = 0; r < comm->ranks; r++) {
        size_t at = t->kind == NCCL_ALL_TO_ALL || t->kind == NCCL_REDUCE_SCATTER ? ours : 0;
        from[r] = in[r] + at;
    }
    if (t->kind == NCCL_BROADCAST) {
        memcpy(out, from[t->peer], one);
    } else if (t->kind == NCCL_ALL_TO_ALL || t->kind == NCCL_ALL_GATHER) {
        for (int r = 0; r < comm->ranks; r++) memcpy(out + (size_t)r * one, from[r], one);
    } else {
        nccl_reduce(out, from, comm->ranks, t->count, t->type, t->op);
    }
    emu_mark_written(out, t->receive_bytes);
}

/* Blocks of an all-to-all, of the ranks that have begun it. */
static bool take_blocks(const struct ncclComm *comm, struct nccl_transfer *t,
                        const unsigned char *const *in)
{
    size_t one = t->count * nccl_type_bytes(t->type);
    uint64_t before = t->taken;
    for (int r = 0; r < comm->ranks; r++) {
        unsigned char *to = (unsigned char *)t->receive + (size_t)r * one;
        if (in[r] == NULL || (t->taken >> r & 1) != 0) continue;
        memcpy(to, in[r] + (size_t)comm->rank * one, one);
        emu_mark_written(to, one);
        t->taken |= (uint64_t)1 << r;
    }
    return t->taken != before;
}

/* When all ranks have begun it; what differs is seen before that. */
static bool collect(const struct ncclComm *comm, struct nccl_transfer *t)
{
    const unsigned char *in[NCCL_RANKS] = {NULL};
    struct nccl_seat *seats = comm->world->board->seat;
    bool all = true, moved = false;
    for (int r = 0; r < comm->ranks; r++) {
        const struct nccl_transfer *theirs = collective_at(&seats[r], t->index);
        if (theirs != NULL && !same_call(t, theirs)) {
            mismatch(comm->world, comm->rank, t, r, theirs);
            return false;
        }
        all &= theirs != NULL;
        if (theirs != NULL) in[r] = nccl_room(comm->world, r) + theirs->at;
    }
    if (t->kind == NCCL_ALL_TO_ALL && !nccl_whole()) moved = take_blocks(comm, t, in);
    if (!all) return moved;
    check_unchanged(comm->world, comm->rank, t);
    if (t->taken == 0) write_result(comm, t, in);
    for (int r = 0; r < comm->ranks; r++) {
        ((struct nccl_transfer *)collective_at(&seats[r], t->index))->readers++;
    }
    t->done = true;
    return true;
}

bool nccl_deliver(const struct nccl_world *w)
{
    bool moved = false;
    nccl_board_lock(w->board);
    for (struct ncclComm *c = nccl_comms; c != NULL; c = c->next) {
        if (c->world != w || !c->active || nccl_dead(c)) continue;
        struct nccl_seat *seat = nccl_seat(c);
        for (int i = 0; seat->active && i < seat->count; i++) {
            struct nccl_transfer *t = &seat->list[i];
            if (t->done || c->error != ncclSuccess) continue;
            moved |= nccl_is_collective(t) ? collect(c, t) : exchange(c, t);
        }
    }
    nccl_board_unlock(w->board);
    if (report[0] != 0) {
        char text[sizeof report];
        memcpy(text, report, sizeof text);
        report[0] = 0;
        emu_mistake("NCCL: %s", text);
    }
    return moved;
}
