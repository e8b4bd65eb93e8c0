/* check_cuda_context.c - contexts, memory and passes of the CUDA backend in the emulator: what is
 * current afterwards, who waits how long, what a failure leaves behind. */
#include "cuda_internal.h"
#include "recorder.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int cases;

#define MUST(condition)                                                                      \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            printf("%s:%d: %s (%s; %s)\n", __FILE__, __LINE__, #condition, moe_last_error(), \
                   emu_last_message());                                                      \
            exit(1);                                                                         \
        }                                                                                    \
    } while (0)
#define SAID(text) (strstr(moe_last_error(), text) != NULL)

static const moe__memory *const memory = &moe__cuda_memory;

static int current(void)
{
    int device = -1;
    MUST(cudaGetDevice(&device) == cudaSuccess);
    return device;
}

static moe_context *make(int32_t device, double seconds)
{
    moe_cuda_config c;
    moe_context *context = NULL;
    MUST(moe_cuda_config_init(&c, sizeof c) == MOE_OK);
    c.device = device;
    c.wait_seconds = seconds;
    c.cublas_workspace_bytes = 1 << 20;
    MUST(moe_cuda_context_create(&context, &c) == MOE_OK);
    return context;
}

static moe__workers workers_of(moe_context *context, void *stream, void *of_pass)
{
    return (moe__workers){context, NULL, 0, "check", stream, of_pass};
}

static void nothing_left(void)
{
    MUST(emu_live_allocations(0) == 0 && emu_live_allocations(1) == 0 && emu_live_objects() == 0);
    cases++;
}

/* ---- life ------------------------------------------------------------------------------------ */

static void test_context_device_is_the_one_asked_for(void)
{
    MUST(cudaSetDevice(1) == cudaSuccess);
    moe_context *here = make(MOE_CUDA_CURRENT, 5), *zero = make(0, 5);
    MUST(moe_cuda_device(here) == 1 && moe_cuda_device(zero) == 0 && current() == 1);
    MUST(moe_context_backend(zero) == MOE_BACKEND_CUDA && moe_cuda_poll(zero) == MOE_OK);
    void *p = memory->alloc(zero, 1000, true);
    struct cudaPointerAttributes a;
    MUST(p && cudaPointerGetAttributes(&a, p) == cudaSuccess && a.device == 0 && current() == 1);
    memory->free(zero, p, 1000);
    MUST(memory->alloc(zero, 0, false) == NULL);
    moe_context_destroy(here);
    moe_context_destroy(zero);
    MUST(current() == 1 && cudaSetDevice(0) == cudaSuccess);
    nothing_left();
}

static void test_context_arguments_are_refused(void)
{
    moe_cuda_config c;
    moe_context *context = NULL;
    MUST(moe_cuda_config_init(&c, sizeof c) == MOE_OK);
    c.device = 99;
    MUST(moe_cuda_context_create(&context, &c) == MOE_ERROR_INVALID_ARGUMENT &&
         SAID("device is 99"));
    nothing_left();
}

/* Every call of CUDA that making a context and a pass makes fails once. */
static void test_create_any_call_fails(void)
{
    static const char *const names[] = {
        "cudaGetDeviceCount", "cudaGetDevice",   "cudaDeviceGetAttribute",
        "cudaStreamCreate", /* as the emulator calls both */
        "cudaHostAlloc",      "cudaEventCreate", "cublasCreate",
        "cublasSetMathMode",  "cudaMalloc"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int failed = 0;
        for (int n = 1; n < 8; n++) {
            moe_cuda_config c;
            moe_context *context = NULL;
            void *of_pass = NULL;
            MUST(moe_cuda_config_init(&c, sizeof c) == MOE_OK);
            emu_fail(names[i], n, strncmp(names[i], "cublas", 6) == 0 ? 1 : (int)cudaErrorUnknown);
            moe_status status = moe_cuda_context_create(&context, &c);
            if (status == MOE_OK) status = memory->pass_create(context, &of_pass, "check");
            emu_fail(names[i], 0, 0);
            failed += status != MOE_OK;
            if (of_pass) memory->pass_destroy(context, of_pass);
            moe_context_destroy(context);
            MUST(current() == 0);
            nothing_left();
        }
        MUST(failed > 0);
    }
}

