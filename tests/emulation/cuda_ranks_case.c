/* cuda_ranks_case.c - cuda_ranks_case.h. */
#include "cuda_ranks_case.h"

const int TOKENS[MOST_RANKS] = {13, 0, 7, 6}, FIRST[MOST_RANKS + 1] = {0, 13, 13, 20, 26};

/* ---- NCCL ------------------------------------------------------------------------------------ */

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

moe_status note(seat *s, int i, moe_status status)
{
    s->status[i] = status;
    (void)snprintf(s->error[i], sizeof s->error[i], "%s", status ? moe_last_error() : "");
    return status;
}

void make_objects(seat *s, int64_t own)
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
    e.num_experts = 1;
    if (s->g->branches) GOOD(moe_experts_create(&s->shared, s->context, &e));
    if (s->g->branches) GOOD(moe_experts_create(&s->residual, s->context, &e));
}

void make_layer(seat *s)
{
    const group *g = s->g;
    moe_layer_config l;
    GOOD(moe_layer_config_init(&l, sizeof l));
    l.gate = s->gate, l.experts = s->experts, l.comm = s->comm;
    l.shared = s->shared, l.residual = s->residual;
    l.shared_gate = l.residual_mix = g->branches;
    if (g->chunks) l.exchange_chunks = g->chunks;
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
void make_arrays(seat *s, int first, int count)
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
    if (s->g->beside == 1 || (s->g->beside == 2 && s->rank % 2))
        CUDA(cudaStreamCreateWithFlags(&s->beside, cudaStreamNonBlocking));
}

void set_beside(const seat *s, moe_pass *pass)
{
    moe_cuda_pass_config c;
    GOOD(moe_cuda_pass_config_init(&c, sizeof c));
    c.exchange_stream = s->beside;
    GOOD(moe_cuda_pass_set(pass, &c));
}

