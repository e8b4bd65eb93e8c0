/* self.c - the group of one rank. */
#include "internal.h"

moe_status moe_comm_create_self(moe_comm **comm, moe_context *context)
{
    if (!comm || !context)
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "%s is NULL",
                         comm ? "context" : "comm");
    moe_comm *c = moe__alloc_zeroed(context, sizeof *c);
    if (!c) return moe__fail(MOE_ERROR_OUT_OF_MEMORY, __func__, "no memory for the group");
    atomic_init(&c->references, 1);
    c->context = context;
    c->size = 1;
    moe__context_retain(context);
    *comm = c;
    return MOE_OK;
}

void moe__comm_retain(moe_comm *comm) { atomic_fetch_add(&comm->references, 1); }

void moe_comm_destroy(moe_comm *comm)
{
    if (!comm || atomic_fetch_sub(&comm->references, 1) != 1) return;
    moe_context *context = comm->context;
    moe__free(context, comm, sizeof *comm);
    moe_context_destroy(context);
}

int32_t moe_comm_rank(const moe_comm *comm) { return comm ? comm->rank : -1; }

int32_t moe_comm_size(const moe_comm *comm) { return comm ? comm->size : 0; }
