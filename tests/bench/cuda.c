/* cuda.c - a layer on a GPU beside a dense chain of cuBLAS of the same FLOPs, shape by shape.
 *
 *     bench_cuda [shape=NAME,...] [dtype=bf16,f32,f16] [tokens=4096,16] [rounds=20] [mode=exact]
 *                [experts=N] [kernels=1]
 *
 * Every round times, one after the other on one stream: the layer's forward, its backward (dx and
 * all gradients), the dense forward x W1 W2 with a hidden width of K F and the dense backward (two
 * products for each). Medians of the rounds are printed: milliseconds, TFLOP/s by the products that
 * a layer of this shape has, and time over dense time. Then every kernel of one step by itself. Of
 * a model that does not fit the memory, experts are left out. Numbers of one run compare with each
 * other; nothing is asserted. */
#include "cuda.h"

#include <moe/cuda.h>
#include <moe/moe.h>

#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK(call)                                                                  \
    do {                                                                          \
        if ((call) != MOE_OK) {                                                   \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, moe_last_error()); \
            exit(1);                                                              \
        }                                                                         \
    } while (0)
#define CUDA(call)                                                                        \
    do {                                                                                  \
        cudaError_t cuda = (call);                                                        \
        if (cuda != cudaSuccess) {                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(cuda)); \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)
#define CUBLAS(call)                                                                     \
    do {                                                                                 \
        cublasStatus_t cublas = (call);                                                  \
        if (cublas != CUBLAS_STATUS_SUCCESS) {                                           \
            fprintf(stderr, "%s:%d: cuBLAS gave %d\n", __FILE__, __LINE__, (int)cublas); \
            exit(1);                                                                     \
        }                                                                                \
    } while (0)

/* ---- shapes ---------------------------------------------------------------------------------- */

/* Sizes of published layers; conventions are the preset's, but nothing is dropped and the routed
 * experts are alone. */
typedef struct model {
    const char *name, *preset;
    int64_t D, F, E, K;
} model;

static const model models[] = {
    {"paper-256", "shazeer2017", 512, 1024, 256, 4},
    {"switch-base-128", "switch", 768, 3072, 128, 1},
    {"mixtral-8x7b", "mixtral", 4096, 14336, 8, 2},
    {"olmoe-1b-7b", "olmoe", 2048, 1024, 64, 8},
    {"qwen3-30b-a3b", "qwen3", 2048, 768, 128, 8},
    {"deepseek-v3", "deepseek_v3", 7168, 2048, 256, 8},
    {"gpt-oss-20b", "gpt_oss", 2880, 2880, 32, 4},
    {"tiny", "mixtral", 64, 96, 8, 2}, /* named only: to see that the program works */
};
enum { MODELS = sizeof models / sizeof *models, LISTED = MODELS - 1, LIST = 8, MOST_ROUNDS = 1000 };

typedef struct options {
    const char *shapes; /* NULL: all that are listed */
    int64_t tokens[LIST], experts;
    int32_t dtype[LIST];
    int token_count, dtype_count, rounds, padded, kernels;
} options;

/* What a model is asked with: its layer's configs for T tokens. */
typedef struct setting {
    const model *model;
    moe_gate_config gate;
    moe_experts_config experts;
    moe_layer_config layer;
    int64_t T;
    bench_shape shape;
} setting;

static void set_up(setting *s, const options *o, const model *m, int64_t E, int32_t dtype,
                   int64_t T)
{
    s->model = m;
    s->T = T;
    OK(moe_gate_config_init(&s->gate, sizeof s->gate));
    OK(moe_experts_config_init(&s->experts, sizeof s->experts));
    OK(moe_layer_config_init(&s->layer, sizeof s->layer));
    OK(moe_preset(m->preset, &s->gate, &s->experts, &s->layer));
    s->gate.d_model = m->D, s->gate.num_experts = E, s->gate.top_k = m->K;
    s->gate.dtype = s->experts.dtype = dtype;
    s->gate.init_std = 0.02; /* no expert is a favourite */
    s->gate.capacity_kind = MOE_CAPACITY_NONE;
    s->experts.d_model = m->D, s->experts.d_hidden = m->F, s->experts.num_experts = E;
    s->layer.shared_gate = s->layer.residual_mix = 0;
    if (o->padded) { /* a quarter more than the mean */
        int64_t room = (T * m->K * 5 / 4 + E - 1) / E;
        s->gate.capacity_kind = MOE_CAPACITY_NUMBER, s->gate.capacity = room;
        s->layer.exchange = MOE_EXCHANGE_PADDED, s->layer.padded_rows = room;
    }
    s->shape = (bench_shape){T,
                             m->D,
                             m->F,
                             E,
                             m->K,
                             dtype == MOE_DTYPE_F32 ? 4 : 2,
                             s->experts.activation >= MOE_ACTIVATION_SWIGLU};
}

