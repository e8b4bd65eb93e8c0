/* sample.h - kernels that the emulator's own tests launch, correct ones, and their launchers. */
#ifndef EMU_SAMPLE_H
#define EMU_SAMPLE_H

#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* out[row] = the sum of x[row][0..n), a block a row. */
cudaError_t sample_row_sums(float *out, const float *x, int64_t rows, int64_t n, cudaStream_t s);
/* out[i] = x[0] + ... + x[i], n <= 1024. */
cudaError_t sample_scan(int32_t *out, const int32_t *x, int n, cudaStream_t s);
/* count[b] += how many x are b. */
cudaError_t sample_histogram(int32_t *count, const int32_t *x, int64_t n, int bins, cudaStream_t s);
/* out[j][i] = x[i][j], of floats and of 16-bit values. */
cudaError_t sample_transpose_f32(float *out, const float *x, int rows, int columns, cudaStream_t s);
cudaError_t sample_transpose_u16(uint16_t *out, const uint16_t *x, int rows, int columns,
                                 cudaStream_t s);
/* out[i] = factor x[i] + add, 16 bytes a thread, n a multiple of 4. */
cudaError_t sample_affine(float *out, const float *x, int64_t n, float factor, float add,
                          cudaStream_t s);
/* out[i] = lane-wise facts of i: ballots, votes, shuffles of all types. */
cudaError_t sample_warp(int64_t *out, int threads, cudaStream_t s);
/* out[i] = i, by threads that take turns through dynamic shared memory of n floats. */
cudaError_t sample_reverse(float *x, int n, cudaStream_t s);
/* out[0..3] = max and min of x, 32 and 64 bits. */
cudaError_t sample_extremes(int64_t *out, int32_t *out32, const int64_t *x, int n, cudaStream_t s);
/* out[i] = Philox words and normals of i. */
cudaError_t sample_philox(float *out, int n, uint64_t key, cudaStream_t s);

#ifdef __cplusplus
}
#endif

#endif
