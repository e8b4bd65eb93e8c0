/* moe/cuda.h - contexts on an NVIDIA GPU.
 *
 * In the library libmoe_cuda (pkg-config moe-cuda), which needs the CUDA runtime and cuBLAS; this
 * header needs neither: handles of CUDA are void *. Compute capability 8.0 or higher. Everything
 * made from such a context computes on its device, by the same calls as on the CPU:
 *
 *   memory    "backend memory" is memory of the device, or managed memory
 *   streams   `stream` of a call is a cudaStream_t of the context's device, NULL the legacy default
 *             stream. Work is put on it and most calls return before it is done; what a call
 *             returns on the host it has waited for. Calls that have no stream, such as
 *             moe_experts_touched, are on the default stream, and those that show what a pass holds
 *             on that of its last call: what other streams do must be done. No other stream of the
 *             host is used, the device is never synchronised or reset, and a thread's current
 *             device is left as it was
 *   waiting   exact mode (the default) waits once in a forward, for the rows of each expert; padded
 *             mode never does, and can be captured in a graph. With a group of ranks that takes
 *             memory of the host alone both wait for every exchange of rows
 *             (docs/expert-parallel.md). In a stream that is being captured
 *             what would wait is refused with MOE_ERROR_INVALID_STATE, and so is a pass that would
 *             grow
 *   errors    one that the device meets later is returned by the next call of the context, or by
 *             moe_cuda_poll; from then on only destroying is of use, as CUDA has it
 *   results   the same bytes from run to run on one device model and one version of CUDA; routing
 *             is the CPU's bit for bit on equal logits
 *   fork      a child process cannot use its parent's contexts, but can destroy its handles
 *
 * Any number of contexts, on one device or several, from any threads. */
#ifndef MOE_CUDA_H
#define MOE_CUDA_H

#include <moe/context.h>
#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

enum {
    MOE_CUDA_CURRENT = -1 /* the device that is current when the context is created */
};

/* Gives `bytes` (> 0) of memory of the context's device, aligned to `alignment` (a power of two up
 * to 256), or NULL if there are none. The device is current. The memory must be free for work on
 * any stream. `stream` is NULL so far. Must not call the library. */
typedef void *(*moe_cuda_alloc_fn)(void *user, uint64_t bytes, uint64_t alignment, void *stream);

/* Takes back memory of the matching moe_cuda_alloc_fn; never called with NULL. `bytes` is as
 * allocated. All work of the library with it is done, but graphs of the host that use it are the
 * host's concern. Must not call the library. */
typedef void (*moe_cuda_free_fn)(void *user, void *memory, uint64_t bytes, void *stream);

/* How a context on a GPU is made. Fill with moe_cuda_config_init, then change what you need. */
typedef struct moe_cuda_config {
    uint64_t struct_size;
    int32_t device;                 /* ordinal; default MOE_CUDA_CURRENT */
    int32_t tf32;                   /* 1: products of f32 may round their factors to TF32, 10 bits;
                                       default 0: they are of f32 */
    int64_t cublas_workspace_bytes; /* device memory of each pass for cuBLAS; default 32 MiB;
                                       0: none, products may be slower */
    double wait_seconds;            /* what any wait on the host may take, above 0; then
                                       MOE_ERROR_TIMEOUT. Default 60 */
    int32_t check_pointers;         /* 1 (default): arguments that are no memory of the device and
                                       not managed are refused with the field's name; 0: they are
                                       trusted, as memory that CUDA does not know must be */
    int32_t reserved;               /* 0 */
    moe_cuda_alloc_fn alloc;        /* default NULL: cudaMalloc. Given together with `free` or not
                                       at all */
    moe_cuda_free_fn free;
    void *alloc_user;               /* handed to both */
    const moe_context_config *host; /* allocator of host memory and log, as of a context on the
                                       CPU, copied; its other fields are not read. Default NULL:
                                       the defaults */
} moe_cuda_config;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_cuda_config_init(moe_cuda_config *config, size_t size);

