/* ranks.h - experts on several ranks: where they are, what a pass keeps of an exchange, and the
 * steps that the layer runs.
 *
 * A slot is a place of a rank's pool, numbered over all ranks; it holds an expert, or a slice of
 * one, by its number e S + s. A position is a place of a row in what travels. */
#ifndef MOE_RANKS_H
#define MOE_RANKS_H

#include "internal.h"

enum { MOE__RANKS_HEADER = 3 }; /* words that a rank tells every rank in every call */

/* What a backward brings back, as bits: dx of rows, gradients by their weights, dx of secondary
 * gates' rows. */
enum { MOE__WANT_DX = 1, MOE__WANT_WEIGHTS = 2, MOE__WANT_GATE_DX = 4, MOE__WANTS = 8 };

/* Of a layer. ranks_join.c */
typedef struct moe__placement {
    int64_t slots, numbers;  /* of all ranks; E S */
    int64_t slices;          /* S */
    int64_t *first_slot;     /* [P+1] of each rank */
    int64_t *number_of_slot; /* [slots] */
    int64_t *slot_of_number; /* [E S] where this rank sends its rows */
    int64_t *first_holder;   /* [E S] the first slot that holds it */
    int64_t most_slots;      /* of a rank */
    int64_t most_parameters; /* that the routed experts of a rank have */
    int64_t *first_group;    /* [P+1] secondary gates of each rank; NULL: all are replicated */
    int64_t *groups;         /* [A] 0 and on; likewise */
    int64_t header_rows;     /* of a block of MOE_EXCHANGE_PADDED, before its rows */
    bool replicas;           /* some number is in two slots */
    bool in_order;           /* slot i holds number i, and there are no slices */
    int64_t bytes;           /* of all this, one block */
} moe__placement;

/* Rows first .. first+rows-1 of those that a rank has for a slot. */
typedef struct moe__range {
    int64_t first, rows;
} moe__range;

/* Secondary gates of a hierarchical gate that live with their groups: ranks_second.c. */
typedef struct moe__second {
    void *counts_memory, *rows_memory;
    int64_t counts_bytes, rows_bytes;
    int64_t *in_count;                /* [P, local groups] rows that come */
    int64_t *send_begin, *recv_begin; /* [P+1] rows to and from each rank */
    int64_t *index;                   /* [rows that come] where row r by (group, source) arrived */
    moe__second_job job;
    void *x;     /* [rows that come, D] */
    void *d;     /* [rows that come, B or 2 B] by logits, and by the raw noise */
    void *here;  /* rows that this rank sends, and gets */
    void *there; /* rows that go back */
} moe__second;

/* Of a pass. P ranks; `own` slots are this rank's. */
typedef struct moe__ranks {
    void *counts_memory, *rows_memory, *keep_memory;
    int64_t counts_bytes, rows_bytes, keep_bytes;
    int64_t *out_begin, *in_begin;    /* [P+1] words to and from each rank */
    int64_t *words_out, *words_in;    /* for or of each rank: a header, its rows for each slot */
    int64_t *answer_out, *answer_in;  /* of an owner: see ranks_words.c */
    int64_t *count, *place;           /* [slots] rows of this rank; where the first of them is among
                                          all rows of the owner */
    int64_t *limit;                   /* [P] rows of an owner's round; 0: all */
    int64_t *in_count, *in_place;     /* [P,own] the same of what comes */
    int64_t in_rows;                  /* their sum */
    int64_t rounds, round;            /* of all ranks; the present one */
    moe__range *send, *come;          /* [slots], [P,own] of the round */
    int64_t *sent_at, *came_at;       /* [slots], [P,own] position of the first row */
    int64_t *send_begin, *recv_begin; /* [P+1] positions to and from each rank */
    int64_t *all_at;                  /* [slots+1] the first row of each slot in `results` */
    int32_t request;                  /* in flight if `waiting` */
    bool waiting;
    bool routes;           /* the gate runs in this call */
    bool took_part;        /* in this call: the others know how it went here */
    bool agreed;           /* the failure is known to all ranks */
    int32_t wants, wanted; /* MOE__WANT_* of this rank's backward; of any rank's: it travels */
    moe__plan_arrays plan; /* of what came: a token is a position */
    moe__experts_job job;
    moe__dw_carry carry[3];  /* of w1, w3, w2 */
    moe__dw_sums sums[2][3]; /* what they go between */
    int64_t x_width;         /* elements of a row of x */
    void *x;                 /* [positions,x_width] that came: x, weight, and dy if they
                                          came together */
    void *dy;                /* [positions,O] that came by themselves */
    void *here, *there;      /* rows that this rank sends, then gets back; that go back */
    void *results;           /* by slot, what came back; here, or where all rounds' meet */
    void *merged;            /* in the order of the plan; NULL: results are */
    void *entry_grad;        /* [positions] */
    const void *rows;        /* [rows of the plan] what a call makes, */
    int64_t row_stride;      /* so many elements apart */
    moe__second second;
    uint8_t *keep_here, *keep_there; /* [rows by slot], [rows that come] whether it stays */
    void *score_here, *score_there;  /* likewise, weights */
    int64_t *order;                  /* [rows that come] scratch */
} moe__ranks;

#endif
