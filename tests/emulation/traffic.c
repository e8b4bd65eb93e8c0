/* traffic.c - what kernels read and write, by kernel: bytes, 32-byte sectors, each checked.
 *
 * Programs of the traffic flavour link traffic_hooks.c, which calls emu_traffic_access for every
 * access of a kernel. The model: the k-th time that a lane runs an instruction goes together with
 * the k-th time of the other lanes of its warp, and a sector that several lanes touch then counts
 * once. There are no caches in it; "distinct" counts each sector once in a launch, which is what an
 * ideal cache would leave. Bytes that nobody wrote have a mark for each, and reading one is a
 * mistake; of managed memory, which the host writes unseen, if they are as fresh memory is. */
#include "internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KERNELS = 1024, WRITTEN_SHARED = EMU_SHARED_LIMIT };

static bool on;
static uint32_t launch_number;
static struct emu_traffic table[KERNELS], *now;
static int table_count;

/* Of one block: how often a lane ran an instruction, and which sectors its warp touched then. */
struct cell {
    uint64_t key;
    uint32_t stamp, count;
};
static struct {
    struct cell *cells;
    size_t size, used;
} often, touched;
static uint32_t stamp;

static struct {
    const unsigned char *begin;
    size_t bytes;
    unsigned char *written;
} shared_array[64];
static int shared_count;

bool emu_traffic_on(void) { return on; }

/* ---- a table of counters that is emptied by a new stamp -------------------------------------- */

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 31)) * 0x9fb21c651e98df25u;
    return x ^ (x >> 28);
}

static struct cell *find_cell(struct cell *cells, size_t size, uint64_t key)
{
    size_t i = (size_t)mix(key) & (size - 1);
    while (cells[i].stamp == stamp && cells[i].key != key) i = (i + 1) & (size - 1);
    return &cells[i];
}

/* The counter of the key before, and one more from now on. */
static uint32_t count_one(struct cell **cells, size_t *size, size_t *used, uint64_t key)
{
    if (2 * *used >= *size) {
        size_t larger = *size > 0 ? 2 * *size : 4096;
        struct cell *fresh = calloc(larger, sizeof *fresh);
        if (fresh == NULL) abort();
        for (size_t i = 0; i < *size; i++) {
            if ((*cells)[i].stamp == stamp)
                *find_cell(fresh, larger, (*cells)[i].key) = (*cells)[i];
        }
        free(*cells);
        *cells = fresh;
        *size = larger;
    }
    struct cell *c = find_cell(*cells, *size, key);
    if (c->stamp != stamp) {
        c->stamp = stamp;
        c->key = key;
        c->count = 0;
        ++*used;
    }
    return c->count++;
}

/* ---- kernels and blocks ---------------------------------------------------------------------- */

static void print_table(void)
{
    const char *path = emu_option("MOE_EMULATION_TRAFFIC");
    FILE *f = path != NULL ? fopen(path, "w") : NULL;
    if (f == NULL) return;
    fprintf(f, "%-48s %8s %14s %14s %14s %14s %14s %14s\n", "kernel", "launches", "bytes read",
            "written", "sectors read", "written", "distinct read", "written");
    for (int i = 0; i < table_count; i++) {
        const struct emu_traffic *t = &table[i];
        fprintf(f, "%-48s %8llu %14llu %14llu %14llu %14llu %14llu %14llu\n", t->kernel,
                (unsigned long long)t->launches, (unsigned long long)t->bytes_read,
                (unsigned long long)t->bytes_written, (unsigned long long)t->sectors_read,
                (unsigned long long)t->sectors_written, (unsigned long long)t->distinct_read,
                (unsigned long long)t->distinct_written);
    }
    fclose(f);
}

void emu_traffic_start(void)
{
    on = true;
    atexit(print_table);
}

void emu_traffic_begin(const struct emu_run *run)
{
    if (!on) return;
    launch_number++;
    for (now = table; now < table + table_count && now->kernel != run->kernel->name; now++) {}
    if (now == table + KERNELS) abort();
    if (now == table + table_count) {
        memset(now, 0, sizeof *now);
        now->kernel = run->kernel->name;
        table_count++;
    }
    now->launches++;
}

void emu_traffic_end(void) { now = NULL; }

void emu_traffic_block(void)
{
    stamp++;
    often.used = touched.used = 0;
    if (now == NULL) return;
    for (int i = 0; i < shared_count; i++) free(shared_array[i].written);
    shared_count = 0;
}

void emu_traffic_shared(const void *p, size_t bytes)
{
    if (!on || shared_count == 64) return;
    shared_array[shared_count].begin = p;
    shared_array[shared_count].bytes = bytes;
    shared_array[shared_count++].written = calloc(bytes, 1);
}

/* ---- accesses -------------------------------------------------------------------------------- */

static void bad_access(const char *what, const void *p, size_t bytes, bool write)
{
    emu_mistake("%s: %s: %s of %zu bytes at %p", what, emu_where(), write ? "write" : "read", bytes,
                p);
    emu_give_up();
}

static void check_written(unsigned char *written, size_t bytes, bool write, const void *p,
                          const char *what)
{
    if (write) {
        memset(written, 1, bytes);
        return;
    }
    for (size_t i = 0; i < bytes; i++) {
        if (!written[i]) bad_access(what, p, bytes, false);
    }
}

