/* philox.h - the library's random numbers: Philox 4x32-10 (Salmon et al., SC 2011), no state.
 *
 * A draw is a pure function of key = the seed and
 *   counter = { stream, step, token, block },   stream = layer | gate << 16 | purpose << 24,
 * layer of 16 bits, gate and purpose of 8; token is the global token number, block = expert / 4,
 * and the number of expert e is element e % 4 of its block. So a micro-batch, a rank and a
 * recompute draw what the whole batch would, on the CPU and on CUDA. Includes numeric.h. */
#ifndef MOE_PHILOX_H
#define MOE_PHILOX_H

#include "numeric.h"

enum moe__purpose {
    MOE__PURPOSE_NOISE = 1,
    MOE__PURPOSE_INIT = 2,
    MOE__PURPOSE_JITTER = 3,
    MOE__PURPOSE_DROP = 4,
    MOE__PURPOSE_HASH = 5,
    MOE__PURPOSE_CHOICE = 6,
    MOE__PURPOSE_PRIMARY = 7, /* noise of the primary gate of two levels */
    MOE__PURPOSE_CHECK = 255  /* what moe_check_gradients draws */
};

MOE_FN uint32_t moe__stream(uint32_t layer, uint32_t gate, uint32_t purpose)
{
    return (layer & 0xffffu) | (gate & 0xffu) << 16 | (purpose & 0xffu) << 24;
}

MOE_FN void moe__counter(uint32_t out[4], uint32_t stream, uint32_t step, uint32_t token,
                         uint32_t block)
{
    out[0] = stream;
    out[1] = step;
    out[2] = token;
    out[3] = block;
}

/* Four random words; the low word of key is the first key word. out may be counter. */
MOE_FN void moe__philox(uint64_t key, const uint32_t counter[4], uint32_t out[4])
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    for (int round = 0; round < 10; round++) {
        uint64_t product0 = (uint64_t)0xd2511f53u * c0;
        uint64_t product1 = (uint64_t)0xcd9e8d57u * c2;
        c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)product1;
        c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)product0;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* ((bits >> 9) + 1/2) / 2^23, exact: in [2^-24, 1 - 2^-24], symmetric about 1/2. */
MOE_FN float moe__uniform_f32(uint32_t bits)
{
    return ((float)(int32_t)(bits >> 9) + 0.5f) * 0x1p-23f;
}

/* Box-Muller: out = r cos(2 pi u2), r sin(2 pi u2), r = sqrt(-2 ln u1), |out| < 5.77. */
MOE_FN void moe__normal2(uint32_t bits1, uint32_t bits2, float out[2])
{
    float s, c;
    float r = moe__sqrt_f32(-2.0f * moe__log_f32(moe__uniform_f32(bits1)));
    moe__sincospi_f32(2.0f * moe__uniform_f32(bits2), &s, &c);
    out[0] = r * c;
    out[1] = r * s;
}

/* Four standard normals: out[0], out[1] of bits[0], bits[1]; out[2], out[3] of bits[2], bits[3]. */
MOE_FN void moe__normal4(const uint32_t bits[4], float out[4])
{
    moe__normal2(bits[0], bits[1], out);
    moe__normal2(bits[2], bits[3], out + 2);
}

#endif
