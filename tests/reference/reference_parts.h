/* reference_parts.h - what the files of the reference share. */
#ifndef REFERENCE_PARTS_H
#define REFERENCE_PARTS_H

#include "reference/reference.h"

#include <math.h>
#include <stddef.h>

void *ref__room(int64_t count, size_t size); /* zeroed; ends the program if there is none */

static inline void *room(int64_t count, size_t size) { return ref__room(count, size); }
static inline double *reals(int64_t count) { return ref__room(count, sizeof(double)); }

static inline int64_t groups_of(const ref_problem *p) { return p->group_begin ? p->groups : 1; }
static inline int64_t group_first(const ref_problem *p, int64_t g)
{
    return p->group_begin ? p->group_begin[g] : g * p->T;
}
static inline int masked(const ref_problem *p, int64_t t) { return p->mask && !p->mask[t]; }
static inline const double *gate_row(const ref_problem *p, int64_t t)
{
    return (p->gate_x ? p->gate_x : p->x) + t * p->gate_D;
}

static inline double sigmoid(double z)
{
    return z >= 0 ? 1 / (1 + exp(-z)) : exp(z) / (1 + exp(z));
}
static inline double normal_cdf(double z) { return 0.5 * erfc(-z / sqrt(2.0)); }
static inline double normal_pdf(double z) { return exp(-z * z / 2) / sqrt(8 * atan(1.0)); }

/* Whether expert a comes before b: larger values first, NaN last, then by index. */
static inline int before(const double *v, int32_t a, int32_t b)
{
    if (isnan(v[a]) || isnan(v[b])) return isnan(v[a]) == isnan(v[b]) ? a < b : isnan(v[b]);
    return v[a] != v[b] ? v[a] > v[b] : a < b;
}

/* The number of experts that come before e. */
static inline int64_t rank_of(const double *v, int64_t E, int32_t e)
{
    int64_t rank = 0;
    for (int32_t i = 0; i < E; i++) rank += i != e && before(v, i, e);
    return rank;
}

/* reference_gate.c */
void ref__gate_logits(const ref_problem *p, ref_result *r);
void ref__select_experts(const ref_problem *p, ref_result *r);
void ref__weigh(const ref_problem *p, ref_result *r);
void ref__drop(const ref_problem *p, ref_result *r);
void ref__gate_backward(const ref_problem *p, ref_result *r);

/* reference_losses.c */
double ref__cv2(const double *v, int64_t n, int ddof, double factor, double *dv);
double ref__softmax_row(const ref_problem *p, const double *z, double *P);
void ref__count_all(const ref_problem *p, ref_result *r);
void ref__batch_losses(const ref_problem *p, ref_result *r);
void ref__softmax_losses(const ref_problem *p, ref_result *r);
void ref__sequence_loss(const ref_problem *p, ref_result *r);
void ref__statistics(const ref_problem *p, ref_result *r);
void ref__load_backward(const ref_problem *p, const ref_result *r, int64_t t, const double *d_load,
                        double *d_clean, double *dH, double *d_sd);

/* reference_experts.c */
void ref__run_experts(const ref_problem *p, ref_result *r, int backward);

#endif
