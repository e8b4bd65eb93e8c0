/* device.h - the kernel language: what a kernel of cuda/*.cu may use. */
#ifndef MOE_CUDA_DEVICE_H
#define MOE_CUDA_DEVICE_H

#include <cuda_runtime.h>
#include <stdint.h>

#define MOE_FN static __host__ __device__ __forceinline__
#define MOE_DEVICE static __device__ __forceinline__
#define MOE_HOST_DEVICE static __host__ __device__ __forceinline__
#define MOE_GLOBAL(threads) __global__ void __launch_bounds__(threads)
#define MOE_SHARED(type, name, count) __shared__ type name[count]
#define MOE_SHARED_DYNAMIC(type, name)                                  \
    extern __shared__ __align__(16) unsigned char moe_dynamic_shared[]; \
    type *name = (type *)moe_dynamic_shared

MOE_DEVICE void moe_block_sync() { __syncthreads(); }
MOE_DEVICE void moe_warp_sync() { __syncwarp(); }
template <typename T> MOE_DEVICE T moe_shuffle_xor(T v, int m)
{
    return __shfl_xor_sync(~0u, v, m);
}
template <typename T> MOE_DEVICE T moe_shuffle_up(T v, int d) { return __shfl_up_sync(~0u, v, d); }
template <typename T> MOE_DEVICE T moe_shuffle_down(T v, int d)
{
    return __shfl_down_sync(~0u, v, d);
}
template <typename T> MOE_DEVICE T moe_shuffle(T v, int lane) { return __shfl_sync(~0u, v, lane); }
MOE_DEVICE uint32_t moe_ballot(int p) { return __ballot_sync(~0u, p); }
MOE_DEVICE int moe_any(int p) { return __any_sync(~0u, p); }
MOE_DEVICE int moe_all(int p) { return __all_sync(~0u, p); }
MOE_DEVICE int moe_popcount(uint32_t v) { return __popc(v); }
MOE_DEVICE int moe_clz(uint32_t v) { return __clz((int)v); }

template <typename T> struct moe_same {
    typedef T type;
};
template <class... P>
static inline cudaError_t moe_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                                     cudaStream_t stream, typename moe_same<P>::type... args)
{
    void *list[] = {(void *)&args...};
    return cudaLaunchKernel((const void *)kernel, grid, block, list, shared, stream);
}

#endif
