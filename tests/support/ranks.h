/* ranks.h - one rank with all tokens and experts, and the same work shared out: what test programs
 * on threads and on processes compare. */
#ifndef TESTS_SUPPORT_RANKS_H
#define TESTS_SUPPORT_RANKS_H

#include "support/family.h"
#include "support/suite.h"

#include <stdbool.h>

enum {
    RANKS_KINDS = MOE_GATE_SINKHORN + 1,
    RANKS_MOST = 16,
    RANKS_TOKENS = 19,
    RANKS_NUMBERS = 16 /* most experts or slices */
};

/* How the work is shared out. */
enum {
    WAY_SHARDS,      /* uneven, in order; ranks without experts where there are too few */
    WAY_PLACED,      /* wherever, in any order; some ranks have none */
    WAY_ONE_OWNER,   /* all experts on the last rank: all rows go there */
    WAY_CHUNKS,      /* at most a few rows at once */
    WAY_PADDED,      /* blocks of one size */
    WAY_SLICES,      /* two slices of each expert, placed */
    WAY_GLOBAL,      /* losses and statistics over all ranks */
    WAY_PHASES,      /* start, work, finish */
    WAY_ALL_AT_ONCE, /* slices in chunks, losses over all ranks, in phases */
    RANKS_WAYS
};

int32_t ranks_way(int32_t kind, uint64_t number);
/* Tokens of each rank of 2, 3, 4, 8 or 16. */
int64_t ranks_tokens(int32_t ranks, int32_t rank);

typedef struct whole {
    family f;
    family_batch b;
    moe_context *context;
    moe_comm *comm; /* of one, where slices need it */
    moe_pass *pass;
    int64_t D, O, element, real; /* bytes of an element, and of what is computed with */
    int32_t way;
} whole;

/* One rank with everything: made, its batch drawn, not run yet. */
void whole_make(whole *w, int32_t kind, uint64_t number, int32_t ranks, int32_t way);
/* Runs forward and backward. */
void whole_run(whole *w);
void whole_free(whole *w);

typedef struct part part;
struct part {
    const whole *w;
    int32_t rank, ranks;
    int64_t first_token, tokens;
    int64_t experts, numbers[RANKS_NUMBERS]; /* experts or slices of this rank */
    bool with_group;                         /* secondary gates live with their groups */
    int64_t first_group, groups;
    uint64_t number;
    int32_t nodes, node,
        in_node; /* 0: rows go straight; else of so many nodes rank in_node of node */
    moe_comm *(*connect)(part *p); /* makes the communicator, of p->context; those of nodes too */
    void *connection;              /* for connect */
    moe_context *context;
    moe_comm *comm, *node_comm, *rail_comm;
    family f; /* its objects */
    void *y, *dx;
    moe_losses losses;
    moe_stats stats;
    double squared; /* norm of the gradient over all ranks */
};

/* The shares of all ranks. */
void parts_share(part *parts, const whole *w, uint64_t number, int32_t ranks);
/* Makes the ranks a grid of nodes, one after the other or, by number, in turn. */
void parts_by_node(part *parts, int32_t ranks, int32_t nodes, uint64_t number);
/* Whether rows of a way may go by nodes. */
bool ranks_way_by_node(int32_t way);
/* Makes one rank's layer and runs its tokens through it, forward, backward and the reduction. */
void part_run(part *p);
/* y, dx, gradients, norm and what is shared of a part are the bytes of the whole; on a device those
 * of y, dx and the experts' matrices, and sums over tokens that are cut by the shape of a batch are
 * near. */
void part_compare(const part *p);
void part_free(part *p);

#endif
