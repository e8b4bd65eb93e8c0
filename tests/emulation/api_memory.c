/* api_memory.c - cudaMalloc and the rest that gives, takes, copies and fills memory.
 *
 * Copies from pageable memory take the bytes at the call; copies to it return when they are done.
 * So a blocking copy from it to the device waits for its stream, takes the bytes and returns: it is
 * ordered with the legacy default stream only. Pinned memory is read and written when the copy
 * runs, which may be late. Each side of a copy must be of the kind that its direction says. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

/* ---- allocations ----------------------------------------------------------------------------- */

static cudaError_t allocate(const char *name, void **out, size_t bytes, enum emu_place place,
                            enum emu_safety safety)
{
    cudaError_t status = emu_enter(name, safety);
    if (status == cudaSuccess && out == NULL) status = cudaErrorInvalidValue;
    if (status == cudaSuccess) {
        *out = bytes > 0 ? emu_allocate(place, emu_device(), bytes) : NULL;
        if (*out == NULL && bytes > 0) status = cudaErrorMemoryAllocation;
        emu_record(place == EMU_PINNED ? EMU_CALL_ALLOCATE_HOST : EMU_CALL_ALLOCATE, name, NULL,
                   bytes, *out, NULL);
    }
    return emu_leave(status);
}

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    return allocate("cudaMalloc", out, bytes, EMU_DEVICE, EMU_UNSAFE);
}

cudaError_t cudaMallocManaged(void **out, size_t bytes, unsigned flags)
{
    (void)flags;
    return allocate("cudaMallocManaged", out, bytes, EMU_MANAGED, EMU_UNSAFE);
}

cudaError_t cudaMallocHost(void **out, size_t bytes)
{
    return allocate("cudaMallocHost", out, bytes, EMU_PINNED, EMU_UNSAFE);
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags)
{
    (void)flags;
    return allocate("cudaHostAlloc", out, bytes, EMU_PINNED, EMU_UNSAFE);
}

/* The memory is there at once; the order of the stream is not checked. */
cudaError_t cudaMallocAsync(void **out, size_t bytes, cudaStream_t stream)
{
    (void)stream;
    return allocate("cudaMallocAsync", out, bytes, EMU_DEVICE, EMU_UNSAFE);
}

/* The live allocation that begins at p, or NULL with *status set. */
static struct emu_allocation *owned(const char *name, const void *p, bool pinned,
                                    cudaError_t *status)
{
    struct emu_allocation *a = emu_find(p);
    if (a != NULL && !a->freed && a->begin == p && (a->place == EMU_PINNED) == pinned) return a;
    *status = emu_refuse(cudaErrorInvalidValue, "%s of %p: %s", name, p,
                         a == NULL  ? "not CUDA's"
                         : a->freed ? "freed already"
                                    : "of another kind, or not its beginning");
    return NULL;
}

static cudaError_t release(const char *name, void *p, bool pinned)
{
    cudaError_t status = emu_enter(name, EMU_UNSAFE);
    if (status == cudaSuccess && p != NULL) {
        struct emu_allocation *a = owned(name, p, pinned, &status);
        emu_record(pinned ? EMU_CALL_FREE_HOST : EMU_CALL_FREE, name, NULL,
                   a != NULL ? a->bytes : 0, p, NULL);
        if (a != NULL) {
            emu_finish_device(a->device);
            emu_release(a);
        }
    }
    return emu_leave(status);
}

cudaError_t cudaFree(void *p) { return release("cudaFree", p, false); }
cudaError_t cudaFreeHost(void *p) { return release("cudaFreeHost", p, true); }

static void run_free(void *closure)
{
    struct emu_allocation *a = *(struct emu_allocation **)closure;
    if (!a->freed) emu_release(a);
}

cudaError_t cudaFreeAsync(void *p, cudaStream_t handle)
{
    cudaError_t status = emu_enter("cudaFreeAsync", EMU_UNSAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL && p != NULL) {
        struct emu_allocation *a = owned("cudaFreeAsync", p, false, &status);
        emu_record(EMU_CALL_FREE, "cudaFreeAsync", s, a != NULL ? a->bytes : 0, p, NULL);
        if (a != NULL) status = emu_put(s, emu_work_new("cudaFreeAsync", run_free, &a, sizeof a));
    }
    return emu_leave(status);
}

cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned flags)
{
    cudaError_t status = emu_enter("cudaHostRegister", EMU_UNSAFE);
    (void)flags;
    if (status == cudaSuccess && (p == NULL || bytes == 0)) status = cudaErrorInvalidValue;
    if (status == cudaSuccess && emu_find(p) != NULL) status = cudaErrorHostMemoryAlreadyRegistered;
    if (status == cudaSuccess && !emu_register_host(p, bytes)) status = cudaErrorMemoryAllocation;
    return emu_leave(status);
}

