/* context.c - a context on a GPU: its life, errors of CUDA and cuBLAS, waiting, whose device is
 * current. */
#include "cuda_internal.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- errors ---------------------------------------------------------------------------------- */

moe_status moe__cuda_fail(moe_status status, const moe__workers *workers, const char *format, ...)
{
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return moe__module_fail(status, workers->function, text);
}

/* After these every call of the process to the device fails. */
static bool is_final(cudaError_t error)
{
    switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorContextIsDestroyed:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable: return true;
    default: return false;
    }
}

/* The thread's last error of CUDA is not left for the host to find. */
static moe_status say(cudaError_t error, moe__cuda_context *c, const char *function,
                      const char *what)
{
    char text[300];
    moe__cuda_forget_error();
    if (c && is_final(error)) {
        int none = 0;
        (void)atomic_compare_exchange_strong(&c->failed, &none, (int)error);
    }
    (void)snprintf(text, sizeof text, "%s: %s (%s)", what, cudaGetErrorName(error),
                   cudaGetErrorString(error));
    return moe__module_fail(error == cudaErrorMemoryAllocation ? MOE_ERROR_OUT_OF_MEMORY
                                                               : MOE_ERROR_DEVICE,
                            function, text);
}

moe_status moe__cuda_status(cudaError_t error, const moe__workers *workers, const char *what)
{
    return error == cudaSuccess ? MOE_OK
                                : say(error, moe__cuda_of(workers), workers->function, what);
}

moe_status moe__cublas_status(cublasStatus_t status, const moe__workers *workers, const char *what)
{
    if (status == CUBLAS_STATUS_SUCCESS) return MOE_OK;
    cudaError_t error = cudaPeekAtLastError();
    if (is_final(error)) return moe__cuda_status(error, workers, what);
    moe__cuda_forget_error();
    return moe__cuda_fail(
        status == CUBLAS_STATUS_ALLOC_FAILED ? MOE_ERROR_OUT_OF_MEMORY : MOE_ERROR_DEVICE, workers,
        "%s: %s (%s)", what, cublasGetStatusName(status), cublasGetStatusString(status));
}

static moe_status check_alive(moe__cuda_context *c, const char *function)
{
    char text[200];
    int failed = atomic_load(&c->failed);
    if (c->process != getpid())
        return moe__module_fail(MOE_ERROR_DEVICE, function,
                                "the context was made before this process was forked");
    if (failed == 0) return MOE_OK;
    (void)snprintf(text, sizeof text, "device %d has failed before: %s (%s)", (int)c->device,
                   cudaGetErrorName((cudaError_t)failed), cudaGetErrorString((cudaError_t)failed));
    return moe__module_fail(MOE_ERROR_DEVICE, function, text);
}

moe_status moe__cuda_check_alive(const moe__workers *workers)
{
    return check_alive(moe__cuda_of(workers), workers->function);
}

/* ---- whose device is current ----------------------------------------------------------------- */

/* Of the outermost scope of this thread: its context, and the error of the host's own calls that
 * the host has not asked for. */
static _Thread_local const moe__cuda_context *inside;
static _Thread_local cudaError_t host_error;

void moe__cuda_forget_error(void)
{
    if (!inside || host_error == cudaSuccess) (void)cudaGetLastError();
}

bool moe__cuda_enter(const moe__cuda_context *c, moe__cuda_scope *scope, cudaError_t *error)
{
    *error = cudaSuccess;
    scope->outer = inside;
    if (inside == c) return true;
    if (c->process != getpid()) {
        *error = cudaErrorInitializationError;
        return false;
    }
    if (!inside) host_error = cudaPeekAtLastError();
    inside = c;
    *error = cudaGetDevice(&scope->previous);
    if (*error == cudaSuccess && scope->previous != c->device) *error = cudaSetDevice(c->device);
    if (*error == cudaSuccess) {
        scope->mode = cudaStreamCaptureModeRelaxed;
        *error = cudaThreadExchangeStreamCaptureMode(&scope->mode);
        if (*error != cudaSuccess) (void)cudaSetDevice(scope->previous);
    }
    if (*error == cudaSuccess) return true;
    moe__cuda_forget_error();
    inside = scope->outer;
    return false;
}

