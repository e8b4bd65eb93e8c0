/* sample.cu - correct kernels: reductions, scans, atomics, templates, vectors, dynamic shared
 * memory.
 *
 * nvcc compiles this file too, with warnings as errors: it is the sample of the kernel language. */
#include "device.h"
#include "sample.h"

#define EXPORT extern "C"

MOE_DEVICE float warp_sum(float v)
{
    for (int m = 16; m > 0; m /= 2) v += moe_shuffle_xor(v, m);
    return v;
}

MOE_GLOBAL(256) row_sums(float *out, const float *x, int64_t n)
{
    MOE_SHARED(float, part, 8);
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    moe_block_sync();
    if (threadIdx.x == 0) {
        float all = 0.0f;
        for (unsigned w = 0; w < blockDim.x / 32; w++) all += part[w];
        out[blockIdx.x] = all;
    }
}

EXPORT cudaError_t sample_row_sums(float *out, const float *x, int64_t rows, int64_t n,
                                   cudaStream_t s)
{
    return moe_launch(row_sums, dim3((unsigned)rows), dim3(256), 0, s, out, x, n);
}

MOE_GLOBAL(1024) scan(int32_t *out, const int32_t *x, int n)
{
    MOE_SHARED(int32_t, warp_total, 32);
    int i = (int)threadIdx.x, lane = i % 32, warp = i / 32;
    int32_t v = i < n ? x[i] : 0;
    for (int d = 1; d < 32; d *= 2) {
        int32_t below = moe_shuffle_up(v, d);
        if (lane >= d) v += below;
    }
    if (lane == 31) warp_total[warp] = v;
    moe_block_sync();
    for (int w = 0; w < warp; w++) v += warp_total[w];
    if (i < n) out[i] = v;
}

EXPORT cudaError_t sample_scan(int32_t *out, const int32_t *x, int n, cudaStream_t s)
{
    return moe_launch(scan, dim3(1), dim3((unsigned)(n + 31) / 32 * 32), 0, s, out, x, n);
}

MOE_GLOBAL(256) histogram(int32_t *count, const int32_t *x, int64_t n, int bins)
{
    MOE_SHARED_DYNAMIC(int32_t, local);
    for (int b = (int)threadIdx.x; b < bins; b += (int)blockDim.x) local[b] = 0;
    moe_block_sync();
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) moe_atomic_add(&local[x[i]], 1);
    moe_block_sync();
    for (int b = (int)threadIdx.x; b < bins; b += (int)blockDim.x) {
        if (local[b] != 0) moe_atomic_add(&count[b], local[b]);
    }
}

EXPORT cudaError_t sample_histogram(int32_t *count, const int32_t *x, int64_t n, int bins,
                                    cudaStream_t s)
{
    return moe_launch(histogram, dim3((unsigned)((n + 255) / 256)), dim3(256),
                      (size_t)bins * sizeof(int32_t), s, count, x, n, bins);
}

template <typename T, int side> MOE_GLOBAL(256) transpose(T *out, const T *x, int rows, int columns)
{
    MOE_SHARED(T, tile, side * (side + 1));
    int row = (int)blockIdx.y * side, column = (int)blockIdx.x * side;
    int i = (int)threadIdx.y, j = (int)threadIdx.x;
    for (int l = i; l < side; l += (int)blockDim.y) {
        if (row + l < rows && column + j < columns) {
            tile[l * (side + 1) + j] = x[(int64_t)(row + l) * columns + column + j];
        }
    }
    moe_block_sync();
    for (int l = i; l < side; l += (int)blockDim.y) {
        if (column + l < columns && row + j < rows) {
            out[(int64_t)(column + l) * rows + row + j] = tile[j * (side + 1) + l];
        }
    }
}

template <typename T>
static cudaError_t launch_transpose(T *out, const T *x, int rows, int columns, cudaStream_t s)
{
    dim3 grid((unsigned)(columns + 31) / 32, (unsigned)(rows + 31) / 32);
    return moe_launch(transpose<T, 32>, grid, dim3(32, 8), 0, s, out, x, rows, columns);
}

EXPORT cudaError_t sample_transpose_f32(float *out, const float *x, int rows, int columns,
                                        cudaStream_t s)
{
    return launch_transpose(out, x, rows, columns, s);
}

