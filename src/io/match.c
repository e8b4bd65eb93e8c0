/* match.c - the tensors of an open file that a plan's entries are: names, shapes and dtypes, all
 * checked before anything is moved. */
#include "io.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *moe__io_shape_text(char *text, size_t size, const int64_t *shape, int32_t dims)
{
    size_t used = 0;
    text[0] = 0;
    for (int32_t d = 0; d < dims && used < size; d++)
        used += (size_t)snprintf(text + used, size - used, "%s%lld", d ? "," : "[", (ll)shape[d]);
    if (used < size) (void)snprintf(text + used, size - used, "%s", dims ? "]" : "[]");
    return text;
}

static bool same_shape(const moe__io_entry *e, const moe__io_tensor *t)
{
    const int64_t *a = e->shape, *b = t->shape;
    int32_t n = e->dims, m = t->dims;
    while (e->loose && n > 0 && a[0] == 1) a++, n--;
    while (e->loose && m > 0 && b[0] == 1) b++, m--;
    return n == m && memcmp(a, b, (size_t)n * sizeof *a) == 0;
}

static moe_status wrong_shape(const char *name, const int64_t *wanted, int32_t dims,
                              const moe__io_tensor *t, const char *function)
{
    char want[160], found[160];
    REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s should have shape %s and has %s", name,
           moe__io_shape_text(want, sizeof want, wanted, dims),
           moe__io_shape_text(found, sizeof found, t->shape, t->dims));
}

static moe_status check_dtype(const moe__io_entry *e, const moe__io_tensor *t, bool convert,
                              const char *function)
{
    bool widen = e->memory == MOE_DTYPE_I64 && t->dtype == MOE_DTYPE_I32;
    bool good = t->dtype == e->memory;
    if (convert)
        good = good || widen || (moe__io_is_float(e->memory) && moe__io_is_float(t->dtype));
    if (!good)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s should be %s and is %s%s", e->name,
               moe__io_dtype_name(e->memory), moe__io_dtype_name(t->dtype),
               convert ? "" : "; convert is 0");
    return MOE_OK;
}

/* MXFP4: blocks [..., in/32, 16] and scales [..., in/32] of an entry [..., in]. */
static moe_status check_mxfp4(const moe__io_entry *e, const moe_file *file, const char *function)
{
    const moe__io_tensor *blocks = &file->tensor[e->file_index];
    const moe__io_tensor *scales = &file->tensor[e->scale_index];
    int64_t shape[MOE_FILE_MAX_DIMS];
    int32_t d = e->dims;
    memcpy(shape, e->shape, sizeof shape);
    if (e->shape[d - 1] % 32)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s: %lld is no multiple of 32", blocks->name,
               (ll)e->shape[d - 1]);
    shape[d - 1] = e->shape[d - 1] / 32, shape[d] = 16;
    if (blocks->dims != d + 1 || memcmp(blocks->shape, shape, (size_t)(d + 1) * sizeof *shape) != 0)
        return wrong_shape(blocks->name, shape, d + 1, blocks, function);
    if (scales->dims != d || memcmp(scales->shape, shape, (size_t)d * sizeof *shape) != 0)
        return wrong_shape(scales->name, shape, d, scales, function);
    if (blocks->dtype != MOE_FILE_U8 || scales->dtype != MOE_FILE_U8)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s and %.100s should be U8 and are %s and %s",
               blocks->name, scales->name, moe__io_dtype_name(blocks->dtype),
               moe__io_dtype_name(scales->dtype));
    return MOE_OK;
}

/* F8_E4M3 [rows,cols] with a scale for each 128 x 128. */
static moe_status check_f8(const moe__io_entry *e, const moe_file *file, const char *function)
{
    const moe__io_tensor *scales = &file->tensor[e->scale_index];
    if (e->dims != 2) REFUSE(MOE_ERROR_NOT_SUPPORTED, "%.200s is F8_E4M3 and no matrix", e->name);
    const int64_t shape[2] = {(e->shape[0] + 127) / 128, (e->shape[1] + 127) / 128};
    if (scales->dims != 2 || memcmp(scales->shape, shape, sizeof shape) != 0)
        return wrong_shape(scales->name, shape, 2, scales, function);
    if (scales->dtype != MOE_DTYPE_F32)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%.200s should be F32 and is %s", scales->name,
               moe__io_dtype_name(scales->dtype));
    return MOE_OK;
}

static moe_status check_entry(const moe__io_entry *e, const moe_file *file, bool convert,
                              const char *function)
{
    const moe__io_tensor *t = &file->tensor[e->file_index];
    if (e->coding == IO_MXFP4) return check_mxfp4(e, file, function);
    if (!same_shape(e, t)) return wrong_shape(e->name, e->shape, e->dims, t, function);
    if (e->coding == IO_F8) return check_f8(e, file, function);
    return check_dtype(e, t, convert, function);
}

static void say(const moe_load_options *o, const char *what, const char *name)
{
    char line[1200];
    if (!o->report) return;
    (void)snprintf(line, sizeof line, "%s %s", what, name);
    o->report(o->report_user, MOE_LOG_WARNING, line);
}

moe_status moe__io_find_unexpected(const moe__io_plan *plan, const moe_file *file,
                                   const moe_load_options *o, moe_load_report *report,
                                   const char *function)
{
    bool *used = calloc((size_t)file->count + 1, sizeof *used);
    moe_status status = MOE_OK;
    if (!used) REFUSE_MEMORY();
    for (int64_t i = 0; i < plan->entries; i++)
        if (plan->entry[i].file_index >= 0) used[plan->entry[i].file_index] = true;
    for (int64_t i = 0; i < file->count; i++) {
        if (used[i]) continue;
        report->unexpected++;
        say(o, "unexpected", file->tensor[i].name);
        if (!o->lenient && status == MOE_OK)
            status = moe__io_fail(MOE_ERROR_INVALID_ARGUMENT, function,
                                  "the file has %.300s, which no item has", file->tensor[i].name);
    }
    free(used);
    return status;
}

moe_status moe__io_match(moe__io_plan *plan, const moe_file *file, const moe_load_options *o,
                         moe_load_report *report, const char *function)
{
    moe_status status = MOE_OK;
    for (int64_t i = 0; i < plan->entries; i++) {
        moe__io_entry *e = &plan->entry[i];
        if (e->file_index < 0) e->file_index = moe_file_find(file, e->name);
        if (e->file_index >= 0) {
            MOE_TRY(check_entry(e, file, o->convert != 0, function));
            report->loaded++;
            continue;
        }
        report->missing++;
        say(o, "missing", e->name);
        if (!o->lenient && status == MOE_OK)
            status = moe__io_fail(MOE_ERROR_INVALID_ARGUMENT, function, "the file has no %.300s",
                                  e->name);
    }
    return status;
}
