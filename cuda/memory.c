/* memory.c - memory of the device for src/: moe__memory of backend.h. */
#include "cuda_internal.h"

#include <string.h>

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

/* cudaFree waits for the device; for a host's allocator the work of all calls is waited for. */
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
    if (!memory || !moe__cuda_enter(c, &scope, &error)) return;
    if (c->free) wait_for_calls(context, c);
    give_back(c, memory, bytes);
    moe__cuda_leave(&scope);
}

/* Remembers that the stream has work of the library; the oldest use makes room. */
static void note_use(const moe__workers *workers, moe__cuda_context *c)
{
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    cudaStream_t stream = (cudaStream_t)workers->stream;
    moe__cuda_use *use = NULL;
    if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess ||
        capture != cudaStreamCaptureStatusNone) {
        (void)cudaGetLastError();
        return;
    }
    (void)pthread_mutex_lock(&c->mutex);
    for (int i = 0; i < MOE__CUDA_STREAMS && !use; i++)
        if (c->use[i].used && c->use[i].stream == workers->stream) use = &c->use[i];
    for (int i = 0; i < MOE__CUDA_STREAMS && !use; i++)
        if (!c->use[i].used || cudaEventQuery(c->use[i].done) == cudaSuccess) use = &c->use[i];
    if (!use) {
        use = &c->use[0];
        (void)moe__cuda_wait(workers, use->done, "the work of earlier calls");
    }
    use->stream = workers->stream;
    use->used = cudaEventRecord(use->done, stream) == cudaSuccess;
    (void)pthread_mutex_unlock(&c->mutex);
    (void)cudaGetLastError();
}

/* ---- on the stream --------------------------------------------------------------------------- */

/* The functions below may be called outside of a phase too, with the legacy default stream, which is
 * that of the thread's device: the context's for so long. */
static moe_status enter_device(const moe__workers *workers, int *before)
{
    const moe__cuda_context *c = moe__cuda_of(workers);
    MOE_TRY(moe__cuda_status(cudaGetDevice(before), workers, "cudaGetDevice"));
    if (*before == c->device) return MOE_OK;
    return moe__cuda_status(cudaSetDevice(c->device), workers, "cudaSetDevice");
}

static void leave_device(const moe__workers *workers, int before)
{
    if (before != moe__cuda_of(workers)->device) (void)cudaSetDevice(before);
}

static moe_status zero(const moe__workers *workers, void *to, int64_t bytes)
{
    int before = 0;
    if (bytes <= 0) return MOE_OK;
    MOE_TRY(enter_device(workers, &before));
    cudaError_t error = cudaMemsetAsync(to, 0, (size_t)bytes, (cudaStream_t)workers->stream);
    leave_device(workers, before);
    return moe__cuda_status(error, workers, "cudaMemsetAsync");
}

static moe_status copy(const moe__workers *workers, void *to, const void *from, int64_t bytes)
{
    moe__cuda_context *c = moe__cuda_of(workers);
    int before = 0;
    if (bytes <= 0) return MOE_OK;
    MOE_TRY(enter_device(workers, &before));
    cudaError_t error = cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDeviceToDevice,
                                        (cudaStream_t)workers->stream);
    if (error == cudaSuccess && c->free) /* memory may go back in the same call */
        note_use(workers, c);
    leave_device(workers, before);
    return moe__cuda_status(error, workers, "cudaMemcpyAsync");
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
                       int64_t bytes, bool fetch)
{
    MOE_TRY(wait_for_staging(workers, s));
    for (int64_t at = 0; at < bytes; at += s->bytes) {
        int64_t n = moe__min(s->bytes, bytes - at);
        char *near = (char *)host + at, *far = (char *)device + at;
        if (fetch) {
            MOE_TRY(move_piece(workers, s, s->pinned, far, n, cudaMemcpyDeviceToHost));
            memcpy(near, s->pinned, (size_t)n);
        } else {
            memcpy(s->pinned, near, (size_t)n);
            MOE_TRY(move_piece(workers, s, far, s->pinned, n, cudaMemcpyHostToDevice));
        }
    }
    return MOE_OK;
}

/* Through the pass's pinned memory, or outside of a pass through the context's. */
static moe_status move_through(const moe__workers *workers, void *host, void *device, int64_t bytes,
                               bool fetch)
{
    moe__cuda_pass *pass = workers->of_pass;
    moe__cuda_context *c = moe__cuda_of(workers);
    int before = 0;
    if (bytes <= 0) return MOE_OK;
    MOE_TRY(enter_device(workers, &before));
    moe_status status = moe__cuda_may_wait(workers);
    if (status == MOE_OK && pass) {
        status = move(workers, &pass->staging, host, device, bytes, fetch);
    } else if (status == MOE_OK) {
        (void)pthread_mutex_lock(&c->mutex);
        status = move(workers, &c->staging, host, device, bytes, fetch);
        (void)pthread_mutex_unlock(&c->mutex);
    }
    leave_device(workers, before);
    return status;
}

