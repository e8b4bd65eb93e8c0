/* check_cuda_host.c - a layer on a GPU as a host uses it: other devices current, several streams,
 * captures, allocators, threads, calls that fail. */
#include "cuda_host.h"

#include <sys/wait.h>
#include <unistd.h>

/* ---- another device is current --------------------------------------------------------------- */

/* Every call that works outside of a forward or a backward, on the default stream. */
static void test_another_device_is_current(void)
{
    model m;
    moe_plan *plan = NULL;
    const moe_plan *shown;
    moe_plan_view view;
    moe_tensor_view tensor;
    uint8_t touched[E];
    int32_t ids[T * K];
    static unsigned char saved[1 << 16];
    int64_t bytes, count;
    double norm;
    results r;
    for (int i = 0; i < T * K; i++) ids[i] = i % E;
    CUDA(cudaSetDevice(0));
    make(&m, context_of(1), BIAS | SHARED);
    arrays a = arrays_on(1, T, 5);
    GOOD(moe_layer_init_parameters(m.layer, 1));
    GOOD(moe_plan_create(&plan, m.context));
    build_plan(plan, ids, T);
    GOOD(moe_plan_check(plan));
    GOOD(moe_plan_save(plan, saved, sizeof saved, &bytes));
    GOOD(moe_plan_load(plan, saved, bytes));
    GOOD(forward(&m, &a, T, MOE_FORWARD_PLAN_ONLY, NULL));
    GOOD(losses_of(&m));
    GOOD(moe_pass_trim(m.pass));
    GOOD(forward(&m, &a, T, MOE_FORWARD_RECOMPUTE, NULL));
    GOOD(moe_pass_plan(m.pass, &shown));
    GOOD(moe_plan_view_init(&view, sizeof view));
    GOOD(moe_plan_get(shown, &view));
    MUST(view.rows == T * K);
    GOOD(moe_plan_check(shown));
    GOOD(moe_plan_copy(plan, shown));
    GOOD(backward(&m, &a, NULL));
    GOOD(moe_layer_gradient_norm(m.layer, &norm, NULL));
    GOOD(moe_experts_touched(m.experts, touched, &count));
    GOOD(moe_tensor_view_init(&tensor, sizeof tensor));
    GOOD(moe_pass_tensor(m.pass, MOE_TENSOR_COUNTS, &tensor));
    GOOD(moe_gate_update_selection_bias(m.gate, tensor.data, 0));
    MUST(current() == 0 && count == E);
    on_cpu(&r, T, 5, BIAS | SHARED);
    MUST(fabs(norm - r.norm) <= 1e-4 * r.norm);
    CUDA(cudaSetDevice(1));
    near(a.y, r.y, T * D);
    near(a.dx, r.dx, T * D);
    CUDA(cudaSetDevice(0));
    free_arrays(&a);
    moe_plan_destroy(plan);
    drop(&m);
    MUST(current() == 0);
    nothing_left();
}

static void test_plan_of_another_device(void)
{
    model m;
    moe_plan *plan = NULL;
    moe_context *far = context_of(1);
    int32_t ids[T * K];
    for (int i = 0; i < T * K; i++) ids[i] = i % E;
    make(&m, context_of(0), 0);
    arrays a = arrays_on(0, T, 5);
    GOOD(moe_plan_create(&plan, far));
    build_plan(plan, ids, T);
    moe_forward_args f = forward_args(&a, T, 0, NULL);
    f.plan = plan;
    MUST(moe_layer_forward(m.layer, m.pass, &f) == MOE_ERROR_INVALID_ARGUMENT && SAID("device 1"));
    free_arrays(&a);
    moe_plan_destroy(plan);
    drop(&m);
    moe_context_destroy(far);
    nothing_left();
}

/* ---- streams --------------------------------------------------------------------------------- */

