/* ranks.h - one rank with all tokens and experts, and the same work shared out: what test programs
 * on threads and on processes compare. */
#ifndef TESTS_SUPPORT_RANKS_H
#define TESTS_SUPPORT_RANKS_H

#include "support/family.h"
#include "support/suite.h"

#include <stdbool.h>

enum { RANKS_KINDS = MOE_GATE_SINKHORN + 1, RANKS_MOST = 8, RANKS_TOKENS = 19 };

/* Tokens of each rank of 2, 3, 4 or 8. */
int64_t ranks_tokens(int32_t ranks, int32_t rank);

typedef struct whole {
    family f;
    family_batch b;
    moe_context *context;
    moe_pass *pass;
    int64_t D, O, element;
} whole;

/* One rank with everything: made, its batch drawn, not run yet. */
void whole_make(whole *w, int32_t kind, uint64_t number, int32_t ranks);
/* Runs forward and backward. */
void whole_run(whole *w);
void whole_free(whole *w);

typedef struct part part;
struct part {
    const whole *w;
    int32_t rank, ranks;
    int64_t first_token, tokens, first_expert, experts;
    moe_comm *(*connect)(part *p); /* makes the communicator, of p->context */
    void *connection;              /* for connect */
    moe_context *context;
    moe_comm *comm;
    family f; /* its objects */
    void *y, *dx;
    double squared; /* norm of the gradient over all ranks */
};

/* The shares of all ranks; false if there are fewer experts than ranks. */
bool parts_share(part *parts, const whole *w, uint64_t number, int32_t ranks);
/* Makes one rank's layer and runs its tokens through it, forward, backward and the reduction. */
void part_run(part *p);
/* y, dx and gradients of a part are the bytes of the whole. */
void part_compare(const part *p);
void part_free(part *p);

#endif
