/* cuda_profile.c - the time of each kernel of a step, with the bytes it cannot do without.
 *
 * The program is linked with -Wl,--wrap for the launch of the runtime and the products of cuBLAS,
 * so that libmoe_cuda.a is measured as it is. Bytes are floors: every array that a kernel needs,
 * once, whatever it reads twice. Of a product they are its operands and its result. */
#include "cuda.h"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CALLS = 16384, NAMES = 128, NAME_BYTES = 48 };

typedef struct call {
    int name;
    cudaEvent_t begin, end;
    double bytes, flops; /* of a product; 0: the table's */
} call;

static struct {
    int is_on, count, lost, names;
    cudaStream_t stream;
    call calls[CALLS];
    char name[NAMES][NAME_BYTES];
} profile;

/* ---- bytes of each kernel -------------------------------------------------------------------- */

/* Bytes that one launch of a kernel must move, by the letters of the shape:
 *   row    elements of a row [D] read or written for each of the R rows
 *   token  the same for each of the T tokens
 *   hidden elements [F] for each of the R rows, not gated and gated
 *   score  floats [E] for each of the T tokens
 *   entry  bytes for each of the R entries of the plan
 *   router matrices [D,E]: floats are 4 bytes, weights `size` */
typedef struct kernel_bytes {
    const char *name;
    double row, token, hidden, hidden_gated, score, entry, router_weight, router_float;
} kernel_bytes;

static const kernel_bytes table[] = {
    /* x or dy once, its rows once, and where each comes from */
    {"moe__cuda_gather_rows", 1, 1, 0, 0, 0, 8, 0, 0},
    /* out in, out out */
    {"moe__cuda_output_rows", 2, 0, 0, 0, 0, 0, 0, 0},
    /* a and b in, a out, the gradient of the weight */
    {"moe__cuda_dot_rows", 3, 0, 0, 0, 0, 4, 0, 0},
    /* z in, h out; gated z1 and z3 in */
    {"moe__cuda_act_forward", 0, 0, 2, 3, 0, 0, 0, 0},
    /* z and dh in, dz out; gated z1, z3 and dh in, dz1 and dz3 out */
    {"moe__cuda_act_backward", 0, 0, 3, 5, 0, 0, 0, 0},
    {"moe__cuda_act_dot", 0, 0, 2, 2, 0, 4, 0, 0},
    /* rows in, tokens out; row, weight of each entry */
    {"moe_combine_forward", 1, 1, 0, 0, 0, 12, 0, 0},
    /* rows in, tokens out; row of each entry */
    {"moe_dispatch_backward", 1, 1, 0, 0, 0, 8, 0, 0},
    /* tokens, weights and logits, in one direction or the other */
    {"moe_router_rows", 0, 1, 0, 0, 1, 0, 1, 0},
    {"moe_router_narrow", 0, 1, 0, 0, 1, 0, 1, 0},
    {"moe_router_dw", 0, 1, 0, 0, 1, 0, 0, 1},
    /* logits in, K experts of each token out */
    {"moe_choose_top", 0, 0, 0, 0, 1, 4, 0, 0},
    {"moe_choose_top_of_many", 0, 0, 0, 0, 1, 4, 0, 0},
    /* logits and experts in, weights out */
    {"moe_route_weigh", 0, 0, 0, 0, 1, 8, 0, 0},
    /* scores in, their gradients out */
    {"moe_gate_rows_backward", 0, 0, 0, 0, 2, 0, 0, 0},
    {"moe_losses_rows", 0, 0, 0, 0, 1, 0, 0, 0},
    /* expert in; row, slot, and token and entry of the row out */
    {"moe_rows_write", 0, 0, 0, 0, 0, 36, 0, 0},
    {"moe_sort_count", 0, 0, 0, 0, 0, 4, 0, 0},
    {"moe_sort_place", 0, 0, 0, 0, 0, 12, 0, 0},
};

static double bytes_of(const char *name, const bench_shape *s)
{
    double T = (double)s->T, R = T * (double)s->K, D = (double)s->D, F = (double)s->F;
    double E = (double)s->E, size = (double)s->size;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        const kernel_bytes *k = &table[i];
        if (strcmp(k->name, name) != 0) continue;
        return size * (D * (k->row * R + k->token * T) +
                       F * R * (s->gated ? k->hidden_gated : k->hidden)) +
               4 * k->score * T * E + k->entry * R +
               D * E * (k->router_weight * size + k->router_float * 4);
    }
    return 0;
}

/* ---- recording ------------------------------------------------------------------------------- */

void bench_profile_begin(void *stream)
{
    profile.stream = stream;
    profile.count = profile.lost = profile.names = 0;
    profile.is_on = 1;
}

