/* gemm_pack.c - rows and weights copied into the order of the kernels: gemm_pack.h says which. */
#include "cpu/gemm_pack.h"

enum { GROUPS = GROUPS_M > TILE_V ? GROUPS_M : TILE_V };

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* t = elements q .. q+VEC_N-1 of VEC_N rows, turned: t[i] has element q+i of each. `wide` is a
 * constant at every call, here and below. */
V_INLINE void turn_rows(vec *t, const void *const *from, const real *scale, int64_t q,
                        const int wide)
{
    V_UNROLL
    for (int i = 0; i < VEC_N; i++) t[i] = v_mul(v_get_at(from[i], q, wide), v_set1(scale[i]));
    v_transpose(t);
}

/* Lines that do not touch, or of one vector: the next overwrites what spills. */
V_INLINE void pack_apart(real *to, int64_t stride, const void *const *from, const real *scale,
                         int64_t groups, int64_t k, const int wide)
{
    for (int64_t q = 0; q + VEC_N <= k; q += VEC_N)
        for (int64_t g = 0; g < groups; g++) {
            vec t[VEC_N];
            turn_rows(t, from + g * VEC_N, scale + g * VEC_N, q, wide);
            V_UNROLL
            for (int i = 0; i < VEC_N; i++) v_store(to + (q + i) * stride + g * VEC_N, t[i]);
        }
}

/* Lines of several vectors that touch are stored one after the other. */
V_INLINE void pack_dense(real *to, int64_t stride, const void *const *from, const real *scale,
                         int64_t groups, int64_t k, const int wide)
{
    for (int64_t q = 0; q + VEC_N <= k; q += VEC_N) {
        vec t[GROUPS_M][VEC_N];
        for (int64_t g = 0; g < groups; g++)
            turn_rows(t[g], from + g * VEC_N, scale + g * VEC_N, q, wide);
        for (int i = 0; i < VEC_N; i++)
            for (int64_t g = 0; g < groups; g++)
                v_store(to + (q + i) * stride + g * VEC_N, t[g][i]);
    }
}

V_INLINE void pack_rows_of(real *to, int64_t stride, const moe__rows *a, int64_t r, int64_t m,
                           int64_t p, int64_t k, const int wide)
{
    const void *from[GROUPS * VEC_N];
    real scale[GROUPS * VEC_N];
    int64_t groups = blocks(m, VEC_N);
    for (int64_t i = 0; i < groups * VEC_N; i++) {
        from[i] = row_of(a, r + least(i, m - 1), p);
        scale[i] = scale_of(a, r + least(i, m - 1));
    }
    if (groups == 1 || stride >= groups * VEC_N)
        pack_apart(to, stride, from, scale, groups, k, wide);
    else
        pack_dense(to, stride, from, scale, groups, k, wide);
    for (int64_t q = k - k % VEC_N; q < k; q++)
        for (int64_t i = 0; i < m; i++) to[q * stride + i] = get_at(from[i], q, wide) * scale[i];
}

void MOE_KERNEL(pack_rows)(real *to, int64_t stride, const moe__rows *a, int64_t r, int64_t m,
                           int64_t p, int64_t k)
{
    if (WIDE(a->wide))
        pack_rows_of(to, stride, a, r, m, p, k, 1);
    else
        pack_rows_of(to, stride, a, r, m, p, k, 0);
}

