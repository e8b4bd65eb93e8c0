/* 14_nccl.c - a layer whose experts live on two GPUs, over NCCL: each rank has its own tokens and
 * half of the experts, and rows travel from GPU to GPU. A training step is compared with one GPU
 * that has everything, then captured in a CUDA graph on both ranks and replayed. Here a rank is a
 * thread; a process for each GPU makes the same calls, and only the ncclUniqueId is handed round
 * otherwise. Without two GPUs it says so and ends well.
 *
 * Introduces: moe_comm_create_nccl, comm, token_first, group_begin, moe_layer_reduce_gradients,
 * moe_comm_abort. */
#include "example_cuda.h"

#include <moe/nccl.h>

#include <math.h>
#include <nccl.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

enum { P = 2, T = 48, D = 32, F = 48, E = 8, K = 2, ROOM = 24, SECONDS = 60 };

#define NCCL(call)                                                                          \
    do {                                                                                    \
        ncclResult_t result = (call);                                                       \
        if (result != ncclSuccess) {                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, ncclGetErrorString(result)); \
            exit(1);                                                                        \
        }                                                                                   \
    } while (0)

typedef struct model {
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
} model;

/* snippet: model */
/* A rank's part of the layer, or with comm NULL the whole of it. Every rank has the gate and E/P of
 * the experts; all of them make these calls. */
