/* api_stream.c - waiting for streams, events and devices, asking them, and ordering them. */
#include "internal.h"

#include <string.h>

/* Waiting for, or asking, a stream that captures. */
static cudaError_t not_captured(struct CUstream_st *s, const char *name)
{
    if (!emu_captures(s)) return cudaSuccess;
    emu_capture_spoil(s);
    return emu_refuse(cudaErrorStreamCaptureUnsupported, "%s of a stream that captures", name);
}

cudaError_t cudaDeviceSynchronize(void)
{
    cudaError_t status = emu_enter("cudaDeviceSynchronize", EMU_UNSAFE);
    if (status == cudaSuccess) {
        emu_record(EMU_CALL_SYNCHRONIZE, "cudaDeviceSynchronize", NULL, 0, NULL, NULL);
        emu_finish_device(emu_device());
        status = emu_sticky(emu_device());
    }
    return emu_leave(status);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle)
{
    cudaError_t status = emu_enter("cudaStreamSynchronize", EMU_UNSAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL) status = not_captured(s, "cudaStreamSynchronize");
    if (s != NULL && status == cudaSuccess) {
        emu_record(EMU_CALL_SYNCHRONIZE, "cudaStreamSynchronize", s, 0, NULL, NULL);
        emu_finish_stream(s);
        status = emu_sticky(s->device);
    }
    return emu_leave(status);
}

/* A question may move things a little, so that asking again and again comes to an end. */
static cudaError_t answer(bool done, int device)
{
    if (emu_sticky(device) != cudaSuccess) return emu_sticky(device);
    return done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamQuery(cudaStream_t handle)
{
    cudaError_t status = emu_enter("cudaStreamQuery", EMU_UNSAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL) status = not_captured(s, "cudaStreamQuery");
    if (s != NULL && status == cudaSuccess) {
        emu_record(EMU_CALL_QUERY, "cudaStreamQuery", s, 0, NULL, NULL);
        if (s->head != NULL && emu_coin(2)) emu_run_one();
        status = answer(s->head == NULL, s->device);
    }
    return emu_leave(status);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags)
{
    cudaError_t status = emu_enter("cudaStreamWaitEvent", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    (void)flags;
    if (s != NULL && !emu_event_valid(event)) {
        status = emu_refuse(cudaErrorInvalidResourceHandle, "no event: %p", (void *)event);
    } else if (s != NULL) {
        emu_record(EMU_CALL_WAIT, "cudaStreamWaitEvent", s, 0, NULL, NULL);
        status = emu_put_wait(s, event->mark);
    }
    return emu_leave(status);
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned flags)
{
    cudaError_t status = emu_enter("cudaEventRecord", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    (void)flags;
    if (s != NULL && !emu_event_valid(event)) {
        status = emu_refuse(cudaErrorInvalidResourceHandle, "no event: %p", (void *)event);
    } else if (s != NULL && event->device != s->device) {
        status = emu_refuse(cudaErrorInvalidResourceHandle,
                            "an event of device %d recorded on a stream of device %d",
                            event->device, s->device);
    } else if (s != NULL) {
        emu_record(EMU_CALL_RECORD, "cudaEventRecord", s, 0, NULL, NULL);
        status = emu_put_record(s, event);
    }
    return emu_leave(status);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    return cudaEventRecordWithFlags(event, stream, 0);
}

static cudaError_t check_event(cudaEvent_t event, const char *name)
{
    if (!emu_event_valid(event)) {
        return emu_refuse(cudaErrorInvalidResourceHandle, "no event: %p", (void *)event);
    }
    if (event->mark == NULL || event->mark->capture == NULL) return cudaSuccess;
    return emu_refuse(cudaErrorCapturedEvent, "%s of an event recorded in a capture", name);
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    cudaError_t status = emu_enter("cudaEventQuery", EMU_UNSAFE);
    if (status == cudaSuccess) status = check_event(event, "cudaEventQuery");
    if (status == cudaSuccess) {
        emu_record(EMU_CALL_QUERY, "cudaEventQuery", NULL, 0, NULL, NULL);
        if (event->mark != NULL && !event->mark->done && emu_coin(2)) emu_run_one();
        status = answer(event->mark == NULL || event->mark->done, event->device);
    }
    return emu_leave(status);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    cudaError_t status = emu_enter("cudaEventSynchronize", EMU_UNSAFE);
    if (status == cudaSuccess) status = check_event(event, "cudaEventSynchronize");
    if (status == cudaSuccess) {
        emu_record(EMU_CALL_SYNCHRONIZE, "cudaEventSynchronize", NULL, 0, NULL, NULL);
        if (event->mark != NULL) emu_finish_mark(event->mark);
        status = emu_sticky(event->device);
    }
    return emu_leave(status);
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end)
{
    cudaError_t status = emu_enter("cudaEventElapsedTime", EMU_SAFE);
    if (status == cudaSuccess) status = check_event(start, "cudaEventElapsedTime");
    if (status == cudaSuccess) status = check_event(end, "cudaEventElapsedTime");
    if (status == cudaSuccess) {
        if (((start->flags | end->flags) & cudaEventDisableTiming) != 0 || start->mark == NULL ||
            end->mark == NULL) {
            status = emu_refuse(cudaErrorInvalidResourceHandle, "events without a time");
        } else if (!start->mark->done || !end->mark->done) {
            status = cudaErrorNotReady;
        } else {
            *ms = (float)(end->mark->time - start->mark->time);
        }
    }
    return emu_leave(status);
}

/* ---- host functions -------------------------------------------------------------------------- */

struct host_function {
    cudaHostFn_t function;
    void *data;
};

static void run_host_function(void *closure)
{
    const struct host_function *c = closure;
    *emu_in_host_function() = true;
    c->function(c->data);
    *emu_in_host_function() = false;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *data)
{
    cudaError_t status = emu_enter("cudaLaunchHostFunc", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL) {
        struct host_function c = {function, data};
        struct emu_work *work = emu_work_new("host function", run_host_function, &c, sizeof c);
        work->host = true;
        emu_record(EMU_CALL_HOST_FUNCTION, "cudaLaunchHostFunc", s, 0, NULL, NULL);
        status = emu_put(s, work);
    }
    return emu_leave(status);
}

/* ---- questions ------------------------------------------------------------------------------- */

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int *device)
{
    cudaError_t status = emu_enter("cudaStreamGetDevice", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL) *device = s->device;
    return emu_leave(status);
}

cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned *flags)
{
    cudaError_t status = emu_enter("cudaStreamGetFlags", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL) *flags = s->flags;
    return emu_leave(status);
}

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority)
{
    cudaError_t status = emu_enter("cudaStreamGetPriority", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL) *priority = 0;
    return emu_leave(status);
}
