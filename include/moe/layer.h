/* moe/layer.h - the Mixture-of-Experts layer: what most hosts use.
 *
 *     y = sum over the experts e chosen for a token of  weight_e * expert_e(x)
 *     y = c0 y + c1 residual(x),  c = softmax(x Wc + bc), or 1 and 1
 *     y = y + s shared(x),        s = sigmoid(x . ws), or 1;                     then `output`
 *
 * Forward makes a pass, backward consumes it. See moe/pass.h for the arguments and
 * docs/embedding.md for whole programs. */
#ifndef MOE_LAYER_H
#define MOE_LAYER_H

#include <moe/experts.h>
#include <moe/gate.h>
#include <moe/parameter.h>
#include <moe/pass.h>
#include <moe/status.h>
#include <moe/types.h>

MOE_BEGIN_DECLS

/* What the routed part of y is for a token that has no row: all its entries were dropped, or it has
 * none. (A masked token gets 0.) */
enum {
    MOE_DROPPED_ZERO = 0,
    MOE_DROPPED_PASS_THROUGH = 1, /* x; D = O */
    MOE_DROPPED_UNTOUCHED = 2     /* y is not written */
};

/* How rows travel between ranks. */
enum {
    MOE_EXCHANGE_EXACT = 0, /* as many as there are: counts go first, memory grows with them */
    MOE_EXCHANGE_PADDED = 1 /* `padded_rows` from each rank to each expert, used or not: blocks of
                               one size, nothing goes first, memory is known beforehand */
};

/* What happens when more than max_received rows come to a rank. */
enum {
    MOE_RECEIVED_ERROR = 0,         /* MOE_ERROR_BUFFER_TOO_SMALL on every rank */
    MOE_RECEIVED_DROP_POSITION = 1, /* of each source and expert the first n stay, with the largest
                                       n for all that fits, and what room is left goes to the
                                       experts in order; the rest is dropped as for capacity */
    MOE_RECEIVED_DROP_SCORE = 2,    /* the largest weights stay; equal ones in order of expert,
                                       source and token */
    MOE_RECEIVED_CHUNK = 3 /* nothing is dropped: they come in rounds. A backward of more than one
                              round sends x again and computes its experts anew */
};

/* What losses and statistics are of. */
enum {
    MOE_BATCH_LOCAL = 0, /* this rank's tokens */
    MOE_BATCH_GLOBAL = 1 /* the tokens of all ranks: the same numbers on every rank */
};