/* to[k][n of stride] = b[k,n] where columns (col 1) or rows (row 1) are contiguous or neither. */
V_INLINE void pack_block_of(real *to, int64_t stride, const void *b, int64_t row, int64_t col,
                            int64_t k, int64_t n, const int wide)
{
    int64_t p = 0;
    if (n % VEC_N == 0 && col == 1) {
        for (; p < k; p++)
            for (int64_t v = 0; v < n; v += VEC_N)
                v_store(to + p * stride + v, v_get_at(b, p * row + v, wide));
    } else if (n % VEC_N == 0 && row == 1) {
        for (; p + VEC_N <= k; p += VEC_N)
            for (int64_t v = 0; v < n; v += VEC_N) {
                vec t[VEC_N];
                V_UNROLL
                for (int i = 0; i < VEC_N; i++) t[i] = v_get_at(b, (v + i) * col + p, wide);
                v_transpose(t);
                V_UNROLL
                for (int i = 0; i < VEC_N; i++) v_store(to + (p + i) * stride + v, t[i]);
            }
    }
    for (; p < k; p++)
        for (int64_t j = 0; j < n; j++) to[p * stride + j] = get_at(b, p * row + j * col, wide);
}

static void pack_block(real *to, int64_t stride, const moe__matrices *m, const void *b, int64_t row,
                       int64_t col, int64_t k, int64_t n)
{
    if (WIDE(m->wide))
        pack_block_of(to, stride, b, row, col, k, n, 1);
    else
        pack_block_of(to, stride, b, row, col, k, n, 0);
}

/* How many elements from number `at` on are in its panel, `count` at most. */
static int64_t within_panel(const moe__matrices *m, int64_t at, int64_t count)
{
    return m->panel ? least(count, m->panel - at % m->panel) : count;
}

void MOE_KERNEL(pack_columns)(real *to, int64_t stride, int64_t width, const moe__matrices *m,
                              const void *b, int64_t p, int64_t k, int64_t j, int64_t n)
{
    int by_columns = m->stride_col == 1;
    for (int64_t done = 0, all = by_columns ? n : k, some; done < all; done += some) {
        int64_t i = by_columns ? p : p + done, l = by_columns ? j + done : j;
        some = within_panel(m, by_columns ? l : i, all - done);
        pack_block(by_columns ? to + done : to + done * stride, stride, m,
                   place_at(b, element_of(m, i, l), m->wide), m->stride_row, m->stride_col,
                   by_columns ? k : some, by_columns ? some : n);
    }
    for (int64_t i = 0; i < k && n < width; i++)
        for (int64_t l = n; l < width; l++) to[i * stride + l] = R(0.0);
}

void MOE_KERNEL(pack_lines)(real *to, int64_t panel, const moe__matrices *m, const void *b,
                            int64_t p, int64_t k, int64_t i, int64_t n)
{
    for (int64_t done = 0; done < k; done += panel, to += TILE_M * MOE__PANEL) {
        int64_t width = least(panel, k - done);
        pack_block(to, MOE__PANEL, m, place_at(b, element_of(m, p + done, i), m->wide),
                   m->stride_col, m->stride_row, n, width);
        for (int64_t l = n; l < TILE_M; l++)
            for (int64_t q = 0; q < width; q++) to[l * MOE__PANEL + q] = R(0.0);
    }
}

V_INLINE void pack_width_of(real *to, int64_t step, const moe__rows *g, int64_t r, int64_t k,
                            int64_t j, int64_t n, const int wide)
{
    for (int64_t p = 0; p < k; p++, to += TILE_N) {
        const void *from = row_of(g, r + p, j);
        real scale = scale_of(g, r + p), *line = to;
        int64_t l = 0;
        for (; l + TILE_N <= n; l += TILE_N, line += step)
            for (int v = 0; v < TILE_N; v += VEC_N)
                v_store(line + v, v_mul(v_get_at(from, l + v, wide), v_set1(scale)));
        for (int64_t i = 0; l < n && i < TILE_N; i++)
            line[i] = l + i < n ? get_at(from, l + i, wide) * scale : R(0.0);
    }
}

void MOE_KERNEL(pack_width)(real *to, int64_t step, const moe__rows *g, int64_t r, int64_t k,
                            int64_t j, int64_t n)
{
    if (WIDE(g->wide))
        pack_width_of(to, step, g, r, k, j, n, 1);
    else
        pack_width_of(to, step, g, r, k, j, n, 0);
}
