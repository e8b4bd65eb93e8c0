/* regions.c - copies of what a slot writes, and their comparison.
 *
 *     begin:    before = memory
 *     between:  after = memory (the fast table's), memory = before
 *     end:      memory (the plain table's) must be `after`, byte for byte; a NaN is any NaN, whose
 *               payload docs/numerics.md does not promise
 *
 * What is written is restored whether it is set or added to: so elements that only one of the two
 * writes differ too, and memory that is read and written is right for both. Only elements are
 * touched, never what lies between the lines. */
#include "cpu/twin/twin.h"
#include "half.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- regions --------------------------------------------------------------------------------- */

static moe__region *add(moe__kernel_twin *t, moe__region region)
{
    if (t->count == MOE__KERNEL_TWIN_REGIONS) {
        t->too_many = true;
        return NULL;
    }
    t->region[t->count] = region;
    return &t->region[t->count++];
}

moe__region *moe__kernel_twin_rows(moe__kernel_twin *t, const char *name, void *base, int64_t lines,
                                   int64_t width, int64_t stride, int32_t dtype)
{
    if (!base || lines <= 0 || width <= 0) return NULL;
    return add(t, (moe__region){.name = name,
                                .base = base,
                                .lines = lines,
                                .width = width,
                                .stride = stride,
                                .dtype = dtype});
}

void moe__kernel_twin_vector(moe__kernel_twin *t, const char *name, void *base, int64_t n,
                             int32_t dtype)
{
    (void)moe__kernel_twin_rows(t, name, base, 1, n, n, dtype);
}

void moe__kernel_twin_used(moe__kernel_twin *t, const char *name, void *base, int64_t n,
                           const int64_t *used, int32_t dtype)
{
    moe__region *r = moe__kernel_twin_rows(t, name, base, n, 1, 1, dtype);
    if (r) r->used = used;
}

void moe__kernel_twin_matrices(moe__kernel_twin *t, const char *name, const moe__matrices *m,
                               int64_t experts, int64_t rows, int64_t cols)
{
    if ((!m->base && !m->each) || experts <= 0 || rows <= 0 || cols <= 0) return;
    (void)add(t, (moe__region){.name = name,
                               .lines = experts * rows,
                               .width = cols,
                               .matrices = m,
                               .rows = rows,
                               .dtype = m->dtype});
}

/* ---- lines ----------------------------------------------------------------------------------- */

static int64_t size_of(const moe__region *r)
{
    return r->dtype == MOE__KERNEL_TWIN_BYTE ? 1 : moe__dtype_size(r->dtype);
}

/* Element 0 of a line; NULL: such a matrix is not there. */
static char *line_of(const moe__region *r, int64_t l)
{
    const moe__matrices *m = r->matrices;
    if (!m) return r->base + (r->index ? r->index[l] : l) * r->stride * size_of(r);
    int64_t e = l / r->rows, place = m->offset + l % r->rows * m->stride_row;
    char *base = m->each ? m->each[e] : m->base;
    if (!m->each) place += e * m->stride_expert;
    return base ? base + place * size_of(r) : NULL;
}

/* Bytes from element 0 of a line to element j. */
static int64_t step_to(const moe__region *r, int64_t j)
{
    const moe__matrices *m = r->matrices;
    int64_t elements = !m         ? j
                       : m->panel ? j / m->panel * m->panel_step + j % m->panel
                                  : j * m->stride_col;
    return elements * size_of(r);
}

static bool is_dense(const moe__region *r)
{
    return !r->matrices || (r->matrices->panel == 0 && r->matrices->stride_col == 1);
}

static int64_t bytes_of(const moe__kernel_twin *t, int32_t first, int32_t last)
{
    int64_t bytes = 0;
    for (int32_t i = first; i < last; i++) {
        const moe__region *r = &t->region[i];
        bytes = moe__add(bytes, moe__mul(moe__mul(r->lines, r->width), size_of(r)));
    }
    return bytes;
}

/* A line to or from its packed copy. */
static void copy_line(const moe__region *r, int64_t l, char *packed, bool back)
{
    int64_t size = size_of(r), n = is_dense(r) ? 1 : r->width;
    size_t bytes = (size_t)(is_dense(r) ? r->width * size : size);
    char *line = line_of(r, l);
    for (int64_t j = 0; line && j < n; j++) {
        char *at = line + step_to(r, j), *copy = packed + j * size;
        memcpy(back ? at : copy, back ? copy : at, bytes);
    }
}

