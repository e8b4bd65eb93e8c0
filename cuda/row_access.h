/* row_access.h - for the kernels of the experts: elements as floats, the rows of a job, launches
 * over rows. */
#ifndef MOE_CUDA_ROW_ACCESS_H
#define MOE_CUDA_ROW_ACCESS_H

#include "elements.h"
#include "expert_rows.h"

/* What is read back after x has been stored. */
template <typename T> MOE_DEVICE float moe__rounded(float x)
{
    T stored;
    moe_narrow(&stored, x);
    return moe_widen(stored);
}

/* V elements as floats: 1, or the pack of 16 bytes. */
template <int V, typename T> MOE_DEVICE void moe__load(const T *from, float (&x)[V])
{
    moe_pack<T, V> pack;
    moe_load_pack(&pack, from);
    moe_widen_pack(x, pack);
}

template <int V, typename T> MOE_DEVICE void moe__store(T *to, const float (&x)[V])
{
    moe_pack<T, V> pack;
    moe_narrow_pack(&pack, x);
    moe_store_pack(to, pack);
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* Where a row comes from; number -1: padding, or past the last row. */
struct moe__row {
    int64_t number; /* in the plan */
    int64_t expert;
};

/* The expert is found where it is asked for, or the rows are padded. */
MOE_DEVICE moe__row moe__find_row(const moe__cuda_map &map, int64_t row, bool expert)
{
    moe__row at = {-1, 0};
    if (row >= map.rows) return at;
    if (map.padded == 0) {
        at.number = map.first + row;
        if (expert) at.expert = moe_range_of(map.expert_begin, map.experts, at.number);
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

/* The tree of src/cpu/lanes.h, lane i in accumulator i % V of thread i / V; all 32 threads of a
 * warp call it, each aligned group of 16 / V of them for a sum of its own. */
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

/* Calls function<T>(arguments) for the storage type. */
#define MOE_CUDA_BY_DTYPE(dtype, function, ...)                   \
    ((dtype) == MOE_DTYPE_BF16  ? function<moe_bf16>(__VA_ARGS__) \
     : (dtype) == MOE_DTYPE_F16 ? function<moe_f16>(__VA_ARGS__)  \
                                : function<float>(__VA_ARGS__))

#endif
