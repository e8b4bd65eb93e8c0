/* ranks.h - experts on several ranks: where they are, what a pass keeps of an exchange, and the
 * steps that the layer runs.
 *
 * A slot is a place of a rank's pool, numbered over all ranks; it holds an expert, or a slice of
 * one, by its number e S + s. A position is a place of a row in what travels.
 *
 * What is counted is in the host's memory, rows and plans are in the backend's. */
#ifndef MOE_RANKS_H
#define MOE_RANKS_H

#include "internal.h"
#include "travel.h"

/* Words that a rank tells every rank in every call; the first is compared modulo CALLS. */
enum { MOE__RANKS_HEADER = 3, MOE__RANKS_CALLS = 4 };

/* What a backward brings back, as bits: dx of rows, gradients by their weights, dx of secondary
 * gates' rows. */
enum { MOE__WANT_DX = 1, MOE__WANT_WEIGHTS = 2, MOE__WANT_GATE_DX = 4, MOE__WANTS = 8 };

/* Ranks as a grid, with rank l of node n at n L + l: a token's row goes to each node once, from
 * where it is passed on. ranks_relay.c */
typedef struct moe__grid {
    int64_t nodes, width;         /* N, L; 0: rows go straight */
    int64_t node, number;         /* of this rank; number is its rank in node_comm */
    int64_t slots;                /* of this rank's node */
    int64_t *rank_at;             /* [N L] in comm */
    int64_t *node_of, *number_of; /* [P] of each rank */
} moe__grid;

/* Of a layer. ranks_join.c; the grid: ranks_grid.c */
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
    moe__grid grid;
    bool replicas; /* some number is in two slots */
    bool in_order; /* slot i holds number i, and there are no slices */
    int64_t bytes; /* of all this, one block */
} moe__placement;

/* Rows first .. first+rows-1 of those that a rank has for a slot. */
typedef struct moe__range {
    int64_t first, rows;
} moe__range;

/* Bytes of a row that travels, and where its parts begin. A backend with memory of its own moves 16
 * bytes at once, so there rows are multiples of them. */
typedef struct moe__row_sizes {
    int64_t x, weight_at;  /* x, weight */
    int64_t again, dy_at;  /* x, weight, dy */
    int64_t dy, out;       /* these alone */
    int64_t back, grad_at; /* dx, gradient by the weight */
} moe__row_sizes;

/* Memory of one kind: the host's, or the backend's. */
typedef struct moe__room {
    void *memory;
    int64_t bytes;
} moe__room;

/* A row of so many bytes where it travels. */
static inline int64_t moe__ranks_whole(bool on_host, int64_t bytes)
{
    return on_host || bytes < 0 ? bytes : (moe__add(bytes, 15) / 16) * 16;
}

static inline moe__row_sizes moe__row_sizes_of(const moe_experts_config *e, bool on_host)
{
    int64_t size = moe__dtype_size(e->dtype), real = moe__dtype_size(moe__real_dtype(e->dtype));
    int64_t x = moe__mul(e->d_model, size), out = moe__mul(e->d_out, size);
    moe__row_sizes s;
    s.weight_at = s.grad_at = moe__add(x, real - 1) / real * real;
    s.x = s.back = moe__ranks_whole(on_host, s.weight_at + real);
    s.dy_at = s.x;
    s.dy = s.out = moe__ranks_whole(on_host, out);
    s.again = moe__ranks_whole(on_host, moe__add(s.x, out));
    return s;
}

/* Where rows go in a round: moe__moves of the backend. One block, on the host, and once more in the
 * backend's memory if that is another. */
typedef struct moe__tables {
    int64_t *slot_of_number; /* [E S] the placement's, as the next two */
    int64_t *number_of_slot; /* [slots] */
    int64_t *first_slot;     /* [P+1] */
    int64_t *here_first;     /* [slots+1] of rows of this rank's plan by slot, */
    int64_t *here_from;      /* [slots] rows of the plan */
    int64_t *here_to;        /* [slots] positions in `here` */
    int64_t *back_to;        /* [slots] rows in `results` */
    int64_t *all_at;         /* [slots+1] the first row of each slot in `results` */
    int64_t *there_first;    /* [own*P+1] of rows of the owner's plan by slot and source, */
    int64_t *there_from;     /* [own*P] rows of the experts' arrays */
    int64_t *there_to;       /* [own*P] positions in `x`, and */
    int64_t *there_back;     /* [own*P] in `there`: the same, unless rows come by way of others */
    int64_t *node_of_number; /* [E S] from here on with a grid only */
    int64_t *block_first;    /* [N+1] of tokens of the blocks for nodes, */
    int64_t *block_to;       /* [N] rows in `out` */
    int64_t *record_to;      /* [slots] records in `out` */
    moe__window *record_window; /* [slots] places of the node's tokens */
    int64_t *on_first;          /* [slots of the node * N + 1] of rows that go on, by rank of the
                                   node, source node and slot, */
    int64_t *on_from;           /* records in `in`, and */
    moe__window *on_window;     /* the block's rows there */
} moe__tables;

