/* check_twin.h - a copy of a layer in f64 whose inputs and parameters can be moved one element at a
 * time; what moe_check_gradients asks its questions of. */
#ifndef MOE_CHECK_TWIN_H
#define MOE_CHECK_TWIN_H

#include "pass_state.h"

/* A tensor that L depends on, with the library's gradient by it. */
typedef struct moe__twin_tensor {
    const char *name;
    double *value, *grad;
    int64_t count;
} moe__twin_tensor;

enum {
    MOE__TWIN_TENSORS = 4 + (2 + 3 * MOE_MAX_PARTS) * MOE__MAX_PARAMETERS,
    MOE__TWIN_HOSTS = 3 * MOE_MAX_PARTS
};

/* y and losses at one place. */
typedef struct moe__twin_value {
    double *y;                     /* [T,O] */
    double losses[MOE_LOSS_SLOTS]; /* weighted */
} moe__twin_value;

typedef struct moe__twin {
    moe_context *context;                     /* the layer's, or own where that has no f64 */
    moe_context *own;                         /* may be NULL */
    moe_gate *gate;                           /* may be NULL */
    moe_experts *experts, *shared, *residual; /* the last two may be NULL */
    moe_layer *layer;
    moe_pass *saved, *moved;         /* of the one backward, and of the moved forwards */
    moe_plan *plan;                  /* the selection, held still */
    int64_t tokens, groups, outputs; /* T, G, T * O */
    int32_t train;
    double *x, *gate_x, *logits, *weights; /* the last three may be NULL */
    double *dx, *d_gate_x, *d_logits, *d_weights, *dy;
    int64_t *key; /* [T] of a hash gate */
    int32_t *ids; /* [T] of a layer without a gate */
    int64_t *group_begin;
    moe__twin_value here, up, down;
    moe_expert_callbacks host[MOE__TWIN_HOSTS]; /* what the twin's own callbacks call */
    int32_t hosts;
    double rounding; /* what rounding leaves of a difference of L, about */
    void *memory;
    int64_t bytes;
    moe__twin_tensor tensor[MOE__TWIN_TENSORS];
    int64_t tensors;
} moe__twin;

/* Makes the twin and its gradients; free it whatever this returns. */
moe_status moe__twin_create(moe__twin *twin, const moe_layer *layer,
                            const moe_gradient_check *check, const char *function);
void moe__twin_free(moe__twin *twin);

/* One-sided differences of L by element `index` of a tensor: (L(a+h) - L(a)) / h and (L(a) -
 * L(a-h)) / h. */
moe_status moe__twin_differences(moe__twin *twin, const moe__twin_tensor *tensor, int64_t index,
                                 double step, double side[2]);

#endif
