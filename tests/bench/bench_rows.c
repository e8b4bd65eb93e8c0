/* bench_rows.c - what the BLAS peers do between products: activations, scaled rows, dot products.
 *
 *     ReLU:    h = max(pre, 0)                        dpre = pre > 0 ? dh : 0
 *     SwiGLU:  h = silu(g) u,  pre = [g, u]           dg = dh u silu'(g),  du = dh silu(g)
 *
 * Compiled for several instruction sets where the compiler can, so that a peer is as fast here as
 * its library is; exp is a polynomial because a loop around libm's is not vectorised. */
#include "bench.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define CLONES
#endif
#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* exp(x) = 2^n exp(r), |r| <= ln 2 / 2, to about 2e-7. */
INLINE float exp_of(float x)
{
    float limited = x > 88 ? 88 : x < -87 ? -87 : x;
    float n = limited * 1.44269504f + 12582912; /* rounds to an integer in the last bits */
    int32_t bits;
    float r, scale;
    memcpy(&bits, &n, sizeof bits);
    n -= 12582912;
    r = limited - n * 0.693359375f + n * 2.12194440e-4f;
    bits = (int32_t)((uint32_t)(bits - 0x4b400000 + 127) << 23);
    memcpy(&scale, &bits, sizeof scale);
    return scale * (1 + r * (1 + r * (0.5f + r * (0.16666667f +
                                                  r * (0.041666667f +
                                                       r * (0.0083333333f + r * 0.0013888889f))))));
}

CLONES void bench_activation(float *h, const float *pre, int64_t rows, int64_t F, bool gated)
{
    if (!gated)
        for (int64_t i = 0; i < rows * F; i++) h[i] = pre[i] > 0 ? pre[i] : 0;
    else
        for (int64_t r = 0; r < rows; r++) {
            const float *g = pre + 2 * r * F, *u = g + F;
            float *to = h + r * F;
            for (int64_t j = 0; j < F; j++) to[j] = g[j] / (1 + exp_of(-g[j])) * u[j];
        }
}

CLONES void bench_activation_backward(float *dpre, const float *pre, const float *dh, int64_t rows,
                                      int64_t F, bool gated)
{
    if (!gated)
        for (int64_t i = 0; i < rows * F; i++) dpre[i] = pre[i] > 0 ? dh[i] : 0;
    else
        for (int64_t r = 0; r < rows; r++) {
            const float *g = pre + 2 * r * F, *d = dh + r * F;
            float *to = dpre + 2 * r * F;
            for (int64_t j = 0; j < F; j++) {
                float z = g[j], u = g[F + j], s = 1 / (1 + exp_of(-z));
                to[j] = d[j] * u * s * (1 + z * (1 - s));
                to[F + j] = d[j] * z * s;
            }
        }
}

CLONES void bench_scale_row(float *y, float a, const float *x, int64_t n, bool add)
{
    if (add)
        for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
    else
        for (int64_t i = 0; i < n; i++) y[i] = a * x[i];
}

/* In sixteen sums, which is a vector or two of them. */
CLONES float bench_dot(const float *x, const float *y, int64_t n)
{
    float sum[16] = {0}, all = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sum[j] += x[i + j] * y[i + j];
    for (; i < n; i++) all += x[i] * y[i];
    for (int j = 0; j < 16; j++) all += sum[j];
    return all;
}