void moe__cuda_leave(const moe__cuda_scope *scope)
{
    int now = -1;
    enum cudaStreamCaptureMode mode = scope->mode;
    if (inside == scope->outer) return;
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
    if (cudaGetDevice(&now) != cudaSuccess || now != scope->previous)
        (void)cudaSetDevice(scope->previous);
    moe__cuda_forget_error();
    inside = scope->outer;
}

moe_status moe__cuda_enter_call(const moe__workers *workers, moe__cuda_scope *scope)
{
    cudaError_t error;
    MOE_TRY(moe__cuda_check_alive(workers));
    if (moe__cuda_enter(moe__cuda_of(workers), scope, &error)) return MOE_OK;
    return moe__cuda_status(error, workers, "cudaSetDevice");
}

/* ---- waiting --------------------------------------------------------------------------------- */

static double seconds(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* The wait of an exact forward is short: asking without a pause comes first. */
static const double SPIN_SECONDS = 1e-4;

moe_status moe__cuda_wait(const moe__workers *workers, cudaEvent_t event, const char *what)
{
    const moe__cuda_context *c = moe__cuda_of(workers);
    double begin = seconds();
    for (;;) {
        cudaError_t error = cudaEventQuery(event);
        if (error != cudaErrorNotReady) return moe__cuda_status(error, workers, what);
        moe__cuda_forget_error();
        double waited = seconds() - begin;
        if (waited > c->wait_seconds)
            return moe__cuda_fail(MOE_ERROR_TIMEOUT, workers, "%s: device %d was not done in %g s",
                                  what, (int)c->device, c->wait_seconds);
        if (waited > SPIN_SECONDS) {
            struct timespec pause = {0, 20000};
            (void)nanosleep(&pause, NULL);
        }
    }
}

static moe_status find_capture(const moe__workers *workers, enum cudaStreamCaptureStatus *capture)
{
    cudaError_t error = cudaStreamIsCapturing((cudaStream_t)workers->stream, capture);
    if (error != cudaErrorStreamCaptureImplicit)
        return moe__cuda_status(error, workers, "cudaStreamIsCapturing");
    moe__cuda_forget_error(); /* the legacy stream while another one is captured */
    *capture = cudaStreamCaptureStatusActive;
    return MOE_OK;
}

moe_status moe__cuda_may_wait(const moe__workers *workers)
{
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    moe__cuda_scope scope;
    MOE_TRY(moe__cuda_enter_call(workers, &scope));
    moe_status status = find_capture(workers, &capture);
    moe__cuda_leave(&scope);
    if (status != MOE_OK || capture == cudaStreamCaptureStatusNone) return status;
    return moe__cuda_fail(
        MOE_ERROR_INVALID_STATE, workers,
        "the stream is being captured, and this call waits for the device or takes "
        "memory: use padded rows and moe_pass_reserve, or do not capture it");
}

cublasComputeType_t moe__cuda_compute_type(const moe__workers *workers, int32_t dtype)
{
    bool tf32 = dtype == MOE_DTYPE_F32 && moe__cuda_of(workers)->tf32;
    /* Pedantic, so that no environment variable makes TF32 of f32. */
    return tf32                     ? CUBLAS_COMPUTE_32F_FAST_TF32
           : dtype == MOE_DTYPE_F32 ? CUBLAS_COMPUTE_32F_PEDANTIC
                                    : CUBLAS_COMPUTE_32F;
}

/* ---- config ---------------------------------------------------------------------------------- */

static void config_defaults(void *instance)
{
    *(moe_cuda_config *)instance = (moe_cuda_config){.device = MOE_CUDA_CURRENT,
                                                     .cublas_workspace_bytes = (int64_t)32 << 20,
                                                     .wait_seconds = 60,
                                                     .check_pointers = 1};
}
static const moe__struct_info config_info = MOE__STRUCT_INFO(moe_cuda_config, config_defaults);

moe_status moe_cuda_config_init(moe_cuda_config *config, size_t size)
{
    return moe__module_struct_init(&config_info, config, size, __func__);
}

static moe_status check_config(const moe_cuda_config *k, const char *function)
{
    char text[160] = "";
    if (k->device < MOE_CUDA_CURRENT)
        (void)snprintf(text, sizeof text, "device is %d", (int)k->device);
    else if (k->tf32 != 0 && k->tf32 != 1)
        (void)snprintf(text, sizeof text, "tf32 is %d", (int)k->tf32);
    else if (k->check_pointers != 0 && k->check_pointers != 1)
        (void)snprintf(text, sizeof text, "check_pointers is %d", (int)k->check_pointers);
    else if (k->reserved != 0)
        (void)snprintf(text, sizeof text, "reserved is %d", (int)k->reserved);
    else if (k->cublas_workspace_bytes < 0)
        (void)snprintf(text, sizeof text, "cublas_workspace_bytes is %lld",
                       (ll)k->cublas_workspace_bytes);
    else if (!(k->wait_seconds > 0 && k->wait_seconds <= 1e9))
        (void)snprintf(text, sizeof text,
                       "wait_seconds is %g; it must be above 0 and at most 1e9 seconds",
                       k->wait_seconds);
    else if (!k->alloc != !k->free)
        (void)snprintf(text, sizeof text, "%s is given without %s", k->alloc ? "alloc" : "free",
                       k->alloc ? "free" : "alloc");
    return text[0] ? moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, function, text) : MOE_OK;
}

