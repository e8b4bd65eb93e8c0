/* planted.c - one program, one mistake: `planted <name>` must not end well.
 *
 * Exits 0 when nothing noticed the mistake. What notices it ends the program, or the wrong result
 * or the refusal does: those print the line that check_planted.sh looks for, and exit 3. */
#include "planted.h"
#include "recorder.h"

#include <cublas_v2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 1024 };
static float *device, *other;
static cudaStream_t stream, second;

static void noticed(const char *what)
{
    printf("noticed: %s: %s\n", what, emu_last_message());
    exit(3);
}

static void expect(cudaError_t got, cudaError_t wanted)
{
    if (got == wanted && got != cudaSuccess) noticed(cudaGetErrorName(got));
}

static void expect_cublas(cublasStatus_t got)
{
    if (got != CUBLAS_STATUS_SUCCESS) noticed(cublasGetStatusName(got));
}

static void sync(void) { cudaStreamSynchronize(stream); }

static float first(const float *p)
{
    float x;
    cudaMemcpy(&x, p, sizeof x, cudaMemcpyDeviceToHost);
    return x;
}

static void no_barrier(void) { planted_no_barrier(device, stream), sync(); }
static void shared_overrun(void) { planted_shared_overrun(device, stream), sync(); }
static void divergent_barrier(void) { planted_divergent_barrier(device, stream), sync(); }
static void early_return(void) { planted_early_return(device, stream), sync(); }
static void divergent_shuffle(void) { planted_divergent_shuffle(device, stream), sync(); }
static void much_shared(void) { planted_much_shared(device, 49 * 1024, stream), sync(); }
static void misaligned(void) { planted_misaligned(device, stream), sync(); }
static void block_33(void) { planted_lanes(device, 33, 1, stream), sync(); }
static void block_1056(void) { planted_lanes(device, 1056, 1, stream), sync(); }
static void empty_grid(void) { planted_lanes(device, 32, 0, stream), sync(); }
static void block_race(void) { planted_block_race(device, stream), sync(); }

static void global_overrun(void)
{
    planted_global_overrun((unsigned char *)device, N * (int)sizeof(float), stream), sync();
}

static void unwritten_shared(void)
{
    planted_unwritten_shared(device, stream), sync();
    float x = first(device + 58);
    if (x != x) noticed("NaN");
}

static void unwritten_device(void)
{
    float *fresh;
    cudaMalloc((void **)&fresh, N * sizeof *fresh);
    planted_copy(device, fresh, N, stream), sync();
    float x = first(device);
    if (x != x) noticed("NaN");
}

static void unwritten_managed(void)
{
    float *fresh;
    cudaMallocManaged((void **)&fresh, N * sizeof *fresh, cudaMemAttachGlobal);
    fresh[0] = 1.0f; /* the host's, and no mistake */
    planted_copy(device, fresh, 1, stream), sync();
    planted_copy(device, fresh, N, stream), sync();
    float x = first(device + 1);
    if (x != x) noticed("NaN");
}

/* Twenty tries: the order is random. */
static void missing_wait(void)
{
    for (int i = 0; i < 20; i++) {
        cudaMemset(device, 0, N * sizeof *device);
        cudaDeviceSynchronize();
        planted_add_one(device, N, stream);
        planted_copy(other, device, N, second);
        cudaDeviceSynchronize();
        if (first(other) != 1.0f) noticed("stale data");
    }
}

static void missing_synchronise(void)
{
    float *pinned;
    cudaMallocHost((void **)&pinned, sizeof *pinned);
    for (int i = 0; i < 20; i++) {
        *pinned = -1.0f;
        cudaMemcpyAsync(pinned, device, sizeof *pinned, cudaMemcpyDeviceToHost, stream);
        if (*pinned == -1.0f) noticed("stale pinned memory");
        sync();
    }
}

static void host_argument(void)
{
    float *x = calloc(N, sizeof *x);
    planted_copy(device, x, N, stream), sync();
    free(x);
}

static void freed_argument(void)
{
    cudaFree(other);
    planted_copy(device, other, N, stream), sync();
}

static void freed_while_queued(void)
{
    cudaFreeAsync(other, stream);
    planted_copy(device, other, N, stream), sync();
}

static void other_device(void)
{
    float *far;
    cudaSetDevice(1);
    cudaMalloc((void **)&far, N * sizeof *far);
    cudaSetDevice(0);
    planted_copy(device, far, N, stream), sync();
}

static void host_copy(void)
{
    float *x = calloc(N, sizeof *x);
    expect(cudaMemcpyAsync(device, x, 16, cudaMemcpyDeviceToDevice, stream), cudaErrorInvalidValue);
}

static void device_as_host(void)
{
    expect(cudaMemcpyAsync(device, other, 16, cudaMemcpyHostToDevice, stream),
           cudaErrorInvalidValue);
}

static void host_reads_device(void) { printf("%g\n", *(volatile float *)device); }

static void begin(void)
{
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    planted_add_one(device, N, stream);
}

static void captured_synchronise(void)
{
    begin();
    expect(cudaStreamSynchronize(stream), cudaErrorStreamCaptureUnsupported);
}

static void captured_malloc(void)
{
    void *p;
    begin();
    expect(cudaMalloc(&p, 16), cudaErrorStreamCaptureUnsupported);
}

static void captured_pageable(void)
{
    float x = 1.0f;
    begin();
    expect(cudaMemcpyAsync(device, &x, sizeof x, cudaMemcpyHostToDevice, stream),
           cudaErrorStreamCaptureUnsupported);
}

