/* memory.c - the host's memory as a backend's: the calling thread does it, at once. */
#include "internal.h"

#include <string.h>

static void *host_alloc(moe_context *context, int64_t bytes, bool zeroed)
{
    return zeroed ? moe__alloc_zeroed(context, bytes) : moe__alloc(context, bytes);
}

static moe_status host_zero(const moe__workers *workers, void *to, int64_t bytes)
{
    (void)workers;
    if (bytes > 0) memset(to, 0, (size_t)bytes);
    return MOE_OK;
}

static moe_status host_copy(const moe__workers *workers, void *to, const void *from, int64_t bytes)
{
    (void)workers;
    if (bytes > 0) memcpy(to, from, (size_t)bytes);
    return MOE_OK;
}

const moe__memory moe__host_memory = {
    .name = "CPU",
    .is_host = 1,
    .alloc = host_alloc,
    .free = moe__free,
    .zero = host_zero,
    .copy = host_copy,
    .fetch = host_copy,
    .store = host_copy,
};
