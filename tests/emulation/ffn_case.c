/* ffn_case.c - random jobs of the experts, and their results by plain loops. */
#include "ffn_reference.h"

#include "half.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- random numbers, rounding ---------------------------------------------------------------- */

static uint64_t next(ffn_case *c)
{
    uint64_t z = (c->random += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
static int64_t below(ffn_case *c, int64_t n) { return (int64_t)(next(c) % (uint64_t)n); }
static double real(ffn_case *c) { return (double)(next(c) >> 11) * 0x1p-52 - 1; }

double ffn_round(double x, int32_t dtype)
{
    float f = (float)x;
    if (dtype == MOE_DTYPE_BF16) f = moe__from_bf16(moe__to_bf16(f));
    if (dtype == MOE_DTYPE_F16) f = moe__from_f16(moe__to_f16(f));
    return (double)f;
}

static double *numbers(ffn_case *c, int64_t n, double scale, int32_t dtype)
{
    double *p = calloc((size_t)(n > 0 ? n : 1), sizeof *p);
    for (int64_t i = 0; i < n; i++) p[i] = ffn_round(scale * real(c), dtype);
    return p;
}

/* ---- the case -------------------------------------------------------------------------------- */

static const int64_t widths[] = {1, 2, 3, 7, 8, 16, 24, 32, 40, 65};

static void make_config(ffn_case *c)
{
    static const int32_t activations[] = {
        MOE_ACTIVATION_RELU,      MOE_ACTIVATION_GELU_TANH, MOE_ACTIVATION_GELU_ERF,
        MOE_ACTIVATION_SILU,      MOE_ACTIVATION_SWIGLU,    MOE_ACTIVATION_GEGLU_TANH,
        MOE_ACTIVATION_GEGLU_ERF, MOE_ACTIVATION_REGLU,     MOE_ACTIVATION_SWIGLU};
    moe_experts_config *k = &c->config;
    memset(k, 0, sizeof *k);
    c->D = k->d_model = widths[below(c, 10)];
    c->F = k->d_hidden = widths[below(c, 10)];
    c->O = k->d_out = widths[below(c, 10)];
    /* Several rounds of a block along a row, by elements and by 16 bytes. */
    if (below(c, 24) == 0) c->F = k->d_hidden = (const int64_t[]){300, 1032, 2064}[below(c, 3)];
    c->E = k->num_experts = below(c, 3) == 0 ? 8 + below(c, 6) : 1 + below(c, 4);
    int64_t a = below(c, 9);
    k->activation = activations[a];
    if (a == 8) {
        k->activation_alpha = 1.702;
        k->activation_limit = below(c, 2) ? 0.75 : 0;
        k->activation_offset = 1;
    }
    c->gated = k->activation >= MOE_ACTIVATION_SWIGLU;
    k->bias = (int32_t)below(c, 2);
    k->glu_order = c->gated ? (int32_t)below(c, 4) : MOE_GLU_SEPARATE;
    k->weight_layout = (int32_t)below(c, 2);
    k->dtype = c->dtype = (const int32_t[]){MOE_DTYPE_F32, MOE_DTYPE_BF16,
                                            MOE_DTYPE_F16}[below(c, 3)];
    k->output = (int32_t)below(c, 3) == 0;
    k->weight_position = (int32_t)below(c, 3);
    if (below(c, 12) > 0) return;
    k->kind = MOE_EXPERTS_IDENTITY;
    c->O = k->d_out = c->D;
    c->F = k->d_hidden = 0;
    c->gated = false;
    k->activation = k->glu_order = k->bias = k->output = k->weight_position = 0;
}

/* Entries in order of token; some have no row. Rows by expert, then by entry. */
static void make_plan(ffn_case *c)
{
    int64_t *expert;
    c->T = below(c, 8) == 0 ? 0 : 1 + below(c, 20);
    c->K = 1 + below(c, 3);
    c->N = c->T * c->K;
    expert = calloc((size_t)c->N + 1, sizeof *expert);
    c->expert_begin = calloc((size_t)c->E + 1, sizeof *expert);
    c->token_of_row = calloc((size_t)c->N + 1, sizeof *expert);
    c->entry_of_row = calloc((size_t)c->N + 1, sizeof *expert);
    int64_t used = 1 + below(c, c->E), most = 0;
    for (int64_t n = 0; n < c->N; n++) expert[n] = below(c, 10) == 0 ? -1 : below(c, used);
    for (int64_t e = 0; e < c->E; e++) {
        c->expert_begin[e] = c->R;
        for (int64_t n = 0; n < c->N; n++) {
            if (expert[n] != e) continue;
            c->token_of_row[c->R] = n / c->K;
            c->entry_of_row[c->R++] = n;
        }
        if (c->R - c->expert_begin[e] > most) most = c->R - c->expert_begin[e];
    }
    c->expert_begin[c->E] = c->R;
    c->C = below(c, 2) ? (most > 0 ? most : 1) + below(c, 4) : 0;
    c->weight = numbers(c, c->N, 1, MOE_DTYPE_F32);
    free(expert);
}

static void make_tensor(ffn_case *c, ffn_tensor *t, int64_t rows, int64_t cols, bool gradient)
{
    bool vector = rows == 0, out_in = !vector && c->config.weight_layout == MOE_WEIGHT_OUT_IN;
    int64_t pad = below(c, 3) == 0 ? 1 + below(c, 8) : 0;
    int64_t inner = (out_in ? rows : cols) + (vector ? 0 : pad), outer = out_in ? cols : rows;
    t->there = true;
    t->rows = vector ? 1 : rows;
    t->cols = cols;
    t->stride_row = vector ? 0 : out_in ? 1 : inner;
    t->stride_col = out_in ? inner : 1;
    t->stride_expert = vector ? cols + pad : inner * outer + 3 * (pad > 0);
    t->elements = t->stride_expert * c->E;
    t->dtype = gradient && below(c, 2) ? MOE_DTYPE_F32 : c->dtype;
    t->each = below(c, 3) == 0;
    t->value = numbers(c, t->elements, vector ? 0.5 : 1 / sqrt((double)rows), t->dtype);
    if (!gradient) return;
    t->want = calloc((size_t)t->elements + 1, sizeof *t->want);
    memcpy(t->want, t->value, (size_t)t->elements * sizeof *t->want);
    for (int64_t e = 0; e < c->E; e++) t->skip[e] = t->each && below(c, 5) == 0;
}

static void make_tensors(ffn_case *c, ffn_tensor *t, bool gradient)
{
    bool fused = c->config.glu_order != MOE_GLU_SEPARATE;
    int64_t width = fused ? 2 * c->F : c->F;
    if (c->config.kind == MOE_EXPERTS_IDENTITY) return;
#define WANTED (!gradient || below(c, 6) > 0)
    if (WANTED) make_tensor(c, &t[W1], c->D, width, gradient);
    if (WANTED && c->gated && !fused) make_tensor(c, &t[W3], c->D, c->F, gradient);
    if (WANTED) make_tensor(c, &t[W2], c->F, c->O, gradient);
    if (!c->config.bias) return;
    if (WANTED) make_tensor(c, &t[B1], 0, width, gradient);
    if (WANTED && c->gated && !fused) make_tensor(c, &t[B3], 0, c->F, gradient);
    if (WANTED) make_tensor(c, &t[B2], 0, c->O, gradient);
#undef WANTED
}

int64_t ffn_place(const ffn_case *c, const ffn_tensor *t, int64_t e, int64_t i, int64_t j, int half)
{
    switch (c->config.glu_order) {
    case MOE_GLU_GATE_UP: j += half == 1 ? c->F : 0; break;
    case MOE_GLU_UP_GATE: j += half == 0 ? c->F : 0; break;
    case MOE_GLU_INTERLEAVED: j = 2 * j + half; break;
    default: break;
    }
    return e * t->stride_expert + i * t->stride_row + j * t->stride_col;
}

/* ---- results --------------------------------------------------------------------------------- */

static double sigmoid(double z) { return 1 / (1 + exp(-z)); }

/* act and its derivative. */
static double act(const moe_experts_config *k, double z, double *slope)
{
    double alpha = k->activation_alpha != 0 ? k->activation_alpha : 1, s, u;
    switch (k->activation) {
    case MOE_ACTIVATION_RELU:
    case MOE_ACTIVATION_REGLU: *slope = z > 0; return z > 0 ? z : 0;
    case MOE_ACTIVATION_GELU_TANH:
    case MOE_ACTIVATION_GEGLU_TANH:
        u = tanh(sqrt(2 / M_PI) * (z + 0.044715 * z * z * z));
        *slope = (1 + u) / 2 + z / 2 * (1 - u * u) * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * z * z);
        return z / 2 * (1 + u);
    case MOE_ACTIVATION_GELU_ERF:
    case MOE_ACTIVATION_GEGLU_ERF:
        s = (1 + erf(z / sqrt(2))) / 2;
        *slope = s + z * exp(-z * z / 2) / sqrt(2 * M_PI);
        return z * s;
    default:
        if (k->activation_limit > 0 && z > k->activation_limit) {
            *slope = 0;
            z = k->activation_limit;
            return z * sigmoid(alpha * z);
        }
        s = sigmoid(alpha * z);
        *slope = s + alpha * z * s * (1 - s);
        return z * s;
    }
}

static double up(const moe_experts_config *k, double z, double *slope)
{
    double limit = k->activation_limit;
    *slope = 1;
    if (limit > 0 && fabs(z) > limit) {
        *slope = 0;
        z = z > 0 ? limit : -limit;
    }
    return z + k->activation_offset;
}

static const ffn_tensor *tensor(const ffn_case *c, const ffn_tensor *t, int number)
{
    if (c->config.glu_order != MOE_GLU_SEPARATE)
        number = number == W3 ? W1 : number == B3 ? B1 : number;
    return &t[number];
}
static int half_of(int number)
{
    return number == W3 || number == B3 ? 1 : number == W1 || number == B1 ? 0 : -1;
}

static double at(const ffn_case *c, int number, int64_t e, int64_t i, int64_t j)
{
    const ffn_tensor *t = tensor(c, c->data, number);
    int half = half_of(number);
    return t->value[half < 0 ? e * t->stride_expert + i * t->stride_row + j * t->stride_col
                             : ffn_place(c, t, e, i, j, half)];
}

static void add_to(ffn_case *c, int number, int64_t e, int64_t i, int64_t j, double value)
{
    ffn_tensor *t = (ffn_tensor *)(uintptr_t)tensor(c, c->grad, number);
    int half = half_of(number);
    if (!t->there || t->skip[e]) return;
    t->want[half < 0 ? e * t->stride_expert + i * t->stride_row + j * t->stride_col
                     : ffn_place(c, t, e, i, j, half)] += value;
}

typedef struct row {
    int64_t r, t, e, n;
    double weight;
    double *x, *z1, *z3, *h, *out, *dz, *dz1, *dz3, *dh, *dx;
} row;

static double scaled(const ffn_case *c, int32_t position, double weight, double v)
{
    return c->config.weight_position == position ? ffn_round(weight * v, c->dtype) : v;
}

static void forward_row(ffn_case *c, row *r)
{
    const moe_experts_config *k = &c->config;
    double none;
    for (int64_t i = 0; i < c->D; i++)
        r->x[i] = scaled(c, MOE_WEIGHT_ON_INPUT, r->weight, c->x[r->t * c->x_stride + i]);
    for (int64_t j = 0; j < c->F; j++) {
        double sum[2] = {0, 0};
        for (int q = 0; q < (c->gated ? 2 : 1); q++) {
            for (int64_t i = 0; i < c->D; i++) sum[q] += r->x[i] * at(c, q ? W3 : W1, r->e, i, j);
            sum[q] = ffn_round(sum[q], c->dtype);
            if (k->bias) sum[q] = ffn_round(sum[q] + at(c, q ? B3 : B1, r->e, 0, j), c->dtype);
        }
        r->z1[j] = sum[0], r->z3[j] = sum[1];
        double h = act(k, sum[0], &none) * (c->gated ? up(k, sum[1], &none) : 1);
        if (k->weight_position == MOE_WEIGHT_ON_HIDDEN) h *= r->weight;
        r->h[j] = ffn_round(h, c->dtype);
    }
    for (int64_t o = 0; o < c->O; o++) {
        double sum = 0;
        for (int64_t j = 0; j < c->F; j++) sum += r->h[j] * at(c, W2, r->e, j, o);
        sum = ffn_round(sum, c->dtype);
        if (k->bias) sum += at(c, B2, r->e, 0, o);
        if (k->output == MOE_OUTPUT_SIGMOID) sum = sigmoid(sum);
        r->out[o] = ffn_round(sum, c->dtype);
    }
}

static double dot(const double *a, const double *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void backward_hidden(ffn_case *c, row *r)
{
    const moe_experts_config *k = &c->config;
    for (int64_t j = 0; j < c->F; j++) {
        double slope, up_slope = 1, dh = 0, a = act(k, r->z1[j], &slope);
        double u = c->gated ? up(k, r->z3[j], &up_slope) : 1;
        for (int64_t o = 0; o < c->O; o++) dh += r->dz[o] * at(c, W2, r->e, j, o);
        dh = ffn_round(dh, c->dtype);
        if (k->weight_position == MOE_WEIGHT_ON_HIDDEN) {
            c->entry_grad[r->n] += dh * ffn_round(a * u, c->dtype);
            dh *= r->weight;
        }
        r->dz1[j] = ffn_round(dh * u * slope, c->dtype);
        r->dz3[j] = c->gated ? ffn_round(dh * a * up_slope, c->dtype) : 0;
    }
}

static void backward_row(ffn_case *c, row *r)
{
    const moe_experts_config *k = &c->config;
    const double *dy = c->dy + r->t * c->dy_stride;
    if (k->weight_position == MOE_WEIGHT_ON_OUTPUT) c->entry_grad[r->n] = dot(dy, r->out, c->O);
    for (int64_t o = 0; o < c->O; o++) {
        double d = k->weight_position == MOE_WEIGHT_ON_OUTPUT ? r->weight * dy[o] : dy[o];
        if (k->output == MOE_OUTPUT_SIGMOID) d *= r->out[o] * (1 - r->out[o]);
        r->dz[o] = ffn_round(d, c->dtype);
    }
    backward_hidden(c, r);
    for (int64_t o = 0; o < c->O; o++) {
        add_to(c, B2, r->e, 0, o, r->dz[o]);
        for (int64_t j = 0; j < c->F; j++) add_to(c, W2, r->e, j, o, r->h[j] * r->dz[o]);
    }
    for (int64_t j = 0; j < c->F; j++)
        for (int q = 0; q < (c->gated ? 2 : 1); q++) {
            double d = q ? r->dz3[j] : r->dz1[j];
            add_to(c, q ? B3 : B1, r->e, 0, j, d);
            for (int64_t i = 0; i < c->D; i++) add_to(c, q ? W3 : W1, r->e, i, j, r->x[i] * d);
        }
    for (int64_t i = 0; i < c->D; i++) {
        double sum = 0, third = 0;
        for (int64_t j = 0; j < c->F; j++) sum += r->dz1[j] * at(c, W1, r->e, i, j);
        for (int64_t j = 0; c->gated && j < c->F; j++) third += r->dz3[j] * at(c, W3, r->e, i, j);
        if (c->config.glu_order == MOE_GLU_SEPARATE) sum = ffn_round(sum, c->dtype);
        r->dx[i] = ffn_round(sum + third, c->dtype);
    }
    if (k->weight_position != MOE_WEIGHT_ON_INPUT) return;
    c->entry_grad[r->n] = dot(r->dx, c->x + r->t * c->x_stride, c->D);
    for (int64_t i = 0; i < c->D; i++) r->dx[i] = ffn_round(r->weight * r->dx[i], c->dtype);
}

static void identity_row(ffn_case *c, row *r)
{
    const double *dy = c->dy + r->t * c->dy_stride;
    memcpy(r->out, c->x + r->t * c->x_stride, (size_t)c->D * sizeof *r->out);
    c->entry_grad[r->n] = dot(dy, r->out, c->O);
    for (int64_t i = 0; i < c->D; i++) r->dx[i] = ffn_round(r->weight * dy[i], c->dtype);
}

static void find_results(ffn_case *c)
{
    int64_t F = c->F, s = c->D + c->O + 4 * F;
    double *scratch = calloc((size_t)s + 1, sizeof *scratch);
    c->scratch = scratch;
    for (int i = 0; i < TENSORS; i++)
        for (int64_t k = 0; c->overwrite && c->grad[i].there && k < c->grad[i].elements; k++)
            if (!c->grad[i].skip[k / c->grad[i].stride_expert]) c->grad[i].want[k] = 0;
    for (int64_t e = 0; e < c->E; e++)
        for (int64_t r = c->expert_begin[e]; r < c->expert_begin[e + 1]; r++) {
            row w = {.r = r, .t = c->token_of_row[r], .e = e, .n = c->entry_of_row[r]};
            w.weight = c->weight[w.n];
            w.x = scratch, w.dz = w.x + c->D, w.dz1 = w.dz + c->O, w.dz3 = w.dz1 + F;
            w.z1 = c->z + r * 2 * F, w.z3 = w.z1 + F, w.h = c->h + r * F;
            w.out = c->out + r * c->O, w.dx = c->dx_rows + r * c->D;
            if (c->config.kind == MOE_EXPERTS_IDENTITY) {
                identity_row(c, &w);
                continue;
            }
            forward_row(c, &w);
            backward_row(c, &w);
        }
}

void ffn_case_make(ffn_case *c, uint64_t seed)
{
    memset(c, 0, sizeof *c);
    c->random = seed;
    make_config(c);
    make_plan(c);
    c->x_stride = c->D + (below(c, 2) ? below(c, 9) : 0);
    c->dy_stride = c->O + (below(c, 2) ? below(c, 9) : 0);
    c->x = numbers(c, c->T * c->x_stride, 1, c->dtype);
    c->dy = numbers(c, c->T * c->dy_stride, 1, c->dtype);
    c->save = below(c, 4) > 0;
    c->overwrite = below(c, 2) > 0;
    c->want_dx = below(c, 4) > 0 || c->config.weight_position == MOE_WEIGHT_ON_INPUT;
    c->want_weights = below(c, 4) > 0;
    make_tensors(c, c->data, false);
    make_tensors(c, c->grad, true);
    c->z = calloc((size_t)(c->R * 2 * c->F) + 1, sizeof(double));
    c->h = calloc((size_t)(c->R * c->F) + 1, sizeof(double));
    c->out = calloc((size_t)(c->R * c->O) + 1, sizeof(double));
    c->dx_rows = calloc((size_t)(c->R * c->D) + 1, sizeof(double));
    c->entry_grad = calloc((size_t)c->N + 1, sizeof(double));
    find_results(c);
}

void ffn_case_free(ffn_case *c)
{
    double *all[] = {c->x,   c->dy,      c->weight,     c->z,      c->h,
                     c->out, c->dx_rows, c->entry_grad, c->scratch};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    for (int i = 0; i < TENSORS; i++) {
        free(c->data[i].value);
        free(c->grad[i].value);
        free(c->grad[i].want);
    }
    free(c->expert_begin);
    free(c->token_of_row);
    free(c->entry_of_row);
}

void ffn_case_print(const ffn_case *c)
{
    const moe_experts_config *k = &c->config;
    printf(
        "T %lld K %lld E %lld D %lld F %lld O %lld R %lld C %lld dtype %d kind %d act %d alpha %g "
        "limit %g bias %d glu %d layout %d output %d weight %d save %d overwrite %d dx %d w %d\n",
        (ll)c->T, (ll)c->K, (ll)c->E, (ll)c->D, (ll)c->F, (ll)c->O, (ll)c->R, (ll)c->C, c->dtype,
        k->kind, k->activation, k->activation_alpha, k->activation_limit, k->bias, k->glu_order,
        k->weight_layout, k->output, k->weight_position, c->save, c->overwrite, c->want_dx,
        c->want_weights);
}
