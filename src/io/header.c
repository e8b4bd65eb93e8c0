/* header.c - the header of a file to be written: entries in descending order of element size, so
 * that all are aligned, then by name, whatever order the parameters have in their layouts; then
 * spaces up to a multiple of 8. */
#include "io.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct text {
    char *bytes; /* NULL: it only counts */
    int64_t count;
} text;

static void put_bytes(text *t, const char *bytes, size_t count)
{
    if (t->bytes) memcpy(t->bytes + t->count, bytes, count);
    t->count += (int64_t)count;
}

static void put(text *t, const char *string) { put_bytes(t, string, strlen(string)); }

static void put_number(text *t, int64_t n)
{
    char digits[24];
    (void)snprintf(digits, sizeof digits, "%" PRId64, n);
    put(t, digits);
}

/* A JSON string of valid UTF-8. */
static void put_string(text *t, const char *string)
{
    char escaped[8];
    put(t, "\"");
    for (const char *c = string; *c; c++) {
        if (*c == '"' || *c == '\\') {
            put(t, "\\");
            put_bytes(t, c, 1);
        } else if ((unsigned char)*c < ' ') {
            (void)snprintf(escaped, sizeof escaped, "\\u%04x", (unsigned)(unsigned char)*c);
            put(t, escaped);
        } else {
            put_bytes(t, c, 1);
        }
    }
    put(t, "\"");
}

static void put_entry(text *t, const moe__io_entry *e)
{
    put_string(t, e->name);
    put(t, ":{\"dtype\":\"");
    put(t, moe__io_dtype_name(e->dtype));
    put(t, "\",\"shape\":[");
    for (int32_t d = 0; d < e->dims; d++) {
        if (d) put(t, ",");
        put_number(t, e->shape[d]);
    }
    put(t, "],\"data_offsets\":[");
    put_number(t, e->offset);
    put(t, ",");
    put_number(t, e->offset + e->bytes);
    put(t, "]}");
}

static void put_header(text *t, const moe__io_plan *plan, moe__io_entry *const *order)
{
    put(t, "{");
    if (plan->metadata_count > 0) put(t, "\"__metadata__\":{");
    for (int64_t i = 0; i < plan->metadata_count; i++) {
        if (i) put(t, ",");
        put_string(t, plan->metadata[i].key);
        put(t, ":");
        put_string(t, plan->metadata[i].value);
    }
    if (plan->metadata_count > 0) put(t, "}");
    for (int64_t i = 0; i < plan->entries; i++) {
        if (i || plan->metadata_count > 0) put(t, ",");
        put_entry(t, order[i]);
    }
    put(t, "}");
    while (t->count % 8) put(t, " ");
}

/* ---- order ----------------------------------------------------------------------------------- */

static int by_size(const void *a, const void *b)
{
    const moe__io_entry *s = *(moe__io_entry *const *)a, *t = *(moe__io_entry *const *)b;
    int64_t x = moe__io_dtype_size(s->dtype), y = moe__io_dtype_size(t->dtype);
    if (x != y) return x > y ? -1 : 1;
    return strcmp(s->name, t->name);
}

static int by_name(const void *a, const void *b)
{
    return strcmp((*(moe__io_entry *const *)a)->name, (*(moe__io_entry *const *)b)->name);
}

static moe_status check_distinct(moe__io_entry **order, int64_t count, const char *function)
{
    qsort(order, (size_t)count, sizeof *order, by_name);
    for (int64_t i = 0; i < count; i++) {
        if (strcmp(order[i]->name, "__metadata__") == 0)
            REFUSE(MOE_ERROR_INVALID_ARGUMENT, "no tensor can have the name __metadata__");
        if (i > 0 && strcmp(order[i - 1]->name, order[i]->name) == 0)
            REFUSE(MOE_ERROR_INVALID_ARGUMENT, "two tensors have the name %.300s", order[i]->name);
    }
    return MOE_OK;
}

static moe_status write_header(moe__io_plan *plan, moe__io_entry **order, const char *function)
{
    int64_t end = 0;
    MOE_TRY(check_distinct(order, plan->entries, function));
    qsort(order, (size_t)plan->entries, sizeof *order, by_size);
    for (int64_t i = 0; i < plan->entries; i++) {
        order[i]->offset = end;
        end = moe__add(end, order[i]->bytes);
    }
    text t = {NULL, 0};
    put_header(&t, plan, order);
    if (end < 0 || moe__add(end, t.count + 8) < 0)
        REFUSE(MOE_ERROR_OVERFLOW, "the tensors do not fit in 63 bits");
    if (t.count > MOE__IO_HEADER_MAX)
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "%lld names take %lld bytes, a header may have %d",
               (ll)plan->entries, (ll)t.count, (int)MOE__IO_HEADER_MAX);
    plan->header = malloc((size_t)t.count + 8);
    if (!plan->header) REFUSE_MEMORY();
    plan->header_bytes = t.count + 8;
    plan->file_bytes = end + plan->header_bytes;
    for (int i = 0; i < 8; i++) plan->header[i] = (char)((uint64_t)t.count >> (8 * i));
    t = (text){plan->header + 8, 0};
    put_header(&t, plan, order);
    for (int64_t i = 0; i < plan->entries; i++) plan->entry[i].offset += plan->header_bytes;
    return MOE_OK;
}

moe_status moe__io_lay_out(moe__io_plan *plan, const char *function)
{
    moe__io_entry **order = malloc((size_t)(plan->entries + 1) * sizeof *order);
    if (!order) REFUSE_MEMORY();
    for (int64_t i = 0; i < plan->entries; i++) order[i] = &plan->entry[i];
    moe_status status = write_header(plan, order, function);
    free(order);
    return status;
}

uint64_t moe__io_hash(const void *bytes, int64_t count)
{
    const unsigned char *b = bytes;
    uint64_t hash = 0xcbf29ce484222325u;
    for (int64_t i = 0; i < count; i++) hash = (hash ^ b[i]) * 0x100000001b3u;
    return hash;
}
