/* crew.c - see crew.h. */
#include "support/crew.h"
#include "support/layer_case.h"
#include "support/real.h"
#include "support/suite.h"

#include <check.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

int64_t member_share(int32_t rank, int32_t ranks, int64_t experts)
{
    return experts / ranks + (rank < experts % ranks);
}

moe_status member_note(member *m, moe_status status)
{
    m->status = status;
    (void)snprintf(m->error, sizeof m->error, "%s", status == MOE_OK ? "" : moe_last_error());
    return status;
}

static void connect_member(member *m, double timeout)
{
    crew *c = m->crew;
    if (OVER_NCCL)
        m->comm = device_nccl_connect(&c->nccl, m->context, m->rank, timeout);
    else
        MUST(moe_comm_create_in_world(&m->comm, c->world, m->context, m->rank, timeout));
    ck_assert_msg(m->comm != NULL, "%s", moe_last_error());
}

static void join_node(member *m, double timeout)
{
    crew *c = m->crew;
    int32_t node = m->rank % c->nodes, number = m->rank / c->nodes;
    MUST(moe_comm_create_in_world(&m->node_comm, c->node_world[node], m->context, number, timeout));
    MUST(moe_comm_create_in_world(&m->rail_comm, c->rail_world[number], m->context, node, timeout));
}

#ifdef MOE_TEST_NCCL
static void begin_rank(const member *m) { device_take_stream(m->rank); }
static void end_rank(void) { device_give_stream(); }
#else
static void begin_rank(const member *m) { (void)m; }
static void end_rank(void) {}
#endif

static void *member_thread(void *argument)
{
    member *m = argument;
    double timeout = m->crew->timeout > 0 ? m->crew->timeout : 60;
    begin_rank(m);
    if (m->context_config.struct_size == 0) {
        MUST(moe_context_config_init(&m->context_config, sizeof m->context_config));
        m->context_config.threads = 1;
    }
    MUST(moe_context_create(&m->context, &m->context_config));
    connect_member(m, timeout);
    if (m->crew->nodes > 0) join_node(m, timeout);
    m->crew->run(m);
    device_nccl_leave(&m->crew->nccl, m->rank, m->comm);
    member_free(m);
    end_rank();
    return NULL;
}

/* With nodes a world for each, and one for each number in them. */
static void make_worlds(crew *c, moe_context *context)
{
    MUST(moe_world_create(&c->world, context, c->ranks));
    for (int32_t n = 0; n < c->nodes; n++)
        MUST(moe_world_create(&c->node_world[n], context, c->ranks / c->nodes));
    for (int32_t l = 0; c->nodes && l < c->ranks / c->nodes; l++)
        MUST(moe_world_create(&c->rail_world[l], context, c->nodes));
}

void crew_run(crew *c, member *members)
{
    moe_context *context = NULL;
    pthread_t thread[CREW_MOST];
    MUST(moe_context_create(&context, NULL));
    make_worlds(c, context);
    device_nccl_open(&c->nccl, c->ranks);
    for (int32_t r = 0; r < c->ranks; r++) {
        members[r].crew = c, members[r].rank = r;
        ck_assert_int_eq(pthread_create(&thread[r], NULL, member_thread, &members[r]), 0);
    }
    for (int32_t r = 0; r < c->ranks; r++) ck_assert_int_eq(pthread_join(thread[r], NULL), 0);
    device_nccl_close(&c->nccl);
    for (int i = 0; i < CREW_MOST; i++)
        moe_world_destroy(c->node_world[i]), moe_world_destroy(c->rail_world[i]);
    moe_world_destroy(c->world), moe_context_destroy(context);
}

moe_status member_make(member *m, int64_t experts)
{
    int64_t own = member_share(m->rank, m->crew->ranks, experts);
    MUST(moe_gate_config_init(&m->g, sizeof m->g));
    MUST(moe_experts_config_init(&m->e, sizeof m->e));
    MUST(moe_layer_config_init(&m->l, sizeof m->l));
    MUST(moe_forward_args_init(&m->f, sizeof m->f));
    MUST(moe_backward_args_init(&m->b, sizeof m->b));
    m->g.d_model = m->e.d_model = CREW_D, m->e.d_hidden = CREW_F;
    m->g.dtype = m->e.dtype = REAL;
    m->g.num_experts = experts, m->g.top_k = 2;
    m->e.num_experts = own > 0 ? own : MOE_NO_EXPERTS;
    m->l.comm = m->comm, m->l.node_comm = m->node_comm, m->l.rail_comm = m->rail_comm;
    if (m->crew->configure) m->crew->configure(m);
    MUST(moe_gate_create(&m->gate, m->context, &m->g));
    MUST(moe_experts_create(&m->experts, m->context, &m->e));
    m->l.gate = m->gate, m->l.experts = m->experts;
    if (m->crew->ready) m->crew->ready(m);
    if (member_note(m, moe_layer_create(&m->layer, &m->l)) != MOE_OK) return m->status;
    MUST(moe_layer_init_parameters(m->layer, 5));
    return member_note(m, moe_pass_create(&m->pass, m->layer, NULL));
}

void member_free(member *m)
{
    moe_pass_destroy(m->pass), moe_layer_destroy(m->layer), moe_gate_destroy(m->gate);
    moe_experts_destroy(m->experts), moe_comm_destroy(m->comm);
    moe_comm_destroy(m->node_comm), moe_comm_destroy(m->rail_comm), moe_context_destroy(m->context);
    m->node_comm = m->rail_comm = NULL;
    m->pass = NULL, m->layer = NULL, m->gate = NULL, m->experts = NULL, m->comm = NULL;
    m->context = NULL;
}
