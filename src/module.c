/* module.c - the private interface of the module libraries: module.h. */
#include "module.h"
#include "pass_state.h"

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

void moe__module_retain(moe_context *context) { moe__context_retain(context); }

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

moe_status moe__module_context(moe_context **context, const moe_context_config *host,
                               const struct moe__memory *memory,
                               const struct moe__backend *const kernels[4], void *of_context,
                               const char *function)
{
    return moe__context_make(context, host, memory, kernels, of_context, function);
}

void *moe__module_of_context(const moe_context *context) { return context->of_context; }

void *moe__module_of_pass(const moe_pass *pass) { return pass->workers.of_pass; }

moe_context *moe__module_context_of(const moe_pass *pass) { return pass->context; }

bool moe__module_on_host(const moe_layer *layer)
{
    return !layer || layer->context->memory->is_host;
}

moe_status moe__module_move(const moe_layer *layer, int64_t index, void *opaque, void *dense,
                            bool to_dense, const char *function)
{
    return moe__storage_move(layer, index, opaque, dense, to_dense, function);
}

const moe_experts *moe__module_part(const moe_experts *experts, int64_t part)
{
    return experts && part >= 0 && part < experts->parts ? experts->part[part] : NULL;
}
