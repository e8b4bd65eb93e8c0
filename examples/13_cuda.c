/* 13_cuda.c - a layer on a GPU, in a program that has its own stream and device memory: a training
 * step behind the host's own copies, compared with the CPU, and the same step captured in a CUDA
 * graph and replayed. Without a GPU it says so and ends well.
 *
 * Introduces: moe_cuda_context_create, moe_cuda_device, moe_cuda_poll, stream, losses_out,
 * MOE_EXCHANGE_PADDED, moe_pass_reserve. */
#include "example_cuda.h"

#include <math.h>
#include <string.h>

enum { T = 64, D = 32, F = 48, E = 8, K = 2, ROOM = 24, BYTES = T * D * sizeof(float) };

/* A layer on any context. Nothing here knows where it computes. */
typedef struct model {
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
} model;

/* snippet: padded */
/* padded: an expert has room for ROOM rows, used or not, so that nothing about the rows must be
 * known on the host. The gate's capacity sees to it that there are no more. */
static void make(model *m, moe_context *context, int padded)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    m->context = context;
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.init_std = 0.5, g.switch_weight = 0.01;
    g.capacity_kind = MOE_CAPACITY_NUMBER, g.capacity = ROOM;
    OK(moe_gate_create(&m->gate, context, &g));
    OK(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.num_experts = E, e.activation = MOE_ACTIVATION_SWIGLU;
    OK(moe_experts_create(&m->experts, context, &e));
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = m->gate, l.experts = m->experts;
    if (padded) l.exchange = MOE_EXCHANGE_PADDED, l.padded_rows = ROOM;
    OK(moe_layer_create(&m->layer, &l));
    OK(moe_layer_init_parameters(m->layer, 1)); /* the same numbers on every device */
    OK(moe_pass_create(&m->pass, m->layer, NULL));
}
/* end snippet */

static void drop(model *m)
{
    moe_pass_destroy(m->pass);
    moe_layer_destroy(m->layer);
    moe_experts_destroy(m->experts);
    moe_gate_destroy(m->gate);
    moe_context_destroy(m->context);
}

/* Where a step's arrays are: all of the host, or all of the device. */
typedef struct arrays {
    float *x, *y, *dy, *dx, *losses;
} arrays;

static void step(model *m, const arrays *a, cudaStream_t stream)
{
    moe_forward_args f;
    moe_backward_args b;
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.x = a->x, f.y = a->y, f.losses_out = a->losses, f.stream = stream;
    OK(moe_layer_forward(m->layer, m->pass, &f));
    OK(moe_backward_args_init(&b, sizeof b));
    b.dy = a->dy, b.dx = a->dx, b.flags = MOE_BACKWARD_OVERWRITE, b.stream = stream;
    OK(moe_layer_backward(m->layer, m->pass, &b));
}

/* ---- the host's memory and stream ------------------------------------------------------------ */

typedef struct results {
    float y[T * D], dx[T * D], losses[MOE_LOSS_SLOTS];
} results;

static void allocate(arrays *a)
{
    CUDA(cudaMalloc((void **)&a->x, BYTES));
    CUDA(cudaMalloc((void **)&a->y, BYTES));
    CUDA(cudaMalloc((void **)&a->dy, BYTES));
    CUDA(cudaMalloc((void **)&a->dx, BYTES));
    CUDA(cudaMalloc((void **)&a->losses, MOE_LOSS_SLOTS * sizeof(float)));
}

static void release(arrays *a)
{
    CUDA(cudaFree(a->x));
    CUDA(cudaFree(a->y));
    CUDA(cudaFree(a->dy));
    CUDA(cudaFree(a->dx));
    CUDA(cudaFree(a->losses));
}

static void fetch(results *r, const arrays *a, cudaStream_t stream)
{
    size_t losses = sizeof r->losses;
    CUDA(cudaMemcpyAsync(r->y, a->y, BYTES, cudaMemcpyDeviceToHost, stream));
    CUDA(cudaMemcpyAsync(r->dx, a->dx, BYTES, cudaMemcpyDeviceToHost, stream));
    CUDA(cudaMemcpyAsync(r->losses, a->losses, losses, cudaMemcpyDeviceToHost, stream));
    CUDA(cudaStreamSynchronize(stream));
}

/* ---- against the CPU ------------------------------------------------------------------------- */

static float largest_difference(const float *a, const float *b, int count)
{
    float largest = 0;
    for (int i = 0; i < count; i++) largest = fmaxf(largest, fabsf(a[i] - b[i]));
    return largest;
}

