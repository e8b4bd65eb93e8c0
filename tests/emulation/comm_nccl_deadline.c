/* comm_nccl_deadline.c - shorter deadlines than a group and its context were made with, which a busy
 * machine may need until all is ready. The only file of the tests that looks into a group. */
#include "comm/nccl_internal.h"
#include "cuda_internal.h"

void shorten(moe_comm *comm, double timeout);

void shorten(moe_comm *comm, double timeout)
{
    comm->table.timeout = timeout;
    ((moe__nccl_group *)comm->table.user)->timeout = timeout;
    ((moe__cuda_context *)moe__module_of_context(comm->context))->wait_seconds = 2 * timeout;
}
