/* ffn_blocks.c - the rows of every expert cut in blocks, and the blocks shared out among threads.
 *
 * Blocks of an expert are equal within a row. Tasks take them from one counter, large ones first:
 * nothing waits for an expert. */
#include "cpu/ffn_rows.h"

/* Rows of a block of expert e: at most run->block.rows, equal within 1. */
static int64_t blocks_of(const ffn_run *run, int64_t e)
{
    const int64_t *begin = run->job->plan->expert_begin;
    return blocks(begin[e + 1] - begin[e], run->block.rows);
}

/* tile_begin[i] counts the blocks before the i-th expert of tile_order: those with large blocks
 * first, so that no thread begins a long one when the others end. */
static void order_experts(ffn_run *run)
{
    enum { CLASSES = 8 };
    const moe__experts_job *job = run->job;
    const int64_t *begin = job->plan->expert_begin;
    int64_t experts = job->plan->num_experts, first[CLASSES + 1] = {0};
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t e = 0; e < experts; e++) {
            int64_t rows = begin[e + 1] - begin[e], count = blocks_of(run, e);
            if (rows == 0) continue;
            int64_t size = (rows / count * CLASSES - 1) / run->block.rows;
            int64_t rank = CLASSES - 1 - moe__max(0, moe__min(size, CLASSES - 1));
            if (pass == 0)
                first[rank + 1]++;
            else
                job->tile_order[first[rank]++] = e;
        }
        for (int i = 0; pass == 0 && i < CLASSES; i++) first[i + 1] += first[i];
        if (pass == 0) run->used = first[CLASSES];
    }
    job->tile_begin[0] = 0;
    for (int64_t i = 0; i < run->used; i++)
        job->tile_begin[i + 1] = job->tile_begin[i] + blocks_of(run, job->tile_order[i]);
    run->count = job->tile_begin[run->used];
}

bool MOE_KERNEL(ffn_run_begin)(ffn_run *run)
{
    const moe__experts_job *job = run->job;
    const moe__plan_arrays *plan = job->plan;
    int64_t rows = plan->expert_begin[plan->num_experts] - plan->expert_begin[0];
    int64_t threads = job->workers.context->threads;
    if (run->block.rows == 0 || rows == 0 ||
        job->workers.worker_bytes < run->block.reals * (int64_t)sizeof(real))
        return false;
    /* So small that the threads end together. */
    int64_t fair = moe__max(2 * TILE_M, rows / (8 * threads));
    run->block.rows = moe__min(run->block.rows, fair);
    order_experts(run);
    atomic_init(&run->next, 0);
    return threads == 1 || run->count >= 2 * threads;
}

static void run_blocks(const ffn_run *run, int64_t from, int64_t to, real *scratch)
{
    const moe__experts_job *job = run->job;
    const int64_t *tile_begin = job->tile_begin, *begin = job->plan->expert_begin;
    int64_t at = run_of(tile_begin, run->used, from);
    for (int64_t block = from; block < to; block++) {
        while (block >= tile_begin[at + 1]) at++;
        int64_t e = job->tile_order[at], rows = begin[e + 1] - begin[e];
        int64_t parts = blocks_of(run, e), i = block - tile_begin[at], r = part(rows, parts, i);
        bool last = block + 1 == tile_begin[at + 1];
        int64_t next = last && at + 1 < run->used ? job->tile_order[at + 1] : e;
        run->body(run, e, next, begin[e] + r, part(rows, parts, i + 1) - r, scratch);
    }
}

/* Small blocks are taken several at a time, one at a time at the end. */
static void run_task(void *argument, int64_t index)
{
    enum { MOST = 16 };
    ffn_run *run = argument;
    const moe__workers *w = &run->job->workers;
    real *scratch = (real *)(void *)(w->scratch + index * w->worker_bytes);
    *(int32_t *)(void *)(scratch + run->block.ahead) = 0;
    for (;;) {
        int64_t left = run->count - atomic_load_explicit(&run->next, memory_order_relaxed);
        int64_t some = moe__max(1, moe__min(MOST, left / (8 * (int64_t)w->context->threads)));
        int64_t from = atomic_fetch_add_explicit(&run->next, some, memory_order_relaxed);
        if (from >= run->count) return;
        run_blocks(run, from, moe__min(run->count, from + some), scratch);
    }
}

moe_status MOE_KERNEL(ffn_run_all)(ffn_run *run)
{
    const moe__workers *w = &run->job->workers;
    int64_t tasks = moe__min(run->count, w->context->threads);
    return moe__parallel(w->context, tasks, run_task, run, w->function);
}
