/* gemm_micro.c - the kernels of gemm_micro.h: every multiply-add of a product is in this file.
 *
 * A step of `right` loads TILE_V vectors of b and spreads m numbers of a; a step of `left` loads
 * the lanes of b and spreads a number of each of TILE_M rows of weights, which lie MOE__PANEL
 * apart; a step of `few` loads a vector of each of k rows of b. */
#include "cpu/gemm_micro.h"

V_INLINE void fetch(read_ahead *ahead)
{
    int64_t offset = *ahead->offset;
    __builtin_prefetch(ahead->at + offset, 0, 2);
    __builtin_prefetch(ahead->too + offset, 0, 2);
    ahead->offset += ahead->next;
}

V_INLINE void right_store(const int m, const micro_job *job, vec acc[TILE_M][TILE_V])
{
    if (job->bias) {
        V_UNROLL
        for (int v = 0; v < TILE_V; v++) {
            vec bias = v_load(job->bias + v * VEC_N);
            V_UNROLL
            for (int i = 0; i < m; i++) acc[i][v] = v_add(acc[i][v], bias);
        }
    }
    V_UNROLL
    for (int v = 0; v < TILE_V; v++) {
        real *out = job->out[v];
        V_UNROLL
        for (int i = 0; i < m; i++, out += job->out_stride) {
            if (job->store == MICRO_STREAM)
                v_stream(out, acc[i][v]);
            else
                v_store(out, job->store == MICRO_ADD ? v_add(v_load(out), acc[i][v]) : acc[i][v]);
        }
    }
}

/* m is a constant at every call, so that the loops unroll and acc lives in registers. */
V_INLINE void right(const int m, const micro_job *job)
{
    const real *a = job->a, *b = job->b;
    const int64_t k = job->k, stride = job->b_stride, step = job->b_step;
    read_ahead ahead = job->ahead;
    vec acc[TILE_M][TILE_V];
    V_UNROLL
    for (int i = 0; i < m; i++) {
        V_UNROLL
        for (int v = 0; v < TILE_V; v++)
            acc[i][v] = job->from[0] ? v_load(job->from[v] + i * job->from_stride) : v_zero();
    }
    for (int64_t p = 0; p < k; p++, a += m, b += stride) {
        vec row[TILE_V];
        V_UNROLL
        for (int v = 0; v < TILE_V; v++) row[v] = v_load(b + v * step);
        fetch(&ahead);
        V_UNROLL
        for (int i = 0; i < m; i++) {
            vec x = v_set1(a[i]);
            V_UNROLL
            for (int v = 0; v < TILE_V; v++) acc[i][v] = v_fma(x, row[v], acc[i][v]);
        }
    }
    right_store(m, job, acc);
}

/* One kernel for each number of rows: 16 rows as 8 and 8 cost little more than their share. */
void MOE_KERNEL(micro_right)(int64_t m, const micro_job *job)
{
    switch (m) {
    case 1: right(1, job); break;
    case 2: right(2, job); break;
    case 3: right(3, job); break;
    case 4: right(4, job); break;
#if TILE_M > 4
    case 5: right(5, job); break;
    case 6: right(6, job); break;
#endif
#if TILE_M > 6
    case 7: right(7, job); break;
    case 8: right(8, job); break;
#endif
#if TILE_M > 8
    case 9: right(9, job); break;
    case 10: right(10, job); break;
    case 11: right(11, job); break;
    case 12: right(12, job); break;
    case 13: right(13, job); break;
    case 14: right(14, job); break;
#endif
    default: break;
    }
}

