/* real.h - the element type and the instruction set of one compilation of a CPU kernel.
 *
 * Every kernel source of src/cpu is compiled once for each element type (float, double) and each
 * instruction set (plain C, AVX2+FMA, AVX-512). The build defines MOE_F64 for double and
 * MOE_VARIANT, a suffix such as f32_avx2; MOE_KERNEL(name) makes the symbol
 * moe__cpu_<name>_<variant>. Without these macros the file is the plain float variant, so that
 * tools can parse it alone. */
#ifndef MOE_CPU_REAL_H
#define MOE_CPU_REAL_H

#include <stdint.h>

#ifndef MOE_VARIANT
#ifdef MOE_F64
#define MOE_VARIANT f64_plain
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

#endif
