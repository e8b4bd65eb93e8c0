/* on_device.c - on_device.h over the CUDA runtime. */
#include "support/device/on_device.h"

#include <moe/cuda.h>

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>

static void must(cudaError_t error, const char *what)
{
    if (error == cudaSuccess) return;
    (void)fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
    abort();
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* Blocks handed out, so that free knows its own. */
enum { BUCKETS = 4096 };
typedef struct block {
    void *memory;
    struct block *next;
} block;
static block *buckets[BUCKETS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static block **bucket_of(const void *memory)
{
    return &buckets[((uintptr_t)memory >> 8) % BUCKETS];
}

static void remember(void *memory)
{
    block *b = malloc(sizeof *b);
    if (!b) abort();
    (void)pthread_mutex_lock(&lock);
    *b = (block){memory, *bucket_of(memory)};
    *bucket_of(memory) = b;
    (void)pthread_mutex_unlock(&lock);
}

/* Whether a device can read what is there. */
static int is_ours(const void *memory)
{
    struct cudaPointerAttributes attributes;
    cudaError_t error = cudaPointerGetAttributes(&attributes, memory);
    if (error != cudaSuccess) (void)cudaGetLastError();
    return error == cudaSuccess && attributes.type != cudaMemoryTypeUnregistered;
}

static int forget(const void *memory)
{
    int found = 0;
    (void)pthread_mutex_lock(&lock);
    for (block **at = bucket_of(memory); *at && !found; at = found ? at : &(*at)->next)
        if ((*at)->memory == memory) {
            block *gone = *at;
            *at = gone->next;
            free(gone);
            found = 1;
            break;
        }
    (void)pthread_mutex_unlock(&lock);
    return found;
}

void *device_malloc(size_t bytes)
{
    void *memory = NULL;
    must(cudaMallocManaged(&memory, bytes ? bytes : 1, cudaMemAttachGlobal), "cudaMallocManaged");
    remember(memory);
    return memory;
}

void *device_calloc(size_t count, size_t bytes)
{
    void *memory = device_malloc(count * bytes);
    memset(memory, 0, count * bytes);
    return memory;
}

void device_free(void *memory)
{
    if (!memory) return;
    if (forget(memory))
        must(cudaFree(memory), "cudaFree");
    else
        free(memory);
}

/* ---- contexts -------------------------------------------------------------------------------- */

static void *managed_alloc(void *user, uint64_t bytes, uint64_t alignment, void *stream)
{
    void *memory = NULL;
    (void)user, (void)alignment, (void)stream;
    return cudaMallocManaged(&memory, bytes, cudaMemAttachGlobal) == cudaSuccess ? memory : NULL;
}

static void managed_free(void *user, void *memory, uint64_t bytes, void *stream)
{
    (void)user, (void)bytes, (void)stream;
    (void)cudaFree(memory);
}

moe_status device_context_create(moe_context **context, const moe_context_config *config)
{
    moe_cuda_config c;
    moe_status status = moe_cuda_config_init(&c, sizeof c);
    if (status != MOE_OK) return status;
    c.alloc = managed_alloc;
    c.free = managed_free;
    c.cublas_workspace_bytes = 1 << 18;
    (void)config;
    return moe_cuda_context_create(context, &c);
}

/* ---- calls ----------------------------------------------------------------------------------- */

void *device_stream(void)
{
    static cudaStream_t stream;
    (void)pthread_mutex_lock(&lock);
    if (!stream) must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    (void)pthread_mutex_unlock(&lock);
    return stream;
}

/* ---- arrays that are not managed ------------------------------------------------------------- */

/* Copies of small arrays of a call that a suite keeps on its stack or as constants: what a device
 * could not read. Outputs go back after the wait. */
typedef struct shadow {
    void *here, *there;
    size_t bytes;
    int is_output;
} shadow;
enum { SHADOWS = 16 };
static _Thread_local shadow shadows[SHADOWS];
static _Thread_local int shadow_count;

static void *shadow_of(const void *here, size_t bytes, int is_output)
{
    if (!here || bytes == 0 || is_ours(here)) return (void *)(uintptr_t)here;
    if (shadow_count == SHADOWS) abort();
    shadow *s = &shadows[shadow_count++];
    *s = (shadow){(void *)(uintptr_t)here, device_malloc(bytes), bytes, is_output};
    memcpy(s->there, here, bytes);
    return s->there;
}

static void end_shadows(void)
{
    while (shadow_count > 0) {
        shadow *s = &shadows[--shadow_count];
        if (s->is_output) memcpy(s->here, s->there, s->bytes);
        device_free(s->there);
    }
}

moe_status device_waited(moe_status status)
{
    must(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    end_shadows();
    return status;
}

/* ---- arguments ------------------------------------------------------------------------------- */

/* A copy with the stream where there is none, of a struct of this library's size. */
#define COPY_WITH_STREAM(type, args)                            \
    static _Thread_local type copy;                             \
    if (!args || args->struct_size != sizeof copy) return args; \
    copy = *args;                                               \
    if (!copy.stream) copy.stream = device_stream()

static size_t matrix_bytes(int64_t rows, int64_t stride)
{
    return rows > 0 && stride > 0 ? (size_t)(rows * stride) * 4 : 0;
}

const moe_forward_args *device_forward_args(const moe_forward_args *args)
{
    COPY_WITH_STREAM(moe_forward_args, args);
    size_t T = copy.tokens > 0 ? (size_t)copy.tokens : 0;
    copy.token_mask = shadow_of(copy.token_mask, T, 0);
    copy.token_key = shadow_of(copy.token_key, T * 8, 0);
    copy.losses_out = shadow_of(copy.losses_out, MOE_LOSS_SLOTS * 4, 1);
    copy.stats_out = shadow_of(copy.stats_out, MOE_STAT_SLOTS * 4, 1);
    copy.logits_in = shadow_of(copy.logits_in, matrix_bytes(copy.tokens, copy.logits_stride), 0);
    return &copy;
}
const moe_backward_args *device_backward_args(const moe_backward_args *args)
{
    COPY_WITH_STREAM(moe_backward_args, args);
    copy.loss_grad = shadow_of(copy.loss_grad, MOE_LOSS_SLOTS * 4, 0);
    return &copy;
}
const moe_rows_args *device_rows_args(const moe_rows_args *args)
{
    COPY_WITH_STREAM(moe_rows_args, args);
    return &copy;
}
