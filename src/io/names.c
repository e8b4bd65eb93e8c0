/* names.c - what a checkpoint has: the items of a save or a load as a plan.
 *
 *     replicated parameters  item + "gate.weight", as the record's shape
 *     experts                item + "experts." + number + ".w1": W1 [F,D], W3 [F,D], W2 [O,F], as
 *                            [out,in] whatever the layout; b1, b3 [F], b2 [O]
 *     host tensors           item
 *
 * The number is the expert's as the gate knows it: over all ranks, and over the parts of a pool. */
#include "io.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void item_defaults(void *instance)
{
    *(moe_checkpoint_item *)instance = (moe_checkpoint_item){0};
}

const moe__struct_info moe__io_item_info = MOE__STRUCT_INFO(moe_checkpoint_item, item_defaults);

moe_status moe_checkpoint_item_init(moe_checkpoint_item *item, size_t size)
{
    return moe__module_struct_init(&moe__io_item_info, item, size, __func__);
}

enum { NAME_BYTES = 1024 };

/* ---- parameters ------------------------------------------------------------------------------ */

/* All of a parameter that every rank has, or some of its matrices [rows,cols] after the first
 * dimension. */
static moe_status plan_whole(moe__io_plan *plan, const char *prefix, const moe__io_parameter *p,
                             bool mine, const char *function)
{
    const moe_parameter_record *r = &p->record;
    char name[NAME_BYTES];
    int32_t d = r->dims;
    int64_t rows = d > 1 ? r->shape[d - 2] : 1, cols = r->shape[d - 1];
    int64_t row_stride = d > 1 ? r->data_stride[d - 2] : 0, matrices = d > 2 ? r->shape[0] : 1;
    (void)snprintf(name, sizeof name, "%s%s", prefix, r->name);
    int64_t entry = moe__io_add_entry(plan, name, r->data_dtype, d, r->global_shape);
    if (entry < 0) REFUSE_MEMORY();
    bool spread = r->global_shape[0] != r->shape[0] || r->global_offset[0] != 0;
    for (int64_t m = 0; m < matrices && (mine || spread); m++) {
        char *base = moe__io_expert_base(p, 0);
        if (r->data_per_expert)
            base = (char *)r->data_per_expert[m];
        else
            base += m * r->data_stride[0] * moe__io_dtype_size(r->data_dtype) * (d > 2);
        int64_t at = (r->global_offset[0] + m) * rows * cols;
        int64_t block = moe__io_add_block(plan, entry, at, rows, cols);
        if (block < 0 || !moe__io_add_source(plan, block, base, row_stride, r->data_stride[d - 1]))
            REFUSE_MEMORY();
    }
    return MOE_OK;
}

static moe_status plan_experts(moe__io_plan *plan, const char *prefix, const moe__io_parameter *p,
                               bool mine, const char *function)
{
    static const char *const POOLS[] = {"", "experts", "shared", "residual"};
    char name[NAME_BYTES];
    bool matrix = p->tensor <= IO_W2;
    const int64_t shape[2] = {matrix ? p->rows : p->cols, p->cols};
    for (int64_t e = p->begin; e < p->begin + p->all; e++) {
        (void)snprintf(name, sizeof name, "%s%s.%lld.%s", prefix, POOLS[p->owner], (ll)e,
                       moe__io_tensor_name(p->tensor));
        int64_t entry = moe__io_add_entry(plan, name, p->record.data_dtype, matrix ? 2 : 1, shape);
        if (entry < 0) REFUSE_MEMORY();
        int64_t local = moe__io_local(p, e);
        if (!mine || local < 0) continue;
        int64_t block = moe__io_add_block(plan, entry, 0, p->rows, p->cols);
        if (block < 0 || !moe__io_add_source(plan, block, moe__io_expert_base(p, local),
                                             p->stride_row, p->stride_col))
            REFUSE_MEMORY();
    }
    return MOE_OK;
}

/* rank -1: every rank moves what is replicated; else rank 0 does. */
static moe_status plan_layer(moe__io_plan *plan, const char *prefix, const moe__io_layer *l,
                             int32_t rank, const char *function)
{
    for (int64_t i = 0; i < l->count; i++) {
        const moe__io_parameter *p = &l->parameter[i];
        bool mine = rank <= 0 || (p->owner == IO_ROUTED && l->size > 1);
        if (p->owner == IO_GATE || p->owner == IO_LAYER)
            MOE_TRY(plan_whole(plan, prefix, p, mine, function));
        else
            MOE_TRY(plan_experts(plan, prefix, p, mine, function));
    }
    return MOE_OK;
}

/* ---- host tensors ---------------------------------------------------------------------------- */

