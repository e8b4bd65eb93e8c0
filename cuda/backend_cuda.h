/* backend_cuda.h - what the files of cuda/ share: errors, launches, element types, slots.
 *
 * A .cu file has the kernels of one step and, below them, the functions that fill the step's slots
 * of backend.h: they read the job on the host and launch. They never read an array of the job: it
 * is in the device's memory. A .c file is host code alone. */
#ifndef MOE_BACKEND_CUDA_H
#define MOE_BACKEND_CUDA_H

#include "backend.h"

#define CUDA_NO_HALF /* else `half` is a type where numeric.h has a variable */
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

MOE_BEGIN_DECLS

/* MOE_OK, or MOE_ERROR_DEVICE with what failed and the runtime's words for it. context.c */
moe_status moe__cuda_status(cudaError_t error, const moe__workers *workers, const char *what);
moe_status moe__cublas_status(cublasStatus_t status, const moe__workers *workers, const char *what);
/* Sets the message: the function of the workers, then the text, printf's. Returns status. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
moe_status
moe__cuda_fail(moe_status status, const moe__workers *workers, const char *format, ...);

/* Bytes of workers->scratch that the slots of a file need at most for passes of this shape, or -1;
 * NULL: of calls without a pass. table.c takes the largest. */
int64_t moe__cuda_batch_scratch(const moe__pass_shape *shape);
int64_t moe__cuda_route_scratch(const moe__pass_shape *shape);
int64_t moe__cuda_choose_scratch(const moe__pass_shape *shape);
int64_t moe__cuda_losses_scratch(const moe__pass_shape *shape);
int64_t moe__cuda_gate_backward_scratch(const moe__pass_shape *shape);
int64_t moe__cuda_mix_scratch(const moe__pass_shape *shape);
int64_t moe__cuda_rows_scratch(const moe__pass_shape *shape);
int64_t moe__cuda_experts_scratch(const moe__pass_shape *shape);

/* The handle of the pass, on the stream of the call, and the rows of each expert on the host:
 * expert_begin [E+1] of the plan after one bounded wait. pass.c */
moe_status moe__cuda_cublas(const moe__workers *workers, cublasHandle_t *handle);
moe_status moe__cuda_counts(const moe__workers *workers, const moe__plan_arrays *plan,
                            const int64_t **expert_begin);

/* Copies bytes to the host's memory behind what is on the stream, and waits until they are there.
 * context.c */
moe_status moe__cuda_fetch(const moe__workers *workers, void *host, const void *device,
                           int64_t bytes);
/* The functions of moe__memory that are kernels. fill.cu */
moe_status moe__cuda_zero_strided(const moe__workers *workers, void *base, const int64_t count[3],
                                  const int64_t stride[3], int64_t element);
moe_status moe__cuda_copy_strided(const moe__workers *workers, void *to, const int64_t to_stride[3],
                                  const void *from, const int64_t from_stride[3],
                                  const int64_t count[3], int64_t element);
/* A matrix [k,n] of elements of 2 or 4 bytes, by its strides of rows and columns. */
moe_status moe__cuda_copy_matrix(const moe__workers *workers, void *to, const int64_t to_stride[2],
                                 const void *from, const int64_t from_stride[2], int64_t k,
                                 int64_t n, int64_t element);
moe_status moe__cuda_note_touched(const moe__workers *workers, uint8_t *touched,
                                  const moe__plan_arrays *plan, bool forget);

/* Every slot exists for the three element types: moe__cuda_<slot>_f32, _bf16, _f16. */
#define MOE_CUDA_DECLARE(slot, argument)          \
    moe_status moe__cuda_##slot##_f32(argument);  \
    moe_status moe__cuda_##slot##_bf16(argument); \
    moe_status moe__cuda_##slot##_f16(argument);
