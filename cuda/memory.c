/* memory.c - memory of the device for src/: moe__memory of backend.h. */
#include "cuda_internal.h"

#include <string.h>
#include <unistd.h>

/* ---- alloc, free ----------------------------------------------------------------------------- */

enum { ALIGNMENT = 256 };

/* For calls that have no function of the public interface to name. */
static moe__workers outside(moe_context *context)
{
    moe__workers w;
    memset(&w, 0, sizeof w);
    w.context = context;
    w.function = "moe_cuda";
    return w;
}

static void give_back(const moe__cuda_context *c, void *memory, int64_t bytes)
{
    if (c->free)
        c->free(c->alloc_user, memory, (uint64_t)bytes, NULL);
    else
        (void)cudaFree(memory);
}

/* Zeros that are there when this returns. */
static bool fill(moe_context *context, const moe__cuda_context *c, void *memory, int64_t bytes)
{
    moe__workers w = outside(context);
    cudaEvent_t done = NULL;
    cudaError_t error = cudaEventCreateWithFlags(&done, cudaEventDisableTiming);
    if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, (size_t)bytes, c->stream);
    if (error == cudaSuccess) error = cudaEventRecord(done, c->stream);
    bool good = error == cudaSuccess && moe__cuda_wait(&w, done, "zeros") == MOE_OK;
    if (done) (void)cudaEventDestroy(done);
    return good;
}

void *moe__cuda_memory_alloc(moe_context *context, int64_t bytes, bool zeroed)
{
    const moe__cuda_context *c = moe__module_of_context(context);
    moe__cuda_scope scope;
    cudaError_t error;
    void *memory = NULL;
    if (bytes <= 0 || !moe__cuda_enter(c, &scope, &error)) return NULL;
    if (c->alloc)
        memory = c->alloc(c->alloc_user, (uint64_t)bytes, ALIGNMENT, NULL);
    else if (cudaMalloc(&memory, (size_t)bytes) != cudaSuccess)
        memory = NULL;
    if (memory && zeroed && !fill(context, c, memory, bytes)) {
        give_back(c, memory, bytes);
        memory = NULL;
    }
    moe__cuda_leave(&scope);
    return memory;
}

/* cudaFree waits for the device; for a host's allocator the work of all calls is waited for. It
 * gets memory back from a device that failed too. */
static void wait_for_calls(moe_context *context, moe__cuda_context *c)
{
    moe__workers w = outside(context);
    (void)pthread_mutex_lock(&c->mutex);
    for (int i = 0; i < MOE__CUDA_STREAMS; i++) {
        if (c->use[i].used) (void)moe__cuda_wait(&w, c->use[i].done, "the work of earlier calls");
        c->use[i].used = false;
    }
    (void)pthread_mutex_unlock(&c->mutex);
}

void moe__cuda_memory_free(moe_context *context, void *memory, int64_t bytes)
{
    moe__cuda_context *c = moe__module_of_context(context);
    moe__cuda_scope scope;
    cudaError_t error;
    if (!memory) return;
    bool entered = moe__cuda_enter(c, &scope, &error);
    if (!entered && (!c->free || c->process != getpid())) return;
    if (c->free) wait_for_calls(context, c);
    give_back(c, memory, bytes);
    if (entered) moe__cuda_leave(&scope);
}

/* Remembers that the stream has work of the library; the oldest use makes room. */
static void note_use(void *used, const moe__workers *workers, moe__cuda_context *c)
{
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    cudaStream_t stream = (cudaStream_t)used;
    moe__cuda_use *use = NULL;
    if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess ||
        capture != cudaStreamCaptureStatusNone) {
        moe__cuda_forget_error();
        return;
    }
    (void)pthread_mutex_lock(&c->mutex);
    for (int i = 0; i < MOE__CUDA_STREAMS && !use; i++)
        if (c->use[i].used && c->use[i].stream == used) use = &c->use[i];
    for (int i = 0; i < MOE__CUDA_STREAMS && !use; i++)
        if (!c->use[i].used || cudaEventQuery(c->use[i].done) == cudaSuccess) use = &c->use[i];
    if (!use) {
        use = &c->use[0];
        (void)moe__cuda_wait(workers, use->done, "the work of earlier calls");
    }
    use->stream = used;
    use->used = cudaEventRecord(use->done, stream) == cudaSuccess;
    (void)pthread_mutex_unlock(&c->mutex);
    moe__cuda_forget_error();
}

/* ---- on the stream --------------------------------------------------------------------------- */

/* These are called in a phase of a call and outside: then the device may be another one, whose
 * default stream would be taken for ours. */
static moe_status zero(const moe__workers *workers, void *to, int64_t bytes)
{
    moe__cuda_context *c = moe__cuda_of(workers);
    moe__cuda_scope scope;
    if (bytes <= 0) return MOE_OK;
    MOE_TRY(moe__cuda_enter_call(workers, &scope));
    moe_status status = moe__cuda_status(
        cudaMemsetAsync(to, 0, (size_t)bytes, (cudaStream_t)workers->stream), workers,
        "cudaMemsetAsync");
    if (c->free && scope.outer != c) note_use(workers->stream, workers, c);
    moe__cuda_leave(&scope);
    return status;
}

