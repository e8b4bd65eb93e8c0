/* elements.h - elements of a storage type as floats, one or 16 bytes of them at a time; and the
 * work of a step cut into warps: each has one token and a stretch of its columns. */
#ifndef MOE_CUDA_ELEMENTS_H
#define MOE_CUDA_ELEMENTS_H

#include "backend_cuda.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

/* As half.h has it; on the device by an instruction where there is one, since a dozen integer
 * operations for each element would take longer than its 2 bytes. Only what a NaN carries
 * differs. */
MOE_DEVICE float moe_widen(float v) { return v; }
MOE_DEVICE float moe_widen(moe_bf16 v) { return moe__from_bf16(v.bits); }
MOE_DEVICE float moe_widen(moe_f16 v)
{
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(v.bits));
#else
    return moe__from_f16(v.bits);
#endif
}

MOE_DEVICE void moe_narrow(float *out, float v) { *out = v; }
MOE_DEVICE void moe_narrow(moe_bf16 *out, float v)
{
#ifdef __CUDA_ARCH__
    out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
#else
    out->bits = moe__to_bf16(v);
#endif
}
MOE_DEVICE void moe_narrow(moe_f16 *out, float v)
{
#ifdef __CUDA_ARCH__
    out->bits = __half_as_ushort(__float2half_rn(v));
#else
    out->bits = moe__to_f16(v);
#endif
}

/* N elements that move together: 1, or 16 bytes of them at an address that is a multiple of 16.
 * They stay words until they are widened: compilers store an array of elements one by one. */
template <typename T, int N> struct moe_pack {
    uint4 bits;
};
template <typename T> struct moe_pack<T, 1> {
    T v;
};

template <typename T> MOE_DEVICE void moe_load_pack(moe_pack<T, 1> *pack, const T *p)
{
    pack->v = *p;
}
template <typename T, int N> MOE_DEVICE void moe_load_pack(moe_pack<T, N> *pack, const T *p)
{
    pack->bits = moe_load16(p);
}
template <typename T> MOE_DEVICE void moe_store_pack(T *p, const moe_pack<T, 1> &pack)
{
    *p = pack.v;
}
template <typename T, int N> MOE_DEVICE void moe_store_pack(T *p, const moe_pack<T, N> &pack)
{
    moe_store16(p, pack.bits);
}

/* v[N] of a pack */
template <typename T> MOE_DEVICE void moe_widen_pair(float *v, uint32_t word)
{
    T low = {(uint16_t)word}, high = {(uint16_t)(word >> 16)};
    v[0] = moe_widen(low);
    v[1] = moe_widen(high);
}
template <typename T> MOE_DEVICE void moe_widen_pack(float *v, const moe_pack<T, 1> &pack)
{
    v[0] = moe_widen(pack.v);
}
template <typename T> MOE_DEVICE void moe_widen_pack(float *v, const moe_pack<T, 8> &pack)
{
    moe_widen_pair<T>(v, pack.bits.x);
    moe_widen_pair<T>(v + 2, pack.bits.y);
    moe_widen_pair<T>(v + 4, pack.bits.z);
    moe_widen_pair<T>(v + 6, pack.bits.w);
}
MOE_DEVICE void moe_widen_pack(float *v, const moe_pack<float, 4> &pack)
{
    v[0] = moe__from_bits_f32(pack.bits.x);
    v[1] = moe__from_bits_f32(pack.bits.y);
    v[2] = moe__from_bits_f32(pack.bits.z);
    v[3] = moe__from_bits_f32(pack.bits.w);
}

/* a pack of v[N] */
template <typename T> MOE_DEVICE uint32_t moe_narrow_pair(const float *v)
{
    T low, high;
    moe_narrow(&low, v[0]);
    moe_narrow(&high, v[1]);
    return low.bits | (uint32_t)high.bits << 16;
}
template <typename T> MOE_DEVICE void moe_narrow_pack(moe_pack<T, 1> *pack, const float *v)
{
    moe_narrow(&pack->v, v[0]);
}
template <typename T> MOE_DEVICE void moe_narrow_pack(moe_pack<T, 8> *pack, const float *v)
{
    pack->bits.x = moe_narrow_pair<T>(v);
    pack->bits.y = moe_narrow_pair<T>(v + 2);
    pack->bits.z = moe_narrow_pair<T>(v + 4);
    pack->bits.w = moe_narrow_pair<T>(v + 6);
}
MOE_DEVICE void moe_narrow_pack(moe_pack<float, 4> *pack, const float *v)
{
    pack->bits.x = moe__bits_f32(v[0]);
    pack->bits.y = moe__bits_f32(v[1]);
    pack->bits.z = moe__bits_f32(v[2]);
    pack->bits.w = moe__bits_f32(v[3]);
}

/* Elements in 16 bytes. */
template <typename T> struct moe_pack_of {
    static const int N = 16 / (int)sizeof(T);
};

/* Whether rows of a matrix can be moved in 16 bytes; one that is not there can. */
template <typename T> static inline bool moe_rows_aligned(const void *data, int64_t stride)
{
    return ((uintptr_t)data & 15) == 0 && stride % moe_pack_of<T>::N == 0;
}

/* ---- a warp for each token and stretch of columns -------------------------------------------- */

enum { MOE_STRETCH_WARPS = 8 }; /* of a block */

/* Packs of N elements that a lane has: at most 16 floats, for more registers leave room for fewer
 * warps. */
#define MOE_PACKS(N) ((N) == 8 ? 2 : 4)

