/* shards.c - a checkpoint in several files: the index says which tensor is in which.
 *
 *     {"metadata": {...}, "weight_map": {name: file}}
 *
 * A file is a plain name beside the index: nothing else of the file system is opened. */
#include "io.h"
#include "json.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_SHARDS = 100000 };

/* ---- what the index says --------------------------------------------------------------------- */

static moe_status check_name(const char *tensor, const json_t *value, const char *path,
                             const char *function)
{
    const char *name = json_string_value(value);
    if (!name)
        REFUSE_CORRUPT("weight_map of %.200s: the file of %.150s is no string", path, tensor);
    size_t n = strlen(name), end = strlen(".safetensors");
    if (strchr(name, '/') || strchr(name, '\\') || name[0] == '.' || moe__io_has_control(name))
        REFUSE_CORRUPT("weight_map of %.150s: the file of %.100s is outside its directory: %.150s",
                       path, tensor, name);
    if (n <= end || n > 255 || strcmp(name + n - end, ".safetensors") != 0)
        REFUSE_CORRUPT("weight_map of %.150s: the file of %.100s is no .safetensors: %.150s", path,
                       tensor, name);
    return MOE_OK;
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Opens the shard `name` beside the index at `path` and reads its header. */
static moe_status open_shard(moe_file *file, const char *path, const char *name,
                             const char *function)
{
    const char *slash = strrchr(path, '/');
    size_t directory = slash ? (size_t)(slash - path) + 1 : 0, bytes = directory + strlen(name) + 1;
    char *joined = malloc(bytes);
    if (!joined) REFUSE_MEMORY();
    memcpy(joined, path, directory);
    memcpy(joined + directory, name, strlen(name) + 1);
    moe_status status = moe__io_add_shard(file, joined, function);
    free(joined);
    if (status == MOE_OK) status = moe__io_read_header(file, false, function);
    return status;
}

static moe_status open_shards(moe_file *file, json_t *map, const char *path, const char **names,
                              const char *function)
{
    const char *tensor;
    json_t *value;
    int64_t count = 0, distinct = 0;
    json_object_foreach(map, tensor, value)
    {
        MOE_TRY(check_name(tensor, value, path, function));
        names[count++] = json_string_value(value);
    }
    if (count == 0) REFUSE_CORRUPT("weight_map of %.200s is empty", path);
    qsort((void *)(uintptr_t)names, (size_t)count, sizeof *names, by_text);
    for (int64_t i = 0; i < count; i++)
        if (i == 0 || strcmp(names[i], names[distinct - 1]) != 0) names[distinct++] = names[i];
    if (distinct > MOST_SHARDS) REFUSE_CORRUPT("%.200s names %lld files", path, (ll)distinct);
    for (int64_t i = 0; i < distinct; i++) MOE_TRY(open_shard(file, path, names[i], function));
    return moe__io_sort_tensors(file, function);
}

/* Each tensor of the map is in the file that the map says. */
static moe_status check_map(const moe_file *file, json_t *map, const char *path,
                            const char *function)
{
    const char *tensor;
    json_t *value;
    json_object_foreach(map, tensor, value)
    {
        int64_t at = moe_file_find(file, tensor);
        const char *found = at < 0 ? NULL : file->shard[file->tensor[at].shard].path;
        const char *slash = found ? strrchr(found, '/') : NULL, *wanted = json_string_value(value);
        if (!found || strcmp(slash ? slash + 1 : found, wanted) != 0)
            REFUSE_CORRUPT("%.150s says that %.100s is in %.100s; it is %s%.100s", path, tensor,
                           wanted, found ? "in " : "not there", found ? found : "");
    }
    return MOE_OK;
}

static moe_status index_metadata(moe_file *file, json_t *metadata, const char *path,
                                 const char *function)
{
    const char *key;
    json_t *value;
    char number[40];
    if (!metadata) return MOE_OK;
    if (!json_is_object(metadata)) REFUSE_CORRUPT("metadata of %.200s is no object", path);
    json_object_foreach(metadata, key, value)
    {
        const char *text = json_string_value(value);
        if (json_is_integer(value)) {
            (void)snprintf(number, sizeof number, "%lld", (ll)json_integer_value(value));
            text = number;
        } else if (json_is_real(value)) {
            (void)snprintf(number, sizeof number, "%.17g", json_real_value(value));
            text = number;
        }
        if (text) MOE_TRY(moe__io_add_metadata(file, key, text, function));
    }
    return MOE_OK;
}

static moe_status read_index(moe_file *file, json_t *root, const char *path, const char *function)
{
    json_t *map = json_object_get(root, "weight_map");
    if (!json_is_object(map)) REFUSE_CORRUPT("%.200s has no weight_map", path);
    const char **names = malloc((json_object_size(map) + 1) * sizeof *names);
    if (!names) REFUSE_MEMORY();
    moe_status status = open_shards(file, map, path, names, function);
    free((void *)(uintptr_t)names);
    if (status == MOE_OK) status = check_map(file, map, path, function);
    if (status == MOE_OK)
        status = index_metadata(file, json_object_get(root, "metadata"), path, function);
    return status;
}

/* ---- its text -------------------------------------------------------------------------------- */

/* The whole of a text file, malloc'd. */
static moe_status read_text(char **text, int64_t *bytes, const char *path, const char *function)
{
    moe_file index = {0};
    moe_status status = moe__io_add_shard(&index, path, function);
    if (status == MOE_OK && index.shard[0].size > MOE__IO_HEADER_MAX)
        status = moe__io_fail(MOE_ERROR_CORRUPT_DATA, function,
                              "%.200s has %lld bytes, at most %d are possible", path,
                              (ll)index.shard[0].size, (int)MOE__IO_HEADER_MAX);
    if (status == MOE_OK) {
        *bytes = index.shard[0].size;
        *text = malloc((size_t)*bytes + 1);
        status = *text ? moe__io_pread(&index, 0, *text, *bytes, 0, function)
                       : moe__io_fail(MOE_ERROR_OUT_OF_MEMORY, function, "no memory");
    }
    moe__io_close_shards(&index);
    return status;
}

moe_status moe__io_read_index(moe_file *file, const char *path, const char *function)
{
    char *text = NULL;
    int64_t bytes = 0;
    json_t *root = NULL;
    moe_status status = read_text(&text, &bytes, path, function);
    if (status == MOE_OK) status = moe__io_check_json(text, bytes, 16, 1000, path, function);
    if (status == MOE_OK) root = moe__io_parse_json(text, bytes, path, &status, function);
    free(text);
    if (!root) return status;
    status = read_index(file, root, path, function);
    json_decref(root);
    return status;
}
