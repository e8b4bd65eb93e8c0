/* combine.cu - weighted rows back to tokens, and the adjoint. As src/cpu/combine.c:
 *
 *     forward:   acc = fma(weight, rows_in[row], acc) in order of entry from +0;  tokens_out =
 *                o(acc), or o(tokens_out + acc)
 *     backward:  rows_out[r] = weight tokens_in[t],  entry_weight_grad[n] = tokens_in[t] .
 *                rows_in[row]
 *
 * o is the identity or the logistic function; output_backward is its gradient. A warp has a stretch
 * of a token and reads each of its rows once. The dot product is that of cpu/lanes.h: 16 lanes of
 * the CPU are half a warp, element i in lane i % 16, so its loads are of one element, side by
 * side. */
#include "elements.h"

/* ---- forward --------------------------------------------------------------------------------- */

/* What the kernel needs of a job beside its matrices. */
struct moe_combine {
    const float *weights; /* [N]; NULL: 1 */
    const uint8_t *token_mask;
    int64_t padded_rows;
    int32_t add, sigmoid, dropped, zero;
};

template <typename T> struct moe_combine_rows {
    const T *rows, *tokens_in;
    T *out, *saved;
    int64_t rows_stride, tokens_in_stride, out_stride;
};

template <typename T, int N>
MOE_GLOBAL(256)
moe_combine_forward(moe_stretches s, moe__plan_arrays p, moe_combine c, moe_combine_rows<T> m)
{
    for (int64_t at = moe_first_stretch(); at < s.tokens * s.per_token; at += moe_next_stretch()) {
        int64_t t = at / s.per_token, i = at - t * s.per_token, end = p.token_begin[t + 1];
        float acc[MOE_PACKS(N)][N], v[MOE_PACKS(N)][N];
        moe_pack<T, N> pack[MOE_PACKS(N)];
        bool any = false, masked = c.token_mask && !c.token_mask[t];
        MOE_EACH(acc, N, 0.0f);
        for (int64_t first = p.token_begin[t]; first < end; first += 32) {
            int64_t place = moe_place_of_lane(p, first, end, c.padded_rows);
            for (int n = 0; n < moe_lanes_used(first, end); n++) {
                int64_t row = moe_shuffle(place, n);
                if (row < 0) continue;
                float w = c.weights ? c.weights[first + n] : 1.0f;
                moe_widen_stretch<T, N>(v, m.rows + row * m.rows_stride, i, s.width);
                MOE_EACH(acc, N, moe__fma_f32(w, v[u][k], acc[u][k]));
                any = true;
            }
        }
        bool dropped = c.dropped != MOE_DROPPED_ZERO && !masked && !any;
        if (dropped && c.dropped == MOE_DROPPED_UNTOUCHED) continue;
        if (dropped) moe_widen_stretch<T, N>(acc, m.tokens_in + t * m.tokens_in_stride, i, s.width);
        if (masked) MOE_EACH(acc, N, 0.0f);
        if (c.add) {
            moe_widen_stretch<T, N>(v, m.out + t * m.out_stride, i, s.width);
            MOE_EACH(acc, N, v[u][k] + acc[u][k]);
        }
        if (c.sigmoid && !masked) MOE_EACH(acc, N, moe__sigmoid_f32(acc[u][k]));
        moe_narrow_packs<T, N>(pack, acc);
        moe_store_stretch<T, N>(m.out + t * m.out_stride, pack, i, s.width);
        if (m.saved) moe_store_stretch<T, N>(m.saved + t * s.width, pack, i, s.width);
    }
}