EXPORT cudaError_t sample_transpose_u16(uint16_t *out, const uint16_t *x, int rows, int columns,
                                        cudaStream_t s)
{
    return launch_transpose(out, x, rows, columns, s);
}

MOE_GLOBAL(128) affine(float *out, const float *x, int64_t n, float factor, float add)
{
    int64_t i = 4 * ((int64_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    uint4 bits = moe_load16(x + i);
    float v[4];
    memcpy(v, &bits, sizeof v);
    for (int j = 0; j < 4; j++) v[j] = factor * v[j] + add;
    memcpy(&bits, v, sizeof v);
    moe_store16(out + i, bits);
}

EXPORT cudaError_t sample_affine(float *out, const float *x, int64_t n, float factor, float add,
                                 cudaStream_t s)
{
    return moe_launch(affine, dim3((unsigned)((n + 511) / 512)), dim3(128), 0, s, out, x, n, factor,
                      add);
}

MOE_GLOBAL(256) warp_facts(int64_t *out)
{
    int t = (int)threadIdx.x, lane = t % 32;
    int64_t fact = moe_popcount(moe_ballot(lane % 3 == 0));
    fact += 100 * (moe_any(lane == 7) ? 1 : 0) + 200 * (moe_all(lane < 32) ? 1 : 0);
    fact += (int64_t)moe_shuffle((double)lane, 5) * 1000;
    fact += moe_shuffle_down((int64_t)lane, 1) * 10000;
    fact += (int64_t)moe_shuffle_xor((uint32_t)lane, 31) * 1000000;
    fact += (int64_t)moe_clz((uint32_t)lane) * 100000000;
    moe_warp_sync();
    out[t] = fact;
}

EXPORT cudaError_t sample_warp(int64_t *out, int threads, cudaStream_t s)
{
    return moe_launch(warp_facts, dim3(1), dim3((unsigned)threads), 0, s, out);
}

MOE_GLOBAL(256) reverse(float *x, int n)
{
    MOE_SHARED_DYNAMIC(float, kept);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) kept[i] = x[i];
    moe_block_sync();
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) x[i] = kept[n - 1 - i];
}

EXPORT cudaError_t sample_reverse(float *x, int n, cudaStream_t s)
{
    size_t bytes = (size_t)n * sizeof(float);
    cudaError_t error = bytes > 48 * 1024 ? moe_kernel_allow_shared(reverse, bytes) : cudaSuccess;
    return error != cudaSuccess ? error : moe_launch(reverse, dim3(1), dim3(256), bytes, s, x, n);
}

MOE_GLOBAL(256) extremes(int64_t *out, int32_t *out32, const int64_t *x, int n)
{
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    moe_atomic_max(&out[0], x[i]);
    moe_atomic_min(&out[1], x[i]);
    moe_atomic_add(&out[2], x[i]);
    moe_atomic_max(&out32[0], (int32_t)x[i]);
    moe_atomic_min(&out32[1], (int32_t)x[i]);
    moe_atomic_add((uint32_t *)&out32[2], 1u);
}

EXPORT cudaError_t sample_extremes(int64_t *out, int32_t *out32, const int64_t *x, int n,
                                   cudaStream_t s)
{
    return moe_launch(extremes, dim3((unsigned)(n + 255) / 256), dim3(256), 0, s, out, out32, x, n);
}

MOE_GLOBAL(256) philox(float *out, int n, uint64_t key)
{
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    uint32_t words[4];
    if (i >= n) return;
    moe__counter(words, moe__stream(1, 2, MOE__PURPOSE_NOISE), 0, (uint32_t)i, 0);
    moe__philox(key, words, words);
    float normals[4];
    moe__normal4(words, normals);
    float rounded = moe_from_bf16(moe_to_bf16(normals[2])) + moe_from_f16(moe_to_f16(normals[3]));
    out[i] = normals[0] + moe__exp_f32(normals[1]) + rounded;
}

EXPORT cudaError_t sample_philox(float *out, int n, uint64_t key, cudaStream_t s)
{
    return moe_launch(philox, dim3((unsigned)(n + 255) / 256), dim3(256), 0, s, out, n, key);
}
