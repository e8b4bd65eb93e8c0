/* activation.cu - h = act(z1) or act(z1) * z3 on the rows of the experts, with the biases before
 * and the weight of a row after, and its gradient. The formulas are those of src/cpu/activation.c,
 * and so are the bytes of equal z in float.
 *
 * Rows of z are [z1 z3], [z3 z1], z1 and z3 in turn, or in two arrays. What a thread writes lies
 * where it has read itself, or, of rows in turn, where every thread of its block has read:
 *
 *     forward    reads 2j, 2j+1, may write h to j               in chunks of ascending j, a barrier
 *     backward   may read dh at F+j, writes dz to 2j, 2j+1      between reading and writing each */
#include "row_access.h"

enum { RELU, GELU_TANH, GELU_ERF, SILU, CLAMPED };

/* How a thread reads rows of z: one array, two arrays (or two halves), in turn, or one element at a
 * time as `step` and z3 say. */
enum { ONE, TWO, IN_TURN, ANY };

/* ---- formulas -------------------------------------------------------------------------------- */

#define SQRT_2_OVER_PI 0.79788456080286535588f
#define CUBIC 0.044715f

MOE_DEVICE float clamp_both(float z, float limit)
{
    return z > limit ? limit : z < -limit ? -limit : z;
}

/* 2u of gelu_tanh: src/cpu/activation.c. */
MOE_DEVICE float gelu_inner(float z)
{
    float c = clamp_both(z, 16.0f);
    return 2.0f * SQRT_2_OVER_PI * moe__fma_f32(CUBIC * c * c, c, c);
}

struct slope {
    float value, derivative;
};

/* act and, where `both`, act'. CLAMPED: of the clamped g, and of z beyond the clamp 0. */
MOE_DEVICE slope act(const moe__cuda_activation &a, float z, bool both)
{
    slope y = {0.0f, 0.0f};
    switch (a.kind) {
    case RELU:
        y.value = z <= 0.0f ? 0.0f : z;
        y.derivative = z <= 0.0f ? 0.0f : z > 0.0f ? 1.0f : z;
        break;
    case GELU_TANH: {
        float s = moe__sigmoid_f32(gelu_inner(z)), c = clamp_both(z, 16.0f);
        y.value = z * s;
        if (!both) break;
        float du = 2.0f * SQRT_2_OVER_PI * moe__fma_f32(3.0f * CUBIC * c, c, 1.0f);
        y.derivative = moe__fma_f32(c * s * (1.0f - s), du, s);
        break;
    }
    case GELU_ERF: {
        float phi = moe__normal_cdf_f32(z);
        y.value = z * phi;
        if (both) y.derivative = moe__fma_f32(z, moe__normal_pdf_f32(z), phi);
        break;
    }
    case SILU: {
        float s = moe__sigmoid_f32(z);
        y.value = z * s;
        y.derivative = s * moe__fma_f32(z, 1.0f - s, 1.0f);
        break;
    }
    default: {
        float g = z > a.limit ? a.limit : z, s = moe__sigmoid_f32(a.alpha * g);
        y.value = g * s;
        y.derivative = s * moe__fma_f32(a.alpha * g, 1.0f - s, 1.0f);
    }
    }
    return y;
}

MOE_DEVICE float up(const moe__cuda_activation &a, float z3)
{
    return a.kind == CLAMPED ? clamp_both(z3, a.limit) + a.beyond : z3;
}

/* h = a u, u the up projection:  dz1 = dh u a',  dz3 = dh a, both 0 where z is clamped. */
struct gradient {
    float h, dz1, dz3;
};

MOE_DEVICE gradient differentiate(const moe__cuda_activation &a, bool gated, float z1, float z3,
                                  float d)
{
    gradient g;
    slope y = act(a, z1, true);
    if (!gated) {
        g.h = y.value, g.dz1 = d * y.derivative, g.dz3 = 0.0f;
        return g;
    }
    float u = up(a, z3);
    g.h = y.value * u;
    g.dz1 = d * u * y.derivative;
    g.dz3 = d * y.value;
    if (a.kind == CLAMPED) {
        if (z1 > a.limit) g.dz1 = 0.0f;
        if (z3 > a.limit || z3 < -a.limit) g.dz3 = 0.0f;
    }
    return g;
}