template <typename T, int N> static moe_status forward(const moe__rows_job *job)
{
    moe_stretches s = moe_cut(job->plan->tokens, job->width, N);
    const void *weights = job->weights ? job->weights : job->plan->weight_of_entry;
    moe_combine c = {job->unweighted ? NULL : (const float *)weights,
                     job->token_mask,
                     job->padded_rows,
                     job->add,
                     job->sigmoid,
                     job->dropped,
                     0};
    moe_combine_rows<T> m = {(const T *)job->rows_in, (const T *)job->tokens_in,
                             (T *)job->tokens_out,    (T *)job->tokens_saved,
                             job->rows_in_stride,     job->tokens_in_stride,
                             job->tokens_out_stride};
    return moe__cuda_launch(&job->workers, "combine", moe_combine_forward<T, N>,
                            moe_stretch_grid(s), moe_stretch_block(), 0, s, *job->plan, c, m);
}

template <typename T> static moe_status combine_forward(const moe__rows_job *job)
{
    bool passes = job->dropped == MOE_DROPPED_PASS_THROUGH;
    if (job->plan->tokens == 0) return MOE_OK;
    if (job->width % moe_pack_of<T>::N == 0 &&
        moe_rows_aligned<T>(job->rows_in, job->rows_in_stride) &&
        moe_rows_aligned<T>(job->tokens_out, job->tokens_out_stride) &&
        moe_rows_aligned<T>(job->tokens_saved, 0) &&
        (!passes || moe_rows_aligned<T>(job->tokens_in, job->tokens_in_stride)))
        return forward<T, moe_pack_of<T>::N>(job);
    return forward<T, 1>(job);
}

MOE_CUDA_SLOT(combine_forward, moe__rows_job *)

/* ---- backward -------------------------------------------------------------------------------- */

/* grad[n] = d[t] . rows[row], 0 for an entry without a row: half a warp for an entry */
template <typename T>
MOE_GLOBAL(256)
moe_combine_dot(moe__plan_arrays p, int64_t width, const T *d, int64_t d_stride, const T *rows,
                int64_t rows_stride, int64_t padded_rows, float *grad)
{
    int64_t n = (int64_t)blockIdx.x * 16 + threadIdx.x / 16;
    int64_t row = n < p.entries ? moe_place_of_entry(p, n, padded_rows) : -1;
    float sum = 0.0f;
    if (row >= 0) {
        const T *a = d + moe_token_of_entry(p, n) * d_stride, *b = rows + row * rows_stride;
        int64_t i = threadIdx.x % 16;
        for (; i + 7 * 16 < width; i += 8 * 16) {
            float x[8], y[8];
            for (int u = 0; u < 8; u++) {
                x[u] = moe_widen(a[i + u * 16]);
                y[u] = moe_widen(b[i + u * 16]);
            }
            for (int u = 0; u < 8; u++) sum = moe__fma_f32(x[u], y[u], sum);
        }
        for (; i < width; i += 16) sum = moe__fma_f32(moe_widen(a[i]), moe_widen(b[i]), sum);
    }
    for (int apart = 8; apart > 0; apart /= 2) sum = sum + moe_shuffle_xor(sum, apart);
    if (n < p.entries && threadIdx.x % 16 == 0) grad[n] = row >= 0 ? sum : 0.0f;
}

/* rows_out[row] = weight d[t]; weights NULL: 1 */
template <typename T, int N>
MOE_GLOBAL(256)
moe_combine_backward(moe_stretches s, moe__plan_arrays p, const T *d, int64_t d_stride,
                     const float *weights, T *rows, int64_t rows_stride, int64_t padded_rows)
{
    for (int64_t at = moe_first_stretch(); at < s.tokens * s.per_token; at += moe_next_stretch()) {
        int64_t t = at / s.per_token, i = at - t * s.per_token, end = p.token_begin[t + 1];
        float v[MOE_PACKS(N)][N], out[MOE_PACKS(N)][N];
        moe_widen_stretch<T, N>(v, d + t * d_stride, i, s.width);
        for (int64_t first = p.token_begin[t]; first < end; first += 32) {
            int64_t place = moe_place_of_lane(p, first, end, padded_rows);
            for (int n = 0; n < moe_lanes_used(first, end); n++) {
                int64_t row = moe_shuffle(place, n);
                if (row < 0) continue;
                float w = weights ? weights[first + n] : 1.0f;
                MOE_EACH(out, N, w * v[u][k]);
                moe_narrow_stretch<T, N>(rows + row * rows_stride, out, i, s.width);
            }
        }
    }
}

