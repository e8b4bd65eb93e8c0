/* module.h - what the module libraries (libmoe_mpi, libmoe_io, libmoe_cuda, libmoe_nccl) need of
 * libmoe beyond its public calls. Exported under a version node of its own, LIBMOE_PRIVATE_0, for
 * modules of the same build only. */
#ifndef MOE_MODULE_H
#define MOE_MODULE_H

#include <moe/moe.h>

#include <stdbool.h>

/* The number of this interface; a module and libmoe must have the same. */
enum { MOE__MODULE_VERSION = 5 };

/* MOE__MODULE_VERSION of libmoe. */
MOE_API int32_t moe__module_version(void);

/* Sets the thread's message to "function: message" and returns `status`. */
MOE_API moe_status moe__module_fail(moe_status status, const char *function, const char *message);

/* 64-byte aligned, zero-filled memory of the context's allocator; NULL if there is none. */
MOE_API void *moe__module_alloc(moe_context *context, int64_t bytes);
MOE_API void moe__module_free(moe_context *context, void *memory, int64_t bytes);

/* One more reference to a context, which moe_context_destroy gives up. */
MOE_API void moe__module_retain(moe_context *context);

/* moe__struct_init and moe__struct_read of internal.h. */
struct moe__struct_info;
MOE_API moe_status moe__module_struct_init(const struct moe__struct_info *info, void *instance,
                                           size_t size, const char *function);
MOE_API moe_status moe__module_struct_read(const struct moe__struct_info *info, void *known,
                                           const void *from, const char *function);

/* Makes a communicator over a module's table. `why` says why a function of the table failed;
 * `release` of the table is called if this fails. */
MOE_API moe_status moe__module_comm(moe_comm **comm, moe_context *context,
                                    const moe_collectives *table, const char *(*why)(void *user),
                                    const char *function);

/* A context of a backend of a module: moe__context_make of internal.h. */
struct moe__memory;
struct moe__backend;
MOE_API moe_status moe__module_context(moe_context **context, const moe_context_config *host,
                                       const struct moe__memory *memory,
                                       const struct moe__backend *const kernels[4],
                                       void *of_context, const char *function);
/* What the backend keeps for a context, and for a pass; the context of a pass. */
MOE_API void *moe__module_of_context(const moe_context *context);
MOE_API void *moe__module_of_pass(const moe_pass *pass);
MOE_API moe_context *moe__module_context_of(const moe_pass *pass);

/* Whether a layer's own parameters are in the host's memory; true for NULL. */
MOE_API bool moe__module_on_host(const moe_layer *layer);

/* Copies between parameter `index` of a layer, which is opaque (`opaque`, or NULL: its data), and
 * dense memory of the record's shape and data_dtype. Written data counts as changed. */
MOE_API moe_status moe__module_move(const moe_layer *layer, int64_t index, void *opaque,
                                    void *dense, bool to_dense, const char *function);

/* Part number `part` of a pool of parts, or for 0 a plain pool itself; NULL beyond. */
MOE_API const moe_experts *moe__module_part(const moe_experts *experts, int64_t part);

#endif
