/* stream.c - streams as queues that run late: what is put on one runs when somebody must see it.
 *
 * Here is what is put, and what it is put on; progress.c runs it. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

enum { STREAM_MAGIC = 0x57e34a01, EVENT_MAGIC = 0x0e7e2702 };

struct CUstream_st *emu_streams;
uint64_t emu_next_number = 1;
static struct CUevent_st *events;
static struct CUstream_st *legacy[EMU_DEVICES];
static __thread struct CUstream_st *per_thread[EMU_DEVICES];
static size_t live_objects;

/* ---- work ------------------------------------------------------------------------------------ */

struct emu_work *emu_work_new(const char *name, void (*run)(void *), const void *closure,
                              size_t bytes)
{
    struct emu_work *work = aligned_alloc(16, (sizeof *work + bytes + 15) & ~(size_t)15);
    if (work == NULL) abort();
    work->references = 1;
    work->host = false;
    work->device = emu_device();
    work->name = name;
    work->run = run;
    work->step = NULL;
    work->give_up = NULL;
    work->drop = NULL;
    work->bytes = bytes;
    if (closure != NULL) memcpy(work->closure, closure, bytes);
    return work;
}

void emu_work_drop(struct emu_work *work)
{
    if (work == NULL || --work->references > 0) return;
    if (work->drop != NULL) work->drop(work->closure);
    free(work);
}

void emu_mark_drop(struct emu_mark *mark)
{
    if (mark == NULL || --mark->references > 0) return;
    free(mark->nodes);
    free(mark);
}

/* ---- streams --------------------------------------------------------------------------------- */

static struct CUstream_st *new_stream(int device, unsigned flags)
{
    struct CUstream_st *s = calloc(1, sizeof *s);
    if (s == NULL) abort();
    s->magic = STREAM_MAGIC;
    s->device = device;
    s->flags = flags;
    s->tail = &s->head;
    s->next = emu_streams;
    emu_streams = s;
    return s;
}

struct CUstream_st *emu_legacy_stream(int device)
{
    if (legacy[device] == NULL) {
        legacy[device] = new_stream(device, cudaStreamDefault);
        legacy[device]->legacy = true;
    }
    return legacy[device];
}

struct CUstream_st *emu_stream(cudaStream_t handle, cudaError_t *status)
{
    int device = emu_device();
    if (handle == NULL || handle == cudaStreamLegacy) {
        struct CUstream_st *s = emu_legacy_stream(device);
        *status = emu_capture_legacy(s);
        return *status == cudaSuccess ? s : NULL;
    }
    if (handle == cudaStreamPerThread) {
        if (per_thread[device] == NULL) per_thread[device] = new_stream(device, cudaStreamDefault);
        return per_thread[device];
    }
    for (struct CUstream_st *s = emu_streams; s != NULL; s = s->next) {
        if (s != handle || s->destroyed) continue;
        if (s->reserved == 0) return s;
        emu_mistake("a stream used while NCCL's call on it is in progress: %p", (void *)s);
        *status = cudaErrorUnknown;
        return NULL;
    }
    *status = emu_refuse(cudaErrorInvalidResourceHandle, "no stream: %p", (void *)handle);
    return NULL;
}

/* ---- putting --------------------------------------------------------------------------------- */

static void put(struct CUstream_st *s, struct emu_work *work, struct emu_mark *record,
                struct emu_mark *wait)
{
    struct emu_item *item = calloc(1, sizeof *item);
    if (item == NULL) abort();
    item->number = emu_next_number++;
    item->work = work;
    item->record = record;
    item->wait = wait;
    *s->tail = item;
    s->tail = &item->next;
    emu_notify();
    if (emu_eager()) emu_run_all();
}

cudaError_t emu_put(struct CUstream_st *stream, struct emu_work *work)
{
    if (emu_captures(stream)) return emu_capture_work(stream, work);
    work->device = stream->device;
    put(stream, work, NULL, NULL);
    return cudaSuccess;
}

cudaError_t emu_put_record(struct CUstream_st *stream, struct CUevent_st *event)
{
    struct emu_mark *mark = calloc(1, sizeof *mark);
    if (mark == NULL) abort();
    mark->references = 1;
    emu_mark_drop(event->mark);
    event->mark = mark;
    if (emu_captures(stream)) return emu_capture_record(stream, mark);
    mark->references++;
    mark->stream = stream;
    put(stream, NULL, mark, NULL);
    return cudaSuccess;
}

cudaError_t emu_put_wait(struct CUstream_st *stream, struct emu_mark *mark)
{
    if (mark == NULL) return cudaSuccess;
    if (emu_captures(stream) || mark->capture != NULL) return emu_capture_wait(stream, mark);
    mark->references++;
    put(stream, NULL, NULL, mark);
    return cudaSuccess;
}

/* ---- streams and events of the API ----------------------------------------------------------- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority)
{
    cudaError_t status = emu_enter("cudaStreamCreate", EMU_SAFE);
    (void)priority;
    if (status == cudaSuccess && out == NULL) status = cudaErrorInvalidValue;
    if (status == cudaSuccess) {
        *out = new_stream(emu_device(), flags);
        live_objects++;
        emu_record(EMU_CALL_OBJECT, "cudaStreamCreate", *out, 0, NULL, NULL);
    }
    return emu_leave(status);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags)
{
    return cudaStreamCreateWithPriority(out, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *out)
{
    return cudaStreamCreateWithPriority(out, cudaStreamDefault, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle)
{
    cudaError_t status = emu_enter("cudaStreamDestroy", EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL && (s->legacy || handle == cudaStreamPerThread)) {
        status = cudaErrorInvalidResourceHandle;
    } else if (s != NULL) {
        emu_capture_spoil(s);
        s->destroyed = true;
        live_objects--;
        emu_record(EMU_CALL_OBJECT, "cudaStreamDestroy", s, 0, NULL, NULL);
        emu_sweep();
    }
    return emu_leave(status);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags)
{
    cudaError_t status = emu_enter("cudaEventCreate", EMU_SAFE);
    if (status == cudaSuccess) {
        struct CUevent_st *e = calloc(1, sizeof *e);
        if (e == NULL) abort();
        e->magic = EVENT_MAGIC;
        e->device = emu_device();
        e->flags = flags;
        e->next = events;
        events = e;
        *out = e;
        live_objects++;
        emu_record(EMU_CALL_OBJECT, "cudaEventCreate", NULL, 0, NULL, NULL);
    }
    return emu_leave(status);
}

cudaError_t cudaEventCreate(cudaEvent_t *out)
{
    return cudaEventCreateWithFlags(out, cudaEventDefault);
}

bool emu_event_valid(cudaEvent_t event)
{
    for (struct CUevent_st *e = events; e != NULL; e = e->next) {
        if (e == event) return true;
    }
    return false;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    cudaError_t status = emu_enter("cudaEventDestroy", EMU_SAFE);
    struct CUevent_st **p = &events;
    while (status == cudaSuccess && *p != NULL && *p != event) p = &(*p)->next;
    if (status == cudaSuccess && *p == NULL) {
        status = emu_refuse(cudaErrorInvalidResourceHandle, "no event: %p", (void *)event);
    } else if (status == cudaSuccess) {
        *p = event->next;
        emu_mark_drop(event->mark);
        free(event);
        live_objects--;
        emu_record(EMU_CALL_OBJECT, "cudaEventDestroy", NULL, 0, NULL, NULL);
    }
    return emu_leave(status);
}

void emu_object(int change) { live_objects += (size_t)change; }
size_t emu_live_objects(void) { return live_objects; }
