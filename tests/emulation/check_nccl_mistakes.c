/* check_nccl_mistakes.c - what no correct program does, and the fake libnccl reports where the real
 * one hangs or writes nonsense. */
#include "nccl_case.h"

#include <pthread.h>
#include <string.h>

#define MISTAKE(words) EXPECT(mistaken(words))

/* ---- calls that do not fit, buffers ---------------------------------------------------------- */

static void watch(struct rank_case *r)
{
    make_comm(r);
    if (r->rank == 0) watch_mistakes();
    meet(r);
}

static void unwatch(struct rank_case *r)
{
    meet(r);
    if (r->rank == 0) emu_on_mistake(NULL);
    meet(r);
}

/* Until the mistake is there; then the communicator is of no use. */
static void stop(struct rank_case *r, const char *words)
{
    for (int i = 0; i < 5000 && !mistaken(words); i++) {
        cudaStreamQuery(r->stream);
        sleep_ms(1);
    }
    MISTAKE(words);
    meet(r);
    NCCL(ncclCommAbort(r->comm));
    CUDA(cudaStreamSynchronize(r->stream));
    unwatch(r);
    cudaGetLastError();
}

static void body_other_count(struct rank_case *r)
{
    size_t n = 4 + (size_t)r->rank;
    watch(r);
    float *x = floats(r, 64, 1.0f), *y = floats(r, 64, 0.0f);
    NCCL(ncclAlltoAll(x, y, n, ncclFloat, r->comm, r->stream));
    stop(r, "mismatch: rank ");
    EXPECT(mistaken("rank 0: call 6, ncclAlltoAll, 4 float32"));
    EXPECT(mistaken("rank 1: call 6, ncclAlltoAll, 5 float32"));
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

static void body_other_call(struct rank_case *r)
{
    watch(r);
    float *x = floats(r, 64, 1.0f), *y = floats(r, 64, 0.0f);
    if (r->rank == 0) NCCL(ncclAllReduce(x, y, 4, ncclFloat, ncclMax, r->comm, r->stream));
    if (r->rank == 1) NCCL(ncclAllGather(x, y, 4, ncclFloat, r->comm, r->stream));
    stop(r, "ncclAllReduce, 4 float32, op 2");
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

static void body_other_size(struct rank_case *r)
{
    watch(r);
    float *x = floats(r, 64, 1.0f);
    if (r->rank == 0) NCCL(ncclSend(x, 4, ncclFloat, 1, r->comm, r->stream));
    if (r->rank == 1) NCCL(ncclRecv(x, 5, ncclFloat, 0, r->comm, r->stream));
    stop(r, "ncclSend to 1, 4 float32; rank 1: call 6, ncclRecv from 0, 5 float32");
    CUDA(cudaFree(x));
}

/* One rank captures, the other does not. */
static void body_one_captures(struct rank_case *r)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    watch(r);
    float *x = floats(r, 64, 1.0f), *y = floats(r, 64, 0.0f);
    if (r->rank == 0) CUDA(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
    NCCL(ncclAllReduce(x, y, 4, ncclFloat, ncclSum, r->comm, r->stream));
    if (r->rank == 0) {
        CUDA(cudaStreamEndCapture(r->stream, &graph));
        CUDA(cudaGraphInstantiate(&exec, graph, 0));
        CUDA(cudaGraphDestroy(graph));
        CUDA(cudaGraphLaunch(exec, r->stream));
        CUDA(cudaGraphExecDestroy(exec));
    }
    stop(r, "captured");
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* What is sent is written by another stream meanwhile. */
static void body_overwritten(struct rank_case *r)
{
    cudaStream_t other;
    watch(r);
    CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    float *x = floats(r, 64, 1.0f), *y = floats(r, 64, 0.0f);
    if (r->rank == 0) {
        NCCL(ncclSend(x, 64, ncclFloat, 1, r->comm, r->stream));
        EXPECT(stays_pending(r->stream));
        CUDA(cudaMemsetAsync(x, 0, 4, other));
        CUDA(cudaStreamSynchronize(other));
    }
    meet(r);
    if (r->rank == 1) NCCL(ncclRecv(y, 64, ncclFloat, 0, r->comm, r->stream));
    stop(r, "the send buffer was changed");
    CUDA(cudaStreamDestroy(other));
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* Memory freed in the order of another stream, while a call with it is queued. */
static void body_freed(struct rank_case *r)
{
    cudaStream_t other;
    watch(r);
    CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    float *x = floats(r, 64, 1.0f);
    if (r->rank == 0) {
        emu_nccl_delay(0, 1, 20);
        NCCL(ncclSend(x, 64, ncclFloat, 1, r->comm, r->stream));
        CUDA(cudaFreeAsync(x, other));
        CUDA(cudaStreamSynchronize(other));
    }
    meet(r);
    if (r->rank == 1) NCCL(ncclRecv(x, 64, ncclFloat, 0, r->comm, r->stream));
    stop(r, "freed memory");
    CUDA(cudaStreamDestroy(other));
    if (r->rank == 1) CUDA(cudaFree(x));
}

/* ---- handles and threads --------------------------------------------------------------------- */

static void body_use_after_end(struct rank_case *r)
{
    ncclResult_t error;
    watch(r);
    float *x = floats(r, 1, 1.0f);
    ncclComm_t gone = r->comm;
    end_comm(r);
    EXPECT(ncclSend(x, 1, ncclFloat, 0, gone, r->stream) == ncclInvalidArgument);
    MISTAKE("ncclSend of a communicator that was destroyed");
    EXPECT(ncclCommDestroy(gone) == ncclInvalidArgument);
    ncclUniqueId id;
    NCCL(ncclGetUniqueId(&id));
    NCCL(ncclCommInitRank(&gone, 1, id, 0));
    NCCL(ncclCommAbort(gone));
    EXPECT(ncclCommGetAsyncError(gone, &error) == ncclInvalidArgument);
    MISTAKE("ncclCommGetAsyncError of a communicator that was aborted");
    EXPECT(ncclCommAbort(gone) == ncclInvalidArgument);
    unwatch(r);
    CUDA(cudaFree(x));
}

struct intruder {
    struct rank_case *r;
    float *x;
    ncclResult_t result, question;
};

static void *intrude(void *p)
{
    struct intruder *i = p;
    ncclResult_t error;
    cudaSetDevice(i->r->rank);
    i->result = ncclBroadcast(i->x, i->x, 1, ncclFloat, 0, i->r->comm, i->r->stream);
    i->question = ncclCommGetAsyncError(i->r->comm, &error);
    return NULL;
}

/* Another thread while this one's group is open. Questions are legal. */
static void body_two_threads(struct rank_case *r)
{
    pthread_t thread;
    watch(r);
    float *x = floats(r, 1, 1.0f);
    struct intruder i = {r, x, ncclSuccess, ncclSuccess};
    NCCL(ncclGroupStart());
    NCCL(ncclBroadcast(x, x, 1, ncclFloat, 0, r->comm, r->stream));
    EXPECT(pthread_create(&thread, NULL, intrude, &i) == 0);
    pthread_join(thread, NULL);
    EXPECT(i.result == ncclInvalidUsage && i.question == ncclSuccess);
    MISTAKE("ncclBroadcast while another thread uses the communicator");
    NCCL(ncclGroupEnd());
    end_comm(r);
    unwatch(r);
    CUDA(cudaFree(x));
}

static void *leave_open(void *p)
{
    (void)p;
    ncclGroupStart();
    return NULL;
}

static void body_open_group(struct rank_case *r)
{
    pthread_t thread;
    watch_mistakes();
    EXPECT(pthread_create(&thread, NULL, leave_open, NULL) == 0);
    pthread_join(thread, NULL);
    MISTAKE("a thread ends with 1 groups open");
    unwatch(r);
}

/* A stream whose call is in progress may not be touched. */
static void body_stream_in_progress(struct rank_case *r)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclResult_t error;
    config.blocking = 0;
    emu_nccl_polls(2);
    ncclCommInitRankConfig(&r->comm, 2, r->id, r->rank, &config);
    do {
        NCCL(ncclCommGetAsyncError(r->comm, &error));
    } while (error == ncclInProgress);
    float *x = floats(r, 1, 1.0f);
    meet(r);
    if (r->rank == 0) watch_mistakes();
    meet(r);
    EXPECT(ncclBroadcast(x, x, 1, ncclFloat, 0, r->comm, r->stream) == ncclInProgress);
    EXPECT(cudaStreamSynchronize(r->stream) != cudaSuccess);
    MISTAKE("a stream used while NCCL's call on it is in progress");
    do {
        NCCL(ncclCommGetAsyncError(r->comm, &error));
    } while (error == ncclInProgress);
    CUDA(cudaStreamSynchronize(r->stream));
    end_comm(r);
    unwatch(r);
    cudaGetLastError();
    CUDA(cudaFree(x));
}

/* A graph that is there when its communicator ends, and runs after that. */
static void body_graph_after_end(struct rank_case *r)
{
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    watch(r);
    float *x = floats(r, 1, 1.0f);
    CUDA(cudaStreamBeginCapture(r->stream, cudaStreamCaptureModeThreadLocal));
    NCCL(ncclBroadcast(x, x, 1, ncclFloat, 0, r->comm, r->stream));
    CUDA(cudaStreamEndCapture(r->stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    end_comm(r);
    MISTAKE("ncclCommDestroy of a communicator that a graph has");
    CUDA(cudaGraphLaunch(exec, r->stream));
    CUDA(cudaStreamSynchronize(r->stream));
    MISTAKE("a graph runs with a communicator that was destroyed");
    CUDA(cudaGraphExecDestroy(exec));
    unwatch(r);
    CUDA(cudaFree(x));
}

/* ---- the end of a process -------------------------------------------------------------------- */

static void body_not_destroyed(struct rank_case *r)
{
    make_comm(r);
    meet(r);
}

static void body_group_at_exit(struct rank_case *r) { NCCL(ncclGroupStart()); }

/* The real library would wait for good. */
static void body_mismatch_ends(struct rank_case *r)
{
    make_comm(r);
    float *x = floats(r, 8, 1.0f);
    NCCL(ncclBroadcast(x, x, 1 + (size_t)r->rank, ncclFloat, 0, r->comm, r->stream));
    cudaStreamSynchronize(r->stream);
}

static void body_unreadable(struct rank_case *r)
{
    ncclUniqueId id;
    NCCL(ncclGetUniqueId(&id));
    emu_nccl_polls(0);
}

static const struct named_body bodies[] = {
    {.name = "other_count", .body = body_other_count, .ranks = 2},
    {.name = "other_call", .body = body_other_call, .ranks = 2},
    {.name = "other_size", .body = body_other_size, .ranks = 2},
    {.name = "one_captures", .body = body_one_captures, .ranks = 2},
    {.name = "overwritten", .body = body_overwritten, .ranks = 2},
    {.name = "freed", .body = body_freed, .ranks = 2},
    {.name = "use_after_end", .body = body_use_after_end, .ranks = 2},
    {.name = "two_threads", .body = body_two_threads, .ranks = 2},
    {.name = "open_group", .body = body_open_group, .ranks = 1},
    {.name = "stream_in_progress", .body = body_stream_in_progress, .ranks = 2},
    {.name = "graph_after_end", .body = body_graph_after_end, .ranks = 2},
    {.name = "not_destroyed",
     .body = body_not_destroyed,
     .ranks = -1,
     .processes = true,
     .environment = "leaks",
     .ends_with = "NCCL: the process ends with 1 communicators not destroyed"},
    {.name = "group_at_exit",
     .body = body_group_at_exit,
     .ranks = -1,
     .processes = true,
     .ends_with = "NCCL: the process ends with 1 groups open"},
    {.name = "mismatch_ends",
     .body = body_mismatch_ends,
     .ranks = -1,
     .processes = true,
     .ends_with = "call 6, ncclBroadcast of 0, 2 float32"},
    {.name = "unreadable",
     .body = body_unreadable,
     .ranks = -1,
     .processes = true,
     .environment = "polls=2,nonsense",
     .ends_with = "MOE_EMULATION_NCCL: cannot read 'nonsense'"},
    {.name = NULL},
};

int main(int argc, char **argv) { return run_bodies(argc, argv, "nccl_mistakes", bodies); }
