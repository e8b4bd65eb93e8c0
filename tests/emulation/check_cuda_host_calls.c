/* check_cuda_host_calls.c - what a call on a GPU can be given, against the CPU: plans of every
 * kind, gates that count, bound parameters, cuBLAS and memory of the host. */
#include "cuda_host.h"

#include <unistd.h>

/* ---- everything a call can be given, against the CPU ----------------------------------------- */

/* Arrays in the memory of a context. */
typedef struct place {
    moe_context *context;
    bool gpu;
    void *stream;
    void *array[64];
    int arrays;
    float kept[16][MOST * D]; /* what came out */
    int outs;
} place;

static void *put(place *p, const void *from, size_t bytes)
{
    void *to = p->gpu ? on_device(0, NULL, bytes) : malloc(bytes);
    MUST(to && p->arrays < 64);
    if (from && p->gpu) upload(to, from, bytes);
    if (from && !p->gpu) memcpy(to, from, bytes);
    return p->array[p->arrays++] = to;
}

static float *put_floats(place *p, int count, int salt)
{
    float host[MOST * D];
    fill(host, count, salt);
    return put(p, host, (size_t)count * sizeof(float));
}

static void keep(place *p, const float *from, int count)
{
    float *to = p->kept[p->outs++];
    if (p->gpu) CUDA(cudaStreamSynchronize((cudaStream_t)p->stream));
    if (p->gpu) CUDA(cudaMemcpy(to, from, (size_t)count * sizeof(float), cudaMemcpyDeviceToHost));
    if (!p->gpu) memcpy(to, from, (size_t)count * sizeof(float));
}

/* Backward of the last forward, its x elsewhere by now, dx added to. */
static void back(place *p, model *m, const float *x, float *weights)
{
    moe_backward_args b;
    float *dx = put_floats(p, T * D, 11);
    GOOD(moe_backward_args_init(&b, sizeof b));
    b.dx = dx, b.dy = put_floats(p, T * D, 12), b.x = x, b.stream = p->stream;
    b.flags = MOE_BACKWARD_ADD_DX, b.entry_weight_grad = weights;
    GOOD(moe_layer_backward(m->layer, m->pass, &b));
    keep(p, dx, T * D);
}

