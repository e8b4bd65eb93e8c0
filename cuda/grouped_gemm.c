/* grouped_gemm.c - products of the rows of experts with their matrices, by cuBLAS.
 *
 * cuBLAS counts by columns: a row-major matrix [r,c] is there a matrix [c,r], so out = a b is there
 * out^T = b^T a^T, and a product below is given with its operands exchanged.
 *
 *     padded  every expert has C rows: one strided-batched product, or one for each expert where
 *             the host gave one pointer each; nothing is asked of the host
 *     exact   one product for each expert with rows, or one grouped product of all where each would
 *             fill only a corner of the device and their addresses are aligned
 *
 * Accumulation is in f32. */
#include "grouped_gemm.h"

#include "cuda_internal.h"
#include "expert_rows.h"

#include <limits.h>

/* A product by itself has a tile of about 128 by 128 for each multiprocessor or less: with 64 rows
 * and n = 2048 it keeps 16 of more than 100 busy, and experts wait for each other. Grouped, all run
 * at once. With 512 rows each others measured the loop to be faster (85 against 130 TFLOP/s on an
 * H100), so the rule is on the side of the loop. */
enum { GROUPED_FROM_EXPERTS = 8, GROUPED_TO_ROWS = 64 };

static cudaDataType_t type_of(int32_t dtype)
{
    return dtype == MOE_DTYPE_BF16 ? CUDA_R_16BF : dtype == MOE_DTYPE_F16 ? CUDA_R_16F : CUDA_R_32F;
}

static bool has(const moe__matrices *m) { return m->base || m->each; }

static char *matrix_of(const moe__matrices *m, int64_t expert)
{
    int64_t size = moe__dtype_size(m->dtype);
    if (m->each) return m->each[expert] ? (char *)m->each[expert] + m->offset * size : NULL;
    return (char *)m->base + (m->offset + expert * m->stride_expert) * size;
}

/* ---- strides --------------------------------------------------------------------------------- */

/* A matrix [k,n] as cuBLAS sees it: rows contiguous ("by rows"), or columns. */
typedef struct layout {
    bool by_rows;
    int64_t ld;
} layout;

/* False: neither is contiguous, or rows run backwards; then a copy is multiplied. */
static bool find_layout(const moe__matrices *m, int64_t k, int64_t n, layout *l)
{
    int64_t row = k == 1 ? n : m->stride_row, col = n == 1 ? k : m->stride_col;
    if ((m->stride_col == 1 || n == 1) && row >= n && row <= INT_MAX) {
        *l = (layout){true, row};
        return true;
    }
    if ((m->stride_row == 1 || k == 1) && col >= k && col <= INT_MAX) {
        *l = (layout){false, col};
        return true;
    }
    return false;
}

moe_status moe__cuda_check_matrices(const moe__cuda_groups *g, const char *name, moe__matrices m,
                                    int64_t k, int64_t n, bool gradient)
{
    if (!has(&m)) return MOE_OK;
    if (k > INT_MAX || n > INT_MAX)
        return moe__cuda_fail(MOE_ERROR_NOT_SUPPORTED, g->workers,
                              "%s%s has %lld rows and %lld columns, more than cuBLAS counts",
                              gradient ? "the gradient of " : "", name, (ll)k, (ll)n);
    if (m.dtype != g->dtype && !(gradient && m.dtype == MOE_DTYPE_F32))
        return moe__cuda_fail(
            MOE_ERROR_NOT_SUPPORTED, g->workers, "%s%s has dtype %d, the rows have %d",
            gradient ? "the gradient of " : "", name, (int)m.dtype, (int)g->dtype);
    return MOE_OK;
}

/* ---- one call of cuBLAS ---------------------------------------------------------------------- */

/* c[n,m] (=|+=) x y in cuBLAS's order: c^T [m,n] = op(x) op(y), with x, y, c of an expert. The
 * count of rows is one of m, n, k. */
typedef struct product {
    const moe__cuda_groups *g;
    cublasHandle_t handle;
    cublasOperation_t op_x, op_y;
    int64_t m, n, k;
    int64_t ld_x, ld_y, ld_c;
    cudaDataType_t type, type_c;
    cublasComputeType_t compute;
    float alpha, beta;
} product;

static moe_status begin_product(product *p, const moe__cuda_groups *g, bool add)
{
    *p = (product){.g = g, .type = type_of(g->dtype), .type_c = type_of(g->dtype), .alpha = 1};
    p->beta = add ? 1 : 0;
    p->compute = moe__cuda_compute_type(g->workers, g->dtype);
    return moe__cuda_cublas(g->workers, &p->handle);
}

