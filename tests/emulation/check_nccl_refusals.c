/* check_nccl_refusals.c - what the fake libnccl refuses, and leaves alone then: buffers, arguments,
 * groups, communicators that cannot be. What it takes. */
#include "nccl_case.h"

#include <stdlib.h>
#include <string.h>

#define REFUSED(call, code, words) \
    EXPECT((call) == (code));      \
    EXPECT(strstr(emu_last_message(), words) != NULL)

/* ---- refusals -------------------------------------------------------------------------------- */

static void refused_buffers(struct rank_case *r, float *x, float *y)
{
    ncclComm_t c = r->comm;
    cudaStream_t s = r->stream;
    float *host = calloc(8, sizeof *host), *freed = NULL, *far = NULL;
    CUDA(cudaMalloc((void **)&freed, 64));
    CUDA(cudaFree(freed));
    CUDA(cudaSetDevice(5));
    CUDA(cudaMalloc((void **)&far, 64));
    CUDA(cudaSetDevice(0));
    REFUSED(ncclSend(host, 4, ncclFloat, 1, c, s), ncclInvalidArgument, "is host memory");
    REFUSED(ncclRecv(NULL, 4, ncclFloat, 1, c, s), ncclInvalidArgument, "is host memory");
    REFUSED(ncclSend(freed, 4, ncclFloat, 1, c, s), ncclInvalidArgument, "freed memory");
    REFUSED(ncclSend(x, 65, ncclFloat, 1, c, s), ncclInvalidArgument, "out of bounds");
    REFUSED(ncclAllGather(x, y, 64, ncclFloat, c, s), ncclInvalidArgument, "out of bounds");
    REFUSED(ncclSend(far, 4, ncclFloat, 1, c, s), ncclInvalidArgument,
            "of device 5, the rank's is 0");
    REFUSED(ncclSend((char *)x + 2, 4, ncclFloat, 1, c, s), ncclInvalidArgument, "not aligned");
    REFUSED(ncclAlltoAll(x, x, 4, ncclFloat, c, s), ncclInvalidArgument, "into what it sends");
    REFUSED(ncclAllGather(x, x + 1, 4, ncclFloat, c, s), ncclInvalidArgument, "into what it sends");
    CUDA(cudaFree(far));
    free(host);
}

static void refused_arguments(struct rank_case *r, float *x, float *y)
{
    ncclComm_t c = r->comm;
    cudaStream_t s = r->stream, other;
    CUDA(cudaSetDevice(5));
    CUDA(cudaStreamCreate(&other));
    REFUSED(ncclSend(x, 4, ncclFloat, 1, c, s), ncclInvalidUsage, "device is 0, the thread's 5");
    CUDA(cudaSetDevice(0));
    REFUSED(ncclSend(x, 4, ncclFloat, 1, c, other), ncclInvalidArgument, "a stream of device 5");
    CUDA(cudaStreamDestroy(other));
    REFUSED(ncclSend(x, 4, ncclFloat, 1, c, (cudaStream_t)y), ncclUnhandledCudaError, "the stream");
    REFUSED(ncclSend(x, 4, ncclFloat, 2, c, s), ncclInvalidArgument, "rank 2 of 2");
    REFUSED(ncclRecv(x, 4, ncclFloat, -1, c, s), ncclInvalidArgument, "rank -1 of 2");
    REFUSED(ncclBroadcast(x, y, 4, ncclFloat, 7, c, s), ncclInvalidArgument, "rank 7 of 2");
    REFUSED(ncclSend(x, 4, ncclNumTypes, 1, c, s), ncclInvalidArgument, "no type");
    REFUSED(ncclAllReduce(x, y, 4, ncclFloat8e4m3, ncclSum, c, s), ncclInvalidArgument,
            "no reduction");
    REFUSED(ncclAllReduce(x, y, 4, ncclFloat, ncclNumOps, c, s), ncclInvalidArgument,
            "no reduction");
    REFUSED(ncclSend(x, 4, ncclFloat, 1, NULL, s), ncclInvalidArgument, "ncclSend of NULL");
    REFUSED(ncclSend(x, 4, ncclFloat, 1, (ncclComm_t)y, s), ncclInvalidArgument, "no communicator");
    REFUSED(ncclSend(x, 4, ncclFloat, 0, c, s), ncclInvalidUsage, "to itself without a receive");
    REFUSED(ncclGroupEnd(), ncclInvalidUsage, "without ncclGroupStart");
    REFUSED(ncclCommDeregister(c, x), ncclInvalidArgument, "nothing registered");
}

