/* pool_model.c - the model's arithmetic and the comparison; pool_model_library.c has the library's
 * side. */
#include "support/pool_model.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- functions ------------------------------------------------------------------------------- */

static double sigmoid(double z) { return 1 / (1 + exp(-z)); }

static int gated(const model_part *p) { return p->activation >= MOE_ACTIVATION_SWIGLU; }

static double act(const model_part *p, double z)
{
    double alpha = p->alpha != 0 ? p->alpha : 1;
    switch (p->activation) {
    case MOE_ACTIVATION_RELU:
    case MOE_ACTIVATION_REGLU: return z > 0 ? z : 0;
    case MOE_ACTIVATION_GELU_TANH:
    case MOE_ACTIVATION_GEGLU_TANH:
        return z / 2 * (1 + tanh(sqrt(2 / acos(-1)) * (z + 0.044715 * z * z * z)));
    case MOE_ACTIVATION_GELU_ERF:
    case MOE_ACTIVATION_GEGLU_ERF: return z / 2 * (1 + erf(z / sqrt(2)));
    default: return z * sigmoid(alpha * z);
    }
}

static double act_slope(const model_part *p, double z)
{
    double alpha = p->alpha != 0 ? p->alpha : 1, pi = acos(-1), c = sqrt(2 / pi), t;
    switch (p->activation) {
    case MOE_ACTIVATION_RELU:
    case MOE_ACTIVATION_REGLU: return z > 0;
    case MOE_ACTIVATION_GELU_TANH:
    case MOE_ACTIVATION_GEGLU_TANH:
        t = tanh(c * (z + 0.044715 * z * z * z));
        return (1 + t) / 2 + z / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z);
    case MOE_ACTIVATION_GELU_ERF:
    case MOE_ACTIVATION_GEGLU_ERF:
        return (1 + erf(z / sqrt(2))) / 2 + z * exp(-z * z / 2) / sqrt(2 * pi);
    default: t = sigmoid(alpha * z); return t + alpha * z * t * (1 - t);
    }
}

/* ---- one row --------------------------------------------------------------------------------- */

enum { WIDEST = 64 };

/* Everything between x and the row's share of y. */
typedef struct row {
    double in[WIDEST], z1[WIDEST], z3[WIDEST], g[WIDEST], u[WIDEST], h[WIDEST], out[WIDEST];
} row;

static void linear(const double *in, int64_t n, const double *w, const double *b, int64_t m,
                   double *out)
{
    for (int64_t j = 0; j < m; j++) {
        out[j] = b ? b[j] : 0;
        for (int64_t i = 0; i < n; i++) out[j] += in[i] * w[i * m + j];
    }
}

static const double *of(const model_part *p, double *const *set, int which, int64_t e)
{
    return set[which] ? set[which] + e * pool_model_elements(p, which) / p->E : NULL;
}

static void row_forward(const model_part *p, int64_t e, const double *x, double w, row *r)
{
    double hidden[WIDEST];
    memset(r, 0, sizeof *r);
    for (int64_t i = 0; i < p->D; i++)
        r->in[i] = p->position == MOE_WEIGHT_ON_INPUT ? w * x[i] : x[i];
    if (p->kind == MOE_EXPERTS_IDENTITY) {
        memcpy(r->out, r->in, sizeof r->out);
        return;
    }
    linear(r->in, p->D, of(p, p->p, MODEL_W1, e), of(p, p->p, MODEL_B1, e), p->F, r->z1);
    if (gated(p))
        linear(r->in, p->D, of(p, p->p, MODEL_W3, e), of(p, p->p, MODEL_B3, e), p->F, r->z3);
    for (int64_t j = 0; j < p->F; j++) {
        double limit = p->limit != 0 ? p->limit : INFINITY;
        r->g[j] = fmin(r->z1[j], limit);
        r->u[j] = gated(p) ? fmax(-limit, fmin(r->z3[j], limit)) + p->offset : 1;
        r->h[j] = act(p, r->g[j]) * r->u[j];
        hidden[j] = p->position == MOE_WEIGHT_ON_HIDDEN ? w * r->h[j] : r->h[j];
    }
    linear(hidden, p->F, of(p, p->p, MODEL_W2, e), of(p, p->p, MODEL_B2, e), p->O, r->out);
    for (int64_t j = 0; p->sigmoid && j < p->O; j++) r->out[j] = sigmoid(r->out[j]);
}