/* Creates a context on a GPU. moe_context_destroy gives it up.
 *   context  out: the new context; untouched on error
 *   config   NULL for all defaults
 * Returns MOE_OK or
 *   MOE_ERROR_INVALID_ARGUMENT  also for a device that is not there
 *   MOE_ERROR_DEVICE            no driver, no device, or CUDA failed; the message has its words
 *   MOE_ERROR_NOT_SUPPORTED     the device is older than compute capability 8.0, or libmoe is of
 *                               another version
 *   MOE_ERROR_OUT_OF_MEMORY or an error of the struct's size. Since 0.1. */
MOE_API moe_status moe_cuda_context_create(moe_context **context, const moe_cuda_config *config);

/* Tells whether the device has failed in work of earlier calls, without waiting for it. Any
 * thread.
 * Returns MOE_OK, MOE_ERROR_DEVICE with what failed, or MOE_ERROR_INVALID_ARGUMENT for NULL or a
 * context that is not on a GPU. Since 0.1. */
MOE_API moe_status moe_cuda_poll(moe_context *context);

/* Returns the ordinal of the context's device; -1 for NULL and for a context that is not on a GPU.
 * Since 0.1. */
MOE_API int32_t moe_cuda_device(const moe_context *context);

/* What the host gives a pass to work with. Fill with moe_cuda_pass_config_init. */
typedef struct moe_cuda_pass_config {
    uint64_t struct_size;
    void *cublas;    /* cublasHandle_t of the context's device, the host's; default NULL: the
                                pass's own. Its stream, pointer mode and workspace are set by every
                                call and left so, its math mode is the host's; only this pass may
                                use it in a call */
    void *workspace; /* device memory for cuBLAS, aligned to 256 bytes, the host's; default
                                NULL: the pass's own */
    int64_t workspace_bytes; /* its size; default 0 */
    void *exchange_stream;   /* cudaStream_t of the context's device, the host's: rows that travel
                                in the order of streams do so on it, behind what they need, and
                                the stream of the call waits for them where it needs them, so that
                                shared experts and residual branch, and with exchange_chunks of the
                                layer the experts of another part, run beside them. Every call ends
                                with the stream of the call behind all of it: that one is waited
                                for, or captured. Several passes may have the same one, and ranks
                                may differ in it. Default NULL: all is on the stream of the call. It
                                has no effect on a layer of one rank and with transports of host
                                memory */
} moe_cuda_pass_config;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_cuda_pass_config_init(moe_cuda_pass_config *config, size_t size);

/* Gives a pass a cuBLAS handle, workspace or stream of the host, until the next moe_cuda_pass_set;
 * they must outlive the pass or that call. Not in the middle of a call of the pass.
 *
 * An exchange_stream is none of CUDA's default streams, which are ordered with others or belong to
 * a thread. Make it with cudaStreamNonBlocking if calls are on the default stream: others wait for
 * that one, and nothing overlaps. It must not be in a capture of its own: a call with it then fails
 * with MOE_ERROR_DEVICE and ends the group. A capture of the call's stream takes it in until the
 * call ends.
 *
 *   pass    of a context on a GPU
 *   config  NULL: the pass uses its own again
 * Returns MOE_OK, an error of the struct's size or
 *   MOE_ERROR_INVALID_ARGUMENT  also for an exchange_stream that is a default stream, or with CUDA
 *                               12.8 and later one of another device
 *   MOE_ERROR_INVALID_STATE     rows of a call of the pass are on the exchange_stream
 *   MOE_ERROR_DEVICE            there are no events for the exchange_stream
 * and the pass keeps what it had. Since 0.1. */
MOE_API moe_status moe_cuda_pass_set(moe_pass *pass, const moe_cuda_pass_config *config);

MOE_END_DECLS

#endif