static moe_status read_config(moe_cuda_config *k, const moe_cuda_config *config,
                              const char *function)
{
    char text[120];
    if (moe__module_version() != MOE__MODULE_VERSION) {
        (void)snprintf(text, sizeof text, "this module needs interface %d of libmoe, which has %d",
                       MOE__MODULE_VERSION, (int)moe__module_version());
        return moe__module_fail(MOE_ERROR_NOT_SUPPORTED, function, text);
    }
    MOE_TRY(moe__module_struct_read(&config_info, k, config, function));
    return check_config(k, function);
}

/* ---- life ------------------------------------------------------------------------------------ */

enum { OLDEST_CAPABILITY = 8, STAGING_BYTES = 1 << 20 };

static moe_status find_device(int32_t wanted, int32_t *device, const char *function)
{
    char text[160];
    int count = 0, now = 0, major = 0, minor = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) return say(error, NULL, function, "cudaGetDeviceCount");
    if (wanted >= count) {
        (void)snprintf(text, sizeof text, "device is %d, there are %d", (int)wanted, count);
        return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, function, text);
    }
    if (wanted == MOE_CUDA_CURRENT && (error = cudaGetDevice(&now)) != cudaSuccess)
        return say(error, NULL, function, "cudaGetDevice");
    *device = wanted == MOE_CUDA_CURRENT ? now : wanted;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, *device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, *device);
    if (error != cudaSuccess) return say(error, NULL, function, "cudaDeviceGetAttribute");
    if (major >= OLDEST_CAPABILITY) return MOE_OK;
    (void)snprintf(text, sizeof text, "device %d has compute capability %d.%d; 8.0 is needed",
                   (int)*device, major, minor);
    return moe__module_fail(MOE_ERROR_NOT_SUPPORTED, function, text);
}

static void release(moe__cuda_context *c)
{
    if (c->host_free)
        c->host_free(c->host_user, c, sizeof *c);
    else
        free(c);
}

/* The host's allocator is read before libmoe has checked the struct, if it is that long. */
static moe__cuda_context *make(const moe_cuda_config *k)
{
    const moe_context_config *host = k->host;
    size_t end = offsetof(moe_context_config, alloc_user) + sizeof host->alloc_user;
    bool given = host && host->struct_size >= end && host->alloc && host->free;
    moe__cuda_context *c = given ? host->alloc(host->alloc_user, sizeof *c, 64) : malloc(sizeof *c);
    if (!c) return NULL;
    memset(c, 0, sizeof *c);
    if (given)
        c->host_alloc = host->alloc, c->host_free = host->free, c->host_user = host->alloc_user;
    c->tf32 = k->tf32 != 0;
    c->check_pointers = k->check_pointers != 0;
    c->cublas_workspace_bytes = k->cublas_workspace_bytes;
    c->wait_seconds = k->wait_seconds;
    c->alloc = k->alloc, c->free = k->free, c->alloc_user = k->alloc_user;
    c->process = getpid();
    atomic_init(&c->failed, 0);
    return c;
}

