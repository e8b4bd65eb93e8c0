/* pool_model.h - a pool of any kinds and parts in plain double loops, token by token, and the
 * library's pool of the same description beside it. Shares no code with the library or with
 * tests/reference. */
#ifndef POOL_MODEL_H
#define POOL_MODEL_H

#include <moe/moe.h>

enum { MODEL_W1, MODEL_B1, MODEL_W3, MODEL_B3, MODEL_W2, MODEL_B2, MODEL_PARAMETERS };

/* Experts of one description. A host's expert (kind callback) computes the same network, with
 * the weights of this struct; it has no gate branch. */
typedef struct model_part {
    int kind;
    int64_t E, F;
    int activation, bias, glu_order, layout, position, sigmoid;
    double alpha, limit, offset;
    /* filled by pool_model_make */
    int64_t D, O;
    double *p[MODEL_PARAMETERS], *d[MODEL_PARAMETERS]; /* [E,in,out] or [E,out] */
    double *host_d[MODEL_PARAMETERS];                  /* what the host's backward added */
    moe_experts *pool;
    int64_t calls, last_expert; /* of the host's functions */
    int ordered;                /* 1: numbers of experts must rise from last_expert on */
    int32_t fail_expert, fail_with, fail_backward, parameters_seen, dx_seen, wrong;
    void (*during)(void *); /* called inside the host's backward */
    void *during_argument;
} model_part;

typedef struct pool_model {
    int64_t T, D, O, K, E;
    int32_t dtype;
    int parts, whole; /* whole: 1: a pool of parts even if there is only one */
    model_part part[MOE_MAX_PARTS];
    int32_t *ids;   /* [T,K]: some -1 */
    double *w, *dw; /* [T,K] */
    double *x, *dx; /* [T,D] */
    double *dy, *y; /* [T,O] */
    moe_context *context;
    moe_experts *pool;
    moe_plan *plan;
    moe_pass *pass;
    void *lib_x, *lib_y, *lib_dy, *lib_dx, *lib_dw; /* of the dtype */
    moe_forward_args f;
    moe_backward_args b;
} pool_model;

/* Draws contents, makes the library's objects (context: NULL: a new one of two threads; a
 * reference is not taken) and fills the arguments. m->T, D, O, K, dtype, parts and part[] are
 * set. */
void pool_model_make(pool_model *m, moe_context *context, uint64_t seed);
void pool_model_free(pool_model *m);

/* The model's y; then dx, dw and every d. */
void pool_model_run(pool_model *m);

/* moe_experts_forward and _backward of the pool; the host's experts check their calls meanwhile. */
moe_status pool_model_forward(pool_model *m);
moe_status pool_model_backward(pool_model *m);

/* Compares y, or the gradients, of the library; "" or what differs. */
const char *pool_model_compare_y(const pool_model *m);
const char *pool_model_compare_gradients(const pool_model *m);

/* The library's parameters <- p. */
void pool_model_set_parameters(const model_part *part);
/* Gradient of the library, or the host's, in the model's order; [count] to be freed. */
double *pool_model_gradient(const model_part *part, int which, int64_t *count);
int64_t pool_model_elements(const model_part *part, int which);

moe_experts_config pool_model_config(const pool_model *m, model_part *part,
                                     moe_expert_callbacks *callbacks);
double pool_model_at(const pool_model *m, const void *data, int64_t i);
void pool_model_put(const pool_model *m, void *data, int64_t i, double value);
size_t pool_model_element(const pool_model *m);

#endif