/* How a layer is made. Fill with moe_layer_config_init, then set gate and experts. */
typedef struct moe_layer_config {
    uint64_t struct_size;
    moe_gate *gate;        /* holds a reference; NULL: every forward brings a plan with weights, or
                              none to a pool of one expert: a plain feed-forward network */
    moe_experts *experts;  /* holds a reference; required. Its dtype and context must be the
                              gate's, and its E; with a comm the E of all ranks' pools together
                              are the gate's E times expert_slices: see placement */
    moe_experts *shared;   /* experts every token visits, with weight 1; holds a reference; NULL:
                              none. D, O, dtype and context as the pool's; another pool */
    moe_experts *residual; /* DeepSpeed-MoE's residual branch (arXiv 2201.05596); likewise */
    moe_comm *comm;        /* holds a reference; NULL: one rank. A group of several: each rank has
                              its own tokens, some of the experts or none, and all else alike; not
                              with a pool of parts; see moe/comm.h */
    int32_t output;        /* MOE_OUTPUT_*, of the layer's y; default linear. Not with
                              MOE_FORWARD_ADD */
    int32_t layer_id;      /* number of this layer in the noise counter, 0 to 65535; default 0 */
    int32_t shared_gate;   /* 1: the shared part is multiplied by sigmoid(x . "shared_gate"), a
                              parameter [D] of the layer; default 0 */
    int32_t residual_mix;  /* 1: learned two-way mix of routed and residual part, parameters
                              "residual_mix" [D,2] and "residual_mix_bias" [2] of the layer;
                              default 0: their sum */
    int32_t dropped;       /* MOE_DROPPED_*; default zero. Others clash with an output function and
                              residual_mix, MOE_DROPPED_UNTOUCHED with shared and residual too */
    int32_t parameters;    /* MOE_PARAMETERS_* of the layer's own; default owned */
    /* From here on with comm only, and the same on every rank unless said otherwise. */
    int64_t expert_slices;    /* S >= 1; default 1. Above 1 an expert is the sum of S narrow ones,
                                 which may live on different ranks: slice s has the hidden units
                                 s F to (s + 1) F - 1 of an expert of S F, F the pool's d_hidden.
                                 The pools of all ranks have E S slices, slice s of expert e being
                                 number e S + s. Feed-forward without bias and output function */
    const int64_t *placement; /* [E of the pool] the number of each of this rank's experts (or
                                 slices), copied; NULL: in order of rank. Every number lives
                                 somewhere. One on several ranks has replicas: a rank sends to its
                                 own, else to replica number rank mod count; then forwards need
                                 MOE_FORWARD_NO_SAVE, and there is no backward */
    int64_t max_received;     /* most rows that this rank's experts take at once, its own with them;
                                 default 0: no bound. May differ between ranks; not with
                                 MOE_EXCHANGE_PADDED */
    int64_t padded_rows;      /* rows from a rank to an expert (slice) of MOE_EXCHANGE_PADDED, >= 1;
                                 a call with more is refused with MOE_ERROR_BUFFER_TOO_SMALL on
                                 every rank. On a GPU, without comm (rows of an expert) or with one
                                 that sends its memory in the order of streams: a call does not wait
                                 to learn of more, which then have no output and no gradient, and
                                 its moe_pass_losses and moe_pass_stats return
                                 MOE_ERROR_BUFFER_TOO_SMALL. Else 0 */
    int32_t exchange;         /* MOE_EXCHANGE_*; default exact. On a GPU padded may be without
                                 comm: then, and with a comm of MOE_COMM_DEVICE_MEMORY and
                                 MOE_COMM_STREAM_ORDERED, no call of a step waits for the device.
                                 With such a comm what went wrong in one, on any rank, is returned
                                 by the next forward or backward of the pass too, which has done
                                 its work all the same: docs/expert-parallel.md */
    int32_t received;         /* MOE_RECEIVED_*; default error. Dropping not with slices, rounds
                                 not with a pool of parts */
    int32_t loss_batch;       /* MOE_BATCH_*; default local. May be global without comm */
    int32_t reserved;         /* 0 */
    moe_comm *node_comm;      /* the ranks of comm that are on this rank's node, and */
    moe_comm *rail_comm;      /* those that have this rank's number in their nodes' node_comm, of
                                 all nodes in the same order: both or neither, default NULL; each
                                 holds a reference, context as the pool's. Then x and dy of a token
                                 travel once to each node, over rail_comm, and on from there over
                                 node_comm; everything else goes over comm, and all results are the
                                 same bytes. Every node has as many ranks; how comm numbers them
                                 does not matter. With MOE_EXCHANGE_EXACT and MOE_RECEIVED_ERROR
                                 only; max_received does not count rows that pass through a rank */
    int64_t exchange_chunks;  /* C, parts in which rows travel, 1 to MOE_COMM_REQUESTS; default 1:
                                 at once. Part c has the rows of a rank's experts (slices) c n / C
                                 to (c + 1) n / C - 1 of n, in the order of its pool, and travels
                                 while the experts of another are computed, there and back: the
                                 same bytes. A call has as many exchanges in flight. As 1 where rows
                                 of a GPU go through the host's memory. Above 1 not with
                                 MOE_EXCHANGE_PADDED, MOE_RECEIVED_CHUNK, node_comm or a pool of
                                 parts */
} moe_layer_config;

/* Writes every default and the caller's size. Returns as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_layer_config_init(moe_layer_config *config, size_t size);

/* Creates a layer.
 *   layer   out: the new layer; untouched on error
 *   config  copied; its objects are referenced, never copied
 * On several ranks all make this call at once: what must be alike is compared, and a difference is
 * MOE_ERROR_INVALID_ARGUMENT on every rank with the field, the rank and both values; so is a
 * node_comm or rail_comm whose ranks do not make comm a grid of nodes.
 * Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_NOT_SUPPORTED, MOE_ERROR_OUT_OF_MEMORY,
 * MOE_ERROR_TIMEOUT, MOE_ERROR_TRANSPORT or an error of the struct's size. Since 0.1. */
MOE_API moe_status moe_layer_create(moe_layer **layer, const moe_layer_config *config);

/* Gives up the program's reference. NULL is legal. Since 0.1. */
MOE_API void moe_layer_destroy(moe_layer *layer);

/* Writes the config the layer was made with; its handles are borrowed. config: in: struct_size;
 * out: the rest. Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT or an error of the struct's size.
 * Since 0.1. */
MOE_API moe_status moe_layer_get_config(const moe_layer *layer, moe_layer_config *config);

