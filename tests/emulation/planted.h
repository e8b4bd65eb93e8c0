/* planted.h - kernels with a mistake each, for the test that the emulator finds it. */
#ifndef EMU_PLANTED_H
#define EMU_PLANTED_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

cudaError_t planted_no_barrier(float *out, cudaStream_t s);
cudaError_t planted_shared_overrun(float *out, cudaStream_t s);
cudaError_t planted_global_overrun(unsigned char *out, int at, cudaStream_t s);
cudaError_t planted_divergent_barrier(float *out, cudaStream_t s);
cudaError_t planted_early_return(float *out, cudaStream_t s);
cudaError_t planted_divergent_shuffle(float *out, cudaStream_t s);
cudaError_t planted_unwritten_shared(float *out, cudaStream_t s);
cudaError_t planted_much_shared(float *out, size_t bytes, cudaStream_t s);
cudaError_t planted_misaligned(float *out, cudaStream_t s);
cudaError_t planted_lanes(float *out, unsigned threads, unsigned blocks, cudaStream_t s);
cudaError_t planted_block_race(float *out, cudaStream_t s);
/* Correct: out[i] += 1 for n floats. */
cudaError_t planted_add_one(float *out, int n, cudaStream_t s);
/* Correct: out[i] = x[i]. */
cudaError_t planted_copy(float *out, const float *x, int n, cudaStream_t s);

#ifdef __cplusplus
}
#endif

#endif
