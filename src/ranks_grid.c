/* ranks_grid.c - ranks as a grid of nodes: node_comm and rail_comm of a layer, when it is made.
 *
 * Every rank has told all its number in its node (its rank in node_comm) and its node's (its rank
 * in rail_comm). These must be N L pairs, each once; and each communicator must have, at each of
 * its ranks, the rank that the grid has there, which is asked over it. */
#include "pass_state.h"

#include <string.h>

void moe__grid_lay_out(moe__grid *g, moe__arena *arena, int64_t P)
{
    g->rank_at = moe__arena_take(arena, P, sizeof *g->rank_at);
    g->node_of = moe__arena_take(arena, P, sizeof *g->node_of);
    g->number_of = moe__arena_take(arena, P, sizeof *g->number_of);
}

/* rank_at, from node_of and number_of; the same on every rank. */
static moe_status fill(moe__grid *g, int64_t P, const char *function)
{
    if (moe__mul(g->nodes, g->width) != P)
        REFUSE_ARGUMENT("node_comm has %lld ranks and rail_comm %lld, comm has %lld, not %lld",
                        (ll)g->width, (ll)g->nodes, (ll)P, (ll)moe__mul(g->nodes, g->width));
    for (int64_t i = 0; i < P; i++) g->rank_at[i] = -1;
    for (int64_t p = 0; p < P; p++) {
        int64_t *at = &g->rank_at[g->node_of[p] * g->width + g->number_of[p]];
        if (*at >= 0)
            REFUSE_ARGUMENT("ranks %lld and %lld are both rank %lld of node_comm and %lld of "
                            "rail_comm",
                            (ll)*at, (ll)p, (ll)g->number_of[p], (ll)g->node_of[p]);
        *at = p;
    }
    return MOE_OK;
}

/* Whether rank i of a communicator is rank_at[i step] of comm. scratch: [2 size + 2] */
static moe_status check_members(const moe_layer_config *c, moe_comm *part, const char *name,
                                const int64_t *rank_at, int64_t step, int64_t *scratch,
                                const char *function)
{
    int64_t *begin = scratch + part->size + 1, *own = scratch + part->size;
    for (int64_t i = 0; i <= part->size; i++) begin[i] = i;
    *own = c->comm->rank;
    MOE_TRY(moe_comm_all_gather(part, scratch, begin, own, (int64_t)sizeof *own));
    for (int64_t i = 0; i < part->size; i++)
        if (scratch[i] != rank_at[i * step])
            REFUSE_ARGUMENT("rank %lld of rank %d's %s is rank %lld of comm, not rank %lld", (ll)i,
                            (int)c->comm->rank, name, (ll)scratch[i], (ll)rank_at[i * step]);
    return MOE_OK;
}

/* Both are asked, as others of either wait. scratch: [2 N + 2 L + 4] */
static moe_status check_both(const moe_layer_config *c, const moe__grid *g, int64_t *scratch,
                             const char *function)
{
    char message[MOE__MESSAGE_SIZE];
    moe_status node = check_members(c, c->node_comm, "node_comm", g->rank_at + g->node * g->width,
                                    1, scratch, function);
    memcpy(message, moe_last_error(), sizeof message);
    moe_status rail = check_members(c, c->rail_comm, "rail_comm", g->rank_at + g->number, g->width,
                                    scratch + 2 * (g->width + 1), function);
    if (node == MOE_OK) return rail;
    moe__restore_message(message);
    return node;
}

/* All ranks go on, or none does. scratch: [2 P + 2] */
static moe_status agree(moe_comm *comm, moe_status status, int64_t *scratch, const char *function)
{
    int64_t *begin = scratch + comm->size + 1, *own = scratch + comm->size;
    char message[MOE__MESSAGE_SIZE];
    for (int64_t p = 0; p <= comm->size; p++) begin[p] = p;
    *own = status;
    memcpy(message, moe_last_error(), sizeof message);
    moe_status sent = moe_comm_all_gather(comm, scratch, begin, own, (int64_t)sizeof *own);
    if (status != MOE_OK) moe__restore_message(message);
    if (status != MOE_OK || sent != MOE_OK) return status != MOE_OK ? status : sent;
    for (int64_t p = 0; p < comm->size; p++) {
        moe_status there = moe__is_status(scratch[p]) ? (moe_status)scratch[p]
                                                      : MOE_ERROR_TRANSPORT;
        if (there != MOE_OK) REFUSE(there, "rank %lld failed: %s", (ll)p, moe_status_text(there));
    }
    return MOE_OK;
}

moe_status moe__grid_find(moe__placement *w, const moe_layer_config *c, const int64_t *node,
                          const int64_t *number, int64_t apart, const char *function)
{
    moe__grid *g = &w->grid;
    moe_context *context = c->comm->context;
    int64_t P = c->comm->size, N = c->rail_comm->size, L = c->node_comm->size;
    int64_t bytes = 2 * (P + N + L + 3) * (int64_t)sizeof(int64_t);
    g->nodes = c->rail_comm->size, g->width = c->node_comm->size;
    g->node = c->rail_comm->rank, g->number = c->node_comm->rank;
    for (int64_t p = 0; p < P; p++) {
        g->node_of[p] = node[p * apart], g->number_of[p] = number[p * apart];
        if (g->node_of[p] < 0 || g->node_of[p] >= g->nodes || g->number_of[p] < 0 ||
            g->number_of[p] >= g->width)
            REFUSE(MOE_ERROR_TRANSPORT, "rank %lld said that it is rank %lld of node %lld", (ll)p,
                   (ll)g->number_of[p], (ll)g->node_of[p]);
    }
    MOE_TRY(fill(g, P, function));
    for (int64_t l = 0; l < g->width; l++) {
        int64_t p = g->rank_at[g->node * g->width + l];
        g->slots += w->first_slot[p + 1] - w->first_slot[p];
    }
    int64_t *scratch = moe__alloc(context, bytes);
    if (!scratch) {
        moe_comm_abort(c->comm), moe_comm_abort(c->node_comm), moe_comm_abort(c->rail_comm);
        REFUSE(MOE_ERROR_OUT_OF_MEMORY, "no memory for %lld ranks", (ll)P);
    }
    moe_status status = check_both(c, g, scratch, function);
    status = agree(c->comm, status, scratch + 2 * (N + L + 2), function);
    moe__layer_free(c, context, scratch, bytes);
    return status;
}