/* Routes T tokens, runs their experts and combines. y is the same bytes for any number of threads,
 * any instruction set and any split of the tokens into calls (with token_first; without a
 * capacity).
 *   pass  made for this layer; what it held before is lost
 *   args  T = 0 is legal and needs no pointers
 * May run at once with other passes over the same layer, but for one on several ranks: a
 * communicator and the layers on it belong to one thread at a time. Returns
 *   MOE_ERROR_INVALID_ARGUMENT  a NULL or bad field; the message names it and its value
 *   MOE_ERROR_INVALID_STATE     a parameter is not bound; MOE_FORWARD_RECOMPUTE without a kept plan
 *   MOE_ERROR_NOT_SUPPORTED, MOE_ERROR_OVERFLOW, MOE_ERROR_OUT_OF_MEMORY,
 *   MOE_ERROR_BUFFER_TOO_SMALL
 *   MOE_ERROR_CALLBACK          the host's parallel-for failed: y is unspecified, the pass is
 *                               failed
 *   MOE_ERROR_TIMEOUT, MOE_ERROR_TRANSPORT  another rank did not come or gave up: likewise
 * With any error but the last three nothing has been written and the pass is as it was; save that
 * MOE_GATE_BALANCED without MOE_FORWARD_TRAIN, and a layer on several ranks, count entries or rows
 * first: if there is no memory or room for them, or another rank's call fails, the pass is failed,
 * with nothing written. On several ranks an error of one is an error of all; what a call routes
 * (gate or plan), its loss weights and MOE_FORWARD_TRAIN are alike on all. Since 0.1. */
MOE_API moe_status moe_layer_forward(moe_layer *layer, moe_pass *pass,
                                     const moe_forward_args *args);

/* Gradients of L = sum(y * dy) + losses, each loss times its loss_grad, by x, gate_x, logits and
 * every parameter with a gradient. Gradients are sums over tokens, never scaled. May be called
 * again on the same forward; parameter gradients are then added once more.
 *   pass  after a moe_layer_forward that kept activations
 * One backward at a time per gate and per pool. Returns as moe_layer_forward;
 * MOE_ERROR_INVALID_STATE also without such a forward, or when another backward of the gate or pool
 * is running. Since 0.1. */
MOE_API moe_status moe_layer_backward(moe_layer *layer, moe_pass *pass,
                                      const moe_backward_args *args);

/* A forward in three calls, so that the host has other work done while rows travel: another pass's
 * calls between them, or its own.
 *
 *     start    routes and sends this rank's rows
 *     work     the shared experts and residual branch; waits for rows, runs their experts, sends
 *              the results back
 *     finish   waits for the results and writes y and what else was asked for
 *
 * moe_layer_forward is these three in turn, and does the same to the byte. What args point to stays
 * valid and unchanged until finish; work may be left out, then finish does it. Between start and
 * finish the pass takes no other call but these and moe_pass_destroy, which ends the group as a
 * failure does. All ranks make the calls of all passes in the same order; at most MOE_COMM_REQUESTS
 * passes of a group are between start and finish, with exchange_chunks C a C-th of that. With
 * MOE_RECEIVED_CHUNK work waits for all rounds but the last's results. On one rank the calls work
 * likewise. Errors are those of moe_layer_forward; after one the call is over;
 * MOE_ERROR_INVALID_STATE also without a start. Since 0.1. */
MOE_API moe_status moe_layer_forward_start(moe_layer *layer, moe_pass *pass,
                                           const moe_forward_args *args);
/* As above: the experts. Since 0.1. */
MOE_API moe_status moe_layer_forward_work(moe_layer *layer, moe_pass *pass);
/* As above: the end. Since 0.1. */
MOE_API moe_status moe_layer_forward_finish(moe_layer *layer, moe_pass *pass);

/* A backward in three calls, as the forward: start sends dy, work runs the experts' backward and
 * sends dx back, finish writes all gradients but the experts', which work has written. The gate and
 * the pools are taken from start to finish, so there is one at a time per gate and per pool. Since
 * 0.1. */
MOE_API moe_status moe_layer_backward_start(moe_layer *layer, moe_pass *pass,
                                            const moe_backward_args *args);
/* As above: the experts. Since 0.1. */
MOE_API moe_status moe_layer_backward_work(moe_layer *layer, moe_pass *pass);
/* As above: the end. Since 0.1. */
MOE_API moe_status moe_layer_backward_finish(moe_layer *layer, moe_pass *pass);

/* The number among all ranks' experts of this rank's expert `index`; with slices that of the slice.
 * Returns -1 for NULL or an index that there is not. Since 0.1. */
MOE_API int64_t moe_layer_expert_number(const moe_layer *layer, int64_t index);