/* d of a linear map: weights, bias, and the input's gradient returned in din. */
static void linear_backward(const double *in, int64_t n, const double *w, const double *dout,
                            int64_t m, double *dw, double *db, double *din)
{
    for (int64_t j = 0; j < m; j++) {
        if (db) db[j] += dout[j];
        for (int64_t i = 0; i < n; i++) {
            dw[i * m + j] += in[i] * dout[j];
            din[i] += w[i * m + j] * dout[j];
        }
    }
}

static double *grad_of(const model_part *p, int which, int64_t e)
{
    return (double *)(uintptr_t)of(p, p->d, which, e);
}

/* Adds to dx, and returns the gradient by w. dy is the token's. */
static double row_backward(model_part *p, int64_t e, const double *x, double w, const double *dy,
                           double *dx)
{
    row r;
    double dout[WIDEST], dhidden[WIDEST] = {0}, din[WIDEST] = {0}, dz1[WIDEST], dz3[WIDEST];
    double hidden[WIDEST], dw = 0, limit = p->limit != 0 ? p->limit : INFINITY;
    int outside = p->position == MOE_WEIGHT_ON_OUTPUT;
    row_forward(p, e, x, w, &r);
    for (int64_t j = 0; j < p->O; j++) {
        if (outside) dw += dy[j] * r.out[j];
        dout[j] = outside ? w * dy[j] : dy[j];
        if (p->sigmoid) dout[j] *= r.out[j] * (1 - r.out[j]);
    }
    if (p->kind == MOE_EXPERTS_IDENTITY) {
        for (int64_t i = 0; i < p->D; i++) dx[i] += dout[i];
        return dw;
    }
    for (int64_t j = 0; j < p->F; j++)
        hidden[j] = p->position == MOE_WEIGHT_ON_HIDDEN ? w * r.h[j] : r.h[j];
    linear_backward(hidden, p->F, of(p, p->p, MODEL_W2, e), dout, p->O, grad_of(p, MODEL_W2, e),
                    grad_of(p, MODEL_B2, e), dhidden);
    for (int64_t j = 0; j < p->F; j++) {
        double dh = dhidden[j];
        if (p->position == MOE_WEIGHT_ON_HIDDEN) {
            dw += dh * r.h[j];
            dh *= w;
        }
        dz1[j] = r.z1[j] <= limit ? dh * r.u[j] * act_slope(p, r.g[j]) : 0;
        dz3[j] = fabs(r.z3[j]) <= limit ? dh * act(p, r.g[j]) : 0;
    }
    linear_backward(r.in, p->D, of(p, p->p, MODEL_W1, e), dz1, p->F, grad_of(p, MODEL_W1, e),
                    grad_of(p, MODEL_B1, e), din);
    if (gated(p))
        linear_backward(r.in, p->D, of(p, p->p, MODEL_W3, e), dz3, p->F, grad_of(p, MODEL_W3, e),
                        grad_of(p, MODEL_B3, e), din);
    for (int64_t i = 0; i < p->D; i++) {
        if (p->position == MOE_WEIGHT_ON_INPUT) dw += din[i] * x[i];
        dx[i] += p->position == MOE_WEIGHT_ON_INPUT ? w * din[i] : din[i];
    }
    return dw;
}

/* ---- the pool -------------------------------------------------------------------------------- */