template <typename T, int N> static moe_status rows_backward(const moe__rows_job *job)
{
    moe_stretches s = moe_cut(job->plan->tokens, job->width, N);
    const float *weights = job->unweighted ? NULL : (const float *)job->plan->weight_of_entry;
    return moe__cuda_launch(&job->workers, "combine", moe_combine_backward<T, N>,
                            moe_stretch_grid(s), moe_stretch_block(), 0, s, *job->plan,
                            (const T *)job->tokens_in, job->tokens_in_stride, weights,
                            (T *)job->rows_out, job->rows_out_stride, job->padded_rows);
}

template <typename T> static moe_status combine_backward(const moe__rows_job *job)
{
    const moe__plan_arrays *p = job->plan;
    if (p->tokens == 0 || p->entries == 0) return MOE_OK;
    /* rows_out may be rows_in: the dot products first */
    if (job->entry_weight_grad)
        MOE_TRY(moe__cuda_launch(&job->workers, "combine", moe_combine_dot<T>,
                                 dim3((unsigned)((p->entries + 15) / 16)), dim3(256), 0, *p,
                                 job->width, (const T *)job->tokens_in, job->tokens_in_stride,
                                 (const T *)job->rows_in, job->rows_in_stride, job->padded_rows,
                                 (float *)job->entry_weight_grad));
    if (!job->rows_out) return MOE_OK;
    if (job->width % moe_pack_of<T>::N == 0 &&
        moe_rows_aligned<T>(job->tokens_in, job->tokens_in_stride) &&
        moe_rows_aligned<T>(job->rows_out, job->rows_out_stride))
        return rows_backward<T, moe_pack_of<T>::N>(job);
    return rows_backward<T, 1>(job);
}

MOE_CUDA_SLOT(combine_backward, moe__rows_job *)

/* ---- the output function's gradient ---------------------------------------------------------- */

/* out = d y (1 - y), y dense */
template <typename T, int N>
MOE_GLOBAL(256)
moe_output_backward(moe_stretches s, const T *d, int64_t d_stride, const T *y, T *out,
                    int64_t out_stride)
{
    for (int64_t at = moe_first_stretch(); at < s.tokens * s.per_token; at += moe_next_stretch()) {
        int64_t t = at / s.per_token, i = at - t * s.per_token;
        float dv[MOE_PACKS(N)][N], v[MOE_PACKS(N)][N];
        moe_widen_stretch<T, N>(dv, d + t * d_stride, i, s.width);
        moe_widen_stretch<T, N>(v, y + t * s.width, i, s.width);
        MOE_EACH(v, N, dv[u][k] * (v[u][k] * (1.0f - v[u][k])));
        moe_narrow_stretch<T, N>(out + t * out_stride, v, i, s.width);
    }
}

template <typename T, int N> static moe_status output(const moe__rows_job *job)
{
    moe_stretches s = moe_cut(job->plan->tokens, job->width, N);
    return moe__cuda_launch(&job->workers, "output", moe_output_backward<T, N>, moe_stretch_grid(s),
                            moe_stretch_block(), 0, s, (const T *)job->tokens_in,
                            job->tokens_in_stride, (const T *)job->tokens_saved,
                            (T *)job->tokens_out, job->tokens_out_stride);
}

template <typename T> static moe_status output_backward(const moe__rows_job *job)
{
    if (job->plan->tokens == 0) return MOE_OK;
    if (job->width % moe_pack_of<T>::N == 0 &&
        moe_rows_aligned<T>(job->tokens_in, job->tokens_in_stride) &&
        moe_rows_aligned<T>(job->tokens_saved, 0) &&
        moe_rows_aligned<T>(job->tokens_out, job->tokens_out_stride))
        return output<T, moe_pack_of<T>::N>(job);
    return output<T, 1>(job);
}

MOE_CUDA_SLOT(output_backward, moe__rows_job *)
