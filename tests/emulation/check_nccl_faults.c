/* check_nccl_faults.c - ranks of the fake libnccl that are late, absent, in error or gone: what the
 * others see, and how an abort ends it. */
#include "nccl_case.h"

#include <pthread.h>
#include <string.h>

static ncclResult_t async_error(struct rank_case *r, ncclComm_t comm)
{
    ncclResult_t error = ncclSuccess;
    NCCL(ncclCommGetAsyncError(comm, &error));
    return error;
}

static ncclResult_t poll(struct rank_case *r, ncclComm_t comm, int *asked)
{
    ncclResult_t error = async_error(r, comm);
    for (*asked = 1; error == ncclInProgress; ++*asked) {
        sleep_ms(1);
        error = async_error(r, comm);
    }
    return error;
}

static void abort_comm(struct rank_case *r)
{
    NCCL(ncclCommAbort(r->comm));
    CUDA(cudaStreamSynchronize(r->stream));
    meet(r);
}

/* ---- who never comes ------------------------------------------------------------------------- */

enum { N = 8 };

/* What has come of an all-to-all that is pending: the blocks of the ranks that are there, or of
 * none where it moves as a whole. */
static void check_blocks(struct rank_case *r, const float *y, bool whole)
{
    float got[16 * N];
    size_t bytes = (size_t)(N * r->ranks) * sizeof *y;
    cudaStream_t side;
    CUDA(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking));
    CUDA(cudaMemcpyAsync(got, y, bytes, cudaMemcpyDeviceToHost, side));
    CUDA(cudaStreamSynchronize(side));
    for (int p = 0; p < r->ranks; p++) EXPECT(all_nan(got + p * N, N) == (whole || p == 1));
    CUDA(cudaStreamDestroy(side));
}

/* Rank 1's stream never comes to its second operation. */
static void absent(struct rank_case *r, bool whole)
{
    float got[16 * N];
    size_t n = (size_t)(N * r->ranks);
    make_comm(r);
    emu_nccl_whole(whole);
    if (r->rank == 1) emu_nccl_absent(1, 2);
    meet(r);
    float *x = floats(r, n, 1.0f), *y = floats(r, n, 0.0f);
    NCCL(ncclAlltoAll(x, y, N, ncclFloat, r->comm, r->stream));
    CUDA(cudaStreamSynchronize(r->stream));
    read_floats(r, got, y, n);
    EXPECT(!all_nan(got, n));
    NCCL(ncclAlltoAll(x, y, N, ncclFloat, r->comm, r->stream));
    EXPECT(stays_pending(r->stream));
    EXPECT(async_error(r, r->comm) == ncclSuccess);
    const char *pending = emu_nccl_pending();
    EXPECT(r->rank == 1 || strstr(pending, "ncclAlltoAll, 8 float32") != NULL);
    meet(r);
    if (r->rank != 1) check_blocks(r, y, whole);
    meet(r);
    abort_comm(r);
    read_floats(r, got, y, n);
    EXPECT(all_nan(got, n));
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

static void body_absent(struct rank_case *r) { absent(r, false); }
static void body_absent_whole(struct rank_case *r) { absent(r, true); }

/* The same by the environment. */
static void body_absent_by_environment(struct rank_case *r)
{
    NCCL(ncclCommInitRank(&r->comm, r->ranks, r->id, r->rank));
    float *x = floats(r, 4, 1.0f), *y = floats(r, 4, 0.0f);
    NCCL(ncclAllReduce(x, y, 4, ncclFloat, ncclSum, r->comm, r->stream));
    CUDA(cudaStreamSynchronize(r->stream));
    NCCL(ncclAllReduce(x, y, 4, ncclFloat, ncclSum, r->comm, r->stream));
    EXPECT(stays_pending(r->stream));
    EXPECT(ncclAllGather(x, y, 1, ncclFloat, r->comm, r->stream) ==
           (r->rank == 0 ? ncclRemoteError : ncclSuccess));
    meet(r);
    abort_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* The rest of the environment's list: both ranks on one device, late, not blocking, in error. */
static void body_environment(struct rank_case *r)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclResult_t wanted = r->rank == 0 ? ncclRemoteError : ncclSuccess;
    cudaStream_t stream;
    int asked;
    config.blocking = 0;
    CUDA(cudaSetDevice(3));
    CUDA(cudaStreamCreate(&stream));
    EXPECT(ncclCommInitRankConfig(&r->comm, r->ranks, r->id, r->rank, &config) == ncclInProgress);
    EXPECT(poll(r, r->comm, &asked) == ncclSuccess && asked >= 3);
    float *x = floats(r, 4, 1.0f), *y = floats(r, 4, 0.0f);
    double begin = seconds();
    meet(r);
    EXPECT(ncclAllReduce(x, y, 4, ncclFloat, ncclSum, r->comm, stream) == ncclInProgress);
    EXPECT(poll(r, r->comm, &asked) == ncclSuccess && asked >= 3);
    CUDA(cudaStreamSynchronize(stream));
    EXPECT(seconds() - begin >= 40e-3);
    EXPECT(ncclAllReduce(x, y, 4, ncclFloat, ncclSum, r->comm, stream) == ncclInProgress);
    ncclResult_t error = poll(r, r->comm, &asked);
    EXPECT(stays_pending(stream));
    error = error == ncclSuccess ? async_error(r, r->comm) : error;
    EXPECT(error == wanted);
    meet(r);
    NCCL(ncclCommAbort(r->comm));
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaStreamDestroy(stream));
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
    CUDA(cudaSetDevice(r->rank));
}

