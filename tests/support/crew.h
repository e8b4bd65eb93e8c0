/* crew.h - small layers on ranks that are threads, of a world or over NCCL (MOE_TEST_NCCL), each
 * with a function of the test. */
#ifndef TESTS_SUPPORT_CREW_H
#define TESTS_SUPPORT_CREW_H

#include "support/device/device_nccl.h"

#include <moe/moe.h>

#include <stdbool.h>

enum { CREW_MOST = 16, CREW_D = 3, CREW_F = 4 };

typedef struct member member;

/* What all have in common. */
typedef struct crew {
    int32_t ranks;
    void (*run)(member *m);       /* on each rank's thread, with its communicator made */
    void (*configure)(member *m); /* before gate and pool are made; may be NULL */
    void (*ready)(member *m);     /* before the layer is made; may be NULL */
    void *test;
    double timeout; /* seconds; 0: 60 */
    int32_t nodes;  /* 0: rows go straight; else rank r is rank r / nodes of node r % nodes */
    moe_world *world, *node_world[CREW_MOST], *rail_world[CREW_MOST];
    device_nccl nccl;
} crew;

struct member {
    crew *crew;
    int32_t rank;
    moe_context_config context_config;
    moe_context *context;
    moe_comm *comm, *node_comm, *rail_comm;
    moe_gate_config g;
    moe_experts_config e;
    moe_layer_config l;
    moe_gate *gate;
    moe_experts *experts;
    moe_layer *layer;
    moe_pass *pass;
    moe_forward_args f;
    moe_backward_args b;
    moe_status status;
    char error[512]; /* of a call that the test notes */
    void *own;       /* the test's */
};

/* Runs every rank; members[ranks] keep what the test has put there. */
void crew_run(crew *c, member *members);
/* Makes gate, pool, layer (E experts over all ranks in order, K 2, f64 or on a device f32,
 * parameters drawn) and pass; configure changes configs first. Returns the status of
 * moe_layer_create. */
moe_status member_make(member *m, int64_t experts);
/* Keeps status and moe_last_error(). */
moe_status member_note(member *m, moe_status status);
void member_free(member *m);
/* The experts of a rank in order: E/P + (r < E mod P). */
int64_t member_share(int32_t rank, int32_t ranks, int64_t experts);

#endif
