/* traffic_table.c - what each kernel of a layer's step moves, over what it must: make cuda-traffic.
 *
 * Moved are the distinct 32-byte sectors of a launch, read and written. The floor of a kernel is a
 * formula of its arrays in the shape: T tokens, K entries of each, N = T K, R = N rows, E experts,
 * D and F widths, s bytes of an element; index arrays have 8 bytes a number, ids 4, floats of the
 * router 4. Kernels without a formula, which touch arrays of [E] or [N] alone, are listed with
 * their bytes. */
#include "recorder.h"

#include <moe/cuda.h>
#include <moe/moe.h>

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(call)                                                               \
    do {                                                                         \
        if ((call) != 0) {                                                       \
            printf("%s: %s, %s\n", #call, moe_last_error(), emu_last_message()); \
            exit(1);                                                             \
        }                                                                        \
    } while (0)

typedef struct shape {
    const char *name;
    int64_t T, D, E, F, K;
    int32_t kind, dtype;
    double load;
} shape;

static const shape SHAPES[] = {
    {"top-2 of 8, f32", 256, 128, 8, 192, 2, MOE_GATE_TOP_K, MOE_DTYPE_F32, 0},
    {"top-2 of 8, bf16", 256, 128, 8, 192, 2, MOE_GATE_TOP_K, MOE_DTYPE_BF16, 0},
    {"noisy top-2 of 16, f32", 256, 64, 16, 96, 2, MOE_GATE_NOISY_TOP_K, MOE_DTYPE_F32, 0.1},
    {"top-8 of 64, bf16", 128, 256, 64, 64, 8, MOE_GATE_TOP_K, MOE_DTYPE_BF16, 0}};

/* ---- floors ---------------------------------------------------------------------------------- */

typedef struct sizes {
    double T, K, N, R, E, D, F, s;
} sizes;

/* Gather: tokens once, rows, where they come from. */
static double of_gather(const sizes *z) { return (z->T + z->R) * z->D * z->s + z->R * 8; }
/* Dot products of a row and its token's: both, their places, one number a row. */
static double of_dots(const sizes *z)
{
    return (z->T + z->R) * z->D * z->s + z->R * (8 + 8) + z->N * 4;
}
/* Weighted sum of rows: rows, tokens, weight and row of each entry, where a token's begin. */
static double of_combine(const sizes *z)
{
    return (z->R + z->T) * z->D * z->s + z->N * (4 + 8) + (z->T + 1) * 8;
}
/* Sum of a token's rows of dx. */
static double of_dispatch_backward(const sizes *z)
{
    return (z->R + z->T) * z->D * z->s + z->N * 8 + (z->T + 1) * 8;
}
/* SwiGLU: gate and up in, one out; back: gate, up and dh in, their gradients and h, which is not
 * kept, out. */
static double of_activation(const sizes *z) { return 3 * z->R * z->F * z->s; }
static double of_activation_backward(const sizes *z) { return 6 * z->R * z->F * z->s; }
/* The gate's share added to dx: gradients by the logits, weights, dx in and out. */
static double of_gate_dx(const sizes *z)
{
    return z->T * z->E * 4 + z->D * z->E * z->s + 2 * z->T * z->D * z->s;
}
/* Scores of E experts in, K chosen out: ids, weights. */
static double of_choose(const sizes *z) { return z->T * z->E * 4 + z->N * (4 + 4); }

static const struct {
    const char *prefix;
    double (*floor)(const sizes *z);
} FLOORS[] = {{"moe__cuda_gather_rows", of_gather},
              {"moe__cuda_dot_rows", of_dots},
              {"moe_router_rows", of_gate_dx},
              {"moe_combine_forward", of_combine},
              {"moe_dispatch_backward", of_dispatch_backward},
              {"moe__cuda_act_forward", of_activation},
              {"moe__cuda_act_backward", of_activation_backward},
              {"moe_choose", of_choose}};

static double floor_of(const char *kernel, const sizes *z)
{
    for (size_t i = 0; i < sizeof FLOORS / sizeof *FLOORS; i++)
        if (strncmp(kernel, FLOORS[i].prefix, strlen(FLOORS[i].prefix)) == 0)
            return FLOORS[i].floor(z);
    return 0;
}

/* ---- a step ---------------------------------------------------------------------------------- */

static void *filled(int64_t count, int32_t dtype)
{
    size_t bytes = (size_t)count * (dtype == MOE_DTYPE_F32 ? 4 : 2);
    uint16_t *numbers = malloc(bytes);
    uint64_t state = 7;
    void *there = NULL;
    for (size_t i = 0; numbers && i < bytes / 2; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        numbers[i] = (uint16_t)(0x3d00 + (state >> 40) % 0x300 + ((state >> 33) % 2 << 15));
    }
    MUST(cudaMalloc(&there, bytes));
    MUST(cudaMemcpy(there, numbers, bytes, cudaMemcpyHostToDevice));
    free(numbers);
    return there;
}

static void print_table(const shape *s)
{
    double N = (double)(s->T * s->K);
    sizes z = {(double)s->T,
               (double)s->K,
               N,
               N,
               (double)s->E,
               (double)s->D,
               (double)s->F,
               s->dtype == MOE_DTYPE_F32 ? 4 : 2};
    struct emu_traffic t;
    printf("%s: T %d, D %d, E %d, F %d, K %d\n  %-52s %8s %10s %10s %7s\n", s->name, (int)s->T,
           (int)s->D, (int)s->E, (int)s->F, (int)s->K, "kernel", "launches", "read", "written",
           "/ floor");
    for (size_t i = 0; emu_traffic(i, &t); i++) {
        double moved = 32.0 * (double)(t.distinct_read + t.distinct_written);
        double floor = floor_of(t.kernel, &z) * (double)t.launches;
        if (t.launches == 0) continue;
        printf("  %-52.52s %8d %10.0f %10.0f", t.kernel, (int)t.launches,
               32.0 * (double)t.distinct_read, 32.0 * (double)t.distinct_written);
        if (floor > 0)
            printf(" %7.2f%s\n", moved / floor, moved > 1.1 * floor ? " *" : "");
        else
            printf(" %7s\n", "");
    }
}

static void run(const shape *s)
{
    moe_context *context = NULL;
    moe_gate *gate = NULL;
    moe_experts *experts = NULL;
    moe_layer *layer = NULL;
    moe_pass *pass = NULL;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    moe_forward_args f;
    moe_backward_args b;
    void *array[4];
    MUST(moe_cuda_context_create(&context, NULL));
    MUST(moe_gate_config_init(&g, sizeof g));
    MUST(moe_experts_config_init(&e, sizeof e));
    MUST(moe_layer_config_init(&l, sizeof l));
    MUST(moe_forward_args_init(&f, sizeof f));
    MUST(moe_backward_args_init(&b, sizeof b));
    g.d_model = e.d_model = s->D, g.num_experts = e.num_experts = s->E, e.d_hidden = s->F;
    g.top_k = s->K, g.kind = s->kind, g.dtype = e.dtype = s->dtype, g.load_weight = s->load;
    e.activation = MOE_ACTIVATION_SWIGLU, e.glu_order = MOE_GLU_GATE_UP;
    MUST(moe_gate_create(&gate, context, &g));
    MUST(moe_experts_create(&experts, context, &e));
    l.gate = gate, l.experts = experts;
    MUST(moe_layer_create(&layer, &l));
    MUST(moe_layer_init_parameters(layer, 1));
    MUST(moe_pass_create(&pass, layer, NULL));
    for (int i = 0; i < 4; i++) array[i] = filled(s->T * s->D, s->dtype);
    f.flags = MOE_FORWARD_TRAIN, f.tokens = s->T, f.x = array[0], f.y = array[1];
    b.dy = array[2], b.dx = array[3];
    for (int turn = 0; turn < 2; turn++) { /* the second is counted */
        MUST(cudaDeviceSynchronize());
        emu_traffic_reset();
        MUST(moe_layer_forward(layer, pass, &f));
        MUST(moe_layer_backward(layer, pass, &b));
    }
    MUST(cudaDeviceSynchronize());
    print_table(s);
    moe_pass_destroy(pass), moe_layer_destroy(layer), moe_gate_destroy(gate);
    moe_experts_destroy(experts), moe_context_destroy(context);
    for (int i = 0; i < 4; i++) MUST(cudaFree(array[i]));
}

int main(void)
{
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) run(&SHAPES[i]);
    printf("*: above 1.1 of the floor\n");
    return 0;
}
