/* half.h - bfloat16 and IEEE binary16 in the low bits of a uint16_t, to and from float.
 *
 * Widening is exact. Narrowing rounds once, to nearest, ties to even: too large a value becomes an
 * infinity, too small a one a subnormal number or 0 of its sign. A NaN stays a NaN, made quiet,
 * with the upper bits of its payload. Selects and no branches: a loop over any vectorises, and the
 * bits are the same everywhere in the default floating-point environment. Includes numeric.h
 * alone. */
#ifndef MOE_HALF_H
#define MOE_HALF_H

#include "numeric.h"

/* ---- bfloat16: the upper half of a float ----------------------------------------------------- */

MOE_FN float moe__from_bf16(uint16_t h) { return moe__from_bits_f32((uint32_t)h << 16); }

MOE_FN uint16_t moe__to_bf16(float x)
{
    uint32_t u = moe__bits_f32(x), nan = u | 0x400000u;
    uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);
    return (uint16_t)(((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded) >> 16);
}

/* ---- binary16: 1 sign, 5 exponent and 10 fraction bits --------------------------------------- */

/* The bias of the exponent moves from 15 to 127. A subnormal number gets the exponent of the
 * smallest normal one, with its leading 1, which is subtracted again: exact. */
MOE_FN float moe__from_f16(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, m = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t exponent = h & 0x7c00u, quiet = (h & 0x3ffu) != 0 ? 0x400000u : 0u;
    uint32_t small = moe__bits_f32(moe__from_bits_f32(m + (113u << 23)) - 0x1p-14f);
    uint32_t u = exponent == 0        ? small
                 : exponent == 0x7c00 ? (m | 0x7f800000u | quiet)
                                      : m + (112u << 23);
    return moe__from_bits_f32(u | sign);
}

/* Below 2^-14 an ulp of |x| + 0.5 is the smallest subnormal number, so the sum rounds as wanted. */
MOE_FN uint16_t moe__to_f16(float x)
{
    uint32_t u = moe__bits_f32(x), a = u & 0x7fffffffu;
    uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
    uint32_t small = moe__bits_f32(moe__from_bits_f32(a) + 0.5f) - 0x3f000000u;
    uint32_t h = a > 0x7f800000u    ? 0x7e00u | ((a >> 13) & 0x3ffu)
                 : a >= 0x47800000u ? 0x7c00u
                 : a < 0x38800000u  ? small
                                    : normal;
    return (uint16_t)(h | ((u >> 16) & 0x8000u));
}

#endif