typedef struct counter {
    int64_t bytes, calls, limit;
} counter;
static void *count_alloc(void *user, uint64_t bytes, uint64_t alignment, void *stream)
{
    counter *n = user;
    void *p = NULL;
    MUST(alignment == 256 && !stream);
    if (n->limit > 0 && n->calls >= n->limit) return NULL;
    n->calls++, n->bytes += (int64_t)bytes;
    MUST(cudaMalloc(&p, bytes) == cudaSuccess);
    return p;
}
static void count_free(void *user, void *p, uint64_t bytes, void *stream)
{
    MUST(!stream);
    ((counter *)user)->bytes -= (int64_t)bytes;
    MUST(cudaFree(p) == cudaSuccess);
}
static void *host_alloc(void *user, uint64_t size, uint64_t alignment)
{
    void *p = NULL;
    *(int64_t *)user += 1;
    return posix_memalign(&p, alignment, size) == 0 ? p : NULL;
}
static void host_free(void *user, void *p, uint64_t size)
{
    (void)size;
    *(int64_t *)user -= 1;
    free(p);
}

static void test_allocators_of_the_host_get_everything_back(void)
{
    counter n = {0, 0, 0};
    int64_t blocks = 0;
    moe_cuda_config c;
    moe_context_config h;
    moe_context *context = NULL;
    void *of_pass = NULL;
    cudaStream_t stream;
    MUST(moe_cuda_config_init(&c, sizeof c) == MOE_OK &&
         moe_context_config_init(&h, sizeof h) == MOE_OK);
    h.alloc = host_alloc, h.free = host_free, h.alloc_user = &blocks;
    c.alloc = count_alloc, c.alloc_user = &n, c.host = &h;
    MUST(moe_cuda_context_create(&context, &c) == MOE_ERROR_INVALID_ARGUMENT &&
         SAID("without free"));
    c.free = count_free;
    MUST(moe_cuda_context_create(&context, &c) == MOE_OK && blocks > 0);
    MUST(memory->pass_create(context, &of_pass, "check") == MOE_OK && n.bytes > 0);
    MUST(cudaStreamCreate(&stream) == cudaSuccess);
    moe__workers w = workers_of(context, stream, of_pass);
    void *p = memory->alloc(context, 4096, true);
    MUST(memory->begin(&w) == MOE_OK && memory->zero(&w, p, 4096) == MOE_OK);
    memory->end(&w);
    memory->free(context, p, 4096); /* waits for what end noted */
    n.limit = n.calls;
    MUST(memory->alloc(context, 64, false) == NULL);
    memory->pass_destroy(context, of_pass);
    moe_context_destroy(context);
    MUST(n.bytes == 0 && blocks == 0 && cudaStreamDestroy(stream) == cudaSuccess);
    nothing_left();
}

/* ---- phases ---------------------------------------------------------------------------------- */

static void test_begin_sets_the_device_and_end_restores_it(void)
{
    moe_context *context = make(2, 5);
    cudaStream_t theirs, ours;
    MUST(cudaSetDevice(3) == cudaSuccess && cudaStreamCreate(&theirs) == cudaSuccess);
    MUST(cudaSetDevice(2) == cudaSuccess && cudaStreamCreate(&ours) == cudaSuccess);
    MUST(cudaSetDevice(3) == cudaSuccess);
    moe__workers w = workers_of(context, ours, NULL);
    MUST(memory->begin(&w) == MOE_OK && current() == 2);
    memory->end(&w);
    MUST(current() == 3);
    w.stream = theirs;
    MUST(memory->begin(&w) == MOE_ERROR_INVALID_ARGUMENT && SAID("stream is of device 3") &&
         current() == 3);
    MUST(cudaStreamDestroy(theirs) == cudaSuccess && cudaStreamDestroy(ours) == cudaSuccess);
    moe_context_destroy(context);
    MUST(cudaSetDevice(0) == cudaSuccess);
    nothing_left();
}