static void test_passes_on_several_streams(void)
{
    enum { PASSES = 3 };
    for (uint64_t seed = 1; seed <= 6; seed++) {
        int options = seed % 2 ? SHARED : SHARED | PADDED;
        model m;
        moe_pass *first, *pass[PASSES];
        arrays a[PASSES];
        cudaStream_t forwards[PASSES], backwards[PASSES];
        cudaEvent_t done;
        emu_set_seed(seed);
        make(&m, context_of(0), options);
        first = m.pass;
        CUDA(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
        for (int i = 0; i < PASSES; i++) {
            a[i] = arrays_on(0, T + i, 3 * i);
            GOOD(moe_pass_create(&pass[i], m.layer, NULL));
            CUDA(cudaStreamCreateWithFlags(&forwards[i], cudaStreamNonBlocking));
            CUDA(cudaStreamCreateWithFlags(&backwards[i], cudaStreamNonBlocking));
        }
        for (int i = 0; i < PASSES; i++) {
            m.pass = pass[i];
            GOOD(forward(&m, &a[i], T + i, 0, forwards[i]));
        }
        for (int i = PASSES - 1; i >= 0; i--) { /* gradients are of one stream at a time */
            m.pass = pass[i];
            CUDA(cudaEventRecord(done, forwards[i]));
            CUDA(cudaStreamWaitEvent(backwards[i], done, 0));
            GOOD(backward(&m, &a[i], backwards[i]));
            CUDA(cudaEventRecord(done, backwards[i]));
            if (i > 0) CUDA(cudaStreamWaitEvent(backwards[i - 1], done, 0));
        }
        for (int i = 0; i < PASSES; i++) moe_pass_destroy(pass[i]); /* with work pending */
        m.pass = first;
        for (int i = 0; i < PASSES; i++) {
            same_as_cpu(&a[i], T + i, 3 * i, options);
            CUDA(cudaStreamDestroy(forwards[i]));
            CUDA(cudaStreamDestroy(backwards[i]));
            free_arrays(&a[i]);
        }
        CUDA(cudaEventDestroy(done));
        drop(&m);
        nothing_left();
    }
}

/* A recompute grows the pass, on another stream than the kept forward, which is gone. */
static void test_recompute_on_another_stream(void)
{
    for (uint64_t seed = 1; seed <= 6; seed++) {
        model m;
        cudaStream_t first, second;
        cudaEvent_t done;
        emu_set_seed(seed);
        make(&m, context_of(0), PADDED);
        arrays a = arrays_on(0, T, 7);
        CUDA(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking));
        CUDA(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
        CUDA(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
        GOOD(forward(&m, &a, T, MOE_FORWARD_PLAN_ONLY, first));
        CUDA(cudaEventRecord(done, first));
        CUDA(cudaStreamWaitEvent(second, done, 0));
        CUDA(cudaStreamSynchronize(first));
        CUDA(cudaStreamDestroy(first));
        GOOD(forward(&m, &a, T, MOE_FORWARD_RECOMPUTE, second));
        GOOD(backward(&m, &a, second));
        same_as_cpu(&a, T, 7, PADDED);
        CUDA(cudaEventDestroy(done));
        CUDA(cudaStreamDestroy(second));
        free_arrays(&a);
        drop(&m);
        nothing_left();
    }
}

/* ---- captures -------------------------------------------------------------------------------- */

static void end_capture(cudaStream_t stream)
{
    cudaGraph_t graph = NULL;
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphDestroy(graph));
}

/* This thread captures a stream of its own while a layer works on another one. */
static void test_work_beside_a_capture(void)
{
    model m;
    cudaStream_t mine, theirs;
    moe_plan *plan = NULL;
    const moe_plan *shown;
    make(&m, context_of(0), SHARED);
    arrays a = arrays_on(0, T, 7);
    CUDA(cudaStreamCreateWithFlags(&mine, cudaStreamNonBlocking));
    CUDA(cudaStreamCreateWithFlags(&theirs, cudaStreamNonBlocking));
    CUDA(cudaStreamBeginCapture(mine, cudaStreamCaptureModeGlobal));
    GOOD(forward(&m, &a, T, 0, theirs));
    GOOD(losses_of(&m));
    GOOD(backward(&m, &a, theirs));
    GOOD(moe_plan_create(&plan, m.context));
    GOOD(moe_pass_plan(m.pass, &shown));
    GOOD(moe_plan_copy(plan, shown));
    GOOD(moe_layer_zero_gradients(m.layer, theirs));
    moe_plan_destroy(plan);
    end_capture(mine);
    same_as_cpu(&a, T, 7, SHARED);
    CUDA(cudaStreamDestroy(mine));
    CUDA(cudaStreamDestroy(theirs));
    free_arrays(&a);
    drop(&m);
    nothing_left();
}

/* A padded step in a graph, after moe_pass_reserve, replayed with other x. */
static void test_reserved_step_in_a_graph(void)
{
    model m;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t made;
    make(&m, context_of(0), PADDED | SHARED);
    arrays a = arrays_on(0, T, 7), b = arrays_on(0, T, 9);
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    GOOD(moe_pass_reserve(m.pass, T, 1, K));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    GOOD(forward(&m, &a, T, 0, stream));
    GOOD(backward(&m, &a, stream));
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&made, graph, 0));
    for (int i = 0; i < 2; i++) {
        CUDA(cudaGraphLaunch(made, stream));
        same_as_cpu(&a, T, i ? 9 : 7, SHARED);
        GOOD(losses_of(&m));
        CUDA(cudaMemcpy(a.x, b.x, T * D * sizeof(float), cudaMemcpyDeviceToDevice));
        CUDA(cudaMemcpy(a.dy, b.dy, T * D * sizeof(float), cudaMemcpyDeviceToDevice));
        CUDA(cudaDeviceSynchronize());
    }
    CUDA(cudaGraphExecDestroy(made));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    free_arrays(&a);
    free_arrays(&b);
    drop(&m);
    nothing_left();
}

