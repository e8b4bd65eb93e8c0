/* check_calls.c - what a layer on a GPU calls of CUDA, and when: no wait and no copy in padded
 * mode, one wait in exact mode, nothing allocated once it runs, the caller's stream and device,
 * capture, failures of any call, memory that the host may not touch, two devices, destruction in
 * mid-work.
 *
 * Memory is cudaMalloc's and shut for the host throughout: no alloc callbacks, nothing managed. It
 * ends with a table of launches. */
#include "recorder.h"

#include <moe/cuda.h>
#include <moe/moe.h>

#include <check.h>
#include <cuda_runtime_api.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(table) (sizeof(table) / sizeof *(table))
#define MUST(call)                                                                  \
    do {                                                                            \
        moe_status must_status = (call);                                            \
        if (must_status != MOE_OK) ck_abort_msg("%s: %s", #call, moe_last_error()); \
    } while (0)
#define CUDA(call) ck_assert_int_eq((call), cudaSuccess)

/* ---- shapes ---------------------------------------------------------------------------------- */

typedef struct shape {
    const char *name;
    int64_t T, D, E, F, K;
    int32_t kind, dtype, activation, shared;
    int32_t sigmoid, biased, groups; /* as DeepSeek-V3 chooses */
    double importance, load, z, sequence;
} shape;

static const shape SHAPES[] = {{"top-k", 24, 16, 8, 24, 2, MOE_GATE_TOP_K, MOE_DTYPE_F32,
                                MOE_ACTIVATION_SWIGLU, 0, 0, 0, 0, 0, 0, 0, 0},
                               {"noisy top-k with losses", 24, 16, 8, 24, 2, MOE_GATE_NOISY_TOP_K,
                                MOE_DTYPE_F32, MOE_ACTIVATION_RELU, 0, 0, 0, 0, 0.1, 0.1, 0.01, 0},
                               {"DeepSeek-V3", 24, 16, 16, 24, 4, MOE_GATE_TOP_K, MOE_DTYPE_BF16,
                                MOE_ACTIVATION_SWIGLU, 1, 1, 1, 4, 0, 0, 0, 1e-4}};
enum { SHAPES_OF = sizeof SHAPES / sizeof *SHAPES, EXACT = 0, PADDED = 1 };

/* ---- a layer on a device --------------------------------------------------------------------- */

enum { ARRAYS = 4 };
typedef struct rig {
    const shape *s;
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts, *shared;
    moe_layer *layer;
    moe_pass *pass;
    cudaStream_t stream;
    void *array[ARRAYS]; /* x, y, dy, dx: memory of the device */
    size_t bytes;        /* of each */
    moe_forward_args f;
    moe_backward_args b;
} rig;

static int current(void)
{
    int device = -1;
    CUDA(cudaGetDevice(&device));
    return device;
}

#define TRY(call)                                    \
    do {                                             \
        moe_status try_status = (call);              \
        if (try_status != MOE_OK) return try_status; \
    } while (0)

static moe_status make_gate(rig *r)
{
    const shape *s = r->s;
    moe_gate_config g;
    TRY(moe_gate_config_init(&g, sizeof g));
    g.d_model = s->D, g.num_experts = s->E, g.top_k = s->K, g.kind = s->kind, g.dtype = s->dtype;
    g.importance_weight = s->importance, g.load_weight = s->load, g.z_weight = s->z;
    g.sequence_weight = s->sequence, g.init_std = 0.5;
    if (s->sigmoid) g.score = MOE_SCORE_SIGMOID, g.order = 1, g.renormalize = 1;
    g.selection_bias = s->biased;
    if (s->groups) g.expert_groups = s->groups, g.top_groups = 2, g.group_score = 2;
    return moe_gate_create(&r->gate, r->context, &g);
}

static moe_status make_pool(rig *r, moe_experts **pool, int64_t experts)
{
    moe_experts_config e;
    TRY(moe_experts_config_init(&e, sizeof e));
    e.d_model = r->s->D, e.d_hidden = r->s->F, e.num_experts = experts, e.dtype = r->s->dtype;
    e.activation = r->s->activation;
    return moe_experts_create(pool, r->context, &e);
}

/* Everything but the memory of the test itself. */
static moe_status rig_objects(rig *r, int device, int padded)
{
    moe_cuda_config c;
    moe_layer_config l;
    TRY(moe_cuda_config_init(&c, sizeof c));
    c.device = device, c.wait_seconds = 20, c.cublas_workspace_bytes = 1 << 16;
    TRY(moe_cuda_context_create(&r->context, &c));
    TRY(make_gate(r));
    TRY(make_pool(r, &r->experts, r->s->E));
    if (r->s->shared) TRY(make_pool(r, &r->shared, r->s->shared));
    TRY(moe_layer_config_init(&l, sizeof l));
    l.gate = r->gate, l.experts = r->experts, l.shared = r->shared;
    if (padded) l.exchange = MOE_EXCHANGE_PADDED, l.padded_rows = r->s->T;
    TRY(moe_layer_create(&r->layer, &l));
    TRY(moe_layer_init_parameters(r->layer, 3));
    return moe_pass_create(&r->pass, r->layer, NULL);
}

/* Arrays and a stream on a device, which is current meanwhile. */
static void rig_memory(rig *r, const shape *s, int device)
{
    int before = current();
    uint64_t state = 5;
    memset(r, 0, sizeof *r);
    r->s = s;
    r->bytes = (size_t)(s->T * s->D) * (s->dtype == MOE_DTYPE_F32 ? 4 : 2);
    CUDA(cudaSetDevice(device));
    CUDA(cudaStreamCreateWithFlags(&r->stream, cudaStreamNonBlocking));
    uint16_t *numbers = calloc(1, r->bytes);
    ck_assert_ptr_nonnull(numbers);
    for (size_t i = 0; i < r->bytes / 2; i++) { /* some hundredths to some, of any sign */
        state = state * 6364136223846793005u + 1442695040888963407u;
        numbers[i] = (uint16_t)(0x3d00 + (state >> 40) % 0x300 + ((state >> 33) % 2 << 15));
    }
    for (int i = 0; i < ARRAYS; i++) {
        CUDA(cudaMalloc(&r->array[i], r->bytes));
        CUDA(cudaMemcpyAsync(r->array[i], numbers, r->bytes, cudaMemcpyHostToDevice, r->stream));
    }
    free(numbers);
    CUDA(cudaSetDevice(before));
    MUST(moe_forward_args_init(&r->f, sizeof r->f));
    MUST(moe_backward_args_init(&r->b, sizeof r->b));
    r->f.flags = MOE_FORWARD_TRAIN, r->b.flags = MOE_BACKWARD_OVERWRITE;
    r->f.tokens = s->T, r->f.x = r->array[0], r->f.y = r->array[1];
    r->b.dy = r->array[2], r->b.dx = r->array[3];
    r->f.stream = r->b.stream = r->stream;
}

static void rig_free_objects(rig *r)
{
    moe_pass_destroy(r->pass), moe_layer_destroy(r->layer), moe_gate_destroy(r->gate);
    moe_experts_destroy(r->experts), moe_experts_destroy(r->shared);
    moe_context_destroy(r->context);
    r->pass = NULL, r->layer = NULL, r->gate = NULL, r->experts = r->shared = NULL;
    r->context = NULL;
}

static void rig_free(rig *r)
{
    rig_free_objects(r);
    for (int i = 0; i < ARRAYS; i++) CUDA(cudaFree(r->array[i]));
    CUDA(cudaStreamDestroy(r->stream));
}

static void rig_make(rig *r, const shape *s, int device, int padded)
{
    rig_memory(r, s, device);
    MUST(rig_objects(r, device, padded));
}

static moe_status forward(rig *r) { return moe_layer_forward(r->layer, r->pass, &r->f); }
static moe_status backward(rig *r) { return moe_layer_backward(r->layer, r->pass, &r->b); }
static moe_status step(rig *r)
{
    TRY(forward(r));
    return backward(r);
}

/* y, dx and all gradients, fetched; to be freed. */
static char *results(const rig *r, size_t *bytes)
{
    moe_parameter_record p;
    int64_t count = moe_layer_parameter_count(r->layer);
    *bytes = 2 * r->bytes;
    MUST(moe_parameter_record_init(&p, sizeof p));
    for (int64_t i = 0; i < count; i++) {
        MUST(moe_layer_parameter(r->layer, i, &p));
        if (p.grad) *bytes += (size_t)p.element_count * 4;
    }
    char *all = calloc(1, *bytes), *to = all;
    ck_assert_ptr_nonnull(all);
    CUDA(cudaStreamSynchronize(r->stream));
    CUDA(cudaMemcpy(to, r->array[1], r->bytes, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(to + r->bytes, r->array[3], r->bytes, cudaMemcpyDeviceToHost));
    to += 2 * r->bytes;
    for (int64_t i = 0; i < count; i++) {
        MUST(moe_layer_parameter(r->layer, i, &p));
        if (!p.grad) continue;
        CUDA(cudaMemcpy(to, p.grad, (size_t)p.element_count * 4, cudaMemcpyDeviceToHost));
        to += p.element_count * 4;
    }
    return all;
}

/* ---- what was recorded ----------------------------------------------------------------------- */

/* The first of a kind, and what came before it. */
static const char *first_of(enum emu_kind kind)
{
    static char text[256];
    const struct emu_call *list;
    size_t count = emu_calls(&list), i = 0;
    while (i < count && list[i].kind != kind) i++;
    (void)snprintf(text, sizeof text, "%s, call %d, after %s", i < count ? list[i].name : "none",
                   (int)i, i > 0 ? list[i - 1].name : "nothing");
    return text;
}

/* None of these kinds. */
static void none_of(const enum emu_kind *kinds, size_t count, const char *when)
{
    for (size_t i = 0; i < count; i++)
        ck_assert_msg(emu_count(kinds[i]) == 0, "%s: %d of \"%s\": %s", when,
                      (int)emu_count(kinds[i]), emu_kind_name(kinds[i]), first_of(kinds[i]));
}

static const enum emu_kind WAITS[] = {EMU_CALL_SYNCHRONIZE, EMU_CALL_QUERY, EMU_CALL_HOST_FUNCTION};
static const enum emu_kind COPIES[] = {EMU_CALL_TO_DEVICE, EMU_CALL_FROM_DEVICE, EMU_CALL_ON_HOST};
static const enum emu_kind MEMORY[] = {EMU_CALL_ALLOCATE, EMU_CALL_FREE, EMU_CALL_ALLOCATE_HOST,
                                       EMU_CALL_FREE_HOST, EMU_CALL_OBJECT};

/* Waits: queries of an event one after another are one. */
static int waits(void)
{
    const struct emu_call *list;
    size_t count = emu_calls(&list);
    int found = (int)emu_count(EMU_CALL_SYNCHRONIZE);
    for (size_t i = 0; i < count; i++)
        found += list[i].kind == EMU_CALL_QUERY && (i == 0 || list[i - 1].kind != EMU_CALL_QUERY);
    return found;
}

static void all_on(const rig *r, int device)
{
    const struct emu_call *list;
    size_t count = emu_calls(&list);
    ck_assert_uint_gt(count, 10);
    for (size_t i = 0; i < count; i++) {
        if (list[i].kind == EMU_CALL_QUERY) continue; /* of an event */
        ck_assert_msg(list[i].stream == (const void *)r->stream, "%s is on another stream",
                      list[i].name);
        ck_assert_msg(list[i].device == device, "%s is on device %d", list[i].name, list[i].device);
    }
}

/* ---- waits, copies, memory ------------------------------------------------------------------- */

START_TEST(test_calls_padded_step_never_waits)
{
    rig r;
    rig_make(&r, &SHAPES[_i], 1, PADDED);
    for (int i = 0; i < 2; i++) MUST(step(&r));
    ck_assert_int_eq(current(), 0);
    emu_record_start();
    MUST(forward(&r));
    ck_assert_int_eq(current(), 0);
    MUST(backward(&r));
    emu_record_stop();
    ck_assert_int_eq(current(), 0);
    none_of(WAITS, COUNT(WAITS), "a padded step");
    none_of(COPIES, COUNT(COPIES), "a padded step");
    none_of(MEMORY, COUNT(MEMORY), "a padded step");
    all_on(&r, 1);
    MUST(moe_cuda_poll(r.context));
    rig_free(&r);
}
END_TEST

START_TEST(test_calls_exact_step_waits_once)
{
    rig r;
    rig_make(&r, &SHAPES[_i], 1, EXACT);
    for (int i = 0; i < 2; i++) MUST(step(&r));
    emu_record_start();
    MUST(forward(&r));
    emu_record_stop();
    ck_assert_int_eq(waits(), 1);
    ck_assert_uint_eq(emu_count(EMU_CALL_SYNCHRONIZE), 0); /* it is bounded: queries */
    ck_assert_uint_eq(emu_count(EMU_CALL_TO_DEVICE), 0);
    none_of(MEMORY, COUNT(MEMORY), "an exact forward");
    all_on(&r, 1);
    emu_record_start();
    MUST(backward(&r));
    emu_record_stop();
    none_of(WAITS, COUNT(WAITS), "an exact backward");
    none_of(COPIES, COUNT(COPIES), "an exact backward");
    none_of(MEMORY, COUNT(MEMORY), "an exact backward");
    all_on(&r, 1);
    ck_assert_int_eq(current(), 0);
    rig_free(&r);
}
END_TEST

/* Both modes give the same, to the byte, where products see the same rows. */
START_TEST(test_calls_padded_is_exact)
{
    rig r[2];
    char *got[2];
    size_t bytes;
    for (int padded = 0; padded < 2; padded++) {
        rig_make(&r[padded], &SHAPES[_i], 0, padded);
        MUST(step(&r[padded]));
        got[padded] = results(&r[padded], &bytes);
    }
    ck_assert_mem_eq(got[0], got[1], bytes);
    for (int padded = 0; padded < 2; padded++) rig_free(&r[padded]), free(got[padded]);
}
END_TEST

/* ---- capture --------------------------------------------------------------------------------- */

START_TEST(test_calls_captured_step_replays_to_the_same_bytes)
{
    rig r;
    size_t bytes;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    rig_make(&r, &SHAPES[_i], 0, PADDED);
    MUST(step(&r)); /* memory grows here */
    char *want = results(&r, &bytes);
    CUDA(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal));
    MUST(step(&r));
    CUDA(cudaStreamEndCapture(r.stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    for (int turn = 0; turn < 2; turn++) {
        CUDA(cudaMemsetAsync(r.array[1], 0x5a, r.bytes, r.stream));
        CUDA(cudaMemsetAsync(r.array[3], 0x5a, r.bytes, r.stream));
        CUDA(cudaGraphLaunch(exec, r.stream));
        char *got = results(&r, &bytes);
        ck_assert_mem_eq(got, want, bytes);
        free(got);
    }
    CUDA(cudaGraphExecDestroy(exec));
    CUDA(cudaGraphDestroy(graph));
    free(want);
    rig_free(&r);
}
END_TEST

START_TEST(test_calls_exact_step_is_not_captured)
{
    rig r;
    size_t bytes;
    cudaGraph_t graph;
    rig_make(&r, &SHAPES[_i], 0, EXACT);
    MUST(step(&r));
    char *before = results(&r, &bytes);
    CUDA(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal));
    emu_record_start();
    ck_assert_int_eq(forward(&r), MOE_ERROR_INVALID_STATE);
    emu_record_stop();
    const struct emu_call *list;
    ck_assert_uint_eq(emu_calls(&list), 0);
    CUDA(cudaStreamEndCapture(r.stream, &graph)); /* which is still good */
    CUDA(cudaGraphDestroy(graph));
    MUST(backward(&r)); /* the forward before still stands */
    char *after = results(&r, &bytes);
    ck_assert_mem_eq(before, after, bytes);
    free(before), free(after);
    rig_free(&r);
}
END_TEST

/* ---- failures -------------------------------------------------------------------------------- */

typedef struct fault {
    const char *name;
    int error;
    moe_status want;
} fault;

static const fault FAULTS[] = {
    {"cudaMalloc", cudaErrorMemoryAllocation, MOE_ERROR_OUT_OF_MEMORY},
    {"cudaHostAlloc", cudaErrorMemoryAllocation, MOE_ERROR_OUT_OF_MEMORY},
    {"cudaMemcpyAsync", cudaErrorUnknown, MOE_ERROR_DEVICE},
    {"cudaMemsetAsync", cudaErrorUnknown, MOE_ERROR_DEVICE},
    {"cudaEventCreate", cudaErrorUnknown, MOE_ERROR_DEVICE},
    {"cudaEventRecord", cudaErrorUnknown, MOE_ERROR_DEVICE},
    {"cudaEventQuery", cudaErrorUnknown, MOE_ERROR_DEVICE},
    {"cudaStreamCreate", cudaErrorUnknown, MOE_ERROR_DEVICE},
    {"cudaStreamIsCapturing", cudaErrorUnknown, MOE_ERROR_DEVICE},
    {"cudaSetDevice", cudaErrorUnknown, MOE_ERROR_DEVICE},
    {"kernel", cudaErrorLaunchOutOfResources, MOE_ERROR_DEVICE},
    {"cublasCreate", 1, MOE_ERROR_DEVICE},
    {"cublasSetStream", 1, MOE_ERROR_DEVICE},
    {"cublasGemmEx", 14, MOE_ERROR_DEVICE},
    {"cublasGemmStridedBatchedEx", 14, MOE_ERROR_DEVICE},
    {"cublasGemmGroupedBatchedEx", 14, MOE_ERROR_DEVICE},
    {"cublasSgemm", 14, MOE_ERROR_DEVICE}};
enum { LONGEST = 120, ALLOWED_WITHOUT = 3 };

/* One run with the n-th call failing, from nothing, or from the second step on. Whether it
 * failed. */
static int run_with(const fault *x, int n, int padded, int later)
{
    rig r;
    size_t bytes;
    size_t live = emu_live_allocations(0), pinned = emu_live_allocations(1);
    size_t objects = emu_live_objects();
    moe_status status = MOE_OK;
    rig_memory(&r, &SHAPES[n % SHAPES_OF], 0);
    if (later) MUST(rig_objects(&r, 0, padded));
    if (later) MUST(step(&r));
    emu_fail(x->name, n, x->error);
    if (!later) status = rig_objects(&r, 0, padded);
    if (status == MOE_OK) status = step(&r);
    if (status == MOE_OK) status = step(&r);
    emu_fail(x->name, 0, 0);
    ck_assert_msg(status == MOE_OK || status == x->want || status == MOE_ERROR_DEVICE ||
                      status == MOE_ERROR_OUT_OF_MEMORY,
                  "call %d of %s: %s (%s)", n, x->name, moe_status_name(status), moe_last_error());
    ck_assert_int_eq(current(), 0);
    (void)cudaStreamSynchronize(r.stream);
    emu_heal();
    if (later || status == MOE_OK) { /* a new forward works */
        MUST(step(&r));
        free(results(&r, &bytes));
    }
    rig_free(&r);
    ck_assert_msg(emu_live_allocations(0) == live && emu_live_allocations(1) == pinned &&
                      emu_live_objects() == objects,
                  "call %d of %s: something is left", n, x->name);
    return status != MOE_OK;
}

/* Calls in turn, until so many one after another did no harm: there are no more of them. */
START_TEST(test_calls_any_call_may_fail)
{
    const fault *x = &FAULTS[_i / 2];
    int padded = _i % 2, failures = 0;
    for (int later = 0; later < 2; later++)
        for (int n = 1, good = 0; n < LONGEST && good < ALLOWED_WITHOUT; n += n < 6 ? 1 : 9) {
            int failed = run_with(x, n, padded, later);
            failures += failed;
            good = failed ? 0 : good + 1;
        }
    (void)printf("  %-28s %-6s %4d calls failed\n", x->name, padded ? "padded" : "exact", failures);
}
END_TEST

/* A kernel that faults while it runs: told by a later call and by a poll, from then on for ever. */
START_TEST(test_calls_fault_of_a_kernel_is_sticky)
{
    for (int n = 1; n < 30; n += 4) {
        int healed = n % 8 == 1; /* memory of a dead device is gone, as CUDA has it */
        rig r;
        size_t live = emu_live_allocations(0), objects = emu_live_objects();
        rig_make(&r, &SHAPES[_i], 0, PADDED);
        MUST(step(&r));
        CUDA(cudaStreamSynchronize(r.stream));
        MUST(moe_cuda_poll(r.context));
        emu_fail_kernel(n);
        moe_status status = step(&r);
        ck_assert(status == MOE_OK || status == MOE_ERROR_DEVICE);
        ck_assert_int_ne(cudaStreamSynchronize(r.stream), cudaSuccess);
        ck_assert_int_eq(moe_cuda_poll(r.context), MOE_ERROR_DEVICE);
        ck_assert_int_eq(forward(&r), MOE_ERROR_DEVICE);
        ck_assert_int_eq(moe_cuda_poll(r.context), MOE_ERROR_DEVICE);
        if (healed) emu_heal();
        rig_free_objects(&r);
        emu_heal();
        rig_free(&r);
        ck_assert(!healed || emu_live_allocations(0) == live);
        ck_assert(!healed || emu_live_objects() == objects);
    }
}
END_TEST

/* ---- devices, threads, ends ------------------------------------------------------------------ */

/* Asserts are the main thread's. */
typedef struct worker {
    rig r;
    moe_status status;
    char said[256];
} worker;

static void *work(void *argument)
{
    worker *w = argument;
    for (int i = 0; i < 5 && w->status == MOE_OK; i++) w->status = step(&w->r);
    if (w->status != MOE_OK) (void)snprintf(w->said, sizeof w->said, "%s", moe_last_error());
    return NULL;
}

START_TEST(test_calls_two_devices_from_two_threads)
{
    pthread_t thread[2];
    worker w[2];
    char *got[2];
    size_t bytes;
    memset(w, 0, sizeof w);
    for (int i = 0; i < 2; i++) rig_make(&w[i].r, &SHAPES[_i], i, EXACT);
    for (int i = 0; i < 2; i++) ck_assert_int_eq(pthread_create(&thread[i], NULL, work, &w[i]), 0);
    for (int i = 0; i < 2; i++) ck_assert_int_eq(pthread_join(thread[i], NULL), 0);
    for (int i = 0; i < 2; i++) {
        ck_assert_msg(w[i].status == MOE_OK, "device %d: %s", i, w[i].said);
        got[i] = results(&w[i].r, &bytes);
    }
    ck_assert_mem_eq(got[0], got[1], bytes);
    for (int i = 0; i < 2; i++) rig_free(&w[i].r), free(got[i]);
}
END_TEST

START_TEST(test_calls_objects_may_go_with_work_pending)
{
    rig r;
    size_t live = emu_live_allocations(0), pinned = emu_live_allocations(1),
           objects = emu_live_objects();
    for (int i = 0; i < 6; i++) {
        rig_make(&r, &SHAPES[_i], 0, i % 2);
        MUST(step(&r));
        MUST(forward(&r));
        rig_free(&r);
    }
    ck_assert_uint_eq(emu_live_allocations(0), live);
    ck_assert_uint_eq(emu_live_allocations(1), pinned);
    ck_assert_uint_eq(emu_live_objects(), objects);
}
END_TEST

/* ---- the table ------------------------------------------------------------------------------- */

static void count_calls(rig *r, moe_status (*call)(rig *), uint64_t found[3])
{
    emu_record_start();
    MUST(call(r));
    emu_record_stop();
    found[0] = emu_count(EMU_CALL_LAUNCH), found[1] = emu_count(EMU_CALL_GEMM);
    found[2] = emu_count(EMU_CALL_SET) + emu_count(EMU_CALL_ON_DEVICE);
}

START_TEST(test_calls_table)
{
    (void)printf("  %-26s %-6s %8s %8s %8s   %8s %8s %8s\n", "launches", "rows", "forward",
                 "products", "fills", "backward", "products", "fills");
    for (size_t i = 0; i < SHAPES_OF; i++)
        for (int padded = 0; padded < 2; padded++) {
            rig r;
            uint64_t n[2][3];
            rig_make(&r, &SHAPES[i], 0, padded);
            MUST(step(&r));
            count_calls(&r, forward, n[0]), count_calls(&r, backward, n[1]);
            (void)printf("  %-26s %-6s %8d %8d %8d   %8d %8d %8d\n", SHAPES[i].name,
                         padded ? "padded" : "exact", (int)n[0][0], (int)n[0][1], (int)n[0][2],
                         (int)n[1][0], (int)n[1][1], (int)n[1][2]);
            for (int phase = 0; phase < 2; phase++) ck_assert_uint_lt(n[phase][0], 100);
            rig_free(&r);
        }
}
END_TEST

int main(void)
{
    (void)setenv("MOE_EMULATION_PROTECT", "1", 1);
    (void)setenv("MOE_EMULATION_QUIET", "1", 1); /* refusals are asked for */
    Suite *suite = suite_create("calls");
    TCase *c = tcase_create("calls");
    tcase_set_timeout(c, 600);
    tcase_add_loop_test(c, test_calls_padded_step_never_waits, 0, SHAPES_OF);
    tcase_add_loop_test(c, test_calls_exact_step_waits_once, 0, SHAPES_OF);
    tcase_add_loop_test(c, test_calls_padded_is_exact, 0, SHAPES_OF);
    tcase_add_loop_test(c, test_calls_captured_step_replays_to_the_same_bytes, 0, SHAPES_OF);
    tcase_add_loop_test(c, test_calls_exact_step_is_not_captured, 0, SHAPES_OF);
    TCase *faults = tcase_create("faults");
    tcase_set_timeout(faults, 600);
    tcase_add_loop_test(faults, test_calls_any_call_may_fail, 0, 2 * COUNT(FAULTS));
    tcase_add_loop_test(faults, test_calls_fault_of_a_kernel_is_sticky, 0, SHAPES_OF);
    tcase_add_loop_test(c, test_calls_two_devices_from_two_threads, 0, SHAPES_OF);
    tcase_add_loop_test(c, test_calls_objects_may_go_with_work_pending, 0, SHAPES_OF);
    tcase_add_test(c, test_calls_table);
    suite_add_tcase(suite, c);
    suite_add_tcase(suite, faults);
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