/* Sums the gradients of the replicated parameters (all but the routed experts') over the ranks of
 * the layer's group, in order of rank, in place on every rank. If gradients began at 0 and each
 * rank had one token group, the result is the same bytes as on one rank with these groups. Every
 * rank makes this call, after its backward, with the same gradients wanted. On one rank it does
 * nothing.
 *   stream  NULL on CPU; elsewhere the sums are put on it, and the call waits only where the group
 *           takes memory of the host alone. Calls of a layer are on one stream, or ordered
 * Allocates for the largest gradient while it runs; on a GPU the layer keeps that. So it may be
 * captured in a graph after one call that was not; else that is MOE_ERROR_INVALID_STATE, nothing is
 * sent and the group goes on. Returns MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_INVALID_STATE,
 * MOE_ERROR_OUT_OF_MEMORY, MOE_ERROR_TRANSPORT, MOE_ERROR_TIMEOUT, an error of the device. Since
 * 0.1. */
MOE_API moe_status moe_layer_reduce_gradients(moe_layer *layer, void *stream);

/* The squared Euclidean norm of the layer's gradient over all ranks: the routed experts of all of
 * them, and once what every rank has. In double, in order of parameter, expert and element: the
 * same bytes on every rank, and on one rank with the same gradients. Parameters without a gradient
 * count as 0; a pool that two layers share counts in both. On several ranks every one makes this
 * call, after moe_layer_reduce_gradients.
 *   squared  out, the host's; untouched on error
 *   stream   NULL on CPU; elsewhere the gradients are read behind what is on it, expert by expert
 *            into the host's memory, and the call waits; one that is being captured is refused
 * Returns as moe_layer_reduce_gradients. Since 0.1. */
MOE_API moe_status moe_layer_gradient_norm(moe_layer *layer, double *squared, void *stream);

/* A question about cost, answered before anything is allocated. */
typedef struct moe_cost_query {
    uint64_t struct_size;
    const moe_gate_config *gate;        /* NULL: no gate; top_k must then be given */
    const moe_experts_config *experts;  /* NULL: no experts; of one pool, not one of parts */
    const moe_layer_config *layer;      /* NULL: the defaults; its handles are not looked at, but
                                           with a comm `experts` may be one rank's, of the gate's E:
                                           the answer is for as many rows as leave it */
    int64_t tokens;                     /* T */
    int64_t groups;                     /* 0 = one */
    int64_t top_k;                      /* K; default MOE_FROM_CONFIG */
    uint64_t flags;                     /* MOE_FORWARD_* of the forward */
    int32_t threads;                    /* of the context; 0 = as moe_context_create would choose */
    int32_t reserved;                   /* 0 */
    const moe_experts_config *shared;   /* the layer's shared experts, or NULL */
    const moe_experts_config *residual; /* its residual branch, or NULL */
    const moe_context *context;         /* whose passes they are; NULL: one of the CPU */
} moe_cost_query;

/* Its answers, in bytes and in floating-point operations (a multiply-add is 2). */
typedef struct moe_cost {
    uint64_t struct_size;
    int64_t parameter_bytes; /* data of all parameters: with what fills panels up, and with packed
                                copies */
    int64_t gradient_bytes;  /* their gradients, with what fills panels up */
    int64_t parameter_count; /* elements */
    int64_t pass_bytes;      /* the most a pass for T tokens allocates, or needs as workspace; with
                                MOE_GATE_BALANCED without MOE_FORWARD_TRAIN as if its thresholds
                                chose every expert */
    int64_t forward_flops;   /* of all products: gate, experts, combine; 0 for the host's experts */
    int64_t backward_flops;
    int64_t active_parameters; /* elements a token meets: gate plus K experts */
} moe_cost;

/* Write every default and the caller's size. Return as moe_context_config_init. Since 0.1. */
MOE_API moe_status moe_cost_query_init(moe_cost_query *query, size_t size);
/* The same for a cost. Since 0.1. */
MOE_API moe_status moe_cost_init(moe_cost *cost, size_t size);

/* Answer how much memory, or how much arithmetic, a layer of these configs takes for T tokens.
 * moe_layer_memory fills the *_bytes fields, parameter_count and active_parameters; moe_layer_flops
 * the *_flops fields and nothing else.
 *   cost  in: struct_size; out
 * Return MOE_OK, MOE_ERROR_INVALID_ARGUMENT, MOE_ERROR_NOT_SUPPORTED, MOE_ERROR_OVERFLOW or an
 * error of a struct's size. Any thread. Since 0.1. */
MOE_API moe_status moe_layer_memory(const moe_cost_query *query, moe_cost *cost);
/* As above, for arithmetic. Since 0.1. */
MOE_API moe_status moe_layer_flops(const moe_cost_query *query, moe_cost *cost);

MOE_END_DECLS

#endif
