/* ranks_rig.h - the ranks of a test on threads, and what connects them: a world, and where rows go
 * by nodes one for each node and one for each number in them; on a device worlds of threads, of
 * devices, or NCCL. Of one test program: static functions. */
#ifndef TESTS_SUPPORT_RANKS_RIG_H
#define TESTS_SUPPORT_RANKS_RIG_H

#include "support/layer_case.h"
#include "support/ranks.h"

#include <check.h>
#include <pthread.h>

#ifdef MOE_TEST_DEVICE
#include "support/device/device_world.h"
#endif
#include "support/device/device_nccl.h"

/* What some ranks are connected by. */
typedef struct transport {
    moe_world *world;
#ifdef MOE_TEST_DEVICE
    device_world *devices; /* or NULL */
#endif
#ifdef MOE_TEST_NCCL
    device_nccl nccl;
#endif
} transport;

/* devices: rows go from device to device, in the order of streams, or through the host. */
static void transport_open(transport *t, moe_context *context, bool devices, int32_t ranks)
{
    *t = (transport){0};
#ifdef MOE_TEST_NCCL
    (void)context, (void)devices;
    device_nccl_open(&t->nccl, ranks);
#else
#ifdef MOE_TEST_DEVICE
    if (devices) {
        t->devices = device_world_create(context, ranks);
        return;
    }
#endif
    (void)devices;
    MUST(moe_world_create(&t->world, context, ranks));
#endif
}

/* On the rank's thread. */
static moe_comm *transport_connect(transport *t, moe_context *context, int32_t rank)
{
    moe_comm *comm = NULL;
#ifdef MOE_TEST_NCCL
    comm = device_nccl_connect(&t->nccl, context, rank, 30);
#else
#ifdef MOE_TEST_DEVICE
    if (t->devices)
        comm = device_world_connect(t->devices, context, rank, 30);
    else
#endif
        MUST(moe_comm_create_in_world(&comm, t->world, context, rank, 30));
#endif
    ck_assert_ptr_nonnull(comm);
    return comm;
}

static void transport_close(transport *t)
{
#ifdef MOE_TEST_NCCL
    device_nccl_close(&t->nccl);
#endif
#ifdef MOE_TEST_DEVICE
    if (t->devices) device_world_destroy(t->devices);
#endif
    moe_world_destroy(t->world);
}

typedef struct rig {
    int32_t ranks, nodes;
    transport all, node[RANKS_MOST], rail[RANKS_MOST];
} rig;

static moe_comm *rig_connect(part *p)
{
    rig *g = p->connection;
    moe_comm *comm = transport_connect(&g->all, p->context, p->rank);
    if (g->nodes == 0) return comm;
    p->node_comm = transport_connect(&g->node[p->node], p->context, p->in_node);
    p->rail_comm = transport_connect(&g->rail[p->in_node], p->context, p->node);
    return comm;
}

static void rig_open(rig *g, part *parts, const whole *w, uint64_t number)
{
    bool devices = number / 2 % 2;
    transport_open(&g->all, w->context, devices, g->ranks);
    for (int32_t n = 0; n < g->nodes; n++)
        transport_open(&g->node[n], w->context, devices, g->ranks / g->nodes);
    for (int32_t l = 0; g->nodes && l < g->ranks / g->nodes; l++)
        transport_open(&g->rail[l], w->context, devices, g->nodes);
    for (int32_t r = 0; r < g->ranks; r++) parts[r].connect = rig_connect, parts[r].connection = g;
}

static void rig_close(rig *g)
{
    for (int32_t n = 0; n < g->nodes; n++) transport_close(&g->node[n]);
    for (int32_t l = 0; g->nodes && l < g->ranks / g->nodes; l++) transport_close(&g->rail[l]);
    transport_close(&g->all);
}

/* Over NCCL a rank has a device of its own: to free memory of one that others share waits for what
 * they wait for. */
static void *rig_thread(void *argument)
{
#ifdef MOE_TEST_DEVICE
    const part *p = argument;
    device_take_stream(OVER_NCCL ? p->rank : 0);
#endif
    part_run(argument);
#ifdef MOE_TEST_DEVICE
    device_give_stream();
#endif
    return NULL;
}

/* The layer of a kind and number on so many ranks against one; nodes 0: rows go straight. */
static void rig_run(int32_t kind, uint64_t number, int32_t ranks, int32_t nodes)
{
    whole w;
    part parts[RANKS_MOST];
    pthread_t thread[RANKS_MOST];
    rig g = {.ranks = ranks, .nodes = nodes};
    whole_make(&w, kind, number, ranks, ranks_way(kind, number));
    parts_share(parts, &w, number, ranks);
    if (nodes) parts_by_node(parts, ranks, nodes, number);
    rig_open(&g, parts, &w, number);
    for (int32_t r = 0; r < ranks; r++)
        ck_assert_int_eq(pthread_create(&thread[r], NULL, rig_thread, &parts[r]), 0);
    for (int32_t r = 0; r < ranks; r++) ck_assert_int_eq(pthread_join(thread[r], NULL), 0);
    whole_run(&w);
    for (int32_t r = 0; r < ranks; r++) part_compare(&parts[r]);
    for (int32_t r = 0; r < ranks; r++) part_free(&parts[r]);
    rig_close(&g), whole_free(&w);
}

#endif
