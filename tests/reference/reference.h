/* reference.h - the layer in double precision, token by token and expert by expert, as a yardstick.
 *
 * Shares no code with the library: plain loops over T and E, the C library's functions, arrays as
 * the formulas of docs/numerics.md name them. Forward and complete backward of
 *
 *     L = sum(y * dy) + sum(weight_grad * w) + sum_i factor_i loss_i
 *
 * A token has K slots for entries, in order of choice; a slot without an expert has the id -1.
 * Where the number of entries varies, a token's entries come first and K is the most there may
 * be. */
#ifndef REFERENCE_H
#define REFERENCE_H

#include <stdint.h>

/* importance, load, switch, gshard, z, sequence, threshold: in the library's order */
enum { REF_LOSSES = 7 };
enum { REF_STATS = 10 }; /* MOE_STAT_*, in the library's order */

/* Experts of one shape. Biases and, without a gated activation, W3 may be NULL. */
typedef struct ref_pool {
    int64_t E, F;
    int activation;              /* the library's number */
    int sigmoid;                 /* 1: of each expert's output */
    int position;                /* what the weight multiplies: 0 output, 1 hidden, 2 input */
    double alpha, limit, offset; /* of SwiGLU; 0: plain */
    double (*stored)(
        double z); /* rounds z1 and z3 as a layer of 16 bits does, which decides on which
                                    side of a limit they are; NULL: not */
    const double *W1, *b1, *W3, *b3, *W2, *b2; /* [E,D,F] [E,F] ... [E,F,O] [E,O] */
} ref_pool;

typedef struct ref_pool_gradient {
    double *dW1, *db1, *dW3, *db3, *dW2, *db2;
} ref_pool_gradient;

/* A layer and a batch. Arrays are dense, row-major, double. */
typedef struct ref_problem {
    int64_t T, D, E, O, gate_D;
    int64_t K;                     /* slots of a token */
    int64_t top_k;                 /* K of the capacity factor and of sequence counts */
    int kind;                      /* MOE_GATE_* */
    int score, order, renormalize; /* 1: sigmoid; 1: score first; 1: divide by the sum */
    double renormalize_epsilon, renormalize_minimum, route_scale, noise_epsilon, cdf_guard;
    int train, cv_ddof, sequence_softmax, sequence_routed;
    int64_t expert_groups, top_groups; /* 0 and 0: no groups */
    int group_score;                   /* number of largest summed, 0 as 1 */
    int64_t second_k;                  /* experts of a chosen group, hierarchical */
    double sinkhorn_tolerance;
    int sinkhorn_iterations;
    int loss_by_group;                            /* 1: switch and gshard are means over groups */
    int64_t capacity;                             /* rows of an expert and group; -1: a factor, -2:
                                                 none */
    double capacity_factor, capacity_factor_eval; /* the second 0: the first */
    int capacity_rounding;                        /* 0 up, 1 down, 2 nearest, 3 per choice, 4 tokens
                                                 up */
    int64_t capacity_minimum, capacity_multiple;
    int drop_policy;   /* 0 token, 1 choice, 2 batch priority, 3 score */
    int second_choice; /* 0 all, 1 none, 2 weight > second_threshold */
    double second_threshold;
    int renormalize_after_drop;
    int layer_sigmoid;
    int dropped; /* routed part without a row: 0 zero, 1 x, 2 y keeps `untouched` */
    double untouched;
    double weight[REF_LOSSES]; /* of the losses */
    double factor[REF_LOSSES]; /* of their gradients */
    int64_t groups;
    const int64_t *group_begin;   /* [groups+1] or NULL */
    const uint8_t *mask;          /* [T] or NULL */
    const double *x, *gate_x;     /* [T,D], [T,gate_D]; gate_x NULL: x */
    const double *logits_in;      /* [T,E] or NULL */
    const double *noise;          /* [T,E] */
    const double *noise_primary;  /* [T,expert_groups], hierarchical */
    const double *Wg, *bg, *Wn;   /* [gate_D,E], [E] or NULL, [gate_D,E] or NULL; hierarchical:
                                      [A,gate_D,B] */
    const double *Wp, *Wq;        /* primary and its noise: [gate_D,A] */
    const double *selection_bias; /* [E] or NULL */
    const double *threshold;      /* [E], balanced */
    ref_pool routed;              /* its E is the layer's */
    ref_pool shared, residual;    /* E 0: there are none */
    const double *ws;             /* [D] or NULL: the shared part's gate */
    const double *Wc, *bc;        /* [D,2] and [2], or NULL: the residual branch is added */
    const double *dy;             /* [T,O] or NULL: no experts */
    const double *weight_grad;    /* [T,K] or NULL */
    const int32_t
        *fixed_ids; /* [T,K] selection to keep, or NULL; -1: none, an expert may come twice */
    const int *fixed_keep;       /* [T,K] what has a row, with fixed_ids; or NULL */
    const double *fixed_weights; /* [T,K] their weights: the gate does not run; or NULL */
} ref_problem;

/* The two levels of a hierarchical gate: A groups of B experts. */
typedef struct ref_levels {
    double *clean1, *H1, *sd1, *w1; /* [T,A] */
    double *clean2, *H2, *sd2, *w2; /* [T,A*B]; of the chosen groups */
    int *chosen1, *chosen2;
    double *load1, *load2; /* [A], [A*B] */
    int64_t *rows;         /* [A] tokens of each group */
} ref_levels;

typedef struct ref_result {
    double *logits, *H, *sd;   /* [T,E]; 0 for a hierarchical gate */
    int32_t *ids;              /* [T,K], -1 for masked tokens */
    double *w_before, *w;      /* [T,K] */
    int *keep;                 /* [T,K] */
    int64_t *slot;             /* [T,K] place in the expert's buffer, -1 without a row */
    double *importance, *load; /* [E] */
    int64_t *counts;           /* [E] before dropping */
    ref_levels levels;
    double loss[REF_LOSSES], total; /* weighted losses; L with dy, weight_grad and factors */
    double stats[REF_STATS];
    double *y; /* [T,O] */
    double *dx, *d_gate_x, *d_logits,
        *d_w; /* [T,D], [T,gate_D], [T,E], [T,K] by the kept weights */
    double *dWg, *dbg, *dWn, *dWp, *dWq, *d_threshold;
    double *dws, *dWc, *dbc;
    ref_pool_gradient routed, shared, residual;
} ref_result;

/* Computes everything. `r` is filled with memory that ref_free gives back. With no dy the experts
 * are left out. Only the forward if `backward` is 0. */
void ref_run(const ref_problem *p, ref_result *r, int backward);
void ref_free(ref_result *r);

#endif
