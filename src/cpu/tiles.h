/* tiles.h - runs the tiles of a grouped product on the context's threads.
 *
 * As many tasks as threads, each with its own piece of scratch, take tiles from one counter. A
 * tile's result does not depend on who computes it, so neither order nor number of threads
 * changes a byte. */
#ifndef MOE_CPU_TILES_H
#define MOE_CPU_TILES_H

#include "internal.h"
#include "cpu/kernels.h"

typedef struct tile_run {
    const moe__workers *workers;
    const moe__gemm_rows_job *rows; /* one of the two */
    const moe__gemm_dw_job *dw;
    int64_t count;
    _Atomic int64_t next;
} tile_run;

static void tile_task(void *argument, int64_t index)
{
    tile_run *run = argument;
    void *scratch = run->workers->scratch + index * run->workers->worker_bytes;
    for (;;) {
        int64_t tile = atomic_fetch_add_explicit(&run->next, 1, memory_order_relaxed);
        if (tile >= run->count) return;
        if (run->rows)
            MOE_KERNEL(gemm_rows_tile)(run->rows, tile, scratch);
        else
            MOE_KERNEL(gemm_dw_tile)(run->dw, tile, scratch);
    }
}

static inline moe_status run_tiles(tile_run *run)
{
    moe_context *context = run->workers->context;
    int64_t tasks = moe__min(run->count, context->threads);
    return moe__parallel(context, tasks, tile_task, run, run->workers->function);
}

static inline moe_status run_gemm_rows(const moe__workers *workers, moe__gemm_rows_job *job)
{
    tile_run run = {.workers = workers, .rows = job, .count = MOE_KERNEL(gemm_rows_plan)(job)};
    return run_tiles(&run);
}

static inline moe_status run_gemm_dw(const moe__workers *workers, moe__gemm_dw_job *job)
{
    tile_run run = {.workers = workers, .dw = job, .count = MOE_KERNEL(gemm_dw_plan)(job)};
    return run_tiles(&run);
}

/* Whether an operand is there at all. */
static inline int has(const moe__matrices *m) { return m->base != NULL || m->each != NULL; }

#endif
