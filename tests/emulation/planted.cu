/* planted.cu - each kernel is wrong in one way, but for the last two. */
#include "device.h"
#include "planted.h"

#define LAUNCH(kernel, threads, ...) \
    return moe_launch(kernel, dim3(1), dim3(threads), 0, s, __VA_ARGS__)

/* A neighbour's value without waiting for it. */
MOE_GLOBAL(64) no_barrier(float *out)
{
    MOE_SHARED(float, kept, 64);
    kept[threadIdx.x] = (float)threadIdx.x;
    out[threadIdx.x] = kept[(threadIdx.x + 1) % 64];
}
cudaError_t planted_no_barrier(float *out, cudaStream_t s) { LAUNCH(no_barrier, 64, out); }

MOE_GLOBAL(64) shared_overrun(float *out, int shift)
{
    MOE_SHARED(float, kept, 64);
    float *p = kept + shift;
    p[threadIdx.x] = 1.0f;
    moe_block_sync();
    out[threadIdx.x] = p[63 - threadIdx.x];
}
cudaError_t planted_shared_overrun(float *out, cudaStream_t s)
{
    LAUNCH(shared_overrun, 64, out, 1);
}

MOE_GLOBAL(32) global_overrun(unsigned char *out, int at)
{
    if (threadIdx.x == 0) out[at] = 7;
}
cudaError_t planted_global_overrun(unsigned char *out, int at, cudaStream_t s)
{
    LAUNCH(global_overrun, 32, out, at);
}

MOE_GLOBAL(64) divergent_barrier(float *out)
{
    if (threadIdx.x < 32) {
        moe_block_sync();
    } else {
        out[0] = 1.0f;
        moe_block_sync();
    }
}
cudaError_t planted_divergent_barrier(float *out, cudaStream_t s)
{
    LAUNCH(divergent_barrier, 64, out);
}

MOE_GLOBAL(64) early_return(float *out)
{
    if (threadIdx.x == 63) return;
    moe_block_sync();
    out[threadIdx.x] = 1.0f;
}
cudaError_t planted_early_return(float *out, cudaStream_t s) { LAUNCH(early_return, 64, out); }

MOE_GLOBAL(64) divergent_shuffle(float *out)
{
    float v = (float)threadIdx.x;
    if (threadIdx.x % 32 != 9) v = moe_shuffle_xor(v, 1);
    out[threadIdx.x] = v;
}
cudaError_t planted_divergent_shuffle(float *out, cudaStream_t s)
{
    LAUNCH(divergent_shuffle, 64, out);
}

MOE_GLOBAL(64) unwritten_shared(float *out)
{
    MOE_SHARED(float, kept, 64);
    if (threadIdx.x != 5) kept[threadIdx.x] = 1.0f;
    moe_block_sync();
    out[threadIdx.x] = kept[63 - threadIdx.x];
}
cudaError_t planted_unwritten_shared(float *out, cudaStream_t s)
{
    LAUNCH(unwritten_shared, 64, out);
}

MOE_GLOBAL(64) much_shared(float *out)
{
    MOE_SHARED_DYNAMIC(float, kept);
    kept[threadIdx.x] = 1.0f;
    out[threadIdx.x] = kept[threadIdx.x];
}
cudaError_t planted_much_shared(float *out, size_t bytes, cudaStream_t s)
{
    return moe_launch(much_shared, dim3(1), dim3(64), bytes, s, out);
}

MOE_GLOBAL(32) misaligned(float *out)
{
    if (threadIdx.x == 3) moe_store16(out + 4, moe_load16(out + 1));
}
cudaError_t planted_misaligned(float *out, cudaStream_t s) { LAUNCH(misaligned, 32, out); }

MOE_GLOBAL(1024) lanes(float *out)
{
    if (threadIdx.x == 0) out[0] = 1.0f;
}
cudaError_t planted_lanes(float *out, unsigned threads, unsigned blocks, cudaStream_t s)
{
    return moe_launch(lanes, dim3(blocks), dim3(threads), 0, s, out);
}

/* All blocks write one float. */
MOE_GLOBAL(32) block_race(float *out)
{
    if (threadIdx.x == blockIdx.x) out[0] = (float)blockIdx.x;
}
cudaError_t planted_block_race(float *out, cudaStream_t s)
{
    return moe_launch(block_race, dim3(8), dim3(32), 0, s, out);
}

MOE_GLOBAL(256) add_one(float *out, int n)
{
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] += 1.0f;
}
cudaError_t planted_add_one(float *out, int n, cudaStream_t s)
{
    return moe_launch(add_one, dim3((unsigned)(n + 255) / 256), dim3(256), 0, s, out, n);
}

MOE_GLOBAL(256) copy(float *out, const float *x, int n)
{
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = x[i];
}
cudaError_t planted_copy(float *out, const float *x, int n, cudaStream_t s)
{
    return moe_launch(copy, dim3((unsigned)(n + 255) / 256), dim3(256), 0, s, out, x, n);
}