static moe_status plan_tensor(moe__io_plan *plan, const moe_checkpoint_item *item, bool mine,
                              const char *function)
{
    if (!item->name[0]) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "a host tensor has no name");
    if (moe__io_dtype_size(item->dtype) == 0)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s: dtype is %d", item->name, (int)item->dtype);
    if (item->dims < 0 || item->dims > MOE_FILE_MAX_DIMS)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s: dims is %d; it must be in [0, %d]", item->name,
               (int)item->dims, (int)MOE_FILE_MAX_DIMS);
    for (int32_t d = 0; d < item->dims; d++)
        if (item->shape[d] < 0)
            REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s: shape[%d] is %lld", item->name, (int)d,
                   (ll)item->shape[d]);
    int64_t entry = moe__io_add_entry(plan, item->name, item->dtype, item->dims, item->shape);
    if (entry < 0) REFUSE_MEMORY();
    int64_t count = plan->entry[entry].count;
    if (plan->entry[entry].bytes < 0 || moe__mul(count, 8) < 0)
        REFUSE(MOE_ERROR_OVERFLOW, "%.200s does not fit in 63 bits", item->name);
    if (count > 0 && !item->data)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s: data is NULL", item->name);
    if (!mine) return MOE_OK;
    int64_t block = moe__io_add_block(plan, entry, 0, 1, count);
    if (block < 0 || !moe__io_add_source(plan, block, item->data, 0, 1)) REFUSE_MEMORY();
    return MOE_OK;
}

/* ---- items ----------------------------------------------------------------------------------- */

static moe_status check_item_name(const char *name, int64_t index, const char *function)
{
    if (!name) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "items[%lld].name is NULL", (ll)index);
    if (strlen(name) > NAME_BYTES / 2)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT,
               "items[%lld].name has %lld bytes, at most %d are possible", (ll)index,
               (ll)strlen(name), NAME_BYTES / 2);
    if (moe__io_has_control(name) || !moe__io_is_utf8(name))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT,
               "items[%lld].name is no UTF-8 without control characters", (ll)index);
    return MOE_OK;
}

/* Item `index`: structs of the size that the first one has. */
static moe_status read_item(moe_checkpoint_item *known, const moe_checkpoint_item *items,
                            int64_t index, const char *function)
{
    uint64_t size = items[0].struct_size;
    const void *at = (const char *)items + (uint64_t)index * size;
    uint64_t own;
    memcpy(&own, at, sizeof own);
    if (own != size)
        REFUSE(MOE_ERROR_STRUCT_SIZE, "items[%lld] has struct_size %llu, the first one %llu",
               (ll)index, (unsigned long long)own, (unsigned long long)size);
    MOE_TRY(MOE__IO_READ(moe__io_item_info, known, at, function));
    return check_item_name(known->name, index, function);
}

void moe__io_layers_free(moe__io_layer *layers, int64_t count)
{
    for (int64_t i = 0; i < count; i++) moe__io_describe_free(&layers[i]);
    free(layers);
}

/* An item into the plan; *count layers are described so far. */
static moe_status plan_item(moe__io_plan *plan, moe__io_layer *layers, int64_t *count,
                            const moe_checkpoint_item *item, int32_t rank, const char *function)
{
    if (!item->layer) {
        if (item->values)
            REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s: values without a layer", item->name);
        return plan_tensor(plan, item, rank <= 0, function);
    }
    MOE_TRY(moe__io_describe(&layers[*count], item->layer, item->values, function));
    moe__io_layer *l = &layers[(*count)++];
    for (int64_t i = 0; i < l->count; i++)
        if (!l->parameter[i].record.data && !l->parameter[i].record.data_per_expert)
            REFUSE(MOE_ERROR_INVALID_STATE, "parameter %.200s%s is not bound", item->name,
                   l->parameter[i].record.name);
    return plan_layer(plan, item->name, l, rank, function);
}

moe_status moe__io_plan_items(moe__io_plan *plan, moe__io_layer **layers, int64_t *layer_count,
                              const moe_checkpoint_item *items, int64_t count, int32_t rank,
                              const char *function)
{
    *layers = NULL;
    *layer_count = 0;
    if (count < 1) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "count is %lld", (ll)count);
    if (!items) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "items is NULL");
    moe__io_layer *l = moe__mul(count, sizeof *l) < 0 ? NULL : calloc((size_t)count, sizeof *l);
    if (!l) REFUSE_MEMORY();
    moe_status status = MOE_OK;
    for (int64_t i = 0; i < count && status == MOE_OK; i++) {
        moe_checkpoint_item item;
        status = read_item(&item, items, i, function);
        if (status == MOE_OK) status = plan_item(plan, l, layer_count, &item, rank, function);
    }
    if (status != MOE_OK) {
        moe__io_layers_free(l, *layer_count);
        *layer_count = 0;
        return status;
    }
    *layers = l;
    return MOE_OK;
}