static moe_status copy(const moe__workers *workers, void *to, const void *from, int64_t bytes)
{
    moe__cuda_context *c = moe__cuda_of(workers);
    moe__cuda_scope scope;
    if (bytes <= 0) return MOE_OK;
    MOE_TRY(moe__cuda_enter_call(workers, &scope));
    moe_status status = moe__cuda_status(cudaMemcpyAsync(to, from, (size_t)bytes,
                                                         cudaMemcpyDeviceToDevice,
                                                         (cudaStream_t)workers->stream),
                                         workers, "cudaMemcpyAsync");
    if (c->free) note_use(workers->stream, workers, c); /* memory may go back in the same call */
    moe__cuda_leave(&scope);
    return status;
}

/* ---- to and from the host -------------------------------------------------------------------- */

cudaError_t moe__cuda_staging_create(moe__cuda_staging *staging, int64_t bytes)
{
    void *pinned = NULL;
    cudaError_t error = cudaHostAlloc(&pinned, (size_t)bytes, cudaHostAllocDefault);
    if (error != cudaSuccess) return error;
    staging->pinned = pinned;
    staging->bytes = bytes;
    return cudaEventCreateWithFlags(&staging->done, cudaEventDisableTiming);
}

void moe__cuda_staging_destroy(moe__cuda_staging *staging)
{
    if (staging->done) (void)cudaEventDestroy(staging->done);
    if (staging->pinned) (void)cudaFreeHost(staging->pinned);
    memset(staging, 0, sizeof *staging);
}

/* A copy that was given up on may still be under way. */
static moe_status wait_for_staging(const moe__workers *workers, moe__cuda_staging *s)
{
    if (s->busy) MOE_TRY(moe__cuda_wait(workers, s->done, "a copy to or from the host"));
    s->busy = false;
    return MOE_OK;
}

static moe_status move_piece(const moe__workers *workers, moe__cuda_staging *s, void *to,
                             const void *from, int64_t bytes, enum cudaMemcpyKind kind)
{
    cudaStream_t stream = (cudaStream_t)workers->stream;
    MOE_TRY(moe__cuda_status(cudaMemcpyAsync(to, from, (size_t)bytes, kind, stream), workers,
                             "cudaMemcpyAsync"));
    s->busy = true;
    MOE_TRY(moe__cuda_status(cudaEventRecord(s->done, stream), workers, "cudaEventRecord"));
    return wait_for_staging(workers, s);
}

static moe_status move(const moe__workers *workers, moe__cuda_staging *s, void *host, void *device,
                       int64_t bytes, enum cudaMemcpyKind kind)
{
    MOE_TRY(wait_for_staging(workers, s));
    for (int64_t at = 0; at < bytes; at += s->bytes) {
        int64_t n = moe__min(s->bytes, bytes - at);
        char *near = (char *)host + at, *far = (char *)device + at;
        if (kind != cudaMemcpyHostToDevice) {
            MOE_TRY(move_piece(workers, s, s->pinned, far, n, kind));
            memcpy(near, s->pinned, (size_t)n);
        } else {
            memcpy(s->pinned, near, (size_t)n);
            MOE_TRY(move_piece(workers, s, far, s->pinned, n, kind));
        }
    }
    return MOE_OK;
}

/* Through the pass's pinned memory, or outside of a pass through the context's. */
static moe_status move_through(const moe__workers *workers, void *host, void *device, int64_t bytes,
                               enum cudaMemcpyKind kind)
{
    moe__cuda_pass *pass = workers->of_pass;
    moe__cuda_context *c = moe__cuda_of(workers);
    MOE_TRY(moe__cuda_may_wait(workers));
    if (pass) return move(workers, &pass->staging, host, device, bytes, kind);
    (void)pthread_mutex_lock(&c->mutex);
    moe_status status = move(workers, &c->staging, host, device, bytes, kind);
    (void)pthread_mutex_unlock(&c->mutex);
    return status;
}

/* What kind of memory it is; what CUDA does not know is cudaMemoryTypeUnregistered. */
static moe_status find_kind(const moe__workers *workers, const void *memory,
                            struct cudaPointerAttributes *a)
{
    cudaError_t error = cudaPointerGetAttributes(a, memory);
    if (error == cudaErrorInvalidValue) {
        moe__cuda_forget_error();
        a->type = cudaMemoryTypeUnregistered;
        return MOE_OK;
    }
    if (error != cudaSuccess) MOE_TRY(moe__cuda_check_alive(workers));
    return moe__cuda_status(error, workers, "cudaPointerGetAttributes");
}

/* Of pageable memory of the host there is nothing to fetch; work may still write to pinned memory,
 * and to any that is trusted. */
