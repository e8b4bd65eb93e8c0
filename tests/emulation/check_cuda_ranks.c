/* check_cuda_ranks.c - a layer whose ranks are on devices of their own: the bytes of one device that
 * has all, in memory that the host may not touch; what it calls and waits for; captures; calls that
 * are refused, that do not fit, and transports that fail. */
#include "cuda_host.h"
#include "support/device/device_world.h"

#include <pthread.h>
#include <time.h>

#ifdef EMU_NCCL /* there is an nccl.h */
#include <moe/nccl.h>
#include <nccl.h>
#endif

enum { MOST_RANKS = 4 };
static const int TOKENS[MOST_RANKS] = {13, 0, 7, 6}, FIRST[MOST_RANKS + 1] = {0, 13, 13, 20, 26};

/* How ranks are connected; over NCCL a rank has a device of its own. Without NCCL that is the one before. */
#ifdef EMU_NCCL
enum { THROUGH_HOST, DIRECT, OVER_NCCL, TRANSPORTS, HAS_NCCL = 1 };
#else
enum { THROUGH_HOST, DIRECT, TRANSPORTS, OVER_NCCL = DIRECT, HAS_NCCL = 0 };
typedef int ncclComm_t, ncclUniqueId;
#endif

typedef struct group group;
typedef struct seat {
    group *g;
    int rank, device;
    moe_context *context;
    moe_comm *comm, *node_comm, *rail_comm; /* the last two with nodes */
    ncclComm_t nccl, node_nccl, rail_nccl;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    cudaStream_t stream;
    arrays a;
    moe_status status[4];
    char error[4][256];
} seat;

struct group {
    int ranks, transport;
    int padded_rows; /* 0: exact */
    int global;      /* losses of all ranks */
    int nodes;       /* 0: rows go straight; else ranks in turn are on so many; not THROUGH_HOST */
    void (*run)(seat *s);
    moe_world *world, *other;
    device_world *devices, *node_devices[MOST_RANKS], *rail_devices[MOST_RANKS];
    ncclUniqueId id;
    seat seat[MOST_RANKS];
};

static bool is_over_nccl(const group *g) { return HAS_NCCL && g->transport == OVER_NCCL; }

#ifdef EMU_NCCL
static void prepare_nccl(group *g) { MUST(ncclGetUniqueId(&g->id) == ncclSuccess); }

static void group_of(seat *s, moe_comm **comm, ncclComm_t nccl)
{
    moe_nccl_config c;
    GOOD(moe_nccl_config_init(&c, sizeof c));
    c.comm = nccl, c.timeout = 20;
    GOOD(moe_comm_create_nccl(comm, s->context, &c));
}

static void connect_over_nccl(seat *s)
{
    MUST(ncclCommInitRank(&s->nccl, s->g->ranks, s->g->id, s->rank) == ncclSuccess);
    group_of(s, &s->comm, s->nccl);
    if (!s->g->nodes) return;
    int node = s->rank % s->g->nodes, number = s->rank / s->g->nodes;
    MUST(ncclCommSplit(s->nccl, node, number, &s->node_nccl, NULL) == ncclSuccess);
    MUST(ncclCommSplit(s->nccl, number, node, &s->rail_nccl, NULL) == ncclSuccess);
    group_of(s, &s->node_comm, s->node_nccl);
    group_of(s, &s->rail_comm, s->rail_nccl);
}

static void leave_nccl(seat *s)
{
    ncclComm_t all[] = {s->node_nccl, s->rail_nccl, s->nccl};
    for (int i = 0; i < 3; i++)
        if (all[i]) MUST(ncclCommDestroy(all[i]) == ncclSuccess);
}
#else
static void prepare_nccl(group *g) { (void)g; }
static void connect_over_nccl(seat *s) { (void)s; }
static void leave_nccl(seat *s) { (void)s; }
#endif

/* ---- a rank ---------------------------------------------------------------------------------- */

static moe_status note(seat *s, int i, moe_status status)
{
    s->status[i] = status;
    (void)snprintf(s->error[i], sizeof s->error[i], "%s", status ? moe_last_error() : "");
    return status;
}

