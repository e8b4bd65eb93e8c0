/* layer_case.h - one configuration of a layer with random contents, run through the library and through
 * the reference, and compared tensor by tensor. */
#ifndef LAYER_CASE_H
#define LAYER_CASE_H

#include "reference/reference.h"

#include <moe/moe.h>

/* What is varied. Zero is the plain choice for every field but those with a comment; see layer_case_make. */
typedef struct layer_case {
    const char *name;
    int64_t T, D, E, F, K;
    int64_t O, gate_D;      /* 0: D */
    int kind, score, order, renormalize, router_bias, logits_in;
    int activation, expert_bias, expert_sigmoid, layer_sigmoid;
    int layout, glu_order;
    int no_experts;         /* 1: the gate alone, with a random gradient by the weights */
    int eval;               /* 1: no noise */
    int cv_ddof, sequence_softmax, sequence_routed;
    int capacity_kind;      /* MOE_CAPACITY_* */
    int64_t capacity, capacity_minimum;
    double capacity_factor;
    int capacity_rounding, renormalize_after_drop;
    int64_t groups;         /* 0: one */
    int masked;             /* 1: about a quarter of the tokens is padding, with NaN inside */
    double weight[REF_LOSSES], route_scale /* 0: 1 */, renormalize_epsilon, noise_epsilon /* 0: 0.01 */;
    double spread;          /* of the inputs; 0: 1 */
    /* filled by layer_case_make */
    ref_problem p;
    int64_t *group_begin;
    uint8_t *mask;
    double *arrays[24];
    int array_count;
} layer_case;

void layer_case_make(layer_case *c, uint64_t seed);
void layer_case_free(layer_case *c);
void layer_case_print(const layer_case *c, char *text, size_t size);

/* The library's objects and results for a case; results are widened to double. */
typedef struct layer_run {
    const layer_case *c;
    int32_t dtype;
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    void *x, *gate_x, *logits_in, *noise, *dy, *weight_grad; /* inputs of the dtype */
    void *y, *dx, *d_gate_x, *d_logits, *entry_grad;         /* outputs of the dtype */
    int64_t x_bytes, y_bytes;
    moe_forward_args f;
    moe_backward_args b;
} layer_run;

/* Makes context (from `config`, may be NULL), objects with bound-in parameters, and arguments. Aborts the
 * test on an error. */
void layer_run_make(layer_run *r, const layer_case *c, int32_t dtype, const moe_context_config *config);
void layer_run_free(layer_run *r);
moe_status layer_run_forward(layer_run *r);
moe_status layer_run_backward(layer_run *r);

/* Element i of an array of the run's dtype. */
double layer_run_at(const layer_run *r, const void *data, int64_t i);
/* Writes double data into a parameter's own memory, mapping layout and GLU order. */
void layer_run_set_parameters(layer_run *r, const ref_problem *p);

/* Compares everything with the reference; "" or the tensor, the index and both values. */
const char *layer_run_compare(const layer_run *r, const ref_result *want);

/* A parameter's gradient in the reference's order; malloc'd. name as in ref_result: "dW1", ... */
double *layer_run_gradient(const layer_run *r, const char *name, int64_t *count);

/* FNV-1a over y, dx, d_gate_x, d_logits and every gradient. */
uint64_t layer_run_hash(const layer_run *r);

/* Deterministic numbers: uniform in [0,1), roughly normal. */
double random_uniform(uint64_t *state);
double random_normal(uint64_t *state);

#endif