static moe_status fetch_from(const moe__workers *workers, void *host, const void *from,
                             int64_t bytes)
{
    struct cudaPointerAttributes a;
    MOE_TRY(find_kind(workers, from, &a));
    if (a.type == cudaMemoryTypeUnregistered && moe__cuda_of(workers)->check_pointers) {
        memcpy(host, from, (size_t)bytes);
        return MOE_OK;
    }
    bool device = a.type == cudaMemoryTypeDevice || a.type == cudaMemoryTypeManaged;
    return move_through(workers, host, (void *)(uintptr_t)from, bytes,
                        device ? cudaMemcpyDeviceToHost : cudaMemcpyDefault);
}

moe_status moe__cuda_fetch(const moe__workers *workers, void *host, const void *device,
                           int64_t bytes)
{
    moe__cuda_scope scope;
    if (bytes <= 0) return MOE_OK;
    MOE_TRY(moe__cuda_enter_call(workers, &scope));
    moe_status status = fetch_from(workers, host, device, bytes);
    moe__cuda_leave(&scope);
    return status;
}

static moe_status store(const moe__workers *workers, void *to, const void *host, int64_t bytes)
{
    moe__cuda_scope scope;
    if (bytes <= 0) return MOE_OK;
    MOE_TRY(moe__cuda_enter_call(workers, &scope));
    moe_status status = move_through(workers, (void *)(uintptr_t)host, to, bytes,
                                     cudaMemcpyHostToDevice);
    moe__cuda_leave(&scope);
    return status;
}

/* ---- pointers of the host -------------------------------------------------------------------- */

static moe_status check_pointer(const moe__workers *workers, const char *name, const void *memory)
{
    const moe__cuda_context *c = moe__cuda_of(workers);
    struct cudaPointerAttributes a;
    if (!memory || !c->check_pointers) return MOE_OK;
    MOE_TRY(find_kind(workers, memory, &a));
    if (a.type == cudaMemoryTypeManaged) return MOE_OK;
    if (a.type == cudaMemoryTypeDevice && a.device == c->device) return MOE_OK;
    if (a.type == cudaMemoryTypeDevice)
        return moe__cuda_fail(MOE_ERROR_INVALID_ARGUMENT, workers,
                              "%s is memory of device %d, the context is on device %d", name,
                              a.device, (int)c->device);
    return moe__cuda_fail(MOE_ERROR_INVALID_ARGUMENT, workers, "%s is memory of the host", name);
}

/* ---- phases of a call ------------------------------------------------------------------------ */

/* Of the phase that this thread is in. */
static _Thread_local moe__cuda_scope phase;

moe_status moe__cuda_check_stream(const moe__workers *workers, const char *name, void *of_host)
{
#if CUDART_VERSION >= 12080
    int device = moe__cuda_of(workers)->device, of_stream = device;
    cudaStream_t stream = (cudaStream_t)of_host;
    if (!stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread) return MOE_OK;
    MOE_TRY(moe__cuda_status(cudaStreamGetDevice(stream, &of_stream), workers, name));
    if (of_stream != device)
        return moe__cuda_fail(MOE_ERROR_INVALID_ARGUMENT, workers,
                              "%s is of device %d, the context is on device %d", name, of_stream,
                              device);
#else
    (void)workers, (void)name, (void)of_host;
#endif
    return MOE_OK;
}

static moe_status begin(const moe__workers *workers)
{
    MOE_TRY(moe__cuda_enter_call(workers, &phase));
    moe_status status = moe__cuda_check_stream(workers, "stream", workers->stream);
    if (status != MOE_OK) moe__cuda_leave(&phase);
    return status;
}

static void end(const moe__workers *workers)
{
    moe__cuda_context *c = moe__cuda_of(workers);
    const moe__cuda_pass *pass = workers->of_pass;
    if (c->free) note_use(workers->stream, workers, c);
    if (c->free && pass && moe__cuda_is_forked(pass))
        note_use(pass->host.exchange_stream, workers, c);
    moe__cuda_leave(&phase);
}

const moe__memory moe__cuda_memory = {.name = "cuda",
                                      .alloc = moe__cuda_memory_alloc,
                                      .free = moe__cuda_memory_free,
                                      .zero = zero,
                                      .copy = copy,
                                      .fetch = moe__cuda_fetch,
                                      .store = store,
                                      .zero_strided = moe__cuda_zero_strided,
                                      .copy_strided = moe__cuda_copy_strided,
                                      .put = moe__cuda_put,
                                      .note_touched = moe__cuda_note_touched,
                                      .pass_create = moe__cuda_pass_create,
                                      .pass_destroy = moe__cuda_pass_destroy,
                                      .begin = begin,
                                      .end = end,
                                      .plan_ready = moe__cuda_plan_ready,
                                      .plan_counts = moe__cuda_counts,
                                      .plan_known = moe__cuda_plan_known,
                                      .note = moe__cuda_note,
                                      .noted = moe__cuda_noted,
                                      .context_destroy = moe__cuda_context_destroy,
                                      .check_pointer = check_pointer,
                                      .may_wait = moe__cuda_may_wait,
                                      .fork = moe__cuda_fork,
                                      .end_fork = moe__cuda_end_fork,
                                      .join = moe__cuda_join};
