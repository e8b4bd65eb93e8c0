/* kernels.h - every kernel of a CPU table, by the names of its slots in backend.h. */
#ifndef MOE_CPU_KERNELS_H
#define MOE_CPU_KERNELS_H

#include "internal.h"
#include "cpu/real.h"

/* grouped_gemm.c, gemm_dw.c: the three products over all experts of a plan. _plan fills tile_begin
 * and returns the number of tiles; _tile computes one, with `scratch` bytes of gemm_scratch for
 * itself. */
int64_t MOE_KERNEL(gemm_rows_plan)(moe__gemm_rows_job *job);
int64_t MOE_KERNEL(gemm_dw_plan)(moe__gemm_dw_job *job);
size_t MOE_KERNEL(gemm_scratch)(void);
void MOE_KERNEL(gemm_rows_tile)(const moe__gemm_rows_job *job, int64_t tile, void *scratch);
void MOE_KERNEL(gemm_dw_tile)(const moe__gemm_dw_job *job, int64_t tile, void *scratch);

int64_t MOE_KERNEL(worker_bytes)(const moe__pass_shape *shape);
moe_status MOE_KERNEL(route_count)(moe__route_job *job, int64_t *entries);
moe_status MOE_KERNEL(route_forward)(moe__route_job *job);
moe_status MOE_KERNEL(second_forward)(moe__second_job *job);
moe_status MOE_KERNEL(second_backward)(moe__second_job *job);
moe_status MOE_KERNEL(losses_forward)(moe__losses_job *job);
moe_status MOE_KERNEL(gate_backward)(moe__gate_backward_job *job);
moe_status MOE_KERNEL(batch_forward)(moe__batch_job *job);
moe_status MOE_KERNEL(entries_taken)(const moe__batch_job *job, int64_t *entries);
moe_status MOE_KERNEL(everyone_forward)(const moe__workers *workers, moe__plan_arrays *plan);
moe_status MOE_KERNEL(write_results)(const moe__losses_job *job, void *losses_out, void *stats_out);
moe_status MOE_KERNEL(plan_rows)(moe__plan_rows_job *job);
moe_status MOE_KERNEL(mix_forward)(moe__mix_job *job);
moe_status MOE_KERNEL(mix_backward)(moe__mix_job *job);
moe_status MOE_KERNEL(dispatch_forward)(moe__rows_job *job);
moe_status MOE_KERNEL(dispatch_backward)(moe__rows_job *job);
moe_status MOE_KERNEL(combine_forward)(moe__rows_job *job);
moe_status MOE_KERNEL(combine_backward)(moe__rows_job *job);
moe_status MOE_KERNEL(output_backward)(moe__rows_job *job);
moe_status MOE_KERNEL(matrices_copy)(const moe__copy_job *job);
moe_status MOE_KERNEL(experts_forward)(moe__experts_job *job);
moe_status MOE_KERNEL(experts_backward)(moe__experts_job *job);
moe_status MOE_KERNEL(travel_pack)(const moe__pack_job *job);
moe_status MOE_KERNEL(travel_unique)(const moe__unique_job *job);
moe_status MOE_KERNEL(travel_order)(const moe__order_job *job);
moe_status MOE_KERNEL(travel_merge)(const moe__merge_job *job);
moe_status MOE_KERNEL(travel_entry_grad)(const moe__entry_grad_job *job);
moe_status MOE_KERNEL(travel_drop)(const moe__drop_job *job);
moe_status MOE_KERNEL(travel_add)(const moe__workers *workers, void *parts, int64_t n,
                                  int64_t count, int32_t dtype);
moe_status MOE_KERNEL(loss_sums)(moe__losses_job *job, double *numbers, bool partial, bool put,
                                 int64_t *count);

/* The last i in [0, count) with begin[i] <= at: the run that holds `at`. */
static inline int64_t run_of(const int64_t *begin, int64_t count, int64_t at)
{
    int64_t low = 0, high = count - 1;
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        if (begin[middle] <= at)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

extern const moe__backend MOE_KERNEL(table);

#endif
