/* scan.h - prefix sums of 64-bit integers: in a block, and of an array (scan.cu). */
#ifndef MOE_CUDA_SCAN_H
#define MOE_CUDA_SCAN_H

#include "backend_cuda.h"

enum { MOE_SCAN_CHUNK = 4096 }; /* values that a block takes at a time */

/* values[i] becomes the sum of those before it; *total the sum of all.
 * sums: [moe_scan_sums(count)]. values, sums and total are the device's. */
moe_status moe__cuda_scan(const moe__workers *workers, int64_t *values, int64_t count,
                          int64_t *sums, int64_t *total);
static inline int64_t moe_scan_sums(int64_t count)
{
    int64_t chunks = (count + MOE_SCAN_CHUNK - 1) / MOE_SCAN_CHUNK;
    return chunks + chunks / 1024 + 2; /* and what their own prefix sums need */
}

/* Sum of v over the threads before this one, and of all in *total. Whole blocks of `threads` call
 * it; warp_sum [32] is shared, and free again when it returns. */
MOE_DEVICE int64_t moe_block_scan(int64_t v, int threads, int64_t *warp_sum, int64_t *total)
{
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, warps = threads / 32;
    int64_t sum = v;
    for (int d = 1; d < 32; d *= 2) {
        int64_t before = moe_shuffle_up(sum, d);
        if (lane >= d) sum += before;
    }
    if (lane == 31) warp_sum[warp] = sum;
    moe_block_sync();
    int64_t before = 0, all = 0;
    for (int w = 0; w < warps; w++) {
        before += w < warp ? warp_sum[w] : 0;
        all += warp_sum[w];
    }
    moe_block_sync();
    *total = all;
    return before + sum - v;
}

#endif