/* An exact forward, and its backward in a capture: the host knows the rows already. */
static void test_backward_of_an_exact_forward_in_a_capture(void)
{
    model m;
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t made;
    make(&m, context_of(0), SHARED);
    arrays a = arrays_on(0, T, 7);
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    GOOD(forward(&m, &a, T, 0, stream));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    GOOD(backward(&m, &a, stream));
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&made, graph, 0));
    CUDA(cudaGraphLaunch(made, stream));
    same_as_cpu(&a, T, 7, SHARED);
    CUDA(cudaGraphExecDestroy(made));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaStreamDestroy(stream));
    free_arrays(&a);
    drop(&m);
    nothing_left();
}

/* What waits is refused before anything is done, and the capture goes on. */
static void test_capture_refuses_what_waits(void)
{
    model m, padded;
    cudaStream_t stream;
    make(&m, context_of(0), 0);
    make(&padded, context_of(0), PADDED);
    arrays a = arrays_on(0, MOST, 7);
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    GOOD(forward(&m, &a, T, 0, stream));
    GOOD(forward(&padded, &a, T, MOE_FORWARD_PLAN_ONLY, stream));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    MUST(forward(&m, &a, T, 0, stream) == MOE_ERROR_INVALID_STATE && SAID("captured"));
    MUST(forward(&m, &a, 0, 0, stream) == MOE_ERROR_INVALID_STATE && SAID("captured"));
    MUST(losses_of(&m) == MOE_ERROR_INVALID_STATE && SAID("captured"));
    MUST(forward(&padded, &a, T, MOE_FORWARD_RECOMPUTE, stream) == MOE_ERROR_INVALID_STATE &&
         SAID("captured")); /* the pass would grow */
    MUST(forward(&padded, &a, MOST, MOE_FORWARD_NO_SAVE, stream) == MOE_ERROR_INVALID_STATE);
    MUST(moe_pass_trim(padded.pass) == MOE_ERROR_INVALID_STATE && SAID("captured"));
    double norm;
    MUST(moe_layer_gradient_norm(m.layer, &norm, stream) == MOE_ERROR_INVALID_STATE);
    end_capture(stream);
    GOOD(backward(&m, &a, stream));
    same_as_cpu(&a, T, 7, 0);
    GOOD(losses_of(&m));
    GOOD(moe_pass_trim(padded.pass));
    GOOD(forward(&padded, &a, T, MOE_FORWARD_RECOMPUTE, stream));
    GOOD(backward(&padded, &a, stream));
    same_as_cpu(&a, T, 7, 0);
    CUDA(cudaStreamDestroy(stream));
    free_arrays(&a);
    drop(&m);
    drop(&padded);
    nothing_left();
}

/* ---- allocators of the host ------------------------------------------------------------------ */

typedef struct counter {
    int64_t live, calls, limit; /* limit 0: none */
} counter;
static void *host_alloc(void *user, uint64_t bytes, uint64_t alignment)
{
    counter *n = user;
    void *p = NULL;
    if (n->limit > 0 && n->calls >= n->limit) return NULL;
    n->calls++;
    n->live += (int64_t)bytes;
    return posix_memalign(&p, alignment, bytes) == 0 ? p : NULL;
}
static void host_free(void *user, void *p, uint64_t bytes)
{
    ((counter *)user)->live -= (int64_t)bytes;
    free(p);
}
static void *device_alloc(void *user, uint64_t bytes, uint64_t alignment, void *stream)
{
    counter *n = user;
    void *p = NULL;
    MUST(alignment == 256 && !stream);
    if (n->limit > 0 && n->calls >= n->limit) return NULL;
    n->calls++;
    n->live += (int64_t)bytes;
    return cudaMalloc(&p, bytes) == cudaSuccess ? p : NULL;
}
static void device_free(void *user, void *p, uint64_t bytes, void *stream)
{
    MUST(!stream);
    ((counter *)user)->live -= (int64_t)bytes;
    (void)cudaFree(p);
}

