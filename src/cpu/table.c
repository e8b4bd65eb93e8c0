/* table.c - the table of one variant: this element type on this instruction set. */
#include "cpu/kernels.h"

#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)

const moe__backend MOE_KERNEL(table) = {
    .name = "cpu " TEXT(MOE_VARIANT),
    .worker_bytes = MOE_KERNEL(worker_bytes),
    .route_count = MOE_KERNEL(route_count),
    .route_forward = MOE_KERNEL(route_forward),
    .second_forward = MOE_KERNEL(second_forward),
    .second_backward = MOE_KERNEL(second_backward),
    .losses_forward = MOE_KERNEL(losses_forward),
    .gate_backward = MOE_KERNEL(gate_backward),
    .batch_forward = MOE_KERNEL(batch_forward),
    .entries_taken = MOE_KERNEL(entries_taken),
    .everyone_forward = MOE_KERNEL(everyone_forward),
    .write_results = MOE_KERNEL(write_results),
    .plan_rows = MOE_KERNEL(plan_rows),
    .mix_forward = MOE_KERNEL(mix_forward),
    .mix_backward = MOE_KERNEL(mix_backward),
    .dispatch_forward = MOE_KERNEL(dispatch_forward),
    .dispatch_backward = MOE_KERNEL(dispatch_backward),
    .combine_forward = MOE_KERNEL(combine_forward),
    .combine_backward = MOE_KERNEL(combine_backward),
    .experts_forward = MOE_KERNEL(experts_forward),
    .experts_backward = MOE_KERNEL(experts_backward),
    .output_backward = MOE_KERNEL(output_backward),
    .matrices_copy = MOE_KERNEL(matrices_copy),
    .travel_pack = MOE_KERNEL(travel_pack),
    .travel_unique = MOE_KERNEL(travel_unique),
    .travel_order = MOE_KERNEL(travel_order),
    .travel_merge = MOE_KERNEL(travel_merge),
    .travel_entry_grad = MOE_KERNEL(travel_entry_grad),
    .travel_drop = MOE_KERNEL(travel_drop),
    .travel_add = MOE_KERNEL(travel_add),
    .loss_sums = MOE_KERNEL(loss_sums),
};
