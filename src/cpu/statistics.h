/* statistics.h - the statistics of a routing, and what they share with the losses. */
#ifndef MOE_CPU_STATISTICS_H
#define MOE_CPU_STATISTICS_H

#include "internal.h"
#include "cpu/real.h"
#include "numeric.h"

/* statistics.c: job->entropy_sum, by token_value. */
moe_status MOE_KERNEL(sum_entropy)(moe__losses_job *job);
/* job->stats; importance, load, counts and all sums are there. */
void MOE_KERNEL(statistics)(const moe__losses_job *job);
/* losses.c: sum of token_value in canonical order. */
double MOE_KERNEL(sum_tokens)(const moe__losses_job *job);

static inline int64_t sum_counts(const int64_t *counts, int64_t n)
{
    int64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += counts[i];
    return sum;
}

#endif
