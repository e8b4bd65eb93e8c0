/* pool.h - the library's own threads: started at the first use, parked when idle. */
#ifndef MOE_POOL_H
#define MOE_POOL_H

#include "internal.h"

/* A pool for `threads` tasks at once, the caller's thread included; NULL without memory. */
moe__pool *moe__pool_create(moe_context *context, int32_t threads);

/* Joins the threads. NULL is legal. No call may be running. */
void moe__pool_destroy(moe_context *context, moe__pool *pool);

/* Runs task(argument, i) for i in [0, count) on the calling thread and whatever threads are free,
 * each under the default floating-point environment, and returns when all have returned. Any number
 * of threads may call at once. Allocates nothing after the threads are there; goes on with fewer
 * threads if the system refuses some. */
void moe__pool_run(moe__pool *pool, int64_t count, moe_task_fn task, void *argument);

#endif
