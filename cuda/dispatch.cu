/* dispatch.cu - tokens to rows, and the adjoint. As src/cpu/dispatch.c:
 *
 *     forward:   rows_out[r] = tokens_in[token_of_row[r]]
 *     backward:  tokens_out[t] (=|+=) sum over the rows of t, in order of entry, of rows_in[row];
 *                of tokens_in[t] for a token without rows that passed through
 *
 * A warp has a stretch of a token: it reads that once and writes it to every row, or reads each row
 * once and writes the sum. */
#include "elements.h"

template <typename T, int N>
MOE_GLOBAL(256)
moe_dispatch_forward(moe_stretches s, moe__plan_arrays p, const T *in, int64_t in_stride, T *out,
                     int64_t out_stride, int64_t padded_rows)
{
    for (int64_t at = moe_first_stretch(); at < s.tokens * s.per_token; at += moe_next_stretch()) {
        int64_t t = at / s.per_token, i = at - t * s.per_token, end = p.token_begin[t + 1];
        moe_pack<T, N> pack[MOE_PACKS(N)];
        moe_load_stretch<T, N>(pack, in + t * in_stride, i, s.width);
        for (int64_t first = p.token_begin[t]; first < end; first += 32) {
            int64_t place = moe_place_of_lane(p, first, end, padded_rows);
            for (int n = 0; n < moe_lanes_used(first, end); n++) {
                int64_t row = moe_shuffle(place, n);
                if (row >= 0) moe_store_stretch<T, N>(out + row * out_stride, pack, i, s.width);
            }
        }
    }
}

template <typename T, int N> static moe_status forward(const moe__rows_job *job)
{
    moe_stretches s = moe_cut(job->plan->tokens, job->width, N);
    return moe__cuda_launch(&job->workers, "dispatch", moe_dispatch_forward<T, N>,
                            moe_stretch_grid(s), moe_stretch_block(), 0, s, *job->plan,
                            (const T *)job->tokens_in, job->tokens_in_stride, (T *)job->rows_out,
                            job->rows_out_stride, job->padded_rows);
}

template <typename T> static moe_status dispatch_forward(const moe__rows_job *job)
{
    if (job->plan->tokens == 0 || job->plan->entries == 0) return MOE_OK;
    if (job->width % moe_pack_of<T>::N == 0 &&
        moe_rows_aligned<T>(job->tokens_in, job->tokens_in_stride) &&
        moe_rows_aligned<T>(job->rows_out, job->rows_out_stride))
        return forward<T, moe_pack_of<T>::N>(job);
    return forward<T, 1>(job);
}

MOE_CUDA_SLOT(dispatch_forward, moe__rows_job *)

/* passed: tokens_in, for those that passed through; or NULL. Rows may be floats where tokens are
 * not. */
template <typename I, typename T, int N>
MOE_GLOBAL(256)
moe_dispatch_backward(moe_stretches s, moe__plan_arrays p, const I *in, int64_t in_stride,
                      const T *passed, int64_t passed_stride, const uint8_t *token_mask, T *out,
                      int64_t out_stride, int32_t add, int64_t padded_rows)
{
    for (int64_t at = moe_first_stretch(); at < s.tokens * s.per_token; at += moe_next_stretch()) {
        int64_t t = at / s.per_token, i = at - t * s.per_token, end = p.token_begin[t + 1];
        float sum[MOE_PACKS(N)][N], v[MOE_PACKS(N)][N];
        bool any = false;
        MOE_EACH(sum, N, 0.0f);
        for (int64_t first = p.token_begin[t]; first < end; first += 32) {
            int64_t place = moe_place_of_lane(p, first, end, padded_rows);
            for (int n = 0; n < moe_lanes_used(first, end); n++) {
                int64_t row = moe_shuffle(place, n);
                if (row < 0) continue;
                moe_widen_stretch<I, N>(v, in + row * in_stride, i, s.width);
                MOE_EACH(sum, N, any ? sum[u][k] + v[u][k] : v[u][k]);
                any = true;
            }
        }
        if (!any && passed && !(token_mask && !token_mask[t]))
            moe_widen_stretch<T, N>(sum, passed + t * passed_stride, i, s.width);
        if (add) {
            moe_widen_stretch<T, N>(v, out + t * out_stride, i, s.width);
            MOE_EACH(sum, N, v[u][k] + sum[u][k]);
        }
        moe_narrow_stretch<T, N>(out + t * out_stride, sum, i, s.width);
    }
}

template <typename I, typename T, int N>
static moe_status backward(const moe__rows_job *job, const T *passed)
{
    moe_stretches s = moe_cut(job->plan->tokens, job->width, N);
    return moe__cuda_launch(&job->workers, "dispatch", moe_dispatch_backward<I, T, N>,
                            moe_stretch_grid(s), moe_stretch_block(), 0, s, *job->plan,
                            (const I *)job->rows_in, job->rows_in_stride, passed,
                            job->tokens_in_stride, job->token_mask, (T *)job->tokens_out,
                            job->tokens_out_stride, job->add, job->padded_rows);
}

template <typename T> static moe_status dispatch_backward(const moe__rows_job *job)
{
    if (job->tokens_wide && sizeof(T) != sizeof(float)) return dispatch_backward<float>(job);
    const T *passed = job->dropped == MOE_DROPPED_PASS_THROUGH ? (const T *)job->tokens_in : NULL;
    if (job->plan->tokens == 0) return MOE_OK;
    if (job->rows_wide && sizeof(T) != sizeof(float)) return backward<float, T, 1>(job, passed);
    if (job->width % moe_pack_of<T>::N == 0 &&
        moe_rows_aligned<T>(job->rows_in, job->rows_in_stride) &&
        moe_rows_aligned<T>(job->tokens_out, job->tokens_out_stride) &&
        moe_rows_aligned<T>(passed, passed ? job->tokens_in_stride : 0))
        return backward<T, T, moe_pack_of<T>::N>(job, passed);
    return backward<T, T, 1>(job, passed);
}

MOE_CUDA_SLOT(dispatch_backward, moe__rows_job *)