cudaError_t cudaHostUnregister(void *p)
{
    cudaError_t status = emu_enter("cudaHostUnregister", EMU_UNSAFE);
    if (status == cudaSuccess) emu_finish_device(emu_device());
    if (status == cudaSuccess && !emu_unregister_host(p)) {
        status = emu_refuse(cudaErrorHostMemoryNotRegistered, "%p is not registered", p);
    }
    return emu_leave(status);
}

cudaError_t cudaHostGetDevicePointer(void **out, void *p, unsigned flags)
{
    cudaError_t status = emu_enter("cudaHostGetDevicePointer", EMU_SAFE);
    (void)flags;
    if (status == cudaSuccess && emu_place_of(p) != EMU_PINNED) status = cudaErrorInvalidValue;
    if (status == cudaSuccess) *out = p;
    return emu_leave(status);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    cudaError_t status = emu_enter("cudaMemGetInfo", EMU_SAFE);
    if (status == cudaSuccess) {
        *total = (size_t)64 << 30;
        *free_bytes = *total - emu_allocated(emu_device());
    }
    return emu_leave(status);
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *out, const void *p)
{
    cudaError_t status = emu_enter("cudaPointerGetAttributes", EMU_SAFE);
    if (status == cudaSuccess) {
        const struct emu_allocation *a = emu_find(p);
        memset(out, 0, sizeof *out);
        if (a == NULL || a->freed) {
            out->type = cudaMemoryTypeUnregistered;
            out->device = -2;
            out->hostPointer = (void *)(uintptr_t)p;
        } else {
            out->type = a->place == EMU_DEVICE   ? cudaMemoryTypeDevice
                        : a->place == EMU_PINNED ? cudaMemoryTypeHost
                                                 : cudaMemoryTypeManaged;
            out->device = a->device;
            out->devicePointer = (void *)(uintptr_t)p;
            out->hostPointer = a->place == EMU_DEVICE ? NULL : (void *)(uintptr_t)p;
        }
    }
    return emu_leave(status);
}

/* ---- copies ---------------------------------------------------------------------------------- */

struct copy {
    unsigned char *to;
    const unsigned char *from; /* NULL: the bytes follow */
    size_t to_pitch, from_pitch, width, height;
};

/* An aligned word of CUDA's memory moves whole: the host may look at it meanwhile. */
static bool is_word(const struct copy *c)
{
    uintptr_t address = (uintptr_t)c->to | (uintptr_t)c->from;
    if (c->height != 1 || (c->width != 4 && c->width != 8)) return false;
    return address % c->width == 0 && emu_place_of(c->to) != EMU_PAGEABLE &&
           emu_place_of(c->from) != EMU_PAGEABLE;
}

static void move_row(const struct copy *c, unsigned char *to, const unsigned char *from)
{
    if (is_word(c))
        emu_copy_word(to, from, c->width);
    else
        memmove(to, from, c->width);
}

static void run_copy(void *closure)
{
    const struct copy *c = closure;
    const unsigned char *from = c->from != NULL ? c->from : (const unsigned char *)(c + 1);
    for (size_t row = 0; row < c->height; row++) {
        move_row(c, c->to + row * c->to_pitch, from + row * c->from_pitch);
        emu_copy_written(c->to + row * c->to_pitch, from + row * c->from_pitch, c->width);
    }
}

static bool on_host(enum emu_place place) { return place != EMU_DEVICE; }
static bool on_device(enum emu_place place) { return place == EMU_DEVICE || place == EMU_MANAGED; }

static cudaError_t wrong_side(const char *side, const void *p, enum emu_place place, bool host)
{
    if (host ? on_host(place) : on_device(place)) return cudaSuccess;
    return emu_refuse(cudaErrorInvalidValue, "the %s of a copy, %p, is %s memory", side, p,
                      host ? "device" : "host");
}

static cudaError_t check_side(const char *side, const void *p, size_t bytes, bool host)
{
    enum emu_place place = emu_place_of(p);
    cudaError_t status = wrong_side(side, p, place, host);
    const char *fault = place != EMU_PAGEABLE ? emu_range_fault(p, bytes) : NULL;
    if (status != cudaSuccess || fault == NULL) return status;
    return emu_refuse(cudaErrorInvalidValue, "the %s of a copy: %s", side, fault);
}

static enum cudaMemcpyKind kind_of(const void *to, const void *from)
{
    bool to_host = !on_device(emu_place_of(to)), from_host = !on_device(emu_place_of(from));
    return to_host ? (from_host ? cudaMemcpyHostToHost : cudaMemcpyDeviceToHost)
                   : (from_host ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToDevice);
}

static enum emu_kind call_of(enum cudaMemcpyKind kind)
{
    return kind == cudaMemcpyHostToDevice     ? EMU_CALL_TO_DEVICE
           : kind == cudaMemcpyDeviceToHost   ? EMU_CALL_FROM_DEVICE
           : kind == cudaMemcpyDeviceToDevice ? EMU_CALL_ON_DEVICE
                                              : EMU_CALL_ON_HOST;
}

