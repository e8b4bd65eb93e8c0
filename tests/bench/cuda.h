/* cuda.h - what both halves of the benchmark on a GPU share: a shape, and the profile of a step. */
#ifndef BENCH_CUDA_H
#define BENCH_CUDA_H

#include <stdint.h>

/* T tokens, each to K of E experts of width D -> F -> D; R = T K rows. */
typedef struct bench_shape {
    int64_t T, D, F, E, K;
    int64_t size; /* bytes of an element: 2 or 4 */
    int gated;
} bench_shape;

/* Between begin and end every kernel launched and every product of cuBLAS by this program is timed
 * by a pair of events; other times the calls go through. */
void bench_profile_begin(void *stream);
void bench_profile_end(void);
/* A line for each kernel, the slowest first; copy_rate in bytes a second gives the floor. */
void bench_profile_print(const bench_shape *shape, double copy_rate);

#endif
