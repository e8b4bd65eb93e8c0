/* reference.h - the layer in double precision, token by token and expert by expert, as a yardstick.
 *
 * Shares no code with the library: plain loops over T and E, the C library's functions, arrays as
 * the formulas of docs/numerics.md name them. Forward and complete backward of
 *
 *     L = sum(y * dy) + sum(weight_grad * w) + sum_i factor_i loss_i */
#ifndef REFERENCE_H
#define REFERENCE_H

#include <stdint.h>

enum { REF_LOSSES = 6 }; /* importance, load, switch, gshard, z, sequence: in the library's order */
enum { REF_STATS = 10 }; /* MOE_STAT_*, in the library's order */

/* A layer and a batch. Arrays are dense, row-major, double. */
typedef struct ref_problem {
    int64_t T, D, E, F, O, K, gate_D;
    int kind;                      /* 0 top-k, 1 noisy top-k, 2 softmax over all */
    int score, order, renormalize; /* 1: sigmoid; 1: score first; 1: divide by the sum */
    double renormalize_epsilon, route_scale, noise_epsilon, cdf_guard;
    int train, cv_ddof, sequence_softmax, sequence_routed;
    int64_t capacity; /* rows of an expert and group; -1: a factor, -2: none */
    double capacity_factor;
    int capacity_rounding; /* 0 up, 1 down, 2 nearest */
    int64_t capacity_minimum;
    int renormalize_after_drop;
    int activation; /* the library's number */
    int expert_sigmoid, layer_sigmoid;
    double weight[REF_LOSSES]; /* of the losses */
    double factor[REF_LOSSES]; /* of their gradients */
    int64_t groups;
    const int64_t *group_begin; /* [groups+1] or NULL */
    const uint8_t *mask;        /* [T] or NULL */
    const double *x, *gate_x;   /* [T,D], [T,gate_D]; gate_x NULL: x */
    const double *logits_in;    /* [T,E] or NULL */
    const double *noise;        /* [T,E] */
    const double *Wg, *bg, *Wn; /* [gate_D,E], [E] or NULL, [gate_D,E] or NULL */
    const double *W1, *b1, *W3, *b3, *W2,
        *b2;                   /* [E,D,F] [E,F] ... [E,F,O] [E,O]; biases may be NULL */
    const double *dy;          /* [T,O] or NULL: no experts */
    const double *weight_grad; /* [T,K] or NULL */
    const int32_t
        *fixed_ids; /* [T,K] selection to keep, or NULL; -1: none, an expert may come twice */
    const double *fixed_weights; /* [T,K] their weights: the gate does not run; or NULL */
} ref_problem;

typedef struct ref_result {
    double *logits, *H, *sd;        /* [T,E] */
    int32_t *ids;                   /* [T,K], -1 for masked tokens */
    double *w_before, *w;           /* [T,K] */
    int *keep;                      /* [T,K] */
    double *importance, *load;      /* [E] */
    int64_t *counts;                /* [E] before dropping */
    double loss[REF_LOSSES], total; /* weighted losses; L with dy, weight_grad and factors */
    double stats[REF_STATS];
    double *y; /* [T,O] */
    double *dx, *d_gate_x, *d_logits,
        *d_w; /* [T,D], [T,gate_D], [T,E], [T,K] by the kept weights */
    double *dWg, *dbg, *dWn, *dW1, *db1, *dW3, *db3, *dW2, *db2;
} ref_result;

/* Computes everything. `r` is filled with memory that ref_free gives back. With no dy the experts
 * are left out. Only the forward if `backward` is 0. */
void ref_run(const ref_problem *p, ref_result *r, int backward);
void ref_free(ref_result *r);

#endif
