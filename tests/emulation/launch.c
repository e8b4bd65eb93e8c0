/* launch.c - a launch: what CUDA checks, what it should, and the kernel put on its stream.
 *
 * The checks that a real launch answers with an error are mistakes here, for no launch of the
 * library may rely on them. The arguments are looked through for addresses that the device has no
 * business with: of the host, of freed memory, of another device. */
#include "internal.h"

#include <string.h>

struct closure {
    struct emu_run run;
    bool faults;
    _Alignas(16) unsigned char arguments[];
};

static void run_closure(void *p)
{
    struct closure *c = p;
    if (c->faults) {
        emu_make_sticky(c->run.device, cudaErrorIllegalAddress);
        return;
    }
    c->run.arguments = c->arguments;
    if (!emu_run_kernel(&c->run)) emu_make_sticky(c->run.device, cudaErrorLaunchFailure);
}

static bool shape_is_wrong(const struct emu_kernel *k, dim3 grid, dim3 block, size_t shared)
{
    uint64_t threads = (uint64_t)block.x * block.y * block.z;
    const char *name = k->name;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0) {
        emu_mistake("empty launch of %s: grid (%u, %u, %u), block (%u, %u, %u)", name, grid.x,
                    grid.y, grid.z, block.x, block.y, block.z);
    } else if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        emu_mistake("grid over the limits: %s: (%u, %u, %u)", name, grid.x, grid.y, grid.z);
    } else if (threads > EMU_THREADS || block.z > 64) {
        emu_mistake("block over 1024 threads: %s: (%u, %u, %u)", name, block.x, block.y, block.z);
    } else if (k->bound > 0 && threads > (uint64_t)k->bound) {
        emu_mistake("block over its bound: %s: %llu threads, bound %d", name,
                    (unsigned long long)threads, k->bound);
    } else if (threads % EMU_WARP != 0) {
        emu_mistake("block not of whole warps: %s: %llu threads", name,
                    (unsigned long long)threads);
    } else if (shared > k->shared_allowed) {
        emu_mistake("too much shared memory: %s: %zu dynamic bytes, allowed are %zu", name, shared,
                    k->shared_allowed);
    } else {
        return false;
    }
    return true;
}

/* What is wrong with an address in the arguments of a kernel on this device, or NULL. */
static const char *address_fault(const void *p, int device)
{
    const struct emu_allocation *a = emu_find(p);
    if (a == NULL) return emu_is_host_memory(p) ? "host memory" : NULL;
    if (a->freed) return "freed memory";
    if (a->place == EMU_DEVICE && !emu_peers(device, a->device)) return "memory of another device";
    return NULL;
}

static bool arguments_are_wrong(const struct emu_kernel *k, const emu_launch *launch, int device)
{
    for (int i = 0; i < launch->count; i++) {
        const emu_argument *argument = &launch->list[i];
        const unsigned char *bytes = (const unsigned char *)launch->arguments + argument->offset;
        if (argument->kind == EMU_ARGUMENT_SCALAR) continue;
        for (size_t at = 0; at + 8 <= argument->bytes; at += 8) {
            void *p;
            memcpy(&p, bytes + at, sizeof p);
            const char *fault = address_fault(p, device);
            if (fault == NULL) continue;
            emu_mistake("argument %d of %s, at byte %zu of it, points to %s: %p", i, k->name, at,
                        fault, p);
            return true;
        }
    }
    return false;
}

static cudaError_t put_launch(const emu_launch *launch, dim3 grid, dim3 block, size_t shared,
                              struct CUstream_st *stream)
{
    struct emu_kernel *k = emu_kernel_of(launch->kernel);
    if (stream->device != emu_device()) {
        return emu_refuse(cudaErrorInvalidResourceHandle,
                          "%s on a stream of device %d, current is %d", k->name, stream->device,
                          emu_device());
    }
    if (shape_is_wrong(k, grid, block, shared)) return cudaErrorInvalidConfiguration;
    if (arguments_are_wrong(k, launch, stream->device)) return cudaErrorInvalidValue;
    k->launched++;
    emu_record(EMU_CALL_LAUNCH, k->name, stream, 0, NULL, NULL);
    struct emu_work *work = emu_work_new(k->name, run_closure, NULL,
                                         sizeof(struct closure) + launch->bytes);
    struct closure *c = (void *)work->closure;
    memset(c, 0, sizeof *c);
    c->run.kernel = k;
    c->run.thread = launch->run;
    c->run.grid = grid;
    c->run.block = block;
    c->run.shared = shared;
    c->run.device = stream->device;
    c->faults = emu_take_kernel_fault();
    memcpy(c->arguments, launch->arguments, launch->bytes);
    return emu_put(stream, work);
}

cudaError_t emu_launch_kernel(const emu_launch *launch, dim3 grid, dim3 block, size_t shared,
                              cudaStream_t handle)
{
    cudaError_t status = emu_enter("kernel", EMU_SAFE);
    struct CUstream_st *stream = status == cudaSuccess ? emu_stream(handle, &status) : NULL;
    if (stream != NULL) status = put_launch(launch, grid, block, shared, stream);
    return emu_leave(status);
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value)
{
    cudaError_t status = emu_enter("cudaFuncSetAttribute", EMU_SAFE);
    if (status == cudaSuccess && attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        struct emu_kernel *k = emu_kernel_of(function);
        if (value < 0 || value > EMU_SHARED_LIMIT) {
            status = emu_refuse(cudaErrorInvalidValue, "%s: %d bytes of shared memory, at most %d",
                                k->name, value, EMU_SHARED_LIMIT);
        } else if (value > EMU_SHARED_PLAIN) {
            k->shared_allowed = (size_t)value;
        }
    }
    return emu_leave(status);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *function)
{
    cudaError_t status = emu_enter("cudaFuncGetAttributes", EMU_SAFE);
    if (status == cudaSuccess) {
        const struct emu_kernel *k = emu_kernel_of(function);
        memset(out, 0, sizeof *out);
        out->maxThreadsPerBlock = k->bound > 0 ? k->bound : EMU_THREADS;
        out->maxDynamicSharedSizeBytes = (int)k->shared_allowed;
        out->numRegs = 32;
        out->binaryVersion = out->ptxVersion = 90;
    }
    return emu_leave(status);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function,
                                                          int threads, size_t shared)
{
    cudaError_t status = emu_enter("cudaOccupancyMaxActiveBlocksPerMultiprocessor", EMU_SAFE);
    (void)function;
    if (status == cudaSuccess && (threads <= 0 || shared > EMU_SHARED_LIMIT)) {
        status = cudaErrorInvalidValue;
    }
    if (status == cudaSuccess) *blocks = 2048 / threads;
    return emu_leave(status);
}

/* What nvcc's own stub of a kernel calls: the sizes of the arguments are not known here. */
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **args,
                             size_t shared, cudaStream_t stream)
{
    cudaError_t status = emu_enter("cudaLaunchKernel", EMU_SAFE);
    (void)grid;
    (void)block;
    (void)args;
    (void)shared;
    (void)stream;
    if (status == cudaSuccess) {
        status = emu_refuse(cudaErrorNotSupported, "kernel %p: emulated kernels go by moe_launch",
                            function);
    }
    return emu_leave(status);
}
