/* run.c - memory, results and comparison of a run. */
#include "run.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int run_fail(run *r, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(r->why, sizeof r->why, format, arguments);
    va_end(arguments);
    r->failed = 1;
    return -1;
}

int run_status(run *r, const char *what, moe_status status)
{
    (void)snprintf(r->why, sizeof r->why, "%s (%.80s: %.400s)", moe_status_name(status), what,
                   moe_last_error());
    if (status == MOE_ERROR_NOT_SUPPORTED)
        r->skipped = 1;
    else
        r->failed = 1;
    return -1;
}

void *run_alloc(run *r, int64_t bytes)
{
    void *block = r->block_count < MAX_BLOCKS ? calloc((size_t)bytes + 64, 1) : NULL;
    if (!block) {
        fprintf(stderr, "run_vectors: out of memory\n");
        exit(2);
    }
    r->blocks[r->block_count++] = block;
    return block;
}

void *run_reals(run *r, int64_t count)
{
    return run_alloc(r, count * (r->o.dtype == MOE_DTYPE_F64 ? 8 : 4));
}

double real_at(const run *r, const void *data, int64_t i)
{
    return r->o.dtype == MOE_DTYPE_F64 ? ((const double *)data)[i]
                                       : (double)((const float *)data)[i];
}

void set_real(const run *r, void *data, int64_t i, double value)
{
    if (r->o.dtype == MOE_DTYPE_F64)
        ((double *)data)[i] = value;
    else
        ((float *)data)[i] = (float)value;
}

void *run_input(run *r, const char *name)
{
    tensor *t = case_tensor(r->c, "in", name);
    if (!t) return NULL;
    void *data = run_reals(r, t->count);
    for (int64_t i = 0; i < t->count; i++)
        set_real(r, data, i,
                 strcmp(t->dtype, "f64") == 0 ? ((const double *)t->data)[i]
                                              : (double)((const float *)t->data)[i]);
    return data;
}

static result *new_result(run *r, const char *name, int64_t count)
{
    if (r->result_count == MAX_RESULTS) {
        fprintf(stderr, "run_vectors: too many results\n");
        exit(2);
    }
    result *x = &r->results[r->result_count++];
    (void)snprintf(x->name, sizeof x->name, "%s", name);
    x->count = count;
    return x;
}

double *result_reals(run *r, const char *name, int64_t count)
{
    result *x = new_result(r, name, count);
    return x->real = run_alloc(r, count * 8);
}

int32_t *result_ints(run *r, const char *name, int64_t count)
{
    result *x = new_result(r, name, count);
    x->is_int = 1;
    return x->integer = run_alloc(r, count * 4);
}

void result_copy(run *r, const char *name, const void *data, int64_t count)
{
    double *to = result_reals(r, name, count);
    for (int64_t i = 0; i < count; i++) to[i] = real_at(r, data, i);
}