static void make_objects(seat *s, int64_t own)
{
    moe_gate_config g;
    moe_experts_config e;
    GOOD(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.init_std = 0.5;
    g.switch_weight = s->g->global ? 0.01 : 0;
    GOOD(moe_gate_create(&s->gate, s->context, &g));
    GOOD(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.num_experts = own, e.activation = MOE_ACTIVATION_SWIGLU;
    GOOD(moe_experts_create(&s->experts, s->context, &e));
}

static void make_layer(seat *s)
{
    const group *g = s->g;
    moe_layer_config l;
    GOOD(moe_layer_config_init(&l, sizeof l));
    l.gate = s->gate, l.experts = s->experts, l.comm = s->comm;
    if (g->padded_rows) l.exchange = MOE_EXCHANGE_PADDED, l.padded_rows = g->padded_rows;
    static const int64_t OTHERS[E] = {3, 2, 1, 0}; /* so that rows travel on one rank too */
    if (g->ranks == 1 && s->comm) l.placement = OTHERS;
    if (g->global) l.loss_batch = MOE_BATCH_GLOBAL;
    l.node_comm = s->node_comm, l.rail_comm = s->rail_comm;
    GOOD(moe_layer_create(&s->layer, &l));
    GOOD(moe_layer_init_parameters(s->layer, 1));
    GOOD(moe_pass_create(&s->pass, s->layer, NULL));
}

/* Arrays of `count` tokens from `first` on. */
static void make_arrays(seat *s, int first, int count)
{
    static _Thread_local float numbers[MOST * D];
    size_t bytes = (size_t)(count ? count : 1) * D * sizeof(float);
    fill(numbers, FIRST[MOST_RANKS] * D, 3);
    s->a.x = on_device(s->device, numbers + first * D, bytes);
    fill(numbers, FIRST[MOST_RANKS] * D, 4);
    s->a.dy = on_device(s->device, numbers + first * D, bytes);
    s->a.y = on_device(s->device, NULL, bytes), s->a.dx = on_device(s->device, NULL, bytes);
    CUDA(cudaSetDevice(s->device));
    CUDA(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking));
}

static void drop_seat(seat *s)
{
    moe_pass_destroy(s->pass), moe_layer_destroy(s->layer), moe_experts_destroy(s->experts);
    moe_comm_destroy(s->node_comm), moe_comm_destroy(s->rail_comm);
    moe_gate_destroy(s->gate), moe_comm_destroy(s->comm), moe_context_destroy(s->context);
    free_arrays(&s->a);
    CUDA(cudaStreamDestroy(s->stream));
    leave_nccl(s);
}

static void connect_devices(seat *s)
{
    group *g = s->g;
    s->comm = device_world_connect(g->devices, s->context, s->rank, 20);
    if (!g->nodes) return;
    int node = s->rank % g->nodes, number = s->rank / g->nodes;
    s->node_comm = device_world_connect(g->node_devices[node], s->context, number, 20);
    s->rail_comm = device_world_connect(g->rail_devices[number], s->context, node, 20);
}

static moe_status forward_of(seat *s, int tokens)
{
    moe_forward_args f = forward_args(&s->a, tokens, MOE_FORWARD_TRAIN, s->stream);
    f.token_first = FIRST[s->rank];
    return moe_layer_forward(s->layer, s->pass, &f);
}

static moe_status backward_of(seat *s)
{
    moe_backward_args b;
    GOOD(moe_backward_args_init(&b, sizeof b));
    b.dy = s->a.dy, b.dx = s->a.dx, b.flags = MOE_BACKWARD_OVERWRITE, b.stream = s->stream;
    return moe_layer_backward(s->layer, s->pass, &b);
}

static moe_status losses_at(seat *s)
{
    moe_losses l;
    GOOD(moe_losses_init(&l, sizeof l));
    return moe_pass_losses(s->pass, &l);
}

static void *seat_thread(void *argument)
{
    seat *s = argument;
    group *g = s->g;
    int64_t own = E / g->ranks + (s->rank < E % g->ranks);
    s->device = is_over_nccl(g) ? s->rank : s->rank % 2;
    CUDA(cudaSetDevice(s->device));
    s->context = context_of(s->device);
    if (is_over_nccl(g))
        connect_over_nccl(s);
    else if (g->transport == DIRECT)
        connect_devices(s);
    else
        GOOD(moe_comm_create_in_world(&s->comm, g->world, s->context, s->rank, 20));
    MUST(s->comm);
    make_objects(s, own);
    make_layer(s);
    make_arrays(s, FIRST[s->rank], TOKENS[s->rank]);
    g->run(s);
    return NULL;
}

static void make_devices(group *g, moe_context *context)
{
    g->devices = device_world_create(context, g->ranks);
    for (int n = 0; n < g->nodes; n++)
        g->node_devices[n] = device_world_create(context, g->ranks / g->nodes);
    for (int l = 0; g->nodes && l < g->ranks / g->nodes; l++)
        g->rail_devices[l] = device_world_create(context, g->nodes);
}

static void run_group(group *g)
{
    pthread_t thread[MOST_RANKS];
    moe_context *context = NULL;
    GOOD(moe_context_create(&context, NULL));
    if (is_over_nccl(g)) prepare_nccl(g);
    if (g->transport == DIRECT)
        make_devices(g, context);
    else
        GOOD(moe_world_create(&g->world, context, g->ranks));
    for (int r = 0; r < g->ranks; r++) {
        g->seat[r] = (seat){.g = g, .rank = r};
        MUST(pthread_create(&thread[r], NULL, seat_thread, &g->seat[r]) == 0);
    }
    for (int r = 0; r < g->ranks; r++) MUST(pthread_join(thread[r], NULL) == 0);
    moe_context_destroy(context);
}

/* A rank that has failed does not wait for what others read of its memory: the host does. */
static void end_group(group *g)
{
    for (int r = 0; r < g->ranks; r++) CUDA(cudaStreamSynchronize(g->seat[r].stream));
    for (int r = 0; r < g->ranks; r++) drop_seat(&g->seat[r]);
    if (g->devices) device_world_destroy(g->devices);
    for (int i = 0; i < MOST_RANKS; i++) {
        if (g->node_devices[i]) device_world_destroy(g->node_devices[i]);
        if (g->rail_devices[i]) device_world_destroy(g->rail_devices[i]);
    }
    moe_world_destroy(g->world);
    nothing_left();
}

/* ---- the whole ------------------------------------------------------------------------------- */

/* One device with all tokens, a group for each rank. */
static void run_whole(seat *w, const group *g, int padded)
{
    static group alone;
    int64_t begin[MOST_RANKS + 1];
    alone = (group){.ranks = 1, .global = g->global, .padded_rows = padded};
    *w = (seat){.g = &alone};
    CUDA(cudaSetDevice(0));
    w->context = context_of(0);
    make_objects(w, E);
    make_layer(w);
    make_arrays(w, 0, FIRST[g->ranks]);
    for (int r = 0; r <= g->ranks; r++) begin[r] = FIRST[r];
    moe_forward_args f = forward_args(&w->a, FIRST[g->ranks], MOE_FORWARD_TRAIN, w->stream);
    f.groups = g->ranks, f.group_begin = begin;
    GOOD(moe_layer_forward(w->layer, w->pass, &f));
    GOOD(backward_of(w));
    CUDA(cudaStreamSynchronize(w->stream));
}

static void same(const float *a, const float *b, size_t count)
{
    float *here = malloc(2 * count * sizeof *here + 1);
    CUDA(cudaMemcpy(here, a, count * sizeof *here, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(here + count, b, count * sizeof *here, cudaMemcpyDeviceToHost));
    MUST(memcmp(here, here + count, count * sizeof *here) == 0);
    free(here);
}

/* y, dx and the experts' gradients of every rank are the bytes of the whole; with losses of all
 * ranks dx goes through sums over tokens. */
static void compare(group *g)
{
    seat w;
    moe_parameter_record all, own;
    run_whole(&w, g, 0);
    GOOD(moe_parameter_record_init(&all, sizeof all));
    GOOD(moe_parameter_record_init(&own, sizeof own));
    for (int r = 0; r < g->ranks; r++) {
        seat *s = &g->seat[r];
        size_t count = (size_t)TOKENS[r] * D, ahead = (size_t)FIRST[r] * D;
        CUDA(cudaStreamSynchronize(s->stream));
        if (count) same(s->a.y, w.a.y + ahead, count);
        if (count && !g->global) same(s->a.dx, w.a.dx + ahead, count);
        for (int64_t i = 0; i < moe_layer_parameter_count(s->layer); i++) {
            GOOD(moe_layer_parameter(s->layer, i, &own));
            GOOD(moe_layer_parameter(w.layer, i, &all));
            if (strncmp(own.name, "experts.w", 9) != 0) continue;
            int64_t each = all.element_count / E;
            for (int64_t e = 0; e < own.element_count / each; e++)
                same((float *)own.grad + e * each,
                     (float *)all.grad + moe_layer_expert_number(s->layer, e) * each, (size_t)each);
        }
    }
    drop_seat(&w);
}

static void run_step(seat *s)
{
    GOOD(forward_of(s, TOKENS[s->rank]));
    GOOD(backward_of(s));
    GOOD(moe_layer_reduce_gradients(s->layer, s->stream));
    GOOD(losses_at(s));
}

static void test_ranks_on_their_devices(void)
{
    for (uint64_t seed = 1; seed <= 2; seed++)
        for (int i = 0; i < 3 * TRANSPORTS * 2 * 2; i++) {
            static const int RANKS[] = {1, 2, 4};
            group g = {.ranks = RANKS[i % 3],
                       .transport = i / 3 % TRANSPORTS,
                       .padded_rows = i / 9 % 2 ? 26 : 0,
                       .global = i / 18,
                       .run = run_step};
            emu_set_seed(seed);
            run_group(&g);
            compare(&g);
            end_group(&g);
        }
}

/* Communicators of nodes and rails are split from that of all. */
static void test_ranks_by_way_of_nodes(void)
{
    for (int i = 0; i < 12; i++) {
        group g = {.ranks = 4,
                   .transport = i / 6 ? OVER_NCCL : DIRECT,
                   .nodes = 1 << i % 3,
                   .global = i / 3 % 2,
                   .run = run_step};
        emu_set_seed((uint64_t)i + 1);
        run_group(&g);
        compare(&g);
        end_group(&g);
    }
}

/* ---- calls ----------------------------------------------------------------------------------- */

static pthread_barrier_t all;

/* The second step of all ranks between start and stop of the recorder. */
static void run_recorded(seat *s)
{
    run_step(s);
    (void)pthread_barrier_wait(&all);
    if (s->rank == 0) emu_record_start();
    (void)pthread_barrier_wait(&all);
    GOOD(forward_of(s, TOKENS[s->rank]));
    GOOD(backward_of(s));
    (void)pthread_barrier_wait(&all);
    if (s->rank == 0) emu_record_stop();
}

static void record(group *g)
{
    MUST(pthread_barrier_init(&all, NULL, (unsigned)g->ranks) == 0);
    run_group(g);
    (void)pthread_barrier_destroy(&all);
    MUST(emu_count(EMU_CALL_SYNCHRONIZE) == 0 && emu_count(EMU_CALL_ALLOCATE) == 0);
    MUST(emu_count(EMU_CALL_ALLOCATE_HOST) == 0 && emu_count(EMU_CALL_FREE) == 0);
}

/* One copy of the rows of each expert and one wait for it, a table in each direction. */
static void test_exact_rows_wait_once(void)
{
    for (int ranks = 1; ranks <= 4; ranks *= 2) {
        group g = {.ranks = ranks, .transport = DIRECT, .run = run_recorded};
        record(&g);
        MUST(emu_count(EMU_CALL_FROM_DEVICE) == (uint64_t)ranks);
        MUST(emu_count_bytes(EMU_CALL_FROM_DEVICE) == (uint64_t)ranks * (E + 1) * 8);
        MUST(emu_count(EMU_CALL_TO_DEVICE) == 2 * (uint64_t)ranks);
        end_group(&g);
    }
}

/* By way of nodes also the tokens of each node are copied, behind the same work. */
static void test_rows_by_way_of_nodes_wait_twice(void)
{
    group g = {.ranks = 4, .transport = DIRECT, .nodes = 2, .run = run_recorded};
    record(&g);
    MUST(emu_count(EMU_CALL_FROM_DEVICE) == 2 * 4);
    MUST(emu_count_bytes(EMU_CALL_FROM_DEVICE) == 4 * ((E + 1) + (2 + 1)) * 8);
    MUST(emu_count(EMU_CALL_TO_DEVICE) == 2 * 4);
    end_group(&g);
}

/* Nothing is asked of a device but a word of each call, which nobody waits for. */
static void test_padded_rows_do_not_wait(void)
{
    for (int i = 0; i < 12; i++) {
        group g = {.ranks = 1 << i % 3,
                   .transport = i / 6 ? OVER_NCCL : DIRECT,
                   .padded_rows = 26,
                   .global = i / 3 % 2,
                   .run = run_recorded};
        record(&g);
        MUST(emu_count(EMU_CALL_QUERY) == 0 && emu_count(EMU_CALL_TO_DEVICE) == 0);
        MUST(emu_count(EMU_CALL_FROM_DEVICE) == 2 * (uint64_t)g.ranks);
        MUST(emu_count_bytes(EMU_CALL_FROM_DEVICE) == 2 * (uint64_t)g.ranks * 8);
        end_group(&g);
    }
}

/* ---- captures -------------------------------------------------------------------------------- */

static void run_captured(seat *s)
{
    cudaGraph_t graph;
    cudaGraphExec_t made;
    run_step(s); /* makes connections */
    GOOD(moe_pass_reserve(s->pass, TOKENS[0], 1, K));
    (void)pthread_barrier_wait(&all);
    CUDA(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeGlobal));
    GOOD(forward_of(s, TOKENS[s->rank]));
    GOOD(backward_of(s));
    CUDA(cudaStreamEndCapture(s->stream, &graph));
    (void)pthread_barrier_wait(&all);
    CUDA(cudaGraphInstantiate(&made, graph, 0));
    for (int i = 0; i < 2; i++) CUDA(cudaGraphLaunch(made, s->stream));
    CUDA(cudaStreamSynchronize(s->stream));
    GOOD(losses_at(s));
    CUDA(cudaGraphExecDestroy(made));
    CUDA(cudaGraphDestroy(graph));
}

static void test_padded_rows_in_a_graph(void)
{
    for (int i = 0; i < 6; i++) {
        if (i % 3 && !HAS_NCCL) continue; /* the other transports are for one capture */
        group g = {.ranks = 1 << i % 3,
                   .transport = i % 3 ? OVER_NCCL : DIRECT,
                   .padded_rows = 26,
                   .global = i / 3,
                   .run = run_captured};
        MUST(pthread_barrier_init(&all, NULL, (unsigned)g.ranks) == 0);
        run_group(&g);
        (void)pthread_barrier_destroy(&all);
        compare(&g);
        end_group(&g);
    }
}

static void run_refused_capture(seat *s)
{
    cudaGraph_t graph = NULL;
    run_step(s);
    CUDA(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeGlobal));
    MUST(forward_of(s, TOKENS[0]) == MOE_ERROR_INVALID_STATE && SAID("captured"));
    (void)cudaStreamEndCapture(s->stream, &graph);
    if (graph) CUDA(cudaGraphDestroy(graph));
}

