/* nccl_device.c - libmoe_nccl on its device: whose device is current, staging, what is still under
 * way, the words of CUDA and NCCL. */
#include "nccl_internal.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* ---- time ------------------------------------------------------------------------------------ */

double moe__nccl_seconds(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

void moe__nccl_rest(double waited)
{
    struct timespec pause = {0, waited < 2e-3 ? 20000 : 200000};
    if (waited < 2e-4)
        (void)sched_yield();
    else
        (void)nanosleep(&pause, NULL);
}

/* ---- errors ---------------------------------------------------------------------------------- */

int32_t moe__nccl_say_cuda(moe__nccl_group *g, const char *call, cudaError_t error)
{
    (void)snprintf(g->why, sizeof g->why, "%s: %s (%s)", call, cudaGetErrorName(error),
                   cudaGetErrorString(error));
    return 1;
}

/* The last error may be of an earlier call, so it comes second. NCCL keeps one for all, and the
 * host may have destroyed its communicator. */
int32_t moe__nccl_say(moe__nccl_group *g, const char *call, ncclResult_t result)
{
    const char *last = ncclGetLastError(NULL);
    bool more = last && last[0];
    (void)snprintf(g->why, sizeof g->why, "%s: %s%s%s", call, ncclGetErrorString(result),
                   more ? "; NCCL's last words: " : "", more ? last : "");
    return 1;
}

/* ---- whose device is current ----------------------------------------------------------------- */

bool moe__nccl_enter(const moe__nccl_group *g, moe__nccl_scope *scope)
{
    cudaError_t error;
    scope->host_error = cudaPeekAtLastError();
    scope->mode = cudaStreamCaptureModeRelaxed;
    error = cudaGetDevice(&scope->previous);
    if (error == cudaSuccess) error = cudaSetDevice(g->device);
    if (error == cudaSuccess) {
        error = cudaThreadExchangeStreamCaptureMode(&scope->mode);
        if (error != cudaSuccess) (void)cudaSetDevice(scope->previous);
    }
    if (error == cudaSuccess) return true;
    scope->error = error;
    if (scope->host_error == cudaSuccess) (void)cudaGetLastError();
    return false;
}

bool moe__nccl_enter_call(moe__nccl_group *g, moe__nccl_scope *scope)
{
    if (moe__nccl_enter(g, scope)) return true;
    (void)moe__nccl_say_cuda(g, "cudaSetDevice", scope->error);
    return false;
}

void moe__nccl_leave(const moe__nccl_scope *scope)
{
    enum cudaStreamCaptureMode mode = scope->mode;
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
    (void)cudaSetDevice(scope->previous);
    if (scope->host_error == cudaSuccess) (void)cudaGetLastError();
}

cudaError_t moe__nccl_captured(cudaStream_t stream, int *captured)
{
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaError_t error = cudaStreamIsCapturing(stream, &status);
    *captured = error == cudaErrorStreamCaptureImplicit ? MOE__NCCL_ELSEWHERE
                : status == cudaStreamCaptureStatusNone ? MOE__NCCL_NOT_CAPTURED
                                                        : MOE__NCCL_CAPTURED;
    return *captured == MOE__NCCL_ELSEWHERE ? cudaSuccess : error;
}

/* ---- staging --------------------------------------------------------------------------------- */

/* Every exchange of host memory has room for a piece of each rank, in and out. */
static void lay_out(moe__nccl_group *g)
{
    int64_t part = g->size * g->piece;
    for (int i = 0; i < MOE_COMM_REQUESTS && g->pinned; i++) {
        moe__nccl_exchange *x = &g->exchange[i];
        x->pinned_send = g->pinned + 2 * i * part;
        x->pinned_recv = x->pinned_send + part;
        x->staged_send = g->staged + 2 * i * part;
        x->staged_recv = x->staged_send + part;
    }
    g->peek = g->pinned ? g->pinned + 2 * MOE_COMM_REQUESTS * part : NULL;
}

/* Zeros, so that no note is in the staging before it has come. The group's own stream writes them,
 * which is asked before the staging goes if something fails here. */
static cudaError_t make_staging(moe__nccl_group *g)
{
    void *pinned = NULL, *staged = NULL;
    int64_t part = g->size * g->piece;
    if (g->size == 1) return cudaSuccess;
    g->staged_bytes = 2 * MOE_COMM_REQUESTS * part;
    g->pinned_bytes = g->staged_bytes + (int64_t)g->size * MOE__NCCL_FRAME;
    cudaError_t error = cudaHostAlloc(&pinned, (size_t)g->pinned_bytes, cudaHostAllocDefault);
    if (error != cudaSuccess) return error;
    g->pinned = pinned;
    error = cudaMalloc(&staged, (size_t)g->staged_bytes);
    if (error != cudaSuccess) return error;
    g->staged = staged;
    memset(g->pinned, 0, (size_t)g->pinned_bytes);
    lay_out(g);
    error = cudaMemsetAsync(g->staged, 0, (size_t)g->staged_bytes, g->side);
    if (error == cudaSuccess) error = cudaEventRecord(g->last, g->side);
    if (error != cudaSuccess) return error;
    g->last_recorded = true;
    return cudaStreamWaitEvent(g->stream, g->last, 0);
}

cudaError_t moe__nccl_equip(moe__nccl_group *g)
{
    cudaError_t error = cudaSuccess;
    if (g->own_stream) error = cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&g->side, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(&g->last, cudaEventDisableTiming);
    for (int i = 0; i < MOE_COMM_REQUESTS && error == cudaSuccess; i++)
        error = cudaEventCreateWithFlags(&g->exchange[i].done, cudaEventDisableTiming);
    return error == cudaSuccess ? make_staging(g) : error;
}

bool moe__nccl_has_stream(const moe__nccl_group *g)
{
    cudaEvent_t event;
    if (g->own_stream) return true;
    cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (error != cudaSuccess) return true; /* the next call tells */
    error = cudaEventRecord(event, g->stream);
    (void)cudaEventDestroy(event);
    return error != cudaErrorInvalidResourceHandle && error != cudaErrorInvalidValue;
}

void moe__nccl_unequip(moe__nccl_group *g)
{
    if (g->staged) (void)cudaFree(g->staged);
    if (g->pinned) (void)cudaFreeHost(g->pinned);
    for (int i = 0; i < MOE_COMM_REQUESTS; i++)
        if (g->exchange[i].done) (void)cudaEventDestroy(g->exchange[i].done);
    if (g->last) (void)cudaEventDestroy(g->last);
    if (g->side) (void)cudaStreamDestroy(g->side);
    if (g->own_stream && g->stream) (void)cudaStreamDestroy(g->stream);
}

/* ---- what is under way ----------------------------------------------------------------------- */

/* A device that failed does nothing any more. NCCL runs later exchanges after earlier ones,
 * whatever their streams, so that one event stands for all that it has; copies around them have
 * those of the requests. The host's stream is not asked: it may be captured. */
static bool is_idle(const moe__nccl_group *g)
{
    bool own = g->own_stream && g->stream;
    bool idle = !g->unsettled && (!own || cudaStreamQuery(g->stream) != cudaErrorNotReady) &&
                (!g->side || cudaStreamQuery(g->side) != cudaErrorNotReady);
    for (int i = 0; i < MOE_COMM_REQUESTS && idle; i++)
        idle = !g->exchange[i].recorded || cudaEventQuery(g->exchange[i].done) != cudaErrorNotReady;
    return idle && (!g->last_recorded || cudaEventQuery(g->last) != cudaErrorNotReady);
}

bool moe__nccl_is_idle(moe__nccl_group *g, double wait)
{
    double begin = moe__nccl_seconds(), waited = 0;
    while (!is_idle(g)) {
        if (waited > wait) return false;
        moe__nccl_rest(waited);
        waited = moe__nccl_seconds() - begin;
    }
    return true;
}
