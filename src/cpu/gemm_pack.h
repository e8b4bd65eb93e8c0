/* gemm_pack.h - operands of products in the order in which gemm_micro.h reads them, widened to what
 * is computed with. */
#ifndef MOE_CPU_GEMM_PACK_H
#define MOE_CPU_GEMM_PACK_H

#include "cpu/gemm_micro.h"

/* n / block, rounded up. */
static inline int64_t blocks(int64_t n, int64_t block) { return n / block + (n % block != 0); }

/* Where part i begins when n is cut in `parts` that differ by one at most. */
static inline int64_t part(int64_t n, int64_t parts, int64_t i)
{
    return n / parts * i + (i < n % parts ? i : n % parts);
}

/* Element i of row r. */
static inline const void *row_of(const moe__rows *rows, int64_t r, int64_t i)
{
    int64_t row = rows->row_index ? rows->row_index[r] : r;
    return place_at(rows->data, row * rows->stride + i, rows->wide);
}

/* x * 1 is x, so rows without a scale are multiplied too. */
static inline real scale_of(const moe__rows *rows, int64_t r)
{
    return rows->scale ? ((const real *)rows->scale)[r] : R(1.0);
}

/* The same weights read the other way round: [n,k]. */
static inline moe__matrices transposed(moe__matrices m)
{
    int64_t row = m.stride_row;
    m.stride_row = m.stride_col;
    m.stride_col = row;
    return m;
}

/* The matrix of expert e, or NULL. */
static inline void *matrix_of(const moe__matrices *m, int64_t e)
{
    if (m->each) return m->each[e] ? place_at(m->each[e], m->offset, m->wide) : NULL;
    return m->base ? place_at(m->base, e * m->stride_expert + m->offset, m->wide) : NULL;
}

/* Number of element (i,j) of a matrix whose (0,0) has number 0. */
static inline int64_t element_of(const moe__matrices *m, int64_t i, int64_t j)
{
    int64_t place = i * m->stride_row + j * m->stride_col;
    if (!m->panel) return place;
    int64_t along = m->stride_col == 1 ? j : i;
    return place + along / m->panel * (m->panel_step - m->panel);
}

/* to[k][stride] = columns p .. p+k-1 of rows r .. r+m-1, which become columns 0 .. m-1; m up to
 * TILE_M or TILE_N. Whole vectors are stored, in ascending order: what is beyond the m columns of a
 * line is overwritten by the next, and after the last there is room for a vector. */
void MOE_KERNEL(pack_rows)(real *to, int64_t stride, const moe__rows *a, int64_t r, int64_t m,
                           int64_t p, int64_t k);

/* to[k][width of stride] = rows p .. p+k-1 of columns j .. j+n-1 of b; columns from n to width
 * are 0. */
void MOE_KERNEL(pack_columns)(real *to, int64_t stride, int64_t width, const moe__matrices *m,
                              const void *b, int64_t p, int64_t k, int64_t j, int64_t n);

/* to[TILE_M][MOE__PANEL] for each `panel` rows of p .. p+k-1: element (p,i+l) is in line l; lines
 * from n on are 0. For micro_left. */
void MOE_KERNEL(pack_lines)(real *to, int64_t panel, const moe__matrices *m, const void *b,
                            int64_t p, int64_t k, int64_t i, int64_t n);

/* to[k][TILE_N], and as many `step` apart as n columns need: columns j .. j+n-1 of rows r .. r+k-1,
 * then 0. */
void MOE_KERNEL(pack_width)(real *to, int64_t step, const moe__rows *g, int64_t r, int64_t k,
                            int64_t j, int64_t n);

#endif
