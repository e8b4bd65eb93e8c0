/* real.h - the element type and the instruction set of one compilation of a CPU kernel.
 *
 * Every kernel source of src/cpu is compiled once for each element type (float, double, bfloat16,
 * binary16) and each instruction set (plain C, AVX2+FMA, AVX-512). The build defines MOE_F64,
 * MOE_BF16 or MOE_F16 for all but float, and MOE_VARIANT, a suffix such as f32_avx2;
 * MOE_KERNEL(name) makes the symbol moe__cpu_<name>_<variant>. Without these macros the file is the
 * plain float variant, so that tools can parse it alone.
 *
 * `real` is what is computed with, `element` what inputs, outputs, activations and weights are
 * stored as: the same but for 16 bits, whose real is float. get() widens an element and put()
 * rounds to one. Where memory may hold either, a flag `wide` says that it holds reals; WIDE(flag)
 * is 1 where both are one. */
#ifndef MOE_CPU_REAL_H
#define MOE_CPU_REAL_H

#include <stdint.h>

#ifndef MOE_VARIANT
#if defined(MOE_F64)
#define MOE_VARIANT f64_plain
#elif defined(MOE_BF16)
#define MOE_VARIANT bf16_plain
#elif defined(MOE_F16)
#define MOE_VARIANT f16_plain
#else
#define MOE_VARIANT f32_plain
#endif
#endif

#define MOE__JOIN2(a, b, c) a##b##_##c
#define MOE__JOIN(a, b, c) MOE__JOIN2(a, b, c)
#define MOE_KERNEL(name) MOE__JOIN(moe__cpu_, name, MOE_VARIANT)

#ifdef MOE_F64
typedef double real;
#define R(literal) (literal)
#else
typedef float real;
#define R(literal) literal##f
#endif

#if defined(MOE_BF16) || defined(MOE_F16)
#include "half.h"
#define MOE_HALF 1
#define WIDE(flag) (flag)
typedef uint16_t element;
#ifdef MOE_BF16
static inline real get(element e) { return moe__from_bf16(e); }
static inline element put(real x) { return moe__to_bf16(x); }
#else
static inline real get(element e) { return moe__from_f16(e); }
static inline element put(real x) { return moe__to_f16(x); }
#endif
#else
#define WIDE(flag) ((void)(flag), 1)
typedef real element;
static inline real get(element e) { return e; }
static inline element put(real x) { return x; }
#endif

/* Element i of memory that holds elements, or reals if `wide`. */
static inline real get_at(const void *memory, int64_t i, int wide)
{
    return WIDE(wide) ? ((const real *)memory)[i] : get(((const element *)memory)[i]);
}

static inline void put_at(void *memory, int64_t i, int wide, real x)
{
    if (WIDE(wide))
        ((real *)memory)[i] = x;
    else
        ((element *)memory)[i] = put(x);
}

/* Where element i lies. */
static inline void *place_at(const void *memory, int64_t i, int wide)
{
    int64_t bytes = WIDE(wide) ? (int64_t)sizeof(real) : (int64_t)sizeof(element);
    return (char *)(uintptr_t)memory + i * bytes;
}

#endif