/* Defines them as the instances of template <typename T> static moe_status slot(argument). */
#define MOE_CUDA_SLOT(slot, argument)                                                           \
    extern "C" moe_status moe__cuda_##slot##_f32(argument job) { return slot<float>(job); }     \
    extern "C" moe_status moe__cuda_##slot##_bf16(argument job) { return slot<moe_bf16>(job); } \
    extern "C" moe_status moe__cuda_##slot##_f16(argument job) { return slot<moe_f16>(job); }

moe_status moe__cuda_route_count_f32(moe__route_job *job, int64_t *entries);
moe_status moe__cuda_route_count_bf16(moe__route_job *job, int64_t *entries);
moe_status moe__cuda_route_count_f16(moe__route_job *job, int64_t *entries);
MOE_CUDA_DECLARE(route_forward, moe__route_job *)
MOE_CUDA_DECLARE(losses_forward, moe__losses_job *)
MOE_CUDA_DECLARE(gate_backward, moe__gate_backward_job *)
MOE_CUDA_DECLARE(mix_forward, moe__mix_job *)
MOE_CUDA_DECLARE(mix_backward, moe__mix_job *)
MOE_CUDA_DECLARE(dispatch_forward, moe__rows_job *)
MOE_CUDA_DECLARE(dispatch_backward, moe__rows_job *)
MOE_CUDA_DECLARE(combine_forward, moe__rows_job *)
MOE_CUDA_DECLARE(combine_backward, moe__rows_job *)
MOE_CUDA_DECLARE(output_backward, moe__rows_job *)
MOE_CUDA_DECLARE(experts_forward, moe__experts_job *)
MOE_CUDA_DECLARE(experts_backward, moe__experts_job *)
MOE_CUDA_DECLARE(second_forward, moe__second_job *)
MOE_CUDA_DECLARE(second_backward, moe__second_job *)
MOE_CUDA_DECLARE(travel_merge, const moe__merge_job *)
/* Those that see no element of the storage type have one function. */
moe_status moe__cuda_batch_forward(moe__batch_job *job);
moe_status moe__cuda_entries_taken(const moe__batch_job *job, int64_t *entries);
moe_status moe__cuda_everyone_forward(const moe__workers *workers, moe__plan_arrays *plan);
moe_status moe__cuda_write_results(const moe__losses_job *job, void *losses_out, void *stats_out);
moe_status moe__cuda_plan_rows(moe__plan_rows_job *job);
moe_status moe__cuda_travel_pack(const moe__pack_job *job);
moe_status moe__cuda_travel_unique(const moe__unique_job *job);
moe_status moe__cuda_travel_order(const moe__order_job *job);
moe_status moe__cuda_travel_entry_grad(const moe__entry_grad_job *job);
moe_status moe__cuda_travel_drop(const moe__drop_job *job);
moe_status moe__cuda_travel_write_blocks(const moe__blocks_job *job);
moe_status moe__cuda_travel_read_blocks(const moe__blocks_job *job);
moe_status moe__cuda_travel_add(const moe__workers *workers, void *parts, int64_t n, int64_t count,
                                int32_t dtype);
moe_status moe__cuda_loss_sums(moe__losses_job *job, double *numbers, bool partial, bool put,
                               int64_t *count);

MOE_END_DECLS

#ifdef __cplusplus
#include "device.h"

/* The storage types. A value is widened to float when it is read and rounded once when it is
 * stored; sums are of floats. */
struct moe_bf16 {
    uint16_t bits;
};
struct moe_f16 {
    uint16_t bits;
};

/* Launches a kernel on the stream of the call. */
template <class... P>
static inline moe_status moe__cuda_launch(const moe__workers *workers, const char *name,
                                          void (*kernel)(P...), dim3 grid, dim3 block,
                                          size_t shared, typename moe_same<P>::type... args)
{
    cudaError_t error = moe_launch(kernel, grid, block, shared, (cudaStream_t)workers->stream,
                                   args...);
    return error == cudaSuccess ? MOE_OK : moe__cuda_status(error, workers, name);
}
#endif

#endif