/* Where the host may have written too there are no marks of it: what no device wrote and has the
 * pattern of fresh memory from end to end is what nobody wrote. A byte alone may be a number. */
static bool is_fresh(const unsigned char *p) { return *p == ((uintptr_t)p & 1 ? 0xff : 0xe5); }

static void check_managed(unsigned char *written, size_t bytes, bool write, const unsigned char *p)
{
    size_t fresh = 0;
    for (size_t i = 0; i < bytes && !write; i++) fresh += !written[i] && is_fresh(p + i);
    if (write) memset(written, 1, bytes);
    if (fresh == bytes && bytes > 1)
        bad_access("read of managed memory that nobody wrote", p, bytes, false);
}

static bool shared_access(const unsigned char *p, size_t bytes, bool write)
{
    for (int i = 0; i < shared_count; i++) {
        size_t at = (size_t)(p - shared_array[i].begin);
        if (p < shared_array[i].begin || at + bytes > shared_array[i].bytes) continue;
        check_written(shared_array[i].written + at, bytes, write, p,
                      "read of shared memory that nobody wrote");
        return true;
    }
    return false;
}

static void count_sectors(const struct emu_allocation *a, const unsigned char *p, size_t bytes,
                          bool write, const void *pc)
{
    unsigned t = emu_at.thread.x +
                 emu_at.block_dim.x * (emu_at.thread.y + emu_at.block_dim.y * emu_at.thread.z);
    uint64_t site = mix((uint64_t)(uintptr_t)pc);
    uint32_t n = count_one(&often.cells, &often.size, &often.used, site ^ ((uint64_t)t << 40));
    uint64_t group = mix(site + n) ^ ((uint64_t)(t / EMU_WARP) << 48);
    uint64_t first = (uintptr_t)p / 32, last = ((uintptr_t)p + bytes - 1) / 32;
    uint32_t *by = write ? a->written_by : a->read_by;
    for (uint64_t s = first; s <= last; s++) {
        if (count_one(&touched.cells, &touched.size, &touched.used, mix(group + s)) == 0) {
            *(write ? &now->sectors_written : &now->sectors_read) += 1;
        }
        size_t i = (size_t)(s - (uintptr_t)a->begin / 32);
        if (by == NULL || by[i] == launch_number) continue;
        by[i] = launch_number;
        *(write ? &now->distinct_written : &now->distinct_read) += 1;
    }
}

/* A page of the host that was found once is remembered: asking for it is a system call. */
static bool readable_host(const void *p)
{
    static uintptr_t pages[256];
    uintptr_t page = (uintptr_t)p >> 12;
    if (pages[page & 255] == page) return true;
    if (!emu_is_host_memory(p)) return false;
    pages[page & 255] = page;
    return true;
}

/* Constants and the emulator's own variables are neither memory of the device nor a mistake. */
void emu_traffic_access(const void *p, size_t bytes, int write, const void *pc)
{
    if (now == NULL || emu_on_stack(p) || shared_access(p, bytes, write != 0)) return;
    struct emu_allocation *a = emu_find(p);
    if (a == NULL && write != 0) bad_access("write outside of device memory", p, bytes, true);
    if (a == NULL && !readable_host(p)) bad_access("read outside of all memory", p, bytes, false);
    if (a == NULL) return;
    if (emu_range_fault(p, bytes) != NULL) bad_access("overrun", p, bytes, write != 0);
    *(write != 0 ? &now->bytes_written : &now->bytes_read) += bytes;
    if (a->written != NULL && a->place == EMU_DEVICE) {
        check_written(a->written + ((const unsigned char *)p - a->begin), bytes, write != 0, p,
                      "read of device memory that nobody wrote");
    }
    if (a->written != NULL && a->place == EMU_MANAGED) {
        check_managed(a->written + ((const unsigned char *)p - a->begin), bytes, write != 0, p);
    }
    count_sectors(a, p, bytes, write != 0, pc);
}

void emu_mark_written(const void *p, size_t bytes)
{
    struct emu_allocation *a = on ? emu_find(p) : NULL;
    if (a != NULL && a->written != NULL) {
        memset(a->written + ((const unsigned char *)p - a->begin), 1, bytes);
    }
}

void emu_copy_written(const void *to, const void *from, size_t bytes)
{
    struct emu_allocation *a = on ? emu_find(to) : NULL, *b = on ? emu_find(from) : NULL;
    if (a == NULL || a->written == NULL) return;
    unsigned char *out = a->written + ((const unsigned char *)to - a->begin);
    if (b != NULL && b->written != NULL && b->place == EMU_DEVICE) {
        memmove(out, b->written + ((const unsigned char *)from - b->begin), bytes);
    } else if (b != NULL && b->written != NULL && b->place == EMU_MANAGED) {
        const unsigned char *mark = b->written + ((const unsigned char *)from - b->begin);
        for (size_t i = 0; i < bytes; i++)
            out[i] = mark[i] || !is_fresh((const unsigned char *)from + i);
    } else {
        memset(out, 1, bytes);
    }
}

void emu_traffic_reset(void)
{
    emu_lock();
    table_count = 0;
    emu_unlock();
}

int emu_traffic(size_t index, struct emu_traffic *out)
{
    if (index >= (size_t)table_count) return 0;
    *out = table[index];
    return 1;
}
