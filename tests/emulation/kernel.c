/* kernel.c - runs a kernel: its blocks one after another, the threads of a block as fibers.
 *
 * A thread runs until it waits at a barrier or with its warp; then another one runs. Blocks, warps
 * and lanes start in a random order, and of the threads that may go on a random one does: the last
 * that became ready in most blocks, for that is kind to the caches and lets warps run far ahead of
 * each other, any one in the others. A fiber whose thread returned runs the next thread that has
 * not begun, without a switch. When no thread can go on, the kernel is wrong, and report() says
 * how. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum state { NEW, RUNNING, READY, AT_BARRIER, AT_WARP, DONE };

struct thread {
    enum state state;
    struct emu_fiber *fiber;
    const char *file;
    int line, kind;
};

struct warp {
    int arrived, generation, first; /* first to arrive */
    void *barrier;
    uint64_t bits[2][EMU_WARP]; /* of this generation and the one before it */
};

static struct {
    const struct emu_run *run;
    struct emu_fiber host;
    struct thread thread[EMU_THREADS];
    struct warp warp[EMU_THREADS / EMU_WARP];
    int threads, started, done, current;
    int order[EMU_THREADS];
    int ready[EMU_THREADS], ready_count;
    struct emu_fiber *idle[EMU_THREADS];
    int idle_count, fiber_count;
    int at_barrier, first; /* first to arrive */
    void *barrier;
    bool deep, failed;
} block;

/* What is acquired and released under ThreadSanitizer, by address: the start of a kernel, its end,
 * and one for each barrier, for a thread that left a barrier early must not be seen by one that
 * leaves it late. */
static char kernel_begin, kernel_end;
static uint64_t barriers[1 << 16];
static unsigned next_barrier;

emu_coordinates emu_at;

/* ---- where ----------------------------------------------------------------------------------- */

static uint3 thread_index(int t)
{
    dim3 b = block.run->block;
    uint3 i = {(unsigned)t % b.x, (unsigned)t / b.x % b.y, (unsigned)t / b.x / b.y};
    return i;
}

const char *emu_where(void)
{
    static char text[512];
    if (block.run == NULL) return NULL;
    snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u)",
             block.run->kernel->name, emu_at.block.x, emu_at.block.y, emu_at.block.z,
             emu_at.thread.x, emu_at.thread.y, emu_at.thread.z);
    return text;
}

static void point_at(int t)
{
    block.current = t;
    emu_at.thread = thread_index(t);
}

/* ---- which thread next ----------------------------------------------------------------------- */

static void shuffle(int *list, int count)
{
    for (int i = count - 1; i > 0; i--) {
        int j = (int)emu_random((uint32_t)i + 1), kept = list[i];
        list[i] = list[j];
        list[j] = kept;
    }
}

/* Warps in random order, lanes in random order; or all threads in random order. */
static void choose_order(void)
{
    int warps = block.threads / EMU_WARP, warp[EMU_THREADS / EMU_WARP];
    for (int i = 0; i < block.threads; i++) block.order[i] = i;
    if (!block.deep) {
        shuffle(block.order, block.threads);
        return;
    }
    for (int w = 0; w < warps; w++) warp[w] = w;
    shuffle(warp, warps);
    for (int w = 0; w < warps; w++) {
        int *lanes = block.order + w * EMU_WARP;
        for (int l = 0; l < EMU_WARP; l++) lanes[l] = warp[w] * EMU_WARP + l;
        shuffle(lanes, EMU_WARP);
    }
}

static void make_ready(const int *list, int count)
{
    int *added = block.ready + block.ready_count;
    for (int i = 0; i < count; i++) {
        block.thread[list[i]].state = READY;
        added[i] = list[i];
    }
    shuffle(added, count);
    block.ready_count += count;
}

static int take_ready(void)
{
    int i = block.deep ? block.ready_count - 1 : (int)emu_random((uint32_t)block.ready_count);
    int t = block.ready[i];
    block.ready[i] = block.ready[--block.ready_count];
    return t;
}

static void leave_failed(struct emu_fiber *self)
{
    block.failed = true;
    emu_fiber_switch(self, &block.host);
}

/* ---- nobody can go on: why ------------------------------------------------------------------- */

static void name_line(char *out, size_t size, const struct thread *t)
{
    const char *file = t->file != NULL ? strrchr(t->file, '/') : NULL;
    snprintf(out, size, "%s:%d", file != NULL ? file + 1 : t->file, t->line);
}

