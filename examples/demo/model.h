/* model.h - a byte-level language model whose middle is a Mixture-of-Experts layer.
 *
 *     x  = the embeddings of the last CONTEXT bytes, side by side          [T, CONTEXT * EMBED]
 *     h  = input network(x)                                                [T, WIDTH]
 *     h' = h + MoE(norm(h))
 *     logits = output network(norm(h'))                                    [T, 256]
 *
 * The input and output networks are libmoe pools of one expert, so that libmoe computes every
 * product here. norm divides a row by its root mean square. */
#ifndef DEMO_MODEL_H
#define DEMO_MODEL_H

#include <moe/moe.h>

enum { CONTEXT = 16, EMBED = 24, WIDTH = 192, HIDDEN = 384, BYTES = 256 };

typedef struct model_options {
    int64_t experts, top_k, tokens; /* of the MoE layer; tokens of the largest batch */
    int32_t threads;
    uint64_t seed;
    double balance; /* weight of the importance and of the load loss */
} model_options;

/* One array of parameters with its gradient and Adam's two moments. */
typedef struct weights {
    const char *name;
    float *data, *grad, *mean, *square;
    int64_t count;
} weights;

typedef struct network {
    moe_experts *pool;
    moe_layer *layer;
    moe_pass *pass;
    moe_plan *plan; /* every token to the one expert */
} network;

typedef struct model {
    model_options options;
    moe_context *context;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    network input, output;
    weights parameters[16];
    int parameter_count;
    weights *embedding;
    float *x, *dx, *h, *dh, *n1, *dn1, *mixed, *n2, *dn2, *logits, *dlogits;
    int64_t planned; /* tokens the one-expert plans are for */
} model;

/* What a forward found. */
typedef struct model_result {
    double bits;         /* per byte, mean over the batch */
    double balance_loss; /* importance and load, weighted */
} model_result;

/* Return 0, or -1 with a message on stderr. */
int model_create(model *m, const model_options *options);
void model_destroy(model *m);

/* Predicts the byte at each of `positions` from the CONTEXT bytes before it; with `train` gradients
 * are computed too. The load of the experts is added to load[experts] if that is not NULL. */
int model_run(model *m, const uint8_t *text, const int64_t *positions, int64_t tokens, int64_t step,
              int train, model_result *result, double *load);

/* One step of Adam (Kingma & Ba 2015) on all parameters; experts that met no token keep theirs. */
void model_update(model *m, int64_t step, double rate);

#endif