/* Regions first .. last-1 to or from packed memory. */
static void copy_regions(const moe__kernel_twin *t, int32_t first, int32_t last, char *packed,
                         bool back)
{
    for (int32_t i = first; i < last; i++) {
        const moe__region *r = &t->region[i];
        for (int64_t l = 0; l < r->lines; l++, packed += r->width * size_of(r))
            copy_line(r, l, packed, back);
    }
}

/* ---- comparison ------------------------------------------------------------------------------ */

static double value_of(const moe__region *r, const char *at)
{
    double f64;
    float f32;
    int64_t i64;
    int32_t i32;
    uint16_t half;
    switch (r->dtype) {
    case MOE_DTYPE_F64: memcpy(&f64, at, sizeof f64); return f64;
    case MOE_DTYPE_F32: memcpy(&f32, at, sizeof f32); return (double)f32;
    case MOE_DTYPE_I64: memcpy(&i64, at, sizeof i64); return (double)i64;
    case MOE_DTYPE_I32: memcpy(&i32, at, sizeof i32); return (double)i32;
    case MOE_DTYPE_BF16: memcpy(&half, at, sizeof half); return (double)moe__from_bf16(half);
    case MOE_DTYPE_F16: memcpy(&half, at, sizeof half); return (double)moe__from_f16(half);
    default: return (double)(unsigned char)*at;
    }
}

static bool are_same(const moe__region *r, const char *a, const char *b)
{
    if (memcmp(a, b, (size_t)size_of(r)) == 0) return true;
    return isnan(value_of(r, a)) && isnan(value_of(r, b));
}

/* A value, and its bytes as a number. */
static void print_value(char text[64], const moe__region *r, const char *at)
{
    unsigned long long bits = 0;
    for (int64_t i = size_of(r) - 1; i >= 0; i--) bits = bits << 8 | (unsigned char)at[i];
    snprintf(text, 64, "%.17g (0x%0*llx)", value_of(r, at), (int)(2 * size_of(r)), bits);
}

static void print_index(char text[64], const moe__region *r, int64_t l, int64_t j)
{
    int64_t line = r->index ? r->index[l] : l;
    if (r->matrices)
        snprintf(text, 64, "%lld,%lld,%lld", (ll)(l / r->rows), (ll)(l % r->rows), (ll)j);
    else if (r->lines == 1)
        snprintf(text, 64, "%lld", (ll)j);
    else if (r->width == 1)
        snprintf(text, 64, "%lld", (ll)line);
    else
        snprintf(text, 64, "%lld,%lld", (ll)line, (ll)j);
}

static moe_status report(const moe__kernel_twin *t, const moe__region *r, int64_t l, int64_t j,
                         const char *fast, const char *plain)
{
    char index[64], by_fast[64], by_plain[64];
    print_index(index, r, l, j);
    print_value(by_fast, r, fast);
    print_value(by_plain, r, plain);
    return moe__fail(MOE_ERROR_INTERNAL, t->workers->function,
                     "%s: %s[%s] is %s by '%s' and %s by '%s'", t->slot, r->name, index, by_fast,
                     t->pair->fast->name, by_plain, t->pair->plain->name);
}

static moe_status compare_line(const moe__kernel_twin *t, const moe__region *r, int64_t l,
                               const char *packed)
{
    const char *line = line_of(r, l);
    int64_t size = size_of(r);
    if (!line || (is_dense(r) && memcmp(line, packed, (size_t)(r->width * size)) == 0))
        return MOE_OK;
    for (int64_t j = 0; j < r->width; j++) {
        const char *fast = packed + j * size, *plain = line + step_to(r, j);
        if (!are_same(r, fast, plain)) return report(t, r, l, j, fast, plain);
    }
    return MOE_OK;
}

/* Memory, which the plain table wrote, with packed copies of what the fast one did. */
static moe_status compare(const moe__kernel_twin *t, int32_t first, int32_t last,
                          const char *packed)
{
    for (int32_t i = first; i < last; i++) {
        const moe__region *r = &t->region[i];
        int64_t used = r->used ? moe__min(*r->used, r->lines) : r->lines;
        int64_t line_bytes = r->width * size_of(r);
        for (int64_t l = 0; l < used; l++) MOE_TRY(compare_line(t, r, l, packed + l * line_bytes));
        packed += r->lines * line_bytes;
    }
    return MOE_OK;
}