static void refused_groups(struct rank_case *r, float *x, float *y)
{
    ncclComm_t c = r->comm, none = NULL;
    cudaStream_t s = r->stream;
    ncclUniqueId id;
    NCCL(ncclGroupStart());
    NCCL(ncclRecv(y, 4, ncclFloat, 1, c, s));
    NCCL(ncclRecv(y + 3, 4, ncclFloat, 1, c, s));
    REFUSED(ncclGroupEnd(), ncclInvalidArgument, "receives twice into one place");
    NCCL(ncclGroupStart());
    NCCL(ncclRecv(y, 4, ncclFloat, 1, c, s));
    NCCL(ncclSend(y + 3, 4, ncclFloat, 1, c, s));
    REFUSED(ncclGroupEnd(), ncclInvalidArgument, "into what it sends");
    NCCL(ncclGetUniqueId(&id));
    NCCL(ncclGroupStart());
    NCCL(ncclCommInitRank(&none, 1, id, 0));
    NCCL(ncclSend(x, 4, ncclFloat, 1, c, s));
    REFUSED(ncclGroupEnd(), ncclInvalidUsage, "makes communicators and moves data");
    NCCL(ncclCommAbort(none));
}

/* None of the refused calls leaves anything behind: the communicator still works. */
static void body_refusals(struct rank_case *r)
{
    float got = 0;
    make_comm(r);
    float *x = floats(r, 64, 1.0f), *y = floats(r, 64, 0.0f);
    if (r->rank == 0) {
        refused_buffers(r, x, y);
        refused_arguments(r, x, y);
        refused_groups(r, x, y);
    }
    meet(r);
    NCCL(ncclAllReduce(x, y, 64, ncclFloat, ncclSum, r->comm, r->stream));
    read_floats(r, &got, y, 1);
    EXPECT(got == 2.0f);
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* Pinned and managed memory is taken, and what NCCL gave; registered or not. */
static void body_memory(struct rank_case *r)
{
    float *kinds[3] = {NULL, NULL, NULL};
    void *handle = NULL;
    make_comm(r);
    float *y = floats(r, 4, 0.0f);
    CUDA(cudaMallocHost((void **)&kinds[0], 16));
    CUDA(cudaMallocManaged((void **)&kinds[1], 16, cudaMemAttachGlobal));
    NCCL(ncclMemAlloc((void **)&kinds[2], 16));
    EXPECT(ncclCommRegister(r->comm, y, 17, &handle) == ncclInvalidArgument);
    NCCL(ncclCommRegister(r->comm, kinds[2], 16, &handle));
    for (int k = 0; k < 3; k++) {
        float got[4], one[4] = {1, 1, 1, 1};
        CUDA(cudaMemcpyAsync(kinds[k], one, 16, cudaMemcpyDefault, r->stream));
        NCCL(ncclAllReduce(kinds[k], y, 4, ncclFloat, ncclSum, r->comm, r->stream));
        read_floats(r, got, y, 4);
        EXPECT(got[3] == 2.0f);
    }
    NCCL(ncclCommDeregister(r->comm, handle));
    end_comm(r);
    NCCL(ncclMemFree(kinds[2]));
    CUDA(cudaFree(kinds[1]));
    CUDA(cudaFreeHost(kinds[0]));
    CUDA(cudaFree(y));
}

/* Nothing at all, on both sides, is legal; an empty collective is nothing. */
static void body_empty(struct rank_case *r)
{
    make_comm(r);
    NCCL(ncclGroupStart());
    NCCL(ncclSend(NULL, 0, ncclFloat, 1 - r->rank, r->comm, r->stream));
    NCCL(ncclRecv(NULL, 0, ncclFloat, 1 - r->rank, r->comm, r->stream));
    NCCL(ncclGroupEnd());
    CUDA(cudaStreamSynchronize(r->stream));
    if (r->rank == 0) NCCL(ncclAlltoAll(NULL, NULL, 0, ncclFloat, r->comm, r->stream));
    NCCL(ncclGroupStart());
    NCCL(ncclGroupEnd());
    CUDA(cudaStreamSynchronize(r->stream));
    end_comm(r);
}

/* ---- making communicators -------------------------------------------------------------------- */

static void body_bad_init(struct rank_case *r)
{
    ncclConfig_t plain = NCCL_CONFIG_INITIALIZER, config = plain;
    ncclUniqueId none = {{0}};
    ncclComm_t comms[2] = {NULL, NULL};
    const int twice[2] = {1, 1};
    ncclResult_t error;
    REFUSED(ncclCommInitRank(&r->comm, 2, none, 0), ncclInvalidArgument, "no unique id");
    REFUSED(ncclCommInitRank(&r->comm, 2, r->id, 2), ncclInvalidArgument, "rank 2 of 2");
    config.magic = 0;
    REFUSED(ncclCommInitRankConfig(&r->comm, 2, r->id, 0, &config), ncclInvalidArgument,
            "a config");
    emu_nccl_fail(0, "ncclCommInitRank", 1, ncclSystemError);
    REFUSED(ncclCommInitRank(&r->comm, 2, r->id, 0), ncclSystemError, "as the test asked");
    config = plain;
    config.blocking = 2;
    REFUSED(ncclCommInitRankConfig(&r->comm, 2, r->id, 0, &config), ncclInvalidArgument,
            "blocking");
    REFUSED(ncclCommInitAll(comms, 2, twice), ncclInvalidUsage, "a device twice");
    REFUSED(ncclCommInitAll(comms, 9, NULL), ncclInvalidUsage, "a device twice, or none");
    config.blocking = 0;
    EXPECT(ncclCommInitRankConfig(&comms[0], 2, r->id, 0, &config) == ncclInProgress);
    REFUSED(ncclCommInitRank(&comms[1], 2, r->id, 0), ncclInvalidUsage, "joins twice");
    REFUSED(ncclCommInitRank(&comms[1], 3, r->id, 1), ncclSystemError, "there are 3 ranks");
    REFUSED(ncclCommInitRank(&comms[1], 2, r->id, 1), ncclInvalidUsage, "have one device, 0");
    EXPECT(comms[1] == NULL);
    do {
        NCCL(ncclCommGetAsyncError(comms[0], &error));
    } while (error == ncclInProgress);
    EXPECT(error == ncclInvalidUsage);
    NCCL(ncclCommAbort(comms[0]));
    REFUSED(ncclCommInitRank(&r->comm, 2, r->id, 0), ncclSystemError, "No such file");
}

/* One device for all, when the test allows it. */
static void body_shared_device(struct rank_case *r)
{
    cudaStream_t stream;
    float got = 0;
    emu_nccl_share_device(1);
    CUDA(cudaSetDevice(2));
    CUDA(cudaStreamCreate(&stream));
    cudaStream_t mine = r->stream;
    r->stream = stream;
    make_comm(r);
    float *x = floats(r, 1, 1.0f), *y = floats(r, 1, 0.0f);
    NCCL(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, r->comm, stream));
    read_floats(r, &got, y, 1);
    EXPECT(got == (float)r->ranks);
    end_comm(r);
    CUDA(cudaStreamDestroy(stream));
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
    r->stream = mine;
    CUDA(cudaSetDevice(r->rank));
}

