/* nccl_call.c - the calls that move data: what each sends and receives, in bytes.
 *
 * Buffers are device, managed or pinned memory, of the communicator's device and aligned to their
 * type; the real library takes more and then faults. */
#include "nccl_internal.h"

#include <string.h>

/* ---- checks ---------------------------------------------------------------------------------- */

static ncclResult_t check_buffer(const struct ncclComm *comm, const struct nccl_transfer *t,
                                 const char *side, const void *p, size_t bytes)
{
    const char *name = nccl_call_name(t->kind);
    const struct emu_allocation *a = emu_find(p);
    if (bytes == 0) return ncclSuccess;
    if (a == NULL) {
        return nccl_refuse(ncclInvalidArgument, "%s: the %s buffer, %p, is host memory", name, side,
                           p);
    }
    const char *fault = emu_range_fault(p, bytes);
    if (fault != NULL) {
        return nccl_refuse(ncclInvalidArgument, "%s: the %s buffer: %s", name, side, fault);
    }
    if (a->place == EMU_DEVICE && a->device != comm->device) {
        return nccl_refuse(ncclInvalidArgument,
                           "%s: the %s buffer is of device %d, the rank's is %d", name, side,
                           a->device, comm->device);
    }
    if ((uintptr_t)p % nccl_type_bytes(t->type) != 0) {
        return nccl_refuse(ncclInvalidArgument, "%s: the %s buffer, %p, is not aligned to %s", name,
                           side, p, nccl_type_name(t->type));
    }
    return ncclSuccess;
}

bool nccl_overlap(const void *p, size_t n, const void *q, size_t m)
{
    const unsigned char *a = p, *b = q;
    return n > 0 && m > 0 && a < b + m && b < a + n;
}

/* Where a collective may receive into what it sends. */
static bool in_place(const struct ncclComm *comm, const struct nccl_transfer *t)
{
    const unsigned char *send = t->send, *receive = t->receive;
    size_t rank = (size_t)comm->rank;
    switch (t->kind) {
    case NCCL_ALL_GATHER: return send == receive + rank * t->send_bytes;
    case NCCL_REDUCE_SCATTER: return receive == send + rank * t->receive_bytes;
    case NCCL_ALL_REDUCE:
    case NCCL_BROADCAST: return send == receive;
    default: return false;
    }
}

static ncclResult_t check_transfer(const struct ncclComm *comm, const struct nccl_transfer *t)
{
    const char *name = nccl_call_name(t->kind);
    if (nccl_type_bytes(t->type) == 0) {
        return nccl_refuse(ncclInvalidArgument, "%s: no type: %d", name, (int)t->type);
    }
    bool peer = t->kind == NCCL_SEND || t->kind == NCCL_RECEIVE || t->kind == NCCL_BROADCAST;
    if (peer && (t->peer < 0 || t->peer >= comm->ranks)) {
        return nccl_refuse(ncclInvalidArgument, "%s: rank %d of %d", name, t->peer, comm->ranks);
    }
    bool reduces = t->kind == NCCL_ALL_REDUCE || t->kind == NCCL_REDUCE_SCATTER;
    if (reduces && !nccl_reduce(NULL, NULL, 0, 0, t->type, t->op)) {
        return nccl_refuse(ncclInvalidArgument, "%s: no reduction %d of %s", name, (int)t->op,
                           nccl_type_name(t->type));
    }
    if (t->count > NCCL_ROOM) {
        return nccl_refuse(ncclInvalidArgument, "%s: %zu elements", name, t->count);
    }
    return ncclSuccess;
}

/* With the bytes of each side known. */
static ncclResult_t check_buffers(const struct ncclComm *comm, const struct nccl_transfer *t)
{
    ncclResult_t result = check_buffer(comm, t, "send", t->send, t->send_bytes);
    if (result == ncclSuccess) {
        result = check_buffer(comm, t, "receive", t->receive, t->receive_bytes);
    }
    if (result == ncclSuccess &&
        nccl_overlap(t->send, t->send_bytes, t->receive, t->receive_bytes) && !in_place(comm, t)) {
        result = nccl_refuse(ncclInvalidArgument, "%s: receives into what it sends",
                             nccl_call_name(t->kind));
    }
    return result;
}

ncclResult_t nccl_check_overlaps(const struct nccl_operation *o)
{
    for (int i = 0; i < o->count; i++) {
        for (int j = 0; j < o->count; j++) {
            const struct nccl_transfer *a = &o->list[i], *b = &o->list[j];
            bool twice = i < j &&
                         nccl_overlap(a->receive, a->receive_bytes, b->receive, b->receive_bytes);
            bool sent = i != j &&
                        nccl_overlap(a->receive, a->receive_bytes, b->send, b->send_bytes);
            if (!twice && !sent) continue;
            return nccl_refuse(ncclInvalidArgument,
                               "a group receives twice into one place, or into what it sends: "
                               "%s and %s",
                               nccl_call_name(a->kind), nccl_call_name(b->kind));
        }
    }
    return ncclSuccess;
}