static void test_forked_child_is_told(void)
{
    moe_context *context = make(0, 5);
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        moe__workers w = workers_of(context, NULL, NULL);
        bool good = memory->begin(&w) == MOE_ERROR_DEVICE && SAID("forked") &&
                    moe_cuda_poll(context) == MOE_ERROR_DEVICE && !memory->alloc(context, 8, false);
        moe_context_destroy(context);
        _exit(good ? 0 : 1);
    }
    MUST(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    moe_context_destroy(context);
    nothing_left();
}

/* ---- copies ---------------------------------------------------------------------------------- */

static void test_fetch_and_store_any_size(void)
{
    enum { BYTES = 3 << 20 };
    moe_context *context = make(0, 20);
    unsigned char *to = malloc(BYTES), *from = malloc(BYTES);
    void *of_pass = NULL, *p = memory->alloc(context, BYTES, true),
         *q = memory->alloc(context, BYTES, false);
    MUST(memory->pass_create(context, &of_pass, "check") == MOE_OK);
    for (int i = 0; i < BYTES; i++) from[i] = (unsigned char)(i * 7 + i / 4096);
    for (int pass = 0; pass < 2; pass++) {
        moe__workers w = workers_of(context, NULL, pass ? of_pass : NULL);
        MUST(memory->fetch(&w, to, p, BYTES) == MOE_OK &&
             (pass || (to[0] == 0 && to[BYTES - 1] == 0)));
        MUST(memory->store(&w, p, from, BYTES) == MOE_OK &&
             memory->copy(&w, q, p, BYTES) == MOE_OK);
        MUST(memory->fetch(&w, to, q, BYTES) == MOE_OK && memcmp(to, from, BYTES) == 0);
        MUST(memory->zero(&w, q, 100) == MOE_OK && memory->fetch(&w, to, q, 101) == MOE_OK);
        MUST(to[99] == 0 && to[100] == from[100]);
    }
    memory->pass_destroy(context, of_pass);
    memory->free(context, p, BYTES);
    memory->free(context, q, BYTES);
    moe_context_destroy(context);
    free(to);
    free(from);
    nothing_left();
}

static void test_pointers_of_the_host_are_refused_by_name(void)
{
    moe_context *context = make(0, 5);
    moe__workers w = workers_of(context, NULL, NULL);
    void *far = NULL, *pinned = NULL, *managed = NULL, *p = memory->alloc(context, 64, false);
    int here = 0;
    MUST(cudaSetDevice(1) == cudaSuccess && cudaMalloc(&far, 64) == cudaSuccess);
    MUST(cudaSetDevice(0) == cudaSuccess && cudaMallocHost(&pinned, 64) == cudaSuccess);
    MUST(cudaMallocManaged(&managed, 64, cudaMemAttachGlobal) == cudaSuccess);
    MUST(memory->check_pointer(&w, "x", p) == MOE_OK &&
         memory->check_pointer(&w, "x", NULL) == MOE_OK);
    MUST(memory->check_pointer(&w, "x", (char *)p + 63) == MOE_OK);
    MUST(memory->check_pointer(&w, "x", managed) == MOE_OK);
    MUST(memory->check_pointer(&w, "dy", &here) == MOE_ERROR_INVALID_ARGUMENT &&
         SAID("check: dy is memory of the host"));
    MUST(memory->check_pointer(&w, "y", pinned) == MOE_ERROR_INVALID_ARGUMENT);
    MUST(memory->check_pointer(&w, "y", far) == MOE_ERROR_INVALID_ARGUMENT && SAID("device 1"));
    MUST(cudaFree(far) == cudaSuccess && cudaFree(managed) == cudaSuccess &&
         cudaFreeHost(pinned) == cudaSuccess);
    memory->free(context, p, 64);
    moe_context_destroy(context);
    nothing_left();
}

