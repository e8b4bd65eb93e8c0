/* file.c - moe_file: opening by path, queries, reading. */
#include "io.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void record_defaults(void *instance) { *(moe_file_record *)instance = (moe_file_record){0}; }

const moe__struct_info moe__io_record_info = MOE__STRUCT_INFO(moe_file_record, record_defaults);

moe_status moe_file_record_init(moe_file_record *record, size_t size)
{
    return moe__module_struct_init(&moe__io_record_info, record, size, __func__);
}

/* ---- life ------------------------------------------------------------------------------------ */

void moe__io_close_shards(moe_file *file)
{
    for (int64_t i = 0; i < file->shards; i++) {
        if (file->shard[i].fd >= 0) (void)close(file->shard[i].fd);
        free(file->shard[i].path);
    }
    free(file->shard);
}

void moe_file_close(moe_file *file)
{
    if (!file) return;
    moe__io_close_shards(file);
    for (int64_t i = 0; i < file->count; i++) free(file->tensor[i].name);
    for (int64_t i = 0; i < file->metadata_count; i++)
        free(file->metadata[i].key), free(file->metadata[i].value);
    free(file->tensor), free(file->metadata);
    free(file);
}

moe_status moe__io_add_shard(moe_file *file, const char *path, const char *function)
{
    struct stat status;
    if (!moe__io_grow((void **)&file->shard, &file->shard_room, file->shards, sizeof *file->shard))
        REFUSE_MEMORY();
    moe__io_shard *s = &file->shard[file->shards];
    *s = (moe__io_shard){.path = moe__io_copy_string(path), .fd = -1};
    if (!s->path) REFUSE_MEMORY();
    file->shards++;
    /* not to hang on a pipe that nobody writes to */
    s->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (s->fd < 0) return moe__io_system(function, "open", path, errno);
    if (fstat(s->fd, &status) != 0) return moe__io_system(function, "look at", path, errno);
    if (!S_ISREG(status.st_mode)) REFUSE(MOE_ERROR_SYSTEM, "%.300s is no file", path);
    s->size = status.st_size;
    return MOE_OK;
}

moe_status moe__io_add_metadata(moe_file *file, const char *key, const char *value,
                                const char *function)
{
    if (!moe__io_grow((void **)&file->metadata, &file->metadata_room, file->metadata_count,
                      sizeof *file->metadata))
        REFUSE_MEMORY();
    moe__io_pair *p = &file->metadata[file->metadata_count];
    *p = (moe__io_pair){moe__io_copy_string(key), moe__io_copy_string(value)};
    if (!p->key || !p->value) {
        free(p->key), free(p->value);
        REFUSE_MEMORY();
    }
    file->metadata_count++;
    return MOE_OK;
}

static int by_key(const void *a, const void *b)
{
    return strcmp(((const moe__io_pair *)a)->key, ((const moe__io_pair *)b)->key);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const moe__io_tensor *)a)->name, ((const moe__io_tensor *)b)->name);
}

moe_status moe__io_sort_tensors(moe_file *file, const char *function)
{
    if (file->count > 0) qsort(file->tensor, (size_t)file->count, sizeof *file->tensor, by_name);
    if (file->metadata_count > 0)
        qsort(file->metadata, (size_t)file->metadata_count, sizeof *file->metadata, by_key);
    for (int64_t i = 1; i < file->count; i++)
        if (strcmp(file->tensor[i - 1].name, file->tensor[i].name) == 0)
            REFUSE_CORRUPT("%.200s is in %.100s and in %.100s", file->tensor[i].name,
                           file->shard[file->tensor[i - 1].shard].path,
                           file->shard[file->tensor[i].shard].path);
    return MOE_OK;
}

/* ---- which file a path means ----------------------------------------------------------------- */

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

/* directory/name, malloc'd; NULL without memory. */
static char *join(const char *directory, const char *name)
{
    size_t bytes = strlen(directory) + strlen(name) + 2;
    char *path = malloc(bytes);
    if (path) (void)snprintf(path, bytes, "%s/%s", directory, name);
    return path;
}

