/* select.h - the total order of logits, and the K best of a row by it.
 *
 * Larger values come first, equal values in order of index, NaN after every number. */
#ifndef MOE_CPU_SELECT_H
#define MOE_CPU_SELECT_H

#include "cpu/real.h"
#include "cpu/simd.h"

/* Whether (a, index i) comes before (b, index j). */
static inline int comes_before(real a, int32_t i, real b, int32_t j)
{
    if (a > b) return 1;
    if (a < b) return 0;
    if (a == b) return i < j;
    int a_nan = a != a, b_nan = b != b; /* at least one is */
    return a_nan == b_nan ? i < j : b_nan;
}

/* Restores the heap in ids[0..count) below `at`: a parent comes after its children, so that ids[0]
 * is the last of them all. */
static inline void sift_down(int32_t *ids, int64_t count, int64_t at, const real *v)
{
    for (;;) {
        int64_t last = at;
        for (int64_t child = 2 * at + 1; child < count && child <= 2 * at + 2; child++)
            if (comes_before(v[ids[last]], ids[last], v[ids[child]], ids[child])) last = child;
        if (last == at) return;
        int32_t swap = ids[at];
        ids[at] = ids[last];
        ids[last] = swap;
        at = last;
    }
}

/* The first i in [i, n) at which v[i] comes before an element `worst` of lower index; n if there is
 * none. Nearly all elements of a long row are only compared here, a vector at a time. */
static inline int64_t next_before(const real *v, int64_t i, int64_t n, real worst)
{
    const vec bar = v_set1(worst);
    if (worst != worst) {
        while (i < n && v[i] != v[i]) i++;
        return i;
    }
    for (; i + VEC_N <= n; i += VEC_N) {
        uint32_t above = v_above(v_load(v + i), bar);
        if (above) return i + __builtin_ctz(above);
    }
    if (i < n && n >= VEC_N) { /* the last vector once more, without what was seen */
        uint32_t above = v_above(v_load(v + n - VEC_N), bar) >> (i - (n - VEC_N));
        return above ? i + __builtin_ctz(above) : n;
    }
    while (i < n && !(v[i] > worst)) i++;
    return i;
}

/* Element i of v, whose index is above all of ids[0..at), takes its place among them in order. */
static inline void insert_in_order(int32_t *ids, real *value, int64_t at, const real *v, int64_t i)
{
    for (; at > 0 && comes_before(v[i], (int32_t)i, value[at - 1], ids[at - 1]); at--) {
        ids[at] = ids[at - 1];
        value[at] = value[at - 1];
    }
    ids[at] = (int32_t)i;
    value[at] = v[i];
}

/* As select_top, for so few that a list in order beats a heap. */
enum { SELECT_FEW = 16 };
static inline void select_few(int32_t *ids, int64_t k, const real *v, int64_t n)
{
    real value[SELECT_FEW];
    for (int64_t i = 0; i < k; i++) insert_in_order(ids, value, i, v, i);
    for (int64_t i = next_before(v, k, n, value[k - 1]); i < n;
         i = next_before(v, i + 1, n, value[k - 1]))
        insert_in_order(ids, value, k - 1, v, i);
}

/* ids[0..k) = the first k of v[0..n) in the total order, first to last. 1 <= k <= n. */
static inline void select_top(int32_t *ids, int64_t k, const real *v, int64_t n)
{
    if (k <= SELECT_FEW) {
        select_few(ids, k, v, n);
        return;
    }
    for (int64_t i = 0; i < k; i++) ids[i] = (int32_t)i;
    for (int64_t at = k / 2 - 1; at >= 0; at--) sift_down(ids, k, at, v);
    for (int64_t i = next_before(v, k, n, v[ids[0]]); i < n;
         i = next_before(v, i + 1, n, v[ids[0]])) {
        ids[0] = (int32_t)i;
        sift_down(ids, k, 0, v);
    }
    for (int64_t count = k - 1; count > 0; count--) {
        int32_t last = ids[0];
        ids[0] = ids[count];
        ids[count] = last;
        sift_down(ids, count, 0, v);
    }
}

#endif
