/* simd.h - one vector of `real` on each instruction set: the only file of src/cpu with intrinsics.
 *
 * vec holds VEC_N elements. v_load and v_store need no alignment; v_stream does, goes past the
 * caches where there is a way, and is seen by other threads after a v_fence. v_fma(a,b,c) = a b + c
 * rounds once. v_max(a,b) = a > b ? a : b, so b where one is a NaN; bit i of v_above(a,b) is a > b
 * of element i. v_zip_low(a,b) = a0 b0 a1 b1 .. of the lower halves, v_zip_high of the upper ones.
 * Without vector hardware a vec is a small array and the fused multiply-add is the C library's.
 * TILE_M x TILE_V vectors of accumulators fit the registers with room for TILE_V of b and one of
 * a. */
#ifndef MOE_CPU_SIMD_H
#define MOE_CPU_SIMD_H

#include "cpu/real.h"
#include "numeric.h"

/* Arrays of vec stay in registers only if every loop over them is unrolled. */
#ifdef __clang__
#define V_UNROLL _Pragma("clang loop unroll(full)")
#else
#define V_UNROLL _Pragma("GCC unroll 16")
#endif
#define V_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#include <immintrin.h>
#define TILE_M 14
#define TILE_V 2
#ifdef MOE_F64
#define VEC_N 8
typedef __m512d vec;
V_INLINE vec v_load(const real *p) { return _mm512_loadu_pd(p); }
V_INLINE void v_store(real *p, vec a) { _mm512_storeu_pd(p, a); }
V_INLINE void v_stream(real *p, vec a) { _mm512_stream_pd(p, a); }
V_INLINE vec v_set1(real a) { return _mm512_set1_pd(a); }
V_INLINE vec v_add(vec a, vec b) { return _mm512_add_pd(a, b); }
V_INLINE vec v_sub(vec a, vec b) { return _mm512_sub_pd(a, b); }
V_INLINE vec v_mul(vec a, vec b) { return _mm512_mul_pd(a, b); }
V_INLINE vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_pd(a, b, c); }
V_INLINE vec v_max(vec a, vec b) { return _mm512_max_pd(a, b); }
V_INLINE uint32_t v_above(vec a, vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
V_INLINE vec v_zip_low(vec a, vec b)
{
    return _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
}
V_INLINE vec v_zip_high(vec a, vec b)
{
    return _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b);
}
#else
#define VEC_N 16
typedef __m512 vec;
V_INLINE vec v_load(const real *p) { return _mm512_loadu_ps(p); }
V_INLINE void v_store(real *p, vec a) { _mm512_storeu_ps(p, a); }
V_INLINE void v_stream(real *p, vec a) { _mm512_stream_ps(p, a); }
V_INLINE vec v_set1(real a) { return _mm512_set1_ps(a); }
V_INLINE vec v_add(vec a, vec b) { return _mm512_add_ps(a, b); }
V_INLINE vec v_sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
V_INLINE vec v_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
V_INLINE vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
V_INLINE vec v_max(vec a, vec b) { return _mm512_max_ps(a, b); }
V_INLINE uint32_t v_above(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
V_INLINE vec v_zip_low(vec a, vec b)
{
    const __m512i from = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a, from, b);
}
V_INLINE vec v_zip_high(vec a, vec b)
{
    const __m512i from = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                           31);
    return _mm512_permutex2var_ps(a, from, b);
}
#endif