/* A plan's arrays are in the memory of its context: the device's are fetched. */
static int64_t tokens_routed_otherwise(const model *gpu, const model *cpu)
{
    const moe_plan *plan, *host_plan;
    moe_plan_view v;
    int32_t there[T * K];
    int64_t differing = 0;
    OK(moe_plan_view_init(&v, sizeof v));
    OK(moe_pass_plan(gpu->pass, &plan));
    OK(moe_plan_get(plan, &v));
    CUDA(cudaMemcpy(there, v.expert_of_entry, sizeof there, cudaMemcpyDeviceToHost));
    OK(moe_pass_plan(cpu->pass, &host_plan));
    OK(moe_plan_get(host_plan, &v));
    for (int t = 0; t < T; t++)
        differing += memcmp(there + t * K, v.expert_of_entry + t * K, K * sizeof *there) != 0;
    return differing;
}

static void compare(const model *gpu, const results *r, const float *x, const float *dy)
{
    static results cpu_results;
    static float x_here[T * D], dy_here[T * D];
    arrays here = {x_here, cpu_results.y, dy_here, cpu_results.dx, cpu_results.losses};
    moe_context *context;
    model cpu;
    memcpy(x_here, x, BYTES), memcpy(dy_here, dy, BYTES);
    OK(moe_context_create(&context, NULL));
    make(&cpu, context, 0);
    step(&cpu, &here, NULL);
    int64_t otherwise = tokens_routed_otherwise(gpu, &cpu);
    printf("tokens that go to other experts than on the CPU: %d of %d\n", (int)otherwise, T);
    HOLDS(otherwise == 0);
    HOLDS(largest_difference(r->y, cpu_results.y, T * D) < 1e-5f);
    HOLDS(largest_difference(r->dx, cpu_results.dx, T * D) < 1e-5f);
    HOLDS(largest_difference(r->losses, cpu_results.losses, MOE_LOSS_SLOTS) < 1e-6f);
    printf("y, dx and the losses agree within 1e-5; switch loss %.3f\n",
           (double)r->losses[MOE_LOSS_SWITCH]);
    drop(&cpu);
}

/* ---- a graph --------------------------------------------------------------------------------- */

/* snippet: graph */
/* Captures one step. moe_pass_reserve takes all memory before, and padded rows need no wait. */
static cudaGraphExec_t capture(model *m, const arrays *a, cudaStream_t stream)
{
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    OK(moe_pass_reserve(m->pass, T, 1, MOE_FROM_CONFIG));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    step(m, a, stream); /* nothing computes yet */
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&replay, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    return replay; /* reads and writes the same memory each time; the pass must outlive it */
}
/* end snippet */

static void check_replays(moe_context *context, const arrays *a, cudaStream_t stream)
{
    static results direct, replayed;
    static float other[T * D];
    model m;
    make(&m, context, 1);
    cudaGraphExec_t replay = capture(&m, a, stream);
    for (int i = 0; i < 3; i++) {
        fill(other, T * D, 10 + (uint64_t)i); /* new contents in the same place */
        CUDA(cudaMemcpyAsync(a->x, other, BYTES, cudaMemcpyHostToDevice, stream));
        CUDA(cudaGraphLaunch(replay, stream));
        fetch(&replayed, a, stream);
        step(&m, a, stream);
        fetch(&direct, a, stream);
        HOLDS(memcmp(&direct, &replayed, sizeof direct) == 0);
    }
    printf("three replays of the graph: the bytes of direct calls\n");
    CUDA(cudaGraphExecDestroy(replay));
    m.context = NULL; /* the caller's */
    drop(&m);
}

/* ---- the program ----------------------------------------------------------------------------- */

int main(void)
{
    static float x[T * D], dy[T * D];
    static results r;
    fill(x, T * D, 7), fill(dy, T * D, 8);

    /* snippet: context */
    moe_context *context;
    moe_cuda_config c;
    OK(moe_cuda_config_init(&c, sizeof c)); /* the device that is current, cudaMalloc, no TF32 */
    moe_status status = moe_cuda_context_create(&context, &c);
    if (status == MOE_ERROR_DEVICE || status == MOE_ERROR_NOT_SUPPORTED) {
        printf("no GPU here: %s\n", moe_last_error());
        return 0;
    }
    OK(status);
    /* end snippet */
    HOLDS(moe_context_backend(context) == MOE_BACKEND_CUDA && moe_cuda_device(context) >= 0);

    /* snippet: step */
    cudaStream_t stream; /* the host's; every call is put on the stream it is given */
    arrays a;
    model gpu;
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    allocate(&a);
    make(&gpu, context, 0);
    CUDA(cudaMemcpyAsync(a.x, x, BYTES, cudaMemcpyHostToDevice, stream));
    CUDA(cudaMemcpyAsync(a.dy, dy, BYTES, cudaMemcpyHostToDevice, stream));
    step(&gpu, &a, stream); /* behind the copies, without waiting for them */
    fetch(&r, &a, stream);
    OK(moe_cuda_poll(context)); /* an error of the device would come with a later call, or here */
    /* end snippet */

    compare(&gpu, &r, x, dy);
    check_replays(context, &a, stream);
    release(&a);
    CUDA(cudaStreamDestroy(stream));
    drop(&gpu);
    return 0;
}