/* The first thread in this state, or -1. */
static int first_in(enum state state)
{
    for (int t = 0; t < block.threads; t++) {
        if (block.thread[t].state == state) return t;
    }
    return -1;
}

static void report_warp(int t)
{
    char here[256], there[256] = "";
    int w = t / EMU_WARP;
    name_line(here, sizeof here, &block.thread[t]);
    for (int l = 0; l < EMU_WARP; l++) {
        const struct thread *other = &block.thread[w * EMU_WARP + l];
        if (other->state == AT_WARP) continue;
        if (other->state == DONE) {
            snprintf(there, sizeof there, "lane %d has returned", l);
        } else {
            char line[200];
            name_line(line, sizeof line, other);
            snprintf(there, sizeof there, "lane %d waits at the barrier of %s", l, line);
        }
        break;
    }
    emu_mistake("divergent shuffle: %s, warp %d: lane %d waits for its warp at %s, %s", emu_where(),
                w, t % EMU_WARP, here, there);
}

static void report(void)
{
    int warp = first_in(AT_WARP), barrier = first_in(AT_BARRIER), done = first_in(DONE);
    char here[256];
    if (warp >= 0) {
        report_warp(warp);
        return;
    }
    name_line(here, sizeof here, &block.thread[barrier]);
    emu_mistake("return before a barrier: %s: thread %d waits at %s, thread %d has returned",
                emu_where(), barrier, here, done);
}

/* ---- fibers ---------------------------------------------------------------------------------- */

static void thread_main(void);

/* Goes on with another thread. `self` may be resumed later, or is idle and never is. */
static void yield_from(struct emu_fiber *self)
{
    struct emu_fiber *next;
    if (block.ready_count > 0) {
        int t = take_ready();
        block.thread[t].state = RUNNING;
        point_at(t);
        next = block.thread[t].fiber;
    } else if (block.started < block.threads) {
        next = block.idle_count > 0 ? block.idle[--block.idle_count]
                                    : emu_fiber_get(block.fiber_count++, thread_main);
    } else if (block.done == block.threads) {
        next = &block.host;
    } else {
        report();
        block.failed = true;
        next = &block.host;
    }
    if (next != self) emu_fiber_switch(self, next);
}

static void run_thread(struct emu_fiber *self)
{
    int t = block.order[block.started++];
    block.thread[t].state = RUNNING;
    block.thread[t].fiber = self;
    point_at(t);
    emu_acquire(&kernel_begin);
    block.run->thread(block.run->kernel->address, block.run->arguments);
    emu_release_to(&kernel_end);
    block.thread[block.current].state = DONE;
    block.done++;
}

static void thread_main(void)
{
    struct emu_fiber *self = emu_fiber_enter();
    for (;;) {
        /* ThreadSanitizer sees threads as fibers, so there each thread has its own. */
        bool own = emu_threads_sanitized();
        do {
            run_thread(self);
        } while (!own && block.ready_count == 0 && block.started < block.threads);
        if (!own) block.idle[block.idle_count++] = self;
        yield_from(self);
    }
}

/* ---- what kernels call ----------------------------------------------------------------------- */

static void *new_barrier(void) { return &barriers[next_barrier++ % (1 << 16)]; }

static void wait_here(enum state state, int kind, const char *file, int line)
{
    struct thread *t = &block.thread[block.current];
    t->state = state;
    t->kind = kind;
    t->file = file;
    t->line = line;
}

static void mismatch(const char *what, int other)
{
    char here[256], there[256];
    name_line(here, sizeof here, &block.thread[block.current]);
    name_line(there, sizeof there, &block.thread[other]);
    emu_mistake("divergent %s: %s waits at %s, thread %d at %s", what, emu_where(), here, other,
                there);
    leave_failed(block.thread[block.current].fiber);
}

void emu_block_sync(const char *file, int line)
{
    int self = block.current;
    wait_here(AT_BARRIER, 0, file, line);
    if (block.at_barrier == 0) {
        block.barrier = new_barrier();
        block.first = self;
    }
    if (block.thread[block.first].line != line) mismatch("barrier", block.first);
    void *barrier = block.barrier;
    emu_release_to(barrier);
    if (++block.at_barrier == block.threads) {
        int all[EMU_THREADS];
        for (int t = 0; t < block.threads; t++) all[t] = t;
        block.at_barrier = 0;
        make_ready(all, block.threads);
    }
    yield_from(block.thread[self].fiber);
    emu_acquire(barrier);
}

