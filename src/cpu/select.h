/* select.h - the total order of logits, and the K best of a row by it.
 *
 * Larger values come first, equal values in order of index, NaN after every number. */
#ifndef MOE_CPU_SELECT_H
#define MOE_CPU_SELECT_H

#include "cpu/real.h"

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

/* ids[0..k) = the first k of v[0..n) in the total order, first to last. 1 <= k <= n. */
static inline void select_top(int32_t *ids, int64_t k, const real *v, int64_t n)
{
    for (int64_t i = 0; i < k; i++) ids[i] = (int32_t)i;
    for (int64_t at = k / 2 - 1; at >= 0; at--) sift_down(ids, k, at, v);
    for (int64_t i = k; i < n; i++)
        if (comes_before(v[i], (int32_t)i, v[ids[0]], ids[0])) {
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