static moe_context *counting_context(counter *host, counter *device)
{
    moe_cuda_config c = config_of(0);
    moe_context_config h;
    moe_context *context = NULL;
    GOOD(moe_context_config_init(&h, sizeof h));
    h.alloc = host_alloc, h.free = host_free, h.alloc_user = host;
    c.alloc = device_alloc, c.free = device_free, c.alloc_user = device;
    c.host = &h;
    MUST(moe_cuda_context_create(&context, &c) == MOE_OK || host->limit > 0 || device->limit > 0);
    return context;
}

/* Memory goes back to the allocator that it is of. */
static void test_plan_copy_between_contexts(void)
{
    counter host[3] = {{0, 0, 0}}, device[2] = {{0, 0, 0}};
    moe_context *context[3] = {counting_context(&host[0], &device[0]),
                               counting_context(&host[1], &device[1]), NULL};
    moe_context_config h;
    moe_plan *plan[3];
    int32_t ids[T * K];
    GOOD(moe_context_config_init(&h, sizeof h));
    h.alloc = host_alloc, h.free = host_free, h.alloc_user = &host[2];
    GOOD(moe_context_create(&context[2], &h));
    for (int i = 0; i < T * K; i++) ids[i] = i % E;
    for (int i = 0; i < 3; i++) GOOD(moe_plan_create(&plan[i], context[i]));
    build_plan(plan[0], ids, T);
    for (int from = 0; from < 3; from++)
        for (int to = 0; to < 3; to++) {
            int64_t before[3] = {host[0].live, host[1].live, host[2].live};
            GOOD(moe_plan_copy(plan[(from + to) % 3], plan[from]));
            GOOD(moe_plan_check(plan[(from + to) % 3]));
            MUST(host[0].live == before[0] && host[1].live == before[1]);
        }
    for (int i = 0; i < 3; i++) {
        moe_plan_destroy(plan[i]);
        moe_context_destroy(context[i]);
    }
    MUST(host[0].live == 0 && host[1].live == 0 && host[2].live == 0);
    MUST(device[0].live == 0 && device[1].live == 0);
    nothing_left();
}

/* A step with the n-th allocation failing; nothing is lost, and a second try is good. */
static void test_any_allocation_fails(void)
{
    int refused = 0;
    for (int side = 0; side < 2; side++)
        for (int n = 1, more = 1; more; n++) {
            counter host = {0, 0, side ? n : 0}, device = {0, 0, side ? 0 : n};
            model m = {0};
            arrays a = arrays_on(0, T, 2);
            moe_context *context = counting_context(&host, &device);
            moe_status status = context ? try_make(&m, context, SHARED) : MOE_ERROR_OUT_OF_MEMORY;
            if (status == MOE_OK) status = forward(&m, &a, T, 0, NULL);
            if (status == MOE_OK) status = backward(&m, &a, NULL);
            MUST(status == MOE_OK || (status == MOE_ERROR_OUT_OF_MEMORY && SAID(": no ")));
            more = status != MOE_OK;
            refused += more;
            host.limit = device.limit = 0;
            if (m.pass) {
                GOOD(forward(&m, &a, T, 0, NULL));
                GOOD(backward(&m, &a, NULL));
                same_as_cpu(&a, T, 2, SHARED);
            }
            drop(&m);
            free_arrays(&a);
            MUST(host.live == 0 && device.live == 0);
            nothing_left();
        }
    MUST(refused > 20);
}

/* An allocator that writes over what it gets back, on a stream of its own: work of the library that
 * were still to come would read that. */
typedef struct spoiler {
    cudaStream_t stream;
    void *memory[256];
    int count;
} spoiler;
static void *spoiler_alloc(void *user, uint64_t bytes, uint64_t alignment, void *stream)
{
    void *p = NULL;
    (void)user, (void)alignment, (void)stream;
    return cudaMalloc(&p, bytes) == cudaSuccess ? p : NULL;
}
static void spoiler_free(void *user, void *p, uint64_t bytes, void *stream)
{
    spoiler *s = user;
    (void)stream;
    CUDA(cudaMemsetAsync(p, 0xff, bytes, s->stream));
    CUDA(cudaStreamSynchronize(s->stream));
    MUST(s->count < 256);
    s->memory[s->count++] = p;
}

