/* api_device.c - which devices there are, what they are like, versions, and the names of errors.
 *
 * The devices look like an H100: MOE_EMULATION_DEVICES of them, two by default. With
 * MOE_EMULATION_NO_DRIVER set every call answers cudaErrorInsufficientDriver. */
#include "internal.h"

#include <stdio.h>
#include <string.h>

enum { PROCESSORS = 132, MAJOR = 9, MINOR = 0, REGISTERS = 65536, VERSION = 13000 };

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 0;
    cudaError_t status = emu_enter("cudaGetDeviceCount", EMU_QUIET);
    if (status == cudaSuccess) *count = emu_device_count();
    return emu_leave(status);
}

cudaError_t cudaGetDevice(int *device)
{
    cudaError_t status = emu_enter("cudaGetDevice", EMU_QUIET);
    if (status == cudaSuccess) *device = emu_device();
    return emu_leave(status);
}

cudaError_t cudaSetDevice(int device)
{
    cudaError_t status = emu_enter("cudaSetDevice", EMU_QUIET);
    if (status == cudaSuccess && (device < 0 || device >= emu_device_count())) {
        status = cudaErrorInvalidDevice;
    }
    if (status == cudaSuccess) emu_set_device(device);
    return emu_leave(status);
}

static const struct {
    enum cudaDeviceAttr attribute;
    int value;
} attributes[] = {
    {cudaDevAttrMaxThreadsPerBlock, EMU_THREADS},
    {cudaDevAttrMaxBlockDimX, EMU_THREADS},
    {cudaDevAttrMaxBlockDimY, EMU_THREADS},
    {cudaDevAttrMaxBlockDimZ, 64},
    {cudaDevAttrMaxGridDimX, 0x7fffffff},
    {cudaDevAttrMaxGridDimY, 65535},
    {cudaDevAttrMaxGridDimZ, 65535},
    {cudaDevAttrMaxSharedMemoryPerBlock, EMU_SHARED_PLAIN},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, EMU_SHARED_LIMIT},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, EMU_SHARED_LIMIT + 1024},
    {cudaDevAttrWarpSize, EMU_WARP},
    {cudaDevAttrMaxRegistersPerBlock, REGISTERS},
    {cudaDevAttrMaxRegistersPerMultiprocessor, REGISTERS},
    {cudaDevAttrMultiProcessorCount, PROCESSORS},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
    {cudaDevAttrComputeCapabilityMajor, MAJOR},
    {cudaDevAttrComputeCapabilityMinor, MINOR},
    {cudaDevAttrConcurrentKernels, 1},
    {cudaDevAttrUnifiedAddressing, 1},
    {cudaDevAttrManagedMemory, 1},
    {cudaDevAttrConcurrentManagedAccess, 1},
    {cudaDevAttrMemoryPoolsSupported, 1},
    {cudaDevAttrCanMapHostMemory, 1},
    {cudaDevAttrL2CacheSize, 50 << 20},
    {cudaDevAttrCooperativeLaunch, 0},
};

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    cudaError_t status = emu_enter("cudaDeviceGetAttribute", EMU_SAFE);
    if (status == cudaSuccess && (device < 0 || device >= emu_device_count())) {
        status = cudaErrorInvalidDevice;
    }
    if (status == cudaSuccess) {
        *value = 0;
        for (size_t i = 0; i < sizeof attributes / sizeof attributes[0]; i++) {
            if (attributes[i].attribute == attribute) *value = attributes[i].value;
        }
    }
    return emu_leave(status);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device)
{
    cudaError_t status = emu_enter("cudaGetDeviceProperties", EMU_SAFE);
    if (status == cudaSuccess && (device < 0 || device >= emu_device_count())) {
        status = cudaErrorInvalidDevice;
    }
    if (status != cudaSuccess) return emu_leave(status);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulated device %d", device);
    p->totalGlobalMem = (size_t)64 << 30;
    p->sharedMemPerBlock = EMU_SHARED_PLAIN;
    p->sharedMemPerBlockOptin = EMU_SHARED_LIMIT;
    p->sharedMemPerMultiprocessor = EMU_SHARED_LIMIT + 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
    p->warpSize = EMU_WARP;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = EMU_THREADS;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->major = MAJOR;
    p->minor = MINOR;
    p->multiProcessorCount = PROCESSORS;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->l2CacheSize = 50 << 20;
    p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
    p->canMapHostMemory = p->concurrentManagedAccess = p->memoryPoolsSupported = 1;
    p->pciBusID = device + 1;
    return emu_leave(status);
}

static cudaError_t version(const char *name, int *out)
{
    cudaError_t status = emu_enter(name, EMU_QUIET);
    *out = status == cudaErrorInsufficientDriver ? 0 : VERSION;
    return emu_leave(cudaSuccess);
}

cudaError_t cudaRuntimeGetVersion(int *out) { return version("cudaRuntimeGetVersion", out); }
cudaError_t cudaDriverGetVersion(int *out) { return version("cudaDriverGetVersion", out); }

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    cudaError_t status = emu_enter("cudaDeviceGetStreamPriorityRange", EMU_SAFE);
    if (status == cudaSuccess) *least = *greatest = 0;
    return emu_leave(status);
}

/* ---- the names of errors --------------------------------------------------------------------- */

#define ERROR(name, text) \
    {                     \
        name, #name, text \
    }
static const struct {
    cudaError_t error;
    const char *name, *text;
} errors[] = {
    ERROR(cudaSuccess, "no error"),
    ERROR(cudaErrorInvalidValue, "invalid argument"),
    ERROR(cudaErrorMemoryAllocation, "out of memory"),
    ERROR(cudaErrorInitializationError, "initialization error"),
    ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    ERROR(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    ERROR(cudaErrorInsufficientDriver,
          "CUDA driver version is insufficient for CUDA runtime version"),
    ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    ERROR(cudaErrorNotReady, "device not ready"),
    ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    ERROR(cudaErrorPeerAccessAlreadyEnabled, "peer access is already enabled"),
    ERROR(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is "
                                                "already mapped"),
    ERROR(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory "
                                            "region"),
    ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    ERROR(cudaErrorNotPermitted, "operation not permitted"),
    ERROR(cudaErrorNotSupported, "operation not supported"),
    ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    ERROR(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during "
                                             "capture"),
    ERROR(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture "
                                       "sequences"),
    ERROR(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    ERROR(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another "
                                           "stream"),
    ERROR(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a "
                                          "capturing blocking stream"),
    ERROR(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a "
                                  "capturing stream"),
    ERROR(cudaErrorStreamCaptureWrongThread, "attempt to terminate a thread-local capture "
                                             "sequence from another thread"),
    ERROR(cudaErrorUnknown, "unknown error"),
};

const char *cudaGetErrorName(cudaError_t error)
{
    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++) {
        if (errors[i].error == error) return errors[i].name;
    }
    return "unrecognized error code";
}

const char *cudaGetErrorString(cudaError_t error)
{
    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++) {
        if (errors[i].error == error) return errors[i].text;
    }
    return "unrecognized error code";
}