/* A rank whose thread does not call at all; the others abort by themselves, at once. */
static void body_silent(struct rank_case *r)
{
    make_comm(r);
    float *x = floats(r, 4, 1.0f), *y = floats(r, 4, 0.0f);
    if (r->rank != 1) {
        NCCL(ncclAllReduce(x, y, 4, ncclFloat, ncclSum, r->comm, r->stream));
        EXPECT(stays_pending(r->stream));
        NCCL(ncclCommAbort(r->comm));
        CUDA(cudaStreamSynchronize(r->stream));
    }
    meet(r);
    if (r->rank == 1) NCCL(ncclCommAbort(r->comm));
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* Sends that are not in a group wait for their receives: all ranks send first, so none goes on. */
static void body_send_send(struct rank_case *r)
{
    int next = (r->rank + 1) % r->ranks, before = (r->rank + r->ranks - 1) % r->ranks;
    make_comm(r);
    float *x = floats(r, 1, 1.0f), *y = floats(r, 1, 0.0f), got = 1.0f;
    NCCL(ncclSend(x, 1, ncclFloat, next, r->comm, r->stream));
    NCCL(ncclRecv(y, 1, ncclFloat, before, r->comm, r->stream));
    EXPECT(stays_pending(r->stream));
    meet(r);
    abort_comm(r);
    read_floats(r, &got, y, 1);
    EXPECT(all_nan(&got, 1));
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* Rank 0 begins so much later, and the others with it. */
static void body_late(struct rank_case *r)
{
    enum { LATE = 60 };
    float got;
    make_comm(r);
    if (r->rank == 0) emu_nccl_delay(0, 1, LATE);
    float *x = floats(r, 1, 1.0f), *y = floats(r, 1, 0.0f);
    meet(r);
    double begin = seconds();
    meet(r);
    NCCL(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, r->comm, r->stream));
    read_floats(r, &got, y, 1);
    EXPECT(got == (float)r->ranks && seconds() - begin >= LATE * 1e-3);
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* ---- errors ---------------------------------------------------------------------------------- */

/* The second send of rank 1 fails, and with it the group; nothing of the group was put. */
static void body_failing_call(struct rank_case *r)
{
    make_comm(r);
    float *x = floats(r, 2, 1.0f), *y = floats(r, 2, 0.0f);
    if (r->rank == 1) {
        emu_nccl_fail(1, "ncclSend", 2, ncclSystemError);
        NCCL(ncclGroupStart());
        NCCL(ncclRecv(y, 1, ncclFloat, 0, r->comm, r->stream));
        NCCL(ncclSend(x, 1, ncclFloat, 0, r->comm, r->stream));
        EXPECT(ncclSend(x + 1, 1, ncclFloat, 0, r->comm, r->stream) == ncclSystemError);
        EXPECT(ncclGroupEnd() == ncclSystemError);
        CUDA(cudaStreamSynchronize(r->stream));
        EXPECT(async_error(r, r->comm) == ncclSuccess);
        emu_nccl_fail(-1, "ncclGroupEnd", 1, ncclUnhandledCudaError);
        NCCL(ncclGroupStart());
        EXPECT(ncclGroupEnd() == ncclUnhandledCudaError);
        emu_fail("ncclAllGather", 1, 0 + ncclInternalError);
        EXPECT(ncclAllGather(x, y, 1, ncclFloat, r->comm, r->stream) == ncclInternalError);
    }
    meet(r);
    NCCL(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, r->comm, r->stream));
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* One rank sees the error, the others wait and are told nothing. */
static void body_async_error(struct rank_case *r)
{
    ncclResult_t wanted = r->rank == 0 ? ncclRemoteError : ncclSuccess;
    make_comm(r);
    float *x = floats(r, 1, 1.0f), *y = floats(r, 1, 0.0f);
    if (r->rank == 0) emu_nccl_async_error(0, 1, ncclRemoteError);
    meet(r);
    NCCL(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, r->comm, r->stream));
    EXPECT(stays_pending(r->stream));
    EXPECT(async_error(r, r->comm) == wanted);
    EXPECT(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, r->comm, r->stream) == wanted);
    if (r->rank == 0) EXPECT(ncclCommDestroy(r->comm) == ncclRemoteError);
    meet(r);
    abort_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* ---- connections ----------------------------------------------------------------------------- */

static void exchange(struct rank_case *r, const float *x, float *y)
{
    NCCL(ncclGroupStart());
    NCCL(ncclSend(x, 1, ncclFloat, 1 - r->rank, r->comm, r->stream));
    NCCL(ncclRecv(y, 1, ncclFloat, 1 - r->rank, r->comm, r->stream));
    NCCL(ncclGroupEnd());
}

static void come(struct rank_case *r, int word)
{
    __atomic_store_n(&r->shared->word[word], 1, __ATOMIC_RELEASE);
}

static bool came(struct rank_case *r, int word)
{
    return __atomic_load_n(&r->shared->word[word], __ATOMIC_ACQUIRE) == 1;
}

/* The first time the host waits for a late peer: rank 0 returns after rank 1 has come. Later it
 * does not: rank 1 comes after rank 0 has returned. */
static void body_first_contact(struct rank_case *r)
{
    NCCL(ncclCommInitRank(&r->comm, r->ranks, r->id, r->rank));
    float *x = floats(r, 1, 1.0f), *y = floats(r, 1, 0.0f);
    meet(r);
    if (r->rank == 1) sleep_ms(30);
    if (r->rank == 1) come(r, 0);
    exchange(r, x, y);
    EXPECT(came(r, 0));
    if (!r->process) EXPECT(emu_nccl_host_waits() == 1);
    CUDA(cudaStreamSynchronize(r->stream));
    while (r->rank == 1 && !came(r, 1)) sleep_ms(1);
    exchange(r, x, y);
    if (r->rank == 0) come(r, 1);
    CUDA(cudaStreamSynchronize(r->stream));
    if (!r->process) EXPECT(emu_nccl_host_waits() == 1);
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* An abort from another thread ends the wait. */
static void *abort_later(void *p)
{
    while (emu_nccl_host_waits() == 0) sleep_ms(1);
    ncclCommAbort(((struct rank_case *)p)->comm);
    return NULL;
}

static void body_abort_of_a_wait(struct rank_case *r)
{
    pthread_t thread;
    NCCL(ncclCommInitRank(&r->comm, r->ranks, r->id, r->rank));
    float *x = floats(r, 1, 1.0f);
    meet(r);
    if (r->rank == 0) {
        EXPECT(pthread_create(&thread, NULL, abort_later, r) == 0);
        EXPECT(ncclSend(x, 1, ncclFloat, 1, r->comm, r->stream) == ncclInternalError);
        pthread_join(thread, NULL);
    } else {
        NCCL(ncclCommAbort(r->comm));
    }
    CUDA(cudaFree(x));
}

/* ---- shared resources, revoking -------------------------------------------------------------- */

/* The end of a part that shares is the end of the whole; of one that does not it is not. */
static void body_split_share(struct rank_case *r)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclComm_t child = NULL, shared = NULL;
    make_comm(r);
    float *x = floats(r, 1, 1.0f), *y = floats(r, 1, 0.0f), got = 0.0f;
    NCCL(ncclCommSplit(r->comm, 0, r->rank, &child, NULL));
    NCCL(ncclCommAbort(child));
    NCCL(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, r->comm, r->stream));
    read_floats(r, &got, y, 1);
    EXPECT(got == (float)r->ranks);
    config.splitShare = 1;
    NCCL(ncclCommSplit(r->comm, 0, r->rank, &shared, &config));
    if (r->rank == 0) NCCL(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, r->comm, r->stream));
    meet(r);
    NCCL(ncclCommAbort(shared));
    CUDA(cudaStreamSynchronize(r->stream));
    EXPECT(async_error(r, r->comm) == ncclInternalError);
    EXPECT(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, r->comm, r->stream) == ncclInternalError);
    NCCL(ncclCommAbort(r->comm));
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* What is under way ends without data, and the ranks that are left make a new one of it. */
static void body_revoke(struct rank_case *r)
{
    ncclComm_t rest = NULL;
    make_comm(r);
    float *x = floats(r, 1, 1.0f), *y = floats(r, 1, 0.0f), got = 0.0f;
    if (r->rank > 0) NCCL(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, r->comm, r->stream));
    EXPECT(ncclCommRevoke(r->comm, 1) == ncclInvalidArgument);
    NCCL(ncclCommRevoke(r->comm, 0));
    CUDA(cudaStreamSynchronize(r->stream));
    if (r->rank > 0) read_floats(r, &got, y, 1);
    EXPECT(r->rank == 0 || all_nan(&got, 1));
    EXPECT(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, r->comm, r->stream) == ncclInvalidUsage);
    EXPECT(ncclCommFinalize(r->comm) == ncclInvalidUsage);
    NCCL(ncclCommSplit(r->comm, 0, r->rank, &rest, NULL));
    NCCL(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, rest, r->stream));
    read_floats(r, &got, y, 1);
    EXPECT(got == (float)r->ranks);
    NCCL(ncclCommDestroy(rest));
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* ---- communicators that do not block --------------------------------------------------------- */

