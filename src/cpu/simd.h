/* simd.h - one vector of `real` on each instruction set: the only file of src/cpu with intrinsics.
 *
 * vec holds VEC_N elements. v_fma rounds once. Without vector hardware a vec is a small array and the
 * fused multiply-add is the C library's. */
#ifndef MOE_CPU_SIMD_H
#define MOE_CPU_SIMD_H

#include "cpu/real.h"
#include "numeric.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

/* TILE_M x TILE_V vectors of accumulators fit the registers with room for two of b and one of a. */
#if defined(__AVX512F__)
enum { TILE_M = 14, TILE_V = 2 };
#elif defined(__AVX2__) && defined(__FMA__)
enum { TILE_M = 6, TILE_V = 2 };
#elif defined(__aarch64__) && defined(__ARM_NEON)
enum { TILE_M = 8, TILE_V = 3 };
#else
enum { TILE_M = 4, TILE_V = 2 };
#endif

#if defined(__AVX512F__) && defined(MOE_F64)
typedef __m512d vec;
enum { VEC_N = 8 };
static inline vec v_load(const real *p) { return _mm512_loadu_pd(p); }
static inline void v_store(real *p, vec a) { _mm512_storeu_pd(p, a); }
static inline vec v_set1(real a) { return _mm512_set1_pd(a); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__AVX512F__)
typedef __m512 vec;
enum { VEC_N = 16 };
static inline vec v_load(const real *p) { return _mm512_loadu_ps(p); }
static inline void v_store(real *p, vec a) { _mm512_storeu_ps(p, a); }
static inline vec v_set1(real a) { return _mm512_set1_ps(a); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__) && defined(MOE_F64)
typedef __m256d vec;
enum { VEC_N = 4 };
static inline vec v_load(const real *p) { return _mm256_loadu_pd(p); }
static inline void v_store(real *p, vec a) { _mm256_storeu_pd(p, a); }
static inline vec v_set1(real a) { return _mm256_set1_pd(a); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
typedef __m256 vec;
enum { VEC_N = 8 };
static inline vec v_load(const real *p) { return _mm256_loadu_ps(p); }
static inline void v_store(real *p, vec a) { _mm256_storeu_ps(p, a); }
static inline vec v_set1(real a) { return _mm256_set1_ps(a); }
static inline vec v_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__aarch64__) && defined(__ARM_NEON) && defined(MOE_F64)
typedef float64x2_t vec;
enum { VEC_N = 2 };
static inline vec v_load(const real *p) { return vld1q_f64(p); }
static inline void v_store(real *p, vec a) { vst1q_f64(p, a); }
static inline vec v_set1(real a) { return vdupq_n_f64(a); }
static inline vec v_fma(vec a, vec b, vec c) { return vfmaq_f64(c, a, b); }
#elif defined(__aarch64__) && defined(__ARM_NEON)
typedef float32x4_t vec;
enum { VEC_N = 4 };
static inline vec v_load(const real *p) { return vld1q_f32(p); }
static inline void v_store(real *p, vec a) { vst1q_f32(p, a); }
static inline vec v_set1(real a) { return vdupq_n_f32(a); }
static inline vec v_fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
#else
enum { VEC_N = 4 };
typedef struct vec {
    real v[VEC_N];
} vec;
static inline vec v_load(const real *p)
{
    vec r;
    for (int i = 0; i < VEC_N; i++) r.v[i] = p[i];
    return r;
}
static inline void v_store(real *p, vec a)
{
    for (int i = 0; i < VEC_N; i++) p[i] = a.v[i];
}
static inline vec v_set1(real a)
{
    vec r;
    for (int i = 0; i < VEC_N; i++) r.v[i] = a;
    return r;
}
static inline vec v_fma(vec a, vec b, vec c)
{
    vec r;
    for (int i = 0; i < VEC_N; i++) r.v[i] = r_fma(a.v[i], b.v[i], c.v[i]);
    return r;
}
#endif

#endif
