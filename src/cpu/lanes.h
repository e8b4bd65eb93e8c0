/* lanes.h - reductions along a row that do not depend on the width of a vector.
 *
 * 16 lanes, element i in lane i % 16 in ascending i, then the tree (i, i+8), (i, i+4), (i, i+2),
 * (i, i+1). A vector unit of any width up to 16 elements computes exactly that. */
#ifndef MOE_CPU_LANES_H
#define MOE_CPU_LANES_H

#include "cpu/real.h"
#include "cpu/simd.h"
#include "numeric.h"

#include <stdint.h>

static inline real lane_tree(real lane[16])
{
    for (int i = 0; i < 8; i++) lane[i] = lane[i] + lane[i + 8];
    for (int i = 0; i < 4; i++) lane[i] = lane[i] + lane[i + 4];
    for (int i = 0; i < 2; i++) lane[i] = lane[i] + lane[i + 2];
    return lane[0] + lane[1];
}

/* Written in vectors, as what follows: gcc makes 16 scalar chains of the plain loop. */
enum { VECTORS = 16 / VEC_N };

static inline real lane_sum(const real *a, int64_t n)
{
    real lane[16];
    vec sum[VECTORS];
    int64_t i = 0;
    for (int v = 0; v < VECTORS; v++) sum[v] = v_zero();
    for (; i + 16 <= n; i += 16)
        for (int v = 0; v < VECTORS; v++) sum[v] = v_add(sum[v], v_load(a + i + v * VEC_N));
    for (int v = 0; v < VECTORS; v++) v_store(lane + v * VEC_N, sum[v]);
    for (int l = 0; i < n; i++, l++) lane[l] = lane[l] + a[i];
    return lane_tree(lane);
}

/* The largest of a[0..n), n >= 1, but for NaNs after the first element; a[0] if that is one. */
static inline real lane_max(const real *a, int64_t n)
{
    real lane[16], max = a[0];
    vec most[VECTORS];
    int64_t i = 0;
    if (n >= 16) {
        for (int v = 0; v < VECTORS; v++) most[v] = v_set1(max);
        for (; i + 16 <= n; i += 16)
            for (int v = 0; v < VECTORS; v++) most[v] = v_max(v_load(a + i + v * VEC_N), most[v]);
        for (int v = 0; v < VECTORS; v++) v_store(lane + v * VEC_N, most[v]);
        for (int l = 0; l < 16; l++) max = lane[l] > max ? lane[l] : max;
    }
    for (; i < n; i++) max = a[i] > max ? a[i] : max;
    return max;
}

/* Of elements, or of reals. */
V_INLINE real lane_dot_of(const void *a, const void *b, int64_t n, const int wide)
{
    real lane[16];
    vec sum[VECTORS];
    int64_t i = 0;
    for (int v = 0; v < VECTORS; v++) sum[v] = v_set1(R(0.0));
    for (; i + 16 <= n; i += 16)
        for (int v = 0; v < VECTORS; v++)
            sum[v] = v_fma(v_get_at(a, i + v * VEC_N, wide), v_get_at(b, i + v * VEC_N, wide),
                           sum[v]);
    for (int v = 0; v < VECTORS; v++) v_store(lane + v * VEC_N, sum[v]);
    for (int l = 0; i < n; i++, l++)
        lane[l] = r_fma(get_at(a, i, wide), get_at(b, i, wide), lane[l]);
    return lane_tree(lane);
}

static inline real lane_dot(const real *a, const real *b, int64_t n)
{
    return lane_dot_of(a, b, n, 1);
}
static inline real element_dot(const element *a, const element *b, int64_t n)
{
    return lane_dot_of(a, b, n, 0);
}

#endif
