/* scan.cu - prefix sums of an array of 64-bit integers.
 *
 * Short ones by one block; longer ones in three kernels: the sum of each chunk, the prefix sums of
 * those, and each chunk again from its own. Integers: any order gives the same. */
#include "scan.h"

/* Above it, chunks have blocks of their own. */
enum { ONE_BLOCK = 8 * MOE_SCAN_CHUNK };

/* sums[b] = the sum of chunk b */
MOE_GLOBAL(1024) moe_scan_sum(const int64_t *values, int64_t count, int64_t *sums)
{
    MOE_SHARED(int64_t, warp_sum, 32);
    int64_t sum = 0, total;
    int64_t begin = (int64_t)blockIdx.x * MOE_SCAN_CHUNK;
    for (int64_t i = begin + threadIdx.x; i < begin + MOE_SCAN_CHUNK && i < count; i += 1024)
        sum += values[i];
    moe_block_scan(sum, 1024, warp_sum, &total);
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

/* Block b has values[b per_block, ...), and before[b] in front of it; NULL: nothing. */
MOE_GLOBAL(1024)
moe_scan_values(int64_t *values, int64_t count, int64_t per_block, const int64_t *before,
                int64_t *total)
{
    MOE_SHARED(int64_t, warp_sum, 32);
    int64_t begin = (int64_t)blockIdx.x * per_block, end = begin + per_block;
    int64_t carry = before ? before[blockIdx.x] : 0;
    if (end > count) end = count;
    for (; begin < end; begin += MOE_SCAN_CHUNK) {
        int64_t first = begin + (int64_t)threadIdx.x * 4, v[4], sum = 0, all;
        for (int i = 0; i < 4; i++) {
            v[i] = first + i < end ? values[first + i] : 0;
            sum += v[i];
        }
        int64_t at = carry + moe_block_scan(sum, 1024, warp_sum, &all);
        for (int i = 0; i < 4; i++) {
            if (first + i < end) values[first + i] = at;
            at += v[i];
        }
        carry += all;
    }
    if (total && blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) *total = carry;
}

moe_status moe__cuda_scan(const moe__workers *workers, int64_t *values, int64_t count,
                          int64_t *sums, int64_t *total)
{
    int64_t chunks = (count + MOE_SCAN_CHUNK - 1) / MOE_SCAN_CHUNK;
    int64_t *none = NULL;
    if (count <= ONE_BLOCK)
        return moe__cuda_launch(workers, "scan", moe_scan_values, dim3(1), dim3(1024), 0, values,
                                count, moe__max(count, 1), none, total);
    dim3 grid((unsigned)chunks);
    MOE_TRY(
        moe__cuda_launch(workers, "scan", moe_scan_sum, grid, dim3(1024), 0, values, count, sums));
    MOE_TRY(moe__cuda_scan(workers, sums, chunks, sums + chunks, total));
    return moe__cuda_launch(workers, "scan", moe_scan_values, grid, dim3(1024), 0, values, count,
                            MOE_SCAN_CHUNK, sums, none);
}
