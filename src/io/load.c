/* load.c - moe_checkpoint_load: the file's tensors into the items, after everything about them has
 * been found good on every rank. */
#include "io.h"

#include <stdlib.h>

static void load_defaults(void *instance) { *(moe_load_options *)instance = (moe_load_options){0}; }
static void report_defaults(void *instance) { *(moe_load_report *)instance = (moe_load_report){0}; }

const moe__struct_info moe__io_load_info = MOE__STRUCT_INFO(moe_load_options, load_defaults);
const moe__struct_info moe__io_report_info = MOE__STRUCT_INFO(moe_load_report, report_defaults);

moe_status moe_load_options_init(moe_load_options *options, size_t size)
{
    return moe__module_struct_init(&moe__io_load_info, options, size, __func__);
}

moe_status moe_load_report_init(moe_load_report *report, size_t size)
{
    return moe__module_struct_init(&moe__io_report_info, report, size, __func__);
}

typedef struct load {
    moe__io_plan plan;
    moe_load_options o;
    moe__io_group group;
    moe__io_layer *layers;
    int64_t layer_count;
    moe_file *file;
    moe_load_report report;
} load;

static moe_status check_flags(const moe_load_options *o, const char *function)
{
    const char *names[] = {"lenient", "convert", "write_bound"};
    const int32_t values[] = {o->lenient, o->convert, o->write_bound};
    for (int i = 0; i < 3; i++)
        if (values[i] < 0 || values[i] > 1)
            REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%s is %d; it must be 0 or 1", names[i],
                   (int)values[i]);
    if (o->reserved) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "reserved is not 0");
    return MOE_OK;
}

/* Everything that can be found wrong before the first write. */
static moe_status prepare(load *l, const char *path, const moe_checkpoint_item *items,
                          int64_t count, const char *function)
{
    if (!path) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "path is NULL");
    MOE_TRY(check_flags(&l->o, function));
    MOE_TRY(moe__io_plan_items(&l->plan, &l->layers, &l->layer_count, items, count, -1, function));
    for (int64_t i = 0; i < l->layer_count; i++)
        MOE_TRY(moe__io_check_memory(&l->layers[i], true, l->o.write_bound, function));
    MOE_TRY(moe__io_lay_out(&l->plan, function));
    MOE_TRY(moe_file_open(&l->file, path));
    MOE_TRY(moe__io_match(&l->plan, l->file, &l->o, &l->report, function));
    return moe__io_find_unexpected(&l->plan, l->file, &l->o, &l->report, function);
}

static moe_status run(load *l, const char *path, const moe_checkpoint_item *items, int64_t count,
                      const char *function)
{
    moe_status status = prepare(l, path, items, count, function);
    uint64_t hash = l->plan.header ? moe__io_hash(l->plan.header, l->plan.header_bytes) : 0;
    MOE_TRY(moe__io_agree(&l->group, status, hash, NULL, function));
    status = moe__io_read_blocks(&l->plan, l->file, function);
    for (int64_t i = 0; i < l->layer_count && status == MOE_OK; i++)
        status = moe__io_written(&l->layers[i], function);
    return moe__io_agree(&l->group, status, 0, NULL, function);
}

moe_status moe_checkpoint_load(const char *path, const moe_checkpoint_item *items, int64_t count,
                               const moe_load_options *options, moe_load_report *report)
{
    const char *function = __func__;
    load l = {.plan = {.store_dtype = MOE_SAME}};
    MOE_TRY(moe__io_enter(function));
    MOE_TRY(MOE__IO_READ(moe__io_load_info, &l.o, options, function));
    if (report) MOE_TRY(moe__io_check_out(&moe__io_report_info, report, function));
    MOE_TRY(moe__io_find_group(&l.group, l.o.comm, items, count, function));
    moe_status status = run(&l, path, items, count, function);
    if (status == MOE_OK && report) moe__io_write_out(&moe__io_report_info, report, &l.report);
    moe_file_close(l.file);
    moe__io_layers_free(l.layers, l.layer_count);
    moe__io_plan_free(&l.plan);
    return status;
}
