/* cuda_host.c - cuda_host.h. */
#include "cuda_host.h"

int host_cases;

int current(void)
{
    int device = -1;
    CUDA(cudaGetDevice(&device));
    return device;
}

void nothing_left(void)
{
    MUST(emu_live_allocations(0) == 0 && emu_live_allocations(1) == 0 && emu_live_objects() == 0);
    host_cases++;
}

/* ---- a layer --------------------------------------------------------------------------------- */

/* The objects in turn; what a failure leaves is for `drop`. */
moe_status try_make(model *m, moe_context *context, int options)
{
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    *m = (model){.context = context};
    GOOD(moe_gate_config_init(&g, sizeof g));
    g.d_model = D, g.num_experts = E, g.top_k = K, g.init_std = 0.5, g.switch_weight = 0.01;
    g.selection_bias = (options & BIAS) != 0;
    MOE_TRY(moe_gate_create(&m->gate, context, &g));
    GOOD(moe_experts_config_init(&e, sizeof e));
    e.d_model = D, e.d_hidden = F, e.num_experts = E, e.activation = MOE_ACTIVATION_SWIGLU;
    MOE_TRY(moe_experts_create(&m->experts, context, &e));
    e.num_experts = 1;
    if (options & SHARED) MOE_TRY(moe_experts_create(&m->shared, context, &e));
    GOOD(moe_layer_config_init(&l, sizeof l));
    l.gate = m->gate, l.experts = m->experts, l.shared = m->shared;
    if (options & PADDED) l.exchange = MOE_EXCHANGE_PADDED, l.padded_rows = ROOM;
    MOE_TRY(moe_layer_create(&m->layer, &l));
    MOE_TRY(moe_layer_init_parameters(m->layer, 1));
    return moe_pass_create(&m->pass, m->layer, NULL);
}

void make(model *m, moe_context *context, int options) { GOOD(try_make(m, context, options)); }

void drop(model *m)
{
    moe_pass_destroy(m->pass);
    moe_layer_destroy(m->layer);
    moe_experts_destroy(m->shared);
    moe_experts_destroy(m->experts);
    moe_gate_destroy(m->gate);
    moe_context_destroy(m->context);
}

moe_cuda_config config_of(int32_t device)
{
    moe_cuda_config c;
    GOOD(moe_cuda_config_init(&c, sizeof c));
    c.device = device;
    c.wait_seconds = 20;
    c.cublas_workspace_bytes = 1 << 16;
    return c;
}

moe_context *context_of(int32_t device)
{
    moe_cuda_config c = config_of(device);
    moe_context *context = NULL;
    GOOD(moe_cuda_context_create(&context, &c));
    return context;
}

/* ---- arrays ---------------------------------------------------------------------------------- */

void fill(float *a, int count, int salt)
{
    for (int i = 0; i < count; i++) a[i] = (float)((i * 37 + salt * 101) % 97) / 97 - 0.5f;
}

/* For any stream: such a copy may return before the device has its bytes. */
void upload(void *to, const void *from, size_t bytes)
{
    CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
    CUDA(cudaStreamSynchronize(cudaStreamLegacy));
}

void *on_device(int device, const void *from, size_t bytes)
{
    void *p = NULL;
    int before = current();
    CUDA(cudaSetDevice(device));
    CUDA(cudaMalloc(&p, bytes));
    if (from) upload(p, from, bytes);
    CUDA(cudaSetDevice(before));
    return p;
}

arrays arrays_on(int device, int tokens, int salt)
{
    float *host = malloc((size_t)tokens * D * sizeof(float));
    size_t bytes = (size_t)tokens * D * sizeof(float);
    arrays a;
    fill(host, tokens * D, salt);
    a.x = on_device(device, host, bytes);
    a.y = on_device(device, NULL, bytes);
    fill(host, tokens * D, salt + 1);
    a.dy = on_device(device, host, bytes);
    a.dx = on_device(device, NULL, bytes);
    free(host);
    return a;
}

void free_arrays(const arrays *a)
{
    CUDA(cudaFree(a->x));
    CUDA(cudaFree(a->y));
    CUDA(cudaFree(a->dy));
    CUDA(cudaFree(a->dx));
}

moe_forward_args forward_args(const arrays *a, int tokens, uint64_t flags, void *stream)
{
    moe_forward_args f;
    GOOD(moe_forward_args_init(&f, sizeof f));
    f.tokens = tokens, f.x = a->x, f.y = a->y, f.stream = stream;
    f.flags = flags;
    return f;
}

moe_status forward(const model *m, const arrays *a, int tokens, uint64_t flags, void *stream)
{
    moe_forward_args f = forward_args(a, tokens, flags, stream);
    return moe_layer_forward(m->layer, m->pass, &f);
}

moe_status backward(const model *m, const arrays *a, void *stream)
{
    moe_backward_args b;
    GOOD(moe_backward_args_init(&b, sizeof b));
    b.dy = a->dy, b.dx = a->dx, b.flags = MOE_BACKWARD_OVERWRITE, b.stream = stream;
    return moe_layer_backward(m->layer, m->pass, &b);
}

moe_status losses_of(const model *m)
{
    moe_losses l;
    GOOD(moe_losses_init(&l, sizeof l));
    return moe_pass_losses(m->pass, &l);
}

/* ---- the same on the CPU --------------------------------------------------------------------- */

void on_cpu(results *r, int tokens, int salt, int options)
{
    static float x[MOST * D], dy[MOST * D];
    moe_context *context = NULL;
    model m;
    arrays a = {x, r->y, dy, r->dx};
    fill(x, tokens * D, salt);
    fill(dy, tokens * D, salt + 1);
    GOOD(moe_context_create(&context, NULL));
    make(&m, context, options & ~PADDED);
    GOOD(forward(&m, &a, tokens, 0, NULL));
    GOOD(backward(&m, &a, NULL));
    GOOD(moe_layer_gradient_norm(m.layer, &r->norm, NULL));
    drop(&m);
}

void near(const float *device, const float *host, int count)
{
    float *here = malloc((size_t)count * sizeof(float));
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaMemcpy(here, device, (size_t)count * sizeof(float), cudaMemcpyDeviceToHost));
    for (int i = 0; i < count; i++) MUST(fabsf(here[i] - host[i]) <= 1e-5f);
    free(here);
}

void same_as_cpu(const arrays *a, int tokens, int salt, int options)
{
    static results r;
    on_cpu(&r, tokens, salt, options);
    near(a->y, r.y, tokens * D);
    near(a->dx, r.dx, tokens * D);
}

void build_plan(moe_plan *plan, const void *ids, int tokens)
{
    moe_plan_args p;
    GOOD(moe_plan_args_init(&p, sizeof p));
    p.tokens = tokens, p.num_experts = E, p.top_k = K, p.expert_ids = ids;
    GOOD(moe_plan_build(plan, &p));
}

int run_host_tests(const host_test *test, size_t tests, int count, char **arguments)
{
    (void)setenv("MOE_EMULATION_QUIET", "1", 0);
    for (size_t i = 0; i < tests; i++)
        if (count < 2 || strcmp(arguments[1], test[i].name) == 0) test[i].run();
    printf("hosts on CUDA: %d passed, 0 failed\n", host_cases);
    return 0;
}
