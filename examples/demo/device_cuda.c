/* device_cuda.c - layers compute on the GPU that is current, on the default stream. A copy waits
 * first, no longer than any wait of a group: with several GPUs the stream waits for other ranks,
 * and one that is gone must not hold this one up in a call of CUDA. */
#define _XOPEN_SOURCE 700
#include "device.h"

#include "model.h"
#include "trainer.h"

#include <cuda_runtime_api.h>
#include <moe/cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { WAIT_SECONDS = 60 };

static int cuda_failed(const char *what, cudaError_t status)
{
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    return -1;
}

int device_context(moe_context **context, int32_t threads)
{
    (void)threads;
    TRY(moe_cuda_context_create(context, NULL));
    return 0;
}

void device_print(const moe_context *context) { printf("GPU %d", (int)moe_cuda_device(context)); }

int device_room(float **room, int64_t bytes)
{
    cudaError_t status = cudaMalloc((void **)room, (size_t)bytes);
    return status != cudaSuccess ? cuda_failed("memory of the GPU", status) : 0;
}

void device_free(float *room) { cudaFree(room); }

static int wait_for_gpu(void)
{
    const struct timespec pause = {0, 20000};
    double begin = trainer_clock();
    cudaError_t status;
    while ((status = cudaStreamQuery(NULL)) == cudaErrorNotReady) {
        cudaGetLastError(); /* being busy is no error of the next call */
        if (trainer_clock() - begin > WAIT_SECONDS) {
            fprintf(stderr, "the GPU did not come to an end in %d s\n", WAIT_SECONDS);
            return -1;
        }
        nanosleep(&pause, NULL);
    }
    return status != cudaSuccess ? cuda_failed("work of the GPU", status) : 0;
}

static int copy(void *to, const void *from, int64_t bytes, enum cudaMemcpyKind kind)
{
    if (wait_for_gpu() != 0) return -1;
    cudaError_t status = cudaMemcpy(to, from, (size_t)bytes, kind);
    return status != cudaSuccess ? cuda_failed("a copy", status) : 0;
}

const float *device_in(float *room, const float *host, int64_t bytes)
{
    return copy(room, host, bytes, cudaMemcpyHostToDevice) != 0 ? NULL : room;
}

float *device_out(float *room, float *host)
{
    (void)host;
    return room;
}

int device_back(void *host, const void *there, int64_t bytes)
{
    return copy(host, there, bytes, cudaMemcpyDeviceToHost);
}

int device_host(float **host, float *there, int64_t bytes)
{
    *host = malloc((size_t)bytes);
    if (*host) return device_back(*host, there, bytes);
    fprintf(stderr, "out of memory\n");
    return -1;
}

void device_host_free(float *host) { free(host); }
