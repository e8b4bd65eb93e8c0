/* plan_block.h - a new set of arrays on its way into a plan; shared by plan.c and plan_file.c. */
#ifndef MOE_PLAN_BLOCK_H
#define MOE_PLAN_BLOCK_H

#include "internal.h"

typedef struct moe__plan_block {
    moe__plan_arrays a;
    void *memory;
    int64_t bytes;
} moe__plan_block;

/* Allocates arrays of these sizes. MOE_ERROR_OVERFLOW or MOE_ERROR_OUT_OF_MEMORY. */
moe_status moe__plan_block_create(moe__plan_block *block, moe_context *context, int64_t tokens,
                                  int64_t entries, int64_t num_experts, int64_t groups,
                                  int32_t dtype, const char *function);
void moe__plan_block_free(moe_context *context, moe__plan_block *block);

/* The plan's old arrays are freed, the block's, which are in the host's memory, become its own,
 * moved to where the plan's context has its memory. The block is freed on error. */
moe_status moe__plan_adopt(moe_plan *plan, moe__plan_block *block, const char *function);

/* The plan's arrays in the host's memory, read behind the stream of `workers`: those of the call,
 * or moe__plan_workers. The block is of the allocator of `context`, to be freed there: it has the
 * plan's own arrays (block->memory NULL) if they are in the host's memory already. */
moe_status moe__plan_on_host(const moe_plan *plan, moe__plan_block *block, moe_context *context,
                             const moe__workers *workers);
/* What orders the reading of a plan's arrays after the writing, outside of a call with a stream. */
moe__workers moe__plan_workers(const moe_plan *plan, const char *function);

/* Refuses NULL and the plan of a pass. */
moe_status moe__plan_check_own(const moe_plan *plan, const char *function);

/* Every invariant of plan.h but those of expert_begin, token_of_row and entry_of_row, which need
 * the others: MOE_ERROR_CORRUPT_DATA with the first broken one. plan_file.c */
moe_status moe__plan_check_entries(const moe__plan_arrays *plan, const char *function);

#endif
