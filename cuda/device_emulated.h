/* device_emulated.h - the kernel language for a C++ compiler: kernels become plain functions whose
 * threads the emulator of tests/emulation runs. Included by device.h only, which describes it.
 *
 * A kernel's symbol carries an ABI tag, "kernel_" and the bound on its threads: by that tag the
 * emulator finds the names of all kernels of a program, template instances included. The bound is
 * therefore a number or a macro that is one. Barriers and shuffles pass on the line they are on,
 * for the messages and to tell a barrier from another. */
#ifndef MOE_CUDA_DEVICE_EMULATED_H
#define MOE_CUDA_DEVICE_EMULATED_H

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include "emulator.h"

#undef MOE_FN
#define MOE_FN static inline
#define MOE_DEVICE static inline
#define MOE_HOST_DEVICE static inline
#define MOE_GLOBAL_TAG(threads) __attribute__((abi_tag("kernel_" #threads))) static void
#define MOE_GLOBAL(threads) MOE_GLOBAL_TAG(threads)

#define threadIdx (emu_at.thread)
#define blockIdx (emu_at.block)
#define blockDim (emu_at.block_dim)
#define gridDim (emu_at.grid_dim)
#define warpSize 32

/* All threads of a block ask with the same key and get the same memory. A reference to an array, so
 * that sizeof and UBSan's bounds check see the array. */
