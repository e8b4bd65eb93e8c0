/* emulator.h - what emulated kernels call: the functions behind cuda/device_emulated.h.
 *
 * They are exported by the fake libcudart beside CUDA's own. Kernels run one at a time, under one
 * lock, so where the running thread is stands in a plain global. */
#ifndef EMU_EMULATOR_H
#define EMU_EMULATOR_H

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>
#include <vector_types.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct emu_coordinates {
    uint3 thread, block;
    dim3 block_dim, grid_dim;
} emu_coordinates;

extern emu_coordinates emu_at;

/* What a warp does together. */
enum { EMU_WARP_SYNC, EMU_SHUFFLE, EMU_SHUFFLE_XOR, EMU_SHUFFLE_UP, EMU_SHUFFLE_DOWN, EMU_BALLOT };

enum { EMU_ARGUMENT_SCALAR, EMU_ARGUMENT_POINTER, EMU_ARGUMENT_STRUCT };

typedef struct emu_argument {
    size_t offset, bytes;
    int kind;
} emu_argument;

typedef struct emu_launch {
    const void *kernel;
    void (*run)(const void *kernel, const void *arguments); /* one thread */
    const void *arguments;
    size_t bytes;
    const emu_argument *list;
    int count;
} emu_launch;

cudaError_t emu_launch_kernel(const emu_launch *launch, dim3 grid, dim3 block, size_t shared,
                              cudaStream_t stream);

void *emu_shared(const void *key, size_t bytes, const char *name);
void *emu_shared_dynamic(void);
void emu_block_sync(const char *file, int line);
uint64_t emu_warp_exchange(uint64_t bits, int kind, int by, const char *file, int line);
void emu_misaligned(const void *address, const char *file, int line);

#ifdef __cplusplus
}
#endif

#endif