static void test_exact_rows_refuse_a_capture(void)
{
    group g = {.ranks = 1, .transport = THROUGH_HOST, .run = run_refused_capture};
    run_group(&g);
    end_group(&g);
}

/* ---- calls that are refused ------------------------------------------------------------------ */

/* Rank 1 gets a forward, then a backward wrong; the others hear of it later, and all go on. */
static void run_declined(seat *s)
{
    int odd = s->rank == s->g->ranks - 1;
    (void)note(s, 0, forward_of(s, odd ? -1 : TOKENS[s->rank]));
    if (s->status[0] == MOE_OK) (void)note(s, 1, losses_at(s));
    (void)note(s, 2, backward_of(s));
    CUDA(cudaStreamSynchronize(s->stream));
    (void)note(s, 3, forward_of(s, TOKENS[s->rank])); /* done, and tells of the earlier one */
    GOOD(losses_at(s));
    GOOD(backward_of(s));
    run_step(s);
}

static void test_padded_rank_that_declines(void)
{
    for (int i = 0; i < 4; i++) {
        group g = {.ranks = 2 << i % 2,
                   .transport = DIRECT,
                   .padded_rows = 26,
                   .global = i / 2,
                   .run = run_declined};
        run_group(&g);
        for (int r = 0; r < g.ranks; r++) {
            const seat *s = &g.seat[r];
            char who[32];
            (void)snprintf(who, sizeof who, "rank %d failed: ", g.ranks - 1);
            if (r == g.ranks - 1) {
                MUST(s->status[0] == MOE_ERROR_INVALID_ARGUMENT &&
                     strstr(s->error[0], "tokens is -1"));
                MUST(s->status[2] == MOE_ERROR_INVALID_STATE && s->status[3] == MOE_OK);
                continue;
            }
            MUST(s->status[0] == MOE_OK && s->status[1] == MOE_ERROR_INVALID_ARGUMENT);
            MUST(strstr(s->error[1], who) && s->status[2] == MOE_ERROR_INVALID_ARGUMENT);
            MUST(s->status[3] == MOE_ERROR_INVALID_STATE && strstr(s->error[3], who));
        }
        compare(&g);
        end_group(&g);
    }
}