#define MOE_SHARED(type, name, count)                       \
    static const char moe_key_##name = 0;                   \
    type(&name)[count] = *reinterpret_cast<type(*)[count]>( \
        emu_shared(&moe_key_##name, sizeof(type) * (count), #name))
#define MOE_SHARED_DYNAMIC(type, name) type *const name = static_cast<type *>(emu_shared_dynamic())

#define MOE_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

MOE_DEVICE void moe_block_sync(MOE_HERE) { emu_block_sync(file, line); }
MOE_DEVICE void moe_warp_sync(MOE_HERE) { emu_warp_exchange(0, EMU_WARP_SYNC, 0, file, line); }

template <typename T> MOE_DEVICE T moe_shuffle_of(T v, int kind, int by, const char *file, int line)
{
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles are of 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    bits = emu_warp_exchange(bits, kind, by, file, line);
    memcpy(&v, &bits, sizeof v);
    return v;
}
template <typename T> MOE_DEVICE T moe_shuffle(T v, int lane, MOE_HERE)
{
    return moe_shuffle_of(v, EMU_SHUFFLE, lane, file, line);
}
template <typename T> MOE_DEVICE T moe_shuffle_xor(T v, int lane_mask, MOE_HERE)
{
    return moe_shuffle_of(v, EMU_SHUFFLE_XOR, lane_mask, file, line);
}
template <typename T> MOE_DEVICE T moe_shuffle_up(T v, int delta, MOE_HERE)
{
    return moe_shuffle_of(v, EMU_SHUFFLE_UP, delta, file, line);
}
template <typename T> MOE_DEVICE T moe_shuffle_down(T v, int delta, MOE_HERE)
{
    return moe_shuffle_of(v, EMU_SHUFFLE_DOWN, delta, file, line);
}

MOE_DEVICE uint32_t moe_ballot(bool predicate, MOE_HERE)
{
    return (uint32_t)emu_warp_exchange(predicate, EMU_BALLOT, 0, file, line);
}
MOE_DEVICE bool moe_any(bool predicate, MOE_HERE) { return moe_ballot(predicate, file, line) != 0; }
MOE_DEVICE bool moe_all(bool predicate, MOE_HERE)
{
    return moe_ballot(predicate, file, line) == 0xffffffffu;
}
MOE_DEVICE int moe_popcount(uint32_t v) { return __builtin_popcount(v); }
MOE_DEVICE int moe_clz(uint32_t v) { return v == 0 ? 32 : __builtin_clz(v); }

/* Relaxed, as on the device: they order nothing else. */
template <typename T> MOE_DEVICE T moe_atomic_larger(T *p, T v, int sign)
{
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while ((sign > 0 ? v > old : v < old) &&
           !__atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
#define MOE_ATOMIC_ADD(type)                               \
    MOE_DEVICE type moe_atomic_add(type *p, type v)        \
    {                                                      \
        return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); \
    }
MOE_ATOMIC_ADD(int32_t)
MOE_ATOMIC_ADD(uint32_t)
MOE_ATOMIC_ADD(int64_t)
MOE_DEVICE int32_t moe_atomic_max(int32_t *p, int32_t v) { return moe_atomic_larger(p, v, 1); }
MOE_DEVICE int64_t moe_atomic_max(int64_t *p, int64_t v) { return moe_atomic_larger(p, v, 1); }
MOE_DEVICE int32_t moe_atomic_min(int32_t *p, int32_t v) { return moe_atomic_larger(p, v, -1); }
MOE_DEVICE int64_t moe_atomic_min(int64_t *p, int64_t v) { return moe_atomic_larger(p, v, -1); }

/* One access of 16 bytes, not four; emulated kernels are compiled with -fno-strict-aliasing. */
typedef uint32_t moe_vector16 __attribute__((vector_size(16)));

MOE_DEVICE uint4 moe_load16(const void *p, MOE_HERE)
{
    if (((uintptr_t)p & 15u) != 0) emu_misaligned(p, file, line);
    moe_vector16 v = *static_cast<const moe_vector16 *>(p);
    uint4 bits = {v[0], v[1], v[2], v[3]};
    return bits;
}
MOE_DEVICE void moe_store16(void *p, uint4 v, MOE_HERE)
{
    if (((uintptr_t)p & 15u) != 0) emu_misaligned(p, file, line);
    *static_cast<moe_vector16 *>(p) = moe_vector16{v.x, v.y, v.z, v.w};
}

/* ---- launches -------------------------------------------------------------------------------- */

template <typename T> struct moe_same {
    typedef T type;
};

template <typename T> struct moe_is_pointer {
    static const int value = __is_class(T) ? EMU_ARGUMENT_STRUCT : EMU_ARGUMENT_SCALAR;
};
template <typename T> struct moe_is_pointer<T *> {
    static const int value = EMU_ARGUMENT_POINTER;
};

/* Bytes between the members of an argument are not looked at for addresses where the compiler can
 * clear them. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_clear_padding)
#define MOE_CLEAR_PADDING(object) __builtin_clear_padding(&(object))
#endif
#endif
#ifndef MOE_CLEAR_PADDING
#define MOE_CLEAR_PADDING(object) (void)0
#endif

/* The arguments of a launch in one block of memory that can be copied as bytes. */
template <typename... P> struct moe_arguments;
template <> struct moe_arguments<> {
    void set() {}
    void list(emu_argument *, const void *) const {}
    template <typename K, typename... A> void call(K kernel, const A &...args) const
    {
        kernel(args...);
    }
};
template <typename H, typename... P> struct moe_arguments<H, P...> {
    H head;
    moe_arguments<P...> tail;
    void set(const H &first, const P &...rest)
    {
        head = first;
        MOE_CLEAR_PADDING(head);
        tail.set(rest...);
    }
    void list(emu_argument *out, const void *base) const
    {
        out->offset = (size_t)(reinterpret_cast<const char *>(&head) -
                               static_cast<const char *>(base));
        out->bytes = sizeof(H);
        out->kind = moe_is_pointer<H>::value;
        tail.list(out + 1, base);
    }
    template <typename K, typename... A> void call(K kernel, const A &...args) const
    {
        tail.call(kernel, args..., head);
    }
};

template <typename... P> static void moe_run_thread(const void *kernel, const void *arguments)
{
    typedef void (*function)(P...);
    static_cast<const moe_arguments<P...> *>(arguments)->call(
        reinterpret_cast<function>(const_cast<void *>(kernel)));
}

template <typename... P>
static inline cudaError_t moe_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                                     cudaStream_t stream, typename moe_same<P>::type... args)
{
    moe_arguments<P...> arguments;
    emu_argument list[sizeof...(P) + 1] = {};
    memset(static_cast<void *>(&arguments), 0, sizeof arguments);
    arguments.set(args...);
    arguments.list(list, &arguments);
    emu_launch launch = {reinterpret_cast<const void *>(kernel),
                         moe_run_thread<P...>,
                         &arguments,
                         sizeof arguments,
                         list,
                         (int)sizeof...(P)};
    return emu_launch_kernel(&launch, grid, block, shared, stream);
}

template <typename... P>
static inline cudaError_t moe_kernel_allow_shared(void (*kernel)(P...), size_t bytes)
{
    return cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
}

#endif