/* Stretches of all tokens, by token and then by column, of packs of N elements. */
struct moe_stretches {
    int64_t tokens, width, per_token;
};

static inline moe_stretches moe_cut(int64_t tokens, int64_t width, int N)
{
    int64_t columns = (int64_t)32 * N * MOE_PACKS(N);
    moe_stretches s = {tokens, width, (width + columns - 1) / columns};
    return s;
}

static inline dim3 moe_stretch_grid(const moe_stretches &s)
{
    int64_t warps = s.tokens * s.per_token;
    int64_t blocks = (warps + MOE_STRETCH_WARPS - 1) / MOE_STRETCH_WARPS;
    return dim3((unsigned)(blocks < 0x7fffffff ? blocks : 0x7fffffff));
}

static inline dim3 moe_stretch_block() { return dim3(32 * MOE_STRETCH_WARPS); }

/* The first of this warp, how far it is to its next, and how many there are. */
MOE_DEVICE int64_t moe_first_stretch()
{
    return (int64_t)blockIdx.x * MOE_STRETCH_WARPS + threadIdx.x / 32;
}
MOE_DEVICE int64_t moe_next_stretch() { return (int64_t)gridDim.x * MOE_STRETCH_WARPS; }

/* Column of this lane's pack u of stretch i of a token. */
template <int N> MOE_DEVICE int64_t moe_column(int64_t i, int u)
{
    return ((i * MOE_PACKS(N) + u) * 32 + threadIdx.x % 32) * N;
}

/* This lane's packs of a stretch of a row; those beyond the width are 0 or left alone. */
template <typename T, int N>
MOE_DEVICE void moe_load_stretch(moe_pack<T, N> *pack, const T *row, int64_t i, int64_t width)
{
    MOE_UNROLLED
    for (int u = 0; u < MOE_PACKS(N); u++) {
        int64_t j = moe_column<N>(i, u);
        moe_pack<T, N> zero = {};
        pack[u] = zero;
        if (j < width) moe_load_pack(&pack[u], row + j);
    }
}
template <typename T, int N>
MOE_DEVICE void moe_store_stretch(T *row, const moe_pack<T, N> *pack, int64_t i, int64_t width)
{
    MOE_UNROLLED
    for (int u = 0; u < MOE_PACKS(N); u++) {
        int64_t j = moe_column<N>(i, u);
        if (j < width) moe_store_pack(row + j, pack[u]);
    }
}

/* The same as floats. */
template <typename T, int N>
MOE_DEVICE void moe_widen_stretch(float (*v)[N], const T *row, int64_t i, int64_t width)
{
    moe_pack<T, N> pack[MOE_PACKS(N)];
    moe_load_stretch<T, N>(pack, row, i, width);
    MOE_UNROLLED
    for (int u = 0; u < MOE_PACKS(N); u++) moe_widen_pack(v[u], pack[u]);
}
template <typename T, int N>
MOE_DEVICE void moe_narrow_packs(moe_pack<T, N> *pack, const float (*v)[N])
{
    MOE_UNROLLED
    for (int u = 0; u < MOE_PACKS(N); u++) moe_narrow_pack(&pack[u], v[u]);
}
template <typename T, int N>
MOE_DEVICE void moe_narrow_stretch(T *row, const float (*v)[N], int64_t i, int64_t width)
{
    moe_pack<T, N> pack[MOE_PACKS(N)];
    moe_narrow_packs<T, N>(pack, v);
    moe_store_stretch<T, N>(row, pack, i, width);
}

/* v[u][k] = expression of u and k */
#define MOE_EACH(v, N, expression)                                  \
    do {                                                            \
        MOE_UNROLLED                                                \
        for (int u = 0; u < MOE_PACKS(N); u++) {                    \
            MOE_UNROLLED                                            \
            for (int k = 0; k < (N); k++) (v)[u][k] = (expression); \
        }                                                           \
    } while (0)

/* ---- rows of an entry ------------------------------------------------------------------------ */

/* Where the row of entry n lies, or -1: in padded arrays row r of expert e is e C + r -
 * expert_begin[e], and no row is beyond C. */
MOE_DEVICE int64_t moe_place_of_entry(const moe__plan_arrays &p, int64_t n, int64_t padded_rows)
{
    int64_t row = p.row_of_entry[n];
    if (row < 0 || padded_rows == 0) return row;
    int64_t e = p.expert_of_entry[n], place = row - p.expert_begin[e];
    return place < padded_rows ? e * padded_rows + place : -1;
}

/* A warp looks at 32 entries of its token at once: place of entry first + lane, -1 from end on. */
MOE_DEVICE int64_t moe_place_of_lane(const moe__plan_arrays &p, int64_t first, int64_t end,
                                     int64_t padded_rows)
{
    int64_t n = first + threadIdx.x % 32;
    return n < end ? moe_place_of_entry(p, n, padded_rows) : -1;
}

MOE_DEVICE int moe_lanes_used(int64_t first, int64_t end)
{
    return end - first < 32 ? (int)(end - first) : 32;
}

/* ---- looking up ------------------------------------------------------------------------------ */

/* The token of entry n. Where all tokens have the same number of entries the first guess is it. */
MOE_DEVICE int64_t moe_token_of_entry(const moe__plan_arrays &p, int64_t n)
{
    int64_t K = p.entries / p.tokens, guess = K > 0 ? n / K : 0;
    if (guess < p.tokens && p.token_begin[guess] <= n && n < p.token_begin[guess + 1]) return guess;
    return moe_range_of(p.token_begin, p.tokens, n);
}

#endif