/* ---- calls ----------------------------------------------------------------------------------- */

static void find_bytes(const struct ncclComm *comm, struct nccl_transfer *t)
{
    size_t one = t->count * nccl_type_bytes(t->type), all = one * (size_t)comm->ranks;
    switch (t->kind) {
    case NCCL_SEND: t->send_bytes = one; break;
    case NCCL_RECEIVE: t->receive_bytes = one; break;
    case NCCL_ALL_TO_ALL: t->send_bytes = t->receive_bytes = all; break;
    case NCCL_ALL_GATHER:
        t->send_bytes = one;
        t->receive_bytes = all;
        break;
    case NCCL_REDUCE_SCATTER:
        t->send_bytes = all;
        t->receive_bytes = one;
        break;
    case NCCL_ALL_REDUCE: t->send_bytes = t->receive_bytes = one; break;
    case NCCL_BROADCAST:
        t->send_bytes = t->peer == comm->rank ? one : 0;
        t->receive_bytes = one;
        break;
    }
}

/* An empty collective is nothing; an empty send or receive has its place in the order. */
static ncclResult_t call(ncclComm_t comm, struct nccl_transfer t, cudaStream_t stream)
{
    const char *name = nccl_call_name(t.kind);
    if (comm == NULL) {
        ncclResult_t none = nccl_enter(name, NULL, NCCL_READY);
        if (none == ncclSuccess) none = nccl_refuse(ncclInvalidArgument, "%s of NULL", name);
        return nccl_leave(NULL, none);
    }
    ncclResult_t result = nccl_enter(name, comm, NCCL_USABLE);
    if (result == ncclSuccess) result = check_transfer(comm, &t);
    if (result == ncclSuccess) {
        find_bytes(comm, &t);
        result = check_buffers(comm, &t);
    }
    bool empty = t.count == 0 && t.kind != NCCL_SEND && t.kind != NCCL_RECEIVE;
    if (result == ncclSuccess && !empty) {
        t.call = ++comm->calls;
        result = nccl_put(comm, &t, stream);
    } else if (result != ncclSuccess) {
        nccl_group_failed(result);
    }
    return nccl_leave(comm, result);
}

ncclResult_t ncclSend(const void *send, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream)
{
    struct nccl_transfer t = {.kind = NCCL_SEND,
                              .type = type,
                              .peer = peer,
                              .count = count,
                              .send = send};
    return call(comm, t, stream);
}

ncclResult_t ncclRecv(void *receive, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream)
{
    struct nccl_transfer t = {.kind = NCCL_RECEIVE,
                              .type = type,
                              .peer = peer,
                              .count = count,
                              .receive = receive};
    return call(comm, t, stream);
}

static struct nccl_transfer collective(enum nccl_kind kind, const void *send, void *receive,
                                       size_t count, ncclDataType_t type)
{
    struct nccl_transfer t =
        {.kind = kind, .type = type, .peer = -1, .count = count, .send = send, .receive = receive};
    return t;
}

#ifndef EMU_NCCL_218
ncclResult_t ncclAlltoAll(const void *send, void *receive, size_t count, ncclDataType_t type,
                          ncclComm_t comm, cudaStream_t stream)
{
    return call(comm, collective(NCCL_ALL_TO_ALL, send, receive, count, type), stream);
}
#endif

ncclResult_t ncclAllGather(const void *send, void *receive, size_t count, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream)
{
    return call(comm, collective(NCCL_ALL_GATHER, send, receive, count, type), stream);
}

ncclResult_t ncclAllReduce(const void *send, void *receive, size_t count, ncclDataType_t type,
                           ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
{
    struct nccl_transfer t = collective(NCCL_ALL_REDUCE, send, receive, count, type);
    t.op = op;
    return call(comm, t, stream);
}

ncclResult_t ncclReduceScatter(const void *send, void *receive, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream)
{
    struct nccl_transfer t = collective(NCCL_REDUCE_SCATTER, send, receive, count, type);
    t.op = op;
    return call(comm, t, stream);
}

ncclResult_t ncclBroadcast(const void *send, void *receive, size_t count, ncclDataType_t type,
                           int root, ncclComm_t comm, cudaStream_t stream)
{
    struct nccl_transfer t = collective(NCCL_BROADCAST, send, receive, count, type);
    t.peer = root;
    return call(comm, t, stream);
}
