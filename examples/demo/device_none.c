/* device_none.c - layers compute on the host, in the arrays of the demo. */
#include "device.h"

#include "model.h"

#include <stdio.h>
#include <string.h>

int device_context(moe_context **context, int32_t threads)
{
    moe_context_config c;
    TRY(moe_context_config_init(&c, sizeof c));
    c.threads = threads;
    TRY(moe_context_create(context, &c));
    return 0;
}

void device_print(const moe_context *context)
{
    printf("%d threads", (int)moe_context_threads(context));
}

int device_room(float **room, int64_t bytes)
{
    (void)bytes;
    *room = NULL;
    return 0;
}

void device_free(float *room) { (void)room; }

const float *device_in(float *room, const float *host, int64_t bytes)
{
    (void)room, (void)bytes;
    return host;
}

float *device_out(float *room, float *host)
{
    (void)room;
    return host;
}

int device_back(void *host, const void *there, int64_t bytes)
{
    if (host != there) memcpy(host, there, (size_t)bytes);
    return 0;
}

int device_host(float **host, float *there, int64_t bytes)
{
    (void)bytes;
    *host = there;
    return 0;
}

void device_host_free(float *host) { (void)host; }