V_INLINE void left(const int vectors, const left_job *job)
{
    const real *b = job->b;
    const int64_t width = job->width;
    read_ahead ahead = job->ahead;
    vec acc[TILE_M][TILE_V];
    V_UNROLL
    for (int i = 0; i < TILE_M; i++) {
        V_UNROLL
        for (int v = 0; v < vectors; v++)
            acc[i][v] = job->fresh ? v_zero() : v_load(job->chain + i * TILE_N + v * VEC_N);
    }
    for (int64_t g = 0; g < job->groups; g++) {
        const real *w = job->w + g * job->w_step;
        ahead.offset = job->ahead.offset;
        for (int64_t p = 0; p < width; p++, b += TILE_N) {
            vec lanes[TILE_V];
            V_UNROLL
            for (int v = 0; v < vectors; v++) lanes[v] = v_load(b + v * VEC_N);
            fetch(&ahead);
            V_UNROLL
            for (int i = 0; i < TILE_M; i++) {
                vec x = v_set1(w[i * MOE__PANEL + p]);
                V_UNROLL
                for (int v = 0; v < vectors; v++) acc[i][v] = v_fma(x, lanes[v], acc[i][v]);
            }
        }
        ahead.at += job->ahead_group;
        ahead.too += job->ahead_group;
    }
    V_UNROLL
    for (int i = 0; i < TILE_M; i++) {
        V_UNROLL
        for (int v = 0; v < vectors; v++) v_store(job->chain + i * TILE_N + v * VEC_N, acc[i][v]);
    }
}

void MOE_KERNEL(micro_left)(int64_t vectors, const left_job *job)
{
    if (vectors == 1)
        left(1, job);
    else
        left(TILE_V, job);
}

/* `wide` vectors of columns j and on; it and m are constants at every call, and k but at the end of
 * a sum. */
V_INLINE void few_columns(const int m, const int wide, const int64_t k, const few_job *job,
                          int64_t j)
{
    vec acc[FEW_M][TILE_V];
    V_UNROLL
    for (int i = 0; i < m; i++) {
        V_UNROLL
        for (int v = 0; v < wide; v++)
            acc[i][v] = job->fresh ? v_zero()
                                   : v_load(job->out + i * job->out_stride + j + v * VEC_N);
    }
    for (int64_t p = 0; p < k; p++) {
        const real *b = job->b + p * job->b_stride + j;
        const real *ahead = job->ahead.at + p * job->ahead.stride + j;
        V_UNROLL
        for (int v = 0; v < wide; v++) {
            vec row = v_load(b + v * VEC_N);
            __builtin_prefetch(ahead + v * VEC_N, 0, 2);
            V_UNROLL
            for (int i = 0; i < m; i++)
                acc[i][v] = v_fma(v_set1(job->a[p * m + i]), row, acc[i][v]);
        }
    }
    V_UNROLL
    for (int i = 0; i < m; i++) {
        V_UNROLL
        for (int v = 0; v < wide; v++)
            v_store(job->out + i * job->out_stride + j + v * VEC_N, acc[i][v]);
    }
}

V_INLINE void few(const int m, const int64_t k, const few_job *job)
{
    int64_t j = 0;
    for (; j + TILE_N <= job->n; j += TILE_N) few_columns(m, TILE_V, k, job, j);
    for (; j + VEC_N <= job->n; j += VEC_N) few_columns(m, 1, k, job, j);
    for (; j < job->n; j++)
        for (int i = 0; i < m; i++) {
            real *out = job->out + i * job->out_stride + j, sum = job->fresh ? R(0.0) : *out;
            for (int64_t p = 0; p < k; p++)
                sum = r_fma(job->a[p * m + i], job->b[p * job->b_stride + j], sum);
            *out = sum;
        }
}

void MOE_KERNEL(micro_few)(const few_job *job)
{
    int whole = job->k == FEW_K;
    switch (job->m) {
    case 1: whole ? few(1, FEW_K, job) : few(1, job->k, job); break;
    case 2: whole ? few(2, FEW_K, job) : few(2, job->k, job); break;
    case 3: whole ? few(3, FEW_K, job) : few(3, job->k, job); break;
    case 4: whole ? few(4, FEW_K, job) : few(4, job->k, job); break;
    default: break;
    }
}
