/* check_cuda_missing.c - a program linked with libmoe_cuda on a machine that may have no GPU. */
#include <moe/cuda.h>
#include <moe/moe.h>
#include <stdio.h>
#include <string.h>

#define MUST(condition)                                                                   \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            printf("%s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, moe_last_error()); \
            return 1;                                                                     \
        }                                                                                 \
    } while (0)

/* What a context on a GPU refuses before it looks for one. */
static int check_arguments(void)
{
    moe_cuda_config c;
    moe_cuda_pass_config p;
    moe_context *context = (moe_context *)1;
    MUST(moe_cuda_config_init(NULL, sizeof c) == MOE_ERROR_INVALID_ARGUMENT);
    MUST(moe_cuda_config_init(&c, sizeof c) == MOE_OK);
    MUST(c.device == MOE_CUDA_CURRENT && c.tf32 == 0 && c.wait_seconds == 60 &&
         c.check_pointers == 1);
    MUST(c.cublas_workspace_bytes == 33554432 && !c.alloc && !c.free && !c.host);
    MUST(moe_cuda_context_create(NULL, &c) == MOE_ERROR_INVALID_ARGUMENT);
    c.device = -2;
    MUST(moe_cuda_context_create(&context, &c) == MOE_ERROR_INVALID_ARGUMENT);
    MUST(strstr(moe_last_error(), "device is -2") && context == (moe_context *)1);
    c.device = 0, c.tf32 = 2;
    MUST(moe_cuda_context_create(&context, &c) == MOE_ERROR_INVALID_ARGUMENT);
    c.tf32 = 0, c.wait_seconds = 0;
    MUST(moe_cuda_context_create(&context, &c) == MOE_ERROR_INVALID_ARGUMENT);
    c.wait_seconds = 1, c.cublas_workspace_bytes = -1;
    MUST(moe_cuda_context_create(&context, &c) == MOE_ERROR_INVALID_ARGUMENT);
    c.struct_size = 3;
    MUST(moe_cuda_context_create(&context, &c) == MOE_ERROR_STRUCT_SIZE);
    MUST(moe_cuda_poll(NULL) == MOE_ERROR_INVALID_ARGUMENT && moe_cuda_device(NULL) == -1);
    MUST(moe_cuda_pass_config_init(&p, sizeof p) == MOE_OK && !p.cublas && !p.workspace);
    MUST(moe_cuda_pass_set(NULL, &p) == MOE_ERROR_INVALID_ARGUMENT);
    return 0;
}

/* A layer on the CPU beside it. */
static int check_cpu(moe_context *context)
{
    static float x[8 * 4], y[8 * 4];
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    moe_gate *gate = NULL;
    moe_experts *experts = NULL;
    moe_layer *layer = NULL;
    moe_pass *pass = NULL;
    moe_forward_args f;
    for (int i = 0; i < 32; i++) x[i] = (float)i / 16 - 1;
    MUST(moe_gate_config_init(&g, sizeof g) == MOE_OK &&
         moe_experts_config_init(&e, sizeof e) == MOE_OK);
    MUST(moe_layer_config_init(&l, sizeof l) == MOE_OK &&
         moe_forward_args_init(&f, sizeof f) == MOE_OK);
    g.d_model = e.d_model = 4, g.num_experts = e.num_experts = 3, g.top_k = 2, e.d_hidden = 5;
    MUST(moe_gate_create(&gate, context, &g) == MOE_OK);
    MUST(moe_experts_create(&experts, context, &e) == MOE_OK);
    l.gate = gate, l.experts = experts;
    MUST(moe_layer_create(&layer, &l) == MOE_OK);
    MUST(moe_layer_init_parameters(layer, 7) == MOE_OK &&
         moe_pass_create(&pass, layer, NULL) == MOE_OK);
    MUST(moe_cuda_pass_set(pass, NULL) == MOE_ERROR_INVALID_ARGUMENT);
    f.x = x, f.y = y, f.tokens = 8;
    MUST(moe_layer_forward(layer, pass, &f) == MOE_OK && y[5] != 0);
    moe_pass_destroy(pass);
    moe_layer_destroy(layer);
    moe_experts_destroy(experts);
    moe_gate_destroy(gate);
    return 0;
}

int main(void)
{
    moe_context *cpu = NULL, *gpu = NULL;
    if (check_arguments()) return 1;
    MUST(moe_context_create(&cpu, NULL) == MOE_OK);
    MUST(moe_cuda_device(cpu) == -1 && moe_cuda_poll(cpu) == MOE_ERROR_INVALID_ARGUMENT);
    moe_status status = moe_cuda_context_create(&gpu, NULL);
    if (status == MOE_OK) {
        MUST(moe_cuda_device(gpu) >= 0 && moe_cuda_poll(gpu) == MOE_OK);
        printf("a GPU is here\n");
    } else {
        MUST(status == MOE_ERROR_DEVICE && !gpu);
        MUST(strstr(moe_last_error(), "moe_cuda_context_create: ") &&
             strstr(moe_last_error(), "cudaError"));
        printf("%s\n", moe_last_error());
    }
    if (check_cpu(cpu)) return 1;
    moe_context_destroy(gpu);
    moe_context_destroy(cpu);
    return 0;
}
