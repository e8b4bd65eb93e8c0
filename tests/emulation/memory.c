/* memory.c - device, pinned and managed memory: one arena each, red zones, who may touch what.
 *
 * An allocation has pages of its own, with red zones around the bytes the caller gets, and its
 * addresses come again at last only: freed pages stay inaccessible, so a use after free is a
 * fault. Pages of device memory are inaccessible also while host code runs (emu_memory_open opens
 * them for kernels and copies), and the handler of SIGSEGV says whose memory was touched. */
#include "internal.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma weak __asan_poison_memory_region
#pragma weak __asan_unpoison_memory_region
void __asan_poison_memory_region(const volatile void *p, size_t bytes);
void __asan_unpoison_memory_region(const volatile void *p, size_t bytes);

enum { ZONE = 256, PAGE = 4096, PATTERN = 0xffe5 };
#define RESERVED ((size_t)64 << 30)

struct arena {
    unsigned char *base;
    size_t used, live;            /* bytes of addresses, bytes that are not freed */
    struct emu_allocation **list; /* by address, for addresses only grow */
    size_t count, room, first;    /* all before the first are freed */
};

static struct arena device_arena[EMU_DEVICES], pinned_arena, managed_arena;
static struct emu_allocation **registered;
static size_t registered_count;
static int opened;
static bool shut = true; /* the pages are inaccessible */
static struct sigaction before;

/* ---- patterns and poison --------------------------------------------------------------------- */

/* By address, so that a part of a filled range looks filled. */
void emu_fill(void *p, size_t bytes)
{
    unsigned char *c = p;
    for (; bytes > 0 && ((uintptr_t)c & 1) != 0; bytes--) *c++ = PATTERN >> 8;
    uint16_t *w = (uint16_t *)(void *)c;
    for (size_t i = 0; i < bytes / 2; i++) w[i] = PATTERN;
    if ((bytes & 1) != 0) c[bytes - 1] = PATTERN & 0xff;
}

void emu_poison(const void *p, size_t bytes)
{
    if (__asan_poison_memory_region != NULL) __asan_poison_memory_region(p, bytes);
}

void emu_unpoison(const void *p, size_t bytes)
{
    if (__asan_unpoison_memory_region != NULL) __asan_unpoison_memory_region(p, bytes);
}

/* ---- finding --------------------------------------------------------------------------------- */

static struct arena *arena_of(const void *address)
{
    uintptr_t a = (uintptr_t)address;
    for (int d = 0; d < EMU_DEVICES + 2; d++) {
        struct arena *arena = d < EMU_DEVICES    ? &device_arena[d]
                              : d == EMU_DEVICES ? &pinned_arena
                                                 : &managed_arena;
        if (arena->base != NULL && a - (uintptr_t)arena->base < RESERVED) return arena;
    }
    return NULL;
}

static struct emu_allocation *find_registered(const void *address)
{
    for (size_t i = 0; i < registered_count; i++) {
        struct emu_allocation *a = registered[i];
        if ((uintptr_t)address - (uintptr_t)a->begin < a->bytes) return a;
    }
    return NULL;
}

struct emu_allocation *emu_find(const void *address)
{
    struct arena *arena = arena_of(address);
    if (arena == NULL) return find_registered(address);
    size_t low = 0, high = arena->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (arena->list[middle]->pages <= (const unsigned char *)address)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0) return NULL;
    struct emu_allocation *a = arena->list[low - 1];
    return (const unsigned char *)address < a->pages + a->page_bytes ? a : NULL;
}

enum emu_place emu_place_of(const void *address)
{
    struct emu_allocation *a = emu_find(address);
    return a != NULL ? a->place : EMU_PAGEABLE;
}

const char *emu_range_fault(const void *p, size_t bytes)
{
    static char text[256];
    const struct emu_allocation *a = emu_find(p);
    const unsigned char *c = p;
    if (a == NULL) return "not an address of CUDA's";
    if (!a->freed && c >= a->begin && c + bytes <= a->begin + a->bytes) return NULL;
    snprintf(text, sizeof text, "%s: %zu bytes from %p, the allocation is %zu bytes from %p",
             a->freed ? "freed memory" : "out of bounds", bytes, p, a->bytes, (void *)a->begin);
    return text;
}

/* Mapped, and not ours. Small numbers are no addresses. */
bool emu_is_host_memory(const void *p)
{
    unsigned char present;
    uintptr_t a = (uintptr_t)p;
    /* Below are no stacks and heaps, but two small numbers side by side, and sanitizers' shadows. */
    if (a < (uintptr_t)1 << 40 || a >= (uintptr_t)1 << 47 || arena_of(p) != NULL) return false;
    if (find_registered(p) != NULL) return false;
    return mincore((void *)(a & ~(uintptr_t)(PAGE - 1)), 1, &present) == 0;
}

/* ---- faults ---------------------------------------------------------------------------------- */

