/* struct.c - the one place that takes in, or gives out, a caller's struct of any legal size.
 *
 *     size < 8 or absurd         MOE_ERROR_STRUCT_SIZE: nonsense, or init was forgotten
 *     size < first release       MOE_ERROR_STRUCT_TOO_OLD
 *     size > known, tail not 0   MOE_ERROR_STRUCT_TOO_NEW
 *
 * The first field of every struct is its uint64_t struct_size. */
#include "internal.h"

#include <string.h>

static const uint64_t ABSURD = (uint64_t)1 << 20;

static moe_status check_size(const moe__struct_info *info, uint64_t size, const char *function)
{
    if (size < sizeof(uint64_t) || size > ABSURD)
        return moe__fail(MOE_ERROR_STRUCT_SIZE, function,
                         "%s has struct_size %llu; was %s's init call forgotten?", info->name,
                         (unsigned long long)size, info->name);
    if (size < info->first_size)
        return moe__fail(MOE_ERROR_STRUCT_TOO_OLD, function,
                         "%s has struct_size %llu, the first release had %llu", info->name,
                         (unsigned long long)size, (unsigned long long)info->first_size);
    return MOE_OK;
}

static uint64_t size_of_instance(const void *instance)
{
    uint64_t size;
    memcpy(&size, instance, sizeof size);
    return size;
}

/* Every default with struct_size = info->size. */
static void write_defaults(const moe__struct_info *info, void *known)
{
    uint64_t size = info->size;
    info->defaults(known);
    memcpy(known, &size, sizeof size);
}

static size_t smaller(uint64_t a, size_t b) { return a < b ? (size_t)a : b; }

moe_status moe__struct_init(const moe__struct_info *info, void *instance, size_t size,
                            const char *function)
{
    uint64_t known[128]; /* larger than any public struct */
    uint64_t caller_size = size;
    if (!instance) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, function, "%s is NULL", info->name);
    if (info->size > sizeof known)
        return moe__fail(MOE_ERROR_INTERNAL, function, "%s has %llu bytes", info->name,
                         (unsigned long long)info->size);
    MOE_TRY(check_size(info, size, function));
    write_defaults(info, known);
    memset(instance, 0, size);
    memcpy(instance, known, smaller(size, info->size));
    memcpy(instance, &caller_size, sizeof caller_size);
    return MOE_OK;
}

/* The bytes beyond what this library knows must be zero. */
static moe_status check_tail(const moe__struct_info *info, const void *from, uint64_t size,
                             const char *function)
{
    const unsigned char *bytes = from;
    for (uint64_t i = info->size; i < size; i++)
        if (bytes[i] != 0)
            return moe__fail(
                MOE_ERROR_STRUCT_TOO_NEW, function,
                "%s has struct_size %llu, this library knows %llu, and byte %llu is not 0",
                info->name, (unsigned long long)size, (unsigned long long)info->size,
                (unsigned long long)i);
    return MOE_OK;
}

moe_status moe__struct_read(const moe__struct_info *info, void *known, const void *from,
                            bool null_ok, const char *function)
{
    uint64_t own_size = info->size;
    if (!from) {
        write_defaults(info, known);
        if (null_ok) return MOE_OK;
        return moe__fail(MOE_ERROR_INVALID_ARGUMENT, function, "%s is NULL", info->name);
    }
    uint64_t size = size_of_instance(from);
    MOE_TRY(check_size(info, size, function));
    MOE_TRY(check_tail(info, from, size, function));
    write_defaults(info, known);
    memcpy(known, from, smaller(size, info->size));
    memcpy(known, &own_size, sizeof own_size);
    return MOE_OK;
}

moe_status moe__struct_check_out(const moe__struct_info *info, const void *to, const char *function)
{
    if (!to) return moe__fail(MOE_ERROR_INVALID_ARGUMENT, function, "%s is NULL", info->name);
    return check_size(info, size_of_instance(to), function);
}

void moe__struct_write(const moe__struct_info *info, void *to, const void *known)
{
    uint64_t size = size_of_instance(to);
    memset(to, 0, (size_t)size);
    memcpy(to, known, smaller(size, info->size));
    memcpy(to, &size, sizeof size);
}
