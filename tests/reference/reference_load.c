/* reference_load.c - the smooth load of one row of a noisy gate, and its gradient. */
#include "reference/reference_parts.h"

/* The threshold of candidate e: the best other one if it was chosen, else the worst chosen. -1 if
 * there is none. */
static int64_t threshold(const load_row *row, int64_t e)
{
    int32_t found = -1;
    int inside = row->chosen[e];
    for (int32_t i = 0; i < row->n; i++) {
        if (row->chosen[i] == inside) continue;
        int better = found < 0 || before(row->H, i, found);
        if (found < 0 || better == inside) found = i;
    }
    return found;
}

/* Whether every candidate is chosen: the load is then a count without gradient. */
static int all_chosen(const load_row *row)
{
    for (int64_t e = 0; e < row->n; e++)
        if (!row->chosen[e]) return 0;
    return 1;
}

double ref__load_of(const load_row *row, double guard, int64_t e)
{
    if (all_chosen(row)) return row->w[e] > 0;
    int64_t thr = threshold(row, e);
    if (thr < 0) return 0;
    double d = row->clean[e] - row->H[thr];
    double divisor = sqrt(2.0) * row->sd[e] + guard;
    if (divisor == 0) return d > 0 ? 1 : d < 0 ? 0 : 0.5;
    return 0.5 * (1 + erf(d / divisor));
}

void ref__load_backward(const load_row *row, double guard, const double *d_load, double *d_clean,
                        double *dH, double *d_sd)
{
    if (all_chosen(row)) return;
    for (int64_t e = 0; e < row->n; e++) {
        int64_t thr = threshold(row, e);
        if (thr < 0 || row->sd[e] <= 0) continue;
        double divisor = sqrt(2.0) * row->sd[e] + guard;
        double q = (row->clean[e] - row->H[thr]) / divisor;
        double slope = d_load[e] * exp(-q * q) / sqrt(4 * atan(1.0)) / divisor;
        d_clean[e] += slope;
        dH[thr] -= slope;
        d_sd[e] -= slope * q * sqrt(2.0);
    }
}