static void say(const char *text)
{
    ssize_t written = write(STDERR_FILENO, text, strlen(text));
    (void)written;
}

/* After the message the fault happens again, under whoever handled it before: nobody, or a
 * sanitizer. */
static void on_fault(int number, siginfo_t *info, void *context)
{
    const struct emu_allocation *a = emu_find(info->si_addr);
    const char *where = emu_where();
    char text[1024];
    static int times;
    (void)context;
    if (times++ > 0) _exit(128 + number);
    if (arena_of(info->si_addr) != NULL) {
        snprintf(text, sizeof text,
                 "emulation: %s touched %s memory at %p (%zd in %zu bytes), seed %llu\n",
                 where != NULL ? where : "host code",
                 a == NULL  ? "unallocated device"
                 : a->freed ? "freed device"
                            : "device",
                 info->si_addr, a != NULL ? (unsigned char *)info->si_addr - a->begin : 0,
                 a != NULL ? a->bytes : 0, (unsigned long long)emu_seed());
        say(text);
    } else if (where != NULL) {
        snprintf(text, sizeof text, "emulation: %s faulted at %p, seed %llu\n", where,
                 info->si_addr, (unsigned long long)emu_seed());
        say(text);
    }
    sigaction(number, &before, NULL);
}

static void watch_faults(void)
{
    static bool watching;
    struct sigaction action = {0};
    if (watching) return;
    watching = true;
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before);
}

/* ---- allocations ----------------------------------------------------------------------------- */

/* By system call: the sanitizers need not know of so large a reservation. */
static bool reserve(struct arena *arena)
{
    if (arena->base != NULL) return true;
    long p = syscall(SYS_mmap, NULL, RESERVED, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == -1) return false;
    arena->base = (unsigned char *)p;
    watch_faults();
    return true;
}

static size_t memory_limit(void)
{
    const char *option = emu_option("MOE_EMULATION_MEMORY");
    return option != NULL ? strtoull(option, NULL, 0) : (size_t)4 << 30;
}

static struct emu_allocation *append(struct arena *arena)
{
    if (arena->count == arena->room) {
        size_t room = arena->room > 0 ? 2 * arena->room : 64;
        struct emu_allocation **list = realloc(arena->list, room * sizeof *list);
        if (list == NULL) return NULL;
        arena->list = list;
        arena->room = room;
    }
    struct emu_allocation *a = calloc(1, sizeof *a);
    if (a != NULL) arena->list[arena->count++] = a;
    return a;
}

/* Addresses come again only when half of them are used up and nothing is left. */
static void start_anew(struct arena *arena)
{
    if (arena->first < arena->count || arena->used < RESERVED / 2) return;
    for (size_t i = 0; i < arena->count; i++) free(arena->list[i]);
    arena->count = arena->first = arena->used = 0;
}

void *emu_allocate(enum emu_place place, int device, size_t bytes)
{
    struct arena *arena = place == EMU_DEVICE   ? &device_arena[device]
                          : place == EMU_PINNED ? &pinned_arena
                                                : &managed_arena;
    start_anew(arena);
    if (!reserve(arena) || bytes > memory_limit() || arena->live + bytes > memory_limit())
        return NULL;
    size_t all = (bytes + 2 * ZONE + PAGE - 1) & ~(size_t)(PAGE - 1);
    if (arena->used + all > RESERVED) return NULL;
    struct emu_allocation *a = append(arena);
    if (a == NULL) return NULL;
    a->pages = arena->base + arena->used;
    a->page_bytes = all;
    a->begin = a->pages + ZONE;
    a->bytes = bytes;
    a->place = place;
    a->device = device;
    arena->used += all;
    arena->live += bytes;
    mprotect(a->pages, all, PROT_READ | PROT_WRITE);
    emu_fill(a->pages, all);
    emu_unpoison(a->pages, all);
    emu_poison(a->pages, ZONE);
    emu_poison(a->begin + bytes, (size_t)(a->pages + all - a->begin) - bytes);
    if (emu_traffic_on()) {
        a->written = calloc(bytes + 1, 1);
        a->read_by = calloc(bytes / 32 + 2, sizeof *a->read_by);
        a->written_by = calloc(bytes / 32 + 2, sizeof *a->written_by);
    }
    if (place == EMU_DEVICE && shut) mprotect(a->pages, all, PROT_NONE);
    return a->begin;
}

void emu_release(struct emu_allocation *a)
{
    struct arena *arena = arena_of(a->begin);
    a->freed = true;
    arena->live -= a->bytes;
    while (arena->first < arena->count && arena->list[arena->first]->freed) arena->first++;
    madvise(a->pages, a->page_bytes, MADV_DONTNEED);
    mprotect(a->pages, a->page_bytes, PROT_NONE);
    free(a->written);
    free(a->read_by);
    free(a->written_by);
    a->written = NULL;
    a->read_by = a->written_by = NULL;
}

