/* device_nccl.c - see device_nccl.h. */
#include "support/device/device_nccl.h"

#ifdef MOE_TEST_NCCL
#include <moe/cuda.h>
#include <moe/nccl.h>

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(sizeof(ncclUniqueId) == sizeof((device_nccl *)0)->id, "an id is an id");

/* Before anything asks how many there are. */
static void __attribute__((constructor)) have_devices(void)
{
    (void)setenv("MOE_EMULATION_DEVICES", "8", 0);
}

void device_nccl_open(device_nccl *n, int32_t ranks)
{
    ncclUniqueId id;
    *n = (device_nccl){.ranks = ranks};
    if (ranks > DEVICE_NCCL_MOST || ncclGetUniqueId(&id) != ncclSuccess) abort();
    if (pthread_barrier_init(&n->all, NULL, (unsigned)ranks) != 0) abort();
    memcpy(n->id, &id, sizeof id);
}

moe_comm *device_nccl_connect(device_nccl *n, moe_context *context, int32_t rank, double timeout)
{
    ncclUniqueId id;
    ncclComm_t nccl = NULL;
    moe_comm *comm = NULL;
    moe_nccl_config c;
    memcpy(&id, n->id, sizeof id);
    if (cudaSetDevice(moe_cuda_device(context)) != cudaSuccess ||
        ncclCommInitRank(&nccl, n->ranks, id, rank) != ncclSuccess)
        return NULL;
    n->nccl[rank] = nccl;
    if (moe_nccl_config_init(&c, sizeof c) != MOE_OK) return NULL;
    c.comm = nccl;
    c.timeout = timeout;
    return moe_comm_create_nccl(&comm, context, &c) == MOE_OK ? comm : NULL;
}

void device_nccl_leave(device_nccl *n, int32_t rank, moe_comm *comm)
{
    bool broken = false;
    n->broken[rank] = !comm || moe_comm_poll(comm) != MOE_OK;
    (void)pthread_barrier_wait(&n->all);
    for (int32_t r = 0; r < n->ranks; r++) broken |= n->broken[r];
    if (!broken) return;
    if (n->nccl[rank] && ncclCommAbort(n->nccl[rank]) != ncclSuccess) abort();
    n->nccl[rank] = NULL;
    (void)pthread_barrier_wait(&n->all);
}

void device_nccl_close(device_nccl *n)
{
    (void)pthread_barrier_destroy(&n->all);
    for (int32_t r = 0; r < n->ranks; r++)
        if (n->nccl[r] && ncclCommDestroy(n->nccl[r]) != ncclSuccess) abort();
}
#else
typedef int device_nccl_is_not_here;
#endif