/* ---- rows of experts ------------------------------------------------------------------------- */

static int64_t *plan_on_device(moe_context *context, int64_t experts, int64_t each)
{
    moe__workers w = workers_of(context, NULL, NULL);
    int64_t *p = memory->alloc(context, (experts + 1) * 8, false), begin[64];
    for (int64_t e = 0; e <= experts; e++) begin[e] = e * each;
    MUST(memory->store(&w, p, begin, (experts + 1) * 8) == MOE_OK);
    return p;
}

static moe_status find_rows(const moe__workers *workers, moe__plan_arrays *plan)
{
    const int64_t *begin;
    MOE_TRY(moe__cuda_counts(workers, plan, &begin));
    plan->rows = begin[plan->num_experts];
    return MOE_OK;
}

static void test_counts_of_several_plans(void)
{
    moe_context *context = make(0, 20);
    void *of_pass = NULL;
    int64_t *begin[6];
    const int64_t *rows;
    cudaStream_t stream;
    MUST(memory->pass_create(context, &of_pass, "check") == MOE_OK &&
         cudaStreamCreate(&stream) == cudaSuccess);
    moe__workers w = workers_of(context, stream, of_pass);
    for (int i = 0; i < 6; i++) begin[i] = plan_on_device(context, 3 + i, i + 1);
    for (int turn = 0; turn < 3; turn++)
        for (int i = 0; i < 6; i++) {
            moe__plan_arrays plan = {.entries = 1,
                                     .num_experts = 3 + i,
                                     .expert_begin = begin[i],
                                     .rows = -1};
            if (i != 4) MUST(memory->plan_ready(&w, &plan, true) == MOE_OK); /* 4: asked without */
            MUST(find_rows(&w, &plan) == MOE_OK && plan.rows == (3 + i) * (i + 1));
            moe__plan_arrays part = {.entries = 1, .num_experts = 2, .expert_begin = begin[i] + 1};
            MUST(moe__cuda_counts(&w, &part, &rows) == MOE_OK && rows[0] == i + 1 &&
                 rows[2] == 3 * (i + 1));
        }
    w.of_pass = NULL;
    moe__plan_arrays plan = {.entries = 1, .num_experts = 3, .expert_begin = begin[0], .rows = -1};
    MUST(find_rows(&w, &plan) == MOE_ERROR_INTERNAL && SAID("outside of a pass"));
    for (int i = 0; i < 6; i++) memory->free(context, begin[i], (4 + i) * 8);
    memory->pass_destroy(context, of_pass);
    moe_context_destroy(context);
    MUST(cudaStreamDestroy(stream) == cudaSuccess);
    nothing_left();
}

/* A plan whose array begins within the array of an older one. */
static void test_counts_of_a_plan_where_another_lay(void)
{
    moe_context *context = make(0, 20);
    void *of_pass = NULL;
    const int64_t *rows;
    int64_t *begin = plan_on_device(context, 40, 1), later[4] = {0, 5, 7, 9};
    MUST(memory->pass_create(context, &of_pass, "check") == MOE_OK);
    moe__workers w = workers_of(context, NULL, of_pass);
    moe__plan_arrays old = {.entries = 1, .num_experts = 40, .expert_begin = begin};
    moe__plan_arrays plan = {.entries = 1, .num_experts = 3, .expert_begin = begin + 8};
    MUST(memory->plan_ready(&w, &old, true) == MOE_OK && find_rows(&w, &old) == MOE_OK);
    MUST(memory->store(&w, begin + 8, later, sizeof later) == MOE_OK);
    MUST(memory->plan_ready(&w, &plan, true) == MOE_OK &&
         moe__cuda_counts(&w, &plan, &rows) == MOE_OK && rows[0] == 0 && rows[3] == 9);
    memory->free(context, begin, 41 * 8);
    memory->pass_destroy(context, of_pass);
    moe_context_destroy(context);
    nothing_left();
}

