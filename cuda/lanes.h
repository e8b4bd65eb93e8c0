/* lanes.h - reductions along a row by one warp, with the bits of src/cpu/lanes.h.
 *
 * 16 lanes, element i in lane i % 16 in ascending i, then the tree (i, i+8), (i, i+4), (i, i+2),
 * (i, i+1). A warp brings 32 elements at a time, thread l element l; threads 0 to 15 are the lanes
 * and take the upper 16 elements after the lower ones. Elements beyond the row are 0. Every thread
 * of the warp calls, and every thread gets the sum. Includes device.h. */
#ifndef MOE_CUDA_LANES_H
#define MOE_CUDA_LANES_H

#include "device.h"

#define MOE_WARP 32

MOE_DEVICE int moe_lane(void) { return (int)(threadIdx.x % MOE_WARP); }

MOE_DEVICE float moe_infinity(void) { return moe__from_bits_f32(0x7f800000u); }

/* lane[i % 16] += v_i */
MOE_DEVICE void moe_lanes_add(float *lane, float v)
{
    float upper = moe_shuffle_down(v, 16);
    *lane = *lane + v;
    *lane = *lane + upper;
}

/* lane[i % 16] = fma(a_i, b_i, lane[i % 16]) */
MOE_DEVICE void moe_lanes_fma(float *lane, float a, float b)
{
    float upper_a = moe_shuffle_down(a, 16), upper_b = moe_shuffle_down(b, 16);
    *lane = moe__fma_f32(a, b, *lane);
    *lane = moe__fma_f32(upper_a, upper_b, *lane);
}

MOE_DEVICE float moe_lanes_tree(float lane)
{
    for (int by = 8; by > 0; by /= 2) lane = lane + moe_shuffle_down(lane, by);
    return moe_shuffle(lane, 0);
}

/* sum_j a_j b_j of a short row, all by one thread. */
MOE_DEVICE float moe_thread_dot(const float *a, const float *b, int64_t n)
{
    float lane[16] = {};
    for (int64_t first = 0; first < n; first += 16)
        MOE_UNROLLED for (int l = 0; l < 16; l++) if (first + l < n)
            lane[l] = moe__fma_f32(a[first + l], b[first + l], lane[l]);
    MOE_UNROLLED for (int by = 8; by > 0; by /= 2) MOE_UNROLLED for (int l = 0; l < by; l++)
        lane[l] = lane[l] + lane[l + by];
    return lane[0];
}

/* The largest number of the warp; -infinity if there is none. */
MOE_DEVICE float moe_warp_max(float v)
{
    for (int by = 16; by > 0; by /= 2) {
        float other = moe_shuffle_xor(v, by);
        v = other > v ? other : v;
    }
    return v;
}

MOE_DEVICE uint64_t moe_warp_least(uint64_t v)
{
    for (int by = 16; by > 0; by /= 2) {
        uint64_t other = moe_shuffle_xor(v, by);
        v = other < v ? other : v;
    }
    return v;
}

/* A tree over the threads of the warp, the same for all: no order of the CPU. */
template <typename T> MOE_DEVICE T moe_warp_sum(T v)
{
    for (int by = 16; by > 0; by /= 2) v = v + moe_shuffle_xor(v, by);
    return v;
}

/* Likewise over 256 threads; `shared` has 8 elements. Every thread of the block calls. */
template <typename T> MOE_DEVICE T moe_block_sum(T v, T *shared)
{
    T sum = 0;
    v = moe_warp_sum(v);
    if (moe_lane() == 0) shared[threadIdx.x / MOE_WARP] = v;
    moe_block_sync();
    for (int warp = 0; warp < 8; warp++) sum = sum + shared[warp];
    moe_block_sync();
    return sum;
}

#endif