static void replays(place *p, int options)
{
    model m;
    moe_pass *first;
    moe_plan *built = NULL, *copied = NULL;
    const moe_plan *shown;
    moe_plan_args a;
    double norm;
    int64_t groups[3] = {0, 5, T};
    int32_t ids[T * K];
    uint8_t mask[T];
    for (int i = 0; i < T * K; i++) ids[i] = i % 7 == 3 ? -1 : (i * i + i / 3) % E;
    for (int t = 0; t < T; t++) mask[t] = t % 5 != 2;
    make(&m, p->context, options);
    first = m.pass;
    moe_forward_args f;
    GOOD(moe_forward_args_init(&f, sizeof f));
    float *x = put_floats(p, T * D, 1), *moved = put_floats(p, T * D, 1);
    float *y = put_floats(p, T * D, 2), *weights = put_floats(p, T * K, 3);
    f.tokens = T, f.x = x, f.y = y, f.stream = p->stream;
    f.flags = MOE_FORWARD_ADD, f.group_begin = groups, f.groups = 2;
    f.token_mask = put(p, mask, sizeof mask);
    GOOD(moe_layer_forward(m.layer, m.pass, &f));
    keep(p, y, T * D);
    back(p, &m, moved, NULL);
    GOOD(moe_pass_plan(m.pass, &shown));
    GOOD(moe_plan_create(&copied, m.context));
    GOOD(moe_plan_create(&built, m.context));
    GOOD(moe_plan_copy(copied, shown));
    /* The own plan, for the gate's weights; then with its weights in another pass. */
    f.flags = MOE_FORWARD_NO_SAVE, f.plan = shown, f.plan_use = MOE_PLAN_IDS;
    GOOD(moe_layer_forward(m.layer, m.pass, &f));
    keep(p, y, T * D);
    GOOD(moe_pass_create(&m.pass, m.layer, NULL));
    GOOD(moe_pass_plan(first, &shown));
    f.flags = 0, f.plan = shown, f.plan_use = MOE_PLAN_IDS_AND_WEIGHTS, f.group_begin = NULL;
    GOOD(moe_layer_forward_start(m.layer, m.pass, &f));
    moe_losses l;
    GOOD(moe_losses_init(&l, sizeof l));
    MUST(moe_pass_losses(m.pass, &l) == MOE_ERROR_INVALID_STATE);
    MUST(moe_layer_forward(m.layer, m.pass, &f) == MOE_ERROR_INVALID_STATE);
    MUST(moe_pass_trim(m.pass) == MOE_ERROR_INVALID_STATE);
    MUST(moe_layer_backward_work(m.layer, m.pass) == MOE_ERROR_INVALID_STATE);
    GOOD(moe_layer_forward_work(m.layer, m.pass));
    GOOD(moe_layer_forward_finish(m.layer, m.pass));
    keep(p, y, T * D);
    back(p, &m, moved, weights);
    keep(p, weights, T * K);
    /* One of the host, with drops; and one that was loaded. */
    GOOD(moe_plan_args_init(&a, sizeof a));
    a.tokens = T, a.num_experts = E, a.top_k = K, a.capacity = 3;
    a.expert_ids = put(p, ids, sizeof ids), a.token_mask = put(p, mask, sizeof mask);
    a.weights = put_floats(p, T * K, 8);
    GOOD(moe_plan_build(built, &a));
    GOOD(moe_plan_check(built));
    f.plan = built, f.groups = 0;
    GOOD(moe_layer_forward(m.layer, m.pass, &f));
    keep(p, y, T * D);
    back(p, &m, NULL, weights);
    keep(p, weights, T * K);
    GOOD(moe_plan_check(copied));
    f.plan = copied, f.groups = 2, f.plan_use = MOE_PLAN_IDS;
    GOOD(moe_layer_forward(m.layer, m.pass, &f));
    keep(p, y, T * D);
    GOOD(moe_layer_gradient_norm(m.layer, &norm, p->stream));
    p->kept[p->outs++][0] = (float)norm;
    GOOD(moe_layer_zero_touched_gradients(m.layer, p->stream));
    GOOD(moe_layer_gradient_norm(m.layer, &norm, p->stream));
    MUST(norm == 0);
    moe_pass_destroy(first);
    moe_plan_destroy(copied);
    moe_plan_destroy(built);
    drop(&m);
    for (int i = 0; i < p->arrays; i++)
        if (p->gpu)
            CUDA(cudaFree(p->array[i]));
        else
            free(p->array[i]);
}

static void test_replays(void)
{
    static place cpu, gpu;
    for (uint64_t seed = 1; seed <= 4; seed++) {
        int options = seed % 2 ? SHARED : seed == 2 ? PADDED : PADDED | SHARED;
        cudaStream_t stream;
        emu_set_seed(seed);
        CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        memset(&cpu, 0, sizeof cpu);
        memset(&gpu, 0, sizeof gpu);
        GOOD(moe_context_create(&cpu.context, NULL));
        gpu.context = context_of(0), gpu.gpu = true, gpu.stream = stream;
        replays(&cpu, options & ~PADDED);
        replays(&gpu, options);
        MUST(cpu.outs == gpu.outs);
        for (int o = 0; o < cpu.outs; o++)
            for (int i = 0; i < MOST * D; i++)
                MUST(fabsf(cpu.kept[o][i] - gpu.kept[o][i]) <= 1e-5f * (1 + fabsf(cpu.kept[o][i])));
        CUDA(cudaStreamDestroy(stream));
        nothing_left();
    }
}

