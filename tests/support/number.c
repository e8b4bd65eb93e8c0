/* number.c - one number of any dtype. The 16-bit formats are written here a second time, in double,
 * so that the library's conversions have something to be compared with. */
#include "support/layer_case.h"

#include <math.h>
#include <string.h>

int number_is_half(int32_t dtype) { return dtype == MOE_DTYPE_BF16 || dtype == MOE_DTYPE_F16; }

int32_t number_real(int32_t dtype) { return number_is_half(dtype) ? MOE_DTYPE_F32 : dtype; }

size_t number_bytes(int32_t dtype)
{
    return dtype == MOE_DTYPE_F64 ? 8 : number_is_half(dtype) ? 2 : 4;
}

/* Bits of fraction, and the exponent of the smallest normal number. */
static int fraction_bits(int32_t dtype) { return dtype == MOE_DTYPE_BF16 ? 7 : 10; }
static int least_exponent(int32_t dtype) { return dtype == MOE_DTYPE_BF16 ? -126 : -14; }

static double from_half(uint16_t bits, int32_t dtype)
{
    int fraction = fraction_bits(dtype), m = bits & ((1 << fraction) - 1);
    int top = (1 << (15 - fraction)) - 1, e = (bits & 0x7fff) >> fraction;
    double sign = bits & 0x8000 ? -1 : 1;
    if (e == top) return m ? (double)NAN : sign * (double)INFINITY;
    if (e == 0) return sign * ldexp(m, least_exponent(dtype) - fraction);
    return sign * ldexp(m + (1 << fraction), e - 1 + least_exponent(dtype) - fraction);
}

/* Rounds once, to nearest even, in units of the last place. */
static uint16_t to_half(double x, int32_t dtype)
{
    int fraction = fraction_bits(dtype), e, least = least_exponent(dtype);
    uint16_t sign = signbit(x) ? 0x8000 : 0;
    int infinity = ((1 << (15 - fraction)) - 1) << fraction;
    if (isnan(x)) return (uint16_t)(sign | infinity | 1 << (fraction - 1));
    if (isinf(x)) return (uint16_t)(sign | infinity);
    (void)frexp(x, &e); /* x = m 2^e, 1/2 <= |m| < 1 */
    if (x == 0 || e - 1 < least) e = least + 1;
    double units = ldexp(fabs(x), fraction + 1 - e), whole = floor(units), rest = units - whole;
    if (rest > 0.5 || (rest == 0.5 && fmod(whole, 2) == 1)) whole += 1;
    /* A carry goes on into the exponent, and from the largest into infinity. */
    int bits = (e - 1 - least) * (1 << fraction) + (int)whole;
    return (uint16_t)(sign | (bits < infinity ? bits : infinity));
}

double number_at(const void *data, int64_t i, int32_t dtype)
{
    if (dtype == MOE_DTYPE_F64) return ((const double *)data)[i];
    if (number_is_half(dtype)) return from_half(((const uint16_t *)data)[i], dtype);
    return (double)((const float *)data)[i];
}

void number_set(void *data, int64_t i, int32_t dtype, double value)
{
    if (dtype == MOE_DTYPE_F64)
        ((double *)data)[i] = value;
    else if (number_is_half(dtype))
        ((uint16_t *)data)[i] = to_half((double)(float)value, dtype);
    else
        ((float *)data)[i] = (float)value;
}
