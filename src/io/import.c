/* import.c - moe_import and moe_export: a layer and one block of a model. */
#include "io.h"

#include <stdlib.h>
#include <string.h>

static void import_defaults(void *instance)
{
    *(moe_import_options *)instance = (moe_import_options){0};
}

const moe__struct_info moe__io_import_info = MOE__STRUCT_INFO(moe_import_options, import_defaults);

moe_status moe_import_options_init(moe_import_options *options, size_t size)
{
    return moe__module_struct_init(&moe__io_import_info, options, size, __func__);
}

/* The names that are meant, by number or the host's own. */
static moe_status take_names(moe_tensor_names *known, const moe_tensor_names *names, int32_t family,
                             const char *function)
{
    *known = (moe_tensor_names){.struct_size = sizeof *known};
    if (names) return MOE__IO_READ(moe__io_names_info, known, names, function);
    if (family < 0 || family > MOE_FAMILY_GPT_OSS)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "family is %d", (int)family);
    return moe_family_names(known, family);
}

static moe_status check_block(int64_t block, const char *function)
{
    if (block < 0) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "block is %lld", (ll)block);
    return MOE_OK;
}

/* ---- in -------------------------------------------------------------------------------------- */

typedef struct import {
    moe__io_plan plan;
    moe__io_layer layer;
    moe_tensor_names names;
    moe_load_report report;
} import;

static moe_status prepare(import *x, const moe_layer *layer, const moe_file *file, int32_t family,
                          int64_t block, const moe_import_options *o, const char *function)
{
    const moe_load_options load = {.struct_size = sizeof load, .convert = 1};
    if (!file) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "file is NULL");
    MOE_TRY(check_block(block, function));
    if (o->lenient < 0 || o->lenient > 1 || o->write_bound < 0 || o->write_bound > 1)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "lenient is %d and write_bound %d; they must be 0 or 1",
               (int)o->lenient, (int)o->write_bound);
    MOE_TRY(take_names(&x->names, o->names, family, function));
    MOE_TRY(moe__io_describe_whole(&x->layer, layer, function));
    MOE_TRY(moe__io_check_memory(&x->layer, true, o->write_bound, function));
    const moe__io_model model = {.names = &x->names,
                                 .file = file,
                                 .block = block,
                                 .rank = -1,
                                 .lenient = o->lenient};
    MOE_TRY(moe__io_plan_model(&x->plan, &x->layer, &model, function));
    MOE_TRY(moe__io_match(&x->plan, file, &load, &x->report, function));
    return moe__io_lay_out(&x->plan, function);
}

moe_status moe_import(moe_layer *layer, const moe_file *file, int32_t family, int64_t block,
                      const moe_import_options *options)
{
    const char *function = __func__;
import x = {.plan = {.store_dtype = MOE_SAME } };
    moe_import_options o;
    moe__io_group group;
    const moe_checkpoint_item item = {.struct_size = sizeof item, .name = "", .layer = layer};
    MOE_TRY(moe__io_enter(function));
    if (!layer) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "layer is NULL");
    MOE_TRY(MOE__IO_READ(moe__io_import_info, &o, options, function));
    MOE_TRY(moe__io_find_group(&group, NULL, &item, 1, function));
    moe_status status = prepare(&x, layer, file, family, block, &o, function);
    uint64_t hash = x.plan.header ? moe__io_hash(x.plan.header, x.plan.header_bytes) : 0;
    status = moe__io_agree(&group, status, hash, NULL, function);
    if (status == MOE_OK) {
        status = moe__io_read_blocks(&x.plan, file, function);
        if (status == MOE_OK) status = moe__io_written(&x.layer, function);
        status = moe__io_agree(&group, status, 0, NULL, function);
    }
    moe__io_describe_free(&x.layer);
    moe__io_plan_free(&x.plan);
    return status;
}

/* ---- out ------------------------------------------------------------------------------------- */

static moe_status plan_export(moe__io_plan *plan, moe__io_layer *l, const moe_layer *layer,
                              int32_t family, int64_t block, const moe_tensor_names *names,
                              int32_t rank, const char *function)
{
    moe_tensor_names known;
    MOE_TRY(check_block(block, function));
    MOE_TRY(take_names(&known, names, family, function));
    MOE_TRY(moe__io_describe_whole(l, layer, function));
    MOE_TRY(moe__io_check_memory(l, false, false, function));
    const moe__io_model model = {.names = &known, .block = block, .rank = rank};
    return moe__io_plan_model(plan, l, &model, function);
}

moe_status moe_export(const char *path, moe_layer *layer, int32_t family, int64_t block,
                      const moe_tensor_names *names, const moe_save_options *options)
{
    const char *function = __func__;
    moe__io_plan plan = {.store_dtype = MOE_SAME};
    moe__io_layer l = {0};
    moe_save_options o;
    moe__io_group group;
    const moe_checkpoint_item item = {.struct_size = sizeof item, .name = "", .layer = layer};
    MOE_TRY(moe__io_enter(function));
    if (!layer) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "layer is NULL");
    MOE_TRY(MOE__IO_READ(moe__io_save_info, &o, options, function));
    MOE_TRY(moe__io_find_group(&group, o.comm, &item, 1, function));
    moe_status status = MOE_OK;
    if (!path) status = moe__io_fail(MOE_ERROR_INVALID_ARGUMENT, function, "path is NULL");
    if (status == MOE_OK) status = moe__io_read_save_options(&plan, &o, options, function);
    if (status == MOE_OK)
        status = plan_export(&plan, &l, layer, family, block, names, group.rank, function);
    status = moe__io_save(&plan, path ? path : "", &group, status, function);
    moe__io_describe_free(&l);
    moe__io_plan_free(&plan);
    return status;
}