static void captured_default_stream(void)
{
    begin();
    expect(planted_add_one(device, N, NULL), cudaErrorStreamCaptureImplicit);
}

static void captured_unjoined(void)
{
    cudaEvent_t e;
    cudaGraph_t g;
    cudaEventCreate(&e);
    begin();
    cudaEventRecord(e, stream);
    cudaStreamWaitEvent(second, e, 0);
    planted_add_one(other, N, second);
    expect(cudaStreamEndCapture(stream, &g), cudaErrorStreamCaptureUnjoined);
}

static const float one = 1.0f, zero = 0.0f;

static cublasHandle_t handle(void)
{
    cublasHandle_t h;
    cublasCreate(&h);
    cublasSetStream(h, stream);
    return h;
}

static void cublas_host_array(void)
{
    const void *a[1] = {device};
    void *c[1] = {other};
    expect_cublas(cublasGemmBatchedEx(handle(), CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 8, &one, a,
                                      CUDA_R_32F, 8, a, CUDA_R_32F, 8, &zero, c, CUDA_R_32F, 8, 1,
                                      CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

static void gemm(const void *a, cudaDataType in, cudaDataType out, int lda)
{
    expect_cublas(cublasGemmEx(handle(), CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 8, &one, a, in, lda, a, in,
                               8, &zero, other, out, 8, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

static void cublas_types(void) { gemm(device, CUDA_R_32F, CUDA_R_16BF, 8); }
static void cublas_leading(void) { gemm(device, CUDA_R_32F, CUDA_R_32F, 7); }
static void cublas_alignment(void) { gemm((char *)device + 2, CUDA_R_32F, CUDA_R_32F, 8); }

static void cublas_host_operand(void)
{
    float *x = calloc(64, sizeof *x);
    gemm(x, CUDA_R_32F, CUDA_R_32F, 8);
}

static void cublas_workspace(void)
{
    expect_cublas(cublasSetWorkspace(handle(), (char *)device + 128, 1024));
}

static void cublas_grouped_types(void)
{
    cublasOperation_t n = CUBLAS_OP_N;
    int eight = 8, count = 1;
    expect_cublas(cublasGemmGroupedBatchedEx(
        handle(), &n, &n, &eight, &eight, &eight, &one, (const void *const *)device, CUDA_R_16BF,
        &eight, (const void *const *)device, CUDA_R_16BF, &eight, &zero, (void *const *)device,
        CUDA_R_32F, &eight, 1, &count, CUBLAS_COMPUTE_32F));
}

/* Eight elements of 2 bytes are 16 bytes, and the first of them is 2 bytes behind such an address. */
static void cublas_grouped_alignment(void)
{
    cublasOperation_t n = CUBLAS_OP_N;
    int eight = 8, count = 1;
    void *at = (char *)other + 2, **list = (void **)device;
    cudaMemcpy(list, &at, sizeof at, cudaMemcpyHostToDevice);
    expect_cublas(cublasGemmGroupedBatchedEx(
        handle(), &n, &n, &eight, &eight, &eight, &one, (const void *const *)list, CUDA_R_16BF,
        &eight, (const void *const *)list, CUDA_R_16BF, &eight, &zero, list, CUDA_R_16BF, &eight, 1,
        &count, CUBLAS_COMPUTE_32F));
    sync();
}

#define MISTAKE(name) \
    {                 \
#name, name   \
    }
static const struct {
    const char *name;
    void (*run)(void);
} mistakes[] = {
    MISTAKE(no_barrier),
    MISTAKE(shared_overrun),
    MISTAKE(divergent_barrier),
    MISTAKE(early_return),
    MISTAKE(divergent_shuffle),
    MISTAKE(much_shared),
    MISTAKE(misaligned),
    MISTAKE(block_33),
    MISTAKE(block_1056),
    MISTAKE(empty_grid),
    MISTAKE(block_race),
    MISTAKE(global_overrun),
    MISTAKE(unwritten_shared),
    MISTAKE(unwritten_device),
    MISTAKE(unwritten_managed),
    MISTAKE(missing_wait),
    MISTAKE(missing_synchronise),
    MISTAKE(host_argument),
    MISTAKE(freed_argument),
    MISTAKE(freed_while_queued),
    MISTAKE(other_device),
    MISTAKE(host_copy),
    MISTAKE(device_as_host),
    MISTAKE(host_reads_device),
    MISTAKE(captured_synchronise),
    MISTAKE(captured_malloc),
    MISTAKE(captured_pageable),
    MISTAKE(captured_default_stream),
    MISTAKE(captured_unjoined),
    MISTAKE(cublas_host_array),
    MISTAKE(cublas_types),
    MISTAKE(cublas_leading),
    MISTAKE(cublas_alignment),
    MISTAKE(cublas_host_operand),
    MISTAKE(cublas_workspace),
    MISTAKE(cublas_grouped_types),
    MISTAKE(cublas_grouped_alignment),
};

int main(int argc, char **argv)
{
    cudaMalloc((void **)&device, N * sizeof *device);
    cudaMalloc((void **)&other, N * sizeof *other);
    cudaMemset(device, 0, N * sizeof *device);
    cudaMemset(other, 0, N * sizeof *other);
    cudaStreamCreate(&stream);
    cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking);
    cudaDeviceSynchronize();
    for (size_t i = 0; argc > 1 && i < sizeof mistakes / sizeof mistakes[0]; i++) {
        if (strcmp(mistakes[i].name, argv[1]) != 0) continue;
        mistakes[i].run();
        cudaDeviceSynchronize();
        return 0;
    }
    return 4;
}
