/* progress.c - what is queued on streams runs: which stream goes on, and how the host waits.
 *
 * A synchronisation, a blocking copy or a free runs what it waits for; other calls now and then run
 * a little, by the seed. Of the streams that may go on a random one does, or only those that are
 * waited for, so that a missing wait shows as old data. Order within a stream, events and the
 * legacy default stream's rule are kept. MOE_EMULATION_EAGER=1 runs what it can when it is put.
 *
 * Work may be blocked, as NCCL's is that waits for other ranks: the others run meanwhile, and when
 * none may go on the host waits without the lock. */
#include "internal.h"

#include <stdlib.h>
#include <time.h>

static void (*progress_hook)(void);
static uint64_t pass;

void emu_on_progress(void (*hook)(void)) { progress_hook = hook; }

/* ---- one thing ------------------------------------------------------------------------------- */

/* A kernel that faulted has emptied the queues of its device. */
static void run_work(struct emu_work *work)
{
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

enum emu_step emu_work_step(struct emu_work *work, void **state)
{
    enum emu_step step = EMU_DONE;
    if (emu_sticky(work->device) == cudaSuccess && work->step == NULL) run_work(work);
    if (emu_sticky(work->device) == cudaSuccess && work->step != NULL) {
        emu_memory_open();
        step = work->step(work->closure, state);
        emu_memory_close();
    }
    if (emu_sticky(work->device) == cudaSuccess) return step;
    if (*state != NULL) work->give_up(work->closure, *state);
    *state = NULL;
    return EMU_DONE;
}

static void pop(struct CUstream_st *stream)
{
    struct emu_item *item = stream->head;
    stream->head = item->next;
    if (stream->head == NULL) stream->tail = &stream->head;
    if (item->record != NULL) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        item->record->done = true;
        item->record->stream = NULL;
        item->record->time = (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
    }
    if (item->work != NULL) emu_record_ran(item->work->name, stream);
    emu_mark_drop(item->record);
    emu_mark_drop(item->wait);
    emu_work_drop(item->work);
    free(item);
    emu_notify();
}

/* The head of the stream runs. Whether anything came of it. */
static bool move(struct CUstream_st *stream)
{
    struct emu_item *item = stream->head;
    enum emu_step step = EMU_DONE;
    if (item->work != NULL) {
        item->running = true;
        step = emu_work_step(item->work, &item->state);
        item->running = false;
    }
    if (step == EMU_DONE) pop(stream);
    return step != EMU_BLOCKED;
}

/* ---- which stream ---------------------------------------------------------------------------- */

/* One that was destroyed goes when its queue is empty. */
void emu_sweep(void)
{
    for (struct CUstream_st **p = &emu_streams; *p != NULL;) {
        struct CUstream_st *s = *p;
        if (s->destroyed && s->head == NULL && s->waiters == 0) {
            *p = s->next;
            free(s->nodes);
            free(s);
        } else {
            p = &s->next;
        }
    }
}

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
        for (struct CUstream_st *o = emu_streams; before == NULL && o != NULL; o = o->next) {
            if (o == s || o->head == NULL || o->device != s->device) continue;
            bool ordered = (s->legacy && blocking(o)) || (o->legacy && blocking(s));
            if (ordered && o->head->number < head->number) before = o;
        }
        if (before == NULL) return s;
        s = before;
    }
}

/* Any stream that has something queued and was not tried in this pass, at random. */
static struct CUstream_st *any_stream(void)
{
    struct CUstream_st *found = NULL;
    uint32_t seen = 0;
    for (struct CUstream_st *s = emu_streams; s != NULL; s = s->next) {
        if (s->head != NULL && s->tried != pass && emu_coin(++seen)) found = s;
    }
    return found;
}

bool emu_run_one(void)
{
    if (progress_hook != NULL) progress_hook();
    pass++;
    for (struct CUstream_st *s = any_stream(); s != NULL; s = any_stream()) {
        struct CUstream_st *first = first_to_move(s);
        s->tried = pass;
        if (first != s && first->tried == pass) continue;
        first->tried = pass;
        if (move(first)) return true;
    }
    return false;
}

void emu_run_all(void)
{
    while (emu_run_one()) {}
}

void emu_jitter(void)
{
    if (emu_eager()) emu_run_all();
    if (emu_eager() || !emu_coin(8)) return;
    for (uint32_t n = emu_random(4) + 1; n > 0 && emu_run_one(); n--) {}
    emu_sweep();
}

/* ---- the host waits -------------------------------------------------------------------------- */

/* Opened once for all that runs: opening is a system call. Of the stream, what was there before. */
static void finish(struct CUstream_st *s, const struct emu_mark *mark)
{
    bool only_needed = emu_coin(2);
    uint64_t end = emu_next_number;
    emu_memory_open();
    s->waiters++;
    while (mark != NULL ? !mark->done : s->head != NULL && s->head->number < end) {
        bool moved = only_needed && move(first_to_move(s));
        if (moved || emu_run_one()) continue;
        int opened = emu_memory_suspend();
        emu_wait();
        emu_memory_resume(opened);
    }
    s->waiters--;
    emu_memory_close();
    emu_sweep();
}

void emu_finish_stream(struct CUstream_st *stream) { finish(stream, NULL); }

void emu_finish_mark(struct emu_mark *mark)
{
    if (mark->done || mark->stream == NULL) return;
    mark->references++;
    finish(mark->stream, mark);
    emu_mark_drop(mark);
}

void emu_finish_device(int device)
{
    uint64_t end = emu_next_number;
    for (struct CUstream_st *s = emu_streams; s != NULL;) {
        if (s->device == device && s->head != NULL && s->head->number < end) {
            emu_finish_stream(s);
            s = emu_streams;
        } else {
            s = s->next;
        }
    }
}

cudaError_t emu_kill_streams(int device)
{
    for (struct CUstream_st *s = emu_streams; s != NULL; s = s->next) {
        if (s->device != device) continue;
        for (struct emu_item *i = s->head; i != NULL; i = i->next) {
            if (i->work == NULL || i->running) continue;
            if (i->state != NULL) i->work->give_up(i->work->closure, i->state);
            i->state = NULL;
            emu_work_drop(i->work);
            i->work = NULL;
        }
    }
    return emu_sticky(device);
}