static moe_status multiply(const product *p, const void *x, const void *y, void *c)
{
    cublasStatus_t status = cublasGemmEx(p->handle, p->op_x, p->op_y, (int)p->m, (int)p->n,
                                         (int)p->k, &p->alpha, x, p->type, (int)p->ld_x, y, p->type,
                                         (int)p->ld_y, &p->beta, c, p->type_c, (int)p->ld_c,
                                         p->compute, CUBLAS_GEMM_DEFAULT);
    return moe__cublas_status(status, p->g->workers, "cublasGemmEx");
}

static moe_status multiply_strided(const product *p, const void *x, int64_t stride_x, const void *y,
                                   int64_t stride_y, void *c, int64_t stride_c)
{
    cublasStatus_t status = cublasGemmStridedBatchedEx(
        p->handle, p->op_x, p->op_y, (int)p->m, (int)p->n, (int)p->k, &p->alpha, x, p->type,
        (int)p->ld_x, stride_x, y, p->type, (int)p->ld_y, stride_y, &p->beta, c, p->type_c,
        (int)p->ld_c, stride_c, (int)p->g->experts, p->compute, CUBLAS_GEMM_DEFAULT);
    return moe__cublas_status(status, p->g->workers, "cublasGemmStridedBatchedEx");
}

/* ---- rows ------------------------------------------------------------------------------------ */

static int64_t first_row(const moe__cuda_groups *g, int64_t expert)
{
    return g->padded > 0 ? expert * g->padded : g->expert_begin[expert] - g->expert_begin[0];
}

static int64_t rows_of(const moe__cuda_groups *g, int64_t expert)
{
    return g->padded > 0 ? g->padded : g->expert_begin[expert + 1] - g->expert_begin[expert];
}

static char *row_of(const moe__cuda_groups *g, moe__cuda_dense rows, int64_t expert)
{
    return (char *)rows.data + first_row(g, expert) * rows.stride * moe__dtype_size(g->dtype);
}

static moe_status check_rows(const moe__cuda_groups *g, int64_t rows, int64_t stride)
{
    if (rows <= INT_MAX && stride <= INT_MAX) return MOE_OK;
    return moe__cuda_fail(
        MOE_ERROR_NOT_SUPPORTED, g->workers,
        "%lld rows of an expert, %lld elements apart, are more than cuBLAS counts", (ll)rows,
        (ll)stride);
}

/* ---- grouped --------------------------------------------------------------------------------- */

static bool want_groups(const product *p, int64_t *count)
{
    const moe__cuda_groups *g = p->g;
    *count = 0;
    if (g->padded > 0 || g->experts < GROUPED_FROM_EXPERTS || p->type_c != p->type) return false;
    for (int64_t e = 0; e < g->experts; e++) *count += rows_of(g, e) > 0;
    return *count >= GROUPED_FROM_EXPERTS && g->rows <= *count * GROUPED_TO_ROWS &&
           *count <= INT_MAX;
}

#if CUBLAS_VERSION >= 120500
/* The operands of expert e; c NULL: not wanted. */
typedef void (*operands_fn)(const void *of, int64_t e, const void **x, const void **y, void **c);

/* Unlike a product by itself, which cuBLAS picks by its addresses as well, those of a group must be
 * aligned by the caller where tensor cores make them: else the device fails. */
static bool may_group(const product *p, operands_fn operands, const void *of)
{
    const moe__cuda_groups *g = p->g;
    if (p->compute == CUBLAS_COMPUTE_32F_PEDANTIC) return true;
    for (int64_t e = 0; e < g->experts; e++) {
        const void *x, *y;
        void *c;
        if (rows_of(g, e) == 0) continue;
        operands(of, e, &x, &y, &c);
        if (c && (((uintptr_t)x | (uintptr_t)y | (uintptr_t)c) & 15) != 0) return false;
    }
    return true;
}