/* A capture may not connect; what it holds is launched as often as one likes, by all ranks. */
static void body_capture_connects(struct rank_case *r)
{
    cudaGraph_t graph;
    NCCL(ncclCommInitRank(&r->comm, r->ranks, r->id, r->rank));
    float *x = floats(r, 2, 1.0f), *y = floats(r, 2, 0.0f);
    meet(r);
    if (r->rank == 0) {
        CUDA(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
        REFUSED(ncclAlltoAll(x, y, 1, ncclFloat, r->comm, r->stream), ncclInvalidUsage,
                "a capture would have to connect");
        EXPECT(cudaStreamEndCapture(r->stream, &graph) == cudaErrorStreamCaptureInvalidated);
        cudaGetLastError();
    }
    meet(r);
    warm_up(r, r->comm);
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

static const struct named_body bodies[] = {
    {.name = "refusals", .body = body_refusals, .ranks = 2, .processes = true},
    {.name = "memory", .body = body_memory, .ranks = 2, .processes = true},
    {.name = "empty", .body = body_empty, .ranks = 2, .processes = true},
    {.name = "bad_init", .body = body_bad_init, .ranks = 1},
    {.name = "shared_device", .body = body_shared_device},
    {.name = "capture_connects", .body = body_capture_connects, .ranks = 2, .processes = true},
    {.name = NULL},
};

int main(int argc, char **argv) { return run_bodies(argc, argv, "nccl_refusals", bodies); }
