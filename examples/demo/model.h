/* model.h - a byte-level language model whose middle is a Mixture-of-Experts layer, or its dense
 * twin.
 *
 *     x  = the embeddings of the last CONTEXT bytes, side by side          [T, CONTEXT * EMBED]
 *     h  = input network(x)                                                [T, WIDTH]
 *     h' = h + middle(norm(h))
 *     logits = output network(norm(h'))                                    [T, BYTES]
 *
 * middle is a noisy top-k MoE layer, or in the twin one expert that every byte visits, so wide that
 * it costs as many multiply-adds as the MoE layer with its gate. Input network, output network and
 * the twin's middle are libmoe pools of one expert, so that libmoe computes every product here.
 * norm divides a row by its root mean square.
 *
 * A batch is cut into groups of bytes. A parameter that every byte meets has a gradient for each
 * group, and these are added in order of group; an expert's gradient is one sum over its rows. The
 * losses that spread the load are of the whole batch. Several ranks are one group each, so they
 * compute the bytes that one rank computes with as many groups. */
#ifndef DEMO_MODEL_H
#define DEMO_MODEL_H

#include "device.h"
#include "ranks.h"

#include <moe/moe.h>

#ifndef DEMO_TOKENS
#define DEMO_TOKENS 1024 /* few in a test on emulated GPUs */
#endif

enum { CONTEXT = 16, EMBED = 16, WIDTH = 128, BYTES = 256, TOKENS = DEMO_TOKENS };
enum { MOST_GROUPS = 1024 };

typedef struct model_options {
    int64_t experts, top_k, hidden; /* of the MoE layer */
    int64_t tokens;                 /* of the largest batch, of all ranks */
    int64_t groups;                 /* of a batch; on several ranks as many as ranks */
    int dense;                      /* 1: the twin */
    uint64_t seed;
    double balance; /* weight of the losses that spread the load */
} model_options;

/* One array of parameters with its gradient and Adam's two moments, of the host. */
typedef struct weights {
    const char *name;
    float *data, *grad, *mean, *square;
    float *sum; /* of the gradients of groups; NULL where the library sums, or one group */
    float *layer_data, *layer_grad; /* where the layer has them; NULL: no layer's */
    int64_t count, parts; /* parts: experts, if each can be left untouched by a step; else 1 */
    int64_t all_parts;    /* of all ranks; the rank may have one of several */
} weights;

/* A layer with its passes, one for each group; with a gate there is one, which has all groups.
 * Without a gate every token goes to the one expert. */
typedef struct network {
    moe_gate *gate;
    moe_experts *pool;
    moe_layer *layer;
    moe_pass **pass;
    float *x, *y, *dy, *dx;           /* rooms where it computes, see device.h */
    int64_t passes, in, out;          /* in, out: width of its rows */
    int first_weights, weights_count; /* of the model's parameters */
} network;

enum { MODEL_MAX_PARAMETERS = 16 };

typedef struct model {
    model_options options;
    const ranks *ranks;
    moe_comm *comm; /* of layers with a gate; NULL with one rank */
    int64_t groups; /* of this rank */
    network input, middle, output;
    weights parameters[MODEL_MAX_PARAMETERS];
    int parameter_count;
    uint8_t *touched; /* [experts] */
    float *embedding, *embedding_grad;
    float *x, *dx, *h, *dh, *n1, *dn1, *mixed, *n2, *dn2, *logits, *dlogits;
    float *own_bits, *bits; /* of each byte of the last batch: of this rank's, [tokens] of all */
} model;

/* Bytes to predict, each from the CONTEXT bytes before it. */
typedef struct batch {
    const uint8_t *text;
    const int64_t *positions; /* [tokens] */
    int64_t tokens;           /* of all ranks; 1 to the model's */
    int64_t step;             /* numbers the noise */
    int train;                /* 1: gradients are computed too */
} batch;

/* Multiply-adds of a forward in training, per token. */
typedef struct model_cost {
    int64_t middle, gate; /* gate: logits and noise, part of middle */
    int64_t ends;         /* input and output network */
} model_cost;

/* What a forward found. */
typedef struct model_result {
    double bits;         /* per byte, mean over the batch */
    double balance_loss; /* importance and load, weighted; 0 for the twin */
} model_result;

/* Return 0, or -1 with a message on stderr. The context may serve several models, and so may
 * comm, ranks_join's of the context. Every rank makes every call but model_destroy and the
 * counts. */
int model_create(model *m, moe_context *context, const ranks *r, moe_comm *comm,
                 const model_options *options);
/* Also for a model that is all zero, or that could not be made completely. */
void model_destroy(model *m);

/* The hidden width of the narrowest dense middle that costs at least what the MoE layer costs in
 * training. */
int model_dense_hidden(const model_options *options, int64_t *hidden);
int model_count_cost(const model_options *options, model_cost *cost);
int64_t model_count_parameters(const model *m); /* of all ranks */

/* Which bytes of a batch are this rank's. */
void model_own_bytes(const model *m, int64_t tokens, int64_t *first, int64_t *count);

/* Predicts the bytes of a batch. The result is over all ranks. */
int model_run(model *m, const batch *b, model_result *result);

/* One step of Adam (Kingma & Ba 2015). Experts that met no token in the last model_run keep their
 * parameters and their moments. */
int model_update(model *m, int64_t step, double rate);

/* Hands parameters that the host has changed to the layers. */
int model_place(const model *m);

static inline int64_t floats_bytes(int64_t count) { return count * (int64_t)sizeof(float); }

/* The message of a library call that failed. */
int model_failed(const char *call);
#define TRY(call)                                         \
    do {                                                  \
        if ((call) != MOE_OK) return model_failed(#call); \
    } while (0)

#endif
