/* row_access.h - reading and writing rows of a storage type as floats, one by one or 16 bytes at
 * once, and finding the rows of a job. Widening is exact and narrowing rounds once, by an
 * instruction where there is one. For kernels. */
#ifndef MOE_CUDA_ROW_ACCESS_H
#define MOE_CUDA_ROW_ACCESS_H

#include "expert_rows.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

/* ---- one element ----------------------------------------------------------------------------- */

MOE_DEVICE float moe__widen(float x) { return x; }
MOE_DEVICE float moe__widen(moe_bf16 x) { return moe__from_bf16(x.bits); }
MOE_DEVICE float moe__widen(moe_f16 x)
{
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(x.bits));
#else
    return moe__from_f16(x.bits);
#endif
}

MOE_DEVICE void moe__narrow(float *to, float x) { *to = x; }
MOE_DEVICE void moe__narrow(moe_bf16 *to, float x)
{
#ifdef __CUDA_ARCH__
    to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    to->bits = moe__to_bf16(x);
#endif
}
MOE_DEVICE void moe__narrow(moe_f16 *to, float x)
{
#ifdef __CUDA_ARCH__
    to->bits = __half_as_ushort(__float2half_rn(x));
#else
    to->bits = moe__to_f16(x);
#endif
}

/* What is read back after x has been stored. */
template <typename T> MOE_DEVICE float moe__rounded(float x)
{
    T stored;
    moe__narrow(&stored, x);
    return moe__widen(stored);
}

/* ---- V elements: 1, or as many as 16 bytes have ---------------------------------------------- */

template <typename T> struct moe__vector {
    static const int size = 16 / (int)sizeof(T);
};

template <int V, typename T> MOE_DEVICE void moe__load(const T *from, float (&x)[V])
{
    T element[V];
    if (V == 1) {
        element[0] = *from;
    } else {
        uint4 all = moe_load16(from);
        memcpy(element, &all, V * sizeof(T));
    }
    for (int i = 0; i < V; i++) x[i] = moe__widen(element[i]);
}

template <int V, typename T> MOE_DEVICE void moe__store(T *to, const float (&x)[V])
{
    T element[V];
    for (int i = 0; i < V; i++) moe__narrow(&element[i], x[i]);
    if (V == 1) {
        *to = element[0];
    } else {
        uint4 all;
        memcpy(&all, element, V * sizeof(T));
        moe_store16(to, all);
    }
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* Where a row comes from; number -1: padding, or past the last row. */
struct moe__row {
    int64_t number; /* in the plan */
    int64_t expert;
};

/* The last e with expert_begin[e] <= number. */
MOE_DEVICE int64_t moe__expert_of(const moe__cuda_map &map, int64_t number)
{
    int64_t low = 0, high = map.experts;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (map.expert_begin[middle] <= number)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* The expert is found where it is asked for, or the rows are padded. */
MOE_DEVICE moe__row moe__find_row(const moe__cuda_map &map, int64_t row, bool expert)
{
    moe__row at = {-1, 0};
    if (row >= map.rows) return at;
    if (map.padded == 0) {
        at.number = map.first + row;
        if (expert) at.expert = moe__expert_of(map, at.number);
        return at;
    }
    at.expert = row / map.padded;
    int64_t in_expert = row - at.expert * map.padded, begin = map.expert_begin[at.expert];
    if (in_expert < map.expert_begin[at.expert + 1] - begin) at.number = begin + in_expert;
    return at;
}

/* The vector of an expert; NULL where there is none. */
template <typename T> MOE_DEVICE const T *moe__vector_of(const moe__cuda_vectors &v, int64_t expert)
{
    const T *base = (const T *)v.base;
    if (v.each) return (const T *)v.each[expert] + v.offset;
    return base ? base + expert * v.stride_expert + v.offset : base;
}

/* The tree of src/cpu/lanes.h, lane i in accumulator i % V of thread i / V; all 32 threads of a warp
 * call it, each aligned group of 16 / V of them for a sum of its own. */
template <int V> MOE_DEVICE float moe__lane_tree(float (&lane)[V])
{
    for (int distance = 8; distance >= V; distance /= 2)
        for (int i = 0; i < V; i++) lane[i] = lane[i] + moe_shuffle_xor(lane[i], distance / V);
    for (int distance = V / 2; distance > 0; distance /= 2)
        for (int i = 0; i < distance; i++) lane[i] = lane[i] + lane[i + distance];
    return lane[0];
}

/* A block of 256 threads as rows of threads: 2^shift of them along a row. */
enum { MOE__ROW_THREADS = 256 };
MOE_DEVICE int64_t moe__block_row(int shift)
{
    return (int64_t)blockIdx.x * (MOE__ROW_THREADS >> shift) + (threadIdx.x >> shift);
}
MOE_DEVICE int moe__block_column(int shift) { return (int)threadIdx.x & ((1 << shift) - 1); }

/* ---- launches: for the host ------------------------------------------------------------------ */

struct moe__row_launch {
    dim3 grid;
    int shift;
};

/* For rows of `width` elements, V of them by a thread at once. */
static inline moe__row_launch moe__launch_rows(int64_t rows, int64_t width, int V)
{
    moe__row_launch launch;
    launch.shift = 0;
    while (launch.shift < 8 && ((int64_t)V << launch.shift) < width) launch.shift++;
    int64_t each = MOE__ROW_THREADS >> launch.shift;
    launch.grid = dim3((unsigned)((rows + each - 1) / each));
    return launch;
}

/* Whether rows of T that begin at p, `stride` apart, can be read 16 bytes at once; for NULL yes. */
template <typename T> static inline bool moe__is_aligned(const void *p, int64_t stride)
{
    return ((uintptr_t)p & 15) == 0 && (stride * (int64_t)sizeof(T)) % 16 == 0;
}

/* Calls function<T>(arguments) for the storage type. */
#define MOE_CUDA_BY_DTYPE(dtype, function, ...)                   \
    ((dtype) == MOE_DTYPE_BF16  ? function<moe_bf16>(__VA_ARGS__) \
     : (dtype) == MOE_DTYPE_F16 ? function<moe_f16>(__VA_ARGS__)  \
                                : function<float>(__VA_ARGS__))

#endif