/* The part of an expert, whose number becomes the one in the part. */
static model_part *part_of(pool_model *m, int64_t *e)
{
    model_part *p = m->part;
    while (*e >= p->E) *e -= p++->E;
    return p;
}

static void run_entry(pool_model *m, int64_t t, int64_t n)
{
    row r;
    int64_t e = m->ids[n];
    m->dw[n] = 0;
    if (e < 0) return;
    model_part *p = part_of(m, &e);
    const double *x = m->x + t * m->D;
    double *y = m->y + t * m->O, outside = p->position == MOE_WEIGHT_ON_OUTPUT ? m->w[n] : 1;
    row_forward(p, e, x, m->w[n], &r);
    for (int64_t j = 0; j < m->O; j++) y[j] += outside * r.out[j];
    m->dw[n] = row_backward(p, e, x, m->w[n], m->dy + t * m->O, m->dx + t * m->D);
}

void pool_model_run(pool_model *m)
{
    memset(m->y, 0, (size_t)(m->T * m->O) * sizeof *m->y);
    memset(m->dx, 0, (size_t)(m->T * m->D) * sizeof *m->dx);
    for (int i = 0; i < m->parts; i++)
        for (int w = 0; w < MODEL_PARAMETERS; w++) {
            size_t count = (size_t)pool_model_elements(&m->part[i], w);
            if (m->part[i].d[w]) memset(m->part[i].d[w], 0, count * sizeof(double));
        }
    for (int64_t t = 0; t < m->T; t++)
        for (int64_t n = t * m->K; n < (t + 1) * m->K; n++) run_entry(m, t, n);
}

/* ---- comparison ------------------------------------------------------------------------------ */

/* Sums of about ten products of numbers of about one: f32 2e-5, f64 1e-12, relative to the largest
 * number of the tensor. */
static const char *compare(const pool_model *m, const char *name, const double *want,
                           const double *got, int64_t count)
{
    static char text[256];
    double most = 1e-3, tolerance = m->dtype == MOE_DTYPE_F64 ? 1e-12 : 2e-5;
    for (int64_t i = 0; i < count; i++) most = fmax(most, fabs(want[i]));
    for (int64_t i = 0; i < count; i++) {
        if (fabs(want[i] - got[i]) <= tolerance * most) continue;
        if (isnan(want[i]) && isnan(got[i])) continue;
        (void)snprintf(text, sizeof text, "%s[%lld] is %.17g, the model has %.17g", name,
                       (long long)i, got[i], want[i]);
        return text;
    }
    return "";
}

static const char *compare_array(const pool_model *m, const char *name, const double *want,
                                 const void *got, int64_t count)
{
    double *wide = malloc(((size_t)count + 1) * sizeof *wide);
    ck_assert_ptr_nonnull(wide);
    for (int64_t i = 0; i < count; i++) wide[i] = pool_model_at(m, got, i);
    const char *difference = compare(m, name, want, wide, count);
    free(wide);
    return difference;
}

const char *pool_model_compare_y(const pool_model *m)
{
    return compare_array(m, "y", m->y, m->lib_y, m->T * m->O);
}

const char *pool_model_compare_gradients(const pool_model *m)
{
    static const char *const names[] = {"dW1", "db1", "dW3", "db3", "dW2", "db2"};
    const char *difference = compare_array(m, "dx", m->dx, m->lib_dx, m->T * m->D);
    if (!difference[0])
        difference = compare_array(m, "entry_weight_grad", m->dw, m->lib_dw, m->T * m->K);
    for (int i = 0; i < m->parts && !difference[0]; i++)
        for (int w = 0; w < MODEL_PARAMETERS && !difference[0]; w++) {
            int64_t count;
            if (!m->part[i].d[w]) continue;
            double *got = pool_model_gradient(&m->part[i], w, &count);
            difference = compare(m, names[w], m->part[i].d[w], got, count);
            free(got);
        }
    return difference;
}