/* All experts with rows at once; `rows_are` says which of m, n, k counts them. */
static moe_status multiply_grouped(const product *p, char rows_are, int64_t count,
                                   operands_fn operands, const void *of)
{
    const moe__cuda_groups *g = p->g;
    moe__cuda_group_arrays a;
    int n = 0;
    MOE_TRY(moe__cuda_group_room(g->workers, count, &a));
    for (int64_t e = 0; e < g->experts; e++) {
        void *c = NULL;
        if (rows_of(g, e) == 0) continue;
        operands(of, e, &a.x[n], &a.y[n], &c);
        if (!c) continue;
        a.c[n] = c;
        a.op_x[n] = p->op_x, a.op_y[n] = p->op_y;
        a.m[n] = (int)p->m, a.n[n] = (int)p->n, a.k[n] = (int)p->k;
        *(rows_are == 'n' ? &a.n[n] : &a.k[n]) = (int)rows_of(g, e);
        a.ld_x[n] = (int)p->ld_x, a.ld_y[n] = (int)p->ld_y, a.ld_c[n] = (int)p->ld_c;
        a.alpha[n] = p->alpha, a.beta[n] = p->beta;
        a.size[n] = 1;
        n++;
    }
    if (n == 0) return MOE_OK;
    void **x = g->pointers, **y = x + g->experts, **c = y + g->experts;
    MOE_TRY(moe__cuda_put_pointers(g->workers, x, a.x, n));
    MOE_TRY(moe__cuda_put_pointers(g->workers, y, a.y, n));
    MOE_TRY(moe__cuda_put_pointers(g->workers, c, (const void *const *)a.c, n));
    cublasStatus_t status = cublasGemmGroupedBatchedEx(
        p->handle, a.op_x, a.op_y, a.m, a.n, a.k, a.alpha, (const void *const *)x, p->type, a.ld_x,
        (const void *const *)y, p->type, a.ld_y, a.beta, c, p->type_c, a.ld_c, n, a.size,
        p->compute);
    return moe__cublas_status(status, g->workers, "cublasGemmGroupedBatchedEx");
}
#endif

/* ---- out = a b ------------------------------------------------------------------------------- */

typedef struct rows_product {
    product p;
    moe__cuda_dense a, out;
    moe__matrices b;
} rows_product;

static void rows_operands(const void *of, int64_t e, const void **x, const void **y, void **c)
{
    const rows_product *r = of;
    *x = matrix_of(&r->b, e);
    *y = row_of(r->p.g, r->a, e);
    *c = row_of(r->p.g, r->out, e);
}

static moe_status each_product(rows_product *r)
{
    const moe__cuda_groups *g = r->p.g;
    for (int64_t e = 0; e < g->experts; e++) {
        const void *x, *y;
        void *c;
        r->p.n = rows_of(g, e);
        if (r->p.n == 0) continue;
        rows_operands(r, e, &x, &y, &c);
        MOE_TRY(multiply(&r->p, x, y, c));
    }
    return MOE_OK;
}

/* Expert by expert with a dense copy of its matrix [k,n]. */
static moe_status copied_product(rows_product *r, int64_t k, int64_t n)
{
    const moe__cuda_groups *g = r->p.g;
    int64_t size = moe__dtype_size(g->dtype), dense[2] = {n, 1};
    int64_t strides[2] = {r->b.stride_row, r->b.stride_col};
    void *matrix;
    MOE_TRY(moe__cuda_matrix_room(g->workers, k * n * size, &matrix));
    for (int64_t e = 0; e < g->experts; e++) {
        r->p.n = rows_of(g, e);
        if (r->p.n == 0) continue;
        MOE_TRY(moe__cuda_copy_matrix(g->workers, matrix, dense, matrix_of(&r->b, e), strides, k, n,
                                      size));
        MOE_TRY(multiply(&r->p, matrix, row_of(g, r->a, e), row_of(g, r->out, e)));
    }
    return MOE_OK;
}

moe_status moe__cuda_product(const moe__cuda_groups *g, int64_t k, int64_t n, moe__cuda_dense a,
                             moe__matrices b, bool transposed, moe__cuda_dense out, bool add)
{
    rows_product r = {.a = a, .b = b, .out = out};
    layout l = {true, n};
    int64_t count;
    if (g->rows == 0) return MOE_OK;
    if (transposed) {
        r.b.stride_row = b.stride_col;
        r.b.stride_col = b.stride_row;
    }
    bool copied = !find_layout(&r.b, k, n, &l);
    MOE_TRY(check_rows(g, g->rows, moe__max(a.stride, out.stride)));
    MOE_TRY(begin_product(&r.p, g, add));
    r.p.op_x = l.by_rows ? CUBLAS_OP_N : CUBLAS_OP_T;
    r.p.op_y = CUBLAS_OP_N;
    r.p.m = n, r.p.n = g->padded, r.p.k = k;
    r.p.ld_x = l.ld, r.p.ld_y = a.stride, r.p.ld_c = out.stride;
    if (copied) return copied_product(&r, k, n);
    if (g->padded > 0 && !b.each)
        return multiply_strided(&r.p, matrix_of(&b, 0), b.stride_expert, a.data,
                                g->padded * a.stride, out.data, g->padded * out.stride);
#if CUBLAS_VERSION >= 120500
    if (want_groups(&r.p, &count) && may_group(&r.p, rows_operands, &r))
        return multiply_grouped(&r.p, 'n', count, rows_operands, &r);
#endif
    return each_product(&r);
}

/* ---- dw = a^T d ------------------------------------------------------------------------------ */

typedef struct gradient_product {
    product p;
    moe__cuda_dense x, y;
    moe__matrices dw;
} gradient_product;

