/* shared.c - the shared memory of a block: an arena that is filled with a pattern for each block.
 *
 * Arrays lie between red zones, which AddressSanitizer watches where the program has it and which
 * are compared when the block ends. The pattern (see emu_fill) is NaN as a number of any float type
 * and a large negative one as an integer: what a kernel reads without writing shows. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ARRAYS = 64, ZONE = 256, ARENA = EMU_SHARED_LIMIT + (ARRAYS + 1) * (ZONE + 16) + 65536 };

static struct {
    unsigned char *arena;
    struct {
        const void *key;
        unsigned char *begin;
        size_t bytes;
        const char *name;
    } array[ARRAYS];
    int count;
    size_t used, taken, allowed; /* of the arena; by arrays; by arrays at most */
    void *dynamic;
} shared;

static unsigned char *take(const void *key, size_t bytes, const char *name)
{
    unsigned char *p = shared.arena + shared.used + ZONE;
    size_t padded = (bytes + 15) & ~(size_t)15;
    shared.taken += padded;
    if (shared.taken > shared.allowed || shared.count == ARRAYS) {
        emu_mistake("too much shared memory: %s: %zu bytes with %s, allowed are %zu", emu_where(),
                    shared.taken, name, shared.allowed);
        emu_give_up();
    }
    emu_unpoison(p - ZONE, padded + 2 * ZONE);
    emu_fill(p - ZONE, padded + 2 * ZONE);
    emu_poison(p - ZONE, ZONE);
    emu_poison(p + bytes, padded - bytes + ZONE);
    shared.used += padded + ZONE;
    shared.array[shared.count].key = key;
    shared.array[shared.count].begin = p;
    shared.array[shared.count].bytes = bytes;
    shared.array[shared.count++].name = name;
    emu_traffic_shared(p, bytes);
    return p;
}

void emu_shared_begin(size_t dynamic, size_t allowed)
{
    if (shared.arena == NULL) {
        shared.arena = mmap(NULL, ARENA, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (shared.arena == MAP_FAILED) abort();
    }
    if (shared.used > 0) emu_forget(shared.arena, (shared.used + 2 * ZONE + 4095) & ~4095ul);
    shared.count = 0;
    shared.used = shared.taken = 0;
    shared.allowed = allowed;
    shared.dynamic = dynamic > 0 ? take(&shared, dynamic, "the dynamic memory") : NULL;
}

void emu_shared_end(void)
{
    for (int i = 0; i < shared.count; i++) {
        unsigned char *end = shared.array[i].begin + shared.array[i].bytes;
        emu_unpoison(shared.array[i].begin - ZONE, shared.array[i].bytes + 2 * ZONE);
        if (emu_untouched(end, ZONE - 16) && emu_untouched(shared.array[i].begin - ZONE, ZONE))
            continue;
        emu_mistake("shared memory overrun: %s: beside %s of %zu bytes", emu_where(),
                    shared.array[i].name, shared.array[i].bytes);
    }
}

bool emu_in_shared(const void *p, size_t bytes)
{
    const unsigned char *c = p;
    for (int i = 0; i < shared.count; i++) {
        const unsigned char *begin = shared.array[i].begin;
        if (c >= begin && c + bytes <= begin + shared.array[i].bytes) return true;
    }
    return false;
}

void *emu_shared(const void *key, size_t bytes, const char *name)
{
    for (int i = 0; i < shared.count; i++) {
        if (shared.array[i].key == key) return shared.array[i].begin;
    }
    return take(key, bytes, name);
}

void *emu_shared_dynamic(void)
{
    if (shared.dynamic == NULL) {
        emu_mistake("no dynamic shared memory: %s: the launch gave none", emu_where());
        emu_give_up();
    }
    return shared.dynamic;
}