static void run_tight(seat *s)
{
    (void)note(s, 0, forward_of(s, TOKENS[s->rank]));
    (void)note(s, 1, losses_at(s));
    CUDA(cudaStreamSynchronize(s->stream));
    (void)note(s, 2, backward_of(s));
    (void)note(s, 3, losses_at(s));
}

/* With room for one row of each expert from each rank. */
static void test_padded_rows_that_do_not_fit(void)
{
    group g = {.ranks = 4, .transport = DIRECT, .padded_rows = 1, .run = run_tight};
    run_group(&g);
    for (int r = 0; r < g.ranks; r++) {
        const seat *s = &g.seat[r];
        MUST(s->status[0] == MOE_OK && s->status[1] == MOE_ERROR_BUFFER_TOO_SMALL);
        MUST(s->status[2] == MOE_ERROR_BUFFER_TOO_SMALL && s->status[3] == MOE_OK);
        MUST(strstr(s->error[1], TOKENS[r] ? "padded_rows, which is 1" : "failed: "));
    }
    end_group(&g);
}

/* ---- a rank on a CPU ------------------------------------------------------------------------- */

/* Rank 1 has no device: its rows are shorter. */
static void run_without_device(seat *s)
{
    moe_context *device = s->context;
    moe_layer_config l;
    moe_layer *layer = NULL;
    if (s->rank == 1) {
        moe_experts_destroy(s->experts), moe_gate_destroy(s->gate), moe_comm_destroy(s->comm);
        s->experts = NULL, s->gate = NULL, s->comm = NULL;
        GOOD(moe_context_create(&s->context, NULL));
        GOOD(moe_comm_create_in_world(&s->comm, s->g->other, s->context, 1, 20));
        make_objects(s, E / 2);
    } else {
        moe_comm_destroy(s->comm);
        GOOD(moe_comm_create_in_world(&s->comm, s->g->other, s->context, 0, 20));
    }
    GOOD(moe_layer_config_init(&l, sizeof l));
    l.gate = s->gate, l.experts = s->experts, l.comm = s->comm;
    (void)note(s, 0, moe_layer_create(&layer, &l));
    if (s->rank == 1) moe_context_destroy(device);
}