/* Gates whose entries are counted first, or that have two levels; a gate alone. */
static void route(place *p, int kind, bool train)
{
    moe_gate_config g;
    moe_gate *gate;
    moe_pass *pass;
    moe_forward_args f;
    moe_backward_args b;
    moe_plan *copied = NULL;
    const moe_plan *shown;
    moe_plan_view v;
    uint8_t mask[T];
    int64_t groups[3] = {0, 6, T};
    for (int t = 0; t < T; t++) mask[t] = t % 4 != 1;
    GOOD(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.init_std = 0.5, g.kind = kind;
    if (kind == MOE_GATE_HIERARCHICAL)
        g.expert_groups = 2, g.top_groups = 2, g.top_k = 1;
    else if (kind == MOE_GATE_BALANCED || kind == MOE_GATE_EXPERT_CHOICE)
        g.capacity_kind = MOE_CAPACITY_FACTOR, g.capacity_factor = 1;
    else
        g.switch_weight = 0.1;
    GOOD(moe_gate_create(&gate, p->context, &g));
    GOOD(moe_gate_init_parameters(gate, 3));
    GOOD(moe_pass_create_for_gate(&pass, gate, NULL));
    GOOD(moe_forward_args_init(&f, sizeof f));
    f.tokens = T, f.x = put_floats(p, T * D, 1), f.stream = p->stream;
    f.token_mask = put(p, mask, sizeof mask);
    f.group_begin = groups, f.groups = 2;
    f.flags = train ? MOE_FORWARD_TRAIN : 0;
    GOOD(moe_gate_forward(gate, pass, &f));
    GOOD(moe_pass_plan(pass, &shown));
    GOOD(moe_plan_check(shown));
    GOOD(moe_plan_view_init(&v, sizeof v));
    GOOD(moe_plan_get(shown, &v));
    p->kept[p->outs++][0] = (float)v.rows;
    GOOD(moe_plan_create(&copied, p->context));
    GOOD(moe_plan_copy(copied, shown));
    keep(p, v.weight_of_entry, (int)v.entries);
    moe_losses l;
    GOOD(moe_losses_init(&l, sizeof l));
    GOOD(moe_pass_losses(pass, &l));
    p->kept[p->outs++][0] = (float)l.total;
    if (kind == MOE_GATE_HIERARCHICAL) {
        GOOD(moe_pass_primary_plan(pass, &shown));
        GOOD(moe_plan_check(shown));
        GOOD(moe_plan_get(shown, &v));
        keep(p, v.weight_of_entry, (int)v.entries);
    }
    f.plan = copied, f.plan_use = MOE_PLAN_IDS;
    GOOD(moe_gate_forward(gate, pass, &f));
    float *weights = put_floats(p, MOST * D, 5), *dx = put_floats(p, T * D, 6);
    GOOD(moe_backward_args_init(&b, sizeof b));
    b.entry_weight_grad = weights, b.dx = dx, b.stream = p->stream;
    GOOD(moe_gate_backward(gate, pass, &b));
    keep(p, dx, T * D);
    moe_plan_destroy(copied);
    moe_pass_destroy(pass);
    moe_gate_destroy(gate);
}

static void end_place(place *p)
{
    moe_context_destroy(p->context);
    for (int i = 0; i < p->arrays; i++)
        if (p->gpu)
            CUDA(cudaFree(p->array[i]));
        else
            free(p->array[i]);
    p->arrays = 0;
}

static void start_places(place *cpu, place *gpu, cudaStream_t stream)
{
    memset(cpu, 0, sizeof *cpu);
    memset(gpu, 0, sizeof *gpu);
    GOOD(moe_context_create(&cpu->context, NULL));
    gpu->context = context_of(0), gpu->gpu = true, gpu->stream = stream;
}

static void compare_places(const place *cpu, const place *gpu)
{
    MUST(cpu->outs == gpu->outs);
    for (int o = 0; o < cpu->outs; o++)
        for (int i = 0; i < MOST * D; i++)
            MUST(fabsf(cpu->kept[o][i] - gpu->kept[o][i]) <= 1e-5f * (1 + fabsf(cpu->kept[o][i])));
}

static void test_gates_that_count(void)
{
    static place cpu, gpu;
    static const int kind[] = {MOE_GATE_HIERARCHICAL, MOE_GATE_BALANCED, MOE_GATE_EXPERT_CHOICE,
                               MOE_GATE_NOISY_TOP_K, MOE_GATE_SINKHORN};
    for (size_t k = 0; k < sizeof kind / sizeof *kind; k++)
        for (int train = 0; train < 2; train++) {
            cudaStream_t stream;
            emu_set_seed(k + 1);
            CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
            start_places(&cpu, &gpu, stream);
            route(&cpu, kind[k], train);
            route(&gpu, kind[k], train);
            compare_places(&cpu, &gpu);
            end_place(&cpu);
            end_place(&gpu);
            CUDA(cudaStreamDestroy(stream));
            nothing_left();
        }
}

/* One pointer for each expert, strides that go back, a gradient that is not wanted. */
static void bound(place *p)
{
    model m;
    moe_binding b;
    double norm;
    float *w1[E], *g1[E], host[MOST * D];
    make(&m, p->context, 0);
    fill(host, D * F, 1);
    for (int e = 0; e < E; e++) {
        w1[e] = put(p, host, D * F * sizeof(float));
        g1[e] = e == 1 ? NULL : put(p, host, D * F * sizeof(float));
    }
    GOOD(moe_binding_init(&b, sizeof b));
    b.data_per_expert = (const void *const *)w1, b.grad_per_expert = (void *const *)g1;
    GOOD(moe_layer_bind(m.layer, moe_layer_parameter_find(m.layer, "experts.w1"), &b));
    GOOD(moe_binding_init(&b, sizeof b));
    float *w2 = put(p, NULL, E * D * F * sizeof(float)),
          *g2 = put(p, NULL, E * D * F * sizeof(float));
    float big[E * D * F];
    for (int i = 0; i < E * D * F; i++) big[i] = (float)(i % 13) / 13 - 0.5f;
    if (p->gpu) upload(w2, big, sizeof big);
    if (!p->gpu) memcpy(w2, big, sizeof big);
    b.data = w2 + (E - 1) * F * D, b.grad = g2 + (E - 1) * F * D;
    b.data_stride[0] = b.grad_stride[0] = -F * D;
    b.data_stride[1] = b.grad_stride[1] = 1, b.data_stride[2] = b.grad_stride[2] = F;
    GOOD(moe_layer_bind(m.layer, moe_layer_parameter_find(m.layer, "experts.w2"), &b));
    GOOD(moe_layer_init_parameters(m.layer, 1)); /* of what is owned */
    GOOD(moe_layer_zero_gradients(m.layer, p->stream));
    GOOD(moe_layer_gradient_norm(m.layer, &norm, p->stream));
    MUST(norm == 0);
    moe_forward_args f;
    GOOD(moe_forward_args_init(&f, sizeof f));
    float *y = put(p, NULL, T * D * sizeof(float));
    f.tokens = T, f.x = put_floats(p, T * D, 1), f.y = y, f.stream = p->stream;
    GOOD(moe_layer_forward(m.layer, m.pass, &f));
    keep(p, y, T * D);
    back(p, &m, NULL, NULL);
    GOOD(moe_layer_gradient_norm(m.layer, &norm, p->stream));
    p->kept[p->outs++][0] = (float)norm;
    keep(p, g1[0], D * F);
    keep(p, g2, D * F);
    moe_pass_destroy(m.pass);
    moe_layer_destroy(m.layer);
    moe_experts_destroy(m.experts);
    moe_gate_destroy(m.gate);
}

static void test_bound_parameters(void)
{
    static place cpu, gpu;
    cudaStream_t stream;
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    start_places(&cpu, &gpu, stream);
    bound(&cpu);
    bound(&gpu);
    compare_places(&cpu, &gpu);
    end_place(&cpu);
    end_place(&gpu);
    CUDA(cudaStreamDestroy(stream));
    nothing_left();
}

/* A handle and a workspace of the host, and its own again. */
static void test_cublas_of_the_host(void)
{
    model m;
    cublasHandle_t handle;
    moe_cuda_pass_config c;
    void *workspace = on_device(0, NULL, 1 << 16);
    make(&m, context_of(0), SHARED);
    arrays a = arrays_on(0, T, 2);
    MUST(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS);
    GOOD(moe_cuda_pass_config_init(&c, sizeof c));
    for (int i = 0; i < 4; i++) {
        c.cublas = i & 1 ? handle : NULL;
        c.workspace = i & 2 ? workspace : NULL, c.workspace_bytes = i & 2 ? 1 << 16 : 0;
        GOOD(moe_cuda_pass_set(m.pass, &c));
        MUST(cublasSetPointerMode(handle, CUBLAS_POINTER_MODE_DEVICE) == CUBLAS_STATUS_SUCCESS);
        GOOD(forward(&m, &a, T, 0, NULL));
        GOOD(backward(&m, &a, NULL));
        same_as_cpu(&a, T, 2, SHARED);
    }
    MUST(moe_cuda_pass_set(NULL, &c) == MOE_ERROR_INVALID_ARGUMENT && SAID("pass is NULL"));
    c.workspace = (char *)workspace + 64;
    MUST(moe_cuda_pass_set(m.pass, &c) == MOE_ERROR_INVALID_ARGUMENT && SAID("aligned"));
    c.workspace = NULL;
    MUST(moe_cuda_pass_set(m.pass, &c) == MOE_ERROR_INVALID_ARGUMENT && SAID("workspace is NULL"));
    c.struct_size = 3;
    MUST(moe_cuda_pass_set(m.pass, &c) == MOE_ERROR_STRUCT_SIZE);
    GOOD(moe_cuda_pass_set(m.pass, NULL));
    MUST(cublasDestroy(handle) == CUBLAS_STATUS_SUCCESS);
    CUDA(cudaFree(workspace));
    GOOD(forward(&m, &a, T, 0, NULL));
    GOOD(backward(&m, &a, NULL));
    same_as_cpu(&a, T, 2, SHARED);
    free_arrays(&a);
    drop(&m);
    nothing_left();
}

/* What init_parameters sets to zero is there when it returns, for any stream. */
static void test_init_parameters_are_there_for_any_stream(void)
{
    float bias[E] = {0, 0, 50, 50};
    for (uint64_t seed = 1; seed <= 12; seed++) {
        model m;
        cudaStream_t stream;
        moe_parameter_record r;
        emu_set_seed(seed);
        make(&m, context_of(0), BIAS);
        arrays a = arrays_on(0, T, 5);
        CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        GOOD(moe_parameter_record_init(&r, sizeof r));
        GOOD(moe_gate_parameter(m.gate, moe_gate_parameter_find(m.gate, "selection_bias"), &r));
        upload(r.data, bias, sizeof bias);
        GOOD(moe_gate_init_parameters(m.gate, 1));
        CUDA(cudaStreamQuery(NULL)); /* all is done */
        GOOD(forward(&m, &a, T, 0, stream));
        GOOD(backward(&m, &a, stream));
        same_as_cpu(&a, T, 5, BIAS);
        CUDA(cudaStreamDestroy(stream));
        free_arrays(&a);
        drop(&m);
        nothing_left();
    }
}

static void sleep_a_little(void *user)
{
    (void)user;
    (void)usleep(4000);
}

/* The wait ends at its time, the pass is failed, and works again afterwards. */
static void test_forward_that_waits_too_long(void)
{
    moe_cuda_config shorter = config_of(0);
    moe_context *context = NULL;
    model s;
    cudaStream_t stream;
    shorter.wait_seconds = 0.1;
    GOOD(moe_cuda_context_create(&context, &shorter));
    make(&s, context, SHARED);
    arrays a = arrays_on(0, T, 5);
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (int i = 0; i < 300; i++) CUDA(cudaLaunchHostFunc(stream, sleep_a_little, NULL));
    MUST(forward(&s, &a, T, 0, stream) == MOE_ERROR_TIMEOUT && SAID("not done in 0.1 s"));
    MUST(losses_of(&s) == MOE_ERROR_INVALID_STATE && SAID("failed in the middle"));
    MUST(backward(&s, &a, stream) == MOE_ERROR_INVALID_STATE);
    CUDA(cudaStreamSynchronize(stream));
    GOOD(forward(&s, &a, T, 0, stream));
    GOOD(backward(&s, &a, stream));
    same_as_cpu(&a, T, 5, SHARED);
    CUDA(cudaStreamDestroy(stream));
    free_arrays(&a);
    drop(&s);
    nothing_left();
}

/* check_pointers 0: memory is taken as it is, the host's for a plan among it. */
static void test_pointers_that_are_trusted(void)
{
    moe_cuda_config c = config_of(0);
    moe_context *context = NULL;
    moe_plan *plan = NULL;
    model m;
    int32_t ids[T * K];
    for (int i = 0; i < T * K; i++) ids[i] = i % E;
    c.check_pointers = 0;
    GOOD(moe_cuda_context_create(&context, &c));
    make(&m, context, 0);
    arrays a = arrays_on(0, T, 5);
    GOOD(moe_plan_create(&plan, m.context));
    build_plan(plan, ids, T);
    GOOD(moe_plan_check(plan));
    GOOD(forward(&m, &a, T, 0, NULL));
    GOOD(backward(&m, &a, NULL));
    same_as_cpu(&a, T, 5, 0);
    moe_plan_destroy(plan);
    free_arrays(&a);
    drop(&m);
    nothing_left();
}

/* ---- memory that a call is given ------------------------------------------------------------- */

static void test_workspace_of_the_host(void)
{
    model m;
    moe_pass *pass = NULL;
    moe_pass_config c;
    moe_cuda_pass_config p;
    void *host = aligned_alloc(256, 1 << 16), *device = on_device(0, NULL, 8 << 20);
    make(&m, context_of(0), 0);
    GOOD(moe_pass_config_init(&c, sizeof c));
    c.workspace = host, c.workspace_bytes = 1 << 16;
    MUST(moe_pass_create(&pass, m.layer, &c) == MOE_ERROR_INVALID_ARGUMENT &&
         SAID("workspace is memory of the host"));
    c.workspace = device, c.workspace_bytes = 64;
    moe_pass_destroy(m.pass);
    GOOD(moe_pass_create(&m.pass, m.layer, &c));
    arrays a = arrays_on(0, T, 1);
    MUST(forward(&m, &a, T, 0, NULL) == MOE_ERROR_BUFFER_TOO_SMALL && SAID("workspace"));
    moe_pass_destroy(m.pass);
    c.workspace_bytes = 8 << 20;
    GOOD(moe_pass_create(&m.pass, m.layer, &c));
    GOOD(moe_cuda_pass_config_init(&p, sizeof p));
    p.workspace = host, p.workspace_bytes = 1 << 16;
    MUST(moe_cuda_pass_set(m.pass, &p) == MOE_ERROR_INVALID_ARGUMENT &&
         SAID("workspace is memory of the host"));
    GOOD(forward(&m, &a, T, 0, NULL));
    GOOD(backward(&m, &a, NULL));
    same_as_cpu(&a, T, 1, 0);
    free_arrays(&a);
    drop(&m);
    CUDA(cudaFree(device));
    free(host);
    nothing_left();
}

/* Routings may be in any memory: of the host, pinned, managed, the device's. */
static void test_routing_in_any_memory(void)
{
    model m;
    moe_plan *plan = NULL;
    int32_t ids[T * K];
    int64_t *counts;
    void *pinned = NULL, *managed = NULL;
    for (int i = 0; i < T * K; i++) ids[i] = i % E;
    make(&m, context_of(0), BIAS);
    GOOD(moe_plan_create(&plan, m.context));
    void *device = on_device(0, ids, sizeof ids);
    CUDA(cudaMallocHost(&pinned, sizeof ids));
    CUDA(cudaMallocManaged(&managed, sizeof ids, cudaMemAttachGlobal));
    memcpy(pinned, ids, sizeof ids);
    memcpy(managed, ids, sizeof ids);
    const void *all[] = {ids, device, pinned, managed};
    for (int i = 0; i < 4; i++) {
        build_plan(plan, all[i], T);
        GOOD(moe_plan_check(plan));
    }
    CUDA(cudaMallocHost((void **)&counts, E * sizeof *counts));
    for (int e = 0; e < E; e++) counts[e] = e;
    GOOD(moe_gate_update_selection_bias(m.gate, counts, 0.1));
    CUDA(cudaFree(device));
    CUDA(cudaFree(managed));
    CUDA(cudaFreeHost(pinned));
    CUDA(cudaFreeHost(counts));
    moe_plan_destroy(plan);
    drop(&m);
    nothing_left();
}

int main(int count, char **arguments)
{
    static const host_test test[] = {
        {"replays", test_replays},
        {"gates_that_count", test_gates_that_count},
        {"bound_parameters", test_bound_parameters},
        {"cublas_of_the_host", test_cublas_of_the_host},
        {"init_parameters_are_there_for_any_stream", test_init_parameters_are_there_for_any_stream},
        {"forward_that_waits_too_long", test_forward_that_waits_too_long},
        {"pointers_that_are_trusted", test_pointers_that_are_trusted},
        {"workspace_of_the_host", test_workspace_of_the_host},
        {"routing_in_any_memory", test_routing_in_any_memory},
    };
    (void)setenv("MOE_EMULATION_PROTECT", "1", 1);
    return run_host_tests(test, sizeof test / sizeof *test, count, arguments);
}
