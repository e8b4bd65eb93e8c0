/* travel.h - jobs of rows that travel between ranks. As of all jobs, plain fields are the host's
 * and arrays are in the backend's memory. src/cpu/travel.c, cuda/travel.cu
 *
 *     pack     this rank's rows to the owners' positions; results to the positions of arrival
 *     order    the owner's plan of what came
 *     unique   tokens of each node, once, where rows go by nodes
 *     blocks   headers of padded blocks that the host does not wait to see
 *     merge    what came back, in the order of this rank's plan; entry_grad, drop: likewise */
#ifndef MOE_TRAVEL_H
#define MOE_TRAVEL_H

#include "base.h"

MOE_BEGIN_DECLS

/* Which rows move. Row i of all, first[s] <= i < first[s+1], is row from[s] + i - first[s] of what
 * is read, and row to[s] + i - first[s] of what is written; i begins at first[0]. The arrays are in
 * backend memory; first NULL: row i is row i, for i < most. */
typedef struct moe__moves {
    int64_t count;            /* ranges */
    int64_t most;             /* rows from first[0] on, or where the host does not know more */
    const int64_t *first;     /* [count+1] */
    const int64_t *from, *to; /* [count] */
} moe__moves;

/* Some rows of an array, for numbers that count from the first of them. */
typedef struct moe__window {
    int64_t base, rows;
} moe__window;

/* Columns of a packed row: its bytes at .. at+bytes-1 are those at from + r * stride, r being the
 * row, or with `by_place` the row that is written; with `index` the number that this has there; and
 * with `window`, of the range of the move, that row of the window, the first if there is none. */
typedef struct moe__column {
    const void *from;
    const int64_t *index;      /* or NULL */
    const moe__window *window; /* [ranges] or NULL; only with moves that have `first` */
    int64_t stride, bytes;
    int64_t at;
    int32_t by_place;
    int32_t reserved;
} moe__column;

enum { MOE__COLUMNS = 3 };
typedef struct moe__pack_job {
    moe__workers workers;
    moe__moves moves;
    void *to;
    int64_t row_bytes; /* of a row of `to`; what no column covers keeps its bytes */
    moe__column column[MOE__COLUMNS];
    int64_t columns;
} moe__pack_job;

/* Which tokens have a row for a node: of node n token[begin[n]] to token[begin[n+1] - 1]. */
typedef struct moe__unique_job {
    moe__workers workers;
    const moe__plan_arrays *plan;
    int64_t nodes, slices;         /* N, S */
    const int64_t *node_of_number; /* [E S] of each number of an expert or slice */
    int64_t *place;                /* out [N T] of a token that has such a row, where it is among
                                      those of the node; of others unspecified */
    int64_t *token;                /* out [N T], of each node ascending, begin[N] used */
    int64_t *begin;                /* out [N+1] */
    int64_t *scratch;              /* [2 N T + 8] where the backend's memory is not the host's */
} moe__unique_job;

/* The owner's plan of what came: a token is a position and has one entry, or without a row none.
 * Rows go by slot, then source, then order of arrival. */
typedef struct moe__order_job {
    moe__workers workers;
    moe__plan_arrays *plan; /* out; sizes are set, one group */
    int64_t sources;        /* P; moves has num_experts * P ranges by slot and source: `first` the
                               row of the plan, `to` the position */
    moe__moves moves;
    int32_t holes; /* 1: some positions have no row */
    int32_t reserved;
    const void *x; /* rows of row_bytes by position; the weight of each is at weight_at */
    int64_t row_bytes, weight_at;
} moe__order_job;

/* Rows of a plan from what came back by slot: slice 0 of the row, plus slice 1, and so on, or its
 * replica. The first `width` elements of a row, and a real at real_at if that is not -1. */
typedef struct moe__merge_job {
    moe__workers workers;
    const moe__plan_arrays *plan;
    int64_t most;                  /* rows of the plan at most */
    int64_t slices;                /* S */
    const int64_t *slot_of_number; /* [E S] */
    const int64_t *all_at;         /* [slots] first row of each slot in `results` */
    const void *results;
    void *merged;
    int64_t row_bytes, width, real_at;
    int64_t padded_rows; /* of merged, as of moe__rows_job */
} moe__merge_job;

/* entry_grad[n] = the real at real_at of the row of entry n; 0 for an entry without a row. */
typedef struct moe__entry_grad_job {
    moe__workers workers;
    const moe__plan_arrays *plan;
    const void *rows;
    int64_t row_bytes, real_at;
    int64_t padded_rows; /* of rows, as of moe__rows_job */
    void *entry_grad;    /* [N] */
} moe__entry_grad_job;

/* What is wrong with blocks: kind, rank and a number in one word, the largest first; 0: nothing. */
enum {
    MOE__BLOCKS_COUNT = 1,  /* the rank has a number of rows that cannot be */
    MOE__BLOCKS_CALL = 2,   /* the rank is in another call, or of another layer */
    MOE__BLOCKS_FAILED = 3, /* the rank failed with status -number */
    MOE__BLOCKS_ROWS = 4    /* this rank has more rows than padded_rows for expert `number` */
};

/* Blocks of MOE_EXCHANGE_PADDED, one of each rank, where the host does not wait to see them: three
 * words (call, layer, status), in a forward the rows for each slot, rows. */
typedef struct moe__blocks_job {
    moe__workers workers;
    const moe__plan_arrays *plan; /* write: its rows are counted; NULL: there are none */
    int64_t ranks, rank, slots, own, slices, padded_rows;
    const int64_t *first_slot, *number_of_slot, *slot_of_number; /* as of moe__placement */
    void *blocks;
    int64_t block_bytes;
    int64_t words[3]; /* of this rank */
    int64_t calls;    /* the first word is compared modulo this */
    int32_t counts;   /* 1: rows for each slot follow the words */
    int32_t reserved;
    int64_t *first, *from; /* out, with counts and a plan, or by read: arrays of moe__moves. write:
                              first a row of the plan; read: a row of the experts' arrays, of which
                              each has ranks padded_rows */
    int64_t *record;       /* what is wrong is noted there */
} moe__blocks_job;

/* slot_of_entry becomes -1 where a row does not stay: range s of `moves` is of rows of a slot. */
typedef struct moe__drop_job {
    moe__workers workers;
    moe__plan_arrays *plan;
    moe__moves moves;    /* from: rows of the plan; `to` is not read */
    const int64_t *stay; /* [count] the first so many of each; or */
    const uint8_t *keep; /* [rows] 0: goes */
} moe__drop_job;

MOE_END_DECLS

#endif