/* Secondary gates of a hierarchical gate that live with their groups: ranks_second.c. */
typedef struct moe__second {
    moe__room counts, device, rows, index_room; /* host, backend, backend, host */
    int64_t *in_count;                          /* [P, local groups] rows that come */
    int64_t *send_begin, *recv_begin;           /* [P+1] rows to and from each rank */
    int64_t *part_begin;                        /* [local groups + 1] as the job's */
    int64_t *segment_begin;                     /* [local groups P + 1] likewise */
    int64_t *segment_at;                        /* [local groups P] where each came; */
    int64_t *there_segment_at;                  /* in the backend's memory */
    int64_t *index; /* [rows that come] where row r by (group, source) arrived */
    int64_t came;   /* rows */
    moe__second_job job;
    void *x;     /* [rows that come, D] */
    void *d;     /* [rows that come, B or 2 B] by logits, and by the raw noise */
    void *here;  /* rows that this rank sends, and gets */
    void *there; /* rows that go back */
} moe__second;

/* Rows that go to nodes, and those of other ranks that pass through this one. */
typedef struct moe__relay {
    moe__room room;         /* the backend's: place, token, begin, scratch */
    int64_t *place, *token; /* as of moe__unique_job */
    int64_t *begin, *scratch;
    int64_t *unique;                /* [N+1] begin on the host */
    int64_t *in_unique;             /* [N] rows of tokens from each node of the rail, and */
    int64_t *in_count;              /* [N, slots of the node] rows of experts made of them */
    int64_t *rail_send, *rail_recv; /* [N+1] positions */
    int64_t *node_send, *node_recv; /* [L+1] */
    int64_t passing;                /* the sum of in_count */
    void *out, *in, *on; /* for nodes; from nodes; rows of experts for this node's ranks */
    int64_t *index;      /* [passing] which of its block's rows each is; a backward needs it */
} moe__relay;

/* Of a pass. P ranks; `own` slots are this rank's. */
typedef struct moe__ranks {
    moe__room counts, tables_room, rows, keep, keep_rows, staged; /* host, backend, backend, host,
                                                                     backend, host */
    moe__row_sizes size;
    int64_t *out_begin, *in_begin;    /* [P+1] words to and from each rank */
    int64_t *words_out, *words_in;    /* for or of each rank: a header, its rows for each slot */
    int64_t *answer_out, *answer_in;  /* of an owner: see ranks_words.c */
    int64_t *count, *place;           /* [slots] rows of this rank; where the first of them is among
                                          all rows of the owner */
    int64_t *row;                     /* [slots] the first of them in this rank's plan */
    int64_t plan_rows;                /* of this rank's plan */
    int64_t *limit;                   /* [P] rows of an owner's round; 0: all */
    int64_t *in_count, *in_place;     /* [P,own] the same of what comes */
    int64_t in_rows;                  /* their sum */
    int64_t rounds, round;            /* of all ranks; the present one */
    moe__range *send, *come;          /* [slots], [P,own] of the round */
    int64_t *sent_at, *came_at;       /* [slots], [P,own] position of the first row */
    int64_t chunk;                    /* the present one of exchange_chunks */
    int64_t *send_begin, *recv_begin; /* [C,P+1] positions in each chunk to and from each rank */
    int64_t *expert_begin;            /* [own+1] of the owner's plan in the round */
    moe__tables tables, there_tables; /* on the host; in the backend's memory */
    int32_t request[MOE_COMM_REQUESTS]; /* of rows: started - finished are in flight, in turn */
    moe_comm *on[MOE_COMM_REQUESTS];    /* and the communicators they are on */
    uint32_t started, finished;
    bool routes;           /* the gate runs in this call */
    bool took_part;        /* in this call: the others know how it went here */
    bool agreed;           /* the failure is known to all ranks */
    int32_t wants, wanted; /* MOE__WANT_* of this rank's backward; of any rank's: it travels */
    moe__plan_arrays plan; /* of what came: a token is a position */
    moe__plan_arrays view; /* the chunk's part of it, with the plan's numbers of rows */
    moe__experts_job job;
    moe__dw_carry carry[3];     /* of w1, w3, w2 */
    moe__dw_sums sums[2][3];    /* what they go between */
    int64_t x_bytes;            /* of a row of x */
    void *x;                    /* [positions] rows that came: x, weight, and dy if they came
                                together */
    void *dy;                   /* [positions] those that came by themselves */
    void *here, *there;         /* rows that this rank sends; that go back */
    void *home;                 /* those that came back: `here`, or beside it where some may still
                                   leave, as those of a later chunk without a stream's order */
    void *results;              /* by slot, what came back; here, or where all rounds' meet */
    void *merged;               /* in the order of the plan; NULL: results are */
    void *entry_grad;           /* [positions] */
    void *scratch;              /* of the experts; NULL: the pass's */
    int64_t *record;            /* what was wrong with blocks that nobody waited for; or NULL */
    void *no_sums;              /* room for the sums of a batch of a rank that declines; or NULL */
    int64_t seen;               /* an earlier record, which this call returns */
    const void *back_rows;      /* [rows of the plan] what a call makes, */
    int64_t back_bytes;         /* so many apart */
    void *stage_out, *stage_in; /* on the host: what a transport without the backend's memory takes
                                   and gives */
    int64_t stage_out_bytes, stage_in_bytes;
    void *to_store; /* in the backend's memory: where the first store_bytes of stage_in go, or */
    int64_t store_bytes; /* NULL */
    moe__second second;
    moe__relay relay;
    uint8_t *keep_here, *keep_there; /* [rows by slot], [rows that come] whether it stays */
    void *score_here, *score_there;  /* likewise, weights */
    int64_t *order;                  /* [rows that come] scratch */
} moe__ranks;

#endif
