/* nccl_memory.c - memory that NCCL gives, and buffers that are registered with a communicator. */
#include "nccl_internal.h"

#include <stdlib.h>

#ifndef EMU_NCCL_218

struct registration {
    struct registration *next;
    const struct ncclComm *comm;
};
static struct registration *registrations;

ncclResult_t ncclMemAlloc(void **out, size_t bytes)
{
    ncclResult_t result = nccl_enter("ncclMemAlloc", NULL, NCCL_READY);
    if (result == ncclSuccess && (out == NULL || bytes == 0)) {
        result = nccl_refuse(ncclInvalidArgument, "ncclMemAlloc of %zu bytes", bytes);
    }
    if (result == ncclSuccess && emu_capture_forbids()) {
        result = nccl_refuse(ncclUnhandledCudaError, "ncclMemAlloc while a stream captures");
    }
    if (result == ncclSuccess && cudaMalloc(out, bytes) != cudaSuccess) {
        result = nccl_refuse(ncclUnhandledCudaError, "ncclMemAlloc of %zu bytes", bytes);
    }
    return nccl_leave(NULL, result);
}

ncclResult_t ncclMemFree(void *p)
{
    ncclResult_t result = nccl_enter("ncclMemFree", NULL, NCCL_READY);
    if (result == ncclSuccess && cudaFree(p) != cudaSuccess) result = ncclUnhandledCudaError;
    return nccl_leave(NULL, result);
}

ncclResult_t ncclCommRegister(const ncclComm_t comm, void *p, size_t bytes, void **handle)
{
    ncclResult_t result = nccl_enter("ncclCommRegister", comm, NCCL_USABLE);
    if (result == ncclSuccess && (comm == NULL || handle == NULL || bytes == 0)) {
        result = nccl_refuse(ncclInvalidArgument, "ncclCommRegister of %zu bytes", bytes);
    }
    const char *fault = result == ncclSuccess ? emu_range_fault(p, bytes) : NULL;
    if (fault != NULL) {
        result = nccl_refuse(ncclInvalidArgument, "ncclCommRegister: %s", fault);
    }
    if (result == ncclSuccess) {
        struct registration *r = calloc(1, sizeof *r);
        if (r == NULL) abort();
        r->comm = comm;
        r->next = registrations;
        registrations = r;
        *handle = r;
    }
    return nccl_leave(comm, result);
}

ncclResult_t ncclCommDeregister(const ncclComm_t comm, void *handle)
{
    ncclResult_t result = nccl_enter("ncclCommDeregister", comm, NCCL_READY);
    struct registration **p = &registrations;
    while (result == ncclSuccess && *p != NULL && (*p != handle || (*p)->comm != comm)) {
        p = &(*p)->next;
    }
    if (result == ncclSuccess && *p == NULL) {
        result = nccl_refuse(ncclInvalidArgument, "ncclCommDeregister of nothing registered: %p",
                             handle);
    } else if (result == ncclSuccess) {
        struct registration *r = *p;
        *p = r->next;
        free(r);
    }
    return nccl_leave(comm, result);
}

#endif
