/* fiber.c - switching between the threads of a block: stacks, the switch itself, sanitizer hooks.
 *
 * On x86-64 the switch is a few instructions, for ucontext's saves the signal mask with a system
 * call each time; elsewhere it is ucontext. This library is compiled without sanitizers and finds
 * their hooks, when the program has them, as weak symbols. Under ThreadSanitizer a switch orders
 * nothing: only barriers do, so that it finds the races of a kernel. */
#include "internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#pragma weak __sanitizer_start_switch_fiber
#pragma weak __sanitizer_finish_switch_fiber
#pragma weak __asan_unpoison_memory_region
#pragma weak __tsan_create_fiber
#pragma weak __tsan_destroy_fiber
#pragma weak __tsan_get_current_fiber
#pragma weak __tsan_switch_to_fiber
#pragma weak __tsan_acquire
#pragma weak __tsan_release
#pragma weak __tsan_atomic32_load
#pragma weak __tsan_atomic32_store
#pragma weak __tsan_atomic64_load
#pragma weak __tsan_atomic64_store
void __sanitizer_start_switch_fiber(void **fake, const void *bottom, size_t size);
void __sanitizer_finish_switch_fiber(void *fake, const void **bottom, size_t *size);
void __asan_unpoison_memory_region(const volatile void *p, size_t bytes);
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *fiber);
void *__tsan_get_current_fiber(void);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *p);
void __tsan_release(void *p);
uint32_t __tsan_atomic32_load(const volatile uint32_t *p, int order);
void __tsan_atomic32_store(volatile uint32_t *p, uint32_t v, int order);
uint64_t __tsan_atomic64_load(const volatile uint64_t *p, int order);
void __tsan_atomic64_store(volatile uint64_t *p, uint64_t v, int order);

enum { STACK_BYTES = 256 * 1024, GUARD_BYTES = 4096, NO_SYNC = 1 };

static struct emu_fiber fibers[EMU_THREADS];
static struct emu_fiber *running, *previous;

bool emu_threads_sanitized(void) { return __tsan_create_fiber != NULL; }

void emu_acquire(void *p)
{
    if (__tsan_acquire != NULL) __tsan_acquire(p);
}

void emu_release_to(void *p)
{
    if (__tsan_release != NULL) __tsan_release(p);
}

