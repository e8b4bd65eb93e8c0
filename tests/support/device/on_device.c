/* on_device.c - on_device.h over the CUDA runtime. */
#include "support/device/on_device.h"

#include <moe/cuda.h>

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stddef.h>
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

/* Managed memory is aligned to 256 bytes at least. */
void *device_aligned_alloc(size_t alignment, size_t bytes)
{
    if (alignment > 256) abort();
    return device_malloc(bytes);
}

int device_posix_memalign(void **memory, size_t alignment, size_t bytes)
{
    *memory = device_aligned_alloc(alignment, bytes);
    return 0;
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

/* The allocator that a suite gives makes managed memory as well, and counts it. */
static void *suites_alloc(void *user, uint64_t bytes, uint64_t alignment, void *stream)
{
    const moe_context_config *config = user;
    (void)stream;
    return config->alloc(config->alloc_user, bytes, alignment);
}

static void suites_free(void *user, void *memory, uint64_t bytes, void *stream)
{
    const moe_context_config *config = user;
    (void)stream;
    config->free(config->alloc_user, memory, bytes);
}

/* A copy that lives as long as the program: contexts end when their last object does. */
static moe_context_config *lasting(const moe_context_config *config)
{
    moe_context_config *copy = malloc(sizeof *copy);
    if (!copy) abort();
    *copy = *config;
    return copy;
}

moe_status device_context_create(moe_context **context, const moe_context_config *config)
{
    moe_cuda_config c;
    moe_status status = moe_cuda_config_init(&c, sizeof c);
    if (status != MOE_OK) return status;
    c.alloc = managed_alloc;
    c.free = managed_free;
    c.cublas_workspace_bytes = 1 << 18;
    if (config && config->struct_size == sizeof *config && config->alloc && config->free) {
        c.alloc = suites_alloc, c.free = suites_free;
        c.alloc_user = lasting(config);
    }
    return moe_cuda_context_create(context, &c);
}

/* ---- calls ----------------------------------------------------------------------------------- */

static _Thread_local cudaStream_t own_stream; /* NULL: the one of all */

void *device_stream(void)
{
    static cudaStream_t stream;
    if (own_stream) return own_stream;
    (void)pthread_mutex_lock(&lock);
    if (!stream) must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
    (void)pthread_mutex_unlock(&lock);
    return stream;
}

void *device_stream_for(void *given) { return given ? given : device_stream(); }

void device_take_stream(int device)
{
    must(cudaSetDevice(device), "cudaSetDevice");
    must(cudaStreamCreateWithFlags(&own_stream, cudaStreamNonBlocking), "a stream");
}

void device_give_stream(void)
{
    must(cudaStreamDestroy(own_stream), "a stream");
    own_stream = NULL;
}

/* ---- arrays that are not managed ------------------------------------------------------------- */

/* Copies of small arrays of a call that a suite keeps on its stack or as constants: what a device
 * could not read. Outputs go back after the wait. What a forward reads stays where it is, for the
 * pass may read it in the backward; the same array has the same copy. */
enum { FOR_CALL, IN_AND_OUT, FOR_PASS };
typedef struct shadow {
    void *here, *there;
    size_t bytes;
    int is_output;
} shadow;
enum { SHADOWS = 128 };
static _Thread_local shadow shadows[SHADOWS];
static _Thread_local int shadow_count;
static _Thread_local int open_calls; /* started and not finished: they keep their copies */

typedef struct lasting_shadow {
    const void *here;
    void *there;
    size_t bytes;
    struct lasting_shadow *next;
} lasting_shadow;
static _Thread_local lasting_shadow *lasting_shadows;

static void *lasting_copy(const void *here, size_t bytes)
{
    lasting_shadow *s = lasting_shadows;
    while (s && (s->here != here || s->bytes != bytes)) s = s->next;
    if (!s) {
        s = malloc(sizeof *s);
        if (!s) abort();
        *s = (lasting_shadow){here, device_malloc(bytes), bytes, lasting_shadows};
        lasting_shadows = s;
    }
    memcpy(s->there, here, bytes);
    return s->there;
}

static void *shadow_of(const void *here, size_t bytes, int what)
{
    if (!here || is_ours(here)) return (void *)(uintptr_t)here;
    if (what == FOR_PASS) return lasting_copy(here, bytes);
    if (shadow_count == SHADOWS) abort();
    shadow *s = &shadows[shadow_count++];
    *s = (shadow){(void *)(uintptr_t)here, device_malloc(bytes), bytes, what == IN_AND_OUT};
    memcpy(s->there, here, bytes);
    return s->there;
}

static void end_shadows(void)
{
    for (int i = 0; i < shadow_count && open_calls > 0; i++)
        if (shadows[i].is_output) memcpy(shadows[i].here, shadows[i].there, shadows[i].bytes);
    while (shadow_count > 0 && open_calls == 0) {
        shadow *s = &shadows[--shadow_count];
        if (s->is_output) memcpy(s->here, s->there, s->bytes);
        device_free(s->there);
    }
}

/* A thread with a stream of its own is a rank: what another rank's stream waits for may be its. */
static void wait_for_streams(void)
{
    if (!own_stream) {
        must(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
        return;
    }
    must(cudaStreamSynchronize(own_stream), "cudaStreamSynchronize");
    must(cudaStreamSynchronize(NULL), "cudaStreamSynchronize");
}

moe_status device_waited(moe_status status)
{
    wait_for_streams();
    end_shadows();
    return status;
}

moe_status device_started(moe_status status)
{
    open_calls += status == MOE_OK;
    return status;
}

moe_status device_finished(moe_status status)
{
    open_calls -= open_calls > 0 && status != MOE_ERROR_INVALID_STATE;
    return device_waited(status);
}

/* ---- arguments ------------------------------------------------------------------------------- */

/* A copy with the stream where there is none, of a struct that this library knows, older ones
 * included. */
#define COPY_WITH_STREAM(type, args)                                     \
    static _Thread_local type copy;                                      \
    if (!args || args->struct_size > sizeof copy ||                      \
        args->struct_size < offsetof(type, stream) + sizeof copy.stream) \
        return args;                                                     \
    memset(&copy, 0, sizeof copy);                                       \
    memcpy(&copy, args, (size_t)args->struct_size);                      \
    if (!copy.stream) copy.stream = device_stream()

/* What the arrays of a call are made of; 0 where the object has none. */
typedef struct widths {
    int64_t tokens, entries, gate, experts, groups, in, out;
    size_t element, real;
} widths;

static size_t element_bytes(int32_t dtype)
{
    return dtype == MOE_DTYPE_BF16 || dtype == MOE_DTYPE_F16 ? 2 : dtype == MOE_DTYPE_F64 ? 8 : 4;
}

static void add_gate(widths *w, const moe_gate *gate)
{
    moe_gate_config g;
    if (!gate || moe_gate_config_init(&g, sizeof g) != MOE_OK) return;
    if (moe_gate_get_config(gate, &g) != MOE_OK) return;
    w->gate = w->in = g.d_model, w->experts = g.num_experts, w->groups = g.expert_groups;
    w->element = element_bytes(g.dtype);
}

static void add_experts(widths *w, const moe_experts *experts)
{
    moe_experts_config e;
    if (!experts || moe_experts_config_init(&e, sizeof e) != MOE_OK) return;
    if (moe_experts_get_config(experts, &e) != MOE_OK) return;
    w->in = e.d_model, w->out = e.d_out;
    w->element = element_bytes(e.dtype);
}

static widths widths_of(const moe_layer *layer, const moe_gate *gate, const moe_experts *experts)
{
    widths w = {.element = 4, .real = 4};
    moe_layer_config l;
    if (layer && moe_layer_config_init(&l, sizeof l) == MOE_OK &&
        moe_layer_get_config(layer, &l) == MOE_OK)
        gate = l.gate, experts = l.experts;
    add_gate(&w, gate);
    add_experts(&w, experts);
    return w;
}

/* Rows of a matrix; 0 for nonsense, which the library refuses. */
static size_t matrix_bytes(int64_t rows, int64_t width, int64_t stride, size_t element)
{
    enum { MOST = 1 << 22 };
    if (stride == 0) stride = width;
    if (rows <= 0 || width <= 0 || stride < width || rows > MOST || stride > MOST) return 0;
    return (size_t)((rows - 1) * stride + width) * element;
}

/* Elements of a list. */
static size_t list_bytes(int64_t count, size_t element)
{
    return matrix_bytes(count, 1, 1, element);
}

const moe_forward_args *device_forward_args(const moe_layer *layer, const moe_gate *gate,
                                            const moe_experts *experts,
                                            const moe_forward_args *args)
{
    COPY_WITH_STREAM(moe_forward_args, args);
    widths w = widths_of(layer, gate, experts);
    int64_t T = copy.tokens;
    size_t x = matrix_bytes(T, w.in, copy.x_stride, w.element);
    size_t gate_x = matrix_bytes(T, w.gate, copy.gate_x_stride, w.element);
    size_t y = matrix_bytes(T, w.out, copy.y_stride, w.element);
    size_t logits = matrix_bytes(T, w.experts, copy.logits_stride, w.real);
    size_t noise = matrix_bytes(T, w.experts, copy.noise_stride, w.real);
    size_t primary = matrix_bytes(T, w.groups, copy.noise_primary_stride, w.real);
    copy.x = shadow_of(copy.x, x, FOR_PASS);
    copy.gate_x = shadow_of(copy.gate_x, gate_x, FOR_PASS);
    copy.logits_in = shadow_of(copy.logits_in, logits, FOR_PASS);
    copy.noise = shadow_of(copy.noise, noise, FOR_PASS);
    copy.noise_primary = shadow_of(copy.noise_primary, primary, FOR_PASS);
    copy.token_mask = shadow_of(copy.token_mask, list_bytes(T, 1), FOR_PASS);
    copy.token_key = shadow_of(copy.token_key, list_bytes(T, 8), FOR_PASS);
    copy.y = shadow_of(copy.y, y, IN_AND_OUT);
    copy.losses_out = shadow_of(copy.losses_out, MOE_LOSS_SLOTS * w.real, IN_AND_OUT);
    copy.stats_out = shadow_of(copy.stats_out, MOE_STAT_SLOTS * w.real, IN_AND_OUT);
    return &copy;
}

/* Tokens and entries of the last forward. */
static void add_plan(widths *w, const moe_plan *plan)
{
    moe_plan_view v;
    if (!plan || moe_plan_view_init(&v, sizeof v) != MOE_OK) return;
    if (moe_plan_get(plan, &v) == MOE_OK) w->tokens = v.tokens, w->entries = v.entries;
}

const moe_backward_args *device_backward_args(const moe_layer *layer, const moe_gate *gate,
                                              const moe_experts *experts, const moe_pass *pass,
                                              const moe_backward_args *args)
{
    COPY_WITH_STREAM(moe_backward_args, args);
    widths w = widths_of(layer, gate, experts);
    const moe_plan *plan = NULL;
    if (pass && moe_pass_plan(pass, &plan) == MOE_OK) add_plan(&w, plan);
    size_t x = matrix_bytes(w.tokens, w.in, copy.x_stride, w.element);
    size_t gate_x = matrix_bytes(w.tokens, w.gate, copy.gate_x_stride, w.element);
    size_t dx = matrix_bytes(w.tokens, w.in, copy.dx_stride, w.element);
    size_t dy = matrix_bytes(w.tokens, w.out, copy.dy_stride, w.element);
    size_t d_gate_x = matrix_bytes(w.tokens, w.gate, copy.d_gate_x_stride, w.element);
    size_t d_logits = matrix_bytes(w.tokens, w.experts, copy.d_logits_stride, w.real);
    copy.x = shadow_of(copy.x, x, FOR_CALL);
    copy.gate_x = shadow_of(copy.gate_x, gate_x, FOR_CALL);
    copy.dy = shadow_of(copy.dy, dy, FOR_CALL);
    copy.dx = shadow_of(copy.dx, dx, IN_AND_OUT);
    copy.d_gate_x = shadow_of(copy.d_gate_x, d_gate_x, IN_AND_OUT);
    copy.d_logits_out = shadow_of(copy.d_logits_out, d_logits, IN_AND_OUT);
    copy.entry_weight_grad = shadow_of(copy.entry_weight_grad, list_bytes(w.entries, w.real),
                                       IN_AND_OUT);
    copy.loss_grad = shadow_of(copy.loss_grad, MOE_LOSS_SLOTS * w.real, FOR_CALL);
    return &copy;
}

const moe_rows_args *device_rows_args(const moe_plan *plan, const moe_rows_args *args)
{
    COPY_WITH_STREAM(moe_rows_args, args);
    moe_plan_view v;
    if (!plan || moe_plan_view_init(&v, sizeof v) != MOE_OK) return &copy;
    if (moe_plan_get(plan, &v) != MOE_OK) return &copy;
    size_t size = element_bytes(copy.dtype);
    int64_t T = v.tokens, R = v.rows, width = copy.width;
    size_t tokens_in = matrix_bytes(T, width, copy.tokens_in_stride, size);
    size_t tokens_out = matrix_bytes(T, width, copy.tokens_out_stride, size);
    size_t rows_in = matrix_bytes(R, width, copy.rows_in_stride, size);
    size_t rows_out = matrix_bytes(R, width, copy.rows_out_stride, size);
    copy.tokens_in = shadow_of(copy.tokens_in, tokens_in, FOR_CALL);
    copy.rows_in = shadow_of(copy.rows_in, rows_in, FOR_CALL);
    copy.tokens_out = shadow_of(copy.tokens_out, tokens_out, IN_AND_OUT);
    copy.rows_out = shadow_of(copy.rows_out, rows_out, IN_AND_OUT);
    copy.entry_weight_grad = shadow_of(copy.entry_weight_grad, list_bytes(v.entries, 4),
                                       IN_AND_OUT);
    return &copy;
}

const moe_plan_args *device_plan_args(const moe_plan_args *args)
{
    static _Thread_local moe_plan_args copy;
    if (!args || args->struct_size != sizeof copy) return args;
    copy = *args;
    int64_t T = copy.tokens, entries = T > 0 && T < 1 << 22 ? T * copy.top_k : 0;
    if (copy.token_begin && entries + T > 0) entries = copy.token_begin[T];
    size_t id = copy.id_dtype == MOE_DTYPE_I64 ? 8 : 4;
    copy.expert_ids = shadow_of(copy.expert_ids, list_bytes(entries, id), FOR_CALL);
    copy.weights = shadow_of(copy.weights, list_bytes(entries, 4), FOR_CALL);
    copy.token_begin = shadow_of(copy.token_begin, list_bytes(T + 1, 8), FOR_CALL);
    copy.token_mask = shadow_of(copy.token_mask, list_bytes(T, 1), FOR_CALL);
    copy.token_priority = shadow_of(copy.token_priority, list_bytes(T, 4), FOR_CALL);
    return &copy;
}

const int64_t *device_counts(const moe_gate *gate, const int64_t *counts)
{
    widths w = widths_of(NULL, gate, NULL);
    return shadow_of(counts, list_bytes(w.experts, 8), FOR_CALL);
}