static void test_rank_on_a_cpu(void)
{
    group g = {.ranks = 2, .transport = THROUGH_HOST, .run = run_without_device};
    moe_context *context = NULL;
    GOOD(moe_context_create(&context, NULL));
    GOOD(moe_world_create(&g.other, context, 2));
    run_group(&g);
    for (int r = 0; r < 2; r++) {
        MUST(g.seat[r].status[0] == MOE_ERROR_INVALID_ARGUMENT);
        MUST(strstr(g.seat[r].error[0], "is 0 on rank 1 and 1 on rank 0"));
    }
    moe_world_destroy(g.other), moe_context_destroy(context);
    end_group(&g);
}

/* ---- transports that fail -------------------------------------------------------------------- */

/* Rank 1 cannot send its rows: nobody waits for it longer than that. */
static void run_failing(seat *s)
{
    run_step(s);
    (void)pthread_barrier_wait(&all);
    if (s->rank == 1) device_world_fail(s->g->devices, 1);
    (void)pthread_barrier_wait(&all);
    (void)note(s, 0, forward_of(s, TOKENS[s->rank]));
    (void)note(s, 1, backward_of(s));
}

static void test_exchange_that_fails(void)
{
    for (int padded = 0; padded < 2; padded++) {
        group g = {.ranks = 2, .transport = DIRECT, .padded_rows = padded * 26, .run = run_failing};
        MUST(pthread_barrier_init(&all, NULL, 2) == 0);
        run_group(&g);
        (void)pthread_barrier_destroy(&all);
        for (int r = 0; r < g.ranks; r++) {
            MUST(g.seat[r].status[0] == MOE_ERROR_TRANSPORT);
            MUST(g.seat[r].status[1] == MOE_ERROR_INVALID_STATE ||
                 g.seat[r].status[1] == MOE_ERROR_TRANSPORT);
        }
        end_group(&g);
    }
}

