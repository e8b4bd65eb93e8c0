/* stream.c - streams as queues that run late: what is put on one runs when somebody must see it.
 *
 * A synchronisation, a blocking copy or a free runs what it waits for; other calls now and then run
 * a little, by the seed. Of the streams that may go on a random one does, or only those that are
 * waited for, so that a missing wait shows as old data. Order within a stream, events and the
 * legacy default stream's rule are kept. MOE_EMULATION_EAGER=1 runs everything when it is put. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { STREAM_MAGIC = 0x57e34a01, EVENT_MAGIC = 0x0e7e2702 };

static struct CUstream_st *streams;
static struct CUevent_st *events;
static uint64_t next_number = 1;
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
    work->bytes = bytes;
    if (closure != NULL) memcpy(work->closure, closure, bytes);
    return work;
}

void emu_work_drop(struct emu_work *work)
{
    if (work != NULL && --work->references == 0) free(work);
}

/* A kernel that faulted has emptied the queues of its device. */
void emu_work_run(struct emu_work *work)
{
    if (emu_sticky(work->device) != cudaSuccess) return;
    if (work->host) {
        int opened = emu_memory_suspend();
        work->run(work->closure);
        emu_memory_resume(opened);
        return;
    }
    emu_memory_open();
    work->run(work->closure);
    emu_memory_close();
}

void emu_mark_drop(struct emu_mark *mark)
{
    if (mark == NULL || --mark->references > 0) return;
    free(mark->nodes);
    free(mark);
}

static void finish_item(struct CUstream_st *stream, bool run)
{
    struct emu_item *item = stream->head;
    stream->head = item->next;
    if (stream->head == NULL) stream->tail = &stream->head;
    if (item->work != NULL && run) emu_work_run(item->work);
    if (item->record != NULL) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        item->record->done = true;
        item->record->stream = NULL;
        item->record->time = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
    }
    emu_mark_drop(item->record);
    emu_mark_drop(item->wait);
    emu_work_drop(item->work);
    free(item);
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
    s->next = streams;
    streams = s;
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
    for (struct CUstream_st *s = streams; s != NULL; s = s->next) {
        if (s == handle && !s->destroyed) return s;
    }
    *status = emu_refuse(cudaErrorInvalidResourceHandle, "no stream: %p", (void *)handle);
    return NULL;
}

/* One that was destroyed goes when its queue is empty. */
static void sweep(void)
{
    for (struct CUstream_st **p = &streams; *p != NULL;) {
        struct CUstream_st *s = *p;
        if (s->destroyed && s->head == NULL) {
            *p = s->next;
            free(s->nodes);
            free(s);
        } else {
            p = &s->next;
        }
    }
}

/* ---- running --------------------------------------------------------------------------------- */

static bool blocking(const struct CUstream_st *s)
{
    return !s->legacy && (s->flags & cudaStreamNonBlocking) == 0;
}

/* The stream that has to move before the head of s may, s itself when it may. */
static struct CUstream_st *first_to_move(struct CUstream_st *s)
{
    for (;;) {
        const struct emu_item *head = s->head;
        struct CUstream_st *before = NULL;
        if (head->wait != NULL && !head->wait->done) before = head->wait->stream;
        for (struct CUstream_st *o = streams; before == NULL && o != NULL; o = o->next) {
            if (o == s || o->head == NULL || o->device != s->device) continue;
            bool ordered = (s->legacy && blocking(o)) || (o->legacy && blocking(s));
            if (ordered && o->head->number < head->number) before = o;
        }
        if (before == NULL) return s;
        s = before;
    }
}

/* Any stream that has something queued, at random. */
static struct CUstream_st *any_stream(void)
{
    struct CUstream_st *found = NULL;
    uint32_t seen = 0;
    for (struct CUstream_st *s = streams; s != NULL; s = s->next) {
        if (s->head != NULL && emu_coin(++seen)) found = s;
    }
    return found;
}

bool emu_run_one(void)
{
    struct CUstream_st *s = any_stream();
    if (s == NULL) return false;
    finish_item(first_to_move(s), true);
    return true;
}

void emu_jitter(void)
{
    if (emu_eager() || !emu_coin(8)) return;
    for (uint32_t n = emu_random(4) + 1; n > 0 && emu_run_one(); n--) {}
    sweep();
}

/* Opened once for all that runs: opening is a system call. */
static void finish(struct CUstream_st *s, const struct emu_mark *mark)
{
    bool only_needed = emu_coin(2);
    emu_memory_open();
    while (mark != NULL ? !mark->done : s->head != NULL) {
        if (only_needed)
            finish_item(first_to_move(s), true);
        else
            emu_run_one();
    }
    emu_memory_close();
    sweep();
}

void emu_finish_stream(struct CUstream_st *stream) { finish(stream, NULL); }

void emu_finish_mark(struct emu_mark *mark)
{
    if (!mark->done && mark->stream != NULL) finish(mark->stream, mark);
}

void emu_finish_device(int device)
{
    for (struct CUstream_st *s = streams; s != NULL;) {
        if (s->device == device && s->head != NULL) {
            emu_finish_stream(s);
            s = streams;
        } else {
            s = s->next;
        }
    }
}

cudaError_t emu_kill_streams(int device)
{
    for (struct CUstream_st *s = streams; s != NULL; s = s->next) {
        if (s->device != device) continue;
        for (struct emu_item *i = s->head; i != NULL; i = i->next) {
            if (i->work == NULL) continue;
            emu_work_drop(i->work);
            i->work = NULL;
        }
    }
    return emu_sticky(device);
}

/* ---- putting --------------------------------------------------------------------------------- */

static void put(struct CUstream_st *s, struct emu_work *work, struct emu_mark *record,
                struct emu_mark *wait)
{
    struct emu_item *item = calloc(1, sizeof *item);
    if (item == NULL) abort();
    item->number = next_number++;
    item->work = work;
    item->record = record;
    item->wait = wait;
    *s->tail = item;
    s->tail = &item->next;
    if (emu_eager()) emu_finish_stream(s);
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
        sweep();
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
