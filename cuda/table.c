/* table.c - the tables of the CUDA backend, one for each element type. */
#include "cuda_internal.h"

static int64_t scratch_bytes(const moe__pass_shape *shape)
{
    static int64_t (*const of_file[])(const moe__pass_shape *) = {
        moe__cuda_batch_scratch,  moe__cuda_route_scratch,  moe__cuda_choose_scratch,
        moe__cuda_losses_scratch, moe__cuda_mix_scratch,    moe__cuda_gate_backward_scratch,
        moe__cuda_rows_scratch,   moe__cuda_experts_scratch};
    int64_t most = 0;
    for (size_t i = 0; i < sizeof of_file / sizeof *of_file; i++) {
        int64_t bytes = of_file[i](shape);
        if (bytes < 0) return -1;
        most = moe__max(most, bytes);
    }
    return most > INT64_MAX - 255 ? -1 : (most + 255) & ~(int64_t)255;
}

#define TABLE(type)                                                                                \
    {                                                                                              \
        .name = "cuda " #type, .worker_bytes = scratch_bytes,                                      \
        .route_count = moe__cuda_route_count_##type,                                               \
        .route_forward = moe__cuda_route_forward_##type,                                           \
        .losses_forward = moe__cuda_losses_forward_##type,                                         \
        .gate_backward = moe__cuda_gate_backward_##type, .batch_forward = moe__cuda_batch_forward, \
        .entries_taken = moe__cuda_entries_taken, .everyone_forward = moe__cuda_everyone_forward,  \
        .write_results = moe__cuda_write_results, .plan_rows = moe__cuda_plan_rows,                \
        .mix_forward = moe__cuda_mix_forward_##type,                                               \
        .mix_backward = moe__cuda_mix_backward_##type,                                             \
        .dispatch_forward = moe__cuda_dispatch_forward_##type,                                     \
        .dispatch_backward = moe__cuda_dispatch_backward_##type,                                   \
        .combine_forward = moe__cuda_combine_forward_##type,                                       \
        .combine_backward = moe__cuda_combine_backward_##type,                                     \
        .experts_forward = moe__cuda_experts_forward_##type,                                       \
        .experts_backward = moe__cuda_experts_backward_##type,                                     \
        .output_backward = moe__cuda_output_backward_##type,                                       \
        .second_forward = moe__cuda_second_forward_##type,                                         \
        .second_backward = moe__cuda_second_backward_##type, .travel_pack = moe__cuda_travel_pack, \
        .travel_unique = moe__cuda_travel_unique, .travel_order = moe__cuda_travel_order,          \
        .travel_merge = moe__cuda_travel_merge_##type,                                             \
        .travel_entry_grad = moe__cuda_travel_entry_grad, .travel_drop = moe__cuda_travel_drop,    \
        .travel_write_blocks = moe__cuda_travel_write_blocks,                                      \
        .travel_read_blocks = moe__cuda_travel_read_blocks, .travel_add = moe__cuda_travel_add,    \
        .loss_sums = moe__cuda_loss_sums                                                           \
    }

static const moe__backend table_f32 = TABLE(f32);
static const moe__backend table_bf16 = TABLE(bf16);
static const moe__backend table_f16 = TABLE(f16);

const moe__backend *const moe__cuda_tables[4] = {
    [MOE_DTYPE_F32] = &table_f32, [MOE_DTYPE_BF16] = &table_bf16, [MOE_DTYPE_F16] = &table_f16};
