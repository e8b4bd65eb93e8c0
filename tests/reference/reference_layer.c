/* reference_layer.c - a token in a layer: routed experts, residual branch, shared experts.
 *
 *     y = c0 routed + c1 residual(x) + s shared(x),   c = softmax(x Wc + bc) or (1, 1),
 *     s = sigmoid(x . ws) or 1;   then the output function */
#include "reference/reference_parts.h"

#include <stdlib.h>

/* One token on its way. */
typedef struct token_state {
    double *routed, *residual, *shared; /* [O] */
    double c[2], s;
    int has_row;
    double *dy, *scaled; /* [O] */
    expert_state e;
} token_state;

/* Adds what expert e gives for weight w. */
static void add_expert(const ref_problem *p, const ref_pool *q, int64_t e, const double *x,
                       double w, double *to, expert_state *s)
{
    ref__expert_forward(p, q, e, x, w, s);
    for (int64_t o = 0; o < p->O; o++) to[o] += q->position == 0 ? w * s->out[o] : s->out[o];
}

static void coefficients(const ref_problem *p, const double *x, token_state *k)
{
    double z[2] = {0, 0}, g = 0;
    k->c[0] = k->c[1] = k->s = 1;
    for (int64_t d = 0; d < p->D && p->ws; d++) g += x[d] * p->ws[d];
    if (p->ws) k->s = sigmoid(g);
    if (!p->Wc) return;
    for (int i = 0; i < 2; i++) {
        z[i] = p->bc[i];
        for (int64_t d = 0; d < p->D; d++) z[i] += x[d] * p->Wc[d * 2 + i];
    }
    (void)ref__softmax_row(z, 2, k->c);
}

static void token_forward(const ref_problem *p, ref_result *r, int64_t t, token_state *k)
{
    const double *x = p->x + t * p->D;
    double *y = r->y + t * p->O;
    k->has_row = 0;
    for (int64_t o = 0; o < p->O; o++) k->routed[o] = k->residual[o] = k->shared[o] = 0;
    for (int64_t n = t * p->K; n < (t + 1) * p->K; n++) {
        if (!r->keep[n]) continue;
        add_expert(p, &p->routed, r->ids[n], x, r->w[n], k->routed, &k->e);
        k->has_row = 1;
    }
    for (int64_t o = 0; o < p->O && !k->has_row && p->dropped == 1; o++) k->routed[o] = x[o];
    for (int64_t e = 0; e < p->residual.E; e++)
        add_expert(p, &p->residual, e, x, 1, k->residual, &k->e);
    for (int64_t e = 0; e < p->shared.E; e++) add_expert(p, &p->shared, e, x, 1, k->shared, &k->e);
    coefficients(p, x, k);
    for (int64_t o = 0; o < p->O; o++) {
        y[o] = k->c[0] * k->routed[o] + k->c[1] * k->residual[o] + k->s * k->shared[o];
        if (p->layer_sigmoid) y[o] = sigmoid(y[o]);
        if (!k->has_row && p->dropped == 2) y[o] = p->untouched;
    }
}

/* All experts of a branch, its output multiplied by c; returns the gradient by c. */
static double branch_backward(const ref_problem *p, const ref_pool *q, ref_pool_gradient *g,
                              const double *x, double c, const double *out, double *dx,
                              token_state *k)
{
    double dc = 0;
    for (int64_t o = 0; o < p->O; o++) {
        dc += k->dy[o] * out[o];
        k->scaled[o] = c * k->dy[o];
    }
    for (int64_t e = 0; e < q->E; e++) {
        ref__expert_forward(p, q, e, x, 1, &k->e);
        (void)ref__expert_backward(p, q, g, e, x, 1, k->scaled, dx, &k->e);
    }
    return dc;
}

static void coefficients_backward(const ref_problem *p, ref_result *r, const double *x,
                                  const double *dc, double ds, double *dx, const token_state *k)
{
    double dot = k->c[0] * dc[0] + k->c[1] * dc[1], dg = ds * k->s * (1 - k->s);
    for (int64_t d = 0; d < p->D && p->ws; d++) r->dws[d] += dg * x[d], dx[d] += dg * p->ws[d];
    for (int i = 0; i < 2 && p->Wc; i++) {
        double dz = k->c[i] * (dc[i] - dot);
        r->dbc[i] += dz;
        for (int64_t d = 0; d < p->D; d++)
            r->dWc[d * 2 + i] += dz * x[d], dx[d] += dz * p->Wc[d * 2 + i];
    }
}

static void token_backward(const ref_problem *p, ref_result *r, int64_t t, token_state *k)
{
    const double *x = p->x + t * p->D, *y = r->y + t * p->O;
    double *dx = r->dx + t * p->D, dc[2] = {0, 0};
    if (!k->has_row && p->dropped == 2) return; /* y is not the layer's */
    for (int64_t o = 0; o < p->O; o++)
        k->dy[o] = p->dy[t * p->O + o] * (p->layer_sigmoid ? y[o] * (1 - y[o]) : 1);
    dc[1] = branch_backward(p, &p->residual, &r->residual, x, k->c[1], k->residual, dx, k);
    double ds = branch_backward(p, &p->shared, &r->shared, x, k->s, k->shared, dx, k);
    for (int64_t o = 0; o < p->O; o++) {
        dc[0] += k->dy[o] * k->routed[o];
        k->scaled[o] = k->c[0] * k->dy[o];
        if (!k->has_row && p->dropped == 1) dx[o] += k->scaled[o];
    }
    for (int64_t n = t * p->K; n < (t + 1) * p->K; n++) {
        if (!r->keep[n]) continue;
        ref__expert_forward(p, &p->routed, r->ids[n], x, r->w[n], &k->e);
        r->d_w[n] += ref__expert_backward(p, &p->routed, &r->routed, r->ids[n], x, r->w[n],
                                          k->scaled, dx, &k->e);
    }
    coefficients_backward(p, r, x, dc, ds, dx, k);
}

void ref__run_layer(const ref_problem *p, ref_result *r, int backward)
{
    token_state k = {.routed = reals(p->O), .residual = reals(p->O), .shared = reals(p->O)};
    k.dy = reals(p->O), k.scaled = reals(p->O), k.e = ref__new_state(p);
    for (int64_t t = 0; t < p->T; t++) {
        if (masked(p, t)) continue; /* y is 0 */
        token_forward(p, r, t, &k);
        for (int64_t o = 0; o < p->O; o++) r->total += r->y[t * p->O + o] * p->dy[t * p->O + o];
        if (backward) token_backward(p, r, t, &k);
    }
    free(k.routed), free(k.residual), free(k.shared), free(k.dy), free(k.scaled);
    ref__free_state(&k.e);
}
