/* header_read.c - the header of a safetensors file, which may say anything.
 *
 *     8 bytes    N, little-endian
 *     N bytes    JSON: {"__metadata__": {key: string}, name: {"dtype", "shape", "data_offsets"}}
 *     the rest   the tensors' bytes, one after the other without holes
 *
 * Brackets are counted before a parser sees the text, so that its memory is bounded by a multiple
 * of the header. */
#include "io.h"
#include "json.h"

#include <stdlib.h>
#include <string.h>

/* ---- before parsing -------------------------------------------------------------------------- */

enum { DEEPEST = 32, BYTES_OF_OBJECT = 24 };

moe_status moe__io_check_json(const char *text, int64_t bytes, int depth, int64_t elements,
                              const char *path, const char *function)
{
    int64_t commas[DEEPEST + 1] = {0}, objects = 0;
    bool array[DEEPEST + 1] = {false}, string = false;
    int at = 0;
    for (int64_t i = 0; i < bytes; i++) {
        char c = text[i];
        if (string) {
            if (c == '\\') i++;
            if (c == '"') string = false;
        } else if (c == '"') {
            string = true;
        } else if (c == '{' || c == '[') {
            if (++at > depth)
                REFUSE_CORRUPT("the JSON of %.200s is nested deeper than %d at byte %lld", path,
                               depth, (ll)i);
            array[at] = c == '[', commas[at] = 0;
            objects += c == '{';
        } else if ((c == '}' || c == ']') && at > 0) {
            at--;
        } else if (c == ',' && array[at] && ++commas[at] >= elements) {
            REFUSE_CORRUPT(
                "an array in the JSON of %.200s has more than %lld elements, at byte %lld", path,
                (ll)elements, (ll)i);
        }
    }
    if (objects > bytes / BYTES_OF_OBJECT + 2)
        REFUSE_CORRUPT("%lld objects in %lld bytes of JSON of %.200s are no tensors", (ll)objects,
                       (ll)bytes, path);
    return MOE_OK;
}

/* ---- one tensor ------------------------------------------------------------------------------ */

static moe_status read_shape(moe__io_tensor *t, const json_t *shape, const char *function)
{
    size_t dims = json_array_size(shape);
    if (!json_is_array(shape)) REFUSE_CORRUPT("shape of %.200s is no array", t->name);
    if (dims > MOE_FILE_MAX_DIMS)
        REFUSE_CORRUPT("%.200s has %d dimensions, at most %d are possible", t->name, (int)dims,
                       (int)MOE_FILE_MAX_DIMS);
    t->dims = (int32_t)dims;
    t->count = 1;
    for (size_t d = 0; d < MOE_FILE_MAX_DIMS; d++) {
        const json_t *n = json_array_get(shape, d);
        t->shape[d] = d < dims ? json_integer_value(n) : 1;
        if (d < dims && (!json_is_integer(n) || t->shape[d] < 0))
            REFUSE_CORRUPT("shape[%d] of %.200s is no size: %lld", (int)d, t->name,
                           (ll)t->shape[d]);
    }
    /* a dimension of 0 does not excuse the others */
    int64_t bound = 1;
    for (size_t d = 0; d < dims; d++) bound = moe__mul(bound, t->shape[d] ? t->shape[d] : 1);
    for (size_t d = 0; d < dims; d++) t->count = moe__mul(t->count, t->shape[d]);
    t->bytes = moe__mul(t->count, moe__io_dtype_size(t->dtype));
    if (moe__mul(bound, 8) < 0)
        REFUSE_CORRUPT("the shape of %.200s does not fit in 63 bits", t->name);
    return MOE_OK;
}

/* offset is that in the data so far. */
static moe_status read_offsets(moe__io_tensor *t, const json_t *offsets, int64_t data,
                               const char *function)
{
    const json_t *from = json_array_get(offsets, 0), *to = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(from) || !json_is_integer(to))
        REFUSE_CORRUPT("data_offsets of %.200s are not two integers", t->name);
    int64_t begin = json_integer_value(from), end = json_integer_value(to);
    if (begin < 0 || begin > end)
        REFUSE_CORRUPT("data_offsets of %.200s are %lld and %lld", t->name, (ll)begin, (ll)end);
    if (end > data)
        REFUSE_CORRUPT("%.200s ends at byte %lld of %lld bytes of data", t->name, (ll)end,
                       (ll)data);
    if (end - begin != t->bytes)
        REFUSE_CORRUPT("%.200s has %lld bytes by its offsets, %lld by its shape", t->name,
                       (ll)(end - begin), (ll)t->bytes);
    t->offset = begin;
    return MOE_OK;
}

static moe_status read_tensor(moe_file *file, const char *name, const json_t *value, int64_t data,
                              const char *function)
{
    const json_t *dtype = json_object_get(value, "dtype");
    if (!moe__io_grow((void **)&file->tensor, &file->tensor_room, file->count,
                      sizeof *file->tensor))
        REFUSE_MEMORY();
    moe__io_tensor *t = &file->tensor[file->count];
    *t = (moe__io_tensor){.shard = (int32_t)(file->shards - 1)};
    t->name = moe__io_copy_string(name);
    if (!t->name) REFUSE_MEMORY();
    file->count++;
    if (moe__io_has_control(name)) REFUSE_CORRUPT("the name %.200s has control characters", name);
    if (!json_is_object(value)) REFUSE_CORRUPT("%.200s is no object", name);
    if (json_object_size(value) != 3 || !json_is_string(dtype))
        REFUSE_CORRUPT("%.200s has not just dtype, shape and data_offsets", name);
    t->dtype = moe__io_dtype_of_name(json_string_value(dtype));
    if (t->dtype < 0)
        REFUSE_CORRUPT("%.200s has the unknown dtype %.40s", name, json_string_value(dtype));
    MOE_TRY(read_shape(t, json_object_get(value, "shape"), function));
    return read_offsets(t, json_object_get(value, "data_offsets"), data, function);
}