/* Of the host's memory there is nothing to fetch. */
moe_status moe__cuda_fetch(const moe__workers *workers, void *host, const void *device,
                           int64_t bytes)
{
    struct cudaPointerAttributes a = {.type = cudaMemoryTypeUnregistered};
    if (bytes > 0 && cudaPointerGetAttributes(&a, device) != cudaSuccess) (void)cudaGetLastError();
    if (bytes > 0 && a.type == cudaMemoryTypeUnregistered) {
        memcpy(host, device, (size_t)bytes);
        return MOE_OK;
    }
    return move_through(workers, host, (void *)(uintptr_t)device, bytes, true);
}

static moe_status store(const moe__workers *workers, void *to, const void *host, int64_t bytes)
{
    return move_through(workers, (void *)(uintptr_t)host, to, bytes, false);
}

/* ---- pointers of the host -------------------------------------------------------------------- */

static moe_status check_pointer(const moe__workers *workers, const char *name, const void *memory)
{
    const moe__cuda_context *c = moe__cuda_of(workers);
    struct cudaPointerAttributes a;
    if (!memory || !c->check_pointers) return MOE_OK;
    cudaError_t error = cudaPointerGetAttributes(&a, memory);
    if (error == cudaErrorInvalidValue) {
        (void)cudaGetLastError();
        a.type = cudaMemoryTypeUnregistered;
    } else {
        MOE_TRY(moe__cuda_status(error, workers, "cudaPointerGetAttributes"));
    }
    if (a.type == cudaMemoryTypeManaged) return MOE_OK;
    if (a.type == cudaMemoryTypeDevice && a.device == c->device) return MOE_OK;
    if (a.type == cudaMemoryTypeDevice)
        return moe__cuda_fail(MOE_ERROR_INVALID_ARGUMENT, workers,
                              "%s is memory of device %d, the context is on device %d", name,
                              a.device, (int)c->device);
    return moe__cuda_fail(MOE_ERROR_INVALID_ARGUMENT, workers, "%s is memory of the host", name);
}

/* ---- phases of a call ------------------------------------------------------------------------ */

/* The device that was the thread's before begin. */
static _Thread_local int device_before;

static moe_status check_stream(const moe__workers *workers, int32_t device)
{
#if CUDART_VERSION >= 12080
    int of_stream = device;
    cudaStream_t stream = (cudaStream_t)workers->stream;
    if (!stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread) return MOE_OK;
    MOE_TRY(moe__cuda_status(cudaStreamGetDevice(stream, &of_stream), workers, "stream"));
    if (of_stream != device)
        return moe__cuda_fail(MOE_ERROR_INVALID_ARGUMENT, workers,
                              "stream is of device %d, the context is on device %d", of_stream,
                              (int)device);
#else
    (void)workers, (void)device;
#endif
    return MOE_OK;
}

static moe_status begin(const moe__workers *workers)
{
    const moe__cuda_context *c = moe__cuda_of(workers);
    int now = 0;
    MOE_TRY(moe__cuda_check_alive(workers));
    MOE_TRY(moe__cuda_status(cudaGetDevice(&now), workers, "cudaGetDevice"));
    if (now != c->device)
        MOE_TRY(moe__cuda_status(cudaSetDevice(c->device), workers, "cudaSetDevice"));
    moe_status status = check_stream(workers, c->device);
    if (status != MOE_OK && now != c->device) (void)cudaSetDevice(now);
    device_before = now;
    return status;
}

static void end(const moe__workers *workers)
{
    moe__cuda_context *c = moe__cuda_of(workers);
    if (c->free) note_use(workers, c);
    if (device_before != c->device) (void)cudaSetDevice(device_before);
}

const moe__memory moe__cuda_memory = {.name = "cuda",
                                      .alloc = moe__cuda_memory_alloc,
                                      .free = moe__cuda_memory_free,
                                      .zero = zero,
                                      .copy = copy,
                                      .fetch = moe__cuda_fetch,
                                      .store = store,
                                      .zero_strided = moe__cuda_zero_strided,
                                      .note_touched = moe__cuda_note_touched,
                                      .pass_create = moe__cuda_pass_create,
                                      .pass_destroy = moe__cuda_pass_destroy,
                                      .begin = begin,
                                      .end = end,
                                      .plan_ready = moe__cuda_plan_ready,
                                      .find_rows = moe__cuda_find_rows,
                                      .context_destroy = moe__cuda_context_destroy,
                                      .check_pointer = check_pointer,
                                      .may_wait = moe__cuda_may_wait};