static void drop_seat(seat *s)
{
    moe_pass_destroy(s->pass), moe_layer_destroy(s->layer), moe_experts_destroy(s->experts);
    moe_experts_destroy(s->shared), moe_experts_destroy(s->residual);
    moe_comm_destroy(s->node_comm), moe_comm_destroy(s->rail_comm);
    moe_gate_destroy(s->gate), moe_comm_destroy(s->comm), moe_context_destroy(s->context);
    free_arrays(&s->a);
    CUDA(cudaStreamDestroy(s->stream));
    if (s->beside) CUDA(cudaStreamDestroy(s->beside));
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

moe_forward_args forward_args_of(const seat *s, int tokens)
{
    moe_forward_args f = forward_args(&s->a, tokens, MOE_FORWARD_TRAIN, s->stream);
    f.token_first = FIRST[s->rank];
    return f;
}

moe_backward_args backward_args_of(const seat *s)
{
    moe_backward_args b;
    GOOD(moe_backward_args_init(&b, sizeof b));
    b.dy = s->a.dy, b.dx = s->a.dx, b.flags = MOE_BACKWARD_OVERWRITE, b.stream = s->stream;
    return b;
}

moe_status forward_of(seat *s, int tokens)
{
    moe_forward_args f = forward_args_of(s, tokens);
    return moe_layer_forward(s->layer, s->pass, &f);
}

moe_status backward_of(seat *s)
{
    moe_backward_args b = backward_args_of(s);
    return moe_layer_backward(s->layer, s->pass, &b);
}

moe_status losses_at(seat *s)
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
    if (s->beside) set_beside(s, s->pass);
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

void run_group(group *g)
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
void end_group(group *g)
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
    alone = (group){.ranks = 1, .global = g->global, .padded_rows = padded, .branches = g->branches};
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

void same(const float *a, const float *b, size_t count)
{
    float *here = malloc(2 * count * sizeof *here + 1);
    CUDA(cudaMemcpy(here, a, count * sizeof *here, cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(here + count, b, count * sizeof *here, cudaMemcpyDeviceToHost));
    MUST(memcmp(here, here + count, count * sizeof *here) == 0);
    free(here);
}

void compare(group *g)
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

void run_step(seat *s)
{
    GOOD(forward_of(s, TOKENS[s->rank]));
    GOOD(backward_of(s));
    GOOD(moe_layer_reduce_gradients(s->layer, s->stream));
    GOOD(losses_at(s));
}

/* ---- calls in turn, and what was done -------------------------------------------------------- */

pthread_barrier_t meeting;

void run_with_barrier(group *g)
{
    MUST(pthread_barrier_init(&meeting, NULL, (unsigned)g->ranks) == 0);
    run_group(g);
    (void)pthread_barrier_destroy(&meeting);
}

/* The stream of the calls has been waited for: nothing is left on the other. */
void check_joined(const seat *s)
{
    CUDA(cudaStreamSynchronize(s->stream));
    CUDA(cudaStreamQuery(s->beside));
}

/* The phases of a forward, and of a backward. */
moe_status start_call(seat *s, int backward)
{
    moe_forward_args f = forward_args_of(s, TOKENS[s->rank]);
    moe_backward_args b = backward_args_of(s);
    return backward ? moe_layer_backward_start(s->layer, s->pass, &b)
                    : moe_layer_forward_start(s->layer, s->pass, &f);
}
moe_status work_call(seat *s, int backward)
{
    return backward ? moe_layer_backward_work(s->layer, s->pass)
                    : moe_layer_forward_work(s->layer, s->pass);
}
moe_status finish_call(seat *s, int backward)
{
    return backward ? moe_layer_backward_finish(s->layer, s->pass)
                    : moe_layer_forward_finish(s->layer, s->pass);
}

/* Kernels, products and copies that a stream was given since emu_record_start, from call number
 * `from` on; to_wait: up to its next wait for another stream. No other thread calls anything. */
size_t given(const void *stream, size_t from, int to_wait)
{
    const struct emu_call *list;
    size_t calls = emu_calls(&list), count = 0;
    for (size_t i = from; i < calls; i++) {
        if (list[i].stream != stream) continue;
        if (to_wait && list[i].kind == EMU_CALL_WAIT) break;
        count += list[i].kind <= EMU_CALL_SET;
    }
    return count;
}

size_t calls_so_far(void)
{
    const struct emu_call *list;
    return emu_calls(&list);
}

void run_twice(seat *s)
{
    for (int i = 0; i < 2; i++) {
        run_step(s);
        check_joined(s);
    }
}

void run_in_order(seat *s)
{
    run_step(s);
    (void)pthread_barrier_wait(&meeting);
    if (s->rank == 0) emu_record_start();
    (void)pthread_barrier_wait(&meeting);
    GOOD(forward_of(s, TOKENS[s->rank]));
    GOOD(backward_of(s));
    (void)pthread_barrier_wait(&meeting);
    if (s->rank == 0) emu_record_stop();
}

void run_captured(seat *s)
{
    cudaGraph_t graph;
    cudaGraphExec_t made;
    run_step(s); /* makes connections */
    GOOD(moe_pass_reserve(s->pass, TOKENS[0], 1, K));
    (void)pthread_barrier_wait(&meeting);
    CUDA(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeGlobal));
    GOOD(forward_of(s, TOKENS[s->rank]));
    GOOD(backward_of(s));
    CUDA(cudaStreamEndCapture(s->stream, &graph));
    (void)pthread_barrier_wait(&meeting);
    CUDA(cudaGraphInstantiate(&made, graph, 0));
    for (int i = 0; i < 2; i++) CUDA(cudaGraphLaunch(made, s->stream));
    CUDA(cudaStreamSynchronize(s->stream));
    GOOD(losses_at(s));
    CUDA(cudaGraphExecDestroy(made));
    CUDA(cudaGraphDestroy(graph));
}