size_t emu_allocated(int device) { return device_arena[device].live; }

size_t emu_live_allocations(int pinned)
{
    size_t live = 0;
    for (int d = 0; d < EMU_DEVICES + 1; d++) {
        const struct arena *arena = pinned             ? &pinned_arena
                                    : d == EMU_DEVICES ? &managed_arena
                                                       : &device_arena[d];
        if (pinned && d > 0) break;
        for (size_t i = 0; i < arena->count; i++) live += !arena->list[i]->freed;
    }
    return live;
}

bool emu_register_host(void *p, size_t bytes)
{
    struct emu_allocation **list = realloc(registered, (registered_count + 1) * sizeof *list);
    struct emu_allocation *a = calloc(1, sizeof *a);
    if (list != NULL) registered = list;
    if (list == NULL || a == NULL) {
        free(a);
        return false;
    }
    a->begin = a->pages = p;
    a->bytes = a->page_bytes = bytes;
    a->place = EMU_PINNED;
    registered[registered_count++] = a;
    return true;
}

bool emu_unregister_host(void *p)
{
    for (size_t i = 0; i < registered_count; i++) {
        if (registered[i]->begin != p) continue;
        free(registered[i]);
        registered[i] = registered[--registered_count];
        return true;
    }
    return false;
}

/* ---- who may touch device memory ------------------------------------------------------------- */

/* Live allocations that lie together are changed together. */
static void protect(struct arena *arena, int protection)
{
    for (size_t i = arena->first; i < arena->count;) {
        size_t bytes = 0, first = i;
        for (; i < arena->count && !arena->list[i]->freed; i++) bytes += arena->list[i]->page_bytes;
        if (bytes > 0) mprotect(arena->list[first]->pages, bytes, protection);
        while (i < arena->count && arena->list[i]->freed) i++;
    }
}

static void protect_all(int protection)
{
    for (int d = 0; d < EMU_DEVICES; d++) protect(&device_arena[d], protection);
    shut = protection == PROT_NONE;
}

/* The kernel takes time for each page, so of much memory it is shut now and then only: host code
 * that touches it does so again. MOE_EMULATION_PROTECT=1 shuts it always, =0 never. */
static bool shall_shut(void)
{
    const char *option = emu_option("MOE_EMULATION_PROTECT");
    size_t live = 0;
    if (option != NULL) return option[0] != '0';
    for (int d = 0; d < EMU_DEVICES; d++) live += device_arena[d].live;
    return emu_coin((uint32_t)(live >> 20) + 1);
}

void emu_memory_open(void)
{
    if (opened++ == 0 && shut) protect_all(PROT_READ | PROT_WRITE);
}

void emu_memory_close(void)
{
    if (--opened == 0 && shall_shut()) protect_all(PROT_NONE);
}

int emu_memory_suspend(void)
{
    int kept = opened;
    if (opened > 0 && shall_shut()) protect_all(PROT_NONE);
    opened = 0;
    return kept;
}

void emu_memory_resume(int kept)
{
    opened = kept;
    if (opened > 0 && shut) protect_all(PROT_READ | PROT_WRITE);
}

/* Not memcmp: AddressSanitizer's looks at red zones. */
bool emu_untouched(const void *p, size_t bytes)
{
    const unsigned char *c = p, *end = c + bytes;
    uint64_t word;
    for (; c < end && ((uintptr_t)c & 7) != 0; c++) {
        if (*c != (((uintptr_t)c & 1) != 0 ? PATTERN >> 8 : PATTERN & 0xff)) return false;
    }
    for (; end - c >= 8; c += 8) {
        __builtin_memcpy(&word, c, sizeof word);
        if (word != (uint64_t)PATTERN * 0x0001000100010001u) return false;
    }
    for (; c < end; c++) {
        if (*c != (((uintptr_t)c & 1) != 0 ? PATTERN >> 8 : PATTERN & 0xff)) return false;
    }
    return true;
}

static bool zones_kept(const struct emu_allocation *a)
{
    return emu_untouched(a->pages, ZONE) && emu_untouched(a->begin + a->bytes, ZONE);
}

void emu_check_red_zones(const char *what)
{
    for (int d = 0; d < EMU_DEVICES + 2; d++) {
        const struct arena *arena = d < EMU_DEVICES    ? &device_arena[d]
                                    : d == EMU_DEVICES ? &pinned_arena
                                                       : &managed_arena;
        for (size_t i = arena->first; i < arena->count; i++) {
            const struct emu_allocation *a = arena->list[i];
            if (a->freed || zones_kept(a)) continue;
            emu_mistake("overrun: %s wrote beside an allocation of %zu bytes at %p", what, a->bytes,
                        (void *)a->begin);
            emu_fill(a->pages, ZONE);
            emu_fill(a->begin + a->bytes, ZONE);
        }
    }
}