/* ---- all of them ----------------------------------------------------------------------------- */

static int by_place(const void *a, const void *b)
{
    const moe__io_tensor *s = a, *t = b;
    if (s->offset != t->offset) return s->offset < t->offset ? -1 : 1;
    return s->bytes < t->bytes ? -1 : s->bytes > t->bytes;
}

/* From 0 to the end of the data without overlap or hole; offsets become those in the file. */
static moe_status check_places(moe__io_tensor *t, int64_t count, int64_t data, int64_t begin,
                               const char *path, const char *function)
{
    int64_t end = 0;
    if (count > 0) qsort(t, (size_t)count, sizeof *t, by_place);
    for (int64_t i = 0; i < count; i++) {
        if (t[i].offset < end)
            REFUSE_CORRUPT("%.150s begins at byte %lld, inside %.150s", t[i].name, (ll)t[i].offset,
                           t[i - 1].name);
        if (t[i].offset > end)
            REFUSE_CORRUPT("bytes %lld to %lld of the data, before %.200s, are no tensor's",
                           (ll)end, (ll)t[i].offset - 1, t[i].name);
        end = t[i].offset + t[i].bytes;
        t[i].offset += begin;
    }
    if (end != data)
        REFUSE_CORRUPT("the tensors of %.200s have %lld bytes, the file has %lld after its header",
                       path, (ll)end, (ll)data);
    return MOE_OK;
}

static moe_status read_metadata(moe_file *file, json_t *metadata, bool keep, const char *function)
{
    const char *key;
    json_t *value;
    if (!json_is_object(metadata)) REFUSE_CORRUPT("__metadata__ is no object");
    json_object_foreach(metadata, key, value)
    {
        if (!json_is_string(value)) REFUSE_CORRUPT("__metadata__ %.200s is no string", key);
        if (keep) MOE_TRY(moe__io_add_metadata(file, key, json_string_value(value), function));
    }
    return MOE_OK;
}

static moe_status read_root(moe_file *file, json_t *root, int64_t begin, bool metadata,
                            const char *function)
{
    const moe__io_shard *s = &file->shard[file->shards - 1];
    int64_t before = file->count, data = s->size - begin;
    const char *name;
    json_t *value;
    if (!json_is_object(root)) REFUSE_CORRUPT("the header of %.200s is no JSON object", s->path);
    json_object_foreach(root, name, value)
    {
        if (strcmp(name, "__metadata__") == 0)
            MOE_TRY(read_metadata(file, value, metadata, function));
        else
            MOE_TRY(read_tensor(file, name, value, data, function));
    }
    return check_places(file->count > before ? file->tensor + before : NULL, file->count - before,
                        data, begin, s->path, function);
}

json_t *moe__io_parse_json(const char *text, int64_t bytes, const char *path, moe_status *status,
                           const char *function)
{
    json_error_t error;
    json_t *root = json_loadb(text, (size_t)bytes, JSON_REJECT_DUPLICATES, &error);
    if (root) return root;
    if (!error.text[0] || json_error_code(&error) == json_error_out_of_memory)
        *status = moe__io_fail(MOE_ERROR_OUT_OF_MEMORY, function, "no memory");
    else
        *status = moe__io_fail(MOE_ERROR_CORRUPT_DATA, function, "JSON of %.200s, byte %d: %s",
                               path, error.position, error.text);
    return NULL;
}

static moe_status parse_header(moe_file *file, const char *text, int64_t bytes, bool metadata,
                               const char *function)
{
    const char *path = file->shard[file->shards - 1].path;
    moe_status status = MOE_OK;
    if (text[0] != '{') REFUSE_CORRUPT("the header of %.200s does not begin with {", path);
    MOE_TRY(moe__io_check_json(text, bytes, 3, MOE_FILE_MAX_DIMS + 1, path, function));
    json_t *root = moe__io_parse_json(text, bytes, path, &status, function);
    if (!root) return status;
    status = read_root(file, root, 8 + bytes, metadata, function);
    json_decref(root);
    return status;
}

moe_status moe__io_read_header(moe_file *file, bool metadata, const char *function)
{
    const moe__io_shard *s = &file->shard[file->shards - 1];
    int32_t shard = (int32_t)(file->shards - 1);
    unsigned char eight[8];
    uint64_t bytes = 0;
    if (s->size < 8)
        REFUSE_CORRUPT("%.200s has %lld bytes, too few for a header", s->path, (ll)s->size);
    MOE_TRY(moe__io_pread(file, shard, eight, 8, 0, function));
    for (int i = 7; i >= 0; i--) bytes = bytes << 8 | eight[i];
    if (bytes > MOE__IO_HEADER_MAX)
        REFUSE_CORRUPT("the header of %.200s would have %llu bytes, at most %d are possible",
                       s->path, (unsigned long long)bytes, (int)MOE__IO_HEADER_MAX);
    if ((int64_t)bytes > s->size - 8 || bytes < 2)
        REFUSE_CORRUPT("the header of %.200s would have %lld bytes, the file has %lld", s->path,
                       (ll)bytes, (ll)s->size);
    char *text = malloc((size_t)bytes);
    if (!text) REFUSE_MEMORY();
    moe_status status = moe__io_pread(file, shard, text, (int64_t)bytes, 8, function);
    if (status == MOE_OK) status = parse_header(file, text, (int64_t)bytes, metadata, function);
    free(text);
    return status;
}