static void sleep_a_little(void *user)
{
    (void)user;
    (void)usleep(10000);
}

static void test_wait_ends_at_its_time(void)
{
    moe_context *context = make(0, 0.1);
    cudaStream_t stream;
    int64_t rows = 7, *begin = plan_on_device(context, 3, 1);
    void *of_pass = NULL;
    MUST(memory->pass_create(context, &of_pass, "check") == MOE_OK &&
         cudaStreamCreate(&stream) == cudaSuccess);
    moe__workers w = workers_of(context, stream, of_pass);
    moe__plan_arrays plan = {.entries = 1, .num_experts = 3, .expert_begin = begin, .rows = -1};
    MUST(memory->plan_ready(&w, &plan, true) == MOE_OK && find_rows(&w, &plan) == MOE_OK);
    plan.rows = -1;
    for (int i = 0; i < 80; i++)
        MUST(cudaLaunchHostFunc(stream, sleep_a_little, NULL) == cudaSuccess);
    MUST(memory->plan_ready(&w, &plan, true) == MOE_OK &&
         find_rows(&w, &plan) == MOE_ERROR_TIMEOUT);
    MUST(SAID("not done in 0.1 s") && plan.rows == -1);
    for (int i = 0; i < 80; i++)
        MUST(cudaLaunchHostFunc(stream, sleep_a_little, NULL) == cudaSuccess);
    MUST(memory->fetch(&w, &rows, begin + 3, 8) == MOE_ERROR_TIMEOUT && rows == 7);
    MUST(cudaStreamSynchronize(stream) == cudaSuccess);
    MUST(memory->fetch(&w, &rows, begin + 3, 8) == MOE_OK && rows == 3);
    MUST(find_rows(&w, &plan) == MOE_OK && plan.rows == 3);
    memory->free(context, begin, 32);
    memory->pass_destroy(context, of_pass);
    moe_context_destroy(context);
    MUST(cudaStreamDestroy(stream) == cudaSuccess);
    nothing_left();
}

static void test_capture_refuses_what_waits(void)
{
    moe_context *context = make(0, 5);
    cudaStream_t stream;
    cudaGraph_t graph;
    int64_t rows = 0, *begin = plan_on_device(context, 3, 1);
    void *of_pass = NULL;
    MUST(memory->pass_create(context, &of_pass, "check") == MOE_OK &&
         cudaStreamCreate(&stream) == cudaSuccess);
    moe__workers w = workers_of(context, stream, of_pass);
    moe__plan_arrays plan = {.entries = 1, .num_experts = 3, .expert_begin = begin, .rows = -1};
    MUST(memory->may_wait(&w) == MOE_OK);
    MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    MUST(memory->begin(&w) == MOE_OK);
    MUST(memory->may_wait(&w) == MOE_ERROR_INVALID_STATE && SAID("padded rows"));
    MUST(memory->plan_ready(&w, &plan, true) == MOE_OK &&
         find_rows(&w, &plan) == MOE_ERROR_INVALID_STATE);
    MUST(memory->fetch(&w, &rows, begin, 8) == MOE_ERROR_INVALID_STATE);
    MUST(memory->zero(&w, begin, 8) == MOE_OK && moe_cuda_poll(context) == MOE_OK);
    memory->end(&w);
    MUST(cudaStreamEndCapture(stream, &graph) == cudaSuccess &&
         cudaGraphDestroy(graph) == cudaSuccess);
    MUST(find_rows(&w, &plan) == MOE_OK && plan.rows == 3);
    memory->free(context, begin, 32);
    memory->pass_destroy(context, of_pass);
    moe_context_destroy(context);
    MUST(cudaStreamDestroy(stream) == cudaSuccess);
    nothing_left();
}

/* ---- failures of the device ------------------------------------------------------------------ */

