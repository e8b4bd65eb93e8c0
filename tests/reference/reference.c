/* reference.c - the parts of ref_run in the order of the picture: gate, plan, losses, experts. */
#include "reference/reference_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *ref__room(int64_t count, size_t size)
{
    void *memory = calloc((size_t)count + 1, size);
    if (!memory) {
        fprintf(stderr, "reference: out of memory\n");
        exit(2);
    }
    return memory;
}

static void make_pool_room(const ref_problem *p, const ref_pool *q, ref_pool_gradient *g)
{
    g->dW1 = reals(q->E * p->D * q->F), g->db1 = reals(q->E * q->F);
    g->dW3 = reals(q->E * p->D * q->F), g->db3 = reals(q->E * q->F);
    g->dW2 = reals(q->E * q->F * p->O), g->db2 = reals(q->E * p->O);
}

static void make_level_room(const ref_problem *p, ref_levels *l)
{
    int64_t A = p->kind == HIERARCHICAL ? p->expert_groups : 0, TA = p->T * A, TE = p->T * p->E;
    if (!A) TE = 0;
    l->clean1 = reals(TA), l->H1 = reals(TA), l->sd1 = reals(TA), l->w1 = reals(TA);
    l->clean2 = reals(TE), l->H2 = reals(TE), l->sd2 = reals(TE), l->w2 = reals(TE);
    l->chosen1 = room(TA, sizeof(int)), l->chosen2 = room(TE, sizeof(int));
    l->load1 = reals(A), l->load2 = reals(p->E), l->rows = room(A, sizeof *l->rows);
}

static void make_room(const ref_problem *p, ref_result *r)
{
    int64_t TE = p->T * p->E, TK = p->T * p->K, primary = p->gate_D * p->expert_groups;
    memset(r, 0, sizeof *r);
    r->logits = reals(TE), r->H = reals(TE), r->sd = reals(TE);
    r->ids = room(TK, sizeof *r->ids), r->keep = room(TK, sizeof *r->keep);
    r->slot = room(TK, sizeof *r->slot);
    r->w_before = reals(TK), r->w = reals(TK), r->d_w = reals(TK);
    r->importance = reals(p->E), r->load = reals(p->E);
    r->counts = room(p->E, sizeof *r->counts);
    r->y = reals(p->T * p->O), r->dx = reals(p->T * p->D), r->d_gate_x = reals(p->T * p->gate_D);
    r->d_logits = reals(TE), r->dWg = reals(p->gate_D * p->E), r->dbg = reals(p->E);
    r->dWn = reals(p->gate_D * p->E), r->dWp = reals(primary), r->dWq = reals(primary);
    r->d_threshold = reals(p->E);
    r->dws = reals(p->D), r->dWc = reals(2 * p->D), r->dbc = reals(2);
    make_level_room(p, &r->levels);
    make_pool_room(p, &p->routed, &r->routed);
    make_pool_room(p, &p->shared, &r->shared);
    make_pool_room(p, &p->residual, &r->residual);
}

static void free_pool(ref_pool_gradient *g)
{
    free(g->dW1), free(g->db1), free(g->dW3), free(g->db3), free(g->dW2), free(g->db2);
}

void ref_free(ref_result *r)
{
    ref_levels *l = &r->levels;
    void *all[] = {r->logits, r->H,        r->sd,       r->ids,         r->keep,    r->slot,
                   r->w,      r->w_before, r->d_w,      r->importance,  r->load,    r->counts,
                   r->y,      r->dx,       r->d_gate_x, r->d_logits,    r->dWg,     r->dbg,
                   r->dWn,    r->dWp,      r->dWq,      r->d_threshold, r->dws,     r->dWc,
                   r->dbc,    l->clean1,   l->H1,       l->sd1,         l->w1,      l->clean2,
                   l->H2,     l->sd2,      l->w2,       l->chosen1,     l->chosen2, l->load1,
                   l->load2,  l->rows};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    free_pool(&r->routed), free_pool(&r->shared), free_pool(&r->residual);
    memset(r, 0, sizeof *r);
}

static void route(const ref_problem *p, ref_result *r)
{
    int routed = !p->fixed_weights, two = p->kind == HIERARCHICAL;
    for (int64_t n = 0; n < p->T * p->K; n++) r->slot[n] = -1;
    if (routed && two) {
        ref__levels_forward(p, r);
    } else {
        if (routed) ref__gate_logits(p, r);
        ref__select_experts(p, r);
        ref__weigh(p, r);
    }
    ref__drop(p, r);
    ref__count_all(p, r);
    ref__statistics(p, r);
    if (routed) ref__batch_losses(p, r);
    if (!routed || two) return;
    ref__softmax_losses(p, r);
    ref__sequence_loss(p, r);
    ref__threshold_loss(p, r);
}

void ref_run(const ref_problem *p, ref_result *r, int backward)
{
    make_room(p, r);
    route(p, r);
    if (p->dy) ref__run_layer(p, r, backward);
    for (int i = 0; i < REF_LOSSES; i++) r->total += p->factor[i] * r->loss[i];
    for (int64_t n = 0; n < p->T * p->K && p->weight_grad; n++) {
        r->total += p->weight_grad[n] * r->w[n];
        r->d_w[n] += r->keep[n] ? p->weight_grad[n] : 0;
    }
    if (!backward || p->fixed_weights) return;
    if (p->kind == HIERARCHICAL)
        ref__levels_backward(p, r);
    else
        ref__gate_backward(p, r);
}