static uint64_t exchanged(const uint64_t *bits, int lane, int kind, int by)
{
    int from = kind == EMU_SHUFFLE       ? by & (EMU_WARP - 1)
               : kind == EMU_SHUFFLE_XOR ? lane ^ by
               : kind == EMU_SHUFFLE_UP  ? lane - by
                                         : lane + by;
    if (kind == EMU_BALLOT) {
        uint64_t mask = 0;
        for (int l = 0; l < EMU_WARP; l++) mask |= (bits[l] & 1) << l;
        return mask;
    }
    return bits[from >= 0 && from < EMU_WARP ? from : lane];
}

/* A lane that went on may already be at the next exchange, so two generations are kept. */
uint64_t emu_warp_exchange(uint64_t bits, int kind, int by, const char *file, int line)
{
    int self = block.current, w = self / EMU_WARP, lane = self % EMU_WARP;
    struct warp *warp = &block.warp[w];
    uint64_t *all = warp->bits[warp->generation & 1];
    all[lane] = bits;
    wait_here(AT_WARP, kind, file, line);
    if (warp->arrived == 0) {
        warp->barrier = new_barrier();
        warp->first = self;
    }
    const struct thread *first = &block.thread[warp->first];
    if (first->line != line || first->kind != kind) mismatch("shuffle", warp->first);
    void *barrier = warp->barrier;
    if (kind == EMU_WARP_SYNC) emu_release_to(barrier);
    if (++warp->arrived == EMU_WARP) {
        int lanes[EMU_WARP];
        for (int l = 0; l < EMU_WARP; l++) lanes[l] = w * EMU_WARP + l;
        warp->arrived = 0;
        warp->generation++;
        make_ready(lanes, EMU_WARP);
    }
    yield_from(block.thread[self].fiber);
    if (kind == EMU_WARP_SYNC) {
        emu_acquire(barrier);
        return 0;
    }
    return exchanged(all, lane, kind, by);
}

void emu_misaligned(const void *address, const char *file, int line)
{
    emu_mistake("misaligned 16-byte access: %s: %p at %s:%d", emu_where(), address, file, line);
    leave_failed(block.thread[block.current].fiber);
}

/* For mistakes that other files find while a thread runs. */
void emu_give_up(void) { leave_failed(block.thread[block.current].fiber); }

/* ---- blocks ---------------------------------------------------------------------------------- */

static bool run_block(uint3 index)
{
    const struct emu_run *run = block.run;
    emu_at.block = index;
    emu_at.block_dim = run->block;
    emu_at.grid_dim = run->grid;
    block.started = block.done = block.ready_count = block.at_barrier = 0;
    block.idle_count = block.fiber_count = 0;
    block.failed = false;
    block.deep = !emu_coin(4);
    for (int t = 0; t < block.threads; t++) block.thread[t].state = NEW;
    for (int w = 0; w < block.threads / EMU_WARP; w++) block.warp[w].arrived = 0;
    choose_order();
    emu_traffic_block();
    emu_shared_begin(run->shared, run->kernel->shared_allowed);
    emu_release_to(&kernel_begin);
    yield_from(&block.host);
    if (block.failed) {
        emu_fibers_abandon(block.fiber_count);
    } else {
        emu_shared_end();
    }
    return !block.failed;
}

/* Block number i of a random permutation: i times an odd step, of the range rounded up to a power
 * of two, skipping what is past the end. */
bool emu_run_kernel(const struct emu_run *run)
{
    uint64_t blocks = (uint64_t)run->grid.x * run->grid.y * run->grid.z, range = 1;
    while (range < blocks) range *= 2;
    uint64_t step = (uint64_t)emu_random(1u << 30) * 2 + 1, first = emu_random(1u << 30);
    bool ok = true;
    block.run = run;
    block.threads = (int)(run->block.x * run->block.y * run->block.z);
    emu_fiber_host(&block.host);
    emu_fibers_prepare(block.threads);
    emu_traffic_begin(run);
    for (uint64_t i = 0; ok && i < range; i++) {
        uint64_t b = (first + i * step) & (range - 1);
        if (b >= blocks) continue;
        uint3 index = {(unsigned)(b % run->grid.x), (unsigned)(b / run->grid.x % run->grid.y),
                       (unsigned)(b / run->grid.x / run->grid.y)};
        ok = run_block(index);
    }
    emu_acquire(&kernel_end);
    emu_traffic_end();
    if (ok) emu_check_red_zones(run->kernel->name);
    block.run = NULL;
    return ok;
}