/* The only *.safetensors of a directory, as a malloc'd path. */
static moe_status only_file(char **found, const char *directory, const char *function)
{
    char name[256] = "";
    struct dirent *e;
    int64_t count = 0;
    DIR *d = opendir(directory);
    if (!d) return moe__io_system(function, "open", directory, errno);
    while ((e = readdir(d)) != NULL)
        if (ends_with(e->d_name, ".safetensors")) {
            (void)snprintf(name, sizeof name, "%s", e->d_name);
            count++;
        }
    (void)closedir(d);
    if (count != 1)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT,
               "%.300s has %lld files *.safetensors and no index: name one", directory, (ll)count);
    *found = join(directory, name);
    if (!*found) REFUSE_MEMORY();
    return MOE_OK;
}

static moe_status file_of_directory(char **found, const char *directory, const char *function)
{
    static const char *const NAMES[] = {"model.safetensors.index.json", "model.safetensors"};
    for (int i = 0; i < 2; i++) {
        *found = join(directory, NAMES[i]);
        if (!*found) REFUSE_MEMORY();
        if (access(*found, F_OK) == 0) return MOE_OK;
        free(*found);
        *found = NULL;
    }
    return only_file(found, directory, function);
}

static moe_status open_path(moe_file *file, const char *path, const char *function)
{
    if (ends_with(path, ".index.json")) {
        MOE_TRY(moe__io_read_index(file, path, function));
    } else {
        MOE_TRY(moe__io_add_shard(file, path, function));
        MOE_TRY(moe__io_read_header(file, true, function));
    }
    return moe__io_sort_tensors(file, function);
}

moe_status moe_file_open(moe_file **file, const char *path)
{
    const char *function = __func__;
    struct stat status;
    char *found = NULL;
    MOE_TRY(moe__io_enter(function));
    if (!file || !path) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%s is NULL", file ? "path" : "file");
    if (stat(path, &status) != 0) return moe__io_system(function, "open", path, errno);
    if (S_ISDIR(status.st_mode)) MOE_TRY(file_of_directory(&found, path, function));
    moe_file *f = calloc(1, sizeof *f);
    if (!f) {
        free(found);
        REFUSE_MEMORY();
    }
    moe_status result = open_path(f, found ? found : path, function);
    free(found);
    if (result != MOE_OK)
        moe_file_close(f);
    else
        *file = f;
    return result;
}

/* ---- queries --------------------------------------------------------------------------------- */

int64_t moe_file_count(const moe_file *file) { return file ? file->count : 0; }

int64_t moe_file_find(const moe_file *file, const char *name)
{
    if (!file || !name || file->count == 0) return -1;
    moe__io_tensor key = {.name = (char *)(uintptr_t)name};
    const moe__io_tensor *t = bsearch(&key, file->tensor, (size_t)file->count, sizeof key, by_name);
    return t ? t - file->tensor : -1;
}

static moe_status check_index(int64_t index, int64_t count, const char *what, const char *function)
{
    if (index < 0 || index >= count)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "index is %lld, there are %lld %s", (ll)index, (ll)count,
               what);
    return MOE_OK;
}

moe_status moe_file_entry(const moe_file *file, int64_t index, moe_file_record *record)
{
    const char *function = __func__;
    if (!file) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "file is NULL");
    MOE_TRY(check_index(index, file->count, "tensors", function));
    MOE_TRY(moe__io_check_out(&moe__io_record_info, record, function));
    const moe__io_tensor *t = &file->tensor[index];
    moe_file_record known = {.name = t->name,
                             .path = file->shard[t->shard].path,
                             .element_count = t->count,
                             .bytes = t->bytes,
                             .offset = t->offset,
                             .dims = t->dims,
                             .dtype = t->dtype};
    memcpy(known.shape, t->shape, sizeof known.shape);
    moe__io_write_out(&moe__io_record_info, record, &known);
    return MOE_OK;
}