/* ---- calls of CUDA that fail ----------------------------------------------------------------- */

static const char *failing_call;
static int failing_number;

/* Some rank's n-th call fails; every rank returns long before the timeout. */
static void run_with_a_failure(seat *s)
{
    (void)pthread_barrier_wait(&all);
    if (s->rank == 0) emu_fail(failing_call, failing_number, cudaErrorInvalidValue);
    (void)pthread_barrier_wait(&all);
    time_t begin = time(NULL);
    (void)note(s, 0, forward_of(s, TOKENS[s->rank]));
    (void)note(s, 1, backward_of(s));
    (void)note(s, 2, moe_layer_reduce_gradients(s->layer, s->stream));
    MUST(time(NULL) - begin < 15);
    (void)pthread_barrier_wait(&all);
    if (s->rank == 0) emu_fail(failing_call, 0, 0);
}

static void fail_at(const char *call, int number, int transport, int padded)
{
    group g = {.ranks = 2,
               .transport = transport,
               .padded_rows = padded * 26,
               .global = number % 2,
               .run = run_with_a_failure};
    int failed = 0;
    failing_call = call, failing_number = number;
    MUST(pthread_barrier_init(&all, NULL, 2) == 0);
    run_group(&g);
    (void)pthread_barrier_destroy(&all);
    for (int i = 0; i < 6; i++) failed += g.seat[i % 2].status[i / 2] != MOE_OK;
    MUST(failed > 0 || number > 1);
    end_group(&g);
}

