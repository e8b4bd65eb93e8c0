/* gate_support.h - what the programs that check the gate's kernels share: random numbers, and the
 * functions that other files of cuda/ have. Included once by a program. */
#ifndef CHECK_GATE_SUPPORT_H
#define CHECK_GATE_SUPPORT_H

#include "backend_cuda.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- random numbers -------------------------------------------------------------------------- */

static uint64_t random_state;
static uint32_t draw(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33);
}
static int64_t below(int64_t n) { return n > 0 ? (int64_t)(draw() % (uint32_t)n) : 0; }
static bool chance(int percent) { return below(100) < percent; }
static float normal(void)
{
    float sum = 0;
    for (int i = 0; i < 6; i++) sum += (float)draw() / 2147483648.0f - 0.5f;
    return sum;
}

/* ---- what the other files of cuda/ have ------------------------------------------------------ */

extern "C" {
moe_status moe__cuda_status(cudaError_t error, const moe__workers *, const char *what)
{
    if (error == cudaSuccess) return MOE_OK;
    printf("%s: %s\n", what, cudaGetErrorString(error));
    return MOE_ERROR_DEVICE;
}
moe_status moe__cublas_status(cublasStatus_t status, const moe__workers *, const char *what)
{
    if (status == CUBLAS_STATUS_SUCCESS) return MOE_OK;
    printf("%s: %d\n", what, (int)status);
    return MOE_ERROR_DEVICE;
}
moe_status moe__cuda_fail(moe_status status, const moe__workers *, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vprintf(format, list);
    va_end(list);
    return status;
}
moe_status moe__cuda_cublas(const moe__workers *workers, cublasHandle_t *handle)
{
    static cublasHandle_t one;
    if (!one && cublasCreate(&one) != CUBLAS_STATUS_SUCCESS) return MOE_ERROR_DEVICE;
    cublasSetStream(one, (cudaStream_t)workers->stream);
    *handle = one;
    return MOE_OK;
}
moe_status moe__cuda_fetch(const moe__workers *workers, void *host, const void *device,
                           int64_t bytes)
{
    MOE_TRY(
        moe__cuda_status(cudaStreamSynchronize((cudaStream_t)workers->stream), workers, "wait"));
    return moe__cuda_status(cudaMemcpy(host, device, (size_t)bytes, cudaMemcpyDeviceToHost),
                            workers, "fetch");
}
}

#endif