static moe_cost cost_of(const setting *s)
{
    moe_cost_query q;
    moe_cost cost;
    OK(moe_cost_query_init(&q, sizeof q));
    q.gate = &s->gate, q.experts = &s->experts, q.tokens = s->T;
    q.flags = MOE_FORWARD_TRAIN;
    OK(moe_cost_init(&cost, sizeof cost));
    OK(moe_layer_memory(&q, &cost));
    OK(moe_layer_flops(&q, &cost));
    return cost;
}

/* ---- memory ---------------------------------------------------------------------------------- */

static void *allocate(int64_t bytes)
{
    void *memory;
    CUDA(cudaMalloc(&memory, (size_t)bytes));
    return memory;
}

/* Numbers in [-1, 1): zeros would take less power, and less time, than a model's. */
static void *allocate_filled(int64_t count, const bench_shape *s)
{
    enum { BLOCK = 1 << 16 };
    static float here[BLOCK];
    uint64_t state = 1;
    char *memory = allocate(count * s->size);
    for (int64_t i = 0; i < BLOCK; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        here[i] = (float)(int32_t)(state >> 40) / 8388608.0f - 1.0f;
        uint32_t bits;
        memcpy(&bits, &here[i], 4);
        /* of 16 bits the upper half: bf16, and as f16 a number below 1.9 as well */
        if (s->size == 2) memcpy((char *)here + 2 * i, (uint16_t[]){(uint16_t)(bits >> 16)}, 2);
    }
    for (int64_t at = 0; at < count; at += BLOCK) {
        int64_t n = count - at < BLOCK ? count - at : BLOCK;
        CUDA(
            cudaMemcpy(memory + at * s->size, here, (size_t)(n * s->size), cudaMemcpyHostToDevice));
    }
    CUDA(cudaDeviceSynchronize()); /* a copy may return before the device has its bytes */
    return memory;
}

/* Bytes a second of a copy within the device, read and written: what a kernel can hope for. */
static double copy_rate(cudaStream_t stream)
{
    enum { BYTES = 256 << 20, TIMES = 10 };
    cudaEvent_t begin, end;
    float ms = 0;
    void *from = allocate(BYTES), *to = allocate(BYTES);
    CUDA(cudaEventCreate(&begin));
    CUDA(cudaEventCreate(&end));
    for (int i = 0; i <= TIMES; i++) {
        if (i == 1) CUDA(cudaEventRecord(begin, stream));
        CUDA(cudaMemcpyAsync(to, from, BYTES, cudaMemcpyDeviceToDevice, stream));
    }
    CUDA(cudaEventRecord(end, stream));
    CUDA(cudaStreamSynchronize(stream));
    CUDA(cudaEventElapsedTime(&ms, begin, end));
    CUDA(cudaFree(from));
    CUDA(cudaFree(to));
    CUDA(cudaEventDestroy(begin));
    CUDA(cudaEventDestroy(end));
    return 2.0 * BYTES * TIMES / ((double)ms * 1e-3 + 1e-12);
}

/* ---- the layer ------------------------------------------------------------------------------- */

typedef struct sparse {
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    void *x, *y, *dy, *dx;
    int64_t T;
    cudaStream_t stream;
} sparse;

static void make_sparse(sparse *l, moe_context *context, setting *s, cudaStream_t stream)
{
    int64_t count = s->T * s->model->D;
    OK(moe_gate_create(&l->gate, context, &s->gate));
    OK(moe_experts_create(&l->experts, context, &s->experts));
    s->layer.gate = l->gate, s->layer.experts = l->experts;
    OK(moe_layer_create(&l->layer, &s->layer));
    s->layer.gate = NULL, s->layer.experts = NULL;
    OK(moe_layer_init_parameters(l->layer, 1));
    OK(moe_pass_create(&l->pass, l->layer, NULL));
    l->x = allocate_filled(count, &s->shape), l->dy = allocate_filled(count, &s->shape);
    l->y = allocate(count * s->shape.size), l->dx = allocate(count * s->shape.size);
    l->T = s->T, l->stream = stream;
}