/* ---- rows of z ------------------------------------------------------------------------------- */

template <int V, int LAYOUT, typename T>
MOE_DEVICE void load_pair(const T *one, const T *three, int64_t j, int step, float (&x)[V],
                          float (&y)[V])
{
    if (LAYOUT == IN_TURN) {
        float low[V], high[V];
        moe__load<V>(one + 2 * j, low);
        moe__load<V>(one + 2 * j + V, high);
        MOE_UNROLLED
        for (int i = 0; i < V / 2; i++) {
            x[i] = low[2 * i], y[i] = low[2 * i + 1];
            x[V / 2 + i] = high[2 * i], y[V / 2 + i] = high[2 * i + 1];
        }
    } else {
        moe__load<V>(one + j * step, x);
        if (three) moe__load<V>(three + j * step, y);
    }
}

template <int V, int LAYOUT, typename T>
MOE_DEVICE void store_pair(T *one, T *three, int64_t j, int step, const float (&x)[V],
                           const float (&y)[V])
{
    if (LAYOUT == IN_TURN) {
        float low[V], high[V];
        MOE_UNROLLED
        for (int i = 0; i < V / 2; i++) {
            low[2 * i] = x[i], low[2 * i + 1] = y[i];
            high[2 * i] = x[V / 2 + i], high[2 * i + 1] = y[V / 2 + i];
        }
        moe__store<V>(one + 2 * j, low);
        moe__store<V>(one + 2 * j + V, high);
    } else {
        moe__store<V>(one + j * step, x);
        if (three) moe__store<V>(three + j * step, y);
    }
}

template <typename T, int V>
MOE_DEVICE void add_bias(const moe__cuda_vectors &b, const T *bias, int64_t j, float (&z)[V])
{
    MOE_UNROLLED
    for (int i = 0; i < V; i++) z[i] = moe__rounded<T>(z[i] + moe_widen(bias[(j + i) * b.stride]));
}

/* ---- forward --------------------------------------------------------------------------------- */

template <typename T, int V, int LAYOUT>
MOE_GLOBAL(256)
moe__cuda_act_forward(const moe__cuda_activation a, int shift)
{
    const bool turn = LAYOUT == IN_TURN || (LAYOUT == ANY && a.step == 2);
    const bool gated = LAYOUT == ANY ? a.z3 != nullptr : LAYOUT != ONE;
    const int step = LAYOUT == ANY ? a.step : 1;
    int64_t r = moe__block_row(shift), first = (int64_t)moe__block_column(shift) * V;
    bool biased = a.b1.base || a.b1.each;
    moe__row at = moe__find_row(a.map, r, biased);
    const T *b1 = moe__vector_of<T>(a.b1, at.expert), *b3 = moe__vector_of<T>(a.b3, at.expert);
    T *z1 = (T *)a.z1 + r * a.z_stride, *z3 = gated ? (T *)a.z3 + r * a.z_stride : nullptr;
    T *h = (T *)a.h + r * a.h_stride;
    float weight = a.weight_of_row && at.number >= 0 ? a.weight_of_row[r] : 1.0f;
    for (int64_t begin = 0; begin < a.width; begin += (int64_t)V << shift) {
        int64_t j = begin + first;
        bool mine = r < a.map.rows && j < a.width, real = mine && at.number >= 0;
        float x[V] = {0.0f}, y[V] = {0.0f};
        if (real) {
            load_pair<V, LAYOUT>(z1, z3, j, step, x, y);
            if (biased) {
                add_bias(a.b1, b1, j, x);
                if (gated) add_bias(a.b3, b3, j, y);
                if (a.keep) store_pair<V, LAYOUT>(z1, z3, j, step, x, y);
            }
            MOE_UNROLLED
            for (int i = 0; i < V; i++) {
                x[i] = act(a, x[i], false).value;
                if (gated) x[i] = x[i] * up(a, y[i]);
                if (a.weight_of_row) x[i] = weight * x[i];
            }
        }
        if (turn) moe_block_sync();
        if (mine) moe__store<V>(h + j, x);
    }
}

