/* save.c - moe_checkpoint_save: a plan becomes a file that is there whole or not at all.
 *
 *     all     the same header; agree
 *     rank 0  a new file beside path, of full size, with the header; agree
 *     all     their blocks, to the disk; agree
 *     rank 0  renames it to path, to the disk; agree
 *
 * Whatever fails, the new file is removed and the old one untouched. */
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void save_defaults(void *instance)
{
    *(moe_save_options *)instance = (moe_save_options){.store_dtype = MOE_SAME};
}

const moe__struct_info moe__io_save_info = MOE__STRUCT_INFO(moe_save_options, save_defaults);

moe_status moe_save_options_init(moe_save_options *options, size_t size)
{
    return moe__module_struct_init(&moe__io_save_info, options, size, __func__);
}

/* ---- options --------------------------------------------------------------------------------- */

static moe_status take_metadata(moe__io_plan *plan, const moe_save_options *o, const char *function)
{
    if (o->metadata_count < 0 || o->metadata_count > INT32_MAX)
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "metadata_count is %lld", (ll)o->metadata_count);
    if (o->metadata_count > 0 && (!o->metadata_keys || !o->metadata_values))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "metadata_%s is NULL",
               o->metadata_keys ? "values" : "keys");
    plan->metadata = malloc((size_t)(o->metadata_count + 1) * sizeof *plan->metadata);
    if (!plan->metadata) REFUSE_MEMORY();
    plan->metadata[plan->metadata_count++] = (moe__io_pair){(char *)(uintptr_t) "libmoe.checkpoint",
                                                            (char *)(uintptr_t) "1"};
    for (int64_t i = 0; i < o->metadata_count; i++) {
        const char *key = o->metadata_keys[i], *value = o->metadata_values[i];
        if (!key || !value)
            REFUSE(MOE_ERROR_INVALID_ARGUMENT, "metadata_%s[%lld] is NULL", key ? "values" : "keys",
                   (ll)i);
        if (!moe__io_is_utf8(key) || !moe__io_is_utf8(value))
            REFUSE(MOE_ERROR_INVALID_ARGUMENT, "metadata string %lld is no UTF-8", (ll)i);
        if (strncmp(key, "libmoe.", 7) == 0)
            REFUSE(MOE_ERROR_INVALID_ARGUMENT, "the metadata key %.200s is reserved", key);
        for (int64_t j = 0; j < i; j++)
            if (strcmp(o->metadata_keys[j], key) == 0)
                REFUSE(MOE_ERROR_INVALID_ARGUMENT, "the metadata key %.200s is there twice", key);
        plan->metadata[plan->metadata_count++] = (moe__io_pair){(char *)(uintptr_t)key,
                                                                (char *)(uintptr_t)value};
    }
    return MOE_OK;
}

moe_status moe__io_read_save_options(moe__io_plan *plan, moe_save_options *known,
                                     const moe_save_options *options, const char *function)
{
    MOE_TRY(MOE__IO_READ(moe__io_save_info, known, options, function));
    if (known->store_dtype != MOE_SAME && !moe__io_is_float(known->store_dtype))
        REFUSE(MOE_ERROR_INVALID_ARGUMENT, "store_dtype is %d", (int)known->store_dtype);
    if (known->reserved) REFUSE(MOE_ERROR_INVALID_ARGUMENT, "reserved is not 0");
    plan->store_dtype = known->store_dtype;
    return take_metadata(plan, known, function);
}

/* ---- the new file ---------------------------------------------------------------------------- */

/* path + ".new-" + number. */
static void new_name(char *name, size_t size, const char *path, int64_t number)
{
    (void)snprintf(name, size, "%s.new-%016llx", path, (unsigned long long)number);
}

/* A number that no other save has: process and time. */
static int64_t draw_number(int attempt)
{
    struct timespec t = {0, 0};
    (void)clock_gettime(CLOCK_REALTIME, &t);
    uint64_t seed[4] = {(uint64_t)getpid(), (uint64_t)t.tv_sec, (uint64_t)t.tv_nsec,
                        (uint64_t)attempt};
    return (int64_t)moe__io_hash(seed, sizeof seed);
}

/* Creates it with the mode of the file that it will replace, at full size, with the header. */
static moe_status create(const moe__io_plan *plan, const char *path, char *name, size_t size,
                         int64_t *number, int *fd, const char *function)
{
    struct stat old;
    for (int attempt = 0; attempt < 100 && *fd < 0; attempt++) {
        *number = draw_number(attempt);
        new_name(name, size, path, *number);
        *fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (*fd < 0 && errno != EEXIST) return moe__io_system(function, "create", name, errno);
    }
    if (*fd < 0) return moe__io_system(function, "create", name, EEXIST);
    if (stat(path, &old) == 0) (void)fchmod(*fd, old.st_mode & 0777);
    if (ftruncate(*fd, (off_t)plan->file_bytes) != 0)
        return moe__io_system(function, "make room for", name, errno);
    return moe__io_pwrite(*fd, plan->header, plan->header_bytes, 0, name, function);
}