static void test_fault_of_a_kernel_stays(void)
{
    moe_context *context = make(0, 5), *other = make(1, 5);
    cudaStream_t stream;
    void *of_pass = NULL, *p = memory->alloc(context, 64, false);
    MUST(memory->pass_create(context, &of_pass, "check") == MOE_OK &&
         cudaStreamCreate(&stream) == cudaSuccess);
    moe__workers w = workers_of(context, stream, of_pass);
    const int64_t count[3] = {1, 1, 4}, stride[3] = {4, 4, 1};
    emu_fail_kernel(1);
    MUST(memory->zero_strided(&w, p, count, stride, 4) == MOE_OK);
    moe_status status = MOE_OK;
    for (int i = 0; i < 2000 && status == MOE_OK; i++) {
        (void)usleep(1000);
        status = moe_cuda_poll(context);
    }
    MUST(status == MOE_ERROR_DEVICE && SAID("cudaErrorIllegalAddress"));
    MUST(memory->begin(&w) == MOE_ERROR_DEVICE && SAID("has failed before"));
    MUST(moe_cuda_poll(other) == MOE_OK && current() == 0);
    memory->pass_destroy(context, of_pass);
    memory->free(context, p, 64);
    moe_context_destroy(context);
    moe_context_destroy(other);
    emu_heal();
    cases++;
}

static void test_refused_launch_does_not_stay(void)
{
    moe_context *context = make(0, 5);
    void *p = memory->alloc(context, 64, false);
    moe__workers w = workers_of(context, NULL, NULL);
    const int64_t count[3] = {1, 1, 4}, stride[3] = {4, 4, 1};
    emu_fail("kernel", 1, (int)cudaErrorInvalidConfiguration);
    MUST(memory->zero_strided(&w, p, count, stride, 4) == MOE_ERROR_DEVICE &&
         SAID("cudaErrorInvalidConfiguration"));
    MUST(cudaPeekAtLastError() == cudaSuccess && moe_cuda_poll(context) == MOE_OK &&
         memory->begin(&w) == MOE_OK);
    memory->end(&w);
    memory->free(context, p, 64);
    moe_context_destroy(context);
    cases++;
}

/* ---- cuBLAS ---------------------------------------------------------------------------------- */

static void test_cublas_follows_the_stream(void)
{
    moe_context *context = make(0, 5);
    cudaStream_t stream[2], now;
    cublasHandle_t handle;
    void *of_pass = NULL;
    MUST(memory->pass_create(context, &of_pass, "check") == MOE_OK);
    for (int i = 0; i < 2; i++) MUST(cudaStreamCreate(&stream[i]) == cudaSuccess);
    for (int i = 0; i < 5; i++) {
        moe__workers w = workers_of(context, stream[i % 2], of_pass);
        MUST(moe__cuda_cublas(&w, &handle) == MOE_OK);
        MUST(cublasGetStream(handle, &now) == CUBLAS_STATUS_SUCCESS && now == stream[i % 2]);
    }
    moe__workers outside = workers_of(context, NULL, NULL);
    MUST(moe__cuda_cublas(&outside, &handle) == MOE_ERROR_INTERNAL);
    memory->pass_destroy(context, of_pass);
    for (int i = 0; i < 2; i++) MUST(cudaStreamDestroy(stream[i]) == cudaSuccess);
    moe_context_destroy(context);
    nothing_left();
}

int main(void)
{
    (void)setenv("MOE_EMULATION_DEVICES", "4", 1);
    test_context_device_is_the_one_asked_for();
    test_context_arguments_are_refused();
    test_create_any_call_fails();
    test_allocators_of_the_host_get_everything_back();
    test_begin_sets_the_device_and_end_restores_it();
    test_forked_child_is_told();
    test_fetch_and_store_any_size();
    test_pointers_of_the_host_are_refused_by_name();
    test_counts_of_several_plans();
    test_counts_of_a_plan_where_another_lay();
    test_wait_ends_at_its_time();
    test_capture_refuses_what_waits();
    test_cublas_follows_the_stream();
    test_refused_launch_does_not_stay();
    test_fault_of_a_kernel_stays();
    printf("contexts on CUDA: %d passed, 0 failed\n", cases);
    return 0;
}