/* ---- backward -------------------------------------------------------------------------------- */

template <typename T, int V, int LAYOUT>
MOE_GLOBAL(256)
moe__cuda_act_backward(const moe__cuda_activation a, int shift)
{
    const bool turn = LAYOUT == IN_TURN || (LAYOUT == ANY && a.step == 2);
    const bool gated = LAYOUT == ANY ? a.z3 != nullptr : LAYOUT != ONE;
    const int step = LAYOUT == ANY ? a.step : 1;
    int64_t r = moe__block_row(shift), first = (int64_t)moe__block_column(shift) * V;
    moe__row at = moe__find_row(a.map, r, false);
    const T *z1 = (const T *)a.z1 + r * a.z_stride;
    const T *z3 = gated ? (const T *)a.z3 + r * a.z_stride : nullptr;
    T *dz1 = (T *)a.dz1 + r * a.z_stride, *dz3 = gated ? (T *)a.dz3 + r * a.z_stride : nullptr;
    const T *dh = (const T *)a.dh + r * a.dh_stride;
    T *h = (T *)a.h + r * a.h_stride;
    float weight = a.weight_of_row && at.number >= 0 ? a.weight_of_row[r] : 1.0f;
    for (int64_t begin = 0; begin < a.width; begin += (int64_t)V << shift) {
        int64_t j = begin + first;
        bool mine = r < a.map.rows && j < a.width, real = mine && at.number >= 0;
        float x[V] = {0.0f}, y[V] = {0.0f}, d[V] = {0.0f};
        if (real) {
            load_pair<V, LAYOUT>(z1, z3, j, step, x, y);
            moe__load<V>(dh + j, d);
            MOE_UNROLLED
            for (int i = 0; i < V; i++) {
                if (a.weight_of_row) d[i] = weight * d[i];
                gradient g = differentiate(a, gated, x[i], y[i], d[i]);
                x[i] = g.dz1, y[i] = g.dz3;
                d[i] = a.weight_of_row ? weight * g.h : g.h;
            }
        }
        if (turn) moe_block_sync();
        if (!mine) continue;
        store_pair<V, LAYOUT>(dz1, dz3, j, step, x, y);
        moe__store<V>(h + j, d);
    }
}

/* The gradient by a weight on h: dh . h, h as it was before the weight. 16 threads for a row, as
 * moe__cuda_dot_rows. */
template <typename T> MOE_GLOBAL(256) moe__cuda_act_dot(const moe__cuda_activation a)
{
    int64_t r = (int64_t)blockIdx.x * 16 + threadIdx.x / 16;
    moe__row at = moe__find_row(a.map, r, false);
    const T *z1 = (const T *)a.z1 + r * a.z_stride;
    const T *z3 = a.z3 ? (const T *)a.z3 + r * a.z_stride : nullptr;
    const T *dh = (const T *)a.dh + r * a.dh_stride;
    float lane[1] = {0.0f};
    for (int64_t j = threadIdx.x % 16; at.number >= 0 && j < a.width; j += 16) {
        float h = act(a, moe_widen(z1[j * a.step]), false).value;
        if (z3) h = h * up(a, moe_widen(z3[j * a.step]));
        lane[0] = moe__fma_f32(moe_widen(dh[j]), moe__rounded<T>(h), lane[0]);
    }
    float sum = moe__lane_tree<1>(lane);
    if (at.number >= 0 && threadIdx.x % 16 == 0) a.entry_grad[a.map.entry_of_row[at.number]] = sum;
}

/* ---- launches -------------------------------------------------------------------------------- */