/* What the context needs of the device. */
static cudaError_t equip(moe__cuda_context *c)
{
    moe__cuda_scope scope;
    cudaError_t error;
    if (!moe__cuda_enter(c, &scope, &error)) return error;
    error = cudaStreamCreateWithFlags(&c->stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = moe__cuda_staging_create(&c->staging, STAGING_BYTES);
    for (int i = 0; i < MOE__CUDA_STREAMS && c->free && error == cudaSuccess; i++)
        error = cudaEventCreateWithFlags(&c->use[i].done, cudaEventDisableTiming);
    moe__cuda_leave(&scope);
    return error;
}

void moe__cuda_context_destroy(void *of_context)
{
    moe__cuda_context *c = of_context;
    moe__cuda_scope scope;
    cudaError_t error;
    if (moe__cuda_enter(c, &scope, &error)) {
        for (int i = 0; i < MOE__CUDA_STREAMS; i++)
            if (c->use[i].done) (void)cudaEventDestroy(c->use[i].done);
        moe__cuda_staging_destroy(&c->staging);
        if (c->stream) (void)cudaStreamDestroy(c->stream);
        moe__cuda_leave(&scope);
    }
    (void)pthread_mutex_destroy(&c->mutex);
    release(c);
}

moe_status moe_cuda_context_create(moe_context **context, const moe_cuda_config *config)
{
    moe_cuda_config k;
    int32_t device = 0;
    if (!context) return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, __func__, "context is NULL");
    MOE_TRY(read_config(&k, config, __func__));
    MOE_TRY(find_device(k.device, &device, __func__));
    moe__cuda_context *c = make(&k);
    if (!c) return moe__module_fail(MOE_ERROR_OUT_OF_MEMORY, __func__, "no memory for the context");
    c->device = device;
    if (pthread_mutex_init(&c->mutex, NULL) != 0) {
        release(c);
        return moe__module_fail(MOE_ERROR_SYSTEM, __func__, "no mutex");
    }
    cudaError_t error = equip(c);
    moe_status status = error == cudaSuccess
                            ? moe__module_context(context, k.host, &moe__cuda_memory,
                                                  moe__cuda_tables, c, __func__)
                            : say(error, c, __func__, "the context's stream and memory");
    if (status != MOE_OK) moe__cuda_context_destroy(c);
    return status;
}

/* ---- queries --------------------------------------------------------------------------------- */

static moe__cuda_context *on_device(const moe_context *context)
{
    if (!context || moe_context_backend(context) != MOE_BACKEND_CUDA) return NULL;
    return moe__module_of_context(context);
}

int32_t moe_cuda_device(const moe_context *context)
{
    const moe__cuda_context *c = on_device(context);
    return c ? c->device : -1;
}

/* The context's stream has no work: what it tells is of the device. */
moe_status moe_cuda_poll(moe_context *context)
{
    moe__cuda_context *c = on_device(context);
    moe__cuda_scope scope;
    cudaError_t error;
    if (!c)
        return moe__module_fail(MOE_ERROR_INVALID_ARGUMENT, __func__,
                                context ? "context is not on a GPU" : "context is NULL");
    MOE_TRY(check_alive(c, __func__));
    if (!moe__cuda_enter(c, &scope, &error)) return say(error, c, __func__, "cudaSetDevice");
    error = cudaStreamQuery(c->stream);
    moe__cuda_leave(&scope);
    if (error == cudaSuccess || error == cudaErrorNotReady) return MOE_OK;
    return say(error, c, __func__, "the device failed");
}
