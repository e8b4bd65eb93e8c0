/* layer_nccl_case.h - a small layer of a rank over NCCL, its arrays in device memory, and the same
 * work on one device. */
#ifndef EMU_LAYER_NCCL_CASE_H
#define EMU_LAYER_NCCL_CASE_H

#include "comm_nccl_case.h"

enum { LAYER_D = 8, LAYER_F = 12, LAYER_E = 6, LAYER_K = 2 };

/* What kind of layer, beside how its group is made. */
typedef struct layer_kind {
    const char *name;
    int32_t dtype;
    int32_t received;
    int64_t max_received;
    int64_t padded_rows; /* 0: exact */
    int64_t slices;      /* 0: whole experts */
    int64_t chunks;      /* 0: rows in one part */
    bool last_first;     /* experts are placed from the last rank on; rank 0 has none of few */
    bool global;         /* losses of all ranks */
    bool beside;         /* rows travel on a stream of their own */
    bool stages;         /* in two, over the rank's node_comm and rail_comm */
} layer_kind;

typedef struct rank_layer {
    const rank_comm *c;
    const layer_kind *kind;
    int64_t first, tokens, own, numbers[2 * LAYER_E];
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    cudaStream_t beside;
    void *x, *y, *dy, *dx;
} rank_layer;

/* Tokens of the ranks before this one, and of it; some have none. */
int64_t layer_first(int rank);
int64_t layer_tokens(int rank);

/* The layer on a group, its pass and its arrays, all filled. */
void make_layer(struct rank_case *r, rank_layer *l, const rank_comm *c, const layer_kind *kind);
moe_status layer_forward(struct rank_case *r, rank_layer *l, int64_t tokens);
moe_status layer_backward(struct rank_case *r, rank_layer *l);
/* The first of the three calls that either can be made in. */
moe_status layer_start(struct rank_case *r, rank_layer *l, bool backward);
/* Forward, backward, the sums of gradients, the norm: all must succeed. */
double layer_step(struct rank_case *r, rank_layer *l);
/* Not the group. Nothing is under way. */
void free_layer(struct rank_case *r, rank_layer *l);

/* y, dx, the gradients of experts and of the gate and the norm of a step are those of one
 * device. */
void compare_with_one(struct rank_case *r, const rank_layer *l, double squared);

#endif
