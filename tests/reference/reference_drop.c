/* reference_drop.c - who gets a row: capacity, the order of consideration, and what is refused. */
#include "reference/reference_parts.h"

#include <stdlib.h>
#include <string.h>

int64_t ref__capacity_of_group(const ref_problem *p, int64_t g)
{
    double T = (double)valid_tokens(p, group_first(p, g), group_first(p, g + 1));
    double K = (double)p->top_k, E = (double)p->E;
    double f = !p->train && p->capacity_factor_eval != 0 ? p->capacity_factor_eval
                                                         : p->capacity_factor;
    if (p->capacity == -2) return INT64_MAX;
    if (p->capacity >= 0) return p->capacity;
    double rows = p->capacity_rounding == 0   ? ceil(f * K * T / E)
                  : p->capacity_rounding == 1 ? floor(f * K * T / E)
                  : p->capacity_rounding == 2 ? floor(f * K * T / E + 0.5)
                  : p->capacity_rounding == 3 ? K * floor(f * ceil(T / E))
                                              : floor(K * ceil(f * T) / E);
    rows = fmax(fmin(rows, T * K), (double)p->capacity_minimum);
    if (p->capacity_multiple > 1)
        rows = ceil(rows / (double)p->capacity_multiple) * (double)p->capacity_multiple;
    return (int64_t)fmin(rows, T * K);
}

/* Whether an entry asks for a row at all. */
static int asks(const ref_problem *p, const ref_result *r, int64_t n)
{
    if (r->ids[n] < 0) return 0;
    if (n % p->K == 0 || p->second_choice == 0) return 1;
    return p->second_choice == 2 && r->w_before[n] > p->second_threshold;
}

/* Whether a and b are in different places of a descending order; *first: a is the first of
 * them. */
static int decides(double a, double b, int *first)
{
    if (isnan(a) || isnan(b)) {
        *first = isnan(b);
        return isnan(a) != isnan(b);
    }
    *first = a > b;
    return a != b;
}

/* Whether entry n is considered before m. */
static int considered_before(const ref_problem *p, const ref_result *r, const double *priority,
                             int64_t n, int64_t m)
{
    int64_t t = n / p->K, u = m / p->K, k = n % p->K, j = m % p->K;
    int first;
    if (p->drop_policy == 3 && decides(r->w_before[n], r->w_before[m], &first)) return first;
    if ((p->drop_policy == 1 || p->drop_policy == 2) && k != j) return k < j;
    if (p->drop_policy == 2 && decides(priority[t], priority[u], &first)) return first;
    return n < m;
}

/* Entries of one group: the rank of each among those that ask for the same expert. */
static void drop_group(const ref_problem *p, ref_result *r, const double *priority, int64_t g)
{
    int64_t first = group_first(p, g) * p->K, last = group_first(p, g + 1) * p->K;
    int64_t capacity = ref__capacity_of_group(p, g), *used = room(p->E, sizeof *used);
    if (p->kind == BALANCED && !p->fixed_weights) capacity = INT64_MAX; /* by thresholds */
    int in_order = p->drop_policy == 0 || capacity == INT64_MAX;
    for (int64_t n = first; n < last; n++) {
        int64_t rank = 0;
        if (!asks(p, r, n)) continue;
        for (int64_t m = first; m < last && !in_order; m++)
            rank += m != n && r->ids[m] == r->ids[n] && asks(p, r, m) &&
                    considered_before(p, r, priority, m, n);
        if (in_order) rank = used[r->ids[n]]++;
        r->keep[n] = rank < capacity;
        r->slot[n] = r->keep[n] ? rank : -1;
    }
    memset(used, 0, (size_t)p->E * sizeof *used);
    for (int64_t n = first; n < last && p->drop_policy == 3; n++)
        if (r->keep[n]) r->slot[n] = used[r->ids[n]]++; /* chosen by weight, placed in order */
    free(used);
}

/* The largest score over all experts. */
static double *priorities(const ref_problem *p, const ref_result *r)
{
    double *priority = reals(p->T), *s = reals(p->E);
    for (int64_t t = 0; t < p->T && p->drop_policy == 2; t++) {
        ref__score_row(p, r, t, s);
        priority[t] = s[0];
        for (int64_t e = 1; e < p->E; e++) priority[t] = fmax(priority[t], s[e]);
    }
    free(s);
    return priority;
}

void ref__drop(const ref_problem *p, ref_result *r)
{
    int all_kept = !p->fixed_weights &&
                   (p->kind == EXPERT_CHOICE || (p->kind == BALANCED && p->train));
    double *priority = priorities(p, r);
    for (int64_t n = 0; n < p->T * p->K && all_kept; n++) r->keep[n] = r->ids[n] >= 0;
    for (int64_t g = 0; g < groups_of(p) && !all_kept; g++) drop_group(p, r, priority, g);
    for (int64_t n = 0; n < p->T * p->K && p->fixed_keep; n++) r->keep[n] = p->fixed_keep[n];
    for (int64_t t = 0; t < p->T; t++) {
        double sum = 0;
        for (int64_t n = t * p->K; n < (t + 1) * p->K; n++)
            sum += r->w[n] = r->keep[n] ? r->w_before[n] : 0;
        sum = fmax(sum, p->renormalize_minimum);
        for (int64_t n = t * p->K; n < (t + 1) * p->K && p->renormalize_after_drop; n++)
            r->w[n] = sum != 0 ? r->w[n] / sum : 0;
    }
    free(priority);
}
