/* device_cuda.h - the kernel language under nvcc. Included by device.h only, which describes it.
 *
 * Kernels are static: one file has its kernels and the functions that launch them. All shuffles and
 * votes are of the full warp. */
#ifndef MOE_CUDA_DEVICE_CUDA_H
#define MOE_CUDA_DEVICE_CUDA_H

#include <cuda_runtime.h>

#undef MOE_FN
#define MOE_FN static __host__ __device__ __forceinline__
#define MOE_DEVICE static __device__ __forceinline__
#define MOE_HOST_DEVICE static __host__ __device__ __forceinline__
#define MOE_GLOBAL(threads) static __global__ void __launch_bounds__(threads)

#define MOE_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define MOE_SHARED_DYNAMIC(type, name)                                \
    extern __shared__ __align__(16) unsigned char moe_shared_bytes[]; \
    type *const name = reinterpret_cast<type *>(moe_shared_bytes)

#define MOE_ALL_LANES 0xffffffffu

MOE_DEVICE void moe_block_sync() { __syncthreads(); }
MOE_DEVICE void moe_warp_sync() { __syncwarp(MOE_ALL_LANES); }

template <typename T> MOE_DEVICE T moe_shuffle(T v, int lane)
{
    return __shfl_sync(MOE_ALL_LANES, v, lane);
}
template <typename T> MOE_DEVICE T moe_shuffle_xor(T v, int lane_mask)
{
    return __shfl_xor_sync(MOE_ALL_LANES, v, lane_mask);
}
template <typename T> MOE_DEVICE T moe_shuffle_up(T v, int delta)
{
    return __shfl_up_sync(MOE_ALL_LANES, v, (unsigned)delta);
}
template <typename T> MOE_DEVICE T moe_shuffle_down(T v, int delta)
{
    return __shfl_down_sync(MOE_ALL_LANES, v, (unsigned)delta);
}

MOE_DEVICE uint32_t moe_ballot(bool predicate) { return __ballot_sync(MOE_ALL_LANES, predicate); }
MOE_DEVICE bool moe_any(bool predicate) { return __any_sync(MOE_ALL_LANES, predicate) != 0; }
MOE_DEVICE bool moe_all(bool predicate) { return __all_sync(MOE_ALL_LANES, predicate) != 0; }
MOE_DEVICE int moe_popcount(uint32_t v) { return __popc(v); }
MOE_DEVICE int moe_clz(uint32_t v) { return __clz((int)v); }

/* Integer atomics give the value before. */
MOE_DEVICE int32_t moe_atomic_add(int32_t *p, int32_t v) { return atomicAdd(p, v); }
MOE_DEVICE uint32_t moe_atomic_add(uint32_t *p, uint32_t v) { return atomicAdd(p, v); }
MOE_DEVICE int64_t moe_atomic_add(int64_t *p, int64_t v)
{
    return (int64_t)atomicAdd((unsigned long long *)p, (unsigned long long)v);
}
MOE_DEVICE int32_t moe_atomic_max(int32_t *p, int32_t v) { return atomicMax(p, v); }
MOE_DEVICE int64_t moe_atomic_max(int64_t *p, int64_t v)
{
    return (int64_t)atomicMax((long long *)p, (long long)v);
}
MOE_DEVICE int32_t moe_atomic_min(int32_t *p, int32_t v) { return atomicMin(p, v); }
MOE_DEVICE int64_t moe_atomic_min(int64_t *p, int64_t v)
{
    return (int64_t)atomicMin((long long *)p, (long long)v);
}

/* 16 bytes at once; the address is a multiple of 16. */
MOE_DEVICE uint4 moe_load16(const void *p) { return *(const uint4 *)p; }
/* A plain assignment in a loop is compiled to four stores of 4 bytes; where the compiler knows that
 * p is global nothing is asked. */
MOE_DEVICE void moe_store16(void *p, uint4 v)
{
    if (__isGlobal(p))
        __stwb((uint4 *)p, v);
    else
        *(uint4 *)p = v;
}

template <typename T> struct moe_same {
    typedef T type;
};

/* The arguments convert to the kernel's parameter types, as in a call. */
template <typename... P>
static inline cudaError_t moe_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                                     cudaStream_t stream, typename moe_same<P>::type... args)
{
    void *list[] = {(void *)&args..., nullptr};
    return cudaLaunchKernel((const void *)kernel, grid, block, list, shared, stream);
}

/* Lets launches of the kernel ask for up to this much dynamic shared memory; past 48 KiB they need
 * it. */
template <typename... P>
static inline cudaError_t moe_kernel_allow_shared(void (*kernel)(P...), size_t bytes)
{
    return cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)bytes);
}

#endif