/* A fresh mapping is what ThreadSanitizer takes for memory that nobody has touched. */
void emu_forget(void *p, size_t bytes)
{
    if (emu_threads_sanitized()) {
        mmap(p, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    }
}

/* ThreadSanitizer is told, so that it still finds who reads the word without an atomic. */
#define COPY_WORD(bits)                                                                      \
    static void copy_word##bits(uint##bits##_t *to, const uint##bits##_t *from)              \
    {                                                                                        \
        if (emu_threads_sanitized()) {                                                       \
            uint##bits##_t word = __tsan_atomic##bits##_load(from, __ATOMIC_RELAXED);        \
            __tsan_atomic##bits##_store(to, word, __ATOMIC_RELAXED);                         \
        } else {                                                                             \
            __atomic_store_n(to, __atomic_load_n(from, __ATOMIC_RELAXED), __ATOMIC_RELAXED); \
        }                                                                                    \
    }
COPY_WORD(32)
COPY_WORD(64)

void emu_copy_word(void *to, const void *from, size_t bytes)
{
    if (bytes == sizeof(uint32_t))
        copy_word32(to, from);
    else
        copy_word64(to, from);
}

/* ---- the switch ------------------------------------------------------------------------------ */

#if defined(__x86_64__)
void emu_switch_stack(void **save, void *to);
__asm__(".text\n"
        ".globl emu_switch_stack\n"
        ".hidden emu_switch_stack\n"
        ".type emu_switch_stack, @function\n"
        "emu_switch_stack:\n"
        "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n"
        "    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n"
        "    popq %rbp\n"
        "    ret\n"
        ".size emu_switch_stack, .-emu_switch_stack\n");

/* Six registers, the address that the switch returns to, and a return address of 0 above it, where
 * a call would have left the stack: 8 past a multiple of 16. */
static void prepare(struct emu_fiber *f)
{
    void **top = (void **)(f->stack + f->stack_bytes - 24);
    top[0] = top[1] = NULL;
    void **p = top - 7;
    memset(p, 0, 7 * sizeof *p);
    p[6] = (void *)f->main;
    f->stack_pointer = p;
}

static void change(struct emu_fiber *from, struct emu_fiber *to)
{
    emu_switch_stack(&from->stack_pointer, to->stack_pointer);
}
#else
static void prepare(struct emu_fiber *f)
{
    if (f->context == NULL) f->context = malloc(sizeof(ucontext_t));
    ucontext_t *c = f->context;
    getcontext(c);
    c->uc_stack.ss_sp = f->stack;
    c->uc_stack.ss_size = f->stack_bytes;
    c->uc_link = NULL;
    makecontext(c, f->main, 0);
}

static void change(struct emu_fiber *from, struct emu_fiber *to)
{
    if (from->context == NULL) from->context = malloc(sizeof(ucontext_t));
    swapcontext(from->context, to->context);
}
#endif

/* ---- fibers ---------------------------------------------------------------------------------- */

static void make(struct emu_fiber *f)
{
    unsigned char *p = mmap(NULL, STACK_BYTES + GUARD_BYTES, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    mprotect(p, GUARD_BYTES, PROT_NONE);
    f->stack = p + GUARD_BYTES;
    f->stack_bytes = STACK_BYTES;
}

/* ThreadSanitizer orders a fiber after what made it, so the host makes them all. */
void emu_fibers_prepare(int count)
{
    for (int i = 0; emu_threads_sanitized() && i < count; i++) {
        if (fibers[i].tsan == NULL) fibers[i].tsan = __tsan_create_fiber(0);
    }
}

struct emu_fiber *emu_fiber_get(int index, void (*main)(void))
{
    struct emu_fiber *f = &fibers[index];
    if (f->stack == NULL) make(f);
    f->main = main;
    f->asan = NULL;
    prepare(f);
    return f;
}

void emu_fiber_host(struct emu_fiber *host)
{
    host->stack = NULL;
    host->stack_bytes = 0;
    host->tsan = host->asan = NULL;
    if (emu_threads_sanitized()) host->tsan = __tsan_get_current_fiber();
    running = host;
}

struct emu_fiber *emu_fiber_enter(void)
{
    const void *bottom = NULL;
    size_t size = 0;
    if (__sanitizer_finish_switch_fiber == NULL) return running;
    __sanitizer_finish_switch_fiber(running->asan, &bottom, &size);
    if (previous->stack == NULL) {
        previous->stack = (unsigned char *)bottom;
        previous->stack_bytes = size;
    }
    return running;
}

void emu_fiber_switch(struct emu_fiber *from, struct emu_fiber *to)
{
    previous = from;
    running = to;
    if (__sanitizer_start_switch_fiber != NULL) {
        __sanitizer_start_switch_fiber(&from->asan, to->stack, to->stack_bytes);
    }
    if (emu_threads_sanitized()) __tsan_switch_to_fiber(to->tsan, NO_SYNC);
    change(from, to);
    emu_fiber_enter();
}

/* What is on their stacks is given up: AddressSanitizer's marks there, and ThreadSanitizer's idea
 * of which functions they are in. */
void emu_fibers_abandon(int count)
{
    for (int i = 0; i < count; i++) {
        struct emu_fiber *f = &fibers[i];
        if (f->stack == NULL) continue;
        if (__asan_unpoison_memory_region != NULL) {
            __asan_unpoison_memory_region(f->stack, f->stack_bytes);
        }
        if (f->tsan != NULL) __tsan_destroy_fiber(f->tsan);
        f->tsan = NULL;
    }
}

bool emu_on_stack(const void *p)
{
    const unsigned char *c = p;
    return running != NULL && running->stack != NULL && c >= running->stack &&
           c < running->stack + running->stack_bytes;
}
