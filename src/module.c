/* module.c - the private interface of the module libraries: module.h. */
#include "module.h"
#include "internal.h"

int32_t moe__module_version(void) { return MOE__MODULE_VERSION; }

moe_status moe__module_fail(moe_status status, const char *function, const char *message)
{
    return moe__fail(status, function, "%s", message);
}

void *moe__module_alloc(moe_context *context, int64_t bytes)
{
    return moe__alloc_zeroed(context, bytes);
}

void moe__module_free(moe_context *context, void *memory, int64_t bytes)
{
    moe__free(context, memory, bytes);
}

moe_status moe__module_struct_init(const struct moe__struct_info *info, void *instance, size_t size,
                                   const char *function)
{
    return moe__struct_init(info, instance, size, function);
}

moe_status moe__module_struct_read(const struct moe__struct_info *info, void *known,
                                   const void *from, const char *function)
{
    return moe__struct_read(info, known, from, true, function);
}

moe_status moe__module_comm(moe_comm **comm, moe_context *context, const moe_collectives *table,
                            const char *(*why)(void *user), const char *function)
{
    return moe__comm_make(comm, context, table, why, function);
}

const moe_experts *moe__module_part(const moe_experts *experts, int64_t part)
{
    return experts && part >= 0 && part < experts->parts ? experts->part[part] : NULL;
}
