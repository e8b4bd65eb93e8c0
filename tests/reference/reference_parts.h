/* reference_parts.h - what the files of the reference share. */
#ifndef REFERENCE_PARTS_H
#define REFERENCE_PARTS_H

#include "reference/reference.h"

#include <math.h>
#include <stddef.h>

/* MOE_GATE_*, written out: the reference knows no header of the library. */
enum { TOP_K, NOISY, DENSE, BALANCED, HIERARCHICAL, EXPERT_CHOICE, HASH, SINKHORN };

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
static inline int64_t valid_tokens(const ref_problem *p, int64_t first, int64_t last)
{
    int64_t count = 0;
    for (int64_t t = first; t < last; t++) count += !masked(p, t);
    return count;
}

static inline double sigmoid(double z)
{
    return z >= 0 ? 1 / (1 + exp(-z)) : exp(z) / (1 + exp(z));
}
static inline double softplus(double z) { return z > 30 ? z : log1p(exp(z)); }
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

/* One row of a noisy gate over n candidates, as its load sees it. */
typedef struct load_row {
    int64_t n;
    const double *clean, *H, *sd;
    const int *chosen; /* [n] */
    const double *w;   /* [n] weights */
} load_row;

/* reference_gate.c */
void ref__gate_logits(const ref_problem *p, ref_result *r);
void ref__weigh(const ref_problem *p, ref_result *r);
void ref__gate_backward(const ref_problem *p, ref_result *r);
/* Gradient by the weights before dropping, of one token; adds that of importance. */
void ref__drop_backward(const ref_problem *p, const ref_result *r, int64_t t,
                        const double *d_importance, double *dw);

/* reference_choose.c */
void ref__select_experts(const ref_problem *p, ref_result *r);
/* Scores of every expert at a token: softmax or sigmoid of the clean logits. */
void ref__score_row(const ref_problem *p, const ref_result *r, int64_t t, double *s);

/* reference_drop.c */
int64_t ref__capacity_of_group(const ref_problem *p, int64_t g);
void ref__drop(const ref_problem *p, ref_result *r);

/* reference_levels.c: the gate of kind HIERARCHICAL, up to the weights, and back from them. */
void ref__levels_forward(const ref_problem *p, ref_result *r);
void ref__levels_load(const ref_problem *p, ref_result *r);
void ref__levels_backward(const ref_problem *p, ref_result *r);

/* reference_load.c */
double ref__load_of(const load_row *row, double guard, int64_t e);
/* Adds to d_clean, dH and d_sd. */
void ref__load_backward(const load_row *row, double guard, const double *d_load, double *d_clean,
                        double *dH, double *d_sd);

/* reference_losses.c */
double ref__cv2(const double *v, int64_t n, int ddof, double factor, double *dv);
double ref__softmax_row(const double *z, int64_t n, double *P);
void ref__count_all(const ref_problem *p, ref_result *r);
/* The row of a flat noisy gate; chosen and w are room for E. */
load_row ref__row_of(const ref_problem *p, const ref_result *r, int64_t t, int *chosen, double *w);
void ref__batch_losses(const ref_problem *p, ref_result *r);
void ref__softmax_losses(const ref_problem *p, ref_result *r);
void ref__sequence_loss(const ref_problem *p, ref_result *r);
void ref__threshold_loss(const ref_problem *p, ref_result *r);
void ref__statistics(const ref_problem *p, ref_result *r);

/* reference_experts.c */
typedef struct expert_state {
    double *x, *z1, *z3, *h, *h_in, *slope1, *slope3, *out, *dz, *dh, *dx_in;
} expert_state;

expert_state ref__new_state(const ref_problem *p);
void ref__free_state(expert_state *s);
/* out of expert e at x, with what its weight w does inside it. */
void ref__expert_forward(const ref_problem *p, const ref_pool *q, int64_t e, const double *x,
                         double w, expert_state *s);
/* After that forward: dy is the gradient by the expert's contribution; adds to dx and to the
 * parameters' gradients and returns the gradient by w. */
double ref__expert_backward(const ref_problem *p, const ref_pool *q, ref_pool_gradient *g,
                            int64_t e, const double *x, double w, const double *dy, double *dx,
                            expert_state *s);

/* reference_layer.c */
void ref__run_layer(const ref_problem *p, ref_result *r, int backward);

#endif