static void test_memory_goes_back_when_its_work_is_done(void)
{
    for (uint64_t seed = 1; seed <= 8; seed++) {
        int options = seed % 2 ? PADDED | SHARED : SHARED;
        spoiler s = {NULL, {NULL}, 0};
        moe_cuda_config c = config_of(0);
        moe_context *context = NULL;
        model m;
        cudaStream_t first, second;
        cudaEvent_t done;
        emu_set_seed(seed);
        CUDA(cudaStreamCreateWithFlags(&s.stream, cudaStreamNonBlocking));
        CUDA(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking));
        CUDA(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
        CUDA(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
        c.alloc = spoiler_alloc, c.free = spoiler_free, c.alloc_user = &s;
        GOOD(moe_cuda_context_create(&context, &c));
        make(&m, context, options);
        arrays a = arrays_on(0, T, 3), b = arrays_on(0, MOST, 4);
        GOOD(forward(&m, &a, T, MOE_FORWARD_PLAN_ONLY, first));
        GOOD(moe_pass_trim(m.pass));
        CUDA(cudaEventRecord(done, first));
        CUDA(cudaStreamWaitEvent(second, done, 0));
        GOOD(forward(&m, &a, T, MOE_FORWARD_RECOMPUTE, second));
        GOOD(backward(&m, &a, second));
        CUDA(cudaEventRecord(done, second));
        CUDA(cudaStreamWaitEvent(first, done, 0));
        if (seed % 3) GOOD(forward(&m, &b, MOST, MOE_FORWARD_NO_SAVE, first)); /* grows */
        if (seed % 3 == 1) GOOD(moe_pass_trim(m.pass));
        moe_pass_destroy(m.pass);
        m.pass = NULL;
        same_as_cpu(&a, T, 3, options);
        drop(&m);
        for (int i = 0; i < s.count; i++) CUDA(cudaFree(s.memory[i]));
        CUDA(cudaEventDestroy(done));
        CUDA(cudaStreamDestroy(first));
        CUDA(cudaStreamDestroy(second));
        CUDA(cudaStreamDestroy(s.stream));
        free_arrays(&a);
        free_arrays(&b);
        nothing_left();
    }
}

static void test_other_fields_of_the_hosts_config_are_not_read(void)
{
    moe_cuda_config c = config_of(0);
    moe_context_config h;
    moe_context *context = NULL;
    GOOD(moe_context_config_init(&h, sizeof h));
    h.threads = -3, h.backend = MOE_BACKEND_CUDA, h.isa = 77;
    c.host = &h;
    GOOD(moe_cuda_context_create(&context, &c));
    MUST(moe_context_threads(context) == 1);
    moe_context_destroy(context);
    h.log_level = 99;
    context = NULL;
    MUST(moe_cuda_context_create(&context, &c) == MOE_ERROR_INVALID_ARGUMENT &&
         SAID("log_level is 99") && !context);
    nothing_left();
}

/* ---- threads --------------------------------------------------------------------------------- */

typedef struct job {
    const model *m;
    int salt;
    arrays a;
} job;

/* One pass of each thread, on a stream of its own; forwards alone, for gradients are the layer's. */
static void *work_of_thread(void *argument)
{
    const job *j = argument;
    model m = *j->m;
    moe_plan *plan = NULL;
    const moe_plan *shown;
    cudaStream_t stream;
    CUDA(cudaSetDevice(0));
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA(cudaSetDevice(j->salt % 2)); /* another one than the context's for some */
    GOOD(moe_pass_create(&m.pass, m.layer, NULL));
    GOOD(moe_plan_create(&plan, m.context));
    for (int i = 0; i < 3; i++) {
        GOOD(forward(&m, &j->a, T, i == 1 ? MOE_FORWARD_PLAN_ONLY : 0, stream));
        GOOD(losses_of(&m));
        GOOD(moe_pass_plan(m.pass, &shown));
        GOOD(moe_plan_copy(plan, shown));
        GOOD(moe_plan_check(plan));
        MUST(current() == j->salt % 2);
        GOOD(moe_pass_trim(m.pass));
    }
    moe_plan_destroy(plan);
    moe_pass_destroy(m.pass);
    CUDA(cudaStreamDestroy(stream));
    return NULL;
}

static void test_threads_share_a_context(void)
{
    enum { THREADS = 3 };
    pthread_t thread[THREADS];
    job j[THREADS];
    model m;
    static results r;
    make(&m, context_of(0), SHARED);
    for (int i = 0; i < THREADS; i++) {
        j[i] = (job){&m, i, arrays_on(0, T, i)};
        MUST(pthread_create(&thread[i], NULL, work_of_thread, &j[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) MUST(pthread_join(thread[i], NULL) == 0);
    for (int i = 0; i < THREADS; i++) {
        on_cpu(&r, T, i, SHARED);
        near(j[i].a.y, r.y, T * D);
        free_arrays(&j[i].a);
    }
    drop(&m);
    nothing_left();
}

/* ---- failures -------------------------------------------------------------------------------- */

/* An error that the host has not asked for yet is still there after our calls, or where they waited
 * another one. */
static void test_errors_of_the_host_stay(void)
{
    model m;
    cudaStream_t stream;
    void *p;
    make(&m, context_of(0), SHARED | PADDED);
    arrays a = arrays_on(0, T, 2);
    CUDA(cudaStreamCreate(&stream));
    MUST(cudaMalloc(&p, (size_t)1 << 50) == cudaErrorMemoryAllocation);
    GOOD(forward(&m, &a, T, 0, stream));
    MUST(cudaPeekAtLastError() == cudaErrorMemoryAllocation);
    GOOD(backward(&m, &a, stream));
    GOOD(moe_pass_reserve(m.pass, MOST, 1, K));
    GOOD(moe_layer_zero_gradients(m.layer, stream));
    GOOD(moe_cuda_poll(m.context));
    MUST(cudaPeekAtLastError() == cudaErrorMemoryAllocation);
    GOOD(forward(&m, &a, T, 0, stream));
    GOOD(losses_of(&m));
    MUST(cudaGetLastError() != cudaSuccess);
    GOOD(losses_of(&m));
    drop(&m);
    MUST(cudaPeekAtLastError() == cudaSuccess);
    free_arrays(&a);
    CUDA(cudaStreamDestroy(stream));
    nothing_left();
}

static moe_status step_of(const model *m, const arrays *a)
{
    moe_status status = forward(m, a, T, 0, NULL);
    if (status == MOE_OK) status = backward(m, a, NULL);
    if (status == MOE_OK) status = losses_of(m);
    if (status == MOE_OK) status = moe_pass_trim(m->pass);
    return status;
}

/* The n-th call of each function fails in a step. */
static void test_any_call_fails(void)
{
    static const char *const names[] = {"kernel",
                                        "cudaMalloc",
                                        "cudaMemcpyAsync",
                                        "cudaMemsetAsync",
                                        "cudaEventRecord",
                                        "cudaEventQuery",
                                        "cudaHostAlloc",
                                        "cudaGetDevice",
                                        "cudaSetDevice",
                                        "cublasSetStream",
                                        "cublasSetWorkspace",
                                        "cublasGemmEx",
                                        "cudaFree",
                                        "cudaStreamIsCapturing",
                                        "cudaPointerGetAttributes",
                                        "cudaThreadExchangeStreamCaptureMode",
                                        "cublasGemmGroupedBatchedEx"};
    int failed = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        for (int n = 1; n < 40; n += n < 8 ? 1 : 5) {
            bool blas = strncmp(names[i], "cublas", 6) == 0;
            model m;
            make(&m, context_of(1), SHARED);
            arrays a = arrays_on(1, T, 2);
            emu_fail(names[i], n, blas ? CUBLAS_STATUS_EXECUTION_FAILED : (int)cudaErrorUnknown);
            moe_status status = step_of(&m, &a);
            emu_fail(names[i], 0, 0);
            MUST(status == MOE_OK || status == MOE_ERROR_DEVICE ||
                 status == MOE_ERROR_OUT_OF_MEMORY);
            MUST(status == MOE_OK || strlen(moe_last_error()) > 20);
            failed += status != MOE_OK;
            if (strcmp(names[i], "cudaSetDevice") == 0)
                CUDA(cudaSetDevice(0)); /* on the way back */
            MUST(current() == 0 && cudaPeekAtLastError() == cudaSuccess);
            GOOD(step_of(&m, &a));
            CUDA(cudaSetDevice(1));
            same_as_cpu(&a, T, 2, SHARED);
            CUDA(cudaSetDevice(0));
            free_arrays(&a);
            drop(&m);
            nothing_left();
        }
    MUST(failed > 60);
}

/* A device that failed, and a child process, get errors of every call that looks at the device. */
static void all_refuse(model *m, const arrays *a, moe_plan *own, const char *words)
{
    const moe_plan *plan;
    moe_plan_view view;
    uint8_t touched[E];
    int64_t bytes, counts[E] = {0};
    static unsigned char saved[1 << 16];
    double norm;
    GOOD(moe_plan_view_init(&view, sizeof view));
    MUST(losses_of(m) == MOE_ERROR_DEVICE && SAID(words));
    GOOD(moe_pass_plan(m->pass, &plan));
    MUST(moe_plan_get(plan, &view) == MOE_ERROR_DEVICE && SAID(words));
    MUST(moe_plan_check(plan) == MOE_ERROR_DEVICE && SAID(words));
    MUST(moe_plan_save(plan, saved, sizeof saved, &bytes) == MOE_ERROR_DEVICE && SAID(words));
    MUST(moe_plan_copy(own, plan) == MOE_ERROR_DEVICE && SAID(words));
    MUST(moe_experts_touched(m->experts, touched, NULL) == MOE_ERROR_DEVICE && SAID(words));
    MUST(moe_gate_update_selection_bias(m->gate, counts, 1) == MOE_ERROR_DEVICE && SAID(words));
    MUST(moe_layer_gradient_norm(m->layer, &norm, NULL) == MOE_ERROR_DEVICE && SAID(words));
    MUST(moe_layer_init_parameters(m->layer, 1) == MOE_ERROR_DEVICE && SAID(words));
    MUST(moe_layer_zero_gradients(m->layer, NULL) == MOE_ERROR_DEVICE && SAID(words));
    MUST(forward(m, a, T, 0, NULL) == MOE_ERROR_DEVICE && SAID(words));
    MUST(forward(m, a, MOST, 0, NULL) == MOE_ERROR_DEVICE && SAID(words));
}

static void test_forked_child_is_refused(void)
{
    model m;
    moe_plan *own = NULL;
    int status = 0;
    make(&m, context_of(0), BIAS | PADDED);
    arrays a = arrays_on(0, MOST, 2);
    GOOD(forward(&m, &a, T, 0, NULL));
    GOOD(moe_plan_create(&own, m.context));
    CUDA(cudaDeviceSynchronize());
    (void)fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        all_refuse(&m, &a, own, "forked");
        moe_plan_destroy(own);
        drop(&m);
        (void)fflush(stdout);
        _exit(0);
    }
    MUST(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    free_arrays(&a);
    moe_plan_destroy(own);
    drop(&m);
    nothing_left();
}

/* The memory of a device that failed is lost, but the host's allocator is told. */
static void test_device_that_failed_is_refused(void)
{
    counter host = {0, 0, 0}, device = {0, 0, 0};
    model m;
    moe_plan *own = NULL;
    make(&m, counting_context(&host, &device), BIAS | PADDED);
    arrays a = arrays_on(0, MOST, 2);
    GOOD(moe_plan_create(&own, m.context));
    GOOD(forward(&m, &a, T, 0, NULL));
    CUDA(cudaDeviceSynchronize());
    emu_fail_kernel(1);
    (void)moe_layer_zero_gradients(m.layer, NULL);
    (void)cudaDeviceSynchronize();
    (void)cudaGetLastError();
    MUST(losses_of(&m) == MOE_ERROR_DEVICE && SAID("cudaErrorIllegalAddress"));
    MUST(moe_cuda_poll(m.context) == MOE_ERROR_DEVICE);
    all_refuse(&m, &a, own, "cudaErrorIllegalAddress");
    moe_plan_destroy(own);
    drop(&m);
    MUST(host.live == 0 && device.live == 0);
    emu_heal();
    free_arrays(&a);
    host_cases++;
}

/* ---- sizes ----------------------------------------------------------------------------------- */

static void test_no_tokens_and_costs(void)
{
    model m;
    cudaStream_t stream;
    arrays none = {NULL, NULL, NULL, NULL};
    moe_cost_query q;
    moe_cost cost;
    moe_gate_config g;
    moe_experts_config e;
    CUDA(cudaStreamCreate(&stream));
    for (int options = 0; options < 4; options++) {
        make(&m, context_of(0), options);
        GOOD(forward(&m, &none, 0, 0, stream));
        GOOD(backward(&m, &none, stream));
        GOOD(losses_of(&m));
        drop(&m);
    }
    make(&m, context_of(0), 0);
    arrays a = arrays_on(0, T, 2);
    GOOD(forward(&m, &a, T, 0, stream));
    GOOD(moe_cost_query_init(&q, sizeof q));
    GOOD(moe_cost_init(&cost, sizeof cost));
    GOOD(moe_gate_config_init(&g, sizeof g));
    GOOD(moe_experts_config_init(&e, sizeof e));
    GOOD(moe_gate_get_config(m.gate, &g));
    GOOD(moe_experts_get_config(m.experts, &e));
    q.gate = &g, q.experts = &e, q.tokens = T, q.context = m.context;
    GOOD(moe_layer_memory(&q, &cost));
    MUST(cost.pass_bytes == moe_pass_bytes(m.pass));
    for (int32_t storage = MOE_STORAGE_PREPACKED; storage <= MOE_STORAGE_PANELS; storage++) {
        moe_experts *pool = NULL;
        e.storage = storage;
        MUST(moe_experts_create(&pool, m.context, &e) == MOE_ERROR_NOT_SUPPORTED && SAID("cuda"));
        MUST(moe_layer_memory(&q, &cost) == MOE_ERROR_NOT_SUPPORTED && SAID("storage"));
    }
    e.storage = MOE_STORAGE_ROW_MAJOR;
    MUST(moe_experts_export(m.experts, 0, MOE_PARAMETER_DATA, 0, 1, &cost) ==
             MOE_ERROR_NOT_SUPPORTED &&
         SAID("cuda"));
    g.dtype = e.dtype = MOE_DTYPE_F64;
    MUST(moe_layer_memory(&q, &cost) == MOE_ERROR_NOT_SUPPORTED && SAID("dtype"));
    MUST(moe_gate_create(&m.gate, m.context, &g) == MOE_ERROR_NOT_SUPPORTED && SAID("dtype"));
    free_arrays(&a);
    drop(&m);
    CUDA(cudaStreamDestroy(stream));
    nothing_left();
}

/* A group of one rank: as it is, and where rows travel to itself. */
static void test_comm_of_one_rank(void)
{
    static const int64_t PLACEMENT[E] = {3, 1, 0, 2};
    for (int i = 0; i < 4; i++) {
        model m;
        moe_comm *comm = NULL;
        moe_layer_config l;
        double norm;
        make(&m, context_of(0), 0);
        moe_pass_destroy(m.pass);
        moe_layer_destroy(m.layer);
        GOOD(moe_comm_create_self(&comm, m.context));
        GOOD(moe_layer_config_init(&l, sizeof l));
        l.gate = m.gate, l.experts = m.experts, l.comm = comm;
        if (i == 1) l.max_received = 64;
        if (i == 2) l.received = MOE_RECEIVED_CHUNK, l.max_received = 7;
        if (i == 3) l.placement = PLACEMENT;
        GOOD(moe_layer_create(&m.layer, &l));
        GOOD(moe_layer_init_parameters(m.layer, 1));
        GOOD(moe_pass_create(&m.pass, m.layer, NULL));
        arrays a = arrays_on(0, T, 2);
        GOOD(forward(&m, &a, T, 0, NULL));
        GOOD(backward(&m, &a, NULL));
        GOOD(moe_layer_gradient_norm(m.layer, &norm, NULL));
        same_as_cpu(&a, T, 2, 0);
        free_arrays(&a);
        moe_comm_destroy(comm);
        drop(&m);
        nothing_left();
    }
}

int main(int count, char **arguments)
{
    static const host_test test[] = {
        {"another_device_is_current", test_another_device_is_current},
        {"plan_of_another_device", test_plan_of_another_device},
        {"passes_on_several_streams", test_passes_on_several_streams},
        {"recompute_on_another_stream", test_recompute_on_another_stream},
        {"work_beside_a_capture", test_work_beside_a_capture},
        {"reserved_step_in_a_graph", test_reserved_step_in_a_graph},
        {"backward_of_an_exact_forward_in_a_capture",
         test_backward_of_an_exact_forward_in_a_capture},
        {"capture_refuses_what_waits", test_capture_refuses_what_waits},
        {"plan_copy_between_contexts", test_plan_copy_between_contexts},
        {"any_allocation_fails", test_any_allocation_fails},
        {"memory_goes_back_when_its_work_is_done", test_memory_goes_back_when_its_work_is_done},
        {"other_fields_of_the_hosts_config_are_not_read",
         test_other_fields_of_the_hosts_config_are_not_read},
        {"errors_of_the_host_stay", test_errors_of_the_host_stay},
        {"threads_share_a_context", test_threads_share_a_context},
        {"any_call_fails", test_any_call_fails},
        {"forked_child_is_refused", test_forked_child_is_refused},
        {"no_tokens_and_costs", test_no_tokens_and_costs},
        {"comm_of_one_rank", test_comm_of_one_rank},
        {"device_that_failed_is_refused", test_device_that_failed_is_refused},
    };
    (void)setenv("MOE_EMULATION_PROTECT", "1", 1);
    return run_host_tests(test, sizeof test / sizeof *test, count, arguments);
}