int64_t moe_file_metadata_count(const moe_file *file) { return file ? file->metadata_count : 0; }

moe_status moe_file_metadata(const moe_file *file, int64_t index, const char **key,
                             const char **value)
{
    const char *function = __func__;
    if (!file || !key || !value)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "%s is NULL", !file ? "file" : key ? "value" : "key");
    MOE_TRY(check_index(index, file->metadata_count, "metadata strings", function));
    *key = file->metadata[index].key;
    *value = file->metadata[index].value;
    return MOE_OK;
}

const char *moe_file_metadata_find(const moe_file *file, const char *key)
{
    if (!file || !key || file->metadata_count == 0) return NULL;
    moe__io_pair wanted = {.key = (char *)(uintptr_t)key};
    const moe__io_pair *p = bsearch(&wanted, file->metadata, (size_t)file->metadata_count,
                                    sizeof wanted, by_key);
    return p ? p->value : NULL;
}

/* ---- reading --------------------------------------------------------------------------------- */

moe_status moe__io_pread(const moe_file *file, int32_t shard, void *to, int64_t bytes,
                         int64_t offset, const char *function)
{
    const moe__io_shard *s = &file->shard[shard];
    int64_t done = 0;
    while (done < bytes) {
        ssize_t n = pread(s->fd, (char *)to + done, (size_t)moe__min(bytes - done, 1 << 30),
                          (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return moe__io_system(function, "read", s->path, errno);
        if (n == 0)
            REFUSE(MOE_ERROR_SYSTEM, "%.300s ends at byte %lld, it had %lld when it was opened",
                   s->path, (ll)(offset + done), (ll)s->size);
        done += n;
    }
    return MOE_OK;
}

static moe_status read_converted(const moe_file *file, const moe__io_tensor *t, char *to,
                                 int32_t dtype, int64_t first, int64_t count, const char *function)
{
    char buffer[16384];
    int64_t from_size = moe__io_dtype_size(t->dtype), to_size = moe__io_dtype_size(dtype);
    int64_t most = (int64_t)sizeof buffer / from_size;
    for (int64_t i = 0; i < count; i += most) {
        int64_t n = moe__min(most, count - i);
        MOE_TRY(moe__io_pread(file, t->shard, buffer, n * from_size,
                              t->offset + (first + i) * from_size, function));
        int64_t bad = moe__io_convert(to + i * to_size, dtype, buffer, t->dtype, n);
        if (bad >= 0)
            REFUSE(MOE_ERROR_OVERFLOW, "element %lld of %.200s does not fit in 32 bits",
                   (ll)(first + i + bad), t->name);
    }
    return MOE_OK;
}

moe_status moe_file_read(const moe_file *file, int64_t index, void *to, int64_t first,
                         int64_t count, int32_t dtype)
{
    const char *function = __func__;
    if (!file) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "file is NULL");
    MOE_TRY(check_index(index, file->count, "tensors", function));
    const moe__io_tensor *t = &file->tensor[index];
    int64_t length = t->dims ? t->shape[0] : 1;
    int64_t each = length ? t->count / length : 0;
    if (count == MOE_FILE_ALL && first >= 0 && first <= length) count = length - first;
    if (first < 0 || count < 0 || first > length || count > length - first)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT,
               "first is %lld and count %lld, the first dimension of %.200s is %lld", (ll)first,
               (ll)count, t->name, (ll)length);
    if (!moe__io_convertible(dtype, t->dtype))
        REFUSE(MOE_ERROR_NOT_SUPPORTED, "%.200s is %s and cannot be read as %s", t->name,
               moe__io_dtype_name(t->dtype), moe__io_dtype_name(dtype));
    if (count * each == 0) return MOE_OK;
    if (!to) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "to is NULL");
    int64_t size = moe__io_dtype_size(t->dtype);
    if (dtype == t->dtype)
        return moe__io_pread(file, t->shard, to, count * each * size,
                             t->offset + first * each * size, function);
    return read_converted(file, t, to, dtype, first * each, count * each, function);
}
