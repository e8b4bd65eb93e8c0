/* reference_experts.c - every chosen expert at every token, forward and backward. */
#include "reference/reference_parts.h"

#include <stdlib.h>

/* ---- experts --------------------------------------------------------------------------------- */

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

typedef struct expert_state {
    double *z1, *z3, *h, *slope, *a, *out, *dz, *dh;
} expert_state;

static void expert_forward(const ref_problem *p, int64_t e, const double *x, expert_state *s)
{
    int gated = p->activation >= 16;
    for (int64_t f = 0; f < p->F; f++) {
        s->z1[f] = p->b1 ? p->b1[e * p->F + f] : 0;
        s->z3[f] = p->b3 ? p->b3[e * p->F + f] : 0;
        for (int64_t d = 0; d < p->D; d++) {
            s->z1[f] += x[d] * p->W1[(e * p->D + d) * p->F + f];
            if (gated) s->z3[f] += x[d] * p->W3[(e * p->D + d) * p->F + f];
        }
        s->a[f] = act(p->activation, s->z1[f], &s->slope[f]);
        s->h[f] = gated ? s->a[f] * s->z3[f] : s->a[f];
    }
    for (int64_t o = 0; o < p->O; o++) {
        s->out[o] = p->b2 ? p->b2[e * p->O + o] : 0;
        for (int64_t f = 0; f < p->F; f++) s->out[o] += s->h[f] * p->W2[(e * p->F + f) * p->O + o];
        if (p->expert_sigmoid) s->out[o] = sigmoid(s->out[o]);
    }
}

/* dz is the gradient by out; adds to dx and to the expert's parameters. */
static void expert_backward(const ref_problem *p, ref_result *r, int64_t e, const double *x,
                            double *dx, expert_state *s)
{
    int gated = p->activation >= 16;
    for (int64_t o = 0; o < p->O && p->expert_sigmoid; o++) s->dz[o] *= s->out[o] * (1 - s->out[o]);
    for (int64_t o = 0; o < p->O; o++) r->db2[e * p->O + o] += s->dz[o];
    for (int64_t f = 0; f < p->F; f++) {
        s->dh[f] = 0;
        for (int64_t o = 0; o < p->O; o++) {
            r->dW2[(e * p->F + f) * p->O + o] += s->h[f] * s->dz[o];
            s->dh[f] += s->dz[o] * p->W2[(e * p->F + f) * p->O + o];
        }
        double dz1 = s->dh[f] * s->slope[f] * (gated ? s->z3[f] : 1), dz3 = s->dh[f] * s->a[f];
        r->db1[e * p->F + f] += dz1;
        if (gated) r->db3[e * p->F + f] += dz3;
        for (int64_t d = 0; d < p->D; d++) {
            int64_t at = (e * p->D + d) * p->F + f;
            r->dW1[at] += x[d] * dz1;
            dx[d] += dz1 * p->W1[at];
            if (!gated) continue;
            r->dW3[at] += x[d] * dz3;
            dx[d] += dz3 * p->W3[at];
        }
    }
}

static void run_token(const ref_problem *p, ref_result *r, int64_t t, expert_state *s, int backward)
{
    const double *x = p->x + t * p->D;
    double *y = r->y + t * p->O, *dy = reals(p->O);
    for (int64_t n = t * p->K; n < (t + 1) * p->K; n++) {
        if (!r->keep[n]) continue;
        expert_forward(p, r->ids[n], x, s);
        for (int64_t o = 0; o < p->O; o++) y[o] += r->w[n] * s->out[o];
    }
    for (int64_t o = 0; o < p->O; o++) {
        if (p->layer_sigmoid) y[o] = masked(p, t) ? 0 : sigmoid(y[o]);
        r->total += y[o] * p->dy[t * p->O + o];
        dy[o] = p->dy[t * p->O + o] * (p->layer_sigmoid ? y[o] * (1 - y[o]) : 1);
    }
    for (int64_t n = t * p->K; n < (t + 1) * p->K && backward; n++) {
        if (!r->keep[n]) continue;
        expert_forward(p, r->ids[n], x, s);
        for (int64_t o = 0; o < p->O; o++) {
            r->d_w[n] += dy[o] * s->out[o];
            s->dz[o] = r->w[n] * dy[o];
        }
        expert_backward(p, r, r->ids[n], x, r->dx + t * p->D, s);
    }
    free(dy);
}

void ref__run_experts(const ref_problem *p, ref_result *r, int backward)
{
    expert_state s = {reals(p->F), reals(p->F), reals(p->F), reals(p->F),
                      reals(p->F), reals(p->O), reals(p->O), reals(p->F)};
    for (int64_t t = 0; t < p->T; t++) run_token(p, r, t, &s, backward);
    free(s.z1), free(s.z3), free(s.h), free(s.slope), free(s.a), free(s.out), free(s.dz),
        free(s.dh);
}