void bench_profile_end(void)
{
    profile.is_on = 0;
    (void)cudaStreamSynchronize(profile.stream);
}

static int name_index(const char *name)
{
    for (int i = 0; i < profile.names; i++)
        if (strcmp(profile.name[i], name) == 0) return i;
    if (profile.names == NAMES) return NAMES - 1;
    (void)snprintf(profile.name[profile.names], NAME_BYTES, "%s", name);
    return profile.names++;
}

/* The next call, begun; NULL when nothing is recorded. */
static call *start(const char *name, double bytes, double flops)
{
    if (!profile.is_on) return NULL;
    if (profile.count == CALLS) {
        profile.lost++;
        return NULL;
    }
    call *c = &profile.calls[profile.count++];
    c->name = name_index(name);
    c->bytes = bytes;
    c->flops = flops;
    if (!c->begin &&
        (cudaEventCreate(&c->begin) != cudaSuccess || cudaEventCreate(&c->end) != cudaSuccess))
        abort();
    (void)cudaEventRecord(c->begin, profile.stream);
    return c;
}

static void stop(call *c)
{
    if (c) (void)cudaEventRecord(c->end, profile.stream);
}

/* The function's name in a mangled one: the first word that is no unnamed namespace's. */
static void plain_name(const char *mangled, char *name)
{
    const char *at = mangled;
    (void)snprintf(name, NAME_BYTES, "%s", mangled);
    if (strncmp(at, "_Z", 2) != 0) return;
    for (at += 2; *at;) {
        if (*at < '0' || *at > '9') {
            at++;
            continue;
        }
        char *word;
        long length = strtol(at, &word, 10);
        if (length <= 0 || (size_t)length > strlen(word)) return;
        if (strncmp(word, "_GLOBAL__N_", 11) != 0) {
            (void)snprintf(name, NAME_BYTES, "%.*s", (int)length, word);
            return;
        }
        at = word + length;
    }
}

/* cudaFuncGetName is there from CUDA 12.3 on. */
static void kernel_name(const void *kernel, char *name)
{
    typedef cudaError_t (*get_name)(const char **, const void *);
    static get_name get;
    const char *mangled = NULL;
    if (!get) {
        void *symbol = dlsym(RTLD_DEFAULT, "cudaFuncGetName");
        memcpy(&get, &symbol, sizeof get);
    }
    if (get && get(&mangled, kernel) == cudaSuccess && mangled)
        plain_name(mangled, name);
    else
        (void)snprintf(name, NAME_BYTES, "kernel");
}

cudaError_t __real_cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                                    size_t shared, cudaStream_t stream);
cudaError_t __wrap_cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                                    size_t shared, cudaStream_t stream);
cudaError_t __wrap_cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                                    size_t shared, cudaStream_t stream)
{
    char name[NAME_BYTES] = "";
    if (profile.is_on) kernel_name(kernel, name);
    call *c = start(name, 0, 0);
    cudaError_t error = __real_cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
    stop(c);
    return error;
}

static double size_of(cudaDataType type) { return type == CUDA_R_32F ? 4 : 2; }

/* Starts the record of a product: `count` of [m,k] [k,n]. */
static call *start_product(const char *name, double m, double n, double k, double count,
                           cudaDataType type, cudaDataType type_c, int adds)
{
    double bytes = count *
                   ((m * k + k * n) * size_of(type) + (adds ? 2 : 1) * m * n * size_of(type_c));
    return start(name, bytes, 2 * m * n * k * count);
}

static int adds(const void *beta) { return *(const float *)beta != 0; }

#define GEMM_PARAMETERS                                                                          \
    cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,  \
        const void *alpha, const void *a, cudaDataType type_a, int ld_a, const void *b,          \
        cudaDataType type_b, int ld_b, const void *beta, void *c, cudaDataType type_c, int ld_c, \
        cublasComputeType_t compute, cublasGemmAlgo_t algorithm
cublasStatus_t __real_cublasGemmEx(GEMM_PARAMETERS);
cublasStatus_t __wrap_cublasGemmEx(GEMM_PARAMETERS);
cublasStatus_t __wrap_cublasGemmEx(GEMM_PARAMETERS)
{
    call *record = start_product("cublasGemmEx", m, n, k, 1, type_a, type_c, adds(beta));
    cublasStatus_t status = __real_cublasGemmEx(handle, op_a, op_b, m, n, k, alpha, a, type_a, ld_a,
                                                b, type_b, ld_b, beta, c, type_c, ld_c, compute,
                                                algorithm);
    stop(record);
    return status;
}

#define STRIDED_PARAMETERS                                                                       \
    cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k,  \
        const void *alpha, const void *a, cudaDataType type_a, int ld_a, long long int stride_a, \
        const void *b, cudaDataType type_b, int ld_b, long long int stride_b, const void *beta,  \
        void *c, cudaDataType type_c, int ld_c, long long int stride_c, int count,               \
        cublasComputeType_t compute, cublasGemmAlgo_t algorithm