static void drop_sparse(sparse *l)
{
    moe_pass_destroy(l->pass);
    moe_layer_destroy(l->layer);
    moe_experts_destroy(l->experts);
    moe_gate_destroy(l->gate);
    void *memory[] = {l->x, l->y, l->dy, l->dx};
    for (int i = 0; i < 4; i++) CUDA(cudaFree(memory[i]));
}

static void forward(sparse *l)
{
    moe_forward_args f;
    OK(moe_forward_args_init(&f, sizeof f));
    f.tokens = l->T, f.x = l->x, f.y = l->y, f.flags = MOE_FORWARD_TRAIN, f.stream = l->stream;
    OK(moe_layer_forward(l->layer, l->pass, &f));
}

static void backward(sparse *l)
{
    moe_backward_args b;
    OK(moe_backward_args_init(&b, sizeof b));
    b.dy = l->dy, b.dx = l->dx, b.flags = MOE_BACKWARD_OVERWRITE, b.stream = l->stream;
    OK(moe_layer_backward(l->layer, l->pass, &b));
}

/* ---- the dense chain ------------------------------------------------------------------------- */

/* x [T,D], W1 [D,Z], z [T,Z], W2 [H,D], y [T,D]; H = K F, Z = H or, gated, 2 H; h is the front of
 * z. */
typedef struct dense {
    cublasHandle_t handle;
    void *x, *w1, *z, *w2, *y, *dw1, *dw2, *dz, *workspace;
    int T, D, Z, H;
    cudaDataType type;
} dense;

static void make_dense(dense *d, const setting *s, cudaStream_t stream)
{
    enum { WORKSPACE = 32 << 20 };
    const bench_shape *k = &s->shape;
    d->T = (int)k->T, d->D = (int)k->D, d->H = (int)(k->K * k->F), d->Z = d->H * (k->gated ? 2 : 1);
    d->type = k->size == 4                         ? CUDA_R_32F
              : s->experts.dtype == MOE_DTYPE_BF16 ? CUDA_R_16BF
                                                   : CUDA_R_16F;
    d->x = allocate_filled(k->T * k->D, k), d->y = allocate_filled(k->T * k->D, k);
    d->w1 = allocate_filled(k->D * d->Z, k), d->w2 = allocate_filled(k->D * d->H, k);
    d->dw1 = allocate(k->D * d->Z * k->size), d->dw2 = allocate(k->D * d->H * k->size);
    d->z = allocate(k->T * d->Z * k->size), d->dz = allocate_filled(k->T * d->Z, k);
    d->workspace = allocate(WORKSPACE);
    CUBLAS(cublasCreate(&d->handle));
    CUBLAS(cublasSetStream(d->handle, stream));
    CUBLAS(cublasSetWorkspace(d->handle, d->workspace, WORKSPACE));
}

static void drop_dense(dense *d)
{
    void *memory[] = {d->x, d->w1, d->z, d->w2, d->y, d->dw1, d->dw2, d->dz, d->workspace};
    CUBLAS(cublasDestroy(d->handle));
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) CUDA(cudaFree(memory[i]));
}

/* c [rows,cols] = a b, row-major: cuBLAS, which counts by columns, gets them exchanged. With ta, a
 * is stored [depth,rows]; with tb, b is stored [cols,depth]. */
