/* ffn_group.h - rows of a block times a group of columns of an expert's weights, in whatever order
 * the weights lie. */
#ifndef MOE_CPU_FFN_GROUP_H
#define MOE_CPU_FFN_GROUP_H

#include "cpu/ffn_rows.h"

enum {
    ROOM_K = 128 /* rows of weights that are packed at a time */
};

/* The left operand: [k] lines of the rows of a tile, tiles `step` apart. */
typedef struct packed {
    const real *at;
    int64_t step, k, rows;
} packed;

/* Weights of one expert, W1 alone or with W3, of n columns each, with their biases. */
typedef struct weights {
    const moe__matrices *m, *m3, *b, *b3; /* m3 NULL: no halves */
    const void *at, *at3, *bias, *bias3;  /* biases may be NULL */
    int64_t k, n;
    bool in_place; /* they lie in panels that need no packing */
    bool by_rows;  /* their rows are contiguous, and what is computed with */
    /* How they are fetched: rows so many bytes apart, of 2^bits pieces, step by step. */
    int64_t row, piece;
    int32_t bits, *offset;
} weights;

/* Where a group goes: lines of rows, out3 of W3's half. */
typedef struct lines {
    real *out, *out3;
    int64_t stride;
} lines;

/* Those of expert e; m3, b3 NULL: no second matrix. */
weights MOE_KERNEL(ffn_weights)(const moe__matrices *m, const moe__matrices *m3,
                                const moe__matrices *b, const moe__matrices *b3, int64_t e,
                                int64_t k, int64_t n);
/* The same of another expert. */
static inline void move_weights(weights *w, int64_t e)
{
    w->at = matrix_of(w->m, e);
    w->at3 = w->m3 ? matrix_of(w->m3, e) : NULL;
}

/* Plans what the products of `rows` rows with both fetch. room: 1 + 2 max(k) integers; room[0] says
 * for how many tiles the rest was filled; 0: not. */
void MOE_KERNEL(ffn_plan_fetches)(weights *in, weights *out, int64_t rows, int32_t *room);

/* Whether weights are read by rows in order: then a group may be as wide as `to` has room. */
static inline bool few_by_rows(const weights *w, int64_t rows)
{
    return w->by_rows && !w->in_place && rows <= FEW_M;
}

/* Rows times columns j .. j+n-1: at most GROUP of them, but for few_by_rows. `after` is read next.
 * room: [ROOM_K, MOE__PANEL]. */
void MOE_KERNEL(ffn_group)(const packed *a, const weights *w, const weights *after, int64_t j,
                           int64_t n, const lines *to, real *room);

#endif
