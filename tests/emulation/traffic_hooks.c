/* traffic_hooks.c - the functions behind -fsanitize=thread in the traffic flavour.
 *
 * The compiler puts a call before each access of a kernel; here it counts. A kernel's atomics
 * become calls too, which have to do the operation: one thread runs at a time, so plainly. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void emu_traffic_start(void);
void emu_traffic_access(const void *p, size_t bytes, int write, const void *pc);

#define HERE __builtin_return_address(0)

#define ACCESS(n)                                                                  \
    void __tsan_read##n(void *p) { emu_traffic_access(p, n, 0, HERE); }            \
    void __tsan_write##n(void *p) { emu_traffic_access(p, n, 1, HERE); }           \
    void __tsan_unaligned_read##n(void *p) { emu_traffic_access(p, n, 0, HERE); }  \
    void __tsan_unaligned_write##n(void *p) { emu_traffic_access(p, n, 1, HERE); } \
    void __tsan_volatile_read##n(void *p) { emu_traffic_access(p, n, 0, HERE); }   \
    void __tsan_volatile_write##n(void *p) { emu_traffic_access(p, n, 1, HERE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

void __tsan_read_range(void *p, size_t bytes) { emu_traffic_access(p, bytes, 0, HERE); }
void __tsan_write_range(void *p, size_t bytes) { emu_traffic_access(p, bytes, 1, HERE); }
void __tsan_func_entry(void *pc) { (void)pc; }
void __tsan_func_exit(void) {}
void __tsan_vptr_update(void **p, void *v) { (void)p, (void)v; }
void __tsan_vptr_read(void **p) { (void)p; }

/* The constructor of every instrumented object calls it, before main. */
void __tsan_init(void)
{
    static bool started;
    if (!started) emu_traffic_start();
    started = true;
}

#define ATOMIC(bits, type)                                                                         \
    type __tsan_atomic##bits##_load(const type *p, int order)                                      \
    {                                                                                              \
        (void)order;                                                                               \
        emu_traffic_access(p, sizeof *p, 0, HERE);                                                 \
        return *p;                                                                                 \
    }                                                                                              \
    void __tsan_atomic##bits##_store(type *p, type v, int order)                                   \
    {                                                                                              \
        (void)order;                                                                               \
        emu_traffic_access(p, sizeof *p, 1, HERE);                                                 \
        *p = v;                                                                                    \
    }                                                                                              \
    type __tsan_atomic##bits##_fetch_add(type *p, type v, int order)                               \
    {                                                                                              \
        type old = *p;                                                                             \
        (void)order;                                                                               \
        emu_traffic_access(p, sizeof *p, 0, HERE);                                                 \
        emu_traffic_access(p, sizeof *p, 1, HERE);                                                 \
        *p = (type)(old + v);                                                                      \
        return old;                                                                                \
    }                                                                                              \
    bool __tsan_atomic##bits##_compare_exchange_strong(type *p, type *expected, type v, int order, \
                                                       int failed)                                 \
    {                                                                                              \
        (void)order;                                                                               \
        (void)failed;                                                                              \
        emu_traffic_access(p, sizeof *p, 0, HERE);                                                 \
        bool same = *p == *expected;                                                               \
        if (!same) *expected = *p;                                                                 \
        if (same) emu_traffic_access(p, sizeof *p, 1, HERE);                                       \
        if (same) *p = v;                                                                          \
        return same;                                                                               \
    }                                                                                              \
    type __tsan_atomic##bits##_compare_exchange_val(type *p, type expected, type v, int order,     \
                                                    int failed)                                    \
    {                                                                                              \
        __tsan_atomic##bits##_compare_exchange_strong(p, &expected, v, order, failed);             \
        return expected;                                                                           \
    }
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
