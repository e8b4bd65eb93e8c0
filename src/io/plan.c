/* plan.c - the tables of entries, blocks and sources. */
#include "io.h"

#include <stdlib.h>
#include <string.h>

void moe__io_plan_free(moe__io_plan *plan)
{
    for (int64_t i = 0; i < plan->entries; i++) free(plan->entry[i].name);
    free(plan->entry), free(plan->block), free(plan->source);
    free(plan->metadata), free(plan->header);
    *plan = (moe__io_plan){0};
}

int64_t moe__io_add_entry(moe__io_plan *plan, const char *name, int32_t memory, int32_t dims,
                          const int64_t *shape)
{
    if (!moe__io_grow((void **)&plan->entry, &plan->entry_room, plan->entries, sizeof *plan->entry))
        return -1;
    moe__io_entry *e = &plan->entry[plan->entries];
    *e = (moe__io_entry){.count = 1,
                         .file_index = -1,
                         .scale_index = -1,
                         .dims = dims,
                         .memory = memory,
                         .dtype = memory,
                         .name = moe__io_copy_string(name)};
    if (!e->name) return -1;
    if (plan->store_dtype != MOE_SAME && moe__io_is_float(memory)) e->dtype = plan->store_dtype;
    for (int32_t d = 0; d < MOE_FILE_MAX_DIMS; d++) {
        e->shape[d] = d < dims ? shape[d] : 1;
        e->count = moe__mul(e->count, e->shape[d]);
    }
    e->bytes = moe__mul(e->count, moe__io_dtype_size(e->dtype));
    return plan->entries++;
}

int64_t moe__io_add_block(moe__io_plan *plan, int64_t entry, int64_t first, int64_t rows,
                          int64_t cols)
{
    if (!moe__io_grow((void **)&plan->block, &plan->block_room, plan->blocks, sizeof *plan->block))
        return -1;
    plan->block[plan->blocks] = (moe__io_block){entry, first, rows, cols, -1};
    return plan->blocks++;
}

moe__io_source *moe__io_add_source(moe__io_plan *plan, int64_t block, char *base,
                                   int64_t stride_row, int64_t stride_col)
{
    if (!moe__io_grow((void **)&plan->source, &plan->source_room, plan->sources,
                      sizeof *plan->source))
        return NULL;
    moe__io_block *b = &plan->block[block];
    moe__io_source *s = &plan->source[plan->sources];
    *s = (moe__io_source){.base = base,
                          .row_step = 1,
                          .rows = b->rows,
                          .col_step = 1,
                          .cols = b->cols,
                          .stride_row = stride_row,
                          .stride_col = stride_col,
                          .next = b->source};
    b->source = plan->sources++;
    return s;
}
