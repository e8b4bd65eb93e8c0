/* ahead.h - asks for the rows of a later token while those of this one are summed.
 *
 * The rows of a token lie anywhere, one for each of its experts, so that the hardware foresees none
 * of them. Includes simd.h. */
#ifndef MOE_CPU_AHEAD_H
#define MOE_CPU_AHEAD_H

#include "internal.h"
#include "cpu/simd.h"

/* Columns of a token that are summed at a time, in registers. */
enum { SUM_VECTORS = 8, STRETCH = SUM_VECTORS * VEC_N };

/* Columns [j, j + width) of the rows of the token that is about 512 elements ahead of t. `wide`:
 * the rows hold reals. */
V_INLINE void look_ahead(const moe__rows_job *job, int64_t t, int64_t j, int64_t width,
                         const int wide)
{
    const moe__plan_arrays *p = job->plan;
    int64_t bytes = width * (WIDE(wide) ? (int64_t)sizeof(real) : (int64_t)sizeof(element));
    int64_t later = t + 1 + 512 / job->width;
    if (later >= p->tokens) return;
    for (int64_t n = p->token_begin[later]; n < p->token_begin[later + 1]; n++) {
        if (p->row_of_entry[n] < 0) continue;
        const char *at = place_at(job->rows_in, p->row_of_entry[n] * job->rows_in_stride + j, wide);
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + b);
    }
}

#endif