/* The layout that every array of the call allows. */
template <typename T> static int layout_of(const moe__cuda_activation &a)
{
    const int V = moe_pack_of<T>::N;
    bool aligned = a.width % V == 0 && moe_rows_aligned<T>(a.h, a.h_stride) &&
                   moe_rows_aligned<T>(a.z1, a.z_stride) &&
                   moe_rows_aligned<T>(a.dz1, a.z_stride) && moe_rows_aligned<T>(a.dh, a.dh_stride);
    if (a.step == 2)
        return aligned && (const T *)a.z3 == (const T *)a.z1 + 1 && a.dz3 == (T *)a.dz1 + !!a.dz1
                   ? IN_TURN
                   : ANY;
    aligned = aligned && moe_rows_aligned<T>(a.z3, a.z_stride) &&
              moe_rows_aligned<T>(a.dz3, a.z_stride);
    return !aligned ? ANY : a.z3 ? TWO : ONE;
}

template <typename T>
static moe_status forward(const moe__workers *workers, const moe__cuda_activation &a)
{
    const int V = moe_pack_of<T>::N, layout = layout_of<T>(a);
    moe__row_launch launch = moe__launch_rows(a.map.rows, a.width, layout == ANY ? 1 : V);
    return moe__cuda_launch(workers, "activation",
                            layout == ONE       ? moe__cuda_act_forward<T, V, ONE>
                            : layout == TWO     ? moe__cuda_act_forward<T, V, TWO>
                            : layout == IN_TURN ? moe__cuda_act_forward<T, V, IN_TURN>
                                                : moe__cuda_act_forward<T, 1, ANY>,
                            launch.grid, dim3(MOE__ROW_THREADS), 0, a, launch.shift);
}

template <typename T>
static moe_status backward(const moe__workers *workers, const moe__cuda_activation &a)
{
    const int V = moe_pack_of<T>::N, layout = layout_of<T>(a);
    moe__row_launch launch = moe__launch_rows(a.map.rows, a.width, layout == ANY ? 1 : V);
    if (a.entry_grad)
        MOE_TRY(moe__cuda_launch(workers, "activation", moe__cuda_act_dot<T>,
                                 dim3((unsigned)((a.map.rows + 15) / 16)), dim3(256), 0, a));
    return moe__cuda_launch(workers, "activation",
                            layout == ONE       ? moe__cuda_act_backward<T, V, ONE>
                            : layout == TWO     ? moe__cuda_act_backward<T, V, TWO>
                            : layout == IN_TURN ? moe__cuda_act_backward<T, V, IN_TURN>
                                                : moe__cuda_act_backward<T, 1, ANY>,
                            launch.grid, dim3(MOE__ROW_THREADS), 0, a, launch.shift);
}

extern "C" void moe__cuda_activation_of(const moe_experts_config *c, moe__cuda_activation *a)
{
    double alpha = c->activation_alpha != 0 ? c->activation_alpha : 1;
    switch (c->activation) {
    case MOE_ACTIVATION_GELU_TANH:
    case MOE_ACTIVATION_GEGLU_TANH: a->kind = GELU_TANH; break;
    case MOE_ACTIVATION_GELU_ERF:
    case MOE_ACTIVATION_GEGLU_ERF: a->kind = GELU_ERF; break;
    case MOE_ACTIVATION_SILU:
    case MOE_ACTIVATION_SWIGLU: a->kind = SILU; break;
    default: a->kind = RELU;
    }
    if (alpha == 1 && c->activation_limit == 0 && c->activation_offset == 0) return;
    a->kind = CLAMPED;
    a->alpha = (float)alpha;
    a->limit = c->activation_limit != 0 ? (float)c->activation_limit
                                        : moe__from_bits_f32(0x7f800000u);
    a->beyond = (float)c->activation_offset;
}

extern "C" moe_status moe__cuda_activation_forward(const moe__workers *workers,
                                                   const moe__cuda_activation *a)
{
    if (a->map.rows == 0) return MOE_OK;
    return MOE_CUDA_BY_DTYPE(a->dtype, forward, workers, *a);
}

extern "C" moe_status moe__cuda_activation_backward(const moe__workers *workers,
                                                    const moe__cuda_activation *a)
{
    if (a->map.rows == 0) return MOE_OK;
    return MOE_CUDA_BY_DTYPE(a->dtype, backward, workers, *a);
}
