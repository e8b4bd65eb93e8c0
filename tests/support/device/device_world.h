/* device_world.h - ranks as threads that exchange memory of devices in the order of streams: what a
 * transport such as NCCL promises, over events and copies. Host memory goes through a world. */
#ifndef MOE_TEST_DEVICE_WORLD_H
#define MOE_TEST_DEVICE_WORLD_H

#include <moe/moe.h>

typedef struct device_world device_world;

device_world *device_world_create(moe_context *context, int32_t ranks);
void device_world_destroy(device_world *world);
/* The communicator of a rank, with all of MOE_COMM_*; NULL on an error. */
moe_comm *device_world_connect(device_world *world, moe_context *context, int32_t rank,
                               double timeout);

/* The n-th exchange of device memory of rank 1 from now on fails there; rank 1 calls it. */
void device_world_fail(device_world *world, int n);

#endif
