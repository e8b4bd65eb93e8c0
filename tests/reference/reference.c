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

static void make_room(const ref_problem *p, ref_result *r)
{
    int64_t TE = p->T * p->E, TK = p->T * p->K, expert = p->E;
    memset(r, 0, sizeof *r);
    r->logits = reals(TE), r->H = reals(TE), r->sd = reals(TE);
    r->ids = room(TK, sizeof *r->ids), r->keep = room(TK, sizeof *r->keep);
    r->w_before = reals(TK), r->w = reals(TK), r->d_w = reals(TK);
    r->importance = reals(p->E), r->load = reals(p->E);
    r->counts = room(p->E, sizeof *r->counts);
    r->y = reals(p->T * p->O), r->dx = reals(p->T * p->D), r->d_gate_x = reals(p->T * p->gate_D);
    r->d_logits = reals(TE), r->dWg = reals(p->gate_D * p->E), r->dbg = reals(p->E);
    r->dWn = reals(p->gate_D * p->E);
    r->dW1 = reals(expert * p->D * p->F), r->db1 = reals(expert * p->F);
    r->dW3 = reals(expert * p->D * p->F), r->db3 = reals(expert * p->F);
    r->dW2 = reals(expert * p->F * p->O), r->db2 = reals(expert * p->O);
}

void ref_free(ref_result *r)
{
    void *all[] = {r->logits, r->H,        r->sd,         r->ids,  r->keep,   r->w_before,
                   r->w,      r->d_w,      r->importance, r->load, r->counts, r->y,
                   r->dx,     r->d_gate_x, r->d_logits,   r->dWg,  r->dbg,    r->dWn,
                   r->dW1,    r->db1,      r->dW3,        r->db3,  r->dW2,    r->db2};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    memset(r, 0, sizeof *r);
}

void ref_run(const ref_problem *p, ref_result *r, int backward)
{
    int routed = !p->fixed_weights;
    make_room(p, r);
    if (routed) ref__gate_logits(p, r);
    ref__select_experts(p, r);
    ref__weigh(p, r);
    ref__drop(p, r);
    ref__count_all(p, r);
    ref__statistics(p, r);
    if (routed) ref__batch_losses(p, r);
    if (routed) ref__softmax_losses(p, r);
    if (routed) ref__sequence_loss(p, r);
    if (p->dy) ref__run_experts(p, r, backward);
    for (int i = 0; i < REF_LOSSES; i++) r->total += p->factor[i] * r->loss[i];
    for (int64_t n = 0; n < p->T * p->K && p->weight_grad; n++) {
        r->total += p->weight_grad[n] * r->w[n];
        r->d_w[n] += r->keep[n] ? p->weight_grad[n] : 0;
    }
    if (backward && routed) ref__gate_backward(p, r);
}