static void test_calls_that_fail(void)
{
    static const char *const CALLS[] = {"cudaMemcpyAsync", "kernel", "cudaEventRecord",
                                        "cublasGemmEx"};
    static const int NUMBERS[] = {1, 3, 8, 21, 40};
    for (int i = 0; i < 4 * 5; i++)
        for (int way = 0; way < 4; way++)
            if (strcmp(CALLS[i % 4], "cublasGemmEx") != 0 || way % 2 == 0) /* padded: another */
                fail_at(CALLS[i % 4], NUMBERS[i / 4], way / 2, way % 2);
}

int main(int count, char **arguments)
{
    (void)setenv("MOE_EMULATION_DEVICES", "8", 1);
    static const host_test TESTS[] = {
        {"ranks on their devices", test_ranks_on_their_devices},
        {"ranks by way of nodes", test_ranks_by_way_of_nodes},
        {"exact rows wait once", test_exact_rows_wait_once},
        {"rows by way of nodes wait twice", test_rows_by_way_of_nodes_wait_twice},
        {"padded rows do not wait", test_padded_rows_do_not_wait},
        {"padded rows in a graph", test_padded_rows_in_a_graph},
        {"exact rows refuse a capture", test_exact_rows_refuse_a_capture},
        {"padded rank that declines", test_padded_rank_that_declines},
        {"padded rows that do not fit", test_padded_rows_that_do_not_fit},
        {"rank on a CPU", test_rank_on_a_cpu},
        {"exchange that fails", test_exchange_that_fails},
        {"calls that fail", test_calls_that_fail}};
    return run_host_tests(TESTS, sizeof TESTS / sizeof *TESTS, count, arguments);
}
