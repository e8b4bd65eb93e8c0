/* ffn_reference.h - a random job of the experts and what it must give, in double, rounded where the
 * backend stores. Host memory; ffn_case.c makes it, check_ffn_kernels.c runs it. */
#ifndef MOE_FFN_REFERENCE_H
#define MOE_FFN_REFERENCE_H

#include "backend.h"

#include <stdint.h>

/* A parameter or gradient: elements (e,i,j) of `half` 0 or 1 as the pool lays them out. */
typedef struct ffn_tensor {
    bool there, each;
    int64_t rows, cols; /* of one expert: in, and out, or 2 out where two halves are in one */
    int64_t stride_expert, stride_row, stride_col;
    int64_t elements;
    int32_t dtype;
    double *value; /* [elements]; what a gradient has been before */
    double *want;  /* of a gradient: after the backward */
    bool skip[16]; /* experts whose gradient is not wanted */
} ffn_tensor;

/* Numbers of the tensors: w1 or w13, b1 or b13, w3, b3, w2, b2. */
enum { W1, B1, W3, B3, W2, B2, TENSORS };

typedef struct ffn_case {
    uint64_t random;
    moe_experts_config config;
    int64_t T, K, E, D, F, O, N, R, C; /* C: 0 is exact */
    int64_t x_stride, dy_stride;
    int32_t dtype;
    bool gated, save, overwrite, want_dx, want_weights, tf32;
    double *x, *dy; /* [T,stride] */
    double *weight; /* [N] */
    int64_t *expert_begin, *token_of_row, *entry_of_row;
    ffn_tensor data[TENSORS], grad[TENSORS];
    /* what it must give; rows as the plan numbers them */
    double *z, *h, *out, *dx_rows; /* z: [R,2F], z1 then z3 */
    double *entry_grad;            /* [N], 0 without a row */
    double *scratch;
} ffn_case;

double ffn_round(double x, int32_t dtype);
/* Where element (e,i,j) of W1 (half 0) or W3 (half 1), or of a bias (i = 0), lies. */
int64_t ffn_place(const ffn_case *c, const ffn_tensor *t, int64_t e, int64_t i, int64_t j,
                  int half);
void ffn_case_make(ffn_case *c, uint64_t seed);
void ffn_case_free(ffn_case *c);
void ffn_case_print(const ffn_case *c);

#endif
