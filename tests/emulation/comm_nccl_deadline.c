/* comm_nccl_deadline.c - a shorter deadline than a group was made with, which a busy machine may
 * need to make it. The only file of the tests that looks into a group. */
#include "comm/nccl_internal.h"

void shorten(moe_comm *comm, double timeout);

void shorten(moe_comm *comm, double timeout)
{
    comm->table.timeout = timeout;
    ((moe__nccl_group *)comm->table.user)->timeout = timeout;
}
