/* activation.c - h = act(z1) or act(z1) * z3, and its gradient.
 *
 *     relu(z) = max(z, 0), relu'(0) = 0          silu(z) = z s(z),   s the logistic function
 *     gelu_erf(z) = z Phi(z)                     gelu_tanh(z) = z s(2u), u = sqrt(2/pi)(z +
 *     0.044715 z^3)
 *
 * The last is z/2 (1 + tanh u) written without its cancellation for negative z. Clamped SwiGLU:
 *
 *     g = min(z1, limit),  u = clamp(z3, -limit, limit),  h = g s(alpha g) (u + offset)
 *
 * A NaN stays a NaN. Elements are widened when read; each result is rounded once. */
#include "cpu/activation.h"
#include "numeric.h"

#include <math.h>

enum { RELU, GELU_TANH, GELU_ERF, SILU, CLAMPED };

#define SQRT_2_OVER_PI R(0.79788456080286535588)
#define CUBIC R(0.044715)

/* 2u of gelu_tanh; z is clamped where tanh(u) has long been exactly 1, so that z^3 cannot
 * overflow. */
static inline real gelu_inner(real z)
{
    real c = z > R(16.0) ? R(16.0) : z < R(-16.0) ? R(-16.0) : z;
    return R(2.0) * SQRT_2_OVER_PI * r_fma(CUBIC * c * c, c, c);
}

/* `kind` is a constant at every call, so that each loop below holds one formula. */
static inline real value(int kind, real z)
{
    if (kind == RELU) return z <= R(0.0) ? R(0.0) : z;
    if (kind == GELU_TANH) return z * r_sigmoid(gelu_inner(z));
    if (kind == GELU_ERF) return z * r_normal_cdf(z);
    return z * r_sigmoid(z);
}

static inline real derivative(int kind, real z)
{
    if (kind == RELU) return z <= R(0.0) ? R(0.0) : z > R(0.0) ? R(1.0) : z;
    if (kind == GELU_TANH) {
        /* d/dz z s(2u) = s + z s (1 - s) 2u',  u' = sqrt(2/pi)(1 + 3 * 0.044715 z^2) */
        real s = r_sigmoid(gelu_inner(z));
        real c = z > R(16.0) ? R(16.0) : z < R(-16.0) ? R(-16.0) : z;
        real du = R(2.0) * SQRT_2_OVER_PI * r_fma(R(3.0) * CUBIC * c, c, R(1.0));
        return r_fma(c * s * (R(1.0) - s), du, s);
    }
    if (kind == GELU_ERF) return r_fma(z, r_normal_pdf(z), r_normal_cdf(z));
    real s = r_sigmoid(z);
    return s * r_fma(z, R(1.0) - s, R(1.0));
}

/* Comparisons let a NaN through. */
static inline real clamp_high(real z, real limit) { return z > limit ? limit : z; }
static inline real clamp_both(real z, real limit)
{
    return z > limit ? limit : z < -limit ? -limit : z;
}

static void clamped_forward(const activation *act, int64_t count, element *h, const element *z1,
                            const element *z3)
{
    const real alpha = act->alpha, limit = act->limit, offset = act->offset;
    for (int64_t i = 0; i < count; i++) {
        real g = clamp_high(get(z1[i]), limit), u = clamp_both(get(z3[i]), limit);
        h[i] = put(g * r_sigmoid(alpha * g) * (u + offset));
    }
}

/* a = g s(alpha g), da/dg = s (1 + alpha g (1 - s)). The gradient of a clamp is 1 up to its bound
 * and 0 beyond it. */
static void clamped_backward(const activation *act, int64_t count, element *restrict dh,
                             element *restrict dz3, element *restrict h, const element *restrict z1,
                             const element *restrict z3)
{
    const real alpha = act->alpha, limit = act->limit, offset = act->offset;
    for (int64_t i = 0; i < count; i++) {
        real first = get(z1[i]), second = get(z3[i]);
        real g = clamp_high(first, limit), d = get(dh[i]);
        real up = clamp_both(second, limit) + offset;
        real s = r_sigmoid(alpha * g), a = g * s;
        real slope = s * r_fma(alpha * g, R(1.0) - s, R(1.0));
        h[i] = put(a * up);
        dz3[i] = put(second > limit || second < -limit ? R(0.0) : d * a);
        dh[i] = put(first > limit ? R(0.0) : d * up * slope);
    }
}

#define FORWARD_LOOPS(kind)                                                                       \
    case kind:                                                                                    \
        if (z3)                                                                                   \
            for (int64_t i = 0; i < count; i++) h[i] = put(value(kind, get(z1[i])) * get(z3[i])); \
        else                                                                                      \
            for (int64_t i = 0; i < count; i++) h[i] = put(value(kind, get(z1[i])));              \
        break;