static moe_status open_new(const char *name, int *fd, const char *function)
{
    *fd = open(name, O_WRONLY | O_CLOEXEC);
    return *fd < 0 ? moe__io_system(function, "open", name, errno) : MOE_OK;
}

/* close tells of errors that write did not. */
static moe_status write_and_close(const moe__io_plan *plan, const char *name, int *fd,
                                  const char *function)
{
    moe_status status = moe__io_write_blocks(plan, *fd, name, function);
    if (status == MOE_OK && fsync(*fd) != 0) status = moe__io_system(function, "sync", name, errno);
    if (close(*fd) != 0 && status == MOE_OK)
        status = moe__io_system(function, "close", name, errno);
    *fd = -1;
    return status;
}

/* The name's change survives a power failure once its directory is on the disk. */
static moe_status sync_directory(const char *path, char *scratch, size_t size, const char *function)
{
    const char *slash = strrchr(path, '/');
    (void)snprintf(scratch, size, "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
    int fd = open(scratch, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return moe__io_system(function, "open", scratch, errno);
    moe_status status = MOE_OK;
    if (fsync(fd) != 0 && errno != EINVAL && errno != ENOTSUP)
        status = moe__io_system(function, "sync", scratch, errno);
    (void)close(fd);
    return status;
}

static moe_status finish(const char *path, const char *name, char *scratch, size_t size,
                         bool *renamed, const char *function)
{
    if (rename(name, path) != 0) return moe__io_system(function, "rename to", path, errno);
    *renamed = true;
    return sync_directory(path, scratch, size, function);
}

/* The steps of the head of this file, from the second. */
static moe_status write_file(const moe__io_plan *plan, const char *path, const moe__io_group *g,
                             char *name, char *scratch, size_t size, const char *function)
{
    bool first = g->rank == 0, made, renamed = false;
    int fd = -1;
    int64_t number = 0;
    moe_status status = MOE_OK;
    if (first) status = create(plan, path, name, size, &number, &fd, function);
    made = fd >= 0;
    status = moe__io_agree(g, status, 0, &number, function);
    if (status == MOE_OK) {
        if (!first) {
            new_name(name, size, path, number);
            status = open_new(name, &fd, function);
        }
        if (fd >= 0) status = write_and_close(plan, name, &fd, function);
        status = moe__io_agree(g, status, 0, NULL, function);
    }
    if (fd >= 0) (void)close(fd);
    if (status == MOE_OK) {
        if (first) status = finish(path, name, scratch, size, &renamed, function);
        status = moe__io_agree(g, status, 0, NULL, function);
    }
    if (made && !renamed) (void)unlink(name);
    return status;
}

moe_status moe__io_save(moe__io_plan *plan, const char *path, const moe__io_group *group,
                        moe_status so_far, const char *function)
{
    size_t size = strlen(path) + 32;
    char *name = NULL;
    if (so_far == MOE_OK) so_far = moe__io_lay_out(plan, function);
    if (so_far == MOE_OK && !(name = malloc(2 * size)))
        so_far = moe__io_fail(MOE_ERROR_OUT_OF_MEMORY, function, "no memory");
    uint64_t hash = plan->header ? moe__io_hash(plan->header, plan->header_bytes) : 0;
    moe_status status = moe__io_agree(group, so_far, hash, NULL, function);
    if (status == MOE_OK) status = write_file(plan, path, group, name, name + size, size, function);
    free(name);
    return status;
}

moe_status moe_checkpoint_save(const char *path, const moe_checkpoint_item *items, int64_t count,
                               const moe_save_options *options)
{
    const char *function = __func__;
    moe__io_plan plan = {.store_dtype = MOE_SAME};
    moe_save_options o;
    moe__io_group group;
    moe__io_layer *layers = NULL;
    int64_t layer_count = 0;
    MOE_TRY(moe__io_enter(function));
    MOE_TRY(MOE__IO_READ(moe__io_save_info, &o, options, function));
    MOE_TRY(moe__io_find_group(&group, o.comm, items, count, function));
    moe_status status = MOE_OK;
    if (!path) status = moe__io_fail(MOE_ERROR_INVALID_ARGUMENT, function, "path is NULL");
    if (status == MOE_OK) status = moe__io_read_save_options(&plan, &o, options, function);
    if (status == MOE_OK)
        status = moe__io_plan_items(&plan, &layers, &layer_count, items, count, group.rank,
                                    function);
    status = moe__io_save(&plan, path ? path : "", &group, status, function);
    moe__io_layers_free(layers, layer_count);
    moe__io_plan_free(&plan);
    return status;
}
