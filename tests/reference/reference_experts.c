/* reference_experts.c - one expert at one token, forward and backward. */
#include "reference/reference_parts.h"

#include <stdlib.h>

static double act(int activation, double z, double *slope)
{
    const double c = sqrt(2 / (4 * atan(1.0)));
    double u = c * (z + 0.044715 * z * z * z), t = tanh(u), s = sigmoid(z);
    switch (activation) {
    case 1:
    case 17:
        *slope = 0.5 * (1 + t);
        if (fabs(t) < 1) *slope += 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z);
        return 0.5 * z * (1 + t);
    case 2:
    case 18: *slope = normal_cdf(z) + z * normal_pdf(z); return z * normal_cdf(z);
    case 3:
    case 16: *slope = s * (1 + z * (1 - s)); return z * s;
    default: *slope = z > 0; return z > 0 ? z : 0;
    }
}

/* h of one hidden unit, and its slopes by z1 and z3. */
static double hidden(const ref_pool *q, double z1, double z3, double *slope1, double *slope3)
{
    double a = act(q->activation, z1, slope1), alpha = q->alpha != 0 ? q->alpha : 1;
    *slope3 = 0;
    if (q->activation < 16) return a;
    if (q->activation != 16) {
        *slope1 *= z3;
        *slope3 = a;
        return a * z3;
    }
    double limit = q->limit != 0 ? q->limit : INFINITY;
    double g = fmin(z1, limit), u = fmax(fmin(z3, limit), -limit), s = sigmoid(alpha * g);
    *slope1 = z1 <= limit ? (s + alpha * g * s * (1 - s)) * (u + q->offset) : 0;
    *slope3 = fabs(z3) <= limit ? g * s : 0;
    return g * s * (u + q->offset);
}

expert_state ref__new_state(const ref_problem *p)
{
    int64_t F = p->routed.F > p->shared.F ? p->routed.F : p->shared.F;
    if (p->residual.F > F) F = p->residual.F;
    return (expert_state){reals(p->D), reals(F),    reals(F),    reals(F), reals(F),   reals(F),
                          reals(F),    reals(p->O), reals(p->O), reals(F), reals(p->D)};
}

void ref__free_state(expert_state *s)
{
    free(s->x), free(s->z1), free(s->z3), free(s->h), free(s->h_in), free(s->slope1);
    free(s->slope3), free(s->out), free(s->dz), free(s->dh), free(s->dx_in);
}

void ref__expert_forward(const ref_problem *p, const ref_pool *q, int64_t e, const double *x,
                         double w, expert_state *s)
{
    for (int64_t d = 0; d < p->D; d++) s->x[d] = q->position == 2 ? w * x[d] : x[d];
    for (int64_t f = 0; f < q->F; f++) {
        s->z1[f] = q->b1 ? q->b1[e * q->F + f] : 0;
        s->z3[f] = q->b3 ? q->b3[e * q->F + f] : 0;
        for (int64_t d = 0; d < p->D; d++) {
            s->z1[f] += s->x[d] * q->W1[(e * p->D + d) * q->F + f];
            if (q->W3) s->z3[f] += s->x[d] * q->W3[(e * p->D + d) * q->F + f];
        }
        if (q->stored) s->z1[f] = q->stored(s->z1[f]), s->z3[f] = q->stored(s->z3[f]);
        s->h[f] = hidden(q, s->z1[f], s->z3[f], &s->slope1[f], &s->slope3[f]);
        s->h_in[f] = q->position == 1 ? w * s->h[f] : s->h[f];
    }
    for (int64_t o = 0; o < p->O; o++) {
        s->out[o] = q->b2 ? q->b2[e * p->O + o] : 0;
        for (int64_t f = 0; f < q->F; f++)
            s->out[o] += s->h_in[f] * q->W2[(e * q->F + f) * p->O + o];
        if (q->sigmoid) s->out[o] = sigmoid(s->out[o]);
    }
}

/* dh, and W2 and b2; returns the gradient by w if it multiplies out or h. */
static double output_backward(const ref_problem *p, const ref_pool *q, ref_pool_gradient *g,
                              int64_t e, double w, const double *dy, expert_state *s)
{
    double dw = 0;
    for (int64_t o = 0; o < p->O; o++) {
        if (q->position == 0) dw += dy[o] * s->out[o];
        s->dz[o] = q->position == 0 ? w * dy[o] : dy[o];
        if (q->sigmoid) s->dz[o] *= s->out[o] * (1 - s->out[o]);
        g->db2[e * p->O + o] += s->dz[o];
    }
    for (int64_t f = 0; f < q->F; f++) {
        s->dh[f] = 0;
        for (int64_t o = 0; o < p->O; o++) {
            g->dW2[(e * q->F + f) * p->O + o] += s->h_in[f] * s->dz[o];
            s->dh[f] += s->dz[o] * q->W2[(e * q->F + f) * p->O + o];
        }
        if (q->position != 1) continue;
        dw += s->dh[f] * s->h[f];
        s->dh[f] *= w;
    }
    return dw;
}

double ref__expert_backward(const ref_problem *p, const ref_pool *q, ref_pool_gradient *g,
                            int64_t e, const double *x, double w, const double *dy, double *dx,
                            expert_state *s)
{
    double dw = output_backward(p, q, g, e, w, dy, s);
    for (int64_t d = 0; d < p->D; d++) s->dx_in[d] = 0;
    for (int64_t f = 0; f < q->F; f++) {
        double dz1 = s->dh[f] * s->slope1[f], dz3 = s->dh[f] * s->slope3[f];
        g->db1[e * q->F + f] += dz1;
        g->db3[e * q->F + f] += dz3;
        for (int64_t d = 0; d < p->D; d++) {
            int64_t at = (e * p->D + d) * q->F + f;
            g->dW1[at] += s->x[d] * dz1;
            g->dW3[at] += s->x[d] * dz3;
            s->dx_in[d] += dz1 * q->W1[at] + (q->W3 ? dz3 * q->W3[at] : 0);
        }
    }
    for (int64_t d = 0; d < p->D; d++) {
        dx[d] += q->position == 2 ? w * s->dx_in[d] : s->dx_in[d];
        if (q->position == 2) dw += s->dx_in[d] * x[d];
    }
    return dw;
}