#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define TILE_M 6
#define TILE_V 2
#ifdef MOE_F64
#define VEC_N 4
typedef __m256d vec;
V_INLINE vec v_load(const real *p) { return _mm256_loadu_pd(p); }
V_INLINE void v_store(real *p, vec a) { _mm256_storeu_pd(p, a); }
V_INLINE void v_stream(real *p, vec a) { _mm256_stream_pd(p, a); }
V_INLINE vec v_set1(real a) { return _mm256_set1_pd(a); }
V_INLINE vec v_add(vec a, vec b) { return _mm256_add_pd(a, b); }
V_INLINE vec v_sub(vec a, vec b) { return _mm256_sub_pd(a, b); }
V_INLINE vec v_mul(vec a, vec b) { return _mm256_mul_pd(a, b); }
V_INLINE vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_pd(a, b, c); }
V_INLINE vec v_max(vec a, vec b) { return _mm256_max_pd(a, b); }
V_INLINE uint32_t v_above(vec a, vec b)
{
    return (uint32_t)_mm256_movemask_pd(_mm256_cmp_pd(a, b, _CMP_GT_OQ));
}
V_INLINE vec v_zip_low(vec a, vec b)
{
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x20);
}
V_INLINE vec v_zip_high(vec a, vec b)
{
    return _mm256_permute2f128_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b), 0x31);
}
#else
#define VEC_N 8
typedef __m256 vec;
V_INLINE vec v_load(const real *p) { return _mm256_loadu_ps(p); }
V_INLINE void v_store(real *p, vec a) { _mm256_storeu_ps(p, a); }
V_INLINE void v_stream(real *p, vec a) { _mm256_stream_ps(p, a); }
V_INLINE vec v_set1(real a) { return _mm256_set1_ps(a); }
V_INLINE vec v_add(vec a, vec b) { return _mm256_add_ps(a, b); }
V_INLINE vec v_sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
V_INLINE vec v_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
V_INLINE vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
V_INLINE vec v_max(vec a, vec b) { return _mm256_max_ps(a, b); }
V_INLINE uint32_t v_above(vec a, vec b)
{
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
V_INLINE vec v_zip_low(vec a, vec b)
{
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
}
V_INLINE vec v_zip_high(vec a, vec b)
{
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
}
#endif

#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define TILE_M 8
#define TILE_V 2
#ifdef MOE_F64
#define VEC_N 2
typedef float64x2_t vec;
V_INLINE vec v_load(const real *p) { return vld1q_f64(p); }
V_INLINE void v_store(real *p, vec a) { vst1q_f64(p, a); }
V_INLINE vec v_set1(real a) { return vdupq_n_f64(a); }
V_INLINE vec v_add(vec a, vec b) { return vaddq_f64(a, b); }
V_INLINE vec v_sub(vec a, vec b) { return vsubq_f64(a, b); }
V_INLINE vec v_mul(vec a, vec b) { return vmulq_f64(a, b); }
V_INLINE vec v_fma(vec a, vec b, vec c) { return vfmaq_f64(c, a, b); }
V_INLINE vec v_max(vec a, vec b) { return vbslq_f64(vcgtq_f64(a, b), a, b); }
V_INLINE uint32_t v_above(vec a, vec b)
{
    uint64x2_t above = vcgtq_f64(a, b);
    return (uint32_t)((vgetq_lane_u64(above, 0) & 1) | (vgetq_lane_u64(above, 1) & 2));
}
V_INLINE vec v_zip_low(vec a, vec b) { return vzip1q_f64(a, b); }
V_INLINE vec v_zip_high(vec a, vec b) { return vzip2q_f64(a, b); }
#else
#define VEC_N 4
typedef float32x4_t vec;
V_INLINE vec v_load(const real *p) { return vld1q_f32(p); }
V_INLINE void v_store(real *p, vec a) { vst1q_f32(p, a); }
V_INLINE vec v_set1(real a) { return vdupq_n_f32(a); }
V_INLINE vec v_add(vec a, vec b) { return vaddq_f32(a, b); }
V_INLINE vec v_sub(vec a, vec b) { return vsubq_f32(a, b); }
V_INLINE vec v_mul(vec a, vec b) { return vmulq_f32(a, b); }
V_INLINE vec v_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
V_INLINE vec v_max(vec a, vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
V_INLINE uint32_t v_above(vec a, vec b)
{
    const uint32_t bit[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgtq_f32(a, b), vld1q_u32(bit)));
}
V_INLINE vec v_zip_low(vec a, vec b) { return vzip1q_f32(a, b); }
V_INLINE vec v_zip_high(vec a, vec b) { return vzip2q_f32(a, b); }
#endif

#else
#define TILE_M 4
#define TILE_V 2
#ifdef MOE_F64
#define VEC_N 2
#else
#define VEC_N 4
#endif
typedef struct vec {
    real v[VEC_N];
} vec;
#define V_EACH(type_and_name, expression)                    \
    V_INLINE vec type_and_name                               \
    {                                                        \
        vec r;                                               \
        for (int i = 0; i < VEC_N; i++) r.v[i] = expression; \
        return r;                                            \
    }
V_EACH(v_load(const real *p), p[i])
V_EACH(v_set1(real a), a)
V_EACH(v_add(vec a, vec b), a.v[i] + b.v[i])
V_EACH(v_sub(vec a, vec b), a.v[i] - b.v[i])
V_EACH(v_mul(vec a, vec b), a.v[i] * b.v[i])
V_EACH(v_fma(vec a, vec b, vec c), r_fma(a.v[i], b.v[i], c.v[i]))
V_EACH(v_max(vec a, vec b), a.v[i] > b.v[i] ? a.v[i] : b.v[i])
V_EACH(v_zip_low(vec a, vec b), (i % 2 ? b : a).v[i / 2])
V_EACH(v_zip_high(vec a, vec b), (i % 2 ? b : a).v[VEC_N / 2 + i / 2])
#undef V_EACH
V_INLINE void v_store(real *p, vec a)
{
    for (int i = 0; i < VEC_N; i++) p[i] = a.v[i];
}
V_INLINE uint32_t v_above(vec a, vec b)
{
    uint32_t above = 0;
    for (int i = 0; i < VEC_N; i++) above |= (uint32_t)(a.v[i] > b.v[i]) << i;
    return above;
}
#endif

#if defined(__AVX2__)
V_INLINE void v_fence(void) { _mm_sfence(); }
#else
V_INLINE void v_stream(real *p, vec a) { v_store(p, a); }
V_INLINE void v_fence(void) {}
#endif

V_INLINE vec v_zero(void) { return v_set1(R(0.0)); }

/* VEC_N elements. */
#ifndef MOE_HALF
V_INLINE vec v_get(const element *p) { return v_load(p); }
#elif defined(__AVX512F__) && defined(MOE_BF16)
V_INLINE vec v_get(const element *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
#elif defined(__AVX512F__)
V_INLINE vec v_get(const element *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
#elif defined(__AVX2__) && defined(MOE_BF16)
V_INLINE vec v_get(const element *p)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
#else
V_INLINE vec v_get(const element *p)
{
    real wide[VEC_N];
    for (int i = 0; i < VEC_N; i++) wide[i] = get(p[i]);
    return v_load(wide);
}
#endif

/* Elements i to i + VEC_N - 1 of memory that holds elements, or reals if `wide`. */
V_INLINE vec v_get_at(const void *memory, int64_t i, int wide)
{
    return WIDE(wide) ? v_load((const real *)memory + i) : v_get((const element *)memory + i);
}

/* Stores VEC_N elements as put() rounds them. */
V_INLINE void v_put(element *p, vec a)
{
#ifdef MOE_HALF
    real wide[VEC_N];
    v_store(wide, a);
    for (int i = 0; i < VEC_N; i++) p[i] = put(wide[i]);
#else
    v_store(p, a);
#endif
}

V_INLINE void v_put_at(void *memory, int64_t i, int wide, vec a)
{
    if (WIDE(wide))
        v_store((real *)memory + i, a);
    else
        v_put((element *)memory + i, a);
}

/* Rows t[0 .. VEC_N-1] become columns: zipping row i with row i + VEC_N/2 log2(VEC_N) times. */
V_INLINE void v_transpose(vec *t)
{
    vec u[VEC_N];
    V_UNROLL
    for (int width = 1; width < VEC_N; width *= 2) {
        V_UNROLL
        for (int i = 0; i < VEC_N; i++) u[i] = t[i];
        V_UNROLL
        for (int i = 0; i < VEC_N / 2; i++) {
            t[2 * i] = v_zip_low(u[i], u[i + VEC_N / 2]);
            t[2 * i + 1] = v_zip_high(u[i], u[i + VEC_N / 2]);
        }
    }
}

#endif
