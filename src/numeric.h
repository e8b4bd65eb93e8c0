/* numeric.h - the library's own elementary functions, float (_f32) and double (_f64).
 *
 * Only + - * /, sqrt, explicit fma, integer operations, bit casts and selects, each rounded as
 * IEEE 754 says, and no inexact product feeds a sum but in an fma; no branches: a loop over any
 * vectorises, and every compiler, vector width and device gives the same bytes in the default
 * floating-point environment. Vectorising needs -fno-math-errno -fno-trapping-math; fast-math is
 * never allowed. A NaN argument comes back as it is. Coefficients are our own: interpolation at
 * Chebyshev nodes in 60 digits (mpmath), rounded; bounds are of the rounded ones. Errors are the
 * largest that tests/check_numeric.c saw with CHECK_STRIDE=61, 70 million samples each. Includes
 * nothing of ours. */
#ifndef MOE_NUMERIC_H
#define MOE_NUMERIC_H

#include <stdint.h>
#include <string.h>

#ifndef MOE_FN
#define MOE_FN static inline
#endif

/* ---- float ----------------------------------------------------------------------------------- */

MOE_FN float moe__fma_f32(float a, float b, float c)
{
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

MOE_FN float moe__sqrt_f32(float x)
{
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
}

MOE_FN uint32_t moe__bits_f32(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

MOE_FN float moe__from_bits_f32(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

MOE_FN float moe__abs_f32(float x) { return moe__from_bits_f32(moe__bits_f32(x) & 0x7fffffffu); }

/* x with the sign of s, x not negative. */
MOE_FN float moe__with_sign_f32(float x, float s)
{
    return moe__from_bits_f32(moe__bits_f32(x) | (moe__bits_f32(s) & ~0x7fffffffu));
}

/* x + lo = n ln 2 + r, |r| <= ln 2 / 2: writes p = e^r - 1, returns n + 256. x is in [-104, 89] or
 * NaN (then both are garbage), |lo| below an ulp of x. n: add and subtract 1.5 * 2^23; ln 2 in two
 * parts, the upper of 15 bits, so that n times it is exact. p = r + r^2 q(r), q at Chebyshev nodes
 * of |r| <= 0.34666, degree 5, relative error of p 2^-29. */
MOE_FN uint32_t moe__expm1_reduced_f32(float x, float lo, float *expm1_r)
{
    const float shift = 0x1.8p23f;
    float shifted = moe__fma_f32(x, 0x1.715476p+0f, shift);
    float n = shifted - shift;
    float r = moe__fma_f32(n, -0x1.62e4p-1f, x);
    r = moe__fma_f32(n, -0x1.7f7d1cp-20f, r) + lo;
    float p = 0x1.a12506p-13f;
    p = moe__fma_f32(p, r, 0x1.6d433ap-10f);
    p = moe__fma_f32(p, r, 0x1.1110ep-7f);
    p = moe__fma_f32(p, r, 0x1.5554e8p-5f);
    p = moe__fma_f32(p, r, 0x1.555556p-3f);
    p = moe__fma_f32(p, r, 0x1p-1f);
    *expm1_r = moe__fma_f32(r * r, p, r);
    return moe__bits_f32(shifted) - (moe__bits_f32(shift) - 256u);
}

/* e^(x + lo), |lo| below an ulp of x, x not NaN. 2^n in two factors of about 2^(n/2): the first
 * product is exact, the second rounds to infinity, a normal number, a denormal or zero. */
MOE_FN float moe__exp_sum_f32(float x, float lo)
{
    float p;
    x = x > 89.0f ? 89.0f : x;
    x = x < -104.0f ? -104.0f : x;
    uint32_t n = moe__expm1_reduced_f32(x, lo, &p);
    uint32_t halved = n >> 1;
    float scale1 = moe__from_bits_f32((halved - 1) << 23);
    float scale2 = moe__from_bits_f32((n - halved - 1) << 23);
    return (p + 1.0f) * scale1 * scale2;
}

/* e^x. Measured: 0.98 ulp. */
MOE_FN float moe__exp_f32(float x)
{
    float y = moe__exp_sum_f32(x, 0.0f);
    return x == x ? y : x;
}

/* e^(-scale y^2), scale 1 or 1/2: the square in two parts, for the relative error of e^-h is the
 * absolute error of h. */
MOE_FN float moe__exp_neg_square_f32(float y, float scale)
{
    float hi = y * y;
    float lo = moe__fma_f32(y, y, -hi);
    return moe__exp_sum_f32(-scale * hi, -scale * lo);
}

/* ln x. x = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt 2); with s = f / (2 + f)
 *   ln(1 + f) = 2 atanh s = 2 s + s R = f - s (f - R),  R = 2/3 s^2 + 2/5 s^4 + ... = s^2 V(s^2),
 * f exact and f - R a small correction. V at Chebyshev nodes of s^2 in [0, 0.02947], degree 2,
 * relative error of ln(1 + f) 2^-28. Denormals are scaled by 2^25. Measured: 0.91 ulp. */
MOE_FN float moe__log_f32(float x)
{
    const uint32_t bias = (uint32_t)256 << 23;
    float y = x < 0x1p-126f ? x * 0x1p25f : x;
    uint32_t u = moe__bits_f32(y);
    uint32_t biased = (u - 0x3f3504f3u + bias) >> 23;
    float e = moe__from_bits_f32(moe__bits_f32(0x1p23f) + biased) - (0x1p23f + 256.0f);
    e = x < 0x1p-126f ? e - 25.0f : e;
    float f = moe__from_bits_f32(u - (biased << 23) + bias) - 1.0f;
    float s = f / (f + 2.0f);
    float q = s * s;
    float p = 0x1.2ee8b8p-2f;
    p = moe__fma_f32(p, q, 0x1.997c22p-2f);
    p = moe__fma_f32(p, q, 0x1.55555cp-1f);
    float log1p_f = moe__fma_f32(-s, moe__fma_f32(-q, p, f), f);
    float r = moe__fma_f32(e, 0x1.62e4p-1f, moe__fma_f32(e, 0x1.7f7d1cp-20f, log1p_f));
    r = y == moe__from_bits_f32(0x7f800000u) ? y : r;
    r = x == 0.0f ? -moe__from_bits_f32(0x7f800000u) : r;
    r = x < 0.0f ? moe__from_bits_f32(0x7fc00000u) : r;
    return x == x ? r : x;
}

/* ln(1 + t) for t in [0, 1]: as in moe__log, without a reduction, s = t / (2 + t) <= 1/3; V at
 * Chebyshev nodes of s^2 in [0, 1/9], degree 4, relative error 2^-29. Measured: 1.06 ulp. */
MOE_FN float moe__log1p_unit_f32(float t)
{
    float s = t / (t + 2.0f);
    float q = s * s;
    float p = 0x1.dba26p-3f;
    p = moe__fma_f32(p, q, 0x1.bc8cf8p-3f);
    p = moe__fma_f32(p, q, 0x1.24c926p-2f);
    p = moe__fma_f32(p, q, 0x1.9998d4p-2f);
    p = moe__fma_f32(p, q, 0x1.555556p-1f);
    return moe__fma_f32(-s, moe__fma_f32(-q, p, t), t);
}

/* ln(1 + e^z) = max(z, 0) + ln(1 + e^-|z|). Measured: 1.68 ulp. */
MOE_FN float moe__softplus_f32(float z)
{
    float t = moe__exp_sum_f32(-moe__abs_f32(z), 0.0f);
    float y = (z > 0.0f ? z : 0.0f) + moe__log1p_unit_f32(t);
    return z == z ? y : z;
}

/* a / (c + b) for 0 <= b and the exact part of b that c + b rounded away, so that only the last
 * operation rounds; c is 1 or 2. */
MOE_FN float moe__over_sum_f32(float a, float b, float c)
{
    float sum = b + c;
    float lost = b - (sum - c);
    float inverse = 1.0f / sum;
    float quotient = a * inverse;
    float rest = moe__fma_f32(-quotient, lost, moe__fma_f32(-quotient, sum, a));
    return moe__fma_f32(rest, inverse, quotient);
}

/* 1 / (1 + e^-z); for z < 0 in the form e^z / (1 + e^z). Measured: 1.47 ulp. */
MOE_FN float moe__sigmoid_f32(float z)
{
    float t = moe__exp_sum_f32(-moe__abs_f32(z), 0.0f);
    float y = moe__over_sum_f32(z < 0.0f ? t : 1.0f, t, 1.0f);
    return z == z ? y : z;
}

/* tanh x = m / (m + 2), m = e^(2|x|) - 1 = 2^n (e^r - 1) + (2^n - 1): no cancellation at small |x|.
 * From |x| = 10 it is 1. Measured: 1.59 ulp. */
MOE_FN float moe__tanh_f32(float x)
{
    float p;
    float y = moe__abs_f32(x);
    y = y > 10.0f ? 10.0f : y;
    uint32_t n = moe__expm1_reduced_f32(y + y, 0.0f, &p);
    float scale = moe__from_bits_f32((n - 129) << 23);
    float m = moe__fma_f32(scale, p, scale - 1.0f);
    float r = moe__with_sign_f32(moe__over_sum_f32(m, m, 2.0f), x);
    return x == x ? r : x;
}

/* W(a) = e^(a^2/2) Phi(-a), a = y c in [0, 15], smooth and slow: over a + 4, a polynomial in
 * t = (a - 4) / (a + 4), at Chebyshev nodes of that interval, degree 9, relative error 2^-23. */
MOE_FN float moe__normal_tail_scaled_f32(float y, float c)
{
    float inverse = 1.0f / moe__fma_f32(y, c, 4.0f);
    float t = moe__fma_f32(y, c, -4.0f) * inverse;
    float p = -0x1.0750a6p-13f;
    p = moe__fma_f32(p, t, 0x1.8c5abcp-13f);
    p = moe__fma_f32(p, t, 0x1.9abfa6p-10f);
    p = moe__fma_f32(p, t, -0x1.cd803ep-9f);
    p = moe__fma_f32(p, t, -0x1.ed2f4ep-8f);
    p = moe__fma_f32(p, t, 0x1.eed8f4p-5f);
    p = moe__fma_f32(p, t, -0x1.7dffeep-3f);
    p = moe__fma_f32(p, t, 0x1.8c6d9p-2f);
    p = moe__fma_f32(p, t, -0x1.373e38p-1f);
    p = moe__fma_f32(p, t, 0x1.82b4bcp-1f);
    return p * inverse;
}

/* erf x = x + x P(x^2) below |x| = 0.85, P at Chebyshev nodes, degree 6, relative error 2^-26;
 * else 1 - erfc |x|, erfc y = 2 e^(-y^2) W(y sqrt 2), which from 4 is 1. Measured: 1.35 ulp. */
MOE_FN float moe__erf_f32(float x)
{
    float y = moe__abs_f32(x);
    y = y > 4.0f ? 4.0f : y;
    float w = moe__normal_tail_scaled_f32(y, 0x1.6a09e6p+0f);
    float large = moe__fma_f32(-2.0f * w, moe__exp_neg_square_f32(y, 1.0f), 1.0f);
    float q = y * y;
    float p = 0x1.7331c6p-14f;
    p = moe__fma_f32(p, q, -0x1.b0652ep-11f);
    p = moe__fma_f32(p, q, 0x1.5569a6p-8f);
    p = moe__fma_f32(p, q, -0x1.b81dcep-6f);
    p = moe__fma_f32(p, q, 0x1.ce2eaep-4f);
    p = moe__fma_f32(p, q, -0x1.812746p-2f);
    p = moe__fma_f32(p, q, 0x1.06eba8p-3f);
    float small = moe__fma_f32(y, p, y);
    float r = moe__with_sign_f32(y < 0.85f ? small : large, x);
    return x == x ? r : x;
}

/* phi(z) = e^(-z^2/2) / sqrt(2 pi), the constant in two parts. Measured: 1.78 ulp. */
MOE_FN float moe__normal_pdf_f32(float z)
{
    float a = moe__abs_f32(z);
    a = a > 15.0f ? 15.0f : a;
    float e = moe__exp_neg_square_f32(a, 0.5f);
    float y = moe__fma_f32(e, 0x1.988454p-2f, e * -0x1.857936p-27f);
    return z == z ? y : z;
}

/* Phi(z) = e^(-z^2/2) W(-z) for z < 0, else 1 - Phi(-z). Measured: 5.98 ulp. */
MOE_FN float moe__normal_cdf_f32(float z)
{
    float a = moe__abs_f32(z);
    a = a > 15.0f ? 15.0f : a;
    float w = moe__normal_tail_scaled_f32(a, 1.0f);
    float e = moe__exp_neg_square_f32(a, 0.5f);
    float y = z < 0.0f ? w * e : moe__fma_f32(-w, e, 1.0f);
    return z == z ? y : z;
}

/* sin(pi r) / r of q = r^2 <= 1/16. */
MOE_FN float moe__sinpi_over_f32(float q)
{
    float p = 0x1.4bc85cp-4f;
    p = moe__fma_f32(p, q, -0x1.32ca9ep-1f);
    p = moe__fma_f32(p, q, 0x1.466bbap+1f);
    p = moe__fma_f32(p, q, -0x1.4abbcep+2f);
    p = moe__fma_f32(p, q, 0x1.921fb6p+1f);
    return p;
}

/* cos(pi r) of q = r^2 <= 1/16. */
MOE_FN float moe__cospi_f32(float q)
{
    float p = 0x1.db6492p-3f;
    p = moe__fma_f32(p, q, -0x1.55cb98p+0f);
    p = moe__fma_f32(p, q, 0x1.03c1eap+2f);
    p = moe__fma_f32(p, q, -0x1.3bd3ccp+2f);
    return moe__fma_f32(q, p, 1.0f);
}

/* s = sin(pi u), c = cos(pi u) for u in [0, 2). u = q/2 + r, |r| <= 1/4, exactly; sin(pi r) = r
 * S(r^2), cos(pi r) = 1 + r^2 C(r^2), at Chebyshev nodes, degrees 4 and 3, errors 2^-25 and 2^-26;
 * the quadrant q swaps them and sets the signs. Measured: 1.65 ulp. */
MOE_FN void moe__sincospi_f32(float u, float *s, float *c)
{
    const float shift = 0x1.8p23f;
    float shifted = moe__fma_f32(u, 2.0f, shift);
    uint32_t quadrant = moe__bits_f32(shifted) & 3u;
    float r = moe__fma_f32(shifted - shift, -0.5f, u);
    float q = r * r;
    float sine = r * moe__sinpi_over_f32(q);
    float cosine = moe__cospi_f32(q);
    float a = (quadrant & 1u) != 0 ? cosine : sine;
    float b = (quadrant & 1u) != 0 ? sine : cosine;
    *s = moe__from_bits_f32(moe__bits_f32(a) ^ ((quadrant & 2u) << 30));
    *c = moe__from_bits_f32(moe__bits_f32(b) ^ (((quadrant + 1u) & 2u) << 30));
}

/* ---- double ---------------------------------------------------------------------------------- */

MOE_FN double moe__fma_f64(double a, double b, double c)
{
#ifdef __CUDA_ARCH__
    return __fma_rn(a, b, c);
#else
    return __builtin_fma(a, b, c);
#endif
}

MOE_FN double moe__sqrt_f64(double x)
{
#ifdef __CUDA_ARCH__
    return __dsqrt_rn(x);
#else
    return __builtin_sqrt(x);
#endif
}

MOE_FN uint64_t moe__bits_f64(double x)
{
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

MOE_FN double moe__from_bits_f64(uint64_t u)
{
    double x;
    memcpy(&x, &u, sizeof x);
    return x;
}

MOE_FN double moe__abs_f64(double x)
{
    return moe__from_bits_f64(moe__bits_f64(x) & 0x7fffffffffffffffu);
}

/* x with the sign of s, x not negative. */
MOE_FN double moe__with_sign_f64(double x, double s)
{
    return moe__from_bits_f64(moe__bits_f64(x) | (moe__bits_f64(s) & ~0x7fffffffffffffffu));
}

/* x + lo = n ln 2 + r, |r| <= ln 2 / 2: writes p = e^r - 1, returns n + 2048. x is in [-746, 710]
 * or NaN (then both are garbage), |lo| below an ulp of x. n: add and subtract 1.5 * 2^52; ln 2 in
 * two parts, the upper of 41 bits, so that n times it is exact. p = r + r^2 q(r), q at Chebyshev
 * nodes of |r| <= 0.34666, degree 10, relative error of p 2^-60. */
MOE_FN uint64_t moe__expm1_reduced_f64(double x, double lo, double *expm1_r)
{
    const double shift = 0x1.8p52;
    double shifted = moe__fma_f64(x, 0x1.71547652b82fep+0, shift);
    double n = shifted - shift;
    double r = moe__fma_f64(n, -0x1.62e42fefa3p-1, x);
    r = moe__fma_f64(n, -0x1.3de6af278ece6p-42, r) + lo;
    double p = 0x1.1f730d24fd4ebp-29;
    p = moe__fma_f64(p, r, 0x1.af4dfabdcee56p-26);
    p = moe__fma_f64(p, r, 0x1.27e4db5fae4ap-22);
    p = moe__fma_f64(p, r, 0x1.71de02294b1fbp-19);
    p = moe__fma_f64(p, r, 0x1.a01a01a6da084p-16);
    p = moe__fma_f64(p, r, 0x1.a01a01abea9bap-13);
    p = moe__fma_f64(p, r, 0x1.6c16c16c162d1p-10);
    p = moe__fma_f64(p, r, 0x1.11111111100d7p-7);
    p = moe__fma_f64(p, r, 0x1.5555555555556p-5);
    p = moe__fma_f64(p, r, 0x1.5555555555557p-3);
    p = moe__fma_f64(p, r, 0x1p-1);
    *expm1_r = moe__fma_f64(r * r, p, r);
    return moe__bits_f64(shifted) - (moe__bits_f64(shift) - 2048u);
}

/* e^(x + lo), |lo| below an ulp of x, x not NaN. 2^n in two factors of about 2^(n/2): the first
 * product is exact, the second rounds to infinity, a normal number, a denormal or zero. */
MOE_FN double moe__exp_sum_f64(double x, double lo)
{
    double p;
    x = x > 710.0 ? 710.0 : x;
    x = x < -746.0 ? -746.0 : x;
    uint64_t n = moe__expm1_reduced_f64(x, lo, &p);
    uint64_t halved = n >> 1;
    double scale1 = moe__from_bits_f64((halved - 1) << 52);
    double scale2 = moe__from_bits_f64((n - halved - 1) << 52);
    return (p + 1.0) * scale1 * scale2;
}

/* e^x. Measured: 0.99 ulp. */
MOE_FN double moe__exp_f64(double x)
{
    double y = moe__exp_sum_f64(x, 0.0);
    return x == x ? y : x;
}

/* e^(-scale y^2), scale 1 or 1/2: the square in two parts, for the relative error of e^-h is the
 * absolute error of h. */
MOE_FN double moe__exp_neg_square_f64(double y, double scale)
{
    double hi = y * y;
    double lo = moe__fma_f64(y, y, -hi);
    return moe__exp_sum_f64(-scale * hi, -scale * lo);
}

/* ln x. x = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt 2); with s = f / (2 + f)
 *   ln(1 + f) = 2 atanh s = 2 s + s R = f - s (f - R),  R = 2/3 s^2 + 2/5 s^4 + ... = s^2 V(s^2),
 * f exact and f - R a small correction. V at Chebyshev nodes of s^2 in [0, 0.02947], degree 6,
 * relative error of ln(1 + f) 2^-57. Denormals are scaled by 2^54. Measured: 1.11 ulp. */
MOE_FN double moe__log_f64(double x)
{
    const uint64_t bias = (uint64_t)2048 << 52;
    double y = x < 0x1p-1022 ? x * 0x1p54 : x;
    uint64_t u = moe__bits_f64(y);
    uint64_t biased = (u - 0x3fe6a09e667f3bcdu + bias) >> 52;
    double e = moe__from_bits_f64(moe__bits_f64(0x1p52) + biased) - (0x1p52 + 2048.0);
    e = x < 0x1p-1022 ? e - 54.0 : e;
    double f = moe__from_bits_f64(u - (biased << 52) + bias) - 1.0;
    double s = f / (f + 2.0);
    double q = s * s;
    double p = 0x1.2b5f3df0a9a78p-3;
    p = moe__fma_f64(p, q, 0x1.39fdd060a2a56p-3);
    p = moe__fma_f64(p, q, 0x1.7462b900e4b3ep-3);
    p = moe__fma_f64(p, q, 0x1.c71c62d643033p-3);
    p = moe__fma_f64(p, q, 0x1.2492492dfd3d3p-2);
    p = moe__fma_f64(p, q, 0x1.9999999995276p-2);
    p = moe__fma_f64(p, q, 0x1.5555555555558p-1);
    double log1p_f = moe__fma_f64(-s, moe__fma_f64(-q, p, f), f);
    double r = moe__fma_f64(e, 0x1.62e42fefa3p-1, moe__fma_f64(e, 0x1.3de6af278ece6p-42, log1p_f));
    r = y == moe__from_bits_f64(0x7ff0000000000000u) ? y : r;
    r = x == 0.0 ? -moe__from_bits_f64(0x7ff0000000000000u) : r;
    r = x < 0.0 ? moe__from_bits_f64(0x7ff8000000000000u) : r;
    return x == x ? r : x;
}

/* ln(1 + t) for t in [0, 1]: as in moe__log, without a reduction, s = t / (2 + t) <= 1/3; V at
 * Chebyshev nodes of s^2 in [0, 1/9], degree 10, relative error 2^-58. Measured: 1.08 ulp. */
MOE_FN double moe__log1p_unit_f64(double t)
{
    double s = t / (t + 2.0);
    double q = s * s;
    double p = 0x1.401d3e65cdc48p-3;
    p = moe__fma_f64(p, q, 0x1.32e0d25c9c761p-4);
    p = moe__fma_f64(p, q, 0x1.bc37f0140c19ep-4);
    p = moe__fma_f64(p, q, 0x1.e0a2d581ab68fp-4);
    p = moe__fma_f64(p, q, 0x1.111abdc8abe16p-3);
    p = moe__fma_f64(p, q, 0x1.3b13515f6f9efp-3);
    p = moe__fma_f64(p, q, 0x1.745d19937b1fcp-3);
    p = moe__fma_f64(p, q, 0x1.c71c71bedea97p-3);
    p = moe__fma_f64(p, q, 0x1.2492492499d46p-2);
    p = moe__fma_f64(p, q, 0x1.9999999999944p-2);
    p = moe__fma_f64(p, q, 0x1.5555555555555p-1);
    return moe__fma_f64(-s, moe__fma_f64(-q, p, t), t);
}

/* ln(1 + e^z) = max(z, 0) + ln(1 + e^-|z|). Measured: 1.70 ulp. */
MOE_FN double moe__softplus_f64(double z)
{
    double t = moe__exp_sum_f64(-moe__abs_f64(z), 0.0);
    double y = (z > 0.0 ? z : 0.0) + moe__log1p_unit_f64(t);
    return z == z ? y : z;
}

/* a / (c + b) for 0 <= b and the exact part of b that c + b rounded away, so that only the last
 * operation rounds; c is 1 or 2. */
MOE_FN double moe__over_sum_f64(double a, double b, double c)
{
    double sum = b + c;
    double lost = b - (sum - c);
    double inverse = 1.0 / sum;
    double quotient = a * inverse;
    double rest = moe__fma_f64(-quotient, lost, moe__fma_f64(-quotient, sum, a));
    return moe__fma_f64(rest, inverse, quotient);
}

/* 1 / (1 + e^-z); for z < 0 in the form e^z / (1 + e^z). Measured: 1.47 ulp. */
MOE_FN double moe__sigmoid_f64(double z)
{
    double t = moe__exp_sum_f64(-moe__abs_f64(z), 0.0);
    double y = moe__over_sum_f64(z < 0.0 ? t : 1.0, t, 1.0);
    return z == z ? y : z;
}

/* tanh x = m / (m + 2), m = e^(2|x|) - 1 = 2^n (e^r - 1) + (2^n - 1): no cancellation at small |x|.
 * From |x| = 20 it is 1. Measured: 1.92 ulp. */
MOE_FN double moe__tanh_f64(double x)
{
    double p;
    double y = moe__abs_f64(x);
    y = y > 20.0 ? 20.0 : y;
    uint64_t n = moe__expm1_reduced_f64(y + y, 0.0, &p);
    double scale = moe__from_bits_f64((n - 1025) << 52);
    double m = moe__fma_f64(scale, p, scale - 1.0);
    double r = moe__with_sign_f64(moe__over_sum_f64(m, m, 2.0), x);
    return x == x ? r : x;
}

/* W(a) = e^(a^2/2) Phi(-a), a = y c in [0, 40], smooth and slow: over a + 5, a polynomial in
 * t = (a - 5) / (a + 5), at Chebyshev nodes of that interval, degree 22, relative error 2^-53. */
MOE_FN double moe__normal_tail_scaled_f64(double y, double c)
{
    double inverse = 1.0 / moe__fma_f64(y, c, 5.0);
    double t = moe__fma_f64(y, c, -5.0) * inverse;
    double p = -0x1.8d6f2393e8a27p-33;
    p = moe__fma_f64(p, t, 0x1.d04c40671584p-30);
    p = moe__fma_f64(p, t, 0x1.0771b8d6722dfp-27);
    p = moe__fma_f64(p, t, -0x1.3a33e415385dap-27);
    p = moe__fma_f64(p, t, -0x1.1ad198b314e3cp-24);
    p = moe__fma_f64(p, t, 0x1.6990eb9e16b58p-25);
    p = moe__fma_f64(p, t, 0x1.d0e9a77b4fdcep-22);
    p = moe__fma_f64(p, t, -0x1.6953c53876a56p-22);
    p = moe__fma_f64(p, t, -0x1.73ab1fe49c4b4p-19);
    p = moe__fma_f64(p, t, 0x1.0b26d911af57p-18);
    p = moe__fma_f64(p, t, 0x1.17dd09c920f56p-16);
    p = moe__fma_f64(p, t, -0x1.a170d25216a98p-15);
    p = moe__fma_f64(p, t, -0x1.f2145fdfd5bd4p-15);
    p = moe__fma_f64(p, t, 0x1.1daf1d4fc84f5p-11);
    p = moe__fma_f64(p, t, -0x1.a25037dc79cdp-11);
    p = moe__fma_f64(p, t, -0x1.88590eab49716p-9);
    p = moe__fma_f64(p, t, 0x1.54b4d4f4c511ep-6);
    p = moe__fma_f64(p, t, -0x1.1b1c254c99e8bp-4);
    p = moe__fma_f64(p, t, 0x1.51f6329f0171ep-3);
    p = moe__fma_f64(p, t, -0x1.410ed5f875a85p-2);
    p = moe__fma_f64(p, t, 0x1.fb31653876f92p-2);
    p = moe__fma_f64(p, t, -0x1.54ad03f27ca17p-1);
    p = moe__fma_f64(p, t, 0x1.89d3abe1f95aep-1);
    return p * inverse;
}

/* erf x = x + x P(x^2) below |x| = 0.85, P at Chebyshev nodes, degree 11, relative error 2^-56;
 * else 1 - erfc |x|, erfc y = 2 e^(-y^2) W(y sqrt 2), which from 6 is 1. Measured: 1.40 ulp. */
MOE_FN double moe__erf_f64(double x)
{
    double y = moe__abs_f64(x);
    y = y > 6.0 ? 6.0 : y;
    double w = moe__normal_tail_scaled_f64(y, 0x1.6a09e667f3bcdp+0);
    double large = moe__fma_f64(-2.0 * w, moe__exp_neg_square_f64(y, 1.0), 1.0);
    double q = y * y;
    double p = -0x1.e5d4a2f4facb1p-31;
    p = moe__fma_f64(p, q, 0x1.e78ce74511f33p-27);
    p = moe__fma_f64(p, q, -0x1.5e0ceca83a2b8p-23);
    p = moe__fma_f64(p, q, 0x1.b9c84aad92c94p-20);
    p = moe__fma_f64(p, q, -0x1.f4d0a3d978b8p-17);
    p = moe__fma_f64(p, q, 0x1.f9a31658993bep-14);
    p = moe__fma_f64(p, q, -0x1.c02db3963408fp-11);
    p = moe__fma_f64(p, q, 0x1.565bcd0cbcf76p-8);
    p = moe__fma_f64(p, q, -0x1.b82ce31280af9p-6);
    p = moe__fma_f64(p, q, 0x1.ce2f21a042aa4p-4);
    p = moe__fma_f64(p, q, -0x1.812746b0379e6p-2);
    p = moe__fma_f64(p, q, 0x1.06eba8214db69p-3);
    double small = moe__fma_f64(y, p, y);
    double r = moe__with_sign_f64(y < 0.85 ? small : large, x);
    return x == x ? r : x;
}

/* phi(z) = e^(-z^2/2) / sqrt(2 pi), the constant in two parts. Measured: 1.99 ulp. */
MOE_FN double moe__normal_pdf_f64(double z)
{
    double a = moe__abs_f64(z);
    a = a > 40.0 ? 40.0 : a;
    double e = moe__exp_neg_square_f64(a, 0.5);
    double y = moe__fma_f64(e, 0x1.9884533d43651p-2, e * -0x1.cbc0d30ebfd15p-56);
    return z == z ? y : z;
}

/* Phi(z) = e^(-z^2/2) W(-z) for z < 0, else 1 - Phi(-z). Measured: 7.20 ulp. */
MOE_FN double moe__normal_cdf_f64(double z)
{
    double a = moe__abs_f64(z);
    a = a > 40.0 ? 40.0 : a;
    double w = moe__normal_tail_scaled_f64(a, 1.0);
    double e = moe__exp_neg_square_f64(a, 0.5);
    double y = z < 0.0 ? w * e : moe__fma_f64(-w, e, 1.0);
    return z == z ? y : z;
}

/* For kernels that are compiled once for each element type; include cpu/real.h first. */
#ifdef MOE_CPU_REAL_H
#ifdef MOE_F64
#define r_exp moe__exp_f64
#define r_log moe__log_f64
#define r_erf moe__erf_f64
#define r_tanh moe__tanh_f64
#define r_softplus moe__softplus_f64
#define r_sigmoid moe__sigmoid_f64
#define r_normal_pdf moe__normal_pdf_f64
#define r_normal_cdf moe__normal_cdf_f64
#define r_fma moe__fma_f64
#define r_sqrt moe__sqrt_f64
#define r_abs moe__abs_f64
#else
#define r_exp moe__exp_f32
#define r_log moe__log_f32
#define r_erf moe__erf_f32
#define r_tanh moe__tanh_f32
#define r_softplus moe__softplus_f32
#define r_sigmoid moe__sigmoid_f32
#define r_normal_pdf moe__normal_pdf_f32
#define r_normal_cdf moe__normal_cdf_f32
#define r_fma moe__fma_f32
#define r_sqrt moe__sqrt_f32
#define r_abs moe__abs_f32
#endif
#endif

#endif