static void gradient_operands(const void *of, int64_t e, const void **x, const void **y, void **c)
{
    const gradient_product *r = of;
    *x = row_of(r->p.g, r->x, e);
    *y = row_of(r->p.g, r->y, e);
    *c = matrix_of(&r->dw, e);
}

static moe_status each_gradient(gradient_product *r)
{
    const moe__cuda_groups *g = r->p.g;
    for (int64_t e = 0; e < g->experts; e++) {
        const void *x, *y;
        void *c;
        r->p.k = rows_of(g, e);
        if (r->p.k == 0) continue;
        gradient_operands(r, e, &x, &y, &c);
        if (c) MOE_TRY(multiply(&r->p, x, y, c));
    }
    return MOE_OK;
}

/* Expert by expert into a dense copy of its gradient [k,n], which then goes back. */
static moe_status copied_gradient(gradient_product *r, int64_t k, int64_t n)
{
    const moe__cuda_groups *g = r->p.g;
    int64_t size = moe__dtype_size(r->dw.dtype), dense[2] = {n, 1};
    int64_t strides[2] = {r->dw.stride_row, r->dw.stride_col};
    void *matrix;
    MOE_TRY(moe__cuda_matrix_room(g->workers, k * n * size, &matrix));
    for (int64_t e = 0; e < g->experts; e++) {
        void *dw = matrix_of(&r->dw, e);
        r->p.k = rows_of(g, e);
        if (r->p.k == 0 || !dw) continue;
        if (r->p.beta != 0)
            MOE_TRY(moe__cuda_copy_matrix(g->workers, matrix, dense, dw, strides, k, n, size));
        MOE_TRY(multiply(&r->p, row_of(g, r->x, e), row_of(g, r->y, e), matrix));
        MOE_TRY(moe__cuda_copy_matrix(g->workers, dw, strides, matrix, dense, k, n, size));
    }
    return MOE_OK;
}

/* Zeros for the experts without rows, a run of them at once where they lie in one array. */
static moe_status zero_idle(const moe__cuda_groups *g, int64_t k, int64_t n,
                            const moe__matrices *dw)
{
    int64_t size = moe__dtype_size(dw->dtype);
    for (int64_t e = 0; e < g->experts; e++) {
        int64_t run = 0;
        while (e + run < g->experts && rows_of(g, e + run) == 0 && (run == 0 || !dw->each)) run++;
        if (run == 0 || !matrix_of(dw, e)) continue;
        int64_t count[3] = {run, k, n};
        int64_t stride[3] = {dw->stride_expert, dw->stride_row, dw->stride_col};
        MOE_TRY(moe__cuda_zero_strided(g->workers, matrix_of(dw, e), count, stride, size));
        e += run - 1;
    }
    return MOE_OK;
}

moe_status moe__cuda_weight_gradient(const moe__cuda_groups *g, int64_t k, int64_t n,
                                     moe__cuda_dense a, moe__cuda_dense d, moe__matrices dw,
                                     bool overwrite)
{
    gradient_product r = {.dw = dw};
    layout l = {true, n};
    int64_t count;
    if (!has(&dw)) return MOE_OK;
    bool copied = !find_layout(&dw, k, n, &l);
    if (overwrite && g->padded == 0) MOE_TRY(zero_idle(g, k, n, &dw));
    if (g->rows == 0) return MOE_OK;
    MOE_TRY(check_rows(g, g->rows, moe__max(a.stride, d.stride)));
    MOE_TRY(begin_product(&r.p, g, !overwrite));
    /* dw by rows is there [n,k] = d^T a, by columns [k,n] = a^T d; the first has rows as
     * columns. */
    r.x = l.by_rows ? d : a;
    r.y = l.by_rows ? a : d;
    r.p.type_c = type_of(dw.dtype);
    r.p.op_x = CUBLAS_OP_N, r.p.op_y = CUBLAS_OP_T;
    r.p.m = l.by_rows ? n : k, r.p.n = l.by_rows ? k : n, r.p.k = g->padded;
    r.p.ld_x = r.x.stride, r.p.ld_y = r.y.stride, r.p.ld_c = l.ld;
    if (copied) return copied_gradient(&r, k, n);
    if (g->padded > 0 && !dw.each)
        return multiply_strided(&r.p, r.x.data, g->padded * r.x.stride, r.y.data,
                                g->padded * r.y.stride, matrix_of(&dw, 0), dw.stride_expert);
#if CUBLAS_VERSION >= 120500
    if (want_groups(&r.p, &count) && may_group(&r.p, gradient_operands, &r))
        return multiply_grouped(&r.p, 'k', count, gradient_operands, &r);
#endif
    return each_gradient(&r);
}
