/* activation.c - h = act(z1) or act(z1) * z3, and its gradient.
 *
 *     relu(z) = max(z, 0), relu'(0) = 0          silu(z) = z s(z),   s the logistic function
 *     gelu_erf(z) = z Phi(z)                     gelu_tanh(z) = z s(2u), u = sqrt(2/pi)(z +
 *     0.044715 z^3)
 *
 * The last is z/2 (1 + tanh u) written without its cancellation for negative z. A NaN stays a
 * NaN. */
#include "cpu/activation.h"
#include "numeric.h"

enum { RELU, GELU_TANH, GELU_ERF, SILU };

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

typedef struct activation_run {
    int32_t kind;
    real *h, *dh, *dz3;
    const real *z1, *z3;
} activation_run;

#define FORWARD_LOOPS(kind)                                                          \
    case kind:                                                                       \
        if (z3)                                                                      \
            for (int64_t i = begin; i < end; i++) h[i] = value(kind, z1[i]) * z3[i]; \
        else                                                                         \
            for (int64_t i = begin; i < end; i++) h[i] = value(kind, z1[i]);         \
        break;

static void forward_range(void *argument, int64_t begin, int64_t end)
{
    const activation_run *run = argument;
    const real *z1 = run->z1, *z3 = run->z3;
    real *h = run->h;
    switch (run->kind) {
        FORWARD_LOOPS(RELU)
        FORWARD_LOOPS(GELU_TANH)
        FORWARD_LOOPS(GELU_ERF)
        FORWARD_LOOPS(SILU)
    }
}

/* h = a z3, a = act(z1):  dz1 = dh z3 act'(z1),  dz3 = dh a. */
#define BACKWARD_LOOPS(kind)                                 \
    case kind:                                               \
        if (z3)                                              \
            for (int64_t i = begin; i < end; i++) {          \
                real a = value(kind, z1[i]), d = dh[i];      \
                h[i] = a * z3[i];                            \
                dz3[i] = d * a;                              \
                dh[i] = d * z3[i] * derivative(kind, z1[i]); \
            }                                                \
        else                                                 \
            for (int64_t i = begin; i < end; i++) {          \
                h[i] = value(kind, z1[i]);                   \
                dh[i] = dh[i] * derivative(kind, z1[i]);     \
            }                                                \
        break;

static void backward_range(void *argument, int64_t begin, int64_t end)
{
    const activation_run *run = argument;
    const real *restrict z1 = run->z1, *restrict z3 = run->z3;
    real *restrict h = run->h, *restrict dh = run->dh, *restrict dz3 = run->dz3;
    switch (run->kind) {
        BACKWARD_LOOPS(RELU)
        BACKWARD_LOOPS(GELU_TANH)
        BACKWARD_LOOPS(GELU_ERF)
        BACKWARD_LOOPS(SILU)
    }
}

static int32_t base_kind(int32_t activation)
{
    switch (activation) {
    case MOE_ACTIVATION_GELU_TANH:
    case MOE_ACTIVATION_GEGLU_TANH: return GELU_TANH;
    case MOE_ACTIVATION_GELU_ERF:
    case MOE_ACTIVATION_GEGLU_ERF: return GELU_ERF;
    case MOE_ACTIVATION_SILU:
    case MOE_ACTIVATION_SWIGLU: return SILU;
    default: return RELU;
    }
}

enum { GRAIN = 16384 }; /* elements a task is worth starting for */

moe_status MOE_KERNEL(activation_forward)(const moe__workers *workers, int32_t activation,
                                          int64_t count, real *h, const real *z1, const real *z3)
{
    activation_run run = {.kind = base_kind(activation), .h = h, .z1 = z1, .z3 = z3};
    return moe__parallel_range(workers->context, count, GRAIN, forward_range, &run,
                               workers->function);
}

moe_status MOE_KERNEL(activation_backward)(const moe__workers *workers, int32_t activation,
                                           int64_t count, real *dh, real *dz3, real *h,
                                           const real *z1, const real *z3)
{
    activation_run run =
        {.kind = base_kind(activation), .h = h, .dh = dh, .dz3 = dz3, .z1 = z1, .z3 = z3};
    return moe__parallel_range(workers->context, count, GRAIN, backward_range, &run,
                               workers->function);
}
