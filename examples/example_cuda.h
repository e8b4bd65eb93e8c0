/* example_cuda.h - what the examples on GPUs share: example.h, and ending when CUDA fails. */
#ifndef EXAMPLE_CUDA_H
#define EXAMPLE_CUDA_H

#include "example.h"

#include <moe/cuda.h>

#include <cuda_runtime_api.h>

#define CUDA(call)                                                                        \
    do {                                                                                  \
        cudaError_t cuda = (call);                                                        \
        if (cuda != cudaSuccess) {                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(cuda)); \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

#endif
