/* family.h - layers drawn at random from the whole family: every kind of gate with every option
 * that goes with it, shared experts, residual branch, and what a dropped token yields. */
#ifndef FAMILY_H
#define FAMILY_H

#include <moe/moe.h>

enum { FAMILY_TEXT = 320 };

typedef struct family {
    uint64_t number, state; /* which member; state of the drawing */
    moe_gate_config g;
    moe_experts_config e, shared, residual;
    moe_layer_config l;
    int has_shared, has_residual;
    int64_t T, G; /* of a batch */
    int train, masked;
    char text[FAMILY_TEXT]; /* what it is, for messages */
    /* objects */
    moe_gate *gate;
    moe_experts *experts, *shared_experts, *residual_experts;
    moe_layer *layer;
} family;

/* Draws a member of a kind: configs only. */
void family_draw(family *f, int32_t kind, uint64_t number, int32_t dtype);
/* Makes its objects with drawn parameters, and destroys them. Ends the test on an error. */
void family_make(family *f, moe_context *context);
void family_free(family *f);

/* A batch with its results, in the member's dtype. */
typedef struct family_batch {
    moe_forward_args fwd;
    moe_backward_args bwd;
    void *x, *dy, *y, *dx;
    int64_t x_bytes, y_bytes;
    int64_t group_begin[17];
    int64_t *key;
    uint8_t *mask;
} family_batch;

void family_batch_make(family_batch *b, family *f);
void family_batch_free(family_batch *b);

/* FNV-1a over losses, y, dx, the plan's weights and all gradients. */
uint64_t family_hash(const family *f, const family_batch *b, const moe_pass *pass);

#endif
