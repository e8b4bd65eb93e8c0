/* mix.cu - the layer's own coefficients of a token, and their gradients. As src/cpu/mix.c:
 *
 *     width 1:  s = sigmoid(x w)               of the shared part
 *     width 2:  c = softmax(x W + b)           of routed and residual part
 *
 * x [T,D] and dx are of the storage type, W [D,width] of its own, all else is float. The weights of
 * a plan's entries are multiplied by them. */
#include "elements.h"

#include "router_gemm.h"

/* What the kernels need of a job. */
struct moe_mix {
    int64_t tokens;
    int32_t width;
    const uint8_t *token_mask;
    float *coefficient, *d_coefficient; /* [T,width] */
    moe__plan_arrays plan[2];
    const float *weight_in[2]; /* NULL: 1 */
    float *weight_out[2], *entry_grad[2];
};

/* ---- forward --------------------------------------------------------------------------------- */

/* c = softmax(c) of 2 */
MOE_DEVICE void moe_softmax2(float c[2])
{
    float most = c[1] > c[0] ? c[1] : c[0];
    float a = moe__exp_f32(c[0] - most), b = moe__exp_f32(c[1] - most), sum = a + b;
    c[0] = a / sum;
    c[1] = b / sum;
}

/* weight_out = coefficient weight_in */
MOE_DEVICE void moe_weigh_entries(const moe_mix &m, int i, int64_t t, float coefficient)
{
    const float *in = m.weight_in[i];
    float *out = m.weight_out[i];
    int64_t end = m.plan[i].token_begin[t + 1];
    for (int64_t n = m.plan[i].token_begin[t]; n < end; n++)
        out[n] = in ? coefficient * in[n] : coefficient;
}

MOE_GLOBAL(256) moe_mix_forward(moe_mix m)
{
    int64_t t = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (t >= m.tokens) return;
    float *at = m.coefficient + t * m.width, c[2] = {at[0], m.width > 1 ? at[1] : 0.0f};
    if (m.token_mask && !m.token_mask[t])
        c[0] = c[1] = 0.0f;
    else if (m.width == 1)
        c[0] = moe__sigmoid_f32(c[0]);
    else
        moe_softmax2(c);
    at[0] = c[0];
    moe_weigh_entries(m, 0, t, c[0]);
    if (m.width == 1) return;
    at[1] = c[1];
    moe_weigh_entries(m, 1, t, c[1]);
}

/* ---- backward -------------------------------------------------------------------------------- */

/* out_n = c in_n:  dc = sum_n in_n dout_n,  din_n = c dout_n. */
MOE_DEVICE float moe_entries_backward(const moe_mix &m, int i, int64_t t, float coefficient)
{
    const moe__plan_arrays &p = m.plan[i];
    const float *in = m.weight_in[i];
    float *grad = m.entry_grad[i], sum = 0.0f;
    int64_t end = p.token_begin[t + 1];
    for (int64_t n = p.token_begin[t]; n < end; n++) {
        if (p.row_of_entry[n] < 0) continue; /* its gradient is 0 */
        sum = in ? moe__fma_f32(in[n], grad[n], sum) : sum + grad[n];
        grad[n] = coefficient * grad[n];
    }
    return sum;
}

/* sigmoid: dz = ds s (1 - s);  softmax: dz_i = c_i (dc_i - sum_j c_j dc_j), the dot product of 2
 * with the zeros that cpu/lanes.h adds to each. */
MOE_GLOBAL(256) moe_mix_backward(moe_mix m)
{
    int64_t t = (int64_t)blockIdx.x * 256 + threadIdx.x;
    if (t >= m.tokens) return;
    const float *c = m.coefficient + t * m.width;
    float *d = m.d_coefficient + t * m.width;
    float d0 = moe_entries_backward(m, 0, t, c[0]);
    if (m.width == 1) {
        d[0] = d0 * (c[0] * (1.0f - c[0]));
        return;
    }
    float d1 = moe_entries_backward(m, 1, t, c[1]);
    float dot = (moe__fma_f32(c[0], d0, 0.0f) + 0.0f) + (moe__fma_f32(c[1], d1, 0.0f) + 0.0f);
    d[0] = c[0] * (d0 - dot);
    d[1] = c[1] * (d1 - dot);
}

/* ---- the slots ------------------------------------------------------------------------------- */

static inline int32_t dtype_of(const float *) { return MOE_DTYPE_F32; }
static inline int32_t dtype_of(const moe_bf16 *) { return MOE_DTYPE_BF16; }
static inline int32_t dtype_of(const moe_f16 *) { return MOE_DTYPE_F16; }

