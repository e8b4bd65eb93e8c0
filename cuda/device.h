/* device.h - the language that kernels are written in: what cuda/<step>.cu may use of CUDA.
 *
 * nvcc gets CUDA itself; with MOE_EMULATION any C++17 compiler gets the emulator of
 * tests/emulation, where every GPU thread runs on the CPU, sanitizers included. A kernel uses what
 * is defined here and nothing else of CUDA: no spinning between blocks, no float atomics, no
 * lock-step assumptions without moe_warp_sync, whole warps only. No C++ runtime: no exceptions, no
 * standard containers.
 *
 *   template <typename T> MOE_GLOBAL(256) moe__cuda_scale(T *x, int64_t n, T factor) { ... }
 *   status = moe_launch(moe__cuda_scale<float>, dim3(blocks), dim3(256), 0, stream, x, n, 2.0f); */
#ifndef MOE_CUDA_DEVICE_H
#define MOE_CUDA_DEVICE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef MOE_EMULATION
#include "device_emulated.h"
#else
#include "device_cuda.h"
#endif

/* The arithmetic that the host and every device share. */
#include "half.h"
#include "philox.h"

#define moe_from_bf16 moe__from_bf16
#define moe_to_bf16 moe__to_bf16
#define moe_from_f16 moe__from_f16
#define moe_to_f16 moe__to_f16

/* In front of a loop over an array that must be registers. */
#ifdef __CUDACC__
#define MOE_UNROLLED _Pragma("unroll")
#else
#define MOE_UNROLLED
#endif

/* The last i in [0, count) with begin[i] <= at: the range that holds `at`. */
MOE_DEVICE int64_t moe_range_of(const int64_t *begin, int64_t count, int64_t at)
{
    int64_t low = 0, high = count - 1;
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        if (begin[middle] <= at)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

#endif
