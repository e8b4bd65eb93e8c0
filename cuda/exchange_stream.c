/* exchange_stream.c - a stream of the host that exchanges of rows are put on, beside the call's.
 *
 *     call's stream     pack | branches ........... | experts | pack |         | combine
 *     exchange_stream         \ rows go ............/                 \ rows back /
 *
 * The end of an exchange is recorded where it was put, so that what other passes put behind it is
 * not waited for. In a capture the events are the edges of the graph. */
#include "cuda_internal.h"

static moe_status make_events(const moe__workers *workers, moe__cuda_pass *p)
{
    moe__cuda_scope scope;
    cudaError_t error = cudaSuccess;
    MOE_TRY(moe__cuda_enter_call(workers, &scope));
    if (!p->forked) error = cudaEventCreateWithFlags(&p->forked, cudaEventDisableTiming);
    for (int i = 0; i < MOE_COMM_REQUESTS && error == cudaSuccess; i++)
        if (!p->ended[i]) error = cudaEventCreateWithFlags(&p->ended[i], cudaEventDisableTiming);
    moe__cuda_leave(&scope);
    return moe__cuda_status(error, workers, "an event for exchange_stream");
}

moe_status moe__cuda_take_stream(const moe__workers *workers, void *of_host)
{
    cudaStream_t stream = (cudaStream_t)of_host;
    moe__cuda_scope scope;
    if (!stream) return MOE_OK;
    if (stream == cudaStreamLegacy || stream == cudaStreamPerThread)
        return moe__cuda_fail(MOE_ERROR_INVALID_ARGUMENT, workers,
                              "exchange_stream is a default stream of CUDA");
    MOE_TRY(moe__cuda_enter_call(workers, &scope));
    moe_status status = moe__cuda_check_stream(workers, "exchange_stream", of_host);
    moe__cuda_leave(&scope);
    return status == MOE_OK ? make_events(workers, workers->of_pass) : status;
}

void moe__cuda_drop_events(moe__cuda_pass *p)
{
    if (p->forked) (void)cudaEventDestroy(p->forked);
    for (int i = 0; i < MOE_COMM_REQUESTS; i++)
        if (p->ended[i]) (void)cudaEventDestroy(p->ended[i]);
}

/* What is put on `stream` later runs behind what is on `before` now. */
static moe_status order(const moe__workers *workers, void *stream, void *before, cudaEvent_t event)
{
    MOE_TRY(
        moe__cuda_status(cudaEventRecord(event, (cudaStream_t)before), workers, "cudaEventRecord"));
    return moe__cuda_status(cudaStreamWaitEvent((cudaStream_t)stream, event, 0), workers,
                            "cudaStreamWaitEvent of exchange_stream");
}

moe_status moe__cuda_fork(const moe__workers *workers, void **stream)
{
    moe__cuda_pass *p = workers->of_pass;
    void *beside = p ? p->host.exchange_stream : NULL;
    *stream = workers->stream;
    if (!beside || beside == workers->stream) return MOE_OK;
    MOE_TRY(order(workers, beside, workers->stream, p->forked));
    p->fork_open = true;
    *stream = beside;
    return MOE_OK;
}

moe_status moe__cuda_end_fork(const moe__workers *workers)
{
    moe__cuda_pass *p = workers->of_pass;
    if (!p || !p->fork_open) return MOE_OK;
    cudaEvent_t event = p->ended[p->ends % MOE_COMM_REQUESTS];
    MOE_TRY(moe__cuda_status(cudaEventRecord(event, (cudaStream_t)p->host.exchange_stream), workers,
                             "cudaEventRecord"));
    p->fork_open = false;
    p->ends++;
    return MOE_OK;
}

/* The last end is behind all others. */
moe_status moe__cuda_join(const moe__workers *workers, bool all)
{
    moe__cuda_pass *p = workers->of_pass;
    if (!p || !moe__cuda_is_forked(p)) return MOE_OK;
    moe_status status = all ? moe__cuda_end_fork(workers) : MOE_OK;
    if (all) p->fork_open = false;
    if (p->ends == p->joined) return status;
    p->joined = all ? p->ends : p->joined + 1;
    cudaError_t error = cudaStreamWaitEvent((cudaStream_t)workers->stream,
                                            p->ended[(p->joined - 1) % MOE_COMM_REQUESTS], 0);
    return status == MOE_OK ? moe__cuda_status(error, workers, "cudaStreamWaitEvent") : status;
}
