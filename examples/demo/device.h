/* device.h - where the layers compute, and how numbers get there and back.
 *
 * Embedding, norms, loss and optimizer are the demo's own and compute on the host. So do the layers
 * in build/demo, in the very same arrays. In build/demo_cuda they compute on a GPU, in memory of
 * it, and the calls below copy around them. Two files make these calls: device_none.c and
 * device_cuda.c. */
#ifndef DEMO_DEVICE_H
#define DEMO_DEVICE_H

#include <moe/moe.h>

/* Those that can fail return 0, or -1 with a message on stderr. */

/* The context of the layers. threads: of one that computes on the host. */
int device_context(moe_context **context, int32_t threads);
/* Prints what computes: "4 threads". */
void device_print(const moe_context *context);

/* Memory there, for the next two; NULL where the host's own array does. */
int device_room(float **room, int64_t bytes);
void device_free(float *room);

/* Where a layer reads what `host` has: in `room`, which gets a copy, or in `host` itself. NULL on
 * failure. */
const float *device_in(float *room, const float *host, int64_t bytes);
/* Where a layer writes what device_back takes to `host` then. */
float *device_out(float *room, float *host);

/* Waits for what layers have been asked to do, and copies from there to the host, if that is
 * another place. */
int device_back(void *host, const void *there, int64_t bytes);

/* The host's array for one that a layer has there: the same, or a copy. */
int device_host(float **host, float *there, int64_t bytes);
void device_host_free(float *host);

#endif