static moe_row_operand rows_of(const void *data, int64_t stride, const int64_t *index,
                               int32_t dtype)
{
    moe_row_operand o;
    memset(&o, 0, sizeof o);
    o.data = data;
    o.stride = stride;
    o.index = index;
    o.dtype = dtype;
    return o;
}

static moe_mix mix_of(const moe__mix_job *job)
{
    moe_mix m;
    memset(&m, 0, sizeof m);
    m.tokens = job->tokens;
    m.width = (int32_t)job->width;
    m.token_mask = job->token_mask;
    m.coefficient = (float *)job->coefficient;
    m.d_coefficient = (float *)job->d_coefficient;
    for (int64_t i = 0; i < job->width; i++) {
        m.plan[i] = *job->plan[i];
        m.weight_in[i] = (const float *)job->weight_in[i];
        m.weight_out[i] = (float *)job->weight_out[i];
        m.entry_grad[i] = (float *)job->entry_grad[i];
    }
    return m;
}

static moe_status per_token(const moe__mix_job *job, void (*kernel)(moe_mix))
{
    return moe__cuda_launch(&job->workers, "mix", kernel,
                            dim3((unsigned)((job->tokens + 255) / 256)), dim3(256), 0, mix_of(job));
}

extern "C" int64_t moe__cuda_mix_scratch(const moe__pass_shape *shape)
{
    if (!shape || !shape->experts || !(shape->shared_gate || shape->residual_mix)) return 0;
    return moe__cuda_dw_scratch(1, shape->experts->d_model, 2);
}

template <typename T> static moe_status mix_forward(moe__mix_job *job)
{
    moe_rows_product product;
    if (job->tokens == 0) return MOE_OK;
    memset(&product, 0, sizeof product);
    product.ranges.rows = job->tokens;
    product.ranges.parts = 1;
    product.k = job->input_width;
    product.n = job->width;
    product.a = rows_of(job->x, job->x_stride, NULL, dtype_of((const T *)NULL));
    product.b = job->weight_matrix;
    product.bias = job->bias;
    product.out = job->coefficient;
    product.out_stride = job->width;
    product.out_dtype = MOE_DTYPE_F32;
    MOE_TRY(moe__cuda_rows_product(&job->workers, &product));
    return per_token(job, moe_mix_forward);
}

MOE_CUDA_SLOT(mix_forward, moe__mix_job *)

/* dx += d W^T */
template <typename T> static moe_status dx_product(moe__mix_job *job)
{
    moe_rows_product product;
    memset(&product, 0, sizeof product);
    product.ranges.rows = job->tokens;
    product.ranges.parts = 1;
    product.k = job->width;
    product.n = job->input_width;
    product.a = rows_of(job->d_coefficient, job->width, NULL, MOE_DTYPE_F32);
    product.b = moe_transposed(&job->weight_matrix);
    product.out = job->dx;
    product.out_stride = job->dx_stride;
    product.out_dtype = dtype_of((const T *)NULL);
    product.add = 1;
    return moe__cuda_rows_product(&job->workers, &product);
}

/* dW += x^T d,  db += sum d, over the unmasked tokens */
template <typename T> static moe_status dw_product(moe__mix_job *job)
{
    moe_dw_product product;
    memset(&product, 0, sizeof product);
    product.ranges.rows = job->tokens;
    product.ranges.parts = 1;
    product.ranges.begin = job->valid_begin;
    product.ranges.step = job->groups;
    product.k = job->input_width;
    product.n = job->width;
    product.a = rows_of(job->x, job->x_stride, job->valid_token, dtype_of((const T *)NULL));
    product.g = rows_of(job->d_coefficient, job->width, job->valid_token, MOE_DTYPE_F32);
    product.dw = job->d_weight_matrix;
    product.dbias = job->d_bias;
    return moe__cuda_dw_product(&job->workers, &product);
}

template <typename T> static moe_status mix_backward(moe__mix_job *job)
{
    if (job->tokens == 0) return MOE_OK;
    MOE_TRY(per_token(job, moe_mix_backward));
    if (job->dx) MOE_TRY(dx_product<T>(job));
    if (!moe_is_there(&job->d_weight_matrix) && !moe_is_there(&job->d_bias)) return MOE_OK;
    return dw_product<T>(job);
}

MOE_CUDA_SLOT(mix_backward, moe__mix_job *)