cublasStatus_t __real_cublasGemmStridedBatchedEx(STRIDED_PARAMETERS);
cublasStatus_t __wrap_cublasGemmStridedBatchedEx(STRIDED_PARAMETERS);
cublasStatus_t __wrap_cublasGemmStridedBatchedEx(STRIDED_PARAMETERS)
{
    call *record = start_product("cublasGemmStridedBatchedEx", m, n, k, count, type_a, type_c,
                                 adds(beta));
    cublasStatus_t status = __real_cublasGemmStridedBatchedEx(
        handle, op_a, op_b, m, n, k, alpha, a, type_a, ld_a, stride_a, b, type_b, ld_b, stride_b,
        beta, c, type_c, ld_c, stride_c, count, compute, algorithm);
    stop(record);
    return status;
}

#if CUBLAS_VERSION >= 120500
#define GROUPED_PARAMETERS                                                                     \
    cublasHandle_t handle, const cublasOperation_t op_a[], const cublasOperation_t op_b[],     \
        const int m[], const int n[], const int k[], const void *alpha, const void *const a[], \
        cudaDataType_t type_a, const int ld_a[], const void *const b[], cudaDataType_t type_b, \
        const int ld_b[], const void *beta, void *const c[], cudaDataType_t type_c,            \
        const int ld_c[], int groups, const int size[], cublasComputeType_t compute
cublasStatus_t __real_cublasGemmGroupedBatchedEx(GROUPED_PARAMETERS);
cublasStatus_t __wrap_cublasGemmGroupedBatchedEx(GROUPED_PARAMETERS);
cublasStatus_t __wrap_cublasGemmGroupedBatchedEx(GROUPED_PARAMETERS)
{
    double bytes = 0, flops = 0;
    for (int i = 0; i < groups; i++) {
        double mn = (double)m[i] * n[i], rest = ((double)m[i] + n[i]) * k[i];
        bytes += size[i] * (rest * size_of(type_a) + mn * size_of(type_c));
        flops += size[i] * 2 * mn * k[i];
    }
    call *record = start("cublasGemmGroupedBatchedEx", bytes, flops);
    cublasStatus_t status = __real_cublasGemmGroupedBatchedEx(
        handle, op_a, op_b, m, n, k, alpha, a, type_a, ld_a, b, type_b, ld_b, beta, c, type_c, ld_c,
        groups, size, compute);
    stop(record);
    return status;
}
#endif

/* ---- printing -------------------------------------------------------------------------------- */

typedef struct line {
    const char *name;
    int calls;
    double seconds, bytes, flops;
} line;

static int slower(const void *a, const void *b)
{
    double left = ((const line *)a)->seconds, right = ((const line *)b)->seconds;
    return left < right ? 1 : left > right ? -1 : 0;
}

void bench_profile_print(const bench_shape *shape, double copy_rate)
{
    static line lines[NAMES];
    double total = 0;
    for (int i = 0; i < profile.names; i++) lines[i] = (line){.name = profile.name[i]};
    for (int i = 0; i < profile.count; i++) {
        const call *c = &profile.calls[i];
        line *l = &lines[c->name];
        float ms = 0;
        (void)cudaEventElapsedTime(&ms, c->begin, c->end);
        l->calls++;
        l->seconds += (double)ms * 1e-3;
        l->bytes += c->bytes > 0 ? c->bytes : bytes_of(l->name, shape);
        l->flops += c->flops;
        total += (double)ms * 1e-3;
    }
    qsort(lines, (size_t)profile.names, sizeof *lines, slower);
    printf("  %-28s %6s %10s %6s %9s %9s %9s %9s\n", "kernel", "calls", "us", "share", "MB", "GB/s",
           "floor us", "TFLOP/s");
    for (int i = 0; i < profile.names; i++) {
        const line *l = &lines[i];
        printf("  %-28s %6d %10.1f %5.1f%%", l->name, l->calls, l->seconds * 1e6,
               total > 0 ? 100 * l->seconds / total : 0);
        if (l->bytes > 0 && l->seconds > 0)
            printf(" %9.2f %9.0f %9.1f", l->bytes / 1e6, l->bytes / l->seconds / 1e9,
                   l->bytes / copy_rate * 1e6);
        else
            printf(" %9s %9s %9s", "-", "-", "-");
        if (l->flops > 0 && l->seconds > 0)
            printf(" %9.1f\n", l->flops / l->seconds / 1e12);
        else
            printf(" %9s\n", "-");
    }
    if (profile.lost) printf("  %d calls more than can be recorded\n", profile.lost);
}