void MOE_KERNEL(activate)(const activation *act, int64_t count, element *h, const element *z1,
                          const element *z3)
{
    switch (act->kind) {
        FORWARD_LOOPS(RELU)
        FORWARD_LOOPS(GELU_TANH)
        FORWARD_LOOPS(GELU_ERF)
        FORWARD_LOOPS(SILU)
    default: clamped_forward(act, count, h, z1, z3);
    }
}

/* h = a z3, a = act(z1):  dz1 = dh z3 act'(z1),  dz3 = dh a. */
#define BACKWARD_LOOPS(kind)                                          \
    case kind:                                                        \
        if (z3)                                                       \
            for (int64_t i = 0; i < count; i++) {                     \
                real z = get(z1[i]), up = get(z3[i]), d = get(dh[i]); \
                real a = value(kind, z);                              \
                h[i] = put(a * up);                                   \
                dz3[i] = put(d * a);                                  \
                dh[i] = put(d * up * derivative(kind, z));            \
            }                                                         \
        else                                                          \
            for (int64_t i = 0; i < count; i++) {                     \
                real z = get(z1[i]);                                  \
                h[i] = put(value(kind, z));                           \
                dh[i] = put(get(dh[i]) * derivative(kind, z));        \
            }                                                         \
        break;

void MOE_KERNEL(activate_backward)(const activation *act, int64_t count, element *restrict dh,
                                   element *restrict dz3, element *restrict h,
                                   const element *restrict z1, const element *restrict z3)
{
    switch (act->kind) {
        BACKWARD_LOOPS(RELU)
        BACKWARD_LOOPS(GELU_TANH)
        BACKWARD_LOOPS(GELU_ERF)
        BACKWARD_LOOPS(SILU)
    default: clamped_backward(act, count, dh, dz3, h, z1, z3);
    }
}

static int32_t base_kind(int32_t number)
{
    switch (number) {
    case MOE_ACTIVATION_GELU_TANH:
    case MOE_ACTIVATION_GEGLU_TANH: return GELU_TANH;
    case MOE_ACTIVATION_GELU_ERF:
    case MOE_ACTIVATION_GEGLU_ERF: return GELU_ERF;
    case MOE_ACTIVATION_SILU:
    case MOE_ACTIVATION_SWIGLU: return SILU;
    default: return RELU;
    }
}

/* The plain loops wherever the formula is the plain one. */
activation MOE_KERNEL(activation_of)(const moe_experts_config *c)
{
    activation act = {.kind = base_kind(c->activation)};
    double alpha = c->activation_alpha != 0 ? c->activation_alpha : 1;
    if (alpha == 1 && c->activation_limit == 0 && c->activation_offset == 0) return act;
    act.kind = CLAMPED;
    act.alpha = (real)alpha;
    act.limit = c->activation_limit != 0 ? (real)c->activation_limit : (real)INFINITY;
    act.offset = (real)c->activation_offset;
    return act;
}

/* ---- on all threads -------------------------------------------------------------------------- */

enum { GRAIN = 16384 }; /* elements a task is worth starting for */

typedef struct activation_run {
    activation act;
    element *h, *dh, *dz3;
    const element *z1, *z3;
} activation_run;

/* Element i of an array that may not be there. */
#define FROM(array, i) ((array) ? (array) + (i) : NULL)

static void forward_range(void *argument, int64_t begin, int64_t end)
{
    const activation_run *run = argument;
    MOE_KERNEL(activate)
    (&run->act, end - begin, run->h + begin, run->z1 + begin, FROM(run->z3, begin));
}

/* h is dh: it is not wanted, and is made and left in pieces. */
static void backward_range(void *argument, int64_t begin, int64_t end)
{
    enum { PIECE = 128 };
    const activation_run *run = argument;
    element room[PIECE];
    bool kept = run->h != run->dh;
    for (int64_t count; begin < end; begin += count) {
        count = kept ? end - begin : moe__min(PIECE, end - begin);
        MOE_KERNEL(activate_backward)
        (&run->act, count, run->dh + begin, FROM(run->dz3, begin), kept ? run->h + begin : room,
         run->z1 + begin, FROM(run->z3, begin));
    }
}

moe_status MOE_KERNEL(activation_forward)(const moe__workers *workers, const moe_experts_config *c,
                                          int64_t count, element *h, const element *z1,
                                          const element *z3)
{
    activation_run run = {.act = MOE_KERNEL(activation_of)(c), .h = h, .z1 = z1, .z3 = z3};
    return moe__parallel_range(workers->context, count, GRAIN, forward_range, &run,
                               workers->function);
}

moe_status MOE_KERNEL(activation_backward)(const moe__workers *workers, const moe_experts_config *c,
                                           int64_t count, element *dh, element *dz3, element *h,
                                           const element *z1, const element *z3)
{
    activation_run run =
        {.act = MOE_KERNEL(activation_of)(c), .h = h, .dh = dh, .dz3 = dz3, .z1 = z1, .z3 = z3};
    return moe__parallel_range(workers->context, count, GRAIN, backward_range, &run,
                               workers->function);
}