static void make(model *m, moe_context *context, moe_comm *comm)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    OK(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.init_std = 0.5;
    g.capacity_kind = MOE_CAPACITY_NUMBER, g.capacity = ROOM; /* of each rank's tokens */
    OK(moe_gate_create(&m->gate, context, &g));
    OK(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.activation = MOE_ACTIVATION_SWIGLU;
    e.num_experts = comm ? E / moe_comm_size(comm) : E;
    OK(moe_experts_create(&m->experts, context, &e));
    OK(moe_layer_config_init(&l, sizeof l));
    l.gate = m->gate, l.experts = m->experts, l.comm = comm;
    l.exchange = MOE_EXCHANGE_PADDED, l.padded_rows = comm ? ROOM : P * ROOM; /* nobody waits */
    OK(moe_layer_create(&m->layer, &l));
    OK(moe_layer_init_parameters(m->layer, 1)); /* an expert begins alike wherever it lives */
    OK(moe_pass_create(&m->pass, m->layer, NULL));
}
/* end snippet */

static void drop(model *m)
{
    moe_pass_destroy(m->pass);
    moe_layer_destroy(m->layer);
    moe_experts_destroy(m->experts);
    moe_gate_destroy(m->gate);
}

/* ---- a step ---------------------------------------------------------------------------------- */

/* `tokens` of the batch from number `first` on, in memory of the GPU. */
typedef struct batch {
    int64_t first, tokens;
    float *x, *y, *dy, *dx;
} batch;

static void make_batch(batch *b, int64_t first, int64_t tokens, cudaStream_t stream)
{
    static const uint64_t SEEDS[2] = {7, 8};
    float all[P * T * D], **of_seed[2] = {&b->x, &b->dy};
    size_t bytes = (size_t)(tokens * D) * sizeof(float);
    b->first = first, b->tokens = tokens;
    CUDA(cudaMalloc((void **)&b->y, bytes));
    CUDA(cudaMalloc((void **)&b->dx, bytes));
    for (int i = 0; i < 2; i++) {
        fill(all, P * T * D, SEEDS[i]);
        CUDA(cudaMalloc((void **)of_seed[i], bytes));
        CUDA(cudaMemcpyAsync(*of_seed[i], all + first * D, bytes, cudaMemcpyHostToDevice, stream));
    }
}

static void free_batch(batch *b)
{
    CUDA(cudaFree(b->x));
    CUDA(cudaFree(b->y));
    CUDA(cudaFree(b->dy));
    CUDA(cudaFree(b->dx));
}

/* snippet: step */
/* A rank's tokens are a group for capacity and losses; on one GPU group_begin says the same. */
static void step(model *m, const batch *b, cudaStream_t stream)
{
    static const int64_t RANKS[P + 1] = {0, T, 2 * T};
    moe_forward_args f;
    moe_backward_args g;
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = b->tokens, f.token_first = b->first, f.x = b->x, f.y = b->y, f.stream = stream;
    if (b->tokens > T) f.groups = P, f.group_begin = RANKS;
    OK(moe_layer_forward(m->layer, m->pass, &f));
    OK(moe_backward_args_init(&g, sizeof g));
    g.dy = b->dy, g.dx = b->dx, g.flags = MOE_BACKWARD_OVERWRITE, g.stream = stream;
    OK(moe_layer_backward(m->layer, m->pass, &g));
    OK(moe_layer_reduce_gradients(m->layer, stream)); /* all but the experts', over the ranks */
}
/* end snippet */

/* snippet: wait */
/* The program's own waits need a deadline too: a stream that waits for a rank that is gone does so
 * for ever. moe_comm_abort lets the streams of a duplicate go on. */
static void wait_for(cudaStream_t stream, moe_comm *comm)
{
    const struct timespec pause = {0, 100000};
    time_t end = time(NULL) + SECONDS;
    cudaError_t status;
    while ((status = cudaStreamQuery(stream)) == cudaErrorNotReady && time(NULL) < end)
        nanosleep(&pause, NULL);
    if (status == cudaErrorNotReady) moe_comm_abort(comm);
    CUDA(status);
    OK(moe_comm_poll(comm));
}
/* end snippet */

/* ---- against one GPU ------------------------------------------------------------------------- */

static void near(const float *a, const float *b, int64_t count)
{
    float *here = malloc(2 * (size_t)count * sizeof *here), largest = 0, off = 0;
    HOLDS(here);
    CUDA(cudaMemcpy(here, a, (size_t)count * sizeof *a, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(here + count, b, (size_t)count * sizeof *b, cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < count; i++) {
        largest = fmaxf(largest, fabsf(here[count + i]));
        off = fmaxf(off, fabsf(here[i] - here[count + i]));
    }
    HOLDS(largest > 0 && off <= 1e-5f * largest);
    free(here);
}

/* The rank's GPU does everything: all tokens, all experts. */
static void compare(const model *m, const batch *b, moe_context *context, cudaStream_t stream)
{
    moe_parameter_record own, whole;
    model one;
    batch all;
    make(&one, context, NULL);
    make_batch(&all, 0, P * T, stream);
    step(&one, &all, stream);
    CUDA(cudaStreamSynchronize(stream));
    near(b->y, all.y + b->first * D, T * D);
    near(b->dx, all.dx + b->first * D, T * D);
    OK(moe_parameter_record_init(&own, sizeof own));
    OK(moe_parameter_record_init(&whole, sizeof whole));
    for (int64_t i = 0; i < moe_layer_parameter_count(m->layer); i++) {
        OK(moe_layer_parameter(m->layer, i, &own));
        OK(moe_layer_parameter(one.layer, i, &whole));
        int of_experts = own.element_count < whole.element_count;
        int64_t at = of_experts ? moe_layer_expert_number(m->layer, 0) : 0;
        near(own.grad, (float *)whole.grad + at * (whole.element_count / E), own.element_count);
    }
    free_batch(&all);
    drop(&one);
}

/* ---- a graph --------------------------------------------------------------------------------- */

/* snippet: graph */
/* Every rank captures the same step, and launches its graph as often. What takes memory has been
 * called before: a step, and with it moe_layer_reduce_gradients. */
static void replay(model *m, const batch *b, moe_comm *comm, cudaStream_t stream)
{
    static _Thread_local float direct[T * D], replayed[T * D];
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA(cudaMemcpy(direct, b->y, sizeof direct, cudaMemcpyDeviceToHost));
    CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    step(m, b, stream);
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&exec, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    for (int i = 0; i < 3; i++) {
        CUDA(cudaMemsetAsync(b->y, 0, sizeof direct, stream));
        CUDA(cudaGraphLaunch(exec, stream));
        wait_for(stream, comm);
        CUDA(cudaMemcpy(replayed, b->y, sizeof replayed, cudaMemcpyDeviceToHost));
        HOLDS(memcmp(direct, replayed, sizeof direct) == 0);
    }
    CUDA(cudaGraphExecDestroy(exec)); /* before the communicator goes */
}
/* end snippet */

/* ---- a rank ---------------------------------------------------------------------------------- */

typedef struct rank {
    int number;
    ncclUniqueId id;
} rank;

static void *run(void *argument)
{
    const rank *r = argument;
    cudaStream_t stream;
    model m;
    batch b;

    /* snippet: rank */
    ncclComm_t nccl; /* the program's own */
    moe_context *context;
    moe_nccl_config c;
    moe_comm *comm;
    CUDA(cudaSetDevice(r->number));
    NCCL(ncclCommInitRank(&nccl, P, r->id, r->number));
    OK(moe_cuda_context_create(&context, NULL)); /* on the device that is current */
    OK(moe_nccl_config_init(&c, sizeof c));
    c.comm = nccl, c.timeout = SECONDS;
    c.duplicate = 1;                              /* a group that fails lets its streams go on */
    OK(moe_comm_create_nccl(&comm, context, &c)); /* all ranks at once, and so below */
    make(&m, context, comm);
    /* end snippet */

    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    make_batch(&b, r->number * T, T, stream);
    step(&m, &b, stream);
    wait_for(stream, comm);
    compare(&m, &b, context, stream);
    replay(&m, &b, comm, stream);

    free_batch(&b);
    drop(&m);
    moe_comm_destroy(comm); /* waits for the other ranks to do so */
    moe_context_destroy(context);
    CUDA(cudaStreamDestroy(stream));
    NCCL(ncclCommDestroy(nccl));
    return NULL;
}

int main(void)
{
    pthread_t thread[P];
    rank ranks[P];
    ncclUniqueId id;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count < P) {
        printf("no %d GPUs here\n", P);
        return 0;
    }
    NCCL(ncclGetUniqueId(&id)); /* rank 0 makes it, all get a copy */
    for (int i = 0; i < P; i++) {
        ranks[i] = (rank){i, id};
        HOLDS(pthread_create(&thread[i], NULL, run, &ranks[i]) == 0);
    }
    for (int i = 0; i < P; i++) HOLDS(pthread_join(thread[i], NULL) == 0);
    printf("%d GPUs with %d of %d experts each\n", P, E / P, E);
    printf("y, dx and all gradients are those of one GPU that has everything, within 1e-5\n");
    printf("three replays of the captured step: the bytes of the direct one\n");
    return 0;
}