/* ---- a call ---------------------------------------------------------------------------------- */

static moe_status make_room(const moe__kernel_twin *t, moe__snapshot *s, int64_t bytes)
{
    *s = (moe__snapshot){moe__alloc(t->workers->context, bytes), bytes};
    if (s->memory || bytes == 0) return MOE_OK;
    return moe__fail(MOE_ERROR_OUT_OF_MEMORY, t->workers->function,
                     "no %lld bytes for the twin of %s", (ll)bytes, t->slot);
}

static moe_status take(const moe__kernel_twin *t, moe__snapshot *s)
{
    MOE_TRY(make_room(t, s, bytes_of(t, 0, t->late)));
    copy_regions(t, 0, t->late, s->memory, false);
    return MOE_OK;
}

moe_status moe__kernel_twin_begin(moe__kernel_twin *t)
{
    t->late = t->count;
    if (t->too_many)
        return moe__fail(MOE_ERROR_INTERNAL, t->workers->function, "%s has more than %d regions",
                         t->slot, (int)MOE__KERNEL_TWIN_REGIONS);
    MOE_TRY(take(t, &t->before));
    return make_room(t, &t->after, t->before.bytes);
}

/* What the fast table made of late regions is saved, and the plain one finds rubbish there. */
static moe_status save_late(moe__kernel_twin *t)
{
    MOE_TRY(make_room(t, &t->after_late, bytes_of(t, t->late, t->count)));
    copy_regions(t, t->late, t->count, t->after_late.memory, false);
    for (int32_t i = t->late; i < t->count; i++) {
        const moe__region *r = &t->region[i];
        for (int64_t l = 0; l < r->lines; l++)
            memset(line_of(r, l), 0xa5, (size_t)(r->width * size_of(r)));
    }
    return MOE_OK;
}

moe_status moe__kernel_twin_between(moe__kernel_twin *t, moe_status status)
{
    if (status != MOE_OK) return status;
    copy_regions(t, 0, t->late, t->after.memory, false);
    MOE_TRY(save_late(t));
    copy_regions(t, 0, t->late, t->before.memory, true);
    t->again = true;
    return MOE_OK;
}

moe_status moe__kernel_twin_end(moe__kernel_twin *t, moe_status status)
{
    if (status != MOE_OK) return status;
    MOE_TRY(compare(t, 0, t->late, t->after.memory));
    return compare(t, t->late, t->count, t->after_late.memory);
}

static void release(const moe__kernel_twin *t, moe__snapshot *s)
{
    moe__free(t->workers->context, s->memory, s->bytes);
}

void moe__kernel_twin_free(moe__kernel_twin *t)
{
    release(t, &t->before), release(t, &t->after), release(t, &t->after_late);
    for (int32_t i = 0; i < MOE__KERNEL_TWIN_HOOKS; i++)
        release(t, &t->hook[i][0]), release(t, &t->hook[i][1]);
}

/* ---- what is done once ----------------------------------------------------------------------- */

moe_status moe__kernel_twin_hook_begin(moe__kernel_twin *t)
{
    if (t->hooks == MOE__KERNEL_TWIN_HOOKS)
        return moe__fail(MOE_ERROR_INTERNAL, t->workers->function, "%s calls more than %d hooks",
                         t->slot, (int)MOE__KERNEL_TWIN_HOOKS);
    return take(t, &t->hook[t->hooks][0]);
}

moe_status moe__kernel_twin_hook_end(moe__kernel_twin *t, moe_status status)
{
    if (status != MOE_OK) return status;
    return take(t, &t->hook[t->hooks++][1]);
}

moe_status moe__kernel_twin_replay(moe__kernel_twin *t)
{
    if (t->replayed == t->hooks)
        return moe__fail(MOE_ERROR_INTERNAL, t->workers->function,
                         "%s: '%s' calls a hook more than '%s'", t->slot, t->pair->plain->name,
                         t->pair->fast->name);
    const moe__snapshot *s = t->hook[t->replayed++];
    MOE_TRY(compare(t, 0, t->late, s[0].memory));
    copy_regions(t, 0, t->late, s[1].memory, true);
    return MOE_OK;
}