static ncclResult_t after(struct rank_case *r, ncclResult_t result, int *asked)
{
    EXPECT(result == ncclInProgress || result == ncclSuccess);
    return poll(r, r->comm, asked);
}

static void make_non_blocking(struct rank_case *r)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    int asked, count;
    config.blocking = 0;
    emu_nccl_polls(3);
    if (r->rank == 1) sleep_ms(20);
    EXPECT(ncclCommInitRankConfig(&r->comm, r->ranks, r->id, r->rank, &config) == ncclInProgress);
    EXPECT(ncclCommCount(r->comm, &count) == ncclInvalidArgument);
    EXPECT(after(r, ncclInProgress, &asked) == ncclSuccess && asked >= 4);
    NCCL(ncclCommCount(r->comm, &count));
}

static void body_non_blocking(struct rank_case *r)
{
    ncclComm_t child = NULL;
    float got[16];
    size_t n = (size_t)r->ranks;
    int asked;
    make_non_blocking(r);
    float *x = floats(r, n, (float)r->rank), *y = floats(r, n, 0.0f);
    for (int time = 0; time < 2; time++) {
        if (r->rank == 1) sleep_ms(20);
        EXPECT(ncclAlltoAll(x, y, 1, ncclFloat, r->comm, r->stream) == ncclInProgress);
        EXPECT(ncclAlltoAll(x, y, 1, ncclFloat, r->comm, r->stream) == ncclInvalidArgument);
        EXPECT(after(r, ncclInProgress, &asked) == ncclSuccess && asked >= 4);
        read_floats(r, got, y, n);
        for (int p = 0; p < r->ranks; p++) EXPECT(got[p] == (float)(p + r->rank));
    }
    NCCL(ncclCommSplit(r->comm, 0, 0, &child, NULL)); /* only a question tells more */
    EXPECT(after(r, ncclInProgress, &asked) == ncclSuccess && child != NULL && asked >= 4);
    EXPECT(poll(r, child, &asked) == ncclSuccess);
    NCCL(ncclCommDestroy(child));
    meet(r);
    emu_nccl_polls(0);
    meet(r);
    NCCL(ncclAlltoAll(x, y, 1, ncclFloat, r->comm, r->stream));
    EXPECT(after(r, ncclCommFinalize(r->comm), &asked) == ncclSuccess);
    EXPECT(ncclAlltoAll(x, y, 1, ncclFloat, r->comm, r->stream) == ncclInvalidUsage);
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

/* Nobody else comes: it stays in progress, and can be aborted. */
static void body_init_alone(struct rank_case *r)
{
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    if (r->rank > 0) return;
    EXPECT(ncclCommInitRankConfig(&r->comm, r->ranks, r->id, 0, &config) == ncclInProgress);
    for (int i = 0; i < 20; i++) {
        EXPECT(async_error(r, r->comm) == ncclInProgress);
        sleep_ms(1);
    }
    NCCL(ncclCommAbort(r->comm));
}

/* It waits for its operations, and for the others to do the same. */
static void body_finalize(struct rank_case *r)
{
    float got;
    make_comm(r);
    float *x = floats(r, 1, 1.0f), *y = floats(r, 1, 0.0f);
    if (r->rank == 1) sleep_ms(20);
    if (r->rank == 1) come(r, 0);
    NCCL(ncclAllReduce(x, y, 1, ncclFloat, ncclSum, r->comm, r->stream));
    NCCL(ncclCommFinalize(r->comm));
    EXPECT(came(r, 0));
    EXPECT(cudaStreamQuery(r->stream) == cudaSuccess);
    read_floats(r, &got, y, 1);
    EXPECT(got == (float)r->ranks);
    end_comm(r);
    CUDA(cudaFree(x));
    CUDA(cudaFree(y));
}

static const struct named_body bodies[] = {
    {.name = "absent", .body = body_absent, .processes = true},
    {.name = "absent_whole", .body = body_absent_whole, .processes = true},
    {.name = "absent_by_environment",
     .body = body_absent_by_environment,
     .ranks = -1,
     .processes = true,
     .environment = "absent=1:2,fail=0:ncclAllGather:1:6"},
    {.name = "environment",
     .body = body_environment,
     .ranks = -1,
     .processes = true,
     .environment = "share,polls=2,delay=1:1:40,async=0:2:6"},
    {.name = "silent", .body = body_silent, .processes = true},
    {.name = "send_send", .body = body_send_send, .processes = true},
    {.name = "late", .body = body_late, .processes = true},
    {.name = "failing_call", .body = body_failing_call, .processes = true},
    {.name = "async_error", .body = body_async_error, .processes = true},
    {.name = "first_contact", .body = body_first_contact, .ranks = 2, .processes = true},
    {.name = "abort_of_a_wait", .body = body_abort_of_a_wait, .processes = true},
    {.name = "split_share", .body = body_split_share, .processes = true},
    {.name = "revoke", .body = body_revoke, .processes = true},
    {.name = "non_blocking", .body = body_non_blocking, .processes = true},
    {.name = "init_alone", .body = body_init_alone, .processes = true},
    {.name = "finalize", .body = body_finalize, .processes = true},
    {.name = NULL},
};

int main(int argc, char **argv) { return run_bodies(argc, argv, "nccl_faults", bodies); }