/* The bytes from the first to the last of a pitched range. */
static size_t extent(size_t pitch, const struct copy *c)
{
    return (c->height - 1) * pitch + c->width;
}

static struct emu_work *copy_work(const struct copy *c, bool staged)
{
    size_t bytes = staged ? extent(c->from_pitch, c) : 0;
    struct emu_work *work = emu_work_new("copy", run_copy, NULL, sizeof *c + bytes);
    struct copy *kept = (void *)work->closure;
    *kept = *c;
    if (staged) {
        memcpy(kept + 1, c->from, bytes);
        kept->from = NULL;
    }
    return work;
}

static cudaError_t wait_for_stream(const char *name, struct CUstream_st *s)
{
    emu_record(EMU_CALL_SYNCHRONIZE, name, s, 0, NULL, NULL);
    emu_finish_stream(s);
    return emu_sticky(s->device);
}

static cudaError_t copy(const char *name, const struct copy *c, enum cudaMemcpyKind kind,
                        cudaStream_t handle, bool blocking)
{
    cudaError_t status = cudaSuccess;
    struct CUstream_st *s = emu_stream(handle, &status);
    if (s == NULL || c->width == 0 || c->height == 0) return status;
    if (kind == cudaMemcpyDefault) kind = kind_of(c->to, c->from);
    bool to_host = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToHost;
    bool from_host = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyHostToHost;
    status = check_side("destination", c->to, extent(c->to_pitch, c), to_host);
    if (status == cudaSuccess) {
        status = check_side("source", c->from, extent(c->from_pitch, c), from_host);
    }
    if (status != cudaSuccess) return status;
    bool staged = emu_place_of(c->from) == EMU_PAGEABLE;
    bool waits = emu_place_of(c->to) == EMU_PAGEABLE;
    if (emu_captures(s) && (blocking || staged || waits)) {
        emu_capture_spoil(s);
        return emu_refuse(cudaErrorStreamCaptureUnsupported, "%s of pageable memory is captured",
                          name);
    }
    bool returns_staged = blocking && staged && !to_host;
    if (returns_staged) status = wait_for_stream(name, s);
    if (status != cudaSuccess) return status;
    emu_record(call_of(kind), name, s, c->width * c->height, c->to, c->from);
    status = emu_put(s, copy_work(c, staged));
    if (status != cudaSuccess || returns_staged) return status;
    return waits || (blocking && (to_host || from_host)) ? wait_for_stream(name, s) : cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    cudaError_t status = emu_enter("cudaMemcpy", EMU_UNSAFE);
    struct copy c = {to, from, bytes, bytes, bytes, 1};
    if (status == cudaSuccess) status = copy("cudaMemcpy", &c, kind, NULL, true);
    return emu_leave(status);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    cudaError_t status = emu_enter("cudaMemcpyAsync", EMU_SAFE);
    struct copy c = {to, from, bytes, bytes, bytes, 1};
    if (status == cudaSuccess) status = copy("cudaMemcpyAsync", &c, kind, stream, false);
    return emu_leave(status);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream)
{
    cudaError_t status = emu_enter("cudaMemcpy2DAsync", EMU_SAFE);
    struct copy c = {to, from, to_pitch, from_pitch, width, height};
    if (status == cudaSuccess && (width > to_pitch || width > from_pitch)) {
        status = cudaErrorInvalidPitchValue;
    }
    if (status == cudaSuccess) status = copy("cudaMemcpy2DAsync", &c, kind, stream, false);
    return emu_leave(status);
}

cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                         size_t width, size_t height, enum cudaMemcpyKind kind)
{
    cudaError_t status = emu_enter("cudaMemcpy2D", EMU_UNSAFE);
    struct copy c = {to, from, to_pitch, from_pitch, width, height};
    if (status == cudaSuccess) status = copy("cudaMemcpy2D", &c, kind, NULL, true);
    return emu_leave(status);
}

/* ---- fills ----------------------------------------------------------------------------------- */

struct set {
    void *to;
    size_t bytes;
    int value;
};

static void run_set(void *closure)
{
    const struct set *c = closure;
    memset(c->to, c->value, c->bytes);
    emu_mark_written(c->to, c->bytes);
}

static cudaError_t set(const char *name, void *to, int value, size_t bytes, cudaStream_t handle)
{
    cudaError_t status = emu_enter(name, EMU_SAFE);
    struct CUstream_st *s = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (s != NULL && bytes > 0) {
        status = check_side("destination", to, bytes, false);
        struct set c = {to, bytes, value};
        emu_record(EMU_CALL_SET, name, s, bytes, to, NULL);
        if (status == cudaSuccess) status = emu_put(s, emu_work_new("set", run_set, &c, sizeof c));
    }
    return emu_leave(status);
}

cudaError_t cudaMemset(void *to, int value, size_t bytes)
{
    return set("cudaMemset", to, value, bytes, NULL);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    return set("cudaMemsetAsync", to, value, bytes, stream);
}