static void multiply(const dense *d, int rows, int cols, int depth, const void *a, int ld_a, int ta,
                     const void *b, int ld_b, int tb, void *c, int ld_c)
{
    const float one = 1, zero = 0;
    CUBLAS(cublasGemmEx(d->handle, tb ? CUBLAS_OP_T : CUBLAS_OP_N, ta ? CUBLAS_OP_T : CUBLAS_OP_N,
                        cols, rows, depth, &one, b, d->type, ld_b, a, d->type, ld_a, &zero, c,
                        d->type, ld_c, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

static void dense_forward(const dense *d)
{
    multiply(d, d->T, d->Z, d->D, d->x, d->D, 0, d->w1, d->Z, 0, d->z, d->Z);
    multiply(d, d->T, d->D, d->H, d->z, d->Z, 0, d->w2, d->D, 0, d->y, d->D);
}

/* dh = dy W2^T, dW2 = h^T dy, dx = dz W1^T, dW1 = x^T dz. */
static void dense_backward(const dense *d)
{
    multiply(d, d->T, d->H, d->D, d->y, d->D, 0, d->w2, d->D, 1, d->dz, d->Z);
    multiply(d, d->H, d->D, d->T, d->z, d->Z, 1, d->y, d->D, 0, d->dw2, d->D);
    multiply(d, d->T, d->D, d->Z, d->dz, d->Z, 0, d->w1, d->Z, 1, d->y, d->D);
    multiply(d, d->D, d->Z, d->T, d->x, d->D, 1, d->dz, d->Z, 0, d->dw1, d->Z);
}

/* ---- timing ---------------------------------------------------------------------------------- */

enum { FORWARD, BACKWARD, DENSE_FORWARD, DENSE_BACKWARD, PARTS };

static int by_size(const void *a, const void *b)
{
    float left = *(const float *)a, right = *(const float *)b;
    return left < right ? -1 : left > right;
}

/* Medians in milliseconds of the four parts. */
static void time_rounds(sparse *l, const dense *d, int rounds, double *median)
{
    static float ms[PARTS][MOST_ROUNDS];
    cudaEvent_t mark[PARTS + 1];
    for (int i = 0; i <= PARTS; i++) CUDA(cudaEventCreate(&mark[i]));
    for (int r = -3; r < rounds; r++) { /* the first three warm up */
        CUDA(cudaEventRecord(mark[FORWARD], l->stream));
        forward(l);
        CUDA(cudaEventRecord(mark[BACKWARD], l->stream));
        backward(l);
        CUDA(cudaEventRecord(mark[DENSE_FORWARD], l->stream));
        dense_forward(d);
        CUDA(cudaEventRecord(mark[DENSE_BACKWARD], l->stream));
        dense_backward(d);
        CUDA(cudaEventRecord(mark[PARTS], l->stream));
        CUDA(cudaStreamSynchronize(l->stream));
        for (int i = 0; i < PARTS && r >= 0; i++)
            CUDA(cudaEventElapsedTime(&ms[i][r], mark[i], mark[i + 1]));
    }
    for (int i = 0; i < PARTS; i++) {
        qsort(ms[i], (size_t)rounds, sizeof(float), by_size);
        median[i] = (double)ms[i][rounds / 2];
    }
    for (int i = 0; i <= PARTS; i++) CUDA(cudaEventDestroy(mark[i]));
}

static void print_part(const char *name, double flops, double ms, double dense_ms)
{
    printf("  %-9s %10.3f ms %8.1f TFLOP/s   dense %10.3f ms %8.1f TFLOP/s   over dense %6.2f\n",
           name, ms, flops / (ms * 1e9 + 1e-9), dense_ms, flops / (dense_ms * 1e9 + 1e-9),
           ms / (dense_ms + 1e-9));
}

/* ---- one line of the table ------------------------------------------------------------------- */

static const char *dtype_name(int32_t dtype)
{
    return dtype == MOE_DTYPE_F32 ? "f32" : dtype == MOE_DTYPE_BF16 ? "bf16" : "f16";
}

/* As many of the model's experts as fit. */
static int fit(setting *s, const options *o, const model *m, int32_t dtype, int64_t T)
{
    size_t unused, all;
    int64_t E = o->experts > 0 ? o->experts : m->E;
    CUDA(cudaMemGetInfo(&unused, &all));
    for (;; E /= 2) {
        set_up(s, o, m, E, dtype, T);
        moe_cost cost = cost_of(s);
        int64_t mats = s->shape.gated ? 3 : 2, H = m->K * m->F;
        int64_t dense_bytes = s->shape.size * (2 * mats * m->D * H + 4 * T * H + 8 * T * m->D);
        double needed = (double)(cost.parameter_bytes + cost.gradient_bytes + cost.pass_bytes) +
                        (double)dense_bytes + (128 << 20);
        if (needed < 0.9 * (double)unused) return 1;
        if (E % 2 || E / 2 < 8 || E / 2 < m->K) return 0;
    }
}

static void run(const options *o, moe_context *context, const model *m, int32_t dtype, int64_t T,
                cudaStream_t stream, double rate)
{
    setting s;
    sparse l;
    dense d;
    double ms[PARTS];
    if (!fit(&s, o, m, dtype, T)) {
        printf("%s %s T %lld: does not fit\n\n", m->name, dtype_name(dtype), (long long)T);
        return;
    }
    moe_cost cost = cost_of(&s);
    make_sparse(&l, context, &s, stream);
    make_dense(&d, &s, stream);
    time_rounds(&l, &d, o->rounds, ms);
    printf("%s %s T %lld D %lld F %lld E %lld%s K %lld%s\n", m->name, dtype_name(dtype),
           (long long)T, (long long)m->D, (long long)m->F, (long long)s.shape.E,
           s.shape.E < m->E ? " (of more)" : "", (long long)m->K, o->padded ? " padded" : "");
    print_part("forward", (double)cost.forward_flops, ms[FORWARD], ms[DENSE_FORWARD]);
    print_part("backward", (double)cost.backward_flops, ms[BACKWARD], ms[DENSE_BACKWARD]);
    if (o->kernels) {
        for (int part = 0; part < 2; part++) {
            bench_profile_begin(stream);
            if (part == 0)
                forward(&l);
            else
                backward(&l);
            bench_profile_end();
            printf("  %s\n", part == 0 ? "forward" : "backward");
            bench_profile_print(&s.shape, rate);
        }
    }
    printf("\n");
    drop_dense(&d);
    drop_sparse(&l);
}

/* ---- options --------------------------------------------------------------------------------- */

static int is_in(const char *list, const char *name)
{
    size_t length = strlen(name);
    for (const char *at = list; (at = strstr(at, name)) != NULL; at += length) {
        int begins = at == list || at[-1] == ',';
        if (begins && (at[length] == ',' || at[length] == '\0')) return 1;
    }
    return 0;
}

static int read_numbers(const char *text, int64_t *to, int most)
{
    int count = 0;
    for (char *end; count < most; text = end + 1) {
        to[count++] = strtoll(text, &end, 10);
        if (*end != ',') break;
    }
    return count;
}

static int read_option(options *o, const char *argument)
{
    const char *value = strchr(argument, '=');
    if (!value) return 0;
    size_t length = (size_t)(value++ - argument);
#define IS(name) (length == sizeof name - 1 && strncmp(argument, name, length) == 0)
    if (IS("shape"))
        o->shapes = value;
    else if (IS("tokens"))
        o->token_count = read_numbers(value, o->tokens, LIST);
    else if (IS("rounds"))
        o->rounds = atoi(value);
    else if (IS("experts"))
        o->experts = atoll(value);
    else if (IS("kernels"))
        o->kernels = atoi(value);
    else if (IS("mode"))
        o->padded = strcmp(value, "padded") == 0;
    else if (IS("dtype")) {
        o->dtype_count = 0;
        if (is_in(value, "bf16")) o->dtype[o->dtype_count++] = MOE_DTYPE_BF16;
        if (is_in(value, "f16")) o->dtype[o->dtype_count++] = MOE_DTYPE_F16;
        if (is_in(value, "f32")) o->dtype[o->dtype_count++] = MOE_DTYPE_F32;
    } else
        return 0;
#undef IS
    return o->rounds >= 1 && o->rounds <= MOST_ROUNDS && o->tokens[0] >= 1;
}

int main(int count, char **arguments)
{
    options o = {.tokens = {4096, 16},
                 .dtype = {MOE_DTYPE_BF16, MOE_DTYPE_F32},
                 .token_count = 2,
                 .dtype_count = 2,
                 .rounds = 20,
                 .kernels = 1};
    moe_context *context;
    cudaStream_t stream;
    struct cudaDeviceProp device;
    for (int i = 1; i < count; i++)
        if (!read_option(&o, arguments[i])) {
            fprintf(stderr, "bench_cuda: no option %s\n", arguments[i]);
            return 2;
        }
    if (moe_cuda_context_create(&context, NULL) != MOE_OK) {
        printf("no GPU here: %s\n", moe_last_error());
        return 0;
    }
    CUDA(cudaGetDeviceProperties(&device, moe_cuda_device(context)));
    CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    double rate = copy_rate(stream);
    printf("%s, copies at %.0f GB/s; medians of %d rounds\n\n", device.name, rate / 1e9, o.rounds);
    for (int i = 0; i < MODELS; i++) {
        if (o.shapes ? !is_in(o.shapes, models[i].name) : i >= LISTED) continue;
        for (int k = 0; k < o.dtype_count; k++)
            for (int t = 0; t < o.token_count; t++)
                run(&o, context, &models[i], o.dtype[k], o.tokens[t], stream, rate);
    }
    CUDA(cudaStreamDestroy(stream));
    moe_context_destroy(context);
    return 0;
}
